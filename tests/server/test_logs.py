"""What the log tells of requests, and what it never does."""

import io
import json
import logging
import sys
from collections.abc import Iterator

import pytest
from starlette.testclient import TestClient

from jaxserve.server import logs
from jaxserve.server.app import build_app
from jaxserve.server.config import ServerConfig
from jaxserve.server.keys import ApiKeys
from tests.server.cases import MODEL_NAME
from tests.server.core_thread import core_thread
from tests.server.fake_engine import FakeEngine

SECRET = "the prompt that nobody else may read"
ASKED = {"prompt": SECRET, "max_tokens": 3}


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    root, ours = logging.getLogger(), logging.getLogger("jaxserve")
    before = root.level, ours.level, root.handlers[:]
    yield
    root.setLevel(before[0])
    ours.setLevel(before[1])
    root.handlers[:] = before[2]


def test_json_lines_tell_of_each_request_by_its_id(capsys: pytest.CaptureFixture) -> None:
    logs.configure("info", "json")
    keys = ApiKeys({"ann": "secret-of-ann"})
    with core_thread(FakeEngine()) as core, TestClient(build_app(core.client, MODEL_NAME, keys=keys)) as client:
        headers = {"Authorization": "Bearer secret-of-ann", "X-Request-Id": "mine-1"}
        answer = client.post("/v1/completions", json=ASKED, headers=headers)
        stream = client.post("/v1/completions", json=ASKED | {"stream": True}, headers=headers)
        client.get("/health")
        refused = client.get("/v1/models")
    assert answer.headers["x-request-id"] == stream.headers["x-request-id"] == "mine-1"
    whole, streamed, unknown = map(json.loads, capsys.readouterr().err.splitlines())
    assert whole.pop("seconds") >= 0
    assert whole.pop("time").endswith("+00:00")
    assert whole == {
        "level": "INFO",
        "logger": "jaxserve.server.request_log",
        "message": "POST /v1/completions",
        "request_id": "mine-1",
        "status": 200,
        "key": "ann",
        "id": answer.json()["id"],
        "prompt_tokens": 1,
        "completion_tokens": 3,
    }
    assert (streamed["status"], streamed["completion_tokens"]) == (200, 3)
    assert (unknown["status"], unknown["request_id"]) == (401, refused.headers["x-request-id"])
    assert "key" not in unknown


def test_text_lines_are_one_line_each(capsys: pytest.CaptureFixture) -> None:
    logs.configure("debug", "text")
    with core_thread(FakeEngine()) as core, TestClient(build_app(core.client, MODEL_NAME)) as client:
        client.get("/health", headers={"X-Request-Id": "mine-2"})
        client.get("/no%0Awhere%1b[31m")
    health, nowhere = [line for line in capsys.readouterr().err.splitlines() if " GET /" in line]
    assert "DEBUG GET /health request_id=mine-2 status=200 seconds=0.0" in health
    assert "INFO GET /no%0Awhere%1b[31m request_id=" in nowhere


@pytest.mark.parametrize("given", ["a" * 129, "two words", 'quo"te', "", "back\\slash", "-dash", "é"])
def test_an_id_that_is_not_sane_is_replaced(given: str) -> None:
    with core_thread(FakeEngine()) as core, TestClient(build_app(core.client, MODEL_NAME)) as client:
        found = client.get("/health", headers={"X-Request-Id": given.encode("latin-1")}).headers["x-request-id"]
    assert found != given
    assert len(found) == 32


@pytest.mark.parametrize("level", ["debug", "info"])
def test_a_prompt_is_logged_only_if_that_was_asked_for(capsys: pytest.CaptureFixture, level: str) -> None:
    logs.configure(level, "json")
    chat = {"messages": [{"role": "user", "content": SECRET}], "max_tokens": 2}
    for asked in (False, True):
        fake = FakeEngine()
        with core_thread(fake, log_prompts=asked) as core, TestClient(build_app(core.client, MODEL_NAME)) as client:
            assert client.post("/v1/completions", json=ASKED).status_code == 200
            assert client.post("/v1/completions", json=ASKED | {"n": SECRET}).status_code == 400
            assert client.post("/v1/chat/completions", json=chat).status_code == 200
        logged = capsys.readouterr().err
        assert "/v1/chat/completions" in logged
        assert (SECRET in logged) == asked


def test_a_failure_is_answered_and_logged_with_its_request(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    logs.configure("info", "json")
    with core_thread(FakeEngine()) as core, TestClient(build_app(core.client, MODEL_NAME)) as client:
        monkeypatch.setattr(core.client, "check_health", lambda: 1 / 0)
        response = client.get("/health", headers={"X-Request-Id": "mine-3"})
    assert response.status_code == 500
    assert response.json()["error"]["message"] == "the server failed at this request; its log has the error"
    (record,) = map(json.loads, capsys.readouterr().err.splitlines())
    assert (record["level"], record["request_id"]) == ("ERROR", "mine-3")
    assert "ZeroDivisionError" in record["exception"]


class FullDisk(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError(28, "No space left on device")


def test_a_full_disk_under_the_log_disturbs_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", FullDisk())
    logs.configure("debug", "json")
    with core_thread(FakeEngine()) as core, TestClient(build_app(core.client, MODEL_NAME)) as client:
        for _ in range(3):
            assert client.post("/v1/completions", json=ASKED).json()["choices"][0]["text"] == " 0 1 2"


def test_settings_that_are_not_of_a_log_are_refused() -> None:
    with pytest.raises(ValueError, match="log_format is 'xml'; give one of text, json"):
        ServerConfig(log_format="xml")
