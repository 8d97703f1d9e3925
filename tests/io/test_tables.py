"""Tables of rows: what is detected about a file, and what is said of one that cannot be read."""

from __future__ import annotations

import csv
import json
import re
import zipfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from bbt_accel.errors import BbtError, DataError
from bbt_accel.io.tables import Table, plain, read_table

ROWS = [
    {"review": 'Schön, "wirklich" schön', "stars": "5"},
    {"review": "NA\nzwei Zeilen; schlecht", "stars": "1"},
]


def written(file: Path, separator: str = ",", encoding: str = "utf-8") -> Path:
    quoted = [
        [f'"{value}"' for value in (r["review"].replace('"', '""'), r["stars"])] for r in ROWS
    ]
    lines = "".join(separator.join(row) + "\r\n" for row in [["review", "stars"], *quoted])
    file.write_bytes(lines.encode(encoding))
    return file


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize(
    ("encoding", "found"),
    [("utf-8", "utf-8"), ("utf-8-sig", "utf-8"), ("utf-16", "utf-16"), ("latin-1", "cp1252")],
)
def test_separator_and_encoding_of_a_csv_file_are_detected(
    tmp_path: Path, separator: str, encoding: str, found: str
) -> None:
    assert read_table(written(tmp_path / "t.csv", separator, encoding)) == Table(
        ROWS, found, separator
    )


def test_a_long_text_hides_no_separator(tmp_path: Path) -> None:
    before = csv.field_size_limit(131_072)  # Python's own
    try:
        (tmp_path / "t.csv").write_text(f"review;stars\n{'good, ' * 30_000};5\n")
        assert read_table(tmp_path / "t.csv").records == [
            {"review": "good, " * 30_000, "stars": "5"}
        ]
    finally:
        csv.field_size_limit(before)


def test_a_long_cyrillic_text_is_recognized(tmp_path: Path) -> None:
    text = (
        "Фильм оказался очень хорошим, актёры играют прекрасно, музыка великолепна; сюжет "
        "захватывает сразу."
    )
    (tmp_path / "t.csv").write_bytes(f'review,stars\n"{text * 5}",5\n'.encode("cp1251"))
    assert read_table(tmp_path / "t.csv") == Table(
        [{"review": text * 5, "stars": "5"}], "cp1251", ","
    )


@pytest.mark.parametrize(
    "damage", [lambda b: b.replace(b"1 ", b"\xe9 ", 1), lambda b: b[: b.rindex(b"\xc3") + 1]]
)
def test_utf8_with_a_damaged_byte_is_not_taken_for_another_encoding(
    tmp_path: Path, damage: Any
) -> None:
    content = "text,label\n" + "".join(f"{i} Züge über die Brücke,{i % 2}\n" for i in range(9))
    (tmp_path / "t.csv").write_bytes(damage(content.encode()))
    with pytest.raises(DataError, match=r"t\.csv is UTF-8 but for byte \d+; repair it"):
        read_table(tmp_path / "t.csv")


