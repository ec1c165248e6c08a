"""What several tests ask the server, and how they take its answers apart."""

import json
from typing import Any

import httpx

MODEL_NAME = "the-model"

PROMPT = "The old farmer carries a lamp to the market."
CONVERSATION = [
    {"role": "system", "content": "Answer the user's questions."},
    {"role": "user", "content": "What is the capital of France?"},
]

_SAMPLED = {"temperature": 1.2, "top_p": 0.95, "top_k": 50, "seed": 7, "max_tokens": 24, "ignore_eos": True}
# Prompt and settings, which mean the same to `SamplingParams` and to the server.
COMPLETIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "greedy": (PROMPT, {"temperature": 0, "max_tokens": 24, "ignore_eos": True}),
    "sampled": (PROMPT, _SAMPLED),
    "three": (PROMPT, _SAMPLED | {"n": 3}),
    "ends by itself": (PROMPT, {"temperature": 0, "max_tokens": 400}),
}


def events(response: httpx.Response) -> list[Any]:
    """The JSON of a stream's events. It has to end with [DONE]."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    blocks = [block for block in response.text.split("\n\n") if block and not block.startswith(":")]
    assert all(block.startswith("data: ") and "\n" not in block for block in blocks)
    data = [block.removeprefix("data: ") for block in blocks]
    assert data.pop() == "[DONE]"
    return [json.loads(text) for text in data]


def error(response: httpx.Response, status: int) -> dict[str, Any]:
    """The error in a response, which has to have this status and OpenAI's shape, and to be one sentence."""
    assert response.status_code == status, response.text
    assert response.json().keys() == {"error"}
    found = response.json()["error"]
    assert found.keys() == {"message", "type", "param", "code"}
    assert found["message"]
    assert "\n" not in found["message"]
    assert found["type"] == ("server_error" if status >= 500 else "invalid_request_error")
    return found
