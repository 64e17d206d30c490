"""The losses of the mimic and the preference stage in PyTorch, in two forms.

The form "authors" does what the authors' code does: logits of all positions, and a next-token loss
in every forward pass, read or not. The form "rows" is what a careful user of PyTorch would write:
the same values from the positions alone that a loss reads.

Labels i64[B,S] are not shifted: a position's label is its own token, or IGNORED.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from benchmarks.sizes import BETA

IGNORED = -100
Head = Callable[[torch.Tensor], torch.Tensor]


def _next(labels: torch.Tensor) -> torch.Tensor:
    """The label of the following position."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED)


def _next_token(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, 1), _next(labels).flatten(), ignore_index=IGNORED)


def mimic_authors(
    hidden: torch.Tensor,
    head: Head,
    teacher_hidden: torch.Tensor,
    teacher_head: Head,
    labels: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(cross-entropy to the teacher, next-token loss), both means."""
    with torch.no_grad():
        teacher_logits = teacher_head(teacher_hidden).float()
        _next_token(teacher_logits, labels)
        teacher = torch.softmax(teacher_logits, -1)
    logits = head(hidden).float()
    next_token = _next_token(logits, labels)
    log_student = torch.log_softmax(logits, -1)
    terms = (teacher * log_student).masked_fill(torch.isinf(log_student), 0).sum(-1)
    compared = (labels != IGNORED).float()
    return -(terms * compared).sum() / compared.sum(), next_token


def mimic_rows(
    hidden: torch.Tensor,
    head: Head,
    teacher_hidden: torch.Tensor,
    teacher_head: Head,
    labels: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same as `mimic_authors`."""
    targets = _next(labels)
    read = (labels != IGNORED) | (targets != IGNORED)
    with torch.no_grad():
        teacher = torch.softmax(teacher_head(teacher_hidden[read]).float(), -1)
    log_student = torch.log_softmax(head(hidden[read]).float(), -1)
    compared = (labels[read] != IGNORED).float()
    divergence = -((teacher * log_student).sum(-1) * compared).sum() / compared.sum()
    return divergence, F.nll_loss(log_student, targets[read], ignore_index=IGNORED)


def answers_authors(hidden: torch.Tensor, head: Head, labels: torch.Tensor) -> torch.Tensor:
    """Summed log-probability of each sample's answer, f32[B]."""
    logits = head(hidden).float()
    _next_token(logits, labels)
    targets = _next(labels)
    log_words = torch.log_softmax(logits, -1)
    log_probs = log_words.gather(2, targets.clamp(min=0)[..., None])[..., 0]
    return (log_probs * (targets != IGNORED)).sum(-1)


def answers_rows(hidden: torch.Tensor, head: Head, labels: torch.Tensor) -> torch.Tensor:
    """The same as `answers_authors`."""
    targets = _next(labels)
    read = targets != IGNORED
    log_probs = -F.cross_entropy(head(hidden[read]).float(), targets[read], reduction="none")
    return torch.zeros(len(labels)).index_add(0, read.nonzero()[:, 0], log_probs)


def kto_pair(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """The authors' preference loss of the log-ratios f32[B], f32[]."""
    kl_chosen, kl_rejected = chosen.mean().clamp(min=0), rejected.mean().clamp(min=0)
    losses = [
        1 - torch.sigmoid(BETA * (chosen - kl_rejected)),
        1 - torch.sigmoid(BETA * (kl_chosen - rejected)),
    ]
    return torch.cat(losses).mean()


# form -> (mimic loss, log-probabilities of answers)
FORMS = {"authors": (mimic_authors, answers_authors), "rows": (mimic_rows, answers_rows)}


def divergence(
    hidden: torch.Tensor,
    head: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_head: torch.Tensor,
) -> torch.Tensor:
    """Mean cross-entropy to the teacher, for the loss alone: heads f32[V,D], hidden f32[N,D]."""
    with torch.no_grad():
        teacher = torch.softmax(teacher_hidden @ teacher_head.T, -1)
    logits = hidden @ head.T
    return (torch.logsumexp(logits, -1) - (teacher * logits).sum(-1)).mean()
