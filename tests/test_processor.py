"""The processor of a folder: what ours reads and writes is what stock transformers does with the same messages and pictures."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest
import small_tokenizers
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
# A folder each: tokenizer, tower, and the text model that config.json names.
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
    """A written folder as ours and theirs read it, and the encoder that training has."""

    folder: pathlib.Path
    ours: Processor
    theirs: LlavaProcessor
    encoder: TextEncoder


def write_folder(folder, kind: str, template: str) -> ModelConfig:
    make, tower, text_config = FOLDERS[kind]
    make().save_pretrained(folder / "source")
    tokenizer, vision = load_tokenizer(folder / "source"), TOWERS[tower]
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
    """Kind -> Both, made when it is first asked for."""
    made = {}

    def of(kind: str) -> Both:
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            config = write_folder(folder, kind, chat_template("qwen"))
            ours = read_processor(folder, config)
            made[kind] = Both(
                folder, ours, AutoProcessor.from_pretrained(folder), text_encoder(ours.tokenizer)
            )
        return made[kind]

    return of


def ask(*parts) -> dict:
    """A user's message: a string as it is, or parts, of which None is a picture."""
    in_parts = [
        {"type": "image"} if text is None else {"type": "text", "text": text} for text in parts
    ]
    return {"role": "user", "content": parts[0] if len(parts) == 1 else in_parts}


def say(text: str) -> dict:
    return {"role": "assistant", "content": text}


# Each with the questions as `conversation` has them (None where it has no such conversation).
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
    pictures = text.count("<image>")
    return list(
        stock(text=text, images=[Image.new("RGB", (20, 10))] * pictures if pictures else None)[
            "input_ids"
        ][0]
    )


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("kind", FOLDERS)
def test_a_prompt_s_ids_are_those_of_stock_and_of_training(both, kind, name):
    ours, theirs = both(kind).ours, both(kind).theirs
    messages, questions = CONVERSATIONS[name]
    text = ours.render(messages)
    ids, is_picture = ours.encode(text)
    assert text == theirs.apply_chat_template(messages, add_generation_prompt=True)
    assert ids.tolist() == stock_ids(theirs, text)
    assert (
        text.endswith(" ASSISTANT:")
        and is_picture.sum() == text.count("<image>") * ours.config.vision.num_features
    )
    begin = both(kind).encoder.begin
    assert tuple(ids[: len(begin)]) == begin and not np.isin(ids[len(begin) :], begin).any(), (
        "begun once"
    )
    if questions:
        answers = [message["content"] for message in messages if message["role"] == "assistant"]
        prompt, marks = tokenize_prompt(
            tuple(zip(questions, (*answers, None))),
            both(kind).encoder,
            chat_format("qwen", ours.config, ours.tokenizer),
        )
        assert ids.tolist() == prompt.tolist() and is_picture.tolist() == marks.tolist()


@pytest.mark.parametrize(
    "name", [name for name, (_, questions) in CONVERSATIONS.items() if questions]
)
@pytest.mark.parametrize("kind", FOLDERS)
def test_an_answered_conversation_s_ids_are_those_of_stock_and_of_training(both, kind, name):
    ours, theirs = both(kind).ours, both(kind).theirs
    messages, questions = CONVERSATIONS[name]
    messages = [*messages, say("It is so.")]
    text = ours.render(messages, add_generation_prompt=False)
    assert text == theirs.apply_chat_template(messages) and text.endswith(
        f" ASSISTANT: It is so.{theirs.tokenizer.eos_token}"
    )
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    learnt = tokenize(
        Record("r", (), tuple(zip(questions, answers))),
        both(kind).encoder,
        chat_format("qwen", ours.config, ours.tokenizer),
        10**5,
    )
    assert (
        ours.encode(text)[0].tolist()
        == stock_ids(theirs, text)
        == [*learnt.tokens, learnt.targets[-1]]
    )


def test_stock_tokenizes_a_template_in_one_step_to_the_same_ids(both):
    messages = [
        {
            "role": "user",
            "content": [
                {"type": "image", "image": Image.new("RGB", (20, 10))},
                {"type": "text", "text": "What?"},
            ],
        }
    ]
    for kind in FOLDERS:
        ids = both(kind).theirs.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True
        )
        assert both(kind).ours.encode(both(kind).ours.render(messages))[0].tolist() == ids[0]


