"""A room to play in, and how a level is written and opened."""

from envs.labyrinth.world import Labyrinth

NAMES = ["DoubleTMaze", "Forage", "ForageAndAvoid", "NavMaze", "ShortDoubleTMaze"]
ROOM = """seconds = 9
walk_inertia = 0
turn_inertia = 0
map = '''
#######
#     #
#  S  #
#     #
#######
'''
"""


def written(tmp_path, text, **knobs):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    return Labyrinth(knobs.pop("num_envs", 1), "cpu", str(path), num_threads=1, **knobs)
