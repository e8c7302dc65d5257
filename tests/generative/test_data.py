"""Frames in memory, and what clips are made of."""

import pytest
import torch

from generative.api import Clip
from generative.data import FrameMemory, frame_weights, image_clip

SHAPE = (1, 4, 3)


def frames_of(count):
    return torch.randint(0, 256, (count, *SHAPE), dtype=torch.uint8)


def test_sample_follows_the_default_generator_and_reaches_every_frame():
    source = FrameMemory.from_tensor(frames_of(25))
    torch.manual_seed(5)
    first, second = source.sample(300), source.sample(300)
    torch.manual_seed(5)
    assert torch.equal(source.sample(300), first)
    assert not torch.equal(first, second)
    assert len(torch.unique(first.flatten(1), dim=0)) == 25


def test_memory_fills_up_to_its_capacity():
    frames, memory = frames_of(5), FrameMemory(SHAPE, capacity=5)
    memory.append(frames[:2])
    assert len(memory) == 2
    assert len(torch.unique(memory.sample(100).flatten(1), dim=0)) == 2
    memory.append(frames[2:])
    assert torch.equal(memory.batch(torch.arange(5)), frames)
    with pytest.raises(ValueError, match="capacity of 5"):
        memory.append(frames[:1])


def test_frame_weights_keep_the_successor_of_the_first_last():
    last = torch.tensor([[0, 0, 0], [1, 0, 0], [0, 1, 1], [0, 0, 1]]).bool()
    zeros = torch.zeros(4, 3)
    clip = Clip(frames_of(16).unflatten(0, (4, 4)), zeros.long(), zeros, zeros, last)
    assert frame_weights(clip).tolist() == [[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]


def test_an_image_clip_has_no_transitions():
    frames = frames_of(6)
    clip = image_clip(frames)
    assert torch.equal(clip.frames[:, 0], frames)
    assert [tuple(tensor.shape) for tensor in clip[1:]] == [(6, 0)] * 4
    assert [tensor.dtype for tensor in clip[1:]] == [torch.int64, torch.float32, torch.float32, torch.bool]
    assert frame_weights(clip).tolist() == [[1.0]] * 6
