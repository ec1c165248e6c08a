"""Errors as responses: one sentence each, in OpenAI's shape."""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match

from jaxserve.errors import InputError, nearest
from jaxserve.server.failures import Unserved
from jaxserve.server.protocol.base import ErrorDetail, ErrorResponse, RequestType

_SHOWN = 60  # characters of a wrong value that its error repeats


class ApiError(Exception):
    """What a request is answered with instead of what it asked for."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, headers

    def body(self) -> ErrorResponse:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return ErrorResponse(error=ErrorDetail(message=str(self), type=kind, param=self.param, code=self.code))

    def response(self) -> Response:
        return Response(self.body().to_json(), self.status, self.headers, media_type="application/json")


FAILED = ApiError(500, "the server failed at this request; its log has the error")


class ClientGone(Exception):
    """The client has closed the connection; nobody reads the response."""


def as_api_error(error: Exception, request: Request | None = None) -> ApiError:
    """What the client is told of `error`, in its own names as far as its `request` has been read."""
    match error:
        case ApiError():
            return error
        case InputError():
            return _refusal(error, getattr(request.state, "body", None) if request else None)
        case Unserved():
            headers = {"Retry-After": str(error.retry_after)} if error.retry_after is not None else None
            return ApiError(error.status, str(error), headers=headers)
        case HTTPException():
            return ApiError(error.status_code, error.detail, headers=error.headers)
        case _:
            return FAILED


def _refusal(error: InputError, body: RequestType | None) -> ApiError:
    names = body.other_names() if body else {}
    return ApiError(400, error.told(names), param=error.field and names.get(error.field, error.field))


def validation_error(error: ValidationError, request_type: type[BaseModel]) -> ApiError:
    """The first thing that is wrong with a request."""
    details = error.errors(include_url=False)[0]
    context = details.get("ctx", {})
    location = [*details["loc"], *([context["field"]] if "field" in context else [])]
    return ApiError(400, _sentence(details, location, request_type), param=_path(location) or None)


def _sentence(details: ErrorDetails, location: list[int | str], request_type: type[BaseModel]) -> str:
    path, context = _path(location), details.get("ctx", {})
    outer = _path(location[:-1])
    match details["type"]:
        case "refusal":
            return f"{outer}.{context['sentence']}" if outer else context["sentence"]
        case "value_error":
            return f"{outer}.{context['error']}" if outer else str(context["error"])
        case "extra_forbidden":
            known = request_type.model_fields if len(location) == 1 else ()
            return f"there is no field {path!r}{nearest(path, known) or '; leave it out'}"
        case "missing":
            return f"{path} is missing; give it"
        case "json_invalid" if not path:
            return f"the body is not JSON ({context['error']})"
    allowed = details["msg"].replace("Input should be", "give", 1).replace("Input should", "it should", 1)
    return f"{path or 'the body'} is {_shown(details['input'])}; {allowed[0].lower()}{allowed[1:]}"


def _path(location: list[int | str]) -> str:
    """`messages[0].content`"""
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in location).removeprefix(".")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


async def _respond(request: Request, error: Exception) -> Response:
    return as_api_error(error, request).response()


async def _respond_not_found(request: Request, error: Exception) -> Response:
    return ApiError(404, f"there is no {request.url.path}; the API lies under /v1").response()


async def _respond_wrong_method(request: Request, error: HTTPException) -> Response:
    here = [route for route in request.app.routes if route.matches(request.scope)[0] is not Match.NONE]
    # Starlette's own error knows the methods of the first of them alone.
    allowed = sorted({method for route in here for method in getattr(route, "methods", None) or ("GET", "HEAD")})
    message = f"{request.method} does not go with {request.url.path}; use {' or '.join(allowed)}"
    return ApiError(405, message, headers={"Allow": ", ".join(allowed)}).response()


async def _respond_to_nobody(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nginx's number for it, which only a log would show


EXCEPTION_HANDLERS: dict[Any, Any] = {
    404: _respond_not_found,
    405: _respond_wrong_method,
    ApiError: _respond,
    InputError: _respond,
    Unserved: _respond,
    HTTPException: _respond,
    ClientGone: _respond_to_nobody,
}
