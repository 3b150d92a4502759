"""The search for a learning rate, and experiments that go on where they stopped."""

import math
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest

from l3paper import experiments
from l3paper import train as train_module
from l3paper.config import PRESETS, TrainConfig
from l3paper.data import load_corpus
from l3paper.experiments import main, run_experiment, search_learning_rate, seeded_runs
from l3paper.records import read_records, write_record

NAME = "dense_vs_l3"
SCALES, SEEDS = [0.5, 1.0, 2.0], [0, 1, 2]


def valley(lowest):
    """A loss curve over learning rates, lowest at `lowest`."""
    return lambda lr_scale: abs(math.log2(lr_scale / lowest))


def pretended_loss(config):
    """Dense is best at x 1, L3 one factor beyond the edge, at x 4; later seeds are worse."""
    return valley(1.0 if config.l3_after_layers == "" else 4.0)(config.lr_scale) + config.seed / 10


class Trainer:
    """Stands in for `train`: counts the runs, and can fail after some of them."""

    def __init__(self):
        self.trained, self.fail_after = [], None

    def __call__(self, config):
        if len(self.trained) == self.fail_after:
            raise KeyboardInterrupt
        self.trained.append((config.lr_scale, config.seed))
        record = {"config": asdict(config), "evaluations": [{"loss": pretended_loss(config)}]}
        return SimpleNamespace(record=record)


@pytest.fixture
def trainer(monkeypatch):
    trainer = Trainer()
    monkeypatch.setattr(experiments, "train", trainer)
    return trainer


@pytest.mark.parametrize(
    ("lowest", "tried"),
    [
        (1.0, SCALES),
        (1.2, SCALES),
        (2.0, [*SCALES, 4.0]),
        (8.0, [*SCALES, 4.0, 8.0, 16.0]),
        (0.5, [*SCALES, 0.25]),
        (1 / 8, [*SCALES, 1 / 4, 1 / 8, 1 / 16]),
        (16.0, [*SCALES, 4.0, 8.0, 16.0]),
        (1 / 16, [*SCALES, 1 / 4, 1 / 8, 1 / 16]),
    ],
)
def test_search_stops_where_both_neighbours_are_worse(lowest, tried):
    asked = []

    def loss(lr_scale):
        asked.append(lr_scale)
        return valley(lowest)(lr_scale)

    assert search_learning_rate(loss) == min(tried, key=valley(lowest))
    assert asked == tried


@pytest.mark.parametrize(("lowest", "limit"), [(1e6, 16), (1e-6, 1 / 16)])
def test_search_stops_at_its_limits(lowest, limit):
    assert search_learning_rate(valley(lowest)) == limit


@pytest.mark.parametrize("diverged", SCALES)
def test_search_passes_over_a_run_that_diverged(diverged):
    best = search_learning_rate(lambda x: math.nan if x == diverged else valley(1.0)(x))
    assert best != diverged


def test_experiment_records_search_and_seeds(trainer, tmp_path, capsys):
    run_experiment(NAME, "smoke", tmp_path / NAME)
    dense = [(lr, 0) for lr in SCALES] + [(1.0, 1), (1.0, 2)]
    l3 = [(lr, 0) for lr in (*SCALES, 4.0, 8.0)] + [(4.0, 1), (4.0, 2)]
    assert trainer.trained == dense + l3
    records = read_records(NAME, tmp_path)
    assert len(records) == len(trainer.trained)
    assert {record["experiment"] for record in records} == {NAME}
    assert [r["config"]["seed"] for r in seeded_runs(records, "dense")] == SEEDS
    assert {r["config"]["lr_scale"] for r in seeded_runs(records, "dense")} == {1.0}
    assert {r["config"]["lr_scale"] for r in seeded_runs(records, "l3")} == {4.0}
    assert {r["family"] for r in seeded_runs(records, "l3")} == {"l3"}
    output = capsys.readouterr().out
    assert "dense: 0.1000 nats/token over 3 seeds, from 0.0000 to 0.2000" in output
    assert "learning rates x 4\n" in output


