"""The scripted agent: the words of a script to the letter, from the first in every episode."""

import pytest
import torch

from agents.scripted import ScriptedAgent, script
from envs.api import Spec, Step, UserError

NAMES = ("NOOP", "UP", "UPFIRE")
SPEC = Spec("Toy", 3, NAMES, (1, 2, 2), 1)


def test_scripts_by_hand():
    assert script("up*3 NOOP UpFire*2", NAMES) == [1, 1, 1, 0, 2, 2]
    assert script(" NOOP ", NAMES) == [0]


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "tells no action"),
        ("DOWN", "no action DOWN; there are NOOP, UP, UPFIRE"),
        ("UP*0", r"UP\*0 is not"),
        ("UP*", r"UP\* is not"),
        ("UP*-1", "is not"),
        ("UP*1.5", "is not"),
        ("UP*2*2", "is not"),
        ("UP*999999", "at most 100,000"),
    ],
)
def test_other_words_are_refused(text, match):
    with pytest.raises(UserError, match=match):
        script(text, NAMES)


def test_every_episode_begins_the_script_anew():
    agent = ScriptedAgent(SPEC, torch.device("cpu"), "UP*2 NOOP UPFIRE")
    carry, played = agent.initial(2), []
    ends = [(True, True), (False, False), (False, True), (False, False), (False, False), (False, False)]
    for last in ends:
        obs = torch.zeros(2, 1, 2, 2, dtype=torch.uint8)
        step = Step(obs, torch.zeros(2), torch.ones(2), torch.tensor(last), obs)
        before = carry.clone()
        decision = agent.act(step, carry, explore=True)
        assert torch.equal(carry, before)
        played.append(decision.action.tolist())
        carry = decision.carry
    assert [row[0] for row in played] == [1, 1, 0, 2, 1, 1]
    assert [row[1] for row in played] == [1, 1, 1, 1, 0, 2]
