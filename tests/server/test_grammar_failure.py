"""An answer whose grammar cannot be followed any further fails its request, whole or in a stream."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from jaxserve.outputs import RequestOutput
from jaxserve.server.app import build_app
from tests.server.cases import CONVERSATION, MODEL_NAME, error
from tests.server.conftest import serving
from tests.server.core_thread import core_thread
from tests.server.fake_engine import FakeEngine
from tests.server.processes import wait_until

REASON = "the lexer became too complex"
TOLD = f"the answer cannot go on as it has to ({REASON}); ask for a simpler form"
PATHS: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": ["one", "two"]},
    "/v1/chat/completions": {"messages": CONVERSATION},
    "/v1/responses": {"input": "Hello"},
    "/v1/messages": {"model": MODEL_NAME, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 9},
}


class Failing(FakeEngine):
    """Its third step comes to where a grammar cannot be followed."""

    def step(self) -> list[RequestOutput]:
        deltas = super().step()
        for delta in deltas[:1] if self.steps == 3 else ():
            (output,) = delta.outputs
            output.finish_reason, output.stop_reason, delta.finished = "error", REASON, True
            self.running.pop(delta.request_id, None)
        return deltas


@pytest.fixture
def failing() -> Failing:
    failing = Failing()
    failing.seconds_per_step = 0.1  # so that a stream has begun before
    return failing


@pytest.fixture
def client(failing: Failing) -> Iterator[httpx.Client]:
    with (
        core_thread(failing) as core,
        serving(build_app(core.client, MODEL_NAME)) as address,
        httpx.Client(base_url=address, timeout=30) as client,
    ):
        yield client


@pytest.mark.parametrize("path", PATHS)
def test_a_whole_answer_has_status_500(client: httpx.Client, failing: Failing, path: str) -> None:
    response = client.post(path, json=PATHS[path])
    if path == "/v1/messages":
        assert response.status_code == 500
        assert response.json() == {"type": "error", "error": {"type": "api_error", "message": TOLD}}
    else:
        assert error(response, 500)["message"] == TOLD
    wait_until(lambda: not failing.running)  # what else the request had is ended
    assert client.post("/v1/completions", json={"prompt": "again", "max_tokens": 2}).status_code == 200


@pytest.mark.parametrize("path", PATHS)
def test_a_stream_ends_with_the_error(client: httpx.Client, path: str) -> None:
    response = client.post(path, json=PATHS[path] | {"stream": True})
    assert response.status_code == 200
    blocks = [block for block in response.text.split("\n\n") if block and not block.startswith(":")]
    last = json.loads(blocks[-1].rpartition("data: ")[2])
    match path:
        case "/v1/responses":
            assert (last["type"], last["response"]["status"]) == ("response.failed", "failed")
            assert last["response"]["error"]["message"] == TOLD
        case "/v1/messages":
            assert last == {"type": "error", "error": {"type": "api_error", "message": TOLD}}
        case _:
            assert last["error"] == {"message": TOLD, "type": "server_error", "param": None, "code": None}
    assert "[DONE]" not in response.text
