"""What the worlds stand on: packing for the one copy, shrinking by area, usable processors."""

import os

import numpy as np
import pytest
import torch

from envs.area import shrink, shrink_planes
from envs.cpus import usable_cpus
from envs.seeds import splitmix64
from envs.transfer import ALIGNMENT, Transfer, block_bytes, pack, unpack


def arrays() -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [
        generator.integers(0, 256, (3, 1, 5, 7), dtype=np.uint8),
        generator.standard_normal(3).astype(np.float32),
        np.array([True, False, True]),
        generator.integers(0, 256, (2, 4, 6), dtype=np.uint8).transpose(0, 2, 1),
        np.arange(3),
    ]


def test_what_is_packed_comes_out():
    given = arrays()
    block = torch.full((block_bytes(given),), 255, dtype=torch.uint8)
    pack(given, block)
    for tensor, array in zip(unpack(block, given), given, strict=True):
        assert torch.equal(tensor, torch.from_numpy(array.copy()))
        assert tensor.dtype == torch.from_numpy(array.copy()).dtype
        assert tensor.is_contiguous()
        assert tensor.data_ptr() % ALIGNMENT == block.data_ptr() % ALIGNMENT


def test_on_the_cpu_only_what_must_be_is_copied():
    given = arrays()
    for tensor, array in zip(Transfer("cpu")(*given), given):
        assert tensor.is_contiguous()
        assert torch.equal(tensor, torch.from_numpy(array))
        assert (tensor.data_ptr() == array.ctypes.data) == array.flags.c_contiguous


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_ticks_that_follow_each_other_do_not_overwrite():
    transfer, landed = Transfer("cuda"), []
    for tick in range(20):
        landed.append(transfer(np.full((64, 1, 84, 84), tick, np.uint8), np.full(64, tick, np.float32)))
    for tick, (pixels, numbers) in enumerate(landed):
        assert pixels.is_cuda
        assert bool((pixels == tick).all())
        assert bool((numbers == tick).all())


def test_shrink_by_hand():
    picture = np.array([[0, 30, 60], [90, 120, 150], [180, 210, 240]], np.uint8)
    assert shrink(picture, 1, 1).tolist() == [[120]]
    assert shrink(picture, 3, 1).tolist() == [[30], [120], [210]]
    # each output pixel covers one and a half cells a side
    assert shrink(picture, 2, 2).tolist() == [[40, 80], [160, 200]]
    same = shrink(picture, 3, 3)
    assert same.tolist() == picture.tolist()
    assert same is not picture


@pytest.mark.parametrize("size", [(84, 84), (64, 64), (105, 80)])
def test_shrink_is_the_mean_of_what_a_pixel_covers(size):
    """Against the area integral in float64, colours apart."""
    picture = np.random.default_rng(0).integers(0, 256, (210, 160, 3), dtype=np.uint8)

    def cover(source: int, target: int) -> np.ndarray:
        edges = np.arange(target + 1) * source / target
        cells = np.arange(source)
        overlap = np.minimum(cells + 1, edges[1:, None]) - np.maximum(cells, edges[:-1, None])
        return overlap.clip(0) * target / source

    expected = np.einsum("ab,bcd,ec->aed", cover(210, size[0]), picture.astype(float), cover(160, size[1]), optimize=True)
    assert np.abs(shrink(picture, *size) - expected).max() <= 0.501


def test_planes_are_shrunk_as_the_channels_of_a_picture():
    picture = np.random.default_rng(0).integers(0, 256, (12, 16, 5), dtype=np.uint8)
    planes = picture.transpose(2, 0, 1)
    for size in ((5, 7), (12, 16), (12, 9), (1, 16)):
        assert np.array_equal(shrink_planes(planes, *size), shrink(picture, *size).transpose(2, 0, 1))
        assert shrink_planes(planes, *size).flags.c_contiguous


def test_splitmix64_is_the_published_one():
    """The first numbers of the reference generator from state 1234567: its state grows by the golden ratio."""
    golden = 0x9E3779B97F4A7C15
    numbers = [splitmix64(1234567 + step * golden) for step in range(3)]
    assert numbers == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def quota(root, *, groups: str, **files: str):
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(groups)
    for name, content in files.items():
        path = root / "sys/fs/cgroup" / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


@pytest.fixture
def eight_processors(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)


@pytest.mark.usefixtures("eight_processors")
@pytest.mark.parametrize(
    ("groups", "files", "cpus"),
    [
        ("0::/\n", {}, 8),
        ("0::/\n", {"cpu_dot_max": "max 100000\n"}, 8),
        ("0::/\n", {"cpu_dot_max": "250000 100000\n"}, 3),
        ("0::/\n", {"cpu_dot_max": "10000 100000\n"}, 1),
        ("0::/\n", {"cpu_dot_max": "9000000 100000\n"}, 8),
        ("0::/a/b\n", {"a__b__cpu_dot_max": "max 100000\n", "a__cpu_dot_max": "200000 100000\n"}, 2),
        ("4:memory:/x\n1:cpu,cpuacct:/x\n", {"cpu__x__cpu.cfs_quota_us": "400000\n", "cpu__x__cpu.cfs_period_us": "100000\n"}, 4),
        ("1:cpu:/x\n", {"cpu__x__cpu.cfs_quota_us": "-1\n", "cpu__x__cpu.cfs_period_us": "100000\n"}, 8),
        ("1:cpu:/x\n", {"cpu__cpu.cfs_quota_us": "300000\n", "cpu__cpu.cfs_period_us": "100000\n"}, 3),
        ("1:cpuset:/\n", {"cpu__cpu.cfs_quota_us": "100000\n", "cpu__cpu.cfs_period_us": "100000\n"}, 8),
    ],
)
def test_quotas_of_containers_are_kept(tmp_path, groups, files, cpus):
    assert usable_cpus(quota(tmp_path, groups=groups, **files)) == cpus


@pytest.mark.usefixtures("eight_processors")
def test_no_quota_can_be_read(tmp_path):
    assert usable_cpus(tmp_path) == 8
