"""A file of JSON is read as the form that is expected of it, or refused by its name; nothing else comes out of it."""

import json
import os
from contextlib import suppress
from typing import TypedDict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from repro.errors import InputError
from repro.json_files import Count, parse, read_json, read_lines


class Row(TypedDict):
    step: Count


BROKEN = [
    *(b"", b"[1", b"\xff", b"3", b"[]", b'{"step": "1"}', b'{"step": -1}', b'{"step": true}', b"{}", b"\0" * 20),
    *(b'{"step": 1e400}', b'{"step": ' + b"9" * 400 + b"}", b'{"step": ' + b"9" * 5000 + b"}", b"[" * 100_000),
]


@pytest.mark.parametrize("content", BROKEN, ids=range(len(BROKEN)))
def test_a_file_of_another_form_is_refused_by_name(tmp_path, content):
    file = tmp_path / "it.json"
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"it\.json: is damaged, or is not what its name says"):
        read_json(file, Row)
    assert read_lines(file, Row)[0] == []


def test_a_file_that_is_missing_irregular_or_larger_than_any_real_one_is_named(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "large").write_bytes(b"[" + b" " * 100)
    for name, reason in (
        ("absent", "is not there"),
        ("folder", "is damaged.*is a folder"),
        ("pipe", "is damaged.*is not a regular file"),
        ("large", "is damaged.*has 101 bytes; at most 100 are read"),
    ):
        for read in (read_json, read_lines):
            with pytest.raises(InputError, match=f"{name}: {reason}"):
                read(tmp_path / name, Row, largest=100)


def test_the_good_lines_are_given_and_the_bad_ones_counted(tmp_path):
    file = tmp_path / "it.jsonl"
    file.write_bytes(b'{"step": 1, "more": "x"}\n[]\n{"step": 2}\n{"st')
    assert read_lines(file, Row) == ([{"step": 1, "more": "x"}, {"step": 2}], 2)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**62), 2**62) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@settings(max_examples=50)
@given(VALUES)
def test_what_python_writes_is_read_as_it_was(value):
    assert parse(json.dumps(value)) == value


@given(st.binary(max_size=40) | st.text(max_size=40).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_bytes_of_any_kind_are_a_value_or_a_value_error(content):
    with suppress(ValueError):
        parse(content)