@pytest.mark.parametrize("kind", FOLDERS)
def test_stock_knows_the_special_tokens(both, kind):
    ours, tokenizer = both(kind).ours, both(kind).theirs.tokenizer
    assert (
        tokenizer.image_token == "<image>"
        and tokenizer.image_token_id == ours.config.image_token_id
    )
    specials = [
        (t.bos_token, t.eos_token, t.pad_token, t.unk_token, t.padding_side)
        for t in (tokenizer, ours.tokenizer)
    ]
    assert specials[0][:4] == specials[1][:4] and specials[0][4] == "left"
    generation = GenerationConfig.from_pretrained(both(kind).folder)
    ids = (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id)
    assert (
        ids == (tokenizer.bos_token_id, ours.config.end_token_id, tokenizer.pad_token_id)
        and not generation.do_sample
    )
    text = "What is it? Two cats."
    assert tokenizer.decode(
        ours.encode(text)[0], skip_special_tokens=True
    ) == ours.tokenizer.decode(ours.encode(text)[0], skip_special_tokens=True)


def test_stock_reads_a_plain_language_model_s_tokenizer_as_it_is_written(both, tmp_path):
    """transformers 5 makes Qwen's tokenizer of whatever a plain qwen2 folder holds; every other family's is read."""
    for kind, text_config in {
        "qwen": Qwen2Config,
        "words": Qwen2MoeConfig,
        "llama": LlamaConfig,
    }.items():
        folder = tmp_path / kind
        folder.mkdir()
        write_processor(
            folder, both(kind).ours.config, both(kind).ours.tokenizer, chat_template("qwen")
        )
        text_config().save_pretrained(folder)
        text = "USER: What is it? ASSISTANT: It's a cat — 猫."
        assert (
            AutoTokenizer.from_pretrained(folder)(text).input_ids
            == both(kind).ours.encode(text)[0].tolist()
        )


# Templates


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_renders_what_is_tokenised_for_training(both, name):
    template, known = TEMPLATES[name], both("instructed" if TEMPLATES[name].end else "llama")
    ours = dataclasses.replace(known.ours, chat_template=chat_template(name))
    encoder, chat = known.encoder, chat_format(name, ours.config, ours.tokenizer)
    messages, turns = (
        [ask("<image>\nWhat?"), say("A cat."), ask("Sure?")],
        (("<image>\nWhat?", "A cat."), ("Sure?", None)),
    )
    assert (
        ours.encode(ours.render(messages))[0].tolist()
        == tokenize_prompt(turns, encoder, chat)[0].tolist()
    )
    learnt = tokenize(Record("r", (), turns[:1]), encoder, chat, 1000)
    text = ours.render(messages[:2], False)
    assert text.endswith(template.after_answer)
    assert ours.encode(text.removesuffix(template.after_answer))[0].tolist() == [
        *learnt.tokens,
        learnt.targets[-1],
    ]


@pytest.mark.parametrize("system", [None, "Be brief.", ""])
def test_chatml_is_an_instructed_qwen_s_own(both, system):
    """As Qwen2's tokenizer_config.json has it; ids of the markers included."""
    ours = dataclasses.replace(both("instructed").ours, chat_template=chat_template("chatml"))
    said = [] if system is None else [{"role": "system", "content": system}]
    messages = [*said, ask(None, "What is it?"), say(" A cat.\n"), ask("\nSure?"), say("Yes")]
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
    assert (ids.count(151644), ids.count(151645)) == (5, 5) and ids[0] == 151644
    assert ids == stock_ids(both("instructed").theirs, written)


def test_a_template_of_another_model_is_refused(both, tmp_path):
    ours = both("qwen").ours
    with pytest.raises(
        ConfigError,
        match=r"template = 'chatml': expected one for this model, whose answers end with <\|endoftext\|>",
    ):
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


def test_a_template_is_known_again():
    assert all(
        TEMPLATES[template_of(chat_template(name))] == template
        for name, template in TEMPLATES.items()
    )
    assert template_of(chat_template("qwen") + "\n") is None and template_of(None) is None


@pytest.mark.parametrize(
    "files, expected",
    [
        ({"chat_template.jinja": "own", "chat_template.json": '{"chat_template": "old"}'}, "own"),
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
        ({}, None),
    ],
)
def test_a_folder_s_template_is_in_one_of_three_files(tmp_path, files, expected):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert read_template(tmp_path) == expected


def test_a_template_that_begins_the_text_itself_has_one_beginning(both):
    """Mistral's writes <s>."""
    own = "{{ bos_token }}" + chat_template("brief")
    ours, messages = dataclasses.replace(both("llama").ours, chat_template=own), [ask("Hi")]
    ids = both("llama").theirs.apply_chat_template(
        messages, own, add_generation_prompt=True, tokenize=True
    )[0]
    assert ours.encode(ours.render(messages))[0].tolist() == ids and ids.count(ids[0]) == 1


# Pictures


def pictures() -> dict[str, Image.Image]:
    rng = np.random.default_rng(0)
    colours = lambda *shape: rng.integers(0, 256, shape, np.uint8)
    photo = Image.fromarray(colours(9, 12, 3)).resize(
        (200, 150), Image.Resampling.BICUBIC
    )  # smooth
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
    """u8[N,H,W,3] as the tower computes with it, f32[N,3,H,W]."""
    return (
        (pixels.astype(np.float32) / 255 - np.float32(vision.pixel_mean))
        / np.float32(vision.pixel_std)
    ).transpose(0, 3, 1, 2)


