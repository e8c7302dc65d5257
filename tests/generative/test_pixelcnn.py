"""PixelCNN: mass one, causal, no blind spot, exact samples, online steps that learn, resume, refusals. Its kernel: test_pixelcnn_kernel."""

import copy
import itertools
import math
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch.nn import functional

from envs.api import UserError
from generative.api import Density, Model, Sampler, Trainable
from generative.data import FrameMemory, image_clip
from generative.fit import Fitter, NonFiniteLoss
from generative.grey_levels import to_frames
from generative.masked import SlimNet, StackedNet
from generative.pixelcnn import PixelCNN

SMALL = {"slim": {"network": "slim"}, "stacked": {"network": "stacked", "blocks": 3, "planes": 8, "head_planes": 24, "first_kernel": 5}}
NETWORKS = sorted(SMALL)
CONFIGS = Path(__file__).parent.parent.parent / "configs" / "model"


def make(network, shape=(1, 6, 5), **knobs):
    return PixelCNN(shape, 4, "cpu", **(SMALL[network] | knobs))


def frames_of(shape, count=3, levels=256):
    return to_frames(torch.randint(0, levels, (count, *shape[1:])), levels)


def every_frame(height, width, levels):
    return to_frames(torch.tensor(list(itertools.product(range(levels), repeat=height * width))).view(-1, height, width), levels)


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in (*first, *second))


@pytest.mark.parametrize("shape", [(1, 42, 42), (1, 10, 5), (1, 1, 3), (1, 4, 1), (1, 1, 1)])
@pytest.mark.parametrize("network", NETWORKS)
def test_every_job_at_every_shape(network, shape):
    model, frames = make(network, shape), frames_of(shape)
    assert all(isinstance(model, job) for job in (Model, Density, Trainable, Sampler))
    assert (model.exact, model.updates_per_frame, model.obs_shape) == (True, 1.0, shape)
    nats = model.log_prob(frames)
    assert (nats.dtype, tuple(nats.shape)) == (torch.float64, (3,))
    recoding = model.absorb(frames)
    for part in recoding:
        assert (part.dtype, tuple(part.shape), part.requires_grad) == (torch.float64, (3,), False)
    if math.prod(shape) < 100:
        samples = model.sample(2)
        assert (samples.dtype, tuple(samples.shape)) == (torch.uint8, (2, *shape))


@pytest.mark.parametrize(("height", "width", "levels"), [(3, 3, 2), (2, 3, 3), (1, 4, 5)])
@pytest.mark.parametrize("network", NETWORKS)
def test_probabilities_of_all_frames_sum_to_one(network, height, width, levels):
    model, frames = make(network, (1, height, width), levels=levels), every_frame(height, width, levels)
    assert float(model.log_prob(frames).exp().sum()) == pytest.approx(1.0, abs=1e-6)
    model.absorb(frames[torch.randperm(len(frames))[:40]])
    assert float(model.log_prob(frames).exp().sum()) == pytest.approx(1.0, abs=1e-6)


def test_slim_network_is_a_masked_convolution_and_1x1_ones():
    """Against torch's convolutions over one-hot levels, with the mask written out."""
    net = SlimNet(levels=5, kernel=5, blocks=2, planes=16, head_planes=32)
    shown = torch.randint(0, 5, (2, 7, 6))
    padded = functional.pad(shown, (2, 2, 2, 2), value=5)
    planes, rows = functional.one_hot(padded, 6).permute(0, 3, 1, 2).float(), net.cells * 6 * 16
    table, weight, cell = net.weights[:rows].view(net.cells, 6, 16), torch.zeros(16, 6, 5, 5), 0
    for i, j in itertools.product(range(5), range(5)):
        if (i, j) < (2, 2):
            weight[:, :, i, j], cell = table[cell].t(), cell + 1
    x = functional.conv2d(planes, weight, net.weights[rows : rows + 16])
    layers = [
        lambda x, place=place: functional.conv2d(
            x,
            net.weights[place[0] : place[1]].view(place[2], place[3]).t()[:, :, None, None],
            net.weights[place[1] : place[1] + place[3]],
        )
        for place in net.layers
    ]
    for first, second in ((0, 1), (2, 3)):
        wide = layers[first](x)
        x = x + layers[second](wide[:, :16].tanh() * wide[:, 16:].sigmoid())
    logits = layers[5](layers[4](x.relu()).relu()).permute(0, 2, 3, 1)
    assert cell == net.cells == 12
    assert torch.allclose(net(shown), logits, atol=1e-5)


