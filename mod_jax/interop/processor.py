"""The processor of a model folder, read and written as stock transformers has it.

It consists of the chat template, the tokenizer, and the preparation of pictures. The bos token that
a Llama tokenizer puts before a text is added by tokenization, as tokenizer.json says, and is not in
any template.
"""

import dataclasses
import functools
import json
import logging
import pathlib
from typing import TYPE_CHECKING

from mod_jax.config import ModelConfig, require
from mod_jax.data.samples.tokens import TEMPLATES, chat_format
from mod_jax.data.sources.record import MARKER
from mod_jax.interop.folder import JsonObject, read_json
from mod_jax.interop.hf_config import CLASS_TOKENS, feature_strategy, one_or_all, require_rows
from mod_jax.interop.image_processor import image_processor_to_json
from mod_jax.interop.stated import first_stated

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

log = logging.getLogger(__name__)

# The part of a chat template after the fields of a `Template`. The content of a message is either a
# string, in which <image> (record.MARKER) stands for a picture, or a list of parts. A text part has
# no pictures, so a marker in it is broken up.
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
                {{- raise_exception("content of type " ~ part["type"] ~ \
": expected text or image") -}}
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
    """Jinja text of a template in data.samples.tokens.TEMPLATES, for `apply_chat_template`.

    It renders the text that data.samples.tokens tokenizes. The parts of a message's content are
    joined by line breaks. A system message replaces the system text of the template. A prompt
    (add_generation_prompt) ends where the model begins to write: before the gap. What the template
    puts after an answer also follows the last answer.

    Raises:
      ConfigError: If there is no such template.
    """
    require(name in TEMPLATES, "template", name, f"one of {tuple(TEMPLATES)}")
    fields = dataclasses.asdict(TEMPLATES[name])
    lines = [f"{{%- set {field} = {json.dumps(value)} -%}}\n" for field, value in fields.items()]
    return "".join(lines) + MESSAGES


def template_of(jinja: str | None) -> str | None:
    """Name of the first template in TEMPLATES with this Jinja text; None if there is none."""
    return next((name for name in TEMPLATES if chat_template(name) == jinja), None)


def read_template(folder) -> str | None:
    """Reads the chat template of a folder; None if it has none.

    The processor's own comes first (in processor_config.json, in JSON until transformers 4.49, or
    in Jinja), then the tokenizer's, which may show texts only. If there are several for different
    uses, it is the one called "default", as in transformers.

    Raises:
      ConfigError: If the processor's files contradict each other.
    """
    folder = pathlib.Path(folder)
    jinja_file = folder / "chat_template.jinja"
    is_file = jinja_file.is_file()
    processors = {
        name: _default_template(folder / name)
        for name in ("processor_config.json", "chat_template.json")
    }
    processors[jinja_file.name] = jinja_file.read_text(encoding="utf-8") if is_file else None
    stated = first_stated(f"the chat template of {folder}", processors)
    return stated or _default_template(folder / "tokenizer_config.json")


def _default_template(path: pathlib.Path) -> str | None:
    """The chat template in a JSON file, which may have several with names."""
    template = read_json(path).get("chat_template")
    if isinstance(template, list):
        template = {
            entry.get("name"): entry.get("template")
            for entry in template
            if isinstance(entry, dict)
        }
    if isinstance(template, dict):
        if "default" not in template:
            log.warning("%s: no chat template is called 'default', so none is used", path)
        template = template.get("default")
    known = template is None or isinstance(template, str)
    require(known, f"chat_template in {path}", template, "a text, or texts with names")
    return template or None


