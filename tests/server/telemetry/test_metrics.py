"""`/metrics`: what is under which name, that it is true, and that nobody waits for it."""

import asyncio
import time
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from jaxserve import LLM, InputError, SamplingParams
from jaxserve.server.app import build_app
from jaxserve.server.failures import EngineDead, NoPlaceInTime, Overloaded, TookTooLong
from jaxserve.server.keys import ApiKeys
from jaxserve.server.telemetry.metrics import Metrics
from tests.server.cases import MODEL_NAME
from tests.server.core_thread import core_thread, running
from tests.server.fake_engine import FakeEngine

Sample = tuple[str, frozenset[tuple[str, str]]]
BOTH = {"model_name": MODEL_NAME, "engine": "0"}

# As vLLM 0.32 has them: kind, labels, and the buckets of histograms.
LATENCIES = "0.3 0.5 0.8 1 1.5 2 2.5 5 10 15 20 30 40 50 60 120 240 480 960 1920 7680"
BETWEEN_TOKENS = "0.01 0.025 0.05 0.075 0.1 0.15 0.2 0.3 0.4 0.5 0.75 1 2.5 5 7.5 10 20 40 80"
LENGTHS = "1 2 5 10 20 50 100 200 500"  # up to max_model_len, which is 512 here
VLLM: dict[str, tuple[str, str, str]] = {
    "num_requests_running": ("gauge", "", ""),
    "num_requests_waiting": ("gauge", "", ""),
    "kv_cache_usage_perc": ("gauge", "", ""),
    "prefix_cache_queries": ("counter", "", ""),
    "prefix_cache_hits": ("counter", "", ""),
    "num_preemptions": ("counter", "", ""),
    "prompt_tokens": ("counter", "", ""),
    "prompt_tokens_by_source": ("counter", "source", ""),
    "prompt_tokens_cached": ("counter", "", ""),
    "generation_tokens": ("counter", "", ""),
    "request_success": ("counter", "finished_reason", ""),
    "request_prompt_tokens": ("histogram", "", LENGTHS),
    "request_generation_tokens": ("histogram", "", LENGTHS),
    "request_prefill_kv_computed_tokens": ("histogram", "", LENGTHS),
    "iteration_tokens_total": ("histogram", "", "1 8 16 32 64 128 256 512 1024 2048 4096 8192 16384"),
    "request_max_num_generation_tokens": ("histogram", "", LENGTHS),
    "request_params_n": ("histogram", "", "1 2 5 10 20"),
    "request_params_max_tokens": ("histogram", "", LENGTHS),
    "time_to_first_token_seconds": (
        "histogram",
        "",
        "0.001 0.005 0.01 0.02 0.04 0.06 0.08 0.1 0.25 0.5 0.75 1 2.5 5 7.5 10 20 40 80 160 640 2560",
    ),
    "inter_token_latency_seconds": ("histogram", "", BETWEEN_TOKENS),
    "request_time_per_output_token_seconds": ("histogram", "", BETWEEN_TOKENS),
    "e2e_request_latency_seconds": ("histogram", "", LATENCIES),
    "request_queue_time_seconds": ("histogram", "", LATENCIES),
    "request_inference_time_seconds": ("histogram", "", LATENCIES),
    "request_prefill_time_seconds": ("histogram", "", LATENCIES),
    "request_decode_time_seconds": ("histogram", "", LATENCIES),
}


class Scrape:
    """All samples of an answer of `/metrics`, read by Prometheus' own parser."""

    def __init__(self, client: Any, **headers: str):
        response = client.get("/metrics", headers=headers)
        assert response.status_code == 200, response.text
        assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
        self.families = {family.name: family for family in text_string_to_metric_families(response.text)}
        self.samples: dict[Sample, float] = {}
        for family in self.families.values():
            for sample in family.samples:
                key = sample.name, frozenset(sample.labels.items())
                assert key not in self.samples
                self.samples[key] = sample.value

    def __call__(self, name: str, **labels: str) -> float:
        """A sample, of the one model if its name is one of vLLM's."""
        labels |= BOTH if name.startswith("vllm:") else {}
        return self.samples.get((name, frozenset(labels.items())), 0.0)


