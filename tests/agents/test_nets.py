import pytest
import torch
from torch import nn

from agents.nets import Recurrent, head, patches, torso
from envs.api import UserError

SHAPES = [((1, 84, 84), 4), ((3, 64, 64), 2), ((1, 36, 50), 1), ((1, 7, 7), 3), ((1, 20, 30), 2), ((1, 3, 3), 1)]


def stacks(shape, frames, batch=3) -> torch.Tensor:
    return torch.randint(0, 256, (batch, frames, *shape), dtype=torch.uint8)


def plain_features(network, frames: torch.Tensor) -> torch.Tensor:
    """The torso in plain words, differentiated by torch: every first-layer pixel divided by 255."""
    x = naive_patches(frames, network._patch).to(network.hidden.weight.dtype) / 255
    for layer in network.convolutions:
        x = torch.relu(layer(x))
    return torch.relu(network.hidden(x.permute(0, 2, 3, 1).flatten(1)))


def naive_patches(frames: torch.Tensor, side: int) -> torch.Tensor:
    batch, stack, channels, height, width = frames.shape
    found = torch.zeros(batch, stack * channels * side * side, height // side, width // side, dtype=torch.uint8)
    for row in range(height // side * side):
        for column in range(width // side * side):
            plane = torch.arange(stack * channels) * side * side + row % side * side + column % side
            found[:, plane, row // side, column // side] = frames[..., row, column].flatten(1)
    return found


def random_biases(network: nn.Module) -> None:
    for parameter in network.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, std=0.1)


@pytest.mark.parametrize(("shape", "side"), [((2, 3, 1, 8, 12), 4), ((1, 2, 3, 9, 14), 4), ((2, 1, 2, 7, 5), 2), ((2, 2, 1, 3, 3), 1)])
def test_patches_hold_the_pixels_of_their_place(shape, side):
    frames = torch.randint(0, 256, shape, dtype=torch.uint8)
    found = patches(frames, side)
    assert torch.equal(found, naive_patches(frames, side))
    assert found.is_contiguous(memory_format=torch.channels_last)


def test_patches_of_frames_that_lie_channels_last():
    frames = torch.randint(0, 256, (2, 2, 8, 8, 3), dtype=torch.uint8).permute(0, 1, 4, 2, 3)
    assert torch.equal(patches(frames, 4), naive_patches(frames.contiguous(), 4))


def test_large_frames_get_the_network_of_mnih_et_al():
    """8x8 kernels of stride 4 over whole frames, as the paper has them, give what kernels over patches give."""
    network = torso((1, 84, 84), 4)
    random_biases(network)
    first, second, third = network.convolutions
    kernels = torch.zeros(32, 4, 8, 8)
    for y in range(8):
        for x in range(8):
            inside = torch.arange(4) * 16 + y % 4 * 4 + x % 4
            kernels[:, :, y, x] = first.weight.detach()[:, inside, y // 4, x // 4]
    frames = stacks((1, 84, 84), 4)
    x = torch.relu(nn.functional.conv2d(frames.flatten(1, 2).float() / 255, kernels, first.bias, stride=4))
    x = torch.relu(nn.functional.conv2d(x, second.weight, second.bias, stride=2))
    x = torch.relu(nn.functional.conv2d(x, third.weight, third.bias))
    assert [layer.out_channels for layer in network.convolutions] == [32, 64, 64]
    assert x.shape[1:] == (64, 7, 7)
    expected = torch.relu(network.hidden(x.permute(0, 2, 3, 1).flatten(1)))
    torch.testing.assert_close(network(frames), expected, rtol=1e-4, atol=1e-5)
    assert network(frames).shape == (3, 512) == (3, network.features)


@pytest.mark.parametrize(("shape", "frames"), SHAPES)
def test_backward_pass_written_by_hand_equals_torchs(shape, frames):
    network = torso(shape, frames).double()
    random_biases(network)
    seen, weights = stacks(shape, frames), torch.randn(3, network.features, dtype=torch.float64)
    parameters = list(network.parameters())
    found = torch.autograd.grad((network(seen) * weights).sum(), parameters)
    expected = torch.autograd.grad((plain_features(network, seen) * weights).sum(), parameters)
    torch.testing.assert_close(network(seen), plain_features(network, seen), rtol=1e-10, atol=1e-12)
    for mine, theirs, parameter in zip(found, expected, parameters):
        assert mine.shape == parameter.shape
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11)


def test_what_was_seen_in_parts_is_recalled_as_one():
    network = torso((1, 36, 36), 2)
    frames = stacks((1, 36, 36), 2, batch=5)
    parts = network.look(frames[:2]), network.look(frames[2:])
    seen = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    assert all(part.shape[0] == 5 for part in seen.values())
    assert not any(part.requires_grad for part in seen.values())
    whole = torch.autograd.grad(network(frames).square().sum(), list(network.parameters()))
    joined = torch.autograd.grad(network.recall(seen).square().sum(), list(network.parameters()))
    for mine, theirs in zip(joined, whole):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_bfloat16_is_close_to_float32():
    network = torso((1, 84, 84), 4)
    frames = stacks((1, 84, 84), 4)
    expected = network(frames).detach()
    found = network.to(torch.bfloat16)(frames)
    assert found.dtype == torch.bfloat16
    assert float((found.detach().float() - expected).norm() / expected.norm()) < 0.02


@pytest.mark.parametrize(("shape", "frames"), SHAPES)
def test_weights_are_orthogonal_of_gain_root_two_and_biases_zero(shape, frames):
    for name, parameter in torso(shape, frames).named_parameters():
        if name.endswith("bias"):
            assert not parameter.any()
            continue
        matrix = parameter.detach().flatten(1)
        matrix = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.t()
        torch.testing.assert_close(matrix @ matrix.t(), 2 * torch.eye(matrix.shape[0]), rtol=0, atol=1e-4)


def test_heads_answer_in_float32():
    layer = head(64, 3, gain=0.01)
    assert float(layer.weight.detach().norm()) == pytest.approx(0.01 * 3**0.5, rel=1e-4)
    features = torch.randn(5, 64)
    expected = layer(features)
    found = layer.to(torch.bfloat16)(features.bfloat16())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_recurrent_core_steps_like_torchs_and_forgets_where_an_episode_opens(kind):
    core = Recurrent(kind, 5, units=4).double()
    random_biases(core)
    features, opens = torch.randn(6, 3, 5).double(), torch.zeros(6, 3, dtype=torch.bool)
    opens[0], opens[3, 1] = True, True
    state = torch.randn(3, core.rows, 4).double()
    outputs, after = core(features, state, opens)
    for lane, beginnings in ((0, (0,)), (1, (0, 3)), (2, (0,))):
        for t in range(6):
            if t in beginnings:
                hidden = torch.zeros(1, 4).double()
                memory = (hidden, hidden) if kind == "lstm" else hidden
            memory = core.cell(features[t, lane : lane + 1], memory)
            expected = memory[0] if kind == "lstm" else memory
            torch.testing.assert_close(outputs[t, lane], expected[0])
    assert after.dtype == torch.float32
    torch.testing.assert_close(after[:, 0], outputs[-1].float())
    kept, _ = core(features, state, torch.zeros_like(opens))
    assert not torch.allclose(kept[0], outputs[0])


def test_recurrent_core_goes_on_where_it_stopped():
    core = Recurrent("lstm", 5, units=4)
    features, opens = torch.randn(6, 3, 5), torch.zeros(6, 3, dtype=torch.bool)
    state = torch.randn(3, 2, 4)
    whole, end = core(features, state, opens)
    first, between = core(features[:2], state, opens[:2])
    second, last = core(features[2:], between, opens[2:])
    torch.testing.assert_close(torch.cat([first, second]), whole)
    torch.testing.assert_close(last, end)


def test_an_empty_stack_is_refused():
    with pytest.raises(UserError, match="stack_frames"):
        torso((1, 84, 84), 0)
