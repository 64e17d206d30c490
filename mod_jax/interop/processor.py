"""A model folder's processor, in both directions: its chat template, tokenizer and picture preparation, as stock transformers has them.

What a Llama tokenizer begins a text with (its bos token) is added by tokenization, as its tokenizer.json says, and is in no template.
"""

import dataclasses
import functools
import json
import pathlib

from transformers import PreTrainedTokenizerFast

from mod_jax.config import ModelConfig, require
from mod_jax.data.samples.tokenizer import IMAGE
from mod_jax.data.samples.tokens import TEMPLATES, chat_format
from mod_jax.interop.folder import read_json
from mod_jax.interop.image_processor import image_processor_to_json

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
    return (
        "".join(f"{{%- set {field} = {json.dumps(value)} -%}}\n" for field, value in fields.items())
        + MESSAGES
    )


def template_of(jinja: str | None) -> str | None:
    """The name of the template whose Jinja this is (the first, if it has several); None if it is another's."""
    return next((name for name in TEMPLATES if chat_template(name) == jinja), None)


def read_template(folder) -> str | None:
    """A folder's chat template: its own file (since 4.50 Jinja, before that JSON), or the tokenizer's; None if it has none."""
    own = pathlib.Path(folder) / "chat_template.jinja"
    if own.is_file():
        return own.read_text(encoding="utf-8")
    found = (
        read_json(pathlib.Path(folder) / name).get("chat_template")
        for name in ("chat_template.json", "tokenizer_config.json")
    )
    return next(
        (jinja for jinja in found if isinstance(jinja, str)), None
    )  # the tokenizer's may also be a list of templates for tools and retrieval


def write_processor(
    folder, config: ModelConfig, tokenizer: PreTrainedTokenizerFast, template: str, fit: str = "pad"
) -> None:
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
    check_picture_id(tokenizer, config, folder)
    check_template(template, config, tokenizer)
    folder, vision = pathlib.Path(folder), config.vision
    extra, strategy = FEATURES[vision.family]
    specials = {
        name: getattr(tokenizer, name)
        for name in ("bos_token", "eos_token", "pad_token", "unk_token")
    }
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
            "model_input_names": [
                "input_ids",
                "attention_mask",
            ],  # 4.57 adds token_type_ids by default, which the model's generate refuses
        },
        "generation_config.json": {
            **({} if tokenizer.bos_token_id is None else {"bos_token_id": tokenizer.bos_token_id}),
            "eos_token_id": config.end_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "do_sample": False,
        },
    }
    for name, values in files.items():
        (folder / name).write_text(
            json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    backend = (
        tokenizer.backend_tokenizer
    )  # a call may have left its padding and truncation in it, which would be saved
    backend.no_padding()
    backend.no_truncation()
    backend.save(str(folder / "tokenizer.json"))


def check_template(
    template: str | None, config: ModelConfig, tokenizer: PreTrainedTokenizerFast
) -> None:
    name = template_of(template)
    if name is not None:
        chat_format(name, config, tokenizer)  # of another's, what it needs cannot be known


def check_picture_id(tokenizer: PreTrainedTokenizerFast, config: ModelConfig, folder) -> None:
    found, expected = tokenizer.convert_tokens_to_ids(IMAGE), config.image_token_id
    require(
        found == expected,
        f"id of {IMAGE} in the tokenizer of {folder}",
        found,
        f"the model's, {expected}",
        "Use the tokenizer it was trained with.",
    )
