"""Writing files and folders so that nothing half-written ever appears under its final name."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bbt_accel.errors import BbtError


def sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_atomically(file: Path, content: bytes) -> None:
    """Write a file under a temporary name, sync it, and rename it: a reader sees the old content or the new."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its name when the block ends without an error.

    An error or an interrupt leaves nothing behind. Raises BbtError when `path` exists or cannot be written.
    """
    path = path.absolute()
    if path.exists() and not overwrite:
        raise BbtError(f"{path} exists already; choose another -o or remove it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise BbtError(f"cannot write to {path.parent} ({error.strerror}); choose another -o") from None
    temporary.chmod(0o755)
    try:
        yield temporary
        if path.exists():
            shutil.rmtree(path)
        os.rename(temporary, path)
    except OSError as error:
        problem = f"cannot write {path} ({error.strerror or error})"
        raise BbtError(f"{problem}; free some space or choose another -o") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
