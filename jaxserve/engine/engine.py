"""Requests in, tokens out: the loop that ties scheduler, runner and text together."""

import dataclasses
import gc
import itertools
import random
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from flax import nnx

from jaxserve.checkpoint.exchange import Handover
from jaxserve.engine.batch_builder import StepBatchBuilder, sampling_needs
from jaxserve.engine.constraint import Constraint
from jaxserve.engine.detokenizer import TextStream, TokenBytes
from jaxserve.engine.grammars import Grammars
from jaxserve.engine.input_processor import CheckedInput, InputProcessor
from jaxserve.engine.live_adapters import LiveAdapters
from jaxserve.engine.meter import Meter
from jaxserve.engine.pace import Pace
from jaxserve.engine.page_pool import PagePool, root_key
from jaxserve.engine.page_tables import PageTables
from jaxserve.engine.request import Request, State
from jaxserve.engine.scheduler import Chunk, Decode, Prefill, Scheduler
from jaxserve.engine.startup import Loaded
from jaxserve.errors import InputError
from jaxserve.outputs import CompletionOutput, Logprob, Logprobs, RequestMetrics, RequestOutput
from jaxserve.runner.compilation import compilations
from jaxserve.runner.step_batch import DecodeArrays, HiddenRows, LogprobRows, StepBatch, StepResult
from jaxserve.sampling_params import SamplingParams
from jaxserve.stats import EngineStats

if TYPE_CHECKING:
    from llguidance import LLMatcher


