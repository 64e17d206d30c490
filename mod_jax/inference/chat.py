"""A model with its processor: texts and pictures in, logits or an answer out.

Axes: B texts, S positions, V vocabulary.
"""

import contextlib
import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from mod_jax.config import ModelConfig, require
from mod_jax.data.samples.pixels import Picture
from mod_jax.data.samples.tokens import marked
from mod_jax.inference import generation
from mod_jax.inference.messages import Message, for_template, pictures_shown
from mod_jax.inference.processor import Processor, read_processor
from mod_jax.interop.loading import open_whole
from mod_jax.interop.pretrained import read
from mod_jax.interop.processor import chat_template
from mod_jax.recipe import is_run, open_run

# Lengths are rounded up to a multiple of this, so that a later question of a similar length runs
# the same compiled program.
MULTIPLE = 64


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
            (BadSample) if a picture cannot be read.
        """
        _check_list(images)
        if isinstance(text, str):
            return self._logits([text], [images])[0]
        return self._logits(text, images or [()] * len(text))

    def _logits(self, texts: Sequence[str], pictures: Sequence) -> np.ndarray:
        prompts = self._prompts(texts, pictures)
        with self._precision():
            found = np.asarray(generation.logits(self.config, self.params, prompts))
        return found[:, -prompts.segment_ids.sum(1).max() :]

    def generate(
        self,
        text: str | Sequence[Message],
        images: Sequence[Picture] = (),
        max_new_tokens: int = 64,
    ) -> str:
        """Answers a question greedily, up to the model's end token.

        Args:
          text: A question, which is put into the chat template. `<image>` stands where a picture
            stands; without any, the pictures come first. Or a conversation in transformers' chat
            format (see `inference.messages`), which the model continues.
          images: The pictures in order, as in `logits`, except those that a conversation carries
            itself.
          max_new_tokens: Largest number of tokens of the answer.

        Raises:
          ValueError: As `logits`, or (ConfigError) if the conversation is malformed or too long.
        """
        _check_list(images)
        messages = text
        if isinstance(messages, str):
            messages = [{"role": "user", "content": marked(messages, len(images))}]
        pictures = pictures_shown(messages, images)
        prompt = self.processor.render(for_template(messages, self.processor.render))
        prompts = self._prompts([prompt], [pictures], max_new_tokens)
        with self._precision():
            answers = generation.generate(self.config, self.params, prompts, max_new_tokens)
        ids = np.asarray(answers)[0]
        ids = ids[np.cumsum(ids == self.config.end_token_id) == 0]  # up to the first end token
        (answer,) = self.processor.tokenizer.batch_decode([ids.tolist()], skip_special_tokens=True)
        return answer.strip()

    def _prompts(
        self, texts: Sequence[str], pictures: Sequence[Sequence[Picture]], new_tokens: int = 0
    ) -> generation.Prompts:
        """A batch of texts; raises ConfigError if one is too long, with `new_tokens` more."""
        decoder = self.config.decoder
        # The capacity of an expert is a share of all positions, so that padding would change it.
        has_capacity = decoder.moe is not None and decoder.moe.capacity_factor is not None
        prompts = self.processor.prompts(texts, pictures, 1 if has_capacity else MULTIPLE)
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


def _check_list(images: object) -> None:
    is_list = isinstance(images, (list, tuple))
    require(is_list, "images", type(images).__name__, "a list of pictures")


def load(
    path, stage: str | None = None, dtype: str = "float32", template: str | None = None
) -> Chat:
    """Loads a model and its processor; see `mod_jax.load`."""
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
