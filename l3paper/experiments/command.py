"""Recorded comparisons: `python -m l3paper.experiments NAME` runs one experiment of the catalogue.

Every run adds a line to the experiment's file in figures/data/runs when it ends, and a run that has a
record is not repeated. An experiment that was stopped resumes with the missing runs, and the runs that
were in training resume from their last checkpoints.
"""

import argparse
import gc
import hashlib
import multiprocessing
import os
import shutil
import signal
import statistics
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from l3paper.checkpoints.model import save_model
from l3paper.checkpoints.run import Checkpoints
from l3paper.data.streams import load_corpus
from l3paper.errors import at_least, command, nonempty_path
from l3paper.experiments.catalogue import EXPERIMENTS
from l3paper.experiments.report import summary
from l3paper.experiments.runs import RUNS, add_record, read_records, read_runs, run_name
from l3paper.experiments.search import LR_SCALES, Family, read_families, run_at
from l3paper.files import cache_folder, locked, require_writable
from l3paper.records import for_stdout
from l3paper.train import Diverged, train
from l3paper.training.config import PRESETS, TrainConfig
from l3paper.training.signals import Interrupted

PROGRAM = "python -m l3paper.experiments"

EVERY = 500
"""Steps between checkpoints, besides the one that a signal causes: a table and its optimizer state
take seconds to write."""

PATIENCE = 20
"""Seconds that stopped runs have to write a checkpoint, before they are killed."""


def run_experiment(
    name: str, preset: str, data: str, seeds: int | None, jobs: int, folder: Path
) -> dict[str, Family]:
    """Train every run that has no record yet, `jobs` at a time, and return all families.

    `seeds` is the planned number of each family if it is None. Raises ValueError for data that cannot
    be used, and for records made with another text.
    """
    plan, path = EXPERIMENTS[name].plan(preset, data, seeds), folder / f"{name}.jsonl"
    require_writable(path)
    # Build every corpus once, before the runs compete for it.
    sizes = {(family.config.vocab_size, family.config.data_bytes) for family in plan.values()}
    texts = {load_corpus(data, *size).sha256 for size in sizes}
    read = partial(read_runs, folder=folder, texts=texts)
    families, missing = read_families(plan, read)
    least = []
    for config, searched, number in (plan[name] for name in plan if name not in families):
        start = families.get(config.init_from)
        least += [run_at(searched, scale, 0, start) for scale in LR_SCALES]
        least += [run_at(config, config.lr_scale, seed, start) for seed in range(number)]
    recorded = read_records(folder)
    unrecorded = {run_name(config): config for config in least}
    unrecorded = [config for run, config in unrecorded.items() if run not in recorded]
    print(prediction(unrecorded, list(recorded.values()), jobs), file=sys.stderr)
    running: dict[Future, str] = {}
    with _workers(jobs) as pool, tqdm(total=len(unrecorded), unit="run", desc=name) as bar:
        while missing:
            wanted = {run_name(run): run for error in missing for run in error.runs}
            bar.total = max(bar.total, bar.n + len(wanted))  # the search may have grown
            for run in [run for run in wanted if run not in running.values()]:
                if len(running) < jobs:  # more would wait in the workers, and start after a Ctrl-C
                    running[_submit(pool, wanted[run], path)] = run
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                del running[done]
                done.result()
                bar.update()
            families, missing = read_families(plan, read)
    return families


def prediction(missing: list[TrainConfig], recorded: list[dict], jobs: int) -> str:
    """How long the missing runs will take, if recorded ones took as long per token and width."""

    def size(config: TrainConfig) -> int:
        return config.num_iterations * config.tokens_per_step * config.model_config().n_embd

    speeds = [r["seconds"] / size(TrainConfig(**r["config"])) for r in recorded if "diverged" not in r]
    if not missing or not speeds:
        return f"up to {len(missing)} runs to train"
    hours = statistics.median(speeds) * sum(map(size, missing)) / jobs / 3600
    return (
        f"up to {len(missing)} runs to train, about {hours:.1f} hours, judging by {len(speeds)} records"
    )