def test_names_labels_and_buckets_are_those_of_vllm(client: httpx.Client) -> None:
    client.post("/v1/completions", json={"prompt": "Hello", "max_tokens": 2})
    families = Scrape(client).families
    for name, (kind, label, buckets) in VLLM.items():
        family = families[f"vllm:{name}"]
        assert family.type == kind, name
        labels = {*BOTH, *([label] if label else [])}
        assert all(sample.labels.keys() - {"le"} == labels for sample in family.samples), name
        found = [float(s.labels["le"]) for s in family.samples if s.name.endswith("_bucket")]
        assert found == ([*map(float, buckets.split()), float("inf")] if buckets else []), name


def test_what_the_endpoint_picker_of_llm_d_reads_is_there(client: httpx.Client) -> None:
    scrape = Scrape(client)
    (info,) = scrape.families["vllm:cache_config_info"].samples
    assert info.value == 1
    pages = sum(scrape("jaxserve:pages", state=state, **BOTH) for state in ("held", "cached", "free"))
    assert (int(info.labels["block_size"]), int(info.labels["num_gpu_blocks"])) == (16, pages)
    for gauge in ("num_requests_waiting", "num_requests_running", "kv_cache_usage_perc"):
        (sample,) = scrape.families[f"vllm:{gauge}"].samples
        assert sample.value == 0


def test_requests_are_counted_as_their_usage_tells(client: httpx.Client) -> None:
    before = Scrape(client)
    whole = {"prompt": "The old farmer carries", "max_tokens": 9, "ignore_eos": True, "n": 3, "temperature": 1}
    usage = client.post("/v1/completions", json=whole).json()["usage"]
    assert usage["completion_tokens"] == 27
    chat = {"messages": [{"role": "user", "content": "What is 27+45?"}], "temperature": 0, "max_tokens": 300}
    ended = client.post("/v1/chat/completions", json=chat | {"chat_template_kwargs": {"enable_thinking": False}})
    prompt = 3 * usage["prompt_tokens"] + ended.json()["usage"]["prompt_tokens"]
    tokens = 27 + ended.json()["usage"]["completion_tokens"]
    after = Scrape(client)

    def grown(name: str, **labels: str) -> float:
        return after(name, **labels) - before(name, **labels)

    assert grown("vllm:prompt_tokens_total") == prompt
    assert (
        sum(grown("vllm:prompt_tokens_by_source_total", source=f"local_{s}") for s in ("compute", "cache_hit"))
        == prompt
    )
    assert grown("vllm:prompt_tokens_cached_total") == grown(
        "vllm:prompt_tokens_by_source_total", source="local_cache_hit"
    )
    assert grown("vllm:generation_tokens_total") == tokens
    assert grown("vllm:request_success_total", finished_reason="length") == 3
    assert grown("vllm:request_success_total", finished_reason="stop") == 1
    assert grown("vllm:request_success_total", finished_reason="abort") == 0
    for name, count, total in (
        ("request_prompt_tokens", 4, prompt),
        ("request_generation_tokens", 4, tokens),
        ("request_params_n", 2, 4),
        ("request_params_max_tokens", 4, 3 * 9 + 300),
        ("request_max_num_generation_tokens", 2, 9 + tokens - 27),
    ):
        assert (grown(f"vllm:{name}_count"), grown(f"vllm:{name}_sum")) == (count, total), name
    assert grown("vllm:time_to_first_token_seconds_count") == 2
    for name in ("e2e_request_latency", "request_queue_time", "request_prefill_time", "request_decode_time"):
        assert grown(f"vllm:{name}_seconds_count") == 4
        assert grown(f"vllm:{name}_seconds_sum") > 0
    steps = [grown("jaxserve:step_seconds_count", kind=kind, **BOTH) for kind in ("prefill", "decode")]
    assert grown("vllm:iteration_tokens_total_count") == sum(steps)
    assert min(steps) >= 2
    waits = [grown(f"vllm:{name}_count") for name in ("inter_token_latency_seconds", "time_per_output_token_seconds")]
    assert 0 < waits[0] == waits[1] <= tokens - 4
    assert grown("jaxserve:decode_read_bytes_total", **BOTH) > 0
    assert grown("jaxserve:host_seconds_total", phase="take", **BOTH) > 0
    assert grown("jaxserve:compilations_total", **BOTH) == 0
    for route in ("/v1/completions", "/v1/chat/completions"):
        assert grown("jaxserve:http_requests_total", route=route, method="POST", status="200") == 1


