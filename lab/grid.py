"""What a bench is to run: a grid of settings and seeds, checked as a whole before its first run starts."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from envs.api import UserError
from lab.configure import check_seed, compose, plain
from lab.folder import read_config
from lab.logging import read_evaluation

LONGEST = 200  # characters of a run folder's name, less its seed; file systems take 255
OWN_KEYS = ("job", "resume", "seed", "device", "runs_dir", "run_name", "wandb")
"""Which a bench sets for its runs itself."""
FREE_KEYS = (
    *("resume", "device", "runs_dir", "run_name", "wandb", "frames", "tensorboard", "log_frames", "checkpoint_frames"),
    *("evaluation.video", "choices.job", "choices.experiment", "choices.model"),
)
"""In which a run folder may differ from what a bench asks for: they do not change what is learned, or show in other keys too."""


@dataclass(frozen=True)
class PlannedRun:
    """One run of a grid.

    Args:
        label: the words of its setting.
        words: all that it is trained with, apart from what the bench sets itself.
        seed: of the run.
        folder: its run folder, there or not.
        frames: its budget.
    """

    label: str
    words: tuple[str, ...]
    seed: int
    folder: Path
    frames: int

    def finished(self) -> bool:
        """Whether it was evaluated at the end of its budget."""
        return max(_evaluated_at(self.folder), default=0) >= self.frames


def bench_folder(bench: Mapping[str, Any], runs_dir: object) -> Path:
    """`runs_dir/bench-NAME`. UserError unless the name is one."""
    name = bench.get("name")
    if name is None or not re.fullmatch(r"[\w-]+", str(name)):
        raise UserError(f"bench.name must be made of letters, digits, - and _, got {name}")
    return Path(str(runs_dir)) / f"bench-{name}"


def plan(bench: Mapping[str, Any], folder: Path) -> list[PlannedRun]:
    """All runs of a bench, the first seed's first. UserError where any could not be trained as the bench says, or was trained otherwise."""
    runs, seeds, common, games = bench.get("runs"), bench.get("seeds"), bench.get("common", []), bench.get("games") or []
    lists = all(isinstance(part, list) for part in (runs, seeds, common, games)) and all(isinstance(words, list) for words in runs or [0])
    if not lists or not seeds or not runs or not all(runs):
        needs = "a bench needs runs (a list of lists of key=value) and seeds (a list)"
        raise UserError(f"{needs}, and may have words in common and games (lists)")
    _check_seeds(seeds)
    settings = [[str(word) for word in words] for words in runs]
    if games:
        settings = [[f"env={game}", *words] for game in games for words in settings]
    slugs = [slug(" ".join(words)) for words in settings]
    for words, name in zip(settings, slugs):
        if slugs.count(name) > 1:
            raise UserError(f"bench.runs or bench.games holds {' '.join(words)} more than once; take the others out")
    composed = [_composed([str(word) for word in common], words) for words in settings]
    planned = []
    for seed in seeds:
        for words, name, cfg in zip(settings, slugs, composed):
            target = folder / f"{name}-seed-{seed}"
            run = PlannedRun(" ".join(words), (*map(str, common), *words), seed, target, cfg["frames"])
            if (target / "config.yaml").exists():
                check_folder(run, cfg | {"seed": seed})
            planned.append(run)
    return planned


def slug(label: str) -> str:
    """A file name from words: "env=Qbert encoder=vae" -> "env-Qbert-encoder-vae". What is too long ends in a checksum instead."""
    name = re.sub(r"[^\w.]+", "-", label).strip("-")
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 9]}-{hashlib.sha256(label.encode()).hexdigest()[:8]}"


def _check_seeds(seeds: list[Any]) -> None:
    for seed in seeds:
        check_seed("every one of bench.seeds", seed)
    if len(set(seeds)) < len(seeds):
        raise UserError(f"bench.seeds must differ, because equal seeds give equal runs, got {seeds}")


def _composed(common: list[str], words: list[str]) -> dict[str, Any]:
    """The configuration of one setting. UserError, with its words, where they are not understood or say what the bench says itself."""
    for word in (*common, *words):
        key = word.partition("=")[0]
        if key in OWN_KEYS:
            place = "bench.common" if word in common else "bench.runs"
            raise UserError(f"{place} holds {word}, but a bench sets {key} itself; take it out (seeds stand in bench.seeds)")
    try:
        return plain(compose([*common, *words]))
    except UserError as mistake:
        raise UserError(f"bench.runs, {' '.join(words)}: {mistake}") from mistake


def check_folder(run: PlannedRun, wanted: Mapping[str, Any]) -> None:
    """UserError where a run's folder was trained otherwise than wanted, or for longer."""
    difference, evaluated = first_difference(read_config(run.folder), wanted), _evaluated_at(run.folder)
    if difference is None and len(evaluated) > 1 and evaluated[-2] >= run.frames:
        difference = f"frames={evaluated[-1]}", f"frames={run.frames}"
    if difference is not None:
        there, now = difference
        raise UserError(f"{run.folder} was trained with {there}, the bench now says {now}; choose another bench.name or delete the folder")


def first_difference(made: Mapping[str, Any], wanted: Mapping[str, Any]) -> tuple[str, str] | None:
    """What two configurations say of the first key that matters and differs, choices first. What the first one lacks counts as default."""
    old, new = (dict(_leaves({"choices": cfg.get("choices"), **cfg})) for cfg in (made, wanted))
    lacking = new.keys() - old.keys() - set(FREE_KEYS)
    if lacking:
        shared = [f"{key}={choice}" for key, choice in wanted["choices"].items() if f"choices.{key}" in old.keys() - set(FREE_KEYS)]
        defaults = dict(_leaves(plain(compose(shared))))
        old |= {key: defaults[key] for key in lacking & defaults.keys()}
    for key in dict.fromkeys((*new, *old)):
        if key not in FREE_KEYS and (key not in old or key not in new or old[key] != new[key]):
            name = key.removeprefix("choices.")
            there, now = (f"{name}={leaves[key]}" if key in leaves else f"no {name}" for leaves in (old, new))
            return there, now
    return None


def _leaves(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(keys joined by dots, value) of all that is nested in a configuration."""
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _evaluated_at(folder: Path) -> list[int]:
    return sorted({row["frames"] for row in read_evaluation(folder)})
