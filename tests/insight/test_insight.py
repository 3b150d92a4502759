"""The lens, the distance of a softmax from uniform, and the explorer of rows."""

import math
from dataclasses import asdict, replace

import pytest
import torch

from l3paper import GPT, GPTConfig, allocation_to_bounds
from l3paper.experiments.catalogue import EXPERIMENTS
from l3paper.insight.lens import TunedLens, depths, streams, train_lens
from l3paper.insight.record import insights, lens_drops, main
from l3paper.insight.rows import choice_of, choices, distance_from_uniform, explore, row_weights
from l3paper.layer import rms_norm
from l3paper.records import write_record

DENSE = GPTConfig(sequence_len=12, vocab_size=20, n_layer=3, n_head=2, n_kv_head=2, n_embd=16)
WITH_L3 = replace(DENSE, l3_after_layers="0,1", l3_n_emb=60, l3_d_up=24)


def make_model(config=WITH_L3):
    torch.manual_seed(0)
    model = GPT(config)
    if config.l3_blocks:
        model.set_l3_bounds(allocation_to_bounds([1, 2, 3, 4, 5] * 4))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


IDS = torch.randint(20, (3, 12), generator=torch.Generator().manual_seed(1))


def batches():
    generator = torch.Generator().manual_seed(2)
    while True:
        yield torch.randint(20, (4, 12), generator=generator)


def test_streams_are_those_of_the_forward_pass():
    model = make_model()
    found, final = streams(model, IDS)
    names = ["embedding", "block 0", "L3 after 0", "block 1", "L3 after 1", "block 2"]
    assert list(found) == depths(model) == names
    torch.testing.assert_close(found["embedding"], rms_norm(model.wte(IDS)))
    for i in (0, 1):
        delta = model.l3_layers[str(i)](found[f"block {i}"], IDS)
        torch.testing.assert_close(found[f"L3 after {i}"], found[f"block {i}"] + delta)
    torch.testing.assert_close(final, rms_norm(found["block 2"]))
    torch.testing.assert_close(model.logits(final), model(IDS))
    assert not model.blocks[0]._forward_hooks


def test_streams_of_a_compiled_model_are_those_of_this_call():
    model = make_model()
    expected = [streams(model, idx)[0] for idx in (IDS, IDS.flip(0))]
    model.compile_parts("eager")
    for _ in range(2):
        model(IDS, IDS)
        for idx, wanted in zip((IDS, IDS.flip(0)), expected, strict=True):
            torch.testing.assert_close(streams(model, idx)[0], wanted)


def test_untrained_lens_is_the_logit_lens():
    model = make_model()
    found, _ = streams(model, IDS)
    divergence = TunedLens(model)(IDS)
    torch.testing.assert_close(divergence["block 2"], torch.zeros(3, 12), atol=1e-5, rtol=0)
    target, guess = model(IDS).softmax(-1), model.logits(rms_norm(found["block 0"])).softmax(-1)
    expected = (target * (target / guess).log()).sum(-1)
    torch.testing.assert_close(divergence["block 0"], expected, atol=1e-5, rtol=1e-4)


def test_training_a_lens_brings_it_closer_and_leaves_the_model_alone():
    model = make_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    untrained = TunedLens(model)(IDS)
    lens = train_lens(model, batches(), steps=150, lr=0.01)
    trained = lens(IDS)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    for name in ("embedding", "block 0", "block 1"):
        assert trained[name].mean() < 0.8 * untrained[name].mean()


def test_row_weights_are_the_softmax_over_own_rows():
    layer = make_model().l3_layers["0"]
    x, ids = torch.randn(8, 16), torch.tensor([0, 1, 2, 3, 4, 4, 0, 2])
    weights = row_weights(layer, x, ids)
    assert weights.shape == (8, 5)
    for row, one, token in zip(weights, x, ids, strict=True):
        keys = layer.kv_weight[layer.bounds[token] : layer.bounds[token + 1]]
        expected = (keys @ rms_norm(one)).softmax(0)
        torch.testing.assert_close(row[: len(keys)], expected)
        assert not row[len(keys) :].any()


