"""A model with its processor, for whoever asks it something: texts and pictures in, logits or an answer out.

Axes: B texts, S positions, V vocabulary.
"""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from mod_jax.config import ModelConfig, ModelSource, require
from mod_jax.data.samples.tokens import marked
from mod_jax.inference import generation
from mod_jax.inference.messages import for_template, pictures_shown
from mod_jax.inference.processor import Processor, read_processor
from mod_jax.interop.loading import open_source
from mod_jax.interop.pretrained import read
from mod_jax.interop.processor import chat_template
from mod_jax.recipe import is_run, open_run

MULTIPLE = (
    64  # positions: lengths are padded to it, so that the next question finds its program compiled
)


@dataclasses.dataclass(frozen=True)
class Chat:
    """A model that `mod_jax.load` loaded.

    Attributes:
      config: of the model.
      params: name -> f32 array (docs/architecture.md).
      processor: its tokenizer, chat template and preparation of pictures.
    """

    config: ModelConfig
    params: dict
    processor: Processor

    def logits(self, text: str | Sequence[str], images: Sequence = ()) -> np.ndarray:
        """Next-token logits at every position of a text.

        Args:
          text: taken as it is, without a chat template; `<image>` stands where a picture stands. Or a list of texts.
          images: its pictures in order, each Pillow's, u8[H,W,3], a file or encoded bytes. For a list of texts a list of such lists.
        Returns:
          f32[S,V], S as long as the stock processor's input_ids: a picture takes as many positions as it has features. For a list f32[B,S,V],
          each text at the end of its row; what stands before it is padding and means nothing.
        Raises:
          ValueError: for another number of pictures than a text has places for; BadSample (one too) for a picture that cannot be read.
        """
        alone = isinstance(text, str)
        _check_list(images)
        prompts = (
            self._prompts([text], [images])
            if alone
            else self._prompts(text, images or [()] * len(text))
        )
        with self._precision():
            found = np.asarray(generation.logits(self.config, self.params, prompts))
        found = found[:, -prompts.segment_ids.sum(1).max() :]
        return found[0] if alone else found

    def generate(
        self, text: str | Sequence[dict], images: Sequence = (), max_new_tokens: int = 64
    ) -> str:
        """The greedy answer to a question, up to the model's end token.

        Args:
          text: what a user asks, put into the chat template; `<image>` stands where a picture stands, without any the pictures come first. Or a
            conversation as transformers' chat format has it, see `messages`: the model speaks next.
          images: the pictures in order, as in `logits`; those that a conversation does not carry itself.
          max_new_tokens: longest answer.
        Raises:
          ValueError: as `logits`; ConfigError (one too) for a conversation that is none.
        """
        _check_list(images)
        messages = (
            [{"role": "user", "content": marked(text, len(images))}]
            if isinstance(text, str)
            else text
        )
        pictures = pictures_shown(messages, images)
        prompt = self.processor.render(for_template(messages, self.processor.render))
        prompts = self._prompts([prompt], [pictures], max_new_tokens)
        with self._precision():
            ids = np.asarray(
                generation.generate(self.config, self.params, prompts, max_new_tokens)
            )[0]
        said = ids[np.cumsum(ids == self.config.end_token_id) == 0]
        return self.processor.tokenizer.decode(said, skip_special_tokens=True).strip()

    def _prompts(
        self, texts: Sequence[str], pictures: Sequence[Sequence], new_tokens: int = 0
    ) -> generation.Prompts:
        decoder = self.config.decoder
        counts_padding = (
            decoder.moe is not None and decoder.moe.capacity_factor is not None
        )  # among what an expert has places for
        prompts = self.processor.prompts(texts, pictures, 1 if counts_padding else MULTIPLE)
        needed = int(prompts.segment_ids.sum(1).max()) + new_tokens
        require(
            needed <= decoder.max_positions,
            "positions",
            needed,
            f"at most {decoder.max_positions}, with pictures and answer: what the model was made for",
        )
        return prompts

    def _precision(self):
        """float32 is float32, on accelerators too."""
        return jax.default_matmul_precision(
            "highest" if self.config.dtype == "float32" else "default"
        )


def _check_list(images) -> None:
    require(
        isinstance(images, (list, tuple)), "images", type(images).__name__, "a list of pictures"
    )


def load(
    path, stage: str | None = None, dtype: str = "float32", template: str | None = None
) -> Chat:
    """See `mod_jax.load`."""
    if is_run(path):
        recipe, stage = open_run(path, stage)
        student, data = recipe.student_after(stage), recipe.config.stages[stage].data
        config, params = student.config, student.params
        processor = Processor(
            recipe.tokenizer, chat_template(template or data.template), config, data.fit
        )
    else:
        require(stage is None, "stage", stage, f"None, as {path} is not a run")
        with open_source(ModelSource(folder=str(path))) as pretrained:
            config, params = pretrained.config, read(pretrained)
            processor = read_processor(pretrained.folder, config)
        if template or processor.chat_template is None:
            processor = dataclasses.replace(
                processor, chat_template=chat_template(template or "qwen")
            )
    return Chat(
        dataclasses.replace(config, dtype=dtype, remat="none"), jax.device_put(params), processor
    )
