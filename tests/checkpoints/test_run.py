"""Runs that are interrupted, damaged, misused, and resume."""

import json
import math
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save

from helpers import KINDS, SIZES, Bomb, as_flags, flip, rewrite
from kills import kill_and_resume
from l3paper import GPT
from l3paper.checkpoints.model import load_model, save_model
from l3paper.checkpoints.run import Checkpoints
from l3paper.data.batches import batch_starts, documents_at
from l3paper.data.streams import load_corpus
from l3paper.data.tokenizer import END_OF_TEXT_ID
from l3paper.errors import SIGNALS, command
from l3paper.files import locked, sha256
from l3paper.train import Diverged, main, train
from l3paper.training.config import TrainConfig
from l3paper.training.signals import Interrupted

RUN = SIZES | dict(num_iterations=9, eval_every=4, eval_tokens=100)


@pytest.fixture
def config(text_file):
    return TrainConfig(data=str(text_file), **RUN | KINDS["tied"])


def kill_in(step, number=signal.SIGTERM):
    """A callback by which a signal arrives during that step, counted from 1."""
    return lambda run, at: os.kill(os.getpid(), number) if at + 1 == step else None


def outcome(run):
    kept = {k: v for k, v in run.record.items() if k not in ("seconds", "tokens_per_second")}
    return kept, {name: tensor.numpy().tobytes() for name, tensor in run.model.state_dict().items()}


def interrupted(config, checkpoints, steps_done):
    with pytest.raises(Interrupted, match=f"SIGTERM after step {steps_done}: --resume"):
        train(config, False, checkpoints, kill_in(steps_done))


@pytest.mark.parametrize("kind", KINDS)
def test_resumed_run_equals_an_undisturbed_one(config, kind, tmp_path):
    config = TrainConfig(data=config.data, **RUN | KINDS[kind])
    undisturbed = outcome(train(config, False))
    checkpoints = Checkpoints(tmp_path, every=3, resume=True)
    for steps_done in (1, 4, 8):  # before the first checkpoint, at an evaluation, at neither
        interrupted(config, checkpoints, steps_done)
    assert outcome(train(config, False, checkpoints)) == undisturbed


def test_checkpoints_do_not_change_a_run(config, tmp_path):
    plain, kept = train(config, False), train(config, False, Checkpoints(tmp_path, every=2))
    assert outcome(plain) == outcome(kept)


def test_resuming_a_finished_run_repeats_nothing(config, tmp_path):
    finished, done = train(config, False, Checkpoints(tmp_path, every=4)), []
    again = train(
        config, False, Checkpoints(tmp_path, resume=True), lambda run, step: done.append(step)
    )
    assert outcome(again) == outcome(finished)
    assert done == []


def test_the_newest_are_kept_and_each_is_a_model(config, tmp_path):
    run = train(config, False, Checkpoints(tmp_path, every=2, keep=3))
    folders = sorted(path.name for path in tmp_path.iterdir())
    assert folders == ["step-000000006", "step-000000008", "step-000000009"]
    model, tokenizer = load_model(tmp_path / folders[-1], torch.device("cpu"))
    assert tokenizer.get_vocab_size() == 300
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, run.model.state_dict()[name])


DAMAGES = {
    "flipped bit in the weights": lambda folder: flip(folder / "weights.safetensors"),
    "flipped bit in the tables": lambda folder: flip(folder / "tables.safetensors"),
    "flipped bit in the optimizer": lambda folder: flip(folder / "optimizer.safetensors"),
    "flipped bit in the tokenizer": lambda folder: flip(folder / "tokenizer.json"),
    "flipped bit in the configuration": lambda folder: flip(folder / "config.json"),
    "flipped bit in the progress": lambda folder: flip(folder / "progress.json"),
    "truncated": lambda folder: os.truncate(folder / "weights.safetensors", 100),
    "no sums": lambda folder: (folder / "sums.json").unlink(),
    "empty sums": lambda folder: (folder / "sums.json").write_text(""),
    "sums of another kind": lambda folder: (folder / "sums.json").write_text("[1]"),
    "progress of nobody": lambda folder: rewrite(folder, "progress.json", b'{"run": 3, "losses": []}'),
    "progress of another step": lambda folder: rewrite(
        folder, "progress.json", (folder.parent / "step-000000006" / "progress.json").read_bytes()
    ),
    "missing file": lambda folder: (folder / "optimizer.safetensors").unlink(),
    "empty folder": lambda folder: [path.unlink() for path in folder.iterdir()],
}


