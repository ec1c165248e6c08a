"""The engine's numbers as Prometheus' metrics, under vLLM's names where vLLM has them."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from jaxserve.config import ResolvedConfig
from jaxserve.stats import EngineStats, Histogram

LABELS = ("model_name", "engine")
ENGINE = "0"  # vLLM numbers its engines


class _Shown(NamedTuple):
    """One metric: its value at a look at the engine, or its values by a label of its own."""

    kind: type[GaugeMetricFamily] | type[CounterMetricFamily] | type[HistogramMetricFamily]
    name: str
    help: str
    look: Callable[[EngineStats], Any]
    label: str | None = None


_GAUGE, _COUNTER, _HISTOGRAM = GaugeMetricFamily, CounterMetricFamily, HistogramMetricFamily
_SHOWN = (
    _Shown(_GAUGE, "vllm:num_requests_running", "Sequences that run.", lambda s: s.running),
    _Shown(_GAUGE, "vllm:num_requests_waiting", "Sequences that wait for a place.", lambda s: s.waiting),
    _Shown(
        _GAUGE,
        "vllm:kv_cache_usage_perc",
        "Share of the pages that running sequences hold, from 0 to 1.",
        lambda s: _share_held(s),
    ),
    _Shown(_GAUGE, "vllm:gpu_cache_usage_perc", "Former name of vllm:kv_cache_usage_perc.", lambda s: _share_held(s)),
    _Shown(_GAUGE, "jaxserve:pages", "Pages of the KV cache by what is in them.", lambda s: _pages(s), "state"),
    _Shown(
        _COUNTER,
        "vllm:prompt_tokens",
        "Tokens of the prompts of sequences that have got their first token.",
        lambda s: s.total_begun_prompt_tokens,
    ),
    _Shown(
        _COUNTER,
        "vllm:prompt_tokens_by_source",
        "The same by where their keys and values came from.",
        lambda s: _sources(s),
        "source",
    ),
    _Shown(
        _COUNTER,
        "vllm:prompt_tokens_cached",
        "How many of them the prefix cache spared.",
        lambda s: s.total_begun_cached_tokens,
    ),
    _Shown(_COUNTER, "vllm:generation_tokens", "Tokens of completions.", lambda s: s.total_generated_tokens),
    _Shown(
        _COUNTER,
        "vllm:prefix_cache_queries",
        "Tokens that the prefix cache was asked for.",
        lambda s: s.total_prefix_cache_queries,
    ),
    _Shown(_COUNTER, "vllm:prefix_cache_hits", "Tokens that it had.", lambda s: s.total_prefix_cache_hits),
    _Shown(
        _COUNTER,
        "vllm:num_preemptions",
        "Times that a running sequence gave its pages back to be computed again.",
        lambda s: s.total_preemptions,
    ),
    _Shown(
        _COUNTER,
        "jaxserve:computed_prompt_tokens",
        "Tokens that prefill steps computed, those that were computed again after a preemption among them.",
        lambda s: s.total_prompt_tokens,
    ),
    _Shown(
        _COUNTER,
        "jaxserve:compilations",
        "Programs that were compiled since start-up; a step had to wait for each.",
        lambda s: s.total_compilations,
    ),
    _Shown(
        _COUNTER,
        "jaxserve:decode_read_bytes",
        "Bytes of weights (all experts' among them), keys and values that decode steps read; over the seconds of "
        "jaxserve:step_seconds_sum{kind='decode'}, the memory bandwidth that decoding had.",
        lambda s: s.total_decode_bytes,
    ),
    _Shown(
        _COUNTER,
        "jaxserve:host_seconds",
        "Where the time of the engine's thread went; wait is for the device.",
        lambda s: vars(s.total_host_seconds),
        "phase",
    ),
    _Shown(_HISTOGRAM, "vllm:iteration_tokens_total", "Tokens of a step.", lambda s: s.step_tokens),
    _Shown(
        _HISTOGRAM,
        "vllm:inter_token_latency_seconds",
        "Seconds between the tokens that a decode step brought a sequence and those before.",
        lambda s: s.token_seconds,
    ),
    _Shown(
        _HISTOGRAM,
        "vllm:time_per_output_token_seconds",
        "Former name of vllm:inter_token_latency_seconds.",
        lambda s: s.token_seconds,
    ),
    _Shown(
        _HISTOGRAM,
        "jaxserve:step_seconds",
        "Seconds that the device had a step.",
        lambda s: {"prefill": s.prefill_seconds, "decode": s.decode_seconds},
        "kind",
    ),
)


def _share_held(stats: EngineStats) -> float:
    return stats.pages_held / sum(_pages(stats).values())


def _pages(stats: EngineStats) -> dict[str, int]:
    return {"held": stats.pages_held, "cached": stats.pages_cached, "free": stats.pages_free}


def _sources(stats: EngineStats) -> dict[str, int]:
    cached = stats.total_begun_cached_tokens
    return {"local_compute": stats.total_begun_prompt_tokens - cached, "local_cache_hit": cached}


class EngineCollector(Collector):
    """Shows the engine as it was when `stats` were taken; nothing of it before there are any."""

    def __init__(self, model_name: str, config: ResolvedConfig):
        self.stats: EngineStats | None = None
        self._labels = (model_name, ENGINE)
        self._cache_config = {
            "block_size": str(config.page_size),
            "num_gpu_blocks": str(config.num_pages),
            "enable_prefix_caching": str(config.enable_prefix_caching),
            "gpu_memory_utilization": str(config.gpu_memory_utilization),
            "engine": ENGINE,
        }

    def collect(self) -> Iterator[Metric]:
        info = GaugeMetricFamily("vllm:cache_config_info", "The KV cache.", labels=[*self._cache_config])
        info.add_metric([*self._cache_config.values()], 1)
        yield info
        if self.stats is None:
            return
        for shown in _SHOWN:
            found = shown.look(self.stats)
            family: Any = shown.kind(shown.name, shown.help, labels=[*LABELS, *([shown.label] if shown.label else [])])
            for more, value in found.items() if shown.label else ((None, found),):
                labels = [*self._labels, *([more] if shown.label else [])]
                if shown.kind is _HISTOGRAM:
                    family.add_metric(labels, _buckets(value), value.sum)
                else:
                    family.add_metric(labels, value)
            yield family


def _buckets(histogram: Histogram) -> list[tuple[str, float]]:
    """Counts of values up to each bound, as Prometheus has them."""
    total, buckets = 0, []
    for bound, count in zip((*histogram.bounds, float("inf")), histogram.counts, strict=True):
        total += count
        buckets.append((floatToGoString(bound), float(total)))
    return buckets
