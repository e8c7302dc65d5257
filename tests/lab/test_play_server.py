"""The server of job=play: tabs that play, who is refused, and how it ends."""

import http.client
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from playing import KNOBS, PATIENCE, ExactChain, Tab, served, stage
from websockets.exceptions import ConnectionClosed, InvalidStatus

import launch
from envs.api import UserError
from lab.play import checked
from lab.play_page import page
from lab.play_server import beat
from lab.play_session import Session

ROOT = Path(__file__).parent.parent.parent
LEFT, RIGHT = "ArrowLeft", "ArrowRight"


@pytest.fixture(scope="module")
def chain():
    """A corridor beside two simulators, the first of which is exact."""
    on = stage("env=Chain", "env.length=900", "env.max_steps=0", simulators=[ExactChain(900), ExactChain(900, ends_at=3)])
    with served(on, rate=60) as server:
        yield server


def place(tab):
    return list(tab.pictures["truth"]).index(255)


def get(server, path="/", **headers):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)
    connection.putrequest("GET", path, skip_host="Host" in headers)
    for name, value in headers.items():
        connection.putheader(name, value)
    connection.endheaders()
    answer = connection.getresponse()
    body = answer.read().decode()
    connection.close()
    return answer, body


# playing


def test_keys_move_the_picture_of_both_worlds(chain):
    with Tab(chain.port) as tab:
        assert place(tab) == 0
        tab.say(keys=[RIGHT])
        tab.until(lambda facts: facts["step"] >= 3)
        tab.say(keys=[])
        tab.until(lambda facts: not facts["running"])
        steps = tab.facts["step"]
        assert place(tab) == steps
        assert tab.pictures["simulated"] == tab.pictures["truth"]
        assert tab.facts["simulator"]["psnr"] == 100.0
        tab.say(keys=[LEFT])
        tab.until(lambda facts: facts["step"] > steps)
        assert place(tab) == steps - 1


def test_reset_pause_step_switch_and_sync(chain):
    with Tab(chain.port) as tab:
        tab.say(paused=True)
        tab.say(keys=[RIGHT])
        for step in (1, 2, 3):
            tab.say(do="step")
            tab.until(lambda facts, step=step: facts["step"] == step)
        time.sleep(0.1)
        tab.say(simulator=1)
        tab.until(lambda facts: facts["simulator"]["index"] == 1)
        assert tab.facts["step"] == 3  # the key is held, and time stands still
        assert tab.facts["simulator"]["ahead"] == 0
        tab.say(keys=[LEFT])
        tab.say(do="step")
        tab.say(keys=[RIGHT])
        tab.say(do="step")
        tab.until(lambda facts: facts["step"] == 5)
        assert tab.facts["simulator"]["over"]
        tab.say(do="sync")
        tab.until(lambda facts: not facts["simulator"]["over"])
        assert tab.facts["simulator"]["ahead"] == 0
        tab.say(keys=[])
        tab.say(do="reset")
        tab.until(lambda facts: facts["episode"] == 2)
        assert (tab.facts["step"], place(tab)) == (0, 0)


def test_the_clock_keeps_the_rate():
    with served(stage("env=Catch"), rate=20) as server, Tab(server.port) as tab:
        tab.say(goes_on=True)
        began = time.monotonic()
        for _ in range(30):
            tab.shown()
        first = time.monotonic() - began
        tab.say(rate=60)
        tab.until(lambda facts: facts["rate"] == 60)
        began = time.monotonic()
        for _ in range(30):
            tab.shown()
        second = time.monotonic() - began
    assert 1.3 < first < 2.2
    assert second < 0.9


def test_late_steps_are_made_up_for_but_not_by_more_than_one():
    assert beat(1.0, 1.12, 10) == pytest.approx(1.1)
    assert beat(1.0, 1.55, 10) == pytest.approx(1.45)


def test_every_tab_plays_episodes_of_its_own_which_follow_from_the_seed():
    def openings():
        with served(stage("env=Catch", "env.size=50")) as server, Tab(server.port) as one, Tab(server.port) as other:
            return one.pictures["truth"], other.pictures["truth"]

    one, other = openings()
    assert one != other
    assert (one, other) == openings()


def test_two_tabs_are_two_worlds(chain):
    with Tab(chain.port) as one, Tab(chain.port) as other:
        one.say(keys=[RIGHT])
        one.until(lambda facts: facts["step"] >= 2)
        other.say(simulator=1)
        other.until(lambda facts: facts["simulator"]["index"] == 1)
        assert (other.facts["step"], place(other)) == (0, 0)
        assert one.facts["simulator"]["index"] == 0
        other.say(paused=True)
        one.until(lambda facts: facts["step"] >= 4 and not facts["paused"])


