"""The scenes' word-level tokenizer, a byte-level one for smoke runs, and loading of any Hugging Face tokenizer folder."""

import copy
import pathlib

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mod_jax.config import ConfigError, require
from mod_jax.data.scene_chats import WORDS

END, IMAGE, UNKNOWN = "<|endoftext|>", "<image>", "<unk>"


def scenes_tokenizer() -> PreTrainedTokenizerFast:
    """Word-level tokenizer of everything the scenes say, in lower case; its size is a multiple of 16.

    `<|endoftext|>` (id 0) ends answers and pads, `<image>` is id 1, `<unk>` id 2. `save_pretrained(folder)` writes tokenizer.json and
    tokenizer_config.json, which load_tokenizer reads.
    """
    tokens = [END, IMAGE, UNKNOWN, "user", "assistant", *":.,?", *WORDS]
    tokens += [f"<unused_{i}>" for i in range(-len(tokens) % 16)]
    backend = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=UNKNOWN))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    backend.decoder = decoders.WordPiece(prefix="##", cleanup=True)  # joins with spaces, none before a comma
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (END, IMAGE, UNKNOWN)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END, pad_token=END, unk_token=UNKNOWN,
                                   extra_special_tokens={"image_token": IMAGE})


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token a byte (ids 0 to 255), with Qwen's special ids: for runs with random weights and a vocabulary of Qwen's size."""
    alphabet = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(alphabet | {END: 151643, IMAGE: 151646}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (END, IMAGE)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END, pad_token=END, extra_special_tokens={"image_token": IMAGE})


def load_tokenizer(folder: str | pathlib.Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a Hugging Face model folder.

    Raises:
      ConfigError: if the folder holds none that can be read.
    """
    expected = "a folder with tokenizer.json and tokenizer_config.json"
    require(pathlib.Path(folder).is_dir(), "tokenizer", str(folder), expected)  # else taken for a name on a hub
    try:
        # not AutoTokenizer: transformers 5 takes the class of config.json's model_type and ignores tokenizer.json's normalizer and pre-tokenizer
        return PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError) as error:
        raise ConfigError(f"tokenizer = {str(folder)!r}: expected {expected} ({' '.join(str(error).split())}).") from error


def text_encoder(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """A copy of the tokenizer's backend to which special tokens written in a text are ordinary text, so that no user can forge one."""
    encoder = copy.deepcopy(tokenizer.backend_tokenizer)
    encoder.encode_special_tokens = True
    encoder.no_padding()
    encoder.no_truncation()
    return encoder
