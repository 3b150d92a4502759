"""Generation: the cache, the choice of tokens, tables elsewhere, and the command line."""

import shutil
from dataclasses import replace

import pytest
import torch

from helpers import flip
from l3paper import GPT, GPTConfig, allocation_to_bounds
from l3paper.checkpoints.model import TABLES, load_model, require_place, save_model
from l3paper.data.tokenizer import train_tokenizer
from l3paper.generate import LEAST, choose, generate, main
from l3paper.lookup.offload import offload_tables

CPU = torch.device("cpu")
VOCAB = 300
DENSE = GPTConfig(24, VOCAB, n_layer=3, n_head=4, n_kv_head=2, n_embd=32)
WITH_L3 = replace(DENSE, l3_after_layers="0,2", l3_n_emb=700, l3_d_up=16)
CONFIGS = {
    "dense": DENSE,
    "l3": WITH_L3,
    "untied": replace(WITH_L3, l3_tie_kv=False, l3_d_emb=8),
    "normalised keys": replace(WITH_L3, l3_variant="normalised-keys"),
    "moe": replace(DENSE, n_experts=4, expert_width=16),
    "engram": replace(DENSE, rival="engram", rival_after_layers="0,2", rival_rows=800, rival_d_emb=4),
}
EVERY = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def make_model(config, dtype=torch.float64):
    """A model with all weights drawn, so that every part matters."""
    torch.manual_seed(0)
    model = GPT(config)
    if config.l3_blocks:
        rows = torch.ones(VOCAB, dtype=torch.long)
        rows += torch.randint(VOCAB, (config.l3_n_emb - VOCAB,)).bincount(minlength=VOCAB)
        model.set_l3_bounds(allocation_to_bounds(rows.tolist()))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model.to(dtype)


def make_prompts(count, longest, seed=0):
    torch.manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,)).tolist()
    return [torch.randint(VOCAB, (length,)).tolist() for length in lengths]


@torch.no_grad()
def one_by_one(model, prompt, new_tokens):
    """Greedy decoding as it is defined: all of the text through the model for every token."""
    ids = list(prompt)
    for _ in range(new_tokens):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids


@pytest.fixture
def saved(tmp_path):
    """Save a model with a tokenizer of its vocabulary; its folder."""

    def save(config, dtype=torch.float32):
        texts = ["the quick brown fox jumps over the lazy dog, again and again, while others sleep"]
        save_model(tmp_path / "model", make_model(config, dtype), train_tokenizer(texts, VOCAB))
        return tmp_path / "model"

    return save


@EVERY
def test_cached_batches_of_mixed_lengths_equal_the_definition(config):
    model, prompts = make_model(config), make_prompts(12, 14)
    expected = [one_by_one(model, prompt, 10) for prompt in prompts]
    assert generate(model, prompts, 10, temperature=0) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tables_may_be_anywhere(saved, dtype):
    folder, prompts = saved(WITH_L3, dtype), make_prompts(200, 16)
    model = make_model(WITH_L3, dtype)
    expected = generate(model, prompts, 8, temperature=0)
    assert expected == [one_by_one(model, prompt, 8) for prompt in prompts]
    for tables in TABLES:
        served, _ = load_model(folder, CPU, tables)
        assert generate(served, prompts, 8, temperature=0) == expected
        assert generate(served, prompts, 8, seed=3) == generate(model, prompts, 8, seed=3)


def test_a_context_filled_to_its_end_is_allowed():
    model = make_model(WITH_L3)
    (ids,) = generate(model, [[1] * 20], 4, temperature=0)
    assert ids == one_by_one(model, [1] * 20, 4)
    assert generate(model, [[5, 6]], 0) == [[5, 6]]


def test_smallest_numbers_still_draw():
    model = make_model(DENSE, torch.float32)
    likeliest = generate(model, [[1], [2]], 20, temperature=0)
    assert generate(model, [[1], [2]], 20, temperature=LEAST) == likeliest
    assert generate(model, [[1], [2]], 20, top_p=LEAST) == likeliest


def test_sampling_follows_its_seed():
    model = make_model(DENSE, torch.float32)
    with torch.no_grad():
        model.lm_head.weight.mul_(0.1)
    first, again, other = (generate(model, [[1], [2]], 20, seed=s) for s in (0, 0, 1))
    assert first == again != other


def drawn(logits, temperature=1.0, top_k=None, top_p=None, draws=20_000):
    """How often each token is drawn."""
    generator = torch.Generator().manual_seed(0)
    ids = choose(logits.expand(draws, -1), temperature, top_k, top_p, generator)
    return ids.flatten().bincount(minlength=logits.shape[-1]) / draws


LOGITS = torch.tensor([0.1, 0.5, 0.15, 0.25]).log()


