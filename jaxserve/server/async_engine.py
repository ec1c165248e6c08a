"""The engine on a thread of its own, behind an event loop."""

import asyncio
import contextlib
import dataclasses
import functools
import logging
import queue
import threading
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jaxserve.errors import InputError
from jaxserve.outputs import RequestOutput, add_delta
from jaxserve.sampling_params import SamplingParams
from jaxserve.stats import EngineStats

if TYPE_CHECKING:  # they bring JAX with them
    from jaxserve.engine.engine import Engine
    from jaxserve.engine.input_processor import Prompt

logger = logging.getLogger(__name__)


class EngineDead(Exception):
    """The engine does not run, so no request can be served. The message is one sentence."""


@dataclasses.dataclass(eq=False)
class _Mailbox:
    """What a caller has not taken yet: one delta for each request, so that a slow reader gets fewer, larger ones."""

    deltas: dict[str, RequestOutput] = dataclasses.field(default_factory=dict)
    error: Exception | None = None
    filled: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)

    def put(self, delta: RequestOutput) -> None:
        add_delta(self.deltas, delta)
        self.filled.set()

    def fail(self, error: Exception) -> None:
        self.error = error
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


class AsyncEngine:
    """Runs an `Engine` on a thread of its own, and hands its output to the coroutines of one event loop.

    The thread owns the engine: coroutines put calls into its inbox, which it makes between two steps. The mailboxes
    and the cause of death belong to the event loop, which the thread reaches by `call_soon_threadsafe` only. So nothing
    is shared, and nothing needs a lock.

    An asynchronous context manager: the thread runs inside. The engine itself stays its owner's to close.
    """

    def __init__(self, engine: "Engine"):
        self._engine = engine
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._stopping = False  # the thread's own
        self._mailboxes: dict[str, _Mailbox] = {}  # by request id
        self._asked: set[asyncio.Future[EngineStats]] = set()
        self._cause_of_death: str | None = "the engine has not been started"

    # What the engine knows about its model

    @property
    def sampling_defaults(self) -> dict[str, Any]:
        return self._engine.sampling_defaults

    @property
    def max_model_len(self) -> int:
        return self._engine.config.max_model_len

    @property
    def max_logprobs(self) -> int:
        return self._engine.config.max_logprobs

    async def render_chat(self, messages: Sequence[dict[str, Any]], **template_arguments: Any) -> list[int]:
        """The tokens of a conversation in the model's chat template."""
        return await asyncio.to_thread(self._engine.inputs.render_chat, messages, **template_arguments)

    @property
    def tokenizer(self) -> Any:
        """The `transformers` tokenizer, or None with `skip_tokenizer_init`."""
        return self._engine.tokenizer

    async def tokenize(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return await asyncio.to_thread(self._engine.inputs.tokenize, text, add_special_tokens=add_special_tokens)

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        return await asyncio.to_thread(self._engine.inputs.detokenize, token_ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The tokens' text, special tokens included; empty if the engine makes no text."""
        return self._engine.tokenizer.decode(token_ids) if self._engine.tokenizer else ""

    async def stats(self) -> EngineStats:
        """Where the engine stands between two of its steps. `EngineDead` if it does not run."""
        self._check_alive()
        asked: asyncio.Future[EngineStats] = self._loop.create_future()
        self._asked.add(asked)
        self._inbox.put(lambda: self._post(self._tell, asked, self._engine.stats()))
        try:
            return await asked
        finally:
            self._asked.discard(asked)

    # Requests

    async def generate(
        self, prompts: Mapping[str, "Prompt"], params: SamplingParams, *, priority: int = 0, cache_salt: str = ""
    ) -> AsyncGenerator[RequestOutput]:
        """Run the prompts, each under its request id; yields what was added to them, as it comes.

        `priority` and `cache_salt` are those of `Engine.add`. `InputError` if one of the prompts cannot be served, and
        then none runs. `EngineDead` at any point. Closing the iterator early, or cancelling the task that waits in it,
        aborts what has not ended.
        """
        self._check_alive()
        if not self._mailboxes.keys().isdisjoint(prompts):
            raise InputError(f"one of the request ids {', '.join(prompts)} is of a running request; give another")
        tokenized = await asyncio.to_thread(self._tokenize, prompts, params)
        self._check_alive()
        mailbox = _Mailbox()
        self._mailboxes |= dict.fromkeys(prompts, mailbox)
        self._inbox.put(functools.partial(self._add, tokenized, params, priority, cache_salt))
        unfinished = set(prompts)
        try:
            while unfinished:
                for delta in await mailbox.take():
                    if delta.finished:
                        unfinished.discard(delta.request_id)
                    yield delta
        finally:
            for request_id in prompts:
                del self._mailboxes[request_id]
            if unfinished:
                self._inbox.put(functools.partial(self._abort, unfinished))

    def _tokenize(self, prompts: Mapping[str, "Prompt"], params: SamplingParams) -> dict[str, "Prompt"]:
        """The checked prompts as token ids, so that long ones do not hold up the engine's thread."""
        return {
            request_id: {"prompt_token_ids": self._engine.inputs.check(prompt, params).prompt_token_ids}
            for request_id, prompt in prompts.items()
        }

    # Life

    @property
    def is_healthy(self) -> bool:
        return self._cause_of_death is None

    async def __aenter__(self) -> "AsyncEngine":
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._stopping, self._cause_of_death = False, None
        self._thread.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """End all requests, with `EngineDead` for those who wait for them, and the thread."""
        self._die("the server is shutting down")
        if self._thread.is_alive():
            self._inbox.put(functools.partial(self._abort, list(self._mailboxes)))
            self._inbox.put(self._stop)
            await asyncio.to_thread(self._thread.join)

    def _check_alive(self) -> None:
        if self._cause_of_death is not None:
            raise EngineDead(self._cause_of_death)

    # On the event loop, called by the thread

    def _deliver(self, deltas: list[RequestOutput]) -> None:
        for delta in deltas:
            mailbox = self._mailboxes.get(delta.request_id)
            if mailbox:  # else its caller has left, and the engine is about to hear of it
                mailbox.put(delta)

    def _refuse(self, request_ids: Iterable[str], error: InputError) -> None:
        for request_id in request_ids:
            if request_id in self._mailboxes:
                self._mailboxes[request_id].fail(error)

    @staticmethod
    def _tell(asked: "asyncio.Future[EngineStats]", stats: EngineStats) -> None:
        if not asked.done():  # else whoever asked has left
            asked.set_result(stats)

    def _die(self, cause: str) -> None:
        self._cause_of_death = self._cause_of_death or cause
        for asked in self._asked:
            if not asked.done():
                asked.set_exception(EngineDead(self._cause_of_death))
        for mailbox in self._mailboxes.values():
            mailbox.fail(EngineDead(self._cause_of_death))

    # On the thread

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._empty_inbox()
                if self._engine.has_unfinished:
                    self._post(self._deliver, self._engine.step())
        except BaseException:
            logger.exception("the engine has stopped after an error; every request fails from here on")
            with contextlib.suppress(
                RuntimeError
            ):  # the event loop may be gone, and with it all who would want to know
                self._post(self._die, "the engine has stopped after an error; the server's log has it")

    def _empty_inbox(self) -> None:
        """Make the calls that wait, and wait for one while the engine has nothing to do."""
        if not self._engine.has_unfinished:
            self._inbox.get()()
        with contextlib.suppress(queue.Empty):
            while not self._stopping:
                self._inbox.get_nowait()()

    def _add(self, prompts: Mapping[str, "Prompt"], params: SamplingParams, priority: int, cache_salt: str) -> None:
        try:
            for request_id, prompt in prompts.items():
                self._engine.add(prompt, params, request_id=request_id, priority=priority, cache_salt=cache_salt)
        except InputError as error:
            self._abort(prompts)
            self._post(self._refuse, prompts, error)

    def _abort(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            self._engine.abort(request_id)

    def _stop(self) -> None:
        self._stopping = True

    def _post(self, call: Callable[..., None], *arguments: Any) -> None:
        self._loop.call_soon_threadsafe(call, *arguments)