def make_run(config: TrainConfig, path: Path) -> None:
    """Train one run, or resume it, and add its record to the file, unless the folder has it."""
    name = run_name(config)
    with _unfinished(f"{path.parent.absolute()} {name}") as checkpoints:
        if name not in read_records(path.parent):
            if config.init_from:
                config = replace(config, init_from=str(make_start(config, path.parent)))
            try:
                record = train(config, show_progress=False, checkpoints=checkpoints).record
            except Diverged as error:
                record = error.record
            gc.collect()  # compiling leaves reference cycles that hold whole tables
            add_record(path, name, record)


def make_start(config: TrainConfig, folder: Path) -> Path:
    """The model of the recorded run that `config.init_from` names, as a folder of the cache.

    Records hold no weights. So, if it is not there, that run is trained again.
    """
    record = read_records(folder)[config.init_from]
    model = cache_folder() / "models" / record["corpus"]["sha256"][:24] / config.init_from
    with _unfinished(str(model)) as checkpoints:
        if not model.exists():
            start = replace(TrainConfig(**record["config"]), data=config.data, device=config.device)
            run = train(start, show_progress=False, checkpoints=checkpoints)
            save_model(model, run.model, run.corpus.tokenizer)
    return model


@contextmanager
def _unfinished(what: str) -> Iterator[Checkpoints]:
    """Yield where a run leaves checkpoints, which are removed when the block succeeds.

    Another experiment may share the run and be training it: then this waits.
    """
    folder = cache_folder() / "unfinished" / hashlib.sha256(what.encode()).hexdigest()[:24]
    with locked(folder):
        yield Checkpoints(folder / "run", EVERY, resume=True)
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _workers(jobs: int) -> Iterator[ProcessPoolExecutor]:
    """A pool of processes. If the block raises, they stop; a run in training leaves a checkpoint."""
    others = multiprocessing.active_children()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, initializer=_start_worker) as pool:
        try:
            yield pool
        except BaseException:
            workers = [child for child in multiprocessing.active_children() if child not in others]
            for worker in workers:
                worker.terminate()
            for worker in workers:
                worker.join(PATIENCE)
                worker.kill()
            raise


def _submit(pool: ProcessPoolExecutor, config: TrainConfig, path: Path) -> Future:
    """Submit a run. The worker that may start for it inherits that Ctrl-C is blocked.

    A terminal sends Ctrl-C to all processes; the command stops its workers itself.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        return pool.submit(_work, config, path)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return pool.submit(_work, config, path)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _work(config: TrainConfig, path: Path) -> None:
    """Make a run in a worker, which ends if a signal stops the run.

    To return to the pool could be to wait forever, for a lock of a worker that was terminated.
    """
    try:
        make_run(config, path)
    except Interrupted:
        os._exit(1)


def _start_worker() -> None:
    torch.set_num_threads(1)  # so that sums are the same, however many runs share the machine
    tqdm.set_lock(threading.RLock())  # a worker that is terminated would leak one between processes
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process when the command has ended, in whatever way."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Run a recorded comparison. Records that exist are not made again: after an "
        "interruption, the same command resumes.",
        epilog="\n".join(f"{name}: {e.question} ({e.section})" for name, e in EXPERIMENTS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", choices=EXPERIMENTS)
    parser.add_argument("--preset", choices=PRESETS, default="laptop", help="(default: laptop)")
    parser.add_argument("--data", default="stdlib", help="as for l3paper.train (default: stdlib)")
    parser.add_argument("--seeds", type=int, metavar="N", help="(default: as the experiment plans)")
    cores = 1 if torch.cuda.is_available() else os.cpu_count() or 1
    parser.add_argument(
        "--jobs", type=int, default=cores, metavar="N", help=f"runs at a time (default here: {cores})"
    )
    parser.add_argument(
        "--folder", type=nonempty_path, default=RUNS, help="(default: figures/data/runs)"
    )
    return parser


@command(PROGRAM)
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    flags = _parser().parse_args(arguments)
    experiment = EXPERIMENTS[flags.name]
    at_least(1, seeds=1 if flags.seeds is None else flags.seeds, jobs=flags.jobs)
    families = run_experiment(
        flags.name, flags.preset, flags.data, flags.seeds, flags.jobs, flags.folder
    )
    print(experiment.question)
    print(for_stdout(summary(families)))
    return 0
