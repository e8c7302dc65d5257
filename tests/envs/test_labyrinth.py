"""Labyrinths: bodies that walls stop, rules that levels write down, pictures that a slow tracer of single rays agrees with."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from small_levels import NAMES, ROOM, written

from envs.api import check_step
from envs.labyrinth import raycast, textures
from envs.labyrinth.level import LEVELS
from envs.labyrinth.overview import overview
from envs.labyrinth.physics import ACTIONS, BODY, FRAMES_PER_STEP, REACH, TURN, WALK
from envs.labyrinth.textures import LOOKS, SHADES, SIDE, SKY_COLUMNS, THINGS
from envs.labyrinth.world import Labyrinth

ROOT = Path(__file__).parent.parent.parent


def act(env, name, times=1):
    for _ in range(times):
        step = env.step(torch.full((env.num_envs,), ACTIONS.index(name)))
    return step


def place(env, x, y, angle, lane=0):
    env.lanes.pose[lane] = x, y, math.radians(angle)


# Bodies


def test_actions_move_and_turn_by_what_they_say(tmp_path):
    env = written(tmp_path, ROOM)
    env.reset(0)
    step, turn = FRAMES_PER_STEP * WALK, FRAMES_PER_STEP * TURN
    for name, dx, dy, angle in (
        ("FORWARD", step, 0, 0),
        ("BACKWARD", -step, 0, 0),
        ("MOVE_LEFT", 0, -step, 0),  # y grows down the map: facing right, left is up
        ("MOVE_RIGHT", 0, step, 0),
        ("TURN_LEFT", 0, 0, -turn),
        ("TURN_RIGHT", 0, 0, turn),
    ):
        place(env, 3.5, 2.5, 0)
        act(env, name)
        x, y, facing = env.lanes.pose[0]
        assert (x, y) == pytest.approx((3.5 + dx, 2.5 + dy)), name
        assert (facing + math.pi) % (2 * math.pi) - math.pi == pytest.approx(angle), name
    place(env, 3.5, 2.5, 0)
    act(env, "FORWARD_TURN_RIGHT")
    angles = TURN * np.arange(1, FRAMES_PER_STEP + 1)
    assert env.lanes.pose[0, :2] == pytest.approx([3.5 + WALK * np.cos(angles).sum(), 2.5 + WALK * np.sin(angles).sum()])


def test_walls_stop_the_body_and_let_it_slide(tmp_path):
    env = written(tmp_path, ROOM)
    env.reset(0)
    for angle, axis, wall in ((0, 0, 6 - BODY), (90, 1, 4 - BODY), (180, 0, 1 + BODY), (270, 1, 1 + BODY)):
        place(env, 3.5, 2.5, angle)
        act(env, "FORWARD", 30)
        assert env.lanes.pose[0, axis] == pytest.approx(wall, abs=1e-4)
        env.reset(0)
    place(env, 3.5, 4 - BODY - 1e-5, 30)  # along the lower wall
    act(env, "FORWARD", 5)
    assert env.lanes.pose[0, 0] == pytest.approx(3.5 + 5 * FRAMES_PER_STEP * WALK * math.cos(math.radians(30)))


def test_a_body_gathers_speed_and_keeps_a_share_of_it(tmp_path):
    env = written(tmp_path, ROOM.replace("walk_inertia = 0", "walk_inertia = 0.9").replace("turn_inertia = 0", "turn_inertia = 0.5"))
    env.reset(0)
    place(env, 2.5, 2.5, 0)
    act(env, "FORWARD", 3)
    frames = np.arange(1, 13)
    assert env.lanes.speed[0, 0] == pytest.approx(WALK * (1 - 0.9**12))
    assert env.lanes.pose[0] == pytest.approx([2.5 + WALK * (1 - 0.9**frames).sum(), 2.5, 0])
    here = env.lanes.pose[0, 0]
    act(env, "TURN_RIGHT")  # which glides on where it went, and not where it looks
    assert env.lanes.pose[0, :2] == pytest.approx([here + WALK * (1 - 0.9**12) * (0.9 ** frames[:4]).sum(), 2.5])
    assert env.lanes.pose[0, 2] == pytest.approx(TURN * (1 - 0.5 ** frames[:4]).sum())
    turned = env.lanes.pose[0, 2]
    act(env, "MOVE_LEFT")
    assert env.lanes.pose[0, 2] == pytest.approx(turned + TURN * (1 - 0.5**4) * (0.5 ** frames[:4]).sum())
    place(env, 6 - BODY - 0.01, 2.5, 0)
    act(env, "FORWARD", 5)
    assert env.lanes.speed[0, 0] == 0  # the wall has taken it
    act(env, "BACKWARD")
    assert env.lanes.speed[0, 0] == pytest.approx(-WALK * (1 - 0.9**4), rel=1e-4)  # it still turns a little
    env.reset(0)
    assert not env.lanes.speed.any()


def test_who_is_taken_back_to_the_start_stands_still():
    env = Labyrinth(1, "cpu", "ShortDoubleTMaze", height=8, width=8)
    env.reset(0)
    act(env, "FORWARD", 3)
    x, y = env.lanes.places[0][env.lanes.kinds[0] == 0][0]
    env.lanes.pose[0, :2] = x, y
    act(env, "TURN_LEFT")  # the apple is taken in its first frame
    assert env.lanes.speed[0] == pytest.approx([0, 0, -TURN * (1 - 0.8**3)])


@pytest.mark.parametrize("level", NAMES)
def test_nobody_ever_stands_in_a_wall(level):
    env = Labyrinth(8, "cpu", level, height=8, width=8)
    env.reset(1)
    torch.manual_seed(0)
    actions = torch.randint(len(ACTIONS), (40, 8)).repeat_interleave(20, 0)  # long runs into walls and corners
    for action in actions:
        env.step(action)
        x, y = env.lanes.pose[:, 0], env.lanes.pose[:, 1]
        for dx in (-BODY, BODY):
            for dy in (-BODY, BODY):
                cells = env.lanes.grid[np.arange(8), (y + dy).astype(int), (x + dx).astype(int)]
                assert not cells.any()


# Rules


def test_an_episode_ends_with_its_clock_and_the_next_begins():
    env = Labyrinth(3, "cpu", "Forage", height=8, width=8)
    step = env.reset(0)
    check_step(step, env.spec)
    for t in range(1, 902):
        step = env.step(torch.full((3,), t % 8))
        check_step(step, env.spec)
        assert step.last.tolist() == [t == 900] * 3, t
        assert step.discount.tolist() == [float(t != 900)] * 3
        assert (step.next_obs is step.obs) == (t != 900)
    assert env.lanes.clock.tolist() == [FRAMES_PER_STEP] * 3


@pytest.mark.parametrize("level", ["DoubleTMaze", "ShortDoubleTMaze"])
def test_the_colours_tell_where_the_apple_lies(level):
    env = Labyrinth(64, "cpu", level, height=8, width=8)
    env.reset(0)
    columns = env.lanes.grid.shape[2]
    red, middle = LOOKS.index("red") + 1, columns // 2
    ends = set()
    for lane in range(64):
        kinds, places = env.lanes.kinds[lane], env.lanes.places[lane]
        assert sorted(kinds.tolist()) == [-1] * 3 + [0] + [1] * 3  # three walls that are drawn, an apple, three lemons
        (x, y), grid = places[kinds == THINGS.index("apple")][0], env.lanes.grid[lane]
        junction = np.argwhere(grid[:, 0] > len(LOOKS[:4]))[0, 0]  # the row of the arms, closed by coloured walls
        first, second = grid[junction - 1, middle] == red, grid[junction, 0] == red
        assert first == (x < middle)  # walking up, left is where x is small
        left = y > junction if x < middle else y < junction
        assert second == left
        ends.add((int(x), int(y)))
    assert len(ends) == 4


def test_the_apple_of_a_double_t_takes_back_to_the_start_and_lemons_go():
    env = Labyrinth(1, "cpu", "ShortDoubleTMaze", height=8, width=8)
    env.reset(0)
    apple = env.lanes.places[0][env.lanes.kinds[0] == 0][0].copy()
    lemon = env.lanes.places[0][env.lanes.kinds[0] == 1][0].copy()
    start = env.lanes.pose[0].copy()
    place(env, *lemon, 0)
    assert act(env, "TURN_LEFT").reward.tolist() == [-1.0]
    assert act(env, "TURN_LEFT").reward.tolist() == [0.0]
    place(env, *apple, 0)
    assert act(env, "FORWARD").reward.tolist() == [1.0]
    assert sorted(env.lanes.kinds[0].tolist()) == [-1] * 3 + [0] + [1] * 3  # drawn anew, with three lemons
    moved = env.lanes.pose[0, :2] - start[:2]
    assert np.abs(moved).max() < FRAMES_PER_STEP * WALK  # what was left of the step


def test_what_grows_elsewhere_lies_on_free_floor():
    env = Labyrinth(4, "cpu", "ForageAndAvoid", height=8, width=8)
    env.reset(0)
    for _ in range(300):
        kinds = env.lanes.kinds.copy()
        for lane in range(4):
            place(env, *env.lanes.places[lane, 5], 0, lane)  # an apple
        assert env.step(torch.full((4,), 2)).reward.tolist() == [1.0] * 4
        assert np.array_equal(env.lanes.kinds, kinds)
        for lane in range(4):
            cells = [(int(y), int(x)) for x, y in env.lanes.places[lane]]
            assert len(set(cells)) == len(cells)
            assert not any(env.lanes.grid[lane, row, column] for row, column in cells)
            assert np.hypot(*(env.lanes.places[lane, 5] - env.lanes.pose[lane, :2])) > REACH


@pytest.mark.parametrize("size", [5, 11, 21])
def test_a_maze_is_a_tree_of_all_rooms_and_new_in_every_episode(size):
    env = Labyrinth(6, "cpu", "NavMaze", size=size, height=8, width=8)
    env.reset(0)
    for grid in env.lanes.grid:
        rooms = ((size - 1) // 2) ** 2
        assert not grid[1::2, 1::2].any()
        assert int((grid == 0).sum()) == 2 * rooms - 1  # a tree has a passage less than rooms
        reached, ahead = set(), [(1, 1)]
        while ahead:
            row, column = cell = ahead.pop()
            if cell not in reached and not grid[cell]:
                reached.add(cell)
                ahead += [(row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1)]
        assert len(reached) == 2 * rooms - 1
        assert set(np.unique(grid)) == {0, LOOKS.index("wood") + 1}
    if size > 5:
        assert len({grid.tobytes() for grid in env.lanes.grid}) == 6


def test_a_goal_takes_to_a_random_place_of_the_same_maze():
    env = Labyrinth(1, "cpu", "NavMaze", height=8, width=8)
    env.reset(0)
    grid, goal = env.lanes.grid.copy(), env.lanes.places[0, 0].copy()
    seen = set()
    for _ in range(20):
        place(env, *goal, 0)
        assert act(env, "TURN_LEFT").reward.tolist() == [1.0]
        assert np.array_equal(env.lanes.grid, grid)
        assert np.array_equal(env.lanes.places[0, 0], goal)
        seen.add(tuple(env.lanes.pose[0, :2]))
    assert len(seen) > 8


# Seeds


def test_lanes_follow_from_seed_and_actions_alone():
    def played(num_envs, num_threads, seed):
        env = Labyrinth(num_envs, "cpu", "ForageAndAvoid", height=16, width=16, num_threads=num_threads)
        steps, actions = [env.reset(seed)], torch.Generator().manual_seed(5)
        for _ in range(950):
            steps.append(env.step(torch.randint(8, (6,), generator=actions)[:num_envs]))
        env.close()
        return torch.stack([step.obs for step in steps[::10]]), torch.stack([step.reward for step in steps])

    pictures, rewards = played(6, 1, 3)
    for num_envs, threads in ((6, 3), (4, 2)):
        again = played(num_envs, threads, 3)
        assert torch.equal(again[0], pictures[:, :num_envs])
        assert torch.equal(again[1], rewards[:, :num_envs])
    assert not torch.equal(played(6, 1, 4)[0], pictures)


# Pictures


def traced(env, lane, y, x):
    """What pixel (y, x) shows, by marching along its ray in space by tiny steps: the packed colour of wall, floor or sky, and how near the
    ray passed by an edge between them."""
    pose, grid, (_, height, width) = env.lanes.pose[lane], env.lanes.grid[lane], env.spec.obs_shape
    focal = 0.5 * width
    aside, down = (x + 0.5 - 0.5 * width) / focal, (y + 0.5 - 0.5 * height) / focal
    ahead = np.array([math.cos(pose[2]), math.sin(pose[2])])
    ray = ahead + aside * np.array([-ahead[1], ahead[0]])
    t = np.arange(0, 30, 1e-4)
    at = pose[:2] + t[:, None] * ray
    high = 0.5 - down * t
    solid = grid[np.clip(at[:, 1], 0, grid.shape[0] - 1).astype(int), np.clip(at[:, 0], 0, grid.shape[1] - 1).astype(int)] != 0
    hit = int(solid.argmax())
    below = int((high <= 0).argmax()) if down > 0 else len(t)
    if 0 < below < hit:
        return "floor", t[below], at[below]
    if 0 < high[hit] < 1:
        return "wall", t[hit], at[hit]
    return "sky", math.inf, at[hit]


@pytest.mark.parametrize("level", ["Forage", "DoubleTMaze", "NavMaze"])
def test_pictures_are_those_of_single_rays(level):
    env = Labyrinth(3, "cpu", level, height=21, width=28)
    env.reset(0)
    env.lanes.kinds[:] = -1  # without things
    torch.manual_seed(1)
    for _ in range(25):
        step = env.step(torch.randint(8, (3,)))
        env.lanes.kinds[:] = -1
    walls, floor, sky = textures.walls(), textures.floor(), set(textures.sky().ravel().tolist())
    wrong = total = 0
    for lane in range(3):
        shown = step.obs[lane].permute(1, 2, 0).numpy().astype(np.uint32)
        packed = shown[..., 0] | shown[..., 1] << 8 | shown[..., 2] << 16
        for y in range(0, 21, 2):
            for x in range(0, 28, 3):
                what, distance, (at_x, at_y) = traced(env, lane, y, x)
                total += 1
                if what == "sky":
                    wrong += int(packed[y, x]) not in sky
                elif what == "floor":
                    shade = min(SHADES - 1, int(distance * raycast.LIGHT_REACH))
                    near = floor[shade][[int(v * SIDE) % SIDE for v in (at_y - 2e-3, at_y, at_y + 2e-3)]]
                    wrong += packed[y, x] not in near[:, [int(v * SIDE) % SIDE for v in (at_x - 2e-3, at_x, at_x + 2e-3)]]
                else:
                    look = env.lanes.grid[lane, int(at_y), int(at_x)]
                    wrong += packed[y, x] not in walls[:, look - 1]
    assert total == 3 * 11 * 10
    assert wrong <= 0.02 * total  # edges


@pytest.mark.parametrize("distance", [0.6, 1.0, 2.5])
def test_a_wall_is_as_high_as_its_distance_says(tmp_path, distance):
    env = written(tmp_path, ROOM, height=60, width=40)
    env.reset(0)
    place(env, 6 - distance, 2.5, 0)
    picture = act(env, "TURN_LEFT").obs
    place(env, 6 - distance, 2.5, math.degrees(FRAMES_PER_STEP * TURN))
    picture = act(env, "TURN_LEFT").obs[0, :, :, 20]
    packed = (picture[0].int() | picture[1].int() << 8 | picture[2].int() << 16).tolist()
    brick = set(textures.walls()[:, LOOKS.index("brick")].ravel().tolist())
    high = sum(colour in brick for colour in packed)
    assert high == pytest.approx(min(60, 20 / distance), abs=1.01)  # focal 20, a wall of height 1


def test_things_hide_behind_walls_and_stand_before_them(tmp_path):
    text = """seconds = 9
