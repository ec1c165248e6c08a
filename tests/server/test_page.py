"""The page's files: what they may do and what they refer to. What the page does is tested in tests/browser."""

import re
from pathlib import Path

import httpx
import pytest
from starlette.testclient import TestClient

from jaxserve.server.app import build_app
from jaxserve.server.keys import ApiKeys
from jaxserve.server.routes.page import FILES, POLICY
from tests.server.cases import MODEL_NAME, error
from tests.server.core_thread import core_thread
from tests.server.fake_engine import FakeEngine

NAMES = sorted(path.name for path in FILES.iterdir())


@pytest.mark.parametrize("path", ["/", *(f"/static/{name}" for name in NAMES)])
def test_each_file_comes_with_the_policy(client: httpx.Client, path: str) -> None:
    response = client.get(path)
    assert response.status_code == 200
    assert response.headers["content-security-policy"] == POLICY
    assert response.headers["x-content-type-options"] == "nosniff"
    kinds = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
    assert response.headers["content-type"].startswith(kinds[path.rpartition(".")[2] if "." in path else "html"])
    assert response.text == (FILES / (Path(path).name or "index.html")).read_text()


def test_the_policy_allows_nothing_but_this_server() -> None:
    sources = {source for directive in POLICY.split("; ") for source in directive.split()[1:]}
    assert sources == {"'self'", "'none'"}
    assert POLICY.startswith("default-src 'none'; ")


@pytest.mark.parametrize("name", NAMES)
def test_no_file_refers_to_another_server(name: str) -> None:
    text = (FILES / name).read_text().replace("http://www.w3.org/2000/svg", "")
    assert not re.findall(r"(?:https?:)?//[\w-]+\.\w+", text)


def test_all_that_the_page_refers_to_is_there(client: httpx.Client) -> None:
    page = client.get("/").text
    referred = set(re.findall(r'(?:src|href)="([^#"]+)"', page))
    assert {"static/page.css", "static/page.js", "static/icon.svg"} <= referred
    for path in referred:
        assert client.get(f"/{path}").status_code == 200


def test_a_file_that_has_not_changed_is_not_sent_again(client: httpx.Client) -> None:
    first = client.get("/static/page.js")
    again = client.get("/static/page.js", headers={"If-None-Match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


def test_the_page_needs_no_key_and_its_calls_do() -> None:
    with (
        core_thread(FakeEngine()) as core,
        TestClient(build_app(core.client, MODEL_NAME, keys=ApiKeys({"me": "secret"}))) as client,
    ):
        for path in ("/", *(f"/static/{name}" for name in NAMES)):
            assert client.get(path).status_code == 200
        for path in ("/stats", "/v1/models", "/version", "/openapi.json", "/static"):
            error(client.get(path), 401)
            assert client.get(path, headers={"Authorization": "Bearer secret"}).status_code != 401


@pytest.mark.parametrize("path", ["/static/", "/static/page.py", "/static/..%2fapp.py", "/static/%2e%2e/app.py"])
def test_nothing_else_is_served(client: httpx.Client, path: str) -> None:
    assert client.get(path).status_code == 404
