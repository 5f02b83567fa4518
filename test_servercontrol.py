"""Tests of servercontrol.py: its sections in their order, then end to end, then its layout.

    make test                                      all of them
    .venv/bin/python -m pytest -k TestHttpParser   some of them
    .venv/bin/python test_servercontrol.py echo --port 9001    an echo server on the module's
                                                   own codec, for conformance suites
    .venv/bin/python test_servercontrol.py bench   figures beside two peers
    .venv/bin/python test_servercontrol.py fuzz    mutated and random input, for two minutes

Pure sections are tested as tables (name, bytes, expected): each case is fed whole, byte by byte
and with a tail. End to end means a real server process on free ports, real children and clients
that are not ours: http.client, curl, the `websockets` package, Node, Chromium. A test that waits,
waits for an event with a deadline.
"""

from __future__ import annotations

import argparse
import ast
import asyncio
import atexit
import base64
import codecs
import concurrent.futures
import contextlib
import ctypes
import dataclasses
import datetime
import errno
import fcntl
import functools
import gc
import gzip
import hashlib
import http.client
import http.server
import importlib.metadata
import importlib.util
import inspect
import io
import ipaddress
import itertools
import json
import math
import multiprocessing
import operator
import os
import platform
import pty
import pwd
import py_compile
import random
import re
import resource
import select
import shlex
import shutil
import signal
import socket
import ssl
import stat
import statistics
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
import tokenize
import traceback
import tracemalloc
import unicodedata
import urllib.parse
import warnings
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Callable, NamedTuple
from unittest import mock

import servercontrol as sc

# An echo server, for conformance suites ------------------------------------------------------


async def serve_echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Echo the messages of one WebSocket client, on the module's own handshake and codec."""
    with contextlib.suppress(ConnectionError, EOFError, sc.HttpError), contextlib.closing(writer):
        parser = sc.HttpParser()
        parser.feed(await reader.readuntil(b"\r\n\r\n"))
        head = parser.next_head()
        assert head is not None
        extension, bits = sc.choose_deflate(head)
        writer.write(sc.encode_upgrade_response(head, sc.check_upgrade(head), extension))
        websocket = sc.WebSocketConnection(None, 32 * sc.MIB, sys.maxsize, bits)
        while websocket.state is sc.WebSocketState.OPEN and not reader.at_eof():
            for opcode, payload in websocket.receive(await reader.read(65536)):
                echo = {sc.Opcode.PING: sc.Opcode.PONG}.get(opcode, opcode)
                raw = payload.encode("utf-8") if isinstance(payload, str) else payload
                if opcode not in (sc.Opcode.CLOSE, sc.Opcode.PONG):
                    writer.write(websocket.encode(echo, raw))
            writer.write(websocket.answer)
            await writer.drain()


async def run_echo(port: int) -> None:
    server = await asyncio.start_server(serve_echo, "127.0.0.1", port)
    print("ready", flush=True)
    await server.serve_forever()


if __name__ == "__main__" and sys.argv[1:2] == ["echo"]:
    # Here, since the echo server shall run where nothing but the module is installed.
    command_line = argparse.ArgumentParser(prog="test_servercontrol.py echo")
    command_line.add_argument("--port", type=int, required=True)
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(run_echo(command_line.parse_args(sys.argv[2:]).port))
    sys.exit()

import h11
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from websockets.extensions.permessage_deflate import (
    ClientPerMessageDeflateFactory,
    PerMessageDeflate,
)
from websockets.headers import parse_extension
from websockets.protocol import Protocol, Side

HERE = Path(__file__).resolve().parent
SCRIPT = HERE / "servercontrol.py"
# How long anything may take that should happen at once, on a machine that is busy.
PATIENCE_SECONDS = 60.0


# Shared pieces -------------------------------------------------------------------------------


@functools.cache
def compiled_script() -> str:
    """Return the script as byte code: Python compiles a script anew at each start, which would be
    half of what all tests take. Those of TestRealRun are started from the script itself."""
    folder = tempfile.mkdtemp(prefix="servercontrol-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.chmod(folder, 0o755)  # some servers run as another account
    return str(py_compile.compile(str(SCRIPT), f"{folder}/servercontrol.pyc", doraise=True))


# A process that has imported servercontrol.py and forks into one that runs it whenever it is told
# the arguments (of Python) and the environment. Descriptors 0 to 2 come with that, and one for the
# exit status, which a process between the two waits for. Imports are most of what a start costs.
FORKER = """
import gc, json, os, runpy, signal, socket, sys, time
sys.path.insert(0, sys.argv[1])
import servercontrol
gc.freeze()
channel = socket.socket(fileno=int(sys.argv[2]))
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
while True:
    message, fds, _, _ = socket.recv_fds(channel, 2**20, 4)
    if not message:
        sys.exit()
    if not os.fork():
        break
    for fd in fds:
        os.close(fd)
signal.signal(signal.SIGCHLD, signal.SIG_DFL)
pid = os.fork()
if pid:
    channel.send(b"%d" % pid)
    channel.close()
    for fd in fds[:3]:
        os.close(fd)
    os.write(fds[3], b"%d" % os.waitpid(pid, 0)[1])
    os._exit(0)
for number in range(3):
    os.dup2(fds[number], number)
channel.detach()
os.closerange(3, 1 + max(map(int, os.listdir("/dev/fd"))))
sys.argv, environ = json.loads(message)
os.environ.clear()
os.environ.update(environ)
time.tzset()
sys.stdin, sys.stdout = open(0, closefd=False), open(1, "w", closefd=False)
sys.stderr = open(2, "w", 1, errors="backslashreplace", closefd=False)
if sys.argv[0].endswith(".py"):
    runpy.run_path(sys.argv[0], run_name="__main__")
sys.exit(servercontrol.main())
"""


@functools.cache
def forker() -> socket.socket:
    """Start the forker of this process; it ends with it. Return the channel to it."""
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with its:
        command = [sys.executable, "-c", FORKER, str(HERE), str(its.fileno())]
        subprocess.Popen(command, pass_fds=[its.fileno()])
    return ours


class Forked(subprocess.Popen):  # type: ignore[type-arg]
    """A Popen whose process comes from the forker."""

    lock = threading.Lock()

    def _execute_child(self, command: Any, *more: Any) -> None:
        environ, pipes = more[5], more[9:15]
        fds = [theirs if theirs >= 0 else n for n, theirs in enumerate((pipes[0], *pipes[3::2]))]
        report, end = os.pipe()
        self.report = open(report, "rb", 0)  # noqa: SIM115
        message = json.dumps([command[1:], dict(environ)]).encode()
        with self.lock:
            socket.send_fds(forker(), [message], [*fds, end])
            self.pid = int(forker().recv(64))
        os.close(end)
        self._child_created = True
        self._close_pipe_fds(*pipes)  # type: ignore[attr-defined]

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            ready = select.poll()
            ready.register(self.report)
            if not ready.poll(None if timeout is None else timeout * 1000):
                raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
            with self.report:
                self.returncode = os.waitstatus_to_exitcode(int(self.report.read()))
        return self.returncode

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode


def start_python(command: Sequence[str], env: dict[str, str], **options: Any) -> Any:
    """Start servercontrol.py, or what changes it first; by a fork where that makes no difference."""

    def of_python(environ: Any) -> dict[str, str]:
        return {k: v for k, v in environ.items() if k.startswith(("PYTHON", "LC_", "LANG"))}

    is_ours = command[0] == sys.executable and command[1].endswith((".pyc", "launcher.py"))
    is_plain = options.keys() <= {"stdin", "stdout", "stderr"}
    forks = is_ours and is_plain and of_python(env) == of_python(os.environ)
    return (Forked if forks else subprocess.Popen)(command, env=env, **options)


def wait_until(condition: Any, seconds: float = PATIENCE_SECONDS, pause: float = 0.01) -> Any:
    """Return the first true value of the condition; fail when the time is over."""
    end = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(pause)


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
    `check` is set to False. All its helpers ask over `connect`. With code, or with constants such
    as `PING_SECONDS=1.0`, the module is changed before it runs.
    """

    # What each request shows, such as a token.
    fields: tuple[str, ...] = ()
    context: ssl.SSLContext | None = None

    def __init__(self, state: Path, *options: str, env=None, prefix=(), script="", code="", **more):
        constants = {name: more.pop(name) for name in list(more) if name.isupper()}
        if code or constants:
            script = make_launcher(state, code, **constants)
        ports = ("--port=0", "--ws-port=0", "--discovery-port=0", "--log-format=json")
        self.command = [*prefix, sys.executable, script or compiled_script(), *ports, *options]
        self.env = {**os.environ, "XDG_STATE_HOME": str(state), **(env or {})}
        self.popen = more
        self.check = True
        self.records: list[dict[str, Any]] = []
        self.stderr: list[str] = []

    def __enter__(self) -> ServerProcess:
        nothing, pipe = subprocess.DEVNULL, subprocess.PIPE
        streams = {"stdin": nothing, "stdout": nothing, "stderr": pipe, **self.popen}
        self.process = start_python(self.command, self.env, **streams)
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
        self.process.stderr.close()
        if self.check and kind is None:
            assert status == 0, "".join(self.stderr)
            assert not [line for line in self.stderr if "Traceback" in line or "never retr" in line]

    def _read_log(self) -> None:
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

    def request(self, method: str, path: str, body: Any = None, **headers: str) -> Answer:
        """Send one request on a connection of its own, with `fields`. Header names with _ for -."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port)
        with contextlib.closing(connection):
            connection.sock = self.connect()
            data = body.encode("utf-8") if isinstance(body, str) else body
            names = {name.replace("_", "-"): value for name, value in headers.items()}
            names.update(field.split(": ", 1) for field in self.fields)
            connection.request(method, path, data, names)
            answer = connection.getresponse()
            fields = {name.lower(): value for name, value in answer.getheaders()}
            return Answer(answer.status, fields, answer.read())

    def get(self, path: str) -> Any:
        """Return the JSON of a GET that must succeed."""
        answer = self.request("GET", path)
        assert answer.status == 200, answer
        return answer.json()

    def execute(self, command: str, query: str = "", **fields: Any) -> Answer:
        body = json.dumps({"cmd": command, **fields}, ensure_ascii=False)
        return self.request("POST", f"/exec{query}", body, Content_Type="application/json")

    def run(self, command: str, **fields: Any) -> dict[str, Any]:
        """Run a command with `?wait` and return the answer."""
        answer = self.execute(command, "?wait", **fields)
        assert answer.status == 200, answer
        return answer.json()

    def start(self, command: str, **fields: Any) -> str:
        answer = self.execute(command, **fields)
        assert answer.status == 200, answer
        return answer.json()["task_id"]

    def task(self, task_id: str) -> dict[str, Any]:
        return self.get(f"/tasks?id={task_id}")

    def wait_for_end(self, task_id: str) -> dict[str, Any]:
        """Return what /tasks says about a task once it has ended."""
        wait_until(lambda: self.task(task_id)["state"] != "running")
        return self.task(task_id)

    def finish(self, command: str, **fields: Any) -> str:
        """Start a command, wait for its end and return its task id."""
        return str(self.wait_for_end(self.start(command, **fields))["task_id"])

    @property
    def place(self) -> str:
        return f"127.0.0.1:{self.port}"

    def kill(self) -> None:
        """As if the machine had lost its power: with no goodbye."""
        self.check = False
        self.process.kill()
        self.process.wait()

    def end(self, task_id: str) -> dict[str, Any]:
        """Kill a task and return what /tasks says about it then."""
        assert self.request("POST", f"/kill?id={task_id}").status == 200
        return self.wait_for_end(task_id)

    def connect(self, port: int | None = None) -> socket.socket:
        return socket.create_connection(("127.0.0.1", port or self.port), PATIENCE_SECONDS)

    def exchange(self, data: bytes, port: int | None = None, half_close: bool = False) -> bytes:
        with self.connect(port) as connection:
            connection.sendall(data)
            if half_close:
                connection.shutdown(socket.SHUT_WR)
            return read_all(connection)

    def websocket(self, path: str = "/", **options: Any) -> Any:
        from websockets.sync.client import connect

        options.setdefault("max_size", None)
        # Longer than the server waits for a head: which of the two did not hear the other?
        options.setdefault("open_timeout", PATIENCE_SECONDS)
        options.setdefault("compression", None)
        if self.context:
            options["sock"] = SharedTls(self.connect(self.ws_port))
        return connect(f"ws://127.0.0.1:{self.ws_port}{path}", **options)

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def resident_kib(self) -> int:
        status = Path(f"/proc/{self.pid}/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0])


class SharedTls:
    """A TLS connection for the two threads of a `websockets` client. OpenSSL allows one at a time:
    without this, an answer in 500 is lost on a busy machine, whoever the server is."""

    def __init__(self, tls: socket.socket) -> None:
        self.tls = tls
        self.lock = threading.Lock()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tls, name)

    def sendall(self, data: bytes) -> None:
        with self.lock:
            self.tls.sendall(data)

    def recv(self, size: int) -> bytes:
        while True:
            with self.lock:
                self.tls.setblocking(False)
                try:
                    return self.tls.recv(size)
                except ssl.SSLWantReadError:
                    pass
                finally:
                    self.tls.settimeout(PATIENCE_SECONDS)
            select.select([self.tls], [], [])


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
    return lambda event: event["type"] == "task_complete" and event["task_id"] == task_id


def loops() -> list[str]:
    return ["asyncio"] + (["uvloop"] if sc.uvloop is not None else [])


def in_loop(test: Any) -> Any:
    """Run a coroutine function as a test."""

    @functools.wraps(test)
    def run(*given: Any, **named: Any) -> None:
        asyncio.run(test(*given, **named))

    return run


@pytest.fixture(scope="session", autouse=True)
def hear_signals() -> None:
    """What runs in the background (`make test &`, nohup) ignores these, and so do its children."""
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)


@pytest.fixture(scope="class", params=loops())
def server(request: Any, tmp_path_factory: Any) -> Iterator[ServerProcess]:
    """A server with default options, shared by the tests of a class; once per event loop."""
    state = tmp_path_factory.mktemp("state")
    script = getattr(request.cls, "script", "")
    with ServerProcess(state, f"--loop={request.param}", script=script) as server:
        server.get("/health")  # uvloop opens a spare descriptor with the first connection
        yield server


# Shared pieces of the wire tests -------------------------------------------------------------

ANY_PROPERTY = settings(max_examples=200, deadline=None, database=None)


class Outcome(NamedTuple):
    """What a parser made of some bytes: whole items, and how it ended (None: it would go on)."""

    items: list[Any]
    end: Any


def feed_every_way(parse: Any, data: bytes, tail: bytes, tail_item: Any) -> Outcome:
    """Return what `parse` makes of data: the same whole, byte by byte, and with a tail, which must
    not be understood after the end, and elsewhere give its item."""
    outcome = parse([data])
    assert parse(data[at : at + 1] for at in range(len(data))) == outcome
    if outcome != Outcome([], None):  # half a message would take the tail for its rest
        tail_items = [tail_item] if outcome.end is None else []
        assert parse([data + tail]) == Outcome(outcome.items + tail_items, outcome.end)
    return outcome


def cut_bytes(data: bytes, places: Iterable[int]) -> list[bytes]:
    ends = sorted({place % (len(data) + 1) for place in places})
    return [data[start:end] for start, end in zip([0, *ends], [*ends, len(data)])]


def parametrize_rows(names: str, rows: Iterable[tuple[Any, ...]]) -> Any:
    """One test for each row of a table; a row begins with the name of its case."""
    rows = list(rows)
    values = [row[1:] if "," in names else row[1] for row in rows]
    return pytest.mark.parametrize(names, values, ids=[row[0] for row in rows])


def name_rows(name: str, build: Callable[[Any], bytes], expected: Any, values: Any) -> list[Any]:
    """Return a row for each value: its name, the bytes that build makes of it, what is expected."""
    return [(f"{name} {value!r}", build(value), expected) for value in values]


def status_of(call: Callable[..., Any], *arguments: Any) -> Any:
    """Return what a call returns, or what its error says: an HTTP status, a (close) code."""
    try:
        return call(*arguments)
    except sc.HttpError as error:
        return error.status
    except sc.WebSocketError as error:
        return error.close_code
    except sc.CommandError as error:
        return error.code


def http_message(*lines: str, body: bytes = b"") -> bytes:
    """Return a request of these lines, each as latin-1 with CRLF, and the body."""
    return "".join(line + "\r\n" for line in [*lines, ""]).encode("latin-1") + body


def http_get(*fields: str) -> bytes:
    return http_message("GET / HTTP/1.1", "Host: a", *fields)


def http_post(*fields: str, body: bytes = b"") -> bytes:
    return http_message("POST /exec HTTP/1.1", "Host: localhost", *fields, body=body)


def http_chunked(body: bytes) -> bytes:
    return http_post("Transfer-Encoding: chunked", body=body)


def http_head_of(size: int) -> bytes:
    """Return a request whose head has exactly `size` bytes, in fields of 4 KiB at most."""
    fields = ["x: " + "v" * 2048] * (size // 2053 - 1)
    return http_get(*fields, "x: " + "v" * (size - len(http_get(*fields, "x: "))))


def parse_requests(pieces: Iterable[bytes]) -> Outcome:
    """Run an HttpParser. Items: (head, body). End: the status of its error."""
    parser, items, head = sc.HttpParser(), [], None
    try:
        for piece in pieces:
            parser.feed(piece)
            while True:
                head = head or parser.next_head()
                body = parser.next_body() if head else None
                if body is None:
                    break
                items.append((head, body))
                head = None
    except sc.HttpError as error:
        return Outcome(items, error.status)
    return Outcome(items, None)


def feed_http(data: bytes) -> Outcome:
    tail = sc.RequestHead("GET", "/tail", False, (("host", "tail"),))
    request = http_message("GET /tail HTTP/1.1", "Host: tail")
    return feed_every_way(parse_requests, data, request, (tail, b""))


def parse_head(line: str, *fields: str) -> sc.RequestHead:
    """Return the head of a request line such as `GET /`; HTTP/1.1 unless it says otherwise."""
    parser = sc.HttpParser()
    parser.feed(http_message(line if " HTTP/" in line else line + " HTTP/1.1", *fields))
    head = parser.next_head()
    assert head is not None
    return head


def parse_with_h11(data: bytes) -> Any:
    """Return (method, target, fields, body) as h11 reads the first request, None if it does not."""
    connection = h11.Connection(h11.SERVER, max_incomplete_event_size=sc.MIB)
    connection.receive_data(data)
    try:
        events = [connection.next_event()]
        while isinstance(events[-1], (h11.Request, h11.Data)):
            events.append(connection.next_event())
    except h11.RemoteProtocolError:
        return None
    if not isinstance(events[-1], h11.EndOfMessage):
        return None
    head, body = events[0], b"".join(bytes(event.data) for event in events[1:-1])
    fields = tuple((k.decode("latin-1"), v.decode("latin-1")) for k, v in head.headers)
    return head.method.decode(), head.target.decode(), fields, body


SMALL_ACCEPTED = [
    ("plain", http_get(), "/", b""),
    ("empty lines before", b"\r\n\r\n" + http_get(), "/", b""),
    ("HTTP/1.0", http_message("GET /x HTTP/1.0"), "/x", b""),
    ("query and quotes", http_message('GET /a?b="{|}\\^` HTTP/1.1'), '/a?b="{|}\\^`', b""),
    ("path not decoded", http_message("GET //%65xec/ HTTP/1.1", "Host: a"), "//%65xec/", b""),
    ("odd method", http_message("!#$%&'*+-.^_`|~09 / HTTP/1.1"), "/", b""),
    ("tab and obs-text", http_get("x: a\tb \xff\x80"), "/", b""),
    ("length 0", http_post("Content-Length: 0"), "/exec", b""),
    ("length 5", http_post("Content-Length: 5", body=b"G\r\n\r\n"), "/exec", b"G\r\n\r\n"),
    ("length in spaces", http_post("Content-Length: \t 5 ", body=b"hello"), "/exec", b"hello"),
    ("identity", http_post("Content-Encoding: Identity"), "/exec", b""),
    ("no chunk", http_chunked(b"0\r\n\r\n"), "/exec", b""),
    ("one chunk", http_chunked(b"5\r\nhello\r\n0\r\n\r\n"), "/exec", b"hello"),
    ("hex sizes",
     http_chunked(b"A\r\n0123456789\r\n00b\r\n0\r\n\r\nabcdef\r\n0000000000000000\r\n\r\n"),
     "/exec", b"01234567890\r\n\r\nabcdef"),
    ("chunk extensions", http_chunked(b'1;a="b c"\r\nx\r\n0; \t\xff\r\n\r\n'), "/exec", b"x"),
]  # fmt: skip

FULL_BODY = b"x" * 256 * 1024
EDGE_ACCEPTED = [
    ("Chunked", http_post("transfer-encoding: ChunKed", body=b"0\r\n\r\n"), "/exec", b""),
    ("trailers", http_chunked(b"0\r\nx: y\r\nContent-Length: 9\r\n\r\n"), "/exec", b""),
    ("line of 8 KiB", http_message(f"GET /{'x' * 8178} HTTP/1.1"), "/" + "x" * 8178, b""),
    ("field of 8 KiB", http_get("x:" + "v" * 8190), "/", b""),
    ("100 fields", http_get(*["x: y"] * 99), "/", b""),
    ("head of 32 KiB", http_head_of(32 * 1024), "/", b""),
    ("largest body", http_post("Content-Length: 262144", body=FULL_BODY), "/exec", FULL_BODY),
    ("largest chunk", http_chunked(b"40000\r\n" + FULL_BODY + b"\r\n0\r\n\r\n"), "/exec",
     FULL_BODY),
    ("longest extension", http_chunked(b"0" * 15 + b"1;" + b"e" * 255 + b"\r\nx\r\n0\r\n\r\n"),
     "/exec", b"x"),
    ("longest trailers", http_chunked(b"0\r\nx:" + b"v" * 4090 + b"\r\n\r\n"), "/exec", b""),
]  # fmt: skip

SMUGGLED = b"0\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n"
HTTP_REJECTED = [
    *name_rows("framing", lambda fields: http_post(*fields, body=SMUGGLED), 400, [
        ("Content-Length: 5", "Transfer-Encoding: chunked"),
        ("Content-Length: 5", "Content-Length: 6"),
        ("Transfer-Encoding: chunked", "Content-Length: 5"),
        ("Content-Length: 5", "Content-Length: 5"), ("Content-Length: 5, 5",),
        ("Transfer-Encoding: chunked, chunked",),
        ("Transfer-Encoding: chunked", "Transfer-Encoding: identity")]),
    *name_rows("length", lambda text: http_post(f"Content-Length: {text}", body=b"hello"), 400, [
        "", "+5", "-5", "0x5", "5_0", "5 5", "5.0", "5;", "\xb2", "\xd9\xa5", "\xa05", "five", "\x1f5"]),
    *name_rows("length", lambda text: http_post(f"Content-Length: {text}"), 413,
        ["262145", "9" * 18, "9" * 20]),
    ("length of 5,000 digits", http_post("Content-Length: " + "9" * 5000), 413),
    ("coding on HTTP/1.0",
     http_message("POST / HTTP/1.0", "Transfer-Encoding: chunked", body=SMUGGLED), 400),
    *name_rows("coding", lambda text: http_post(f"Transfer-Encoding: {text}", body=SMUGGLED), 501, [
        "gzip", "gzip, chunked", "identity", "xchunked", "chunked;a", "\xa0chunked", "chun\xe2\x84\xaaed"]),
    *name_rows("coding after", lambda char: http_post(f"Transfer-Encoding: {char}chunked"), 400,
        "\v\f\x1c\0"),
    *name_rows("encoding", lambda text: http_post(f"Content-Encoding: {text}"), 415,
        ["gzip", "identity, gzip"]),
    ("encoding twice", http_post("Content-Encoding: identity", "Content-Encoding: gzip"), 415),
    *name_rows("chunk size", lambda size: http_chunked(size + b"hello\r\n0\r\n\r\n"), 400, [
        b"5\n", *(size + b"\r\n" for size in (
            b"-5", b"+5", b"0x5", b"5_0", b"", b"5 ", b" 5", b"5\t;a", b"0" * 16 + b"5", b"g",
            b"\xb2", b"5,", b"5\r", b"5;a\nb", b"5;a\rb", b"5;\0"))]),
    ("extension too long", http_chunked(b"5;" + b"e" * 256 + b"\r\nhello\r\n0\r\n\r\n"), 400),
    ("extension without end", http_chunked(b"5;" + b"e" * 300), 400),
    *name_rows("chunk then", lambda end: http_chunked(b"5\r\nhello" + end + b"0\r\n\r\n"), 400, [
        b"\n", b"\r", b"XX", b"\rX", b"\n\r", b" \r\n"]),
    *name_rows("chunk too large", http_chunked, 413, [b"40001\r\n", b"ffffffffffffffff\r\n"]),
    ("chunks too large", http_chunked(b"40000\r\n" + FULL_BODY + b"\r\n1\r\n"), 413),
    ("bad trailer", http_chunked(b"0\r\nx y\r\n\r\n"), 400),
    ("trailers too long", http_chunked(b"0\r\n" + b"x: yyyy\r\n" * 456), 431),
    ("trailer too long", http_chunked(b"0\r\nx:" + b"v" * 4091 + b"\r\n\r\n"), 431),
    *name_rows("bytes", bytes, 400, [
        http_get().replace(b"\r\n", b"\n"), b"GET / HTTP/1.1\r\nHost: a\nx: y\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\n\n", b"\n" + http_get(), b"\r" + http_get(), b"GET /\r\n",
        bytes.fromhex("16030100f1010000ed0303"), b"\r\n\x16\x03\x01"]),
    *name_rows("field", http_get, 400, [
        "x: a\rb", "x: a\r", "x: a\0", "x: \a", "x: \x7f", "x: \x1b", " x: y", "\tx: y", "x : y",
        "x\t: y", ": y", "x", "a/b: c", "x y: z", "x\xe9: y", "(x): y", "x\0: y", "x\x7f: y", '"x": y',
        "x: a\r\n b"]),
    ("obs-fold first", http_message("GET / HTTP/1.1", " Host: a"), 400),
    *name_rows("line", lambda line: http_message(line, "Host: a"), 400, [
        "GET", "GET /", "GET / HTTP/1.1 ", "GET\t/\tHTTP/1.1", *(f"{start} HTTP/1.1" for start in (
            "GET *", "GET foo", "CONNECT x:1", "OPTIONS *", "GET http:///", "GET ftp://a/", "GET http://a#", "GET /#", "GET /\1",
            "GET /\x7f", "GET /\xe9", "GET /\t", "GET /\r", "GET  /", "GET / a", "G@T /"))]),
    *name_rows("line", lambda line: http_message(line, "Host: a"), 505, [
        "PRI * HTTP/2.0", "GET / ", *(f"GET / {version}" for version in (
            "HTTP/2.0", "HTTP/1.10", "HTTP/1.2", "HTTP/0.9", "http/1.1", "HTTP/11", "HTTP/1.\xb2",
            "HTTP/1.1\r"))]),
    ("line over 8 KiB", http_message(f"GET /{'x' * 8179} HTTP/1.1"), 414),
    ("line without end", b"GET /" + b"x" * 9000, 414),
    ("field over 8 KiB", http_get("x:" + "v" * 8191), 431),
    ("field without end", http_get()[:-2] + b"x:" + b"v" * 9000, 431),
    ("101 fields", http_get(*["x: y"] * 100), 431),
    ("head over 32 KiB", http_head_of(32 * 1024 + 1), 431),
    ("empty lines without end", b"\r\n" * 16385, 431),
]  # fmt: skip


class TestHttpParser:
    """RFC 9112, 2 to 7: request heads and bodies."""

    @parametrize_rows("data, target, body", SMALL_ACCEPTED + EDGE_ACCEPTED)
    def test_request_is_parsed_when(self, data: bytes, target: str, body: bytes) -> None:
        outcome = feed_http(data)
        assert [(head.target, got) for head, got in outcome.items] == [(target, body)]
        assert outcome.end is None

    @parametrize_rows("data, status", HTTP_REJECTED)
    def test_request_is_refused_when(self, data: bytes, status: int) -> None:
        assert feed_http(data) == Outcome([], status)

    @pytest.mark.parametrize("data", [http_get(), http_chunked(b"1;a\r\nx\r\n0\r\nx: y\r\n\r\n")])
    def test_every_beginning_of_a_request_waits(self, data: bytes) -> None:
        for size in range(len(data)):
            assert parse_requests([data[:size]]) == Outcome([], None)

    def test_hundred_pipelined_requests_are_parsed_up_to_a_bad_one(self) -> None:
        data = b"".join(http_message(f"GET /{n} HTTP/1.1") for n in range(100))
        outcome = feed_http(data + b"GET foo HTTP/1.1\r\n\r\n")
        assert [head.target for head, _ in outcome.items] == [f"/{n}" for n in range(100)]
        assert outcome.end == 400

    def test_limits_start_anew_with_each_request(self) -> None:
        largest = [http_head_of(32 * 1024), http_chunked(b"0\r\nx:" + b"v" * 4090 + b"\r\n\r\n")]
        outcome = parse_requests(largest * 2)
        assert (len(outcome.items), outcome.end) == (4, None)

    def test_parser_is_idle_only_between_requests(self) -> None:
        parser = sc.HttpParser()
        assert parser.is_idle
        for piece in (b"P", b"OST / HTTP/1.1\r\n", b"Content-Length: 1\r\n"):
            parser.feed(piece)
            assert parser.next_head() is None and not parser.is_idle
        parser.feed(b"\r\n")
        assert parser.next_head() is not None and parser.next_body() is None and not parser.is_idle
        parser.feed(b"x")
        assert parser.next_body() == b"x" and parser.is_idle
        parser.feed(http_get() + b"\x81\x80")
        assert parser.next_head() is not None and parser.next_body() == b"" and not parser.is_idle
        assert parser.take_rest() == b"\x81\x80", "it is given away after an upgrade"
        assert parser.is_idle and parser.take_rest() == b""

    @ANY_PROPERTY
    @given(st.lists(st.binary(min_size=1), max_size=5))
    def test_chunked_body_round_trips(self, chunks: list[bytes]) -> None:
        data = b"".join(map(sc.encode_chunk, chunks)) + b"0\r\n" + sc.encode_fields([("x", "y")])
        (got,) = parse_requests([http_chunked(data)]).items
        assert got[1] == b"".join(chunks)


class TestHttpMessages:
    """RFC 9110, 5 to 10 and RFC 9112, 4 to 9: what a head says, queries, responses."""

    @parametrize_rows("line, fields, keep", [
        ("1.1", "GET /", [], True), ("1.1 close", "GET /", ["Connection: x, Close"], False),
        ("1.1 second field", "GET /", ["Connection: x", "Connection: close"], False),
        ("1.1 longer word", "GET /", ["Connection: closed"], True),
        ("1.0", "GET / HTTP/1.0", [], False),
        ("1.0 keep-alive", "GET / HTTP/1.0", ["Connection: Keep-Alive"], True),
        ("1.0 both", "GET / HTTP/1.0", ["Connection: keep-alive, close"], False),
    ])  # fmt: skip
    def test_connection_persists_when(self, line: str, fields: list[str], keep: bool) -> None:
        assert parse_head(line, *fields).keep_alive is keep

    def test_head_tells_path_query_and_values(self) -> None:
        head = parse_head("GET /a?b?c", "X: 1", "x: 2", "Content-Type: Text/JSON ; a=b")
        assert (head.path, head.query, head.media_type) == ("/a", "b?c", "text/json")
        assert (head.values("x"), head.value("x"), head.value("y")) == (["1", "2"], "1", None)
        assert (parse_head("GET /").query, parse_head("GET /").media_type) == ("", "")
        assert parse_head("GET /", "x: A,, b\t,", "X: c d").tokens("x") == ["a", "b", "c d"]
        assert parse_head("GET /").tokens("x") == []

    def test_body_is_announced_by_length_or_coding(self) -> None:
        fields = ["x: y", "Content-Length: 0", "Content-Length: 1", "Transfer-Encoding: chunked"]
        heads = [parse_head("POST /", field) for field in fields]
        assert [head.has_body for head in heads] == [False, False, True, True]

    @pytest.mark.parametrize("query, expected", [
        ("", {}), ("wait", {"wait": ""}), ("id=1&&raw=&", {"id": "1", "raw": ""}),
        ("a=b=c", {"a": "b=c"}), ("a+b=c+d%2B%26%3d", {"a b": "c d+&="}),
        ("a=%E2%82%ac&%69d=1", {"a": "\u20ac", "id": "1"}), ("a=%zz%", {"a": "%zz%"}),
        ("id=1&id=2", 400), ("task=1&task=2", {"task": "1,2"}), ("=1&=2", 400), ("id=1&%69d=1", 400), ("a=%ff", 400), ("%ed%a0%80=a", 400),
    ])  # fmt: skip
    def test_query_is_parsed(self, query: str, expected: Any) -> None:
        assert status_of(sc.parse_query, query) == expected

    def test_flag_and_since_are_parsed(self) -> None:
        values = [{}, *({"f": value} for value in ("", "1", "True", "yes", "0", "no", "x", "on"))]
        expected = [False, True, True, True, True, False, False, 400, 400]
        assert [status_of(sc.parse_flag, value, "f") for value in values] == expected
        assert sc.parse_since({"boot": "another"}, "this") is None, "boot alone asks for nothing"

    def test_status_has_its_phrase(self) -> None:
        assert sc.encode_response_head(404, []) == b"HTTP/1.1 404 Not Found\r\n\r\n"
        assert set(sc.COMMAND_STATUS.values()) <= set(map(int, http.HTTPStatus))


OWN_UID = 1000
RUN_TOKEN, VIEW_TOKEN = "r" * 16 + "-._~+/==", "v" * 16
POLICY = sc.AccessPolicy(
    allow_origins=frozenset({"https://app.test", "null", "file://"}), own_uid=OWN_UID,
    allow_hosts=frozenset({"box.test", "port.test:9"}), hostname="myname",
    tokens={sc.Role.RUN: RUN_TOKEN.encode(), sc.Role.VIEW: VIEW_TOKEN.encode()},
)  # fmt: skip
STRICT_POLICY = dataclasses.replace(POLICY, require_token=True)
OPEN_POLICY = dataclasses.replace(POLICY, no_auth=True, tokens={})
LOOPBACK, NETWORK, UNIX = sc.ListenerKind.LOOPBACK, sc.ListenerKind.NETWORK, sc.ListenerKind.UNIX
OWN_PEER = sc.Peer(LOOPBACK, "127.0.0.1", OWN_UID)
OTHER_PEER = dataclasses.replace(OWN_PEER, uid=1001)
NETWORK_PEER = sc.Peer(NETWORK, "192.0.2.9")
TLS_PEER = dataclasses.replace(OWN_PEER, scheme="https")

# (name, policy, peer, whether it is an own process on this machine)
ACCESS_SITUATIONS = [
    ("own account", POLICY, OWN_PEER, True),
    ("mapped", POLICY, sc.Peer(LOOPBACK, "::ffff:127.0.0.1", 1000), True),
    ("other account", POLICY, OTHER_PEER, False),
    ("root", POLICY, dataclasses.replace(OWN_PEER, uid=0), False),
    ("unknown account", POLICY, dataclasses.replace(OWN_PEER, uid=None), False),
    ("unix, own account", POLICY, sc.Peer(UNIX, uid=OWN_UID), True),
    ("unix, other account", POLICY, sc.Peer(UNIX, uid=1001), False),
    ("unix, unknown account", POLICY, sc.Peer(UNIX), False),
    ("network", POLICY, NETWORK_PEER, False),
    # From 127.0.0.1 to a listener on the network: the account does not matter.
    ("network, own", POLICY, sc.Peer(NETWORK, "127.0.0.1", OWN_UID), False),
    ("token required", STRICT_POLICY, OWN_PEER, True),
    ("token required on unix", STRICT_POLICY, sc.Peer(UNIX, uid=OWN_UID), True),
    ("no_auth", OPEN_POLICY, OTHER_PEER, False),
    ("no_auth on the network", OPEN_POLICY, NETWORK_PEER, False),
]
# (what it is, header fields)
ACCESS_TOKENS = [
    ("none", []), ("run", [f"Authorization: Bearer {RUN_TOKEN}"]),
    ("view", [f"Sec-WebSocket-Protocol: servercontrol.v1, bearer.{VIEW_TOKEN}"]),
    ("wrong", ["Authorization: Bearer rrrrrrrrrrrrrrrr"]),
]  # fmt: skip
ACCESS_HOSTS = [
    ("localhost:8080", "loopback"), ("127.0.0.1", "loopback"), ("[::1]:8080", "loopback"),
    ("192.0.2.7:8080", "address"), ("[fe80::1]", "address"), ("Box.test:1", "listed"),
    ("myname:8080", "own"), ("evil.test:8080", "foreign"), ("a@b", "broken"),
]  # fmt: skip
VISIT = ["Sec-Fetch-Mode: navigate", "Sec-Fetch-Dest: document"]
ACCESS_FETCHES = [
    ("no metadata", []), ("same-origin", ["Sec-Fetch-Site: same-origin", "Sec-Fetch-Mode: cors"]),
    ("typed by the user", ["Sec-Fetch-Site: none", *VISIT]),
    ("cross", ["Sec-Fetch-Site: cross-site", "Sec-Fetch-Mode: no-cors"]),
    ("cross", ["Sec-Fetch-Site: same-site", "Sec-Fetch-Mode: navigate", "Sec-Fetch-Dest: iframe"]),
    ("visit", ["Sec-Fetch-Site: cross-site", *VISIT]), ("visit", ["Sec-Fetch-Site: same-site", *VISIT]),
]  # fmt: skip
UPGRADE = ["Connection: Upgrade", "Upgrade: websocket"]
FORM = ["Content-Length: 1", "Content-Type: text/plain"]
PREFLIGHT = ["Access-Control-Request-Method: POST"]
ACCESS_REQUESTS = [
    ("GET /", []), ("GET /?", []), ("HEAD /health", []), ("GET /health", []), ("POST /", []),
    ("GET /tasks", []),
    ("GET /", UPGRADE), ("GET /ws", UPGRADE), ("POST /kill?id=1", []), ("POST /exec", FORM),
    ("OPTIONS /exec", []), ("OPTIONS /exec", PREFLIGHT), ("GET /tasks", PREFLIGHT),
    ("POST /exec", ["Transfer-Encoding: chunked", "Content-Type: application/JSON; a"]),
]  # fmt: skip


def expect_access(
    situation: Any, host_kind: str, origin: str, fetch: str, proxied: bool, token: str, request: Any
) -> Any:
    """The rules of the gate, in the words of the contract: a role, None (no role) or a status."""
    (policy, peer, own), (line, fields) = situation, request
    is_visit = fetch == "visit" and line in ("GET /", "GET /?")
    by_browser = origin != "none" or fetch != "no metadata"
    is_open = line in ("GET /", "GET /?", "HEAD /health", "GET /health")
    is_listed = origin in ("listed", "opaque")
    is_preflight = request == ("OPTIONS /exec", PREFLIGHT) and is_listed
    served = {"loopback", "listed"} | ({"address", "own"} if policy.no_auth else set())
    asks_host = policy.no_auth or peer.listener is not NETWORK
    trusted = own and not proxied and not policy.require_token
    rules = [
        (host_kind == "broken", 400), (origin == "foreign", 403),
        (fetch in ("cross", "visit") and not is_listed and not is_visit, 403),
        (by_browser and fields is FORM, 415), (token == "run" and not policy.no_auth, sc.Role.RUN),
        (token == "view" and not policy.no_auth, sc.Role.VIEW),
        (token == "wrong" and not policy.no_auth, 401),
        (origin == "opaque" and not is_preflight, 401),
        (asks_host and host_kind not in served, 403), (policy.no_auth or trusted, sc.Role.RUN),
        (is_open and fields is not UPGRADE, None), (is_preflight, None),
    ]  # fmt: skip
    return next((verdict for applies, verdict in rules if applies), 401)


parse_access_head = functools.cache(parse_head)


def check_get(policy: sc.AccessPolicy, peer: sc.Peer, *fields: str, path: str = "/tasks") -> Any:
    return status_of(sc.check_access, policy, peer, parse_head(f"GET {path}", *fields))


class TestAccess:
    """SPEC "Who may connect": RFC 6454 origins, RFC 9110 7.2 Host, Fetch Metadata."""

    @parametrize_rows("policy, peer, own", ACCESS_SITUATIONS)
    def test_gate_follows_the_contract_in_every_combination(self, policy, peer, own: bool):
        origins = ["none", "own", "listed", "opaque", "foreign"]
        proxies: list[list[str]] = [[], ["X-Forwarded-For: ::1"]]
        for case in itertools.product(
            ACCESS_HOSTS, origins, ACCESS_FETCHES, proxies, ACCESS_TOKENS, ACCESS_REQUESTS
        ):
            (host, host_kind), origin, (fetch, marks), proxy, (token, shown), request = case
            values = {"own": f"http://{host}", "listed": "https://app.test", "foreign": "http://x"}
            values["opaque"] = "null" if fetch == "cross" else "file://"
            named = [f"Origin: {values[origin]}"] if origin in values else []
            fields = [f"Host: {host}", *named, *marks, *proxy, *shown, *request[1]]
            head = parse_access_head(request[0], *fields)
            kinds = host_kind, origin, fetch, bool(proxy), token, request
            got = status_of(sc.check_access, policy, peer, head)
            assert got == expect_access((policy, peer, own), *kinds), case

    @parametrize_rows("fields, role", [
        ("scheme in any case", [f"Authorization: bEARER  {RUN_TOKEN}"], sc.Role.RUN),
        ("subprotocol", [f"Sec-WebSocket-Protocol: bearer.{RUN_TOKEN}"], sc.Role.RUN),
        ("subprotocol in a second field",
         ["Sec-WebSocket-Protocol: x", f"Sec-WebSocket-Protocol: y,\tbearer.{VIEW_TOKEN} "],
         sc.Role.VIEW),
        ("no token but our protocol", ["Sec-WebSocket-Protocol: servercontrol.v1"], "trust"),
        ("cookie is no token", [f"Cookie: token={VIEW_TOKEN}"], "trust"),
        *((f"wrong: {value!r}", [f"Authorization: {value}"], 401) for value in (
            "", "Bearer", "Bearer ", f"Basic {RUN_TOKEN}", RUN_TOKEN, f"Bearer{RUN_TOKEN}",
            f"Bearer {RUN_TOKEN}x", f"Bearer {RUN_TOKEN[:-1]}", f"Bearer {VIEW_TOKEN.upper()}",
            f"Bearer {RUN_TOKEN}, Bearer {RUN_TOKEN}", f"Bearer {RUN_TOKEN} x", "Bearer \xe9" * 9,
            f"Bearer {RUN_TOKEN}{VIEW_TOKEN}", f"Bearer {RUN_TOKEN}=", "Basic OnI=",
            f"Bearer \xe4{RUN_TOKEN}", f"Bearer\t{RUN_TOKEN}", f"Token {RUN_TOKEN}", f"Bearer \"{RUN_TOKEN}\"", "Bearer =")),
        *((f"wrong subprotocol: {value!r}", [f"Sec-WebSocket-Protocol: {value}"], 401) for value in (
            "bearer.", f"bearer.{RUN_TOKEN}x", f"bearer. {RUN_TOKEN}", "bearer.\xe9",
            f"bearer.{RUN_TOKEN}, bearer.wrong")),
        ("not in any case", [f"Sec-WebSocket-Protocol: Bearer.{RUN_TOKEN}"], "trust"),
        ("both the same", [f"Authorization: Bearer {RUN_TOKEN}",
                           f"Sec-WebSocket-Protocol: bearer.{RUN_TOKEN}"], 401),
        ("right and wrong", [f"Authorization: Bearer {RUN_TOKEN}",
                             "Sec-WebSocket-Protocol: bearer.x"], 401),
        ("two fields", [f"Authorization: Bearer {RUN_TOKEN}"] * 2, 401),
        ("both roles", [f"Authorization: Bearer {t}" for t in (RUN_TOKEN, VIEW_TOKEN)], 401),
    ])  # fmt: skip
    def test_token_gives_its_role_or_401(self, fields: list[str], role: Any) -> None:
        for peer, trust in ((OWN_PEER, sc.Role.RUN), (NETWORK_PEER, 401)):
            expected = trust if role == "trust" else role
            assert check_get(POLICY, peer, "Host: localhost", *fields) == expected
        got = check_get(POLICY, NETWORK_PEER, "Host: localhost", *fields, path="/health")
        assert got == (None if role == "trust" else role)

    def test_token_is_in_no_repr(self) -> None:
        assert RUN_TOKEN not in repr(POLICY) and VIEW_TOKEN not in repr(POLICY)

    def test_rate_limit(self) -> None:
        limit = sc.RateLimit(10, 60.0)
        assert [limit.take("a", float(second)) for second in range(10)] == [0] * 10
        assert limit.take("a", 20.5) == 39.5 and limit.take("a", 59.0) == 1
        assert limit.take("b", 20.5) == limit.take("", 20.5) == 0
        assert limit.take("a", 60.0) == 0 and limit.take("a", 60.5) == 0.5
        for number in range(sc.MAX_LIMITED_SOURCES + 50):
            limit.take(str(number), 60.5)
        assert len(limit._times) == sc.MAX_LIMITED_SOURCES, "the oldest are forgotten"

    def test_hosts_are_told_apart_by_address_or_64(self) -> None:
        key = sc.find_host_key
        assert key("::ffff:192.0.2.1") == key("192.0.2.1") != key("192.0.2.2") != key("")
        assert key("2001:db8::1") == key("2001:db8::ffff") != key("2001:db8:0:1::")

    @pytest.mark.parametrize("value", [
        "", "a b", "a\tb", "\xe9", "a\\b",
        *["a@b", "a/b", "a,b", "a:", "a:x", "a:65536", "a:123456", ":80", "::1", "[::1", "::1]"],
        *["[::1]x", "[]", "[127.0.0.1]", "[::g]", "[1:2]", "a?b", "a#b", "http://a", "%31", "[::1%lo]", "a:+1"],
    ])  # fmt: skip
    def test_host_is_refused_when_it_is(self, value: str) -> None:
        assert check_get(OPEN_POLICY, OWN_PEER, f"Host: {value}") == 400

    @pytest.mark.parametrize("line, host, expected", [
        ("GET http://localhost:8080/tasks?id=1", "localhost:8080", sc.Role.RUN),
        ("GET HTTPS://LocalHost", "localhost", sc.Role.RUN),
        ("GET http://localhost?x", "localhost", sc.Role.RUN),
        ("GET http://localhost:8080/tasks", "localhost", 400),
        ("GET http://localhost/tasks", "127.0.0.1", 400),
        ("GET http://evil.test/tasks", "evil.test", 403),
        ("GET http://me@localhost/tasks", "localhost", 400),
        ("GET http://localhost/tasks HTTP/1.0", "", 400),
    ])  # fmt: skip
    def test_absolute_form_names_the_host(self, line: str, host: str, expected: Any) -> None:
        """RFC 9112, 3.2.2, as `curl -x` sends it."""
        fields = [f"Host: {host}"] if host else []
        head = parse_head(line, *fields)
        assert status_of(sc.check_access, POLICY, OWN_PEER, head) == expected
        assert head.target in ("/tasks?id=1", "/tasks", "/", "/?x")

    def test_host_is_needed_once(self) -> None:
        hosts = ["Host: localhost"] * 2
        assert check_get(POLICY, OWN_PEER) == check_get(POLICY, OWN_PEER, *hosts) == 400
        expected = [403, sc.Role.RUN, 400]  # with none, one and two, on HTTP/1.0
        heads = [parse_head("GET / HTTP/1.0", *hosts[:count]) for count in range(3)]
        assert [status_of(sc.check_access, POLICY, OWN_PEER, head) for head in heads] == expected

    @pytest.mark.parametrize("policy", [POLICY, OPEN_POLICY], ids=["loopback", "no_auth"])
    def test_host_is_served_by_name(self, policy: sc.AccessPolicy) -> None:
        for host in [
            "LocalHost", "localhost:65535", "127.255.0.1", "[0:0::1]:1", "BOX.test", "port.test:9",
        ]:  # fmt: skip
            assert check_get(policy, OWN_PEER, f"Host: {host}") is sc.Role.RUN, host
        refused = "port.test localhost. localhost.evil.test 127.0.0.1.evil.test 127.1 xbox.test"
        refused += " localhos 0x7f000001 2130706433"
        refused += " [::2]:80 128.0.0.1 0.0.0.0:8080" * (policy is POLICY)
        for host in refused.split():
            assert check_get(policy, OWN_PEER, f"Host: {host}") == 403, host

    @pytest.mark.parametrize("peer, host, origin, own", [
        (OWN_PEER, "localhost:8080", "http://localhost:8080", True),
        (OWN_PEER, "LOCALHOST", "http://localhost", True),
        (OWN_PEER, "localhost", "http://localhost:80", True),
        (OWN_PEER, "localhost:80", "http://localhost", True),
        (OWN_PEER, "[::1]:8080", "http://[::1]:8080", True),
        (TLS_PEER, "localhost", "https://localhost:443", True),
        (TLS_PEER, "localhost:80", "https://localhost", False),
        (TLS_PEER, "localhost:8080", "http://localhost:8080", False),
        *((OWN_PEER, "localhost:8080", origin, False) for origin in (
            "https://localhost:8080", "http://localhost:3000", "http://localhost",
            "http://127.0.0.1:8080", "NULL", "", "http://localhost:8080.evil.test",
            "http://localhost:8080@evil.test", "http://localhost:8080/", "ws://localhost:8080",
            "https://app.test.evil.test", "https://app.test:443", "http://localhost:8080 x",
            "localhost:8080", "http://", "http://localhost:080801", "http://a http://b",
            "http://localhost:8080\r\nOrigin: http://localhost:8080",
            "https://app.test\r\nOrigin: https://app.test")),
        (OWN_PEER, "localhost", "http://localhost:443", False),
        (OWN_PEER, "localhost", "http://localhost:0", False),
    ])  # fmt: skip
    def test_origin_is_compared(self, peer: sc.Peer, host: str, origin: str, own: bool) -> None:
        role = check_get(POLICY, peer, f"Host: {host}", f"Origin: {origin}", *UPGRADE, path="/ws")
        assert role == (sc.Role.RUN if own else 403)

    @pytest.mark.parametrize("name", [
        "Forwarded", "X-Forwarded-For", "x-forwarded-any", "X-Forwarded-Proto", "X-FORWARDED-HOST",
        "X-Real-IP", "VIA", "CF-Connecting-IP",
        "True-Client-IP",
    ])  # fmt: skip
    def test_trust_ends_when_a_proxy_names_itself_by(self, name: str) -> None:
        assert check_get(POLICY, OWN_PEER, "Host: localhost", f"{name}:") == 401
        assert check_get(OPEN_POLICY, OWN_PEER, "Host: localhost", f"{name}:") is sc.Role.RUN

    @pytest.mark.parametrize("query", [
        f"token={RUN_TOKEN}", "a=b&token=x", "token", "token=", "%74oken=x", "to%6Ben",
    ])  # fmt: skip
    def test_token_in_the_query_is_refused(self, query: str) -> None:
        shown = f"Authorization: Bearer {RUN_TOKEN}"
        for policy, path in itertools.product((POLICY, OPEN_POLICY), ("/", "/tasks", "/health")):
            for fields in (["Host: localhost"], ["Host: localhost", shown]):
                assert check_get(policy, OWN_PEER, *fields, path=f"{path}?{query}") == 401
        role = check_get(POLICY, OWN_PEER, "Host: localhost", path="/?tokens=x&x=token")
        assert role is sc.Role.RUN

    def test_challenge_is_named_when_unauthorized(self) -> None:
        wrong = ["Authorization: Bearer x"]
        for fields, challenge in (([], "Bearer"), (wrong, 'Bearer error="invalid_token"')):
            head = parse_head("GET /x", "Host: localhost", *fields)
            with pytest.raises(sc.HttpError) as caught:
                sc.check_access(POLICY, OTHER_PEER, head)
            assert list(caught.value.fields) == [("WWW-Authenticate", challenge)]

    def test_loopback_addresses_are_told_apart(self) -> None:
        yes = ["127.0.0.1", "127.255.255.254", "::1", "::ffff:127.0.0.1", "::1%lo"]
        no = ["128.0.0.1", "::ffff:128.0.0.1", "0.0.0.0", "::", "::2", "localhost", "", "127.1"]
        assert [text for text in yes + no if sc.is_loopback(text)] == yes

    def test_socket_owner_is_found_by_both_ends_alone(self) -> None:
        rows = "  sl  local rem st tx:rx tr:tm->when retrnsmt uid timeout inode\n"
        rows += "0: 0100007F:1F90 0100007F:A4D2 01 0:0 0:0 0 1001 0 11 1 0\n"
        rows += "1: 0100007F:A4D2 0100007F:1F90 01 0:0 0:0 0 1002 0 22 1 0\n"
        rows += f"2: {'0' * 24}01000000:0001 {'0' * 24}01000000:0002 01 0:0 0:0 0 3 0 33 1 0\n"
        v4, v6 = ipaddress.ip_address("127.0.0.1"), ipaddress.ip_address("::1")
        assert sc.parse_proc_tcp(rows, (v4, 42194), (v4, 8080)) == 1002
        assert sc.parse_proc_tcp(rows, (v6, 1), (v6, 2)) == 3
        for peer, local in (((v4, 42194), (v4, 8081)), ((v4, 1), (v4, 2)), ((v6, 2), (v6, 1))):
            with pytest.raises(ValueError):
                sc.parse_proc_tcp(rows, peer, local)
        with pytest.raises(ValueError):  # closed by its process: no inode
            sc.parse_proc_tcp(rows.replace(" 22 ", " 0 "), (v4, 42194), (v4, 8080))

    @pytest.mark.parametrize("text, family", [("127.0.0.1", 2), ("::1", 10)])
    def test_diag_request_names_both_ends(self, text: str, family: int) -> None:
        address = ipaddress.ip_address(text)
        request = sc.encode_diag_request((address, 42194), (address, 8080))
        assert struct.unpack_from("=IHH", request) == (72, 20, 1) and len(request) == 72
        assert tuple(request[16:18]) == (family, 6)
        assert struct.unpack_from("!HH", request, 24) == (42194, 8080)
        assert request[28:44] == request[44:60] == address.packed.ljust(16, b"\0")

    def test_diag_reply_tells_the_owner_or_nothing(self) -> None:
        def make_reply(state: int, inode: int = 7) -> bytes:
            row = b"\xee" + bytes([state]) + b"\xee" * 62 + struct.pack("=II", 1000, inode)
            return struct.pack("=IHHII", 88, 20, 0, 0, 0) + row

        reply = make_reply(1)
        assert [sc.parse_diag_reply(make_reply(state)) for state in (1, 4, 5)] == [1000] * 3
        for state in (0, 2, 3, 6, 7, 8, 9, 10, 11, 12):  # SYN_SENT, TIME_WAIT, LISTEN and so on
            with pytest.raises(ValueError):
                sc.parse_diag_reply(make_reply(state))
        error = struct.pack("=IHHIIi", 36, 2, 0, 0, 0, -2) + b"\0" * 100
        for bad in (error, reply[:87], make_reply(1, inode=0)):
            with pytest.raises(ValueError):
                sc.parse_diag_reply(bad)


RFC_KEY = "dGhlIHNhbXBsZSBub25jZQ=="
KEY_FIELD = f"Sec-WebSocket-Key: {RFC_KEY}"
VERSION_FIELD = "Sec-WebSocket-Version: 13"


class TestUpgrade:
    """RFC 6455, 1.3 and 4.2: the opening handshake."""

    @parametrize_rows("connection, upgrade, expected", [
        ("plain", "Upgrade", "websocket", RFC_KEY),
        ("any case", "uPGRADE", "WebSocket", RFC_KEY),
        ("list", "keep-alive, Upgrade", "websocket", RFC_KEY),
        ("lists", "x,\tupgrade ,y", "h2c, websocket", RFC_KEY),
        ("other protocol", "Upgrade", "h2c", 400),
        ("longer name", "Upgrade", "websockets", 400),
        ("Kelvin sign", "Upgrade", "websoc\xe2\x84\xaaet", 400),
        ("no connection", "keep-alive", "websocket", "no upgrade"),
        ("longer option", "upgraded", "websocket", "no upgrade"),
        ("two fields", "x\r\nConnection: Upgrade", "websocket", RFC_KEY),
    ])  # fmt: skip
    def test_upgrade_is_recognized(self, connection: str, upgrade: str, expected: Any) -> None:
        fields = [f"Connection: {connection}", f"Upgrade: {upgrade}", KEY_FIELD, VERSION_FIELD]
        head = parse_head("GET /", *fields)
        assert sc.is_upgrade(head) is (expected != "no upgrade")
        if sc.is_upgrade(head):
            assert status_of(sc.check_upgrade, head) == expected
        assert not sc.is_upgrade(parse_head("GET /", "Connection: Upgrade"))

    @parametrize_rows("line, fields, status", [
        ("POST", "POST /", [KEY_FIELD, VERSION_FIELD], 405),
        ("HEAD", "HEAD /", [KEY_FIELD, VERSION_FIELD], 405),
        ("HTTP/1.0", "GET / HTTP/1.0", [KEY_FIELD, VERSION_FIELD], 400),
        ("body", "GET /", [KEY_FIELD, VERSION_FIELD, "Content-Length: 1"], 400),
        ("chunked body", "GET /", [KEY_FIELD, VERSION_FIELD, "Transfer-Encoding: chunked"], 400),
        ("no key", "GET /", [VERSION_FIELD], 400),
        ("two keys", "GET /", [KEY_FIELD, KEY_FIELD, VERSION_FIELD], 400),
        *((f"key {key!r}", "GET /", [f"Sec-WebSocket-Key: {key}", VERSION_FIELD], 400) for key in (
            "", "AAAA", RFC_KEY[:-1], RFC_KEY[:-2], "A" * 24, "A" * 20, "!" + RFC_KEY, "\xe9" * 24,
            "A" * 22, f"{RFC_KEY}, {RFC_KEY}", RFC_KEY[:9] + " " + RFC_KEY[9:], "A" * 26 + "==")),
        ("no version", "GET /", [KEY_FIELD], 426),
        ("two versions", "GET /", [KEY_FIELD, VERSION_FIELD, VERSION_FIELD], 426),
        *((f"version {text!r}", "GET /", [KEY_FIELD, f"Sec-WebSocket-Version: {text}"], 426)
          for text in ("", "12", "14", "8", "013", "13, 8", "x")),
    ])  # fmt: skip
    def test_upgrade_is_refused_when(self, line: str, fields: list[str], status: int) -> None:
        with pytest.raises(sc.HttpError) as caught:
            sc.check_upgrade(parse_head(line, *UPGRADE, *fields))
        needed = {405: [("Allow", "GET")], 426: [("Sec-WebSocket-Version", "13")]}.get(status, [])
        assert caught.value.status == status and set(needed) <= set(caught.value.fields)

    @pytest.mark.parametrize("offers, chosen", [
        ([], False), (["servercontrol.v1"], True), (["servercontrol.v1, bearer.S3cret"], True),
        (["x", "servercontrol.v1"], True), (["x, bearer.S3cret"], False),
        (["SERVERCONTROL.V1"], False),
    ])  # fmt: skip
    def test_answer_chooses_only_our_protocol(self, offers: list[str], chosen: bool) -> None:
        extension = "Sec-WebSocket-Extensions: permessage-deflate"  # chosen by another function
        head = parse_head("GET /", *(f"Sec-WebSocket-Protocol: {o}" for o in offers), extension)
        assert sc.encode_upgrade_response(head, RFC_KEY) == (
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n"
            + b"Sec-WebSocket-Protocol: servercontrol.v1\r\n" * chosen
            + b"\r\n"
        )


# (Sec-WebSocket-Extensions, what is added to the answer, window bits; or None; or 400)
TAKEN = "permessage-deflate; server_no_context_takeover; client_no_context_takeover"
DEFLATE_OFFERS = [
    ("", None), ("permessage-deflate", ("", 15)), (" ,\t, permessage-deflate ,,", ("", 15)),
    ("PERMESSAGE-DEFLATE", None), ("permessage-bzip2", None), ("x-webkit-deflate-frame", None),
    (TAKEN, ("", 15)), ("permessage-deflate;client_max_window_bits", ("", 15)),
    ("x\r\nSec-WebSocket-Extensions: permessage-deflate", ("", 15)),  # two fields are one list
    *((f"permessage-deflate; client_max_window_bits={n}", ("", 15)) for n in range(8, 16)),
    *((f"permessage-deflate; server_max_window_bits={n}",
       (f"; server_max_window_bits={n}", 9 if n < 15 else 15)) for n in range(9, 16)),
    ('permessage-deflate; server_max_window_bits="1\\0"', ("; server_max_window_bits=10", 9)),
    ("permessage-deflate ;\tserver_max_window_bits\t=\t15", ("; server_max_window_bits=15", 15)),
    *((f"permessage-deflate; {bad}", None) for bad in (
        "server_max_window_bits", "server_max_window_bits=8", "server_max_window_bits=7",
        "server_max_window_bits=16", "server_max_window_bits=09", "server_max_window_bits=+9",
        "client_max_window_bits=7", "client_max_window_bits=0", "client_max_window_bits=1_0",
        "server_no_context_takeover=1", 'client_no_context_takeover="true"', "unknown", "x=1",
        "client_max_window_bits; client_max_window_bits=10", "Server_no_context_takeover",
        "server_no_context_takeover; server_no_context_takeover", "mux; server_max_window_bits=9")),
    ("permessage-deflate; server_max_window_bits=8, permessage-deflate", ("", 15)),
    ('x; y="permessage-deflate", permessage-deflate; x, permessage-deflate; '
     "server_max_window_bits=12, permessage-deflate", ("; server_max_window_bits=12", 9)),
    *((bad, 400) for bad in (
        "permessage-deflate;", ";", "permessage-deflate; ;x", "a b", "a; b c", "a=1", 'a; b=""',
        'a; b="', 'a; b="c d"', "a; b=", "a; =b", 'a; "b"', 'a; b="x"y', "a/b", "\xe9",
        'permessage-deflate, a; b="c, d"', "permessage-deflate, =")),
]  # fmt: skip


class TestDeflateOffers:
    """RFC 7692, 5 and 7.1; RFC 6455, 9.1: what is negotiated."""

    @parametrize_rows("offer, expected", [(repr(row[0]), *row) for row in DEFLATE_OFFERS])
    def test_server_answers_an_offer(self, offer: str, expected: Any) -> None:
        head = parse_head("GET /", f"Sec-WebSocket-Extensions: {offer}")
        answer = expected and expected != 400 and (TAKEN + expected[0], expected[1])
        assert status_of(sc.choose_deflate, head) == (answer or expected or ("", 0))
        if answer:  # an independent client accepts it
            client = ClientPerMessageDeflateFactory(client_max_window_bits=True)
            parsed = parse_extension(answer[0])
            assert client.process_response_params(parsed[0][1], []).local_no_context_takeover

    def test_nothing_is_negotiated_without_zlib(self) -> None:
        head = parse_head("GET /", f"Sec-WebSocket-Extensions: {TAKEN}")
        with mock.patch.object(sc, "zlib", None):
            assert sc.choose_deflate(head) == ("", 0)


# The mask of the examples in RFC 6455, 5.7, and masks that reveal a wrong byte order or offset.
RFC_MASK = bytes.fromhex("37fa213d")
FRAME_MASKS = [RFC_MASK, b"\0\0\0\0", b"\xff\0\0\0", b"\0\0\0\x01", b"\x01\x02\x03\x04"]
EDGE_LENGTHS = [0, 1, 125, 126, 127, 65535, 65536]
TEXT, BINARY, CLOSE, PING, PONG = 0x81, 0x82, 0x88, 0x89, 0x8A  # first bytes, FIN set
TEXT_START, BINARY_START, CONTINUE, CONTINUE_END = 0x01, 0x02, 0x00, 0x80


def xor_bytes(data: bytes, mask: bytes) -> bytes:
    key = (mask * (len(data) // 4 + 1))[: len(data)]
    return (int.from_bytes(data, "big") ^ int.from_bytes(key, "big")).to_bytes(len(data), "big")


def build_frame(first: int, payload: bytes = b"", mask: bytes | None = RFC_MASK) -> bytes:
    """Return a frame, written down from RFC 6455, 5.2, without the code under test."""
    size, bit = len(payload), 0 if mask is None else 0x80
    if size < 126:
        header = bytes([first, bit + size])
    elif size < 65536:
        header = bytes([first, bit + 126]) + size.to_bytes(2, "big")
    else:
        header = bytes([first, bit + 127]) + size.to_bytes(8, "big")
    return header + payload if mask is None else header + mask + xor_bytes(payload, mask)


def build_text(*parts: bytes) -> bytes:
    firsts = [TEXT_START] + [CONTINUE] * (len(parts) - 2) + [CONTINUE_END]
    return b"".join(map(build_frame, firsts, parts))


class TestFrames:
    """RFC 6455, 5: frames and masking; 7.4: close codes."""

    @parametrize_rows("wire, opcode, payload, mask, fin", [
        ("text", "8105 48656c6c6f", 1, b"Hello", None, True),
        ("masked text", "8185 37fa213d 7f9f4d5158", 1, b"Hello", RFC_MASK, True),
        ("first fragment", "0103 48656c", 1, b"Hel", None, False),
        ("last fragment", "8002 6c6f", 0, b"lo", None, True),
        ("ping", "8905 48656c6c6f", 9, b"Hello", None, True),
        ("masked pong", "8a85 37fa213d 7f9f4d5158", 10, b"Hello", RFC_MASK, True),
        ("256 bytes", "827e0100" + "00" * 256, 2, bytes(256), None, True),
        ("64 KiB", "827f0000000000010000" + "00" * 65536, 2, bytes(65536), None, True),
        ("masked empty close", "8880 37fa213d", 8, b"", RFC_MASK, True),
    ])  # fmt: skip
    def test_frame_of_the_rfc_is_encoded_and_parsed(self, wire, opcode, payload, mask, fin):
        data = bytes.fromhex(wire)
        assert not fin or sc.encode_frame(sc.Opcode(opcode), payload, mask) == data
        size = len(data) - len(payload)
        header = (fin, opcode, mask, len(payload), size, False)
        assert sc.parse_frame_header(bytearray(data)) == header
        for short in range(size):
            assert sc.parse_frame_header(bytearray(data[:short])) is None

    @pytest.mark.parametrize("mask", [None, *FRAME_MASKS], ids=str)
    @pytest.mark.parametrize("length", [*EDGE_LENGTHS, 65537])
    def test_frame_is_encoded_at_every_length(self, length: int, mask: bytes | None) -> None:
        payload = bytes(at * 7 % 251 for at in range(length))
        data = sc.encode_frame(sc.Opcode.BINARY, payload, mask)
        assert data == build_frame(BINARY, payload, mask)

    @pytest.mark.parametrize("deflates", [False, True])
    def test_header_start_is_judged_in_every_value(self, deflates: bool) -> None:
        more = {126: (126, struct.pack("!H", 126)), 127: (65536, struct.pack("!Q", 65536))}
        for first, second in itertools.product(range(256), range(256)):
            opcode, short = first & 15, second & 127
            length, extended = more.get(short, (short, b""))
            data = bytes([first, second]) + extended + RFC_MASK
            mask, size = (RFC_MASK, len(data)) if second & 128 else (None, len(data) - 4)
            expected: Any = (first >= 128, opcode, mask, length, size, bool(first & 0x40))
            bad_control = opcode >= 8 and (first < 128 or short > 125)
            reserved = 0x30 if deflates and opcode in (1, 2) else 0x70  # RFC 7692, 6
            if first & reserved or opcode not in (0, 1, 2, 8, 9, 10) or bad_control:
                expected = 1002
            assert status_of(sc.parse_frame_header, bytearray(data), deflates) == expected

    def test_close_code_is_judged_in_every_value(self) -> None:
        valid = {*range(1000, 1004), *range(1007, 1015), *range(3000, 5000)}
        for code in range(65536):
            expected = (code, "why") if code in valid else 1002
            payload = code.to_bytes(2, "big") + b"why"
            assert status_of(sc.parse_close_payload, payload) == expected

    @parametrize_rows("reason, kept", [
        ("none", "", ""), ("exact", "x" * 123, "x" * 123), ("one too long", "x" * 124, "x" * 123),
        ("two bytes", "\xe9" * 62, "\xe9" * 61),
        ("four bytes", "\U0001f600" * 31, "\U0001f600" * 30),
    ])  # fmt: skip
    def test_close_reason_is_cut_on_a_character(self, reason: str, kept: str) -> None:
        payload = sc.encode_close_payload(1001, reason)
        assert payload == b"\x03\xe9" + kept.encode("utf-8") and len(payload) <= 125
        assert sc.parse_close_payload(payload) == (1001, kept)


def squeeze(data: bytes, level: int = 6, bits: int = 15, flush: int = zlib.Z_SYNC_FLUSH) -> bytes:
    """Return the payload of a compressed message, made as RFC 7692, 7.2.1 says."""
    compressor = zlib.compressobj(level, zlib.DEFLATED, -bits)
    squeezed = compressor.compress(data) + compressor.flush(flush)
    if flush == zlib.Z_FINISH:  # 7.2.3.4
        return squeezed + b"\0"
    assert squeezed[-4:] == b"\0\0\xff\xff"
    return squeezed[:-4]


def receive_as_server(pieces: Iterable[bytes], deflate_bits: int = 0) -> Outcome:
    """Run a server's end. Items: messages. End: its close code and the frame it answers."""
    connection = sc.WebSocketConnection(deflate_bits=deflate_bits)
    items = [message for piece in pieces for message in connection.receive(piece)]
    answer = connection.answer
    if connection.state is sc.WebSocketState.OPEN:
        assert answer == b"" and connection.close_code is None
        return Outcome(items, None)
    assert connection.state is sc.WebSocketState.CLOSED
    return Outcome(items, (connection.close_code, answer))


def feed_websocket(data: bytes, deflate_bits: int = 0) -> Outcome:
    # A pong may stand everywhere between two frames.
    pong = sc.Message(sc.Opcode.PONG, b"tail")
    receive = functools.partial(receive_as_server, deflate_bits=deflate_bits)
    return feed_every_way(receive, data, build_frame(PONG, b"tail"), pong)


LIMIT = sc.MAX_MESSAGE_BYTES
WEBSOCKET_ACCEPTED = [
    ("text", build_frame(TEXT, b"Hello"), [(1, "Hello")]),
    ("binary", build_frame(BINARY, b"\xff\0"), [(2, b"\xff\0")]),
    ("ping", build_frame(PING, b"Hello"), [(9, b"Hello")]),
    ("ping of 125 bytes", build_frame(PING, b"p" * 125), [(9, b"p" * 125)]),
    ("pong unasked", build_frame(PONG), [(10, b"")]),
    *((f"text of {n}", build_frame(TEXT, b"x" * n), [(1, "x" * n)]) for n in EDGE_LENGTHS),
    ("two messages", build_frame(TEXT, b"a") + build_frame(BINARY, b"b"), [(1, "a"), (2, b"b")]),
    ("fragments", build_text(b"Hel", b"", b"lo"), [(1, "Hello")]),
    ("empty fragments", build_text(b"", b""), [(1, "")]),
    ("binary fragments", build_frame(BINARY_START, b"\xff") + build_frame(CONTINUE_END, b"a"),
     [(2, b"\xffa")]),
    ("fragments at the limit twice", build_text(b"x" * (LIMIT - 1), b"y") * 2,
     [(1, "x" * (LIMIT - 1) + "y")] * 2),
    ("1,024 fragments twice", build_text(*[b"x"] * 1024) * 2, [(1, "x" * 1024)] * 2),
    ("ping between fragments",
     build_frame(TEXT_START, b"a") + build_frame(PING, b"p") + build_frame(CONTINUE_END, b"b"),
     [(9, b"p"), (1, "ab")]),
    ("split code points", build_text(b"\xce", b"\xba\xe2\x82", b"\xac"), [(1, "\u03ba\u20ac")]),
    *((f"UTF-8 {text!r}", build_frame(TEXT, text.encode("utf-8")), [(1, text)]) for text in (
        "\0", "\x7f", "\x80", "\u07ff", "\u0800", "\ud7ff", "\ue000", "\ufeff", "\uffff",
        "\U00010000", "\U0010ffff")),
]  # fmt: skip

WEBSOCKET_REJECTED = [
    ("RSV1", build_frame(TEXT | 0x40, b"x"), 1002),
    *name_rows("unmasked", lambda first: build_frame(first, b"", None), 1002,
        [TEXT, BINARY, CLOSE, PING, PONG]),
    ("length 2**62", b"\x82\xff" + struct.pack("!Q", 2**62) + RFC_MASK, 1009),
    ("one byte too big", build_frame(BINARY, bytes(LIMIT + 1))[:14], 1009),
    ("too big in fragments",
     build_frame(TEXT_START, bytes(LIMIT)) + build_frame(CONTINUE_END, b"x")[:6], 1009),
    *name_rows("1,025 fragments of", lambda part: build_text(*[part] * 1025), 1009, [b"x", b""]),
    ("continuation first", build_frame(CONTINUE_END, b"x"), 1002),
    ("continuation after the end", build_text(b"a", b"b") + build_frame(CONTINUE, b"x"), 1002),
    ("text in fragments", build_frame(TEXT_START, b"x") + build_frame(TEXT, b"y"), 1002),
    ("binary in fragments", build_frame(TEXT_START, b"x") + build_frame(BINARY_START, b"y"), 1002),
    *name_rows("UTF-8", lambda bad: build_frame(TEXT, b"ok" + bad), 1007, [
        b"\x80", b"\xc0\x80", b"\xc1\xbf", b"\xe0\x80\x80", b"\xe0\x9f\xbf", b"\xf0\x80\x80\x80",
        b"\xed\xa0\x80", b"\xfe", b"\xed\xbf\xbf", b"\xf4\x90\x80\x80", b"\xf5\x80\x80\x80",
        b"\xff", b"\xe2\x82", b"\xce", b"\xf0\x9f\x98"]),
    ("UTF-8 cut in fragments", build_text(b"\xe2", b"\x82"), 1007),
    ("UTF-8 cut by an empty end", build_text(b"\xe2\x82", b""), 1007),
    ("UTF-8 in half a frame", build_frame(TEXT, b"\xff" + bytes(99))[:7], 1007),
    ("UTF-8 in an open message", build_frame(TEXT_START, b"\xff"), 1007),
    ("close of 1 byte", build_frame(CLOSE, b"\x03"), 1002),
    ("close reason", build_frame(CLOSE, b"\x03\xe8\xff"), 1007),
]  # fmt: skip


# What a message that is compressed looks like; the first rows are those of RFC 7692, 7.2.3.
DEFLATED, DEFLATED_BINARY, DEFLATED_START = 0xC1, 0xC2, 0x41
NOISE = random.Random(7692).randbytes(LIMIT)
DEFLATED_ACCEPTED = [
    *((f"Hello as {wire}", build_frame(DEFLATED, bytes.fromhex(wire)), [(1, "Hello")]) for wire in (
        "f248cdc9c90700", "000500faff48656c6c6f00", "f348cdc9c9070000", "f24805000000ffffcac9c90700")),
    ("fragments of the RFC", build_frame(DEFLATED_START, bytes.fromhex("f248cd"))
     + build_frame(PING, b"p") + build_frame(CONTINUE_END, bytes.fromhex("c9c90700")),
     [(9, b"p"), (1, "Hello")]),
    ("empty", build_frame(DEFLATED, b"\0"), [(1, "")]),
    ("fragment of nothing", build_frame(DEFLATED_START) + build_frame(CONTINUE, squeeze(b"a"))
     + build_frame(CONTINUE_END), [(1, "a")]),
    ("plain between", build_frame(DEFLATED, squeeze(b"a")) + build_frame(TEXT, b"b")
     + build_frame(DEFLATED_BINARY, squeeze(b"\xff")), [(1, "a"), (1, "b"), (2, b"\xff")]),
    ("split code points", build_frame(DEFLATED_START, squeeze(b"\xe2\x82\xac" * 50)[:9])
     + build_frame(CONTINUE_END, squeeze(b"\xe2\x82\xac" * 50)[9:]), [(1, "\u20ac" * 50)]),
    ("the limit", build_frame(DEFLATED, squeeze(b"x" * LIMIT)), [(1, "x" * LIMIT)]),
    ("the limit of noise", build_frame(DEFLATED_BINARY, squeeze(NOISE)), [(2, NOISE)]),
    ("flushed twice", build_frame(DEFLATED, squeeze(b"x") + b"\0\0\xff\xff\0"), [(1, "x")]),
]  # fmt: skip
DEFLATED_REJECTED = [
    *name_rows("RSV1", lambda first: build_frame(0x40 | first, squeeze(b"x")), 1002, [CLOSE, PING]),
    ("RSV1 on a continuation",
     build_frame(DEFLATED_START) + build_frame(0x40 | CONTINUE_END, squeeze(b"x")), 1002),
    ("RSV2", build_frame(DEFLATED | 0x20, squeeze(b"x")), 1002),
    ("a byte beyond the limit", build_frame(DEFLATED, squeeze(b"x" * (LIMIT + 1))), 1009),
    ("bomb", build_frame(DEFLATED, squeeze(bytes(2**24))), 1009),
    ("bomb in fragments", build_frame(DEFLATED_START, squeeze(b"x" * 80000)[:40])
     + build_frame(CONTINUE_END, squeeze(b"x" * 80000)[40:]), 1009),
    ("much for nothing", build_frame(DEFLATED, b"\0\0\0\xff\xff" * (LIMIT // 2))[:20], 1009),
    ("declared too long", b"\xc1\xff" + struct.pack("!Q", 2**62) + RFC_MASK, 1009),
    *name_rows("damaged", lambda wire: build_frame(DEFLATED, bytes.fromhex(wire)), 1007, [
        "", "07", "ff", "f248cdc9c9", "f248cdc9c907", "0300f248cdc9c90700", "0300000000ffff00"]),
    ("cut", build_frame(DEFLATED, squeeze(NOISE[:999])[:500]), 1007),
    ("UTF-8", build_frame(DEFLATED, squeeze(b"x" * 200 + b"\xff")), 1007),
    ("UTF-8 cut", build_frame(DEFLATED, squeeze(b"x" * 200 + b"\xe2\x82")), 1007),
    ("UTF-8 in an open message", build_frame(DEFLATED_START, squeeze(b"\xff" * 200)), 1007),
    ("context taken over", build_frame(DEFLATED, squeeze(NOISE[:64]))
     + build_frame(DEFLATED, bytes.fromhex("f200110000")), 1007),
]  # fmt: skip


class TestWebSocketConnection:
    """RFC 6455, 5.4 to 8.1: messages, control frames, closing and failing, in both roles."""

    @parametrize_rows("data, messages", WEBSOCKET_ACCEPTED)
    def test_message_is_received_when(self, data: bytes, messages: list[Any]) -> None:
        assert feed_websocket(data) == Outcome(messages, None)

    @parametrize_rows("data, code", WEBSOCKET_REJECTED)
    def test_connection_fails_when(self, data: bytes, code: int) -> None:
        close_code, answer = feed_websocket(data).end
        assert close_code == code and answer[:1] == b"\x88" and answer[1] == len(answer) - 2
        assert answer[2:4] == code.to_bytes(2, "big")

    @parametrize_rows("data, messages", DEFLATED_ACCEPTED)
    def test_compressed_message_is_received_when(self, data: bytes, messages: list[Any]) -> None:
        assert feed_websocket(data, 15) == Outcome(messages, None)

    @parametrize_rows("data, code", DEFLATED_REJECTED)
    def test_compressing_connection_fails_when(self, data: bytes, code: int) -> None:
        assert feed_websocket(data, 15).end[0] == code

    def test_a_bomb_is_never_unpacked(self) -> None:
        bomb = build_frame(DEFLATED, squeeze(bytes(2**26)))
        tracemalloc.start()
        try:
            assert receive_as_server([bomb], 15).end[0] == 1009
            assert tracemalloc.get_traced_memory()[1] < 16 * sc.MAX_MESSAGE_BYTES
        finally:
            tracemalloc.stop()

    @pytest.mark.parametrize("bits", [9, 15])
    @pytest.mark.parametrize("size", [0, 99, 100, 4096, 4097, 65536])
    def test_message_is_compressed_for_a_window(self, size: int, bits: int) -> None:
        text = (b"0123456789" * 100 + NOISE[:600].hex().encode())[: size or 1] * (size // 999 + 1)
        text = text[:size]
        for data, is_smaller in ((text, size >= 100), (NOISE[:size], False)):
            wire = sc.WebSocketConnection(deflate_bits=bits).encode(sc.Opcode.BINARY, data)
            first, payload = read_frames_of(wire)[0]
            assert first == (DEFLATED_BINARY if is_smaller else BINARY)
            assert (len(payload) < size) is is_smaller
            if is_smaller:  # fails where anything points beyond the window
                plain = zlib.decompressobj(-bits).decompress(payload + b"\0\0\xff\xff")
                assert plain == data

    def test_what_is_no_whole_message_is_never_compressed(self) -> None:
        connection = sc.WebSocketConnection(deflate_bits=15)
        data = b"x" * 125
        assert connection.encode(sc.Opcode.PING, data) == build_frame(PING, data, None)
        assert connection.encode(sc.Opcode.TEXT, data)[0] == DEFLATED

    def test_nothing_after_the_message_at_hand_is_looked_at(self) -> None:
        connection = sc.WebSocketConnection()
        messages = connection.take(build_frame(BINARY) + build_frame(TEXT, b"x") + b"\xff\xff")
        assert next(messages) == (2, b"")
        assert connection.close(1003) == b"\x88\x02\x03\xeb"
        assert list(messages) == [] and connection.answer == b""

    @pytest.mark.parametrize("code", [None, 1000, 1001, 1014, 3000, 4999])
    def test_close_is_echoed_with_its_code(self, code: int | None) -> None:
        payload = struct.pack("!H", code) + b"b\xc3\xa9" if code else b""
        echo = build_frame(CLOSE, payload[:2], None)
        assert feed_websocket(build_frame(CLOSE, payload)) == Outcome([(8, payload)], (code, echo))

    def test_data_after_the_close_is_ignored(self) -> None:
        connection = sc.WebSocketConnection()
        assert len(connection.receive(build_frame(CLOSE) + build_frame(TEXT, b"x"))) == 1
        assert connection.answer == b"\x88\x00"
        assert connection.receive(build_frame(TEXT, b"x") + b"\xff\xff") == []
        assert (connection.close_code, connection.answer) == (None, b"\x88\x00")
        assert connection.close(1001) == b""

    def test_our_close_is_sent_once_and_waits_for_the_answer(self) -> None:
        connection = sc.WebSocketConnection()
        assert connection.close(1001, "bye") == b"\x88\x05\x03\xe9bye"
        assert connection.close(1000) == b""
        ignored = build_frame(TEXT, b"x") + build_frame(PING) + build_text(b"a", b"b")
        assert connection.receive(ignored) == []
        assert connection.state is sc.WebSocketState.CLOSING
        payload = b"\x03\xe9why"
        assert connection.receive(build_frame(CLOSE, payload)) == [(8, payload)]
        assert connection.state is sc.WebSocketState.CLOSED and connection.answer == b""
        assert (connection.close_code, connection.close_reason) == (1001, "why")

    def test_violation_after_our_close_is_not_answered(self) -> None:
        connection = sc.WebSocketConnection()
        connection.close(1000)
        assert connection.receive(b"\xff\xff") == [] and connection.answer == b""
        assert connection.state is sc.WebSocketState.CLOSED and connection.close_code == 1002

    @pytest.mark.parametrize("first", [TEXT, BINARY, PING, CLOSE])
    def test_client_refuses_masked_frames(self, first: int) -> None:
        connection = sc.WebSocketConnection(make_mask=lambda: RFC_MASK)
        assert connection.receive(build_frame(first)) == [] and connection.close_code == 1002
        payload = b"\x03\xea" + connection.close_reason.encode("utf-8")
        assert connection.answer == build_frame(CLOSE, payload)

    def test_client_masks_each_frame_anew(self) -> None:
        masks = iter(FRAME_MASKS)
        connection = sc.WebSocketConnection(make_mask=lambda: next(masks))
        for mask in FRAME_MASKS[:3]:
            assert connection.encode(sc.Opcode.TEXT, b"Hello") == build_frame(TEXT, b"Hello", mask)
        assert connection.encode(sc.Opcode.PING, b"x") == build_frame(PING, b"x", FRAME_MASKS[3])
        assert connection.receive(build_frame(TEXT, b"hi", None)) == [(1, "hi")]
        assert connection.close(1000) == build_frame(CLOSE, b"\x03\xe8", FRAME_MASKS[4])

    @parametrize_rows("data, code", [
        ("3 bytes", build_frame(TEXT, b"abc"), None), ("4 bytes", build_frame(TEXT, b"abcd"), 1009),
        ("2 fragments", build_text(b"a", b"b"), None),
        ("3 fragments", build_text(b"a", b"b", b"c"), 1009),
        ("a ping", build_frame(PING, b"four"), None),
    ])  # fmt: skip
    def test_limits_are_those_that_were_given(self, data: bytes, code: int | None) -> None:
        connection = sc.WebSocketConnection(max_message_bytes=3, max_fragments=2)
        assert len(connection.receive(data)) == (code is None)
        assert connection.close_code == code

    @ANY_PROPERTY
    @given(st.lists(st.text()), st.booleans(), st.lists(st.integers(0, 9999)))
    def test_texts_round_trip(self, texts: list[str], to_server: bool, places: Any) -> None:
        masks = [lambda: RFC_MASK, None]
        sender, receiver = (
            sc.WebSocketConnection(make_mask, deflate_bits=9)
            for make_mask in masks[:: 1 if to_server else -1]
        )
        texts = [text * 40 for text in texts]
        wire = b"".join(sender.encode(sc.Opcode.TEXT, text.encode("utf-8")) for text in texts)
        wire += sender.close(3000, "end")
        received = [m for piece in cut_bytes(wire, places) for m in receiver.receive(piece)]
        assert received[:-1] == [(1, text) for text in texts]
        assert sender.receive(receiver.answer) == [(8, b"\x0b\xb8")]
        assert sender.state is receiver.state is sc.WebSocketState.CLOSED


each_loop = pytest.mark.parametrize("loop", loops())


def cases(*rows: tuple[Any, ...]) -> Any:
    """Parametrize a test with rows whose first column is the id and the argument `name`."""

    def decorate(test: Any) -> Any:
        arguments = inspect.signature(test).parameters
        names = [name for name in arguments if name not in ("self", "server")]
        return parametrize_rows(",".join(names), rows)(test)

    return decorate


# Section 9 -----------------------------------------------------------------------------------


def make_sample(**fields: Any) -> sc.Sample:
    empty = sc.Sample(0.0, 0, 0, 0, 0, 0, 0, 0, 0, {}, (0.0, 0.0, 0.0), 0.0)
    return empty._replace(**fields)


class TestStatistics:
    """Section 9: what /proc says, rates, the alert rule."""

    @cases(
        ("today's kernels", "cpu  10 20 30 400 50 6 7 8 9 9\ncpu0 1 1 1 1\n", (81, 531)),
        ("no steal", "cpu 1 2 3 4 5 6 7\n", (19, 28)), ("linux 2.4", "cpu 1 2 3 4", (6, 10)),
    )  # fmt: skip
    def test_cpu_times(self, stat: str, expected: tuple[int, int]) -> None:
        assert sc.parse_cpu_times(stat) == expected

    def test_meminfo_is_in_bytes(self) -> None:
        parsed = sc.parse_meminfo("MemTotal:  2 kB\nHugePages_Total:   3\nX(y): 1 kB\nEmpty:\n")
        assert parsed["MemTotal"] == 2048 and parsed["X(y)"] == 1024

    @cases(
        ("all but loopback", " lo: 9 1 0 0 0 0 0 0 9\neth0:5 1 0 0 0 0 0 0 7\nb: 1" + " 0" * 15, {"eth0": (5, 7), "b": (1, 0)}),
        ("head lines alone", "Inter-| Receive\n face |bytes\n", {}),
        ("a name like loopback's", "lo0: 3 1 0 0 0 0 0 0 4 0", {"lo0": (3, 4)}),
    )  # fmt: skip
    def test_net_dev(self, text: str, expected: dict[str, tuple[int, int]]) -> None:
        assert sc.parse_net_dev(text) == expected

    @cases(
        ("a third", 1, 3, 33.3), ("nothing elapsed, no time either", 0, 0, 0.0), ("all", 7, 7, 100.0),
        ("busy went back", -1, 10, 0.0), ("total went back", 5, -10, 0.0),
        ("more busy than total", 11, 10, 100.0), ("seconds instead of ticks", 0.02, 0.16, 12.5),
    )  # fmt: skip
    def test_cpu_percent(self, busy: float, total: float, expected: float) -> None:
        before = make_sample(busy_ticks=100, total_ticks=1000)
        after = make_sample(busy_ticks=100 + busy, total_ticks=1000 + total)
        assert sc.build_stats(before, after)["cpu"] == pytest.approx(expected)

    def test_stats_are_mib_and_rates(self) -> None:
        before = make_sample(now=10.0, net={"a": (1000, 5000)}, total_ticks=0)
        after = sc.Sample(
            12.0, 1, 8, 3 * sc.MIB - 1, 4 * sc.MIB, 1, 2 * sc.MIB, 5 * sc.MIB, 9 * sc.MIB,
            {"a": (2001, 4000)}, (0.123, 1.006, 2.0), 77.9,
        )  # fmt: skip
        assert sc.build_stats(before, after) == {
            "cpu": 12.5, "ram_used": 2, "ram_total": 4, "load_avg": [0.12, 1.01, 2.0],
            "swap_used": 0, "swap_total": 2, "disk_used": 5, "disk_total": 9,
            "net_recv": 500, "net_sent": 0, "uptime": 77,
        }  # fmt: skip

    @cases(
        ("the same ones", {"a": (10, 20), "b": (1, 2)}, {"a": (15, 26), "b": (2, 4)}, (6, 8)),
        ("one vanishes", {"a": (10, 20), "b": (10**9, 10**9)}, {"a": (15, 26)}, (5, 6)),
        ("one comes", {"a": (10, 20)}, {"a": (15, 26), "b": (100, 200)}, (105, 206)),
        ("one begins anew", {"a": (10, 20), "b": (10**9, 10**9)}, {"a": (15, 26), "b": (3, 4)}, (5, 6)),
        ("one is renamed", {"a": (10, 20), "b": (10**9, 10**9)}, {"a": (15, 26), "c": (10**9 + 2, 10**9)}, (7, 6)),
        ("none", {}, {}, (0, 0)),
    )  # fmt: skip
    def test_traffic(self, before: Any, after: Any, expected: tuple[int, int]) -> None:
        """What an interface does to the sum does not hide what the others carry."""
        samples = make_sample(now=1.0, net=before), make_sample(now=2.0, net=after)
        stats = sc.build_stats(*samples)
        assert (stats["net_recv"], stats["net_sent"]) == expected

    # Letters: A alert, r resolved, - nothing; one value a second.
    @cases(
        ("above, not equal", (90, 60, 0), [90, 90.1, 90], "-Ar"),
        ("once while it lasts", (90, 60, 0), [95] * 5 + [1, 1], "A----r-"),
        ("again after the cool-down", (90, 3, 0), [95] * 7, "A--A--A"),
        ("cool-down over a dip", (90, 3, 0), [95, 1, 95, 1, 95, 1], "Ar--Ar"),
        ("no alert, nothing to resolve", (90, 60, 0), [1, 1, 90], "---"),
        ("must last", (90, 60, 2), [95, 95, 95, 1], "--Ar"),
        ("a dip begins anew", (90, 60, 2), [95, 95, 1, 95, 95, 95], "-----A"),
        ("no cool-down", (90, 0, 0), [95, 95, 1], "AAr"),
    )
    def test_alert_rule(self, options: Any, values: Any, expected: str):
        rule = sc.AlertRule(*options)
        letters = {"cpu_alert": "A", "alert_resolved": "r", None: "-"}
        got = [letters[rule.update(value, 1000.0 + now)] for now, value in enumerate(values)]
        assert "".join(got) == expected

    def test_psutil_and_proc_give_equal_numbers(self) -> None:
        if sc.psutil is None or not os.path.exists("/proc/stat"):
            pytest.skip("needs psutil and /proc: the two sources are NOT compared")
        ticks = os.sysconf("SC_CLK_TCK")
        slack = {"ram_used": 256 * sc.MIB, "swap_used": 64 * sc.MIB, "disk_used": 256 * sc.MIB}
        proc, other, later = sc.read_proc_sample(), sc.read_psutil_sample(), sc.read_proc_sample()
        busy, total = other.busy_ticks * ticks, other.total_ticks * ticks
        other = other._replace(busy_ticks=busy, total_ticks=total)
        assert proc.net.keys() <= other.net.keys() | later.net.keys()
        for name in proc.net.keys() & other.net.keys() & later.net.keys():
            for low, count, high in zip(proc.net[name], other.net[name], later.net[name]):
                assert low <= count <= high, name
        for name in sc.Sample._fields:
            if name not in ("load_avg", "net"):
                low, high = sorted((getattr(proc, name), getattr(later, name)))
                room = slack.get(name, 0.51 if name == "uptime" else 0.01)
                assert low - room <= getattr(other, name) <= high + room, name
        assert other.load_avg == pytest.approx(proc.load_avg, abs=0.5)


# Section 10 ----------------------------------------------------------------------------------


def make_feed(count: int, capacity: int, **fields: Any) -> sc.Feed:
    feed = sc.Feed(lambda event: b"<%d>" % event["seq"], capacity, lambda frame, bits: frame)
    for number in range(count):
        feed.append({"type": "x", "seq": 0, **fields})
        assert feed.next == number + 2
    return feed


class TestFeed:
    """Section 10: one ordered, bounded log."""

    @cases(
        ("at least one", 1, b"<1>", 2), ("exactly full", 3, b"<1>", 2),
        ("one begins before the limit", 4, b"<1><2>", 3), ("all", 99, b"<1><2><3><4>", 5),
    )  # fmt: skip
    def test_batch_size(self, size: int, frames: bytes, cursor: int) -> None:
        with mock.patch.object(sc, "BATCH_BYTES", size):
            assert make_feed(4, sc.MIB).read_batch(1) == (frames, cursor)

    @pytest.mark.parametrize("is_read", [False, True], ids=["unread", "read"])
    @pytest.mark.parametrize("output", [None, b"x" * 3000], ids=["small", "output"])
    def test_oldest_are_dropped_beyond_the_capacity(self, is_read: bool, output: bytes | None):
        capacity, cost = 100_000, 2 * sc.EVENT_OVERHEAD_BYTES + len(output or b"")
        feed = make_feed(0, capacity)
        for seq in range(1, 6001):
            feed.append({"type": "x", "seq": 0, "output": output})
            if is_read:
                feed.read_batch(seq)
            assert feed.next == seq + 1 and feed.first <= seq
        room, cost = cost, len(b"<6000>") + sc.EVENT_OVERHEAD_BYTES if is_read else cost
        assert capacity - room - cost <= (6001 - feed.first) * cost <= capacity
        expected = b"".join(b"<%d>" % seq for seq in range(feed.first, 6001))
        assert feed.read_batch(feed.first) == (expected, 6001)
        assert len(feed._entries) == 6001 - feed.first, "dropped entries are freed"

    def test_newest_event_is_kept_however_large(self) -> None:
        feed = make_feed(3, 1000, output=b"x" * 5000)
        assert (feed.first, feed.next) == (3, 4)

    # Of 100 events 91 to 100 are kept.
    @cases(
        ("nothing missed", 100, 101, None), ("one missed", 99, 100, None),
        ("all kept ones missed", 90, 91, None), ("one too old", 89, 91, (90, 90)),
        ("from the beginning", 0, 91, (1, 90)), ("other boot", sys.maxsize, 91, (0, 90)),
        ("from the future", 101, 91, (0, 90)), ("from now on", None, 101, None),
    )  # fmt: skip
    @in_loop
    async def test_where_one_that_comes_back_goes_on(self, since: int | None, cursor: int, gap):
        viewers, viewer = sc.Viewers(asyncio.get_running_loop()), TestRounds.Viewer()
        viewer.transport.get_write_buffer_size.return_value = 0
        viewers.feed = make_feed(100, 10 * 2 * sc.EVENT_OVERHEAD_BYTES)
        assert (viewers.feed.first, viewers.feed.next) == (91, 101)
        viewers.join(viewer, since)
        viewers.flush_all()
        told, less, events = b"".join(viewer.taken).partition(b"<")
        assert less + events == b"".join(b"<%d>" % seq for seq in range(cursor, 101))
        assert told[2:] == (b'{"type":"gap","from":%d,"to":%d}' % gap if gap else b"")

    @pytest.mark.parametrize("seed", range(5))
    def test_chosen_events_beside_a_plain_list(self, seed: int, monkeypatch: Any) -> None:
        """Readers of any choice, at any pace: each gets what it chose, once, or a true gap."""
        monkeypatch.setattr(sc, "MAX_KINDS", 12)
        monkeypatch.setattr(sc, "BATCH_BYTES", 40)
        chance, encoded = random.Random(seed), set()

        def encode(event: dict[str, Any]) -> bytes:
            assert event["seq"] not in encoded
            encoded.add(event["seq"])
            return b"<%d>" % event["seq"]

        def compress(frame: bytes, bits: int) -> bytes:
            return frame + b"15" if bits == 15 else frame

        pool = [None, {"stats_update"}, {"3"}, {"task_output", "cpu_alert"}, {"2", "task_start"}, {"40"}, set()]  # fmt: skip
        feed, kinds_of = sc.Feed(encode, 30_000, compress), [set()]
        cursors = {(number, bits): 1 for number in range(len(pool)) for bits in (0, 9, 15)}
        for _ in range(12_000):
            kind = chance.choice(["stats_update", "task_start", "cpu_alert", *["task_output"] * 9])
            task_id = str(int(chance.paretovariate(0.7)) % 50)
            kinds = feed.append({"type": kind, "seq": 0, "task_id": task_id, "output": b"x" * chance.randrange(2000)})  # fmt: skip
            kinds_of.append(set(kinds))
            assert kinds == ((kind, task_id) if kind == "task_output" else (kind,))
            if chance.random() < 0.95:
                continue
            number, bits = chance.choice(list(cursors))
            chosen = pool[number] if pool[number] is None else frozenset(pool[number])

            def wanted(start: int, end: int, chosen: Any = chosen) -> list[int]:
                return [n for n in range(start, end) if chosen is None or kinds_of[n] & chosen]

            cursor = cursors[number, bits]
            lost = wanted(cursor, feed.first)
            is_unsure = cursor <= feed._forgotten and bool({"2", "3", "40"} & (chosen or set()))
            assert feed.has_dropped(cursor, chosen) is bool(lost) or is_unsure
            data, after = feed.read_batch(max(cursor, feed.first), chosen, bits)
            rest = wanted(max(cursor, feed.first), feed.next)
            assert lost or feed.find_next(cursor, chosen) == (rest or [feed.next])[0]
            got = [n for n in rest if n < after]
            end = b">15" if bits == 15 else b">"
            assert data == b"".join(b"<%d" % n + end for n in got)
            assert after == feed.next or got and after == got[-1] + 1
            cursors[number, bits] = after
            kept = sum(feed._size(one) for one in feed._entries.values())
            kept += sum(len(frame) for frame in feed._compressed.get(15, {}).values())
            assert len(feed._seqs) < 60 and feed._bytes == kept


class TestOutputLog:
    """Section 10: the newest output of a task, beside a plain bytes object."""

    STEPS = st.text("ab\n", max_size=40) | st.text("aé€😀", max_size=20) | st.integers(0, 60)

    @ANY_PROPERTY
    @given(st.integers(0, 60), st.lists(STEPS, max_size=25), st.integers(0, 200))
    def test_equals_a_simple_model(self, capacity: int, steps: list[Any], offset: int) -> None:
        def next_character(at: int) -> int:
            while at < len(everything) and everything[at] & 0xC0 == 0x80:
                at += 1
            return at

        with mock.patch.object(sc, "OUTPUT_BLOCK_BYTES", 16):
            log, everything, start = sc.OutputLog(capacity), b"", 0
            for step in steps:
                if isinstance(step, int):
                    log.drop_to(step)
                    start = next_character(max(start, len(everything) - step))
                else:
                    everything += step.encode("utf-8")
                    log.append(step.encode("utf-8"))
                    start = next_character(max(start, len(everything) - capacity))
                assert (log.start, log.end) == (start, len(everything))
                assert log.kept_bytes == len(everything) - start
                assert b"".join(log.read()) == everything[start:]
            begin = next_character(max(start, min(offset, len(everything))))
            assert b"".join(log.read(offset)) == everything[begin:]

    def test_readers_share_blocks_and_keep_them(self) -> None:
        log = sc.OutputLog(3 * sc.OUTPUT_BLOCK_BYTES)
        blocks = [bytes([number]) * sc.OUTPUT_BLOCK_BYTES for number in range(65, 75)]
        log.append(blocks[0])
        pieces = log.read()
        assert pieces[0] is blocks[0]
        for block in blocks[1:]:
            log.append(block)
        assert pieces == blocks[:1] and log.read() == blocks[-3:]
        assert (log.start, log.end) == (7 * sc.OUTPUT_BLOCK_BYTES, 10 * sc.OUTPUT_BLOCK_BYTES)

    def test_small_pieces_are_gathered_in_blocks(self) -> None:
        log = sc.OutputLog(sc.MIB)
        for _ in range(100_000):
            log.append(b"0123456789")
        assert b"".join(log.read()) == b"0123456789" * 100_000
        assert len(log.read()) <= sc.MIB // sc.OUTPUT_BLOCK_BYTES + 1

    @in_loop
    async def test_far_behind_is_read_in_large_pieces(self) -> None:
        """Each read lists all blocks up to the end, so there must be few reads."""
        task = sc.Task("1", sc.ExecRequest("x"), "me", sc.OutputLog(8 * sc.MIB))
        for _ in range(900):
            task.output.append(b"x" * 9000)
        task.completed.set_result(None)
        read = mock.Mock(wraps=task.output.read)
        with mock.patch.object(task.output, "read", read):
            pieces = [one async for one in sc.follow_output(task, 0, {}, lambda offset: None)]
        assert sum(map(len, pieces)) == 8_100_000 and read.call_count < 60


# Section 11 ----------------------------------------------------------------------------------


def parse_strict_json(text: Any) -> Any:
    """Parse JSON as RFC 8259 has it: NaN and Infinity are an error."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} in JSON")

    return json.loads(text, parse_constant=refuse)


class TestMessages:
    """Section 11: JSON out, requests in, datagrams."""

    @pytest.mark.parametrize("around", ["%s", 'a"\\\n\r\t%s\\"é', "\x00%s\x1b"])
    def test_escaping_of_every_character(self, around: str) -> None:
        for code in itertools.chain(range(0xD800), range(0xE000, 0x10FFFF, 97)):
            text = around % chr(code)
            escaped = b'"' + sc.escape_json_text(text.encode("utf-8")) + b'"'
            assert escaped == json.dumps(text, ensure_ascii=False).encode("utf-8"), hex(code)

    @pytest.mark.parametrize("size", [0, 1, 100, 60_000, 70_000])
    def test_event_is_one_text_frame(self, size: int) -> None:
        output = ('"\\\x07\n€😀' * size)[:size]
        event = {"type": "task_output", "seq": 3, "output": output.encode("utf-8"), "offset": 5}
        frames = read_frames_of(sc.encode_event(event))
        assert [frame[0] for frame in frames] == [0x81]
        assert parse_strict_json(frames[0][1]) == {**event, "output": output}
        frame = read_frames_of(sc.encode_event({"type": "x", "command": "é\ud800"}))[0]
        assert json.loads(frame[1].decode("utf-8")) == {"type": "x", "command": "é?"}

    @pytest.mark.parametrize("text", [
        "", "{", "[]", "5", "null", '"x"', '{"a":1,"a":1}', '{"a":{"b":1,"b":2}}', '{"a":NaN}',
        "9" * 65000, '{"a":-Infinity}', '{"a":1}x', "\ufeff{}", b"\xff{}", '{"a":"\n"}', "{'a':1}",
        "[" * 100_000, '{"a":' * 100_000,
    ], ids=lambda text: repr(text)[:20])  # fmt: skip
    def test_what_is_no_json_object(self, text: Any) -> None:
        assert status_of(sc.parse_json_object, text) == "bad_json"

    @cases(
        ("json", "application/json", '{"cmd":"ls"}', sc.ExecRequest("ls")),
        ("json, other name", "application/json", '{"command":"ls"}', sc.ExecRequest("ls")),
        ("json by its first byte", "application/x-www-form-urlencoded", '{"cmd":"é"}',
         sc.ExecRequest("é")),
        ("all fields", "", '{"cmd":"x","cwd":"/","env":{"A":"=b"},"timeout":1.5,"name":"n"}',
         sc.ExecRequest("x", "/", {"A": "=b"}, 1.5, "n")),
        ("json spaces", "application/json", ' \n{"cmd":"ls", "timeout":0} ', sc.ExecRequest("ls")),
        ("verbatim, as curl -d sends", "application/x-www-form-urlencoded", "echo a+b & c=%41",
         sc.ExecRequest("echo a+b & c=%41")),
        ("verbatim, no type", "", " uptime\n", sc.ExecRequest(" uptime\n")),
        ("plain text with a brace", "text/plain", "{ ls; }", sc.ExecRequest("{ ls; }")),
        ("plain text that looks like a form", "text/plain", "cmd=5 ls", sc.ExecRequest("cmd=5 ls")),
        ("longest", "", "x" * 65536, sc.ExecRequest("x" * 65536)),
        ("timeout of a year", "", '{"cmd":"x","timeout":31622400}',
         sc.ExecRequest("x", timeout=31622400)),
    )  # fmt: skip
    def test_exec_body(self, media_type: str, body: str, expected: Any) -> None:
        assert sc.parse_exec_body(media_type, body.encode("utf-8")) == expected

    @cases(
        *[(f"not an object: {body[:9]!r}", "application/json", body, "bad_json") for body in
          (b"", b"ls", b"[]", b"\xef\xbb\xbf{}", '{"cmd":"x"}'.encode("utf-16"),
           b'{"cmd":"x","timeout":1e400}')],
        ("brace is json", "", b"{ ls; }", "bad_json"),
        *[(f"no command: {body!r}", "", body, "bad_command") for body in
          (b"{}", b'{"cmd":5}', b'{"cmd":""}', b'{"cmd":" "}', b'{"cmd":null}', b'{"cmd":["a"]}',
           b'{"cmd":"a","command":"a"}', b"", b" \n", b"a\0b", b'{"cmd":"a\\u0000"}',
           b'{"cmd":"\\ud800"}', b'{"cmd":" \\n"}', b"\xff\xfe", b"\xed\xa0\x80")],
        ("form", "application/x-www-form-urlencoded", b"cmd=ls", "form_body"),
        ("form, other name", "application/x-www-form-urlencoded", b"command=ls&x=1", "form_body"),
        ("multipart", "multipart/form-data", b"--x", "unsupported_media_type"),
        ("a byte too long", "", b"x" * 65537, "too_large"),
        ("too long in bytes", "", "é".encode() * 32769, "too_large"),
        *[(f"field {field}", "", b'{"cmd":"x",%b}' % field.encode(), "bad_field") for field in
          ('"cwd":5', '"cwd":""', '"cwd":"\\u0000"', '"env":[]', '"env":{"A":1}', '"env":{"":"x"}',
           '"env":{"A=":"x"}', '"env":{"A":"\\u0000"}', '"env":{"\\udfff":""}', '"timeout":"1"',
           '"timeout":true', '"timeout":-1', '"timeout":31622401',
           '"timeout":null', '"timeout":1e300', '"name":5', '"env":null',
           '"env":[["A","b"]]', '"window":-1', '"window":true', '"window":"1"', '"window":1.5',
           '"stdin":5', '"stdin":null', '"stdin":"\\ud800"', '"tty":1', '"tty":"yes"',
           '"tty":true,"cols":0', '"tty":true,"rows":10000', '"tty":true,"cols":80.5',
           '"tty":true,"rows":true', '"cols":80', '"tty":false,"rows":24', '"name":""', '"name":"%s"' % ("n" * 201))],
        ("unknown field", "", b'{"cmd":"x","comand":"y"}', "unknown_field"),
        ("other case", "", b'{"cmd":"x","Cmd":"y"}', "unknown_field"),
        ("command too long", "", b'{"cmd":"%b"}' % (b"#" * 65537), "too_large"),
    )  # fmt: skip
    def test_exec_body_refused(self, media_type: str, body: bytes, code: str) -> None:
        assert status_of(sc.parse_exec_body, media_type, body) == code
        status = {"too_large": 413, "unsupported_media_type": 415}.get(code, 400)
        assert sc.COMMAND_STATUS.get(code, 400) == status

    def test_task_id(self) -> None:
        assert sc.parse_task_id("107") == "107"
        for wrong in ("", "1_0", "+1", " 1", "-1", "٣", "9" * 10240, 1, None, "x"):
            assert status_of(sc.parse_task_id, wrong) == "bad_field", wrong

    def test_signal(self) -> None:
        numbers = {"TERM": 15, "SIGKILL": 9, "int": 2, "sighup": 1}
        assert {name: sc.parse_signal(name) for name in numbers} == numbers
        for wrong in ("", "SIG", "9", 9, None, [], "SIGSIGTERM", "TERM ", "XYZ", "0"):
            assert status_of(sc.parse_signal, wrong) == "bad_signal", wrong

    @cases(
        ("plain", "web1", "web1"), ("empty", "", ""), ("64 letters", "h" * 64, "h" * 64),
        ("quotes", '"' * 64, None), ("backslashes", "\\" * 64, None), ("NUL", "\0" * 64, None),
        ("two bytes", "ü" * 64, None), ("four bytes", "😀" * 64, None), ("surrogates", "\udcff", "?"),
        ("1,000", "x" * 1000, None), ("escape", '","auth":true,"x":"', '","auth":true,"x":"'),
    )  # fmt: skip
    def test_discovery_reply_fits(self, hostname: str, expected: str | None) -> None:
        facts = {"hostname": hostname, "port": 65535, "ws_port": 65535, "discovery_port": 65535,
                 "version": "10.10.10", "tls": False, "auth": False, "exec": False,
                 "id": "f" * 16}  # fmt: skip
        reply = sc.encode_discovery_reply(facts)
        parsed = parse_strict_json(reply.decode("utf-8"))
        assert len(reply) <= 256 and parsed.pop("type") == "SERVER_RESPONSE"
        name = parsed["hostname"]
        assert name == expected if expected is not None else hostname.startswith(name)
        assert len(name) == len(hostname) or len(reply) > 240, "no more is cut than needed"
        assert {**parsed, "hostname": hostname} == facts

    def test_link_routes(self) -> None:
        def row(*addresses: str) -> str:
            raw = [struct.unpack("=I", socket.inet_aton(one))[0] for one in addresses]
            return "eth0 %08X %08X 0001 0 0 0 %08X 0 0 0\n" % tuple(raw)

        table = "Iface Destination Gateway Flags RefCnt Use Metric Mask MTU Window IRTT\n"
        table += row("0.0.0.0", "192.0.2.1", "0.0.0.0") + row("0.0.0.0", "0.0.0.0", "0.0.0.0")
        table += row("192.0.2.0", "0.0.0.0", "255.255.255.128")
        table += row("198.51.100.0", "192.0.2.1", "255.255.255.0")
        table += row("203.0.113.7", "0.0.0.0", "255.255.255.255")
        expected = ["192.0.2.0/25", "203.0.113.7/32"]
        assert [str(network) for network in sc.parse_link_routes(table)] == expected
        assert sc.parse_link_routes(table.split("\n", 1)[0]) == []

    @in_loop
    async def test_reply_limit(self) -> None:
        def allow(name: str, now: float) -> bool:
            return bool(discovery.may_answer("127.0.0." + name, now))

        with contextlib.closing(sc.Discovery(0, [], False, dict)) as discovery:
            assert [allow("101", 7.0 + n / 100) for n in range(7)] == [True] * 5 + [False] * 2
            assert allow("102", 7.5) and allow("101", 8.0)
            granted = [allow(str(n), 9.0) for n in range(100)]
            assert granted == [True] * 50 + [False] * 50
            assert allow("99", 10.0)

    @in_loop
    async def test_port_that_the_kernel_chooses_is_no_other_servers(self, monkeypatch: Any) -> None:
        shared, option = [], (socket.SOL_SOCKET, socket.SO_REUSEADDR)
        bind = lambda one, address: shared.append(one.getsockopt(*option) > 0)  # noqa: E731
        monkeypatch.setattr(socket, "socket", type("Socket", (socket.socket,), {"bind": bind}))
        sc.Discovery(0, ["127.0.0.1"], True, dict).close()
        assert shared == [False, False]

    @cases(
        ("loopback", True, "127.0.0.1", True), ("loopback net", True, "127.9.9.9", True),
        ("other on loopback bind", True, "192.0.2.7", False),
        ("on link", False, "192.0.2.7", True), ("off link", False, "198.51.100.1", False),
        ("loopback on network bind", False, "127.0.0.1", True),
    )  # fmt: skip
    @in_loop
    async def test_probe_of_a_neighbour(self, only: bool, source: str, answered: bool) -> None:
        network = ipaddress.IPv4Network("192.0.2.0/24")
        with contextlib.closing(sc.Discovery(0, [], only, dict)) as discovery:
            with mock.patch.object(sc, "read_link_networks", lambda: [network]):
                assert discovery.may_answer(source, 7.0) is answered


# End to end: pieces --------------------------------------------------------------------------

ACCEPT = b"s3pPLMBiTxaQ9kYGzzhZRbK+xOo="  # what must answer RFC_KEY
UPGRADE_WS = http_message(
    *("GET /ws HTTP/1.1", "Host: localhost", *UPGRADE[::-1], VERSION_FIELD, KEY_FIELD)
).decode("ascii")


# Section 11, metrics and webhook --------------------------------------------------------------

# SPEC 12: name -> type; each with the prefix, but for those of the process.
SPEC_METRICS = {
    **dict.fromkeys(
        "build_info cpu_usage_ratio memory_used_bytes memory_total_bytes swap_used_bytes "
        "filesystem_used_bytes filesystem_size_bytes load1 uptime_seconds tasks_running viewers "
        "process_resident_memory_bytes process_open_fds".split(), "gauge"),
    **dict.fromkeys(
        "network_receive_bytes_total network_transmit_bytes_total tasks_started_total "
        "tasks_completed_total task_output_bytes_total events_total viewer_gaps_total "
        "viewer_bytes_total "
        "refused_total audit_errors_total alerts_total process_cpu_seconds_total".split(),
        "counter"),
    "task_duration_seconds": "histogram",
}  # fmt: skip
METRIC_LINE = re.compile(
    r'([a-z_][a-z0-9_]*)(?:\{([a-z]+)="((?:[^"\\\n]|\\[\\"n])*)"\})? (-?[0-9.]+(?:e[+-]?[0-9]+)?)'
)


def parse_metrics(text: str) -> tuple[dict[str, str], dict[tuple[str, str], float]]:
    """Return (name -> type, (name, label's value) -> number); what is not the format fails."""
    kinds: dict[str, str] = {}
    values: dict[tuple[str, str], float] = {}
    assert text.endswith("\n")
    lines = text[:-1].split("\n")
    while lines:
        name = re.fullmatch(r"# HELP (\w+) [A-Z].*\.", lines.pop(0)).group(1)  # type: ignore
        kinds[name] = re.fullmatch(rf"# TYPE {name} (\w+)", lines.pop(0)).group(1)  # type: ignore
        while lines and lines[0][0] != "#":
            match = METRIC_LINE.fullmatch(lines.pop(0))
            assert match and match.group(1).startswith(name)
            escaped = {"\\\\": "\\", '\\"': '"', "\\n": "\n"}
            label = re.sub(r"\\.", lambda m: escaped[m.group()], match.group(3) or "")
            assert (match.group(1), label) not in values
            values[match.group(1), label] = float(match.group(4))
    return kinds, values


class TestMetricsText:
    """Section 11: Prometheus' text format 0.0.4."""

    def test_each_kind_of_metric(self) -> None:
        histogram = sc.Histogram((0.5, 2))
        for value in (0.1, 0.5, 0.51, 2.0, 3):
            histogram.add(value)
        rows = [("load1", 0.25), ("tasks_completed_total{state}", {"done": 2, "killed": 0}),
                ("viewers", None), ("task_duration_seconds", histogram), ("process_open_fds", 7)]  # fmt: skip
        text = sc.encode_metrics((*row, "Help.") for row in rows).decode()
        lines = [line for line in text.split("\n") if not line.startswith("# HELP")]
        assert lines == [
            "# TYPE servercontrol_load1 gauge", "servercontrol_load1 0.25",
            "# TYPE servercontrol_tasks_completed_total counter",
            'servercontrol_tasks_completed_total{state="done"} 2',
            'servercontrol_tasks_completed_total{state="killed"} 0',
            "# TYPE servercontrol_task_duration_seconds histogram",
            'servercontrol_task_duration_seconds_bucket{le="0.5"} 2',
            'servercontrol_task_duration_seconds_bucket{le="2"} 4',
            'servercontrol_task_duration_seconds_bucket{le="+Inf"} 5',
            "servercontrol_task_duration_seconds_sum 6.109999999999999",
            "servercontrol_task_duration_seconds_count 5",
            "# TYPE process_open_fds gauge", "process_open_fds 7", "",
        ]  # fmt: skip
        assert text.count("# HELP") == text.count("# TYPE")

    @ANY_PROPERTY
    @given(st.text(), st.integers() | st.floats(allow_nan=False, allow_infinity=False))
    def test_labels_and_numbers_come_back(self, text: str, value: float) -> None:
        encoded = sc.encode_metrics([("build_info{version}", {text: value}, "It is.")])
        (got,) = parse_metrics(encoded.decode("utf-8"))[1].items()
        assert got == (("servercontrol_build_info", text), float(value))


class TestWebhookRequest:
    """Section 11: where an alert is posted, and how."""

    @cases(
        ("plain", "http://example.org/a/b?c=d#e", ("http://example.org", False, "example.org", 80, "/a/b?c=d")),
        ("TLS, no path", "https://example.org", ("https://example.org", True, "example.org", 443, "/")),
        ("port", "http://127.0.0.1:9000?x", ("http://127.0.0.1:9000", False, "127.0.0.1", 9000, "/?x")),
        ("IPv6", "https://[::1]:9/", ("https://[::1]:9", True, "::1", 9, "/")),
        ("account", "HTTP://u:p@Example.org/", ("http://Example.org", False, "example.org", 80, "/")),
        ("@ in the account", "http://a@b:p@c/", ("http://c", False, "c", 80, "/")),
    )  # fmt: skip
    def test_url_is_taken_apart(self, url: str, expected: Any) -> None:
        assert sc.parse_webhook_url(url)[:5] == expected

    @pytest.mark.parametrize("url", [
        "", "example.org", "//example.org/", "ftp://example.org/", "http://", "http:///x",
        "http://:80/", "http://u:p@/", "http://a:b/", "http://a:65536/", "http://a:0/",
        "http://a:-1/", "http://[::1/", "http://[x]/", "http://a b/", "http://a/b c", "http://a/\n",
        "http://a/\r\nHost: b", "\thttp://a/", "http://a/\x00", "http://b\xfccher.example/",
        "http://a\\@b/", "http://a/\x7f", "http://a%20b/",
    ])  # fmt: skip
    def test_what_is_no_url_is_refused(self, url: str) -> None:
        with pytest.raises((ValueError, sc.HttpError)):
            sc.parse_webhook_url(url)

    def test_request_is_what_others_read(self) -> None:
        url = sc.parse_webhook_url("http://user:p%40ss%3a@example.org:81/a?b=c")
        method, target, fields, body = parse_with_h11(sc.encode_webhook_request(url, b'{"a":1}'))
        assert (method, target, body) == ("POST", "/a?b=c", b'{"a":1}')
        assert dict(fields) == {
            "host": "example.org:81", "content-type": "application/json", "content-length": "7",
            "authorization": "Basic " + base64.b64encode(b"user:p@ss:").decode(),
            "user-agent": f"servercontrol/{sc.__version__}", "connection": "close",
        }  # fmt: skip
        url = sc.parse_webhook_url("http://example.org/")
        assert b"Authorization" not in sc.encode_webhook_request(url, b"")

    @cases(
        ("final", b"HTTP/1.1 200 OK\r\n", 200),
        ("HTTP/1.0, bare line end", b"HTTP/1.0 503\n", 503),
        ("early hints", b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\nHTTP/1.1 204 \r\n", 204),
        ("two before it", b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 102\n\nHTTP/1.1 302 Found\r\n", 302),
        ("a field that looks like one", b"HTTP/1.1 103 \r\nX:\r\nHTTP/1.1 200 OK\r\n\r\nHTTP/1.1 500 \r\n", 500),
    )  # fmt: skip
    def test_status_of_the_answer(self, data: bytes, expected: int) -> None:
        """RFC 9110, 15.2: what comes before the final answer is skipped."""
        assert sc.parse_webhook_answer(data + b"X: y\r\n\r\nHTTP/1.1 404 body\r\n\r\n") == expected
        for length in range(len(data)):
            assert sc.parse_webhook_answer(data[:length]) is None

    @pytest.mark.parametrize("data", [
        b"\n", b"\r\nHTTP/1.1 200 OK\r\n", b"SSH-2.0-OpenSSH\r\n", b"HTTP/1.1 2000 OK\r\n",
        b"HTTP/2 200\r\n", b"HTTP/1.1 20\r\n", b"HTTP/1.1 100 Continue\r\n\r\nnoise\r\n",
    ])  # fmt: skip
    def test_what_is_no_answer_is_refused(self, data: bytes) -> None:
        assert sc.parse_webhook_answer(data) == 0


class TestRandomInput:
    """Sections 5 to 11: mutated input, the same each time, as `fuzz` makes and checks it."""

    @pytest.mark.parametrize("name, count", [
        ("http", 500), ("h11", 4000), ("frames", 9000), ("websocket", 600), ("websockets", 4000),
        ("deflated", 200), ("query", 1000), ("access", 1000), ("body", 1000),
    ])  # fmt: skip
    def test_nothing_is_found(self, name: str, count: int) -> None:
        job, ends = FUZZ_JOBS[name], set()
        for number in range(count):
            case = job.make(random.Random(f"{name} {number}"))
            outcome = job.parse(case)
            job.check(case, outcome)
            ends.add(str(outcome.end))
        assert len(ends) > 2


def make_frame(first: int, payload: bytes | str = b"", masked: bool = True) -> bytes:
    data = payload.encode("utf-8", "surrogatepass") if isinstance(payload, str) else payload
    return build_frame(first, data, b"\x11\x00\xfe\x5a" if masked else None)


def read_frames_of(data: bytes) -> list[tuple[int, bytes]]:
    buffer = bytearray(data)
    frames = list(iter(functools.partial(take_frame, buffer), None))
    assert not buffer, "the end cuts a frame"
    return frames


def take_frame(buffer: bytearray) -> tuple[int, bytes] | None:
    """Cut the first frame off a buffer; None when it is not whole."""
    if len(buffer) < 2:
        return None
    assert not buffer[1] & 0x80, "a server's frame is not masked"
    size = {126: 2, 127: 8}.get(buffer[1], 0)
    length = int.from_bytes(buffer[2 : 2 + size], "big") if size else buffer[1]
    if len(buffer) < 2 + size + length:
        return None
    frame = buffer[0], bytes(buffer[2 + size : 2 + size + length])
    del buffer[: 2 + size + length]
    return frame


def inflate_text(first: int, payload: bytes, bits: int = 15) -> str:
    if first == 0xC1:
        payload = zlib.decompressobj(-bits).decompress(payload + b"\0\0\xff\xff")
    return payload.decode("utf-8")


def upgrade_request(path: str = "/ws", offer: str = "", host: str = "localhost") -> bytes:
    """Return the upgrade of a client. offer: its Sec-WebSocket-Extensions."""
    text = UPGRADE_WS.replace("/ws", path).replace("localhost", host)
    field = f"Sec-WebSocket-Extensions: {offer}\r\n" if offer else ""
    return f"{text[:-2]}{field}\r\n".encode()


class RawPeer:
    """A WebSocket client on a bare socket: it reads when it is told to and can break any rule."""

    def __init__(self, server: Any, path="/", receive_bytes=0, wrap=None, offer=""):
        self.socket = socket.socket()
        if receive_bytes:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        self.socket.settimeout(PATIENCE_SECONDS)
        self.socket.connect(("127.0.0.1", server.ws_port))
        self.socket = wrap(self.socket) if wrap else self.socket
        self.socket.sendall(upgrade_request(path, offer))
        self.buffer = bytearray()
        while b"\r\n\r\n" not in self.buffer:
            assert self.read_some(), "no answer to the upgrade"
        end = self.buffer.index(b"\r\n\r\n") + 4
        self.head = bytes(self.buffer[:end])
        assert self.head.startswith(b"HTTP/1.1 101 "), self.head
        del self.buffer[:end]

    def __enter__(self) -> RawPeer:
        return self

    def __exit__(self, *_: Any) -> None:
        self.socket.close()

    def send(self, *frames: bytes) -> None:
        self.socket.sendall(b"".join(frames))

    def say(self, **message: Any) -> None:
        self.send(make_frame(0x81, json.dumps(message)))

    def read_some(self, size: int = 65536) -> int:
        data = self.socket.recv(size)
        self.buffer += data
        return len(data)

    def frames(self) -> Iterator[tuple[int, bytes]]:
        """Give frames until the server closes; a reset is an error: it can destroy what was
        sent before it."""
        while True:
            frame = take_frame(self.buffer)
            if frame is not None:
                yield frame
            elif not self.read_some():
                assert not self.buffer, "the end cuts a frame"
                return

    def read_until(self, first: int, payload: bytes | None = None) -> list[tuple[int, bytes]]:
        """Return the frames up to one that begins with `first` (and has this payload)."""
        seen = []
        for frame in self.frames():
            seen.append(frame)
            if frame[0] == first and payload in (None, frame[1]):
                return seen
        raise AssertionError(f"closed before {first:#x}: {seen[-3:]}")

    def receive(self, until: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
        """Return the JSON messages up to the first that `until` accepts."""
        messages = []
        for first, payload in self.frames():
            if first in (0x81, 0xC1):
                messages.append(parse_strict_json(inflate_text(first, payload)))
                if until(messages[-1]):
                    return messages
        raise AssertionError(f"closed before it came: {messages[-3:]}")

    def read_close(self) -> tuple[int | None, str]:
        """Return (code, reason) of the close frame. It must be the last frame, then the end."""
        frames = list(self.frames())
        closes = [n for n, frame in enumerate(frames) if frame[0] == 0x88]
        assert closes == [len(frames) - 1], f"close frames at {closes} of {len(frames)} frames"
        payload = frames[-1][1]
        code = int.from_bytes(payload[:2], "big") if payload else None
        return code, payload[2:].decode("utf-8")


def is_type(*kinds: str) -> Callable[[dict[str, Any]], bool]:
    return lambda message: message["type"] in kinds


def make_launcher(folder: Path, code: str = "", **constants: Any) -> str:
    """Return a script that changes the imported module, by constants and code, and then runs it."""
    lines = [f"import os, sys; sys.path.insert(0, {str(HERE)!r})", "import servercontrol as sc"]
    for name, value in constants.items():
        assert hasattr(sc, name)
        lines.append(f"sc.{name} = {value!r}")
    path = folder / "launcher.py"
    path.write_text("\n".join([*lines, code, "sys.exit(sc.main())\n"]), encoding="utf-8")
    return str(path)


class Usage:
    """The CPU usage that a server started with `script` sees: what the test sets, in percent."""

    CODE = """
class Scripted:
    busy = total = 0.0
    def __call__(self):
        self.total += 100
        self.busy += float(open(%r).read())
        return sc.read_proc_sample()._replace(busy_ticks=self.busy, total_ticks=self.total)
sc.choose_source = Scripted
"""

    def __init__(self, folder: Path, code: str = "", **constants: Any) -> None:
        self.path = folder / "usage"
        self.set(10)
        self.script = make_launcher(folder, self.CODE % str(self.path) + code, **constants)

    def set(self, percent: float) -> None:
        new = self.path.with_name("new")
        new.write_text(str(percent))
        os.replace(new, self.path)


def check_stream(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Check that seqs rise by one, but over gaps, which name exactly what is missing; and that
    each task's events are in order. Return the gaps."""
    expected, gaps = None, []
    offsets: dict[str, Any] = {}
    for event in events:
        if event["type"] == "gap":
            assert set(event) == {"type", "from", "to"} and event["from"] <= event["to"]
            assert expected is None or event["from"] == expected
            expected, offsets = event["to"] + 1, {}
            gaps.append(event)
            continue
        assert expected is None or event["seq"] == expected
        expected = event["seq"] + 1
        task_id = event.get("task_id")
        if event["type"] == "task_start":
            assert task_id not in offsets
            offsets[task_id] = 0
        elif event["type"] == "task_output":
            assert event["offset"] == offsets.get(task_id, event["offset"])
            offsets[task_id] = event["offset"] + len(event["output"].encode("utf-8"))
        elif event["type"] == "task_complete":
            assert event["output_bytes"] == offsets.get(task_id, event["output_bytes"])
            offsets[task_id] = "ended"
    return gaps


# End to end: WebSocket -----------------------------------------------------------------------


class TestWebSocketHandshake:
    """SPEC 2, CASES 22 to 25, on a real server."""

    @cases(
        ("as it is", "", "", "101"),
        ("path /", "/ws", "/", "101"), ("unknown parameter of a proxy", "/ws", "/ws?x=1", "101"),
        ("other path", "/ws", "/socket", "404"), ("a route's path", "/ws", "/tasks", "404"),
        ("slash", "/ws", "/ws/", "404"), ("letter case of the path", "/ws", "/WS", "404"),
        ("no key", f"{KEY_FIELD}\r\n", "", "400"),
        ("not an upgrade", "Upgrade: websocket\r\nConnection: Upgrade\r\n", "", "426"),
        ("other host", "localhost", "evil.test", "403"),
        ("other origin", "Host:", "Origin: http://evil.test\r\nHost:", "403"),
        ("proxy, /ws", "Host:", "X-Forwarded-For: 192.0.2.1\r\nHost:", "401"),
        ("proxy, /", "/ws HTTP/1.1\r\n", "/ HTTP/1.1\r\nVia: 1.1 proxy\r\n", "401"),
        *[(f"since={since}", "/ws", f"/ws?since={since}", "400") for since in
          ("", "x", "-1", "1_0", "%D9%A3", "1.0", "9" * 30, "1&since=1")],
        *[(f"choice {query}", "/ws", f"/ws?{query}", "400") for query in (
            "only=", "only=exec", "only=stats_update,", "task=", "task=x", "task=none&task=1", "only=a&only=b")],
    )  # fmt: skip
    def test_answer(self, server: ServerProcess, old: str, new: str, status: str) -> None:
        request = UPGRADE_WS.replace(old, new, 1) if old else UPGRADE_WS
        assert request != UPGRADE_WS or not old
        failed = len(server.log("request_failed"))
        for port in (server.port, server.ws_port):
            with server.connect(port) as connection:
                # What follows an upgrade may come in the same segment.
                connection.sendall(request.encode("ascii") + make_frame(0x88) * (status == "101"))
                answer = connection.recv(65536)
                head = answer.partition(b"\r\n\r\n")[0] + b"\r\n"
                assert head.startswith(b"HTTP/1.1 %b " % status.encode("ascii")), answer
                if status == "101":
                    assert b"\r\nSec-WebSocket-Accept: %b\r\n" % ACCEPT in head
                    assert b"Extensions:" not in head and b"Protocol:" not in head
                    assert (answer + read_all(connection)).endswith(b"\x88\x00")
                elif status == "426":
                    assert b"\r\nSec-WebSocket-Version: 13\r\n" in head
        assert len(server.log("request_failed")) == failed


class TestWebSocketRules:
    """RFC 6455 on a real server; CASES 26 to 37."""

    @cases(
        ("unmasked", make_frame(0x81, "{}", masked=False), 1002),
        ("far too long", make_frame(0x81, b"x" * 3_000_000), 1009),
        ("close echoed", make_frame(0x88, b"\x0b\xb8bye"), 3000),
        ("close without a code", make_frame(0x88), None),
        ("HTTP request", b"POST /exec HTTP/1.1\r\nHost: localhost\r\n\r\nuptime" * 20, 1002),
    )  # fmt: skip
    def test_ends_with_the_right_code(self, server: ServerProcess, data: bytes, code: int | None):
        tasks = server.get("/tasks")
        with RawPeer(server) as peer:
            with contextlib.suppress(ConnectionError):  # what is too long need not be taken
                peer.send(data)
            got = peer.read_close()
            assert got[0] == code and len(got[1].encode("utf-8")) <= 123
        assert server.get("/tasks") == tasks

    def test_descriptors_are_freed(self, server: ServerProcess) -> None:
        before = server.descriptors()
        peers = [RawPeer(server) for _ in range(30)]
        assert server.get("/info")["clients"] == 30
        for number, peer in enumerate(peers):
            peer.send((b"", make_frame(0x88), b"\xff\xff")[number % 3])
            peer.socket.close()
        wait_until(lambda: server.descriptors() <= before and server.get("/info")["clients"] == 0)

    def test_ping_flood_that_reads_nothing(self, server: ServerProcess) -> None:
        with RawPeer(server, receive_bytes=4096) as peer, server.websocket() as other:
            before = server.resident_kib()
            for number in range(100):
                peer.send(*[make_frame(0x89, b"%0125d" % (number * 1000 + n)) for n in range(1000)])
            other.send('{"type":"ping"}')
            assert receive_events(other, is_type("pong"))
            assert server.resident_kib() - before < 16 * 1024
            frames = peer.read_until(0x8A, b"%0125d" % 99_999)
            pongs = [int(payload) for first, payload in frames if first == 0x8A]
            assert pongs == sorted(set(pongs)) and len(pongs) < 100_000

    @each_loop
    def test_nothing_follows_our_close(self, loop: str, tmp_path: Path) -> None:
        times = {"CLOSE_SECONDS": 0.5, "SWEEP_SECONDS": 0.05}
        with ServerProcess(tmp_path, f"--loop={loop}", "--interval=0.05", **times) as server:
            task_id = server.start("sleep 60")
            kill = json.dumps({"type": "task_kill", "task_id": task_id, "signal": "KILL"})
            later = [b"\xff\xff", make_frame(0x81, b"\xff"), make_frame(0x88, b"\x03\xe8")]
            for data in (b"", make_frame(0x82) + b"\x88\x80mask", *later):
                with RawPeer(server) as peer:
                    peer.send(make_frame(0x82), make_frame(0x81, kill), make_frame(0x89, b"x"))
                    peer.send(make_frame(0x81, '{"type":"hello"}') + data)
                    frames = list(peer.frames())  # and the end, though we never answer
                    assert frames[-1] == (0x88, b"\x03\xebtext messages only")
                    assert not [one for one in frames if one[0] == 0x8A or b'"hello"' in one[1]]
            assert server.task(task_id)["state"] == "running"
            with RawPeer(server, receive_bytes=4096) as peer:  # asks much, but never reads
                before, end = server.resident_kib(), time.monotonic() + PATIENCE_SECONDS
                with pytest.raises(ConnectionError):
                    while time.monotonic() < end:
                        peer.send(make_frame(0x81, '{"type":"hello"}') * 1000)
                assert server.resident_kib() - before < 32 * 1024
            wait_until(lambda: server.get("/info")["clients"] == 0)

    def test_times_are_those_of_the_contract(self) -> None:
        assert (sc.CLOSE_SECONDS, sc.PING_SECONDS, sc.STOP_CLOSE_SECONDS) == (5.0, 20.0, 0.6)
        assert (sc.WRITE_STALL_SECONDS, sc.KEEP_EVENTS_BYTES) == (30.0, 16 * sc.MIB)

    def test_nothing_lingers_after_both_closes(self, tmp_path: Path) -> None:
        with ServerProcess(tmp_path, LINGER_SECONDS=300.0) as server, RawPeer(server) as peer:
            peer.send(make_frame(0x82, b"x"))
            assert peer.read_until(0x88)[-1][1][:2] == (1003).to_bytes(2, "big")
            held = server.descriptors()
            peer.send(make_frame(0x88, b"\x03\xeb"))
            wait_until(lambda: server.descriptors() < held)

    @each_loop
    def test_pings_and_dead_peers(self, loop: str, tmp_path: Path) -> None:
        # This test answers in that time, however busy the machine is.
        times = {"PING_SECONDS": 5.0, "SWEEP_SECONDS": 0.05}
        with ServerProcess(tmp_path, f"--loop={loop}", **times) as server:
            with RawPeer(server) as dead, RawPeer(server) as alive, RawPeer(server) as asking:
                for _number in range(3):
                    alive.read_until(0x89, b"")
                    alive.send(make_frame(0x8A))
                    asking.read_until(0x89, b"")
                    asking.say(type="ping")  # any sign of life will do
                assert server.get("/info")["clients"] == 2
                with contextlib.suppress(ConnectionResetError):
                    pings = [frame for frame in dead.frames() if frame[0] == 0x89]
                    assert 1 <= len(pings) <= 2
                assert asking.receive(is_type("pong"))


# End to end: events --------------------------------------------------------------------------

is_text: Any = lambda value: isinstance(value, str)  # noqa: E731
is_count: Any = lambda value: type(value) is int and value >= 0  # noqa: E731
is_number: Any = lambda value: type(value) in (int, float) and value >= 0  # noqa: E731
is_id: Any = lambda value: is_text(value) and value.isdigit()  # noqa: E731
EVENT_FIELDS: dict[str, dict[str, Callable[[Any], bool]]] = {
    "stats_update": {
        "cpu": lambda v: type(v) is float and 0 <= v <= 100 and round(v, 1) == v,
        **dict.fromkeys(["ram_used", "ram_total", "swap_used", "swap_total", "disk_used", "disk_total"], is_count),
        **dict.fromkeys(["net_recv", "net_sent", "uptime"], is_count),
        "hostname": lambda v: v == socket.gethostname(), "cpus": lambda v: v == os.cpu_count(),
        "load_avg": lambda v: len(v) == 3 and all(map(is_number, v)),
    },
    "task_start": {
        "task_id": is_id, "command": is_text, "pid": is_count, "cwd": os.path.isabs,
        "tty": lambda v: v is False, "name": lambda v: v is None or is_text(v),
        **dict.fromkeys(["cols", "rows"], lambda v: v is None),
        "by": lambda v: bool(re.fullmatch(rf"127\.0\.0\.1:\d+ run uid={os.geteuid()}", v)),
    },
    "task_resize": {"task_id": is_id, "cols": is_count, "rows": is_count},
    "task_output": {"task_id": is_id, "output": is_text, "offset": is_count},
    "task_complete": {
        "task_id": is_id, "exit_code": lambda v: is_count(v) and v < 256,
        "signal": lambda v: v is None or f"SIG{v}" in signal.Signals.__members__,
        "state": lambda v: v in ("done", "killed", "timeout"), "duration_ms": is_count,
        "killed_by": lambda v: v is None or is_text(v),
        "output_bytes": is_count, "cpu_s": is_number, "max_rss_kb": is_count, "replaced": is_count,
    },
    "cpu_alert": {
        "cpu": is_number, "hostname": is_text, "message": is_text,
        "tasks": lambda v: isinstance(v, list) and all(map(is_id, v)),
    },
    "alert_resolved": {
        "alert": lambda v: v == "cpu_alert", "cpu": is_number, "hostname": is_text, "duration_ms": is_count,
    },
}  # fmt: skip


def check_event(event: dict[str, Any]) -> None:
    """Check that a broadcast event has exactly its fields, and sane values in them."""
    fields = {"timestamp": is_count, "seq": is_count, **EVENT_FIELDS[event["type"]]}
    assert set(event) == {"type", *fields}
    assert [name for name, is_fine in fields.items() if not is_fine(event[name])] == []
    assert abs(event["timestamp"] / 1000 - time.time()) < 60


class TestEvents:
    """SPEC 2: broadcast events, requests and answers."""

    def test_events_of_a_task(self, server: ServerProcess) -> None:
        with server.websocket() as websocket, RawPeer(server) as asking:
            asking.send(make_frame(0x81, '{"type":"hello"}'), make_frame(0x81, "nonsense"))
            asking.receive(is_type("error"))  # both answers are its own
            task_id = server.start("printf 'a\\033\\000\\r\\n\\377€'; exit 7", name="n", cwd="/")
            events = receive_events(websocket, is_complete(task_id))
        for event in events:
            check_event(event)
        assert check_stream(events) == []
        start, *outputs, end = [event for event in events if event.get("task_id") == task_id]
        assert [event["type"] for event in (start, end)] == ["task_start", "task_complete"]
        assert (start["cwd"], start["name"]) == ("/", "n")
        assert (end["exit_code"], end["state"]) == (7, "done")
        assert "".join(event["output"] for event in outputs) == "a\033\0\r\n\ufffd€"
        assert (end["signal"], end["output_bytes"]) == (None, 11)

    def test_hello(self, server: ServerProcess) -> None:
        """It may be long: who takes it is no client that asks but never reads."""
        task_ids = [server.start("sleep 60 #" + "x" * 60_000) for _ in range(40)]
        try:
            with server.websocket() as websocket:
                for _ in range(3):
                    websocket.send('{"type":"hello","ref":"r1"}')
                    websocket.send('{"type":"ping"}')
                    hello = receive_events(websocket, is_type("hello"))[-1]
                    receive_events(websocket, is_type("pong"))
            info = server.get("/info")
        finally:
            for task_id in task_ids:
                server.request("POST", f"/kill?id={task_id}&signal=KILL")
        for name in ("version", "hostname", "boot_id", "role", "exec", "limits"):
            assert hello[name] == info[name], name
        assert (hello["role"], hello["exec"], hello["ref"]) == ("run", True, "r1")
        assert hello["seq"] <= info["seq"] and "timestamp" not in hello
        assert [task["task_id"] for task in hello["tasks"]] == task_ids
        assert hello["tasks"][0]["state"] == "running"
        assert hello["limits"]["max_message_bytes"] == 65536

    def test_ref_comes_back(self, server: ServerProcess) -> None:
        with RawPeer(server) as peer:
            for ref in ("abc", "", "é😀\x00", 7, 1.5, -1):
                for kind, answer in (("ping", "pong"), ("nothing", "error")):
                    peer.say(type=kind, ref=ref)
                    assert peer.receive(is_type(answer))[-1]["ref"] == ref
            for number in ("1e999", "-1e999"):  # the peer's parser refuses Infinity
                peer.send(make_frame(0x81, '{"type":"ping","ref":%s}' % number))
                assert peer.receive(is_type("pong", "error"))
            peer.say(type="ping")
            pong = peer.receive(is_type("pong"))[-1]
            assert set(pong) == {"type", "timestamp", "seq"}
            assert abs(pong["timestamp"] / 1000 - time.time()) < 60

    @cases(
        ("not JSON", "ls", "bad_json"), ("deep objects", '{"a":' * 13000, "bad_json"),
        ("no type", "{}", "bad_message"), ("type 5", '{"type":5}', "bad_message"),
        ("unknown", '{"type":"exec","cmd":"ls"}', "unknown_type"),
        ("__init__", '{"type":"__init__"}', "unknown_type"),
        ("kill what?", '{"type":"task_kill"}', "bad_field"),
        ("kill 5", '{"type":"task_kill","task_id":5}', "bad_field"),
        ("kill nothing", '{"type":"task_kill","task_id":"999999"}', "unknown_task"),
    )  # fmt: skip
    def test_error(self, server: ServerProcess, text: str, code: str) -> None:
        with RawPeer(server) as peer:
            peer.send(make_frame(0x81, text), make_frame(0x81, '{"type":"ping"}'))
            got = peer.receive(is_type("pong"))
            error, pong = [one for one in got if one["type"] in ("pong", "error")]
            assert error.pop("message") and error == {"type": "error", "code": code}

    def test_task_kill(self, server: ServerProcess) -> None:
        with server.websocket() as websocket:
            for fields, name in (({}, "TERM"), ({"signal": "KILL"}, "KILL")):
                task_id = server.start("sleep 60")
                websocket.send(json.dumps({"type": "task_kill", "task_id": task_id, **fields}))
                end = receive_events(websocket, is_complete(task_id))[-1]
                assert (end["signal"], end["state"]) == (name, "killed")
                assert end["exit_code"] == 128 + signal.Signals[f"SIG{name}"]
            running = server.start("sleep 60")
            for wrong, code in (
                ({"task_id": task_id}, "task_ended"), ({"task_id": running, "signal": "X"}, "bad_signal"),
                ({"task_id": running, "signal": 9}, "bad_signal"),
            ):  # fmt: skip
                websocket.send(json.dumps({"type": "task_kill", "ref": 1, **wrong}))
                error = receive_events(websocket, is_type("error"))[-1]
                assert (error["code"], error["ref"]) == (code, 1)
            assert server.task(running)["state"] == "running"
            server.request("POST", f"/kill?id={running}")


class TestChoice:
    """SPEC 2: a client hears what it asks for."""

    @staticmethod
    def watch(peer: RawPeer, **fields: Any) -> dict[str, Any]:
        peer.say(type="watch", **fields)
        return peer.receive(is_type("watching", "error"))[-1]

    def test_each_hears_what_it_chose(self, server: ServerProcess) -> None:
        def go_on(task_id: str) -> None:
            assert server.request("POST", f"/stdin?id={task_id}", b"\n").status == 200

        loop = "read -r go; for i in 1 2 3 4 5 6 7 8 9; do echo $i; done; exit 3"
        *older, newest = ids = [server.start(loop, stdin=True) for _ in range(9)]
        choices: dict[str, Callable[[dict[str, Any]], bool]] = {
            "only=task_start,task_complete": is_type("task_start", "task_complete"),
            "only=task_complete,task_output&task=none": is_type("task_complete"),
            f"task={ids[0]}": lambda e: e["type"] != "task_output" or e["task_id"] == ids[0],
            f"task={ids[0]}&only=task_output,task_complete&task={ids[1]}":
                lambda e: e["type"] == "task_complete" or "output" in e and e["task_id"] in ids[:2],
            f"task={ids[0]}&only=task_complete": is_type("task_complete"),
            "task=999999": lambda e: e["type"] != "task_output",
        }  # fmt: skip
        with contextlib.ExitStack() as stack:
            paths = ["/", *(f"/ws?{query}" for query in choices)]
            peers = [stack.enter_context(RawPeer(server, path)) for path in paths]
            seq, boot = (server.get("/info")[name] for name in ("seq", "boot_id"))
            for task_id in older:  # they write at the same time
                go_on(task_id)
            for task_id in older:
                server.wait_for_end(task_id)
            go_on(newest)
            everything, *streams = (peer.receive(is_complete(newest)) for peer in peers)
            everything = [event for event in everything if event["seq"] > seq]
            assert check_stream(everything) == []
            for wants, stream in zip(choices.values(), streams):
                expected = [event for event in everything if wants(event)]
                assert [event for event in stream if event["seq"] > seq] == expected != []
            peers[1].say(type="ping")
            pong = peers[1].receive(is_type("pong"))[-1]
            assert pong["seq"] >= everything[-1]["seq"], "nothing else was asked for"
            for (query, wants), since in itertools.product(choices.items(), (seq, seq + 1)):
                path = f"/?{query}&since={since}&boot={boot}"
                again = stack.enter_context(RawPeer(server, path)).receive(is_complete(newest))
                assert again == [e for e in everything if wants(e) and e["seq"] > since]

    def test_watch_changes_it_from_the_next_event_on(self, server: ServerProcess) -> None:
        with RawPeer(server, "/?only=task_complete") as peer, RawPeer(server) as other:
            for fields, now in (
                ({}, {"only": ["task_complete"], "tasks": None}),
                ({"tasks": ["12", "3"]}, {"only": ["task_complete"], "tasks": ["3", "12"]}),
                ({"only": None}, {"only": None, "tasks": ["3", "12"]}),
                ({"only": [], "ref": 5}, {"only": [], "tasks": ["3", "12"], "ref": 5}),
                ({"only": ["task_output", "task_complete"], "tasks": []}, {"only": ["task_output", "task_complete"], "tasks": []}),
                ({"tasks": None}, {"only": ["task_output", "task_complete"], "tasks": None}),
            ):  # fmt: skip
                watching = self.watch(peer, **fields)
                seq = watching.pop("seq")
                assert watching == {"type": "watching", **now}
            task_id = server.run("echo x")["task_id"]
            events = peer.receive(is_complete(task_id))
            is_chosen = is_type("task_output", "task_complete")
            every = other.receive(is_complete(task_id))
            expected = [one for one in every if one["seq"] > seq and is_chosen(one)]
            assert events == expected and len(events) == 2
            for wrong in ({"only": "stats_update"}, {"only": ["exec"]}, {"tasks": [1]}, {"tasks": ["x"]}, {"only": None, "tasks": 5}):  # fmt: skip
                assert self.watch(peer, **wrong)["code"] == "bad_field"
            assert self.watch(peer)["only"] == ["task_output", "task_complete"]

    def test_flood_is_no_news_to_who_did_not_ask(self, server: ServerProcess) -> None:
        """Nor is it lag: a viewer far behind in it has missed nothing, and takes nothing."""
        boot = server.get("/info")["boot_id"]
        quiet = server.start("read -r go; echo done", stdin=True)
        with RawPeer(server, f"/?only=task_output,task_complete&task={quiet}") as peer:
            seq = server.get("/info")["seq"]
            flood = server.finish("head -c 40000000 /dev/zero | tr '\\0' x")
            assert server.request("POST", f"/stdin?id={quiet}", b"\n").status == 200
            events = peer.receive(is_complete(quiet))
            told = [(e["type"], e["task_id"]) for e in events if e["seq"] > seq]
            ends = [("task_output", quiet), ("task_complete", quiet)]
            assert told == [("task_complete", flood), *ends]
        path = f"/?only=task_output,task_complete&task={quiet}&boot={boot}&since={seq}"
        with RawPeer(server, path) as peer:
            assert peer.receive(is_complete(quiet)) == events[-3:], "no gap"
        with RawPeer(server, f"/?only=task_output&task={flood}&boot={boot}&since={seq}") as peer:
            assert peer.receive(is_type("gap", "task_output"))[0]["from"] == seq + 1

    def test_slow_viewer_is_rid_of_what_it_no_longer_wants(self, server: ServerProcess) -> None:
        with RawPeer(server, receive_bytes=4096) as slow:
            server.finish("head -c 8000000 /dev/zero | tr '\\0' x")
            slow.say(type="watch", tasks=[])
            task_id = server.run("echo x")["task_id"]
            events = slow.receive(is_complete(task_id))
            watching = next(event for event in events if event["type"] == "watching")
            seqs = [event["seq"] for event in events if event["type"] not in ("watching",)]
            until = [seq for seq in seqs if seq <= watching["seq"]]
            assert until == list(range(until[0], watching["seq"] + 1)), "all of what it had chosen"
            later = [event for event in events if event["seq"] > watching["seq"]]
            assert "task_output" not in {event["type"] for event in later}
            assert sum(len(event.get("output", "")) for event in events) < 6_000_000


class TestReplay:
    """SPEC 2, nothing lost: ?since=SEQ&boot=BOOT_ID."""

    @staticmethod
    def replay(server: ServerProcess, since: int, last: int) -> Any:
        """Return what a client that has seen `since` gets, up to the event `last`."""
        boot = server.get("/info")["boot_id"]
        with RawPeer(server, f"/?since={since}&boot={boot}") as peer:
            return peer.receive(lambda event: event.get("seq") == last)

    def test_from_every_seq(self, server: ServerProcess) -> None:
        with server.websocket() as websocket:
            task_id = server.start("for i in 1 2 3 4 5; do echo $i; done")
            live = receive_events(websocket, is_complete(task_id))
        last = live[-1]["seq"]
        for number, event in enumerate(live[:-1]):
            assert self.replay(server, event["seq"], last) == live[number + 1 :]
        assert self.replay(server, 0, last)[-len(live) :] == live
        assert [event["seq"] for event in self.replay(server, 0, last)] == list(range(1, last + 1))
        then = self.replay(server, last, last + 1)
        assert [event["seq"] for event in then] == [last + 1], "nothing but what is new"

    def test_hello_on_request_comes_before_what_is_replayed(self, server: ServerProcess) -> None:
        server.run("true")
        boot = server.get("/info")["boot_id"]
        with RawPeer(server, f"/ws?since=0&boot={boot}&hello") as peer:
            hello, *events = peer.receive(is_type("task_complete"))
        assert (hello["type"], hello["boot_id"], events[0]["seq"]) == ("hello", boot, 1)
        assert hello["seq"] >= events[-1]["seq"]

    def test_other_boot_is_a_gap(self, server: ServerProcess) -> None:
        task_id = server.finish("exit 0")
        with RawPeer(server, "/?since=1&boot=0123456789abcdef") as peer:
            events = peer.receive(is_complete(task_id))
        assert len(check_stream(events)) == 1 and events[0]["type"] == "gap"
        assert events[0]["to"] == events[1]["seq"] - 1


class TestRounds:
    """DESIGN 1: who is served when. The transports here take everything at once, or nothing."""

    class Viewer(sc.Viewer):
        """Writes down what it is sent."""

        def __init__(self, *only: str) -> None:
            self.taken: list[bytes] = []
            choice = sc.Choice(frozenset(only) if only else None)
            transport = mock.Mock()
            transport.is_closing.return_value = False
            given = (sc.WebSocketConnection(), sc.Role.VIEW, "", choice)
            super().__init__(transport, self.take, *given)
            transport.write.side_effect = lambda data: self.taken.append(bytes(data))

        def take(self, data: bytes) -> int:
            self.taken.append(data[:-3])  # the kernel never takes all of it
            return len(data) - 3

        def seqs(self) -> list[int]:
            return [int(one) for one in re.findall(rb'"seq":(\d+)', b"".join(self.taken))]

    def gather(self, count: int, *only: str) -> tuple[sc.Viewers, list[Any]]:
        """Return so many viewers, who have joined."""
        viewers = sc.Viewers(asyncio.get_running_loop())
        everybody = [self.Viewer(*only) for _ in range(count)]
        for viewer in everybody:
            viewers.join(viewer, None)
        return viewers, everybody

    @in_loop
    async def test_round_ends_though_there_is_always_news(self, monkeypatch: Any) -> None:
        """Each turn serves a step; who joins, and what is published meanwhile, is for the next."""
        monkeypatch.setattr(sc, "FLUSH_TURN_SECONDS", -1.0)
        viewers, everybody = self.gather(5 * sc.ROUND_STEP)
        viewers.flush_all()
        viewers.publish("stats_update", n=1)
        for turn in range(1, 6):
            viewers.flush()
            viewers.join(self.Viewer(), 0)
            viewers.publish("stats_update", n=2)
            assert sum(bool(one.taken) for one in everybody) == turn * sc.ROUND_STEP
            assert viewers.feed.is_dirty
        viewers.flush_all()
        last = viewers.feed.next - 1
        for viewer in viewers.all:
            seqs = viewer.seqs()
            assert seqs == list(range(seqs[0], last + 1)), "in order, once, to the end"

    @in_loop
    async def test_news_of_a_round_begin_the_next(self, monkeypatch: Any) -> None:
        """Also for those who were served before the news came, and when nothing else comes."""
        monkeypatch.setattr(sc, "FLUSH_TURN_SECONDS", -1.0)
        viewers, everybody = self.gather(3 * sc.ROUND_STEP)
        await asyncio.sleep(0.01)  # all have been served
        viewers.publish("stats_update")
        await asyncio.sleep(0)
        viewers.publish("stats_update")
        for _ in range(20):
            await asyncio.sleep(0)
        assert [one.seqs() for one in everybody] == [[1, 2]] * len(everybody)

    @in_loop
    async def test_few_are_served_at_once_but_not_in_a_flood(self, monkeypatch: Any) -> None:
        monkeypatch.setattr(sc, "FEW_PAUSE_SECONDS", 1e9)
        viewers, few = self.gather(sc.FEW_VIEWERS)
        await asyncio.sleep(0)
        viewers._hurried_at = -1e12
        viewers.publish("stats_update")
        assert [one.seqs() for one in few] == [[1]] * len(few)
        viewers.publish("stats_update")
        assert few[0].seqs() == [1], "one write for many events"
        await asyncio.sleep(0)
        assert few[0].seqs() == [1, 2]
        viewers.join(self.Viewer(), None)
        await asyncio.sleep(0)
        viewers._hurried_at = -1e12
        viewers.publish("stats_update")
        assert few[0].seqs() == [1, 2], "they are not few any more"

    @in_loop
    async def test_what_was_missed_counts_as_not_seen(self) -> None:
        """Though only the newest of what was dropped is known: the gap names all of it."""
        viewers, (one,) = self.gather(1, "task_output")
        viewers.feed.capacity_bytes = 400_000
        one.transport.get_write_buffer_size.return_value = 0
        viewers.stall(one)
        for number in range(5000):
            viewers.publish("task_output", task_id="1", output=b"x", offset=number)
        wider = sc.Choice(frozenset({"task_output", "cpu_alert"}))
        assert viewers.find_seen(one) == viewers.choose(one, wider) == 0
        one.transport.write.side_effect = lambda data: (one.taken.append(data), viewers.stall(one))
        viewers.resume(one)
        viewers.flush_all()
        assert [json.loads(data[2:])["from"] for data in one.taken] == [1], (
            "and nothing overtakes it"
        )
        viewers.resume(one)
        viewers.flush_all()
        assert one.seqs()[0] == viewers.feed.first

    @in_loop
    async def test_nothing_is_sent_after_a_close_or_to_who_has_left(self) -> None:
        viewers, everybody = self.gather(4)
        closed, left, stalled, _ = everybody
        closed.close(1000, "")
        viewers.stall(closed)
        viewers.resume(closed)
        viewers.stall(stalled)
        viewers.publish("stats_update")
        viewers.leave(left)
        viewers.flush_all()
        assert [one.seqs() for one in everybody] == [[], [], [], [1]]
        viewers.publish("stats_update")
        viewers.resume(stalled)
        viewers.flush_all()
        assert [one.seqs() for one in everybody] == [[], [], [1, 2], [1, 2]]
        assert viewers.written_bytes == sum(len(b"".join(one.taken)) for one in everybody)

    @in_loop
    async def test_what_nobody_chose_is_not_encoded(self, monkeypatch: Any) -> None:
        encoded = mock.Mock(side_effect=sc.encode_event)
        monkeypatch.setattr(sc, "encode_event", encoded)
        viewers, some = self.gather(3, "cpu_alert")
        for n in range(100):
            viewers.publish("task_output", task_id="1", output=b"x" * n, offset=0)
            viewers.flush_all()
        assert not viewers._round and encoded.call_count == 0
        viewers.publish("cpu_alert")
        viewers.flush_all()
        assert [one.seqs() for one in some] == [[101]] * 3 and encoded.call_count == 1

    def test_tasks_wait_for_viewers_but_not_for_ever(self, tmp_path: Path) -> None:
        feed = 'type("Feed", (), {"is_dirty": True, "must_pause": False})'
        code = f"sc.Outputs._feed = property(lambda self: {feed}, lambda self, feed: None)"
        own = ServerProcess(tmp_path, code=code, ROUND_SECONDS=0.25)
        with own as server, RawPeer(server) as peer:
            task_id = server.start("for i in 1 2 3 4 5 6 7 8 9 10; do echo $i; sleep 0.5; done")
            chunks = [e for e in peer.receive(is_complete(task_id)) if e["type"] == "task_output"]
            assert "".join(e["output"] for e in chunks) == "".join(f"{n}\n" for n in range(1, 11))
            times = [e["timestamp"] for e in chunks[:-1]]  # the end of a task does not wait
            assert times and all(after - before > 200 for before, after in zip(times, times[1:]))


class TestCompression:
    """SPEC 2, RFC 7692: permessage-deflate on a real server."""

    # Who is answered with an extension: (--compress, on loopback, by the Unix socket, from afar).
    @pytest.mark.parametrize("mode, expected", [
        ("auto", (False, False, True)), ("on", (True, True, True)), ("off", (False, False, False)),
    ])  # fmt: skip
    def test_it_is_negotiated_beyond_this_machine(self, tmp_path: Path, mode: str, expected: Any):
        *_, address = find_addresses()  # the kernel does not call our own one loopback
        options = (f"--host={address}", "--host=127.0.0.1", "--no-auth", f"--compress={mode}")
        with UnixServer(tmp_path, *options) as server:
            port = server.ws_port
            places = (("127.0.0.1", port), (address, port))
            ways = [socket.create_connection(one, PATIENCE_SECONDS) for one in places]
            ways.insert(1, UnixServer.connect(server))
            for connection, is_expected in zip(ways, expected):
                with connection:
                    host = f"{address}:{port}" if connection is ways[2] else "127.0.0.1"
                    connection.sendall(upgrade_request("/ws", "x, permessage-deflate", host))
                    head = connection.recv(65536).partition(b"\r\n\r\n")[0]
                    assert b" 101 " in head
                    if address != "127.0.0.1":
                        assert (TAKEN.encode() in head) is is_expected
                    assert (b"xtensions" in head) is (TAKEN.encode() in head)

    def test_every_viewer_gets_the_same_events(self, tmp_path: Path) -> None:
        offers = ["", TAKEN, "permessage-deflate", "permessage-deflate; server_max_window_bits=10"]
        places = [*(("/", offer) for offer in offers), ("/?only=task_complete", TAKEN)]
        options = ("--compress=on", "--interval=3600")
        # Where the machine is busy that is no flood.
        with ServerProcess(tmp_path, *options, DEFLATE_SECONDS=10.0) as server:
            with contextlib.ExitStack() as stack:
                peers = [stack.enter_context(RawPeer(server, p, offer=o)) for p, o in places]
                command = "seq 3000; printf '\\033[31m%0999d' 0; head -c 9000 /dev/urandom | base64"
                server.run(command)
                wires: list[list[tuple[int, bytes]]] = []
                texts: list[list[str]] = []
                for peer, bits in zip(peers, (15, 15, 15, 9, 15)):
                    wires.append([])
                    texts.append([""])
                    while '"task_complete"' not in texts[-1][-1]:
                        wires[-1].append(next(peer.frames()))
                        texts[-1].append(inflate_text(*wires[-1][-1], bits))
        texts = [[one for one in some[1:] if "stats_update" not in one] for some in texts]
        assert texts[0] == texts[1] == texts[2] == texts[3] and texts[4] == texts[0][-1:]
        assert wires[1][-3:] == wires[2][-3:] and wires[1][-1][0] == 0xC1
        sizes = [sum(len(payload) for _, payload in wire) for wire in wires]
        assert sizes[1] < sizes[0] * 0.7 and sizes[3] < sizes[0] * 0.7

    def test_a_message_that_is_compressed_is_carried_out(self, tmp_path: Path) -> None:
        with ServerProcess(tmp_path, "--compress=on", CLOSE_SECONDS=0.2) as server:
            with server.websocket(compression="deflate") as client:
                client.send('{"type":"ping","x":"%s"}' % ("x" * (65536 - 23)))  # the longest
                assert any("pong" in client.recv(PATIENCE_SECONDS) for _ in range(9))
            with RawPeer(server, offer=TAKEN) as peer:
                peer.send(make_frame(0xC1, squeeze(b" " * 65537)))
                assert peer.read_close()[0] == 1009
            answer = server.exchange(upgrade_request("/ws", "permessage-deflate; ="))
            assert b" 400 " in answer and b"bad_extension" in answer

    def test_a_python_without_zlib_does_without(self, tmp_path: Path) -> None:
        with ServerProcess(tmp_path, code="sc.zlib = None") as server:
            page = server.request("GET", "/", Accept="text/html", Accept_Encoding="gzip")
            assert page.status == 200 and "content-encoding" not in page.headers
        with mock.patch.object(sc, "zlib", None), pytest.raises(sc.ConfigError, match="--compress"):
            sc.parse_config(["--compress=on"], {})

    def test_a_flood_is_compressed_for_a_tenth_of_the_time(self) -> None:
        now, frame = [100.0], sc.encode_frame(sc.Opcode.TEXT, b"x" * 65536)
        compressor, taken = sc.Compressor(), []

        def deflate(frame: bytes, bits: int) -> bytes:
            now[0] += 0.001
            taken.append(bits)
            return frame[:9]

        with mock.patch.object(sc.time, "perf_counter", lambda: now[0]):
            with mock.patch.object(sc, "deflate_frame", deflate):
                for _ in range(1000):
                    made = compressor.compress(frame, 15)
                    assert made in (frame, frame[:9])
                    now[0] += 0.0005  # all the rest
                assert 50 <= len(taken) <= 70 and 1e-3 * len(taken) <= 0.1 * (now[0] - 100) + 0.01
                now[0] += 1
                taken.clear()
                for _ in range(9):  # at once: no more than this after a pause
                    compressor.compress(frame, 15)
                assert len(taken) == 4


class TestSlowViewers:
    """SPEC 2: a slow client costs nobody anything."""

    @pytest.mark.parametrize("stalls", [False, True])
    @in_loop
    async def test_flood_waits_until_they_have_caught_up(self, stalls: bool) -> None:
        """Only then is their patience whole again, and only half a feed behind it begins."""
        viewers = sc.Viewers(asyncio.get_running_loop())
        while not viewers.feed.middle:
            viewers.publish("task_output", task_id="1", output=b"x" * 65536, offset=0)
        feed = viewers.feed
        viewer = mock.Mock(audience=sc.Audience(None, 0), state=sc.ViewerState.READY)
        viewer.taken_at = math.inf
        viewers._queue = {} if stalls else {viewer: None}
        if stalls:
            viewers.stall(viewer)
        for cursor, is_pressed in (
            (feed.middle, False), (feed.middle - 1, True), (feed.middle, True),
            (feed.next - 1, True), (feed.next, False), (feed.next - 1, False),
        ):  # fmt: skip
            viewer.cursor = cursor
            viewers._update_pressure()
            assert feed.must_pause is is_pressed, cursor

    def test_viewers_that_read_nothing(self, server: ServerProcess) -> None:
        """CASES 57: of 100 MB without a line end."""
        with contextlib.ExitStack() as stack:
            peers = [RawPeer(server, receive_bytes=size) for size in [0] + [4096] * 10]
            fast, *stalled = map(stack.enter_context, peers)
            before = server.resident_kib()
            part = "read -r go; head -c 10000000 /dev/zero | tr '\\0' x"
            task_id = server.start(f"for i in 1 2 3 4 5 6 7 8 9 10; do {part}; done", stdin=True)
            for number in range(1, 11):  # what is kept outlasts a busy machine
                assert server.request("POST", f"/stdin?id={task_id}", b"\n").status == 200
                while len(fast.buffer) < number * 10_000_000:  # parsed later, to be fast
                    assert fast.read_some(sc.MIB)
            events = fast.receive(is_complete(task_id))
            assert check_stream(events) == [] and events[-1]["output_bytes"] == 100_000_000
            texts = [event["output"] for event in events if event["type"] == "task_output"]
            assert sum(map(len, texts)) == sum(text.count("x") for text in texts) == 100_000_000
            assert server.get("/health") == {"ok": True}
            logs = server.get(f"/logs?id={task_id}")  # CASES 71
            assert (logs["dropped"], logs["next_offset"]) == (100_000_000 - 8 * sc.MIB, 100_000_000)
            assert logs["logs"] == "x" * 8 * sc.MIB
            assert server.resident_kib() - before < 64 * 1024
            # Whoever begins to read now has missed much, and is told exactly what.
            by_seq = {event["seq"]: event for event in events}
            for peer in stalled[:2]:
                seen = peer.receive(is_complete(task_id))
                (gap,) = check_stream(seen)
                assert all(event == by_seq[event["seq"]] for event in seen if "output" in event)
                rest = seen[seen.index(gap) + 1 :]
                kept = sum(len(event.get("output", "")) for event in rest)
                assert 14 * sc.MIB < kept < 16 * sc.MIB and seen[-1] == events[-1]

    def test_kernel_keeps_little_for_a_stalled_viewer(self, server: ServerProcess) -> None:
        with RawPeer(server, receive_bytes=4096) as peer:
            server.finish("head -c 20000000 /dev/zero | tr '\\0' x")
            ends = (server.ws_port, peer.socket.getsockname()[1])
            pair = "0100007F:%04X 0100007F:%04X" % ends
            table = Path("/proc/net/tcp")  # read in pieces, so it may tell a socket twice, or not
            rows = wait_until(lambda: [r for r in table.read_text().splitlines() if pair in r])
            assert all(int(row.split()[4].partition(":")[0], 16) < 512 * 1024 for row in rows)

    @each_loop
    def test_stalled_one_is_closed_a_slow_one_is_not(self, loop: str, tmp_path: Path) -> None:
        times = {"WRITE_STALL_SECONDS": 3.0, "SWEEP_SECONDS": 0.05}
        with ServerProcess(tmp_path, f"--loop={loop}", **times) as server:
            with contextlib.ExitStack() as stack:
                peers = [RawPeer(server, receive_bytes=size) for size in (4096, 65536)]
                stalled, slow = map(stack.enter_context, peers)
                began, taken = time.monotonic(), 0
                task_id = server.start("head -c 12000000 /dev/zero | tr '\\0' x")

                def take_slowly() -> bool:  # 300 kB/s
                    nonlocal taken
                    passed = time.monotonic() - began
                    while taken < 300_000 * passed:
                        size = slow.read_some(8192)
                        assert size, "the slow one is closed too"
                        taken += size
                    assert server.get("/info")["clients"] == 2 or time.monotonic() - began > 2.9
                    return passed > 5.5 and server.get("/info")["clients"] == 1

                wait_until(take_slowly)
                assert check_stream(slow.receive(is_complete(task_id))) == []
                with contextlib.suppress(ConnectionResetError):
                    while stalled.read_some():
                        pass  # what the kernel had, then the end


# End to end: statistics and alerts -----------------------------------------------------------


class TestStatisticsEvents:
    """SPEC 2: stats_update, cpu_alert, alert_resolved."""

    @each_loop
    def test_stats_come_every_interval(self, loop: str, tmp_path: Path) -> None:
        with ServerProcess(tmp_path, f"--loop={loop}", "--interval=0.2") as server:
            with server.websocket("/?only=stats_update") as websocket:
                events = [json.loads(websocket.recv(PATIENCE_SECONDS)) for _ in range(11)]
                assert server.get("/stats")["seq"] >= events[-1]["seq"]
        for event in events:
            check_event(event)
        times = [event["timestamp"] for event in events]
        usual = statistics.median(b - a for a, b in zip(times, times[1:]))
        assert 180 < usual < 300 and times == sorted(times)
        newest = events[-1]
        memory = int(re.findall(r"MemTotal:\s+(\d+)", Path("/proc/meminfo").read_text())[0])
        assert newest["ram_total"] == memory // 1024 > newest["ram_used"] > 0
        uptime = float(Path("/proc/uptime").read_text().split()[0])
        assert uptime - 10 < newest["uptime"] <= uptime + 1
        usage = shutil.disk_usage("/")
        assert newest["disk_total"] == usage.total // sc.MIB
        assert abs(newest["disk_used"] - usage.used // sc.MIB) < 512

    @each_loop
    def test_alert_names_the_burning_tasks(self, loop: str, tmp_path: Path) -> None:
        options = (f"--loop={loop}", "--interval=0.2", "--cpu-alert=40")
        with ServerProcess(tmp_path, *options) as server, server.websocket() as websocket:
            ids = [server.start("while :; do :; done") for _ in range(os.cpu_count() or 1)]
            alert = receive_events(websocket, is_type("cpu_alert"))
        check_event(alert[-1])
        assert alert[-1]["cpu"] > 40 and alert[-1]["message"] == "CPU usage exceeded 40%!"
        assert ids and set(alert[-1]["tasks"]) <= set(ids)

    @each_loop
    def test_alert_is_repeated_and_ends(self, loop: str, tmp_path: Path) -> None:
        usage = Usage(tmp_path)
        options = (f"--loop={loop}", "--interval=0.05", "--cpu-alert=87.5", "--alert-cooldown=0.5")
        with ServerProcess(tmp_path, *options, script=usage.script) as server:
            with server.websocket() as websocket:
                task_id = server.start("sleep 60")
                events: list[dict[str, Any]] = []
                steps = [(95, "cpu_alert")] * 3 + [(87, "alert_resolved"), (99, "cpu_alert")]
                for percent, kind in steps:
                    usage.set(percent)
                    events += receive_events(websocket, is_type(kind))
                kept = server.get("/stats?alerts")["alerts"]
        for event in events:
            check_event(event)
        alerts = filter(is_type("cpu_alert", "alert_resolved"), events)
        first, *more, resolved, again = alerts
        assert (first["cpu"], first["tasks"]) == (95.0, [task_id])
        assert first["message"] == "CPU usage exceeded 87.5%!"
        assert resolved["cpu"] == 87.0
        lasted = resolved["timestamp"] - first["timestamp"]
        assert abs(resolved["duration_ms"] - lasted) < 500
        # Told again while it lasts it is the same alert.
        assert kept == [{**first, "resolved": resolved}, {**again, "resolved": None}]
        times = [alert["timestamp"] for alert in (first, *more, again)]
        assert len(times) >= 4 and all(b - a >= 250 for a, b in zip(times, times[1:]))


# End to end: discovery -----------------------------------------------------------------------


class Prober(contextlib.AbstractContextManager):
    """A UDP socket that asks for servers."""

    def __init__(self, port: int | None, source: str = "127.0.0.1") -> None:
        self.port = port
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, sc.MIB)
        self.socket.setsockopt(socket.IPPROTO_IP, getattr(socket, "IP_RECVTTL", 12), 1)
        self.socket.bind((source, 0))
        self.ttls: set[int] = set()

    def __exit__(self, *_: Any) -> None:
        self.socket.close()

    def send(self, data: bytes = b"DISCOVER_SERVER", host: str = "127.0.0.1") -> None:
        self.socket.sendto(data, (host, self.port or 0))

    def receive(self, seconds: float) -> list[bytes]:
        """Return what has come, waiting at most so long for the first."""
        replies = []
        self.socket.settimeout(seconds)
        with contextlib.suppress(socket.timeout, BlockingIOError):
            while True:
                data, ancillary, _, source = self.socket.recvmsg(65536, 256)
                assert source[1] == self.port
                self.ttls |= {struct.unpack("=i", item[2][:4])[0] for item in ancillary}
                replies.append(data)
                self.socket.settimeout(0)
        return replies

    def ask(self, host: str = "127.0.0.1", count: int = 1) -> list[dict[str, Any]]:
        """Ask until `count` servers have answered (a limit may silence them for a while)."""
        replies: dict[int, dict[str, Any]] = {}

        def enough() -> bool:
            self.send(host=host)
            for reply in self.receive(0.25):
                assert len(reply) <= 256
                parsed = parse_strict_json(reply.decode("utf-8"))
                replies[parsed["port"]] = parsed
            return len(replies) >= count

        wait_until(enough)
        return [replies[port] for port in sorted(replies)]


class TestDiscovery:
    """SPEC 6, CASES 64 to 68."""

    def test_reply(self, server: ServerProcess) -> None:
        with Prober(server.discovery_port) as prober:
            for host in ("127.0.0.1", "127.255.255.255"):
                (reply,) = prober.ask(host)
                assert reply == {
                    "type": "SERVER_RESPONSE", "hostname": socket.gethostname(), "port": server.port,
                    "ws_port": server.ws_port, "discovery_port": server.discovery_port,
                    "version": sc.__version__, "tls": False, "auth": True, "exec": True,
                    "id": server.get("/info")["boot_id"],
                }  # fmt: skip
                assert re.fullmatch("[0-9a-f]{16}", reply["id"])
            assert prober.ttls == {1}

    def test_silence_for_anything_else(self, server: ServerProcess) -> None:
        probe = b"DISCOVER_SERVER"
        bad = [b"", probe[:-1], probe + b"\n", b" " + probe, probe + b"\0", probe.lower(), probe * 2,
               b"SERVER_RESPONSE", b"\0", b"{}", b"x" * 65507]  # fmt: skip
        bad += [os.urandom(size) for size in range(1, 200)]
        lines = len(server.records)
        with Prober(server.discovery_port) as prober, Prober(server.discovery_port) as good:
            for data in bad:
                prober.send(data)
            good.ask()  # so all of the bad ones have been read
            assert prober.receive(0) == []
        assert {r["event"] for r in server.records[lines:]} <= {"cpu_alert", "alert_resolved"}

    def test_limit_for_one_source(self, server: ServerProcess) -> None:
        with Prober(server.discovery_port) as prober:
            replies, began = [], time.monotonic()
            while time.monotonic() - began < 2.1:  # so that one whole second is in it
                for _ in range(100):
                    prober.send()
                replies += prober.receive(0)
                assert server.get("/health") == {"ok": True}
            replies += prober.receive(0.2)
            assert 5 <= len(replies) <= 5 * (math.ceil(time.monotonic() - began) + 1)

    @each_loop
    def test_two_servers_share_the_port(self, loop: str, tmp_path: Path) -> None:
        with ServerProcess(tmp_path, f"--loop={loop}") as one:
            port = one.discovery_port
            with ServerProcess(tmp_path, f"--loop={loop}", f"--discovery-port={port}") as two:
                assert two.discovery_port == port
                with Prober(port) as prober:
                    replies = prober.ask("127.255.255.255", count=2)
                assert [r["port"] for r in replies] == sorted([one.port, two.port])

    @each_loop
    def test_answers_from_where_it_listens(self, loop: str, tmp_path: Path) -> None:
        """Who asks takes the source of a reply for the server's address."""
        broadcast = "127.255.255.255"
        for hosts, asked, source in (
            (["127.0.3.1"], broadcast, "127.0.3.1"),
            (["127.0.3.1", "127.0.0.1"], broadcast, "127.0.0.1"),  # from where it leaves anyway
            (["127.0.0.1", "127.0.3.1"], "127.0.3.1", "127.0.3.1"),
        ):
            options = (f"--loop={loop}", *(f"--host={host}" for host in hosts))
            with ServerProcess(tmp_path, *options) as server:
                port = server.discovery_port or 0
                with Prober(port) as prober:
                    prober.send(host=asked)
                    prober.socket.settimeout(PATIENCE_SECONDS)
                    assert prober.socket.recvfrom(256)[1] == (source, port)

    @each_loop
    def test_network_bind_answers_neighbours(self, loop: str, tmp_path: Path) -> None:
        options = (f"--loop={loop}", "--no-auth", "--host=0.0.0.0", "--no-exec")
        with ServerProcess(tmp_path, *options) as server:
            for source in find_addresses():
                with Prober(server.discovery_port, source) as prober:
                    (reply,) = prober.ask(source)
                    assert (reply["auth"], reply["exec"]) == (False, False)


# Shared pieces of the HTTP, access and limit tests -------------------------------------------

NOBODY = 65534
UPGRADE_FIELDS = (*UPGRADE, VERSION_FIELD, KEY_FIELD)
# Every way in: (request line, fields, body). Those of the first list hold no data.
OPEN_REQUESTS = [("GET /", (), b""), ("GET /health", (), b""), ("HEAD /", (), b"")]
CLOSED_REQUESTS = [
    ("POST /exec", (), b"true"),
    ("POST /exec?wait", ("Content-Type: application/json",), b'{"cmd":"true"}'),
    ("POST /exec?follow", (), b"true"), ("GET /tasks", (), b""), ("GET /tasks?id=1", (), b""),
    ("GET /logs?id=1", (), b""), ("POST /kill?id=1", (), b""), ("GET /stats", (), b""),
    ("GET /info", (), b""), ("GET /metrics", (), b""), ("GET /nothing", (), b""),
    ("GET / ", UPGRADE_FIELDS, b""), ("GET /ws", UPGRADE_FIELDS, b""),
    ("GET /?since=0", UPGRADE_FIELDS, b""),
]  # fmt: skip


def make_request(line: str, *fields: str, body: bytes = b"", host: Any = "localhost") -> bytes:
    """Return a request; version, Host and Content-Length are added where they are missing."""
    line = line.strip() if " HTTP/" in line else line.strip() + " HTTP/1.1"
    lines = [line] + ([] if host is None else ["Host: " + host]) + list(fields)
    framed = any(field.lower().startswith(("content-length", "transfer-enc")) for field in fields)
    if body and not framed:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


# Follows what must be refused: were it ever taken for a request, a task would show.
SMUGGLED_HTTP = make_request("POST /exec", body=b"echo smuggled")


class AnswerStream(io.BufferedReader):
    """The answers of one connection, or in some bytes, read one by one with http.client."""

    def __init__(self, source: Any) -> None:
        is_socket = isinstance(source, socket.socket)
        super().__init__(socket.SocketIO(source, "r") if is_socket else io.BytesIO(source))

    def makefile(self, mode: str) -> AnswerStream:
        return self

    def close(self) -> None:
        """http.client closes what it has read an answer from; others follow here."""

    def next(self, method: str = "GET") -> Answer:
        response = http.client.HTTPResponse(self, method=method)  # type: ignore[arg-type]
        response.begin()
        fields = {name.lower(): value for name, value in response.getheaders()}
        return Answer(response.status, fields, response.read())

    def rest(self, method: str = "GET") -> list[Answer]:
        answers = []
        while self.peek(1):
            answers.append(self.next(method))
        return answers


def ask(server: ServerProcess, data: bytes, method: str = "GET") -> Answer:
    with server.connect() as connection:
        connection.sendall(data)
        return AnswerStream(connection).next(method)


def check_served(connection: socket.socket) -> None:
    connection.sendall(make_request("GET /health"))
    assert AnswerStream(connection).next().status == 200


def send_dripping(connection: socket.socket, data: bytes, pause: float = 0.0) -> None:
    """Send byte by byte, until something comes back."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with contextlib.suppress(ConnectionError):
        for at in range(len(data)):
            if select.select([connection], [], [], pause)[0]:
                return
            connection.sendall(data[at : at + 1])


def check_error(answer: Answer, status: int) -> None:
    """An error is JSON with a code and a line of text, and says nothing of the machine."""
    assert answer.status == status, answer
    assert answer.headers["content-type"] == "application/json"
    assert int(answer.headers["content-length"]) == len(answer.body)
    error = answer.json()
    assert set(error) == {"error", "message"}
    assert re.fullmatch("[a-z0-9_]+", error["error"]) and error["message"].isprintable()
    told = answer.body.decode() + repr(sorted(answer.headers.items()))
    secrets = (socket.gethostname(), sc.__version__, "Traceback", ".py", str(SCRIPT.parent))
    assert not [s for s in secrets if re.search(rf"(?<!\w){re.escape(s)}(?!\w)", told)], told


def check_answer(server: ServerProcess, status: int, line: str, *fields: str, **more) -> Answer:
    """Ask, and return the answer, which must have this status."""
    answer = ask(server, make_request(line, *fields, **more), line.split()[0])
    if status < 400:
        assert answer.status == status, answer
    else:
        check_error(answer, status)
    return answer


def check_answers(server: ServerProcess, status: int, requests: Any, *fields: str, **more) -> Any:
    """Ask all of them, each with these fields too; return the answers of this status."""
    return [
        check_answer(server, status, line, *fields, *own, body=body, **more)
        for line, own, body in requests
    ]


@contextlib.contextmanager
def unharmed(server: ServerProcess, runs: bool = False) -> Iterator[None]:
    """What comes in this block must leave no descriptor, no failure and (else) no task behind."""
    before = server.get("/tasks")
    if "idle_descriptors" not in vars(server):  # the first time: all connections must have ended
        counts = []
        for _ in range(20):
            time.sleep(0.01)
            counts.append(server.descriptors())
        vars(server)["idle_descriptors"] = min(counts)
    records, lines = len(server.records), len(server.stderr)
    yield
    assert server.get("/health") == {"ok": True}
    assert wait_until(lambda: server.descriptors() <= server.idle_descriptors)  # type: ignore[attr-defined]
    assert runs or server.get("/tasks") == before
    assert not [record for record in server.records[records:] if record["level"] == "error"]
    assert not [line for line in server.stderr[lines:] if "Traceback" in line]


class RunsNothing:
    """Base of the classes in which no request may start anything."""

    runs = False

    @pytest.fixture(autouse=True)
    def stays_unharmed(self, server: ServerProcess) -> Iterator[None]:
        with unharmed(server, self.runs):
            yield


class RunsTasks(RunsNothing):
    """Base of the classes whose requests start tasks."""

    runs = True


def as_nobody(function: Callable[[], bytes]) -> bytes:
    """Return what the function returns in a child process of another account."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another account")
    "localhost".encode("idna")  # the other account may be unable to read the codec's file
    read_fd, write_fd = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about threads; the child only uses sockets
        pid = os.fork()
    if pid == 0:
        try:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            os.write(write_fd, function())
        except BaseException as error:
            os.write(write_fd, repr(error).encode())
        finally:
            os._exit(0)
    os.close(write_fd)
    with open(read_fd, "rb") as pipe:
        answer = pipe.read()
    os.waitpid(pid, 0)
    return answer


@contextlib.contextmanager
def stopped(server: ServerProcess) -> Iterator[None]:
    """What comes in this block, the server finds together."""
    os.kill(server.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(server.pid, signal.SIGCONT)


@contextlib.contextmanager
def crowded_by_nobody(connect: Any, count: int, data: bytes = b"") -> Iterator[None]:
    """Another account holds so many connections during this block, and says the data on each."""
    ready, release = os.pipe(), os.pipe()

    def crowd() -> bytes:
        peers = [connect() for _ in range(count)]
        for peer in peers:
            with contextlib.suppress(OSError):  # it may have been cut off already
                peer.sendall(data)
        os.write(ready[1], b"x")
        os.read(release[0], 1)
        return b"%d" % len(peers)

    with concurrent.futures.ThreadPoolExecutor() as pool:
        taken = pool.submit(as_nobody, crowd)
        wait_until(lambda: taken.done() or select.select([ready[0]], [], [], 0)[0])
        try:
            yield
        finally:
            os.write(release[1], b"x")
        assert taken.result() == b"%d" % count
    for fd in (*ready, *release):
        os.close(fd)


def ask_as_nobody(server: ServerProcess, status: int, line: str, *fields: str, **more) -> Answer:
    """Ask as another account, and return the answer, which must be one and have this status."""
    data = make_request(line, "Connection: close", *fields, **more)
    received = as_nobody(lambda: server.exchange(data, half_close=True))
    (answer,) = AnswerStream(received).rest(line.split()[0])
    if status >= 400:
        check_error(answer, status)
    assert answer.status == status, answer
    return answer


def curl(*arguments: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    command = ["curl", "-q", "-sS", "--noproxy", "*", "--max-time", str(int(PATIENCE_SECONDS))]
    return subprocess.run([*command, *arguments], input=stdin, stdout=-1, stderr=-1, check=False)


# End to end: HTTP ----------------------------------------------------------------------------

LENGTH_5 = "Content-Length: 5"
CHUNKED = "Transfer-Encoding: chunked"


def post(*fields: str, body: bytes = b"hello", line: str = "POST /exec") -> bytes:
    return make_request(line, *fields, body=body)


# (name, bytes, status): errors after which the connection ends. RFC 9112.
REFUSED = [
    ("length and chunked", post(LENGTH_5, CHUNKED, body=b"0\r\n\r\n"), 400),
    ("coding gzip", post("Transfer-Encoding: gzip"), 501),
    ("gzip body", post("Content-Encoding: gzip", body=b"\x1f\x8b\x08\0"), 415),
    ("chunks above the limit", http_chunked(b"20001\r\n" + b"a" * 0x20001 + b"\r\n20000\r\n"), 413),
    ("trailers too long", http_chunked(b"0\r\n" + (b"a: " + b"b" * 1000 + b"\r\n") * 5 + b"\r\n"), 431),
    ("HTTP/0.9", b"GET /tasks\r\n\r\n", 400),
    *((f"host {host!r}", make_request("POST /exec", host=host, body=b"true"), 400)
      for host in (None, "", "a@localhost", "localhost:x")),
    ("HTTP/2 preface", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
    ("TLS ClientHello", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64), 400),
    ("request line without end", b"GET /" + b"a" * 8300, 414),
    ("field without end", b"GET /tasks HTTP/1.1\r\nA: " + b"b" * 8300, 431),
    ("5000 fields", make_request("GET /ws", *UPGRADE_FIELDS, *["A: b"] * 5000), 431),
]  # fmt: skip


class TestHttpRefused(RunsNothing):
    """RFC 9112: what is not exactly one request is answered once, and the connection ends."""

    @parametrize_rows("data, status", REFUSED)
    def test_malformed_request_ends_connection(self, server: Any, data: bytes, status: int):
        for send in (socket.socket.sendall, send_dripping)[: 1 if len(data) > 2000 else 2]:
            with server.connect() as connection:
                with contextlib.suppress(ConnectionError):
                    send(connection, data + SMUGGLED_HTTP)
                (answer,) = AnswerStream(read_all(connection)).rest()
            check_error(answer, status)
            assert answer.headers["connection"] == "close"

    @pytest.mark.parametrize("line, fields, status", [
        ("POST /nothing", (), 404), ("POST /tasks", (), 405), ("PUT /exec", (), 405),
        ("POST /exec?id=1", (), 400), ("POST /exec?a=b", (), 400),
        ("POST /exec", ("Content-Length: 262145",), 413),
        ("POST /exec", ("Origin: http://evil.test",), 403),
        ("POST /exec", ("Sec-Fetch-Site: same-origin",), 415),
        ("POST /exec", ("Host: evil.test",), 400), ("POST /exec", ("Via: 1.1 proxy",), 401),
        ("POST /exec", ("Expect: the-unexpected",), 417), ("POST /ws", (), 426),
    ], ids=lambda value: value if isinstance(value, str) else "")  # fmt: skip
    def test_body_of_refused_request_is_no_request(self, server, line: str, fields, status: int):
        """Nor is it asked for by a 100."""
        asked = make_request(line, "Expect: 100-continue", *fields, body=b"hello")[:-5]
        assert server.exchange(asked).startswith(b"HTTP/1.1 %d " % status)
        data = make_request(line, *fields, body=SMUGGLED_HTTP)
        (answer,) = AnswerStream(server.exchange(data + SMUGGLED_HTTP)).rest()
        check_error(answer, status)
        assert answer.headers["connection"] == "close"

    @pytest.mark.parametrize("data", [post(body=b"true")[:-1], http_chunked(b"4\r\ntrue\r\n0\r\n")])
    def test_request_that_ends_early_runs_nothing(self, server: ServerProcess, data: bytes) -> None:
        for part in (data, data[:20]):
            (answer,) = AnswerStream(server.exchange(part, half_close=True)).rest()
            check_error(answer, 400)

    @pytest.mark.parametrize("method, path, allow", [
        *((m, "/exec", {"POST"}) for m in ("GET", "PUT", "DELETE", "OPTIONS", "BREW")),
        *((m, "/kill?id=1", {"POST"}) for m in ("GET", "PATCH")),
        *(("POST", p, {"GET", "HEAD"}) for p in ("/", "/health", "/metrics", "/logs?id=1")),
        *(("DELETE", p, {"GET", "HEAD"}) for p in ("/stats", "/info")),
        ("get", "/tasks", {"GET", "HEAD"}),
    ])  # fmt: skip
    def test_wrong_method_is_405_with_allow(self, server: Any, method: str, path: str, allow: Any):
        answer = server.request(method, path)
        check_error(answer, 405)
        assert set(re.split(", *", answer.headers["allow"])) == allow

    @pytest.mark.parametrize("line, status", [
        *((f"{method} {path}", 404) for method in ("GET", "POST") for path in (
            "//exec", "/exec/", "/%65xec", "/Exec", "/exec;a", "/a/../exec", "/exec%20", "/%1b%5b2J%7f")),
        *((f"{line}?{query}", 404 if "999" in query else 400)
          for line in ("GET /tasks", "GET /logs", "POST /kill") for query in (
            "id=1&id=2", "xid=1", "id", "id=+1", "id=1%20", "id=%1b%0d%0a%7f", "id=1&unknown=1",
            "id=999999999999", "id=999999999999&")),
        *((f"{line}{query}", 400) for line, query in itertools.product(
            ("GET /logs", "POST /kill"), ("", "?offset=0", "?signal=TERM"))),
        *((f"POST /exec?{query}", 400) for query in (
            "wait&follow", "wait=2", "follow=x", "wait&wait", "a=b")),
    ])  # fmt: skip
    def test_unusable_target_is_refused(self, server: ServerProcess, line: str, status: int):
        method, target = line.split(" ")
        answer = server.request(method, target, b"true" if method == "POST" else None)
        check_error(answer, status)
        assert not re.search(rb"[\x00-\x09\x0b-\x1f\x7f]", answer.body)

    @pytest.mark.parametrize("path, status", [
        *((path, 200) for path in ("/", "/health", "/metrics", "/tasks", "/stats?history", "/info")),
        ("/nothing", 404), ("/exec", 405), ("/tasks?a", 400), ("/metrics?x=1", 400),
    ])  # fmt: skip
    def test_head_is_get_without_body(self, server: Any, path: str, status: int) -> None:
        data = make_request("HEAD " + path) + make_request("GET /health", "Connection: close")
        stream = AnswerStream(server.exchange(data))
        first = stream.next("HEAD")
        assert first.status == status and int(first.headers["content-length"]) > 0
        assert stream.next().json() == {"ok": True} and stream.rest() == []


class TestHttpConnection(RunsTasks):
    """RFC 9112, 9: keep-alive, pipelining, HTTP/1.0, bodies, 100-continue."""

    def test_pipelined_requests_are_answered_in_order(self, server: ServerProcess) -> None:
        data, expected = b"", []
        for number in range(100):
            if number % 10 == 3:
                data += post(line="POST /exec?wait", body=b"echo %d" % number)
                expected.append((200, f"{number}\n"))
            elif number % 10 == 7:  # its body is read whole, so the connection stays
                data += post(JSON_FIELD, body=b"[]") + b"\r\n"
                expected.append((400, None))
            else:
                path, status = [("/health", 200), ("/nothing", 404), ("/exec", 405)][number % 3]
                data += make_request("GET " + path)
                expected.append((status, None))
        data += make_request("GET /health", "Connection: close") + SMUGGLED_HTTP
        answers = AnswerStream(server.exchange(data)).rest()
        assert [(a.status, a.json().get("output")) for a in answers[:-1]] == expected
        assert answers[-1].json() == {"ok": True}

    def test_client_that_never_reads_is_not_read_from_either(self, server: ServerProcess) -> None:
        before = server.resident_kib()
        with server.connect() as connection:
            connection.settimeout(2.0)
            with pytest.raises(socket.timeout):  # the server stops reading: no more is taken
                for _ in range(400):
                    connection.sendall(make_request("GET /info") * 4000)
            assert server.resident_kib() - before < 64 * 1024
            assert server.get("/health") == {"ok": True}

    @pytest.mark.parametrize("fields", [(), ("Connection: keep-alive",)])
    def test_http_1_0_is_answered(self, server: ServerProcess, fields: tuple[str, ...]) -> None:
        one = make_request("GET /health HTTP/1.0", *fields)
        received = server.exchange(one + make_request("GET /health HTTP/1.0"))
        answers = AnswerStream(received).rest()
        assert [a.json() for a in answers] == [{"ok": True}] * (2 if fields else 1)
        assert answers[0].headers["connection"] == ("keep-alive" if fields else "close")

    @pytest.mark.parametrize("query, output", [("wait", b'"output":"x\\n"'), ("follow", b"x\n")])
    def test_http_1_0_gets_no_chunks(self, server: ServerProcess, query: str, output: bytes):
        data = post(line=f"POST /exec?{query} HTTP/1.0", body=b"echo x")
        fields, _, body = server.exchange(data).partition(b"\r\n\r\n")
        assert b"chunked" not in fields.lower() and fields.startswith(b"HTTP/1.1 200 ")
        assert body.rstrip(b"}\n").endswith(output.rstrip(b"\n"))

    @pytest.mark.parametrize("data", [
        http_chunked(b'6;a=b;c="d"\r\necho y\r\n0;e\r\nTrailer: 1\r\nOther: 2\r\n\r\n'),
        post("Content-Length: 6", "A:", "Expect: 100-Continue", body=b"echo y"),
        b"\r\n\r\n" + post(body=b"echo y"), post(*["A: b"] * 98, body=b"echo y"),
    ])  # fmt: skip
    def test_body_is_taken_however_it_is_framed(self, server: ServerProcess, data: bytes) -> None:
        data = data.replace(b"/exec", b"/exec?wait")
        for send in (socket.socket.sendall, send_dripping)[: 1 if b"Expect" in data else 2]:
            with server.connect() as connection:
                stream = AnswerStream(connection)
                send(connection, data)
                if send is socket.socket.sendall:
                    connection.sendall(make_request("GET /health"))
                assert stream.next().json()["output"] == "y\n"
                assert send is send_dripping or stream.next().json() == {"ok": True}

    def test_no_100_where_no_body_follows(self, server: ServerProcess) -> None:
        data = make_request("GET /health", "Expect: 100-continue", "Connection: close")
        assert server.exchange(data).startswith(b"HTTP/1.1 200 ")

    def test_curl_waits_for_100_and_sends_chunks(self, server: ServerProcess) -> None:
        url = f"http://localhost:{server.port}/exec?wait"
        script = b"echo " + b"y" * 60000 + b"\n"
        told = curl("-v", "-X", "POST", "-T", "-", url, stdin=script)
        assert b"Transfer-Encoding: chunked" in told.stderr and b"100 Continue" in told.stderr
        assert json.loads(told.stdout.decode())["output"] == "y" * 60000 + "\n"

    @pytest.mark.parametrize("expect", ["Expect: 100-continue", "Expect:"])
    @pytest.mark.parametrize("upload", [("--data-binary", "@-"), ("-X", "POST", "-T", "-")])
    def test_curl_reads_why_its_upload_is_refused(self, server: Any, upload: Any, expect: str):
        url = f"http://localhost:{server.port}/exec"
        told = curl("-w", "%{http_code}", *upload, "-H", expect, url, stdin=b"#" * 3000000)
        assert told.returncode == 0 and told.stdout.endswith(b"413"), told
        assert b'"error"' in told.stdout

    def test_reset_in_an_answer_is_no_news(self, server: ServerProcess) -> None:
        task_id = server.run("head -c 4000000 /dev/zero | tr '\\0' a")["task_id"]
        running = server.start("while echo line; do sleep 0.05; done")
        records = len(server.records)
        for number in range(30):
            path = f"/logs?id={running}&follow" if number % 3 else f"/logs?id={task_id}&raw"
            with server.connect() as connection:
                connection.sendall(make_request("GET " + path) * 3)
                assert connection.recv(1000)
                linger = struct.pack("ii", 1, 0)  # close() sends RST
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        for _ in range(300):  # refused, and gone before the end of the answer
            with server.connect() as connection:
                connection.sendall(post(line="GET /exec", body=b"true"))
                assert connection.recv(1)
        assert server.task(running)["state"] == "running"
        assert server.request("POST", f"/kill?id={running}&signal=KILL").status == 200
        server.wait_for_end(running)
        events = {r["event"] for r in server.records[records:]}
        assert events <= {*"task_start task_kill task_complete cpu_alert alert_resolved".split()}


# End to end: the routes ----------------------------------------------------------------------


class TestRoutes(RunsTasks):
    """SPEC 3: every route, its fields and what it does."""

    def test_exec_wait_answers_after_the_end(self, server: ServerProcess) -> None:
        told = server.run("echo out; echo err >&2; exit 7")
        assert set(told) >= {"task_id", "command", "pid", "exit_code", "signal", "truncated"}
        assert (told["exit_code"], told["signal"], told["truncated"]) == (7, None, False)
        assert told["output"] == "out\nerr\n" and told["command"].startswith("echo out")
        told = server.run("exec sleep 300", timeout=0.2, window=1)
        assert told["exit_code"] == 143 and server.task(told["task_id"])["state"] == "timeout"
        told = server.request("POST", "/exec?wait=0", b"true").json()
        assert told.keys() == {"task_id", "command", "pid"} and told["command"] == "true"
        assert told["task_id"].isdecimal() and told["pid"] > 0

    @pytest.mark.parametrize("query, status, body", [
        ("wait&raw", 200, "a\n"), ("wait&raw&fail", 500, "a\n"), ("wait&fail", 500, None),
        ("wait&raw=0&fail=0", 200, None), ("follow&raw", 200, "a\n"),
        *((query, 400, None) for query in ("raw", "tie", "fail", "follow&fail", "wait&raw=x")),
    ])  # fmt: skip
    def test_exec_answers_for_scripts(self, server: Any, query: str, status: int, body: Any):
        answer = server.request("POST", f"/exec?{query}", "echo a; exit 3")
        is_text = body is not None
        media_type = sc.PLAIN_TEXT if is_text else "application/json"
        assert (answer.status, answer.headers["content-type"]) == (status, media_type)
        assert answer.body.decode() == body if is_text else answer.json()
        code = answer.headers.get("x-exit-code")
        assert code == ("3" if "wait" in query and status != 400 else None)
        if query == "wait&fail":
            assert answer.json()["exit_code"] == 3
            assert server.request("POST", "/exec?wait&fail", "true").status == 200

    @pytest.mark.parametrize("query", ["wait", "follow", "wait&tie", "follow&tie"])
    @pytest.mark.parametrize("leaves", ["at once", "behind more requests", "while it waits"])
    def test_task_outlives_the_client_that_waits_unless_tied(self, server, query: str, leaves: str):
        before = len(server.get("/tasks"))
        connection = server.connect()
        check_served(connection)
        is_long = leaves == "behind more requests"  # than are taken at a time
        command = b"exec sleep 300" + b" " * 60_000 * is_long
        request = post(line=f"POST /exec?{query}", body=command)
        request += make_request("GET /info", "x: " + "y" * 2000) * is_long
        # At once: the server finds request and end together.
        waits = leaves == "while it waits"
        with contextlib.nullcontext() if waits else stopped(server), connection:
            connection.sendall(request)
            if waits:
                wait_until(lambda: len(server.get("/tasks")) > before)
                if "follow" in query:  # unread bytes would make a reset of its end
                    assert connection.recv(65536).endswith(b"\r\n\r\n")
        wait_until(lambda: len(server.get("/tasks")) > before)
        task_id = server.get("/tasks")[-1]["task_id"]
        if "tie" in query:
            ended = server.wait_for_end(task_id)
            assert (ended["state"], ended["signal"]) == ("killed", "TERM")
            assert ended["killed_by"] == ended["by"]
            end = read_audit(state_file(server, "audit.log"))[-1]
            assert (end["task_id"], end["killed_by"]) == (task_id, ended["by"])
            return
        try:  # the pipe of the task is still open, and nothing else
            wait_until(lambda: server.descriptors() <= server.idle_descriptors + 1, 8.0)  # type: ignore[attr-defined]
            assert server.task(task_id)["state"] == "running"
        finally:
            server.request("POST", f"/kill?id={task_id}&signal=KILL")
            server.wait_for_end(task_id)

    def test_curl_follows_live_and_sees_the_trailer(self, server: ServerProcess, tmp_path: Path):
        curl("--version")
        url = f"http://localhost:{server.port}"
        command = f"echo first; until [ -e {tmp_path}/go ]; do sleep 0.1; done; echo last; exit 3"
        arguments = ["curl", "-qsSN", "--noproxy", "*", "-D", str(tmp_path / "fields")]
        arguments += ["--data-binary", command, f"{url}/exec?follow"]
        with subprocess.Popen(arguments, stdout=subprocess.PIPE) as process:
            assert process.stdout.readline() == b"first\n"  # while the task goes on
            (tmp_path / "go").touch()
            assert process.stdout.read() == b"last\n" and process.wait() == 0
        fields = (tmp_path / "fields").read_text().lower()
        announced, _, trailers = fields.partition("\n\n")
        assert "content-type: text/plain" in announced and "transfer-encoding: chunked" in announced
        assert "x-exit-code" in announced and "x-exit-code: 3" not in announced
        assert "x-exit-code: 3" in trailers
        task_id = server.get("/tasks")[-1]["task_id"]
        told = curl("-D", "-", f"{url}/logs?id={task_id}&follow&offset=6")
        assert b"\r\n\r\nlast\n" in told.stdout and b"X-Exit-Code: 3" in told.stdout

    def test_tasks_tell_all_fields(self, server: ServerProcess) -> None:
        task_id = server.start("echo héllo; exec sleep 300")
        wait_until(lambda: server.task(task_id)["output_bytes"] == 7)
        task = server.task(task_id)
        assert set(task) >= {"task_id", "command", "state", "exit_code", "signal", "started", "by"}
        assert (task["state"], task["exit_code"], task["signal"]) == ("running", None, None)
        assert task["ended"] is None and abs(task["started"] / 1000 - time.time()) < 60
        wait_until(lambda: read_command_line(task["pid"]) == "sleep 300")
        assert "127.0.0.1" in task["by"] and "run" in task["by"]
        assert task["cwd"] == os.getcwd()
        assert server.get("/tasks")[-1] == task
        task = server.end(task_id)
        assert (task["state"], task["exit_code"], task["signal"]) == ("killed", 143, "TERM")
        assert task["started"] <= task["ended"]
        later = server.run("true")["task_id"]
        ids = [int(t["task_id"]) for t in server.get("/tasks")]
        assert ids == sorted(ids) and ids[-2:] == [int(task_id), int(later)]

    def test_logs_tell_all_fields(self, server: ServerProcess) -> None:
        task_id = server.start("printf 'a\\n\\303\\244\\033<b>'; exec sleep 300")
        wait_until(lambda: server.task(task_id)["output_bytes"] == 8)
        whole = {"task_id": task_id, "logs": "a\nä\x1b<b>", "offset": 0, "next_offset": 8}
        assert server.get(f"/logs?id={task_id}") == {**whole, "dropped": 0, "running": True}
        answer = server.request("HEAD", f"/logs?id={task_id}&follow")  # returns at once
        assert answer.status == 200 and answer.body == b""
        server.request("POST", f"/kill?id={task_id}&signal=SIGKILL")
        assert server.wait_for_end(task_id)["exit_code"] == 137
        for offset, real, text in [(2, 2, "ä\x1b<b>"), (3, 4, "\x1b<b>"), (8, 8, "")]:
            part = server.get(f"/logs?id={task_id}&offset={offset}")
            assert part == {**whole, "logs": text, "offset": real, "dropped": 0, "running": False}
            answer = server.request("GET", f"/logs?id={task_id}&offset={offset}&raw")
            assert answer.headers["content-type"].startswith("text/plain")
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert answer.headers["x-next-offset"] == "8"
            follow = server.request("GET", f"/logs?id={task_id}&offset={offset}&follow")
            for one in (answer, follow):  # exact, for who comes back; JSON cannot be
                assert one.headers["x-offset"] == str(offset)
                assert one.body == whole["logs"].encode()[offset:]
        tails = {0: "", 4: "\x1b<b>", 5: "\x1b<b>", 6: "ä\x1b<b>", 9: whole["logs"]}
        for tail, text in tails.items():
            part = server.get(f"/logs?id={task_id}&tail={tail}&offset=1")
            assert (part["logs"], part["next_offset"]) == (text, 8)
            assert part["offset"] == 8 - len(text.encode())
        odd = ("-1", "x", "1.0", "", "1_0")
        for query in ("offset=9", *(f"{n}={text}" for n in ("offset", "tail") for text in odd)):
            check_error(server.request("GET", f"/logs?id={task_id}&{query}"), 400)

    def test_stats_tell_the_newest_event(self, server: ServerProcess) -> None:
        stats = server.get("/stats")
        check_event(stats)
        assert stats["type"] == "stats_update" and stats["uptime"] > 0
        assert 0 < stats["ram_used"] < stats["ram_total"]
        newer = wait_until(lambda: [s for s in [server.get("/stats")] if s["seq"] > stats["seq"]])
        history = server.get("/stats?history")
        assert set(history) == {"interval", "samples"} and history["interval"] == 1.0
        columns = ("timestamp", "cpu", "ram_used", "net_recv", "net_sent")
        samples = [[event[name] for name in columns] for event in (stats, newer[0])]
        assert all(sample in history["samples"] for sample in samples)
        assert history["samples"] == sorted(history["samples"], key=operator.itemgetter(0))

    def test_info_tells_about_the_server(self, server: ServerProcess) -> None:
        task_id = server.start("exec sleep 300")
        info = server.get("/info")
        assert info["version"] == sc.__version__ and info["hostname"] == socket.gethostname()
        assert (info["role"], info["exec"], info["tasks_running"]) == ("run", True, 1)
        ports = {"http": server.port, "ws": server.ws_port, "discovery": server.discovery_port}
        assert info["ports"] == ports and info["uptime"] >= 0 and info["clients"] == 0
        assert info["limits"]["max_tasks"] == 64 and info["limits"]["max_clients"] == 10000
        server.end(task_id)
        later = server.get("/info")
        assert later["boot_id"] == info["boot_id"] and later["seq"] > info["seq"]
        assert later["tasks_running"] == 0

    def test_page_holds_no_data(self, server: ServerProcess) -> None:
        as_page = (f"Origin: http://{server.place}", "Sec-Fetch-Site: same-origin", JSON_FIELD)
        body = b'{"cmd":"echo \'<img onerror>\' # marker-of-a-task"}'
        check_answer(server, 200, "POST /exec?wait", *as_page, body=body, host=server.place)
        answer = server.request("GET", "/")
        assert answer.status == 200 and b"marker" not in answer.body
        assert socket.gethostname().encode() not in answer.body.split()
        boot_id = server.get("/info")["boot_id"].encode()
        assert boot_id not in answer.body and b"onerror" not in answer.body
        # For curl: the API at a glance, with the address that was asked for.
        place = f"http://{server.place}/exec".encode()
        assert place in answer.body and answer.body.count(b"\n") <= 50
        assert "default-src 'none'; " in answer.headers["content-security-policy"]


# End to end: access --------------------------------------------------------------------------

JSON_FIELD = "Content-Type: application/json"
RUN_TRUE = b'{"cmd":"true"}'
# Ways in for a web page: (request line, fields, body).
PAGE_REQUESTS = [
    ("POST /exec", (JSON_FIELD,), RUN_TRUE), ("GET /tasks", (), b""), ("GET /health", (), b""),
    ("GET /", UPGRADE_FIELDS, b""), ("GET /ws", UPGRADE_FIELDS, b""),
]  # fmt: skip


class TestGate(RunsNothing):
    """SPEC 4 on a loopback listener: who gets in, and that the rest runs nothing."""

    @parametrize_rows("status, field, host", [
        ("proxy", 401, "Via: 1.1 proxy", "localhost"),
        ("foreign host", 403, "A: b", "127.0.0.1.evil.test"), ("any address", 403, "A: b", "0.0.0.0:PORT"),
        ("foreign origin", 403, "Origin: http://evil.test", "localhost"),
        ("another name for us", 403, "Origin: http://127.0.0.1:PORT", "localhost:PORT"),
        ("other site", 403, "Sec-Fetch-Site: same-site", "localhost"),
    ])  # fmt: skip
    def test_stranger_is_refused_everywhere(self, server: Any, status: int, field: str, host: str):
        field, host = (text.replace("PORT", str(server.port)) for text in (field, host))
        for answer in check_answers(server, status, CLOSED_REQUESTS, field, host=host):
            assert "\n" not in answer.json()["message"]
            assert not [name for name in answer.headers if name.startswith("access-control")]
            assert status == 403 or answer.headers["www-authenticate"].startswith("Bearer")
        check_answers(server, {401: 200}.get(status, 403), OPEN_REQUESTS[:2], field, host=host)

    def test_own_page_and_visits_are_served(self, server: ServerProcess) -> None:
        host = f"localhost:{server.port}"
        origin = f"http://{host}"
        for line, fields, body in PAGE_REQUESTS[1:]:
            more = {"body": body, "host": host}
            status = 101 if fields else 200
            answer = check_answer(server, status, line, "Origin: " + origin, *fields, **more)
            assert not [name for name in answer.headers if name.startswith("access-control")]
        check_answer(server, 200, "GET /", "Sec-Fetch-Site: cross-site", *VISIT)

    @parametrize_rows("row", [(row[0], row) for row in CLOSED_REQUESTS + OPEN_REQUESTS])
    def test_other_account_sees_page_and_health_alone(self, server: ServerProcess, row: Any):
        line, fields, body = row
        status = 200 if row in OPEN_REQUESTS else 401
        answer = ask_as_nobody(server, status, line, *fields, body=body)
        assert answer.status == 200 or answer.headers["www-authenticate"].startswith("Bearer")
        ask_as_nobody(server, 403, "GET /", host="evil.test")


class TestOwnerOfAPort:
    """CASES, fact 1, and what follows from it: the kernel is asked about a pair of ports, and the
    answer must be about who sent the bytes."""

    @pytest.mark.parametrize("peer, local, is_asked", [
        ("127.0.0.1", "127.0.0.2", True), ("::1", "::1", True), ("::ffff:127.0.0.1", "::ffff:127.0.0.1", True),
        ("192.0.2.1", "127.0.0.1", False), ("127.0.0.1", "192.0.2.1", False), ("2001:db8::1", "::1", False),
    ])  # fmt: skip
    def test_only_loopback_ends_have_an_owner(self, peer: str, local: str, is_asked: bool) -> None:
        connection = mock.Mock()
        connection.getsockname.return_value = (local, 8080)
        connection.getsockopt.return_value = bytes([8])  # half closed by the client: it is there
        query = mock.Mock(return_value=1000)
        server, listener = mock.Mock(query_owner=query), sc.ListenerKind.LOOPBACK
        found, _ = sc.identify_peer(server, connection, listener, (peer, 40000))
        assert (found.uid, query.called) == ((1000, True) if is_asked else (None, False))

    @pytest.mark.parametrize("loop", loops())
    def test_port_of_a_reset_connection_proves_nothing(self, tmp_path: Path, loop: str) -> None:
        with ServerProcess(tmp_path, f"--loop={loop}") as server:
            with socket.create_server(("127.0.0.1", 0)) as holder:
                source = holder.getsockname()

            def connect() -> socket.socket:
                connection = socket.socket()
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                connection.bind(source)
                connection.connect(("127.0.0.1", server.port))
                return connection

            def attack() -> bytes:
                with connect() as connection:
                    connection.sendall(make_request("POST /exec", body=b"id"))
                    linger = struct.pack("ii", 1, 0)  # close resets, and the port is free at once
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                return b"sent"

            with stopped(server):  # stands for any delay
                assert as_nobody(attack) == b"sent"
                victim = connect()  # our own account, from the same port
            with victim:
                victim.sendall(make_request("GET /tasks"))
                assert AnswerStream(victim).next().json() == []
            assert server.get("/tasks") == []

    @each_loop
    @pytest.mark.parametrize("who", ["stranger", "own account"])
    def test_orphaned_socket_is_nobodys(self, tmp_path: Path, who: str, loop: str) -> None:
        """CASES 38: closed before we accept it, it has no inode, and on many kernels uid 0 whoever
        it was; so not even our own is believed."""

        def attack() -> bytes:
            for number in range(count):
                with server.connect() as orphan:
                    orphan.sendall(post(body=b"false"))
                    if number % 3:
                        orphan.shutdown(socket.SHUT_RDWR if number % 2 else socket.SHUT_WR)
            return b"sent"

        with ServerProcess(tmp_path, f"--loop={loop}") as server:
            server.run("true")
            before, count = server.descriptors(), 30
            with stopped(server):
                assert (as_nobody(attack) if who == "stranger" else attack()) == b"sent"
            if who == "stranger":  # at any moment
                count = 300
                assert as_nobody(attack) == b"sent"
            server.run("true")  # accepted after them
            wait_until(lambda: server.descriptors() <= before)
            assert [task["command"] for task in server.get("/tasks")] == ["true", "true"]

    @pytest.mark.parametrize("loop", loops())
    def test_pipelined_requests_keep_nobody_waiting(self, tmp_path: Path, loop: str) -> None:
        with ServerProcess(tmp_path, f"--loop={loop}", "--max-tasks=300") as server:
            with server.connect() as hog, server.connect() as other:
                for connection in (hog, other):  # both stand
                    check_served(connection)
                with stopped(server):
                    hog.sendall(make_request("POST /exec", body=b"true") * 200)
                    other.sendall(make_request("POST /exec", body=b"true"))
                stream = AnswerStream(hog)
                last = [stream.next().json()["task_id"] for _ in range(200)][-1]
                mine = AnswerStream(other).next().json()["task_id"]
            assert int(last) - int(mine) > 150


class TestAccessOptions:
    """SPEC 4 with options; each test has a server of its own."""

    def test_server_of_other_account_does_not_trust_root(self, tmp_path: Path) -> None:
        if os.geteuid() != 0:
            pytest.skip("only root can start a server of another account")
        if shutil.which("setpriv") is None:
            pytest.skip("setpriv is not installed")
        prefix = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
        # So that it can read Python, wherever root has it.
        prefix += ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]
        with tempfile.TemporaryDirectory() as state:
            os.chown(state, NOBODY, NOBODY)
            with ServerProcess(Path(state), prefix=tuple(prefix)) as server:
                assert Path(f"/proc/{server.pid}").stat().st_uid == NOBODY
                check_answers(server, 401, CLOSED_REQUESTS)
                assert ask_as_nobody(server, 200, "GET /tasks").json() == []

    def test_listed_origins_are_served(self, tmp_path: Path) -> None:
        listed = ["https://one.test", "http://two.test:3000"]
        options = [f"--allow-origin={origin}" for origin in listed]
        with ServerProcess(tmp_path, *options) as server, unharmed(server, runs=True):
            for origin in listed:
                marks = (f"Origin: {origin}", "Sec-Fetch-Site: cross-site", "Sec-Fetch-Mode: cors")
                for line, fields, body, status in [
                    ("GET /tasks", (), b"", 200), ("POST /exec?wait", (JSON_FIELD,), RUN_TRUE, 200),
                    ("GET /nothing", (), b"", 404), ("POST /exec?wait", (JSON_FIELD,), b"[]", 400),
                    ("POST /nothing", (JSON_FIELD,), b"{}", 404), ("POST /exec", (), b"true", 415),
                    ("OPTIONS /exec", (*PREFLIGHT, "Via: 1.1 a"), b"", 204),
                ]:  # fmt: skip
                    answer = check_answer(server, status, line, *marks, *fields, body=body)
                    assert answer.headers.get("access-control-allow-origin") == origin, line
                    assert "Origin" in answer.headers["vary"], line
                    assert "access-control-allow-credentials" not in answer.headers
                assert answer.body == b""
                assert "POST" in answer.headers["access-control-allow-methods"]
                allowed = answer.headers["access-control-allow-headers"].lower()
                assert allowed.split(", ") == ["authorization", "content-type"]
                check_answer(server, 101, "GET /ws", *marks, *UPGRADE_FIELDS)
            tasks = server.get("/tasks")
            assert [task["command"] for task in tasks] == ["true", "true"]
            requests = [*PAGE_REQUESTS, ("OPTIONS /exec", PREFLIGHT, b"")]
            for answer in check_answers(server, 403, requests, "Origin: https://one.test:444"):
                assert not [n for n in answer.headers if n.startswith("access-control")]
            assert ask(server, make_request("GET /tasks")).headers["vary"] == "Origin"
            assert server.get("/tasks") == tasks

    @pytest.mark.parametrize("address", ["127.0.0.1", "0.0.0.0"])
    def test_no_auth_keeps_the_host_and_origin_rules(self, tmp_path: Path, address: str) -> None:
        with ServerProcess(tmp_path, "--no-auth", f"--host={address}") as server, unharmed(server):
            assert server.wait_for_log("no_auth")["level"] == "warning"
            for host in ("10.1.2.3", socket.gethostname(), "localhost"):
                check_answer(server, 200, "GET /tasks", "X-Forwarded-For: 1.2.3.4", host=host)
            check_answers(server, 403, CLOSED_REQUESTS, host="evil.test")
            check_answers(server, 403, PAGE_REQUESTS, "Origin: http://evil.test")
            assert ask_as_nobody(server, 200, "GET /info").json()["role"] == "run"


# Shared pieces of the token, TLS and Unix socket tests ----------------------------------------

SERVER_RUN_TOKEN = "run-token-0123456789.~+"  # of what a subprotocol may hold, too
SERVER_VIEW_TOKEN = "view-token-9876543210_-"
TOKENS = {"SERVERCONTROL_TOKEN": SERVER_RUN_TOKEN, "SERVERCONTROL_VIEW_TOKEN": SERVER_VIEW_TOKEN}
NETWORK_BIND = "--host=0.0.0.0"


def bearer(token: str) -> str:
    return f"Authorization: Bearer {token}"


def protocol(*offers: str) -> str:
    return "Sec-WebSocket-Protocol: " + ", ".join(offers)


class TokenServer(ServerProcess):
    """A server on the network, with known tokens; the shared helpers show the one of role run."""

    fields = (bearer(SERVER_RUN_TOKEN),)

    def __init__(self, state: Path, *options: str, env: Any = None, **popen: Any) -> None:
        super().__init__(state, NETWORK_BIND, *options, env={**TOKENS, **(env or {})}, **popen)


def ask_from(server: ServerProcess, source: str, data: bytes, address="127.0.0.1") -> Answer:
    """Ask over TCP, at an address and from one; "" is any."""
    place = (address, server.port)
    with socket.create_connection(place, PATIENCE_SECONDS, (source, 0)) as connection:
        connection.sendall(data)
        return AnswerStream(connection).next()


def find_addresses() -> list[str]:
    """Return 127.0.0.1 and, where there is one, this machine's address on the network."""
    found = ["127.0.0.1"]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        with contextlib.suppress(OSError):
            probe.connect(("192.0.2.1", 9))  # sends nothing
            found.append(probe.getsockname()[0])
    return found


def state_file(server: ServerProcess, name: str) -> Path:
    return Path(server.env["XDG_STATE_HOME"]) / "servercontrol" / name


def read_audit(path: Path, event: str = "") -> list[dict[str, Any]]:
    """Return the records of an audit log, or those of one event; every line must be whole."""
    lines = path.read_bytes().split(b"\n")
    assert lines.pop() == b""
    records = [parse_strict_json(line.decode("utf-8")) for line in lines]
    return [record for record in records if event in ("", record["event"])]


def check_nowhere(server: ServerProcess, *tokens: str) -> None:
    """No token is in a log line, the audit log, an answer, or the command line."""
    texts = ["".join(server.stderr), state_file(server, "audit.log").read_text("utf-8")]
    texts.append(Path(f"/proc/{server.pid}/cmdline").read_text())
    ids = [task["task_id"] for task in server.get("/tasks")]
    paths = ["/", "/health", "/info", "/tasks", "/stats", *(f"/logs?id={n}" for n in ids)]
    texts += [server.request("GET", path).body.decode("utf-8") for path in paths]
    assert len(texts[1]) > 100  # it was read
    assert not [text for text in texts if any(token in text for token in tokens)]


@pytest.fixture(scope="class", params=loops())
def network_server(request: Any, tmp_path_factory: Any) -> Iterator[TokenServer]:
    """A server on the network with both tokens; its task 1 has ended."""
    state = tmp_path_factory.mktemp("network")
    options = (f"--loop={request.param}", "--interval=0.2")
    with TokenServer(state, *options) as server:
        assert server.run("true")["task_id"] == "1"
        yield server


class TestTokens:
    """SPEC 4 where tokens are needed; CASES 16, 44 to 49."""

    @pytest.mark.parametrize("address", find_addresses())
    def test_every_request_without_token_is_401(self, network_server: TokenServer, address: str):
        with unharmed(network_server):
            for line, fields, body in CLOSED_REQUESTS:
                data = make_request(line, *fields, body=body, host=address)
                answer = ask_from(network_server, "", data, address)
                check_error(answer, 401)
                assert answer.headers["www-authenticate"] == "Bearer"
            check_answers(network_server, 200, OPEN_REQUESTS, host=address)

    @pytest.mark.parametrize(
        "field", [bearer(SERVER_RUN_TOKEN), protocol("bearer." + SERVER_RUN_TOKEN)]
    )
    @pytest.mark.parametrize("address", find_addresses())
    def test_run_token_opens_everything(self, network_server: Any, address: str, field: str):
        statuses = []
        with unharmed(network_server, runs=True):
            for line, fields, body in CLOSED_REQUESTS:
                data = make_request(line, field, *fields, body=body, host=f"{address}:1")
                statuses.append(ask_from(network_server, "", data, address).status)
        assert set(statuses) == {200, 101, 404, 409}  # task 1 has ended

    def test_subprotocol_is_echoed_without_token(self, network_server: TokenServer) -> None:
        for token, role in ((SERVER_RUN_TOKEN, "run"), (SERVER_VIEW_TOKEN, "view")):
            offers = ["servercontrol.v1", "bearer." + token]
            for order in (offers, offers[::-1], ["chat", *offers]):
                with network_server.websocket(subprotocols=order) as websocket:
                    assert websocket.subprotocol == "servercontrol.v1"
                    assert token not in str(websocket.response.headers)
                    websocket.send('{"type":"hello"}')
                    hello = receive_events(websocket, is_type("hello"))[-1]
                    assert (hello["role"], hello["auth"]) == (role, True)
                    assert token not in json.dumps(hello)

    def test_view_token_sees_all_and_does_nothing(self, network_server: TokenServer) -> None:
        view = bearer(SERVER_VIEW_TOKEN)
        task_id = network_server.start("exec sleep 300")
        before = network_server.get("/tasks")
        actions = [*CLOSED_REQUESTS[:3], (f"POST /kill?id={task_id}", (), b"")]
        for answer in check_answers(network_server, 403, actions, view):
            assert answer.json()["error"] == "forbidden"
        asks = make_request("POST /exec", view, "Expect: 100-continue", LENGTH_5)
        assert network_server.exchange(asks).startswith(b"HTTP/1.1 403 ")
        for path in ("tasks", "tasks?id=1", "logs?id=1&raw", "stats", "stats?history", "info"):
            answer = check_answer(network_server, 200, f"GET /{path}", view)
        assert answer.json()["role"] == "view"
        check_answer(network_server, 404, "GET /nothing", view)
        assert network_server.get("/tasks") == before
        network_server.end(task_id)

    def test_view_token_gets_every_event(self, network_server: TokenServer) -> None:
        headers = {"Authorization": f"Bearer {SERVER_VIEW_TOKEN}"}
        with network_server.websocket("/ws", additional_headers=headers) as websocket:
            task_id = network_server.start("echo out; exec sleep 300")
            receive_events(websocket, is_type("task_output"))
            websocket.send(json.dumps({"type": "task_kill", "task_id": task_id, "ref": 7}))
            error = receive_events(websocket, is_type("error"))[-1]
            assert (error["code"], error["ref"]) == ("forbidden", 7)
            assert network_server.task(task_id)["state"] == "running"
            network_server.end(task_id)
            check_stream(receive_events(websocket, is_complete(task_id)))

    def test_token_in_the_address_is_401_and_nowhere(self, network_server: TokenServer) -> None:
        source = "127.1.0.1"  # each has ten wrong tokens a minute
        with unharmed(network_server):
            for path, fields in (("/tasks", [bearer(SERVER_RUN_TOKEN)]), ("/ws", UPGRADE_FIELDS)):
                for token in TOKENS.values():
                    data = make_request(f"GET {path}?id=1&token={token}", *fields)
                    answer = ask_from(network_server, source, data)
                    check_error(answer, 401)
                    assert "Bearer" in answer.json()["message"] and token not in repr(answer)
            # It was right: that is no guessing.
            data = make_request("GET /tasks", bearer("x" * 20))
            check_error(ask_from(network_server, source, data), 401)
            check_nowhere(network_server, SERVER_RUN_TOKEN, SERVER_VIEW_TOKEN)

    def test_many_wrong_tokens_are_429_and_the_right_one_200(self, network_server: TokenServer):
        source = "127.1.0.2"
        wrong = make_request("GET /tasks", bearer("x" * 20))
        with unharmed(network_server):
            answers = [ask_from(network_server, source, wrong) for _ in range(12)]
            assert [answer.status for answer in answers] == [401] * 10 + [429] * 2
            check_error(answers[-1], 429)
            assert 50 <= int(answers[-1].headers["retry-after"]) <= 60
            upgrade = make_request("GET /ws", *UPGRADE_FIELDS, protocol("bearer.x"))
            check_error(ask_from(network_server, source, upgrade), 429)
            right = make_request("GET /tasks", bearer(SERVER_RUN_TOKEN))
            assert ask_from(network_server, source, right).status == 200
            check_error(ask_from(network_server, source, make_request("GET /tasks")), 401)
            assert ask_from(network_server, source, make_request("GET /")).status == 200
            check_error(ask_from(network_server, "127.1.0.3", wrong), 401)


class TestTokenOptions:
    """SPEC 4: where tokens come from and when they are asked for; each test has its own server."""

    @pytest.mark.parametrize("loop", loops())
    def test_require_token_asks_our_own_account(self, tmp_path: Path, loop: str) -> None:
        options = ("--require-token", f"--loop={loop}")
        with ServerProcess(tmp_path, *options, env=TOKENS) as server:
            server.fields = (bearer(SERVER_RUN_TOKEN),)
            with unharmed(server):
                check_answers(server, 401, CLOSED_REQUESTS)
                check_answers(server, 200, OPEN_REQUESTS)
                check_answer(server, 403, "GET /", host="evil.test")
                assert server.get("/info")["role"] == "run"

    def test_environment_wins_over_files(self, tmp_path: Path) -> None:
        files = {"run": "file-run-0123456789", "view": "file-view-0123456789"}
        for role, token in files.items():
            (tmp_path / role).write_text(f"{token}\n")
            (tmp_path / role).chmod(0o600)
        run, view = f"--token-file={tmp_path / 'run'}", f"--view-token-file={tmp_path / 'view'}"
        for options, env, right in [
            ((run, view), {}, files),
            ((run, view), TOKENS, {"run": SERVER_RUN_TOKEN, "view": SERVER_VIEW_TOKEN}),
            ((run,), {list(TOKENS)[1]: SERVER_VIEW_TOKEN}, {**files, "view": SERVER_VIEW_TOKEN}),
        ]:
            with ServerProcess(tmp_path, NETWORK_BIND, *options, env=env) as server:
                for token in (SERVER_RUN_TOKEN, SERVER_VIEW_TOKEN, *files.values()):
                    answer = ask(server, make_request("GET /info", bearer(token)))
                    roles = [role for role, value in right.items() if value == token]
                    assert answer.status == (200 if roles else 401)
                    assert [answer.json().get("role")] == (roles or [None])
                (listening,) = server.log("listening")
                pairs = zip(TOKENS, ("run", "view"))
                used = [None if env.get(name) else f"{tmp_path}/{role}" for name, role in pairs]
                assert [listening["token_file"], listening["view_token_file"]] == used
        assert not list((tmp_path / "servercontrol").glob("*token"))

    @pytest.mark.parametrize("loop", loops())
    def test_tokens_of_the_environment_are_nowhere(self, tmp_path: Path, loop: str) -> None:
        """CASES 49."""
        with TokenServer(tmp_path, f"--loop={loop}", env=TOKENS) as server:
            shown = server.run("env; set; cat /proc/self/environ | tr '\\0' '\\n'")["output"]
            assert "SERVERCONTROL_TASK_ID" in shown and "TOKEN" not in shown
            assert not [token for token in TOKENS.values() if token in shown]
            shown = {"Authorization": f"Bearer {SERVER_RUN_TOKEN}"}
            with server.websocket(additional_headers=shown) as w:
                server.run("env")
                events = receive_events(w, is_type("task_complete"))
            assert not [token for token in TOKENS.values() if token in json.dumps(events)]
            check_nowhere(server, SERVER_RUN_TOKEN, SERVER_VIEW_TOKEN)

    def test_network_beside_loopback_trusts_on_loopback_alone(self, tmp_path: Path) -> None:
        """The bound socket decides, not the first of the options."""
        network = find_addresses()[1:]
        if not network:
            pytest.skip("this machine has no address beside loopback")
        options = ("--host=127.0.0.1", f"--host={network[0]}")
        with ServerProcess(tmp_path, *options, env=TOKENS) as server:
            assert ask(server, make_request("GET /tasks")).status == 200
            for fields, status in ((), 401), ((bearer(SERVER_RUN_TOKEN),), 200):
                data = make_request("GET /tasks", *fields)
                assert ask_from(server, "", data, network[0]).status == status


class TestTokenPieces:
    """What may be a token, and what a file of one must be like."""

    @pytest.mark.parametrize("text", ["a" * 16, "A-._~+/9" * 2, "a" * 15 + "=", "a" * 4000])
    def test_good_token_is_taken(self, tmp_path: Path, text: str) -> None:
        assert sc.check_token("X", text) == text
        path = tmp_path / "token"
        for end in ("", "\n", "\r\n", "  \n\n"):
            path.write_text(text + end)
            path.chmod(0o600)
            assert sc.load_token_file("X", str(path)) == text
            path.chmod(0o400)

    @pytest.mark.parametrize("text", [
        "", "a" * 15, "a" * 15 + " ", " " * 20, "a" * 16 + "\n" + "b" * 16, "a" * 16 + " b",
        "a" * 16 + "=b", "=" * 20, "ä" * 20, "a" * 16 + "\0", "a" * 16 + ",", "\x1c" * 20,
    ])  # fmt: skip
    def test_bad_token_is_refused(self, tmp_path: Path, text: str) -> None:
        with pytest.raises(sc.ConfigError) as error:
            sc.check_token("NAME", text)
        assert "NAME" in str(error.value) and "\n" not in str(error.value)
        assert len(text) < 10 or text not in str(error.value)
        path = tmp_path / "token"
        path.write_bytes(os.fsencode(text))
        path.chmod(0o600)
        with pytest.raises(sc.ConfigError):
            sc.load_token_file("NAME", str(path))
        with pytest.raises(sc.ConfigError):
            sc.load_kept_token(str(tmp_path), "token", sc.Log("json", "error"))
        assert path.read_bytes() == os.fsencode(text)

    def test_file_is_made_only_where_it_may_be(self, tmp_path: Path) -> None:
        path, log = tmp_path / "token", sc.Log("json", "error")
        with pytest.raises(sc.ConfigError):
            sc.load_token_file("X", str(path))
        assert not path.exists()
        assert sc.load_kept_token(None, "token", log) == (None, None)
        made, place = sc.load_kept_token(str(tmp_path), "token", log)
        assert made is not None and len(made) == 43 and path.read_text() == made + "\n"
        sc.make_token_file(str(path))  # who comes second changes nothing
        assert path.read_text() == made + "\n"
        assert [file.name for file in tmp_path.iterdir()] == ["token"] and place == str(path)

    def test_folder_that_takes_no_token_matters_only_where_one_is_needed(self, tmp_path: Path):
        code = "import errno, os\ndef link(*_):\n    raise OSError(errno.EROFS, 'read-only')\n"
        script = make_launcher(tmp_path, code + "os.link = link")
        with ServerProcess(tmp_path, script=script) as server:
            assert server.wait_for_log("token_not_made")["level"] == "warning"
            assert server.run("echo yes")["output"] == "yes\n"
            shown = server.request("GET", "/tasks", Authorization="Bearer " + "x" * 43)
            assert shown.status == 401
            told = server.request("GET", "/tasks", Via="1.1 a").json()["message"]
            assert told.endswith("there is none: this server has no state folder, as its log says")
        options = ("--require-token", *ANY_PORTS)
        told = run_client(*options, script=script, XDG_STATE_HOME=str(tmp_path))
        assert told.returncode == 2 and b"--token-file: " in told.stderr

    def test_makers_with_the_same_pid_agree(self, tmp_path: Path) -> None:
        """Containers that share a folder: each is process 1."""
        path, link = str(tmp_path / "token"), os.link
        told = []

        def meet(source: str, target: str) -> None:
            with mock.patch.object(sc.os, "link", link):
                link(source, target)
                told.append(sc.load_token_file("X", path))
                try:
                    sc.make_token_file(path)  # the other one, in the same moment
                except OSError as error:
                    told.append(repr(error))

        with mock.patch.object(sc.os, "link", meet):
            sc.make_token_file(path)
        assert told == [sc.load_token_file("X", path)]


# TLS and the Unix socket ----------------------------------------------------------------------


class Certificate(NamedTuple):
    """A certificate for localhost that signs itself, and its key."""

    cert: Path
    key: Path

    @property
    def options(self) -> tuple[str, str]:
        return f"--tls-cert={self.cert}", f"--tls-key={self.key}"

    def context(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=str(self.cert))

    def copy_to(self, folder: Path) -> Certificate:
        """Copy both, as a renewal does it: beside, then renamed."""
        copy = Certificate(folder / "cert.pem", folder / "key.pem")
        for source, target in zip(self, copy):
            (folder / "new").write_bytes(source.read_bytes())
            os.replace(folder / "new", target)
        return copy


def make_certificate(folder: Path) -> Certificate:
    if shutil.which("openssl") is None:
        pytest.skip("the openssl command is not installed: no test of TLS")
    made = Certificate(folder / "cert.pem", folder / "key.pem")
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2"
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    files = ["-out", str(made.cert), "-keyout", str(made.key)]
    subprocess.run([*command.split(), *names, *files], check=True, stderr=subprocess.DEVNULL)
    return made


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: Any) -> list[Certificate]:
    return [make_certificate(tmp_path_factory.mktemp("cert")) for _ in range(2)]


class TlsServer(ServerProcess):
    """A server that speaks TLS; its helpers check the certificate."""

    def __init__(self, state: Path, certificate: Certificate, *options: str, **popen: Any) -> None:
        super().__init__(state, *certificate.options, *options, **popen)
        self.context = certificate.context()

    def connect(self, port: int | None = None) -> ssl.SSLSocket:
        return self.wrap(self.connect_plain(port))

    def wrap(self, plain: socket.socket) -> ssl.SSLSocket:
        return self.context.wrap_socket(plain, server_hostname="localhost")

    def connect_plain(self, port: int | None = None) -> socket.socket:
        return super().connect(port)

    def shown_certificate(self, context: ssl.SSLContext) -> bool:
        """Whether a new handshake gets the certificate that this context trusts."""
        with self.connect_plain() as plain:
            try:
                context.wrap_socket(plain, server_hostname="localhost").close()
            except ssl.SSLCertVerificationError:
                return False
        return True


@pytest.fixture(scope="class", params=loops())
def tls_server(request: Any, tmp_path_factory: Any, certificates: Any) -> Iterator[TlsServer]:
    folder = tmp_path_factory.mktemp("tls")
    options = (f"--loop={request.param}", "--interval=0.2")
    more = {"env": TOKENS, "HANDSHAKE_SECONDS": 3.0, "CLOSE_SECONDS": 30.0, "LINGER_SECONDS": 30.0}
    with TlsServer(folder, certificates[0], *options, **more) as server:
        server.get("/health")
        yield server


class TestTls(RunsTasks):
    """SPEC 1, 4, 9: https and wss on both ports; CASES 73."""

    @pytest.fixture(autouse=True)
    def stays_unharmed(self, tls_server: TlsServer) -> Iterator[None]:
        with unharmed(tls_server, runs=True):
            yield

    def test_curl_and_websockets_get_through(self, tls_server: TlsServer, certificates: Any):
        for port in (tls_server.port, tls_server.ws_port):
            url = f"https://localhost:{port}/exec?wait"
            told = curl("--cacert", str(certificates[0].cert), "-d", "echo ok", url)
            assert json.loads(told.stdout.decode())["output"] == "ok\n", told
            told = curl("--cacert", str(certificates[1].cert), "-d", "echo bad", url)
            assert told.returncode == 60  # the certificate is not trusted
        with tls_server.websocket() as websocket:
            task_id = tls_server.start("echo wss")
            events = receive_events(websocket, is_complete(task_id))
            assert "wss\n" in [event.get("output") for event in events]
            check_stream([event for event in events if "seq" in event])

    def test_closing_takes_no_time(self, tls_server: TlsServer) -> None:
        """TLS has no half-closed connections: who has said goodbye waits for us to close."""
        with RawPeer(tls_server, wrap=tls_server.wrap) as peer:
            peer.say(type="ping")
            peer.receive(is_type("pong"))
            started = time.monotonic()
            peer.send(make_frame(0x88, b"\x03\xe8"))
            assert list(peer.frames())[-1] == (0x88, b"\x03\xe8")
            assert time.monotonic() - started < 15
        with RawPeer(tls_server, wrap=tls_server.wrap) as peer:
            peer.send(make_frame(0x83))  # what is violated is told before the end
            assert peer.read_until(0x88)[-1][1][:2] == (1002).to_bytes(2, "big")

    def test_closing_waits_for_a_viewer_that_pauses(self, tls_server: TlsServer) -> None:
        with RawPeer(tls_server, wrap=tls_server.wrap) as peer:
            tls_server.finish("head -c 8000000 /dev/zero | tr '\\0' a")
            peer.send(make_frame(0x88, b"\x03\xe8"))
            time.sleep(3 * sc.TLS_GOODBYE_SECONDS)
            assert list(peer.frames())[-1] == (0x88, b"\x03\xe8")

    def test_closing_waits_for_a_reader_that_pauses(self, tls_server: TlsServer) -> None:
        task_id = tls_server.finish("head -c 1200000 /dev/zero | tr '\\0' a")
        with contextlib.ExitStack() as stack:
            peers = {}
            for size in range(300_000, 1_100_000, 50_000):
                plain = tls_server.connect_plain()
                plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32768)
                peers[size] = stack.enter_context(tls_server.wrap(plain))
                fields = f"GET /logs?id={task_id}&tail={size}&raw", *tls_server.fields
                peers[size].sendall(make_request(*fields, "Connection: close"))
            time.sleep(3 * sc.TLS_GOODBYE_SECONDS)
            answers = {size: AnswerStream(peer).next() for size, peer in peers.items()}
        assert [size for size, answer in answers.items() if len(answer.body) != size] == []

    def test_places_say_that_it_is_tls(self, tls_server: TlsServer) -> None:
        (listening,) = tls_server.log("listening")
        assert listening["http"] == f"https://127.0.0.1:{tls_server.port}"
        assert listening["ws"] == f"wss://127.0.0.1:{tls_server.ws_port}"
        assert tls_server.get("/info")["tls"] is True
        host = f"localhost:{tls_server.port}"
        for scheme, status in (("https", 200), ("http", 403)):
            check_answer(tls_server, status, "GET /tasks", f"Origin: {scheme}://{host}", host=host)
        with Prober(tls_server.discovery_port) as prober:
            (reply,) = prober.ask()
        assert reply["tls"] is True and reply["port"] == tls_server.port

    @pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
    def test_versions(self, tls_server: TlsServer, certificates: Any, version: Any) -> None:
        context = certificates[0].context()
        context.minimum_version = context.maximum_version = version
        with tls_server.connect_plain() as plain:
            with context.wrap_socket(plain, server_hostname="localhost") as connection:
                check_served(connection)
        own = sc.TlsFiles(str(certificates[0].cert), str(certificates[0].key), mock.Mock()).context
        assert own.minimum_version is ssl.TLSVersion.TLSv1_2  # whatever OpenSSL's own rules are

    @pytest.mark.parametrize("data", [
        make_request("GET /tasks"), bytes(range(256)) * 40, b"\x16\x03\x01\xff\xff" + b"x" * 99,
    ], ids=["http", "noise", "broken hello"])  # fmt: skip
    def test_what_is_no_tls_is_closed(self, tls_server: TlsServer, data: bytes) -> None:
        for port in (tls_server.port, tls_server.ws_port):
            with tls_server.connect_plain(port) as plain:
                with contextlib.suppress(ConnectionError):
                    plain.sendall(data)
                answer = read_all(plain)
            assert data.startswith(b"GET") == (b"HTTP/" in answer) == (b"speaks https" in answer)

    def test_silent_connection_is_closed_at_the_deadline(self, tls_server: TlsServer) -> None:
        started = time.monotonic()
        with tls_server.connect_plain() as silent, tls_server.connect_plain() as half:
            half.sendall(b"\x16\x03\x01\x02\x00\x01")
            assert read_all(silent) + read_all(half) == b""
            assert 2 < time.monotonic() - started < 20

    def test_half_open_handshakes_keep_nobody_out(self, tls_server: TlsServer) -> None:
        right = make_request("GET /info", "Connection: close", bearer(SERVER_RUN_TOKEN))
        hello = b"\x16\x03\x01\x02\x00\x01"
        with crowded_by_nobody(tls_server.connect_plain, 1000, hello):
            for _ in range(3):
                assert [ask(tls_server, right).json()["role"] for _ in range(2)] == ["run"] * 2

    def test_large_output_comes_whole(self, tls_server: TlsServer, certificates: list[Certificate]):
        """Less than is kept: else curl, if it is slow, would be cut off."""
        url = f"https://localhost:{tls_server.port}/exec?follow"
        told = curl("--cacert", str(certificates[0].cert), "-N", "-d", "seq 1 1000000", url)
        assert told.returncode == 0
        assert told.stdout == "".join(f"{n}\n" for n in range(1, 1000001)).encode()

    def test_slow_viewer_costs_bounded_memory(self, tls_server: TlsServer) -> None:
        with RawPeer(tls_server, receive_bytes=4096, wrap=tls_server.wrap) as viewer:
            before, largest = tls_server.resident_kib(), 0
            task_id = tls_server.start("head -c 100000000 /dev/zero | tr '\\0' a")
            while tls_server.task(task_id)["state"] == "running":
                largest = max(largest, tls_server.resident_kib())
                viewer.read_some(1000)
                select.select([], [], [], 0.02)
            assert tls_server.task(task_id)["output_bytes"] == 100000000
            # The kept events (16 MiB) and output (8 MiB), and what malloc makes of them.
            assert largest - before < 60 * 1024


class TestTlsFiles:
    """SPEC 1: certificates that change or cannot be used; each test has a server of its own."""

    @pytest.mark.parametrize("loop", loops())
    def test_burst_of_token_holders_gets_in(self, tmp_path: Path, certificates: Any, loop: str):
        """Handshakes take long when many come at once: nobody is taken for idle meanwhile."""
        data = make_request("GET /info", bearer(SERVER_RUN_TOKEN))
        options = ("--require-token", f"--loop={loop}")

        def enter(_: int) -> int:
            connection = stack.enter_context(server.connect())
            connection.sendall(data)
            return AnswerStream(connection).next().status

        names = ("HANDSHAKE_SECONDS", "HEAD_SECONDS", "NEWCOMER_GRACE_SECONDS")
        patience = dict.fromkeys(names, PATIENCE_SECONDS)
        with TlsServer(tmp_path, certificates[0], *options, env=TOKENS, **patience) as server:
            with contextlib.ExitStack() as stack:
                count = sc.MAX_NEWCOMERS * 2
                with concurrent.futures.ThreadPoolExecutor(count) as pool:
                    assert list(pool.map(enter, range(count))) == [200] * count

    @pytest.mark.parametrize("loop", loops())
    def test_new_files_are_taken_without_a_restart(self, tmp_path: Path, certificates, loop: str):
        old, new = certificates
        used = old.copy_to(tmp_path)
        options = (f"--loop={loop}", "--interval=0.2")
        with TlsServer(tmp_path, used, *options, SWEEP_SECONDS=0.05) as server:
            with server.websocket() as websocket:
                used.cert.write_bytes(new.cert.read_bytes())  # the key is still the old one
                server.wait_for_log("tls_not_reloaded")
                assert server.shown_certificate(old.context())
                assert not server.shown_certificate(new.context())
                new.copy_to(tmp_path)
                server.wait_for_log("tls_reloaded")
                assert server.shown_certificate(new.context())
                assert not server.shown_certificate(old.context())
                server.context = new.context()
                task_id = server.start("echo on")
                check_stream(receive_events(websocket, is_complete(task_id)))
                used.key.unlink()
                wait_until(lambda: len(server.log("tls_not_reloaded")) == 2)
                assert server.shown_certificate(new.context())
            assert all(r["level"] == "error" for r in server.log("tls_not_reloaded"))

    def test_bad_files_are_refused_with_status_2(self, tmp_path: Path, certificates: Any):
        one, two = certificates
        locked = ["openssl", "ec", "-aes256", "-passout", "pass:secret", "-in", str(one.key)]
        for path in ("locked", "empty", "noise"):
            (tmp_path / path).write_bytes(b"noise"[: 5 * (path == "noise")])
        subprocess.run([*locked, "-out", str(tmp_path / "locked")], check=True, stderr=-3)
        state = tmp_path / "state"
        state.mkdir()
        for cert, key in [
            (one.cert, two.key), (one.cert, tmp_path / "missing"), (tmp_path / "missing", one.key),
            (one.cert, tmp_path / "locked"),  # must not ask on the terminal
            (tmp_path / "empty", one.key), (one.cert, tmp_path / "noise"), (tmp_path, one.key),
            (one.cert, None),
        ]:  # fmt: skip
            options = [f"--tls-cert={cert}"] + ([f"--tls-key={key}"] if key else [])
            check_refusal(state, 2, ["--tls-cert", str(cert)], "--port=0", "--ws-port=0", *options)

    def test_transport_is_closed_once(self, tmp_path: Path, certificates: list[Certificate]):
        """After a second close asyncio forgets what the sweep asks for: an AttributeError."""
        code = """
import asyncio.sslproto
close = asyncio.sslproto._SSLProtocolTransport.close
def close_and_tell(self):
    if self._closed:
        os.write(2, b'{"event":"closed_twice"}\\n')
    close(self)
asyncio.sslproto._SSLProtocolTransport.close = close_and_tell
"""
        with TlsServer(tmp_path, certificates[0], "--loop=asyncio", code=code) as server:
            for data in (make_request("GET /health"), b"GET / HT"):
                with server.connect() as connection:
                    connection.sendall(data)
                    select.select([connection], [], [], 0.2)
            with server.websocket():
                pass
            assert server.get("/health") == {"ok": True}
        assert not server.log("closed_twice")

    def test_one_file_may_hold_both(self, tmp_path: Path, certificates: list[Certificate]) -> None:
        both = tmp_path / "both.pem"
        both.write_bytes(b"".join(path.read_bytes() for path in certificates[0]))
        with ServerProcess(tmp_path, f"--tls-cert={both}", NETWORK_BIND) as server:
            url = f"https://localhost:{server.port}/health"
            told = curl("--cacert", str(both), url)
            assert json.loads(told.stdout.decode()) == {"ok": True}
            assert not server.log("no_tls")


class UnixServer(ServerProcess):
    """A server that is asked over its Unix socket."""

    def __init__(self, state: Path, *options: str, path: Path | None = None, **popen: Any) -> None:
        self.path = path or state / "socket"
        super().__init__(state, f"--unix={self.path}", *options, **popen)

    def connect(self, port: int | None = None) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(PATIENCE_SECONDS)
        connection.connect(str(self.path))
        return connection


class TestUnixSocket:
    """SPEC 1, 4: a Unix socket beside the ports."""

    @pytest.mark.parametrize("loop", loops())
    def test_own_account_is_trusted_and_no_other(self, loop: str) -> None:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            folder.chmod(0o755)
            with UnixServer(folder, f"--loop={loop}", env=TOKENS) as server, unharmed(server):
                assert stat.S_IMODE(server.path.lstat().st_mode) == 0o600
                told = curl("--unix-socket", str(server.path), "http://localhost/info")
                assert json.loads(told.stdout.decode())["role"] == "run"
                check_answers(server, 401, CLOSED_REQUESTS, "Via: 1.1 proxy")
                check_answer(server, 403, "GET /tasks", host="evil.test")
                check_answer(server, 101, "GET /ws", *UPGRADE_FIELDS)
                check_answer(server, 401, "GET /tasks", bearer("x" * 20))
                assert server.log("listening")[0]["unix"] == str(server.path)
                server.path.chmod(0o666)  # as a careless administrator would
                ask_as_nobody(server, 401, "GET /info")
                refused = read_audit(state_file(server, "audit.log"), "refused")[-1]
                assert (refused["by"], refused["request"]) == (f"unix - uid={NOBODY}", "GET /info")
                answer = ask_as_nobody(server, 200, "GET /info", bearer(SERVER_VIEW_TOKEN))
                assert answer.json()["role"] == "view"
            assert not server.path.exists()

    @pytest.mark.parametrize("loop", loops())
    def test_network_bind_leaves_it_trusted(self, tmp_path: Path, loop: str) -> None:
        with UnixServer(tmp_path, NETWORK_BIND, f"--loop={loop}", env=TOKENS) as server:
            assert server.run("echo here")["output"] == "here\n"
            check_error(ask_from(server, "", make_request("GET /tasks")), 401)
            assert server.get("/tasks")[0]["by"] == f"unix run uid={os.geteuid()}"

    def test_file_of_a_killed_server_is_replaced(self, tmp_path: Path) -> None:
        with UnixServer(tmp_path) as server:
            server.kill()
        assert server.path.is_socket()
        with UnixServer(tmp_path) as server:
            assert server.get("/health") == {"ok": True}
            other = tmp_path / "other"
            other.mkdir()
            check_refusal(other, 1, [str(server.path)], *ANY_PORTS, f"--unix={server.path}")
            assert server.get("/health") == {"ok": True}

    def test_place_that_is_taken_is_left_alone(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("precious")
        (tmp_path / "link").symlink_to("file")
        (tmp_path / "folder").mkdir()
        for name in ("file", "link", "folder", "missing/socket", "x" * 200):
            words, option = [f"{tmp_path}/{name}"], f"--unix={tmp_path}/{name}"
            words += ["path too long"] * (name[:2] == "xx")
            check_refusal(tmp_path, 1, words, *ANY_PORTS, option, files=("file", "link"))
        assert (tmp_path / "link").is_symlink() and (tmp_path / "folder").is_dir()
        assert (tmp_path / "file").read_text() == "precious"

    def test_file_of_a_successor_is_not_removed(self, tmp_path: Path) -> None:
        with UnixServer(tmp_path) as server:
            server.path.unlink()
            with UnixServer(tmp_path) as successor:
                server.process.terminate()
                server.process.wait(PATIENCE_SECONDS)
                assert successor.get("/health") == {"ok": True}
        assert not successor.path.exists()


# Strangers ------------------------------------------------------------------------------------


CROWDED_GRACE_SECONDS = 5.0


@pytest.fixture(scope="class", params=[*loops(), *(f"{loop} no-auth" for loop in loops())])
def crowded_server(request: Any, tmp_path_factory: Any) -> Iterator[ServerProcess]:
    """A server on the network, on either loop, with tokens and with --no-auth; of less patience."""
    state = tmp_path_factory.mktemp("crowd")
    loop, _, no_auth = request.param.partition(" ")
    kind, *options = (ServerProcess, NETWORK_BIND, "--no-auth") if no_auth else (TokenServer,)
    times = {"NEWCOMER_GRACE_SECONDS": CROWDED_GRACE_SECONDS, "HEAD_SECONDS": PATIENCE_SECONDS}
    with kind(state, f"--loop={loop}", *options, **times) as server:
        server.get("/health")
        yield server


class TestStrangers:
    """SPEC 9: who has not passed the gate cannot keep out who may; CASES 69."""

    @pytest.fixture(autouse=True)
    def gives_all_back(self, crowded_server: ServerProcess) -> Iterator[None]:
        before = crowded_server.resident_kib()
        with unharmed(crowded_server, runs=True):
            yield
        assert crowded_server.resident_kib() - before < 24 * 1024

    @pytest.mark.parametrize("data", [b"", b"GET / HT", make_request("GET /health")])
    def test_half_open_connections_keep_nobody_out(self, crowded_server: Any, data: bytes):
        with contextlib.ExitStack() as stack:
            for _ in range(1000):
                peer = stack.enter_context(crowded_server.connect())
                with contextlib.suppress(ConnectionError):
                    peer.sendall(data)
            for _ in range(3):
                assert crowded_server.run("echo in")["output"] == "in\n"
            assert crowded_server.get("/info")["role"] == "run"
            if crowded_server.get("/info")["auth"]:
                # Those that pass by every rule but the token are bounded, too.
                wait_until(lambda: crowded_server.descriptors() < sc.MAX_NEWCOMERS + 40)

    def test_only_the_oldest_give_way(self, crowded_server: ServerProcess) -> None:
        """No more of them than must; the connections of the check before may count for a moment."""
        with contextlib.ExitStack() as stack:
            peers = []
            for _ in range(sc.MAX_NEWCOMERS + 20):
                peers.append(stack.enter_context(crowded_server.connect()))
                peers[-1].sendall(b"GET / HT")
            wait_until(lambda: len(select.select(peers, [], [], 0)[0]) >= 20)
            assert select.select(peers[24:], [], [], CROWDED_GRACE_SECONDS * 1.2)[0] == []
            assert set(peers[:20]) <= set(select.select(peers, [], [], 0)[0])

    def test_readers_that_do_not_read_keep_nobody_out(self, crowded_server: ServerProcess) -> None:
        requests = make_request("GET /") * 300
        with contextlib.ExitStack() as stack:
            for _ in range(100):
                peer = stack.enter_context(socket.socket())
                peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
                peer.connect(("127.0.0.1", crowded_server.port))
                peer.setblocking(False)
                with contextlib.suppress(OSError):
                    peer.send(requests)
            for _ in range(3):
                assert crowded_server.run("echo in")["output"] == "in\n"

    def test_burst_of_token_holders_gets_in(self, crowded_server: ServerProcess) -> None:
        data = make_request("GET /info", bearer(SERVER_RUN_TOKEN))
        with contextlib.ExitStack() as stack:
            for _ in range(sc.MAX_NEWCOMERS):
                stack.enter_context(crowded_server.connect()).sendall(b"GET / HT")
            with stopped(crowded_server):
                peers = [stack.enter_context(crowded_server.connect()) for _ in range(300)]
                for peer in peers:
                    peer.sendall(data)
            assert [AnswerStream(peer).next().status for peer in peers] == [200] * 300
            # And they stay: who has shown a token is no newcomer any more.
            assert select.select(peers, [], [], CROWDED_GRACE_SECONDS * 1.2)[0] == []
            for peer in peers:
                peer.sendall(data)
            assert [AnswerStream(peer).next().status for peer in peers] == [200] * 300


# End to end: limits --------------------------------------------------------------------------


@pytest.fixture(scope="class", params=loops())
def hasty_server(request: Any, tmp_path_factory: Any) -> Iterator[ServerProcess]:
    """A server whose time-outs are a second or two."""
    folder = tmp_path_factory.mktemp("hasty")
    names = ("HEAD_SECONDS", "BODY_SECONDS", "IDLE_SECONDS")
    times = {"LINGER_SECONDS": 0.3, "WRITE_STALL_SECONDS": 2.5, **dict.fromkeys(names, 1.0)}
    options = (f"--loop={request.param}", "--keep-output=32M")
    with ServerProcess(folder, *options, **times) as server:
        yield server


class TestTimeouts:
    """Every phase of a connection has its deadline, on the monotonic clock."""

    @pytest.mark.parametrize("data", [
        make_request("GET /tasks", *["A: b"] * 90), make_request("POST /exec", body=b"#" * 500),
        http_chunked(b"1\r\n#\r\n" * 90), b"\r\n" * 300,
    ], ids=["head", "body", "chunks", "empty lines"])  # fmt: skip
    def test_dripping_request_ends_at_the_total_deadline(self, hasty_server: Any, data: bytes):
        start = data.index(b"\r\n\r\n") + 4 if data[:4] == b"POST" else 0
        with unharmed(hasty_server), hasty_server.connect() as connection:
            connection.sendall(data[:start])
            send_dripping(connection, data[start:], 0.05)
            assert select.select([connection], [], [], 0)[0], "it was read to its end"
            answers = AnswerStream(read_all(connection)).rest()
        assert len(answers) == 1 or data[:2] == b"\r\n"  # no request has begun yet
        for answer in answers:
            check_error(answer, 408)
            assert answer.headers["connection"] == "close"

    @pytest.mark.parametrize("data, status", [
        (make_request("GET /tasks")[:-2], 408), (post(body=b"true")[:-2], 408),
        (http_chunked(b"4\r\ntr"), 408), (b"", None), (make_request("GET /health"), 200),
    ], ids=["head", "body", "chunk", "nothing", "nothing after an answer"])  # fmt: skip
    def test_stalled_connection_is_closed(self, hasty_server: Any, data: bytes, status: Any):
        with unharmed(hasty_server), hasty_server.connect() as connection:
            connection.sendall(data)
            answers = AnswerStream(read_all(connection)).rest()
            assert [answer.status for answer in answers] == ([status] if status else [])
            assert wait_until(lambda: hasty_server.descriptors() <= hasty_server.idle_descriptors)  # type: ignore[attr-defined]

    def test_answer_may_take_longer_than_any_deadline(self, hasty_server: ServerProcess) -> None:
        with unharmed(hasty_server, runs=True):
            for query in ("wait", "follow"):
                answer = hasty_server.request("POST", f"/exec?{query}", b"sleep 2; echo late")
                assert b"late" in answer.body
                assert hasty_server.get("/tasks")[-1]["exit_code"] == 0

    @pytest.mark.parametrize("query", ["raw", "follow", "offset=1"])
    def test_reader_that_stalls_is_dropped(self, hasty_server: ServerProcess, query: str) -> None:
        task_id = hasty_server.finish("head -c 16000000 /dev/zero | tr '\\0' a")
        assert hasty_server.task(task_id)["output_bytes"] == 16000000
        with unharmed(hasty_server, runs=True), socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(("127.0.0.1", hasty_server.port))
            connection.settimeout(PATIENCE_SECONDS)
            connection.sendall(make_request(f"GET /logs?id={task_id}&{query}"))
            assert connection.recv(1)

            def is_dropped() -> bool:
                with contextlib.suppress(ConnectionError):
                    connection.recv(1)
                return hasty_server.descriptors() <= hasty_server.idle_descriptors  # type: ignore[attr-defined]

            wait_until(lambda: hasty_server.descriptors() > hasty_server.idle_descriptors)  # type: ignore[attr-defined]
            while not is_dropped():
                assert not select.select([], [], [connection], 0.1)[2]

    def test_reader_that_is_slow_gets_all(self, hasty_server: ServerProcess) -> None:
        task_id = hasty_server.finish("head -c 20000000 /dev/zero | tr '\\0' a")
        request = make_request(f"GET /logs?id={task_id}&raw", "Connection: close")
        with unharmed(hasty_server, runs=True), contextlib.ExitStack() as stack:
            readers = [stack.enter_context(hasty_server.connect()) for _ in range(4)]
            received = dict.fromkeys(readers, 0)
            for reader in readers:
                reader.sendall(request)
            for _ in range(50):  # in steps; all of it takes far longer than the time-out
                select.select([], [], [], 0.08)
                for reader in readers:
                    received[reader] += len(reader.recv(300000))
            while readers:
                for reader in select.select(readers, [], [], PATIENCE_SECONDS)[0]:
                    data = reader.recv(1000000)
                    received[reader] += len(data)
                    if not data:
                        readers.remove(reader)
        assert min(received.values()) > 20000000

    def test_nothing_is_kept_of_what_is_lost(self) -> None:
        connection = mock.Mock(server=mock.Mock(deadlines={}), phase_seconds=1.0)
        sc.Connection.begin_phase(connection, sc.Phase.CLOSING)
        assert connection.server.deadlines == {}

    def test_idle_time_is_its_own(self, tmp_path: Path) -> None:
        with ServerProcess(tmp_path, HEAD_SECONDS=600.0, IDLE_SECONDS=0.5) as server:
            with unharmed(server), server.connect() as connection:
                connection.sendall(make_request("GET /health"))
                (answer,) = AnswerStream(read_all(connection)).rest()
            assert answer.status == 200
        with ServerProcess(tmp_path, HEAD_SECONDS=1.0, IDLE_SECONDS=600.0) as server:
            with unharmed(server), server.connect() as connection:
                check_served(connection)
                assert select.select([connection], [], [], 2.5)[0] == []  # still open
                check_served(connection)

    @pytest.mark.parametrize("step", [3600, -3600])
    def test_stepped_wall_clock_changes_no_deadline(self, tmp_path: Path, step: int) -> None:
        flag = tmp_path / "stepped"
        code = f"real = sc.time.time\nsc.time.time = lambda: real() + {step} * os.path.exists({str(flag)!r})"
        with ServerProcess(tmp_path, "--interval=0.1", code=code) as server:
            with unharmed(server, runs=True), server.connect() as connection:
                check_served(connection)
                task_id = server.start("exec sleep 300", timeout=600)
                ended = server.start("exec sleep 300", timeout=3)
                before = server.get("/stats")["timestamp"]
                flag.touch()
                wait_until(lambda: abs(server.get("/stats")["timestamp"] - before) > 3e6)
                seq = server.get("/stats")["seq"]
                wait_until(lambda: server.get("/stats")["seq"] > seq + 5)
                assert server.task(task_id)["state"] == "running"
                assert server.wait_for_end(ended)["state"] == "timeout"
                check_served(connection)
                server.end(task_id)


class Pestering:
    """Ten clients, each of which sends the same bytes for ever and reads what is answered."""

    def __init__(self, make_socket: Callable[[], socket.socket], begin: bytes, data: bytes) -> None:
        sockets = [make_socket() for _ in range(10)]
        is_udp = sockets[0].type == socket.SOCK_DGRAM
        self.data = memoryview(data * (1 if is_udp else 65536 // len(data) + 1))
        self.sends_each = 50 if is_udp else 1
        self.sent = dict.fromkeys(sockets, 0)
        self.is_over = False
        for one in sockets:
            one.sendall(begin)
            one.setblocking(False)
        self.thread = threading.Thread(target=self._run)

    def __enter__(self) -> Pestering:
        self.thread.start()
        wait_until(lambda: min(self.sent.values()) > max(2000, len(self.data)))
        return self

    def __exit__(self, *_: Any) -> None:
        self.is_over = True
        self.thread.join()
        for one in self.sent:
            one.close()
        assert len(self.sent) == 10, "the server has closed a connection"

    def _run(self) -> None:
        while not self.is_over:
            time.sleep(0.001)  # the measurement needs the interpreter too
            for one in list(self.sent):
                with contextlib.suppress(BlockingIOError, ssl.SSLWantWriteError):
                    for _ in range(self.sends_each):
                        at = self.sent[one] % len(self.data)
                        self.sent[one] += one.send(self.data[at : at + 65536])
                with contextlib.suppress(BlockingIOError, ssl.SSLWantReadError):
                    if not one.recv(262144):
                        self.sent.pop(one).close()


def measure_health(server: ServerProcess) -> float:
    taken = []
    for _ in range(9):
        start = time.monotonic()
        assert b" 200 OK" in server.exchange(b"GET /health HTTP/1.0\r\nHost: localhost\r\n\r\n")
        taken.append(time.monotonic() - start)
    return statistics.median(taken)


# What is small, and there is much of it: what comes first, and then again and again.
SMALL_PIECES = {
    "messages": (upgrade_request(), make_frame(0x81, "x")), "pings": (upgrade_request(), make_frame(0x89)),
    "fragments": (upgrade_request(), build_text(b"", *[b""] * 1000, b"")),
    "requests": (b"", b"GET /x HTTP/1.1\r\nHost:localhost\r\n\r\n"),
    "chunks": (b"", post(CHUNKED, body=b"1\r\nx\r\n" * 99999 + b"0\r\n\r\n", line="POST /kill")),
    "datagrams": (b"", b"DISCOVER_SERVE?"),
}  # fmt: skip


class TestSmallPieces:
    """SPEC 9: what one client sends delays nobody, however small its pieces are."""

    @pytest.mark.parametrize("kind, is_tls", [
        *((kind, False) for kind in SMALL_PIECES), ("messages", True), ("chunks", True),
    ])  # fmt: skip
    def test_others_are_answered_in_time(self, tmp_path, certificates, kind, is_tls):
        options = ("--loop=asyncio", "--interval=3600")
        make: Any = functools.partial(TlsServer, tmp_path, certificates[0], *options)
        with make() if is_tls else ServerProcess(tmp_path, *options) as server:
            calm = measure_health(server)

            def connect_udp() -> socket.socket:
                udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
                udp.connect(("127.0.0.1", server.discovery_port))
                return udp

            connect = connect_udp if kind == "datagrams" else server.connect
            with Pestering(connect, *SMALL_PIECES[kind]):
                busy = measure_health(server)
            # 10 ms on a machine that has nothing else to do. Where each client is worked for until
            # nothing is left, it is seconds.
            assert busy < 0.5 + 10 * calm


class TestLimits:
    """Every count and buffer that a peer can fill has a limit; each test has its own server."""

    @pytest.mark.parametrize("loop, most", [*((loop, 5) for loop in loops()), ("asyncio", 3)])
    def test_connections_above_the_limit_get_503(
        self, tmp_path: Path, loop: str, most: int
    ) -> None:
        with ServerProcess(tmp_path, f"--max-clients={most}", f"--loop={loop}") as server:
            with unharmed(server):
                with contextlib.ExitStack() as stack:
                    held = [stack.enter_context(server.connect()) for _ in range(most)]
                    for connection in held:
                        check_served(connection)
                    for data in (b"", make_request("GET /health"), post(body=b"true" * 20000)):
                        with server.connect() as connection:
                            with contextlib.suppress(ConnectionError):
                                connection.sendall(data)
                            (answer,) = AnswerStream(read_all(connection)).rest()
                        check_error(answer, 503)
                    for connection in held:
                        check_served(connection)
                wait_until(lambda: server.request("GET", "/health").status == 200)

    def test_tasks_above_the_limit_get_429(self, tmp_path: Path) -> None:
        with ServerProcess(tmp_path, "--max-tasks=2") as server, unharmed(server, runs=True):
            first, second = server.start("exec sleep 300"), server.start("exec sleep 300")
            for path in ("/exec", "/exec?wait", "/exec?follow"):
                check_error(server.request("POST", path, b"true"), 429)
            assert [task["task_id"] for task in server.get("/tasks")] == [first, second]
            server.end(first)
            server.end(server.start("exec sleep 300"))
            server.end(second)

    def test_no_exec_runs_types_and_kills_nothing(self, tmp_path: Path) -> None:
        with ServerProcess(tmp_path, "--no-exec") as server:
            with unharmed(server):
                for path in ("/exec", "/exec?wait", "/exec?follow", "/stdin?id=1"):
                    answer = server.request("POST", path, b"true")
                    assert (answer.status, answer.json()["error"]) == (403, "exec_disabled")
                assert server.request("POST", "/kill?id=1").status in (403, 404)
                assert server.get("/info")["exec"] is False and server.get("/stats")["cpus"] > 0
            with RawPeer(server) as peer:
                peer.say(type="hello")
                assert peer.receive(is_type("hello"))[-1]["exec"] is False
                for kind in ("task_kill", "task_input", "task_resize"):
                    peer.say(type=kind, task_id="1", data="x")
                    code = peer.receive(is_type("error"))[-1]["code"]
                    # Whether there is such a task is asked first for a kill; that is no refusal.
                    assert code == "exec_disabled" or (code, kind) == ("unknown_task", "task_kill")
            refused = read_audit(state_file(server, "audit.log"), "refused")
        assert (refused[0]["reason"], refused[0]["request"]) == ("exec_disabled", "POST /exec")

    def test_finished_tasks_above_the_limit_are_forgotten(self, tmp_path: Path) -> None:
        with ServerProcess(tmp_path, "--keep-tasks=2") as server, unharmed(server, runs=True):
            running = server.start("exec sleep 300")
            finished = [server.run(f"echo {n}")["task_id"] for n in range(4)]
            kept = [task["task_id"] for task in server.get("/tasks")]
            assert kept == [running, *finished[2:]]
            for path in ("/tasks", "/logs"):
                for task_id in finished[:2]:
                    check_error(server.request("GET", f"{path}?id={task_id}"), 404)
            check_error(server.request("POST", f"/kill?id={finished[0]}"), 404)
            assert server.end(running)["state"] == "killed"
            kept = [task["task_id"] for task in server.get("/tasks")]
            assert kept == [running, finished[3]], "which has just ended, and is older"

    def test_connections_are_fewer_than_descriptors(self, tmp_path: Path) -> None:
        code = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (80, 80))"
        with ServerProcess(tmp_path, code=code) as server:
            assert server.wait_for_log("few_descriptors")["max_clients"] == 80 - 32 - 20
            with contextlib.ExitStack() as stack:
                for _ in range(60):
                    stack.enter_context(server.connect())
                assert server.request("GET", "/health").status == 503
            wait_until(lambda: server.request("GET", "/health").status == 200)
            assert server.get("/info")["limits"]["max_clients"] == 80 - 32 - 20
            assert not server.log("loop_error")

    def test_connection_that_made_room_starts_nothing(self, tmp_path: Path) -> None:
        with TokenServer(tmp_path, "--max-clients=4") as server, contextlib.ExitStack() as stack:
            os.kill(server.pid, signal.SIGSTOP)
            peers = [stack.enter_context(server.connect()) for _ in range(3)]
            for peer in peers:
                peer.sendall(post(*server.fields, "Connection: close", body=b"true"))
            os.kill(server.pid, signal.SIGCONT)
            answers = [read_all(peer) for peer in peers]
            assert answers[0] == b"" and answers[2].startswith(b"HTTP/1.1 200 ")
            assert len(server.get("/tasks")) == sum(map(bool, answers))

    @pytest.mark.parametrize("places", [100, 20])
    def test_strangers_cannot_take_all_places(self, tmp_path: Path, places: int) -> None:
        with ServerProcess(tmp_path, f"--max-clients={places}") as server:
            with crowded_by_nobody(server.connect, 150):
                assert server.run("echo mine")["output"] == "mine\n"

    def test_follower_that_falls_behind_notices(self, tmp_path: Path) -> None:
        with ServerProcess(tmp_path, "--keep-output=64K") as server:
            url = f"http://{server.place}/exec?follow"
            curl = ["curl", "-sN", "-d", "seq 1 3000000; sleep 300", url]
            with subprocess.Popen(curl, stdout=subprocess.PIPE) as client:
                wait_until(lambda: server.get("/tasks"))
                task_id = server.get("/tasks")[-1]["task_id"]
                wait_until(lambda: server.task(task_id)["output_bytes"] == 22888896)
                received = client.stdout.read()
            assert client.returncode == 18  # the transfer ended in its middle
            whole = "".join(f"{number}\n" for number in range(1, 3000001)).encode()
            assert 0 < len(received) < len(whole) and whole.startswith(received)

    def test_failure_in_one_place_stays_there(self, tmp_path: Path) -> None:
        code = """
async def fail(server, request):
    raise RuntimeError("injected /some/path " + "x" * 10)
for path in ("/stats", "/kill"):
    sc.ROUTES[path] = sc.ROUTES[path]._replace(answer=fail)
count, build = [0], sc.build_stats
def build_or_fail(*arguments):
    count[0] += 1
    if count[0] in range(3, 9):
        raise ValueError("injected")
    return build(*arguments)
sc.build_stats = build_or_fail
"""
        with ServerProcess(tmp_path, "--interval=0.1", code=code) as server:
            server.check = False
            for method, path in [("GET", "/stats"), ("POST", "/kill?id=1"), ("GET", "/stats")]:
                answer = server.request(method, path, b"x" if method == "POST" else None)
                check_error(answer, 500)
                assert b"injected" not in answer.body and b"/some" not in answer.body
                assert server.run("echo on")["output"] == "on\n"
            seq = wait_until(lambda: server.log("sampler_failed") and server.get("/info")["seq"])
            wait_until(lambda: server.get("/info")["seq"] > seq + 5)
            assert 1 <= len(server.log("sampler_failed")) < 4  # of six: limited to one a second
            assert len(server.log("request_failed")) in (1, 2, 3)
            assert all("RuntimeError" in record["trace"] for record in server.log("request_failed"))
        assert server.process.returncode == 0


# Pieces for processes ------------------------------------------------------------------------


def child_pids(pid: int) -> list[int]:
    threads = Path(f"/proc/{pid}/task").iterdir()
    return [int(child) for thread in threads for child in (thread / "children").read_text().split()]


def read_command_line(pid: int) -> str:
    """Return what a process was last started as, "" once it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ").strip()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def wait_for_death(pids: list[int], seconds: float = PATIENCE_SECONDS) -> None:
    """Wait until none of the processes runs; zombies of a careless init do not count."""
    wait_until(lambda: all(sc.is_zombie(pid) for pid in pids), seconds)


@contextlib.contextmanager
def kill_at_last(pids: list[int]) -> Iterator[None]:
    """Leave nothing running, whatever fails."""
    try:
        yield
    finally:
        for pid in pids:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)


def start_ready(server: ServerProcess, command: str, **fields: Any) -> tuple[str, list[int]]:
    """Start a command that says "ready"; return (task id, the processes of its session)."""
    task_id = server.start(command, **fields)
    wait_until(lambda: "ready" in server.get(f"/logs?id={task_id}")["logs"])
    return task_id, sc.find_session(server.task(task_id)["pid"])


def kill_task(server: ServerProcess, task_id: str, signal_name: str = "TERM") -> Answer:
    return server.request("POST", f"/kill?id={task_id}&signal={signal_name}")


def ask_host(host: str, port: int, path: str = "/health", body: str | None = None) -> Any:
    """Send one request to any address; return the JSON of an answer 200."""
    connection = http.client.HTTPConnection(host, port, timeout=PATIENCE_SECONDS)
    with contextlib.closing(connection):
        connection.request("GET" if body is None else "POST", path, body)
        answer = connection.getresponse()
        assert answer.status == 200
        return json.loads(answer.read())


def upgrade(host: str, port: int) -> bytes:
    with socket.create_connection((host, port), PATIENCE_SECONDS) as connection:
        connection.sendall(upgrade_request(host=f"[{host}]" if ":" in host else host))
        return connection.recv(65536)


def bind(port: int = 0, address: str = "127.0.0.1") -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return socket.create_server((address, port), family=family)


@contextlib.contextmanager
def bind_udp() -> Iterator[socket.socket]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        udp.bind(("127.0.0.1", 0))
        udp.settimeout(PATIENCE_SECONDS)
        yield udp


def run_shell(folder: Path, command: str, *arguments: str) -> None:
    if "chown" in command and os.geteuid() != 0:
        pytest.skip("only root can give a file away")
    subprocess.run(["sh", "-ec", command, *arguments], cwd=folder, check=True)


def listening_ports(pid: int) -> list[int]:
    links = []
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            links.append(os.readlink(str(fd)))
    rows = [row.split() for row in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return [int(r[1][-4:], 16) for r in rows if r[3] == "0A" and f"socket:[{r[9]}]" in links]


ANY_PORTS = ("--port=0", "--ws-port=0", "--no-discovery")


def check_refusal(
    state: Path, status: int, words: list[str], *options: str, files: Any = (), **env: str
) -> None:
    """The start is refused in one line that holds the words; no file is left but those there."""
    result = run_client(*options, XDG_STATE_HOME=str(state), **env)
    lines = result.stderr.decode().splitlines()
    assert (result.returncode, result.stdout, len(lines)) == (status, b"", 1), result
    assert not [word for word in words if word not in lines[0]], lines
    left = {path.name for path in state.rglob("*") if path.is_file()}
    assert left <= {"token", "view-token", *files}


@contextlib.contextmanager
def server_with_output(state: Path, redirect: str, *options: str, **popen: Any) -> Iterator[Any]:
    """A server whose log goes elsewhere; it is found by the ports on which it listens."""
    server = ServerProcess(state, "--cpu-alert=100", *options)
    command = ["sh", "-c", f'exec "$@" {redirect}', "sh", *server.command]
    server.process = subprocess.Popen(command, env=server.env, **popen)
    server.pid = server.process.pid

    def find_ports() -> list[int]:
        assert server.process.poll() is None, f"ended with {server.process.returncode}"
        ports = listening_ports(server.pid)
        return ports if len(ports) == 2 else []

    try:
        server.port = wait_until(find_ports)[0]
        yield server
        server.process.terminate()
        assert server.process.wait(PATIENCE_SECONDS) == 0
    finally:
        server.process.kill()
        server.process.wait()


class OnTerminal(contextlib.AbstractContextManager):
    """A program at a terminal of its own, as a person starts it."""

    def __init__(self, command: list[str], env: Any, cols: int, rows: int, **popen: Any) -> None:
        self.master, self.slave = pty.openpty()
        self.resize(cols, rows)
        self.before = termios.tcgetattr(self.slave)
        self.data = b""
        options: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), self.slave)
        options["preexec_fn"] = lambda: fcntl.ioctl(2, termios.TIOCSCTTY, 0)
        options = {"start_new_session": True, **options, **popen}
        self.process = subprocess.Popen(command, env={**os.environ, **env}, **options)

    def __exit__(self, *_: Any) -> None:
        self.process.kill()
        self.process.wait()
        for fd in {self.master, self.slave} - {-1}:
            os.close(fd)

    def resize(self, cols: int, rows: int) -> None:
        sc.set_terminal_size(self.slave, cols, rows)

    def type(self, keys: str | bytes) -> None:
        os.write(self.master, keys if isinstance(keys, bytes) else keys.encode())

    def read(self) -> None:
        while select.select([self.master], [], [], 0)[0]:
            self.data += os.read(self.master, 65536)

    @property
    def text(self) -> str:
        return self.data.decode("utf-8", "ignore")

    def read_until(self, pattern: str) -> Any:
        """Return the first match of the pattern in what the terminal shows."""
        try:
            return wait_until(lambda: self.read() or re.search(pattern, self.text))
        except AssertionError:
            raise AssertionError(self.text) from None


class Terminal(OnTerminal):
    """A server."""

    def __init__(self, state: Path, *options: str) -> None:
        server = ServerProcess(state, *options)
        super().__init__(server.command, server.env, 200, 50)

    def __enter__(self) -> Terminal:
        self.port = int(self.read_until(r'"http":"http://[\d.]+:(\d+)"').group(1))
        return self


@contextlib.contextmanager
def exhausted(server: ServerProcess) -> Iterator[Callable[..., tuple[int, Any]]]:
    """Leave a server without a free descriptor; give what sends on a connection it has."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE_SECONDS)

    def send(method: str, path: str, body: str | None = None) -> tuple[int, Any]:
        connection.request(method, path, body)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())

    send("GET", "/health")
    limits, limit = resource.prlimit(server.pid, resource.RLIMIT_NOFILE), server.descriptors() + 8
    with contextlib.ExitStack() as stack:
        stack.callback(resource.prlimit, server.pid, resource.RLIMIT_NOFILE, limits)
        resource.prlimit(server.pid, resource.RLIMIT_NOFILE, (limit, limits[1]))
        stack.callback(connection.close)
        for _ in range(12):
            stack.enter_context(server.connect())
        wait_until(lambda: server.descriptors() >= limit)
        yield send


class Gate:
    """A FIFO at which a command waits until the test lets it pass."""

    def __init__(self, path: Path) -> None:
        os.mkfifo(path)
        self.fd = os.open(path, os.O_RDWR)
        self.wait = f"read _ < '{path}'"

    def open(self) -> None:
        os.write(self.fd, b"\n")


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    gate = Gate(tmp_path / "gate")
    yield gate
    os.close(gate.fd)


@pytest.fixture
def tidy(server: ServerProcess) -> Iterator[None]:
    """After the test: no zombies, nothing runs, descriptors are back."""
    before = server.descriptors()
    yield
    wait_until(lambda: not child_pids(server.pid) and server.descriptors() <= before)


# Tasks ---------------------------------------------------------------------------------------


@pytest.mark.usefixtures("tidy")
class TestTaskProcess:
    """SPEC 5: what a command is given, and what becomes of what it gives."""

    SHELL_NAMES = {"_", "PWD", "OLDPWD", "SHLVL", "LC_CTYPE"}

    def test_environment_is_the_servers_and_three_things_more(self, server: Any) -> None:
        own = {"ADDED": "a=b\nc", "PYTHONUNBUFFERED": "0", "SERVERCONTROL_TASK_ID": "forged"}
        answer = server.run("env -0", env=own)
        got = dict(item.split("=", 1) for item in answer["output"].split("\0")[:-1])
        want = {**server.env, **own, "SERVERCONTROL_TASK_ID": answer["task_id"]}
        for name in self.SHELL_NAMES:
            got.pop(name, None), want.pop(name, None)
        assert got == want
        assert server.run("echo $PYTHONUNBUFFERED")["output"] == "1\n"

    def test_process_starts_clean(self, server: Any) -> None:
        task_id = server.start("exec sleep 60")
        pid = server.task(task_id)["pid"]
        status = Path(f"/proc/{pid}/status")
        wait_until(lambda: "Name:\tsleep" in status.read_text())
        masks = re.findall(r"^Sig(?:Blk|Ign|Cgt):\s*(\w+)", status.read_text(), re.M)
        # posix_spawn of glibc leaves its own two signals ignored; nobody can change them.
        reserved = 1 << 31 | 1 << 32
        assert [int(mask, 16) & ~reserved for mask in masks] == [0, 0, 0]
        # For a moment it holds files of its own, such as the locale's.
        wait_until(lambda: sorted(os.listdir(f"/proc/{pid}/fd")) == ["0", "1", "2"])
        _, out, err = (os.readlink(f"/proc/{pid}/fd/{fd}") for fd in range(3))
        assert out == err and out.startswith("pipe:")
        assert os.getsid(pid) == os.getpgid(pid) == pid
        assert server.end(task_id)["state"] == "killed"

    @parametrize_rows("command, exit_code, signal_name", [
        ("success", "exit 0", 0, None), ("failure", "exit 7", 7, None),
        ("largest", "exit 255", 255, None), ("not found", "/nonexistent-command", 127, None),
        ("not an option", "-x", 127, None), ("nor this", "+x; exit 4", 4, None),
        ("only looks like TERM", "exit 143", 143, None), ("TERM", "kill -TERM $$", 143, "TERM"),
        ("KILL", "kill -KILL $$", 137, "KILL"),
        ("core signal", "ulimit -c 0; kill -SEGV $$", 139, "SEGV"),
        ("signal with two names", "ulimit -c 0; kill -ABRT $$", 134, "ABRT"),
        ("signal without a name", "kill -35 $$", 163, "35"),
    ])  # fmt: skip
    def test_exit_code(self, server: Any, command: str, exit_code: int, signal_name: Any) -> None:
        answer = server.run(command)
        task = server.task(answer["task_id"])
        assert (answer["exit_code"], answer["signal"]) == (exit_code, signal_name)
        assert (task["exit_code"], task["signal"]) == (exit_code, signal_name)
        assert task["state"] == "done" and task["started"] <= task["ended"]

    @parametrize_rows("command, output, replaced", [
        ("invalid byte", "printf 'a\\377b'", "a\ufffdb", 1),
        ("cut at the end", "printf 'a\\303'", "a\ufffd", 1),
        ("replaced before", "printf '\\377\\357\\277\\275\\357\\277a'", "\ufffd\ufffd\ufffda", 2),
        ("control", "printf '\\000\\033\\r\\t\\177\"\\\\'", '\0\x1b\r\t\x7f"\\', 0),
        ("command not ASCII", "echo 'ž€😀'", "ž€😀\n", 0),
        ("SIGPIPE is the default", "yes | head -n 1", "y\n", 0),
        ("cut by every read", "printf '\ufffd€%.0s' $(seq 50000)", "\ufffd€" * 50000, 0),
        ("stdout and stderr come in order", "for i in $(seq 200); do echo o$i; echo e$i >&2; done",
         "".join(f"o{i}\ne{i}\n" for i in range(1, 201)), 0),
    ])  # fmt: skip
    def test_output_is_utf_8(self, server: Any, command: str, output: str, replaced: int) -> None:
        answer = server.run(command)
        assert answer["output"] == output
        assert server.get(f"/logs?id={answer['task_id']}")["logs"] == output
        task = server.task(answer["task_id"])
        assert task["output_bytes"] == len(output.encode("utf-8"))
        assert task["replaced"] == replaced

    def test_character_cut_between_two_reads_is_kept_whole(self, server: Any, gate: Gate) -> None:
        with server.websocket() as viewer:
            task_id = server.start(f"printf 'a\\303'; {gate.wait}; printf '\\251b'")
            events = receive_events(viewer, lambda event: event["type"] == "task_output")
            gate.open()
            events += receive_events(viewer, is_complete(task_id))
        mine = [event for event in events if event.get("task_id") == task_id]
        kinds = ["task_start", "task_output", "task_output", "task_complete"]
        assert [event["type"] for event in mine] == kinds
        assert [(event["offset"], event["output"]) for event in mine[1:3]] == [(0, "a"), (1, "éb")]
        assert mine[3]["output_bytes"] == 4

    @pytest.mark.parametrize("tty", [False, True], ids=["pipe", "terminal"])
    def test_background_child_neither_delays_nor_breaks(self, server, gate, tmp_path, tty: bool):
        """CASES 53; asyncio's own wait() hangs here on 3.11 to 3.13."""
        marker, armed = tmp_path / "marker", tmp_path / "armed"
        # Whoever does not ignore HUP ends with the terminal's leader, here as anywhere.
        late = f"trap '' HUP; : >{armed}; {gate.wait}; seq 20000; echo late"
        late += f"{';' if tty else ' &&'} echo alive >{marker}"
        wait = f"while ! test -e {armed}; do sleep 0.01; done"
        answer = server.run(f"({late}) & {wait}; echo hi; exit 7", tty=tty)
        assert (answer["exit_code"], answer["output"].split()) == (7, ["hi"])
        gate.open()
        wait_until(lambda: marker.exists() and marker.read_text())
        assert server.get(f"/logs?id={answer['task_id']}")["logs"] == answer["output"]

    @parametrize_rows("fields, status, code", [
        ("no such folder", {"cwd": "/nonexistent-folder"}, 400, "bad_cwd"),
        ("no folder", {"cwd": "/dev/null"}, 400, "bad_cwd"),
        ("E2BIG", {"env": {"BIG": "x" * 140000}}, 413, "too_large"),
    ])  # fmt: skip
    def test_start_that_fails(self, server: Any, fields: Any, status: int, code: str) -> None:
        before = server.get("/tasks")
        answer = server.execute("echo", **fields)
        assert (answer.status, answer.json()["error"]) == (status, code)
        assert server.get("/tasks") == before


@pytest.mark.usefixtures("tidy")
class TestTaskStop:
    """SPEC 5: kill and time-out are one function, and it leaves nothing behind."""

    DEAF = "trap '' TERM; echo ready; exec sleep 60"

    @parametrize_rows("command, signal_name", [
        ("child", "sleep 60 & echo ready; wait", "TERM"),
        ("orphan", "(sleep 60 &); echo ready; sleep 60", "TERM"),
        ("groups", "exec bash -c 'set -m; sleep 60 & sleep 60 & echo ready; wait'", "TERM"),
        ("stopped", "sleep 60 & echo ready; kill -STOP $$", "TERM"), ("deaf", DEAF, "KILL"),
        ("deaf child of a shell that dies", f"({DEAF}) & exec sleep 60", "TERM"),
        ("deaf group", f'exec bash -c "set -m; ({DEAF}) & wait"', "TERM"),
    ])  # fmt: skip
    def test_kill_takes_the_whole_tree(self, server: Any, command: str, signal_name: str) -> None:
        """CASES 54, fact 9."""
        task_id, pids = start_ready(server, command)
        with kill_at_last(pids):
            assert kill_task(server, task_id).status == 200
            task = server.wait_for_end(task_id)
            wait_for_death(pids, 20.0)
        assert (task["state"], task["signal"]) == ("killed", signal_name)
        assert task["exit_code"] == 128 + signal.Signals[f"SIG{signal_name}"]

    @parametrize_rows("command, exit_code, name, low, high", [
        ("hears", "sleep 60 & echo ready; wait", 143, "TERM", 1000, 20000),
        ("deaf", DEAF, 137, "KILL", 4000, 20000),
    ])  # fmt: skip
    def test_time_out(self, server, command: str, exit_code: int, name: str, low: int, high: int):
        with server.websocket() as viewer:
            task_id = server.start(command, timeout=1.0)
            pids = sc.find_session(server.task(task_id)["pid"])
            event = receive_events(viewer, is_complete(task_id))[-1]
        got = (event["state"], event["exit_code"], event["signal"])
        assert got == ("timeout", exit_code, name)
        assert low <= event["duration_ms"] < high
        wait_for_death(pids)

    def test_time_out_that_is_not_reached_changes_nothing(self, server: Any) -> None:
        answer = server.run("exit 4", timeout=30)
        assert (answer["exit_code"], server.task(answer["task_id"])["state"]) == (4, "done")
        assert server.run("sleep 0.1; exit 5", timeout=0)["exit_code"] == 5

    @pytest.mark.parametrize("name", ["USR1", "SIGUSR1", "usr1"])
    def test_kill_sends_the_named_signal(self, server: Any, name: str) -> None:
        trap = "trap 'echo caught; exit 9' USR1; echo ready; while :; do sleep 0.02; done"
        task_id, _ = start_ready(server, trap)
        for unknown in ("NOPE", "", "9", "TERM%00"):
            check_error(kill_task(server, task_id, unknown), 400)
        assert server.task(task_id)["state"] == "running"
        assert kill_task(server, task_id, name).status == 200
        task = server.wait_for_end(task_id)
        assert (task["state"], task["exit_code"], task["signal"]) == ("killed", 9, None)
        assert "caught" in server.get(f"/logs?id={task_id}")["logs"]

    def test_kill_of_a_finished_task_signals_nobody(self, server: Any) -> None:
        """CASES 55: its session still has a member here, which must not be touched."""
        answer = server.run("sleep 60 & echo $!")
        sleeper = int(answer["output"])
        with kill_at_last([sleeper]):
            refused = kill_task(server, answer["task_id"], "KILL")
            assert (refused.status, refused.json()["error"]) == (409, "task_ended")
            assert server.run("true")["exit_code"] == 0
            assert not sc.is_zombie(sleeper)

    def test_kills_at_once_make_one_end(self, server: Any) -> None:
        with server.websocket() as viewer:
            task_id, _ = start_ready(server, "echo ready; exec sleep 60")
            with concurrent.futures.ThreadPoolExecutor(8) as pool:
                answers = list(pool.map(lambda _: kill_task(server, task_id), range(8)))
            server.wait_for_end(task_id)
            events = receive_events(viewer, is_complete(server.run("true")["task_id"]))
        assert {answer.status for answer in answers} <= {200, 409}
        assert [e["state"] for e in events if is_complete(task_id)(e)] == ["killed"]


class Typist(contextlib.AbstractContextManager):
    """Somebody who watches one task and types into it over the same WebSocket."""

    def __init__(self, server: ServerProcess, command: str, **fields: Any) -> None:
        self.server = server
        self.stack = contextlib.ExitStack()
        self.websocket = self.stack.enter_context(server.websocket())
        self.task_id = server.start(command, **fields)
        self.text = ""
        self.end: dict[str, Any] | None = None
        self.errors: list[str] = []

    def __exit__(self, *_: Any) -> None:
        if self.end is None:
            kill_task(self.server, self.task_id, "KILL")
            self.server.wait_for_end(self.task_id)
        self.stack.close()

    def send(self, kind: str, **fields: Any) -> None:
        message = {"type": kind, "task_id": self.task_id, **fields}
        self.websocket.send(json.dumps(message))

    def type(self, data: str) -> None:
        self.send("task_input", data=data)

    def read(self) -> None:
        event = json.loads(self.websocket.recv(timeout=PATIENCE_SECONDS))
        if event["type"] == "error":
            self.errors.append(event["code"])
        if event.get("task_id") == self.task_id:
            self.text += event.get("output", "")
            if event["type"] == "task_complete":
                self.end = event

    def read_until(self, condition: Callable[[], Any]) -> Any:
        end = time.monotonic() + PATIENCE_SECONDS
        while not condition():
            assert time.monotonic() < end, (self.text, self.errors)
            self.read()
        return condition()

    def wait_for(self, pattern: str) -> re.Match[str]:
        """Read until the output has the pattern; it is searched from there on next time."""
        match = self.read_until(lambda: re.search(pattern, self.text) or self.end)
        assert match is not self.end, self.text
        self.text = self.text[match.end() :]
        return match

    def wait_for_errors(self, count: int) -> None:
        self.read_until(lambda: len(self.errors) >= count)

    def wait_for_end(self) -> dict[str, Any]:
        return self.read_until(lambda: self.end)


class TestTaskWindow:
    """SPEC 5: a task with a `window` waits for its `?follow` readers."""

    COMMAND = "yes 0123456 | head -c 30000000; echo end; exit 5"
    # What the kernel may hold between the server and a reader.
    ON_THE_WAY = 2_000_000

    @staticmethod
    def wait_for_pause(server: ServerProcess, task_id: str) -> int:
        """Return how much output there is when no more comes."""
        sizes = [-1]

        def is_still() -> bool:
            sizes.append(server.task(task_id)["output_bytes"])
            time.sleep(0.1)
            return len(sizes) > 4 and len({*sizes[-4:]}) == 1 and sizes[-1] > 0

        wait_until(is_still)
        return sizes[-1]

    @staticmethod
    @contextlib.contextmanager
    def follow(server: ServerProcess, task_id: str, offset: int) -> Iterator[Any]:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE_SECONDS)
        with contextlib.closing(connection):
            connection.connect()
            connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
            connection.request("GET", f"/logs?id={task_id}&offset={offset}&follow")
            with connection.getresponse() as answer:
                yield answer

    @pytest.mark.usefixtures("tidy")
    def test_is_read_no_further_than_taken(self, server: ServerProcess) -> None:
        """A reader that breaks off and comes back at its offset goes on."""
        free = server.start(self.COMMAND)
        task_id = server.start(self.COMMAND, window=100_000)
        got = bytearray()
        assert 50_000 < self.wait_for_pause(server, task_id) <= 100_000
        for pause in (0, 1, 5_000_000, 29_000_000):
            with self.follow(server, task_id, len(got)) as answer:
                while len(got) < pause:
                    got += answer.read(min(65536, pause - len(got)))
                end = self.wait_for_pause(server, task_id)
                assert len(got) < end <= len(got) + 100_000 + self.ON_THE_WAY
                assert server.task(task_id)["state"] == "running"
        assert server.wait_for_end(free)["exit_code"] == 5  # it waits for nobody
        with self.follow(server, task_id, len(got)) as answer:
            got += answer.read()
        ended = server.wait_for_end(task_id)
        assert (ended["exit_code"], ended["output_bytes"]) == (5, 30_000_004)
        assert got == b"0123456\n" * 3_750_000 + b"end\n"

    @pytest.mark.usefixtures("tidy")
    def test_waits_for_the_slowest(self, server: ServerProcess) -> None:
        task_id = server.start("yes", window=100_000)
        with self.follow(server, task_id, 0) as fast:
            read = threading.Thread(target=fast.read, args=[2 * self.ON_THE_WAY])
            with self.follow(server, task_id, 0):
                read.start()
                assert self.wait_for_pause(server, task_id) < 100_000 + self.ON_THE_WAY
            read.join(sc.WINDOW_SECONDS / 2)  # the slowest has gone
            assert not read.is_alive()
            assert server.end(task_id)["state"] == "killed"  # which waits for no reader

    @in_loop
    async def test_gets_its_turns_again(self) -> None:
        """Beside others that write as fast as they can: _begin_turn() passes over who waits."""
        task = sc.Task("1", sc.ExecRequest("x"), "me", sc.OutputLog(100))
        task.fd, other_end = os.pipe()
        resumed = asyncio.Event()

        def resume(task: Any) -> None:
            sc.Outputs.resume(mock.Mock(), task)
            resumed.set()

        task.set_timer("read", 0.0, resume)
        await resumed.wait()
        assert "read" not in task.timers
        asyncio.get_running_loop().remove_reader(task.fd)
        sc.close_fds((task.fd, other_end))

    def test_outlives_its_readers(self, tmp_path: Path) -> None:
        with ServerProcess(tmp_path, WINDOW_SECONDS=0.5) as server:
            task_id = server.start(self.COMMAND, window=100_000)
            assert server.wait_for_end(task_id)["output_bytes"] == 30_000_004
            task_id = server.start("yes", window=100_000)
            wait_until(lambda: server.task(task_id)["output_bytes"] > 1_000_000)
            at = server.task(task_id)["output_bytes"]
            with self.follow(server, task_id, at) as answer:  # has it wait again
                in_a_row = 0  # it does not while this reader gets no turn for WINDOW_SECONDS

                def is_held() -> bool:
                    nonlocal at, in_a_row
                    at += len(answer.read(100_000))
                    end = server.task(task_id)["output_bytes"]
                    in_a_row = in_a_row + 1 if end < at + 100_000 + self.ON_THE_WAY * 2 else 0
                    return in_a_row == 20

                wait_until(is_held)

    @pytest.mark.parametrize("option, most", [
        ("--keep-output=100000", 100_000), ("--max-tasks=1024", 65536),
    ])  # fmt: skip
    def test_is_no_larger_than_what_is_kept(self, tmp_path: Path, option: str, most: int) -> None:
        """And told so that exec keeps up, where less is granted than it asks for."""
        with ServerProcess(tmp_path, option) as server:
            task_id = server.start(self.COMMAND, window=10**9)
            assert self.wait_for_pause(server, task_id) <= most
            assert 0 < server.execute("true", window=10**9).json()["window"] < 100_000
            assert "window" not in server.execute("true").json()
            finished = run_client("exec", server.place, "--", self.COMMAND)
            assert (finished.returncode, len(finished.stdout)) == (5, 30_000_004)

    @in_loop
    async def test_is_kept_with_what_was_read_at_the_end(self) -> None:
        tasks = [sc.Task("1", sc.ExecRequest("x"), "", sc.OutputLog(8 << 20)) for _ in range(9)]
        ended, *running = tasks
        ended.window = 100_000
        outputs = sc.Outputs(mock.Mock(), mock.Mock(), dict(enumerate(running)), [ended])
        outputs._take(ended, b"x" * 1_000_000)
        for task in running:
            outputs._take(task, b"x" * (8 << 20))
        assert ended.output.kept_bytes == 100_000 + sc.READ_CHUNK_BYTES
        assert outputs.kept_bytes == sc.KEEP_ALL_OUTPUT_BYTES

    def test_is_kept_whole_of_as_many_as_may_run(self, tmp_path: Path) -> None:
        """Each beyond its window by another part of a read."""
        with ServerProcess(tmp_path) as server:
            command = "yes | head -c $((1000 * SERVERCONTROL_TASK_ID)); sleep 0.1; yes"
            task_ids = [server.start(command, window=10**9) for _ in range(64)]
            wait_until(lambda: all(t["output_bytes"] > 900_000 for t in server.get("/tasks")))
            for task_id in task_ids:
                answer = server.request("GET", f"/logs?id={task_id}&raw&offset=0")
                assert answer.headers["x-offset"] == "0"


class TestTaskInput:
    """SPEC 3 and 5: standard input, as text or kept open."""

    @cases(
        ("nothing", ""), ("a letter", "a"), ("no newline", "no newline"), ("controls", "\0\x1b\r\n"),
        ("not ASCII", "z\u00e9\u20ac\U0001f600\n"), ("long", "line\n" * 40000),
    )  # fmt: skip
    def test_text_is_read_whole_and_ends(self, server: ServerProcess, text: str) -> None:
        assert server.run("cat", stdin=text)["output"] == text

    def test_text_that_nobody_reads_is_no_failure(self, server: ServerProcess) -> None:
        assert server.run("exec <&-; echo ok", stdin="x" * 200000)["output"] == "ok\n"
        assert server.run("head -c 3", stdin="abcdef" * 30000)["output"] == "abc"

    def test_input_comes_later_by_both_ways(self, server: ServerProcess) -> None:
        with Typist(server, "cat; echo end; sleep 60", stdin=True) as typist:
            typist.type("by socket\n")
            typist.wait_for("by socket\n")
            path = f"/stdin?id={typist.task_id}"
            answer = server.request("POST", path, b"\xe2\x82", Content_Type="text/plain")
            assert answer.json() == {"task_id": typist.task_id, "bytes": 2}
            assert server.request("POST", path + "&eof", b"\xac.\n").status == 200
            typist.wait_for("^\u20ac\\.\nend\n")
            for code in ("no_input", "task_ended"):  # the end is final
                answer = server.request("POST", path, b"late")
                assert (answer.status, answer.json()["error"]) == (409, code)
                kill_task(server, typist.task_id)
                typist.wait_for_end()

    def test_input_that_is_not_read_waits_up_to_a_limit(self, server: Any, gate: Gate) -> None:
        with Typist(server, f"{gate.wait}; wc -c", stdin=True) as typist:
            path, body = f"/stdin?id={typist.task_id}", b"x" * 250_000
            statuses = [server.request("POST", path, body).status for _ in range(10)]
            taken = statuses.count(200)
            assert 4 <= taken <= 5 and statuses == [200] * taken + [429] * (10 - taken)
            assert server.run("echo other")["output"] == "other\n"
            gate.open()
            wait_until(lambda: server.request("POST", path).status == 200)
            server.request("POST", path + "&eof")
            assert int(typist.wait_for(r"(\d+)\n").group(1)) == taken * len(body)

    @pytest.mark.parametrize("fields", [{}, {"stdin": False}], ids=["absent", "false"])
    def test_no_input_unless_asked_for(self, server: ServerProcess, fields: Any) -> None:
        assert server.run("cat; readlink /proc/self/fd/0", **fields)["output"] == "/dev/null\n"
        with Typist(server, "sleep 60", **fields) as typist:
            typist.type("x")
            typist.send("task_resize", cols=80, rows=24)
            typist.wait_for_errors(2)
            assert typist.errors == ["no_input"] * 2
            answer = server.request("POST", f"/stdin?id={typist.task_id}", b"x")
            assert (answer.status, answer.json()["error"]) == (409, "no_input")

    def test_refused_messages(self, server: ServerProcess) -> None:
        with Typist(server, "cat", stdin=True) as typist:
            typist.send("task_resize", cols=80, rows=24)  # there is no terminal
            typist.send("task_input")
            typist.send("task_input", data=5)
            for cols in (0, True, "80", 10000, None):
                typist.send("task_resize", cols=cols, rows=24)
            typist.wait_for_errors(8)
            assert typist.errors == ["no_terminal", *["bad_field"] * 7]
            assert server.request("POST", "/stdin?id=999999", b"x").status == 404
            assert server.request("GET", f"/stdin?id={typist.task_id}").status == 405


@pytest.mark.usefixtures("tidy")
class TestTerminal:
    """SPEC 5: `tty`, a task in a pseudo-terminal of its own."""

    def test_terminal_is_one(self, server: ServerProcess) -> None:
        command = "for n in 0 1 2; do test -t $n && echo $n; done; echo $TERM; stty size; stty -a"
        output = server.run(command, tty=True)["output"]
        assert output.startswith("0\r\n1\r\n2\r\nxterm-256color\r\n24 80\r\n")
        assert "iutf8" in output and "-iutf8" not in output
        assert "50 132\r\n" in server.run("stty size", tty=True, cols=132, rows=50)["output"]
        assert server.run("echo x >/dev/tty", tty=True)["output"] == "x\r\n"

    def test_size_of_the_starters_terminal_is_not_inherited(self, tmp_path: Path) -> None:
        env = {"COLUMNS": "7", "LINES": "8", "TERM": "vt52"}
        command = "echo $COLUMNS $LINES $TERM."
        with ServerProcess(tmp_path, env=env) as server:
            assert server.run(command, tty=True)["output"] == "xterm-256color.\r\n"
            assert server.run(command)["output"] == "7 8 vt52.\n"
            given = {"TERM": "dumb", "LINES": "9"}
            assert server.run(command, tty=True, env=given)["output"] == "9 dumb.\r\n"

    def test_all_output_comes_before_the_end(self, server: ServerProcess) -> None:
        expected = "".join(f"{n}\r\n" for n in range(1, 100001))
        for _ in range(3):
            answer = server.run("seq 1 100000", tty=True)
            assert (answer["output"], answer["exit_code"]) == (expected, 0)
        with concurrent.futures.ThreadPoolExecutor(20) as pool:
            answers = pool.map(lambda n: server.run(f"echo {n}; exit {n}", tty=True), range(60))
            outputs = [answer["output"] for answer in answers]
        assert outputs == [f"{number}\r\n" for number in range(60)]

    def test_keys_do_what_they_do_in_a_terminal(self, server: ServerProcess) -> None:
        with Typist(server, "trap 'echo got INT' INT; cat; cat; echo end", tty=True) as typist:
            typist.type("one\n")
            typist.wait_for("one\r\none\r\n")
            typist.type("\x03")
            typist.wait_for(r"\^Cgot INT\r\n")
            typist.type("tw\u00e9\x7f\x7fwo\n")  # backspace takes whole characters
            typist.wait_for("\ntwo\r\n")
            typist.type("\x04")
            typist.wait_for("end\r\n")
            assert typist.wait_for_end()["exit_code"] == 0

    def test_size_is_known_to_everybody(self, server: ServerProcess) -> None:
        with Typist(server, "cat", tty=True, cols=100, rows=30) as typist:
            task = server.task(typist.task_id)
            assert (task["tty"], task["cols"], task["rows"]) == (True, 100, 30)
            for cols in (120, 120, 90):  # a size that is not new is no event
                typist.send("task_resize", cols=cols, rows=40)
            events = receive_events(typist.websocket, lambda event: event.get("cols") == 90)
            typist.send("hello")
            hello = receive_events(typist.websocket, is_type("hello"))[-1]
        assert [event["tty"] for event in events if event["type"] == "task_start"] == [True]
        sizes = [(e["type"], e["cols"], e["rows"]) for e in events if "cols" in e]
        assert sizes == [("task_start", 100, 30), ("task_resize", 120, 40), ("task_resize", 90, 40)]
        check_event(events[-1])
        assert [(task["cols"], task["rows"]) for task in hello["tasks"]] == [(90, 40)]

    def test_question_is_answered_once(self, server: ServerProcess) -> None:
        """By the one who typed last; before that, and when that one has gone, by the starter."""
        with Typist(server, "stty raw -echo; echo ready; cat", tty=True, ref="mine") as starter:
            starter.wait_for("ready")

            def answer(websocket: Any, data: str, **fields: Any) -> None:
                message = {"type": "task_input", "task_id": starter.task_id, "data": data, **fields}
                websocket.send(json.dumps(message))
                websocket.send('{"type":"ping"}')
                receive_events(websocket, is_type("pong"))  # it has been carried out

            with server.websocket() as other:
                answer(other, "A", automatic=True)
                answer(other, "B", automatic=True, ref="theirs")
                answer(starter.websocket, "c", automatic=True, ref="mine")
                answer(other, "d")
                answer(starter.websocket, "E", automatic=True, ref="mine")
                answer(other, "f", automatic=True)
                server.request("POST", f"/stdin?id={starter.task_id}", b"g")
                answer(other, "H", automatic=True)
                answer(other, "i", automatic=False)
            wait_until(lambda: server.get("/info")["clients"] == 1)
            answer(starter.websocket, "j", automatic=True, ref="mine")
            answer(starter.websocket, "K", automatic="yes")
            answer(starter.websocket, "l")
            wait_until(lambda: "l" in server.get(f"/logs?id={starter.task_id}")["logs"][6:])
            assert server.get(f"/logs?id={starter.task_id}")["logs"][6:] == "cdfgijl"

    def test_again_is_the_same(self, server: ServerProcess) -> None:
        given: Any = {"env": {"SECRET": "s3"}, "stdin": "typed\n", "name": "build", "cwd": "/usr"}
        old = server.run("echo $SECRET; pwd; cat", timeout=70, **given)
        answer = server.request("POST", f"/exec?again={old['task_id']}&ref=r&wait", b"{}").json()
        assert answer["output"] == old["output"] == "s3\n/usr\ntyped\n"
        assert answer["task_id"] != old["task_id"]
        assert server.task(answer["task_id"])["name"] == "build" and "not_repeated" not in answer
        twice = server.request("POST", f"/exec?again={old['task_id']}&ref=r&wait").json()
        assert twice["task_id"] == answer["task_id"]
        twice = [server.request("POST", "/exec?ref=q&wait", b"echo q").json() for _ in range(2)]
        assert twice[0] == twice[1]
        slow = server.run("sleep 60", timeout=0.3)
        answer = server.request("POST", f"/exec?again={slow['task_id']}&wait").json()
        assert answer["state"] == "timeout"
        with Typist(server, "cat", stdin=True) as typist:
            again = server.request("POST", f"/exec?again={typist.task_id}").json()
            assert again["not_repeated"] == ["stdin"]
            kill_task(server, again["task_id"], "KILL")
        for target, body in (
            ("again=1x", b""), ("again=999999", b""), (f"again={old['task_id']}", b"ls"),
        ):  # fmt: skip
            assert server.request("POST", f"/exec?{target}", body).status in (400, 404), target

    def test_end_is_typed_as_control_d(self, server: ServerProcess) -> None:
        with Typist(server, "cat; echo end", tty=True, stdin="given\n") as typist:
            typist.wait_for("given\r\ngiven\r\n")
            assert server.request("POST", f"/stdin?id={typist.task_id}&eof").status == 200
            typist.wait_for("end\r\n")

    def test_new_size_arrives(self, server: ServerProcess) -> None:
        trap = "trap 'stty size' WINCH; echo ready; while :; do sleep 0.02; done"
        with Typist(server, trap, tty=True) as typist:
            typist.wait_for("ready")
            for cols, rows in ((100, 30), (1, 1), (9999, 9999)):
                typist.send("task_resize", cols=cols, rows=rows)
                typist.wait_for(f"{rows} {cols}\r\n")
            assert typist.errors == []
            path = f"/resize?id={typist.task_id}&cols=77&rows="
            assert server.request("POST", path + "22").json()["rows"] == 22
            typist.wait_for("22 77\r\n")
            for rows in ("", "0", "10000", "1.0", "x"):
                check_error(server.request("POST", path + rows), 400)

    def test_kill_hangs_up(self, server: ServerProcess) -> None:
        with Typist(server, "exec bash --norc -i", tty=True) as typist:
            assert "no job control" not in typist.wait_for(r"[$#]").string
            typist.type("sleep 62 & sleep 63\n")
            pid = server.task(typist.task_id)["pid"]

            def read_names() -> list[str]:
                with contextlib.suppress(OSError):  # one has ended meanwhile
                    return sorted(Path(f"/proc/{p}/comm").read_text() for p in sc.find_session(pid))
                return []

            # Until they are `sleep` they are the shell still, which is deaf for TERM.
            wait_until(lambda: read_names() == ["bash\n", "sleep\n", "sleep\n"])
            pids = sc.find_session(pid)
            with kill_at_last(pids):
                assert kill_task(server, typist.task_id).status == 200
                end = typist.wait_for_end()
                wait_for_death(pids)
            assert end["state"] == "killed" and end["duration_ms"] < 60_000
            # An interactive shell is deaf for TERM: without the hang-up it would take the KILL.
            assert end["signal"] != "KILL"

    def test_hang_up_that_is_overlooked_comes_again(self, server: ServerProcess) -> None:
        """bash 5.2 and 5.3 wait for a key with the signal noted, if it came just before the prompt."""
        command = "trap '' TERM; trap 'trap - HUP' HUP; echo ready; while :; do sleep 0.01; done"
        with Typist(server, command, tty=True) as typist:
            typist.wait_for("ready")
            assert kill_task(server, typist.task_id).status == 200
            assert typist.wait_for_end()["signal"] == "HUP"

    def test_terminal_that_is_left_for_a_while(self, server: ServerProcess) -> None:
        command = "exec 3</dev/null; exec <&3 >&3 2>&3; sleep 0.5; echo back >/dev/tty; exit 4"
        answer = server.run(command, tty=True)
        assert (answer["output"], answer["exit_code"]) == ("back\r\n", 4)


class TestTaskLimits:
    """SPEC 5 and 9: options of tasks, and starters that leave much out."""

    def test_output_of_all_tasks_is_bounded(self, tmp_path: Path) -> None:
        with ServerProcess(tmp_path, "--keep-output=40M", "--max-tasks=2") as server:
            fill = "head -c 30000000 /dev/zero | tr '\\0' x"
            ids = [server.finish(fill, window=window) for window in (30_000_000, 0, 0)]
            dropped = [server.get(f"/logs?id={i}&offset=30000000")["dropped"] for i in ids]
            assert dropped == [0, 90000000 - 64 * sc.MIB, 0]

    @pytest.mark.parametrize("becomes", ["/nonexistent/sh", "/dev/null", "/"])
    def test_missing_shell_fails_that_task_only(self, tmp_path: Path, becomes: str) -> None:
        """CASES 62. The shell is there when the server starts, and is gone later."""
        shell = tmp_path / "shell"
        shell.symlink_to("/bin/sh")
        with ServerProcess(tmp_path, f"--shell={os.path.relpath(shell)}") as server:
            assert server.run("exit 3", cwd="/")["exit_code"] == 3
            shell.unlink()
            shell.symlink_to(becomes)
            before = server.descriptors()
            for cwd in ({}, {"cwd": str(tmp_path)}):
                answer = server.execute("echo", **cwd)
                assert (answer.status, answer.json()["error"]) == (500, "spawn_failed")
            assert len(server.get("/tasks")) == 1
            wait_until(lambda: server.descriptors() <= before and not child_pids(server.pid))

    def test_working_folder_deleted(self, tmp_path: Path) -> None:
        """CASES 62."""
        folder = tmp_path / "folder"
        folder.mkdir()
        with ServerProcess(tmp_path, cwd=str(folder)) as server:
            folder.rmdir()
            assert server.run("echo hi")["output"].endswith("hi\n")  # dash complains first
            assert server.run("pwd", cwd="/")["output"] == "/\n"
            answer = server.execute("pwd", cwd="sub")
            assert (answer.status, answer.json()["error"]) == (400, "bad_cwd")

    def test_nothing_set(self, tmp_path: Path) -> None:
        """CASES 62: no HOME, no PATH."""
        state = f"XDG_STATE_HOME={tmp_path}"
        with ServerProcess(tmp_path, prefix=("/usr/bin/env", "-i", state)) as server:
            lines = server.run("/usr/bin/env")["output"].split("\n")[:-1]
            names = {line.partition("=")[0] for line in lines} - TestTaskProcess.SHELL_NAMES
            assert names == {"XDG_STATE_HOME", "PYTHONUNBUFFERED", "SERVERCONTROL_TASK_ID"}

    def test_commands_are_utf_8_whatever_the_locale(self, tmp_path: Path) -> None:
        folder = tmp_path / "ž"
        folder.mkdir()
        env = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
        with ServerProcess(tmp_path, env=env) as server:
            answer = server.run("echo 'ž€' \"$ADDED\"; pwd", cwd=str(folder), env={"ADDED": "ä"})
            assert answer["output"] == f"ž€ ä\n{folder}\n"

    def test_descriptor_limit_of_children_is_the_starters(self, tmp_path: Path) -> None:
        def lower() -> None:
            resource.setrlimit(resource.RLIMIT_NOFILE, (256, 512))

        with ServerProcess(tmp_path, preexec_fn=lower) as server:
            assert resource.prlimit(server.pid, resource.RLIMIT_NOFILE) == (512, 512)
            outputs = {server.run("ulimit -Sn; ulimit -Hn")["output"] for _ in range(50)}
            assert outputs == {"256\n512\n"}


class TestFaults:
    """SPEC 9: what the machine refuses fails for that one task, and leaves nothing behind."""

    CODE = """
import errno, os, subprocess, termios
flag = os.environ["FLAG"]
def fail_when_told(function):
    def call(*arguments, **fields):
        kind = open(flag).read() if os.path.exists(flag) else ""
        if kind == "MEMORY":
            raise MemoryError
        if kind:
            raise OSError(getattr(errno, kind), os.strerror(getattr(errno, kind)))
        return function(*arguments, **fields)
    return call
owner, name = {owner}, "{name}"
setattr(owner, name, fail_when_told(getattr(owner, name)))
"""

    @pytest.mark.parametrize("loop", loops())
    @parametrize_rows("owner, name, tty, kind, status", [
        ("fork, no process", "subprocess", "Popen", False, "EAGAIN", 503),
        ("fork, no memory", "subprocess", "Popen", True, "ENOMEM", 503),
        ("fork, our own memory", "subprocess", "Popen", False, "MEMORY", 500),
        ("no pipe", "os", "pipe", False, "EMFILE", 503),
        ("no terminal", "os", "openpty", True, "ENOSPC", 503),
        ("no terminal left", "os", "dup", True, "EMFILE", 503),
        ("terminal fails", "termios", "tcgetattr", True, "EIO", 500),
    ])  # fmt: skip
    def test_task_that_cannot_start(self, tmp_path, loop, owner, name, tty, kind, status):
        flag = tmp_path / "flag"
        more = {"code": self.CODE.format(owner=owner, name=name), "env": {"FLAG": str(flag)}}
        with ServerProcess(tmp_path, f"--loop={loop}", **more) as server:
            assert server.run("echo before", tty=tty)["output"].strip() == "before"
            tasks = server.get("/tasks")
            wait_until(lambda: not child_pids(server.pid))
            before = server.descriptors()
            flag.write_text(kind)
            for _ in range(5):
                check_error(server.execute("echo no", tty=tty), status)
            flag.unlink()
            assert server.get("/tasks") == tasks
            wait_until(lambda: server.descriptors() <= before and not child_pids(server.pid))
            assert server.run("echo after", tty=tty)["output"].strip() == "after"
            server.check = kind != "MEMORY"  # that one is a bug's way, and is logged as such


class TestState:
    """SPEC 1, 5: the state folder, and ids that rise for ever."""

    def test_folder_without_xdg_is_in_the_home(self, tmp_path: Path) -> None:
        env = {"HOME": str(tmp_path), "XDG_STATE_HOME": "relative/is/ignored"}
        with ServerProcess(tmp_path, env=env, cwd=str(tmp_path)):
            assert [path.name for path in tmp_path.iterdir()] == [".local"]
            assert (tmp_path / ".local/state/servercontrol").is_dir()

    def test_ids_rise_and_tokens_stay_across_a_stop_and_a_kill(self, tmp_path: Path) -> None:
        """CASES 81; an id of an earlier run is 404, never another task."""
        with ServerProcess(tmp_path) as server:
            ids = [server.run("true")["task_id"] for _ in range(3)]
        tokens = TestTokenFiles.read_tokens(tmp_path)
        shown = bearer(tokens[0].strip())
        with ServerProcess(tmp_path) as server:
            ids.append(server.run("true")["task_id"])
            assert ask(server, make_request("GET /tasks", shown)).status == 200
            assert server.request("GET", f"/tasks?id={ids[0]}").status == 404
            orphan = server.task(server.start("exec sleep 60"))["pid"]
            idle = server.connect()
            server.kill()
        with idle, kill_at_last([orphan]):
            with ServerProcess(tmp_path, f"--port={server.port}") as again:
                assert again.port == server.port and not again.log("port_busy")
                assert f"kill {orphan}" in again.log("crash_completed")[0]["message"]
                ends = read_audit(state_file(again, "audit.log"), "task_complete")
                assert [one["pids"] for one in ends if "pids" in one] == [[orphan]]
                ids.append(again.run("true")["task_id"])
                assert again.request("GET", f"/logs?id={ids[3]}").status == 404
                assert kill_task(again, ids[3]).status == 404
                assert ask(again, make_request("GET /tasks", shown)).status == 200
        assert TestTokenFiles.read_tokens(tmp_path) == tokens
        assert all(task_id.isdigit() for task_id in ids)
        assert sorted(set(ids), key=int) == ids
        assert int(ids[3]) == int(ids[2]) + 1  # no number is skipped, except after a crash

    def test_ids_rise_whatever_becomes_of_their_file(self, tmp_path: Path) -> None:
        ids, path = sc.TaskIds(str(tmp_path), sc.Log("json", "error")), tmp_path / "last-task-id"
        taken = [int(ids.take()), int(ids.take())]
        path.unlink()
        taken.append(int(ids.take()))
        path.rename(tmp_path / "aside")
        path.mkdir()  # as if descriptors were used up
        taken.append(int(ids.take()))
        path.rmdir()
        with mock.patch.object(sc.os, "pwrite", side_effect=OSError(errno.ENOSPC, "full")):
            taken.append(int(ids.take()))
        taken += [int(ids.take()), int(sc.TaskIds(str(tmp_path), sc.Log("json", "error")).take())]
        assert taken == sorted(set(taken)) and taken[:3] == [1, 2, 3], taken

    @pytest.mark.parametrize("damage", ["x", "-5\n", "1\0", "9" * 30])
    def test_damaged_id_file_is_no_way_back(self, tmp_path: Path, damage: str) -> None:
        log = sc.Log("json", "error")
        ids = [int(sc.TaskIds(str(tmp_path), log).take())]
        (tmp_path / "last-task-id").write_text(damage)
        with mock.patch.object(sc.time, "time", lambda: 2e9):
            ids += [int(sc.TaskIds(str(tmp_path), log).take()) for _ in range(2)]
        assert sorted(set(ids)) == ids

    @parametrize_rows("command", [
        ("dangling link", "ln -s nowhere servercontrol"),
        ("id file is a folder", "mkdir -p servercontrol/last-task-id"),
        ("not ours", f"mkdir servercontrol; chown {NOBODY} servercontrol"),
    ])  # fmt: skip
    def test_unusable_folder_is_a_warning(self, tmp_path: Path, command: str) -> None:
        run_shell(tmp_path, command)
        ids = []
        for _ in range(2):
            with ServerProcess(tmp_path) as server:
                ids += [int(server.run("true")["task_id"]) for _ in range(2)]
                told = wait_until(lambda: [r for r in server.records if r["level"] == "warning"])
            assert ("HOME" in told[0].get("message", "")) == ("last-task-id" not in command)
        assert sorted(set(ids)) == ids


class TestTokenFiles:
    """SPEC 4: the tokens in the state folder, and files that are refused."""

    @staticmethod
    def read_tokens(state: Path) -> list[str]:
        return [(state / "servercontrol" / name).read_text() for name in ("token", "view-token")]

    @pytest.mark.parametrize("umask, is_there", [(0, False), (0, True), (0o777, False)])
    def test_first_start_makes_private_files(self, tmp_path: Path, umask: int, is_there: bool):
        folder = tmp_path / "servercontrol"
        if is_there:
            folder.mkdir(mode=0o755)
        with ServerProcess(tmp_path, preexec_fn=lambda: os.umask(umask)) as server:
            server.run("true")
            assert stat.S_IMODE(folder.stat().st_mode) == 0o700
            files = {path.name: path.stat() for path in folder.iterdir()}
            assert {stat.S_IMODE(one.st_mode) for one in files.values()} == {0o600}
            assert (files["token"].st_nlink, files["view-token"].st_nlink) == (1, 1)
            run, view = self.read_tokens(tmp_path)
            assert run != view and re.fullmatch(r"[\w-]{43}\n", run, re.ASCII)
            for token, role in ((run, "run"), (view, "view")):
                data = make_request("GET /info", bearer(token.strip()))
                assert ask(server, data).json()["role"] == role
            check_answer(server, 401, "GET /info", bearer("x" * 43))  # CASES 46: no falling back
            (listening,) = server.log("listening")
            assert listening["token_file"] == str(folder / "token")
            assert listening["view_token_file"] == str(folder / "view-token")
            check_nowhere(server, run.strip(), view.strip())
            shown = f"umask; ls {shlex.quote(str(folder))}"
            output = server.run(shown)["output"]
            assert output.startswith(f"{umask:04o}\n")  # the task's is as it was

    @parametrize_rows("becomes", [
        *((mode, f"chmod {mode} $0") for mode in ("644", "640", "610", "601")),
        ("other account", f"chown {NOBODY} $0"), ("symlink", "mv $0 real; ln -s real $0"),
        ("FIFO", "rm $0; mkfifo -m 600 $0"), ("folder", "rm $0; mkdir -m 700 $0"),
        ("short", "printf '%015d\\n' 0 >$0"),
    ])  # fmt: skip
    @pytest.mark.parametrize("name", ["token", "view-token"])
    def test_file_that_may_be_known_is_refused(self, tmp_path: Path, becomes: str, name: str):
        path, option = tmp_path / name, f"--{name}-file"
        path.write_text("t" * 43)
        path.chmod(0o600)
        run_shell(tmp_path, becomes, name)
        state = tmp_path / "state"
        state.mkdir()
        check_refusal(state, 2, [option], *ANY_PORTS, f"{option}={path}")
        if "644" in becomes:  # the same in the state folder
            folder = state / "servercontrol"
            os.replace(path, folder / name)
            check_refusal(state, 2, [str(folder / name), "chmod 600"], *ANY_PORTS)

    def test_network_bind_without_a_place_for_tokens_is_refused(self, tmp_path: Path) -> None:
        """Else nobody could get in, or everybody."""
        (tmp_path / "servercontrol").write_text("no folder")
        for option in (NETWORK_BIND, "--require-token"):
            options = (option, *ANY_PORTS, "--log-level=error")
            check_refusal(tmp_path, 2, ["--token-file"], *options, files=("servercontrol",))

    def test_terminal_shows_what_it_can(self, tmp_path: Path) -> None:
        """Whatever its encoding; and no command where nothing may be run."""
        folder = tmp_path / "\xe4"
        folder.mkdir()
        with mock.patch.dict(os.environ, PYTHONIOENCODING="ascii"):
            with Terminal(folder, "--no-exec") as terminal:
                terminal.read_until("Ctrl-C")
                assert "curl" not in terminal.text and "\xe4/" in terminal.text

    @pytest.mark.parametrize("option", [NETWORK_BIND, "--require-token", "--no-discovery"])
    def test_terminal_shows_the_token_where_it_is_needed(self, tmp_path: Path, option: str) -> None:
        with Terminal(tmp_path, option) as terminal:
            terminal.read_until(r"Ctrl-C")
            run, view = (token.strip() for token in self.read_tokens(tmp_path))
            host = socket.gethostname() if option == NETWORK_BIND else "127.0.0.1"
            link = f"http://{host}:{terminal.port}/#token={run}\r\n"
            log, banner = terminal.text.split("\r\nServerControl ")
            if option == "--no-discovery":
                ws_url = terminal.read_until(r'"ws":"(ws://127\.0\.0\.1:\d+)"').group(1)
                url = f"http://127.0.0.1:{terminal.port}"
                for part in (f"{url}/\r\n", f"{url}/exec", "curl -d", ws_url, "this account"):
                    assert part in banner
                assert run not in banner
            else:
                assert link in banner
            assert view not in terminal.text
            assert run not in log  # nor in the log on the same terminal


# Audit log -----------------------------------------------------------------------------------

FIRST_PREV = "0" * 64


def hash_text(line: bytes) -> str:
    return hashlib.sha256(line).hexdigest()


def verify(*files: Path) -> tuple[int, str]:
    """Return the exit status of verify-audit and what it prints."""
    with mock.patch.object(sc, "write_output") as write:
        status = sc.verify_audit([str(file) for file in files])
    return status, b"".join(call.args[0] for call in write.mock_calls).decode()


def write_chain(path: Path, count: int, start: int = 1) -> list[bytes]:
    audit = sc.AuditLog(str(path), "b" * 16, sc.Log("json", "error"))
    for number in range(start, start + count):
        audit.write("task_start", task_id=str(number), command="true")
    assert audit.errors == 0
    return path.read_bytes().splitlines()


class TestAuditChain:
    """SPEC 7: the chain of hashes, and what verify-audit says of it."""

    def test_each_line_names_the_hash_of_the_one_before(self, tmp_path: Path) -> None:
        path = tmp_path / "audit.log"
        lines = write_chain(path, 3) and write_chain(path, 2, start=4)
        prevs = [FIRST_PREV, *map(hash_text, lines)]
        assert [json.loads(line)["prev"] for line in lines] == prevs[:-1]
        assert Path(f"{path}.head").read_text() == prevs[-1] + "\n"
        for file in (path, Path(f"{path}.head")):
            assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert verify(path) == (0, f"{path}: 5 lines; the chain holds\n")

    def test_long_line_is_hashed_whole(self, tmp_path: Path) -> None:
        """Also where somebody else goes on from it, who reads the end of the file alone."""
        path = tmp_path / "audit.log"
        controls = '\x01\x1b[2J\r\n\t\x7f\x9b\u2028\x85é€😀"\\' * 3000
        commands = [*("x" * size for size in (3_900, 65_536, 300_000)), controls]
        for command in commands:
            audit = sc.AuditLog(str(path), "b" * 16, sc.Log("json", "error"))
            audit.write("task_start", task_id="1", command=command)
        assert [record["command"] for record in read_audit(path)] == commands
        write_chain(path, 1)
        assert verify(path) == (0, f"{path}: 5 lines; the chain holds\n")

    @parametrize_rows("damage, number", [
        ("nothing", lambda lines: lines, None),
        ("changed", lambda lines: [*lines[:2], lines[2].replace(b"true", b"evil"), *lines[3:]], 4),
        ("first changed", lambda lines: [lines[0].replace(b"true", b"evil"), *lines[1:]], 2),
        ("last changed", lambda lines: [*lines[:-1], lines[-1].replace(b"true", b"false")], 6),
        ("removed", lambda lines: lines[:2] + lines[3:], 3),
        ("inserted", lambda lines: lines[:3] + lines[2:], 4),
        ("noise inserted", lambda lines: [*lines[:3], b"noise", *lines[3:]], 5),
        ("swapped", lambda lines: [*lines[:2], lines[3], lines[2], *lines[4:]], 3),
        ("end cut off", lambda lines: lines[:-1], 5),
        ("all but one cut off", lambda lines: lines[:1], 1), ("all cut off", lambda lines: [], 0),
        ("space added", lambda lines: [*lines[:2], lines[2] + b" ", *lines[3:]], 4),
        ("no prev", lambda lines: [*lines[:2], b'{"time":"x"}', *lines[3:]], 4),
    ])  # fmt: skip
    def test_break_is_found_where_it_is(self, tmp_path: Path, damage: Any, number: Any) -> None:
        path = tmp_path / "audit.log"
        lines = damage(write_chain(path, 6))
        path.write_bytes(b"".join(line + b"\n" for line in lines))
        status, told = verify(path)
        if number is None:
            assert (status, told.count("\n")) == (0, 1) and "BROKEN" not in told
            return
        assert status == 1 and f"{len(lines)} lines; the chain is BROKEN" in told
        problems = [line for line in told.splitlines() if "not a whole record" not in line][:-1]
        assert problems[0].startswith(f"{path}: line {number} "), told

    def test_line_changed_while_it_is_the_last_is_found(self, tmp_path: Path) -> None:
        """The next record names what was written, not what stands there now."""
        path = tmp_path / "audit.log"
        audit = sc.AuditLog(str(path), "b" * 16, sc.Log("json", "error"))
        audit.write("task_start", task_id="1", command="rm -rf /")
        path.write_bytes(path.read_bytes().replace(b"rm -rf /", b"ls -al /"))
        audit.write("task_start", task_id="2", command="true")
        status, told = verify(path)
        assert status == 1 and f"{path}: line 2 " in told, told

    def test_rotated_files_are_one_chain(self, tmp_path: Path) -> None:
        path, old, older = (tmp_path / name for name in ("audit.log", "audit.1", "audit.2"))
        audit = sc.AuditLog(str(path), "b" * 16, sc.Log("json", "error"))
        for rotated in (older, old, path):
            if rotated is path:  # and a restart between
                audit = sc.AuditLog(str(path), "b" * 16, sc.Log("json", "error"))
            for number in range(3):
                audit.write("task_start", task_id=str(number))
            if rotated is not path:
                path.rename(rotated)
        status, told = verify(older, old, path)
        assert status == 0 and told.count("the chain holds") == 3
        assert told.count("goes on from an older file") == 2
        assert verify(older, path)[0] == verify(old, older, path)[0] == 1
        assert verify(path)[0] == verify(old)[0] == 0
        lines = old.read_bytes().splitlines(keepends=True)
        old.write_bytes(b"".join(lines[:-1]))  # the end of a rotated file is missing
        status, told = verify(older, old, path)
        assert status == 1 and f"{path}: line 1 does not follow" in told
        changed = lines[0].replace(b"task_start", b"task_kill"), *lines[1:]
        old.write_bytes(b"".join(changed))  # and one in its middle is another
        status, told = verify(older, old, path)
        assert status == 1 and f"{old}: line 2 does not follow" in told
        assert told.count("BROKEN") == 1 and told.endswith("older file\n")

    def test_rotation_between_open_and_lock_is_seen(self, tmp_path: Path) -> None:
        path, old, lock = tmp_path / "audit.log", tmp_path / "audit.1", sc.lock_file
        write_chain(path, 2)

        def rotate_and_lock(*arguments: Any) -> None:
            if not old.exists():
                path.rename(old)
            lock(*arguments)

        with mock.patch.object(sc, "lock_file", rotate_and_lock):
            assert len(write_chain(path, 1, start=3)) == 1
        assert len(old.read_bytes().splitlines()) == 2
        assert verify(old, path)[0] == 0

    def test_run_without_a_free_descriptor_has_not_crashed(self, tmp_path, monkeypatch):
        monkeypatch.setattr(os, "dup", mock.Mock(side_effect=OSError(errno.EMFILE, "")))
        sc.mark_run(str(tmp_path), "0" * 16, "none")
        with contextlib.ExitStack() as held:
            assert sc.find_crashed_runs(str(tmp_path), "none", held) == {}
        monkeypatch.setattr(fcntl, "flock", mock.Mock(side_effect=OSError(errno.ENOLCK, "")))
        sc.complete_crashed_runs(str(tmp_path), mock.Mock(path="none"), log := mock.Mock())
        assert log.write.call_args[0] == ("warning", "crash_not_completed")  # it is unknown

    def test_crash_is_completed_once_there_is_room(self, tmp_path: Path) -> None:
        path, log = tmp_path / "audit.log", sc.Log("json", "error")
        sc.AuditLog(str(path), "b" * 16, log).write("task_start", task_id="1", pid=os.getpid())
        (tmp_path / f"run-{'b' * 16}").write_text(str(path))
        full = mock.patch.object(os, "write", side_effect=OSError(errno.ENOSPC, ""))
        for is_full in (True, False, False):
            audit = sc.AuditLog(str(path), "c" * 16, log)
            with full if is_full else contextlib.nullcontext():
                sc.complete_crashed_runs(str(tmp_path), audit, log)
            assert len(read_audit(path, "task_complete")) == (not is_full)

    def test_half_line_is_noted_and_holds(self, tmp_path: Path) -> None:
        path = tmp_path / "audit.log"
        write_chain(path, 2)
        for half in (b'{"time":"half', b"\xff\xfe\0", b"{}"):
            with path.open("ab") as file:
                file.write(half)
            lines = write_chain(path, 2)
            assert lines[-3] == half and json.loads(lines[-2])["prev"] == hash_text(half)
        status, told = verify(path)
        assert status == 0 and told.count("is not a whole record") == 3
        assert f"{path}: line 3 is not" in told

    @pytest.mark.parametrize("written", [0, 20])
    def test_full_disk_breaks_nothing(self, tmp_path: Path, written: int) -> None:
        path, log, write = tmp_path / "audit.log", mock.Mock(), os.write

        def fill(fd: int, data: bytes) -> int:
            if written:
                return write(fd, data[:written])
            raise OSError(errno.ENOSPC, "No space left on device")

        audit = sc.AuditLog(str(path), "b" * 16, log)
        audit.write("task_start", task_id="1")
        with mock.patch.object(sc.os, "write", fill):
            for _ in range(3):
                audit.write("task_start", task_id="2")
        audit.write("task_start", task_id="3")
        assert audit.errors == 3 and "No space" in str(log.mock_calls)
        status, told = verify(path)
        assert status == 0 and ("not a whole record" in told) is bool(written), told
        assert path.read_bytes().endswith(b"\n")

    def test_exit_statuses(self, tmp_path: Path) -> None:
        path = tmp_path / "servercontrol" / "audit.log"
        path.parent.mkdir()

        def run(*arguments: str, **env: str) -> tuple[int, bytes, bytes]:
            told = run_client("verify-audit", *arguments, XDG_STATE_HOME=str(tmp_path), **env)
            return told.returncode, told.stdout, told.stderr

        status, out, error = run()
        assert (status, out, error.count(b"\n")) == (1, b"", 1) and str(path).encode() in error
        write_chain(path, 2)
        assert run() == (0, f"{path}: 2 lines; the chain holds\n".encode(), b"")
        path.write_bytes(path.read_bytes().replace(b"true", b"evil"))
        assert run(str(path))[0] == 1 and b"BROKEN" in run()[1]
        assert run("--bogus")[0] == 2
        assert run(SERVERCONTROL_AUDIT_LOG="none")[0] == 1


class TestAuditLog:
    """SPEC 7 on a running server: what is written down, and a log that gives trouble."""

    COMMON = {"time", "event", "host", "boot_id", "prev"}
    FIELDS = {
        "start": "pid version http ws discovery unix", "task_start": "task_id command cwd by pid",
        "task_complete": "task_id exit_code signal state killed_by duration_ms output_bytes",
        "task_kill": "task_id signal by", "refused": "by reason request", "stop": "reason",
    }  # fmt: skip

    @pytest.mark.parametrize("loop", loops())
    def test_who_did_what_is_written_down(self, tmp_path: Path, loop: str) -> None:
        with TokenServer(tmp_path, f"--loop={loop}") as server:
            boot_id = server.get("/info")["boot_id"]
            done = server.run("exit 3")["task_id"]
            first, second = server.start("exec sleep 300"), server.start("exec sleep 300")
            assert kill_task(server, first, "INT").status == 200
            self.refuse_all(server)
            headers = {"Authorization": f"Bearer {SERVER_RUN_TOKEN}"}
            with server.websocket(additional_headers=headers) as websocket:
                websocket.send(json.dumps({"type": "task_kill", "task_id": second}))
                receive_events(websocket, is_complete(second))
            server.wait_for_end(first)
        records = read_audit(tmp_path / "servercontrol" / "audit.log")
        assert [records[0]["event"], records[-1]["event"]] == ["start", "stop"]
        assert records[-1]["reason"] == "SIGTERM"
        for record in records:
            assert set(record) == self.COMMON | {*self.FIELDS[record["event"]].split()}
            assert (record["boot_id"], record["host"]) == (boot_id, socket.gethostname())
            assert re.fullmatch(TestLogging.TIME, record["time"])
        uid = os.geteuid()
        by_run = re.compile(rf"127\.0\.0\.1:\d+ run uid={uid}")
        starts = [r for r in records if r["event"] == "task_start"]
        assert [r["command"] for r in starts] == ["exit 3", "exec sleep 300", "exec sleep 300"]
        assert all(by_run.fullmatch(r["by"]) and r["cwd"] == os.getcwd() for r in starts)
        kills = [r for r in records if r["event"] == "task_kill"]
        assert [(r["task_id"], r["signal"]) for r in kills] == [(first, "INT"), (second, "TERM")]
        assert all(by_run.fullmatch(r["by"]) for r in kills)
        ends = {r["task_id"]: r for r in records if r["event"] == "task_complete"}
        assert (ends[done]["exit_code"], ends[done]["state"]) == (3, "done")
        assert (ends[first]["signal"], ends[first]["state"]) == ("INT", "killed")
        assert (ends[second]["exit_code"], ends[second]["signal"]) == (143, "TERM")
        refused = [r for r in records if r["event"] == "refused"]
        assert [(r["reason"], r["request"], r["by"].split(None, 1)[1]) for r in refused] == [
            ("unauthorized", "GET /tasks", f"- uid={uid}"),
            ("wrong_token", "GET /tasks", f"- uid={uid}"),
            ("forbidden", "POST /exec", f"view uid={uid}"),
            ("wrong_token", "GET /ws", f"- uid={uid}"),
            ("forbidden", "task_kill", f"view uid={uid}"),
        ]
        assert verify(tmp_path / "servercontrol" / "audit.log")[0] == 0

    @staticmethod
    def refuse_all(server: TokenServer) -> None:
        """Be refused by the gate, by the role over HTTP, and by the role over WebSocket. The
        request before on the same connection was let in: that role counts no more."""
        right, wrong = bearer(SERVER_RUN_TOKEN), bearer("x" * 20)
        with server.connect() as connection:
            stream = AnswerStream(connection)
            for fields, status in (((right,), 200), ((), 401), ((wrong,), 401)):
                connection.sendall(make_request("GET /tasks?id=1", *fields))
                assert stream.next().status == status
        check_answer(server, 403, "POST /exec", bearer(SERVER_VIEW_TOKEN), body=b"true")
        check_answer(server, 401, "GET /ws", wrong, *UPGRADE_FIELDS)
        headers = {"Authorization": f"Bearer {SERVER_VIEW_TOKEN}"}
        with server.websocket(additional_headers=headers) as websocket:
            websocket.send('{"type":"task_kill","task_id":"1"}')
            receive_events(websocket, is_type("error"))

    def test_place_of_the_log(self, tmp_path: Path) -> None:
        path, standard = tmp_path / "my.log", tmp_path / "servercontrol" / "audit.log"
        with ServerProcess(tmp_path, "--audit-log=my.log", cwd=str(tmp_path)) as server:
            server.run("true")
            assert server.get("/info")["audit_errors"] == 0
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        events = [record["event"] for record in read_audit(path)]
        assert events == ["start", "task_start", "task_complete", "stop"]
        with ServerProcess(tmp_path, "--audit-log=none", cwd=str(tmp_path)) as server:
            server.run("true")
        assert not standard.exists() and not (tmp_path / "none").exists()
        # A longer line than 4096 bytes could make us wait for who reads our stderr.
        folder = tmp_path.joinpath(*["d" * 200] * 18)
        folder.mkdir(parents=True)
        with ServerProcess(tmp_path, "--audit-log=-") as server:
            server.run("# " + "x" * 9000)
            for command in ("true #" + "x" * 300, "exit 0\n" + "\x01" * 5000):
                server.run(command, cwd=str(folder))
        records = [record for record in server.records if "prev" in record]
        assert [r["event"] for r in records] == [events[0], *events[1:3] * 3, events[-1]]
        lines = [line.strip().encode() for line in server.stderr if '"prev"' in line]
        assert [r["prev"] for r in records] == [FIRST_PREV, *map(hash_text, lines[:-1])]
        assert max(map(len, lines)) < 4096 and not standard.exists()

    @pytest.mark.parametrize("place", ["folder", "/dev/full", "missing/log", "fifo"])
    def test_log_that_cannot_be_written_stops_nothing(self, tmp_path: Path, place: str) -> None:
        (tmp_path / "folder").mkdir()
        os.mkfifo(tmp_path / "fifo")
        with ServerProcess(tmp_path, f"--audit-log={tmp_path / place}") as server:
            for _ in range(3):
                assert server.run("echo on")["output"] == "on\n"
            assert server.get("/info")["audit_errors"] == 7
            (record,) = server.log("audit_failed")
            assert record["level"] == "error" and record["error"]

    def test_is_written_before_anybody_is_told(self) -> None:
        """So a server that is killed in between does not call a task interrupted that was seen to
        end."""
        tasks = mock.Mock(_publish=mock.Mock(return_value={"timestamp": 7}))
        facts = dict.fromkeys(" ".join(sc.TASK_EVENTS["task_start"]).split())
        assert sc.Tasks._tell(tasks, "task_start", facts) == 7
        assert [name for name, *_ in tasks.mock_calls] == ["_audit.write", "_publish"]

    def test_instances_share_one_chain(self, tmp_path: Path) -> None:
        """And no id is given twice; each server's rise."""
        path = tmp_path / "audit.log"
        make = functools.partial(ServerProcess, tmp_path, f"--audit-log={path}", LOCK_SECONDS=60.0)
        with make() as one, make() as two:
            with concurrent.futures.ThreadPoolExecutor(8) as pool:
                servers = [(one, two)[n % 2] for n in range(400)]
                ids = list(pool.map(lambda server: server.run("true")["task_id"], servers))
            assert len(set(ids)) == 400
            for server in (one, two):
                listed = [int(task["task_id"]) for task in server.get("/tasks")]
                assert listed == sorted(listed) and len(listed) == 200
                assert server.get("/info")["audit_errors"] == 0
        assert verify(path) == (0, f"{path}: 804 lines; the chain holds\n")
        for event in ("task_start", "task_complete"):
            assert sorted(r["task_id"] for r in read_audit(path, event)) == sorted(ids)

    def test_crash_leaves_no_task_open(self, tmp_path: Path) -> None:
        path, pids = tmp_path / "servercontrol" / "audit.log", []
        with contextlib.ExitStack() as stack:
            alive = stack.enter_context(ServerProcess(tmp_path))
            other = alive.start("exec sleep 300")
            server = stack.enter_context(ServerProcess(tmp_path))
            server.run("true")
            lost = [server.start("exec sleep 300") for _ in range(2)]
            pids = [server.task(task_id)["pid"] for task_id in lost]
            boot_id = server.get("/info")["boot_id"]
            server.kill()
            rotated = path.rename(f"{path}.1")
            with kill_at_last(pids):
                for _ in range(2):  # the second start has nothing left to do
                    with ServerProcess(tmp_path):
                        pass
            ends = [r for r in read_audit(path, "task_complete") if r["state"] == "interrupted"]
            assert sorted(r["task_id"] for r in ends) == sorted(lost)
            assert {r["boot_id"] for r in ends} == {boot_id}
            alive.end(other)
        (end,) = [r for r in read_audit(path, "task_complete") if r["task_id"] == other]
        assert end["state"] == "killed"
        assert verify(rotated, path)[0] == 0
        assert not list(path.parent.glob("run-*"))

    def test_flood_of_refusals_is_bounded_and_counted(self, tmp_path: Path) -> None:
        total, began = 400, time.monotonic()
        with ServerProcess(tmp_path) as server:
            data = make_request("GET /tasks", "Via: 1.1 proxy")
            with server.connect() as connection:
                connection.sendall(data * total)
                stream = AnswerStream(connection)
                assert {stream.next().status for _ in range(total)} == {401}
            path = state_file(server, "audit.log")
            assert 100 <= len(read_audit(path, "refused")) <= 100 + time.monotonic() - began

            def is_accounted_for() -> bool:
                nonlocal total
                assert ask(server, data).status == 401
                total += 1
                records = read_audit(path, "refused")
                return len(records) + sum(one.get("skipped", 0) for one in records) == total

            wait_until(is_accounted_for)
            assert len(server.log("refused")) < 10

    def test_log_that_another_process_locks_blocks_nobody(self, tmp_path: Path) -> None:
        with ServerProcess(tmp_path) as server:
            path = state_file(server, "audit.log")
            with path.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                started = time.monotonic()
                for _ in range(40):
                    assert server.run("true")["exit_code"] == 0
                taken = time.monotonic() - started
                errors = server.get("/info")["audit_errors"]
            assert errors == 80 and len(server.log("audit_failed")) == 1
            assert taken < 20, "each record waited for the lock"
            server.run("echo unlocked")
            assert read_audit(path, "task_start")[-1]["command"] == "echo unlocked"
            assert server.get("/info")["audit_errors"] == errors
        assert verify(path)[0] == 0


# Command line, ports, log --------------------------------------------------------------------


class TestCommandLine:
    """SPEC 1: options, their environment twins, exit statuses."""

    BAD = (
        "port=65536 port=-1 ws-port=http discovery-port=8_1 max-tasks=0 max-clients=1_0 "
        "keep-tasks=1.5 keep-output=8X interval=nan interval=0 cpu-alert=101 alert-cooldown=-1 "
        "alert-for=inf loop=trio log-format=xml log-level=loud allow-origin=example.org"
    )

    def test_ctrl_c_at_the_start_leaves_no_trace(self) -> None:
        code = f"""import builtins, os, runpy, signal
real = builtins.__import__
def load(name, *rest):
    if name == 'asyncio':
        os.kill(os.getpid(), signal.SIGINT)
    return real(name, *rest)
builtins.__import__ = load
runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"""
        finished = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60)
        assert (finished.returncode, finished.stderr) == (-signal.SIGINT, b"")

    @pytest.mark.parametrize("option", BAD.split())
    def test_bad_value_is_one_line_and_status_2(self, tmp_path: Path, option: str) -> None:
        name, _, value = option.partition("=")
        check_refusal(tmp_path, 2, [f"--{name}", value], f"--{option}")
        twin = "SERVERCONTROL_" + name.upper().replace("-", "_")
        check_refusal(tmp_path, 2, [f"--{name}", "environment", value], **{twin: value})

    def test_variable_of_no_option_is_a_warning(self, tmp_path: Path) -> None:
        """--no-auth has none: it cannot come from the environment."""
        env = {"PROT": "1", "NO_AUTH": "1", "TASK_ID": "7", "TOKEN": "t" * 16, "MAX_TASKS": "3"}
        env = {f"SERVERCONTROL_{name}": value for name, value in env.items()}
        with ServerProcess(tmp_path, "--cpu-alert=100", env=env) as server:
            info = server.get("/info")
            assert (info["limits"]["max_tasks"], info["auth"]) == (3, True)
            warnings = [r for r in server.records if r["level"] == "warning"]
        told = [(r["event"], r["name"]) for r in warnings]
        names = ("SERVERCONTROL_NO_AUTH", "SERVERCONTROL_PROT")
        assert told == [("unknown_variable", name) for name in names]

    @parametrize_rows("options, env, word", [
        ("unknown option", ["--bogus"], {}, "--bogus"),
        ("line end in an option", ["--bo\ngus"], {}, "gus"),
        ("no abbreviations", ["--max-t=1"], {}, "--max-t"),
        ("value missing", ["--shell"], {}, "--shell"),
        ("flag with a value", ["--no-exec=1"], {}, "--no-exec"),
        ("unknown command", ["sevre"], {}, "did you mean serve?"),
        ("another name", ["start"], {}, "'start' is no command; did you mean serve?"),
        ("a port alone", ["9000"], {}, "did you mean --port 9000?"),
        ("a short option", ["-p", "9000"], {}, "did you mean --port?"),
        ("misspelt", ["--prot=1"], {}, "did you mean --port?"),
        ("no such shell", ["--shell=/bin/nosuch"], {}, "--shell"),
        ("too many words", ["serve", "more"], {}, "more"),
        ("bad flag by twin", [], {"SERVERCONTROL_NO_EXEC": "maybe"}, "NO_EXEC"),
        ("host empty", ["--host="], {}, "--host"),
        ("no_auth and a token file", ["--no-auth", "--token-file=x"], {}, "--no-auth"),
        ("no_auth and a view token", ["--no-auth", "--view-token-file=x"], {}, "--no-auth"),
        ("no_auth and require", ["--no-auth", "--require-token"], {}, "--no-auth"),
        ("no_auth and a token", ["--no-auth"], {"SERVERCONTROL_TOKEN": "t" * 16}, "--no-auth"),
        ("token too short", [], {"SERVERCONTROL_TOKEN": "t" * 15}, "SERVERCONTROL_TOKEN"),
        ("token empty", [], {"SERVERCONTROL_VIEW_TOKEN": ""}, "SERVERCONTROL_VIEW_TOKEN"),
        ("one token for both", [], dict.fromkeys(TOKENS, "t" * 16), "both roles"),
        ("no token file", ["--token-file=/nonexistent/t"], {}, "--token-file"),
        ("key without certificate", ["--tls-key=x"], {}, "--tls-key"),
        ("no certificate in it", ["--tls-cert=/etc/hostname"], {}, "no certificate in it"),
        *[("loop that is not installed", ["--loop=uvloop"], {}, "--loop")] * (sc.uvloop is None),
    ])  # fmt: skip
    def test_refused_with_status_2(self, tmp_path: Path, options: Any, env: Any, word: str):
        any_ports = {"SERVERCONTROL_PORT": "0", "SERVERCONTROL_WS_PORT": "0"}
        check_refusal(tmp_path, 2, [word], *options, **any_ports, **env)

    def test_help_and_version(self) -> None:
        names = ["--" + name.replace("_", "-") for name in sc.Config.__dataclass_fields__]
        defaults = "8080 8082 8081 none 1 90 60 0 /bin/sh 64 10000 8MiB 200 auto text info".split()
        names += [f"(default: {default})" for default in defaults]
        table = [("--version", [f"servercontrol {sc.__version__}"])]
        for option, words in [*table, ("--help", [*names, "SERVERCONTROL_"]), ("-h", names)]:
            result = run_client(option)
            assert (result.returncode, result.stderr) == (0, b"")
            shown = " ".join(result.stdout.decode().split())
            assert [word for word in words if word not in shown] == []

    TWINS = {
        "SERVERCONTROL_HOST": "127.0.0.1,127.0.0.2", "SERVERCONTROL_PORT": "0",
        "SERVERCONTROL_WS_PORT": "0", "SERVERCONTROL_NO_DISCOVERY": "yes",
        "SERVERCONTROL_NO_EXEC": "1", "SERVERCONTROL_MAX_TASKS": "3",
        "SERVERCONTROL_MAX_CLIENTS": "70", "SERVERCONTROL_KEEP_OUTPUT": "2MiB",
        "SERVERCONTROL_KEEP_TASKS": "5", "SERVERCONTROL_INTERVAL": "0.25",
        "SERVERCONTROL_ALLOW_HOST": "one.test two.test", "SERVERCONTROL_LOG_FORMAT": "json",
    }  # fmt: skip

    def test_environment_twins(self, tmp_path: Path) -> None:
        server = ServerProcess(tmp_path, env=self.TWINS)
        server.command = [sys.executable, str(SCRIPT), "serve"]
        with server:
            info = server.get("/info")
            limits = {"max_tasks": 3, "max_clients": 70, "keep_output_bytes": 2 << 20}
            assert {**info["limits"], **limits, "keep_tasks": 5} == info["limits"]
            assert (info["exec"], info["ports"]["discovery"]) == (False, None)
            assert server.get("/stats?history")["interval"] == 0.25
            assert ask_host("127.0.0.2", server.port) == {"ok": True}
            hosts = ("one.test", "two.test", "three.test")
            answers = [server.request("GET", "/health", Host=host) for host in hosts]
            assert [answer.status for answer in answers] == [200, 200, 403]
            answer = server.request("POST", "/exec", "true")
            assert (answer.status, answer.json()["error"]) == (403, "exec_disabled")

    def test_option_wins_over_its_twin(self, tmp_path: Path) -> None:
        """Also where its value is 0, and as a list as a whole."""
        env = {**self.TWINS, "SERVERCONTROL_PORT": "1", "SERVERCONTROL_NO_EXEC": "off"}
        options = ("--max-tasks=9", "--host=127.0.0.3", "--keep-output=0", "--shell=/bin/bash")
        with ServerProcess(tmp_path, *options, env=env) as server:
            assert server.port > 1023
            limits = ask_host("127.0.0.3", server.port, "/info")["limits"]
            assert (limits["max_tasks"], limits["keep_output_bytes"]) == (9, 0)
            answer = ask_host("127.0.0.3", server.port, "/exec?wait", "exit ${BASH_VERSION:+7}")
            assert answer["exit_code"] == 7
            answer = ask_host("127.0.0.3", server.port, "/exec?wait", "echo hi")
            assert (answer["output"], answer["truncated"]) == ("", True)
            with pytest.raises(ConnectionRefusedError):
                ask_host("127.0.0.2", server.port)


HAS_IPV6 = Path("/proc/net/if_inet6").exists()
needs_ipv6 = pytest.mark.skipif(not HAS_IPV6, reason="no IPv6 here")
LOCALHOST = " ".join(sorted({str(row[4][0]) for row in socket.getaddrinfo("localhost", None)}))


class TestPorts:
    """SPEC 1: ports are allocated; every address is served, or none."""

    def test_address_of_a_link_has_its_zone(self) -> None:
        """The kernel refuses it without; here it is not even ours."""
        ((pair,),) = sc.resolve_hosts(["[fe80::5%lo]"])
        assert pair == (socket.AF_INET6, ("fe80::5", 0, 0, socket.if_nametoindex("lo")))
        with pytest.raises(OSError) as caught:
            sc.bind_host([pair], 0, False, [])
        assert caught.value.errno == errno.EADDRNOTAVAIL

    @pytest.mark.parametrize("other, hosts", [
        ("127.0.0.1", ["127.0.0.1", "127.0.0.2"]), ("127.0.0.2", ["127.0.0.1", "127.0.0.2"]),
        pytest.param("::1", [], marks=needs_ipv6), pytest.param("127.0.0.1", [], marks=needs_ipv6),
    ])  # fmt: skip
    def test_busy_port_gives_the_next_free_one(self, tmp_path: Path, other: str, hosts: list[str]):
        """CASES 80; the same one at all addresses, by default of both families."""
        with bind(address=other) as holder:
            busy = holder.getsockname()[1]
            options = (f"--port={busy}", *(f"--host={host}" for host in hosts))
            with ServerProcess(tmp_path, *options) as server:
                record = server.wait_for_log("port_busy")
                assert (record["level"], record["port"]) == ("warning", busy)
                assert record["used"] == server.port and busy < server.port < busy + 100
                for address in hosts or ("127.0.0.1", "::1"):
                    assert ask_host(address, server.port) == {"ok": True}
                assert server.log("listening")[0]["http"] == f"http://{server.place}"

    def test_equal_ports_are_one_listener(self, tmp_path: Path) -> None:
        with bind() as holder:
            busy = holder.getsockname()[1]
            with ServerProcess(tmp_path, f"--port={busy}", f"--ws-port={busy}") as server:
                assert server.port == server.ws_port != busy
                assert listening_ports(server.pid) == [server.port]
                assert b" 101 " in upgrade("127.0.0.1", server.port)
                assert len(server.log("port_busy")) == 1

    def test_no_free_port_is_status_1(self, tmp_path: Path) -> None:
        with bind(65535):
            check_refusal(tmp_path, 1, ["cannot listen"], "--port=65535", "--no-discovery")

    @parametrize_rows("hosts", [
        ("not ours", ["192.0.2.1"]), ("one of two is not ours", ["127.0.0.1", "192.0.2.1"]),
        ("empty label", ["a..b"]), ("label too long", ["a" * 64]),
    ])  # fmt: skip
    def test_address_that_cannot_be_bound_is_status_1(self, tmp_path: Path, hosts: Any) -> None:
        options = [f"--host={host}" for host in hosts]
        check_refusal(tmp_path, 1, [hosts[-1]], *options, "--port=0", "--ws-port=0")

    @pytest.mark.parametrize("hosts, places", [
        ("::1 ::ffff:10.0.0.1", ["10.0.0.1"]), ("10.0.0.1 ::ffff:0.0.0.0", []), ("fe80::1%lo", []),
    ])  # fmt: skip
    def test_probes_are_answered_from_an_address_of_http(self, hosts: str, places: list[str]):
        kinds = [mock.Mock(**{"getsockname.return_value": (host,)}) for host in hosts.split()]
        assert sc.Listeners.find_places(mock.Mock(kinds=kinds, is_loopback=False)) == places

    @pytest.mark.parametrize("hosts, served, refused", [
        ("127.0.0.1 127.0.0.9 127.0.0.1", "127.0.0.1 127.0.0.9", "127.0.0.2"),
        pytest.param("", "127.0.0.1 localhost" + " ::1" * HAS_IPV6, "127.0.0.2", id="default"),
        pytest.param("::1", "::1", "127.0.0.1", marks=needs_ipv6),
        pytest.param("localhost", LOCALHOST, "127.0.0.2", marks=needs_ipv6),
        *(pytest.param(hosts, "127.0.0.1 ::1", "", marks=needs_ipv6)
          for hosts in ("::", ":: 0.0.0.0", "0.0.0.0 ::")),
    ])  # fmt: skip
    def test_every_address_is_served(self, tmp_path: Path, hosts: str, served: str, refused: str):
        """Both ports at each; a repeated address is one. Nothing is at any other address."""
        options = [f"--host={host}" for host in hosts.split()]
        with ServerProcess(tmp_path, *options, *["--no-auth"] * (not refused)) as server:
            ports = (server.port, server.ws_port)
            for address, port in itertools.product(served.split(), ports):
                assert b" 101 " in upgrade(address, port)
                assert ask_host(address, port, "/exec?wait", "echo hi")["output"] == "hi\n"
                data = make_request("GET /", host="evil.test")
                assert ask_from(server, "", data, address).status == 403
            tasks = ask_host(address, server.port, "/tasks")
            sources = {"[::1]" if ":" in one else "127.0.0.1" for one in served.split()}
            assert not refused or {task["by"].rpartition(":")[0] for task in tasks} == sources
            for address in served.split() if refused else ():
                data = make_request("GET /tasks")
                listing = functools.partial(ask_from, server, "", data, address)
                assert as_nobody(lambda ask=listing: b"%d" % ask().status) == b"401"
            for address in refused.split():
                assert {*listening_ports(server.pid)} <= {*ports}
                assert len(listening_ports(server.pid)) == 2 * served.count("127.")
                with pytest.raises(ConnectionRefusedError):
                    ask_host(address, server.port)
            record = server.log("listening")[0]
            assert (record["pid"], record["version"]) == (server.process.pid, sc.__version__)
            assert hosts != "::1" or record["http"] == f"http://[::1]:{server.port}"
            assert len({*ports, server.discovery_port}) == 3

    @pytest.mark.parametrize("number", [errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT])
    def test_a_machine_without_ipv6_is_served_all_the_same(self, number: int) -> None:
        make, log = socket.create_server, mock.Mock()

        def refuse(address: Any, **options: Any) -> socket.socket:
            if address[0] == "::1":
                raise OSError(number, "no IPv6")
            return make(address, **options)

        with mock.patch.object(sc.socket, "create_server", refuse):
            listeners = sc.Listeners(sc.Config(port=0, ws_port=0), log, {})
        assert [one.getsockname()[0] for one in listeners.kinds] == ["127.0.0.1"] * 2
        assert not log.mock_calls
        listeners.close()

    def test_any_port_is_free_at_both(self) -> None:
        """The kernel chooses one that is free at the first address; at the second it may not be."""
        busy, tried = [True, True, False, False], []

        def bind_or_fail(places: Any, port: int, v6_only: bool, bound: list[Any]) -> None:
            tried.append(port)
            if busy.pop(0):
                raise OSError(errno.EADDRINUSE, "busy")
            bound.append(bind())

        log = mock.Mock()
        with mock.patch.object(sc, "bind_host", bind_or_fail):
            sc.Listeners(sc.Config(port=0, ws_port=0), log, {}).close()
        assert tried == [0, 0, 0, 0] and not log.write.called

    @each_loop
    def test_discovery_port_does_not_move(self, loop: str, tmp_path: Path) -> None:
        for options, count in (((), 1), (("--no-discovery",), 0)):
            with bind_udp() as udp:
                words = (f"--loop={loop}", f"--discovery-port={udp.getsockname()[1]}", *options)
                with ServerProcess(tmp_path, "--cpu-alert=100", *words) as server:
                    assert server.discovery_port is None
                    assert server.get("/info")["ports"]["discovery"] is None
                    assert len(server.log("discovery_off")) == count
                    levels = [record["level"] for record in server.records]
                    assert levels.count("warning") == count
                    assert server.run("echo hi")["output"] == "hi\n"


class TestLogging:
    """SPEC 1, 9: what is said on stderr, and a stderr that takes nothing."""

    TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"

    @pytest.mark.parametrize("log_format", ["text", "json"])
    def test_lines(self, tmp_path: Path, log_format: str) -> None:
        """CASES 21: nobody can forge a line or reach the terminal. The banner is for terminals."""
        command, log = "true\nforged INFO x \x1b[2J\x7f\x9b\u2028", tmp_path / "log"
        redirect, option = f">'{tmp_path}/out' 2>'{log}'", f"--log-format={log_format}"
        with server_with_output(tmp_path, redirect, option) as server:
            server.run(command)
        assert (tmp_path / "out").read_text() == ""
        text = log.read_text(encoding="utf-8")
        assert all(c == "\n" or c.isprintable() for c in text)
        lines = text.split("\n")[:-1]
        if log_format == "json":
            records = [json.loads(line) for line in lines]
            assert records[1]["command"] == command and records[0]["pid"] == server.pid
            heads = [f"{r['time']} {r['level'].upper()} {r['event']}" for r in records]
        else:
            assert f" pid={server.pid} " in lines[0] and " signal=SIGTERM " in lines[3]
            heads = [" ".join(line.split()[:3]) for line in lines]
        assert len(heads) == 4
        for head, event in zip(heads, ["listening", "task_start", "task_complete", "stopping"]):
            assert re.fullmatch(f"{self.TIME} INFO {event}", head)

    def test_level(self, tmp_path: Path) -> None:
        log = tmp_path / "log"
        options = ("--log-level=warning", "--no-auth")
        with server_with_output(tmp_path, f"2>'{log}'", *options) as server:
            server.run("true")
        assert [one["level"] for one in read_lines(log)] == ["warning"]

    @parametrize_rows("redirect", [
        ("full", "2>/dev/full"), ("stderr closed", "2>&-"), ("stdout closed", ">&-"),
        ("stdin closed", "<&-"), ("all closed", "<&- >&- 2>&-"), ("both full", ">/dev/full 2>&1"),
    ])  # fmt: skip
    @each_loop
    def test_log_that_cannot_be_written(self, tmp_path: Path, redirect: str, loop: str) -> None:
        """What is opened later must not become descriptor 0, 1 or 2: the log would go there."""
        popen = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
        with server_with_output(tmp_path, redirect, f"--loop={loop}", **popen) as server:
            answer = server.run("readlink /proc/self/fd/0; echo hi >&2")
            assert answer["output"] == "/dev/null\nhi\n"
            links = [os.readlink(f"/proc/{server.pid}/fd/{fd}") for fd in range(3)]
            assert not [link for link in links if not link.startswith("/dev/")], links

    def test_log_that_nobody_reads_drops_lines_and_counts_them(self, tmp_path: Path) -> None:
        read_fd, write_fd = os.pipe()
        fcntl.fcntl(write_fd, getattr(fcntl, "F_SETPIPE_SZ", 1031), 4096)
        os.set_blocking(read_fd, False)
        with server_with_output(tmp_path, "", stderr=write_fd) as server:
            os.close(write_fd)
            with open(read_fd, "rb", buffering=0) as log:
                for _ in range(40):
                    assert server.run("echo hi")["output"] == "hi\n"
                early = log.read(65536).splitlines()
                server.run("echo again")
                late = wait_until(lambda: log.read(65536)).splitlines()
            assert server.run("yes | head -n 1")["output"] == "y\n"  # now its reader has gone
        dropped = [json.loads(line).get("lines_dropped", 0) for line in [*early, *late]]
        assert dropped == [*[0] * len(early), 81 - len(early), *dropped[len(early) + 1 :]]
        assert not any(dropped[len(early) + 1 :])


# Hard beginnings and ends --------------------------------------------------------------------


class TestStarter:
    """CASES, facts 1, 5, 8, 10 to 12: what the starter did must not matter."""

    ODD = ("INT", "QUIT", "HUP", "CHLD", "TTOU", "TTIN", "TSTP", "USR1", "ALRM", "PIPE", "WINCH")

    @each_loop
    def test_signals_do_not_reach_children(self, tmp_path: Path, loop: str) -> None:
        """Ignored or blocked by the starter, INT and QUIT as by a shell's `&`; fact 5: CHLD."""

        def be_odd() -> None:
            for name in self.ODD:
                signal.signal(getattr(signal, f"SIG{name}"), signal.SIG_IGN)
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR2, 40})

        with open(os.devnull) as file:
            odd: Any = {"restore_signals": False, "preexec_fn": be_odd, "pass_fds": [file.fileno()]}
            with ServerProcess(tmp_path, f"--loop={loop}", **odd) as server:
                TestTaskProcess().test_process_starts_clean(server)
                assert server.run("exit 7")["exit_code"] == 7
                assert server.run("kill -INT $$")["signal"] == "INT"
                for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGQUIT):
                    os.kill(server.pid, number)  # what was ignored stays so
                assert server.run("ulimit -c 0; kill -QUIT $$")["signal"] == "QUIT"

    @each_loop
    def test_out_of_descriptors(self, tmp_path: Path, loop: str) -> None:
        """Facts 11, 12: an answer, one log line a second; all is well again afterwards."""
        with ServerProcess(tmp_path, f"--loop={loop}", "--interval=0.1") as server:
            server.run("true")
            before = server.descriptors()
            with exhausted(server) as send:
                for _ in range(3):
                    status, answer = send("POST", "/exec", "true")
                    assert (status, answer["error"]) == (503, "no_resources")
                errors = wait_until(lambda: [r for r in server.records if r["level"] == "error"])
                wait_until(lambda: len(server.log(errors[0]["event"])) >= 3)
                assert send("GET", "/health")[0] == 200
            wait_until(lambda: server.descriptors() <= before)
            assert server.run("echo hi")["output"] == "hi\n"
            assert len(server.get("/tasks")) == 2
        for event in {record["event"] for record in server.records if record["level"] == "error"}:
            parse = datetime.datetime.strptime
            times = [parse(r["time"], "%Y-%m-%dT%H:%M:%S.%fZ") for r in server.log(event)]
            assert all((b - a).total_seconds() > 0.9 for a, b in zip(times, times[1:])), times

    def test_kill_without_a_free_descriptor_is_complete(self, tmp_path: Path) -> None:
        """Reading /proc needs one: a search that fails must not pass for an empty session."""
        with ServerProcess(tmp_path) as server:
            server.check = False  # what the sampler logs meanwhile is another test's
            task_id, pids = start_ready(server, f"({TestTaskStop.DEAF}) & exec sleep 60")
            with kill_at_last(pids):
                with exhausted(server) as send:
                    assert send("POST", f"/kill?id={task_id}")[0] == 200
                    wait_for_death(pids, 8.0)
                assert server.wait_for_end(task_id)["state"] == "killed"

    def test_reaps_orphans_as_pid_1(self, tmp_path: Path, gate: Gate) -> None:
        """Fact 8."""
        prefix = ("unshare", "--fork", "--pid", "--mount-proc")
        if subprocess.run([*prefix, "true"], stderr=subprocess.DEVNULL).returncode != 0:
            pytest.skip("no pid namespace can be made here (it needs root)")
        with ServerProcess(tmp_path, prefix=prefix) as server:
            assert server.pid == 1
            (pid,) = child_pids(server.process.pid)
            with kill_at_last([pid]):
                answer = server.run(f"for i in 1 2 3 4 5; do ({gate.wait} &); done; exit 7")
                assert answer["exit_code"] == 7 and len(child_pids(pid)) == 5
                for _ in range(5):
                    gate.open()
                wait_until(lambda: not child_pids(pid))
                task_id = server.start("(sleep 60 &); (setsid sleep 61 &); exec sleep 60")
                three = ["sleep 60", "sleep 60", "sleep 61"]  # that has called setsid() then
                wait_until(lambda: sorted(map(read_command_line, child_pids(pid))) == three)
                assert server.end(task_id)["signal"] == "TERM"
                wait_until(lambda: len(child_pids(pid)) == 1)  # it left the session
                os.kill(pid, signal.SIGTERM)
                assert server.process.wait(PATIENCE_SECONDS) == 0


class TestStopping:
    """SPEC 8."""

    @each_loop
    @pytest.mark.parametrize("name", ["TERM", "INT", "HUP"])
    def test_idle_server_stops_within_a_second(self, tmp_path: Path, name: str, loop: str) -> None:
        """CASES 77; facts 6, 7: with clients that are connected."""
        with ServerProcess(tmp_path, f"--loop={loop}", LINGER_SECONDS=60.0) as server:
            server.run("true")
            with server.connect() as silent, server.connect() as kept, server.websocket() as viewer:
                check_served(kept)
                start = time.monotonic()
                os.kill(server.pid, getattr(signal, f"SIG{name}"))
                with pytest.raises(Exception, match="1001.*the server stops"):
                    receive_events(viewer, lambda event: False)
                assert server.process.wait(PATIENCE_SECONDS) == 0
                assert time.monotonic() - start < sc.CLOSE_SECONDS * 0.9
                assert read_all(silent) == read_all(kept) == b""
            assert server.wait_for_log("stopping")["signal"] == f"SIG{name}"
            for port in (server.port, server.ws_port):
                bind(port).close()

    @each_loop
    def test_tasks_are_stopped_and_their_ends_sent_first(self, tmp_path: Path, loop: str) -> None:
        """CASES 78; then comes 1001, and after it nothing."""
        with contextlib.ExitStack() as stack:
            options = (f"--loop={loop}", "--interval=0.05")
            server = stack.enter_context(ServerProcess(tmp_path, *options))
            viewer = stack.enter_context(server.websocket())
            silent = stack.enter_context(RawPeer(server))
            soft, pids = start_ready(server, "sleep 60 & echo ready; wait")
            deaf, more = start_ready(server, TestTaskStop.DEAF)
            group, rest = start_ready(server, "exec bash -c 'set -m; sleep 60 & echo ready; wait'")
            with concurrent.futures.ThreadPoolExecutor(1) as pool:
                waiting = pool.submit(server.run, "exec sleep 60")
                wait_until(lambda: len(server.get("/tasks")) == 4)
                start = time.monotonic()
                os.kill(server.pid, signal.SIGTERM)
                server.wait_for_log("stopping")
                wait_until(lambda: not listening_ports(server.pid))
                events: list[Any] = []
                with pytest.raises(Exception, match="1001"):
                    receive_events(viewer, lambda event: events.append(event) or False)  # type: ignore
                assert waiting.result(PATIENCE_SECONDS)["signal"] == "TERM"
            assert silent.read_close() == (1001, "the server stops")
            assert server.process.wait(PATIENCE_SECONDS) == 0
            assert 3.0 <= time.monotonic() - start < 20.0
            ends = {e["task_id"]: e for e in events if e["type"] == "task_complete"}
            assert len(ends) == 4 and {e["state"] for e in ends.values()} == {"killed"}
            assert [ends[i]["signal"] for i in (soft, deaf, group)] == ["TERM", "KILL", "TERM"]
            wait_for_death(pids + more + rest)

    @pytest.mark.parametrize("name, seconds", [("TERM", 50.0), ("INT", 50.0), ("", 1.0)])
    def test_second_signal_kills_at_once(self, tmp_path: Path, name: str, seconds: float) -> None:
        """CASES 79. So does the end of the time that a stop may take."""
        with ServerProcess(tmp_path, KILL_GRACE_SECONDS=40.0, STOP_SECONDS=seconds) as server:
            server.check = False  # its status is not 0
            _, pids = start_ready(server, f"sleep 60 & {TestTaskStop.DEAF}")
            with kill_at_last(pids):
                start = time.monotonic()
                os.kill(server.pid, signal.SIGTERM)
                server.wait_for_log("stopping")
                if name:
                    os.kill(server.pid, getattr(signal, f"SIG{name}"))
                server.process.wait(PATIENCE_SECONDS)
                wait_for_death(pids)
                assert time.monotonic() - start < 30  # by themselves they end after 60 s

    def test_nothing_is_started_any_more(self, tmp_path: Path, gate: Gate) -> None:
        """By a client that has been connected before."""
        with ServerProcess(tmp_path, KILL_GRACE_SECONDS=40.0) as server, server.connect() as kept:
            start_ready(server, f"trap '' TERM; echo ready; {gate.wait}")
            os.kill(server.pid, signal.SIGTERM)
            wait_until(lambda: not listening_ports(server.pid))
            kept.sendall(post(line="POST /exec?wait", body=b"true"))
            answer = read_all(kept)
            gate.open()
            assert answer.startswith(b"HTTP/1.1 503 ") and b"the server is stopping" in answer
            assert server.process.wait(PATIENCE_SECONDS) == 0

    def test_child_that_cannot_be_reaped_does_not_hold_it(self, tmp_path: Path) -> None:
        """CASES 78: while somebody traces a child, neither TERM nor its death gets through."""
        libc, ptrace_seize = ctypes.CDLL(None, use_errno=True), 0x4206
        with ServerProcess(tmp_path) as server:
            pid = server.task(server.start("exec sleep 60"))["pid"]
            if libc.ptrace(ptrace_seize, pid, None, None) != 0:
                pytest.skip(f"no tracing here: {os.strerror(ctypes.get_errno())}")
            with kill_at_last([pid]):
                start = time.monotonic()
                os.kill(server.pid, signal.SIGTERM)
                assert server.process.wait(PATIENCE_SECONDS) == 0
                assert 3.0 < time.monotonic() - start < 20.0
                with ServerProcess(tmp_path) as next_one:
                    assert next_one.wait_for_log("crash_completed")["tasks"] == 1
            os.waitpid(pid, 0)

    def test_ports_are_free_whatever_a_task_left_behind(self, tmp_path: Path) -> None:
        with ServerProcess(tmp_path) as server:
            left = server.run("setsid sleep 60 >/dev/null 2>&1 & echo $!; sleep 60 & echo $!")
        pids = [int(pid) for pid in left["output"].split()]
        with kill_at_last(pids):
            assert not [pid for pid in pids if sc.is_zombie(pid)]
            for port in (server.port, server.ws_port):
                bind(port).close()

    def test_ctrl_c_reaches_tasks_only_through_us(self, tmp_path: Path) -> None:
        """CASES 59, 79: and the server's terminal is never a task's."""
        with Terminal(tmp_path) as terminal:
            command = ": < /dev/tty && echo got it"
            answer = ask_host("127.0.0.1", terminal.port, "/exec?wait", command)
            assert answer["exit_code"] != 0 and "got it" not in answer["output"]
            command = "trap 'exit 1' INT; while :; do sleep 0.02; done"
            pid = ask_host("127.0.0.1", terminal.port, "/exec", command)["pid"]
            os.write(terminal.master, b"\x03")
            assert terminal.process.wait(PATIENCE_SECONDS) == 0
            assert terminal.read_until(r'"task_complete",.*"exit_code":143')
            wait_for_death([pid])

    def test_hang_up_of_the_terminal_stops_it(self, tmp_path: Path) -> None:
        with Terminal(tmp_path) as terminal, open(os.devnull, "rb") as devnull:
            pid = ask_host("127.0.0.1", terminal.port, "/exec", "exec sleep 60")["pid"]
            os.dup2(devnull.fileno(), terminal.master)  # which closes it
            assert terminal.process.wait(PATIENCE_SECONDS) == 0
            wait_for_death([pid])


# systemd --------------------------------------------------------------------------------------


def skip_aloud(message: str) -> None:
    """Where something is not installed; in CI that fails."""
    pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)


def find_program(name: str, package: str, path: str | None = None) -> str:
    """Return the path of a program of a Debian package."""
    found = shutil.which(name, path=path)
    return found or skip_aloud(f"NOT TESTED with {name}: apt-get install {package}") or ""


def analyze(*words: Any, status: int | None = 0) -> str:
    command = [find_program("systemd-analyze", "systemd"), *map(str, words)]
    told = subprocess.run(command, stdout=-1, stderr=-2, encoding="utf-8", check=False)
    assert status in (None, told.returncode), told.stdout
    return told.stdout


def print_unit(*options: str, script: Path = SCRIPT) -> tuple[str, str]:
    """Return what `unit` prints, on stdout and stderr; in this process, since it is asked often."""
    out: list[bytes] = []
    notes: list[str] = []
    streams = {"write_output": out.append, "write_note": notes.append}
    with mock.patch.multiple(sc, __file__=str(script), **streams):
        assert sc.unit_command(options) == 0
    return b"".join(out).decode(), "".join(f"{note}\n" for note in notes)


def read_unit(text: str) -> dict[str, list[str]]:
    settings: dict[str, list[str]] = {}
    for line in text.splitlines():
        name, equal, value = line.partition("=")
        if equal and line[0] != "#":
            settings.setdefault(name, []).append(value)
    return settings


class TestUnit:
    """SPEC 11: `unit` prints what systemd takes."""

    @parametrize_rows("text, quoted", [
        ("plain", "--host=127.0.0.1", "--host=127.0.0.1"), ("space", "a b", '"a b"'),
        ("empty", "", '""'), ("specifier", "50%h", '"50%%h"'),
        ("variable", "$HOME${X}", '"$$HOME$${X}"'), ("quotes", "a\"b'c", '"a\\"b\'c"'),
        ("backslash", "\\x41", '"\\\\x41"'), ("separator", ";", '";"'),
        ("umlaut", "ä", '"ä"'),
    ])  # fmt: skip
    def test_word_is_quoted(self, text: str, quoted: str) -> None:
        assert sc.quote_word(text) == quoted

    def test_what_cannot_stand_there_is_refused(self, tmp_path: Path) -> None:
        """systemd would join the next line, cut a space off, or mount elsewhere."""
        for path in ("/etc/token\\", "/etc/token ", "/etc/to\nken"):
            with pytest.raises(sc.ConfigError, match="--token-file: .* cannot stand in a unit"):
                print_unit(f"--token-file={path}")
        for text in ("a\nb", "\udcff", "\u2028"):
            with pytest.raises(sc.ConfigError, match="cannot stand in a unit"):
                print_unit(f"--allow-host={text}")
        for name in ("a:b", "a$b", "a\tb", "a\nb", "a\xa0b", "a\u200bb", "a\udcffb"):
            script = tmp_path / f"{name}.py"  # in /tmp, which the sandbox hides
            shutil.copy(SCRIPT, script)
            with pytest.raises(sc.ConfigError, match="put it into /usr/local/bin"):
                print_unit(script=script)
        with SCRIPT.open("rb") as pipe:
            finished = run_client("unit", stdin=pipe, script="-")
        assert (finished.returncode, finished.stderr.count(b"\n")) == (2, 1)

    @pytest.mark.parametrize("options", [(), ("--no-exec",), ("--user=root",)], ids=" ".join)
    def test_systemd_is_content(self, tmp_path: Path, options: tuple[str, ...]) -> None:
        """With the options that make every line appear; the score is what the README says."""
        unit = tmp_path / "servercontrol.service"
        more = ["--port=80", "--tls-cert=/a b%/c", "--host=::", "--allow-host=\"$%\\'"]
        for extra in (more, []):
            printed = run_client("unit", *options, *extra, script=SCRIPT).stdout
            assert printed.decode() == print_unit(*options, *extra)[0]
            unit.write_bytes(printed)
            assert analyze("verify", unit) == ""
        (tmp_path / "servercontrol.socket").write_text(read_example("servercontrol.socket"))
        assert analyze("verify", tmp_path / "servercontrol.socket") == ""
        name = options[0].replace("root", "NAME") if options else ""
        row = re.search(rf"^\| `unit ?{name}` \| ([0-9.]+) \|", read_docs(), re.MULTILINE)
        told = analyze("security", "--offline=true", "--no-pager", unit, status=None)
        score = re.search(r"exposure level for servercontrol.service: ([0-9.]+)", told)
        assert row and score and float(score.group(1)) <= float(row.group(1)), told

    def test_command_is_what_was_typed(self) -> None:
        environ = {"SERVERCONTROL_PORT": "1"}  # of whoever types, not of the service
        options = ["--no-exec", "--host=::1", "--host", "::", "--interval=2", "--shell=bash"]
        options += ["--audit-log=-", "--unix=a b", "--user=root", "--token-file=t"]
        options += ["--keep-output=1024G"]
        told = run_client("unit", *options, script=SCRIPT.name, streams={"cwd": HERE}, **environ)
        unit = read_unit(told.stdout.decode())
        words = shlex.split(unit["ExecStart"][0])
        assert words[1:3] == ["-I", str(SCRIPT)] and words[0][0] == "/"
        assert set(words[3:]) == {
            *("--no-exec", "--host=::1", "--host=::", "--interval=2.0", "--shell=bash"),
            *("--audit-log=-", f"--unix={HERE}/a b", "--keep-output=1099511627776"),
            "--token-file=${CREDENTIALS_DIRECTORY}/token",
        }
        assert unit["LoadCredential"] == [f"token:{HERE}/t"] and unit["User"] == ["root"]
        assert unit["After"] == ["network-online.target"] and sc.parse_given(words[3:])

    def test_profiles(self) -> None:
        sandbox, account = read_unit(print_unit()[0]), read_unit(print_unit("--user=root")[0])
        assert sandbox["DynamicUser"] == sandbox["NoNewPrivileges"] == ["yes"]
        assert sandbox["CapabilityBoundingSet"] == [""]
        assert not {"NoNewPrivileges", "DynamicUser", "ProtectSystem"} & set(account)
        assert not {"ReadOnlyPaths", "TemporaryFileSystem"} & set(account)
        for unit in (sandbox, account):
            assert (unit["Type"], unit["KillMode"]) == (["notify"], ["mixed"])
        monitors = [read_unit(print_unit("--no-exec", *user)[0]) for user in ((), ("--user=root",))]
        for unit in (sandbox, *monitors):
            # ProtectSystem=strict alone leaves /run writable beside ProtectKernelTunables=yes.
            assert (unit["ProtectSystem"], unit["ReadOnlyPaths"]) == (["strict"], ["/run"])
            assert unit["TemporaryFileSystem"] == ["/dev/shm:mode=1777"]
            assert unit["RuntimeDirectory"] == ["servercontrol"]  # stays writable
        low = read_unit(print_unit("--ws-port=82")[0])
        for name in ("AmbientCapabilities", "CapabilityBoundingSet"):
            assert low[name] == ["CAP_NET_BIND_SERVICE"]
        (command,) = read_unit(print_unit("--user=root", "--token-file=/t")[0])["ExecStart"]
        assert command.endswith(" --token-file=/t")  # root reads it itself

    def test_python_is_one_that_the_account_can_run(self) -> None:
        """Not one in a closed home, nor a link into that: systemd would say 203/EXEC."""
        other = os.getuid() + 1

        def is_chosen(python: Path, uid: int) -> bool:
            with mock.patch.object(sys, "executable", str(python)):
                path, reason = sc.choose_python(False, uid)
            assert path == str(python) or "account cannot run" in reason
            return path == str(python)

        with tempfile.TemporaryDirectory() as closed, tempfile.TemporaryDirectory() as opened:
            os.chmod(opened, 0o755)
            python, link = Path(closed) / "python3", Path(opened) / "python3"
            python.touch(0o755)
            link.symlink_to(python)
            for path in (python, link):
                assert is_chosen(path, os.getuid()) and not is_chosen(path, other)
            # POSIX gives two slashes a meaning of their own: they have no parent, and are not "/".
            assert not sc.is_permitted(f"/{python}", other, 1)
            assert sc.is_permitted("//dev/null", other, 4)
            os.chmod(closed, 0o711)
            assert is_chosen(python, other) and is_chosen(link, other)
            python.chmod(0o744)
            assert not is_chosen(python, other) and not is_chosen(link, other)

    def test_missing_files_are_told(self, tmp_path: Path) -> None:
        there = tmp_path / "there"
        there.touch()
        paths = ("/nonexistent/token", str(there) + "/token", "/etc", "-")
        for option in ("--token-file", "--view-token-file"):
            for path, user in itertools.product(paths, ((), ("--user=root",))):
                told = print_unit(f"{option}={path}", *user)[1]
                assert f"{option}: there is no file {os.path.abspath(path)}\n" in told
            assert "there is no file" not in print_unit(f"{option}={there}")[1]
        told = print_unit(f"--tls-cert={there}", "--tls-key=/nonexistent/key")[1]
        assert "--tls-key: there is no file /nonexistent/key" in told and "--tls-cert:" not in told

    def test_file_that_may_be_there_is_not_called_missing(self) -> None:
        """`unit` is for any account, and a private key is often in a folder of root's."""
        with tempfile.TemporaryDirectory() as closed:  # 0700
            paths = (closed + "/key", "/etc")
            assert as_nobody(lambda: bytes(map(sc.is_missing, paths))) == b"\0\1"

    @parametrize_rows("name, begins", [
        ("space", "a b", '"{}/a b/python3"'), ("specifier", "50%h", '"{}/50%%h/python3"'),
        ("dollar", "a$b", "/usr/bin/python3"), ("apostrophe", "a'b", "/usr/bin/python3"),
        ("quote", 'a"b', "/usr/bin/python3"), ("backslash", "a\\b", "/usr/bin/python3"),
        ("line end", "a\nb", "/usr/bin/python3"), ("no text", "\udcff", "/usr/bin/python3"),
    ])  # fmt: skip
    def test_python_is_one_that_systemd_takes(self, tmp_path: Path, name: str, begins: str) -> None:
        """It refuses quotes and backslashes there, and takes $$ as it stands."""
        python = tmp_path / name / "python3"
        python.parent.mkdir()
        python.symlink_to(sys.executable)
        with mock.patch.object(sys, "executable", str(python)):
            (command,) = read_unit(print_unit("--user=root")[0])["ExecStart"]
        assert command.startswith(begins.format(tmp_path) + " -I ")

    @pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to own the file")
    def test_doubts_are_told(self) -> None:
        with tempfile.TemporaryDirectory(dir="/opt") as name:
            folder = Path(name)
            script = folder / "servercontrol.py"
            shutil.copy(SCRIPT, script)
            folder.chmod(0o755)
            script.chmod(0o644)
            assert print_unit(script=script)[1] == ""
            for options in ((), ("--no-exec",), ("--no-exec", "--user=root")):
                for option in ("--audit-log=/x", "--unix=/run/x"):
                    assert "can write to" in print_unit(option, *options, script=script)[1]
            assert print_unit("--audit-log=/x", "--user=root", script=script)[1] == ""
            with tempfile.NamedTemporaryFile(dir="/tmp") as shell:
                os.chmod(shell.name, 0o755)
                assert "cannot see" in print_unit(f"--shell={shell.name}", script=script)[1]
            assert print_unit("--audit-log=/var/log/servercontrol/x", script=script)[1] == ""
            script.chmod(0o666)
            assert "not only root can change" in print_unit(script=script)[1]
            script.chmod(0o600)
            assert "cannot read" in print_unit(script=script)[1]
            assert print_unit("--user=root", script=script)[1] == ""
            script.chmod(0o644)
            folder.chmod(0o700)
            assert "cannot read" in print_unit("--user=daemon", script=script)[1]
        for place in ("/tmp", "/dev/shm"):
            with tempfile.TemporaryDirectory(dir=place) as name:
                script = Path(shutil.copy(SCRIPT, name))
                text, told = print_unit(script=script)
            assert read_unit(text)["BindReadOnlyPaths"] == [str(script)]
            assert "emptied" in told and "cannot read" not in told

    def test_says_how_to_install_it(self) -> None:
        """To people, and not in the unit."""
        text = run_client("unit", "--help").stdout.decode()
        for word in ("sudo tee /etc/systemd", "daemon-reload", "enable --now", "--user NAME"):
            assert word in text
        with Person("unit", stdout=subprocess.PIPE) as person, person.process.stdout as unit:
            person.read_until("systemctl daemon-reload")
            assert unit.read().decode() == print_unit(script=Path(compiled_script()))[0]


class TestSupervisor:
    """SPEC 12: systemd is told (sd_notify(3))."""

    @pytest.fixture()
    def supervisor(self, request: Any) -> Iterator[tuple[dict[str, str], socket.socket]]:
        """The variable that names a socket, of this kind, and the socket."""
        with tempfile.TemporaryDirectory() as folder:
            is_abstract = getattr(request, "param", "path") == "abstract"
            name = f"@servercontrol-{os.urandom(8).hex()}" if is_abstract else folder + "/n"
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
                listener.settimeout(PATIENCE_SECONDS)
                listener.bind(name.replace("@", "\0", 1))
                yield {"NOTIFY_SOCKET": name}, listener

    @pytest.mark.parametrize("loop", loops())
    @pytest.mark.parametrize("supervisor", ["path", "abstract"], indirect=True)
    def test_ready_alive_and_stopping(self, tmp_path: Path, supervisor: Any, loop: str) -> None:
        env, listener = supervisor
        env["WATCHDOG_USEC"] = "400000"
        start = time.monotonic()
        with ServerProcess(tmp_path, f"--loop={loop}", env=env) as server:
            ready = listener.recv(4096).decode().split("\n")
            assert ready == ["READY=1", f"STATUS=listening at http://{server.place}"]
            assert [listener.recv(4096) for _ in range(6)] == [b"WATCHDOG=1"] * 6
            assert time.monotonic() - start >= 1.0  # the first of them came at once
            assert not re.search("_USEC|NOTIFY", server.run("env")["output"])
            server.process.terminate()
            last = b"STOPPING=1\nSTATUS=stopping, 0 tasks run"
            assert set(iter(lambda: listener.recv(4096), last)) <= {b"WATCHDOG=1"}
            assert server.process.wait(PATIENCE_SECONDS) == 0

    def test_ready_comes_only_after_listening(self, tmp_path: Path, supervisor: Any) -> None:
        """A start that fails says nothing."""
        env, listener = supervisor
        check_refusal(tmp_path, 1, ["cannot listen"], "--host=192.0.2.1", **env)
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.recv(4096)

    @in_loop
    async def test_hung_loop_is_mute(self, supervisor: Any) -> None:
        env, listener = supervisor
        listener.setblocking(False)

        async def receive() -> bytes:
            receiving = asyncio.get_running_loop().sock_recv(listener, 4096)
            return await asyncio.wait_for(receiving, PATIENCE_SECONDS)

        sc.SystemdNotifier({**env, "WATCHDOG_USEC": "20000"}).beat()
        assert [await receive() for _ in range(3)] == [b"WATCHDOG=1"] * 3
        with pytest.raises(BlockingIOError):
            while listener.recv(4096):  # what was sent before
                pass
        time.sleep(0.2)  # hangs on purpose
        with pytest.raises(BlockingIOError):
            listener.recv(4096)
        assert await receive() == b"WATCHDOG=1"

    @pytest.mark.parametrize("usec, pid", [("20000", "1"), ("", ""), ("soon", ""), ("0", "")])
    def test_watchdog_of_somebody_else(self, supervisor: Any, usec: str, pid: str) -> None:
        env, listener = supervisor
        env.update(WATCHDOG_USEC=usec, WATCHDOG_PID=pid)
        notifier = sc.SystemdNotifier(env)
        notifier.beat()
        notifier.tell("STATUS=only this")
        assert listener.recv(4096) == b"STATUS=only this" and env == {}

    @pytest.mark.parametrize("name", ["/nonexistent/n", "@" + "x" * 200, "relative", "@", "full"])
    def test_failing_does_not_matter(self, tmp_path: Path, supervisor: Any, name: str) -> None:
        env = supervisor[0] if name == "full" else {"NOTIFY_SOCKET": name}
        env["WATCHDOG_USEC"] = "2000"  # nobody reads: the queue fills
        with ServerProcess(tmp_path, env=env) as server:
            assert server.run("sleep 0.2; echo hi")["output"] == "hi\n"


# Puts the descriptors named by its first argument at 3 and above, as systemd does.
ACTIVATOR = """if 1:
    import fcntl, os, sys
    fds = [fcntl.fcntl(int(fd), fcntl.F_DUPFD, 100) for fd in sys.argv[1].split()]
    for number, fd in enumerate(fds):
        os.dup2(fd, 3 + number)
    os.closerange(3 + len(fds), 200)
    os.environ.setdefault("LISTEN_PID", str(os.getpid()))
    os.environ["LISTEN_FDS"] = str(len(fds))
    os.execv(sys.argv[2], sys.argv[2:])
"""


def activate(*sockets: Any) -> dict[str, Any]:
    """Return how ServerProcess starts a server with these sockets, as systemd does."""
    fds = [one.fileno() for one in sockets]
    words = (sys.executable, "-c", ACTIVATOR, " ".join(map(str, fds)))
    return {"prefix": words, "pass_fds": fds}


class TestPassedSockets:
    """SPEC 12: sockets that systemd opened (sd_listen_fds(3))."""

    @pytest.mark.parametrize("loop", loops())
    def test_each_is_what_its_name_says(self, tmp_path: Path, loop: str) -> None:
        with bind() as ws, bind(address="127.0.0.2") as http, bind(address="127.0.0.3") as more:
            env = {"LISTEN_FDNAMES": "ws:http:http"}
            options = (f"--loop={loop}", "--host=0.0.0.0")  # which means nothing then
            start = activate(ws, http, more)
            with ServerProcess(tmp_path, *options, env=env, **start) as server:
                ports = [one.getsockname()[1] for one in (ws, http, more)]
                facts = server.log("listening")[0]
                assert facts["http"] == f"http://127.0.0.2:{ports[1]}"
                assert facts["ws"] == f"ws://127.0.0.1:{ports[0]}"
                assert sorted(listening_ports(server.pid)) == sorted(ports)
                assert ask_host("127.0.0.2", ports[1]) == ask_host("127.0.0.3", ports[2])
                server.port = ports[0]
                told = server.run("env; ls /proc/self/fd")["output"]
                assert "LISTEN_" not in told and told.endswith("0\n1\n2\n3\n")
                with server.websocket() as websocket:
                    websocket.send('{"type":"ping"}')
                    receive_events(websocket, lambda event: event["type"] == "pong")

    @pytest.mark.parametrize("name", ["http", "ws", "servercontrol.socket", None])
    def test_one_is_enough_for_both(self, tmp_path: Path, name: str | None) -> None:
        with bind() as one:
            env = {} if name is None else {"LISTEN_FDNAMES": name}
            with ServerProcess(tmp_path, env=env, **activate(one)) as server:
                assert server.port == server.ws_port == one.getsockname()[1]
                assert listening_ports(server.pid) == [server.port]
                assert b" 101 " in upgrade("127.0.0.1", server.port)
                assert server.run("true")["exit_code"] == 0

    def test_rules_are_those_of_the_bound_address(self, tmp_path: Path) -> None:
        """SPEC 4: a network-bound socket demands a token, whatever the options say."""
        with bind(address="0.0.0.0") as wide, bind() as narrow:
            env = {"LISTEN_FDNAMES": "http:ws", **TOKENS}
            with ServerProcess(tmp_path, env=env, **activate(wide, narrow)) as server:
                check_answer(server, 401, "GET /tasks")
                check_answer(server, 200, "GET /tasks", f"Authorization: Bearer {SERVER_RUN_TOKEN}")
                server.port = server.ws_port
                assert server.get("/tasks") == []
                ask_as_nobody(server, 401, "GET /tasks")
                assert server.log("no_tls")

    @pytest.mark.parametrize("kind", ["path", "abstract"])
    def test_unix_socket_is_for_our_account(self, kind: str) -> None:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            folder.chmod(0o755)
            path = f"{name}/s" if kind == "path" else f"\0servercontrol-{os.urandom(8).hex()}"
            with socket.socket(socket.AF_UNIX) as one:
                one.bind(path)
                one.listen()
                with UnixServer(folder, **activate(one), env=TOKENS) as server:
                    server.path = path  # not that of --unix, which means nothing then
                    assert server.log("listening")[0]["unix"] == path.replace("\0", "@")
                    assert ask(server, make_request("GET /tasks")).status == 200
                    if kind == "path":
                        Path(path).chmod(0o666)
                    ask_as_nobody(server, 401, "GET /tasks")
                assert kind == "abstract" or Path(path).is_socket()  # it is not ours to remove

    def test_who_comes_while_nobody_serves_waits(self, tmp_path: Path) -> None:
        with bind() as one:
            for _ in range(2):
                with socket.create_connection(one.getsockname(), PATIENCE_SECONDS) as early:
                    early.sendall(make_request("GET /health", "Connection: close"))
                    with ServerProcess(tmp_path, **activate(one)):
                        assert b'{"ok":true}' in read_all(early)

    def test_sockets_for_another_process_are_left_alone(self, tmp_path: Path) -> None:
        with bind() as one:
            env = {"LISTEN_PID": "1", "LISTEN_FDNAMES": "http"}
            with ServerProcess(tmp_path, env=env, **activate(one)) as server:
                assert one.getsockname()[1] not in (server.port, server.ws_port)
                assert "LISTEN_" not in server.run("env")["output"]

    @parametrize_rows("kinds, names, word", [
        ("datagrams", ["udp"], "http", "descriptor 3"),
        ("not listening", ["tcp", "idle"], "http:ws", "descriptor 4"),
        ("no socket", ["file"], "http", "descriptor 3"),
        ("two unknown names", ["tcp", "tcp"], "http:web", "FileDescriptorName="),
        ("no names", ["tcp", "tcp"], "", "FileDescriptorName="),
    ])  # fmt: skip
    def test_refused_with_status_2(self, tmp_path: Path, kinds: list[str], names: str, word: str):
        make = {
            "tcp": bind, "idle": socket.socket,
            "udp": lambda: socket.socket(type=socket.SOCK_DGRAM), "file": tempfile.TemporaryFile,
        }  # fmt: skip
        with contextlib.ExitStack() as stack:
            start = activate(*(stack.enter_context(make[kind]()) for kind in kinds))
            more = {"prefix": start["prefix"], "streams": {"pass_fds": start["pass_fds"]}}
            check_refusal(tmp_path, 2, [word], LISTEN_FDNAMES=names, **more)

    def test_by_systemds_own_activator(self, tmp_path: Path) -> None:
        with bind() as one:
            port = one.getsockname()[1]
        tool = find_program("systemd-socket-activate", "systemd")
        prefix = (tool, f"--listen=127.0.0.1:{port}", "--fdname=http")
        prefix += (f"--setenv=XDG_STATE_HOME={tmp_path}",)

        def ask_first() -> bytes:
            with socket.socket() as early:
                early.settimeout(PATIENCE_SECONDS)
                wait_until(lambda: early.connect_ex(("127.0.0.1", port)) == 0)
                early.sendall(make_request("GET /health", "Connection: close"))
                return read_all(early)

        with concurrent.futures.ThreadPoolExecutor() as pool:
            answer = pool.submit(ask_first)
            with ServerProcess(tmp_path, prefix=prefix) as server:
                assert b'{"ok":true}' in answer.result(PATIENCE_SECONDS)
                assert server.port == server.ws_port == port
                assert server.run("echo here")["output"] == "here\n"


class TestCredentials:
    """A token that systemd hands over: systemd.exec(5), CREDENTIALS."""

    @pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give a file away")
    @parametrize_rows("owner, mode, folder, is_taken", [
        ("ours", NOBODY, 0o400, "c", True), ("root's with an access list", 0, 0o440, "c", True),
        ("for all", 0, 0o444, "c", False), ("the group may write", 0, 0o460, "c", False),
        ("a third account's", 1, 0o440, "c", False), ("root's elsewhere", 0, 0o440, "other", False),
    ])  # fmt: skip
    def test_file_of_the_folder(self, owner: int, mode: int, folder: str, is_taken: bool) -> None:
        with tempfile.TemporaryDirectory() as name:
            os.chmod(name, 0o755)
            path = Path(name) / "token"
            path.write_text(SERVER_RUN_TOKEN)
            os.chown(path, owner, NOBODY)  # whose group stands for the access list
            path.chmod(mode)
            credentials = name if folder == "c" else "/run/credentials/x"

            def load() -> bytes:
                with contextlib.suppress(sc.ConfigError):
                    return sc.load_token_file("X", str(path), credentials).encode()
                return b""

            assert as_nobody(load) == (SERVER_RUN_TOKEN.encode() if is_taken else b"")


# Real runs -----------------------------------------------------------------------------------

README = HERE / "README.md"
DOCS = [README, *sorted((HERE / ".github" / "docs").glob("*.md"))]


def read_docs() -> str:
    return "\n".join(path.read_text() for path in DOCS)


def read_example(name: str) -> str:
    """Return a program that stands in the README or a document below its `example` comment."""
    pattern = rf"<!-- example: {re.escape(name)} -->\n```\w+\n(.*?)```"
    match = re.search(pattern, read_docs(), re.DOTALL)
    assert match, name
    return match.group(1)


def node_command() -> list[str] | None:
    """Return how to run Node with its own WebSocket client, or None."""
    for command in (["node"], ["node", "--experimental-websocket"]):
        probe = [*command, "-e", "process.exit(typeof WebSocket === 'function' ? 0 : 1)"]
        if shutil.which("node") and subprocess.run(probe, capture_output=True).returncode == 0:
            return [*command, "--no-warnings"]
    return None


# What a real job writes: thousands of lines, colours, a progress line, UTF-8, both streams.
REAL_JOB = """
{python} -m compileall -f -d 'Übersetzung→' -q -x /test/ /nowhere; {python} -m compileall -f {source}
ls -lR --color=always {source} | head -5000
for n in 1 25 50 75 100; do printf '\\r\\033[32m%3d %%\\033[0m █' $n; done; echo; echo fertig ✓ >&2
"""

NODE_COLLECTOR = """
const socket = new WebSocket(process.argv[1]);
socket.onopen = () => socket.send('{"type":"hello"}');
let output = "";
socket.onmessage = (message) => {
  const event = JSON.parse(message.data);
  if (event.type === "hello") console.error("open");
  if (event.type === "task_output") output += event.output;
  if (event.type === "task_complete") socket.close(1000);
};
socket.onclose = ({ code }) => process.stdout.write(output, () => process.exit(code - 1000));
"""


# Client --------------------------------------------------------------------------------------


def run_client(*arguments: str, stdin=b"", prefix=(), script="", streams=None, **env: str) -> Any:
    """Run a command to its end, with no list of servers unless `env` names one."""
    given = {"stdin": subprocess.PIPE if isinstance(stdin, bytes) else stdin, **(streams or {})}
    options = {"prefix": prefix, "script": script, "env": env, **given}
    with running_client(*arguments, **options) as process:
        told = stdin if given["stdin"] == subprocess.PIPE else None
        shown, errors = process.communicate(told, PATIENCE_SECONDS * 3)
    assert b"Traceback" not in (errors or b""), errors
    return subprocess.CompletedProcess(process.args, process.returncode, shown, errors)


def check_command(status: int, told: str, *arguments: str, **options: Any) -> str:
    """Run a command, which must end with this status and tell this; return its output."""
    finished = run_client(*arguments, **options)
    assert finished.returncode == status and told in finished.stderr.decode(), finished
    return (finished.stdout or b"").decode()


@contextlib.contextmanager
def running_client(*arguments: str, **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A client command while it runs."""
    env = {**os.environ, "SERVERCONTROL_HOSTS": "/nonexistent/hosts", **options.pop("env", {})}
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    python = (sys.executable, str(options.pop("script", "") or compiled_script()))
    command = [*options.pop("prefix", ()), *python, *arguments]
    process = start_python(command, env, **{**streams, **options})
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                stream.close()


@contextlib.contextmanager
def ending_client(status: Any, told: str, *arguments: str, **options: Any) -> Iterator[Any]:
    """A command while it runs. It must end with this status, or one of these, and tell this, or
    nothing; what was read in between does not count."""
    with running_client(*arguments, **options) as process:
        yield process
        ends = status if isinstance(status, tuple) else (status,)
        assert process.wait(PATIENCE_SECONDS) in ends
        shown = process.stderr.read().decode()
        assert told in shown if told else not shown


def write_hosts(folder: Path, *lines: str) -> str:
    path = folder / "hosts"
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def listing(hosts: str) -> contextlib.AbstractContextManager[Any]:
    """Make this process take its servers from that list."""
    return mock.patch.dict(os.environ, SERVERCONTROL_HOSTS=hosts)


def write_token(folder: Path, name: str, token: str) -> str:
    path = folder / name
    path.write_text(token + "\n")
    path.chmod(0o600)
    return str(path)


def count_unread(pipe: int) -> int:
    return int(struct.unpack("i", fcntl.ioctl(pipe, termios.FIONREAD, b"    "))[0])


class Place:
    """What listens on a loopback port and takes each connection that comes."""

    place = ServerProcess.place
    take: Callable[[socket.socket], None]

    def __init__(self) -> None:
        self.listener = bind()
        self.port = self.listener.getsockname()[1]
        self.thread = threading.Thread(target=self._accept, daemon=True)

    def __enter__(self) -> Any:
        self.thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        # Closing it wakes no thread that waits for a connection, and such a thread may take those
        # of the next socket that gets the same descriptor.
        self.listener.shutdown(socket.SHUT_RDWR)
        self.thread.join()
        self.listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # it was shut down
            while True:
                self.take(self.listener.accept()[0])


class Cutter(Place):
    """A TCP proxy in front of a server that cuts connections.

    choose: gives for connection number N how many bytes of the server's answer go through before
    it is cut, None for all of them. stalls: then it is not cut, but stands still until `resumed`.
    """

    def __init__(self, port: int, choose: Any, stalls: bool = False) -> None:
        super().__init__()
        self.target, self.choose, self.stalls = port, choose, stalls
        self.resumed = threading.Event()
        self.change: Callable[[bytes], bytes] = bytes
        # Connections so far, those that were cut, and those that are open.
        self.count = self.cut = 0
        self.open: list[socket.socket] = []

    def __exit__(self, *_: Any) -> None:
        super().__exit__()
        self.resumed.set()
        self.cut_all()

    def cut_all(self) -> None:
        for one in self.open[:]:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def take(self, client: socket.socket) -> None:
        try:
            server = socket.create_connection(("127.0.0.1", self.target))
        except OSError:
            client.close()
            return
        self.open += [client, server]
        limit = self.choose(self.count)
        self.count += 1
        for pair in ((client, server, None), (server, client, limit)):
            threading.Thread(target=self._pump, args=pair, daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, limit: int | None) -> None:
        with contextlib.suppress(OSError):
            while True:
                data = self.change(source.recv(65536))
                if limit is not None and len(data) >= limit:
                    sink.sendall(data[:limit])
                    self.cut += 1
                    if not self.stalls:
                        break
                    self.resumed.wait()
                    data, limit = data[limit:], None
                if not data:
                    break
                limit = None if limit is None else limit - len(data)
                sink.sendall(data)
        for one in (source, sink):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        with contextlib.suppress(ValueError):
            self.open.remove(source)
        source.close()


class Impostor(Place):
    """Something that listens, keeps what it is sent, and answers what it is told to."""

    def __init__(self, answer: bytes) -> None:
        super().__init__()
        self.answer = answer
        self.received: list[bytes] = []

    def take(self, connection: socket.socket) -> None:
        connection.settimeout(PATIENCE_SECONDS)
        threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection:
            request = connection.recv(65536)
            if request:  # else it was cancelled as soon as it was connected
                self.received.append(request)
                self.serve(connection, request)

    def serve(self, connection: socket.socket, request: bytes) -> None:
        connection.sendall(self.answer)


class Player(Impostor):
    """Speaks the protocol well enough to be followed: path -> answer, or the JSON of one, or what
    is answered at first and then."""

    def __init__(self, answers: dict[str, Any]) -> None:
        super().__init__(b"")
        info, task = {"boot_id": "b"}, {"state": "running", "output_bytes": 3}
        own = {"/info": info, "/exec": STREAM, "/logs": STREAM, "/tasks": task}
        self.answers: dict[str, Any] = {**own, **answers}

    def serve(self, connection: socket.socket, request: bytes) -> None:
        path = re.split(rb"[ ?]", request)[1].decode()
        answer = self.answers.get(path, b"")
        if isinstance(answer, tuple):
            answer, self.answers[path] = answer
        is_json = not isinstance(answer, bytes)
        connection.sendall(OK + json.dumps(answer).encode() if is_json else answer)


OK = b"HTTP/1.0 200 OK\r\n\r\n"
STREAM = b"HTTP/1.0 200 OK\r\nX-Task-Id: 1\r\nX-Offset: 0\r\n\r\nhi\n"
ENDED = {"state": "done", "exit_code": 0, "output_bytes": 3}
# what: what Player answers
NONSENSE: dict[str, dict[str, Any]] = {
    "a length that is none": {"/info": b"HTTP/1.0 200 OK\r\nContent-Length: x\r\n\r\n{}"},
    "a length of no server": {"/info": OK[:-2] + b"Content-Length: 99999999999\r\n\r\n{}"},
    "a list": {"/info": []}, "nothing": {"/info": b""}, "SSH": {"/info": b"SSH-2.0-x\r\n\r\n"},
    "deep JSON": {"/info": OK + b"[" * 100_000},
    "a huge number": {"/info": OK + b'{"boot_id":' + b"9" * 5000 + b"}"}, "no run": {"/info": {}},
    "no task": {"/exec": OK},
    "a task id for a request": {"/exec": STREAM.replace(b": 1", b": 1 HTTP/1.1")},
    "an infinite offset": {"/exec": STREAM.replace(b": 0", b": 1e999")},
    "a message for a terminal": {"/exec": b'HTTP/1.0 403 No\r\n\r\n{"message":"\\u001b[2J"}'},
    "an exit code of 300": {"/tasks": {**ENDED, "exit_code": 300}},
    "an exit code of text": {"/tasks": {**ENDED, "exit_code": "\x1b[2J"}},
    "no exit code": {"/tasks": {**ENDED, "exit_code": None}},
    "no length": {"/tasks": {**ENDED, "output_bytes": None}},
    "an infinite length": {"/tasks": OK + b'{"state":"done","output_bytes":1e999}'},
    "no state": {"/tasks": {**ENDED, "state": None}},
    "kept output that is none": {"/tasks": {**ENDED, "output_bytes": 4}, "/logs": OK},
}  # fmt: skip


# text: the fields of a ServerAddress, from host on
TARGETS: dict[str, tuple[Any, ...]] = {
    "web1": ("web1", 8080), "web1:81": ("web1", 81), "10.0.0.1": ("10.0.0.1", 8080),
    "web1:": ("web1", 8080),  # RFC 3986, 3.2.3
    "::1": ("::1", 8080), "[::1]": ("::1", 8080), "[::1]:81": ("::1", 81),
    "fe80::1%eth0": ("fe80::1%eth0", 8080),
    "https://[fe80::1%25eth0]:81/": ("fe80::1%eth0", 81, True),
    "http://web1": ("web1", 80), "http://web1:8080/": ("web1", 8080), "HTTP://Web1:08/": ("web1", 8),
    "https://web1/sc/": ("web1", 443, True, "/sc"),
    "ws://web1:8082": ("web1", 8082), "wss://web1": ("web1", 443, True),
    **{path: ("", 0, False, "", path) for path in ("/run/sc.sock", "./a", "../a", "//web1")},
    "unix:/run/unix:x": ("", 0, False, "", "/run/unix:x"),
}  # fmt: skip
NO_TARGETS = (
    *("", "web1:x", "web1:70000", "web1/x", "ftp://web1", "http://", "http:///x", ":80"),
    *("unix:", "unix://", "web1:0", "http://web1:0/", "web1:-1", "http:web1", "?", "#a"),
    *("http://me:pw@web1", "http://:pw@web1", "http://@web1", "http://web1/?a", "http://web1/#a"),
    *("we b1", "[::1", "wéb", "a\x1b[m"),
)


class TestTargets:
    """SPEC 11: how servers are named, and what is believed of them."""

    @pytest.mark.parametrize("text", TARGETS)
    def test_names_a_server(self, text: str) -> None:
        target = sc.parse_server("name", text)
        assert target == sc.ServerAddress("name", *TARGETS[text])
        if not target.unix:  # what is shown means the same
            assert sc.parse_server("name", target.url) == target
            assert b"%" not in sc.encode_request(target, "GET", "/", b"", "1.1", {})

    @pytest.mark.parametrize("text", NO_TARGETS)
    def test_says_what_is_no_server(self, text: str) -> None:
        with pytest.raises(sc.ConfigError) as caught:
            sc.parse_server("name", text)
        assert str(caught.value).isprintable()

    def test_reads_the_list(self) -> None:
        text = "# mine\n\n web1\thttp://a:1  t.token \nweb2 b:2\n"
        one, two = sc.parse_hosts(text, "hosts").values()
        assert (one.url, one.token_file) == ("http://a:1", "t.token")
        assert (two.url, two.token_file) == ("http://b:2", "")

    @pytest.mark.parametrize("text, told", [
        *((text, "line 1: ") for text in ("web1", "a ht!tp://x", "a\x07 b:1", "a b:x")),
        ("a b:1\n\na b:1", "line 3: 'a' stands in line 1 of hosts already"),
    ])  # fmt: skip
    def test_names_the_bad_line(self, text: str, told: str) -> None:
        with pytest.raises(sc.ConfigError, match=f"^hosts: {told}"):
            sc.parse_hosts(text, "hosts")

    @in_loop
    async def test_wants_http(self) -> None:
        for head in (b"", b"SSH-2.0-x", b"HTTP/2 200", b"HTTP/1.1 2x0", b"\x15\x03\x01", b"\r\n"):
            reader = asyncio.StreamReader()
            reader.feed_data(head + b"\r\n\r\n")
            with pytest.raises(sc.UnreachableError, match="does not speak HTTP"):
                await sc.read_response_head(reader, sc.parse_server("", "web1"))

    def test_shows_no_control_characters(self) -> None:
        assert sc.clean_text("a\x1b[31mb\nc\u202e") == "a?[31mb?c?"
        assert sc.clean_text("x" * 10, 4) == "xxx…"

    @pytest.mark.parametrize("data", [
        b"", b"{}", b"[]", b"\xff\xfe", b"[" * 200, b'{"type":"X","port":80,"ws_port":81}',
        *(b'{"type":"SERVER_RESPONSE"%b}' % ports for ports in (
            b"", b',"port":0,"ws_port":1', b',"port":"80","ws_port":1', b',"port":true,"ws_port":1',
            b',"port":80,"ws_port":65536',
        )),
    ])  # fmt: skip
    def test_takes_no_false_reply(self, data: bytes) -> None:
        assert sc.parse_discovery_reply(data, "10.0.0.1") is None

    def test_takes_any_datagram(self) -> None:
        """Half-right replies of all kinds: nothing but None or a clean reply comes out."""
        chance = random.Random(3)
        whole = {"type": "SERVER_RESPONSE", "hostname": "a", "port": 80, "ws_port": 81}
        values = (None, True, -1, 0, 65536, 1e300, 10**30, [], {}, [[1]], "\x1b[2J\n", "\ud800")
        taken = 0
        for _ in range(3000):
            facts: dict[str, Any] = {**whole, "version": "1", "tls": False}
            facts[chance.choice(list(facts))] = chance.choice(values)
            data = bytearray(json.dumps(facts).encode())
            for _ in range(chance.randrange(3)):
                data[chance.randrange(len(data))] = chance.randrange(256)
            found = sc.parse_discovery_reply(bytes(data), "10.0.0.1")
            if found is not None:
                taken += 1
                assert found["hostname"].isprintable() and found["version"].isprintable()
                assert re.fullmatch(r"https?://10\.0\.0\.1:\d+", found["url"]), found
                assert sc.format_found(sc.merge_replies([found])).count("\n") == 2
                with listing("/nonexistent"):
                    assert sc.list_new(sc.merge_replies([found])).isascii()
        assert taken > 300
        assert sc.parse_discovery_reply(b'{"a":' + b"[" * 2000, "10.0.0.1") is None

    def test_believes_only_the_form_of_a_reply(self) -> None:
        facts = {"type": "SERVER_RESPONSE", "port": 80, "ws_port": 81, "url": "http://evil/"}
        facts.update(address="evil", hostname="a\x1bb" + "x" * 99, version=[1], tls="yes", exec=1)
        found = sc.parse_discovery_reply(json.dumps(facts).encode(), "10.0.0.1")
        assert (found["address"], found["url"]) == ("10.0.0.1", "http://10.0.0.1:80")
        assert found["hostname"].startswith("a?b") and len(found["hostname"]) == 64
        assert (found["tls"], found["exec"]) == (False, False)

    def test_makes_names_that_nothing_evaluates(self, tmp_path: Path) -> None:
        names = ("{{ lookup('pipe','id') }}", "a\nb", "web1", "web1", "", "$(id)", "..")
        url: dict[str, Any] = {"port": 80, "url": "u:1", "urls": []}
        found = [
            {"hostname": name, "address": f"10.0.0.{n}", "tls": n == 2, "auth": n != 3, **url}
            for n, name in enumerate(names)
        ]
        named = sc.name_hosts(found)
        assert len(named) == len(names)
        assert all(re.fullmatch(r"[A-Za-z0-9.-]+", name) for name in named)
        listed = json.loads(sc.format_prometheus(found))
        assert [one["targets"] for one in listed] == [[f"10.0.0.{n}:80"] for n in range(7)]
        assert [one["labels"]["__scheme__"] for one in listed].index("https") == 2
        hosts = json.loads(sc.format_ansible(found))["all"]["children"]["servercontrol"]["hosts"]
        assert "{" not in "".join(hosts)
        (tmp_path / "id.token").touch()
        with listing(write_hosts(tmp_path, "a-b http://10.9.9.9:80")):
            lines = sc.parse_hosts(sc.list_new(found), "")
        files = {name: target.token_file for name, target in lines.items()}
        assert list(files.items())[1:] == [
            *[("a-b-10.0.0.1-80", "a-b-10.0.0.1-80.token"), ("web1", "web1.token")],
            *[("web1-10.0.0.3-80", ""), ("10.0.0.4", "10.0.0.4.token")],
            *[("id", ""), ("10.0.0.6", "10.0.0.6.token")],
        ]

    def test_makes_no_name_that_means_another(self) -> None:
        names = ("localhost", "LOCALHOST.localdomain", "127.0.0.1", "10.0.0.1", "web1", "web1")
        places = [f"10.0.0.{n}" for n in range(len(names))]
        found = [{"hostname": n, "address": a, "port": 80} for n, a in zip(names, places)]
        own = ["10.0.0.0", "10.0.0.1", "10.0.0.2", "10.0.0.3", "web1"]
        assert list(sc.name_hosts(found)) == [*own, "web1-10.0.0.5-80"]
        taken = {"web1", "web1-10.0.0.4-80", "web1-10.0.0.4-80-2"}
        more = ["web1-10.0.0.4-80-3", "web1-10.0.0.5-80"]
        assert list(sc.name_hosts(found, taken)) == [*own[:4], *more]

    def test_localhost_is_this_machine(self, tmp_path: Path) -> None:
        """Unless it is named, and the list names another."""
        hosts = write_hosts(tmp_path, "localhost http://10.0.0.9:80")
        for names, url in ([], "http://localhost:8080"), (["localhost"], "http://10.0.0.9:80"):
            given = sc.build_parser("exec").parse_args(names)
            with listing(hosts):
                assert [one.url for one in sc.choose_servers(given)] == [url]

    def test_shows_a_server_once_with_all_its_addresses(self) -> None:
        reply = {"type": "SERVER_RESPONSE", "hostname": "a", "ws_port": 9, "tls": True}
        one, two = "0123456789abcdef", "fedcba9876543210"
        places = [("127.0.0.1", 1, one), ("10.0.0.2", 1, one), ("10.0.0.1", 1, one)]
        places += [("127.0.0.1", 2, two), ("10.0.0.1", 2, one), ("10.0.0.1", 3, two)]
        places += [("127.0.0.1", 3, ""), ("10.0.0.1", 3, "X" * 16), ("10.0.0.9", 3, 5)]
        replies = []
        for address, port, run in places:
            data = json.dumps({**reply, "port": port, "id": run}).encode()
            replies.append(sc.parse_discovery_reply(data, address))
        found = sc.merge_replies(replies)
        assert [[url.partition("://")[2] for url in one["urls"]] for one in found] == [
            ["10.0.0.1:1", "10.0.0.2:1", "127.0.0.1:1"], ["10.0.0.1:2"], ["10.0.0.1:3"],
            ["10.0.0.1:3"], ["10.0.0.9:3"], ["127.0.0.1:2"], ["127.0.0.1:3"],
        ]  # fmt: skip
        assert all(one["url"] == one["urls"][0] for one in found)
        table = sc.format_found(found).splitlines()
        assert table[1].endswith("  https://10.0.0.2:1 https://127.0.0.1:1")
        assert all(line.endswith(" no") for line in table[2:])


@pytest.fixture(scope="class")
def plain_server(tmp_path_factory: Any) -> Iterator[ServerProcess]:
    with ServerProcess(tmp_path_factory.mktemp("state")) as server:
        yield server


@pytest.fixture()
def place(plain_server: ServerProcess) -> str:
    return plain_server.place


@pytest.fixture()
def both(place: str, plain_server: ServerProcess) -> tuple[str, str]:
    """Two names of one server."""
    return place, f"localhost:{plain_server.port}"


@pytest.fixture()
def new_tasks(plain_server: ServerProcess) -> Callable[[], list[dict[str, Any]]]:
    """What returns the tasks that the test has started."""
    before = len(plain_server.get("/tasks"))
    return lambda: plain_server.get("/tasks")[before:]


# An INT is lost on dash in the moment before it executes its command; then comes the KILL.
INTERRUPTED = (128 + signal.SIGINT, 128 + signal.SIGKILL)


class TestExec:
    """SPEC 11: `exec`."""

    @pytest.mark.parametrize("words, status, output", [
        (["echo a; echo b >&2; exit 7"], 7, b"a\nb\n"),
        (["printf", "%s|", "a  b", "$HOME", "*", "'"], 0, b"a  b|$HOME|*|'|"),
        (["kill -9 $$"], 137, b""), (["true"], 0, b""),
        (["printf 'a\\000\\033\\r\\n'"], 0, b"a\0\x1b\r\n"),
        (["printf 'p\\303\\244\\357\\277\\275'"], 0, "pä\ufffd".encode()),
    ])  # fmt: skip
    def test_is_as_if_run_here(self, place: str, words: list[str], status: int, output: bytes):
        finished = run_client("exec", place, "--", *words)
        assert (finished.returncode, finished.stdout, finished.stderr) == (status, output, b"")

    def test_says_that_output_was_no_text(self, place: str) -> None:
        told = "part of the output is no UTF-8 and was replaced: send that by base64"
        words = ("exec", place, "--", "printf 'p\\303\\244\\377'; exit 3")
        assert check_command(3, f"servercontrol: {place}: {told}\n", *words) == "pä\ufffd"

    @pytest.mark.parametrize("count, size", [(1, 75), (2, 15)])
    def test_gives_every_byte(self, both, tmp_path: Path, count: int, size: int) -> None:
        """100 or 20 MB, far more than the server keeps; and who reads them pauses."""
        places, data = both[:count], base64.encodebytes(random.Random(1).randbytes(size * 10**6))
        (tmp_path / "data").write_bytes(data)
        told = "2 exit code 0" if count == 2 else ""
        with ending_client(0, told, "exec", *places, "--", f"cat {tmp_path}/data") as process:
            got = process.stdout.read(10_000_000)
            wait_until(lambda: count_unread(process.stdout.fileno()) > 60_000)
            time.sleep(1)
            got += process.stdout.read()
        width = max(map(len, places))
        for name in places:
            prefix = f"{name:{width}} | ".encode() if count > 1 else b""
            own = [line[len(prefix) :] for line in got.splitlines(True) if line.startswith(prefix)]
            assert b"".join(own) == data

    def test_folds_what_is_equal(self, both: Any) -> None:
        words = ("exec", "--fold", *both, "127.0.0.1:1", "--", "echo same; exit 3")
        names = ", ".join(both)
        summary = f"3 servers: 2 exit code 3 ({names}); 1 not started (127.0.0.1:1)"
        shown = check_command(125, summary, *words)
        assert shown == f"── {names} (2 servers, exit code 3)\nsame\n"

    def test_runs_once_on_a_server_that_is_listed_twice(self, plain_server, new_tasks, tmp_path):
        port = plain_server.port
        lines = (f"web1 127.0.0.1:{port}", f"web2 localhost:{port}", f"web3 127.0.0.1:{port}")
        env = {"SERVERCONTROL_HOSTS": write_hosts(tmp_path, *lines)}
        finished = run_client("exec", "--all", "--", "echo hi; exit 3", **env)
        assert finished.returncode == 3
        assert re.fullmatch(rb"web[123] \| hi\n", finished.stdout)
        assert finished.stderr.count(b"): the same server as web") == 2
        assert re.search(rb"3 servers: 1 exit code 3 \(.*\); 2 listed twice", finished.stderr)
        assert len(new_tasks()) == 1

    def test_receives_its_own_output_alone(self, plain_server: ServerProcess) -> None:
        floods = [plain_server.start("yes") for _ in range(8)]
        with Cutter(plain_server.port, lambda _: 3000) as cutter:  # of each connection
            finished = run_client("exec", cutter.place, "--", "sleep 0.5; echo hi")
            assert (finished.stdout, cutter.cut, cutter.count) == (b"hi\n", 0, 2)
        for task_id in floods:
            plain_server.end(task_id)

    def test_runs_so_many_at_a_time(self, tmp_path: Path) -> None:
        with contextlib.ExitStack() as stack:
            servers = [stack.enter_context(ServerProcess(tmp_path / str(n))) for n in range(3)]
            names = [server.place for server in servers]
            command = f"mkdir {tmp_path}/lock && sleep 0.2 && rmdir {tmp_path}/lock"
            check_command(0, "", "exec", *names, "--parallel=1", "--", command)
            check_command(1, "", "exec", *names, "--", command)

    @pytest.mark.parametrize("what", NONSENSE)
    def test_takes_no_nonsense(self, what: str) -> None:
        with Player(NONSENSE[what]) as player:
            finished = run_client("exec", player.place, "--", "true")
        assert finished.returncode == 125 and finished.stdout in (b"", b"hi\n")
        assert finished.stderr.count(b"\n") == 1 and b"\x1b" not in finished.stderr
        assert finished.stderr.startswith(b"servercontrol: 127.0.0.1:")

    def test_ends_an_answer_without_end(self) -> None:
        class Flood(Player):
            def serve(self, connection: socket.socket, request: bytes) -> None:
                connection.sendall(OK)
                while True:
                    connection.sendall(b"x" * 1_000_000)

        with Flood({}) as flood:
            check_command(125, "not answer like Server", "exec", flood.place, "--", "true")

    @pytest.mark.parametrize("name, reason", [
        ("127.0.0.1:1", "connection refused"), ("no-such-host.invalid", "no such host"),
        ("web1..x", "no such host"), ("/nonexistent/socket", "no such file"),
    ])  # fmt: skip
    def test_names_what_is_not_reached(self, name: str, reason: str) -> None:
        check_command(125, reason, "exec", name, "--", "true")

    @pytest.mark.parametrize("option, status", [("--no-exec", 403), ("--max-tasks=1", 429)])
    def test_names_what_is_refused(self, tmp_path: Path, option: str, status: int) -> None:
        with ServerProcess(tmp_path, option) as server:
            server.execute("sleep 60")
            check_command(125, f": {status}: ", "exec", server.place, "--", "true")

    @in_loop
    async def test_what_nobody_asked_for_is_no_answer(self, tmp_path: Path) -> None:
        """As a proxy's 408 before it closes an idle connection."""
        connections: list[Any] = []

        async def serve(reader: Any, writer: Any) -> None:
            connections.append(writer.get_extra_info("socket"))
            body = b'{"n":%d}' % len(connections)
            for answered in itertools.count(1):
                await reader.readuntil(b"\r\n\r\n")
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\n" + body)
                if (len(connections), answered) == (1, 2):
                    writer.write(b"HTTP/1.1 408 Request Time-out\r\nContent-Length: 0\r\n\r\n")

        path = str(tmp_path / "socket")  # what is sent over it is there at once
        async with await asyncio.start_unix_server(serve, path):
            control = sc.Control(sc.parse_server("a", path))
            both = await asyncio.gather(control.ask("GET", "/a"), control.ask("GET", "/b"))
            assert both == [{"n": 1}] * 2
            await asyncio.sleep(0.3)
            assert await control.ask("GET", "/c") == {"n": 2}
            assert await control.ask("GET", "/d") == {"n": 2}  # it is kept
            connections[-1].shutdown(socket.SHUT_WR)  # the event loop has not read this yet
            assert await control.ask("GET", "/e") == {"n": 3}
            control.close()

    def test_shows_a_token_only_where_it_belongs(self, tmp_path: Path) -> None:
        write_token(tmp_path, "right", SERVER_RUN_TOKEN)
        wrong = write_token(tmp_path, "wrong", "another-token-of-somebody")
        with TokenServer(tmp_path / "state") as server, Impostor(b"") as impostor:
            place, other = server.place, impostor.place
            lines = (f"web1 http://{place} right", f"web2 {other}", f"web3 {place} wrong")
            env = {"SERVERCONTROL_HOSTS": write_hosts(tmp_path, *lines)}
            check_command(125, "401: it needs a token", "exec", place, "--", "true")
            check_command(125, f"(the one in {wrong})", "exec", "web3", "--", "true", **env)
            for names in (["web1"], [place], [f"http://{place}/"]):
                assert run_client("exec", *names, "--", "true", **env).returncode == 0, names
            check_command(4, "", "exec", place, f"--token-file={tmp_path}/right", "--", "exit 4")
            check_command(125, "", "exec", "--all", "--", "true", **env)
            run_client("exec", "web2", other, "--", "true", **env)
            assert len(impostor.received) == 3
            assert SERVER_RUN_TOKEN.encode() not in b"".join(impostor.received)

    def test_takes_the_token_of_the_name(self, tmp_path: Path) -> None:
        """A server may be listed twice, for both roles; a listed token goes before --token-file."""
        write_token(tmp_path, "run", SERVER_RUN_TOKEN)
        write_token(tmp_path, "other", "another-token-of-somebody")
        with Impostor(b"") as impostor:
            url = f"http://{impostor.place}"
            bare = f"bare http://localhost:{impostor.port}"
            lines = (f"look {url} other", f"web1 {url} run", bare)
            env = {"SERVERCONTROL_HOSTS": write_hosts(tmp_path, *lines)}
            option = f"--token-file={tmp_path}/other"
            for names in (["web1"], ["web1", option]):
                run_client("exec", *names, "--", "true", **env)
                assert SERVER_RUN_TOKEN.encode() in impostor.received[-1]
            run_client("exec", "bare", "--", "true", **env)
            assert b"Authorization" not in impostor.received[-1]
            run_client("exec", "bare", option, "--", "true", **env)
            assert b"Bearer another-token" in impostor.received[-1]

    def test_follows_no_redirect(self, tmp_path: Path) -> None:
        token = write_token(tmp_path, "right", SERVER_RUN_TOKEN)
        with Impostor(b"") as there:
            moved = f"HTTP/1.1 307 Moved\r\nLocation: http://127.0.0.1:{there.port}/\r\n\r\n"
            with Impostor(moved.encode()) as here:
                check_command(125, "", "exec", here.place, f"--token-file={token}", "--", "true")
        assert here.received and not there.received

    @pytest.mark.parametrize("arguments, told", [
        (["exec", "web1", "uptime"], "exec: the command stands behind --, as in: exec web1 "),
        (["exec", "--all", "uname", "-r"], "exec: the command stands behind --, as in: exec "),
        (["exec", "web1", "--"], "exec: no command behind --, as in: exec web1 -- date"),
        (["exec", "web1,web2", "--", "x"], "'web1,web2' is no server: say host"),
        (["exec", "--all", "--", "true"], "--all: no server is listed; write lines"),
        (["exec", "a", "b", "--tty", "--", "true"], "--tty: a terminal is of one server"),
        (["exec", "a", "--parallel=0", "--", "x"], "--parallel: "),
        (["exec", "a", "--timeout=x", "--", "x"], "--timeout: "),
        (["exec", "a", "--", ""], "exec: the command is empty"),
        (["exec", "a", "--", "x" * 70000], "exec: a command may have 65536 bytes"),
        (["exec", "http://a/?b", "--", "x"], "'http://a/?b' is no server"),
        (["exec", "a", "--token-file=/nonexistent/t", "--", "x"], "--token-file: /nonexist"),
        (["monitor", "--log=/nonexistent/x"], "--log: /nonexistent/x: No such file"),
        (["monitor", "--log="], "--log: name a file"),
        (["monitor", "--log=-"], "--log: name a file"),
        (["monitor", "--cpu-alert=x"], "--cpu-alert: "),
        (["discover", "--at=127.0.0.1", "--at=127.0.0.1:80"], "--at: 127.0.0.1:80: "),
        (["discover", "--json", "--hosts"], "--hosts: not allowed with argument --json"),
        (["frobnicate"], "'frobnicate' is no command (see --help)"),
        (["unit", "--port=x"], "--port: "), (["unit", "--user"], "--user: "),
        (["unit", "--bogus"], "unrecognized arguments: --bogus"),
        (["unit", "serve"], "unrecognized arguments: serve"),
        (["unit", "--user=no such account"], "--user: there is no account"),
    ])  # fmt: skip
    def test_names_a_bad_option(self, arguments: list[str], told: str) -> None:
        finished = run_client(*arguments)
        assert (finished.returncode, finished.stdout) == (2, b"")
        assert finished.stderr.decode().startswith(f"servercontrol: {told}")
        assert finished.stderr.count(b"\n") == 1

    def test_list_may_have_comments_and_a_broken_token(self, place: str, tmp_path: Path) -> None:
        """What is wrong with a server's token hinders nothing that is done with the others."""
        with Impostor(b"") as impostor:
            bad = f"server2 {impostor.place} gone.token"
            lines = (f"\ufeffweb1 http://{place} # one", bad, "  # web3 web3 x")
            env = {"SERVERCONTROL_HOSTS": write_hosts(tmp_path, *lines)}
            for name in ("web1", place):
                check_command(3, "", "exec", name, "--", "exit 3", **env)
            told = "gone.token: No such file or directory; copy the server"
            for name, shown in ("server2", ""), ("--all", "web1    | hi\n"):
                assert check_command(125, told, "exec", name, "--", "echo hi", **env) == shown
            assert b"".join(impostor.received) == b""
            os.chmod(write_token(tmp_path, "gone.token", SERVER_RUN_TOKEN), 0o644)
            check_command(125, "chmod 600", "exec", "server2", "--", "true", **env)

    def test_takes_a_token_by_variable_and_pipe(self, place: str, plain_server, tmp_path: Path):
        right = state_file(plain_server, "token").read_text().strip()
        token = write_token(tmp_path, "token", right)
        if os.geteuid() == 0:
            os.chown(token, NOBODY, NOBODY)  # root may use the token of a service
        command, wrong = (place, "--", "true"), "another-token-of-somebody"
        for value, status in (right, 0), (wrong, 125), ("short", 2):
            check_command(status, "", "exec", *command, SERVERCONTROL_TOKEN=value)
        env = {"SERVERCONTROL_TOKEN": wrong}
        check_command(0, "", "exec", f"--token-file={token}", *command, **env)
        line = f'"$@" --token-file <(cat {token}) {place} -- true'
        check_command(0, "", "exec", prefix=("bash", "-c", line, "bash"), **env)

    def test_sends_input(self, place: str, both: Any, tmp_path: Path) -> None:
        data = b"0123456\n" * 300_000
        (tmp_path / "data").write_bytes(data)
        for stdin in (data, (tmp_path / "data").open("rb")):
            words = ("exec", place, "--stdin", "--", "md5sum; exit 3")
            assert hashlib.md5(data).hexdigest() in check_command(3, "", *words, stdin=stdin)
        for stdin in (b"", subprocess.DEVNULL):
            assert run_client("exec", place, "--stdin", "--", "wc -c", stdin=stdin).stdout == b"0\n"
        # One that reads nothing, and ends.
        assert run_client("exec", place, "--stdin", "--", "sleep 0.1", stdin=data).returncode == 0
        # Without --stdin there is none.
        assert run_client("exec", place, "--", "wc -c", stdin=b"x").stdout == b"0\n"
        words = ("exec", *both, "--stdin", "--fold", "--", "wc -l")  # both get the same
        assert b"(2 servers, exit code 0)\n2\n" in run_client(*words, stdin=b"a\nb\n").stdout

    def test_tells_what_is_no_input(self, place: str, both: Any) -> None:
        with open(os.devnull, "wb") as unreadable:
            finished = run_client("exec", place, "--stdin", "--", "cat", stdin=unreadable)
            assert finished.returncode in INTERRUPTED
            assert b": its input is not complete (bad file descriptor); st" in finished.stderr
            told = "servercontrol: standard input: Bad file descriptor\n"
            check_command(1, told, "exec", *both, "--stdin", "--", "cat", stdin=unreadable)
        closed = f"exec '{sys.executable}' '{SCRIPT}' exec {place} --stdin -- wc -c <&-"
        assert subprocess.run(closed, shell=True, stdout=-1, timeout=60).stdout == b"0\n"

    def test_stops_in_time(self, place: str, plain_server: ServerProcess) -> None:
        told = f"servercontrol: {place}: stopped: it took longer than --timeout allows\n"
        check_command(128 + signal.SIGTERM, told, "exec", place, "--timeout=0.2", "--", "sleep 60")
        task = plain_server.get("/tasks")[-1]
        assert (task["state"], task["killed_by"]) == ("timeout", None)

    def test_tells_who_killed_it(self, place: str, plain_server, new_tasks) -> None:
        with running_client("exec", place, "--", "echo hi; sleep 63") as process:
            assert process.stdout.readline() == b"hi\n"
            kill_task(plain_server, new_tasks()[0]["task_id"])
            assert process.wait(PATIENCE_SECONDS) == 128 + signal.SIGTERM
            by = rf"127\.0\.0\.1:[0-9]+ run uid={os.geteuid()}"
            told = rf"servercontrol: {place}: the command was killed by {by}\n"
            assert re.fullmatch(told, process.stderr.read().decode())

    @pytest.mark.parametrize("count", [1, 2])
    def test_ends_with_a_closed_pipe(self, both: Any, new_tasks: Any, count: int) -> None:
        with ending_client(128 + signal.SIGPIPE, "", "exec", *both[:count], "--", "yes") as process:
            assert process.stdout.read(4) == b"y\ny\n" or count > 1
            process.stdout.close()
        wait_until(lambda: {task["state"] for task in new_tasks()} == {"killed"})

    def test_starts_nothing_behind_a_closed_pipe(self, plain_server, new_tasks) -> None:
        """The second server tells where it stands while the first one is told to stop."""
        port = plain_server.port
        told = plain_server.exchange(make_request("GET /info", "Connection: close"))
        limit = len(told) + 50  # in the answer to /kill, which comes next
        first = Cutter(port, lambda number: None if number else limit, stalls=True)
        second = Cutter(port, lambda number: None if number else 1, stalls=True)
        words = ("exec", first.place, second.place, "--", "yes")
        with first, second, ending_client(128 + signal.SIGPIPE, "", *words) as process:
            assert process.stdout.read(4)
            wait_until(lambda: second.cut)
            process.stdout.close()
            wait_until(lambda: first.cut)
            second.resumed.set()
            wait_until(lambda: second.count > 1 or not second.open)
            first.resumed.set()
        wait_until(lambda: [task["state"] for task in new_tasks()] == ["killed"])

    @pytest.mark.parametrize("no_color", ["", "1"])
    def test_colours_names_on_a_terminal(self, both: Any, monkeypatch: Any, no_color: str) -> None:
        monkeypatch.setenv("NO_COLOR", no_color)
        monkeypatch.setenv("TERM", "xterm")
        with Person("exec", *both, "--", "echo hi") as person:
            assert person.wait() == 0
            person.read_until("2 servers")
            assert (b"\x1b[" in person.data) == (not no_color)

    @pytest.mark.parametrize("stream, statuses, words", [
        *((">/dev/full", [1], words) for words in ("exec {0} -- yes", "verify-audit /dev/null", "unit")),
        (">&-", [4], "exec {0} -- 'echo a; exit 4'"), (">&-", [4], "exec {0} {1} -- 'echo a; exit 4'"),
        (">&-", [0], "monitor --once {0}"), (">&-", [0], "unit"),
        (">&-", [0, 1], "discover --timeout=0.1 --json"), ("2>&-", [2], "unit --port=x"),
        ("2>&-", [125], "exec 127.0.0.1:1 -- true"), ("2>/dev/full", [2], "exec --all -- true"),
    ])  # fmt: skip
    def test_does_without_a_stream(self, both: Any, stream: str, statuses: list[int], words: str):
        """What cannot be written to standard error is not written to standard output."""
        prefix = ("sh", "-c", f'exec "$@" {stream}', "sh")
        finished = run_client(*shlex.split(words.format(*both)), prefix=prefix)
        assert (finished.returncode in statuses, finished.stdout) == (True, b""), finished
        told = "servercontrol: standard output: No space left" if stream == ">/dev/full" else ""
        assert told in finished.stderr.decode()
        assert not re.search(b"Error|understood", finished.stderr)

    @pytest.mark.parametrize("is_blocking", [True, False])
    @pytest.mark.parametrize("count", [1, 2])
    def test_loses_nothing_to_a_slow_reader(self, both, new_tasks, count, is_blocking) -> None:
        """Output and notes go into one pipe, which is read only when the commands have ended."""
        names = both[:count]
        ours, theirs = os.pipe()
        os.set_blocking(theirs, is_blocking)  # as some other process may leave it
        streams = {"stdout": theirs, "stderr": theirs, "env": {"PYTHONUNBUFFERED": "1"}}
        words = (*names, "no-such-host.invalid", "--", "seq 1 30000; exit 3")
        with running_client("exec", *words, **streams) as process, os.fdopen(ours, "rb") as pipe:
            os.close(theirs)
            wait_until(lambda: [task["state"] for task in new_tasks()] == ["done"] * count)
            text = pipe.read().decode()
            assert process.wait(PATIENCE_SECONDS) == 125
        assert text.count(" | 30000\n") == count
        assert text.count("\n") == 30_000 * count + 2
        assert text.endswith("exit code 3 (" + ", ".join(names) + "); 1 not started"
                             " (no-such-host.invalid)\n")  # fmt: skip

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
    def test_hears_signals_while_nobody_reads(self, place: str, plain_server, new_tasks, number):
        told = f" is left running: http://{place}/logs?id="
        with ending_client(128 + number, told, "exec", place, "--", "yes") as process:
            wait_until(lambda: count_unread(process.stdout.fileno()) > 60_000)
            process.send_signal(number)
            if number == signal.SIGINT:
                assert b"stopping task" in process.stderr.readline()
                wait_until(lambda: new_tasks()[0]["state"] == "killed")
                process.send_signal(number)
        if number != signal.SIGINT:
            assert plain_server.end(new_tasks()[0]["task_id"])["state"] == "killed"

    def test_honours_signals_that_are_ignored(self, place: str) -> None:
        words = ("exec", place, "--stdin", "--", "echo hi; read x; exit 3")
        prefix = ("sh", "-c", "trap '' INT HUP; exec \"$@\"", "sh")
        with ending_client(3, "", *words, prefix=prefix, stdin=subprocess.PIPE) as process:
            assert process.stdout.readline() == b"hi\n"
            process.send_signal(signal.SIGINT)
            process.send_signal(signal.SIGHUP)
            process.stdin.write(b"\n")
            process.stdin.close()

    @in_loop
    async def test_tells_again_what_could_not_be_told(self, plain_server, monkeypatch):
        """Where the stream lives and Ctrl-C did not get through, with the next beat."""
        monkeypatch.setattr(sc, "BEAT_SECONDS", 0.1)
        task, _, told = await self.start_here(plain_server.port, "exec sleep 60")
        with mock.patch.object(task.control, "ask", side_effect=sc.UnreachableError("x")):
            await task.stop()
        await task.follow()
        assert told == ["could not be stopped (x), trying again"]
        assert task.result[0] in INTERRUPTED

    @in_loop
    async def test_sums_up_once(self) -> None:
        servers = [sc.parse_server(name, f"{name}:1") for name in ("a", "b")]
        report = sc.Report(servers, {}, fold=True)
        with mock.patch.object(report, "note") as note:
            assert [report.conclude(), report.conclude()] == [0, 0]  # Ctrl-C at the end
        note.assert_called_once_with("2 servers: 2 not ended (a, b)")

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_shows_what_it_has_when_it_goes(self, plain_server: Any, number: Any):
        """--fold has kept the output of one server, and another never answers."""
        with bind() as dead, Cutter(plain_server.port, lambda _: None) as cutter:
            place, other = (f"127.0.0.1:{n}" for n in (cutter.port, dead.getsockname()[1]))
            words = ("exec", place, other, "--fold", "--", f"echo result {number:d}")
            told = f"2 servers: 1 exit code 0; 1 not ended ({other})\n"
            with ending_client(128 + number, told, *words) as process:
                wait_until(lambda: cutter.count == 2 and not cutter.open)  # /info, /exec
                process.send_signal(number)
                shown = process.stdout.read()
                assert shown == f"── {place} (exit code 0)\nresult {number:d}\n".encode()

    def test_shows_half_a_line_when_it_goes(self, both: Any) -> None:
        words = ("exec", *both, "--", "printf 'one\\nhalf'; sleep 66")
        with ending_client(128 + signal.SIGTERM, " is left running: ", *words) as process:
            assert [process.stdout.readline()[-5:] for _ in both] == [b" one\n"] * 2
            process.send_signal(signal.SIGTERM)
            assert process.stdout.read().count(b" | half\n") == 2

    def test_shows_what_a_server_sent_before_it_died(self, place: str, tmp_path: Path) -> None:
        with ServerProcess(tmp_path, f"--port={find_fixed_port()}") as server:
            server.check = False
            other = server.place
            command = "echo result; sleep 2; test $PPID = {} && kill -9 $PPID; exit 0"
            words = (place, other, "--fold", "--", command.format(server.pid))
            with running_client("exec", *words) as process:
                server.process.wait(PATIENCE_SECONDS)
                with ServerProcess(tmp_path, f"--port={server.port}", "--ws-port=0"):
                    assert process.wait(PATIENCE_SECONDS) == 125
                shown, told = process.stdout.read().decode(), process.stderr.read().decode()
        assert f"── {place} (exit code 0)\nresult\n" in shown
        assert f"── {other} (it was restarted)\nresult\n" in shown
        assert re.search(r"restarted; the command, task \d+, may still be running there\n", told)
        assert told.endswith(f"2 servers: 1 exit code 0; 1 lost after the start ({other})\n")

    def test_does_not_pass_off_a_part_as_the_whole(self, tmp_path: Path, gate: Gate) -> None:
        """What a server keeps no more is named, and its place is the end of a line."""
        command = f"printf first; {gate.wait}; seq 10000000 14000000 | sed s/$/-row/"
        told = "its output is not complete (exit code 0)\n"
        with ServerProcess(tmp_path, "--keep-output=64KiB", WINDOW_SECONDS=0.5) as server:
            with ending_client(125, told, "exec", server.place, "--", command) as process:
                assert process.stdout.read(5) == b"first"
                process.send_signal(signal.SIGSTOP)
                gate.open()
                server.wait_for_end(server.get("/tasks")[-1]["task_id"])
                process.send_signal(signal.SIGCONT)
                shown = process.stdout.read().decode()
        assert shown.endswith("\n14000000-row\n")
        whole, begun, rest = r"\d{8}-row", r"\d{1,8}(-(ro?)?)?", r"(\d{0,7}-)?r?o?w"
        broken = [row for row in shown.split("\n")[1:-1] if not re.fullmatch(whole, row)]
        assert len(broken) <= 2
        assert [row for row in broken if not re.fullmatch(f"{begun}|{rest}", row)] == []

    @parametrize_rows("trap, status, told", [
        ("once", "echo bye; exit 9", 9, ""), ("again", "", 130, "is left running: http://127.0.0.1"),
    ])  # fmt: skip
    def test_stops_the_command_on_ctrl_c(self, place: str, trap: str, status: int, told: str):
        """And leaves it on a second one."""
        command = f"trap '{trap}' INT; echo hi; while :; do sleep 0.05; done"
        with ending_client(status, told, "exec", place, "--", command) as process:
            assert process.stdout.readline() == b"hi\n"
            process.send_signal(signal.SIGINT)
            assert re.search(b"stopping task .*Ctrl-C again", process.stderr.readline())
            if told:
                process.send_signal(signal.SIGINT)
            assert process.stdout.read() == (b"" if told else b"bye\n")

    def test_starts_nothing_after_ctrl_c(self, both: Any, new_tasks: Any) -> None:
        """Servers whose turn has not come are spared."""
        words = ("exec", *both, "--parallel=1", "--", "echo hi; sleep 63")
        told = f"{both[1]} (http://{both[1]}): not started"
        with ending_client(INTERRUPTED, told, *words) as process:
            assert process.stdout.readline().endswith(b" | hi\n")
            process.send_signal(signal.SIGINT)
        assert len(new_tasks()) == 1

    def test_stops_it_when_the_server_is_there_again(self, plain_server: ServerProcess) -> None:
        """Ctrl-C while there is no connection."""
        with Cutter(plain_server.port, lambda _: None) as cutter:
            with running_client("exec", cutter.place, "--", "echo hi; exec sleep 65") as process:
                assert process.stdout.readline() == b"hi\n"
                cutter.target = 1  # nobody listens there
                cutter.cut_all()
                assert b"connection lost" in process.stderr.readline()
                process.send_signal(signal.SIGINT)
                assert b"stopping task" in process.stderr.readline()
                while b"could not be stopped (" not in process.stderr.readline():
                    pass
                assert plain_server.get("/tasks")[-1]["state"] == "running"
                cutter.target = plain_server.port
                assert process.wait(PATIENCE_SECONDS) in INTERRUPTED
        assert plain_server.get("/tasks")[-1]["killed_by"]

    def test_can_be_left_when_nobody_reads(self, place: str, plain_server, new_tasks) -> None:
        """The output is gone, and a server does not say whether it has started the command."""
        with Cutter(plain_server.port, lambda n: 0 if n == 1 else None, stalls=True) as cutter:
            words = ("exec", place, cutter.place, "--", "exec yes")
            told = f"{cutter.place}: its command may have been started"
            with ending_client(128 + signal.SIGPIPE, told, *words) as process:
                assert process.stdout.read(1)
                wait_until(lambda: cutter.cut)
                process.stdout.close()
                wait_until(lambda: any(task["killed_by"] for task in new_tasks()))
                process.send_signal(signal.SIGINT)
                assert b"task ? on " in process.stderr.readline()
                process.send_signal(signal.SIGINT)
        assert len(new_tasks()) == 2
        for task in new_tasks():
            kill_task(plain_server, task["task_id"])
            assert plain_server.wait_for_end(task["task_id"])["state"] == "killed"

    def test_takes_paths_that_are_no_text(self, tmp_path: Path) -> None:
        path = f"{tmp_path}/\udcff.sock"
        for words in (["exec", path, "--fold", "--", "x"], ["exec", path, "/b.sock", "--", "x"]):
            assert run_client(*words).returncode == 125
        assert run_client("monitor", "--once", path).returncode == 1
        with running_client("monitor", path) as process:
            assert b"server_unreachable" in process.stdout.readline()

    @pytest.mark.parametrize("is_again", [False, True])
    def test_stops_what_is_just_starting(self, plain_server, new_tasks, is_again: bool) -> None:
        """Ctrl-C while the answer to POST /exec is on its way."""
        with Cutter(plain_server.port, lambda n: 0 if n == 1 else None, stalls=True) as cutter:
            told = "may have been started" if is_again else ""
            words = ("exec", cutter.place, "--", "sleep 64")
            with ending_client(INTERRUPTED, told, *words) as process:
                wait_until(new_tasks)
                process.send_signal(signal.SIGINT)
                assert process.stderr.readline().startswith(b"servercontrol: stopping task ? on ")
                if is_again:
                    process.send_signal(signal.SIGINT)
                else:
                    cutter.resumed.set()
        if is_again:
            assert plain_server.end(new_tasks()[0]["task_id"])["state"] == "killed"

    @pytest.mark.parametrize("answers", [1, 2])
    def test_ends_in_whatever_moment_it_is_left(self, monkeypatch: Any, answers: int) -> None:
        """Also some turns of the event loop after an answer, where wait_for() may swallow it."""

        async def run(target: sc.ServerAddress, turns: int) -> bool:
            execution = sc.Execution(sc.Report([target], {"cmd": "sleep 60"}, False), 1)
            loop, seen = asyncio.get_running_loop(), []

            def leave_after(turns: int) -> None:
                loop.call_soon(leave_after, turns - 1) if turns else execution._leave(130)

            class Reader(asyncio.StreamReader):
                def feed_eof(self) -> None:
                    super().feed_eof()
                    seen.append(self)
                    if len(seen) == answers:
                        leave_after(turns)

            monkeypatch.setattr(asyncio.streams, "StreamReader", Reader)
            running = asyncio.ensure_future(execution.run())
            done, _ = await asyncio.wait({running}, timeout=PATIENCE_SECONDS)
            return bool(done) and running.result() == 130

        with Player({}) as player:
            target = sc.parse_server("player", player.place)
            assert [turns for turns in range(20) if not asyncio.run(run(target, turns))] == []

    @pytest.mark.parametrize("command", ["exec", "monitor"])
    def test_signal_at_the_very_end_leaves_no_trace(self, place: str, tmp_path: Path, command: str):
        code = """
import asyncio, os, signal
close = asyncio.selector_events.BaseSelectorEventLoop._close_self_pipe
def close_and_signal(loop):
    close(loop)
    os.kill(os.getpid(), signal.SIGTERM)
asyncio.selector_events.BaseSelectorEventLoop._close_self_pipe = close_and_signal
"""
        words = [place, "--", "kill -9 $$"] if command == "exec" else [place]
        status, script = 137 if command == "exec" else 0, make_launcher(tmp_path, code)
        with ending_client(status, "", command, *words, script=script) as process:
            if command == "monitor":
                assert process.stdout.readline()
                process.terminate()

    def test_is_found_by_its_socket(self, tmp_path: Path) -> None:
        with UnixServer(tmp_path) as server:
            assert run_client("exec", str(server.path), "--", "exit 5").returncode == 5

    def test_checks_the_certificate(self, tmp_path: Path, certificates: list[Certificate]) -> None:
        with TlsServer(tmp_path, certificates[0]) as server:
            words = ("exec", f"https://localhost:{server.port}", "--", "exit 5")
            check_command(125, "certificate is not trusted: self", *words)
            check_command(5, "", *words, SSL_CERT_FILE=str(certificates[0].cert))
            for path, hint in ((certificates[1].cert, "see SSL"), ("/none", "there is no file /n")):
                told = run_client(*words, SSL_CERT_FILE=str(path)).stderr
                assert b"is not trusted" in told and hint.encode() in told
            check_command(125, "speaks https", "exec", f"localhost:{server.port}", "--", "exit 5")
        with ServerProcess(tmp_path) as plain:
            check_command(125, "TLS failed", "exec", f"https://{plain.place}", "--", "true")

    @pytest.mark.parametrize("first", [{}, {1: 20}, {1: 0, 2: 0}])
    def test_loses_and_doubles_nothing(self, plain_server, tmp_path: Path, first: dict[int, int]):
        """Connections are cut anywhere: in the answer to /exec, in its head, in later ones."""
        chance = random.Random(len(first))

        def choose(number: int) -> int | None:
            return None if number == 0 else first.get(number, int(10 ** chance.uniform(2.3, 6.5)))

        lines = ("".join(f"line {n} of the вывод €\n" for n in range(100_000)) + "я").encode()
        (tmp_path / "data").write_bytes(lines)
        command = f"echo once >>{tmp_path}/count; cat {tmp_path}/data; sleep 0.2; exit 6"
        with Cutter(plain_server.port, choose) as cutter:
            finished = run_client("exec", cutter.place, "--", command)
            assert cutter.cut > 2
        assert (finished.returncode, finished.stdout) == (6, lines), finished.stderr
        assert (tmp_path / "count").read_text() == "once\n"

    @staticmethod
    async def start_here(port: int, command: str, drain: Any = None) -> tuple[Any, bytearray, Any]:
        """Start a command on a server by our own process; return it, its output, what it told."""
        output, told = bytearray(), []
        target, drain = sc.parse_server("it", f"127.0.0.1:{port}"), drain or mock.AsyncMock()
        task = sc.RemoteTask(target, {"cmd": command}, output.extend, drain, told.append)
        await task.learn()
        await task.start()
        return task, output, told

    @pytest.mark.parametrize("limit", [50, 5_000, 500_000])
    @in_loop
    async def test_leaves_a_connection_that_stands_still(self, plain_server, monkeypatch, limit):
        """Such as through a firewall that forgot it: it is open, and nothing comes."""
        monkeypatch.setattr(sc, "BEAT_SECONDS", 0.3)
        monkeypatch.setattr(sc, "ANSWER_SECONDS", 6.0 if limit == 50 else 15.0)
        command = "seq 300000; sleep 0.1; exit 4"
        with Cutter(plain_server.port, lambda n: limit if n == 1 else None, stalls=True) as cutter:
            task, output, told = await self.start_here(cutter.port, command)
            await task.follow()
            assert (task.result[0], told, cutter.count) == (4, [], 3)
        assert output == b"".join(b"%d\n" % n for n in range(1, 300_001))

    def test_writes_beside_somebody_else(self, monkeypatch: Any) -> None:
        """Who shares the pipe may have filled it since it was asked, and have set O_NONBLOCK."""
        is_ready = mock.Mock(poll=lambda milliseconds: [1], register=lambda fd, what: None)
        monkeypatch.setattr(sc.select, "poll", lambda: is_ready)
        ours, theirs = socket.socketpair()
        with ours, theirs:
            theirs.setblocking(False)
            with pytest.raises(BlockingIOError):
                while theirs.send(bytes(1 << 20)):
                    pass
            assert sc.write_some(theirs.fileno(), bytearray(b"x")) == 0
            ours.recv(1 << 20)
            assert sc.write_some(theirs.fileno(), bytearray(b"x")) == 1

    @in_loop
    async def test_keeps_a_connection_while_its_reader_pauses(self, plain_server, monkeypatch):
        """The end of the command comes after the silence allowed."""
        monkeypatch.setattr(sc, "BEAT_SECONDS", 0.2)
        monkeypatch.setattr(sc, "EXEC_GIVE_UP_SECONDS", 1.0)
        pauses = [2.0]

        async def drain() -> None:
            await asyncio.sleep(pauses.pop() if pauses else 0.0)

        command = "echo hi; sleep 1; exit 4"
        task, output, told = await self.start_here(plain_server.port, command, drain)
        await task.follow()
        assert (task.result[0], output, told) == (4, b"hi\n", [])

    @in_loop
    async def test_takes_up_a_connection_that_was_long(self, plain_server, monkeypatch, gate):
        """The time after which it gives up counts from when the connection was last good."""
        monkeypatch.setattr(sc, "BEAT_SECONDS", 0.1)
        monkeypatch.setattr(sc, "EXEC_GIVE_UP_SECONDS", 2.0)
        with Cutter(plain_server.port, lambda _: None) as cutter:
            task, _, told = await self.start_here(cutter.port, f"{gate.wait}; exit 4")
            following = asyncio.ensure_future(task.follow())
            await asyncio.sleep(2.5)
            cutter.target = 1  # nobody listens there
            cutter.cut_all()
            while not (told or following.done()):
                await asyncio.sleep(0.01)
            cutter.target = plain_server.port
            gate.open()
            await following
            assert task.result[0] == 4

    @in_loop
    async def test_gives_up_a_server_that_is_gone(self, tmp_path: Path, monkeypatch: Any) -> None:
        monkeypatch.setattr(sc, "EXEC_GIVE_UP_SECONDS", 3.0)
        with ServerProcess(tmp_path) as server:
            server.check = False
            command = f"echo hi; sleep 0.5; kill -9 {server.pid}; sleep 1"
            task, output, told = await self.start_here(server.port, command)
            with pytest.raises(sc.UnreachableError, match="^connection refused$"):
                await task.follow()
        assert output in (b"", b"hi\n")
        assert told[-1:] == ["connection lost (connection refused), trying again"]
        assert len(told) <= 2  # each trouble once

    @pytest.mark.parametrize("second, told, count", [
        (b"", "", 4), (b'HTTP/1.0 503 x\r\n\r\n{"error":"x","message":"too many"}', "503: too many", 2),
        (b"HTTP/1.0 502 x\r\n\r\n", "502: it does not answer like ServerControl", 4), (OK, "does not answer like ServerControl", 4),
    ])  # fmt: skip
    def test_tells_what_it_cannot_know(self, second: bytes, told: str, count: int) -> None:
        """No answer to POST /exec came, and then none again or a refusal: it may run all the same."""
        with Player({"/exec": (b"", second)}) as busy:
            finished = run_client("exec", busy.place, "x:1", "--", "true")
            refs = [one[one.index(b'"ref"') :] for one in busy.received if b"POST" in one]
        assert (len(refs), len(set(refs)), finished.returncode) == (count, 1, 125)
        shown = finished.stderr.decode()
        assert f"{told}; whether the command was started is not known\n" in shown
        assert f"1 lost after the start ({busy.place})" in shown

    def test_starts_nothing_twice(self, tmp_path: Path) -> None:
        """Even if the server has forgotten the task meanwhile."""
        with ServerProcess(tmp_path, "--keep-tasks=1") as server:
            task_id = server.start("echo once", ref="x")
            assert server.start("echo once", ref="x") == task_id
            server.wait_for_end(task_id)
            for _ in range(2):
                last = server.run("echo other")["task_id"]
            answer = server.execute("echo once", ref="x")
            assert (answer.status, answer.json()["error"]) == (404, "unknown_task")
            assert [task["task_id"] for task in server.get("/tasks")] == [last]

    @in_loop
    async def test_names_nobody_answers_for_hinder_no_other(self, monkeypatch: Any) -> None:
        """The look-ups of 40 names hang; one name has two addresses, the first of which refuses."""
        released = threading.Event()

        def getaddrinfo(host: str, *_: Any, **__: Any) -> Any:
            if host.startswith("dead"):
                released.wait(PATIENCE_SECONDS)
                raise socket.gaierror(socket.EAI_AGAIN, "try again")
            kind = (socket.AF_INET, socket.SOCK_STREAM, 6, "")
            return [(*kind, ("127.0.0.1", place)) for place in (1, port)]

        monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
        with bind() as listener:
            port = listener.getsockname()[1]
            opening = [sc.connect_server(sc.parse_server("", f"dead{n}")) for n in range(40)]
            dead = [asyncio.ensure_future(sc.wait_within(0.3, one)) for one in opening]
            await asyncio.sleep(0)
            good = sc.connect_server(sc.parse_server("", f"good:{port}"))
            _, writer = await sc.wait_within(PATIENCE_SECONDS, good)
            writer.close()
            for one in dead:
                with pytest.raises(sc.UnreachableError, match="no answer in time"):
                    await one
        released.set()

    @in_loop
    async def test_names_the_first_reason_of_several(self, monkeypatch: Any) -> None:
        kind = (socket.SOCK_STREAM, 6, "")
        refused, unreachable = ("127.0.0.1", 1), ("fe80::1", 1, 0, 0)
        places = [(socket.AF_INET, *kind, refused), (socket.AF_INET6, *kind, unreachable)]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: places)
        with pytest.raises(ConnectionRefusedError):
            await sc.connect_socket("x", 1)
        with bind() as listener:
            places[:] = [(4711, *kind, ()), (socket.AF_INET, *kind, listener.getsockname())]
            (await sc.connect_socket("x", 1)).close()
        with mock.patch.object(threading.Thread, "start", side_effect=RuntimeError):
            with pytest.raises(BlockingIOError):
                await sc.connect_socket("x", 1)

    def test_tells_when_the_server_is_stopped(self, tmp_path: Path) -> None:
        told, words = ": it was stopped, which ended the command\n", ("--", "echo hi; sleep 64")
        with ServerProcess(tmp_path) as server:
            with ending_client(125, told, "exec", server.place, *words) as process:
                assert process.stdout.readline() == b"hi\n"
                server.process.terminate()
            assert server.process.wait(PATIENCE_SECONDS) == 0

    def test_has_help_for_each_command(self) -> None:
        for command in sc.COMMAND_LINES:
            shown = check_command(0, "", command, "--help")
            assert f"servercontrol.py {command}" in shown
            assert max(map(len, shown.split("\n"))) <= 80
            assert check_command(0, "", "help", command) == shown
        shown = check_command(0, "", "help")
        assert all(name in shown for name in sc.COMMAND_LINES)
        assert set(sc.SYNTAX) - {"serve"} == set(sc.COMMAND_LINES)


class Person(OnTerminal):
    """A client command."""

    def __init__(self, *arguments: str, **options: Any) -> None:
        command = [sys.executable, compiled_script(), *arguments]
        super().__init__(command, {"SERVERCONTROL_HOSTS": "/nonexistent"}, 100, 30, **options)

    def wait(self) -> int:
        """Return the exit status; the terminal must be as it was."""
        status = self.process.wait(PATIENCE_SECONDS)
        assert termios.tcgetattr(self.slave) == self.before
        return status


class TestExecTerminal:
    """SPEC 11: `exec --tty`."""

    def test_keys_arrive(self, place: str) -> None:
        command = "stty raw -echo; echo ready; exec od -An -c -w1 -v"
        with Person("exec", place, "--tty", "--", command) as person:
            person.read_until("ready")
            person.type(b"\x03\x04\x1a\x1c\x13\x11\r\x7f\x1b[A\t\xc3")
            shown = (r"003", "004", "032", "034", "023", "021", r"\\r", "177", "033", r"\[", "A")
            person.read_until(r"\s+".join([*shown, r"\\t"]))
            person.type(b"\xa4\xf0\x9f\x98\x80")  # a character that came in two pieces
            person.read_until(r"303\s+244\s+360\s+237\s+230\s+200")
            assert person.process.poll() is None
            assert termios.tcgetattr(person.slave) != person.before

    def test_keys_do_not_wait_for_one_another(self, plain_server: ServerProcess) -> None:
        """Over a slow network: none of them is answered yet."""
        is_fast = threading.Event()

        def hold_answers(data: bytes) -> bytes:
            if data.startswith(b"HTTP/1.1 200"):
                is_fast.wait()
            return data

        is_fast.set()
        with Cutter(plain_server.port, lambda _: None) as cutter:
            cutter.change = hold_answers
            with Person("exec", cutter.place, "--tty", "--", "echo ready; exec cat") as person:
                person.read_until("ready")
                is_fast.clear()
                typed = ""
                for key in "abcdefghijklmnop":
                    person.type(key)
                    typed += key
                    person.read_until(typed)
                is_fast.set()
                text = "".join(f"{n}-" for n in range(800))
                for start in range(0, len(text), 3):
                    person.type(text[start : start + 3])
                person.read_until(text)
                person.type("\x1d")
                assert person.wait() == 0

    def test_ctrl_c_is_for_the_program_there(self, place: str) -> None:
        line = "trap 'echo caught' INT; echo ready; until read x; do :; done; echo got $x; exit 9"
        with Person("exec", place, "--tty", "--", line) as person:
            person.read_until("ready")
            person.type("\x03")
            person.read_until("caught")
            person.type("ä€\r")
            person.read_until("got ä€\r\n")
            assert person.wait() == 9
        assert "stopping" not in person.text

    def test_what_is_typed_ahead_arrives(self, place: str) -> None:
        with Person("exec", place, "--tty", "--", "read x; echo got $x") as person:
            person.type("early")
            person.read_until("early")  # echoed, so the client may not even run yet
            person.type("\r")
            person.read_until("got early\r\n")
            assert person.wait() == 0

    def test_paste_that_is_not_taken_is_told(self, place: str) -> None:
        command = "stty raw -echo; echo ready; sleep 300"
        with Person("exec", place, "--tty", "--", command) as person:
            person.read_until("ready")
            for _ in range(300):
                person.type("x" * 8192)
            person.read_until("not all taken")
            person.type("\x1d")
            assert person.wait() == 0
        assert person.text.count("not all taken") == 1

    def test_ctrl_c_before_it_runs_is_for_us(self) -> None:
        with bind() as dead:
            with Person("exec", f"127.0.0.1:{dead.getsockname()[1]}", "--tty", "--", "x") as person:
                with dead.accept()[0] as connection:
                    connection.recv(1)  # then the terminal is raw
                    person.type("\x03")
                    assert person.wait() == 130

    def test_size_arrives_and_it_lives_through_a_cut(self, plain_server: ServerProcess) -> None:
        """What is typed, and a new size, while there is no connection arrives with the next."""
        command = "trap 'stty size' WINCH; stty size; while ! read x; do :; done; echo got $x"
        with Cutter(plain_server.port, lambda number: None) as cutter:
            with Person("exec", cutter.place, "--tty", "--", command) as person:
                person.read_until("30 100\r\n")
                person.resize(77, 22)
                person.read_until("22 77\r\n")
                cutter.target = 1  # where nobody listens
                cutter.cut_all()
                person.read_until("connection lost .*\r\n")
                person.type("thro")
                person.type("ugh\r")
                person.resize(66, 11)
                wait_until(lambda: not select.select([person.slave], [], [], 0)[0])
                cutter.target = plain_server.port
                person.read_until("11 66\r\n")
                person.read_until("got through\r\n")
                assert person.wait() == 0

    @pytest.mark.parametrize("end, statuses", [
        ("\x1d", [0]), (signal.SIGTERM, [143]), (signal.SIGHUP, [129]), (signal.SIGINT, INTERRUPTED),
    ])  # fmt: skip
    def test_leaves_the_terminal_as_it_was(self, place: str, plain_server, end, statuses: Any):
        with Person("exec", place, "--tty", "--", "stty -a; echo ready; cat") as person:
            person.read_until("ready")
            task = plain_server.get("/tasks")[-1]
            if isinstance(end, str):
                person.type(b"a" + end.encode() + b"b")
            else:
                person.process.send_signal(end)
            assert person.wait() in statuses
            if end is not signal.SIGINT:
                person.read_until(f"task {task['task_id']} is left running: http://[^ ]+\r\n")
                assert plain_server.task(task["task_id"])["state"] == "running"
            else:
                person.read_until("stopping task")
            kill_task(plain_server, task["task_id"])

    def test_errors_stand_on_lines_of_their_own(self, tmp_path: Path) -> None:
        with ServerProcess(tmp_path, "--no-exec") as server:
            with Person("exec", server.place, "--tty", "--", "true") as person:
                assert person.wait() == 125
                person.read_until("403: .*\r\n")

    def test_ends_with_its_terminal(self, place: str, plain_server: ServerProcess) -> None:
        with tempfile.TemporaryFile() as log:
            take = {"preexec_fn": lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0), "stderr": log}
            with Person("exec", place, "--tty", "--", "echo ready; cat", **take) as person:
                person.read_until("ready")
                os.close(person.slave)
                os.close(person.master)
                person.master = person.slave = -1
                assert person.process.wait(PATIENCE_SECONDS) in (0, 1)
            log.seek(0)
            assert b"Traceback" not in log.read()

    def test_input_need_not_be_a_terminal(self, place: str) -> None:
        words = ("exec", place, "--tty")
        shown = check_command(3, "", *words, "--", "stty size; tty >&2; exit 3", stdin=b"x")
        assert re.fullmatch(r"24 80\r\n/dev/pts/\d+\r\n", shown)
        words = (*words, "--stdin", "--", "cat; echo end")
        shown = check_command(0, "", *words, stdin="zwölf\n".encode())
        assert shown.replace("^D\b\b", "") == "zwölf\r\nzwölf\r\nend\r\n"


class TestDiscover:
    """SPEC 6, 11: `discover`."""

    def test_finds_what_is_here(self, tmp_path: Path) -> None:
        with ServerProcess(tmp_path / "a") as one:
            port = str(one.discovery_port)
            with ServerProcess(tmp_path / "b", f"--discovery-port={port}") as two:
                words = ("discover", "--timeout=2", "--discovery-port", port)
                shown = check_command(0, "", "discover", "--json", *words[2:])
                found = {server["port"]: server for server in json.loads(shown)}
                assert set(found) == {one.port, two.port}
                assert found[two.port]["ws_port"] == two.ws_port
                table = check_command(0, "", *words[:2], SERVERCONTROL_DISCOVERY_PORT=port)
                assert table.startswith("SERVER ") and f"http://{one.place} " in table
                hosts = write_hosts(tmp_path, check_command(0, "", *words, "--hosts"))
                env = {"SERVERCONTROL_HOSTS": hosts}
                shown = check_command(0, "", "exec", "--all", "--fold", "--", "echo hi", **env)
                assert shown.endswith("(2 servers, exit code 0)\nhi\n")
                told = "servercontrol: left out, being listed: 2\n"
                assert check_command(0, told, *words, "--hosts", **env) == ""

    def test_lists_where_a_token_goes(self, tmp_path: Path, capfd: Any) -> None:
        places = ("10.0.0.1", "10.0.0.2", "127.0.0.1", "10.0.0.4")
        found: list[dict[str, Any]] = []
        for n, place in enumerate(places, 1):
            url = f"http://{place}:80"
            facts = {"hostname": f"web{n}", "address": place, "port": 80, "auth": n != 4}
            found.append({**facts, "tls": False, "url": url, "urls": [url]})
        found[2]["urls"].append("http://10.0.0.3:80")  # is it really the same? See who lists it.
        hosts = str(tmp_path / "list" / "hosts")
        rest = "web3 http://127.0.0.1:80 # also http://10.0.0.3:80\nweb4 http://10.0.0.4:80\n"
        new = "web1 http://10.0.0.1:80 web1.token\nweb2 http://10.0.0.2:80 web2.token\n"
        with listing(hosts):
            assert sc.list_new(found) == new + rest
        assert "next: copy each server's" in capfd.readouterr().err
        (tmp_path / "list").mkdir()
        write_token(tmp_path / "list", "web2.token", SERVER_RUN_TOKEN)
        write_hosts(tmp_path / "list", "one http://10.0.0.1:80 web1.token")
        line = "web2 http://10.0.0.2:80 # web2.token is there already: is it of this server?\n"
        with listing(hosts):
            assert sc.list_new(found) == line + rest
        assert "left out, being listed: 1" in capfd.readouterr().err

    @staticmethod
    @contextlib.contextmanager
    def answering(*datagrams: bytes) -> Iterator[int]:
        """Answer each probe with these datagrams; give the port."""
        with bind_udp() as udp:

            def answer() -> None:
                for probe, source in iter(lambda: udp.recvfrom(2048), (b"", udp.getsockname())):
                    for datagram in datagrams:
                        udp.sendto(datagram, source)

            with concurrent.futures.ThreadPoolExecutor() as pool:
                pool.submit(answer)
                yield udp.getsockname()[1]
                udp.sendto(b"", udp.getsockname())

    def test_is_not_held_up_by_rubbish(self) -> None:
        """One of many datagrams is a reply."""
        reply = b'{"type":"SERVER_RESPONSE","hostname":"\\u001b[2J{{ 1 }}","port":1,"ws_port":2}'
        with self.answering(*(reply[: n % len(reply)] for n in range(100)), reply) as port:
            words = ("discover", "--at=127.0.0.1", "--timeout=1", f"--discovery-port={port}")
            _, line = check_command(0, "", *words).splitlines()
            assert line.startswith("?[2J{{ 1 }}") and "\x1b" not in line
            assert check_command(0, "", *words, "--hosts") == "2J---1 http://127.0.0.1:1\n"

    def test_one_that_makes_up_many_keeps_nobody_out(self, monkeypatch: Any) -> None:
        monkeypatch.setattr(sc, "MAX_REPLIES_OF_ONE", 20)
        reply = b'{"type":"SERVER_RESPONSE","hostname":"x","port":%d,"ws_port":2}'
        with self.answering(*(reply % number for number in range(1, 60))) as port:
            assert len(sc.probe_network(["127.0.0.1"], port, 0.5)) == 20

    def test_names_a_bad_variable(self) -> None:
        told = "servercontrol: --discovery-port: 'x' is not a port"
        check_command(2, told, "discover", SERVERCONTROL_DISCOVERY_PORT="x")

    def test_says_that_nobody_is_there(self) -> None:
        with bind_udp() as free:
            options = ("--timeout=0.2", f"--discovery-port={free.getsockname()[1]}")
            for more, shown in (("--json", "[]\n"), ("--hosts", ""), ("--at=localhost", "")):
                told = "nothing answered on UDP port"
                assert check_command(1, told, "discover", *options, more) == shown


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


class Watcher(contextlib.ExitStack):
    """`monitor --json` while it runs, and the events it has printed."""

    def __init__(self, *arguments: str, **options: Any) -> None:
        super().__init__()
        running = running_client("monitor", "--json", *arguments, **options)
        self.process = self.enter_context(running)
        self.events: list[dict[str, Any]] = []
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        with contextlib.suppress(ValueError):  # closed
            for line in self.process.stdout:
                self.events.append(json.loads(line))

    def wait_for(self, kind: str, count: int = 1) -> dict[str, Any]:
        """Return the event of a type that is number `count`, when it comes."""
        found = wait_until(lambda: [e for e in self.events if e["type"] == kind][count - 1 :])
        return found[0]

    def stop(self, complaint: str = "") -> None:
        self.process.send_signal(signal.SIGINT)
        assert self.process.wait(PATIENCE_SECONDS) == 0
        assert self.process.stderr.read().decode() == complaint


def logged(log: Path, kind: str) -> list[dict[str, Any]]:
    """Return the records of a type in a monitor's log."""
    return [one for one in read_lines(log) if one["event"] == kind]


def ends_in(log: Path, *tasks: str) -> bool:
    """Whether a monitor's log, parts of which may be broken, has the ends of tasks."""
    ended = re.findall(r'"event":"task_complete".*?"task_id":"(\d+)"', log.read_text())
    return set(tasks) <= set(ended)


def check_monitor_log(log: Path, state: Path) -> None:
    """Compare a monitor's log with what the server itself wrote down.

    Every task stands in it once, with its start and its end, or it says that it knows no more;
    what is missing was in a run of the server whose end the log has as a gap, or in one between
    that and the next in the log.
    """
    starts = [one["task_id"] for one in logged(log, "task_start")]
    ends = logged(log, "task_complete") + logged(log, "task_lost")
    assert len(starts) == len(set(starts))
    assert len(ends) == len({one["task_id"] for one in ends})
    told: dict[str, dict[str, Any]] = {}
    for one in read_lines(state / "servercontrol" / "audit.log"):
        if one["event"] in ("task_start", "task_complete"):
            told.setdefault(one["task_id"], {"start_boot": one["boot_id"]}).update(one)
    whole = {one["boot_id"] for one in read_lines(log)}
    whole -= {one["boot_id"] for one in logged(log, "gap")}
    named = {task_id for task_id, truth in told.items() if truth["start_boot"] in whole}
    assert named <= {one["task_id"] for one in ends} <= set(told)
    for one in ends:
        truth = told[one["task_id"]]
        assert one["command"] == truth["command"]
        if one["event"] == "task_complete":
            names = ("exit_code", "signal", "state", "output_bytes")
            assert [one[name] for name in names] == [truth[name] for name in names]
        else:  # it may also have ended in the gap
            assert truth.get("state") == "interrupted" or truth["start_boot"] not in whole


def frame(value: Any) -> bytes:
    """A server's text frame; of a string as it is, of anything else as JSON."""
    text = value if isinstance(value, str) else json.dumps(value)
    return sc.encode_frame(sc.Opcode.TEXT, text.encode())


HELLO = dict(type="hello", boot_id="b", seq=1, tasks=[], version="\x1b[2J", alert=None)  # noqa: C408
STATS = {
    "type": "stats_update", "seq": 2, "timestamp": 5, "cpu": 5.0, "ram_used": 1, "ram_total": 2,
    "load_avg": [0.1, 0.2, 0.3],
}  # fmt: skip
ALERT = {"type": "cpu_alert", "timestamp": 5, "cpu": 99.0, "seq": 1}
STATS_RUBBISH = [
    *({"cpu": "x"}, {"cpu": -1}, {"cpu": 10**400}, {"cpu": None}, {"seq": 1.5}, {"seq": "3"}),
    *({"load_avg": []}, {"load_avg": "abc"}, {"ram_total": {}}, {"timestamp": 10**300}),
    {"more": [[]] * sc.MAX_STATS_BYTES},
]
START = {
    "type": "task_start", "seq": 2, "timestamp": 5, "task_id": "1", "command": "true",
    "cwd": "/", "by": "me",
}  # fmt: skip
END = {
    **START, "type": "task_complete", "exit_code": 0, "signal": None, "state": "done",
    "output_bytes": 0, "duration_ms": 1,
}  # fmt: skip
WRONG_STARTS: list[dict[str, Any]] = [
    *({"task_id": "9" * 19}, {"task_id": "x"}, {"task_id": 1}, {"task_id": ["1"]}),
    *({"command": [[]]}, {"cwd": None}, {"by": {}}, {"timestamp": "5"}, {"timestamp": [5]}),
]
RUBBISH = [
    *(frame({**STATS, **wrong}) for wrong in STATS_RUBBISH), frame('{"type":' * 10000),
    frame(json.dumps({**STATS, "cpu": 0}).replace('"cpu": 0', '"cpu": 1e999')),
    frame('{"type":"task_output","seq":2,"timestamp":1e999}'), frame('{"type":"task_output","seq":NaN}'),
    frame('{"type":"task_output","seq":2,"timestamp":' + "9" * 400 + "}"),
    frame({**START, "task_id": {}}), frame({**START, "by": None}),
    frame({"type": "task_complete", "seq": 2, "task_id": "1"}),
    frame({"type": "gap", "from": None, "to": "x"}), frame({"type": "hello", "tasks": 5}),
    frame({**HELLO, "alert": {"type": "cpu_alert", "timestamp": 10**30, "cpu": 1}}),
    frame({**HELLO, "boot_id": {}, "tasks": [1]}), b"\xff\xff\xff",
    *(frame(value) for value in ({"type": []}, {"seq": 1}, [], "x", "", None)),
    frame(HELLO)[:1] + b"\x81\0\0\0\0x",  # masked
    sc.encode_frame(sc.Opcode.TEXT, b"\xff"), sc.encode_frame(sc.Opcode.CLOSE, b"\x03\xea\xc2\x9b2J"),
]  # fmt: skip


class Babbler(Impostor):
    """A server that speaks WebSocket, says `hello`, and then what it is told to."""

    hello = frame(HELLO)
    extension = ""

    def serve(self, connection: socket.socket, request: bytes) -> None:
        key = re.search(rb"Key: (\S+)", request)
        fields = [("Sec-WebSocket-Accept", sc.compute_accept(key.group(1).decode()))]
        fields += [("Sec-WebSocket-Extensions", self.extension)] if self.extension else []
        connection.sendall(sc.encode_response_head(101, fields) + self.hello + self.answer)
        while connection.recv(65536):
            pass


def follow(babbler: Any, take: Any = bool) -> tuple[list[str], sc.UnreachableError]:
    """Take the events of a server by a Link until one is `lost`; return their types, and why."""
    kinds: list[str] = []

    def note(event: dict[str, Any]) -> None:
        if event["type"] == "lost":
            raise sc.UnreachableError(event["reason"], event["status"])
        kinds.append(event["type"])
        take(event)

    async def run() -> None:
        target = sc.parse_server("babbler", babbler.place)
        await asyncio.wait_for(sc.Link(target, note).run(), PATIENCE_SECONDS)

    with pytest.raises(sc.UnreachableError) as caught:
        asyncio.run(run())
    return kinds, caught.value


def deaf_link(waiting_bytes: int = 0, is_gone: bool = False) -> Any:
    """A Link to a server that reads nothing, or is gone, and what was written to it."""
    link, writer = make_monitor()[2].link, mock.Mock(written=[])
    link._writer = writer.transport = writer
    writer.write = writer.written.append
    writer.get_write_buffer_size.return_value = waiting_bytes
    writer.is_closing.return_value = is_gone
    return link, writer.written


def make_monitor(cpu_alert: Any = None, path: str = os.devnull) -> Any:
    """A monitor of one server, without any: (what it told, what gives it an event, its server)."""
    told: list[dict[str, Any]] = []
    target, log = sc.parse_server("web1", "web1"), sc.MonitorLog(path)
    watched = sc.Watched(target, cpu_alert, log, lambda _, event: told.append(event))
    watched.monitor = sc.Monitor([watched], log)

    def take(event: dict[str, Any]) -> list[str]:
        before = len(told)
        watched.take(event)
        return [one["type"] for one in told[before:]]

    return told, take, watched


class TestMonitor:
    """SPEC 11: `monitor`, without a screen."""

    def test_says_it_in_words(self, place: str, plain_server: ServerProcess) -> None:
        with ending_client(128 + signal.SIGPIPE, "", "monitor", place) as process:
            assert b"server_up" in process.stdout.readline()
            plain_server.start("echo a\x1bb")
            lines: list[str] = []
            while not lines or " task_complete " not in lines[-1]:
                lines.append(process.stdout.readline().decode())
                assert re.match(rf"20\d\d-\S+Z {place} \w+ ", lines[-1])
            assert any('command="echo a\\u001bb"' in line for line in lines)
            assert not any("task_output" in line for line in lines)  # it asks for none
            process.stdout.close()

    def test_has_one_look(self, place: str, plain_server: ServerProcess, tmp_path: Path) -> None:
        hosts = write_hosts(tmp_path, f"web1 {place}", "gone 127.0.0.1:1")
        table = check_command(1, "", "monitor", "--once", SERVERCONTROL_HOSTS=hosts)
        # After the 0 a busy machine has its alert.
        assert re.search(r"^web1 +up +\d+\.\d +\d+\.\d +\d+\.\d\d +0\b", table, re.M)
        assert re.search(r"^gone +unreachable +(- +){3}0 connection refused$", table, re.M)
        assert "2 servers: 1 up, 1 unreachable" in table or "1 unreachable, 1 up" in table
        words = ("monitor", "--once", "--json", "web1")
        (seen,) = json.loads(check_command(0, "", *words, SERVERCONTROL_HOSTS=hosts))
        assert (seen["server"], seen["state"]) == ("web1", "up")
        assert seen["stats"]["cpus"] == os.cpu_count()

    @pytest.mark.parametrize("is_dead", [False, True])
    def test_tells_who_falls_silent(self, tmp_path: Path, is_dead: bool) -> None:
        with contextlib.ExitStack() as stack:
            server = stack.enter_context(ServerProcess(tmp_path, f"--port={find_fixed_port()}"))
            watcher = stack.enter_context(Watcher(server.place))
            watcher.wait_for("stats_update")
            began = time.monotonic()
            server.kill() if is_dead else os.kill(server.pid, signal.SIGSTOP)
            watcher.wait_for("server_silent")
            assert 2 < time.monotonic() - began < 5 + 10  # 10 for a busy machine
            if is_dead:
                stack.enter_context(ServerProcess(tmp_path, f"--port={server.port}"))
            else:
                os.kill(server.pid, signal.SIGCONT)
            began = time.monotonic()
            assert watcher.wait_for("server_back")["silent_ms"] > 2000
            assert time.monotonic() - began < 5 + 10
            watcher.stop()

    def test_asks_seldom_where_it_is_refused(self, tmp_path: Path) -> None:
        with ServerProcess(tmp_path, "--require-token") as server, Babbler(frame([])) as babbler:
            places = [one.place for one in (server, babbler)]
            with Watcher(*places) as watcher:
                watcher.wait_for("server_refused", 2)
                reasons = {e["server"]: e["reason"] for e in watcher.events if "reason" in e}
                assert reasons[places[0]].startswith("401: it needs a token")
                assert reasons[places[1]].startswith("it sent what cannot be understood: ")
                time.sleep(2)
                watcher.stop()
            assert len(server.log("refused")) <= 2
            assert len(babbler.received) == 1

    def test_has_its_own_threshold(self, tmp_path: Path) -> None:
        usage = Usage(tmp_path)
        with ServerProcess(tmp_path, "--interval=0.1", script=usage.script) as server:
            with Watcher("--cpu-alert=60", server.place, f"--log={tmp_path}/log") as watcher:
                watcher.wait_for("stats_update")
                usage.set(70)
                alert = watcher.wait_for("cpu_alert")
                assert (alert["by"], alert["cpu"]) == ("monitor", 70.0)
                assert alert["server"] == server.place
                usage.set(50)
                assert watcher.wait_for("alert_resolved")["cpu"] == 50.0
                watcher.stop()
        events = [one["event"] for one in read_lines(tmp_path / "log")]
        assert (events.count("cpu_alert"), events.count("alert_resolved")) == (1, 1)

    @in_loop
    async def test_forgets_what_it_could_not_understand(self) -> None:
        lost = asyncio.Event()

        def take(event: dict[str, Any]) -> None:
            if event["type"] == "stats_update":
                raise ValueError
            if event["type"] == "lost":
                lost.set()

        with Babbler(frame({**STATS, "peculiar": 1})) as babbler:
            target = sc.parse_server("babbler", babbler.place)
            running = asyncio.ensure_future(sc.Link(target, take).run())
            await asyncio.wait_for(lost.wait(), PATIENCE_SECONDS)
            await asyncio.sleep(0.1)
            gc.collect()
            dicts = [one for one in gc.get_objects() if isinstance(one, dict)]
            assert not [one for one in dicts if one.get("peculiar") == 1]
            running.cancel()

    # pytest hands a test's id to processes in a variable, for which a frame may be too long.
    @pytest.mark.parametrize("said", RUBBISH, ids=range(len(RUBBISH)))
    def test_takes_no_harm_from_rubbish(self, place, plain_server, tmp_path, said):
        """A server that speaks the protocol and then nonsense; the others are watched on."""
        with Babbler(said) as babbler:
            with Watcher(babbler.place, place, f"--log={tmp_path}/log") as watcher:
                wait_until(lambda: babbler.received)
                up = ("server_up", place)
                wait_until(lambda: any((e["type"], e["server"]) == up for e in watcher.events))
                plain_server.start("true")
                watcher.wait_for("task_complete")
                watcher.stop()
        (request,) = babbler.received  # the second time not at once
        assert request.startswith(b"GET /ws?hello&task=none HTTP/1.1\r\n")  # it knows no run yet
        assert not {0x1B, 0x9B} & set((tmp_path / "log").read_bytes())

    @pytest.mark.parametrize("extension, reason", [(TAKEN, "not offered"), ("", "1002: ")])
    def test_takes_no_extension(self, extension: str, reason: str) -> None:
        """It offers none, so none may be answered or used (RFC 6455, 4.1 and 5.2)."""
        event = squeeze(json.dumps(STATS).encode())
        said = sc.encode_frame(sc.Opcode.TEXT, event, is_deflated=True)
        with Babbler(said + sc.encode_frame(sc.Opcode.CLOSE, b"")) as babbler:
            babbler.extension = extension
            kinds, error = follow(babbler)
        assert "stats_update" not in kinds and error.status == 404 and reason in str(error)
        assert b"Sec-WebSocket-Extensions" not in babbler.received[-1]

    def test_takes_no_event_that_is_of_its_own_making(self, tmp_path: Path) -> None:
        """A server cannot say that it is silent, or lines of the output dropped."""
        kinds = ["lost", "restarted", "server_up", "server_silent", "server_back", "lines_dropped"]
        evil = "\x1b]0;evil\x07"
        ours = {"reason": evil, "status": 0, "boot_id": "Q", "lines": 1, "silent_ms": 1}
        hello = {**HELLO, "alert": {**ours, "type": "lost"}}
        said = [{**ours, "type": kind, "seq": 2 + n} for n, kind in enumerate([*kinds, "newer"])]
        events = [hello, *said, {**STATS, "seq": 99}]
        with Babbler(b"".join(map(frame, events))) as babbler:
            with Watcher(babbler.place, f"--log={tmp_path}/log") as watcher:
                watcher.wait_for("stats_update")
                assert [one["type"] for one in watcher.events] == ["server_up", "stats_update"]
                watcher.stop()
        records = [one["event"] for one in read_lines(tmp_path / "log")]
        assert records == ["server_up", "monitor_stop"]

    def test_takes_nothing_before_hello(self, monkeypatch: Any) -> None:
        end = sc.encode_frame(sc.Opcode.CLOSE, b"")
        with Babbler(frame(STATS) + end) as babbler:
            babbler.hello = b""
            kinds, error = follow(babbler)
        assert (kinds, error.status) == ([], 404)
        assert str(error) == "it says no hello, as an older ServerControl does"
        events = [{**STATS, "seq": number} for number in range(1, 61)]
        said = [{**HELLO, "boot_id": "c"}, {"type": "gap", "from": 0, "to": 0}, *events]

        monkeypatch.setattr(sc, "fetch", mock.AsyncMock(return_value=b"[]"))
        with Babbler(b"".join(map(frame, said)) + end) as babbler:
            kinds, error = follow(babbler)
        assert kinds == ["hello", "restarted", "hello", "gap", *["stats_update"] * 60]
        assert error.status == 0

    def test_takes_only_so_many_fragments(self, monkeypatch: Any) -> None:
        monkeypatch.setattr(sc, "MAX_EVENT_FRAGMENTS", 9)  # not the server's limit
        start, more = (build_frame(first, b"", None) for first in (TEXT_START, CONTINUE))
        with Babbler(start + more * 9) as one:
            kinds, error = follow(one)
        assert (kinds, error.status, str(error)) == (["hello"], 404, "1009: too many fragments")

    def test_answers_the_newest_ping_of_a_server_that_reads(self) -> None:
        pings = b"".join(sc.encode_frame(sc.Opcode.PING, b"%d" % n) for n in range(1000))
        answers = []
        for waiting_bytes in (0, sc.HIGH_WATER_BYTES):
            link, written = deaf_link(waiting_bytes)
            link._websocket = sc.WebSocketConnection(lambda: b"\0\0\0\0")
            with pytest.raises(StopIteration):
                link._receive(pings).send(None)
            answers.append(written)
        assert answers == [[sc.encode_frame(sc.Opcode.PONG, b"999", b"\0\0\0\0")], []]

    @pytest.mark.parametrize("is_gone", [False, True])
    def test_writes_nothing_to_a_connection_that_was_reset(self, is_gone: bool) -> None:
        link, written = deaf_link(is_gone=is_gone)
        link._write(sc.Opcode.TEXT, b"{}")
        link._write(sc.Opcode.PONG, b"x")
        assert len(written) == (0 if is_gone else 2)

    def test_remembers_no_more_tasks_than_hello_can_list(self, monkeypatch: Any) -> None:
        monkeypatch.setattr(sc, "MAX_OPEN_BYTES", 10_000)
        _, take, watched = make_monitor()
        start = {**START, "command": "x" * 1000}
        for number in range(100):  # each has ended before the next
            take({**start, "task_id": str(number)})
            take({**END, "task_id": str(number)})
        assert watched.open_bytes == 0
        with pytest.raises(sc.UnreachableError) as caught:
            for number in range(100, 200):
                take({**start, "task_id": str(number)})
        assert (caught.value.status, len(watched.tasks)) == (404, 8)

    @pytest.mark.parametrize("wrong", WRONG_STARTS)
    def test_remembers_nothing_that_is_no_task(self, wrong: dict[str, Any]) -> None:
        _, take, watched = make_monitor()
        for event in (START, END) if "task_id" in wrong else (START,):
            with pytest.raises(sc.NOT_AS_AGREED):
                take({**event, **wrong})
        assert (watched.tasks, watched.ended) == ({}, {})

    def test_writes_no_control_characters(self) -> None:
        said = {**START, "by": "\x1b[2J", "command": "\x1b]0;x\x07\u2028\ud800"}
        said["\x9b2J"] = "\x9b2J"
        with Babbler(frame(said)) as babbler:
            for options in ([], ["--json"]):
                with running_client("monitor", *options, babbler.place) as process:
                    lines = [process.stdout.readline() for _ in range(2)]
                assert b"u001b[2J" in lines[1]
                assert all(32 <= byte < 127 for line in lines for byte in line.rstrip(b"\n"))

    def test_tells_what_changed(self) -> None:
        told, take, _ = make_monitor()

        def lost(reason: str, status: int) -> list[str]:
            return take({"type": "lost", "reason": reason, "status": status})

        assert lost("a", 403) == ["server_refused", "lost"]
        assert lost("a", 403) == []
        assert lost("b", 0) == ["server_unreachable", "lost"]
        assert lost("a", 401) == ["server_refused", "lost"]
        assert take(HELLO) == ["server_back"]
        assert take(STATS) == ["stats_update"]
        assert lost("c", 0) == ["lost"]  # it may be back before it is called silent
        assert take(HELLO) == []
        assert lost("d", 401) == ["server_refused", "lost"]
        assert [event["type"] for event in told].count("server_up") == 0

    def test_tells_an_alert_once(self) -> None:
        alert, hello = ALERT, {**HELLO, "alert": ALERT}
        _, take, watched = make_monitor()
        assert take(hello) == ["server_up", "cpu_alert"]
        assert take(hello) == take(alert) == []
        assert watched.alert.endswith("CPU 99 %")
        watched.alert = "12:00 back"  # which is no news, as against an alert that goes on
        assert take(hello) == [] and watched.alert.endswith("CPU 99 %")
        assert take({**alert, "timestamp": 6}) == ["cpu_alert"]
        assert take({**alert, "type": "alert_resolved", "timestamp": 7}) == ["alert_resolved"]
        assert take({**hello, "seq": 9}) == take({**alert, "timestamp": 6}) == []  # replayed
        assert take({**alert, "seq": 10, "timestamp": 6}) == ["cpu_alert"]  # its clock was set back
        _, take, watched = make_monitor(cpu_alert=50)
        assert take(hello) == ["server_up"]
        assert take(alert) == []
        assert take({**STATS, "cpu": 60}) == ["cpu_alert", "stats_update"]
        _, take, watched = make_monitor()
        end = {"type": "alert_resolved", "timestamp": 7, "cpu": 3.0}
        alerts = [{**alert, "resolved": end}, {**alert, "timestamp": 8, "resolved": None}]
        old = {**HELLO, "alerts": alerts}
        assert take(old) == ["server_up", "cpu_alert", "alert_resolved", "cpu_alert"]
        assert take(old) == [] and watched.alert_at == 8
        _, take, watched = make_monitor(cpu_alert=50)
        assert take(old) == ["server_up"] and take({**STATS, "cpu": 60})[0] == "cpu_alert"
        assert take({**STATS, "cpu": 40}) == ["alert_resolved", "stats_update"]

    def test_writes_an_alert_once(self, tmp_path: Path) -> None:
        """Whether it is started again or not."""
        for news in (["server_up", "cpu_alert"], ["server_up"]):
            _, take, watched = make_monitor(path=f"{tmp_path}/log")
            watched.link.boot_id = HELLO["boot_id"]
            assert take({**HELLO, "alert": ALERT}) == news
            os.close(watched.monitor._log._fd)
        (written,) = logged(tmp_path / "log", "cpu_alert")
        assert (written["cpu"], written["raised"]) == (99.0, 5)

    @in_loop
    async def test_blames_nobody_for_its_own_silence(self, monkeypatch: Any) -> None:
        monkeypatch.setattr(sc, "SILENCE_SECONDS", 0.4)
        told, take, watched = make_monitor()
        take(HELLO)
        looking = asyncio.ensure_future(watched.monitor._look())
        await asyncio.sleep(0)
        time.sleep(1)  # stopped ourselves: nobody else is to blame
        await asyncio.sleep(0.2)
        assert told[-1]["type"] == "server_up"
        take({**STATS, "seq": 2})
        while told[-1]["type"] != "server_silent":
            watched.link.heard_at = time.monotonic() - 1
            await asyncio.sleep(0.01)
        assert told[-1]["reason"] == "nothing was heard for 0.4 s"
        assert watched.stats == {}
        assert take(HELLO) == ["server_back"] and told[-1]["silent_ms"] >= 1000
        looking.cancel()

    def test_does_not_wait_for_one_that_never_answers(self) -> None:
        with bind() as mute:
            began, place = time.monotonic(), f"127.0.0.1:{mute.getsockname()[1]}"
            with Watcher(place) as watcher:
                assert watcher.wait_for("server_unreachable")["reason"] == "no answer in time"
                assert time.monotonic() - began < 5 + 10  # 10 for a busy machine
            shown = check_command(1, "", "monitor", "--once", place)
            assert "no answer in time" in shown

    def test_waits_for_nobody_who_reads(self, place: str, plain_server: Any, tmp_path: Path):
        """Its log and its ears stay open; events that find no room are counted."""
        log = tmp_path / "log"
        with contextlib.ExitStack() as stack:
            words = ("monitor", "--json", place, "--log")
            process = stack.enter_context(running_client(*words, str(log)))
            other = stack.enter_context(running_client(*words, os.devnull))
            wait_until(lambda: log.exists() and "server_up" in log.read_text())
            command = "true #" + "\1" * 40_000  # six times as long in JSON: 16 MiB are soon full
            for _ in range(200):
                task = plain_server.run(command)
            wait_until(lambda: ends_in(log, task["task_id"]))
            other.terminate()
            assert other.wait(PATIENCE_SECONDS) == 0
            deadline = threading.Timer(PATIENCE_SECONDS, process.kill)
            stack.callback(deadline.cancel)
            deadline.start()
            events = map(json.loads, process.stdout)
            event = next(event for event in events if event["type"] == "lines_dropped")
            assert event["lines"] > 100 and event["server"] is None
            assert next(events)["server"] == place

    def test_goes_on_under_nohup(self, place: str) -> None:
        with Watcher(place, prefix=("nohup",)) as watcher:
            watcher.wait_for("server_up")
            watcher.process.send_signal(signal.SIGHUP)
            watcher.wait_for("stats_update", 2)
            watcher.stop()


class TestMonitorLog:
    """SPEC 11: every task of every server stands in the log once, or the gap is named."""

    @pytest.mark.parametrize("way", ["rename", "copytruncate"])
    def test_goes_on_after_a_rotation(self, tmp_path: Path, way: str) -> None:
        """The new file says where each server stands, so nothing needs the old one."""
        log, old, state = tmp_path / "log", tmp_path / "log.1", tmp_path / "state"
        with ServerProcess(state) as server:
            words = (server.place, f"--log={log}")
            told = "log: another monitor writes it"
            with Watcher(*words) as watcher:
                watcher.wait_for("stats_update")
                check_command(2, told, "monitor", *words)
                long, short = server.start("sleep 60"), server.run("exit 1")["task_id"]
                wait_until(lambda: ends_in(log, short))
                if way == "rename":
                    log.rename(old)
                else:
                    shutil.copy(log, old)
                    os.truncate(log, 0)
                wait_until(lambda: log.exists() and "position" in log.read_text())
                check_command(2, told, "monitor", *words)
            alone = server.run("echo alone")["task_id"]
            server.end(long)
            with Watcher(*words) as watcher:
                wait_until(lambda: ends_in(log, long, alone))
                watcher.stop()
        (position,) = logged(log, "position")
        assert [task["task_id"] for task in position["tasks"]] == [long]
        assert position["ended"] == [short]
        assert {one["task_id"] for one in logged(log, "task_complete")} == {long, alone}
        assert not logged(log, "gap")
        log.write_text(old.read_text() + log.read_text())
        check_monitor_log(log, state)

    @pytest.mark.parametrize("is_crash", [True, False])
    def test_restart_loses_no_task_a_crash_is_named(self, tmp_path: Path, is_crash: bool) -> None:
        log, state = tmp_path / "log", tmp_path / "state"
        with contextlib.ExitStack() as stack:
            with ServerProcess(state, f"--port={find_fixed_port()}") as server:
                watcher = stack.enter_context(Watcher(server.place, f"--log={log}"))
                watcher.wait_for("stats_update")
                long = server.start("sleep 60")
                watcher.wait_for("task_start")
                if is_crash:
                    server.kill()
            with ServerProcess(state, f"--port={server.port}") as again:
                again.run("exit 5")
                watcher.wait_for("task_complete", 1 if is_crash else 2)
                watcher.stop()
        assert [one["task_id"] for one in logged(log, "task_lost")] == [long] * is_crash
        if is_crash:
            (gap,) = logged(log, "gap")
            assert (gap["from"], gap["to"], gap["reason"]) == (gap["seq"] + 1, None, "restarted")
        check_monitor_log(log, state)

    def test_names_a_run_that_nobody_saw(self, tmp_path: Path) -> None:
        """Also where the run before it said goodbye, and it was over in a moment."""
        log, state = tmp_path / "log", tmp_path / "state"
        away = False
        with contextlib.ExitStack() as stack:
            port = f"--port={find_fixed_port()}"
            server = stack.enter_context(ServerProcess(state, port))
            cutter = stack.enter_context(Cutter(server.port, lambda _: 0 if away else None))
            watcher = stack.enter_context(Watcher(cutter.place, f"--log={log}"))
            watcher.wait_for("stats_update")
            seen = server.run("exit 1")["task_id"]
            watcher.wait_for("task_complete")
            away = True
            first_boot = server.get("/info")["boot_id"]
            server.process.terminate()
            assert watcher.wait_for("lost")["reason"].startswith("1001: ")
            server.process.wait()
            unseen = stack.enter_context(ServerProcess(state, port))
            unseen.run("exit 2")
            unseen.kill()
            third = stack.enter_context(ServerProcess(state, port))
            away = False
            last = third.run("exit 3")["task_id"]
            wait_until(lambda: ends_in(log, last))
            watcher.stop()
        assert [one["task_id"] for one in logged(log, "task_complete")] == [seen, last]
        (gap,) = logged(log, "gap")
        assert (gap["boot_id"], gap["to"], gap["reason"]) == (first_boot, None, "restarted")

    def test_names_what_the_server_kept_no_more(self, tmp_path: Path) -> None:
        """And still has the tasks, from the server's list of them."""
        log = tmp_path / "log"
        code = "made = sc.Feed\nsc.Feed = lambda encode, _, *more: made(encode, 20000, *more)"
        away = False
        with ServerProcess(tmp_path, code=code) as server:
            with Cutter(server.port, lambda _: 0 if away else None) as cutter:
                with Watcher(cutter.place, f"--log={log}") as watcher:
                    watcher.wait_for("stats_update")
                    open_one = server.start("sleep 60")
                    watcher.wait_for("task_start")
                    away = True
                    cutter.cut_all()
                    for number in range(40):
                        server.run(f"head -c 3000 /dev/zero | tr '\\0' x; exit {number}")
                    server.end(open_one)
                    away = False
                    watcher.wait_for("gap")
                    last = server.start("exit 1")
                    wait_until(lambda: ends_in(log, last))
                    watcher.stop()
        gap = logged(log, "gap")[0]
        assert gap["to"] >= gap["from"] > 0
        check_monitor_log(log, tmp_path)

    def test_makes_up_for_a_full_disk(self, place: str, plain_server: Any, tmp_path: Path):
        """What could not be written is written when there is room, also after half a record."""
        log, full = tmp_path / "log", tmp_path / "full"
        tasks: list[str] = []

        def run(count: int) -> None:
            tasks.extend(plain_server.run("true")["task_id"] for _ in range(count))
            ended = lambda: {e.get("task_id") for e in watcher.events if "state" in e}  # noqa: E731
            wait_until(lambda: set(tasks) <= ended())

        with Watcher(place, f"--log={log}") as watcher:
            watcher.wait_for("server_up")
            run(1)
            size = wait_until(lambda: "task_complete" in log.read_text() and log.stat().st_size)
            limit = functools.partial(resource.prlimit, watcher.process.pid, resource.RLIMIT_FSIZE)
            limit((size + 100, resource.RLIM_INFINITY))
            run(3)
            assert log.stat().st_size == size + 100
            limit((resource.RLIM_INFINITY,) * 2)
            wait_until(lambda: ends_in(log, *tasks))
            log.rename(tmp_path / "log.1")
            log.symlink_to("/dev/full")
            run(3)
            log.unlink()
            wait_until(lambda: log.exists() and ends_in(log, *tasks[4:]))
            watcher.stop(f"servercontrol: --log: {log}: No space left on device\n")
        lines = [*(tmp_path / "log.1").read_text().splitlines(), *log.read_text().splitlines()]
        broken = [line for line in lines if not line.endswith("}")]
        assert len(broken) == 1 and len(broken[0]) == 100
        full.write_text("\n".join(line for line in lines if line.endswith("}")))
        assert [one["task_id"] for one in logged(full, "task_complete")] == tasks

    def test_names_what_was_too_much_to_remember(self, tmp_path: Path, monkeypatch: Any) -> None:
        """And says where the servers stand after it, the position of the new file being lost."""
        monkeypatch.setattr(sc, "MAX_WAITING_BYTES", 900)
        path = tmp_path / "log"
        _, take, _ = make_monitor(path=str(path))
        path.unlink()
        path.symlink_to("/dev/full")
        for number in range(5):
            take({**START, "task_id": str(number)})
        path.unlink()
        take({**START, "task_id": "5"})
        gap, position, start, _ = read_lines(path)
        assert (gap["event"], gap["records"]) == ("gap", 6)
        assert gap["reason"].endswith("No space left on device")
        assert position["event"] == "position"
        assert [task["task_id"] for task in position["tasks"]] == ["0", "1", "2", "3", "4"]
        assert start["task_id"] == "5"

    def test_counts_all_that_was_too_much(self, monkeypatch: Any) -> None:
        monkeypatch.setattr(sc, "MAX_WAITING_BYTES", 300)
        log = sc.MonitorLog("/dev/full")
        for number in range(30):
            log.add({"time": "", "boot_id": "b", "seq": number})
        gap, *rest = log._waiting.splitlines()
        assert json.loads(gap)["records"] + len(rest) == 30

    def test_starts_on_a_device(self, place: str, plain_server: ServerProcess) -> None:
        with Watcher(place, "--log=/dev/full") as watcher, Watcher(place, "--log=/dev/full") as two:
            two.wait_for("stats_update")  # a device is everybody's
            plain_server.run("true")
            watcher.wait_for("stats_update")
            watcher.stop("servercontrol: --log: /dev/full: No space left on device\n")

    def test_one_large_event_loses_nothing(self, tmp_path: Path, monkeypatch: Any) -> None:
        """A gap may list more tasks than may wait for a full disk."""
        monkeypatch.setattr(sc, "MAX_WAITING_BYTES", 100_000)
        path = tmp_path / "log"
        log = sc.MonitorLog(str(path))
        log.read()
        for number in range(10_000):
            log.add({"time": "", "boot_id": "b", "seq": number})
        log.flush()
        os.close(log._fd)
        seqs = [one["seq"] for one in read_lines(path)]
        assert seqs == list(range(10_000))

    def test_says_again_where_a_quiet_server_stands(self, tmp_path: Path, monkeypatch: Any) -> None:
        """Only the end of a long log is read, and others may have written all of that."""
        monkeypatch.setattr(sc, "LOG_TAIL_BYTES", 80_000)
        monkeypatch.setattr(sc, "LOG_STEP_BYTES", 20_000)
        path = tmp_path / "log"

        @contextlib.contextmanager
        def watch(*names: str) -> Iterator[dict[str, sc.Watched]]:
            log = sc.MonitorLog(str(path))
            targets = [sc.parse_server(name, name) for name in names]
            everybody = [sc.Watched(target, None, log, lambda *_: None) for target in targets]
            sc.Monitor(everybody, log)
            yield dict(zip(names, everybody))
            os.close(log._fd)

        def run(watched: sc.Watched, task_id: int, is_ended: bool = True) -> None:
            watched.link.boot_id, watched.link.seq = watched.server.name, task_id
            for event in [START, END][: 1 + is_ended]:
                watched.take({**event, "task_id": str(task_id), "command": "x" * 500})

        with watch("quiet", "busy") as seen:
            run(seen["quiet"], 1)
            run(seen["quiet"], 2, is_ended=False)
            for number in range(300):
                run(seen["busy"], number)
        assert os.path.getsize(path) > 4 * sc.LOG_TAIL_BYTES
        with watch("quiet", "busy") as seen:
            assert (seen["quiet"].link.boot_id, seen["quiet"].link.seq) == ("quiet", 2)
            assert (list(seen["quiet"].tasks), list(seen["quiet"].ended)) == (["2"], ["1"])
        assert not logged(path, "gap")
        with watch("busy", "new") as seen:  # the latter was perhaps watched long ago
            (gap,) = logged(path, "gap")
            assert (gap["server"], gap["boot_id"], gap["from"], gap["to"]) == ("new", "", 1, None)
            for number in range(300, 600):
                run(seen["busy"], number)
        with watch("busy", "new", "quiet"):
            assert [one["server"] for one in logged(path, "gap")] == ["new", "quiet"]

    def test_tells_positions_that_do_not_fill_the_log(self, tmp_path: Path, monkeypatch: Any):
        monkeypatch.setattr(sc, "LOG_STEP_BYTES", 1000)
        monkeypatch.setattr(sc, "MAX_TOLD_ENDED", 400)
        log = tmp_path / "log"
        _, take, watched = make_monitor(path=str(log))
        for number in range(5000):
            watched.remember({"event": "task_lost", "task_id": str(number)})
        for number in range(100):
            take({**START, "task_id": str(5000 + number)})
        lines = log.read_text().splitlines()
        positions = [line for line in lines if '"event":"position"' in line]
        assert len(positions) > 2
        assert json.loads(positions[0])["ended"] == [str(n) for n in range(4600, 5000)]
        assert sum(map(len, positions)) < sum(map(len, lines)) / 2

    @pytest.mark.parametrize("field", ["seq", "boot_id", "server", "task_id", "event"])
    @pytest.mark.parametrize("value", ["1", "-1", "1.5", "1e999", "NaN", "null", "[]", "{}", '"x"'])
    def test_learns_nothing_from_foreign_lines(self, tmp_path: Path, field: str, value: str):
        log = tmp_path / "log"
        fields = {"server": "web1", "boot_id": "b", "seq": 1, "event": "task_complete"}
        line = json.dumps({**fields, "task_id": "1", field: "@"}).replace('"@"', value)
        log.write_bytes(b"\0\xff\n" + b"[" * 99999 + b"\n5\n" + line.encode() + b"\n\x1b[2J")
        _, take, watched = make_monitor(path=str(log))
        assert isinstance(watched.link.boot_id, str) and isinstance(watched.link.seq, int)
        assert watched.link.seq >= 0
        assert take(HELLO) == ["server_up"]
        assert json.loads(log.read_bytes().splitlines()[-1])["event"] == "server_up"

    def test_tells_tasks_apart_whose_ids_begin_anew(self, tmp_path: Path) -> None:
        """A server that has lost its state folder."""
        log, port = tmp_path / "log", 0
        for code in (1, 2):
            with ServerProcess(tmp_path / str(code), f"--port={port}") as server:
                port = server.port
                with Watcher(server.place, f"--log={log}") as watcher:
                    watcher.wait_for("server_up")
                    assert server.run(f"exit {code}")["task_id"] == "1"
                    watcher.wait_for("task_complete")
                with Watcher(server.place, f"--log={log}") as watcher:
                    watcher.wait_for("stats_update")
        ends = logged(log, "task_complete")
        assert [(one["task_id"], one["exit_code"]) for one in ends] == [("1", 1), ("1", 2)]

    @pytest.mark.parametrize("dying", [[], ["monitor"], ["server", "monitor"]], ids=" ".join)
    def test_is_complete_whatever_dies(self, tmp_path: Path, dying: list[str]) -> None:
        """What happens while no monitor runs is read from the server's kept events."""
        chance, places = random.Random(len(dying)), random.Random(1)
        log, state, half = tmp_path / "log", tmp_path / "state", '{"time":"half a li'
        port = f"--port={find_fixed_port()}"
        with contextlib.ExitStack() as stack:

            def start_server() -> ServerProcess:
                return stack.enter_context(ServerProcess(state, port))

            def start_watcher() -> Watcher:
                watcher = stack.enter_context(Watcher(cutter.place, f"--log={log}"))
                watcher.wait_for("stats_update")
                return watcher

            server = start_server()
            choose = lambda _: int(10 ** places.uniform(3, 4))  # noqa: E731
            cutter = stack.enter_context(Cutter(server.port, choose))
            watcher = start_watcher()
            long = server.start("sleep 60")
            for number in range(40):
                for _ in range(chance.randrange(4)):
                    server.start(f"sleep {chance.random() / 5:.2f}; exit {number}")
                what = chance.choice(["cut", "cut", "task", *dying])
                if what == "cut":
                    cutter.cut_all()
                elif what == "server":
                    server.kill()
                    server = start_server()
                elif what == "monitor":
                    watcher.stop() if number % 2 else watcher.process.kill()
                    watcher.process.wait()
                    log.write_text(log.read_text() + half)
                    watcher = start_watcher()
                else:
                    server.run(f"exit {number}")
            if "server" not in dying:
                server.end(long)
            last = server.start("exit 1")
            wait_until(lambda: ends_in(log, last))
            wait_until(lambda: not server.get("/info")["tasks_running"])
            # What was published before these statistics comes before them.
            now, is_stats = time.time() * 1000, is_type("stats_update")
            wait_until(lambda: [e for e in watcher.events if is_stats(e) and e["timestamp"] > now])
            watcher.stop()
            assert cutter.cut > 2
        log.write_text(log.read_text().replace(half + "\n", ""))
        check_monitor_log(log, state)
        assert "server" in dying or not logged(log, "gap")
        assert stat.S_IMODE(log.stat().st_mode) == 0o600


RESTORED = b"\x1b[?7h\x1b[?25h\x1b[?1049l"  # the terminal, by what a screen writes last


class ScreenWatcher(OnTerminal):
    """`monitor`."""

    def __init__(self, *arguments: str, script: str = "", **env: str) -> None:
        command = [sys.executable, script or compiled_script(), "monitor", *arguments]
        super().__init__(command, {"SERVERCONTROL_HOSTS": "/none", "NO_COLOR": "", **env}, 80, 24)

    def lines(self) -> list[str]:
        """What the newest picture shows."""
        self.read()
        whole = self.data.rpartition(b"\x1b[J")[0] or self.data
        frame = whole.rpartition(b"\x1b[H")[2].decode()
        return [re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", line) for line in re.split("\r+\n", frame)]

    def wait_for(self, pattern: str) -> list[str]:
        """Return the screen's lines once one matches."""

        def find() -> list[str] | None:
            lines = self.lines()
            return lines if any(re.search(pattern, one) for one in lines) else None

        return wait_until(find)

    def check_restored(self) -> None:
        # A terminal passes on what was written last a little later.
        wait_until(lambda: self.read() or self.data.rstrip().endswith(RESTORED))
        assert termios.tcgetattr(self.slave) == self.before
        assert b"Traceback" not in self.data

    def quit(self, end: Any = "q") -> None:
        """By a key, or by a signal."""
        self.type(end) if isinstance(end, str) else self.process.send_signal(end)
        assert self.process.wait(PATIENCE_SECONDS) == 0
        self.check_restored()


class TestMonitorScreen:
    """SPEC 11: `monitor` on a terminal."""

    @pytest.mark.parametrize("end", [*"q\x03\x1c", signal.SIGTERM, signal.SIGHUP, "stopped"])
    def test_shows_all_and_leaves_no_trace(self, place: str, tmp_path: Path, end: Any) -> None:
        hosts = write_hosts(tmp_path, f"web1 {place}", "gone 127.0.0.1:1")
        with ScreenWatcher(SERVERCONTROL_HOSTS=hosts) as screen:
            lines = screen.wait_for(r"^web1 +up +\d+\.\d")
            lines = screen.wait_for(r"^gone +unreachable")
            assert lines[0].startswith("2 servers: ")
            assert lines[1].split()[:3] == ["SERVER", "STATE", "CPU"]
            assert [line.split()[0] for line in lines[2:4]] == ["gone", "web1"]
            assert lines[-1].startswith("1-2 of 2 by state")
            assert len(lines) == 24 and all(len(line) <= 80 for line in lines)
            if end == "stopped":
                screen.type("\x13")  # Ctrl-S, which has its effect a little later
                wait_until(lambda: not select.select([], [screen.slave], [], 0)[1])
                end = signal.SIGTERM
            screen.quit(end)

    def test_names_of_any_script_take_their_cells(self) -> None:
        names = {"a": 1, "\u6f22\u5b57": 4, "e\u0301": 1, "\u304b\u3099": 2, "\u2764\ufe0f": 1}
        names.update({"a\u200b\u2060\ufeffb": 2, "\u202eab": 2})
        names.update({"\u1112\u1161\u11ab": 2, "\u0e2a\u0e31": 1})
        assert {name: sc.count_cells(name) for name in names} == names
        assert {sc.count_cells(sc.fit_text(name * 9, 5)) for name in names} == {5}

    def test_columns_stand_still_while_it_scrolls(self) -> None:
        names = ["short", "a-longer-name"]
        targets = [sc.parse_server(name, "a") for name in names]
        everybody = [sc.Watched(target, None, mock.Mock(), print) for target in targets]
        tables = [sc.format_table(everybody, 80, slice(n, n + 1)) for n in (0, 1)]
        assert [table[1][1].split()[0] for table in tables] == names
        assert [table[1][1].index("connecting") for table in tables] == [14, 14]

    def test_leaves_out_what_does_not_fit(self, monkeypatch: Any) -> None:
        """80 columns must not cut `memory 12.4 of 15.6 GiB` to `of 1`."""
        stats = {"cpu": 12.0, "ram_used": 1024 * 124, "ram_total": 1024 * 156}
        facts = {"state": sc.ServerState.UP, "tasks": {"1": {}}, "stats": stats}
        everybody: Any = [mock.Mock(server=sc.parse_server("web1", "a"), **facts)]
        whole = "1 server: 1 up · 1 task · CPU 12.0 %, memory 124.0 of 156.0 GiB · most CPU: web1, 12.0 %"
        parts = whole.split(" · ")
        for width in range(5, 100):
            shown = sc.format_totals(everybody, width)
            fitting = [n for n in range(2, 5) if len(" · ".join(parts[:n])) <= width]
            assert shown == " · ".join(parts[: max(fitting, default=1)])

    def test_scrolls_and_sorts_many(self, place: str, tmp_path: Path) -> None:
        names = [f"s{number:03}" for number in range(200)]
        hosts = write_hosts(tmp_path, *(f"{name} {place}" for name in names))
        with ScreenWatcher(SERVERCONTROL_HOSTS=hosts) as screen:
            screen.wait_for("200 servers: 200 up")
            screen.type("n")
            lines = screen.wait_for("by name")
            assert lines[-1].endswith("arrows scroll")
            assert [line.split()[0] for line in lines[2:-1]] == names[:21]
            for keys, first in (("j", 1), ("\x1b[B", 2), ("k", 1), ("\x1b[6~", 11), ("G", 179)):
                screen.type(keys)
                lines = screen.wait_for(rf"^{first + 1}-{first + 21} of 200 by name")
                assert [line.split()[0] for line in lines[2:-1]] == names[first : first + 21]
            screen.type("g")
            screen.wait_for("^1-21 of 200")
            screen.type("jj\x1b[B\x1bOB\x1b[5~\x1b[6~\x1b[1;5Cj")  # together
            screen.wait_for(r"^12-32 of 200 by name")
            screen.type("\x1b[F\x1b[H\x00\x7fé\x1b[")
            screen.wait_for(r"^1-21 of 200 by name")
            screen.type("jc")
            screen.wait_for("by CPU")
            screen.resize(20, 5)
            screen.process.send_signal(signal.SIGWINCH)
            wait_until(lambda: len(screen.lines()) == 5)
            assert all(len(line) <= 20 for line in screen.lines())
            screen.quit()

    def test_is_drawn_five_times_a_second(self, tmp_path: Path) -> None:
        with ServerProcess(tmp_path, "--interval=0.05") as server:
            with ScreenWatcher(server.place) as screen:
                screen.wait_for(" up ")
                began = time.monotonic()
                screen.read()
                before = screen.data.count(b"\x1b[H")
                server.start("timeout 2 yes")
                wait_until(lambda: screen.read() or screen.data.count(b"\x1b[H") > before)
                while time.monotonic() < began + 2:
                    screen.read()
                drawn = screen.data.count(b"\x1b[H") - before
                # At least for the new task: a figure that stays the same is not drawn again.
                assert 1 <= drawn <= 5 * (time.monotonic() - began) + 1
                screen.quit()

    @pytest.mark.parametrize("no_color", ["", "1"])
    def test_paints_where_it_may(self, no_color: str) -> None:
        with ScreenWatcher("127.0.0.1:1", NO_COLOR=no_color, TERM="xterm") as screen:
            screen.wait_for("unreachable")
            assert (b"\x1b[31m" in screen.data) == (not no_color)
            drawn = screen.data.count(b"\x1b[H")
            screen.resize(100, 24)  # as a terminal may lose a part of the picture
            wait_until(lambda: screen.read() or screen.data.count(b"\x1b[H") > drawn)

    def test_comes_back_from_ctrl_z(self, place: str) -> None:
        with ScreenWatcher(place) as screen:
            screen.wait_for(" up ")
            screen.type("\x1a")
            status = Path(f"/proc/{screen.process.pid}/stat")
            wait_until(lambda: status.read_text().split()[2] == "T")
            screen.check_restored()
            size = len(screen.data)
            screen.process.send_signal(signal.SIGCONT)
            wait_until(lambda: screen.lines() and b"\x1b[?1049h" in screen.data[size:])
            screen.quit()

    def test_shows_no_control_characters(self, tmp_path: Path) -> None:
        with Impostor(b"HTTP/1.0 403 x\r\n\r\n" + b'{"message":"\\u001b[2Jboo"}') as impostor:
            with ScreenWatcher(impostor.place) as screen:
                screen.wait_for(r"refused .*403: \?\[2Jboo")
                assert b"\x1b[2J" not in screen.data

    def test_keeps_its_columns(self, tmp_path: Path) -> None:
        """Long names are cut; East Asian characters take two cells, combining ones none."""
        pyte = pytest.importorskip("pyte", reason="needs pyte, see PAGE_PACKAGES in the Makefile")
        names = ["a", "服务器", "e\u0301te\u0301", "服" * 13, "x" * 24, "y" * 25, "服" * 40]
        hosts = write_hosts(tmp_path, *(f"{name} 127.0.0.1:1" for name in names))
        with ScreenWatcher(SERVERCONTROL_HOSTS=hosts) as screen:
            screen.wait_for("7 servers: 7 unreachable")
            emulator = pyte.Screen(80, 24)
            pyte.ByteStream(emulator).feed(screen.data)
            for row in range(2, 9):
                cells = [emulator.buffer[row][column].data for column in range(80)]
                assert cells[24] == " " and "".join(cells[25:36]) == "unreachable"
            assert emulator.buffer[1][0].reverse and emulator.buffer[2][30].fg == "red"

    def test_says_that_the_log_cannot_be_written(self, place: str, tmp_path: Path) -> None:
        with ScreenWatcher(place, "--log=/dev/full") as screen:
            screen.wait_for("^--log: /dev/full: No space left on device$")
            screen.wait_for(" up ")

    def test_counts_old_figures_no_more(self) -> None:
        _, take, watched = make_monitor()
        take(HELLO)
        take(STATS)
        assert sc.format_table([watched], 80)[1][1].split() == "web1 up 5.0 50.0 0.10 0".split()
        take({"type": "lost", "reason": "401: no", "status": 401})
        row = sc.format_table([watched], 80)[1][1]
        assert row.split() == ["web1", "refused", "-", "-", "-", "0", "401:", "no"]

    def test_ends_when_the_terminal_is_gone(self, place: str, tmp_path: Path) -> None:
        master, slave = pty.openpty()
        with (tmp_path / "errors").open("wb") as errors:
            streams = {"stdin": slave, "stdout": slave, "stderr": errors}
            with running_client("monitor", place, **streams) as process:
                os.close(slave)
                wait_until(lambda: b" up " in os.read(master, 65536))
                os.close(master)
                assert process.wait(PATIENCE_SECONDS) == 0
        assert (tmp_path / "errors").read_bytes() == b""

    def test_needs_no_keyboard(self, place: str) -> None:
        with Person("monitor", place, stdin=subprocess.DEVNULL) as person:
            person.read_until(" up ")
            person.read_until("by state · Ctrl-C quits")
            person.process.send_signal(signal.SIGINT)
            assert person.wait() == 0
            wait_until(lambda: person.read() or person.data.rstrip().endswith(RESTORED))

    def test_is_none_on_a_dumb_terminal(self, place: str) -> None:
        with ScreenWatcher(place, TERM="dumb") as screen:
            screen.wait_for(f" {place} server_up ")
            assert b"\x1b" not in screen.data

    @pytest.mark.parametrize("place_of_the_bug", ["Monitor._look", "Screen._compose"])
    def test_is_restored_after_a_bug(self, place: str, tmp_path: Path, place_of_the_bug: str):
        script = make_launcher(tmp_path, f"sc.{place_of_the_bug} = lambda *_: 1 / 0")
        with ScreenWatcher(place, script=script) as screen:
            assert screen.process.wait(PATIENCE_SECONDS) == 1
            # From Python 3.13 on tracebacks are coloured.
            wait_until(lambda: screen.read() or b"division by zero" in screen.data)
            assert termios.tcgetattr(screen.slave) == screen.before
            told = re.sub(rb"\x1b\[[0-9;]*m", b"", screen.data.rpartition(RESTORED)[2])
            assert told.rstrip().endswith(b"ZeroDivisionError: division by zero")


class TestRealRun:
    """A real job, watched by clients that are not ours, against the same output in a file."""

    script = str(SCRIPT)

    def test_every_client_gets_every_byte(self, server: ServerProcess, tmp_path: Path) -> None:
        source = tmp_path / "source"
        shutil.copytree(Path(json.__file__).parent.parent / "encodings", source)
        job = REAL_JOB.format(python=sys.executable, source=source)
        post = ["-H", "Content-Type: text/plain", "--data-binary"]
        post += [f"({job}) 2>&1 | tee {tmp_path}/expected", f"http://{server.place}/exec?follow"]
        url, node = f"ws://127.0.0.1:{server.ws_port}/", node_command()
        command = node or ["true"]  # which collects nothing
        collector = [*command, "-e", NODE_COLLECTOR, url]
        with subprocess.Popen(collector, stdout=-1, stderr=-1) as client:
            assert client.stderr.readline() == (b"open\n" if node else b"")
            with server.websocket() as websocket:
                followed = curl("-N", *post).stdout
                events = receive_events(websocket, lambda event: event["type"] == "task_complete")
            collected = client.communicate(timeout=PATIENCE_SECONDS)[0]
        expected = (tmp_path / "expected").read_bytes()
        chunks = [event["output"] for event in events if event["type"] == "task_output"]
        assert expected.count(b"\n") > 300
        assert "".join(chunks).encode("utf-8") == followed == expected
        assert server.request("GET", f"/logs?id={events[-1]['task_id']}&raw").body == expected
        if node is None:
            pytest.skip("no Node with a WebSocket client here")
        assert client.returncode == 0 and collected == expected


class TestManyViewers:
    """SPEC 10 and DESIGN 1: ten thousand viewers are nothing special."""

    def test_ten_thousand_idle_viewers_get_the_next_broadcast(self, tmp_path: Path):
        count, spare = 10_000, 200
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if hard < count + spare:
            pytest.skip(f"the hard limit of {hard} descriptors is too low: NOT TESTED")
        options = (f"--max-clients={count + spare}", "--interval=3600", "--loop=asyncio")
        script = make_launcher(tmp_path, PING_SECONDS=3600.0)  # nobody here answers a ping
        with contextlib.ExitStack() as stack:
            stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
            resource.setrlimit(resource.RLIMIT_NOFILE, (count + spare, hard))
            server = stack.enter_context(ServerProcess(tmp_path, *options, script=script))
            peers = []
            for _ in range(count):  # one by one: how a burst is taken is tested elsewhere
                peers.append(stack.enter_context(server.connect()))
                peers[-1].sendall(upgrade_request())
                assert peers[-1].recv(12) == b"HTTP/1.1 101"
            wait_until(lambda: server.get("/info")["clients"] == count)
            task_id = server.start("echo to everybody")
            for peer in peers:
                received = b""
                while b'"task_complete"' not in received:
                    data = peer.recv(65536)
                    assert data
                    received += data
                assert b'"task_id":"%b"' % task_id.encode() in received
                assert b"to everybody\\n" in received


class TestReadme:
    """The README's client examples, run as they stand there."""

    @pytest.mark.parametrize("name", ["client.py", "client.js"])
    def test_example_prints_every_kind(self, server: ServerProcess, tmp_path: Path, name: str):
        """Without a server, or with a wrong token, it says so."""
        command = [sys.executable, "-u"] if name == "client.py" else node_command()
        if command is None:
            pytest.skip("no Node with a WebSocket client here")
        (tmp_path / name).write_text(read_example(name))
        url, program = f"ws://127.0.0.1:{server.ws_port}/", [*command, str(tmp_path / name)]
        printed = ""
        with subprocess.Popen([*program, url], stdout=subprocess.PIPE) as client:
            try:
                for raw in client.stdout:
                    printed += raw.decode()
                    if "exit code" in printed:
                        break
                    if b"CPU" in raw:
                        server.run("echo one; exit 7")
            finally:
                client.kill()
        assert re.search(r"CPU [0-9.]+ %, RAM \d+ of \d+ MiB", printed)
        assert re.search(r"\[\d+\] \$ echo one; exit 7\n\[\d+\] one\n", printed)
        assert re.search(r"\[\d+\] exit code 7", printed)
        env = {**os.environ, "SERVERCONTROL_TOKEN": "not-the-token-of-this-server"}
        for place in (url, "ws://127.0.0.1:1/"):
            failed = subprocess.run([*program, place], env=env, capture_output=True, timeout=60)
            assert failed.returncode == 1 and failed.stderr

    def test_documents_are_short_and_their_links_lead_somewhere(self):
        assert len(README.read_text().splitlines()) <= 300 and len(DOCS) == 8
        for path in DOCS:
            text = path.read_text()
            assert len(text.splitlines()) <= (300 if path == README else 200), path
            for link in re.findall(r"\]\(([^):#]+)(?:#[^)]*)?\)", text):
                assert (path.parent / link).exists(), (path, link)

    def test_options_are_all_in_the_table(self):
        documented = set(re.findall(r"`(--[a-z-]+)`", read_docs()))
        assert {option for option, row in sc.OPTIONS.items() if row} <= documented


# Metrics, the alert webhook, Prometheus ------------------------------------------------------


def scrape(server: ServerProcess, **fields: str) -> dict[tuple[str, str], float]:
    answer = server.request("GET", "/metrics", **fields)
    assert answer.status == 200
    values = parse_metrics(answer.body.decode("utf-8"))[1]
    return {(name.replace("servercontrol_", ""), label): n for (name, label), n in values.items()}


class TestMetrics:
    """SPEC 12: what /metrics says, and that it is true."""

    def test_answer_has_every_metric_and_the_media_type(self, server: ServerProcess) -> None:
        server.get("/stats")  # CPU usage is known with the first
        answer = server.request("GET", "/metrics")
        assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
        kinds, values = parse_metrics(answer.body.decode("utf-8"))
        names = {name.replace("servercontrol_", ""): kind for name, kind in kinds.items()}
        assert names == SPEC_METRICS and sum(name[:8] == "process_" for name in kinds) == 3
        assert values["servercontrol_build_info", sc.__version__] == 1

    def test_promtool_has_nothing_to_say(self, server: ServerProcess) -> None:
        promtool = find_program("promtool", "prometheus")
        body = server.request("GET", "/metrics").body
        result = subprocess.run([promtool, "check", "metrics"], input=body, capture_output=True)
        assert (result.returncode, result.stdout, result.stderr) == (0, b"", b"")
        result = subprocess.run([promtool, "check", "metrics"], input=b"x_total{ 1\n", capture_output=True)  # fmt: skip
        assert result.returncode != 0  # it does look

    def test_machine_and_process_are_what_the_kernel_says(self, server: ServerProcess) -> None:
        stats, values = server.get("/stats"), scrape(server)
        for name in ("ram_total", "ram_used", "swap_used"):
            told = values[name.replace("ram", "memory") + "_bytes", ""]
            assert abs(told - stats[name] * sc.MIB) < 512 * sc.MIB, name
        usage = shutil.disk_usage("/")
        assert values["filesystem_size_bytes", "/"] == usage.total
        assert abs(values["filesystem_used_bytes", "/"] - usage.used) < 512 * sc.MIB
        assert 0 <= values["cpu_usage_ratio", ""] <= 1
        assert abs(values["uptime_seconds", ""] - float(Path("/proc/uptime").read_text().split()[0])) < 5  # fmt: skip
        nets = sc.parse_net_dev(Path("/proc/net/dev").read_text()).values()
        received, sent = (sum(net[way] for net in nets) for way in (0, 1))
        assert 0 <= values["network_receive_bytes_total", ""] <= received
        assert 0 <= values["network_transmit_bytes_total", ""] <= sent
        times = Path(f"/proc/{server.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
        seconds = sum(map(int, times)) / os.sysconf("SC_CLK_TCK")
        assert abs(values["process_cpu_seconds_total", ""] - seconds) < 0.5
        resident = server.resident_kib() * 1024
        assert 0.8 * resident < values["process_resident_memory_bytes", ""] < 1.2 * resident
        wait_until(lambda: scrape(server)["process_open_fds", ""] == server.descriptors() + 1)

    def test_counters_are_there_from_the_start_and_count(self, server: ServerProcess) -> None:
        wait_until(lambda: ("cpu_usage_ratio", "") in scrape(server))  # the first sample
        before = scrape(server)
        states = {label for name, label in before if name == "tasks_completed_total"}
        assert states == {"done", "killed", "timeout"}
        kinds = {label for name, label in before if name == "events_total"}
        assert kinds == set(EVENT_FIELDS)
        server.run("printf 'h\xe4llo'; sleep 0.06")
        server.run("sleep 60", timeout=0.02)
        task_id = server.start("sleep 60")
        assert scrape(server)["tasks_running", ""] == 1
        kill_task(server, task_id, "KILL")
        server.wait_for_end(task_id)
        server.request("GET", "/tasks", Authorization="Bearer wrong")
        server.request("GET", "/tasks", Host="evil.test")
        with server.websocket("/?since=1&boot=other") as viewer:
            assert json.loads(viewer.recv(timeout=PATIENCE_SECONDS))["type"] == "gap"
            after = scrape(server)
            assert after["viewers", ""] == before["viewers", ""] + 1
        grown = {key: after[key] - before[key] for key in after if after[key] != before[key]}
        counts = {
            ("tasks_started_total", ""): 3, ("task_duration_seconds_count", ""): 3,
            ("task_duration_seconds_bucket", "+Inf"): 3, ("task_output_bytes_total", ""): 6,
            **{("tasks_completed_total", state): 1 for state in ("done", "killed", "timeout")},
            **{("events_total", kind): 3 for kind in ("task_start", "task_complete")},
            **dict.fromkeys([("events_total", "task_output"), ("viewer_gaps_total", "")], 1),
            **dict.fromkeys([("refused_total", why) for why in ("wrong_token", "bad_host")], 1),
        }  # fmt: skip
        assert {key: grown.get(key) for key in counts} == counts
        assert grown.get(("task_duration_seconds_bucket", "0.01"), 0) <= 1  # the killed one
        assert 0.08 <= grown["task_duration_seconds_sum", ""] < PATIENCE_SECONDS

    def test_reasons_are_all_the_codes_that_are_noted(self) -> None:
        """A client cannot make new ones, and each is there from the start."""
        codes = re.findall(r'HttpError\((?:401|403|415|429), "(\w+)"', SOURCE)
        codes += re.findall(r'unauthorized\("(\w+)"', SOURCE)
        unnoted = {"bad_encoding"}  # the head is not understood: nobody was refused a right
        assert set(codes) - unnoted | {"exec_disabled", "forbidden"} == set(sc.REFUSALS)

    def test_descriptors_are_counted_where_their_folder_has_no_size(self) -> None:
        """Before Linux 6.2."""
        with mock.patch.object(os, "stat", return_value=mock.Mock(st_size=0)):
            counted = {name: value for name, value, _ in sc.read_own_usage()}
        assert counted["process_open_fds"] == len(os.listdir("/proc/self/fd")) - 1

    def test_process_without_proc_is_left_out(self) -> None:
        with mock.patch("builtins.open", side_effect=OSError):
            known = [name for name, value, _ in sc.read_own_usage() if value is not None]
        assert known == ["process_cpu_seconds_total"]

    def test_machine_is_as_it_is_now_however_long_the_interval(self, tmp_path: Path) -> None:
        """And nothing else notices: no event, and CPU usage is the interval's."""
        with ServerProcess(tmp_path, "--interval=3600") as server:
            stats, first = server.get("/stats"), scrape(server)
            wait_until(lambda: scrape(server)["uptime_seconds", ""] >= first["uptime_seconds", ""] + 2)  # fmt: skip
            assert server.get("/stats") == stats
            assert scrape(server)["cpu_usage_ratio", ""] == first["cpu_usage_ratio", ""]
            assert len(server.get("/stats?history")["samples"]) == 1

    @staticmethod
    def make_sampler(*samples: Any) -> sc.Sampler:
        with mock.patch.object(sc, "choose_source", lambda: mock.Mock(side_effect=samples)):
            config = sc.Config(cpu_alert=100)
            return sc.Sampler(config, mock.MagicMock(), mock.Mock(), {}, mock.Mock())

    @in_loop
    async def test_sample_between_ticks_changes_no_rate(self) -> None:
        """Each byte is counted once, and the rates of a tick are those since the tick before."""
        start = time.monotonic() - 100
        samples = [
            make_sample(now=start + at, busy_ticks=busy, total_ticks=at, net={"a": (n, 2 * n)})
            for at, busy, n in ((0, 0, 40), (10, 10, 340), (15, 10, 740), (20, 15, 840))
        ]
        fresh = make_sample(now=start + 200)  # this test can take as long as it likes
        sampler = self.make_sampler(*samples, OSError(errno.EMFILE, "no descriptors"), fresh)
        sampler.tick()
        sampler.refresh()
        assert (sampler.sample, sampler.net_recv, sampler.net_sent) == (samples[2], 740, 1480)
        assert sampler.publish.call_count == len(sampler.history) == 1
        sampler.tick()
        assert (sampler.sample, sampler.net_recv, sampler.net_sent) == (samples[3], 840, 1680)
        sampler.refresh()  # which fails
        assert sampler.sample is samples[3]
        for _ in range(10):  # a fresh sample is not taken anew, however often somebody scrapes
            sampler.refresh()
            assert sampler.sample is fresh and sampler._read_sample.call_count == 6
        first, second = (call[1] for call in sampler.publish.call_args_list)
        assert (first["net_recv"], second["net_recv"]) == (30, 50)
        assert (first["cpu"], second["cpu"]) == (100.0, 50.0)

    def test_events_add_up_to_the_newest_seq(self, server: ServerProcess) -> None:
        server.get("/stats")  # there is one event
        low, values, high = server.get("/info"), scrape(server), server.get("/info")
        total = sum(n for (name, _), n in values.items() if name == "events_total")
        assert 0 < low["seq"] <= total <= high["seq"]

    @in_loop
    async def test_network_counters_never_go_back(self) -> None:
        """An interface that is removed takes its bytes out of the kernel's sum."""
        readings = [
            {"a": (20, 10), "b": (80, 40)}, {"a": (25, 12), "b": (125, 48)}, {"a": (27, 13)},
            {"a": (28, 23)},
        ]  # fmt: skip
        sampler = self.make_sampler(*(make_sample(net=net) for net in readings))
        seen = [(sampler.net_recv, sampler.net_sent)]
        for _ in readings[1:]:
            sampler.tick()
            seen.append((sampler.net_recv, sampler.net_sent))
        assert seen == [(100, 50), (150, 60), (152, 61), (153, 71)]


class Receiver(Impostor):
    """Takes alerts. answers: one a request, the last one for all that follow; a status, or

    "hang": nothing, for ever; "drip": a byte of an endless answer now and then; "noise": no HTTP;
    "close": nothing, and closes; "slow": 200 after a while; "early": 103 and 100 before 200;
    "promise": 100, and closes; "promises": 100 for ever.
    """

    CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
    PARTS = {
        "noise": b"SSH-2.0-OpenSSH_9.2\r\n", "close": b"", "promise": CONTINUE,
        "early": b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n" + CONTINUE + b"HTTP/1.1 200 OK\r\n\r\n",
        "slow": b"HTTP/1.1 200 OK\r\n\r\n",
    }  # fmt: skip

    def __init__(self, *answers: Any, certificate: Certificate | None = None) -> None:
        super().__init__(b"")
        self.answers = list(answers)
        # (path, fields, JSON) of each request, and when it came.
        self.posts: list[tuple[str, Any, Any]] = []
        self.times: list[float] = []
        self.context = None
        if certificate is not None:
            self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self.context.load_cert_chain(certificate.cert, certificate.key)
        self.url = f"{'https' if certificate else 'http'}://localhost:{self.port}"

    def _serve(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError):
            if self.context is not None:
                connection = self.context.wrap_socket(connection, server_side=True)
            super()._serve(connection)

    def serve(self, connection: socket.socket, request: bytes) -> None:
        self.times.append(time.monotonic())
        stream = io.BytesIO(request)
        path = stream.readline().split()[1].decode()
        fields = http.client.parse_headers(stream)
        self.posts.append((path, fields, json.loads(stream.read())))
        answer = self.answers[0] if len(self.answers) == 1 else self.answers.pop(0)
        if answer == "hang":
            connection.recv(1)
        while answer in ("drip", "promises"):  # until we are left
            connection.sendall(b"H" if answer == "drip" else self.CONTINUE)
            time.sleep(0.05 if answer == "drip" else 0)
        time.sleep(0.2 if answer == "slow" else 0)
        status = f"HTTP/1.1 {answer} Whatever\r\nLocation: /elsewhere\r\n\r\n"
        connection.sendall(self.PARTS.get(answer, status.encode()))


QUICK_TRIES = {"WEBHOOK_PAUSES": (0.05, 0.1)}


@contextlib.contextmanager
def alerting(state: Path, url: str, *options: str, env: Any = None, **given: Any) -> Iterator[Any]:
    """A server that posts alerts to a place; its CPU usage, which is busy now, is server.usage."""
    usage = Usage(state, **given)
    words = ("--interval=0.05", "--log-level=debug", f"--alert-webhook={url}/", *options)
    with ServerProcess(state, *words, script=usage.script, env=env) as server:
        server.usage = usage
        usage.set(95)
        yield server


class TestWebhook:
    """SPEC 1, 2: each cpu_alert and alert_resolved is posted; nothing else notices."""

    def test_alert_and_its_end_are_posted(self, tmp_path: Path) -> None:
        usage = Usage(tmp_path)
        options = ("--interval=0.05", "--log-level=debug")
        with Receiver(204) as receiver:
            url = receiver.url.replace("//", "//someone:s3cret@") + "/in?key=t0ken"
            env = {"SERVERCONTROL_ALERT_WEBHOOK": url}
            with ServerProcess(tmp_path, *options, script=usage.script, env=env) as server:
                with server.websocket() as websocket:
                    usage.set(95)
                    events = receive_events(websocket, is_type("cpu_alert"))[-1:]
                    usage.set(10)
                    events += receive_events(websocket, is_type("alert_resolved"))[-1:]
                wait_until(lambda: len(server.log("webhook_sent")) == 2)
                info = server.get("/info")
                assert "SERVERCONTROL_ALERT_WEBHOOK" not in server.run("env")["output"]
                assert not server.log("unknown_variable")
            told = {name: info[name] for name in ("hostname", "version", "boot_id")}
            told["http"] = f"http://{server.place}"
        assert [body for _, _, body in receiver.posts] == [{**e, "server": told} for e in events]
        for path, fields, _ in receiver.posts:
            assert path == "/in?key=t0ken" and fields["Content-Type"] == "application/json"
            assert fields["Host"] == f"localhost:{receiver.port}"
            code = base64.b64encode(b"someone:s3cret").decode()
            assert fields["Authorization"] == f"Basic {code}"
        assert server.log("webhook_sent")[0]["url"] == receiver.url
        assert not re.search("s3cret|t0ken|someone", "".join(server.stderr))

    def test_third_try_comes_after_the_pauses(self, tmp_path: Path) -> None:
        """What comes before an answer is no failure (RFC 9110, 15.2)."""
        with Receiver(500, "close", "early") as receiver:
            with alerting(tmp_path, receiver.url, WEBHOOK_PAUSES=(0.2, 0.5)) as server:
                server.wait_for_log("webhook_sent")
        assert not server.log("webhook_failed")
        first, second, third = receiver.times
        assert second - first >= 0.2 and third - second >= 0.5
        assert len({json.dumps(body) for _, _, body in receiver.posts}) == 1

    @pytest.mark.parametrize(
        "answer, reason",
        [(500, "it answered 500"), (404, "it answered 404"), (302, "it answered 302"),
         (307, "it answered 307"), ("noise", "no HTTP answer"), ("close", "no HTTP answer"),
         ("hang", "timed out"), ("drip", "timed out"), ("promise", "no HTTP answer"),
         ("promises", "no HTTP answer")],
    )  # fmt: skip
    def test_failure_is_one_line_and_the_next_alert_is_tried(self, tmp_path, answer, reason):
        with Receiver(answer, answer, answer, 200) as receiver:
            url, seconds = f"{receiver.url}/x", 1.0 if reason == "timed out" else 30.0
            with alerting(tmp_path, url, WEBHOOK_SECONDS=seconds, **QUICK_TRIES) as server:
                failed = server.wait_for_log("webhook_failed")
                server.usage.set(10)
                server.wait_for_log("webhook_sent")
        assert reason in failed["reason"] and failed["alert"] == "cpu_alert"
        assert len(server.log("webhook_failed")) == 1
        assert {path for path, _, _ in receiver.posts} == {"/x/"}  # no redirect was followed
        kinds = [body["type"] for _, _, body in receiver.posts]
        assert kinds[:4] == ["cpu_alert"] * 3 + ["alert_resolved"]

    def test_place_that_cannot_be_reached_is_a_failure(self, tmp_path: Path) -> None:
        with bind() as silent, bind() as dead:
            hangs, refuses = (f"127.0.0.1:{one.getsockname()[1]}" for one in (silent, dead))
            dead.close()
            for place, reason in (
                (f"http://{refuses}", "refused"), ("http://nobody.invalid", ""),
                ("http://a..b", ""), (f"https://{hangs}", "timed out"),  # in the handshake
            ):  # fmt: skip
                with alerting(tmp_path, place, WEBHOOK_SECONDS=0.3, **QUICK_TRIES) as server:
                    failed = server.wait_for_log("webhook_failed")
                assert reason in failed["reason"] and failed["reason"]
                assert failed["url"] == place

    @pytest.mark.parametrize("trusted", [True, False])
    def test_certificate_is_checked(self, tmp_path: Path, certificates: Any, trusted: bool):
        env = {"SSL_CERT_FILE": str(certificates[not trusted].cert)}
        with Receiver(200, certificate=certificates[0]) as receiver:
            with alerting(tmp_path, receiver.url, env=env, **QUICK_TRIES) as server:
                if trusted:
                    assert server.wait_for_log("webhook_sent")["url"] == receiver.url
                else:
                    assert "certificate" in server.wait_for_log("webhook_failed")["reason"].lower()
                    assert receiver.posts == []

    SLOW_NAMES = """
import socket, time
find = socket.getaddrinfo
socket.getaddrinfo = lambda host, *rest, **more: time.sleep(60) if host == "slow.test" else find(host, *rest, **more)
"""

    @each_loop
    @pytest.mark.parametrize("what", ["receiver", "name"])
    def test_hanging_delays_neither_requests_nor_the_end(self, tmp_path, loop, what):
        with Receiver("hang") as receiver:
            place = receiver.url if what == "receiver" else "http://slow.test"
            with alerting(tmp_path, place, f"--loop={loop}", code=self.SLOW_NAMES) as server:
                server.wait_for_log("cpu_alert")
                if what == "receiver":
                    wait_until(lambda: receiver.posts)
                delays = []
                for _ in range(50):
                    start = time.monotonic()
                    server.get("/health")
                    delays.append(time.monotonic() - start)
                assert statistics.median(delays) < 0.5  # a wait for it would be all of 10 s
                assert server.run("echo on")["output"] == "on\n"
                start = time.monotonic()
                os.kill(server.pid, signal.SIGTERM)
                assert server.process.wait(PATIENCE_SECONDS) == 0
                assert time.monotonic() - start < 9.0
            assert server.log("webhook_dropped")[-1]["alerts"] >= 1

    def test_alert_that_waits_at_the_end_gets_its_chance(self, tmp_path: Path) -> None:
        patient = {"STOP_CLOSE_SECONDS": 10.0}
        with Receiver("slow") as receiver, alerting(tmp_path, receiver.url, **patient) as server:
            wait_until(lambda: receiver.posts)
            os.kill(server.pid, signal.SIGTERM)
            assert server.process.wait(PATIENCE_SECONDS) == 0
        assert server.log("webhook_sent") and not server.log("webhook_dropped")

    def test_oldest_of_too_many_is_dropped_and_logged(self) -> None:
        log, count = mock.Mock(), sc.MAX_WEBHOOK_ALERTS
        with mock.patch.object(threading, "Thread"):
            webhook = sc.Webhook(sc.parse_webhook_url("http://u:p@a/x"), {}, log)
        for seq in range(count):
            webhook.send({"seq": seq})
        assert webhook.pending == count and not log.mock_calls
        webhook.send({"seq": count})
        assert webhook.pending == count and webhook._alerts.get_nowait() == {"seq": 1}
        log.write_limited.assert_called_once_with("warning", "webhook_dropped", url="http://a")

    @pytest.mark.parametrize("url", ["", "ftp://s3cret@h/", "http://s3cret@/", "http://h:x/s3cret"])
    def test_bad_url_is_refused_and_not_shown(self, url: str) -> None:
        with pytest.raises(sc.ConfigError, match="--alert-webhook") as caught:
            sc.parse_config([f"--alert-webhook={url}"], {})
        assert "s3cret" not in str(caught.value)

    def test_alert_for_waits_until_it_has_lasted(self, tmp_path: Path) -> None:
        usage = Usage(tmp_path)
        options = ("--interval=0.05", "--alert-for=3")
        with ServerProcess(tmp_path, *options, script=usage.script) as server:
            with server.websocket() as websocket:
                for percent in (95, 10, 96):  # the first does not last
                    usage.set(percent)
                    events = receive_events(websocket, lambda e, p=percent: e.get("cpu") == p)
                    assert not [event for event in events if event["type"] == "cpu_alert"]
                begin = events[-1]["timestamp"]
                alert = receive_events(websocket, is_type("cpu_alert"))[-1]
        assert 2900 <= alert["timestamp"] - begin < 12000


def find_fixed_port() -> int:
    """Return a free port below those that the kernel gives out meanwhile for port 0."""
    for port in random.SystemRandom().sample(range(20000, 32000), 100):
        with contextlib.suppress(OSError):
            bind(port).close()
            return port
    raise AssertionError("no port is free")


@contextlib.contextmanager
def in_foreground(command: list[str], log: Path, ready: Callable[[], Any]) -> Iterator[Any]:
    """A program that serves, from when `ready` is true."""
    with log.open("ab") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, stdin=subprocess.DEVNULL)

    def is_ready() -> Any:
        assert process.poll() is None, log.read_text()
        return ready()

    try:
        wait_until(is_ready)
        yield process
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(PATIENCE_SECONDS)
        process.kill()
        process.wait()


class Engine:
    """Prometheus or Alertmanager, on a port of its own. probe: a path that answers when it does."""

    def __init__(self, program: str, probe: str, folder: Path, *options: str) -> None:
        self.port = find_fixed_port()
        listen = f"--web.listen-address=127.0.0.1:{self.port}"
        config = f"--config.file={folder}/{program}.yml"
        command = [find_program(program, program), config, listen, *options]

        def is_ready() -> Any:
            with contextlib.suppress(OSError, AssertionError):
                return self.get(probe)

        self.running = in_foreground(command, folder / f"{program}.log", is_ready)

    def get(self, path: str, **query: str) -> Any:
        return ask_host("127.0.0.1", self.port, f"{path}?{urllib.parse.urlencode(query)}")

    def query(self, text: str) -> list[Any]:
        """Return the result of a PromQL query; an error fails."""
        told = self.get("/api/v1/query", query=text)
        return told["data"]["result"] if not told.get("warnings") else []

    def firing(self) -> set[tuple[str, str]]:
        """Return (alert, hostname) of what Alertmanager has."""
        alerts = [alert["labels"] for alert in self.get("/api/v2/alerts")]
        return {(labels["alertname"], labels.get("hostname", "")) for labels in alerts}


class TestPrometheus:
    """The README's recipe with Debian's Prometheus and Alertmanager."""

    def test_recipe_of_the_readme(self, tmp_path: Path, certificates: list[Certificate]) -> None:
        """Three servers, the last one with TLS; other ports, and nothing is waited for."""
        nobody = "route: {receiver: nobody}\nreceivers: [{name: nobody}]\n"
        (tmp_path / "prometheus-alertmanager.yml").write_text(nobody)
        alertmanager = Engine(
            "prometheus-alertmanager", "/api/v2/status", tmp_path,
            f"--storage.path={tmp_path}/alerts", "--cluster.listen-address=",
        )  # fmt: skip
        storage = f"--storage.tsdb.path={tmp_path}/data"
        prometheus = Engine("prometheus", "/api/v1/targets", tmp_path, storage)
        config = read_example("prometheus.yml").replace("15s", "1s")
        config = config.replace("# tls_config", "tls_config")
        config = config.replace(":9093", f":{alertmanager.port}")
        (tmp_path / "prometheus.yml").write_text(config)
        rules = re.sub(r"for: \w+", "for: 0s", read_example("alerts.yml"))
        (tmp_path / "alerts.yml").write_text(rules)
        (tmp_path / "view-token").write_text(SERVER_VIEW_TOKEN + "\n")
        certificates[0].copy_to(tmp_path)
        (tmp_path / "cert.pem").rename(tmp_path / "ca.pem")
        port = find_fixed_port()
        options = ("--require-token", f"--discovery-port={port}")
        tls = TlsServer(tmp_path / "2", certificates[0], *options, env=TOKENS)
        servers = [ServerProcess(tmp_path / n, *options, env=TOKENS) for n in "01"]
        with contextlib.ExitStack() as stack:
            for server in [*servers, tls]:
                server.fields = (bearer(SERVER_RUN_TOKEN),)
                stack.enter_context(server)
            words = ("discover", "--prometheus", f"--discovery-port={port}", "--timeout=1")
            discover = lambda: json.loads(run_client(*words).stdout)  # noqa: E731
            found = wait_until(lambda: len(listed := discover()) == 3 and listed)
            (tmp_path / "servers.json").write_text(json.dumps(found))
            names = {one["targets"][0].split(":")[1]: one["labels"]["hostname"] for one in found}
            name0, name1, name2 = (names[str(server.port)] for server in [*servers, tls])
            stack.enter_context(alertmanager.running)
            stack.enter_context(prometheus.running)
            self.check_all_are_scraped(prometheus, {name0, name1, name2})
            early = {"TasksStopped", "ServerSilent"}  # one may be silent while it starts
            wait_until(lambda: not early & {alert for alert, _ in alertmanager.firing()})
            for _ in range(3):
                servers[0].run("sleep 60", timeout=0.1)
            wait_until(lambda: ("TasksStopped", name0) in alertmanager.firing())
            servers[1].__exit__(None, None, None)
            wait_until(lambda: ("ServerSilent", name1) in alertmanager.firing())
            wrong = {("TasksStopped", name1), ("ServerSilent", name0), ("ServerSilent", name2)}
            wait_until(lambda: not wrong & alertmanager.firing())
            self.check_queries_find_something(prometheus)

    @staticmethod
    def check_all_are_scraped(prometheus: Engine, names: set[str]) -> None:
        wait_until(lambda: len(prometheus.query('up{job="servercontrol"} == 1')) == 3)
        found = {one["metric"]["hostname"] for one in prometheus.query("servercontrol_load1")}
        assert found == names and len(names) == 3
        targets = prometheus.get("/api/v1/targets")["data"]["activeTargets"]
        schemes = sorted(target["scrapeUrl"].split(":")[0] for target in targets)
        assert schemes == ["http", "http", "https"]
        (rules,) = prometheus.get("/api/v1/rules")["data"]["groups"]
        alerts = {rule["name"] for rule in rules["rules"]}
        assert alerts == {"ServerSilent", "CpuHigh", "DiskFull", "TasksStopped"}

    @staticmethod
    def check_queries_find_something(prometheus: Engine) -> None:
        """One server is silent by now, and tasks have run."""
        lines = read_example("queries.promql").splitlines()
        queries = [line for line in lines if not line.startswith("#")]
        assert len(queries) == 5
        for query in queries:
            found = wait_until(lambda q=query: prometheus.query(q))
            values = [float(one["value"][1]) for one in found]
            assert not [value for value in values if math.isnan(value)], (query, values)
        assert 0.05 < values[0] <= 10  # the last query: tasks of 0.1 s

    def test_list_of_servers_is_as_the_readme_shows_it(self) -> None:
        shown = json.loads(read_example("servers.json"))
        found = [
            {"hostname": "web1", "address": "10.0.0.5", "port": 8080, "tls": False},
            {"hostname": "db1", "address": "10.0.0.6", "port": 8080, "tls": True},
        ]
        assert json.loads(sc.format_prometheus(found)) == shown


# Networks, proxies, Ansible, a log shipper ---------------------------------------------------


class Network:
    """Hosts on a switch, each a network namespace of this machine: host N has 10.77.0.N. Behind a
    router, 10.77.0.254, is the host `far`, 10.78.0.1."""

    def __init__(self, folder: Path) -> None:
        find_program("ip", "iproute2")
        self.folder = folder
        self.prefix = f"sc{os.getpid()}-"
        self.hosts = ["switch", "router", "far", *"12345"]

    def make(self) -> None:
        for host in self.hosts:
            command = ["ip", "netns", "add", self.prefix + host]
            made = subprocess.run(command, capture_output=True)
            if made.returncode:
                why = f"NETWORKS ARE NOT TESTED, for which one must be root: {made.stderr!r}"
                skip_aloud(why)
            self.ip(host, "link set lo up")
        self.ip("switch", "link add br0 type bridge")
        self.ip("switch", "link set br0 up")
        for host in self.hosts[3:]:
            self.plug_in(host, f"10.77.0.{host}/24")
            self.ip(host, "route add default via 10.77.0.254")
        self.plug_in("router", "10.77.0.254/24")
        self.connect("router", "eth1", "10.78.0.254/24", "far", "eth0", "10.78.0.1/24")
        self.ip("far", "route add default via 10.78.0.254")
        forward = "echo 1 >/proc/sys/net/ipv4/ip_forward"
        subprocess.run([*self.at("router"), "sh", "-c", forward], check=True)

    def remove(self) -> None:
        for host in self.hosts:
            subprocess.run(["ip", "netns", "del", self.prefix + host], capture_output=True)

    def ip(self, host: str, words: str) -> None:
        """Run a command of ip(8) on a host."""
        command = ["ip", "-n", self.prefix + host, *words.split()]
        subprocess.run(command, check=True, capture_output=True)

    def at(self, host: str) -> list[str]:
        """Return what makes a command run on a host."""
        return ["ip", "netns", "exec", f"{self.prefix}{host}"]

    def connect(self, *ends: str) -> None:
        """Lay a cable between two hosts. ends: of each its name, interface, and address if any."""
        here, name, _, there, peer, _ = ends
        self.ip(here, f"link add {name} type veth peer name {peer} netns {self.prefix}{there}")
        for host, interface, address in (ends[:3], ends[3:]):
            if address:
                self.ip(host, f"address add {address} broadcast + dev {interface}")
            self.ip(host, f"link set {interface} up")

    def plug_in(self, host: str, address: str) -> None:
        self.connect(host, "eth0", address, "switch", f"port-{host}", "")
        self.ip("switch", f"link set port-{host} master br0")

    def serve(self, host: str, *options: str) -> ServerProcess:
        ports = ("--port=8080", "--ws-port=8082", "--discovery-port=8081")
        prefix, state = (*self.at(host),), self.folder / host
        return ServerProcess(state, *ports, *options, env=TOKENS, prefix=prefix)

    def count_datagrams(self, host: str) -> tuple[int, int]:
        """Return how many UDP datagrams a host has received and sent."""
        command = [*self.at(host), "cat", "/proc/net/snmp"]
        table = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        names, values = (line.split() for line in table.splitlines() if line.startswith("Udp:"))
        counts = dict(zip(names, values))
        return int(counts["InDatagrams"]), int(counts["OutDatagrams"])


# Run between two namespaces: a link, lossy and slow, for kernels without netem. Arguments: the
# namespaces, the part of the packets that is lost, seconds on the way.
LOSSY_LINK = r"""
import collections, ctypes, fcntl, os, random, select, signal, struct, sys, time

def open_tunnel(namespace):
    with open("/run/netns/" + namespace) as file:
        assert ctypes.CDLL(None).setns(file.fileno(), 0) == 0
    fd = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(fd, 0x400454CA, struct.pack("16sH22x", b"lossy", 0x1001))  # TUNSETIFF: tun, no_pi
    return fd

fds = [open_tunnel(namespace) for namespace in sys.argv[1:3]]
loss, delay = map(float, sys.argv[3:])
other, waiting, chance = dict(zip(fds, fds[::-1])), collections.deque(), random.Random(7)
counts = [0, 0]
signal.signal(signal.SIGTERM, lambda *_: sys.exit(print(*counts)))
print("ready", flush=True)
while True:
    timeout = max(0, waiting[0][0] - time.monotonic()) if waiting else None
    for fd in select.select(fds, [], [], timeout)[0]:
        packet, is_lost = os.read(fd, 65536), chance.random() < loss
        counts[is_lost] += 1
        if not is_lost:
            waiting.append((time.monotonic() + delay, other[fd], packet))
    while waiting and waiting[0][0] <= time.monotonic():
        _, fd, packet = waiting.popleft()
        try:
            os.write(fd, packet)
        except OSError:  # that end is not up yet
            counts[1] += 1
"""


@pytest.fixture(scope="class")
def network(tmp_path_factory: Any) -> Iterator[Network]:
    """Hosts 1 to 3 serve the network, 4 is where the admin sits, 5 serves itself alone."""
    network = Network(tmp_path_factory.mktemp("network"))
    with contextlib.ExitStack() as stack:
        stack.callback(network.remove)
        network.make()
        for host in "123":
            stack.enter_context(network.serve(host, NETWORK_BIND))
        stack.enter_context(network.serve("5"))
        write_token(network.folder, "token", SERVER_RUN_TOKEN)
        write_hosts(network.folder, *(f"web{n} 10.77.0.{n} token" for n in (1, 2, 3)))
        yield network


class TestNetwork:
    """SPEC 6, 11: several machines on a network, as far as the kernel can play them."""

    @staticmethod
    def discover(network: Network, host: str, *options: str) -> list[str]:
        """Return the URLs that a host finds, sorted."""
        found = run_client("discover", "--json", "--timeout=1", *options, prefix=network.at(host))
        assert found.returncode == (0 if json.loads(found.stdout) else 1)
        return sorted(one["url"] for one in json.loads(found.stdout))

    URLS = [f"http://10.77.0.{n}:8080" for n in (1, 2, 3)]

    def test_finds_all_by_broadcast(self, network: Network) -> None:
        assert self.discover(network, "4") == self.URLS
        # One that is on loopback is found there alone, though all have the same name and port.
        assert self.discover(network, "5") == [*self.URLS, "http://127.0.0.1:8080"]
        assert self.discover(network, "1") == self.URLS

    def test_finds_by_address(self, network: Network) -> None:
        """Host 4 knows the way to two others, and no network whose broadcast address it could ask:
        how tunnels and clouds look."""
        network.ip("4", "address flush dev eth0")
        network.ip("4", "address add 10.77.0.4/32 dev eth0")
        try:
            for number in (2, 5):
                network.ip("4", f"route add 10.77.0.{number}/32 dev eth0")
            assert self.discover(network, "4") == []
            assert self.discover(network, "4", "--at=10.77.0.2", "--at=10.77.0.5") == self.URLS[1:2]
        finally:
            network.ip("4", "address flush dev eth0")
            network.ip("4", "address add 10.77.0.4/24 broadcast + dev eth0")

    def test_is_silent_to_who_is_not_on_the_link(self, network: Network) -> None:
        place = ["exec", "10.77.0.1", f"--token-file={network.folder}/token", "--", "echo hi"]
        assert run_client(*place, prefix=network.at("far")).stdout == b"hi\n"  # there is a way
        received, sent = network.count_datagrams("1")
        assert self.discover(network, "far", "--at=10.77.0.1") == []
        assert network.count_datagrams("1") == (received + 3, sent)

    def test_wants_the_token(self, network: Network) -> None:
        for prefix in (network.at("4"), network.at("1")):
            told = "401: it needs a token"
            check_command(125, told, "exec", "10.77.0.1", "--", "true", prefix=prefix)
        hosts = {"SERVERCONTROL_HOSTS": f"{network.folder}/hosts"}
        ran = run_client("exec", "--all", "--fold", "--", "exit 3", prefix=network.at("4"), **hosts)
        assert ran.stdout.endswith(b"(3 servers, exit code 3)\n") and ran.returncode == 3

    @in_loop
    async def test_giving_up_a_connection_is_no_sign_of_life(self) -> None:
        link = sc.Link(sc.parse_server("a", "a"), bool)
        link.heard_at = 5.0
        with pytest.raises(sc.UnreachableError):
            await link._receive(b"")
        assert link.heard_at == 5.0

    def test_tells_silence_and_return(self, network: Network) -> None:
        """Both must come within 5 s; 15 are given to a machine that is busy."""
        env = {"SERVERCONTROL_HOSTS": f"{network.folder}/hosts"}
        command = ("monitor", "--all", "--json")
        with running_client(*command, prefix=network.at("4"), env=env) as monitor:
            events = map(json.loads, monitor.stdout)

            def wait_for(*wanted: str) -> None:
                next(event for event in events if (event["type"], event["server"]) == wanted)

            watchdog = threading.Timer(60, monitor.kill)
            watchdog.start()
            wait_for("stats_update", "web2")
            try:
                for pause in (0.0, 6.0):
                    begin = time.monotonic()
                    network.ip("switch", "link set port-2 down")
                    wait_for("server_silent", "web2")
                    silent = time.monotonic()
                    for _ in range(int(pause)):  # the others go on
                        wait_for("stats_update", "web1")
                    network.ip("switch", "link set port-2 up")
                    up = time.monotonic()
                    wait_for("server_back", "web2")
                    print(f"silent {silent - begin:.1f} s, back {time.monotonic() - up:.1f} s")
                    assert silent - begin < 15 and time.monotonic() - up < 15
                    wait_for("stats_update", "web2")
            finally:
                watchdog.cancel()
                network.ip("switch", "link set port-2 up")

    def test_loses_and_doubles_no_line(self, network: Network) -> None:
        """Of 100 packets 5 are lost, and each way takes 40 ms."""
        ends = [network.prefix + host for host in "34"]
        link = [sys.executable, "-c", LOSSY_LINK, *ends, "0.05", "0.04"]
        with subprocess.Popen(link, stdout=subprocess.PIPE) as lossy:
            try:
                assert lossy.stdout is not None and lossy.stdout.readline() == b"ready\n"
                for here, there in ("34", "43"):
                    network.ip(here, f"address add 10.79.0.{here} peer 10.79.0.{there} dev lossy")
                    network.ip(here, "link set lossy up")
                options = [f"--token-file={network.folder}/token", "--", "seq 1 300000; exit 4"]
                begin = time.monotonic()
                words = ("exec", "10.79.0.3", *options)
                shown = check_command(4, "", *words, prefix=network.at("4"))
                print(f"{time.monotonic() - begin:.1f} s")
            finally:
                lossy.terminate()
            counted = lossy.stdout.read()
        print("passed and lost:", counted)
        assert int(counted.split()[1]) > 10
        assert shown == "".join(f"{n}\n" for n in range(1, 300_001))


def is_served(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


def check_client(place: str, *options: str, **env: str) -> None:
    """Use a server from elsewhere: 5 MB of output, an exit code, input, one look."""
    shown = check_command(7, "", "exec", place, *options, "--", "seq 1 700000; exit 7", **env)
    assert shown == "".join(f"{n}\n" for n in range(1, 700_001))
    words = ("exec", place, *options, "--stdin", "--", "wc -c")
    assert run_client(*words, stdin=b"x" * 700_000, **env).stdout == b"700000\n"
    looked = check_command(0, "", "monitor", place, *options, "--once", "--json", **env)
    (told,) = json.loads(looked)
    assert told["state"] == "up" and told["stats"]["ram_total"] > 0


class TestFromElsewhere:
    """README, From elsewhere: the client through a tunnel and a proxy."""

    def test_ssh_tunnel(self, tmp_path: Path) -> None:
        sshd = find_program("sshd", "openssh-server")
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True)
        for name in ("host", "user"):
            words = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", f"{tmp_path}/{name}"]
            subprocess.run(words, check=True)
        (tmp_path / "config").write_text(
            f"HostKey {tmp_path}/host\nAuthorizedKeysFile {tmp_path}/user.pub\nStrictModes no\n"
            "UsePAM no\nPidFile none\nPermitRootLogin yes\nPasswordAuthentication no\n"
        )
        port, forwarded = find_fixed_port(), find_fixed_port()
        options = ["-f", f"{tmp_path}/config", "-p", str(port), "-o", "ListenAddress=127.0.0.1"]
        account = pwd.getpwuid(os.geteuid()).pw_name
        ssh = ["ssh", "-F", "none", "-i", f"{tmp_path}/user", "-p", str(port)]
        ssh += ["-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null"]
        with contextlib.ExitStack() as stack:
            server = stack.enter_context(ServerProcess(tmp_path / "state"))
            log, enter = tmp_path / "log", stack.enter_context
            enter(in_foreground([sshd, "-D", "-e", *options], log, lambda: is_served(port)))
            ssh += ["-N", "-L", f"{forwarded}:localhost:{server.port}", f"{account}@127.0.0.1"]
            enter(in_foreground(ssh, log, lambda: is_served(forwarded)))
            check_client(f"localhost:{forwarded}")

    @pytest.mark.parametrize("path", ["/", "/sc/"])
    def test_nginx(self, path: str, tmp_path: Path, certificates: list[Certificate]) -> None:
        nginx, certificate, port = find_program("nginx", "nginx-light"), certificates[0], 0
        token = write_token(tmp_path, "token", SERVER_RUN_TOKEN)
        options = ("--require-token", "--allow-host=localhost", "--allow-origin=https://localhost")
        with ServerProcess(tmp_path / "state", *options, env=TOKENS) as server:
            port = find_fixed_port()
            config = re.search(r"```nginx\n(.*?)```", read_docs(), re.DOTALL).group(1)
            changes = {
                "listen 443 ssl": f"listen 127.0.0.1:{port} ssl", "sc.example.org": "localhost",
                "/etc/ssl/sc.pem": str(certificate.cert), "/etc/ssl/sc.key": str(certificate.key),
                "127.0.0.1:8080": server.place,
            }  # fmt: skip
            if path == "/":  # as the comment there says
                changes["location /sc/ {"] = "location / {"
                passed = f"proxy_pass http://127.0.0.1:{server.port}"
                changes[f"{passed}/;"] = f"{passed};"
            for old, text in changes.items():
                assert old in config, old
                config = config.replace(old, text)
            user = "user root;" if os.geteuid() == 0 else ""
            kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
            folders = "".join(f"{kind}_temp_path {tmp_path}/{kind};\n" for kind in kinds)
            (tmp_path / "nginx.conf").write_text(
                f"{user} daemon off; pid {tmp_path}/pid; error_log stderr; events {{}}\n"
                f"http {{ access_log off;\n{folders}{config}}}\n"
            )
            command = [nginx, "-e", "stderr", "-p", str(tmp_path), "-c", f"{tmp_path}/nginx.conf"]
            with in_foreground(command, tmp_path / "log", lambda: is_served(port)):
                trust = {"SSL_CERT_FILE": str(certificate.cert)}
                place = f"https://localhost:{port}{path}"
                check_client(place, f"--token-file={token}", **trust)
                told = "401: it needs a token"
                check_command(125, told, "exec", place, "--", "true", **trust)


class TestAnsible:
    """SPEC 11: the inventory of `discover --ansible`, read by Ansible."""

    @staticmethod
    def run(folder: Path, program: str, *options: str) -> str:
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        found = find_program(program, "ansible-core, or pip install ansible-core", path)
        command = [found, "-i", f"{folder}/servers.yml", *options]
        env = {**os.environ, "HOME": str(folder), "LC_ALL": "C.UTF-8", "ANSIBLE_NOCOLOR": "1"}
        finished = subprocess.run(command, env=env, cwd=folder, capture_output=True, timeout=120)
        assert finished.returncode == 0, finished
        assert b"WARN" not in finished.stderr, finished.stderr
        return finished.stdout.decode()

    def discover(self, folder: Path, port: int, *options: str) -> dict[str, Any]:
        """Write the inventory, and return what Ansible makes of it."""
        words = ("discover", "--ansible", "--timeout=1", f"--discovery-port={port}", *options)
        (folder / "servers.yml").write_bytes(run_client(*words).stdout)
        return dict(json.loads(self.run(folder, "ansible-inventory", "--list")))

    def test_lists_and_reaches_servers(self, tmp_path: Path) -> None:
        with ServerProcess(tmp_path / "state") as server:
            listed = self.discover(tmp_path, server.discovery_port or 0)
            (name,) = listed["servercontrol"]["hosts"]
            assert listed["_meta"]["hostvars"][name] == {
                "ansible_connection": "local",
                "ansible_host": "127.0.0.1",
                "servercontrol_url": f"http://{server.place}",
            }
            python = ("-e", f"ansible_python_interpreter={sys.executable}")
            said = self.run(tmp_path, "ansible", "servercontrol", "-m", "ping", *python)
            assert said.startswith(f"{name} | SUCCESS") and '"ping": "pong"' in said

    def test_evaluates_nothing(self, tmp_path: Path) -> None:
        evil = f"{{{{ lookup('pipe','touch {tmp_path}/x') }}}}"
        facts = {"type": "SERVER_RESPONSE", "port": 80, "ws_port": 80, "hostname": evil}
        reply = json.dumps({**facts, "version": evil, "tls": evil, "url": evil, evil: evil})
        with TestDiscover.answering(reply.encode()) as port:
            listed = self.discover(tmp_path, port, "--at=127.0.0.1")
        (name,) = listed["servercontrol"]["hosts"]
        assert "lookup" in name and set(listed["_meta"]["hostvars"]) == {name}
        show = ("-m", "debug", "-a", "msg={{ hostvars }}")
        assert "lookup" in self.run(tmp_path, "ansible", "servercontrol", *show)
        assert not (tmp_path / "x").exists()


class Collector(Impostor):
    """Where logs go: takes connections and keeps all that comes over them."""

    def serve(self, connection: socket.socket, request: bytes) -> None:
        while request:
            self.answer += request
            request = connection.recv(65536)


class TestShipper:
    """README, Audit log: each record arrives elsewhere once."""

    def test_rsyslog(self, tmp_path: Path) -> None:
        rsyslogd = find_program("rsyslogd", "rsyslog")
        log, spool = tmp_path / "servercontrol" / "audit.log", tmp_path / "spool"
        spool.mkdir()
        with ServerProcess(tmp_path) as server, Collector(b"") as collector:
            changes = {
                "/var/spool/rsyslog": str(spool), "/var/lib/servercontrol/audit.log": str(log),
                "logs.example.org": "127.0.0.1", '"6514"': f'"{collector.port}"',
            }  # fmt: skip
            config = read_example("rsyslog.conf")
            for old, text in changes.items():
                assert old in config, old
                config = config.replace(old, text)
            (tmp_path / "rsyslog.conf").write_text(config)
            command = [rsyslogd, "-n", "-f", f"{tmp_path}/rsyslog.conf", "-i", f"{tmp_path}/pid"]
            written = b""

            def run_some() -> None:
                for number in range(20):
                    server.run(f"true {number} ä€ '\x1b' " + "x" * number**3)
                plain = {"Content_Type": "text/plain"}
                server.request("POST", "/exec?wait", "true " + "\x01" * 60000, **plain)

            def is_all_there() -> bool:
                return collector.answer == written + log.read_bytes()

            run_some()
            with in_foreground(command, tmp_path / "out", is_all_there):
                for _ in range(2):
                    run_some()
                    written += log.rename(tmp_path / f"audit.log.{len(written)}").read_bytes()
                    run_some()
                    wait_until(is_all_there)
            run_some()  # nobody reads meanwhile
            with in_foreground(command, tmp_path / "out", is_all_there):
                run_some()
                wait_until(is_all_there)
            (tmp_path / "shipped").write_bytes(collector.answer)
            assert run_client("verify-audit", f"{tmp_path}/shipped").returncode == 0
            assert collector.answer.count(b'"event":"task_complete"') == 7 * 21


# The page ------------------------------------------------------------------------------------


class TestDashboard:
    """Section 17, without a browser: what is sent, and the promises that the source makes."""

    HTML_FIELDS = {"Accept": "text/html,*/*;q=0.8"}

    def ask(self, server: ServerProcess, **fields: str) -> Answer:
        return server.request("GET", "/", **{**self.HTML_FIELDS, **fields})

    def test_page_is_for_browsers_and_help_for_curl(self, server: ServerProcess):
        page, text = self.ask(server), server.request("GET", "/", Accept="*/*")
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        assert text.headers["content-type"] == "text/plain; charset=utf-8"
        assert page.body.startswith(b"<!doctype html>") and b"curl" in text.body
        for answer in (page, text):
            assert answer.headers["cache-control"] == "no-store"
            assert answer.headers["referrer-policy"] == "no-referrer"
            assert answer.headers["x-content-type-options"] == "nosniff"

    def test_page_is_compressed_when_asked(self, server: ServerProcess):
        plain, small = self.ask(server), self.ask(server, Accept_Encoding="gzip, br")
        assert "content-encoding" not in plain.headers
        assert small.headers["content-encoding"] == "gzip"
        assert gzip.decompress(small.body) == plain.body
        for value in ("gzip;q=0", "identity", "gzip; q=0.000", "br"):
            answer = self.ask(server, Accept_Encoding=value)
            assert "content-encoding" not in answer.headers, value
        assert self.ask(server, Accept_Encoding="br, gzip;q=0.5").headers["content-encoding"]

    def test_head_has_the_fields_of_get(self, server: ServerProcess):
        head = server.request("HEAD", "/", **self.HTML_FIELDS)
        page = self.ask(server)
        assert head.body == b""
        assert head.headers["content-length"] == str(len(page.body))

    def test_policy_vouches_for_what_is_sent_and_nothing_else(self, server: ServerProcess):
        page = self.ask(server)
        parts = page.headers["content-security-policy"].split("; ")
        policy = dict(part.split(" ", 1) for part in parts)
        text = page.body.decode()
        for kind in ("script", "style"):
            (source,) = re.findall(f"<{kind}>(.*?)</{kind}>", text, re.DOTALL)
            digest = base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
            assert policy[f"{kind}-src"] == f"'sha256-{digest}'"
        host = server.place
        assert policy["connect-src"] == f"'self' ws://{host} wss://{host}"
        assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
        assert policy["form-action"] == "'none'" and policy["img-src"] == "data:"
        other = self.ask(server, Host="[::1]:8080").headers["content-security-policy"]
        assert "connect-src 'self';" in other

    def test_source_makes_no_markup_of_data_and_loads_nothing(self):
        for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
            assert word not in sc.JS
        assert "DOMParser" not in sc.JS and "new Function" not in sc.JS
        assert not re.search(r"\son[a-z]+=|\sstyle=|javascript:", sc.HTML)
        assert re.findall(r"(?:src|href)=\"(?!data:)([^\"]*)", sc.HTML) == ["?text"]  # of its own
        assert not re.search(r"@import|url\(", sc.CSS)

    def test_page_is_small_and_made_at_the_first_visit(self):
        page = sc.Page()
        assert vars(page) == {}
        assert page.compressed is page.compressed and len(page.compressed) < 32 * 1024


def start_browser() -> Any:
    """Return (Playwright, Chromium); skip aloud where they are missing, but fail in CI."""
    # The first draws the same pages in half the time.
    names = ("chromium-headless-shell", "chromium", "chromium-browser")
    path = next(filter(None, map(shutil.which, names)), None)
    needed = ("playwright", "pyte", "axe_playwright_python")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if path is None:
        missing.append("chromium")
    if missing:
        skip_aloud("THE PAGE IS NOT TESTED: no " + " and no ".join(missing))
    from playwright.sync_api import sync_playwright

    playwright = sync_playwright().start()
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    return playwright, playwright.chromium.launch(executable_path=path, args=arguments)


@pytest.fixture(scope="class")
def browser() -> Iterator[Any]:
    playwright, browser = start_browser()
    yield browser
    browser.close()
    playwright.stop()


PHONE = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}


class Visit:
    """A browser tab on a server. At its end nothing may have been complained about."""

    def __init__(self, browser: Any, url: str, **context: Any) -> None:
        context.setdefault("viewport", {"width": 1280, "height": 800})
        self.context = browser.new_context(**context)
        self.page = self.context.new_page()
        self.page.set_default_timeout(PATIENCE_SECONDS * 1000)
        self.complaints: list[str] = []
        self.allowed = "net::ERR_CONNECTION|status of 401"
        self.page.on("console", lambda message: self.hear(message.type, message.text))
        self.page.on("pageerror", lambda error: self.hear("error", f"{error}\n{error.stack}"))
        self.page.on("dialog", lambda dialog: (self.hear("error", "a dialog"), dialog.dismiss()))
        self.page.goto(url)

    def __enter__(self) -> Visit:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self.context.close()
        if kind is None:
            assert [text for text in self.complaints if not re.search(self.allowed, text)] == []

    def hear(self, kind: str, text: str) -> None:
        if kind in ("error", "warning"):
            self.complaints.append(text)

    def text(self, selector: str) -> str:
        return self.page.locator(selector).inner_text()

    def wait_for(self, selector: str, pattern: str) -> str:
        """Return an element's text once it is shown and matches. As in Python, $ may be before \\n."""
        shown = f"""(([selector, pattern]) => {{
          const element = document.querySelector(selector), text = element?.innerText ?? "";
          const texts = [text, text.replace(/\\n$/, "")];
          const matches = texts.some((one) => new RegExp(pattern).test(one));
          const {{ width, height }} = element?.getBoundingClientRect() ?? {{}};
          const isSeen = width * height && element.checkVisibility({{ visibilityProperty: true }});
          return matches && isSeen && [text];
        }})({json.dumps([selector, pattern])})"""
        try:
            return self.wait_until_true(shown)[0]
        except AssertionError:
            told = f"{selector} is {self.text(selector)!r}, not {pattern!r}"
            raise AssertionError(told) from None

    def wait_until(self, condition: Callable[[], Any]) -> Any:
        """Playwright hears of the page's events only while it is being asked something."""
        return wait_until(lambda: self.page.wait_for_timeout(20) or condition())

    def wait_until_true(self, expression: str) -> Any:
        """Wait for a JavaScript expression in the page, where looking costs least; return its
        value. (Playwright's own way is stopped by the policy.)"""
        loop = f"""async () => {{
          for (const end = performance.now() + {PATIENCE_SECONDS * 1000}; performance.now() < end; ) {{
            const value = {expression};
            if (value) return Array.isArray(value) ? value : true;
            await new Promise((go) => setTimeout(go, 20));
          }}
        }}"""

        def value() -> Any:
            try:
                return self.page.evaluate(loop)
            except Exception as error:
                if "context was destroyed" in str(error):  # the page is loaded anew
                    return None
                raise

        return wait_until(value)

    def open(self, task_id: str) -> None:
        """Pick a task, the newest, once the page has heard of it."""
        self.wait_until_true(f"tasks.has('{task_id}')")
        self.page.locator("#tasks button").first.click()

    def wait_live(self) -> Visit:
        self.wait_for("#link", "^live$")
        return self

    def reload(self) -> Visit:
        self.page.reload()
        return self.wait_live()

    def run(self, command: str, tty: bool = False, shows: str = "") -> None:
        """Run a command from the box; wait until the page shows some output."""
        self.page.set_checked("#tty", tty)
        self.page.fill("#command", command)
        self.page.press("#command", "Enter")
        self.wait_until_true(f"stream?.task.command === {json.dumps(command)}")
        if shows:
            self.wait_for("#lines", shows)

    def set_colors(self, scheme: str) -> None:
        """Ask for light or dark; return once the page has heard of it and drawn everything anew."""
        self.page.emulate_media(color_scheme=scheme)
        frame = "new Promise((go) => requestAnimationFrame(() => requestAnimationFrame(go)))"
        self.page.evaluate(frame)

    def find_barriers(self, *rules: str) -> list[str]:
        """Return what these rules of axe-core, or all, find that keeps people out."""
        if not self.page.evaluate("!!window.axe"):
            (folder,) = importlib.util.find_spec("axe_playwright_python").submodule_search_locations
            self.page.evaluate((Path(folder) / "axe.min.js").read_text(encoding="utf-8"))
        options = {"resultTypes": ["violations"], **({"runOnly": rules} if rules else {})}
        found = self.page.evaluate("options => axe.run(options)", options)["violations"]
        return [
            f"{rule['impact']}: {rule['id']}: {node['html']}: {node['failureSummary']}"
            for rule in found
            for node in rule["nodes"]
        ]

    def tab_to(self, name: str) -> None:
        for _ in range(60):
            if self.page.evaluate("document.activeElement.id") == name:
                return
            self.page.keyboard.press("Tab")
        raise AssertionError(f"Tab does not lead to {name}")


@contextlib.contextmanager
def visiting(browser: Any, folder: Path, *options: str, **given: Any) -> Iterator[Any]:
    """A visit to a server of its own: both of them, once the page is live."""
    with ServerProcess(folder, *options, **given) as server:
        with Visit(browser, f"http://{server.place}/") as visit:
            yield visit.wait_live(), server


def path_proxy(port: int, prefix: bytes, lost: bytes = b"never sent") -> Cutter:
    """A proxy that takes a prefix off the path of each request, and `lost` out of it."""
    cutter, begin = Cutter(port, lambda _: None), re.compile(rb"^([A-Z]+) " + prefix)
    cutter.change = lambda data: begin.sub(rb"\1 ", data).replace(lost, b"")
    return cutter


def record_terminal(argv: Any, keys: Any, cols: int, rows: int) -> Any:
    """Run a program on a terminal; return its bytes and how many there were before each key, with
    the size they were meant for. A key may be a new size, (columns, rows)."""
    env, marks = {"TERM": "xterm-256color", "LC_ALL": "C.UTF-8"}, []
    with OnTerminal(argv, env, cols, rows) as terminal:
        for key in ["", *keys]:
            assert not key or terminal.process.poll() is None, "it has ended before this key"
            if isinstance(key, tuple):
                cols, rows = key
                terminal.resize(cols, rows)
            else:
                terminal.type(key)
            while select.select([terminal.master], [], [], 0.4)[0]:
                terminal.read()
            marks.append((len(terminal.data), cols, rows))
    return terminal.data, marks


READ_CELLS = """([encoded, marks]) => {
  const data = Uint8Array.from(atob(encoded), (char) => char.charCodeAt(0));
  const [, width, height] = marks[0], decoder = new TextDecoder(), screens = [];
  const terminal = new Terminal(width, height);
  let at = 0;
  for (const [mark, cols, rows] of marks) {
    if (cols !== terminal.cols || rows !== terminal.rows) terminal.resize(cols, rows);
    for (; at < mark; at = Math.min(at + 7, mark)) { // in small pieces, so that all is split once
      const piece = data.subarray(at, Math.min(at + 7, mark));
      terminal.write(decoder.decode(piece, { stream: true }));
    }
    const screen = [];
    for (let y = 0; y < rows; y++) {
      const cells = [...terminal.row(y).open()];
      while (cells.length < cols) cells.push([" ", ""]);
      screen.push(cells);
    }
    screens.push([screen, terminal.x, terminal.y]);
  }
  return screens;
}"""

COLOR_TEST = r"""
for i in $(seq 0 255); do printf '\033[38;5;%dmX\033[48;5;%dm \033[0m' $i $i; done
printf '\033[1;3;4;7mall\033[22mb\033[24mu\033[27mi\033[0m\033[38;2;10;20;30;48;2;1;2;3mtrue\033[0m'
printf '\033[31mred\033[39m\033[92mbright\033[101mback\033[m\n\033[5;10Hat\033[K\033[3@ins\033[2P'
printf '\033[10;20r\033[20;1Hx\n\n\ny\033[10;1H\033M\033Mz\033[r\033[12;1H\033[2L\033[3M\033[4Xz'
printf '\033[6;5H\033[1Jq\0337\033[1;1Hhome\0338back\t\ttab wide\346\274\242\345\255\227x\b\b\by'
printf '\033[24;79Hwrapped around\033[3Aup\033[2Dleft\033[2;3H\033[J\033[44m\033[Kblue'
"""
# Programs whose screens are compared: Debian's package, the command line, keys or a new size.
PROGRAMS = {
    "colors": ("dash", "sh colors"),
    "top": ("procps", "top -n 2 -d 0.3"),
    "vim": ("vim", "vim -u NONE -N TEXT", "10G", "dd", "ihello w\u00f6rld \u6f22\u5b57\x1b", "o\tx\x1b", ":set nu\r", "G", "\x06", "\x02", "gg", "5dd", "u", "yyP", "x", "/55\r", "zt", ":sp\r"),
    "less": ("less", "less TEXT", " ", "b", "/77\r", "G", "k", "k", "g", "j"),
    "less resized": ("less", "less TEXT", " ", (60, 18), "j", " ", (100, 30), "b"),
    "htop": ("htop", "htop", "\x1b[B", "\x1b[B", "t"),
    "mc": ("mc", "mc -u /usr /etc", "\x1bOB", "\x1bOB", "\t", "\x1bOB", "\x1b[18~", "\x1b\x1b"),
    "tmux": ("tmux", "tmux -L page -f /dev/null new less TEXT ; split-window -h cat", "abc\r", "\x02o", "G", "k"),
    "dialog": ("dialog", "dialog --menu Pick 12 40 4 a one b two", "\x1bOB", "\t", "\t"),
    "nano": ("nano", "nano TEXT", "\x16", "x\u6f22", "\x0b", "\x1bOB", "\x15"),
}  # fmt: skip
FILL = "\x1b[H" + "\r\n".join(f"{letter * 5}{n}" for n, letter in enumerate("ABCDEF"))
FULL = "AAAAA0|BBBBB1|CCCCC2|DDDDD3|EEEEE4|FFFFF5"
# The name of a sequence, what is written to 20 x 6 cells, and what they show, as rows joined by |;
# None: what pyte shows, colours included. Where pyte does not know it, or is wrong, it is said here.
SEQUENCES = [
    ("BS", "abc\b\bX", None), ("HT", "a\tb\tc\td", None), ("LF VT FF", "a\nb\x0bc\x0cd", None), ("CR", "abc\rX", None),
    ("SO LS1 SI LS0", "\x1b)0\x0elqk\x0fabc", None), ("SCS", "\x1b(0lqkxmj`~\x1b(Bq", None),
    ("wrap", "x" * 25, None), ("pending wrap", "x" * 20 + "\r\ny", None), ("pending CUB", "x" * 20 + "\x1b[Dy", None),
    ("wide", "\u6f22\u5b57\u304b\u306a" * 3, None), ("wide at the edge", "x" * 19 + "\u6f22y", "x" * 19 + "|\u6f22y"),
    ("half overwritten", "\u6f22\u5b57\x1b[2Gx\x1b[3Gy", " xy"), ("marks", "e\u0301x\u0302\u0303y", "e\u0301x\u0302\u0303y"),
    ("Jamo", "\u1112\u1161\u11ab\u1100\u1173\u11afx", "\u1112\u1161\u11ab\u1100\u1173\u11afx"),
    ("DECSC DECRC", "\x1b[3;4H\x1b[31m\x1b7\x1b[H\x1b[mx\x1b8y", None), ("IND", FILL + "\x1b[5;1H\x1bDx\x1bDy", None),
    ("NEL", "abc\x1bEd", "abc|d"), ("HTS", "\x1b[5G\x1bH\r\tx", None), ("RI", FILL + "\x1b[2;3H\x1bMx\x1bMy", None),
    ("RIS", FILL + "\x1b[31m\x1b[2;4r\x1bcx", None), ("DECALN", "\x1b#8", None),
    ("ICH", FILL + "\x1b[2;3H\x1b[4@x", None), ("CUU", "\x1b[4;4H\x1b[2Ax\x1b[9Ay", None), ("CUD", "\x1b[2Bx\x1b[9By", None),
    ("CUU in a region", "\x1b[2;4r\x1b[2;4H\x1b[Ax\x1b[4;4H\x1b[9Ay", None),
    ("CUF", "\x1b[3Cx\x1b[99Cy", None), ("CUB", "abcdef\x1b[3Dx\x1b[99Dy", None), ("CNL", "abc\x1b[2Ex", None),
    ("CPL", "\x1b[5;5H\x1b[2Fx", None), ("CHA", "abc\x1b[7Gx\x1b[Gy", None), ("CHT", "\x1b[2Ix", " " * 16 + "x"),
    ("CUP", "\x1b[3;5Hx\x1b[;7Hy\x1b[99;99Hz\x1b[0;0Hw", None), ("CBT", "\x1b[20Gx\x1b[2Zy", "        y          x"),
    *((f"ED {n}", FILL + f"\x1b[3;4H\x1b[{n}J", None) for n in ("", 0, 1, 2)),
    *((f"EL {n}", FILL + f"\x1b[3;4H\x1b[41m\x1b[{n}K", None) for n in ("", 0, 1, 2)),
    ("DECSED", FILL + "\x1b[3;4H\x1b[?J", None), ("DECSEL", FILL + "\x1b[3;4H\x1b[?1K", None),
    ("IL", FILL + "\x1b[2;4H\x1b[2Lx", None), ("DL", FILL + "\x1b[2;4H\x1b[2Mx", None),
    ("IL outside a region", FILL + "\x1b[2;4r\x1b[5;1H\x1b[L\x1b[H\x1b[L", FULL),
    ("DL outside a region", FILL + "\x1b[2;4r\x1b[5;1H\x1b[M\x1b[H\x1b[M", FULL),
    ("DCH", FILL + "\x1b[2;4H\x1b[3P", None), ("ECH", FILL + "\x1b[2;4H\x1b[45m\x1b[3X", None),
    ("SU", FILL + "\x1b[2S", None), ("SD", FILL + "\x1b[2T", None),
    ("SU in a region", FILL + "\x1b[2;4r\x1b[S", None), ("SD in a region", FILL + "\x1b[2;4r\x1b[T", None),
    ("HPA", "abc\x1b[7`x", "abc   x"), ("HPR", "abc\x1b[3ax", None), ("REP", "ab\x1b[4bc", None),
    ("VPA", "abc\x1b[4dx", None), ("VPR", "abc\x1b[2ex", None), ("HVP", "\x1b[3;5fx", None),
    ("TBC", "\x1b[9G\x1b[g\r\tx\x1b[3g\ry\tz", "y               x  z"), ("IRM SM RM", "abcdef\r\x1b[4hXY\x1b[4lZ", None),
    ("LNM", "\x1b[20hab\ncd\x1b[20lef\ngh", None),
    ("SGR", "\x1b[1;3;4;7ma\x1b[22mb\x1b[23mc\x1b[24md\x1b[27me\x1b[31;42mh\x1b[39mi\x1b[49mj\x1b[95;103mk\x1b[ml", None),
    ("SGR 38 48", "\x1b[38;5;200ma\x1b[48;5;20mb\x1b[38;2;1;2;3mc\x1b[48;2;4;5;6md", None),
    ("SGR with colons", "\x1b[38:5:1ma\x1b[48:2::4:5:6mb\x1b[0;4:3mc\x1b[4:0md\x1b[58:2::1:1:1me\x1b[21mf", "abcdef"),
    ("DECSTBM", FILL + "\x1b[2;4r\x1b[4;1H\nx\n\x1b[4;2ry", None), ("SCOSC SCORC", "\x1b[3;3H\x1b[sab\x1b[H\x1b[ux", "||  xb"),
    ("DECSTR", "\x1b[2;4r\x1b[4h\x1b[?6h\x1b[!pab\rX\x1b[6;1Hz", "|Xb||||z"), ("DECSET DECRST DECAWM", "\x1b[?7l" + "x" * 25 + "y\x1b[?7h", None),
    ("DECOM", "\x1b[3;5r\x1b[?6hx\x1b[2;2Hy\x1b[9;1Hz\x1b[?6lw", "w||x| y|z"), ("1049", "main\x1b[?1049halt\x1b[?1049lx", "mainx"),
    ("47", "main\x1b[?47halt\x1b[?47lx", "main   x"), ("1047", "main\x1b[?1047halt\x1b[?1047lx", "main   x"),
    ("1049 in a region", FILL + "\x1b[2;4r\x1b[?1049h\x1b[?1049l\x1b[4;1H\nX", "AAAAA0|CCCCC2|DDDDD3|X|EEEEE4|FFFFF5"),
    ("1048", "\x1b[3;3H\x1b[?1048h\x1b[H\x1b[?1048lx", "||  x"), ("delete half", "\u6f22\u5b57\x1b[2G\x1b[P", " \u5b57"),
    # Cut by others, or unknown: read to their end, never printed.
    ("CAN", "a\x1b[31\x18b", "ab"), ("SUB", "a\x1b[31\x1ab", "ab"), ("CAN in a string", "a\x1b]0;t\x18b", "ab"),
    ("ESC in a sequence", "a\x1b[3\x1b[1mb", "ab"), ("C0 in a sequence", "ab\x1b[3\b1mX", "aX"), ("ESC twice", "a\x1b\x1b[1mb", "ab"),
    ("ST", "a\x1b]0;t\x1b\\b", "ab"), ("BEL", "a\x1b]0;t\x07b", "ab"), ("U+009C", "a\x1b]0;t\x9cb", "ab"), ("OSC", "a\x1b]52;c;aGk=\x07b", "ab"),
    ("ESC in a string", "a\x1b]0;t\x1b[1mb", "ab"), ("DCS", "a\x1bPq\x07abc\x1b\\b", "ab"), ("SOS PM APC", "a\x1bXx\x1b\\b\x1b^y\x1b\\c\x1b_z\x1b\\d", "abcd"),
    ("C1", "a\x9b31mb\x9d0;t\x9cc\x84d\x85e\x8df", "abc| f d|e"), ("private", "a\x1b[?12345hb\x1b[>4;2mc\x1b[=1ud\x1b[?1$pe", "abcde"),
    ("intermediates", "a\x1b%Gb\x1b#3c\x1b Fd\x1b[1;2\"pe\x1b[3 tf", "abcdef"), ("wrong order", "a\x1b[1<2mb\x1b[!1mc\x1b[;;;;;;md", "abcd"),
    ("DEL in a sequence", "a\x1b[3\x7f1mb", "ab"), ("text in a sequence", "a\x1b[3\u00e9b", "a\u00e9b"),
]  # fmt: skip
# Names of the page's table whose effect is no text: other tests have them, or they group others.
SEQUENCES_ELSEWHERE = "CSI SP DA DSR DECSCUSR DECCKM DECSCNM DECTCEM SGR ESC C0 C1 URI OSC".split()


def make_pyte(cols: int, rows: int) -> tuple[Any, Any]:
    import pyte

    class Screen(pyte.Screen):
        def erase_in_display(self, *how: Any, **options: Any) -> None:
            # It erases only what was written before; the background of the rest is lost.
            for row, column in itertools.product(range(self.lines), range(self.columns)):
                self.buffer[row][column] = self.buffer[row][column]
            super().erase_in_display(*how, **options)

        # What it does not know; ncurses uses them as it sees fit (SU: htop, when its list moves).
        def scroll_up(self, count: int = 1) -> None:
            self.scroll((self.margins or (0, self.lines - 1))[1], self.index, count)

        def scroll_down(self, count: int = 1) -> None:
            self.scroll((self.margins or (0, 0))[0], self.reverse_index, count)

        def scroll(self, edge: int, move: Callable[[], None], count: int) -> None:
            at, self.cursor.y = self.cursor.y, edge
            for _ in range(count or 1):
                move()
            self.cursor.y = at

        def draw(self, data: str) -> None:
            self.newest = data[-1]
            super().draw(data)

        def repeat(self, count: int = 1) -> None:
            self.draw(self.newest * (count or 1))

    class Stream(pyte.Stream):
        csi = {**pyte.Stream.csi, "S": "scroll_up", "T": "scroll_down", "b": "repeat"}
        events = frozenset({*pyte.Stream.events, "scroll_up", "scroll_down", "repeat"})

    screen = Screen(cols, rows)
    stream = Stream(screen)
    stream.use_utf8 = False  # or else it does not draw lines
    return screen, stream


def find_wrong_cells(ours: Any, screen: Any) -> list[Any]:
    """Return those cells of the page that are not as pyte has them: (column, row, ours, theirs)."""
    return [
        (column, row, ours[row][column], screen.buffer[row][column])
        for row in range(screen.lines)
        for column in range(screen.columns)
        if not check_cell(ours[row][column], screen.buffer[row][column])
    ]


def check_screens(visit: Visit, data: bytes, marks: list[Any]) -> None:
    """Compare the page's screen with pyte's at each mark (bytes before it, columns, rows)."""
    screens = visit.page.evaluate(READ_CELLS, [base64.b64encode(data).decode(), marks])
    (screen, stream), at = make_pyte(80, 24), 0
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for (mark, cols, rows), (ours, x, y) in zip(marks, screens):
        if (cols, rows) != (screen.columns, screen.lines):
            screen.resize(rows, cols)
        stream.feed(decoder.decode(data[at:mark]))
        at = mark
        assert find_wrong_cells(ours, screen)[:3] == [], mark
        assert (x, y) == (min(screen.cursor.x, cols - 1), screen.cursor.y), mark


ANSI_NAMES = "black red green brown blue magenta cyan white".split()


def check_cell(ours: list[Any], theirs: Any) -> bool:
    from pyte.graphics import FG_BG_256

    char, style = ours[:2]
    fg, bg, flags = map(int, style.split(",")[:3]) if style else (-1, -1, 0)

    def is_color(number: int, name: str) -> bool:
        if number < 0:
            return name == "default"
        if number >= 1 << 24:
            return name == f"{number & 0xFFFFFF:06x}"
        names = [FG_BG_256[number]]
        if number < 16:
            names.append("bright" * (number > 7) + ANSI_NAMES[number % 8])
        return name in names or (number == 13 and name == "bfightmagenta")

    same = char == theirs.data and is_color(bg, theirs.bg)
    if char in " ":  # of a blank only the background shows; with erased ones opinions differ
        return same or theirs.reverse
    shown = (theirs.bold, theirs.italics, theirs.underscore, theirs.reverse)
    same = same and is_color(fg, theirs.fg)
    return same and shown == tuple(bool(flags & n) for n in (1, 4, 8, 16))


def walk_states(visit: Visit, server: ServerProcess) -> Iterator[str]:
    """Bring the page into one state after the other, and yield the name of each."""
    page = visit.page
    visit.allowed = "status of|net::ERR"
    server.run("exit 4", name="a build")
    visit.wait_live().wait_for("#tasks", "a build")
    yield "tasks"
    page.click("#failed")
    page.fill("#filter", "no such thing")
    yield "nothing found"
    page.fill("#filter", "")
    page.click("#all")
    colors = "for c in 31 32 33 34 35 36 37 90 '1;31' 7; do printf \"\\033[${c}mword $c\\033[m\\n\"; done"
    visit.run(f"{colors}; echo https://example.org/; exit 3")
    visit.wait_for("#state", "failed")
    visit.wait_for("#lines", "example")
    page.fill("#find", "word")
    visit.wait_for("#hits", "of")
    yield "output"
    alert = {"hostname": "h", "timestamp": 1, "cpu": 99, "message": "CPU usage exceeded 90%!"}
    page.evaluate("closeTask()")
    page.evaluate(
        """alert => { notice("The clock of this device is 3 h 00 m ahead of the server's.");
        for (const type of ["cpu_alert", "alert_resolved", "cpu_alert"])
          takeAlert({ ...alert, type, duration_ms: 60000 }); }""",
        alert,
    )
    page.click("#bell")
    yield "alerts"
    page.click("#bell")
    page.click("#dismiss")
    visit.run("ls --color=always -la /; exec cat", tty=True, shows="root")
    yield "terminal"
    page.evaluate("setWhole(true)")
    visit.wait_until_true("stream.terminal.rows === view.fits")
    yield "whole"
    page.evaluate("setWhole(false); document.activeElement.blur()")
    page.click("#signals")
    yield "signals"
    page.keyboard.press("Escape")
    page.route("**/info", lambda route: route.abort())
    page.evaluate("closeTask(); wait = 50; socket.close()")
    visit.wait_for("#trouble", "does not answer")
    yield "offline"
    page.unroute("**/info")
    visit.wait_live()
    page.evaluate("info.role = 'view'; showServer()")
    yield "view only"
    page.evaluate("show('login-error', 'This token is not right.')")
    page.evaluate("document.getElementById('login').showModal()")
    yield "login"


@pytest.fixture(scope="class")
def page_server(tmp_path_factory: Any) -> Iterator[ServerProcess]:
    with ServerProcess(
        tmp_path_factory.mktemp("page"), "--interval=0.2", "--alert-for=600", "--keep-tasks=20"
    ) as server:
        yield server


class OnPage:
    """What tests of the page have in common. Each class has a browser and a process of its own."""

    @pytest.fixture
    def server(self, page_server: ServerProcess) -> ServerProcess:
        return page_server

    @pytest.fixture
    def visit(self, browser: Any, server: ServerProcess) -> Iterator[Visit]:
        with Visit(browser, f"http://{server.place}/") as visit:
            yield visit.wait_live()
        for task in server.get("/tasks"):
            if task["state"] == "running":
                server.request("POST", f"/kill?id={task['task_id']}&signal=KILL")


class TestPage(OnPage):
    """The page in a real Chromium: output and the terminal."""

    def test_first_paint_has_data(self, visit: Visit):
        visit.wait_for("#cpu", r"^\d+\.\d %$")
        for name in ("ram", "disk", "load", "uptime", "recv"):
            visit.wait_for(f"#{name}", r"\d")
        assert visit.text("#host") == socket.gethostname() == visit.page.title()
        assert visit.page.locator("#cpu-chart path").nth(1).get_attribute("d").startswith("M")
        assert visit.page.locator("#icon").get_attribute("href").startswith("data:image/png")

    def test_run_shows_output_live_and_failure_in_red(self, visit: Visit, tmp_path: Path):
        go = tmp_path / "go"
        visit.run(f"echo first; until [ -e {go} ]; do sleep 0.02; done; echo last; exit 3")
        visit.wait_for("#lines", "^first$")
        visit.wait_for("#state", "^.?running$")
        go.touch()
        visit.wait_for("#lines", "^first\nlast$")
        visit.wait_for("#state", "failed, exit 3")
        assert "bad" in visit.page.locator("#state").get_attribute("class")
        assert "failed" in visit.text("#tasks li:first-child")

    def test_output_reads_like_a_terminal(self, visit: Visit):
        visit.run(
            r"printf 'progress 10%%\rprogress 100%%\n'; printf 'abc\b\bX\n'; printf 'gone\r\033[Kkept\n';"
            r"printf '\033[31mred\033[0m \033[1;4;48;5;21mbold\033[0m \033[38;2;1;2;3mtrue\033[7minverse\n';"
            r"printf 'one\ntwo\n\033[1A\rTWO\n'; printf 'see https://example.org/a?b=c.\n'"
        )
        visit.wait_for("#state", "done")
        visit.wait_for("#lines", "example")
        lines = visit.text("#lines").split("\n")
        assert lines[:2] == ["progress 100%", "aXc"] and lines[2] == "kept"
        assert lines[3:] == ["red bold trueinverse", "one", "TWO", "see https://example.org/a?b=c."]
        script = """text => { const span = [...document.querySelectorAll('#lines span')]
          .find((one) => one.textContent === text); const style = getComputedStyle(span);
          return [style.color, style.backgroundColor, style.fontWeight, style.textDecorationLine]; }"""
        red = visit.page.evaluate(script, "red")
        want = "getComputedStyle(document.body.appendChild(make('i', { className: 'bad' }))).color"
        assert red[0] == visit.page.evaluate(want)
        assert visit.page.evaluate(script, "bold")[1:] == ["rgb(0, 0, 255)", "600", "underline"]
        assert visit.page.evaluate(script, "true")[0] == "rgb(1, 2, 3)"
        assert visit.page.evaluate(script, "inverse")[1] == "rgb(1, 2, 3)"
        link = visit.page.locator("#lines a")
        assert link.get_attribute("href") == "https://example.org/a?b=c"

    def test_overlapping_and_missing_output_is_mended(self, visit: Visit, server: ServerProcess):
        task_id = server.run("printf 'äbcdefgh'")["task_id"]
        visit.open(task_id)
        visit.wait_for("#lines", "äbcdefgh")
        take = f"(offset, output) => stream.take({{task_id: '{task_id}', offset, output, timestamp: 1}})"
        visit.page.evaluate(f"({take})(0, 'äb')")  # known
        visit.page.evaluate("EVENTS.gap({ from: 3, to: 9 })")
        visit.wait_for("#notice", "Events 3 to 9 were missed")
        visit.page.click("#dismiss")
        assert visit.page.is_hidden("#notice")
        # Last, since the server has no such output, and would refuse to read on from there.
        visit.page.evaluate(f"({take})(8, 'hXY')")  # half known
        visit.wait_for("#lines", "^äbcdefghXY$")

    def test_stop_says_what_happens(self, visit: Visit):
        visit.run("trap '' TERM; echo ready; while :; do sleep 0.05; done", shows="ready")
        visit.page.click("#stop")
        visit.wait_for("#state", "stopping…")
        visit.page.click("#stop:has-text('Kill now')")
        visit.wait_for("#state", "stopped by KILL")
        assert visit.page.is_disabled("#stop")

    def test_run_again_uses_the_same_folder(self, visit: Visit, server: ServerProcess):
        task = server.run("pwd; echo $SECRET", cwd="/usr", env={"SECRET": "again"})
        visit.reload().open(task["task_id"])  # the page knows it from /tasks
        visit.wait_for("#lines", "^/usr\nagain$")
        before = visit.text("#facts")
        visit.page.click("#rerun")
        visit.wait_until(lambda: visit.text("#facts") != before)
        visit.wait_for("#state", "done")
        visit.wait_for("#lines", "^/usr\nagain$")

    def test_long_kept_output_is_shown_whole(self, visit: Visit, server: ServerProcess):
        command = "printf '\\357\\273\\277'; yes 'äöü 漢字 😀, and so on and so forth' | head -c 3000001; echo; sleep 60"
        task_id = server.start(command)
        wait_until(lambda: server.task(task_id)["output_bytes"] > 3_000_000)
        visit.open(task_id)
        end = server.task(task_id)["output_bytes"]
        visit.wait_until_true(f"stream.next === {end} && stream.queue.length === 0")
        whole = server.get(f"/logs?id={task_id}")["logs"]
        assert whole.startswith("\ufeff")
        read = "stream.terminal.lines.map((line) => line.text).join('\\n')"
        assert visit.page.evaluate(read).lstrip("\ufeff") == whole.lstrip("\ufeff")

    def test_colours_follow_the_system_or_the_button(self, browser: Any, server: ServerProcess):
        url = f"http://{server.place}/"
        color = "getComputedStyle(document.body).backgroundColor"
        dark, light = "rgb(13, 17, 23)", "rgb(244, 246, 248)"
        with Visit(browser, url, color_scheme="dark", reduced_motion="reduce") as visit:
            assert visit.wait_live().page.evaluate(color) == dark
            visit.page.emulate_media(color_scheme="light")
            assert visit.page.evaluate(color) == light
            visit.page.click("#theme")
            assert (visit.text("#theme"), visit.page.evaluate(color)) == ("Dark", dark)
            assert visit.reload().page.evaluate(color) == dark
            visit.page.click("#theme")
            assert (visit.text("#theme"), visit.page.evaluate(color)) == ("Light", light)
            visit.run("sleep 60")
            visit.wait_for("#state", "running")
            moves = "document.getAnimations().length"
            assert visit.page.evaluate(moves) == 0
            visit.page.emulate_media(reduced_motion="no-preference")
            assert visit.page.evaluate(moves) > 0
            visit.page.click("#stop")
            visit.wait_for("#state", "stopped")

    def test_history_and_several_lines(self, visit: Visit):
        visit.run("echo one")
        visit.run("echo two")
        box = visit.page.locator("#command")
        box.press("ArrowUp")
        box.press("ArrowUp")
        assert box.input_value() == "echo one"
        box.press("ArrowDown")
        assert box.input_value() == "echo two"
        box.press("Shift+Enter")
        box.press_sequentially("echo three")
        box.press("Enter")
        assert box.input_value() == "echo two\necho three\n"
        box.press("Control+Enter")
        visit.wait_for("#lines", "^two\nthree$")

    def test_keyboard_alone_runs_and_stops(self, visit: Visit):
        visit.tab_to("command")
        visit.page.keyboard.type("echo hi; sleep 60")
        visit.page.keyboard.press("Enter")
        visit.wait_for("#lines", "^hi$")
        visit.tab_to("stop")
        visit.page.keyboard.press("Enter")
        visit.wait_for("#state", "stopped by TERM")
        visit.wait_for("#facts", rf"stopped by 127\.0\.0\.1:\d+ run uid={os.geteuid()}$")

    def test_hostile_text_stays_text(self, visit: Visit):
        evil = "<img src=x onerror=alert(1)></script><script>alert(2)</script>"
        visit.run(f"echo '{evil}'; printf '\\033]0;<b>\\007%s\\n' '<svg onload=alert(3)>'")
        visit.wait_for("#lines", re.escape(evil) + "\n<svg")
        assert evil in visit.text("#tasks li:first-child code") and evil in visit.text("#title")
        # What it shows is read at once: the next statistics overwrite it.
        host, banner = visit.page.evaluate(
            """evil => { showStats({ hostname: evil, cpu: 1, cpus: 1, load_avg: [1, 1, 1], ram_used: 1,
              ram_total: 2, disk_used: 1, disk_total: 2, swap_used: 0, swap_total: 0, uptime: 1,
              net_recv: 1, net_sent: 1 });
            takeAlert({ hostname: evil, timestamp: 1, type: "cpu_alert", message: evil }); notice(evil);
            return ["host", "banner"].map((id) => document.getElementById(id).textContent); }""",
            evil,
        )
        assert host == evil and evil in banner
        assert visit.page.locator("img, #lines script, #lines svg").count() == 0

    def test_terminal_task_is_a_screen_with_keys(self, visit: Visit):
        visit.run("sh", tty=True)
        visit.page.keyboard.type("stty size; echo $((6*7)); tput smcup; tput cup 3 5; printf alt")
        visit.page.keyboard.press("Enter")
        visit.wait_until_true("stream.terminal.row(3).text.startsWith('     alt')")
        size = visit.page.evaluate("`${view.fits} ${view.cols}`")
        visit.page.keyboard.type("tput rmcup")
        visit.page.keyboard.press("Enter")
        assert size in visit.wait_for("#lines", r"\n42\n")
        visit.page.keyboard.press("Control+d")
        visit.wait_for("#state", "done")

    def test_keys_are_those_of_xterm(self, visit: Visit):
        table = [  # modifiers (C, A, S; a for DECCKM), key, code, what is sent; None comes as input
            ("", "ArrowUp", "", "\x1b[A"), ("a", "ArrowUp", "", "\x1bOA"),
            ("Ca", "ArrowLeft", "", "\x1b[1;5D"), ("S", "Home", "", "\x1b[1;2H"),
            ("", "F1", "", "\x1bOP"), ("", "F5", "", "\x1b[15~"), ("A", "F12", "", "\x1b[24;3~"),
            ("", "Delete", "", "\x1b[3~"), ("C", "PageUp", "", "\x1b[5;5~"),
            ("", "Enter", "", "\r"), ("", "Tab", "", "\t"), ("S", "Tab", "", "\x1b[Z"),
            ("", "Backspace", "", "\x7f"), ("C", "Backspace", "", "\b"), ("", "Escape", "", "\x1b"),
            ("C", "c", "KeyC", "\x03"), ("C", "C", "KeyC", "\x03"), ("C", "[", "BracketLeft", "\x1b"),
            ("C", " ", "Space", "\0"), ("A", "b", "KeyB", "\x1bb"), ("AS", "B", "KeyB", "\x1bB"),
            ("CA", "x", "KeyX", "\x1b\x18"), ("A", "Enter", "", "\x1b\r"), ("A", ".", "Period", "\x1b."),
            ("", "a", "KeyA", None), ("", "\u6f22", "", None), ("S", "Shift", "", None),
            # Option of a Mac made another character; so did Ctrl and Alt in place of AltGr.
            ("A", "@", "KeyL", "@"), ("A", "|", "Digit7", "|"), ("A", "[", "Digit5", "["),
            ("AS", "\\", "Digit7", "\\"), ("A", "{", "Digit8", "{"), ("A", "\u00e5", "KeyA", "\u00e5"),
            ("CA", "@", "KeyQ", "@"), ("CA", "\u20ac", "KeyE", "\u20ac"), ("CA", "{", "Digit7", "{"),
            ("A", "Dead", "KeyN", None), ("AS", "@", "Digit2", "\x1b@"), ("A", "a", "KeyQ", "\x1ba"),
            # Other alphabets: Ctrl goes by the position.
            ("C", "\u0441", "KeyC", "\x03"), ("C", "\u03c8", "KeyC", "\x03"), ("C", "\u05d1", "KeyC", "\x03"),
            ("C", "\u0624", "KeyC", "\x03"), ("C", "\u0e41", "KeyC", "\x03"), ("C", "\u0445", "BracketLeft", "\x1b"),
            # Ctrl with a digit or a sign is a control character, or the browser's (zoom, tabs).
            *(("C", sign, "", chr(code)) for sign, code in zip("2345678", (0, 27, 28, 29, 30, 31, 127))),
            *(("CS", sign, "", chr(code)) for sign, code in zip("@^_?", (0, 30, 31, 127))),
            ("C", "/", "Slash", "\x1f"), ("C", "]", "", "\x1d"), ("C", "\\", "", "\x1c"),
            *(("C", sign, "", None) for sign in "019-+=,.;'"), ("C", "\u00f6", "Semicolon", None),
        ]  # fmt: skip
        script = """table => table.map(([how, key, code]) => sequence({ key, code,
            isCtrl: how.includes("C"), isAlt: how.includes("A"), isShift: how.includes("S") },
            { 1: how.includes("a") }))"""
        sent = visit.page.evaluate(script, [row[:3] for row in table])
        assert list(zip(sent, table)) == [(row[3], row) for row in table]

    def test_paste_is_bracketed_when_asked_for(self, visit: Visit):
        paste = """text => {
          const clipboardData = new DataTransfer(); clipboardData.setData("text/plain", text);
          document.getElementById("keys").dispatchEvent(
            new ClipboardEvent("paste", { clipboardData, cancelable: true })); }"""
        command = "stty raw -echo; printf '\\033[?2004h>'; head -c 23 | od -An -c; sleep 60"
        visit.run(command, tty=True, shows=">")
        visit.page.evaluate(paste, "two\n\x1blines")  # 6 + 9 + 6 bytes, without the ESC
        visit.page.keyboard.type("xy")
        shown = visit.wait_for("#lines", r"x\s+y")
        assert re.sub(r"\s+", "", shown) == r">033[200~two\rlines033[201~xy"
        visit.page.evaluate("window.sent = []; send = ({ data }) => sent.push(data); 0")
        visit.page.evaluate(paste, "x" + "\U0001f600" * 9999)  # sent in parts
        assert visit.page.evaluate("sent[1] && sent.every((part) => part.isWellFormed())")

    @pytest.mark.parametrize("name", PROGRAMS)
    def test_screen_of_a_program_equals_that_of_pyte(self, visit, tmp_path, monkeypatch, name):
        package, line, *keys = PROGRAMS[name]
        argv = [part.replace("TEXT", f"{tmp_path}/text") for part in line.split(" ")]
        find_program(argv[0], package)
        (tmp_path / "text").write_text("".join(f"line {n} of a text\n" for n in range(200)))
        (tmp_path / "colors").write_text(COLOR_TEST)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("HOME", str(tmp_path))
        data, marks = record_terminal(argv, keys, 80, 24)
        if name == "tmux":
            subprocess.run([argv[0], "-L", "page", "kill-server"], check=False)
        # pyte takes these for others: modifyOtherKeys, questions, strings.
        odd = re.compile(rb"\x1b\[[>=?][\d;:]*[mcuq]|\x1bP[^\x1b]*\x1b\\|\x1b\[\?[\d;]*\$p")
        marks = [(len(odd.sub(b"", data[:mark])), *size) for mark, *size in marks]
        check_screens(visit, odd.sub(b"", data), marks)

    def test_each_known_sequence_does_what_the_standard_says(self, visit: Visit):
        """Those of the page's own table: as pyte has it or, where pyte is wrong, as written here."""
        recorded = [base64.b64encode(data.encode()).decode() for _, data, _ in SEQUENCES]
        marks = [[[len(data.encode()), 20, 6]] for _, data, _ in SEQUENCES]
        script = f"cases => cases.map({READ_CELLS})"
        shown = visit.page.evaluate(script, list(zip(recorded, marks)))
        for (name, data, expected), [[cells, x, y]] in zip(SEQUENCES, shown):
            if expected is None:
                screen, stream = make_pyte(20, 6)
                stream.feed(data)
                assert find_wrong_cells(cells, screen) == [], name
                assert (x, y) == (min(screen.cursor.x, 19), screen.cursor.y), name
            else:
                rows = ["".join(cell[0] for cell in row).rstrip() for row in cells]
                assert "|".join(rows).rstrip("|") == expected, name
        known = sc.JS[sc.JS.index("//   C0 ") : sc.JS.index("const MAX_LINES")]
        for name in re.findall(r"\b[A-Z]{2,}[A-Z0-9]*\b", known):
            told = any(name in case[0].split() for case in SEQUENCES) or name in SEQUENCES_ELSEWHERE
            assert told, f"{name} is said to be known, but not tested"

    def test_widths_are_those_of_wcwidth(self, visit: Visit):
        import wcwidth

        ours = visit.page.evaluate("WIDTHS.subarray(0xA0).join('')")
        codes = range(0xA0, 0x110000)
        surrogates = range(0xD800, 0xE000)
        theirs = [1 if c in surrogates else wcwidth.wcwidth(chr(c)) for c in codes]
        # A newer package may know characters that were none yet.
        is_same = f"Unicode {wcwidth.list_versions()[-1]}" in sc.JS
        wrong = [
            f"U+{code:04X}: {our}, not {their}"
            for code, our, their in zip(codes, map(int, ours), theirs)
            if our != their and (is_same or unicodedata.category(chr(code)) != "Cn")
        ]
        assert wrong == [], "run .ci/widths --write"

    @pytest.mark.parametrize("tty", [False, True])
    def test_flood_is_passed_over_where_nobody_could_see_it(self, visit: Visit, tty: bool):
        visit.run("echo start; exec sleep 60", tty, shows="start")
        script = """end => { const { terminal } = stream, { write } = terminal; window.written = 0;
          terminal.write = function (text, time) { written += text.length; write.call(this, text, time); };
          for (let i = 0; i < 30; i++) stream.push({ time: 1, data: encoder.encode(
            "number " + i + end + ("line" + end).repeat(8000) + (i < 9 ? "\\x1b[31m" : "")) }); }"""
        visit.page.evaluate(script, "\r\n" if tty else "\n")
        visit.wait_until_true("stream.queue.length === 0")
        script = "[stream.terminal.lines.map((one) => one.text), stream.terminal.dropped, written]"
        lines, dropped, written = visit.page.evaluate(script)
        assert len(lines) >= 100000 and (tty or dropped + len(lines) == 2 + 30 * 8001)
        numbers = [line for line in lines if line not in ("line", "")]
        assert numbers == [f"number {n}" for n in range(30 - len(numbers), 30)]
        whole = 30 * (8001 * (6 if tty else 5))
        assert 0.41 * whole < written < 0.7 * whole  # 100,000 lines of 240,030 are kept
        assert visit.page.evaluate("view.sums.length") == len(lines) + 1

    def test_flood_is_taken_in_before_it_is_drawn(self, visit: Visit):
        """While much comes in each frame, nothing is drawn that was drawn just now."""
        visit.run("echo start; exec sleep 60", shows="start")
        script = """async () => {
          const frame = () => new Promise((go) => requestAnimationFrame(go));
          const draw = async (size) => {
            Object.assign(stream, { drawn: Infinity, arrived: size - 2 });
            stream.push({ time: 1, data: encoder.encode("x\\n") });
            await frame();
            return stream.queue.length;
          };
          const first = await draw(FLOOD + 1);
          await frame();
          return [first, stream.queue.length, await draw(FLOOD)]; }"""
        assert visit.page.evaluate(script) == [1, 0, 0]

    def test_newest_lines_of_a_flood_are_shown_before_their_turn(self, visit, tmp_path):
        """As in a browser that passes on what the server sends more slowly than it comes."""
        go = tmp_path / "go"
        visit.run(f"echo start; until [ -e {go} ]; do sleep 0.1; done; seq 70000; exec sleep 60")
        visit.wait_for("#lines", "^start$")
        visit.page.evaluate("() => { window.late = []; stream.take = (one) => late.push(one); }")
        go.touch()
        visit.wait_until_true("late.at(-1)?.output.endsWith('70000\\n')")
        release = """end => { const { take } = Stream.prototype;
          while (late[0]?.offset < end) take.call(stream, late.shift()); }"""
        visit.page.evaluate(release, 200000)
        visit.wait_for("#lines", "70000$")
        is_ahead = "stream.next < 300000 && view.terminal !== stream.terminal"
        visit.wait_until_true(f"!stream.queue.length && {is_ahead}")
        visit.page.fill("#find", "11999")  # what has come in its turn is searched
        visit.wait_for("#hits", "^1 of 1$")
        visit.page.evaluate(release, 1000000)
        visit.wait_until_true("view.terminal === stream.terminal && !stream.queue.length")
        lines = visit.page.evaluate("stream.terminal.lines.map((line) => line.text)")
        assert lines == ["start", *map(str, range(1, 70001)), ""]
        visit.page.click("#tail")
        visit.wait_for("#lines", "70000$")

    def test_what_waits_to_be_shown_is_bytes_and_bounded(self, visit: Visit):
        """As text it was there several times, until the browser came to collect it."""
        visit.run("echo start; exec sleep 60", shows="start")
        script = """text => {
          const line = encoder.encode(text + "\\n"), all = new Uint8Array(line.length * 2000000), size = 1000001;
          for (let at = 0; at < all.length; at += line.length) all.set(line, at);
          const { decoder } = stream, { decode } = decoder, { render } = view;
          Object.assign(window, { decoded: [], drawn: [] });
          decoder.decode = (...given) => { decoded.push(given[0]?.length ?? 0); return decode.apply(decoder, given); };
          view.render = function () { if (stream.queue.length) drawn.push(stream.drawn); render.call(this); };
          for (let at = 0; at < all.length; at += size) stream.push({ time: 1, data: all.slice(at, at + size) });
          return [decoded.length, stream.queued, stream.queue.reduce((sum, { data }) => sum + data.length, 0)]; }"""
        line = "a \u00e4 \u6f22 \U0001f600"
        decoded, queued, held = visit.page.evaluate(script, line)
        assert decoded == 0 and 15e6 - 1 < held == queued <= 16e6
        visit.wait_until_true("stream.queue.length === 0")
        assert visit.page.evaluate("[stream.queued, stream.ends]") == [0, 0]
        pieces = visit.page.evaluate("decoded")
        assert max(pieces) <= 16384 and sum(pieces) == held
        lines = visit.page.evaluate("stream.terminal.lines.map((line) => line.text)")
        assert len(lines) > 100000 and set(lines[-100000:-1]) == {line}
        times = sorted(set(visit.page.evaluate("drawn")))  # it is drawn for other reasons as well
        assert all(after - before > 100 for before, after in zip(times, times[1:]))

    def test_strings_questions_and_shapes_are_taken(self, visit: Visit):
        script = """data => { const t = new Terminal(20, 6), said = []; t.reply = (text) => said.push(text);
          t.write(data); const { title, shape, modes, link } = t; return [said.join(""), title, shape, link, modes]; }"""
        for data, expected in {
            "\x1b[c\x1b[>c\x1b[5n\x1b[2;3H\x1b[6n": ("\x1b[?62;22c\x1b[>1;10;0c\x1b[0n\x1b[2;3R", "", 0, ""),
            "\x1b[3;5r\x1b[?6h\x1b[2;2H\x1b[6n": ("\x1b[2;2R", "", 0, ""),
            "\x1b]0;one\x07\x1b]1;icon\x07": ("", "one", 0, ""), "\x1b]2;a;b\x1b\\": ("", "a;b", 0, ""),
            "\x1b]2;lost\x18\x1b\\": ("", "", 0, ""), "\x1b]2;lost\x1b[m\x1b\\": ("", "", 0, ""), "\x1b[4 q": ("", "", 4, ""),
            "\x1b]8;id=1;https://a.b/;c\x1b\\": ("", "", 0, "https://a.b/;c"), "\x1b]8;;javascript:alert(1)\x07": ("", "", 0, ""),
            "\x1b]8;;http://a\x07\x1b]8;;\x07": ("", "", 0, ""), "\x1bP$q q\x1b\\\x1b[?1$p\x1b[>q\x1b]10;?\x07": ("", "", 0, ""),
        }.items():  # fmt: skip
            assert tuple(visit.page.evaluate(script, data)[:4]) == expected, data
        data = "\x1b[?1;5;1000;1002;1003;1004;1006;1007;2004h\x1b[?25l"
        modes = visit.page.evaluate(script, data)[4]
        on = ["1", "5", "7", "1000", "1002", "1003", "1004", "1006", "1007", "2004"]
        assert sorted((key for key in modes if modes[key]), key=int) == on

    def test_what_is_odd_neither_grows_nor_gets_lost(self, visit: Visit):
        script = """fill => { const t = new Terminal(20, 6), log = new Terminal(0, 0);
          t.write(fill + "\\x1b[?1049h"); t.resize(20, 3); t.write("\\x1b[?1049lX");
          log.write("\\x1b[9999@".repeat(9) + "\\x1b[" + "1".repeat(1e5) + " ".repeat(1e5));
          const sizes = [log.row().cells.length <= 65536, log.between.length < 99, log.params.length <= 1000];
          stream = new Stream({ tty: true, cols: 80, rows: 24 }); stream.isPumping = true; // none is taken
          for (const size of [[90, 30], [], []]) stream.push({ size, data: new Uint8Array(8e6) });
          return [t.lines.length - t.base, t.row(2).text, sizes, stream.terminal.cols]; }"""
        assert visit.page.evaluate(script, FILL) == [3, "FFFFF5X", [True] * 3, 90]

    def test_any_colours_can_be_read(self, visit: Visit):
        script = """() => { const bad = [];
          for (const name of ["Dark", "Light"]) { setTheme(name); readTheme();
            for (let fg = -1; fg < 256; fg++) for (let bg = -1; bg < 256; bg += bg < 16 ? 1 : 7)
              for (const flags of [0, 1, 2, 16, 18]) {
                const { ink, paper } = readStyle(`${fg},${bg},${flags},`);
                const shown = lookOf(`${fg},${bg},${flags},`).color.match(/\\d+/g).map(Number);
                if (contrast(shown, paper) < 4.5) bad.push([name, fg, bg, flags, ink, shown]);
          } } return bad.slice(0, 9); }"""
        assert visit.page.evaluate(script) == []
        assert abs(visit.page.evaluate("contrast([255, 255, 255], [118, 118, 118])") - 4.54) < 0.01

    def test_backgrounds_fill_rows_and_lines_have_no_gaps(self, visit: Visit):
        visit.run(r"printf '\033[?25l\033[44m\033[2J\033[m'; printf '│█│\n'; sleep 60", tty=True)
        draw = r"printf '\033[?25l\033[44m\033[J\033[m'; for i in 1 2 3 4 5 6 7 8; do printf '│\n'; done"
        visit.run(f"{draw}; sleep 60", tty=True)
        visit.wait_until_true("stream.terminal.y === 8")
        visit.page.wait_for_timeout(200)
        box = visit.page.locator("#lines").bounding_box()
        cell, row = visit.page.evaluate("[font.cell, view.row]")
        script = """async encoded => { const image = make("img", { src: "data:image/png;base64," + encoded });
          await image.decode(); const { width, height } = image, pen = make("canvas", { width, height }).getContext("2d");
          pen.drawImage(image, 0, 0); const { data } = pen.getImageData(0, 0, width, height);
          return Array.from({ length: height }, (_, y) => [...new Set(Array.from({ length: width }, (_, x) =>
            String(data.slice(4 * (y * width + x), 4 * (y * width + x) + 3))))]); }"""

        def read_colors(x: float, width: float) -> Any:
            clip = {"x": box["x"] + x, "y": box["y"] + row, "width": width, "height": 6 * row}
            picture = base64.b64encode(visit.page.screenshot(clip=clip)).decode()
            return visit.page.evaluate(script, picture)

        assert len({color for colors in read_colors(10 * cell, 9 * cell) for color in colors}) == 1
        assert min(map(len, read_colors(0, cell))) > 1  # each row of pixels has some of the line

    def test_font_is_measured_when_the_zoom_changes(self, visit: Visit):
        """Not at each click on a task: it lays out the page four times."""
        visit.run("echo one")
        visit.page.evaluate("""() => { const { measureFont } = view; view.calls = 0;
          view.measureFont = () => { view.calls++; measureFont.call(view); }; }""")
        visit.run("echo two", tty=True, shows="two")
        visit.page.locator("#tasks button").nth(1).click()
        visit.wait_for("#lines", "one")
        assert visit.page.evaluate("view.calls") == 0
        assert visit.page.evaluate("(font.ratio = 3, layOut(), view.calls)") == 1
        assert visit.page.evaluate("font.ratio === devicePixelRatio && font.cell > 5")

    def test_row_never_shifts(self, visit: Visit):
        odd = "\u2764\ufe0f \u26a0\ufe0f \u23fa \u2460 \u280b \u6f22\u5b57 \u1112\u1161\u11ab \U0001f469\u200d\U0001f4bb e\u0301 \ufdfa \u0645\u0631\u062d\u0628\u0627 \u0928\u092e\u0938\u094d\u0924\u0947 \u0e2a\u0e27\u0e31 Z\u0351\u036b\u0343".split()
        visit.run("printf '%s|\\n' " + " ".join(odd) + "; sleep 60", tty=True)
        visit.wait_until_true(f"$('lines').textContent.split('|').length > {len(odd)}")
        script = """() => { const { left, top } = document.getElementById("lines").getBoundingClientRect();
          return [...document.querySelectorAll("#lines > div")].slice(0, %d).map((row, i) => {
            const walker = document.createTreeWalker(row, NodeFilter.SHOW_TEXT), range = document.createRange();
            let node; while (walker.nextNode()) if (walker.currentNode.data.endsWith("|")) node = walker.currentNode;
            range.setStart(node, node.length - 1); range.setEnd(node, node.length);
            const place = range.getBoundingClientRect(), box = row.getBoundingClientRect();
            return [(place.left - left) / font.cell, (box.top - top) / view.row, box.height / view.row, stream.terminal.row(i).open().length - 1]; }); }"""
        rows = visit.page.evaluate(script % len(odd))
        assert len(rows) == len(odd)
        for number, (text, (x, y, height, cells)) in enumerate(zip(odd, rows)):
            assert abs(x - cells) < 0.1 and abs(y - number) < 0.01 and abs(height - 1) < 0.01, text

    def test_nothing_is_blank_and_hits_are_seen_in_any_script(self, visit: Visit):
        letters = [
            "x", "\u6f22", "Vi\u1ec7t ", "Vie\u0323\u0302t ", "\u0645\u0631\u062d\u0628\u0627 ",
            "\U0001f600", "a\u0301\u0302\u0303", "\u0e2a\u0e27\u0e31", "\t", "\u1112\u1161\u11ab",
            "\u2764\ufe0f",
        ]  # fmt: skip
        script = """async ([piece, columns]) => { const t = new Terminal(0, 0), output = document.getElementById("output");
          const line = piece.repeat(130).slice(0, 130 * piece.length);
          for (let i = 0; i < 400; i++) t.write(`${i} ${[...line].slice(0, 130).join("")}${i === 200 ? " needle" : ""}\\n`);
          view.show(t); output.style.width = `${112.5 * font.cell + 24}px`; view.measure();
          const covered = () => { view.render(); const { top, bottom } = output.getBoundingClientRect(); let sum = 0;
            for (const row of document.querySelectorAll("#lines > div > div")) { const box = row.getBoundingClientRect();
              sum += Math.max(0, Math.min(box.bottom, bottom) - Math.max(box.top, top)); }
            return sum / (bottom - top); };
          const end = covered(), rows = document.querySelectorAll("#lines > div:nth-last-child(2) > div").length;
          document.getElementById("find").value = "needle"; view.find(0); const middle = covered();
          const hit = [...document.querySelectorAll("#lines .hit div")].at(-1).getBoundingClientRect();
          const box = output.getBoundingClientRect();
          return [view.cols, end, middle, hit.top >= box.top && hit.bottom <= box.bottom, view.sums.at(-1)]; }"""
        for piece in letters:
            cols, end, middle, is_seen, _ = visit.page.evaluate(script, [piece, 112])
            seen = (piece, cols, end, middle)
            assert cols == 112 and end > 0.9 and middle > 0.97 and is_seen, seen

    def test_copy_and_download_are_what_was_written(self, visit: Visit):
        visit.context.grant_permissions(["clipboard-read", "clipboard-write"])

        def wait_for_clipboard(text: str) -> None:
            read = f"navigator.clipboard.readText().then((text) => text === {json.dumps(text)})"
            visit.wait_until_true(read)

        words = "word " * 50 + "end  "
        clear = r"printf 'alphaalphaalphaalphaalphaalpha%90s|\n' x; printf '\033[H\033[2J\033[3J'"
        visit.run(f"{clear}; printf 'beta\\r\\ngamma\\r\\n{words}\\r\\nlast '; sleep 60", tty=True)
        visit.wait_for("#lines", "last")
        copy = "document.getElementById('copy')"  # says so for a moment only
        note = f"() => (window.told ??= []).push({copy}.innerText)"
        visit.page.evaluate(f"new MutationObserver({note}).observe({copy}, {{ childList: true }})")
        visit.page.click("#copy")
        visit.wait_until_true("window.told?.includes('Copied')")
        wait_for_clipboard(f"beta\ngamma\n{words}\nlast \n")
        select = """() => { const rows = document.querySelectorAll("#lines > div"), range = document.createRange();
          range.setStart(rows[1], 0); range.setEnd(rows[rows.length - 1], 1); getSelection().removeAllRanges();
          getSelection().addRange(range); document.getElementById("%s").focus(); }"""
        visit.page.evaluate(select % "output")
        visit.page.keyboard.press("Control+c")
        wait_for_clipboard(f"gamma\n{words}\nlast ")
        visit.page.focus("#keys")
        visit.page.keyboard.press("Control+c")  # nothing is selected any more
        visit.wait_for("#state", "INT")
        visit.run("printf 'a\\tb  \\n\\033[31m%9000s\\033[m|\\n\\n' x")
        visit.wait_for("#state", "done")
        visit.page.click("#copy")
        wide = " " * 8999 + "x"
        wait_for_clipboard(f"a\tb  \n{wide}|\n\n")
        visit.page.evaluate(select % "output")
        visit.page.keyboard.press("Control+c")
        wait_for_clipboard(f"{wide}|\n\n")
        with visit.page.expect_download() as download:
            visit.page.click("#download")
        assert re.fullmatch(r"task-\d+\.txt", download.value.suggested_filename)
        written = f"a\tb  \n\x1b[31m{wide}\x1b[m|\n\n"
        assert Path(download.value.path()).read_text(encoding="utf-8") == written

    def test_input_methods_and_phones_type(self, visit: Visit):
        visit.run("stty raw -echo; echo on; exec od -An -c -v -w1", tty=True, shows="on")
        visit.page.evaluate(
            "window.sent = []; const real = send; send = (message) => (message.data && sent.push(message.data), real(message)); 0"
        )
        key = """(init) => { const event = new KeyboardEvent("keydown", { bubbles: true, cancelable: true, ...init });
          Object.defineProperty(event, "keyCode", { value: init.keyCode ?? 0 });
          document.getElementById("keys").dispatchEvent(event); return event.defaultPrevented; }"""
        text = """([value, isComposing]) => { const keys = document.getElementById("keys"); keys.value = value;
          keys.dispatchEvent(new InputEvent("input", { data: value, isComposing })); }"""
        for what in ({"keyCode": 229}, {"isComposing": True}):  # confirms a candidate
            assert not visit.page.evaluate(key, {"key": "Enter", **what})
        assert visit.page.evaluate("sent") == []
        visit.page.evaluate(text, ["\u306b\u307b", True])
        seen = "(({ opacity, width }) => [opacity, parseFloat(width) >= 3 * font.cell])(getComputedStyle(document.getElementById('keys')))"
        assert visit.page.evaluate(seen) == ["1", True] and visit.page.evaluate("sent") == []
        visit.page.evaluate("$('keys').dispatchEvent(new CompositionEvent('compositionend'))")
        assert visit.page.evaluate("sent.splice(0)") == ["\u306b\u307b"]
        assert visit.page.evaluate(seen)[0] == "0"
        for held, is_composing, sent in (
            ("ctrl", False, "\x03"), ("alt", True, "\x1bc"), ("ctrl", True, "\x03"),
        ):  # fmt: skip
            visit.page.evaluate(f"held.{held} = true")
            assert not visit.page.evaluate(key, {"key": "Unidentified", "keyCode": 229})
            visit.page.evaluate(text, ["c", is_composing])
            assert visit.page.evaluate("[sent.splice(0), held.ctrl || held.alt]") == [[sent], False]
        visit.page.evaluate(text, ["c", False])
        assert visit.page.evaluate("sent.splice(0)") == ["c"]
        visit.page.evaluate("wait = 60000; socket.close()")
        visit.wait_for("#link", "offline")
        visit.page.keyboard.type("x")
        visit.wait_for("#notice", "not sent")

    def test_mouse_and_focus_are_told_when_asked_for(self, visit: Visit):
        visit.run("stty raw -echo; printf 'on\\r\\n'; exec cat", tty=True, shows="on")
        listen = "window.sent = []; send = (message) => message && sent.push(message.data ?? ''); 0"
        listen += "; addEventListener('wheel', () => (window.wheel = 1), true)"
        visit.page.evaluate(listen)
        box = visit.page.locator("#lines").bounding_box()
        cell, row = visit.page.evaluate("[font.cell, view.row]")
        mouse = visit.page.mouse

        def go(x: int, y: int) -> None:
            mouse.move(box["x"] + (x - 0.5) * cell, box["y"] + (y - 0.5) * row)

        def do(modes: str, *steps: Any) -> list[str]:
            visit.page.evaluate("modes => { stream.terminal.write(modes); sent.splice(0); }", modes)
            go(3, 2)
            for step in steps:
                step()
            return [data for data in visit.page.evaluate("sent.splice(0)") if data]

        click = (mouse.down, lambda: go(4, 2), mouse.up)
        assert do("", *click) == []
        assert do("\x1b[?1000;1006h", *click) == ["\x1b[<0;3;2M", "\x1b[<0;4;2m"]
        assert do("\x1b[?1002h", *click) == ["\x1b[<0;3;2M", "\x1b[<32;4;2M", "\x1b[<0;4;2m"]
        assert do("\x1b[?1003h", lambda: go(9, 1))[-1] == "\x1b[<35;9;1M"
        pause = lambda: visit.wait_until_true("window.wheel && !(window.wheel = 0)")  # noqa: E731
        assert do("", lambda: mouse.wheel(0, -100), pause)[-1:] == ["\x1b[<64;3;2M"]
        keyboard = visit.page.keyboard
        shifted = (lambda: keyboard.down("Shift"), *click, lambda: keyboard.up("Shift"))
        assert do("\x1b[?1002;1003l", *shifted) == []
        assert do("\x1b[?1006l", *click) == ['\x1b[M #"', '\x1b[M#$"']
        wheel = (lambda: mouse.wheel(0, 100), pause)
        assert do("\x1b[?1000l", *wheel) == []
        assert do("\x1b[?1049h", *wheel) == ["\x1b[B" * 3]
        assert do("\x1b[?1h", *wheel) == ["\x1bOB" * 3]
        visit.page.focus("#keys")
        steps = (lambda: visit.page.focus("#command"), lambda: visit.page.focus("#keys"))
        assert do("\x1b[?1004h", *steps) == ["\x1b[O", "\x1b[I"]

    def test_cursor_titles_and_links_are_shown(self, visit: Visit):
        title = r"\033]2;my <b>title\007\033]8;;https://example.org/x\033\\here\033]8;;\033\\"
        visit.run(rf"printf '{title} \033[31mred\b\033[m'; exec cat", tty=True)
        visit.wait_for("#caption", "^my <b>title$")
        link = visit.page.locator("#lines a")
        assert (link.inner_text(), link.get_attribute("title")) == ("here", "https://example.org/x")
        assert link.get_attribute("href") == "https://example.org/x"
        assert link.get_attribute("rel") == "noopener noreferrer"
        look = "(({ backgroundColor, color, outlineStyle, boxShadow }) => [backgroundColor, color, outlineStyle, boxShadow !== 'none'])(getComputedStyle(document.querySelector('#lines .cursor')))"
        assert visit.text("#lines .cursor") == "d"
        ink, paper, *solid = visit.page.evaluate(look)
        assert solid == ["none", False] and paper == visit.page.evaluate("css(theme.screen)")
        visit.page.focus("#command")
        assert visit.page.evaluate(look)[1:3] == [ink, "solid"]  # hollow, and the character is seen
        visit.page.focus("#keys")
        for shape, is_bar in ((3, True), (5, True), (2, False)):
            visit.page.evaluate(f"stream.terminal.write('\\x1b[{shape} q'); view.render()")
            shown = visit.page.evaluate(look)
            assert (shown[1] == ink) is shown[3] is is_bar
        visit.page.evaluate("stream.terminal.write('\\x1b[?25l'); view.render()")
        assert visit.page.locator("#lines .cursor").count() == 0
        visit.page.evaluate("stream.terminal.write('\\x1b[?5h'); view.render()")
        read = "getComputedStyle(document.getElementById('lines')).filter"
        assert "invert" in visit.page.evaluate(read)

    def test_long_output_keeps_the_document_small(self, visit: Visit):
        visit.run("seq 150000")
        visit.wait_for("#state", "done")
        visit.wait_until_true("stream.done === 938895 && !stream.ahead")
        visit.wait_for("#lines", "150000$")
        assert visit.page.locator("#lines > div").count() < 120
        assert visit.page.evaluate("stream.terminal.lines.length") <= 105300
        visit.page.evaluate("document.getElementById('output').scrollTop -= 5000")
        visit.page.click("#tail")
        visit.wait_for("#lines", "150000$")
        visit.page.fill("#find", "149")
        visit.wait_for("#hits", r"^\d+ of \d+$")
        visit.page.fill("#find", "99999")
        visit.wait_for("#hits", "^1 of 1$")
        visit.wait_for("#lines .hit", "^99999$")
        script = """count => { view.follow = false; document.getElementById("output").scrollTop = 0; view.render();
          getSelection().selectAllChildren(document.querySelector("#lines > div")); stream.terminal.drop(count);
          view.follow = true; view.render(); return document.querySelectorAll("#lines > div").length; }"""
        for count in (0, 5000):  # what is selected is far away, or gone
            assert visit.page.evaluate(script, count) < 120


class TestPageAround(OnPage):
    """The page in a real Chromium: connections, logging in, tasks, devices, several viewers."""

    def test_lost_connection_loses_no_output(self, visit: Visit, tmp_path: Path):
        go = tmp_path / "go"
        more = "for i in $(seq 21 150); do echo $i; sleep 0.01; done"
        visit.run(f"seq 0 20; until [ -e {go} ]; do sleep 0.02; done; {more}", shows="20$")
        visit.page.evaluate("wait = 60000; socket.close()")
        visit.wait_for("#link", "offline")
        go.touch()
        visit.wait_until_true("(connect(), $('link').textContent === 'live')")
        visit.wait_for("#state", "done")
        visit.wait_until_true("stream.queue.length === 0 && stream.terminal.lines.length === 152")
        shown = visit.page.evaluate("stream.terminal.lines.map((line) => line.text)")
        assert shown == [*map(str, range(151)), ""]
        assert visit.page.is_hidden("#notice")

    def test_connection_that_dies_in_silence_is_noticed(self, visit: Visit):
        visit.page.clock.install()
        visit.reload().page.evaluate("wait = 60000; socket.onmessage = null")
        visit.page.clock.run_for(25000)
        visit.wait_for("#link", "offline .silence.")

    def test_output_is_read_again_if_need_be_but_not_when_it_is_left(self, visit, server, tmp_path):
        go = tmp_path / "go"
        visit.run(f"echo one; until [ -e {go} ]; do sleep 0.02; done; echo late; sleep 60")
        visit.wait_for("#lines", "^one$")
        hold = """() => { window.real = api; send({ type: "watch", tasks: [] });
          api = async (...given) => { const answer = await real(...given);
            await new Promise((go) => (window.release = go)); return answer; };
          stream.refill(); }"""
        visit.page.evaluate(hold)
        visit.wait_until_true("window.release")
        go.touch()
        wait_until(lambda: server.get("/tasks")[-1]["output_bytes"] == len("one\nlate\n"))
        heard = "EVENTS.watching({ tasks: [stream.task.task_id] })"
        visit.page.evaluate(f"{heard}, api = real, release()")
        visit.wait_for("#lines", "^one\nlate$")
        leave = """() => { window.old = stream; old.refill(); closeTask();
          old.waiting.push({ type: "task_output", offset: 1e9, output: "" }); }"""
        visit.page.evaluate(leave)
        visit.wait_until_true("!old.waiting")

    def test_tasks_that_ended_in_a_gap_do_not_run_for_ever(self, visit: Visit):
        visit.allowed = "status of 400"
        script = """() => { const fields = { state: "running", command: "", by: "", started: 1, ended: null };
          for (const task_id of "ab") takeTask({ ...fields, task_id });
          select(tasks.get("a")); EVENTS.gap({ from: 1, to: 2 }); takeTask({ ...fields, task_id: "c" }); }"""
        visit.page.evaluate(script)
        visit.wait_for("#state", "lost")
        assert visit.page.evaluate("[...'abc'].filter((id) => tasks.has(id))") == ["a", "c"]

    def test_gap_after_a_lost_connection_is_told_and_filled(self, browser: Any, tmp_path: Path):
        go, given = tmp_path / "go", {"KEEP_EVENTS_BYTES": 20_000}
        with visiting(browser, tmp_path, "--interval=0.2", **given) as (visit, server):
            visit.run(f"echo 0; until [ -e {go} ]; do sleep 0.02; done; seq 20000; sleep 60")
            visit.wait_for("#lines", "^0$")
            (task,) = server.get("/tasks")
            visit.page.evaluate("wait = 60000; socket.close()")
            visit.wait_for("#link", "offline")
            server.run("true")  # of which the page would hear
            go.touch()
            wait_until(lambda: server.task(task["task_id"])["output_bytes"] == 108_896)
            visit.wait_until_true("(connect(), $('link').textContent === 'live')")
            visit.wait_for("#notice", r"Events \d+ to \d+ were missed")
            visit.wait_until_true("stream.terminal.lines.length === 20002")
            shown = visit.page.evaluate("stream.terminal.lines.map((line) => line.text)")
            assert shown == [*map(str, range(20001)), ""]

    def test_works_below_a_path_of_a_proxy(self, browser: Any, server: ServerProcess):
        with path_proxy(server.port, b"/deep/er") as proxy:
            with Visit(browser, f"http://{proxy.place}/deep/er/") as visit:
                visit.wait_live()
                visit.run("echo through", shows="^through$")

    def test_comes_back_after_a_restart(self, browser: Any, tmp_path: Path):
        port = find_fixed_port()
        options = (f"--port={port}", f"--ws-port={port}", "--interval=0.2")
        with ServerProcess(tmp_path, *options):
            visit = Visit(browser, f"http://127.0.0.1:{port}/").wait_live()
            visit.run("echo before; sleep 60", shows="before")
        with visit:
            visit.wait_for("#link", "offline|connecting")
            with ServerProcess(tmp_path, *options):
                visit.wait_live()
                visit.wait_for("#notice", "restarted")
                visit.run("echo after", shows="^after$")
                visit.page.goto("about:blank")

    def test_alert_is_shown(self, browser: Any, tmp_path: Path):
        options = ("--cpu-alert=1", "--alert-cooldown=0.5", "--interval=0.2")
        with visiting(browser, tmp_path, *options) as (visit, server):
            task_id = server.start("timeout 30 sh -c 'while :; do :; done'")
            visit.wait_for("#banner", "CPU usage exceeded 1%!")
            assert visit.page.title().startswith("⚠ ")
            visit.page.click("#bell")
            visit.wait_for("#alert-list", r"^\d\d:\d\d:\d\d.*exceeded")
            visit.page.reload()
            visit.wait_for("#banner", "CPU usage exceeded 1%!")
            server.end(task_id)
            before = server.get("/stats?alerts")["alerts"][0]
            visit.page.click("#bell")  # those from before the reload are there too
            visit.wait_for("#alert-list", r"exceeded")
            times = visit.page.locator("#alert-list time").all_inner_texts()
            when = time.strftime("%H:%M:%S", time.localtime(before["timestamp"] / 1000))
            assert when in times[-1]

    def test_alert_is_told_on_the_desktop_on_request(self, browser: Any, tmp_path: Path):
        # Chromium's headless shell forgets what it permits.
        stub = """window.told = []; window.Notification = class extends Notification {
          static permission = "default";
          static async requestPermission() {
            return (this.permission = await super.requestPermission()); }
          constructor(title, { body }) { super(title); told.push([title, body]); } };"""
        options = ("--cpu-alert=0", "--alert-for=0", "--alert-cooldown=0.5", "--interval=0.2")
        with visiting(browser, tmp_path, *options) as (visit, server):
            visit.context.add_init_script(stub)
            visit.reload()
            server.run("timeout 1 sh -c 'while :; do :; done'")
            visit.wait_for("#banner", "exceeded 0%")
            assert visit.page.evaluate("told") == []  # nobody asked for it
            visit.context.grant_permissions(["notifications"])
            visit.page.click("#bell")
            visit.page.click("#notify")
            visit.wait_for("#notify", "are on")
            server.start("timeout 3 sh -c 'while :; do :; done'")
            visit.wait_until_true("told.length")
            host, text = visit.page.evaluate("told[0]")
            assert host == socket.gethostname() and "CPU" in text

    @pytest.mark.parametrize("answer, words", [
        ("denied", "allow them in this site's settings"), ("default", "click once more"),
    ])  # fmt: skip
    def test_notifications_that_are_refused_are_explained(self, visit, answer: str, words: str):
        visit.wait_live().page.click("#bell")
        visit.page.evaluate(f"Notification.requestPermission = async () => '{answer}'")
        visit.page.click("#notify")
        visit.wait_for("#notify", words)

    def test_view_only_says_why(self, browser: Any, tmp_path: Path):
        with ServerProcess(tmp_path, "--require-token") as server:
            tokens = [
                state_file(server, name).read_text().strip() for name in ("token", "view-token")
            ]
            server.fields = (bearer(tokens[0]),)
            with Visit(browser, f"http://{server.place}/#token={tokens[1]}") as visit:
                visit.wait_live()
                assert visit.page.url == f"http://{server.place}/"
                visit.wait_for("#readonly", "View only")
                assert visit.page.is_hidden("#run")
                visit.open(server.start("echo seen; sleep 60"))
                visit.wait_for("#lines", "^seen$")
                assert visit.page.is_disabled("#stop") and visit.page.is_disabled("#rerun")

    def test_no_exec_says_why(self, browser: Any, tmp_path: Path):
        with visiting(browser, tmp_path, "--no-exec") as (visit, _):
            visit.wait_for("#readonly", "--no-exec")
            assert visit.page.is_hidden("#run")

    @pytest.mark.parametrize("scheme", ["http", "https"])
    def test_login(self, browser: Any, tmp_path: Path, scheme: str):
        options = make_certificate(tmp_path).options if scheme == "https" else (NETWORK_BIND,)
        with ServerProcess(tmp_path, *options, "--require-token") as server:
            token = state_file(server, "token").read_text().strip()
            url = f"{scheme}://127.0.0.1:{server.port}/"
            with Visit(browser, url, ignore_https_errors=True) as visit:
                visit.page.fill("#token", "wrong-wrong-wrong-wrong")
                visit.page.press("#token", "Enter")
                visit.wait_for("#login-error", "not right")
                for odd, words in (
                    ("\u201cx\u201d", "U\\+201C"), ("a/b", "U\\+002F"), ("\u0436", "U\\+0436"),
                ):  # fmt: skip
                    visit.page.fill("#token", token + odd)
                    visit.page.press("#token", "Enter")
                    visit.wait_for("#login-error", words)
                assert not visit.page.evaluate("recall('token')").strip("wrong-")
                visit.page.fill("#token", f"\u200b {token}\ufeff ")
                visit.page.click("#login-form button")
                visit.wait_live()
                assert visit.page.evaluate("socket.url").startswith(url.replace("http", "ws"))
                visit.run("echo in", shows="^in$")
                assert token not in visit.page.url
                visit.reload()
                visit.page.click("#logout")
                visit.page.wait_for_selector("#login[open]")

    @pytest.mark.parametrize("look", [{}, PHONE])
    def test_axe_finds_nothing(self, browser: Any, server: ServerProcess, look: dict[str, Any]):
        with Visit(browser, f"http://{server.place}/", **look) as visit:
            for state in walk_states(visit, server):
                visit.set_colors("dark")
                assert visit.find_barriers() == [], f"{state}, dark"
                visit.set_colors("light")
                rules = ("color-contrast", "link-in-text-block")  # the others see no colours
                assert visit.find_barriers(*rules) == [], f"{state}, light"

    @pytest.mark.parametrize("look", [PHONE, {"viewport": {"width": 640, "height": 400}}])
    def test_phone_and_large_print_lose_nothing(self, browser: Any, server: Any, look: Any):
        """Zoomed to 200 %, 1280 x 800 are 640 x 400."""
        with Visit(browser, f"http://{server.place}/", **look) as visit:
            visit.wait_live()
            fits = "document.documentElement.scrollWidth <= innerWidth"
            assert visit.page.evaluate(fits)
            visit.run("stty size; echo small; cat", tty=True)
            shown = visit.wait_for("#lines", "small")
            assert int(shown.split()[1]) >= 40  # from the start as wide as it will be
            assert visit.page.evaluate(fits)
            assert visit.page.is_hidden(".head") and visit.page.is_hidden(".tools")
            visit.page.click("#unfold")
            visit.wait_for("#state", "running")
            for name in ("stop", "signals", "rerun", "copy", "download", "times", "find", "next"):
                visit.page.hover(f"#{name}")  # which it can only where it is seen
            assert visit.page.evaluate(fits)
            visit.page.focus("#keys")
            if "is_mobile" in look:
                visit.page.click("#keybar >> text=Ctrl")
                visit.page.keyboard.press("d")
            else:
                visit.page.keyboard.press("Control+d")
            visit.wait_for("#state", "done")
            visit.page.click("#back")
            visit.wait_for("#tasks", "small")

    def test_output_has_the_whole_window(self, visit: Visit, server: ServerProcess):
        visit.run("sh", tty=True)
        task = server.get("/tasks")[-1]
        before = visit.page.evaluate("view.fits")

        def wait_for_rows(condition: str) -> None:
            visit.wait_until_true(condition)
            visit.wait_until_true("stream.terminal.rows === view.fits")
            assert server.task(task["task_id"])["rows"] == visit.page.evaluate("view.fits")

        visit.page.keyboard.press("Control+Shift+Enter")
        wait_for_rows(f"view.fits > {before} + 15")
        assert visit.page.is_hidden("header") and visit.page.is_hidden("#run")
        visit.page.keyboard.type("stty size")
        visit.page.keyboard.press("Enter")
        visit.wait_for("#lines", visit.page.evaluate("`\\n${view.fits} ${view.cols}\\n`"))
        visit.page.reload()  # it is remembered
        visit.wait_until_true("document.body.matches('.whole.reading')")
        visit.wait_for("#lines", "stty size")
        visit.page.click("#whole")
        visit.page.click("#output")
        visit.page.keyboard.press("Enter")
        wait_for_rows(f"view.fits === {before}")
        assert visit.page.is_visible("header")

    def test_task_has_an_address(self, visit: Visit, server: ServerProcess):
        visit.run("echo one")
        visit.run("echo two")
        ids = [task["task_id"] for task in server.get("/tasks")[-2:]]
        url = f"http://{server.place}/"
        assert visit.page.url == f"{url}#task={ids[1]}"
        visit.page.go_back()
        visit.wait_for("#lines", "^one$")
        visit.page.go_forward()
        visit.wait_for("#lines", "^two$")
        visit.reload().wait_for("#lines", "^two$")
        visit.page.go_back()
        visit.wait_for("#lines", "^one$")
        visit.page.go_back()
        visit.wait_for("#no-output", "Pick a task")
        visit.page.evaluate(f"location.hash = '#task={ids[0]}'")
        visit.wait_for("#lines", "^one$")
        token = state_file(server, "token").read_text().strip()
        visit.page.evaluate(f"location.hash = '#token={token}&task={ids[1]}'")
        visit.wait_for("#lines", "^two$")
        visit.wait_until_true(f"location.href === '{url}#task={ids[1]}' && token === '{token}'")
        visit.page.goto("about:blank")
        visit.page.goto(f"{url}#task=987654")
        visit.wait_for("#notice", "no task 987654")

    def test_failed_task_is_found_in_two_clicks(self, browser: Any, tmp_path: Path):
        with visiting(browser, tmp_path) as (visit, server):
            visit.page.goto("about:blank")  # to draw each of them would take most of the time
            for _ in range(120):
                server.start("true")
            wrong = server.run("echo wrong; exit 3", name="the build")["task_id"]
            for _ in range(79):
                server.start("true")
            visit.page.go_back()
            wait_until(lambda: {one["state"] for one in server.get("/tasks")} == {"done"})
            rows = visit.page.locator("#tasks li:not([hidden]) button")
            visit.wait_until(lambda: rows.count() >= 200)
            visit.page.click("#failed")
            wait_until(lambda: "the build" in rows.all_inner_texts()[0])
            rows.filter(has_text=f"#{wrong} ").click()
            visit.wait_for("#lines", "^wrong$")
            visit.page.fill("#filter", "THE BUI")
            assert rows.count() == 1
            visit.reload()  # it is remembered
            visit.wait_until(lambda: rows.count() == 1)
            assert visit.page.input_value("#filter") == "THE BUI"
            visit.page.fill("#filter", "nothing like it")
            visit.wait_for("#no-tasks", "No task is like that")
            visit.page.fill("#filter", "")
            visit.page.click("#running")
            assert rows.filter(has_text="true").count() == 0
            server.start("sleep 60; true")
            visit.wait_for("#tasks", "sleep 60; true")

    def test_stop_offers_signals(self, visit: Visit):
        visit.run("trap 'echo got INT; exit 0' INT; echo ready; while :; do sleep 0.05; done")
        visit.wait_for("#lines", "ready")
        visit.page.click("#signals")
        visit.page.click("#signal-menu >> text=INT")
        visit.wait_for("#lines", "got INT")
        visit.wait_for("#state", "stopped")
        assert visit.page.is_disabled("#signals") and visit.page.is_hidden("#signal-menu")

    def test_hears_only_what_it_shows(self, visit: Visit, server: ServerProcess, tmp_path: Path):
        heard: list[Any] = []

        def listen(socket: Any) -> None:
            socket.on("framereceived", lambda data: heard.append(json.loads(data)))

        def outputs() -> set[str]:
            return {event["task_id"] for event in heard if event["type"] == "task_output"}

        def set_hidden(value: str) -> None:
            script = """value => {
              Object.defineProperty(document, "hidden", { value, configurable: true });
              document.dispatchEvent(new Event("visibilitychange")); }"""
            count = sum(event["type"] == "watching" for event in heard)
            visit.page.evaluate(script, value)
            visit.wait_until(lambda: sum(e["type"] == "watching" for e in heard) > count)

        visit.page.on("websocket", listen)
        visit.reload()
        go = tmp_path / "go"
        other = server.start(f"i=0; until [ -e {go} ]; do echo other $i; sleep 0.01; done")
        visit.run(f"echo first; until [ -e {go} ]; do sleep 0.02; done; seq 3")
        shown = server.get("/tasks")[-1]["task_id"]
        visit.wait_for("#lines", "^first$")
        assert outputs() <= {shown}
        visit.page.locator("#tasks button", has_text="other").first.click()
        visit.wait_until(lambda: other in outputs())
        visit.page.locator("#tasks button", has_text="echo first").first.click()
        visit.wait_for("#lines", "^first$")
        set_hidden(True)
        heard.clear()
        go.touch()
        server.wait_for_end(shown)
        server.wait_for_end(other)
        ends = lambda: {e["task_id"] for e in heard if e["type"] == "task_complete"}  # noqa: E731
        visit.wait_until(lambda: ends() >= {shown, other})
        assert outputs() == set() and not any(e["type"] == "stats_update" for e in heard[1:])
        set_hidden(False)
        visit.wait_for("#lines", "^first\n1\n2\n3$")
        visit.wait_until(lambda: [e for e in heard if e["type"] == "stats_update"])

    def test_says_what_is_the_matter(self, browser: Any, server: ServerProcess):
        reason = '{"error":"x","message":"this Host is not served"}'
        table = [
            (404, {}, "", "answers 404: does the server run"),
            (502, {}, "", "answers 502: does the server run"),
            (403, {}, reason, "may not talk to the server: this Host is not served"),
            (429, {"Retry-After": "1"}, "", "too many requests"),
            (503, {}, '{"error":"x","message":"too many connections"}', "now: too many"),
        ]
        with Visit(browser, f"http://{server.place}/") as visit:
            visit.allowed = "status of [45]|net::ERR"
            visit.wait_live()
            for status, fields, body, words in table:
                answer = {"status": status, "body": body, "headers": fields}
                visit.page.route("**/info", lambda route: route.fulfill(**answer))
                visit.page.evaluate("wait = 50; socket.close()")
                visit.wait_for("#trouble", words)
                visit.page.unroute("**/info")
                visit.wait_live()  # all by itself
                assert visit.page.is_hidden("#trouble")
        with path_proxy(server.port, b"", b"Upgrade: websocket\r\n") as proxy:
            with Visit(browser, f"http://{proxy.place}/") as visit:
                visit.allowed = "WebSocket connection"
                visit.wait_for("#trouble", "must pass on Upgrade")
                assert visit.page.is_visible("#trouble-again")

    def test_clock_of_the_browser_is_an_hour_off(self, visit: Visit, server: ServerProcess):
        late = "const { now } = Date; Date.now = () => now() + 3600e3;"
        visit.context.add_init_script(late)
        visit.reload().wait_for("#notice", "clock is (1 h 00 m|59 m 5. s) ahead")
        visit.run("printf '\\033[5n'; sleep 60", tty=True)
        visit.wait_for("#tasks li:first-child small:last-child", r"^(\d+ ms|\d\.\d s)$")

    @pytest.mark.parametrize("how", ["forbidden", "full"])
    def test_works_without_storage(self, browser: Any, server: Any, how: str, tmp_path: Path):
        scripts = {
            "forbidden": """for (const name of ["localStorage", "sessionStorage"])
              Object.defineProperty(window, name, {
                get() { throw new DOMException("denied", "SecurityError"); } });""",
            "full": """Storage.prototype.setItem = () => {
              throw new DOMException("full", "QuotaExceededError"); };""",
        }
        with Visit(browser, f"http://{server.place}/") as visit:
            visit.context.add_init_script(scripts[how])
            visit.reload().wait_for("#notice", "keeps nothing for this page")
            visit.run(f"echo ran >> {tmp_path}/runs")
            visit.wait_for("#state", "done")
            assert visit.page.input_value("#command") == ""
            visit.page.press("#command", "Enter")  # and nothing is run twice
            visit.page.press("#command", "ArrowUp")
            assert "echo ran" in visit.page.input_value("#command")
            assert (tmp_path / "runs").read_text() == "ran\n"
            visit.page.click("#theme")
            visit.page.click("#failed")

    def test_command_is_run_once_and_nothing_is_lost(self, visit: Visit):
        box, held = visit.page.locator("#command"), []
        visit.allowed = "status of 502"
        visit.page.route("**/exec", lambda route: held.append(route))
        for status, *shown, left in (
            (502, "#run-error", "answer was 502", "echo ran\nx"), (0, "#lines", "^ran$", "x"),
        ):  # fmt: skip
            box.fill("echo ran")
            for key in ("Enter", "Enter", "x"):
                box.press(key)
            visit.wait_until(lambda: held)
            (route,), held = held, []
            route.fulfill(status=status) if status else route.continue_()
            visit.wait_for(*shown)
            assert box.input_value() == left

    def test_draft_and_keys_are_not_lost(self, visit: Visit):
        visit.run("echo before")
        box = visit.page.locator("#command")
        box.fill("half a com")
        box.press("ArrowUp")
        assert box.input_value() == "echo before"
        box.fill("echo after")
        box.press("ArrowDown")
        assert box.input_value() == "half a com"
        box.press("ArrowUp")
        assert box.input_value() == "echo after"
        visit.run("read x; echo got $x", tty=True)
        visit.wait_until_true("document.activeElement.id === 'keys'")
        visit.page.keyboard.type("it")
        visit.page.keyboard.press("Enter")
        visit.wait_for("#state", "done")
        visit.page.keyboard.type("echo more")
        assert box.input_value() == "echo more"

    def test_terminal_has_one_size(self, browser: Any, visit: Visit, server: ServerProcess):
        def sizes() -> list[list[int]]:
            script = "[stream.terminal.cols, stream.terminal.rows]"
            return [one.page.evaluate(script) for one in (visit, other)]

        def is_size_of(one: Visit) -> bool:
            for each in (visit, other):
                each.page.wait_for_timeout(20)
            size, task = one.page.evaluate("[view.cols, view.fits]"), server.task(task_id)
            return sizes() == [size, size] and [task["cols"], task["rows"]] == size

        visit.run("cat", tty=True)
        task_id = server.get("/tasks")[-1]["task_id"]
        first = visit.page.evaluate("[view.cols, view.fits]")
        with Visit(browser, f"http://{server.place}/#task={task_id}", **PHONE) as other:
            other.wait_for("#title", "cat")
            other.page.set_viewport_size({"width": 400, "height": 700})
            other.page.click("#find")
            assert sizes() == [first, first]  # who only looks changes nothing
            other.page.click("#fit")
            wait_until(lambda: is_size_of(other))
            assert other.page.is_hidden("#fit") and visit.page.is_visible("#fit")
            visit.page.set_viewport_size({"width": 1000, "height": 800})
            visit.wait_until_true("view.cols < 90")
            wait_until(lambda: is_size_of(other))  # it is the other's, now
            visit.page.click("#output")
            visit.page.keyboard.type("x")
            wait_until(lambda: is_size_of(visit))
            visit.page.set_viewport_size({"width": 1100, "height": 800})
            visit.wait_until_true("view.cols > 85")
            wait_until(lambda: is_size_of(visit))
            visit.page.evaluate("socket.send = () => {}")  # it is dead, and seems to be open
            visit.page.set_viewport_size({"width": 1200, "height": 800})
            visit.wait_until_true("stream.task.sizes.length")
            visit.page.evaluate("const dead = socket; wait = 50; retry({}); dead.close()")
            visit.wait_live().page.keyboard.type("x")
            wait_until(lambda: is_size_of(visit))
            size = sizes()[0]
            visit.page.keyboard.press("Control+c")
            other.wait_for("#state", "died by INT")
            other.page.reload()
            other.wait_for("#title", "cat")
            assert sizes() == [size, size]  # also when it has ended

    def test_question_gets_one_answer(self, browser: Any, visit: Visit, server: ServerProcess):
        """At once, when it comes in the first moment; never, when it is old."""
        ask = "printf '\\033[5n'"
        command = f"stty raw -echo; {ask}; dd bs=4 count=1 2>&- | cat -v; echo A; dd bs=1 count=1 2>&- >&2; "
        visit.run(f"{command}{ask}; exec cat -v", tty=True)
        task_id = server.get("/tasks")[-1]["task_id"]

        def logs() -> str:
            visit.page.wait_for_timeout(20)
            return server.get(f"/logs?id={task_id}")["logs"]

        wait_until(lambda: "A" in logs())
        with Visit(browser, f"http://{server.place}/#task={task_id}") as other:
            other.wait_live().wait_for("#lines", "A")
            visit.page.evaluate("window.shown = stream.task; closeTask()")
            visit.page.evaluate("select(shown)")  # it reads the old question again
            visit.wait_for("#lines", "A")
            other.page.click("#output")
            other.page.keyboard.type("x")
            wait_until(lambda: other.page.wait_for_timeout(20) or logs().count("[0n") == 2)
            other.page.keyboard.type("END")
            wait_until(lambda: "END" in logs())
            assert re.findall(r"\^\[\[0n|A|END", logs()) == ["^[[0n", "A", "^[[0n", "END"]

    def test_command_is_read_as_it_was_run(self, visit: Visit, server: ServerProcess):
        server.run("true a\u202eb\u2066c\u200bd \u200d x\ny \U0001f469\u200d\U0001f527")
        visit.page.locator("#tasks button", has_text="true a").click()
        want = "true a\\u{202e}b\\u{2066}c\\u{200b}d \\u{200d} x ⏎ y \U0001f469\u200d\U0001f527"
        assert visit.text("#tasks li:first-child code") == visit.text("#title") == want


# The layout of the module --------------------------------------------------------------------

SOURCE = SCRIPT.read_text(encoding="utf-8")
BANNER = re.compile(r"^# (\d+)\. ([^\n]+?) -+$", re.MULTILINE)
FIRST_PURE, LAST_PURE = 5, 11
IO_NAMES = {*"asyncio fcntl open os print resource select socket subprocess".split()}
IO_NAMES |= {*"termios time traceback Log".split()}


@functools.cache
def parse_module() -> ast.Module:
    return ast.parse(SOURCE)


def name_uses() -> list[tuple[str, int]]:
    """Return the names that are read outside annotations, which are never evaluated."""
    tree = ast.parse(SOURCE)
    for node in ast.walk(tree):
        vars(node).update(dict.fromkeys({"annotation", "returns"} & set(node._fields)))
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    return [(node.id, node.lineno) for node in names if isinstance(node.ctx, ast.Load)]


def code_lines() -> set[int]:
    """Return the numbers of the lines that hold code: no comment, docstring or blank."""
    quiet = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    lines: set[int] = set()
    with SCRIPT.open("rb") as file:
        for token in tokenize.tokenize(file.readline):
            if token.type not in (*quiet, tokenize.ENCODING, tokenize.ENDMARKER):
                lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(parse_module()):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            lines -= set(range(node.lineno, (node.end_lineno or 0) + 1))
    return lines


def nesting(node: ast.AST) -> int:
    """Return how deep blocks stand inside each other below a node."""
    blocks = (ast.If, ast.For, ast.While, ast.With, ast.Try, ast.AsyncFor, ast.AsyncWith)
    deepest = 0
    for name, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            # `elif` reads as one level with its `if`.
            is_elif = name == "orelse" and isinstance(node, ast.If) and isinstance(child, ast.If)
            if isinstance(child, ast.AST):
                own = isinstance(child, blocks) and not is_elif
                deepest = max(deepest, own + nesting(child))
    return deepest


class TestLayout:
    """The rules of the design that a program can check."""

    def test_map_equals_banners(self):
        assert sc.__doc__ is not None
        listed = re.findall(r"^    (\d+)\. (.+)$", sc.__doc__, re.MULTILINE)
        titles = [(number, line.partition(": ")[0]) for number, line in listed]
        assert titles == BANNER.findall(SOURCE)
        assert [line for _, line in listed if not line.partition(": ")[2]] == []  # what is there
        assert [int(number) for number, _ in listed] == list(range(1, len(listed) + 1))

    def test_guided_tour_has_true_line_counts(self):
        """What to read before running it as root: 1,200 lines at most."""
        starts = [SOURCE[: match.start()].count("\n") for match in BANNER.finditer(SOURCE)]
        sizes = {f"section {i}": b - a for i, (a, b) in enumerate(zip(starts, starts[1:]), 1)}
        for node in parse_module().body:
            for one in [node, *getattr(node, "body", [])]:
                if isinstance(one, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                    name = one.name if one is node else f"{node.name}.{one.name}"
                    sizes[name] = one.end_lineno - one.lineno + 1
        tour = re.findall(r"^    +(\d+)  (section \d+|[A-Za-z_.]+) ", sc.__doc__, re.MULTILINE)
        counts = {name: int(count) for count, name in tour}
        assert len(counts) >= 10 and sum(counts.values()) <= 1200
        wrong = {
            name: sizes.get(name)
            for name, count in counts.items()
            if name not in sizes or abs(sizes[name] - count) > 2 + count // 20
        }
        assert not wrong, f"the module's docstring has other counts than {wrong}"

    def test_large_state_is_not_shown(self):
        """asyncio formats what a callback was called with when it raises: repr() must be short."""
        for node in ast.walk(parse_module()):
            for one in getattr(node, "decorator_list", []):
                text = ast.unparse(one)
                if text.startswith("dataclass") and "frozen=True" not in text:
                    assert "repr=False" in text, node.name

    def test_no_name_is_used_above_its_definition(self):
        defined: dict[str, int] = {}
        for node in parse_module().body:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                defined.setdefault(node.name, node.lineno)
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                for name in (t.id for t in targets if isinstance(t, ast.Name)):
                    defined.setdefault(name, node.lineno)
        uses = [(name, line, defined[name]) for name, line in name_uses() if name in defined]
        assert [use for use in uses if use[1] < use[2]] == []
        assert len(defined) > 100  # the tree was read

    def test_pure_sections_name_no_io_module(self):
        banners = {int(match.group(1)): match.start() for match in BANNER.finditer(SOURCE)}
        begin, end = (SOURCE.count("\n", 0, banners[n]) for n in (FIRST_PURE, LAST_PURE + 1))
        named = [one for one in name_uses() if one[0] in IO_NAMES and begin < one[1] <= end]
        assert not named

    def test_functions_are_short_and_flat(self):
        lines = code_lines()
        kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
        functions = [node for node in ast.walk(parse_module()) if isinstance(node, kinds)]
        spans = {f: range(f.lineno, (f.end_lineno or 0) + 1) for f in functions}
        sizes = {f"{f.name}:{f.lineno}": len(lines & set(span)) for f, span in spans.items()}
        assert {name: size for name, size in sizes.items() if size > 60} == {}
        assert statistics.median(sizes.values()) <= 9
        assert statistics.quantiles(sizes.values(), n=10)[8] <= 30
        classes = [node for node in parse_module().body if isinstance(node, ast.ClassDef)]
        assert [c.name for c in classes if (c.end_lineno or 0) - c.lineno >= 250] == []
        deep = [f"{f.name}:{f.lineno}" for f in functions if nesting(f) > 3]
        assert deep == []

    def test_public_names_that_do_not_explain_themselves_have_a_docstring(self):
        """A class does not, nor a function that raises or has more than six lines of code. What
        is shorter is read as fast as a sentence; a sentence of the signature's own words is none.
        """
        module = parse_module()
        owners = [module, *(node for node in module.body if isinstance(node, ast.ClassDef))]
        kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
        named = [node for owner in owners for node in owner.body if isinstance(node, kinds)]
        public = [node for node in named if node.name[0] != "_"]
        lines = code_lines()
        needy = [
            node
            for node in public
            if isinstance(node, ast.ClassDef)
            or any(isinstance(one, ast.Raise) for one in ast.walk(node))
            or len(lines & set(range(node.body[0].lineno, (node.end_lineno or 0) + 1))) > 6
        ]
        assert len(needy) > 200  # the tree was read
        assert [f"{one.name}:{one.lineno}" for one in needy if not ast.get_docstring(one)] == []
        idle = {*"a an the of is are whether return returns its it in".split()}
        parrots = []
        for node in public:
            said = set(re.findall(r"\w+", (ast.get_docstring(node) or "").lower())) - idle
            signature = SOURCE.splitlines()[node.lineno - 1].lower()
            if said and said <= set(re.findall(r"[a-z0-9]+", signature)):
                parrots.append(f"{node.name}:{node.lineno}")
        assert parrots == []

    def test_comments_are_neither_rare_nor_rank(self):
        page = sc.CSS + sc.HTML + sc.JS  # no Python: its lines would count as code without a word
        words = len(SOURCE.splitlines()) - len(code_lines())
        words -= SOURCE.count("\n\n") - page.count("\n\n")
        assert 0.15 <= words / (len(code_lines()) - page.count("\n")) <= 0.5

    def test_top_level_holds_what_the_card_says(self):
        if not (HERE / ".git").exists():
            pytest.skip("not a git checkout")
        listed = subprocess.run(["git", "ls-files"], cwd=HERE, stdout=-1, check=True).stdout
        top = {line.split("/")[0] for line in listed.decode().splitlines()}
        visible = {name for name in top if not name.startswith(".")}
        card = {"servercontrol.py", "test_servercontrol.py", "Makefile", "README.md", "LICENSE"}
        assert visible == card


# Benchmark ----------------------------------------------------------------------------------------
# `python3 test_servercontrol.py bench [NAME ...] [--rounds N] [--quick]` measures every figure of
# the contract beside the same job on the `websockets` and `picows` packages, in turn, on Linux. Each
# sample has a server process of its own; this process is only its client. All is on 127.0.0.1.
#
# Both sides have the same client, children, events and interval; the peers' statistics are made up.

BENCH_OPTIONS = ("--port=0", "--ws-port=0", "--no-discovery", "--loop=asyncio", "--log-format=json")
BENCH_PATIENCE_SECONDS = 30.0  # nothing here takes this long on a healthy server
BENCH_QUIET_SECONDS = 0.3  # this long without a byte: every viewer has got everything sent so far
BENCH_PING_BYTES = 64  # viewers' byte counts may differ by a ping; one lost event is more than this
BENCH_FAN_TASKS = 50  # below the server's limit of 64 running tasks
BENCH_END = b'"task_complete"'
BENCH_LINE = "%s: the quick brown fox jumps over the lazy dog, who does not mind at all\n"

# Each line is the time of its own writing; nothing else in an event looks like @digits@.
BENCH_STAMPER = """exec %s -S -c '
import os, time
for _ in range(%d):
    os.write(1, b"@%%d@\\n" %% time.monotonic_ns())
    time.sleep(0.003)'"""

# The shells wait in open(2) until somebody opens the gate for writing, then all run at once.
BENCH_GATED = ': <%s; i=0; while [ $i -lt %d ]; do echo "%s"; i=$((i+1)); done'
BENCH_STATS = {
    **dict.fromkeys(("cpu", "cpus", "swap_used", "swap_total", "net_recv", "net_sent"), 1234),
    **dict.fromkeys(("ram_used", "ram_total", "disk_used", "disk_total", "uptime"), 123456),
    "hostname": "localhost", "load_avg": [0.12, 0.34, 0.56],
}  # fmt: skip


class BenchLoad(NamedTuple):
    """How much work one sample is."""

    lines: int = 1000  # stamped lines of a latency sample: the p99 is the tenth worst
    flood_lines: int = (256 << 20) // (len(BENCH_LINE) + 5) + 1  # %s is seven digits
    fan_lines: int = 400  # of each task, half of what a pipe holds: all write at once
    cpu_seconds: int = 10
    idle_seconds: int = 60
    starts: int = 5


BENCH_QUICK = BenchLoad(200, 400_000, 200, 3, 25, 2)


class BenchSample(NamedTuple):
    """What one job measured on one server, in the job's unit."""

    value: float
    p99: float = float("nan")
    fault: str = ""  # what was lost or failed; empty when everything came through


# The peers: what a careful author would write with `websockets`, and with `picows`.
BENCH_PEERS = ("websockets", "picows")


class BenchPeer:
    """Runs commands and broadcasts their output, with the fields our own events have."""

    def __init__(self, broadcast: Callable[[set[Any], str], None]) -> None:
        self.broadcast = broadcast
        self.viewers: set[Any] = set()
        self.tasks: list[asyncio.Task[None]] = []  # referenced, or they could be collected
        self.seq = 0

    def publish(self, kind: str, **fields: Any) -> None:
        self.seq += 1
        event = {"type": kind, "timestamp": int(time.time() * 1000), "seq": self.seq, **fields}
        self.broadcast(self.viewers, json.dumps(event))

    def answer(self, connection: Any, request: Any) -> Any:
        """Start the command of `GET /exec?COMMAND`; let every other request upgrade."""
        path, _, command = request.path.partition("?")
        if path != "/exec":
            return None
        run = self.run(str(len(self.tasks) + 1), urllib.parse.unquote(command))
        self.tasks.append(asyncio.ensure_future(run))
        return connection.respond(200, "started\n")

    async def view(self, connection: Any) -> None:
        self.viewers.add(connection)
        try:
            await connection.wait_closed()
        finally:
            self.viewers.discard(connection)

    async def run(self, task_id: str, command: str) -> None:
        self.publish("task_start", task_id=task_id, command=command)
        child = await asyncio.create_subprocess_shell(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        offset = 0
        while not child.stdout.at_eof():
            data = await child.stdout.read(65536)
            output = decoder.decode(data, final=not data)
            if output:
                self.publish("task_output", task_id=task_id, output=output, offset=offset)
                offset += len(output.encode())
            # broadcast() never waits: without this, a flood would pile up in the server's memory.
            for viewer in [viewer for viewer in self.viewers if viewer.paused]:
                await viewer.drain()
        code = await child.wait()
        self.publish("task_complete", task_id=task_id, exit_code=code, output_bytes=offset)


async def bench_serve_websockets(stats_seconds: float, compresses: str) -> None:
    """compresses: "no"; "yes", as the package does it unless told otherwise; "each" by itself."""
    from websockets.asyncio.server import broadcast, serve
    from websockets.extensions.permessage_deflate import ServerPerMessageDeflateFactory

    peer = BenchPeer(broadcast)
    options: dict[str, Any] = {"process_request": peer.answer}
    options["compression"] = "deflate" if compresses == "yes" else None
    if compresses == "each":
        factory = ServerPerMessageDeflateFactory(server_no_context_takeover=True)
        options["extensions"] = [factory]
    async with serve(peer.view, "127.0.0.1", 0, **options) as server:
        await bench_tell(peer, server.sockets, stats_seconds)


async def bench_serve_picows(stats_seconds: float, _compresses: str) -> None:
    import picows

    def send(viewers: set[Any], text: str) -> None:
        data = text.encode()
        for viewer in viewers:
            viewer.transport.send(picows.WSMsgType.TEXT, data)

    peer = BenchPeer(send)

    class Viewer(picows.WSListener):  # type: ignore[misc]
        paused = False

        def on_ws_connected(self, transport: Any) -> None:
            self.transport, self.has_drained = transport, asyncio.Event()
            peer.viewers.add(self)

        def on_ws_disconnected(self, transport: Any) -> None:
            peer.viewers.discard(self)

        def pause_writing(self) -> None:
            self.paused = True
            self.has_drained.clear()

        def resume_writing(self) -> None:
            self.paused = False
            self.has_drained.set()

        async def drain(self) -> None:
            await self.has_drained.wait()

    def find(request: Any) -> Any:
        place = mock.Mock(path=request.path.decode())
        if peer.answer(mock.Mock(), place) is None:
            return Viewer()
        answer = picows.WSUpgradeResponse.create_ok_response(b"started\n")
        return picows.WSUpgradeResponseWithListener(answer, None)

    server = await picows.ws_create_server(find, "127.0.0.1", 0)
    await bench_tell(peer, server.sockets, stats_seconds)


async def bench_tell(peer: BenchPeer, sockets: Any, stats_seconds: float) -> None:
    """Say where the peer listens, and publish statistics until killed."""
    gc.collect()
    gc.freeze()  # what the test module imported must not burden the peer's collector
    place = f"127.0.0.1:{next(iter(sockets)).getsockname()[1]}"
    ready = {"event": "listening", "http": place, "ws": place, "pid": os.getpid(), "discovery": ""}
    print(json.dumps(ready), file=sys.stderr, flush=True)
    while True:
        peer.publish("stats_update", **BENCH_STATS)
        await asyncio.sleep(stats_seconds)


# The servers, seen from outside.


class BenchServer(ServerProcess):
    """Our server or a peer, in a process group of its own, which never outlives the block."""

    def __init__(self, who: str, folder: Path, stats_seconds=1, compresses="no"):
        super().__init__(folder, script="-", start_new_session=True)
        self.ours, self.check = who == "ours", False
        command = [__file__, "bench", "--peer", who, str(stats_seconds), compresses]
        if self.ours:
            command = [str(SCRIPT), *BENCH_OPTIONS, f"--interval={stats_seconds}"]
            command += ["--compress=on"] * (compresses != "no")
        self.command = [sys.executable, *command]
        for name in [name for name in self.env if name.startswith("SERVERCONTROL_")]:
            del self.env[name]

    def wait_for_log(self, event: str) -> dict[str, Any]:
        """At once: this may be what is timed."""

        def found() -> list[dict[str, Any]]:
            assert self.process.poll() is None, "".join(["no server: ", *self.stderr[-1:]])
            return self.log(event)

        return wait_until(found, pause=0.0002)[0]

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # lets our server end its tasks, each of which has its own group
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def start(self, command: str, **_: Any) -> str:
        if self.ours:
            return super().start(command)
        return str(self.request("GET", "/exec?" + urllib.parse.quote(command)).status)


def bench_cpu_seconds(pid: int) -> float:
    """CPU time of a whole process, to the nanosecond: /proc/PID/stat knows only 10 ms."""
    return time.clock_gettime(~pid << 3 | 2)  # as clock_getcpuclockid(3) makes the id


# The client.


class BenchSwarm(contextlib.ExitStack):
    """Viewers on raw sockets, read by one epoll loop. It counts bytes and decodes nothing."""

    def __init__(self, server: Any, count: int, path: str = "/", deflates: bool = False) -> None:
        super().__init__()
        self.buffer = memoryview(bytearray(1 << 20))  # each read starts at its beginning
        self.poll = self.enter_context(select.epoll())
        # Offered as by Chromium; events that come with the handshake's answer are dropped.
        offer = "permessage-deflate; client_max_window_bits" if deflates else ""
        peers = [self.enter_context(RawPeer(server, path, offer=offer)) for _ in range(count)]
        assert (b"permessage-deflate" in peers[0].head) is deflates, "it does not compress"
        self.sockets = {peer.socket.fileno(): peer.socket for peer in peers}
        for fd in self.sockets:
            self.poll.register(fd, select.EPOLLIN)
        self.skip(BENCH_PATIENCE_SECONDS, BENCH_QUIET_SECONDS)  # all stand before the same event

    def reads(self, seconds=BENCH_PATIENCE_SECONDS, quiet=BENCH_PATIENCE_SECONDS) -> Any:
        """Yield (viewer, bytes read, monotonic ns) until the time is over or silence falls."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            ready = self.poll.poll(quiet)
            if not ready:
                return
            for viewer, _ in ready:
                size = self.sockets[viewer].recv_into(self.buffer)
                if not size:
                    raise AssertionError("a viewer was disconnected")
                if size == 2 and self.buffer[0] == 0x89:  # a ping
                    self.sockets[viewer].send(b"\x8a\x80mask")
                yield viewer, size, time.monotonic_ns()

    def skip(self, seconds: float, quiet: float) -> None:
        for _ in self.reads(seconds, quiet):
            pass


def bench_events(stream: Any) -> Iterator[dict[str, Any]]:
    """Decode whole frames; control frames and a cut last frame are skipped."""
    buffer = bytearray(stream)
    for first, payload in iter(lambda: take_frame(buffer), None):
        if first == 0x81:
            yield json.loads(payload)


def bench_find_loss(stream: Any, text: bytes, tasks: int) -> str:
    """Return what is missing when each of `tasks` wrote `text`; empty when nothing is."""
    got: dict[str, int] = {}
    complete = 0
    for event in bench_events(stream):
        if event["type"] == "gap":
            return f"gap of {event['to'] - event['from'] + 1} events"
        if event["type"] == "task_output":
            task_id, data = event["task_id"], event["output"].encode()
            begin = got.get(task_id, 0)
            if event["offset"] != begin or text[begin : begin + len(data)] != data:
                return f"task {task_id} is wrong after byte {begin}"
            got[task_id] = begin + len(data)
        complete += event["type"] == "task_complete" and event["output_bytes"] == len(text)
    missing = tasks * len(text) - sum(got.values())
    return "" if complete == tasks and not missing else f"{missing} bytes missing"


# The jobs: each takes one sample on one server.


def bench_latency(viewers: int, who: str, folder: Path, load: BenchLoad) -> BenchSample:
    """Milliseconds from the child's write to the read of the last of the viewers, line by line."""
    record: list[tuple[int, int, bytes]] = []
    left = viewers
    with BenchServer(who, folder) as server, BenchSwarm(server, viewers) as swarm:
        server.start(BENCH_STAMPER % (shlex.quote(sys.executable), load.lines))
        for viewer, size, now in swarm.reads():
            data = bytes(swarm.buffer[:size])
            record.append((viewer, now, data))
            left -= BENCH_END in data
            if not left:
                break
    delays = bench_find_delays(record, viewers)
    lost = load.lines - len(delays)
    median, p99 = statistics.median(delays), delays[len(delays) * 99 // 100]
    return BenchSample(median, p99, f"{lost} lines missing" if lost else "")


def bench_find_delays(record: list[tuple[int, int, bytes]], viewers: int) -> list[float]:
    """Return the sorted delays, in ms, of the lines that every viewer has read."""
    times: dict[int, list[int]] = {}
    rest: dict[int, bytes] = {}  # by viewer: what follows its last whole line
    for viewer, now, data in record:
        data = rest.get(viewer, b"") + data
        end = 0
        for match in re.finditer(rb"@(\d+)@", data):
            times.setdefault(int(match.group(1)), []).append(now)
            end = match.end()
        rest[viewer] = data[end:]
    return sorted((max(r) - stamp) / 1e6 for stamp, r in times.items() if len(r) == viewers)


def bench_memory(who: str, folder: Path, _load: BenchLoad) -> BenchSample:
    """KiB of resident memory for each of 2,000 viewers that only listen."""
    with BenchServer(who, folder) as server, BenchSwarm(server, 1) as first:
        first.skip(1.5, 1.5)  # past the one-time costs of the first broadcasts
        before = server.resident_kib()
        with BenchSwarm(server, 2000) as swarm:
            swarm.skip(1.5, 1.5)
            return BenchSample((server.resident_kib() - before) / 2000)


def bench_flood(who: str, folder: Path, load: BenchLoad) -> BenchSample:
    """MB/s of output at one viewer that reads as fast as it can."""
    path = folder / "flood"
    if not path.exists():
        path.write_text("".join(BENCH_LINE % i for i in range(10**6, 10**6 + load.flood_lines)))
    text = path.read_bytes()
    # Filled, not empty: the client must not pay for the kernel's first touch of each page.
    room = memoryview(bytearray(b"\xff") * (len(text) * 5 // 4))
    size = 0
    with BenchServer(who, folder) as server, BenchSwarm(server, 1) as swarm:
        link = next(iter(swarm.sockets.values()))
        begin = time.monotonic()
        server.start("cat " + shlex.quote(str(path)))
        while BENCH_END not in bytes(room[max(0, size - 2000) : size]):
            count = link.recv_into(room[size : size + (1 << 20)])
            size += count
            if not count or time.monotonic() > begin + BENCH_PATIENCE_SECONDS:
                raise AssertionError(f"the flood stopped after {size} bytes")
        seconds = time.monotonic() - begin
    return BenchSample(len(text) / seconds / 1e6, fault=bench_find_loss(room[:size], text, 1))


def bench_fanout(who: str, folder: Path, load: BenchLoad) -> BenchSample:
    """Million lines/s over all of 1,000 viewers until each has everything."""
    gate = folder / "gate"
    if not gate.exists():
        os.mkfifo(gate)
    echo = BENCH_LINE.strip() % "$i"
    command = BENCH_GATED % (shlex.quote(str(gate)), load.fan_lines, echo)
    text = "".join(BENCH_LINE % i for i in range(load.fan_lines)).encode()
    with BenchServer(who, folder) as server, BenchSwarm(server, 1000) as swarm:
        for _ in range(BENCH_FAN_TASKS):
            server.start(command)
        swarm.skip(BENCH_PATIENCE_SECONDS, BENCH_QUIET_SECONDS)
        begin = time.monotonic_ns()
        opened = os.open(gate, os.O_RDWR)  # RDWR: does not wait for a reader
        try:
            end, stream, fault = bench_follow(swarm, BENCH_FAN_TASKS)
        finally:
            os.close(opened)
    fault = fault or bench_find_loss(stream, text, BENCH_FAN_TASKS)
    lines = load.fan_lines * BENCH_FAN_TASKS * len(swarm.sockets)
    return BenchSample(lines / (end - begin) * 1e3, fault=fault)


def bench_follow(swarm: BenchSwarm, tasks: int) -> tuple[int, bytes, str]:
    """Read until every viewer is as far as the first one is when the last of the tasks ends; return
    the time of that, the first viewer's bytes, and what was lost. All get the same, so for the
    others the number of their bytes tells."""
    counts = dict.fromkeys(swarm.sockets, 0)
    first = next(iter(counts))
    stream = bytearray()
    goal = complete = behind = end = 0
    for viewer, size, now in swarm.reads():
        counts[viewer] += size
        if goal:
            behind -= counts[viewer] - size < goal <= counts[viewer]
        elif viewer == first:
            stream += swarm.buffer[:size]
            complete += stream.count(BENCH_END, max(0, len(stream) - size - len(BENCH_END) + 1))
            if complete >= tasks:
                goal = len(stream)
                behind = sum(count < goal for count in counts.values())
        if goal and not behind:
            end = now
            break
    if not end:
        raise AssertionError(f"{complete} of {tasks} tasks complete, {behind} viewers behind")
    for viewer, size, _ in swarm.reads(quiet=BENCH_QUIET_SECONDS):  # whatever is left
        counts[viewer] += size
    differ = sum(abs(count - counts[first]) > BENCH_PING_BYTES for count in counts.values())
    return end, bytes(stream), f"{differ} viewers got something else" if differ else ""


def bench_cpu(compresses: str, who: str, folder: Path, load: BenchLoad) -> BenchSample:
    """CPU milliseconds of the server each second, with 1,000 viewers and one event a second; and,
    instead of a p99, the bytes that one of them read each second."""
    does = compresses != "no"
    text = "line $i"
    if does:  # 1 KiB of text, as a build writes it
        text = "$(seq -s ' ' -f 'cc -O2 -c file%g.c -o build/file%g.o;' $((i*7)) $((i*7+21)))"
    command = f'for i in $(seq {load.cpu_seconds}); do echo "{text}"; sleep 1; done'
    with BenchServer(who, folder, stats_seconds=3600, compresses=compresses) as server:
        with BenchSwarm(server, 1000, "/", does) as swarm:
            server.start(command)
            before = bench_cpu_seconds(server.pid)
            read = sum(size for _, size, _ in swarm.reads(load.cpu_seconds, load.cpu_seconds))
            used = bench_cpu_seconds(server.pid) - before
    return BenchSample(used / load.cpu_seconds * 1e3, read / 1000 / load.cpu_seconds)


def bench_wire(who: str, folder: Path, load: BenchLoad) -> BenchSample:
    """Bytes that each of 1,000 compressing viewers reads a second; no context takeover."""
    return BenchSample(bench_cpu("each", who, folder, load).p99)


def bench_idle(who: str, folder: Path, load: BenchLoad) -> BenchSample:
    """CPU milliseconds each second with 5,000 viewers that only answer pings."""
    with BenchServer(who, folder, stats_seconds=3600) as server, BenchSwarm(server, 5000) as swarm:
        before = bench_cpu_seconds(server.pid)
        swarm.skip(load.idle_seconds, load.idle_seconds)
        return BenchSample((bench_cpu_seconds(server.pid) - before) / load.idle_seconds * 1e3)


def bench_filtered(who: str, folder: Path, load: BenchLoad) -> BenchSample:
    """Bytes a second to a viewer of the statistics while 64 tasks flood; for the p99 the ms that
    the latest of them took."""
    delays, total = [0.0], 0
    with BenchServer(who, folder) as server, BenchSwarm(server, 1, "/?only=stats_update") as swarm:
        for _ in range(64):
            server.start("exec yes 'all work and no play'")
        swarm.skip(2, 2)
        for _, size, _ in swarm.reads(load.cpu_seconds):
            total += size
            now = time.time() * 1e3
            events = bench_events(swarm.buffer[:size])
            delays += [now - event["timestamp"] for event in events]
    return BenchSample(total / load.cpu_seconds, max(delays))


def bench_startup(who: str, folder: Path, load: BenchLoad) -> BenchSample:
    """Milliseconds from spawn to the first answer; the peer is an interpreter with asyncio."""
    taken: list[float] = []
    for _ in range(load.starts):
        begin = time.monotonic()
        if who == "ours":
            with BenchServer(who, folder) as server:
                server.request("GET", "/health")
                taken.append((time.monotonic() - begin) * 1e3)
        else:
            subprocess.run([sys.executable, "-c", "import asyncio"], check=True)
            taken.append((time.monotonic() - begin) * 1e3)
    return BenchSample(statistics.median(taken))


def bench_true(who: str, folder: Path, load: BenchLoad) -> BenchSample:
    """Milliseconds that `exec -- true` takes; the peer is the server's start to first answer."""
    if who != "ours":
        return bench_startup("ours", folder, load)
    taken: list[float] = []
    with BenchServer(who, folder) as server:
        for _ in range(load.starts):
            begin = time.monotonic()
            finished = run_client("exec", server.place, "--", "true")
            taken.append((time.monotonic() - begin) * 1e3)
            if finished.returncode:
                raise AssertionError(finished.stderr.decode())
    return BenchSample(statistics.median(taken))


@functools.lru_cache(maxsize=1)
def bench_fleet(count: int) -> list[BenchServer]:
    """Start servers of ours that stay until this process ends; 200 need some 6 GB."""
    stack = contextlib.ExitStack()
    atexit.register(stack.close)
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    return [stack.enter_context(BenchServer("ours", folder / str(n))) for n in range(count)]


# What `monitor` does at the least: connect, and parse every event.
BENCH_MONITOR = """
import asyncio, json, sys
from websockets.asyncio.client import connect
async def follow(url):
    async with connect(url, compression=None, max_size=None) as websocket:
        async for message in websocket:
            json.loads(message)
async def main():
    await asyncio.gather(*map(follow, sys.argv[1:]))
asyncio.run(main())
"""


def bench_monitor(who: str, folder: Path, load: BenchLoad) -> BenchSample:
    """Percent of a core to watch 200 servers; the peer parses their events and does no more."""
    fleet = bench_fleet(20 if load is BENCH_QUICK else 200)
    hosts = write_hosts(folder, *(f"s{n} {one.place}" for n, one in enumerate(fleet)))
    command = [sys.executable, str(SCRIPT), "monitor", "--all", "--json"]
    if who != "ours":
        command[1:] = ["-c", BENCH_MONITOR, *(f"ws://127.0.0.1:{one.ws_port}" for one in fleet)]
    env = {**os.environ, "SERVERCONTROL_HOSTS": hosts}
    with subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL) as process:
        try:
            time.sleep(8)  # until all are connected
            before = bench_cpu_seconds(process.pid)
            time.sleep(load.cpu_seconds)
            used = bench_cpu_seconds(process.pid) - before
            if process.poll() is not None:
                raise AssertionError("it ended")
        finally:
            process.terminate()
    return BenchSample(100 * used / load.cpu_seconds)


# The run.


class BenchJob(NamedTuple):
    """A figure of the contract; the target is words and code at once, see bench_meets."""

    take: Callable[[str, Path, BenchLoad], BenchSample]
    unit: str
    target: str
    peers: tuple[str, ...] = BENCH_PEERS


BENCH_JOBS = {
    "latency1": BenchJob(functools.partial(bench_latency, 1), "ms", "picows <= 0.95, p99 < 1"),
    "latency100": BenchJob(functools.partial(bench_latency, 100), "ms", "picows <= 1.0, p99 < 5"),
    "latency1000": BenchJob(functools.partial(bench_latency, 1000), "ms", "picows <= 1.1"),
    "memory": BenchJob(bench_memory, "KiB/viewer", "ours <= 7"),
    "flood": BenchJob(bench_flood, "MB/s", "least >= 1.8"),
    "fanout": BenchJob(bench_fanout, "M lines/s", "least >= 1.5"),
    "cpu": BenchJob(functools.partial(bench_cpu, "no"), "CPU ms/s", "websockets <= 1.0"),
    "idle": BenchJob(bench_idle, "CPU ms/s", "ours <= 10"),
    "deflate": BenchJob(
        functools.partial(bench_cpu, "yes"), "CPU ms/s", "websockets <= 0.5", ("websockets",)
    ),
    "wire": BenchJob(bench_wire, "bytes/s", "websockets <= 1.0", ("websockets",)),
    "filtered": BenchJob(bench_filtered, "bytes/s", "ours < 1000, p99 < 50", ()),
    "startup": BenchJob(bench_startup, "ms", "peer <= 2.3", ("peer",)),
    "true": BenchJob(bench_true, "ms", "peer <= 1.3", ("peer",)),
    "monitor200": BenchJob(bench_monitor, "% of a core", "ours < 20", ("peer",)),
}


def bench_meets(target: str, figures: dict[str, float]) -> bool:
    """Check a target such as "picows <= 1.1, p99 < 1". What is not a number meets none."""
    compare = {"<": operator.lt, "<=": operator.le, ">=": operator.ge}
    tests = [clause.split() for clause in target.split(", ")]
    return all(compare[sign](figures[name], float(bound)) for name, sign, bound in tests)


def bench_take(job: BenchJob, who: str, folder: Path, load: BenchLoad) -> BenchSample:
    """Take a sample; a failure becomes one that meets no target and says why."""
    try:
        return job.take(who, folder, load)
    except (AssertionError, OSError, ValueError, LookupError, http.client.HTTPException) as error:
        return BenchSample(float("nan"), fault=f"{type(error).__name__}: {error}")


def bench_median(samples: list[BenchSample]) -> BenchSample:
    """Medians over the rounds; a fault in any of them stays one."""
    good = [sample for sample in samples if not math.isnan(sample.value)] or samples
    return BenchSample(
        statistics.median(sample.value for sample in good),
        statistics.median(sample.p99 for sample in good),
        "; ".join(sample.fault for sample in samples if sample.fault),
    )


def bench_run(name: str, rounds: int, load: BenchLoad) -> bool:
    """Measure one figure, ours and the peers in turn, and print its lines of the table."""
    job = BENCH_JOBS[name]
    taken: dict[str, list[BenchSample]] = {who: [] for who in ("ours", *job.peers)}
    with tempfile.TemporaryDirectory(prefix="servercontrol-bench-") as folder:
        for _ in range(rounds):
            for who, samples in taken.items():
                samples.append(bench_take(job, who, Path(folder), load))
    medians = {who: bench_median(samples) for who, samples in taken.items()}
    ours = medians["ours"]
    figures = {"ours": ours.value, "p99": ours.p99, "least": math.inf}
    columns = [f"{name:11} {job.unit:10} {ours.value:9.4g} {f'{ours.p99:.3g}':>9}"]
    for peer in job.peers:
        # Of the pairs, not of the medians: what slows the machine for a while slows both of a pair.
        pairs = [one.value / other.value for one, other in zip(taken["ours"], taken[peer])]
        figures[peer] = statistics.median([one for one in pairs if not math.isnan(one)] or pairs)
        figures["least"] = min(figures["least"], figures[peer])
        columns.append(f"{peer} {medians[peer].value:.4g} ({figures[peer]:.2f})")
    met = bench_meets(job.target, figures) and not ours.fault  # nothing may be lost
    verdict = "ok" if met else "MISSED"
    print("  ".join([*columns, job.target, verdict]).replace(" nan", "   -"), flush=True)
    for who, samples in taken.items():
        rounds_text = (f"{one.value:.4g}/{one.p99:.3g} {one.fault}" for one in samples)
        print(f"    {who}:", *(text.replace("/nan", "") for text in rounds_text))
    return met


def bench_main(argv: list[str]) -> int:
    """Run the benchmark. Exit status: 0 all targets met, 1 some missed, 2 cannot be run."""
    parser = argparse.ArgumentParser(prog="bench")
    parser.add_argument("names", nargs="*", metavar="NAME", help=" ".join(BENCH_JOBS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one short round: is it broken?")
    parser.add_argument("--peer", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    for peer in BENCH_PEERS:
        if importlib.util.find_spec(peer) is None:
            parser.error(f"a peer is missing: pip install {peer}")
    if options.peer:
        who, seconds, compresses = options.peer
        serve = {"websockets": bench_serve_websockets, "picows": bench_serve_picows}[who]
        asyncio.run(serve(float(seconds), compresses))
    if not set(options.names) <= set(BENCH_JOBS) or options.rounds < 1:
        parser.error("names are " + " ".join(BENCH_JOBS) + "; --rounds is at least 1")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the servers are stopped too
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # 2,000 viewers; servers inherit it
    gc.disable()  # a collection in the client would be read as the server's latency
    load, rounds = (BENCH_QUICK, 1) if options.quick else (BenchLoad(), options.rounds)
    peers = " and ".join(f"{one} {importlib.metadata.version(one)}" for one in BENCH_PEERS)
    machine = f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} before the run"
    print(f"Python {platform.python_version()}, {machine}; the peers are {peers}")
    print(f"medians of {rounds}: ours, its p99, each peer and the ratio to it, the target")
    results = [bench_run(name, rounds, load) for name in options.names or BENCH_JOBS]
    return 0 if all(results) else 1


# Soak run -----------------------------------------------------------------------------------------
# `python3 test_servercontrol.py soak [NAME ...] [--scale X]`: what people rely on, for minutes and
# by the thousand; TestSoak does the same in seconds. A job raises AssertionError for anything that
# was lost, doubled or left behind, and returns what it measured: times are told, never judged.

# These two make a program, which is run as a task; the first tells here what it has written.


def soak_blocks(seed: int, size: int) -> Iterator[bytes]:
    """Give random characters of 1 to 4 bytes, seldom a newline."""
    chance = random.Random(seed)
    letters = "ab \u00e9\u0416\u20ac\u4e2d\U0001f600\x1b"
    pool = ["".join(chance.choices(letters, k=3000)).encode("utf-8") for _ in range(64)]
    while size:
        block = chance.choice(pool) + b"\n" * (chance.random() < 0.01)
        block = block if len(block) <= size else b"." * size
        size -= len(block)
        yield block


def soak_write(seed: int, size: int, seconds: float) -> None:
    """Write them, in writes that cut characters."""
    chance, begin, done, data = random.Random(0), time.monotonic(), 0, b""
    for block in [*soak_blocks(seed, size), b""]:
        data += block
        while len(data) >= 50000 or (data and not block):
            piece = data[: chance.randrange(1, 50000)]
            os.write(1, piece)
            data = data[len(piece) :]
            done += len(piece)
            time.sleep(max(0, begin + done / size * seconds - time.monotonic()))


def soak_start(server: ServerProcess, seed: int, size: int, seconds: float) -> str:
    code = "from __future__ import annotations\nimport os, random, time\n"
    code += "".join(map(inspect.getsource, (soak_blocks, soak_write)))
    code += f"soak_write({seed}, {size}, {seconds})"
    return server.start(f"exec {shlex.quote(sys.executable)} -c {shlex.quote(code)}")


class SoakViewer:
    """One who watches one task through connections that break, and keeps what it wrote."""

    def __init__(self, server: ServerProcess) -> None:
        info = server.get("/info")
        self.server, self.boot, self.seq = server, info["boot_id"], info["seq"]
        self.task_id, self.data, self.is_done = "", bytearray(), False
        self.gaps = self.connections = 0
        # What it asks for, and whether output may be missing, since a gap said so.
        self.choice, self.has_missed = "", False

    def choose(self, task_id: str, kind: int) -> None:
        """Hear everything, or no other task's output, or nothing but this task."""
        self.task_id = task_id
        only = f"&task={task_id}&only=task_output,task_complete"
        self.choice = ("", f"&task={task_id}", only)[kind % 3]

    def take(self, event: dict[str, Any]) -> None:
        first = event["from"] if event["type"] == "gap" else event["seq"]
        is_next = first > self.seq if self.choice else first == self.seq + 1
        assert is_next, "an event, or what a gap names, is missing or came twice"
        if event["type"] == "gap":
            self.gaps += 1
            self.seq = event["to"]
            self.has_missed = True
            return
        self.seq = event["seq"]
        is_mine = event.get("task_id") == self.task_id
        is_output = event["type"] == "task_output"
        is_wanted = is_mine or not is_output
        if "only" in self.choice:
            is_wanted = is_output and is_mine or event["type"] == "task_complete"
        assert is_wanted or not self.choice, "this was not asked for"
        if is_mine and is_output:
            self.fill(event["offset"])
            self.data += event["output"].encode("utf-8")
        elif is_mine and event["type"] == "task_complete":
            self.fill(event["output_bytes"])
            self.is_done = True

    def fill(self, end: int) -> None:
        """Fetch what a gap has left out."""
        if len(self.data) < end:
            assert self.has_missed, "output is missing, and no gap was told"
            path = f"/logs?id={self.task_id}&offset={len(self.data)}"
            answer = self.server.get(path)
            assert answer["offset"] == len(self.data), "more is missing than /logs has"
            self.data += answer["logs"].encode("utf-8")[: end - len(self.data)]
        assert len(self.data) == end, "an output came twice"
        self.has_missed = False

    def watch(self, seconds: float, pause: Callable[[], float] = lambda: 0.0) -> None:
        """Connect, read for a while with pauses, and break the connection in its middle."""
        path = f"/?since={self.seq}&boot={self.boot}{self.choice}"
        with RawPeer(self.server, path, offer=TAKEN if self.connections % 2 else "") as peer:
            self.connections += 1
            end = time.monotonic() + seconds
            peer.socket.settimeout(0.05)
            while not self.is_done and time.monotonic() < end:
                time.sleep(pause())
                try:
                    if not peer.read_some(1 << 18):
                        return  # it stalled for too long; it may come again
                except socket.timeout:
                    continue
                except ConnectionResetError:
                    return
                for first, payload in iter(lambda: take_frame(peer.buffer), None):
                    if first in (0x81, 0xC1):
                        self.take(json.loads(inflate_text(first, payload)))
                    elif first == 0x89:
                        peer.send(make_frame(0x8A, payload))
            peer.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def soak_cuts(server: ServerProcess, scale: float) -> str:
    """A connection that is cut again and again while a task writes 100 MB."""
    size, cuts, chance = int(100e6 * scale), int(1000 * scale), random.Random(1)
    seconds = 0.1 * cuts
    viewer = SoakViewer(server)
    task_id = soak_start(server, 1, size, seconds)
    while not viewer.is_done:
        viewer.choose(task_id, chance.randrange(3))
        viewer.watch(chance.uniform(0, 1.4 * seconds / cuts))
    assert bytes(viewer.data) == b"".join(soak_blocks(1, size))
    assert viewer.connections >= cuts / 10, f"only {viewer.connections} connections"
    return f"{size / 1e6:.0f} MB through {viewer.connections} connections, {viewer.gaps} gaps"


def soak_stalls(server: ServerProcess, scale: float) -> str:
    """Viewers that stop reading at random, each for as long as it likes."""
    size, count, seconds = int(30e6 * scale), max(4, int(100 * scale)), 60 * scale
    viewers = [SoakViewer(server) for _ in range(count)]
    task_id = soak_start(server, 2, size, seconds)
    expected = b"".join(soak_blocks(2, size))

    def stall(number: int) -> int:
        viewer, chance = viewers[number], random.Random(number)
        viewer.choose(task_id, number // 3)
        # A third of them hardly ever stall, a third often, a third for long.
        often, long = ((0.001, 0.5), (0.2, 0.1), (0.02, 0.3 * seconds))[number % 3]
        while not viewer.is_done:
            viewer.watch(1e9, lambda: chance.uniform(0, long) if chance.random() < often else 0.0)
        assert bytes(viewer.data) == expected, f"viewer {number}"
        return viewer.gaps

    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        gaps = sum(pool.map(stall, range(count)))
    return f"{size / 1e6:.0f} MB to {count} viewers, {gaps} gaps, all filled in"


@contextlib.contextmanager
def soak_child(work: Callable[[], Any]) -> Iterator[Callable[[], Any]]:
    """Do work in a process of its own, so that it does not disturb what is timed here. Gives what
    waits for its result, which is EOFError where it has failed."""
    context = multiprocessing.get_context("fork")
    results, told = context.Pipe(duplex=False)
    child = context.Process(target=lambda: told.send(work()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about threads: the child uses none
        child.start()
    told.close()
    try:
        yield results.recv
    finally:
        child.kill()
        child.join()


SOAK_EVENT = re.compile(
    rb'\{"type":"(\w+)",(?:"timestamp":\d+,"seq":(\d+)|"from":(\d+),"to":(\d+))'
)


def soak_watch(last_task: str, server: ServerProcess) -> int:
    """Watch everything until a task ends; return the number of gaps. All else must be there."""
    marker, last, gaps = f'"task_id":"{last_task}"'.encode(), 0, 0
    with RawPeer(server) as peer:
        for first, payload in peer.frames():
            if first == 0x89:
                peer.send(make_frame(0x8A, payload))
            match = SOAK_EVENT.match(payload) if first == 0x81 else None
            if match is not None:
                kind, seq, low, high = match.groups()
                assert last in (0, int(low or seq) - 1), f"{last} is followed by {low or seq}"
                last = int(high or seq)
                gaps += kind == b"gap"
                if kind == b"task_complete" and marker in payload[:200]:
                    return gaps
    raise AssertionError("a viewer was closed")


def soak_delays(action: Callable[[], Any], seconds: float, pause: float = 0.02) -> list[float]:
    """Do something again and again for a while; return how many ms it took each time."""
    delays, end = [], time.monotonic() + seconds
    while not delays or time.monotonic() < end:
        begin = time.monotonic()
        action()
        delays.append((time.monotonic() - begin) * 1e3)
        time.sleep(pause)
    return delays


def soak_ping(server: ServerProcess, seconds: float) -> list[float]:
    """Return the ms from a JSON ping to its pong."""
    with RawPeer(server) as peer:

        def ping() -> None:
            peer.say(type="ping")
            while b'"type":"pong"' not in peer.buffer:
                del peer.buffer[:-20]
                assert peer.read_some(1 << 20), "the server has closed"
            del peer.buffer[:]

        return soak_delays(ping, seconds)


def soak_tell(name: str, delays: list[float]) -> str:
    middle, last = statistics.median(delays), sorted(delays)[int(len(delays) * 0.99)]
    return f"{name} median {middle:.1f} ms, p99 {last:.1f} ms"


def soak_load(server: ServerProcess, scale: float) -> str:
    """64 tasks that flood, many viewers, every tenth of which reads nothing."""
    count, seconds = max(10, int(200 * scale)), max(2.0, 60 * scale)
    # The end is a task of its own, whose id is known beforehand: ids rise by one.
    last_task = str(int(server.run("true")["task_id"]) + 65)
    before = server.resident_kib()
    with contextlib.ExitStack() as stack:
        viewers = [server] * (count * 9 // 10)

        def watch() -> int:
            with concurrent.futures.ThreadPoolExecutor(len(viewers)) as pool:
                return sum(pool.map(functools.partial(soak_watch, last_task), viewers))

        honest = stack.enter_context(soak_child(watch))
        for _ in range(count // 10):
            stack.enter_context(RawPeer(server, receive_bytes=4096))
        wait_until(lambda: server.get("/info")["clients"] == count // 10 + len(viewers))
        tasks = [server.start("exec yes 'all work and no play'") for _ in range(64)]
        with soak_child(functools.partial(soak_ping, server, seconds)) as pings:
            delays = soak_delays(lambda: server.get("/health"), seconds)
            ping_delays = pings()
        grown = server.resident_kib() - before
        for task_id in tasks:
            server.request("POST", f"/kill?id={task_id}&signal=KILL")
        assert server.run("true")["task_id"] == last_task
        gaps = honest()
    written = sum(server.task(task_id)["output_bytes"] for task_id in tasks) / 1e6
    # Kept events and their overhead, kept output, and 30 MiB for everything else.
    assert grown < (16 + 64 + 30) * 1024, f"the server has grown by {grown} KiB"
    told = f"{soak_tell('health', delays)}; {soak_tell('ping', ping_delays)}"
    return f"{written:.0f} MB to {count} viewers, {gaps} gaps; {told}; +{grown // 1024} MiB"


def soak_short_tasks(server: ServerProcess, scale: float) -> str:
    """Thousands of short tasks, 50 at a time."""
    count = int(10000 * scale)

    def run(number: int) -> str:
        answer = server.run(f"echo {number} '\u20ac'; exit {number % 256}")
        assert answer["output"] == f"{number} \u20ac\n" and answer["exit_code"] == number % 256
        return answer["task_id"]

    with concurrent.futures.ThreadPoolExecutor(50) as pool:
        assert len(set(pool.map(run, range(300)))) == 300  # warm, and more than are kept
        assert len(server.get("/tasks")) == 200
        descriptors, memory = server.descriptors(), server.resident_kib()
        begin = time.monotonic()
        assert len(set(pool.map(run, range(count)))) == count
        rate = count / (time.monotonic() - begin)
    wait_until(lambda: server.descriptors() <= descriptors and not child_pids(server.pid))
    grown = server.resident_kib() - memory
    # The kept events fill up to their 16 MiB.
    assert grown < (16 + 16) * 1024, f"the server has grown by {grown} KiB"
    return f"{count} tasks, {rate:.0f} a second with the client; {grown:+} KiB"


def soak_siege(server: ServerProcess, scale: float) -> str:
    """Half-open connections, wrong tokens and slow readers, while a token holder asks."""
    count, seconds = int(1000 * scale), max(1.0, 20 * scale)
    token = Path(server.wait_for_log("listening")["token_file"]).read_text().strip()

    def ask() -> None:
        assert server.request("GET", "/info", Authorization=f"Bearer {token}").status == 200

    def besiege() -> None:
        slow = [socket.socket() for _ in range(count // 10)]
        for one in slow:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            one.connect(("127.0.0.1", server.port))
            with contextlib.suppress(OSError):  # the server may have cut it off
                one.sendall(make_request("GET /") * 200)
        while True:
            halves = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(count)]
            wrong = make_request("GET /tasks", "Authorization: Bearer " + "x" * 20)
            for half in halves:
                with contextlib.suppress(OSError):
                    half.sendall(wrong if half.fileno() % 2 else wrong[:30])
            # The server keeps up, or on a busy machine more than MAX_BURST would wait for it.
            answered = next(half for half in halves if half.fileno() % 2)
            with contextlib.suppress(OSError):
                answered.recv(1)

    for _ in range(20):
        ask()
    descriptors, memory = server.descriptors(), server.resident_kib()
    with soak_child(besiege):
        delays = soak_delays(ask, seconds, 0.01)
    wait_until(lambda: server.descriptors() <= descriptors)
    grown = server.resident_kib() - memory
    assert grown < 16 * 1024, f"the server has grown by {grown} KiB"
    return f"{len(delays)} requests of a token holder: {soak_tell('', delays)}; {grown:+} KiB"


# With what each job needs of its server besides.
SOAK_JOBS: dict[str, tuple[Any, ...]] = {
    "cuts": (soak_cuts, "--compress=on"),
    # So that /logs has what the events no longer have.
    "stalls": (soak_stalls, "--compress=on", "--keep-output=64MiB"),
    "load": (soak_load,), "short-tasks": (soak_short_tasks,),
    "siege": (soak_siege, "--require-token", "--audit-log=none"),
}  # fmt: skip


def soak_run(name: str, scale: float, *options: str) -> str:
    with tempfile.TemporaryDirectory(prefix="servercontrol-soak-") as folder:
        work, *own = SOAK_JOBS[name]
        with ServerProcess(Path(folder), "--cpu-alert=100", *own, *options) as server:
            return str(work(server, scale))


def soak_main(argv: list[str]) -> int:
    """Run all jobs, or some. Exit status: 0 all went well, 1 something did not."""
    parser = argparse.ArgumentParser(prog="soak")
    parser.add_argument("names", nargs="*", metavar="NAME", help=" ".join(SOAK_JOBS))
    parser.add_argument("--scale", type=float, default=1.0, help="1 is minutes")
    options = parser.parse_args(argv)
    if not set(options.names) <= set(SOAK_JOBS) or options.scale <= 0:
        parser.error("names are " + " ".join(SOAK_JOBS))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the servers are stopped too
    failed = 0
    for name in options.names or SOAK_JOBS:
        try:
            told = soak_run(name, options.scale)
        except (AssertionError, EOFError, OSError, ValueError) as error:
            told, failed = f"FAILED: {error}", 1
        print(f"{name:12} {told}", flush=True)
    return failed


class TestSoak:
    """SPEC 2, 5, 9: nothing lost, nothing left behind; `make soak` does it at full length."""

    @pytest.mark.parametrize("loop", loops())
    @pytest.mark.parametrize("name", SOAK_JOBS)
    def test_short_form(self, name: str, loop: str) -> None:
        print(soak_run(name, 0.03, f"--loop={loop}"))


# Fuzz run -----------------------------------------------------------------------------------------
# `python3 test_servercontrol.py fuzz [--seconds 120] [--seed N] [--job NAME]` feeds the parsers
# with mutated and random input, and a live server with mutated requests and frames. A case is made
# from (seed, job, number) alone: `--job NAME --seed N --case K` begins with that very case.
#
# A finding is: an exception that is not the parser's named error; bytes that mean something else
# when they arrive in other pieces; what is accepted here and refused, or read otherwise, by another
# implementation or by a model written down beside it (stricter is fine); more than a limit allows;
# time that rises faster than the input; memory that is kept; for the server, anything that shows.

FUZZ_SLOW_MS = 5.0  # per KiB of input: beyond it, four times in a row, a case is slow
FUZZ_PIECE_MS = 0.02  # in a flood, besides: for each call, which may bring one byte alone
FUZZ_STUCK_SECONDS = 30  # a case that takes this long will never end
FUZZ_KEPT_KIB = 16 * 1024  # memory may rise by this much once everything is warm
FUZZ_KEPT_BLOCKS = 20000  # and so many objects: a cache without a limit shows here first
FUZZ_ALL_SPLITS_BYTES = 256  # up to here an input is split at every point
FUZZ_PIECES = [bytes([code]) for code in b'\0\t\n\v\r\x1b "%&+,-./09:;=?@A[]\\z{}\x7f\x80\xa0\xff']
FUZZ_PIECES += [b"\r\n", b"\n\r", b"\r\n\r\n", b"\r\n ", b"\xed\xa0\x80", b"\xf4\x90\x80\x80"]
FUZZ_PIECES += [char.encode("utf-8") for char in "\xe9\u0663\u212a\u2028\ufeff\U0001f600"]
FUZZ_PIECES += [b"Host: a\r\n", b"Content-Length: 3\r\n", b"Transfer-Encoding: chunked\r\n"]
FUZZ_PIECES += [b"HTTP/1.0", b"1;a\r\n", b"0\r\n\r\n", b", "]
FUZZ_NUMBERS = [b"0", b"-1", b"+1", b"00", b"1_0", b"0x10", b"1e999", b"65536", b"262144"]
FUZZ_NUMBERS += [b"262145", b"9223372036854775808", b"9" * 40, b"9" * 5000, "\u0663".encode()]
FUZZ_NUMBER = re.compile(rb"[0-9]+")


class FuzzJob(NamedTuple):
    """make: a case, which is a literal. parse: what is timed. check: raises what it finds. pid:
    whose memory may not rise."""

    make: Callable[[random.Random], Any]
    parse: Callable[[Any], Outcome]
    check: Callable[[Any, Outcome], None]
    is_timed: bool = True
    pid: str = "self"


# Making input.


def fuzz_change(chance: random.Random, data: bytes, other: bytes) -> bytes:
    """Return data with one change: of a line, a number, a few bytes; or with another seed in it."""
    kind, number = chance.randrange(11), None
    if kind == 0:
        lines = data.split(b"\r\n")
        lines.insert(chance.randrange(len(lines) + 1), chance.choice(lines))
        return b"\r\n".join(lines)
    if kind == 1:
        number = chance.choice([*FUZZ_NUMBER.finditer(data), None])
    if number is not None:
        near = b"%d" % (int(number.group()[:18]) + chance.choice((-1, 1)))
        new = chance.choice([near, chance.choice(FUZZ_NUMBERS)])
        return data[: number.start()] + new + data[number.end() :]
    at = chance.randint(0, len(data))
    end = at + chance.choice((1, 1, 2, 4, 20))
    before, middle, after = data[:at], data[at:end], data[end:]
    return before + chance.choice([
        bytes(byte ^ 1 << chance.randrange(8) for byte in middle[:1]) + data[at + 1 :],
        chance.choice(FUZZ_PIECES) + middle + after, chance.choice(FUZZ_PIECES) + after,
        bytes([chance.randrange(256)]) + after, after, middle * chance.choice((2, 2, 90)) + after,
        other[chance.randrange(len(other) + 1) :], other + middle + after, b"",
    ])  # fmt: skip


def fuzz_vary(chance: random.Random, data: bytes, seeds: Sequence[bytes]) -> bytes:
    """Return data, now and then as it is, mostly mutated, sometimes random bytes instead."""
    kind = chance.random()
    if kind < 0.05:
        return bytes(chance.choices(range(256), k=chance.randrange(200)))
    for _ in range(0 if kind < 0.15 else chance.choice((1, 1, 1, 2, 3, 8))):
        data = fuzz_change(chance, data, chance.choice(seeds))
    return data


def fuzz_vary_text(chance: random.Random, text: str, seeds: Sequence[str]) -> str:
    """The same for text; latin-1, as header fields are."""
    raw = fuzz_vary(chance, text.encode("latin-1"), [seed.encode("latin-1") for seed in seeds])
    return raw.decode("latin-1")


def fuzz_check_splits(parse: Any, data: bytes, outcome: Any) -> None:
    """The same must come of data byte by byte, and cut at every point of a short one."""
    if len(data) <= 4096:
        pieces = (data[at : at + 1] for at in range(len(data)))
        assert parse(pieces) == outcome, "it means something else byte by byte"
    chance = random.Random(data)
    # Every point of every case would leave time for few cases.
    is_thorough = len(data) <= FUZZ_ALL_SPLITS_BYTES and chance.random() < 0.2
    places = range(len(data)) if is_thorough else chance.choices(range(len(data) + 1), k=5)
    for place in places:
        assert parse(cut_bytes(data, [place])) == outcome, f"it means something else cut at {place}"


def fuzz_call(errors: Any, call: Any, *given: Any) -> Outcome:
    """Return what a call gives or the text of its named error; any other comes out."""
    try:
        return Outcome([call(*given)], None)
    except errors as error:
        return Outcome([], str(error))


# HTTP.

FUZZ_TARGETS = ["/", "/health", "/tasks?id=1", "/logs?id=1&follow", "/stats?history", "/nothing"]
FUZZ_HTTP = [row[1] for row in SMALL_ACCEPTED + EDGE_ACCEPTED + HTTP_REJECTED]
FUZZ_HTTP += [make_request(line, *fields, body=body) for line, fields, body in CLOSED_REQUESTS]
FUZZ_SMALL_HTTP = [data for data in FUZZ_HTTP if len(data) < 1024]
FUZZ_TRAILERS = re.compile(rb"\r\n((?:[^\s;:]+:[^\r\n]*\r\n)+)\r\n\Z")
FUZZ_FRAMING = re.compile(rb"(?i)content-length|transfer-encoding")


def fuzz_make_http(chance: random.Random) -> bytes:
    seeds = FUZZ_HTTP if chance.random() < 0.02 else FUZZ_SMALL_HTTP
    parts = chance.choices(seeds, k=chance.choice((1, 1, 1, 2, 3)))
    return fuzz_vary(chance, b"".join(parts), FUZZ_SMALL_HTTP)


def fuzz_check_http(data: bytes, outcome: Outcome) -> None:
    """Its status is one we know, its limits hold, and pieces change nothing."""
    assert outcome.end is None or outcome.end in set(map(int, http.HTTPStatus))
    for head, body in outcome.items:
        lines = [f"{head.method} {head.target} HTTP/1.1"]
        lines += [f"{name}:{value}" for name, value in head.fields]
        assert len(lines) <= 101 and len(body) <= 256 * 1024 and max(map(len, lines)) <= 8192
        assert sum(len(line) + 2 for line in lines) <= 32 * 1024
        names = [name for name, _ in head.fields]
        # Where h11 is laxer than we are: two lengths are how requests get smuggled.
        assert names.count("content-length") + names.count("transfer-encoding") <= 1
        assert not (head.http_1_0 and head.chunked)
    fuzz_check_splits(parse_requests, data, outcome)


def fuzz_check_h11(data: bytes, outcome: Outcome) -> None:
    """Every request, alone and without what follows it, means the same to h11."""
    for head, body in outcome.items:
        data = data.lstrip(b"\r\n")  # h11 takes no empty line before a request
        parser = sc.HttpParser()
        parser.feed(data)
        assert (parser.next_head(), parser.next_body()) == (head, body), "alone it is another"
        rest = parser.take_rest()
        used = data[: len(data) - len(rest)]
        trailers = FUZZ_TRAILERS.search(used) if head.chunked else None
        if trailers and FUZZ_FRAMING.search(trailers.group()):
            # We ignore all trailers; h11 judges those that would be about the body's length.
            used = used[: trailers.start()] + b"\r\n\r\n"
        if status_of(sc.check_host_syntax, head) != 400:  # the gate demands a Host, h11 itself
            # It gives that one value in lower case.
            fields = tuple(
                (name, value.lower() if name == "transfer-encoding" else value)
                for name, value in head.fields
            )
            got = parse_with_h11(used)
            assert got == (head.method, head.target, fields, body), f"h11 reads {got}"
        data = rest


# WebSocket.

FUZZ_CODES = [0, 999, *range(1000, 1017), 2999, 3000, 4999, 5000, 65535]
FUZZ_FIRSTS = [TEXT, BINARY, PING, PONG, TEXT_START, BINARY_START, CONTINUE, CONTINUE_END]
FUZZ_TEXTS = [text.encode("utf-8") for text in ("", "a", "\xe9", "\u20ac", "\U0001f600", "Hello")]
FUZZ_WEBSOCKET = [row[1] for row in WEBSOCKET_ACCEPTED + WEBSOCKET_REJECTED if len(row[1]) < 1024]
FUZZ_DEFLATED = [row[1] for row in DEFLATED_ACCEPTED + DEFLATED_REJECTED if len(row[1]) < 1024]
FUZZ_LARGE_WEBSOCKET = [row[1] for row in WEBSOCKET_ACCEPTED if len(row[1]) > 1024]
FUZZ_SAID = [b'{"type":"ping"}', b'{"type":"hello","ref":"a"}', b'{"ref":{"a":[1e9]},"type":""}']
FUZZ_SAID += [b'{"type":"task_kill","task_id":"1","signal":"TERM","ref":1}', b'{"type":5,"ref":-1}']


def fuzz_make_frame(chance: random.Random) -> bytes:
    """Return a frame that is right in itself, but for a few."""
    mask = bytes(chance.choices(range(256), k=4)) if chance.random() < 0.97 else None
    kind = chance.random()
    if kind < 0.1:
        payload = struct.pack("!H", chance.choice(FUZZ_CODES)) + chance.choice(FUZZ_TEXTS)
        return build_frame(CLOSE, payload[: chance.choice((0, 1, 2, 9))], mask)
    first = chance.randrange(256) if kind < 0.15 else chance.choice(FUZZ_FIRSTS)
    if kind < 0.2:
        return build_frame(first, b"x" * chance.choice((123, 124, 125, 126, 127, 128, 300)), mask)
    payload = chance.choice([*FUZZ_SAID, b"\xe2\x82", b"\xff", *FUZZ_TEXTS * 3])
    return build_frame(first, payload, mask)


def fuzz_make_websocket(chance: random.Random) -> bytes:
    frames = [fuzz_make_frame(chance) for _ in range(chance.randint(1, 6))]
    if chance.random() < 0.01:
        return chance.choice(FUZZ_LARGE_WEBSOCKET) + frames[0]
    if chance.random() < 0.2:
        frames.insert(chance.randrange(len(frames) + 1), chance.choice(FUZZ_WEBSOCKET))
    data = b"".join(frames)
    return data if chance.random() < 0.4 else fuzz_vary(chance, data, FUZZ_WEBSOCKET)


def fuzz_make_deflated(chance: random.Random) -> bytes:
    """Return compressed messages of a client, in fragments, among others."""
    frames = [fuzz_make_frame(chance) for _ in range(chance.randint(0, 2))]
    for _ in range(chance.randint(1, 4)):
        text = b"".join(chance.choices([*FUZZ_SAID, *FUZZ_TEXTS], k=chance.choice((1, 9, 90))))
        level, bits = chance.choice((0, 1, 6, 9)), chance.randint(9, 15)
        flush = chance.choice([zlib.Z_SYNC_FLUSH] * 9 + [zlib.Z_FINISH])
        parts = cut_bytes(squeeze(text, level, bits, flush), [chance.randrange(999)])
        firsts = [chance.choice((DEFLATED, DEFLATED_BINARY)) & (0x7F if len(parts) > 1 else 0xFF)]
        frames += map(build_frame, [*firsts, CONTINUE_END], parts)
    data = b"".join(frames)
    return data if chance.random() < 0.6 else fuzz_vary(chance, data, FUZZ_DEFLATED)


def fuzz_make_header(chance: random.Random) -> bytes:
    """Return the first bytes of a frame: any, with lengths about their edges."""
    lengths = [0, 1, 125, 126, 127, 255, 256, 65535, 65536, 2**31, 2**62, 2**63 - 1, 2**63]
    second = chance.choice([chance.randrange(256), 126, 127, 254, 255])
    size = {126: 2, 127: 8}.get(second & 127, 0)
    length = chance.choice(lengths) % 256**size
    data = bytes([chance.choice([chance.randrange(256), *FUZZ_FIRSTS]), second])
    data += length.to_bytes(size, "big") + bytes(chance.choices(range(256), k=6))
    return data[: chance.choice((0, 1, 2, 3, 4, 6, 9, 10, 13, 14, 20, 20, 20, 20))]


def fuzz_check_header(data: bytes, outcome: Outcome) -> None:
    """RFC 6455, 5.2, written down once more: what is refused, what is not whole, what it says."""
    refused, size = False, 2
    if len(data) >= 2:
        fin, opcode, short = data[0] >> 7, data[0] & 15, data[1] & 127
        refused = bool(data[0] & 0x70) or opcode not in (0, 1, 2, 8, 9, 10)
        refused |= opcode >= 8 and (not fin or short > 125)
        size = 2 + {126: 2, 127: 8}.get(short, 0)
    if len(data) >= size and not refused:
        length = int.from_bytes(data[2:size], "big") if size > 2 else short
        refused = not {2: 0, 4: 126, 10: 65536}[size] <= length < 2**63
        size += data[1] // 128 * 4
    assert refused == (not outcome.items), "refused" if refused else "not refused"
    expected = None
    if not refused and len(data) >= size:
        mask = data[size - 4 : size] if data[1] & 128 else None
        expected = bool(fin), opcode, mask, length, size, False
    assert refused or outcome.items == [expected], f"a model reads {expected}"


def fuzz_check_websocket(data: bytes, outcome: Outcome) -> None:
    """Limits hold, the answer to an end is one close frame, and pieces change nothing."""
    for opcode, payload in outcome.items:
        assert len(payload) <= (125 if opcode >= sc.Opcode.CLOSE else sc.MAX_MESSAGE_BYTES)
        assert opcode != sc.Opcode.TEXT or payload.encode("utf-8").decode("utf-8") == payload
    if outcome.end is not None:
        frames = read_frames_of(outcome.end[1])
        assert [first for first, _ in frames] == [CLOSE]
        sc.parse_close_payload(frames[0][1])
    fuzz_check_splits(receive_as_server, data, outcome)


def fuzz_check_deflated(data: bytes, outcome: Outcome) -> None:
    """What we understand is what `websockets` inflates, however it is cut."""
    fuzz_check_splits(functools.partial(receive_as_server, deflate_bits=15), data, outcome)
    fuzz_check_websockets(data, outcome, [PerMessageDeflate(True, True, 15, 15)])


def fuzz_join_frames(frames: Iterable[Any]) -> list[Any]:
    """Return the messages of the frames that `websockets` gives, up to a text that is none."""
    messages: list[Any] = []
    kind, parts = 0, []
    for frame in frames:
        if frame.opcode >= 8:
            messages.append((int(frame.opcode), bytes(frame.data)))
            continue
        kind, parts = (int(frame.opcode), []) if frame.opcode else (kind, parts)
        parts.append(bytes(frame.data))
        if frame.fin:
            data: Any = b"".join(parts)
            try:
                messages.append((kind, data.decode("utf-8") if kind == 1 else data))
            except UnicodeDecodeError:
                return [*messages, ("not UTF-8", data)]
    return messages


def fuzz_check_websockets(data: bytes, outcome: Outcome, extensions: Sequence[Any] = ()) -> None:
    """Where we go on or are closed in peace, `websockets` has the same messages."""
    peer = Protocol(Side.SERVER, max_size=None)
    peer.extensions = list(extensions)
    peer.receive_data(data)
    theirs, ours = fuzz_join_frames(peer.events_received()), list(map(tuple, outcome.items))
    is_closed = bool(ours) and ours[-1][0] == sc.Opcode.CLOSE
    if outcome.end is not None and not is_closed:
        assert theirs[: len(ours)] == ours, f"websockets reads {theirs}"
        return
    # It takes no close between fragments, which RFC 6455, 5.4 allows.
    is_stricter = is_closed and "incomplete fragmented" in str(peer.parser_exc)
    # It judges the mask before the length is whole; we a few bytes later.
    is_early = outcome.end is None and "incorrect masking" in str(peer.parser_exc)
    is_fine = peer.parser_exc is None or is_stricter or is_early
    assert is_fine, f"websockets: {peer.parser_exc!r}"
    assert theirs == (ours[:-1] if is_stricter else ours), f"websockets reads {theirs}"


# Queries, the gate, bodies.

FUZZ_QUERIES = """
    id=1 since=5&boot=b a=%E2%82%ac&b=c+d wait&raw=&x=1 id=1&%69d=1 a=%ff a=b=c&&d token=x
    since=1&since=2 since=18446744073709551616
""".split()
FUZZ_HOSTS = [host for host, _ in ACCESS_HOSTS] + """
    [::ffff:7f00:1]:80 [::1] localhost:65535 port.test:9 127.255.0.1 [127.0.0.1] a.localhost 127.1
""".split()  # fmt: skip
FUZZ_ORIGINS = ["https://app.test", "null", "http://a@b", *("http://" + h for h in FUZZ_HOSTS)]
FUZZ_MARKS = [field for _, fields in ACCESS_FETCHES for field in fields] + [*UPGRADE, *FORM]
FUZZ_MARKS += [*PREFLIGHT, *(field for _, fields in ACCESS_TOKENS for field in fields)]
FUZZ_MARKS += ["X-Forwarded-For: ::1", "Via: 1.1 a", "Forwarded: for=a", "Content-Length: 0"]
FUZZ_TYPES = ["", "application/json", "text/plain", "application/x-www-form-urlencoded"]
FUZZ_TYPES += ["multipart/form-data", "application/jsonx"]
FUZZ_BODIES = [
    *FUZZ_SAID, b"uptime", b"cmd=ls", b"{ ls; }", b'{"cmd":"ls"}', b'{"command":"\\ud83d\\ude00"}',
    b'{"cmd":"x","cwd":"/","env":{"A":"=b"},"timeout":1.5,"name":"n"}', b'{"cmd":"\\u0000"}',
    b'{"a":[[[[1e5,-0.0]]],"\\udcff"]}', b"[" * 5000, b"x" * 65537, b'{"a":' * 900,
    b'{"a":%b1%b}' % (b"[" * 90, b"]" * 90), b'{"cmd":"a","cmd":"b"}',
]  # fmt: skip


def fuzz_make_query(chance: random.Random) -> str:
    text = fuzz_vary_text(chance, chance.choice(FUZZ_QUERIES), FUZZ_QUERIES)
    return text.encode("ascii", "ignore").decode("ascii")  # a target has no other characters


def fuzz_parse_query(query: str) -> Any:
    parameters = sc.parse_query(query)
    for name in parameters:
        fuzz_call(sc.HttpError, sc.parse_flag, parameters, name)
    return parameters, sc.parse_since(parameters, "b")


def fuzz_check_query(query: str, outcome: Outcome) -> None:
    """What is accepted, urllib reads in the same way."""
    for parameters, since in outcome.items:
        pairs = [pair.partition("=") for pair in query.split("&") if pair]
        plain = functools.partial(urllib.parse.unquote_plus, errors="strict")
        assert [(plain(name), plain(value)) for name, _, value in pairs] == list(parameters.items())
        digits = parameters.get("since")
        if digits is None or parameters.get("boot", "b") != "b":
            assert since == (None if digits is None else sys.maxsize)
        else:
            assert f"{since}" == (digits.lstrip("0") or "0")


def fuzz_make_access(chance: random.Random) -> Any:
    host, origin = chance.choice(FUZZ_HOSTS), chance.choice(FUZZ_ORIGINS)
    if chance.random() < 0.3:
        host = fuzz_vary_text(chance, host, FUZZ_HOSTS)
    origin = f"http://{host}" if chance.random() < 0.4 else origin
    if chance.random() < 0.3:
        origin = fuzz_vary_text(chance, origin, FUZZ_ORIGINS)
    fields = [f"Host: {host}"] + [f"Origin: {origin}"] * chance.choice((0, 0, 1, 1, 1, 2))
    fields += chance.choices(FUZZ_MARKS, k=chance.choice((0, 0, 1, 2, 3)))
    if chance.random() < 0.1:
        fields[-1] = fuzz_vary_text(chance, fields[-1], FUZZ_MARKS)
    target = chance.choice(FUZZ_TARGETS) + chance.choice(["", "", "", "?%74oken=x", "&token"])
    method = chance.choice(["GET", "GET", "HEAD", "POST", "OPTIONS"])
    return chance.randrange(len(ACCESS_SITUATIONS)), f"{method} {target}", fields


def fuzz_parse_access(case: Any) -> Any:
    number, line, fields = case
    _, policy, peer, _ = ACCESS_SITUATIONS[number]
    head = parse_head(line, *fields)
    return head, sc.check_access(policy, peer, head)


def fuzz_host_kind(host: str) -> str:
    """Return the kind of a Host as ACCESS_HOSTS has it, judged by urllib and ipaddress."""
    parts = urllib.parse.urlsplit("//" + host)
    assert parts.netloc == host and "@" not in host and (parts.port or 0) < 65536, "no Host"
    name = parts.hostname or ""
    if name == "localhost":
        return "loopback"
    if name == "box.test" or host.lower() == "port.test:9":
        return "listed"
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        assert "[" not in host, "no IPv6 address in brackets"
        return "own" if name == "myname" else "foreign"
    assert (address.version == 6) == ("[" in host), "brackets are for IPv6 (RFC 3986, 3.2.2)"
    address = getattr(address, "ipv4_mapped", None) or address
    return "loopback" if address.is_loopback else "address"


def fuzz_check_access(case: Any, outcome: Outcome) -> None:
    """Who got in may: the rules of the contract, for what is accepted alone."""
    _, policy, peer, own = ACCESS_SITUATIONS[case[0]]
    for head, role in outcome.items:
        names, (host,) = [name for name, _ in head.fields], head.values("host")
        offers = ",".join(head.values("sec-websocket-protocol")).split(",")
        shown = [text.split()[-1:] for text in head.values("authorization")]
        shown += [[text.strip(" \t")[7:]] for text in offers if text.strip(" \t")[:7] == "bearer."]
        is_proxied = any(name.startswith(("x-forwarded-", "via", "forwarded")) for name in names)
        is_trusted = own and not is_proxied and not policy.require_token
        tokens = {RUN_TOKEN: sc.Role.RUN, VIEW_TOKEN: sc.Role.VIEW}
        origins = head.values("origin")
        is_listed = origins == ["https://app.test"]
        # Listed too, but these need a token, which a preflight does not carry.
        is_listed |= origins in (["null"], ["file://"]) and bool(shown or head.method == "OPTIONS")
        if shown and not policy.no_auth:
            assert len(shown) == 1 and role is tokens[shown[0][0]]
        else:
            assert role is (sc.Role.RUN if policy.no_auth or is_trusted else None)
            served = ["loopback", "listed"] + ["address", "own"] * policy.no_auth
            kind = fuzz_host_kind(host)
            assert kind in served or not policy.no_auth and peer.listener is NETWORK, kind
        is_page = head.path in ("/", "/health") and "upgrade" not in names
        assert role or is_page or head.method == "OPTIONS" and is_listed
        plain = [urllib.parse.unquote_plus(p.split("=")[0]) for p in head.query.split("&")]
        assert "token" not in plain, "a token in the query"
        parts = [urllib.parse.urlsplit(text) for text in [*origins, f"http://{host}"]]
        ends = {(part.scheme, part.hostname, part.port or 80) for part in parts}
        is_same = len(origins) < 2 and len(ends) == 1 and not any(part.path for part in parts)
        assert is_listed or is_same, "a foreign page"
        is_cross = head.value("sec-fetch-site") in ("cross-site", "same-site")
        assert is_listed or not is_cross or (head.method, head.path) == ("GET", "/"), (
            "a foreign page"
        )


def fuzz_make_body(chance: random.Random) -> Any:
    body = fuzz_vary(chance, chance.choice(FUZZ_BODIES), FUZZ_BODIES)
    return chance.choice(FUZZ_TYPES), body


def fuzz_parse_body(case: Any) -> Outcome:
    made = fuzz_call(sc.CommandError, sc.parse_exec_body, *case)
    read = fuzz_call(sc.CommandError, sc.parse_json_object, case[1])
    return Outcome([made, read], None if made.items or read.items else made.end)


def fuzz_check_body(case: Any, outcome: Outcome) -> None:
    """What is accepted is strict JSON that says the same, or the bytes as they are."""
    (media_type, body), (made, read) = case, outcome.items
    for value in read.items:
        objects: list[Any] = []
        json.loads(body.decode("utf-8"), object_pairs_hook=objects.append)
        assert all(len(dict(pairs)) == len(pairs) for pairs in objects), "a name stands twice"
        assert value == parse_strict_json(body.decode("utf-8"))
        json.dumps(value, allow_nan=False)
        for one in value.values():
            fuzz_call(sc.CommandError, sc.parse_task_id, one)
            fuzz_call(sc.CommandError, sc.parse_signal, one)
        sc.encode_json(value)
    for request in made.items:
        raw = request.command.encode("utf-8")
        assert raw.strip() and b"\0" not in raw and len(raw) <= 65536
        if media_type != "application/json" and (body[:1] != b"{" or media_type == "text/plain"):
            assert raw == body and not media_type.startswith("multipart/")
            continue
        fields = dict(read.items[0])
        assert [raw.decode("utf-8")] == [fields.pop(n) for n in ("cmd", "command") if n in fields]
        assert all(getattr(request, name) == value for name, value in fields.items())
        texts = [request.cwd or "", request.name or "", *itertools.chain(*request.env.items())]
        assert b"\0" not in "".join(texts).encode("utf-8")
        assert 0 <= request.timeout <= 366 * 24 * 3600


# Floods: a beginning, then the same over and over, in pieces of one size.

FUZZ_CHUNKED = http_chunked(b"")
FUZZ_LONG = http_post("Content-Length: 262144")
FUZZ_FLOODS = [
    (b"", http_get()), (b"", b"\r\n"), (b"", b"GET /"), (b"GET / HTTP/1.1\r\n", b"x: y\r\n"),
    (b"GET / HTTP/1.1\r\n", b"x"), (FUZZ_LONG, b"x"), (FUZZ_CHUNKED, b"1\r\nx\r\n"),
    (FUZZ_CHUNKED, b"8;a\r\n12345678\r\n"), (FUZZ_CHUNKED + b"0\r\n", b"x: y\r\n"),
    (FUZZ_CHUNKED + b"1;", b"x"), (FUZZ_CHUNKED, b"0"), (b"GET / HTTP/1.1\r\nx: ", b" "),
    (b"GET / HTTP/1.1\r\nConnection: ", b", "), (FUZZ_CHUNKED + b"0\r\nx:", b" "),
]  # fmt: skip
FUZZ_WEBSOCKET_FLOODS = [
    (b"", build_frame(PING)), (b"", build_frame(PONG, b"x" * 125)), (b"", build_frame(TEXT, b"a")),
    (build_frame(TEXT_START), build_frame(CONTINUE, b"x")), (b"", build_frame(BINARY_START, b"x")),
    (build_frame(TEXT_START), build_frame(CONTINUE)), (build_frame(CLOSE), build_frame(TEXT, b"x")),
    (build_frame(TEXT_START), build_frame(CONTINUE) + build_frame(PING)),
    (b"\x81\xff" + struct.pack("!Q", 65536), b"\xc4\x80"), (b"\x82\xff" + bytes(4), b"\0"),
    (b"", build_frame(TEXT, "\u0100".encode() * 9999, bytes(4))),
]  # fmt: skip
# By a WebSocketConnection, by an HttpParser: twice the largest body and head. Text that drips in,
# two bytes a time, is kept as many small strings, of some 50 bytes for a byte.
FUZZ_HELD_BYTES = (64 * sc.MAX_MESSAGE_BYTES, 2 * (sc.MAX_BODY_BYTES + sc.MAX_HEAD_BYTES))


def fuzz_make_flood(is_http: bool, chance: random.Random) -> Any:
    """Return (is HTTP, the beginning, what comes over and over, bytes a piece)."""
    begin, unit = chance.choice(FUZZ_FLOODS if is_http else FUZZ_WEBSOCKET_FLOODS)
    if chance.random() < 0.3:
        unit = fuzz_vary(chance, unit, [unit])[:10000] or b"x"
    return is_http, begin, unit, chance.choice([1, 7, 64, 65536])


def fuzz_held_bytes(owner: Any) -> int:
    """Return how much memory a parser holds, in its attributes and their items."""
    held, due = 0, list(gc.get_referents(owner))
    while due:
        one = due.pop()
        if isinstance(one, (bytes, bytearray, str, list, dict, tuple)):
            held += sys.getsizeof(one)
            due += gc.get_referents(one) if isinstance(one, (list, dict, tuple)) else []
    return held


def fuzz_drain(parser: Any) -> bool:
    """Take all requests that are whole. False: an error, nothing more is read."""
    try:
        while parser.head or parser.next_head():
            if parser.next_body() is None:
                return True
    except sc.HttpError:
        return False
    return True


def fuzz_flood(case: Any, pieces: int) -> tuple[float, float, int]:
    """Feed so many pieces; return ms, the share of the time that is allowed, bytes held at most."""
    is_http, begin, unit, size = case
    parser: Any = sc.HttpParser() if is_http else sc.WebSocketConnection()
    block = unit * (size // len(unit) + 2)
    held, fed, spent, goes_on = 0, 0, 0.0, True
    while goes_on and fed < pieces:
        data = begin * (fed == 0) + block[fed * size % len(unit) :][:size]
        start = time.thread_time()
        if is_http:
            parser.feed(data)
            goes_on = fuzz_drain(parser)
        else:
            parser.receive(data)
            goes_on = parser.state is sc.WebSocketState.OPEN
        spent += time.thread_time() - start
        fed += 1
        if fed & fed - 1 == 0 or fed == pieces:
            held = max(held, fuzz_held_bytes(parser))
    allowed = max(1, fed * size / 1024) * FUZZ_SLOW_MS + fed * FUZZ_PIECE_MS
    return spent * 1e3, spent * 1e3 / allowed, held


def fuzz_check_flood(case: Any, outcome: Outcome) -> None:
    """Bounded memory; 5 ms a KiB; eight times as much takes about eight times as long."""
    is_http, _, _, size = case
    pieces = min(40000, max(16, 512 * 1024 // size))
    for _ in range(4):  # as often as a slow case gets its chance elsewhere
        few_ms, _, _ = fuzz_flood(case, pieces // 8)
        ms, share, held = fuzz_flood(case, pieces)
        assert held <= FUZZ_HELD_BYTES[is_http] + 2 * size, f"{held} bytes are held"
        if share <= 1 and (ms < 50 or ms < 30 * few_ms):
            return
    raise AssertionError(f"{pieces // 8} pieces take {few_ms:.0f} ms, {pieces} take {ms:.0f} ms")


# The live server.

FUZZ_ROUTES = OPEN_REQUESTS + CLOSED_REQUESTS
FUZZ_LIVE_HTTP = [make_request(line, *fields, body=body) for line, fields, body in FUZZ_ROUTES]
FUZZ_LIVE_HTTP += [data.replace(b"Host: a\r\n", b"Host: localhost\r\n") for data in FUZZ_SMALL_HTTP]


def fuzz_make_request(chance: random.Random) -> bytes:
    """Return a request that is well-formed, whether or not it makes sense."""
    fields = [*FUZZ_MARKS, "x: y", "Connection: close", "Expect: 100-continue", *UPGRADE_FIELDS]
    method = chance.choice(["GET", "GET", "HEAD", "POST", "OPTIONS", "PUT"])
    target = chance.choice([*FUZZ_TARGETS, "/exec?wait", "/kill?id=1", "/stdin?id=1", "/info"])
    body = chance.choice([b"", b"", b"true"])
    fields = chance.choices(fields, k=chance.randrange(4))
    return make_request(f"{method} {target}", *fields, body=body)


def fuzz_make_batch(chance: random.Random) -> Any:
    """Return conversations: (is WebSocket, bytes, bytes a piece or 0, how it ends)."""
    batch = []
    for _ in range(chance.randint(1, 6)):
        is_websocket = chance.random() < 0.5
        data = b"".join(chance.choices(FUZZ_LIVE_HTTP, k=chance.choice((1, 1, 2, 5))))
        data = fuzz_vary(chance, data, FUZZ_LIVE_HTTP)
        data = chance.choice([b"", fuzz_make_request(chance)]) + data
        if is_websocket:
            begin = UPGRADE_WS.encode("utf-8")
            said = [build_frame(TEXT, fuzz_vary(chance, text, FUZZ_BODIES)[:999])
                    for text in chance.choices(FUZZ_SAID, k=3)]  # fmt: skip
            data = begin + b"".join(chance.choice([said, []])) + fuzz_make_websocket(chance)
        size = chance.choice([0, 0, 0, 1, 7, 100]) if len(data) < 2000 else 0
        batch.append((is_websocket, data, size, chance.choice(["close", "half", "reset", "leave"])))
    return batch


def fuzz_converse(server: ServerProcess, batch: Any) -> Outcome:
    """Return what a server answers; it must be as it was before."""
    with unharmed(server), contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(server.connect()) for _ in batch]
        queues = []
        for connection, (_, data, size, _) in zip(sockets, batch):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            cuts = range(size, len(data), size) if size else []
            queues.append([(connection, piece) for piece in cut_bytes(data, cuts)])
        for turn in itertools.zip_longest(*queues):
            for connection, piece in filter(None, turn):
                with contextlib.suppress(ConnectionError):
                    connection.sendall(piece)
        answers = [fuzz_end(c, ending) for c, (*_, ending) in zip(sockets, batch)]
    return Outcome(answers, None)


def fuzz_end(connection: socket.socket, ending: str) -> bytes:
    """Read until nothing comes, after the end that a client may choose."""
    received = b""
    if ending == "reset":
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    if ending in ("reset", "leave"):
        return received
    with contextlib.suppress(OSError):
        if ending == "half":
            connection.shutdown(socket.SHUT_WR)
        data = b"more"
        while data and select.select([connection], [], [], 0.03)[0]:
            data = connection.recv(65536)
            received += data
    return received


def fuzz_check_batch(batch: Any, outcome: Outcome) -> None:
    """What came back is no failure."""
    for (is_websocket, *_), received in zip(batch, outcome.items):
        assert received[:9] in (b"", b"HTTP/1.1 "), received
        assert not re.search(rb"(?m)^HTTP/1\.1 500 ", received), received
        head, _, frames = received.partition(b"\r\n\r\n")
        if is_websocket and head.startswith(b"HTTP/1.1 101 "):
            buffer = bytearray(frames)
            for first, payload in iter(lambda: take_frame(buffer), None):
                assert first in (TEXT, PING, PONG, CLOSE), received
                assert first != TEXT or parse_strict_json(payload.decode("utf-8"))
                # The code alone may be the echo of a client's.
                assert (first, payload) != (CLOSE, b"\x03\xf3internal error"), payload


@contextlib.contextmanager
def fuzz_live() -> Iterator[FuzzJob]:
    """A server with the defaults, except that nothing can be run: mutants of /exec may mean it."""
    with tempfile.TemporaryDirectory(prefix="servercontrol-fuzz-") as folder:
        with ServerProcess(Path(folder), "--no-exec") as server:
            server.get("/stats")  # waits for the first
            converse = functools.partial(fuzz_converse, server)
            yield FuzzJob(fuzz_make_batch, converse, fuzz_check_batch, False, str(server.pid))


# The run.


FUZZ_JOBS = {
    "http": FuzzJob(fuzz_make_http, lambda data: parse_requests([data]), fuzz_check_http),
    "h11": FuzzJob(fuzz_make_http, lambda data: parse_requests([data]), fuzz_check_h11),
    "frames": FuzzJob(fuzz_make_header, lambda data: fuzz_call(
        sc.WebSocketError, sc.parse_frame_header, bytearray(data)), fuzz_check_header),
    "websocket": FuzzJob(fuzz_make_websocket, lambda data: receive_as_server([data]), fuzz_check_websocket),
    "websockets": FuzzJob(fuzz_make_websocket, lambda data: receive_as_server([data]), fuzz_check_websockets),
    "deflated": FuzzJob(fuzz_make_deflated, lambda data: receive_as_server([data], 15), fuzz_check_deflated),
    "query": FuzzJob(fuzz_make_query, functools.partial(
        fuzz_call, sc.HttpError, fuzz_parse_query), fuzz_check_query),
    "access": FuzzJob(fuzz_make_access, functools.partial(
        fuzz_call, sc.HttpError, fuzz_parse_access), fuzz_check_access),
    "body": FuzzJob(fuzz_make_body, fuzz_parse_body, fuzz_check_body),
    # The check does it all.
    **{name: FuzzJob(functools.partial(fuzz_make_flood, is_http), lambda case: Outcome([], None),
       fuzz_check_flood, False) for name, is_http in (("http-flood", True), ("websocket-flood", False))},
}  # fmt: skip


def fuzz_try(job: FuzzJob, case: Any) -> tuple[Outcome, float]:
    """Run one case; return what comes of it, and ms of processor time for each KiB of it. Raises
    what is wrong with it."""
    kib = max(1.0, len(case if isinstance(case, (bytes, str)) else repr(case)) / 1024)
    signal.alarm(FUZZ_STUCK_SECONDS)
    try:
        for attempt in range(4):  # a busy machine is not slow four times in a row
            start = time.thread_time()
            outcome = job.parse(case)
            ms = (time.thread_time() - start) * 1e3 / kib if job.is_timed else 0.0
            if attempt == 0:
                job.check(case, outcome)
            if ms <= FUZZ_SLOW_MS:
                return outcome, ms
    finally:
        signal.alarm(0)
    raise AssertionError(f"it is slow: {ms:.1f} ms/KiB")


def fuzz_memory(pid: str) -> tuple[int, int]:
    """Return the KiB of a process, and how many objects this one has."""
    gc.collect()
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * resource.getpagesize() // 1024, sys.getallocatedblocks()


def fuzz_loop(name: str, job: FuzzJob, seed: int, seconds: float, first: int) -> None:
    """Run cases until the time is over, and print what was done; raise what is wrong with one."""
    begin, number, rejected, slowest_ms = time.monotonic(), first, 0, 0.0
    elapsed, warm = 0.0, None
    while elapsed <= seconds:
        case = job.make(random.Random(f"{seed}/{name}/{number}"))
        try:
            outcome, ms = fuzz_try(job, case)
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1].name
            what = f"{type(error).__name__} in {place}: {error}"
            replay = f"--job {name} --seed {seed} --case {number}"
            raise AssertionError(f"{what}\n  replay: {replay}\n  case: {case!r}") from None
        number += 1
        rejected += outcome.end is not None
        slowest_ms = max(slowest_ms, ms)
        elapsed = time.monotonic() - begin
        if warm is None and elapsed > seconds / 4:
            warm = fuzz_memory(job.pid)
    count = number - first
    told = f"{name:15} {count:8} cases {count / elapsed:7.0f}/s {count - rejected:8} accepted"
    slowest = f"{slowest_ms:6.2f} ms/KiB at most" if job.is_timed else "not timed"
    print(f"{told} {rejected:8} rejected  {slowest}", flush=True)
    now = fuzz_memory(job.pid)
    kib, blocks = (after - before for before, after in zip(warm or now, now))
    is_kept = kib > FUZZ_KEPT_KIB or blocks > FUZZ_KEPT_BLOCKS
    assert not is_kept, f"{kib} KiB, {blocks} objects were kept"


def fuzz_run(name: str, *options: Any) -> bool:
    """Run one job. True: nothing was found."""
    try:
        with fuzz_live() if name == "live" else contextlib.nullcontext(FUZZ_JOBS[name]) as job:
            fuzz_loop(name, job, *options)
    except (AssertionError, OSError, http.client.HTTPException) as error:
        print(f"FINDING in {name}: {str(error) or repr(error)}", flush=True)
        return False
    return True


def fuzz_give_up(*_: Any) -> None:
    raise RuntimeError(f"it has not ended after {FUZZ_STUCK_SECONDS} s")


def fuzz_main(argv: list[str]) -> int:
    """Run all jobs, or some. Exit status: 0 nothing found, 1 something, 2 cannot be run."""
    parser = argparse.ArgumentParser(prog="fuzz")
    parser.add_argument("--seconds", type=float, default=120.0, help="for all jobs together")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="default: the time")
    parser.add_argument("--job", action="append", choices=[*FUZZ_JOBS, "live"], metavar="NAME",
                        help=" ".join([*FUZZ_JOBS, "live"]))  # fmt: skip
    parser.add_argument("--case", type=int, default=0, help="the number of the first")
    options = parser.parse_args(argv)
    names = options.job or [*FUZZ_JOBS, "live"]
    signal.signal(signal.SIGALRM, fuzz_give_up)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the server is stopped too
    print(f"seed {options.seed}, Python {platform.python_version()}", flush=True)
    # The server gets a third of the time: its cases are the slowest.
    shares = [(len(names) - 1) / 2 if name == "live" and len(names) > 1 else 1 for name in names]
    seconds = [options.seconds * share / sum(shares) for share in shares]
    clean = [fuzz_run(name, options.seed, s, options.case) for name, s in zip(names, seconds)]
    print(f"{len(clean)} jobs, findings in {clean.count(False)}, seed {options.seed}", flush=True)
    return 0 if all(clean) else 1


class TestFuzz:
    """The fuzz run itself: it passes here, and finds what is planted."""

    def run(self, folder: Path, *options: str) -> tuple[int, str]:
        """With the servercontrol.py of that folder. (-m: a script would be compiled each time.)"""
        command = [sys.executable, "-m", "test_servercontrol", "fuzz", "--seed", "5", *options]
        env = {**os.environ, "PYTHONPATH": str(HERE)}
        done = subprocess.run(command, cwd=folder, env=env, stdout=-1, stderr=subprocess.STDOUT)
        return done.returncode, done.stdout.decode("utf-8", "replace")

    def test_a_short_run_finds_nothing(self) -> None:
        status, output = self.run(HERE, "--seconds", "2")
        assert (status, "findings in 0" in output) == (0, True), output

    def test_a_planted_bug_is_found_and_replayed(self, tmp_path: Path) -> None:
        right, wrong = "65536) <= length < 2**63:", "65536) < length < 2**63:"
        assert SOURCE.count(right) == 1
        source = SOURCE.replace(right, wrong)
        (tmp_path / "servercontrol.py").write_text(source, encoding="utf-8")
        status, output = self.run(tmp_path, "--seconds", "60", "--job", "frames")
        case = re.search(r"replay: --job frames --seed 5 --case (\d+)\n  case: b'(.*)'", output)
        assert status == 1 and case is not None, output
        status, output = self.run(tmp_path, "--job", "frames", "--case", case.group(1))
        assert (status, case.group(2) in output) == (1, True), output


if __name__ == "__main__":
    FACILITIES = {"bench": bench_main, "soak": soak_main, "fuzz": fuzz_main}
    if sys.argv[1:2] not in ([name] for name in FACILITIES):
        usage = "echo --port N | bench [NAME ...] | soak [NAME ...] | fuzz [--seconds N]"
        sys.exit(f"usage: test_servercontrol.py {usage}")
    sys.exit(FACILITIES[sys.argv[1]](sys.argv[2:]))
