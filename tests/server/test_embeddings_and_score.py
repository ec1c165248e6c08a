"""`/v1/embeddings` and `/score` over a real port, equal to the Python API's."""

import httpx
import numpy as np
import openai
import pytest

from jaxserve.engine.scoring import Score
from tests.server.cases import EMBEDDED, MODEL_NAME, SCORED


def test_embeddings_through_the_openai_sdk_are_those_of_python(server: str, embeddings) -> None:
    sdk = openai.OpenAI(base_url=f"{server}/v1", api_key="none")
    for encoding in ({}, {"encoding_format": "float"}):  # by itself the SDK asks for base64, and decodes it
        answer = sdk.embeddings.create(model=MODEL_NAME, input=EMBEDDED, **encoding)
        assert [entry.index for entry in answer.data] == [0, 1, 2]
        found = [entry.embedding for entry in answer.data]
        np.testing.assert_allclose(found, embeddings["mean"], rtol=1e-2, atol=1e-3)
    assert answer.usage.prompt_tokens == answer.usage.total_tokens > 3


def test_pooling_and_normalisation_act(client: httpx.Client, embeddings) -> None:
    def embed(**fields) -> np.ndarray:
        answer = client.post("/v1/embeddings", json={"input": EMBEDDED[0], **fields})
        return np.array(answer.json()["data"][0]["embedding"])

    np.testing.assert_allclose(embed(pooling="last"), embeddings["last"][0], rtol=1e-2, atol=1e-3)
    whole = embed(normalize=False)
    assert np.linalg.norm(whole) > 1.1
    np.testing.assert_allclose(whole / np.linalg.norm(whole), embeddings["mean"][0], rtol=1e-2, atol=1e-3)


def test_token_ids_are_embedded_as_their_text_is(client: httpx.Client) -> None:
    ids = client.post("/tokenize", json={"prompt": EMBEDDED[0]}).json()["tokens"]
    both = client.post("/v1/embeddings", json={"input": [EMBEDDED[0], EMBEDDED[0]]}).json()["data"]
    alone = client.post("/v1/embeddings", json={"input": ids}).json()["data"]
    np.testing.assert_allclose(alone[0]["embedding"], both[0]["embedding"], rtol=1e-2, atol=1e-3)


def test_scores_are_those_of_python(client: httpx.Client, scores: list[Score]) -> None:
    answer = client.post("/score", json={"model": MODEL_NAME, "text_1": SCORED[0], "text_2": SCORED[1]}).json()
    found = answer["data"]
    assert [entry["index"] for entry in found] == [0, 1]
    for entry, expected in zip(found, scores, strict=True):
        assert entry["score"] == pytest.approx(expected.score, rel=1e-2)
        np.testing.assert_allclose(entry["token_logprobs"], expected.logprobs, rtol=2e-2, atol=2e-2)
        assert entry["score"] == pytest.approx(sum(entry["token_logprobs"]))
    assert answer["usage"]["prompt_tokens"] > 10


@pytest.mark.parametrize(
    ("path", "body", "param", "said"),
    [
        ("/v1/embeddings", {"input": []}, "input", "input is none of a string"),
        ("/v1/embeddings", {"input": "a", "dimensions": 3}, "dimensions", "dimensions is not supported"),
        ("/v1/embeddings", {"input": "a", "pooling": "cls"}, "pooling", "pooling is 'cls'"),
        ("/v1/embeddings", {"input": [9999]}, "input", "input holds 9999"),
        ("/v1/embeddings", {"input": ""}, "input", "the prompt is empty"),
        ("/score", {"text_1": ["a", "b"], "text_2": ["c"] * 3}, "text_1", "text_1 has 2 texts for 3 of text_2"),
        ("/score", {"text_1": " ", "text_2": "a"}, "text_1", "text_1 holds ' '"),
        ("/score", {"text_1": "a", "text_2": ""}, "text_2", "text_2 holds ''"),
        ("/score", {"text_1": "a", "text_2": " b" * 600}, "text_1", "text_1 with its text_2 has "),
        ("/score", {"text_1": "a"}, "text_2", "text_2 is missing"),
    ],
)
def test_what_cannot_be_answered_is_refused(client: httpx.Client, path: str, body: dict, param, said: str) -> None:
    answer = client.post(path, json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith(said)
    assert answer.json()["error"]["param"] == param
