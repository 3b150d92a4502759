"""Broken and hostile input, through the real command lines: a clear line, code 2, nothing left."""

import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save

from helpers import SIZES, Bomb, as_flags, flip, rewrite, run_module
from l3paper.checkpoints.model import TABLES as PLACES
from l3paper.checkpoints.model import load_model
from l3paper.checkpoints.run import Checkpoints, RunFolder
from l3paper.data.sources import open_source
from l3paper.generate import generate
from l3paper.train import main as train_main
from l3paper.training.config import TrainConfig

FLAGS = as_flags(SIZES | dict(vocab_size=270, num_iterations=4, l3_n_emb=400, eval_tokens=64))
TEXT = "one two three four five six seven\n" * 40


def run(module, *arguments, **environment):
    """Exit code and stderr of a fresh process, which must say nothing on stdout."""
    done = run_module(f"l3paper.{module}", arguments, environment)
    assert done.stdout == ""
    return done.returncode, done.stderr


def contents(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


TEXTS = {
    "empty": ("a.txt", b"", "data source 'a.txt' holds no text."),
    "one token": ("a.txt", b"a", "nothing can be held out of 1 documents with 1 characters"),
    "a few tokens": ("a.txt", b"a\nb\n", r"supports only 25\d"),
    "not UTF-8": ("a.txt", b"one\ncaf\xe9\n", "a.txt, line 2: not UTF-8 text"),
    "binary": ("a.txt", bytes(range(256)) * 9, "a.txt, line 1: a NUL byte; this is not text"),
    "not JSON": ("a.jsonl", b'{"text": "x"}\n{"text', "a.jsonl, line 2: not a JSON object"),
    "deep JSON": ("a.jsonl", b"[" * 10**6, "a.jsonl, line 1: not a JSON object"),
    "no parquet": ("a.parquet", b"PAR1", "a.parquet, after row 0: not a readable .parquet file"),
    "another kind": ("a.exe", b"MZ", "data file 'a.exe' must end in .txt or .jsonl"),
}


@pytest.mark.parametrize("case", TEXTS)
def test_bad_text(tmp_path, case):
    name, content, message = TEXTS[case]
    (tmp_path / name).write_bytes(content)
    places = "--record", tmp_path / "r.json", "--save", tmp_path / "m"
    code, said = run("train", *FLAGS, "--data", tmp_path / name, *places)
    assert code == 2
    assert re.fullmatch(rf"python -m l3paper\.train: error: .*{message}.*\n", said)
    assert set(contents(tmp_path)) == {tmp_path / name}


def test_documents_may_be_shorter_than_the_context(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "a {i}"}}\n' for i in range(300)))
    flags = [*FLAGS, "--vocab-size=258", "--data", str(tmp_path / "a.jsonl")]
    assert train_main([*flags, "--record", str(tmp_path / "r.json")]) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_a_line_of_a_gigabyte_is_refused_in_little_memory(tmp_path):
    with open(tmp_path / "a.txt", "wb") as file:
        file.truncate(2**30)  # a hole: on disk it is nothing, to a reader a gigabyte
    script = (
        "import re, sys; import l3paper.train; "
        "read = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]); "
        "before = read(); code = l3paper.train.main(sys.argv[1:]); print(1024 * (read() - before)); "
        "sys.exit(code)"
    )
    command = [sys.executable, "-c", script, *FLAGS, "--data", str(tmp_path / "a.txt")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "error: a.txt, line 1: a NUL byte; this is not text\n" in done.stderr
    assert int(done.stdout) < 2**26


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="there is no folder that nobody may fill")
@pytest.mark.parametrize("flag", ["--record", "--save", "--checkpoint-dir", "cache"])
def test_disk_that_cannot_be_written(tmp_path, flag):
    (tmp_path / "a.txt").write_text(TEXT)
    given = [] if flag == "cache" else [flag, "/proc/self/none/x"]
    cache = "/proc/self/none" if flag == "cache" else str(tmp_path / "cache")
    places = [] if flag == "--record" else ["--record", tmp_path / "r.json"]
    code, said = run("train", *FLAGS, "--data", tmp_path / "a.txt", *places, *given, L3_CACHE=cache)
    assert (code, "/proc/self/none" in said, said.count("\n")) == (2, True, 1)
    assert not (tmp_path / "r.json").exists()


# Checkpoints


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a text, a saved model and a run's checkpoints."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "a.txt").write_text(TEXT)
    places = {"data": "a.txt", "save": "model", "checkpoint-dir": "run", "record": "r.json"}
    flags = [f"--{flag}={folder / name}" for flag, name in places.items()]
    assert train_main([*FLAGS, *flags, "--checkpoint-keep=1"]) == 0
    return folder


