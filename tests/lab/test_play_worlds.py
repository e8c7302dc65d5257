"""job=play: which keys are which actions, what a tab is sent, and worlds of one lane."""

import pytest
import torch
from playing import settings

from envs.api import UserError
from lab.play_keys import all_keys, chords, chosen, resting, words
from lab.play_picture import message, unpack
from lab.play_worlds import kind_of, same_view
from lab.run import make_env

CPU = torch.device("cpu")
ATARI = ("NOOP", "FIRE", "UP", "RIGHT", "LEFT", "DOWN", "UPRIGHT", "UPRIGHTFIRE")
MAZE = ("MOVE_LEFT", "MOVE_RIGHT", "TURN_LEFT", "TURN_RIGHT", "FORWARD", "BACKWARD", "FORWARD_TURN_LEFT", "FORWARD_TURN_RIGHT")
LEFT, RIGHT, UP, FIRE = "ArrowLeft", "ArrowRight", "ArrowUp", "Space"


# keys


def test_names_of_actions_become_keys():
    assert chords(ATARI) == [
        frozenset(chord) for chord in ((), (FIRE,), (UP,), (RIGHT,), (LEFT,), ("ArrowDown",), (UP, RIGHT), (UP, RIGHT, FIRE))
    ]
    assert chords(MAZE)[:3] == [frozenset({"KeyA"}), frozenset({"KeyD"}), frozenset({LEFT})]
    assert chords(MAZE)[6:] == [frozenset({UP, LEFT}), frozenset({UP, RIGHT})]
    assert [words(name) for name in ("UPRIGHTFIRE", "FORWARD_TURN_LEFT", "JUMP_HIGH")] == [
        "up right fire",
        "forward turn left",
        "jump high",
    ]


def test_strange_names_and_keys_that_are_taken_become_digits():
    assert chords(("JUMP", "LEFT", "TURN_LEFT", "UPSIDE")) == [
        frozenset({"Digit1"}),
        frozenset({LEFT}),
        frozenset({"Digit3"}),
        frozenset({"Digit4"}),
    ]
    many = chords([f"THING{index}" for index in range(11)])
    assert many[9] == frozenset({"Digit0"})
    assert many[10] is None
    assert all_keys(many)[:2] == ["Digit0", "Digit1"]
    assert all_keys(chords((*ATARI, "MOVE_LEFT"))) == [UP, "ArrowDown", LEFT, RIGHT, "KeyA", FIRE]


def test_the_action_of_most_keys_is_chosen_then_that_of_the_latest():
    known = chords(ATARI)
    assert resting(known) == 0
    assert chosen(known, []) is None
    assert chosen(known, ["KeyQ"]) is None
    assert ATARI[chosen(known, [LEFT, RIGHT])] == "RIGHT"
    assert ATARI[chosen(known, [RIGHT, LEFT])] == "LEFT"
    assert ATARI[chosen(known, [FIRE, UP, RIGHT])] == "UPRIGHTFIRE"
    assert ATARI[chosen(known, [LEFT, FIRE])] == "FIRE"
    assert resting(chords(MAZE)) is None
    for latest in ("LEFT", "RIGHT"):
        held = [UP, *sorted([LEFT, RIGHT], key=lambda key, latest=latest: key.upper().endswith(latest))]
        assert MAZE[chosen(chords(MAZE), held)] == f"FORWARD_TURN_{latest}"


# pictures


def test_a_message_holds_numbers_and_pixels_channels_last():
    picture = torch.arange(12, dtype=torch.uint8).view(3, 2, 2)
    facts, pictures = unpack(message({"step": 3}, {"truth": picture, "grey": torch.full((1, 1, 3), 7, dtype=torch.uint8)}))
    assert facts["step"] == 3
    assert facts["pictures"][0] == {"name": "truth", "height": 2, "width": 2, "channels": 3}
    assert list(pictures["truth"]) == [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]
    assert list(pictures["grey"]) == [7, 7, 7]


# worlds


def test_atari_is_lane_0_of_the_vector_environment_in_every_view():
    grey = settings("env=Breakout", "protocol=machado2018")
    views = [grey, {**grey, "env": {**grey["env"], "obs": "rgb64"}}]
    kind = kind_of(views)
    envs = [make_env(view, 1, CPU) for view in views]
    world = kind.make(seed=5)
    steps, seen = [env.reset(5) for env in envs], world.open()
    assert (kind.beside, kind.steps_per_second) == ("screen", 15)
    rewards = 0.0
    for t in range(120):
        assert not seen.last
        assert all(torch.equal(step.obs, obs) for step, obs in zip(steps, seen.obs))
        assert seen.beside.shape == (210, 160, 3)
        action = (1, 2, 3)[t % 3]
        steps, seen = [env.step(torch.tensor([action])) for env in envs], world.step(action)
        assert seen.reward == float(steps[0].reward)
        rewards += seen.reward
    assert rewards > 0
    world.close()
    for env in envs:
        env.close()


def test_a_lane_stays_at_its_episodes_end_until_the_next_is_opened():
    kind = kind_of([settings("env=Catch", "env.size=4")])
    world, twin = kind.make(0), kind.make(0)
    assert torch.equal(world.open().obs[0], twin.open().obs[0])
    openings = set()
    for _ in range(20):
        first = world.open()
        openings.add(int(first.obs[0][0, 0, 0].argmax()))
        assert (first.last, first.reward, first.discount) == (False, 0.0, 1.0)
        steps = [world.step(1) for _ in range(3)]
        assert [step.last for step in steps] == [False, False, True]
        assert steps[-1].discount == 0
        assert int(steps[-1].obs[0][0, 0, :3].sum()) == 0  # the ball has landed: the end's own picture, not the next one's
    assert len(openings) > 1


def test_a_maze_keeps_the_map_of_its_end(monkeypatch):
    kind = kind_of([settings("env=ShortDoubleTMaze")])
    world = kind.make(0)
    assert (kind.beside, kind.steps_per_second) == ("map", 15)
    first = world.open().beside
    assert first.shape == (84, 84, 3)
    assert any((world.step(3).beside != first).any() for _ in range(4))  # it turns
    before = world.step(3).beside
    step = world._env.step
    monkeypatch.setattr(world._env, "step", lambda action: step(action)._replace(last=torch.tensor([True])))
    assert world.step(3).beside is before
    world.close()


def test_views_of_one_world_and_other_worlds():
    grey = settings("env=Pong")
    colour, threads = ({**grey, "env": {**grey["env"], **knobs}} for knobs in ({"obs": "rgb64"}, {"num_threads": 3, "backend": "envpool"}))
    assert same_view(grey, threads)
    assert not same_view(grey, colour)
    for other, why in (
        ({**grey, "env": {**grey["env"], "game": "Qbert"}}, "game is Pong in one, Qbert in another"),
        ({**grey, "protocol": {"name": "machado2018"}}, "differ in sticky"),
        (settings("env=Catch"), "env."),
    ):
        with pytest.raises(UserError, match=why):
            kind_of([grey, other])
    with pytest.raises(UserError, match="size is 5 in one, 7 in another"):
        kind_of([settings("env=Catch", "env.size=5"), settings("env=Catch")])
