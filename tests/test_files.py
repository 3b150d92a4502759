"""Files and folders arrive whole, or not at all."""

import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from l3paper.files import atomic_folder, atomic_write, cache_folder


def content(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def write_and_fail(path, error):
    with atomic_write(path) as file:
        file.write("new")
        raise error


def fill_and_fail(path, error):
    with atomic_folder(path) as new:
        (new / "new").write_text("2")
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
        write_and_fail(tmp_path / "file", error)
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
        fill_and_fail(path, error)
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