@pytest.fixture
def copy(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "t")
    return tmp_path / "t"


WEIGHTS = "weights.safetensors"
DAMAGES = {
    "truncated": lambda f: rewrite(f, WEIGHTS, (f / WEIGHTS).read_bytes()[:99], sums=False),
    "flipped": lambda f: flip(f / WEIGHTS),
    "a pickle": lambda f: rewrite(f, WEIGHTS, pickle.dumps(Bomb(f.parent / "executed"))),
    "gone": lambda f: (f / WEIGHTS).unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_bad_checkpoint(copy, damage):
    (checkpoint,) = (copy / "run").iterdir()
    for folder in (checkpoint, copy / "model"):
        DAMAGES[damage](folder)
    before = contents(copy)
    flags = [*FLAGS, f"--data={copy / 'a.txt'}", f"--record={copy / 'new.json'}"]
    code, said = run("train", *flags, f"--checkpoint-dir={copy / 'run'}", "--resume")
    passed, error = said.splitlines()
    assert code == 2
    assert passed.startswith(f"checkpoint {checkpoint} is skipped: ")
    assert error.endswith(f"no checkpoint in '{copy / 'run'}' is intact")
    code, said = run("generate", "--checkpoint", copy / "model", "--prompt", "one")
    assert (code, said.count("\n")) == (2, 1)
    assert f"checkpoint '{copy / 'model'}'" in said
    assert contents(copy) == before
    assert not list(copy.rglob("executed"))


def test_a_file_is_not_a_checkpoint(tmp_path):
    file = tmp_path / "model.pkl"
    file.write_bytes(pickle.dumps(Bomb(tmp_path / "executed")))
    code, said = run("generate", "--checkpoint", file, "--prompt", "one")
    assert (code, said.count("\n")) == (2, 1)
    assert "model.pkl" in said
    assert not (tmp_path / "executed").exists()


# A model from a stranger, who can compute its sums again


def sizes(**changes):
    """Change the configuration."""

    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        rewrite(folder, "config.json", json.dumps(config | changes).encode())

    return change


def tokenizer(model=(), **changes):
    """Change parts of the tokenizer, or of its model."""

    def change(folder):
        parts = json.loads((folder / "tokenizer.json").read_text())
        parts["model"] |= dict(model)
        rewrite(folder, "tokenizer.json", json.dumps(parts | changes).encode())

    return change


def tensors(file, alter):
    """Change the tensors of a file that `alter`, given all of them, returns."""

    def change(folder):
        old = load_file(folder / file)
        rewrite(folder, file, save(old | alter(old)))

    return change


def cast(file, dtype):
    return tensors(file, lambda old: {n: t.to(dtype) for n, t in old.items() if n.endswith("weight")})


def bounds(alter):
    return tensors(WEIGHTS, lambda old: {n: alter(t) for n, t in old.items() if n.endswith("bounds")})


def in_place(name, make):
    """Put something else in a file's place."""

    def change(folder):
        (folder / name).unlink()
        make(folder / name)

    return change


def endless(path):
    path.symlink_to("/dev/zero")


def huge(path):
    with open(path, "wb") as file:
        file.truncate(10**10)  # a hole: it takes no room on the disk


def header(text, claimed=None):
    """A tables file with this header, which says that it has `claimed` bytes."""
    content = (claimed or len(text)).to_bytes(8, "little") + text
    return lambda folder: rewrite(folder, TABLES, content)


TABLES = "tables.safetensors"
MANY = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10}
PADDING = {"strategy": {"Fixed": 10**9}, "direction": "Right", "pad_to_multiple_of": None}
PADDING |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "a"}
SLOW = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
HOSTILE = {
    "context of billions": (sizes(sequence_len=2**31 - 1), "sequence_len is 2147483647; it must be"),
    "10,000 blocks": (sizes(n_layer=10_000), "n_layer = 10000 and n_experts = 0 need at least 10000"),
    "a million experts": (sizes(n_experts=2**20), "n_experts = 1048576 need"),
    "width of a million": (sizes(n_embd=2**20), "is of type torch.float32 .*; it must be .* 1048576"),
    "billions of rows": (sizes(l3_n_emb=2**31 - 1), r"kv_weight is .* must be .* \[2147483647, 32"),
    "an Engram layer of billions": (
        sizes(rival="engram", rival_after_layers="0", rival_rows=2**31 - 1, rival_d_emb=2**20),
        "rivals.0.* is missing",
    ),
    "an Engram layer without rows": (
        sizes(rival="engram", rival_after_layers="0", rival_d_emb=4),
        "rows is 0; it must be at least 100",
    ),
    "a rival without a width": (
        sizes(rival="mlp", rival_after_layers="0"),
        "d_up is 0; it must be at least 1",
    ),
    "no L3 layer": (sizes(l3_after_layers=""), "the model has no tensor 'l3_layers"),
    "a size that is a flag": (sizes(n_layer=True), "n_layer is True; it must be of type int"),
    "a size beyond integers": (sizes(vocab_size=10**400), "vocab_size is 1000"),
    "an unknown setting": (sizes(surplus=1), "'surplus', which is not a setting"),
    "another vocabulary": (sizes(vocab_size=271), "tokenizer.json has 270 tokens"),
    "padding": (tokenizer(padding=PADDING), "its padding is not"),
    "truncation": (tokenizer(truncation={"max_length": 1}), "its truncation is not"),
    "normalizers": (
        tokenizer(normalizer={"type": "Sequence", "normalizers": [MANY] * 9}),
        "its normalizer is not",
    ),
    "a slow pattern": (tokenizer(pre_tokenizer=SLOW), "its pre_tokenizer is not"),
    "no pattern": (tokenizer(pre_tokenizer=None), "its pre_tokenizer is not"),
    "a post-processor": (tokenizer(post_processor={"type": "ByteLevel"}), "its post_processor is not"),
    "another decoder": (tokenizer(decoder={"type": "Fuse"}), "its decoder is not"),
    "more special tokens": (tokenizer(added_tokens=[]), "its added_tokens is not"),
    "another model": (tokenizer(dict(type="WordLevel", unk_token="none")), "its type is not"),
    "a model without merges": (tokenizer(dict(merges=None)), "no vocabulary or no merges"),
    "dropout": (tokenizer(dict(dropout=0.5)), "its dropout is not"),
    "a merge of no tokens": (tokenizer(dict(merges=[["a", "zz"]])), "it merges .*'zz'"),
    "ids with gaps": (tokenizer(dict(vocab={"a": 0, "b": 2})), "its ids have gaps"),
    "missing bytes": (tokenizer(dict(vocab={"a": 0, "b": 1})), "not made of the 256 bytes"),
    "deep JSON": (lambda f: rewrite(f, "tokenizer.json", b"[" * 10**6), "not a valid tokenizer"),
    "tables in float64": (cast(TABLES, torch.float64), "kv_weight is of type torch.float64"),
    "tables in float16": (cast(TABLES, torch.float16), "kv_weight is of type torch.float16"),
    "weights in integers": (cast(WEIGHTS, torch.int64), "wte.weight is of type torch.int64"),
    "a head in float64": (
        tensors(WEIGHTS, lambda old: {"lm_head.weight": old["lm_head.weight"].double()}),
        "lm_head.weight is of type torch.float64",
    ),
    "bounds of zeros": (bounds(torch.zeros_like), "bounds run over"),
    "bounds that fall": (bounds(lambda t: t.index_fill(0, torch.tensor(9), 0)), "bounds must rise"),
    "a surplus tensor": (tensors(WEIGHTS, lambda _: {"x": torch.ones(1)}), "has no tensor 'x'"),
    "a header of petabytes": (header(b"{}", claimed=2**50), "tables.safetensors is damaged: .*header"),
    "no numbers": (header(b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}'), "is damaged"),
    "a shape of nothing": (
        header(b'{"a":{"dtype":"F32","shape":[0,%d],"data_offsets":[0,0]}}' % 2**63),
        "tables.safetensors is damaged: |kv_weight is missing",
    ),
    "a type of others": (
        header(b'{"a":{"dtype":"F8_E4M3","shape":[1],"data_offsets":[0,1]}}'),
        "tables.safetensors is damaged: ",
    ),
    **{
        f"{kind} for {name}": (in_place(name, make), f"{name} {said}")
        for name in ("config.json", "tokenizer.json", "sums.json", WEIGHTS, TABLES)
        for kind, make, said in (
            ("a pipe", os.mkfifo, "is empty, or not a regular file"),
            ("an endless device", endless, "is empty, or not a regular file"),
        )
    },
    "sums of gigabytes": (in_place("sums.json", huge), "sums.json has 10,000,000,000 bytes"),
}


@pytest.fixture
def little():
    """A gigabyte of memory and a minute of time, beyond which this process ends with an error."""
    resource = pytest.importorskip("resource")
    if sys.platform != "linux":
        pytest.skip("the size of a process is read from /proc")
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it takes too long"))
    signal.alarm(60)
    resource.setrlimit(resource.RLIMIT_AS, (now + 2**30, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("tables", PLACES)
@pytest.mark.parametrize("variant", HOSTILE)
def test_a_hostile_model_is_refused_in_one_line(copy, little, variant, tables):
    change, message = HOSTILE[variant]
    change(copy / "model")
    with pytest.raises(ValueError, match=message) as refused:
        load_model(copy / "model", torch.device("cpu"), tables)
    assert str(refused.value).startswith(f"checkpoint '{copy / 'model'}' cannot be used: ")
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 1000


# Whatever comes


def outcome(call, *arguments):
    """What a call returns, or what its ValueError says; any other exception is a failure."""
    try:
        return call(*arguments), ""
    except ValueError as error:
        return None, str(error)


BOUNDED = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
VALUES = st.one_of(
    st.integers(-3, 20).map(str),
    st.integers(2**31, 10**40).map(str),
    st.sampled_from(["", "0", "nan", "inf", "-1e9", "1e-300", "0,1", "1,0,1", ",", "²", "lzw", "moe"]),
    st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=5),
)
NAMES = sorted(set(TrainConfig.__dataclass_fields__) - {"data", "num_iterations", "vocab_size"})


@BOUNDED
@given(st.dictionaries(st.sampled_from(NAMES), VALUES, min_size=1, max_size=4))
def test_any_flags_train_or_are_refused(trained, capsys, flags):
    given = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
    places = [f"--data={trained / 'a.txt'}", f"--record={trained / 'fuzz.json'}"]
    try:
        code = train_main([*FLAGS, "--num-iterations=1", *places, *given])
    except SystemExit as end:  # of argparse
        code = end.code
    said = capsys.readouterr().err
    assert code in (0, 1, 2)
    assert (code == 0) != (": error: " in said or " diverged: " in said)


JSON_LINES = st.lists(
    st.one_of(
        st.fixed_dictionaries({"text": st.text(max_size=9)}).map(json.dumps),
        st.sampled_from(['{"text": null}', '{"text": "\\ud800"}', "{}", "[]", "1e999", '{"text": [']),
    )
).map(lambda lines: "\n".join(lines).encode())


@BOUNDED
@given(st.sampled_from(["txt", "jsonl", "parquet"]), st.one_of(st.binary(max_size=99), JSON_LINES))
def test_any_file_gives_text_or_is_refused(tmp_path, suffix, content):
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(content)
    documents, error = outcome(lambda: list(open_source(str(path))))
    if error:
        assert "a." in error
    else:
        assert documents
        assert all(text == text.encode().decode() != "" for _, text in documents)


def changed(folder, copy, name, data):
    """A copy of the folder with some bytes of a file replaced, its sum included."""
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy)
    content = bytearray((copy / name).read_bytes())
    at = data.draw(st.integers(0, min(len(content), 400)))
    content[at : at + data.draw(st.integers(0, 8))] = data.draw(st.binary(max_size=8))
    rewrite(copy, name, content, sums=name != "sums.json")
    return copy


FILES = ["config.json", "tokenizer.json", "sums.json", WEIGHTS, TABLES]


@BOUNDED
@given(st.sampled_from(FILES), st.data(), st.sampled_from(PLACES))
def test_any_change_of_a_saved_model_is_refused_or_harmless(trained, tmp_path, name, data, tables):
    """Sums included, so that the change reaches those who read the file."""
    folder = changed(trained / "model", tmp_path / "m", name, data)
    loaded, error = outcome(load_model, folder, torch.device("cpu"), tables)
    if error:
        assert str(folder) in error
    else:
        text, refused = outcome(generate, loaded[0], [[1, 2, 3]], 1)
        assert refused or len(text[0]) == 4


@BOUNDED
@given(st.sampled_from(["progress.json", "optimizer.safetensors", "tables.safetensors"]), st.data())
def test_any_change_of_a_checkpoint_is_refused_or_harmless(trained, tmp_path, name, data):
    (checkpoint,) = (trained / "run").iterdir()
    model, _ = load_model(trained / "model", torch.device("cpu"))
    identity = json.loads((checkpoint / "progress.json").read_text())["run"]
    changed(checkpoint, tmp_path / "run" / checkpoint.name, name, data)
    folder = RunFolder(Checkpoints(tmp_path / "run"), identity)
    progress, error = outcome(folder.restore, model, model.setup_optimizer())
    assert str(tmp_path) in error if error else progress.step == 4
