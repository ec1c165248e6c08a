"""`/stats`: the engine's numbers over HTTP."""

import asyncio
import dataclasses

import httpx
import pytest
from starlette.testclient import TestClient

from jaxserve import SamplingParams
from jaxserve.server.app import build_app
from jaxserve.server.failures import EngineDead
from jaxserve.stats import EngineStats
from tests.server.cases import MODEL_NAME, error
from tests.server.core_thread import core_thread, running
from tests.server.fake_engine import FakeEngine


def test_the_numbers_are_the_engines(client: httpx.Client) -> None:
    before = client.get("/stats").json()
    assert before.keys() == {field.name for field in dataclasses.fields(EngineStats)}
    asked = {"prompt": "Hello", "max_tokens": 9, "ignore_eos": True}
    usage = client.post("/v1/completions", json=asked).json()["usage"]
    response = client.get("/stats")
    after = response.json()
    assert after["total_generated_tokens"] - before["total_generated_tokens"] == usage["completion_tokens"]
    assert (after["running"], after["waiting"], after["max_running"]) == (0, 0, 4)
    assert after["seconds"] > before["seconds"]
    assert response.headers["cache-control"] == "no-store"


def test_they_are_told_while_requests_run(client: httpx.Client) -> None:
    asked = {"prompt": "Hello", "n": 4, "max_tokens": 400, "ignore_eos": True, "stream": True}
    with client.stream("POST", "/v1/completions", json=asked) as response:
        lines = response.iter_lines()  # while it is referred to, the connection stays open
        next(lines)
        assert client.get("/stats").json()["running"] == 4


def test_a_dead_engine_has_none() -> None:
    fake = FakeEngine()
    fake.error = RuntimeError("the device is lost")
    with core_thread(fake) as core, TestClient(build_app(core.client, MODEL_NAME)) as client:
        assert client.get("/stats").status_code == 200
        assert client.post("/v1/completions", json={"prompt": "x"}).status_code == 500
        assert "stopped after an error" in error(client.get("/stats"), 500)["message"]


@pytest.mark.anyio
async def test_whoever_asks_while_the_engine_dies_is_told() -> None:
    fake = FakeEngine()
    fake.may_step.clear()
    fake.error = RuntimeError("the device is lost")
    async with running(fake) as engine:
        tokens = engine.generate({"1": "x"}, SamplingParams())
        request = asyncio.ensure_future(anext(tokens))
        while not fake.running:
            await asyncio.sleep(0.001)
        asked = asyncio.ensure_future(engine.stats())  # the engine is within a step
        await asyncio.sleep(0.01)
        fake.may_step.set()
        for waiting in (asked, request):
            with pytest.raises(EngineDead):
                await asyncio.wait_for(waiting, 30)
