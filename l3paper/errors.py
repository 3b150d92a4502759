"""What goes wrong, in one line: checks of arguments, and the one way in which every command ends.

exit code   meaning
---------   -------
0           done
1           the run failed: a `Failure` with no code of its own
2           input that cannot be used, or that does not fit into memory
128 + N     signal N: 130 for Ctrl-C, 141 for a reader that has gone, as `| head` does
"""

import argparse
import functools
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from types import NoneType
from typing import Any, get_args

SIGNALS = tuple(  # Windows has no SIGHUP
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)
"""Signals that ask a command to stop."""


def at_least(least: float, **arguments: float) -> None:
    """Raise ValueError, naming the argument and its value, for the first that is below `least`."""
    for name, value in arguments.items():
        if not value >= least:
            raise ValueError(f"{name} is {value}; it must be at least {least}")


def at_most(most: float, **arguments: float) -> None:
    """Raise ValueError, naming the argument and its value, for the first that is above `most`."""
    for name, value in arguments.items():
        if not value <= most:
            raise ValueError(f"{name} is {value}; it must be at most {most}")


def one_of(choices: Sequence[str], **arguments: str) -> None:
    """Raise ValueError, naming the argument and its value, for the first that is not a choice."""
    for name, value in arguments.items():
        if value not in choices:
            raise ValueError(f"{name} is {value!r}; choose one of {', '.join(filter(None, choices))}")


def of_type(settings: Any) -> None:
    """Raise ValueError, naming the field and its value, for the first field of a dataclass that is not
    of the type that it declares. An int serves as a float.
    """
    for field in fields(settings):
        value, kinds = getattr(settings, field.name), get_args(field.type) or (field.type,)
        if type(value) not in kinds and not (type(value) is int and float in kinds):
            names = " or ".join(kind.__name__ for kind in kinds if kind is not NoneType)
            raise ValueError(f"{field.name} is {value!r:.80}; it must be of type {names}")


def nonempty_path(text: str) -> Path:
    """Return the path that an argument of a command names: the `type` of an argparse argument.

    An empty one, as from an unset variable of a shell, would be the working folder. It is refused with
    the name of the argument.
    """
    if not text:
        raise argparse.ArgumentTypeError("the path is empty; name a file or folder")
    return Path(text)


class Failure(Exception):
    """A run that failed although its input was good; `code` is the command's exit code."""

    code = 1


class Stopped(KeyboardInterrupt):
    """A signal asked the command to stop; its number is the argument."""


@contextmanager
def handled(handler: Callable) -> Iterator[None]:
    """Handle SIGINT, SIGTERM and SIGHUP by `handler(number, frame)`, in the main thread.

    SIGTERM and SIGHUP stay ignored if they are, as `nohup` does with SIGHUP; SIGINT does not, since a
    shell ignores it for whatever it starts in the background. Other threads get no signals: there,
    nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {
        number: signal.signal(number, handler)
        for number in SIGNALS
        if number == signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN
    }
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)


def _stop(number, frame):
    raise Stopped(number)


def command(program: str) -> Callable:
    """Decorate a command's `main(arguments)`, which returns an exit code: it ends without traceback.

    Whatever ends it early is one line on stderr, except that a closed pipe is quiet. Errors that only a
    bug can raise pass through, and so does SystemExit, by which argparse ends. Characters that stdout
    cannot encode are printed as backslash escapes.
    """

    def decorate(main: Callable) -> Callable:
        @functools.wraps(main)
        def run(arguments: Sequence[str] | None = None) -> int:
            if hasattr(sys.stdout, "reconfigure"):  # a notebook's stdout has none
                sys.stdout.reconfigure(errors="backslashreplace")
            try:
                with handled(_stop):
                    code = main(arguments) or 0
                    print(end="", flush=True)  # a closed pipe shows here, or as the interpreter exits
                    return code
            except BrokenPipeError:
                # The interpreter would write what is left in the buffers once more, and fail.
                for stream in (sys.stdout, sys.stderr):
                    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
                return 128 + 13  # SIGPIPE, which Windows does not name
            except Failure as error:
                why, code = error, error.code
            except KeyboardInterrupt as error:
                number = error.args[0] if error.args else signal.SIGINT
                why, code = f"stopped by {signal.Signals(number).name}", 128 + number
            except (ValueError, ImportError, OSError, BrokenExecutor) as error:
                why, code = f"error: {error}", 2
            except (MemoryError, RuntimeError) as error:
                if isinstance(error, RuntimeError) and "allocate" not in str(error):
                    raise
                first_line = str(error).partition("\n")[0]
                why, code = f"error: it does not fit into memory: {first_line}".removesuffix(": "), 2
            print(f"{program}: {' '.join(str(why).split())}", file=sys.stderr)
            return code

        return run

    return decorate
