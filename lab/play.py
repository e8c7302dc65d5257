"""job=play: a page on this machine where a person plays a world, beside its learned simulator, or watches an agent."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
import webbrowser
from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig

from envs.api import UserError
from lab.configure import plain
from lab.play_server import PlayServer
from lab.play_session import MOST_RATE, Session
from lab.play_stage import Stage, make_stage
from lab.run import derive_seed

MOST_TABS = 64


def run(cfg: DictConfig) -> int:
    """Loads what is played, opens the page, and serves it until Ctrl-C."""
    settings = plain(cfg)
    knobs = checked(settings["play"])
    stage = make_stage(settings)
    first = Session(stage, 0)  # what is compiled where it is first used is compiled before the page opens
    first.advance()
    first.close()
    asyncio.run(_serve(stage, settings["seed"], knobs))
    return 0


def checked(knobs: Any) -> dict[str, Any]:
    """The knobs of play.*. UserError for a value of another kind."""
    if not isinstance(knobs, Mapping):
        raise UserError(f"play is a group of keys (play.NAME=value), got {knobs}")
    for key, most, words in (
        ("port", 65_535, "a port, from 1 to 65535, or null for any that is free"),
        ("rate", MOST_RATE, f"steps a second, a whole number from 1 to {MOST_RATE}, or null for the world's own pace"),
        ("tabs", MOST_TABS, f"a whole number from 1 to {MOST_TABS}"),
    ):
        value = knobs[key]
        whole = isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most
        if not whole and not (value is None and key != "tabs"):
            raise UserError(f"play.{key} is {words}, got {value}")
    if not isinstance(knobs["open"], bool):
        raise UserError(f"play.open must be true or false, got {knobs['open']}")
    return dict(knobs)


def make_server(stage: Stage, seed: int, knobs: Mapping[str, Any]) -> PlayServer:
    """A server of sessions on the stage; each tab's randomness follows from the seed and the tab's number."""

    def session(number: int) -> Session:
        return Session(stage, derive_seed(seed, number, "play"), knobs["rate"])

    return PlayServer(f"{stage.kind.name} · Reverie", session, knobs["tabs"])


async def _serve(stage: Stage, seed: int, knobs: Mapping[str, Any]) -> None:
    server, ended = make_server(stage, seed, knobs), asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, ended.set)
    address = await server.start(knobs["port"])
    for offer in stage.offers:
        print(f"simulator {offer.label}")
    if stage.player:
        print(f"agent    {stage.player.label}")
    print(f"play     {address} (Ctrl-C ends it)", flush=True)
    if knobs["open"] and _has_screen():
        threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()
    await ended.wait()
    await server.close()
    print("ended", flush=True)


def _has_screen() -> bool:
    """Whether there is a desktop: without one a browser would take over the terminal, if there is any."""
    return sys.platform == "darwin" or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
