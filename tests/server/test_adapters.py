"""LoRA adapters over HTTP: each is a model of its own name, on every path that has a `model`."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient

from jaxserve import LLM, InputError, RequestOutput
from jaxserve.config import DEMO_MODEL, EngineConfig
from jaxserve.engine.scoring import Score
from jaxserve.server.app import build_app
from jaxserve.server.config import ServerConfig
from jaxserve.server.serve import started_engine
from tests.adapter_files import write_adapter
from tests.server.cases import CONVERSATION, EMBEDDED, MODEL_NAME, SCORED, error
from tests.server.core_thread import CoreThread, core_thread

PROMPT = "What is 27+45?"
GREEDY = {"temperature": 0, "max_tokens": 12}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(tmp_path_factory.mktemp("adapters") / "loud", DEMO_MODEL, lora_alpha=64)


@pytest.fixture(scope="module")
def core(adapter: Path) -> Iterator[CoreThread]:
    sizes = {"max_num_seqs": 4, "max_num_batched_tokens": 128, "max_model_len": 512, "page_size": 16}
    settings = sizes | {"lora_modules": {"loud": adapter}, "max_loras": 2}
    with LLM(progress=False, **settings) as llm, core_thread(llm.engine) as core:
        yield core


@pytest.fixture(scope="module")
def client(core: CoreThread) -> Iterator[TestClient]:
    with TestClient(build_app(core.client, MODEL_NAME)) as client:
        yield client


def test_models_lists_adapters_below_their_model(client: TestClient, adapter: Path) -> None:
    model, loud = client.get("/v1/models").json()["data"]
    assert (model["id"], model["parent"], model["root"]) == (MODEL_NAME, None, str(DEMO_MODEL))
    assert (loud["id"], loud["parent"], loud["root"]) == ("loud", MODEL_NAME, str(adapter))
    assert client.get("/v1/models/loud").json() == loud


def test_every_path_answers_as_the_model_that_it_names(
    client: TestClient, offline: dict[str, RequestOutput], embeddings: dict, scores: list[Score]
) -> None:
    def answers(name: str) -> dict[str, Any]:
        def asked(path: str, **body: Any) -> Any:
            answer = client.post(path, json=body | {"model": name}).json()
            assert answer["model"] == name
            return answer

        chat = asked("/v1/chat/completions", messages=CONVERSATION, temperature=0, max_tokens=20)
        embedded = asked("/v1/embeddings", input=EMBEDDED)["data"]
        scored = asked("/score", text_1=SCORED[0], text_2=SCORED[1])["data"]
        return {
            "completions": asked("/v1/completions", prompt=PROMPT, **GREEDY)["choices"][0]["text"],
            "chat": [chat["choices"][0]["message"].get(part) for part in ("reasoning_content", "content")],
            "messages": asked("/v1/messages", messages=CONVERSATION[1:], **GREEDY)["content"],
            "responses": [
                item | {"id": None}
                for item in asked("/v1/responses", input=PROMPT, temperature=0, max_output_tokens=12)["output"]
            ],
            "embeddings": [entry["embedding"] for entry in embedded],
            "scores": [entry["score"] for entry in scored],
        }

    plain, loud = (answers(name) for name in (MODEL_NAME, "loud"))
    for path, answer in plain.items():
        assert answer != loud[path], path
    message = offline["chat"].outputs[0].message
    assert plain["chat"] == [message.get(part) for part in ("reasoning_content", "content")]
    np.testing.assert_allclose(plain["embeddings"], embeddings["mean"], atol=1e-3)
    np.testing.assert_allclose(plain["scores"], [score.score for score in scores], atol=1e-3)


def test_a_streams_chunks_bear_the_adapters_name(client: TestClient) -> None:
    body = {"messages": [{"role": "user", "content": PROMPT}], "model": "loud", "stream": True} | GREEDY
    with client.stream("POST", "/v1/chat/completions", json=body) as response:
        events = [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: {")]
    assert {json.loads(event)["model"] for event in events} == {"loud"}


def test_an_unknown_name_is_404_and_told_the_known_ones(client: TestClient) -> None:
    told = error(client.post("/v1/completions", json={"prompt": "x", "model": "quiet"}), 404)
    assert told["code"] == "model_not_found"
    assert all(repr(name) in told["message"] for name in (MODEL_NAME, "loud"))


@pytest.mark.parametrize("settings", [{"served_model_name": "loud"}, {}])
def test_an_adapter_that_is_called_as_the_model_is_refused_before_anything_loads(settings: dict[str, str]) -> None:
    name = settings.get("served_model_name", "demo_model")
    config = EngineConfig(lora_modules=(f"{name}=/nowhere",))
    with pytest.raises(InputError, match="the model's own name"), started_engine(config, ServerConfig(**settings)):
        pass


def test_adapters_are_loaded_and_unloaded_while_the_server_runs(
    client: TestClient, adapter: Path, tmp_path: Path
) -> None:
    other = write_adapter(tmp_path / "other", DEMO_MODEL, lora_alpha=64, seed=3)

    def text(name: str) -> str:
        answer = client.post("/v1/completions", json=GREEDY | {"model": name, "prompt": PROMPT})
        return answer.json()["choices"][0]["text"] if answer.status_code == 200 else error(answer, 404)["code"]

    def load(name: str, path: Path) -> Any:
        return client.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": str(path)})

    before = {name: text(name) for name in (MODEL_NAME, "loud")}
    assert text("other") == "model_not_found"
    loaded = load("other", other)
    assert (loaded.status_code, loaded.json()["root"], loaded.json()["parent"]) == (200, str(other), MODEL_NAME)
    assert [card["id"] for card in client.get("/v1/models").json()["data"]] == [MODEL_NAME, "loud", "other"]
    own = text("other")
    assert own not in before.values()
    assert {name: text(name) for name in before} == before

    for name, path, told in (
        ("other", other, "there is an adapter 'other' already; unload it first"),
        ("more", other, "all places for adapters are taken, 2 of them; unload one"),
        ("more", tmp_path / "nowhere", "there is no directory"),
        (MODEL_NAME, other, "is the model's own name"),
    ):
        refused = load(name, path)
        assert told in error(refused, 400)["message"]

    unload = client.post("/v1/unload_lora_adapter", json={"lora_name": "other"})
    assert unload.json() == {"id": "other", "object": "model", "deleted": True}
    assert text("other") == "model_not_found"
    assert client.post("/v1/unload_lora_adapter", json={"lora_name": "other"}).status_code == 404
    assert client.post("/v1/unload_lora_adapter", json={"lora_name": MODEL_NAME}).status_code == 400
    assert load("other", adapter).status_code == 200  # the same name, and none of the pages of the one before
    assert text("other") == before["loud"]
    client.post("/v1/unload_lora_adapter", json={"lora_name": "other"})
