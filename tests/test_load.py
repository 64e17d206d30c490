"""mod_jax.load: the model and the processor of a folder, as they are used in a notebook.

test_families.py tests that they compute what transformers computes.
"""

import base64
import dataclasses
import io
import subprocess
import sys

import families
import hf_models
import numpy as np
import pytest
import small
import torch
from layouts import saved_by_transformers
from PIL import Image
from stock.check import TOLERANCE
from transformers import GenerationConfig

import mod_jax
from mod_jax import convert
from mod_jax.config import ConfigError, MoEConfig
from mod_jax.data.samples.tokens import TEMPLATES
from mod_jax.data.sources.record import BadSample
from mod_jax.inference import chat, generation
from mod_jax.interop.processor import chat_template

STOCK = families.checkpoint_of("CLIP + Qwen1.5, 2, 2.5")
SEEN, OTHER = families.inputs()[1][3]
NEW = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stock")
    saved_by_transformers(STOCK, folder)
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return mod_jax.load(folder)


def near(found, wanted) -> bool:
    """Whether logits differ by rounding only."""
    return (
        found.shape == wanted.shape
        and np.abs(found - wanted).max() <= TOLERANCE * np.abs(wanted).max()
    )


def stock_answer(prompt: str, pictures) -> str:
    """The greedy answer of transformers' model and processor."""
    inputs = STOCK.processor(text=prompt, images=pictures or None, return_tensors="pt")
    options = GenerationConfig(
        max_new_tokens=NEW,
        do_sample=False,
        eos_token_id=STOCK.tokenizer.eos_token_id,
        pad_token_id=STOCK.tokenizer.eos_token_id,
    )
    with torch.no_grad():
        ids = STOCK.model.generate(**inputs, generation_config=options)
    answer = ids[0, inputs["input_ids"].shape[1] :]
    return STOCK.processor.decode(answer, skip_special_tokens=True).strip()


def test_importing_the_package_imports_no_jax():
    code = "import mod_jax, sys; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# Logits


@pytest.mark.parametrize(
    "text, pictures", [("A cat <image> and <image>", [SEEN, OTHER]), ("What is it?", [])]
)
def test_logits_are_those_of_transformers_a_picture_taking_a_position_for_each_feature(
    text, pictures, model
):
    inputs = STOCK.processor(text=text, images=pictures or None, return_tensors="pt")
    with torch.no_grad():
        wanted = STOCK.model(**inputs).logits[0].numpy()
    found = model.logits(text, pictures)
    assert isinstance(found, np.ndarray) and found.dtype == np.float32
    assert near(found, wanted)


def test_a_text_of_a_batch_stands_at_the_end_of_its_row(model):
    texts = ["<image> A cat", "Two cats, I am sure.", "No"]
    pictures = [[SEEN], [], []]
    batch = model.logits(texts, pictures)
    alone = [model.logits(text, shown) for text, shown in zip(texts, pictures)]
    assert batch.shape == (3, max(map(len, alone)), alone[0].shape[1])
    assert all(near(row[-len(own) :], own) for row, own in zip(batch, alone))
    assert near(model.logits(texts[1:]), batch[1:, -len(alone[1]) :])


def test_how_far_lengths_are_padded_changes_no_logits(model, monkeypatch):
    padded = model.logits("<image> A cat", [SEEN])
    for multiple in (1, 100):
        monkeypatch.setattr(chat, "MULTIPLE", multiple)
        assert near(model.logits("<image> A cat", [SEEN]), padded)


def test_nothing_is_padded_if_experts_have_a_capacity(model):
    """The capacity is a share of all positions, padding included."""
    decoder = dataclasses.replace(model.config.decoder, moe=MoEConfig(capacity_factor=0.5))
    config = dataclasses.replace(model.config, decoder=decoder)
    tight = chat.Chat(config, small.params_of(config), model.processor)
    prompts = model.processor.prompts(["How many cats are there?"], [[]])
    wanted = generation.logits(config, tight.params, prompts)
    np.testing.assert_array_equal(tight.logits("How many cats are there?"), wanted[0])


