"""job=train: iterations of play and learning, each followed by an evaluation, a report and a checkpoint."""

from __future__ import annotations

import shutil
import signal
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from omegaconf import DictConfig

from agents.loop import play, ticks_for
from envs.api import UserError, VectorEnv
from generative.clips import ClipData
from lab import checkpoint, fitting
from lab.actions import ActionLog
from lab.configure import plain
from lab.dashboard import Dashboard
from lab.evaluate import evaluate_agent, mean_return
from lab.folder import as_word, check_fingerprint, find_folder, fingerprint, lock, new_folder, write_config, write_versions
from lab.logging import EVALUATION_FILE, METRICS_FILE, EvaluationLog, MetricsLog, cut_back
from lab.progress import Progress, human_bytes
from lab.report import write_report
from lab.run import (
    check_disk,
    check_memory,
    derive_seed,
    make_agent,
    make_env,
    pick_device,
    seed_everything,
)
from lab.simulators import take_fitted
from lab.summary import summarise
from lab.window import Window

RECENT_EPISODES = 100
INTERRUPTED = 130
SHOWN = ("train/return_mean", "memory/bytes", "memory/entries")


def run(cfg: DictConfig) -> int:
    """Trains a new run, or goes on with `resume`. Returns 0, or 130 where Ctrl-C ended it early."""
    settings = plain(cfg)
    device = pick_device(settings["device"])
    folder = find_folder(settings["resume"], "resume") if settings["resume"] else None
    settings["resume"] = None
    training = Training(settings, device, folder)
    try:
        return training.run()
    finally:
        training.close()


