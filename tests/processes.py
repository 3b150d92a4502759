"""The package's command lines, each in a fresh process that finds PyTorch imported already.

To start an interpreter and import PyTorch takes seconds; to fork one that has done so, a tenth of one.
"""

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

import torch

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["l3paper.steps", "l3paper.lookup"])


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
