"""An engine whose device is simulated: what the host costs, and what scheduling does to a trace of requests."""

import dataclasses
import heapq
import time
from collections.abc import Sequence
from typing import Any, cast

from jaxserve.config import ResolvedConfig
from jaxserve.engine.engine import Engine
from jaxserve.engine.startup import Loaded
from jaxserve.models.config import LayerKind, ModelConfig
from jaxserve.runner.buckets import Buckets
from jaxserve.runner.cache_layout import CacheLayout
from jaxserve.runner.runner import Runner
from jaxserve.runner.simulated import CostModel, SimulatedRunner
from jaxserve.sampling_params import SamplingParams

_VOCAB = 32_000


@dataclasses.dataclass(frozen=True)
class Arrival:
    """A request of a trace: when it comes, in seconds, and its tokens."""

    time: float
    prompt_token_ids: list[int]
    max_tokens: int


@dataclasses.dataclass(frozen=True)
class Served:
    """What a request of a trace saw, in seconds: when it was given tokens, and how many had come by then."""

    arrival: Arrival
    times: list[float]
    counts: list[int]

    @property
    def ttft(self) -> float:
        return self.times[0] - self.arrival.time

    @property
    def gaps(self) -> list[float]:
        """Times between two deliveries of tokens."""
        return [after - before for before, after in zip(self.times, self.times[1:], strict=False)]


def simulated_engine(
    cost: CostModel, *, virtual: bool = True, layout: CacheLayout | None = None, **settings: Any
) -> tuple[Engine, SimulatedRunner]:
    """An engine over a simulated device, and that device; with `virtual`, the engine lives on the device's clock.

    `layout` is that of one layer without a window if left out. `settings` are `EngineConfig`'s; `max_num_seqs`,
    `max_num_batched_tokens`, `max_model_len`, `max_decode_steps` and `num_pages` have to be among them.
    """
    config = ResolvedConfig(model="", skip_tokenizer_init=True, **settings)
    buckets = Buckets.of(
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_model_len=config.max_model_len,
        page_size=config.page_size,
    )
    model = ModelConfig(
        architecture="Simulated",
        vocab_size=_VOCAB,
        hidden_size=1,
        intermediate_size=1,
        layer_kinds=(LayerKind(),),
        num_heads=1,
        num_kv_heads=1,
        head_dim=2,
        max_position_embeddings=config.max_model_len,
    )
    runner = SimulatedRunner(cost, max_decode_steps=config.max_decode_steps)
    layout = layout or CacheLayout.of(
        [None],
        page_size=config.page_size,
        max_step_tokens=buckets.prefill[-1].tokens,
        max_model_len=config.max_model_len,
    )
    serves = cast(Runner, runner)
    loaded = Loaded(config, model, None, None, frozenset(), {}, buckets, layout, serves, "simulated", {})
    return Engine(loaded, runner.clock if virtual else time.perf_counter), runner


def serve_trace(engine: Engine, runner: SimulatedRunner, trace: Sequence[Arrival]) -> list[Served]:
    """Let every request of `trace` arrive at its time, and run all of them; in the trace's order."""
    served = [Served(arrival, [], []) for arrival in trace]
    coming = [(arrival.time, index) for index, arrival in enumerate(trace)]
    heapq.heapify(coming)
    while coming or engine.has_unfinished:
        if not engine.has_unfinished:
            runner.wait_until(coming[0][0])
        while coming and coming[0][0] <= runner.clock():
            _, index = heapq.heappop(coming)
            arrival = trace[index]
            params = SamplingParams(temperature=0, max_tokens=arrival.max_tokens, ignore_eos=True)
            checked = engine.inputs.check({"prompt_token_ids": arrival.prompt_token_ids}, params)
            engine.add(checked, params, request_id=str(index))
        for delta in engine.step():
            request = served[int(delta.request_id)]
            request.times.append(runner.clock())
            request.counts.append(len(delta.outputs[0].token_ids))
    return served
