"""The parts for a GPU: a dry run of them all on the CPU, and how they stop, go on and fail."""

import os
import re
import sys
import time

import pytest
import torch

from l3paper import gpu
from l3paper.experiments.catalogue import EXPERIMENTS
from l3paper.experiments.search import results
from l3paper.gpu import PARTS, SCALE, TOY, Part, command_of, main
from l3paper.records import read_record

BENCHES = [name for name in PARTS if name not in EXPERIMENTS]


@pytest.fixture
def parts(monkeypatch):
    """Stand-ins for the parts: Python programs that use nothing of the package."""

    def use(**programs):
        monkeypatch.setattr(
            gpu, "PARTS", {name: Part(1, None, resumes="once" not in name) for name in programs}
        )
        monkeypatch.setattr(
            gpu, "command_of", lambda name, scale: [sys.executable, "-c", programs[name]]
        )

    return use


def dry(folder, *flags):
    return main(["--dry-run", "--folder", str(folder), *flags])


def outcome(folder, name):
    return read_record(folder / "gpu" / "parts" / f"{name}.json")


def test_dry_run_of_everything(tmp_path, capfd):
    elsewhere, tmp_path = tmp_path / "elsewhere", tmp_path / "here"
    assert dry(tmp_path) == 0
    printed = capfd.readouterr().out
    for name, part in PARTS.items():
        found = outcome(tmp_path, name)
        assert found["done"]
        assert 0 < found["minutes"] < part.minutes * 10
        assert found["predicted_minutes"] == part.minutes
        assert f"| {name} | yes | {part.minutes:g} |" in printed
    for name in BENCHES:
        record = read_record(tmp_path / "gpu" / f"{name}.json")
        assert record["results"]
        assert record["environment"]["device"].startswith("cpu")
        assert record["seed"] == 0
        assert name == "correctness" or re.fullmatch("[0-9a-f]{64}", record["corpus"]["sha256"])
    for model in ("dense", "L3", "L3, two layers", "L3 offloaded"):
        assert f"\n| {model} | " in printed
    for name in PARTS.keys() - set(BENCHES):
        assert all(
            family.runs for family in results(name, "smoke", seeds=1, folder=tmp_path / "runs").values()
        )
    tmp_path.rename(elsewhere)
    assert dry(elsewhere) == 0  # and again, wherever the records lie: nothing is left to do
    assert capfd.readouterr().out.count("done already") == len(PARTS)


@pytest.mark.parametrize("name", PARTS)
def test_full_scale_is_another_command_with_the_same_flags(name):
    small, full = command_of(name, TOY), command_of(name, SCALE)
    assert [word for word in small if word.startswith("--")] == [
        word for word in full if word.startswith("--")
    ]
    assert {"smoke", "cpu"}.isdisjoint(full)


def test_minutes_end_a_part_and_the_next_call_goes_on(tmp_path, parts, capfd):
    mark = tmp_path / "mark"
    program = f"import pathlib, time; p = pathlib.Path({str(mark)!r})\n"
    parts(slow=program + "if not p.exists(): p.touch(); time.sleep(60)", next="print('never')")
    assert dry(tmp_path, "--minutes", "0.03") == 75
    first = outcome(tmp_path, "slow")
    assert not first["done"]
    assert "never" not in capfd.readouterr().out
    assert dry(tmp_path, "slow") == 0
    last = outcome(tmp_path, "slow")
    assert last["done"]
    assert last["minutes"] > first["minutes"] > 0.025


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="no groups of processes")
def test_a_part_that_does_not_stop_is_killed_with_what_it_started(tmp_path, parts, monkeypatch):
    monkeypatch.setattr(gpu, "PATIENCE", 0.5)
    pulse = tmp_path / "pulse"
    program = (
        "import os, pathlib, signal, time\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "os.fork()\n"
        "for i in range(10000):\n"
        f"    pathlib.Path({str(pulse)!r}).write_text(str(i))\n"
        "    time.sleep(0.01)"
    )
    parts(deaf=program)
    begin = time.monotonic()
    assert dry(tmp_path, "--minutes", "0.03") == 75
    assert time.monotonic() - begin < 20
    last = pulse.read_text()
    time.sleep(0.5)
    assert pulse.read_text() == last


def test_what_cannot_go_on_is_not_begun_without_the_minutes(tmp_path, parts, capfd):
    parts(once="print('begun')")
    assert dry(tmp_path, "--minutes", "0.5") == 75
    said = capfd.readouterr().out
    assert "not begun" in said
    assert "\nbegun" not in said
    assert dry(tmp_path, "--minutes", "1.5") == 0


def test_done_by_another_command_is_not_done(tmp_path, parts, capfd):
    parts(part="print('first')")
    assert dry(tmp_path) == 0
    parts(part="print('second')")
    assert dry(tmp_path) == 0
    assert "second" in capfd.readouterr().out


def test_a_part_that_fails_leaves_the_others(tmp_path, parts, capfd):
    parts(bad="raise SystemExit(3)", good="print('here')")
    assert dry(tmp_path) == 1
    assert not outcome(tmp_path, "bad")["done"]
    assert outcome(tmp_path, "good")["done"]
    said = capfd.readouterr()
    assert "bad failed with exit code 3" in said.err
    assert said.out.count("here") == 1
    assert dry(tmp_path, "good", "--again") == 0
    assert capfd.readouterr().out.count("here") == 1
    assert dry(tmp_path, "--skip", "bad", "good") == 0
    assert "here" not in capfd.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dry-run"], "--dry-run needs --folder"),
        (["--dry-run", "--folder", "x", "mian"], "part is 'mian'; choose out of correctness,"),
        (["--dry-run", "--folder", "x", "--minutes", "0"], "minutes is 0; it must be above 0"),
        (["--dry-run", "--folder", "x", "--minutes", "nan"], "minutes is nan; it must be above 0"),
        ([], "PyTorch sees no CUDA device here"),
    ],
)
def test_bad_flags(flags, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(flags) == 2
    said = capsys.readouterr().err
    assert said.startswith("python -m l3paper.gpu: error: ")
    assert message in said
    assert not list(tmp_path.iterdir())
