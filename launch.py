"""The one door: `python launch.py agent=episodic_control env=Pong`. Composes the configuration and starts a job."""

from __future__ import annotations

import importlib
import os
import signal
import sys
from types import FrameType

INTERRUPTED = 130
SMALLER = "; lower agent.batch_size, fit.batch_size, num_envs or whatever else is large"
# Threads of OpenMP that have nothing to do sleep sooner (libgomp's default is up to a million turns) and leave the processors to the
# emulators' threads. Read when torch is loaded, which happens further down.
os.environ.setdefault("GOMP_SPINCOUNT", "5000")


def main(argv: list[str] | None = None) -> int:
    """Starts the job that the words ask for. Returns 0; 2 after a user's mistake; 1 where training failed; 130 after Ctrl-C."""
    words = sys.argv[1:] if argv is None else argv
    try:
        return _start(words)
    except BrokenPipeError:  # whoever read the output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as trouble:
        place = f"{trouble.filename}: " if trouble.filename else ""
        return _refuse(f"{place}{trouble.strerror or trouble}; make room or choose another place, what was saved before is kept")
    except FloatingPointError as failure:
        return _refuse(str(failure), code=1)
    except KeyboardInterrupt:
        return _refuse("stopped; what was saved before is kept", code=INTERRUPTED)


def _start(words: list[str]) -> int:
    from envs.api import UserError
    from lab.configure import compose, within_memory
    from lab.explain import explain

    if any(word in ("-h", "--help", "help") for word in words):
        print(explain(), flush=True)
        return 0
    try:
        cfg = compose(words)
        job = importlib.import_module(f"lab.{cfg.job}")
        with within_memory(f"job={cfg.job}", SMALLER):
            return job.run(cfg) or 0
    except UserError as mistake:
        return _refuse(str(mistake))


def _refuse(text: str, code: int = 2) -> int:
    print(f"error: {' '.join(text.split())}" if code != INTERRUPTED else text, file=sys.stderr)
    return code


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _interrupt)
    sys.exit(main())
