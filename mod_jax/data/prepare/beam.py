"""Prepares a source beyond one machine: an Apache Beam pipeline that writes a shard per element.

The shards are the same as those of `local`. Every machine must see the source under the same path
(a shared disk, or a mounted bucket) and the output, which may be in a bucket (gs://). Beam is
optional: pip install mod-jax[beam].
"""

from collections.abc import Sequence

from mod_jax.config import ConfigError
from mod_jax.data.prepare.plan import AGAIN, Plan, finished
from mod_jax.data.prepare.shard import write_shard
from mod_jax.data.sources.kinds import open_source

try:
    import apache_beam as beam
    from apache_beam.options.pipeline_options import PipelineOptions
except ImportError:
    raise ConfigError(
        "--beam: expected Apache Beam to be installed. Install it: pip install mod-jax[beam]"
    ) from None


class WriteShard(beam.DoFn):
    """Writes a shard, given its number, and counts its records in Beam's metrics."""

    def __init__(self, plan: Plan):
        self._plan = plan

    def setup(self) -> None:
        """Opens the source, once per worker."""
        self._source = open_source(self._plan.source)

    def process(self, shard: int) -> None:
        """Writes the shard and, beside it, its report; the index is made from the reports."""
        report = write_shard(self._source, self._plan, shard)
        for name, count in (("written", report["records"]), ("skipped", len(report["skipped"]))):
            beam.metrics.Metrics.counter("prepare", name).inc(count)


def write_shards(plan: Plan, options: Sequence[str]) -> None:
    """Runs a pipeline that writes all unfinished shards.

    Args:
      plan: What to prepare.
      options: Command-line options of Beam, e.g. --runner=DirectRunner.
    Raises:
      ConfigError: If the pipeline fails.
    """
    done = finished(plan)
    missing = [shard for shard in range(plan.shards) if shard not in done]
    try:
        with beam.Pipeline(options=PipelineOptions(options)) as pipeline:
            shards = pipeline | beam.Create(missing) | beam.Reshuffle()
            shards | beam.ParDo(WriteShard(plan))
    except Exception as error:
        # Runners have no exception class for errors of their workers, and some put the worker's
        # whole traceback into the message. Its last line is the error itself.
        reason = (str(error).strip() or repr(error)).splitlines()[-1]
        raise ConfigError(
            f"--beam: expected the pipeline to succeed ({reason}). {AGAIN}"
        ) from error
