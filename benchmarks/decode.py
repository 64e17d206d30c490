"""Time of greedy decoding: python -m benchmarks.decode --preset=real-vocab

A prompt of a question, a picture and an answer is continued by 32 tokens. The time of a token is
the time of 32 tokens less that of one, divided by 31, so that the prompt (prefill) counts apart.
With --config it is the student of a recipe's last stage, or of --stage. Weights are drawn at
random, and no token ends an answer.
"""

import dataclasses
import time

import jax
import numpy as np
from absl import flags

from benchmarks import measure
from benchmarks import setting as settings
from benchmarks.setting import JSON, STEPS, WARMUP, Setting
from benchmarks.sizes import NEW_TOKENS
from mod_jax.inference.generation import Prompts, generate
from mod_jax.models import llava
from mod_jax.sharding import parameter_shardings

ROWS = flags.DEFINE_integer("rows", 1, "Prompts that are continued at a time.")


def prompts_of(setting: Setting, rows: int) -> Prompts:
    """The first row of the batch, `rows` times; all but its padding and its second answers."""
    batch = setting.batch
    kept = (batch.segment_ids[0] == 1) & (batch.branch_ids[0] < 2)

    def repeated(x: np.ndarray) -> np.ndarray:
        return np.repeat(x[:1], rows, 0)

    return Prompts(
        repeated(batch.tokens[:, kept]),
        repeated(batch.segment_ids[:, kept]),
        repeated(batch.picture_index[:, kept]),
        repeated(batch.images),
    )


def measured(setting: Setting, rows: int, warmup: int, steps: int) -> dict:
    """Decodes `warmup` + `steps` times.

    Returns:
      What `measure.repeat` returns of decoding 32 tokens, and
      seconds_first: Of decoding one token.
      seconds_a_token, tokens_per_second: Of the tokens after the first, of all rows.
      compilation_seconds, prompt_positions.
    """
    no_token = setting.student.decoder.vocab_size
    config = dataclasses.replace(setting.student, end_token_id=no_token, other_end_token_ids=())
    prompts = prompts_of(setting, rows)
    shapes = llava.abstract(config)
    shardings = parameter_shardings(setting.mesh, shapes, llava.axes(config))
    with jax.set_mesh(setting.mesh):
        params = jax.block_until_ready(settings.drawn(config, shapes, 0, shardings))
        start = time.perf_counter()
        programs = {
            count: generate.lower(config, params, prompts, count).compile()
            for count in (1, NEW_TOKENS)
        }
        compilation = time.perf_counter() - start

        def decoding(count: int) -> dict:
            program = programs[count]
            return measure.repeat(
                lambda: jax.block_until_ready(program(params, prompts)), warmup, steps
            )

        first, found = decoding(1), decoding(NEW_TOKENS)
    a_token = (found["seconds"] - first["seconds"]) / (NEW_TOKENS - 1)
    return found | {
        "seconds_first": first["seconds"],
        "seconds_a_token": a_token,
        "tokens_per_second": rows / a_token,
        "compilation_seconds": compilation,
        "prompt_positions": prompts.tokens.shape[1],
        "rows": rows,
    }


def main(_) -> None:
    setting = settings.of_flags("mimic")
    about = setting.about | {"side": "project", "work": "decode"}
    found = measured(setting, ROWS.value, WARMUP.value, STEPS.value)
    measure.report(about | found | {"device": jax.devices()[0].device_kind}, JSON.value)


if __name__ == "__main__":
    settings.run(main)
