"""job=collect: what is recorded is what was played; stopped and gone on with, it ends to the same byte; wrong words are one line."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import launch
from envs.atari import AtariEnv
from envs.protocols import PROTOCOLS
from envs.toy import Catch
from generative.clips import ClipData
from lab.run import derive_seed

CATCH = ["job=collect", "env=Catch", "frames=640", "frames_per_iteration=160", "num_envs=4"]
ROOT = Path(__file__).parents[2]


def collect(folder, *words):
    assert launch.main([*words, f"data={folder}"]) == 0
    return folder


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def refused(capsys, *words):
    assert launch.main(list(words)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def whole(data, steps):
    return data.clips(torch.arange(data.starts(steps)), steps)


def test_what_is_recorded_is_what_was_played(tmp_path, capsys):
    """The recorded actions, played again from the recorded seed, lead to the same pictures, rewards and ends."""
    data = ClipData(collect(tmp_path / "clips", *CATCH, "seed=3"))
    assert (len(data.parts), len(data), data.source["agent"], data.source["env"]) == (4, 640, "random", "Catch")
    steps, episodes, returns = data.parts[0]["steps"], 0, 0.0
    for index, part in enumerate(data.parts):
        assert part["env_seed"] == derive_seed(3, index, "env")
        env = Catch(num_envs=4, device="cpu")
        step = env.reset(part["env_seed"])
        for t in range(steps):
            rows = torch.arange(4) + 4 * (t + steps * index)
            assert torch.equal(data.batch(rows), step.obs)
            # the clip that leads out of this step
            clip = data.clips(rows, 1)
            step = env.step(clip.actions[:, 0])
            assert torch.equal(clip.frames[:, 1], step.next_obs)
            assert torch.equal(clip.rewards[:, 0], step.reward)
            assert torch.equal(clip.discounts[:, 0], step.discount)
            assert torch.equal(clip.last[:, 0], step.last | (t == steps - 1))
            episodes += int(step.last.sum())
            returns += float(step.reward.sum())
    assert sum(part["episodes"] for part in data.parts) == episodes > 10
    assert sum(part["return_mean"] * part["episodes"] for part in data.parts) == pytest.approx(returns)
    assert "640 steps in 4 parts" in capsys.readouterr().out
    assert len(torch.unique(whole(data, 1).actions)) == 3


def test_a_collection_goes_on_to_the_same_bytes(tmp_path, capsys):
    straight = contents(collect(tmp_path / "straight", *CATCH))
    stopped = collect(tmp_path / "stopped", *CATCH, "frames=320")
    assert contents(stopped) != straight
    (stopped / "clips-00002.zst").write_bytes(b"left by a kill")
    capsys.readouterr()
    collect(stopped, *CATCH)
    assert contents(stopped) == straight
    assert "holds 2 of 4 parts" in capsys.readouterr().out
    collect(stopped, *CATCH)
    assert contents(stopped) == straight


@pytest.mark.slow
def test_killed_at_any_moment_it_ends_to_the_same_bytes(tmp_path):
    words = ["job=collect", "env=Pong", "frames=24_000", "frames_per_iteration=2_000", "num_envs=4", "collect.obs=rgb64"]
    straight = contents(collect(tmp_path / "straight", *words))
    command, kills = [sys.executable, "launch.py", *words, f"data={tmp_path / 'killed'}"], 0
    chance = random.Random(1)
    while True:
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
        began = len(contents(tmp_path / "killed")) if (tmp_path / "killed").exists() else 0
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            held = len(contents(tmp_path / "killed")) if (tmp_path / "killed").exists() else 0
            if held >= began + chance.randint(1, 4):
                break
            time.sleep(0.02)
        time.sleep(chance.random() * 0.5)
        if process.poll() is not None:
            assert process.returncode == 0
            break
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        kills += 1
    assert kills >= 3
    assert contents(tmp_path / "killed") == straight


def test_other_pictures_are_of_the_same_games(tmp_path):
    words = ["job=collect", "env=Pong", "frames=1_600", "num_envs=2", "agent=scripted", 'agent.actions="RIGHT*7 LEFT*5 FIRE"']
    grey = ClipData(collect(tmp_path / "grey", *words))
    colour = ClipData(collect(tmp_path / "colour", *words, "collect.obs=rgb64"))
    assert (grey.obs_shape, colour.obs_shape) == ((1, 84, 84), (3, 64, 64))
    ours, theirs = whole(grey, 1), whole(colour, 1)
    assert all(torch.equal(*pair) for pair in zip(ours[1:], theirs[1:]))
    names = AtariEnv("Pong", 1, "cpu", PROTOCOLS["mfec2016"]).spec.action_names
    assert [names[action] for action in ours.actions[::2, 0][:14]] == [*7 * ["RIGHT"], *5 * ["LEFT"], "FIRE", "RIGHT"]
    env = AtariEnv("Pong", 2, "cpu", PROTOCOLS["mfec2016"], obs="rgb64")
    step = env.reset(colour.parts[0]["env_seed"])
    for t in range(200):
        assert torch.equal(colour.batch(torch.tensor([2 * t, 2 * t + 1])), step.obs)
        step = env.step(ours.actions[2 * t : 2 * t + 2, 0])
    env.close()


def test_a_trained_agent_plays_in_its_own_world(tmp_path, capsys):
    run = ["agent=episodic_control", "env=Catch", "num_envs=4", "frames=8_000", "frames_per_iteration=8_000", "agent.capacity=2_000"]
    assert launch.main([*run, "wandb=off", "evaluation.video=false", f"runs_dir={tmp_path}", "run_name=trained"]) == 0
    words = ["job=collect", f"run={tmp_path / 'trained'}", "frames=800", "num_envs=4"]
    greedy = ClipData(collect(tmp_path / "greedy", *words))
    noisy = ClipData(collect(tmp_path / "noisy", *words, "collect.epsilon=1.0"))
    expected = {"agent": "episodic_control", "run": "trained", "trained_frames": 8_000, "epsilon": 0.0, "env": "Catch", "seed": 0}
    assert expected.items() <= greedy.source.items()
    assert greedy.parts[0]["return_mean"] > noisy.parts[0]["return_mean"] + 0.5
    capsys.readouterr()
    told = refused(capsys, *words, "env=Pong", f"data={tmp_path / 'other'}")
    assert told.startswith("error: env=Pong: run= plays its own agent in its own world")
    told = refused(capsys, *words, "collect.epsilon=0.5", f"data={tmp_path / 'greedy'}")
    assert "epsilon was 0.0 and is 0.5 now" in told
    told = refused(capsys, *words, "collect.obs=rgb64", f"data={tmp_path / 'other'}")
    assert "pictures of Atari, and env=Catch is none" in told


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["env=Catch", "agent=dqn"], "agent=dqn has learned nothing"),
        (["env=Catch", "agent=scripted", "agent.actions=UP"], "no action UP; there are"),
        (["env=Catch", "collect.epsilon=1.5"], "collect.epsilon"),
        (["env=Catch", "collect.epsilon=a"], "collect.epsilon"),
        (["env=Catch", "collect.obs=3"], "collect.obs"),
        (["env=Catch", "collect=3"], "collect is a group of keys"),
        (["env=Pong", "collect.obs=rgb63"], "rgb64"),
        (["run=nowhere"], "no such folder"),
        (["run="], "run= must name a folder"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(tmp_path, capsys, words, expected):
    assert expected in refused(capsys, "job=collect", *words, "frames=64", f"data={tmp_path / 'clips'}")
    assert not (tmp_path / "clips").exists()


def test_a_file_in_the_way_and_a_second_collector_are_refused(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert "file" in refused(capsys, *CATCH, f"data={tmp_path / 'file'}")
    from lab.folder import lock

    (tmp_path / "clips").mkdir()
    with lock(tmp_path / "clips"):
        assert "another process works in" in refused(capsys, *CATCH, f"data={tmp_path / 'clips'}")
    assert json.dumps(sorted(contents(tmp_path / "clips"))) == "[]"
