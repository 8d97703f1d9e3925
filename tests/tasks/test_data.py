"""Rows from files, the hub and the demo: formats, few-shot splits, digests, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import csv, parquet

from bbt_accel.errors import DataError, UsageError
from bbt_accel.predict.texts import read_texts
from bbt_accel.tasks.data import Row, load_rows, rows_digest, task_folders
from bbt_accel.tasks.splits import few_shot
from bbt_accel.tasks.task import load_task

SST2 = load_task("sst2")
ROWS = [
    ("good , really", 1),
    ("1984", 0),
    ('a "quoted"\nline', 1),
    ("2020-01-01", 0),
    ("", 1),
    ("NA", 0),
]


def jsonl(file: Path, rows: list[dict[str, object]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write(file: Path, labels_as_text: bool = False) -> None:
    labels = [str(label) if labels_as_text else label for _, label in ROWS]
    table = pa.table({"sentence": [text for text, _ in ROWS], "label": labels})
    if file.suffix == ".csv":
        csv.write_csv(table, file)
    elif file.suffix == ".parquet":
        parquet.write_table(table, file)
    else:
        jsonl(file, table.to_pylist())


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize("labels_as_text", [False, True])
def test_three_formats_give_the_same_rows(
    tmp_path: Path, suffix: str, labels_as_text: bool
) -> None:
    write(tmp_path / f"train.{suffix}", labels_as_text)
    assert load_rows(SST2, "train", tmp_path) == [
        Row({"sentence": text}, label) for text, label in ROWS
    ]


def test_test_falls_back_to_validation(tmp_path: Path) -> None:
    jsonl(tmp_path / "validation.jsonl", [{"sentence": "v", "label": 1}])
    assert load_rows(SST2, "test", tmp_path)[0].fields == {"sentence": "v"}
    jsonl(tmp_path / "test.jsonl", [{"sentence": "t", "label": -1}])
    assert load_rows(SST2, "test", tmp_path)[0].fields == {"sentence": "v"}
    jsonl(tmp_path / "test.jsonl", [{"sentence": "t"}])
    assert load_rows(SST2, "test", tmp_path)[0].fields == {"sentence": "v"}
    jsonl(tmp_path / "test.jsonl", [{"sentence": "t", "label": None}])
    assert load_rows(SST2, "test", tmp_path)[0].fields == {"sentence": "v"}
    jsonl(tmp_path / "test.jsonl", [{"sentence": "t", "label": 0}])
    assert load_rows(SST2, "test", tmp_path)[0].fields == {"sentence": "t"}


def test_an_unknown_split_is_named() -> None:
    with pytest.raises(UsageError, match="unknown split 'dev'; choose from train, test"):
        load_rows(load_task("demo"), "dev")  # type: ignore[arg-type]


def test_lone_surrogates_become_question_marks_where_they_enter(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"sentence": "a \\ud83d b", "label": 1}\n')
    assert load_rows(SST2, "train", tmp_path)[0].fields == {"sentence": "a ? b"}
    assert read_texts(["a \udcff"], None, ["sentence"]) == [{"sentence": "a ?"}]
    assert read_texts(['{"a": "\\ud83d", "b": "x"}'], None, ["a", "b"]) == [{"a": "?", "b": "x"}]


def test_rows_without_a_label_are_skipped(tmp_path: Path) -> None:
    jsonl(tmp_path / "train.jsonl", [{"sentence": "a", "label": -1}, {"sentence": "b", "label": 1}])
    assert load_rows(SST2, "train", tmp_path) == [Row({"sentence": "b"}, 1)]
    stars = SST2.model_copy(update={"classes": ["1", "5"], "n_classes": 2})
    unlabelled = [{"sentence": "a", "label": label} for label in (-1, "-1", -1.0, "-1.0")]
    jsonl(tmp_path / "train.jsonl", [*unlabelled, {"sentence": "b", "label": 5}])
    assert load_rows(stars, "train", tmp_path) == [Row({"sentence": "b"}, 1)]


@pytest.mark.parametrize(
    ("classes", "cells", "found"),
    [
        (["-1.0", "0.0", "1.0"], [-1, 0, 1, "-1", "0.0", 1.0, "+1"], [0, 1, 2, 0, 1, 2, 2]),
        (["0.5", "1.0", "1.5", "2.0"], [2, 1.0, 0.5, "2.00"], [3, 1, 0, 3]),
        (["01", "1"], ["01", "1", 1], [0, 1, 1]),
        (
            ["9007199254740992", "9007199254740993"],
            [9007199254740993, "9007199254740992.0"],
            [1, 0],
        ),
    ],
)
def test_classes_that_are_numbers_are_found_in_every_form(
    tmp_path: Path, classes: list[str], cells: list[object], found: list[int]
) -> None:
    task = SST2.model_copy(update={"classes": classes, "n_classes": len(classes)})
    jsonl(tmp_path / "train.jsonl", [{"sentence": "a", "label": cell} for cell in cells])
    assert [row.label for row in load_rows(task, "train", tmp_path)] == found
    jsonl(tmp_path / "train.jsonl", [{"sentence": "a", "label": 3}])
    with pytest.raises(DataError, match="label is 3, no class of task sst2"):
        load_rows(task, "train", tmp_path)


def test_a_number_is_no_index_where_a_class_may_be_meant_by_it(tmp_path: Path) -> None:
    task = SST2.model_copy(update={"classes": ["1 star", "2 stars"]})
    jsonl(
        tmp_path / "train.jsonl",
        [{"sentence": "a", "label": "1 star"}, {"sentence": "b", "label": 1}],
    )
    with pytest.raises(DataError, match="row 2: label is 1, no class of task sst2"):
        load_rows(task, "train", tmp_path)


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"sentence": "a", "label": 2}, r"row 2: label 2 is outside 0\.\.1"),
        ({"sentence": "a", "label": -2}, "label -2 is outside"),
        ({"sentence": "a", "label": "good"}, "label is 'good', not an integer"),
        ({"sentence": "a", "label": "9" * 5000}, "not an integer"),
        ({"sentence": "a", "label": True}, "label is True, not an integer"),
        ({"sentence": "a", "label": 1.5}, "label is 1.5, not an integer"),
        ({"sentence": "a", "label": None}, "label is None"),
        ({"sentence": None, "label": 1}, "row 2: sentence is missing"),
        ({"label": 1}, "row 2: sentence is missing"),
        ({"sentence": 7, "label": 1}, "sentence is 7, not text"),
        ([1], "line 2 is not an object"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, row: object, complaint: str) -> None:
    (tmp_path / "train.jsonl").write_text('{"sentence": "ok", "label": 1}\n' + json.dumps(row))
    with pytest.raises(DataError, match=complaint):
        load_rows(SST2, "train", tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("train.jsonl", b"", "has no rows"),
        ("train.csv", b"", "has no rows"),
        ("train.csv", b"sentence,label\n", "has no rows"),
        ("train.csv", b"text,label\na,1\n", "has no column 'sentence'; it has 'text', 'label'"),
        ("train.csv", b"sentence,label\na,1,2\n", "cannot read"),
        (
            "train.csv",
            b"sentence,label,label\na,1,0\n",
            "has 2 columns named 'label'; rename or remove one",
        ),
        (
            "train.jsonl",
            b'{"text": "a", "label": 1}',
            "has no column 'sentence'; it has 'text', 'label'",
        ),
        ("train.jsonl", b'{"sentence": "a", ', "line 1 is not JSON"),
        ("train.jsonl", b'{"sentence": "\xff", "label": 1}', "cannot read"),
        ("train.jsonl", b'{"sentence": "a", "label": -1}', "no labelled rows"),
        ("train.jsonl", b'{"sentence": ' + b"[" * 100_000, "line 1 is not JSON"),
        ("train.jsonl", b'{"sentence": "a", "label": ' + b"1" * 5000 + b"}", "line 1 is not JSON"),
        (
            "train.jsonl",
            json.dumps(dict.fromkeys(map(str, range(200_000)), 1)).encode(),
            "has no column",
        ),
        ("train.parquet", b"not parquet at all", "cannot read"),
        ("other.jsonl", b"", r"has no train\.jsonl \(or .*\); it holds other\.jsonl"),
    ],
)
def test_bad_files_are_one_line(tmp_path: Path, name: str, content: bytes, complaint: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=complaint) as caught:
        load_rows(SST2, "train", tmp_path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_a_date_that_python_does_not_have_is_one_line(tmp_path: Path) -> None:
    times = pa.array([2**62, 0], pa.timestamp("ms"))
    parquet.write_table(pa.table({"sentence": times, "label": [0, 1]}), tmp_path / "train.parquet")
    with pytest.raises(DataError, match=r"cannot read .*train\.parquet"):
        load_rows(SST2, "train", tmp_path)


def test_missing_folder_and_two_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a folder"):
        load_rows(SST2, "train", tmp_path / "none")
    write(tmp_path / "train.jsonl")
    write(tmp_path / "train.csv")
    with pytest.raises(DataError, match=r"has train\.jsonl and train\.csv; keep one"):
        load_rows(SST2, "train", tmp_path)


def test_demo_rows_are_shipped() -> None:
    task = load_task("demo")
    for split in ("train", "test"):
        rows = load_rows(task, split)  # type: ignore[arg-type]
        assert {row.label for row in rows} == {0, 1, 2, 3}
    assert few_shot(load_rows(task, "train"), 4, 16, 42)


def test_hub_failure_says_to_pass_data(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def fail(*args: object, **options: object) -> None:
        raise ConnectionError("no network\nat all")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(
        DataError, match=r"nyu-mll/glue/sst2 from the hub .*no network.*pass --data DIR"
    ) as caught:
        load_rows(SST2, "train")
    assert "\n" not in str(caught.value)


def test_hub_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def load(path: str, config: str, split: str) -> datasets.Dataset:
        asked.append((path, config, split))
        return datasets.Dataset.from_dict({"sentence": ["a", "b"], "label": [1, -1], "idx": [0, 1]})

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert load_rows(SST2, "test") == [Row({"sentence": "a"}, 1)]
    assert asked == [("nyu-mll/glue", "sst2", "validation")]


def test_task_without_hub_data_set_needs_data() -> None:
    task = SST2.model_copy(update={"hub": None})
    with pytest.raises(DataError, match="has no data set on the hub; pass --data DIR"):
        load_rows(task, "train")


@given(
    labels=st.lists(st.integers(0, 2), min_size=12), k=st.integers(1, 2), seed=st.integers(0, 2**32)
)
def test_few_shot_takes_k_of_each_class_for_train_and_for_dev(
    labels: list[int], k: int, seed: int
) -> None:
    rows = [Row({"text": str(i)}, label) for i, label in enumerate(labels)]
    rarest = min(range(3), key=labels.count)
    if labels.count(rarest) < 2 * k:
        with pytest.raises(
            DataError, match=f"class '{rarest}' has {labels.count(rarest)} rows.*needs {2 * k}"
        ):
            few_shot(rows, 3, k, seed)
        return
    train, dev = few_shot(rows, 3, k, seed)
    assert (
        sorted(row.label or 0 for row in train)
        == sorted(row.label or 0 for row in dev)
        == sorted([0, 1, 2] * k)
    )
    assert len({row.fields["text"] for row in [*train, *dev]}) == 6 * k, "no row twice"
    assert (train, dev) == few_shot(rows, 3, k, seed), "the seed determines the rows"


def test_few_shot_refuses_labels_that_are_no_classes() -> None:
    rows = [Row({"text": str(i)}, i % 3) for i in range(100)]
    with pytest.raises(DataError, match=r"a row has the label 2, classes are 0\.\.1"):
        few_shot(rows, 2, 2, 1)
    assert all(
        row.label is not None for row in few_shot([*rows, Row({"text": "unlabelled"})], 3, 2, 1)[0]
    )
    for n_classes, k in ((0, 2), (3, 0)):
        with pytest.raises(UsageError, match="must be at least 1"):
            few_shot(rows, n_classes, k, 1)


def test_few_shot_depends_on_the_seed() -> None:
    rows = [Row({"text": str(i)}, i % 2) for i in range(100)]
    assert few_shot(rows, 2, 16, 1) != few_shot(rows, 2, 16, 2)


def test_digest_follows_content_and_order() -> None:
    rows = [Row({"text": "a"}, 0), Row({"text": "b"}, 1)]
    digest = rows_digest(rows)
    assert digest == rows_digest(list(rows))
    assert (
        len(
            {
                digest,
                rows_digest(rows[::-1]),
                rows_digest(rows[:1]),
                rows_digest([rows[0], Row({"text": "b"})]),
            }
        )
        == 4
    )


def test_rows_of_the_only_task_may_lie_in_the_folder_itself(tmp_path: Path) -> None:
    jsonl(tmp_path / "train.jsonl", [{"sentence": "good", "label": 1}])
    assert task_folders(tmp_path, ["sst2"]) == {"sst2": str(tmp_path)}
    assert task_folders(tmp_path / "train.jsonl", ["sst2"]) == {
        "sst2": str(tmp_path / "train.jsonl")
    }
    several = {name: str(tmp_path / name) for name in ("sst2", "rte")}
    assert task_folders(tmp_path, list(several)) == several
    assert task_folders(tmp_path / "none", ["sst2"]) == {"sst2": str(tmp_path / "none" / "sst2")}
    assert task_folders(None, ["sst2"]) == {"sst2": None}
    (tmp_path / "sst2").mkdir()
    assert task_folders(tmp_path, ["sst2"]) == {"sst2": str(tmp_path / "sst2")}, (
        "a folder of its own comes first"
    )
