"""Training from the command line to the record."""

import argparse
import json
import math
import subprocess
import sys
from dataclasses import asdict, fields, replace
from functools import partialmethod

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from l3paper import GPT
from l3paper.checkpoints.model import load_model
from l3paper.data import batches
from l3paper.data.corpus import read_documents, split_documents
from l3paper.data.streams import load_corpus, validation_batches
from l3paper.train import main, train
from l3paper.training import build as build_module
from l3paper.training import steps as steps_module
from l3paper.training.config import PRESETS, TrainConfig, add_flags, from_flags, preset_name
from l3paper.training.evaluation import evaluate, word_perplexity
from l3paper.training.steps import learning_rate_factor

SIZES = dict(
    vocab_size=300,
    depth=2,
    n_embd=32,
    sequence_len=16,
    batch_size=4,
    num_iterations=8,
    eval_every=3,
    l3_n_emb=500,
)
KINDS = {
    "dense": dict(l3_after_layers=""),
    "l3 tied": dict(l3_k_max=16),
    "l3 untied": dict(l3_after_layers="0,1", l3_untied=True, l3_d_emb=24, l3_k_max=16),
}
EVERY = pytest.mark.parametrize("kind", KINDS)


def as_flags(settings):
    return [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]


def parse(*flags):
    parser = argparse.ArgumentParser()
    add_flags(parser)
    return from_flags(parser.parse_args(flags))


@pytest.fixture(scope="module")
def tiny(text_file):
    """The configuration of a kind, with changes."""
    settings = dict(data=str(text_file), eval_tokens=200, **SIZES)
    return lambda kind, **changes: TrainConfig(**settings | KINDS[kind] | changes)


@pytest.fixture(scope="module")
def run_of(tiny):
    """The finished tiny run of a kind; every kind runs once."""
    runs = {}

    def get(kind):
        if kind not in runs:
            runs[kind] = train(tiny(kind), show_progress=False)
        return runs[kind]

    return get


@pytest.fixture
def refused(text_file, capsys):
    """Call the command line with bad flags; the exit code and what it says on stderr."""

    def call(*flags):
        try:
            code = main(["--data", str(text_file), *as_flags(SIZES), *flags])
        except SystemExit as end:
            code = end.code
        written = capsys.readouterr()
        assert written.out == ""
        return code, written.err

    return call


def test_passes_add_up_to_the_batch(tiny):
    torch.set_default_dtype(torch.float64)
    try:
        once, twice = (
            train(tiny("l3 tied", accumulate=passes), show_progress=False).record for passes in (1, 2)
        )
    finally:
        torch.set_default_dtype(torch.float32)
    for curve in ("train_loss", "evaluations"):
        losses = [[point["loss"] for point in record[curve]] for record in (once, twice)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-6)  # Muon rounds to bfloat16


def test_compiled_run_equals_the_run(tiny, run_of, monkeypatch):
    eager = partialmethod(GPT.compile_parts, backend="eager")
    monkeypatch.setattr(GPT, "compile_parts", eager)
    found = train(tiny("l3 tied", compile=True), show_progress=False).record["evaluations"]
    expected = run_of("l3 tied").record["evaluations"]
    assert [e["loss"] for e in found] == pytest.approx([e["loss"] for e in expected], rel=1e-4)


def test_runs_of_one_process_share_the_scan_of_their_text(tiny, monkeypatch):
    scans, allocate = [], build_module.ALLOCATIONS["lzw"]
    monkeypatch.setattr(build_module, "_allocations", {})
    monkeypatch.setitem(
        build_module.ALLOCATIONS, "lzw", lambda *settings: scans.append(1) or allocate(*settings)
    )
    config = tiny("l3 tied")
    corpus = load_corpus(config.data, config.vocab_size)
    first, again = (build_module.build_model(config, corpus)[0] for _ in range(2))
    assert torch.equal(*(next(iter(m.l3_layers.values())).bounds for m in (first, again)))
    assert len(scans) == 1
    rows = config.model_config().l3_n_emb + 1
    build_module.build_model(replace(config, l3_n_emb=rows), corpus)
    assert len(scans) == 2


