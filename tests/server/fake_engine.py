"""An engine without a model, whose steps a test controls."""

import dataclasses
import itertools
import threading
import time
import types
from collections.abc import Callable

from jaxserve.chat.events import Content
from jaxserve.chat.parser import AnswerParser
from jaxserve.config import EngineConfig
from jaxserve.engine.input_processor import CheckedInput, Limits, Prompt
from jaxserve.errors import InputError, Name
from jaxserve.outputs import CompletionOutput, RequestMetrics, RequestOutput
from jaxserve.sampling_params import SamplingParams
from jaxserve.stats import EngineStats, Histogram


class PlainText:
    """A model's format in which all text is content."""

    def settings(self, params: SamplingParams, prompt_token_ids: list[int], tools: object) -> SamplingParams:
        return params

    def parser(self, prompt_token_ids: list[int], **_: object) -> AnswerParser:
        return AnswerParser(lambda source: source.until(Content))


class FakeGrammars:
    """Knows none; compiles one when a test lets it. The choice "bad" is refused."""

    def __init__(self) -> None:
        self.may_compile = threading.Event()
        self.may_compile.set()
        self.begun: list[SamplingParams] = []

    def knows(self, params: SamplingParams) -> bool:
        return params.grammar is None

    def compiled(self, params: SamplingParams) -> str | None:
        if params.structured_outputs is None:
            return None
        self.begun.append(params)
        assert self.may_compile.wait(timeout=30)
        if params.structured_outputs.choice == ("bad",):
            raise InputError("the choice is bad; give a good one", field="guided_choice")
        return f"compiled {params.structured_outputs.choice}"


class FakeEngine:
    """The token at place i of any completion is i, its text " i". The prompt "bad" is refused when it is added."""

    def __init__(self, **sampling_defaults: float):
        self.config = EngineConfig(model="fake", max_model_len=100, max_num_seqs=4)
        self.sampling_defaults, self.attention, self.startup_seconds = sampling_defaults, "none", {}
        limits = Limits(vocab_size=1000, max_model_len=100, max_logprobs=20, eos_token_ids=frozenset())
        self.inputs = types.SimpleNamespace(
            check=self._check,
            adapters={},
            render_chat=lambda messages, **_: [1],
            tokenize=lambda text, **_: [666 if text == "bad" else 1],
            chat=PlainText(),
            tokenizer=None,
            limits=limits,
        )
        self.grammars = FakeGrammars()
        self.on_begin: Callable[[str], None] = lambda request_id: None
        self.running: dict[str, tuple[SamplingParams, itertools.count, RequestMetrics]] = {}
        self.added: list[tuple[str, SamplingParams, int]] = []  # id, settings, priority
        self.salts: list[str] = []
        self.asked_adapters: list[str | None] = []
        self.compiled: list[str | None] = []  # grammars
        self.aborted: list[str] = []
        self.may_step = threading.Event()
        self.may_step.set()
        self.steps = 0
        self.seconds_per_step = 0.0
        self.stepped: set[str] = set()  # the requests that a step has worked on
        self.error: BaseException | None = None
        self.steps_before_error = 0

    def _check(self, prompt: Prompt, params: SamplingParams, adapter: str | None) -> CheckedInput:
        text = prompt if isinstance(prompt, str) else None
        token_ids = prompt["prompt_token_ids"] if isinstance(prompt, dict) else self.inputs.tokenize(prompt)
        return CheckedInput(text, token_ids, params.max_tokens or 16, frozenset(), adapter)

    def add(
        self,
        checked: CheckedInput,
        params: SamplingParams,
        *,
        request_id: str,
        priority: int,
        cache_salt: str,
        stream: bool,
        grammar: str | None = None,
    ) -> None:
        if checked.prompt_token_ids == [666]:
            raise InputError(Name("the prompt"), " is bad; give a good one", field="prompt")
        self.running[request_id] = params, itertools.count(), RequestMetrics(time.perf_counter())
        self.added.append((request_id, params, priority))
        self.salts.append(cache_salt)
        self.asked_adapters.append(checked.adapter)
        self.compiled.append(grammar)

    def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)
        self.running.pop(request_id, None)

    def abort_all(self) -> None:
        for request_id in list(self.running):
            self.abort(request_id)

    @property
    def has_unfinished(self) -> bool:
        return bool(self.running)

    def stats(self) -> EngineStats:
        numbers = {
            field.name: Histogram.of((1.0,)) if field.type is Histogram else field.type()
            for field in dataclasses.fields(EngineStats)
        }
        now = {"seconds": time.monotonic(), "running": len(self.running), "total_generated_tokens": self.steps}
        return EngineStats(**numbers | now | {"pages_free": 10})

    def step(self) -> list[RequestOutput]:
        assert self.may_step.wait(timeout=30)
        if self.error and self.steps >= self.steps_before_error:
            raise self.error
        time.sleep(self.seconds_per_step)
        self.steps += 1
        for request_id in self.running.keys() - self.stepped:
            self.running[request_id][2].first_scheduled_time = time.perf_counter()
            self.on_begin(request_id)
        self.stepped |= self.running.keys()
        deltas = []
        for request_id, (params, tokens, metrics) in list(self.running.items()):
            token = next(tokens)
            metrics.first_token_time = metrics.first_token_time or time.perf_counter()
            metrics.finished_time = time.perf_counter()
            finished = token + 1 == params.max_tokens
            output = CompletionOutput(0, f" {token}", [token], finish_reason="length" if finished else None)
            deltas.append(RequestOutput(request_id, None, [1], [output], metrics, finished))
            if finished:
                del self.running[request_id]
        return deltas
