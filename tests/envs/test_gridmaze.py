"""The maze from above: what a perfect maze is, moves by hand, and shortest ways that earn exactly what is optimal."""

import numpy as np
import pytest
import torch

from envs.api import Step, UserError, VectorEnv, check_step
from envs.gridmaze import ACTIONS, AGENT, FLOOR, GOAL, PALETTES, WALL, GridMaze

UP, DOWN, LEFT, RIGHT = range(4)
MAZE = """
#######
#..A#.#
#.###.#
#.....#
#.###.#
#...#G#
#######
"""


def by_hand(env: GridMaze, lane: int = 0) -> None:
    """Puts MAZE into a lane, whose episode goes on."""
    cells = np.array([list(line) for line in MAZE.split()])
    env.lanes.grid[lane] = np.where(cells == "#", WALL, FLOOR)
    for mark, place in (("A", env.lanes.agent), ("G", env.lanes.goal)):
        place[lane] = np.argwhere(cells == mark)[0]


def act(env: GridMaze, *actions: int) -> Step:
    return env.step(torch.tensor(actions))


def play(env: GridMaze, steps: int, seed: int = 0) -> list[Step]:
    generator = torch.Generator().manual_seed(1)
    actions = torch.randint(4, (steps, 16), generator=generator)[:, : env.num_envs]
    return [env.reset(seed), *(env.step(action) for action in actions)]


def cells_of(env: GridMaze, picture: torch.Tensor, colours: str) -> np.ndarray:
    """FLOOR, WALL, GOAL or AGENT of every cell (S, S) of one picture (C, H, W), all of whose pixels must be of one colour."""
    palette = torch.tensor(PALETTES[colours], dtype=torch.uint8)
    zoom = picture.shape[1] // env.size
    kinds = (picture[None] == palette[:, :, None, None]).all(1)
    assert (kinds.sum(0) == 1).all()
    blocks = kinds.int().argmax(0).reshape(env.size, zoom, env.size, zoom).permute(0, 2, 1, 3).flatten(2)
    assert (blocks == blocks[..., :1]).all()
    return blocks[..., 0].numpy()


# Mazes


@pytest.mark.parametrize(
    ("size", "room_steps", "side"),
    [(5, 2, 2), (7, 2, 3), (11, 2, 5), (31, 2, 15), (99, 2, 49), (9, 3, 3), (11, 4, 3), (11, 8, 2), (43, 5, 9)],
)
def test_a_perfect_maze_is_a_tree_over_its_rooms(size, room_steps, side):
    env = GridMaze(8, "cpu", size=size, room_steps=room_steps, pixels_per_cell=1)
    env.reset(0)
    rooms = side**2
    for lane in range(8):
        floor = env.lanes.grid[lane] == FLOOR
        assert floor[1:-1, 1:-1].sum() == floor.sum()  # the border is closed
        assert floor[1::room_steps, 1::room_steps].sum() == rooms
        off = np.arange(size) % room_steps != 1
        assert not floor[np.ix_(off, off)].any()
        assert floor.sum() == rooms + (room_steps - 1) * (rooms - 1)  # every room, and an edge less than rooms: connected, it is a tree
        assert ((env.distances(lane) >= 0) == floor).all()
        assert env.exits(lane).sum() == 2 * (floor.sum() - 1)


