"""The report opens from disk, asks no network for anything, tells the right numbers, and survives whatever lies in a run folder."""

from __future__ import annotations

import json
import math
import re
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from fake_run import ACTIONS, make_run

from lab.curves import Mark, Series, label, line_chart, stacked_chart, thin, ticks
from lab.logging import EvaluationLog, MetricsLog
from lab.report import read_run, write_report
from lab.report_sections import Run, evaluations, time_budget

MP4 = b"\x00\x00\x00\x18ftypisom" + b"\x00" * 500
VOID = {"meta", "img", "br", "input", "link"}
OPTIONAL = {"th", "td", "tr", "li", "p"}


class Page(HTMLParser):
    """Reads a page as a browser would: text, tags, chart values; and complains of tags that do not close."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text, self.tags, self.charts, self.loads = "", [], {}, []
        self._open: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID | OPTIONAL:
            self._open.append(tag)
        found = dict(attributes)
        self.loads += [found[name] for name in ("src", "href", "data") if found.get(name)]
        if found.get("data-chart"):
            self.charts[len(self.charts)] = json.loads(found["data-chart"] or "")

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID | OPTIONAL:
            assert self._open.pop() == tag

    def handle_data(self, content: str) -> None:
        if not self._open or self._open[-1] not in {"style", "script"}:
            self.text += content + " "


def report(folder: Path) -> Page:
    return Page(write_report(folder).read_text(encoding="utf-8"))


def write_episodes(folder: Path, returns: dict[int, list[float]]) -> None:
    with EvaluationLog(folder) as log:
        log.write({"frames": frames, "return": value, "protocol": "mfec2016"} for frames, values in returns.items() for value in values)


def test_the_whole_page(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "episodic_control-Qbert-3-x", video=MP4)
    page = report(folder)
    for words in ("episodic_control", "Qbert", "mfec2016", "Human-normalised", "Where the time goes", "MFEC at 10M", "Pritzel et al. 2017"):
        assert words in page.text
    for words in (
        *ACTIONS,
        "Look-ups that hit an entry exactly",
        "elbo",
        "Reconstructions",
        "Samples",
        "agent: epsilon",
        "k: 11",
        "ale-py",
    ):
        assert words in page.text
    names = [series["n"] for chart in page.charts.values() for series in chart["s"]]
    assert len(names) == len(set(names)) == 2 + 5 + 6 + 1 + 1 + 4 + 6  # curve, budget, actions, hits, bytes, fit, the rest
    assert [dict(a).get("src", "")[:15] for t, a in page.tags if t == "img"] == ["data:image/png;"] * 2
    assert len([t for t, _ in page.tags if t == "video"]) == 3
    assert not list(folder.glob(".report*"))


def test_nothing_is_loaded_from_anywhere(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", video=MP4)
    text = write_report(folder).read_text()
    page = Page(text)
    assert all(load.startswith(("data:image/png", "data:video/mp4", "videos/iteration-")) for load in page.loads)
    assert not re.search(r"https?://|url\(|@import|//cdn", text)
    assert "default-src 'none'" in text


def test_score_before_and_after_with_intervals(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("choices: {agent: random, env: Pong}\nseed: 0\nframes: 1000\n")
    write_episodes(tmp_path, {0: [-21.0, -21.0], 400: [-20.0, -16.0], 800: [-3.05, -3.05]})
    page = report(tmp_path)
    assert re.search(r"−21 →\s+−3\.05", page.text)
    assert "50.0 %" in page.text  # half way from -20.7 to 14.6
    assert "800  of 1,000" in page.text.replace("   ", "  ")
    first, middle, _ = read_run(tmp_path).evaluations
    assert (first.mean, first.low, first.high) == (-21, -21, -21)
    assert (middle.mean, middle.low, middle.high) == (-18, -20, -16)
    curve = next(s for s in page.charts[0]["s"] if s["n"].startswith("evaluation"))
    assert (curve["x"], curve["y"], curve["l"], curve["h"]) == ([0, 400, 800], [-21, -18, -3.05], [-21, -20, -3.05], [-21, -16, -3.05])


def test_an_empty_folder_and_each_file_alone(tmp_path: Path) -> None:
    empty = tmp_path / "random-Pong-7-x"
    empty.mkdir()
    page = report(empty)
    assert re.search(r"random\s+plays\s+Pong", page.text)
    assert "seed  7" in page.text
    assert "no evaluation yet" in page.text
    whole = make_run(tmp_path / "whole", iterations=1, rows_per_iteration=2)
    for name in ("config.yaml", "version.json", "metrics.jsonl", "evaluation.csv"):
        alone = tmp_path / name.replace(".", "-")
        alone.mkdir()
        (alone / name).write_bytes((whole / name).read_bytes())
        report(alone)
    with pytest.raises(OSError, match="nowhere"):
        write_report(tmp_path / "nowhere")


def test_a_hostile_folder_stays_words(tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script><img src=http://evil.test/x onerror=alert(1)>\"'"
    folder = tmp_path / "run"
    (folder / "videos").mkdir(parents=True)
    (folder / "images").mkdir()
    (folder / "config.yaml").write_text(
        json.dumps({"choices": {"agent": evil, "env": evil, "encoder": evil}, "seed": evil, "protocol": {"name": evil}})
    )
    (folder / "version.json").write_text(json.dumps({evil: {evil: evil}}))
    with MetricsLog(folder) as log:
        for frames in (1, 2):
            log.write({"frames": frames, evil: 1.5, f"time/{evil}": 0.5, f"memory/entries_{evil}": 2, f"fit/{evil}": 1, "name": evil})
    with EvaluationLog(folder) as log:
        log.write([{"frames": 1, "return": 2, "protocol": evil}])
    (folder / "videos" / "<b onclick=x>.mp4").write_bytes(MP4)
    (folder / "images" / '"><script>.png').write_bytes(b"\x89PNG\r\n\x1a\n")
    (tmp_path / "secret.png").write_bytes(b"\x89PNG\r\n\x1a\nsecret")
    (folder / "images" / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "images" / "fake.png").write_bytes(b"<svg onload=alert(1)>")
    text = write_report(folder).read_text()
    page = Page(text)
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert [tag for tag, _ in page.tags].count("img") == 1
    assert not [1 for _, attributes in page.tags if any(name.startswith("on") for name in attributes)]
    assert "alert(1)" in page.text


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.yaml", "a: [" * 3000),
        ("config.yaml", "!!python/object/apply:os.system ['touch owned']"),
        ("config.yaml", "- just\n- a list"),
        ("config.yaml", "choices: 3\nseed: [1]\nframes: -4\njob: {}\nagent: {name: {}}"),
        ("version.json", "[" * 5000),
        ("version.json", "[1]"),
        ("metrics.jsonl", '{"frames": -5, "a": 1}\n{"frames": 1e300, "a": 1e300}\n{"frames": 3, "a": -1e300, "b": null}\n'),
        ("metrics.jsonl", '{"frames": 3, "time/env": 7, "speed/frames_per_second": 0}\n{"frames": 3, "time/env": null, "time/act": -1}\n'),
        ("metrics.jsonl", '{"frames": 0, "memory/entries_A": null, "memory/entries_B": 4}\n{"frames": 0, "memory/exact_hit_rate": 5}\n'),
        ("evaluation.csv", "frames,return\n1,nan\n2,inf\n"),
        ("evaluation.csv", "frames,return\n-1,1e300\n" + "9" * 30 + ",-1e300\n"),
    ],
)
def test_damaged_files_cost_only_themselves(tmp_path: Path, name: str, content: str) -> None:
    folder = make_run(tmp_path / "run", iterations=1, rows_per_iteration=2)
    (folder / name).write_text(content)
    report(folder)
    assert not (Path.cwd() / "owned").exists()


def test_a_report_of_a_fit(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("job: fit\nframes: 10\nseed: 0\nchoices: {model: vae}\n")
    with MetricsLog(tmp_path) as log:
        for update in (10, 20, 30):
            log.write({"frames": 0, "iteration": 0, "fit/update": update, "fit/elbo": -100 + update})
    page = report(tmp_path)
    assert re.search(r"vae\s+fitted", page.text)
    assert "−70" in page.text
    assert page.charts[0]["s"][0]["x"] == [10, 20, 30]
    assert page.charts[0]["u"] == "updates"
    assert "evaluation" not in page.text.split("Written by")[0]


def test_large_videos_are_links_and_the_first_is_kept(tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    for index in range(6):
        (tmp_path / "videos" / f"iteration-{index:04d}.mp4").write_bytes(MP4 + (b"\x00" * 4_000_000 if index == 5 else b""))
    (tmp_path / "videos" / "notes.mp4").write_text("no video at all")
    page = report(tmp_path)
    assert [a["aria-label"] for t, a in page.tags if t == "video"] == ["Iteration 0", "Iteration 4"]
    assert [a["href"] for t, a in page.tags if t == "a"] == [f"videos/iteration-{index:04d}.mp4" for index in (1, 2, 3, 5)]


def test_the_old_report_stays_whole_until_the_new_one_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_report(tmp_path)
    before = path.read_text()
    with path.open() as opened:  # a reader in the midst of the old page reads on in the old page
        write_report(make_run(tmp_path, iterations=1, rows_per_iteration=1))
        assert opened.read() == before != path.read_text()
    before = path.read_text()
    names = sorted(p.name for p in tmp_path.iterdir())

    def full(self: Path, *args: object, **kwargs: object) -> int:
        with self.open("w") as file:
            file.write("<!doctype")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space"):
        write_report(tmp_path)
    assert path.read_text() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == names


def test_a_huge_run_is_quick_and_small(tmp_path: Path) -> None:
    names = [f"A{index}" for index in range(18)]
    row = {f"memory/entries_{name}": 5 for name in names} | {"train/return_mean": 1.0, "time/env": 0.5}
    lines = [json.dumps({"frames": frames * 4, **row, "speed/frames_per_second": 100.0}) for frames in range(60_000)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    write_episodes(tmp_path, {frames: [1.0, 2.0] for frames in range(0, 240_000, 200)})
    began = time.process_time()
    path = write_report(tmp_path)
    assert time.process_time() - began < 4  # about 0.8 s on an idle core
    assert path.stat().st_size < 2_000_000
    assert len(read_run(tmp_path).evaluations) == 300


def test_time_budget_weighs_rows_by_their_wall_time(tmp_path: Path) -> None:
    x = np.array([100.0, 200.0])
    columns = {
        "time/act": (x, np.array([1.0, 0.0])),
        "time/env": (x, np.array([0.0, 1.0])),
        "speed/frames_per_second": (x, np.array([10.0, 90.0])),
    }
    text = re.sub("<[^>]*>", " ", time_budget(Run(tmp_path, columns=columns)))
    assert re.search(r"act\s+90\.0%\s+10\.0 s", text)  # 100 frames at 10 a second, then 100 at 90
    assert re.search(r"env\s+10\.0%\s+1\.1 s", text)
    assert text.index("env ") < text.index("act ")
    assert time_budget(Run(tmp_path)) == ""


def test_evaluations_are_grouped_by_frames() -> None:
    found = evaluations(
        [{"frames": 8, "return": 1.0}, {"frames": 0, "return": 4.0}, {"frames": 8, "return": 3.0}, {"frames": 9, "return": math.nan}]
    )
    assert [(one.frames, one.returns, one.mean) for one in found] == [(0, (4.0,), 4.0), (8, (1.0, 3.0), 2.0)]
    assert evaluations([]) == []


def test_thin_keeps_ends_and_peaks() -> None:
    y = np.zeros(100_000)
    y[77_720], y[33_333], y[50_000] = 5, -5, np.nan
    kept = thin(y, 2000)
    assert len(kept) <= 2000
    assert {0, 33_333, 77_720, 99_999} <= set(kept.tolist())
    assert (np.diff(kept) > 0).all()
    assert thin(y[:10], 2000).tolist() == list(range(10))


@pytest.mark.parametrize(
    ("low", "high", "answer"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0, 2e6, [0, 5e5, 1e6, 1.5e6, 2e6]),
        (-21, 21, [-20, -10, 0, 10, 20]),
        (3, 3, [3]),
        (0, math.inf, [0]),
    ],
)
def test_ticks_are_round(low: float, high: float, answer: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(answer)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (-20.7, "−20.7"),
        (1234.5, "1,234"),
        (-12_500, "−12.5k"),
        (2e6, "2M"),
        (0.005, "0.005"),
        (2e-5, "2e-05"),
        (math.nan, "—"),
        (999_999, "1M"),
    ],
)
def test_labels_are_short(value: float, text: str) -> None:
    assert label(value) == text


def test_marks_near_the_curve_are_drawn_and_far_ones_named() -> None:
    curve = Series("a", [0, 1], [0.0, 10.0])
    chart = line_chart("t", [curve], [Mark("near", 15.0), Mark("far", 1000.0), Mark("low", -900.0)])
    assert chart.count('class="mark"') == 1
    assert "near 15<" in chart
    assert "far 1,000 ↑" in chart
    assert "low −900 ↓" in chart
    merged = line_chart("t", [curve], [Mark("one", 5.0), Mark("two", 5.1)])
    assert "one 5 · two 5.1" in merged


def test_a_curve_breaks_where_it_is_not_finite() -> None:
    chart = line_chart("t", [Series("a", [0, 1, 2, 3, 4], [0, 1, math.nan, math.inf, 0])])
    path = re.search(r'class="line"[^>]*d="([^"]*)"', chart)
    assert path
    assert path[1].count("M") == 2
    assert path[1].endswith("h0")  # a point alone is a dot
    assert "2 of the values were not finite" in chart
    assert line_chart("t", [Series("a", [0], [math.nan])]) == ""
    assert stacked_chart("t", ["a"], [], np.zeros((1, 0))) == ""
    assert 'class="line"' in line_chart("t", [Series("a", [5], [3.0])])
    assert 'class="area"' in stacked_chart("t", ["a"], [5], [[3.0]])


def test_a_chart_draws_its_points_where_they_belong() -> None:
    chart = line_chart("t", [Series("a", [10, 0, 5], [1.0, 0.0, 0.25])], percent=True)
    assert 'd="M0 1000L500 750L1000 0"' in chart
    bands = re.findall(r'class="area"[^>]*d="([^"]*)"', stacked_chart("t", ["a", "b"], [0, 10], [[0.25, 0.5], [0.75, 0.5]], percent=True))
    assert bands == ["M0 750L1000 500L1000 1000L0 1000Z", "M0 0L1000 0L1000 500L0 750Z"]
