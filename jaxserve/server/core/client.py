"""What the server's coroutines use of the engine."""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Iterable, Iterator, Mapping, Sequence
from typing import Any

import msgspec

from jaxserve.chat.format import ChatFormat
from jaxserve.engine.detokenizer import TokenBytes
from jaxserve.engine.input_processor import CheckedInput, InputProcessor, Prompt
from jaxserve.errors import InputError, Name
from jaxserve.outputs import RequestMetrics, RequestOutput, add_delta
from jaxserve.sampling_params import SamplingParams
from jaxserve.server.config import ServerConfig
from jaxserve.server.core.channel import Channel, Closed
from jaxserve.server.core.messages import (
    Abort,
    AdapterChanged,
    Add,
    Delta,
    FromCore,
    LoadAdapter,
    Ping,
    Pong,
    Ready,
    Refused,
    Stepped,
    UnloadAdapter,
)
from jaxserve.server.core.queue import Place, Queue
from jaxserve.server.failures import EngineDead, GrammarFailed, NoPlaceInTime, ShuttingDown, TookTooLong, Unserved
from jaxserve.server.telemetry.record import ABORTED, FAILED, Observer, RequestRecord
from jaxserve.stats import EngineStats

logger = logging.getLogger(__name__)

_FRESH_SECONDS = 1.0  # that a sign of life counts for


class _Mailbox:
    """What a caller has not taken yet: one delta for each request, so that a slow reader gets fewer, larger ones."""

    def __init__(self, inputs: Mapping[str, CheckedInput], arrival_time: float, place: Place):
        self._inputs, self._arrival_time, self._place = inputs, arrival_time, place
        self._waiting = set(inputs)  # the requests that have not begun
        self._deltas: dict[str, RequestOutput] = {}
        self._error: Exception | None = None
        self._filled = asyncio.Event()
        self._timers: list[asyncio.TimerHandle] = []
        self._queue_timer: asyncio.TimerHandle | None = None

    def fail_after(self, seconds: float | None, error: Unserved, *, while_waiting: bool = False) -> None:
        """Fail so long after the arrival; with `while_waiting`, only if a request has not begun by then."""
        if seconds is None:
            return
        loop = asyncio.get_running_loop()
        left = self._arrival_time + seconds - time.perf_counter()
        timer = loop.call_later(left, self.fail, error)
        self._timers.append(timer)
        if while_waiting:
            self._queue_timer = timer

    def begin(self, request_id: str) -> None:
        self._waiting.discard(request_id)
        self._place.begin(len(self._inputs[request_id].prompt_token_ids))
        if not self._waiting and self._queue_timer:
            self._queue_timer.cancel()

    def put(self, delta: Delta) -> None:
        given = self._inputs[delta.request_id]
        output = RequestOutput(
            delta.request_id,
            given.prompt,
            given.prompt_token_ids,
            delta.outputs,
            delta.metrics or RequestMetrics(self._arrival_time),
            delta.finished,
            delta.prompt_logprobs,
            delta.embedding,
        )
        add_delta(self._deltas, output)
        self._filled.set()

    def fail(self, error: Exception) -> None:
        self._error = self._error or error
        self._filled.set()

    async def take(self) -> list[RequestOutput]:
        """All that has come, waiting for it if nothing has. The error, if there is one, comes last."""
        await self._filled.wait()
        if self._error is None:
            self._filled.clear()
        elif not self._deltas:
            raise self._error
        taken, self._deltas = list(self._deltas.values()), {}
        return taken

    def close(self) -> None:
        for timer in self._timers:
            timer.cancel()


