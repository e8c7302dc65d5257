"""Every way a folder of clips can be wrong ends in one line that names it."""

import json

import numpy as np
import pytest
import torch
from recorded import ACTIONS, LANES, PARTS, manifest_of, record, refused
from safetensors.numpy import load_file, save_file

from envs.api import UserError
from generative.clips import BLOCK, ClipData


@pytest.fixture
def folder(tmp_path):
    """Two parts, 41 and 20 steps of three lanes, with some ends of episodes in each lane."""
    return record(tmp_path / "clips", *PARTS)


def test_missing_and_foreign_folders_are_refused(folder, tmp_path):
    refused(tmp_path / "nowhere", "no folder")
    refused(tmp_path, r"holds no manifest\.json")
    refused(folder, r"\(3, 5, 4\).*\(1, 84, 84\)", obs_shape=(1, 84, 84))
    texts = (
        ("{", "cannot be read"),
        ("[]", "is not a manifest"),
        ('{"format": "reverie-frames"}', "is not a manifest"),
        ("[" * 10**5, "JSON"),
    )
    for text, match in texts:
        (tmp_path / "manifest.json").write_text(text)
        refused(tmp_path, match)


@pytest.mark.parametrize("name", ["clips-00001.zst", "clips-00001.safetensors"])
@pytest.mark.parametrize("harm", ["truncated", "longer", "tampered", "missing"])
def test_a_damaged_file_is_refused_by_name(folder, name, harm):
    path = folder / name
    content = bytearray(path.read_bytes())
    if harm == "missing":
        path.unlink()
    else:
        content[-5] ^= 1
        path.write_bytes({"truncated": content[:-1], "longer": content + b"x", "tampered": content}[harm])
    refused(folder, name.replace(".", r"\."))
    rest = ClipData(folder, rest=True)
    (line,) = rest.refused
    assert name in line
    assert line.endswith("it is left out")
    kept = PARTS[1] if "00000" in name else PARTS[0]
    assert len(rest) == LANES * len(kept)
    assert torch.equal(rest.batch(torch.arange(LANES)), kept[0][0].obs)
    assert rest.parts[0]["steps"] == len(kept)


def test_of_a_folder_without_a_whole_part_nothing_is_used(folder):
    for path in folder.glob("*.zst"):
        path.unlink()
    with pytest.raises(UserError, match=r"none of 2 parts is whole; cannot read .*clips-00000\.zst.*No such file"):
        ClipData(folder, rest=True)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("version", 2),
        ("obs_shape", [1, 4]),
        ("obs_shape", [1, 4, -3]),
        ("num_actions", 0),
        ("lanes", "3"),
        ("frames_per_step", True),
        ("parts", None),
        ("parts", [3]),
        ("parts", [{"name": "../secret", "steps": 3}]),
        ("parts", [{"name": "clips-00000", "steps": True}]),
        ("parts", [{"name": "clips-00000", "steps": 41, "pictures_bytes": 3, "steps_file_bytes": 3}]),
        ("source", None),
    ],
)
def test_a_tampered_manifest_is_refused(folder, key, value):
    (folder / "manifest.json").write_text(json.dumps(manifest_of(folder) | {key: value}))
    refused(folder, "manifest.json is")


def test_empty_and_unknown_parts_of_a_manifest(folder):
    (folder / "manifest.json").write_text(json.dumps(manifest_of(folder) | {"colour": {"of": "sky"}}))
    assert len(ClipData(folder)) == LANES * 61
    (folder / "manifest.json").write_text(json.dumps(manifest_of(folder) | {"parts": []}))
    refused(folder, "holds no clips")


@pytest.mark.parametrize("harm", ["action", "shape", "dtype", "lane", "offset", "missing"])
def test_steps_that_do_not_fit_their_pictures_are_refused(folder, harm):
    """Files that agree with their checksums, and yet cannot be right: a folder may be a stranger's work."""
    path = folder / "clips-00000.safetensors"
    arrays = load_file(path)
    if harm == "action":
        arrays["actions"][3, 1] = ACTIONS
    elif harm == "shape":
        arrays["rewards"] = arrays["rewards"][:-1]
    elif harm == "dtype":
        arrays["last"] = arrays["last"].astype(np.float32)
    elif harm == "lane":
        arrays["block_lanes"][0] = LANES
    elif harm == "offset":
        arrays["block_offsets"][1] = 10**9
    else:
        del arrays["discounts"]
    save_file(arrays, path)
    manifest = manifest_of(folder)
    manifest["parts"][0]["steps_file_bytes"] = path.stat().st_size
    (folder / "manifest.json").write_text(json.dumps(manifest))
    refused(folder, r"clips-00000\.safetensors is damaged", verify=False)


def test_a_block_that_unpacks_to_another_size_is_refused(folder):
    path = folder / "clips-00000.zst"
    index = load_file(folder / "clips-00000.safetensors")
    first = index["block_offsets"][index["block_lanes"].tolist().index(0)]
    content = bytearray(path.read_bytes())
    content[first : first + 4] = b"none"
    path.write_bytes(content)
    data = ClipData(folder, verify=False)
    with pytest.raises(UserError, match=r"clips-00000\.zst is damaged"):
        data.batch(torch.tensor([0]))
    assert len(data.batch(torch.tensor([LANES * BLOCK + LANES]))) == 1
