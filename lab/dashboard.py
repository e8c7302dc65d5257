"""Live dashboards: Weights & Biases and TensorBoard. They look on; no failure of theirs ever stops a run."""

from __future__ import annotations

import math
import netrc
import os
import random
import secrets
import socket
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from envs.api import UserError

MODES = ("auto", "online", "offline", "off")
PROBE_SECONDS = 4.0
INIT_SECONDS = 30.0
FINISH_SECONDS = 60.0
FIT_STEP = "fit/update"


class Dashboard:
    """Sends rows, images and videos to Weights & Biases (`frames` is every chart's x-axis) and, where asked for, to TensorBoard.

    The run id lies in the run folder (wandb/id), so a resumed run continues the same curve, online and offline.

    Attributes:
        notes: lines that a user should read at the start, such as "no network, going on offline".
        mode: what Weights & Biases does: online, offline or off.
        url: the run's page, where online.
    """

    def __init__(
        self,
        folder: Path | str,
        mode: str | bool = "auto",
        config: Mapping[str, Any] | None = None,
        tensorboard: bool = False,
        say: Callable[[str], None] = print,
    ) -> None:
        """Connects.

        Args:
            folder: the run folder; everything is kept below it.
            mode: auto (online where a login exists, else offline), online, offline or off (also False, which is YAML's reading of off).
            config: the resolved configuration, shown beside the curves.
            tensorboard: also write event files to folder/tensorboard.
            say: told, in one line and once, when Weights & Biases fails later on.

        Raises:
            UserError: an unknown mode, online without a login, or TensorBoard that is not installed.
        """
        self.folder, self._say = Path(folder), say
        self.notes: list[str] = []
        self.url: str | None = None
        self._run: Any = None
        self._wandb: Any = None
        self._tensorboard: Any = None
        self._make_writer = _tensorboard_writer() if tensorboard else None
        self.mode = {False: "off", True: "auto"}.get(mode, str(mode)) if isinstance(mode, bool) else str(mode)
        if self.mode not in MODES:
            raise UserError(f"wandb must be one of {', '.join(MODES)}, got {mode}")
        if self.mode != "off":
            self._quietly(lambda: self._connect(dict(config or {})))

    def log(self, row: Mapping[str, Any]) -> None:
        """One row of metrics (name -> number or 0-d tensor) with its `frames`. Names and numbers that are None are left out."""
        numbers = {name: float(value) for name, value in row.items() if value is not None and not isinstance(value, str)}
        if self._run is not None:
            self._quietly(lambda: self._send(numbers))
        if self._make_writer is not None:
            self._quietly(lambda: self._write_scalars(numbers))

    def image(self, name: str, path: Path | str, frames: int) -> None:
        """A picture file, under `name`, at `frames`."""
        if self._run is not None:
            self._quietly(lambda: self._send({"frames": frames, name: self._wandb.Image(str(path))}))

    def video(self, name: str, path: Path | str, frames: int) -> None:
        """An mp4 file, under `name`, at `frames`. It is passed on as it is, never decoded."""
        if self._run is not None:
            self._quietly(lambda: self._send({"frames": frames, name: self._wandb.Video(str(path), format="mp4")}))

    def close(self) -> None:
        """Waits a bounded time for uploads; what did not get through can be sent later by `wandb sync`. Twice is harmless."""
        run, self._run = self._run, None
        if run is not None:
            self._quietly(run.finish)
        writer, self._tensorboard, self._make_writer = self._tensorboard, None, None
        if writer is not None:
            self._quietly(writer.close)

    def _connect(self, config: dict[str, Any]) -> None:
        os.environ.setdefault("WANDB_SILENT", "true")
        os.environ.setdefault("WANDB_DISABLE_WEAVE", "true")  # it takes our `agents` for a library of chat agents, and advertises
        import wandb

        self._wandb = wandb
        address = os.environ.get("WANDB_BASE_URL") or wandb.setup().settings.base_url
        if self.mode == "auto":
            self.mode = "online" if has_login(address) else "offline"
        elif self.mode == "online" and not has_login(address):
            raise UserError("wandb=online needs a login: run `wandb login` once, or choose wandb=offline or wandb=off")
        if self.mode == "online" and not reachable(address):
            self._go_offline(f"{urlsplit(address).hostname} does not answer")
        if self.mode == "online":
            try:
                self._run = self._start(config)
                self.url = getattr(self._run, "url", None)
                self.notes.append(f"Weights & Biases: {self.url}")
            except Exception as trouble:
                self._go_offline(" ".join(str(trouble).split())[:200])
        if self._run is None:
            self._run = self._start(config)
        self._run.define_metric("*", step_metric="frames")
        self._run.define_metric(FIT_STEP)
        self._run.define_metric("fit/*", step_metric=FIT_STEP)

    def _go_offline(self, why: str) -> None:
        self.mode = "offline"
        self.notes.append(f"Weights & Biases goes on offline ({why}); send it later with: wandb sync {self.folder / 'wandb'}/offline-run-*")

    def _start(self, config: dict[str, Any]) -> Any:
        place = self.folder / "wandb"
        place.mkdir(parents=True, exist_ok=True)
        if not (place / "id").exists():
            (place / "id").write_text(secrets.token_hex(6))
        return self._wandb.init(
            project=os.environ.get("WANDB_PROJECT") or "reverie",
            name=self.folder.resolve().name,
            id=(place / "id").read_text().strip(),
            resume="allow",
            dir=str(self.folder),
            mode=self.mode,
            config=config,
            settings=self._wandb.Settings(
                silent=True,
                console="off",
                disable_code=True,
                disable_git=True,
                x_save_requirements=False,
                init_timeout=INIT_SECONDS,
                finish_timeout=FINISH_SECONDS,
            ),
        )

    def _send(self, values: dict[str, Any]) -> None:
        """Steps only ever grow, also across resumes, or Weights & Biases would drop the row; so the count lies in the run folder."""
        place = self.folder / "wandb" / "step"
        try:
            step = int(place.read_text())
        except (OSError, ValueError):
            step = 0
        step = max(step, int(self._run.step)) + 1
        place.write_text(str(step))
        self._run.log(values, step=step)

    def _write_scalars(self, numbers: dict[str, float]) -> None:
        frames = int(numbers.get("frames", 0))
        if self._tensorboard is None and self._make_writer is not None:
            self._tensorboard = self._make_writer(str(self.folder / "tensorboard"), purge_step=frames)
        for name, value in numbers.items():
            if name not in {"frames", "iteration"} and not math.isnan(value):
                self._tensorboard.add_scalar(name, value, int(numbers.get(FIT_STEP, frames)) if name.startswith("fit/") else frames)

    def _quietly(self, work: Callable[[], Any]) -> None:
        """Does `work`; its failure costs the dashboard and not the run. Random numbers drawn on the way do not change the run's."""
        state = random.getstate()
        try:
            work()
        except UserError:
            raise
        except Exception as trouble:
            self._run = self._tensorboard = self._make_writer = None
            self.mode = "off"
            line = f"the dashboard stopped, the run goes on ({type(trouble).__name__}: {' '.join(str(trouble).split())[:200]})"
            self._say(line)
        finally:
            random.setstate(state)


