"""`/tokenize`, `/detokenize` and `/tokenizer_info` on a real tokenizer."""

from typing import Any

import httpx
import pytest
from starlette.testclient import TestClient

from jaxserve import LLM
from jaxserve.server.app import build_app
from tests.server.cases import CONVERSATION, MODEL_NAME, PROMPT, error
from tests.server.core_thread import core_thread
from tests.server.fake_engine import FakeEngine

TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}


def tokenize(client: httpx.Client, **body: Any) -> dict[str, Any]:
    response = client.post("/tokenize", json=body)
    assert response.status_code == 200, response.text
    return response.json()


@pytest.mark.parametrize("text", [PROMPT, "", "naïve 🦙 日本", "<|im_end|> is one token", "x" * 5000])
def test_tokens_of_a_text_are_the_tokenizers_and_there_and_back_it_is_the_same(
    client: httpx.Client, llm: LLM, text: str
) -> None:
    found = tokenize(client, prompt=text, return_token_strs=True)
    assert found["tokens"] == llm.get_tokenizer().encode(text)
    assert found["token_strs"] == llm.get_tokenizer().convert_ids_to_tokens(found["tokens"])
    assert (found["count"], found["max_model_len"]) == (len(found["tokens"]), 512)
    assert client.post("/detokenize", json={"tokens": found["tokens"]}).json() == {"prompt": text}


def test_token_strings_come_only_if_asked(client: httpx.Client) -> None:
    assert tokenize(client, prompt="Hello").keys() == {"count", "max_model_len", "tokens"}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"tools": [TOOL]},
        {"tools": [TOOL], "tool_choice": "none"},
        {"messages": [*CONVERSATION, {"role": "assistant", "content": "The"}], "continue_final_message": True},
        {"add_generation_prompt": False},
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"add_special_tokens": False},
    ],
)
def test_tokens_of_a_conversation_are_the_prompt_of_its_answer(client: httpx.Client, fields: dict[str, Any]) -> None:
    found = tokenize(client, **{"messages": CONVERSATION} | fields)
    asked = {"messages": CONVERSATION, "max_tokens": 1, "return_token_ids": True} | fields
    assert found["tokens"] == client.post("/v1/chat/completions", json=asked).json()["prompt_token_ids"]


class BeginsWithOne:
    """A tokenizer that writes a beginning of sequence."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [1] * add_special_tokens + [*text.encode()]


def test_special_tokens_are_added_unless_told(llm: LLM, client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llm.engine.inputs, "tokenizer", BeginsWithOne())
    assert tokenize(client, prompt="ab")["tokens"] == [1, 97, 98]
    assert tokenize(client, prompt="ab", add_special_tokens=False)["tokens"] == [97, 98]


@pytest.mark.parametrize(
    ("path", "body", "param", "told"),
    [
        ("/tokenize", {}, "prompt", "give one of them"),
        ("/tokenize", {"prompt": "x", "messages": CONVERSATION}, "prompt", "give one of them"),
        ("/tokenize", {"prompt": "x", "tools": [TOOL]}, "tools", "goes with messages"),
        ("/tokenize", {"prompt": "x", "tool_choice": "none"}, "tool_choice", "goes with messages"),
        ("/tokenize", {"messages": CONVERSATION, "tool_choice": "any"}, "tool_choice", "'required'"),
        ("/tokenize", {"messages": CONVERSATION, "tools": [{"type": "x"}]}, "tools", "only functions are supported"),
        ("/tokenize", {"messages": []}, "messages", "messages is empty"),
        ("/tokenize", {"messages": [{"role": "user", "content": "x" * 9999}]}, "messages", "the prompt has"),
        ("/tokenize", {"prompt": ["x"]}, "prompt", "string"),
        ("/detokenize", {}, "tokens", "tokens is missing"),
        ("/detokenize", {"tokens": [10**9]}, "tokens", "1000000000"),
        ("/detokenize", {"tokens": [-1]}, "tokens", "-1"),
        ("/detokenize", {"tokens": "x"}, "tokens", "array"),
    ],
)
def test_what_is_refused(client: httpx.Client, path: str, body: dict[str, Any], param: str, told: str) -> None:
    found = error(client.post(path, json=body), 400)
    assert found["param"] == param
    assert told in found["message"]


@pytest.mark.parametrize(("path", "body"), [("/tokenize", {"prompt": "x"}), ("/detokenize", {"tokens": [1]})])
def test_a_model_that_is_not_here(client: httpx.Client, path: str, body: dict[str, Any]) -> None:
    assert client.post(path, json=body | {"model": MODEL_NAME}).status_code == 200
    assert error(client.post(path, json=body | {"model": "gpt-4"}), 404)["param"] == "model"


def test_the_tokenizer_is_described(client: httpx.Client, llm: LLM) -> None:
    info = client.get("/tokenizer_info").json()
    assert info.pop("chat_template") == llm.get_tokenizer().chat_template
    assert info == {
        "tokenizer_class": type(llm.get_tokenizer()).__name__,
        "vocab_size": 1280,
        "max_model_len": 512,
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
    }


def test_an_engine_without_a_tokenizer_says_so() -> None:
    with core_thread(FakeEngine()) as core, TestClient(build_app(core.client, MODEL_NAME)) as client:
        assert "skip_tokenizer_init" in error(client.get("/tokenizer_info"), 400)["message"]
