"""A tab of job=play without a network: a world, the simulator beside it, and what the tab may say."""

import itertools
import json

import pytest
import torch
from playing import ExactChain, stage

from agents.random import RandomAgent
from envs.api import UserError
from envs.toy import Catch
from generative.last_frame import LastFrame
from generative.rollouts import psnr, squared_error
from lab.play_picture import unpack
from lab.play_session import Session
from lab.play_stage import Player

CPU = torch.device("cpu")
MAZE = ("MOVE_LEFT", "MOVE_RIGHT", "TURN_LEFT", "TURN_RIGHT", "FORWARD", "BACKWARD", "FORWARD_TURN_LEFT", "FORWARD_TURN_RIGHT")
LEFT, RIGHT = "ArrowLeft", "ArrowRight"


def shown(session):
    return unpack(session.show())[0]


def press(session, *keys):
    session.do({"keys": list(keys)})


def walk(session, *moves):
    """Steps a corridor by keys: -1 left, 1 right. Returns what is shown after each."""
    seen = []
    for move in moves:
        press(session, LEFT if move < 0 else RIGHT)
        session.advance()
        press(session)
        seen.append(shown(session))
    return seen


def test_an_exact_simulator_never_differs_and_ends_with_the_world():
    session = Session(stage("env=Chain", "env.length=5", simulators=[ExactChain(5, context_frames=2)]), 0)
    looking = shown(session)["simulator"]
    assert (looking["ahead"], looking["known"], looking["needs"]) == (None, 1, 2)
    seen = walk(session, 1, 1, -1, 1, 1)
    assert [one["simulator"]["ahead"] for one in seen] == [0, 1, 2, 3, 4]
    assert [one["simulator"]["psnr"] for one in seen] == [None, 100.0, 100.0, 100.0, 100.0]
    assert [one["over"] for one in seen] == [False] * 5
    (end,) = walk(session, 1)
    assert (end["last"], end["over"], end["simulator"]["over"], end["return"], end["simulator"]["return"]) == (True, True, True, 1.0, 1.0)
    assert walk(session, -1)[0]["step"] == 6  # nothing moves any more
    session.do({"do": "reset"})
    begun = shown(session)
    assert (begun["episode"], begun["step"], begun["return"], begun["over"], begun["simulator"]["ahead"]) == (2, 0, 0.0, False, None)


def test_the_meter_is_the_psnr_of_what_was_foretold():
    session = Session(stage("env=Chain", simulators=[LastFrame((1, 3, 3), 2, CPU)]), 0)
    truth = session.seen.obs[0][0]
    (seen,) = walk(session, 1)
    assert seen["simulator"]["psnr"] == pytest.approx(float(psnr(squared_error(truth, session.seen.obs[0][0]))))
    assert seen["simulator"]["psnr"] == pytest.approx(6.532, abs=1e-3)  # 2 of 9 cells differ by all: -10 log10(2 / 9)
    assert walk(session, -1)[0]["simulator"]["psnr"] == 100.0


def test_the_truth_is_shown_with_all_that_led_to_it():
    simulator = ExactChain(context_frames=3)
    session = Session(stage("env=Chain", simulators=[simulator]), 0)
    frames = [session.seen.obs[0]]
    for move in (1, 1, -1, 1):
        walk(session, move)
        frames.append(session.seen.obs[0])
    session.do({"do": "sync"})
    first, second = simulator.shown
    assert torch.equal(first.frames, torch.stack(frames[:3], 1))
    assert first.actions.tolist() == [[1, 1]]
    assert torch.equal(second.frames, torch.stack(frames[2:], 1))
    assert second.actions.tolist() == [[0, 1]]
    for clip in (first, second):
        assert (clip.rewards.tolist(), clip.discounts.tolist(), clip.last.tolist()) == ([[0.0, 0.0]], [[1.0, 1.0]], [[False, False]])
    assert shown(session)["simulator"]["ahead"] == 0


def test_sync_before_all_frames_are_known_shows_what_there_is():
    simulator = ExactChain(context_frames=4)
    session = Session(stage("env=Chain", simulators=[simulator]), 0)
    walk(session, 1)
    session.do({"do": "sync"})
    assert tuple(simulator.shown[0].frames.shape[:2]) == (1, 2)
    assert walk(session, 1)[0]["simulator"]["psnr"] == 100.0


def test_sync_every_so_many_steps():
    simulator = ExactChain()
    session = Session(stage("env=Chain", "env.max_steps=0", simulators=[simulator]), 0)
    session.do({"sync_every": 3})
    seen = walk(session, *[1, -1] * 4)
    assert [one["simulator"]["ahead"] for one in seen] == [1, 2, 0, 1, 2, 0, 1, 2]
    assert len(simulator.shown) == 3
    assert seen[2]["simulator"]["psnr"] == 100.0  # of the third prediction, which is shown before it is forgotten