class EngineClient:
    """Hands the requests of one event loop's coroutines to the engine core, and its output to them.

    `inputs` checks and tokenises, in worker threads, so that the core gets nothing that it has to refuse. An
    asynchronous context manager: requests are served inside it. Leaving it closes the channel, which ends the core.
    """

    def __init__(self, channel: Channel[FromCore], ready: Ready, inputs: InputProcessor, config: ServerConfig):
        self.ready, self.inputs = ready, inputs
        self.observers: list[Observer] = []
        self.tokens = TokenBytes(inputs.tokenizer.backend_tokenizer) if inputs.tokenizer else None
        self._channel, self._config = channel, config
        self._queue = Queue(
            slots=ready.config.max_num_seqs,
            max_requests=config.max_queued_requests,
            max_tokens=config.max_queued_tokens,
        )
        self._mailboxes: dict[str, _Mailbox] = {}  # by request id
        self._cause_of_death: str | None = "the engine has not been started"
        self._is_closing = False
        self._heard_at = float("-inf")  # on the event loop's clock
        self._listeners: list[asyncio.Future[None]] = []  # for the next sign of life
        self._askers: list[asyncio.Future[EngineStats]] = []  # for where it stands
        self._changing_adapters = asyncio.Lock()  # one change after the other
        self._adapter_changes: list[asyncio.Future[list[str | Name] | None]] = []  # the one that is waited for
        self.has_failed = False  # by itself: it was not closed

    # What the engine knows about its model

    @property
    def sampling_defaults(self) -> dict[str, Any]:
        return self.ready.sampling_defaults

    @property
    def max_model_len(self) -> int:
        return self.inputs.limits.max_model_len

    @property
    def chat(self) -> ChatFormat:
        """How the model speaks; `InputError` if there is no tokenizer."""
        return self.inputs.chat

    async def render_chat(self, /, messages: Sequence[dict[str, Any]], **template_arguments: Any) -> list[int]:
        """The tokens of a conversation in the model's chat template."""
        return await asyncio.to_thread(self.inputs.render_chat, messages, **template_arguments)

    async def tokenize(self, text: str, *, add_special_tokens: bool, must_fit: bool = False) -> list[int]:
        return await asyncio.to_thread(
            self.inputs.tokenize, text, add_special_tokens=add_special_tokens, must_fit=must_fit
        )

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        return await asyncio.to_thread(self.inputs.detokenize, token_ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The tokens' text, special tokens included; empty if the engine makes no text."""
        return self.inputs.tokenizer.decode(token_ids) if self.inputs.tokenizer else ""

    # Requests

    async def generate(
        self,
        prompts: Mapping[str, Prompt],
        params: SamplingParams,
        *,
        priority: int = 0,
        cache_salt: str = "",
        adapter: str | None = None,
        stream: bool = True,
    ) -> AsyncGenerator[RequestOutput]:
        """Run the prompts, each under its request id; yields what was added to them, as it comes.

        `priority` and `cache_salt` are those of `Engine.add`, `adapter` is that of `InputProcessor.check`. Without
        `stream`, what was added is each completion at its end. `InputError` if a prompt cannot be served, and then none
        runs. `Unserved` of one kind or another at any point. Closing the iterator early, or cancelling the task that
        waits in it, aborts what has not ended.
        """
        with self._refusals_told():
            self._check_alive()
            if self._is_closing:
                raise ShuttingDown("the server is shutting down; ask another one, or again later")
            arrival_time = time.perf_counter()
            with self._queue.place(len(prompts) * params.n) as place:
                checked = await asyncio.to_thread(self._check, prompts, params, adapter)
                self._check_alive()
                if not self._mailboxes.keys().isdisjoint(prompts):
                    raise InputError(
                        f"one of the request ids {', '.join(prompts)} is of a running request; give another",
                        field="request_id",
                    )
                place.take_tokens(sum(len(given.prompt_token_ids) for given in checked.values()))
                self._log_prompts(checked)
                mailbox = self._mailbox(checked, arrival_time, place)
                records = {
                    request_id: RequestRecord(
                        request_id, len(given.prompt_token_ids), given.max_tokens, params, arrival_time
                    )
                    for request_id, given in checked.items()
                }
                self._mailboxes |= dict.fromkeys(prompts, mailbox)
                unfinished = set(prompts)
                try:
                    tokens = {request_id: given._replace(prompt=None) for request_id, given in checked.items()}
                    self._send(Add(tokens, params, priority, cache_salt, stream))
                    while unfinished:
                        for delta in await mailbox.take():
                            self._note(delta, records[delta.request_id], stream)
                            if delta.finished:
                                unfinished.discard(delta.request_id)
                                place.end(params.n)
                            _check_grammars(delta)
                            yield delta
                except InputError:  # the core has none of them
                    unfinished.clear()
                    raise
                finally:
                    mailbox.close()
                    for request_id in prompts:
                        del self._mailboxes[request_id]
                    if unfinished:
                        self._send(Abort([*unfinished]))
                        self._note_unfinished(records[request_id] for request_id in unfinished)

    @contextlib.contextmanager
    def _refusals_told(self) -> Iterator[None]:
        """Observers are told of what is not served within."""
        try:
            yield
        except Unserved as error:
            for observer in self.observers:
                observer.refused(error.reason)
            raise

    def _note(self, delta: RequestOutput, record: RequestRecord, stream: bool) -> None:
        """Put down what has come of a request, and tell the observers if it is its first token, or its end."""
        now = time.perf_counter()
        record.take(delta, now)
        if record.first_token_time is None and (stream or delta.finished):
            record.first_token_time = now if stream else delta.metrics.first_token_time
            for observer in self.observers:
                observer.first_token(record)
        if delta.finished:
            for observer in self.observers:
                observer.ended(record)

    def _note_unfinished(self, records: Iterable[RequestRecord]) -> None:
        for record in records:
            record.end(ABORTED if self._cause_of_death is None else FAILED)
            for observer in self.observers:
                observer.ended(record)

    def _log_prompts(self, checked: Mapping[str, CheckedInput]) -> None:
        if self._config.log_prompts:
            for request_id, given in checked.items():
                text = self.decode(given.prompt_token_ids) if given.prompt is None else given.prompt
                logger.info("prompt", extra={"facts": {"id": request_id, "prompt": text}})

    def _mailbox(self, checked: Mapping[str, CheckedInput], arrival_time: float, place: Place) -> _Mailbox:
        mailbox, config = _Mailbox(checked, arrival_time, place), self._config
        mailbox.fail_after(
            config.queue_timeout,
            NoPlaceInTime(f"the request has waited for {config.queue_timeout} seconds for a place; try again later"),
            while_waiting=True,
        )
        mailbox.fail_after(
            config.request_timeout,
            TookTooLong(
                f"the request has taken {config.request_timeout} seconds, which is as long as it may; ask for less"
            ),
        )
        return mailbox

    def _check(
        self, prompts: Mapping[str, Prompt], params: SamplingParams, adapter: str | None
    ) -> dict[str, CheckedInput]:
        return {request_id: self.inputs.check(prompt, params, adapter) for request_id, prompt in prompts.items()}

    # Adapters

    async def load_adapter(self, name: str, path: str) -> None:
        """Let requests name one more adapter, of that directory or id of the hub, which the engine's process reads.

        `InputError` if it cannot be read, is not for this model, or has no place; `EngineDead`.
        """
        async with self._changing_adapters:
            await self._change_adapters(LoadAdapter(name, path))
            self.inputs.adapters[name] = path

    async def unload_adapter(self, name: str) -> None:
        """Let no more requests name it. Those that do end with it. `InputError` if there is none of that name."""
        async with self._changing_adapters:
            self.inputs.check_adapter(name)
            del self.inputs.adapters[name]
            await self._change_adapters(UnloadAdapter(name))

    async def _change_adapters(self, message: LoadAdapter | UnloadAdapter) -> None:
        self._check_alive()
        refused = await self._answer(message, self._adapter_changes)
        if refused is not None:
            raise InputError(*refused)

    # Life

    async def check_health(self) -> None:
        """Returns once the core has shown that it runs steps, or has none to run; `EngineDead` if it has no such sign.

        What it sent within the last second is one. If that is nothing, it is asked, and has `health_timeout` to answer.
        """
        self._check_alive()
        if self._loop.time() - self._heard_at >= _FRESH_SECONDS:
            await self._ask(self._listeners)

    async def stats(self) -> EngineStats:
        """Where the engine stands, between two of its steps; `EngineDead` if it does not say so in `health_timeout`."""
        self._check_alive()
        return await self._ask(self._askers)

    async def _ask[T](self, waiting: "list[asyncio.Future[T]]") -> T:
        """Ask the core for a sign of life; what comes of it is given to those in `waiting`."""
        seconds = self._config.health_timeout
        try:
            async with asyncio.timeout(seconds):
                return await self._answer(Ping(), waiting)
        except TimeoutError:
            raise EngineDead(f"the engine has given no sign of life for {seconds:g} seconds") from None

    async def _answer[T](self, message: msgspec.Struct, waiting: "list[asyncio.Future[T]]") -> T:
        """Send the core a message; what comes of it is given to those in `waiting`."""
        answer: asyncio.Future[T] = self._loop.create_future()
        waiting.append(answer)
        self._send(message)
        return await answer

    async def __aenter__(self) -> "EngineClient":
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._channel.socket, self._read)
        self._cause_of_death = None
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    @property
    def takes_requests(self) -> bool:
        return self._cause_of_death is None and not self._is_closing

    @property
    def unfinished(self) -> int:
        """Completions that were asked for and have not ended."""
        return self._queue.requests

    def stop_taking_requests(self) -> None:
        """Refuse what comes from now on, with `ShuttingDown`; what is here goes on."""
        self._is_closing = True

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
            waiting: list[asyncio.Future[Any]] = [*self._listeners, *self._askers, *self._adapter_changes]
            for future in waiting:
                if not future.done():
                    future.set_exception(EngineDead(cause))
            self._listeners.clear()
            self._askers.clear()
            self._adapter_changes.clear()

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
        _settle(self._listeners, None)

    def _take(self, message: FromCore) -> None:
        match message:
            case Stepped():
                for request_id in message.begun:
                    if request_id in self._mailboxes:
                        self._mailboxes[request_id].begin(request_id)
                for delta in message.deltas:
                    mailbox = self._mailboxes.get(delta.request_id)
                    if mailbox:  # else its caller has left, and the core is about to hear of it
                        mailbox.put(delta)
            case Refused():
                for request_id in message.request_ids:
                    if request_id in self._mailboxes:
                        self._mailboxes[request_id].fail(InputError(*message.parts, field=message.field))
            case AdapterChanged():
                _settle(self._adapter_changes, message.refused)
            case Pong():
                _settle(self._askers, message.stats)
            case _:
                raise TypeError(f"the engine sent {type(message).__name__} after its start")


def _check_grammars(delta: RequestOutput) -> None:
    for output in delta.outputs:
        if output.finish_reason == "error":
            raise GrammarFailed(f"the answer cannot go on as it has to ({output.stop_reason}); ask for a simpler form")


def _settle[T](waiting: list[asyncio.Future[T]], result: T) -> None:
    """Give `result` to those in `waiting` who have not left, and empty it."""
    for future in waiting:
        if not future.done():
            future.set_result(result)
    waiting.clear()
