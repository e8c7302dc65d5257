"""Labyrinths on CUDA do what they do on the host: in the simulator, and on a card where there is one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_levels import NAMES

from envs.labyrinth.world import Labyrinth

ROOT = Path(__file__).parent.parent.parent
SIMULATION = """
import numpy as np, torch, warnings
warnings.simplefilter("ignore")
from numba import cuda
from envs.labyrinth import card, lanes, level, raycast, textures, physics
for name in ("ForageAndAvoid", "ShortDoubleTMaze", "NavMaze"):
    rules = level.load_level(name, 5 if name == "NavMaze" else None).rules
    pictures = textures.walls(), textures.floor(), textures.sky(), textures.things()
    host = lanes.Threads(1, rules, 2, (8, 10, 3), 5.0, pictures)
    expected = host.start([3, 4]).numpy()
    state = lanes.empty_lanes(rules, 2)
    state.dice[:] = [3, 4]
    which, seen, out = np.ones(2, np.uint8), np.zeros((2, len(rules.kinds) + 1, 4), np.float32), np.zeros((2, 8, 10, 3), np.uint8)
    card.open_lanes[1, 2](rules, state, which)
    reward, ended = np.zeros(2, np.float32), np.zeros(2, np.uint8)
    for t in range(12):
        card.place_things[1, 2](state, which, seen, 5.0, 10)
        card.draw_columns[1, 20](state, which, seen, 5.0, raycast.floor_depths(8, 5.0), *pictures, out)
        assert np.array_equal(out, expected), (name, t)
        for mine, theirs in zip(state, host.lanes()):
            assert np.array_equal(mine, theirs), (name, t)
        actions = np.array([(3 * t) % 8, (5 * t + 1) % 8])
        host.play(torch.from_numpy(actions))
        expected, gained, _, _ = host.result()
        expected = expected.numpy()
        card.step_lanes[1, 2](rules, state, actions, reward, ended)
        assert np.array_equal(reward, gained.numpy())
print("equal")
"""


def test_the_cuda_kernels_do_the_same_in_the_simulator():
    environment = os.environ | {"NUMBA_ENABLE_CUDASIM": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", SIMULATION], env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "equal", done.stderr[-2000:]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("level", NAMES)
def test_cuda_plays_what_the_host_plays(level):
    host, card = (Labyrinth(8, device, level) for device in ("cpu", "cuda"))
    expected, got = host.reset(0), card.reset(0)
    torch.manual_seed(0)
    for _ in range(950):
        assert (expected.obs != got.obs.cpu()).float().mean() < 0.002
        for name in ("reward", "discount", "last"):
            assert torch.equal(getattr(expected, name), getattr(got, name).cpu())
        action = torch.randint(8, (8,))
        expected, got = host.step(action), card.step(action.cuda())
