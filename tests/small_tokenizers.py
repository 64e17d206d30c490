"""Tokenizers of the kinds that language models have, trained on a few sentences.

None of them has the token `<image>`; `load_tokenizer` adds it.
"""

import functools
import io
import json
import tempfile
from collections.abc import Callable

import sentencepiece
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from mod_jax.data.samples.tokenizer import load_tokenizer
from mod_jax.data.samples.tokens import TEMPLATES

LINES = [
    TEMPLATES["qwen"].system,
    "USER: What is it? ASSISTANT: It's a cat.",
    "USER: How many? ASSISTANT: Two cats, I am sure.",
] * 3
QWEN_SPLITS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_VOCABULARY, QWEN_SPECIALS = 151643, ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def _pieces(trainer: trainers.BpeTrainer, splitter) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Trains on LINES; returns the vocabulary and the merges."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = splitter
    backend.train_from_iterator(LINES, trainer)
    model = json.loads(backend.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]


def _special(backend: Tokenizer, *tokens: str) -> None:
    backend.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in tokens]
    )


@functools.cache
def qwen(vocabulary: int = 400) -> PreTrainedTokenizerFast:
    """Byte-level BPE with the splitting rule, the normalizer and the special tokens of Qwen2.

    The special tokens follow the vocabulary, which unused tokens fill up.

    Args:
      vocabulary: number of tokens before the special ones.
    """
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    splitter = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(QWEN_SPLITS), "isolated"), byte_level]
    )
    vocab, merges = _pieces(
        trainers.BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()),
        splitter,
    )
    unused = {f"<unused_{number}>": number for number in range(len(vocab), vocabulary)}
    backend = Tokenizer(models.BPE(vocab | unused, merges))
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = splitter
    backend.decoder = decoders.ByteLevel()
    _special(backend, *QWEN_SPECIALS)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )


@functools.cache
def qwen_instructed(vocabulary: int = 400) -> PreTrainedTokenizerFast:
    """`qwen` with <|im_end|> as its end token, as instruction-tuned Qwen models have it."""
    tokenizer = qwen.__wrapped__(vocabulary)
    tokenizer.eos_token = "<|im_end|>"
    return tokenizer


def _llama(normalizer, splitter) -> PreTrainedTokenizerFast:
    words = pre_tokenizers.Metaspace(prepend_scheme="always")
    vocab, merges = _pieces(
        trainers.BpeTrainer(vocab_size=500, special_tokens=["<unk>", "<s>", "</s>", *BYTES]), words
    )
    backend = Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    backend.normalizer = normalizer
    backend.pre_tokenizer = splitter
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    _special(backend, "<unk>", "<s>", "</s>")
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@functools.cache
def llama() -> PreTrainedTokenizerFast:
    """SentencePiece-like BPE as the folders of Llama 2 and Vicuna have it.

    It puts "▁", the mark of a word's beginning, before every text between special tokens. Encoded
    texts begin with <s>; there is no padding token.
    """
    return _llama(
        normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]), None
    )


@functools.cache
def llama_first() -> PreTrainedTokenizerFast:
    """`llama` as transformers 5 builds it (legacy=False): the mark only where a text begins."""
    return _llama(None, pre_tokenizers.Metaspace(prepend_scheme="first", split=False))


@functools.cache
def loaded(make: Callable[[], PreTrainedTokenizerFast]) -> PreTrainedTokenizerFast:
    """A tokenizer saved and loaded again by `load_tokenizer`, which adds `<image>`."""
    with tempfile.TemporaryDirectory() as folder:
        make().save_pretrained(folder)
        return load_tokenizer(folder)


@functools.cache
def sentencepiece_model() -> bytes:
    """The bytes of a tokenizer.model like Llama's: BPE with byte fallback, no normalisation."""
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES),
        model_writer=written,
        model_type="bpe",
        vocab_size=340,
        byte_fallback=True,
        minloglevel=2,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
    )
    return written.getvalue()