def write_processor(
    folder,
    config: ModelConfig,
    tokenizer: "PreTrainedTokenizerFast",
    template: str,
    fit: str = "pad",
) -> None:
    """Writes the processor's files beside a model.

    AutoProcessor, AutoTokenizer and GenerationConfig of transformers 4.57 and 5.x read them.

    Args:
      folder: Folder of the model, which exists.
      config: Configuration of the model.
      tokenizer: Tokenizer, from `load_tokenizer`.
      template: Jinja text of the chat template, e.g. from `chat_template`.
      fit: How a picture is made a square, a key of data.samples.pixels.FITS.

    Raises:
      ConfigError: If the tokenizer's id of `<image>` is not the model's, one of its tokens has no
        row in the embedding, or the template is not for this model and tokenizer.
    """
    check_picture_id(tokenizer, config, folder)
    check_rows(tokenizer, config, folder)
    check_template(template, config, tokenizer)
    folder = pathlib.Path(folder)
    files = {
        "preprocessor_config.json": image_processor_to_json(config.vision, fit),
        "processor_config.json": _processor_config(config),
        "tokenizer_config.json": _tokenizer_config(tokenizer),
        "generation_config.json": _generation_config(config, tokenizer),
    }
    for name, values in files.items():
        text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    backend = tokenizer.backend_tokenizer
    # A call may have left its padding and truncation in the backend; they would be saved.
    backend.no_padding()
    backend.no_truncation()
    backend.save(str(folder / "tokenizer.json"))


def _processor_config(config: ModelConfig) -> JsonObject:
    vision = config.vision
    return {
        "processor_class": "LlavaProcessor",
        "image_token": MARKER,
        "patch_size": vision.patch_size,
        "num_additional_image_tokens": CLASS_TOKENS[vision.family],
        "vision_feature_select_strategy": feature_strategy(vision.family),
    }


def _tokenizer_config(tokenizer: "PreTrainedTokenizerFast") -> JsonObject:
    names = ("bos_token", "eos_token", "pad_token", "unk_token")
    special_tokens = {name: getattr(tokenizer, name) for name in names}
    return {
        # A model's own class (Qwen2Tokenizer, ...) would split texts in its own way instead of as
        # tokenizer.json says.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "processor_class": "LlavaProcessor",
        **{name: token for name, token in special_tokens.items() if token is not None},
        "extra_special_tokens": {"image_token": MARKER},
        "clean_up_tokenization_spaces": False,
        "model_max_length": tokenizer.model_max_length,
        "padding_side": "left",
        # By default 4.57 adds token_type_ids, which the `generate` of the model refuses.
        "model_input_names": ["input_ids", "attention_mask"],
    }


def _generation_config(config: ModelConfig, tokenizer: "PreTrainedTokenizerFast") -> JsonObject:
    values: JsonObject = {}
    if tokenizer.bos_token_id is not None:
        values["bos_token_id"] = tokenizer.bos_token_id
    return values | {
        "eos_token_id": one_or_all(config.end_token_ids),
        "pad_token_id": tokenizer.pad_token_id,
        "do_sample": False,
    }


def check_template(
    template: str | None, config: ModelConfig, tokenizer: "PreTrainedTokenizerFast"
) -> None:
    """Raises ConfigError if one of our templates does not fit the model and its tokenizer.

    What a template of another project needs is not known, so that it is not checked.
    """
    name = template_of(template)
    if name is not None:
        chat_format(name, config, tokenizer)


def check_picture_id(tokenizer: "PreTrainedTokenizerFast", config: ModelConfig, folder) -> None:
    """Raises ConfigError if the id of `<image>` in the tokenizer of `folder` is not the model's."""
    found = tokenizer.convert_tokens_to_ids(MARKER)
    require(
        found == config.image_token_id,
        f"id of {MARKER} in the tokenizer of {folder}",
        found,
        f"the model's, {config.image_token_id}",
        "Use the tokenizer that the model was trained with.",
    )


def check_rows(tokenizer: "PreTrainedTokenizerFast", config: ModelConfig, place) -> None:
    """Raises ConfigError unless each token of the tokenizer and of the model has an embedding row.

    Args:
      tokenizer: A fast Hugging Face tokenizer.
      config: Configuration of the model.
      place: Where the model comes from, for the message.
    """
    require_rows(config, str(place))
    vocabulary = tokenizer.get_vocab()
    largest = max(vocabulary, key=vocabulary.__getitem__)
    require(
        vocabulary[largest] < config.decoder.vocab_size,
        f"vocabulary of {place}",
        config.decoder.vocab_size,
        f"more embedding rows than the tokenizer's largest id, {vocabulary[largest]} ({largest!r})",
        "JAX would read the last row for it. Use the tokenizer that the model was trained with.",
    )
