"""L3 layers in tiny random models of Hugging Face transformers, and in what loads such models."""

import copy
import json

import pytest
import torch

from l3paper import L3Layer, allocation_to_bounds

transformers = pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")

from l3paper.huggingface import add_l3_layers, from_pretrained, grow, l3_layers  # noqa: E402

VOCAB = 50
ROWS = [1 + i % 5 for i in range(VOCAB)]
BOUNDS = allocation_to_bounds(ROWS)
SIZES = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    head_dim=8,
    pad_token_id=0,
    eos_token_id=1,
)
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SIZES),
    "qwen": lambda: transformers.Qwen3Config(**SIZES),
    "gemma": lambda: transformers.Gemma2Config(**SIZES),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=VOCAB,
        n_positions=64,
        n_embd=32,
        n_layer=3,
        n_head=4,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=1,
    ),
}
ALL = pytest.mark.parametrize("name", CONFIGS)


def make_dense(name="llama"):
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(CONFIGS[name]()).eval()


def make_model(name="llama", **options):
    """A model whose L3 layer adds something."""
    model = add_l3_layers(make_dense(name), [1], BOUNDS, **options)
    for layer in l3_layers(model):
        torch.nn.init.normal_(layer.w_mix.weight, std=0.3)
    return model


def make_ids(batch=2, time=9):
    return torch.randint(2, VOCAB, (batch, time), generator=torch.Generator().manual_seed(1))


def logits(model, ids, **options):
    with torch.no_grad():
        return model(ids, **options).logits


@ALL
def test_insertion_changes_nothing_until_the_layer_is_trained(name):
    model, ids = make_dense(name), make_ids()
    expected = logits(model, ids)
    add_l3_layers(model, [0, 2], BOUNDS)
    assert torch.equal(logits(model, ids), expected)
    torch.nn.init.normal_(l3_layers(model)[1].w_mix.weight)
    assert not torch.equal(logits(model, ids), expected)


@ALL
@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"do_sample": True}, {"cache_implementation": "static"}],
    ids=["greedy", "beam", "sampling", "static"],
)
def test_generation_with_a_cache_equals_that_without(name, options):
    model, ids = make_model(name), make_ids()
    without = {key: value for key, value in options.items() if key != "cache_implementation"}
    texts = []
    for how in (options, {**without, "use_cache": False}):
        torch.manual_seed(2)
        texts.append(model.generate(ids, max_new_tokens=8, min_new_tokens=8, **how))
    assert torch.equal(*texts)


@ALL
def test_padding_on_the_left_changes_nothing(name):
    model, ids = make_model(name), make_ids(batch=1)
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), ids], dim=1)
    mask = (padded > 0).long()
    options = {"max_new_tokens": 6, "min_new_tokens": 6}
    alone = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    beside = model.generate(padded, attention_mask=mask, **options)
    assert torch.equal(beside[:, 4:], alone)


@ALL
@pytest.mark.parametrize("tie_kv", [True, False])
def test_saved_models_load_bit_for_bit(name, tie_kv, tmp_path):
    model, ids = make_model(name, tie_kv=tie_kv, d_up=40), make_ids()
    model.save_pretrained(tmp_path)
    again = from_pretrained(tmp_path).eval()
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(x, again.state_dict()[n]) for n, x in model.state_dict().items())
    assert torch.equal(logits(again, ids), logits(model, ids))
    with pytest.raises(ValueError, match=r"after layers \[1\]"):
        add_l3_layers(again, [0], BOUNDS)


@ALL
def test_gradients_under_checkpointing_are_those_of_their_own_ids(name):
    first, second = make_ids(), make_ids().flip(0) // 2 + 1
    gradients = []
    for checkpointing in (False, True):
        model = make_model(name).train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        if checkpointing:
            model.gradient_checkpointing_enable()
        losses = [model(ids, labels=ids).loss for ids in (first, second)]
        sum(losses).backward()
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*gradients)


def test_trains_with_the_trainer(tmp_path):
    model = make_model()
    data = [{"input_ids": row, "labels": row} for row in make_ids(8)]
    options = dict(per_device_train_batch_size=4, max_steps=3, learning_rate=0.01, report_to=[])
    options |= dict(gradient_checkpointing=True, use_cpu=True, disable_tqdm=True, save_strategy="no")
    before = copy.deepcopy(l3_layers(model)[0].state_dict())
    arguments = transformers.TrainingArguments(str(tmp_path), **options)
    transformers.Trainer(model, arguments, train_dataset=data).train()
    after = l3_layers(model)[0].state_dict()
    assert torch.equal(after["bounds"], before["bounds"])
    assert all(not torch.equal(after[n], before[n]) for n in before if n != "bounds")