@pytest.fixture
def stopped(config, tmp_path):
    """A folder with checkpoints of steps 3, 6 and 7, and the settings to resume from there."""
    interrupted(config, Checkpoints(tmp_path / "run", every=3, keep=3), 7)
    return Checkpoints(tmp_path / "run", every=3, keep=3, resume=True)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_reported_and_the_one_before_is_taken(config, stopped, damage, capsys):
    DAMAGES[damage](stopped.folder / "step-000000007")
    done = []
    resumed = train(config, False, stopped, lambda run, step: done.append(step))
    assert done == [6, 7, 8]
    assert "step-000000007 is skipped: " in capsys.readouterr().err
    assert outcome(resumed) == outcome(train(config, False))


def test_a_damaged_checkpoint_takes_no_place_among_those_kept(config, stopped):
    flip(stopped.folder / "step-000000007" / "weights.safetensors")
    one = replace(stopped, keep=1, every=100)
    interrupted(config, one, 7)  # it resumes from step 6, and leaves one of its own
    load_model(stopped.folder / "step-000000007", torch.device("cpu"))
    flip(stopped.folder / "step-000000007" / "weights.safetensors")
    with pytest.raises(ValueError, match=r"no checkpoint in .* is intact"):
        train(config, False, one)


def test_older_ones_stay_while_those_ahead_are_damaged(config, stopped):
    for step in (6, 7):
        flip(stopped.folder / f"step-{step:09}" / "weights.safetensors")
    interrupted(config, replace(stopped, keep=1), 5)
    assert not (stopped.folder / "step-000000003").exists()
    load_model(stopped.folder / "step-000000005", torch.device("cpu"))


@pytest.mark.parametrize("kind", KINDS)
def test_training_draws_no_random_numbers(config, kind):
    """If it did, a checkpoint would need the state of the generator."""
    states = []
    config = TrainConfig(data=config.data, **RUN | KINDS[kind])
    train(config, False, before_step=lambda run, step: states.append(torch.get_rng_state()))
    assert all(torch.equal(state, states[0]) for state in states)


MOMENTS = {
    "another shape": ("adamw.0.exp_avg", lambda tensors: {"adamw.0.exp_avg": torch.zeros(2, 3)}),
    "one number": ("adamw.0.exp_avg", lambda tensors: {"adamw.0.exp_avg": torch.zeros(())}),
    "no matrix": (
        "muon.0.momentum_buffer",
        lambda tensors: {"muon.0.momentum_buffer": torch.zeros(())},
    ),
    "another type": ("adamw.0.exp_avg_sq", lambda tensors: {"adamw.0.exp_avg_sq": None}),
    "none of a parameter": (".0.", lambda tensors: {n: None for n in tensors if ".0." in n}),
    "none for muon": (
        "muon.0.momentum_buffer is missing",
        lambda tensors: {n: None for n in tensors if n[0] == "m"},
    ),
}


@pytest.mark.parametrize("damage", MOMENTS)
def test_moments_that_are_not_the_parameters_are_refused(config, stopped, damage):
    name, change = MOMENTS[damage]
    for folder in stopped.folder.iterdir():
        tensors = load_file(folder / "optimizer.safetensors")
        tensors |= change(tensors)
        whole = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        rewrite(folder, "optimizer.safetensors", save(whole))
    with pytest.raises(ValueError, match=f"does not fit its run: .*{name}"):
        train(config, False, stopped)


