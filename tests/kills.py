"""Kill training runs at random moments and resume them: `python tests/kills.py 100`.

However often a run is killed, it must end with the weights and the losses of an undisturbed one, and
leave no checkpoint that is damaged.
"""

import argparse
import json
import multiprocessing
import random
import shutil
import tempfile
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import torch
from tqdm import tqdm

from l3paper.checkpoints.stored import require_intact
from l3paper.files import sha256
from l3paper.train import main

TEXT = "\n<|endoftext|>\n".join(f"one two three four five {i} seven\n" * (20 + i) for i in range(40))
SETTINGS = {
    "vocab-size": 270,
    "depth": 2,
    "n-embd": 32,
    "sequence-len": 16,
    "batch-size": 4,
    "l3-n-emb": 400,
    "l3-k-max": 8,
    "num-iterations": 24,
    "eval-every": 8,
    "eval-tokens": 100,
    "checkpoint-every": 3,
    "device": "cpu",
}
FLAGS = ["--resume", *(f"--{name}={value}" for name, value in SETTINGS.items())]


def kill_and_resume(folder: Path, kills: int, show_progress: bool = False) -> int:
    """Until `kills` have hit; how many runs ended meanwhile, each as the undisturbed one."""
    context = multiprocessing.get_context("forkserver")  # imports once, and forks from there
    context.set_forkserver_preload(["l3paper.train", "torch._dynamo"])  # which the first step needs
    text = folder / "text.txt"
    text.write_text(TEXT)

    def start(run: Path) -> multiprocessing.Process:
        places = "--data", text, "--checkpoint-dir", run / "steps", "--save", run / "model"
        arguments = [*FLAGS, *map(str, places), "--record", str(run / "record.json")]
        process = context.Process(target=_quietly, args=(arguments, run))
        process.start()
        return process

    undisturbed, killed = folder / "undisturbed", folder / "killed"
    for _ in range(2):  # the first makes the tokenizer, the second is as long as those to come
        shutil.rmtree(undisturbed, ignore_errors=True)
        begin = time.perf_counter()
        process = start(undisturbed)
        process.join()
        assert process.exitcode == 0, (undisturbed / "errors.txt").read_text()
    longest = time.perf_counter() - begin
    chance, hits, ended = random.Random(kills), 0, 0
    with tqdm(total=kills, disable=not show_progress, unit="kill") as bar:
        while hits < kills or killed.exists():
            process = start(killed)
            process.join(chance.uniform(0, longest) if hits < kills else None)
            process.kill()
            process.join()
            for checkpoint in (killed / "steps").glob("step-*"):
                require_intact(checkpoint, json.loads((checkpoint / "sums.json").read_text()))
            if process.exitcode < 0:
                hits += 1
                bar.update()
                continue
            assert process.exitcode == 0, (killed / "errors.txt").read_text()
            ours, theirs = outcome(killed), outcome(undisturbed)
            differing = [name for name in theirs if ours.get(name) != theirs[name]]
            assert ours == theirs, f"differs in {', '.join(differing)}"
            ended += 1
            shutil.rmtree(killed)
    return ended


def outcome(run: Path) -> dict:
    """What must not depend on interruptions: the weights, and the record but for its times."""
    record = json.loads((run / "record.json").read_text())
    weights = {name: sha256(run / "model" / f"{name}.safetensors") for name in ("weights", "tables")}
    return weights | {k: v for k, v in record.items() if k not in ("seconds", "tokens_per_second")}


def _quietly(arguments: list[str], run: Path) -> None:
    torch.set_num_threads(1)
    run.mkdir(parents=True, exist_ok=True)
    with open(run / "errors.txt", "w") as errors, redirect_stderr(errors), redirect_stdout(errors):
        raise SystemExit(main(arguments))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("kills", type=int, nargs="?", default=5, help="(default: 5)")
    wanted = parser.parse_args().kills
    with tempfile.TemporaryDirectory() as temporary:
        runs = kill_and_resume(Path(temporary), wanted, show_progress=True)
    print(f"{wanted} kills; {runs} runs ended exactly as the undisturbed one; no damaged checkpoint")
