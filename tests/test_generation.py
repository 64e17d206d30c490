"""Greedy answers: neither the cache, nor padding, nor the other prompts of a batch change them."""

import dataclasses
import functools
import re

import hf_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from small import DENSE, FEATURES, IDS, IMAGE_SIZE, SPARSE, params_of

from mod_jax.batch import Batch
from mod_jax.config import MeshConfig
from mod_jax.data.samples.tokenizer import scenes_tokenizer, text_encoder
from mod_jax.data.samples.tokens import ChatFormat, tokenize_prompt
from mod_jax.inference.generation import Prompts, Question, answer, generate
from mod_jax.models import llava
from mod_jax.sharding import make_mesh, parameter_shardings

IMAGE, NEW, LONGEST = IDS["image_token_id"], 8, 40
RNG = np.random.default_rng(0)
NO_IMAGE = np.zeros((1, 0, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)


def prompt(*content: int | str) -> np.ndarray:
    """Tokens i32[S] of a prompt, given the lengths of its texts and "picture" for each picture."""
    return np.concatenate(
        [
            np.full(FEATURES, IMAGE) if part == "picture" else RNG.integers(2, 80, part)
            for part in content
        ]
    ).astype(np.int32)


def pictures(count: int) -> np.ndarray:
    return RNG.integers(0, 256, (count, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)


ASKED = [
    (prompt(3, "picture", 5), pictures(1)),
    (prompt(4), pictures(0)),
    (prompt("picture", 2, "picture", 9), pictures(2)),
    (prompt("picture", 1), pictures(1)),
]


def left_padded(asked, image_id: int, size: int) -> Prompts:
    """A batch of (tokens, pictures), padded on the left; each row has room for as many pictures."""
    length = max(len(ids) for ids, _ in asked)
    most = max(len(images) for _, images in asked)
    tokens, segments, index = np.zeros((3, len(asked), length), np.int32)
    index -= 1
    images = np.zeros((len(asked), most, size, size, 3), np.uint8)
    for row, (ids, shown) in enumerate(asked):
        tokens[row, length - len(ids) :], segments[row, length - len(ids) :] = ids, 1
        index[row, length - len(ids) :] = np.where(
            ids == image_id, np.cumsum(ids == image_id) - 1, -1
        )
        images[row, : len(shown)] = shown
    return Prompts(tokens, segments, index, images)


@functools.partial(jax.jit, static_argnums=0)
def next_token(config, params, batch: Batch, last):
    """The most probable token after position `last` of row 0, by a forward pass without a cache."""
    hidden, _ = llava.bind(config, params)(batch)
    return jnp.argmax(llava.head(config, params) @ hidden[0, last])


def naive(config, params, ids: np.ndarray, shown: np.ndarray, new: int = NEW) -> list[int]:
    """Answers one prompt by a whole forward pass for each token.

    There is no cache, no padding on the left and no end token. The prompt has at most two pictures.
    """
    ids, images = list(ids), np.zeros((1, 2, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    images[0, : len(shown)] = shown
    for _ in range(new):
        tokens, segments, zeros = (np.zeros((1, LONGEST), np.int32) for _ in range(3))
        tokens[0, : len(ids)], segments[0, : len(ids)] = ids, 1
        index = np.where(tokens == IMAGE, np.cumsum(tokens == IMAGE, 1) - 1, -1).astype(np.int32)
        positions = np.arange(LONGEST, dtype=np.int32)[None]
        batch = Batch(
            tokens,
            tokens,
            zeros.astype(np.float32),
            positions,
            segments,
            zeros,
            index,
            images,
            zeros[:, :1],
        )
        ids.append(int(next_token(config, params, batch, len(ids) - 1)))
    return ids[-new:]


@functools.cache
def naive_answers(config) -> list[list[int]]:
    return [naive(config, params_of(config), *item) for item in ASKED]


@pytest.mark.parametrize("config", [DENSE, SPARSE], ids=["dense", "sparse"])
def test_prompts_of_any_length_and_number_of_pictures_are_answered_as_each_alone(config):
    found = generate(
        dataclasses.replace(config, end_token_id=79),
        params_of(config),
        left_padded(ASKED, IMAGE, IMAGE_SIZE),
        NEW,
    )
    assert not any(79 in ids for ids in naive_answers(config))  # nothing ends early
    assert np.asarray(found).tolist() == naive_answers(config)
    assert len({tuple(ids) for ids in naive_answers(config)}) == len(ASKED)


def test_a_row_that_ended_repeats_the_end_token_while_the_others_go_on():
    """The end token is one that the first answer reaches half way."""
    wanted = np.array(naive_answers(SPARSE))
    end = int(wanted[0, 3])
    for row in wanted:
        row[np.cumsum(row == end) > 0] = end
    assert (wanted[0, 3:] == end).all() and not (wanted == end).all(0).any()
    found = generate(
        dataclasses.replace(SPARSE, end_token_id=end),
        params_of(SPARSE),
        left_padded(ASKED, IMAGE, IMAGE_SIZE),
        NEW,
    )
    np.testing.assert_array_equal(found, wanted)


def test_a_row_ends_at_any_of_the_end_tokens():
    """The third token of the first answer and the fifth of the second end answers, beside 79."""
    wanted = np.array(naive_answers(SPARSE))
    others = (int(wanted[0, 2]), int(wanted[1, 4]))
    for row in wanted:
        row[np.cumsum(np.isin(row, (79, *others))) > 0] = 79
    assert (wanted[0, 2:] == 79).all() and (wanted[1, 4:] == 79).all()
    config = dataclasses.replace(SPARSE, end_token_id=79, other_end_token_ids=others)
    found = generate(config, params_of(SPARSE), left_padded(ASKED, IMAGE, IMAGE_SIZE), NEW)
    np.testing.assert_array_equal(found, wanted)


QUESTIONS = [
    Question("Describe the picture.", tuple(pictures(1))),
    Question("How many objects are there?", ()),
    Question("<image> above <image>?", tuple(pictures(2))),
    Question("Is the red ring left of the blue cross and above a small green circle?", ()),
    Question("What colour?", tuple(pictures(1))),
]


def test_answer_is_the_text_of_the_naive_loop_in_batches_of_two():
    """The last of the three batches has one question only.

    A picture without a marker in the question comes first, on a line of its own.
    """
    tokenizer, params = scenes_tokenizer(), params_of(SPARSE)
    chat = ChatFormat("brief", FEATURES, **IDS)
    texts = [
        "<image>\nDescribe the picture.",
        QUESTIONS[1].text,
        QUESTIONS[2].text,
        QUESTIONS[3].text,
        "<image>\nWhat colour?",
    ]
    wanted = []
    for text, question in zip(texts, QUESTIONS, strict=True):
        ids, _ = tokenize_prompt(((text, None),), text_encoder(tokenizer), chat)
        shown = np.array(question.pictures).reshape(-1, IMAGE_SIZE, IMAGE_SIZE, 3)
        new_ids = naive(SPARSE, params, ids, shown)
        if IDS["end_token_id"] in new_ids:
            new_ids = new_ids[: new_ids.index(IDS["end_token_id"])]
        wanted.append(tokenizer.decode(new_ids, skip_special_tokens=True))
    assert answer(SPARSE, params, tokenizer, "brief", QUESTIONS, 2, NEW) == wanted
    assert all(wanted) and len(set(wanted)) > 2


def test_a_long_prompt_is_read_without_its_scores():
    """No array of the prefill or of a step has two axes of positions."""
    length = 200
    prompts = Prompts(*np.ones((2, 1, length), np.int32), -np.ones((1, length), np.int32), NO_IMAGE)
    program = jax.make_jaxpr(generate, static_argnums=(0, 3))(DENSE, params_of(DENSE), prompts, 8)
    shapes = re.findall(r"\w+\[([\d,]+)\]", str(program))
    sizes = [[int(n) for n in shape.split(",")] for shape in shapes]
    assert max(shape.count(length) for shape in sizes) == 1
    assert not any(sum(n >= length for n in shape) > 1 for shape in sizes if max(shape) < 1000)


def test_idle_experts_are_not_read():
    """Experts that no token chooses may hold anything: their weights enter no product."""
    params = dict(params_of(SPARSE))
    router = "language_model.layers.moe.router.w_de"
    chosen = SPARSE.decoder.moe.experts_per_token
    assert SPARSE.decoder.moe.num_experts > chosen
    params[router] = np.zeros_like(params[router])  # of equal experts the first ones are chosen
    prompts = left_padded(ASKED, IMAGE, IMAGE_SIZE)
    wanted = generate(SPARSE, params, prompts, NEW)
    for name, array in params.items():
        if ".moe.experts." in name:
            idle = np.arange(array.shape[1])[:, None, None] >= chosen
            params[name] = np.where(idle, np.nan, array)
    np.testing.assert_array_equal(generate(SPARSE, params, prompts, NEW), wanted)
    assert (np.asarray(wanted) != IDS["end_token_id"]).any()


def test_answers_of_a_mesh_are_those_of_one_device():
    """Three questions do not divide over eight devices, and the experts exchange their tokens."""
    tokenizer = scenes_tokenizer()
    config = dataclasses.replace(SPARSE, end_token_id=tokenizer.eos_token_id)
    params = params_of(SPARSE)
    asked = [Question(f"how many {word}?", ()) for word in ("red", "ring", "cross")]
    ask = functools.partial(answer, config, tokenizer=tokenizer, template="brief", questions=asked)
    wanted = ask(params, max_new_tokens=4)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, expert=2))
    placed = jax.device_put(params, parameter_shardings(mesh, params, llava.axes(config)))
    with jax.set_mesh(mesh):
        assert ask(placed, max_new_tokens=4) == wanted
        assert ask(placed, rows=2, max_new_tokens=4) == wanted
    assert len(set(wanted)) > 1


def test_markers_without_their_pictures_are_refused():
    with pytest.raises(
        ValueError, match=r"'<image> and <image>' has 2 picture markers, expected 1"
    ):
        answer(
            SPARSE,
            {},
            scenes_tokenizer(),
            "brief",
            [Question("<image> and <image>", tuple(pictures(1)))],
        )


def test_token_for_token_what_transformers_generates(tmp_path):
    model = hf_models.build(hf_models.llava(hf_models.clip(), hf_models.qwen2()), seed=1)
    model.save_pretrained(tmp_path / "theirs")
    config, params = hf_models.load(tmp_path / "theirs")
    rng = np.random.default_rng(3)
    text = lambda n: rng.integers(0, hf_models.END_TOKEN, n)
    picture = np.full(config.vision.num_features, hf_models.IMAGE_TOKEN)
    shown = rng.integers(0, 256, (3, 12, 12, 3), np.uint8)
    asked = [
        (np.concatenate([text(4), picture, text(6)]), shown[:1]),
        (np.concatenate([picture, picture, text(3)]), shown[1:]),
        (text(5), shown[:0]),
    ]
    found = np.asarray(generate(config, params, left_padded(asked, hf_models.IMAGE_TOKEN, 12), NEW))
    for (ids, images), row in zip(asked, found, strict=True):
        mean, std = np.array(config.vision.pixel_mean), np.array(config.vision.pixel_std)
        pixels = ((images / 255.0 - mean) / std).transpose(0, 3, 1, 2)
        inputs = {}
        if len(images):
            inputs["pixel_values"] = torch.tensor(pixels, dtype=torch.float32)
        prompt_ids = torch.tensor(ids)[None]
        theirs = model.generate(
            input_ids=prompt_ids,
            attention_mask=torch.ones_like(prompt_ids),
            max_new_tokens=NEW,
            do_sample=False,
            **inputs,
        )
        new_ids = theirs[0, len(ids) :].tolist()
        assert row.tolist() == new_ids + [hf_models.END_TOKEN] * (NEW - len(new_ids))
