"""Tests of servercontrol.py: its sections in their order, then end to end, then its layout.

    make test                                      all of them
    .venv/bin/python -m pytest -k TestHttpParser   some of them
    .venv/bin/python test_servercontrol.py echo --port 9001    an echo server on the module's
                                                   own codec, for conformance suites
    .venv/bin/python test_servercontrol.py bench   figures beside the `websockets` package

Pure sections are tested as tables (name, bytes, expected): each case is fed whole, byte by byte
and with a tail. End to end means a real server process on free ports, real children and clients
that are not ours: http.client, curl, the `websockets` package, Node. A test that waits, waits
for an event with a deadline.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, Callable, Iterator, NamedTuple

import servercontrol as sc

try:
    import pytest
except ImportError:  # the echo server needs nothing but the module
    pytest = None  # type: ignore[assignment]

HERE = Path(__file__).resolve().parent
SCRIPT = HERE / "servercontrol.py"
# How long anything may take that should happen at once, on a machine that is busy.
PATIENCE_SECONDS = 20.0


# Shared pieces ───────────────────────────────────────────────────────────────────────────────


def wait_until(condition: Callable[[], Any], seconds: float = PATIENCE_SECONDS) -> Any:
    """Return the first true value of the condition; fail when the time is over."""
    end = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


class Answer(NamedTuple):
    """An HTTP answer as http.client read it; header names in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body.decode("utf-8"))


