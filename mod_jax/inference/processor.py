"""Turns messages and pictures into the input of a model, as the folder's stock processor does."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, cast

import numpy as np

from mod_jax.config import ModelConfig, require
from mod_jax.data.samples.pixels import Picture, load_image
from mod_jax.data.samples.tokenizer import load_tokenizer
from mod_jax.data.samples.tokens import TEMPLATES
from mod_jax.data.sources.record import MARKER
from mod_jax.inference.generation import Prompts, left_pad
from mod_jax.inference.messages import Message, short
from mod_jax.interop.image_processor import fit_of, read_image_processor
from mod_jax.interop.processor import (
    chat_template,
    check_picture_id,
    check_rows,
    check_template,
    read_template,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclasses.dataclass(frozen=True)
class Processor:
    """Turns messages and pictures into the input of a model.

    Attributes:
      tokenizer: Tokenizer with `<image>`.
      chat_template: Jinja text; None if the folder has no chat template.
      config: Configuration of the model.
      fit: How a picture is made a square, a key of data.samples.pixels.FITS: pad, crop or stretch.

    Raises:
      ConfigError: If a token of the tokenizer has no row in the model's embedding, or the template
        does not fit the two.
    """

    tokenizer: "PreTrainedTokenizerFast"
    chat_template: str | None
    config: ModelConfig
    fit: str = "pad"

    def __post_init__(self) -> None:
        check_rows(self.tokenizer, self.config, "the model")
        check_template(self.chat_template, self.config, self.tokenizer)

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """Renders a conversation of {"role", "content"} messages as text.

        Raises:
          ConfigError: If there is no chat template.
        """
        require(
            self.chat_template is not None,
            "chat_template",
            None,
            "Jinja text, e.g. of mod_jax.interop.processor.chat_template(NAME) with one of the "
            f"names {tuple(TEMPLATES)}",
        )
        text = self.tokenizer.apply_chat_template(
            list(messages),
            chat_template=self.chat_template,
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
        )
        return cast(str, text)  # as nothing is tokenized

    def encode(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Tokenizes a text; each `<image>` becomes as many tokens as a picture has features.

        Returns:
          (ids i32[S], is_picture bool[S]).
        """
        bos_token = self.tokenizer.bos_token
        # Some templates write the bos token themselves.
        has_bos = bool(bos_token) and text.startswith(bos_token)
        text = text.replace(MARKER, MARKER * self.config.vision.num_features)
        ids = np.array(self.tokenizer(text, add_special_tokens=not has_bos).input_ids, np.int32)
        return ids, ids == self.config.image_token_id

    def pixels(self, pictures: Iterable[Picture]) -> np.ndarray:
        """Prepares pictures for the vision tower: u8[N,H,W,3].

        Raises:
          BadSample: If a picture cannot be read.
        """
        vision = self.config.vision
        loaded = [load_image(picture, vision, self.fit) for picture in pictures]
        return np.array(loaded, np.uint8).reshape(-1, vision.image_size, vision.image_size, 3)

    def prompts(
        self, texts: Sequence[str], pictures: Sequence[Sequence[Picture]], multiple: int = 1
    ) -> Prompts:
        """Makes a left-padded batch of texts with their pictures.

        Args:
          texts: The texts.
          pictures: The pictures of each text.
          multiple: The length is rounded up to a multiple of this.

        Raises:
          ValueError: If the number of markers in a text is not the number of its pictures, or
            (ConfigError) a text has no token.
          BadSample: If a picture cannot be read.
        """
        for text, shown in zip(texts, pictures, strict=True):
            markers = text.count(MARKER)
            if markers != len(shown):
                raise ValueError(
                    f"text {short(text)} marks {markers} pictures with {MARKER}, expected "
                    f"{len(shown)}, one marker for each picture."
                )
        encoded = [self.encode(text) for text in texts]
        for text, (ids, _) in zip(texts, encoded):
            require(len(ids) > 0, "text", text, "a text of at least one token")
        pixels = [self.pixels(shown) for shown in pictures]
        return left_pad(self.config, encoded, pixels, multiple=multiple)


def read_processor(folder, config: ModelConfig, template: str | None = None) -> Processor:
    """Reads the processor of a native folder, or of a stock LLaVA by transformers 4.x or 5.x.

    Args:
      folder: Folder with a tokenizer. Without an image processor pictures are padded, as in the
        method.
      config: Configuration of the model in the folder.
      template: Name of a chat template. None is that of the folder, or "qwen" (LLaVA-1.5's) if it
        has none.

    Raises:
      ConfigError: If the tokenizer cannot be read, its id of `<image>` is not the model's, or the
        image processor prepares pictures in a way that `fit_of` does not know.
    """
    tokenizer = load_tokenizer(folder)
    check_picture_id(tokenizer, config, folder)
    fit = fit_of(read_image_processor(folder), config.vision.image_size)
    jinja = chat_template(template) if template else read_template(folder)
    return Processor(tokenizer, jinja or chat_template("qwen"), config, fit)
