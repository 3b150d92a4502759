"""Tables outside the model: rows served from memory and from files, and how much is read."""

import copy
import json
import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import save_file

from l3paper import GPT, GPTConfig, L3Layer, allocation_to_bounds
from l3paper.bench.__main__ import main
from l3paper.bench.decoding import bench_decode, decode
from l3paper.checkpoints.model import file_tables, save_model
from l3paper.costs.accounting import predicted_bytes
from l3paper.data.tokenizer import train_tokenizer
from l3paper.lookup.offload import FileTable, MemoryTable, RowStore, offload_tables

CPU = torch.device("cpu")
BOUNDS = allocation_to_bounds([2, 1, 4, 3])
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])


@pytest.fixture
def tables(tmp_path):
    """The same matrices in memory and in a file."""

    def make(dtype):
        torch.manual_seed(0)
        tensors = {"k": torch.randn(10, 6).to(dtype), "v": torch.randn(10, 3).to(dtype)}
        save_file(tensors, tmp_path / "t.safetensors")
        memory = {name: MemoryTable(tensor) for name, tensor in tensors.items()}
        return tensors, [memory, file_tables(tmp_path / "t.safetensors")]

    return make


@DTYPES
def test_a_store_hands_out_the_rows_of_its_ids_once(tables, dtype):
    tensors, places = tables(dtype)
    ids = torch.tensor([[3, 0, 3], [3, 3, 0]])
    for place in places:
        store = RowStore(place["k"], place["v"], BOUNDS, CPU)
        rows = store.fetch(ids)
        assert rows.token_ids.tolist() == [[1, 0, 1], [1, 1, 0]]
        assert rows.bounds.tolist() == [0, 2, 5]
        owned = [0, 1, 7, 8, 9]
        assert torch.equal(rows.keys, tensors["k"][owned])
        assert torch.equal(rows.values, tensors["v"][owned])
        assert store.rows_read == 5
        assert store.row_bytes == 9 * dtype.itemsize


def test_a_tied_table_travels_once(tables):
    _, places = tables(torch.float32)
    for place in places:
        store = RowStore(place["k"], place["k"], BOUNDS, CPU)
        rows = store.fetch(torch.tensor([2]))
        assert rows.keys is rows.values
        assert store.row_bytes == 6 * 4


def test_no_ids_need_no_rows(tables):
    _, places = tables(torch.float32)
    for place in places:
        rows = RowStore(place["k"], place["v"], BOUNDS, CPU).fetch(torch.zeros(2, 0, dtype=torch.long))
        assert rows.keys.shape == (0, 6)


def test_a_file_cut_short_is_noticed(tmp_path):
    path = tmp_path / "short"
    path.write_bytes(bytes(100))
    table = FileTable(path, offset=20, shape=(10, 6), dtype=torch.float32)
    with pytest.raises(ValueError, match="short' ends before row 4: it was cut short"):
        table.read([(0, 4)], torch.empty(4, 6))


def test_header_and_size_of_a_file_must_agree(tables, tmp_path):
    tables(torch.float32)
    path = tmp_path / "t.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="safetensors is damaged"):
        file_tables(path)


@pytest.mark.parametrize("lookup", ["loop", "padded", "blocked", "grouped"])
@pytest.mark.parametrize("tie_kv", [True, False])
def test_a_layer_served_from_a_store_equals_itself(lookup, tie_kv):
    torch.manual_seed(0)
    layer = L3Layer(6, 10, 12, tie_kv=tie_kv, d_emb=6 if tie_kv else 4, lookup=lookup).double()
    layer.set_bounds(BOUNDS)
    torch.nn.init.normal_(layer.w_mix.weight)
    x, ids = torch.randn(2, 5, 6, dtype=torch.float64), torch.randint(4, (2, 5))
    expected = layer(x, ids)
    model = torch.nn.Module()
    model.l3_layers = torch.nn.ModuleDict({"0": layer})
    offload_tables(model, "cpu")
    torch.testing.assert_close(layer(x, ids), expected)
    assert not set(layer.state_dict()) & {"kv_weight", "k_weight", "v_weight"}
    with pytest.raises(ValueError, match="token_ids span"):
        layer(x, ids + 1)
    for again in (lambda: offload_tables(model, "cpu"), lambda: layer.set_bounds(layer.bounds)):
        with pytest.raises(ValueError, match="come from a store"):
            again()


def test_threads_read_one_file_without_mixing_its_rows(tmp_path):
    tensor = torch.arange(4000.0).view(1000, 4)
    save_file({"k": tensor}, tmp_path / "t.safetensors")
    table = file_tables(tmp_path / "t.safetensors")["k"]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)

    def wrong(first):
        out = torch.empty(3, 4)
        for _ in range(300):
            table.read([(first, first + 2), (first + 5, first + 6)], out)
            if not torch.equal(out, tensor[[first, first + 1, first + 5]]):
                return True
        return False

    try:
        with ThreadPoolExecutor(4) as threads:
            assert not any(threads.map(wrong, (0, 250, 500, 900)))
    finally:
        sys.setswitchinterval(before)


