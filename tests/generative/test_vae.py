"""The VAE: shapes, the three numbers under their right names, the padding mask, bounds, gradients, learning on a toy."""

import copy
import math

import pytest
import torch
from torch import nn

from generative.api import Clip, Density, Encoder, Model, Sampler, Trainable
from generative.data import FrameMemory, image_clip
from generative.fit import Fitter
from generative.nets import normalise, paper_decoder, paper_encoder, to_pixels
from generative.vae import VAE

LIKELIHOODS = ["fixed_gaussian", "gaussian", "bernoulli", "logistic"]
SHAPES = [(1, 84, 84), (3, 64, 64), (3, 210, 160), (1, 10, 5), (1, 1, 3), (2, 33, 47)]


def frames_of(shape, count=3):
    return torch.randint(0, 256, (count, *shape), dtype=torch.uint8)


@pytest.mark.parametrize("shape", SHAPES)
def test_small_does_every_job_at_every_shape(shape):
    model = VAE(shape, 4, "cpu", latents=5)
    frames = frames_of(shape)
    assert all(isinstance(model, job) for job in (Model, Trainable, Encoder, Sampler))
    features = model.encode(frames)
    assert (features.dtype, tuple(features.shape), model.features) == (torch.float32, (3, 10), 10)
    assert not features.requires_grad
    for pictures, count in ((model.reconstruct(frames), 3), (model.sample(2), 2)):
        assert (pictures.dtype, tuple(pictures.shape)) == (torch.uint8, (count, *shape))
    assert model.elbo(frames).shape == model.importance_weighted_bound(frames, 3).shape == (3,)


@pytest.mark.parametrize("shape", [(1, 84, 84), (3, 64, 64), (3, 210, 160), (1, 52, 52)])
def test_paper_architecture_fits_other_shapes_too(shape):
    model = VAE(shape, 4, "cpu", architecture="mfec", likelihood="gaussian")
    frames = frames_of(shape, 2)
    assert model.encode(frames).shape == (2, 64)
    assert model.reconstruct(frames).shape == frames.shape


def test_paper_architecture_is_appendix_a():
    encoder, decoder = paper_encoder((1, 84, 84), 64), paper_decoder(32, (1, 84, 84), 2)
    convolutions = [layer for layer in encoder if isinstance(layer, nn.Conv2d)]
    assert [layer.out_channels for layer in convolutions] == [32, 32, 64, 64]
    assert [layer.kernel_size for layer in convolutions] == [(4, 4), (5, 5), (5, 5), (4, 4)]
    assert all(layer.stride == (2, 2) and layer.padding == (0, 0) for layer in convolutions)
    transposed = [layer for layer in decoder if isinstance(layer, nn.ConvTranspose2d)]
    assert [layer.out_channels for layer in transposed] == [64, 64, 32, 32, 2]
    assert [layer.kernel_size for layer in transposed[:4]] == [(4, 4), (5, 5), (5, 5), (4, 4)]
    assert all(layer.stride == (2, 2) and layer.output_padding == (0, 0) for layer in transposed[:4])
    assert [layer.out_features for layer in (*encoder, *decoder) if isinstance(layer, nn.Linear)] == [512, 64, 512, 576]
    sides, images = [], torch.zeros(1, 1, 84, 84)
    for layer in encoder:
        images = layer(images)
        if isinstance(layer, nn.Conv2d):
            sides.append(images.shape[-1])
    assert sides == [41, 19, 8, 3]
    assert decoder(torch.zeros(1, 32)).shape == (1, 2, 84, 84)


def test_paper_architecture_refuses_frames_too_small():
    with pytest.raises(ValueError, match="too small"):
        VAE((1, 40, 40), 4, "cpu", architecture="mfec")


@pytest.mark.parametrize("knob", [{"likelihood": "poisson"}, {"architecture": "huge"}, {"latents": 0}, {"beta": -1.0}, {"std": 0.0}])
def test_senseless_knobs_are_refused_by_name(knob):
    with pytest.raises(ValueError, match=next(iter(knob))):
        VAE((1, 10, 5), 4, "cpu", **knob)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("architecture", ["small", "mfec"])