def test_embeddings_need_ids_beside_them():
    model, ids = make_model(), make_ids()
    embedded = model.get_input_embeddings()(ids)
    with pytest.raises(ValueError, match="token_ids beside inputs_embeds"):
        model(inputs_embeds=embedded)
    found = model(inputs_embeds=embedded, token_ids=ids).logits
    torch.testing.assert_close(found, logits(model, ids))


def test_vocabularies_grow(tmp_path):
    model, ids = make_model(), make_ids()
    expected = logits(model, ids)
    model.resize_token_embeddings(VOCAB + 2)
    with pytest.raises(ValueError, match="token_ids span"):
        model(torch.full((1, 2), VOCAB))
    grow(model, [3, 1])
    torch.testing.assert_close(logits(model, ids)[..., :VOCAB], expected)
    assert logits(model, torch.full((1, 2), VOCAB + 1)).isfinite().all()
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(from_pretrained(tmp_path), ids), logits(model, ids))


def test_what_cannot_have_layers_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"after_layers are \[3\]; choose different ones of 0 .. 2"):
        add_l3_layers(make_dense(), [3], BOUNDS)
    with pytest.raises(ValueError, match="bounds cover 49 tokens"):
        add_l3_layers(make_dense(), [1], BOUNDS[:-1])
    dense = make_dense()
    with pytest.raises(ValueError, match="bounds must rise"):
        add_l3_layers(dense, [1], torch.tensor([0, 0, *range(1, VOCAB)]))
    assert dense.state_dict().keys() == make_dense().state_dict().keys()
    make_dense().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="names no L3 layers"):
        from_pretrained(tmp_path)
    add_l3_layers(make_dense(), [1], BOUNDS).save_pretrained(tmp_path / "l3")
    assert l3_layers(from_pretrained(tmp_path, subfolder="l3"))
    path = tmp_path / "l3" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"architectures": None}))
    with pytest.raises(ValueError, match="has architectures = None"):
        from_pretrained(tmp_path / "l3")


class OwnLlama(transformers.LlamaForCausalLM):
    """As somebody would write it who has not read our module."""

    def __init__(self, config):
        super().__init__(config)
        self.l3 = L3Layer(32, sum(ROWS), 40, bounds=BOUNDS)
        self.post_init()


def test_initialisers_of_frameworks_leave_a_fresh_layer_a_no_op():
    layer = OwnLlama(CONFIGS["llama"]()).l3
    x, ids = torch.randn(2, 9, 32), make_ids()
    assert not layer(x, ids).any()
    layer.apply(lambda m: m.weight.data.normal_() if isinstance(m, torch.nn.Linear) else None)
    assert not layer(x, ids).any()


class CarefulLlama(OwnLlama):
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, L3Layer):
            module.reset_parameters()
            module.set_bounds(BOUNDS)


def test_a_class_that_initialises_its_layer_loads_dense_checkpoints(tmp_path):
    dense, ids = make_dense(), make_ids()
    dense.save_pretrained(tmp_path)
    model = CarefulLlama.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(model, ids), logits(dense, ids))
    assert not model.l3(torch.randn(2, 9, 32), ids).any()
    assert model.l3.kv_weight.std().item() == pytest.approx(32**-0.5, rel=0.1)


def test_weights_without_the_layers_are_refused(tmp_path):
    make_model().save_pretrained(tmp_path)
    make_dense().save_pretrained(tmp_path / "dense")
    (tmp_path / "dense" / "model.safetensors").replace(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"lack model.layers.1.l3.bounds"):
        from_pretrained(tmp_path)


def test_accelerate_loads_bounds_with_the_rest(tmp_path):
    saved = L3Layer(32, sum(ROWS), 40, bounds=BOUNDS)
    torch.nn.init.normal_(saved.w_mix.weight)
    torch.save(saved.state_dict(), tmp_path / "layer.bin")
    layer = L3Layer(32, sum(ROWS), 40, vocab_size=VOCAB)
    device_map = {"": "cpu"}
    accelerate.load_checkpoint_in_model(layer, str(tmp_path / "layer.bin"), device_map=device_map)
    x, ids = torch.randn(2, 9, 32), make_ids()
    assert torch.equal(layer(x, ids), saved(x, ids))


def test_distributed_checkpoints_load_bounds_with_the_rest(tmp_path):
    from torch.distributed import checkpoint

    saved = L3Layer(32, sum(ROWS), 40, bounds=BOUNDS)
    checkpoint.save(saved.state_dict(), checkpoint_id=tmp_path, no_dist=True)
    layer = L3Layer(32, sum(ROWS), 40, vocab_size=VOCAB)
    state = layer.state_dict()
    checkpoint.load(state, checkpoint_id=tmp_path, no_dist=True)
    layer.load_state_dict(state)
    assert all(torch.equal(x, state[n]) for n, x in saved.state_dict().items())