def test_longer_corridors_stretch_the_same_maze():
    short, long = GridMaze(20, "cpu", size=9, openings=0.3), GridMaze(20, "cpu", size=18, room_steps=5, openings=0.3, pixels_per_cell=1)
    short.reset(0)
    long.reset(0)
    assert np.array_equal(long.lanes.agent, 1 + (short.lanes.agent - 1) // 2 * 5)
    assert np.array_equal(long.lanes.goal, 1 + (short.lanes.goal - 1) // 2 * 5)
    for lane in range(20):
        assert 2 * len(long.shortest(lane)) == 5 * len(short.shortest(lane))
    assert np.array_equal(long.lanes.grid[:, 3::5, 1::5], short.lanes.grid[:, 2:-1:2, 1::2])
    assert np.array_equal(long.lanes.grid[:, 1::5, 3::5], short.lanes.grid[:, 1::2, 2:-1:2])


def test_openings_open_their_share_of_the_other_walls():
    def walls(openings: float) -> np.ndarray:
        """How many of the (R - 1)^2 walls that a perfect maze of R^2 rooms closes are closed, lane by lane."""
        env = GridMaze(200, "cpu", size=21, openings=openings, pixels_per_cell=1)
        env.reset(0)
        assert all((env.distances(lane)[1::2, 1::2] >= 0).all() for lane in range(0, 200, 20))
        return 81 - ((env.lanes.grid == FLOOR).sum((1, 2)) - 199)

    assert (walls(0.0) == 81).all()
    assert (walls(1.0) == 0).all()
    assert walls(0.25).mean() == pytest.approx(81 * 0.75, abs=1.5)


def test_agent_and_goal_begin_in_different_rooms_everywhere():
    env = GridMaze(3000, "cpu", size=5, pixels_per_cell=1)
    env.reset(0)
    pairs = np.concatenate([env.lanes.agent, env.lanes.goal], 1)
    kinds, counts = np.unique(pairs, axis=0, return_counts=True)
    assert len(kinds) == 4 * 3
    assert counts == pytest.approx([250] * 12, abs=70)
    assert (pairs % 2 == 1).all()
    assert len({env.lanes.grid[lane].tobytes() for lane in range(3000)}) == 4  # a square of four rooms has four spanning trees


def test_exits_tell_dead_ends_corridors_and_junctions():
    env = GridMaze(1, "cpu", size=7)
    env.reset(0)
    by_hand(env)
    assert env.exits(0).tolist() == [
        [0, 0, 0, 0, 0, 0, 0],
        [0, 2, 2, 1, 0, 1, 0],
        [0, 2, 0, 0, 0, 2, 0],
        [0, 3, 2, 2, 2, 3, 0],
        [0, 2, 0, 0, 0, 2, 0],
        [0, 2, 2, 1, 0, 1, 0],
        [0, 0, 0, 0, 0, 0, 0],
    ]


# Steps


def test_moves_and_walls_by_hand():
    env = GridMaze(1, "cpu", size=7)
    env.reset(0)
    by_hand(env)
    for action, place in (
        (UP, [1, 3]),
        (DOWN, [1, 3]),
        (RIGHT, [1, 3]),
        (LEFT, [1, 2]),
        (DOWN, [1, 2]),
        (LEFT, [1, 1]),
        (LEFT, [1, 1]),
        (DOWN, [2, 1]),
        (RIGHT, [2, 1]),
        (UP, [1, 1]),
        (RIGHT, [1, 2]),
    ):
        step = act(env, action)
        assert env.lanes.agent[0].tolist() == place, ACTIONS[action]
        assert step.next_obs is step.obs
        assert cells_of(env, step.obs[0], "rgb")[tuple(place)] == AGENT
    assert env.lanes.clock.tolist() == [11]


def test_the_goal_pays_and_ends_the_episode():
    env = GridMaze(2, "cpu", size=7, step_cost=0.25)
    env.reset(0)
    by_hand(env)
    by_hand(env, 1)
    env.lanes.agent[0] = 3, 5
    env.lanes.clock[1] = 97  # of 98
    one = act(env, DOWN, UP)
    assert one.reward.tolist() == [-0.25, -0.25]
    assert one.last.tolist() == [False, True]  # the time limit: no end
    assert one.discount.tolist() == [1, 1]
    assert cells_of(env, one.next_obs[1], "rgb")[1, 3] == AGENT
    two = act(env, DOWN, UP)
    assert two.reward.tolist() == [0.75, -0.25]
    assert two.last.tolist() == [True, False]
    assert two.discount.tolist() == [0, 1]
    end = cells_of(env, two.next_obs[0], "rgb")
    assert end[5, 5] == AGENT
    assert GOAL not in end
    assert torch.equal(two.obs[1], two.next_obs[1])
    assert env.lanes.clock.tolist() == [0, 1]
    env.lanes.agent[0], env.lanes.goal[0], env.lanes.clock[0] = (1, 1), (1, 2), 97
    env.lanes.grid[0, 1, 2] = FLOOR
    end_at_the_limit = act(env, RIGHT, UP)
    assert end_at_the_limit.last[0]
    assert end_at_the_limit.discount[0] == 0


@pytest.mark.parametrize(("max_steps", "limit"), [(6, 6), (None, 50), (0, 1000)])
def test_time_limits(max_steps, limit):
    env = GridMaze(6, "cpu", size=5, max_steps=max_steps, pixels_per_cell=1)
    env.reset(0)
    env.lanes.grid[:] = WALL  # nobody can move
    for t in range(1, min(limit, 200) + 1):
        step = act(env, *[t % 4] * 6)
        assert step.last.tolist() == [t == limit] * 6
        assert (step.discount == 1).all()


@pytest.mark.parametrize("knobs", [{}, {"openings": 0.3}, {"size": 5}, {"room_steps": 4}, {"size": 31, "openings": 0.1}])
def test_the_shortest_way_earns_exactly_what_is_optimal(knobs):
    env = GridMaze(16, "cpu", step_cost=1 / 64, pixels_per_cell=1, **knobs)
    env.reset(3)
    for episode in range(3):
        expected, discounted = env.optimal_return(), env.optimal_return(0.5)
        ways = [env.shortest(lane) for lane in range(16)]
        assert all(len(way) == env.distances(lane)[tuple(env.lanes.agent[lane])] >= 2 for lane, way in enumerate(ways))
        earned, weighed, longest = torch.zeros(16).double(), torch.zeros(16).double(), max(map(len, ways))
        going = torch.ones(16, dtype=torch.bool)
        for t in range(longest):
            step = act(env, *(int(way[t]) if t < len(way) else UP for way in ways))
            earned += torch.where(going, step.reward, 0)
            weighed += torch.where(going, 0.5**t * step.reward, 0)
            going &= ~step.last
            assert (~going).tolist() == [len(way) <= t + 1 for way in ways]
        assert torch.equal(earned, expected)  # sixty-fourths are exact
        assert torch.allclose(weighed, discounted, rtol=0, atol=1e-12)
        env.reset(episode)


def test_optimal_return_is_the_fixed_point_of_bellmans_equation():
    env, gamma = GridMaze(1, "cpu", size=7, openings=0.3), 0.9
    env.reset(0)
    (row, column), floor, values = env.lanes.goal[0], env.lanes.grid[0] == FLOOR, np.zeros((7, 7))
    for _ in range(200):
        best = np.full((7, 7), -np.inf)
        for down, right in ((-1, 0), (1, 0), (0, -1), (0, 1)):
            after = np.roll(np.where(floor, values, -np.inf), (-down, -right), (0, 1))
            ends = np.roll(env.distances(0) == 0, (-down, -right), (0, 1))
            best = np.maximum(best, np.where(ends, 1.0, gamma * after) - 0.01)
        values = np.where(floor, best, 0)
        values[row, column] = 0
    for place in np.argwhere(floor):
        if tuple(place) != (row, column):
            env.lanes.agent[0] = place
            assert float(env.optimal_return(gamma)) == pytest.approx(values[tuple(place)])


def test_random_play_never_meets_what_cannot_be():
    env = GridMaze(16, "cpu", size=9, room_steps=3, openings=0.2, goal_moves=0.1, max_steps=40, pixels_per_cell=1)
    lanes = np.arange(16)
    play(env, 1)
    for _ in range(400):
        env.step(torch.randint(4, (16,)))
        assert (env.lanes.grid[lanes, *env.lanes.agent.T] == FLOOR).all()
        assert (env.lanes.goal % 3 == 1).all()
        assert (env.lanes.agent != env.lanes.goal).any(1).all()
        assert (env.lanes.clock < 40).all()
        assert (env.optimal_return() < 1).all()
        assert min(len(env.shortest(lane)) for lane in range(16)) >= 1


def test_a_goal_that_moves_goes_to_another_room_at_its_rate():
    env = GridMaze(500, "cpu", size=11, goal_moves=0.25, pixels_per_cell=1)
    env.reset(0)
    moved, steps = 0, 0
    for _ in range(20):
        before = env.lanes.goal.copy()
        step = env.step(torch.randint(4, (500,)))
        going = ~step.last.numpy()
        moved += int((env.lanes.goal != before).any(1)[going].sum())
        steps += int(going.sum())
    assert moved / steps == pytest.approx(0.25, abs=0.02)
    always = GridMaze(50, "cpu", size=5, goal_moves=1.0)
    always.reset(0)
    before = always.lanes.goal.copy()
    step = always.step(torch.randint(4, (50,)))
    assert (always.lanes.goal != before).any(1)[~step.last.numpy()].all()
    for lane in range(50):
        assert cells_of(always, step.obs[lane], "rgb")[tuple(always.lanes.goal[lane])] == GOAL


# The contract


@pytest.mark.parametrize("colours", ["rgb", "grey"])
@pytest.mark.parametrize("pixels_per_cell", [1, 3])
def test_contract_and_pictures(colours, pixels_per_cell):
    env = GridMaze(5, "cpu", size=7, colours=colours, pixels_per_cell=pixels_per_cell)
    assert isinstance(env, VectorEnv)
    assert env.spec.obs_shape == ({"rgb": 3, "grey": 1}[colours], 7 * pixels_per_cell, 7 * pixels_per_cell)
    assert env.spec.frames_per_step == 1
    ended = 0
    for t, step in enumerate(play(env, 250)):
        check_step(step, env.spec)
        assert step.obs.is_contiguous()
        assert (step.next_obs is step.obs) == (t == 0 or not step.last.any())
        ended += int(step.last.sum())
        if t % 50 == 0:
            fresh = play(env, t)[-1]
            assert torch.equal(fresh.obs, step.obs)
            for lane in range(5):
                cells = cells_of(env, fresh.obs[lane], colours)
                assert ((cells == WALL) == (env.lanes.grid[lane] == WALL)).all()
                assert np.argwhere(cells == AGENT).tolist() == [env.lanes.agent[lane].tolist()]
                assert np.argwhere(cells == GOAL).tolist() == [env.lanes.goal[lane].tolist()]
    assert ended > 10


def test_the_default_picture_has_a_patch_of_the_torso_for_every_cell():
    env = GridMaze(2, "cpu")
    assert env.spec.obs_shape == (3, 44, 44)
    assert env.spec.action_names == ("UP", "DOWN", "LEFT", "RIGHT")
    assert not hasattr(env, "overview")  # films show a map beside the view where there is one; here the view is the map


def test_all_follows_from_the_seed_and_nothing_is_written_again():
    knobs = {"size": 7, "openings": 0.2, "goal_moves": 0.05}
    env = GridMaze(6, "cpu", **knobs)
    shown = play(env, 150)
    kept = [Step(*(tensor.clone() for tensor in step)) for step in shown]
    torch.rand(3)
    again = play(GridMaze(6, "cpu", **knobs), 150)
    env.reset(1)
    env.close()
    assert sum(int(step.last.sum()) for step in shown) > 12
    for one, copy, two in zip(shown, kept, again):
        assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(one, copy, two))
    assert not torch.equal(GridMaze(6, "cpu").reset(0).obs, GridMaze(6, "cpu").reset(1).obs)


def test_lanes_do_not_depend_on_one_another():
    few, many = (play(GridMaze(count, "cpu", size=7, goal_moves=0.05), 150) for count in (3, 16))
    assert any(step.last[:3].any() for step in few[1:])
    for one, two in zip(few, many):
        assert all(torch.equal(a, b[:3]) for a, b in zip(one, two))
    assert len({picture.numpy().tobytes() for picture in many[0].obs}) == 16


def test_a_lanes_mazes_follow_from_its_seed_whoever_walks_them():
    def second_maze(walked: bool) -> np.ndarray:
        env = GridMaze(1, "cpu", size=7)
        env.reset(5)
        first = env.lanes.grid.copy()
        for action in env.shortest(0) if walked else [UP] * 98:
            step = act(env, int(action))
        assert step.last
        assert not np.array_equal(first, env.lanes.grid)
        return env.lanes.grid

    assert np.array_equal(second_maze(walked=True), second_maze(walked=False))


def test_order_of_calls():
    env = GridMaze(2, "cpu")
    with pytest.raises(RuntimeError, match="send comes after"):
        act(env, 0, 0)
    with pytest.raises(RuntimeError, match="reset"):
        env.shortest(0)
    first = env.reset(0)
    with pytest.raises(RuntimeError, match="recv comes after"):
        env.recv()
    for wrong in ((0, 4), (-1, 0), (0,)):
        with pytest.raises(ValueError, match="actions must"):
            act(env, *wrong)
    action = torch.tensor([0, 0])
    env.send(action)
    action.fill_(9)  # it was taken over
    with pytest.raises(RuntimeError, match="send comes after"):
        act(env, 0, 0)
    env.recv()
    env.send(torch.tensor([0, 0]))
    assert torch.equal(env.reset(0).obs, first.obs)  # drains
    act(env, 0, 0)
    env.close()
    env.close()


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"num_envs": 0}, "num_envs"),
        ({"size": 3}, r"size must lie in 5\.\.99"),
        ({"size": 10}, "3 more than a multiple of room_steps, 2, such as 9, got 10"),
        ({"size": 11, "room_steps": 3}, "3 more than a multiple of room_steps, 3, such as 9, got 11"),
        ({"room_steps": 1}, r"room_steps must lie in 2\.\.8 for size 11, got 1"),
        ({"room_steps": 9}, r"room_steps must lie in 2\.\.8"),
        ({"max_steps": 31, "room_steps": 4}, "at least 32"),
        ({"size": 101}, r"5\.\.99"),
        ({"openings": -0.1}, "openings is a chance"),
        ({"openings": float("nan")}, "openings is a chance"),
        ({"goal_moves": 1.5}, "goal_moves is a chance"),
        ({"step_cost": -1.0}, "step_cost"),
        ({"step_cost": float("inf")}, "step_cost"),
        ({"max_steps": -1}, "max_steps"),
        ({"max_steps": 47}, "for size 11, at least 48"),
        ({"colours": "blue"}, "colours is one of"),
        ({"pixels_per_cell": 0}, "pixels_per_cell"),
        ({"pixels_per_cell": 94}, r"1\.\.93"),
    ],
)
def test_bad_knobs_are_refused_in_one_line(knobs, words):
    with pytest.raises(UserError, match=words) as caught:
        GridMaze(**{"num_envs": 2, "device": "cpu"} | knobs)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_shows_what_the_host_shows():
    host, card = (GridMaze(4, device, size=7) for device in ("cpu", "cuda"))
    for one, two in zip(play(host, 120), play(card, 120)):
        assert all(torch.equal(a, b.cpu()) for a, b in zip(one, two))
        assert (two.next_obs is two.obs) == (one.next_obs is one.obs)
