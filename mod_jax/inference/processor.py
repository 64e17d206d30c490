"""From messages and pictures to what a model reads, as the folder's stock processor does it."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerFast

from mod_jax.config import ModelConfig, require
from mod_jax.data.samples.pixels import load_image
from mod_jax.data.samples.tokenizer import load_tokenizer
from mod_jax.data.samples.tokens import TEMPLATES
from mod_jax.data.sources.record import MARKER
from mod_jax.inference.generation import Prompts, left_pad
from mod_jax.interop.image_processor import fit_of, read_image_processor
from mod_jax.interop.processor import check_picture_id, check_template, read_template


@dataclasses.dataclass(frozen=True)
class Processor:
    """From messages and pictures to what a model reads, as its folder's stock processor does it.

    Attributes:
      tokenizer: with `<image>`.
      chat_template: Jinja text; None if the folder has none.
      config: the model.
      fit: how a picture becomes a square: pad | crop | stretch (`images.FITS`).
    Raises:
      ConfigError: if the template is not one for this tokenizer and model.
    """

    tokenizer: PreTrainedTokenizerFast
    chat_template: str | None
    config: ModelConfig
    fit: str = "pad"

    def __post_init__(self):
        check_template(self.chat_template, self.config, self.tokenizer)

    def render(self, messages: Sequence[dict], add_generation_prompt: bool = True) -> str:
        """The text of a conversation of {"role", "content"} messages.

        Raises:
          ConfigError: if there is no chat template.
        """
        require(
            self.chat_template is not None,
            "chat_template",
            None,
            f"Jinja text, e.g. mod_jax.interop.processor.chat_template(one of {tuple(TEMPLATES)})",
        )
        return self.tokenizer.apply_chat_template(
            messages,
            chat_template=self.chat_template,
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
        )

    def encode(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Token ids of a text, each `<image>` in it as many as a picture has features.

        Returns:
          (ids i32[S], is_picture bool[S]).
        """
        begun = bool(self.tokenizer.bos_token) and text.startswith(
            self.tokenizer.bos_token
        )  # some templates write it themselves
        text = text.replace(MARKER, MARKER * self.config.vision.num_features)
        ids = np.array(self.tokenizer(text, add_special_tokens=not begun).input_ids, np.int32)
        return ids, ids == self.config.image_token_id

    def pixels(self, pictures: Sequence) -> np.ndarray:
        """Pictures (whatever `images.load_image` takes) as the tower takes them: u8[N,H,W,3]. Raises BadSample for one that cannot be read."""
        size = self.config.vision.image_size
        return np.array(
            [load_image(picture, self.config.vision, self.fit) for picture in pictures], np.uint8
        ).reshape(-1, size, size, 3)

    def prompts(
        self, texts: Sequence[str], pictures: Sequence[Sequence], multiple: int = 1
    ) -> Prompts:
        """Texts and the pictures of each as a left-padded batch, its length a multiple of `multiple`.

        Raises:
          ValueError: if a text marks another number of pictures than it has.
        """
        for text, shown in zip(texts, pictures, strict=True):
            if text.count(MARKER) != len(shown):
                raise ValueError(
                    f"text {text!r} marks {text.count(MARKER)} pictures with {MARKER}, expected {len(shown)}, one a picture."
                )
        return left_pad(
            self.config,
            [self.encode(text) for text in texts],
            [self.pixels(shown) for shown in pictures],
            multiple=multiple,
        )


def read_processor(folder, config: ModelConfig) -> Processor:
    """The processor of a folder, ours or a stock LLaVA's of transformers 4.x or 5.x.

    Args:
      folder: with a tokenizer. Without an image processor's file pictures are padded, as the method does.
      config: of the folder's model.
    Raises:
      ConfigError: if the tokenizer cannot be read, its id of `<image>` is not the model's, or pictures are prepared in a way that `fit_of` does not know.
    """
    tokenizer = load_tokenizer(folder)
    check_picture_id(tokenizer, config, folder)
    return Processor(
        tokenizer,
        read_template(folder),
        config,
        fit_of(read_image_processor(folder), config.vision.image_size),
    )
