"""Checkers for the exercises, away from the notebooks so that they do not give the answers away.

One module per notebook holds functions `check_N(answer, ...)` for its exercises, which raise
AssertionError, with a hint, for a wrong answer. A notebook calls them by number:

    attempt_2 = None
    check("01.2", attempt_2, codebook=codebook)
"""

from importlib import import_module
from typing import Any

MODULES = {
    "01": "allocation",
    "02": "layer",
    "03": "gpt",
    "04": "training",
    "05": "comparison",
    "06": "ablations",
    "07": "decoding",
    "08": "insight",
    "09": "own_model",
}
"""The module of each notebook, here and in `l3paper.notebooks.drawings`."""


def check(exercise: str, answer: Any, **context: Any) -> None:
    """Print whether `answer` solves the exercise, such as "01.2"; None is "not attempted yet".

    `context` is what the checker needs of the notebook. Raises AssertionError, with a hint, for a wrong
    answer, and ValueError for an exercise that does not exist.
    """
    notebook, _, number = exercise.partition(".")
    checkers = import_module(f"{__name__}.{MODULES[notebook]}") if notebook in MODULES else None
    checker = getattr(checkers, f"check_{number}", None)
    if checker is None:
        raise ValueError(f"exercise is {exercise!r}; the checkers know no such number")
    if answer is None:
        print(f"exercise {exercise}: not attempted yet")
        return
    checker(answer, **context)
    print(f"exercise {exercise}: correct")