class Training:
    """One run, from nothing or from its last checkpoint to its budget.

    Random state is a function of (seed, iteration), and each iteration plays in a fresh environment, so a run that stops and
    resumes at an iteration's end goes on bit for bit (on the CPU).

    Args:
        settings: the resolved configuration.
        device: of environment tensors, models and agent.
        folder: the run folder to go on with, or None for a new one.
    """

    def __init__(self, settings: dict[str, Any], device: torch.device, folder: Path | None) -> None:
        self.settings, self.device = settings, device
        self.frames = self.iteration = self._interrupts = 0
        self._evaluated, self._warned = True, False
        self.progress: Progress | None = None
        self._evaluation_env: VectorEnv | None = None
        self.recent: deque[float] = deque(maxlen=RECENT_EPISODES)
        self._notes: list[str] = []
        self.env = make_env(settings, settings["num_envs"], device)
        self._frames_per_tick = self.env.num_envs * self.env.spec.frames_per_step
        self._frames_per_iteration = ticks_for(settings["frames_per_iteration"], self.env) * self._frames_per_tick
        seed_everything(self._seed("build"))
        self.agent, self.models = make_agent(settings, self.env.spec, device)
        taken = ["encoder", *(["simulator"] if not getattr(self.agent, "fits_simulator", False) else [])]
        if settings["fit"]["path"] and not folder and not any(fitting.needs_fit(self.models.get(job)) for job in taken):
            raise UserError(
                "fit.path is a fitted encoder or simulator, and nothing here takes one: choose one that is fitted, or leave fit.path out"
            )
        if not folder:
            self._take_simulator()
        self._announce_resources(folder)
        self.folder = folder or new_folder(settings, f"{settings['choices']['agent']}-{settings['choices']['env']}")
        self._lock = lock(self.folder)
        if folder:
            cut_back(folder, self._restore(folder))
        write_versions(self.folder, device)
        self.log, self.evaluations = MetricsLog(self.folder), EvaluationLog(self.folder)
        self._dashboard: Dashboard | None = None
        if settings["wandb"] not in ("auto", "offline") or settings["tensorboard"]:
            self._connect()  # what can be refused is refused before the first frame
        if folder:
            write_config(folder, settings)

    def run(self) -> int:
        """Plays whole iterations until the budget is spent. Returns the exit code."""
        handlers = {number: signal.signal(number, self._interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
        budget, each, fresh = self.settings["frames"], self._frames_per_iteration, not self.frames
        title = f"{self.settings['choices']['agent']} on {self.env.spec.name}"
        try:
            if fresh:
                self._fit()
            if self._interrupts:
                return self._stopped()
            whole = self.frames + -(-max(0, budget - self.frames) // each) * each
            with Progress(whole, title) as self.progress:
                for note in self._notes:
                    self.progress.message(note)
                self.progress.message(f"run folder {self.folder}" + (f", going on at {self.frames:,} frames" if self.frames else ""))
                if self.frames >= budget:
                    self.progress.message(f"frames={budget:,} are played already")
                elif whole > budget:
                    self.progress.message(f"frames={budget:,} becomes {whole:,}: whole iterations of {each:,}")
                if fresh:
                    self._evaluated = not self.settings["evaluation"]["before"]
                    if self.frames:
                        self._save()
                if not self._evaluated:
                    self._evaluate()
                write_report(self.folder)
                while self.frames < budget and not self._interrupts:
                    self._iterate()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        if self._interrupts:
            return self._stopped()
        print(summarise(self.folder, self.settings, list(self.recent)))
        return 0

    def _stopped(self) -> int:
        print(f"stopped at {self.frames:,} frames; go on with: python launch.py {as_word('resume', self.folder)}")
        return INTERRUPTED

    @property
    def dashboard(self) -> Dashboard:
        """Connected at its first use, not at the start: that takes seconds."""
        return self._dashboard or self._connect()

    def _connect(self) -> Dashboard:
        self._dashboard = Dashboard(self.folder, self.settings["wandb"], self.settings, self.settings["tensorboard"], say=self._say)
        for note in self._dashboard.notes:
            self._say(note)
        return self._dashboard

    def close(self) -> None:
        """Ends emulators, logs and the dashboard."""
        self._lock.close()
        self.env.close()
        if self._evaluation_env is not None:
            self._evaluation_env.close()
        self.log.close()
        self.evaluations.close()
        if self._dashboard is not None:
            self._dashboard.close()

    def _take_simulator(self) -> None:
        """Where the agent's simulator must be fitted, and the agent does not do so itself, takes a fitted one from fit.path."""
        simulator = self.models.get("simulator")
        if fitting.needs_fit(simulator) and not getattr(self.agent, "fits_simulator", False):
            self._notes += take_fitted(simulator, self.settings, self.env.spec)

    def _fit(self) -> None:
        """Iteration 0: where the agent's encoder must be fitted, collects random play and fits it, or takes a fitted one from fit.path."""
        encoder = self.models.get("encoder")
        if encoder is None or not fitting.needs_fit(encoder):
            return
        knobs = self.settings["fit"]
        if knobs["path"]:
            fitting.load_fitted(encoder, knobs["path"])
            return
        shards, played = self.folder / "frames", 0
        shutil.rmtree(shards, ignore_errors=True)
        seed_everything(self._seed("collect"))
        with Progress(knobs["frames"], "random play for the encoder") as self.progress:
            for played in fitting.collect_random(self.env, self.device, knobs["frames"], self._seed("env"), shards):
                self.progress.update(played)
                if self._interrupts:
                    return
        seed_everything(self._seed("fit"))
        frames = ClipData(shards, self.env.spec.obs_shape, verify=False)
        with Progress(knobs["updates"], "fitting the encoder", "updates") as self.progress:
            for row in fitting.fit_rows(encoder, frames, knobs, self.progress):
                self._write({"frames": played, "iteration": 0, **row})
                if self._interrupts:
                    return
        for picture in fitting.write_pictures(encoder, frames, self.folder):
            self.dashboard.image(f"encoder/{picture.stem}", picture, played)
        shutil.rmtree(shards, ignore_errors=True)
        self.frames = played

    def _iterate(self) -> None:
        """One iteration. Ctrl-C ends it early; what it learned is saved all the same."""
        self.iteration += 1
        seed_everything(self._seed("train"))
        actions = ActionLog() if self.settings.get("record_actions") else None
        window = Window(self.env.num_envs, self.env.spec.frames_per_step, self.device)
        before, logged, every = self.frames, self.frames, self.settings["log_frames"]
        ticks = play(self.env, self.agent, self.settings["frames_per_iteration"], self._seed("env"))
        for tick in ticks:
            window.add(tick)
            if actions is not None:
                actions.add(tick.decision.action)
            if self._interrupts:
                with suppress(StopIteration):
                    tick = ticks.send(True)
                    window.add(tick)
                    if actions is not None:
                        actions.add(tick.decision.action)
            self.frames = before + tick.played
            self._show()
            if self.frames - logged >= every:
                logged = self.frames
                self._log(window)
        if logged != self.frames:
            self._log(window)
        idle = window.lanes_without_episode()
        if idle and not self._warned and not self._interrupts:
            self._warned = True
            self._say(f"{idle} of {self.env.num_envs} lanes finished no episode in this iteration; raise frames_per_iteration")
        if actions is not None:
            actions.write(self.folder, self.iteration)
        self._evaluated = False
        if not self._interrupts:
            self._evaluate()
        every_iterations = (self.settings["checkpoint_frames"] or 1) // self.settings["frames_per_iteration"] or 1
        if self._interrupts or self.iteration % every_iterations == 0 or self.frames >= self.settings["frames"]:
            self._save()
        write_report(self.folder)

    def _log(self, window: Window) -> None:
        row, returns = window.row()
        self.recent.extend(returns)
        self._write({"frames": self.frames, "iteration": self.iteration, **row})
        shown = {name: value for name, value in row.items() if name.startswith("time/") or name in SHOWN}
        self._show(**shown)

    def _write(self, row: Mapping[str, Any]) -> None:
        self.log.write(row)
        self.dashboard.log(row)

    def _evaluate(self) -> None:
        video = self.folder / "videos" / f"iteration-{self.iteration:04d}.mp4" if self.settings["evaluation"]["video"] else None
        if self._evaluation_env is None:
            lanes = self.settings["evaluation"]["num_envs"]
            self._evaluation_env = make_env(self.settings, lanes, self.device, for_evaluation=True)
        env, agent, at = self._evaluation_env, self.agent, (self.frames, self.iteration)
        rows = evaluate_agent(self.settings, env, agent, self.device, *at, video, self._stopping)
        if not rows:
            return
        self._evaluated = True
        self.evaluations.write(rows)
        score = mean_return(rows)
        self.dashboard.log({"frames": self.frames, "iteration": self.iteration, "evaluation/return_mean": score})
        if video and video.exists():
            self.dashboard.video("evaluation/video", video, self.frames)
        self._say(f"score {score:,.1f} at {self.frames:,} frames ({len(rows)} episodes)")
        self._show(score=score)

    def _save(self) -> None:
        state = {
            "fingerprint": fingerprint(self.settings),
            "frames": self.frames,
            "iteration": self.iteration,
            "evaluated": self._evaluated,
            "recent": list(self.recent),
            "logs": dict(self.log.position()),
            "agent": self.agent.state_dict(),
        }
        checkpoint.save(self.folder, state)

    def _restore(self, folder: Path) -> Mapping[str, int]:
        """Takes up the last checkpoint and returns where the logs stood; without one the run starts anew."""
        try:
            loaded = checkpoint.load(folder)
        except checkpoint.NoCheckpoint:
            self._notes.append(f"{folder} was stopped before its first checkpoint, so it starts anew")
            for name in (METRICS_FILE, EVALUATION_FILE):
                if (folder / name).exists():
                    (folder / name).replace(folder / f"{name}.old")
            self._take_simulator()
            return {}
        self._notes += loaded.warnings
        state = loaded.state
        check_fingerprint(state.get("fingerprint"), self.settings, folder)
        self.frames, self.iteration, self._evaluated = state["frames"], state["iteration"], state.get("evaluated", True)
        self.recent.extend(state["recent"])
        self.agent.load_state_dict(state["agent"])
        return state["logs"]

    def _announce_resources(self, folder: Path | None) -> None:
        """Says what the agent's memory and its checkpoints will grow to. UserError where that is more than is free."""
        budget = self.settings["frames"] + self._frames_per_iteration
        of_lanes = getattr(self.agent, "lane_bytes", lambda num_envs: 0)(self.env.num_envs)
        needed = self.agent.required_bytes(budget // self.env.spec.frames_per_step) + of_lanes
        check_memory(needed, self.device, f"lower agent.capacity{', agent.visit_frames' if of_lanes else ''} or frames")
        rollout_bytes = getattr(self.agent, "rollout_bytes", lambda num_envs: 0)(self.env.num_envs)
        check_memory(needed + rollout_bytes, self.device, "lower planner.plan_steps, agent.n_steps or num_envs")
        check_disk(3 * needed, folder or Path(self.settings["runs_dir"]))  # two checkpoints, and the one that is being written
        if needed:
            disk = human_bytes(2 * needed)
            self._notes.append(f"the agent's memory grows to at most {human_bytes(needed)}, its two checkpoints to {disk}")

    def _seed(self, purpose: str) -> int:
        return derive_seed(self.settings["seed"], self.iteration, purpose)

    def _stopping(self) -> bool:
        """Asked at every step of an evaluation, which may last: keeps the view alive, and says whether to stop."""
        self._show()
        return self._interrupts > 0

    def _show(self, **values: Any) -> None:
        if self.progress is not None:
            self.progress.update(self.frames, **values)

    def _say(self, text: str) -> None:
        if self.progress is None:
            self._notes.append(text)
        else:
            self.progress.message(text)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self._interrupts += 1
        if self._interrupts > 1:
            for again in (signal.SIGINT, signal.SIGTERM):
                signal.signal(again, signal.SIG_IGN)
            raise KeyboardInterrupt
        self._say("stopping: what is under way ends here and is saved (once more: stop at once)")
