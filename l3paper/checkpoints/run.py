"""A training run on disk: checkpoints from which it resumes as if it had never stopped.

Each is a folder inside the run's own: a saved model, so that one can generate from it, and beside it
the optimizer's tensors and all that was measured so far. Training draws no random numbers but those
that the seed and the step decide, so their generators are not kept. Nothing is ever unpickled.
"""

import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from l3paper.checkpoints.model import (
    FILES,
    L3_TABLES,
    WEIGHTS,
    new_checkpoint,
    set_bounds,
    write_model,
    write_tensors,
)
from l3paper.checkpoints.stored import (
    MOST_PROGRESS,
    read_json,
    read_tensors,
    require_intact,
    require_like,
    require_state,
)
from l3paper.errors import at_least
from l3paper.files import locked, remove_folder
from l3paper.gpt import GPT
from l3paper.parts.optimizer import MuonAdamW
from l3paper.training.distributed import sharded_like, unsharded

OPTIMIZER, PROGRESS = "optimizer.safetensors", "progress.json"

MOMENTS = {"muon": ("momentum_buffer",), "adamw": ("step", "exp_avg", "exp_avg_sq")}
"""What each part of the optimizer keeps for a parameter."""


@dataclass(frozen=True)
class Checkpoints:
    """Where and how often a run leaves checkpoints. Raises ValueError for numbers below 1."""

    folder: Path
    every: int = 100
    """Steps from one to the next."""
    keep: int = 2
    resume: bool = False
    """Resume from the newest intact checkpoint; start from the beginning if there is none."""

    def __post_init__(self):
        at_least(1, checkpoint_every=self.every, checkpoint_keep=self.keep)


@dataclass
class Progress:
    """What a run has measured so far, step by step."""

    losses: list[float] = field(default_factory=list)
    """Training loss of every step, in nats per token."""
    seconds: list[float] = field(default_factory=list)
    """Time of every step."""
    evaluations: list[dict] = field(default_factory=list)

    @property
    def step(self) -> int:
        """Steps that are done: where the run stands in the data and on its schedule."""
        return len(self.losses)


class RunFolder:
    """The checkpoints of one run, described by `identity`, which a later part of it must equal."""

    def __init__(self, settings: Checkpoints, identity: dict):
        self.settings, self.identity = settings, json.loads(json.dumps(identity))
        self.damaged: set[Path] = set()

    def begun(self) -> bool:
        """Whether there are checkpoints, intact or damaged."""
        return bool(_checkpoints(self.settings.folder))

    def save(
        self,
        model: GPT,
        optimizer: MuonAdamW,
        tokenizer: Tokenizer,
        progress: Progress,
        writes: bool = True,
        prune: bool = True,
    ) -> None:
        """Write a checkpoint, whole or not at all, and remove what is older than the newest `keep`.

        Those do not include damaged checkpoints nor, if the run was rewound, later ones. All processes
        that train one model call this, and the one with `writes` writes. Raises OSError if there is no
        room.
        """
        state = unsharded(model.state_dict(), writes)
        tensors = unsharded(optimizer_tensors(optimizer), writes)
        path = self.settings.folder / f"step-{progress.step:09}"
        if not writes or (path.exists() and path not in self.damaged):
            return  # replacing an intact checkpoint by the same would put it at risk
        with new_checkpoint(path) as new:
            write_model(new, model, tokenizer, state)
            write_tensors(new / OPTIMIZER, tensors)
            (new / PROGRESS).write_text(json.dumps({"run": self.identity, **asdict(progress)}))
        self.damaged.discard(path)
        if prune:
            done = [f for f in _checkpoints(self.settings.folder) if f <= path]
            kept = [f for f in done if f not in self.damaged][-self.settings.keep :]
            for outdated in done[: done.index(kept[0])]:
                remove_folder(outdated)

    def restore(self, model: GPT, optimizer: MuonAdamW) -> Progress:
        """Set model and optimizer to the state of the newest intact checkpoint.

        A damaged one is reported on stderr and skipped; if there are no checkpoints, nothing changes.
        Raises ValueError if none of several is intact, and for one of another run.
        """
        found = _checkpoints(self.settings.folder)
        for folder in reversed(found):
            try:
                require_intact(folder, (*FILES, OPTIMIZER, PROGRESS))
                run, progress = _read_progress(folder)
                weights = read_tensors(folder / WEIGHTS) | read_tensors(folder / L3_TABLES)
                tensors = read_tensors(folder / OPTIMIZER)
            except (OSError, ValueError) as error:
                print(f"checkpoint {folder} is skipped: {error}", file=sys.stderr)
                self.damaged.add(folder)
                continue
            self._require_same(folder, run)
            try:
                own = model.state_dict()
                require_state(weights, own)
                set_bounds(model, weights)
                model.load_state_dict({k: sharded_like(t, own[k]) for k, t in weights.items()})
                load_optimizer_tensors(optimizer, tensors)
            except ValueError as error:
                raise ValueError(f"checkpoint {str(folder)!r} does not fit its run: {error}") from error
            return progress
        if found:
            raise ValueError(f"no checkpoint in {str(self.settings.folder)!r} is intact")
        return Progress()

    def _require_same(self, folder: Path, run: dict) -> None:
        differing = [
            f"{name} = {run.get(name)!r}, not {self.identity.get(name)!r}"
            for name in self.identity | run
            if run.get(name) != self.identity.get(name)
        ]
        if differing:
            raise ValueError(f"checkpoint {str(folder)!r} is of a run with {', '.join(differing)}")


