"""Tokenizers: the scenes' own, a byte-level one for smoke runs, and those of Hugging Face folders.

`text_encoder` makes an encoder of any of them that tokenizes a text piece by piece.
"""

import copy
import dataclasses
import json
import os
import pathlib
from types import ModuleType
from typing import TYPE_CHECKING

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from mod_jax.config import ConfigError, require
from mod_jax.data.scenes.chats import WORDS
from mod_jax.data.sources.record import MARKER

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END = "<|endoftext|>"
UNKNOWN = "<unk>"


def _transformers() -> ModuleType:
    """Imports transformers, which takes about a second, when the first tokenizer is made."""
    # We use only its tokenizers; without this, it warns that models need PyTorch.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import transformers

    return transformers


def _add_special_tokens(backend: Tokenizer, *tokens: str) -> None:
    backend.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in tokens]
    )


def scenes_tokenizer() -> "PreTrainedTokenizerFast":
    """Makes a word-level tokenizer of all words that the scenes use, in lower case.

    `<|endoftext|>` (id 0) ends answers and fills padding, `<image>` has id 1 and `<unk>` id 2. The
    size of the vocabulary is a multiple of 16. `save_pretrained(folder)` writes tokenizer.json and
    tokenizer_config.json, which `load_tokenizer` reads.
    """
    tokens = [END, MARKER, UNKNOWN, "user", "assistant", *":.,?", *WORDS]
    tokens += [f"<unused_{i}>" for i in range(-len(tokens) % 16)]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()]
    )
    # Joins words with spaces, but puts none before punctuation.
    backend.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    _add_special_tokens(backend, END, MARKER, UNKNOWN)
    return _transformers().PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=END,
        pad_token=END,
        unk_token=UNKNOWN,
        extra_special_tokens={"image_token": MARKER},
    )


