"""Messages over a local socket: four bytes of length, then msgpack."""

import select
import socket
import time
from typing import Any, Protocol

import msgspec

_LENGTH = 4  # bytes, big-endian
_CHUNK = 64 * 2**10
_CHUNKS = 64  # that are read before others get their turn


class Closed(Exception):
    """The other end of the socket is gone."""


class HasFileno(Protocol):
    def fileno(self) -> int: ...


class Channel[Incoming]:
    """One end of a local socket, for a loop that must not wait for the other: what it does not take is kept.

    `incoming` is the type of messages that come. Not thread-safe.
    """

    def __init__(self, sock: socket.socket, incoming: Any):
        sock.setblocking(False)
        self.socket = sock
        self._encoder, self._decoder = msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder(incoming)
        self._chunk = memoryview(bytearray(_CHUNK))
        self._received, self._unsent = bytearray(), bytearray()

    @property
    def unsent(self) -> int:
        """Bytes that the socket has not taken yet."""
        return len(self._unsent)

    def send(self, message: msgspec.Struct) -> None:
        """Send, without waiting; `Closed` if nobody can read it."""
        frame = bytearray(_LENGTH)
        self._encoder.encode_into(message, frame, _LENGTH)
        frame[:_LENGTH] = (len(frame) - _LENGTH).to_bytes(_LENGTH, "big")
        self._unsent += frame
        self.flush()

    def flush(self) -> None:
        """Offer the socket what it has not taken yet."""
        try:
            while self._unsent:
                del self._unsent[: self.socket.send(self._unsent)]
        except BlockingIOError:
            pass
        except OSError as error:
            raise Closed from error

    def drain(self, seconds: float | None = None, *, to: int = 0) -> None:
        """Wait until the socket has taken all but `to` bytes, no longer than `seconds` if there are any."""
        deadline = None if seconds is None else time.monotonic() + seconds
        self.flush()
        while self.unsent > to and (deadline is None or time.monotonic() < deadline):
            self._wait(select.POLLOUT, None if deadline is None else max(0.0, deadline - time.monotonic()))
            self.flush()

    def receive(self, *, wait: bool, unless: HasFileno | None = None) -> list[Incoming]:
        """The messages that have come; with `wait`, at least one. `Closed` when none will come any more.

        It waits no longer than until `unless` can be read.
        """
        while True:
            self.flush()
            is_open = self._read()
            if messages := self._take_whole_ones():
                return messages
            if not is_open:
                raise Closed
            if not wait:
                return []
            wait = self._wait(select.POLLIN | (select.POLLOUT if self._unsent else 0), unless=unless)

    def close(self) -> None:
        self.socket.close()

    def _read(self) -> bool:
        """Take over what the socket holds; False if the other end is gone."""
        try:
            for _ in range(_CHUNKS):
                count = self.socket.recv_into(self._chunk)
                if not count:
                    return False
                self._received += self._chunk[:count]
        except BlockingIOError:
            pass
        except OSError:
            return False
        return True

    def _take_whole_ones(self) -> list[Incoming]:
        messages, start = [], 0
        while (begin := start + _LENGTH) <= len(self._received):
            end = begin + int.from_bytes(self._received[start:begin], "big")
            if end > len(self._received):
                break
            messages.append(self._decoder.decode(self._received[begin:end]))
            start = end
        del self._received[:start]
        return messages

    def _wait(self, events: int, seconds: float | None = None, *, unless: HasFileno | None = None) -> bool:
        """Wait for the socket, no longer than until `unless` can be read; False if it can."""
        poll = select.poll()
        poll.register(self.socket, events)
        if unless is not None:
            poll.register(unless, select.POLLIN)
        ready = [fd for fd, _ in poll.poll(None if seconds is None else 1000 * seconds)]
        return unless is None or unless.fileno() not in ready
