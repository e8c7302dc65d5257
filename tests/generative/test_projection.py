"""Random projection: the product by hand, the seed, the same bits in every batch size, distances kept."""

import pytest
import torch

from generative.api import Encoder, Model
from generative.projection import RandomProjection

SHAPES = [(1, 84, 84), (3, 64, 64), (1, 10, 5)]


def frames_of(shape, count=40):
    return torch.randint(0, 256, (count, *shape), dtype=torch.uint8)


@pytest.mark.parametrize("shape", SHAPES)
def test_features_are_pixels_times_the_matrix(shape):
    torch.manual_seed(0)
    projection = RandomProjection(shape, 4, "cpu")
    frames = frames_of(shape)
    features = projection.encode(frames)
    expected = frames.flatten(1).double() / 255 @ projection.matrix.double()
    assert (features.dtype, tuple(features.shape)) == (torch.float32, (40, 64))
    assert torch.allclose(features.double(), expected, rtol=1e-5, atol=1e-4)
    assert isinstance(projection, Encoder)
    assert isinstance(projection, Model)


def test_entries_are_standard_normal_and_follow_the_seed():
    matrices = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        matrices.append(RandomProjection((1, 84, 84), 4, "cpu").matrix)
    assert torch.equal(matrices[0], matrices[1])
    assert not torch.equal(matrices[0], matrices[2])
    assert abs(matrices[0].mean().item()) < 0.01
    assert matrices[0].std().item() == pytest.approx(1.0, abs=0.01)


def test_a_frame_has_the_same_bits_in_every_batch():
    projection = RandomProjection((1, 84, 84), 4, "cpu")
    frames = frames_of((1, 84, 84))
    whole = projection.encode(frames)
    for begin, end in ((0, 1), (5, 6), (3, 19), (7, 40)):
        assert torch.equal(projection.encode(frames[begin:end]), whole[begin:end])
    assert projection.encode(frames[:0]).shape == (0, 64)


def test_distances_are_kept_up_to_the_number_of_features():
    torch.manual_seed(0)
    projection = RandomProjection((1, 84, 84), 4, "cpu", features=1024)
    frames = frames_of((1, 84, 84), 10)
    pixels = frames.flatten(1).float() / 255
    ratio = torch.pdist(projection.encode(frames)) ** 2 / (1024 * torch.pdist(pixels) ** 2)
    assert ((ratio - 1).abs() < 0.2).all()


def test_state_dict_carries_the_matrix():
    first, second = (RandomProjection((1, 10, 5), 4, "cpu", features=8) for _ in range(2))
    frames = frames_of((1, 10, 5))
    assert not torch.equal(first.encode(frames), second.encode(frames))
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.encode(frames), second.encode(frames))


def test_wrong_frames_are_refused():
    projection = RandomProjection((1, 10, 5), 4, "cpu")
    with pytest.raises(AssertionError, match="uint8"):
        projection.encode(torch.zeros(1, 1, 10, 5))
    with pytest.raises(AssertionError, match="frames are"):
        projection.encode(torch.zeros(1, 1, 5, 10, dtype=torch.uint8))