def test_gradients_reach_all_parameters(architecture, likelihood):
    model = VAE((1, 52, 52), 4, "cpu", architecture=architecture, likelihood=likelihood)
    (player, loss, _) = next(model.losses(image_clip(frames_of((1, 52, 52), 8))))
    loss.backward()
    assert player == "vae"
    assert set(model.players()) == {"vae"}
    assert {id(parameter) for parameter in model.players()["vae"]} == {id(parameter) for parameter in model.parameters()}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_metrics_are_distortion_rate_and_elbo_and_beta_weighs_the_rate_in_the_loss_alone():
    frames = frames_of((1, 10, 5), 6)
    results = {}
    for beta in (1.0, 4.0):
        torch.manual_seed(0)
        model = VAE((1, 10, 5), 4, "cpu", beta=beta, latents=3)
        torch.manual_seed(1)
        (item,) = list(model.losses(image_clip(frames)))
        _, loss, metrics = item
        assert loss.item() * 50 == pytest.approx((metrics["distortion"] + beta * metrics["rate"]).item(), rel=1e-5)
        assert metrics["elbo"].item() == pytest.approx(-(metrics["distortion"] + metrics["rate"]).item(), rel=1e-6)
        assert not any(value.requires_grad for value in metrics.values())
        results[beta] = metrics
    assert results[1.0]["elbo"] == results[4.0]["elbo"]
    torch.manual_seed(1)
    assert model.elbo(frames).mean().item() == pytest.approx(results[4.0]["elbo"].item(), rel=1e-5)
    expected = (-results[4.0]["elbo"].item() / 50 + math.log(255)) / math.log(2)
    assert results[4.0]["bits_per_dim"].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("likelihood", "nats_a_pixel"), [("fixed_gaussian", -0.5 * math.log(2 * math.pi) - math.log(0.1)), ("bernoulli", -math.log(2))]
)
def test_distortion_of_a_decoder_that_is_right_by_hand(likelihood, nats_a_pixel):
    """All maps 0: a Gaussian of mean 0 on black frames, a fair coin on white ones; the posterior equals the prior, so the rate is 0."""
    model = VAE((1, 10, 5), 4, "cpu", likelihood=likelihood, std=0.1)
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    frames = torch.full((2, 1, 10, 5), 255 if likelihood == "bernoulli" else 0, dtype=torch.uint8)
    distortion, rate = model.distortion_and_rate(frames)
    assert distortion.tolist() == pytest.approx([-50 * nats_a_pixel] * 2, rel=1e-5)
    assert rate.tolist() == [0.0, 0.0]
    assert model.importance_weighted_bound(frames, 5).tolist() == pytest.approx([50 * nats_a_pixel] * 2, rel=1e-5)
    assert model.encode(frames).eq(0).all()


def test_learned_std_is_floored():
    model = VAE((1, 10, 5), 4, "cpu", likelihood="gaussian", std=0.05)
    images = torch.zeros(1, 1, 10, 5)
    maps = torch.cat((images, torch.full_like(images, -20.0)), 1)
    floor = 50 * (-0.5 * math.log(2 * math.pi) - math.log(0.05))
    assert model.log_likelihood(images, maps).item() == pytest.approx(floor, rel=1e-5)


def test_padding_after_the_first_last_changes_nothing():
    """Row 0 never ends, row 1 ends at transition 1: its frames 0, 1, 2 count, and 3 is padding."""
    torch.manual_seed(0)
    model = VAE((1, 10, 5), 4, "cpu", latents=2)
    frames = frames_of((1, 10, 5), 8).unflatten(0, (2, 4))
    last = torch.tensor([[False, False, False], [False, True, False]])
    zeros = torch.zeros(2, 3)

    def metrics_of(frames):
        torch.manual_seed(1)
        return next(model.losses(Clip(frames, zeros.long(), zeros, zeros, last)))

    _, loss, metrics = metrics_of(frames)
    scribbled = frames.clone()
    scribbled[1, 3] = 255 - scribbled[1, 3]
    assert metrics_of(scribbled)[1] == loss
    scribbled[1, 2] = 255 - scribbled[1, 2]
    assert metrics_of(scribbled)[1] != loss
    torch.manual_seed(1)
    each = model.elbo(frames.flatten(0, 1))
    assert metrics["elbo"].item() == pytest.approx(each[:7].mean().item(), rel=1e-5)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_more_samples_tighten_the_bound(likelihood):
    torch.manual_seed(0)
    model = VAE((1, 10, 5), 4, "cpu", likelihood=likelihood, std=0.5, latents=2)
    for parameter in model.decoder.parameters():
        parameter.data.mul_(2)
    frames = frames_of((1, 10, 5), 4).repeat(100, 1, 1, 1)
    bounds = [model.importance_weighted_bound(frames, samples).mean() for samples in (1, 8, 32)]
    elbo = model.elbo(frames).mean()
    assert bounds[0] < bounds[1] < bounds[2]
    assert bounds[0].item() == pytest.approx(elbo.item(), abs=0.3 * (bounds[2] - bounds[0]).item())


