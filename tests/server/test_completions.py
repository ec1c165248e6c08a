"""`/v1/completions` on a real engine."""

from collections import defaultdict
from typing import Any

import httpx
import pytest

from jaxserve import LLM, RequestOutput
from tests.server.cases import COMPLETIONS, MODEL_NAME, PROMPT, events

GREEDY = {"temperature": 0, "max_tokens": 24, "ignore_eos": True}


def complete(client: httpx.Client, prompt: Any = PROMPT, **fields: Any) -> dict[str, Any]:
    response = client.post("/v1/completions", json={"prompt": prompt} | fields)
    assert response.status_code == 200, response.text
    return response.json()


def stream(client: httpx.Client, prompt: Any = PROMPT, **fields: Any) -> list[dict[str, Any]]:
    return events(client.post("/v1/completions", json={"prompt": prompt, "stream": True} | fields))


@pytest.mark.parametrize("name", COMPLETIONS)
def test_tokens_and_text_are_those_of_the_python_api(
    client: httpx.Client, offline: dict[str, RequestOutput], name: str
) -> None:
    prompt, settings = COMPLETIONS[name]
    expected = offline[name]
    answer = complete(client, prompt, return_token_ids=True, **settings)
    assert [choice["token_ids"] for choice in answer["choices"]] == [output.token_ids for output in expected.outputs]
    assert [choice["text"] for choice in answer["choices"]] == [output.text for output in expected.outputs]
    assert [c["finish_reason"] for c in answer["choices"]] == [output.finish_reason for output in expected.outputs]
    assert answer["choices"][0]["prompt_token_ids"] == expected.prompt_token_ids
    prompt_tokens, tokens = len(expected.prompt_token_ids), sum(len(output.token_ids) for output in expected.outputs)
    assert answer["usage"] == {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": tokens,
        "total_tokens": prompt_tokens + tokens,
    }


def test_the_shape_is_that_of_openai(client: httpx.Client) -> None:
    answer = complete(client, max_tokens=2)
    assert answer.pop("id").startswith("cmpl-")
    assert isinstance(answer.pop("created"), int)
    (choice,) = answer.pop("choices")
    assert isinstance(choice.pop("text"), str)
    assert choice.pop("finish_reason") in ("stop", "length")
    assert choice == {"index": 0, "logprobs": None, "stop_reason": None}
    assert answer.pop("usage").keys() == {"prompt_tokens", "completion_tokens", "total_tokens"}
    assert answer == {"object": "text_completion", "model": MODEL_NAME}


@pytest.mark.parametrize("name", COMPLETIONS)
def test_a_stream_adds_up_to_the_whole(client: httpx.Client, name: str) -> None:
    prompt, settings = COMPLETIONS[name]
    fields = settings | {"logprobs": 2, "echo": True, "return_token_ids": True}
    whole = complete(client, [prompt, "Two"], **fields)
    *chunks, last = stream(client, [prompt, "Two"], stream_options={"include_usage": True}, **fields)
    assert (last["choices"], last["usage"]) == ([], whole["usage"])
    assert all(chunk["usage"] is None for chunk in chunks)
    assert len({chunk["id"] for chunk in chunks} | {last["id"]}) == 1
    by_index = defaultdict(list)
    for chunk in chunks:
        (choice,) = chunk["choices"]
        by_index[choice["index"]].append(choice)
    assert sorted(by_index) == [choice["index"] for choice in whole["choices"]]
    for choice in whole["choices"]:
        parts = by_index[choice["index"]]
        assert len(parts) > 1
        assert "".join(part["text"] for part in parts) == choice["text"]
        assert [token for part in parts for token in part["token_ids"]] == choice["token_ids"]
        for field, found in choice["logprobs"].items():
            assert [entry for part in parts for entry in part["logprobs"][field]] == found, field
        reasons = [part["finish_reason"] for part in parts]
        assert reasons == [None] * (len(parts) - 1) + [choice["finish_reason"]]


def test_a_stream_tells_its_usage_only_if_asked(client: httpx.Client) -> None:
    chunks = stream(client, max_tokens=2)
    assert not any("usage" in chunk for chunk in chunks)


def test_all_forms_of_a_prompt_are_the_same_prompt(client: httpx.Client) -> None:
    (choice,) = complete(client, return_token_ids=True, **GREEDY)["choices"]
    token_ids = choice["prompt_token_ids"]
    for form in ([PROMPT], token_ids, [token_ids]):
        assert [c["text"] for c in complete(client, form, **GREEDY)["choices"]] == [choice["text"]]


