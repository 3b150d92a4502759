"""Where files go and how they get there: whole, or not at all."""

import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:
    fcntl = None


def cache_folder() -> Path:
    """The folder for tokenizers and token arrays: $L3_CACHE, or l3paper in the user's cache folder.

    The user's cache folder is $XDG_CACHE_HOME, or ~/.cache where that is not set.
    """
    if override := os.environ.get("L3_CACHE"):
        return Path(override)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "l3paper"


@contextmanager
def atomic_write(path: Path, mode: str = "w") -> Iterator[IO]:
    """Open a temporary neighbour of `path` for writing; rename it to `path` when the block succeeds.

    When the block raises, `path` keeps whatever it held and the temporary file is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _neighbour(path)
    try:
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk does not say whose
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a new temporary folder; move it to `path`, and all to the disk, when the block succeeds.

    Whatever stands at `path` by then is replaced. When the block raises, it is left alone.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, outdated = _neighbour(path), _neighbour(path)
    temporary.mkdir()
    try:
        yield temporary
        for part in (*temporary.iterdir(), temporary):
            _sync(part)
        if path.is_dir():
            os.replace(path, outdated)
        else:
            path.unlink(missing_ok=True)
        os.replace(temporary, path)
        _sync(path.parent)
    finally:
        if outdated.exists() and not path.exists():
            os.replace(outdated, path)
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(outdated, ignore_errors=True)


def remove_folder(path: Path) -> None:
    """Rename it, then delete it: whoever is killed meanwhile leaves no half of it under its name."""
    outdated = _neighbour(path)
    os.replace(path, outdated)
    shutil.rmtree(outdated)


@contextmanager
def locked(folder: Path, wait: bool = True) -> Iterator[None]:
    """Let one process at a time into the block for `folder`, which is created.

    The others wait, or get a BlockingIOError. Windows has no such lock: there, processes are not kept
    apart.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        os.close(handle)


def require_writable(path: Path) -> None:
    """Raise ValueError, naming `path`, unless a file can be written there."""
    try:
        if path.is_dir():
            raise IsADirectoryError("it is a folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        probe = _neighbour(path)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"{str(path)!r} cannot be written: {error}") from None


def sha256(path: Path) -> str:
    """Of a file's content, which is read piece by piece."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Have the disk hold a file's content, or a folder's names; Windows cannot open folders."""
    if path.is_dir() and fcntl is None:
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _neighbour(path: Path) -> Path:
    """A hidden name beside `path` that nobody else has."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")
