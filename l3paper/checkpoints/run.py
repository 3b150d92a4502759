"""A training run on disk: checkpoints from which it resumes as if it had never stopped.

Each is a folder inside the run's own: a saved model, so that one can generate from it, and beside it
the optimizer's tensors, the states of the random generators, and all that was measured so far. Nothing
is ever unpickled.
"""

import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from l3paper.checkpoints.model import (
    FILES,
    L3_TABLES,
    WEIGHTS,
    load_state,
    new_checkpoint,
    write_model,
    write_tensors,
)
from l3paper.checkpoints.stored import (
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
from l3paper.training.distributed import divided_like, whole

OPTIMIZER, PROGRESS = "optimizer.safetensors", "progress.json"

MOST_PROGRESS = 2**30
"""Bytes that progress.json may have: enough for more than ten million steps."""


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
        self.newest = -1
        """The step of the newest intact checkpoint."""
        self.damaged: set[Path] = set()

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
        if self.newest == progress.step:  # it is there, and replacing it would put it at risk
            return
        self.newest = progress.step
        state = whole(model.state_dict(), writes)
        tensors = whole(optimizer_tensors(optimizer), writes)
        if not writes:
            return
        path = self.settings.folder / f"step-{progress.step:09}"
        with new_checkpoint(path) as new:
            write_model(new, model, tokenizer, state)
            write_tensors(new / OPTIMIZER, tensors | _random_states())
            (new / PROGRESS).write_text(json.dumps({"run": self.identity, **asdict(progress)}))
        self.damaged.discard(path)
        if prune:
            earlier = [f for f in _checkpoints(self.settings.folder) if _step(f) <= progress.step]
            kept = [f for f in earlier if f not in self.damaged][-self.settings.keep :]
            for outdated in earlier[: earlier.index(kept[0])]:
                remove_folder(outdated)

    def restore(self, model: GPT, optimizer: MuonAdamW) -> Progress:
        """Set model, optimizer and random generators to the state of the newest intact checkpoint.

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
                load_state(model, {k: divided_like(t, own[k]) for k, t in weights.items()})
                load_optimizer_tensors(optimizer, tensors, begun=progress.step > 0)
                _restore_random_states(tensors)
            except ValueError as error:
                raise ValueError(f"checkpoint {str(folder)!r} does not fit its run: {error}") from error
            self.newest = progress.step
            return progress
        if found:
            raise ValueError(f"no checkpoint in {str(self.settings.folder)!r} is intact")
        return Progress()

    def _require_same(self, folder: Path, run: dict) -> None:
        differing = [
            f"{name} = {run.get(name)!r}, not {value!r}"
            for name, value in self.identity.items()
            if run.get(name) != value
        ]
        if differing:
            raise ValueError(f"checkpoint {str(folder)!r} is of a run with {', '.join(differing)}")


@contextmanager
def run_folder(settings: Checkpoints) -> Iterator[None]:
    """Keep the folder for this process while the block runs, and clear what killed processes left.

    Raises ValueError if another process has it, and if it holds checkpoints that are not to be resumed.
    """
    folder = settings.folder
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(folder, wait=False))
        except BlockingIOError as error:
            raise ValueError(f"{str(folder)!r} is in use: another process trains there") from error
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


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def _read_progress(checkpoint: Path) -> tuple[dict, Progress]:
    """The run's identity and its progress. Raises ValueError for measurements that are not of it."""
    written = read_json(checkpoint / PROGRESS, MOST_PROGRESS)
    match written:
        case {
            "run": dict(run),
            "losses": list(losses),
            "seconds": list(seconds),
            "evaluations": [_, *_] as evaluations,
        } if len(written) == 4 and all(isinstance(evaluation, dict) for evaluation in evaluations):
            progress = Progress(losses, seconds, evaluations)
        case _:
            raise ValueError(f"{PROGRESS} does not hold a run, its losses, seconds and evaluations")
    numbers = [*progress.losses, *progress.seconds]
    for evaluation in progress.evaluations:
        numbers += [evaluation.get(name) for name in ("step", "tokens", "loss", "bits_per_byte")]
    if not all(type(x) in (int, float) and abs(x) <= sys.float_info.max for x in numbers):
        raise ValueError(f"{PROGRESS} holds a value that is not a finite number")
    if not all(x > 0 for x in progress.seconds):
        raise ValueError(f"{PROGRESS} holds a step that took no time")
    if not len(progress.losses) == len(progress.seconds) == _step(checkpoint):
        raise ValueError(f"{PROGRESS} is not of this step")
    return run, progress


def optimizer_tensors(optimizer: MuonAdamW) -> dict[str, Tensor]:
    """The optimizer's state as PART.PARAMETER.NAME, without the rates, which follow from the schedule."""
    return {
        f"{part}.{parameter}.{name}": tensor
        for part, state in optimizer.state_dict().items()
        for parameter, tensors in state["state"].items()
        for name, tensor in tensors.items()
    }


_NAMES = {"muon": ("momentum_buffer",), "adamw": ("step", "exp_avg", "exp_avg_sq")}


def load_optimizer_tensors(optimizer: MuonAdamW, tensors: dict[str, Tensor], begun: bool) -> None:
    """Load what `optimizer_tensors` returned for the same parameters; other names are ignored.

    An optimizer that has begun has state for every parameter, except for matrices that no step has
    used, such as those of an expert. Raises ValueError if a tensor is missing or not of its parameter's
    shape and type: the optimizer itself would not check.
    """
    state = optimizer.state_dict()
    for part, names in _NAMES.items():
        groups = getattr(optimizer, part).param_groups
        parameters = [p for group in groups for p in group["params"]]
        for number, like in enumerate(parameters):
            own = {name: tensors.get(f"{part}.{number}.{name}") for name in names}
            if all(tensor is None for tensor in own.values()) and (part == "muon" or not begun):
                continue
            for name, tensor in own.items():
                shape, dtype = ((), torch.float32) if name == "step" else (like.shape, like.dtype)
                require_like(f"{part}.{number}.{name}", tensor, shape, dtype)
            # Cloned, since the file may be removed while the run lasts.
            own = {name: divided_like(tensor.clone(), like) for name, tensor in own.items()}
            state[part]["state"][number] = own
        if begun and parameters and not state[part]["state"]:
            raise ValueError(f"there is no state of {part}")
    optimizer.load_state_dict(state)


def _random_states() -> dict[str, Tensor]:
    states = {"random.cpu.0": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"random.cuda.{i}": s for i, s in enumerate(torch.cuda.get_rng_state_all())}
    return states


def _restore_random_states(tensors: dict[str, Tensor]) -> None:
    """Raises ValueError if the CPU generator's state is missing, and for one that is not valid."""
    for name, own in _random_states().items():
        _, kind, number = name.split(".")
        state = tensors.get(name)
        if state is None and kind == "cuda":
            continue  # the earlier part of the run had fewer GPUs
        require_like(name, state, own.shape, own.dtype)
        try:
            if kind == "cpu":
                torch.set_rng_state(state)
            else:
                torch.cuda.set_rng_state(state, int(number))
        except RuntimeError as error:
            raise ValueError(f"{name} is not the state of a generator: {error}") from error
