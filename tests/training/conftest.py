"""Tiny runs that the tests of training share."""

import pytest

from helpers import SIZES, as_flags
from l3paper.train import main, train
from l3paper.training.config import TrainConfig

KINDS = {
    "dense": dict(l3_after_layers=""),
    "l3 tied": dict(l3_k_max=16),
    "l3 untied": dict(l3_after_layers="0,1", l3_untied=True, l3_d_emb=24, l3_k_max=16),
}


@pytest.fixture(scope="session")
def tiny(text_file):
    """The configuration of a kind, with changes."""
    settings = dict(data=str(text_file), eval_tokens=200, **SIZES)
    return lambda kind, **changes: TrainConfig(**settings | KINDS[kind] | changes)


@pytest.fixture(scope="session")
def run_of(tiny):
    """The finished tiny run of a kind; every kind runs once."""
    runs = {}

    def get(kind):
        if kind not in runs:
            runs[kind] = train(tiny(kind), show_progress=False)
        return runs[kind]

    return get


@pytest.fixture
def refused(text_file, capsys):
    """Call the command line with bad flags; the exit code and what it says on stderr.

    What is refused is refused before the first step, so nothing introduces a training.
    """

    def call(*flags):
        try:
            code = main(["--data", str(text_file), *as_flags(SIZES), *flags])
        except SystemExit as end:
            code = end.code
        written = capsys.readouterr()
        assert written.out == ""
        assert "training: " not in written.err
        return code, written.err

    return call
