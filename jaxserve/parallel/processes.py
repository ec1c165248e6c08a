"""The processes that run one model together, mostly on a host each.

JAX's distributed runtime joins their devices into one mesh, and every process then has to start the same programs in
the same order. The first process decides on them, and tells the others over sockets of its own.
"""

import atexit
import hmac
import os
import pickle
import queue
import secrets
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxserve.errors import InputError, first_line

_KEY_BYTES = 32
_LENGTH = struct.Struct("!Q")
_GREETING = struct.Struct(f"!{_KEY_BYTES}sI")  # the key, and who comes
_GREETING_SECONDS = 10  # for it to come from whoever connects
_SECONDS_TO_END = 5  # for a process to say why, once another one has ended
_IDLE_SECONDS = 30  # after which the system asks whether the other host is still there


class _Left(NamedTuple):
    """The last message of a process; without a `reason` all is well."""

    reason: str | None


class Processes:
    """All processes of a model, of which this one has a number; it talks to those of `links`.

    The first, number 0, is linked to all others and they to it. One process alone has no links.
    """

    def __init__(self, number: int = 0, links: Sequence["_Link"] = ()):
        self.number, self._links = number, list(links)
        self._left = False
        if links:
            atexit.register(self.leave)  # before JAX waits there for all processes

    @property
    def count(self) -> int:
        return jax.process_count() if self._links else 1

    def gather(self, value: Any) -> list[Any]:
        """The values that the processes give, by their numbers; each has to call it. `InputError` if one has left."""
        if self.number:
            (first,) = self._links
            first.send(_frame(value))
            return first.receive()
        values = [value, *(link.receive() for link in self._links)]
        self.tell(values)
        return values

    def tell(self, message: Any) -> None:
        """Send it to the others, which read it from `messages`. `InputError` if one of them has left."""
        if self._links:
            frame = _frame(message)
            for link in self._links:
                link.send(frame)

    def messages(self) -> Iterator[Any]:
        """What the first process tells this one, until it leaves; `InputError` if it does not say that all is well."""
        (first,) = self._links
        while not isinstance(message := first.receive(may_leave=True), _Left):
            yield message

    def check(self) -> None:
        """`InputError` if another process has left."""
        for link in self._links:
            link.check()

    def leave(self, reason: str | None = None) -> None:
        """Tell the others that this process is done, or why it can't go on. No effect the second time."""
        if not self._left:
            self._left = True
            for link in self._links:
                link.leave(reason)


def join(address: str, count: int, number: int) -> Processes:
    """Start JAX's distributed runtime, whose coordinator is the first of `count` processes, and link them.

    `address` is that coordinator's, `host:port`. Waits until all have come. `InputError` if JAX has started without it.
    """
    if not jax.distributed.is_initialized():
        try:
            jax.distributed.initialize(address, count, number)
        except (ValueError, RuntimeError) as error:
            raise InputError(
                f"process {number} of {count} cannot join the others at {address} ({first_line(error)}); give all of "
                "them one address of the first, which it can listen on, and each its own number"
            ) from error
    if (jax.process_count(), jax.process_index()) != (count, number):
        raise InputError(
            f"num_processes={count} and process_id={number}, and JAX was started as process {jax.process_index()} of "
            f"{jax.process_count()}; give the same numbers"
        )
    listener = None if number else _listener()
    greeting = bytes(_GREETING.size) if listener is None else _invitation(listener)
    # A secret that only processes of the same runtime get, since what comes over a link is unpickled.
    told = multihost_utils.broadcast_one_to_all(np.frombuffer(greeting, np.uint8))
    key, port = _GREETING.unpack(np.asarray(told).astype(np.uint8).tobytes())
    if listener is None:
        return Processes(number, [_connect(address.rpartition(":")[0], port, key, number)])
    with listener:
        return Processes(0, _accept(listener, key, count - 1))


