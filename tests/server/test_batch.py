"""A file of requests through the application, in this process."""

import asyncio
import json
from typing import Any

import pytest

from jaxserve.server import batch
from jaxserve.server.app import build_app
from jaxserve.server.batch import run_batch
from tests.server.cases import CONVERSATION, MODEL_NAME
from tests.server.core_thread import core_thread
from tests.server.fake_engine import FakeEngine

COMPLETE = {"prompt": "x", "max_tokens": 3}


def line(custom_id: str, url: str = "/v1/completions", body: Any = COMPLETE, **fields: Any) -> str:
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": body} | fields)


def results(lines: list[str], fake: FakeEngine | None = None) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    with core_thread(fake or FakeEngine()) as core:
        app = build_app(core.client, MODEL_NAME)
        asyncio.run(run_batch(app, lines, lambda result: found.append(json.loads(result.to_json()))))
    return found


def test_each_line_has_the_servers_answer_in_openais_format() -> None:
    one, two = results([line("a"), line("b", "/v1/chat/completions", {"messages": CONVERSATION, "max_tokens": 2})])
    assert one.keys() == {"id", "custom_id", "response", "error"}
    assert one["response"].keys() == {"status_code", "request_id", "body"}
    assert [(found["custom_id"], found["response"]["status_code"], found["error"]) for found in (one, two)] == [
        ("a", 200, None),
        ("b", 200, None),
    ]
    assert one["response"]["body"]["choices"][0]["text"] == " 0 1 2"
    assert two["response"]["body"]["choices"][0]["message"]["content"] == " 0 1"
    assert len({one["id"], two["id"], one["response"]["request_id"], two["response"]["request_id"]}) == 4


def test_any_endpoint_that_is_posted_to_will_do() -> None:
    (found,) = results([line("a", "/tokenize", {"prompt": "Hello"})])
    assert found["response"]["body"]["tokens"] == [1]


@pytest.mark.parametrize(
    ("fields", "status", "told"),
    [
        ({"body": {"prompt": "x", "temperature": 101}}, 400, "temperature is 101"),
        ({"body": {"prompt": "bad"}}, 400, "the prompt is bad"),
        ({"body": {"prompt": "x", "model": "gpt-4"}}, 404, "there is no model 'gpt-4'"),
        ({"url": "/v1/images"}, 404, "there is no /v1/images"),
        ({"url": "/health"}, 405, "POST does not go with /health"),
    ],
)
def test_what_the_server_refuses_is_in_its_line(fields: dict[str, Any], status: int, told: str) -> None:
    found = results([line("before"), line("it", **fields), line("after")])
    assert [result["response"]["status_code"] for result in found] == [200, status, 200]
    assert told in found[1]["response"]["body"]["error"]["message"]


@pytest.mark.parametrize(
    ("text", "custom_id", "told"),
    [
        ("{", None, "not JSON"),
        ("[1]", None, "give an object"),
        ('{"custom_id": 5}', None, "custom_id is 5"),
        (json.dumps({"custom_id": "it"}), "it", "method is missing"),
        (line("it", method="GET"), "it", "method is 'GET'"),
        (line("it", "http://elsewhere/v1/completions"), "it", "give a path"),
        (line("it", "v1/completions"), "it", "give a path"),
        (line("it", body=[1]), "it", "body"),
        (line("it", body=COMPLETE | {"stream": True}), "it", "stream=true"),
        (line("it", extra=1), "it", "there is no field 'extra'"),
        (line("first"), "first", "on a line before"),
    ],
)
def test_a_line_that_is_no_request_says_why(text: str, custom_id: str | None, told: str) -> None:
    found = results([line("first"), text, line("last")])
    assert [result["custom_id"] for result in found] == ["first", custom_id, "last"]
    assert [result["error"] is None for result in found] == [True, False, True]
    assert found[1]["response"] is None
    assert found[1]["error"]["code"] == "invalid_line"
    assert told in found[1]["error"]["message"]


def test_all_run_at_the_same_time_and_results_keep_the_lines_order() -> None:
    fake = FakeEngine()
    seen: list[int] = []
    step = fake.step

    def count() -> list:
        seen.append(len(fake.running))
        return step()

    fake.step = count  # type: ignore[method-assign]
    lines = [line(str(number), body=COMPLETE | {"max_tokens": 40 - number}) for number in range(20)]
    assert [result["custom_id"] for result in results(lines, fake)] == [str(number) for number in range(20)]
    assert max(seen) > 10


def test_no_more_than_so_many_are_on_their_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "MAX_AT_ONCE", 3)
    fake = FakeEngine()
    fake.seconds_per_step = 0.005
    most = 0
    add = fake.add

    def count(*arguments: Any, **keywords: Any) -> None:
        nonlocal most
        add(*arguments, **keywords)
        most = max(most, len(fake.running))

    fake.add = count  # type: ignore[method-assign]
    assert len(results([line(str(n), body=COMPLETE | {"max_tokens": 20}) for n in range(9)], fake)) == 9
    assert most == 3


def test_when_the_engine_dies_every_line_says_so() -> None:
    fake = FakeEngine()
    fake.error, fake.steps_before_error = RuntimeError("the device is lost"), 2
    found = results([line(str(number), body=COMPLETE | {"max_tokens": 9}) for number in range(5)], fake)
    assert [result["response"]["status_code"] for result in found] == [500] * 5
