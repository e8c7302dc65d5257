"""Headless Chromium, driven through its DevTools protocol: what tests of pages need of it, and no more."""

import base64
import json
import shutil
import subprocess
import time
from pathlib import Path

from websockets.sync.client import connect

NAMES = ("chromium", "chromium-browser", "google-chrome")
ARGUMENTS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-extensions",
    "--disable-background-networking",
    "--disable-component-update",
    "--remote-debugging-port=0",
)
PATIENCE = 60.0


def find() -> str | None:
    """The program, or None where there is none."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class Browser:
    """A browser with a folder of its own; `page` opens tabs."""

    def __init__(self, folder: Path):
        command = [find(), *ARGUMENTS, f"--user-data-dir={folder}", "about:blank"]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        told = folder / "DevToolsActivePort"
        until = time.monotonic() + PATIENCE
        while not (told.exists() and len(told.read_text().split()) == 2):
            assert self._process.poll() is None, "chromium ended at once"
            assert time.monotonic() < until, "chromium does not start"
            time.sleep(0.05)
        port, path = told.read_text().split()
        self._opens = connect(f"ws://127.0.0.1:{port}{path}", max_size=None, open_timeout=PATIENCE)
        self._socket = self._opens.__enter__()
        self._last = 0

    def call(self, method: str, session: str | None = None, **parameters):
        """Runs one command of the protocol and returns its result."""
        self._last += 1
        told = {"id": self._last, "method": method, "params": parameters} | ({"sessionId": session} if session else {})
        self._socket.send(json.dumps(told))
        while True:
            said = json.loads(self._socket.recv(timeout=PATIENCE))
            if said.get("id") == self._last:
                assert "error" not in said, f"{method}: {said.get('error')}"
                return said["result"]

    def page(self, address: str, width: int = 1280, height: int = 800, scheme: str = "light", dots: float = 1.0) -> "Page":
        return Page(self, address, width, height, scheme, dots)

    def close(self) -> None:
        self._opens.__exit__(None, None, None)
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class Page:
    """A tab in a window of its own, so that none is in the background."""

    def __init__(self, browser: Browser, address: str, width: int, height: int, scheme: str, dots: float):
        self._browser = browser
        self._target = browser.call("Target.createTarget", url="about:blank", newWindow=True)["targetId"]
        self._session = browser.call("Target.attachToTarget", targetId=self._target, flatten=True)["sessionId"]
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=dots, mobile=width < 500)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.call("Emulation.setFocusEmulationEnabled", enabled=True)
        self.call("Page.navigate", url=address)

    def call(self, method: str, **parameters):
        return self._browser.call(method, self._session, **parameters)

    def evaluate(self, script: str):
        """The value of a JavaScript expression."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found.get("exceptionDetails")
        return found["result"].get("value")

    def wait(self, script: str, seconds: float = PATIENCE):
        """Waits until an expression holds, and returns its value."""
        until = time.monotonic() + seconds
        while True:
            value = self.evaluate(script)
            if value:
                return value
            assert time.monotonic() < until, f"still not: {script}"
            time.sleep(0.02)

    def key(self, code: str, down: bool) -> None:
        self.call("Input.dispatchKeyEvent", type="rawKeyDown" if down else "keyUp", code=code, key=code.removeprefix("Key").lower())

    def press(self, code: str) -> None:
        self.key(code, True)
        self.key(code, False)

    def click(self, selector: str) -> None:
        """A click of the pointer in the middle of an element."""
        box = self.evaluate(f"(b => [b.x + b.width / 2, b.y + b.height / 2])(document.querySelector({selector!r}).getBoundingClientRect())")
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button="left", clickCount=1)

    def picture(self, name: str) -> list[int]:
        """RGBA values of a canvas."""
        canvas = f"document.querySelector('[data-name={name}] canvas')"
        return self.evaluate(f"(c => [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data])({canvas})")

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def close(self) -> None:
        self._browser.call("Target.closeTarget", targetId=self._target)