def test_a_slow_tab_does_not_hold_up_another():
    class Slow(ExactChain):
        def step(self, state, action):
            time.sleep(0.3 if int(action[0]) else 0)
            return super().step(state, action)

    with (
        served(stage("env=Chain", "env.max_steps=0", simulators=[Slow()]), rate=60) as server,
        Tab(server.port) as slow,
        Tab(server.port) as quick,
    ):
        slow.say(keys=[RIGHT])
        slow.say(do="step")
        began = time.monotonic()
        quick.say(paused=True)
        quick.until(lambda facts: facts["paused"])
        assert time.monotonic() - began < 0.25


def test_more_tabs_than_allowed_are_told_and_a_place_is_free_again():
    with served(stage("env=Chain"), tabs=1) as server:
        with Tab(server.port), Tab(server.port) as late:
            assert late.error == "1 tabs are open already, and play.tabs=1 is the most; close one and reload"
            with pytest.raises(ConnectionClosed):
                late.socket.recv(timeout=PATIENCE)
        until = time.monotonic() + PATIENCE
        while True:
            with Tab(server.port) as again:
                if again.hello:
                    break
            assert time.monotonic() < until


def test_a_session_ends_with_its_tab(monkeypatch):
    closed = threading.Event()

    class Closing(Session):
        def close(self):
            super().close()
            closed.set()

    monkeypatch.setattr("lab.play.Session", Closing)
    with served(stage("env=Chain")) as server:
        with Tab(server.port):
            assert any(thread.name.startswith("tab-") for thread in threading.enumerate())
            assert not closed.is_set()
        assert closed.wait(PATIENCE)
        until = time.monotonic() + PATIENCE
        while any(thread.name.startswith("tab-") for thread in threading.enumerate()):
            assert time.monotonic() < until
            time.sleep(0.02)


def test_what_is_not_understood_is_one_line_and_play_goes_on(chain):
    with Tab(chain.port) as tab:
        for text, why in (
            ('{"rate":0}', "from 1 to 60"),
            ("jump", "JSON"),
            ("[" * 3000, "JSON"),
            ("NaN", "a tab says"),
            ("{}", "a tab says"),
        ):
            tab.socket.send(text)
            told = tab.told()["mistake"]
            assert why in told
            assert "\n" not in told
        tab.say(do="reset")
        tab.until(lambda facts: facts["episode"] == 2)
        tab.socket.send("x" * 5000)
        with pytest.raises(ConnectionClosed):
            tab.told()


def test_an_error_in_a_session_is_one_line_on_its_page_alone(capfd):
    class Broken(ExactChain):
        def step(self, state, action):
            raise RuntimeError("the weights\nare gone")

    with served(stage("env=Chain", simulators=[Broken()])) as server, Tab(server.port) as tab, Tab(server.port) as other:
        tab.say(keys=[RIGHT])
        assert tab.told() == {"error": "RuntimeError: the weights are gone; reload to play on"}
        with pytest.raises(ConnectionClosed):
            tab.told()
        other.say(do="reset")
        other.until(lambda facts: facts["episode"] == 2)
    assert capfd.readouterr().err.splitlines() == ["a tab ended: RuntimeError: the weights are gone"]


# who is let in


def test_the_page_loads_nothing_and_only_talks_to_its_server(chain):
    for name in ("127.0.0.1", "LocalHost"):
        answer, body = get(chain, Host=f"{name}:{chain.port}")
        assert answer.status == 200
        assert answer.getheader("Content-Type") == "text/html; charset=utf-8"
    policy = answer.getheader("Content-Security-Policy")
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert policy.endswith(f"connect-src ws://127.0.0.1:{chain.port} ws://localhost:{chain.port}")
    assert not re.findall(r"https?://(?!www\.w3\.org/2000/svg)", body)  # the name of a language, not an address
    assert not re.findall(r'(src|href)="(?!data:)', body)
    assert "<!--" not in body
    assert get(chain, "/favicon.ico")[0].status == 404


def test_the_title_is_escaped():
    html, _ = page("<script>&")
    assert "<title>&lt;script&gt;&amp;</title>" in html


