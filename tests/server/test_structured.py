"""Answers that have to have a form: OpenAI's, vLLM's and Anthropic's ways to ask for it, and what is refused."""

import json
import re
from typing import Any, Literal

import anthropic
import httpx
import jsonschema
import openai
import pydantic
import pytest

from tests.server.cases import CAPITAL, CONVERSATION, MODEL_NAME, error, events, message_of

COMPLETIONS, CHAT, RESPONSES, MESSAGES = "/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages"
FORMAT = {"type": "json_schema", "json_schema": {"name": "capital", "schema": CAPITAL, "strict": True}}
GREEDY = {"temperature": 0, "max_tokens": 300}
UNTHOUGHT = {"chat_template_kwargs": {"enable_thinking": False}}


class Capital(pydantic.BaseModel):
    capital: Literal["Paris", "Rome"]
    sure: bool


def choice_of(client: httpx.Client, **fields: Any) -> dict[str, Any]:
    response = client.post(CHAT, json={"messages": CONVERSATION} | GREEDY | fields)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]


# Fields of both kinds of completions, and what the text then is.
FORMS: list[tuple[dict[str, Any], str]] = [
    ({"response_format": FORMAT}, "schema"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "c", "schema": CAPITAL}}}, "schema"),
    ({"response_format": {"type": "json_object"}}, "object"),
    ({"structured_outputs": {"json": CAPITAL}}, "schema"),
    ({"structured_outputs": {"json": json.dumps(CAPITAL), "disable_any_whitespace": True}}, "compact"),
    ({"structured_outputs": {"json": CAPITAL, "whitespace_pattern": "\n\n"}}, "schema"),
    ({"structured_outputs": {"json_object": True}}, "object"),
    ({"structured_outputs": {"regex": "[A-C]{3}-[0-9]{2,4}"}}, "[A-C]{3}-[0-9]{2,4}"),
    ({"structured_outputs": {"choice": ["one", "two"]}}, "one|two"),
    ({"structured_outputs": {"grammar": 'start: "x" NUMBER\nNUMBER: /[0-9]{2}/'}}, "x[0-9]{2}"),
    ({"guided_json": CAPITAL, "guided_decoding_backend": "guidance"}, "schema"),
    ({"guided_json": json.dumps(CAPITAL), "guided_whitespace_pattern": " ?"}, "schema"),
    ({"guided_regex": "[A-C]{3}"}, "[A-C]{3}"),
    ({"guided_choice": ["one", "two"]}, "one|two"),
    ({"guided_grammar": 'root ::= "y" [0-9]'}, "y[0-9]"),
]


def check_form(text: str, form: str) -> None:
    if form in ("schema", "compact"):
        jsonschema.validate(json.loads(text), CAPITAL)
        assert form == "schema" or text == json.dumps(json.loads(text), separators=(",", ":"))
    elif form == "object":
        assert isinstance(json.loads(text), dict)
    else:
        assert re.fullmatch(form, text)


@pytest.mark.parametrize(("fields", "form"), FORMS)
def test_the_text_has_the_form(client: httpx.Client, fields: dict[str, Any], form: str) -> None:
    asked = {"prompt": "The capital of France", **GREEDY} | fields
    response = client.post(COMPLETIONS, json=asked)
    assert response.status_code == 200, response.text
    whole = response.json()["choices"][0]
    streamed = [chunk["choices"][0] for chunk in events(client.post(COMPLETIONS, json=asked | {"stream": True}))]
    assert "".join(choice["text"] for choice in streamed) == whole["text"]
    assert streamed[-1]["finish_reason"] == whole["finish_reason"]
    choice = choice_of(client, **UNTHOUGHT, **fields)
    for text, reason in (
        (whole["text"], whole["finish_reason"]),
        (choice["message"]["content"], choice["finish_reason"]),
    ):
        if (form, reason) == ("object", "length"):  # any object may go on for ever
            assert text.startswith("{")
        else:
            assert reason == "stop"
            check_form(text, form)


def test_the_form_binds_behind_the_thinking(client: httpx.Client) -> None:
    free = choice_of(client)["message"]
    choice = choice_of(client, response_format=FORMAT)
    message = choice["message"]
    assert message["reasoning_content"] == free["reasoning_content"]  # which the form has no part in
    jsonschema.validate(json.loads(message["content"]), CAPITAL)
    asked = {"messages": CONVERSATION, "response_format": FORMAT, "stream": True} | GREEDY
    assert message_of(events(client.post(CHAT, json=asked))) == message