map = '''
#########
#> A#  A#
#       #
#########
'''
[legend]
A = "apple"
[things.apple]
reward = 1.0
"""
    env = written(tmp_path, text)
    env.reset(0)

    def red(picture):
        return int((picture[0].int() - picture[2].int() > 120).sum())

    assert red(env.reset(0).obs[0]) > 20
    env._engine._lanes.kinds[0, 1] = -1
    seen = act(env, "TURN_LEFT").obs[0]
    env.reset(0)
    assert torch.equal(act(env, "TURN_LEFT").obs[0], seen)  # the apple behind the wall shows in neither
    env._engine._lanes.kinds[0, 0] = -1
    act(env, "TURN_RIGHT")
    assert red(act(env, "TURN_LEFT").obs[0]) < 5


def test_a_full_turn_shows_the_same_picture(tmp_path):
    env = written(tmp_path, "turn_inertia = 0\n" + (LEVELS / "Forage.toml").read_text())
    before = env.reset(0).obs
    turn = round(2 * math.pi / (FRAMES_PER_STEP * TURN))
    after = act(env, "TURN_RIGHT", turn).obs
    assert (before != after).float().mean() < 0.01
    assert (before != act(env, "TURN_RIGHT", turn // 2).obs).float().mean() > 0.3
    assert SKY_COLUMNS % 2 == 0


def test_grey_is_the_luma_of_colour():
    colour, grey = (Labyrinth(2, "cpu", "ForageAndAvoid", colours=colours).reset(0).obs for colours in ("rgb", "grey"))
    assert grey.shape == (2, 1, 84, 84)
    luma = (colour.double() * torch.tensor(textures.LUMA).view(1, 3, 1, 1)).sum(1, keepdim=True)
    assert float((luma - grey).abs().max()) < 1.01


def test_the_overview_shows_walls_things_and_the_body():
    env = Labyrinth(1, "cpu", "Forage")
    env.reset(0)
    picture = overview(env.lanes, 0, 130)
    assert picture.shape == (130, 130, 3)
    assert (picture == 32).all(-1).sum() > 10  # the body
    assert ((picture[..., 0] > 150) & (picture[..., 1] < 90) & (picture[..., 2] < 90)).sum() > 12 * 4  # apples
