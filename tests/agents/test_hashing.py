import pytest
import torch

from agents.hashing import FrameHash, HashIndex, action_hashes

CPU = torch.device("cpu")


def test_hash_is_the_same_alone_and_in_a_batch_and_for_every_instance():
    torch.manual_seed(0)
    frames = torch.randint(0, 256, (9, 1, 84, 84), dtype=torch.uint8)
    together = FrameHash(84 * 84, CPU)(frames)
    alone = torch.cat([FrameHash(84 * 84, CPU)(frame.unsqueeze(0)) for frame in frames])
    assert torch.equal(together, alone)
    assert together.dtype == torch.int64


def test_hash_does_not_change_between_versions():
    """Hashes are kept in checkpoints: another function would make every saved table unreadable by exact match."""
    frames = torch.arange(2 * 20, dtype=torch.uint8).view(2, 1, 4, 5)
    assert FrameHash(20, CPU)(frames).tolist() == [518416089664205152, -157788199279884796]


@pytest.mark.parametrize("numbers", [50, 7056])
def test_every_single_pixel_changes_the_hash(numbers):
    base = torch.zeros(numbers, numbers, dtype=torch.uint8)
    variants = [base.clone().fill_diagonal_(level) for level in (1, 2, 128, 255)]
    hashes = FrameHash(numbers, CPU)(torch.cat([base[:1], *variants]))
    assert hashes.unique().numel() == 4 * numbers + 1


def test_low_bits_and_high_bits_are_spread():
    frames = torch.zeros(4096, 64, dtype=torch.uint8)
    frames[:, 0], frames[:, 1] = torch.arange(4096) % 256, torch.arange(4096) // 256
    hashes = FrameHash(64, CPU)(frames)
    for bits in (hashes & 63, (hashes >> 32) & 63, (hashes >> 58) & 63):
        counts = bits.bincount(minlength=64)
        assert counts.min() > 24
        assert counts.max() < 110


def test_actions_of_one_frame_have_hashes_of_their_own():
    hashes = FrameHash(64, CPU)(torch.randint(0, 256, (50, 64), dtype=torch.uint8))
    pairs = action_hashes(hashes, 18)
    assert pairs.shape == (50, 18)
    assert pairs.unique().numel() == 900


def test_index_finds_what_was_inserted_and_nothing_else():
    torch.manual_seed(1)
    hashes, index = torch.randint(-(2**62), 2**62, (30_000,)), HashIndex(CPU)
    for start in range(0, 30_000, 700):
        part = hashes[start : start + 700]
        index.insert(part, torch.arange(start, start + part.shape[0]))
    assert len(index) == 30_000
    assert torch.equal(index.lookup(hashes), torch.arange(30_000))
    assert (index.lookup(hashes + 1) == -1).all()
    assert index.lookup(hashes[:6].view(2, 3)).tolist() == [[0, 1, 2], [3, 4, 5]]


def test_index_forgets_what_is_removed_and_takes_it_again():
    torch.manual_seed(2)
    hashes, index = torch.randint(-(2**62), 2**62, (5_000,)), HashIndex(CPU)
    index.insert(hashes, torch.arange(5_000))
    index.remove(hashes[:2_000])
    assert (index.lookup(hashes[:2_000]) == -1).all()
    assert torch.equal(index.lookup(hashes[2_000:]), torch.arange(2_000, 5_000))
    assert len(index) == 3_000
    index.insert(hashes[:2_000], torch.arange(7_000, 9_000))
    assert torch.equal(index.lookup(hashes[:2_000]), torch.arange(7_000, 9_000))
    with pytest.raises(KeyError):
        index.remove(torch.tensor([12345]))


def test_index_survives_hashes_that_all_want_the_same_bucket():
    index = HashIndex(CPU)
    hashes = torch.arange(40, dtype=torch.int64) << 8
    index.insert(hashes, torch.arange(40))
    assert torch.equal(index.lookup(hashes), torch.arange(40))


def test_removed_row_zero_is_not_found_by_the_hash_zero_of_empty_slots():
    assert HashIndex(CPU).lookup(torch.tensor([0])).tolist() == [-1]


def test_announced_bytes_hold():
    index = HashIndex(CPU)
    index.insert(torch.randint(-(2**62), 2**62, (100_000,)), torch.arange(100_000))
    assert index._hashes.nbytes + index._rows.nbytes <= HashIndex.required_bytes(100_000)
    assert HashIndex.required_bytes(1_000_000) <= 55 * 1_000_000