def test_passes_must_divide_the_batch(refused):
    said = "batch_size is 4; accumulate = 3 passes of 1 processes must divide it evenly"
    code, message = refused("--accumulate=3")
    assert (code, said in message) == (2, True)


# The record of a run


@EVERY
def test_record_describes_its_run(run_of, tiny, kind):
    model, corpus, record = run_of(kind).model, run_of(kind).corpus, run_of(kind).record
    config = tiny(kind)
    assert TrainConfig(**record["config"]) == replace(config, data="woods.txt")
    assert record["corpus"] == {
        "name": "woods.txt",
        "sha256": corpus.sha256,
        "train_tokens": len(corpus.train),
        "validation_tokens": len(corpus.validation),
        "unigram_entropy": corpus.unigram_entropy(),
    }
    assert [e["step"] for e in record["evaluations"]] == [0, 3, 6, 8]
    assert [e["tokens"] for e in record["evaluations"]] == [0, 192, 384, 512]
    assert [e["everything"] for e in record["evaluations"]] == [False, False, False, True]
    assert [point["step"] for point in record["train_loss"]] == list(range(1, 9))
    assert record["tokens_per_second"] > 0
    assert record["seconds"] > 0
    assert record["sample"].startswith(corpus.tokenizer.decode(corpus.validation[:8].tolist()))
    assert record["environment"]["device"].startswith(f"{model.device.type}: ")
    assert json.loads(json.dumps(record)) == record


@EVERY
def test_losses_are_finite_and_fall(run_of, kind):
    record = run_of(kind).record
    losses = [point["loss"] for point in record["train_loss"] + record["evaluations"]]
    assert all(math.isfinite(loss) for loss in losses)
    first, last = record["evaluations"][0], record["evaluations"][-1]
    assert first["loss"] == pytest.approx(math.log(300), abs=0.1)  # it begins knowing nothing
    assert last["loss"] < first["loss"] - 0.3
    assert last["bits_per_byte"] < first["bits_per_byte"]


@EVERY
def test_recorded_counts_equal_those_of_the_model(run_of, kind):
    model, corpus, costs = run_of(kind).model, run_of(kind).corpus, run_of(kind).record["model"]
    layers = model.l3_layers.values()
    tables = {table for layer in layers for table in layer.tables()}
    total = sum(p.numel() for p in model.parameters())
    active = total - sum(table.numel() for table in tables)
    for layer in layers:
        own_rows = layer.bounds.diff()[corpus.train.astype(np.int64)].double().mean().item()
        active += own_rows * sum(table.shape[1] for table in set(layer.tables()))
    assert len(layers) == {"dense": 0, "l3 tied": 1, "l3 untied": 2}[kind]
    assert costs["total_parameters"] == total
    assert costs["active_parameters"] == pytest.approx(active)
    assert costs["table_bytes"] == sum(table.nbytes for table in tables)


@pytest.mark.parametrize("kind", ["dense", "l3 tied"])
def test_longer_training_learns_far_more_than_frequencies(tiny, kind):
    record = train(tiny(kind, num_iterations=120, batch_size=8, eval_every=50), False).record
    assert record["evaluations"][-1]["loss"] < 0.2 * record["corpus"]["unigram_entropy"]
    curve = record["train_loss"]
    assert len(curve) == 60  # at most a hundred points: here means over two steps each
    assert curve[-1]["step"] == 120
    assert curve[-1]["loss"] < 0.2 * record["corpus"]["unigram_entropy"] < curve[0]["loss"]


def test_seed_decides_all_losses(run_of, tiny):
    def losses(record):
        return record["train_loss"], record["evaluations"]

    again = train(tiny("l3 tied"), show_progress=False).record
    other = train(tiny("l3 tied", seed=1), show_progress=False).record
    assert losses(again) == losses(run_of("l3 tied").record)
    assert losses(again)[0] != losses(other)[0]