@pytest.mark.parametrize(
    ("how", "shares"),
    [
        ({}, [0.1, 0.5, 0.15, 0.25]),
        ({"temperature": 0.5}, [0.01, 0.25, 0.0225, 0.0625]),
        ({"top_k": 2}, [0, 0.5, 0, 0.25]),
        ({"top_k": 99}, [0.1, 0.5, 0.15, 0.25]),
        ({"top_p": 0.5}, [0, 0.5, 0, 0]),
        ({"top_p": 0.6}, [0, 0.5, 0, 0.25]),
        ({"top_p": 1.0}, [0.1, 0.5, 0.15, 0.25]),
        ({"top_k": 3, "top_p": 0.6}, [0, 0.5, 0, 0.25]),
        ({"temperature": 0}, [0, 1, 0, 0]),
    ],
)
def test_tokens_are_drawn_by_their_chances(how, shares):
    expected = torch.tensor(shares) / sum(shares)
    torch.testing.assert_close(drawn(LOGITS, **how), expected, atol=0.015, rtol=0)


@pytest.mark.parametrize(
    ("prompts", "new_tokens", "how", "message"),
    [
        ([], 1, {}, "prompts is empty"),
        ([[1], []], 1, {}, "prompt 1 is empty"),
        ([[1], [5, 300]], 1, {}, "prompt 1 has ids 5 .. 300; they must be in 0 .. 299"),
        ([[-1]], 1, {}, "prompt 0 has ids -1 .. -1"),
        ([[1]], -1, {}, "new_tokens is -1"),
        ([[1] * 20], 5, {}, "20 tokens of prompt and new_tokens = 5 exceed .* sequence_len = 24"),
        ([[1]], 1, {"temperature": -1.0}, "temperature is -1.0"),
        ([[1]], 1, {"temperature": float("nan")}, "temperature is nan"),
        ([[1]], 1, {"temperature": float("inf")}, "temperature is inf"),
        ([[1]], 1, {"temperature": 1e-45}, "temperature is 1e-45"),
        ([[1]], 1, {"top_k": 0}, "top_k is 0"),
        ([[1]], 1, {"top_p": 0.0}, "top_p is 0.0"),
        ([[1]], 1, {"top_p": 1.5}, "top_p is 1.5"),
        ([[1]], 1, {"top_p": 1e-60}, "top_p is 1e-60"),
        ([[1]], 1, {"seed": -1}, "seed is -1"),
        ([[1]], 1, {"seed": 2**63}, "seed is 9223372036854775808"),
    ],
)
def test_bad_generation(prompts, new_tokens, how, message):
    with pytest.raises(ValueError, match=message):
        generate(make_model(DENSE), prompts, new_tokens, **how)


def test_weights_that_are_not_finite_are_refused():
    model = make_model(DENSE)
    with torch.no_grad():
        model.lm_head.weight[3] = torch.nan
    with pytest.raises(ValueError, match="logits are not finite"):
        generate(model, [[1]], 1)


def test_no_new_tokens_are_read_from_a_file_either(saved, capsys):
    flags = ["--prompt", "the", "--new-tokens", "0", "--tables", "file"]
    assert call(capsys, saved(WITH_L3), *flags) == (0, "the\n", "")


def test_the_cache_is_as_long_as_the_text_and_not_as_the_context():
    model = make_model(replace(DENSE, sequence_len=2**20), torch.float32)
    taken = []
    new_cache = model.new_cache
    model.new_cache = lambda *sizes: taken.append(new_cache(*sizes)) or taken[0]
    generate(model, [[1, 2, 3], [4]], 5, temperature=0)
    assert taken[0].keys.shape[2] == 8


def test_cache_refuses_more_than_it_holds():
    model = make_model(DENSE)
    cache = model.new_cache(1)
    cache.lengths = [20]
    with pytest.raises(ValueError, match="20 tokens and 5 more exceed the cache's 24"):
        model.hidden_states(torch.zeros(1, 5, dtype=torch.long), cache)


# The command line


def call(capsys, folder, *flags):
    try:
        code = main(["--checkpoint", str(folder), "--device", "cpu", *flags])
    except SystemExit as end:
        code = end.code
    written = capsys.readouterr()
    return code, written.out, written.err


@pytest.mark.parametrize("tables", TABLES)
def test_command_line_streams_the_model_s_words(saved, capsys, tables):
    folder = saved(WITH_L3)
    flags = ["--prompt", "the dög", "--new-tokens", "9", "--temperature", "0", "--tables", tables]
    code, out, _ = call(capsys, folder, *flags)
    model, tokenizer = load_model(folder, CPU)
    prompt = [0, *tokenizer.encode("the dög").ids]
    (ids,) = generate(model, [prompt], 9, temperature=0)
    whole = tokenizer.decode(ids[len(prompt) :])
    assert code == 0
    assert out.removesuffix("\n").rstrip("�") == f"the dög{whole}".rstrip("�")


