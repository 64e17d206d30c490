"""Measures one piece of PyTorch work: python -m benchmarks.peer --preset real-vocab --work mimic

--dump FOLDER writes weights, inputs, loss and gradient norms of one step instead. Its router draws
no noise. In a mimic step experts have room for an even load alone, and drop tokens beyond it. A
preference step is written without balance loss and with room for every token, because the two
answers of a pair are routed apart here, and together in `mod_jax`.
"""

import argparse
import logging
import os
import pathlib
import sys
import time
import warnings

from benchmarks import measure
from benchmarks.sizes import NEW_TOKENS, PRESETS, WORK, draw, positions_of

FORMS = ("authors", "rows", "compiled")
# How a step is made for --dump.
DUMPED = {
    "mimic": {"capacity": 1.0},
    "preference": {"capacity": 2.0, "balance_weight": 0.0},
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=PRESETS, default="tiny")
    parser.add_argument("--work", choices=(*WORK, "decode", "loss"), default="mimic")
    parser.add_argument(
        "--form",
        choices=FORMS,
        default="rows",
        help="authors: all logits; rows: those that are read; compiled: torch.compile, loss only",
    )
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--json", type=pathlib.Path, help="also writes the figures here")
    parser.add_argument("--dump", type=pathlib.Path, help="a folder")
    options = parser.parse_args()
    if options.form == "compiled" and options.work != "loss":
        parser.error("--form compiled: expected --work loss.")
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    if options.dump:
        dump(options)
    else:
        measure.report(measured(options), options.json)


def dump(options: argparse.Namespace) -> None:
    from benchmarks.peer.dump import write
    from benchmarks.peer.steps import Step

    sizes = PRESETS[options.preset]
    samples = draw(sizes)
    exact = DUMPED[options.work]
    step = Step(sizes, options.work, options.form, samples, sample=False, **exact)
    write(options.dump, options.work, step, samples)
    print(f"written to {options.dump}", file=sys.stderr)


def measured(options: argparse.Namespace) -> dict:
    from benchmarks.peer import steps

    sizes = PRESETS[options.preset]
    given = {"side": "peer", "preset": options.preset, "work": options.work, "form": options.form}
    if options.work == "loss":
        loss = steps.Loss(sizes, options.form == "compiled")
        return given | measure.repeat(loss, options.warmup, options.steps)
    samples = draw(sizes)
    if options.work == "decode":
        decoding = steps.Decoding(sizes, samples)
        first = measure.repeat(lambda: decoding(1), options.warmup, options.steps)
        found = measure.repeat(decoding, options.warmup, options.steps)
        a_token = (found["seconds"] - first["seconds"]) / (NEW_TOKENS - 1)
        return given | found | {"seconds_first": first["seconds"], "seconds_a_token": a_token}
    start = time.perf_counter()
    step = steps.Step(sizes, options.work, options.form, samples)
    step.make_moments()
    building = time.perf_counter() - start
    values = []
    found = measure.repeat(lambda: values.append(step()), options.warmup, options.steps)
    return (
        given
        | found
        | {
            "building_seconds": building,
            "tokens_per_second": positions_of(sizes, options.work) / found["seconds"],
            "loss_first": values[0],
            "loss_last": values[-1],
        }
    )


if __name__ == "__main__":
    main()