def test_a_simulator_that_ends_too_early_waits_for_the_truth():
    session = Session(stage("env=Chain", simulators=[ExactChain(ends_at=2)]), 0)
    seen = walk(session, 1, 1)
    assert [one["over"] for one in seen] == [False, True]
    assert (seen[1]["last"], seen[1]["simulator"]["over"], seen[1]["running"]) == (False, True, False)
    assert walk(session, 1)[0]["step"] == 2
    session.do({"do": "sync"})
    assert walk(session, 1)[0]["step"] == 3
    session.do({"do": "reset"})
    session.do({"goes_on": True})  # then the world does not wait
    seen = walk(session, 1, 1, 1)
    assert [one["simulator"]["over"] for one in seen] == [False, True, True]
    assert seen[2]["step"] == 3
    session.do({"sync_every": 4})
    assert [one["simulator"]["over"] for one in walk(session, 1, 1)] == [False, False]
    for word in ({"goes_on": False}, {"sync_every": 2}, {"do": "reset"}):
        session.do(word)
    assert [one["over"] for one in walk(session, 1, 1)] == [False, True]  # what it says is shown, though the truth is due


def test_foretold_rewards_add_up_through_the_truth_but_not_into_another_episode():
    class Paying(ExactChain):
        def step(self, state, action):
            state, frame, _, discount = super().step(state, action)
            return state, frame, torch.tensor([0.5]), discount

    session = Session(stage("env=Chain", simulators=[Paying(), Paying()]), 0)
    session.do({"sync_every": 2})
    assert [one["simulator"]["return"] for one in walk(session, 1, 1, 1)] == [0.5, 1.0, 1.5]
    session.do({"do": "sync"})
    assert [one["simulator"]["return"] for one in walk(session, 1)] == [2.0]
    session.do({"simulator": 1})
    assert [one["simulator"]["return"] for one in walk(session, 1)] == [0.5]
    session.do({"do": "reset"})
    assert [one["simulator"]["return"] for one in walk(session, 1)] == [0.5]


def test_numbers_that_are_not_finite_are_told_as_none():
    class Lost(ExactChain):
        def step(self, state, action):
            state, frame, _, discount = super().step(state, action)
            return state, frame, torch.tensor([float("nan")]), discount * float("nan")

    (seen,) = walk(Session(stage("env=Chain", simulators=[Lost()]), 0), 1)
    assert [seen["simulator"][name] for name in ("reward", "return", "discount")] == [None] * 3
    assert not seen["over"]


def test_where_a_lost_life_is_an_end_to_the_simulator_play_goes_on():
    session = Session(stage("env=Chain", simulators=[ExactChain(ends_at=2)], lives_end=True), 0)
    seen = walk(session, 1, 1, 1)
    assert [one["simulator"]["lost_life"] for one in seen] == [False, True, False]
    assert not any(one["over"] for one in seen)


def test_the_next_episode_opens_by_itself_after_a_rest():
    session = Session(stage("env=Chain", "env.length=4"), 0, rate=4)
    session.do({"goes_on": True})
    walk(session, 1, 1, 1)
    assert session.running
    for _ in range(5):
        session.advance()
    assert shown(session)["episode"] == 1
    session.advance()
    assert shown(session)["episode"] == 2


def test_a_world_without_a_resting_action_waits_for_a_key_and_others_do_not():
    waits, rests = Session(stage("env=Chain"), 0), Session(stage("env=Catch"), 0)
    assert (waits.running, rests.running) == (False, True)
    press(waits, RIGHT)
    assert waits.running
    press(waits)
    assert waits.running  # a key that went down and up is not lost
    waits.advance()
    assert (waits.running, shown(waits)["action"]) == (False, 1)
    rests.advance()
    assert rests.hello()["actions"][shown(rests)["action"]]["name"] == "STAY"
    rests.do({"paused": True})
    assert not rests.running


def test_single_steps_pause():
    session = Session(stage("env=Catch"), 0)
    session.do({"do": "step"})
    assert (shown(session)["step"], session.paused, session.running) == (1, True, False)
    press(session, LEFT)
    session.do({"do": "step"})
    assert (shown(session)["step"], shown(session)["action"]) == (2, 0)
    for _ in range(9):
        session.do({"do": "step"})
    assert shown(session)["step"] == 6  # Catch of size 7 is over


