"""job=fit: a generative model is fitted to recorded clips, from nothing or from its last checkpoint to its last update."""

from __future__ import annotations

import signal
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig

from envs.api import UserError
from generative.api import Density, Encoder, Simulator
from generative.clips import ClipData
from generative.fit import Fitter, NonFiniteLoss
from generative.rollouts import moving_error, psnr, rollout, squared_error
from lab import checkpoint
from lab.configure import build, plain
from lab.dashboard import Dashboard
from lab.fitting import heldout_bits, needs_fit, write_pictures
from lab.folder import as_word, check_fingerprint, find_folder, fingerprint, lock, new_folder, write_config, write_versions
from lab.logging import METRICS_FILE, MetricsLog, cut_back
from lab.progress import Progress
from lab.report import write_report
from lab.rollout_pictures import write_rollouts
from lab.run import derive_seed, forked_seed, pick_device, seed_everything

ROWS = 10  # of metrics, between two checkpoints
HORIZONS = (1, 3, 5, 10)
HELDOUT_CLIPS, PREPARED_FRAMES = 64, 1_000
INTERRUPTED = 130


def run(cfg: DictConfig) -> int:
    """job=fit: fits `simulator`, or else `model`, to the clips in `data`; the run folder's checkpoint can be reused by fit.path."""
    settings = plain(cfg)
    folder = find_folder(settings["resume"], "resume") if settings["resume"] else None
    settings["resume"] = None
    fitting = Fitting(settings, pick_device(settings["device"]), folder)
    try:
        code = fitting.run()
    finally:
        fitting.close()
    if code == 0:
        shown = ", ".join(f"{key.removeprefix('fit/')} {value:,.4g}" for key, value in fitting.row.items() if key != "fit/update")
        print(f"fitted   {fitting.name}: {shown or 'all updates were made already'}\nreport   {fitting.folder / 'report.html'}")
        if fitting.job == "simulator":
            print(f"play     python launch.py job=play {as_word('run', fitting.folder)}")
        if isinstance(fitting.model, Encoder):
            print(f"reuse    encoder={fitting.name} {as_word('fit.path', fitting.folder)}")
        if fitting.simulates:
            print(f"reuse    agent=dqn simulator={fitting.name} {as_word('fit.path', fitting.folder)}")
    return code


class Phase(NamedTuple):
    """A stretch of updates that are made alike."""

    updates: int
    batch_size: int
    learning_rate: float
    window_steps: int | None
    horizon: int


def phases_of(knobs: Mapping[str, Any]) -> list[Phase]:
    """The curriculum of fit.phases, each of which says what differs from fit.*; one phase where there is none. UserError for other keys."""
    own = {key: knobs[key] for key in Phase._fields}
    if knobs["phases"] is None:
        return [Phase(**own)]
    if not isinstance(knobs["phases"], list) or not knobs["phases"]:
        raise UserError(f"fit.phases is a list of groups of {', '.join(Phase._fields)}, or null, got {knobs['phases']}")
    phases = []
    for group in knobs["phases"]:
        if not isinstance(group, dict) or not set(group) <= set(own) or "updates" not in group:
            raise UserError(f"fit.phases: each says its updates and any of {', '.join(list(own)[1:])}, got {group}")
        for key, value in group.items():
            whole = isinstance(value, int) and not isinstance(value, bool)
            if not (whole or (key == "learning_rate" and isinstance(value, float))) or value <= 0:
                raise UserError(f"fit.phases: {key} must be above 0{'' if key == 'learning_rate' else ' and whole'}, got {value}")
        phases.append(Phase(**{**own, **group}))
    return phases


