"""The oracle of conversations: the algorithm of LLaVA-MoD, read from its code (llavamod/data/data_utils.py, conversation.py, mm_utils.py at 82afd21).

A conversation is written as one string and tokenised, around its pictures, as a whole. Which tokens are answers is then found by splitting the string
into rounds and tokenising the parts of each again, to count. Where the counts do not add up, the sample is kept but nothing of it is learnt.
"""

import dataclasses
from collections.abc import Sequence

from transformers import PreTrainedTokenizerFast

IGNORED, PICTURE = -100, -200
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
ASKS, SAYS = "USER", "ASSISTANT"


@dataclasses.dataclass(frozen=True)
class Labelled:
    """Token ids, a picture as one PICTURE, and the labels: the ids of answers, else IGNORED."""

    ids: list[int]
    labels: list[int]


def write(turns: Sequence[tuple[str, str]], end: str) -> str:
    """The conversation as a string; an empty message is taken for one that is to come."""
    text = SYSTEM + " "
    for question, answer in turns:
        text += f"{ASKS}: {question} " if question else f"{ASKS}:"
        text += f"{SAYS}: {answer}{end}" if answer else f"{SAYS}:"
    return text


def ids_of(text: str, tokenizer: PreTrainedTokenizerFast, pictures: bool) -> list[int]:
    """Ids of a text; with pictures, each of its pieces is tokenised as a text of its own and only the first keeps its bos token."""
    if not pictures:
        return tokenizer(text).input_ids
    ids = []
    for number, piece in enumerate(text.split("<image>")):
        some = tokenizer(piece).input_ids
        begun = number > 0 and some[:1] == [tokenizer.bos_token_id]
        ids += [PICTURE] * (number > 0) + some[begun:]
    return ids


def label(
    turns: Sequence[tuple[str, str]],
    tokenizer: PreTrainedTokenizerFast,
    pictures: bool,
    longest: int = 10**9,
) -> Labelled:
    """A conversation with its labels.

    Args:
      turns: (question, answer) each.
      tokenizer: its end token ends answers. One that begins texts (bos) is counted by the rule of version v1, else by that of version qwen.
      pictures: whether the record has any; without, `<image>` is a word.
      longest: the most tokens, counted with a picture as one.
    """
    end, bos = tokenizer.eos_token, tokenizer.bos_token_id is not None
    count = lambda text: len(ids_of(text, tokenizer, pictures))
    text = write(turns, end)
    ids = ids_of(text, tokenizer, pictures)
    labels = ids.copy()
    done = int(bos)
    labels[:done] = [IGNORED] * done
    for part in text.split(end):
        asked, *answers = part.split(f" {SAYS}: ")
        if len(answers) != 1:  # so ends every conversation, in an empty part
            break
        length = count(part) + (not bos)  # the end token; a part's own bos token stands for it
        prompt = count(f"{asked} {SAYS}: ") - 1 - bos  # the last space begins the answer
        labels[done : done + prompt] = [IGNORED] * len(labels[done : done + prompt])
        done += length
    labels[done:] = [IGNORED] * len(labels[done:])
    if done < longest and done != len(ids):
        labels = [IGNORED] * len(ids)
    return Labelled(ids[:longest], labels[:longest])
