"""Small JSON files from elsewhere: one sentence for all that can be wrong with one."""

import json
import os

import pytest

from qsae_kit.io.jsonfiles import NESTING_LIMIT, lines_of, parse_json, read_json, read_text

LIMIT = 200_000


def test_what_json_holds_is_given(tmp_path):
    held = {"a": [1, 2.5, None, True, "ü\u2028"], "b": {"c": "d"}, "e": float("inf")}
    path = tmp_path / "a.json"
    path.write_text(json.dumps(held, ensure_ascii=False), encoding="utf-8")
    assert read_json(path, "a table", LIMIT) == read_json(path, "a table") == held
    deepest = "[" * NESTING_LIMIT + "]" * NESTING_LIMIT
    assert json.dumps(parse_json(deepest, "it")) == deepest
    wide = [[]] * (2 * NESTING_LIMIT)
    assert parse_json(json.dumps(wide), "it") == wide


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"^it is not JSON \(.* at line 1, column 2\); correct it or get it again\.$"),
        ("", "line 1, column 1"),
        ('{"a": 1}\n{', "Extra data at line 2"),
        ("[" * 101 + "]" * 101, r"\(it is nested deeper than 100\)"),
        ("[" * 100_000, "nested deeper"),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "nested deeper"),
        ("9" * 5000, r"^it is not JSON \(Exceeds the limit [^;]*\); correct it"),
    ],
)
def test_what_is_not_json_is_one_sentence(text, message):
    with pytest.raises(ValueError, match=message) as caught:
        parse_json(text, "it")
    assert type(caught.value) is ValueError
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e999"])
def test_numbers_that_are_not_finite_are_refused_on_request(number):
    parse_json(f'{{"a": {number}}}', "it")
    with pytest.raises(ValueError, match=r"^it is not JSON \(Out of range"):
        parse_json(f'{{"a": {number}}}', "it", finite=True)


def _fifo(path):
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "No such file"),
        (lambda path: path.mkdir(), "directory|regular"),
        (_fifo, "it is no regular file"),
        (lambda path: path.symlink_to("/dev/zero"), "it is no regular file"),
        (lambda path: path.symlink_to(path), "symbolic links"),
        (lambda path: path.write_bytes(b'{"a": "\xff"}'), r"not UTF-8 \(at byte 7\); save a table"),
        (lambda path: path.write_bytes("[1]".encode("utf-16")), "is not UTF-8"),
        (lambda path: path.write_text("[" + " " * LIMIT + "]"), "than 200,000 bytes, the most"),
        (lambda path: path.write_text("[1,"), r"a\.json' is not JSON"),
    ],
    ids=["none", "folder", "pipe", "device", "loop", "latin", "utf-16", "large", "cut"],
)
def test_a_file_that_cannot_be_used_is_named(tmp_path, make, message):
    make(tmp_path / "a.json")
    with pytest.raises(ValueError, match=message) as caught:
        read_json(tmp_path / "a.json", "a table", LIMIT)
    assert type(caught.value) is ValueError
    assert "a.json'" in str(caught.value)


def test_no_more_is_read_than_the_limit(tmp_path):
    path = tmp_path / "grows.json"
    with path.open("wb") as file:
        file.truncate(2**40)  # of holes
    with pytest.raises(ValueError, match="is larger than"):
        read_json(path, "a table", LIMIT)
    with pytest.raises(ValueError, match="null"):
        read_text(tmp_path / "a\0b", "a table", LIMIT)


def test_lines_are_those_of_line_ends_alone():
    odd = "a\u2028b\x0bc\x85d\re"
    assert lines_of(f"{odd}\r\n\n{odd}") == [odd, "", odd]
    assert lines_of("one\n") == ["one"]
    assert lines_of("") == []
