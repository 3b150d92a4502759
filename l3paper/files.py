"""Where files go and how they get there: whole, or not at all."""

import errno
import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

from l3paper.errors import note_once

try:
    import fcntl
except ImportError:
    fcntl = None

_UNSUPPORTED = {
    getattr(errno, name) for name in ("EINVAL", "ENOTSUP", "EOPNOTSUPP", "ENOSYS", "EBADF", "ENOLCK")
}
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
    if path.exists() and not path.is_file():
        with _naming(path, path), open(path, mode, encoding=encoding) as file:
            yield file
        return
    target = Path(os.path.realpath(path))
    temporary = _neighbour(target)
    with _naming(path, temporary):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, mode, encoding=encoding) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a new temporary folder; flush it to the disk and move it to `path` when the block succeeds.

    A file or folder at `path` is replaced; if `path` is a link, its target is. When the block raises,
    `path` is left alone. An OSError with an error number names `path` or a file in it.
    """
    target = Path(os.path.realpath(path))
    temporary, outdated = _neighbour(target), _neighbour(target)
    with _naming(path, temporary):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        try:
            yield temporary
            for part in (*temporary.iterdir(), temporary):
                _sync(part)
            if target.is_dir():
                os.replace(target, outdated)
            elif target.is_file():
                target.unlink()
            os.replace(temporary, target)
            _sync(target.parent)
        finally:
            if outdated.exists() and not target.exists():
                os.replace(outdated, target)
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.rmtree(outdated, ignore_errors=True)


def remove_folder(path: Path) -> None:
    """Rename a folder, then delete it: a killed process leaves no half of it under its name."""
    outdated = _neighbour(path)
    os.replace(path, outdated)
    shutil.rmtree(outdated)


@contextmanager
def locked(folder: Path, wait: bool = True) -> Iterator[None]:
    """Let one process at a time into the block for `folder`, which is created.

    The others wait or, without `wait`, get a BlockingIOError. Windows and some network file systems
    have no such locks: there, a line on stderr says that runs are not held apart.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            if fcntl is None:
                raise OSError(errno.ENOSYS, "this system has no flock")
            handle = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, handle)
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
            note_once("this file system has no locks: two runs on one folder are not held apart")
        yield


def require_writable(path: Path) -> None:
    """Raise ValueError, naming `path`, unless `atomic_write` can write a file there."""
    try:
        if path.is_dir():
            raise IsADirectoryError("it is a folder")
        if not path.exists() or path.is_file():
            _probe(Path(os.path.realpath(path)).parent)
        elif not os.access(path, os.W_OK):
            raise PermissionError("it does not accept writing")
    except OSError as error:
        raise ValueError(f"{str(path)!r} cannot be written: {error}") from error


def require_replaceable(folder: Path) -> None:
    """Raise ValueError, naming `folder`, unless `atomic_folder` can put a folder there.

    The working folder and its parents are refused, since a shell would stay in the replaced folder;
    so are mount points, which cannot be renamed.
    """
    target = Path(os.path.realpath(folder))
    if Path.cwd().is_relative_to(target) or target.is_mount():
        raise ValueError(
            f"{str(folder)!r} cannot be replaced: it is a mount point, or the working folder is in it; "
            "name a new folder inside it"
        )
    try:
        _probe(target.parent)
    except OSError as error:
        raise ValueError(f"{str(folder)!r} cannot be written: {error}") from error


def sha256(path: Path) -> str:
    """Return the digest of a file's content, which is read piece by piece."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _probe(folder: Path) -> None:
    """Create `folder`, and a file in it for a moment; raise OSError if that fails."""
    folder.mkdir(parents=True, exist_ok=True)
    probe = _neighbour(folder / "probe")
    probe.touch()
    probe.unlink()


def _sync(path: Path) -> None:
    """Flush a file's content, or a folder's names, to the disk; Windows cannot open folders."""
    if path.is_dir() and fcntl is None:
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    except OSError as error:
        if not (path.is_dir() and error.errno in _UNSUPPORTED):
            raise
        note_once("this file system cannot flush folders: a power failure may lose the newest files")
    finally:
        os.close(handle)


@contextmanager
def _naming(path: Path, temporary: Path) -> Iterator[None]:
    """Let an OSError in the block name `path`, rather than `temporary` or, as a full disk's, nothing.

    Errors of a connection are left alone: they are about something else.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None or isinstance(error, ConnectionError):
            raise
        name = str(error.filename or path).replace(str(temporary), str(path))
        raise OSError(error.errno, error.strerror, name) from error


def _neighbour(path: Path) -> Path:
    """Return a hidden name beside `path` that no other process has."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")
