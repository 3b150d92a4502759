"""The parts for a GPU: a dry run of all of them on the CPU, and how they stop, resume and fail."""

import os
import re
import time

import pytest
import torch

from l3paper.experiments.catalogue import EXPERIMENTS
from l3paper.experiments.search import results
from l3paper.gpu import UNFINISHED, Part, main, overview, parts, run_parts
from l3paper.records import read_record


def stand_ins(**programs):
    """Parts that are Python programs; those whose name says so resume."""
    return {
        name: Part(1, ["-c", program, "folder"], resumes=name.startswith("resuming"))
        for name, program in programs.items()
    }


def outcome(folder, name):
    return read_record(folder / "gpu" / "parts" / f"{name}.json")


AGAIN = ("throughput-large", "many_rows", "k_max")
"""Parts that differ from others by a size or by the experiment's name alone."""


def test_dry_run_of_every_kind_of_part(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    folder, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    assert main(["--dry-run", "--folder", str(folder), "--skip", *AGAIN]) == 0
    printed = capfd.readouterr().out
    done = {name: part for name, part in parts(folder, toy=True).items() if name not in AGAIN}
    for name, part in done.items():
        found = outcome(folder, name)
        assert found["done"]
        assert found["minutes"] > 0
        assert f"| {name} | yes | {part.minutes:g} |" in printed
        if name in EXPERIMENTS:
            families = results(name, "smoke", "stdlib", seeds=1, folder=folder / "runs")
            assert all(family.runs for family in families.values())
            continue
        record = read_record(folder / "gpu" / f"{name}.json")
        assert record["results"]
        assert record["environment"]["device"].startswith("cpu")
        assert record["seed"] == 0
        assert name == "correctness" or re.fullmatch("[0-9a-f]{64}", record["corpus"]["sha256"])
    for model in ("dense", "L3", "L3, two layers", "L3 offloaded"):
        assert f"| {model} | " in printed
    folder.rename(elsewhere)
    assert main(["--dry-run", "--folder", str(elsewhere), "--skip", *AGAIN]) == 0
    assert capfd.readouterr().out.count("done already") == len(done)  # nothing is left to do


def test_full_scale_is_another_command_with_the_same_flags(tmp_path):
    for small, full in zip(parts(tmp_path, toy=True).values(), parts(tmp_path).values(), strict=True):
        flags = [[word for word in part.command if word.startswith("-")] for part in (small, full)]
        assert flags[0] == flags[1]
        assert {"smoke", "cpu"}.isdisjoint(full.command)


def test_minutes_end_a_part_and_the_next_call_resumes(tmp_path, capfd):
    mark = tmp_path / "mark"
    program = f"import pathlib, time; p = pathlib.Path({str(mark)!r})\n"
    program += "if not p.exists(): p.touch(); time.sleep(60)"
    chosen = stand_ins(resuming=program, resuming_too="print('never')")
    assert run_parts(chosen, tmp_path, minutes=0.03) == UNFINISHED
    first = outcome(tmp_path, "resuming")
    assert not first["done"]
    assert "never" not in capfd.readouterr().out
    assert run_parts(stand_ins(resuming=program), tmp_path) == 0
    last = outcome(tmp_path, "resuming")
    assert last["done"]
    assert last["minutes"] > first["minutes"] > 0.025


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="no groups of processes")
def test_a_part_that_does_not_stop_is_killed_with_what_it_started(tmp_path, monkeypatch):
    pulse = tmp_path / "pulse"
    program = (
        "import os, pathlib, signal, time\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "os.fork()\n"
        "for i in range(10000):\n"
        f"    pathlib.Path({str(pulse)!r}).write_text(str(i))\n"
        "    time.sleep(0.01)"
    )
    begin = time.monotonic()
    deaf = stand_ins(resuming=program)
    monkeypatch.setattr("l3paper.gpu.PATIENCE", 0.5)
    assert run_parts(deaf, tmp_path, minutes=0.1) == UNFINISHED  # time enough for Python to start
    assert time.monotonic() - begin < 60
    last = pulse.read_text()
    time.sleep(0.5)
    assert pulse.read_text() == last


def test_a_part_that_cannot_resume_needs_its_minutes(tmp_path, capfd):
    chosen = stand_ins(once="print('begun')")
    assert run_parts(chosen, tmp_path, minutes=0.5) == UNFINISHED
    said = capfd.readouterr().out
    assert "once: skipped, it needs 1 minutes" in said
    assert "\nbegun" not in said
    assert run_parts(chosen, tmp_path, minutes=1.5) == 0


def test_done_by_another_command_is_not_done(tmp_path, capfd):
    for word in ("first", "second", "second"):
        assert run_parts(stand_ins(part=f"print({word!r})"), tmp_path) == 0
    said = capfd.readouterr().out
    assert said.count("first") == said.count("second") == 1


def test_a_part_that_fails_leaves_the_others(tmp_path, capfd):
    assert run_parts(stand_ins(bad="raise SystemExit(3)", good="print('here')"), tmp_path) == 1
    assert not outcome(tmp_path, "bad")["done"]
    assert outcome(tmp_path, "good")["done"]
    said = capfd.readouterr()
    assert "bad failed with exit code 3" in said.err
    assert said.out.count("here") == 1


def test_skipped_parts_leave_no_trace(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    flags = ["--dry-run", "--folder", str(tmp_path), "rivals", "k_max"]
    assert main([*flags, "--skip", "rivals", "k_max"]) == 0
    assert overview(tmp_path).count("| no |") == len(parts(tmp_path))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dry-run"], "--dry-run needs --folder"),
        (["--dry-run", "--folder", "x", "mian"], "part is 'mian'; choose one of correctness,"),
        (["--dry-run", "--folder", "x", "--minutes", "0"], "minutes is 0; it must be above 0"),
        (["--dry-run", "--folder", "x", "--minutes", "nan"], "minutes is nan; it must be above 0"),
        pytest.param(
            [],
            "PyTorch sees no CUDA device here",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
    ],
)
def test_bad_flags(flags, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert main(flags) == 2
    said = capsys.readouterr().err
    assert said.startswith("python -m l3paper.gpu: error: ")
    assert message in said
    assert not list(tmp_path.iterdir())