def test_slim_network_sees_its_context_and_nothing_else():
    """All pixels, all levels: what changes when one pixel changes."""
    net = SlimNet(levels=3, kernel=5, blocks=1).double()
    with torch.no_grad():
        shown = torch.randint(0, 3, (1, 7, 8))
        for i, j in itertools.product(range(7), range(8)):
            others = shown.repeat(3, 1, 1)
            others[:, i, j] = torch.arange(3)
            changed = (net(others) != net(shown)).any(-1).any(0)
            for k, m in itertools.product(range(7), range(8)):
                sees = (i, j) < (k, m) and k - i <= 2 and abs(m - j) <= 2
                assert bool(changed[k, m]) == sees, ((i, j), (k, m))


def test_stacked_network_is_causal_and_has_no_blind_spot():
    net = StackedNet(levels=3, first_kernel=3, kernel=3, blocks=2, planes=8, head_planes=8).double()
    assert net.reach == 2
    seen = net.see(torch.randint(0, 3, (1, 7, 9))).double()
    jacobian = torch.autograd.functional.jacobian(net.logits, seen)[0, :, :, :, 0, 0].abs().sum(2)  # (7, 9, 7, 9)
    for (k, m), (i, j) in itertools.product(itertools.product(range(7), range(9)), repeat=2):
        slope = float(jacobian[k, m, i, j])
        if (i, j) >= (k, m) or k - i > net.reach + 1:
            assert slope == 0.0, ((k, m), (i, j))
        elif abs(m - j) <= net.reach and (i < k or m - j <= net.reach):
            assert slope > 0.0, ((k, m), (i, j))


def test_default_networks_are_the_papers():
    slim = PixelCNN((1, 42, 42), 4, "cpu").net
    assert [(inner, outer) for _, _, inner, outer in slim.layers] == [(16, 32), (16, 16), (16, 32), (16, 16), (16, 64), (64, 8)]
    assert (slim.cells, slim.reach) == (24, 3)
    large = PixelCNN((1, 42, 42), 4, "cpu", network="stacked", blocks=8).net
    assert large.layers[0].vertical.weight.shape[2:] == (4, 7)
    assert large.layers[0].horizontal.weight.shape[2:] == (1, 3)
    assert large.layers[1].vertical.weight.shape[2:] == (2, 3)
    assert large.layers[1].horizontal.weight.shape[2:] == (1, 2)
    assert large.reach == 10


@pytest.mark.parametrize("network", NETWORKS)
def test_walking_pixel_by_pixel_gives_the_logits_of_the_whole(network):
    model, shown = make(network, (1, 9, 8), levels=4), torch.randint(0, 4, (3, 9, 8))
    logits, following = [], iter(shown.flatten(1).t())

    def pick(row):
        logits.append(row)
        return next(following)

    assert torch.equal(model.net.walk(3, 9, 8, pick), shown)
    whole = model.net(shown).detach().flatten(1, 2)
    assert torch.allclose(torch.stack(logits, 1), whole, atol=1e-5)


@pytest.mark.parametrize("network", NETWORKS)
def test_samples_follow_the_exact_distribution(network):
    model, frames = make(network, (1, 2, 2), levels=2, learning_rate=0.02 if network == "slim" else 0.06), every_frame(2, 2, 2)
    model.absorb(frames[[3, 12, 3, 5]])
    expected = 4_000 * model.log_prob(frames).exp()
    drawn = model.sample(4_000)
    observed = torch.tensor([(drawn == frame).all((1, 2, 3)).sum() for frame in frames])
    assert int(observed.sum()) == 4_000
    assert expected.min() > 10
    assert expected.max() > 2 * expected.min()
    assert float(((observed - expected) ** 2 / expected).sum()) < 30.6  # chi-square, 15 degrees: 1 in 100


