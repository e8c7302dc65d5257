"""bench=exploration: what bonuses are worth, in the figures of Bellemare et al. 2016, from run folders.

The baseline score of section 7.3, z = (s - min(r, a)) / (max(r, a) - min(r, a)), sets the score s of an agent beside r, that of random
play, and a, that of the agent without bonus at the end of its training: 0 is random play, 1 the baseline's last score.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from envs.api import UserError
from lab.folder import write_beside
from lab.protocols import SCORES
from lab.rooms import GAME, draw, rooms_reached
from lab.seeds import Curve, at_shared_frames

SHARES = (0.05, 0.25, 0.5, 1.0)
"""Of the budget, at which bonuses are compared; the paper's 10, 50, 100 and 200 million frames."""


def baseline_of(bench: Mapping[str, Any]) -> str:
    """The words of a bench's baseline, joined by blanks. UserError where they are no run of it."""
    words = bench.get("baseline")
    if not isinstance(words, list) or words not in (bench.get("runs") or []):
        raise UserError(f"bench.baseline must be one of bench.runs, the agent without bonus, got {words}")
    return " ".join(map(str, words))


def baseline_score(score: float, random: float, baseline: float) -> float:
    """z of section 7.3. ValueError where random and baseline are equal."""
    low, high = min(random, baseline), max(random, baseline)
    if low == high:
        raise ValueError(f"the baseline's score equals random play's, {random}")
    return (score - low) / (high - low)


def mean_curve(curves: Sequence[Curve]) -> dict[int, float]:
    """Frames -> mean over seeds, where all seeds have something to say."""
    frames, scores = at_shared_frames(curves)
    return dict(zip(frames, scores.mean(0).tolist())) if frames else {}


def quartiles_over_games(by_game: Mapping[str, Mapping[int, float]]) -> list[tuple[int, float, float, float]]:
    """Rows (frames, first quartile, median, third quartile) over games, at the frames that all games have something to say about."""
    frames, scores = at_shared_frames([sorted(curve.items()) for curve in by_game.values()])
    quartiles = np.quantile(scores, [0.25, 0.5, 0.75], axis=0).T.tolist() if frames else []
    return [(at, low, middle, high) for at, (low, middle, high) in zip(frames, quartiles)]


def scores_by_setting(baseline: str, results: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, dict[int, float]]]:
    """Setting (without its game) -> game -> frames -> z. Games without a baseline run, or whose baseline plays as random, are left out.

    Random play is that of the published tables where the game has one, else the baseline's own score before training.

    Args:
        baseline: the words of the baseline's runs, joined by blanks.
        results: rows as `lab.bench.summarise_group` makes them.
    """
    setting_of = {row["setting"]: " ".join(word for word in row["setting"].split() if not word.startswith("env=")) for row in results}
    references = {row["game"]: row for row in results if setting_of[row["setting"]] == baseline}
    scores: dict[str, dict[str, dict[int, float]]] = {}
    for row in results:
        reference = references.get(row["game"])
        if reference is None:
            continue
        before = mean_curve(reference["curves"])
        known = SCORES.get(row["game"])
        random = known.random if known else before.get(0)
        if random is None or random == reference["score"]:
            continue
        curve = mean_curve(row["curves"])
        scored = {at: baseline_score(score, random, reference["score"]) for at, score in curve.items()}
        scores.setdefault(setting_of[row["setting"]], {})[row["game"]] = scored
    return scores


