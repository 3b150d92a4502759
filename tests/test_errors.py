"""How commands end: one line on stderr, and an exit code."""

import argparse
import io
import os
import signal
import subprocess
import sys
from concurrent.futures import BrokenExecutor

import pytest

from l3paper.errors import (
    SIGNALS,
    Failure,
    Stopped,
    at_least,
    at_most,
    command,
    handled,
    nonempty_path,
    one_of,
)


class Late(Failure):
    code = 75


def end_by(what):
    """Run a command that raises an exception, is sent a signal, or returns; its exit code."""

    @command("program")
    def main(arguments):
        if isinstance(what, BaseException):
            raise what
        return signal.raise_signal(what) if isinstance(what, signal.Signals) else what

    return main([])


@pytest.mark.parametrize(
    ("what", "code", "line"),
    [
        (None, 0, ""),
        (3, 3, ""),
        (Failure("it diverged\n  at step 3"), 1, "it diverged at step 3"),
        (Late("no time"), 75, "no time"),
        (ValueError("rows is 0"), 2, "error: rows is 0"),
        (FileNotFoundError(2, "No such file", "a.txt"), 2, "error: [Errno 2] No such file: 'a.txt'"),
        (ImportError("install it"), 2, "error: install it"),
        (BrokenExecutor("a run was killed"), 2, "error: a run was killed"),
        (MemoryError(), 2, "error: it does not fit into memory"),
        (
            RuntimeError("can't allocate 9 GB\nat x"),
            2,
            "error: it does not fit into memory: can't allo",
        ),
        (KeyboardInterrupt(), 130, "stopped by SIGINT"),
        (Stopped(signal.SIGTERM), 143, "stopped by SIGTERM"),
        *(
            (number, 128 + number, f"stopped by {number.name}")
            for number in map(signal.Signals, SIGNALS)
        ),
    ],
    ids=repr,
)
def test_a_command_ends_in_one_line_and_a_code(capsys, what, code, line):
    assert end_by(what) == code
    out, said = capsys.readouterr()
    assert out == ""
    assert said.startswith(f"program: {line}" if line else "")
    assert said.count("\n") == bool(line)


@pytest.mark.parametrize("error", [SystemExit(2), KeyError("a bug"), RuntimeError("a bug")], ids=repr)
def test_bugs_and_argparse_pass_through(error):
    with pytest.raises(type(error)) as caught:
        end_by(error)
    assert caught.value is error


def test_signals_are_handled_for_the_time_of_the_block_only():
    before = [signal.getsignal(number) for number in SIGNALS]
    noted = []
    with handled(lambda number, frame: noted.append(number)):
        for number in SIGNALS:
            signal.raise_signal(number)
    assert noted == list(SIGNALS)
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_what_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert end_by(signal.SIGHUP) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("lines", [2, 100_000], ids=["fewer than a buffer", "more than a buffer"])
def test_a_closed_pipe_is_quiet(lines):
    program = (
        "import sys; from l3paper.errors import command\n"
        "@command('program')\n"
        "def main(arguments):\n"
        f"    print('first', flush=True); sys.stdin.read(); print('line\\n' * {lines})\n"
        "sys.exit(main())"
    )
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen([sys.executable, "-c", program], text=True, **pipes) as process:
        assert process.stdout.readline() == "first\n"
        process.stdout.close()  # as `head -1` does
        process.stdin.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141


@pytest.mark.parametrize(
    ("encoding", "printed"),
    [
        ("ascii", rb"\xfc \u2026 \U0001f40d \udcff"),
        ("latin-1", b"\xfc \\u2026 \\U0001f40d \\udcff"),
        ("cp1252", b"\xfc \x85 \\U0001f40d \\udcff"),
        ("utf-8", "ü … 🐍 ".encode() + rb"\udcff"),
    ],
)
def test_characters_that_a_terminal_lacks_are_escaped(monkeypatch, encoding, printed):
    terminal = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(terminal, encoding))
    command("program")(lambda arguments: print("ü … 🐍 \udcff"))()
    assert terminal.getvalue().rstrip() == printed


@pytest.mark.parametrize(
    ("check", "message"),
    [
        (lambda: at_least(1, depth=2, width=0), "width is 0; it must be at least 1"),
        (lambda: at_least(0, rate=float("nan")), "rate is nan; it must be at least 0"),
        (lambda: at_most(9, depth=2, width=10), "width is 10; it must be at most 9"),
        (lambda: one_of(["a", "b"], kind="c"), "kind is 'c'; choose one of a, b"),
    ],
)
def test_bad_arguments_are_named_with_what_is_allowed(check, message):
    with pytest.raises(ValueError, match=message):
        check()


def test_good_arguments_pass():
    at_least(1, depth=1, width=2.5)
    at_most(9, depth=9)
    one_of(["a", "b"], kind="a")


def test_empty_paths_are_refused_with_the_name_of_the_flag(capsys):
    parser = argparse.ArgumentParser("program")
    parser.add_argument("--save", type=nonempty_path)
    assert os.fspath(parser.parse_args(["--save", "a/b"]).save) == "a/b"
    with pytest.raises(SystemExit) as end:
        parser.parse_args(["--save", ""])
    assert end.value.code == 2
    assert "argument --save: the path is empty" in capsys.readouterr().err