def test_encode_leaves_the_mode_and_the_random_state_alone():
    model = VAE((1, 10, 5), 4, "cpu")
    frames = frames_of((1, 10, 5))
    for mode in (True, False):
        model.train(mode)
        before = torch.get_rng_state()
        features = model.encode(frames)
        model.reconstruct(frames)
        assert torch.equal(before, torch.get_rng_state())
        assert model.training is mode
        assert torch.equal(features, model.encode(frames))
    mean, log_std = model.posterior(normalise(frames))
    assert torch.equal(features, torch.cat((mean, log_std), 1))


def test_wrong_frames_are_refused():
    model = VAE((1, 10, 5), 4, "cpu")
    with pytest.raises(AssertionError, match="uint8"):
        model.encode(torch.zeros(1, 1, 10, 5))
    with pytest.raises(AssertionError, match="frames are"):
        model.encode(torch.zeros(1, 1, 5, 10, dtype=torch.uint8))


def test_a_model_follows_the_seed_and_its_state_dict():
    models = []
    for seed in (7, 7, 8):
        torch.manual_seed(seed)
        models.append(VAE((1, 84, 84), 4, "cpu"))
    frames = frames_of((1, 84, 84))
    features = [model.encode(frames) for model in models]
    assert torch.equal(features[0], features[1])
    assert not torch.equal(features[0], features[2])
    models[2].load_state_dict(models[0].state_dict())
    assert torch.equal(models[2].encode(frames), features[0])
    assert all(tensor.is_contiguous() for tensor in models[0].state_dict().values())


def test_pixels_round_and_saturate():
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    assert torch.equal(to_pixels(normalise(levels)), levels)
    assert to_pixels(torch.tensor([-0.3, 1.4, 0.5001])).tolist() == [0, 255, 128]


def test_learns_a_moving_dot():
    """Eight frames, one lit pixel in each: after a short fit every reconstruction has its dot in the right place."""
    torch.manual_seed(0)
    frames = torch.zeros(8, 1, 10, 5, dtype=torch.uint8)
    for index in range(8):
        frames[index, 0, index + 1, index % 5] = 255
    model = VAE((1, 10, 5), 4, "cpu", latents=4)
    before = model.elbo(frames).mean()
    for tick in Fitter(model, FrameMemory.from_tensor(frames), batch_size=16, learning_rate=3e-3, updates=200).run():
        last = tick
    assert last.update == 200
    assert model.elbo(frames).mean() > before + 100
    assert torch.equal(model.reconstruct(frames).flatten(1).argmax(1), frames.flatten(1).argmax(1))


def test_as_a_density_it_gives_a_bound_and_learns_frame_after_frame():
    torch.manual_seed(0)
    model = VAE((1, 12, 12), 2, "cpu", latents=4, likelihood="logistic")
    frames = torch.zeros(60, 1, 12, 12, dtype=torch.uint8)
    frames[:, :, 3:6, 3:6] = 200
    assert isinstance(model, Density)
    assert not model.exact
    recoding = model.absorb(frames)
    assert recoding.before.dtype == torch.float64
    assert float(recoding.before[-5:].mean()) > float(recoding.before[:5].mean()) + 50
    gain = (recoding.after - recoding.before)[:10]
    assert float(gain.mean()) > 5  # momentum may overshoot once in a while
    assert (model.log_prob(frames) < 0).all()  # the mass of a picture


def test_as_a_density_it_resumes_bit_for_bit():
    frames = torch.randint(256, (20, 1, 12, 12), dtype=torch.uint8)
    torch.manual_seed(0)
    model, resumed = (VAE((1, 12, 12), 2, "cpu", latents=4) for _ in range(2))
    model.absorb(frames[:10])
    resumed.load_state_dict(copy.deepcopy(model.state_dict()))
    results = []
    for each in (model, resumed):
        torch.manual_seed(1)
        results.append(each.absorb(frames[10:]))
    assert torch.equal(results[0].after, results[1].after)
