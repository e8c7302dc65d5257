"""`python launch.py --help`: what can be typed, read from the files under configs/."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

from lab.folder import CONFIGS

# what a model must have to be chosen by that key
METHOD_OF = {"encoder": "encode", "density": "absorb", "planner": "advance", "simulator": "step", "model": "players"}
USES = """\
python launch.py [key=value ...]

  python launch.py agent=episodic_control env=Pong           train (job=train is the default)
  python launch.py agent=episodic_control env=Qbert encoder=vae frames=2_000_000
  python launch.py resume=runs/NAME [frames=...]             go on with a run
  python launch.py job=evaluate run=runs/NAME                play without learning
  python launch.py job=report run=runs/NAME                  write the report again
  python launch.py job=collect env=Qbert data=data/qbert     clips of random play to disk; run=runs/NAME: of a trained agent
  python launch.py job=fit model=vae data=data/qbert         fit a generative model
  python launch.py job=fit simulator=small_feedforward data=data/qbert   fit a simulator of the world
  python launch.py job=evaluate_simulator run=runs/NAME data=data/qbert  how far ahead it sees, and what of
  python launch.py job=play run=runs/NAME                    a page to play a fitted simulator beside the world, or to watch an agent
  python launch.py job=play env=Forage                       the world alone
  python launch.py job=bench bench=demo                      many runs, one table
"""


def explain(configs: Path = CONFIGS) -> str:
    """What the door can do: the options of each group, then every key with its default, by the option that has it."""
    from envs.atari import GAMES
    from envs.protocols import PROTOCOLS

    def options(group: str) -> str:
        return ", ".join(path.stem for path in _files(configs / group) if path.stem != "atari")

    models = {job: ", ".join(path.stem for path in _files(configs / "model") if job in _jobs(path)) for job in METHOD_OF}
    groups = {
        "job": options("job"),
        "agent": options("agent"),
        "env": f"{options('env')}, and {len(GAMES)} Atari games: {', '.join(GAMES)}",
        "encoder": f"{models['encoder']} (where the agent takes an encoder)",
        "density": f"{models['density']} (where the agent takes a density)",
        "bonus": f"{options('bonus')} (likewise)",
        "planner": f"{models['planner']} (where the agent takes a planner)",
        "simulator": f"{models['simulator']} (where the agent takes a simulator)",
        "model": f"{models['model']} (of job=fit)",
        "protocol": f"{', '.join(PROTOCOLS)} (of Atari)",
        "experiment": options("experiment"),
        "bench": f"{options('bench')} (of job=bench)",
    }
    lines = [USES, *(_wrapped(name, text) for name, text in groups.items()), "", "keys of every job", *_keys(configs / "config.yaml"), ""]
    for group in ("job", "agent", "env", "bonus"):
        lines += _section(configs, group)
    lines += ["a model's keys go by what it is chosen as: encoder.KEY, density.KEY, planner.KEY, simulator.KEY or model.KEY", ""]
    lines += _section(configs, "model")
    lines += _section(configs, "bench")
    return "\n".join(lines).rstrip()


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.yaml"))


def _wrapped(name: str, text: str) -> str:
    return textwrap.fill(f"{name:<11} {text}", 140, subsequent_indent=" " * 12)


def _section(configs: Path, group: str) -> list[str]:
    """Every option of a group that has keys, and the keys; of options of one class, those after the first tell only what differs."""
    lines: list[str] = []
    first: dict[str, tuple[str, dict[str, str]]] = {}
    for path in _files(configs / group):
        jobs = (_jobs(path) or [group]) if group == "model" else [group]
        title = " or ".join(f"{job}={path.stem}" for job in jobs) if path.stem != "atari" else "env=Pong, as every Atari game"
        knobs, target = _knobs(path), _target(path)
        name, known = first.setdefault(target or str(path), (path.stem, knobs))
        if name != path.stem and known.keys() <= knobs.keys():
            title += f": as {name}, but for"
            knobs = {key: rest for key, rest in knobs.items() if key not in known or _value(known[key]) != _value(rest)}
        if knobs:
            prefix = "" if group == "job" else f"{jobs[0]}."
            lines += [title, *(f"  {prefix}{key}:{rest}" for key, rest in knobs.items()), ""]
    return lines


def _keys(path: Path) -> list[str]:
    return [f"  {key}:{rest}" for key, rest in _knobs(path).items()]


def _knobs(path: Path) -> dict[str, str]:
    """Key -> the rest of its line, comment included: what is typed before `=`, and its default. A list of lists is cut to its first."""
    knobs: dict[str, str] = {}
    section = ""
    for line in path.read_text().splitlines():
        item, key = re.match(r" +- (\[.*)", line), re.match(r"( *)([a-z]\w*):(.*)", line)
        if item and section:
            knobs.setdefault(section, f" [{item[1]}, ...]")
        if key is None or key[2] in ("job", "defaults") or (_value(key[3]) == "???" and key[2] == "game"):
            continue
        if not key[1]:
            section = "" if _value(key[3]) else key[2]
        if not section or key[1]:
            rest = key[3].replace("???", "needed")
            knobs[f"{section}.{key[2]}" if key[1] else key[2]] = rest if rest.count("[") == rest.count("]") else f"{rest} ..."
        elif key[3].strip():
            knobs[f"{section}.*"] = key[3]
    return knobs


def _value(rest: str) -> str:
    return rest.partition("#")[0].strip()


def _target(path: Path) -> str:
    found = re.search(r"^_target_: (\S+)", path.read_text(), re.MULTILINE)
    return found[1] if found else ""


def _jobs(path: Path) -> list[str]:
    """The keys that a model can be chosen by, as far as its source tells without being imported."""
    source = CONFIGS.parent / f"{_target(path).rpartition('.')[0].replace('.', '/')}.py"
    text = source.read_text() if source.is_file() else ""
    return [job for job, method in METHOD_OF.items() if not text or f"def {method}(" in text]