def test_the_form_is_of_the_python_apis_answer(sdk: openai.OpenAI, offline: dict[str, Any]) -> None:
    (expected,) = offline["structured chat"].outputs
    asked: dict[str, Any] = {"model": MODEL_NAME, "messages": CONVERSATION, "temperature": 0}
    completion = sdk.chat.completions.create(
        **asked, max_tokens=200, extra_body={"structured_outputs": {"json": CAPITAL}}
    )
    assert completion.choices[0].message.to_dict() == expected.message


def test_the_openai_sdk_parses_answers(sdk: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": MODEL_NAME, "temperature": 0}
    completion = sdk.chat.completions.parse(**asked, messages=CONVERSATION, response_format=Capital)
    assert isinstance(completion.choices[0].message.parsed, Capital)
    with sdk.chat.completions.stream(**asked, messages=CONVERSATION, response_format=Capital) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.parsed == completion.choices[0].message.parsed
    response = sdk.responses.parse(**asked, input=CONVERSATION, text_format=Capital)
    assert isinstance(response.output_parsed, Capital)
    assert response.text.format.type == "json_schema"
    assert response.text.format.name == "Capital"
    assert [item.type for item in response.output] == ["reasoning", "message"]
    with sdk.responses.stream(**asked, input=CONVERSATION, text_format=Capital) as events:
        assert events.get_final_response().output_parsed == response.output_parsed


def test_anthropics_sdk_parses_answers(claude: anthropic.Anthropic) -> None:
    format = {"type": "json_schema", "schema": CAPITAL}
    answer = claude.messages.create(
        model=MODEL_NAME, messages=CONVERSATION[1:], max_tokens=200, output_config={"format": format}
    )
    thinking, text = answer.content
    assert thinking.thinking
    jsonschema.validate(json.loads(text.text), CAPITAL)


@pytest.mark.parametrize("budget", [0, 3])
def test_a_thinking_budget_is_kept(client: httpx.Client, budget: int) -> None:
    choice = choice_of(client, thinking_token_budget=budget, return_token_ids=True, response_format=FORMAT)
    message = choice["message"]
    jsonschema.validate(json.loads(message["content"]), CAPITAL)
    free = choice_of(client)["message"]["reasoning_content"]
    thought = message.get("reasoning_content", "")
    assert free.startswith(thought)
    assert len(thought) < len(free)
    assert (budget == 0) is (thought == "")
    asked = {"messages": CONVERSATION, "response_format": FORMAT, "thinking_token_budget": budget, "stream": True}
    assert message_of(events(client.post(CHAT, json=asked | GREEDY))) == message


def test_a_large_budget_changes_nothing(client: httpx.Client) -> None:
    assert choice_of(client, thinking_token_budget=1000)["message"] == choice_of(client)["message"]
    # Where the prompt has done with thinking, there is none to bound.
    assert (
        choice_of(client, thinking_token_budget=5, **UNTHOUGHT)["message"] == choice_of(client, **UNTHOUGHT)["message"]
    )


def test_anthropics_thinking_has_a_budget(claude: anthropic.Anthropic) -> None:
    asked: dict[str, Any] = {"model": MODEL_NAME, "messages": CONVERSATION[1:], "max_tokens": 200}
    free, bounded = (
        claude.messages.create(**asked, thinking={"type": "enabled", "budget_tokens": budget}) for budget in (150, 3)
    )
    assert free.content[0].thinking.startswith(bounded.content[0].thinking)
    assert len(bounded.content[0].thinking) < len(free.content[0].thinking)
    assert [block.type for block in bounded.content] == ["thinking", "text"]


DEEP: dict[str, Any] = {}
for _ in range(150):
    DEEP = {"items": DEEP}

# Fields of both kinds of completions, the one that the error is about, and what its sentence tells.
WRONG: list[tuple[dict[str, Any], str, list[str]]] = [
    ({"response_format": {"type": "xml"}}, "response_format.type", ["'xml'"]),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", ["needs it"]),
    ({"response_format": {"type": "text", "json_schema": FORMAT["json_schema"]}}, "response_format.json_schema", []),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "c"}}},
        "response_format.json_schema.schema",
        [],
    ),
    ({"response_format": FORMAT | {"json_schema": {"name": "c", "schema": {"type": "objct"}}}}, "response_format", []),
    ({"response_format": FORMAT | {"json_schema": {"name": "c", "schema": {"$ref": "#/none"}}}}, "response_format", []),
    ({"response_format": FORMAT | {"json_schema": {"name": "c", "schema": {"not": {}}}}}, "response_format", ["not"]),
    ({"structured_outputs": {}}, "structured_outputs", ["no form"]),
    ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs", ["regex and choice"]),
    ({"structured_outputs": {"regex": "("}}, "structured_outputs", ["cannot be followed"]),
    ({"structured_outputs": {"regexp": "a"}}, "structured_outputs.regexp", []),
    ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs.structural_tag", ["not supported"]),
    ({"structured_outputs": {"choice": []}}, "structured_outputs", ["structured_outputs.choice is no list"]),
    ({"structured_outputs": {"regex": "a", "disable_any_whitespace": True}}, "structured_outputs", ["white space"]),
    ({"guided_json": "{"}, "guided_json", ["guided_json is no JSON"]),
    ({"guided_json": [1]}, "guided_json", ["guided_json"]),
    ({"guided_regex": "(?=a)"}, "guided_regex", ["guided_regex cannot be followed"]),
    ({"guided_choice": [""]}, "guided_choice", ["guided_choice is no list"]),
    ({"guided_regex": "a" * 2**19}, "guided_regex", ["guided_regex has 524288 characters"]),
    ({"guided_grammar": "start: missing"}, "guided_grammar", ["guided_grammar cannot be followed"]),
    ({"guided_choice": ["a"], "guided_whitespace_pattern": " "}, "guided_whitespace_pattern", ["none is asked for"]),
    ({"guided_json": CAPITAL, "response_format": FORMAT}, "guided_json", ["response_format and guided_json"]),
    ({"guided_json": CAPITAL, "guided_regex": "a"}, "guided_regex", ["guided_json and guided_regex"]),
    ({"guided_decoding_backend": "xgrammar"}, "guided_decoding_backend", ["other than 'auto'"]),
    ({"guided_regex": "((a{1000}){1000}){1000}"}, "guided_regex", ["cannot be followed"]),
]


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize(("fields", "param", "told"), WRONG)
def test_what_is_no_form_is_refused_by_its_field(
    client: httpx.Client, path: str, fields: dict[str, Any], param: str, told: list[str]
) -> None:
    asked = {"prompt": "Hello"} if path == COMPLETIONS else {"messages": CONVERSATION}
    found = error(client.post(path, json=asked | {"max_tokens": 5} | fields), 400)
    assert found["param"] == param
    assert [text for text in told if text not in found["message"]] == []
    asked |= {"stream": True}
    assert error(client.post(path, json=asked | {"max_tokens": 5} | fields), 400) == found


