"""Settings, presets and flags."""

import argparse
from dataclasses import asdict, fields, replace

import pytest

from helpers import as_flags
from l3paper.training.config import PRESETS, TrainConfig, add_flags, from_flags, preset_name


def parse(*flags):
    parser = argparse.ArgumentParser()
    add_flags(parser)
    return from_flags(parser.parse_args(flags))


@pytest.mark.parametrize("name", PRESETS)
def test_preset_is_a_model_with_one_layer_in_the_middle(name):
    model = PRESETS[name].model_config()
    assert model.l3_blocks == [model.n_layer // 2]
    assert parse("--preset", name) == PRESETS[name]


def test_flags_overrule_the_preset():
    assert parse("--preset", "smoke", "--depth", "3") == replace(PRESETS["smoke"], depth=3)
    assert parse("--preset=smoke", "--l3-after-layers=").model_config().l3_blocks == []


def test_command_line_takes_the_laptop_without_a_preset():
    assert parse() == TrainConfig() == PRESETS["laptop"]
    assert preset_name() == "smoke"


def test_environment_chooses_the_preset(monkeypatch):
    monkeypatch.setenv("L3_PRESET", "gpu")
    assert parse() == PRESETS["gpu"]
    assert preset_name() == "gpu"


def test_four_flags_of_nanochat():
    flags = "--l3-after-layers 1,2 --l3-n-emb 9000 --l3-d-up 77 --l3-k-max 33"
    model = parse(*flags.split()).model_config()
    assert model.l3_blocks == [1, 2]
    assert (model.l3_n_emb, model.l3_d_up, model.l3_k_max) == (9000, 77, 33)


def test_what_a_preset_has_on_can_be_turned_off():
    assert parse("--preset", "gpu").compile
    assert not parse("--preset", "gpu", "--no-compile").compile


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(l3_after_layers=[1, 3]), r"l3_after_layers is \[1, 3\]; it must be of type str"),
        (dict(data_bytes=0), "data_bytes is 0; it must be at least 1"),
        (dict(depth=True), "depth is True; it must be of type int"),
        (dict(lr_scale="1"), "lr_scale is '1'; it must be of type float"),
    ],
)
def test_settings_of_another_type_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**changes)


def test_every_setting_has_its_flag():
    changed = TrainConfig(
        data="a.txt",
        data_bytes=1,
        vocab_size=300,
        depth=3,
        n_embd=24,
        n_head=6,
        n_kv_head=2,
        sequence_len=4,
        batch_size=5,
        accumulate=5,
        num_iterations=6,
        l3_after_layers="0,2",
        l3_n_emb=301,
        l3_d_up=7,
        l3_k_max=8,
        l3_untied=True,
        l3_d_emb=9,
        l3_allocation="uniform",
        l3_variant="no-up",
        stand_in="moe",
        init_from="model",
        lr_scale=0.3,
        table_lr=0.4,
        router_lr=0.5,
        clip=0.6,
        overfit_batch=True,
        shard=True,
        compile=True,
        eval_every=10,
        eval_tokens=11,
        seed=12,
        device="cpu",
    )
    settings = asdict(changed)
    assert all(settings[option.name] != option.default for option in fields(TrainConfig))
    switches = [f"--{name.replace('_', '-')}" for name, value in settings.items() if value is True]
    others = {name: value for name, value in settings.items() if value is not True}
    assert parse(*switches, *as_flags(others)) == changed
