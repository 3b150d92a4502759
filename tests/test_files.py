"""Files and folders arrive whole, or not at all."""

import errno
import fcntl
import os
import resource
import stat
import subprocess
import sys
import tempfile
import threading
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest

from l3paper.files import (
    _note_once,
    atomic_folder,
    atomic_write,
    cache_folder,
    locked,
    require_replaceable,
    require_writable,
)


def content(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def write(path, text, error=None):
    with atomic_write(path) as file:
        file.write(text)
        if error:
            raise error


def fill(path, text, error=None):
    with atomic_folder(path) as new:
        (new / "part").write_text(text)
        if error:
            raise error


@pytest.mark.parametrize(("mode", "text"), [("w", "new: ü\n"), ("wb", b"\x00\xff")])
def test_write_replaces_the_file_and_makes_its_folder(tmp_path, mode, text):
    path = tmp_path / "deep" / "er" / "file"
    for written in (2 * text, text):
        with atomic_write(path, mode) as file:
            file.write(written)
    assert content(tmp_path) == {"deep/er/file": text if mode == "wb" else text.encode()}


def test_write_shows_nothing_before_its_end(tmp_path):
    with atomic_write(tmp_path / "file") as file:
        file.write("new")
        file.flush()
        assert not (tmp_path / "file").exists()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("before", [{}, {"file": b"old"}], ids=["nothing before", "a file before"])
def test_failed_write_leaves_all_as_it_was(tmp_path, before, error):
    for name, old in before.items():
        (tmp_path / name).write_bytes(old)
    with pytest.raises(error):
        write(tmp_path / "file", "new", error)
    assert content(tmp_path) == before


def test_folder_replaces_whole(tmp_path):
    with atomic_folder(tmp_path / "a" / "b") as new:
        (new / "old").write_text("1")
        assert not (tmp_path / "a" / "b").exists()
    assert content(tmp_path) == {"a/b/old": b"1"}
    with atomic_folder(tmp_path / "a" / "b") as new:
        (new / "new").write_text("2")
        assert content(tmp_path / "a" / "b") == {"old": b"1"}
    assert content(tmp_path) == {"a/b/new": b"2"}
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("before", [{}, {"old": b"1"}], ids=["nothing before", "a folder before"])
def test_failed_folder_leaves_all_as_it_was(tmp_path, before, error):
    path = tmp_path / "folder"
    for name, old in before.items():
        path.mkdir()
        (path / name).write_bytes(old)
    with pytest.raises(error):
        fill(path, "new", error)
    assert [p.name for p in tmp_path.iterdir()] == ["folder"] * len(before)
    assert content(tmp_path) == {f"folder/{name}": old for name, old in before.items()}


def test_permissions_are_the_ordinary_ones(tmp_path):
    (tmp_path / "plain file").touch()
    (tmp_path / "plain folder").mkdir()
    with atomic_write(tmp_path / "file"), atomic_folder(tmp_path / "folder"):
        pass
    for kind in ("file", "folder"):
        assert (tmp_path / kind).stat().st_mode == (tmp_path / f"plain {kind}").stat().st_mode


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"L3_CACHE": "/one", "XDG_CACHE_HOME": "/two"}, "/one"),
        ({"L3_CACHE": "", "XDG_CACHE_HOME": "/two"}, "/two/l3paper"),
        ({"XDG_CACHE_HOME": "/two"}, "/two/l3paper"),
        ({"XDG_CACHE_HOME": ""}, "/home/me/.cache/l3paper"),
        ({}, "/home/me/.cache/l3paper"),
    ],
)
def test_cache_folder_follows_the_environment(monkeypatch, variables, expected):
    for name in ("L3_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ({"HOME": "/home/me"} | variables).items():
        monkeypatch.setenv(name, value)
    assert cache_folder() == Path(expected)


# Links, pipes and devices


def test_the_target_of_a_link_is_replaced_and_the_link_stays(tmp_path):
    for make in (write, fill):
        link, target = tmp_path / make.__name__, tmp_path / "elsewhere" / make.__name__
        link.symlink_to(target)
        for text in ("old", "new"):  # the target is missing, then it is there
            make(link, text)
        assert link.readlink() == target
    assert content(tmp_path / "elsewhere") == {"write": b"new", "fill/part": b"new"}
    assert {path.name for path in tmp_path.iterdir()} == {"write", "fill", "elsewhere"}


def test_a_pipe_is_written_through(tmp_path):
    pipe, read = tmp_path / "pipe", []
    os.mkfifo(pipe)
    require_writable(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()), daemon=True)
    reader.start()
    write(pipe, "text")
    reader.join(10)
    assert read == ["text"]
    assert [path.is_fifo() for path in tmp_path.iterdir()] == [True]
    with pytest.raises(NotADirectoryError, match="pipe"):
        fill(pipe, "text")
    assert [path.is_fifo() for path in tmp_path.iterdir()] == [True]


def device(path, major, minor):
    """Make a device of the test's own: it behaves as the machine's, and may be replaced."""
    if sys.platform != "linux":
        pytest.skip("the numbers are those of Linux")
    try:
        os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(major, minor))
        path.open("w").close()
    except PermissionError:
        pytest.skip("only root can make devices")


