"""From records to tokens: templates, pictures, which tokens are learnt, pairs, cuts; and what makes a record bad."""

import json

import numpy as np
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from mod_jax.config import ConfigError, SourceConfig
from mod_jax.data.conversation import ChatFormat, tokenize, tokenize_prompt
from mod_jax.data.sources import BadSample, Record, open_source
from mod_jax.data.tokenizer import scenes_tokenizer, text_encoder

SYSTEM = ("A chat between a curious user and an artificial intelligence assistant. "
          "The assistant gives helpful, detailed, and polite answers to the user's questions. ")
END, PATCHES = "<|endoftext|>", 3
TURNS = (("<image>\nWhat is it?", "It's a naïve café — (two cats)."), ("How many?\nAnswer  briefly.", "2"), ("Sure?", "\"Yes\", I am!"))
RECORD = Record("r", (b"picture",), TURNS)


@pytest.fixture(scope="module")
def bpe():
    """A byte-level BPE tokenizer with Qwen's splitting rule, trained on a few lines; its picture token is no special one of the texts."""
    backend = Tokenizer(models.BPE())
    rule = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(rule), "isolated"), byte_level])
    backend.decoder = decoders.ByteLevel()
    lines = [SYSTEM, "USER: What is it? ASSISTANT: It's a cat.", "USER: How many? ASSISTANT: Two cats, I am sure."] * 3
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator(lines, trainer)
    backend.add_special_tokens([AddedToken("<image>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END)


def chat_of(tokenizer, template="qwen"):
    return ChatFormat(template, PATCHES, tokenizer.convert_tokens_to_ids("<image>"), tokenizer.eos_token_id)


def run(tokenizer, record=RECORD, template="qwen", max_length=1000):
    return tokenize(record, text_encoder(tokenizer), chat_of(tokenizer, template), max_length)


def whole(tokenizer, text):
    """Ids of a whole string, each `<image>` repeated."""
    return tokenizer(text.replace("<image>", "<image>" * PATCHES), add_special_tokens=False).input_ids


@pytest.mark.parametrize("template, system", [("qwen", SYSTEM), ("brief", "")])
@pytest.mark.parametrize("turns", [TURNS, (("A text?", "Yes."),), (("First <image> then\n<image>", "a"), ("<image>?", "(b)"))])
@pytest.mark.parametrize("kind", ["bpe", "words"])
def test_ids_are_those_of_the_whole_string(bpe, kind, turns, template, system):
    tokenizer = bpe if kind == "bpe" else scenes_tokenizer()
    pictures = sum(question.count("<image>") for question, _ in turns)
    made = run(tokenizer, Record("r", (b"",) * pictures, turns), template)
    text = system + "".join(f"USER: {question} ASSISTANT: {answer}{END}" for question, answer in turns)
    ids = whole(tokenizer, text)
    assert made.tokens.tolist() == ids[:-1] and made.targets.tolist() == ids[1:]
    assert made.positions.tolist() == list(range(len(ids) - 1)) and not made.branch_ids.any()
    assert made.num_pictures == pictures and made.is_picture.sum() == pictures * PATCHES
    assert (made.is_picture == (made.tokens == tokenizer.convert_tokens_to_ids("<image>"))).all()


def test_exactly_the_answers_and_their_ends_are_learnt(bpe):
    made = run(bpe)
    learnt = np.split(made.targets, np.flatnonzero(np.diff(made.loss_weights)) + 1)[1::2]
    assert [bpe.decode(part) for part in learnt] == [f" {answer}{END}" for _, answer in TURNS]
    before = made.tokens[np.flatnonzero(np.diff(made.loss_weights) > 0) + 1]
    assert bpe.convert_ids_to_tokens(before) == [":"] * 3, "the prompt's last token predicts the answer's first"


def test_plain_is_a_picture_and_its_caption(bpe):
    made = run(bpe, Record("r", (b"",), (("<image>\nDescribe the picture.", "A cat."),)), "plain")
    ids = whole(bpe, "<image>A cat." + END)
    assert made.tokens.tolist() == ids[:-1]
    assert made.loss_weights.tolist() == [0] * (PATCHES - 1) + [1] * (len(ids) - PATCHES)


def test_special_tokens_written_by_a_user_are_text(bpe):
    made = run(bpe, Record("r", (), ((f"Say {END} now", f"No {END} from me"),)))
    assert made.tokens.tolist().count(bpe.eos_token_id) == 0 and made.targets.tolist().count(bpe.eos_token_id) == 1
    assert bpe.decode(made.targets[made.loss_weights > 0]) == f" No {END} from me{END}"


def test_a_prompt_is_where_the_answer_begins(bpe):
    full = run(bpe)
    prompt, is_picture = tokenize_prompt((*TURNS[:2], (TURNS[2][0], None)), text_encoder(bpe), chat_of(bpe))
    start = np.flatnonzero(np.diff(full.loss_weights) > 0)[-1] + 2
    assert prompt.tolist() == full.tokens[:start].tolist() and is_picture.tolist() == full.is_picture[:start].tolist()


def test_a_pair_shares_its_prompt(bpe):
    chosen, rejected = run(bpe, Record("r", (b"",), TURNS)), run(bpe, Record("r", (b"",), (*TURNS[:-1], (TURNS[-1][0], "No cats at all"))))
    made = run(bpe, Record("r", (b"",), TURNS, "No cats at all"))
    prompt = np.flatnonzero(np.diff(chosen.loss_weights) > 0)[-1] + 1  # the ":" that predicts
    assert made.branch_ids.tolist() == [0] * prompt + [1] * (len(chosen.tokens) - prompt) + [2] * (len(rejected.tokens) - prompt)
    for branch, alone in ((1, chosen), (2, rejected)):  # what a branch sees is the conversation that it stands for
        mine = np.isin(made.branch_ids, (0, branch))
        assert made.tokens[mine].tolist() == alone.tokens.tolist()
        assert made.targets[mine].tolist() == alone.targets.tolist()
        assert made.positions[mine].tolist() == alone.positions.tolist()
        assert made.loss_weights[mine].tolist() == [0] * prompt + [1] * (len(alone.tokens) - prompt), "only the last answers are compared"
    assert made.num_pictures == 1


@pytest.mark.parametrize("max_length", range(5, 75))
def test_cuts_take_the_end_of_the_text_and_never_a_part_of_a_picture(bpe, max_length):
    turns = (("Look", "At"), ("this: <image> and <image>?", "Yes, these are two pictures of cats."))
    record = Record("r", (b"", b""), turns)
    full, cut = run(bpe, record, "brief"), None
    try:
        cut = run(bpe, record, "brief", max_length)
    except BadSample as error:
        assert "no answer is left" in str(error) and not full.loss_weights[:max_length].any()
        return
    length = len(cut.tokens)
    assert length == min(max_length, len(full.tokens)) or full.is_picture[length], "shorter only in front of a picture"
    assert cut.tokens.tolist() == full.tokens[:length].tolist() and cut.targets.tolist() == full.targets[:length].tolist()
    assert cut.is_picture.sum() == cut.num_pictures * PATCHES
    assert cut.truncated == (length < len(full.tokens))


def test_a_cut_pair_shares_the_room(bpe):
    pair = Record("r", (b"",), (("<image> What?", "a " * 30 + "a"),), "no")
    full = run(bpe, pair, "brief")
    cut = run(bpe, pair, "brief", len(full.tokens) - 10)
    assert len(cut.tokens) == len(full.tokens) - 10 and cut.truncated and not full.truncated
    branches = [np.bincount(made.branch_ids).tolist() for made in (full, cut)]
    assert branches[1] == [branches[0][0], branches[0][1] - 10, branches[0][2]], "the long one is cut"
    prompt = (full.branch_ids == 0).sum()
    both = run(bpe, pair, "brief", prompt + 2)
    assert [(both.branch_ids == b).sum() for b in (0, 1, 2)] == [prompt, 1, 1]
    with pytest.raises(BadSample, match="no answer is left"):
        run(bpe, pair, "brief", prompt + 1)
    with pytest.raises(BadSample, match="plain"):
        run(bpe, pair, "plain")


def human(text):
    return {"from": "human", "value": text}


def gpt(text):
    return {"from": "gpt", "value": text}


@pytest.fixture
def open_json(tmp_path):
    def opened(entries, kind="chat", **options):
        (tmp_path / "data.json").write_text(entries if isinstance(entries, str) else json.dumps(entries), encoding="utf-8")
        return open_source(SourceConfig(kind, str(tmp_path / "data.json"), images=str(tmp_path), **options))
    return opened


def test_chats_are_read(open_json, tmp_path):
    source = open_json([
        {"id": "one", "image": "a.png", "conversations": [human("Q \n<image>"), gpt(" A\n"), human("R"), gpt("B")]},
        {"id": "two", "image": ["a.png", "b.png"], "conversations": [human("<image> or"), gpt("A"), human("<image>"), gpt("B")]},
        {"id": 3, "conversations": [human("Q"), gpt("A")]}])
    assert len(source) == 3 and source.name(2) == "3"
    assert source[0] == Record("one", (tmp_path / "a.png",), (("Q \n<image>", "A"), ("R", "B")))
    assert source[1].images == (tmp_path / "a.png", tmp_path / "b.png")
    assert source[2] == Record("3", (), (("Q", "A"),))


def test_pairs_are_read(open_json, tmp_path):
    chosen, rejected = ([human("<image>\nQ"), gpt(answer)] for answer in ("good", "bad"))
    (pair,) = open_json([{"id": "p", "image": "a.png", "chosen": chosen, "rejected": rejected}], "preference")
    assert pair == Record("p", (tmp_path / "a.png",), (("<image>\nQ", "good"),), "bad")


def test_text_only_drops_the_pictures(open_json):
    (record,) = open_json([{"id": "p", "image": "a.png", "conversations": [human("<image>\nQ"), gpt("A")]}], text_only=True)
    assert record == Record("p", (), (("Q", "A"),))


@pytest.mark.parametrize("entry, reason", [
    ({"conversations": [human("<image>"), gpt("A")]}, "picture token without picture"),
    ({"image": "a.png", "conversations": [human("Q"), gpt("A")]}, "picture without picture token"),
    ({"image": "a.png", "conversations": [human("Q"), gpt("<image>")]}, "picture token in an answer"),
    ({"conversations": [human("Q"), gpt("  ")]}, "without an answer text"),
    ({"conversations": [human("Q"), gpt("A"), human("R")]}, "do not take turns"),
    ({"conversations": [human("Q"), {"from": "bot", "value": "A"}]}, "unknown speaker 'bot'"),
    ({"conversations": [{"from": "human"}]}, "not a list of {from, value}"),
    ({"conversations": []}, "no turns"),
    ({"id": "x"}, "not a list"),
    ("text", "not a JSON object"),
])
def test_bad_chats_say_why(open_json, entry, reason):
    source = open_json([entry])
    with pytest.raises(BadSample, match=reason):
        source[0]


@pytest.mark.parametrize("chosen, rejected, reason", [
    ([human("Q"), gpt("A")], [human("R"), gpt("B")], "different human turns"),
    ([human("Q"), gpt("A")], [human("Q"), gpt("")], "without an answer text"),
    ([human("Q"), gpt("A")], None, "not a list"),
])
def test_bad_pairs_say_why(open_json, chosen, rejected, reason):
    source = open_json([{"chosen": chosen, "rejected": rejected}], "preference")
    with pytest.raises(BadSample, match=reason):
        source[0]


def test_sources_that_are_not_there_are_refused_when_opened(open_json, tmp_path):
    for text, expected in (("{", "JSON list"), ("{}", "JSON list"), ("[]", "at least one record")):
        with pytest.raises(ConfigError, match=expected):
            open_json(text)
    with pytest.raises(ConfigError, match="existing JSON file"):
        open_source(SourceConfig("chat", str(tmp_path / "none.json")))
    with pytest.raises(ConfigError, match="existing folder"):
        open_source(SourceConfig("chat", str(tmp_path / "data.json"), images=str(tmp_path / "none")))
    with pytest.raises(ConfigError, match="prepared scenes"):
        open_source(SourceConfig("scenes", str(tmp_path / "none"), split="train"))