@pytest.mark.parametrize("kind", ["l3 tied", "l3 untied"])
def test_l3_model_begins_as_the_dense_model_of_its_seed(run_of, kind):
    dense, l3 = run_of("dense").record, run_of(kind).record
    assert l3["evaluations"][0] == pytest.approx(dense["evaluations"][0])
    assert l3["train_loss"][0]["loss"] == pytest.approx(dense["train_loss"][0]["loss"])


def test_seed_and_step_decide_the_batches(tiny, monkeypatch):
    asked = []
    original = batches.training_batch

    def spy(stream, *arguments):
        asked.append(arguments)
        return original(stream, *arguments)

    monkeypatch.setattr(batches, "training_batch", spy)
    train(tiny("dense", seed=6), show_progress=False)
    assert asked[:8] == [(4, 16, 6, step) for step in range(8)]  # then, perhaps, the one ahead


@EVERY
@pytest.mark.parametrize("changes", [{"lr_scale": 0.5}, {"table_lr": 0.2}, {"router_lr": 0.2}], ids=str)
def test_learning_rates_matter_where_they_should(run_of, tiny, kind, changes):
    changed = train(tiny(kind, num_iterations=8, **changes), show_progress=False).record
    same = changed["train_loss"] == run_of(kind).record["train_loss"]
    assert same == ("router_lr" in changes or (kind == "dense" and "table_lr" in changes))


def test_learning_rate_of_the_router_reaches_the_experts(tiny):
    losses = [
        train(tiny("l3 tied", stand_in="moe", **changes), show_progress=False).record["train_loss"]
        for changes in ({}, {"table_lr": 0.2}, {"router_lr": 0.2})
    ]
    assert losses[0] == losses[1] != losses[2]


# Evaluation


@EVERY
def test_evaluation_equals_cross_entropy_of_the_logits(run_of, text_file, kind):
    model, corpus = run_of(kind).model, run_of(kind).corpus
    stream = torch.from_numpy(corpus.validation.astype(np.int64))
    nats = 0.0
    with torch.no_grad():
        for start in range(0, len(stream) - 1, 16):
            window = stream[start : start + 17]
            nats += F.cross_entropy(model(window[None, :-1])[0], window[1:], reduction="sum").item()
    text_bytes = sum(len(d.text.encode()) for d in split_documents(read_documents(str(text_file)))[1])
    last = run_of(kind).record["evaluations"][-1]
    assert last["loss"] == pytest.approx(nats / (len(stream) - 1), rel=1e-5)
    assert last["bits_per_byte"] == pytest.approx(nats / math.log(2) / text_bytes, rel=1e-5)
    assert evaluate(model, corpus.validation, corpus.token_bytes, batch_size=3) == pytest.approx(
        (last["loss"], last["bits_per_byte"]), rel=1e-5
    )


TEXT = " = Title = \n\n the <unk> model is , by word , compared .\n"


@EVERY
def test_word_perplexity_spreads_all_nats_over_words_and_line_ends(run_of, kind):
    model, corpus = run_of(kind).model, run_of(kind).corpus
    found = word_perplexity(model, corpus, TEXT, batch_size=2)
    ids = torch.tensor([0, *corpus.tokenizer.encode(TEXT).ids])
    nats = 0.0
    with torch.no_grad():
        for start in range(0, len(ids) - 1, 16):
            window = ids[start : start + 17]
            nats += F.cross_entropy(model(window[None, :-1])[0], window[1:], reduction="sum").item()
    assert found["words"] == (3 + 1) + 1 + (10 + 1)
    assert found["tokens"] == len(ids) - 1
    assert found["perplexity"] == pytest.approx(math.exp(nats / found["words"]), rel=1e-4)
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / len(TEXT), rel=1e-5)


def test_a_perplexity_beyond_all_numbers_is_infinite(run_of):
    run = run_of("dense")
    found = word_perplexity(run.model, run.corpus, 600 * "Q", 4)
    assert found["perplexity"] == math.inf