def test_the_times_of_a_request_add_up(client: httpx.Client) -> None:
    before, start = Scrape(client), time.perf_counter()
    asked = {"prompt": "Hello", "max_tokens": 200, "ignore_eos": True, "stream": True}
    assert client.post("/v1/completions", json=asked).status_code == 200
    seconds, after = time.perf_counter() - start, Scrape(client)

    def grown(name: str) -> float:
        return after(f"vllm:{name}_seconds_sum") - before(f"vllm:{name}_seconds_sum")

    whole, first, inference = (
        grown("e2e_request_latency"),
        grown("time_to_first_token"),
        grown("request_inference_time"),
    )
    assert 0 < first < whole < seconds
    assert grown("request_prefill_time") + grown("request_decode_time") == pytest.approx(inference)
    assert grown("request_queue_time") + inference < whole
    assert grown("request_time_per_output_token") == pytest.approx(grown("request_decode_time") / 199)
    assert grown("inter_token_latency") == pytest.approx(grown("request_decode_time"), rel=0.05)


def test_a_client_that_leaves_is_counted_as_aborted_and_has_no_latency(
    llm: LLM, client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = llm.engine.step
    monkeypatch.setattr(llm.engine, "step", lambda: time.sleep(0.05) or step())  # so that it is still there when seen
    before = Scrape(client)
    asked = {"prompt": "Hello", "max_tokens": 500, "ignore_eos": True, "stream": True, "n": 2}
    with client.stream("POST", "/v1/completions", json=asked) as response:
        lines = response.iter_lines()  # while it is referred to, the connection stays open
        next(lines)
        assert Scrape(client)("vllm:num_requests_running") == 2
        assert Scrape(client)("vllm:kv_cache_usage_perc") > 0
    deadline = time.monotonic() + 20
    while Scrape(client)("vllm:num_requests_running"):
        assert time.monotonic() < deadline
    after = Scrape(client)
    aborted = [scrape("vllm:request_success_total", finished_reason="abort") for scrape in (before, after)]
    assert aborted[1] - aborted[0] == 2
    for name, grown in (("time_to_first_token_seconds", 1), ("e2e_request_latency_seconds", 0)):
        assert after(f"vllm:{name}_count") - before(f"vllm:{name}_count") == grown


def test_embeddings_are_requests_that_end(client: httpx.Client) -> None:
    before = Scrape(client)
    assert client.post("/v1/embeddings", json={"input": ["Hello", "The old farmer"]}).status_code == 200
    after = Scrape(client)
    for name, grown in (("request_success_total", 2), ("request_prompt_tokens_count", 2)):
        labels = {"finished_reason": "stop"} if name == "request_success_total" else {}
        assert after(f"vllm:{name}", **labels) - before(f"vllm:{name}", **labels) == grown


def test_routes_and_methods_that_clients_make_up_do_not_fill_the_memory() -> None:
    with core_thread(FakeEngine()) as core, TestClient(build_app(core.client, MODEL_NAME)) as client:
        for number in range(50):
            client.get(f"/made-up-{number}")
            client.request(f"BREW{number}", "/v1/models")
            client.get(f"/v1/responses/{number}")
            client.get(f"/static/{number}")
        scrape = Scrape(client)
    found = {
        tuple(s.labels[n] for n in ("route", "method", "status")): s.value
        for s in scrape.families["jaxserve:http_requests"].samples
        if s.name.endswith("_total")
    }
    assert found == {
        ("other", "GET", "404"): 50,
        ("/v1/models", "other", "405"): 50,
        ("/v1/responses/{response_id}", "GET", "404"): 50,
        ("/static", "GET", "404"): 50,
    }


@pytest.mark.anyio
async def test_what_is_not_served_is_counted_by_the_setting_that_forbade_it() -> None:
    fake = FakeEngine()
    fake.may_step.clear()
    settings = {"max_queued_requests": 2, "max_queued_tokens": 3, "queue_timeout": 0.4, "request_timeout": 0.8}
    async with running(fake, **settings) as engine:
        metrics = Metrics(engine.ready, MODEL_NAME)
        engine.observers.append(metrics)

        async def ask(name: str, *, tokens: int = 1, n: int = 1) -> None:
            async for _ in engine.generate({name: {"prompt_token_ids": [1] * tokens}}, SamplingParams(n=n)):
                pass

        waiting = [asyncio.create_task(ask(name, n=2)) for name in "ab"]
        await asyncio.sleep(0.05)
        with pytest.raises(Overloaded):
            await ask("c", tokens=2)
        waiting.append(asyncio.create_task(ask("d", n=2)))
        await asyncio.sleep(0.05)
        with pytest.raises(Overloaded):
            await ask("e")
        with pytest.raises(InputError):  # which is not the load's fault
            await ask("f", n=3)
        assert {type(error) for error in await asyncio.gather(*waiting, return_exceptions=True)} == {NoPlaceInTime}
        fake.may_step.set()
        fake.seconds_per_step = 0.1
        with pytest.raises(TookTooLong):
            async for _ in engine.generate({"k": "x"}, SamplingParams(max_tokens=90)):
                pass
        engine.close()
        with pytest.raises(EngineDead):
            await ask("l")
        families = {family.name: family for family in metrics.registry.collect()}

    def values(name: str, label: str) -> dict[str, float]:
        return {s.labels[label]: s.value for s in families[name].samples if s.name.endswith("_total") and s.value}

    assert values("jaxserve:requests_refused", "reason") == {
        "max_queued_requests": 1,
        "max_queued_tokens": 1,
        "queue_timeout": 3,
        "request_timeout": 1,
        "engine_failed": 1,
    }
    assert values("vllm:request_success", "finished_reason") == {"abort": 7}


def test_keys_guard_metrics_as_they_guard_all_else() -> None:
    keys = ApiKeys({"ann": "secret"})
    with core_thread(FakeEngine()) as core, TestClient(build_app(core.client, MODEL_NAME, keys=keys)) as client:
        assert client.get("/metrics").status_code == 401
        headers = {"Authorization": "Bearer secret"}
        scrape = Scrape(client, **headers)
        assert scrape("jaxserve:http_requests_total", route="other", method="GET", status="401") == 1


@pytest.mark.anyio
async def test_a_step_that_hangs_holds_no_scrape_up_and_shows() -> None:
    fake = FakeEngine()
    with core_thread(fake) as core:
        transport = httpx.ASGITransport(build_app(core.client, MODEL_NAME))
        async with core.client, httpx.AsyncClient(transport=transport, base_url="http://server") as client:

            async def scrape() -> Scrape:
                response = await client.get("/metrics")
                return Scrape(type("", (), {"get": lambda *_, **__: response}))

            assert (await scrape())("jaxserve:engine_stats_age_seconds") < 0.5
            fake.may_step.clear()
            asked = asyncio.create_task(client.post("/v1/completions", json={"prompt": "x", "max_tokens": 2}))
            while not fake.running:
                await asyncio.sleep(0.01)
            start = time.perf_counter()
            found = await scrape()
            assert time.perf_counter() - start < 5
            assert found("jaxserve:engine_stats_age_seconds") > 0.9
            assert found("vllm:num_requests_running") == 0  # as it was
            fake.may_step.set()
            assert (await asked).status_code == 200
            assert (await scrape())("jaxserve:engine_stats_age_seconds") < 0.5


@pytest.mark.anyio
async def test_others_have_their_turn_while_the_text_is_made() -> None:
    async with running(FakeEngine()) as engine:
        metrics = Metrics(engine.ready, MODEL_NAME)
        metrics.engine_is(await engine.stats())
        turns = 0

        async def other() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        task = asyncio.create_task(other())
        await asyncio.sleep(0)
        before = turns
        text = await metrics.text()
        task.cancel()
    assert turns - before >= text.count(b"# TYPE ") > 40
