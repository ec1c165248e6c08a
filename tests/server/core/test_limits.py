"""How much the client takes on, and for how long, with an engine that has no model."""

import asyncio
import time

import pytest

from jaxserve import InputError, SamplingParams
from jaxserve.server.failures import NoPlaceInTime, Overloaded, ShuttingDown, TookTooLong
from tests.server.core.test_client import ENDLESS, FIVE, collected, until
from tests.server.core_thread import running
from tests.server.fake_engine import FakeEngine

pytestmark = pytest.mark.anyio


async def test_what_goes_beyond_the_queue_is_refused_and_taken_once_there_is_room() -> None:
    fake = FakeEngine()  # four slots
    fake.may_step.clear()
    async with running(fake, max_queued_requests=2) as engine:
        taken = [asyncio.create_task(collected(engine.generate({str(i): "x"}, FIVE))) for i in range(6)]
        await until(lambda: engine.unfinished == 6)
        with pytest.raises(Overloaded, match="2 completions wait and at most 2 may") as raised:
            await collected(engine.generate({"more": "x"}, FIVE))
        assert (raised.value.status, raised.value.retry_after) == (429, 5)
        with pytest.raises(InputError, match="for 3 completions"):
            await collected(engine.generate({"more": "x"}, SamplingParams(n=3)))
        fake.may_step.set()
        await asyncio.gather(*taken)
        assert engine.unfinished == 0
        assert (await collected(engine.generate({"more": "x"}, FIVE)))["more"].finished


async def test_prompts_beyond_the_tokens_that_may_wait_are_refused() -> None:
    fake = FakeEngine()  # every prompt has one token
    fake.may_step.clear()
    async with running(fake, max_queued_tokens=2) as engine:
        waiting = asyncio.create_task(collected(engine.generate({"a": "x", "b": "x"}, FIVE)))
        await until(lambda: fake.running)
        with pytest.raises(Overloaded, match="2 prompt tokens wait"):
            await collected(engine.generate({"c": "x"}, FIVE))
        fake.may_step.set()
        await waiting
        assert (await collected(engine.generate({"c": "x"}, FIVE)))["c"].finished


async def test_a_request_that_no_place_comes_free_for_is_given_up() -> None:
    fake = FakeEngine()
    fake.may_step.clear()
    async with running(fake, queue_timeout=0.2) as engine:
        with pytest.raises(NoPlaceInTime, match=r"waited for 0\.2 seconds"):
            await collected(engine.generate({"a": "x"}, FIVE))
        fake.may_step.set()
        await until(lambda: fake.aborted == ["a"])
        assert engine.unfinished == 0


async def test_a_request_that_has_begun_may_take_longer_than_the_queue() -> None:
    fake = FakeEngine()
    fake.seconds_per_step = 0.1
    async with running(fake, queue_timeout=0.2) as engine:
        outputs = await collected(engine.generate({"a": "x", "b": "x"}, FIVE))
    assert all(output.finished for output in outputs.values())


async def test_a_request_that_takes_too_long_ends_after_what_came_and_is_aborted() -> None:
    fake = FakeEngine()
    fake.seconds_per_step = 0.02
    async with running(fake, request_timeout=0.3) as engine:
        tokens: list[int] = []
        start = time.perf_counter()

        async def read() -> None:
            async for delta in engine.generate({"a": "x"}, ENDLESS):
                tokens.extend(delta.outputs[0].token_ids)

        with pytest.raises(TookTooLong, match=r"taken 0\.3 seconds"):
            await read()
        assert 0.3 <= time.perf_counter() - start < 5
        assert tokens == [*range(len(tokens))]
        assert tokens
        await until(lambda: fake.aborted == ["a"])


async def test_a_client_that_stops_taking_requests_ends_those_that_it_has() -> None:
    fake = FakeEngine()
    fake.may_step.clear()
    async with running(fake) as engine:
        assert engine.takes_requests
        waiting = asyncio.create_task(collected(engine.generate({"a": "x"}, FIVE)))
        await until(lambda: fake.running)
        engine.stop_taking_requests()
        assert not engine.takes_requests
        with pytest.raises(ShuttingDown, match="shutting down"):
            await collected(engine.generate({"b": "x"}, FIVE))
        assert engine.unfinished == 1
        fake.may_step.set()
        assert (await waiting)["a"].finished
        assert engine.unfinished == 0
