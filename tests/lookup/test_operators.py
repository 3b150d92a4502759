"""The lookups as operators: compiled, exported, without numbers, and transformed by torch.func."""

from functools import partial
from shutil import which

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._subclasses import FakeTensorMode
from torch.func import functional_call, grad, jvp, vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from helpers import make_inputs
from l3paper import L3Layer, allocation_to_bounds
from l3paper.gpt import GPT, GPTConfig
from l3paper.lookup import LOOKUPS, operators

ALLOC = [5, 1, 9, 2, 1, 6, 40, 3]
TIED = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])


@pytest.fixture(autouse=True)
def nothing_is_compiled_yet():
    torch._dynamo.reset()


def make_layer(tied=True, lookup="grouped"):
    torch.manual_seed(0)
    layer = L3Layer(16, sum(ALLOC), 24, tied, lookup=lookup, bounds=allocation_to_bounds(ALLOC))
    torch.nn.init.normal_(layer.w_mix.weight, std=0.2)
    return layer


def make_batch(*shape):
    torch.manual_seed(1)
    return torch.randn(*shape, 16), torch.randint(0, len(ALLOC), shape)


def gradients(call, layer, shape=(3, 7)):
    """The output and all gradients of the layer, called through `call`."""
    x, ids = make_batch(*shape)
    output = call(x.requires_grad_(), ids)
    return [output, *torch.autograd.grad(output.square().mean(), [x, *layer.parameters()])]


@TIED
@pytest.mark.parametrize("lookup", LOOKUPS)
def test_compiles_without_a_graph_break(lookup, tied):
    layer = make_layer(tied, lookup)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    found, expected = gradients(compiled, layer), gradients(layer, layer)
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-6)


@pytest.mark.slow
@pytest.mark.skipif(not any(map(which, ("g++", "clang++"))), reason="there is no C++ compiler")
def test_compiles_to_code():
    layer = make_layer()
    compiled = torch.compile(layer, fullgraph=True)
    torch.testing.assert_close(
        gradients(compiled, layer), gradients(layer, layer), rtol=2e-5, atol=2e-5
    )


def test_batches_of_other_ids_are_not_compiled_again():
    counter = CompileCounter()
    compiled = torch.compile(make_layer(), backend=counter, fullgraph=True)
    x, _ = make_batch(3, 7)
    for seed in range(4):
        compiled(x, torch.randint(len(ALLOC), (3, 7), generator=torch.Generator().manual_seed(seed)))
    assert counter.frame_count == 1


def test_a_whole_model_compiles_without_a_graph_break():
    config = GPTConfig(16, len(ALLOC), 2, 2, 2, 16, l3_after_layers="0,1", l3_n_emb=sum(ALLOC))
    model = GPT(config)
    model.set_l3_bounds(allocation_to_bounds(ALLOC))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    ids = torch.randint(len(ALLOC), (2, 9))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(ids), model(ids))


def test_a_lookup_of_the_users_own_compiles_with_a_graph_break():
    calls = []

    def own(query, token_ids, bounds, keys, values):
        calls.append(token_ids.tolist())  # no compiler follows this
        return operators.loop(query, token_ids, bounds, keys, values)

    layer, plain = make_layer(lookup=own), make_layer(lookup="loop")
    compiled = torch.compile(layer, backend="eager")
    torch.testing.assert_close(gradients(compiled, layer), gradients(plain, plain))
    assert calls


@pytest.mark.parametrize("lookup", LOOKUPS)
@pytest.mark.parametrize("strict", [False, True])
def test_exports_with_any_shape(lookup, strict):
    layer, sizes = make_layer(lookup=lookup), {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    program = torch.export.export(layer, make_batch(3, 7), dynamic_shapes=(sizes, sizes), strict=strict)
    for shape in ((5, 11), (2, 300)):
        output = program.module()(*make_batch(*shape))
        torch.testing.assert_close(output, layer(*make_batch(*shape)))
    with pytest.raises(RuntimeError, match="no gradients by itself"):
        output.sum().backward()


@TIED
def test_on_the_meta_device(tied):
    layer = L3Layer(16, 67, 24, tied, vocab_size=8, device="meta")
    x, ids = (t.to("meta") for t in make_batch(3, 7))
    output = layer(x, ids)
    output.sum().backward()
    assert output.shape == (3, 7, 16)
    assert all(p.grad.shape == p.shape for p in layer.parameters())


def test_with_fake_tensors():
    with FakeTensorMode():
        layer = L3Layer(16, 67, 24, vocab_size=8)
        output = layer(torch.randn(3, 7, 16), torch.zeros(3, 7, dtype=torch.long))
        output.sum().backward()
    assert output.shape == (3, 7, 16)
    assert layer.kv_weight.grad.shape == (67, 16)


@TIED
def test_gradients_by_torch_func(tied):
    layer, (x, ids) = make_layer(tied), make_batch(3, 7)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(parameters, x):
        return functional_call(layer, parameters, (x, ids)).square().mean()

    by_name, grad_x = grad(loss, argnums=(0, 1))(parameters, x)
    _, *expected = gradients(layer, layer)
    torch.testing.assert_close([grad_x, *by_name.values()], expected)
    for refused, message in (
        (lambda: grad(lambda x: grad(loss, 1)(parameters, x).sum())(x), "differentiated again"),
        (lambda: jvp(lambda x: loss(parameters, x), (x,), (x,)), "jvp"),
        (lambda: vmap(lambda x: loss(parameters, x))(torch.stack([x, x])), "vmap"),
    ):
        with pytest.raises(RuntimeError, match=message):
            refused()


@pytest.mark.parametrize("shift", [-3, 3])
@pytest.mark.parametrize("compiled", [False, True])
def test_ids_outside_the_vocabulary_are_refused(compiled, shift):
    layer, (x, ids) = make_layer(), make_batch(3, 7)
    call = torch.compile(layer, backend="eager", fullgraph=True) if compiled else layer
    with pytest.raises(ValueError, match="token_ids span"):
        call(x, ids + shift)


def test_compiled_layers_refuse_tokens_without_rows():
    layer = L3Layer(16, sum(ALLOC), 24, vocab_size=len(ALLOC))
    with pytest.raises(ValueError, match="bounds are not set or not valid"):
        torch.compile(layer, backend="eager", fullgraph=True)(*make_batch(3, 7))


@TIED
def test_operators_keep_pytorchs_rules(tied):
    query, token_ids, bounds, keys, values = (
        t.detach().float() if t.is_floating_point() else t
        for t in make_inputs(ALLOC, 30, 6, 6, tied, 0)
    )
    given = query, token_ids, bounds, keys, None if tied else values
    _, *kept = operators.GROUPED(*given, True)
    torch.library.opcheck(operators.GROUPED, (*given, True))
    torch.library.opcheck(operators.GROUPED, (*given, False))
    torch.library.opcheck(operators.GROUPED_BACKWARD, (query, *given[3:], *kept))
    torch.library.opcheck(operators.REFERENCE, (*given, "loop"))


class Counter(TorchDispatchMode):
    """Counts the forward lookups."""

    calls = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.calls += function is operators.GROUPED
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize(("kept", "calls"), [([], 2), ([operators.GROUPED], 1)])
def test_selective_checkpointing_can_keep_the_lookup(kept, calls):
    layer = make_layer()
    context = partial(create_selective_checkpoint_contexts, kept)
    with Counter() as counter:
        found = gradients(partial(checkpoint, layer, use_reentrant=False, context_fn=context), layer)
    assert counter.calls == calls
    torch.testing.assert_close(found, gradients(layer, layer), rtol=0, atol=0)
