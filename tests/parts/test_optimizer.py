"""MuonAdamW: two optimizers that look and step like one."""

from copy import deepcopy

import torch
from torch.optim import AdamW, Muon
from torch.optim.lr_scheduler import LambdaLR

from l3paper.parts.optimizer import MuonAdamW


def make(seed=0):
    torch.manual_seed(seed)
    matrix, vector = torch.nn.Parameter(torch.randn(4, 3)), torch.nn.Parameter(torch.randn(5))
    optimizer = MuonAdamW(
        {"params": [matrix], "lr": 0.1, "weight_decay": 0.01}, [{"params": [vector], "lr": 0.2}]
    )
    return matrix, vector, optimizer


def give_gradients(parameters, step):
    random = torch.Generator().manual_seed(step)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=random)


def test_steps_equal_those_of_the_two_optimizers_alone():
    matrix, vector, optimizer = make()
    twins = [torch.nn.Parameter(p.detach().clone()) for p in (matrix, vector)]
    alone = [
        Muon([twins[0]], lr=0.1, momentum=0.95, weight_decay=0.01),
        AdamW([twins[1]], lr=0.2, betas=(0.8, 0.95), eps=1e-10, weight_decay=0.0),
    ]
    for step in range(4):
        give_gradients([matrix, vector], step)
        give_gradients(twins, step)
        for each in (optimizer, *alone):
            each.step()
    assert torch.equal(matrix, twins[0])
    torch.testing.assert_close(vector, twins[1])  # fused or not: equal up to rounding


def test_fused_adamw_equals_its_formula_for_rows_with_and_without_gradient():
    table = torch.nn.Parameter(torch.randn(6, 3, dtype=torch.float64))
    expected = table.detach().clone()
    first = second = torch.zeros_like(expected)
    matrix = torch.nn.Parameter(torch.zeros(2, 2, dtype=torch.float64))
    optimizer = MuonAdamW({"params": [matrix]}, [{"params": [table], "lr": 0.01}])
    for step in range(1, 30):
        gradient = torch.zeros_like(expected)
        gradient[torch.randperm(6)[:2]] = torch.randn(2, 3, dtype=torch.float64)
        table.grad = gradient
        optimizer.step()
        first = 0.8 * first + 0.2 * gradient
        second = 0.95 * second + 0.05 * gradient**2
        corrected = (second / (1 - 0.95**step)).sqrt() + 1e-10
        expected -= 0.01 * first / (1 - 0.8**step) / corrected
    torch.testing.assert_close(table.detach(), expected)


def test_zero_grad_clears_both():
    matrix, vector, optimizer = make()
    give_gradients([matrix, vector], 0)
    optimizer.zero_grad()
    assert matrix.grad is None
    assert vector.grad is None


def test_schedulers_reach_both():
    _, _, optimizer = make()
    LambdaLR(optimizer, lambda step: 0.5)
    assert [group["lr"] for group in optimizer.muon.param_groups] == [0.05]
    assert [group["lr"] for group in optimizer.adamw.param_groups] == [0.1]


def test_closure_is_called_with_gradients_on():
    matrix, vector, optimizer = make()

    def closure():
        optimizer.zero_grad()
        loss = matrix.square().sum() + vector.square().sum()
        loss.backward()
        return loss

    first = optimizer.step(closure)
    assert optimizer.step(closure) < first


def test_state_dict_continues_exactly():
    matrix, vector, optimizer = make()
    give_gradients([matrix, vector], 0)
    optimizer.step()
    other_matrix, other_vector, other = make()
    with torch.no_grad():
        other_matrix.copy_(matrix)
        other_vector.copy_(vector)
    other.load_state_dict(deepcopy(optimizer.state_dict()))  # which would share its tensors
    for group in other.param_groups:  # the groups it shows must be those it steps with
        group["lr"] *= 0.5
    for group in optimizer.param_groups:
        group["lr"] *= 0.5
    for parameters, each in (((matrix, vector), optimizer), ((other_matrix, other_vector), other)):
        give_gradients(parameters, 1)
        each.step()
    assert torch.equal(matrix, other_matrix)
    assert torch.equal(vector, other_vector)
