"""Client and loop over a socket, with an engine that has no model."""

import asyncio
import contextlib
import copy
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from jaxserve import InputError, RequestOutput, SamplingParams
from jaxserve.outputs import add_delta
from jaxserve.server.core import client
from jaxserve.server.core.channel import Channel
from jaxserve.server.core.client import EngineClient
from jaxserve.server.core.messages import Stepped
from jaxserve.server.failures import EngineDead
from tests.server.core_thread import core_thread, running
from tests.server.fake_engine import FakeEngine

pytestmark = pytest.mark.anyio

FIVE = SamplingParams(max_tokens=5)
ENDLESS = SamplingParams(max_tokens=None)


async def collected(deltas: AsyncIterator[RequestOutput]) -> dict[str, RequestOutput]:
    outputs: dict[str, RequestOutput] = {}
    async for delta in deltas:
        add_delta(outputs, delta)
    return outputs


async def until(condition: object) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


async def test_several_prompts_of_several_callers_each_get_their_own_tokens() -> None:
    async with running(FakeEngine()) as engine:
        first, second = await asyncio.gather(
            collected(engine.generate({"a": "x", "b": "y"}, FIVE)),
            collected(engine.generate({"c": "z"}, SamplingParams(max_tokens=2))),
        )
    assert {name: output.outputs[0].token_ids for name, output in first.items()} == {"a": [*range(5)], "b": [*range(5)]}
    assert second["c"].outputs[0].text == " 0 1"
    assert second["c"].outputs[0].finish_reason == "length"


async def test_a_slow_reader_gets_all_tokens_in_fewer_deltas() -> None:
    fake = FakeEngine()
    fake.seconds_per_step = 0.05
    async with running(fake) as engine:
        deltas = engine.generate({"a": "x"}, FIVE)
        first = await anext(deltas)
        await until(lambda: not fake.running)
        await asyncio.sleep(0.05)  # the last token is on its way
        rest = await anext(deltas, None)
        assert await anext(deltas, None) is None
    if rest:  # else the first had all of it
        first.extend(rest)
    assert first.outputs[0].token_ids == [0, 1, 2, 3, 4]
    assert first.finished


async def test_priority_and_settings_reach_the_engine() -> None:
    fake = FakeEngine()
    async with running(fake) as engine:
        await collected(engine.generate({"a": "x"}, FIVE, priority=3))
    assert fake.added == [("a", FIVE, 3)]


async def test_closing_the_iterator_aborts_before_the_next_step() -> None:
    fake = FakeEngine()
    async with running(fake) as engine:
        deltas = engine.generate({"a": "x"}, ENDLESS)
        await anext(deltas)
        await deltas.aclose()
        steps = fake.steps
        await until(lambda: not fake.running)
        assert fake.aborted == ["a"]
        assert fake.steps <= steps + 2  # the one that ran, and one that may have begun before the abort came


async def test_cancelling_the_task_that_waits_aborts() -> None:
    fake = FakeEngine()
    fake.may_step.clear()
    async with running(fake) as engine:
        waiting = asyncio.create_task(collected(engine.generate({"a": "x"}, ENDLESS)))
        await until(lambda: fake.running)
        waiting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await waiting
        fake.may_step.set()
        await until(lambda: not fake.running)
        assert fake.aborted == ["a"]


async def test_a_finished_request_is_not_aborted() -> None:
    fake = FakeEngine()
    async with running(fake) as engine:
        await collected(engine.generate({"a": "x"}, FIVE))
    assert fake.aborted == []


async def test_of_several_prompts_none_runs_if_one_cannot_be_served() -> None:
    fake = FakeEngine()
    fake.may_step.clear()
    async with running(fake) as engine:
        neighbour = asyncio.create_task(collected(engine.generate({"n": "x"}, FIVE)))
        await until(lambda: fake.running)
        refused = asyncio.create_task(collected(engine.generate({"a": "x", "b": "bad", "c": "x"}, FIVE)))
        await asyncio.sleep(0.05)
        fake.may_step.set()
        with pytest.raises(InputError, match="the prompt is bad") as raised:
            await refused
        assert raised.value.field == "prompt"
        assert raised.value.told({"the prompt": "input"}) == "input is bad; give a good one"
        assert (await neighbour)["n"].outputs[0].token_ids == [0, 1, 2, 3, 4]
    assert fake.stepped == {"n"}
    assert not fake.running


async def test_a_running_id_is_refused_and_its_request_goes_on() -> None:
    fake = FakeEngine()
    fake.may_step.clear()
    async with running(fake) as engine:
        first = asyncio.create_task(collected(engine.generate({"a": "x"}, FIVE)))
        await until(lambda: fake.running)
        with pytest.raises(InputError, match="a is of a running request"):
            await collected(engine.generate({"a": "y"}, FIVE))
        fake.may_step.set()
        assert (await first)["a"].outputs[0].token_ids == [0, 1, 2, 3, 4]


