"""Runs that start from a saved model: what they keep, what is fresh, what they refuse."""

import json
import math
import shutil
from dataclasses import replace

import pytest
import torch

from helpers import SIZES, as_flags, flip
from l3paper.checkpoints.model import load_model, save_model
from l3paper.checkpoints.run import Checkpoints
from l3paper.checkpoints.start import shared_rows
from l3paper.data.streams import load_corpus, pack_corpus
from l3paper.files import sha256
from l3paper.train import main, train


@pytest.fixture(scope="session")
def saved(run_of, tmp_path_factory):
    """The folder of the finished tiny run of a kind."""

    def folder(kind):
        path = tmp_path_factory.mktemp("saved") / kind
        save_model(path, run_of(kind).model, run_of(kind).corpus.tokenizer)
        return path

    return folder


def first_model(config):
    """The model of a run as it is before the first step."""
    states = []

    def note(run, step):
        if step == 0:
            states.append({name: tensor.clone() for name, tensor in run.model.state_dict().items()})

    train(replace(config, num_iterations=1), False, before_step=note)
    return states[0]


def measures(evaluation):
    return evaluation["loss"], evaluation["bits_per_byte"]


@pytest.mark.parametrize(
    "changes",
    [
        dict(l3_after_layers=""),
        dict(l3_after_layers="1"),
        dict(l3_after_layers="0,1", l3_untied=True, l3_d_emb=24),
        dict(l3_after_layers="1", stand_in="engram"),
        dict(l3_after_layers="1", seed=5),
    ],
    ids=str,
)
def test_a_retrofitted_model_begins_with_the_loss_that_the_dense_model_ended_with(
    run_of, tiny, saved, changes
):
    start = saved("dense")
    record = train(tiny("dense", init_from=str(start), **changes), show_progress=False).record
    *_, sample, everything = run_of("dense").record["evaluations"]
    assert sample["step"] == 8
    assert not sample["everything"]
    assert measures(record["evaluations"][0]) == measures(sample)
    assert record["evaluations"][-1]["loss"] < everything["loss"]
    assert record["init_from"] == {"name": "dense", "sha256": sha256(start / "sums.json")}
    assert record["config"]["init_from"] == "dense"


def test_a_run_continues_with_another_run_of_the_same_model(run_of, tiny, saved):
    started = first_model(tiny("l3 untied", init_from=str(saved("l3 untied")), seed=3))
    trained = run_of("l3 untied").model.state_dict()
    assert all(torch.equal(trained[name], tensor) for name, tensor in started.items())


@pytest.mark.parametrize("changes", [dict(l3_allocation="uniform"), dict(l3_n_emb=400)], ids=str)
def test_of_another_allocation_a_token_keeps_the_rows_that_it_has_room_for(
    run_of, tiny, saved, changes
):
    config = tiny("l3 tied", **changes)
    started = first_model(replace(config, init_from=str(saved("l3 tied"))))
    trained, fresh = run_of("l3 tied").model.state_dict(), first_model(config)
    (table, bounds) = "l3_layers.1.kv_weight", "l3_layers.1.bounds"
    assert not torch.equal(started[bounds], trained[bounds])
    assert torch.equal(started[bounds], fresh[bounds])
    for name in trained.keys() - {table, bounds}:
        assert torch.equal(started[name], trained[name])
    for token in range(config.vocab_size):
        own, before, drawn = (
            state[table][state[bounds][token] : state[bounds][token + 1]]
            for state in (started, trained, fresh)
        )
        kept = min(len(own), len(before))
        assert torch.equal(own[:kept], before[:kept])
        assert torch.equal(own[kept:], drawn[kept:])


def test_rows_of_two_tables_are_matched_by_token():
    to, of = shared_rows(torch.tensor([0, 2, 3, 6]), torch.tensor([0, 1, 4, 6]))
    assert to.tolist() == [0, 2, 3, 4]  # one row of the first token, one of the second, two
    assert of.tolist() == [0, 1, 4, 5]


def test_resuming_does_not_read_the_weights_that_a_run_started_from(tiny, saved, tmp_path):
    start = shutil.copytree(saved("dense"), tmp_path / "start")
    config = tiny("l3 tied", init_from=str(start))
    undisturbed = train(config, False)

    class Stopped(Exception):
        pass

    def stop(run, step):
        if step == 5:
            raise Stopped

    with pytest.raises(Stopped):
        train(config, False, Checkpoints(tmp_path / "run", every=2), before_step=stop)
    assert first_model(tiny("l3 tied", init_from=str(tmp_path / "run" / "step-000000004")))
    (start / "weights.safetensors").unlink()
    moved = replace(config, init_from=str(start.rename(tmp_path / "moved")))
    resumed = train(moved, False, Checkpoints(tmp_path / "run", resume=True))
    for part in ("train_loss", "evaluations"):
        assert resumed.record[part] == undisturbed.record[part]
    expected = undisturbed.model.state_dict()
    assert all(torch.equal(expected[name], t) for name, t in resumed.model.state_dict().items())
    with pytest.raises(ValueError, match=r"of a run with init_from = '\w+', not None"):
        train(replace(config, init_from=None), False, Checkpoints(tmp_path / "run", resume=True))