def test_switching_goes_on_from_the_truth():
    short, long = ExactChain(context_frames=1), ExactChain(context_frames=3)
    session = Session(stage("env=Chain", simulators=[short, long]), 0)
    walk(session, 1)
    session.do({"simulator": 1})
    assert (shown(session)["simulator"]["ahead"], shown(session)["simulator"]["known"]) == (None, 2)
    seen = walk(session, 1, 1)
    assert [one["simulator"]["ahead"] for one in seen] == [0, 1]
    session.do({"simulator": 0})
    assert short.shown[-1].frames.flatten(2).argmax(2).tolist() == [[3]]
    assert walk(session, 1)[0]["simulator"]["psnr"] == 100.0


def random_player(spec):
    return Player("random", RandomAgent(spec, CPU), 0, CPU, 0.0)


def test_an_agent_plays_and_hands_over():
    spec = Catch(1, CPU).spec
    session = Session(stage("env=Catch", player=random_player(spec)), 0)
    assert session.watching
    assert session.goes_on
    press(session, LEFT)
    actions = set()
    for _ in range(12):
        session.do({"do": "step"})
        actions.add(shown(session)["action"])
        session.do({"do": "reset"})
    assert len(actions) > 1  # not the key's
    session.do({"watching": False})
    session.do({"do": "step"})
    assert shown(session)["action"] == 0


def test_tabs_do_not_disturb_one_another():
    """What a tab's agent does, and what its world draws, is the same whether others play or not."""
    spec = Catch(1, CPU).spec

    def play(session):
        session.advance()
        return shown(session)["action"], session.seen.obs[0].tolist()

    on = stage("env=Catch", player=random_player(spec))
    alone = Session(on, 1)
    expected = [play(alone) for _ in range(30)]
    torch.manual_seed(3)
    first, second = Session(on, 1), Session(on, 2)
    both = [(play(first), play(second)) for _ in range(30)]
    assert [one for one, _ in both] == expected
    assert [other for _, other in both] != expected
    assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(3)))  # nor is who calls


def test_epsilon_is_the_share_of_random_actions():
    spec = Catch(1, CPU).spec

    class Still(RandomAgent):
        def act(self, step, carry, explore):
            return super().act(step, carry, explore)._replace(action=torch.zeros(1, dtype=torch.int64))

    session = Session(stage("env=Chain", "env.max_steps=0", player=Player("still", Still(spec, CPU), 0, CPU, 0.5)), 0)
    actions = []
    for _ in range(400):
        session.advance()
        actions.append(shown(session)["action"] if not shown(session)["over"] else 0)
        if shown(session)["over"]:
            session.do({"do": "reset"})
    assert 0.17 < sum(actions) / 400 < 0.33  # half of a half


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (3, "a tab says"),
        ({}, "a tab says"),
        ({"rate": 5, "do": "reset"}, "a tab says"),
        ({"jump": 1}, "there is no"),
        ({"rate": 0}, "from 1 to 60"),
        ({"rate": 61}, "from 1 to 60"),
        ({"rate": True}, "from 1 to 60"),
        ({"rate": "fast"}, "from 1 to 60"),
        ({"paused": 1}, "true or false"),
        ({"goes_on": None}, "true or false"),
        ({"watching": True}, "trained agent"),
        ({"do": "dance"}, "do is one of"),
        ({"do": ["reset"]}, "do is one of"),
        ({"do": "sync"}, "none here"),
        ({"sync_every": 3}, "none here"),
        ({"simulator": 0}, "none here"),
        ({"keys": "ArrowUp"}, "keys is a list"),
        ({"keys": ["a"] * 17}, "keys is a list"),
        ({"keys": ["a" * 33]}, "keys is a list"),
        ({"keys": [3]}, "keys is a list"),
    ],
)
def test_what_a_tab_says_wrongly_is_one_line_and_changes_nothing(said, why):
    session = Session(stage("env=Chain"), 0)
    before = session.show()
    with pytest.raises(UserError, match=why) as caught:
        session.do(said)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200
    assert session.show() == before


def test_numbers_out_of_the_simulators_range_are_refused():
    session = Session(stage("env=Chain", simulators=[ExactChain()]), 0)
    for said in ({"simulator": 1}, {"simulator": -1}, {"sync_every": -1}, {"sync_every": 101}):
        with pytest.raises(UserError):
            session.do(said)


def test_hello_is_plain_and_names_every_action():
    told = Session(stage("env=Forage", simulators=[]), 0).hello()
    assert json.loads(json.dumps(told)) == told
    assert [action["name"] for action in told["actions"]] == list(MAZE)
    assert told["waits"]
    pairs = itertools.combinations([tuple(action["keys"]) for action in told["actions"]], 2)
    assert all(one != other for one, other in pairs)
