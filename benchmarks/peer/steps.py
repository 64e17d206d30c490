"""One train step, decoding, and the loss alone, in PyTorch."""

import numpy as np
import torch

from benchmarks.peer import losses, models
from benchmarks.sizes import (
    BALANCE_WEIGHT,
    BETA,
    LEARNING_RATE,
    LOSS_ROWS,
    NEW_TOKENS,
    TEACHER_WIDTH,
    Samples,
    Sizes,
)


class Step:
    """A train step on one batch: loss, gradients, AdamW.

    Args:
      sizes: Sizes of the models.
      work: "mimic" or "preference".
      form: A key of `losses.FORMS`.
      samples: The batch.
      capacity, sample: As for `models.student`.
      balance_weight: Weight of the balance loss.
    """

    def __init__(
        self,
        sizes: Sizes,
        work: str,
        form: str,
        samples: Samples,
        capacity: float = 1.5,
        sample: bool = True,
        balance_weight: float = BALANCE_WEIGHT,
    ):
        self.student = models.student(sizes, capacity, sample)
        self.teacher = models.teacher(sizes, self.student.vision_tower)
        self.mimic, self.answers = losses.FORMS[form]
        self.work = {"mimic": self._mimic, "preference": self._preference}[work]
        self.balance_weight = balance_weight
        self.pixels = models.pixels_of(samples.images)
        questions = torch.from_numpy(samples.questions).long()
        answers = torch.from_numpy(samples.answers).long()
        ignored = torch.full_like(questions, losses.IGNORED)
        self.tokens = [torch.cat([questions, answer], 1) for answer in answers.unbind(1)]
        self.labels = [torch.cat([ignored, answer], 1) for answer in answers.unbind(1)]
        self.trained = {n: p for n, p in self.student.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(
            self.trained.values(), lr=LEARNING_RATE, weight_decay=0.0, fused=True
        )

    def make_moments(self) -> None:
        """Lets the optimizer make its state, which it otherwise does in its first step."""
        for parameter in self.trained.values():
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def loss(self) -> dict[str, torch.Tensor]:
        """The terms of the loss; `loss` is their weighted sum."""
        return self.work()

    def __call__(self) -> float:
        loss = self.loss()["loss"]
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())

    def _mimic(self) -> dict[str, torch.Tensor]:
        tokens, labels = self.tokens[0], self.labels[0]
        with torch.no_grad():
            teacher_hidden = self.teacher(tokens, self.pixels)
        hidden = self.student(tokens, self.pixels)
        divergence, next_token = self.mimic(
            hidden, self.student.head, teacher_hidden, self.teacher.head, labels
        )
        balance = self.student.balance()
        # The authors add the balance loss to each of the two terms.
        loss = divergence + next_token + 2 * self.balance_weight * balance
        return {"loss": loss, "kl": divergence, "next_token": next_token, "balance": balance}

    def _preference(self) -> dict[str, torch.Tensor]:
        ratios, balance = [], torch.zeros(())
        for tokens, labels in zip(self.tokens, self.labels):
            hidden = self.student(tokens, self.pixels)
            balance = balance + self.student.balance()
            ratios.append(self.answers(hidden, self.student.head, labels))
        for answer, (tokens, labels) in enumerate(zip(self.tokens, self.labels)):
            with torch.no_grad():
                hidden = self.teacher(tokens, self.pixels)
                reference = self.answers(hidden, self.teacher.head, labels)
            ratios[answer] = ratios[answer] - reference
        preference = losses.kto_pair(*ratios)
        chosen, rejected = (BETA * ratio.mean() for ratio in ratios)
        return {
            "loss": preference + self.balance_weight * balance,
            "preference": preference,
            "reward_chosen": chosen,
            "reward_rejected": rejected,
        }


class Decoding:
    """Greedy decoding of one answer by transformers, with its key/value cache."""

    def __init__(self, sizes: Sizes, samples: Samples):
        self.student = models.student(sizes).eval()
        tokens = np.concatenate([samples.questions, samples.answers[:, 0]], 1)[:1]
        self.tokens = torch.from_numpy(tokens).long()
        self.pixels = models.pixels_of(samples.images[:1])

    @torch.no_grad()
    def __call__(self, new_tokens: int = NEW_TOKENS) -> torch.Tensor:
        embedded = self.student.embed(self.tokens, self.pixels)
        return self.student.language_model.generate(
            inputs_embeds=embedded,
            attention_mask=torch.ones(embedded.shape[:2], dtype=torch.long),
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            do_sample=False,
            use_cache=True,
            pad_token_id=0,
        )


class Loss:
    """The mimic loss alone: both heads, the divergence and the gradient of the hidden states."""

    def __init__(self, sizes: Sizes, compiled: bool):
        torch.manual_seed(0)
        width = sizes.width
        wide = TEACHER_WIDTH * width

        def random(*shape):
            return torch.randn(*shape) / shape[-1] ** 0.5

        self.hidden = torch.randn(LOSS_ROWS, width).requires_grad_()
        self.teacher_hidden = torch.randn(LOSS_ROWS, wide)
        self.head, self.teacher_head = random(sizes.words, width), random(sizes.words, wide)
        self.divergence = torch.compile(losses.divergence) if compiled else losses.divergence

    def __call__(self) -> float:
        self.hidden.grad = None
        loss = self.divergence(self.hidden, self.head, self.teacher_hidden, self.teacher_head)
        loss.backward()
        return float(loss.detach())
