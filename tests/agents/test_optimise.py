import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from agents.optimise import KINDS, FlatOptimiser, working_dtype
from envs.api import UserError
from generative.fit import NonFiniteLoss

CPU = torch.device("cpu")
CHECKS = [None, 50]  # the host's compiled pass, and the pass that any device takes


def network() -> nn.Module:
    """Parameters in three memory orders: contiguous, channels last, and transposed."""
    layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5), nn.Linear(5, 2))
    layers[0].weight.data = layers[0].weight.data.contiguous(memory_format=torch.channels_last)
    layers[3].weight.data = layers[3].weight.data.t().contiguous().t()
    return layers


def loss_of(layers: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return (layers(x) - 1).square().sum()


@pytest.mark.parametrize("check_updates", CHECKS)
@pytest.mark.parametrize("kind", ["rmsprop", "adam"])
def test_rules_equal_torchs_own_with_clipping(kind, check_updates):
    mine = network()
    theirs = copy.deepcopy(mine)
    optimiser = FlatOptimiser(mine, kind, 1e-3, decay=0.99, momentum=0.9, epsilon=1e-5, check_updates=check_updates)
    if kind == "rmsprop":
        reference: torch.optim.Optimizer = torch.optim.RMSprop(theirs.parameters(), 1e-3, alpha=0.99, eps=1e-5)
    else:
        reference = torch.optim.Adam(theirs.parameters(), 1e-3, betas=(0.9, 0.99), eps=1e-5)
    for update in range(20):
        x = torch.randn(4, 3, 8, 8)
        norm = optimiser.minimise(loss_of(mine, x), max_norm=0.5 if update % 2 else None)
        reference.zero_grad()
        loss_of(theirs, x).backward()
        expected = nn.utils.clip_grad_norm_(theirs.parameters(), 0.5 if update % 2 else math.inf)
        reference.step()
        torch.testing.assert_close(norm, expected, rtol=1e-5, atol=0)
    for one, other in zip(mine.parameters(), theirs.parameters()):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_threads_share_a_large_network_and_change_nothing(kind):
    found, threads = [], torch.get_num_threads()
    try:
        for number, check_updates in ((1, None), (3, None), (1, 50)):
            torch.manual_seed(0)
            torch.set_num_threads(number)
            layer = nn.Linear(700, 1000)
            optimiser = FlatOptimiser(layer, kind, epsilon=1.0, check_updates=check_updates)
            weights = torch.randn(1000, 700)
            for _ in range(3):
                optimiser.minimise((layer.weight * weights).sum() + layer.bias.sum())
            assert number == 1 or optimiser._pool is not None
            found.append(optimiser.state_dict())
    finally:
        torch.set_num_threads(threads)
    for name in ("master", "square", "mean"):
        for other in found[1:]:
            torch.testing.assert_close(found[0][name], other[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("check_updates", CHECKS)
def test_centred_rule_is_that_of_its_docstring(check_updates):
    layer = nn.Linear(1, 1, bias=False)
    optimiser = FlatOptimiser(layer, "rmsprop_centred", 0.1, decay=0.9, epsilon=0.01, check_updates=check_updates)
    parameter, mean, square = float(layer.weight.detach()), 0.0, 0.0
    for gradient in (1.0, -2.0, 0.5, 3.0):
        optimiser.minimise(layer(torch.tensor([[gradient]])).sum())
        mean, square = 0.9 * mean + 0.1 * gradient, 0.9 * square + 0.1 * gradient**2
        parameter -= 0.1 * gradient / math.sqrt(square - mean**2 + 0.01)
        assert float(layer.weight.detach()) == pytest.approx(parameter, rel=1e-5)


@pytest.mark.parametrize("check_updates", CHECKS)
def test_the_centred_rule_outlives_a_constant_gradient(check_updates):
    torch.manual_seed(0)
    layer, gradient = nn.Linear(20_000, 1, bias=False), 30 * torch.rand(1, 20_000)
    optimiser = FlatOptimiser(layer, "rmsprop_centred", 2.5e-4, decay=0.95, epsilon=0.01 / 32**2, check_updates=check_updates)
    for _ in range(400):  # the mean of squares falls below the square of the mean, by rounding
        optimiser.minimise(layer(gradient).sum())
    assert layer.weight.isfinite().all()


def test_a_learning_rate_given_with_an_update_holds_for_it_alone():
    layer = nn.Linear(1, 1, bias=False)
    optimiser = FlatOptimiser(layer, "rmsprop", 0.1, decay=0.0, epsilon=1e-8)
    before = float(layer.weight.detach())
    optimiser.minimise(layer(torch.ones(1, 1)).sum(), learning_rate=0.0)
    assert float(layer.weight.detach()) == before
    optimiser.minimise(layer(torch.ones(1, 1)).sum())
    assert float(layer.weight.detach()) == pytest.approx(before - 0.1, abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_network_keeps_its_values_and_memory_orders(kind):
    layers = network()
    before = {name: (value.detach().clone(), value.stride()) for name, value in layers.named_parameters()}
    optimiser = FlatOptimiser(layers, kind)
    for name, parameter in layers.named_parameters():
        assert torch.equal(parameter, before[name][0])
        assert parameter.stride() == before[name][1]
        assert parameter.untyped_storage().data_ptr() == optimiser.master.untyped_storage().data_ptr()
    assert optimiser.master.numel() == sum(parameter.numel() for parameter in layers.parameters())


def test_bfloat16_works_on_copies_of_float32_masters():
    layer = nn.Linear(4, 1, bias=False)
    start = layer.weight.detach().clone()
    optimiser = FlatOptimiser(layer, "rmsprop", 1e-5, decay=0.0, epsilon=1e-8, dtype=torch.bfloat16)
    assert layer.weight.dtype == torch.bfloat16
    for _ in range(100):
        optimiser.minimise(layer(torch.ones(1, 4).bfloat16()).sum())
    # bfloat16 alone would have stood still
    torch.testing.assert_close(optimiser.master.view(1, 4), start - 100 * 1e-5, rtol=0, atol=1e-5)
    assert torch.equal(layer.weight.detach(), optimiser.master.view(1, 4).bfloat16())


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_it_goes_on_bit_for_bit(kind):
    batches = torch.randn(12, 4, 3, 8, 8)
    mine = network()
    optimiser = FlatOptimiser(mine, kind)
    for x in batches[:6]:
        optimiser.minimise(loss_of(mine, x))
    theirs = network()
    resumed = FlatOptimiser(theirs, kind)
    resumed.load_state_dict(copy.deepcopy(optimiser.state_dict()))
    for x in batches[6:]:
        assert torch.equal(loss_of(mine, x), loss_of(theirs, x))
        optimiser.minimise(loss_of(mine, x))
        resumed.minimise(loss_of(theirs, x))
    assert torch.equal(optimiser.master, resumed.master)
    assert resumed.updates == 12


def test_loading_writes_the_working_copy_too():
    mine, theirs = nn.Linear(3, 2), nn.Linear(3, 2)
    resumed = FlatOptimiser(theirs, dtype=torch.bfloat16)
    resumed.load_state_dict(FlatOptimiser(mine, dtype=torch.bfloat16).state_dict())
    assert torch.equal(mine.weight, theirs.weight)


def test_a_network_of_another_size_is_refused():
    state = FlatOptimiser(nn.Linear(3, 2)).state_dict()
    with pytest.raises(UserError, match="checkpoint's network has 8"):
        FlatOptimiser(nn.Linear(3, 3)).load_state_dict(state)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_takes_no_step(bad):
    layer = nn.Linear(3, 1)
    optimiser = FlatOptimiser(layer, player="the tester")
    optimiser.minimise(layer(torch.ones(2, 3)).sum())
    before = optimiser.master.clone()
    with pytest.raises(NonFiniteLoss, match="the tester is not finite at update 2"):
        optimiser.minimise(layer(torch.ones(2, 3)).sum() * bad)
    assert torch.equal(optimiser.master, before)
    assert optimiser.updates == 1
    optimiser.minimise(layer(torch.ones(2, 3)).sum())
    assert not torch.equal(optimiser.master, before)


def test_a_finite_gradient_of_an_infinite_loss_takes_no_step():
    layer = nn.Linear(3, 1)
    optimiser = FlatOptimiser(layer)
    with pytest.raises(NonFiniteLoss):
        optimiser.minimise(layer(torch.ones(2, 3)).sum() + math.inf)


def test_a_gradient_that_is_not_finite_takes_no_step_though_its_loss_is_0():
    layer = nn.Linear(3, 1, bias=False)
    optimiser = FlatOptimiser(layer)
    before = optimiser.master.clone()
    with pytest.raises(NonFiniteLoss):
        optimiser.minimise(layer(torch.zeros(2, 3)).sum().sqrt())
    assert torch.equal(optimiser.master, before)


@pytest.mark.parametrize("kind", KINDS)
def test_a_device_that_is_asked_seldom_stands_at_the_last_good_update(kind):
    layer = nn.Linear(3, 1)
    optimiser = FlatOptimiser(layer, kind, check_updates=5)
    states = []
    for update in range(1, 6):
        loss = layer(torch.ones(2, 3)).sum() * (math.nan if update in (3, 4) else 1.0)
        if update < 5:
            optimiser.minimise(loss)
            states.append([memory.clone() for memory in (optimiser.master, optimiser._square, optimiser._mean)])
    with pytest.raises(NonFiniteLoss, match="update 3"):
        optimiser.minimise(loss)
    assert optimiser.updates == 2
    state = optimiser.state_dict()
    for later in (*states[2:], [state["master"], state["square"], state["mean"]]):
        assert all(torch.equal(one, other) for one, other in zip(later, states[1]))


def test_saving_asks_a_device_that_is_asked_seldom():
    layer = nn.Linear(3, 1)
    optimiser = FlatOptimiser(layer, check_updates=1000)
    optimiser.minimise(layer(torch.ones(2, 3)).sum() * math.nan)
    with pytest.raises(NonFiniteLoss, match="update 1"):
        optimiser.state_dict()


@pytest.mark.parametrize("kind", KINDS)
def test_memory_of_idle_parameters_never_becomes_subnormal(kind):
    """Numbers below 1e-38 are a hundred times slower; a unit that died would leave some after some thousand updates."""
    layer = nn.Linear(2, 1, bias=False)
    optimiser = FlatOptimiser(layer, kind, 1e-3, decay=0.5, momentum=0.5)
    for update in range(400):
        optimiser.minimise(layer(torch.tensor([[1.0, 1.0 if update == 0 else 0.0]])).sum())
    state = optimiser.state_dict()
    for memory in (state["square"], state["mean"]):
        assert bool((memory.abs() >= np.finfo(np.float32).tiny).all())
    idle = float(layer.weight.detach()[0, 1])
    optimiser.minimise(layer(torch.tensor([[1.0, 0.0]])).sum())
    assert float(layer.weight.detach()[0, 1]) == idle


@pytest.mark.parametrize(
    ("knobs", "word"),
    [
        ({"kind": "sgd"}, "agent.optimiser"),
        ({"learning_rate": 0.0}, "agent.learning_rate"),
        ({"learning_rate": math.nan}, "agent.learning_rate"),
        ({"decay": 1.0}, "decay"),
        ({"momentum": -0.1}, "momentum"),
        ({"epsilon": 0.0}, "epsilon"),
    ],
)
def test_wrong_knobs_are_named(knobs, word):
    with pytest.raises(UserError, match=word):
        FlatOptimiser(nn.Linear(1, 1), **knobs)


def test_precision_by_name():
    assert working_dtype("float32", CPU) == torch.float32
    assert working_dtype("bfloat16", CPU) == torch.bfloat16
    assert working_dtype("auto", CPU) == (torch.bfloat16 if torch.cpu._is_amx_tile_supported() else torch.float32)
    with pytest.raises(UserError, match=r"agent\.precision"):
        working_dtype("half", CPU)