@contextmanager
def run_folder(settings: Checkpoints) -> Iterator[None]:
    """Keep the folder for this process while the block runs, and clear what killed processes left.

    Raises ValueError if another process has it, and if it holds checkpoints that are not to be resumed.
    """
    folder = settings.folder
    with locked(folder, wait=False):
        if _checkpoints(folder) and not settings.resume:
            raise ValueError(
                f"{str(folder)!r} holds checkpoints: resume that run, or take another folder"
            )
        for leftover in folder.glob(".step-" + "[0-9]" * 9 + ".*"):
            shutil.rmtree(leftover)
        yield


def _checkpoints(folder: Path) -> list[Path]:
    """From the oldest to the newest."""
    return sorted(folder.glob("step-" + "[0-9]" * 9))


def _read_progress(checkpoint: Path) -> tuple[dict, Progress]:
    """The run's identity and its progress. Raises ValueError for measurements that are not of it."""
    written = read_json(checkpoint / PROGRESS, MOST_PROGRESS)
    step = int(checkpoint.name.removeprefix("step-"))
    match written:
        case {
            "run": dict(run),
            "losses": list(losses),
            "seconds": list(seconds),
            "evaluations": [_, *_] as evaluations,
        } if len(written) == 4 and all(isinstance(evaluation, dict) for evaluation in evaluations):
            names = "step", "tokens", "loss", "bits_per_byte"
            numbers = losses + seconds + [e.get(name) for e in evaluations for name in names]
        case _:
            raise ValueError(f"{PROGRESS} does not hold a run, its losses, seconds and evaluations")
    if not all(type(x) in (int, float) and abs(x) <= sys.float_info.max for x in numbers):
        raise ValueError(f"{PROGRESS} holds a value that is not a finite number")
    if not len(losses) == len(seconds) == step or not all(x > 0 for x in seconds):
        raise ValueError(f"{PROGRESS} does not hold the losses and times of {step} steps")
    return run, Progress(losses, seconds, evaluations)


def optimizer_tensors(optimizer: MuonAdamW) -> dict[str, Tensor]:
    """The optimizer's state as PART.PARAMETER.NAME, without the rates, which the schedule sets.

    A parameter that no step has used, such as an expert's, has zeros, with which its state will start.
    """
    tensors = {}
    for part, names in MOMENTS.items():
        inner = getattr(optimizer, part)
        parameters = (p for group in inner.param_groups for p in group["params"])
        for number, parameter in enumerate(parameters):
            state = inner.state.get(parameter) or {
                name: torch.zeros(()) if name == "step" else torch.zeros_like(parameter)
                for name in names
            }
            tensors |= {f"{part}.{number}.{name}": state[name] for name in names}
    return tensors


def load_optimizer_tensors(optimizer: MuonAdamW, tensors: dict[str, Tensor]) -> None:
    """Load what `optimizer_tensors` returned for the same parameters; other names are ignored.

    Raises ValueError if a tensor is missing or not of its parameter's shape and type: the optimizer
    itself would not check.
    """
    state = optimizer.state_dict()
    for key, like in optimizer_tensors(optimizer).items():
        require_like(key, tensors.get(key), like)
        part, number, name = key.split(".")
        tensor = tensors[key].clone()  # the file may be removed while the run lasts
        state[part]["state"].setdefault(int(number), {})[name] = sharded_like(tensor, like)
    optimizer.load_state_dict(state)
