"""The processor of a folder: what it reads and writes is what stock transformers does.

Both get the same messages and pictures.
"""

import dataclasses
import json
import pathlib

import numpy as np
import pytest
import small_tokenizers
import transformers
from jinja2 import TemplateError
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoProcessor,
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaImageProcessorPil,
    LlavaProcessor,
    Qwen2Config,
    Qwen2MoeConfig,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
)

from mod_jax.config import ConfigError, DecoderConfig, ModelConfig, VisionConfig
from mod_jax.data.samples.tokenizer import (
    TextEncoder,
    byte_tokenizer,
    load_tokenizer,
    scenes_tokenizer,
    text_encoder,
)
from mod_jax.data.samples.tokens import TEMPLATES, chat_format, tokenize, tokenize_prompt
from mod_jax.data.sources.record import BadSample, Record
from mod_jax.inference.processor import Processor, read_processor
from mod_jax.interop.image_processor import image_processor_to_json
from mod_jax.interop.processor import chat_template, read_template, template_of, write_processor

GRAY = (0.5, 0.5, 0.5)
TOWERS = {
    "clip": VisionConfig("clip", 28, 14, 16, 32, 2, 2),
    "siglip": VisionConfig("siglip", 30, 14, 16, 32, 2, 2, pixel_mean=GRAY, pixel_std=GRAY),
}
VISION_CONFIGS = {"clip": CLIPVisionConfig, "siglip": SiglipVisionConfig}
# Kind of folder -> (function that makes the tokenizer, tower, class of the text configuration).
FOLDERS = {
    "qwen": (
        lambda: small_tokenizers.qwen(small_tokenizers.QWEN_VOCABULARY),
        "clip",
        Qwen2MoeConfig,
    ),
    "instructed": (
        lambda: small_tokenizers.qwen_instructed(small_tokenizers.QWEN_VOCABULARY),
        "clip",
        Qwen2Config,
    ),
    "bytes": (byte_tokenizer, "siglip", Qwen2Config),
    "llama": (small_tokenizers.llama, "clip", LlamaConfig),
    "llama_first": (small_tokenizers.llama_first, "siglip", LlamaConfig),
    "words": (scenes_tokenizer, "clip", Qwen2Config),
}


@dataclasses.dataclass(frozen=True)
class Both:
    """A folder as our processor and theirs read it.

    Attributes:
      folder: The folder.
      ours: Our processor.
      theirs: Processor of transformers.
      encoder: Encoder that training tokenizes texts with.
    """

    folder: pathlib.Path
    ours: Processor
    theirs: LlavaProcessor
    encoder: TextEncoder