def draw_figures(
    bench: Mapping[str, Any], results: Sequence[Mapping[str, Any]], folders: Mapping[str, Sequence[Path]], folder: Path
) -> None:
    """Writes baseline_score.png, bonuses.png, exploration.json, and known_world.png where Montezuma's Revenge was played and recorded."""
    baseline = baseline_of(bench)
    scores = scores_by_setting(baseline, results)
    figures: dict[str, Any] = {
        "baseline": baseline,
        "baseline_scores": scores,
        "quartiles": {setting: quartiles_over_games(by_game) for setting, by_game in scores.items()},
    }
    _draw_quartiles(figures["quartiles"], folder / "baseline_score.png")
    _draw_shares(figures["quartiles"], folder / "bonuses.png")
    worlds: dict[str, dict[int, int]] = {}
    for label, paths in folders.items():
        for path in paths:
            if f"env={GAME}" in label.split() and (path / "actions").is_dir():
                worlds[f"{label.replace(f'env={GAME}', '').strip()} {path.name.rpartition('-seed-')[2]}"] = rooms_reached(path)
    if worlds:
        draw(worlds, folder / "known_world.png")
        figures["rooms"] = worlds
    write_beside(folder / "exploration.json", json.dumps(figures, indent=2))
    scored = {game for by_game in scores.values() for game in by_game}
    for game in sorted({str(row["game"]) for row in results} - scored):
        print(f"{game} has no baseline score: its baseline plays as random play does, or has not finished")
    for setting, rows in figures["quartiles"].items():
        if rows:
            at, low, middle, high = rows[-1]
            spread = f"quartiles {low:.2f} to {high:.2f}, {len(scores[setting])} games"
            print(f"baseline score of {setting} at {at:,} frames: median {middle:.2f} ({spread})")
    for label, world in worlds.items():
        print(f"rooms of {GAME} reached by {label}: {len(world)}")


def _draw_quartiles(quartiles: Mapping[str, Sequence[tuple[int, float, float, float]]], path: Path) -> None:
    """Median z against frames, a line a setting, the quartiles shaded (figure 5)."""
    pyplot = _pyplot()
    figure, panel = pyplot.subplots(figsize=(6, 3.6), layout="constrained")
    for colour, (setting, rows) in enumerate(quartiles.items()):
        frames = [row[0] / 1e6 for row in rows]
        panel.plot(frames, [row[2] for row in rows], color=f"C{colour}", label=setting)
        panel.fill_between(frames, [row[1] for row in rows], [row[3] for row in rows], color=f"C{colour}", alpha=0.15, linewidth=0)
    panel.axhline(1, color="0.7", linewidth=0.8, linestyle="--")
    panel.set_xlabel("environment frames (millions)")
    panel.set_ylabel("baseline score")
    _finish(pyplot, figure, panel, path)


def _draw_shares(quartiles: Mapping[str, Sequence[tuple[int, float, float, float]]], path: Path) -> None:
    """Median z of each setting at shares of the budget, with quartiles as bars (section 7.4)."""
    pyplot = _pyplot()
    figure, panel = pyplot.subplots(figsize=(6, 3.6), layout="constrained")
    width = 0.8 / max(1, len(quartiles))
    for place, (setting, rows) in enumerate(quartiles.items()):
        if not rows:
            continue
        budget = rows[-1][0]
        nearest = [min(rows, key=lambda row, share=share: abs(row[0] - share * budget)) for share in SHARES]  # type: ignore[misc]
        at = [index + place * width for index in range(len(SHARES))]
        medians = [row[2] for row in nearest]
        spread = [[row[2] - row[1] for row in nearest], [row[3] - row[2] for row in nearest]]
        panel.bar(at, medians, width, color=f"C{place}", yerr=spread, error_kw={"elinewidth": 0.8}, label=setting)
    panel.set_xticks([index + 0.4 - width / 2 for index in range(len(SHARES))], [f"{share:.0%}" for share in SHARES])
    panel.set_xlabel("of the budget")
    panel.set_ylabel("baseline score")
    _finish(pyplot, figure, panel, path)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    return pyplot


def _finish(pyplot: Any, figure: Any, panel: Any, path: Path) -> None:
    if panel.get_legend_handles_labels()[0]:
        panel.legend(fontsize=7, frameon=False)
    else:
        panel.text(0.5, 0.5, "no game on which the baseline left random play", transform=panel.transAxes, ha="center", fontsize=8)
    panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
