"""Where files go and how they get there: whole, or not at all."""

import errno
import hashlib
import os
import shutil
import sys
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import IO

from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_UNSUPPORTED = {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF, errno.ENOLCK}
"""Error numbers of a file system that cannot flush folders, or cannot lock them."""


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

    When the block raises, `path` keeps its content and the temporary file is removed. If `path` is a
    link, its target is replaced. What is not a regular file, such as a device or a pipe, is written
    through and never replaced. An OSError with an error number names `path`.
    """
    encoding = None if "b" in mode else "utf-8"
    with _naming(path):
        if path.exists() and not path.is_file():
            with open(path, mode, encoding=encoding) as file:
                yield file
            return
        target = _target(path)
        temporary = _neighbour(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, mode, encoding=encoding) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a new temporary folder; flush it to the disk and move it to `path` when the block succeeds.

    A folder at `path` is replaced; if `path` is a link, its target is. When the block raises, `path` is
    left alone. An OSError with an error number names `path`.
    """
    target = _target(path)
    temporary, outdated = _neighbour(target), _neighbour(target)
    with _naming(path):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        try:
            yield temporary
            for part in (*temporary.iterdir(), temporary):
                _sync(part)
            if target.is_dir():
                target.replace(outdated)
            temporary.replace(target)
            _sync(target.parent)
        finally:
            if outdated.exists() and not target.exists():
                outdated.replace(target)
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.rmtree(outdated, ignore_errors=True)


def _target(path: Path) -> Path:
    """Where the links at `path` lead. Raises ValueError for links that lead to themselves."""
    target = Path(os.path.realpath(path))
    if target.is_symlink():
        raise ValueError(f"{str(path)!r} is a loop of links")
    return target


def remove_folder(path: Path) -> None:
    """Rename a folder, then delete it: a killed process leaves no half of it under its name."""
    shutil.rmtree(path.replace(_neighbour(path)))


@contextmanager
def locked(folder: Path, wait: bool = True) -> Iterator[None]:
    """Let one process at a time into the block for `folder`, which is created.

    The others wait or, without `wait`, get a ValueError that names the folder. Some network file
    systems have no such locks: there, a warning says that runs are not held apart.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if fcntl is None:  # Windows: nothing holds them apart
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if not wait:
                raise ValueError(f"{str(folder)!r} is in use by another process") from error
            _note_once(f"waiting for another process that uses {str(folder)!r}")
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError as error:
            _require_unsupported(error, folder, "lock folders: runs on one folder are not held apart")
        yield
    finally:
        os.close(handle)


def require_writable(path: Path) -> None:
    """Raise ValueError, naming `path`, unless `atomic_write` can write a file there."""
    if path.is_dir():
        raise ValueError(f"{str(path)!r} cannot be written: it is a folder")
    if not path.exists() or path.is_file():
        _require_neighbours(path)
    elif not os.access(path, os.W_OK):
        raise ValueError(f"{str(path)!r} cannot be written: it does not accept writing")


def require_replaceable(folder: Path) -> None:
    """Raise ValueError, naming `folder`, unless `atomic_folder` can put a folder there.

    The working folder and its parents are refused, since a shell would stay in the replaced folder;
    so are mount points, which cannot be renamed.
    """
    target = _target(folder)
    if Path.cwd().is_relative_to(target) or target.is_mount():
        raise ValueError(
            f"{str(folder)!r} cannot be replaced: it is a mount point, or the working folder is in it; "
            "name a new folder inside it"
        )
    _require_neighbours(folder)


def _require_neighbours(path: Path) -> None:
    """Create the folder of `path`. Raise ValueError, naming `path`, unless it takes new files."""
    folder = _target(path).parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"{str(path)!r} cannot be written: {error}") from error


def sha256(path: Path) -> str:
    """Return the digest of a file's content, which is read piece by piece."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Flush a file's content, or a folder's names, to the disk; Windows cannot open folders."""
    if fcntl is None:
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if not path.is_dir():
            raise
        _require_unsupported(error, path, "flush folders: a power failure may lose the newest files")
    finally:
        os.close(handle)


def _require_unsupported(error: OSError, path: Path, what: str) -> None:
    """Say once what a file system cannot do; raise an error that says something else."""
    if error.errno not in _UNSUPPORTED:
        raise OSError(error.errno, error.strerror, str(path)) from error
    _note_once(f"this file system cannot {what}")


@cache
def _note_once(text: str) -> None:
    tqdm.write(text, file=sys.stderr)  # above the progress bar, if there is one


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Let an OSError in the block name `path`, not a temporary file or, as a full disk's, nothing."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def _neighbour(path: Path) -> Path:
    """Return a hidden name beside `path` that no other process has."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")