def test_choices_are_numbered_by_prompt_and_then_by_completion(client: httpx.Client) -> None:
    settings = {"temperature": 1.5, "seed": 3, "max_tokens": 8, "ignore_eos": True}
    prompts = [PROMPT, "Two", "Three"]
    together = complete(client, prompts, n=2, **settings)
    assert [choice["index"] for choice in together["choices"]] == [0, 1, 2, 3, 4, 5]
    alone = [complete(client, prompt, n=2, **settings) for prompt in prompts]
    texts = [choice["text"] for answer in alone for choice in answer["choices"]]
    assert len(set(texts)) == 6
    assert [choice["text"] for choice in together["choices"]] == texts
    assert together["usage"]["prompt_tokens"] == sum(answer["usage"]["prompt_tokens"] for answer in alone)


def test_16_tokens_unless_told(client: httpx.Client) -> None:
    answer = complete(client, ignore_eos=True)
    assert answer["usage"]["completion_tokens"] == 16
    assert answer["choices"][0]["finish_reason"] == "length"


def test_the_model_recommends_to_sample_greedily_unless_told(client: httpx.Client) -> None:
    fields = {"max_tokens": 12, "ignore_eos": True}
    greedy = complete(client, temperature=0, **fields)["choices"]
    assert complete(client, **fields)["choices"] == greedy
    assert complete(client, temperature=5, seed=1, **fields)["choices"] != greedy


@pytest.mark.parametrize("streams", [False, True])
def test_a_stop_string_ends_the_text_before_it(client: httpx.Client, streams: bool) -> None:
    whole = complete(client, **GREEDY)["choices"][0]["text"]
    stop = whole[len(whole) // 2 :][:5]
    at = whole.index(stop)
    for include, expected in ((False, whole[:at]), (True, whole[:at] + stop)):
        fields = GREEDY | {"stop": ["never in it", stop], "include_stop_str_in_output": include}
        if streams:
            choices = [chunk["choices"][0] for chunk in stream(client, **fields)]
        else:
            choices = complete(client, **fields)["choices"]
        assert "".join(choice["text"] for choice in choices) == expected
        assert (choices[-1]["finish_reason"], choices[-1]["stop_reason"]) == ("stop", stop)


def test_a_stop_token_ends_the_completion(client: httpx.Client) -> None:
    token_ids = complete(client, return_token_ids=True, **GREEDY)["choices"][0]["token_ids"]
    stop = token_ids[5]
    (choice,) = complete(client, return_token_ids=True, stop_token_ids=[stop], **GREEDY)["choices"]
    assert choice["token_ids"] == token_ids[: token_ids.index(stop) + 1]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)


def test_logprobs_tell_of_each_token(client: httpx.Client) -> None:
    (choice,) = complete(client, "One", logprobs=3, **GREEDY)["choices"]
    logprobs = choice["logprobs"]
    assert {name: len(entries) for name, entries in logprobs.items()} == dict.fromkeys(logprobs, 24)
    assert logprobs.keys() == {"tokens", "token_logprobs", "top_logprobs", "text_offset"}
    assert logprobs["text_offset"][0] == 0
    for token, own, top, offset in zip(*(logprobs[name] for name in logprobs), strict=True):
        assert own == max(top.values()) == top[token]  # it is greedy
        assert own < 0
        assert 2 <= len(top) <= 3  # tokens that are parts of characters may look the same
        if "\N{REPLACEMENT CHARACTER}" not in choice["text"] and not token.startswith("<|"):
            assert choice["text"][offset:].startswith(token)


def test_logprobs_of_0_are_those_of_the_tokens_alone(client: httpx.Client) -> None:
    (choice,) = complete(client, logprobs=0, temperature=2, seed=1, max_tokens=8)["choices"]
    logprobs = choice["logprobs"]
    alone = [{token: own} for token, own in zip(logprobs["tokens"], logprobs["token_logprobs"], strict=True)]
    assert logprobs["top_logprobs"] == alone


