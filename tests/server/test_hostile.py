"""Requests that mean harm, or might as well: each is answered, its neighbours get the tokens that they get alone."""

import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from jaxserve.server.protocol.base import RequestType
from jaxserve.server.protocol.chat import ChatCompletionRequest
from jaxserve.server.protocol.completions import CompletionRequest
from jaxserve.server.protocol.embeddings import EmbeddingRequest, ScoreRequest
from jaxserve.server.protocol.messages import MessagesRequest
from jaxserve.server.protocol.responses import ResponsesRequest
from tests.server.cases import error, events

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
HELLO = [{"role": "user", "content": "Hello"}]
NUMBERS = (
    *("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"),
    *("seed", "n", "max_tokens", "min_tokens", "logprobs", "prompt_logprobs", "priority"),
)


NESTED = '{"a":' * 100_000 + "1" + "}" * 100_000
TOOLS = f'[{{"type": "function", "function": {NESTED}}}]'
MANY = {f"key {number}": {"type": "string", "description": "x" * 80} for number in range(100_000)}
LOOP = "{% for i in range(10**9) %}{% endfor %}"


def tool(parameters: Any, name: str = "f") -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters, "strict": True}}


# Bodies as they are sent, by what they try.
BODIES: dict[str, tuple[str, str | bytes]] = {
    "a million completions": (COMPLETIONS, json.dumps({"prompt": "x", "n": 10**6})),
    "a hundred thousand prompts": (COMPLETIONS, json.dumps({"prompt": ["x"] * 100_000, "max_tokens": 1})),
    "more completions than may wait": (COMPLETIONS, json.dumps({"prompt": ["x"] * 100, "n": 1000, "max_tokens": 1})),
    "more bytes than may be": (COMPLETIONS, json.dumps({"prompt": "x" * 50_000_000})),
    "a prompt of a million tokens": (COMPLETIONS, json.dumps({"prompt": [5] * 10**6})),
    "ten thousand stop strings": (COMPLETIONS, json.dumps({"prompt": "x", "stop": [f"s{i}" for i in range(10_000)]})),
    "a stop string of a million characters": (COMPLETIONS, json.dumps({"prompt": "x", "stop": "ab" * 500_000})),
    "invalid UTF-8": (COMPLETIONS, b'{"prompt": "\xc3\x28"}'),
    "half a surrogate pair": (CHAT, b'{"messages": [{"role": "user", "content": "\\ud83d"}]}'),
    "JSON that nests": (CHAT, '{"messages": ' + "[" * 100_000 + "]" * 100_000 + "}"),
    "tools that nest": (CHAT, f'{{"messages": {json.dumps(HELLO)}, "tools": {TOOLS}}}'),
    "ids out of the vocabulary": (COMPLETIONS, json.dumps({"prompt": [2**31]})),
    "negative ids": (COMPLETIONS, json.dumps({"prompt": [-1]})),
    "a bias out of the vocabulary": (COMPLETIONS, json.dumps({"prompt": "x", "logit_bias": {str(2**40): 1}})),
    "stops out of the vocabulary": (
        COMPLETIONS,
        json.dumps({"prompt": "x", "stop_token_ids": [2**40], "min_tokens": 5}),
    ),
    "bad words, which are not supported": (COMPLETIONS, json.dumps({"prompt": "x", "bad_words": ["ab" * 500_000]})),
    "a million log-probabilities": (COMPLETIONS, json.dumps({"prompt": "x", "logprobs": 10**6})),
    "a template of its own": (CHAT, json.dumps({"messages": HELLO, "chat_template_kwargs": {"chat_template": LOOP}})),
    "an option of the tokenizer": (CHAT, json.dumps({"messages": HELLO, "chat_template_kwargs": {"tokenize": True}})),
    "a text of ten megabytes": (COMPLETIONS, json.dumps({"prompt": "word " * 2_000_000})),
    "tools of ten megabytes": (CHAT, json.dumps({"messages": HELLO, "tools": [tool({"properties": MANY})]})),
    "a role that does not exist": (CHAT, json.dumps({"messages": [{"role": ["user"], "content": {}}]})),
}
BODIES |= {
    f"{name}={value}": (COMPLETIONS, f'{{"prompt": "x", "{name}": {value}}}')
    for name in NUMBERS
    for value in ("NaN", "-Infinity", "1e999", str(10**30), "[]")
}


