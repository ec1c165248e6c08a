"""Weights that a trainer hands to a running engine: shared, never mixed within a request, nothing compiled."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxserve import LLM, InputError, SamplingParams
from jaxserve.checkpoint.huggingface import abstract_model
from jaxserve.outputs import add_delta
from jaxserve.runner.compilation import compilations
from tests.conftest import SMALL
from tests.models import dense
from tests.models.cases import prompts, write_checkpoint

CASE = "qwen3-tied-group-8-head-64"
PROMPTS = [{"prompt_token_ids": tokens} for tokens in prompts(CASE)]
GREEDY = SamplingParams(temperature=0, max_tokens=12)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    model = write_checkpoint(CASE, tmp_path_factory.mktemp("model"))
    with LLM(str(model), dtype="float32", skip_tokenizer_init=True, progress=False, **SMALL) as llm:
        yield llm


@pytest.fixture
def versions(llm: LLM) -> tuple[nnx.State, nnx.State]:
    """The weights that are served, and others that give other tokens."""
    old = llm.state
    other = jax.tree.map(lambda array: jnp.flip(array, axis=-1), old)
    jax.block_until_ready(other)
    return old, other


def tokens(llm: LLM) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, GREEDY)]


def assert_greedy(llm: LLM, state: nnx.State, prompt: list[int], completion: list[int]) -> None:
    """By one pass of the plain model over all of it."""
    graph, _ = abstract_model(llm.engine.model_config, jnp.dtype(jnp.float32))
    logits = dense.logits((graph, state), prompt + completion[:-1])
    assert logits[len(prompt) - 1 :].argmax(axis=-1).tolist() == completion


def test_each_update_is_what_is_served_next(llm: LLM, versions: tuple[nnx.State, nnx.State]) -> None:
    old, new = versions
    first = tokens(llm)
    compiled = compilations.count
    llm.update_weights(new)
    second = tokens(llm)  # the same prompts: nothing of them may come from the prefix cache
    llm.update_weights(old)
    assert tokens(llm) == first
    assert compilations.count == compiled
    assert all(a != b for a, b in zip(first, second, strict=True))
    for state, found in ((old, first), (new, second)):
        assert_greedy(llm, state, PROMPTS[-1]["prompt_token_ids"], found[-1])


def test_arrays_in_their_place_are_shared(llm: LLM, versions: tuple[nnx.State, nnx.State]) -> None:
    old, new = versions
    trained = nnx.merge(abstract_model(llm.engine.model_config, jnp.dtype(jnp.float32))[0], new)
    llm.update_weights(nnx.state(trained))
    assert all(a is b for a, b in zip(jax.tree.leaves(llm.state), jax.tree.leaves(new), strict=True))
    llm.update_weights(old)


def test_a_request_gets_the_tokens_of_one_version(llm: LLM, versions: tuple[nnx.State, nnx.State]) -> None:
    old, new = versions
    first = tokens(llm)
    llm.update_weights(new)
    second = tokens(llm)
    llm.update_weights(old)

    engine, outputs = llm.engine, {}

    def step() -> None:
        for delta in engine.step():
            add_delta(outputs, delta)

    params = SamplingParams(temperature=0, max_tokens=12, n=2)  # six sequences for four places: some wait
    for number, prompt in enumerate(PROMPTS):
        engine.add(engine.inputs.check(prompt, params), params, request_id=f"before {number}")
    for _ in range(3):
        step()
    assert engine.scheduler.num_waiting
    engine.update_weights(new)
    for number, prompt in enumerate(PROMPTS):
        engine.add(engine.inputs.check(prompt, params), params, request_id=f"after {number}", priority=-1)
    engine.add(engine.inputs.check(PROMPTS[0], params), params, request_id="unwanted")
    engine.abort("unwanted")
    assert engine.waits_for_new_weights
    while engine.has_unfinished:
        step()
    assert not engine.waits_for_new_weights
    for when, expected in (("before", first), ("after", second)):
        for number, wanted in enumerate(expected):
            assert [done.token_ids for done in outputs[f"{when} {number}"].outputs] == [wanted] * 2
    assert engine.pool.num_held == 0
    llm.update_weights(old)


def test_a_stream_goes_on_after_the_update_as_it_began(llm: LLM, versions: tuple[nnx.State, nnx.State]) -> None:
    old, new = versions
    first = tokens(llm)[0]
    stream = llm.stream(PROMPTS[0], GREEDY)
    begun = next(stream).outputs[0].token_ids
    llm.update_weights(new)  # waits for it
    assert begun + [token for delta in stream for token in delta.outputs[0].token_ids] == first
    llm.update_weights(old)


def test_other_dtypes_are_cast_and_other_places_left(llm: LLM, versions: tuple[nnx.State, nnx.State]) -> None:
    old, _ = versions
    first = tokens(llm)
    elsewhere = jax.tree.map(lambda array: jax.device_put(np.asarray(array), jax.devices()[1]), old)
    llm.update_weights(elsewhere)
    assert tokens(llm) == first
    rounded = jax.tree.map(lambda array: array.astype(jnp.bfloat16), old)
    llm.update_weights(rounded)
    assert {array.dtype.name for array in jax.tree.leaves(llm.state)} == {"float32"}
    again = jax.tree.map(lambda array: array.astype(jnp.float32), rounded)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), llm.state, again))
    llm.update_weights(old)


def test_a_mesh_that_repeats_kv_heads_takes_them_once(
    llm: LLM, versions: tuple[nnx.State, nnx.State], tiny_llm: Callable[..., LLM]
) -> None:
    _, new = versions
    split = tiny_llm(tensor_parallel_size=4)
    served = split.state
    expected = tokens(split)
    split.update_weights(llm.state)  # of one device, where two KV heads are not repeated
    assert tokens(split) == expected
    split.update_weights(new)
    assert tokens(split) != expected
    split.update_weights(served)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda flat: flat[1:], "no parameter"),
        (lambda flat: [*flat, (("head", "weight"), flat[0][1])], "'head.weight'"),
        (lambda flat: [(flat[0][0], flat[0][1].replace(jnp.zeros(3))), *flat[1:]], "shape [3]"),
    ],
)
def test_weights_of_another_model_are_refused_and_change_nothing(change: Callable, said: str, llm: LLM) -> None:
    first, state = tokens(llm), llm.state
    with pytest.raises(InputError) as refused:
        llm.update_weights(nnx.from_flat_state(change(list(nnx.to_flat_state(state)))))
    assert said in str(refused.value)
    assert tokens(llm) == first


@pytest.mark.parametrize("given", [None, {}, []])
def test_what_is_no_state_is_refused(given: Any, llm: LLM) -> None:
    with pytest.raises(InputError, match="Flax state"):
        llm.update_weights(given)
