"""Logits and greedy answers for a batch of prompts.

An answer takes one forward pass over the prompts (prefill), then one step per token with a
key/value cache.

Axes: B prompts, S positions of the longest prompt, N pictures per prompt, T new tokens, D width,
V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from mod_jax.batch import Array
from mod_jax.config import ModelConfig
from mod_jax.data.samples.tokenizer import text_encoder
from mod_jax.data.samples.tokens import chat_format, marked, tokenize_prompt
from mod_jax.models import llava
from mod_jax.sharding import row_ways

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prompts:
    """Prompts padded to one length, on the left so that they can be continued.

    Attributes:
      tokens: i32[B,S].
      segment_ids: i32[B,S], 1 for the tokens of a prompt, 0 for padding.
      picture_index: i32[B,S], as in Batch.
      images: u8[B,N,H,W,3].
    """

    tokens: Array
    segment_ids: Array
    picture_index: Array
    images: Array


def _positions(prompts: Prompts) -> jax.Array:
    """Rotary positions i32[B,S]; a prompt starts at 0, wherever its padding is."""
    return jnp.maximum(jnp.cumsum(prompts.segment_ids, 1) - 1, 0)


def _embedded(model: llava.Llava, prompts: Prompts) -> jax.Array:
    """Embedded tokens and pictures, f[B,S,D]."""
    return model.embed(prompts.tokens, prompts.picture_index, model.features(prompts.images))


@functools.partial(jax.jit, static_argnames="config")
def logits(config: ModelConfig, params: dict, prompts: Prompts) -> jax.Array:
    """Computes next-token logits f32[B,S,V] at every position.

    Those of padding are meaningless. Prompts may be padded on either side.
    """
    model = llava.bind(config, params)
    hidden, _ = model.language_model(
        _embedded(model, prompts),
        _positions(prompts),
        prompts.segment_ids,
        jnp.zeros_like(prompts.tokens),
    )
    return jnp.einsum("bsd,vd->bsv", hidden.astype(jnp.float32), llava.head(config, params))


@functools.partial(jax.jit, static_argnames=("config", "max_new_tokens"))
def generate(config: ModelConfig, params: dict, prompts: Prompts, max_new_tokens: int) -> jax.Array:
    """Decodes greedily until every row has ended or has `max_new_tokens` tokens.

    Returns:
      i32[B,T]. A row that has ended is filled up with `config.end_token_id`, whichever of
      `config.end_token_ids` ended it.
    """
    model = llava.bind(config, params)
    w_vd = llava.head(config, params)
    decoder = model.language_model
    rows, length = prompts.tokens.shape
    positions = _positions(prompts)
    hidden, _, cache = decoder(
        _embedded(model, prompts),
        positions,
        prompts.segment_ids,
        jnp.zeros_like(prompts.tokens),
        cache=length + max_new_tokens,
    )

    def best(hidden: jax.Array) -> jax.Array:
        """The token with the largest logit at the last position, i32[B].

        Logits that are not finite have none, and argmax would return token 0: the answer ends.
        """
        last = hidden[:, -1].astype(jnp.float32)
        logits = jnp.einsum("bd,vd->bv", last, w_vd)
        best = jnp.argmax(logits, -1).astype(jnp.int32)
        return jnp.where(jnp.isfinite(jnp.max(logits, -1)), best, config.end_token_id)

    def ends(token: jax.Array) -> jax.Array:
        """Whether each token is one that ends an answer, bool[B]."""
        return jnp.isin(token, jnp.array(config.end_token_ids))

    def is_unfinished(carry):
        step, _, ended, *_ = carry
        return (step < max_new_tokens) & ~jnp.all(ended)

    def advance(carry):
        step, token, ended, answer, cache = carry
        ended |= ends(token)
        answer = answer.at[:, step].set(jnp.where(ended, config.end_token_id, token))
        column = token[:, None]
        hidden, _, cache = decoder(
            decoder.embed(column),
            positions[:, -1:] + 1 + step,
            jnp.ones_like(column),  # segment_ids
            jnp.zeros_like(column),  # branch_ids
            cache=cache,
        )
        return step + 1, best(hidden), ended, answer, cache

    start = (
        jnp.zeros((), jnp.int32),
        best(hidden),
        jnp.zeros(rows, bool),
        jnp.full((rows, max_new_tokens), config.end_token_id, jnp.int32),
        cache,
    )
    _, _, _, answer, _ = jax.lax.while_loop(is_unfinished, advance, start)
    return answer


@dataclasses.dataclass(frozen=True)
class Question:
    """A question about any number of pictures.

    Attributes:
      text: The question, with `<image>` where each picture stands. Without any, the pictures come
        first.
      pictures: The pictures, u8[H,W,3] each.
    """

    text: str
    pictures: tuple[np.ndarray, ...]


def answer(
    config: ModelConfig,
    params: dict,
    tokenizer: "PreTrainedTokenizerFast",
    template: str,
    questions: Sequence[Question],
    rows: int = 64,
    max_new_tokens: int = 64,
) -> list[str]:
    """Answers independent questions greedily.

    Args:
      config: Configuration of the model.
      params: Name -> parameter.
      tokenizer: Tokenizer of the model.
      template: Name of the chat template that the model was trained with.
      questions: The questions.
      rows: Number of questions that are answered as one batch.
      max_new_tokens: Largest number of tokens of an answer.

    Raises:
      ConfigError: If there is no such template.
      ValueError: If the number of picture markers in a text is not the number of its pictures.
    """
    chat = chat_format(template, config, tokenizer)
    encoder = text_encoder(tokenizer)
    prompts = [
        tokenize_prompt(((marked(question.text, len(question.pictures)), None),), encoder, chat)
        for question in questions
    ]
    pictures = [question.pictures for question in questions]
    # All batches have the same shape, so that generate is compiled once. On a mesh their rows are
    # split over its devices; rows beyond the prompts are dropped.
    mesh = jax.sharding.get_abstract_mesh()
    ways = 1 if mesh.empty else row_ways(mesh)
    shape = (
        -(-min(rows, len(questions)) // ways) * ways,
        max(len(ids) for ids, _ in prompts),
        max(len(shown) for shown in pictures),
    )
    answers: list[str] = []
    for start in range(0, len(questions), rows):
        chosen = slice(start, start + rows)
        batch = left_pad(config, prompts[chosen], pictures[chosen], shape)
        ids = np.asarray(generate(config, params, batch, max_new_tokens))
        ids = ids[: len(prompts[chosen])]  # drops the rows without a prompt
        answers += tokenizer.batch_decode(ids, skip_special_tokens=True)
    return answers


def left_pad(
    config: ModelConfig,
    prompts: Sequence[tuple[np.ndarray, np.ndarray]],
    pictures: Sequence[Sequence[np.ndarray] | np.ndarray],
    shape: tuple[int, int, int] | None = None,
    multiple: int = 1,
) -> Prompts:
    """Pads prompts to one length.

    Args:
      config: Configuration of the model.
      prompts: (ids i32[S'], is_picture bool[S']) of each prompt.
      pictures: The pictures of each prompt, u8[H,W,3] each.
      shape: (B, S, N), the smallest that fits if None. A row without a prompt is one end token.
      multiple: S is rounded up to a multiple of this.
    """
    if shape is None:
        longest = max(len(ids) for ids, _ in prompts)
        most_pictures = max(len(shown) for shown in pictures)
        shape = (len(prompts), longest, most_pictures)
    rows, length, slots = shape
    length = -(-length // multiple) * multiple
    size = config.vision.image_size
    tokens = np.full((rows, length), config.end_token_id, np.int32)
    segment_ids = np.zeros((rows, length), np.int32)
    segment_ids[:, -1] = 1
    picture_index = np.full((rows, length), -1, np.int32)
    images = np.zeros((rows, slots, size, size, 3), np.uint8)
    for row, ((ids, is_picture), shown) in enumerate(zip(prompts, pictures)):
        start = length - len(ids)
        tokens[row, start:] = ids
        segment_ids[row, start:] = 1
        picture_index[row, start:] = np.where(is_picture, np.cumsum(is_picture) - 1, -1)
        if len(shown):
            images[row, : len(shown)] = shown
    return Prompts(tokens, segment_ids, picture_index, images)