@pytest.mark.parametrize("network", NETWORKS)
def test_gradients_reach_all_parameters(network):
    model = make(network, (1, 9, 9), levels=3)
    ((player, loss, metrics),) = model.losses(image_clip(frames_of((1, 9, 9), 64, 3)))
    loss.backward()
    assert player == "pixelcnn"
    assert float(metrics["nats"]) == pytest.approx(-81 * float(loss.detach()), rel=1e-6)
    assert float(metrics["bits_per_dim"]) == pytest.approx(float(loss.detach()) / math.log(2), rel=1e-6)
    for name, parameter in model.net.named_parameters():
        assert (parameter.grad != 0).float().mean() > 0.4, name  # some rectifiers of the head may be shut on all frames
    assert sum(parameter.numel() for parameter in model.players()["pixelcnn"]) == model.online.square.numel()


@pytest.mark.parametrize("network", NETWORKS)
def test_before_and_after_are_the_log_probability_before_and_after(network):
    model, frames = make(network), frames_of((1, 6, 5))
    for frame in frames.split(1):
        before = model.log_prob(frame)
        recoding = model.absorb(frame)
        assert torch.equal(recoding.before, before)
        assert torch.equal(recoding.after, model.log_prob(frame))


@pytest.mark.parametrize("network", NETWORKS)
def test_a_repeated_frame_becomes_likelier_and_a_new_one_stands_out(network):
    model, frames = make(network, (1, 8, 8), learning_rate=3e-3), frames_of((1, 8, 8), 2, 8)
    gains = []
    for _ in range(150):
        before, after = model.absorb(frames[:1])
        gains.append(float(after - before))
    assert float(after) > -40  # of 133 at first
    assert sum(gain > 0 for gain in gains) > 100
    before, after = model.absorb(frames[1:])
    assert float(after - before) > 5 * sum(gains[-10:]) / 10


@pytest.mark.parametrize("network", NETWORKS)
def test_frames_of_a_call_are_learnt_one_after_another(network):
    one, many = make(network), make(network)
    many.load_state_dict(copy.deepcopy(one.state_dict()))
    frames = frames_of((1, 6, 5), 5)
    parts = [one.absorb(frame) for frame in frames.split(1)]
    recoding = many.absorb(frames)
    assert torch.equal(recoding.before, torch.cat([before for before, _ in parts]))
    assert torch.equal(recoding.after, torch.cat([after for _, after in parts]))
    assert same(one.state_dict(), many.state_dict())
    assert int(many.online.updates) == 5


@pytest.mark.parametrize("network", NETWORKS)
def test_frames_may_share_a_step(network):
    model, frames = make(network, frames_per_update=4), frames_of((1, 6, 5), 10)
    before = model.log_prob(frames[:4])
    recoding = model.absorb(frames)
    assert model.updates_per_frame == 0.25
    assert int(model.online.updates) == 3
    assert torch.allclose(recoding.before[:4], before, atol=1e-4)


@pytest.mark.parametrize("network", NETWORKS)
def test_stop_and_resume_is_bit_for_bit(network):
    frames = frames_of((1, 6, 5), 20)
    whole, first, second = make(network), make(network), make(network)
    first.load_state_dict(copy.deepcopy(whole.state_dict()))
    expected = torch.cat([whole.absorb(part).after for part in frames.split(5)])
    found = [first.absorb(part).after for part in frames[:10].split(5)]
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    found += [second.absorb(part).after for part in frames[10:].split(5)]
    assert torch.equal(torch.cat(found), expected)
    assert same(whole.state_dict(), second.state_dict())
    assert {"online.square", "online.velocity", "online.updates"} < set(whole.state_dict())