def test_a_deep_schema_is_answered_and_harms_nobody(client: httpx.Client) -> None:
    response = client.post(COMPLETIONS, json={"prompt": "Hello", "max_tokens": 5, "guided_json": DEEP})
    assert response.status_code in (200, 400)
    assert client.post(COMPLETIONS, json={"prompt": "Hello", "max_tokens": 1}).status_code == 200


def test_a_budget_that_cannot_be_is_refused(client: httpx.Client) -> None:
    for budget in (-1, 1.5, "many"):
        assert (
            "thinking_token_budget"
            in error(client.post(CHAT, json={"messages": CONVERSATION, "thinking_token_budget": budget}), 400)[
                "message"
            ]
        )
    assert error(client.post(COMPLETIONS, json={"prompt": "x", "thinking_token_budget": 5}), 400)["param"] == (
        "thinking_token_budget"
    )


@pytest.mark.parametrize(
    ("format", "param"),
    [
        ({"type": "json_schema", "name": "c"}, "text.format.schema"),
        ({"type": "json_schema", "schema": CAPITAL}, "text.format.name"),
        ({"type": "json_object", "schema": CAPITAL}, "text.format.schema"),
        ({"type": "json_schema", "name": "c", "schema": {"type": 5}}, "text.format"),
        ({"type": "grammar"}, "text.format.type"),
    ],
)
def test_responses_refuse_by_field_too(client: httpx.Client, format: dict[str, Any], param: str) -> None:
    assert error(client.post(RESPONSES, json={"input": "Hello", "text": {"format": format}}), 400)["param"] == param


def test_responses_take_any_object(client: httpx.Client) -> None:
    asked = {"input": "Hello", "text": {"format": {"type": "json_object"}}, "max_output_tokens": 60}
    response = client.post(RESPONSES, json=asked)
    assert response.status_code == 200
    assert response.json()["text"] == {"format": {"type": "json_object"}}
