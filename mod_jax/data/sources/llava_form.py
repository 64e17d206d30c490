"""The forms in which the LLaVA family of data sets writes a conversation or a preference pair: dicts of texts, whatever file they come from.

- chat: {conversations: [{from: human | gpt, value}, ...]}
- pair: {chosen: [{from, value}, ...], rejected: [...]}, the same but for the last answer
- plain pair: {question, chosen, rejected}, texts (RLAIF-V's)
"""

from collections.abc import Sequence

from mod_jax.data.sources.record import MARKER, BadSample

Turns = tuple[tuple[str, str], ...]


def parse_turns(messages: Sequence[dict]) -> Turns:
    """(question, answer) pairs of LLaVA messages {from: human | gpt, value}; outer white space is dropped.

    Raises:
      BadSample: if human and gpt do not alternate, or a message is no such thing.
    """
    try:
        roles, texts = [m["from"] for m in messages], [m["value"].strip() for m in messages]
    except (TypeError, KeyError, AttributeError):
        raise BadSample("conversation is not a list of {from, value}") from None
    unknown = [role for role in roles if role not in ("human", "gpt")]
    if unknown:
        raise BadSample(f"unknown speaker {unknown[0]!r}, expected human or gpt")
    if roles != ["human", "gpt"] * (len(roles) // 2):
        raise BadSample("human and gpt do not take turns")
    return tuple(zip(texts[::2], texts[1::2]))


def read_chat(entry: dict, pictures: int) -> tuple[Turns, str]:
    """Turns of a chat, and no rejected answer.

    Raises:
      BadSample: if it is none.
    """
    return parse_turns(entry.get("conversations")), ""


def read_pair(entry: dict, pictures: int) -> tuple[Turns, str]:
    """Turns of a pair, the last answer being the chosen one, and the rejected last answer.

    Args:
      entry: a pair or a plain pair.
      pictures: it has. A plain pair's question without markers gets them in front, a line each, as the reference puts them.
    Raises:
      BadSample: if the two differ in more than their last answer, or not even in that, or it is no pair.
    """
    if "question" in entry:
        return _read_plain(entry, pictures)
    chosen, rejected = parse_turns(entry.get("chosen")), parse_turns(entry.get("rejected"))
    if not chosen or not rejected or not rejected[-1][1]:
        raise BadSample("chosen or rejected without an answer text")
    if (chosen[:-1], chosen[-1][0]) != (rejected[:-1], rejected[-1][0]):
        raise BadSample("chosen and rejected have different human turns")
    return chosen, rejected[-1][1]


def _read_plain(entry: dict, pictures: int) -> tuple[Turns, str]:
    try:
        question, chosen, rejected = (
            entry[key].strip() for key in ("question", "chosen", "rejected")
        )
    except (KeyError, AttributeError):
        raise BadSample("question, chosen and rejected are not three texts") from None
    if not chosen or not rejected:
        raise BadSample("chosen or rejected without an answer text")
    return (
        (question if MARKER in question else (MARKER + "\n") * pictures + question, chosen),
    ), rejected