@pytest.mark.parametrize(
    ("weights", "rows", "distance"),
    [
        ([0.25, 0.25, 0.25, 0.25], 4, 0.0),
        ([1.0, 0.0, 0.0, 0.0], 4, math.log(4)),
        ([0.5, 0.5, 0.0, 0.0], 2, 0.0),
        ([1.0, 0.0, 0.0, 0.0], 1, 0.0),
        ([0.75, 0.25, 0.0, 0.0], 2, math.log(2) + 0.75 * math.log(0.75) + 0.25 * math.log(0.25)),
    ],
)
def test_distance_from_uniform(weights, rows, distance):
    found = distance_from_uniform(torch.tensor([weights]), torch.tensor([rows]))
    assert float(found) == pytest.approx(distance, abs=1e-6)


def test_choices_cover_every_layer_and_position():
    model = make_model()
    found = choices(model, IDS)
    assert list(found) == [0, 1]
    for choice in found.values():
        assert torch.equal(choice.token_ids, IDS.flatten())
        assert torch.equal(choice.rows, choice.token_ids % 5 + 1)
        assert (choice.distance >= -1e-6).all()
        assert (choice.distance <= choice.rows.log() + 1e-6).all()
    assert choices(make_model(DENSE), IDS) == {}


def test_distance_is_bias_plus_information_for_every_token():
    torch.manual_seed(0)
    ids, rows = torch.tensor([3] * 50 + [5] * 30), torch.tensor([4] * 50 + [2] * 30)
    weights = (3 * torch.randn(80, 4)).masked_fill(torch.arange(4) >= rows[:, None], -torch.inf)
    choice = choice_of(weights.softmax(-1), ids, rows, vocab_size=8)
    for token in (3, 5):
        here = ids == token
        mean = weights.softmax(-1)[here].mean(0)[: rows[here][0]]
        bias = float((mean * (mean * len(mean)).log()).sum())
        assert choice.bias[here].tolist() == pytest.approx([bias] * int(here.sum()), abs=1e-6)
        parts = choice.bias[here].mean() + choice.information[here].mean()
        torch.testing.assert_close(choice.distance[here].mean(), parts)
        assert choice.information[here].mean() > 0.1


@pytest.mark.parametrize(
    ("weights", "bias", "information"),
    [
        ([[1.0, 0.0], [1.0, 0.0]], math.log(2), 0.0),  # one row wins, whatever the context
        ([[1.0, 0.0], [0.0, 1.0]], 0.0, math.log(2)),  # the context chooses
        ([[0.5, 0.5], [0.5, 0.5]], 0.0, 0.0),  # an average
    ],
)
def test_lookup_average_and_a_row_that_always_wins_are_told_apart(weights, bias, information):
    choice = choice_of(torch.tensor(weights), torch.tensor([1, 1]), torch.tensor([2, 2]), 3)
    assert choice.bias.tolist() == pytest.approx([bias] * 2, abs=1e-6)
    assert float(choice.information.mean()) == pytest.approx(information, abs=1e-6)


def test_dead_rows_are_those_that_hardly_any_context_chooses():
    ids, rows = torch.tensor([1] * 30 + [2] * 5), torch.tensor([3] * 30 + [3] * 5)
    weights = torch.tensor([[0.99, 0.005, 0.005], [0.5, 0.495, 0.005]])[[0, 1] * 17 + [0]]
    choice = choice_of(weights, ids, rows, vocab_size=4)
    assert choice.dead_rows() == (1, 3)  # token 2 is too rare
    assert choice.dead_rows(least_positions=1) == (2, 6)


