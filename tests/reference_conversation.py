"""Oracle for conversations: LLaVA-MoD's algorithm, written down from its code.

The code is llavamod/data/data_utils.py, conversation.py and mm_utils.py at commit 82afd21.

A conversation is written as one string and tokenized as a whole, split at its pictures only. To
find the answer tokens, the string is then split into rounds, and the parts of each round are
tokenized again and counted. If the counts do not add up, the sample is kept, but nothing of it is
learnt.
"""

import dataclasses
from collections.abc import Sequence

from transformers import PreTrainedTokenizerFast

IGNORED = -100  # label of a token that is not learnt
PICTURE = -200  # id that stands for a picture
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
USER = "USER"
ASSISTANT = "ASSISTANT"


@dataclasses.dataclass(frozen=True)
class Labelled:
    """Tokens with labels.

    Attributes:
      ids: Token ids; each picture is a single PICTURE.
      labels: The ids of answer tokens, IGNORED elsewhere.
    """

    ids: list[int]
    labels: list[int]


def write(turns: Sequence[tuple[str, str]], end: str) -> str:
    """Writes the conversation as a string. An empty message counts as one that is still to come."""
    text = SYSTEM + " "
    for question, answer in turns:
        text += f"{USER}: {question} " if question else f"{USER}:"
        text += f"{ASSISTANT}: {answer}{end}" if answer else f"{ASSISTANT}:"
    return text


def ids_of(text: str, tokenizer: PreTrainedTokenizerFast, pictures: bool) -> list[int]:
    """Tokenizes a text.

    With pictures, each piece between them is tokenized as a text of its own, and only the first
    piece keeps its bos token.
    """
    if not pictures:
        return tokenizer(text).input_ids
    ids = []
    for number, piece in enumerate(text.split("<image>")):
        piece_ids = tokenizer(piece).input_ids
        if number > 0:
            ids.append(PICTURE)
            if piece_ids[:1] == [tokenizer.bos_token_id]:
                piece_ids = piece_ids[1:]
        ids += piece_ids
    return ids


def label(
    turns: Sequence[tuple[str, str]],
    tokenizer: PreTrainedTokenizerFast,
    pictures: bool,
    max_length: int = 10**9,
) -> Labelled:
    """Tokenizes a conversation and labels its answers.

    Args:
      turns: (question, answer) of each turn.
      tokenizer: Its end token ends answers. If it begins texts with a bos token, the reference's
        counting rule for version "v1" applies, otherwise the rule for version "qwen".
      pictures: Whether the record has pictures. If not, `<image>` is ordinary text.
      max_length: Largest number of tokens, where a picture counts as one.
    """
    end = tokenizer.eos_token
    has_bos = tokenizer.bos_token_id is not None

    def count(text: str) -> int:
        return len(ids_of(text, tokenizer, pictures))

    text = write(turns, end)
    ids = ids_of(text, tokenizer, pictures)
    labels = ids.copy()
    done = int(has_bos)
    labels[:done] = [IGNORED] * done
    for part in text.split(end):
        asked, *answers = part.split(f" {ASSISTANT}: ")
        if len(answers) != 1:  # the empty part at the end of every conversation
            break
        length = count(part) + (not has_bos)  # the end token; a part's own bos token stands for it
        prompt = count(f"{asked} {ASSISTANT}: ") - 1 - has_bos  # the last space begins the answer
        labels[done : done + prompt] = [IGNORED] * len(labels[done : done + prompt])
        done += length
    labels[done:] = [IGNORED] * len(labels[done:])
    if done < max_length and done != len(ids):
        labels = [IGNORED] * len(ids)
    return Labelled(ids[:max_length], labels[:max_length])
