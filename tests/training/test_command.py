"""`python -m l3paper.train`: what it refuses, writes and prints."""

import json
import re
import subprocess
import sys
from dataclasses import fields

import pytest
import torch

from helpers import SIZES, as_flags
from l3paper.checkpoints.model import load_model
from l3paper.data.streams import load_corpus
from l3paper.train import main
from l3paper.training.config import TrainConfig
from l3paper.training.evaluation import evaluate


def test_help_explains_every_setting(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "400")
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["--help"])
    text = capsys.readouterr().out
    for option in fields(TrainConfig):
        assert re.search(f"--{option.name.replace('_', '-')}[ ,]", text)
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
    ("--seed 99999999999999999999", "seed is 99999999999999999999", "at most"),
    ("--vocab-size 1" + 30 * "0", "vocab_size is 1000", "at most"),
    ("--depth 2147483647 --n-embd 2 --n-head 1", "n_layer is 2147483647", "at most"),
    ("--stand-in deeper --l3-d-up 2147483647", "l3_d_up is 2147483647", "at most"),
    ("--lr-scale 0", "lr_scale is 0.0", "above 0"),
    ("--lr-scale nan", "lr_scale is nan", "above 0"),
    ("--lr-scale inf", "lr_scale is inf", "finite"),
    ("--lr-scale 1e45", "lr_scale is 1e+45", "at most 1e+30"),
    ("--table-lr -1", "table_lr is -1.0", "above 0"),
    ("--table-lr 1e30", "table_lr is 1e+30", "at most 1000"),
    ("--router-lr 0", "router_lr is 0.0", "above 0"),
    ("--vocab-size 256", "vocab_size is 256", "257"),
    ("--vocab-size 90000 --l3-n-emb 0", "vocab_size is 90000", "supports only"),
    ("--l3-after-layers 2", "l3_after_layers is '2'", "0 .. 1"),
    ("--l3-after-layers 1,1", "l3_after_layers is '1,1'", "different blocks"),
    ("--l3-after-layers a", "l3_after_layers is 'a'", "'1,3'"),
    ("--l3-n-emb 299", "l3_n_emb is 299", "at least 300"),
    ("--l3-k-max 0", "l3_k_max is 0", "at least 1"),
    ("--l3-k-max 1", "l3_k_max is 1", "cannot own"),
    ("--l3-k-max -3", "l3_k_max is -3", "at least 1"),
    ("--l3-d-up -1", "l3_d_up is -1", "at least 0"),
    ("--l3-d-emb 16", "d_emb is 16", "n_embd = 32"),
    ("--l3-d-emb -1 --l3-untied", "l3_d_emb is -1", "at least 0"),
    ("--device tpu", "device is 'tpu'", "cpu, cuda or auto"),
    ("--data nowhere", "'nowhere'", "'stdlib' or 'hf:NAME'"),
    ("--data=", "data is empty", "'stdlib' or 'hf:NAME'"),
    ("--save=", "--save", "the path is empty"),
    ("--checkpoint-dir=", "--checkpoint-dir", "the path is empty"),
    ("--data hf:some/set", "'hf:some/set'", "needed"),
    ("--data-bytes 0", "data_bytes is 0", "at least 1"),
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


def test_text_too_short_for_one_sequence_is_refused_before_training(refused):
    code, message = refused("--sequence-len", "99999")
    assert (code, "sequence_len = 99999 needs 100000 or more" in message) == (2, True)


def test_record_that_cannot_be_written_is_refused_before_training(refused, tmp_path):
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
    loss = evaluate(model, corpus.validation, batch_size=2).loss
    assert loss == pytest.approx(json.loads(record.read_text())["evaluations"][-1]["loss"], rel=1e-5)


def test_model_that_cannot_be_saved_is_refused_before_training(refused, tmp_path):
    (tmp_path / "file").touch()
    record = str(tmp_path / "record.json")
    code, message = refused("--record", record, "--save", str(tmp_path / "file" / "model"))
    assert (code, "cannot be written" in message) == (2, True)
