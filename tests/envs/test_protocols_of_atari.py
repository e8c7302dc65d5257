"""The four protocols say what their papers say, and a bad knob is refused."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from envs.api import UserError
from envs.protocols import PROTOCOLS

TABLE = {  # sticky, openings, life loss, all actions, training frames, evaluation epsilon, evaluation frames, score
    "mfec2016": (0.0, 30, False, False, 108_000, 0.005, 108_000, "evaluation"),
    "nature2015": (0.0, 30, True, False, 108_000, 0.05, 18_000, "evaluation"),
    "machado2018": (0.25, 1, False, True, 18_000, 0.01, 18_000, "last_100_training_episodes"),
    "atari100k": (0.0, 30, True, False, 108_000, 0.0, 108_000, "evaluation"),
}


def test_the_table():
    assert set(PROTOCOLS) == set(TABLE)
    for name, (sticky, openings, lives, full, frames, epsilon, evaluation_frames, score) in TABLE.items():
        protocol = PROTOCOLS[name]
        assert protocol.name == name
        assert (protocol.sticky, protocol.noop_max, protocol.life_loss, protocol.full_action_set) == (sticky, openings, lives, full)
        assert (protocol.max_episode_frames, protocol.evaluation_max_frames) == (frames, evaluation_frames)
        assert (protocol.evaluation_epsilon, protocol.score) == (epsilon, score)
        assert protocol.frame_skip == 4
        assert not protocol.fire_reset


def test_a_protocol_is_a_value():
    with pytest.raises(dataclasses.FrozenInstanceError):
        PROTOCOLS["mfec2016"].sticky = 0.25  # type: ignore[misc]
    assert dataclasses.replace(PROTOCOLS["mfec2016"]) == PROTOCOLS["mfec2016"]
    assert hash(PROTOCOLS["mfec2016"]) != hash(PROTOCOLS["nature2015"])


def test_evaluation_has_its_own_time_limit_and_no_life_loss():
    evaluation = PROTOCOLS["nature2015"].for_evaluation()
    assert (evaluation.max_episode_frames, evaluation.life_loss, evaluation.name) == (18_000, False, "nature2015")


@pytest.mark.parametrize(
    ("knob", "value"),
    [
        ("sticky", -0.1),
        ("sticky", 1.1),
        ("evaluation_epsilon", 2.0),
        ("noop_max", 0),
        ("frame_skip", 0),
        ("max_episode_frames", 0),
        ("max_episode_frames", 102),
        ("evaluation_max_frames", 1),
        ("score", "best"),
    ],
)
def test_bad_knobs(knob, value):
    with pytest.raises(UserError, match=f"protocol mfec2016: {knob} must .*got {value}"):
        dataclasses.replace(PROTOCOLS["mfec2016"], **{knob: value})


def test_protocols_are_known_without_ale():
    code = "import sys, envs.protocols; assert 'ale_py' not in sys.modules and 'gymnasium' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