def encoded(image: Image.Image) -> bytes:
    """The picture as a PNG file."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def test_a_picture_may_be_an_image_an_array_bytes_or_a_file(model, tmp_path):
    SEEN.save(tmp_path / "seen.png")
    forms = [
        SEEN,
        np.asarray(SEEN),
        encoded(SEEN),
        tmp_path / "seen.png",
        str(tmp_path / "seen.png"),
    ]
    first, *others = (model.logits("<image> A cat", [form]) for form in forms)
    assert all(np.array_equal(other, first) for other in others)
    assert not near(model.logits("<image> A cat", [OTHER]), first)


# Answers

CONVERSATION = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
    {"role": "assistant", "content": "A cat."},
    {
        "role": "user",
        "content": [
            {"type": "text", "text": "And this <image>?"},
            {"type": "image", "image": OTHER},
        ],
    },
]
# Name -> (question or conversation, pictures that it does not carry).
ASKED = {
    "a question": ("What is it?", []),
    "pictures where they are marked": ("Is <image> like <image>?", [SEEN, OTHER]),
    "a conversation": (CONVERSATION, [SEEN]),
}


@pytest.mark.parametrize("asked", ASKED)
def test_an_answer_is_what_stock_transformers_says_to_the_same_messages(asked, model):
    text, images = ASKED[asked]
    messages = [{"role": "user", "content": text}] if isinstance(text, str) else text
    prompt = STOCK.processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=False
    )
    wanted = stock_answer(prompt, [*images, OTHER] if messages is CONVERSATION else images)
    assert wanted
    assert model.generate(text, images, NEW) == wanted


def test_pictures_without_markers_come_before_the_question(model):
    found = model.generate("Which?", [SEEN, OTHER], NEW)
    assert found == model.generate("<image>\n<image>\nWhich?", [SEEN, OTHER], NEW)


def test_an_answer_ends_at_the_end_token(model):
    text = model.processor.render([{"role": "user", "content": "What is it?"}])
    prompts = model.processor.prompts([text], [[]], chat.MULTIPLE)
    ids = np.asarray(generation.generate(model.config, model.params, prompts, NEW))[0].tolist()
    end = next(token for token in ids if token != ids[0])
    ended = dataclasses.replace(model, config=dataclasses.replace(model.config, end_token_id=end))
    wanted = model.processor.tokenizer.decode(ids[: ids.index(end)]).strip()
    assert ended.generate("What is it?", max_new_tokens=NEW) == wanted


def test_the_next_question_compiles_nothing(model):
    def ask(text: str) -> tuple[int, int]:
        """Runs both programs, and returns how many of each are compiled."""
        model.generate(text, [SEEN], NEW)
        model.logits("<image> " + text, [SEEN])
        return generation.generate._cache_size(), generation.logits._cache_size()

    assert ask("Why?") == ask("How many?")


def test_several_questions_are_answered_as_each_alone(model):
    asked = ["What is it?", CONVERSATION, "Is <image> like <image>?", [CONVERSATION[2]]]
    pictures = [[], [SEEN], [SEEN, OTHER], []]
    alone = [model.generate(text, shown, NEW) for text, shown in zip(asked, pictures)]
    assert model.generate(asked, pictures, NEW) == alone
    assert len(set(alone)) == len(asked)
    assert model.generate(asked[:1], max_new_tokens=NEW) == alone[:1]


def test_neither_padding_nor_other_texts_change_a_model_with_a_capacity(model):
    decoder = dataclasses.replace(model.config.decoder, moe=MoEConfig(capacity_factor=0.5))
    config = dataclasses.replace(model.config, decoder=decoder)
    tight = chat.Chat(config, small.params_of(config), model.processor)
    texts = ["How many cats are there?", "No"]
    alone = [tight.logits(text) for text in texts]
    batch = tight.logits(texts)
    assert batch.shape == (2, len(alone[0]), alone[0].shape[1])
    assert all(np.array_equal(row[-len(own) :], own) for row, own in zip(batch, alone))
    assert tight.generate(texts, (), 2) == [tight.generate(text, (), 2) for text in texts]


def test_a_part_may_carry_its_picture_by_a_path_or_a_url(model, tmp_path):
    SEEN.save(tmp_path / "seen.png")
    data = base64.b64encode(encoded(SEEN)).decode()
    parts = [
        {"type": "image", "path": str(tmp_path / "seen.png")},
        {"type": "image", "url": (tmp_path / "seen.png").as_uri()},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}},
    ]
    question = {"type": "text", "text": "Which?"}
    wanted = model.generate("<image>\nWhich?", [SEEN], NEW)
    for part in parts:
        assert model.generate([{"role": "user", "content": [part, question]}], (), NEW) == wanted


# Folders


def test_an_imported_folder_is_the_same_model(folder, model, tmp_path):
    options = convert.parser().parse_args(["import", str(folder), str(tmp_path / "ours")])
    options.run(options)
    ours = mod_jax.load(tmp_path / "ours")
    assert ours.config == model.config
    assert ours.processor.chat_template == model.processor.chat_template
    assert ours.params.keys() == model.params.keys()
    assert all(np.array_equal(ours.params[name], x) for name, x in model.params.items())
    assert ours.generate("Which?", [SEEN], NEW) == model.generate("Which?", [SEEN], NEW)


def test_activations_are_float32_or_bfloat16(folder, model):
    rough = mod_jax.load(folder, dtype="bfloat16")
    assert rough.config == dataclasses.replace(model.config, dtype="bfloat16")
    difference = np.abs(rough.logits("What is it?") - model.logits("What is it?")).max()
    assert 0 < difference < 0.1 * np.abs(model.logits("What is it?")).max()


def test_a_template_can_be_named_and_is_qwen_if_there_is_none(folder, tmp_path):
    assert mod_jax.load(folder, template="brief").processor.chat_template == chat_template("brief")
    processor = families.FAMILIES["CLIP + Qwen1.5, 2, 2.5"].processor(template=None)
    saved_by_transformers(dataclasses.replace(STOCK, processor=processor), tmp_path)
    assert not (tmp_path / "chat_template.jinja").exists()
    assert mod_jax.load(tmp_path).processor.chat_template == chat_template("qwen")
    with pytest.raises(ConfigError, match=f"template = 'morse'.*{next(iter(TEMPLATES))}"):
        mod_jax.load(folder, template="morse")


# Errors


@pytest.mark.parametrize("ask", ["logits", "generate"])
def test_another_number_of_pictures_than_markers_is_refused(ask, model):
    with pytest.raises(ValueError, match=r"'<image> or <image>' .*2 picture.*expected 1"):
        getattr(model, ask)("<image> or <image>", [SEEN])


@pytest.mark.parametrize("ask", ["logits", "generate"])
@pytest.mark.parametrize(
    "picture, message",
    [("nowhere.png", "no such picture file: nowhere.png"), (b"\x89PNG", "unreadable picture")],
)
def test_a_picture_that_cannot_be_read_is_refused(ask, picture, message, model):
    with pytest.raises(BadSample, match=message):
        getattr(model, ask)("<image>", [picture])


# What is asked -> (arguments of generate, message).
BAD_QUESTIONS = {
    "nothing": (("",), "text = '': expected a question, or pictures"),
    "spaces": (("  \n",), "expected a question, or pictures"),
    "no question": (([],), r"messages = \[\]: expected at least one message"),
    "a number": ((3,), "text = 3: expected a text"),
    "None": ((None,), "text = None: expected a text"),
    "no conversation": (([[]], [[]]), r"messages = \[\]: expected at least one message"),
    "an empty question among others": ((["Why?", ""],), "text = '': expected a question"),
    "no new tokens": (("Why?", (), 0), "max_new_tokens = 0: expected a positive integer"),
    "fewer than none": (("Why?", (), -1), "max_new_tokens = -1: expected a positive integer"),
    "half a token": (("Why?", (), 0.5), "max_new_tokens = 0.5: expected a positive integer"),
    "too few lists of pictures": (
        (["Why?", "How?"], [[SEEN]]),
        "images = '1 lists of pictures': expected 2, one for each text",
    ),
    "pictures without their lists": ((["Why?"], [SEEN]), "images = 'Image': expected a list of"),
    "a list in a list": (("Why?", [[SEEN]]), "images = 'list': expected pictures: a Pillow"),
    "no content": (([{"role": "user"}],), r"messages\[0\]: content = None: expected a text"),
    "a video": (
        ([{"role": "user", "content": [{"type": "video"}]}],),
        "expected parts of type text or image",
    ),
    "a role that the template does not know": (
        ([{"role": "tool", "content": "4"}],),
        "messages = .*expected messages that the chat template can show",
    ),
}


@pytest.mark.parametrize("asked", BAD_QUESTIONS)
def test_what_cannot_be_asked_is_one_line(asked, model):
    arguments, message = BAD_QUESTIONS[asked]
    ours = dataclasses.replace(
        model, processor=dataclasses.replace(model.processor, chat_template=chat_template("brief"))
    )
    with pytest.raises(ConfigError, match=message) as error:
        ours.generate(*arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (([],), r"text = \[\]: expected a text, or a list of at least one"),
        (("",), "text = '': expected a text of at least one token"),
        ((["Why?", ""],), "text = '': expected a text of at least one token"),
        (([3],), "text = 3: expected a text"),
        ((["Why?", "How?"], [[], [], []]), "images = '3 lists of pictures': expected 2"),
    ],
)
def test_texts_without_logits_are_one_line(arguments, message, model):
    with pytest.raises(ConfigError, match=message):
        model.logits(*arguments)


@pytest.mark.parametrize(
    "jinja",
    [
        "{{ raise_exception('no') }}",
        "{{ messages[0].content.missing() }}",
        "{{ messages[7]['role'] }}",
        "{{ 1 + messages }}",
        "{% for x in %}",
    ],
)
def test_a_template_that_raises_is_one_line(jinja, model):
    processor = dataclasses.replace(model.processor, chat_template=jinja)
    message = r"messages = \[.*expected messages that the chat template can show \("
    with pytest.raises(ConfigError, match=message) as error:
        dataclasses.replace(model, processor=processor).generate("Why?")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("ask", ["logits", "generate"])
@pytest.mark.parametrize(
    "pictures", ["seen.png", SEEN, np.asarray(SEEN)], ids=["a name", "Pillow's", "an array"]
)
def test_a_picture_instead_of_a_list_is_refused(ask, pictures, model):
    with pytest.raises(ConfigError, match="images = .*expected a list of pictures"):
        getattr(model, ask)("<image>", pictures)


@pytest.mark.parametrize("pictures", [5, None, SEEN])
def test_pictures_of_several_texts_are_a_list(pictures):
    with pytest.raises(ConfigError, match="images = .*expected a list of pictures"):
        chat.batch_of(["a", "b"], pictures)


def test_more_positions_than_a_model_supports_are_refused(model):
    decoder = dataclasses.replace(model.config.decoder, max_positions=50)
    config = dataclasses.replace(model.config, decoder=decoder)
    short = dataclasses.replace(model, config=config)
    with pytest.raises(ConfigError, match=r"positions = \d+: expected at most 50"):
        short.generate("What is it?", max_new_tokens=50)
    with pytest.raises(ConfigError, match=r"positions = \d+: expected at most 50"):
        short.logits("cat " * 60)


def test_a_part_of_a_model_and_a_stage_without_a_run_are_refused(folder, tmp_path):
    hf_models.build(hf_models.clip()).save_pretrained(tmp_path / "tower")
    with pytest.raises(ConfigError, match="It holds a vision tower"):
        mod_jax.load(tmp_path / "tower")
    with pytest.raises(ConfigError, match="stage = 'preference': expected None"):
        mod_jax.load(folder, stage="preference")
    with pytest.raises(ConfigError, match="expected a Hugging Face folder with a config.json"):
        mod_jax.load(tmp_path)
