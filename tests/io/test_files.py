"""Folders that are made whole or not at all, by one process at a time, and never in place of
another.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bbt_accel.errors import BbtError, UsageError
from bbt_accel.io import files
from bbt_accel.io.files import new_folder, rename_new, reserved, write_atomically


@pytest.fixture(autouse=True)
def no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "PATIENCE", 0.0)


def make(path: Path, content: str = "new") -> None:
    with new_folder(path) as folder:
        (folder / "file").write_text(content)


def test_a_folder_appears_when_it_is_whole_and_alone(tmp_path: Path) -> None:
    with new_folder(tmp_path / "a" / "b") as folder:
        (folder / "file").write_text("new")
        assert not (tmp_path / "a" / "b").exists()
    assert [str(p.relative_to(tmp_path)) for p in sorted(tmp_path.rglob("*"))] == [
        "a",
        "a/b",
        "a/b/file",
    ]


def test_an_error_leaves_nothing_not_even_the_parents(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), new_folder(tmp_path / "a" / "b"):
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["file", "empty folder", "folder", "dangling link"])
@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_what_is_there_is_refused_and_left_alone(tmp_path: Path, kind: str, when: str) -> None:
    path = tmp_path / "name"

    def appear() -> None:
        if kind == "file":
            path.write_text("old")
        elif kind == "dangling link":
            path.symlink_to("nowhere")
        else:
            path.mkdir()
            if kind == "folder":
                (path / "letter").write_text("dear")

    if when == "before":
        appear()
    with pytest.raises(BbtError, match="exists already"), new_folder(path):
        appear()
    assert [p.name for p in tmp_path.iterdir()] == ["name"]
    if kind == "folder":
        assert (path / "letter").read_text() == "dear"
    if kind == "empty folder":
        assert not list(path.iterdir())


@pytest.mark.parametrize("native", [True, False])
def test_a_rename_replaces_nothing_even_where_the_system_cannot_promise_it(
    tmp_path: Path, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not native:
        monkeypatch.setattr(files, "_renameat2", lambda: None)
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
    (tmp_path / "a" / "file").touch()
    with pytest.raises(FileExistsError):
        rename_new(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "a" / "file").exists()
    rename_new(tmp_path / "a", tmp_path / "d")
    assert (tmp_path / "d" / "file").exists()


def test_of_two_at_once_one_wins_and_the_other_is_told(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    path = tmp_path / "name"
    with new_folder(path) as folder:
        (folder / "file").write_text("first")
        with pytest.raises(
            BbtError, match="in use by another bbt-accel; wait for it or choose another -o"
        ):
            make(path, "second")
    assert (path / "file").read_text() == "first"


def test_a_name_is_free_again_when_its_owner_is_gone(tmp_path: Path) -> None:
    path = tmp_path / "name"
    dying = f"""
import os
from pathlib import Path
from bbt_accel.io.files import new_folder
with new_folder(Path({str(path)!r})) as folder:
    (folder / "half").touch()
    os._exit(9)
"""
    assert subprocess.run([sys.executable, "-c", dying]).returncode == 9
    assert len(list(tmp_path.iterdir())) == 2  # its folder and its lock
    make(path)
    assert [p.name for p in tmp_path.iterdir()] == ["name"]
    assert [p.name for p in path.iterdir()] == ["file"]


def test_who_waits_for_a_lock_that_is_removed_makes_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("fcntl")
    monkeypatch.setattr(files, "PATIENCE", 30.0)
    first = reserved(tmp_path / "name")
    first.__enter__()
    waits = []

    def end_the_first(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 1:
            first.__exit__(None, None, None)

    monkeypatch.setattr("time.sleep", end_the_first)
    with reserved(tmp_path / "name"):
        assert waits
        monkeypatch.setattr(files, "PATIENCE", 0.0)
        with pytest.raises(BbtError, match="in use"), reserved(tmp_path / "name"):
            pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", ["/", ".."])
def test_a_path_that_names_no_new_folder_is_wrong_usage(path: str) -> None:
    with pytest.raises(UsageError, match="names no new folder"):
        make(Path(path))


@pytest.mark.skipif(
    os.name == "nt" or os.geteuid() == 0, reason="permissions do not bind this user"
)
def test_a_parent_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(BbtError, match=r"cannot write to .*choose another -o"):
            make(tmp_path / "name")
    finally:
        tmp_path.chmod(0o700)


def test_a_full_disk_is_named_with_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match=r"report\.json"):
        write_atomically(tmp_path / "report.json", b"{}")
    assert not list(tmp_path.iterdir())