@pytest.mark.parametrize("network", NETWORKS)
def test_a_loss_that_is_not_finite_leaves_the_last_good_state(network):
    model, frames = make(network, learning_rate=1e30), frames_of((1, 6, 5), 3)
    start = copy.deepcopy(model.state_dict())
    with pytest.raises(NonFiniteLoss) as error:
        model.absorb(frames)
    assert (error.value.player, error.value.update) == ("pixelcnn", 1)
    assert same(model.state_dict(), start)
    poisoned = make(network)
    next(iter(poisoned.net.parameters())).data.view(-1)[0:50] = math.nan
    start = copy.deepcopy(poisoned.state_dict())
    with pytest.raises(NonFiniteLoss):
        poisoned.absorb(frames)
    for name, value in poisoned.state_dict().items():
        assert torch.equal(value.nan_to_num(-7.0), start[name].nan_to_num(-7.0))


@pytest.mark.parametrize("network", NETWORKS)
def test_the_fitter_fits_it(network):
    frames = frames_of((1, 6, 6), 1, 2).repeat(30, 1, 1, 1)
    model = make(network, (1, 6, 6), levels=2)
    ticks = list(Fitter(model, FrameMemory.from_tensor(frames), batch_size=8, learning_rate=1e-2, updates=60).run())
    bits = [float(tick.metrics["bits_per_dim"]) for tick in ticks]
    assert bits[0] > 0.7
    assert bits[-1] < 0.2
    assert float(model.log_prob(frames[:1])) == pytest.approx(-bits[-1] * 36 * math.log(2), rel=0.2)


@pytest.mark.parametrize(
    ("network", "knobs", "words"),
    [
        ("slim", {"levels": 1}, "levels must lie in 2..256, got 1"),
        ("stacked", {"levels": 300}, "levels must lie in 2..256, got 300"),
        ("slim", {"network": "wide"}, "network is one of slim, stacked, got wide"),
        ("slim", {"first_kernel": 4}, "first_kernel of the slim network is one of 3, 5, 7, got 4"),
        ("slim", {"planes": 20}, "planes and head_planes in multiples of 16"),
        ("slim", {"head_planes": 0}, "planes and head_planes in multiples of 16"),
        ("slim", {"blocks": -1}, "blocks >= 0"),
        ("stacked", {"kernel": 2}, "first_kernel and kernel must be odd and at least 3, got 5 and 2"),
        ("stacked", {"first_kernel": 1}, "first_kernel and kernel must be odd and at least 3, got 1 and 3"),
        ("stacked", {"blocks": 0}, "blocks, planes and head_planes must be at least 1, got 0"),
        ("slim", {"learning_rate": -1.0}, "learning_rate and epsilon must be above 0"),
        ("slim", {"frames_per_update": 0}, "frames_per_update must be at least 1, got 0"),
    ],
)
def test_senseless_knobs_are_refused_in_one_line(network, knobs, words):
    with pytest.raises(UserError) as error:
        PixelCNN((1, 6, 5), 4, "cpu", **(SMALL[network] | knobs))
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("network", NETWORKS)
def test_frames_and_checkpoints_of_another_shape_are_refused(network):
    model = make(network)
    for act in (model.log_prob, model.absorb):
        with pytest.raises(UserError, match=r"^a PixelCNN takes uint8 frames \(B, 1, 6, 5\), got torch.uint8 \(2, 1, 5, 6\)$"):
            act(torch.zeros(2, 1, 5, 6, dtype=torch.uint8))
    with pytest.raises(UserError, match="the checkpoint's PixelCNN is of another shape"):
        model.load_state_dict(make(network, levels=4).state_dict())


@pytest.mark.parametrize("name", ["pixelcnn", "pixelcnn_large"])
def test_configurations_build(name):
    knobs = dict(OmegaConf.load(CONFIGS / f"{name}.yaml"))
    assert knobs.pop("_target_") == "generative.pixelcnn.PixelCNN"
    model = PixelCNN((1, 42, 42), 4, "cpu", **knobs)
    assert isinstance(model.net, StackedNet if name == "pixelcnn_large" else SlimNet)


def test_no_frames_at_all():
    for model in (make("slim"), make("stacked")):
        nothing = torch.zeros(0, 1, 6, 5, dtype=torch.uint8)
        assert len(model.log_prob(nothing)) == len(model.absorb(nothing).before) == len(model.absorb(nothing).after) == 0