@pytest.mark.parametrize("host", ["evil.example", "evil.example:{port}", "127.0.0.1", "127.0.0.1:1", "127.0.0.1.evil.example:{port}", ""])
def test_other_names_are_refused(chain, host):
    """As a page of another site gets here, whose name was made to point to this machine."""
    answer, body = get(chain, Host=host.format(port=chain.port))
    assert answer.status == 403
    assert body.count("\n") == 1
    with pytest.raises(InvalidStatus) as refused, Tab(chain.port, origin=f"http://{host.format(port=chain.port)}"):
        pass
    assert refused.value.response.status_code == 403


def test_two_names_are_refused(chain):
    with socket.create_connection(("127.0.0.1", chain.port)) as bare:
        lines = ("GET / HTTP/1.1", f"Host: 127.0.0.1:{chain.port}", "Host: evil.example")
        bare.sendall("\r\n".join((*lines, "", "")).encode())
        assert b" 403 " in bare.recv(4096).splitlines()[0]


def test_other_origins_and_none_are_refused(chain):
    for origin in (f"https://127.0.0.1:{chain.port}", "http://127.0.0.1:1", "http://localhost", "null", "file://"):
        with pytest.raises(InvalidStatus), Tab(chain.port, origin=origin):
            pass
    with socket.create_connection(("127.0.0.1", chain.port)) as bare:
        lines = ("GET /play HTTP/1.1", f"Host: 127.0.0.1:{chain.port}", "Connection: Upgrade", "Upgrade: websocket")
        keys = ("Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==")
        bare.sendall("\r\n".join((*lines, *keys, "", "")).encode())
        assert b" 403 " in bare.recv(4096).splitlines()[0]
    with Tab(chain.port, host="localhost") as tab:
        assert tab.hello["world"] == "Chain"


# the job


def test_the_job_serves_this_machine_alone_and_ends_at_once_on_ctrl_c(tmp_path):
    command = [sys.executable, "launch.py", "job=play", "env=Catch", "play.rate=5"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline()
        port = int(re.fullmatch(r"play     http://127\.0\.0\.1:(\d+) \(Ctrl-C ends it\)\n", line)[1])
        listening = [found.laddr for found in psutil.Process(process.pid).net_connections() if found.status == psutil.CONN_LISTEN]
        assert [tuple(address) for address in listening] == [("127.0.0.1", port)]
        with Tab(port) as tab:
            assert tab.hello["world"] == "Catch"
            assert tab.facts["rate"] == 5
            began = time.monotonic()
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=PATIENCE)
            assert time.monotonic() - began < 10  # 1 where nothing else runs
        assert (process.returncode, out, err) == (0, "ended\n", "")
    finally:
        process.kill()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["play.port=0"], "play.port is a port, from 1 to 65535"),
        (["play.speed=1"], "no key"),
        (["agent=a3c"], "nothing to choose with agent="),
        (["env=Catch", "env.size=1"], "size must be at least 3"),
        (["env=Catch", "env.depth=1"], "there is no key env.depth"),
        (["against=[runs/a]"], "against= goes with run="),
        (["against=3"], "against is a list"),
        (["data=clips"], "data= goes with run="),
        (["run=nowhere"], "no such folder"),
        (["run=nowhere", "env=Pong"], "env=Pong: run= has its own world"),
    ],
)
def test_mistakes_are_one_line(capsys, words, expected):
    assert expected in refused(capsys, *words)


def test_a_port_that_another_has_is_named(capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        told = refused(capsys, "env=Chain", f"play.port={port}")
    assert f"play.port={port}: another program has it; choose another" in told


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("port", 65_536, "play.port is a port"),
        ("port", True, "play.port is a port"),
        ("rate", 61, "play.rate is steps a second"),
        ("rate", 1.5, "play.rate is steps a second"),
        ("tabs", 0, "play.tabs is a whole number"),
        ("tabs", None, "play.tabs is a whole number"),
        ("open", "maybe", "play.open must be true or false"),
    ],
)
def test_knobs_that_are_wrong_are_named(key, value, expected):
    with pytest.raises(UserError, match=expected):
        checked({**KNOBS, key: value})


def test_knobs_that_are_right_stay_as_they_are():
    assert checked({**KNOBS, "port": 8080, "rate": 60}) == {**KNOBS, "port": 8080, "rate": 60}
    with pytest.raises(UserError, match="play is a group of keys"):
        checked(3)


def refused(capsys, *words):
    """The one line that the words earn."""
    capsys.readouterr()
    assert launch.main(["job=play", "play.open=false", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line