def write_folder(folder, kind: str, template: str) -> ModelConfig:
    """Writes a processor and a config.json for transformers; returns our configuration."""
    make, tower, text_config = FOLDERS[kind]
    make().save_pretrained(folder / "source")
    tokenizer = load_tokenizer(folder / "source")
    vision = TOWERS[tower]
    config = ModelConfig(
        vision, DecoderConfig(), tokenizer.convert_tokens_to_ids("<image>"), tokenizer.eos_token_id
    )
    theirs = VISION_CONFIGS[tower](image_size=vision.image_size, patch_size=vision.patch_size)
    LlavaConfig(
        vision_config=theirs, text_config=text_config(), image_token_id=config.image_token_id
    ).save_pretrained(folder)
    write_processor(folder, config, tokenizer, template)
    return config


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Function: kind -> Both, which is made once."""
    made = {}

    def get(kind: str) -> Both:
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            config = write_folder(folder, kind, chat_template("qwen"))
            ours = read_processor(folder, config)
            theirs = AutoProcessor.from_pretrained(folder)
            made[kind] = Both(folder, ours, theirs, text_encoder(ours.tokenizer))
        return made[kind]

    return get


def ask(*parts) -> dict:
    """A message of the user: one string, or several parts, of which None is a picture."""
    if len(parts) == 1:
        return {"role": "user", "content": parts[0]}
    content = [
        {"type": "image"} if text is None else {"type": "text", "text": text} for text in parts
    ]
    return {"role": "user", "content": content}


def say(text: str) -> dict:
    """A message of the assistant."""
    return {"role": "assistant", "content": text}


# Name -> (messages, the questions as records have them; None if no record has such messages).
CONVERSATIONS = {
    "one picture": ([ask(None, "What is it?")], ["<image>\nWhat is it?"]),
    "several pictures": (
        [ask(None, None, "Compare."), say("Two cats."), ask("This:", None, "or", None)],
        ["<image>\n<image>\nCompare.", "This:\n<image>\nor\n<image>"],
    ),
    "pictures within a string": (
        [ask("Is <image> like<image>?"), say("No."), ask("<image>")],
        ["Is <image> like<image>?", "<image>"],
    ),
    "text only": ([ask("How many legs has a cat?")], ["How many legs has a cat?"]),
    "unicode": (
        [ask(None, "这是什么？ 🐈‍⬛ e\u0301 ﬁ"), say("猫 — é"), ask("ça va?")],
        ["<image>\n这是什么？ 🐈‍⬛ e\u0301 ﬁ", "ça va?"],
    ),
    "turns": (
        [ask("<image> What?"), say("It's a cat."), ask("Sure?"), say('Yes, "I am".'), ask("Why?")],
        ["<image> What?", "Sure?", "Why?"],
    ),
    "empty answer": ([ask("Say nothing."), say(""), ask("And now?")], ["Say nothing.", "And now?"]),
    "a picture token in a user's text": (
        [ask(None, "What does <image> mean?")],
        ["<image>\nWhat does < image> mean?"],
    ),
    "very long": (
        [ask(None, "Tell me of cats and dogs. " * 300)],
        ["<image>\n" + "Tell me of cats and dogs. " * 300],
    ),
    "white space": (
        [ask("  <image>\n\n <image>  \tlook "), say(" a \n"), ask("\n<image>")],
        ["  <image>\n\n <image>  \tlook ", "\n<image>"],
    ),
    "a system message": ([{"role": "system", "content": "Be brief."}, ask(None, "What?")], None),
}


def stock_ids(stock: LlavaProcessor, text: str) -> list[int]:
    """Token ids of a text, by the processor of transformers."""
    pictures = [Image.new("RGB", (20, 10))] * text.count("<image>")
    return list(stock(text=text, images=pictures or None)["input_ids"][0])


def answers_in(messages: list[dict]) -> list[str]:
    """The answers of a conversation."""
    return [message["content"] for message in messages if message["role"] == "assistant"]


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("kind", FOLDERS)
def test_ids_of_a_prompt_are_those_of_stock_and_of_training(both, kind, name):
    ours = both(kind).ours
    theirs = both(kind).theirs
    messages, questions = CONVERSATIONS[name]
    text = ours.render(messages)
    ids, is_picture = ours.encode(text)
    assert text == theirs.apply_chat_template(messages, add_generation_prompt=True)
    assert ids.tolist() == stock_ids(theirs, text)
    assert text.endswith(" ASSISTANT:")
    assert is_picture.sum() == text.count("<image>") * ours.config.vision.num_features
    # The tokens that begin a text are there once.
    begin = both(kind).encoder.begin
    assert tuple(ids[: len(begin)]) == begin
    assert not np.isin(ids[len(begin) :], begin).any()
    if questions:
        turns = tuple(zip(questions, (*answers_in(messages), None)))
        chat = chat_format("qwen", ours.config, ours.tokenizer)
        prompt, marks = tokenize_prompt(turns, both(kind).encoder, chat)
        assert ids.tolist() == prompt.tolist()
        assert is_picture.tolist() == marks.tolist()


@pytest.mark.parametrize(
    "name", [name for name, (_, questions) in CONVERSATIONS.items() if questions]
)
@pytest.mark.parametrize("kind", FOLDERS)
def test_ids_of_an_answered_conversation_are_those_of_stock_and_of_training(both, kind, name):
    ours = both(kind).ours
    theirs = both(kind).theirs
    messages, questions = CONVERSATIONS[name]
    messages = [*messages, say("It is so.")]
    text = ours.render(messages, add_generation_prompt=False)
    assert text == theirs.apply_chat_template(messages)
    assert text.endswith(f" ASSISTANT: It is so.{theirs.tokenizer.eos_token}")
    record = Record("r", (), tuple(zip(questions, answers_in(messages))))
    chat = chat_format("qwen", ours.config, ours.tokenizer)
    learnt = tokenize(record, both(kind).encoder, chat, 10**5)
    ids = ours.encode(text)[0].tolist()
    assert ids == stock_ids(theirs, text)
    assert ids == [*learnt.tokens, learnt.targets[-1]]


def test_stock_tokenizes_a_template_in_one_step_to_the_same_ids(both):
    content = [
        {"type": "image", "image": Image.new("RGB", (20, 10))},
        {"type": "text", "text": "What?"},
    ]
    messages = [{"role": "user", "content": content}]
    for kind in FOLDERS:
        ours = both(kind).ours
        theirs = both(kind).theirs
        ids = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)
        assert ours.encode(ours.render(messages))[0].tolist() == ids[0]


@pytest.mark.parametrize("kind", FOLDERS)
def test_stock_knows_the_special_tokens(both, kind):
    ours = both(kind).ours
    tokenizer = both(kind).theirs.tokenizer
    assert tokenizer.image_token == "<image>"
    assert tokenizer.image_token_id == ours.config.image_token_id
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        assert getattr(tokenizer, name) == getattr(ours.tokenizer, name)
    assert tokenizer.padding_side == "left"
    generation = GenerationConfig.from_pretrained(both(kind).folder)
    assert generation.bos_token_id == tokenizer.bos_token_id
    assert generation.eos_token_id == ours.config.end_token_id
    assert generation.pad_token_id == tokenizer.pad_token_id
    assert not generation.do_sample
    ids = ours.encode("What is it ? Two cats , it is n't one .")[0]
    text = tokenizer.decode(ids, skip_special_tokens=True)
    assert text == ours.tokenizer.decode(ids, skip_special_tokens=True)


def test_stock_reads_the_tokenizer_of_a_plain_language_model_as_it_is_written(both, tmp_path):
    """In transformers 5, a folder with a plain qwen2 always has Qwen's tokenizer.

    The tokenizer of every other family is read as it is.
    """
    text = "USER: What is it? ASSISTANT: It's a cat — 猫."
    text_configs = {"qwen": Qwen2Config, "words": Qwen2MoeConfig, "llama": LlamaConfig}
    for kind, text_config in text_configs.items():
        ours = both(kind).ours
        folder = tmp_path / kind
        folder.mkdir()
        write_processor(folder, ours.config, ours.tokenizer, chat_template("qwen"))
        text_config().save_pretrained(folder)
        ids = AutoTokenizer.from_pretrained(folder)(text).input_ids
        assert ids == ours.encode(text)[0].tolist()


# Templates


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_renders_what_is_tokenised_for_training(both, name):
    template = TEMPLATES[name]
    folder = both("instructed" if template.end else "llama")
    ours = dataclasses.replace(folder.ours, chat_template=chat_template(name))
    chat = chat_format(name, ours.config, ours.tokenizer)
    messages = [ask("<image>\nWhat?"), say("A cat."), ask("Sure?")]
    turns = (("<image>\nWhat?", "A cat."), ("Sure?", None))
    prompt, _ = tokenize_prompt(turns, folder.encoder, chat)
    assert ours.encode(ours.render(messages))[0].tolist() == prompt.tolist()
    learnt = tokenize(Record("r", (), turns[:1]), folder.encoder, chat, 1000)
    text = ours.render(messages[:2], False)
    assert text.endswith(template.after_answer)
    ids = ours.encode(text.removesuffix(template.after_answer))[0].tolist()
    assert ids == [*learnt.tokens, learnt.targets[-1]]


@pytest.mark.parametrize("system", [None, "Be brief.", ""])
def test_chatml_is_the_template_of_an_instructed_qwen(both, system):
    """Text and ids are as in the template of Qwen2's tokenizer_config.json."""
    ours = dataclasses.replace(both("instructed").ours, chat_template=chat_template("chatml"))
    messages = [ask(None, "What is it?"), say(" A cat.\n"), ask("\nSure?"), say("Yes")]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    texts = [
        "You are a helpful assistant." if system is None else system,
        "<image>\nWhat is it?",
        " A cat.\n",
        "\nSure?",
        "Yes",
    ]
    roles = ("system", "user", "assistant", "user", "assistant")
    written = "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in zip(roles, texts))
    assert ours.render(messages, add_generation_prompt=False) == written
    assert ours.render(messages[:-1]) == written.removesuffix("Yes<|im_end|>\n")
    ids = ours.encode(written)[0].tolist()
    assert (ids.count(151644), ids.count(151645)) == (5, 5)  # <|im_start|>, <|im_end|>
    assert ids[0] == 151644
    assert ids == stock_ids(both("instructed").theirs, written)


