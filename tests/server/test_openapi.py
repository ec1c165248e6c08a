"""`/openapi.json` describes every route, truly: requests made from it meet no status that it does not name."""

from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import CHECKS, load_all_checks
from starlette.routing import Route

from jaxserve.server.app import build_app
from jaxserve.server.config import ServerConfig
from jaxserve.server.core.client import EngineClient
from jaxserve.server.core.loop import describe
from jaxserve.server.openapi import Operation, openapi
from jaxserve.server.protocol.chat import ChatCompletionRequest
from jaxserve.server.protocol.completions import CompletionRequest
from tests.server.cases import MODEL_NAME
from tests.server.fake_engine import FakeEngine

load_all_checks()
CHECKED = CHECKS.get_by_names(
    [
        "not_a_server_error",
        "status_code_conformance",
        "content_type_conformance",
        "response_schema_conformance",
        "unsupported_method",
        "allow_header_conformance",
    ]
)
MOST = {"max_tokens": 2, "max_completion_tokens": 2, "n": 2, "best_of": 2}  # so that no request runs for long


def routes() -> list[Route]:
    fake = FakeEngine()
    engine = EngineClient(None, describe(fake), fake.inputs, ServerConfig())  # which nobody talks to
    return [route for route in build_app(engine, MODEL_NAME).routes if isinstance(route, Route)]


ROUTES = routes()
DESCRIBED = schemathesis.openapi.from_dict(openapi(ROUTES))


@DESCRIBED.parametrize()
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
def test_no_request_fails_the_server_or_meets_a_status_that_is_not_described(
    case: schemathesis.Case, server: str
) -> None:
    if isinstance(case.body, dict) and case.path.startswith("/v1/"):
        shortened = {name: min(value, most) for name, most in MOST.items() if type(value := case.body.get(name)) is int}
        case.body = {"max_tokens": 2} | case.body | shortened
    case.call_and_validate(base_url=server, checks=CHECKED, timeout=60)


QUESTION = [{"role": "user", "content": "a"}]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "a", "max_tokens": 2}),
        ("/v1/chat/completions", {"messages": QUESTION, "max_tokens": 2}),
        ("/v1/responses", {"input": "a", "max_output_tokens": 2}),
        ("/v1/messages", {"messages": QUESTION, "max_tokens": 2}),
    ],
)
def test_each_event_of_a_stream_is_as_described(path: str, body: dict[str, Any], server: str) -> None:
    case = DESCRIBED[path]["POST"].Case(
        body=body | {"model": MODEL_NAME, "stream": True}, media_type="application/json"
    )
    response = case.call_and_validate(base_url=server, checks=CHECKED, timeout=60)
    assert response.headers["content-type"][0].startswith("text/event-stream")


def test_the_document_is_valid() -> None:
    DESCRIBED.validate()
    assert DESCRIBED.specification.version == "3.1.0"


def test_every_route_is_there(client: httpx.Client) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    assert {(path, method.upper()) for path, methods in paths.items() for method in methods} == {
        (route.path_format, method) for route in ROUTES for method in route.methods if method != "HEAD"
    }
    names = [operation["operationId"] for methods in paths.values() for operation in methods.values()]
    assert len(set(names)) == len(names)
    assert all(operation["summary"] for methods in paths.values() for operation in methods.values())


@pytest.mark.parametrize(
    ("path", "request_type"),
    [("/v1/completions", CompletionRequest), ("/v1/chat/completions", ChatCompletionRequest)],
)
def test_requests_are_described_by_their_types(client: httpx.Client, path: str, request_type: Any) -> None:
    document = client.get("/openapi.json").json()
    reference = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"]
    found = document["components"]["schemas"][reference.rpartition("/")[2]]
    assert found["properties"].keys() == request_type.model_fields.keys()
    assert found["additionalProperties"] is False


def test_a_status_that_nobody_knows_is_the_programmers_mistake() -> None:
    async def endpoint(request: Any) -> None: ...

    endpoint.operation = Operation(summary="x", answers=str, errors=(418,))
    with pytest.raises(KeyError):
        openapi([Route("/x", endpoint)])