STRUCTURED: dict[str, dict[str, Any]] = {
    "a schema of ten megabytes": {"json": {"type": "object", "properties": MANY}},
    "a schema that is itself": {"json": {"$ref": "#"}},
    "schemas that are one another": {
        "json": {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}
    },
    "a schema from elsewhere": {"json": {"$ref": "http://localhost:1/schema"}},
    "a schema that nests": {"json": '{"items":' * 5000 + "{}" + "}" * 5000},
    "a schema that is none": {"json": {"type": 5}},
    "a billion repetitions": {"regex": "((a{1000}){1000}){1000}"},
    "a back-reference": {"regex": r"(a+)\1"},
    "nothing that matches": {"regex": r"[^\s\S]"},
    "a grammar that is itself": {"grammar": "start: start"},
    "a hundred thousand choices": {"choice": [f"choice {number}" for number in range(100_000)]},
}
BODIES |= {
    name: (COMPLETIONS, json.dumps({"prompt": "x", "structured_outputs": wanted}))
    for name, wanted in STRUCTURED.items()
}
PARAMETERS: dict[str, Any] = {
    "text": "x",
    "a list": [],
    "a number": 5,
    "of no type": {"type": 5},
    "an array": {"type": "array"},
    "with a list of properties": {"type": "object", "properties": []},
    "with a type that is none": {"type": "object", "properties": {"a": {"type": "nonsense"}}},
    "that are themselves": {"$ref": "#"},
}
BODIES |= {
    f"parameters {name}": (CHAT, json.dumps({"messages": HELLO, "tools": [tool(parameters)]}))
    for name, parameters in PARAMETERS.items()
} | {"a function's name of two lines": (CHAT, json.dumps({"messages": HELLO, "tools": [tool({}, "a\nb")]}))}


REQUESTS: dict[type[RequestType], tuple[str, dict[str, Any]]] = {
    CompletionRequest: (COMPLETIONS, {"prompt": "x"}),
    ChatCompletionRequest: (CHAT, {"messages": HELLO}),
    ResponsesRequest: ("/v1/responses", {"input": "x"}),
    MessagesRequest: ("/v1/messages", {"messages": HELLO, "max_tokens": 1}),
    EmbeddingRequest: ("/v1/embeddings", {"input": "x"}),
    ScoreRequest: ("/score", {"text_1": "x", "text_2": "y"}),
}


@pytest.mark.parametrize("kind", REQUESTS)
@pytest.mark.parametrize("value", [10**30, -(10**30), 2**63, -(2**63) - 1])
def test_no_number_is_too_large_for_a_sentence(client: httpx.Client, kind: type[RequestType], value: int) -> None:
    path, body = REQUESTS[kind]
    numbers = [
        name for name, field in kind.model_fields.items() if re.search(r"\b(int|float)\b", str(field.annotation))
    ]
    assert "priority" in numbers or kind is MessagesRequest
    for name in numbers:
        response = client.post(path, json=body | {name: value})
        assert response.status_code in (200, 400), (name, response.text)


@pytest.mark.parametrize("name", BODIES)
def test_it_is_refused_with_a_sentence(client: httpx.Client, name: str) -> None:
    path, body = BODIES[name]
    response = client.post(path, content=body)
    assert len(error(response, 413 if name == "more bytes than may be" else 400)["message"]) < 500