def test_a_device_is_written_through_even_by_a_link(tmp_path):
    device(tmp_path / "null", 1, 3)
    (tmp_path / "link").symlink_to("null")
    for name in ("null", "link"):
        require_writable(tmp_path / name)
        write(tmp_path / name, "text")
    assert (tmp_path / "null").is_char_device()
    assert (tmp_path / "link").is_symlink()
    assert len(list(tmp_path.iterdir())) == 2


# Faults of disks and file systems


def test_a_full_device_is_an_error_that_names_it(tmp_path):
    device(tmp_path / "full", 1, 7)
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path}/full'"):
        write(tmp_path / "full", "text")
    assert (tmp_path / "full").is_char_device()


@contextmanager
def at_most_bytes(size):
    """Let no file grow beyond `size`: what writes see is what a full disk does to them."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_the_old_and_names_the_file(tmp_path):
    write(tmp_path / "file", "old")
    fill(tmp_path / "folder", "old")
    for name, make in (("file", write), ("folder", fill)):
        with pytest.raises(OSError, match=f"File too large: '{tmp_path / name}'"), at_most_bytes(4096):
            make(tmp_path / name, "x" * 10_000)
    assert content(tmp_path) == {"file": b"old", "folder/part": b"old"}
    assert {path.name for path in tmp_path.iterdir()} == {"file", "folder"}


@pytest.fixture
def read_only():
    """A folder that cannot be written to; root, who could, is another user meanwhile."""
    root = os.geteuid() == 0
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o555)
        try:
            if root:
                os.seteuid(65534)
        except PermissionError:
            pytest.skip("this root cannot be another user")
        try:
            yield Path(folder)
        finally:
            if root:
                os.seteuid(0)
            os.chmod(folder, 0o755)


def test_a_read_only_folder_is_named_before_and_while_writing(read_only):
    place = read_only / "new"
    for require in (require_writable, require_replaceable):
        with pytest.raises(ValueError, match=f"'{place}' cannot be written: .*Permission denied"):
            require(place)
    for make in (write, fill):
        with pytest.raises(PermissionError, match=f"Permission denied: '{place}'"):
            make(place, "text")


def failing(function, number, fails=lambda *arguments: True):
    """A stub of an os function, on a file system that answers with this error number."""

    def stub(handle, *arguments):
        if fails(handle):
            raise OSError(number, os.strerror(number))
        return function(handle, *arguments)

    return stub


def is_folder(handle):
    return stat.S_ISDIR(os.fstat(handle).st_mode)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_that_cannot_flush_folders_is_noted(tmp_path, monkeypatch, capsys, number):
    _note_once.cache_clear()
    monkeypatch.setattr(os, "fsync", failing(os.fsync, number, is_folder))
    fill(tmp_path / "a", "text")
    assert capsys.readouterr().err.startswith("this file system cannot flush folders: a power")
    assert content(tmp_path) == {"a/part": b"text"}
    monkeypatch.setattr(os, "fsync", failing(os.fsync, errno.EIO, is_folder))
    with pytest.raises(OSError, match=f"Input/output error: '{tmp_path / 'c'}'"):
        fill(tmp_path / "c", "text")


def test_files_that_cannot_be_flushed_are_errors(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", failing(os.fsync, errno.EINVAL))
    for make in (write, fill):
        with pytest.raises(OSError, match=f"Invalid argument: '{tmp_path / 'new'}'"):
            make(tmp_path / "new", "text")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EBADF, errno.ENOLCK])
def test_a_file_system_without_locks_is_noted_once(tmp_path, monkeypatch, capsys, number):
    _note_once.cache_clear()
    monkeypatch.setattr(fcntl, "flock", failing(fcntl.flock, number))
    for _ in range(2):
        with locked(tmp_path):
            pass
    said = capsys.readouterr().err
    assert said == "this file system cannot lock folders: runs on one folder are not held apart\n"


def test_another_error_of_a_lock_names_the_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", failing(fcntl.flock, errno.EACCES))
    with pytest.raises(PermissionError, match=tmp_path.name), locked(tmp_path):
        pass


# Places and locks


MOUNTS = [place for place in ("/proc",) if os.path.ismount(place)]


@pytest.mark.parametrize("place", [".", "..", "link", *MOUNTS])
def test_the_working_folder_and_mount_points_are_not_replaceable(tmp_path, monkeypatch, place):
    (tmp_path / "link").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"'{place}' cannot be replaced"):
        require_replaceable(Path(place))


def test_a_folder_is_not_a_place_for_a_file(tmp_path):
    with pytest.raises(ValueError, match="it is a folder"):
        require_writable(tmp_path)


def test_a_lock_lets_one_process_in_at_a_time(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from l3paper.files import locked\n"
        "with locked(Path(sys.argv[1])): print(time.monotonic(), flush=True); time.sleep(0.3); "
        "print(time.monotonic(), flush=True)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "cache")]
    runs = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    stays = sorted(tuple(map(float, run.communicate()[0].split())) for run in runs)
    assert all(first[1] <= second[0] for first, second in pairwise(stays))


def test_a_loop_of_links_is_refused_in_one_line(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for use in (require_writable, require_replaceable, lambda path: write(path, "text")):
        with pytest.raises((ValueError, OSError), match="loop"):
            use(tmp_path / "loop")


def test_what_accepts_no_writing_is_refused_beforehand(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(ValueError, match="pipe' cannot be written: it does not accept writing"):
        require_writable(tmp_path / "pipe")