def byte_tokenizer() -> "PreTrainedTokenizerFast":
    """Makes a tokenizer with one token per byte (ids 0 to 255) and Qwen's ids of special tokens.

    It serves runs with random weights and a vocabulary of Qwen's size.
    """
    alphabet = {
        character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))
    }
    backend = Tokenizer(models.BPE(alphabet | {END: 151643, MARKER: 151646}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    _add_special_tokens(backend, END, MARKER)
    return _transformers().PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=END,
        pad_token=END,
        extra_special_tokens={"image_token": MARKER},
    )


# The first of these files that a folder has decides which class reads it. tokenizer.json describes
# a tokenizer completely. AutoTokenizer must not read it: transformers 5 then takes the class of
# config.json's model_type, which ignores the file's normalizer and pre-tokenizer.
COMPLETE = "tokenizer.json"
READERS = {
    COMPLETE: "PreTrainedTokenizerFast",
    "merges.txt": "Qwen2TokenizerFast",
    "tokenizer.model": "LlamaTokenizerFast",
}


def load_tokenizer(folder: str | pathlib.Path) -> "PreTrainedTokenizerFast":
    """Loads the tokenizer of a Hugging Face model folder.

    A tokenizer without `<image>`, such as that of a plain language model, gets it as a special
    token with the next free id. One without a padding token pads with its end token.

    Args:
      folder: A folder with tokenizer.json, with vocab.json and merges.txt (Qwen), or with
        tokenizer.model (Llama, SentencePiece).
    Raises:
      ConfigError: If the folder has none of these files, or if they cannot be read or do not name
        the token that ends a text.
    """
    folder = pathlib.Path(folder)
    expected = f"a folder with {COMPLETE}, with merges.txt and vocab.json, or with tokenizer.model"
    files = [file for file in READERS if (folder / file).is_file()]
    require(len(files) > 0, "tokenizer", str(folder), expected)
    try:
        tokenizer = _read(folder, files[0])
    except ConfigError:
        raise
    except Exception as error:  # the tokenizers package raises plain Exceptions
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"tokenizer = {str(folder)!r}: expected {expected} ({reason})."
        ) from error
    require(
        tokenizer.eos_token is not None,
        "eos_token",
        None,
        f"the token that ends an answer, in {folder / 'tokenizer_config.json'}",
    )
    if MARKER not in tokenizer.get_added_vocab():
        marker = AddedToken(MARKER, special=True, normalized=False)
        tokenizer.add_tokens([marker], special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _read(folder: pathlib.Path, file: str) -> "PreTrainedTokenizerFast":
    reader = getattr(_transformers(), READERS[file])
    if file == COMPLETE:
        return reader.from_pretrained(str(folder), local_files_only=True)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    declared = config.get("tokenizer_class") or READERS[file]
    # The rule that splits a text is part of the class and in none of these files, so another class
    # would need its own reader.
    require(
        declared.removesuffix("Fast") == READERS[file].removesuffix("Fast"),
        "tokenizer_class",
        declared,
        f"{READERS[file]}, which reads {file}",
        f"Save the tokenizer with its {COMPLETE}.",
    )
    options = {}
    if file == "tokenizer.model" and "add_bos_token" not in config:
        options["add_bos_token"] = True  # Llama's default, which transformers 5 has dropped
    tokenizer = reader.from_pretrained(str(folder), local_files_only=True, **options)
    declared_ids = {
        token["content"]: int(number)
        for number, token in config.get("added_tokens_decoder", {}).items()
    }
    moved = {
        token: number
        for token, number in declared_ids.items()
        if tokenizer.convert_tokens_to_ids(token) != number
    }
    require(
        not moved,
        "added_tokens_decoder",
        moved,
        f"the ids that follow those of {file}'s vocabulary",
        f"Save the tokenizer with its {COMPLETE}.",
    )
    return tokenizer


@dataclasses.dataclass(frozen=True)
class TextEncoder:
    """Encodes a text in pieces, split at its special tokens and pictures.

    The ids are those that the tokenizer gives to the whole string. Special tokens that are written
    in a piece are ordinary text, so no user can forge one.

    Attributes:
      begin: Ids with which the tokenizer begins every text (Llama: its bos token; Qwen: none).
      first: Encodes the piece with which a text begins.
      later: Encodes a piece that follows a special token or a picture.
    """

    begin: tuple[int, ...]
    first: Tokenizer
    later: Tokenizer

    def special_id(self, token: str) -> int:
        """Returns the id of a special token.

        Raises:
          KeyError: If the tokenizer does not have it.
        """
        number = self.first.token_to_id(token)
        if number is None:
            raise KeyError(token)
        return number


def text_encoder(tokenizer: "PreTrainedTokenizerFast") -> TextEncoder:
    """Makes the encoder of a tokenizer, from copies of its backend.

    Raises:
      ConfigError: If the tokenizer ends every text with a special token, so that no prompt could
        be continued.
    """
    first = copy.deepcopy(tokenizer.backend_tokenizer)
    first.encode_special_tokens = True
    first.no_padding()
    first.no_truncation()
    whole = first.encode("a", add_special_tokens=True).ids
    bare = first.encode("a", add_special_tokens=False).ids
    begin = whole[: len(whole) - len(bare)]
    require(
        whole == begin + bare,
        "the tokenizer's ids of 'a'",
        whole,
        f"{bare} at the end, without a special token after the text",
        "Set add_eos_token to false in tokenizer_config.json.",
    )
    return TextEncoder(tuple(begin), first, _after_special_token(first))


def _after_special_token(first: Tokenizer) -> Tokenizer:
    """Returns an encoder for the pieces after the first.

    It is `first` itself unless the tokenizer puts a word mark at the beginning of a text, and only
    there (newer Llama tokenizers do). Later pieces are not beginnings, so they must not get it.
    """
    if not _beginning_markers(first):
        return first
    later = copy.deepcopy(first)
    later.encode_special_tokens = first.encode_special_tokens  # the copy does not keep it
    for step in _beginning_markers(later):
        step.prepend_scheme = "never"
    return later


def _beginning_markers(encoder: Tokenizer) -> list[pre_tokenizers.Metaspace]:
    """Returns the pre-tokenizers that put a word mark before a text's first word only."""
    pre_tokenizer = encoder.pre_tokenizer
    is_sequence = isinstance(pre_tokenizer, pre_tokenizers.Sequence)
    steps = iter(pre_tokenizer) if is_sequence else [pre_tokenizer]
    return [
        step
        for step in steps
        if isinstance(step, pre_tokenizers.Metaspace) and step.prepend_scheme == "first"
    ]
