"""Requests in, tokens out: the loop that ties scheduler, runner and text together."""

import dataclasses
import itertools
import random
import time
from collections.abc import Callable

from jaxserve.config import EngineConfig
from jaxserve.engine.batch_builder import StepBatchBuilder
from jaxserve.engine.detokenizer import TextStream
from jaxserve.engine.input_processor import InputProcessor, Prompt
from jaxserve.engine.page_pool import PagePool
from jaxserve.engine.request import Request, State
from jaxserve.engine.scheduler import Chunk, Decode, Prefill, Scheduler
from jaxserve.engine.startup import Loaded, OnProgress, load
from jaxserve.errors import InputError
from jaxserve.outputs import CompletionOutput, Logprob, Logprobs, RequestMetrics, RequestOutput
from jaxserve.runner.step_batch import LogprobRows, StepBatch, StepResult
from jaxserve.sampling_params import SamplingParams


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


@dataclasses.dataclass(eq=False)
class _Live:
    """What the engine keeps beside a sequence that has not ended."""

    group: _Group
    index: int
    text: TextStream | None


@dataclasses.dataclass
class _Dispatched:
    """A step that the device works on."""

    step: Prefill | Decode
    batch: StepBatch
    result: StepResult


class Engine:
    """Serves requests on one model. Not thread-safe: one thread adds, steps and aborts.

    `step` dispatches a step before it reads the tokens of the one before, so that the host's work costs the device no
    time. A sequence that turns out to have ended has one surplus token under way, which is dropped.
    """

    def __init__(self, config: EngineConfig, on_progress: OnProgress = lambda stage, done, total: None):
        loaded: Loaded = load(config, on_progress)
        self.config, self.model_config = loaded.config, loaded.model_config
        self.tokenizer, self.sampling_defaults = loaded.tokenizer, loaded.sampling_defaults
        self.startup_seconds, self.attention = loaded.seconds, loaded.attention
        self.inputs = InputProcessor(
            loaded.tokenizer,
            vocab_size=loaded.model_config.vocab_size,
            max_model_len=loaded.config.max_model_len,
            max_logprobs=min(loaded.config.max_logprobs, loaded.model_config.vocab_size),
            eos_token_ids=loaded.eos_token_ids,
        )
        self.runner = loaded.runner
        self.pool = PagePool(loaded.config.num_pages)
        self.scheduler = Scheduler(
            self.pool,
            max_num_seqs=loaded.config.max_num_seqs,
            max_num_batched_tokens=loaded.config.max_num_batched_tokens,
            max_prefill_seqs=loaded.buckets.max_prefill_rows,
            page_size=loaded.config.page_size,
        )
        self.builder = StepBatchBuilder(
            loaded.buckets, vocab_size=loaded.model_config.vocab_size, page_size=loaded.config.page_size
        )
        self._live: dict[Request, _Live] = {}
        self._groups: dict[str, _Group] = {}
        self._dispatched: _Dispatched | None = None
        self.on_step: Callable[[StepBatch], None] | None = None  # told of each step once its tokens are on the host
        self._arrivals = itertools.count()
        self._seeds = random.Random(loaded.config.seed)

    # Requests

    def add(self, prompt: Prompt, params: SamplingParams, *, request_id: str, priority: int = 0) -> None:
        """Queue a request; `InputError` if it cannot be served, and then nothing has changed."""
        if request_id in self._groups:
            raise InputError(f"there is a running request with the id {request_id!r}; give another")
        checked = self.inputs.check(prompt, params)
        seed = params.seed if params.seed is not None else self._seeds.getrandbits(63)
        group = _Group(request_id, checked.prompt, checked.prompt_token_ids, RequestMetrics(time.perf_counter()))
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
            )
            group.requests.append(request)
            self._live[request] = _Live(group, index, self._text_stream(checked.prompt_token_ids, params))
            self.scheduler.add(request)
        self._groups[request_id] = group

    def abort(self, request_id: str) -> None:
        """End a request now; its pages are free at once. No effect on one that has ended."""
        group = self._groups.pop(request_id, None)
        for request in group.requests if group else ():
            self._live.pop(request, None)
            self.scheduler.finish(request)

    @property
    def has_unfinished(self) -> bool:
        return bool(self._groups)

    # Steps

    def step(self) -> list[RequestOutput]:
        """Dispatch the next step and return what the one before it added, a delta for each request that grew."""
        step = self.scheduler.schedule()
        before, self._dispatched = self._dispatched, self._dispatch(step) if step else None
        return self._collect(before) if before else []

    def close(self) -> None:
        """Drop all requests and free the device's memory."""
        for request_id in list(self._groups):
            self.abort(request_id)
        self._dispatched = None
        self.runner.close()

    def _dispatch(self, step: Prefill | Decode) -> _Dispatched:
        batch = self.builder.build(step)
        return _Dispatched(step, batch, self.runner.dispatch(batch))

    def _collect(self, dispatched: _Dispatched) -> list[RequestOutput]:
        step = dispatched.step
        requests = [chunk.request for chunk in step.chunks] if isinstance(step, Prefill) else step.requests
        result = self.runner.collect(
            dispatched.result,
            logprobs=any(request.params.logprobs is not None for request in requests),
            prompt_logprobs=any(request.params.prompt_logprobs is not None for request in requests),
        )
        if self.on_step:
            self.on_step(dispatched.batch)
        if isinstance(step, Prefill) and result.prompt_logprobs:
            self._take_prompt_logprobs(step.chunks, result.prompt_logprobs)
        deltas: dict[_Group, RequestOutput] = {}
        for row, request in enumerate(requests):
            if isinstance(step, Prefill) and not step.chunks[row].samples:
                continue
            request.in_flight -= 1
            if request.state is not State.FINISHED:  # it may have ended, or been aborted, while this step ran
                self._take_token(request, row, int(result.token_ids[row]), result.logprobs, deltas)
        return list(deltas.values())

    def _take_token(
        self, request: Request, row: int, token: int, logprobs: LogprobRows | None, deltas: dict[_Group, RequestOutput]
    ) -> None:
        live, params = self._live[request], request.params
        group = live.group
        request.output_token_ids.append(token)
        added = CompletionOutput(live.index, token_ids=[token])
        if params.logprobs is not None and logprobs is not None:
            added.logprobs = [self._logprobs(logprobs, row, token, params.logprobs)]
            added.cumulative_logprob = added.logprobs[0][token].logprob
        self._extend_text(request, live, token, added)
        group.metrics.first_token_time = group.metrics.first_token_time or time.perf_counter()
        delta = deltas.setdefault(
            group, RequestOutput(group.request_id, group.prompt, group.prompt_token_ids, [], group.metrics)
        )
        delta.outputs.append(added)
        if live.index == 0:  # whose they are, so that they are whole
            delta.prompt_logprobs, group.prompt_logprobs = group.prompt_logprobs or None, []
        if added.finish_reason:
            self.scheduler.finish(request)
            del self._live[request]
            if group.finished:
                del self._groups[group.request_id]
                group.metrics.finished_time = time.perf_counter()
                delta.finished = True

    def _extend_text(self, request: Request, live: _Live, token: int, added: CompletionOutput) -> None:
        """Put the token's text into `added`, and why the completion ends with it, if it does."""
        count = len(request.output_token_ids)
        if token in request.stop_token_ids:
            added.finish_reason = "stop"
            added.stop_reason = token if token in request.params.stop_token_ids else None
            added.text = live.text.flush() if live.text else ""
            return
        if live.text:
            added.text, stop = live.text.push(token, may_stop=count > request.params.min_tokens)
            if stop is not None:
                added.finish_reason, added.stop_reason = "stop", stop
                return
        if count >= request.max_tokens:
            added.finish_reason = "length"
            added.text += live.text.flush() if live.text else ""

    def _text_stream(self, prompt_token_ids: list[int], params: SamplingParams) -> TextStream | None:
        if self.tokenizer is None or not params.detokenize:
            return None
        return TextStream(
            self.tokenizer.backend_tokenizer,
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
        return self.tokenizer.decode([token]) if self.tokenizer else None
