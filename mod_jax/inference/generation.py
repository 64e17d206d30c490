"""Prompts as a batch: their logits, and greedy answers by one prefill, then one position at a time over a key/value cache.

Axes: B prompts, S positions of the longest prompt, N pictures a prompt, T new tokens, D width, V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mod_jax.config import ModelConfig
from mod_jax.data.samples.tokenizer import text_encoder
from mod_jax.data.samples.tokens import chat_format, marked, tokenize_prompt
from mod_jax.models import llava


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prompts:
    """Prompts of one length, padded on the left to be continued.

    Attributes:
      tokens: i32[B,S].
      segment_ids: i32[B,S], 1 for a prompt's tokens, 0 for padding.
      picture_index: i32[B,S], as in Batch.
      images: u8[B,N,H,W,3].
    """

    tokens: jax.Array
    segment_ids: jax.Array
    picture_index: jax.Array
    images: jax.Array


def _positions(prompts: Prompts) -> jax.Array:
    """i32[B,S]: a prompt starts at 0, wherever its padding is."""
    return jnp.maximum(jnp.cumsum(prompts.segment_ids, 1) - 1, 0)


def _embedded(model: llava.Llava, prompts: Prompts) -> jax.Array:
    """f[B,S,D]."""
    return model.embed(prompts.tokens, prompts.picture_index, model.features(prompts.images))


@functools.partial(jax.jit, static_argnames="config")
def logits(config: ModelConfig, params: dict, prompts: Prompts) -> jax.Array:
    """Next-token logits f32[B,S,V] at every position; those of padding mean nothing. Prompts may be padded on either side."""
    model, branch = llava.bind(config, params), jnp.zeros_like(prompts.tokens)
    hidden, _ = model.language_model(
        _embedded(model, prompts), _positions(prompts), prompts.segment_ids, branch
    )
    return jnp.einsum("bsd,vd->bsv", hidden.astype(jnp.float32), llava.head(config, params))


@functools.partial(jax.jit, static_argnames=("config", "max_new_tokens"))
def generate(config: ModelConfig, params: dict, prompts: Prompts, max_new_tokens: int) -> jax.Array:
    """Greedy decoding, until every row has ended or `max_new_tokens` are there.

    Returns:
      i32[B,T]; from a row's end token on, end tokens.
    """
    model, w_vd = llava.bind(config, params), llava.head(config, params)
    rows, length = prompts.tokens.shape
    decoder, branch = model.language_model, jnp.zeros_like(prompts.tokens)
    positions, cache = _positions(prompts), decoder.new_cache(rows, length + max_new_tokens)
    hidden, _, cache = decoder(
        _embedded(model, prompts), positions, prompts.segment_ids, branch, cache=cache
    )

    def best(hidden):
        return jnp.argmax(
            jnp.einsum("bd,vd->bv", hidden[:, -1].astype(jnp.float32), w_vd), -1
        ).astype(jnp.int32)

    def going(carry):
        step, _, ended, *_ = carry
        return (step < max_new_tokens) & ~jnp.all(ended)

    def advance(carry):
        step, token, ended, answer, cache = carry
        ended |= token == config.end_token_id
        answer = answer.at[:, step].set(jnp.where(ended, config.end_token_id, token))
        column = token[:, None]
        one = jnp.ones_like(column)
        position = positions[:, -1:] + 1 + step
        hidden, _, cache = decoder(decoder.embed(column), position, one, 0 * one, cache=cache)
        return step + 1, best(hidden), ended, answer, cache

    answer = jnp.full((rows, max_new_tokens), config.end_token_id, jnp.int32)
    start = (jnp.zeros((), jnp.int32), best(hidden), jnp.zeros(rows, bool), answer, cache)
    return jax.lax.while_loop(going, advance, start)[3]


@dataclasses.dataclass(frozen=True)
class Question:
    """A question about any number of pictures.

    Attributes:
      text: with a `<image>` where each picture stands; without any, the pictures come first.
      pictures: u8[H,W,3] each.
    """

    text: str
    pictures: tuple[np.ndarray, ...]


def answer(
    config: ModelConfig,
    params: dict,
    tokenizer,
    template: str,
    questions: Sequence[Question],
    rows: int = 64,
    max_new_tokens: int = 64,
) -> list[str]:
    """Answers each question alone, greedily, `rows` at a time.

    Args:
      config, params: the model.
      tokenizer: of its folder.
      template: name of the chat template it was trained with.
    Raises:
      ConfigError: for an unknown template.
      ValueError: if a text has another number of picture markers than there are pictures.
    """
    chat, encoder = chat_format(template, config, tokenizer), text_encoder(tokenizer)
    prompts = [
        tokenize_prompt(((marked(question.text, len(question.pictures)), None),), encoder, chat)
        for question in questions
    ]
    pictures = [question.pictures for question in questions]
    shape = min(rows, len(questions)), max(len(ids) for ids, _ in prompts), max(map(len, pictures))
    texts = []
    for start in range(0, len(questions), rows):
        some = slice(start, start + rows)
        ids = np.asarray(
            generate(
                config,
                params,
                left_pad(config, prompts[some], pictures[some], shape),
                max_new_tokens,
            )
        )
        texts += tokenizer.batch_decode(ids[: len(prompts[some])], skip_special_tokens=True)
    return texts


def left_pad(
    config: ModelConfig,
    prompts,
    pictures,
    shape: tuple[int, int, int] | None = None,
    multiple: int = 1,
) -> Prompts:
    """Prompts of one length; rows without a prompt are one end token.

    Args:
      config: the model.
      prompts: (ids i32[S'], is_picture bool[S']) of each.
      pictures: u8[H,W,3] each, of each prompt.
      shape: (B, S, N); as small as it can be by default.
      multiple: S is padded to one of it.
    """
    rows, length, most = shape or (
        len(prompts),
        max(len(ids) for ids, _ in prompts),
        max(map(len, pictures)),
    )
    length = -(-length // multiple) * multiple
    tokens, segments, index = (
        np.full((rows, length), config.end_token_id, np.int32),
        np.zeros((rows, length), np.int32),
        np.full((rows, length), -1, np.int32),
    )
    segments[:, -1] = 1
    images = np.zeros((rows, most, config.vision.image_size, config.vision.image_size, 3), np.uint8)
    for row, ((ids, is_picture), shown) in enumerate(zip(prompts, pictures)):
        tokens[row, length - len(ids) :], segments[row, length - len(ids) :] = ids, 1
        index[row, length - len(ids) :] = np.where(is_picture, np.cumsum(is_picture) - 1, -1)
        images[row, : len(shown)] = shown if len(shown) else 0
    return Prompts(tokens, segments, index, images)
