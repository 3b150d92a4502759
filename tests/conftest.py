"""What all tests share: an environment of their own, and two texts."""

# ruff: noqa: E402

import os

for name in ("L3_COMMIT", "L3_FIGURES", "L3_PRESET", "L3_RECORDS", "L3_TEXT", "RANK", "WORLD_SIZE"):
    os.environ.pop(name, None)  # before the package reads them

import signal

import pytest
import torch
from hypothesis import settings

from l3paper.data.streams import load_corpus

# The same examples every time, and no deadline: a busy machine must not fail a test.
settings.register_profile("steady", derandomize=True, deadline=None)
settings.load_profile("steady")

TREES = ("amber", "birch", "cedar", "hazel", "maple", "willow")
WORDS = [f"{tree}{part}" for tree in TREES for part in ("bark", "leaf", "root", "wood")]


@pytest.fixture(scope="session", autouse=True)
def own_environment(tmp_path_factory):
    """A cache of the session's own, one thread, signals as in a terminal."""
    if hasattr(signal, "SIGHUP"):  # which nohup has ignored
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("L3_CACHE", str(tmp_path_factory.mktemp("cache")))
        torch.set_num_threads(1)
        yield


@pytest.fixture(scope="session")
def corpus():
    """The default corpus: Python's standard library under 4096 tokens."""
    return load_corpus()


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    """A small .txt of forty documents of one line each, in which every word follows from the last."""
    path = tmp_path_factory.mktemp("text") / "woods.txt"
    lines = (" ".join((WORDS * 8)[i:140]) for i in range(40))
    path.write_text("\n<|endoftext|>\n".join(lines))
    return path
