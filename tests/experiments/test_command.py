"""Experiments that are run, stopped and resumed; their records and their table."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace

import pytest

from l3paper.experiments.catalogue import EXPERIMENTS, SMALL, Experiment
from l3paper.experiments.command import EVERY, main, make_run, prediction, run_experiment
from l3paper.experiments.report import summary
from l3paper.experiments.runs import (
    MissingRun,
    add_record,
    check_run,
    final_loss,
    read_records,
    read_runs,
    run_name,
)
from l3paper.experiments.search import OTHER_BATCHES, results
from l3paper.training.config import TrainConfig

TINY = TrainConfig(
    vocab_size=300,
    depth=1,
    sequence_len=8,
    batch_size=2,
    num_iterations=2,
    l3_n_emb=500,
    eval_tokens=64,
    device="cpu",
)


@pytest.fixture
def tiny(text_file, monkeypatch):
    """An experiment of seconds, named "tiny", on a text of its own; returns that text's path."""
    families = {"dense": {"l3_after_layers": ""}, "l3": {}}
    experiment = Experiment(
        "Better?", "none", lambda base: families, text=str(text_file), presets={"smoke": TINY}
    )
    monkeypatch.setitem(EXPERIMENTS, "tiny", experiment)
    return str(text_file)


def test_name_hashes_what_matters():
    def name(**changes):
        return run_name(replace(TrainConfig(), **changes))

    assert name() == name(device="cpu") == name(l3_after_layers="2")
    assert name(data="here/text.txt") == name(data="there/text.txt") != name()
    different = [dict(seed=1), dict(lr_scale=0.5), dict(l3_k_max=5), dict(stand_in="moe")]
    assert len({name(), *(name(**changes) for changes in different)}) == 5
    assert name(stand_in="moe").startswith("moe-lr1-seed0-")
    assert name().startswith("l3-")
    assert name(l3_after_layers="").startswith("dense-")


def test_runs_are_recorded_read_and_not_repeated(tiny, tmp_path):
    made = run_experiment("tiny", "smoke", tiny, 2, 2, tmp_path)
    (file,) = tmp_path.iterdir()
    lines = file.read_text().splitlines()
    runs = [run for family in made.values() for run in [*family.search.values(), *family.runs[1:]]]
    assert len(lines) == len(runs) >= 8
    assert {json.loads(line)["name"] for line in lines} == {run["name"] for run in runs}
    assert all(family.runs[0] in family.search.values() for family in made.values())
    assert [run["config"]["seed"] for run in made["l3"].runs] == [0, 1]
    assert made == results("tiny", "smoke", tiny, 2, tmp_path)
    assert made == results("tiny", "smoke", seeds=2, folder=tmp_path)  # on its own text
    with pytest.raises(MissingRun):
        results("tiny", "smoke", "another.txt", 2, tmp_path)
    assert run_experiment("tiny", "smoke", tiny, 2, 1, tmp_path) == made
    assert lines == file.read_text().splitlines()
    assert [row[0] for row in summary(made)] == ["", "dense", "l3"]


def test_a_run_of_another_experiment_is_not_repeated(tiny, tmp_path, monkeypatch):
    run_experiment("tiny", "smoke", tiny, 1, 1, tmp_path)
    before = (tmp_path / "tiny.jsonl").read_text()
    monkeypatch.setitem(EXPERIMENTS, "other", EXPERIMENTS["tiny"])
    run_experiment("other", "smoke", tiny, 2, 2, tmp_path)
    assert (tmp_path / "tiny.jsonl").read_text() == before
    assert len((tmp_path / "other.jsonl").read_text().splitlines()) == 2  # the second seeds


def test_families_have_the_seeds_that_are_planned(tiny, tmp_path, monkeypatch):
    planned = replace(EXPERIMENTS["tiny"], seeds=1, more_seeds={"l3": 2})
    monkeypatch.setitem(EXPERIMENTS, "tiny", planned)
    families = run_experiment("tiny", "smoke", tiny, None, 2, tmp_path)
    assert {name: len(family.runs) for name, family in families.items()} == {"dense": 1, "l3": 2}