@torch.no_grad()
def test_explorer_finds_the_contexts_and_the_promoted_tokens():
    model = make_model()
    layer, token = model.l3_layers["1"], 4
    places = IDS.eq(token).nonzero().tolist()
    rows = explore(model, 1, token, IDS, most=3)
    assert len(rows) == 5
    assert sum(row.mean_weight for row in rows) == pytest.approx(1, abs=1e-5)
    stream = streams(model, IDS)[0]["block 1"]
    for number, row in enumerate(rows):
        heaviest = [occurrence.weight for occurrence in row.contexts]
        assert heaviest == sorted(heaviest, reverse=True)
        for weight, sequence, position in row.contexts:
            assert [sequence, position] in places
            x = stream[sequence, position][None]
            assert weight == pytest.approx(
                float(row_weights(layer, x, IDS.new_tensor([token]))[0, number])
            )
        value = layer.kv_weight[layer.bounds[token] + number]
        delta = layer.w_mix.weight[:, : layer.d_up] @ rms_norm(layer.w_up(value))
        assert row.promotes == (model.lm_head.weight @ delta).argsort(descending=True)[:3].tolist()


def test_variants_of_the_layer_are_refused():
    model = make_model(replace(WITH_L3, l3_variant="scaled-softmax"))
    for look in (lambda: choices(model, IDS)), (lambda: explore(model, 0, 4, IDS)):
        with pytest.raises(ValueError, match="layer is a ScaledSoftmax; only an L3Layer as published"):
            look()


def test_explorer_refuses_a_token_that_does_not_occur():
    with pytest.raises(ValueError, match="token is 7, which the text does not contain"):
        explore(make_model(), 0, 7, torch.zeros(1, 3, dtype=torch.long))


def test_recorded_insight(tmp_path):
    flags = ["--preset", "smoke", "--seeds", "1", "--folder", str(tmp_path)]
    assert main(flags) == 0
    written = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    found = insights("smoke", 1, tmp_path)
    (dense,), (l3,) = found["dense"], found["l3"]
    (mlp,) = insights("smoke", 1, tmp_path, models=["mlp"])["mlp"]
    assert list(mlp["lens"]) == ["embedding", "block 0", "mlp after 0", "block 1", "mlp after 1"]
    assert [count["step"] for count in l3["dead_rows"]] == [0, 5, 10]
    assert all(0 <= dead <= rows for dead, rows in l3["dead_rows"][-1]["dead_and_all"].values())
    assert list(dense["lens"]) == ["embedding", "block 0", "block 1"]
    assert list(l3["lens"]) == ["embedding", "block 0", "L3 after 0", "block 1", "L3 after 1"]
    assert dense["choices"] == {}
    for choice in l3["choices"].values():
        parts = choice["of_frequent"]
        assert parts["distance"] == pytest.approx(parts["bias"] + parts["information"], rel=1e-4)
        assert 1 <= parts["rows_used"] <= parts["rows"]
    words = {entry["token"].strip("␣") for entry in l3["explorer"]}
    assert words
    assert all(len(word) >= 3 and word.isalpha() for word in words)
    assert main(flags) == 0  # nothing is made anew
    assert written == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=r"there is no smoke-dense-seed1\.json"):
        insights("smoke", 2, tmp_path)
    assert sum(lens_drops(l3).values()) == pytest.approx(
        l3["lens"]["embedding"] - l3["lens"]["L3 after 1"]
    )
    assert lens_drops(l3)["block 0"] == l3["lens"]["embedding"] - l3["lens"]["block 0"]


def test_records_of_another_text_or_model_are_not_taken(tmp_path, text_file, capsys):
    flags = ["--preset", "smoke", "--seeds", "1", "--folder", str(tmp_path)]
    config = asdict(EXPERIMENTS["rivals"].configs("smoke", "stdlib")["dense"])
    for changes, said in [({}, "use another --folder"), ({"depth": 9}, "depth = 9, not 2")]:
        write_record(tmp_path / "smoke-dense-seed0.json", {"config": config | changes})
        assert main([*flags, "--data", str(text_file)]) == 2
        assert said in capsys.readouterr().err


def test_bad_flags_end_with_code_2(capsys):
    assert main(["--seeds", "0"]) == 2
    assert "seeds is 0; it must be at least 1" in capsys.readouterr().err