def test_the_text_is_tokenized_as_the_model_was_trained(tiny, saved, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text(
        "\n<|endoftext|>\n".join(f"{i} quite other words, and {i * i}" for i in range(400))
    )
    start = saved("dense")
    run = train(tiny("dense", data=str(other), init_from=str(start)), show_progress=False)
    tokenizer = load_model(start, torch.device("cpu"))[1]
    assert run.corpus.tokenizer.to_str() == tokenizer.to_str()
    assert load_corpus(str(other), 300).tokenizer.to_str() != tokenizer.to_str()
    assert math.isfinite(run.record["evaluations"][-1]["loss"])


@pytest.mark.parametrize(
    ("kind", "flags", "said"),
    [
        ("dense", "--vocab-size 310", ["vocab_size is 310", "has 300"]),
        ("dense", "--n-embd 64", ["n_embd is 64", "has 32"]),
        ("dense", "--depth 3", ["depth is 3", "has 2"]),
        ("dense", "--n-head 2", ["n_head is 2", "has 1"]),
        ("dense", "--stand-in wider", ["mlp_width is", "has 128"]),
        ("dense", "--stand-in moe", ["n_experts is", "has 0"]),
        ("l3 tied", "--l3-after-layers 0", ["l3_after_layers is '0'", "include '1'"]),
        ("l3 tied", "--stand-in mlp", ["l3_after_layers is ''", "include '1'"]),
        ("l3 tied", "--l3-untied", ["l3_tie_kv is False", "has True"]),
        ("l3 tied", "--l3-d-up 64", ["l3_d_up is 64", "has 128"]),
        ("l3 tied", "--l3-variant no-up", ["l3_variant is 'no-up'", "has ''"]),
    ],
)
def test_a_model_that_does_not_fit_is_refused_with_both_values(refused, saved, kind, flags, said):
    start = saved(kind)
    code, message = refused("--init-from", str(start), *flags.split())
    assert code == 2
    assert len(message.splitlines()) == 1
    assert all(part in message for part in [*said, f"init_from = {str(start)!r}"])


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda folder: shutil.rmtree(folder), "there is no sums.json"),
        (lambda folder: (folder / "config.json").unlink(), "there is no config.json"),
        (lambda folder: flip(folder / "tokenizer.json"), "tokenizer.json is damaged"),
        (lambda folder: (folder / "weights.safetensors").unlink(), "there is no weights.safetensors"),
        (lambda folder: flip(folder / "weights.safetensors"), "weights.safetensors is damaged"),
    ],
)
def test_a_folder_without_an_intact_model_is_refused(refused, saved, tmp_path, spoil, said):
    start = shutil.copytree(saved("dense"), tmp_path / "start")
    spoil(start)
    code, message = refused("--init-from", str(start))
    assert (code, said in message, str(start) in message) == (2, True, True)


def test_an_empty_name_is_refused(refused):
    code, message = refused("--init-from=")
    assert (code, "init_from is empty; name the folder" in message) == (2, True)


def test_a_text_of_another_tokenizer_is_refused(refused, saved, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text(
        "\n<|endoftext|>\n".join(f"{i} quite other words, and {i * i}" for i in range(400))
    )
    pack_corpus(load_corpus(str(other), 300), tmp_path / "other.npz")
    code, message = refused("--init-from", str(saved("dense")), "--data", str(tmp_path / "other.npz"))
    assert code == 2
    assert f"data is {str(tmp_path / 'other.npz')!r}" in message
    assert "by another tokenizer" in message


def test_command_starts_from_what_it_saved(text_file, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--data", str(text_file), *as_flags(SIZES), "--record", "record.json"]
    assert main([*flags, "--l3-after-layers=", "--save", "base"]) == 0
    assert main([*flags, "--init-from", "base", "--save", "base"]) == 0
    assert "on cpu, starting from 'base'" in capsys.readouterr().err
    assert json.loads((tmp_path / "record.json").read_text())["init_from"]["name"] == "base"
    assert load_model(tmp_path / "base", torch.device("cpu"))[0].config.l3_blocks == [1]
