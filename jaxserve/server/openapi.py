"""`/openapi.json`: what every endpoint takes and answers, from the types that it is written with."""

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

from pydantic import BaseModel, TypeAdapter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

import jaxserve
from jaxserve.server.protocol.base import ErrorResponse

_ERRORS = {
    400: "The request cannot be served; the error says what is wrong and what is possible.",
    401: "The server has API keys, and the request brings none of them.",
    404: "There is no such model, or no such response.",
    408: "The body has not come in time.",
    413: "The body is too large.",
    429: "As much waits or runs as may, of this API key or in all.",
    500: "The server or its engine failed.",
    503: "The engine does not run, or the server takes no requests now.",
    504: "The request has taken as long as it may.",
}
_ANY = {401, 429, 500}
_WITH_BODY = {400, 408, 413}
GENERATES = (404, 503, 504)  # what a request that has to run may be answered with beside those


@dataclasses.dataclass(frozen=True, kw_only=True)
class Operation:
    """What an endpoint does.

    Attributes:
        summary: in a few words.
        answers: the type of the JSON that it answers with, or another media type.
        takes: the type of the JSON that it is sent.
        streams: the type of each server-sent event's data, if it is asked to stream.
        last_event: the data of the one event that is none of that type.
        errors: statuses that it may answer with beside those of any endpoint.
        errors_are: the type of their JSON.
    """

    summary: str
    answers: Any
    takes: type[BaseModel] | None = None
    streams: type[BaseModel] | None = None
    last_event: str | None = None
    errors: tuple[int, ...] = ()
    errors_are: Any = ErrorResponse


def describes[T: Callable](operation: Operation) -> Callable[[T], T]:
    """A decorator of the endpoint that `operation` is about."""

    def describe(endpoint: T) -> T:
        endpoint.operation = operation  # type: ignore[attr-defined]
        return endpoint

    return describe


class Description:
    """The document for `routes`, made when it is first asked for. Each of them, mounts aside, has its `Operation`."""

    def __init__(self, routes: Sequence[BaseRoute]):
        self._routes = routes

    @describes(Operation(summary="This document", answers=dict[str, Any]))
    async def show(self, request: Request) -> Response:
        return JSONResponse(self._document)

    @functools.cached_property
    def _document(self) -> dict[str, Any]:
        return openapi([route for route in self._routes if isinstance(route, Route)])


def openapi(routes: Sequence[Route]) -> dict[str, Any]:
    """An OpenAPI 3.1 document."""
    operations: list[tuple[Route, Operation]] = [(route, route.endpoint.operation) for route in routes]  # type: ignore[attr-defined]
    types: dict[Any, None] = {}  # for its order
    for _, operation in operations:
        types |= dict.fromkeys((operation.takes, operation.answers, operation.streams, operation.errors_are))
    # For validation: what has a default may be missing, as a response's fields may that are not set.
    found, definitions = TypeAdapter.json_schemas(
        [(kind, "validation", TypeAdapter(kind)) for kind in types if kind is not None and not isinstance(kind, str)],
        ref_template="#/components/schemas/{model}",
    )
    schemas = {kind: schema for (kind, _), schema in found.items()}
    paths: dict[str, dict[str, Any]] = {}
    for route, operation in operations:
        for method in sorted((route.methods or set()) - {"HEAD"}):
            described = _operation(f"{method} {route.path_format}", operation, schemas)
            if route.param_convertors:
                described["parameters"] = [
                    {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
                    for name in route.param_convertors
                ]
            paths.setdefault(route.path_format, {})[method.lower()] = described
    return {
        "openapi": "3.1.0",
        "info": {"title": "jaxserve", "version": jaxserve.__version__},
        "security": [{}, {"key": []}],  # the server may have no keys
        "paths": paths,
        "components": {
            "schemas": definitions.get("$defs", {}),
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _operation(name: str, operation: Operation, schemas: dict[Any, Any]) -> dict[str, Any]:
    described: dict[str, Any] = {"operationId": "_".join(re.findall(r"\w+", name.lower()))}
    described["summary"] = operation.summary
    errors = _ANY | {*operation.errors} | (_WITH_BODY if operation.takes else set())
    if operation.takes:
        described["requestBody"] = {"required": True, "content": _json(schemas[operation.takes])}
    if isinstance(operation.answers, str):
        content: dict[str, Any] = {operation.answers: {"schema": {"type": "string"}}}
    else:
        content = _json(schemas[operation.answers])
    if operation.streams:
        data: dict[str, Any] = {"type": "string", "contentMediaType": "application/json"}
        data["contentSchema"] = schemas[operation.streams]
        if operation.last_event:
            data = {"anyOf": [{"const": operation.last_event}, data]}
        event = {"type": "object", "properties": {"event": {"type": "string"}, "data": data}, "required": ["data"]}
        content["text/event-stream"] = {"schema": event}  # of each event
    described["responses"] = {"200": {"description": "Success.", "content": content}} | {
        str(status): {"description": _ERRORS[status], "content": _json(schemas[operation.errors_are])}
        for status in sorted(errors)
    }
    return described


def _json(schema: Any) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}