def test_command_line_continues_several_prompts(saved, capsys):
    code, out, _ = call(capsys, saved(DENSE), "--prompt", "the", "a dog", "--new-tokens", "3")
    assert code == 0
    assert "--- the" in out
    assert "--- a dog" in out


@pytest.fixture
def run_of_three(saved, tmp_path):
    """The folder of a run with three checkpoints, of which the newest is damaged."""
    run = tmp_path / "run"
    for step in (100, 200, 300):
        shutil.copytree(saved(DENSE), run / f"step-{step:09}")
    (run / ".step-000000400.left").mkdir()
    truncate(run / "step-000000300" / "weights.safetensors")
    return run


def test_the_newest_whole_checkpoint_of_a_run_is_taken(run_of_three, capsys):
    code, out, err = call(capsys, run_of_three, "--prompt", "the", "--new-tokens", "0")
    assert (code, out) == (0, "the\n")
    skipped, taken = err.splitlines()
    assert "step-000000300" in skipped
    assert "is damaged" in skipped
    assert taken == f"checkpoint: {run_of_three / 'step-000000200'}"


def test_a_run_without_a_whole_checkpoint_is_refused(run_of_three, capsys):
    for step in (100, 200):
        truncate(run_of_three / f"step-{step:09}" / "weights.safetensors")
    code, out, err = call(capsys, run_of_three, "--prompt", "the")
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].endswith(f"no checkpoint in {str(run_of_three)!r} is whole")


def truncate(path):
    path.write_bytes(path.read_bytes()[:-8])


@pytest.mark.parametrize("tables", TABLES)
@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("sums.json", lambda path: path.unlink(), "is incomplete: there is no sums.json"),
        ("weights.safetensors", lambda path: path.unlink(), "is incomplete: there is no weights"),
        ("tables.safetensors", lambda path: path.unlink(), "is incomplete: there is no tables"),
        ("tokenizer.json", lambda path: path.write_text("{}"), "tokenizer.json is damaged"),
        ("config.json", truncate, "config.json is damaged"),
        ("weights.safetensors", flip, "weights.safetensors is damaged"),
        ("tables.safetensors", truncate, "tables.safetensors"),
        ("sums.json", lambda path: path.write_text("[1]"), "cannot be used"),
        ("sums.json", lambda path: path.write_text("{}"), "cannot be used"),
    ],
)
def test_damaged_checkpoints_are_refused(saved, capsys, tables, name, damage, message):
    folder = saved(WITH_L3)
    damage(folder / name)
    code, out, err = call(capsys, folder, "--prompt", "the", "--tables", tables)
    assert (code, out, message in err, err.count("\n")) == (2, "", True, 1)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt", "a\udcffb"], "is not UTF-8 text"),
        (["--prompt", "the " * 99], "exceed the model's context"),
        (["--prompt", "the", "--new-tokens", "24"], "exceed the model's context"),
        (["--prompt", "the", "--new-tokens", "2", "--top-p", "2"], "top_p is 2.0"),
        (["--prompt", "the", "--device", "abacus"], "device is 'abacus'"),
        (["--prompt", "the", "--checkpoint", ""], "argument --checkpoint: the path is empty"),
    ],
)
def test_bad_requests_end_with_code_2(saved, capsys, flags, message):
    code, out, err = call(capsys, saved(DENSE), *flags)
    assert (code, out, message in err) == (2, "", True)


def test_missing_checkpoint_ends_with_code_2(tmp_path, capsys):
    code, _, err = call(capsys, tmp_path / "nothing", "--prompt", "the")
    assert (code, "there is no checkpoint" in err) == (2, True)


def test_saving_replaces_a_model_and_leaves_nothing_behind(saved):
    folder = saved(DENSE)
    before = sorted(path.name for path in folder.parent.iterdir())
    model, _ = load_model(saved(WITH_L3), CPU)
    assert model.config == WITH_L3
    assert sorted(path.name for path in folder.parent.iterdir()) == before


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda model: model.l3_layers["0"].bfloat16(), "weights are torch.bfloat16, torch.float32"),
        (lambda model: model.l3_layers["2"].bounds.zero_(), "no bounds yet"),
        (lambda model: offload_tables(model, CPU), "come from a store"),
    ],
    ids=["two types", "no bounds", "offloaded"],
)
def test_a_model_that_could_not_be_loaded_is_not_saved(saved, spoil, message):
    folder = saved(WITH_L3)
    model, tokenizer = load_model(folder, CPU)
    spoil(model)
    before = sorted(path.stat().st_ino for path in folder.parent.rglob("*"))
    with pytest.raises(ValueError, match=message):
        save_model(folder, model, tokenizer)
    assert sorted(path.stat().st_ino for path in folder.parent.rglob("*")) == before


def test_what_links_lead_into_the_model_s_folder_is_not_lost(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for folder, other in (("link", "real/record.json"), ("real/../real", "link/steps")):
        with pytest.raises(ValueError, match="is for a model alone"):
            require_place(tmp_path / folder, [tmp_path / other])