@pytest.mark.parametrize(
    "change",
    [
        dict(evaluations=3),
        dict(evaluations=[]),
        dict(evaluations=["ab"]),
        dict(evaluations=[{}]),
        dict(losses="1234567"),
        dict(losses=["1"] * 7),
        dict(losses=[1.0] * 6),
        dict(losses=[math.nan] * 7),
        dict(seconds=[0] * 7),
        dict(seconds={}),
        dict(surplus=1),
    ],
    ids=str,
)
def test_progress_that_is_not_a_measurement_is_skipped(config, stopped, change, capsys):
    newest = sorted(stopped.folder.iterdir())[-1]
    assert newest.name == "step-000000007"
    written = json.loads((newest / "progress.json").read_text())
    rewrite(newest, "progress.json", json.dumps(written | change).encode())
    train(config, False, stopped)
    assert "step-000000007 is skipped" in capsys.readouterr().err


def test_a_folder_of_the_users_own_stays(config, stopped):
    (stopped.folder / ".step-notes").mkdir()
    train(config, False, stopped)
    assert (stopped.folder / ".step-notes").exists()


@pytest.mark.parametrize(
    "changes", [dict(n_embd=64), dict(seed=1), dict(num_iterations=10), dict(clip=1.0)], ids=str
)
def test_checkpoint_of_another_configuration_is_refused(config, stopped, changes):
    ((name, value),) = changes.items()
    before = sorted(stopped.folder.rglob("*"))
    with pytest.raises(ValueError, match=rf"is of a run with {name} = .*, not {value}"):
        train(replace(config, **changes), False, stopped)
    assert sorted(stopped.folder.rglob("*")) == before


def test_checkpoint_of_another_text_is_refused(config, stopped, tmp_path):
    other = tmp_path / "woods.txt"  # of the same name
    other.write_text((tmp_path / config.data).read_text().replace("amber", "alder"))
    with pytest.raises(ValueError, match="is of a run with corpus = "):
        train(replace(config, data=str(other)), False, stopped)


def test_folder_with_checkpoints_is_not_restarted(config, stopped):
    before = sorted(stopped.folder.rglob("*"))
    with pytest.raises(ValueError, match="holds checkpoints: resume"):
        train(config, False, replace(stopped, resume=False))
    assert sorted(stopped.folder.rglob("*")) == before


def test_second_process_is_refused(config, stopped):
    with locked(stopped.folder), pytest.raises(ValueError, match="is in use by another process"):
        train(config, False, stopped)


def test_what_a_killed_process_left_unfinished_is_cleared(config, stopped):
    (stopped.folder / ".step-000000008.0123456789ab").mkdir()
    train(config, False, stopped)
    assert not list(stopped.folder.glob(".*"))


@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.safetensors", "progress.json"])
def test_a_pickle_is_never_executed(config, stopped, tmp_path, name, capsys):
    """Even one whose sums are right."""
    for folder in stopped.folder.iterdir():
        rewrite(folder, name, pickle.dumps(Bomb(tmp_path / "executed")))
    with pytest.raises(ValueError, match=r"no checkpoint in .* is intact"):
        train(config, False, stopped)
    if name == "weights.safetensors":
        with pytest.raises(ValueError, match="cannot be used"):
            load_model(folder, torch.device("cpu"))
    assert not (tmp_path / "executed").exists()
    pickle.loads((folder / name).read_bytes())
    assert (tmp_path / "executed").exists()  # it is a bomb


def test_files_of_a_checkpoint_that_do_not_fit_are_refused(config, stopped):
    for folder in stopped.folder.iterdir():
        for name in ("weights", "tables"):
            shutil.copy(folder / "optimizer.safetensors", folder / f"{name}.safetensors")
        sums = {p.name: sha256(p) for p in folder.iterdir() if p.name != "sums.json"}
        (folder / "sums.json").write_text(json.dumps(sums))
    with pytest.raises(ValueError, match="does not fit its run"):
        train(config, False, stopped)


# Divergence


@pytest.fixture
def exploding(config):
    """The second step's weights are beyond what its products can hold."""
    return replace(config, lr_scale=1e30)