@pytest.fixture
def neighbour(client: httpx.Client) -> Iterator[Callable[[], None]]:
    """Two requests that run during the test. Called, it waits for them and compares them with what they are alone."""
    asked: list[dict[str, Any]] = [
        {"prompt": "The old farmer", "max_tokens": 300, "ignore_eos": True, "stream": True, "temperature": 0},
        {"prompt": "Hello", "max_tokens": 300, "ignore_eos": True, "stream": True, "temperature": 1, "seed": 5},
    ]

    def text(body: dict[str, Any]) -> str:
        return "".join(chunk["choices"][0]["text"] for chunk in events(client.post(COMPLETIONS, json=body)))

    alone, beside = [text(body) for body in asked], ["", ""]

    def run(number: int) -> None:
        beside[number] = text(asked[number])

    threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()

    def check() -> None:
        for thread in threads:
            thread.join()
        assert beside == alone

    yield check
    check()


def test_neighbours_get_the_same_tokens_beside_all_of_it(client: httpx.Client, neighbour: Callable[[], None]) -> None:
    for path, body in BODIES.values():
        assert client.post(path, content=body).status_code in (400, 413)
    neighbour()


def test_clients_that_vanish_by_the_hundred(server: str, client: httpx.Client, neighbour: Callable[[], None]) -> None:
    body = json.dumps({"prompt": "Hello", "max_tokens": 400, "ignore_eos": True, "stream": True}).encode()
    request = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
    address = urlsplit(server)
    connections = []
    for number in range(200):
        connections.append(socket.create_connection((address.hostname, address.port)))
        connections[-1].sendall(request[: len(request) - number % 3])  # every third has sent all
    for connection in connections:
        connection.close()
    neighbour()
    answer = client.post(COMPLETIONS, json={"prompt": "Hello", "max_tokens": 3, "ignore_eos": True}, timeout=20)
    assert answer.json()["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize(
    "header",
    [b"X-Request-Id: a\r\n b", b"X-Request-Id: a\rSet-Cookie: b", b"X-Request-Id: a\x00b", b"X-Request-Id : a"],
)
def test_headers_that_carry_others(server: str, header: bytes) -> None:
    address = urlsplit(server)
    with socket.create_connection((address.hostname, address.port), timeout=20) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n%s\r\n\r\n" % header)
        received = b""
        while chunk := connection.recv(4096):
            received += chunk
    head = received.partition(b"\r\n\r\n")[0].lower()
    assert b"set-cookie" not in head
    assert head.startswith((b"http/1.1 200", b"http/1.1 400"))
    if b"x-request-id" in head:
        assert len(head.partition(b"x-request-id: ")[2].split(b"\r\n")[0]) in (32, 3)


@pytest.mark.parametrize(
    ("wanted", "pattern"),
    [
        ({"regex": "(a+)+b"}, "a+b?"),
        ({"json": {"type": "object", "properties": {"a": {"$ref": "#"}}, "additionalProperties": False}}, r"\s*\{.*"),
        ({"json": {}}, r".+"),
    ],
)
def test_what_looks_like_harm_and_is_none_is_followed(
    client: httpx.Client, wanted: dict[str, Any], pattern: str, neighbour: Callable[[], None]
) -> None:
    body = {"prompt": "x", "max_tokens": 12, "temperature": 0, "structured_outputs": wanted}
    text = client.post(COMPLETIONS, json=body).json()["choices"][0]["text"]
    assert re.fullmatch(pattern, text, re.DOTALL), text


def test_a_flood_of_schemas_holds_no_neighbour_up(client: httpx.Client, neighbour: Callable[[], None]) -> None:
    def ask(number: int) -> int:
        schema = {"type": "object", "properties": {f"key {number}-{i}": {"type": "integer"} for i in range(50)}}
        body = {"prompt": "x", "max_tokens": 3, "structured_outputs": {"json": schema}}
        return client.post(COMPLETIONS, json=body).status_code

    with ThreadPoolExecutor(16) as pool:
        assert set(pool.map(ask, range(100))) == {200}
    neighbour()