def test_retrofitted_models_continue_those_of_their_seeds(text_file, tmp_path, monkeypatch):
    monkeypatch.setenv("L3_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(SMALL, "smoke", TINY)
    plan = "retrofit", "smoke", str(text_file), 2
    made = run_experiment(*plan, 2, tmp_path / "runs")
    assert results(*plan, tmp_path / "runs") == made
    starts = made["dense"].runs
    for name in ("continued", "continued with L3"):
        for start, run in zip(starts, made[name].runs, strict=True):
            assert run["config"]["init_from"] == run["init_from"]["name"] == start["name"]
            assert run["config"]["seed"] == start["config"]["seed"] + OTHER_BATCHES
            assert run["evaluations"][0]["loss"] == start["evaluations"][-2]["loss"]
    assert [row[0] for row in summary(made)] == ["", *made]
    assert [*made] == ["continued", "continued with L3", "dense"]
    models = [*(tmp_path / "cache" / "models").glob("*/*")]
    assert {model.name for model in models} == {start["name"] for start in starts}
    assert not any((tmp_path / "cache" / "unfinished").iterdir())

    # If the continued runs are lost, they are made again from the same models.
    path = tmp_path / "runs" / "retrofit.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if not json.loads(line)["config"]["init_from"]))
    written = [model.stat().st_mtime_ns for model in models]
    again = run_experiment(*plan, 2, tmp_path / "runs")
    for name, family in made.items():
        assert family.losses() == again[name].losses()
    assert [model.stat().st_mtime_ns for model in models] == written


def test_a_diverged_run_is_recorded(text_file, tmp_path):
    changes = dict(num_iterations=9, lr_scale=1e30, l3_after_layers="", l3_n_emb=0)
    config = replace(TINY, data=str(text_file), **changes)
    make_run(config, tmp_path / "r.jsonl")
    (record,) = read_runs([config], tmp_path)
    assert "diverged" in record
    assert final_loss(record) == math.inf


def test_prediction_scales_recorded_runs():
    config = replace(TINY, n_embd=32, num_iterations=50)
    recorded = {"seconds": 100, "config": asdict(config)}
    missing = replace(config, n_embd=64, num_iterations=100)
    said = prediction([missing] * 9, [recorded], 2)  # 9 times 4 times 100 s, in pairs
    assert said == "up to 9 runs to train, about 0.5 hours, judging by 1 records"
    assert prediction([missing], [], 2) == "up to 1 runs to train"


def test_what_is_no_recorded_run_is_named(tmp_path):
    for line in ("<<<<<<< HEAD", '{"a": 1}', "[1]"):
        (tmp_path / "r.jsonl").write_text(f"{line}\n")
        with pytest.raises(ValueError, match=r"r\.jsonl, line 1 is not a recorded run"):
            read_records(tmp_path)
    with pytest.raises(ValueError, match=r"some run records a run of another version: .*later"):
        check_run("some run", {"config": {"later": 1}}, TINY)


def test_missing_run_is_named(tiny, tmp_path):
    with pytest.raises(MissingRun, match=r"the run dense-lr0\.5-seed0-\w+ is not recorded"):
        results("tiny", "smoke", tiny, 1, tmp_path)


@pytest.mark.parametrize(
    ("changes", "text", "message"),
    [
        ({}, "other", "records a run on another text: move it away"),
        ({"table_lr": 0.9, "device": "cuda"}, "this", r"a run with table_lr = 0\.9, not 0\.\d+: move"),
    ],
)
def test_record_of_another_text_or_configuration_is_refused(tmp_path, changes, text, message):
    record = {"config": asdict(replace(TINY, **changes)), "corpus": {"sha256": text}}
    with pytest.raises(ValueError, match=message):
        check_run("name", record, TINY, {"this"})


def record_of(config, sha256, folder):
    """Add a record that has nothing but a configuration and a text; return its file."""
    record = {"config": asdict(config), "corpus": {"sha256": sha256}}
    record |= {"train_loss": [], "seconds": 1.0}
    add_record(folder / "r.jsonl", run_name(config), record)
    return folder / "r.jsonl"


def test_a_run_on_another_text_is_refused_before_anything_is_trained(tiny, tmp_path):
    config = replace(EXPERIMENTS["tiny"].configs("smoke", tiny)["l3"], lr_scale=2.0)
    path = record_of(config, "other", tmp_path)
    with pytest.raises(ValueError, match="records a run on another text"):
        run_experiment("tiny", "smoke", tiny, 1, 1, tmp_path)
    assert list(tmp_path.iterdir()) == [path]


def test_a_place_given_and_the_same_by_default_are_one_run(tmp_path):
    given = replace(TINY, l3_after_layers=str(TINY.depth // 2))
    assert run_name(TINY) == run_name(given)
    assert TINY.l3_after_layers is None
    record_of(TINY, "this", tmp_path)
    (record,) = read_runs([given], tmp_path, {"this"})
    assert record["config"] == asdict(TINY)


PROGRAM = f"""
import sys
from l3paper.experiments.catalogue import SMALL
from l3paper.experiments.command import main
from l3paper.training.config import TrainConfig

SMALL["smoke"] = {TINY}
sys.exit(main(["tying", "--preset", "smoke", "--seeds", "1", "--jobs", "2", *sys.argv[1:]]))
"""


def start(text_file, folder, steps):
    """Start an experiment of tiny runs, in a session of its own."""
    program = PROGRAM.replace(f"num_iterations={TINY.num_iterations}", f"num_iterations={steps}")
    return subprocess.Popen(
        [sys.executable, "-c", program, "--data", text_file, "--folder", folder],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell may ignore it
    )


def wait_for(process, condition):
    while not condition():
        assert process.poll() is None
        time.sleep(0.02)


def test_killed_experiment_ends_with_the_same_records(text_file, tmp_path, monkeypatch):
    def curves(families):
        runs = [run for f in families.values() for run in [*f.search.values(), *f.runs]]
        return [(run["config"], run["train_loss"], run["evaluations"]) for run in runs]

    killed = tmp_path / "killed"
    process = start(text_file, killed, steps=100)
    wait_for(process, lambda: list(killed.glob("*.jsonl")))
    process.kill()
    process.communicate()
    assert 0 < len(read_records(killed)) < 5
    monkeypatch.setitem(SMALL, "smoke", replace(TINY, num_iterations=100))
    resumed, undisturbed = (
        run_experiment("tying", "smoke", str(text_file), 1, 2, folder)
        for folder in (killed, tmp_path / "undisturbed")
    )
    assert curves(resumed) == curves(undisturbed)


def test_stopped_experiment_leaves_checkpoints_and_one_line(text_file, tmp_path, monkeypatch):
    monkeypatch.setenv("L3_CACHE", str(tmp_path / "cache"))
    process = start(text_file, tmp_path / "runs", steps=20_000)
    unfinished = tmp_path / "cache" / "unfinished"
    wait_for(process, lambda: len({path.parent for path in unfinished.glob("*/run/step-*")}) == 2)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers as well
    *_, line = process.communicate(timeout=60)[1].splitlines()
    assert process.returncode == 130
    assert line == "python -m l3paper.experiments: stopped by SIGINT"
    runs = list(unfinished.iterdir())
    assert len(runs) == 2  # no run has started since
    newest = [max(int(path.name.removeprefix("step-")) for path in run.glob("run/*")) for run in runs]
    assert any(step % EVERY for step in newest)  # left by the signal


def test_command_prints_the_question_and_the_table(tiny, tmp_path, capsys):
    flags = ["tiny", "--preset", "smoke", "--data", tiny, "--seeds", "1", "--folder", str(tmp_path)]
    assert main(flags) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "Better?"
    assert len(printed) == 5
    assert "+0.0000" in printed[3]
    assert printed[3].endswith(" 100% |")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rivals", "--seeds", "0"], "seeds is 0; it must be at least 1"),
        (["rivals", "--jobs", "0"], "jobs is 0; it must be at least 1"),
        (["rivals", "--data", "no-such-file.txt"], "no-such-file.txt"),
    ],
)
def test_bad_values_end_with_code_2(arguments, message, capsys):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"), [(["rivals", "--preset", "huge"], "'huge'"), (["other"], "'other'")]
)
def test_bad_choices_end_with_code_2(arguments, message, capsys):
    with pytest.raises(SystemExit, match=r"^2$"):
        main(arguments)
    assert message in capsys.readouterr().err