@dataclasses.dataclass(eq=False)
class _Group:
    """One caller's request: as many sequences as it asked completions for."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    metrics: RequestMetrics
    requests: list[Request] = dataclasses.field(default_factory=list)
    prompt_logprobs: list[Logprobs | None] = dataclasses.field(default_factory=list)  # the first sequence's, so far

    @property
    def finished(self) -> bool:
        return all(request.state is State.FINISHED for request in self.requests)

    def note_first_token(self, now: float, num_cached: int) -> None:
        if self.metrics.first_token_time is None:
            self.metrics.first_token_time, self.metrics.num_cached_tokens = now, num_cached


@dataclasses.dataclass(eq=False)
class _Live:
    """What the engine keeps beside a sequence that has not ended."""

    group: _Group
    index: int
    text: TextStream | None
    stream: bool  # whether the caller is given each step's tokens
    each_step: bool  # whether tokens have to be looked at as they come: to be given out, for stop strings and the like
    added: CompletionOutput  # what the caller has not been given yet
    pooled: np.ndarray | None = None  # float32 [hidden], of an embedding: the sum so far


@dataclasses.dataclass
class _Dispatched:
    """A step that the device works on."""

    step: Prefill | Decode
    batch: StepBatch
    result: StepResult
    at: float


class Engine:
    """Serves requests on one model. Not thread-safe: one thread adds, steps and aborts.

    `step` dispatches a step before it reads the tokens of the one before, so that the host's work costs the device no
    time. A sequence that turns out to have ended has surplus tokens under way, which are dropped.
    """

    def __init__(self, loaded: Loaded, clock: Callable[[], float] = time.perf_counter):
        config = loaded.config
        self.config, self.model_config = config, loaded.model_config
        self.tokenizer, self.sampling_defaults = loaded.tokenizer, loaded.sampling_defaults
        self.startup_seconds, self.attention = loaded.seconds, loaded.attention
        self.inputs = InputProcessor(loaded.tokenizer, loaded.limits, loaded.chat)
        self.grammars = Grammars(
            loaded.tokenizer, vocab_size=loaded.model_config.vocab_size, eos_token_ids=sorted(loaded.eos_token_ids)
        )
        self._tokens = TokenBytes(loaded.tokenizer.backend_tokenizer) if loaded.tokenizer else None
        self.runner = loaded.runner
        self.pool = PagePool(config.num_pages)
        self._pace = Pace(
            loaded.buckets,
            max_decode_steps=config.max_decode_steps,
            max_itl=None if config.max_itl_ms is None else config.max_itl_ms / 1000,
            burst=config.decode_burst_ms / 1000,
        )
        self.scheduler = Scheduler(
            PageTables(self.pool, loaded.cache_layout),
            max_num_seqs=config.max_num_seqs,
            max_prefill_seqs=loaded.buckets.max_prefill_rows,
            page_size=config.page_size,
            prefill_budget=self._pace.prefill_budget,
            decode_steps=self._pace.decode_steps,
            mixed=loaded.buckets.mixed,
        )
        self.builder = StepBatchBuilder(
            loaded.buckets,
            vocab_size=loaded.model_config.vocab_size,
            page_groups=len(loaded.cache_layout.windows),
        )
        self._live: dict[Request, _Live] = {}
        self._groups: dict[str, _Group] = {}
        self._dispatched: _Dispatched | None = None
        self.adapters = LiveAdapters(
            loaded.adapters, loaded.runner, self.inputs, lambda: {request.adapter for request in self._live}
        )
        self._new_weights: list[Handover] | None = None  # they wait for the requests that came before them
        self._held: list[Request] = []  # which wait for those weights
        self.is_closed = False
        self._clock, self._collected_at = clock, 0.0
        self.meter = Meter(
            weight_bytes=self.runner.weight_bytes_per_step,
            kv_bytes=self.runner.kv_bytes_per_token,
            windows=[kind.window for kind in self.model_config.layer_kinds],
        )
        self.on_step: Callable[[StepBatch], None] | None = None  # told of each step once its tokens are on the host
        self.on_begin: Callable[[str], None] | None = None  # told of each request when its first step is dispatched
        self._arrivals = itertools.count()
        self._seeds = random.Random(config.seed)
        self._compiled_at_start = compilations.count
        # What start-up has made stays; without this every collection would walk all of it, in the midst of a step.
        gc.collect()
        gc.freeze()

    # Requests

    def add(
        self,
        checked: CheckedInput,
        params: SamplingParams,
        *,
        request_id: str,
        priority: int = 0,
        cache_salt: str = "",
        stream: bool = True,
        grammar: "LLMatcher | None" = None,
    ) -> None:
        """Queue a request that `InputProcessor.check` has let through with these `params`.

        `InputError` if there is one with its id, and then nothing has changed. Requests share cached prefixes only with
        those of the same `cache_salt`. Without `stream`, nothing is given out before a completion ends. `grammar` is
        what `grammars.compiled(params)` gives.
        """
        if request_id in self._groups:
            raise InputError(f"there is a running request with the id {request_id!r}; give another", field="request_id")
        adapter, own_prefixes = self.adapters.of(checked.adapter)
        seed = params.seed if params.seed is not None else self._seeds.getrandbits(63)
        group = _Group(request_id, checked.prompt, checked.prompt_token_ids, RequestMetrics(self._clock()))
        ends = self.inputs.limits.eos_token_ids
        constraints = [
            Constraint(grammar, params.thinking, ends) if params.constrained else None for _ in range(params.n)
        ]
        # Log-probabilities of a prompt, and the mean over it, need all of it computed.
        whole = params.prompt_logprobs is not None or params.pooling == "mean"
        cached = self.config.enable_prefix_caching and not whole
        for index in range(params.n):
            request = Request(
                request_id,
                checked.prompt_token_ids,
                params,
                seed=seed + index,
                max_tokens=checked.max_tokens,
                arrival=next(self._arrivals),
                priority=priority,
                stop_token_ids=checked.stop_token_ids,
                needs=int(sampling_needs(params)),
                adapter=adapter,
                cache_salt=root_key(cache_salt, own_prefixes) if cached else None,
                constraint=constraints[index],
            )
            group.requests.append(request)
            self._live[request] = _Live(
                group,
                index,
                self._text_stream(checked.prompt_token_ids, params),
                stream,
                each_step=stream or bool(params.stop) or params.logprobs is not None or bool(constraints[index]),
                added=CompletionOutput(index),
            )
            if self._new_weights is None:
                self.scheduler.add(request)
            else:
                self._held.append(request)
        self._groups[request_id] = group

    def abort(self, request_id: str) -> None:
        """End a request now; its pages are free at once. No effect on one that has ended."""
        group = self._groups.pop(request_id, None)
        for request in group.requests if group else ():
            self._live.pop(request, None)
            if request in self._held:
                self._held.remove(request)
            else:
                self.scheduler.finish(request)

    def abort_all(self) -> None:
        for request_id in list(self._groups):
            self.abort(request_id)

    @property
    def has_unfinished(self) -> bool:
        return bool(self._groups)

    def stats(self) -> EngineStats:
        """Where the engine stands."""
        scheduler, pool, meter = self.scheduler, self.pool, self.meter
        return EngineStats(
            seconds=self._clock(),
            running=scheduler.num_running,
            waiting=scheduler.num_waiting + len(self._held),
            max_running=self.config.max_num_seqs,
            pages_held=pool.num_held,
            pages_cached=pool.num_cached,
            pages_free=pool.num_available - pool.num_cached,
            total_prefix_cache_queries=scheduler.prefix_cache_queries,
            total_prefix_cache_hits=scheduler.prefix_cache_hits,
            total_preemptions=scheduler.num_preemptions,
            total_compilations=compilations.count - self._compiled_at_start,
            **meter.totals(),
        )

    # Weights

    def update_weights(self, state: nnx.State) -> None:
        """Serve with the parameters `state` as soon as the requests that are here now have ended.

        Those end on the weights that they began with; requests that come from now on wait for the new ones. So none
        ever sees both, and nothing is computed twice. `InputError` if `state` does not belong to this model; nothing
        has changed then. A second call before that replaces the first.
        """
        self._new_weights = self.runner.check_weights(state)
        self._update_weights()

    @property
    def waits_for_new_weights(self) -> bool:
        return self._new_weights is not None

    def _update_weights(self) -> None:
        """Put the new weights in place, if no request still needs the old ones."""
        if self._new_weights is None or self.scheduler.num_running or self.scheduler.num_waiting:
            return
        new, self._new_weights = self._new_weights, None
        self.runner.update_weights(new)
        self.pool.forget()  # what the prefix cache holds was computed with the old weights
        for request in self._held:
            self.scheduler.add(request)
        self._held.clear()

    # Steps

    def step(self) -> list[RequestOutput]:
        """Dispatch the next step and return what the one before it added, a delta for each request that grew."""
        self._update_weights()
        start = time.perf_counter()
        step = self.scheduler.schedule()
        self.meter.host_seconds.schedule += time.perf_counter() - start
        before, self._dispatched = self._dispatched, self._dispatch(step) if step else None
        return self._collect(before) if before else []

    def close(self) -> None:
        """Drop all requests and free the device's memory."""
        self.is_closed = True
        self.abort_all()
        self._dispatched = None
        self.runner.close()

    def _dispatch(self, step: Prefill | Decode) -> _Dispatched:
        start = time.perf_counter()
        batch = self.builder.build(step)
        packed = time.perf_counter()
        dispatched = _Dispatched(step, batch, self.runner.dispatch(batch), self._clock())
        if isinstance(step, Prefill):
            self._note_begun(step.chunks, dispatched.at)
        self.meter.host_seconds.pack += packed - start
        self.meter.host_seconds.dispatch += time.perf_counter() - packed
        return dispatched

    def _note_begun(self, chunks: list[Chunk], now: float) -> None:
        for chunk in chunks:
            metrics = self._live[chunk.request].group.metrics
            if chunk.first and metrics.first_scheduled_time is None:
                metrics.first_scheduled_time = now
                if self.on_begin:
                    self.on_begin(chunk.request.request_id)

    def _collect(self, dispatched: _Dispatched) -> list[RequestOutput]:
        step = dispatched.step
        chunks, decode = (step.chunks, step.decode) if isinstance(step, Prefill) else ([], step)
        start = time.perf_counter()
        result = self.runner.collect(dispatched.result, int(dispatched.batch.arrays.needs))
        waited = time.perf_counter()
        self._observe(dispatched)
        if chunks and result.prompt_logprobs:
            self._take_prompt_logprobs(chunks, result.prompt_logprobs)
        deltas: dict[_Group, RequestOutput] = {}
        tokens = np.atleast_2d(result.token_ids)  # [steps, rows]
        for row, (chunk, token) in enumerate(zip(chunks, tokens[0, : len(chunks)].tolist(), strict=True)):
            # It may have ended, or been aborted, while this step ran.
            if chunk.request.state is State.FINISHED:
                continue
            if chunk.request.params.pooling and result.hidden:
                self._pool(chunk, row, result.hidden, deltas)
            elif chunk.samples:
                self._take_tokens(chunk.request, [token], row, result.logprobs, deltas)
        if decode:
            first = len(chunks)
            tokens = tokens[: decode.steps, first : first + len(decode.requests)].T.tolist()
            rows = zip(decode.requests, decode.counts.tolist(), tokens, strict=True)
            for row, (request, count, new) in enumerate(rows, first):
                if request.state is not State.FINISHED:
                    self._take_tokens(request, new if count == len(new) else new[:count], row, result.logprobs, deltas)
        self.meter.host_seconds.wait += waited - start
        self.meter.host_seconds.take += time.perf_counter() - waited
        return list(deltas.values())

    def _observe(self, dispatched: _Dispatched) -> None:
        """Note how long the device had the step: since it was dispatched, or since the one before it was done."""
        now = self._clock()
        seconds = now - max(dispatched.at, self._collected_at)
        self._collected_at = now
        self.meter.stepped(dispatched.step, seconds, self.scheduler.saw_step(dispatched.step, now))
        arrays = dispatched.batch.arrays
        if isinstance(arrays, DecodeArrays):
            self._pace.observe_decode(len(arrays.slots), int(arrays.steps), seconds)
        else:
            attended = int(arrays.positions.sum(where=arrays.positions >= 0))
            self._pace.observe_prefill(len(arrays.token_ids), attended, seconds)
        if self.on_step:
            self.on_step(dispatched.batch)

    def _note_first_token(self, request: Request, group: _Group) -> None:
        group.note_first_token(self._clock(), request.num_cached)
        self.meter.began(len(request.prompt_token_ids), request.num_cached)

    def _take_tokens(
        self,
        request: Request,
        new: list[int],
        row: int,
        logprobs: LogprobRows | None,
        deltas: dict[_Group, RequestOutput],
    ) -> None:
        """Append a sequence's new tokens, up to one that ends it."""
        live, output = self._live[request], request.output_token_ids
        if not output:
            self._note_first_token(request, live.group)
        for token in new:
            output.append(token)
            self.meter.generated_tokens += 1
            if request.constraint:
                self._constrain(request, request.constraint, token)
            if live.each_step:
                self._look_at(request, live, token, len(output), row, logprobs)
            elif token in request.stop_token_ids or len(output) >= request.max_tokens:
                for count, earlier in enumerate(output, 1):
                    self._look_at(request, live, earlier, count, row, None)
            if live.added.finish_reason:
                self._finish(request, live, deltas)
                return
        if live.stream:
            self._give_out(live, deltas)

    def _look_at(
        self, request: Request, live: _Live, token: int, count: int, row: int, logprobs: LogprobRows | None
    ) -> None:
        """Add the completion's `count`-th token to what its caller gets next, and why it ends with it, if it does."""
        added, params = live.added, request.params
        added.token_ids.append(token)
        if logprobs is not None and params.logprobs is not None:
            found = self._logprobs(logprobs, row, token, params.logprobs)
            added.logprobs = [*(added.logprobs or []), found]
            added.cumulative_logprob = (added.cumulative_logprob or 0.0) + found[token].logprob
        if token in request.stop_token_ids:
            added.finish_reason = "stop"
            added.stop_reason = token if token in params.stop_token_ids else None
            added.text += live.text.flush() if live.text else ""
            return
        if live.text:
            text, stop = live.text.push(token, may_stop=count > params.min_tokens)
            added.text += text
            if stop is not None:
                added.finish_reason, added.stop_reason = "stop", stop
                return
        if request.constraint and request.constraint.error:
            added.finish_reason, added.stop_reason = "error", request.constraint.error
        elif request.constraint and request.constraint.complete:
            added.finish_reason = "stop"
        elif count >= request.max_tokens:
            added.finish_reason = "length"
        if added.finish_reason:
            added.text += live.text.flush() if live.text else ""

    def _constrain(self, request: Request, constraint: Constraint, token: int) -> None:
        constraint.accept(token)
        if not constraint.binding:
            request.constraint = None
        self.scheduler.saw_token(request)

    def _pool(self, chunk: Chunk, row: int, hidden: HiddenRows, deltas: dict[_Group, RequestOutput]) -> None:
        """Add a chunk to its request's embedding, which is whole with the last one."""
        live = self._live[chunk.request]
        if chunk.request.params.pooling == "last":
            live.pooled = hidden.last[row]
        else:
            before = 0 if chunk.start == 0 or live.pooled is None else live.pooled
            live.pooled = before + hidden.sums[row] / len(chunk.request.prompt_token_ids)
        if chunk.samples and live.pooled is not None:
            self._note_first_token(chunk.request, live.group)
            self._finish(chunk.request, live, deltas).embedding = live.pooled.tolist()

    def _finish(self, request: Request, live: _Live, deltas: dict[_Group, RequestOutput]) -> RequestOutput:
        group = live.group
        self.scheduler.finish(request)
        del self._live[request]
        delta = self._give_out(live, deltas)
        if group.finished:
            del self._groups[group.request_id]
            group.metrics.finished_time = self._clock()
            delta.finished = True
        return delta

    @staticmethod
    def _give_out(live: _Live, deltas: dict[_Group, RequestOutput]) -> RequestOutput:
        """Put what was added into the delta of its request."""
        group = live.group
        delta = deltas.get(group)
        if delta is None:
            delta = RequestOutput(group.request_id, group.prompt, group.prompt_token_ids, [], group.metrics)
            deltas[group] = delta
        if live.added.token_ids:  # an embedding has none
            delta.outputs.append(live.added)
            live.added = CompletionOutput(live.index)
        if live.index == 0 and group.prompt_logprobs:  # whose they are, so that they are whole
            delta.prompt_logprobs, group.prompt_logprobs = group.prompt_logprobs, []
        return delta

    def _text_stream(self, prompt_token_ids: list[int], params: SamplingParams) -> TextStream | None:
        if self._tokens is None or not params.detokenize:
            return None
        return TextStream(
            self._tokens,
            prompt_token_ids,
            stop=params.stop,
            include_stop=params.include_stop_str_in_output,
            skip_special_tokens=params.skip_special_tokens,
        )

    # Log-probabilities

    def _take_prompt_logprobs(self, chunks: list[Chunk], rows: LogprobRows) -> None:
        """Keep the chunks' share of prompt log-probabilities until each request's first token goes out."""
        first = 0
        for chunk in chunks:
            request, wanted = chunk.request, chunk.request.params.prompt_logprobs
            live = self._live.get(request)
            if wanted is not None and live and live.index == 0 and not request.output_token_ids:
                if chunk.start == 0:
                    live.group.prompt_logprobs = [None]  # nothing comes before the first token
                for position in range(chunk.start, min(chunk.start + chunk.count, len(request.prompt_token_ids) - 1)):
                    token = request.prompt_token_ids[position + 1]
                    live.group.prompt_logprobs.append(
                        self._logprobs(rows, first + position - chunk.start, token, wanted)
                    )
            first += chunk.count

    def _logprobs(self, rows: LogprobRows, row: int, token: int, count: int) -> Logprobs:
        """The token's own log-probability and those of the `count` likeliest, by token id."""
        found = {
            int(top): Logprob(float(rows.top_logprobs[row, i]), i + 1, self._token_text(int(top)))
            for i, top in enumerate(rows.top_token_ids[row, :count])
        }
        own = Logprob(float(rows.logprob[row]), int(rows.rank[row]), self._token_text(token))
        return {token: own} | {top: logprob for top, logprob in found.items() if top != token}

    def _token_text(self, token: int) -> str | None:
        return self._tokens.text(token) if self._tokens else None