def test_words_are_part_of_the_record(tiny, tmp_path):
    file = tmp_path / "words.txt"
    file.write_text(TEXT)
    record = train(replace(tiny("dense"), words=str(file)), show_progress=False).record
    assert record["config"]["words"] == record["words"]["name"] == "words.txt"
    assert 1 < record["words"]["perplexity"] < math.inf


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "No such file"), (b" \n\n", "holds no words"), (b"\xff", "not UTF-8")],
)
def test_bad_words_are_refused_before_training(refused, tmp_path, monkeypatch, content, message):
    monkeypatch.setattr(steps_module, "train_step", lambda *arguments: pytest.fail("worked in vain"))
    file = tmp_path / "words.txt"
    if content is not None:
        file.write_bytes(content)
    code, text = refused("--words", str(file))
    assert (code, message in text) == (2, True)


@pytest.fixture
def evaluated(run_of, monkeypatch):
    """The numbers of the batches of 2 x 16 tokens that an evaluation takes, and how many there are."""
    model, corpus = run_of("dense").model, run_of("dense").corpus
    every = [idx for idx, _ in validation_batches(corpus.validation, 2, 16)]

    def call(max_tokens):
        taken = []
        monkeypatch.setattr(GPT, "forward", lambda _, idx, targets: taken.append(idx) or torch.ones(()))
        evaluate(model, corpus.validation, corpus.token_bytes, 2, max_tokens)
        return [next(i for i, idx in enumerate(every) if idx.equal(one)) for one in taken], len(every)

    return call


@pytest.mark.parametrize("max_tokens", [None, 10**9])
def test_evaluation_takes_everything_without_a_lower_limit(evaluated, max_tokens):
    taken, count = evaluated(max_tokens)
    assert taken == list(range(count))


@pytest.mark.parametrize("wanted", [1, 2, 5, 12])
def test_evaluation_of_a_sample_is_spread_over_the_text(evaluated, wanted):
    taken, count = evaluated(32 * wanted)
    assert len(taken) == wanted
    assert np.diff([*taken, count]).max() <= 2 * count / wanted


# Schedule and settings


def test_learning_rate_rises_stays_and_falls():
    curve = [learning_rate_factor(step, 200) for step in range(200)]
    assert curve[:4] == [0.25, 0.5, 0.75, 1.0]
    assert set(curve[4:101]) == {1.0}
    assert curve[150] == 0.5
    assert curve[101:] == sorted(curve[101:], reverse=True)
    assert curve[199] == pytest.approx(0.01)


@given(steps=st.integers(1, 400), share=st.floats(0, 1, exclude_max=True))
def test_learning_rate_is_never_zero_nor_above_its_peak(steps, share):
    assert 0 < learning_rate_factor(int(share * steps), steps) <= 1


def test_every_step_takes_its_factor(tiny, monkeypatch):
    rates = []
    original = steps_module.train_step

    def spy(run, step):
        rates.append([group["lr"] for group in run.optimizer.param_groups])
        return original(run, step)

    monkeypatch.setattr(steps_module, "train_step", spy)
    model = train(tiny("l3 tied", lr_scale=2.0), show_progress=False).model
    base = [group["lr"] for group in model.setup_optimizer().param_groups]
    expected = [[2 * learning_rate_factor(step, 8) * lr for lr in base] for step in range(8)]
    assert np.allclose(rates, expected)


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
        lr_scale=0.3,
        table_lr=0.4,
        router_lr=0.5,
        clip=0.6,
        overfit_batch=True,
        shard=True,
        compile=True,
        eval_every=10,
        eval_tokens=11,
        words="b.txt",
        seed=12,
        device="cpu",
    )
    settings = asdict(changed)
    assert all(settings[option.name] != option.default for option in fields(TrainConfig))
    switches = [f"--{name.replace('_', '-')}" for name, value in settings.items() if value is True]
    others = {name: value for name, value in settings.items() if value is not True}
    assert parse(*switches, *as_flags(others)) == changed


# The command line


def test_help_explains_every_setting(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "400")
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["--help"])
    text = capsys.readouterr().out
    for option in fields(TrainConfig):
        assert f"--{option.name.replace('_', '-')} " in text
        assert option.metadata["help"] in text


