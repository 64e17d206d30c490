"""The scenes' word-level tokenizer, a byte-level one for smoke runs, loading of Hugging Face tokenizer folders, and text piece by piece."""

import copy
import dataclasses
import json
import pathlib

import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mod_jax.config import ConfigError, require
from mod_jax.data.scenes.chats import WORDS

END, IMAGE, UNKNOWN = "<|endoftext|>", "<image>", "<unk>"


def scenes_tokenizer() -> PreTrainedTokenizerFast:
    """Word-level tokenizer of everything the scenes say, in lower case; its size is a multiple of 16.

    `<|endoftext|>` (id 0) ends answers and pads, `<image>` is id 1, `<unk>` id 2. `save_pretrained(folder)` writes tokenizer.json and
    tokenizer_config.json, which load_tokenizer reads.
    """
    tokens = [END, IMAGE, UNKNOWN, "user", "assistant", *":.,?", *WORDS]
    tokens += [f"<unused_{i}>" for i in range(-len(tokens) % 16)]
    backend = Tokenizer(
        models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=UNKNOWN)
    )
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()]
    )
    backend.decoder = decoders.WordPiece(
        prefix="##", cleanup=True
    )  # joins with spaces, none before a comma
    backend.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in (END, IMAGE, UNKNOWN)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=END,
        pad_token=END,
        unk_token=UNKNOWN,
        extra_special_tokens={"image_token": IMAGE},
    )


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token a byte (ids 0 to 255), with Qwen's special ids: for runs with random weights and a vocabulary of Qwen's size."""
    alphabet = {
        character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))
    }
    backend = Tokenizer(models.BPE(alphabet | {END: 151643, IMAGE: 151646}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in (END, IMAGE)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=END,
        pad_token=END,
        extra_special_tokens={"image_token": IMAGE},
    )


# File -> class that reads a folder which has it; the first there is decides. tokenizer.json says everything itself, and is not left to AutoTokenizer:
# transformers 5 takes the class of config.json's model_type, which ignores the file's normalizer and pre-tokenizer.
WHOLE = "tokenizer.json"
READERS = {
    WHOLE: "PreTrainedTokenizerFast",
    "merges.txt": "Qwen2TokenizerFast",
    "tokenizer.model": "LlamaTokenizerFast",
}


def load_tokenizer(folder: str | pathlib.Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a Hugging Face model folder: tokenizer.json, or vocab.json with merges.txt (Qwen), or tokenizer.model (Llama, SentencePiece).

    One without `<image>`, as a plain language model's, gets it: a special token with the next free id. One without a token to pad with
    pads with its end token.
    Raises:
      ConfigError: if the folder holds none that can be read, or one that does not say how a text ends.
    """
    folder = pathlib.Path(folder)
    expected = f"a folder with {WHOLE}, with merges.txt and vocab.json, or with tokenizer.model"
    file = next((file for file in READERS if (folder / file).is_file()), None)
    require(file is not None, "tokenizer", str(folder), expected)
    try:
        tokenizer = _read(folder, file)
    except ConfigError:
        raise
    except Exception as error:  # the tokenizers package raises plain Exceptions
        raise ConfigError(
            f"tokenizer = {str(folder)!r}: expected {expected} ({' '.join(str(error).split())})."
        ) from error
    require(
        tokenizer.eos_token is not None,
        "eos_token",
        None,
        f"the token that ends an answer, in {folder / 'tokenizer_config.json'}",
    )
    if IMAGE not in tokenizer.get_added_vocab():
        tokenizer.add_tokens(
            [AddedToken(IMAGE, special=True, normalized=False)], special_tokens=True
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _read(folder: pathlib.Path, file: str) -> PreTrainedTokenizerFast:
    reader, path = getattr(transformers, READERS[file]), folder / "tokenizer_config.json"
    if file == WHOLE:
        return reader.from_pretrained(str(folder), local_files_only=True)
    said = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    declared = said.get("tokenizer_class") or READERS[file]
    # how a text is split is the class's, and in none of the files
    require(
        declared.removesuffix("Fast") == READERS[file].removesuffix("Fast"),
        "tokenizer_class",
        declared,
        f"{READERS[file]}, which reads {file}",
        f"Save it with its {WHOLE}.",
    )
    begins = (
        {"add_bos_token": True} if file == "tokenizer.model" and "add_bos_token" not in said else {}
    )  # Llama's default, which transformers 5 has lost
    tokenizer = reader.from_pretrained(str(folder), local_files_only=True, **begins)
    added = {
        token["content"]: int(number)
        for number, token in said.get("added_tokens_decoder", {}).items()
    }
    moved = {
        token: number
        for token, number in added.items()
        if tokenizer.convert_tokens_to_ids(token) != number
    }
    require(
        not moved,
        "added_tokens_decoder",
        moved,
        f"the ids that follow those of {file}'s vocabulary",
        f"Save it with its {WHOLE}.",
    )
    return tokenizer


@dataclasses.dataclass(frozen=True)
class TextEncoder:
    """Encodes a text in the pieces between its special tokens, to the ids that the tokenizer gives the whole string.

    Special tokens written in a piece are ordinary text, so that no user can forge one.

    Attributes:
      begin: ids that the tokenizer begins every text with (Llama: its bos token; Qwen: none).
      first: encodes the piece that a text begins with.
      later: encodes a piece behind a special token.
    """

    begin: tuple[int, ...]
    first: Tokenizer
    later: Tokenizer


def text_encoder(tokenizer: PreTrainedTokenizerFast) -> TextEncoder:
    """The encoder of a tokenizer's texts, made of copies of its backend.

    Raises:
      ConfigError: if the tokenizer ends every text with a token, so that nothing could be continued.
    """
    first = copy.deepcopy(tokenizer.backend_tokenizer)
    first.encode_special_tokens = True
    first.no_padding()
    first.no_truncation()
    whole, bare = (first.encode("a", add_special_tokens=added).ids for added in (True, False))
    begin = whole[: len(whole) - len(bare)]
    require(
        whole == begin + bare,
        "tokenizer",
        whole,
        f"{begin + bare}, a text without a token behind it",
        "Set add_eos_token to false.",
    )
    return TextEncoder(tuple(begin), first, _behind_a_token(first))


def _behind_a_token(first: Tokenizer) -> Tokenizer:
    """Itself, unless it takes the beginning of a text for that of a word."""
    if not _word_openers(first):
        return first
    later = copy.deepcopy(first)
    later.encode_special_tokens = first.encode_special_tokens  # which a copy does not keep
    for step in _word_openers(later):
        step.prepend_scheme = "never"
    return later


def _word_openers(encoder: Tokenizer) -> list[pre_tokenizers.Metaspace]:
    steps = encoder.pre_tokenizer
    steps = steps if isinstance(steps, pre_tokenizers.Sequence) else [steps]
    return [
        step
        for step in steps
        if isinstance(step, pre_tokenizers.Metaspace) and step.prepend_scheme == "first"
    ]