def test_an_echoed_prompt_has_the_logprobs_that_it_had_as_a_completion(client: httpx.Client) -> None:
    (generated,) = complete(client, logprobs=2, return_token_ids=True, **GREEDY)["choices"]
    token_ids = generated["prompt_token_ids"] + generated["token_ids"]
    (echoed,) = complete(client, token_ids, logprobs=2, echo=True, max_tokens=1, temperature=0)["choices"]
    assert echoed["text"].startswith(PROMPT)
    logprobs = echoed["logprobs"]
    assert (logprobs["token_logprobs"][0], logprobs["top_logprobs"][0]) == (None, None)
    assert all(len(entries) == len(token_ids) + 1 for entries in logprobs.values())
    assert logprobs["tokens"][-25:-1] == generated["logprobs"]["tokens"]
    assert logprobs["token_logprobs"][-25:-1] == pytest.approx(generated["logprobs"]["token_logprobs"], abs=0.05)
    offsets = logprobs["text_offset"]
    assert offsets[:2] == [0, len(logprobs["tokens"][0])]
    assert offsets == sorted(offsets)


def test_an_echo_needs_no_logprobs(client: httpx.Client) -> None:
    plain = complete(client, ["One", "Two"], n=2, **GREEDY)["choices"]
    echoed = complete(client, ["One", "Two"], n=2, echo=True, **GREEDY)["choices"]
    prompts = ["One", "One", "Two", "Two"]
    assert [c["text"] for c in echoed] == [p + c["text"] for p, c in zip(prompts, plain, strict=True)]
    assert all(choice["logprobs"] is None for choice in echoed)


def test_prompt_logprobs_are_by_token_id(client: httpx.Client) -> None:
    (choice,) = complete(client, prompt_logprobs=2, return_token_ids=True, max_tokens=1)["choices"]
    token_ids, positions = choice["prompt_token_ids"], choice["prompt_logprobs"]
    assert positions[0] is None
    assert len(positions) == len(token_ids)
    for token, position in zip(token_ids[1:], positions[1:], strict=True):
        own = position[str(token)]
        assert own.keys() == {"logprob", "rank", "decoded_token"}
        assert len(position) == (2 if own["rank"] <= 2 else 3)
        assert sorted(found["rank"] for found in position.values())[:2] == [1, 2]


def test_logit_bias_pushes_a_token(client: httpx.Client) -> None:
    (choice,) = complete(client, logit_bias={"70": 100}, return_token_ids=True, **GREEDY)["choices"]
    assert choice["token_ids"] == [70] * 24


@pytest.mark.parametrize("streams", [False, True])
def test_an_echo_of_0_tokens_is_the_prompt_alone(client: httpx.Client, streams: bool) -> None:
    fields = {"echo": True, "max_tokens": 0, "logprobs": 1, "temperature": 0}
    both = complete(client, PROMPT, **fields | {"max_tokens": 1})["choices"][0]["logprobs"]
    if streams:
        (choice,) = [chunk["choices"][0] for chunk in stream(client, PROMPT, **fields)]
    else:
        (choice,) = complete(client, PROMPT, **fields)["choices"]
    assert (choice["text"], choice["finish_reason"]) == (PROMPT, "length")
    assert choice["logprobs"] == {name: entries[:-1] for name, entries in both.items()}


@pytest.mark.parametrize("n", [1, 2])
def test_an_echo_of_0_tokens_uses_none(client: httpx.Client, n: int) -> None:
    fields = {"echo": True, "max_tokens": 0, "n": n}
    usage = complete(client, PROMPT, **fields)["usage"]
    assert (usage["completion_tokens"], usage["total_tokens"]) == (0, usage["prompt_tokens"])
    wanted = {"include_usage": True, "continuous_usage_stats": True}
    chunks = stream(client, PROMPT, **fields, stream_options=wanted)
    assert len(chunks) == n + 1
    assert [chunk["usage"] for chunk in chunks] == [usage] * (n + 1)


def test_a_token_is_named_by_its_id_if_asked(client: httpx.Client) -> None:
    fields = GREEDY | {"logprobs": 2, "echo": True, "return_token_ids": True}
    (by_text,) = complete(client, **fields)["choices"]
    (by_id,) = complete(client, return_tokens_as_token_ids=True, **fields)["choices"]
    ids = by_id["prompt_token_ids"] + by_id["token_ids"]
    assert by_id["logprobs"]["tokens"] == [f"token_id:{token}" for token in ids]
    assert by_id["logprobs"]["top_logprobs"][-1].keys() >= {f"token_id:{ids[-1]}"}
    assert by_id["text"] == by_text["text"]
    for field in ("token_logprobs", "text_offset"):
        assert by_id["logprobs"][field] == by_text["logprobs"][field]


