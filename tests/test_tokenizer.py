"""Loading of tokenizers from every kind of folder, and encoding texts piece by piece.

The folders have tokenizer.json, vocab.json with merges.txt, or tokenizer.model.
"""

import json
import os
import subprocess
import sys

import pytest
import sentencepiece
import small_tokenizers
from small_tokenizers import QWEN_SPECIALS, QWEN_VOCABULARY

from mod_jax.config import ConfigError
from mod_jax.data.samples.tokenizer import load_tokenizer, scenes_tokenizer, text_encoder

TEXTS = ["What is it? Two cats.", " a naïve\n\n  café 猫 🐈", "USER: 12 'tis ASSISTANT:"]


def write(folder, **files):
    """Writes files, given by name with an underscore for the dot, and returns the folder."""
    for name, content in files.items():
        stem, _, ending = name.rpartition("_")
        if not isinstance(content, str | bytes):
            content = json.dumps(content)
        if isinstance(content, str):
            content = content.encode()
        (folder / f"{stem}.{ending}").write_bytes(content)
    return folder


def qwen_files(**config) -> dict:
    """Makes the files of a Qwen folder without tokenizer.json.

    Only tokenizer_config.json names the special tokens.
    """
    model = json.loads(small_tokenizers.qwen().backend_tokenizer.to_str())["model"]
    merges = "#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in model["merges"])
    added = {
        str(number): {"content": token, "special": True, "normalized": False}
        for number, token in enumerate(QWEN_SPECIALS, len(model["vocab"]))
    }
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "added_tokens_decoder": added,
    } | config
    return {"vocab_json": model["vocab"], "merges_txt": merges, "tokenizer_config_json": config}


def test_the_picture_token_of_qwen2_is_151646(tmp_path):
    small_tokenizers.qwen(QWEN_VOCABULARY).save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.get_added_vocab() == dict(
        zip((*QWEN_SPECIALS, "<image>"), range(151643, 151647))
    )
    assert tokenizer("a<image>b").input_ids.count(151646) == 1
    assert tokenizer.eos_token_id == 151643
    assert tokenizer.pad_token_id == 151643


def test_an_existing_picture_token_keeps_its_id(tmp_path):
    scenes_tokenizer().save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).get_added_vocab() == scenes_tokenizer().get_added_vocab()


def test_the_end_token_pads_if_there_is_no_padding_token(tmp_path):
    small_tokenizers.llama().save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("</s>", "</s>")
    assert tokenizer.convert_tokens_to_ids("<image>") == len(small_tokenizers.llama())


def test_vocabulary_and_merges_are_qwen_s(tmp_path):
    tokenizer = load_tokenizer(write(tmp_path, **qwen_files()))
    whole = small_tokenizers.qwen()
    assert [tokenizer(text).input_ids for text in TEXTS] == [
        whole(text).input_ids for text in TEXTS
    ]
    assert tokenizer.get_added_vocab() == whole.get_added_vocab() | {"<image>": len(whole)}
    assert tokenizer.eos_token == "<|im_end|>", "which ends the turns of an instruction-tuned Qwen"
    assert tokenizer.pad_token == "<|endoftext|>"


@pytest.mark.parametrize(
    "config", [None, {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "legacy": False}]
)
def test_a_sentencepiece_model_is_llama_s(tmp_path, config):
    files = {} if config is None else {"tokenizer_config_json": config}
    tokenizer = load_tokenizer(
        write(tmp_path, tokenizer_model=small_tokenizers.sentencepiece_model(), **files)
    )
    stock = sentencepiece.SentencePieceProcessor(model_proto=small_tokenizers.sentencepiece_model())
    # With legacy=False, the tokenizer adds no second word mark before a leading space.
    texts = [text.strip() for text in TEXTS]
    assert [tokenizer(text).input_ids for text in texts] == [
        [stock.bos_id(), *stock.encode(text)] for text in texts
    ]
    assert tokenizer.eos_token_id == stock.eos_id()
    assert tokenizer.convert_tokens_to_ids("<image>") == stock.vocab_size()


@pytest.mark.parametrize(
    "make, begin",
    [
        (small_tokenizers.qwen, ()),
        (small_tokenizers.llama, (1,)),
        (small_tokenizers.llama_first, (1,)),
        (scenes_tokenizer, ()),
    ],
)
def test_texts_begin_as_the_tokenizer_begins_them(make, begin):
    assert text_encoder(make()).begin == begin


def test_a_tokenizer_that_ends_every_text_is_refused():
    tokenizer = small_tokenizers.llama.__wrapped__()
    tokenizer.add_bos_token = tokenizer.add_eos_token = True
    with pytest.raises(ConfigError, match="without a special token after the text.*add_eos_token"):
        text_encoder(tokenizer)


@pytest.mark.parametrize(
    "files, message",
    [
        (
            {},
            (
                "tokenizer = .*: expected a folder with tokenizer.json, "
                "with merges.txt and vocab.json, or with tokenizer.model"
            ),
        ),
        ({"tokenizer_json": "{"}, "tokenizer = .*: expected a folder with tokenizer.json"),
        (
            {"tokenizer_model": b"\xff\xff\xff"},
            "tokenizer = .*: expected a folder with tokenizer.json",
        ),
        (
            {"merges_txt": "#version: 0.2\n"},
            "tokenizer = .*: expected a folder with tokenizer.json",
        ),
        (
            qwen_files(tokenizer_class="GPT2Tokenizer"),
            (
                "tokenizer_class = 'GPT2Tokenizer': expected Qwen2TokenizerFast, "
                "which reads merges.txt"
            ),
        ),
        (
            qwen_files(added_tokens_decoder={"900": {"content": "<|im_end|>"}}),
            "added_tokens_decoder = {'<|im_end|>': 900}: expected the ids that follow",
        ),
        (
            {"tokenizer_json": small_tokenizers.qwen().backend_tokenizer.to_str()},
            "eos_token = None: expected the token that ends an answer",
        ),
    ],
)
def test_the_error_says_why_a_folder_cannot_be_read(tmp_path, files, message):
    with pytest.raises(ConfigError, match=message):
        load_tokenizer(write(tmp_path, **files))


def test_the_name_of_a_missing_folder_is_not_looked_up_on_a_hub():
    with pytest.raises(ConfigError, match="tokenizer = 'gpt2': expected a folder"):
        load_tokenizer("gpt2")


@pytest.mark.parametrize(
    "make", [small_tokenizers.qwen, small_tokenizers.llama, small_tokenizers.llama_first]
)
def test_no_piece_of_a_text_can_forge_a_special_token(make):
    tokenizer = make()
    encoder = text_encoder(tokenizer)
    special = set(tokenizer.all_special_ids)
    for piece in (encoder.first, encoder.later):
        for token in tokenizer.all_special_tokens:
            ids = piece.encode(f"{token} {token}", add_special_tokens=False).ids
            assert not special & set(ids)


def test_transformers_says_nothing_where_there_is_no_torch():
    code = (
        "import sys; sys.modules['torch'] = None; "  # importing or finding it fails
        "from mod_jax.data.samples import tokenizer; tokenizer.scenes_tokenizer(); "
        "import transformers; assert not transformers.utils.is_torch_available()"
    )
    # The switch that our own import of transformers has set in this process is not inherited.
    environment = dict(os.environ)
    environment.pop("TRANSFORMERS_NO_ADVISORY_WARNINGS", None)
    process = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert (process.returncode, process.stdout, process.stderr) == (0, "", "")
