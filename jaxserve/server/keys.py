"""API keys: whose request is answered, and how many at a time."""

import hashlib
import hmac
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from starlette.types import ASGIApp, Receive, Scope, Send

from jaxserve.errors import InputError
from jaxserve.server import logs
from jaxserve.server.errors import ApiError

OPEN_PATHS = frozenset({"/health", "/ready", "/"})  # whoever watches the server has no key, and the page asks for one


class ApiKeys:
    """Keys by the names that logs show. Only their digests are kept."""

    def __init__(self, keys: dict[str, str]):
        self._digests = {name: _digest(key.encode()) for name, key in keys.items()}

    @classmethod
    def read(cls, path: str) -> "ApiKeys":
        """Of a file with a key, or a name and a key, a line; lines that begin with # are comments."""
        try:
            lines = Path(path).expanduser().read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read the API keys of {path} ({error})") from error
        keys: dict[str, str] = {}
        for number, line in enumerate(lines, 1):
            words = line.split()
            if not words or words[0].startswith("#"):
                continue
            name = words[0] if len(words) == 2 else f"line {number}"
            if len(words) > 2 or name in keys or words[-1] in keys.values():
                raise InputError(f"line {number} of {path} is no new key; write a key, or a name and a key, a line")
            keys[name] = words[-1]
        if not keys:
            raise InputError(f"{path} holds no API key; write one a line")
        return cls(keys)

    def owner(self, key: bytes) -> str | None:
        """The name of a key. Takes the same time whatever the key and whether it is one."""
        given, found = _digest(key), None
        for name, digest in self._digests.items():
            if hmac.compare_digest(given, digest):
                found = name
        return found


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


_NO_KEY = ApiError(
    401,
    "there is no such API key; send one as 'Authorization: Bearer KEY'",
    code="invalid_api_key",
    headers={"WWW-Authenticate": "Bearer"},
)


class RequireKey:
    """Lets requests with a key through, and of each key no more than `max_requests` at a time.

    `on_refused` is told of what is too many.
    """

    def __init__(self, app: ASGIApp, keys: ApiKeys, max_requests: int | None, on_refused: Callable[[str], None]):
        self._app, self._keys, self._max_requests, self._on_refused = app, keys, max_requests, on_refused
        self._under_way: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or _is_open(scope["path"]):
            await self._app(scope, receive, send)
            return
        owner = self._keys.owner(_given_key(scope))
        if owner is None:
            await _NO_KEY.response()(scope, receive, send)
            return
        logs.note(key=owner)
        if self._max_requests is not None and self._under_way[owner] >= self._max_requests:
            error = ApiError(
                429,
                f"{self._max_requests} requests of this API key are under way, which is the most; wait for one to end",
                code="rate_limit_exceeded",
                headers={"Retry-After": "1"},
            )
            self._on_refused("max_requests_per_key")
            await error.response()(scope, receive, send)
            return
        self._under_way[owner] += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._under_way[owner] -= 1


def _is_open(path: str) -> bool:
    return path in OPEN_PATHS or path.startswith("/static/")


def _given_key(scope: Scope) -> bytes:
    """From `Authorization: Bearer`, or `x-api-key` as Anthropic's clients send it."""
    headers = dict(scope["headers"])
    scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
    return key.strip() if scheme.lower() == b"bearer" else headers.get(b"x-api-key", b"")
