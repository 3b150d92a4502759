"""What several test modules need: random inputs, tiny runs, damaged files, commands in processes."""

import json
import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
import time
import warnings
from multiprocessing.connection import wait
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from l3paper.allocation import allocation_to_bounds
from l3paper.files import sha256

SIZES = dict(
    vocab_size=300,
    depth=2,
    n_embd=32,
    sequence_len=16,
    batch_size=4,
    num_iterations=8,
    eval_every=3,
    l3_n_emb=500,
    device="cpu",
)
"""A tiny run."""

KINDS = {
    "dense": dict(l3_after_layers=""),
    "tied": dict(l3_n_emb=500, l3_k_max=16),
    "untied": dict(l3_after_layers="0,1", l3_n_emb=500, l3_untied=True, l3_d_emb=24),
    "moe": dict(l3_n_emb=500, l3_k_max=16, stand_in="moe"),
    "engram": dict(l3_n_emb=500, l3_k_max=16, stand_in="engram"),
}


@st.composite
def corpora(draw, max_vocab: int = 12):
    """(vocab_size, documents): up to six documents of ids, some of them empty."""
    vocab_size = draw(st.integers(1, max_vocab))
    document = st_numpy.arrays(np.int64, st.integers(0, 60), elements=st.integers(0, vocab_size - 1))
    return vocab_size, draw(st.lists(document, max_size=6))


@st.composite
def lookup_inputs(draw, tied: bool, max_rows: int = 9):
    """Arguments of a lookup in float64, ready for gradients, on a random ragged allocation."""
    alloc = draw(st.lists(st.integers(1, max_rows), min_size=1, max_size=8))
    positions = draw(st.integers(0, 40))
    d_in, d_emb = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    seed = draw(st.integers(0, 2**31))
    return make_inputs(alloc, positions, d_in, d_in if tied else d_emb, tied, seed)


def make_inputs(alloc, positions, d_in, d_emb, tied, seed):
    random = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=random, dtype=torch.float64).requires_grad_()

    token_ids = torch.randint(len(alloc), (positions,), generator=random)
    keys = normal(sum(alloc), d_in)
    values = keys if tied else normal(sum(alloc), d_emb)
    return normal(positions, d_in), token_ids, allocation_to_bounds(alloc), keys, values


def rewrite(folder, name, content, sums=True):
    """Replace a file, by default with its sum, as a stranger can."""
    (folder / name).write_bytes(content)
    if sums:
        old = json.loads((folder / "sums.json").read_text())
        (folder / "sums.json").write_text(json.dumps(old | {name: sha256(folder / name)}))


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


# To start an interpreter and import PyTorch takes seconds; to fork one that has done so, a tenth.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["l3paper.train", "l3paper.lookup"])


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def run_module(name, arguments, environment):
    """What `python -m NAME ARGUMENTS` does in an environment that has these variables, too."""
    (done,) = run_together([(name, arguments, environment)])
    return done


def run_ranks(size, program, arguments):
    """What torchrun does: that many processes with one group; the program is a module or a script.

    Those that still run when one has failed are ended.
    """
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": str(size)}
    ranks = [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]
    done = run_together([(program, arguments, rank) for rank in ranks])
    return Done(
        next((each.returncode for each in done if each.returncode), 0),
        "".join(each.stdout for each in done),
        "".join(each.stderr for each in done),
    )


def run_together(commands, seconds=200):
    """Run (program, arguments, environment) at once; when one fails, or in the end, end the others."""
    with tempfile.TemporaryDirectory() as folder:
        told = [[Path(folder, f"{i} {to}") for to in ("out", "error")] for i in range(len(commands))]
        processes = []
        for (program, arguments, environment), streams in zip(commands, told, strict=True):
            settings = os.environ | {"OMP_NUM_THREADS": "1"} | environment
            given = str(program), [str(x) for x in arguments], settings, os.getcwd(), streams
            processes.append(_CONTEXT.Process(target=_run, args=given))
            processes[-1].start()
        latest = time.monotonic() + seconds
        while any(process.is_alive() for process in processes):
            failed = any(process.exitcode for process in processes)
            patience = min(5, seconds) if failed else latest - time.monotonic()
            alive = [process.sentinel for process in processes if process.is_alive()]
            if not wait(alive, timeout=max(0, patience)):
                for process in processes:
                    process.kill()
        for process in processes:
            process.join()
        texts = [[stream.read_text() for stream in streams] for streams in told]
        return [Done(p.exitcode, *text) for p, text in zip(processes, texts, strict=True)]


def _run(program, arguments, environment, folder, streams):
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))  # PyTorch has read the variable already
    for number, stream in enumerate(streams, start=1):
        os.dup2(os.open(stream, os.O_WRONLY | os.O_CREAT), number)
    warnings.filterwarnings("ignore", "'l3paper.* found in sys.modules", RuntimeWarning)
    sys.argv = [program, *arguments]
    if program.endswith(".py"):
        runpy.run_path(program, run_name="__main__")
    else:
        runpy.run_module(program, run_name="__main__", alter_sys=True)


def as_flags(settings):
    return [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
