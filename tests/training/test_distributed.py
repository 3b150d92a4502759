"""Several processes train the model that one does.

In float64, where sums in another order agree to the last digits. In float32 they differ in the seventh,
and Muon, which rounds to bfloat16, makes visible differences of those within a few steps.
"""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

from helpers import KINDS, run_ranks
from l3paper.checkpoints.model import load_model
from l3paper.costs.accounting import exchanged_bytes
from l3paper.train import main, train
from l3paper.training.config import PRESETS, TrainConfig

SIZES = dict(vocab_size=300, depth=2, n_embd=32, sequence_len=16, batch_size=8, num_iterations=50)
SIZES |= dict(eval_every=25, eval_tokens=200)
KINDS = KINDS | {
    "clipped": KINDS["tied"] | dict(clip=0.5),
    "in two passes": KINDS["tied"] | dict(accumulate=2),
}


def config_of(kind, **changes):
    return TrainConfig(**SIZES | KINDS[kind] | changes)


def flags_of(config):
    return [
        f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}")
        for name, value in (SIZES | config).items()
    ]


MODULE = "l3paper.train"
SCRIPT = """
import sys, torch
import torch.distributed as dist
from l3paper.training.distributed import SharedLookup
from l3paper.train import main
made, original = [], SharedLookup.__init__
def noted(self, group):
    original(self, group)
    made.append(self)
SharedLookup.__init__ = noted
names = "all_gather_single", "reduce_scatter_single"  # in PyTorch 2.13; before:
if not hasattr(dist, names[0]):
    names = "all_gather_into_tensor", "reduce_scatter_tensor"
sharded = dict.fromkeys(names, 0)  # bytes of what all have together
def counted(name, call):
    def counting(*args, **kwargs):
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
        sharded[name] += max(tensor.nbytes for tensor in tensors)
        return call(*args, **kwargs)
    return counting
for name in sharded:
    setattr(dist, name, counted(name, getattr(dist, name)))
torch.set_default_dtype(torch.float64)
code = main(sys.argv[1:])
print("sent:", sum(lookup.bytes_sent for lookup in made))
print("shards:", *sharded.values())
sys.exit(code)
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    path = tmp_path_factory.mktemp("script") / "train64.py"
    path.write_text(SCRIPT)
    return path


def torchrun(processes, module, arguments):
    """The command itself; elsewhere processes get from `run_ranks` what they would get from it."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
    command += ["--standalone", "-m", module, *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200)


@pytest.fixture(scope="module")
def alone(text_file):
    """The same run in one process; every kind runs once."""
    runs = {}

    def get(kind):
        if kind not in runs:
            config = config_of(kind, data=str(text_file))
            torch.set_default_dtype(torch.float64)
            try:
                runs[kind] = train(config, show_progress=False)
            finally:
                torch.set_default_dtype(torch.float32)
        return runs[kind]

    return get


CASES = [(2, "tied", False), (4, "tied", False), (2, "tied", True), (4, "tied", True)]
CASES += [(2, "untied", False), (2, "untied", True), (2, "moe", False), (2, "clipped", True)]
CASES += [(2, "engram", False)]
CASES += [(2, "in two passes", False), (2, "in two passes", True)]