def test_a_template_of_another_model_is_refused(both, tmp_path):
    ours = both("qwen").ours
    message = (
        r"template = 'chatml': expected one for this model, whose answers end with "
        r"<\|endoftext\|>"
    )
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(ours, chat_template=chat_template("chatml"))
    with pytest.raises(ConfigError, match="template = 'chatml'"):
        write_processor(tmp_path, ours.config, ours.tokenizer, chat_template("chatml"))
    assert not any(tmp_path.iterdir())


def test_plain_is_pictures_and_captions_whatever_is_asked(both):
    plain = dataclasses.replace(both("qwen").ours, chat_template=chat_template("plain"))
    messages = [
        {"role": "system", "content": "Be brief."},
        ask(None, "What does <image> show?", None),
        say("Two cats."),
    ]
    assert (
        plain.render(messages, add_generation_prompt=False)
        == "<image><image>Two cats.<|endoftext|>"
    )


def test_a_system_message_stands_in_the_place_of_the_template_s(both):
    system = {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
    assert both("qwen").ours.render([system, ask("Hi")]) == "Be brief. USER: Hi ASSISTANT:"
    assert (
        both("qwen").ours.render([ask("Hi")]) == TEMPLATES["qwen"].system + " USER: Hi ASSISTANT:"
    )


def test_what_a_template_cannot_show_is_refused(both):
    ours = both("qwen").ours
    with pytest.raises(TemplateError, match="role tool: expected system, user or assistant"):
        ours.render([{"role": "tool", "content": "Hi"}])
    with pytest.raises(TemplateError, match="content of type video: expected text or image"):
        ours.render([{"role": "user", "content": [{"type": "video"}]}])
    with pytest.raises(ConfigError, match="chat_template = None: expected Jinja text"):
        dataclasses.replace(ours, chat_template=None).render([ask("Hi")])
    with pytest.raises(ConfigError, match="template = 'other': expected one of"):
        chat_template("other")


def test_a_template_is_recognised_by_its_text():
    for name, template in TEMPLATES.items():
        assert TEMPLATES[template_of(chat_template(name))] == template
    assert template_of(chat_template("qwen") + "\n") is None
    assert template_of(None) is None


@pytest.mark.parametrize(
    "files, expected",
    [
        (
            {
                "chat_template.jinja": "own",
                "chat_template.json": '{"chat_template": "own"}',
                "tokenizer_config.json": '{"chat_template": "tokenizer\'s"}',
            },
            "own",
        ),
        (
            {
                "chat_template.json": '{"chat_template": "old"}',
                "tokenizer_config.json": '{"chat_template": "tokenizer\'s"}',
            },
            "old",
        ),
        ({"tokenizer_config.json": '{"chat_template": "tokenizer\'s"}'}, "tokenizer's"),
        (
            {"tokenizer_config.json": '{"chat_template": [{"name": "tool_use", "template": "a"}]}'},
            None,
        ),
        (
            {
                "tokenizer_config.json": (
                    '{"chat_template": [{"name": "rag", "template": "a"}, '
                    '{"name": "default", "template": "b"}]}'
                )
            },
            "b",
        ),
        ({"chat_template.json": '{"chat_template": {"rag": "a", "default": "b"}}'}, "b"),
        ({"processor_config.json": '{"chat_template": "p"}', "chat_template.jinja": "p"}, "p"),
        ({"chat_template.json": '{"chat_template": null}', "chat_template.jinja": "j"}, "j"),
        ({}, None),
    ],
)
def test_the_template_of_a_folder_is_in_one_of_four_files(tmp_path, files, expected):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert read_template(tmp_path) == expected


@pytest.mark.parametrize(
    "files, message",
    [
        (
            {"chat_template.json": '{"chat_template": "old"}', "chat_template.jinja": "own"},
            "is stated in 2 places.*chat_template.json: 'old'; chat_template.jinja: 'own'",
        ),
        (
            {"processor_config.json": '{"chat_template": "p"}', "chat_template.jinja": "own"},
            "processor_config.json: 'p'; chat_template.jinja: 'own'",
        ),
        ({"tokenizer_config.json": '{"chat_template": 3}'}, "chat_template in .* = 3: expected"),
    ],
)
def test_templates_that_contradict_each_other_are_refused(tmp_path, files, message):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_template(tmp_path)


def test_a_template_that_is_named_needs_none_of_the_folder(both, tmp_path):
    ours = both("llama").ours
    write_processor(tmp_path, ours.config, ours.tokenizer, ours.chat_template)
    (tmp_path / "chat_template.json").write_text('{"chat_template": "old"}')
    named = read_processor(tmp_path, ours.config, "brief")
    assert named.chat_template == chat_template("brief")
    with pytest.raises(ConfigError, match="is stated in 2 places"):
        read_processor(tmp_path, ours.config)


def test_a_text_has_one_bos_token_if_its_template_writes_it(both):
    """As the template of Mistral does."""
    template = "{{ bos_token }}" + chat_template("brief")
    ours = dataclasses.replace(both("llama").ours, chat_template=template)
    messages = [ask("Hi")]
    (ids,) = both("llama").theirs.apply_chat_template(
        messages, template, add_generation_prompt=True, tokenize=True
    )
    assert ours.encode(ours.render(messages))[0].tolist() == ids
    assert ids.count(ids[0]) == 1


# Pictures


def pictures() -> dict[str, Image.Image]:
    """Pictures of all sizes and colour modes, by name."""
    rng = np.random.default_rng(0)

    def colours(*shape: int) -> np.ndarray:
        return rng.integers(0, 256, shape, np.uint8)

    # Enlarged, so that it is smooth.
    photo = Image.fromarray(colours(9, 12, 3)).resize((200, 150), Image.Resampling.BICUBIC)
    return {
        "wide": photo.resize((300, 40)),
        "tall": photo.resize((40, 301)),
        "small": Image.fromarray(colours(3, 5, 3)),
        "one pixel": Image.fromarray(colours(1, 1, 3)),
        "large": photo.resize((1200, 900)),
        "square": photo.resize((77, 77)),
        "fitting": photo.resize((28, 28)),
        "gray": photo.convert("L"),
        "black and white": photo.convert("1"),
        "palette": photo.convert("P", palette=Image.Palette.ADAPTIVE),
        "RGBA": Image.fromarray(colours(30, 50, 4), "RGBA"),
        "LA": Image.fromarray(colours(30, 50, 2), "LA"),
    }


def normalised(pixels: np.ndarray, vision: VisionConfig) -> np.ndarray:
    """Normalises pixels u8[N,H,W,3] as the vision tower does; f32[N,3,H,W]."""
    centred = pixels.astype(np.float32) / 255 - np.float32(vision.pixel_mean)
    return (centred / np.float32(vision.pixel_std)).transpose(0, 3, 1, 2)


def assert_same_pixels(ours: Processor, theirs) -> None:
    """Asserts that our processor prepares all pictures as the image processor `theirs` does."""
    shown = pictures()
    found = normalised(ours.pixels(shown.values()), ours.config.vision)
    for (name, picture), pixels in zip(shown.items(), found, strict=True):
        wanted = theirs(picture)["pixel_values"][0]
        np.testing.assert_allclose(pixels, wanted, rtol=0, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("kind", ["qwen", "bytes"])
def test_pixels_are_those_of_the_stock_processor(both, kind):
    theirs = AutoImageProcessor.from_pretrained(both(kind).folder, backend="pil")
    assert isinstance(theirs, LlavaImageProcessorPil)
    assert_same_pixels(both(kind).ours, theirs)


CLIP = {"image_mean": TOWERS["clip"].pixel_mean, "image_std": TOWERS["clip"].pixel_std}
STOCK_FITS = {
    "crop": lambda size: CLIPImageProcessorPil(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}
    ),
    "stretch": lambda size: SiglipImageProcessorPil(size={"height": size, "width": size}, **CLIP),
}


@pytest.mark.parametrize("fit", STOCK_FITS)
@pytest.mark.parametrize("layout", ["4.x", "5.x"])
def test_the_fit_of_a_stock_folder_is_kept(both, tmp_path, fit, layout):
    """llava-1.5-hf crops as CLIP does; LLaVA models with SigLIP stretch.

    transformers 5.x writes one processor_config.json, 4.x two files.
    """
    theirs = STOCK_FITS[fit](28)
    folder = both("llama")
    LlavaProcessor(
        theirs,
        folder.theirs.tokenizer,
        14,
        "default",
        chat_template="{{ messages }}",
        num_additional_image_tokens=1,
    ).save_pretrained(tmp_path)
    if layout == "4.x":
        whole = json.loads((tmp_path / "processor_config.json").read_text())
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(whole.pop("image_processor")))
        (tmp_path / "processor_config.json").write_text(json.dumps(whole))
    ours = read_processor(tmp_path, folder.ours.config)
    assert (ours.fit, ours.chat_template) == (fit, "{{ messages }}")
    assert_same_pixels(ours, theirs)
    text = "<image>\nWhat?"
    stock = AutoProcessor.from_pretrained(tmp_path)
    assert ours.encode(text)[0].tolist() == stock_ids(stock, text)


