"""Signals that ask a training run to stop: SIGINT, SIGTERM, and SIGHUP of a closed terminal."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from l3paper.errors import Failure, handled


class Interrupted(Failure):
    """A signal stopped a run after the given step, whose checkpoint is written."""

    def __init__(self, number: int, step: int, folder: Path):
        super().__init__(number, step, folder)
        self.code = 128 + number

    def __str__(self) -> str:
        number, step, folder = self.args
        name = signal.Signals(number).name
        return f"{name} after step {step}: --resume continues from {str(folder)!r}"


@contextmanager
def noted_signals() -> Iterator[Callable[[], int | None]]:
    """Note signals instead of dying of them. Yields a function that returns the latest, or None."""
    noted: list[int] = []
    with handled(lambda number, frame: noted.append(number)):
        yield lambda: noted[-1] if noted else None