@pytest.mark.parametrize(("processes", "kind", "shard"), CASES)
def test_losses_equal_those_of_one_process(alone, text_file, script, tmp_path, processes, kind, shard):
    places = [f"--data={text_file}", f"--record={tmp_path / 'r.json'}", f"--save={tmp_path / 'm'}"]
    given = [*flags_of(KINDS[kind]), *places, *["--shard"] * shard]
    done = run_ranks(processes, script, given)
    assert done.returncode == 0, done.stderr
    record, expected = json.loads((tmp_path / "r.json").read_text()), alone(kind).record
    for curve in ("train_loss", "evaluations"):
        losses = [[point["loss"] for point in r[curve]] for r in (record, expected)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    model, _ = load_model(tmp_path / "m", torch.device("cpu"))
    torch.testing.assert_close(
        dict(model.state_dict()), dict(alone(kind).model.state_dict()), rtol=1e-3, atol=1e-5
    )
    assert record["processes"]["number"] == processes
    if kind not in ("moe", "engram"):
        exchange = exchanged_bytes(
            config_of(kind).model_config(), 8 * 16 // processes, processes, bytes_per_number=8
        )
        assert record["processes"]["dense_bytes"] == exchange["dense"]
        passes = config_of(kind).accumulate  # shards are gathered and divided in each
        sent = passes * exchange["dense"] if shard else exchange["positions"]
        assert record["processes"]["table_bytes"] == sent
        assert f"{processes} processes: each sent {sent:,.0f} bytes per step" in done.stdout
        # The accounting equals what was counted, in each process. Shards are gathered once more, for
        # the last evaluation; a process sends all but its own part.
        part = processes / (processes - 1)
        once = passes * exchange["dense"] / 2 * part
        gathered, divided = (50 * passes + 1) / passes * once, 50 * once
        counted = f"shards: {gathered:.0f} {divided:.0f}\n" if shard else f"sent: {50 * sent:.0f}\n"
        assert done.stdout.count(counted) == processes


@pytest.mark.parametrize("shard", [False, True])
def test_losses_are_close_in_float32_too(text_file, tmp_path, shard):
    changes = dict(num_iterations=20, eval_every=10)
    places = [f"--data={text_file}", f"--record={tmp_path / 'r.json'}"]
    given = [*flags_of(KINDS["tied"] | changes), *places, *["--shard"] * shard]
    done = run_ranks(2, MODULE, given)
    assert done.returncode == 0, done.stderr
    expected = train(config_of("tied", data=str(text_file), **changes), show_progress=False).record
    losses = [
        [point["loss"] for point in r["train_loss"]]
        for r in (json.loads((tmp_path / "r.json").read_text()), expected)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)


@pytest.mark.parametrize("processes", [2, 4])
def test_tables_take_less_than_a_fifth_of_a_dense_exchange_at_laptop_size(processes):
    config = PRESETS["laptop"]
    positions = config.batch_size * config.sequence_len // processes
    exchange = exchanged_bytes(config.model_config(), positions, processes)
    assert 0 < exchange["positions"] < exchange["dense"] / 5


@pytest.mark.parametrize("shard", [False, True])
def test_interrupted_run_of_two_processes_goes_on(text_file, tmp_path, shard):
    places = [f"--data={text_file}", f"--record={tmp_path / 'r.json'}"]
    places += [f"--checkpoint-dir={tmp_path / 'run'}", "--checkpoint-every=20", "--checkpoint-keep=3"]
    places.append("--resume")
    given = [*flags_of(KINDS["tied"]), *places, *["--shard"] * shard]
    start = run_ranks if shard else torchrun
    assert start(2, MODULE, given).returncode == 0
    whole = json.loads((tmp_path / "r.json").read_text())
    for step in (50, 40):  # as a run that was killed after step 20 would have left them
        shutil.rmtree(tmp_path / "run" / f"step-{step:09}")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["step-000000020"]
    done = run_ranks(2, MODULE, given)
    assert done.returncode == 0
    assert "20/50" in done.stderr  # the progress bar begins there
    assert json.loads((tmp_path / "r.json").read_text())["train_loss"] == whole["train_loss"]


def test_processes_that_divide_the_tables_start_from_a_model(text_file, tmp_path):
    places = [f"--data={text_file}", f"--record={tmp_path / 'r.json'}", "--num-iterations=2"]
    base, kind = tmp_path / "base", KINDS["tied"]
    assert main([*flags_of(kind), *places, f"--save={base}"]) == 0
    before = json.loads((tmp_path / "r.json").read_text())["evaluations"]
    done = run_ranks(2, MODULE, [*flags_of(kind), *places, f"--init-from={base}", "--shard"])
    assert done.returncode == 0, done.stderr
    after = json.loads((tmp_path / "r.json").read_text())["evaluations"]
    assert after[0]["loss"] == pytest.approx(before[-2]["loss"], rel=1e-6)


def test_divergence_stops_all_processes(text_file, tmp_path):
    flags = [*flags_of(KINDS["tied"]), f"--data={text_file}", "--lr-scale=1e30"]
    done = run_ranks(2, MODULE, [*flags, f"--record={tmp_path / 'r.json'}"])
    assert done.returncode != 0
    assert done.stderr.count("diverged: its loss is nan") == 2


def test_a_batch_that_cannot_be_divided_is_refused(text_file, tmp_path):
    done = run_ranks(2, MODULE, [*flags_of({"batch_size": 7}), f"--data={text_file}"])
    assert "batch_size is 7; accumulate = 1 passes of 2 processes must divide it evenly" in done.stderr


def test_shards_need_several_processes(text_file, tmp_path, capsys):
    flags = [*flags_of(KINDS["tied"]), f"--data={text_file}", f"--record={tmp_path / 'r.json'}"]
    assert main([*flags, "--shard"]) == 2
    assert "shard is set, but there is one process" in capsys.readouterr().err


BROADCAST = """
import torch, torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import fully_shard
from l3paper import L3Layer, allocation_to_bounds
dist.init_process_group("gloo")
torch.manual_seed(0)
bounds = allocation_to_bounds([3, 1, 4, 2])
whole = L3Layer(8, 10, 16, bounds=bounds)
torch.nn.init.normal_(whole.w_mix.weight)
layer = L3Layer(8, 10, 16, vocab_size=4, device="meta")
fully_shard(layer)
layer.to_empty(device="cpu")
state = whole.state_dict() if dist.get_rank() == 0 else {}
options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
set_model_state_dict(layer, state, options=options)
assert torch.equal(layer.bounds, bounds)
x, ids = torch.randn(2, 5, 8), torch.randint(4, (2, 5))
torch.testing.assert_close(layer(x, ids), whole(x, ids))
dist.destroy_process_group()
"""


def test_a_sharded_layer_takes_its_bounds_from_the_first_process(tmp_path):
    (tmp_path / "program.py").write_text(BROADCAST)
    done = run_ranks(2, tmp_path / "program.py", [])
    assert done.returncode == 0, done.stderr