# Name -> (class of the image processor, its settings as old and new files have them).
OLD_FORMS = {
    "numbers": ("CLIPImageProcessorPil", {"size": 28, "crop_size": 28}),
    "a number and an object": (
        "CLIPImageProcessorPil",
        {"size": 28, "crop_size": {"height": 28, "width": 28}},
    ),
    "nulls": (
        "CLIPImageProcessorPil",
        {"size": 28, "crop_size": 28, "do_pad": None, "crop_pct": None, "image_seq_length": None},
    ),
    "no crop": (
        "SiglipImageProcessorPil",
        {
            "size": {"height": 28, "width": 28},
            "crop_size": None,
            "do_center_crop": None,
            **{key: list(value) for key, value in CLIP.items()},
        },
    ),
    "a crop that SigLIP does not make": (
        "SiglipImageProcessorPil",
        {"size": [28, 28], "crop_size": 20, **{key: list(value) for key, value in CLIP.items()}},
    ),
    "padded": ("LlavaImageProcessorPil", {"size": 28, "crop_size": 28, "do_pad": True}),
}


@pytest.mark.parametrize("form", OLD_FORMS)
def test_what_transformers_reads_is_read(both, tmp_path, form):
    """Old files have numbers for sizes, and a null where a step is off."""
    kind, values = OLD_FORMS[form]
    ours = both("llama").ours
    write_processor(tmp_path, ours.config, ours.tokenizer, ours.chat_template)
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps({"image_processor_type": kind.removesuffix("Pil")} | values))
    theirs = getattr(transformers, kind).from_pretrained(tmp_path)
    assert_same_pixels(read_processor(tmp_path, ours.config), theirs)


