"""Returns and lengths by hand, and films that a decoder reads back."""

import imageio_ffmpeg
import numpy as np
import pytest
import torch

from envs.api import Step
from envs.stats import EpisodeStats, Finished, write_mp4
from envs.toy import Chain


def after(reward: list[float], last: list[bool], discount: list[float] | None = None) -> Step:
    obs = torch.zeros(len(reward), 1, 1, 1, dtype=torch.uint8)
    following = obs.clone() if any(last) else obs
    return Step(obs, torch.tensor(reward), torch.tensor(discount or [1.0] * len(reward)), torch.tensor(last), following)


def test_episodes_by_hand():
    """Frames, not steps; raw returns; a lost life ends nothing; drained once; the next episode starts from nought."""
    stats = EpisodeStats(2, 4, "cpu")
    stats.update(after([1, 0.5], [False, False]))
    stats.update(after([200, 0], [False, False], discount=[0, 1]))
    assert stats.drain() == []
    stats.update(after([-3, 2], [True, False]))
    stats.update(after([7, 1], [False, True]))
    stats.update(after([1, 5], [True, True]))
    assert stats.drain() == [Finished(0, 198, 12), Finished(1, 3.5, 16), Finished(0, 8, 8), Finished(1, 5, 4)]
    assert stats.drain() == []
    stats.update(after([0, 9], [False, True]))
    assert stats.drain() == [Finished(1, 9, 4)]


def test_points_beyond_float32_are_kept():
    stats = EpisodeStats(1, 4, "cpu")
    stats.update(after([2.0**24], [False]))
    stats.update(after([1], [True]))
    assert stats.drain()[0].episode_return == 2**24 + 1


def test_nothing_is_read_back_before_drain(monkeypatch):
    """On an accelerator a value read by the host is a wait for the device."""
    stats, steps = EpisodeStats(2, 4, "cpu"), [after([1, 1], [False, False]), after([1, 1], [True, False])]

    def refuse(*_):
        raise AssertionError("the host waits for the device")

    with monkeypatch.context() as patch:
        for name in ("__bool__", "__int__", "__float__", "item", "tolist", "cpu", "numpy", "nonzero"):
            patch.setattr(torch.Tensor, name, refuse)
        for step in steps:
            stats.update(step)
    assert stats.drain() == [Finished(0, 2, 8)]


def test_steps_are_not_written():
    step = after([1, 1], [True, False])
    stats = EpisodeStats(2, 4, "cpu")
    stats.update(step)
    stats.update(after([1, 1], [True, True]))
    assert step.reward.tolist() == [1, 1]
    assert stats.drain() == [Finished(0, 1, 4), Finished(0, 1, 4), Finished(1, 2, 8)]


def test_a_chain_scores_its_closed_form():
    env = Chain(3, "cpu", length=5)
    stats = EpisodeStats(3, env.spec.frames_per_step, "cpu")
    env.reset(0)
    for _ in range(8):
        stats.update(env.step(torch.ones(3, dtype=torch.int64)))
    assert stats.drain() == [Finished(lane, 1, 4) for _ in range(2) for lane in range(3)]


def read(path) -> tuple[dict, np.ndarray]:
    reader = imageio_ffmpeg.read_frames(str(path))
    meta = next(reader)
    width, height = meta["size"]
    return meta, np.stack([np.frombuffer(frame, np.uint8).reshape(height, width, 3) for frame in reader])


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("as_iterator", [False, True])
def test_a_film_reads_back(tmp_path, channels, as_iterator):
    """Odd sizes are padded, pixels enlarged without blur, and the colours survive."""
    frames = np.zeros((12, 15, 21, channels), np.uint8)
    for t in range(12):
        frames[t, :, :10] = 20 * t
        frames[t, 5:10, 12:18, 0] = 200
    path = tmp_path / "new" / "film.mp4"
    write_mp4(path, iter(frames) if as_iterator else frames, fps=15, scale=3)
    meta, seen = read(path)
    assert meta["codec"] == "h264"
    assert meta["pix_fmt"].startswith("yuv420p")
    assert meta["fps"] == 15
    assert seen.shape == (12, 46, 64, 3)
    large = np.broadcast_to(frames, (12, 15, 21, 3) if channels == 1 else frames.shape).repeat(3, 1).repeat(3, 2)
    assert np.abs(seen[:, :45, :63].astype(int) - large).mean() < 3
    assert list(path.parent.iterdir()) == [path]
    assert path.read_bytes().find(b"moov") < path.read_bytes().find(b"mdat")  # browsers start before they have it all


def test_bad_films_leave_nothing(tmp_path):
    path = tmp_path / "film.mp4"
    with pytest.raises(ValueError, match="at least one picture"):
        write_mp4(path, [], fps=15)
    with pytest.raises(ValueError, match="pictures must be uint8"):
        write_mp4(path, np.zeros((3, 8, 8), np.uint8), fps=15)
    with pytest.raises(ValueError, match="but one is"):
        write_mp4(path, [np.zeros((8, 8, 3), np.uint8), np.zeros((8, 9, 3), np.uint8)], fps=15)
    assert list(tmp_path.iterdir()) == []
