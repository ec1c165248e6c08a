"""LoRA adapters: each request gets the tokens of the model into which its own is merged, whatever runs beside it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from jaxserve import LLM, InputError, SamplingParams
from jaxserve.runner.compilation import compilations
from pallas_kernels.xla.matmul import unpacked
from tests.adapter_files import ATTENTION, CONFIG, MLP, WEIGHTS, change_adapter, merged, write_adapter
from tests.conftest import SMALL
from tests.models import dense
from tests.models.cases import prompts, write_checkpoint
from tests.models.references import ADAPTED, ADAPTER, STORED_POSITIONS

CASE = "qwen3-tied-group-8-head-64"
PROMPTS = [{"prompt_token_ids": tokens} for tokens in prompts(CASE)]
GREEDY = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
SETTINGS: dict[str, Any] = SMALL | {"dtype": "float32", "skip_tokenizer_init": True, "progress": False}

Model = tuple[nnx.GraphDef, nnx.State]


def completions(llm: LLM, adapter: Any = None, prompts: list = PROMPTS, params: SamplingParams = GREEDY) -> list:
    return [output.outputs[0].token_ids for output in llm.generate(prompts, params, adapter=adapter)]


def greedy(model: Model, prompt: list[int], completion: list[int]) -> list[int]:
    """What a plain model would have taken at each place of `completion`."""
    return dense.logits(model, prompt + completion[:-1])[len(prompt) - 1 :].argmax(axis=-1).tolist()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    base = write_checkpoint(CASE, root / "base")
    return {
        "base": base,
        "all": write_adapter(root / "all", base, r=5, lora_alpha=10),
        "few": write_adapter(root / "few", base, ("layers.1.self_attn.v_proj", "mlp.up_proj"), r=3, seed=1),
    }


@pytest.fixture(scope="module")
def models(files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str | None, Model]:
    """Plain models, of the base and with each adapter merged."""
    root = tmp_path_factory.mktemp("merged")
    return {
        None: dense.load(files["base"]),
        "all": dense.load(merged(files["base"], files["all"], root / "all", scaling=2)),
        "few": dense.load(merged(files["base"], files["few"], root / "few", scaling=8 / 3)),
    }


def started(files: dict[str, Path], **settings: Any) -> LLM:
    return LLM(str(files["base"]), lora_modules={name: files[name] for name in ("all", "few")}, **SETTINGS | settings)


@pytest.fixture(scope="module")
def llm(files: dict[str, Path]) -> Iterator[LLM]:
    with started(files) as llm:
        yield llm


@pytest.mark.parametrize("devices", [1, 2, 8])  # of two KV heads, which eight devices hold several times
def test_requests_of_several_adapters_in_one_batch_get_their_own_tokens(
    files: dict[str, Path], models: dict[str | None, Model], devices: int
) -> None:
    asked = [PROMPTS[0], PROMPTS[1], PROMPTS[1], PROMPTS[2]]
    adapters = ["few", None, "all", "all"]
    with started(files, tensor_parallel_size=devices) as llm:
        compiled = compilations.count
        found = completions(llm, adapters, asked)
        assert compilations.count == compiled
    for prompt, adapter, completion in zip(asked, adapters, found, strict=True):
        assert greedy(models[adapter], prompt["prompt_token_ids"], completion) == completion
    assert found[1] != found[2]  # the same prompt: the adapter makes the difference


def test_cached_pages_are_of_one_adapter_alone(llm: LLM, models: dict[str | None, Model]) -> None:
    prompt = {"prompt_token_ids": [*range(1, 50)]}  # some full pages
    for _ in range(2):
        for adapter in (None, "all", "few"):
            (output,) = llm.generate(prompt, GREEDY, adapter=adapter)
            completion = output.outputs[0].token_ids
            assert greedy(models[adapter], prompt["prompt_token_ids"], completion) == completion
    assert output.metrics.num_cached_tokens == 48  # the second time its own


def test_tokens_do_not_depend_on_neighbours_preemption_or_chunks(files: dict[str, Path], llm: LLM) -> None:
    """Token for token: greedy and seeded."""
    adapters = ["few", None, "all", "few"]
    cramped = {"num_pages": 9, "max_num_batched_tokens": 16, "enable_prefix_caching": False}
    with started(files, **cramped) as other:
        for temperature in (0, 1):
            params = SamplingParams(temperature=temperature, seed=7, max_tokens=60, ignore_eos=True)
            together = completions(other, adapters, [PROMPTS[1]] * 4, params)
            assert together == [completions(llm, adapter, [PROMPTS[1]], params)[0] for adapter in adapters]
        assert other.engine.stats().total_preemptions


def test_embeddings_scores_and_streams_are_the_adapters_too(llm: LLM, models: dict[str | None, Model]) -> None:
    (tokens,) = (prompt["prompt_token_ids"] for prompt in PROMPTS[1:2])
    for adapter, model in models.items():
        (found,) = llm.embed({"prompt_token_ids": tokens}, adapter=adapter)
        mean = dense.hidden_states(model, tokens).mean(axis=0)
        np.testing.assert_allclose(found, mean / np.linalg.norm(mean), atol=1e-4)
        deltas = llm.stream(PROMPTS[1], GREEDY, adapter=adapter)
        streamed = [token for delta in deltas for token in delta.outputs[0].token_ids]
        assert streamed == completions(llm, adapter, [PROMPTS[1]])[0]


def test_new_weights_are_served_below_the_same_adapters(llm: LLM, files: dict[str, Path]) -> None:
    before = completions(llm, "all")
    old = llm.state
    llm.update_weights(jax.tree.map(lambda array: array[..., ::-1], old))
    assert completions(llm, "all") != before
    llm.update_weights(old)
    assert completions(llm, "all") == before


@pytest.mark.parametrize("devices", [1, 8])
def test_adapters_come_and_go_while_the_engine_runs(
    files: dict[str, Path], models: dict[str | None, Model], devices: int
) -> None:
    settings = SETTINGS | {"max_loras": 2, "max_lora_rank": 8, "tensor_parallel_size": devices}
    with LLM(str(files["base"]), **settings) as llm:
        compiled = compilations.count
        prompt = {"prompt_token_ids": [*range(1, 50)]}

        found: list[tuple[str | None, list[int]]] = []

        def ask(name: str | None, model: str | None) -> None:
            found.append((model, completions(llm, name, [prompt])[0]))

        ask(None, None)
        llm.load_adapter("first", files["all"])
        llm.load_adapter("second", files["few"])
        ask("first", "all")
        ask("second", "few")
        llm.unload_adapter("first")
        with pytest.raises(InputError, match="adapter is 'first', and there are second; name one of them"):
            completions(llm, "first")
        ask("second", "few")
        llm.load_adapter("first", files["few"])  # no page of the other one with its name is found again
        ask("first", "few")
        ask(None, None)
        assert compilations.count == compiled
    for model, completion in found:
        assert greedy(models[model], prompt["prompt_token_ids"], completion) == completion


def test_requests_end_with_the_adapter_that_they_began_with(files: dict[str, Path], models: dict) -> None:
    with LLM(str(files["base"]), lora_modules={"all": files["all"]}, max_loras=2, **SETTINGS) as llm:
        stream = llm.stream(PROMPTS[1], GREEDY, adapter="all")
        completion = [token for output in next(stream).outputs for token in output.token_ids]
        llm.unload_adapter("all")
        llm.load_adapter("few", files["few"])
        with pytest.raises(
            InputError, match=r"all places for adapters are taken, 2 of them, 1 of them by requests whose"
        ):
            llm.load_adapter("third", files["few"])
        beside = completions(llm, "few", [PROMPTS[1]])[0]
        completion += [token for delta in stream for output in delta.outputs for token in output.token_ids]
        llm.load_adapter("third", files["few"])
        assert completions(llm, "third", [PROMPTS[1]])[0] == beside
    tokens = PROMPTS[1]["prompt_token_ids"]
    assert greedy(models["all"], tokens, completion) == completion
    assert greedy(models["few"], tokens, beside) == beside


def test_an_adapter_that_cannot_come_leaves_the_others_as_they_are(
    files: dict[str, Path], llm: LLM, tmp_path: Path
) -> None:
    settings = SETTINGS | {"lora_modules": {"few": files["few"]}, "max_loras": 2, "max_lora_rank": 4}
    with LLM(str(files["base"]), **settings) as other:
        before = completions(other, "few")
        for name, path, told in (
            ("few", files["few"], "there is an adapter 'few' already; unload it first"),
            ("all", files["all"], "the adapter 'all' has rank 5 and there is memory for 4; raise max_lora_rank"),
            ("none", tmp_path / "none", "there is no directory"),
        ):
            with pytest.raises(InputError, match=told):
                other.load_adapter(name, path)
        with pytest.raises(InputError, match="there is no adapter 'all' to unload"):
            other.unload_adapter("all")
        assert completions(other, "few") == before
    with pytest.raises(InputError, match="all places for adapters are taken, 2 of them; unload one"):
        llm.load_adapter("third", files["few"])


def test_layers_that_there_is_no_memory_for_are_told_from_those_of_another_model(files: dict[str, Path]) -> None:
    with LLM(str(files["base"]), lora_modules={"few": files["few"]}, max_lora_rank=8, **SETTINGS) as llm:
        llm.unload_adapter("few")
        told = r"the adapter 'all' adds to 'model\.layers.* and there is memory for layers of the lora_modules alone"
        with pytest.raises(InputError, match=told):
            llm.load_adapter("all", files["all"])
        llm.load_adapter("few", files["few"])


def test_an_engine_without_places_says_so(files: dict[str, Path], tiny_llm: Any) -> None:
    with pytest.raises(InputError, match="this engine has no place for adapters; start it with max_loras"):
        tiny_llm().load_adapter("few", files["few"])
    with pytest.raises(InputError, match="max_loras is 1 and lora_modules gives 2"):
        started(files, max_loras=1)


# On so many devices. Phi-3 has queries, keys and values fused in one module, and gate and up in another.
FAMILIES = {
    "phi-4-partial-long-rope": (2, ("qkv_proj", "gate_up_proj", "o_proj", "down_proj")),
    "gemma-2": (1, ATTENTION + MLP),
    "qwen2.5-tied": (1, ATTENTION + MLP),
    "deepseek-v2-lite": (2, ("q_proj", "kv_a_proj_with_mqa", "o_proj", "layers.0.mlp.down_proj")),
}


@pytest.mark.parametrize("case", FAMILIES)
def test_every_familys_linear_layers_take_adapters(case: str, tmp_path: Path) -> None:
    devices, modules = FAMILIES[case]
    base = write_checkpoint(case, tmp_path / "base")
    adapter = write_adapter(tmp_path / "adapter", base, modules)
    model = dense.load(merged(base, adapter, tmp_path / "merged", scaling=2))
    settings = SETTINGS | {"max_model_len": 64, "tensor_parallel_size": devices}
    with LLM(str(base), lora_modules={"own": adapter}, **settings) as llm:
        for tokens in prompts(case):
            (completion,) = completions(llm, "own", [{"prompt_token_ids": tokens}])
            assert greedy(model, tokens, completion) == completion


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_adapters_are_added_beside_weights_of_few_bits(kind: str, files: dict[str, Path], tmp_path: Path) -> None:
    """A weight of few bits and a product of low rank, against that weight widened and merged."""
    with started(files, quantization=kind) as llm:
        found = completions(llm, "all")
        state = dict(nnx.to_flat_state(llm.state))
    widened = {}
    for path, parameter in state.items():
        if path[-1] == "weight" and (*path[:-1], "scale") in state:
            scale = state[*path[:-1], "scale"][...]
            if kind == "int4":
                zero = state[*path[:-1], "zero"][...]
                widened[path] = np.asarray(unpacked(parameter[...], scale, zero, jnp.float32))
            else:
                widened[path] = np.asarray(parameter[...], np.float32) * np.asarray(scale)[:, None]
    merged_model = dense.load(merged(files["base"], files["all"], tmp_path / "merged", scaling=2))
    base_model = dense.load(files["base"])
    graph, target = merged_model
    base = dict(nnx.to_flat_state(base_model[1]))
    flat = [
        (path, parameter.replace(parameter[...] - base[path][...] + widened[path]) if path in widened else parameter)
        for path, parameter in nnx.to_flat_state(target)
    ]
    model = graph, nnx.from_flat_state(flat)
    for prompt, completion in zip(PROMPTS, found, strict=True):
        assert greedy(model, prompt["prompt_token_ids"], completion) == completion


def test_an_adapter_that_peft_wrote_gives_pefts_logits(tmp_path: Path) -> None:
    """With other ranks and alphas for some modules, `use_rslora`, and modules left out."""
    (tokens,) = prompts(ADAPTED)[-1:]
    logits = np.load(ADAPTER / "logits.npy").astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    params = SamplingParams(temperature=0, max_tokens=1, logprobs=517)
    base = write_checkpoint(ADAPTED, tmp_path / "base")
    with LLM(str(base), lora_modules={"pefts": ADAPTER}, **SETTINGS | {"max_logprobs": 517}) as llm:
        for position, row in zip(STORED_POSITIONS, expected, strict=True):
            prompt = {"prompt_token_ids": tokens[: position + 1]}
            (found,) = llm.generate(prompt, params, adapter="pefts")[0].outputs[0].logprobs
            np.testing.assert_allclose([found[token].logprob for token in range(517)], row, atol=1e-4)


def test_the_scaling_is_pefts(files: dict[str, Path], tmp_path: Path) -> None:
    """`lora_alpha / r`, or over the root of `r`; and of some modules another alpha."""
    base = files["base"]
    rooted = write_adapter(tmp_path / "rooted", base, r=4, lora_alpha=8, use_rslora=True)
    model = dense.load(merged(base, rooted, tmp_path / "merged", scaling=4))
    pattern = write_adapter(tmp_path / "pattern", base, r=4, lora_alpha=8, alpha_pattern={r"layers\.0\.mlp\.\w+": 4})
    halved = {name: tensor / 2 for name, tensor in load_file(pattern / WEIGHTS).items() if "layers.0.mlp" in name}
    halved = {name: tensor for name, tensor in halved.items() if "lora_B" in name}
    same = change_adapter(write_adapter(tmp_path / "same", base, r=4, lora_alpha=8), **halved)
    adapters = {"rooted": rooted, "pattern": pattern, "same": same}
    with LLM(str(base), lora_modules=adapters, **SETTINGS) as llm:
        for prompt, completion in zip(PROMPTS, completions(llm, "rooted"), strict=True):
            assert greedy(model, prompt["prompt_token_ids"], completion) == completion
        assert completions(llm, "pattern") == completions(llm, "same")


# --- what is refused -------------------------------------------------------------------------------------------------


def refusal(files: dict[str, Path], lora_modules: Any) -> str:
    with pytest.raises(InputError) as error:
        LLM(str(files["base"]), lora_modules=lora_modules, **SETTINGS)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["sql"], "'sql'; give each adapter as name=directory"),
        (["=path"], "name=directory"),
        (["sql="], "name=directory"),
        (["a=x", "a=y"], "two adapters 'a'"),
        ("a=x", "give a list"),
        (["a=/nowhere/at/all"], "there is no directory /nowhere/at/all"),
        ([7], "give a list"),
    ],
)
def test_a_setting_that_names_no_adapter_is_refused(files: dict[str, Path], given: Any, told: str) -> None:
    assert told in refusal(files, given)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_dora", True),
        ("a_field_of_the_future", True),
        ("fan_in_fan_out", True),
        ("lora_bias", True),
        ("bias", "all"),
        ("modules_to_save", ["lm_head"]),
        ("layer_replication", [[0, 1]]),
        ("trainable_token_indices", [3]),
        ("target_parameters", ["mlp.experts.gate_up_proj"]),
        ("alora_invocation_tokens", [1, 2]),
        ("init_lora_weights", "pissa_niter_16"),
        ("peft_type", "IA3"),
        ("lora_alpha", "much"),
        ("lora_alpha", None),
        ("alpha_pattern", {"(": 3}),
        ("alpha_pattern", ["q_proj"]),
    ],
)
def test_an_adapter_that_does_more_is_refused_by_the_field(
    files: dict[str, Path], field: str, value: Any, tmp_path: Path
) -> None:
    adapter = change_adapter(write_adapter(tmp_path / "adapter", files["base"]), {field: value})
    assert field in refusal(files, {"own": adapter})


@pytest.mark.parametrize(
    ("tensors", "told"),
    [
        ({"base_model.model.lm_head.lora_A.weight": (4, 128), "base_model.model.lm_head.lora_B.weight": (9, 4)}, "lm_"),
        ({"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": None}, "no lora_A and lora_B"),
        ({"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": (3, 7)}, "with one rank"),
        ({"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": (4, 7)}, "do not belong together"),
        ({"base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector": (4,)}, "lora_magnitude_vector"),
        ({"base_model.model.model.layers.9.mlp.up_proj.lora_A.weight": (4, 7)}, "no lora_A and lora_B"),
        ({"model.layers.0.self_attn.q_proj.weight": (4, 7)}, "no part of a product of low rank"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(
    files: dict[str, Path], tensors: dict[str, tuple[int, ...] | None], told: str, tmp_path: Path
) -> None:
    adapter = write_adapter(tmp_path / "adapter", files["base"])
    random = {name: None if shape is None else np.zeros(shape, np.float32) for name, shape in tensors.items()}
    assert told in refusal(files, {"own": change_adapter(adapter, **random)})


def test_files_that_are_missing_or_pickled_are_refused(files: dict[str, Path], tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", files["base"])
    (adapter / WEIGHTS).rename(adapter / "adapter_model.bin")
    assert "pickled" in refusal(files, {"own": adapter})
    (adapter / "adapter_model.bin").unlink()
    assert f"has no {WEIGHTS}" in refusal(files, {"own": adapter})
    (adapter / CONFIG).write_text("{")
    assert "is not JSON" in refusal(files, {"own": adapter})
    (adapter / CONFIG).write_text(json.dumps([]))
    assert "peft_type None" in refusal(files, {"own": adapter})
    (adapter / CONFIG).unlink()
    assert f"has no {CONFIG}" in refusal(files, {"own": adapter})


# The last of them scaling makes too large.
@pytest.mark.parametrize(("matrix", "number"), [("A", np.nan), ("B", np.nan), ("B", -np.inf), ("B", 1e38)])
def test_numbers_that_would_harm_other_requests_are_refused(
    files: dict[str, Path], matrix: str, number: float, tmp_path: Path
) -> None:
    adapter = write_adapter(tmp_path / "adapter", files["base"], r=1, lora_alpha=8)
    name = f"base_model.model.model.layers.0.mlp.up_proj.lora_{matrix}.weight"
    damaged = load_file(adapter / WEIGHTS)[name].astype(ml_dtypes.bfloat16)
    damaged[0, 0] = number
    change_adapter(adapter, **{name: damaged})
    told = refusal(files, {"own": adapter})
    assert "NaN or infinity" in told
    assert "'model.layers.0.mlp.up_proj'" in told


def test_a_request_for_an_adapter_that_is_not_there_is_refused_and_none_has_run(llm: LLM) -> None:
    with pytest.raises(InputError, match="adapter is 'other', and there are all, few"):
        llm.generate(PROMPTS, GREEDY, adapter=["all", "other", None])
    with pytest.raises(InputError, match="adapter has 2 entries for 3 prompts"):
        llm.generate(PROMPTS, GREEDY, adapter=["all", "few"])
    assert not llm.engine.has_unfinished