def test_names_of_columns_have_no_spaces_around_them(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("id, review ,stars\n1,good,5\n")
    assert read_table(tmp_path / "t.csv").records == [{"id": "1", "review": "good", "stars": "5"}]


def test_one_column_is_not_split_at_a_character_of_its_texts(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text('text\n"a;b"\n"c;d;e"\n')
    assert read_table(tmp_path / "t.csv").records == [{"text": "a;b"}, {"text": "c;d;e"}]


def test_quotes_in_a_tsv_file_without_quoting_are_characters(tmp_path: Path) -> None:
    (tmp_path / "t.tsv").write_text('text\tlabel\n"open, never closed\t1\nplain\t0\n')
    assert read_table(tmp_path / "t.tsv").records[0] == {
        "text": '"open, never closed',
        "label": "1",
    }


def test_quoted_speech_in_a_tsv_file_swallows_no_rows(tmp_path: Path) -> None:
    lines = ["text\tlabel", '"It is great, he said.\t1', "plain film\t0", 'and left."\t0']
    (tmp_path / "t.tsv").write_text("\n".join(lines) + "\n")
    assert [row["text"] for row in read_table(tmp_path / "t.tsv").records] == [
        line.split("\t")[0] for line in lines[1:]
    ]
    (tmp_path / "t.tsv").write_text('text\tlabel\n"two\nlines"\t1\n')
    assert read_table(tmp_path / "t.tsv").records == [{"text": "two\nlines", "label": "1"}]


@pytest.mark.parametrize("form", ["list", "inside", "lines"])
def test_three_forms_of_json(tmp_path: Path, form: str) -> None:
    texts = {"list": json.dumps(ROWS), "inside": json.dumps({"version": 1, "data": ROWS})}
    (tmp_path / "t.json").write_text(texts.get(form, "\n".join(map(json.dumps, ROWS))))
    assert read_table(tmp_path / "t.json").records == ROWS


def test_parquet_and_excel(tmp_path: Path) -> None:
    parquet.write_table(pa.Table.from_pylist(ROWS), tmp_path / "t.parquet")
    assert read_table(tmp_path / "t.parquet").records == ROWS
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    for row in (
        ["review", "stars"],
        [ROWS[0]["review"], 5],
        [None, None],
        [ROWS[1]["review"], 1.0],
    ):
        book.active.append(row)
    book.save(tmp_path / "t.xlsx")
    assert read_table(tmp_path / "t.xlsx").records == ROWS


@pytest.mark.parametrize("said", [b'<dimension ref="A1"/>', b'<dimension ref="A1:B2"/>', b""])
def test_what_an_excel_file_says_of_its_size_is_not_believed(tmp_path: Path, said: bytes) -> None:
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    for row in (["review", "stars", "note"], ["a", 5], ["b", 1, "late"], ["c"]):
        book.active.append(row)
    book.save(tmp_path / "whole.xlsx")
    with (
        zipfile.ZipFile(tmp_path / "whole.xlsx") as whole,
        zipfile.ZipFile(tmp_path / "t.xlsx", "w") as other,
    ):
        for name in whole.namelist():
            other.writestr(name, re.sub(rb"<dimension[^>]*/>", said, whole.read(name)))
    assert [list(row.values()) for row in read_table(tmp_path / "t.xlsx").records] == [
        ["a", "5", ""], ["b", "1", "late"], ["c", "", ""],
    ]  # fmt: skip


def test_excel_without_its_reader_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "openpyxl", None)
    (tmp_path / "t.xlsx").write_bytes(b"PK")
    with pytest.raises(BbtError, match=r"needs openpyxl: pip install openpyxl, or save it as CSV"):
        read_table(tmp_path / "t.xlsx")


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("t.pdf", b"%PDF", r"is none of \.jsonl, \.ndjson, \.csv"),
        ("none.csv", None, "No such file"),
        ("t.csv", b"a,b\n1,2\n1,2,3\n", "line 3 has more or fewer columns"),
        ("t.json", b"{", "cannot read"),
        ("t.json", b'{"a": 1}', "not a list of objects"),
        ("t.json", b"[1]", "not a list of objects"),
        ("t.jsonl", b"[1]", "line 1 is not an object"),
        ("t.parquet", b"PAR1", "cannot read"),
        ("t.csv", bytes(range(128, 256)) * 40, "cannot be detected|columns|cannot read"),
    ],
)
def test_what_cannot_be_read_is_one_line(
    tmp_path: Path, name: str, content: bytes | None, complaint: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=complaint) as caught:
        list(read_table(tmp_path / name).records)
    assert "\n" not in str(caught.value)


def test_cells_as_text() -> None:
    assert [plain(v) for v in (None, float("nan"), 1.0, 1.5, True, " a ", 3)] == [
        "",
        "",
        "1",
        "1.5",
        "True",
        "a",
        "3",
    ]
