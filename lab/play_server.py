"""The server of job=play: one page, and a WebSocket a tab, on this machine alone."""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http import HTTPStatus

from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response

from envs.api import UserError
from lab.play_page import page
from lab.play_session import Session

HOST = "127.0.0.1"
NAMES = (HOST, "localhost")
MOST_SAID_BYTES, MOST_WAITING = 4096, 64  # of what a tab says: in one message, and messages not yet heeded
CLOSE_SECONDS = 0.5
TRY_LATER, FAILED = 1013, 1011  # close codes of WebSockets


class PlayServer:
    """Every tab has a session of its own, on a thread of its own, that ends when the tab goes. Other sites and names are refused.

    Args:
        title: of the page.
        make_session: tab number, from 0 -> its session; called on the tab's thread.
        most_tabs: open at the same time.
    """

    def __init__(self, title: str, make_session: Callable[[int], Session], most_tabs: int) -> None:
        self._make_session, self._most_tabs = make_session, most_tabs
        self._html, self._policy = page(title)
        self._tabs = self._numbers = self.port = 0
        self._server: Server | None = None
        self._log = logging.getLogger("reverie.play")  # of refused handshakes and the like: nothing for a terminal
        self._log.propagate = False
        self._log.addHandler(logging.NullHandler())

    async def start(self, port: int | None) -> str:
        """Listens on a port (None: any that is free), and returns the page's address. UserError where the port cannot be had."""
        try:
            self._server = await serve(
                self._tab,
                HOST,
                port or 0,
                process_request=self._answer,
                compression=None,
                server_header=None,
                max_size=MOST_SAID_BYTES,
                close_timeout=CLOSE_SECONDS,
                logger=self._log,
            )
        except OSError as trouble:
            why = "another program has it" if trouble.errno == errno.EADDRINUSE else str(trouble.strerror or trouble)
            raise UserError(f"play.port={port}: {why}; choose another, or null for any that is free") from trouble
        self.port = next(iter(self._server.sockets)).getsockname()[1]
        return f"http://{HOST}:{self.port}"

    async def close(self) -> None:
        """Ends all sessions. A browser that has connected and says nothing, as they do to be quick, is not waited for."""
        if self._server is not None:
            self._server.close()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._server.wait_closed(), CLOSE_SECONDS)

    def _answer(self, connection: ServerConnection, request: Request) -> Response | None:
        """The page, a refusal, or None for a WebSocket that may open. A name other than ours may be another site's that points here."""
        hosts = request.headers.get_all("Host")
        if len(hosts) != 1 or hosts[0].lower() not in [f"{name}:{self.port}" for name in NAMES]:
            return connection.respond(HTTPStatus.FORBIDDEN, f"this page is http://{HOST}:{self.port} and goes by no other name\n")
        path = request.path.partition("?")[0]
        if path == "/play":
            origins = request.headers.get_all("Origin")
            if len(origins) == 1 and origins[0] in [f"http://{name}:{self.port}" for name in NAMES]:
                return None
            return connection.respond(HTTPStatus.FORBIDDEN, "only the page itself may play\n")
        if path != "/":
            return connection.respond(HTTPStatus.NOT_FOUND, f"there is nothing here but http://{HOST}:{self.port}\n")
        response = connection.respond(HTTPStatus.OK, self._html)
        del response.headers["Content-Type"]
        for name, value in {
            "Content-Type": "text/html; charset=utf-8",
            "Content-Security-Policy": f"{self._policy}; connect-src {' '.join(f'ws://{name}:{self.port}' for name in NAMES)}",
            "Cross-Origin-Resource-Policy": "same-origin",
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-store",
        }.items():
            response.headers[name] = value
        return response

    async def _tab(self, connection: ServerConnection) -> None:
        """One tab, until it goes."""
        if self._tabs >= self._most_tabs:
            text = f"{self._tabs} tabs are open already, and play.tabs={self._most_tabs} is the most; close one and reload"
            await _tell(connection, text, TRY_LATER)
            return
        self._tabs += 1
        number, self._numbers = self._numbers, self._numbers + 1
        said: asyncio.Queue[str | bytes] = asyncio.Queue(MOST_WAITING)
        thread = ThreadPoolExecutor(1, f"tab-{number}")
        playing = asyncio.create_task(self._play(connection, thread, number, said))
        try:
            with suppress(ConnectionClosed):
                async for word in connection:
                    await said.put(word)
        finally:
            playing.cancel()
            with suppress(asyncio.CancelledError):
                await playing
            self._tabs -= 1
            thread.shutdown(wait=False)

    async def _play(self, connection: ServerConnection, thread: ThreadPoolExecutor, number: int, said: asyncio.Queue[str | bytes]) -> None:
        """Makes a session and plays it. What goes wrong in it is told to the tab, in one line, and ends it."""
        made: list[Session] = []

        def make() -> Session:
            made.append(self._make_session(number))
            return made[0]

        try:
            session = await asyncio.get_running_loop().run_in_executor(thread, make)
            await connection.send(json.dumps({"hello": session.hello()}))
            await _clock(connection, thread, session, said)
        except ConnectionClosed:
            pass
        except Exception as trouble:
            told = str(trouble) if isinstance(trouble, UserError) else f"{type(trouble).__name__}: {trouble}"
            print(f"a tab ended: {_line(told)}", file=sys.stderr, flush=True)
            await _tell(connection, f"{told}; reload to play on", FAILED)
        finally:
            thread.submit(_close, made)  # after whatever it still does


