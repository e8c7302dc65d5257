"""Stages of job=play for tests: simulators that are exact, or remember what they are told, and a server to talk to."""

import asyncio
import json
import math
import threading
from contextlib import contextmanager
from functools import cache
from threading import Lock

import torch
from websockets.sync.client import connect

from lab.configure import build, compose, plain
from lab.play import make_server
from lab.play_picture import unpack
from lab.play_stage import Offer, Stage
from lab.play_worlds import kind_of

KNOBS = {"port": None, "open": False, "rate": None, "tabs": 3}
PATIENCE = 30.0


@cache
def settings(*words):
    return plain(compose(["job=play", *words]))


def stage(*words, simulators=(), player=None, lives_end=False):
    offers = tuple(Offer(type(one).__name__, one, 0, lives_end) for one in simulators)
    return Stage(kind_of([settings(*words)]), offers, player, Lock())


class ExactChain:
    """The corridor of `envs.toy.Chain`, foretold exactly from the last of K frames. It keeps every clip that it is shown."""

    def __init__(self, length=8, context_frames=1, ends_at=None):
        self.length, self.context_frames, self.ends_at = length, context_frames, ends_at or length - 1
        self.side = math.isqrt(length - 1) + 1
        self.obs_shape = (1, self.side, self.side)
        self.shown = []

    def start(self, clip):
        self.shown.append(clip)
        return (clip.frames[:, -1].flatten(1).argmax(1),)

    def step(self, state, action):
        position = (state[0] + 2 * action - 1).clamp(min=0)
        frame = torch.zeros(1, self.side**2, dtype=torch.uint8)
        frame[0, position] = 255
        ended = position == self.ends_at
        return (position,), frame.view(1, *self.obs_shape), ended.float(), (~ended).float()


@cache
def small_feedforward(obs_shape, num_actions):
    """An untrained simulator of the sizes that configs/model/small_feedforward.yaml gives it."""
    node = plain(compose(["job=fit", "simulator=small_feedforward", "data=none"]))["simulator"]
    return build(node, "simulator", obs_shape=obs_shape, num_actions=num_actions, device=torch.device("cpu"))


@contextmanager
def served(on, **knobs):
    """A server in a thread of its own; yields it once it listens."""
    ready, ends = threading.Event(), {}

    async def serve():
        ends["loop"], ends["stop"] = asyncio.get_running_loop(), asyncio.Event()
        ends["server"] = make_server(on, 0, KNOBS | knobs)
        ends["address"] = await ends["server"].start(None)
        ready.set()
        await ends["stop"].wait()
        await ends["server"].close()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    assert ready.wait(PATIENCE)
    try:
        yield ends["server"]
    finally:
        ends["loop"].call_soon_threadsafe(ends["stop"].set)
        thread.join(PATIENCE)
        assert not thread.is_alive()


class Tab:
    """What a page does, in the test's own words."""

    def __init__(self, port, host="127.0.0.1", origin=None):
        address = f"{host}:{port}"
        self._opens = connect(f"ws://{address}/play", origin=origin or f"http://{address}", max_size=None, open_timeout=PATIENCE)
        self.hello = None

    def __enter__(self):
        self.socket = self._opens.__enter__()
        told = json.loads(self.socket.recv(timeout=PATIENCE))
        self.error = told.get("error")
        self.hello = told.get("hello")
        if self.hello:
            self.facts, self.pictures = self.shown()
        return self

    def __exit__(self, *trouble):
        self._opens.__exit__(*trouble)

    def say(self, **said):
        self.socket.send(json.dumps(said))

    def shown(self):
        """The next moment: (facts, pictures)."""
        packed = self.socket.recv(timeout=PATIENCE)
        assert isinstance(packed, bytes), packed
        self.facts, self.pictures = unpack(packed)
        return self.facts, self.pictures

    def until(self, holds):
        """The first moment from here on of which `holds(facts)` is true."""
        while not holds(self.facts):
            self.shown()
        return self.facts

    def told(self):
        """The next line of text."""
        while True:
            text = self.socket.recv(timeout=PATIENCE)
            if isinstance(text, str):
                return json.loads(text)
