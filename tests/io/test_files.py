"""Folders that are made whole or not at all, by one process at a time, and never in place of
another.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from bbt_accel.errors import BbtError, UsageError
from bbt_accel.io.files import new_folder, reserved


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_folder_appears_when_it_is_whole_and_alone(tmp_path: Path) -> None:
    with new_folder(tmp_path / "a" / "b") as folder:
        (folder / "file").write_text("new")
        assert not (tmp_path / "a" / "b").exists()
    assert names(tmp_path) == ["a", "a/b", "a/b/file"]


def test_an_error_leaves_nothing_not_even_the_parents(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), new_folder(tmp_path / "a" / "b"):
        raise ZeroDivisionError
    assert names(tmp_path) == []


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
    assert names(tmp_path) == (["name", "name/letter"] if kind == "folder" else ["name"])


def test_one_process_has_a_name_until_it_gives_it_up(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    path, waited = tmp_path / "name", threading.Event()

    def wait() -> None:
        with reserved(path, patience=60):
            waited.set()

    with reserved(path):
        with pytest.raises(BbtError, match="in use by another bbt-accel; wait for it or choose"):
            reserved(path, patience=0).__enter__()
        second = threading.Thread(target=wait)
        second.start()
        assert not waited.is_set()
    second.join()
    assert waited.is_set()
    assert names(tmp_path) == []


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
    assert names(tmp_path) == [".name.lock", ".name.new", ".name.new/half"]
    with new_folder(path) as folder:
        (folder / "file").touch()
    assert names(tmp_path) == ["name", "name/file"]


@pytest.mark.parametrize("path", ["/", ".."])
def test_a_path_that_names_no_new_folder_is_wrong_usage(path: str) -> None:
    with pytest.raises(UsageError, match="names no new folder"), new_folder(Path(path)):
        pass


@pytest.mark.skipif(
    os.name == "nt" or os.geteuid() == 0, reason="permissions do not bind this user"
)
def test_a_parent_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(BbtError, match="cannot write to"), new_folder(tmp_path / "name"):
            pass
    finally:
        tmp_path.chmod(0o700)