def test_divergence_stops_the_run_before_the_step(exploding, tmp_path):
    with pytest.raises(Diverged, match=r"step \d+ diverged: its loss is nan") as caught:
        train(exploding, False, Checkpoints(tmp_path, every=100))
    record = caught.value.record
    assert math.isnan(record["evaluations"][-1]["loss"])
    assert record["diverged"] == str(caught.value)
    step = record["evaluations"][-1]["step"]
    (folder,) = tmp_path.iterdir()
    assert folder.name == f"step-{step:09}"
    assert all(t.isfinite().all() for t in load_file(folder / "weights.safetensors").values())
    stream = load_corpus(exploding.data, exploding.vocab_size).train
    starts = batch_starts(stream, 4, 16, exploding.seed, step)
    assert record["diverged"].endswith(
        "training documents " + ", ".join(map(str, documents_at(stream, starts, 17)))
    )


def test_divergence_removes_no_checkpoint(config, tmp_path):
    def diverge(run, step):
        if step == 5:
            raise Diverged(step, math.nan, 1.0, [0])

    with pytest.raises(Diverged, match="step 5 diverged"):
        train(config, False, Checkpoints(tmp_path, every=2, keep=1), diverge)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000000004", "step-000000005"]


def test_loss_on_held_out_text_that_is_not_finite_says_so(config, tmp_path):
    def spoil(run, step):
        """From step 3 on, the model is spoilt whenever it evaluates."""
        if step == 3:
            run.model.blocks[0].register_forward_hook(
                lambda block, inputs, x: x if torch.is_grad_enabled() else math.inf * x
            )

    with pytest.raises(Diverged, match="step 3 diverged: the held-out loss after it is not finite"):
        train(config, False, Checkpoints(tmp_path, every=2), spoil)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000002"]


def test_divergence_on_the_command_line(exploding, capsys, tmp_path):
    flags = [*flags_of(exploding), "--lr-scale=1e30", "--record", str(tmp_path / "r.json")]
    assert main(flags) == 1
    said = capsys.readouterr().err
    assert "python -m l3paper.train: step " in said
    assert "Traceback" not in said
    record = json.loads((tmp_path / "r.json").read_text())
    assert record["diverged"] in said
    assert len(record["train_loss"]) < record["config"]["num_iterations"]


def test_documents_of_a_batch():
    stream = np.full(40, 7)
    stream[[0, 10, 12, 30]] = END_OF_TEXT_ID
    assert documents_at(stream, np.array([2]), 8) == [0]
    assert documents_at(stream, np.array([2]), 9) == [0, 1]
    assert documents_at(stream, np.array([9, 35]), 4) == [0, 1, 2, 3]
    starts = batch_starts(stream, 5, 8, seed=3, step=1)
    assert len(starts) == 5
    assert documents_at(stream, starts, 9) == sorted(
        {int((stream[: at + 1] == END_OF_TEXT_ID).sum()) - 1 for s in starts for at in range(s, s + 9)}
    )


