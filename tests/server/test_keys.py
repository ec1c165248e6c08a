"""API keys: who is answered, and how many requests at a time."""

import asyncio
from pathlib import Path

import httpx
import pytest
from starlette.testclient import TestClient

from jaxserve.errors import InputError
from jaxserve.server.app import build_app
from jaxserve.server.config import ServerConfig
from jaxserve.server.keys import ApiKeys
from tests.server.cases import MODEL_NAME, error
from tests.server.core_thread import core_thread
from tests.server.fake_engine import FakeEngine

KEYS = ApiKeys({"ann": "secret-of-ann", "bob": "secret-of-bob"})
ASKED = {"prompt": "x", "max_tokens": 3}


def test_a_file_has_a_key_a_line_with_or_without_a_name(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\n\nfirst-key\n  ann\tsecond-key \n")
    keys = ApiKeys.read(str(file))
    assert [keys.owner(key) for key in (b"first-key", b"second-key", b"third", b"", b"ann")] == [
        "line 3",
        "ann",
        None,
        None,
        None,
    ]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "holds no API key"),
        ("a b c\n", "line 1 of"),
        ("same\nsame\n", "line 2 of"),
        ("ann one\nann two\n", "line 2 of"),
    ],
)
def test_a_file_that_is_none_of_keys_is_refused_without_showing_any(tmp_path: Path, text: str, told: str) -> None:
    file = tmp_path / "keys"
    file.write_text(text)
    with pytest.raises(InputError, match=told) as raised:
        ApiKeys.read(str(file))
    assert "same" not in str(raised.value)
    with pytest.raises(InputError, match="cannot read the API keys of /no/such/file"):
        ApiKeys.read("/no/such/file")


def test_every_route_but_health_wants_a_key() -> None:
    with core_thread(FakeEngine()) as core, TestClient(build_app(core.client, MODEL_NAME, keys=KEYS)) as client:
        for path in ("/health", "/ready"):
            assert client.get(path).status_code == 200
        for response in (
            client.post("/v1/completions", json=ASKED),
            client.get("/v1/models"),
            client.get("/nowhere"),
            client.get("/health/"),
            client.get("/v1/models", headers={"Authorization": "Bearer secret-of-eve"}),
            client.get("/v1/models", headers={"Authorization": "secret-of-ann"}),
            client.get("/v1/models", headers={"Authorization": "Basic secret-of-ann"}),
            client.get("/v1/models", headers={"Authorization": "Bearer"}),
        ):
            found = error(response, 401)
            assert (found["code"], response.headers["www-authenticate"]) == ("invalid_api_key", "Bearer")
            assert "secret" not in found["message"]
        for headers in ({"Authorization": "Bearer secret-of-ann"}, {"x-api-key": "secret-of-bob"}):
            assert client.post("/v1/completions", json=ASKED, headers=headers).status_code == 200


@pytest.mark.anyio
async def test_a_key_has_only_so_many_requests_at_a_time() -> None:
    fake = FakeEngine()
    fake.may_step.clear()
    config = ServerConfig(max_requests_per_key=2, api_key_file="keys")
    with core_thread(fake) as core:
        transport = httpx.ASGITransport(build_app(core.client, MODEL_NAME, config, KEYS))
        async with core.client, httpx.AsyncClient(transport=transport, base_url="http://server") as client:

            def ask(key: str) -> asyncio.Task[httpx.Response]:
                headers = {"Authorization": f"Bearer {key}"}
                return asyncio.create_task(client.post("/v1/completions", json=ASKED, headers=headers))

            running = [ask("secret-of-ann") for _ in range(2)]
            while core.client.unfinished < 2:
                await asyncio.sleep(0.01)
            refused = await ask("secret-of-ann")
            assert error(refused, 429)["code"] == "rate_limit_exceeded"
            assert refused.headers["retry-after"] == "1"
            running.append(ask("secret-of-bob"))  # who has a number of his own
            while core.client.unfinished < 3:
                await asyncio.sleep(0.01)
            fake.may_step.set()
            assert [response.status_code for response in await asyncio.gather(*running)] == [200] * 3
            assert (await ask("secret-of-ann")).status_code == 200
            headers = {"Authorization": "Bearer secret-of-bob"}
            metrics = (await client.get("/metrics", headers=headers)).text
            assert 'jaxserve:requests_refused_total{reason="max_requests_per_key"} 1.0' in metrics


def test_the_time_to_check_a_key_tells_nothing_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    monkeypatch.setattr("hmac.compare_digest", lambda a, b: compared.append((a, b)) or a == b)
    for key in (b"secret-of-ann", b"secret-of-bob", b"", b"x" * 10_000):
        KEYS.owner(key)
        assert [{len(a), len(b)} for a, b in compared] == [{32}, {32}]  # all of them, and digests only
        compared.clear()
