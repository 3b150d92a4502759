"""The search for a learning rate, and experiments that go on where they stopped."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace

import pytest

from l3paper.experiments.catalogue import EXPERIMENTS, Experiment
from l3paper.experiments.runs import (
    RUNS,
    family_plan,
    final_loss,
    follow,
    main,
    next_scales,
    record_path,
    recorded,
    results,
    run_experiment,
    summary,
)
from l3paper.records import write_record
from l3paper.train import train
from l3paper.training.config import PRESETS, TrainConfig

SCALES = [0.5, 1.0, 2.0]
NAMES = pytest.mark.parametrize("name", EXPERIMENTS)


def valley(lowest):
    """A loss curve over learning rates, lowest at `lowest`."""
    return lambda lr_scale: abs(math.log2(lr_scale / lowest))


def record(config, loss):
    return {
        "config": {"lr_scale": config.lr_scale, "seed": config.seed},
        "evaluations": [{"loss": loss}],
    }


def followed(loss, seeds=3):
    """The family of a pretended trainer, and the (factor, seed) of its runs in order."""
    asked = []

    def get(wanted):
        asked.extend((config.lr_scale, config.seed) for config in wanted)
        return [record(config, loss(config.lr_scale) + config.seed / 10) for config in wanted]

    return follow(family_plan(TrainConfig(), TrainConfig(), seeds), get), asked


@pytest.mark.parametrize(
    ("lowest", "tried"),
    [
        (1.0, SCALES),
        (1.2, SCALES),
        (2.0, [*SCALES, 4.0]),
        (8.0, [*SCALES, 4.0, 8.0, 16.0]),
        (0.5, [*SCALES, 0.25]),
        (1 / 8, [*SCALES, 1 / 4, 1 / 8, 1 / 16]),
        (1e6, [*SCALES, 4.0, 8.0, 16.0]),
        (1e-6, [*SCALES, 1 / 4, 1 / 8, 1 / 16]),
    ],
)
def test_search_stops_where_both_neighbours_are_worse_or_at_its_limits(lowest, tried):
    family, asked = followed(valley(lowest))
    best = min(tried, key=valley(lowest))
    assert asked == [*((scale, 0) for scale in tried), *((best, seed) for seed in range(3))]
    assert list(family.search) == sorted(tried)
    assert [run["config"] for run in family.runs] == [dict(lr_scale=best, seed=s) for s in range(3)]


@pytest.mark.parametrize("diverged", SCALES)
def test_search_passes_over_a_run_that_diverged(diverged):
    family, _ = followed(lambda x: math.nan if x == diverged else valley(1.0)(x))
    assert family.runs[0]["config"]["lr_scale"] != diverged
    assert math.isinf(final_loss(family.search[diverged]))


def test_a_shared_search_gives_its_rate_to_another_configuration():
    def get(wanted):
        asked.extend((config.l3_k_max, config.lr_scale, config.seed) for config in wanted)
        return [record(config, valley(2.0)(config.lr_scale)) for config in wanted]

    asked, searched = [], TrainConfig(l3_k_max=8)
    family = follow(family_plan(TrainConfig(l3_k_max=4), searched, 2), get)
    assert asked == [*((8, scale, 0) for scale in (*SCALES, 4.0)), (4, 2.0, 0), (4, 2.0, 1)]
    assert [run["config"]["lr_scale"] for run in family.runs] == [2.0, 2.0]


@NAMES
def test_a_shared_search_is_made_with_the_presets_own_model(name):
    experiment = EXPERIMENTS[name]
    for config in experiment.configs("laptop", "stdlib").values():
        searched = experiment.searched(config, "laptop")
        assert searched.kind == config.kind
        if experiment.shared_search:
            assert searched in EXPERIMENTS["main"].configs("laptop", "stdlib").values()
        else:
            assert searched == config


def test_all_diverged_ends_the_search():
    assert next_scales(dict.fromkeys(SCALES, math.inf)) == (0.25,)
    family, _ = followed(lambda x: math.nan)
    assert min(family.search) == 1 / 16


@NAMES
@pytest.mark.parametrize("preset", PRESETS)
def test_families_are_valid_and_different(name, preset):
    experiment = EXPERIMENTS[name]
    configs = experiment.configs(preset, "stdlib")
    assert len({record_path(config, RUNS) for config in configs.values()}) == len(configs) >= 2
    assert {config.seed for config in configs.values()} == {0}
    assert experiment.question.endswith("?")


@pytest.mark.filterwarnings("ignore:the corpus has")
@NAMES
def test_every_family_trains(name, text_file):
    for config in EXPERIMENTS[name].configs("smoke", str(text_file)).values():
        rows = max(300, config.l3_n_emb * 300 // config.vocab_size)
        sizes = dict(vocab_size=300, l3_n_emb=rows, sequence_len=8)
        quick = replace(config, **sizes, num_iterations=1, eval_tokens=1)
        record = train(quick, show_progress=False).record
        assert math.isfinite(final_loss(record))


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


@pytest.fixture
def tiny(text_file, monkeypatch):
    """An experiment of seconds, on a text of its own, and that text."""
    config = TrainConfig(
        vocab_size=300,
        depth=1,
        sequence_len=8,
        batch_size=2,
        num_iterations=2,
        l3_n_emb=500,
        device="cpu",
    )
    families = {"dense": {"l3_after_layers": ""}, "l3": {}}
    experiment = Experiment("Better?", "none", lambda base: families, {"smoke": config})
    monkeypatch.setitem(EXPERIMENTS, "tiny", experiment)
    return str(text_file)


def test_runs_are_recorded_read_and_not_repeated(tiny, tmp_path, monkeypatch):
    made = run_experiment("tiny", "smoke", tiny, 2, 2, tmp_path)
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    runs = [run for family in made.values() for run in [*family.search.values(), *family.runs[1:]]]
    assert len(files) == len(runs) >= 8
    assert all(family.runs[0] in family.search.values() for family in made.values())
    assert [run["config"]["seed"] for run in made["l3"].runs] == [0, 1]
    assert made == results("tiny", "smoke", tiny, 2, tmp_path)
    assert run_experiment("tiny", "smoke", tiny, 2, 1, tmp_path) == made
    assert files == {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert "| l3 | " in summary(made)


def test_perplexity_by_the_word_is_recorded_and_not_passed_over(tiny, tmp_path):
    words = tmp_path / "words.txt"
    words.write_text("one line\n")
    made = run_experiment("tiny", "smoke", tiny, 1, 1, tmp_path / "with", str(words))
    assert all(family.runs[0]["words"]["words"] == 3 for family in made.values())
    assert made == results("tiny", "smoke", tiny, 1, tmp_path / "with")
    assert "| perplexity by the word |" in summary(made)
    run_experiment("tiny", "smoke", tiny, 1, 1, tmp_path / "without")
    with pytest.raises(ValueError, match="has no perplexity by the word"):
        run_experiment("tiny", "smoke", tiny, 1, 1, tmp_path / "without", str(words))


def test_a_diverged_run_needs_no_perplexity_by_the_word(text_file, tmp_path, monkeypatch):
    words = tmp_path / "words.txt"
    words.write_text("one line\n")
    sizes = dict(vocab_size=300, depth=1, sequence_len=8, batch_size=2, l3_after_layers="")
    config = TrainConfig(data=str(text_file), words=str(words), device="cpu", **sizes)
    config = replace(config, num_iterations=9, lr_scale=1e30)
    sha256 = train(replace(config, num_iterations=1, lr_scale=1.0), False).record["corpus"]["sha256"]
    for _ in range(2):  # made, then read
        record = recorded(config, tmp_path / "r.json", sha256)
        assert "diverged" in record
        assert final_loss(record) == math.inf


def test_missing_run_is_named(tiny, tmp_path):
    with pytest.raises(ValueError, match=r"tiny lacks the run dense-lr0\.5-seed0-\w+\.json"):
        results("tiny", "smoke", tiny, 1, tmp_path)


def test_record_of_another_text_is_refused(tiny, tmp_path):
    config = EXPERIMENTS["tiny"].configs("smoke", tiny)["dense"]
    path = record_path(config, tmp_path)
    write_record(path, {"config": asdict(config), "corpus": {"sha256": "other"}})
    with pytest.raises(ValueError, match="records a run on another text"):
        recorded(config, path, "this")


def test_record_of_another_configuration_is_refused(tiny, tmp_path):
    config = EXPERIMENTS["tiny"].configs("smoke", tiny)["l3"]
    path = record_path(config, tmp_path)
    write_record(path, {"config": asdict(replace(config, table_lr=0.9, device="cuda"))})
    with pytest.raises(ValueError, match=r"records a run with table_lr = 0\.9, not 0\.\d+: move"):
        recorded(config, path, "any")


def test_a_place_given_and_the_same_worked_out_are_one_run(tiny, tmp_path):
    config = EXPERIMENTS["tiny"].configs("smoke", tiny)["l3"]
    given = replace(config, l3_after_layers=str(config.depth // 2))
    path = record_path(config, tmp_path)
    assert path == record_path(given, tmp_path)
    assert config.l3_after_layers is None
    record = {"config": asdict(config), "corpus": {"sha256": "this"}}
    write_record(path, record)
    assert recorded(given, path, "this") == record


def curves(folder):
    records = {path.name: json.loads(path.read_text()) for path in folder.glob("*.json")}
    return {name: (r["train_loss"], r["evaluations"]) for name, r in records.items()}


def test_killed_experiment_ends_with_the_same_records(tmp_path):
    def command(folder):
        flags = ["--preset", "smoke", "--seeds", "1", "--jobs", "2", "--folder", folder]
        return [sys.executable, "-m", "l3paper.experiments", "tying", *flags]

    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    killed = tmp_path / "killed"
    process = subprocess.Popen(command(killed), **quiet)
    while len(list(killed.glob("*.json"))) < 2:
        assert process.poll() is None
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert subprocess.run(command(killed), **quiet).returncode == 0
    assert subprocess.run(command(tmp_path / "whole"), **quiet).returncode == 0
    assert curves(killed) == curves(tmp_path / "whole")


def test_interrupted_experiment_says_that_it_goes_on(tmp_path):
    flags = ["tying", "--preset", "smoke", "--jobs", "1", "--folder", tmp_path]
    command = [sys.executable, "-m", "l3paper.experiments", *flags]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell may ignore it
    )
    while not list(tmp_path.glob("*.json")):
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the runs as well
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert "interrupted; the same command goes on from here" in said
    assert "Traceback" not in said


def test_command_line_prints_the_table(tiny, tmp_path, capsys):
    flags = ["tiny", "--preset", "smoke", "--data", tiny, "--seeds", "1", "--folder", str(tmp_path)]
    assert main(flags) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "Better?"
    assert len(printed) == 5
    assert "+0.0000" in printed[3]
    assert printed[3].endswith(" 100% |")
    assert "by the word" not in printed[1]


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