BAD_FLAGS = [
    ("--depth 0", "depth is 0", "at least 1"),
    ("--depth two", "--depth", "'two'"),
    ("--sequence-len 0", "sequence_len is 0", "at least 1"),
    ("--batch-size 0", "batch_size is 0", "at least 1"),
    ("--num-iterations 0", "num_iterations is 0", "at least 1"),
    ("--eval-every 0", "eval_every is 0", "at least 1"),
    ("--eval-tokens 0", "eval_tokens is 0", "at least 1"),
    ("--n-embd -32", "n_embd is -32", "at least 0"),
    ("--n-head 5", "n_head = 5", "n_embd = 32"),
    ("--n-head 32", "n_head = 32", "n_embd = 32"),
    ("--n-head 4 --n-kv-head 3", "n_kv_head is 3", "divide n_head = 4"),
    ("--seed -1", "seed is -1", "at least 0"),
    ("--lr-scale 0", "lr_scale is 0.0", "above 0"),
    ("--lr-scale nan", "lr_scale is nan", "above 0"),
    ("--lr-scale inf", "lr_scale is inf", "finite"),
    ("--table-lr -1", "table_lr is -1.0", "above 0"),
    ("--router-lr 0", "router_lr is 0.0", "above 0"),
    ("--vocab-size 256", "vocab_size is 256", "257"),
    ("--vocab-size 90000 --l3-n-emb 0", "vocab_size is 90000", "supports only"),
    ("--l3-after-layers 2", "l3_after_layers is '2'", "0 .. 1"),
    ("--l3-after-layers 1,1", "l3_after_layers is '1,1'", "different blocks"),
    ("--l3-after-layers a", "l3_after_layers is 'a'", "'1,3'"),
    ("--l3-n-emb 299", "l3_n_emb is 299", "at least 300"),
    ("--l3-k-max 0", "l3_k_max is 0", "at least 1"),
    ("--l3-k-max -3", "l3_k_max is -3", "at least 1"),
    ("--l3-d-up -1", "l3_d_up is -1", "at least 0"),
    ("--l3-d-emb 16", "d_emb is 16", "n_embd = 32"),
    ("--l3-d-emb -1 --l3-untied", "l3_d_emb is -1", "at least 0"),
    ("--device tpu", "device is 'tpu'", "cpu, cuda or auto"),
    ("--data nowhere", "'nowhere'", "'stdlib' or 'hf:NAME'"),
    ("--data hf:some/set", "'hf:some/set'", "needed"),
    ("--data-bytes 0", "max_bytes is 0", "at least 1"),
    ("--preset huge", "'huge'", "smoke"),
    ("--unknown 3", "unrecognized", "--unknown 3"),
]


@pytest.mark.parametrize(("flags", "value", "allowed"), BAD_FLAGS, ids=[f for f, _, _ in BAD_FLAGS])
def test_bad_flag_ends_with_code_2_and_a_reason(refused, flags, value, allowed):
    code, message = refused(*flags.split())
    assert code == 2
    assert "error: " in message
    assert value in message
    assert allowed in message


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_missing_device_is_refused(refused):
    code, message = refused("--device", "cuda")
    assert (code, "device is 'cuda', but" in message) == (2, True)


def test_bad_preset_in_the_environment_is_refused(refused, monkeypatch):
    monkeypatch.setenv("L3_PRESET", "huge")
    code, message = refused()
    assert (code, "L3_PRESET is 'huge'; choose one of smoke, laptop, gpu" in message) == (2, True)