def has_login(address: str) -> bool:
    """Whether a login for the server at `address` lies in the environment or in a netrc file, as `wandb login` leaves it."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    named = os.environ.get("NETRC")
    for path in [Path(named)] if named else [Path.home() / ".netrc", Path.home() / "_netrc"]:
        try:
            if netrc.netrc(path.expanduser()).authenticators(urlsplit(address).hostname or ""):
                return True
        except (OSError, netrc.NetrcParseError, ValueError):
            continue
    return False


def reachable(address: str, seconds: float = PROBE_SECONDS) -> bool:
    """Whether the server at `address` (or the proxy that leads there) takes a connection within `seconds`, name look-up included."""
    parts = urlsplit(address)
    proxy = getproxies().get(parts.scheme)
    if proxy and not proxy_bypass(parts.hostname or ""):
        parts = urlsplit(proxy if "//" in proxy else f"http://{proxy}")
    answers: list[bool] = []

    def knock() -> None:
        try:
            port = parts.port or (443 if parts.scheme == "https" else 80)
            socket.create_connection((parts.hostname or "", port), timeout=seconds).close()
            answers.append(True)
        except (OSError, ValueError):
            answers.append(False)

    thread = threading.Thread(target=knock, daemon=True)
    thread.start()
    thread.join(seconds)
    return bool(answers and answers[0])


def _tensorboard_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError("tensorboard=true needs the package tensorboard: pip install tensorboard, or leave tensorboard=false") from error
    return SummaryWriter