def test_only_allowed_tokens_come(client: httpx.Client) -> None:
    allowed = [70, 71, 300]
    for fields in (GREEDY, {"temperature": 5, "seed": 1, "max_tokens": 24}, GREEDY | {"frequency_penalty": 2}):
        (choice,) = complete(client, allowed_token_ids=allowed, return_token_ids=True, **fields)["choices"]
        assert set(choice["token_ids"]) <= set(allowed)
    (choice,) = complete(client, allowed_token_ids=allowed, logit_bias={"300": 100, "5": 100}, **GREEDY)["choices"]
    assert set(choice["text"]) == set(complete(client, logit_bias={"300": 100}, **GREEDY)["choices"][0]["text"])


@pytest.mark.parametrize("as_ids", [False, True])
def test_a_truncated_prompt_is_its_end(client: httpx.Client, as_ids: bool) -> None:
    (whole,) = complete(client, return_token_ids=True, **GREEDY)["choices"]
    token_ids = whole["prompt_token_ids"]
    prompt = token_ids if as_ids else PROMPT
    (cut,) = complete(client, prompt, truncate_prompt_tokens=5, echo=True, return_token_ids=True, **GREEDY)["choices"]
    assert cut["prompt_token_ids"] == token_ids[-5:]
    (same,) = complete(client, token_ids[-5:], echo=True, **GREEDY)["choices"]
    assert cut["text"] == same["text"]
    (untouched,) = complete(client, prompt, truncate_prompt_tokens=len(token_ids), **GREEDY)["choices"]
    assert untouched["text"] == whole["text"]


def test_a_prompt_can_be_truncated_to_what_leaves_room(client: httpx.Client) -> None:
    prompt = [*range(5, 605)]  # max_model_len is 512
    fields = {"truncate_prompt_tokens": -1, "max_tokens": 12, "ignore_eos": True, "return_token_ids": True}
    answer = complete(client, prompt, **fields)
    assert answer["choices"][0]["prompt_token_ids"] == prompt[-500:]
    assert answer["usage"]["completion_tokens"] == 12


def test_special_tokens_go_before_a_prompt_unless_told(
    client: httpx.Client, llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenize = llm.engine.inputs.tokenize
    given: list[bool] = []

    def note(text: str, *, add_special_tokens: bool = True, **others: Any) -> list[int]:
        given.append(add_special_tokens)
        return tokenize(text, add_special_tokens=add_special_tokens, **others)

    monkeypatch.setattr(llm.engine.inputs, "tokenize", note)
    for fields in ({}, {"add_special_tokens": True}, {"add_special_tokens": False}):
        complete(client, max_tokens=1, **fields)
    assert given == [True, True, False]


def test_the_id_is_the_clients_if_it_brings_one(client: httpx.Client) -> None:
    assert complete(client, max_tokens=1, request_id="mine-7")["id"] == "cmpl-mine-7"
    assert {chunk["id"] for chunk in stream(client, max_tokens=3, request_id="mine-7")} == {"cmpl-mine-7"}


def test_usage_goes_with_every_chunk_if_asked(client: httpx.Client) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, last = stream(client, max_tokens=9, ignore_eos=True, return_token_ids=True, stream_options=options)
    so_far = 0
    for chunk in chunks:
        so_far += len(chunk["choices"][0]["token_ids"])
        assert chunk["usage"]["completion_tokens"] == so_far
        assert chunk["usage"]["total_tokens"] == last["usage"]["prompt_tokens"] + so_far
    assert chunks[-1]["usage"] == last["usage"]
    assert last["choices"] == []


def test_prefixes_are_shared_within_a_salt_only(client: httpx.Client) -> None:
    prompt = [*range(100, 164)]  # four full pages

    def hits(**fields: Any) -> int:
        before = client.get("/stats").json()["total_prefix_cache_hits"]
        complete(client, prompt, max_tokens=1, **fields)
        return client.get("/stats").json()["total_prefix_cache_hits"] - before

    assert [hits(cache_salt="a"), hits(cache_salt="b"), hits()] == [0, 0, 0]
    assert [hits(cache_salt="a"), hits(cache_salt="b"), hits()] == [48, 48, 48]
