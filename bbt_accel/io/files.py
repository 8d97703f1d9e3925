"""Writing files and folders so that nothing half-written ever appears under its final name, and
nothing is lost.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from bbt_accel.errors import BbtError, UsageError

# seconds to wait for a name: a process that was killed gives it up only when its memory has been
# freed
PATIENCE = 2.0


def sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def has_digest(file: Path, digest: str) -> bool:
    """Whether this is a file with that sha256; False for a name that no file can have."""
    return os.path.isfile(file) and sha256(file) == digest


def fingerprint(name: str | Path) -> str:
    """sha256 of a name, and of the content of the file or of all files in the folder that it names,
    if any.
    """
    place = Path(name)
    files = (
        sorted(p for p in place.rglob("*") if p.is_file())
        if place.is_dir()
        else [place] * place.is_file()
    )
    content = [str(name), *(f"{file.relative_to(place)} {sha256(file)}" for file in files)]
    return hashlib.sha256("\n".join(content).encode()).hexdigest()


def write_atomically(file: Path, content: bytes) -> None:
    """Write a file under a temporary name, sync it, and rename it: a reader sees the old content or
    the new.
    """
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, file)
    except OSError as error:
        error.filename = str(file)  # a full disk has none
        raise
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Remove what processes have left that were killed in `write_atomically`; the folder must be
    this process's own.
    """
    for file in folder.glob(".*.*"):
        if file.suffix[1:].isdecimal() and file.is_file():
            file.unlink()


@contextmanager
def reserved(path: Path, patience: float = PATIENCE) -> Iterator[None]:
    """Keep every other process of bbt-accel from making or replacing the folder `path` while the
    block runs.

    The lock is that of the file `.NAME.lock` beside the folder, which the operating system releases
    with its process. At the end it is removed, and so are the parents that were made for it if they
    are empty. patience: seconds to wait for it. Raises BbtError when another process has it, or it
    cannot be written; UsageError for a path without a name.
    """
    path = path.absolute()
    if path.name in ("", ".."):
        raise UsageError(f"-o {path} names no new folder; choose another -o")
    file = path.with_name(f".{path.name}.lock")
    made = [parent for parent in file.parents if not parent.exists()]
    try:
        held = _lock(file, patience)
    except OSError as error:
        raise BbtError(
            f"cannot write to {path.parent} ({error.strerror}); choose another -o"
        ) from None
    if held is None:
        raise BbtError(f"{path} is in use by another bbt-accel; wait for it or choose another -o")
    try:
        yield
    finally:
        with suppress(OSError):
            file.unlink()  # while it is locked: who waits for it notices, and makes another
        held.close()
        with suppress(OSError):
            for parent in made:
                parent.rmdir()


def _lock(file: Path, patience: float) -> IO[bytes] | None:
    """The open and locked file; None if another process keeps it locked for longer."""
    until = time.monotonic() + patience
    while True:
        # Another command may have removed the folder, as it was empty.
        file.parent.mkdir(parents=True, exist_ok=True)
        stream = file.open("ab")
        if _locks(stream) and _is_named(stream, file):
            return stream
        stream.close()
        if time.monotonic() > until:
            return None
        time.sleep(0.02)


def _locks(stream: IO[bytes]) -> bool:
    """Whether an open file could be locked, as it always can be where the system has no locks."""
    try:
        import fcntl
    except ImportError:  # Windows, which does not let an open file be removed: see `reserved`
        return True
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in (errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK)
    return True


def _is_named(stream: IO[bytes], file: Path) -> bool:
    """Whether an open file is still the one of that name, which its former owner may have
    removed.
    """
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(stream.fileno()), file.stat())
    return False


def rename_new(source: Path, target: Path) -> None:
    """Rename a folder. Raises FileExistsError when there is anything of that name, and leaves it
    alone.
    """
    if os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    # Should something appear right now, the system replaces nothing but an empty folder.
    os.rename(source, target)


def require_new(path: Path) -> None:
    """Raises BbtError where there is anything of this name."""
    if os.path.lexists(path):
        raise BbtError(f"{path} exists already; choose another -o or remove it")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its name when the block ends without an error.

    An error or an interrupt leaves nothing behind; what a killed process has left is removed by the
    next one. Raises BbtError when `path` exists, appears meanwhile, is being made by another
    process or cannot be written.
    """
    with reserved(path), reserved_folder(path) as temporary:
        yield temporary


@contextmanager
def reserved_folder(path: Path) -> Iterator[Path]:
    """The same for a name that this process has `reserved`."""
    path = path.absolute()
    require_new(path)
    temporary = path.with_name(f".{path.name}.new")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        yield temporary
        try:
            rename_new(temporary, path)
        except FileExistsError:
            require_new(path)
            raise
    except OSError as error:
        reason = error.strerror or error
        if isinstance(error, shutil.Error):  # of copytree: (source, target, why) for each file
            reason = error.args[0][0][2]
        raise BbtError(
            f"cannot write {path} ({reason}); free some space or choose another -o"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
