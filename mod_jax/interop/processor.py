"""A model folder's processor, in both directions: its chat template, tokenizer and picture preparation, as stock transformers has them.

What a Llama tokenizer begins a text with (its bos token) is added by tokenization, as its tokenizer.json says, and is in no template.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerFast

from mod_jax.config import ModelConfig, require
from mod_jax.data.conversation import TEMPLATES, chat_format
from mod_jax.data.images import load_image
from mod_jax.data.records import MARKER
from mod_jax.data.tokenizer import IMAGE, load_tokenizer
from mod_jax.generation import Prompts, left_pad
from mod_jax.interop.folder import read_json
from mod_jax.interop.image_processor import fit_of, image_processor_to_json, read_image_processor

# (tokens a picture has beside its patches, which of them the language model reads): CLIP's CLS is dropped, SigLIP has none.
FEATURES = {"clip": (1, "default"), "siglip": (0, "full")}

# What follows the fields of a Template. A message's content is a string, in which <image> marks a picture, or a list of parts: a text part has no pictures,
# so a mark written in it is broken up.
MESSAGES = """\
{%- macro text(content) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- else -%}
        {%- for part in content -%}
            {{- "" if loop.first else "\\n" -}}
            {%- if part["type"] == "text" -%}
                {{- part["text"] | replace("<image>", "< image>") -}}
            {%- elif part["type"] in ["image", "image_url"] -%}
                {{- "<image>" -}}
            {%- else -%}
                {{- raise_exception("content of type " ~ part["type"] ~ ": expected text or image") -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{{- before_system ~ system ~ after_system if system and messages[0]["role"] != "system" else "" -}}
{%- for message in messages -%}
    {%- set content = text(message["content"]) -%}
    {%- if message["role"] == "system" -%}
        {{- before_system ~ content ~ after_system if questions else "" -}}
    {%- elif message["role"] == "user" -%}
        {{- user ~ (content if questions else "<image>" * content.count("<image>")) -}}
    {%- elif message["role"] == "assistant" -%}
        {{- assistant ~ gap ~ content ~ (end or eos_token) ~ after_answer -}}
    {%- else -%}
        {{- raise_exception("role " ~ message["role"] ~ ": expected system, user or assistant") -}}
    {%- endif -%}
{%- endfor -%}
{{- assistant if add_generation_prompt else "" -}}
"""


@functools.cache
def chat_template(name: str) -> str:
    """Jinja of a template of `conversation.TEMPLATES`, for `apply_chat_template`: it renders what `conversation` tokenizes.

    The parts of a message's content are joined by line ends. A system message stands in the place of the template's own. A prompt
    (add_generation_prompt) ends where the model speaks: before the gap. What the template puts behind an answer stands behind the last one, too.
    """
    require(name in TEMPLATES, "template", name, f"one of {tuple(TEMPLATES)}")
    fields = dataclasses.asdict(TEMPLATES[name])
    return "".join(f"{{%- set {field} = {json.dumps(value)} -%}}\n" for field, value in fields.items()) + MESSAGES


def template_of(jinja: str | None) -> str | None:
    """The name of the template whose Jinja this is (the first, if it has several); None if it is another's."""
    return next((name for name in TEMPLATES if chat_template(name) == jinja), None)


def read_template(folder) -> str | None:
    """A folder's chat template: its own file (since 4.50 Jinja, before that JSON), or the tokenizer's; None if it has none."""
    own = pathlib.Path(folder) / "chat_template.jinja"
    if own.is_file():
        return own.read_text(encoding="utf-8")
    found = (read_json(pathlib.Path(folder) / name).get("chat_template") for name in ("chat_template.json", "tokenizer_config.json"))
    return next((jinja for jinja in found if isinstance(jinja, str)), None)  # the tokenizer's may also be a list of templates for tools and retrieval


def write_processor(folder, config: ModelConfig, tokenizer: PreTrainedTokenizerFast, template: str, fit: str = "pad") -> None:
    """Writes what AutoProcessor, AutoTokenizer and GenerationConfig of transformers 4.57 and 5.x read beside a model.

    Args:
      folder: exists.
      config: the model.
      tokenizer: from `load_tokenizer`.
      template: Jinja text, e.g. of `chat_template`.
      fit: how pictures become squares.
    Raises:
      ConfigError: if the tokenizer's id of `<image>` is not the model's, or the template not one for them.
    """
    _check_picture_id(tokenizer, config, folder)
    _check_template(template, config, tokenizer)
    folder, vision = pathlib.Path(folder), config.vision
    extra, strategy = FEATURES[vision.family]
    specials = {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    files = {
        "preprocessor_config.json": image_processor_to_json(vision, fit),
        "processor_config.json": {
            "processor_class": "LlavaProcessor",
            "image_token": IMAGE,
            "patch_size": vision.patch_size,
            "num_additional_image_tokens": extra,
            "vision_feature_select_strategy": strategy,
        },
        # A class of its own (Qwen2Tokenizer, ...) would put its splitting in the place of tokenizer.json's.
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "processor_class": "LlavaProcessor",
            **{name: token for name, token in specials.items() if token is not None},
            "extra_special_tokens": {"image_token": IMAGE},
            "clean_up_tokenization_spaces": False,
            "model_max_length": tokenizer.model_max_length,
            "padding_side": "left",
            "model_input_names": ["input_ids", "attention_mask"],  # 4.57 adds token_type_ids by default, which the model's generate refuses
        },
        "generation_config.json": {
            **({} if tokenizer.bos_token_id is None else {"bos_token_id": tokenizer.bos_token_id}),
            "eos_token_id": config.end_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "do_sample": False,
        },
    }
    for name, values in files.items():
        (folder / name).write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    backend = tokenizer.backend_tokenizer  # a call may have left its padding and truncation in it, which would be saved
    backend.no_padding()
    backend.no_truncation()
    backend.save(str(folder / "tokenizer.json"))


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
        _check_template(self.chat_template, self.config, self.tokenizer)

    def render(self, messages: Sequence[dict], add_generation_prompt: bool = True) -> str:
        """The text of a conversation of {"role", "content"} messages.

        Raises:
          ConfigError: if there is no chat template.
        """
        require(self.chat_template is not None, "chat_template", None, f"Jinja text, e.g. mod_jax.interop.processor.chat_template(one of {tuple(TEMPLATES)})")
        return self.tokenizer.apply_chat_template(
            messages, chat_template=self.chat_template, add_generation_prompt=add_generation_prompt, tokenize=False
        )

    def encode(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Token ids of a text, each `<image>` in it as many as a picture has features.

        Returns:
          (ids i32[S], is_picture bool[S]).
        """
        begun = bool(self.tokenizer.bos_token) and text.startswith(self.tokenizer.bos_token)  # some templates write it themselves
        text = text.replace(MARKER, MARKER * self.config.vision.num_features)
        ids = np.array(self.tokenizer(text, add_special_tokens=not begun).input_ids, np.int32)
        return ids, ids == self.config.image_token_id

    def pixels(self, pictures: Sequence) -> np.ndarray:
        """Pictures (whatever `images.load_image` takes) as the tower takes them: u8[N,H,W,3]. Raises BadSample for one that cannot be read."""
        size = self.config.vision.image_size
        return np.array([load_image(picture, self.config.vision, self.fit) for picture in pictures], np.uint8).reshape(-1, size, size, 3)

    def prompts(self, texts: Sequence[str], pictures: Sequence[Sequence], multiple: int = 1) -> Prompts:
        """Texts and the pictures of each as a left-padded batch, its length a multiple of `multiple`.

        Raises:
          ValueError: if a text marks another number of pictures than it has.
        """
        for text, shown in zip(texts, pictures, strict=True):
            if text.count(MARKER) != len(shown):
                raise ValueError(f"text {text!r} marks {text.count(MARKER)} pictures with {MARKER}, expected {len(shown)}, one a picture.")
        return left_pad(self.config, [self.encode(text) for text in texts], [self.pixels(shown) for shown in pictures], multiple=multiple)


def read_processor(folder, config: ModelConfig) -> Processor:
    """The processor of a folder, ours or a stock LLaVA's of transformers 4.x or 5.x.

    Args:
      folder: with a tokenizer. Without an image processor's file pictures are padded, as the method does.
      config: of the folder's model.
    Raises:
      ConfigError: if the tokenizer cannot be read, its id of `<image>` is not the model's, or pictures are prepared in a way that `fit_of` does not know.
    """
    tokenizer = load_tokenizer(folder)
    _check_picture_id(tokenizer, config, folder)
    return Processor(tokenizer, read_template(folder), config, fit_of(read_image_processor(folder), config.vision.image_size))


def _check_template(template: str | None, config: ModelConfig, tokenizer: PreTrainedTokenizerFast) -> None:
    name = template_of(template)
    if name is not None:
        chat_format(name, config, tokenizer)  # of another's, what it needs cannot be known


def _check_picture_id(tokenizer: PreTrainedTokenizerFast, config: ModelConfig, folder) -> None:
    found, expected = tokenizer.convert_tokens_to_ids(IMAGE), config.image_token_id
    require(found == expected, f"id of {IMAGE} in the tokenizer of {folder}", found, f"the model's, {expected}", "Use the tokenizer it was trained with.")