@pytest.mark.parametrize("value", ["28", [28], True, 28.5])
def test_a_size_that_is_none_is_refused(both, tmp_path, value):
    ours = both("llama").ours
    write_processor(tmp_path, ours.config, ours.tokenizer, ours.chat_template)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": value}))
    with pytest.raises(ConfigError, match="size of the image processor = .*expected an object"):
        read_processor(tmp_path, ours.config)


@pytest.mark.parametrize("fit", ["pad", "crop", "stretch"])
def test_a_fit_survives_being_written(both, tmp_path, fit):
    ours = both("llama").ours
    write_processor(tmp_path, ours.config, ours.tokenizer, ours.chat_template, fit)
    read = read_processor(tmp_path, ours.config)
    assert (read.fit, read.chat_template) == (fit, ours.chat_template)
    assert read.tokenizer.backend_tokenizer.to_str() == ours.tokenizer.backend_tokenizer.to_str()


def test_without_an_image_processor_pictures_are_padded(both, tmp_path):
    ours = both("llama").ours
    ours.tokenizer.save_pretrained(tmp_path)
    assert read_processor(tmp_path, ours.config).fit == "pad"


# Batches, and errors


def test_prompts_are_padded_on_the_left(both):
    ours = both("llama").ours
    red, green, blue = (Image.new("RGB", (20, 10), name) for name in ("red", "green", "blue"))
    texts = ["<image>\nWhat is it?", "Hi", "<image> or <image>?"]
    shown = [[red], [], [green, blue]]
    prompts = ours.prompts(texts, shown)
    assert prompts.images.shape == (3, 2, 28, 28, 3)
    for row, (text, pixels) in enumerate(zip(texts, shown)):
        ids, is_picture = ours.encode(text)
        padding = prompts.tokens.shape[1] - len(ids)
        assert prompts.tokens[row, padding:].tolist() == ids.tolist()
        assert prompts.segment_ids[row].tolist() == [0] * padding + [1] * len(ids)
        index = prompts.picture_index[row]
        assert (index[:padding] == -1).all()
        assert ((index[padding:] >= 0) == is_picture).all()
        assert index[index >= 0].tolist() == list(range(4 * len(pixels)))
        np.testing.assert_array_equal(prompts.images[row, : len(pixels)], ours.pixels(pixels))
    message = "text '<image> and <image>' marks 2 pictures with <image>, expected 1"
    with pytest.raises(ValueError, match=message):
        ours.prompts(["<image> and <image>"], [[red]])
    with pytest.raises(BadSample, match="unreadable"):
        ours.prompts(["<image>"], [[b"no picture"]])


