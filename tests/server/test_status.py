"""`/v1/models`, `/health`, and what all paths answer when the engine has died."""

import subprocess
import sys

import httpx
import pytest
from starlette.testclient import TestClient

from jaxserve.config import DEMO_MODEL
from jaxserve.server.app import build_app
from tests.server.cases import MODEL_NAME, error
from tests.server.core_thread import core_thread
from tests.server.fake_engine import FakeEngine


def test_models_lists_the_one_model(client: httpx.Client) -> None:
    listing = client.get("/v1/models").json()
    (card,) = listing.pop("data")
    assert listing == {"object": "list"}
    assert isinstance(card.pop("created"), int)
    expected = {"id": MODEL_NAME, "object": "model", "owned_by": "jaxserve", "root": str(DEMO_MODEL)}
    assert card == expected | {"parent": None, "max_model_len": 512}


def test_a_model_is_found_by_its_name_alone(client: httpx.Client) -> None:
    assert client.get(f"/v1/models/{MODEL_NAME}").json() == client.get("/v1/models").json()["data"][0]
    assert error(client.get("/v1/models/some/other"), 404)["code"] == "model_not_found"


def test_a_models_name_may_have_slashes() -> None:
    with core_thread(FakeEngine()) as core, TestClient(build_app(core.client, "the/model")) as client:
        assert client.get("/v1/models/the/model").json()["id"] == "the/model"
        assert client.get("/v1/models/the%2Fmodel").json()["id"] == "the/model"


def test_health_is_200_while_the_engine_lives(client: httpx.Client) -> None:
    response = client.get("/health")
    assert (response.status_code, response.json()) == (200, {})


@pytest.mark.parametrize("stream", [False, True])
def test_a_dead_engine_fails_every_request_and_the_health_check(stream: bool) -> None:
    fake = FakeEngine()
    fake.error = RuntimeError("the device is lost")
    with core_thread(fake) as core, TestClient(build_app(core.client, MODEL_NAME)) as client:
        assert client.get("/health").status_code == 200
        for _ in range(2):  # the one that it dies of, and one afterwards
            response = client.post("/v1/completions", json={"prompt": "x", "stream": stream})
            assert "stopped after an error" in error(response, 500)["message"]
            assert "stopped after an error" in error(client.get("/health"), 503)["message"]


def test_a_stream_that_the_engine_dies_in_ends_with_the_error() -> None:
    fake = FakeEngine()
    fake.error, fake.steps_before_error = RuntimeError("the device is lost"), 3
    with core_thread(fake) as core, TestClient(build_app(core.client, MODEL_NAME)) as client:
        response = client.post("/v1/completions", json={"prompt": "x", "stream": True})
        *chunks, last = [block for block in response.text.split("\n\n") if block]
        assert response.status_code == 200
        assert all('"finish_reason":null' in chunk for chunk in chunks)
        assert last.startswith('data: {"error":{"message":"the engine has stopped')
        assert "stopped after an error" in error(client.get("/health"), 503)["message"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "x"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "max_tokens": 5}),
    ],
)
def test_priority_and_the_models_recommendations_reach_the_engine(path: str, body: dict) -> None:
    fake = FakeEngine(temperature=0.5, top_p=0.25)
    with core_thread(fake) as core, TestClient(build_app(core.client, MODEL_NAME)) as client:
        assert client.post(path, json=body | {"priority": -3, "top_p": 0.75}).status_code == 200
    ((_, params, priority),) = fake.added
    assert (params.temperature, params.top_p, priority) == (0.5, 0.75, -3)


def test_the_server_comes_without_jax() -> None:
    code = "import sys, jaxserve.server.serve; print({'jax', 'transformers'} & sys.modules.keys())"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "set()\n"
