"""Experiments that are run, stopped and resumed; their records and their table."""

import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace

import pytest

from l3paper.experiments.catalogue import EXPERIMENTS, SMALL, Experiment
from l3paper.experiments.command import EVERY, main, make_run, run_experiment
from l3paper.experiments.report import summary
from l3paper.experiments.runs import MissingRun, final_loss, read_run, record_path
from l3paper.experiments.search import results
from l3paper.records import write_record
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
    experiment = Experiment("Better?", "none", lambda base: families, presets={"smoke": TINY})
    monkeypatch.setitem(EXPERIMENTS, "tiny", experiment)
    return str(text_file)


def test_path_names_what_matters(tmp_path):
    def path(**changes):
        return record_path(replace(TrainConfig(), **changes), tmp_path)

    assert path() == path(device="cpu") == path(l3_after_layers="2")
    assert path(data="here/text.txt") == path(data="there/text.txt") != path()
    different = [dict(seed=1), dict(lr_scale=0.5), dict(l3_k_max=5), dict(stand_in="moe")]
    assert len({path(), *(path(**changes) for changes in different)}) == 5
    assert path(stand_in="moe").name.startswith("moe-lr1-seed0-")
    assert path().name.startswith("l3-")
    assert path(l3_after_layers="").name.startswith("dense-")


def test_runs_are_recorded_read_and_not_repeated(tiny, tmp_path):
    made = run_experiment("tiny", "smoke", tiny, 2, 2, tmp_path)
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    runs = [run for family in made.values() for run in [*family.search.values(), *family.runs[1:]]]
    assert len(files) == len(runs) >= 8
    assert all(family.runs[0] in family.search.values() for family in made.values())
    assert [run["config"]["seed"] for run in made["l3"].runs] == [0, 1]
    assert made == results("tiny", "smoke", tiny, 2, tmp_path)
    assert run_experiment("tiny", "smoke", tiny, 2, 1, tmp_path) == made
    assert files == {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert [row[0] for row in summary(made)] == ["", "dense", "l3"]


def test_perplexity_per_word_is_recorded_and_required(tiny, tmp_path):
    words = tmp_path / "words.txt"
    words.write_text("one line\n")
    made = run_experiment("tiny", "smoke", tiny, 1, 1, tmp_path / "with", str(words))
    assert all(family.runs[0]["words"]["words"] == 3 for family in made.values())
    assert made == results("tiny", "smoke", tiny, 1, tmp_path / "with")
    assert "perplexity per word" in summary(made)[0]
    run_experiment("tiny", "smoke", tiny, 1, 1, tmp_path / "without")
    with pytest.raises(ValueError, match="has no perplexity per word"):
        run_experiment("tiny", "smoke", tiny, 1, 1, tmp_path / "without", str(words))


def test_a_diverged_run_needs_no_perplexity_per_word(text_file, tmp_path):
    words, path = tmp_path / "words.txt", tmp_path / "r.json"
    words.write_text("one line\n")
    changes = dict(num_iterations=9, lr_scale=1e30, l3_after_layers="", l3_n_emb=0)
    config = replace(TINY, data=str(text_file), words=str(words), **changes)
    make_run(config, path)
    record = read_run(path, config)
    assert "diverged" in record
    assert final_loss(record) == math.inf


def test_missing_run_is_named(tiny, tmp_path):
    with pytest.raises(MissingRun, match=r"the run dense-lr0\.5-seed0-\w+\.json is not recorded"):
        results("tiny", "smoke", tiny, 1, tmp_path)


@pytest.mark.parametrize(
    ("changes", "text", "message"),
    [
        ({}, "other", "records a run on another text: move it away"),
        ({"table_lr": 0.9, "device": "cuda"}, "this", r"a run with table_lr = 0\.9, not 0\.\d+: move"),
    ],
)
def test_record_of_another_text_or_configuration_is_refused(tmp_path, changes, text, message):
    recorded = asdict(replace(TINY, **changes))
    write_record(tmp_path / "r.json", {"config": recorded, "corpus": {"sha256": text}})
    with pytest.raises(ValueError, match=message):
        read_run(tmp_path / "r.json", TINY, {"this"})


def test_a_run_on_another_text_is_refused_before_anything_is_trained(tiny, tmp_path):
    config = replace(EXPERIMENTS["tiny"].configs("smoke", tiny)["l3"], lr_scale=2.0)
    path = record_path(config, tmp_path)
    write_record(path, {"config": asdict(config), "corpus": {"sha256": "other"}})
    with pytest.raises(ValueError, match="records a run on another text"):
        run_experiment("tiny", "smoke", tiny, 1, 1, tmp_path)
    assert list(tmp_path.iterdir()) == [path]


def test_a_place_given_and_the_same_by_default_are_one_run(tmp_path):
    given = replace(TINY, l3_after_layers=str(TINY.depth // 2))
    path = record_path(TINY, tmp_path)
    assert path == record_path(given, tmp_path)
    assert TINY.l3_after_layers is None
    record = {"config": asdict(TINY), "corpus": {"sha256": "this"}}
    write_record(path, record)
    assert read_run(path, given, {"this"}) == record


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
    wait_for(process, lambda: list(killed.glob("*.json")))
    process.kill()
    process.communicate()
    assert len(list(killed.glob("*.json"))) < 5
    monkeypatch.setitem(SMALL, "smoke", replace(TINY, num_iterations=100))
    resumed, undisturbed = (
        run_experiment("tying", "smoke", str(text_file), 1, 2, folder)
        for folder in (killed, tmp_path / "undisturbed")
    )
    assert curves(resumed) == curves(undisturbed)


def test_stopped_experiment_leaves_checkpoints_and_one_line(text_file, tmp_path, monkeypatch):
    monkeypatch.setenv("L3_CACHE", str(tmp_path / "cache"))
    process = start(text_file, tmp_path / "runs", steps=10**6)
    unfinished = tmp_path / "cache" / "unfinished"
    wait_for(process, lambda: len({path.parent for path in unfinished.glob("*/run/step-*")}) == 2)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers as well
    *_, line = process.communicate(timeout=60)[1].splitlines()
    assert process.returncode == 130
    assert line == "python -m l3paper.experiments: stopped by SIGINT"
    runs = list(unfinished.iterdir())
    assert len(runs) == 2  # no run has started since
    for run in runs:
        steps = [int(path.name.removeprefix("step-")) for path in run.glob("run/step-*")]
        assert max(steps) % EVERY  # left by the signal


def test_command_prints_the_question_and_the_table(tiny, tmp_path, capsys):
    flags = ["tiny", "--preset", "smoke", "--data", tiny, "--seeds", "1", "--folder", str(tmp_path)]
    assert main(flags) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "Better?"
    assert len(printed) == 5
    assert "+0.0000" in printed[3]
    assert printed[3].endswith(" 100% |")
    assert "per word" not in printed[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["main", "--seeds", "0"], "seeds is 0; it must be at least 1"),
        (["main", "--jobs", "0"], "jobs is 0; it must be at least 1"),
        (["main", "--data", "no-such-file.txt"], "no-such-file.txt"),
    ],
)
def test_bad_values_end_with_code_2(arguments, message, capsys):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"), [(["main", "--preset", "huge"], "'huge'"), (["other"], "'other'")]
)
def test_bad_choices_end_with_code_2(arguments, message, capsys):
    with pytest.raises(SystemExit, match=r"^2$"):
        main(arguments)
    assert message in capsys.readouterr().err
