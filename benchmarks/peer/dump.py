"""Weights, inputs and results of one step, for a test that compares ours with it."""

import pathlib

import numpy as np
import torch

from benchmarks.peer.steps import Step
from benchmarks.sizes import Samples


def write(folder: pathlib.Path, work: str, step: Step, samples: Samples) -> None:
    """Runs the loss and its gradient once and writes what went in and what came out.

    Args:
      folder: Gets student.npz and teacher.npz (name of the parameter -> array) and WORK.npz:
        the fields of `samples`, each term of the loss as `loss/TERM`, and the norm of each
        gradient as `gradient_norm/PARAMETER`.
      work: "mimic" or "preference".
      step: The step, before its first update.
      samples: Its batch.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, model in (("student", step.student), ("teacher", step.teacher)):
        # named_parameters has a tied head only once
        weights = {key: value.detach().numpy() for key, value in model.named_parameters()}
        np.savez_compressed(folder / f"{name}.npz", **weights)
    terms = step.loss()
    terms["loss"].backward()
    norms = {name: torch.linalg.norm(p.grad.double()) for name, p in step.trained.items()}
    np.savez_compressed(
        folder / f"{work}.npz",
        **samples._asdict(),
        **{f"loss/{name}": value.detach().numpy() for name, value in terms.items()},
        **{f"gradient_norm/{name}": norm.numpy() for name, norm in norms.items()},
    )