def test_bytes_read_are_those_that_accounting_predicts():
    rows = bench_decode("smoke", repeats=1, device=CPU, sweep=False, steps=4)
    read = {(row["batch"], row["model"]): row["read_bytes"] for row in rows}
    predicted = {(row["batch"], row["model"]): row["predicted_bytes"] for row in rows}
    for (batch, model), count in read.items():
        if model in ("L3 offloaded", "L3 file"):
            assert count == pytest.approx(predicted[batch, model], rel=1e-9)
            assert count > 0
        else:
            assert count is None


def test_command_line_sweeps_the_place_of_the_layer(tmp_path, capsys):
    record = tmp_path / "decode.json"
    flags = ["--preset", "smoke", "--repeats", "1", "--device", "cpu", "--sweep"]
    assert main(["decode", *flags, "--json", str(record)]) == 0
    results = json.loads(record.read_text())["results"]
    assert {row["after_block"] for row in results} == {"0", "1"}
    assert {row["batch"] for row in results} == {1}
    assert "of resident" in capsys.readouterr().out


# The peak is read from /proc: ru_maxrss would include that of the parent, up to the exec.
CHILD = """
import re, resource, sys
from l3paper.generate import main
limit = 1 << 30
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
code = main(sys.argv[1:])
peak = re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())
print(1024 * int(peak[1]), file=sys.stderr)
sys.exit(code)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_tables_larger_than_memory(tmp_path):
    """A table of 2 GiB, most of it a hole in its file, and a process that may use 1 GiB."""
    vocab, n_emb, width = 300, 2**21, 256
    with torch.device("meta"):
        model = GPT(
            GPTConfig(64, vocab, 2, 4, 4, width, l3_after_layers="0", l3_n_emb=n_emb, l3_d_up=64)
        )
    layer = model.l3_layers["0"]
    del layer.kv_weight
    layer.kv_weight = torch.nn.Parameter(torch.zeros(1, width))
    rest = {n: torch.randn(p.shape) for n, p in model.named_parameters() if p.is_meta}
    model.load_state_dict(rest, assign=True, strict=False)
    alloc = [n_emb // vocab] * (vocab - 1)
    layer.bounds = allocation_to_bounds([*alloc, n_emb - sum(alloc)])
    texts = ["the quick brown fox jumps over the lazy dog, again and again, while others sleep"]
    save_model(tmp_path / "m", model, train_tokenizer(texts, vocab))
    header = {"l3_layers.0.kv_weight": {"dtype": "F32", "shape": [n_emb, width]}}
    header["l3_layers.0.kv_weight"]["data_offsets"] = [0, 4 * n_emb * width]
    text = json.dumps(header).encode()
    with open(tmp_path / "m" / "tables.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + 4 * n_emb * width)
    command = [sys.executable, "-c", CHILD, "--checkpoint", str(tmp_path / "m"), "--prompt", "the fox"]
    command += ["--new-tokens", "20", "--device", "cpu", "--tables", "file"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert int(done.stderr.splitlines()[-1]) < 2**30 < 4 * n_emb * width


def test_text_as_it_is_decoded_meets_the_prediction():
    torch.manual_seed(0)
    model = GPT(GPTConfig(16, 4, 2, 2, 2, 8, l3_after_layers="0,1", l3_n_emb=10))
    model.set_l3_bounds(BOUNDS)
    offload_tables(model, "cpu")
    steps = torch.tensor([[[0], [0]], [[2], [3]], [[2], [2]]])
    decode(model, steps)
    rows = (2 + (4 + 3) + 4) * 2  # two layers; an id's rows once a step
    assert sum(layer.store.rows_read for layer in model.l3_layers.values()) == rows
    assert predicted_bytes(model, steps) == pytest.approx(rows * 8 * 4)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda thing: pickle.loads(pickle.dumps(thing))])
def test_a_layer_served_from_a_file_can_be_copied(copied, tmp_path):
    layer = L3Layer(6, 10, 12, bounds=BOUNDS)
    torch.nn.init.normal_(layer.w_mix.weight)
    x, ids = torch.randn(2, 5, 6), torch.randint(4, (2, 5))
    expected = layer(x, ids)
    layer.kv_weight.detach().numpy().tofile(tmp_path / "rows")
    rows = FileTable(tmp_path / "rows", 0, (10, 6), torch.float32)
    layer.serve_from(RowStore(rows, rows, BOUNDS, CPU))
    again = copied(layer)
    assert again.store.keys is again.store.values
    assert again.store.keys.file is not rows.file
    torch.testing.assert_close(again(x, ids), expected)


def test_tables_of_any_model_are_offloaded():
    model = torch.nn.ModuleList([torch.nn.Linear(6, 6), L3Layer(6, 10, 12, bounds=BOUNDS)])
    offload_tables(model, "cpu")
    assert model[1].store is not None
    assert set(model.state_dict()) == {
        "0.weight",
        "0.bias",
        "1.bounds",
        "1.w_up.weight",
        "1.w_mix.weight",
    }
