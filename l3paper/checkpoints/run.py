"""A training run on disk: checkpoints from which it resumes as if it had never stopped.

Each is a folder inside the run's own: a saved model, so that one can generate from it, and beside it
the optimizer's tensors, the states of the random generators, and all that was measured so far. Nothing
is ever unpickled.
"""

import json
import math
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

from l3paper.checkpoints.model import (
    FILES,
    UNUSABLE,
    new_checkpoint,
    require_whole,
    write_model,
    write_tensors,
)
from l3paper.errors import Failure
from l3paper.files import locked, remove_folder
from l3paper.gpt import GPT
from l3paper.parts.optimizer import MuonAdamW
from l3paper.training.distributed import sharded_like, unsharded

_WEIGHTS = FILES[2:]
_STATE, _PROGRESS = "optimizer.safetensors", "progress.json"


@dataclass(frozen=True)
class Checkpoints:
    """Where a run leaves what it needs to go on, and how often; ValueError for numbers below 1."""

    folder: Path
    every: int = 100
    """Steps from one to the next."""
    keep: int = 2
    resume: bool = False
    """Go on from the newest that is whole; begin where there is none."""

    def __post_init__(self):
        for name in ("every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"checkpoint_{name} is {getattr(self, name)}; it must be at least 1")


@dataclass
class Progress:
    """What a run has measured so far, step by step."""

    losses: list[float] = field(default_factory=list)
    """Of training, in nats a token."""
    seconds: list[float] = field(default_factory=list)
    evaluations: list[dict] = field(default_factory=list)

    @property
    def step(self) -> int:
        """Steps that are done: where in the data the run stands, and on its schedule."""
        return len(self.losses)


class RunFolder:
    """The checkpoints of one run, described by `identity`, which a later part of it must equal."""

    def __init__(self, settings: Checkpoints, identity: dict):
        self.settings, self.identity = settings, json.loads(json.dumps(identity))
        self.newest = -1
        """The step that the newest whole checkpoint is of."""
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

        Damaged ones and, where the run has been put back, later ones are not among those. Of several
        processes that train one model, all call this, and one writes. Raises OSError where there is no
        room.
        """
        if self.newest == progress.step:  # it is there, and to replace it would risk it
            return
        self.newest = progress.step
        state = unsharded(model.state_dict(), writes)
        tensors = unsharded(optimizer_tensors(optimizer), writes)
        if not writes:
            return
        path = self.settings.folder / f"step-{progress.step:09}"
        with new_checkpoint(path) as new:
            write_model(new, model, tokenizer, state)
            write_tensors(new / _STATE, tensors | _random_states())
            (new / _PROGRESS).write_text(json.dumps({"run": self.identity, **asdict(progress)}))
        self.damaged.discard(path)
        found = [f for f in _checkpoints(self.settings.folder) if _step(f) <= progress.step]
        kept = [f for f in found if f not in self.damaged][-self.settings.keep :]
        for outdated in found[: found.index(kept[0])] if prune else []:
            remove_folder(outdated)

    def restore(self, model: GPT, optimizer: MuonAdamW) -> Progress:
        """Put model, optimizer and random generators where the newest whole checkpoint left them.

        One that is damaged is reported on stderr and passed over; without any, nothing is changed.
        Raises ValueError where none of several is whole, and for one of another run.
        """
        found = _checkpoints(self.settings.folder)
        for folder in reversed(found):
            try:
                require_whole(folder, (*FILES, _STATE, _PROGRESS))
                run, progress = _read_progress(folder)
                tensors = load_file(folder / _STATE)
                weights = {k: v for name in _WEIGHTS for k, v in load_file(folder / name).items()}
            except UNUSABLE as error:
                print(f"checkpoint {folder} is passed over: {error}", file=sys.stderr)
                self.damaged.add(folder)
                continue
            self._require_same(folder, run)
            try:
                own = model.state_dict()
                model.load_state_dict({k: sharded_like(t, own[k]) for k, t in weights.items()})
                load_optimizer_tensors(optimizer, tensors, begun=progress.step > 0)
                _restore_random_states(tensors)
            except UNUSABLE as error:
                raise ValueError(f"checkpoint {str(folder)!r} does not fit its run: {error}") from None
            self.newest = progress.step
            return progress
        if found:
            raise ValueError(f"no checkpoint in {str(self.settings.folder)!r} is whole")
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
    """Keep the folder for this process while the block runs, rid of what killed ones left behind.

    Raises ValueError where another process has it, and where it holds checkpoints that are not to be
    gone on from.
    """
    folder = settings.folder
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(folder, wait=False))
        except BlockingIOError:
            raise ValueError(f"{str(folder)!r} is in use: another process trains there") from None
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
    """Whose it is, and how far it was; ValueError for what is no measurement, or not of this step."""
    written = json.loads((checkpoint / _PROGRESS).read_text())
    run, progress = dict(written.pop("run")), Progress(**written)
    numbers = [*progress.losses, *progress.seconds]
    for evaluation in progress.evaluations:
        numbers += [evaluation[name] for name in ("step", "tokens", "loss", "bits_per_byte")]
    if not all(type(x) in (int, float) and math.isfinite(x) for x in numbers):
        raise ValueError(f"{_PROGRESS} holds what is no number")
    if not progress.evaluations or not all(x > 0 for x in progress.seconds):
        raise ValueError(f"{_PROGRESS} lacks evaluations, or the times of steps")
    if not len(progress.losses) == len(progress.seconds) == _step(checkpoint):
        raise ValueError(f"{_PROGRESS} is not of this step")
    return run, progress


def optimizer_tensors(optimizer: MuonAdamW) -> dict[str, Tensor]:
    """All state of the optimizer but its rates, which the schedule knows: PART.PARAMETER.NAME."""
    return {
        f"{part}.{parameter}.{name}": tensor
        for part, state in optimizer.state_dict().items()
        for parameter, tensors in state["state"].items()
        for name, tensor in tensors.items()
    }


_NAMES = {"muon": ("momentum_buffer",), "adamw": ("step", "exp_avg", "exp_avg_sq")}


def load_optimizer_tensors(optimizer: MuonAdamW, tensors: dict[str, Tensor], begun: bool) -> None:
    """Take what `optimizer_tensors` gave for the same parameters; other names are passed over.

    An optimizer that has begun has state for every parameter, but for matrices that no step has used,
    as those of an expert can be. Raises ValueError where any is missing or not of its parameter's shape
    and type: the optimizer would not look.
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
                if tensor is None or (tensor.shape, tensor.dtype) != (shape, dtype):
                    raise ValueError(
                        f"{part}.{number}.{name} is missing, or not of its parameter's shape"
                    )
            # cloned, since the file may go
            own = {name: sharded_like(tensor.clone(), like) for name, tensor in own.items()}
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
    torch.set_rng_state(tensors["random.cpu.0"])
    for i in range(torch.cuda.device_count()):
        if f"random.cuda.{i}" in tensors:
            torch.cuda.set_rng_state(tensors[f"random.cuda.{i}"], i)


class Interrupted(Failure):
    """A run that was told to stop has written a checkpoint and stopped."""

    def __init__(self, number: int, step: int, folder: Path):
        super().__init__(number, step, folder)
        self.code = 128 + number

    def __str__(self) -> str:
        number, step, folder = self.args
        name = signal.Signals(number).name
        return f"{name} after step {step}: --resume continues from {str(folder)!r}"


@contextmanager
def noted_signals() -> Iterator[Callable[[], int | None]]:
    """Note SIGINT and SIGTERM instead of dying of them; yields what tells the last one."""
    noted: list[int] = []
    with _handled(lambda number, _: noted.append(number)):
        yield lambda: noted[-1] if noted else None


@contextmanager
def raised_signals() -> Iterator[None]:
    """Raise KeyboardInterrupt, with the signal's number, for SIGINT and SIGTERM."""

    def interrupt(number, frame):
        raise KeyboardInterrupt(number)

    with _handled(interrupt):
        yield


@contextmanager
def _handled(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Outside the main thread, which alone gets signals, there is nothing to handle."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)