async def test_an_engine_that_fails_fails_all_requests() -> None:
    fake = FakeEngine()
    fake.may_step.clear()
    with core_thread(fake) as core:
        async with core.client as engine:
            waiting = [asyncio.create_task(collected(engine.generate({name: "x"}, ENDLESS))) for name in "abc"]
            await until(lambda: fake.running)
            fake.error = RuntimeError("the device is lost")
            fake.may_step.set()
            for task in waiting:
                with pytest.raises(EngineDead, match="stopped after an error"):
                    await task
            with pytest.raises(EngineDead, match="stopped after an error"):
                await collected(engine.generate({"d": "x"}, FIVE))
            assert engine.has_failed
    assert core.error is fake.error


async def test_tokens_that_came_before_the_failure_are_not_lost() -> None:
    fake = FakeEngine()
    fake.error, fake.steps_before_error, fake.seconds_per_step = RuntimeError("the device is lost"), 3, 0.05
    tokens: list[int] = []

    async def read_late(engine: EngineClient) -> None:
        async for delta in engine.generate({"a": "x"}, ENDLESS):
            tokens.extend(delta.outputs[0].token_ids)
            await until(lambda: engine.has_failed)

    async with running(fake) as engine:
        with pytest.raises(EngineDead):
            await read_late(engine)
    assert tokens == [0, 1, 2]


async def test_closing_ends_what_runs_and_leaves_the_engine_empty() -> None:
    fake = FakeEngine()
    async with running(fake) as engine:
        deltas = engine.generate({"a": "x"}, ENDLESS)
        await anext(deltas)
    with pytest.raises(EngineDead, match="shutting down"):
        await collected(deltas)
    assert not fake.running
    with pytest.raises(EngineDead, match="shutting down"):
        await collected(engine.generate({"b": "x"}, FIVE))


async def test_it_serves_only_while_it_runs() -> None:
    with core_thread(FakeEngine()) as core:
        with pytest.raises(EngineDead, match="not been started"):
            await collected(core.client.generate({"a": "x"}, FIVE))
        async with core.client as engine:
            assert (await collected(engine.generate({"a": "x"}, FIVE)))["a"].finished


async def test_a_step_is_one_message_whatever_it_adds(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Any] = []
    send = Channel.send
    monkeypatch.setattr(
        Channel, "send", lambda self, message: (sent.append(copy.deepcopy(message)), send(self, message))
    )
    async with running(FakeEngine()) as engine:
        await collected(engine.generate({str(number): "x" for number in range(100)}, FIVE))
    steps = [message for message in sent if isinstance(message, Stepped)]
    assert [len(message.deltas) for message in steps] == [100] * 5
    assert sorted(steps[0].begun) == sorted(map(str, range(100)))
    assert not any(message.begun for message in steps[1:])


async def test_an_engine_goes_on_while_nobody_reads() -> None:
    """Far more than a socket holds: the core keeps it, and steps."""
    fake = FakeEngine()
    many = {str(number): "x" for number in range(200)}
    async with running(fake) as engine:
        request = asyncio.create_task(collected(engine.generate(many, SamplingParams(max_tokens=200))))
        while len(fake.running) < 200:
            await asyncio.sleep(0)
        deadline = time.monotonic() + 30
        while fake.running:  # holds up the event loop
            assert time.monotonic() < deadline
            time.sleep(0.01)
        outputs = await request
    assert all(output.outputs[0].token_ids == [*range(200)] for output in outputs.values())


async def test_an_idle_engine_and_one_that_steps_are_healthy() -> None:
    fake = FakeEngine()
    async with running(fake) as engine:
        await engine.check_health()
        fake.seconds_per_step = 0.01
        deltas = engine.generate({"a": "x"}, ENDLESS)
        await anext(deltas)
        for _ in range(3):
            await engine.check_health()
        await deltas.aclose()


async def test_an_engine_whose_step_hangs_is_not_healthy_until_it_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_FRESH_SECONDS", 0.0)
    fake = FakeEngine()
    async with running(fake, health_timeout=0.2) as engine:
        await engine.check_health()
        fake.may_step.clear()
        request = asyncio.create_task(collected(engine.generate({"a": "x"}, FIVE)))
        await until(lambda: fake.running)
        with pytest.raises(EngineDead, match=r"no sign of life for 0\.2 seconds"):
            await engine.check_health()
        assert not request.done()
        fake.may_step.set()
        await engine.check_health()
        await request


async def test_whoever_waits_for_a_sign_of_life_hears_of_the_death() -> None:
    fake = FakeEngine()
    fake.may_step.clear()
    with core_thread(fake) as core:
        async with core.client as engine:
            request = asyncio.create_task(collected(engine.generate({"a": "x"}, ENDLESS)))
            await until(lambda: fake.running)
            check = asyncio.create_task(engine.check_health())
            await asyncio.sleep(0.05)
            fake.error = RuntimeError("the device is lost")
            fake.may_step.set()
            for task in (request, check):
                with pytest.raises(EngineDead, match="stopped after an error"):
                    await task
