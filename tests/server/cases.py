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

# What the demo model calls one of two tools for, after thinking about it.
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "The city"},
                "day": {"type": "string", "description": "The day"},
            },
            "required": ["city", "day"],
        },
    },
}
NEWS = {
    "type": "function",
    "function": {
        "name": "find_news",
        "description": "Find the news",
        "parameters": {
            "type": "object",
            "properties": {"topic": {"type": "string", "description": "The topic"}},
            "required": ["topic"],
        },
    },
}
TOOLS = [WEATHER, NEWS]
NAMED_NEWS = {"type": "function", "function": {"name": "find_news"}}
WEATHER_ASKED = {"role": "user", "content": "Please get the weather in Paris on Monday."}
WEATHER_ARGUMENTS = {"city": "Paris", "day": "Monday"}

# What an answer to `CONVERSATION` may have to be.
CAPITAL = {
    "type": "object",
    "properties": {"capital": {"enum": ["Paris", "Rome"]}, "sure": {"type": "boolean"}},
    "required": ["capital", "sure"],
    "additionalProperties": False,
}

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


def message_of(chunks: list[dict[str, Any]], index: int = 0) -> dict[str, Any]:
    """The message that the deltas of a choice add up to, as a whole answer has it."""
    message: dict[str, Any] = {}
    calls: list[dict[str, Any]] = []
    for choice in [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]:
        delta = choice["delta"]
        if "role" in delta:
            assert not message  # it is told once, first
            message = {"role": delta["role"], "content": ""}
        for name in ("content", "reasoning_content"):
            if name in delta:
                message[name] = message.get(name, "") + delta[name]
        for part in delta.get("tool_calls", []):
            if part["index"] == len(calls):
                calls.append({"id": part["id"], "type": part["type"], "function": part["function"] | {"arguments": ""}})
            calls[part["index"]]["function"]["arguments"] += part["function"].get("arguments", "")
    if calls:
        message |= {"tool_calls": calls, "content": message["content"] or None}
    return message


EMBEDDED = ["The capital of France is Paris.", "27 + 45 = 72", "A"]
SCORED = "The capital of France", [" is Paris.", " is an old lamp."]