def test_clipping_bounds_the_step(config):
    norms = []

    def note(optimizer, *_):
        gradients = [p.grad for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
        norms.append(float(torch.nn.utils.get_total_norm(gradients)))

    def watch(run, step):
        if step == 0:
            norms.clear()
            run.optimizer.register_step_pre_hook(note)

    train(config, False, before_step=watch)
    free = norms.copy()
    train(replace(config, clip=min(free) / 2), False, before_step=watch)
    assert max(norms) <= min(free) / 2 * 1.0001
    train(replace(config, clip=2 * max(free)), False, before_step=watch)
    assert norms == free


def test_one_batch_is_learnt_by_heart(config):
    longer = replace(config, num_iterations=60, overfit_batch=True)
    by_heart, usual = (
        train(replace(longer, overfit_batch=flag), False).record["train_loss"][-1]["loss"]
        for flag in (True, False)
    )
    assert by_heart < 0.5 * usual


def test_what_stops_a_run_travels_between_processes():
    for error in (Interrupted(signal.SIGINT, 3, Path("run")), Diverged(3, math.nan, 1.0, [2, 5])):
        assert str(pickle.loads(pickle.dumps(error))) == str(error)


# The command line


def flags_of(config):
    return as_flags({name: getattr(config, name) for name in ("data", *(RUN | KINDS["tied"]))})


@pytest.mark.parametrize("number", SIGNALS)
def test_signals_write_a_checkpoint_and_end_the_process(config, tmp_path, number):
    folder = tmp_path / "run"
    flags = [*flags_of(config), "--num-iterations=100000", f"--checkpoint-dir={folder}"]
    words = [sys.executable, "-m", "l3paper.train", *flags, "--checkpoint-every=20"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with open(tmp_path / "said.txt", "w") as file:
        process = subprocess.Popen(words, stderr=file, env=environment)
    try:
        while not list(folder.glob("step-*")):
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(number)
        assert process.wait(timeout=60) == 128 + number
    finally:
        process.kill()
    said = (tmp_path / "said.txt").read_text()
    assert "Traceback" not in said
    step = int(said.partition("after step ")[2].partition(":")[0])
    assert (folder / f"step-{step:09}" / "sums.json").exists()


@pytest.mark.parametrize("number", SIGNALS)
def test_signals_end_a_run_without_checkpoints_too(config, capsys, number):
    program = command("program")(lambda _: train(config, False, before_step=kill_in(2, number)))
    before = signal.getsignal(number)
    assert program() == 128 + number
    assert signal.getsignal(number) is before
    assert capsys.readouterr().err == f"program: stopped by {signal.Signals(number).name}\n"


def test_runs_killed_at_random_end_exactly_as_undisturbed_ones(tmp_path, monkeypatch):
    monkeypatch.setenv("L3_CACHE", str(tmp_path / "cache"))
    assert kill_and_resume(tmp_path, kills=5) >= 1


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--resume", "--resume needs --checkpoint-dir"),
        ("--checkpoint-dir {} --checkpoint-every 0", "checkpoint_every is 0; it must be at least 1"),
        ("--checkpoint-dir {} --checkpoint-keep 0", "checkpoint_keep is 0; it must be at least 1"),
        ("--checkpoint-dir {}/file", "cannot be written"),
        ("--clip -1", "clip is -1.0; it must be at least 0"),
        ("--clip nan", "clip is nan"),
    ],
)
def test_bad_flags_are_refused(config, tmp_path, capsys, flags, said):
    (tmp_path / "file").write_text("")
    given = flags.format(tmp_path).split()
    assert main([*flags_of(config), *given, "--record", str(tmp_path / "r.json")]) == 2
    written = capsys.readouterr().err
    assert said in written
    assert written.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"file"}


@pytest.mark.skipif(sys.platform != "linux", reason="limits on the size of files differ")
@pytest.mark.parametrize("flag", ["--checkpoint-dir", "--save"])
def test_full_disk_leaves_nothing_half_written(config, tmp_path, flag):
    """A limit on the size of a file fails as a full disk does, in the midst of writing."""
    script = (
        "import resource, sys; from l3paper.train import main; "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)); sys.exit(main(sys.argv[1:]))"
    )
    train(config, False)  # its tokenizer goes into the cache, before there is a limit
    places = [flag, str(tmp_path / "new"), "--record", str(tmp_path / "r.json")]
    words = [sys.executable, "-c", script, *flags_of(config), *places]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 2
    assert "File too large" in done.stderr
    assert str(tmp_path / "new") in done.stderr
    assert "Traceback" not in done.stderr
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "r.json"]


def test_saved_model_survives_a_failed_replacement(config, tmp_path):
    run = train(config, False)
    save_model(tmp_path / "m", run.model, run.corpus.tokenizer)
    without_weights = GPT(run.model.config).to("meta")
    with pytest.raises(NotImplementedError):
        save_model(tmp_path / "m", without_weights, run.corpus.tokenizer)
    load_model(tmp_path / "m", torch.device("cpu"))
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