class _Link:
    """Whole messages to another process and from it, which a thread takes so that its end is noticed at any time."""

    def __init__(self, connection: socket.socket, other: int):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if hasattr(socket, "TCP_KEEPIDLE"):  # not on every system
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _IDLE_SECONDS)
        self.other = other
        self._connection, self._reader = connection, connection.makefile("rb")
        self._received: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._last: _Left | None = None
        self._gone = threading.Event()  # set when the last message has come
        self._noticed = False  # that the other has gone
        self._closed = False
        threading.Thread(target=self._receive_all, daemon=True).start()

    def send(self, frame: bytes) -> None:
        self.check()
        try:
            self._connection.sendall(frame)
        except OSError:
            self._gone.wait(_SECONDS_TO_END)  # its last message is on its way
            self._raise(self._last or _Left(None))

    def receive(self, *, may_leave: bool = False) -> Any:
        """The next message. `InputError` if the other has left, and `may_leave` does not allow that."""
        message = self._received.get()
        if isinstance(message, _Left) and (message.reason is not None or not may_leave):
            self._raise(message)
        return message

    def check(self) -> None:
        """`InputError` if the other has left."""
        if self._last is not None:
            self._raise(self._last)

    def leave(self, reason: str | None) -> None:
        self._closed = True
        try:
            self._connection.sendall(_frame(_Left(reason)))
            self._connection.shutdown(socket.SHUT_WR)  # what is under way still arrives
        except OSError:
            pass  # it has left before

    def _raise(self, left: _Left) -> None:
        self._noticed = True
        raise InputError(f"process {self.other} {left.reason or 'has ended'}")

    def _receive_all(self) -> None:
        message: Any = None
        while not isinstance(message, _Left):
            try:
                (length,) = _LENGTH.unpack(self._reader.read(_LENGTH.size))
                message = pickle.loads(self._reader.read(length))
            except (OSError, struct.error, pickle.UnpicklingError, EOFError):
                message = _Left("has ended without a word; its own output may say why")
            if isinstance(message, _Left):
                self._last = message
                self._gone.set()
            self._received.put(message)
        if not self._closed:
            self._end_soon(message)

    def _end_soon(self, left: _Left) -> None:
        """End this process, too, if it does not end by itself: in a program that waits for the other it hangs."""
        if left.reason is None and not self.other:
            return  # the first has let this one go
        time.sleep(_SECONDS_TO_END)
        if not self._noticed:
            print(f"jaxserve: process {self.other} {left.reason or 'has ended'}, and this one with it", file=sys.stderr)
        sys.stderr.flush()
        os._exit(1)


def _frame(message: Any) -> bytes:
    body = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
    return _LENGTH.pack(len(body)) + body


def _listener() -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def _invitation(listener: socket.socket) -> bytes:
    return _GREETING.pack(secrets.token_bytes(_KEY_BYTES), listener.getsockname()[1])


def _connect(host: str, port: int, key: bytes, number: int) -> _Link:
    try:
        connection = socket.create_connection((host.strip("[]"), port), timeout=_GREETING_SECONDS)
    except OSError as error:
        raise InputError(
            f"process {number} cannot reach the first one at {host}:{port} ({error}); let the hosts reach each other "
            "on all ports"
        ) from error
    connection.sendall(_GREETING.pack(key, number))
    connection.settimeout(None)
    return _Link(connection, 0)


def _accept(listener: socket.socket, key: bytes, count: int) -> list[_Link]:
    """Links to so many processes, by their numbers. Whoever does not know the key is sent away."""
    links: dict[int, _Link] = {}
    while len(links) < count:
        connection, _ = listener.accept()
        given, number = _greeting(connection)
        if not hmac.compare_digest(given, key):
            connection.close()
            continue
        connection.settimeout(None)
        links[number] = _Link(connection, number)
    return [links[number] for number in sorted(links)]


def _greeting(connection: socket.socket) -> tuple[bytes, int]:
    """The key that whoever connected gives, and its number."""
    connection.settimeout(_GREETING_SECONDS)
    given = b""
    try:
        while len(given) < _GREETING.size and (more := connection.recv(_GREETING.size - len(given))):
            given += more
    except OSError:
        pass  # it says too little, too late
    return _GREETING.unpack(given) if len(given) == _GREETING.size else (b"", 0)
