"""Embeddings and scores by the demo model, against the model's own forward pass and its log-probabilities."""

import numpy as np
import pytest

from jaxserve import LLM, InputError, SamplingParams
from jaxserve.config import DEMO_MODEL
from tests.models import dense

SETTINGS = {"max_num_seqs": 4, "max_num_batched_tokens": 32, "max_model_len": 256, "page_size": 16, "dtype": "float32"}
TEXTS = [
    "The capital of France is Paris.",
    "27 + 45 = 72",
    "A farmer carries an old lamp over the bridge, and a quiet doctor watches him on a rainy day in the old town. " * 2,
]


@pytest.fixture(scope="module")
def llm():
    with LLM(**SETTINGS, progress=False) as llm:
        yield llm


@pytest.fixture(scope="module")
def hidden(llm) -> list[np.ndarray]:
    """The last hidden states of each text, float32 `[tokens, hidden]`, without pages."""
    model = dense.load(DEMO_MODEL, served=256)
    return [dense.hidden_states(model, llm.get_tokenizer().encode(text)) for text in TEXTS]


def test_embeddings_are_the_hidden_states_mean_or_last_over_all_chunks(llm, hidden):
    assert len(llm.get_tokenizer().encode(TEXTS[2])) > SETTINGS["max_num_batched_tokens"]  # takes several steps
    for pooling, pool in (("mean", lambda states: states.mean(axis=0)), ("last", lambda states: states[-1])):
        found = llm.embed(TEXTS, pooling=pooling, normalize=False)
        for embedding, states in zip(found, hidden, strict=True):
            np.testing.assert_allclose(embedding, pool(states), rtol=2e-4, atol=2e-4)
        for embedding, whole in zip(llm.embed(TEXTS, pooling=pooling), found, strict=True):
            assert np.linalg.norm(embedding) == pytest.approx(1)
            np.testing.assert_allclose(np.array(embedding) * np.linalg.norm(whole), whole, rtol=1e-5, atol=1e-6)


def test_an_embedding_is_the_same_beside_others_and_with_its_prefix_cached(llm):
    alone = [llm.embed(text, pooling="last")[0] for text in TEXTS]
    together = llm.embed([*TEXTS, *TEXTS], pooling="last")
    np.testing.assert_allclose(together, [*alone, *alone], rtol=1e-4, atol=1e-5)
    assert llm.engine.pool.num_available == llm.engine.pool.num_pages


def test_embeddings_run_beside_completions(llm):
    prompt = llm.render_chat([{"role": "user", "content": "What is 27+45?"}])
    greedy = SamplingParams(temperature=0, max_tokens=60)
    alone, embedding = llm.generate(prompt, greedy)[0], llm.embed(TEXTS[0])[0]
    beside = llm.generate([prompt, TEXTS[0]], [greedy, SamplingParams(max_tokens=1, pooling="mean")])
    assert beside[0].outputs[0].token_ids == alone.outputs[0].token_ids
    assert beside[1].outputs == []
    np.testing.assert_allclose(
        np.array(beside[1].embedding) / np.linalg.norm(beside[1].embedding), embedding, rtol=1e-4
    )


def test_a_score_is_the_sum_of_the_continuations_log_probabilities(llm):
    (score,) = llm.score("The capital of France", " is Paris.")
    tokenizer = llm.get_tokenizer()
    whole, start = tokenizer.encode("The capital of France is Paris."), len(tokenizer.encode("The capital of France"))
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=3)
    positions = llm.generate({"prompt_token_ids": whole}, params)[0].prompt_logprobs
    expected = [positions[place][whole[place]].logprob for place in range(start, len(whole))]
    assert score.token_ids == whole[start:]
    np.testing.assert_allclose(score.logprobs, expected, rtol=1e-4, atol=1e-5)
    assert score.score == pytest.approx(sum(expected), rel=1e-4)


def test_what_the_model_would_say_is_greedy_and_scores_higher_than_what_it_would_not(llm):
    prompt = llm.get_tokenizer().decode(
        llm.render_chat([{"role": "user", "content": "What is the capital of France?"}], enable_thinking=False)[
            "prompt_token_ids"
        ],
        skip_special_tokens=False,
    )
    right, wrong = llm.score(prompt, ["The capital of France is Paris.", "The capital of France is Cairo."])
    assert right.is_greedy
    assert not wrong.is_greedy
    assert right.score > wrong.score


@pytest.mark.parametrize(
    ("prompts", "continuations", "said"),
    [
        (["a", "b"], ["c", "d", "e"], "prompts has 2 texts for 3 of continuations; give one for each"),
        ("", "a", "prompts holds ''; give texts of more"),
        ("a", "", "continuations holds ''; give non-empty texts"),
    ],
)
def test_what_cannot_be_scored_is_refused(llm, prompts, continuations, said):
    with pytest.raises(InputError, match=said) as caught:
        llm.score(prompts, continuations)
    assert caught.value.field == said.split()[0]


def test_an_unknown_pooling_is_refused(llm):
    with pytest.raises(InputError, match="pooling is 'first'; give one of mean, last"):
        llm.embed("Hello", pooling="first")
