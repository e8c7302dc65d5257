"""What a bench is to run: a grid of settings and seeds, checked as a whole before its first run starts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from envs.api import UserError
from lab.configure import check_seed, compose, plain
from lab.logging import read_evaluation

OWN_KEYS = ("job", "resume", "seed", "device", "runs_dir", "run_name", "wandb")
"""Which a bench sets for its runs itself."""


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
    """All runs of a bench, the first seed's first. UserError where any could not be trained as the bench says."""
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
            planned.append(PlannedRun(" ".join(words), (*map(str, common), *words), seed, target, cfg["frames"]))
    return planned


def slug(label: str) -> str:
    """A file name from words: "env=Qbert encoder=vae" -> "env-Qbert-encoder-vae"."""
    return re.sub(r"[^\w.]+", "-", label).strip("-")


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


def _evaluated_at(folder: Path) -> list[int]:
    return sorted({row["frames"] for row in read_evaluation(folder)})
