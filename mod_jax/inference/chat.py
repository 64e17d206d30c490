"""A model with its processor: texts and pictures in, logits or an answer out.

Axes: B texts, S positions, V vocabulary.
"""

import contextlib
import dataclasses
import typing
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from mod_jax.config import ConfigError, ModelConfig, require
from mod_jax.data.samples.pixels import Picture
from mod_jax.data.samples.tokens import marked
from mod_jax.inference import generation
from mod_jax.inference.messages import (
    TEMPLATE_ERRORS,
    Message,
    expect,
    for_template,
    pictures_shown,
    short,
)
from mod_jax.inference.processor import Processor, read_processor
from mod_jax.interop.loading import open_whole
from mod_jax.interop.pretrained import read
from mod_jax.interop.processor import chat_template
from mod_jax.runs.folder import is_run, open_run
from mod_jax.sharding import check_platform

# Lengths are rounded up to a multiple of this, so that a later question of a similar length runs
# the same compiled program.
MULTIPLE = 64
PICTURE_FORMS = "a Pillow image, an array, the name of a file, or the bytes of one"


@dataclasses.dataclass(frozen=True)
class Chat:
    """A model that `mod_jax.load` loaded.

    Attributes:
      config: Configuration of the model.
      params: Name -> f32 array (docs/architecture.md).
      processor: Its tokenizer, chat template and preparation of pictures.
    """

    config: ModelConfig
    params: dict
    processor: Processor

    def logits(
        self,
        text: str | Sequence[str],
        images: Sequence[Picture] | Sequence[Sequence[Picture]] = (),
    ) -> np.ndarray:
        """Computes next-token logits at every position of a text, or of several.

        Args:
          text: The text, used as it is, without a chat template. `<image>` stands where a picture
            stands. Or a list of such texts.
          images: The pictures of the text in order. Each is a Pillow image, an array u8[H,W,3], the
            name of a file, or the bytes of an encoded picture. For a list of texts, a list of such
            lists.

        Returns:
          f32[S,V] for one text, where S is the length of the stock processor's input_ids: a picture
          takes as many positions as it has features. f32[B,S,V] for a list; each text is at the end
          of its row, and what stands before it is padding, whose logits are meaningless.

        Raises:
          ValueError: If the number of markers in a text is not the number of its pictures, or
            (BadSample) if a picture cannot be read, or (ConfigError) if a text is empty or too
            long.
        """
        is_one = isinstance(text, str)
        texts, pictures = batch_of([text] if is_one else text, [images] if is_one else images)
        for item in texts:
            expect(isinstance(item, str), "text", item, "a text, or a list of texts")
        rows = [
            row
            for chosen in self._batches(len(texts))
            for row in self._logits(texts[chosen], pictures[chosen])
        ]
        longest = max(map(len, rows))
        padded = [np.pad(row, ((longest - len(row), 0), (0, 0))) for row in rows]
        return padded[0] if is_one else np.stack(padded)

    def _logits(self, texts: Sequence[str], pictures: Sequence) -> np.ndarray:
        prompts = self._prompts(texts, pictures)
        with self._precision():
            found = np.asarray(generation.logits(self.config, self.params, prompts))
        return found[:, -prompts.segment_ids.sum(1).max() :]

    def generate(
        self,
        text: str | Sequence[Message] | Sequence[str | Sequence[Message]],
        images: Sequence[Picture] | Sequence[Sequence[Picture]] = (),
        max_new_tokens: int = 64,
    ) -> str | list[str]:
        """Answers a question, or several, greedily, each up to one of the model's end tokens.

        Args:
          text: A question, which is put into the chat template. `<image>` stands where a picture
            stands; without any, the pictures come first. Or a conversation in transformers' chat
            format (see `inference.messages`), which the model continues. Or a list of these.
          images: The pictures in order, as in `logits`, except those that a conversation carries
            itself. For a list of questions, a list of such lists.
          max_new_tokens: Largest number of tokens of an answer.

        Returns:
          The answer; for a list, a list of answers.

        Raises:
          ValueError: As `logits`, or (ConfigError) if a conversation is malformed, or the chat
            template cannot show it.
        """
        is_count = type(max_new_tokens) is int and max_new_tokens > 0
        require(is_count, "max_new_tokens", max_new_tokens, "a positive integer")
        is_one = isinstance(text, str) or is_conversation(text)
        asked, pictures = batch_of([text] if is_one else text, [images] if is_one else images)
        prompts = [self._prompt(item, shown) for item, shown in zip(asked, pictures)]
        answers = [
            answer
            for chosen in self._batches(len(prompts))
            for answer in self._answers(prompts[chosen], max_new_tokens)
        ]
        return answers[0] if is_one else answers

    def _prompt(
        self, text: str | Sequence[Message], images: Sequence[Picture]
    ) -> tuple[str, list[Picture]]:
        """The text of a question or conversation in the chat template, and all its pictures."""
        messages = text
        if isinstance(messages, str):
            empty = not messages.strip() and not images
            require(not empty, "text", messages, "a question, or pictures")
            messages = [{"role": "user", "content": marked(messages, len(images))}]
        pictures = pictures_shown(messages, images)
        try:
            return self.processor.render(for_template(messages, self.processor.render)), pictures
        except TEMPLATE_ERRORS as error:
            reason = " ".join(str(error).split())
            raise ConfigError(
                f"messages = {short(messages)}: expected messages that the chat template can show "
                f"({type(error).__name__}: {reason})."
            ) from error

    def _answers(
        self, asked: Sequence[tuple[str, Sequence[Picture]]], max_new_tokens: int
    ) -> list[str]:
        texts = [text for text, _ in asked]
        prompts = self._prompts(texts, [pictures for _, pictures in asked], max_new_tokens)
        with self._precision():
            found = generation.generate(self.config, self.params, prompts, max_new_tokens)
        ids = [  # of each answer, up to its first end token
            row[np.cumsum(row == self.config.end_token_id) == 0].tolist()
            for row in np.asarray(found)
        ]
        decoded = self.processor.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return [answer.strip() for answer in decoded]

    @property
    def _has_capacity(self) -> bool:
        """Whether an expert has a capacity. It is a share of all positions, padding included."""
        moe = self.config.decoder.moe
        return moe is not None and moe.capacity_factor is not None

    def _batches(self, texts: int) -> list[slice]:
        """What is computed together: all texts, or each alone where padding changes the result."""
        if self._has_capacity:
            return [slice(number, number + 1) for number in range(texts)]
        return [slice(0, texts)]

    def _prompts(
        self, texts: Sequence[str], pictures: Sequence[Sequence[Picture]], new_tokens: int = 0
    ) -> generation.Prompts:
        """A batch of texts.

        Raises:
          ConfigError: If one has no token, or is too long with `new_tokens` more.
        """
        decoder = self.config.decoder
        prompts = self.processor.prompts(texts, pictures, 1 if self._has_capacity else MULTIPLE)
        longest = int(prompts.segment_ids.sum(1).max()) + new_tokens
        require(
            longest <= decoder.max_positions,
            "positions",
            longest,
            f"at most {decoder.max_positions}, pictures and answer included, the longest sequence "
            "that the model supports",
        )
        return prompts

    def _precision(self) -> contextlib.AbstractContextManager:
        """Makes matrix products of a float32 model float32 on accelerators too."""
        precision = "highest" if self.config.dtype == "float32" else "default"
        return jax.default_matmul_precision(precision)