async def _clock(connection: ServerConnection, thread: ThreadPoolExecutor, session: Session, said: asyncio.Queue[str | bytes]) -> None:
    """Steps a session at its rate, heeds what its tab says at once, and shows every change."""
    loop = asyncio.get_running_loop()
    last, words = loop.time(), list[str | bytes]()
    await connection.send(await loop.run_in_executor(thread, session.show))
    while True:
        due = last + 1 / session.rate
        wait = max(0.0, due - loop.time()) if session.running else None
        with suppress(TimeoutError):
            async with asyncio.timeout(wait):
                words.append(await said.get())
        while not said.empty():
            words.append(said.get_nowait())
        now = loop.time()
        mistakes, stepped = await loop.run_in_executor(thread, _heed, session, words, now >= last + 1 / session.rate)
        if stepped:
            last = beat(last, now, session.rate)
        for mistake in mistakes:
            await connection.send(json.dumps({"mistake": mistake}))
        if stepped or words:
            await connection.send(await loop.run_in_executor(thread, session.show))
        words.clear()


def beat(last: float, now: float, rate: int) -> float:
    """When, in seconds, the step that was taken at `now` was due, the one before it having been due at `last`.

    A step that is a little late makes the next one no later; what is late by more than a step is not made up for.
    """
    return max(last + 1 / rate, now - 1 / rate)


def _heed(session: Session, words: list[str | bytes], due: bool) -> tuple[list[str], bool]:
    """Does what the tab says, then the step that is due. Returns what was not understood, and whether a step was taken."""
    mistakes = []
    for word in words:
        try:
            session.do(json.loads(word))
        except UserError as mistake:
            mistakes.append(_line(mistake))
        except (ValueError, RecursionError):
            mistakes.append("a tab speaks JSON")
    if due and session.running:
        session.advance()
        return mistakes, True
    return mistakes, False


def _close(made: list[Session]) -> None:
    for session in made:
        session.close()


async def _tell(connection: ServerConnection, text: str, code: int) -> None:
    """The last line that a tab is told."""
    with suppress(ConnectionClosed):
        await connection.send(json.dumps({"error": _line(text)}))
        await connection.close(code)


def _line(text: object) -> str:
    return " ".join(str(text).split())[:300]
