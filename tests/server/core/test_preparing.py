"""Grammars are compiled beside the loop: steps go on, and what waits for one is a request as any other."""

import asyncio
import contextlib
import time

import pytest

from jaxserve import InputError, SamplingParams
from jaxserve.checkpoint.tokenizer import load_tokenizer
from jaxserve.config import DEMO_MODEL
from jaxserve.engine.grammars import Grammars
from jaxserve.server.failures import NoPlaceInTime, Overloaded
from tests.server.core.test_client import ENDLESS, FIVE, collected, until
from tests.server.core_thread import core_thread, running
from tests.server.fake_engine import FakeEngine

pytestmark = pytest.mark.anyio


def bound(choice: str = "x", *, n: int = 1) -> SamplingParams:
    return SamplingParams(n=n, max_tokens=5, structured_outputs={"choice": [choice]})


def slow(number: int) -> SamplingParams:
    """A grammar of its own, which would take more time or memory than there is for one."""
    return SamplingParams(structured_outputs={"json": {"type": "integer", "multipleOf": 300_007 + number}})


@pytest.fixture
def fake() -> FakeEngine:
    """Which compiles when it is let to."""
    fake = FakeEngine()
    fake.grammars.may_compile.clear()
    return fake


async def test_steps_go_on_while_a_grammar_is_compiled_and_its_request_runs_once_it_is(fake: FakeEngine) -> None:
    async with running(fake) as engine:
        waiting = asyncio.create_task(collected(engine.generate({"a": "x", "b": "x"}, bound())))
        await until(lambda: fake.grammars.begun)
        assert (await collected(engine.generate({"free": "x"}, FIVE)))["free"].finished
        assert [request_id for request_id, *_ in fake.added] == ["free"]
        fake.grammars.may_compile.set()  # nothing else runs: the loop has to be woken
        outputs = await waiting
    assert [outputs[name].outputs[0].token_ids for name in "ab"] == [[*range(5)]] * 2
    assert fake.compiled == [None, "compiled ('x',)", "compiled ('x',)"]


async def test_requests_that_wait_for_grammars_begin_in_their_order(fake: FakeEngine) -> None:
    async with running(fake) as engine:
        waiting = [asyncio.create_task(collected(engine.generate({name: "x"}, bound(name)))) for name in "abc"]
        await until(lambda: engine.unfinished == 3)
        fake.grammars.may_compile.set()
        await asyncio.gather(*waiting)
    assert [request_id for request_id, *_ in fake.added] == ["a", "b", "c"]


async def test_a_grammar_that_is_refused_is_told_with_its_field_and_harms_nobody(fake: FakeEngine) -> None:
    async with running(fake) as engine:
        first = asyncio.create_task(collected(engine.generate({"a": "x"}, bound("a"))))
        refused = asyncio.create_task(collected(engine.generate({"b": "x"}, bound("bad"))))
        last = asyncio.create_task(collected(engine.generate({"c": "x"}, bound("c"))))
        await until(lambda: engine.unfinished == 3)
        fake.grammars.may_compile.set()
        with pytest.raises(InputError, match="the choice is bad") as raised:
            await refused
        assert raised.value.field == "guided_choice"
        assert (await first)["a"].finished
        assert (await last)["c"].finished
        assert engine.unfinished == 0


async def test_a_request_that_is_left_while_its_grammar_is_compiled_never_runs(fake: FakeEngine) -> None:
    async with running(fake) as engine:
        left = [asyncio.create_task(collected(engine.generate({name: "x"}, bound(name)))) for name in "abc"]
        await until(lambda: fake.grammars.begun)
        for task in left:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        await until(lambda: len(fake.aborted) == 3)
        assert engine.unfinished == 0
        fake.grammars.may_compile.set()
        assert (await collected(engine.generate({"d": "x"}, bound("d"))))["d"].finished
    assert [request_id for request_id, *_ in fake.added] == ["d"]
    assert [params.structured_outputs.choice for params in fake.grammars.begun] == [("a",), ("d",)]


async def test_a_request_whose_grammar_takes_too_long_is_given_up_as_one_that_waits(fake: FakeEngine) -> None:
    async with running(fake, queue_timeout=0.2) as engine:
        with pytest.raises(NoPlaceInTime, match=r"waited for 0\.2 seconds"):
            await collected(engine.generate({"a": "x"}, bound()))
        await until(lambda: fake.aborted == ["a"])
        fake.grammars.may_compile.set()
        assert (await collected(engine.generate({"b": "x"}, FIVE)))["b"].finished
    assert [request_id for request_id, *_ in fake.added] == ["b"]


async def test_requests_whose_grammars_are_compiled_count_as_waiting_and_as_unfinished(fake: FakeEngine) -> None:
    async with running(fake, max_queued_requests=2) as engine:  # beside four slots
        waiting = [asyncio.create_task(collected(engine.generate({str(n): "x"}, bound(n=2)))) for n in range(3)]
        await until(lambda: fake.grammars.begun)
        assert (await engine.stats()).waiting == 6
        with pytest.raises(Overloaded, match="2 completions wait and at most 2 may"):
            await collected(engine.generate({"more": "x"}, FIVE))
        engine.stop_taking_requests()
        assert engine.unfinished == 6
        fake.grammars.may_compile.set()
        await asyncio.gather(*waiting)
        assert engine.unfinished == 0
        assert (await engine.stats()).waiting == 0


async def test_the_loop_ends_with_its_server_while_a_grammar_is_compiled(fake: FakeEngine) -> None:
    with core_thread(fake) as core:
        async with core.client as engine:
            waiting = asyncio.create_task(collected(engine.generate({"a": "x"}, bound())))
            await until(lambda: fake.grammars.begun)
        with pytest.raises(Exception, match="shutting down"):
            await waiting
        core.join()
        assert core.error is None
    fake.grammars.may_compile.set()
    assert not fake.added


async def test_the_loop_does_not_spin_when_a_grammar_has_been_compiled(fake: FakeEngine) -> None:
    fake.grammars.may_compile.set()
    async with running(fake) as engine:
        await collected(engine.generate({"a": "x"}, bound()))
        await asyncio.sleep(0.05)
        before = time.process_time()
        await asyncio.sleep(0.3)
        assert time.process_time() - before < 0.15


async def test_a_flood_of_slow_grammars_holds_nobody_up() -> None:
    fake = FakeEngine()
    fake.seconds_per_step = 0.005
    tokenizer = load_tokenizer(DEMO_MODEL)
    fake.grammars = Grammars(tokenizer, vocab_size=1280, eos_token_ids=[tokenizer.eos_token_id])
    fake.grammars.prepare()
    async with running(fake, max_queued_requests=1000) as engine:
        flood = [asyncio.create_task(collected(engine.generate({str(n): "x"}, slow(n)))) for n in range(300)]
        await until(lambda: engine.unfinished == 300)
        tokens: list[int] = []
        async for delta in engine.generate({"free": "x"}, ENDLESS):
            tokens += delta.outputs[0].token_ids
            if flood[0].done():  # after a second of CPU time, in another process
                break
        with pytest.raises(InputError, match="json cannot be followed"):
            await flood[0]
        assert len(tokens) > 20
        # What is known has no others' turns to wait for.
        known = SamplingParams(max_tokens=5, structured_outputs={"json_object": True})
        assert (await collected(engine.generate({"known": "x"}, known)))["known"].finished
        assert not flood[-1].done()
        for task in flood:
            task.cancel()
        await asyncio.gather(*flood, return_exceptions=True)
        assert engine.unfinished == 0