def test_missing_extra_is_refused(refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    code, message = refused("--data=hf:some/set", "--data-bytes=100")
    assert (code, "the extra l3paper[hf]: pip install datasets" in message) == (2, True)


def test_text_too_short_for_one_sequence_is_refused_before_evaluating(refused, monkeypatch):
    monkeypatch.setattr(steps_module, "evaluate", lambda *arguments: pytest.fail("worked in vain"))
    code, message = refused("--sequence-len", "99999")
    assert (code, "sequence_len = 99999 needs 100000 or more" in message) == (2, True)


def test_record_that_cannot_be_written_is_refused_before_training(refused, tmp_path, monkeypatch):
    monkeypatch.setattr("l3paper.train.train", lambda *_, **__: pytest.fail("trained in vain"))
    code, message = refused("--record", str(tmp_path))
    assert (code, str(tmp_path) in message) == (2, True)


@pytest.mark.parametrize(("layers", "kind"), [("", "dense"), ("1", "l3")])
def test_record_goes_to_the_cache_by_default(text_file, tmp_path, monkeypatch, capsys, layers, kind):
    monkeypatch.setenv("L3_CACHE", str(tmp_path))
    flags = [*as_flags(SIZES), "--l3-after-layers", layers, "--seed=5"]
    assert main(["--data", str(text_file), *flags]) == 0
    path = tmp_path / "runs" / f"{kind}-depth2-seed5.json"
    record = json.loads(path.read_text())
    assert record["config"]["seed"] == 5
    output = capsys.readouterr().out
    assert output.endswith(f"record: {path}\n")
    assert f"{record['evaluations'][-1]['loss']:.3f} nats/token" in output
    assert f"parameters: {record['model']['total_parameters']:,}, active" in output


def test_real_command_line_trains_and_records(text_file, tmp_path):
    command = [sys.executable, "-m", "l3paper.train", "--data", text_file, *as_flags(SIZES)]
    command += ["--record", tmp_path / "run.json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run.json").read_text())["evaluations"][-1]["step"] == 8
    assert "held-out tokens" in done.stdout
    assert "Warning" not in done.stderr


def test_real_command_line_refuses_with_one_line():
    command = [sys.executable, "-m", "l3paper.train", "--depth", "0"]
    done = subprocess.run(command, capture_output=True, text=True)
    message = "python -m l3paper.train: error: depth is 0; it must be at least 1\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", message)


def test_model_may_be_saved_again(text_file, tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()  # a folder of this name beside it is no obstacle either
    monkeypatch.chdir(tmp_path)
    flags = ["--data", str(text_file), *as_flags(SIZES), "--record", "record.json"]
    assert main([*flags, "--save", "mine"]) == main([*flags, "--save", "mine"]) == 0
    assert load_model(tmp_path / "mine", torch.device("cpu"))


@pytest.mark.parametrize(
    ("save", "others", "said"),
    [
        ("thesis", [], "holds something else"),
        ("thesis/text.txt", [], "holds something else"),
        (".", [], "holds something else"),
        ("new", ["--checkpoint-dir", "new"], "is for a model alone"),
        ("new", ["--checkpoint-dir", "new/steps"], "is for a model alone"),
        ("new", ["--record", "new/record.json"], "is for a model alone"),
    ],
)
def test_saving_a_model_replaces_nothing_else(refused, tmp_path, monkeypatch, save, others, said):
    monkeypatch.setattr("l3paper.train.train", lambda *_, **__: pytest.fail("trained in vain"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "text.txt").write_text("years of work")
    code, message = refused("--record", "record.json", "--save", save, *others)
    assert (code, said in message) == (2, True)
    assert (tmp_path / "thesis" / "text.txt").read_text() == "years of work"


def test_saved_model_is_the_trained_one(text_file, tmp_path, capsys):
    folder, record = tmp_path / "model", tmp_path / "record.json"
    flags = ["--data", str(text_file), *as_flags(SIZES), "--record", str(record), "--save", str(folder)]
    assert main(flags) == 0
    assert f"model: {folder}" in capsys.readouterr().out
    model, _ = load_model(folder, torch.device("cpu"))
    corpus = load_corpus(str(text_file), model.config.vocab_size)
    loss, _ = evaluate(model, corpus.validation, corpus.token_bytes, batch_size=2)
    assert loss == pytest.approx(json.loads(record.read_text())["evaluations"][-1]["loss"], rel=1e-5)


def test_model_that_cannot_be_saved_is_refused_before_training(refused, tmp_path, monkeypatch):
    monkeypatch.setattr("l3paper.train.train", lambda *_, **__: pytest.fail("trained in vain"))
    (tmp_path / "file").touch()
    record = str(tmp_path / "record.json")
    code, message = refused("--record", record, "--save", str(tmp_path / "file" / "model"))
    assert (code, "cannot be written" in message) == (2, True)
