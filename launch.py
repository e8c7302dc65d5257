"""The one door: `python launch.py agent=episodic_control env=Pong`. Composes the configuration and starts a job."""

from __future__ import annotations

import errno
import importlib
import sys

EXPLAINED_OS_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST)


def main(argv: list[str] | None = None) -> int:
    """Starts the job that the words ask for. Returns 0; 2 after a user's mistake; 1 where training failed; 130 after Ctrl-C."""
    words = sys.argv[1:] if argv is None else argv
    from lab.configure import compose, explain

    if any(word in ("-h", "--help", "help") for word in words):
        print(explain())
        return 0
    from envs.api import UserError

    try:
        cfg = compose(words)
        job = importlib.import_module(f"lab.{cfg.job}")
        return job.run(cfg) or 0
    except UserError as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        return 2
    except OSError as trouble:
        if trouble.errno not in EXPLAINED_OS_ERRORS:
            raise
        print(f"error: {trouble.strerror}: {trouble.filename or 'while writing'}; choose another place with runs_dir=", file=sys.stderr)
        return 2
    except FloatingPointError as failure:
        print(f"error: {failure}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
