"""The texts that predict is given: as words, as files and on standard input."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from bbt_accel.errors import DataError, UsageError
from bbt_accel.predict.texts import read_texts

PAIR = ["premise", "hypothesis"]


def test_texts_of_a_task_with_one_column_are_taken_literally() -> None:
    assert read_texts(["a\tb", '{"text": 1}'], None, ["text"]) == [
        {"text": "a\tb"},
        {"text": '{"text": 1}'},
    ]


def test_pairs_by_tab_or_json() -> None:
    record = json.dumps({"hypothesis": "b", "premise": "a", "label": 1})
    assert read_texts(["a\tb", record], None, PAIR) == [{"premise": "a", "hypothesis": "b"}] * 2


def test_each_line_of_a_file_is_a_row(tmp_path: Path) -> None:
    file = tmp_path / "texts.txt"
    file.write_text("one\n\nthree\u2028still three\n", encoding="utf-8")
    assert [row["text"] for row in read_texts([], file, ["text"])] == [
        "one",
        "",
        "three\u2028still three",
    ]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.JSONL", "rows.ndjson", "rows.txt", "-"])
def test_rows_as_json_objects_are_read_by_column_whatever_the_file_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    content = '{"text": "one", "label": 1}\n\n{"label": 0, "text": "two"}\n'
    (tmp_path / name).write_text(content)
    monkeypatch.setattr("sys.stdin", io.StringIO(content))
    file = Path("-") if name == "-" else tmp_path / name
    assert read_texts([], file, ["text"]) == [{"text": "one"}, {"text": "two"}]


def test_texts_that_merely_look_like_json_are_texts(tmp_path: Path) -> None:
    lines = ['{"a": 1}', "{ not json", '["text"]', '{"text": 3}']
    (tmp_path / "texts.txt").write_text("\n".join(lines))
    assert [row["text"] for row in read_texts([], tmp_path / "texts.txt", ["text"])] == lines


def test_objects_without_the_column_are_no_texts(tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text('{"body": "one"}\n{"body": "two"}\n')
    with pytest.raises(DataError, match="line 1 has no text 'review'; the task needs review"):
        read_texts([], tmp_path / "texts.txt", ["review"])


@pytest.mark.parametrize("file", [None, Path("-")])
def test_each_line_of_standard_input_is_a_row(
    monkeypatch: pytest.MonkeyPatch, file: Path | None
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo"))
    assert read_texts([], file, ["text"]) == [{"text": "one"}, {"text": "two"}]


@pytest.mark.parametrize(
    "content", [b"one\r\ntwo\r\n", b"\xef\xbb\xbfone\ntwo", b"one\rtwo", b"caf\xe9"]
)
def test_bytes_on_standard_input_are_read_as_those_of_a_file_whatever_the_locale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    (tmp_path / "texts.txt").write_bytes(content)
    for file in (tmp_path / "texts.txt", None):
        standard = io.TextIOWrapper(io.BytesIO(content), "ascii", "surrogateescape")
        monkeypatch.setattr("sys.stdin", standard)
        if content == b"caf\xe9":
            with pytest.raises(DataError, match="is not UTF-8 text"):
                read_texts([], file, ["text"])
        else:
            assert read_texts([], file, ["text"]) == [{"text": "one"}, {"text": "two"}]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("a", r"line 1 has 1 column\(s\), the task needs premise, hypothesis"),
        ("a\tb\tc", r"has 3 column\(s\)"),
        ("{bad", "line 1 is not JSON"),
        ('{"premise": "a"}', "line 1 has no text 'hypothesis'"),
        ('{"premise": "a", "hypothesis": 1}', "line 1 has no text 'hypothesis'"),
        ("", "is empty"),
    ],
)
def test_a_line_that_is_no_pair_is_named(tmp_path: Path, line: str, complaint: str) -> None:
    (tmp_path / "f").write_text(line)
    with pytest.raises(DataError, match=complaint):
        read_texts([], tmp_path / "f", PAIR)


def test_a_jsonl_file_holds_objects_also_for_a_task_with_one_column(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "one", "label": 1}\n\n{"label": 0, "text": "two"}\n')
    assert read_texts([], file, ["text"]) == [{"text": "one"}, {"text": "two"}]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("one", "line 2 is not JSON"),
        ('["one"]', "line 2 is not an object"),
        ('{"sentence": "one"}', "line 2 has no text 'text'; the task needs text"),
        ('{"text": 1}', "line 2 has no text 'text'"),
        ("[" * 100_000, "line 2 is not JSON"),
        ('{"text": ' + "1" * 5000 + "}", "line 2 is not JSON"),
    ],
)
def test_bad_lines_of_a_jsonl_file(tmp_path: Path, line: str, complaint: str) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(DataError, match=complaint) as caught:
        read_texts([], tmp_path / "rows.jsonl", ["text"])
    assert len(str(caught.value)) < 500


def test_standard_input_that_is_closed_is_wrong_usage(monkeypatch: pytest.MonkeyPatch) -> None:
    for closed in (None, io.StringIO()):
        if closed is not None:
            closed.close()
        monkeypatch.setattr("sys.stdin", closed)
        for file in (None, Path("-")):
            with pytest.raises(UsageError, match="give a text"):
                read_texts([], file, ["text"])


def test_unreadable_files_two_sources_and_no_source_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "f").write_bytes(b"\xff")
    with pytest.raises(DataError, match="not UTF-8"):
        read_texts([], tmp_path / "f", ["text"])
    with pytest.raises(DataError, match="cannot read"):
        read_texts([], tmp_path / "none", ["text"])
    (tmp_path / "header.csv").write_text("text,label\n")
    with pytest.raises(DataError, match="has no rows"):
        read_texts([], tmp_path / "header.csv", ["text"])
    with pytest.raises(UsageError, match="not both"):
        read_texts(["a"], tmp_path / "f", ["text"])
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    with pytest.raises(UsageError, match="give a text"):
        read_texts([], None, ["text"])