class ServerProcess:
    """A real server on free loopback ports, with a state folder of its own.

    with ServerProcess(tmp_path, "--interval", "0.1") as server: ...

    At the end it must stop by SIGTERM with status 0 and must not have written a traceback, unless
    `check` is set to False.
    """

    def __init__(
        self,
        state: Path,
        *options: str,
        env: dict[str, str] | None = None,
        python: str = sys.executable,
        prefix: tuple[str, ...] = (),
        script: str = str(SCRIPT),
        **popen: Any,
    ) -> None:
        ports = ("--port=0", "--ws-port=0", "--discovery-port=0", "--log-format=json")
        self.command = [*prefix, python, script, *ports, *options]
        self.env = {**os.environ, "XDG_STATE_HOME": str(state), **(env or {})}
        self.popen = popen
        self.check = True
        self.records: list[dict[str, Any]] = []
        self.stderr: list[str] = []

    def __enter__(self) -> ServerProcess:
        self.process = subprocess.Popen(
            self.command,
            env=self.env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            **self.popen,
        )
        self.reader = threading.Thread(target=self._read_log, daemon=True)
        self.reader.start()
        listening = self.wait_for_log("listening")
        self.pid = listening["pid"]
        self.port = int(listening["http"].rpartition(":")[2])
        self.ws_port = int(listening["ws"].rpartition(":")[2])
        discovery = listening["discovery"]
        self.discovery_port = int(discovery.rpartition(":")[2]) if discovery else None
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if self.process.poll() is None:
            self.process.terminate()
        try:
            status = self.process.wait(PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            status = "killed: it did not stop"
        self.reader.join(PATIENCE_SECONDS)
        assert self.process.stderr is not None
        self.process.stderr.close()
        if self.check and kind is None:
            assert status == 0
            assert not [line for line in self.stderr if "Traceback" in line or "never retr" in line]

    def _read_log(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.stderr.append(line.decode("utf-8", "replace"))
            with contextlib.suppress(ValueError):
                self.records.append(json.loads(line))

    def log(self, event: str) -> list[dict[str, Any]]:
        """Return the log records of one event so far."""
        return [record for record in list(self.records) if record["event"] == event]

    def wait_for_log(self, event: str) -> dict[str, Any]:
        """Return the first log record of an event, when it comes."""

        def found() -> list[dict[str, Any]]:
            dead = self.process.poll() is not None and not self.reader.is_alive()
            records = self.log(event)
            assert records or not dead, "".join(self.stderr)
            return records

        return wait_until(found)[0]

    def request(
        self, method: str, path: str, body: bytes | str | None = None, **headers: str
    ) -> Answer:
        """Send one request on a connection of its own. Header names with _ for -."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_SECONDS)
        with contextlib.closing(connection):
            data = body.encode("utf-8") if isinstance(body, str) else body
            names = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, data, names)
            answer = connection.getresponse()
            fields = {name.lower(): value for name, value in answer.getheaders()}
            return Answer(answer.status, fields, answer.read())

    def get(self, path: str) -> Any:
        """Return the JSON of a GET that must succeed."""
        answer = self.request("GET", path)
        assert answer.status == 200, answer
        return answer.json()

    def run(self, command: str, **fields: Any) -> dict[str, Any]:
        """Run a command with `?wait` and return the answer."""
        body = json.dumps({"cmd": command, **fields})
        answer = self.request("POST", "/exec?wait", body, Content_Type="application/json")
        assert answer.status == 200, answer
        return answer.json()

    def start(self, command: str, **fields: Any) -> str:
        """Start a command and return its task id."""
        body = json.dumps({"cmd": command, **fields})
        answer = self.request("POST", "/exec", body, Content_Type="application/json")
        assert answer.status == 200, answer
        return answer.json()["task_id"]

    def task(self, task_id: str) -> dict[str, Any]:
        """Return what /tasks says about one task."""
        return self.get(f"/tasks?id={task_id}")

    def wait_for_end(self, task_id: str) -> dict[str, Any]:
        """Return what /tasks says about a task once it has ended."""
        return wait_until(
            lambda: (lambda t: t if t["state"] != "running" else None)(self.task(task_id))
        )

    def connect(self, port: int | None = None) -> socket.socket:
        """Return a TCP connection to the HTTP port."""
        return socket.create_connection(("127.0.0.1", port or self.port), PATIENCE_SECONDS)

    def exchange(self, data: bytes, port: int | None = None) -> bytes:
        """Send bytes and return everything that comes back until the server closes."""
        with self.connect(port) as connection:
            connection.sendall(data)
            return read_all(connection)

    def websocket(self, path: str = "/", **options: Any) -> Any:
        """Return a connection of the `websockets` package."""
        from websockets.sync.client import connect

        options.setdefault("max_size", None)
        return connect(f"ws://127.0.0.1:{self.ws_port}{path}", compression=None, **options)

    def descriptors(self) -> int:
        """Return how many descriptors the server has open."""
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def resident_kib(self) -> int:
        """Return the server's resident memory."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0])


def read_all(connection: socket.socket) -> bytes:
    """Return what comes until the other side closes; a reset counts as closing."""
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while True:
            data = connection.recv(65536)
            if not data:
                break
            received += data
    return received


def receive_events(websocket: Any, until: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
    """Return the events of a `websockets` connection up to the first that `until` accepts."""
    events: list[dict[str, Any]] = []
    while not events or not until(events[-1]):
        events.append(json.loads(websocket.recv(timeout=PATIENCE_SECONDS)))
    return events


def is_complete(task_id: str) -> Callable[[dict[str, Any]], bool]:
    """For receive_events: the end of a task."""
    return lambda event: event["type"] == "task_complete" and event["task_id"] == task_id


if pytest is not None:

    def loops() -> list[str]:
        return ["asyncio"] + (["uvloop"] if sc.uvloop is not None else [])

    @pytest.fixture(scope="class", params=loops())
    def server(request: Any, tmp_path_factory: Any) -> Iterator[ServerProcess]:
        """A server with default options, shared by the tests of a class; once per event loop."""
        state = tmp_path_factory.mktemp("state")
        with ServerProcess(state, f"--loop={request.param}") as server:
            yield server


# An echo server, for conformance suites ──────────────────────────────────────────────────────


async def serve_echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Echo the messages of one WebSocket client, on the module's own handshake and codec."""
    parser = sc.HttpParser()
    head = None
    while head is None:
        data = await reader.read(65536)
        if not data:
            return writer.close()
        parser.feed(data)
        head = parser.next_head()
    writer.write(sc.encode_upgrade_response(head, sc.check_upgrade(head)))
    websocket = sc.WebSocketConnection(max_message_bytes=32 * sc.MIB, max_fragments=sys.maxsize)
    data = parser.take_rest()
    while websocket.state is sc.WebSocketState.OPEN:
        for opcode, payload in websocket.receive(data):
            echo = {sc.Opcode.PING: sc.Opcode.PONG}.get(opcode, opcode)
            raw = payload.encode("utf-8") if isinstance(payload, str) else payload
            if opcode not in (sc.Opcode.CLOSE, sc.Opcode.PONG):
                writer.write(websocket.encode(echo, raw))
        writer.write(websocket.take_outgoing())
        await writer.drain()
        if websocket.state is sc.WebSocketState.OPEN:
            data = await reader.read(65536)
            if not data:
                break
    writer.close()


async def run_echo(port: int) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, sc.HttpError):
            await serve_echo(reader, writer)

    server = await asyncio.start_server(serve, "127.0.0.1", port)
    print("ready", flush=True)
    async with server:
        await server.serve_forever()


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    echo = commands.add_parser("echo", help="serve a WebSocket echo server")
    echo.add_argument("--port", type=int, required=True)
    options = parser.parse_args(argv)
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(run_echo(options.port))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
