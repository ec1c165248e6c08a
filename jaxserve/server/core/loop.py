"""The engine core's loop: messages are read between two steps, and what each step added is sent."""

import contextlib
import dataclasses
import os
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from jaxserve.errors import InputError
from jaxserve.server.core.channel import Channel, Closed
from jaxserve.server.core.messages import (
    Abort,
    AdapterChanged,
    Add,
    Delta,
    LoadAdapter,
    Ping,
    Pong,
    Ready,
    Refused,
    Stepped,
    ToCore,
    UnloadAdapter,
)
from jaxserve.server.core.preparing import Preparing
from jaxserve.stats import EngineStats

if TYPE_CHECKING:  # it brings JAX with it
    from llguidance import LLMatcher

    from jaxserve.engine.engine import Engine

_MAX_UNSENT = 64 * 2**20  # bytes; a server that far behind has stopped reading
_LAST_WORDS_SECONDS = 5  # for the server to take what came before an error


def describe(engine: "Engine") -> Ready:
    """What the server has to know of the engine."""
    return Ready(
        engine.config,
        engine.inputs.limits,
        engine.sampling_defaults,
        engine.attention,
        engine.startup_seconds,
        os.getpid(),
    )


class CoreLoop:
    """Runs an `Engine` for the server at the other end of the channel, until that is closed.

    All happens in one thread but what `Preparing` does. It waits for messages only while the engine has nothing to do,
    and for the server to read only if that is hopelessly behind.
    """

    def __init__(self, engine: "Engine", channel: Channel[ToCore]):
        self._engine, self._channel = engine, channel
        self._preparing = Preparing()
        self._begun: list[str] = []  # requests, since the last message
        engine.on_begin = self._begun.append

    def run(self) -> None:
        """Returns once the server has gone, and raises what the engine fails with; the channel is closed either way."""
        try:
            while True:
                for message in self._channel.receive(wait=not self._engine.has_unfinished, unless=self._preparing):
                    self._handle(message)
                for message, prepared in self._preparing.take():
                    self._take_prepared(message, prepared.result)
                if self._engine.has_unfinished:
                    self._step()
        except Closed:
            self._engine.abort_all()
        except BaseException:
            with contextlib.suppress(Closed):
                self._channel.drain(_LAST_WORDS_SECONDS)
            raise
        finally:
            self._preparing.close()
            self._channel.close()

    def _handle(self, message: ToCore) -> None:
        match message:
            case Add() if self._engine.grammars.knows(message.params):
                self._add(message, partial(self._engine.grammars.compiled, message.params))
            case Add():
                self._preparing.put(message, partial(self._engine.grammars.compiled, message.params))
            case Abort():
                self._abort(message.request_ids)
            case LoadAdapter():
                self._preparing.put(message, partial(self._engine.adapters.read, message.name, message.path))
            case UnloadAdapter():
                self._change_adapters(partial(self._engine.adapters.remove, message.name))
            case Ping():
                self._channel.send(Pong(self._stats()))
            case _:
                raise TypeError(f"the server sent {type(message).__name__} to an engine that runs")

    def _take_prepared(self, message: Add | LoadAdapter, prepared: Callable[[], Any]) -> None:
        if isinstance(message, Add):
            self._add(message, prepared)
        else:
            self._change_adapters(lambda: self._engine.adapters.put(prepared(), message.path))

    def _change_adapters(self, change: Callable[[], None]) -> None:
        try:
            change()
            refused = None
        except InputError as error:
            refused = [*error.parts]
        self._channel.send(AdapterChanged(refused))

    def _stats(self) -> EngineStats:
        stats = self._engine.stats()
        return dataclasses.replace(stats, waiting=stats.waiting + self._preparing.completions)

    def _add(self, message: Add, compiled: "Callable[[], LLMatcher | None]") -> None:
        added: list[str] = []
        try:
            grammar = compiled()
            for request_id, checked in message.requests.items():
                self._engine.add(
                    checked,
                    message.params,
                    request_id=request_id,
                    priority=message.priority,
                    cache_salt=message.cache_salt,
                    stream=message.stream,
                    grammar=grammar,
                )
                added.append(request_id)
        except InputError as error:
            self._abort(added)
            self._channel.send(Refused([*message.requests], [*error.parts], error.field))

    def _abort(self, request_ids: list[str]) -> None:
        for request_id in request_ids:
            self._preparing.drop(request_id)
            self._engine.abort(request_id)

    def _step(self) -> None:
        outputs = self._engine.step()
        if outputs or self._begun:
            deltas = [
                Delta(
                    output.request_id,
                    output.outputs,
                    output.finished,
                    output.metrics if output.finished else None,
                    output.prompt_logprobs,
                    output.embedding,
                )
                for output in outputs
            ]
            self._channel.send(Stepped(self._begun, deltas))
            self._begun.clear()
        if self._channel.unsent > _MAX_UNSENT:
            self._channel.drain(to=_MAX_UNSENT // 2)
