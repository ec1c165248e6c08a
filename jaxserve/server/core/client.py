"""What the server's coroutines use of the engine."""

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

import msgspec

from jaxserve.engine.input_processor import CheckedInput, InputProcessor, Prompt
from jaxserve.errors import InputError
from jaxserve.outputs import RequestMetrics, RequestOutput, add_delta
from jaxserve.sampling_params import SamplingParams
from jaxserve.server.core.channel import Channel, Closed
from jaxserve.server.core.messages import Abort, Add, Delta, FromCore, Ping, Pong, Ready, Refused, Stepped
from jaxserve.server.failures import EngineDead

_FRESH_SECONDS = 1.0  # that a sign of life counts for


@dataclasses.dataclass(eq=False)
class _Mailbox:
    """What a caller has not taken yet: one delta for each request, so that a slow reader gets fewer, larger ones."""

    inputs: Mapping[str, CheckedInput]
    arrival_time: float
    deltas: dict[str, RequestOutput] = dataclasses.field(default_factory=dict)
    error: Exception | None = None
    filled: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)

    def put(self, delta: Delta) -> None:
        given = self.inputs[delta.request_id]
        output = RequestOutput(
            delta.request_id,
            given.prompt,
            given.prompt_token_ids,
            delta.outputs,
            delta.metrics or RequestMetrics(self.arrival_time),
            delta.finished,
            delta.prompt_logprobs,
        )
        add_delta(self.deltas, output)
        self.filled.set()

    def fail(self, error: Exception) -> None:
        self.error = self.error or error
        self.filled.set()

    async def take(self) -> list[RequestOutput]:
        """All that has come, waiting for it if nothing has. The error, if there is one, comes last."""
        await self.filled.wait()
        if self.error is None:
            self.filled.clear()
        elif not self.deltas:
            raise self.error
        taken, self.deltas = list(self.deltas.values()), {}
        return taken