class Fitting:
    """Whole stretches of `fit.checkpoint_updates` updates, each followed by held-out figures, pictures, a report and a checkpoint.

    Random state is a function of (seed, stretch), so a fit that stops and resumes at a stretch's end goes on bit for bit (on the CPU).

    Args:
        settings: the resolved configuration.
        device: of the model.
        folder: the run folder to go on with, or None for a new one.
    """

    def __init__(self, settings: dict[str, Any], device: torch.device, folder: Path | None) -> None:
        self.device, self.knobs = device, settings["fit"]
        self.job = "simulator" if settings.get("simulator") else "model"
        if self.job == "simulator":  # what is not fitted is not told
            settings = {**settings, "choices": {**settings["choices"]}}
            for left_out in (settings, settings["choices"]):
                left_out.pop("model", None)
        self.settings = settings
        self.name = settings["choices"][self.job]
        self.data = ClipData(Path(settings["data"]), rest=folder is None)  # what goes on does so on all that it began with
        self.phases = phases_of(self.knobs)
        seed_everything(derive_seed(settings["seed"], 0, "build"))
        given = {"obs_shape": self.data.obs_shape, "num_actions": self.data.num_actions, "device": device}
        self.model = build(settings[self.job], self.job, **given)
        if not needs_fit(self.model):
            raise UserError(f"{self.job}={self.name} has nothing to fit")
        self.simulates = isinstance(self.model, Simulator)
        if self.job == "simulator" and not self.simulates:
            raise UserError(f"simulator={self.name}: a {type(self.model).__name__} is no simulator")
        for phase in self.phases if self.simulates else ():
            least = self.model.context_frames - 1 + phase.horizon
            if phase.window_steps is not None and phase.window_steps < least:
                known = f"{self.model.context_frames} known frames and a horizon of {phase.horizon}"
                raise UserError(f"fit.window_steps={phase.window_steps} is too short: {known} need {least} at least")
        judged = self.simulates or isinstance(self.model, Density)
        self.held: ClipData | None
        self.fitted, self.held = self.data.split(self.knobs["heldout"]) if self.knobs["heldout"] and judged else (self.data, None)
        self.stretch = min(self.knobs["checkpoint_updates"], sum(phase.updates for phase in self.phases))
        self.iteration = self._interrupts = 0
        self.row: dict[str, Any] = {}
        self._notes = list(self.data.refused)
        state: Mapping[str, Any] | None = self._found(folder) if folder else None
        self.updates = -(-sum(phase.updates for phase in self.phases) // self.stretch) * self.stretch
        self.fitter = self._fitter()
        if state is not None:
            self.model.load_state_dict(state["model"])
            self.fitter.load_state_dict(state["fitter"])
        elif hasattr(self.model, "prepare"):
            self.model.prepare(self.fitted.spread(PREPARED_FRAMES))
        self.folder = folder or new_folder(settings, f"fit-{self.name}")
        self._lock = lock(self.folder)
        if folder:
            cut_back(folder, state["logs"] if state is not None else {METRICS_FILE: 0})
            write_config(folder, settings)
        write_versions(self.folder, device)
        self.log = MetricsLog(self.folder)
        self.dashboard = Dashboard(self.folder, settings["wandb"], settings, settings["tensorboard"])

    def run(self) -> int:
        """Fits until the last update. Returns the exit code."""
        handlers = {number: signal.signal(number, self._interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            with Progress(self.updates, f"fitting {self.name}", unit="updates") as self.progress:
                begun = f", going on at update {self.fitter.update:,}" if self.fitter.update else ""
                for note in (*self._notes, *self.dashboard.notes, f"run folder {self.folder}, {len(self.data):,} frames{begun}"):
                    self.progress.message(note)
                asked = sum(phase.updates for phase in self.phases)
                if asked < self.updates:
                    self.progress.message(f"{asked:,} updates become {self.updates:,}: whole stretches of {self.stretch:,}")
                while self.fitter.update < self.updates and not self._interrupts:
                    self._go_on()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        if self._interrupts:
            print(f"stopped at update {self.fitter.update:,}; go on with: python launch.py {as_word('resume', self.folder)}")
            return INTERRUPTED
        return 0

    def close(self) -> None:
        """Ends logs and the dashboard."""
        self._lock.close()
        self.log.close()
        self.dashboard.close()

    def _go_on(self) -> None:
        """One stretch. Ctrl-C ends it early; what was learned is saved all the same."""
        seed_everything(derive_seed(self.settings["seed"], self.iteration, "fit"))
        self.iteration += 1
        row: dict[str, Any] = {}
        try:
            row = self._learn(min(self.fitter.update + self.stretch, self.updates))
        except NonFiniteLoss:  # the model stands at its last good state
            self._save()
            raise
        if not self._interrupts:
            with forked_seed(derive_seed(self.settings["seed"], self.iteration, "heldout")):
                row |= self._judge()
        if row:
            self._write(row)
        self._save()
        write_report(self.folder)

    def _learn(self, stop: int) -> dict[str, Any]:
        """Updates up to number `stop`, with a row of metrics now and then; the last row comes back unwritten."""
        every = max(1, self.stretch // ROWS)
        row: dict[str, Any] = {}
        began, last = time.perf_counter(), self.fitter.update
        while self.fitter.update < stop and not self._interrupts:
            phase, ends = self._phase()
            self.fitter.retune(phase.batch_size, phase.learning_rate, self._window(phase))
            if self.simulates:
                self.model.horizon = phase.horizon
            for tick in self.fitter.run(min(stop, ends)):
                self.progress.update(tick.update)
                if tick.update % every == 0 or tick.update == stop or self._interrupts:
                    if row:
                        self._write(row)
                    now = time.perf_counter()
                    row = {f"fit/{name}": float(value) for name, value in tick.metrics.items()}
                    row |= {"fit/update": tick.update, "fit/updates_per_second": (tick.update - last) / max(now - began, 1e-9)}
                    row |= {"fit/learning_rate": phase.learning_rate} | ({"fit/horizon": phase.horizon} if self.simulates else {})
                    began, last = now, tick.update
                if self._interrupts:
                    break
        return row

    def _phase(self) -> tuple[Phase, int]:
        """The phase that the next update belongs to, and the number of its last update. What rounding adds belongs to the last phase."""
        ends = 0
        for phase in self.phases:
            ends += phase.updates
            if self.fitter.update < ends:
                return phase, ends
        return self.phases[-1], self.updates

    def _window(self, phase: Phase) -> int | None:
        """Transitions of a clip: what was asked for, or as few as the simulator can learn from; None for models of single frames."""
        if not self.simulates:
            return None
        return phase.window_steps or self.model.context_frames - 1 + phase.horizon

    def _judge(self) -> dict[str, float]:
        """Figures on what the model was not fitted to, and pictures."""
        found: dict[str, float] = {}
        if self.simulates:
            source, context = self.held or self.fitted, self.model.context_frames
            steps = min(max(HORIZONS), max(part.stop - part.start for part in source.ranges))
            seen = rollout(self.model, source.spread_clips(HELDOUT_CLIPS, context - 1 + steps, context - 1), steps)
            error, (moving, count) = squared_error(seen.frames, seen.truth), moving_error(seen.frames, seen.truth, seen.before)
            for horizon in (horizon for horizon in HORIZONS if horizon <= steps and seen.weights[:, horizon - 1].any()):
                weights, kind = seen.weights[:, horizon - 1], "heldout" if self.held else "seen"
                mean = (weights * error[:, horizon - 1]).sum() / weights.sum()
                of_moving = (weights * moving[:, horizon - 1]).sum() / (weights * count[:, horizon - 1]).sum().clamp(min=1)
                found[f"fit/{kind}_psnr_{horizon}"] = float(psnr(mean))
                found[f"fit/{kind}_moving_error_{horizon}"] = float(of_moving)
            write_rollouts(self.folder, seen)
        elif self.held is not None:
            found["fit/heldout_bits_per_dim"] = heldout_bits(self.model, self.held)
        write_pictures(self.model, self.held or self.fitted, self.folder)
        for picture in sorted((self.folder / "images").glob("*.png")):
            self.dashboard.image(f"fit/{picture.stem}", picture, 0)
        return found

    def _write(self, row: Mapping[str, Any]) -> None:
        self.row = dict(row)
        whole = {"frames": 0, "iteration": self.iteration, **row}
        self.log.write(whole)
        self.dashboard.log(whole)
        shown = {name.removeprefix("fit/"): value for name, value in row.items() if name.endswith("_loss") or "psnr_1" in name}
        self.progress.update(self.fitter.update, **dict(list(shown.items())[:3]))

    def _fitter(self) -> Fitter:
        first = self.phases[0]
        knobs = {"optimiser": self.knobs["optimiser"], "precision": self.knobs["precision"], "updates": self.updates}
        knobs["warmup_updates"] = self.knobs["warmup_updates"]
        knobs["clip_lead"] = self.model.context_frames - 1 if self.simulates else 0
        return Fitter(self.model, self.fitted, first.batch_size, first.learning_rate, clip_steps=self._window(first), **knobs)

    def _save(self) -> None:
        state = {
            "fingerprint": self._fingerprint(),
            "frames": 0,
            "iteration": self.iteration,
            "stretch": self.stretch,
            "obs_shape": list(self.data.obs_shape),
            "num_actions": self.data.num_actions,
            "parts": self.data.checksums,
            "world": {key: self.data.source.get(key) for key in ("env", "protocol")},
            "logs": dict(self.log.position()),
            "model": dict(self.model.state_dict()),
            "fitter": self.fitter.state_dict(),
        }
        checkpoint.save(self.folder, state)

    def _found(self, folder: Path) -> Mapping[str, Any] | None:
        """The last checkpoint's state; None, so that the fit starts anew, where there is none yet."""
        try:
            loaded = checkpoint.load(folder)
        except checkpoint.NoCheckpoint:
            self._notes.append(f"{folder} was stopped before its first checkpoint, so it starts anew")
            return None
        self._notes += loaded.warnings
        check_fingerprint(loaded.state.get("fingerprint"), self._unfinished(), folder)
        self.iteration, self.stretch = loaded.state["iteration"], loaded.state["stretch"]
        return loaded.state

    def _fingerprint(self) -> str:
        return fingerprint(self._unfinished())

    def _unfinished(self) -> dict[str, Any]:
        """What a resumed fit may not change: its settings but for the number of updates, and what it is fitted to."""
        return {**self.settings, "fit": {key: value for key, value in self.knobs.items() if key != "updates"}, "data": self.data.checksums}

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self._interrupts += 1
        if self._interrupts > 1:
            raise KeyboardInterrupt
        self.progress.message("stopping: what was learned is saved (once more: stop at once)")