def is_conversation(text: object) -> bool:
    """Whether what is asked is one conversation, and not a list of questions."""
    return isinstance(text, (list, tuple)) and all(isinstance(item, Mapping) for item in text)


def batch_of(texts: Any, images: Any) -> tuple[Sequence[Any], Sequence[Sequence[Picture]]]:
    """Returns several texts, and the pictures of each.

    Raises:
      ConfigError: If the texts are no list or there are none, or the pictures are not a list of
        pictures for each of them.
    """
    is_list = isinstance(texts, (list, tuple)) and len(texts) > 0
    expect(is_list, "text", texts, "a text, or a list of at least one")
    is_list = isinstance(images, (list, tuple))
    require(is_list, "images", type(images).__name__, "a list of pictures")
    images = images or [()] * len(texts)
    for shown in images:
        is_list = isinstance(shown, (list, tuple))
        require(is_list, "images", type(shown).__name__, "a list of pictures for each text")
        for picture in shown:
            is_picture = isinstance(picture, typing.get_args(Picture))
            require(is_picture, "images", type(picture).__name__, f"pictures: {PICTURE_FORMS}")
    require(
        len(images) == len(texts),
        "images",
        f"{len(images)} lists of pictures",
        f"{len(texts)}, one for each text",
    )
    return texts, images


def load(
    path, stage: str | None = None, dtype: str = "float32", template: str | None = None
) -> Chat:
    """Loads a model and its processor; see `mod_jax.load`."""
    check_platform()
    if is_run(path):
        recipe, stage = open_run(path, stage)
        student = recipe.student_after(stage)
        data = recipe.config.stages[stage].data
        config = student.config
        params = student.params
        jinja = chat_template(template or data.template)
        processor = Processor(recipe.tokenizer, jinja, config, data.fit)
    else:
        require(stage is None, "stage", stage, f"None, as {path} is not a run")
        with open_whole(path) as pretrained:
            config = pretrained.config
            params = read(pretrained)
            processor = read_processor(pretrained.folder, config, template)
    config = dataclasses.replace(config, dtype=dtype, remat="none")
    return Chat(config, jax.device_put(params), processor)