def test_families_differ_in_the_l3_layer_alone(trainer, tmp_path):
    run_experiment(NAME, "smoke", tmp_path / NAME)
    configs = {r["family"]: TrainConfig(**r["config"]) for r in read_records(NAME, tmp_path)}
    same = dict(lr_scale=1.0, seed=0)
    assert replace(configs["l3"], **same) == PRESETS["smoke"]
    assert replace(configs["dense"], **same) == replace(PRESETS["smoke"], l3_after_layers="")


def test_finished_runs_are_not_repeated(trainer, tmp_path):
    run_experiment(NAME, "smoke", tmp_path)
    before = len(trainer.trained)
    run_experiment(NAME, "smoke", tmp_path)
    assert len(trainer.trained) == before


def test_interrupted_experiment_goes_on(trainer, tmp_path):
    trainer.fail_after = 4
    with pytest.raises(KeyboardInterrupt):
        run_experiment(NAME, "smoke", tmp_path, only="dense")
    trainer.fail_after = None
    run_experiment(NAME, "smoke", tmp_path, only="dense")
    assert trainer.trained == [(0.5, 0), (1.0, 0), (2.0, 0), (1.0, 1), (1.0, 2)]


def test_real_record_is_recognised(text_file, tmp_path, monkeypatch):
    sizes = dict(vocab_size=300, depth=1, sequence_len=8, batch_size=2, num_iterations=1, l3_n_emb=500)
    small = replace(load_corpus(str(text_file), 300), name="stdlib")
    monkeypatch.setitem(PRESETS, "smoke", TrainConfig(**sizes))
    monkeypatch.setattr(train_module, "load_corpus", lambda *arguments: small)
    run_experiment(NAME, "smoke", tmp_path / NAME, only="l3")
    monkeypatch.setattr(experiments, "train", lambda config: pytest.fail("repeated a run"))
    run_experiment(NAME, "smoke", tmp_path / NAME, only="l3")
    assert len(seeded_runs(read_records(NAME, tmp_path), "l3")) == 3


def test_record_of_another_configuration_is_refused(trainer, tmp_path, capsys):
    arguments = [NAME, "--preset=smoke", "--family=dense", "--folder", str(tmp_path)]
    path = tmp_path / "dense-lr0.5-seed0.json"
    write_record(path, {"config": asdict(PRESETS["laptop"])})
    assert main(arguments) == 2
    assert f"{path} records another configuration" in capsys.readouterr().err
    assert trainer.trained == []


def test_command_line_runs_one_family(trainer, tmp_path):
    assert main([NAME, "--preset", "smoke", "--family", "dense", "--folder", str(tmp_path)]) == 0
    assert len(trainer.trained) == len(list(tmp_path.glob("dense-*.json"))) == 5
    assert len(list(tmp_path.iterdir())) == 5


@pytest.mark.parametrize("removed", ["dense-lr1-seed0", "dense-lr1-seed1", "dense-lr1-seed2"])
def test_missing_seed_is_refused(trainer, tmp_path, removed):
    run_experiment(NAME, "smoke", tmp_path / NAME)
    (tmp_path / NAME / f"{removed}.json").unlink()
    with pytest.raises(ValueError, match="family 'dense' lacks runs"):
        seeded_runs(read_records(NAME, tmp_path), "dense")


def test_unknown_family_is_refused_by_seeded_runs():
    with pytest.raises(ValueError, match="family 'moe' lacks runs"):
        seeded_runs([], "moe")


@pytest.mark.parametrize(
    ("arguments", "value", "allowed"),
    [
        ([NAME, "--family", "moe"], "--family is 'moe'", "dense, l3"),
        ([NAME, "--preset", "huge"], "'huge'", "laptop"),
        (["other"], "'other'", NAME),
    ],
)
def test_bad_arguments_end_with_code_2(trainer, capsys, arguments, value, allowed):
    with pytest.raises(SystemExit, match=r"^2$"):
        main(arguments)
    message = capsys.readouterr().err
    assert value in message
    assert allowed in message
    assert trainer.trained == []