@pytest.mark.parametrize("kind", ["qwen", "bytes"])
def test_pixels_are_those_of_the_stock_processor(both, kind):
    shown, ours = pictures(), both(kind).ours
    theirs = AutoImageProcessor.from_pretrained(both(kind).folder, backend="pil")
    assert isinstance(theirs, LlavaImageProcessorPil)
    for (name, picture), pixels in zip(
        shown.items(), normalised(ours.pixels(shown.values()), ours.config.vision), strict=True
    ):
        np.testing.assert_allclose(
            pixels, theirs(picture)["pixel_values"][0], rtol=0, atol=1e-6, err_msg=name
        )


CLIP = {"image_mean": TOWERS["clip"].pixel_mean, "image_std": TOWERS["clip"].pixel_std}
STOCK_FITS = {
    "crop": lambda size: CLIPImageProcessorPil(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}
    ),
    "stretch": lambda size: SiglipImageProcessorPil(size={"height": size, "width": size}, **CLIP),
}


@pytest.mark.parametrize("fit", STOCK_FITS)
@pytest.mark.parametrize("layout", ["4.x", "5.x"])
def test_a_stock_folder_s_own_fit_is_kept(both, tmp_path, fit, layout):
    """llava-1.5-hf crops as CLIP does; LLaVA models with SigLIP stretch. 5.x writes one processor_config.json, 4.x two files."""
    theirs, shown = STOCK_FITS[fit](28), pictures()
    known = both("llama")
    LlavaProcessor(
        theirs,
        known.theirs.tokenizer,
        14,
        "default",
        chat_template="{{ messages }}",
        num_additional_image_tokens=1,
    ).save_pretrained(tmp_path)
    if layout == "4.x":
        whole = json.loads((tmp_path / "processor_config.json").read_text())
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(whole.pop("image_processor")))
        (tmp_path / "processor_config.json").write_text(json.dumps(whole))
    ours = read_processor(tmp_path, known.ours.config)
    assert (ours.fit, ours.chat_template) == (fit, "{{ messages }}")
    for (name, picture), pixels in zip(
        shown.items(), normalised(ours.pixels(shown.values()), ours.config.vision), strict=True
    ):
        np.testing.assert_allclose(
            pixels, theirs(picture)["pixel_values"][0], rtol=0, atol=1e-6, err_msg=name
        )
    assert ours.encode("<image>\nWhat?")[0].tolist() == stock_ids(
        AutoProcessor.from_pretrained(tmp_path), "<image>\nWhat?"
    )


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


# Batches, and what is refused


def test_prompts_are_padded_on_the_left(both):
    ours = both("llama").ours
    shown = [Image.new("RGB", (20, 10), colour) for colour in ("red", "green", "blue")]
    texts = ["<image>\nWhat is it?", "Hi", "<image> or <image>?"]
    prompts = ours.prompts(texts, [shown[:1], [], shown[1:]])
    assert prompts.images.shape == (3, 2, 28, 28, 3)
    for row, (text, pixels) in enumerate(zip(texts, (shown[:1], [], shown[1:]))):
        ids, is_picture = ours.encode(text)
        padding = prompts.tokens.shape[1] - len(ids)
        assert prompts.tokens[row, padding:].tolist() == ids.tolist()
        assert prompts.segment_ids[row].tolist() == [0] * padding + [1] * len(ids)
        index = prompts.picture_index[row]
        assert (index[:padding] == -1).all() and ((index[padding:] >= 0) == is_picture).all()
        assert index[index >= 0].tolist() == list(range(4 * len(pixels)))
        np.testing.assert_array_equal(prompts.images[row, : len(pixels)], ours.pixels(pixels))
    with pytest.raises(
        ValueError, match=r"text '<image> and <image>' marks 2 pictures with <image>, expected 1"
    ):
        ours.prompts(["<image> and <image>"], [shown[:1]])
    with pytest.raises(BadSample, match="unreadable"):
        ours.prompts(["<image>"], [[b"no picture"]])


def test_a_tokenizer_of_another_model_is_refused(both, tmp_path):
    config = both("qwen").ours.config
    with pytest.raises(
        ConfigError,
        match=r"id of <image> in the tokenizer of .* = \d+: expected the model's, 151646",
    ):
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
    with pytest.raises(
        ConfigError, match="image processor = .*: expected one of .*pad.*crop.*stretch"
    ):
        read_processor(tmp_path, ours.config)


def test_a_file_that_is_no_json_is_named(both, tmp_path):
    ours = both("llama").ours
    write_processor(tmp_path, ours.config, ours.tokenizer, ours.chat_template)
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(ConfigError, match="preprocessor_config.json is not JSON"):
        read_processor(tmp_path, ours.config)
