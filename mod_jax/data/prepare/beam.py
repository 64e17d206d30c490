"""Preparing beyond one machine: the same shards as an Apache Beam pipeline (`pip install mod-jax[beam]`), a shard an element.

Every machine has to see the source under the same path (a shared disk, or a bucket that is mounted), and the output, which may be gs://.
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
        "--beam: expected Apache Beam to be installed. Do: pip install mod-jax[beam]"
    ) from None


class WriteShard(beam.DoFn):
    """Writes a shard, by its number; counts its records for the runner to show."""

    def __init__(self, plan: Plan):
        self._plan = plan

    def setup(self) -> None:
        """Opens the source, once a worker."""
        self._source = open_source(self._plan.source)

    def process(self, shard: int) -> None:
        """Leaves the report beside the shard; the index is made of the reports."""
        report = write_shard(self._source, self._plan, shard)
        for name, count in (("written", report["records"]), ("skipped", len(report["skipped"]))):
            beam.metrics.Metrics.counter("prepare", name).inc(count)


def write_shards(plan: Plan, options: Sequence[str]) -> None:
    """Runs a pipeline that writes the shards that are not finished.

    Args:
      plan: what is prepared.
      options: of Beam's command line, e.g. --runner=DirectRunner.
    Raises:
      ConfigError: if the pipeline fails.
    """
    done = finished(plan)
    try:
        with beam.Pipeline(options=PipelineOptions(options)) as pipeline:
            shards = (
                pipeline
                | beam.Create([shard for shard in range(plan.shards) if shard not in done])
                | beam.Reshuffle()
            )
            shards | beam.ParDo(WriteShard(plan))
    except Exception as error:  # runners have no class of their own for what happened on their workers; some tell it as a traceback in a message
        raise ConfigError(
            f"--beam: expected a pipeline that ends well ({(str(error).strip() or repr(error)).splitlines()[-1]}). {AGAIN}"
        ) from error