def test_a_tokenizer_of_another_model_is_refused(both, tmp_path):
    config = both("qwen").ours.config
    message = r"id of <image> in the tokenizer of .* = \d+: expected the model's, 151646"
    with pytest.raises(ConfigError, match=message):
        read_processor(both("llama").folder, config)
    with pytest.raises(ConfigError, match="expected the model's, 151646"):
        write_processor(tmp_path, config, both("llama").ours.tokenizer, chat_template("qwen"))
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "change",
    [
        {"do_resize": False},
        {"resample": 2},
        {"do_normalize": False},
        {"rescale_factor": 1},
        {"size": {"shortest_edge": 56}},
        {"crop_size": {"height": 24, "width": 24}},
    ],
)
def test_pictures_prepared_in_another_way_are_refused(both, tmp_path, change):
    ours = both("llama").ours
    write_processor(tmp_path, ours.config, ours.tokenizer, ours.chat_template)
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps(image_processor_to_json(ours.config.vision) | change)
    )
    message = "image processor = .*: expected one of .*pad.*crop.*stretch"
    with pytest.raises(ConfigError, match=message):
        read_processor(tmp_path, ours.config)


def test_a_token_of_the_model_without_a_row_is_refused(both, tmp_path):
    ours = both("llama").ours
    rows = ours.config.decoder.vocab_size
    config = dataclasses.replace(ours.config, other_end_token_ids=(rows,))
    message = rf"other_end_token_ids in .* = \({rows},\): expected less than {rows}"
    with pytest.raises(ConfigError, match=message):
        write_processor(tmp_path, config, ours.tokenizer, ours.chat_template)
    with pytest.raises(ConfigError, match=message):
        read_processor(both("llama").folder, config)


def test_an_image_processor_that_is_no_object_is_refused(both, tmp_path):
    ours = both("llama").ours
    write_processor(tmp_path, ours.config, ours.tokenizer, ours.chat_template)
    (tmp_path / "preprocessor_config.json").unlink()
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": "clip"}))
    message = "image processor in .*/processor_config.json = 'clip': expected an object"
    with pytest.raises(ConfigError, match=message):
        read_processor(tmp_path, ours.config)


def test_a_file_that_is_no_json_is_named(both, tmp_path):
    ours = both("llama").ours
    write_processor(tmp_path, ours.config, ours.tokenizer, ours.chat_template)
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(ConfigError, match="preprocessor_config.json is not JSON"):
        read_processor(tmp_path, ours.config)
