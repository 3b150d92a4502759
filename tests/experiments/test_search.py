"""The catalogue, the search for a learning rate, and the runs that a family needs."""

import math
from dataclasses import replace

import pytest

from l3paper.experiments.catalogue import DENSE, EXPERIMENTS, SMALL, Planned
from l3paper.experiments.runs import MissingRun, final_loss, run_name
from l3paper.experiments.search import next_scales, read_family
from l3paper.train import train
from l3paper.training.config import PRESETS, TrainConfig

SCALES = [0.5, 1.0, 2.0]
NAMES = pytest.mark.parametrize("name", EXPERIMENTS)


def valley(lowest):
    """A loss curve over learning rates, lowest at `lowest`."""
    return lambda lr_scale: abs(math.log2(lr_scale / lowest))


def train_family(loss, config, searched, seeds):
    """Train what a family asks for until it is complete; return it and its runs in order."""
    records = {}

    def read(wanted):
        if missing := [run for run in wanted if run not in records]:
            raise MissingRun("not yet", missing)
        return [records[run] for run in wanted]

    while True:
        try:
            return read_family(Planned(config, searched, seeds), read), list(records)
        except MissingRun as missing:
            for run in missing.runs:
                settings = {"lr_scale": run.lr_scale, "seed": run.seed}
                records[run] = {"config": settings, "evaluations": [{"loss": loss(run.lr_scale)}]}


def searched(loss):
    """The family of one configuration, and the (factor, seed) of its runs in order."""
    family, runs = train_family(loss, TrainConfig(), TrainConfig(), 3)
    return family, [(run.lr_scale, run.seed) for run in runs]


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
    family, trained = searched(valley(lowest))
    best = min(tried, key=valley(lowest))
    assert trained == [*((scale, 0) for scale in tried), (best, 1), (best, 2)]
    assert list(family.search) == sorted(tried)
    assert [run["config"] for run in family.runs] == [dict(lr_scale=best, seed=s) for s in range(3)]


@pytest.mark.parametrize("diverged", SCALES)
def test_search_skips_a_run_that_diverged(diverged):
    family, _ = searched(lambda x: math.nan if x == diverged else valley(1.0)(x))
    assert family.runs[0]["config"]["lr_scale"] != diverged
    assert math.isinf(final_loss(family.search[diverged]))


def test_all_diverged_ends_the_search():
    assert next_scales(dict.fromkeys(SCALES, math.inf)) == (0.25,)
    family, _ = searched(lambda x: math.nan)
    assert min(family.search) == 1 / 16


def test_a_shared_search_gives_its_rate_to_another_configuration():
    family, runs = train_family(valley(2.0), TrainConfig(l3_k_max=4), TrainConfig(l3_k_max=8), 2)
    trained = [(run.l3_k_max, run.lr_scale, run.seed) for run in runs]
    assert trained == [*((8, scale, 0) for scale in (*SCALES, 4.0)), (4, 2.0, 0), (4, 2.0, 1)]
    assert [run["config"]["lr_scale"] for run in family.runs] == [2.0, 2.0]


@NAMES
def test_a_shared_search_is_made_with_the_presets_own_model(name):
    experiment, preset = EXPERIMENTS[name], SMALL["laptop"]
    for config, searched, _ in experiment.plan("laptop", "stdlib").values():
        assert searched.kind == config.kind
        if experiment.shared_search:
            own = replace(searched, stand_in="", table_lr=preset.table_lr)
            assert own in (preset, replace(preset, **DENSE))
        else:
            assert searched == config


def test_long_runs_are_searched_like_the_rivals():
    long, rivals = EXPERIMENTS["long"], EXPERIMENTS["rivals"]
    searched = {planned.searched for planned in long.plan("laptop", "stdlib").values()}
    assert searched <= {*rivals.configs("laptop", "stdlib").values()}


def test_retrofits_continue_the_dense_family_of_the_rivals():
    configs, rivals = (EXPERIMENTS[name].configs("laptop", "stdlib") for name in ("retrofit", "rivals"))
    assert configs["dense"] == rivals["dense"]
    assert configs["continued"] == replace(rivals["dense"], init_from="dense")
    assert configs["continued with L3"] == replace(rivals["L3"], init_from="dense")


@NAMES
@pytest.mark.parametrize("preset", PRESETS)
def test_families_are_valid_and_different(name, preset):
    experiment = EXPERIMENTS[name]
    configs = experiment.configs(preset, "stdlib")
    assert len({run_name(config) for config in configs.values()}) == len(configs) >= 2
    assert {config.seed for config in configs.values()} == {0}
    assert experiment.question.endswith("?")
    plan = experiment.plan(preset, "stdlib")
    for config, _, seeds in plan.values():
        if config.init_from:
            assert plan[config.init_from].config.init_from is None
            assert plan[config.init_from].seeds >= seeds


@pytest.mark.filterwarnings("ignore:the corpus has")
@NAMES
def test_every_family_trains(name, text_file):
    for config in EXPERIMENTS[name].configs("smoke", str(text_file)).values():
        rows = max(300, config.l3_n_emb * 300 // config.vocab_size)
        sizes = dict(vocab_size=300, l3_n_emb=rows, sequence_len=8)
        quick = replace(config, **sizes, num_iterations=1, eval_tokens=1, init_from=None)
        assert math.isfinite(final_loss(train(quick, show_progress=False).record))