class EngineClient:
    """Hands the requests of one event loop's coroutines to the engine core, and its output to them.

    `inputs` checks and tokenises, in worker threads, so that the core gets nothing that it has to refuse. An
    asynchronous context manager: requests are served inside it. Leaving it closes the channel, which ends the core.
    """

    def __init__(self, channel: Channel[FromCore], ready: Ready, inputs: InputProcessor):
        self.ready, self.inputs = ready, inputs
        self._channel = channel
        self._mailboxes: dict[str, _Mailbox] = {}  # by request id
        self._cause_of_death: str | None = "the engine has not been started"
        self._heard_at = float("-inf")  # on the event loop's clock
        self._listeners: list[asyncio.Future[None]] = []  # for the next sign of life
        self.has_failed = False  # by itself: it was not closed

    # What the engine knows about its model

    @property
    def sampling_defaults(self) -> dict[str, Any]:
        return self.ready.sampling_defaults

    @property
    def max_model_len(self) -> int:
        return self.inputs.limits.max_model_len

    @property
    def max_logprobs(self) -> int:
        return self.inputs.limits.max_logprobs

    async def render_chat(self, messages: Sequence[dict[str, Any]], **template_arguments: Any) -> list[int]:
        """The tokens of a conversation in the model's chat template."""
        return await asyncio.to_thread(self.inputs.render_chat, messages, **template_arguments)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The tokens' text, special tokens included; empty if the engine makes no text."""
        return self.inputs.tokenizer.decode(token_ids) if self.inputs.tokenizer else ""

    # Requests

    async def generate(
        self, prompts: Mapping[str, Prompt], params: SamplingParams, *, priority: int = 0, stream: bool = True
    ) -> AsyncGenerator[RequestOutput]:
        """Run the prompts, each under its request id; yields what was added to them, as it comes.

        Without `stream`, that is each completion at its end. `InputError` if a prompt cannot be served, and then none
        runs. `EngineDead` at any point. Closing the iterator early, or cancelling the task that waits in it, aborts
        what has not ended.
        """
        self._check_alive()
        arrival_time = time.perf_counter()
        checked = await asyncio.to_thread(self._check, prompts, params)
        self._check_alive()
        if not self._mailboxes.keys().isdisjoint(prompts):
            raise InputError(f"one of the request ids {', '.join(prompts)} is of a running request; give another")
        mailbox = _Mailbox(checked, arrival_time)
        self._mailboxes |= dict.fromkeys(prompts, mailbox)
        unfinished = set(prompts)
        try:
            tokens = {request_id: given._replace(prompt=None) for request_id, given in checked.items()}
            self._send(Add(tokens, params, priority, stream))
            while unfinished:
                for delta in await mailbox.take():
                    if delta.finished:
                        unfinished.discard(delta.request_id)
                    yield delta
        finally:
            for request_id in prompts:
                del self._mailboxes[request_id]
            if unfinished:
                self._send(Abort([*unfinished]))

    def _check(self, prompts: Mapping[str, Prompt], params: SamplingParams) -> dict[str, CheckedInput]:
        return {request_id: self.inputs.check(prompt, params) for request_id, prompt in prompts.items()}

    # Life

    async def check_health(self, seconds: float) -> None:
        """Returns once the core has shown that it runs steps, or has none to run; `EngineDead` if it has no such sign.

        What it sent within the last second is one. If that is nothing, it is asked, and has so many seconds to answer.
        """
        self._check_alive()
        if self._loop.time() - self._heard_at < _FRESH_SECONDS:
            return
        sign = self._loop.create_future()
        self._listeners.append(sign)
        self._send(Ping())
        try:
            async with asyncio.timeout(seconds):
                await sign
        except TimeoutError:
            raise EngineDead(f"the engine has given no sign of life for {seconds:g} seconds") from None

    async def __aenter__(self) -> "EngineClient":
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._channel.socket, self._read)
        self._cause_of_death = None
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all requests, with `EngineDead` for those who wait for them, and the core."""
        self._die("the server is shutting down")

    def _check_alive(self) -> None:
        if self._cause_of_death is not None:
            raise EngineDead(self._cause_of_death)

    def _die(self, cause: str) -> None:
        if self._cause_of_death is None:
            self._cause_of_death = cause
            self._loop.remove_reader(self._channel.socket)
            self._loop.remove_writer(self._channel.socket)
            self._channel.close()
            for mailbox in self._mailboxes.values():
                mailbox.fail(EngineDead(cause))
            for sign in self._listeners:
                if not sign.done():
                    sign.set_exception(EngineDead(cause))
            self._listeners.clear()

    # The channel

    def _send(self, message: msgspec.Struct) -> None:
        if self._cause_of_death is None:
            with contextlib.suppress(Closed):  # which `_read` is about to find too
                self._channel.send(message)
                if self._channel.unsent:
                    self._loop.add_writer(self._channel.socket, self._write)

    def _write(self) -> None:
        """Called when the core takes more of what it was sent."""
        with contextlib.suppress(Closed):
            self._channel.flush()
            if not self._channel.unsent:
                self._loop.remove_writer(self._channel.socket)

    def _read(self) -> None:
        """Called when the core has sent something, or has gone."""
        try:
            messages = self._channel.receive(wait=False)
        except Closed:
            self.has_failed = True
            self._die("the engine has stopped after an error; the server's log has it")
            return
        self._heard_at = self._loop.time()
        for message in messages:
            self._take(message)
        for sign in self._listeners:
            if not sign.done():
                sign.set_result(None)
        self._listeners.clear()

    def _take(self, message: FromCore) -> None:
        match message:
            case Stepped():
                for delta in message.deltas:
                    mailbox = self._mailboxes.get(delta.request_id)
                    if mailbox:  # else its caller has left, and the core is about to hear of it
                        mailbox.put(delta)
            case Refused():
                for request_id in message.request_ids:
                    if request_id in self._mailboxes:
                        self._mailboxes[request_id].fail(InputError(message.sentence))
            case Pong():
                pass  # that it came is all that it says
            case _:
                raise TypeError(f"the engine sent {type(message).__name__} after its start")
