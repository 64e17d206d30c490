"""Offsets of the records in a JSON list or JSON Lines, against json.loads of the whole text."""

import itertools
import json
import pathlib
import tracemalloc

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mod_jax.config import ConfigError
from mod_jax.data.sources.json_offsets import SEPARATORS, index_records

# Includes surrogates, which json writes as escapes.
TEXT = st.text(st.one_of(st.sampled_from('[]{},:"\\ \n\t'), st.characters()))
VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=12,
)
RECORDS = st.lists(VALUE, min_size=1, max_size=6)
EXAMPLES = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def parts(path: pathlib.Path, **options) -> list[str]:
    """Cuts the file into the texts of its records, by the index."""
    offsets = index_records(path, **options)
    data = path.read_bytes()
    return [
        data[start:end].strip(SEPARATORS).decode() for start, end in itertools.pairwise(offsets)
    ]


def same(a, b) -> bool:
    return json.dumps(a) == json.dumps(b)  # as texts, NaN equals NaN


def encoded(value, plain: bool, **options) -> str:
    text = json.dumps(value, ensure_ascii=not plain, **options)
    # An unpaired surrogate cannot be written as UTF-8 unless it is escaped.
    return text.encode("utf-8", "replace").decode()


@EXAMPLES
@given(
    RECORDS,
    st.integers(1, 40),
    st.sampled_from([None, 0, 3]),
    st.booleans(),
    st.text(" \n\r\t", max_size=5),
)
def test_a_list_is_cut_into_its_elements_whatever_the_window(
    tmp_path, records, window, indent, plain, space
):
    path = tmp_path / "list.json"
    text = encoded(records, plain, indent=indent)
    path.write_bytes((space + text + space).encode())
    assert same([json.loads(part) for part in parts(path, window=window)], json.loads(text))


@EXAMPLES
@given(
    RECORDS.filter(lambda records: not isinstance(records[0], list)),
    st.booleans(),
    st.sampled_from(["\n", "\r\n", "\n \n\n"]),
    st.booleans(),
)
def test_lines_are_cut_into_records_and_blank_ones_are_none(tmp_path, records, plain, gap, ends):
    path = tmp_path / "lines.jsonl"
    texts = [encoded(record, plain) for record in records]
    path.write_bytes((gap.join(texts) + gap * ends).encode())
    assert parts(path) == texts


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "A.JSONL", "a.NdJson", "a.JSON"])
@pytest.mark.parametrize("window", [1, 4096])
def test_a_byte_order_mark_is_skipped_and_suffixes_have_no_case(tmp_path, name, window):
    records = [{"id": "ü"}, {"id": 2}]
    is_lines = name.lower() != "a.json"
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    text = "\n".join(lines) if is_lines else json.dumps(records, ensure_ascii=False)
    for encoding in ("utf-8-sig", "utf-8"):
        (tmp_path / name).write_text(text, encoding=encoding)
        found = [json.loads(part) for part in parts(tmp_path / name, window=window)]
        assert found == records


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be"])
def test_utf_16_is_refused_as_that(tmp_path, name, encoding):
    (tmp_path / name).write_text("\ufeff" + "[{}]", encoding=encoding)
    refused(tmp_path / name, "the text is UTF-16, expected UTF-8")


def refused(path: pathlib.Path, message: str, **options) -> None:
    with pytest.raises(ConfigError, match=message):
        index_records(path, **options)


@pytest.mark.parametrize("window", [1, 16, 4096])
def test_a_list_cut_anywhere_is_refused_with_the_number_of_whole_records(tmp_path, window):
    path = tmp_path / "list.json"
    texts = ['{"id": "a]", "n": [1, {}]}', "-12.5e3", '"\\u00e9 \\" ü"', "[true, null]"]
    data = ("[" + ",\n".join(texts) + "]").encode()
    ends = [len(("[" + ",\n".join(texts[: n + 1])).encode()) for n in range(4)]
    for cut in range(len(data)):
        path.write_bytes(data[:cut])
        # The beginning of the second record, a number, is a number too.
        whole = sum(end <= cut for end in ends) + (ends[0] + 3 < cut < ends[1])
        refused(path, rf"{whole} records are complete; .* of {cut}: ", window=window)


def test_lines_cut_within_the_last_record_are_refused(tmp_path):
    path = tmp_path / "lines.jsonl"
    data = '{"id": 1}\n{"id": 2}\n{"id": "ü"}'.encode()
    for cut in range(21, len(data)):
        path.write_bytes(data[:cut])
        message = (
            rf"2 records are complete; the text from byte 20 on is invalid at byte \d+ of {cut}: "
        )
        refused(path, message)


@pytest.mark.parametrize("name, text, message", [
    ("a.json", "", "0 records are complete; .*the file is empty"),
    ("a.json", " \n", "at byte 2 of 2: the file is empty"),
    ("a.jsonl", "\n \n", "the file is empty"),
    ("a.json", "[ ]", "the list is empty"),
    ("a.json", '{"a": 1}', r"named \.jsonl .* at byte 0 of 8: a list begins with '\[', found '{'"),
    ("a.json", "[1, 2] 3", "2 records are complete; .* at byte 7 of 8: found '3' after the list"),
    ("a.json", "[1, 2}",
     r"2 records are complete; .* at byte 5 of 6: expected ',' or '\]', found '}'"),
    ("a.json", "[1, 2", "2 records are complete; .* at byte 5 of 5: the file ends before its list"),
    ("a.json", "[1, 2,]", "2 records are complete; the text from byte 6 on"),
    ("a.json", '[1, {"a" 2}]',
     ("1 records are complete; the text from byte 4 on is invalid at byte 9 of 12: "
      "Expecting ':' delimiter")),
    ("a.json", "[1, " + "[" * 100_000, "1 records are complete; .*nested too deeply"),
    ("a.jsonl", '{"a": ' + "[" * 100_000, "0 records are complete; .*nested too deeply"),
    ("a.jsonl", '[\n{"a": 1}\n]', "at byte 0 of 12: a list, where each line has to hold"),
    ("a.jsonl", '[{"a": 1}, {"a": 2}]', "a list, .*; name a list .json"),
    ("A.JSONL", ' [{"a": 1}]', "at byte 0 of 11: a list"),
    ("a.json", '\ufeff{"a": 1}', "at byte 3 of 11: a list begins with"),
    ("a.jsonl", "{}\n{}\ngarbage", "2 records are complete; the text from byte 6 on"),
])  # fmt: skip
def test_other_forms_are_refused_with_the_place(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    refused(tmp_path / name, message)


def test_a_record_without_an_end_is_not_searched_for_ever(tmp_path):
    (tmp_path / "a.json").write_text('[1, "' + "x" * 5000 + '"]')
    refused(
        tmp_path / "a.json",
        "1 records are complete; the text from byte 4 on .*Unterminated string",
        window=64,
        longest=1024,
    )
    assert len(parts(tmp_path / "a.json", window=64, longest=8192)) == 2


def test_the_file_is_not_held(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"text": "x" * 1000}] * 4000))
    tracemalloc.start()
    offsets = index_records(path, window=1 << 16)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(offsets) == 4001 and peak < 400_000 < path.stat().st_size / 8
