#!/usr/bin/env python3
"""ServerControl: run commands on a server and watch them live, from anywhere.

    python3 servercontrol.py                       start, on this machine only
    curl -d 'date' localhost:8080/exec             run a command
    curl -d 'make' 'localhost:8080/exec?follow'    run it and watch it
    http://localhost:8080/                         all of that on a page, in a browser
    ws://localhost:8082/                           every event of every task, live, as JSON

One file, standard library only. `psutil` and `uvloop` are used when they are installed.
Each section uses only names that are defined above it. Sections 5 to 11 are pure: they use no
socket, clock, file or event loop. Sections 12 to 16 are the I/O around them.

The way of the data:

    socket bytes -> HttpParser -> check_access -> ROUTES -+-> answer
                                                          +-> POST /exec -> Task (child) --+
                                                          +-> upgrade -> WebSocket commands |
    /proc or psutil -> Sampler -> stats_update, cpu_alert ----------------------------------+
                                                                                            v
                       Viewers.publish -> Feed: one ordered, bounded log; a cursor per viewer
                                                                                            v
                                          one flush per turn of the event loop -> transport.write

Map (search for the number and a dot):

    1. Imports and version: the two optional packages, names for annotations
    2. Constants: limits, time-outs, pauses, protocol numbers
    3. Errors: what others may do wrong, COMMAND_STATUS; see also REFUSALS in 16
    4. Configuration: Config, the options of `serve`
    5. HTTP messages: HttpParser, RequestHead, query, answers' heads and chunks
    6. Access: Role, check_access, tokens in requests, owners of sockets, RateLimit
    7. WebSocket handshake and frames: upgrade, Opcode, CloseCode, frames, permessage-deflate
    8. WebSocket connection: messages from frames, the closing handshake
    9. Statistics and alerts: parsers of /proc, rates, AlertRule
    10. Feed and kept output: EVENT_TYPES, the log of events, its cursors; output kept per task
    11. Messages and datagrams: JSON, events, EXEC_FIELDS, forms of metrics, discovery, webhook
    12. Log, state folder and audit log: stderr, task ids, token files, the chain (TASK_EVENTS: 13)
    13. Tasks: phases, crashed runs, start, Outputs (reading in turns, pauses), stopping, the end
    14. Viewers: publish, flush, slow viewers and how they pause tasks, pings
    15. Background loops: sampling, webhook, answers to probes, systemd
    16. Server: ROUTES, COMMANDS, metrics, probe facts, answers' heads, deadlines, newcomers, stop
    17. Client: names of servers, Link, exec, monitor with log and COLUMNS, discover
    18. Dashboard: CSS, HTML, JavaScript of the page (`// ──` begins its parts), its policy
    19. Command line: options, environment, banner, signals, verify-audit, systemd unit, main

May I run this as root? Read these places in this order (the number is that of their lines):

     307  section 6                 who gets in: the gate, check_access, and its rules in order
      23  load_tokens               where the two tokens come from
      14  check_file                whose files are believed
      23  identify_peer             whose process is at the other end: the kernel is asked
      21  Exchanges._serve_request  the door: head, gate, only then the body, answer
      24  Exchanges._admit          what the gate's answer lets a request reach
      16  find_route                which role each path needs
      31  handle_message            the second door: messages of WebSocket clients, COMMANDS
       6  Server.check_role         who may run something; both doors ask it
      15  parse_exec_fields         what a request to run something may say
      33  answer_exec               where the gate and the tasks meet
      65  Spawner                   how a command is started: session, environment, descriptors
     196  Tasks                     how it is stopped with all that it started, and ends
       8  signal_session            which processes a signal reaches
      84  AuditLog                  how it is written down

Security stance: whoever may use this server owns the account that it runs under. So by default it
listens on loopback only and serves only processes of that same account, which it asks the kernel
about. Everybody else needs a token. Web pages, rebinding names and proxies are refused (section
6). Everything that a peer can fill has a limit: buffers, waits and counts (section 2). It runs only
what `POST /exec` names, and records who asked for it (section 12).

What it does not have: a scheduler, a file manager, plug-ins, stored metrics, Windows.
"""

from __future__ import annotations  # ServerControl needs Python 3.9 or newer

# 1. Imports and version ---
import signal
import sys

if sys.version_info < (3, 9):  # noqa: UP036 (before 3.7, the line above says it)
    sys.exit("servercontrol: Python 3.9 or newer is needed; this is " + sys.version.split()[0])
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends us without a trace of the imports

import argparse
import asyncio
import asyncio.sslproto
import base64
import bisect
import codecs
import concurrent.futures
import contextlib
import dataclasses
import enum
import errno
import functools
import hashlib
import http
import ipaddress
import itertools
import json
import math
import os
import queue
import re
import secrets
import select
import shlex
import socket
import stat
import struct
import subprocess
import threading
import time
import traceback
import unicodedata
import urllib.parse
from collections import Counter, OrderedDict, deque
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, TypeVar, cast

try:
    import fcntl
    import pwd
    import resource
    import termios
    import tty
except ImportError:
    sys.exit("servercontrol: needs Linux (or another Unix); this system is " + sys.platform)

try:
    import ssl
except ImportError:
    ssl = None  # type: ignore[assignment]  # a Python without OpenSSL: then there is no TLS

try:
    import zlib
except ImportError:
    zlib = None  # type: ignore[assignment]  # then nothing is compressed

try:
    import psutil
except ImportError:
    psutil = None  # type: ignore[assignment,unused-ignore]  # /proc is read instead

try:
    import uvloop
except ImportError:
    uvloop = None  # type: ignore[assignment,unused-ignore]  # asyncio has a loop of its own

if TYPE_CHECKING:  # for annotations alone, which are never evaluated here
    from collections.abc import (
        AsyncIterator,
        Awaitable,
        Callable,
        Collection,
        Generator,
        Iterable,
        Iterator,
        Mapping,
        MutableMapping,
        Sequence,
    )
    from io import FileIO

    IpAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
    Endpoint = tuple[IpAddress, int]  # with a port
    Place = tuple[int, tuple[Any, ...]]  # family and address of a socket
    OwnerQuery = Callable[[Endpoint, Endpoint], int]  # returns a uid
    Rule = tuple[Callable[[Any], bool], str]  # whether a value may be, and what it must be
    Fields = dict[str, Any]  # of a JSON object, by name
    Kinds = frozenset[str] | None  # of events, or task ids; None is all
    Publish = Callable[..., Fields]  # Viewers.publish
    Options = dict[str, tuple[Any, ...]]  # the rows of section 19
    Command = Callable[["Server", "Viewer", Fields], "Fields | None"]

__version__ = "0.1.0"

# 2. Constants ---
# Every limit and time-out that is no option, with its reason.

KIB = 1024
MIB = 1024 * 1024

# HTTP: enough for people and scripts; 10,000 connections do no harm.
MAX_REQUEST_LINE_BYTES = 8 * KIB
MAX_FIELD_BYTES = 8 * KIB
MAX_FIELDS = 100
MAX_HEAD_BYTES = 32 * KIB
MAX_BODY_BYTES = 256 * KIB
MAX_CHUNK_LINE_BYTES = 16 + 256  # the size and an extension
MAX_TRAILER_BYTES = 4 * KIB
HEAD_SECONDS = 10.0  # in all, however slowly bytes arrive
BODY_SECONDS = 30.0
IDLE_SECONDS = 15.0  # between two requests
# After an early error so much input is read and dropped: a reset would destroy the answer.
LINGER_SECONDS = 2.0
MAX_LINGER_BYTES = 4 * MIB
WRITE_STALL_SECONDS = 30.0  # then a client that takes nothing is disconnected
# In seconds; KEEPCNT is a number of probes: tcp(7). macOS calls KEEPIDLE KEEPALIVE.
KEEPALIVE = {"TCP_KEEPIDLE": 9, "TCP_KEEPALIVE": 9, "TCP_KEEPINTVL": 3, "TCP_KEEPCNT": 3}

# WebSocket, RFC 6455.
WEBSOCKET_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # section 1.3
WEBSOCKET_VERSION = "13"
WEBSOCKET_PROTOCOL = "servercontrol.v1"
MAX_MESSAGE_BYTES = 64 * KIB  # clients send commands, not data
MAX_FRAGMENTS = 1024  # of one message: empty ones could go on for ever
MAX_CONTROL_PAYLOAD_BYTES = 125  # section 5.5
# permessage-deflate, RFC 7692.
MIN_DEFLATE_BYTES = 100  # shorter messages gain next to nothing
FINE_BYTES = 4 * KIB  # so much is compressed best, in 0.03 ms; more is compressed fastest
MAX_DEFLATE_BYTES = 256 * KIB  # longer messages would take more than 5 ms
# Compressing events may take this share of the time, and so much at once; the rest is sent plain.
DEFLATE_SHARE = 0.1  # compresses 16 MB/s, and a flood hardly slows other viewers
DEFLATE_SECONDS = 0.003
PING_SECONDS = 20.0  # between pings, and for the pong: keeps NATs awake, finds lost clients
CLOSE_SECONDS = 5.0  # from our close frame to the end of the TCP connection
STOP_CLOSE_SECONDS = 0.6  # the same while the server stops: an idle one ends within 1 s
STOP_ASK_SECONDS = 0.3  # before that, clients that followed a task may ask how it ended

BATCH_BYTES = 64 * KIB  # of one write, which is all that a stalled viewer costs; more gains nothing
HIGH_WATER_BYTES = 64 * KIB  # asyncio's default: above it our client answers no ping
# A client with more unread replies is closed. Its largest reply is not counted: `hello` lists all
# running tasks. Of broadcasts at most one batch waits.
MAX_PERSONAL_BYTES = 1 * MIB
TCP_NOTSENT_LOWAT = 25  # linux/tcp.h
UNSENT_BYTES = 256 * KIB  # that the kernel may hold for one connection
# In one turn of the event loop, for reading output and for writing it to viewers: a new connection
# needs six turns, and must be answered within 50 ms.
READ_TURN_SECONDS = 0.002
FLUSH_TURN_SECONDS = 0.003
ROUND_SECONDS = 0.05  # tasks are not read while many viewers are served, for so long at most
ROUND_STEP = 16  # viewers between looks at the clock
FEW_VIEWERS = 8  # so few are served in the turn that reads the output, which saves 15 us
FEW_PAUSE_SECONDS = 0.0005  # between such turns: in a flood one write for many events costs less
# Tasks pause so long for viewers that fall behind (Viewers._update_pressure). A viewer that takes
# 32 MB/s loses nothing. No task waits for one that took nothing for LATELY_SECONDS.
PATIENCE_SECONDS = 0.25
LATELY_SECONDS = 0.1
PRESSURE_SECONDS = 0.002  # between checks

# A client's input is parsed in pieces. After INPUT_TURN_SECONDS of work it waits for a later turn,
# which lets CLIENTS_PER_TURN go on. So one client's tiny frames or requests delay nobody else.
INPUT_PIECE_BYTES = 512
INPUT_TURN_SECONDS = 0.00025
CLIENTS_PER_TURN = 2

# Feed and tasks.
KEEP_EVENTS_BYTES = 16 * MIB  # for replay
EVENT_OVERHEAD_BYTES = 200  # in memory, beyond the text
KEEP_ALL_OUTPUT_BYTES = 64 * MIB  # of all tasks together
# A pipe's capacity. Escaped as JSON it is below 1 MiB, the usual limit of WebSocket clients.
READ_CHUNK_BYTES = 64 * KIB
OUTPUT_BLOCK_BYTES = 16 * KIB  # of kept output: short chunks are joined
MAX_KINDS = 10000  # kinds of events, mostly tasks, whose seqs are indexed
MAX_CHOSEN_TASKS = 1000  # by one viewer; each costs a look-up per batch
MAX_COMMAND_BYTES = 64 * KIB  # the kernel takes twice that (MAX_ARG_STRLEN)
MAX_NAME_CHARACTERS = 200
MAX_REFS = 10000  # remembered, so that a repeated request starts nothing twice
MAX_TIMEOUT_SECONDS = 366 * 24 * 3600.0
MAX_TERMINAL_SIDE = 9999  # columns or rows
MAX_INPUT_BYTES = 1 * MIB  # that a task has not read yet
TERMINAL_BUFFER_BYTES = 256 * KIB  # more than a pseudo-terminal holds
KILL_GRACE_SECONDS = 3.0  # from the first signal to KILL; HELP and UNIT name it, too
WINDOW_SECONDS = 60.0  # a task with a window waits so long for its reader
# A task with a window keeps KEEP_TIMES as much as --keep-output says: a cut connection loses what
# the kernel holds for its reader, up to 32 MiB (tcp_rmem).
KEEP_TIMES = 5

# Access.
MIN_TOKEN_CHARACTERS = 16
MAX_WRONG_TOKENS = 10  # in WRONG_TOKEN_SECONDS, from one address
WRONG_TOKEN_SECONDS = 60.0
MAX_LIMITED_SOURCES = 4096  # addresses that a RateLimit remembers

# Audit log.
MAX_REFUSALS = 100  # recorded at once, then one a second: nobody can fill the disk
LOCK_SECONDS = 1.0  # to wait for a file's lock, held for 0.05 ms unless its holder hangs
LOCKED_SECONDS = 0.001  # instead, after a wait in vain: the event loop stands still meanwhile

FRESH_SECONDS = 1.0  # /metrics samples again if the newest sample is older (except CPU)

# Alert webhook.
WEBHOOK_SECONDS = 10.0  # to connect, and again to get the answer
WEBHOOK_PAUSES = (1.0, 5.0)  # before another try: the receiver may be restarting
MAX_WEBHOOK_ALERTS = 100  # then the oldest is dropped: the newest matters most

# Discovery (UDP).
DISCOVERY_PROBE = b"DISCOVER_SERVER"
MAX_DISCOVERY_REPLY_BYTES = 256  # small, so that the server amplifies no flood
MAX_REPLIES_PER_SECOND = 50
MAX_REPLIES_PER_SOURCE = 5

# Server.
PORT_TRIES = 100  # from the wanted port on
LISTEN_BACKLOG = 1024  # for bursts of reconnecting viewers
ACCEPTS_PER_TURN = 16  # then those that were accepted are served
HANDSHAKE_SECONDS = 10.0  # TLS
TLS_GOODBYE_SECONDS = 0.5  # between looks whether a closed connection has sent all
MAX_NEWCOMERS = 64  # connections not past the gate, which else could take all places
NEWCOMER_GRACE_SECONDS = 3.0  # for their TLS handshakes: a core does 300 a second
MAX_BURST = 512  # more newcomers are a flood: then none is spared
SPARE_DESCRIPTORS = 32  # for listeners and files
SWEEP_SECONDS = 0.5  # between checks of deadlines
STOP_SECONDS = KILL_GRACE_SECONDS + 4.0  # then the server ends, whoever hangs
LOG_LINE_BYTES = 4096  # PIPE_BUF: a pipe that polls writable takes it without blocking

# Client.
CONNECT_SECONDS = 4.0  # a lost SYN is sent again after 1 s and 3 s
ANSWER_SECONDS = 15.0  # for the head of an answer, and again for its body
CLIENT_BUFFER_BYTES = 256 * KIB
MAX_EVENT_BYTES = KEEP_EVENTS_BYTES  # a server sends no larger one
MAX_EVENT_FRAGMENTS = 1024  # a proxy may split it into pieces of 16 KiB
MAX_OPEN_BYTES = MAX_EVENT_BYTES  # remembered of running tasks; one `hello` lists them
MAX_ANSWER_BYTES = KEEP_ALL_OUTPUT_BYTES + MIB  # kept output is the longest
RETRY_SECONDS = 0.25  # before the first retry; doubled with each failure
MAX_RETRY_SECONDS = 1.5  # a server that is back is noticed within 5 s
REFUSED_RETRY_SECONDS = 20.0  # a wrong token does not become right by itself
SILENCE_SECONDS = 4.0  # the monitor tells within 5 s that a server is silent
BEAT_SECONDS = 5.0  # between `exec`'s questions how its task stands
EXEC_GIVE_UP_SECONDS = WINDOW_SECONDS  # without a connection
EXEC_WINDOW_BYTES = 1 * MIB  # of one server: 64 such tasks fill its kept output
EXEC_WINDOWS_BYTES = 16 * MIB  # of all servers
INPUT_PAUSE_SECONDS = 0.1  # while a task does not read
FINISH_SECONDS = 1.0  # to write what is left when the client ends
REFUSED = range(400, 500)  # with these, the same request would fail again (RFC 9110, 15.5)
# Two states of an UnreachableError that no server has sent.
SAME_STATUS = 208  # a server named twice: its other name runs the command
ENDED_STATUS = 410  # contact was lost, but the command has ended
UNREACHABLE_STATUS = 125  # as `docker run` and `timeout` exit for their own failures
MAX_LINE_BYTES = 64 * KIB  # of output where several servers write; longer ones are cut
LOG_ERROR_SECONDS = 60.0  # between complaints about an audit log or the monitor's
MAX_WAITING_BYTES = 16 * MIB  # for the monitor's log; beyond, a gap is recorded
MAX_STATS_BYTES = 64 * KIB  # of a server's newest statistics, which take less than 1 KiB
MAX_ENDED_TASKS = 10000  # remembered per server, so that none is recorded twice
LOG_TAIL_BYTES = 16 * MIB  # of its log that the monitor reads when it starts
LOG_STEP_BYTES = LOG_TAIL_BYTES // 4  # between its `position` records
MAX_TOLD_ENDED = 200000  # ids of ended tasks in these records, of all servers: 2 MiB
MAX_FOUND_SERVERS = 10000
MAX_REPLIES_OF_ONE = 1000  # per address: 100 servers there may answer six times each
ONCE_SECONDS = 5.0  # for `monitor --once`
BOLD, PLAIN = "\x1b[1m", "\x1b[0m"
COLOURS = ("\x1b[36m", "\x1b[33m", "\x1b[32m", "\x1b[35m", "\x1b[34m", "\x1b[31m")
# Of a server's row, by its state; "" is the title row.
STATE_COLOURS = {
    "": "\x1b[7m",
    "silent": "\x1b[1;31m",
    "unreachable": "\x1b[31m",
    "refused": "\x1b[33m",
    "connecting": "\x1b[2m",
}

# 3. Errors ---
# What a user, a peer or the machine causes. Any other exception is a bug.


class ServerControlError(Exception):
    """Base of the errors that are not bugs. One place tells each type to the peer."""


class ConfigError(ServerControlError):
    """An option, variable or file cannot be used: one line on stderr, exit status 2."""


class StartError(ServerControlError):
    """This machine refuses, whatever the options: one line on stderr, exit status 1."""


@dataclass(eq=False, repr=False)
class HttpError(ServerControlError):
    """A request that gets an error as JSON. fields: of the answer, such as `Allow` with 405."""

    status: int
    code: str
    message: str
    fields: Sequence[tuple[str, str]] = ()


class UnreachableError(ServerControlError):
    """A server that cannot be reached, or that refuses. status: of its answer, else 0."""

    def __init__(self, reason: str, status: int = 0) -> None:
        super().__init__(reason)
        self.status = status


class OutputError(ServerControlError):
    """Standard output takes no more: a full disk, or a closed pipe (exit status 141)."""

    def __init__(self, error: OSError) -> None:
        super().__init__(f"standard output: {error.strerror}")
        self.is_closed = error.errno == errno.EPIPE


@dataclass(eq=False, repr=False)
class WebSocketError(ServerControlError):
    """A violation of RFC 6455, or of a limit; it ends the connection."""

    reason: str
    close_code: int = 1002  # CloseCode.PROTOCOL_ERROR


@dataclass(eq=False, repr=False)
class CommandError(ServerControlError):
    """A well-formed request that cannot be carried out, over HTTP or WebSocket."""

    code: str
    message: str


def explain(error: Exception) -> str:
    """Return the system's words for what failed, or else Python's."""
    return str(getattr(error, "strerror", None) or error)


# CommandError.code -> HTTP status; else 400. A code that keeps somebody out is in REFUSALS, too.
COMMAND_STATUS = {
    "exec_disabled": 403,
    "forbidden": 403,
    "unknown_task": 404,
    "task_ended": 409,
    "no_input": 409,
    "no_terminal": 409,
    "input_full": 429,
    "too_large": 413,
    "unsupported_media_type": 415,
    "too_many_tasks": 429,
    "spawn_failed": 500,
    "no_resources": 503,
}

# 4. Configuration ---


@dataclass(frozen=True)
class Config:
    """The options of `serve`."""

    # `localhost` is ::1 first on most machines, and many clients try only its first address.
    host: tuple[str, ...] = ("127.0.0.1", "::1")
    port: int = 8080
    ws_port: int = 8082
    discovery_port: int = 8081
    no_discovery: bool = False
    unix: str = ""
    token_file: str = ""
    view_token_file: str = ""
    require_token: bool = False
    no_auth: bool = False
    no_exec: bool = False
    allow_origin: tuple[str, ...] = ()
    allow_host: tuple[str, ...] = ()
    tls_cert: str = ""
    tls_key: str = ""
    audit_log: str = ""
    interval: float = 1.0
    cpu_alert: float = 90.0
    alert_cooldown: float = 60.0
    alert_for: float = 0.0
    alert_webhook: str = ""
    shell: str = "/bin/sh"
    max_tasks: int = 64
    max_clients: int = 10000
    keep_output: int = 8 * MIB
    keep_tasks: int = 200
    compress: str = "auto"
    loop: str = "auto"
    log_format: str = "text"
    log_level: str = "info"

    @property
    def has_tls(self) -> bool:
        return bool(self.tls_cert)

    def limits(self) -> dict[str, int]:
        """As `hello` and `/info` tell them."""
        return {
            "max_tasks": self.max_tasks,
            "max_clients": self.max_clients,
            "max_message_bytes": MAX_MESSAGE_BYTES,
            "max_body_bytes": MAX_BODY_BYTES,
            "max_command_bytes": MAX_COMMAND_BYTES,
            "keep_output_bytes": self.keep_output,
            "keep_events_bytes": KEEP_EVENTS_BYTES,
            "keep_tasks": self.keep_tasks,
        }


# 5. HTTP messages ---
# HTTP/1.1 (RFC 9110, RFC 9112), read as strictly as the RFCs allow: if two programs read a message
# differently, a request can be smuggled past one of them.

TOKEN = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")  # RFC 9110, 5.6.2
FIELD_VALUE = re.compile(rb"[\t\x20-\x7e\x80-\xff]*")  # RFC 9110, 5.5, with obs-text
# Absolute-form (RFC 9112, 3.2.2) or origin-form (3.2.1), without "#" and control bytes.
TARGET = re.compile(rb"(?:https?://([^/?#\0-\x20\x7f-\xff]+)|(?=/))([\x21\x22\x24-\x7e]*)", re.I)
DIGITS = re.compile(r"[0-9]{1,18}")  # int() alone takes "1_0", " +5 " and Arabic digits
CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,16})(?:;[\t\x20-\x7e\x80-\xff]{0,255})?")


@dataclass(frozen=True)
class RequestHead:
    """A request line and its header fields: (lower-case name, value), in the order received.

    target: in origin-form. authority: of an absolute-form target, or "".
    """

    method: str
    target: str
    http_1_0: bool
    fields: tuple[tuple[str, str], ...] = ()
    content_length: int = 0
    chunked: bool = False
    authority: str = ""

    @property
    def path(self) -> str:
        """Not decoded: routes match it exactly."""
        return self.target.partition("?")[0]

    @property
    def query(self) -> str:
        return self.target.partition("?")[2]

    @property
    def has_body(self) -> bool:
        return self.chunked or self.content_length > 0

    def values(self, name: str) -> list[str]:
        return [value for key, value in self.fields if key == name]

    def value(self, name: str) -> str | None:
        return next(iter(self.values(name)), None)

    def members(self, name: str) -> list[str]:
        """Return the members of a list with commas (RFC 9110, 5.6.1)."""
        members = (member.strip(" \t") for member in ",".join(self.values(name)).split(","))
        return [member for member in members if member]

    def tokens(self, name: str) -> list[str]:
        return [member.lower() for member in self.members(name)]

    @property
    def keep_alive(self) -> bool:
        """Whether another request may follow (RFC 9112, 9.3)."""
        options = self.tokens("connection")
        return "close" not in options and (not self.http_1_0 or "keep-alive" in options)

    @property
    def media_type(self) -> str:
        """Content-Type without parameters, lower-case, or ""."""
        return (self.value("content-type") or "").partition(";")[0].strip(" \t").lower()


def parse_request_line(line: bytes) -> RequestHead:
    """RFC 9112, 3. Raises HttpError 400, 505."""
    parts = line.split(b" ")
    if len(parts) != 3 or not TOKEN.fullmatch(parts[0]):
        raise HttpError(400, "bad_request", "the request line is malformed")
    method, target, version = parts
    if version not in (b"HTTP/1.0", b"HTTP/1.1"):
        raise HttpError(505, "bad_version", "the request line must end with HTTP/1.1 or HTTP/1.0")
    form = TARGET.fullmatch(target)
    if form is None:
        raise HttpError(400, "bad_target", "the request target must be a path")
    authority, path = (part.decode() for part in form.groups(b""))
    path = path if path.startswith("/") else "/" + path
    return RequestHead(method.decode(), path, version == b"HTTP/1.0", authority=authority)


def parse_field(line: bytes) -> tuple[str, str]:
    """RFC 9112, 5. Raises HttpError 400, also for obs-fold and for space before the colon."""
    name, colon, value = line.partition(b":")
    if not colon or not TOKEN.fullmatch(name) or not FIELD_VALUE.fullmatch(value):
        raise HttpError(400, "bad_field", "a header field is malformed")
    return name.decode().lower(), value.strip(b" \t").decode("latin-1")


def parse_body_framing(head: RequestHead) -> RequestHead:
    """Add the length of the body (RFC 9112, 6). Raises HttpError 400, 413, 415, 501."""
    lengths, codings = head.values("content-length"), head.values("transfer-encoding")
    if lengths and codings:
        raise HttpError(400, "bad_length", "Content-Length and Transfer-Encoding together")
    if set(head.tokens("content-encoding")) - {"identity"}:
        raise HttpError(415, "bad_encoding", "a Content-Encoding is not understood here")
    if codings and head.http_1_0:
        raise HttpError(400, "bad_coding", "Transfer-Encoding does not exist in HTTP/1.0")
    if len(codings) > 1 or "".join(codings).lower().count("chunked") > 1:
        raise HttpError(400, "bad_coding", "Transfer-Encoding must be a single chunked")
    if codings:
        if codings[0].lower() != "chunked":
            raise HttpError(501, "bad_coding", "the only transfer coding known here is chunked")
        return dataclasses.replace(head, chunked=True)
    if not lengths:
        return head
    if len(lengths) > 1 or not re.fullmatch("[0-9]+", lengths[0]):
        raise HttpError(400, "bad_length", "Content-Length must be one number")
    # int() is slow on long numbers.
    if len(lengths[0]) > 18 or int(lengths[0]) > MAX_BODY_BYTES:
        raise HttpError(413, "too_large", f"a body may have {MAX_BODY_BYTES} bytes")
    return dataclasses.replace(head, content_length=int(lengths[0]))


def parse_query(query: str) -> dict[str, str]:
    """Raises HttpError 400. The values of `task`, which may be repeated, are joined with commas."""
    parameters: dict[str, str] = {}
    try:
        pairs = urllib.parse.parse_qsl(query, keep_blank_values=True, errors="strict")
    except UnicodeDecodeError:
        raise HttpError(400, "bad_query", "the query is not UTF-8") from None
    for name, value in pairs:
        if name in parameters and name != "task":
            raise HttpError(400, "bad_query", "a parameter stands twice in the query")
        parameters[name] = f"{parameters[name]},{value}" if name in parameters else value
    return parameters


def parse_flag(parameters: Mapping[str, str], name: str) -> bool:
    """Whether a flag is set, as in `?wait` and `?wait=1`. Raises HttpError 400."""
    value = parameters.get(name, "no").lower()
    is_set = value in ("", "1", "true", "yes")
    if not is_set and value not in ("0", "false", "no"):
        raise HttpError(400, "bad_query", f"{name} is a flag: leave it away or set it to 1")
    return is_set


class HttpParser:
    """Cuts the bytes of one connection into heads and bodies, which next_head() and next_body()
    return in turn; None while bytes are missing. After an HttpError it is of no more use.
    """

    def __init__(self) -> None:
        self._buffer = bytearray()  # not consumed yet
        self._items = self._read_items()  # it stops where bytes are missing
        self._is_in_head = False  # between the request line and the end of the head
        self.head: RequestHead | None = None  # its body comes next

    def feed(self, data: bytes) -> None:
        self._buffer += data

    @property
    def is_idle(self) -> bool:
        return not self._buffer and not self._is_in_head and self.head is None

    def take_rest(self) -> bytes:
        """Return what follows an upgrade's head."""
        self._items.close()  # it and the parser refer to each other
        rest, self._buffer = self._buffer, bytearray()
        return bytes(rest)

    def next_head(self) -> RequestHead | None:
        assert self.head is None, "next_body() comes first"
        head: RequestHead | None = next(self._items)
        return head

    def next_body(self) -> bytes | None:
        assert self.head is not None, "next_head() comes first"
        body: bytes | None = next(self._items)
        return body

    def _read_items(self) -> Generator[Any, None, None]:
        while True:
            self.head = head = yield from self._read_head()
            yield head
            size = head.content_length
            body = yield from self._read_chunked_body() if head.chunked else self._read_bytes(size)
            self.head = None
            yield body

    def _read_head(self) -> Generator[None, None, RequestHead]:
        line, left = b"", MAX_HEAD_BYTES
        too_large = HttpError(431, "head_too_large", "header fields are too many or too long")
        too_long = HttpError(414, "uri_too_long", "the request line is too long")
        while not line:  # RFC 9112, 2.2: empty lines before it are skipped
            while not self._buffer:
                yield
            # A TLS ClientHello, say, is refused at once: it may have no LF.
            if self._buffer[0] != 0x0D and not TOKEN.match(self._buffer[:1]):
                raise HttpError(400, "bad_request", "this does not begin like an HTTP request")
            line = yield from self._read_line(MAX_REQUEST_LINE_BYTES, too_long)
            left -= len(line) + 2
            if left < 0:
                raise too_large
        head = parse_request_line(line)  # at once, since an HTTP/0.9 client sends nothing else
        self._is_in_head = True
        fields = yield from self._read_fields(left, too_large)
        self._is_in_head = False
        return parse_body_framing(dataclasses.replace(head, fields=tuple(fields)))

    def _read_fields(
        self, left: int, too_large: HttpError
    ) -> Generator[None, None, list[tuple[str, str]]]:
        """Take fields and the empty line after them."""
        fields: list[tuple[str, str]] = []
        while line := (yield from self._read_line(min(left, MAX_FIELD_BYTES), too_large)):
            left -= len(line) + 2
            if left < 2 or len(fields) == MAX_FIELDS:
                raise too_large
            fields.append(parse_field(line))
        return fields

    def _read_line(self, limit: int, too_long: HttpError) -> Generator[None, None, bytes]:
        scanned = 0  # a line that arrives byte by byte is searched once
        while (end := self._buffer.find(b"\n", scanned)) < 0:
            # The CR may have come before the LF.
            if len(self._buffer) - self._buffer.endswith(b"\r") > limit:
                raise too_long
            scanned = len(self._buffer)
            yield
        if end > limit + 1:
            raise too_long
        line = yield from self._read_bytes(end + 1)
        if not line.endswith(b"\r\n"):
            raise HttpError(400, "bad_line", "a line does not end with CRLF")
        return line[:-2]

    def _read_bytes(self, count: int) -> Generator[None, None, bytes]:
        while len(self._buffer) < count:
            yield
        data = bytes(self._buffer[:count])
        del self._buffer[:count]
        return data

    def _read_chunked_body(self) -> Generator[None, None, bytes]:
        """RFC 9112, 7.1."""
        body = bytearray()
        bad_size = HttpError(400, "bad_chunk", "a chunk size is malformed")
        while True:
            line = yield from self._read_line(MAX_CHUNK_LINE_BYTES, bad_size)
            match = CHUNK_SIZE.fullmatch(line)
            if match is None:
                raise bad_size
            size = int(match[1], 16)
            if len(body) + size > MAX_BODY_BYTES:
                raise HttpError(413, "too_large", f"a body may have {MAX_BODY_BYTES} bytes")
            if size == 0:
                break
            body += yield from self._read_bytes(size)
            if (yield from self._read_bytes(2)) != b"\r\n":  # h11 took any bytes: CVE-2025-43859
                raise HttpError(400, "bad_chunk", "chunk data is not followed by CRLF")
        too_large = HttpError(431, "trailers_too_large", "trailers are too many or too long")
        yield from self._read_fields(MAX_TRAILER_BYTES, too_large)  # they are not used
        return bytes(body)


def encode_fields(fields: Iterable[tuple[str, str]]) -> bytes:
    return "".join(f"{name}: {value}\r\n" for name, value in fields).encode("latin-1") + b"\r\n"


def encode_response_head(status: int, fields: Iterable[tuple[str, str]]) -> bytes:
    line = f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}\r\n"
    return line.encode() + encode_fields(fields)


def encode_chunk(data: bytes) -> bytes:
    """RFC 9112, 7.1. data: not empty, which would be the end."""
    return b"%x\r\n%b\r\n" % (len(data), data)


# 6. Access ---
# The gate: check_access decides about every request and upgrade, by these rules, in this order:
#
#   1. Syntax. There is exactly one well-formed Host (HTTP/1.0 may have none). Else 400.
#   2. Origin. A browser names the page that sends the request: the server's own, or one that
#      --allow-origin lists. The same goes for Sec-Fetch-Site, but a link on any site may open the
#      page `/`. Else 403. A browser's POST must be JSON (else 415): any page may send a form.
#   3. Token. The right one gives its role. A wrong one is 401, even where none is needed. One in a
#      URL (`?token=`) is 401, right or wrong, since URLs end up in logs and histories.
#   4. Implicit trust. On a loopback listener or a Unix socket, a process of the server's own
#      account may do everything, if the Host is a loopback name (else 403: DNS rebinding), and no
#      proxy has marked the request (else 401). Not with --require-token.
#   5. `GET /` and `GET /health` hold no data: they need only rules 1 and 2 and, on loopback, the
#      Host rule. So does a preflight of a listed origin, which has no token. All else is 401.
#
# With --no-auth there are no tokens; rule 4 asks only for a Host that an attacker's DNS cannot
# choose.

HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[0-9A-Za-z._-]+)(?::([0-9]{1,5}))?")
SOCK_DIAG_BY_FAMILY = 20  # linux/sock_diag.h
# Fields with which a proxy marks a request, such as X-Forwarded-For (rule 4).
FORWARDED = re.compile("forwarded|x-forwarded-.*|x-real-ip|via|cf-connecting-ip|true-client-ip")
DEFAULT_PORTS = {"http": 80, "https": 443}
TOKEN_TEXT = "[A-Za-z0-9._~+/-]+=*"  # RFC 6750, 2.1: b64token
BEARER = re.compile(f"bearer +({TOKEN_TEXT})", re.ASCII | re.IGNORECASE)
OPAQUE_ORIGINS = ("null", "file://")  # sent by every local file and sandboxed frame
# The usual places: an answer never names the server's own files.
USUAL_TOKEN_FILE = "~/.local/state/servercontrol/token"
TOKEN_PLACES = (
    f"{USUAL_TOKEN_FILE} of the account that started the server, or, if that is a service, in "
    "/var/lib/servercontrol/token"
)


class Role(enum.Enum):
    """VIEW watches; RUN also starts, stops and types. Each has a token."""

    VIEW = "view"
    RUN = "run"


class ListenerKind(enum.Enum):
    """What a listening socket says that it is bound to."""

    LOOPBACK = "loopback"
    NETWORK = "network"
    UNIX = "unix"


@dataclass(frozen=True)
class AccessPolicy:
    """The options of access. own_uid, hostname (lower-case): the server's."""

    own_uid: int = -1
    require_token: bool = False
    no_auth: bool = False
    allow_origins: frozenset[str] = frozenset()
    allow_hosts: frozenset[str] = frozenset()
    hostname: str = ""
    tokens: Mapping[Role, bytes] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class Peer:
    """The other end of a connection. address: an IP literal, "" on a Unix socket.

    uid: the owner of its socket, as the kernel said right after accept; None if it did not say, or
    if either end is not loopback.
    """

    listener: ListenerKind
    address: str = ""
    uid: int | None = None
    scheme: str = "http"

    @property
    def is_local(self) -> bool:
        return self.listener is not ListenerKind.NETWORK


def parse_ip(text: str) -> IpAddress | None:
    """Drop the zone. ::ffff:127.0.0.1 becomes IPv4: to Python before 3.13 it is not loopback."""
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def is_loopback(text: str) -> bool:
    address = parse_ip(text)
    return address is not None and address.is_loopback


def encode_diag_request(peer: Endpoint, local: Endpoint) -> bytes:
    """Ask for the TCP socket with these ends: sock_diag(7)."""
    family = 2 if peer[0].version == 4 else 10  # AF_INET, AF_INET6
    header = struct.pack("=IHHII", 72, SOCK_DIAG_BY_FAMILY, 1, 0, 0)
    kind = struct.pack("=BBBBI", family, 6, 0, 0, 0xFFFFFFFF)  # TCP, in any state
    ends = struct.pack("!HH16s16s", peer[1], local[1], peer[0].packed, local[0].packed)
    return header + kind + ends + struct.pack("=III", 0, 0xFFFFFFFF, 0xFFFFFFFF)  # any interface


def check_owner(state: int, uid: int, inode: int) -> int:
    """Return the uid. Raises ValueError. A socket that its process has closed may have uid 0, but
    then it has no inode.
    """
    # ESTABLISHED, FIN_WAIT1, FIN_WAIT2 (linux/tcp_states.h): it may have ended its sending side.
    if state not in (1, 4, 5) or inode == 0:
        raise ValueError("no connected socket")
    return uid


def parse_diag_reply(reply: bytes) -> int:
    """Return the socket's uid. Raises ValueError."""
    if len(reply) < 88 or struct.unpack_from("=H", reply, 4) != (SOCK_DIAG_BY_FAMILY,):
        raise ValueError("no such socket")
    return check_owner(reply[17], *struct.unpack_from("=II", reply, 80))


def parse_proc_tcp(table: str, peer: Endpoint, local: Endpoint) -> int:
    """The same from /proc/net/tcp or tcp6 (proc(5)). Raises ValueError."""
    ends = ""
    for address, port in (peer, local):
        words = re.findall(b"(?s)....", address.packed)
        digits = "".join(f"{int.from_bytes(word, sys.byteorder):08X}" for word in words)
        ends += f" {digits}:{port:04X}"
    _, found, row = table.partition(ends + " ")
    if not found:
        raise ValueError("no such socket")
    columns = row.split(None, 7)
    return check_owner(int(columns[0], 16), int(columns[4]), int(columns[6]))


def parse_host(value: str) -> tuple[str, int | None]:
    """Return (lower-case name or address, without brackets; port). Raises HttpError 400."""
    match = HOST.fullmatch(value)
    host, port = match.groups() if match else ("", None)
    name = host.lower().strip("[]")
    # RFC 3986, 3.2.2: only IPv6 is in brackets.
    is_wrong = host.startswith("[") and (":" not in name or parse_ip(name) is None)
    if not host or is_wrong or int(port or 0) > 65535:
        raise HttpError(400, "bad_host", "the Host field is malformed")
    return name, int(port) if port else None


def check_host_syntax(head: RequestHead) -> str | None:
    """Rule 1. Return the Host field, if any. Raises HttpError 400."""
    hosts = head.values("host")
    if len(hosts) > 1 or (not hosts and not head.http_1_0):
        raise HttpError(400, "bad_host", "exactly one Host field is needed")
    if hosts:
        parse_host(hosts[0])
    if head.authority and [head.authority.lower()] != [host.lower() for host in hosts]:
        raise HttpError(400, "bad_host", "the target and the Host field name different servers")
    return head.value("host")


def check_origin(policy: AccessPolicy, scheme: str, host: str | None, head: RequestHead) -> None:
    """Rule 2. Raises HttpError 403, 415."""
    origins = head.values("origin")
    origin = origins[0] if len(origins) == 1 else ""
    listed = origin in policy.allow_origins
    default = f":{DEFAULT_PORTS[scheme]}"  # may be left out
    own = f"{scheme}://{host.lower().removesuffix(default)}" if host else None
    if origins and not listed and origin.lower().removesuffix(default) != own:
        name = origin if re.fullmatch(r"[!-~]{1,200}", origin) else "ORIGIN"
        message = f"this web page may not use this server, unless it has --allow-origin {name}"
        raise HttpError(403, "bad_origin", message)
    site, mode, dest = (head.value(f"sec-fetch-{name}") for name in ("site", "mode", "dest"))
    is_visit = (head.method, head.path, mode, dest) == ("GET", "/", "navigate", "document")
    if site in ("cross-site", "same-site") and not listed and not is_visit:
        message = "another site's page may not use this server, unless --allow-origin names it"
        raise HttpError(403, "bad_origin", message)
    from_browser = bool(origins) or any(name.startswith("sec-fetch-") for name, _ in head.fields)
    form = head.has_body and head.media_type != "application/json"
    if from_browser and head.method == "POST" and form:
        raise HttpError(415, "json_only", "from a browser the body must be application/json")


def is_forwarded(head: RequestHead) -> bool:
    return any(FORWARDED.fullmatch(name) for name, _ in head.fields)


def is_trusted_host(policy: AccessPolicy, host: str | None) -> bool:
    """The Host rule: whether an attacker's DNS cannot point this name at this server."""
    if host is None:
        return False
    name, _ = parse_host(host)
    if name == "localhost" or policy.allow_hosts & {name, host.lower()}:
        return True
    if policy.no_auth:
        return parse_ip(name) is not None or name == policy.hostname
    return is_loopback(name)


def find_tokens(head: RequestHead) -> list[bytes]:
    """A malformed token becomes b"", which is wrong. Browsers cannot add fields to an upgrade: they
    send it in the subprotocol `bearer.T`.
    """
    matches = map(BEARER.fullmatch, head.values("authorization"))
    offers = head.members("sec-websocket-protocol")
    shown = [match.group(1) if match else "" for match in matches]
    shown += [one.partition(".")[2] for one in offers if one.startswith("bearer.")]
    return [one.encode("latin-1") for one in shown]


def unauthorized(code: str, message: str, challenge: str = "Bearer") -> HttpError:
    """A 401 must name the scheme (RFC 9110, 15.5.2)."""
    return HttpError(401, code, message, [("WWW-Authenticate", challenge)])


def check_tokens(policy: AccessPolicy, head: RequestHead) -> Role | None:
    """Rule 3. Return the role, None without a token. Raises HttpError 401."""
    if "token" in urllib.parse.parse_qs(head.query, keep_blank_values=True):
        message = "a token does not belong into an address; send Authorization: Bearer TOKEN"
        raise unauthorized("token_in_query", message)
    shown = [] if policy.no_auth else find_tokens(head)
    if not shown:
        return None
    # Constant time, and all are compared: timing reveals nothing.
    pairs = itertools.product(shown, policy.tokens.items())
    roles = [role for one, (role, token) in pairs if secrets.compare_digest(one, token)]
    if len(shown) != 1 or len(roles) != 1:
        message = "this token is not right; the server's token file has the one that is"
        raise unauthorized("wrong_token", message, 'Bearer error="invalid_token"')
    return roles[0]


def is_trusted_process(policy: AccessPolicy, peer: Peer) -> bool:
    """Whether the kernel says that the peer is a process of the server's own account."""
    return peer.is_local and peer.uid == policy.own_uid and not policy.require_token


def is_preflight(head: RequestHead) -> bool:
    return head.method == "OPTIONS" and bool(head.values("access-control-request-method"))


def explain_refusal(policy: AccessPolicy, peer: Peer, head: RequestHead) -> str:
    """Say why a token is needed, and where it is."""
    reason = "a token is needed"
    if peer.is_local and not policy.require_token:
        if is_forwarded(head):
            reason = "a request that a proxy forwards needs a token"
        elif peer.uid is None:
            reason = "the kernel does not say which account you are, so a token is needed"
        else:
            reason = "this server was started by another account, so a token is needed"
    if not policy.tokens:
        return f"{reason}, and there is none: this server has no state folder, as its log says"
    return f"{reason}; send Authorization: Bearer TOKEN. It is in {TOKEN_PLACES}"


def check_access(policy: AccessPolicy, peer: Peer, head: RequestHead) -> Role | None:
    """Return a request's role, or None by rule 5. Raises HttpError 400, 401, 403, 415."""
    host = check_host_syntax(head)
    check_origin(policy, peer.scheme, host, head)
    role = check_tokens(policy, head)
    if role is not None:
        return role
    if head.value("origin") in OPAQUE_ORIGINS and not is_preflight(head):
        message = "a page without an origin of its own needs a token, whoever opens it"
        raise unauthorized("unauthorized", message + "; send Authorization: Bearer TOKEN")
    if (policy.no_auth or peer.is_local) and not is_trusted_host(policy, host):
        name = parse_host(host)[0] if host else "NAME"
        message = f"this Host is not served; start the server with --allow-host {name}"
        raise HttpError(403, "bad_host", message)
    if policy.no_auth:
        return Role.RUN
    if is_trusted_process(policy, peer) and not is_forwarded(head):
        return Role.RUN
    # An upgrade on `/` is not the page: it would receive every event.
    is_page = head.method in ("GET", "HEAD") and not head.values("upgrade")
    if is_page and head.path in ("/", "/health"):
        return None
    if is_preflight(head) and head.value("origin") in policy.allow_origins:
        return None
    raise unauthorized("unauthorized", explain_refusal(policy, peer, head))


def find_host_key(address: str) -> str:
    """Limits count a host by its IPv4 address, or its IPv6 /64, which may be all its own."""
    ip = parse_ip(address)
    return ip.packed[:8].hex() if ip and ip.version == 6 else str(ip)


@dataclass(repr=False)
class RateLimit:
    """Each source may do something `count` times in any `seconds`."""

    count: int
    seconds: float
    # Source -> times of its last actions; the source that acted last is last.
    _times: OrderedDict[str, deque[float]] = field(default_factory=OrderedDict)

    def take(self, source: str, now: float) -> float:
        """Return how many seconds to wait. If none, count this action."""
        times = self._times.setdefault(source, deque(maxlen=self.count))
        if len(times) == self.count and now - times[0] < self.seconds:
            return times[0] + self.seconds - now
        times.append(now)
        self._times.move_to_end(source)
        if len(self._times) > MAX_LIMITED_SOURCES:
            self._times.popitem(last=False)
        return 0.0


# 7. WebSocket handshake and frames ---
# RFC 6455, sections 4 and 5, for both roles: only clients mask their frames. The only extension is
# permessage-deflate (RFC 7692), without context takeover: each message is compressed by itself. So
# one compression of an event serves all viewers, and no connection keeps a window.

UPGRADE_FIELDS = (("Upgrade", "websocket"), ("Connection", "Upgrade"))  # sent by both sides (1.3)


class Opcode(enum.IntEnum):
    """RFC 6455, 5.2."""

    CONTINUATION = 0x0
    TEXT = 0x1
    BINARY = 0x2
    CLOSE = 0x8
    PING = 0x9
    PONG = 0xA


class CloseCode(enum.IntEnum):
    """RFC 6455, 7.4.1: those that this file sends."""

    GOING_AWAY = 1001
    PROTOCOL_ERROR = 1002
    UNSUPPORTED_DATA = 1003
    INVALID_DATA = 1007
    POLICY_VIOLATION = 1008
    MESSAGE_TOO_BIG = 1009
    INTERNAL_ERROR = 1011


# Registered codes that may be sent, and those of applications (7.4).
VALID_CLOSE_CODES = {*range(1000, 1004), *range(1007, 1015), *range(3000, 5000)}


class FrameHeader(NamedTuple):
    """What precedes a payload. mask: 4 bytes. size: of this header. is_deflated: RSV1."""

    fin: bool
    opcode: Opcode
    mask: bytes | None
    length: int
    size: int
    is_deflated: bool


def compute_accept(key: str) -> str:
    """RFC 6455, 4.2.2."""
    digest = hashlib.sha1(key.encode() + WEBSOCKET_GUID).digest()
    return base64.b64encode(digest).decode()


def is_upgrade(head: RequestHead) -> bool:
    return "upgrade" in head.tokens("connection") and bool(head.values("upgrade"))


def upgrade_required(message: str) -> HttpError:
    """RFC 6455, 4.4."""
    fields = [*UPGRADE_FIELDS, ("Sec-WebSocket-Version", WEBSOCKET_VERSION)]
    return HttpError(426, "upgrade_required", message, fields)


def check_upgrade(head: RequestHead) -> str:
    """Return the key (RFC 6455, 4.2.1). Raises HttpError 400, 405, 426."""
    if head.method != "GET":
        raise HttpError(405, "not_get", "a WebSocket upgrade is a GET", [("Allow", "GET")])
    if head.http_1_0 or head.has_body or "websocket" not in head.tokens("upgrade"):
        raise HttpError(400, "bad_upgrade", "the only upgrade known here is a WebSocket's")
    if head.values("sec-websocket-version") != [WEBSOCKET_VERSION]:
        raise upgrade_required("WebSocket version 13 is needed")
    keys = head.values("sec-websocket-key")
    if len(keys) != 1 or not re.fullmatch("[A-Za-z0-9+/]{22}==", keys[0]):
        raise HttpError(400, "bad_key", "one Sec-WebSocket-Key of 16 bytes is needed")
    return keys[0]


# A name, with a value that may be quoted (RFC 6455, 9.1, with the white space of RFC 2616).
EXTENSION_WORD = re.compile(
    r"""[\t ]*(T+)[\t ]*(?:=[\t ]*(?:(T+)|"((?:\\?T)+)")[\t ]*)?""".replace(
        "T", "[!#$%&'*+.^_`|~0-9A-Za-z-]"
    )
)
# The values of each parameter (RFC 7692, 7.1); "" stands for none.
DEFLATE_PARAMETERS = {
    "server_no_context_takeover": "",
    "client_no_context_takeover": "",
    "server_max_window_bits": "[89]|1[0-5]",
    "client_max_window_bits": "|[89]|1[0-5]",
}
DEFLATE = "permessage-deflate"
DEFLATE_ANSWER = f"{DEFLATE}; server_no_context_takeover; client_no_context_takeover"
SMALL_WINDOW_BITS = 9  # for every window below 15: an event has at most two compressed forms


def parse_extensions(text: str) -> list[tuple[str, list[tuple[str, str]]]]:
    """Return extensions with their parameters. Raises ValueError."""
    extensions = []
    for member in text.split(","):  # a quoted value is a token, too: it has no comma or semicolon
        if not member.strip("\t "):  # empty members are allowed
            continue
        words = [EXTENSION_WORD.fullmatch(word) for word in member.split(";")]
        pairs = [(one[1], (one[2] or one[3] or "").replace("\\", "")) for one in words if one]
        if len(pairs) < len(words) or pairs[0][1]:  # an extension has no value
            raise ValueError("an extension is malformed")
        extensions.append((pairs[0][0], pairs[1:]))
    return extensions


def parse_deflate_parameters(parameters: list[tuple[str, str]]) -> dict[str, int] | None:
    """A parameter without a value is 0. Return None if one is wrong."""
    found: dict[str, int] = {}
    for name, value in parameters:
        fit = DEFLATE_PARAMETERS.get(name)
        if fit is None or name in found or not re.fullmatch(fit, value):
            return None
        found[name] = int(value or 0)
    return found


def choose_deflate(head: RequestHead) -> tuple[str, int]:
    """Return the answer to the first offer that can be met (zlib has no window of 8 bits), and the
    window bits to compress with; or ("", 0). Raises HttpError 400 (RFC 6455, 9.1).
    """
    try:
        offers = parse_extensions(",".join(head.values("sec-websocket-extensions")))
    except ValueError as error:
        raise HttpError(400, "bad_extension", str(error)) from None
    for name, parameters in offers:
        found = parse_deflate_parameters(parameters) if name == DEFLATE and zlib else None
        bits = 8 if found is None else found.get("server_max_window_bits", 0)
        if bits != 8:
            answer = DEFLATE_ANSWER + (f"; server_max_window_bits={bits}" if bits else "")
            return answer, SMALL_WINDOW_BITS if 0 < bits < 15 else 15
    return "", 0


def encode_upgrade_response(head: RequestHead, key: str, extension: str = "") -> bytes:
    fields = [*UPGRADE_FIELDS, ("Sec-WebSocket-Accept", compute_accept(key))]
    if WEBSOCKET_PROTOCOL in head.members("sec-websocket-protocol"):  # case matters
        fields.append(("Sec-WebSocket-Protocol", WEBSOCKET_PROTOCOL))
    if extension:
        fields.append(("Sec-WebSocket-Extensions", extension))
    return encode_response_head(101, fields)


def apply_mask(data: bytes, mask: bytes, offset: int = 0) -> bytes:
    """XOR data with the mask, which began `offset` bytes earlier (RFC 6455, 5.3)."""
    # Two long integers do 400 MB/s, a loop over bytes 20 MB/s.
    size, start = len(data), offset % 4
    key = (mask * (size // 4 + 2))[start : start + size]
    xored = int.from_bytes(data, "little") ^ int.from_bytes(key, "little")
    return xored.to_bytes(size, "little")


def encode_frame(
    opcode: Opcode, payload: bytes, mask: bytes | None = None, is_deflated: bool = False
) -> bytes:
    """Return a message as one frame (RFC 6455, 5.2). mask: a client's 4 random bytes."""
    first = 0x80 | (0x40 if is_deflated else 0) | opcode
    mask_bit = 0 if mask is None else 0x80
    length = len(payload)
    if length < 126:
        header = struct.pack("!BB", first, mask_bit | length)
    elif length < 65536:
        header = struct.pack("!BBH", first, mask_bit | 126, length)
    else:
        header = struct.pack("!BBQ", first, mask_bit | 127, length)
    return header + (payload if mask is None else mask + apply_mask(payload, mask))


DEFLATE_TAIL = b"\0\0\xff\xff"  # of a flush; it is not sent (RFC 7692, 7.2.1)
# A final empty block, which ends the stream only if the block before it is whole.
INFLATE_TAIL = DEFLATE_TAIL + b"\x03\0"


def deflate(payload: bytes, bits: int) -> bytes:
    """Compress a payload; return b"" if that does not pay."""
    if not MIN_DEFLATE_BYTES <= len(payload) <= MAX_DEFLATE_BYTES:
        return b""
    level = 6 if len(payload) <= FINE_BYTES else 1
    compressor = zlib.compressobj(level, zlib.DEFLATED, -bits)
    data = compressor.compress(payload) + compressor.flush(zlib.Z_SYNC_FLUSH)
    data = data[: -len(DEFLATE_TAIL)]
    return data if len(data) < len(payload) else b""


def deflate_frame(frame: bytes, bits: int) -> bytes:
    """Compress a server's text frame, if that pays."""
    data = deflate(frame[{126: 4, 127: 10}.get(frame[1], 2) :], bits)
    return encode_frame(Opcode.TEXT, data, is_deflated=True) if data else frame


def parse_frame_header(data: bytearray, deflates: bool = False) -> FrameHeader | None:
    """Return None until it is whole (RFC 6455, 5.2). Raises WebSocketError, also before that."""
    if len(data) < 2:
        return None
    fin, opcode, length = bool(data[0] & 0x80), data[0] & 0x0F, data[1] & 0x7F
    may_deflate = deflates and opcode in (Opcode.TEXT, Opcode.BINARY)  # RFC 7692, 6
    if data[0] & (0x30 if may_deflate else 0x70):
        raise WebSocketError("reserved bit set")
    if opcode & 7 > 2:  # 3 to 7 and 11 to 15
        raise WebSocketError("reserved opcode")
    if opcode >= Opcode.CLOSE and (not fin or length > MAX_CONTROL_PAYLOAD_BYTES):  # 5.5
        raise WebSocketError("control frame fragmented or too long")
    start = 2 + {126: 2, 127: 8}.get(length, 0)
    if len(data) < start:
        return None
    if start > 2:
        length = int.from_bytes(data[2:start], "big")
        if not (126 if start == 4 else 65536) <= length < 2**63:
            raise WebSocketError("frame length not in its shortest form")
    end = start + (4 if data[1] & 0x80 else 0)
    if len(data) < end:
        return None
    mask = bytes(data[start:end]) or None
    return FrameHeader(fin, Opcode(opcode), mask, length, end, bool(data[0] & 0x40))


def parse_close_payload(payload: bytes) -> tuple[int | None, str]:
    """Return (code, reason) (5.5.1). Raises WebSocketError."""
    if not payload:
        return None, ""
    code = int.from_bytes(payload[:2], "big")
    if code not in VALID_CLOSE_CODES:  # nor is a single byte a code
        raise WebSocketError("invalid close code")
    try:
        return code, payload[2:].decode()
    except UnicodeDecodeError:
        raise WebSocketError("close reason is not UTF-8", CloseCode.INVALID_DATA) from None


def encode_close_payload(code: int, reason: str = "") -> bytes:
    """The reason is cut to fit, on a character."""
    text = reason.encode()[: MAX_CONTROL_PAYLOAD_BYTES - 2].decode("utf-8", "ignore")
    return struct.pack("!H", code) + text.encode()


# 8. WebSocket connection ---
# RFC 6455, sections 5.4 to 8.1, for both roles: bytes go in; messages and frames to send come out.
#
#   OPEN -- close() --> CLOSING -- peer's close, or a violation --> CLOSED
#   OPEN -- peer's close, or a violation, which is answered --> CLOSED
#
# After a violation nothing more is read. Text is checked as it arrives, also inside a frame.

UTF8_DECODER = codecs.getincrementaldecoder("utf-8")
# One reason for both: which is found first may depend on how the bytes were cut.
BAD_DATA = ("text is not UTF-8, or compressed data is damaged", CloseCode.INVALID_DATA)


class WebSocketState(enum.Enum):
    """CLOSING: our close frame was sent. CLOSED: nothing more is read."""

    OPEN = "open"
    CLOSING = "closing"
    CLOSED = "closed"


class Message(NamedTuple):
    """TEXT has str; BINARY, PING, PONG and CLOSE have bytes."""

    opcode: Opcode
    data: str | bytes


class DataMessage:
    """A message whose fragments are arriving (5.4)."""

    def __init__(self, first: FrameHeader, max_bytes: int) -> None:
        self.opcode = first.opcode
        self.max_bytes = max_bytes
        self.parts: list[Any] = []
        # Bytes of the parts; bytes of the frames, as their headers say; number of frames.
        self.size = self.wire_size = self.fragments = 0
        self.decoder = UTF8_DECODER() if first.opcode is Opcode.TEXT else None
        # -15 takes all smaller windows, too.
        self.inflater = zlib.decompressobj(-15) if first.is_deflated else None

    def add(self, part: bytes, is_last: bool) -> None:
        """Take a part of a frame's payload. Raises WebSocketError."""
        left = self.max_bytes - self.size
        if self.inflater:
            part = self._inflate(self.inflater, part, left, is_last)
        self.size += len(part)
        is_too_big = len(part) > left
        try:
            is_end = is_last and not is_too_big
            self.parts.append(self.decoder.decode(part, is_end) if self.decoder else part)
        except UnicodeDecodeError:
            raise WebSocketError(*BAD_DATA) from None
        if is_too_big:  # after inflating; a plain message was measured by its headers
            raise WebSocketError("message too big", CloseCode.MESSAGE_TOO_BIG)

    def _inflate(self, inflater: Any, part: bytes, left: int, is_last: bool) -> bytes:
        """RFC 7692, 7.2.2. At most one byte beyond `left`: a small frame cannot fill the memory."""
        try:
            data: bytes = inflater.decompress(part + INFLATE_TAIL if is_last else part, left + 1)
        except zlib.error:
            raise WebSocketError(*BAD_DATA) from None
        # After a final block only the bytes of 7.2.3.4 may follow.
        is_whole = inflater.eof and inflater.unused_data in (b"", b"\0" + INFLATE_TAIL)
        if is_last and not is_whole and len(data) <= left:
            raise WebSocketError(*BAD_DATA)
        return data


def take_payload(buffer: bytearray, header: FrameHeader, start: int) -> bytes:
    """Take what has come of a payload. start: how many of its bytes were taken before."""
    part = bytes(buffer[: header.length - start])
    del buffer[: len(part)]
    return part if header.mask is None else apply_mask(part, header.mask, start)


def take_messages(
    buffer: bytearray, is_server: bool, deflates: bool, max_bytes: int, max_fragments: int
) -> Iterator[Message | None]:
    """Yield messages, None whenever more bytes are needed. Raises WebSocketError."""
    message: DataMessage | None = None
    while True:
        header = parse_frame_header(buffer, deflates)
        if header is None:
            yield None
            continue
        del buffer[: header.size]
        if (header.mask is not None) != is_server:  # 5.1
            raise WebSocketError("wrongly masked frame")
        if header.opcode >= Opcode.CLOSE:  # it may stand between two fragments
            while len(buffer) < header.length:
                yield None
            yield Message(header.opcode, take_payload(buffer, header, 0))
            continue
        if (header.opcode is Opcode.CONTINUATION) == (message is None):  # 5.4
            raise WebSocketError("fragment out of sequence")
        message = message or DataMessage(header, max_bytes)
        message.fragments += 1
        message.wire_size += header.length
        # Compressing may make data a little longer.
        if message.wire_size > max_bytes * (2 if message.inflater else 1):
            raise WebSocketError("message too big", CloseCode.MESSAGE_TOO_BIG)
        if message.fragments > max_fragments:
            raise WebSocketError("too many fragments", CloseCode.MESSAGE_TOO_BIG)
        taken, is_whole = 0, False
        while not is_whole:
            part = take_payload(buffer, header, taken)
            taken += len(part)
            is_whole = taken == header.length
            message.add(part, is_whole and header.fin)
            if not is_whole:
                yield None
        if header.fin:
            yield Message(message.opcode, ("" if message.decoder else b"").join(message.parts))
            message = None


class WebSocketConnection:
    """One end of a connection. make_mask: returns 4 unpredictable bytes (5.3); None for a server.

    deflate_bits: the window to compress with; 0 without permessage-deflate.
    """

    __slots__ = (
        "state close_code close_reason deflate_bits answer _make_mask _buffer _messages"
    ).split()

    def __init__(
        self,
        make_mask: Callable[[], bytes] | None = None,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
        max_fragments: int = MAX_FRAGMENTS,
        deflate_bits: int = 0,
    ) -> None:
        self.state = WebSocketState.OPEN
        # How it ended: the peer's code and reason, or those of its violation.
        self.close_code: int | None = None
        self.close_reason = ""
        self.answer = b""  # the close frame to send then, unless ours was sent before
        self.deflate_bits = deflate_bits
        self._make_mask = make_mask
        self._buffer = bytearray()  # not parsed yet
        self._messages = take_messages(
            self._buffer, make_mask is None, deflate_bits > 0, max_message_bytes, max_fragments
        )

    def encode(self, opcode: Opcode, payload: bytes) -> bytes:
        """Return a frame. Text and binary messages may be compressed."""
        mask = self._make_mask and self._make_mask()
        may_deflate = self.deflate_bits and opcode in (Opcode.TEXT, Opcode.BINARY)
        data = deflate(payload, self.deflate_bits) if may_deflate else b""
        return encode_frame(opcode, data or payload, mask, is_deflated=bool(data))

    def close(self, code: int, reason: str = "") -> bytes:
        """Return the close frame; b"" if it was sent before."""
        if self.state is not WebSocketState.OPEN:
            return b""
        self.state = WebSocketState.CLOSING
        return self.encode(Opcode.CLOSE, encode_close_payload(code, reason))

    def take(self, data: bytes) -> Iterator[Message]:
        """Yield the messages that these bytes complete. A violation makes the state CLOSED; it does
        not raise. After the caller's close() all but a close frame is ignored (1.4).
        """
        self._buffer += data
        try:
            while self.state is not WebSocketState.CLOSED:
                message = next(self._messages)
                if message is None:
                    return
                if message.opcode is Opcode.CLOSE:
                    assert isinstance(message.data, bytes)
                    # 5.5.1: the answer echoes the code.
                    self._end(*parse_close_payload(message.data), message.data[:2])
                elif self.state is not WebSocketState.OPEN:
                    continue
                yield message
        except WebSocketError as error:
            answer = encode_close_payload(error.close_code, error.reason)
            self._end(error.close_code, error.reason, answer)
        self._buffer.clear()

    def receive(self, data: bytes) -> list[Message]:
        return list(self.take(data))

    def _end(self, code: int | None, reason: str, answer: bytes) -> None:
        self.close_code, self.close_reason = code, reason
        if self.state is WebSocketState.OPEN:
            self.answer = self.encode(Opcode.CLOSE, answer)
        self.state = WebSocketState.CLOSED


# 9. Statistics and alerts ---
# A Sample is what the kernel counts; two of them give rates. Time is monotonic.


class Sample(NamedTuple):
    """One reading. *_ticks: since boot, in any unit. *_used, *_total: bytes.

    net: bytes (received, sent) of each interface but loopback.
    """

    now: float
    busy_ticks: float
    total_ticks: float
    ram_used: int
    ram_total: int
    swap_used: int
    swap_total: int
    disk_used: int
    disk_total: int
    net: Mapping[str, tuple[int, int]]
    load_avg: tuple[float, float, float]
    uptime: float


def parse_cpu_times(stat: str) -> tuple[int, int]:
    """Return (busy, total) ticks of all cores (proc(5))."""
    numbers = [int(number) for number in stat.split("\n", 1)[0].split()[1:]]
    total = sum(numbers[:8])  # guest time, which follows, is part of user time
    return total - sum(numbers[3:5]), total  # idle and iowait


def parse_meminfo(meminfo: str) -> dict[str, int]:
    pairs = (line.partition(":")[::2] for line in meminfo.splitlines())
    return {name: int(value.split()[0]) * KIB for name, value in pairs if value}


def parse_net_dev(net_dev: str) -> dict[str, tuple[int, int]]:
    rows = (line.replace(":", " ", 1).split() for line in net_dev.splitlines() if ":" in line)
    return {name: (int(row[0]), int(row[8])) for name, *row in rows if name != "lo"}


def count_traffic(before: Sample, after: Sample, way: int) -> int:
    """Return the bytes between two samples. way: 0 is received, 1 is sent."""
    old, new = ({name: net[way] for name, net in one.net.items()} for one in (before, after))
    # Each by itself: an interface that vanishes takes its counters with it.
    more = sum(max(0, new[name] - old[name]) for name in old.keys() & new.keys())
    # A renamed interface is one gone and one new: the difference cancels its lifetime total.
    come = sum(new.get(name, 0) - old.get(name, 0) for name in old.keys() ^ new.keys())
    return more + max(0, come)


def build_stats(before: Sample, after: Sample) -> Fields:
    """Return fields of `stats_update`."""
    seconds = max(after.now - before.now, 1e-6)
    total = after.total_ticks - before.total_ticks
    busy = 100.0 * (after.busy_ticks - before.busy_ticks) / total if total > 0 else 0.0
    return {
        "cpu": round(min(max(busy, 0.0), 100.0), 1),  # in a virtual machine ticks may go back
        "ram_used": after.ram_used // MIB,
        "ram_total": after.ram_total // MIB,
        "load_avg": [round(load, 2) for load in after.load_avg],
        "swap_used": after.swap_used // MIB,
        "swap_total": after.swap_total // MIB,
        "disk_used": after.disk_used // MIB,
        "disk_total": after.disk_total // MIB,
        "net_recv": round(count_traffic(before, after, 0) / seconds),
        "net_sent": round(count_traffic(before, after, 1) / seconds),
        "uptime": int(after.uptime),
    }


@dataclass(repr=False)
class AlertRule:
    """When CPU usage raises an alert, and when that is over. Percent; monotonic seconds."""

    threshold: float
    cooldown: float
    hold: float  # how long above the threshold before the first alert
    _above_since: float = math.inf
    _raised_at: float = -math.inf

    def update(self, cpu: float, now: float) -> str | None:
        """Return "cpu_alert", "alert_resolved" or None."""
        if cpu <= self.threshold:
            was_raised = self._raised_at >= self._above_since
            self._above_since = math.inf
            return "alert_resolved" if was_raised else None
        self._above_since = min(self._above_since, now)
        if now - self._raised_at < self.cooldown or now - self._above_since < self.hold:
            return None
        self._raised_at = now
        return "cpu_alert"


# 10. Feed and kept output ---
# The heart of the server. Every broadcast event is appended to the Feed once and gets the next seq.
# It is encoded as a WebSocket frame once, when the first viewer needs it. Every viewer reads the
# same bytes at its own cursor, the seq that it needs next. So a viewer costs one integer; replay
# and lag are normal delivery from another cursor; what was dropped is known: it is a `gap`.
# OutputLog does the same for the output of one task, in bytes instead of events.

# All broadcast events. Watched.TAKES and the page's EVENTS name what the monitor and the page take.
EVENT_TYPES = (
    "stats_update task_start task_output task_resize task_complete cpu_alert alert_resolved"
).split()


class Choice(NamedTuple):
    """What a viewer wants to hear: event types, and which tasks' output."""

    only: Kinds = None
    tasks: Kinds = None

    @property
    def kinds(self) -> Kinds:
        """The Feed's kinds of events; equal if two choices mean the same."""
        kinds = frozenset(EVENT_TYPES) if self.only is None else self.only
        if "task_output" in kinds and self.tasks is not None:
            kinds = kinds - {"task_output"} | self.tasks
        return None if kinds == frozenset(EVENT_TYPES) else kinds

    def describe(self) -> dict[str, list[str] | None]:
        only = None if self.only is None else [one for one in EVENT_TYPES if one in self.only]
        return {"only": only, "tasks": None if self.tasks is None else sorted(self.tasks, key=int)}


@dataclass(eq=False, repr=False)
class Feed:
    """The newest events. Each is of one or two kinds: its type and, if it is output, its task's id.

    compress: makes a frame smaller, for windows of so many bits; returns the same one if it cannot.
    """

    encode: Callable[[Fields], bytes]
    capacity_bytes: int
    compress: Callable[[bytes, int], bytes]
    first: int = 1  # seq of the oldest kept event
    next: int = 1  # seq of the next event
    # seq -> event, or its frame once that was needed.
    _entries: dict[int, Any] = field(default_factory=dict)
    _bytes: int = 0
    # Window bits -> seq -> compressed frame, once needed; b"" if nothing was gained.
    _compressed: dict[int, dict[int, bytes]] = field(default_factory=dict)
    # Kind -> seqs of its newest dropped event, which shows gaps, and of those kept. Older ones are
    # deleted in bulk, when `first` is above _trim_at.
    _seqs: dict[str, list[int]] = field(default_factory=dict)
    _trim_at: int = 0
    # Up to this seq a task without a list may have dropped events.
    _forgotten: int = 0
    # Set by Viewers, for Outputs: viewers wait; tasks must pause until slow viewers catch up.
    is_dirty: bool = False
    must_pause: bool = False

    @property
    def middle(self) -> int:
        """A viewer before this seq is half the capacity behind; 0 while there is room."""
        return (self.first + self.next) // 2 if self._bytes >= self.capacity_bytes // 2 else 0

    @staticmethod
    def _size(entry: Any) -> int:
        if isinstance(entry, bytes):
            return len(entry) + EVENT_OVERHEAD_BYTES
        text = entry.get("output") or entry.get("command") or ""
        return len(text) + 2 * EVENT_OVERHEAD_BYTES

    def append(self, event: Fields) -> tuple[str, ...]:
        """Add an event, set its `seq`, drop the oldest beyond the capacity. Return its kinds."""
        seq = event["seq"] = self.next
        kind = event["type"]
        kinds = (kind, event["task_id"]) if kind == "task_output" else (kind,)
        for one in kinds:
            self._seqs.setdefault(one, []).append(seq)
        self._entries[seq] = event
        self.next += 1
        self._bytes += self._size(event)
        self._trim()
        return kinds

    def _trim(self) -> None:
        while self._bytes > self.capacity_bytes and len(self._entries) > 1:
            self._bytes -= self._size(self._entries.pop(self.first))
            for frames in self._compressed.values():
                self._bytes -= len(frames.pop(self.first, b""))
            self.first += 1
        if self.first <= self._trim_at:
            return
        self._trim_at = self.first + max(1024, len(self._entries))
        for seqs in self._seqs.values():
            del seqs[: max(0, bisect.bisect_left(seqs, self.first) - 1)]
        if len(self._seqs) > MAX_KINDS:
            for kind in [one for one, seqs in self._seqs.items() if seqs[-1] < self.first]:
                if kind not in EVENT_TYPES:
                    self._forgotten = max(self._forgotten, *self._seqs.pop(kind))

    def read_batch(self, cursor: int, kinds: Kinds = None, bits: int = 0) -> tuple[bytes, int]:
        """Return (frames from the cursor on, the cursor after them). bits: of the window, or 0."""
        assert cursor >= self.first
        seqs: Iterable[int] = range(cursor, self.next)
        if kinds is not None:
            later = self._find_later(cursor, kinds)
            seqs = sorted(itertools.chain.from_iterable(one[start:] for one, start in later))
        frames: list[bytes] = []
        size = 0
        for seq in seqs:
            frame = self._read_frame(seq, bits)
            frames.append(frame)
            size += len(frame)
            if size >= BATCH_BYTES:
                return b"".join(frames), seq + 1
        return b"".join(frames), self.next  # a single frame is not copied

    def _read_frame(self, seq: int, bits: int) -> bytes:
        entry = self._entries[seq]
        if not isinstance(entry, bytes):
            frame = self.encode(entry)
            self._bytes += self._size(frame) - self._size(entry)
            self._entries[seq] = entry = frame
        if not bits:
            return entry
        frames = self._compressed.setdefault(bits, {})
        if seq not in frames:
            frame = self.compress(entry, bits)
            frames[seq] = b"" if frame is entry else frame
            self._bytes += len(frames[seq])
        return frames[seq] or entry

    def _find_later(self, cursor: int, kinds: frozenset[str]) -> Iterable[tuple[list[int], int]]:
        """Yield the seqs of each kind that has one from the cursor on, and the index of that."""
        for seqs in (self._seqs[one] for one in kinds if one in self._seqs):
            if seqs[-1] >= cursor:
                yield seqs, bisect.bisect_left(seqs, cursor)

    def find_next(self, cursor: int, kinds: Kinds) -> int:
        """Return the seq of the next event of these kinds, or else `next`."""
        if kinds is None:
            return cursor
        later = self._find_later(cursor, kinds)
        return min((seqs[index] for seqs, index in later), default=self.next)

    def has_dropped(self, cursor: int, kinds: Kinds) -> bool:
        """Whether an event of these kinds from the cursor on is no longer kept."""
        if kinds is None:
            return cursor < self.first
        is_unsure = cursor <= self._forgotten and not kinds <= set(EVENT_TYPES)
        return is_unsure or self.find_next(cursor, kinds) < self.first


def find_character(data: bytes, start: int) -> int:
    """Return where the first UTF-8 character from `start` on begins."""
    while start < len(data) and data[start] & 0xC0 == 0x80:
        start += 1
    return start


@dataclass(repr=False)
class OutputLog:
    """The newest of a task's output: UTF-8, with absolute offsets."""

    capacity_bytes: int
    # Each begins with a whole character, and never changes: readers hold it.
    _blocks: deque[bytes] = field(default_factory=deque)
    _begin: int = 0  # offset of the first block
    start: int = 0  # offset of the first kept byte
    end: int = 0

    @property
    def kept_bytes(self) -> int:
        return self.end - self.start

    def append(self, data: bytes) -> None:
        """data: whole characters."""
        self.end += len(data)
        if self._blocks and len(self._blocks[-1]) + len(data) <= OUTPUT_BLOCK_BYTES:
            data = self._blocks.pop() + data
        self._blocks.append(data)
        self.drop_to(self.capacity_bytes)

    def drop_to(self, capacity_bytes: int) -> None:
        """Drop the oldest, cutting on a character."""
        if self.kept_bytes <= capacity_bytes:
            return
        self.start = self.end - capacity_bytes
        while self._blocks and self._begin + len(self._blocks[0]) <= self.start:
            self._begin += len(self._blocks.popleft())
        if self._blocks:
            self.start = self._begin + find_character(self._blocks[0], self.start - self._begin)

    def read(self, offset: int = 0, is_exact: bool = False) -> list[bytes]:
        """Return pieces from `offset` on; if not is_exact, from the first whole character there.

        Whoever comes back after a break needs exact bytes: it may have had half a character.
        """
        offset, begin = max(offset, self.start), self.end
        pieces: list[bytes] = []
        for block in reversed(self._blocks):
            if begin <= offset:
                break
            begin -= len(block)
            skip = max(0, offset - begin)
            pieces.append(block[skip if is_exact else find_character(block, skip) :])
        return [piece for piece in reversed(pieces) if piece]


# 11. Messages and datagrams ---
# JSON on the wire, Prometheus' text format, the webhook's request. All text that is sent is valid
# UTF-8, and every field of a request is checked.

REPLACEMENT = "\ufffd".encode()  # for invalid UTF-8
ENCODE_JSON = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
# All but the control characters that need \u escapes (RFC 8259, 7).
NOT_ESCAPED = bytes(code for code in range(256) if code >= 0x20 or code in b"\t\n\r")


def encode_json(value: Any) -> bytes:
    """Lone surrogates (undecodable file names) become "?"."""
    return ENCODE_JSON(value).encode("utf-8", "replace")


def escape_json_text(text: bytes) -> bytes:
    """RFC 8259, 7. The most expensive step of a flood: this is four times as fast as json.dumps."""
    if text.translate(None, NOT_ESCAPED):
        return ENCODE_JSON(text.decode()).encode()[1:-1]
    text = text.replace(b"\\", b"\\\\").replace(b'"', b'\\"').replace(b"\n", b"\\n")
    return text.replace(b"\r", b"\\r").replace(b"\t", b"\\t")


def encode_event(event: Fields) -> bytes:
    """Return an event's frame. Its `output`, if any, is UTF-8 in bytes."""
    rest = dict(event)
    output = rest.pop("output", None)
    body = encode_json(rest)
    if output is not None:
        body = b'%b,"output":"%b"}' % (body[:-1], escape_json_text(output))
    return encode_frame(Opcode.TEXT, body)


def refuse_duplicates(pairs: list[tuple[str, Any]]) -> Fields:
    """For json.loads: two readers could see different values of a name. Raises ValueError."""
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name stands twice in an object")
    return result


def parse_finite(text: str) -> float:
    """For json.loads: NaN, Infinity and 1e999 raise ValueError."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not a number of JSON")
    return value


def parse_json_object(text: str | bytes) -> Fields:
    """Raises CommandError `bad_json`."""
    try:
        if isinstance(text, bytes):
            text = text.decode()
        if not hasattr(sys, "get_int_max_str_digits") and re.search("[0-9]{5000}", text):
            raise ValueError("a number has too many digits")  # int() would take hours
        value = json.loads(
            text,
            object_pairs_hook=refuse_duplicates,
            parse_constant=parse_finite,
            parse_float=parse_finite,
        )
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise CommandError("bad_json", f"not JSON: {reason}") from None
    if not isinstance(value, dict):
        raise CommandError("bad_json", "not a JSON object")
    return value


@dataclass(frozen=True)
class ExecRequest:
    """What `POST /exec` asks for. timeout: seconds, 0 is none.

    stdin: its text, or True if it comes later. ref: requests with the same one start one task, for
    an answer may be lost. window: bytes of output that may be read before a `?follow` reader has
    taken them; 0 is no limit.
    """

    command: str
    cwd: str | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    timeout: float = 0.0
    name: str | None = None
    stdin: str | bool | None = None
    tty: bool = False
    cols: int = 80
    rows: int = 24
    ref: str | None = None
    window: int = 0


def is_plain_text(value: Any) -> bool:
    """Whether the kernel accepts it: no NUL, no lone surrogates."""
    return isinstance(value, str) and not re.search("[\0\ud800-\udfff]", value)


def check_command(value: Any) -> str:
    """Raises CommandError `bad_command`, `too_large`."""
    if not is_plain_text(value):
        raise CommandError("bad_command", "the command must be text without NUL and surrogates")
    if not value.strip():
        raise CommandError("bad_command", "the command is empty")
    if len(value.encode()) > MAX_COMMAND_BYTES:
        raise CommandError("too_large", f"a command may have {MAX_COMMAND_BYTES} bytes")
    return str(value)


def is_environment(value: Any) -> bool:
    return isinstance(value, dict) and all(
        key and "=" not in key and is_plain_text(key) and is_plain_text(text)
        for key, text in value.items()
    )


TEXT: Rule = (lambda value: value != "" and is_plain_text(value), "non-empty text without NUL")
NAME: Rule = (
    lambda value: TEXT[0](value) and len(value) <= MAX_NAME_CHARACTERS,
    f"text of 1 to {MAX_NAME_CHARACTERS} characters, without NUL",
)
SIDE: Rule = (
    lambda value: type(value) is int and 1 <= value <= MAX_TERMINAL_SIDE,
    f"1 to {MAX_TERMINAL_SIDE}",
)
FLAG: Rule = (lambda value: isinstance(value, bool), "true or false")
# Field of POST /exec -> its check. Each is also a field of ExecRequest, and a word of HELP.
EXEC_FIELDS: dict[str, Rule] = {
    "cwd": TEXT,
    "env": (is_environment, "an object of strings without NUL"),
    "timeout": (
        lambda value: type(value) in (int, float) and 0 <= value <= MAX_TIMEOUT_SECONDS,
        f"a number of seconds, 0 to {MAX_TIMEOUT_SECONDS:.0f}",
    ),
    "name": NAME,
    "stdin": (
        lambda value: type(value) in (bool, str) and is_plain_text(str(value).replace("\0", "")),
        "text, or true to keep it open",
    ),
    "tty": FLAG,
    "cols": SIDE,
    "rows": SIDE,
    "ref": NAME,
    "window": (lambda value: type(value) is int and value >= 0, "a number of bytes"),
}


def check_field(name: str, value: Any, rule: Rule) -> Any:
    """Raises CommandError `bad_field`."""
    if not rule[0](value):
        raise CommandError("bad_field", f"{name} must be {rule[1]}")
    return value


def parse_exec_fields(fields: Fields) -> ExecRequest:
    """Raises CommandError."""
    rest = dict(fields)
    commands = [rest.pop(name) for name in ("cmd", "command") if name in rest]
    if len(commands) != 1:
        raise CommandError("bad_command", 'one of "cmd" and "command" is needed')
    unknown = rest.keys() - EXEC_FIELDS.keys()
    if unknown:
        known = ", ".join(["cmd", *EXEC_FIELDS])
        raise CommandError("unknown_field", f"unknown field {min(unknown)!r}; known: {known}")
    for name, value in rest.items():
        check_field(name, value, EXEC_FIELDS[name])
    if not rest.get("tty") and ("cols" in rest or "rows" in rest):
        raise CommandError("bad_field", "cols and rows are a terminal's: they need tty")
    return ExecRequest(check_command(commands[0]), **rest)


def check_form_body(body: bytes) -> None:
    """Raises CommandError for a form, and a script that lost its line ends."""
    field = re.match(rb"(?s)(?:cmd|command)=(.{0,200})", body)
    if field:
        command = shlex.quote(urllib.parse.unquote_plus(field[1].decode("latin-1")))
        message = "a form would change + and & in the command: send it as the body itself"
        raise CommandError("form_body", f"{message}, curl -d {command} http://…/exec")
    if body.startswith(b"#!") and b"\n" not in body:
        message = "a script whose line ends are gone, as curl -d @FILE removes them"
        raise CommandError("form_body", f"{message}: use curl --data-binary @FILE")


def parse_exec_body(media_type: str, body: bytes) -> ExecRequest:
    """Raises CommandError. A body is JSON if its type says so, or if it begins with "{"; else it is
    the command, verbatim.
    """
    if media_type.startswith("multipart/"):
        message = "send the command as the body itself (curl -d) or as JSON"
        raise CommandError("unsupported_media_type", message)
    if media_type == "application/json" or (media_type != "text/plain" and body[:1] == b"{"):
        return parse_exec_fields(parse_json_object(body))
    if media_type == "application/x-www-form-urlencoded":
        check_form_body(body)
    try:
        return ExecRequest(check_command(body.decode()))
    except UnicodeDecodeError:
        raise CommandError("bad_command", "the command is not UTF-8") from None


def parse_task_id(value: Any) -> str:
    """Raises CommandError `bad_field`."""
    if not isinstance(value, str) or not DIGITS.fullmatch(value):
        raise CommandError("bad_field", "a task id is a decimal number")
    return value


def check_choice(name: str, value: Any, is_fit: Callable[[str], Any]) -> Kinds:
    """Return what a field of `watch` lists. Raises CommandError `bad_field`."""
    if value is None:  # everything
        return None
    if not isinstance(value, (list, frozenset)) or len(value) > MAX_CHOSEN_TASKS:
        raise CommandError("bad_field", f"{name} must be null or a list, not too long")
    if not all(isinstance(one, str) and is_fit(one) for one in value):
        known = f"event types: {', '.join(EVENT_TYPES)}" if name == "only" else "task ids"
        raise CommandError("bad_field", f"{name} must list {known}")
    return frozenset(value)


def parse_choice(fields: Mapping[str, Any], before: Choice) -> Choice:
    """An absent field is as before. Raises CommandError `bad_field`."""
    return Choice(
        check_choice("only", fields.get("only", before.only), EVENT_TYPES.__contains__),
        check_choice("tasks", fields.get("tasks", before.tasks), DIGITS.fullmatch),
    )


def parse_choice_query(parameters: Mapping[str, str]) -> Choice:
    fields: Fields = {}
    if "only" in parameters:
        fields["only"] = parameters["only"].split(",")
    if "task" in parameters:
        fields["tasks"] = parameters["task"].split(",") if parameters["task"] != "none" else []
    return parse_choice(fields, Choice())


DEFAULT_SIGNAL = "TERM"  # if a client names none; as in Tasks.stop()
SIGNAL_NAMES = {int(one): one.name[3:] for one in signal.Signals}  # CHLD, not its alias CLD


def parse_signal(value: Any) -> int:
    """value: like TERM or SIGTERM. Raises CommandError `bad_signal`."""
    name = value.upper() if isinstance(value, str) and value.isascii() else ""
    number = signal.Signals.__members__.get("SIG" + name.removeprefix("SIG"))
    if number is None:
        raise CommandError("bad_signal", "signal must be a name such as TERM, INT or KILL")
    return number


def encode_discovery_reply(facts: Mapping[str, Any]) -> bytes:
    """Return the answer to a probe. A long hostname is cut."""
    reply = {"type": "SERVER_RESPONSE", **facts}
    while len(encoded := encode_json(reply)) > MAX_DISCOVERY_REPLY_BYTES:
        assert reply["hostname"]  # the other fields take 172 bytes
        reply["hostname"] = reply["hostname"][:-1]
    return encoded


def parse_link_routes(route: str) -> list[ipaddress.IPv4Network]:
    """Return the networks that are on-link (proc(5)); not a default route without a gateway (a
    tunnel): every address would be.
    """
    networks = []
    for line in route.splitlines()[1:]:
        columns = line.split()
        destination, gateway, mask = (int(columns[i], 16) for i in (1, 2, 7))
        if gateway == 0 and mask != 0:
            address = destination.to_bytes(4, sys.byteorder)  # as the kernel prints it
            networks.append(ipaddress.IPv4Network((address, bin(mask).count("1"))))
    return networks


def encode_labelled_sample(name: str, label: str, text: str, value: float) -> str:
    text = text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
    return f'{name}{{{label}="{text}"}} {value}'


class Histogram:
    """Counts values by size. bounds: inclusive, ascending."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)  # the last: above all bounds
        self._sum = 0.0

    def add(self, value: float) -> None:
        self._counts[bisect.bisect_left(self._bounds, value)] += 1
        self._sum += value

    def encode(self, name: str) -> list[str]:
        bounds = [*(f"{bound:g}" for bound in self._bounds), "+Inf"]
        pairs = zip(itertools.accumulate(self._counts), bounds)
        lines = [encode_labelled_sample(f"{name}_bucket", "le", bound, n) for n, bound in pairs]
        return [*lines, f"{name}_sum {self._sum}", f"{name}_count {sum(self._counts)}"]


def encode_metrics(rows: Iterable[tuple[str, Any, str]]) -> bytes:
    """Return rows of (name, value, help) in Prometheus' text format 0.0.4.

    A value is a number, a Histogram, None if it is not known yet or, for a "name{label}", {value of
    the label: number}. Names that begin with process_ are the same for all exporters.
    """
    lines: list[str] = []
    for title, value, text in rows:
        if value is None:
            continue
        name, _, label = title.rstrip("}").partition("{")
        kind = "counter" if name.endswith("_total") else "gauge"
        name = name if name.startswith("process_") else f"servercontrol_{name}"
        if isinstance(value, Histogram):
            kind, samples = "histogram", value.encode(name)
        elif label:
            samples = [encode_labelled_sample(name, label, of, n) for of, n in value.items()]
        else:
            samples = [f"{name} {value}"]
        lines += [f"# HELP {name} {text}", f"# TYPE {name} {kind}", *samples]
    return "\n".join([*lines, ""]).encode("utf-8", "replace")


class WebhookUrl(NamedTuple):
    """Only `origin` may be logged: the rest may be secret."""

    origin: str
    is_tls: bool
    host: str
    port: int
    target: str
    fields: list[tuple[str, str]]


def parse_webhook_url(url: str) -> WebhookUrl:
    """Raises ValueError or HttpError."""
    parts = urllib.parse.urlsplit(url)
    account, at, host_field = parts.netloc.rpartition("@")
    host, port = parse_host(host_field)
    # Other characters could end a line of the request, or mislead a parser.
    if parts.scheme not in DEFAULT_PORTS or port == 0 or not re.fullmatch(r"[!-\[\]-~]+", url):
        raise ValueError("not an http or https URL")
    fields = [
        ("Host", host_field),
        ("User-Agent", f"servercontrol/{__version__}"),
        ("Content-Type", "application/json"),
        ("Connection", "close"),
    ]
    if at:  # RFC 7617
        user, _, password = account.partition(":")
        code = base64.b64encode(urllib.parse.unquote_to_bytes(f"{user}:{password}")).decode()
        fields.append(("Authorization", f"Basic {code}"))
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    port = port or DEFAULT_PORTS[parts.scheme]
    origin = f"{parts.scheme}://{host_field}"
    return WebhookUrl(origin, parts.scheme == "https", host, port, target, fields)


def encode_webhook_request(url: WebhookUrl, body: bytes) -> bytes:
    fields = encode_fields([*url.fields, ("Content-Length", str(len(body)))])
    return f"POST {url.target} HTTP/1.1\r\n".encode() + fields + body


def parse_webhook_answer(data: bytes) -> int | None:
    """Return the status of the answer, None while it has not come, 0 if it is not HTTP."""
    for head in re.split(rb"(?<=\n)\r?\n", data):
        match = re.match(rb"HTTP/1\.[01] ([0-9]{3})\b.*\n", head)
        if match is None and b"\n" in head:
            return 0
        if match and int(match[1]) >= 200:  # 1xx come before the answer (RFC 9110, 15.2)
            return int(match[1])
    return None


# From here on: I/O ---

# 12. Log, state folder and audit log ---
# Log lines on stderr; what survives a restart (tokens, task ids); the record of who did what. No
# failure here stops the server: a full or unread stderr, a read-only folder, a full disk.
#
# Each line of the audit log is a JSON object. Its `prev` is the SHA-256 of the line before, so a
# changed or missing line shows. The file is opened and locked for each record: it can be rotated by
# renaming, and servers of one account share it. FILE.head has the newest line's hash: the first
# record after a rotation names it, and a cut end shows.


def close_fds(fds: Iterable[int]) -> None:
    for fd in fds:
        if fd >= 0:
            os.close(fd)


LEVELS = ("debug", "info", "warning", "error")


def read_hostname() -> str:
    return socket.gethostname().encode("utf-8", "replace").decode()


def format_time(timestamp: float) -> str:
    seconds, milliseconds = divmod(int(timestamp * 1000), 1000)
    return time.strftime(f"%Y-%m-%dT%H:%M:%S.{milliseconds:03d}Z", time.gmtime(seconds))


def format_value(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if re.fullmatch(r"[!#-~]*", text) else json.dumps(text)


def write_some(fd: int, data: bytes | bytearray, milliseconds: int = 0) -> int:
    """Write if the descriptor is ready in time. Return how many bytes were written. Raises OSError.

    data: at most PIPE_BUF bytes, which a ready pipe takes without blocking (pipe(7)). O_NONBLOCK
    would hold for other processes that share the descriptor, too.
    """
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    try:
        return os.write(fd, data) if poll.poll(milliseconds) else 0
    except BlockingIOError:  # another process has set O_NONBLOCK
        return 0


def write_without_waiting(fd: int, line: bytes) -> bool:
    with suppress(OSError):
        return write_some(fd, line) == len(line)
    return False


# Event -> what it means, and what to do.
LOG_HINTS = {
    "accept_failed": "nobody can connect for a second; a higher `ulimit -n` may help",
    "audit_failed": "tasks go on unrecorded: make room, or the file writable, or use --audit-log",
    "crash_not_completed": "tasks that a crash left open are not completed in the audit log",
    "discovery_off": "the server works, but `discover` does not find it; try --discovery-port",
    "few_descriptors": "fewer connections than asked for; a higher `ulimit -n` allows more",
    "port_busy": "another program has this port, so the next free one is used",
    "sampler_failed": "no statistics at the moment; tasks go on",
    "state_not_written": "task ids go on from the clock; make the state folder writable",
    "tls_not_reloaded": "the old certificate stays in use: correct the new files",
    "token_not_made": "no token, so nobody else gets in: make the state folder writable",
    "unknown_variable": "no option has this name, so it is ignored: misspelt?",
    "webhook_dropped": "alerts are lost, since the receiver is slower than they come",
    "webhook_failed": "this alert is lost: the receiver must answer 2xx within 10 s",
}


def shorten_texts(fields: Fields) -> Fields:
    """Cut long texts in the middle: a trace tells most at its end."""
    return {
        name: value[:80] + " ... " + value[-165:]
        if isinstance(value, str) and len(value) > 250
        else value
        for name, value in fields.items()
    }


class Log:
    """Writes one line per event. Never waits: it drops lines instead, and says how many."""

    def __init__(self, log_format: str, level: str) -> None:
        self._json = log_format == "json"
        self._level = LEVELS.index(level)
        self._dropped = 0
        self._last: dict[str, float] = {}  # event -> when write_limited() wrote it

    def write(self, level: str, event: str, **fields: Any) -> None:
        """Never raises."""
        if LEVELS.index(level) < self._level:
            return
        if self._dropped:
            fields["lines_dropped"] = self._dropped
        if event in LOG_HINTS:
            fields.setdefault("message", LOG_HINTS[event])
        line = self._format(level, event, fields)
        if len(line) > LOG_LINE_BYTES:
            line = self._format(level, event, shorten_texts(fields))
        self._dropped = 0 if write_without_waiting(2, line) else self._dropped + 1

    def write_limited(self, level: str, event: str, seconds: float = 1.0, **fields: Any) -> None:
        now = time.monotonic()
        if now - self._last.get(event, -seconds) >= seconds:
            self._last[event] = now
            self.write(level, event, **fields)

    def write_fault(self, event: str) -> None:
        message = "a fault of ServerControl itself, which goes on; please report the trace"
        self.write_limited("error", event, trace=traceback.format_exc(), message=message)

    def _format(self, level: str, event: str, fields: Fields) -> bytes:
        when = format_time(time.time())
        if self._json:
            record = {"time": when, "level": level, "event": event, **fields}
            return json.dumps(record, separators=(",", ":")).encode() + b"\n"
        words = [f"{name}={format_value(value)}" for name, value in fields.items()]
        return " ".join([when, level.upper(), event, *words]).encode("utf-8", "replace") + b"\n"


def lock_file(file: FileIO, seconds: float = LOCK_SECONDS) -> None:
    """Raises OSError if another process holds the lock for longer than that."""
    end = time.monotonic() + seconds
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > end:
                raise
        time.sleep(0.001)


def open_private_file(path: str, flags: int = os.O_NOFOLLOW) -> FileIO:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | flags, 0o600)
    status = os.fstat(fd)
    if status.st_size == 0 and status.st_mode & 0o600 != 0o600:  # by the umask
        with suppress(OSError):  # it is of another account
            os.fchmod(fd, stat.S_IMODE(status.st_mode) | 0o600)
    return open(fd, "r+b", buffering=0)


def is_at(path: str, fd: int) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(fd), os.stat(path))
    return False


@dataclass(repr=False)
class TaskIds:
    """Counts task ids in a file that this account's servers share; without it, by the clock."""

    _folder: str | None
    _log: Log
    _last: int = 0

    def take(self) -> str:
        """Return the next id."""
        last = None
        if self._folder is not None:
            try:
                last = self._count_in_file(os.path.join(self._folder, "last-task-id"))
            except OSError as error:
                self._log.write_limited("warning", "state_not_written", 60, error=explain(error))
        self._last = last or max(self._last, int(time.time() * 1000)) + 1
        return str(self._last)

    def _count_in_file(self, path: str) -> int:
        with open_private_file(path) as file:
            lock_file(file)
            text = file.read(64).decode("ascii", "replace").strip() or "0"
            # After damage ids go on from the clock, which no counting from 1 has reached.
            newest = int(text) if DIGITS.fullmatch(text) else int(time.time() * 1000)
            last = max(self._last, newest) + 1
            os.pwrite(file.fileno(), b"%18d\n" % last, 0)  # of fixed width: replaces it whole
            file.truncate(19)  # damage may be longer
            return last


def find_own_folder(
    environ: Mapping[str, str], variable: str = "XDG_STATE_HOME", usual: str = "~/.local/state"
) -> str:
    base = environ.get(variable, "")
    if not os.path.isabs(base):  # the XDG specification ignores a relative path
        base = os.path.expanduser(usual)
    return os.path.join(base, "servercontrol")


def open_state_folder(environ: Mapping[str, str], config: Config, log: Log) -> str | None:
    """Make the state folder and return it; None, with a warning, if that fails."""
    folder = find_own_folder(environ)
    try:
        if not os.path.isabs(folder):
            raise FileNotFoundError(errno.ENOENT, "there is no home folder")
        os.makedirs(folder, mode=0o700, exist_ok=True)
        if os.stat(folder).st_uid != os.geteuid():  # for root the chmod below would not fail
            raise PermissionError(errno.EPERM, "belongs to another account")
        os.chmod(folder, 0o700)
        return folder
    except OSError as error:
        reason = explain(error)
    lost = [] if config.audit_log else ["no audit log"]
    if not (config.token_file or config.no_auth):
        lost.append("no token: only processes of this account get in")
    message = f"without a state folder there is {' and '.join(lost)}" if lost else reason
    message += "; set HOME or XDG_STATE_HOME to a folder of this account, or chown this one"
    log.write("warning", "no_state_folder", folder=folder, error=reason, message=message)
    return None


def make_token_file(path: str) -> None:
    """Write a new token, whole or not at all: servers that start together use the same."""
    # Random: in containers that share the folder each server has pid 1.
    temporary = f"{path}.{secrets.token_hex(8)}"
    file = open_private_file(temporary, os.O_EXCL)
    try:
        with file:
            file.write(secrets.token_urlsafe(32).encode() + b"\n")
        with suppress(FileExistsError):  # another server was faster
            os.link(temporary, path)
    finally:
        os.unlink(temporary)


def check_token(source: str, token: str) -> str:
    """Return the token. source: for the error message. Raises ConfigError."""
    if not token:
        raise ConfigError(f"{source}: it is empty")
    if len(token) < MIN_TOKEN_CHARACTERS or not re.fullmatch(TOKEN_TEXT, token):
        known = f"{MIN_TOKEN_CHARACTERS} characters of A-Z a-z 0-9 - . _ ~ + / (then =)"
        raise ConfigError(f"{source}: a token has at least {known}")
    return token


def check_file(fd: int, owners: Collection[int] | None, rights: int) -> None:
    """Raise PermissionError unless a file is of one of the owners, and others lack these rights.

    owners: None if it may be any account's, and a pipe.
    """
    status, problem = os.fstat(fd), ""
    if owners is not None and not stat.S_ISREG(status.st_mode):
        problem = "not a regular file"
    elif owners is not None and status.st_uid not in owners:
        problem = "belongs to another account"
    elif status.st_mode & rights:
        problem = "other accounts have access (chmod 600 mends that)"
    if problem:
        raise PermissionError(errno.EPERM, problem)


def load_token_file(source: str, path: str, credentials: str = "", is_client: bool = False) -> str:
    """Return the token in a file. Raises ConfigError.

    credentials: systemd's folder for this service ($CREDENTIALS_DIRECTORY). A file there may be
    root's; the service's access, by an access list, shows as the group's right to read.
    is_client: the token gives no rights here, so the file may be any account's, a link, or a pipe
    as of `<(…)`.
    """
    is_credential = bool(credentials) and os.path.dirname(path) == credentials
    owners = {os.geteuid(), 0} if is_credential else {os.geteuid()}
    # Without O_NONBLOCK the open of a pipe would wait for a writer.
    flags = os.O_RDONLY | os.O_NONBLOCK | (0 if is_client else os.O_NOFOLLOW)
    try:
        fd = os.open(path, flags)
        with open(fd, "rb") as file:
            check_file(fd, None if is_client else owners, 0o037 if is_credential else 0o077)
            os.set_blocking(fd, True)  # the writer of a pipe may need a moment
            token = file.read(4096).decode("ascii", "replace").strip()
    except OSError as error:
        hint = " (may root read it? then use sudo)" if error.errno == errno.EACCES else ""
        raise ConfigError(f"{source}: {path}: {error.strerror}{hint}") from None
    return check_token(f"{source}: {path}", token)


def load_kept_token(folder: str | None, name: str, log: Log) -> tuple[str | None, str | None]:
    """Return the state folder's token, made if missing, and its path; else (None, None)."""
    if folder is None:
        return None, None
    path = os.path.join(folder, name)
    try:
        if not os.path.lexists(path):
            make_token_file(path)
    except OSError as error:
        log.write("warning", "token_not_made", path=path, error=explain(error))
        return None, None
    return load_token_file("state folder", path), path


class Tokens(NamedTuple):
    """The tokens of both roles, and their files."""

    run: str | None
    view: str | None
    run_file: str | None
    view_file: str | None

    def by_role(self) -> dict[Role, bytes]:
        pairs = {Role.RUN: self.run, Role.VIEW: self.view}.items()
        return {role: token.encode() for role, token in pairs if token}


def load_tokens(
    config: Config, environ: MutableMapping[str, str], folder: str | None, log: Log
) -> Tokens:
    """Return the tokens: from the environment, which loses them; else from the options' files; else
    from the state folder. Raises ConfigError.
    """
    found: list[tuple[str | None, str | None]] = []
    for name, path in (("token", config.token_file), ("view-token", config.view_token_file)):
        variable = "SERVERCONTROL_" + name.upper().replace("-", "_")
        value = environ.pop(variable, None)
        if config.no_auth:
            found.append((None, None))
        elif value is not None:
            found.append((check_token(variable, value), None))
        elif path:
            credentials = environ.get("CREDENTIALS_DIRECTORY", "")
            found.append((load_token_file(f"--{name}-file", path, credentials), path))
        else:
            found.append(load_kept_token(folder, name, log))
    (run, run_file), (view, view_file) = found
    if run is not None and run == view:
        raise ConfigError("--view-token-file: both roles have the same token")
    return Tokens(run, view, run_file, view_file)


ZERO_HASH = "0" * 64  # before the first line of all


def hash_line(line: bytes) -> str:
    """line: without its newline."""
    return hashlib.sha256(line).hexdigest()


def read_hash(path: str) -> str | None:
    with suppress(OSError), open(path + ".head", encoding="ascii", errors="replace") as file:
        text = file.read(65).strip()
        return text if re.fullmatch("[0-9a-f]{64}", text) else None
    return None


def read_last_line(file: FileIO, size: int) -> tuple[bytes, bool]:
    """Return the last line, and whether it had a newline."""
    tail, start = b"", size
    while start > 0 and b"\n" not in tail[:-1]:
        step = min(start, max(4 * KIB, len(tail)))  # doubled, as a line may be long
        start -= step
        tail = os.pread(file.fileno(), step, start) + tail
    return tail.removesuffix(b"\n").rpartition(b"\n")[2], tail.endswith(b"\n")


def write_hash(path: str, line_hash: str) -> None:
    try:
        file = open_private_file(path + ".head", os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:  # a folder like /var/log allows no new file
        return
    with file:
        os.pwrite(file.fileno(), line_hash.encode() + b"\n", 0)


@dataclass(eq=False, repr=False)
class AuditLog:
    """Records who did what. Never raises: it counts and logs what cannot be written."""

    path: str  # or "-" (stderr), "none"
    boot_id: str
    _log: Log
    _hash: str = ZERO_HASH  # of the newest line that was written
    _written: tuple[int, int, int] | None = None  # device, inode and size of the file after that
    _lock_seconds: float = LOCK_SECONDS
    # Monotonic. Each refusal adds a second. MAX_REFUSALS seconds ahead, others are only counted.
    _refusals_until: float = 0.0
    _skipped: int = 0
    errors: int = 0  # records that could not be written

    @property
    def is_file(self) -> bool:
        return self.path not in ("-", "none")

    def write(self, event: str, **fields: Any) -> None:
        """fields: with `boot_id`, if the record is about another run of the server."""
        if self.path == "none":
            return
        record = {
            "time": format_time(time.time()),
            "event": event,
            "host": read_hostname(),
            "boot_id": self.boot_id,
            **fields,
        }
        write = self._write_to_stderr if self.path == "-" else self._append
        try:
            write(record)
        except OSError as error:
            self.errors += 1
            why = explain(error)
            self._log.write_limited("error", "audit_failed", LOG_ERROR_SECONDS, error=why)

    def write_refusal(self, **fields: Any) -> None:
        """Record a refusal, unless there are too many."""
        now = time.monotonic()
        until = max(self._refusals_until, now)
        if until > now + MAX_REFUSALS - 1:
            self._skipped += 1
            return
        self._refusals_until = until + 1
        if self._skipped:
            fields["skipped"], self._skipped = self._skipped, 0
        self.write("refused", **fields)

    def _write_to_stderr(self, record: Fields) -> None:
        line = encode_json({**record, "prev": self._hash})
        if len(line) >= LOG_LINE_BYTES:
            line = encode_json({**shorten_texts(record), "prev": self._hash})
        if not write_without_waiting(2, line + b"\n"):
            raise OSError(errno.EAGAIN, "stderr takes nothing")
        self._hash = hash_line(line)

    def _append(self, record: Fields) -> None:
        while True:  # until there was no rotation between opening and locking
            with open_private_file(self.path, os.O_APPEND | os.O_NONBLOCK) as file:
                check_file(file.fileno(), (os.geteuid(), 0), 0o002)
                wait, self._lock_seconds = self._lock_seconds, LOCKED_SECONDS
                lock_file(file, wait)
                self._lock_seconds = LOCK_SECONDS
                if is_at(self.path, file.fileno()):
                    return self._continue(file, record)

    def _continue(self, file: FileIO, record: Fields) -> None:
        status, is_whole = os.fstat(file.fileno()), True
        place = status.st_dev, status.st_ino
        # While file and size are as we left them, our hash stays: so a changed last line shows.
        if (*place, status.st_size) != self._written:
            if status.st_size:
                last, is_whole = read_last_line(file, status.st_size)
                self._hash = hash_line(last)
            else:
                self._hash = read_hash(self.path) or self._hash
        line = encode_json({**record, "prev": self._hash})
        # Half a line, left by a crash or a full disk, stays as it is.
        data = line + b"\n" if is_whole else b"\n" + line + b"\n"
        if os.write(file.fileno(), data) != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._hash, self._written = hash_line(line), (*place, status.st_size + len(data))
        write_hash(self.path, self._hash)


def find_audit_log(config_value: str, folder: str | None) -> str:
    if config_value:
        return config_value if config_value in ("-", "none") else os.path.abspath(config_value)
    return "none" if folder is None else os.path.join(folder, "audit.log")


def check_chain(
    lines: Iterable[bytes], prev: str | None, head: str | None
) -> tuple[list[str], bool, str]:
    """Return what to say about a chain of records, whether it holds, and its last hash.

    prev: the hash that the first record must name. head: that in FILE.head. None: not known.
    """
    count, first_prev, told, holds = 0, "", [], True
    seen_head = head is None or head == prev
    last_hash = prev or ZERO_HASH
    for count, line in enumerate(lines, 1):
        line = line.rstrip(b"\n")
        try:
            named = str(parse_json_object(line)["prev"])
        except (CommandError, KeyError):
            # Half a line, after a crash. The next record names its hash nevertheless.
            told.append(f"line {count} is not a whole record")
        else:
            first_prev = first_prev or named
            if named != last_hash and not (count == 1 and prev is None):
                holds = False
                told.append(f"line {count} does not follow: lines before were changed or removed")
        last_hash = hash_line(line)
        seen_head = seen_head or last_hash == head
    if not seen_head:
        holds = False
        told.append(f"line {count} is not the last that was written: changed, or lines are missing")
    verdict = "the chain holds" if holds else "the chain is BROKEN"
    start = "" if first_prev in ("", ZERO_HASH) else "; it goes on from an older file"
    return [*told, f"{count} lines; {verdict}{start}"], holds, last_hash


# 13. Tasks ---
# Each command runs as SHELL -c COMMAND in a session of its own, with one pipe or terminal for
# stdout and stderr. A task is complete when its shell has ended and all that the shell wrote has
# been read. What a background child writes later is dropped, so that it neither blocks nor breaks.
#
# Kill, time-out and the server's own end stop a task alike: a signal to every process of the
# session, and KILL after KILL_GRACE_SECONDS. Only then is the shell reaped: its pid, the id of the
# session, may be reused from then on. A process that has left the session (setsid) is not reached.

INPUT_IS_UTF8 = 0x4000  # IUTF8 of termios(3)
SERVER_STOP = "server stop"  # `killed_by` of tasks that the server's stop ended
END_STATES = ("done", "killed", "timeout")  # after a crash the audit log has "interrupted"
# An event's facts for the audit log and viewers, and those for viewers alone.
TASK_EVENTS = {
    "task_start": ("task_id command cwd pid by", "tty cols rows name"),
    "task_complete": (
        "task_id exit_code signal state killed_by duration_ms output_bytes",
        "replaced cpu_s max_rss_kb",
    ),
}


class TaskPhase(enum.Enum):
    """How near to its end a task is. Clients see Task.state instead."""

    RUNNING = "running"
    STOPPING = "stopping"  # a signal was sent; KILL will follow
    DRAINING = "draining"  # the shell has ended meanwhile; others of its session still run
    KILLING = "killing"  # KILL was sent to all
    ENDED = "ended"


def set_terminal_size(fd: int, cols: int, rows: int) -> None:
    fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, cols, 0, 0))


@dataclass(eq=False, repr=False)
class TaskInput:
    """A task's input, which waits here until the task reads it."""

    fd: int  # -1: closed
    _is_terminal: bool
    _waiting: bytearray = field(default_factory=bytearray)
    _is_ending: bool = False  # after what is still waiting

    def write(self, data: bytes, is_end: bool = False) -> None:
        """Raises CommandError `no_input` or `input_full`."""
        if self._is_ending:
            raise CommandError("no_input", "the task's standard input is closed")
        if len(self._waiting) + len(data) > MAX_INPUT_BYTES:
            raise CommandError("input_full", "the task does not read what was typed; try later")
        self._waiting += data
        if is_end and self._is_terminal:
            self._waiting += b"\x04"  # Ctrl-D
        self._is_ending = is_end and not self._is_terminal
        self._drain()

    def close(self) -> None:
        self._is_ending = True
        self._waiting.clear()
        if self.fd >= 0:
            asyncio.get_running_loop().remove_writer(self.fd)
            os.close(self.fd)
            self.fd = -1

    def _drain(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while self._waiting:
                del self._waiting[: os.write(self.fd, self._waiting[:READ_CHUNK_BYTES])]
        except BlockingIOError:
            loop.add_writer(self.fd, self._drain)
            return
        except OSError:  # nobody reads it any more
            self._is_ending = True
        loop.remove_writer(self.fd)
        if self._is_ending:
            self.close()


@dataclass(eq=False, repr=False)
class Task:
    """One command, its process and its output."""

    task_id: str
    request: ExecRequest
    by: str  # who started it: address and role
    output: OutputLog
    window: int = 0  # bytes to read beyond what its `?follow` readers have taken; 0: any number
    readers: dict[object, int] = field(default_factory=dict)  # the offset of each
    taken: float = 0  # that of the slowest
    pid: int = 0  # of the shell, its session and its process group
    cwd: str = ""
    phase: TaskPhase = TaskPhase.RUNNING
    started_timestamp: int = 0  # wall clock, ms
    ended_timestamp: int | None = None
    started_at: float = field(default_factory=time.monotonic)
    exit_code: int | None = None
    signal_name: str | None = None
    decoder: codecs.IncrementalDecoder = field(default_factory=lambda: UTF8_DECODER("replace"))
    replaced: int = 0  # how often invalid UTF-8 became U+FFFD
    fd: int = -1  # our end of its output; -1 is closed
    input: TaskInput | None = None
    size: tuple[int, int] | tuple[None, None] = (None, None)  # columns, rows of its terminal
    typist: object = None  # who typed last: see answer_task_input()
    verdict: str = "done"  # which of END_STATES it will have
    killed_by: str | None = None
    # "timeout"; "kill", "hang-up" and "poll" while it is stopped; "read" while it is not read.
    timers: dict[str, asyncio.TimerHandle] = field(default_factory=dict)
    completed: asyncio.Future[None] = field(default_factory=asyncio.Future)
    news: asyncio.Event = field(default_factory=asyncio.Event)  # of output, and of the end

    @property
    def state(self) -> str:
        return self.verdict if self.phase is TaskPhase.ENDED else "running"

    def describe(self) -> Fields:
        """The row of `GET /tasks`."""
        return {
            "task_id": self.task_id,
            "command": self.request.command,
            "name": self.request.name,
            "state": self.state,
            "exit_code": self.exit_code,
            "signal": self.signal_name,
            "killed_by": self.killed_by,
            "started": self.started_timestamp,
            "ended": self.ended_timestamp,
            "pid": self.pid,
            "output_bytes": self.output.end,
            "replaced": self.replaced,
            "tty": self.request.tty,
            "cols": self.size[0],
            "rows": self.size[1],
            "cwd": self.cwd,
            "by": self.by,
        }

    @property
    def room(self) -> int:
        """How many bytes may be read now."""
        if not self.window:
            return READ_CHUNK_BYTES
        # At least half a usual piece, or 0: else pieces would get smaller and smaller.
        room = min(READ_CHUNK_BYTES, self.window + self.taken - self.output.end)
        return int(room) if 2 * room >= min(READ_CHUNK_BYTES, self.window) else 0

    def wake(self) -> None:
        self.news.set()
        self.news.clear()

    def set_timer(self, name: str, seconds: float, call: Callable[..., None], *more: Any) -> None:
        self.cancel_timer(name)
        self.timers[name] = asyncio.get_running_loop().call_later(seconds, call, self, *more)

    def cancel_timer(self, name: str) -> None:
        if name in self.timers:
            self.timers.pop(name).cancel()


def list_pids() -> list[int]:
    with suppress(OSError):  # no descriptor is free, or no /proc
        return [int(name) for name in os.listdir("/proc") if name.isdigit()]
    return []


def is_zombie(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] in (b"Z", b"X")
    except (OSError, IndexError):
        return True


def find_session(session: int) -> list[int]:
    """Return its processes, zombies included; none if that cannot be found out."""
    members = []
    for pid in list_pids():
        with suppress(OSError):  # it has ended
            if os.getsid(pid) == session:  # three times as fast as /proc/PID/stat
                members.append(pid)
    return members


def is_session_gone(session: int) -> bool:
    """Whether only the shell is left. False if that cannot be found out."""
    members = find_session(session)
    return bool(members) and all(pid == session or is_zombie(pid) for pid in members)


def find_crashed_runs(folder: str, audit_path: str, held: contextlib.ExitStack) -> dict[str, str]:
    """Return boot id -> path of the mark, of crashed runs that used this audit log.

    held: keeps their marks locked, so that no other server completes them.
    """
    crashed = {}
    for name in sorted(os.listdir(folder)):
        path = os.path.join(folder, name)
        if not re.fullmatch(r"run-[0-9a-f]{16}", name) or not os.path.isfile(path):
            continue
        # BlockingIOError: this run is alive. FileNotFoundError: it has just ended.
        with suppress(BlockingIOError, FileNotFoundError):
            file = held.enter_context(open(path, "r+b"))  # noqa: SIM115
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if file.read(4096) == os.fsencode(audit_path):
                crashed[name[4:]] = path
            else:
                file.close()
    return crashed


def read_rotated(path: str) -> Iterator[bytes]:
    """Yield the lines of a log, and of what it was renamed to: PATH.1, PATH-20261128."""
    for found in os.scandir(os.path.dirname(path)):
        if found.path.startswith(path) and found.is_file():
            with suppress(PermissionError), open(found, "rb") as file:
                yield from file


def find_open_tasks(path: str, boot_ids: Iterable[str]) -> dict[str, tuple[str, int]]:
    """Return task id -> (boot id, pid) of tasks that these runs left open."""
    started: dict[str, tuple[str, int]] = {}
    ended = set()
    pattern = re.compile("|".join(boot_ids).encode("ascii"))  # faster than parsing each line
    for line in filter(pattern.search, read_rotated(path)):
        with suppress(CommandError, KeyError):  # half a line, or about no task
            record = parse_json_object(line)
            task_id, boot_id = record["task_id"], record["boot_id"]
            if record["event"] == "task_complete":
                ended.add(task_id)
            elif record["event"] == "task_start" and boot_id in boot_ids:
                started[task_id] = boot_id, int(record["pid"])
    return {task_id: one for task_id, one in started.items() if task_id not in ended}


def find_survivors(task_id: str, session: int) -> list[int]:
    """Return the processes of a session if it is this task's: pids are reused."""
    mark, alive, is_ours = f"SERVERCONTROL_TASK_ID={task_id}".encode("ascii"), [], False
    for pid in find_session(session):
        # OSError: it has ended, or is of another account.
        with suppress(OSError), open(f"/proc/{pid}/environ", "rb") as file:
            is_ours = is_ours or mark in file.read().split(b"\0")
            alive.append(pid)
    return alive if is_ours else []


def complete_crashed_runs(folder: str, audit: AuditLog, log: Log) -> None:
    """Complete in the audit log the tasks that a crash of the server left open.

    The marks of these runs go once that is written; else the next start tries again.
    """
    pids: list[int] = []
    with contextlib.ExitStack() as held:
        try:
            crashed = find_crashed_runs(folder, audit.path, held)
            tasks = find_open_tasks(audit.path, crashed) if crashed else {}
        except OSError as error:
            log.write("warning", "crash_not_completed", error=explain(error))
            return
        for task_id, (boot_id, pid) in tasks.items():
            alive = find_survivors(task_id, pid)
            pids += alive
            how: Fields = {"exit_code": None, "signal": None, "state": "interrupted", "pids": alive}
            how["reason"] = "the server ended without stopping this task"
            audit.write("task_complete", boot_id=boot_id, task_id=task_id, **how)
        if not crashed or audit.errors:
            return
        for mark in crashed.values():
            with suppress(OSError):
                os.unlink(mark)
    message = "the server was killed, or crashed; the audit log has its tasks as interrupted"
    if pids:
        message += f". They may still run; to end them: kill {' '.join(map(str, pids))}"
    log.write("warning", "crash_completed", runs=len(crashed), tasks=len(tasks), message=message)


def mark_run(folder: str, boot_id: str, audit_path: str) -> str:
    """Lock a file while this run of the server lives, for find_crashed_runs(); return its path."""
    path = os.path.join(folder, f"run-{boot_id}")
    # Without the mark a crash leaves tasks open.
    with suppress(OSError), open_private_file(path) as file:
        lock_file(file)
        os.dup(file.fileno())  # holds the lock until the process ends
        file.write(os.fsencode(audit_path))
    return path


def signal_session(session: int, number: int) -> None:
    """Signal every process of a session, also in other process groups."""
    with suppress(OSError):  # they have ended, or are another account's (sudo)
        os.killpg(session, number)  # the shell's group first, at once: no fork can outrun that
    for pid in find_session(session):
        with suppress(OSError):
            if os.getpgid(pid) != session:
                os.kill(pid, number)


def open_streams(request: ExecRequest) -> tuple[list[int], list[int]]:
    """Return our ends of [output, input] or [output], and the child's: of a terminal one for both.

    Raises OSError.
    """
    opened: list[int] = []
    try:
        opened += os.openpty() if request.tty else os.pipe()
        if request.tty:
            attributes = termios.tcgetattr(opened[1])
            attributes[0] |= INPUT_IS_UTF8  # backspace deletes whole characters
            termios.tcsetattr(opened[1], termios.TCSANOW, attributes)
            set_terminal_size(opened[0], request.cols, request.rows)
            opened.append(os.dup(opened[0]))  # for typing
        elif request.stdin not in (None, False):
            opened += reversed(os.pipe())
    except (OSError, termios.error) as error:
        close_fds(opened)
        raise OSError(*error.args) from None
    return opened[::2], opened[1::2]


def spawn_error(error: OSError, cwd: str | None) -> CommandError:
    """Say why no process was started, without paths."""
    reason = error.strerror or "unknown error"
    if error.errno in (errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENOMEM, errno.ENOSPC):
        return CommandError("no_resources", f"no process can be started now: {reason}")
    if error.errno == errno.E2BIG:
        return CommandError("too_large", "command and environment are too large together")
    if cwd is not None and not os.access(cwd.encode("utf-8") + b"/.", os.X_OK):
        return CommandError("bad_cwd", f"the working folder cannot be entered: {reason}")
    return CommandError("spawn_failed", f"the shell cannot be run: {reason}")


def raise_descriptor_limit() -> tuple[int, int]:
    """Return what the limit was."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):  # macOS has a lower maximum, which it hides
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return soft, hard


@dataclass(repr=False)
class Spawner:
    """Starts the shells of tasks."""

    _shell: str
    _environment: Mapping[bytes, bytes]  # without the tokens
    _descriptor_limit: tuple[int, int]  # before the server raised its own

    def spawn(self, task: Task) -> None:
        """Raises OSError."""
        request = task.request
        with suppress(OSError):  # no /proc on macOS
            task.cwd = os.readlink("/proc/self/cwd")  # which marks one that was deleted
        if request.cwd:
            task.cwd = os.path.join(task.cwd, request.cwd)
        # The child's terminal shall control its session.
        prepare = functools.partial(fcntl.ioctl, 0, termios.TIOCSCTTY, 0) if request.tty else None
        # Else a shell takes the command for an option; not every one knows `sh -c -- -x`.
        space = " " if request.command.startswith(("-", "+")) else ""
        ours, childs = open_streams(request)
        self._lower_descriptor_limit(childs[0])
        try:
            process = subprocess.Popen(
                [self._shell, "-c", f"{space}{request.command}".encode()],
                stdin=childs[-1] if len(ours) > 1 else subprocess.DEVNULL,
                stdout=childs[0],
                stderr=childs[0],
                cwd=None if request.cwd is None else request.cwd.encode(),
                env=self._make_environment(task),
                start_new_session=True,
                preexec_fn=prepare,
            )
        except BaseException:
            close_fds(ours)
            raise
        finally:
            raise_descriptor_limit()
            close_fds(childs)
        process.returncode = 0  # so Popen never waits for this pid, which may be reused
        task.fd, task.pid = ours[0], process.pid
        for fd in ours:
            os.set_blocking(fd, False)
        if len(ours) > 1:
            task.input = TaskInput(ours[1], request.tty)
        # Where it was not lowered before. AttributeError: macOS. OSError: the child has ended.
        with suppress(AttributeError, OSError, ValueError):
            resource.prlimit(task.pid, resource.RLIMIT_NOFILE, self._descriptor_limit)

    def _make_environment(self, task: Task) -> dict[bytes, bytes]:
        environment = {**self._environment, b"PYTHONUNBUFFERED": b"1"}
        if task.request.tty:
            environment[b"TERM"] = b"xterm-256color"
            for name in (b"COLUMNS", b"LINES"):  # of the server's own terminal
                environment.pop(name, None)
        asked = {**task.request.env, "SERVERCONTROL_TASK_ID": task.task_id}
        return {**environment, **{name.encode(): text.encode() for name, text in asked.items()}}

    def _lower_descriptor_limit(self, newest_fd: int) -> None:
        """Set the child's limit, as select() fails above 1024; unless Popen itself needs more."""
        # Fails on macOS, and if no descriptor is free, as Popen will say.
        with suppress(OSError, ValueError), contextlib.ExitStack() as spare:
            for _ in range(4):  # as many as Popen opens
                fd = os.dup(newest_fd)
                spare.callback(os.close, fd)
            if fd < self._descriptor_limit[0]:
                resource.setrlimit(resource.RLIMIT_NOFILE, self._descriptor_limit)


def read_available(fd: int, size: int) -> bytes | None:
    """Return None if there is nothing now, b"" at the end."""
    try:
        return os.read(fd, size)
    except BlockingIOError:
        return None
    except OSError:  # EIO: no process has the terminal open
        return b""


@dataclass(eq=False, repr=False)
class Outputs:
    """Reads the output of running tasks in fair turns, publishes it, and keeps the newest."""

    _publish: Publish
    _feed: Feed
    _running: Mapping[str, Task]
    _finished: Collection[Task]  # in the order in which they ended
    kept_bytes: int = 0
    total_bytes: int = 0  # ever read
    # perf_counter: the end of this turn (0 between turns); of the last read of any task.
    _turn_end: float = 0.0
    _read_at: float = 0.0
    _queue: dict[Task, None] = field(default_factory=dict)  # tasks that wait to be read

    def resume(self, task: Task, lifts_window: bool = False) -> None:
        if lifts_window:  # its readers took nothing for WINDOW_SECONDS
            task.taken = math.inf
        task.cancel_timer("read")  # also one that has fired
        asyncio.get_running_loop().add_reader(task.fd, self._read, task)

    def finish(self, task: Task) -> None:
        """Read what the shell has left, but not what others write later."""
        left = 0
        if task.fd >= 0 and task.request.tty:
            left = TERMINAL_BUFFER_BYTES  # some may be on its way; only read() waits for it
        elif task.fd >= 0:
            (left,) = struct.unpack("i", fcntl.ioctl(task.fd, termios.FIONREAD, b"\0" * 4))
        while left > 0:
            chunk = self._read_chunk(task, min(left, READ_CHUNK_BYTES))
            left = left - len(chunk) if chunk else 0
            self._take(task, chunk)
        self._take(task, b"", final=True)
        if task.fd >= 0:
            asyncio.get_running_loop().add_reader(task.fd, self._discard, task.fd)
            task.fd = -1

    def _read(self, task: Task) -> None:
        self._queue[task] = None
        if self._turn_end:
            self._read_queue()
        else:
            self._begin_turn()

    def _begin_turn(self) -> None:
        """While tasks wait, each turn of the event loop has READ_TURN_SECONDS for them."""
        self._turn_end = 0.0
        if self._queue:
            self._turn_end = time.perf_counter() + READ_TURN_SECONDS
            asyncio.get_running_loop().call_soon(self._begin_turn)
            self._read_queue()

    def _read_queue(self) -> None:
        """Read waiting tasks in order, until the turn ends; not during a round of viewers (14)."""
        now = time.perf_counter()
        if now - self._read_at < ROUND_SECONDS and self._feed.is_dirty:
            return
        while self._queue and now < self._turn_end:
            self._read_at = now
            task = next(iter(self._queue))
            del self._queue[task]
            room = task.room
            if task.fd < 0:  # it has ended
                pass
            elif self._feed.must_pause:
                self._pause(task, PRESSURE_SECONDS)
            elif not room:
                self._pause(task, WINDOW_SECONDS, lifts_window=True)
            else:
                self._take(task, self._read_chunk(task, room))
            now = time.perf_counter()

    def _pause(self, task: Task, seconds: float, lifts_window: bool = False) -> None:
        asyncio.get_running_loop().remove_reader(task.fd)
        task.set_timer("read", seconds, self.resume, lifts_window)

    def move_reader(self, task: Task, reader: object, offset: int) -> None:
        task.readers[reader] = offset
        task.taken = min(task.readers.values())
        if task.fd >= 0 and "read" in task.timers:
            self.resume(task)  # if there is still no room, it is paused anew

    def _read_chunk(self, task: Task, size: int) -> bytes:
        chunk = read_available(task.fd, size)
        if chunk == b"":
            if task.request.tty and task.phase not in (TaskPhase.DRAINING, TaskPhase.ENDED):
                self._pause(task, 0.1)  # a process may open it again, as /dev/tty
            else:
                asyncio.get_running_loop().remove_reader(task.fd)
                os.close(task.fd)
                task.fd = -1
        return chunk or b""

    def _take(self, task: Task, chunk: bytes, final: bool = False) -> None:
        cut = task.decoder.getstate()[0]  # half a character, which waits for the rest
        if not chunk.isascii() or final or cut:
            text = task.decoder.decode(chunk, final)
            own = (cut + chunk).count(REPLACEMENT)
            chunk = text.encode("utf-8")
            task.replaced += chunk.count(REPLACEMENT) - own
        if not chunk:
            return
        offset, kept = task.output.end, task.output.kept_bytes
        task.output.append(chunk)
        self.total_bytes += len(chunk)
        self.kept_bytes += task.output.kept_bytes - kept
        self._publish("task_output", task_id=task.task_id, output=chunk, offset=offset)
        if self.kept_bytes > KEEP_ALL_OUTPUT_BYTES:
            self._drop_output()
        task.wake()

    def _drop_output(self) -> None:
        """Limit what all tasks keep: finished ones give way first, windows last."""
        running = sorted(self._running.values(), key=lambda task: -task.output.kept_bytes)
        for is_last, task in itertools.product((False, True), [*self._finished, *running]):
            excess = self.kept_bytes - KEEP_ALL_OUTPUT_BYTES
            if excess <= 0:
                return
            kept = task.output.kept_bytes
            needed = task.window and task.window + READ_CHUNK_BYTES  # what finish() read, too
            least = 0 if is_last else min(kept, needed)
            task.output.drop_to(max(least, kept - excess))
            self.kept_bytes += task.output.kept_bytes - kept

    def _discard(self, fd: int) -> None:
        """Drop, slowly, what is written after a task's end."""
        loop = asyncio.get_running_loop()
        loop.remove_reader(fd)
        if read_available(fd, READ_CHUNK_BYTES) == b"":
            os.close(fd)
        else:
            loop.call_later(0.05, loop.add_reader, fd, self._discard, fd)


def reap_shell(task: Task) -> tuple[float, int]:
    """Reap the shell, set exit code and signal; return CPU seconds, largest RSS in KiB."""
    try:
        _, status, usage = os.wait4(task.pid, 0)
    except ChildProcessError:  # something else has reaped it
        task.exit_code = 255
        return 0.0, 0
    code = os.waitstatus_to_exitcode(status)
    task.exit_code = code if code >= 0 else 128 - code
    if code < 0:
        task.signal_name = SIGNAL_NAMES.get(-code, str(-code))
    rss = usage.ru_maxrss // (KIB if sys.platform == "darwin" else 1)
    return round(usage.ru_utime + usage.ru_stime, 6), rss


@dataclass(eq=False, repr=False)
class Tasks:
    """The running tasks, and finished ones."""

    _config: Config
    _ids: TaskIds
    _publish: Publish
    _feed: Feed
    _log: Log
    _audit: AuditLog
    _spawner: Spawner
    # By id, oldest first; running ones are in both.
    kept: dict[str, Task] = field(default_factory=dict)
    running: dict[str, Task] = field(default_factory=dict)
    _finished: deque[Task] = field(default_factory=deque)  # in the order in which they ended
    _refs: dict[str, str] = field(default_factory=dict)  # `ref` -> task id, kept or not
    is_stopping: bool = False  # the whole server is

    def __post_init__(self) -> None:
        self.outputs = Outputs(self._publish, self._feed, self.running, self._finished)
        self.completed = Counter(dict.fromkeys(END_STATES, 0))  # for /metrics
        self.durations = Histogram((0.01, 0.05, 0.1, 0.5, 1, 5, 10, 30, 60, 300, 900, 3600))

    def get(self, task_id: Any) -> Task:
        """Raises CommandError `bad_field` or `unknown_task`."""
        task = self.kept.get(parse_task_id(task_id))
        if task is None:
            raise CommandError("unknown_task", f"there is no task {task_id} (any more)")
        return task

    # Starting

    def start(self, request: ExecRequest, by: str) -> Task:
        """Raises CommandError; then nothing was started."""
        if request.ref in self._refs:
            return self.get(self._refs[request.ref])
        config = self._config
        if self.is_stopping:
            raise CommandError("no_resources", "the server is stopping")
        if len(self.running) >= config.max_tasks:
            raise CommandError("too_many_tasks", f"{len(self.running)} tasks run already")
        keep_output = config.keep_output * (KEEP_TIMES if request.window else 1)
        task = Task(self._ids.take(), request, by, OutputLog(keep_output))
        if request.tty:
            task.size = request.cols, request.rows
        # So all windows, and what each pipe holds, fit into the kept output.
        fair = min(config.keep_output, KEEP_ALL_OUTPUT_BYTES // config.max_tasks)
        task.window = min(request.window, max(fair // 4, fair - READ_CHUNK_BYTES))
        try:
            self._spawner.spawn(task)
        except OSError as error:
            raise spawn_error(error, request.cwd) from None
        self.kept[task.task_id] = self.running[task.task_id] = task
        if request.ref is not None:
            self._refs[request.ref] = task.task_id
            if len(self._refs) > MAX_REFS:
                del self._refs[next(iter(self._refs))]
        task.started_timestamp = self._tell("task_start", task.describe())
        command = request.command[:200]
        self._log.write("info", "task_start", task_id=task.task_id, command=command, by=by)
        self.outputs.resume(task)
        if task.input is not None and isinstance(request.stdin, str):
            task.input.write(request.stdin.encode("utf-8"), is_end=not request.tty)
        if request.timeout:
            task.set_timer("timeout", request.timeout, self.stop)
        return task

    def _tell(self, kind: str, facts: Fields) -> int:
        both, more = ({name: facts[name] for name in row.split()} for row in TASK_EVENTS[kind])
        # First the log: it has what viewers have seen, also after a crash.
        self._audit.write(kind, **both)
        return int(self._publish(kind, **both, **more)["timestamp"])

    # Typing

    def write_input(
        self, task: Task, data: bytes, is_end: bool = False, typist: object = None
    ) -> None:
        self._find_input(task).write(data, is_end)
        task.typist = typist

    def resize(self, task: Task, cols: Any, rows: Any) -> None:
        """The kernel sends SIGWINCH. Raises CommandError."""
        check_field("cols", cols, SIDE)
        check_field("rows", rows, SIDE)
        fd = self._find_input(task).fd
        if not task.request.tty or fd < 0:
            raise CommandError("no_terminal", "the task has no terminal")
        set_terminal_size(fd, cols, rows)
        if task.size != (cols, rows):
            task.size = (cols, rows)
            self._publish("task_resize", task_id=task.task_id, cols=cols, rows=rows)

    @staticmethod
    def _find_input(task: Task) -> TaskInput:
        if task.phase is TaskPhase.ENDED:
            raise CommandError("task_ended", f"task {task.task_id} has ended")
        if task.input is None:
            message = "the task has no standard input; start it with stdin true, or tty true"
            raise CommandError("no_input", message)
        return task.input

    # Stopping

    def stop(self, task: Task, number: int = signal.SIGTERM, by: str | None = None) -> None:
        """Signal the whole session; KILL it after the grace time. by: None is the time limit.

        Raises CommandError `task_ended`, before any signal.
        """
        if task.phase is TaskPhase.ENDED:
            raise CommandError("task_ended", f"task {task.task_id} has ended")
        if task.phase is TaskPhase.RUNNING:
            task.verdict = "killed" if by else "timeout"
            task.killed_by = by
            task.phase = TaskPhase.STOPPING
            task.set_timer("kill", KILL_GRACE_SECONDS, self._kill)
        if number == signal.SIGKILL:
            self._kill(task)
            return
        signal_session(task.pid, number)
        if task.request.tty and number == signal.SIGTERM:
            self._hang_up(task)  # an interactive shell ignores TERM
        if number not in (signal.SIGSTOP, signal.SIGTSTP):
            signal_session(task.pid, signal.SIGCONT)  # a stopped process gets the first signal then

    def _hang_up(self, task: Task, delay: float = 0.1) -> None:
        """Send HUP until the task ends: bash overlooks one just before its prompt."""
        signal_session(task.pid, signal.SIGHUP)
        task.set_timer("hang-up", delay, self._hang_up, delay * 2)

    def _kill(self, task: Task) -> None:
        task.phase = TaskPhase.KILLING
        signal_session(task.pid, signal.SIGKILL)
        self._advance(task)

    def stop_all(self) -> None:
        self.is_stopping = True
        for task in list(self.running.values()):
            with suppress(CommandError):  # its end has failed
                self.stop(task, by=SERVER_STOP)

    def kill_all(self) -> None:
        for task in self.running.values():
            signal_session(task.pid, signal.SIGKILL)

    # Ending

    def reap(self) -> None:
        """One SIGCHLD may stand for many shells that have ended."""
        for task in list(self.running.values()):
            if task.phase is not TaskPhase.DRAINING:  # those have a timer
                self._advance(task)
        if os.getpid() == 1:  # in a container the server inherits orphans
            for pid in {*list_pids()} - {task.pid for task in self.running.values()}:
                with suppress(OSError):  # not a child of this process
                    os.waitpid(pid, os.WNOHANG)

    def _advance(self, task: Task, delay: float = 0.01) -> None:
        """End a task whose shell has ended. If it is being stopped, first wait until its whole
        session has ended, or KILL was sent.
        """
        with suppress(ChildProcessError):  # see reap_shell()
            if not os.waitid(os.P_PID, task.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                return
        if task.phase is TaskPhase.KILLING:
            signal_session(task.pid, signal.SIGKILL)  # again, for what was forked since
        elif task.phase is not TaskPhase.RUNNING and not is_session_gone(task.pid):
            task.phase = TaskPhase.DRAINING
            task.set_timer("poll", delay, self._advance, min(delay * 2, 0.1))
            return
        task.phase = TaskPhase.ENDED
        self._finish(task)

    def _finish(self, task: Task) -> None:
        self.outputs.finish(task)
        # No timer may fire once the shell is reaped, since its pid may be reused.
        for name in list(task.timers):
            task.cancel_timer(name)
        if task.input is not None:
            task.input.close()
        task.typist = None
        cpu_s, max_rss_kb = reap_shell(task)
        del self.running[task.task_id]
        self._finished.append(task)
        duration = time.monotonic() - task.started_at
        self.completed[task.state] += 1
        self.durations.add(duration)
        usage = {"duration_ms": int(duration * 1000), "cpu_s": cpu_s, "max_rss_kb": max_rss_kb}
        task.ended_timestamp = self._tell("task_complete", {**task.describe(), **usage})
        logged = {"task_id": task.task_id, "state": task.state, "exit_code": task.exit_code}
        self._log.write("info", "task_complete", **logged)
        while len(self._finished) > self._config.keep_tasks:
            oldest = self._finished.popleft()
            self.outputs.kept_bytes -= oldest.output.kept_bytes
            del self.kept[oldest.task_id]
        task.completed.set_result(None)
        task.wake()


# 14. Viewers ---
# publish() never waits: it appends to the Feed, and one flush per turn of the event loop gives each
# viewer everything from its cursor on, in one write.
#
# - A round serves all that wait. With many viewers it takes several turns. Tasks are not read
#   meanwhile, for ROUND_SECONDS at most: their output gathers in the pipes, so the next events are
#   fewer and larger. What is published meanwhile is for the next round.
# - While a transport has nothing to write, bytes go to the socket directly. While it has, its
#   viewer is stalled, and passed over: it costs one batch and an integer, however slow it is, and
#   delays others by PATIENCE_SECONDS at most.


def count_waiting_bytes(transport: asyncio.WriteTransport) -> int:
    try:
        return transport.get_write_buffer_size()
    except AttributeError:  # asyncio's TLS transport after it was closed (before Python 3.11)
        return 0


class Compressor:
    """Compresses events, for DEFLATE_SHARE of the time at most."""

    _earned_at = 0.0  # perf_counter: when the used time is earned again

    def compress(self, frame: bytes, bits: int) -> bytes:
        """Return the frame as it is when no time is left."""
        now = time.perf_counter()
        if now <= self._earned_at:
            return frame
        frame = deflate_frame(frame, bits)
        # At most DEFLATE_SECONDS are saved up.
        start = max(self._earned_at, now - DEFLATE_SECONDS / DEFLATE_SHARE)
        self._earned_at = start + (time.perf_counter() - now) / DEFLATE_SHARE
        return frame


class ViewerState(enum.Enum):
    """Whether a viewer takes events."""

    READY = "ready"  # its transport has nothing to write
    STALLED = "stalled"  # it has
    LEFT = "left"  # our close frame was sent, or the client has gone


READY = ViewerState.READY  # saves each viewer of a round a look-up


@dataclass(eq=False, repr=False)
class Viewer:
    """One WebSocket client."""

    transport: asyncio.Transport
    send: Callable[[bytes], int]  # the socket's, while the transport has nothing to write
    websocket: WebSocketConnection
    role: Role
    by: str
    choice: Choice
    audience: Audience = field(init=False)  # once it has joined
    # A factory, since CPython is slower where the class has the attribute, too.
    state: ViewerState = field(default_factory=lambda: READY)
    cursor: int = 0  # the seq from which on it needs events
    pong_due: bytes | None = None  # answers the newest ping after a stall
    written_bytes: int = 0
    largest_reply: int = 0  # bytes
    # Monotonic: its last byte; the end of its last stall; our last ping.
    heard_at: float = field(default_factory=time.monotonic)
    taken_at: float = field(default_factory=time.monotonic)
    pinged_at: float = 0.0

    @property
    def is_open(self) -> bool:
        """Nothing may be sent after a close frame (RFC 6455, 5.5.1)."""
        return self.websocket.state is WebSocketState.OPEN and not self.transport.is_closing()

    def send_json(self, message: Fields) -> None:
        """Send a message; or close a client that asks but does not read."""
        if count_waiting_bytes(self.transport) > MAX_PERSONAL_BYTES + self.largest_reply:
            self.close(CloseCode.POLICY_VIOLATION, "replies are not read")
            return
        frame = self.websocket.encode(Opcode.TEXT, encode_json(message))
        self.largest_reply = max(self.largest_reply, len(frame))
        self.write(frame)

    def send_pong(self, payload: bytes) -> None:
        if self.state is ViewerState.STALLED:
            self.pong_due = payload  # only the newest is answered (RFC 6455, 5.5.3)
        elif self.is_open:
            self.write(self.websocket.encode(Opcode.PONG, payload))

    def close(self, code: int, reason: str) -> None:
        self.write(self.websocket.close(code, reason))
        self.state = ViewerState.LEFT

    def ping(self, now: float) -> bool:
        """Return False if the last one was not answered."""
        if self.state is ViewerState.STALLED:  # WRITE_STALL_SECONDS applies instead
            self.heard_at = now
        elif self.heard_at < self.pinged_at:
            return False
        else:
            self.write(self.websocket.encode(Opcode.PING, b""))
            self.pinged_at = now
        return True

    def write(self, data: bytes) -> None:
        if data and not self.transport.is_closing():
            self.written_bytes += len(data)
            self.transport.write(data)


@dataclass(eq=False, repr=False)
class Audience:
    """Viewers that hear the same events; at the same cursor they share each batch."""

    kinds: Kinds
    bits: int  # of the compression window; 0 is none
    viewers: dict[Viewer, None] = field(default_factory=dict)  # an ordered set


class Viewers:
    """All viewers, and the feed they read."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.feed = Feed(encode_event, KEEP_EVENTS_BYTES, Compressor().compress)
        self.all: set[Viewer] = set()
        self._audiences: dict[tuple[Kinds, int], Audience] = {}
        # For /metrics; _left_bytes were written to viewers that have left.
        self.published = dict.fromkeys(EVENT_TYPES, 0)
        self.gaps = self._left_bytes = 0
        # The rest of this round, in reverse; the next one, and its kinds of events.
        self._round: list[Viewer] = []
        self._queue: dict[Viewer, None] = {}
        self._news: set[str] = set()
        # Audience and cursor -> frames and the cursor after them, during a flush.
        self._batches: dict[tuple[Audience, int], tuple[bytes, int]] = {}
        self._hurried_at = 0.0  # when publish() last flushed
        self._stalled: set[Viewer] = set()
        # Viewers that are behind -> seconds that tasks may still wait for each.
        self._patience: dict[Viewer, float] = {}
        self._looked_at = 0.0  # when that was last counted down

    @property
    def written_bytes(self) -> int:
        return self._left_bytes + sum(viewer.written_bytes for viewer in self.all)

    def publish(self, kind: str, **fields: Any) -> Fields:
        """Broadcast an event, and return it."""
        event = {"type": kind, "timestamp": int(time.time() * 1000), "seq": 0, **fields}
        self._news.update(self.feed.append(event))
        self.published[kind] += 1
        now = time.monotonic()
        is_early = self.feed.is_dirty or now - self._hurried_at <= FEW_PAUSE_SECONDS
        if len(self.all) > FEW_VIEWERS or is_early:
            self._schedule()
        else:
            self._hurried_at = now
            self.flush()
        if not self.feed.must_pause and now - self._looked_at >= PRESSURE_SECONDS:
            self._update_pressure()
        return event

    def join(self, viewer: Viewer, since: int | None) -> None:
        """since: the last event that it has seen; None: from now on."""
        self.all.add(viewer)
        self._enter_audience(viewer)
        viewer.cursor = self.feed.next if since is None else since + 1
        if viewer.cursor > self.feed.next:
            # From another boot: how much is missing is unknown, so the gap begins at 0.
            viewer.cursor = self.feed.first
            self._send_gap(viewer, 0, viewer.cursor - 1)
        self._serve_next(viewer)

    def leave(self, viewer: Viewer) -> None:
        """Send nothing more."""
        if viewer in self.all:
            self.all.remove(viewer)
            self._leave_audience(viewer)
            self._left_bytes += viewer.written_bytes
        viewer.state = ViewerState.LEFT  # a round that it is in skips it
        self._stalled.discard(viewer)
        self._queue.pop(viewer, None)

    def _enter_audience(self, viewer: Viewer) -> None:
        key = viewer.choice.kinds, viewer.websocket.deflate_bits
        viewer.audience = self._audiences.setdefault(key, Audience(*key))
        viewer.audience.viewers[viewer] = None

    def _leave_audience(self, viewer: Viewer) -> None:
        audience = viewer.audience
        del audience.viewers[viewer]
        if not audience.viewers:
            del self._audiences[audience.kinds, audience.bits]

    def choose(self, viewer: Viewer, choice: Choice) -> int:
        """Return the seq of the last event under its old choice."""
        viewer.cursor = self.find_seen(viewer) + 1
        self._leave_audience(viewer)
        viewer.choice = choice
        self._enter_audience(viewer)
        self._serve_next(viewer)
        return viewer.cursor - 1

    def find_seen(self, viewer: Viewer) -> int:
        """Return the seq up to which it has been sent all that it chose."""
        cursor, kinds = viewer.cursor, viewer.audience.kinds
        if cursor < self.feed.first and self.feed.has_dropped(cursor, kinds):
            return cursor - 1  # its gap will begin at the cursor
        return self.feed.find_next(cursor, kinds) - 1

    def stall(self, viewer: Viewer) -> None:
        if viewer.state is READY:
            viewer.state = ViewerState.STALLED
            self._stalled.add(viewer)

    def resume(self, viewer: Viewer) -> None:
        """Call it when its transport has written everything."""
        if viewer.state is not ViewerState.STALLED or not viewer.is_open:
            return
        viewer.state = READY
        self._stalled.discard(viewer)
        viewer.taken_at = time.monotonic()
        if viewer.pong_due is not None:
            payload, viewer.pong_due = viewer.pong_due, None
            viewer.send_pong(payload)
        self._serve_next(viewer)

    def _serve_next(self, viewer: Viewer) -> None:
        self._queue[viewer] = None
        self._schedule()

    def _update_pressure(self) -> None:
        """Set whether tasks must pause, so that viewers that still read lose no events.

        They pause once a viewer is half the feed behind, until it has caught up: without limit
        while we are slow to serve it; for PATIENCE_SECONDS in all while it is stalled, but took
        something within LATELY_SECONDS. They wait for no other: that has stopped reading.
        """
        now = time.monotonic()
        elapsed, self._looked_at = min(now - self._looked_at, 2 * PRESSURE_SECONDS), now
        limit = self.feed.next if self.feed.must_pause else self.feed.middle
        self.feed.must_pause, patience = False, {}
        # All others have been sent everything.
        for viewer in {*self._stalled, *self._round, *self._queue}:
            cursor = self.find_seen(viewer) + 1
            # Catching up restores the patience: only viewers that are behind are in the table.
            if cursor < self.feed.next:
                patience[viewer] = self._patience.get(viewer, PATIENCE_SECONDS)
            if cursor >= limit:
                continue
            if viewer.state is READY:
                self.feed.must_pause = True  # it is us who are slow
            elif now - viewer.taken_at <= LATELY_SECONDS:
                patience[viewer] -= elapsed
                self.feed.must_pause |= patience[viewer] > 0
        self._patience = patience
        if self.feed.must_pause:
            self._loop.call_later(PRESSURE_SECONDS, self._update_pressure)

    def _schedule(self) -> None:
        if not self.feed.is_dirty:
            self.feed.is_dirty = True
            self._loop.call_soon(self.flush)

    def flush(self) -> None:
        """Serve a round for FLUSH_TURN_SECONDS; the next turn goes on."""
        self.feed.is_dirty = False
        if not self._round:  # begin one
            for audience in self._audiences.values() if self._news else ():
                if audience.kinds is None or not audience.kinds.isdisjoint(self._news):
                    self._queue.update(audience.viewers)
            self._news.clear()
            self._round, self._queue = [*reversed(self._queue)], {}
        end = time.perf_counter() + FLUSH_TURN_SECONDS
        while self._round:
            step = self._round[-ROUND_STEP:]
            del self._round[-ROUND_STEP:]
            self._serve_step(step)
            if time.perf_counter() > end:
                break
        self._batches.clear()
        if self._round or self._queue or self._news:
            self._schedule()

    def _serve_step(self, step: list[Viewer]) -> None:
        # Usually each viewer is where the last one was, and its socket takes everything.
        newest, audience, cursor = self.feed.next, None, 0
        for viewer in reversed(step):
            if viewer.state is not READY or viewer.cursor == newest:
                continue
            if viewer.cursor != cursor or viewer.audience is not audience:
                data, after = self._prepare_batch(viewer)
                audience, cursor, size = viewer.audience, viewer.cursor, len(data)
                if viewer.state is not READY:  # its `gap` waits to be written
                    continue
            viewer.cursor = after
            try:
                sent = viewer.send(data) if size else 0
            except OSError:  # full, or broken: the transport finds out
                sent = 0
            viewer.written_bytes += size
            if sent < size:
                viewer.transport.write(memoryview(data)[sent:])
            if after != newest:
                self._round.append(viewer)

    def flush_all(self) -> None:
        while self.feed.is_dirty:
            self.flush()

    def _prepare_batch(self, viewer: Viewer) -> tuple[bytes, int]:
        """Return its next batch; if it has missed events, send it a `gap` first."""
        audience, first = viewer.audience, self.feed.first
        if viewer.cursor < first:
            if self.feed.has_dropped(viewer.cursor, audience.kinds):
                self._send_gap(viewer, viewer.cursor, first - 1)
            viewer.cursor = first
        place = audience, viewer.cursor
        if place not in self._batches:
            self._batches[place] = self.feed.read_batch(place[1], audience.kinds, audience.bits)
        return self._batches[place]

    def _send_gap(self, viewer: Viewer, first: int, last: int) -> None:
        self.gaps += 1
        viewer.send_json({"type": "gap", "from": first, "to": last})


# 15. Background loops ---
# What happens without a request: statistics, alerts, answers to probes, word to systemd.


def read_proc_file(path: str) -> str:
    with open(path, encoding="ascii", errors="replace") as file:
        return file.read()


def read_basics() -> Fields:
    """Return the fields of a Sample that Python itself knows."""
    disk = os.statvfs("/")
    if hasattr(time, "CLOCK_BOOTTIME"):  # counts suspension, too
        uptime = time.clock_gettime(time.CLOCK_BOOTTIME)
    else:  # macOS
        uptime = time.time() - psutil.boot_time()
    return {
        "now": time.monotonic(),
        "disk_used": (disk.f_blocks - disk.f_bfree) * disk.f_frsize,
        "disk_total": disk.f_blocks * disk.f_frsize,
        "load_avg": os.getloadavg(),
        "uptime": uptime,
    }


def read_proc_sample() -> Sample:
    """Works without psutil."""
    busy, total = parse_cpu_times(read_proc_file("/proc/stat"))
    memory = parse_meminfo(read_proc_file("/proc/meminfo"))
    return Sample(
        busy_ticks=busy,
        total_ticks=total,
        ram_used=memory["MemTotal"] - memory["MemAvailable"],
        ram_total=memory["MemTotal"],
        swap_used=memory["SwapTotal"] - memory["SwapFree"],
        swap_total=memory["SwapTotal"],
        net=parse_net_dev(read_proc_file("/proc/net/dev")),
        **read_basics(),
    )


def read_psutil_sample() -> Sample:
    """Works without /proc, too."""
    times = psutil.cpu_times()
    # Guest time is already part of user time; waiting for a disk is idle time.
    total = sum(times) - getattr(times, "guest", 0) - getattr(times, "guest_nice", 0)
    memory, swap = psutil.virtual_memory(), psutil.swap_memory()
    nics = psutil.net_io_counters(pernic=True).items()
    return Sample(
        busy_ticks=total - times.idle - getattr(times, "iowait", 0),
        total_ticks=total,
        ram_used=memory.total - memory.available,
        ram_total=memory.total,
        swap_used=swap.used,
        swap_total=swap.total,
        net={name: (nic.bytes_recv, nic.bytes_sent) for name, nic in nics if name != "lo"},
        **read_basics(),
    )


def choose_source() -> Callable[[], Sample]:
    """Return what reads a Sample. Raises StartError."""
    if psutil is not None:
        return read_psutil_sample
    if not os.path.exists("/proc/stat"):
        raise StartError("there is no /proc here: install psutil")
    return read_proc_sample


def read_own_usage() -> list[tuple[str, Any, str]]:
    """Return rows for /metrics."""
    resident = fds = None
    with suppress(OSError):  # macOS has no /proc; or no descriptor is free
        pages = int(read_proc_file("/proc/self/statm").split()[1])
        resident = pages * resource.getpagesize()
        # Since Linux 6.2 the folder's size is the count. Listing 10,000 takes 12 ms.
        fds = os.stat("/proc/self/fd").st_size or len(os.listdir("/proc/self/fd")) - 1
    return [
        ("process_cpu_seconds_total", time.process_time(), "CPU time of this server."),
        ("process_resident_memory_bytes", resident, "Resident memory of this server."),
        ("process_open_fds", fds, "Open descriptors of this server."),
    ]


@dataclass(eq=False, repr=False)
class Webhook:
    """Posts alerts in turn, each up to three times, in a daemon thread: neither the event loop nor
    the server's end waits for a name look-up or a receiver that hangs.
    """

    url: WebhookUrl
    facts: Fields
    log: Log

    def __post_init__(self) -> None:
        self._context = ssl.create_default_context() if self.url.is_tls else None
        self._alerts: queue.Queue[Fields] = queue.Queue(MAX_WEBHOOK_ALERTS)
        threading.Thread(target=self._run, daemon=True).start()

    @property
    def pending(self) -> int:
        return self._alerts.unfinished_tasks

    def send(self, event: Fields) -> None:
        if self._alerts.full():
            self._alerts.get_nowait()
            self._alerts.task_done()
            self.log.write_limited("warning", "webhook_dropped", url=self.url.origin)
        self._alerts.put_nowait(event)

    def _run(self) -> None:
        while True:
            event = self._alerts.get()
            body = encode_json({**event, "server": self.facts})
            fields = {"alert": event["type"], "seq": event["seq"], "url": self.url.origin}
            for pause in (0.0, *WEBHOOK_PAUSES):
                time.sleep(pause)
                try:
                    self._post(body)
                    self.log.write("debug", "webhook_sent", **fields)
                    break
                except (OSError, ValueError) as error:  # ValueError: a malformed name, too
                    reason = explain(error)
            else:
                self.log.write("error", "webhook_failed", **fields, reason=reason)
            self._alerts.task_done()

    def _post(self, body: bytes) -> None:
        """Raises OSError or ValueError unless the answer is 2xx."""
        url, context = self.url, self._context
        with socket.create_connection((url.host, url.port), WEBHOOK_SECONDS) as plain:
            end = time.monotonic() + WEBHOOK_SECONDS
            with context.wrap_socket(plain, server_hostname=url.host) if context else plain as peer:
                peer.sendall(encode_webhook_request(url, body))
                answer, more, status = b"", b"more", None
                # The limits hold for slow answers, too, and for any number of 1xx before them.
                while more and status is None and len(answer) < MAX_REQUEST_LINE_BYTES:
                    peer.settimeout(max(0.01, end - time.monotonic()))
                    more = peer.recv(KIB)
                    answer += more or b"\n"
                    status = parse_webhook_answer(answer)
        if not status:
            raise ValueError("it gave no HTTP answer")
        if not 200 <= status <= 299:  # no redirect is followed: it would become a GET
            raise ValueError(f"it answered {status}")


def describe_failure(error: BaseException) -> Fields:
    if isinstance(error, OSError):
        return {"error": str(error)}
    return {"trace": "".join(traceback.TracebackException.from_exception(error).format())}


@dataclass(eq=False, repr=False)
class Sampler:
    """Publishes `stats_update` every interval, and alerts."""

    config: Config
    publish: Publish
    log: Log
    running: Mapping[str, Task]  # which an alert names
    notify: Callable[[Fields], None]  # gets each alert's events, too

    def __post_init__(self) -> None:
        config = self.config
        self._read_sample = choose_source()
        # The newest sample; and that of the newest tick, for the next rates.
        self.sample = self._ticked = self._read_sample()
        # Bytes since boot. Unlike the kernel's they do not fall when an interface goes.
        nets = self.sample.net.values()
        self.net_recv, self.net_sent = (sum(net[way] for net in nets) for way in (0, 1))
        self._rule = AlertRule(config.cpu_alert, config.alert_cooldown, config.alert_for)
        self.alert: Fields | None = None  # the newest event of one that is not resolved
        self._alert_since = 0.0
        # The oldest first. `resolved` in each is the event that ended it.
        self.alerts: deque[Fields] = deque(maxlen=50)
        self.newest: asyncio.Future[Fields] = asyncio.Future()  # the newest `stats_update`
        self.history: deque[list[Any]] = deque(maxlen=600)  # ten minutes at the default interval

    async def run(self) -> None:
        """A tick that is late by less than an interval delays no later one."""
        interval = self.config.interval
        due = time.monotonic() + min(interval, 1.0)
        while True:
            await asyncio.sleep(due - time.monotonic())
            due = max(due + interval, time.monotonic())
            try:
                self.tick()
            except Exception as error:  # no descriptor is free, say
                self.log.write_limited("error", "sampler_failed", **describe_failure(error))

    def _take_sample(self) -> None:
        before, self.sample = self.sample, self._read_sample()
        self.net_recv += count_traffic(before, self.sample, 0)
        self.net_sent += count_traffic(before, self.sample, 1)

    def refresh(self) -> None:
        if time.monotonic() - self.sample.now > FRESH_SECONDS:
            with suppress(Exception):  # tick() will log it; the old sample stays
                self._take_sample()

    def tick(self) -> None:
        """Publish a new sample."""
        self._take_sample()
        stats = build_stats(self._ticked, self.sample)
        self._ticked = self.sample
        cpus = os.cpu_count() or 1
        event = self.publish("stats_update", **stats, hostname=read_hostname(), cpus=cpus)
        columns = ("timestamp", "cpu", "ram_used", "net_recv", "net_sent")
        self.history.append([event[name] for name in columns])
        if self.newest.done():
            self.newest = asyncio.Future()
        self.newest.set_result(event)
        self._check_alert(stats["cpu"])

    def _check_alert(self, cpu: float) -> None:
        now = self.sample.now
        change = self._rule.update(cpu, now)
        facts = {"cpu": cpu, "hostname": read_hostname()}
        if change == "cpu_alert":
            message = f"CPU usage exceeded {self.config.cpu_alert:g}%!"
            tasks, is_new = list(self.running), self.alert is None
            self.alert = self.publish("cpu_alert", **facts, message=message, tasks=tasks)
            if is_new:
                self._alert_since = now
                self.alerts.append({**self.alert, "resolved": None})
            self.notify(self.alert)
            self.log.write("warning", "cpu_alert", cpu=cpu, message=message)
        elif change == "alert_resolved":
            facts["duration_ms"] = int((now - self._alert_since) * 1000)
            self.alert = None
            event = self.publish("alert_resolved", alert="cpu_alert", **facts)
            self.alerts[-1]["resolved"] = event
            self.notify(event)
            self.log.write("info", "alert_resolved", cpu=cpu, duration_ms=facts["duration_ms"])


def read_link_networks() -> list[ipaddress.IPv4Network]:
    try:
        return parse_link_routes(read_proc_file("/proc/net/route"))
    except (OSError, ValueError, IndexError, OverflowError):
        return []


@dataclass(eq=False, repr=False)
class Discovery:
    """Answers probes, on a UDP socket for each of `places` and one more. Raises OSError."""

    port: int
    # IPv4 addresses where HTTP listens; [] is every one. Replies come from these, since a prober
    # takes their source for the server's address.
    places: Sequence[str]
    loopback_only: bool
    make_facts: Callable[[], Fields]  # returns a reply's fields

    def __post_init__(self) -> None:
        self._each = RateLimit(MAX_REPLIES_PER_SOURCE, 1)
        self._all = RateLimit(MAX_REPLIES_PER_SECOND, 1)
        self._networks_until = 0.0  # when to read again which networks are on-link
        # A socket that is bound to one address receives no broadcasts, hence the last.
        self._sockets: dict[str, socket.socket] = {}
        try:
            last = "127.255.255.255" if self.loopback_only else "0.0.0.0"
            for address in dict.fromkeys((*self.places, last)):
                udp = self._sockets[address] = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
                udp.setblocking(False)
                # Servers on one host share the port: all receive broadcasts, one a unicast. But
                # port 0 must give a free one.
                udp.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, self.port > 0)
                if sys.platform == "darwin":
                    udp.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
                udp.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, 1)  # never leaves the link
                udp.bind((address, self.port))
                udp.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                self.port = int(udp.getsockname()[1])
                asyncio.get_running_loop().add_reader(udp, self._receive, address)
        except OSError:
            self.close()
            raise

    def _receive(self, place: str) -> None:
        with suppress(OSError):  # a prober cannot be reached
            data, source = self._sockets[place].recvfrom(len(DISCOVERY_PROBE) + 1)
            if data == DISCOVERY_PROBE and self.may_answer(source[0], time.monotonic()):
                udp = self._sockets[place if place in self.places else self._choose(source[0])]
                udp.sendto(encode_discovery_reply(self.make_facts()), source)

    def may_answer(self, source: str, now: float) -> bool:
        """Whether a host is on the same link and may get one more reply now."""
        if not is_loopback(source):
            if now >= self._networks_until:
                self._networks_until, self._networks = now + 5, read_link_networks()
            address = parse_ip(source)
            if self.loopback_only or not any(address in network for network in self._networks):
                return False
        return not self._each.take(source, now) and not self._all.take("", now)

    def _choose(self, source: str) -> str:
        """Return the address to answer from, by the kernel's routes."""
        here = ""
        with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
            udp.connect((source, 9))  # sends nothing
            here = udp.getsockname()[0]
        return here if here in self._sockets else next(iter(self._sockets))

    def close(self) -> None:
        for udp in self._sockets.values():
            asyncio.get_running_loop().remove_reader(udp)
            udp.close()


class SystemdNotifier:
    """Tells systemd that the server is ready, stops, and lives (sd_notify(3)).

    Takes systemd's variables out of the environment, so that no task can speak for the server.
    """

    def __init__(self, environ: MutableMapping[str, str]) -> None:
        names = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")
        address, microseconds, pid = (environ.pop(name, "") for name in names)
        self._address = re.sub("^@", "\0", address)  # an abstract name (unix(7))
        # Opened now: a server without free descriptors is still alive.
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) if address else None
        is_for_us = pid in ("", str(os.getpid())) and DIGITS.fullmatch(microseconds)
        # Seconds between two reports: half of systemd's time-out (sd_watchdog_enabled(3)); 0: none.
        self._seconds = int(microseconds) / 2e6 if is_for_us else 0.0

    def tell(self, *lines: str) -> None:
        """Send NAME=VALUE lines; it does not matter if that fails."""
        data = "\n".join(lines).encode("utf-8", "replace")
        with suppress(OSError, ValueError):
            if self._socket is not None:
                self._socket.sendto(data, socket.MSG_DONTWAIT, self._address)

    def beat(self) -> None:
        if self._seconds:
            self.tell("WATCHDOG=1")
            asyncio.get_running_loop().call_later(self._seconds, self.beat)


# 16. Server ---
# A connection: accept it, ask the kernel whose it is, read a request, pass the gate, find the
# route, answer; or become a Viewer. make_error_response() and handle_message() answer errors.

NETLINK_SOCK_DIAG = 4  # linux/netlink.h
PLAIN_TEXT = "text/plain; charset=utf-8"


def query_socket_owner(peer: Endpoint, local: Endpoint) -> int:
    """Ask netlink for the uid of the socket whose own end is `peer`: 0.2 ms."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_SOCK_DIAG) as netlink:
        netlink.settimeout(1.0)
        netlink.sendto(encode_diag_request(peer, local), (0, 0))
        return parse_diag_reply(netlink.recv(4096))


def scan_socket_owner(peer: Endpoint, local: Endpoint) -> int:
    """The same without netlink: 33 ms among 16,000 sockets."""
    path = "/proc/net/tcp" if peer[0].version == 4 else "/proc/net/tcp6"
    return parse_proc_tcp(read_proc_file(path), peer, local)


def choose_owner_query() -> OwnerQuery:
    """Return query_socket_owner if it finds a socket of this process."""
    try:
        with socket.socket() as client, socket.create_server(("127.0.0.1", 0)) as listener:
            client.connect(listener.getsockname())
            ends = (client.getsockname(), listener.getsockname())
            query_socket_owner(*((ipaddress.ip_address(host), port) for host, port in ends))
    except (OSError, ValueError, AttributeError):  # the last on macOS
        return scan_socket_owner
    return query_socket_owner


def read_trusted_uid() -> int:
    """Return the server's uid, or -1 if other accounts may have the same.

    In a user namespace, one uid stands for all accounts that it does not map.
    """
    uid = os.geteuid()
    try:
        overflow_uid = int(read_proc_file("/proc/sys/kernel/overflowuid"))
        maps_all = read_proc_file("/proc/self/uid_map").split() == ["0", "0", "4294967295"]
    except (OSError, ValueError):
        return uid
    return -1 if uid == overflow_uid and not maps_all else uid


def enable_keepalive(connection: socket.socket) -> None:
    """Let the kernel notice within 20 s that a host is dead for which no data wait (tcp(7))."""
    with suppress(OSError, AttributeError):  # it is closed already, or a Unix socket
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in KEEPALIVE.items():
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def identify_peer(
    server: Server, connection: socket.socket, listener: ListenerKind, address: Any
) -> tuple[Peer, str]:
    """Return the peer, and its name for logs. Right after accept: a closed socket has no owner."""
    uid = None
    if listener is ListenerKind.UNIX:
        with suppress(OSError, AttributeError):  # the latter on macOS
            credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
            uid = int(struct.unpack("=iII", credentials)[1])  # unix(7)
        return Peer(listener, uid=uid), "unix"
    local = connection.getsockname()
    # parse_ip() makes mapped addresses IPv4, as the kernel's tables do.
    peer_ip, local_ip = parse_ip(address[0]), parse_ip(local[0])
    if peer_ip and local_ip and peer_ip.is_loopback and local_ip.is_loopback:
        with suppress(OSError, ValueError, AttributeError):
            owner = server.query_owner((peer_ip, address[1]), (local_ip, local[1]))
            # After a reset another process may have the port, but the request can still be read.
            state = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]
            if state in (1, 8):  # ESTABLISHED, CLOSE_WAIT (linux/tcp_states.h)
                uid = owner
    host = f"[{address[0]}]" if ":" in address[0] else address[0]
    scheme = "https" if server.tls else "http"
    return Peer(listener, address[0], uid, scheme), f"{host}:{address[1]}"


class TlsFiles:
    """The certificate and its key, read again when they change."""

    def __init__(self, cert: str, key: str, log: Log) -> None:
        self._paths = cert, key or cert
        self._log = log
        self._read = self._seen = self._look()  # how they were when read; at the last check
        self.context = self._load()

    def _look(self) -> list[tuple[int, int, int]] | None:
        with suppress(OSError):
            return [(one.st_ino, one.st_mtime_ns, one.st_size) for one in map(os.stat, self._paths)]
        return None

    def _load(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_CIPHER_SERVER_PREFERENCE
        context.set_alpn_protocols(["http/1.1"])
        context.load_cert_chain(*self._paths, password="")  # else OpenSSL asks on the terminal
        return context

    def refresh(self) -> None:
        """Read changed files again, once they are as they were at the last check."""
        before, self._seen = self._seen, self._look()
        if self._seen != before or self._seen == self._read:
            return
        self._read = self._seen
        try:
            self.context = self._load()
        except (OSError, ValueError) as error:
            self._log.write("error", "tls_not_reloaded", error=str(error))
        else:
            self._log.write("info", "tls_reloaded", cert=self._paths[0])


@dataclass(repr=False)
class Request:
    """A request that has passed the gate."""

    head: RequestHead
    route: Route
    parameters: Mapping[str, str]
    role: Role | None
    by: str  # the client, for events and logs
    body: bytes = b""
    # Closed when the answer is written, or the client has gone.
    ends: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)


@dataclass(repr=False)
class Response:
    """An answer. pieces: instead of `body`; trailers: filled while those are made."""

    status: int = 200
    body: bytes = b""
    media_type: str = "application/json"
    fields: Iterable[tuple[str, str]] = ()
    pieces: AsyncIterator[bytes] | None = None
    trailers: dict[str, str] = field(default_factory=dict)


async def iterate_pieces(pieces: Iterable[bytes]) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece


def output_response(fields: Fields, name: str, pieces: Sequence[bytes], is_raw: bool) -> Response:
    """Return output as text, or as a field of JSON; a long one piece by piece."""
    if is_raw:
        return Response(media_type=PLAIN_TEXT, pieces=iterate_pieces(pieces))
    start = b'%b,"%b":"' % (encode_json(fields)[:-1], name.encode("ascii"))
    parts = itertools.chain([start], map(escape_json_text, pieces), [b'"}\n'])
    if sum(map(len, pieces)) > BATCH_BYTES:
        return Response(pieces=iterate_pieces(parts))
    return Response(body=b"".join(parts))


async def follow_output(
    task: Task, offset: int, trailers: dict[str, str], move: Callable[[int], None]
) -> AsyncIterator[bytes]:
    """Yield a task's output to its end. move: is told up to which offset the kernel has taken it.

    If the client falls behind the kept output, the body is cut off: a hole would not be noticed.
    """
    while task.output.start <= offset:
        move(offset)  # also after a wait: the window may have been lifted
        pieces = task.output.read(offset, is_exact=True)
        for piece in pieces[:16]:  # what waits for the client needs memory
            yield piece
            offset += len(piece)
            move(offset)
        if offset == task.output.end:
            if task.completed.done():
                trailers["X-Exit-Code"] = str(task.exit_code)
                return
            await task.news.wait()
    raise ConnectionAbortedError("the client reads too slowly")


class Route(NamedTuple):
    """One path. role: who may use it; None: whom the gate lets through (rule 5).

    answer: returns a Response, or a value for JSON.
    """

    method: str
    role: Role | None
    parameters: tuple[str, ...]
    answer: Callable[[Server, Request], Awaitable[Any]]


# The answers of the routes

NO_FRAMES = "frame-ancestors 'none'; base-uri 'none'; form-action 'none'"

HELP = """\
ServerControl: run commands on this server and watch them live.

A browser shows this address as a page that does all of it. With curl:

    curl -d 'date' {url}/exec                   start a command
    curl -N -d 'make' '{url}/exec?follow'       see its output as it comes
    curl -d 'df -h' '{url}/exec?wait'           wait; output and exit code as JSON
    curl --data-binary @job.sh '{url}/exec?wait'    run a script

Without a token only the account that started the server gets in, on its own
machine, and not on a server that listens on a network. All others add

    -H 'Authorization: Bearer TOKEN'

The token is in ~/.local/state/servercontrol/token of that account, or, if the
server is a service, in /var/lib/servercontrol/token.

    POST /exec            run the body; or JSON {"cmd": ...} with cwd, env, timeout,
                          name, stdin, tty, cols, rows; ?wait, ?follow as above;
                          ?wait&raw: the output as text; &fail: status 500 if it
                          fails; &tie: stop it when this client goes away
    GET  /tasks           all tasks; ?id=1: one. State, exit code, times, who asked
    GET  /logs?id=1       its output; &raw: as text, &follow: to its end,
                          &offset=B: from there on, &tail=B: its last B bytes
    POST /stdin?id=1      the body goes to its standard input; &eof ends that
    POST /kill?id=1       stop it: TERM, after 3 s KILL; &signal=NAME: another first
    GET  /stats           CPU, memory, disk, network; ?history: newest 600 samples
    GET  /info, /health   about the server; whether it answers
    GET  /metrics         all figures, for Prometheus

Errors are {"error": CODE, "message": TEXT}. WebSocket clients get every event:

    const socket = new WebSocket("{ws}/ws");
    socket.onmessage = (message) => console.log(JSON.parse(message.data));

    task_start     task_id, command, pid, by
    task_output    task_id, output, offset
    task_complete  task_id, exit_code, signal, state
    stats_update   cpu, ram_used, ram_total, ...
    cpu_alert      cpu, hostname, message

A token is the second argument: ["servercontrol.v1", "bearer." + token]. With
?since=SEQ&boot=BOOT_ID all events after SEQ come first; with
?only=task_start,task_complete come only these.
On the server: python3 servercontrol.py --help
"""


def find_url(head: RequestHead, scheme: str) -> str:
    return f"{scheme}://{head.value('host') or 'HOST:PORT'}"


async def answer_page(server: Server, request: Request) -> Response:
    """The dashboard, or HELP for `curl` and `?text`. Holds no data."""
    head, page = request.head, server.page
    fields = [("Referrer-Policy", "no-referrer")]
    is_browser = any(one.startswith("text/html") for one in head.tokens("accept"))
    if "text" in request.parameters or not is_browser:
        fields.append(("Content-Security-Policy", f"default-src 'none'; {NO_FRAMES}"))
        url = find_url(head, "https" if server.config.has_tls else "http")
        text = HELP.replace("{url}", url).replace("{ws}", "ws" + url.removeprefix("http"))
        return Response(200, text.encode("utf-8"), PLAIN_TEXT, fields)
    fields.append(("Content-Security-Policy", page.policy(head.value("host"))))
    body = page.body
    codings = (one.replace(" ", "") for one in head.tokens("accept-encoding"))
    # gzip is named, and its weight is not 0 (RFC 9110, 12.5.3).
    if zlib and any(re.fullmatch(r"(x-)?gzip(;q=(?!0(\.0*)?$).*)?", one) for one in codings):
        body = page.compressed
        fields.append(("Content-Encoding", "gzip"))
    return Response(200, body, "text/html; charset=utf-8", fields)


async def answer_health(server: Server, request: Request) -> Any:
    return {"ok": True}


async def answer_preflight(server: Server, request: Request) -> Response:
    fields = [
        ("Access-Control-Allow-Methods", "GET, POST"),
        ("Access-Control-Allow-Headers", "authorization, content-type"),
        ("Access-Control-Max-Age", "600"),
    ]
    return Response(204, fields=fields)


def follow_response(server: Server, request: Request, task: Task, offset: int) -> Response:
    """Return output as it comes; the exit code is in the trailers."""
    start = max(offset, task.output.start)
    fields = [
        ("X-Task-Id", task.task_id),
        ("X-Offset", str(start)),
        ("Trailer", "X-Exit-Code, X-Dropped-Bytes"),
        ("X-Accel-Buffering", "no"),  # for nginx, which would wait for more
    ]
    trailers = {"X-Dropped-Bytes": str(start - offset)}
    reader = object()

    def move(offset: int) -> None:
        if task.window and request.role is Role.RUN:  # who may only watch does not delay a task
            server.tasks.outputs.move_reader(task, reader, offset)

    request.ends.callback(task.wake)  # others may have waited for this one
    request.ends.callback(task.readers.pop, reader, None)
    pieces = follow_output(task, start, trailers, move)
    return Response(200, b"", PLAIN_TEXT, fields, pieces, trailers)


def find_exec_request(server: Server, request: Request) -> ExecRequest:
    """Return what the body asks for, or with `again` what that task was asked for: with its input
    and environment, which no client can see.
    """
    ref = request.parameters.get("ref") or None
    check_field("ref", ref or "none", NAME)
    if "again" not in request.parameters:
        asked = parse_exec_body(request.head.media_type, request.body)
        return dataclasses.replace(asked, ref=ref or asked.ref)
    if request.body not in (b"", b"{}"):  # {} from browsers, which must send JSON
        raise HttpError(400, "bad_query", "with again the body is empty: it changes nothing")
    task = server.tasks.get(request.parameters["again"])
    cols, rows = task.size if task.size[0] else (80, 24)
    return dataclasses.replace(task.request, ref=ref, window=0, cols=cols, rows=rows)


# Flags of /exec; each needs one of those behind it.
EXEC_FLAGS = {"raw": ("wait", "follow"), "tie": ("wait", "follow"), "fail": ("wait",)}


def parse_exec_flags(parameters: Mapping[str, str]) -> set[str]:
    """Raises HttpError 400."""
    flags = {name for name in ("wait", "follow", *EXEC_FLAGS) if parse_flag(parameters, name)}
    if {"wait", "follow"} <= flags:
        raise HttpError(400, "bad_query", "wait or follow, not both")
    for name, partners in EXEC_FLAGS.items():
        if name in flags and not flags & set(partners):
            raise HttpError(400, "bad_query", f"{name} goes with {' or '.join(partners)}")
    return flags


async def answer_exec(server: Server, request: Request) -> Any:
    """Start a command; with `wait` or `follow` see it end."""
    flags = parse_exec_flags(request.parameters)
    asked = find_exec_request(server, request)
    if "wait" in flags:  # nobody takes anything before the end
        asked = dataclasses.replace(asked, window=0)
    task = server.tasks.start(asked, request.by)
    if "tie" in flags:
        request.ends.callback(server.stop_tied, task, request.by)
    if "follow" in flags:
        return follow_response(server, request, task, 0)
    fields = {"task_id": task.task_id, "command": task.request.command, "pid": task.pid}
    if task.window:  # it may be less than what was asked for
        fields["window"] = task.window
    if "again" in request.parameters and task.request.stdin is True:
        fields["not_repeated"] = ["stdin"]  # what was typed later
    if "wait" not in flags:
        return fields
    await asyncio.shield(task.completed)
    fields.update(
        exit_code=task.exit_code,
        signal=task.signal_name,
        state=task.state,
        truncated=task.output.start > 0,
    )
    response = output_response(fields, "output", task.output.read(), "raw" in flags)
    response.status = 500 if "fail" in flags and task.exit_code else 200
    response.fields = [
        ("X-Task-Id", task.task_id),
        ("X-Exit-Code", str(task.exit_code)),
        ("X-Dropped-Bytes", str(task.output.start)),
    ]
    return response


def find_task(server: Server, request: Request) -> Task:
    """Raises HttpError or CommandError."""
    if "id" not in request.parameters:
        raise HttpError(400, "bad_query", "the parameter id is missing")
    return server.tasks.get(request.parameters["id"])


async def answer_tasks(server: Server, request: Request) -> Any:
    if "id" in request.parameters:
        return find_task(server, request).describe()
    return [task.describe() for task in server.tasks.kept.values()]


async def answer_logs(server: Server, request: Request) -> Response:
    """The kept output of a task from `offset` on, or its last `tail` bytes."""
    task = find_task(server, request)
    name = "tail" if "tail" in request.parameters else "offset"
    text = request.parameters.get(name, "0")
    if not DIGITS.fullmatch(text):
        raise HttpError(400, "bad_query", f"{name} must be a number of bytes")
    offset = max(0, task.output.end - int(text)) if name == "tail" else int(text)
    if offset > task.output.end:
        raise HttpError(400, "bad_offset", f"the output has {task.output.end} bytes so far")
    if parse_flag(request.parameters, "follow"):
        return follow_response(server, request, task, offset)
    is_raw = parse_flag(request.parameters, "raw")
    pieces = task.output.read(offset, is_exact=is_raw)
    start = task.output.end - sum(map(len, pieces))
    fields = {
        "task_id": task.task_id,
        "offset": start,
        "next_offset": task.output.end,
        "dropped": task.output.start,
        "running": task.phase is not TaskPhase.ENDED,
    }
    response = output_response(fields, "logs", pieces, is_raw)
    response.fields = [("X-Offset", str(start)), ("X-Next-Offset", str(task.output.end))]
    return response


async def answer_kill(server: Server, request: Request) -> Any:
    task = find_task(server, request)
    name = request.parameters.get("signal", DEFAULT_SIGNAL)
    server.stop_task(task, name, request.by)
    return {"task_id": task.task_id, "signal": name}


async def answer_stdin(server: Server, request: Request) -> Any:
    task = find_task(server, request)
    server.tasks.write_input(task, request.body, is_end=parse_flag(request.parameters, "eof"))
    return {"task_id": task.task_id, "bytes": len(request.body)}


async def answer_resize(server: Server, request: Request) -> Any:
    task = find_task(server, request)
    sides = [request.parameters.get(name, "") for name in ("cols", "rows")]
    cols, rows = (int(side) if DIGITS.fullmatch(side) else 0 for side in sides)
    server.tasks.resize(task, cols, rows)
    return {"task_id": task.task_id, "cols": cols, "rows": rows}


async def answer_stats(server: Server, request: Request) -> Any:
    sampler = server.sampler
    if parse_flag(request.parameters, "alerts"):
        return {"alerts": list(sampler.alerts)}
    if parse_flag(request.parameters, "history"):
        return {"interval": server.config.interval, "samples": list(sampler.history)}
    return await asyncio.shield(sampler.newest)


NO_AUTH_WARNING = "anybody who can connect can do everything (--no-auth)"


def describe_server(server: Server, role: Role | None) -> Fields:
    """What both `/info` and `hello` say."""
    warning = NO_AUTH_WARNING if server.config.no_auth else ""
    if not warning and server.tokens.run is None:
        warning = "there is no state folder, so there is no token: nobody else gets in"
        warning += ", and no audit log is kept" * (server.audit.path == "none")
    return {
        "version": __version__,
        "hostname": read_hostname(),
        "boot_id": server.boot_id,
        "seq": server.viewers.feed.next - 1,
        "role": role.value if role else None,
        "exec": not server.config.no_exec,
        "auth": not server.config.no_auth,
        "alert": server.sampler.alert,
        "limits": server.config.limits(),
        **({"warning": warning} if warning else {}),
    }


def describe_for_probe(server: Server) -> Fields:
    """What a probe is told."""
    config, ports = server.config, server.listeners.ports
    return {
        "hostname": read_hostname(),
        "port": ports["http"],
        "ws_port": ports["ws"],
        "discovery_port": ports["discovery"],
        "version": __version__,
        "tls": config.has_tls,
        "auth": not config.no_auth,
        "exec": not config.no_exec,
        "id": server.boot_id,
    }


async def answer_info(server: Server, request: Request) -> Any:
    """What `hello` says, and more about the server."""
    return {
        **describe_server(server, request.role),
        "ports": server.listeners.ports,
        "tls": server.config.has_tls,
        "audit_errors": server.audit.errors,
        "uptime": int(time.monotonic() - server.started_at),
        "clients": len(server.viewers.all),
        "tasks_running": len(server.tasks.running),
    }


async def answer_metrics(server: Server, request: Request) -> Response:
    """For Prometheus."""
    sampler, tasks, viewers = server.sampler, server.tasks, server.viewers
    sampler.refresh()
    sample, newest, events = sampler.sample, sampler.newest, viewers.published
    usage = round(newest.result()["cpu"] / 100, 3) if newest.done() else None
    used, size = {"/": sample.disk_used}, {"/": sample.disk_total}
    started = sum(tasks.completed.values()) + len(tasks.running)
    rows = [
        ("build_info{version}", {__version__: 1}, "Always 1; the version is the label."),
        ("cpu_usage_ratio", usage, "CPU usage of all cores in the newest interval."),
        ("memory_used_bytes", sample.ram_used, "Memory that is not available to programs."),
        ("memory_total_bytes", sample.ram_total, "Memory of the machine."),
        ("swap_used_bytes", sample.swap_used, "Swap in use."),
        ("filesystem_used_bytes{mountpoint}", used, "Used space of the file system."),
        ("filesystem_size_bytes{mountpoint}", size, "Size of the file system."),
        ("network_receive_bytes_total", sampler.net_recv, "Received, except on loopback."),
        ("network_transmit_bytes_total", sampler.net_sent, "Sent, except on loopback."),
        ("load1", sample.load_avg[0], "Load average of one minute."),
        ("uptime_seconds", sample.uptime, "Since the machine was booted."),
        ("tasks_running", len(tasks.running), "Tasks that run now."),
        ("tasks_started_total", started, "Tasks started."),
        ("tasks_completed_total{state}", tasks.completed, "Tasks ended, by how."),
        ("task_duration_seconds", tasks.durations, "From start to end of ended tasks."),
        ("task_output_bytes_total", tasks.outputs.total_bytes, "Output of all tasks."),
        ("viewers", len(viewers.all), "WebSocket clients that are connected."),
        ("events_total{type}", events, "Events broadcast to viewers."),
        ("viewer_bytes_total", viewers.written_bytes, "Bytes written to viewers, before TLS."),
        ("viewer_gaps_total", viewers.gaps, "Gaps that viewers were told of."),
        ("refused_total{reason}", server.refused, "Requests and messages refused, by error code."),
        ("audit_errors_total", server.audit.errors, "Audit records that could not be written."),
        ("alerts_total", events["cpu_alert"], "CPU alerts raised."),
        *read_own_usage(),
    ]
    return Response(200, encode_metrics(rows), "text/plain; version=0.0.4; charset=utf-8")


WEBSOCKET_PATHS = ("/", "/ws")
ROUTES = {
    "/": Route("GET", None, ("text",), answer_page),
    "/health": Route("GET", None, (), answer_health),
    "/exec": Route("POST", Role.RUN, ("wait", "follow", "again", "ref", *EXEC_FLAGS), answer_exec),
    "/tasks": Route("GET", Role.VIEW, ("id",), answer_tasks),
    "/logs": Route("GET", Role.VIEW, ("id", "offset", "tail", "follow", "raw"), answer_logs),
    "/kill": Route("POST", Role.RUN, ("id", "signal"), answer_kill),
    "/stdin": Route("POST", Role.RUN, ("id", "eof"), answer_stdin),
    "/resize": Route("POST", Role.RUN, ("id", "cols", "rows"), answer_resize),
    "/stats": Route("GET", Role.VIEW, ("history", "alerts"), answer_stats),
    "/info": Route("GET", Role.VIEW, (), answer_info),
    "/metrics": Route("GET", Role.VIEW, (), answer_metrics),
}


# The messages of WebSocket clients


def answer_ping(server: Server, viewer: Viewer, message: Fields) -> Fields:
    seen = server.viewers.find_seen(viewer)
    return {"type": "pong", "timestamp": int(time.time() * 1000), "seq": seen}


def answer_watch(server: Server, viewer: Viewer, message: Fields) -> Fields:
    choice = parse_choice(message, viewer.choice)
    seq = server.viewers.choose(viewer, choice)
    return {"type": "watching", **choice.describe(), "seq": seq}


def answer_hello(server: Server, viewer: Viewer, message: Fields) -> Fields:
    tasks = [task.describe() for task in server.tasks.running.values()]
    facts = describe_server(server, viewer.role)
    return {"type": "hello", **facts, "alerts": list(server.sampler.alerts), "tasks": tasks}


def answer_task_kill(server: Server, viewer: Viewer, message: Fields) -> None:
    task = server.tasks.get(message.get("task_id"))
    server.stop_task(task, message.get("signal", DEFAULT_SIGNAL), viewer.by)


def answer_task_input(server: Server, viewer: Viewer, message: Fields) -> None:
    """Type `data`. `automatic`: a terminal's own answer to a program's question.

    Each client that shows the task answers, but the program wants one answer: of the client that
    typed last; if there is none, of the one that has the task's `ref`.
    """
    task = server.tasks.get(message.get("task_id"))
    data = message.get("data")
    if not isinstance(data, str):
        raise CommandError("bad_field", "data must be text")
    typist: object = viewer
    if check_field("automatic", message.get("automatic", False), FLAG):
        typist = task.typist if task.typist in server.viewers.all else None
        is_starter = message.get("ref") == task.request.ref is not None
        if typist is not viewer and (typist or not is_starter):
            return
    server.tasks.write_input(task, data.encode("utf-8", "replace"), typist=typist)


def answer_task_resize(server: Server, viewer: Viewer, message: Fields) -> None:
    task = server.tasks.get(message.get("task_id"))
    server.tasks.resize(task, message.get("cols"), message.get("rows"))


COMMANDS: dict[str, tuple[Role, Command]] = {
    "ping": (Role.VIEW, answer_ping),
    "hello": (Role.VIEW, answer_hello),
    "watch": (Role.VIEW, answer_watch),
    "task_input": (Role.RUN, answer_task_input),
    "task_resize": (Role.RUN, answer_task_resize),
    "task_kill": (Role.RUN, answer_task_kill),
}


# Connections and their requests


def find_route(head: RequestHead, scheme: str) -> Route:
    """Raises HttpError 404, 405 or 426."""
    route = ROUTES.get(head.path)
    if route is None:
        if head.path in WEBSOCKET_PATHS:
            raise upgrade_required("this path is for WebSocket clients")
        raise HttpError(404, "not_found", "there is nothing at this path")
    if is_preflight(head):
        return Route("OPTIONS", None, route.parameters, answer_preflight)
    allow = route.method.replace("GET", "GET, HEAD")
    if head.method not in allow.split(", "):
        message = f"this path takes {allow}"
        if head.path == "/exec":
            message += f": curl -d 'ls' {find_url(head, scheme)}/exec"
        raise HttpError(405, "bad_method", message, [("Allow", allow)])
    return route


def parse_since(parameters: Mapping[str, str], boot_id: str) -> int | None:
    """Return the seq to replay after, or None; sys.maxsize for another boot's."""
    since = parameters.get("since")
    if since is None:
        return None
    if not DIGITS.fullmatch(since):
        raise HttpError(400, "bad_query", "since must be a seq, a decimal number")
    return int(since) if parameters.get("boot", boot_id) == boot_id else sys.maxsize


# Errors that keep somebody out. /metrics has each from 0 on: else Prometheus misses the first.
REFUSALS = (
    "unauthorized wrong_token token_in_query too_many_tokens bad_host bad_origin json_only "
    "forbidden exec_disabled"
).split()


class Phase(enum.Enum):
    """What a connection is doing, and so what its deadline means."""

    OPENING = "opening"  # no transport yet; asyncio limits the TLS handshake
    IDLE = "idle"
    READING = "reading"
    EXPIRED = "expired"  # reading took too long: the answer is 408
    ANSWERING = "answering"
    WAITING = "waiting"  # for a task, until the client goes away
    WEBSOCKET = "websocket"
    CLOSING = "closing"


class End(enum.Enum):
    """How a connection ends."""

    WRITTEN = "written"  # when everything is written
    NOW = "now"  # the server stops; the kernel may deliver what it has taken
    RESET = "reset"  # the peer does not keep up; what it has not taken is dropped


class Turns(deque["asyncio.Future[None]"]):
    """Clients that have had their share of this turn of the event loop."""

    async def wait(self) -> None:
        if not self:
            asyncio.get_running_loop().call_soon(self._wake)
        self.append(asyncio.Future())
        await self[-1]

    def _wake(self) -> None:
        for _ in range(min(CLIENTS_PER_TURN, len(self))):
            one = self.popleft()
            if not one.done():  # its connection has gone
                one.set_result(None)
        if self:
            asyncio.get_running_loop().call_soon(self._wake)


class Inbox(asyncio.StreamReader):
    """What one client sends, in small pieces."""

    def __init__(self, turns: Turns) -> None:
        super().__init__(limit=READ_CHUNK_BYTES)
        self._turns = turns
        self._until = time.perf_counter() + INPUT_TURN_SECONDS  # the end of its share

    async def read_piece(self) -> bytes:
        await self.rest()
        before = time.perf_counter()
        data = await self.read(INPUT_PIECE_BYTES)
        self._until += time.perf_counter() - before  # waiting for bytes is no work
        return data

    async def rest(self) -> None:
        """After a piece of work: wait for another turn if this client has had its share."""
        if time.perf_counter() > self._until:
            await self._turns.wait()
            self._until = time.perf_counter() + INPUT_TURN_SECONDS


def encode_answer(server: Server, head: RequestHead, response: Response, keep_alive: bool) -> bytes:
    """Return an answer without its pieces. head: of the request."""
    fields = [
        ("Date", time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime())),
        ("Cache-Control", "no-store"),
        ("X-Content-Type-Options", "nosniff"),
    ]
    if server.policy.allow_origins:  # the Fetch standard, CORS protocol
        fields.append(("Vary", "Origin"))
        origin = head.value("origin") or ""
        if origin in server.policy.allow_origins:
            fields.append(("Access-Control-Allow-Origin", origin))
    fields += response.fields
    if response.status != 204:  # which has no body
        fields.append(("Content-Type", response.media_type))
        if response.pieces is None:
            fields.append(("Content-Length", str(len(response.body))))
        elif not head.http_1_0:
            fields.append(("Transfer-Encoding", "chunked"))
    if not keep_alive:
        fields.append(("Connection", "close"))
    elif head.http_1_0:
        fields.append(("Connection", "keep-alive"))
    body = b"" if head.method == "HEAD" else response.body
    return encode_response_head(response.status, fields) + body


def make_error_response(server: Server, error: Exception) -> Response:
    """The one place where an error, while it is handled, becomes an HTTP answer."""
    if isinstance(error, CommandError):
        status = COMMAND_STATUS.get(error.code, 400)
        error = HttpError(status, error.code, error.message)
    if not isinstance(error, HttpError):
        server.log.write_fault("request_failed")
        error = HttpError(500, "internal_error", "the server failed; its log says more")
    body = encode_json({"error": error.code, "message": error.message}) + b"\n"
    return Response(error.status, body, fields=error.fields)


def encode_last_answer(server: Server, error: Exception, head: RequestHead | None = None) -> bytes:
    head = head or RequestHead("GET", "/", False)
    return encode_answer(server, head, make_error_response(server, error), keep_alive=False)


async def linger(connection: Connection) -> None:
    """Drop what still comes: closing with unread input would destroy the answer (RFC 9112, 9.6)."""
    connection.begin_phase(Phase.CLOSING, LINGER_SECONDS)
    try:
        if connection.transport.can_write_eof():
            connection.transport.write_eof()
    except OSError:
        return  # the peer has reset the connection meanwhile
    left = MAX_LINGER_BYTES
    while left > 0 and (data := await connection.inbox.read(READ_CHUNK_BYTES)):
        left -= len(data)


@dataclass(eq=False, repr=False)
class Exchanges:
    """The HTTP requests of one connection, one after the other."""

    _connection: Connection
    _server: Server
    _transport: asyncio.Transport
    _parser: HttpParser = field(default_factory=HttpParser)

    async def serve(self) -> bytes:
        """Answer requests in order (RFC 9112, 9.3.2). Return what follows an upgrade."""
        try:
            while await self._serve_request():
                await self._connection.inbox.rest()
        except ConnectionError:
            pass  # the client has gone, or asks nothing more
        except Exception as error:  # the rest of the input cannot be trusted
            if not self._transport.is_closing():
                self._transport.write(encode_last_answer(self._server, error, self._parser.head))
                await linger(self._connection)
        return self._parser.take_rest()

    async def _serve_request(self) -> bool:
        """Answer one request. Whether another may follow."""
        connection = self._connection
        if connection.phase is not Phase.READING:  # not the first request
            connection.begin_phase(Phase.IDLE, IDLE_SECONDS)
        head: RequestHead = await self._receive(self._parser.next_head)
        try:
            request = self._admit(head)
            if request is None:
                return False
        except (HttpError, CommandError) as error:
            request_line = f"{head.method} {head.path}"[:200]
            self._server.note_refusal(error, connection.name_client(), request_line)
            if head.has_body:
                raise
            self._parser.next_body()
            connection.begin_phase(Phase.ANSWERING)
            return await self._write_response(head, make_error_response(self._server, error))
        connection.begin_phase(Phase.READING, BODY_SECONDS)
        request.body = await self._receive(self._parser.next_body)
        return await self._answer(request)

    async def _receive(self, parse: Callable[[], Any]) -> Any:
        """Read until parse() finds something. Raises HttpError, and ConnectionError at the end."""
        while True:
            found = parse()
            if found is not None:
                return found
            if self._connection.phase is Phase.IDLE and not self._parser.is_idle:
                self._connection.begin_phase(Phase.READING, HEAD_SECONDS)
            try:
                data = await self._connection.inbox.read_piece()
            except asyncio.CancelledError:
                if self._connection.phase is not Phase.EXPIRED or self._parser.is_idle:
                    raise
                raise HttpError(408, "timeout", "the request took too long to arrive") from None
            if not data and self._parser.is_idle:  # between two requests
                raise ConnectionAbortedError
            if not data:
                raise HttpError(400, "bad_request", "the request ends in its middle")
            self._parser.feed(data)

    def _admit(self, head: RequestHead) -> Request | None:
        """Let a request pass the gate, and find its route. None: it was an upgrade."""
        connection, server = self._connection, self._server
        connection.role = None
        role = connection.role = server.check_access(connection.peer, head)
        if role is not None:
            server.newcomers.pop(connection, None)
        # An unknown upgrade is ignored (RFC 9110, 7.8), save where only ours is meant.
        ours = "websocket" in head.tokens("upgrade") or head.path in WEBSOCKET_PATHS
        if is_upgrade(head) and ours:
            connection.upgrade(head, role)
            return None
        route = find_route(head, connection.peer.scheme)
        server.check_role(route.role, role)
        parameters = parse_query(head.query)
        if not parameters.keys() <= set(route.parameters):
            known = ", ".join(sorted(route.parameters)) or "none"
            raise HttpError(400, "bad_query", f"unknown parameter; this path knows: {known}")
        expectations = [] if head.http_1_0 else head.tokens("expect")  # RFC 9110, 10.1.1
        if expectations not in ([], ["100-continue"]):
            raise HttpError(417, "bad_expectation", "only 100-continue can be expected")
        if expectations and head.has_body:  # only now, since the request may pass
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        return Request(head, route, parameters, role, connection.name_client())

    async def _answer(self, request: Request) -> bool:
        connection = self._connection
        if connection not in self._server.connections:  # make_room() has ended it
            raise ConnectionAbortedError
        if request.parameters.keys().isdisjoint(("wait", "follow")):
            connection.begin_phase(Phase.ANSWERING)
        else:
            connection.begin_phase(Phase.WAITING)
            if connection.has_sent_all:  # eof_received() came before this phase
                connection.task.cancel()
            enable_keepalive(connection.transport.get_extra_info("socket"))
        with request.ends:
            try:
                response = await request.route.answer(self._server, request)
                if not isinstance(response, Response):
                    response = Response(body=encode_json(response) + b"\n")
            except Exception as error:
                response = make_error_response(self._server, error)
            return await self._write_response(request.head, response)

    async def _write_response(self, head: RequestHead, response: Response) -> bool:
        """Write an answer at the client's pace. Whether another request may follow."""
        pieces = response.pieces
        # In HTTP/1.0 such a body ends with the connection.
        is_last = self._server.tasks.is_stopping or (pieces is not None and head.http_1_0)
        keep_alive = head.keep_alive and not is_last
        self._transport.write(encode_answer(self._server, head, response, keep_alive))
        if pieces is not None and head.method != "HEAD":
            async for piece in pieces:
                self._transport.write(piece if head.http_1_0 else encode_chunk(piece))
                await self._connection.drain()
            if not head.http_1_0:
                self._transport.write(b"0\r\n" + encode_fields(response.trailers.items()))
        await self._connection.drain()
        return keep_alive


def handle_message(server: Server, viewer: Viewer, message: Message) -> None:
    """The one place where an error of a WebSocket client is answered."""
    if message.opcode is Opcode.PING:
        assert isinstance(message.data, bytes)
        viewer.send_pong(message.data)
    elif message.opcode is Opcode.BINARY:
        viewer.close(CloseCode.UNSUPPORTED_DATA, "text messages only")
    if message.opcode is not Opcode.TEXT:
        return
    fields: Fields = {}
    try:
        fields = parse_json_object(message.data)
        kind = fields.get("type")
        if not isinstance(kind, str):
            raise CommandError("bad_message", 'the field "type" is missing')
        if kind not in COMMANDS:
            raise CommandError("unknown_type", f"unknown type; known: {', '.join(COMMANDS)}")
        needed, command = COMMANDS[kind]
        server.check_role(needed, viewer.role)
        reply = command(server, viewer, fields)
    except CommandError as error:
        server.note_refusal(error, viewer.by, str(fields.get("type")))
        reply = {"type": "error", "code": error.code, "message": error.message}
    except Exception:
        server.log.write_fault("message_failed")
        viewer.close(CloseCode.INTERNAL_ERROR, "internal error")
        return
    if reply is not None:
        if isinstance(fields.get("ref"), (str, int, float)):
            reply = {**reply, "ref": fields["ref"]}
        viewer.send_json(reply)


async def serve_websocket(connection: Connection, viewer: Viewer, data: bytes) -> None:
    """Take messages, `data` first, until either side closes."""
    websocket, is_done = viewer.websocket, False
    while True:
        if data:
            viewer.heard_at = time.monotonic()
            for message in websocket.take(data):
                is_done = message.opcode is Opcode.CLOSE
                handle_message(connection.server, viewer, message)
                await connection.inbox.rest()
        if websocket.state is not WebSocketState.OPEN:
            connection.server.viewers.leave(viewer)
            if connection.phase is Phase.WEBSOCKET:
                connection.begin_phase(Phase.CLOSING, CLOSE_SECONDS)
        if websocket.state is WebSocketState.CLOSED:
            connection.transport.write(websocket.answer)
            # Nothing follows both close frames; a TLS client then waits for us (RFC 6455, 7.1.1).
            if not is_done or (websocket.answer and connection.transport.can_write_eof()):
                await linger(connection)
            return
        data = await connection.inbox.read_piece()
        if not data:
            return


class Connection(asyncio.Protocol):
    """A TCP or Unix connection: HTTP requests, then possibly a WebSocket."""

    __slots__ = (
        "server inbox transport peer address source role phase viewer task opened_at "
        "has_sent_all phase_seconds _socket _drained _taken_bytes _progress_at"
    ).split()

    def __init__(
        self, server: Server, connection: socket.socket, listener: ListenerKind, address: Any
    ) -> None:
        self.server = server
        self._socket = connection
        self.peer, self.address = identify_peer(server, connection, listener, address)
        self.source = self.peer.uid, find_host_key(self.peer.address)  # newcomers are counted by it
        connection.setblocking(False)
        if listener is not ListenerKind.UNIX:
            # Else the second of two writes waits 40 ms for the ACK of the first.
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if sys.platform == "linux":
                # Else the kernel buffers megabytes for a client that does not read.
                connection.setsockopt(socket.IPPROTO_TCP, TCP_NOTSENT_LOWAT, UNSENT_BYTES)
        self.transport: asyncio.Transport
        self.role: Role | None = None  # of the newest request, after the gate
        self.phase = Phase.OPENING
        self.viewer: Viewer | None = None
        self.phase_seconds = math.inf  # how long the phase may take
        self.has_sent_all = False  # the client has ended its side
        self._drained: asyncio.Future[None] | None = None  # done when all is written
        self.opened_at = time.monotonic()
        server.connections.add(self)
        if not is_trusted_process(server.policy, self.peer):
            server.newcomers[self] = None
            server.make_room(self.opened_at)
        is_extra = len(server.connections) > server.config.max_clients
        self.inbox = Inbox(server.turns)
        self.task = server.loop.create_task(self._run(is_extra))

    # Life

    async def _run(self, is_extra: bool) -> None:
        """is_extra: there are too many."""
        try:
            await self._open(is_extra)
            if is_extra:
                error = HttpError(503, "too_many_clients", "too many connections are open")
                self.transport.write(encode_last_answer(self.server, error))
                return
            # Exchanges are not kept: they would be much of an idle viewer's memory.
            backlog = await Exchanges(self, self.server, self.transport).serve()
            if self.viewer:
                await serve_websocket(self, self.viewer, backlog)
        except (asyncio.CancelledError, ConnectionError):
            pass  # the peer has gone, or its deadline has passed
        except Exception:
            self.server.log.write_fault("connection_failed")
        finally:
            self.end(End.WRITTEN)

    async def _open(self, is_extra: bool) -> None:
        """Make the transport, with TLS by a handshake. Raises ConnectionError."""
        tls = self.server.tls
        options: dict[str, Any] = {}
        if tls and self.peer.scheme == "https":
            if is_extra:  # not worth a handshake
                self._socket.close()
                raise ConnectionAbortedError
            options = {"ssl": tls.context, "ssl_handshake_timeout": HANDSHAKE_SECONDS}
        plain = None
        try:
            plain = self._socket.dup() if options else None  # asyncio closes its own when it fails
            await self.server.loop.connect_accepted_socket(lambda: self, self._socket, **options)
        except OSError as error:
            reason = explain(error)
            if plain and getattr(error, "reason", "") == "HTTP_REQUEST":
                reason = "the client spoke plain HTTP, not https"
                message = "this port speaks https: use https:// or wss://"
                hint = HttpError(400, "tls_required", message)
                with suppress(OSError):
                    plain.send(encode_last_answer(self.server, hint))
            self.server.log.write_limited("info", "tls_failed", by=self.address, error=reason)
            raise ConnectionAbortedError from None
        finally:
            if plain:
                plain.close()
        if self.phase is Phase.OPENING:  # the peer has gone in the same moment
            raise ConnectionAbortedError

    def end(self, how: End) -> None:
        """Close the connection. connection_lost() follows, and cancels _run().

        _run() calls this at its end, also if others have called it before. Only this and _end_tls()
        close the transport. During a TLS handshake there is none: shutting the socket down makes
        the handshake fail.
        """
        if self.phase is Phase.OPENING:
            with suppress(OSError):  # the peer may have reset it
                self._socket.shutdown(socket.SHUT_RDWR)  # the event loop closes the descriptor
            if how is End.WRITTEN:  # there was no handshake: no transport says that it is gone
                self.connection_lost(None)
        elif how is End.WRITTEN:
            if self.viewer:
                self.server.viewers.leave(self.viewer)
            self.phase = Phase.CLOSING
            # A second close() of a TLS transport would break get_write_buffer_size().
            if not self.transport.is_closing():
                self.transport.close()
            if self.peer.scheme == "https":
                latest = time.monotonic() + WRITE_STALL_SECONDS
                self.server.loop.call_later(TLS_GOODBYE_SECONDS, self._end_tls, latest)
        else:
            # Else the kernel would keep the rest for minutes, and a peer that writes would hang.
            if how is End.RESET and count_waiting_bytes(self.transport):
                with suppress(OSError):  # it is closed already
                    reset = struct.pack("ii", 1, 0)  # socket(7), SO_LINGER
                    self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
            self.transport.abort()

    def _end_tls(self, latest: float) -> None:
        """Do not wait for the peer's close_notify, as asyncio before 3.11 does (RFC 8446, 6.1)."""
        if self not in self.server.connections:
            return
        waiting = count_waiting_bytes(self.transport)
        # Newer ones do not count what their inner transport holds; then the kernel has bytes, too.
        with suppress(OSError, ValueError):  # it is closed
            if time.monotonic() < latest:
                waiting += any(fcntl.ioctl(self._socket, termios.TIOCOUTQ, b"\0" * 4))
        if waiting:
            self.server.loop.call_later(TLS_GOODBYE_SECONDS, self._end_tls, latest)
        else:
            self.transport.abort()

    # What the event loop says

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        # pause_writing() comes when anything must wait, resume_writing() when all is written.
        # With TLS it is 1: asyncio would pause for 0 bytes, too.
        self.transport.set_write_buffer_limits(high=1 if self.peer.scheme == "https" else 0)
        self.inbox.set_transport(transport)
        self.opened_at = time.monotonic()  # with TLS, after the handshake
        self.begin_phase(Phase.READING, HEAD_SECONDS)

    def data_received(self, data: bytes) -> None:
        self.inbox.feed_data(data)

    def pause_writing(self) -> None:
        self.server.stalled.add(self)
        # What the kernel had taken at the last sweep, and when that last grew.
        self._taken_bytes, self._progress_at = -sys.maxsize, time.monotonic()
        if self.viewer:
            self.server.viewers.stall(self.viewer)

    async def drain(self) -> None:
        """Wait until all is written. Raises ConnectionError."""
        if self.transport.is_closing():
            raise ConnectionAbortedError
        if self in self.server.stalled:
            self._drained = asyncio.Future()
            await self._drained

    def resume_writing(self) -> None:
        self.server.stalled.discard(self)
        if self._drained and not self._drained.done():
            self._drained.set_result(None)
        if self.viewer:
            self.server.viewers.resume(self.viewer)

    def eof_received(self) -> bool:
        self.has_sent_all = True
        self.inbox.feed_eof()
        if self.phase is Phase.WAITING:  # the client has most likely gone
            self.task.cancel()
        return self.peer.scheme == "http"  # TLS cannot be left open in one direction

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection, and end its work."""
        self.server.connections.discard(self)
        self.server.newcomers.pop(self, None)
        self.server.stalled.discard(self)
        self.server.deadlines.get(self.phase_seconds, {}).pop(self, None)
        if self.viewer:
            self.server.viewers.leave(self.viewer)
        self.task.cancel()

    # Deadlines

    def check_progress(self, now: float) -> None:
        """End a connection whose peer takes nothing for too long."""
        # While it is stalled, only a viewer's replies are added; written_bytes counts those.
        written = self.viewer.written_bytes if self.viewer else 0
        taken = written - count_waiting_bytes(self.transport)
        if taken > self._taken_bytes:
            self._taken_bytes, self._progress_at = taken, now
        elif now - self._progress_at >= WRITE_STALL_SECONDS:
            self.end(End.RESET)

    def expire(self, now: float) -> None:
        """Its deadline has passed: ping a viewer, answer 408, or end the connection."""
        self.begin_phase(self.phase)  # without a deadline
        if self.viewer and self.viewer.is_open and self.viewer.ping(now):
            self.begin_phase(self.phase, PING_SECONDS)
        elif self.phase in (Phase.IDLE, Phase.READING):
            if self.phase is Phase.READING:
                self.phase = Phase.EXPIRED
            self.task.cancel()
        else:
            self.end(End.RESET)

    def begin_phase(self, phase: Phase, seconds: float = math.inf) -> None:
        """Also set its deadline. Those of one length stay in order of time."""
        deadlines = self.server.deadlines
        deadlines.get(self.phase_seconds, {}).pop(self, None)
        self.phase, self.phase_seconds = phase, seconds
        if seconds < math.inf:  # else a lost one would stay
            deadlines.setdefault(seconds, {})[self] = time.monotonic() + seconds

    def name_client(self) -> str:
        uid = "" if self.peer.uid is None else f" uid={self.peer.uid}"
        return f"{self.address} {self.role.value if self.role else '-'}{uid}"

    def upgrade(self, head: RequestHead, role: Role | None) -> None:
        """Turn the connection into a viewer's (RFC 6455, 4.2)."""
        if head.path not in WEBSOCKET_PATHS:
            raise HttpError(404, "not_found", "WebSocket clients connect to / or /ws")
        key = check_upgrade(head)
        if role is None:  # the gate never allows that
            raise HttpError(401, "unauthorized", "watching needs a role")
        parameters = parse_query(head.query)
        since = parse_since(parameters, self.server.boot_id)
        choice = parse_choice_query(parameters)
        says_hello = parse_flag(parameters, "hello")
        extension, bits = choose_deflate(head)
        mode = self.server.config.compress
        is_near = self.peer.listener is ListenerKind.UNIX or is_loopback(self.peer.address)
        if mode == "off" or (mode == "auto" and is_near):  # on one machine it only costs
            extension, bits = "", 0
        if self.server.tasks.is_stopping:
            raise HttpError(503, "stopping", "the server is stopping")
        self.transport.write(encode_upgrade_response(head, key, extension))
        self.begin_phase(Phase.WEBSOCKET, PING_SECONDS)
        # TLS takes nothing directly.
        send = self._socket.send if self.peer.scheme == "http" else lambda data: 0
        websocket = WebSocketConnection(deflate_bits=bits)
        self.viewer = Viewer(self.transport, send, websocket, role, self.name_client(), choice)
        if self in self.server.stalled:  # earlier answers still wait
            self.server.viewers.stall(self.viewer)
        if says_hello:  # before any event, so that the client knows whose they are
            self.viewer.send_json(answer_hello(self.server, self.viewer, {}))
        self.server.viewers.join(self.viewer, since)


def resolve_hosts(hosts: Sequence[str]) -> list[list[Place]]:
    """Return the places of each host, none twice."""
    found: list[list[Place]] = []
    for host in hosts:
        rows = socket.getaddrinfo(
            host.strip("[]"), None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        places = dict.fromkeys((family, address) for family, _, _, _, address in rows)
        found.append([place for place in places if not any(place in one for one in found)])
    return found


def bind_host(
    places: Sequence[Place], port: int, v6_only: bool, bound: list[socket.socket]
) -> None:
    """Listen on all addresses of one host; add the sockets to `bound`.

    An address that this machine lacks is left out if there is another: `localhost` is ::1 too, even
    without IPv6. `::` takes IPv4 too, unless v6_only.
    """
    left = len(places)
    for family, (host, _, *more) in places:
        if bound:
            port = bound[0].getsockname()[1]
        is_dual = host == "::" and not v6_only
        try:
            listener = socket.create_server(
                (host, port, *more), family=family, backlog=LISTEN_BACKLOG, dualstack_ipv6=is_dual
            )
        except OSError as error:
            left -= 1
            if not left or error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                raise
        else:
            bound.append(listener)


def adopt_socket(fd: int) -> socket.socket:
    """Raises ConfigError."""
    families = (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX)
    try:
        listener = socket.socket(fileno=fd)
        is_listening = listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) == 1
    except OSError:
        is_listening = False
    if not is_listening or listener.type != socket.SOCK_STREAM or listener.family not in families:
        message = f"LISTEN_FDS: descriptor {fd} is no listening TCP or Unix stream socket"
        raise ConfigError(f"{message}; the socket unit needs ListenStream=, and no Accept=yes")
    listener.set_inheritable(False)
    return listener


def bind_unix(path: str) -> socket.socket:
    """Listen on a socket with mode 0600, in place of one that a crash left. Raises OSError."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        is_refused = probe.connect_ex(path) == errno.ECONNREFUSED  # as by any file
    if is_refused and stat.S_ISSOCK(os.lstat(path).st_mode):
        os.unlink(path)
    mask = os.umask(0o177)
    try:
        return socket.create_server(path, family=socket.AF_UNIX, backlog=LISTEN_BACKLOG)
    finally:
        os.umask(mask)


def take_passed_sockets(environ: MutableMapping[str, str]) -> dict[str, list[socket.socket]]:
    """Return systemd's sockets (sd_listen_fds(3)) by `http`, `ws`, `unix`. Raises ConfigError."""
    variables = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PIDFDID")
    pid, count, names, _ = (environ.pop(name, "") for name in variables)
    passed: dict[str, list[socket.socket]] = {}
    if pid != str(os.getpid()) or not DIGITS.fullmatch(count):
        return passed
    sockets = [adopt_socket(fd) for fd in range(3, 3 + int(count))]
    is_alone = sum(one.family != socket.AF_UNIX for one in sockets) == 1
    for one, name in zip(sockets, names.split(":") + [""] * len(sockets)):
        if one.family == socket.AF_UNIX:
            name = "unix"
        elif is_alone and name != "ws":
            name = "http"
        elif name not in ("http", "ws"):
            message = f"LISTEN_FDNAMES: {name!r} is neither http nor ws"
            raise ConfigError(f"{message}: the socket unit needs FileDescriptorName=")
        passed.setdefault(name, []).append(one)
    return passed


class Listeners:
    """The bound sockets: an HTTP and a WebSocket port, possibly the same; Unix sockets.

    passed: by systemd. If a TCP socket is among them, none is bound: each speaks both protocols.
    """

    def __init__(self, config: Config, log: Log, passed: Mapping[str, list[socket.socket]]) -> None:
        self._log = log
        self._scheme_end = "s" * config.has_tls
        bound = self._bound = {"http": [], "ws": [], "unix": [], **passed}
        self._unix_file: tuple[str, os.stat_result] | None = None  # of our own socket
        place = " ".join(config.host)
        try:
            if not bound["http"] and not bound["ws"]:
                bound["http"] = self._bind("http", config.host, config.port)
                if config.ws_port != config.port or config.port == 0:
                    bound["ws"] = self._bind("ws", config.host, config.ws_port)
            if config.unix and not bound["unix"]:
                place = os.path.abspath(config.unix)
                bound["unix"] = [bind_unix(place)]
                self._unix_file = place, os.stat(place)
        except (OSError, ValueError) as error:  # a name that cannot be one; no IPv6 for `::`
            self.close()
            reason = explain(error).partition(" (while")[0]  # create_server() adds the address
            raise StartError(f"cannot listen on {place}: {reason}") from None
        self.kinds: dict[socket.socket, ListenerKind] = {}
        for one in itertools.chain(*bound.values()):
            one.setblocking(False)
            kind = ListenerKind.UNIX
            if one.family != socket.AF_UNIX:
                is_near = is_loopback(one.getsockname()[0])
                kind = ListenerKind.LOOPBACK if is_near else ListenerKind.NETWORK
            self.kinds[one] = kind
        self.is_loopback = ListenerKind.NETWORK not in self.kinds.values()
        http, ws = bound["http"] or bound["ws"], bound["ws"] or bound["http"]
        self._names = {"http": http[0].getsockname(), "ws": ws[0].getsockname()}
        self.ports: dict[str, int | None] = {name: at[1] for name, at in self._names.items()}
        self.ports["discovery"] = None  # off
        self.unix_path: str | None = None
        if bound["unix"]:
            self.unix_path = os.fsdecode(bound["unix"][0].getsockname()).replace("\0", "@", 1)

    def _bind(self, name: str, hosts: Sequence[str], port: int) -> list[socket.socket]:
        """Bind the first port from `port` on that is free at all hosts."""
        places = resolve_hosts(hosts)
        if hosts == Config.host:  # as one host: the machine may lack ::1
            places = [[*itertools.chain(*places)]]
        v6_only = [(socket.AF_INET, ("0.0.0.0", 0))] in places  # then `::` leaves IPv4 to it
        # A port that the kernel chooses may be busy at the other addresses.
        for candidate in range(port, min(port + PORT_TRIES, 65536)) if port else [0] * PORT_TRIES:
            bound: list[socket.socket] = []
            try:
                for host in places:
                    bind_host(host, candidate, v6_only, bound)
            except OSError as error:
                for one in bound:
                    one.close()
                if error.errno != errno.EADDRINUSE:
                    raise
                busy = error
                continue
            if candidate != port:
                self._log.write("warning", "port_busy", port=port, used=candidate, listener=name)
            return bound
        raise busy

    def url(self, name: str, is_typed: bool = False) -> str:
        """is_typed: by a person, who cannot use 0.0.0.0."""
        host = self._names[name][0]
        if is_typed and host in ("0.0.0.0", "::"):
            host = read_hostname()
        host = f"[{host}]" if ":" in host else host
        return f"{name}{self._scheme_end}://{host}:{self.ports[name]}"

    def find_places(self) -> list[str]:
        """Return the IPv4 addresses that are listened on; [] for all."""
        tcp = [one for one in self.kinds if one.family != socket.AF_UNIX]
        hosts = dict.fromkeys(one.getsockname()[0].removeprefix("::ffff:") for one in tcp)
        if "0.0.0.0" in hosts or "::" in hosts:
            return []
        return [one for one in hosts if ":" not in one] or ["127.0.0.1"] * self.is_loopback

    def close(self) -> None:
        """Stop listening; remove the Unix socket, if it is still ours."""
        for one in itertools.chain(*self._bound.values()):
            one.close()
        if self._unix_file:
            path, ours = self._unix_file
            with suppress(OSError):  # it has been removed already
                if os.path.samestat(os.stat(path), ours):
                    os.unlink(path)


@dataclass(eq=False, repr=False)
class Server:
    """All parts together."""

    config: Config
    log: Log
    audit: AuditLog
    tokens: Tokens
    ids: TaskIds
    listeners: Listeners
    tls: TlsFiles | None
    spawner: Spawner
    boot_id: str  # names this run, to which a seq belongs
    folder: str | None  # the state folder
    page: Page

    def __post_init__(self) -> None:
        config, log = self.config, self.log
        self.policy = AccessPolicy(
            own_uid=read_trusted_uid(),
            require_token=config.require_token,
            no_auth=config.no_auth,
            allow_origins=frozenset(config.allow_origin),
            allow_hosts=frozenset(host.lower() for host in config.allow_host),
            hostname=read_hostname().lower(),
            tokens=self.tokens.by_role(),
        )
        self._wrong_tokens = RateLimit(MAX_WRONG_TOKENS, WRONG_TOKEN_SECONDS)
        self.refused = Counter(dict.fromkeys(REFUSALS, 0))
        self._mark = ""  # see mark_run()
        self.loop = asyncio.get_running_loop()
        self.started_at = time.monotonic()
        self.viewers = Viewers(self.loop)
        self.turns = Turns()
        self.tasks = Tasks(
            config, self.ids, self.viewers.publish, self.viewers.feed, log, self.audit, self.spawner
        )
        facts = {
            "hostname": read_hostname(),
            "version": __version__,
            "boot_id": self.boot_id,
            "http": self.listeners.url("http", is_typed=True),
        }
        hook = config.alert_webhook
        self.webhook = Webhook(parse_webhook_url(hook), facts, log) if hook else None
        notify = self.webhook.send if self.webhook else lambda event: None
        self.sampler = Sampler(config, self.viewers.publish, log, self.tasks.running, notify)
        self.connections: set[Connection] = set()
        self.stalled: set[Connection] = set()  # whose transport has something to write
        # Length of a phase (s) -> connection -> its end (monotonic), soonest first: begin_phase().
        self.deadlines: dict[float, dict[Connection, float]] = {}
        # Chosen once: else each "no such socket" would mean reading long tables.
        self.query_owner = choose_owner_query()
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        soft = sys.maxsize if soft == resource.RLIM_INFINITY else soft
        # A task has up to three descriptors: output, input, the pipe of what it left.
        room = max(4, soft - SPARE_DESCRIPTORS - min(3 * config.max_tasks, soft // 4))
        if room < config.max_clients:
            log.write("warning", "few_descriptors", limit=soft, max_clients=room)
            self.config = dataclasses.replace(config, max_clients=room)
        self.newcomers: dict[Connection, None] = {}  # not past the gate, oldest first
        self._discovery: Discovery | None = None

    # Starting

    def start(self) -> None:
        """Begin all work; then log `listening`."""
        self.loop.set_exception_handler(self._log_loop_error)
        # Not the loop's own method: uvloop reserves SIGCHLD for itself.
        signal.signal(signal.SIGCHLD, lambda *_: self.loop.call_soon_threadsafe(self.tasks.reap))
        places = {
            "http": self.listeners.url("http"),
            "ws": self.listeners.url("ws"),
            "discovery": None if self.config.no_discovery else self._start_discovery(),
            "unix": self.listeners.unix_path,
        }
        facts: Fields = {"pid": os.getpid(), "version": __version__}
        files = {"token_file": self.tokens.run_file, "view_token_file": self.tokens.view_file}
        if self.folder and self.audit.is_file:
            complete_crashed_runs(self.folder, self.audit, self.log)
            self._mark = mark_run(self.folder, self.boot_id, self.audit.path)
        self.audit.write("start", **places, **facts)
        for listener in self.listeners.kinds:
            self._watch(listener)
        self.loop.create_task(self.sampler.run())
        self.loop.create_task(self._sweep())
        self.log.write("info", "listening", **places, **facts, **files)

    def _log_loop_error(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error, message = context.get("exception"), context.get("message", "")
        fields = describe_failure(error) if error else {}
        self.log.write_limited("error", "loop_error", message=message, **fields)

    def _accept(self, listener: socket.socket) -> None:
        for _ in range(ACCEPTS_PER_TURN):
            try:
                connection, address = listener.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError as error:  # most likely no descriptor is free
                self.log.write_limited("error", "accept_failed", error=explain(error))
                self.loop.remove_reader(listener)
                self.loop.call_later(1.0, self._watch, listener)
                return
            try:
                Connection(self, connection, self.listeners.kinds[listener], address)
            except OSError:  # the peer has reset it
                connection.close()

    def _watch(self, listener: socket.socket) -> None:
        if not self.tasks.is_stopping:
            self.loop.add_reader(listener, self._accept, listener)

    def _start_discovery(self) -> str | None:
        """Return its URL; None without the port."""
        port, is_local = self.config.discovery_port, self.listeners.is_loopback
        places, facts = self.listeners.find_places(), functools.partial(describe_for_probe, self)
        try:
            self._discovery = Discovery(port, places, is_local, facts)
        except OSError as error:
            self.log.write("warning", "discovery_off", port=port, error=explain(error))
            return None
        self.listeners.ports["discovery"] = self._discovery.port
        return f"udp://{places[0] if is_local else '0.0.0.0'}:{self._discovery.port}"

    # Running

    def check_access(self, peer: Peer, head: RequestHead) -> Role | None:
        """The gate; 429 after many wrong tokens. Raises HttpError."""
        try:
            return check_access(self.policy, peer, head)
        except HttpError as error:
            if error.code != "wrong_token":
                raise
            source = find_host_key(peer.address)
            seconds = math.ceil(self._wrong_tokens.take(source, time.monotonic()))
            if not seconds:
                raise
        message = "too many wrong tokens came from this address; a right one still gets in"
        raise HttpError(429, "too_many_tokens", message, [("Retry-After", str(seconds))])

    def note_refusal(self, error: HttpError | CommandError, by: str, request: str) -> None:
        # A malformed Host (400) has the code of one that is not served.
        if error.code in REFUSALS and getattr(error, "status", 403) != 400:
            fields: Fields = {"by": by, "reason": error.code, "request": request}
            self.refused[error.code] += 1
            self.log.write_limited("warning", "refused", **fields)
            self.audit.write_refusal(**fields)

    async def _sweep(self) -> None:
        """Look at connections that are overdue or take nothing, then at newcomers."""
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            now = time.monotonic()
            if self.tls:
                self.tls.refresh()
            due = [  # only the first of each length are looked at
                one.expire
                for ends in self.deadlines.values()
                for one in itertools.takewhile(lambda one: ends[one] <= now, ends)  # noqa: B023
            ]
            late = [one.check_progress for one in self.stalled]
            for look in [*due, *late, self.make_room]:
                try:
                    look(now)
                except Exception:
                    self.log.write_fault("sweep_failed")

    def make_room(self, now: float) -> None:
        """End newcomers above the limit: the source with the most of them loses its oldest.

        Each has NEWCOMER_GRACE_SECONDS first, so that many can reconnect at once; but not with more
        than MAX_BURST newcomers, or more than half of max_clients connected.
        """
        newcomers, half = self.newcomers, (self.config.max_clients + 1) // 2
        while len(newcomers) > min(MAX_NEWCOMERS, half):
            counts = Counter(one.source for one in newcomers)
            loser = max(newcomers, key=lambda one: counts[one.source])
            is_spared = now < loser.opened_at + NEWCOMER_GRACE_SECONDS
            if is_spared and len(self.connections) <= half and len(newcomers) <= MAX_BURST:
                return
            # Not in connection_lost(), which comes later: many may be accepted in one turn.
            del newcomers[loser]
            self.connections.discard(loser)
            loser.end(End.RESET)

    def check_role(self, needed: Role | None, role: Role | None) -> None:
        """Raises CommandError if the role or --no-exec forbids this."""
        if needed is Role.RUN and role is not Role.RUN:
            raise CommandError("forbidden", "this needs the role run")
        if needed is Role.RUN and self.config.no_exec:
            raise CommandError("exec_disabled", "this server was started with --no-exec")

    def stop_task(self, task: Task, signal_name: Any, by: str) -> None:
        number = parse_signal(signal_name)
        self.tasks.stop(task, number, by)
        fields = {"task_id": task.task_id, "signal": SIGNAL_NAMES[number], "by": by}
        self.log.write("info", "task_kill", **fields)
        self.audit.write("task_kill", **fields)

    def stop_tied(self, task: Task, by: str) -> None:
        if task.phase is not TaskPhase.ENDED:
            self.stop_task(task, DEFAULT_SIGNAL, by)

    # Stopping

    async def stop(self, reason: str) -> None:
        """End listeners, tasks, viewers, connections, in this order."""
        for listener in self.listeners.kinds:
            self.loop.remove_reader(listener)
        self.listeners.close()
        if self._discovery:
            self._discovery.close()
        self.tasks.stop_all()
        completions = [task.completed for task in self.tasks.running.values()]
        if completions:
            await asyncio.wait(completions, timeout=STOP_SECONDS - STOP_CLOSE_SECONDS)
            self.tasks.kill_all()
            await asyncio.sleep(STOP_ASK_SECONDS)
        self.audit.write("stop", reason=reason)
        if not self.tasks.running:  # else the next start completes them in the audit log
            with suppress(OSError):
                os.unlink(self._mark)
        self.viewers.flush_all()
        for connection in list(self.connections):
            if connection.viewer:
                connection.viewer.close(CloseCode.GOING_AWAY, "the server stops")
            elif connection.phase is Phase.OPENING:
                connection.end(End.NOW)
            elif connection.phase in (Phase.IDLE, Phase.READING):
                connection.task.cancel()
        end = time.monotonic() + STOP_CLOSE_SECONDS
        webhook = self.webhook
        while (self.connections or (webhook and webhook.pending)) and time.monotonic() < end:
            await asyncio.sleep(0.01)
        if webhook and webhook.pending:
            self.log.write("warning", "webhook_dropped", alerts=webhook.pending)
        for connection in list(self.connections):
            connection.end(End.NOW)
        work = asyncio.all_tasks() - {asyncio.current_task()}
        for task in work:
            task.cancel()
        await asyncio.wait(work, timeout=1.0)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # the loop is about to close


# 17. Client ---
# `exec` uses only HTTP: output comes from `?follow`, a Control sends everything else. `monitor` has
# a Link to each server: one WebSocket. After a break both continue where they ended: nothing is
# lost or doubled, or the gap is named. Whatever asks a server raises UnreachableError.
#
# A token goes only to a server that is listed with it, or named with --token-file or
# SERVERCONTROL_TOKEN; never to one that merely answered a probe. clean_text() cleans foreign text.


Result = TypeVar("Result")
Reader = asyncio.StreamReader
StreamPair = tuple[Reader, asyncio.StreamWriter]


@dataclass(frozen=True)
class ServerAddress:
    """A server as a client names it. unix: its socket, instead of host and port. path: at a proxy.
    token_file: is read instead of `token`. line: where it is listed.
    """

    name: str
    host: str
    port: int
    tls: bool = False
    path: str = ""
    unix: str = ""
    token: str | None = None
    token_file: str = ""
    line: str = ""

    def read_token(self) -> str | None:
        """A file is read for each request: a mended one works at once. Raises UnreachableError."""
        if not self.token_file:
            return self.token
        try:
            return load_token_file("its token", self.token_file, is_client=True)
        except ConfigError as error:
            message = str(error)
            if not os.path.lexists(self.token_file):
                message += f"; copy the server's {USUAL_TOKEN_FILE} there"
            raise UnreachableError(message, 401) from None

    @property
    def url(self) -> str:
        if self.unix:
            return f"unix:{self.unix}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.tls else 'http'}://{host}:{self.port}{self.path}"


# A scheme, its s, a host, a port, a path.
SERVER_NAME = re.compile(
    r"(?!unix:)(?=[!-~]+\Z)(?:(http|ws)(s?)://)?"
    r"(\[[0-9a-f:.]+(?:%[^]/?#@,]+)?\]|[^][:/?#@,]+)(?::([0-9]{0,5}))?(/[^?#]*)?",
    re.ASCII | re.IGNORECASE,
)


def parse_server(name: str, text: str) -> ServerAddress:
    """Raises ConfigError."""
    path = re.sub("^unix:(//)?", "", text)
    if path and text.startswith(("/", "./", "../", "unix:")):
        return ServerAddress(name, "", 0, unix=path)
    match = SERVER_NAME.fullmatch(f"[{text}]" if ":" in text and parse_ip(text) else text)
    scheme, secure, host, digits, path = match.groups("") if match else [""] * 5
    port = int(digits or (443 if secure else 80 if scheme else Config.port))
    if not host or not 0 < port < 65536 or (path and not scheme):
        known = "host, host:port, a URL, a socket's path, or a listed name"
        raise ConfigError(f"{text!r} is no server: say {known}")
    # RFC 6874, 2: %25 stands before a zone.
    host, percent, zone = host.strip("[]").replace("%25", "%").partition("%")
    return ServerAddress(name, host.lower() + percent + zone, port, bool(secure), path.rstrip("/"))


def parse_hosts(text: str, source: str) -> dict[str, ServerAddress]:
    """Return name -> server from lines `name url [token-file]`. Raises ConfigError."""
    listed: dict[str, ServerAddress] = {}
    for number, line in enumerate(text.splitlines(), 1):
        words = re.split(r"(?:^|\s)#", line)[0].split(None, 2)
        if not words:
            continue
        name, url, token_file = (*words, "", "")[:3]
        try:
            if name in listed:
                raise ConfigError(f"{name!r} stands in {listed[name].line} already")
            if not url or not "".join(words).isprintable():
                raise ConfigError(f"{name!r} needs: name url [token-file]")
            server = parse_server(name, url)
        except ConfigError as error:
            raise ConfigError(f"{source}: line {number}: {error}") from None
        path = os.path.join(os.path.dirname(source), os.path.expanduser(token_file.strip()))
        place = f"line {number} of {source}"
        listed[name] = dataclasses.replace(server, token_file=token_file and path, line=place)
    return listed


def clean_text(text: Any, width: int = 200) -> str:
    """Make foreign text safe for a terminal: one printable line."""
    shown = "".join(c if c.isprintable() else "?" for c in str(text))
    return shown if len(shown) <= width else shown[: width - 1] + "…"


def encode_request(
    server: ServerAddress,
    method: str,
    path: str,
    body: bytes,
    version: str,
    upgrade: Mapping[str, str],
) -> bytes:
    """Return a request, with the token."""
    # Without an IPv6 zone (RFC 6874, 4).
    host = "localhost" if server.unix else re.sub("%[^]]*", "", server.url.split("/")[2])
    fields, token = {"Host": host, **upgrade}, server.read_token()
    if token is not None:
        fields["Authorization"] = f"Bearer {token}"
    if method == "POST":  # /exec knows JSON by its first byte
        fields["Content-Type"] = "application/octet-stream"
        fields["Content-Length"] = str(len(body))
    line = f"{method} {server.path}{path} HTTP/{version}\r\n".encode("latin-1")
    return line + encode_fields(fields.items()) + body


def foreign_error() -> UnreachableError:
    return UnreachableError("it does not answer like ServerControl", 404)


def refused_error(server: ServerAddress, status: int, body: bytes) -> UnreachableError:
    """Return the reason from an answer, or what to do about a token."""
    try:
        message = clean_text(parse_json_object(body)["message"])
    except (CommandError, KeyError):
        message = str(foreign_error())
    if status == 401 and server.token_file:
        message += f" (the one in {server.token_file})"
    elif status == 401 and server.token is None:
        remedy = "name a file with it by --token-file, or set SERVERCONTROL_TOKEN"
        if server.line:
            remedy = f"put it into a file, and the file's name at the end of {server.line}"
        message = f"it needs a token: {remedy}. The token is in {TOKEN_PLACES}"
    return UnreachableError(f"{status}: {message}", status)


@functools.cache
def make_client_tls() -> ssl.SSLContext:
    """OpenSSL reads the file that SSL_CERT_FILE names."""
    if ssl is None:
        raise UnreachableError("this Python was built without OpenSSL")
    context = ssl.create_default_context()
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


def explain_failure(error: Exception) -> str:
    """Return why a connection failed, for users."""
    if ssl is not None and isinstance(error, ssl.SSLError):
        if not isinstance(error, ssl.SSLCertVerificationError):
            return "TLS failed (is it http?)"
        own, hint = os.environ.get("SSL_CERT_FILE", ""), "see SSL_CERT_FILE"
        if own and not os.path.isfile(own):  # OpenSSL ignores that
            hint = f"there is no file {own}"
        return f"its certificate is not trusted: {error.verify_message} ({hint})"
    if isinstance(error, (socket.gaierror, UnicodeError)):  # UnicodeError: a malformed name
        return "no such host"
    number = getattr(error, "errno", None)
    return os.strerror(number).lower() if number else str(error) or "disconnected"


async def sleep_about(seconds: float) -> None:
    """Vary the time, so that after a network failure not all clients come at once."""
    await asyncio.sleep(seconds * (0.75 + secrets.randbelow(500) / 1000))


async def wait_within(seconds: float, something: Awaitable[Result]) -> Result:
    """Raises UnreachableError if the network fails or is too slow."""
    # Before Python 3.12 wait_for() may lose a cancellation: the client would not end.
    future = asyncio.ensure_future(something)
    # Else asyncio logs an exception that comes too late.
    future.add_done_callback(lambda one: one.cancelled() or one.exception())
    try:
        await asyncio.wait({future}, timeout=seconds)
        if not future.done():
            raise UnreachableError("no answer in time")
        return future.result()
    except (OSError, UnicodeError) as error:
        raise UnreachableError(explain_failure(error)) from None
    finally:
        future.cancel()


async def look_up(host: str, port: int) -> list[Any]:
    """In its own thread: asyncio has few, and joins them at exit. Raises OSError, UnicodeError."""
    found: concurrent.futures.Future[list[Any]] = concurrent.futures.Future()
    found.set_running_or_notify_cancel()  # so it cannot be cancelled before it is set

    def ask() -> None:
        try:
            found.set_result(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except (OSError, UnicodeError) as error:
            found.set_exception(error)

    try:
        threading.Thread(target=ask, daemon=True).start()
    except RuntimeError:  # no thread can be started
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN)) from None
    return await asyncio.wrap_future(found)


async def connect_socket(host: str, port: int) -> socket.socket:
    """Connect to the first address that accepts. Raises the first OSError."""
    failure = None
    for family, kind, protocol, _, address in await look_up(host, port):
        try:
            with contextlib.ExitStack() as stack:
                connection = stack.enter_context(socket.socket(family, kind, protocol))
                connection.setblocking(False)
                await asyncio.get_running_loop().sock_connect(connection, address)
                stack.pop_all()
                return connection
        except OSError as error:
            failure = failure or error
    assert failure  # getaddrinfo() returns an address, or raises
    raise failure


async def connect_server(server: ServerAddress) -> StreamPair:
    """Raises OSError, UnicodeError, UnreachableError."""
    if server.unix:
        return await asyncio.open_unix_connection(server.unix, limit=CLIENT_BUFFER_BYTES)
    tls: dict[str, Any] = {}
    if server.tls:
        tls = {"ssl": make_client_tls(), "server_hostname": server.host}
    connection = await connect_socket(server.host, server.port)
    enable_keepalive(connection)
    # Keep-alive sends no probes while sent data are not acknowledged. Then this counts (ms).
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 18_000)
    return await asyncio.open_connection(sock=connection, limit=CLIENT_BUFFER_BYTES, **tls)


async def read_response_head(reader: Reader, server: ServerAddress) -> tuple[int, dict[str, str]]:
    """Return the next answer's status, and lower-case name -> value."""
    try:
        head = await wait_within(ANSWER_SECONDS, reader.readuntil(b"\r\n\r\n"))
    except (EOFError, asyncio.LimitOverrunError):
        hint = "" if server.tls else " (is it https?)"
        raise UnreachableError(f"disconnected before it answered{hint}") from None
    status = re.match(rb"HTTP/1\.[01] ([0-9]{3})", head)
    if status is None:
        raise UnreachableError("it does not speak HTTP (is it https?)")
    found = re.findall(r"\n([^:\r\n]*):([^\r\n]*)", head.decode("latin-1"))
    return int(status[1]), {name.lower(): value.strip() for name, value in found}


async def read_response_body(reader: Reader, fields: Mapping[str, str]) -> bytes:
    """Without Content-Length a body ends with the connection, or is cut."""
    length = fields.get("content-length", str(MAX_ANSWER_BYTES))
    if not DIGITS.fullmatch(length) or int(length) > MAX_ANSWER_BYTES:
        raise foreign_error()
    try:
        return await wait_within(ANSWER_SECONDS, reader.readexactly(int(length)))
    except asyncio.IncompleteReadError as error:
        if "content-length" not in fields:
            return error.partial
        raise UnreachableError("disconnected in the middle of its answer") from None


async def open_stream(
    server: ServerAddress, path: str, body: bytes = b"", upgrade: Mapping[str, str] = {}
) -> tuple[dict[str, str], StreamPair]:
    """GET, or POST a body; return the answer's fields, and the connection."""
    # An answer to HTTP/1.0 is not chunked.
    version, wanted = ("1.1", 101) if upgrade else ("1.0", 200)
    request = encode_request(server, "POST" if body else "GET", path, body, version, upgrade)
    reader, writer = await wait_within(CONNECT_SECONDS, connect_server(server))
    try:
        writer.write(request)
        status, fields = await read_response_head(reader, server)
        if status != wanted:
            raise refused_error(server, status, await read_response_body(reader, fields))
    except BaseException:
        writer.transport.abort()
        raise
    return fields, (reader, writer)


async def fetch(server: ServerAddress, path: str) -> bytes:
    fields, (reader, writer) = await open_stream(server, path)
    try:
        return await read_response_body(reader, fields)
    finally:
        writer.transport.abort()


class Control:
    """A kept connection for short requests, pipelined (RFC 9112, 9.3.2)."""

    def __init__(self, server: ServerAddress) -> None:
        self._server = server
        # Both are taken in the order of the requests, so each reads its own answer.
        self._sending, self._reading = asyncio.Lock(), asyncio.Lock()
        self._streams: StreamPair | None = None
        self._unanswered = 0

    async def ask(self, method: str, path: str, body: bytes = b"") -> Fields:
        """Return the JSON object of a 200 answer."""
        request = encode_request(self._server, method, path, body, "1.1", {})
        async with self._sending:
            if self._streams and not self._unanswered and await self._has_unasked(self._streams[0]):
                self.close()
            if self._streams is None:
                self._streams = await wait_within(CONNECT_SECONDS, connect_server(self._server))
            streams = reader, writer = self._streams
            writer.write(request)
            self._unanswered += 1
        try:
            async with self._reading:
                status, answered = await read_response_head(reader, self._server)
                data = await read_response_body(reader, answered)
        except BaseException:  # if cancelled: its answer is not for the next request
            if self._streams is streams:
                self.close()
            raise
        finally:
            self._unanswered -= 1
        if status != 200:
            raise refused_error(self._server, status, data)
        try:
            return parse_json_object(data)
        except CommandError:
            raise foreign_error() from None

    @staticmethod
    async def _has_unasked(reader: Reader) -> bool:
        """Whether it has ended, or sent what is no answer (as a proxy's 408)."""
        peek = asyncio.ensure_future(reader.read(1))
        await asyncio.wait({peek}, timeout=0)  # lets the event loop read the socket, too
        is_waiting = peek.cancel()
        await asyncio.gather(peek, return_exceptions=True)
        return not is_waiting

    def close(self) -> None:
        if self._streams:
            self._streams[1].transport.abort()
            self._streams = None


# What parsing an answer and using its fields may raise.
NOT_AS_AGREED = (
    *(CommandError, ValueError, TypeError, LookupError),
    *(AttributeError, ArithmeticError, RecursionError),
)


def check_seq(value: Any) -> int:
    """Raises ValueError, also for one that would make all later events old."""
    if type(value) is not int or not 0 <= value < 10**18:
        raise ValueError("seq")
    return value


@dataclass(eq=False, repr=False)
class Link:
    """The events of one server except output, each once and in order, over many connections.

    Each connection begins with `hello`. The very first tells where to begin; after later ones comes
    what was missed or, from a restarted server, a `gap` and all that it still has. take: gets each
    `hello`, each `gap` (with the server's list of `tasks`) and every event of EVENT_TYPES; from
    Link itself `lost` (reason, status) at the end of a connection, and `restarted`. If it raises
    UnreachableError, the event comes again.
    """

    server: ServerAddress
    take: Callable[[Fields], None]
    boot_id: str = ""  # the server's run; "" before the first `hello`
    seq: int = 0  # of the newest event that was taken
    heard_at: float = field(default_factory=time.monotonic)  # when bytes last came
    _writer: asyncio.StreamWriter | None = None
    _websocket: WebSocketConnection = field(default_factory=WebSocketConnection)
    _has_hello: bool = False  # on this connection

    async def run(self) -> None:
        delay = RETRY_SECONDS / 2
        while True:
            reason, status = await self._follow()
            self.take({"type": "lost", "reason": reason, "status": status})
            delay = RETRY_SECONDS if self._has_hello else min(delay * 2, MAX_RETRY_SECONDS)
            await sleep_about(REFUSED_RETRY_SECONDS if status in REFUSED else delay)

    def check_silence(self, now: float) -> bool:
        """Ping a quiet server; hang up on a silent one, and return True."""
        is_silent = now - self.heard_at > SILENCE_SECONDS
        if is_silent and self._writer:
            self._writer.transport.abort()
        elif now - self.heard_at > SILENCE_SECONDS / 4:
            self._write(Opcode.TEXT, b'{"type":"ping"}')
        return is_silent

    def _write(self, opcode: Opcode, payload: bytes) -> None:
        if self._writer is None or self._writer.transport.is_closing():
            return  # asyncio would complain
        if count_waiting_bytes(self._writer.transport) < HIGH_WATER_BYTES:  # else it does not read
            self._writer.write(self._websocket.encode(opcode, payload))

    async def _follow(self) -> tuple[str, int]:
        """Return why the connection ended, and the status."""
        self._has_hello = False
        try:
            reader = await self._upgrade()
            while True:
                await self._receive(await reader.read(CLIENT_BUFFER_BYTES))
        except UnreachableError as error:
            return str(error), error.status
        except OSError as error:
            return explain_failure(error), 0
        except NOT_AS_AGREED as error:
            return f"it sent what cannot be understood: {clean_text(repr(error))}", 404
        finally:
            if self._writer:
                self._writer.close()
                self._writer = None

    async def _upgrade(self) -> Reader:
        """RFC 6455, 4.1."""
        key = base64.b64encode(os.urandom(16)).decode()
        path = "/ws?hello&task=none"
        if self.boot_id:
            path += f"&since={self.seq}&boot={urllib.parse.quote(self.boot_id)}"
        upgrade = {"Sec-WebSocket-Key": key, "Sec-WebSocket-Version": WEBSOCKET_VERSION}
        upgrade.update(UPGRADE_FIELDS)
        stream = open_stream(self.server, path, upgrade=upgrade)
        # So that the return of a server is noticed within 5 s.
        answer, (reader, self._writer) = await wait_within(SILENCE_SECONDS * 1.2, stream)
        self.heard_at = time.monotonic()
        if answer.get("sec-websocket-accept") != compute_accept(key):
            raise UnreachableError("it does not answer like a WebSocket server", 404)
        if answer.get("sec-websocket-extensions"):
            raise UnreachableError("it uses a WebSocket extension that was not offered", 404)
        mask = functools.partial(os.urandom, 4)
        self._websocket = WebSocketConnection(mask, MAX_EVENT_BYTES, MAX_EVENT_FRAGMENTS)
        return reader

    async def _receive(self, data: bytes) -> None:
        if data:  # none if this end hung up
            self.heard_at = time.monotonic()
        messages = self._websocket.receive(data)
        pings: list[Any] = [one.data for one in messages if one.opcode is Opcode.PING]
        for ping in pings[-1:]:  # the newest alone needs an answer (RFC 6455, 5.5.3)
            self._write(Opcode.PONG, ping)
        for message in messages:
            if message.opcode is Opcode.TEXT:
                await self._take_message(parse_json_object(message.data))
        if self._websocket.state is not WebSocketState.OPEN:
            reason = self._websocket.close_reason or "it closed the connection"
            code = self._websocket.close_code or 0
            # It would be invalid again, so this is a refusal.
            is_invalid = CloseCode.PROTOCOL_ERROR <= code <= CloseCode.MESSAGE_TOO_BIG
            raise UnreachableError(f"{code}: {clean_text(reason)}", 404 if is_invalid else 0)
        if not data:
            raise UnreachableError("disconnected")

    async def _take_message(self, event: Fields) -> None:
        # An event that is not newer than `seq` was taken from an earlier connection. `hello` resets
        # `seq` after a restart of the server, which then counts from 1 again.
        kind, newest = event["type"], event.get("seq", event.get("to"))
        if kind == "hello":
            self._has_hello = True
            boot_id = str(event["boot_id"])
            if not self.boot_id:
                self.seq = check_seq(newest)
            elif boot_id != self.boot_id:
                self.take({"type": "restarted", "boot_id": boot_id})
                self.seq = 0
            self.boot_id = boot_id
            self.take(event)
        elif not self._has_hello:
            raise UnreachableError("it says no hello, as an older ServerControl does", 404)
        elif newest is not None:  # None in an older server's pong
            seq = check_seq(newest)
            if kind == "gap":
                self.take({**event, "tasks": json.loads(await fetch(self.server, "/tasks"))})
            elif kind in EVENT_TYPES and seq > self.seq:
                self.take(event)
            self.seq = max(self.seq, seq)


class Stage(enum.Enum):
    """How far a task is; words for the summary, and for a note, if contact is lost then."""

    NEW = "not started", ""
    ASKED = "lost after the start", "; whether the command was started is not known"
    RUNNING = "lost after the start", "; the command, task {}, may still be running there"
    ENDED = "not complete", ""


@dataclass(eq=False, repr=False)
class RemoteTask:
    """A command on a server: `curl …/exec?follow` that continues after a break.

    fields: the body of `POST /exec`. With a `window` the server waits for this reader, so nothing
    is lost unless it is gone for a minute.
    """

    server: ServerAddress
    fields: Fields
    write: Callable[[bytes], None]
    drain: Callable[[], Awaitable[None]]
    tell: Callable[[str], None]
    boot_id: str = ""  # the server's run
    stage: Stage = Stage.NEW
    is_stopping: bool = False
    is_stop_owed: bool = False  # the server must still be told
    task_id: str = ""  # "" before the start
    result: tuple[int, str] = (256, "not ended")  # exit code, 256 for none; how it ended
    failure: UnreachableError | None = None  # why the exit code, or output, is missing
    stream: StreamPair | None = None  # brings the output
    good_at: float = field(default_factory=time.monotonic)  # when the server was last heard
    position: int = 0  # bytes of output that came or are lost
    has_lost: bool = False
    is_in_line: bool = False  # the output so far ends inside a line
    connected: Callable[[], None] = lambda: None  # called at each new stream

    def __post_init__(self) -> None:
        # A repeated request has the same `ref`, so it starts nothing twice.
        self.fields = {**self.fields, "ref": secrets.token_urlsafe(12)}
        self.control = Control(self.server)

    @property
    def is_running(self) -> bool:
        return self.stage in (Stage.ASKED, Stage.RUNNING) and self.failure is None

    async def learn(self) -> Fields:
        """GET /info. Raises UnreachableError, also after a restart."""
        info = await self.control.ask("GET", "/info")
        boot_id = info.get("boot_id")
        if not boot_id or not isinstance(boot_id, str):
            raise foreign_error()
        if self.boot_id not in ("", boot_id):
            raise UnreachableError("it was restarted", 404)
        self.boot_id = boot_id
        return info

    async def start(self) -> None:
        """Raises UnreachableError, also if it was stopped before.

        A request without an answer is repeated: by its `ref` the server starts it only once. A
        restarted server would start it again, so learn() looks first.
        """
        if self.is_stopping:
            raise UnreachableError("not started")
        for delay in (0.2, 1.0, 3.0, None):
            before, self.stage = self.stage, Stage.ASKED
            try:
                if before is Stage.ASKED:
                    await self.learn()
                await self._open("/exec?follow", encode_json(self.fields))
                return
            except UnreachableError as error:
                is_refused = error.status not in (0, 502, 504)  # a proxy may have passed it on
                if is_refused:
                    self.stage = before
                if is_refused or delay is None:
                    raise
            await asyncio.sleep(delay)

    async def _open(self, path: str, body: bytes = b"") -> None:
        fields, stream = await open_stream(self.server, path, body)
        task_id, offset = fields.get("x-task-id", ""), fields.get("x-offset", "")
        if not DIGITS.fullmatch(task_id) or not DIGITS.fullmatch(offset):
            stream[1].transport.abort()
            # As a proxy's 502: it may have been started.
            raise UnreachableError(str(foreign_error()), 502 if body else 404)
        self.stage, self.task_id, self.stream = Stage.RUNNING, task_id, stream
        self.good_at = time.monotonic()
        lost = int(offset) - self.position
        if lost > 0:
            self.position += lost
            self.has_lost = True
            self.tell(f"{lost} bytes of output are LOST: it keeps no more (--keep-output)")
            if self.is_in_line:  # what comes is of another line
                self.write(b"\n")
        self.connected()
        if self.is_stop_owed:
            await self.stop()

    async def follow(self) -> None:
        """Write the output, to the end. Raises also what `drain` raises."""
        trouble, delay = "", RETRY_SECONDS
        while self.stage is not Stage.ENDED:
            try:
                if self.stream is None:
                    await self.learn()
                    path = f"/logs?id={self.task_id}&offset={self.position}&follow"
                    await self._expect(self._open(path))
                delay = RETRY_SECONDS
                await self._read_stream()
                # A proxy may have ended the stream: the task tells if that was all.
                task = await self._ask_task()
                if task["state"] != "running" and task["output_bytes"] <= self.position:
                    await self._end(task)
                trouble = ""
            except UnreachableError as error:
                gives_up = time.monotonic() - self.good_at > EXEC_GIVE_UP_SECONDS
                if gives_up or error.status in REFUSED:
                    raise
                if str(error) != trouble:
                    trouble = str(error)
                    self.tell(f"connection lost ({clean_text(trouble)}), trying again")
                await sleep_about(delay)
                delay = min(delay * 2, MAX_RETRY_SECONDS)

    async def _expect(self, answer: Awaitable[Result]) -> Result:
        """Return the answer. Raise another error if the server has forgotten the task."""
        try:
            return await answer
        except UnreachableError as error:
            if error.status != 404:
                raise
        await self.learn()  # raises after a restart
        self.stage = Stage.ENDED
        raise UnreachableError("its end was missed and is forgotten", ENDED_STATUS)

    async def _ask_task(self) -> Fields:
        task = await self._expect(self.control.ask("GET", f"/tasks?id={self.task_id}"))
        if type(task.get("output_bytes")) is not int or not isinstance(task.get("state"), str):
            raise foreign_error()
        return task

    async def _read_stream(self) -> None:
        """Write until the stream ends, or stands still although there is more.

        It stands still if nothing came between two answers, BEAT_SECONDS apart, that tell of more
        output, or of the end. Then follow() opens a new stream.
        """
        assert self.stream
        reader, writer = self.stream
        taking = asyncio.ensure_future(self._take_output(reader))
        stood_at = -1
        try:
            while not (await asyncio.wait({taking}, timeout=BEAT_SECONDS))[0]:
                task = await self._ask_task()
                self.good_at = time.monotonic()
                if self.is_stop_owed:
                    await self.stop()
                has_more = task["state"] != "running" or task["output_bytes"] > self.position
                if has_more and stood_at == self.position:
                    return  # a proxy forgot it; or stdout pauses, and a new request shows we live
                stood_at = self.position if has_more else -1
            taking.result()
        finally:
            self.stream = None
            writer.transport.abort()
            taking.cancel()
            await asyncio.gather(taking, return_exceptions=True)

    async def _take_output(self, reader: Reader) -> None:
        with suppress(OSError):  # follow() finds out what is missing
            while True:
                await self.drain()  # what is not written is not read, so the task waits
                data = await reader.read(READ_CHUNK_BYTES)
                if not data:
                    return
                self.good_at = time.monotonic()
                self.position += len(data)
                self.is_in_line = not data.endswith(b"\n")
                self.write(data)

    async def _end(self, task: Fields) -> None:
        await self.drain()  # notes stand behind the output
        exit_code, killed_by = task.get("exit_code"), task.get("killed_by")
        if type(exit_code) is not int or not 0 <= exit_code <= 255:
            raise foreign_error()
        self.stage, self.result = Stage.ENDED, (exit_code, f"exit code {exit_code}")
        if killed_by == SERVER_STOP:
            raise UnreachableError("it was stopped, which ended the command", ENDED_STATUS)
        if task["state"] == "timeout":
            self.tell("stopped: it took longer than --timeout allows")
        elif killed_by and not self.is_stopping:
            self.tell(f"the command was killed by {clean_text(killed_by)}")
        if task.get("replaced") and not self.fields.get("tty"):
            self.tell("part of the output is no UTF-8 and was replaced: send that by base64")
        if self.has_lost:
            raise UnreachableError(f"its output is not complete ({self.result[1]})", ENDED_STATUS)

    async def stop(self) -> None:
        """Interrupt the command, now or with the next stream. What ignores that is killed."""
        self.is_stopping, self.is_stop_owed = True, not self.task_id
        if not self.task_id:
            return
        try:
            await self.control.ask("POST", f"/kill?id={self.task_id}&signal=INT")
        except UnreachableError as error:
            self.is_stop_owed = error.status not in REFUSED
            again = ", trying again" if self.is_stop_owed else ""
            if error.status != 409:  # it has ended
                self.tell(f"could not be stopped ({error}){again}")

    async def feed(self, data: bytes) -> None:
        """Send input, b"" for its end, as soon as the task takes it."""
        path = f"/stdin?id={self.task_id}" + ("" if data else "&eof")
        while True:
            try:
                await self.control.ask("POST", path, data)
                return
            except UnreachableError as error:
                if error.status == 409:  # it has ended, or closed its input
                    return
                if error.status != 429:
                    raise
            await asyncio.sleep(INPUT_PAUSE_SECONDS)


def read_terminal_size(fd: int) -> tuple[int, int]:
    """Return columns and rows; 80 x 24 where it does not say."""
    cols = rows = 0
    with suppress(OSError):
        cols, rows = os.get_terminal_size(fd)
    return cols or 80, rows or 24


async def read_input() -> AsyncIterator[bytes]:
    """Yield standard input, at last b"". Raises OSError."""
    loop = asyncio.get_running_loop()
    is_ready = asyncio.Event()
    data = b"?"
    while data:
        is_ready.clear()
        try:
            with suppress(PermissionError):  # epoll takes no regular file, which is always ready
                loop.add_reader(0, is_ready.set)
                await is_ready.wait()
        finally:
            loop.remove_reader(0)
        data = os.read(0, READ_CHUNK_BYTES)
        yield data


@dataclass(eq=False, repr=False)
class Keyboard:
    """The local terminal in raw mode: its keys and size go to the task's. Ctrl-] leaves."""

    task: RemoteTask
    leave: Callable[[], None]
    interrupt: Callable[[], None]
    waiting: bytes = b""  # keys, until there is a connection
    sending: set[asyncio.Future[None]] = field(default_factory=set)  # kept alive here
    is_full: bool = False  # the user was told that the task does not read

    async def run(self) -> None:
        """Return when the user leaves."""
        loop, before = asyncio.get_running_loop(), termios.tcgetattr(0)
        tty.setraw(0, termios.TCSADRAIN)  # what was typed ahead stays
        self.task.connected = self._resize
        loop.add_signal_handler(signal.SIGWINCH, self._resize)
        try:
            async for data in read_input():
                if b"\x1d" in data:  # Ctrl-]
                    break
                if b"\x03" in data and not self.task.task_id:  # Ctrl-C before the start
                    self.interrupt()
                else:
                    self.waiting += data
                    self._send_keys()
        except OSError:
            pass  # the terminal is gone
        finally:
            loop.remove_signal_handler(signal.SIGWINCH)
            with suppress(termios.error):
                termios.tcsetattr(0, termios.TCSADRAIN, before)
        self.leave()

    def _resize(self) -> None:
        if self.task.stream is not None:
            cols, rows = read_terminal_size(0)
            self._send(f"/resize?id={self.task.task_id}&cols={cols}&rows={rows}")
            self._send_keys()  # those that waited

    def _send_keys(self) -> None:
        while self.waiting and self.task.stream is not None:
            self._send(f"/stdin?id={self.task.task_id}", self.waiting[:READ_CHUNK_BYTES])
            self.waiting = self.waiting[READ_CHUNK_BYTES:]

    def _send(self, path: str, data: bytes = b"") -> None:
        """Do not wait for an answer: on a slow network the next key would."""

        async def send() -> None:
            try:
                await self.task.control.ask("POST", path, data)
            except UnreachableError as error:
                if error.status == 429 and not self.is_full:
                    self.is_full = True
                    self.task.tell("what was typed is not all taken: the task does not read it")

        sending = asyncio.ensure_future(send())
        self.sending.add(sending)
        sending.add_done_callback(self.sending.discard)


def write_all(fd: int, data: bytearray, seconds: float = math.inf) -> None:
    """Write the data, for so long at most, and remove what is written. Raises OSError."""
    end = time.monotonic() + seconds
    while data and time.monotonic() < end:
        del data[: write_some(fd, data[: select.PIPE_BUF], 20)]


def write_output(data: bytes) -> None:
    """Write to stdout. Raises OutputError."""
    try:
        write_all(1, bytearray(data))
    except OSError as error:
        raise OutputError(error) from None


def encode_note(text: str) -> bytes:
    is_raw = os.isatty(2) and not termios.tcgetattr(2)[1] & termios.OPOST
    end = "\r\n" if is_raw else "\n"
    return f"servercontrol: {text}{end}".encode("utf-8", "backslashreplace")


def write_note(text: str) -> None:
    with suppress(OSError):
        write_all(2, bytearray(encode_note(text)))


class Output:
    """Writes to a descriptor without blocking the event loop."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.waiting = bytearray()
        # While anything waits; set when all is written.
        self._is_written: asyncio.Event | None = None
        self.error: OutputError | None = None  # why nothing more can be written

    def put(self, data: bytes) -> None:
        if self.error is None:
            self.waiting += data
            self._flush()

    async def drain(self) -> None:
        """Wait until all is written. Raises OutputError."""
        if self._is_written is not None:
            await self._is_written.wait()
        if self.error is not None:
            raise self.error

    def finish(self) -> None:
        with suppress(OSError):
            write_all(self._fd, self.waiting, FINISH_SECONDS)

    def _flush(self) -> None:
        count = 1
        try:
            while self.waiting and count:
                count = write_some(self._fd, self.waiting[: select.PIPE_BUF])
                del self.waiting[:count]
        except OSError as error:
            self.error = OutputError(error)
            self.waiting.clear()
        if self.waiting and self._is_written is None:
            self._is_written = asyncio.Event()
            asyncio.get_running_loop().add_writer(self._fd, self._flush)
        elif not self.waiting and self._is_written is not None:
            asyncio.get_running_loop().remove_writer(self._fd)
            self._is_written.set()
            self._is_written = None


def wants_colours() -> bool:
    """See no-color.org."""
    return os.isatty(1) and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def list_some(names: Sequence[str]) -> str:
    return ", ".join([*names[:10], *["…"] * (len(names) > 10)])


class Report:
    """The commands of an `exec`, and their output. fold: show what is equal once, at the end."""

    def __init__(self, servers: Sequence[ServerAddress], fields: Fields, fold: bool) -> None:
        self.output, self.notes = Output(1), Output(2)
        # By a server's name: output for --fold; the line that has no end yet.
        self._kept: dict[str, list[bytes]] = {}
        self._begun: dict[str, bytes] = {}
        self.tasks: list[RemoteTask] = []
        width = max(len(server.name) for server in servers)
        for server in servers:
            name = server.name
            write: Callable[[bytes], None] = self.output.put
            if fold:
                write = self._kept.setdefault(name, []).append
            elif len(servers) > 1:
                colour = COLOURS[len(self._begun) % len(COLOURS)] if wants_colours() else ""
                prefix = f"{colour}{name:{width}} |{PLAIN if colour else ''} "
                self._begun[name] = b""
                write = functools.partial(self._write_lines, name, prefix.encode(errors="replace"))
            tell = functools.partial(self.note, name)
            self.tasks.append(RemoteTask(server, fields, write, self.output.drain, tell))

    def _write_lines(self, name: str, prefix: bytes, data: bytes) -> None:
        *lines, rest = (self._begun[name] + data).split(b"\n")
        if len(rest) > MAX_LINE_BYTES:
            lines, rest = [*lines, rest], b""
        self._begun[name] = rest
        self.output.put(b"".join(b"%b%b\n" % (prefix, line) for line in lines))

    def note(self, *words: str) -> None:
        self.notes.put(encode_note(": ".join(words)))

    def end(self, task: RemoteTask) -> None:
        if self._begun.get(task.server.name):
            task.write(b"\n")

    def conclude(self) -> int:
        """Show what is kept or still runs, and a summary; return the highest exit code."""
        self._show_kept()
        groups: dict[tuple[int, str], list[str]] = {}
        tasks, self.tasks = self.tasks, []  # once: the user may leave after it
        for task in tasks:
            self.end(task)
            if task.is_running:
                url = f"{task.server.url}/logs?id={task.task_id}"
                left = f"task {task.task_id} is left running: {url}"
                task.tell(left if task.task_id else "its command may have been started")
            groups.setdefault(task.result, []).append(task.server.name)
        parts = [
            f"{len(names)} {what}" + (f" ({list_some(names)})" if code else "")
            for (code, what), names in sorted(groups.items())
        ]
        if len(tasks) > 1:
            self.note(f"{len(tasks)} servers: {'; '.join(parts)}")
        return max((code for code, _ in groups if code < 256), default=0)

    def _show_kept(self) -> None:
        groups: dict[tuple[str, bytes], list[str]] = {}
        for task in self.tasks:
            name, result = task.server.name, str(task.failure or task.result[1])
            output = b"".join(self._kept.get(name, ()))
            if output or (name in self._kept and result.startswith("exit")):
                groups.setdefault((result, output), []).append(name)
        self._kept.clear()
        bold, plain = (BOLD, PLAIN) if wants_colours() else ("", "")
        for (result, output), names in groups.items():
            count = f"{len(names)} servers, " if len(names) > 1 else ""
            title = f"{bold}── {', '.join(names)} ({count}{result}){plain}\n"
            end = b"" if output.endswith(b"\n") or not output else b"\n"
            self.output.put(title.encode("utf-8", "replace") + output + end)


class Execution:
    """One command on `parallel` servers at a time. once: a server with two names runs it once."""

    HINTS = {
        "connection refused": "; is it running there, on that port, with --host?",
        "no such host": "; is it a name of the list?",
    }

    def __init__(self, report: Report, parallel: int, once: bool = False) -> None:
        self._report, self._tasks, self._once = report, report.tasks, once
        fields = self._tasks[0].fields
        self._places = asyncio.Semaphore(parallel)
        self._has_keyboard = bool(fields.get("tty")) and os.isatty(0)
        self._has_input = bool(fields.get("stdin")) and not self._has_keyboard
        self._input: list[bytes] | None = None  # all of it, if several servers get it
        self._claims: dict[str, str] = {}  # boot_id -> the name that runs the command
        # The exit status, set if this client leaves.
        self._left: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._stopping: asyncio.Future[None] | None = None  # by the first Ctrl-C

    async def run(self) -> int:
        """Return the exit status. If stdout fails, stop what runs and raise OutputError.

        It ends with the last command, or when the user leaves. After a failure of stdout (`| head`)
        servers have ANSWER_SECONDS to confirm the stop; a note names what then still runs.
        """
        everything = asyncio.ensure_future(self._run_all())
        keyboard = Keyboard(self._tasks[0], self._leave, self.interrupt)
        typing = asyncio.ensure_future(keyboard.run() if self._has_keyboard else asyncio.sleep(0))
        try:
            await asyncio.wait({everything, self._left}, return_when=asyncio.FIRST_COMPLETED)
            if self._left.done():
                self._report.conclude()
                return self._left.result()
            return everything.result()
        except OutputError:
            stopping = asyncio.ensure_future(self._stop_all())
            ends: set[asyncio.Future[Any]] = {stopping, self._left}
            await asyncio.wait(ends, timeout=ANSWER_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            if not stopping.done():
                stopping.cancel()
                self._report.conclude()
            raise
        finally:
            typing.cancel()
            everything.cancel()
            # Keyboard.run() restores the terminal.
            await asyncio.gather(typing, everything, return_exceptions=True)
            self._report.output.finish()
            self._report.notes.finish()

    async def _run_all(self) -> int:
        if self._has_input and len(self._tasks) > 1:
            try:
                self._input = [piece async for piece in read_input()]
            except OSError as error:
                raise StartError(f"standard input: {error.strerror}") from None
        await asyncio.gather(*(self._run_one(task) for task in self._tasks))
        status = self._report.conclude()
        await self._report.output.drain()
        with suppress(OutputError):  # stderr is closed
            await self._report.notes.drain()
        return status

    async def _run_one(self, task: RemoteTask) -> None:
        name, feeding = task.server.name, None
        async with self._places:
            try:
                if not task.is_stopping:
                    self._claim(name, await task.learn())
                await task.start()
                if self._has_input:
                    feeding = asyncio.ensure_future(self._feed(task))
                await task.follow()
            except UnreachableError as error:
                summary, known = task.stage.value
                task.failure, task.result = error, (UNREACHABLE_STATUS, summary)
                if error.status == SAME_STATUS:
                    task.result = 256, "listed twice"
                where = "" if name == task.server.url else f" ({task.server.url})"
                hint = known.format(task.task_id) or self.HINTS.get(str(error), "")
                if task.stage is not Stage.NEW or self._report.output.error is None:
                    self._report.note(f"{name}{where}", f"{error}{hint}")
            finally:
                if feeding:
                    feeding.cancel()
        task.control.close()
        self._report.end(task)

    def _claim(self, name: str, info: Fields) -> None:
        if self._once and info.get("role") == "run":
            other = self._claims.setdefault(info["boot_id"], name)
            if other != name:
                raise UnreachableError(f"the same server as {other}", SAME_STATUS)

    async def _feed(self, task: RemoteTask) -> None:
        try:
            if self._input is None:
                async for piece in read_input():
                    await task.feed(piece)
            for piece in self._input or ():
                await task.feed(piece)
        except (UnreachableError, OSError) as error:
            task.tell(f"its input is not complete ({explain_failure(error)}); stopping it")
            await task.stop()

    def interrupt(self, number: int = signal.SIGINT) -> None:
        """Ctrl-C stops the commands; a second one, or another signal, leaves them."""
        running = [task for task in self._tasks if task.is_running]
        if number != signal.SIGINT or self._stopping is not None or not running:
            self._leave(128 + number)
            return
        names = [f"task {task.task_id or '?'} on {task.server.name}" for task in running]
        self._report.note(f"stopping {list_some(names)} (Ctrl-C again: leave it running)")
        self._stopping = asyncio.ensure_future(self._stop_all())

    async def _stop_all(self) -> None:
        """Start nothing more; stop what runs, and what is starting once it has an id."""
        tasks = [one for one in self._tasks if one.stage is not Stage.ENDED and not one.failure]
        await asyncio.gather(*(task.stop() for task in tasks))
        while any(task.is_running and not task.task_id for task in tasks):
            await asyncio.sleep(INPUT_PAUSE_SECONDS)

    def _leave(self, status: int = 0) -> None:
        if not self._left.done():
            self._left.set_result(status)


class ServerState(enum.Enum):
    """The state of a server in the monitor. Only Watched.change() sets it."""

    CONNECTING = "connecting"
    UP = "up"
    SILENT = "silent"  # was up, and has sent nothing for SILENCE_SECONDS
    REFUSED = "refused"
    UNREACHABLE = "unreachable"  # was never up, or not since it refused


# State -> the only ones before it. A server whose connection breaks stays UP until it is SILENT,
# since most connections are back before.
STATES_BEFORE = {
    ServerState.SILENT: (ServerState.UP,),
    ServerState.UNREACHABLE: (ServerState.CONNECTING, ServerState.REFUSED),
}


@dataclass(repr=False)
class MonitorLog:
    """Appends records as JSON lines to a file, which may be rotated by rename or copytruncate.

    Each record says up to which `seq` a server was read; a `position` also has its tasks. So the
    newest part tells the next monitor where to continue: a new file begins with a `position` of
    each server, and a long one gets them again every few MiB. path: os.devnull without a log.
    """

    path: str
    locate: Callable[[], list[Fields]] = list  # returns the `position` records
    _fd: int = -1  # the locked file, or -1
    _size: int = 0  # after the last write
    _is_cut: bool = False  # the file ends inside a record
    _waiting: bytearray = field(default_factory=bytearray)
    problem: str = ""  # why records wait; "" if all is well
    _lost: int = 0  # records that the waiting `gap` counts
    _complained_at: float = -LOG_ERROR_SECONDS
    _due_bytes: int = 0  # at this size `position` records are due

    def read(self) -> tuple[list[bytes], bool]:
        """Return the file's newest lines, and whether these are all. Raises ConfigError."""
        try:
            lines = self._open(LOG_TAIL_BYTES).split(b"\n")
        except OSError as error:
            raise ConfigError(f"--log: {self.path}: {error.strerror}") from None
        self._due_bytes = LOG_STEP_BYTES
        return lines, self._size <= LOG_TAIL_BYTES

    def _open(self, tail_bytes: int) -> bytes:
        close_fds([self._fd])
        self._fd = -1
        # O_NONBLOCK: for a FIFO that nobody reads.
        with open_private_file(self.path, os.O_APPEND | os.O_NONBLOCK) as file:
            status, tail = os.fstat(file.fileno()), b""
            if stat.S_ISREG(status.st_mode):
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError as error:  # two would write everything twice
                    raise OSError(error.errno, "another monitor writes it") from None
                tail = os.pread(file.fileno(), tail_bytes, max(0, status.st_size - tail_bytes))
            # The copy keeps the lock.
            self._fd, self._size = os.dup(file.fileno()), status.st_size
        self._is_cut = tail[-1:] not in (b"", b"\n")
        return tail

    def add(self, record: Fields) -> None:
        """Take a record, which flush() writes. If too many wait, a `gap` replaces them."""
        if len(self._waiting) > BATCH_BYTES and not self.problem:  # one event may make thousands
            self.flush()
        self._waiting += encode_json(record) + b"\n"
        if len(self._waiting) > MAX_WAITING_BYTES:
            gap = {name: record[name] for name in ("time", "boot_id", "seq")}
            self._lost += self._waiting.count(b"\n")
            gap.update(event="gap", server=None, records=self._lost, reason=self.problem)
            self._lost -= 1  # this gap, should it be lost in turn
            self._waiting = bytearray(encode_json(gap) + b"\n")
            self._due_bytes = 0  # the lost records may include a position

    def flush(self) -> None:
        """Write what waits, after a rotation to a new file. If it cannot, say why once a minute."""
        try:
            is_here = self._fd >= 0 and is_at(self.path, self._fd)
            if not is_here or os.fstat(self._fd).st_size < self._size:
                self._open(1)
                self._due_bytes = 0
            if self._size >= self._due_bytes:
                positions = b"".join(encode_json(record) + b"\n" for record in self.locate())
                self._waiting += positions
                # Again after at least as many other bytes, so they are never most of the file.
                size = len(positions)
                self._due_bytes = self._size + size + max(LOG_STEP_BYTES, size)
            if self._waiting:
                self._append()
                self.problem, self._lost = "", 0
        except OSError as error:
            self.problem = f"--log: {self.path}: {error.strerror}"
            if time.monotonic() - self._complained_at >= LOG_ERROR_SECONDS:
                self._complained_at = time.monotonic()
                write_without_waiting(2, encode_note(self.problem))

    def _append(self) -> None:
        # Half a record may stay in the file; the next line has it whole.
        data = b"\n" * self._is_cut + self._waiting
        written = os.write(self._fd, data)
        self._size = os.fstat(self._fd).st_size
        whole = data.rfind(b"\n", 0, written) + 1
        self._waiting, self._is_cut = bytearray(data[whole:]), whole < written
        if self._waiting:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@dataclass(eq=False, repr=False)
class Watched:
    """One server of a monitor, and what becomes of the events of its Link.

    cpu_alert: the monitor's own threshold; None: the server's alerts count. emit: gets news.
    """

    # What is remembered of a task.
    TASK = {"task_id": str, "command": str, "cwd": str, "by": str, "started": int}

    server: ServerAddress
    cpu_alert: float | None
    log: MonitorLog
    emit: Callable[[Watched, Fields], None]
    state: ServerState = ServerState.CONNECTING
    reason: str = ""  # why it is not up
    _silent_at: float = 0.0  # when it was last heard while it was up
    stats: Fields = field(default_factory=dict)
    alert: str = ""  # as it is shown
    alert_at: int = 0  # when the newest was raised (server's ms)
    _hello_seq: int = 0  # `hello` told the alerts up to there
    tasks: dict[str, Fields] = field(default_factory=dict)  # running, by id
    open_bytes: int = 0  # their size
    ended: OrderedDict[str, None] = field(default_factory=OrderedDict)  # ids of recorded ends

    def __post_init__(self) -> None:
        self.link = Link(self.server, self.take)
        self._rule = self.cpu_alert is not None and AlertRule(self.cpu_alert, 60, 0)

    def make_record(self, event: str, **fields: Any) -> Fields:
        record = {"time": format_time(time.time()), "event": event, "server": self.server.name}
        return {**record, "boot_id": self.link.boot_id, "seq": self.link.seq, **fields}

    def locate(self, count: int) -> Fields:
        ended = list(self.ended)[-count:]
        return self.make_record("position", tasks=list(self.tasks.values()), ended=ended)

    def record(self, event: str, **fields: Any) -> None:
        record = self.make_record(event, **fields)
        self.remember(record)
        self.log.add(record)

    def record_gap(self, first: int, last: int | None, reason: str) -> None:
        self.record("gap", **{"from": first, "to": last, "reason": reason})

    def learn(self, record: Fields) -> None:
        """Take a record of an earlier monitor. Raises one of NOT_AS_AGREED."""
        event, boot_id, seq = record["event"], str(record["boot_id"]), check_seq(record["seq"])
        # A position names all anew; of another run nothing is known yet.
        if event == "position" or boot_id != self.link.boot_id:
            self.tasks, self.open_bytes = {}, 0
            self.ended = OrderedDict.fromkeys(record.get("ended", ()))
        self.link.boot_id, self.link.seq = boot_id, seq
        for task in record.get("tasks", ()):
            self.remember({"event": "task_start", **task})
        self.remember(record)

    def remember(self, record: Fields) -> None:
        """Keep what a record says of tasks and alerts."""
        event = record["event"]
        if event in ("cpu_alert", "alert_resolved"):
            self.alert_at = record["raised"]
        elif event == "task_start":
            task = self.tasks[record["task_id"]] = {name: record[name] for name in self.TASK}
            self.open_bytes += len(encode_json(task)) + EVENT_OVERHEAD_BYTES
        elif event in ("task_complete", "task_lost"):
            self.ended[record["task_id"]] = None
            if len(self.ended) > MAX_ENDED_TASKS:
                self.ended.popitem(last=False)
            task = self.tasks.pop(record["task_id"], {})
            if task:
                self.open_bytes -= len(encode_json(task)) + EVENT_OVERHEAD_BYTES

    def take(self, event: Fields) -> None:
        """Take an event; tell it, unless its handler returns True: no news."""
        take = self.TAKES.get(event["type"])
        is_old = take is not None and take(self, event)
        self.log.flush()
        if not is_old:
            self.emit(self, event)

    def change(self, state: ServerState, **fields: Any) -> None:
        """Enter a state if it may come after the present one; record and tell that."""
        if self.state is state or self.state not in STATES_BEFORE.get(state, ServerState):
            return
        what = state.value
        if self.state in (ServerState.CONNECTING, ServerState.UP):
            self._silent_at = self.link.heard_at
        elif state is ServerState.UP:
            what, fields = "back", {"silent_ms": int((time.monotonic() - self._silent_at) * 1000)}
        if what != "up":
            self.alert = f"{time.strftime('%H:%M')} {what}"
        self.state, self.stats = state, {}
        self.record(f"server_{what}", **fields)
        self.emit(self, {"type": f"server_{what}", "timestamp": int(time.time() * 1000), **fields})

    def _take_hello(self, event: Fields) -> bool:
        self.reason = ""
        self.change(ServerState.UP, version=event["version"])
        # It lists the newest alerts, and their ends. Those after `alert_at` are news.
        self._hello_seq = event.get("seq", 0)
        past = [one for alert in event.get("alerts", ()) for one in (alert, alert["resolved"])]
        news = [one for one in past if one and one["timestamp"] > self.alert_at]
        for alert in (*news, event.get("alert")):
            if alert and alert["type"] in ("cpu_alert", "alert_resolved"):
                self.take(alert)
        for task in event["tasks"]:
            self._take_start(task)
        return True

    def _take_lost(self, event: Fields) -> bool:
        before, self.reason = self.reason, event["reason"]
        state = ServerState.REFUSED if event["status"] in REFUSED else ServerState.UNREACHABLE
        self.change(state, reason=self.reason)
        return self.reason == before

    def _take_restarted(self, event: Fields) -> None:
        # What else came in the old run is unknown.
        self.record_gap(self.link.seq + 1, None, "restarted")
        for task_id in list(self.tasks):
            self._record_end("task_lost", task_id=task_id, reason="the server was restarted")
        self.ended.clear()  # with a new state folder ids begin with 1 again

    def _take_gap(self, event: Fields) -> None:
        tasks = event.pop("tasks")
        if event["to"] > 0:
            self.record_gap(max(1, event["from"]), event["to"], "kept no more")
        for task in tasks:
            self._take_start(task)
            if task["state"] != "running":
                self._take_end({**task, "duration_ms": task["ended"] - task["started"]})
        for task_id in set(self.tasks) - {task["task_id"] for task in tasks}:
            self._record_end("task_lost", task_id=task_id, reason="the server remembers it no more")

    def _take_start(self, task: Fields) -> None:
        task = {"started": task.get("timestamp"), **task}  # in an event `started` is missing
        start, task_id = {name: task[name] for name in self.TASK}, parse_task_id(task["task_id"])
        if not all(isinstance(start[name], kind) for name, kind in self.TASK.items()):
            raise ValueError("wrong task")
        if task_id in self.tasks or task_id in self.ended:
            return
        if self.open_bytes > MAX_OPEN_BYTES:
            raise UnreachableError("it says that more tasks run than it could list", 404)
        self.record("task_start", **start)

    def _take_end(self, task: Fields) -> None:
        parse_task_id(task["task_id"])
        names = ("task_id", "exit_code", "signal", "state", "duration_ms", "output_bytes")
        end = {name: task[name] for name in names}
        self._record_end("task_complete", **end, killed_by=task.get("killed_by"))

    def _record_end(self, event: str, **fields: Any) -> None:
        if fields["task_id"] not in self.ended:
            start = self.tasks.get(fields["task_id"], {})
            self.record(event, **fields, command=start.get("command"), by=start.get("by"))

    def _take_stats(self, event: Fields) -> None:
        numbers = [event[name] for name in ("cpu", "ram_used", "ram_total", "timestamp")]
        are_right = all(0 <= number < 1e15 for number in (*numbers, event["load_avg"][0]))
        if not are_right or len(encode_json(event)) > MAX_STATS_BYTES:
            raise ValueError("wrong or too many statistics")
        self.stats = event
        change = self._rule and self._rule.update(event["cpu"], time.monotonic())
        if change:
            alert = {"timestamp": event["timestamp"], "cpu": event["cpu"], "by": "monitor"}
            self.take({"type": change, **alert})

    def _take_alert(self, event: Fields) -> bool:
        is_ours, raised = event.get("by") == "monitor", event["timestamp"]
        if is_ours != bool(self._rule):
            return True
        when = time.strftime("%H:%M", time.localtime(raised / 1000))
        what = "CPU" if event["type"] == "cpu_alert" else "CPU back at"
        self.alert = f"{when} {what} {event['cpu']:.0f} %"
        # Events up to `hello` come after it, with alerts that it told.
        is_repeated = not is_ours and event.get("seq", 0) <= self._hello_seq
        is_known = is_repeated and raised <= self.alert_at
        if not is_known:
            self.record(event["type"], cpu=event["cpu"], raised=raised)
        return is_known

    TAKES = {
        "hello": _take_hello,
        "lost": _take_lost,
        "restarted": _take_restarted,
        "gap": _take_gap,
        "task_start": _take_start,
        "task_complete": _take_end,
        "stats_update": _take_stats,
        "cpu_alert": _take_alert,
        "alert_resolved": _take_alert,
    }


class Monitor:
    """Watches servers, and goes on where its log ends."""

    def __init__(self, everybody: Sequence[Watched], log: MonitorLog) -> None:
        self.all, self._log = everybody, log
        count = MAX_TOLD_ENDED // len(everybody)
        log.locate = lambda: [watched.locate(count) for watched in everybody]
        lines, is_whole = log.read()
        named = {watched.server.name: watched for watched in everybody}
        # Of a long log only the end was read. A server without a `position` there gets a gap.
        lost = {} if is_whole else dict(named)
        for line in lines:
            with suppress(*NOT_AS_AGREED):  # half a line, or of another server
                record = parse_json_object(line)
                named[record["server"]].learn(record)
                if record["event"] == "position":
                    lost.pop(record["server"], None)
        reason = f"the newest {LOG_TAIL_BYTES // MIB} MiB of the log do not say where it stood"
        for watched in lost.values():
            watched.record_gap(1, None, reason)
        log.flush()

    async def run(self) -> None:
        """Watch until this is cancelled."""
        try:
            await asyncio.gather(self._look(), *[watched.link.run() for watched in self.all])
        finally:
            for watched in self.all:
                if watched.link.boot_id:
                    watched.record("monitor_stop")
            self._log.flush()

    async def _look(self) -> None:
        while True:
            before = time.monotonic()
            await asyncio.sleep(SILENCE_SECONDS / 8)
            now = time.monotonic()
            for watched in self.all:
                if now - before > SILENCE_SECONDS / 2:  # Ctrl-Z had stopped the monitor
                    watched.link.heard_at = now
                if watched.link.check_silence(now):
                    reason = watched.reason or f"nothing was heard for {SILENCE_SECONDS:g} s"
                    watched.change(ServerState.SILENT, reason=reason)
            self._log.flush()


class EventWriter:
    """Writes events as lines. It drops lines rather than wait, and says how many."""

    def __init__(self, as_json: bool) -> None:
        self._as_json = as_json
        self.output = Output(1)
        self._dropped = 0

    def write(self, name: str | None, event: Fields) -> None:
        """name: of the server, or None. Raises OutputError."""
        if len(self.output.waiting) > MAX_EVENT_BYTES:
            self._dropped += 1
            return
        if self._dropped:
            gap = {"type": "lines_dropped", "timestamp": int(time.time() * 1000)}
            gap["lines"], self._dropped = self._dropped, 0
            self.write(None, gap)
        if self._as_json:  # in ASCII: no control characters
            line = json.dumps({**event, "server": name})
        else:
            when = format_time(event.get("timestamp", time.time() * 1000) / 1000)
            facts = [one for one in event.items() if one[0] not in ("type", "timestamp", "seq")]
            words = [f"{format_value(key)}={format_value(value)}" for key, value in facts]
            line = " ".join([when, name or "-", format_value(event["type"]), *words])
        self.output.put(f"{line}\n".encode("utf-8", "replace"))
        if self.output.error is not None:
            raise self.output.error


def count_cells(text: str) -> int:
    """East Asian characters take two cells."""
    return sum(
        1 + (unicodedata.east_asian_width(c) in "WF")
        for c in text
        # Those that combine take none, as some of Hangul.
        if unicodedata.category(c) not in ("Mn", "Me", "Cf") and not "\u1160" <= c <= "\u11ff"
    )


def fit_text(text: str, width: int) -> str:
    if count_cells(text) > width:
        while count_cells(text) >= width:
            text = text[:-1]
        text += "…"
    return text + " " * (width - count_cells(text))


COLUMNS = "{:<10} {:>6} {:>6} {:>6} {:>5} {}"

# Key -> (what it sorts by; the order, before that of the names).
SORTS: dict[str, tuple[str, Callable[[Watched], Any]]] = {
    "c": ("CPU", lambda one: -one.stats.get("cpu", -1)),
    "n": ("name", lambda one: 0),
    "s": ("state", lambda one: (one.state is ServerState.UP, one.state.value)),
}


def list_cells(one: Watched) -> list[str]:
    figures, stats = ["-"] * 3, one.stats
    if stats:
        memory = 100 * stats["ram_used"] / (stats["ram_total"] or 1)
        figures = [f"{stats['cpu']:.1f}", f"{memory:.1f}", f"{stats['load_avg'][0]:.2f}"]
    last = one.alert if one.state is ServerState.UP else one.reason or one.alert
    return [one.state.value, *figures, str(len(one.tasks)), last]


def format_totals(everybody: Sequence[Watched], width: int) -> str:
    """Parts that do not fit whole are left out."""
    counts = Counter(one.state.value for one in everybody)
    states = ", ".join(f"{count} {state}" for state, count in counts.most_common())
    tasks = sum(len(one.tasks) for one in everybody)
    servers = f"{len(everybody)} server{'s' * (len(everybody) != 1)}: {states}"
    parts = [servers, f"{tasks} task{'s' * (tasks != 1)}"]
    up = [one for one in everybody if one.state is ServerState.UP and one.stats]
    if up:
        names = "cpu", "ram_used", "ram_total"
        cpu, used, total = (sum(one.stats[name] for one in up) for name in names)
        memory = f"memory {used / KIB:.1f} of {total / KIB:.1f} GiB"
        top = max(up, key=lambda one: one.stats["cpu"])
        most = f"most CPU: {top.server.name}, {top.stats['cpu']:.1f} %"
        parts += [f"CPU {cpu / len(up):.1f} %, {memory}", most]
    while len(parts) > 1 and count_cells(" · ".join(parts)) > width:
        parts.pop()
    return " · ".join(parts)


def format_table(
    everybody: Sequence[Watched], width: int, shown: slice = slice(None)
) -> list[tuple[str, str]]:
    """Return (state, line) of the titles, whose state is "", and of the servers shown."""
    name_width = min(24, max(6, *(count_cells(one.server.name) for one in everybody)))
    rows = [("", "SERVER", ["STATE", "CPU %", "MEM %", "LOAD", "TASKS", "LAST ALERT"])]
    rows += [(one.state.value, one.server.name, list_cells(one)) for one in everybody[shown]]
    return [
        (state, clean_text(f"{fit_text(name, name_width)} {COLUMNS.format(*cells)}", width))
        for state, name, cells in rows
    ]


@dataclass(eq=False, repr=False)
class Screen:
    """The monitor on a terminal: composed 5 times a second, drawn after a change."""

    # Key -> rows to scroll; also keys of `less` and `vi`.
    KEYS = {"\x1b[A": -1, "k": -1, "\x1b[B": 1, "j": 1, "\x1b[5~": -10, "\x1b[6~": 10, " ": 10}
    KEYS.update(dict.fromkeys(("g", "\x1b[H", "\x1b[1~"), -sys.maxsize))
    KEYS.update(dict.fromkeys(("G", "\x1b[F", "\x1b[4~"), sys.maxsize))
    KEY = re.compile(r"\x1b\[[0-9;]*[A-Za-z~]|.", re.DOTALL)

    everybody: Sequence[Watched]
    log: MonitorLog
    leave: Callable[[], object] = lambda: None
    _sort: str = "s"
    _top: int = 0  # the first row shown
    _shown: int = 0  # how many there are
    _drawn: tuple[int, int, str] = (0, 0, "")  # the terminal's size, and what it shows
    _before: list[Any] = field(default_factory=list)  # attributes; [] without a keyboard
    _output: Output = field(default_factory=lambda: Output(1))

    async def run(self) -> None:
        """Draw until this is cancelled."""
        asyncio.get_running_loop().add_signal_handler(signal.SIGTSTP, self._suspend)
        self._open()
        try:
            while True:
                cols, rows = read_terminal_size(1)
                text = self._compose(max(cols, 20), max(rows, 4))
                if self._drawn != (cols, rows, text):  # after a change of size it may be damaged
                    self._drawn = cols, rows, text
                    self._output.put(text.encode("utf-8", "replace"))
                    await self._output.drain()
                await asyncio.sleep(0.2)
        except OutputError:
            self.leave()
        finally:
            self._close()

    def _open(self) -> None:
        if os.isatty(0):
            self._before = termios.tcgetattr(0)
            tty.setcbreak(0)
            asyncio.get_running_loop().add_reader(0, self._read)
        self._output.put(b"\x1b[?1049h\x1b[?25l\x1b[?7l")  # other screen; no cursor or wrapping

    def _close(self) -> None:
        with suppress(termios.error):  # the terminal is gone
            if self._before:
                asyncio.get_running_loop().remove_reader(0)
                termios.tcsetattr(0, termios.TCSANOW, self._before)
            for action in (termios.TCOOFF, termios.TCOON):  # after Ctrl-S
                termios.tcflow(1, action)
        self._output.put(b"\x1b[?7h\x1b[?25h\x1b[?1049l")
        self._output.finish()

    def _suspend(self) -> None:
        self._close()
        os.kill(os.getpid(), signal.SIGSTOP)
        self._open()
        self._drawn = 0, 0, ""

    def _read(self) -> None:
        data = read_available(0, 64)
        if data == b"":
            asyncio.get_running_loop().remove_reader(0)
            self.leave()
        keys = (data or b"").decode("utf-8", "replace").replace("\x1bO", "\x1b[")
        for key in self.KEY.findall(keys):
            if key in ("q", "Q", "\x04"):
                self.leave()
            elif key in SORTS:
                self._sort, self._top = key, 0
            self._scroll(self.KEYS.get(key, 0))

    def _scroll(self, rows: int) -> None:
        self._top = max(0, min(self._top + rows, len(self.everybody) - self._shown))

    def _compose(self, cols: int, rows: int) -> str:
        title, order = SORTS[self._sort]
        self._shown = rows - 3
        self._scroll(0)
        everybody = sorted(self.everybody, key=lambda one: (order(one), one.server.name))
        last_row = min(self._top + self._shown, len(everybody))
        lines = [clean_text(format_totals(self.everybody, cols), cols)]
        for state, line in format_table(everybody, cols, slice(self._top, last_row)):
            paint = STATE_COLOURS.get(state, "") if wants_colours() or not state else ""
            lines.append(f"{paint}{line}{PLAIN if paint else ''}")
        lines += [""] * (rows - 1 - len(lines))
        keys = "q quit · c n s: by CPU, name, state · arrows scroll"
        place = f"{self._top + 1}-{last_row} of {len(everybody)} by {title}"
        last = f"{place} · {keys if self._before else 'Ctrl-C quits'}"
        lines.append(clean_text(self.log.problem or last, cols))
        return "\x1b[H" + "\r\n".join(f"{line}\x1b[K" for line in lines) + "\x1b[J"


def to_json(value: Any) -> str:
    return json.dumps(value, indent=2) + "\n"


def parse_discovery_reply(data: bytes, address: str) -> Fields | None:
    """Return a server, or None. Anybody can reply."""
    try:
        facts = parse_json_object(data)
    except CommandError:
        return None
    ports = {name: facts.get(name) for name in ("port", "ws_port")}
    are_ports = all(type(one) is int and 0 < one < 65536 for one in ports.values())
    if facts.get("type") != "SERVER_RESPONSE" or not are_ports:
        return None
    run_id = str(facts.get("id"))
    return {
        "hostname": clean_text(facts.get("hostname", ""), 64),
        "address": address,
        **ports,
        "url": f"{'https' if facts.get('tls') is True else 'http'}://{address}:{ports['port']}",
        "version": clean_text(facts.get("version", ""), 64),
        **{name: facts.get(name) is True for name in ("tls", "auth", "exec")},
        "id": run_id if re.fullmatch("[0-9a-f]{16}", run_id) else "",
    }


def send_probes(udp: socket.socket, addresses: Iterable[str], port: int) -> None:
    for address in addresses:
        with suppress(OSError):
            udp.sendto(DISCOVERY_PROBE, (address, port))


def merge_replies(replies: Iterable[Fields]) -> list[Fields]:
    """Return each server with all its addresses: replies have the same id."""
    servers: dict[Any, list[Fields]] = {}
    # Loopback last: it means nothing to other machines.
    for one in sorted(replies, key=lambda one: (is_loopback(one["address"]), one["address"])):
        servers.setdefault((one["id"] or one["address"], one["port"]), []).append(one)
    merged = [{**same[0], "urls": [one["url"] for one in same]} for same in servers.values()]
    return sorted(merged, key=lambda one: (one["hostname"], one["address"], one["port"]))


def probe_network(addresses: Sequence[str], port: int, seconds: float) -> list[Fields]:
    """Return what answers within `seconds`, each server once."""
    found: dict[tuple[str, int, str], Fields] = {}
    # By address: one that makes up thousands of servers displaces nobody.
    counts: Counter[str] = Counter()
    start = time.monotonic()
    # Three, since a datagram may be lost.
    rounds = [start + seconds / 2, start + seconds / 4, start]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        udp.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        udp.settimeout(0.02)
        while time.monotonic() < start + seconds and len(found) < MAX_FOUND_SERVERS:
            if rounds and time.monotonic() >= rounds[-1]:
                rounds.pop()
                send_probes(udp, addresses, port)
            try:
                data, source = udp.recvfrom(2 * KIB)
            except OSError:  # nothing, or an ICMP error
                continue
            one = parse_discovery_reply(data, source[0])
            counts[source[0]] += 1
            if one is not None and counts[source[0]] <= MAX_REPLIES_OF_ONE:
                # A later reply may be forged.
                found.setdefault((one["address"], one["port"], one["id"]), one)
    return merge_replies(found.values())


def name_hosts(found: Sequence[Fields], taken: Collection[str] = ()) -> dict[str, Fields]:
    """Return name -> server; no name is in `taken`."""
    named: dict[str, Fields] = {}
    for one in found:
        # Ansible would evaluate "{{ }}".
        name = re.sub(r"[^A-Za-z0-9.-]", "-", one["hostname"]).strip(".-")
        if not name or parse_ip(name) or name.lower().partition(".")[0] == "localhost":
            name = one["address"]  # else `exec localhost` would mean that server
        number, wanted = 0, name
        while name in named or name in taken:
            number += 1
            name = f"{wanted}-{one['address']}-{one['port']}" + f"-{number}" * (number > 1)
        named[name] = {**one, "hostname": name}
    return named


def format_prometheus(found: Sequence[Fields]) -> str:
    groups = []
    for name, one in name_hosts(found).items():
        labels = {"hostname": name, "__scheme__": "https" if one["tls"] else "http"}
        groups.append({"targets": [f"{one['address']}:{one['port']}"], "labels": labels})
    return to_json(groups)


def format_ansible(found: Sequence[Fields]) -> str:
    """Return an inventory with one host per address."""
    hosts: dict[str, tuple[str, Fields]] = {}
    for name, one in name_hosts(found).items():
        host = {"ansible_host": one["address"], "servercontrol_url": one["url"]}
        if is_loopback(one["address"]):
            host["ansible_connection"] = "local"
        hosts.setdefault(one["address"], (name, host))
    group = {"hosts": dict(hosts.values())}
    return to_json({"all": {"children": {"servercontrol": group}}})


def is_token_needed(one: Fields) -> bool:
    """By default the same account on loopback needs none."""
    return bool(one["auth"]) and not is_loopback(one["address"])


def format_found(found: Sequence[Fields]) -> str:
    """Return a table."""
    rows = [("SERVER", "URL", "VERSION", "TOKEN NEEDED", "RUNS COMMANDS", "ALSO AT")]
    for one in found:
        token = "yes" if is_token_needed(one) else "by other accounts"
        token = token if one["auth"] else "NO: OPEN TO ALL"
        runs, more = "yes" if one["exec"] else "no", " ".join(one["urls"][1:])
        rows.append((one["hostname"], one["url"], one["version"], token, runs, more))
    widths = [max(map(len, column)) for column in zip(*rows)]
    padded = ("  ".join(f"{cell:{width}}" for cell, width in zip(row, widths)) for row in rows)
    return "".join(line.rstrip() + "\n" for line in padded)


# 18. Dashboard ---
# One page: style, structure and script as three constants, put together once, on the first visit.
# Nothing is ever put into it per request or from the server's data, so its hash can vouch for it
# in the policy that it is sent with; what it shows it fetches like any other client. Nothing from
# the server becomes markup: the script makes elements and sets their text, and never parses HTML.
# All three are formatted by Prettier: `.ci/prettier --write`. Comments and indentation are for
# those who read them here; they are not sent.

CSS = r"""
:root {
  /* each colour once: for light, for dark; as the system says, or setTheme() */
  color-scheme: light dark;
  --mono: ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  --page: light-dark(#f4f6f8, #0d1117);
  --panel: light-dark(#fff, #151b23);
  --edge: light-dark(#d5dbe1, #2b323c);
  --soft: light-dark(#eceff3, #212830);
  --text: light-dark(#1f2328, #e6edf3);
  --dim: light-dark(#59636e, #9aa4af);
  --blue: light-dark(#0860ca, #5aa2fa);
  --green: light-dark(#187433, #46b855);
  --red: light-dark(#c91f2b, #fb6a61);
  --amber: light-dark(#835700, #d9a12b);
  --violet: light-dark(#7a48c7, #b490f5);
  --screen: light-dark(#fcfdfe, #0a0e14);
  --c0: light-dark(#24292f, #545d68);
  --c1: var(--red);
  --c2: var(--green);
  --c3: var(--amber);
  --c4: var(--blue);
  --c5: var(--violet);
  --c6: light-dark(#0f6f7d, #3cbfca);
  --c7: light-dark(#66707b, #c5ced8);
}
* {
  box-sizing: border-box;
  margin: 0;
}
[hidden] {
  display: none !important;
}
body {
  display: flex;
  flex-direction: column;
  height: 100dvh;
  min-height: 40rem;
  color: var(--text);
  background: var(--page);
  font:
    14px/1.45 system-ui,
    -apple-system,
    "Segoe UI",
    sans-serif;
}
h1,
h2 {
  font-size: inherit;
  font-weight: 600;
}
h1 {
  font-size: 1.1rem;
  overflow-wrap: anywhere;
}
.dim {
  color: var(--dim);
  font-weight: 400;
}
.grow {
  flex: 1;
}
.empty {
  padding: 1.25rem 1rem;
  color: var(--dim);
}
#alert-count {
  padding: 0;
  background: none;
}
.panel {
  background: var(--panel);
  border: 1px solid var(--edge);
  border-radius: 8px;
}
button,
input,
textarea {
  font: inherit;
  color: inherit;
  background: var(--panel);
  border: 1px solid var(--edge);
  border-radius: 6px;
  padding: 0.2rem 0.6rem;
}
button {
  background: var(--soft);
  cursor: pointer;
  white-space: nowrap;
}
button:enabled:hover {
  border-color: var(--dim);
}
button:disabled {
  opacity: 0.5;
  cursor: default;
}
button.primary {
  background: #0860ca;
  border-color: #0860ca;
  color: #fff;
  padding: 0.2rem 1.1rem;
}
button.danger:not(:disabled),
.bad {
  color: var(--red);
}
.warn {
  color: var(--amber);
}
.good {
  color: var(--green);
}
.busy {
  color: var(--blue);
}
input[type="checkbox"] {
  accent-color: var(--blue);
  vertical-align: -2px;
}
:focus-visible {
  outline: 2px solid var(--blue);
  outline-offset: 1px;
}
.badge {
  padding: 0 0.5rem;
  border-radius: 1rem;
  font-size: 0.8rem;
  line-height: 1.4rem;
  white-space: nowrap;
  background: var(--soft);
}
.badge:not(.plain)::before {
  content: "●";
  margin-right: 0.35rem;
  font-size: 0.7rem;
}
/* The frame of the page, and the system at a glance */
header {
  display: flex;
  align-items: center;
  gap: 0.6rem;
  padding: 0.5rem 0.8rem;
  flex-wrap: wrap;
  background: var(--panel);
  border-bottom: 1px solid var(--edge);
}
.banner {
  padding: 0.45rem 0.8rem;
  background: light-dark(#fff6dd, #2e2611);
  color: var(--text);
}
.banner.bad {
  background: light-dark(#ffe0de, #4a1a1c);
  font-weight: 600;
}
.banner button {
  margin-left: 0.8rem;
  padding: 0 0.6rem;
}
main {
  flex: 1;
  min-height: 0;
  display: grid;
  gap: 0.6rem;
  padding: 0.6rem 0.8rem;
  grid-template: auto auto minmax(0, 1fr) / minmax(15rem, 21rem) minmax(0, 1fr);
}
#glance,
#run,
#readonly {
  grid-column: 1 / -1;
}
#glance {
  display: grid;
  gap: 0.6rem;
  grid-template-columns: repeat(4, minmax(0, 1fr));
}
article {
  display: grid;
  grid-template-columns: auto 1fr;
  align-items: baseline;
  column-gap: 0.6rem;
  padding: 0.45rem 0.7rem 0.55rem;
  font-variant-numeric: tabular-nums;
}
article h2 {
  grid-column: 1 / -1;
  font-size: 0.8rem;
  color: var(--dim);
  font-weight: 500;
}
article b {
  font-size: 1.25rem;
}
article .dim {
  font-size: 0.8rem;
  text-align: right;
}
svg {
  grid-column: 1 / -1;
  width: 100%;
  height: 3rem;
  margin-top: 0.3rem;
  color: var(--blue);
  background: linear-gradient(var(--edge) 1px, transparent 1px) 0 0 / 100% 50%;
  border-bottom: 1px solid var(--edge);
}
article:nth-child(2) svg {
  color: var(--violet);
}
article:nth-child(3) svg {
  color: var(--green);
}
path {
  fill: none;
  stroke: currentColor;
  stroke-width: 1.5;
  vector-effect: non-scaling-stroke;
}
path:first-child {
  fill: currentColor;
  stroke: none;
  opacity: 0.14;
}
path:nth-child(3) {
  stroke: var(--amber);
}
.gauges output {
  color: var(--dim);
}
.gauges {
  grid-template-columns: 1fr;
  align-content: start;
  row-gap: 0.3rem;
}
.gauges label {
  display: flex;
  flex-wrap: wrap;
  justify-content: space-between;
  font-size: 0.8rem;
}
meter,
::-webkit-meter-bar {
  width: 100%;
  height: 6px;
  border: 0;
  background: var(--soft);
}
::-webkit-meter-optimum-value {
  background: var(--blue);
}
::-moz-meter-bar {
  background: #4a90e2;
}
::-webkit-meter-suboptimum-value {
  background: var(--amber);
}
#alerts {
  position: absolute;
  z-index: 3;
  right: 0.8rem;
  top: 3rem;
  padding: 0.7rem;
  width: 24rem;
  max-width: calc(100vw - 1.6rem);
  box-shadow: 0 8px 24px #0004;
}
#alert-list {
  list-style: none;
  padding: 0 0 0.6rem;
  max-height: 40vh;
  overflow: auto;
}
#run {
  display: flex;
  flex-wrap: wrap;
  align-items: center;
  gap: 0.4rem 0.6rem;
  padding: 0.5rem;
}
#command {
  flex: 1;
  min-width: 8rem;
  resize: none;
}
#command,
.prompt {
  font-family: var(--mono);
}
.prompt {
  color: var(--green);
  font-weight: 600;
}
#run > p {
  flex-basis: 100%;
}
.options {
  flex-basis: 100%;
  display: flex;
  flex-wrap: wrap;
  gap: 0.2rem 1.2rem;
  font-size: 0.85rem;
  align-items: center;
  padding-left: 1.1rem;
}
.options input {
  padding: 0.05rem 0.4rem;
}
#cwd {
  width: 12rem;
}
#timeout {
  width: 5rem;
}
#readonly {
  padding: 0.5rem 0.8rem;
}
nav {
  display: flex;
  flex-direction: column;
  min-height: 0;
}
nav h2 {
  padding: 0.5rem 0.8rem;
  border-bottom: 1px solid var(--edge);
}
#filters {
  display: flex;
  gap: 0.3rem;
  padding: 0.35rem 0.5rem;
  font-size: 0.85rem;
  border-bottom: 1px solid var(--edge);
}
#filters > * {
  padding: 0.1rem 0.45rem;
}
#filter {
  flex: 1;
  min-width: 3rem;
}
[aria-pressed="true"] {
  background: var(--blue);
  color: light-dark(#fff, #0d1117);
}
#tasks {
  list-style: none;
  padding: 0;
  overflow: auto;
}
#tasks button {
  display: grid;
  grid-template-columns: 1fr auto;
  gap: 0.1rem 0.6rem;
  width: 100%;
  padding: 0.4rem 0.8rem;
  border: solid var(--soft);
  border-width: 0 0 1px;
  border-radius: 0;
  background: none;
  text-align: left;
  outline-offset: -2px;
}
#tasks button:hover {
  background: var(--soft);
}
#tasks .badge {
  justify-self: end;
}
#tasks [aria-current] {
  background: var(--soft);
  box-shadow: inset 3px 0 var(--blue);
}
#tasks :is(code, small),
#title,
#caption {
  overflow: hidden;
  text-overflow: ellipsis;
  white-space: nowrap;
}
#tasks small {
  color: var(--dim);
}
#tasks small:last-child {
  text-align: right;
}
/* The output of one task */
#detail {
  display: flex;
  flex-direction: column;
  min-height: 0;
  min-width: 0;
  overflow: hidden;
}
.head,
.tools {
  display: flex;
  align-items: center;
  gap: 0.4rem 0.6rem;
  padding: 0.4rem 0.7rem;
  border-bottom: 1px solid var(--edge);
}
.tools {
  flex-wrap: wrap;
  font-size: 0.85rem;
  padding: 0.25rem 0.7rem;
  gap: 0.3rem 1rem;
}
.tools input,
.tools button {
  padding: 0.05rem 0.45rem;
}
#title {
  font-weight: 600;
}
@media (min-width: 52rem) {
  #facts {
    flex: 1 1 0;
    min-width: 0;
    overflow: hidden;
    text-overflow: ellipsis;
    white-space: nowrap;
  }
}
#caption:not(:empty) {
  min-width: 6rem;
  unicode-bidi: isolate;
}
code {
  font: 13px var(--mono);
}
#back,
#unfold {
  display: none;
}
.pair {
  display: flex;
}
#stop {
  border-radius: 6px 0 0 6px;
}
#signals {
  border-left: 0;
  border-radius: 0 6px 6px 0;
  padding: 0.2rem 0.4rem;
}
#signal-menu {
  position: fixed;
  inset: auto;
  margin: 0;
  padding: 0.3rem;
  color: inherit;
  box-shadow: 0 8px 24px #0004;
}
#signal-menu button {
  display: block;
  width: 100%;
  margin: 0.15rem 0;
  text-align: left;
}
/* The output has the whole window */
.whole.reading :is(header, #glance, #run, nav, #readonly, #facts) {
  display: none;
}
.whole.reading main {
  display: flex;
  padding: 0;
}
.whole.reading #detail {
  flex: 1;
  display: grid;
  grid-template: auto minmax(0, 1fr) auto / minmax(0, 1fr) auto;
  border: 0;
  border-radius: 0;
}
.whole.reading .tools {
  flex-wrap: nowrap;
  border-left: 1px solid var(--edge);
}
.whole.reading :is(#frame, #keybar) {
  grid-column: 1 / -1;
}
.whole.reading #back {
  display: block;
}
@media (max-width: 70rem) {
  .whole.reading .tools {
    display: none;
  }
}
#frame {
  position: relative;
  flex: 1;
  min-height: 0;
  background: var(--screen);
}
#output {
  position: absolute;
  inset: 0;
  overflow: auto;
  padding: 0.4rem 0.7rem;
  tab-size: 8;
  font: 13px / var(--row) var(--mono);
  font-variant-ligatures: none;
}
#sizer {
  position: relative;
  min-width: 100%;
  width: max-content;
}
.wrapped #sizer {
  width: 100%;
}
#lines {
  position: absolute;
  min-width: 100%;
}
.wrapped #lines {
  width: 100%;
}
/* one line, of as many rows as it takes; nothing drawn in a row changes its height */
#lines > div > div {
  height: var(--row);
  overflow-y: clip;
  white-space: pre;
}
.timed #lines > div {
  position: relative;
  padding-left: 14ch;
}
.timed #lines > div::before {
  content: attr(data-time);
  position: absolute;
  left: 0;
  color: var(--dim);
  user-select: none;
}
/* a background fills its row */
#lines span,
#lines a {
  padding-block: var(--above) var(--below);
}
#lines .box {
  display: inline-block;
  height: var(--row);
  padding: 0;
  line-height: var(--row);
  overflow: hidden;
  vertical-align: top;
  transform-origin: left;
  unicode-bidi: isolate;
}
/* lines drawn by characters reach the next row */
#lines .tall {
  transform: scaleY(var(--stretch));
  overflow: visible;
}
#lines.reversed {
  filter: invert(1);
}
#lines .hit {
  box-shadow: inset 3px 0 var(--amber);
  outline: 1px solid var(--amber);
  outline-offset: -1px;
}
#lines a {
  color: inherit;
}
#lines .note {
  color: var(--amber);
  font-style: italic;
}
/* The shapes of DECSCUSR: block, underline, bar; hollow without the focus */
#lines .cursor {
  outline: 1px solid var(--ink);
  outline-offset: -1px;
}
.typing #lines .cursor {
  outline: 0;
  color: var(--paper) !important;
  background: var(--ink) !important;
}
.typing #lines:is([data-shape="2"], [data-shape="3"]) .cursor {
  color: var(--ink) !important;
  background: var(--paper) !important;
  box-shadow: inset 0 -2px var(--ink);
}
.typing #lines[data-shape="3"] .cursor {
  box-shadow: inset 2px 0 var(--ink);
}
#keys {
  position: absolute;
  width: 1px;
  height: var(--row);
  opacity: 0;
  padding: 0;
  border: 0;
  border-radius: 0;
  font: inherit;
  resize: none;
  overflow: hidden;
  white-space: pre;
}
/* what an input method is making is seen where it will stand */
#keys.composing {
  opacity: 1;
  text-decoration: underline;
  background: var(--screen);
}
#frame.typing {
  box-shadow: inset 0 0 0 2px var(--blue);
}
#frame .empty {
  position: absolute;
  inset: 0;
}
#keybar {
  display: flex;
  gap: 0.3rem;
  padding: 0.3rem;
  overflow-x: auto;
}
#tail,
#fit {
  position: absolute;
  right: 1.2rem;
  bottom: 0.8rem;
  box-shadow: 0 2px 8px #0005;
}
#fit {
  right: auto;
  left: 0.8rem;
}
#spoken {
  position: absolute;
  width: 1px;
  height: 1px;
  overflow: hidden;
  clip-path: inset(50%);
}
dialog {
  margin: auto;
  width: 26rem;
  max-width: calc(100vw - 2rem);
  padding: 1.3rem;
  color: inherit;
}
dialog form {
  display: grid;
  gap: 0.8rem;
}
dialog [type="password"] {
  width: 100%;
}
@media (max-width: 52rem) {
  body {
    height: auto;
    min-height: 100dvh;
  }
  #detail,
  .options small,
  #role,
  #uptime {
    display: none;
  }
  main {
    grid-template: auto / minmax(0, 1fr);
    padding: 0.5rem;
    gap: 0.5rem;
    align-content: start;
  }
  #glance {
    grid-template-columns: 1fr 1fr;
    gap: 0.5rem;
  }
  svg {
    height: 2rem;
  }
  article {
    grid-template-columns: 1fr;
    padding: 0.4rem 0.6rem;
  }
  article .dim {
    text-align: left;
  }
  input,
  textarea {
    font-size: 16px;
  } /* smaller ones make phones zoom in */
  .reading :is(header, #glance, #run, nav, #readonly) {
    display: none;
  }
  .head {
    flex-wrap: wrap;
  }
  .reading {
    height: var(--tall, 100dvh);
    min-height: 0;
  }
  .reading main {
    display: flex;
    padding: 0;
  }
  .reading #detail,
  .whole.reading #detail {
    display: flex;
    flex: 1;
    border: 0;
    border-radius: 0;
  }
  #whole {
    display: none;
  }
  /* the bars fold away while somebody types */
  .reading:has(#keys:focus) :is(.head, .tools) {
    display: none;
  }
  .reading:has(#keys:focus) #unfold {
    display: block;
    position: absolute;
    top: 0.3rem;
    right: 0.3rem;
    opacity: 0.85;
  }
  #back {
    display: block;
  }
  .head .grow,
  #facts {
    flex-basis: 100%;
  }
  #title {
    flex: 1;
  }
  #find {
    width: 7rem;
  }
}
@media (prefers-reduced-motion: no-preference) {
  .busy.badge::before {
    animation: pulse 1.6s infinite;
  }
  @keyframes pulse {
    50% {
      opacity: 0.25;
    }
  }
}
"""

HTML = r"""
<!doctype html>
<html lang="en">
  <meta
    name="viewport"
    content="width=device-width, initial-scale=1, interactive-widget=resizes-content"
  />
  <title>ServerControl</title
  ><link rel="icon" id="icon" href="data:," />
  <style></style>
  <header>
    <h1 id="host">ServerControl</h1>
    <span id="link" class="badge" role="status">connecting</span>
    <span id="role" class="badge plain" hidden></span>
    <span id="uptime" class="dim grow"></span>
    <a href="?text" target="_blank" title="What can be done without this page">curl, API</a>
    <button id="bell" aria-expanded="false" aria-controls="alerts">
      Alerts <span id="alert-count" class="badge plain">0</span>
    </button>
    <button id="theme"></button> <button id="logout" hidden>Log out</button>
  </header>
  <p id="banner" class="banner bad" role="alert" hidden></p>
  <p id="trouble" class="banner bad" role="alert" hidden>
    <span id="trouble-words"></span> <button id="trouble-again">Try now</button>
  </p>
  <p id="notice" class="banner" role="status" hidden>
    <span id="words"></span> <button id="dismiss">OK</button>
  </p>
  <section id="alerts" class="panel" aria-label="Alerts" hidden>
    <ol id="alert-list"></ol>
    <button id="notify">Notify me on the desktop</button>
  </section>
  <main>
    <section id="glance" aria-label="System">
      <article class="panel">
        <h2>CPU</h2>
        <b id="cpu">–</b><span id="cpu-more" class="dim"></span>
        <svg
          id="cpu-chart"
          viewBox="0 0 600 100"
          preserveAspectRatio="none"
          role="img"
          aria-label="CPU, last 10 minutes"
        >
          <path></path>
          <path></path>
          <path></path>
        </svg>
      </article>
      <article class="panel">
        <h2>Memory</h2>
        <b id="ram">–</b><span id="ram-more" class="dim"></span>
        <svg
          id="ram-chart"
          viewBox="0 0 600 100"
          preserveAspectRatio="none"
          role="img"
          aria-label="Memory, last 10 minutes"
        >
          <path></path>
          <path></path>
          <path></path>
        </svg>
      </article>
      <article class="panel">
        <h2>Network</h2>
        <b id="recv">–</b><span id="net-more" class="dim"></span>
        <svg
          id="net-chart"
          viewBox="0 0 600 100"
          preserveAspectRatio="none"
          role="img"
          aria-label="Network, last 10 minutes"
        >
          <path></path>
          <path></path>
          <path></path>
        </svg>
      </article>
      <article class="panel gauges">
        <h2>Capacity</h2>
        <label>Disk <output id="disk">–</output><meter id="disk-bar" high="0.85"></meter></label>
        <label>Swap <output id="swap">–</output><meter id="swap-bar" high="0.7"></meter></label>
        <label>Load <output id="load">–</output><meter id="load-bar" high="0.9"></meter></label>
      </article>
    </section>
    <form id="run" class="panel" aria-label="Run a command">
      <span class="prompt" aria-hidden="true">$</span>
      <textarea
        id="command"
        rows="1"
        aria-label="Command"
        spellcheck="false"
        placeholder="Type a command"
        aria-describedby="run-hint"
        autocapitalize="off"
        autofocus
      ></textarea>
      <button class="primary">Run</button>
      <div class="options">
        <label title="For top, vim or a shell"><input type="checkbox" id="tty" /> Terminal</label>
        <label
          >Folder <input id="cwd" placeholder="where the server runs" spellcheck="false"
        /></label>
        <label>Stop after <input id="timeout" type="number" min="0" placeholder="never" /> s</label>
        <small id="run-hint" class="dim"
          >Enter runs · ↑ ↓ history · Shift-Enter adds a line, Ctrl-Enter runs several</small
        >
      </div>
      <p id="run-error" class="bad" role="alert" hidden></p>
    </form>
    <p id="readonly" class="panel dim" hidden></p>
    <nav class="panel" aria-label="Tasks">
      <h2>Tasks <span id="task-count" class="dim"></span></h2>
      <div id="filters" role="group" aria-label="Which tasks are shown">
        <input id="filter" type="search" aria-label="Filter tasks" placeholder="Filter" />
        <button id="all">All</button><button id="running">Running</button
        ><button id="failed">Failed</button>
      </div>
      <ul id="tasks"></ul>
      <p id="no-tasks" class="empty"></p>
    </nav>
    <section id="detail" class="panel" aria-label="Output">
      <div class="head">
        <button id="back">‹ Tasks</button><code id="title" role="heading" aria-level="1"></code
        ><small id="caption" class="dim"></small>
        <span id="state" class="badge" role="status" hidden></span><span class="grow"></span>
        <span class="pair"
          ><button id="stop" class="danger">Stop</button
          ><button
            id="signals"
            class="danger"
            popovertarget="signal-menu"
            aria-label="Stop by another signal"
          >
            ▾
          </button></span
        >
        <div id="signal-menu" class="panel" popover aria-label="Signals">
          <button data-signal="INT">INT, like Ctrl-C</button>
          <button data-signal="TERM">TERM, asks it to end</button>
          <button data-signal="HUP">HUP, hangs up</button>
          <button data-signal="KILL">KILL, at once</button>
        </div>
        <button id="rerun">Run again</button> <button id="copy">Copy</button>
        <button id="download">Download</button>
        <button
          id="whole"
          aria-keyshortcuts="Control+Shift+Enter"
          title="The whole window, and back (Ctrl-Shift-Enter)"
        >
          Whole
        </button>
      </div>
      <div class="tools">
        <span id="facts" class="dim grow"></span>
        <label><input type="checkbox" id="times" /> Times</label>
        <label><input type="checkbox" id="wrap" checked /> Wrap</label>
        <span role="search"
          ><input id="find" type="search" aria-label="Search" placeholder="Search" />
          <span id="hits" class="dim" role="status"></span>
          <button id="previous" aria-label="Previous match">↑</button>
          <button id="next" aria-label="Next match">↓</button></span
        >
      </div>
      <div id="frame">
        <div id="output" tabindex="0" role="region" aria-label="Output of the task">
          <div id="sizer">
            <div id="lines"></div>
            <textarea
              id="keys"
              aria-label="Type into the terminal; Shift-Escape leaves it"
              hidden
              autocapitalize="off"
              autocomplete="off"
              spellcheck="false"
            ></textarea>
          </div>
        </div>
        <p id="no-output" class="empty">Pick a task to see its output, or run a command.</p>
        <button id="tail" hidden>↓ Follow</button>
        <button id="fit" title="Make the terminal as large as this window" hidden>
          Fit to my window
        </button>
        <button id="unfold" aria-label="Show the bars again">☰</button>
      </div>
      <div id="keybar" role="toolbar" aria-label="Special keys" hidden>
        <button aria-label="Escape">Esc</button><button>Tab</button><button>Ctrl</button>
        <button>Alt</button><button aria-label="ArrowUp">↑</button>
        <button aria-label="ArrowDown">↓</button><button aria-label="ArrowLeft">←</button>
        <button aria-label="ArrowRight">→</button><button>Home</button><button>End</button>
        <button>PageUp</button><button>PageDown</button> <button>|</button><button>/</button
        ><button>~</button>
      </div>
    </section>
  </main>
  <div id="spoken" role="status"></div>
  <dialog id="login" class="panel" aria-labelledby="login-title">
    <form id="login-form">
      <h2 id="login-title">Token needed</h2>
      <p class="dim">
        This server asks who you are. The token is in its file <code>token</code>, and in the link
        that it prints on a terminal.
      </p>
      <label>Token <input id="token" type="password" autocomplete="off" required /></label>
      <label
        ><input type="checkbox" id="keep" /> Keep it in this browser, not just for this tab</label
      >
      <p id="login-error" class="bad" role="alert" hidden></p>
      <button class="primary">Log in</button>
    </form>
  </dialog>
  <noscript><p class="banner bad">This page needs JavaScript; without it, use curl.</p></noscript>
  <script></script>
</html>
"""

JS = r"""
"use strict";
// ── Cells: how wide a character is ──
// Both tables are made by `.ci/widths` from the wcwidth package, Unicode 18.0.0: how many code
// points to pass over and, after a comma, how many follow that are so (1 if it is left out), in
// base 36. What is in neither is one cell wide.
const ZERO_WIDTH = `
lc,34 7n,7 7b,19 1 1,2 1,2 1,3 1y,b 1 1a,l g 2t,7 2,6 2,2 1,4 z u,r 2j,b 1m,9 9 o,4 1,9 1,3 1,5
17,3 1n,9 16,o 1,x 1i,3 1,i 1,7 a,2 t,3 1k 1,7 2,2 2,3 9 a,2 q 2,3 1k 1,5 4,2 2,3 3 u,2 3 b,3 1k
1,8 1,3 1,3 k,2 m,6 1,3 1k 1,7 2,2 2,3 5,5 a,2 u 1n,5 3,3 1,4 9 14,5 1j 1,7 1,3 1,4 7,2 b,2 t,3 1k
1,7 1,3 1,4 7,2 b,2 f c,4 1j,2 1,7 1,3 1,4 9 a,2 t,3 1y 4,6 1 1,8 i,2 1p 2,7 c,8 2q 2,9 b,7 21,2 r
1 1 4,2 1d,k 1,2 5,b 1,10 9 2s,k n,4 4,3 1,3 2,7 3,4 d,c 1 a,4 5e,4g 9p,3 qa,4 s,3 t,2 u,2 1s,w 9
19,5 39,2 y 3a,c 4,c 63,5 1l,a 1,t 2 1c,1t f,5 1b,h 12,9 c,3 u,d 1k,e 1c,k 48,3 1,l 4 6 2,3 5i,1s
ej,5 o,7 1d,g 2o,x 2da,3 3x 2o,w fe,6 2x,2 5l n4a,4 1,a w,2 28,2 7k 3 4 n,5 4 2b,2 1e,i q,i d 12,8
p,d 18,4 1b,e 10 1v,e c 8,2 19,3 1e 1,3 2,2 5,2 1 15,5 5,2 6k,8 1,2 8n6,28 6xq kh,g g,g 5r 4g 27,c
e9 6a 45,5 1ae,3 1,2 5,4 14,3 4 4l,2 fx,4 1t,5 8t,2 u,5 w,g 1y,b 1d,4 3e,3 1h,f 15 2,2 a,4 19,b 7
1p,3 10,e g,2 18 c,3 1c,e 8,4 1,2 2k,c 6 2 4d,c l,4 1j,2 1,7 2,2 2,3 9 a,2 2,7 3,5 1v,9 1 2 1,4
1,5 1 e,2 2a,i n 29,k 6j,7 2,9 r,2 2a,h 2y,d 2t,f 74,f 6t,6 1,2 2,4 1 1,2 3x,7 2,7 3 s,a 14,7 1,4
8 9,b 1a,g 5i,8 5j,8 1,8 2a,m 1,e 3e,6 3 1,2 1,7 1 1u,5 1,2 1,5 2g 76,4 9,2 1 1c,7 3,5 n 445,h 6,f
8ug,i 1xc,5 1n,7 t4 1,1j 7,4 29 b,2 f57,2 1,4 3mk,1a 2,n dc,2 1o,5 3,m 2,7 u,4 44,3 b,3 8,2 2 w,2
1ha,1j 4,1e 8 e m,5 1,f 11s,7 1,h 2,7 1,2 1,5 2s 4g,7 af 1p,4 e4,4 72,2 6r 2 7,2 5 d6,7 31,7
gzat,35s
`;
const DOUBLE_WIDTH = `
3cw,2o 3i2,2 d,2 5a,4 3 2 eh,2 l,2 q,8 g,c 17 a,6 3 d 8,2 h,2 5,2 8 5 l 7,2 1 4 2 7 4,2 s z 1 4,3
1 1p,3 o e nv,2 1f 4 mi,q 1,2h c,5y q,1m 6,f 2,2e 4,2t 5,17 1,1f 1,16 1,2e 9,1c 1,14 8,mkd 3,1j
wp,t hv,8mc 6l8,e8 ls,a m,z 1,j 1,4 45,2o 3j,7 m49,4 e,5 9,5p7 10,y 2n,37 d,pe e,1f 5y5,4 1,7 1,2
1,89 9 t,3 2 e,5 7,b0 6bo,2f 9,n 5n1 5m 5a 2,a j 1j,t d,18 4,9 7,2 e,6 4a,x c,9 1,1y 1,m c,17 4,5
c,h 3 3,1z 1 1,57 2,1r d,4 1,o i q,2 d 2e,2d 1c,1y 6 3,3 2,5 2,4 b,2 7,9 65 5,c 4 7v,1b 1,a 1,55
34,d 3,1z 1 3,i 1,d 3,c zp,1eke 2,1eke
`;
const WIDTHS = new Uint8Array(0x110000).fill(1);
for (const [width, table] of [ZERO_WIDTH, DOUBLE_WIDTH].entries()) {
  let code = 0;
  for (const entry of table.trim().split(/\s+/)) {
    const [gap, count] = entry.split(",").map((number) => parseInt(number, 36));
    const start = code + gap;
    code = start + (count || 1);
    WIDTHS.fill(2 * width, start, code);
  }
}
const widthOf = (char) => WIDTHS[char.codePointAt(0)];
const clamp = (value, low, high) => Math.max(low, Math.min(value, high));

// ── The terminal's lines ──
// A cell is [character, style, isErased]: a base character with its combining marks; "" is the
// right half of a wide one. Cells are never changed, only replaced. An erased cell was not written:
// at the end of a line it does not count as text. A style is "foreground,background,flags,link",
// or "" where there is nothing special; colours are 0 to 255, RGB + a true colour, or -1.
const RGB = 1 << 24;
const BOLD = 1;
const DIM = 2;
const ITALIC = 4;
const UNDERLINE = 8;
const INVERSE = 16;
const HIDDEN = 32;
const STRIKE = 64;
const erasedCells = (count, style) => Array(count).fill([" ", style, true]);
const isAscii = (text) => /^[ -~]*$/.test(text);
const cellsOf = (char, style) =>
  widthOf(char) === 2
    ? [
        [char, style],
        ["", style],
      ]
    : [[char, style]];

// A line that text is only added to is packed, as runs [text, style], which is small and fast; a
// line that is changed within is open, as cells.
class Line {
  constructor(time) {
    this.time = time;
    this.head = ""; // the first run, which for most lines is the only one
    this.style = "";
    this.size = 0; // of the text, in UTF-16 units
    this.version = 0; // rises with each change, so that the view knows what to draw again
  }
  append(text, style) {
    this.pack();
    const last = this.others?.at(-1);
    if (!this.size && !this.hidden) [this.head, this.style] = [text, style];
    else if (!last && this.style === style) this.head += text;
    else if (last?.[1] === style) last[0] += text;
    else (this.others ??= []).push([text, style]);
    this.size += text.length + this.hidden;
    if (this.hidden) this.hidden = 0;
    if (this.isPlain && !isAscii(text)) this.isPlain = false;
    this.version++;
  }
  get runs() {
    return this.others ? [[this.head, this.style], ...this.others] : [[this.head, this.style]];
  }
  open() {
    this.version++;
    if (!this.cells) {
      const cells = [];
      this.forEachCell((char, style, width) => {
        if (char === "\t") cells.push(...Array(8 - (cells.length % 8)).fill([" ", style]));
        else if (width) cells.push(...cellsOf(char, style));
      });
      this.cells = cells;
      this.others = null;
    }
    return this.cells;
  }
  pack() {
    if (!this.cells) return;
    const { text } = this;
    const runs = [];
    this.forEachCell((char, style) => {
      if (runs.length && runs.at(-1)[1] === style) runs.at(-1)[0].push(char);
      else runs.push([[char], style]);
    });
    const [first, ...others] = runs.map(([chars, style]) => [chars.join(""), style]);
    [this.head, this.style] = first ?? ["", ""];
    this.others = others.length ? others : null;
    this.size = text.length;
    this.hidden = runs.reduce((sum, [chars]) => sum + chars.join("").length, -this.size);
    this.isPlain = isAscii(text) && !this.hidden;
    this.cells = null;
  }
  // Calls visit(character with its marks, style, width); the width of a tab is 0, it depends on
  // where it stands.
  forEachCell(visit) {
    const { cells } = this;
    if (cells) {
      for (let x = 0; x < cells.length; x++) {
        if (cells[x][0]) visit(cells[x][0], cells[x][1], cells[x + 1]?.[0] === "" ? 2 : 1);
      }
      return;
    }
    const widthAt = (char) => (char === "\t" ? 0 : widthOf(char));
    for (const [text, style] of this.runs) {
      let base = "";
      for (const char of text) {
        const isMark = base && base !== "\t" && !widthOf(char);
        if (base && !isMark) visit(base, style, widthAt(base));
        base = isMark ? base + char : char;
      }
      if (base) visit(base, style, widthAt(base));
    }
  }
  // As splice(). Of a wide character that is cut in two the other half becomes blank.
  edit(from, gone, cells, cols = Infinity) {
    const row = this.open();
    if (row.length < from) row.push(...erasedCells(from - row.length, ""));
    for (const x of [from, from + gone]) {
      if (row[x]?.[0] === "") row[x] = row[x - 1] = [" ", row[x][1]];
    }
    row.splice(from, gone, ...cells);
    if (row.length > cols) {
      row.length = cols;
      if (widthOf(row[cols - 1][0] || " ") === 2) row[cols - 1] = [" ", row[cols - 1][1]];
    }
  }
  // What is not there at the end need not be made, if it has no colour.
  erase(from, to, style) {
    const isEnd = !style && to >= this.open().length;
    if (!isEnd || from < this.cells.length) {
      this.edit(from, to - from, isEnd ? [] : erasedCells(to - from, style));
    }
  }
  // What was written, blanks at its end included.
  get text() {
    const { cells } = this;
    if (!cells) {
      const text = this.others ? this.runs.map((run) => run[0]).join("") : this.head;
      return this.hidden ? text.slice(0, -this.hidden) : text;
    }
    const end = cells.findLastIndex((cell) => !cell[2]) + 1;
    return cells
      .slice(0, end)
      .map((cell) => cell[0])
      .join("");
  }
  get isEmpty() {
    return this.cells ? !this.cells.length : !this.size;
  }
}
// What most of the 100,000 lines do not have, so that it takes no room in them.
Object.assign(Line.prototype, {
  others: null, // further runs
  cells: null,
  hidden: 0, // how much of the end of a packed line was not written, but erased
  isPlain: true, // of a packed line: one unit is one cell
  next: null, // the line that goes on with this one's text, since it was too long
  isNote: false, // a word from the page, not from the program
});
// The text of lines, with a line end only where the program wrote one.
function joinLines(lines) {
  const ends = lines.map((line, i) => (line.next && line.next === lines[i + 1] ? "" : "\n"));
  return lines.map((line, i) => line.text + ends[i]).join("");
}

// ── The terminal: what a program's output makes of a screen ──
// A terminal task has cols x rows cells; lines that leave the top are kept above. Any other has a
// "log", a screen of endless columns: so carriage returns, erasing and going up work there as well.
// This is the table of what is known, by the names of ECMA-48 and of xterm's ctlseqs. Whatever is
// not in it is read to its end and ignored. The 8-bit forms of C1 controls (U+009B for ESC [) are
// known on a screen; in a log, where they are mostly a trace of text that was decoded wrongly, only
// U+009C (ST) is, at the end of a string.
//   C0      BS HT LF VT FF CR SO (LS1) SI (LS0); CAN and SUB end a sequence, ESC begins another
//   ESC     7 DECSC, 8 DECRC, D IND, E NEL, H HTS, M RI, c RIS, # 8 DECALN, ( and ) SCS: B, 0
//   CSI     @ ICH, A CUU, B CUD, C CUF, D CUB, E CNL, F CPL, G CHA, H CUP, I CHT, J ED, K EL, L IL,
//           M DL, P DCH, S SU, T SD, X ECH, Z CBT, ` HPA, a HPR, b REP, c DA, d VPA, e VPR, f HVP,
//           g TBC, h SM and l RM (4 IRM, 20 LNM), m SGR, n DSR (5, 6), r DECSTBM, s SCOSC, u SCORC,
//           ! p DECSTR, SP q DECSCUSR
//   CSI ?   h DECSET and l DECRST: 1 DECCKM, 5 DECSCNM, 6 DECOM, 7 DECAWM, 25 DECTCEM, 47 1047 1049
//           alternate screen, 1048 cursor, 1000 1002 1003 mouse, 1004 focus, 1006 SGR coordinates,
//           1007 alternate scroll, 2004 bracketed paste; J DECSED, K DECSEL
//   CSI >   c secondary DA
//   SGR     0 to 4, 4:0 to 4:5, 7 to 9, 21 to 24, 27 to 29, 30 to 49 and 90 to 107, with 38 and 48
//           followed by 5;n, 2;r;g;b, 5:n, 2:r:g:b or 2::r:g:b; 58 is read and not shown
//   OSC     0 and 2 title, 8 link; ended by BEL or ST
const MAX_LINES = 100000;
const MAX_LINE = 4000; // of a log, in UTF-16 units; what is longer goes on in a next one
const MAX_STRING = 65536; // a string (OSC, DCS …) without an end is given up after so many
const LOG_ROWS = 200;
const CONTROL = /[\x00-\x1f\x7f-\x9f]/g;
const FLAG_ON = [0, BOLD, DIM, ITALIC, UNDERLINE, 0, 0, INVERSE, HIDDEN, STRIKE]; // by SGR number
const FLAG_OFF = { 22: BOLD | DIM, 23: ITALIC, 24: UNDERLINE, 27: INVERSE, 28: HIDDEN, 29: STRIKE };
// DEC Special Graphics: line drawing
const GRAPHICS = Object.fromEntries(
  "`◆a▒b␉c␌d␍e␊f°g±h␤i␋j┘k┐l┌m└n┼o⎺p⎻q─r⎼s⎽t├u┤v┴w┬x│y≤z≥{π|≠}£~·"
    .match(/../gu)
    .map((pair) => [...pair]),
);
function countEnds(data) {
  let count = 0;
  for (let at = 0; at < data.length; at++) if (data[at] === 10) count++; // 30 times indexOf()
  return count;
}
// The states of Paul Williams' parser (vt100.net/emu/dec_ansi_parser); IGNORE is a CSI sequence
// that cannot be right, STRING is OSC, DCS, SOS, PM or APC.
const GROUND = 0;
const ESCAPE = 1;
const CSI_PART = 2;
const IGNORE = 3;
const STRING = 4;
// What ESC 7 saves. isPending: the next character goes to a new line.
const PEN = {
  x: 0,
  y: 0,
  fg: -1,
  bg: -1,
  flags: 0,
  isPending: false,
  shift: 0,
  charsets: "BB",
  isOrigin: false,
};
class Terminal {
  // cols 0 makes a log, with more columns than are ever used; dropped: lines gone from the front;
  // reply answers a program's questions
  constructor(cols, rows) {
    this.isLog = !cols;
    this.cols = cols || MAX_STRING;
    this.rows = rows || LOG_ROWS;
    this.time = 0;
    this.dropped = 0;
    this.reply = () => {};
    this.reset();
  }
  // RIS. The screen begins at lines[base]; main is what the alternate screen hides.
  reset() {
    Object.assign(this, PEN, {
      lines: [new Line(this.time)],
      base: 0,
      main: null,
      state: GROUND,
      string: "",
      last: " ",
      tabs: null, // the columns of tab stops, once they are not every 8
      title: "",
    });
    this.softReset();
    this.atEnd = this.isLog; // of a packed line: x is not known and not needed
  }
  // DECSTR: all but the text and the place of the cursor.
  softReset() {
    const { x, y } = this;
    this.modes = { 7: true, 25: true }; // by the numbers of DECSET: wrap, show the cursor
    this.isInserting = false;
    this.shape = 0; // of the cursor, as DECSCUSR numbers them
    this.link = "";
    Object.assign(this, PEN, { x, y, top: 0, bottom: this.rows - 1 });
    this.saved = PEN;
    this.setStyle();
  }
  get eraseStyle() {
    return this.bg < 0 || this.isLog ? "" : `-1,${this.bg},0,`;
  }
  row(y = this.y) {
    while (this.lines.length <= this.base + y) this.lines.push(new Line(this.time));
    return this.lines[this.base + y];
  }
  write(text, time = this.time) {
    this.time = time;
    for (let at = 0; at < text.length;) {
      if (this.state !== GROUND) {
        at += this.parse(text[at], text.charCodeAt(at));
        continue;
      }
      CONTROL.lastIndex = at;
      const end = CONTROL.test(text) ? CONTROL.lastIndex - 1 : text.length;
      if (end > at) this.print(text.slice(at, end));
      const isLineEnd = this.isLog && text.startsWith("\r\n", end);
      if (end < text.length) this.control(isLineEnd ? 10 : text.charCodeAt(end));
      at = end + (isLineEnd ? 2 : 1);
    }
  }
  // Takes what so many lines follow at once that it would leave before anybody sees it.
  pass(text, time) {
    const end = text.lastIndexOf("\n") + 1;
    const isWhole = !this.main && !this.top && this.bottom === this.rows - 1;
    const isPlain = this.state === GROUND && !/[^\r\n\x20-\x7e\xa0-\uffff]/.test(text);
    const isLineEnd = this.isLog || text[end - 2] === "\r"; // or else x would not be known
    if (!end || !isWhole || !isPlain || !isLineEnd) return this.write(text, time);
    this.dropped += this.lines.length + text.split("\n").length - 2;
    Object.assign(this, { lines: [new Line(time)], base: 0, x: 0, y: 0 });
    this.isPending = false;
    this.atEnd = this.isLog;
    this.write(text.slice(end), time);
  }
  // Takes one character of a sequence; returns 0 where it is none, and is to be printed.
  parse(char, code) {
    if (code === 24 || code === 26) {
      this.state = GROUND;
      this.string = "";
    } else if (code === 27) this.control(code);
    else if (this.state === STRING) this.collectString(char, code);
    else if (code < 32) this.control(code);
    else if (code > 159) {
      this.state = GROUND;
      return 0;
    } else if (code < 127) {
      this.collect(char, code);
    }
    return 1;
  }
  collect(char, code) {
    const isFinal = code > (this.state === ESCAPE ? 47 : 63);
    if (this.state === ESCAPE && !this.between && "[]PX^_".includes(char)) this.begin(char);
    else if (!isFinal && code < 48) this.between = (this.between + char).slice(0, 9);
    else if (!isFinal) {
      const isAfter = this.params || this.prefix;
      const isWrong = this.between || this.params[999] || (char >= "<" && isAfter);
      if (isWrong) this.state = IGNORE;
      else if (char >= "<") this.prefix = char;
      else this.params += char;
    } else {
      const { state } = this;
      this.state = GROUND;
      if (state === ESCAPE) this.escape(this.between, char);
      else if (state === CSI_PART) this.sequence(this.prefix + this.between + char);
    }
  }
  begin(char) {
    this.state = char === "[" ? CSI_PART : STRING;
    this.isCommand = char === "]";
    this.string = this.prefix = this.params = "";
  }
  collectString(char, code) {
    const isLost = this.string.length > MAX_STRING;
    if (code === 0x9c || isLost || (code === 7 && this.isCommand)) {
      this.state = GROUND;
      if (!isLost) this.command();
      this.string = "";
    } else if (code > 31) this.string += char;
  }
  print(text) {
    if (this.isLog && this.charsets[this.shift] === "0") {
      text = text.replace(/[`-~]/g, (char) => GRAPHICS[char]);
    }
    while (this.isLog && text) {
      const line = this.row();
      let room = MAX_LINE - (line.cells ? this.x : line.size);
      if (room > 0 && !this.atEnd) break;
      if (text.length > room && (text.charCodeAt(room - 1) & 0xfc00) === 0xd800) room--;
      if (room <= 0) {
        this.wrap();
        continue;
      }
      if (line.isEmpty) line.time = this.time;
      line.append(text.length > room ? text.slice(0, room) : text, this.style);
      text = text.slice(room);
    }
    if (!this.isLog) text = this.printPlain(text);
    for (const char of text) this.put(char);
  }
  // On a screen, too, what is only added to a line need not become cells; returns what is left.
  printPlain(text) {
    if (this.isInserting || !this.modes[7] || !isAscii(text) || this.charsets[this.shift] === "0") {
      return text;
    }
    while (text) {
      if (this.isPending) this.wrap();
      const line = this.row();
      if (line.cells || !line.isPlain || line.size !== this.x) break;
      const part = text.slice(0, this.cols - this.x);
      line.append(part, this.style);
      this.last = part.at(-1);
      this.isPending = line.size === this.cols;
      this.x = line.size - this.isPending;
      text = text.slice(part.length);
    }
    return text;
  }
  put(char) {
    if (this.charsets[this.shift] === "0") char = GRAPHICS[char] ?? char;
    const width = widthOf(char);
    const { style, cols } = this;
    if (!width) return this.combine(char);
    if (this.isPending || (this.modes[7] && this.x + width > cols)) this.wrap();
    const x = clamp(this.x, 0, cols - width);
    const cells = this.row().open();
    const isSimple = width === 1 && x <= cells.length && cells[x]?.[0] !== "";
    if (isSimple && cells[x + 1]?.[0] !== "" && !this.isInserting) cells[x] = [char, style];
    else this.row().edit(x, this.isInserting ? 0 : width, cellsOf(char, style), cols);
    this.isPending = x + width >= cols && !!this.modes[7];
    this.x = Math.min(x + width, cols - 1);
    this.last = char;
  }
  combine(mark) {
    const cells = this.row().open();
    let x = this.isPending ? this.x : this.x - 1;
    if (cells[x]?.[0] === "") x--;
    if (cells[x]?.[0].length < 16) cells[x] = [cells[x][0] + mark, cells[x][1]];
  }
  // Before anything but appending: the column becomes known.
  settle() {
    if (this.atEnd) this.x = this.row().open().length;
    this.atEnd = false;
  }
  wrap() {
    const line = this.row();
    this.newLine();
    line.next = this.row();
  }
  newLine() {
    this.x = 0;
    this.index();
    this.atEnd = this.isLog && this.row().isEmpty;
  }
  index() {
    this.isPending = false;
    if (this.isLog && this.base + this.y === this.lines.length - 1) this.row().pack();
    if (this.y === this.bottom) this.scroll(1);
    else this.y = Math.min(this.y + 1, this.rows - 1);
  }
  // Up; down where count is negative.
  scroll(count, top = this.top, keeps = top === 0 && !this.main) {
    const { bottom, eraseStyle, lines } = this;
    this.row(bottom);
    for (let n = Math.min(Math.abs(count), bottom - top + 1); n > 0; n--) {
      const line = new Line(this.time);
      const from = this.base + top;
      const end = this.base + bottom;
      if (eraseStyle) line.edit(0, 0, erasedCells(this.cols, eraseStyle));
      if (count > 0 && keeps) lines[this.base++].pack();
      else lines.splice(count > 0 ? from : end, 1);
      if (count > 0 && keeps && end + 1 === lines.length) lines.push(line);
      else lines.splice(count < 0 ? from : keeps ? end + 1 : end, 0, line);
    }
    if (this.base > MAX_LINES + 5000) this.drop(5000);
  }
  drop(count) {
    this.dropped += this.lines.splice(0, count).length;
    this.base -= count;
  }
  go(x, y = this.y) {
    this.isPending = this.atEnd = false;
    this.x = clamp(x, 0, Math.min(this.cols - 1, MAX_LINE));
    this.y = clamp(y, 0, this.rows - 1);
  }
  // Stops at the margins of the region that it begins in.
  vertical(count, x = this.x) {
    const low = this.y < this.top ? 0 : this.top;
    const high = this.y > this.bottom ? this.rows - 1 : this.bottom;
    this.go(x, clamp(this.y + count, low, high));
  }
  // To a row of the screen or, in origin mode, of the region.
  goTo(x, y) {
    if (this.isOrigin) this.go(x, clamp(this.top + y, this.top, this.bottom));
    else this.go(x, y);
  }
  tab(count) {
    const isStop = (x) => (this.tabs ? this.tabs.has(x) : x % 8 === 0);
    const step = Math.sign(count);
    const end = this.isLog ? MAX_LINE : this.cols - 1;
    let { x } = this;
    for (let n = Math.abs(count); n > 0; n--) {
      do x += step;
      while (x > 0 && x < end && !isStop(x));
    }
    this.go(x);
  }
  setTab(isOn) {
    if (!this.tabs) this.tabs = new Set(Array.from({ length: 125 }, (_, i) => 8 * i));
    this.tabs[isOn ? "add" : "delete"](this.x);
  }
  control(code) {
    if (code === 9 && this.atEnd) return this.row().append("\t", this.style);
    if (code === 8 || code === 9 || code === 13) this.settle();
    if (code === 8) this.go(this.x - 1);
    else if (code === 9) this.tab(1);
    else if (code === 13) this.go(0);
    else if (code === 14 || code === 15) this.shift = 15 - code;
    else if (code > 9 && code < 13) this.isLog || this.modes[20] ? this.newLine() : this.index();
    else if (code === 27 || (code > 127 && !this.isLog)) {
      this.state = ESCAPE;
      this.between = "";
      if (code > 127) this.collect(String.fromCharCode(code - 64), code - 64);
    }
  }
  escape(between, letter) {
    if (between === "(") this.charsets = letter + this.charsets[1];
    else if (between === ")") this.charsets = this.charsets[0] + letter;
    else if (letter === "\\" && this.string) this.command();
    else if (ESCAPES[between + letter]) {
      this.settle();
      ESCAPES[between + letter](this);
    }
    this.string = "";
  }
  sequence(name) {
    const params = this.params.split(";");
    if (name === "m") return this.rendition(params);
    const numbers = params.map(Number);
    if (!CSI[name]) return;
    this.settle();
    CSI[name](this, Math.min(numbers[0] || 1, 9999), numbers);
  }
  // OSC
  command() {
    const [, number, text] = /^(\d*);?(.*)/s.exec(this.isCommand ? this.string : "");
    if (number === "0" || number === "2") this.title = text.slice(0, 200);
    if (number !== "8") return;
    const uri = text.slice(text.indexOf(";") + 1);
    this.link = /^https?:\/\/[^\s]+$/i.test(uri) && uri.length < 2084 ? uri : "";
    this.setStyle();
  }
  // SGR
  rendition(params) {
    for (let i = 0; i < params.length; i++) {
      const [code, ...sub] = params[i].split(":").map(Number);
      const tens = Math.floor(code / 10);
      const unit = code % 10;
      const side = tens === 3 || tens === 9 ? "fg" : "bg";
      if (code === 38 || code === 48 || code === 58) {
        const list = sub.length ? sub : params.slice(i + 1, i + 5).map(Number);
        const [r, g, b] = sub.length ? sub.slice(-3) : list.slice(1);
        const rgb = (r << 16) | (g << 8) | b;
        if (!sub.length) i += { 5: 2, 2: 4 }[list[0]] ?? 0;
        if (code !== 58) this[side] = list[0] === 5 ? list[1] & 255 : RGB | (rgb & 0xffffff);
      } else if (!code) Object.assign(this, { fg: -1, bg: -1, flags: 0 });
      else if (code < 10 && sub[0] === 0) this.flags &= ~FLAG_ON[code];
      else if (code < 10) this.flags |= FLAG_ON[code];
      else if (code === 21) this.flags |= UNDERLINE;
      else if (FLAG_OFF[code]) this.flags &= ~FLAG_OFF[code];
      else if (tens === 3 || tens === 4) this[side] = unit === 9 ? -1 : unit;
      else if (tens === 9 || tens === 10) this[side] = 8 + unit;
    }
    this.setStyle();
  }
  setStyle() {
    const { fg, bg, flags, link } = this;
    this.style = fg + bg + flags === -2 && !link ? "" : `${fg},${bg},${flags},${link}`;
  }
  // 0 to the end, 1 from the start, 2 all
  eraseLine(what, y = this.y) {
    const line = this.row(y);
    line.erase(what ? 0 : this.x, what === 1 ? this.x + 1 : this.cols, this.eraseStyle);
    if (what !== 1) line.next = null;
    const above = this.lines[this.base + y - 1];
    if (above && (what || !this.x)) above.next = null;
    this.isPending = false;
  }
  // The same; 3 what is kept above it
  eraseScreen(what) {
    const end = what === 1 ? this.y : this.eraseStyle ? this.rows : this.lines.length - this.base;
    if (what === 3) return this.main || this.drop(this.base);
    if (what < 2) this.eraseLine(what);
    for (let y = what ? 0 : this.y + 1; y < end; y++) this.eraseLine(2, y);
    if (this.isLog && what !== 1) this.lines.splice(this.base + this.y + 1);
  }
  save() {
    this.saved = Object.fromEntries(Object.keys(PEN).map((name) => [name, this[name]]));
  }
  restore() {
    Object.assign(this, this.saved);
    this.go(this.x, this.y);
    this.isPending = this.saved.isPending;
    this.setStyle();
  }
  setMode(number, isOn) {
    this.modes[number] = isOn;
    if (number === 6) {
      this.isOrigin = isOn;
      this.goTo(0, 0);
    }
    if (number === 1048) isOn ? this.save() : this.restore();
    const isAlternate = number === 47 || number === 1047 || number === 1049;
    if (isAlternate && !this.isLog && isOn === !this.main) this.switchScreen(number, isOn);
  }
  switchScreen(number, isOn) {
    const { lines, base, cols, rows, main } = this;
    if (isOn) {
      if (number === 1049) this.save();
      const { saved } = this;
      Object.assign(this, { lines: [], base: 0, main: { lines, base, saved, cols, rows } });
    } else {
      Object.assign(this, main, number === 1049 && main.saved, { main: null });
      if (cols !== this.cols || rows !== this.rows) this.resize(cols, rows);
      if (number === 1049) this.restore();
    }
    this.row();
  }
  // The cursor stays where it is in the text.
  resize(cols, rows) {
    const move = Math.max(0, this.y - rows + 1);
    if (this.main) this.lines.splice(0, move);
    else this.base += move;
    this.lines.splice(this.base + rows);
    Object.assign(this, { cols, rows, top: 0, bottom: rows - 1 });
    for (const line of this.lines.slice(this.base)) line.edit(0, 0, [], cols);
    this.go(this.x, this.y - move);
  }
}
const isInRegion = (t) => t.y >= t.top && t.y <= t.bottom;
function reportStatus(t, n) {
  const y = t.y - (t.isOrigin ? t.top : 0);
  if (n === 5) t.reply("\x1b[0n");
  if (n === 6) t.reply(`\x1b[${y + 1};${t.x + 1}R`);
}
// What follows "ESC [", intermediates and private prefix included; n is the first number, else 1.
const CSI = {
  "@": (t, n) => t.row().edit(t.x, 0, erasedCells(n, t.eraseStyle), t.cols),
  A: (t, n) => t.vertical(-n),
  B: (t, n) => t.vertical(n),
  C: (t, n) => t.go(t.x + n),
  D: (t, n) => t.go(t.x - n),
  E: (t, n) => t.vertical(n, 0),
  F: (t, n) => t.vertical(-n, 0),
  G: (t, n) => t.go(n - 1),
  H: (t, n, [, column]) => t.goTo((column || 1) - 1, n - 1),
  I: (t, n) => t.tab(n),
  J: (t, _, [what]) => t.eraseScreen(what),
  K: (t, _, [what]) => t.eraseLine(what),
  L: (t, n) => {
    if (isInRegion(t)) {
      t.scroll(-n, t.y);
      t.go(0);
    }
  },
  M: (t, n) => {
    if (isInRegion(t)) {
      t.scroll(n, t.y, false);
      t.go(0);
    }
  },
  P: (t, n) => {
    t.row().edit(t.x, n, []);
    const from = Math.max(t.x, t.cols - n);
    if (t.eraseStyle) t.row().edit(from, 0, erasedCells(n, t.eraseStyle), t.cols);
  },
  S: (t, n) => t.scroll(n),
  T: (t, n) => t.scroll(-n),
  X: (t, n) => t.row().erase(t.x, Math.min(t.x + n, t.cols), t.eraseStyle),
  Z: (t, n) => t.tab(-n),
  a: (t, n) => t.go(t.x + n),
  b: (t, n) => t.print(t.last.repeat(n)),
  c: (t) => t.reply("\x1b[?62;22c"),
  d: (t, n) => t.goTo(t.x, n - 1),
  e: (t, n) => t.vertical(n),
  g: (t, _, [what]) => (what === 3 ? (t.tabs = new Set()) : t.setTab(false)),
  h: (t, _, all) => setAnsiModes(t, all, true),
  l: (t, _, all) => setAnsiModes(t, all, false),
  n: reportStatus,
  r: (t, n, [, bottom]) => {
    const end = Math.min(bottom || t.rows, t.rows);
    if (t.isLog || n >= end) return;
    Object.assign(t, { top: n - 1, bottom: end - 1 });
    t.goTo(0, 0);
  },
  s: (t) => t.save(),
  u: (t) => t.restore(),
  "!p": (t) => t.softReset(),
  " q": (t, _, [shape]) => (t.shape = shape),
  ">c": (t) => t.reply("\x1b[>1;10;0c"),
  "?h": (t, _, all) => all.forEach((number) => t.setMode(number, true)),
  "?l": (t, _, all) => all.forEach((number) => t.setMode(number, false)),
};
CSI["`"] = CSI.G;
CSI.f = CSI.H;
CSI["?J"] = CSI.J;
CSI["?K"] = CSI.K;
function setAnsiModes(t, numbers, isOn) {
  for (const number of numbers) {
    if (number === 4) t.isInserting = isOn;
    if (number === 20) t.modes[20] = isOn;
  }
}
// What follows a lone ESC.
const ESCAPES = {
  7: (t) => t.save(),
  8: (t) => t.restore(),
  D: (t) => t.index(),
  E: (t) => t.newLine(),
  H: (t) => t.setTab(true),
  M: (t) => (t.y === t.top ? t.scroll(-1) : t.vertical(-1)),
  c: (t) => t.reset(),
  "#8": (t) => {
    for (let y = 0; y < (t.isLog ? 0 : t.rows); y++) {
      t.row(y).edit(0, t.cols, cellsOf("E", "").concat(Array(t.cols - 1).fill(["E", ""])));
    }
    t.go(0, 0);
  },
};

// ── The document ──
const $ = (id) => document.getElementById(id);
const two = (n) => String(Math.floor(n)).padStart(2, "0");
function make(tag, properties, ...children) {
  // strings become text, whatever they hold
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}
function say(id, text) {
  if ($(id).textContent !== text) $(id).textContent = text;
}
function show(id, text) {
  say(id, text);
  $(id).hidden = !text;
}

// ── Colours: as the theme says, but always readable ──
const MINIMUM_CONTRAST = 4.5; // WCAG 2.2, 1.4.3
const WHITE = [255, 255, 255];
const BLACK = [0, 0, 0];
const theme = { text: BLACK, screen: WHITE, base: [], looks: new Map() };
const mix = (from, to, share) => from.map((part, i) => Math.round(part + (to[i] - part) * share));
const css = (rgb) => `rgb(${rgb.join(", ")})`;
// Reads what the style sheet makes of its variables, in the light or dark that holds now.
function readTheme() {
  const probe = document.body.appendChild(make("i"));
  const read = (name) => {
    probe.style.color = `var(--${name})`;
    return getComputedStyle(probe).color.match(/\d+/g).map(Number);
  };
  theme.text = read("text");
  theme.screen = read("screen");
  theme.base = Array.from({ length: 8 }, (_, n) => read(`c${n}`));
  theme.looks.clear();
  probe.remove();
}
function luminance(rgb) {
  const [r, g, b] = rgb.map((part) => {
    const level = part / 255;
    return level <= 0.04045 ? level / 12.92 : ((level + 0.055) / 1.055) ** 2.4;
  });
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}
function contrast(one, other) {
  const levels = [luminance(one) + 0.05, luminance(other) + 0.05];
  return Math.max(...levels) / Math.min(...levels);
}
// The ink, or as little nearer to black or white as it takes to be read on the paper.
function makeReadable(ink, paper) {
  const end = contrast(BLACK, paper) > contrast(WHITE, paper) ? BLACK : WHITE;
  let color = ink;
  for (let share = 0.05; contrast(color, paper) < MINIMUM_CONTRAST && share <= 1; share += 0.05) {
    color = mix(ink, end, share);
  }
  return contrast(color, paper) < MINIMUM_CONTRAST ? end : color;
}
// One of the 256, or RGB.
function rgbOf(number) {
  const level = (step) => [0, 95, 135, 175, 215, 255][Math.floor((number - 16) / step) % 6];
  if (number < 8) return theme.base[number];
  if (number < 16) return mix(theme.base[number - 8], theme.text, 0.35);
  if (number >= RGB) return [16, 8, 0].map((shift) => (number >> shift) & 255);
  return number > 231 ? Array(3).fill((number - 232) * 10 + 8) : [36, 6, 1].map(level);
}
function readStyle(style) {
  const [fg, bg, flags] = style ? style.split(",", 3).map(Number) : [-1, -1, 0];
  const isBright = flags & BOLD && fg >= 0 && fg < 8;
  let ink = fg < 0 ? theme.text : rgbOf(isBright ? fg + 8 : fg);
  let paper = bg < 0 ? theme.screen : rgbOf(bg);
  // Black and white are told from the theme's only where the paper is the program's as well.
  if (bg >= 0 && [0, 7, 15].includes(fg)) ink = fg ? WHITE : BLACK;
  if (flags & INVERSE) [ink, paper] = [paper, ink];
  if (flags & DIM) ink = mix(ink, paper, 0.35);
  return { ink, paper, flags, isPlain: bg < 0 && !(flags & INVERSE) };
}
// The declarations for a style. Pictures made of blocks keep their colours as they are.
function lookOf(style, isPicture) {
  const key = isPicture ? `picture ${style}` : style;
  if (theme.looks.has(key)) return theme.looks.get(key);
  const { ink, paper, flags, isPlain } = readStyle(style);
  const color = css(isPicture ? ink : makeReadable(ink, paper));
  const lines = [flags & UNDERLINE && "underline", flags & STRIKE && "line-through"];
  const look = {
    color: flags & HIDDEN ? "transparent" : color,
    backgroundColor: isPlain ? "" : css(paper),
    fontWeight: flags & BOLD ? "600" : "",
    fontStyle: flags & ITALIC ? "italic" : "",
    textDecoration: lines.filter(Boolean).join(" "),
  };
  if (theme.looks.size > 5000) theme.looks.clear();
  theme.looks.set(key, look);
  return look;
}

// ── A line on the page: rows of pieces, each as wide as its cells ──
const LINK = /https?:\/\/[^\s<>"'`]*[^\s<>"'`.,:;!?)\]}]/g;
const RIGHT_TO_LEFT =
  /[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufefc\u{10800}-\u{10fff}\u{1e800}-\u{1efff}]/u;
// Not drawn: they could lie about the order of what was written.
const BIDI_CONTROLS = /[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]/g;
// What the browser draws as wide as its cells stands in plain text; anything else in a box of its
// own, letters of one word together, since many scripts join them.
const font = { pen: make("canvas").getContext("2d"), widths: new Map(), cell: 8, name: "" };
function measureText(text, isBold) {
  const key = isBold ? `bold ${text}` : text;
  let width = font.widths.get(key);
  if (width === undefined) {
    font.pen.font = `${isBold ? 600 : 400} ${font.name}`;
    width = font.pen.measureText(text).width;
    if (font.widths.size > 10000) font.widths.clear();
    font.widths.set(key, width);
  }
  return width;
}
function kindOf(char, width, style) {
  if (char >= " " && char <= "~" && !char[1]) return "text"; // else it has marks
  if (char === "\t") return "box";
  const isBold = style && style.split(",", 3)[2] & BOLD;
  const isFitting = Math.abs(measureText(char, isBold) - width * font.cell) < 0.05;
  if (isFitting && char >= "\u2500" && char <= "\u259f")
    return char < "\u2580" ? "frame" : "picture";
  if (RIGHT_TO_LEFT.test(char)) return "letters";
  if (isFitting) return "text";
  return width === 1 && /^\p{L}/u.test(char) ? "letters" : "box";
}
// How many cells a character takes at column x; a tab ends at the end of the row.
function cellsAt(x, char, width, cols) {
  return char === "\t" ? Math.min(8 - (x % 8), cols - x) || 8 : width;
}
function countRows(line, cols) {
  if (!line.cells && line.isPlain) {
    return Math.max(1, Math.ceil(line.size / cols));
  }
  let x = 0;
  let rows = 1;
  line.forEachCell((char, _, width) => {
    const cells = cellsAt(x, char, width, cols);
    if (x + cells > cols) {
      rows++;
      x = 0;
    }
    x += cells;
  });
  return rows;
}
// Returns rows of pieces {text, style, kind, link, cells, at}; at: where it begins in line.text.
function layOutLine(line, cols, cursor = -1) {
  const links = line.text.includes("://") ? [...line.text.matchAll(LINK)] : [];
  const linkAt = (at) =>
    links.find((one) => at >= one.index && at < one.index + one[0].length)?.[0];
  const rows = [[]];
  let x = 0;
  let at = 0;
  const add = (char, style, width) => {
    const cells = cellsAt(x, char, width, cols);
    if (x + cells > cols) {
      rows.push([]);
      x = 0;
    }
    const pieces = rows.at(-1);
    const last = pieces.at(-1);
    const isCursor = cursor >= x && cursor < x + cells;
    const link = style.split(",").slice(3).join(",") || linkAt(at);
    let kind = cells ? kindOf(char, cells, style) : (last?.kind ?? "text");
    if (char === " " && last?.isRightToLeft) kind = "letters";
    const isSame = last && last.style === style && last.kind === kind && last.link === link;
    if (isSame && !isCursor && !last.isClosed && (kind !== "box" || !cells)) {
      last.text += char;
      last.cells += cells;
    } else {
      pieces.push({ text: char, style, kind, link, cells, at, isCursor, isClosed: isCursor });
    }
    const piece = pieces.at(-1);
    piece.isRightToLeft = kind === "letters" && (char === " " || RIGHT_TO_LEFT.test(char));
    piece.isClosed ||= char.search(BIDI_CONTROLS) >= 0;
    x += cells;
    at += char.length;
  };
  line.forEachCell(add);
  while (x <= cursor) add(" ", "", 1);
  return rows;
}
function drawPiece({ text, style, kind, link, cells, at, isCursor }) {
  const node = document.createTextNode(text.replace(BIDI_CONTROLS, ""));
  Object.assign(node, { at, size: text.length });
  if (!style && !link && kind === "text" && !isCursor) return node;
  const rel = "noopener noreferrer";
  const target = "_blank";
  const properties = link ? { href: link, title: link, target, rel } : {};
  const element = make(link ? "a" : "span", properties, node);
  if (style) Object.assign(element.style, lookOf(style, kind === "picture"));
  if (isCursor) {
    const { ink, paper } = readStyle(style);
    element.style.setProperty("--ink", css(makeReadable(ink, paper)));
    element.style.setProperty("--paper", css(paper));
  }
  if (kind === "frame" || kind === "picture") element.classList.add("box", "tall");
  if (kind === "box" || kind === "letters") squeeze(element, text, cells, style);
  element.classList.toggle("cursor", isCursor);
  return element;
}
// Gives an element the width of its cells; what is wider is drawn narrower.
function squeeze(element, text, cells, style) {
  const width = cells * font.cell;
  const natural = text === "\t" ? 0 : measureText(text, style && style.split(",", 3)[2] & BOLD);
  element.classList.add("box");
  element.style.width = `${Math.max(width, natural)}px`;
  if (natural <= width) return;
  element.style.marginRight = `${width - natural}px`;
  element.style.transform = `scaleX(${width / natural})`;
}

// ── The view: of a terminal's lines only those in sight are in the document ──
const FONT_SIZE = 13;
const view = {
  sums: [0], // sums[i]: rows on the page above line i; the first `known` stay as they are
  rows: new Map(), // from a line to its element
  dropped: 0,
  look: 0, // rises when all lines have to be drawn again
  top: 0, // how far down it has scrolled by itself
  show(terminal) {
    Object.assign(this, { terminal, follow: true, dropped: 0, known: 0, hits: [], hit: -1 });
    say("hits", "");
    this.draw();
  },
  draw() {
    if (!this.isDue) requestAnimationFrame(() => this.render());
    this.isDue = true;
  },
  // The font is as large as makes a cell a whole number of the screen's pixels. This lays out the
  // page four times, so it is done only when the zoom has changed.
  measureFont() {
    const output = $("output");
    const probe = $("lines").appendChild(make("span", {}, "x".repeat(100)));
    probe.style.padding = 0;
    const measure = (size) => {
      output.style.fontSize = `${size}px`;
      return probe.getBoundingClientRect().width / 100 || 7.8;
    };
    const plain = measure(FONT_SIZE);
    const aim = Math.round(plain * devicePixelRatio) / devicePixelRatio;
    let size = (FONT_SIZE * aim) / plain;
    size *= aim / measure(size); // advances do not grow evenly with the size
    const cell = measure(size);
    const { width, height } = probe.getBoundingClientRect();
    probe.remove();
    font.ratio = width && devicePixelRatio; // while the output is hidden nothing can be measured
    font.cell = cell;
    font.height = height || 16;
    font.name = `${size}px ${getComputedStyle(output).fontFamily}`;
    font.widths.clear();
    // An underscore may lie below what the browser takes for the height of the font.
    font.pen.font = font.name;
    const { fontBoundingBoxAscent, actualBoundingBoxDescent } = font.pen.measureText("_");
    font.low = Math.max(font.height, fontBoundingBoxAscent + actualBoundingBoxDescent);
  },
  // Rows of a terminal touch, so that lines drawn by characters have no gaps; those of a log stand
  // a bit apart.
  measure() {
    if (font.ratio !== devicePixelRatio) this.measureFont();
    const output = $("output");
    const { cell, height, low } = font;
    const screenRow = Math.ceil(low * devicePixelRatio) / devicePixelRatio;
    this.row = screenRow + (this.terminal?.isLog ? 2 : 0);
    const above = Math.floor(((this.row - height) / 2) * devicePixelRatio) / devicePixelRatio;
    output.style.setProperty("--row", `${this.row}px`);
    output.style.setProperty("--above", `${above}px`);
    output.style.setProperty("--stretch", (this.row + 1) / height);
    output.style.setProperty("--below", `${this.row - height - above}px`);
    const cols = Math.floor((output.clientWidth - 24) / cell) - ($("times").checked ? 14 : 0);
    const fits = Math.floor((output.clientHeight - 14) / screenRow);
    Object.assign(this, { cols: clamp(cols, 10, 500), fits: clamp(fits, 4, 200), known: 0 });
    readTheme();
    this.look++;
  },
  recolor() {
    if (!this.terminal) return;
    readTheme();
    this.look++;
    this.draw();
  },
  get wrapAt() {
    return this.terminal.isLog && $("wrap").checked ? this.cols : Infinity;
  },
  sum() {
    const { lines, base, isLog, dropped } = this.terminal;
    const { sums, wrapAt } = this;
    const gone = dropped - this.dropped;
    if (gone) {
      // lines above have left: what is in sight shall stay there
      const height = ((sums[gone] ?? sums.at(-1)) - sums[0]) * this.row;
      if (!this.follow) $("output").scrollTop -= height;
      sums.splice(0, gone);
      this.known = Math.max(0, this.known - gone);
      this.dropped = dropped;
    }
    if (!this.known) sums.splice(0, Infinity, 0);
    for (let i = this.known; i < lines.length; i++) {
      sums[i + 1] = sums[i] + (wrapAt < Infinity ? countRows(lines[i], wrapAt) : 1);
    }
    if (isLog && lines.length > 1 && lines.at(-1).isEmpty) sums[lines.length]--;
    sums.length = lines.length + 1;
    this.known = Math.min(base, lines.length - 1);
  },
  // The line at a row of the page.
  at(row, low = 0, high = this.sums.length - 2) {
    if (low >= high) return low;
    const middle = (low + high + 1) >> 1;
    const isBelow = this.sums[middle] - this.sums[0] <= row;
    return isBelow ? this.at(row, middle, high) : this.at(row, low, middle - 1);
  },
  render() {
    this.isDue = false;
    this.sum();
    const { terminal: t, sums } = this;
    const output = $("output");
    const height = (sums.at(-1) - sums[0]) * this.row;
    $("sizer").style.height = `${height}px`;
    // Not from scrollHeight: the rows that are still in the document may reach further down.
    const end = Math.max(0, height - output.clientHeight);
    const seen = (this.follow ? end : Math.min(end, output.scrollTop)) / this.row;
    const last = this.at(seen + output.clientHeight / this.row);
    // What is selected stays in the document, or else the selection would shrink. It does not if it
    // is gone (-1) or far away: the document would grow with the output.
    const isNear = (i) => i >= 0 && Math.abs(i - last) < 9999;
    const selected = this.selectedLines()
      .map((line) => t.lines.indexOf(line))
      .filter(isNear);
    const from = Math.max(0, Math.min(this.at(seen) - 10, ...selected));
    this.place(t.lines.slice(from, Math.max(last, ...selected) + 10), from + t.dropped);
    $("lines").style.transform = `translateY(${(sums[from] - sums[0]) * this.row}px)`;
    $("lines").classList.toggle("reversed", !!t.modes[5]);
    $("lines").dataset.shape = Math.ceil(t.shape / 2);
    $("tail").hidden = this.follow;
    if (this.follow) {
      output.scrollTop = output.scrollHeight;
      this.top = output.scrollTop;
    }
    $("keys").style.transform = `translate(${t.x * font.cell}px, ${(t.base + t.y) * this.row}px)`;
    say("caption", t.title);
  },
  // Makes the document hold these lines; first is the number of the first one.
  place(wanted, first) {
    const { terminal: t, rows } = this;
    const box = $("lines");
    const keep = new Set(wanted);
    const hasCursor = !t.isLog && t.modes[25] && stream?.task.state === "running";
    let next = box.firstChild;
    for (const [line, row] of rows) {
      if (keep.has(line)) continue;
      if (row === next) next = row.nextSibling;
      row.remove();
      rows.delete(line);
    }
    wanted.forEach((line, i) => {
      const row = rows.get(line) ?? make("div");
      const cursor = hasCursor && line === t.lines[t.base + t.y] ? t.x : -1;
      const key = `${this.look} ${line.version} ${cursor}`;
      if (row.key !== key) this.fill(row, line, cursor);
      row.key = key;
      rows.set(line, row);
      row.classList.toggle("hit", i + first === this.hits[this.hit]);
      if (row === next) next = next.nextSibling;
      else box.insertBefore(row, next);
    });
  },
  fill(row, line, cursor) {
    const drawn = layOutLine(line, this.wrapAt, cursor).map((pieces) => pieces.map(drawPiece));
    row.line = line;
    row.className = line.isNote ? "note" : "";
    row.dataset.time = line.time && !line.isEmpty ? formatTime(line.time, 23) : "";
    row.replaceChildren(...drawn.map((nodes) => make("div", {}, ...nodes)));
  },
  selectedLines() {
    const { anchorNode, focusNode, isCollapsed } = getSelection();
    if (isCollapsed) return [];
    const lineOf = (node) =>
      (node?.closest ? node : node?.parentNode)?.closest("#lines > div")?.line;
    const isKnown = (line) => line && this.rows.has(line);
    return [lineOf(anchorNode), lineOf(focusNode)].filter(isKnown);
  },
  // What is selected, as it was written; "" where nothing is.
  selectedText() {
    const selection = getSelection();
    if (selection.isCollapsed || !selection.rangeCount) return "";
    const range = selection.getRangeAt(0);
    if (!$("output").contains(range.commonAncestorContainer)) return "";
    let text = "";
    let before = null;
    for (const row of $("lines").children) {
      if (!range.intersectsNode(row)) continue;
      if (before && before.next !== row.line) text += "\n";
      text += row.line.text.slice(...this.selectedPart(row, range));
      before = row.line;
    }
    return text;
  },
  // From where to where a line is selected.
  selectedPart(row, range) {
    const walker = document.createTreeWalker(row, NodeFilter.SHOW_TEXT);
    let from = Infinity;
    let to = 0;
    while (walker.nextNode()) {
      const node = walker.currentNode;
      if (!range.intersectsNode(node)) continue;
      const start = node === range.startContainer ? range.startOffset : 0;
      const end = node === range.endContainer ? range.endOffset : node.length;
      from = Math.min(from, node.at + start);
      to = Math.max(to, node.at + (end === node.length ? node.size : end));
    }
    return [Math.min(from, to), to];
  },
  // Go to the next hit, or with 0 to the newest one.
  find(step) {
    if (stream?.ahead) stream.endLookAhead();
    const query = $("find").value.toLowerCase();
    const old = this.hits[this.hit];
    const { lines, dropped } = this.terminal;
    const isHit = (line) => query && line.text.toLowerCase().includes(query);
    this.hits = lines.flatMap((line, i) => (isHit(line) ? [i + dropped] : []));
    const count = this.hits.length;
    const at = this.hits.indexOf(old);
    this.hit = step && at >= 0 ? (at + step + count) % count : count - 1;
    say("hits", query ? `${this.hit + 1} of ${count}` : "");
    this.draw();
    if (!count) return;
    this.follow = false;
    this.sum();
    const index = this.hits[this.hit] - dropped;
    const offset = lines[index].text.toLowerCase().indexOf(query);
    const rows = layOutLine(lines[index], this.wrapAt);
    const inside = rows.findLastIndex((pieces) => pieces[0]?.at <= offset);
    const row = this.sums[index] - this.sums[0] + Math.max(0, inside);
    $("output").scrollTop = Math.max(0, (row - this.fits / 2) * this.row);
  },
};

// ── What this browser remembers ──
// Storage may be forbidden (blocked cookies, private windows, sandboxed frames) or full. Then
// nothing is remembered, and all else works.
const BASE = location.pathname.replace(/\/?$/, "/");
const KEY = `servercontrol ${BASE} `;
const [tabStorage, browserStorage] = ["sessionStorage", "localStorage"].map((name) => {
  try {
    return window[name];
  } catch {
    return null;
  }
});
function recall(name) {
  for (const storage of [tabStorage, browserStorage]) {
    try {
      const value = storage.getItem(KEY + name);
      if (value) return value;
    } catch {
      // forbidden
    }
  }
  return "";
}
// Returns whether it will be remembered. An empty value is forgotten.
function remember(name, value, storage = browserStorage) {
  try {
    if (value) storage.setItem(KEY + name, value);
    else storage.removeItem(KEY + name);
    return true;
  } catch {
    return false;
  }
}
function recallList(name) {
  try {
    return [...JSON.parse(recall(name))];
  } catch {
    return [];
  }
}

// ── The token, and the address of this page ──
// "#task=5" opens a task. A token comes as "#token=…" and is moved out of the address at once.
// Takes off what a chat or a line end has put around a token; returns it and what is wrong with it.
function checkToken(given) {
  const text = given.replace(/^[\s\p{C}]+|[\s\p{C}]+$/gu, "");
  const odd = /[^\w.~-]/u.exec(text)?.[0];
  if (!odd) return [text, text ? "" : "The token is empty."];
  const code = odd.codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
  return ["", `No token has the character ${makeVisible(odd)} (U+${code}): copy it from its file.`];
}
function findInAddress(name) {
  const value = new RegExp(`[#&]${name}=([^&]*)`).exec(location.hash)?.[1] ?? "";
  try {
    return decodeURIComponent(value);
  } catch {
    return value;
  }
}
function addressOf(id) {
  return location.pathname + location.search + (id ? `#task=${id}` : "");
}
function takeTokenFromAddress() {
  const given = findInAddress("token");
  if (!given) return false;
  const [found, problem] = checkToken(given);
  if (found) remember("token", (token = found), tabStorage);
  show("login-error", problem);
  history.replaceState(null, "", addressOf(findInAddress("task")));
  return true;
}
function openAddress() {
  const id = findInAddress("task");
  if (!id) return closeTask();
  if (tasks.has(id)) return select(tasks.get(id));
  notice(`There is no task ${id} here: it is kept no more, or it is of another server.`);
}

// ── The connection: requests, and the stream of events ──
const tasks = new Map();
const started = new Map(); // of the tasks that this page started, what it called them: their ref
let token = checkToken(recall("token"))[0];
let wanted = findInAddress("task"); // the task to be opened as soon as the server tells of it
let info;
let socket;
let stream;
let timer;
let isBusy;
let mayRun;
let alerting;
let heard = 0; // when the server was last heard
let asked = 0; // and when it was last asked to say something
let seq = 0;
let wait = 500;
let failures = 0;
let skew = 0; // how far the server's clock is ahead of this one
// What is heard while nobody looks at the page.
const QUIET = ["task_start", "task_resize", "task_complete", "cpu_alert", "alert_resolved"];
async function api(path, { body, method = body ? "POST" : "GET", form = "json" } = {}) {
  const headers = {
    ...(token && { Authorization: `Bearer ${token}` }),
    ...(body && { "Content-Type": "application/json" }),
  };
  const init = { method, headers, body: body && JSON.stringify(body) };
  const response = await fetch(BASE + path, init).catch(() => {
    throw new Error("the server does not answer");
  });
  if (response.ok) return form ? response[form]() : response;
  const { status } = response;
  const { error, message } = await response.json().catch(() => ({}));
  if (status === 401 || error === "too_many_tokens") {
    if (token) show("login-error", message);
    if (!$("login").open) $("login").showModal();
  }
  const pause = Number(response.headers.get("Retry-After"));
  const failure = new Error(message ?? `the answer was ${status}`);
  throw Object.assign(failure, { status, said: message, pause });
}
async function connect() {
  clearTimeout(timer);
  if (socket || isBusy) return;
  isBusy = true;
  setLink("connecting", "busy");
  try {
    const response = await api("info", { form: "" });
    const fresh = await response.json();
    const isSame = info?.boot_id === fresh.boot_id;
    skew = Date.parse(response.headers.get("Date")) - Date.now() || 0;
    if (!isSame) await begin(fresh);
    listen(isSame ? seq : fresh.seq);
  } catch (error) {
    if ($("login").open) setLink("token needed", "bad");
    else retry(error);
  } finally {
    isBusy = false;
  }
}
// Takes over a server, or a new start of one, that this page does not know.
async function begin(fresh) {
  await readAll(true);
  if (info) notice("The server was restarted. Its earlier tasks are gone.");
  info = fresh;
  showServer();
  if (wanted && !tasks.has(wanted)) openAddress();
}
// Takes what the server has now. Tasks that it has no more are dropped; isNew: all that were here.
async function readAll(isNew) {
  const known = [...tasks.values()];
  const requests = ["stats?history", "stats?alerts", "tasks"].map((path) => api(path));
  const [{ samples }, { alerts }, list] = await Promise.all(requests);
  const ids = list.map((task) => task.task_id);
  for (const task of known) if (isNew || !ids.includes(task.task_id)) loseTask(task);
  list.forEach(takeTask);
  showAlerts(alerts);
  past.splice(0, Infinity, ...samples);
  drawCharts();
}
function listen(since) {
  const origin = location.origin.replace("http", "ws"); // https becomes wss
  const mine = new WebSocket(
    `${origin}${BASE}ws?since=${since}&boot=${info.boot_id}&task=none`,
    token ? ["servercontrol.v1", `bearer.${token}`] : [],
  );
  let isCut = true; // by somebody who does not let WebSockets through
  socket = mine;
  seq = since;
  heard = asked = Date.now();
  mine.onopen = () => {
    isCut = false;
    wait = 500;
    failures = 0;
    $("trouble").hidden = true;
    setLink("live", "good");
    send({ type: "ping" });
    watch();
  };
  mine.onclose = ({ reason }) => {
    if (socket === mine) retry({ reason, isCut });
  };
  mine.onmessage = ({ data }) => {
    const event = JSON.parse(data);
    heard = Date.now();
    seq = event.seq ?? seq;
    EVENTS[event.type]?.(event);
  };
}
// The page hears of everything but output; of that, what it shows. Returns whether it was asked
// for: then `watching` comes, and what was missed is read.
function watch() {
  const { hidden } = document;
  const isShown = stream && !hidden && !stream.task.isGone;
  const tasks = isShown ? [stream.task.task_id] : [];
  return send({ type: "watch", only: hidden ? QUIET : null, tasks });
}
// Says what is the matter and what helps.
function explain({ status, said, isCut }) {
  if (isCut) return "A proxy in between stops WebSockets: it must pass on Upgrade and Connection.";
  if (!status) return "The server does not answer: was it stopped, or is the network down?";
  if (status === 403) return `This page may not talk to the server: ${said ?? "403"}.`;
  if (status === 429) return "There were too many requests from here: the page waits a while.";
  if (said) return `The server cannot serve this page now: ${said}.`;
  return `A proxy in between answers ${status}: does the server run behind it?`;
}
function retry(error) {
  socket = null;
  for (const task of tasks.values()) task.sizes = [];
  failures++;
  setLink(`offline${error.reason ? ` (${error.reason})` : ""}, trying again`, "bad");
  if (failures > 1 || error.status === 403) {
    say("trouble-words", explain(error));
    $("trouble").hidden = false;
  }
  const pause = Math.min(60, error.pause || 0) * 1000;
  timer = setTimeout(connect, Math.max(pause, wait * (1 + Math.random() / 2)));
  wait = Math.min(wait * 1.7, 15000);
}
// Returns whether there was a connection to send it by.
function send(message) {
  const isOpen = socket?.readyState === 1;
  if (isOpen) socket.send(JSON.stringify(message));
  return isOpen;
}
setInterval(() => {
  // A connection that died in silence is ended here. In a hidden tab this comes once a minute.
  if (socket && heard < asked && Date.now() - heard > 15000) {
    const dead = socket;
    retry({ reason: "silence" });
    dead.close();
  } else if (send({ type: "ping" })) asked = Date.now();
}, 10000);
const EVENTS = {
  pong({ timestamp }) {
    skew = timestamp - Date.now();
  },
  watching({ tasks: [id] }) {
    if (id && id === stream?.task.task_id) stream.refill();
  },
  stats_update(event) {
    past.push([event.timestamp, event.cpu, event.ram_used, event.net_recv, event.net_sent]);
    past.splice(0, past.length - 600);
    if (!document.hidden) showStats(event);
  },
  task_start({ timestamp, ...task }) {
    takeTask({ state: "running", ended: null, ...task, started: timestamp });
  },
  task_resize(event) {
    const { task_id, cols, rows } = event;
    const task = tasks.get(task_id);
    if (!task) return;
    // Was it asked for here? Else somebody else has the say now.
    const at = task.sizes.indexOf(`${cols}x${rows}`);
    task.isTypedHere = at >= 0;
    task.sizes.splice(0, at + 1);
    update(task, { cols, rows });
    if (task === stream?.task) stream.take(event);
  },
  task_output(event) {
    if (event.task_id === stream?.task.task_id) stream.take(event);
  },
  task_complete(event) {
    const task = tasks.get(event.task_id);
    if (!task) return;
    update(task, { ...event, ended: task.started + event.duration_ms });
    say("spoken", `Task ${task.task_id}: ${describe(task)[0]}`);
    if (task === stream?.task && event.output_bytes > stream.next) stream.refill();
  },
  cpu_alert: hearAlert,
  alert_resolved: hearAlert,
  gap({ from, to }) {
    notice(`Events ${from} to ${to} were missed; all has been read again.`);
    readAll(false).catch(() => {});
    stream?.refill();
  },
  error(event) {
    notice(`The server refused: ${event.message}`);
  },
};

// ── Output: what /logs has, then what comes live, joined by offset in bytes of UTF-8 ──
// What waits here is bytes: as text the same would be there twice or three times over, until the
// browser gets round to collecting it.
const MAX_QUEUE = 16e6; // bytes; what is older is not shown
const SLICE = 16384; // bytes; as much is taken at once, so that SLICE_MS is kept
const SLICE_MS = 20; // of each frame; a click waits for one frame, and is seen after the next
const DRAW_MS = 100; // from one drawing of a flood to the next
const FLOOD = 32768; // bytes in one frame, which nobody can read
const AHEAD = 16384; // bytes of a flood's end that are shown before their turn
const encoder = new TextEncoder();
const ANSWER_MS = 5000; // older questions of programs are not answered: who asked has gone on
class Stream {
  // queue: what is to be shown, in order; waiting: events that came while /logs is read
  constructor(task) {
    this.task = task;
    this.next = 0; // offset of the output that is not here yet
    this.waiting = null;
    this.queue = [];
    this.queued = 0;
    this.ends = 0; // of lines, in the queue
    this.decoder = new TextDecoder("utf-8", { ignoreBOM: true }); // a byte order mark stays
    this.isPumping = false;
    this.arrived = 0; // bytes, since the last frame
    this.drawn = 0; // when it was last drawn
    this.ahead = 0; // offset of the end of what is shown before its turn
    this.terminal = task.tty ? new Terminal(task.cols, task.rows) : new Terminal(0, 0);
    view.show(this.terminal);
  }
  async refill() {
    // piece by piece: there may be megabytes
    this.isStale = !!this.waiting; // then it is read once more
    if (this.isStale) return;
    const waiting = (this.waiting = []);
    // All output of a task that was started just now is new, in whatever way it is read.
    const isNew = isRecent(this.task.started);
    try {
      const path = `logs?id=${this.task.task_id}&offset=${this.next}&raw`;
      const { body, headers } = await api(path, { form: "" });
      const start = Number(headers.get("X-Offset"));
      const lost = start - this.next;
      this.next = start;
      if (lost) this.push({ note: `${bytes(lost)} of output before this are no longer kept` });
      const reader = body.getReader();
      for (let part; stream === this && !(part = await reader.read()).done;) {
        this.add(part.value, 0, isNew);
      }
      reader.cancel();
    } catch (error) {
      this.push({ note: `Not read: ${error.message}` });
      this.next = Math.max(this.next, waiting[0]?.offset ?? 0);
    }
    this.waiting = null;
    if (stream !== this) return;
    waiting.forEach((event) => this.take(event));
    if (this.isStale) this.refill();
  }
  take(event) {
    if (event.offset > this.next && !this.waiting) this.refill();
    if (this.waiting) {
      // one that falls off here will be missed, and read again
      if (this.waiting.push(event) > 256) this.waiting.shift();
      return;
    }
    if (event.type === "task_resize") return this.push({ size: [event.cols, event.rows] });
    const data = encoder.encode(event.output).subarray(this.next - event.offset);
    if (data.length) this.add(data, event.timestamp, isRecent(event.timestamp));
  }
  // Output that goes on at this.next. Time is 0 where it is not known.
  add(data, time, isNew) {
    const { task } = this;
    const isLive = isNew && this.next >= task.read; // else it was here before, and was answered
    this.next += data.length;
    task.read = Math.max(task.read, this.next);
    this.push({ data, time, isLive });
  }
  push(item) {
    this.queue.push(item);
    this.arrived += item.data?.length ?? 0;
    this.count(item.data, 1);
    while (this.queued > MAX_QUEUE && this.queue.length > 2) {
      const { data, size } = this.queue.shift();
      this.count(data, -1);
      if (size) this.terminal.resize(...size);
      this.isHasty = true;
    }
    this.pump();
  }
  count(data = [], sign) {
    this.queued += sign * data.length;
    this.ends += sign * countEnds(data);
  }
  pump() {
    // some milliseconds at a time, so that the page stays alive; nothing while nobody looks
    if (this.isPumping || !this.queue.length || document.hidden) return;
    this.isPumping = true;
    requestAnimationFrame(() => {
      this.isPumping = false;
      if (stream !== this) return;
      const begin = performance.now();
      const end = begin + SLICE_MS;
      // In a flood, taking what comes goes first: most of what waits will never be seen.
      const isFlood = this.arrived > FLOOD && this.queued < MAX_QUEUE / 2;
      this.arrived = 0;
      if (isFlood || this.ahead) this.lookAhead();
      if (isFlood && begin - this.drawn < DRAW_MS) return this.pump();
      while (this.queue.length && performance.now() < end) this.step();
      if (this.ahead && !(view.follow && this.done < this.ahead)) this.endLookAhead();
      if (!this.queue.length || end - this.drawn > DRAW_MS) {
        view.render();
        this.drawn = end;
      }
      this.pump();
    });
  }
  // The offset of what has not been written to the terminal yet.
  get done() {
    return this.next - this.queued;
  }
  // A browser passes on less than the server sends. So that the newest lines of a flood are on the
  // screen at once, /logs is asked for them; they stay until all before them has come too.
  async lookAhead() {
    if (this.isLooking || this.task.tty || !view.follow || view.selectedLines()[0]) return;
    this.isLooking = true;
    try {
      const path = `logs?id=${this.task.task_id}&tail=${AHEAD}&raw`;
      const response = await api(path, { form: "" });
      const text = await response.text();
      if (stream === this && view.follow && this.done < response.headers.get("X-Offset")) {
        const terminal = new Terminal(0, 0);
        terminal.write(text.slice(text.indexOf("\n") + 1), 0);
        view.show(terminal);
        this.ahead = Number(response.headers.get("X-Next-Offset"));
      }
    } catch {
      // then these lines come when it is their turn
    }
    this.isLooking = false;
  }
  endLookAhead() {
    const { follow } = view;
    this.ahead = 0;
    view.show(this.terminal);
    view.follow = follow;
  }
  step() {
    const item = this.queue[0];
    const { data = [], time, size, isLive, note } = item;
    const { terminal, task } = this;
    if (this.isHasty) {
      this.decoder.decode(); // the rest of a character may be gone
      this.print("Some output was too fast to show here; Download has it");
    }
    this.isHasty = false;
    if (size) terminal.resize(...size);
    if (note) this.print(note);
    if (data.length > SLICE) item.data = data.subarray(SLICE);
    else this.queue.shift();
    if (!data.length) return;
    const part = data.subarray(0, SLICE);
    const text = this.decoder.decode(part, { stream: true });
    terminal.reply = isLive ? (said) => answer(task, said) : () => {};
    this.count(part, -1);
    if (this.ends > MAX_LINES) terminal.pass(text, time);
    else terminal.write(text, time);
  }
  print(note) {
    const { terminal } = this;
    if (!terminal.row().isEmpty) terminal.newLine();
    terminal.row().isNote = true;
    terminal.print(note);
    terminal.newLine();
  }
}
function isRecent(timestamp) {
  return Date.now() + skew - timestamp < ANSWER_MS;
}
// What a terminal answers by itself. Every page that shows it does so, and the server passes on
// one answer: of who typed last, or else of who started the task, whom the ref tells.
function answer(task, data) {
  if (task.state !== "running" || !mayRun) return;
  const { task_id } = task;
  send({ type: "task_input", task_id, data, automatic: true, ref: started.get(task_id) });
}

// ── At a glance ──
const MIB = 1 << 20;
const past = []; // [timestamp, cpu, ram_used, net_recv, net_sent]
function bytes(count) {
  const unit = clamp(Math.floor(Math.log2(count) / 10), 0, 4);
  const value = count / 1024 ** unit;
  return `${value.toFixed(unit && value < 100 ? 1 : 0)} ${["", "Ki", "Mi", "Gi", "Ti"][unit]}B`;
}
function span(ms) {
  const s = Math.max(0, Math.floor(ms / 1000));
  const days = Math.floor(s / 86400);
  if (s < 10) return ms < 1000 ? `${Math.max(0, ms)} ms` : `${(ms / 1000).toFixed(1)} s`;
  if (s < 3600) return s < 60 ? `${s} s` : `${Math.floor(s / 60)} m ${two(s % 60)} s`;
  return `${days ? `${days} d ` : ""}${Math.floor(s / 3600) % 24} h ${two((s / 60) % 60)} m`;
}
function formatTime(timestamp, end = 19) {
  // local; with 23 to the millisecond
  const zone = new Date(timestamp).getTimezoneOffset() * 60000;
  return new Date(timestamp - zone).toISOString().slice(11, end);
}
// With the day where that is not today.
function formatMoment(timestamp) {
  const day = new Date(timestamp).toDateString().slice(4, 10);
  const isToday = day === new Date(Date.now() + skew).toDateString().slice(4, 10);
  return isToday ? formatTime(timestamp) : `${day} ${formatTime(timestamp)}`;
}
function showStats(event) {
  const of = (used, total) => (total ? `${bytes(used * MIB)} of ${bytes(total * MIB)}` : "none");
  const { cpus, ram_used, ram_total, swap_used, swap_total, disk_used, disk_total } = event;
  const texts = {
    host: event.hostname,
    uptime: `up ${span(event.uptime * 1000)}`,
    cpu: `${event.cpu.toFixed(1)} %`,
    "cpu-more": `${cpus} ${cpus === 1 ? "core" : "cores"}`,
    ram: `${Math.round((100 * ram_used) / ram_total)} %`,
    "ram-more": of(ram_used, ram_total),
    recv: `↓ ${bytes(event.net_recv)}/s`,
    "net-more": `↑ ${bytes(event.net_sent)}/s`,
    disk: of(disk_used, disk_total),
    swap: of(swap_used, swap_total),
    load: event.load_avg.map((load) => load.toFixed(2)).join(" · "),
  };
  for (const [id, text] of Object.entries(texts)) say(id, text);
  $("disk-bar").value = disk_used / disk_total;
  $("swap-bar").value = swap_used / (swap_total || 1);
  $("load-bar").value = event.load_avg[0] / cpus;
  drawCharts(ram_total);
}
function drawChart(id, top, ...columns) {
  // x is time, so a time without samples stays empty
  const newest = past.at(-1)?.[0] ?? 0;
  const rows = past.filter(([time]) => time > newest - 600000);
  const high = top || 1.15 * Math.max(1024, ...rows.flatMap((row) => columns.map((n) => row[n])));
  const place = (time) => (600 + (time - newest) / 1000).toFixed(1);
  const paths = columns.map((column) =>
    rows
      .map((row, i) => {
        const move = i && row[0] - rows[i - 1][0] < 15000 ? "L" : "M";
        const y = 98 - Math.min(96, (96 * row[column]) / high);
        return `${move}${place(row[0])} ${y.toFixed(1)}`;
      })
      .join(""),
  );
  const start = rows.length ? place(rows[0][0]) : 600;
  const area = `M${start} 98${paths[0].replaceAll("M", "L")}L600 98Z`;
  [area, ...paths].forEach((d, n) => $(id).children[n].setAttribute("d", d));
}
function drawCharts(ramTotal) {
  drawChart("cpu-chart", 100, 1);
  drawChart("ram-chart", ramTotal, 2);
  drawChart("net-chart", 0, 3, 4);
}
function notice(text) {
  say("words", text);
  $("notice").hidden = !text;
}
function setLink(text, look) {
  // also as a coloured dot and the title, for who looks at other tabs
  const canvas = make("canvas", { width: 32, height: 32 });
  const pen = canvas.getContext("2d");
  const mark = alerting ? "⚠ " : look === "bad" ? "✕ " : "";
  say("link", text);
  $("link").className = `badge ${look}`;
  pen.fillStyle = alerting ? "#d9222e" : ({ good: "#2a9d46", bad: "#8a929b" }[look] ?? "#4a90e2");
  pen.arc(16, 16, 13, 0, 7);
  pen.fill();
  $("icon").href = canvas.toDataURL();
  document.title = `${mark}${info?.hostname ?? "ServerControl"}`;
}
function describeAlert({ type, message, cpu, duration_ms }) {
  if (type === "cpu_alert") return `${message} (${cpu} %)`;
  return `CPU is back at ${cpu} % after ${span(duration_ms)}`;
}
// The newest alerts as the server keeps them, each with its end.
function showAlerts(alerts) {
  alerting = false;
  show("banner", "");
  say("alert-count", "0");
  $("alert-list").replaceChildren(
    make("li", { className: "dim" }, "No alert since the server was started."),
  );
  for (const alert of alerts) {
    takeAlert(alert);
    if (alert.resolved) takeAlert(alert.resolved);
  }
}
function takeAlert(event) {
  const list = $("alert-list");
  const count = $("alert-count");
  const text = describeAlert(event);
  alerting = event.type === "cpu_alert";
  const className = alerting ? "bad" : "good";
  const time = make("time", { className: "dim" }, formatMoment(event.timestamp));
  if (!list.querySelector("time")) list.replaceChildren();
  list.prepend(make("li", {}, time, make("span", { className }, ` ${text}`)));
  if (list.children.length > 200) list.lastChild.remove();
  show("banner", alerting ? `${event.hostname}: ${text}` : "");
  count.textContent = Number(count.textContent) + alerting;
  count.classList.toggle("bad", alerting);
  setLink($("link").textContent, $("link").className.slice("badge ".length));
}
// Takes a new alert, and tells it on the desktop if that was asked for.
function hearAlert(event) {
  takeAlert(event);
  if (window.Notification?.permission !== "granted") return;
  try {
    new Notification(event.hostname, { body: describeAlert(event) });
  } catch {
    /* phones cannot do that */
  }
}
function showServer() {
  const why = !info.exec
    ? "Monitor only: the server was started with --no-exec."
    : info.role !== "run"
      ? "View only: this token may watch, but not run, stop or type."
      : "";
  mayRun = !why;
  show("role", !info.exec ? "monitor only" : mayRun ? "may run" : "view only");
  show("readonly", why);
  say("host", info.hostname);
  $("logout").hidden = !token;
  $("run").hidden = !mayRun;
  const off = Math.abs(skew);
  const way = skew > 0 ? "behind" : "ahead of";
  const isKept = remember("probe", "1");
  const warnings = [
    info.warning && `Warning: ${info.warning}.`,
    off > 120000 && `This device's clock is ${span(off)} ${way} the server's: set it.`,
    !isKept && "This browser keeps nothing for this page: allow it to store data for this site.",
  ].filter(Boolean);
  if (warnings.length) notice(warnings.join(" "));
  showDetail();
}

// ── Tasks ──
function describe({ state, stopping, signal, exit_code: code }) {
  // [words, look]
  if (state === "running") return stopping ? [stopping, "warn"] : ["running", "busy"];
  if (state === "lost") return ["lost: its end is unknown", "warn"];
  if (state === "timeout") return ["stopped: time was up", "bad"];
  if (state === "killed") return [`stopped by ${signal ?? "us"}`, "warn"];
  if (signal) return [`died by ${signal}`, "bad"];
  return code ? [`failed, exit ${code}`, "bad"] : ["done", "good"];
}
function lasted({ started, ended }) {
  return span((ended ?? Date.now() + skew) - started);
}
function takeTask(fields) {
  const known = tasks.get(fields.task_id);
  if (known?.isGone) dropTask(known);
  else if (known) return known.ended || update(known, fields);
  const parts = ["code", "span", "small", "small"].map((tag) => make(tag));
  const button = make("button", { type: "button" }, ...parts);
  // read: output up to here was shown; sizes: of its terminal, that this page has asked for
  const task = { ...fields, row: make("li", {}, button), read: 0, sizes: [] };
  button.onclick = () => select(task);
  tasks.set(task.task_id, task);
  $("tasks").prepend(task.row);
  for (const old of tasks.size > 400 ? [...tasks.values()].slice(0, 100) : []) {
    if (old.state !== "running" && old !== stream?.task) dropTask(old);
  }
  update(task, {});
  if (task.task_id === wanted) select(task);
}
function dropTask(task) {
  task.row.remove();
  tasks.delete(task.task_id);
  countTasks();
}
// The server has it no more. The output that is shown stays on the page.
function loseTask(task) {
  if (task !== stream?.task) return dropTask(task);
  task.isGone = true;
  if (task.state === "running") update(task, { state: "lost" });
}
// What is read is what was run: shows characters that are invisible or turn the direction of
// text. Joiners stay where they join, in emoji and scripts that need them.
function makeVisible(text) {
  const joiner = "((?<=[^\\0-\\x7f])[\\u200c\\u200d](?=[^\\0-\\x7f]))";
  const odd = new RegExp(`${joiner}|[\\p{Cc}\\p{Cf}\\p{Cs}\\u2028\\u2029]`, "gu");
  return text
    .replaceAll("\n", " ⏎ ")
    .replaceAll("\t", " ")
    .replace(odd, (char, kept) => kept ?? `\\u{${char.codePointAt(0).toString(16)}}`);
}
function update(task, fields) {
  Object.assign(task, fields);
  const [code, state, by, time] = task.row.firstChild.children;
  const [words, look] = describe(task);
  code.textContent = makeVisible(task.name ?? task.command);
  time.textContent = lasted(task);
  state.textContent = words;
  state.className = `badge ${look}`;
  const kind = task.tty ? " · terminal" : "";
  by.textContent = `#${task.task_id} · ${formatMoment(task.started)}${kind} · ${task.by}`;
  task.row.hidden = !isWanted(task);
  countTasks();
  if (task === stream?.task) showDetail();
}
// ── Finding a task ──
const KINDS = {
  all: () => true,
  running: (task) => task.state === "running",
  failed: (task) => describe(task)[1] === "bad" || task.state === "lost",
};
let [kindShown = "all", textShown = ""] = recallList("filter");
function isWanted(task) {
  const { task_id, command, name, by } = task;
  const text = `#${task_id} ${name ?? ""} ${command} ${by}`.toLowerCase();
  return KINDS[kindShown](task) && text.includes(textShown.toLowerCase());
}
function countTasks() {
  const all = [...tasks.values()];
  const [running, failed] = [KINDS.running, KINDS.failed].map((is) => all.filter(is).length);
  say("task-count", `${running} running, ${all.length} in all`);
  say("failed", failed ? `Failed ${failed}` : "Failed");
  const isEmpty = !all.some((task) => !task.row.hidden);
  const why = all.length
    ? "No task is like that."
    : "No task yet. What anybody runs here shows up.";
  show("no-tasks", isEmpty ? why : "");
}
function filterTasks(kind, text) {
  kindShown = kind in KINDS ? kind : "all";
  textShown = text;
  for (const name of Object.keys(KINDS)) $(name).ariaPressed = String(name === kindShown);
  for (const task of tasks.values()) task.row.hidden = !isWanted(task);
  $("filter").value = text;
  remember("filter", JSON.stringify([kindShown, textShown]));
  countTasks();
}

// ── The task that is shown ──
function select(task) {
  const isMine = wanted === task.task_id && started.has(wanted);
  wanted = "";
  if (task === stream?.task) return;
  const { task_id } = task;
  if (findInAddress("task") !== task_id) history.pushState(null, "", addressOf(task_id));
  stream?.task.row.firstChild.removeAttribute("aria-current");
  task.row.firstChild.setAttribute("aria-current", "true");
  document.body.classList.add("reading");
  stream = new Stream(task);
  showDetail();
  layOut();
  if (!watch() || task.isGone) stream.refill();
  if (!isMine || !task.tty) return;
  takeSize();
  $("keys").focus();
}
function closeTask() {
  stream?.task.row.firstChild.removeAttribute("aria-current");
  stream = null;
  document.body.classList.remove("reading");
  view.show(new Terminal(0, 0));
  showDetail();
  watch();
}
function showDetail() {
  const task = stream?.task;
  const isOn = task?.state === "running";
  const [words, look] = task ? describe(task) : [""];
  const facts = task && [
    `#${task.task_id}`,
    `pid ${task.pid}`,
    task.by,
    formatMoment(task.started),
    lasted(task),
    task.tty && `${task.cols} × ${task.rows}`,
    task.killed_by && `stopped by ${task.killed_by}`,
  ];
  const command = makeVisible(task?.command ?? "");
  say("facts", facts?.filter(Boolean).join(" · ") ?? "");
  $("facts").title = $("facts").textContent;
  say("title", command || "Output");
  $("title").title = command;
  show("state", words);
  $("state").className = `badge ${look}`;
  $("no-output").hidden = !!task;
  $("stop").disabled = $("signals").disabled = !isOn || !mayRun;
  say("stop", isOn && task.stopping ? "Kill now" : "Stop");
  $("rerun").disabled = !task || !mayRun;
  $("copy").disabled = $("download").disabled = $("whole").disabled = !task;
  const isPhone = matchMedia("(pointer: coarse), (max-width: 52rem)").matches;
  const isLeft = document.activeElement === $("keys");
  $("keys").hidden = !task?.tty || !isOn || !mayRun;
  $("keybar").hidden = $("keys").hidden || !isPhone;
  const isFitting = task?.isTypedHere || (task?.cols === view.cols && task?.rows === view.fits);
  $("fit").hidden = $("keys").hidden || isFitting;
  // A terminal that has ended takes no keys: they go on in the command line, if that is there.
  const isThere = (id) => $(id).getClientRects().length;
  if (isLeft && $("keys").hidden) $(["command", "output"].find(isThere) ?? "back").focus();
}
// Starts a task, which is opened once the server tells of it. Returns what went wrong.
async function start(path, ref, body) {
  try {
    const { task_id, not_repeated } = await api(path, { body });
    started.set(task_id, ref);
    wanted = task_id;
    if (tasks.has(wanted)) select(tasks.get(wanted));
    if (not_repeated) notice("What was typed into the task before is not typed again.");
    return "";
  } catch (error) {
    return error.message;
  }
}
function makeRef() {
  return crypto.getRandomValues(new Uint32Array(4)).join("-");
}
function run(fields) {
  const ref = makeRef();
  const body = { ...Object.fromEntries(Object.entries(fields).filter(([, value]) => value)), ref };
  // The window is measured as it will be: on a phone the list hides the output until then.
  const { classList } = document.body;
  classList.add("reading");
  view.measure();
  classList.toggle("reading", !!stream);
  if (body.tty) Object.assign(body, { cols: view.cols, rows: view.fits });
  return start("exec", ref, body);
}
async function runAgain() {
  const ref = makeRef();
  const problem = await start(`exec?again=${stream.task.task_id}&ref=${ref}`, ref, {});
  if (problem) notice(`It could not be run again: ${problem}`);
}
async function stop(name) {
  const { task } = stream;
  update(task, { stopping: name === "KILL" ? "killing…" : "stopping…" });
  try {
    await api(`kill?id=${task.task_id}&signal=${name}`, { method: "POST" });
  } catch (error) {
    // 409: it has ended meanwhile
    update(task, { stopping: "" });
    if (error.status !== 409) notice(`Not stopped: ${error.message}`);
  }
}
async function copy() {
  const { lines, isLog } = stream.terminal;
  const text = joinLines(lines);
  const value = isLog ? text.slice(0, -1) : text.replace(/\n+$/, "\n");
  const area = make("textarea", { value });
  const focused = document.activeElement;
  try {
    await navigator.clipboard.writeText(value);
  } catch {
    // browsers offer that on localhost and over https only
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
    focused.focus();
  }
  say("spoken", "Copied");
  say("copy", "Copied");
  setTimeout(say, 1500, "copy", "Copy");
}
async function download() {
  const id = stream.task.task_id;
  try {
    const href = URL.createObjectURL(await api(`logs?id=${id}&raw`, { form: "blob" }));
    make("a", { href, download: `task-${id}.txt` }).click();
    setTimeout(URL.revokeObjectURL, 60000, href);
  } catch (error) {
    notice(`The output could not be fetched: ${error.message}`);
  }
}

// ── Typing into a terminal ──
const ARROWS = {
  ArrowUp: "A",
  ArrowDown: "B",
  ArrowRight: "C",
  ArrowLeft: "D",
  Home: "H",
  End: "F",
  F1: "P",
  F2: "Q",
  F3: "R",
  F4: "S",
};
const TILDES = {
  Insert: 2,
  Delete: 3,
  PageUp: 5,
  PageDown: 6,
  F5: 15,
  F6: 17,
  F7: 18,
  F8: 19,
  F9: 20,
  F10: 21,
  F11: 23,
  F12: 24,
};
const PLAIN = { Enter: "\r", Tab: "\t", Backspace: "\x7f", Escape: "\x1b" };
// What Ctrl takes a key for, before it makes a control character of it, as in xterm.
const CONTROLS = { " ": "@", 2: "@", 3: "[", 4: "\\", 5: "]", 6: "^", 7: "_", "/": "_", 8: "?" };
// What a US keyboard has at a position: without and with Shift.
const POSITIONS = {
  Minus: "-_",
  Equal: "=+",
  BracketLeft: "[{",
  BracketRight: "]}",
  Backslash: "\\|",
  IntlBackslash: "<>",
  Semicolon: ";:",
  Quote: "'\"",
  Comma: ",<",
  Period: ".>",
  Slash: "/?",
  Backquote: "`~",
  Space: "  ",
};
const held = { ctrl: false, alt: false }; // keys of the bar that wait for another
let layout; // from a position to its key without modifiers, where the browser tells
navigator.keyboard?.getLayoutMap?.().then(
  (map) => (layout = map),
  () => {},
);
function keysAt(code = "") {
  if (code.startsWith("Key")) return code[3].toLowerCase() + code[3];
  if (code.startsWith("Digit")) return code[5] + ")!@#$%^&*("[code[5]];
  return POSITIONS[code] ?? "";
}
// Whether Alt left the key what it is. Where it did not (Option on a Mac, Ctrl and Alt in place
// of AltGr), the character is text.
function isUnchanged(key, code) {
  const isLetter = /^[a-z]$/i.test(key) && (!code || code.startsWith("Key"));
  return isLetter || !code || keysAt(code).includes(key) || layout?.get(code) === key;
}
// What a key sends to the program; null: it comes as input, or is the browser's.
function sequence({ key, code, isCtrl, isAlt, isShift }, modes) {
  const modifier = 1 + isShift + 2 * isAlt + 4 * isCtrl;
  const mark = modifier > 1 ? `;${modifier}` : "";
  if (ARROWS[key] && mark) return `\x1b[1${mark}${ARROWS[key]}`;
  if (ARROWS[key]) return (modes[1] || /^F\d/.test(key) ? "\x1bO" : "\x1b[") + ARROWS[key];
  if (TILDES[key]) return `\x1b[${TILDES[key]}${mark}~`;
  if (key === "Tab" && isShift) return "\x1b[Z";
  let text = PLAIN[key] ?? key;
  if (text.length > 1 || (!isCtrl && !isAlt && !PLAIN[key])) return null;
  if (isCtrl && !isAlt && text > "~" && !PLAIN[key]) text = keysAt(code)[isShift ? 1 : 0] ?? text;
  if (isAlt && !PLAIN[key] && !isUnchanged(text, code)) return text;
  if (isCtrl && key === "Backspace") text = "\b";
  if (isCtrl && !PLAIN[key]) {
    text = CONTROLS[text] ?? text.toUpperCase();
    if (!/^[?-_]$/.test(text)) return null; // it stays the browser's
    text = String.fromCharCode(text.charCodeAt(0) ^ 64);
  }
  return isAlt ? `\x1b${text}` : text;
}
// Keys that the browser or this page keeps.
function isOurs({ key, code, keyCode, isComposing, metaKey, ctrlKey, altKey, shiftKey }) {
  if (isComposing || keyCode === 229 || metaKey) return false;
  const letter = key.length === 1 && key > "~" ? keysAt(code)[0] : key.toLowerCase();
  const isLetter = /^[a-z]$/.test(letter);
  return !(ctrlKey && !altKey && isLetter && (shiftKey || letter === "v"));
}
function onKey(event) {
  const { key, code, ctrlKey, altKey, shiftKey: isShift } = event;
  if (!isOurs(event)) return;
  if (key === "Escape" && isShift) return $("stop").focus();
  if (event.getModifierState("AltGraph") && key.length === 1) return;
  const keys = { key, code, isCtrl: ctrlKey || held.ctrl, isAlt: altKey || held.alt, isShift };
  const data = sequence(keys, stream.terminal.modes);
  if (data === null) return;
  event.preventDefault();
  type(data);
}
// Text that came from an input method, or from a phone's keyboard; the bar's Ctrl and Alt hold.
function onText({ target, isComposing }) {
  const { value } = target;
  const isKey = [...value].length === 1 && (held.ctrl || held.alt);
  const isOpen = isComposing && !isKey;
  $("keys").classList.toggle("composing", isOpen);
  if (isOpen) return showComposition();
  target.value = "";
  if (isKey) pressBarKey(value);
  else if (value) type(value.replace(/\n/g, "\r"));
}
// While something is composed it is shown at the cursor, as wide as it is.
function showComposition() {
  const { style, value } = $("keys");
  const cells = [...value].reduce((sum, char) => sum + widthOf(char), 1);
  style.width = `${Math.max(measureText(value, false), cells * font.cell)}px`;
}
// Sends what a person did; says so when it cannot.
function type(data) {
  if (document.activeElement === $("keys")) takeSize();
  const { task_id } = stream.task;
  // a message may have 64 KiB
  for (const part of data.match(/.{1,8192}/gsu) ?? []) {
    const isSent = send({ type: "task_input", task_id, data: part });
    if (!isSent) notice("Offline: what you type is not sent.");
  }
  view.follow = true;
  held.ctrl = held.alt = false;
  for (const button of $("keybar").children) button.ariaPressed = "false";
}

// ── The mouse in a terminal, as xterm's ctlseqs have it: 1000, 1002, 1003 with 1006 ──
const mouse = { button: -1, place: "" }; // what is pressed, and where that was told last
function isReporting({ shiftKey }) {
  const { modes } = stream?.terminal ?? { modes: {} };
  return !shiftKey && !$("keys").hidden && (modes[1000] || modes[1002] || modes[1003]);
}
// Tells the program; code is a button, 64 and 65 the wheel, 32 more while it moves.
function reportMouse(event, code, isUp = false) {
  const { terminal: t } = stream;
  const { left, top } = $("sizer").getBoundingClientRect();
  const x = Math.floor((event.clientX - left) / font.cell);
  const y = Math.floor((event.clientY - top) / view.row) - t.base;
  const place = [x, y].map((at, i) => clamp(at, 0, (i ? t.rows : t.cols) - 1) + 1);
  const keys = 8 * event.altKey + 16 * event.ctrlKey;
  if (code & 32 && mouse.place === place.join()) return;
  mouse.place = place.join();
  if (t.modes[1006]) return type(`\x1b[<${code + keys};${place.join(";")}${isUp ? "m" : "M"}`);
  // Without 1006 a place is one byte, and only those below 128 arrive as they are.
  const bytes = [(isUp ? 3 : code) + keys, ...place].map((number) => number + 32);
  if (Math.max(...bytes) < 128) type(`\x1b[M${String.fromCharCode(...bytes)}`);
}
function onMouseDown(event) {
  if (!isReporting(event) || event.button > 2) return;
  event.preventDefault(); // it would select text
  $("keys").focus();
  mouse.button = event.button;
  reportMouse(event, event.button);
}
function onMouseUp(event) {
  if (mouse.button < 0) return;
  if (isReporting(event)) reportMouse(event, mouse.button, true);
  mouse.button = -1;
}
function onMouseMove(event) {
  const { modes } = stream?.terminal ?? { modes: {} };
  if (!isReporting(event) || !(modes[1003] || (modes[1002] && mouse.button >= 0))) return;
  reportMouse(event, 32 + (mouse.button < 0 ? 3 : mouse.button));
}
// The wheel goes to the program, as arrows on the alternate screen if it does not ask for more.
function onWheel(event) {
  if (!event.deltaY || event.ctrlKey || event.shiftKey || $("keys").hidden) return;
  const { terminal: t } = stream;
  const isDown = event.deltaY > 0;
  const isArrows = t.main && t.modes[1007] !== false;
  if (!isReporting(event) && !isArrows) return;
  event.preventDefault();
  if (isReporting(event)) return reportMouse(event, isDown ? 65 : 64);
  const key = isDown ? "ArrowDown" : "ArrowUp";
  type(sequence({ key, isCtrl: false, isAlt: false, isShift: false }, t.modes).repeat(3));
}
// The cursor is hollow without the focus, and a program that asked (1004) is told.
function onFocus({ type: kind }) {
  const isIn = kind === "focus";
  $("frame").classList.toggle("typing", isIn);
  if (stream?.terminal.modes[1004]) answer(stream.task, isIn ? "\x1b[I" : "\x1b[O");
}
// Name: of a key of the bar.
function pressBarKey(name) {
  const keys = { key: name, isCtrl: held.ctrl, isAlt: held.alt, isShift: false };
  type(sequence(keys, stream.terminal.modes) ?? name);
}
// To the size of the window.
function layOut() {
  const { task } = stream ?? {};
  $("frame").classList.toggle("wrapped", $("wrap").checked && !task?.tty);
  $("frame").classList.toggle("timed", $("times").checked);
  view.measure();
  view.draw();
  if (task?.isTypedHere) takeSize();
  showDetail();
}
// Gives a terminal the size of this window: when somebody types here, or asks for it. Who only
// looks changes nothing, and sees it as large as it is.
function takeSize() {
  const { task } = stream;
  const { cols, fits: rows } = view;
  if (!task.tty || task.state !== "running" || !mayRun) return;
  task.isTypedHere = true;
  const size = `${cols}x${rows}`;
  if (size === (task.sizes.at(-1) ?? `${task.cols}x${task.rows}`)) return;
  const isSent = send({ type: "task_resize", task_id: task.task_id, cols, rows });
  if (isSent) task.sizes.push(size);
}
// The output has the whole window, or not; that is remembered.
function setWhole(isWhole) {
  document.body.classList.toggle("whole", isWhole);
  $("whole").ariaPressed = String(isWhole);
  remember("whole", isWhole ? "1" : "");
}

// ── What people do ──
const runs = recallList("history");
const drafts = {}; // by place in runs: what was changed there, or is being typed, and not run yet
const THEMES = { Auto: "Dark", Dark: "Light", Light: "Auto" };
let runAt = runs.length;
function setTheme(name) {
  document.documentElement.style.colorScheme = name === "Auto" ? "" : name.toLowerCase();
  say("theme", name);
  $("theme").ariaLabel = `Colours: ${name}`;
  remember("theme", name);
  view.recolor();
}
function setCommand(text) {
  $("command").value = text;
  fitCommand();
}
function fitCommand() {
  $("command").rows = Math.min(10, $("command").value.split("\n").length);
}
async function submit() {
  const cmd = $("command").value;
  const tty = $("tty").checked;
  const cwd = $("cwd").value.trim();
  if (!cmd.trim()) return $("command").focus();
  setCommand("");
  const problem = await run({ cmd, tty, cwd, timeout: Number($("timeout").value) });
  show("run-error", problem);
  if (problem) return setCommand([cmd, $("command").value].filter(Boolean).join("\n"));
  if (runs.at(-1) !== cmd) runs.push(cmd);
  runs.splice(0, runs.length - 200);
  runAt = runs.length;
  for (const at of Object.keys(drafts)) delete drafts[at];
  remember("history", JSON.stringify(runs));
}
function onCommandKey(event) {
  const { key, target, ctrlKey, shiftKey, isComposing, keyCode } = event;
  const old = drafts[runAt] ?? runs[runAt];
  const isSingle = !target.value.includes("\n");
  const step = { ArrowUp: -1, ArrowDown: 1 }[key];
  const isStep = step && (isSingle || old === target.value);
  const isEnter = key === "Enter" && !isComposing && keyCode !== 229; // which confirms a candidate
  const isRun = isEnter && !shiftKey && (isSingle || ctrlKey);
  if (!isRun && !isStep) return;
  event.preventDefault();
  if (isRun) return submit();
  drafts[runAt] = target.value;
  runAt = clamp(runAt + step, 0, runs.length);
  setCommand(drafts[runAt] ?? runs[runAt] ?? "");
}
async function askForNotifications() {
  const { Notification: told, isSecureContext } = window;
  const answer = isSecureContext ? await told?.requestPermission() : "insecure";
  const words = {
    granted: "Notifications are on",
    insecure: "Browsers notify only for https and localhost",
    denied: "Blocked: allow them in this site's settings",
    default: "Not decided: click once more to be asked",
  };
  say("notify", words[answer] ?? "This browser cannot notify");
}
function logIn(event) {
  event.preventDefault();
  const [found, problem] = checkToken($("token").value);
  show("login-error", problem);
  if (problem) return;
  token = found;
  remember("token", token, $("keep").checked ? browserStorage : tabStorage);
  $("token").value = "";
  $("login").close();
  connect();
}
const HANDLERS = {
  "run submit": (event) => {
    event.preventDefault();
    submit();
  },
  "command input": fitCommand,
  "command keydown": onCommandKey,
  "bell click": () => {
    $("bell").ariaExpanded = !($("alerts").hidden = !$("alerts").hidden);
  },
  "notify click": askForNotifications,
  "theme click": () => setTheme(THEMES[$("theme").textContent]),
  "logout click": () => {
    for (const storage of [tabStorage, browserStorage]) remember("token", "", storage);
    location.reload();
  },
  "login cancel": (event) => event.preventDefault(),
  "dismiss click": () => notice(""),
  "login-form submit": logIn,
  "trouble-again click": () => {
    wait = 500;
    connect();
  },
  "filter input": ({ target }) => filterTasks(kindShown, target.value),
  "filters click": ({ target }) => {
    if (target.id in KINDS) filterTasks(target.id, textShown);
  },
  "stop click": () => stop(stream.task.stopping ? "KILL" : "TERM"),
  "signal-menu beforetoggle": () => {
    const { left, bottom } = $("stop").getBoundingClientRect();
    Object.assign($("signal-menu").style, { left: `${left}px`, top: `${bottom + 4}px` });
  },
  "signal-menu click": ({ target }) => {
    if (target.dataset.signal) stop(target.dataset.signal);
    $("signal-menu").hidePopover();
  },
  "whole click": () => setWhole(!document.body.classList.contains("whole")),
  "fit click": () => {
    takeSize();
    $("keys").focus();
  },
  "copy click": copy,
  "download click": download,
  "back click": () => {
    history.pushState(null, "", addressOf(""));
    closeTask();
  },
  "rerun click": runAgain,
  "times change": layOut,
  "wrap change": layOut,
  "find input": () => view.find(0),
  "previous click": () => view.find(-1),
  "next click": () => view.find(1),
  "find keydown": ({ key, shiftKey }) => {
    if (key === "Enter") view.find(shiftKey ? -1 : 1);
  },
  "output scroll": ({ target: { scrollHeight, scrollTop, clientHeight } }) => {
    if (view.follow && scrollTop === view.top) return; // it was the view itself that scrolled
    view.follow = scrollHeight - scrollTop - clientHeight < view.row;
    view.draw();
  },
  "output click": () => {
    if (getSelection().isCollapsed) $("keys").focus();
  },
  "output keydown": ({ key, target }) => {
    if (key === "Enter" && target.id === "output") $("keys").focus();
  },
  "tail click": () => {
    view.follow = true;
    view.draw();
  },
  "keys keydown": onKey,
  "keys input": onText,
  "keys compositionend": ({ target }) => onText({ target, isComposing: false }),
  "keys focus": onFocus,
  "keys blur": onFocus,
  "output mousedown": onMouseDown,
  "output mousemove": onMouseMove,
  "output contextmenu": (event) => {
    if (isReporting(event)) event.preventDefault();
  },
  "keys paste": (event) => {
    const text = event.clipboardData.getData("text").replace(/\r?\n/g, "\r").replaceAll("\x1b", "");
    event.preventDefault();
    type(stream.terminal.modes[2004] ? `\x1b[200~${text}\x1b[201~` : text);
  },
};
for (const [name, handler] of Object.entries(HANDLERS)) {
  $(name.split(" ")[0]).addEventListener(name.split(" ")[1], handler);
}
for (const button of $("keybar").children) {
  // its words are names of keys
  const name = button.ariaLabel ?? button.textContent;
  const lower = name.toLowerCase();
  button.onpointerdown = (event) => event.preventDefault(); // so the phone's keyboard stays open
  button.onclick = () => {
    if (lower in held) button.ariaPressed = String((held[lower] = !held[lower]));
    else pressBarKey(name);
  };
}
setInterval(() => {
  // running tasks get older
  if (document.hidden) return;
  for (const task of tasks.values()) if (task.state === "running") update(task, {});
}, 1000);
addEventListener("mouseup", onMouseUp);
$("output").addEventListener("wheel", onWheel, { passive: false });
// What is copied by a key or the menu is what was written, not what is on the page.
addEventListener("copy", (event) => {
  const text = view.selectedText();
  if (!text) return;
  event.preventDefault();
  event.clipboardData.setData("text/plain", text);
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => view.recolor());
new ResizeObserver(layOut).observe($("frame"));
// What a phone's keyboard leaves of the window, where the page is not told otherwise (iOS).
visualViewport?.addEventListener("resize", () => {
  const { scale, height } = visualViewport;
  if (scale === 1) document.body.style.setProperty("--tall", `${height}px`);
});
addEventListener(
  "keydown",
  (event) => {
    if (event.key !== "Enter" || !event.ctrlKey || !event.shiftKey) return;
    event.preventDefault();
    event.stopPropagation();
    $("whole").click();
  },
  true,
);
addEventListener("popstate", () => {
  if (takeTokenFromAddress()) location.reload();
  else openAddress();
});
addEventListener("online", onVisible);
document.addEventListener("visibilitychange", onVisible);
// Nothing is heard or drawn while nobody looks, or without a network; it is made up for.
async function onVisible() {
  watch();
  if (document.hidden || !info) return;
  connect();
  stream?.pump();
  const { samples } = await api("stats?history").catch(() => ({ samples: past }));
  past.splice(0, Infinity, ...samples);
  drawCharts();
}
setTheme(recall("theme") || "Auto");
setWhole(!!recall("whole"));
takeTokenFromAddress();
filterTasks(kindShown, textShown);
view.measure();
view.show(new Terminal(0, 0));
showDetail();
connect();
"""


def strip_source(source: str) -> str:
    """Return a constant of the page without indentation and comments."""
    comments = r"^ *(?://.*|/\*.*\*/)?\n?| // .*$| */\*.*\*/$"
    return re.sub(comments, "", source, flags=re.MULTILINE)


def hash_source(source: str) -> str:
    """Return what a policy calls an inline script or style (CSP 3, 2.3.1)."""
    digest = hashlib.sha256(source.encode("utf-8")).digest()
    return "'sha256-" + base64.b64encode(digest).decode("ascii") + "'"


class Page:
    """The dashboard. Nothing is computed before it is asked for."""

    @functools.cached_property
    def body(self) -> bytes:
        """The page in UTF-8."""
        page = strip_source(HTML).replace("<style>", "<style>" + strip_source(CSS))
        return page.replace("<script>", "<script>" + strip_source(JS)).encode("utf-8")

    @functools.cached_property
    def compressed(self) -> bytes:
        """The same for those who take gzip."""
        compressor = zlib.compressobj(9, zlib.DEFLATED, 16 + zlib.MAX_WBITS)  # RFC 1952
        return compressor.compress(self.body) + compressor.flush()

    @functools.cached_property
    def _sources(self) -> str:
        script, style = (hash_source(strip_source(source)) for source in (JS, CSS))
        return f"script-src {script}; style-src {style}; img-src data:"

    def policy(self, host: str | None) -> str:
        """Return the Content-Security-Policy for a page that was asked for by this Host."""
        # Some browsers do not take 'self' for WebSockets. A proxy may make wss of ws. An IPv6
        # address cannot be written in a policy; there 'self' must do.
        named = host is not None and "[" not in host
        connect = f"'self' ws://{host} wss://{host}" if named else "'self'"
        return f"default-src 'none'; {self._sources}; connect-src {connect}; {NO_FRAMES}"


# 19. Command line ---
# Makes a Config from options and environment, builds the objects in their order, and returns the
# exit status.

FLAG_ON, FLAG_OFF = ("1", "true", "yes", "on"), ("0", "false", "no", "off", "")


def parse_shell(text: str) -> str:
    """Return a path as an absolute one: tasks run in other folders. A name is found in PATH."""
    return os.path.abspath(text) if "/" in text else text


def parse_size(text: str) -> int:
    """Return the number of bytes that a text such as 512K, 8M or 1GiB means."""
    match = re.fullmatch(r"([0-9]+)\s*(|[kKmMgG])(i?[bB])?", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 8MiB")
    return int(match[1]) * int(1024 ** " kmg".index(match[2].lower() or " "))


def parse_number(low: float, high: float, whole: str = "") -> Callable[[str], Any]:
    """Return a check for argparse. whole: what an error calls a number that must be whole."""

    def parse(text: str) -> float:
        value = math.nan
        with suppress(ValueError):
            value = float(text)
        if not low <= value <= high or whole and not DIGITS.fullmatch(text):
            what = whole or f"a number, {low:g} to {high:g}"
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
        return int(text) if whole else value

    return parse


parse_port = parse_number(0, 65535, "a port (0 to 65535)")
parse_count = parse_number(1, math.inf, "a whole number from 1 on")
parse_timeout = parse_number(0, MAX_TIMEOUT_SECONDS)
parse_percent = parse_number(0, 100)


def parse_host_option(text: str) -> str:
    """For argparse."""
    if not text.strip("[]"):
        raise argparse.ArgumentTypeError("an address is missing")
    return text


def parse_origin(text: str) -> str:
    """For argparse: `scheme://host[:port]` (RFC 6454, 6.2)."""
    if text not in OPAQUE_ORIGINS and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s]+", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not an origin such as https://example.org")
    return text


def parse_webhook_option(text: str) -> str:
    """For argparse. Errors do not show the URL, since it may be secret."""
    try:
        is_tls = parse_webhook_url(text).is_tls
    except (ValueError, HttpError):
        message = "this is not a URL such as https://example.org/alerts"
        raise argparse.ArgumentTypeError(message) from None
    if is_tls and ssl is None:
        raise argparse.ArgumentTypeError("this Python was built without OpenSSL")
    return text


def suggest(word: str, known: Iterable[str]) -> str:
    """Return the end of an error message: what was probably meant."""
    import difflib  # takes 5 ms, and only mistakes need it

    if DIGITS.fullmatch(word):
        return f"; did you mean --port {word}?"
    start = word if word.startswith("--") else "-" + word
    near = [one for one in known if one.startswith(start)][:3]
    near = near or difflib.get_close_matches(word, known, 1)
    return f"; did you mean {' or '.join(near)}?" if near else ""


class OneLineParser(argparse.ArgumentParser):
    """Its errors are one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Raises ConfigError."""
        message = message.replace("argument ", "", 1)
        if message.startswith("unrecognized"):
            word = re.split("[ =]", message.partition(": ")[2])[0]
            message += suggest(word, self._option_string_actions) + " (see --help)"
        raise ConfigError("".join(c if c.isprintable() else repr(c)[1:-1] for c in message))

    def _print_message(self, message: str, file: Any = None) -> None:  # help, and the version
        write_output(message.encode())


# Option -> (help; function that checks the value, or the allowed values; placeholder; default, if
# Config has none). An option that has only help is a flag. If its default is a list or a tuple, it
# may be repeated. A key without anything is the title of the options below it.
OPTIONS: Options = {
    "where to listen": (),
    "--host": ("listen here; beyond loopback a token is needed", parse_host_option, "ADDRESS"),
    "--port": ("HTTP port; 0 is any", parse_port, "N"),
    "--ws-port": ("WebSocket port; both ports speak both protocols", parse_port, "N"),
    "--discovery-port": ("UDP port for discovery", parse_port, "N"),
    "--no-discovery": ("answer no discovery probes",),
    "--unix": ("listen on this Unix socket too, for this account", str, "PATH"),
    "--tls-cert": ("https and wss with this certificate chain (PEM)", str, "FILE"),
    "--tls-key": ("its private key, if that is not in the same file", str, "FILE"),
    "who may connect": (),
    "--token-file": ("has the token of the role run (default: made and kept)", str, "FILE"),
    "--view-token-file": ("has the token of the role view, which only watches", str, "FILE"),
    "--require-token": ("ask for it on loopback too",),
    "--no-auth": ("let everybody in who can connect: they own this account!",),
    "--no-exec": ("monitor only: nothing can be run or killed",),
    "--allow-origin": ("let pages of https://example.org in", parse_origin, "ORIGIN"),
    "--allow-host": ("serve requests for this Host name too", str, "HOST"),
    "statistics and alerts": (),
    "--interval": ("between two stats_update", parse_number(0.05, 3600), "SECONDS"),
    "--cpu-alert": ("alert above this CPU usage", parse_percent, "PERCENT"),
    "--alert-cooldown": ("at most one alert in this time", parse_number(0, 1e9), "SECONDS"),
    "--alert-for": ("usage must stay above for so long", parse_number(0, 1e9), "SECONDS"),
    "--alert-webhook": ("gets each alert as a POST of JSON", parse_webhook_option, "URL"),
    "tasks": (),
    "--shell": ("runs commands as PATH -c COMMAND", parse_shell, "PATH"),
    "--max-tasks": ("running at once", parse_count, "N"),
    "--keep-output": ("output kept per task", parse_size, "SIZE"),
    "--keep-tasks": ("finished tasks kept", parse_count, "N"),
    "running": (),
    "--audit-log": ("who did what; none, - for stderr (default: state folder)", str, "FILE"),
    "--max-clients": ("open connections at once", parse_count, "N"),
    "--compress": ("WebSocket messages; auto: beyond this machine", ("auto", "on", "off")),
    "--loop": ("event loop; auto: uvloop if installed", ("auto", "asyncio", "uvloop")),
    "--log-format": ("of the log on stderr", ("text", "json")),
    "--log-level": ("what is logged", LEVELS),
}
SERVERS_HELP = """\
A server is host, host:port, a URL, the path of a Unix socket, or a name in the
list ~/.config/servercontrol/hosts (SERVERCONTROL_HOSTS names another):

  web1   http://10.0.0.11:8080    web1.token
  db1    https://db1.example.org

The third word names a file with the server's token, beside the list or by its
path. For servers without one, --token-file or SERVERCONTROL_TOKEN. The server
keeps its token in ~/.local/state/servercontrol/token, as a service in
/var/lib/servercontrol/token. A token goes to its own server and nowhere else.
"""
SERVERS: Options = {
    "server": ("(default: localhost; monitor: all that are listed)", str, "SERVER"),
    "--all": ("every listed server",),
    "--token-file": ("token of the servers that are named, if not listed with one", str, "FILE"),
}


# Command -> (usage, what it does, end of its --help, options).
SYNTAX: dict[str, tuple[str, str, str, Options]] = {
    "serve": (
        "[COMMAND] [options]",
        """\
Runs commands on this server over HTTP and shows them live over WebSocket.

  python3 servercontrol.py                  serve this account on this machine
  curl -d 'date' localhost:8080/exec        run a command there
  python3 servercontrol.py --host 0.0.0.0   serve a network, by token

Commands; `help COMMAND` tells more of each:

  serve          what runs when no command is named; its options are below
  exec           run a command on one server or many
  monitor        watch many servers on one screen
  discover       find servers on the network
  unit           print a systemd unit
  verify-audit   check that no line of the audit log was changed
  help           this text
""",
        """\
Every option but --no-auth has an environment twin: --ws-port is
SERVERCONTROL_WS_PORT; several values are separated by spaces. The option wins.
""",
        OPTIONS,
    ),
    "discover": (
        "discover [options]",
        "Find the servers of this machine and of the networks it is on.",
        """
Servers that listen on loopback only, as they do by default, answer only on
their own machine. A probe asks for nothing secret and carries no token.
Exit status: 0 if a server answered, else 1.

  discover --hosts >> ~/.config/servercontrol/hosts   list those that are new
  discover --prometheus > servers.json                for file_sd_configs
  discover --ansible > servers.yml                    for ansible -i servers.yml
""",
        {
            "--at": ("ask this host or broadcast address too", str, "ADDRESS", []),
            "--timeout": ("how long to wait", parse_number(0.1, 60), "SECONDS", 2.0),
            "--discovery-port": ("UDP port", parse_port, "N", Config.discovery_port),
            "instead of a table": (),
            "--json": ("a list of objects",),
            "--prometheus": ("a list for Prometheus' file_sd_configs",),
            "--ansible": ("an inventory for Ansible",),
            "--hosts": ("lines for the list of servers, of those that are new",),
        },
    ),
    "exec": (
        "exec [SERVER... | --all] [options] -- COMMAND...",
        "Run a command on one server, or on many at once.",
        SERVERS_HELP
        + """
One word is a command line for the server's shell; several words are passed on
as they are:

  exec web1 -- date
  exec web1 web2 db1 -- 'grep -c error /var/log/*.log | sort'
  exec --all --fold -- uname -r
  exec web1 --tty -- top                  Ctrl-] lets go of it

Exit status: the command's; of several the highest. 125: a server could not be
reached, refused, was stopped meanwhile, or lost part of the output. 143 or 137:
--timeout has ended the command. 0 after Ctrl-], and the command goes on.
Ctrl-C stops the command. A second one leaves it running, as does closing the
terminal; the server's page shows it and can stop it.
Output is text: send binary files by base64.
""",
        {
            **SERVERS,
            "--tty": ("in a terminal, with your keyboard",),
            "--stdin": ("send your standard input to the command",),
            "--timeout": ("then it is stopped; 0 is never", parse_timeout, "SECONDS", 0.0),
            "--fold": ("show equal outputs once, at the end",),
            "--parallel": ("servers at a time", parse_count, "N", 100),
        },
    ),
    "monitor": (
        "monitor [SERVER... | --all] [options]",
        "Watch servers: a live screen on a terminal, otherwise a line for each event.",
        SERVERS_HELP
        + """
Without a server: the listed ones, or this machine if none is listed.

  monitor
  monitor web1 db1 --log tasks.jsonl
  monitor --all --once || echo 'not all servers are up'

A server that is not heard of for 5 seconds is called silent. --log writes every
task of every server down, once; what could not be seen is named as a gap.
Started again with the same file, monitor goes on where it was.

Keys: q quits; c, n, s sort by CPU, name, state; arrows and PgUp, PgDn scroll.
Exit status: 0; of --once 1 if a server is not up.
""",
        {
            **SERVERS,
            "--log": ("append every task, JSON lines", str, "FILE"),
            "--cpu-alert": ("else what each server was told", parse_percent, "PERCENT", None),
            "--json": ("events as JSON lines",),
            "--once": ("one look, as a table or JSON",),
        },
    ),
    "unit": (
        "unit [--user NAME] [options of serve]",
        """\
Prints a unit for systemd, which then runs this file, where it lies, as a
service that starts with the machine. To install it:

  python3 servercontrol.py unit |
    sudo tee /etc/systemd/system/servercontrol.service
  sudo systemctl daemon-reload
  sudo systemctl enable --now servercontrol
""",
        """\
All options of `serve` may be given too: the service is started with them.
Without --user commands run in a sandbox, under an account that can change no
files of this machine but the service's own. The unit says what each of its
lines is for. Afterwards:

  journalctl -u servercontrol              its log
  sudo cat /var/lib/servercontrol/token    its token
  sudo python3 servercontrol.py exec \\
    --token-file /var/lib/servercontrol/token -- date

With --user, but not --no-exec, the token is in ~/.local/state/servercontrol of
that account.
""",
        {"--user": ("run as this account, without a sandbox", str, "NAME")},
    ),
    "verify-audit": (
        "verify-audit [FILE...]",
        "Say whether the chain of hashes in an audit log holds, and where it breaks.",
        "Exit status: 0 when it holds, 1 when it does not or cannot be read.",
        {"file": ("oldest first (default: the log of this account)", str, "FILE")},
    ),
}


def describe_option(option: str, row: Sequence[Any]) -> Fields:
    """Return the arguments of argparse's add_argument()."""
    text, check, metavar = (*row, None, None)[:3]
    if check is None:
        return {"action": "store_true", "help": text}
    if not option.startswith("-"):
        return {"nargs": "*", "metavar": metavar, "help": text}
    told = {"choices" if isinstance(check, tuple) else "type": check, "metavar": metavar}
    default: Any = getattr(Config, option[2:].replace("-", "_"), None)
    if len(row) > 3:
        told["default"] = default = row[3]
    shown = f"{default:g}" if isinstance(default, float) else default
    if check is parse_size:
        shown = f"{default // MIB}MiB"
    if isinstance(default, (tuple, list)):
        told["action"] = "append"
        text, shown = f"{text}; repeatable", " ".join(default) or "none"
    return {**told, "help": text if shown in ("", None) else f"{text} (default: {shown})"}


def build_parser(command: str) -> OneLineParser:
    """Return the parser of a command. That of `serve` sets nothing for options that are absent."""
    usage, text, epilog, options = SYNTAX[command]
    parser = OneLineParser(
        usage=f"python3 servercontrol.py {usage}",
        description=text,
        epilog=epilog,
        formatter_class=functools.partial(argparse.RawDescriptionHelpFormatter, width=80),
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS if command == "serve" else None,
    )
    if command == "serve":
        parser.add_argument("--version", action="version", version=f"servercontrol {__version__}")
    group: Any = parser
    for option, row in options.items():
        if row:
            group.add_argument(option, **describe_option(option, row))
        else:
            group = parser.add_argument_group(option)
    return parser


def parse_given(argv: Sequence[str]) -> Fields:
    """Return the fields of Config that are given. Raises ConfigError."""
    given = vars(build_parser("serve").parse_args(argv))
    return {name: tuple(one) if isinstance(one, list) else one for name, one in given.items()}


# Environment twin -> field of Config.
TWINS = {f"SERVERCONTROL_{one.name.upper()}": one for one in dataclasses.fields(Config)}
del TWINS["SERVERCONTROL_NO_AUTH"]  # must be typed, so that nobody inherits it unseen
# Variables without an option. Any other SERVERCONTROL_* is logged as unknown_variable.
OTHER_VARIABLES = {f"SERVERCONTROL_{name}" for name in ("TOKEN", "VIEW_TOKEN", "TASK_ID", "HOSTS")}


def read_environment(environ: Mapping[str, str]) -> list[str]:
    """Return the environment twins as options. Raises ConfigError."""
    arguments: list[str] = []
    for twin in sorted(TWINS.keys() & environ.keys()):
        one, value = TWINS[twin], environ[twin]
        option = "--" + one.name.replace("_", "-")
        if isinstance(one.default, bool):
            if value.lower() not in FLAG_ON + FLAG_OFF:
                raise ConfigError(f"{twin}: {value!r} is neither 1 nor 0")
            arguments += [option] * (value.lower() in FLAG_ON)
        elif isinstance(one.default, tuple):
            arguments += [f"{option}={item}" for item in value.replace(",", " ").split()]
        else:
            arguments.append(f"{option}={value}")
    return arguments


def is_program(name: str, environ: Mapping[str, str]) -> bool:
    """Whether a shell finds this program (importing shutil would take 3 ms)."""
    folders = [""] if os.sep in name else os.get_exec_path(environ)
    paths = [os.path.join(folder, name) for folder in folders]
    return any(os.path.isfile(path) and os.access(path, os.X_OK) for path in paths)


def parse_config(argv: Sequence[str], environ: Mapping[str, str]) -> Config:
    """Return the options of `serve`. Raises ConfigError."""
    if argv and argv[0] == "serve":
        argv = argv[1:]
    elif argv and not argv[0].startswith("-"):
        meant = "serve" if argv[0] in ("start", "run") else argv[0]
        hint = suggest(meant, [*SYNTAX, "help"])
        raise ConfigError(f"{argv[0]!r} is no command{hint} (see --help)")
    given = parse_given(argv)
    try:
        twins = parse_given(read_environment(environ))
    except ConfigError as error:
        raise ConfigError(f"{error} (in the environment)") from None
    config = Config(**{**twins, **given})
    if config.loop == "uvloop" and uvloop is None:
        raise ConfigError("--loop: uvloop is not installed (python3 -m pip install uvloop)")
    if config.compress == "on" and zlib is None:
        raise ConfigError("--compress: this Python was built without zlib")
    if config.tls_cert and ssl is None:
        raise ConfigError("--tls-cert: this Python was built without OpenSSL")
    if config.tls_key and not config.tls_cert:
        raise ConfigError("--tls-key: there is no --tls-cert to go with it")
    if not config.no_exec and not is_program(config.shell, environ):
        raise ConfigError(f"--shell: {config.shell!r} is no program that can be run")
    tokens = {"SERVERCONTROL_TOKEN", "SERVERCONTROL_VIEW_TOKEN"} & environ.keys()
    asks = tokens or config.token_file or config.view_token_file or config.require_token
    if config.no_auth and asks:
        raise ConfigError("--no-auth: there are tokens to ask for as well; choose one")
    return config


def explain_tls_files(cert: str, key: str) -> str:
    """Return why OpenSSL does not accept files that it can read."""
    with open(cert, "rb") as cert_file, open(key or cert, "rb") as key_file:
        if b"BEGIN CERTIFICATE" not in cert_file.read():
            return "there is no certificate in it (PEM)"
        if b"PRIVATE KEY" in key_file.read():
            return "the certificate or the private key is damaged"
    return "there is no private key in it" + ("" if key else ": name the key's file by --tls-key")


def load_tls(config: Config, log: Log) -> TlsFiles | None:
    """Return None without TLS. Raises ConfigError."""
    if not config.has_tls:
        return None
    # Python 3.11 and newer would take 256 KiB for each connection, but a TLS record has 16 KiB.
    asyncio.sslproto.SSLProtocol.max_size = 32 * KIB
    try:
        return TlsFiles(config.tls_cert, config.tls_key, log)
    except (OSError, ValueError) as error:
        names = f"{config.tls_cert} {config.tls_key}".strip()
        reason = explain(error)
        if getattr(error, "library", "") == "SSL":  # what it says is for programmers
            reason = explain_tls_files(config.tls_cert, config.tls_key)
        raise ConfigError(f"--tls-cert: {names}: {reason}") from None


def needs_token(config: Config, listeners: Listeners) -> bool:
    return not config.no_auth and (config.require_token or not listeners.is_loopback)


def check_exposure(config: Config, listeners: Listeners, tokens: Tokens, log: Log) -> None:
    """Warn of open doors; raise ConfigError if nobody could get in."""
    if needs_token(config, listeners) and tokens.run is None:
        raise ConfigError("--token-file: a token is needed, and there is no folder to keep one in")
    if config.no_auth:
        log.write("warning", "no_auth", message=NO_AUTH_WARNING)
    if not listeners.is_loopback and not config.has_tls:
        port = listeners.ports["http"]
        message = "commands and tokens can be read by whoever is on the path; use --tls-cert, or "
        message += f"listen on loopback and type: ssh -L {port}:localhost:{port} {read_hostname()}"
        log.write("warning", "no_tls", message=message)


def print_banner(config: Config, listeners: Listeners, tokens: Tokens) -> None:
    """Print what to do next, and the token, which is shown nowhere else."""
    http, ws = listeners.url("http", is_typed=True), listeners.url("ws", is_typed=True)
    who = "processes of this account on this machine"
    who += "; others need the token" if tokens.run else ", nobody else: there is no token"
    page, option = "", ""
    if config.no_auth:
        who = "EVERYBODY who can reach it, with all the power of this account (--no-auth)"
    elif needs_token(config, listeners):
        who, page = "whoever has the token", f"#token={tokens.run}"
        option = f"-H 'Authorization: Bearer {tokens.run}' "
    facts = {
        "page": f"{http}/{page}",
        "run": "" if config.no_exec else f"curl {option}-d 'date' -N '{http}/exec?follow'",
        "watch": f"{ws}/",
        "open to": who,
        "token": tokens.run_file or "",
        "stop": "Ctrl-C",
    }
    lines = [f"  {name:8} {text}\n" for name, text in facts.items() if text]
    text = f"ServerControl {__version__}\n" + "".join(lines)
    with suppress(OSError):
        write_all(1, bytearray(text.encode("utf-8", "replace")), FINISH_SECONDS)


def reset_signals() -> bool:
    """Let children start with default signals; return whether SIGHUP was not ignored."""
    # They inherit blocked and ignored signals. One with a handler gets its default (signal(7)).
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signal.valid_signals())
    ignored = {n for n in signal.valid_signals() if signal.getsignal(n) is signal.SIG_IGN}
    # subprocess itself restores SIGPIPE and SIGXFSZ in a child.
    for number in ignored - {signal.SIGPIPE, signal.SIGXFSZ, signal.SIGCHLD}:
        signal.signal(number, lambda *_: None)
    # If SIGCHLD is ignored, the kernel reaps the children, and their exit codes are lost.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    return signal.SIGHUP not in ignored


def watch_signals(server: Server, hears_hangup: bool) -> asyncio.Future[str]:
    """Return a future of the first signal's name; a second one ends the process at once."""
    loop = asyncio.get_running_loop()
    stopped: asyncio.Future[str] = loop.create_future()

    def take(number: signal.Signals) -> None:
        if stopped.done():
            server.tasks.kill_all()
            os._exit(1)
        stopped.set_result(number.name)

    for number in (signal.SIGTERM, signal.SIGINT, *[signal.SIGHUP] * hears_hangup):
        loop.add_signal_handler(number, take, number)
    return stopped


async def serve(config: Config, log: Log) -> None:
    """Run until a signal. Raises ConfigError or StartError."""
    if not hasattr(os, "waitid"):
        raise StartError("this Python lacks os.waitid; on macOS use Python 3.13 or newer")
    hears_hangup = reset_signals()
    systemd = SystemdNotifier(os.environ)
    descriptor_limit = raise_descriptor_limit()
    for name in sorted(os.environ.keys() - TWINS.keys() - OTHER_VARIABLES):
        if name.startswith("SERVERCONTROL_"):
            log.write("warning", "unknown_variable", name=name)
    os.environ.pop("SERVERCONTROL_ALERT_WEBHOOK", None)  # often secret, and no task needs it
    tls = load_tls(config, log)
    folder = open_state_folder(os.environ, config, log)
    tokens = load_tokens(config, os.environ, folder, log)
    listeners = Listeners(config, log, take_passed_sockets(os.environ))
    boot_id = os.urandom(8).hex()
    audit = AuditLog(find_audit_log(config.audit_log, folder), boot_id, log)
    spawner, ids = Spawner(config.shell, dict(os.environb), descriptor_limit), TaskIds(folder, log)
    parts = (config, log, audit, tokens, ids, listeners, tls, spawner, boot_id, folder, Page())
    try:
        check_exposure(config, listeners, tokens, log)
        server = Server(*parts)
    except ServerControlError:
        listeners.close()
        raise
    stopped = watch_signals(server, hears_hangup)
    server.start()
    systemd.tell("READY=1", f"STATUS=listening at {server.listeners.url('http')}")
    systemd.beat()
    if os.isatty(1):
        print_banner(config, listeners, tokens)
    await stopped
    systemd.tell("STOPPING=1", f"STATUS=stopping, {len(server.tasks.running)} tasks run")
    log.write("info", "stopping", signal=stopped.result(), tasks=len(server.tasks.running))
    await server.stop(stopped.result())


def verify_audit(argv: Sequence[str]) -> int:
    """Return the exit status."""
    files = build_parser("verify-audit").parse_args(argv).file
    if not files:
        own, named = find_own_folder(os.environ), os.environ.get("SERVERCONTROL_AUDIT_LOG", "")
        files = [find_audit_log(named, own)]
        if files[0] in ("-", "none"):
            raise StartError(f"SERVERCONTROL_AUDIT_LOG is {files[0]}: name a file")
    prev, is_whole = None, True
    for file in files:
        head = read_hash(file) if file == files[-1] else None
        try:
            with open(file, "rb") as lines:
                told, holds, prev = check_chain(lines, prev, head)
        except OSError as error:
            raise StartError(f"{file}: {error.strerror}") from None
        for text in told:
            write_output(f"{file}: {text}\n".encode("utf-8", "surrogateescape"))
        is_whole = is_whole and holds
    return 0 if is_whole else 1


def read_hosts() -> tuple[str, list[ServerAddress]]:
    """Return the path of the list, and its servers. Raises ConfigError."""
    named = os.environ.get("SERVERCONTROL_HOSTS", "")
    folder = find_own_folder(os.environ, "XDG_CONFIG_HOME", "~/.config")
    path = named or os.path.join(folder, "hosts")
    listed: list[ServerAddress] = []
    try:
        if named or os.path.isabs(path):  # else there is no home folder
            with suppress(FileNotFoundError), open(path, encoding="utf-8-sig") as file:
                listed = list(parse_hosts(file.read(), path).values())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {explain(error)}") from None
    return path, listed


def choose_servers(given: argparse.Namespace) -> list[ServerAddress]:
    """Return the servers that a command is for. Raises ConfigError."""
    path, listed = read_hosts()
    if given.all:
        if given.server or given.token_file:
            raise ConfigError("--all: takes the listed servers with their own tokens, nothing else")
        if not listed:
            hint = f"write lines `name url [token-file]` to {path} (discover --hosts prints some)"
            raise ConfigError(f"--all: no server is listed; {hint}")
        return listed
    # For servers that are not listed with a token.
    token = os.environ.get("SERVERCONTROL_TOKEN") or None
    if given.token_file:
        token = load_token_file("--token-file", given.token_file, is_client=True)
    elif token is not None:
        check_token("SERVERCONTROL_TOKEN", token)
    named = {server.name: server for server in listed if given.server}
    servers = {}
    for name in given.server or ["localhost"]:
        server = named.get(name) or parse_server(name, name)
        # A server that is named by its URL may be listed with a token file.
        files = [one.token_file for one in (server, *listed) if one.url == server.url]
        token_file = next(filter(None, files), "")
        servers[name] = dataclasses.replace(server, token=token, token_file=token_file)
    return list(servers.values())


async def with_signals(take: Callable[[int], object], work: Awaitable[Result]) -> Result:
    """Do the work; `take` gets each signal that would end it."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
            asyncio.get_running_loop().add_signal_handler(number, take, number)
    try:
        return await work
    finally:
        signal.set_wakeup_fd(-1)  # Python complains of a signal while the loop is closed


def exec_command(argv: Sequence[str]) -> int:
    """Return the exit status."""
    place = argv.index("--") if "--" in argv else len(argv)
    words = argv[place + 1 :]
    if not words and not {"-h", "--help"} & set(argv):
        problem = "no command behind" if "--" in argv else "the command stands behind"
        raise ConfigError(f"exec: {problem} --, as in: exec web1 -- date")
    given = build_parser("exec").parse_args(argv[:place])
    servers = choose_servers(given)
    if given.tty and len(servers) > 1:
        raise ConfigError("--tty: a terminal is of one server")
    places = min(len(servers), given.parallel)
    window = min(EXEC_WINDOW_BYTES, EXEC_WINDOWS_BYTES // places)
    fields: Fields = {"timeout": given.timeout, "stdin": given.stdin, "window": window}
    try:
        fields["cmd"] = check_command(words[0] if len(words) == 1 else shlex.join(words))
    except CommandError as error:
        raise ConfigError(f"exec: {error.message}") from None
    if given.tty:
        cols, rows = read_terminal_size(0)
        fields.update(tty=True, cols=cols, rows=rows)

    async def run() -> int:
        execution = Execution(Report(servers, fields, given.fold), places, given.all)
        return await with_signals(execution.interrupt, execution.run())

    return asyncio.run(run())


async def watch(monitor: Monitor, screen: Screen | None, once: bool) -> None:
    """Run until a signal or a key. once: until all servers are known, at most ONCE_SECONDS."""
    watching = asyncio.gather(monitor.run(), *([screen.run()] if screen else []))
    if screen is not None:
        screen.leave = watching.cancel
    if once:
        unknown = ServerState.CONNECTING, ServerState.UP
        end = time.monotonic() + ONCE_SECONDS
        while time.monotonic() < end and any(
            one.state in unknown and not one.stats for one in monitor.all
        ):
            await asyncio.sleep(0.02)
        watching.cancel()
    with suppress(asyncio.CancelledError):
        await with_signals(lambda _: watching.cancel(), watching)


def monitor_command(argv: Sequence[str]) -> int:
    """Return the exit status."""
    given = build_parser("monitor").parse_args(argv)
    if not given.server and not given.token_file and read_hosts()[1]:
        given.all = True
    servers = choose_servers(given)
    if given.log in ("", "-"):  # perhaps from an unset variable
        raise ConfigError("--log: name a file")
    is_live = os.isatty(1) and os.environ.get("TERM") != "dumb" and not (given.json or given.once)
    lines, log = EventWriter(given.json), MonitorLog(given.log or os.devnull)

    def emit(watched: Watched, event: Fields) -> None:
        if not is_live and not given.once:
            lines.write(watched.server.name, event)

    everybody = [Watched(server, given.cpu_alert, log, emit) for server in servers]
    monitor, screen = Monitor(everybody, log), Screen(everybody, log) if is_live else None
    asyncio.run(watch(monitor, screen, given.once))
    lines.output.finish()
    if not given.once:
        return 0
    rows = [line for _, line in format_table(everybody, width=200)]
    shown = "\n".join([*rows, format_totals(everybody, width=200), ""])
    if given.json:
        described = [
            {
                "server": one.server.name,
                "url": one.server.url,
                "state": one.state.value,
                "reason": one.reason,
                "stats": one.stats,
                "tasks": list(one.tasks.values()),
                "alert": one.alert,
            }
            for one in everybody
        ]
        shown = to_json(described)
    write_output(shown.encode("utf-8", "replace"))
    return 0 if all(watched.state is ServerState.UP for watched in everybody) else 1


def list_new(found: Sequence[Fields]) -> str:
    """Return lines for the servers that are not listed yet; say on stderr what to do next."""
    path, listed = read_hosts()
    folder, urls = os.path.dirname(path), {server.url for server in listed}
    new = [one for one in found if urls.isdisjoint(one["urls"])]
    if len(new) < len(found):
        write_note(f"left out, being listed: {len(found) - len(new)}")
    if any(is_token_needed(one) for one in new):
        write_note(f"next: copy each server's {USUAL_TOKEN_FILE} to {folder}/NAME.token")
    lines = []
    for name, one in name_hosts(new, {server.name for server in listed}).items():
        token_file = f"{name}.token" if is_token_needed(one) else ""
        if token_file and os.path.lexists(os.path.join(folder, token_file)):
            # A server that merely answers with another's name must not get its token.
            token_file = f"# {token_file} is there already: is it of this server?"
        others = "".join(f" # also {url}" for url in one["urls"][1:])
        lines.append(f"{name} {one['url']} {token_file}".rstrip() + others + "\n")
    return "".join(lines)


def discover_command(argv: Sequence[str]) -> int:
    """Return the exit status."""
    twin = os.environ.get("SERVERCONTROL_DISCOVERY_PORT")
    options = [f"--discovery-port={twin}"] if twin else []
    given = build_parser("discover").parse_args([*options, *argv])
    formats = {
        "json": to_json,
        "prometheus": format_prometheus,
        "ansible": format_ansible,
        "hosts": list_new,
    }
    chosen = [name for name in formats if getattr(given, name)]
    if len(chosen) > 1:
        raise ConfigError(f"--{chosen[1]}: not allowed with argument --{chosen[0]}")
    networks = {str(one.broadcast_address) for one in read_link_networks() if one.prefixlen < 31}
    addresses = [*sorted(networks or {"255.255.255.255"}), "127.255.255.255"]
    for address in given.at:
        try:
            addresses.append(socket.gethostbyname(address))
        except (OSError, UnicodeError) as error:
            raise ConfigError(f"--at: {address}: {explain(error)}") from None
    found = probe_network(addresses, given.discovery_port, given.timeout)
    if chosen or found:
        show = formats[chosen[0]] if chosen else format_found
        write_output(show(found).encode("utf-8", "replace"))
    if not found:
        port = given.discovery_port
        write_note(f"nothing answered on UDP port {port} (servers on loopback answer only there)")
    return 0 if found else 1


UNIT = """\
# Printed by `servercontrol.py unit`. To change it: systemctl edit servercontrol
[Unit]
Description=ServerControl: runs commands on this server and shows them live
{order}
[Service]
# {reason}.
# -I: nothing is imported from the folder of the file, a home, or PYTHON* variables.
ExecStart={command}
Type=notify
# A server that hangs for so long is started again.
WatchdogSec=30
Restart=on-failure
RestartSec=2
# 2 is a bad option or token file, which no restart mends.
RestartPreventExitStatus=2
# The server ends its tasks within 8 s; then all that they left behind is killed, also after a
# crash. Start by systemd-run what shall outlive the service.
KillMode=mixed
TimeoutStopSec=10
# A command that takes all the memory is killed alone.
OOMPolicy=continue
SyslogIdentifier=servercontrol
{credentials}{account}
[Install]
WantedBy=multi-user.target
"""
UNIT_DYNAMIC_USER = """\
# An account that exists while this runs, and owns nothing but what is named here.
DynamicUser=yes
"""
UNIT_STATE = """\
# The tokens and the audit log are in /var/lib/servercontrol.
StateDirectory=servercontrol
StateDirectoryMode=0700
Environment=XDG_STATE_HOME=%S
"""
UNIT_SANDBOX = """\
# Where commands start, and their home.
StateDirectory=servercontrol-home
WorkingDirectory=%S/servercontrol-home
Environment=HOME=%S/servercontrol-home
# Places for --unix (/run/servercontrol/) and --audit-log (/var/log/servercontrol/).
RuntimeDirectory=servercontrol
LogsDirectory=servercontrol
{bind}
# The sandbox. Above each line: what it takes from the commands. `systemctl edit` lifts it.
# sudo, su, other set-uid programs, ping where it needs a file capability
NoNewPrivileges=yes
# making set-uid files
RestrictSUIDSGID=yes
# everything that needs root
CapabilityBoundingSet={capabilities}
# writing outside of the folders above, /tmp and /var/tmp; to /run too, since Protect…= below
# make it writable again (systemd 252)
ProtectSystem=strict
ReadOnlyPaths=/run
# seeing /home, /root and /run/user
ProtectHome=tmpfs
# sharing /tmp, /var/tmp and /dev/shm, and what is mounted, with other programs
PrivateTmp=yes
TemporaryFileSystem=/dev/shm:mode=1777
PrivateMounts=yes
# disks and other devices, but not terminals
PrivateDevices=yes
# sysctl -w, insmod, dmesg, date -s, hostname NAME; changing cgroups, as containers do
ProtectKernelTunables=yes
ProtectKernelModules=yes
ProtectKernelLogs=yes
ProtectClock=yes
ProtectHostname=yes
ProtectControlGroups=yes
# unshare, bwrap, rootless containers, the sandbox of browsers
RestrictNamespaces=yes
# chrt
RestrictRealtime=yes
# setarch; programs of other architectures, such as 32-bit ones
LockPersonality=yes
SystemCallArchitectures=native
# Bluetooth, raw packets, VM sockets (the server itself needs AF_NETLINK: who connects?)
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK
# mount, reboot, swapon, strace, gdb
SystemCallFilter=@system-service
SystemCallErrorNumber=EPERM
# the access of others to files that commands make
UMask=0077
"""
UNIT_MONITOR = """\
# Nothing is run (--no-exec), so that this costs nothing as well:
MemoryDenyWriteExecute=yes
ProtectProc=invisible
SystemCallFilter=~@privileged @resources
"""
UNIT_NO_MONITOR = """\
# Left out, since commands may need what is in brackets: MemoryDenyWriteExecute=yes (Node, Java and
# other JITs), ProtectProc=invisible (ps of other accounts), IPAddressDeny=any (the network).
"""
UNIT_ORDER = """\
# An address beyond loopback must be there before it can be listened on.
After=network-online.target
Wants=network-online.target
"""
UNIT_OWN_STATE = """\
# The tokens and the audit log are in .local/state/servercontrol in its home.
"""
UNIT_ACCOUNT = """\
# Its commands may do what the account may. A sandbox would break them (sudo, package managers,
# mount, containers) and protect nothing. Without --user, or with --no-exec, there is one.
User={user}
WorkingDirectory=-~
"""


# Options that name a file to read, a credential for systemd.
CREDENTIALS = ("token_file", "view_token_file", "tls_cert", "tls_key")
EMPTIED_FOLDERS = ("/tmp/", "/var/tmp/", "/dev/shm/")  # at boot, or earlier
HIDDEN_FOLDERS = ("/home/", "/root/", "/run/user/", *EMPTIED_FOLDERS)  # in UNIT_SANDBOX
SANDBOX_FOLDERS = ("/run/servercontrol/", "/var/log/servercontrol/", "/var/lib/servercontrol/")


def quote_word(text: str) -> str:
    """Return a word for ExecStart= (systemd.syntax(7); % and $ are doubled). Raises ConfigError."""
    if not text.isprintable():
        raise ConfigError(f"{text!r} cannot stand in a unit: a character is not printable")
    if re.fullmatch("[A-Za-z0-9_./:=@,+-]+", text):
        return text
    escaped = re.sub(r'[\\"]', r"\\\g<0>", text).replace("%", "%%").replace("$", "$$")
    return f'"{escaped}"'


def is_missing(path: str) -> bool:
    """Whether there is no such file. False if this account may not look there."""
    try:
        return stat.S_ISDIR(os.stat(path).st_mode)
    except PermissionError:
        return False
    except OSError:
        return True


def is_hidden(path: str) -> bool:
    """Whether the sandbox hides a file, or the target of a link."""
    return any(one.startswith(HIDDEN_FOLDERS) for one in (path, os.path.realpath(path)))


def format_serve_options(
    argv: Sequence[str], is_sandboxed: bool, uid: int
) -> tuple[list[str], str, list[str]]:
    """Return words of ExecStart=, lines for files that are handed over, and warnings."""
    words: list[str] = []
    doubts: list[str] = []
    lines = ""
    for name, value in parse_given(argv).items():
        option = "--" + name.replace("_", "-")
        is_read = name in CREDENTIALS and value
        is_written = name in ("unix", "audit_log") and value not in ("", "-", "none")
        if is_read or is_written:
            value = os.path.abspath(value)  # a service starts in `/`
        if is_read and is_missing(value):
            doubts.append(f"{option}: there is no file {value}")
        if name == "shell" and "/" in value and is_sandboxed and is_hidden(value):
            doubts.append(f"{option}: the service cannot see {value}")
        if is_written and is_sandboxed and not value.startswith(SANDBOX_FOLDERS):
            doubts.append(f"{option}: the service can write to {' '.join(SANDBOX_FOLDERS)} alone")
        if is_read and (is_sandboxed or uid):
            # systemd gives the account a copy, which it can read (systemd 247; %d needs 250).
            if not value.isprintable() or value != value.strip() or value.endswith("\\"):
                raise ConfigError(f"{option}: {value!r} cannot stand in a unit")
            credential = option.strip("-").replace("-file", "")
            lines += f"LoadCredential={credential}:{value.replace('%', '%%')}\n"
            words.append(f"{option}=${{CREDENTIALS_DIRECTORY}}/{credential}")
        else:
            items = value if isinstance(value, tuple) else (value,)
            words += [option if one is True else quote_word(f"{option}={one}") for one in items]
    if lines:
        lines = "# Read by systemd as root, at each start: restart after a change.\n" + lines
    return words, lines, doubts


def is_permitted(path: str, uid: int, right: int) -> bool:
    """Whether an account may read (right: 4) or run (1) a file. Groups are left aside."""
    from pathlib import Path  # takes 5 ms

    folders = [*Path(path).parents, *Path(path).resolve().parents]  # of a link, and its target
    needs = [(os.stat(path), right), *((folder.stat(), 1) for folder in folders)]
    return uid == 0 or all(
        status.st_mode & (need << 6 if status.st_uid == uid else need) for status, need in needs
    )


def choose_python(is_sandboxed: bool, uid: int) -> tuple[str, str]:
    """Return the interpreter for the unit, and why it is that one."""
    python = os.path.abspath(sys.executable)
    # ExecStart= may not begin with these, however they are quoted.
    is_fit = python.isprintable() and not re.search(r"[$\"'\\]", python)
    is_seen = os.path.isfile(python) and not (is_sandboxed and is_hidden(python))
    if is_fit and is_seen and is_permitted(python, uid, 1):
        return python, "The Python that printed this"
    return "/usr/bin/python3", "The system's: the service's account cannot run what printed this"


def format_account(config: Config, account: pwd.struct_passwd | None, script: str) -> str:
    """Return the lines about the account and the sandbox."""
    ports = (config.port, config.ws_port, config.discovery_port)
    capability = "CAP_NET_BIND_SERVICE" if any(0 < port < 1024 for port in ports) else ""
    ambient = f"# for a port below 1024\nAmbientCapabilities={capability}\n" if capability else ""
    if account is not None and not config.no_exec:
        home, uid = account.pw_dir, account.pw_uid
        has_home = os.path.isdir(home) and os.stat(home).st_uid == uid
        text = UNIT_ACCOUNT.format(user=account.pw_name)
        return text + (UNIT_OWN_STATE if has_home else UNIT_STATE) + (ambient if uid else "")
    bind = ""
    if is_hidden(script):
        # A colon would separate source and target, and here $ begins no variable.
        if re.search("[:$]", script) or not script.isprintable():
            raise ConfigError(f"{script!r} cannot stand in a unit: put it into /usr/local/bin")
        bind = "# The file is in a folder that the sandbox hides.\n"
        bind += f"BindReadOnlyPaths={quote_word(script)}\n"
    who = UNIT_DYNAMIC_USER if account is None else f"User={account.pw_name}\n"
    sandbox = UNIT_SANDBOX.format(bind=bind, capabilities=capability)
    monitor = UNIT_MONITOR if config.no_exec else UNIT_NO_MONITOR
    return who + UNIT_STATE + sandbox + monitor + ambient


def unit_command(argv: Sequence[str]) -> int:
    """Return the exit status."""
    given, rest = build_parser("unit").parse_known_args(argv)
    if not os.path.isfile(globals().get("__file__", "")):
        raise ConfigError("unit: this was read from a pipe, and a service needs a file to run")
    # systemd's PATH, and nothing of the caller's environment.
    config = parse_config(["serve", *rest], {"PATH": "/usr/local/bin:/usr/bin:/bin"})
    try:
        account = None if given.user is None else pwd.getpwnam(given.user)
    except (KeyError, ValueError):
        raise ConfigError(f"--user: there is no account {given.user!r} on this machine") from None
    script = os.path.abspath(__file__)
    is_sandboxed = account is None or config.no_exec
    uid = -1 if account is None else account.pw_uid  # -1: a DynamicUser= owns no files
    python, reason = choose_python(is_sandboxed, uid)
    words, credentials, doubts = format_serve_options(rest, is_sandboxed, uid)
    is_local = all(host == "localhost" or is_loopback(host.strip("[]")) for host in config.host)
    unit = UNIT.format(
        account=format_account(config, account, script),
        order="After=network.target\n" if is_local else UNIT_ORDER,
        reason=reason,
        command=" ".join([*map(quote_word, (python, "-I", script)), *words]),
        credentials=credentials,
    )
    write_output(unit.encode())
    if script.startswith(EMPTIED_FOLDERS):
        doubts.append(f"{script} is gone when that folder is emptied; /usr/local/bin is not")
    is_bound = is_sandboxed and is_hidden(script)  # then the rights of its folders do not matter
    if not (os.stat(script).st_mode & 0o004 if is_bound else is_permitted(script, uid, 4)):
        doubts.append(f"the service's account cannot read {script}; in /usr/local/bin it can")
    found = [os.stat(path) for path in (script, os.path.dirname(script))]
    if any(one.st_uid not in (0, uid) or one.st_mode & 0o022 for one in found):
        doubts.append(f"not only root can change {script}, and so what this service does")
    for doubt in doubts:
        write_note(f"warning: {doubt}")
    if os.isatty(2):
        write_without_waiting(2, SYNTAX["unit"][1].encode())
    return 0


# What runs each command but `serve`.
COMMAND_LINES: dict[str, Callable[[Sequence[str]], int]] = {
    "discover": discover_command,
    "exec": exec_command,
    "monitor": monitor_command,
    "unit": unit_command,
    "verify-audit": verify_audit,
}


def main() -> int:
    """Return the exit status."""
    fd = -1
    # Where 0, 1 or 2 is closed, a socket would get its number, and what is written there.
    while fd < 3:
        fd = os.open(os.devnull, os.O_RDWR)
    os.close(fd)
    argv = sys.argv[1:] or ["serve"]
    if argv[0] == "help":
        argv = [argv[1] if argv[1:] and argv[1] in SYNTAX else "serve", "--help"]
    take = COMMAND_LINES.get(argv[0])
    try:
        if take is not None:
            raise_descriptor_limit()  # for connections to a thousand servers
            return take(argv[1:])
        config = parse_config(argv, os.environ)
        log = Log(config.log_format, config.log_level)
        has_uvloop = uvloop is not None and config.loop != "asyncio"
        loop = uvloop.new_event_loop() if has_uvloop else asyncio.new_event_loop()
        with contextlib.closing(loop):
            loop.run_until_complete(serve(config, log))
    except ServerControlError as error:
        if isinstance(error, OutputError) and error.is_closed:
            return 128 + signal.SIGPIPE
        write_note(str(error))
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:  # asyncio restores Python's own handler
        return 128 + signal.SIGINT if take else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
