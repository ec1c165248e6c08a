"""Flags, presets and defaults become an `EngineConfig` and `SamplingParams`."""

import dataclasses
from pathlib import Path
from types import ModuleType

import pytest

from jaxserve.cli import chat, generate
from jaxserve.cli.chat import COMMANDS
from jaxserve.cli.flags import Flags, Parser
from jaxserve.cli.options import ENGINE, PRESETS, SAMPLING, add_engine_flags, engine_config
from jaxserve.config import EngineConfig, read_preset
from jaxserve.errors import InputError
from jaxserve.sampling_params import SamplingParams

# These go together.
PROCESSES = {"coordinator_address": "10.0.0.1:8476", "num_processes": 4, "process_id": 3}

# For each other engine setting, what the command line says and the value that it stands for.
ENGINE_FLAGS = {
    "model": (["--model", "some/where"], "some/where"),
    "revision": (["--revision", "0a1b2c"], "0a1b2c"),
    "hf_config_path": (["--hf-config-path", "its/config"], "its/config"),
    "tokenizer": (["--tokenizer", "else/where"], "else/where"),
    "skip_tokenizer_init": (["--skip-tokenizer-init"], True),
    "chat_template": (["--chat-template", "a/file"], "a/file"),
    "reasoning_parser": (["--reasoning-parser", "qwen3"], "qwen3"),
    "tool_call_parser": (["--tool-call-parser", "hermes"], "hermes"),
    "load_format": (["--load-format", "dummy"], "dummy"),
    "dtype": (["--dtype", "float32"], "float32"),
    "quantization": (["--quantization", "int8"], "int8"),
    "lora_modules": (["--lora-modules", "a=x", "--lora-modules", "b=y/z=1"], ("a=x", "b=y/z=1")),
    "max_loras": (["--max-loras", "8"], 8),
    "max_lora_rank": (["--max-lora-rank", "64"], 64),
    "max_model_len": (["--max-model-len", "77"], 77),
    "max_num_seqs": (["--max-num-seqs=3"], 3),
    "max_num_batched_tokens": (["--max-num-batched-tokens", "99"], 99),
    "max_itl_ms": (["--max-itl-ms", "30"], 30.0),
    "max_decode_steps": (["--max-decode-steps", "4"], 4),
    "decode_burst_ms": (["--decode-burst-ms", "2.5"], 2.5),
    "enable_prefix_caching": (["--no-enable-prefix-caching"], False),
    "tensor_parallel_size": (["--tensor-parallel-size", "2"], 2),
    "attention_backend": (["--attention-backend", "xla"], "xla"),
    "page_size": (["--page-size", "16"], 16),
    "num_pages": (["--num-pages", "1000"], 1000),
    "gpu_memory_utilization": (["--gpu-memory-utilization", "0.5"], 0.5),
    "max_logprobs": (["--max-logprobs", "7"], 7),
    "seed": (["--seed", "11"], 11),
    "compilation_cache_dir": (["--compilation-cache-dir", ""], ""),
}

SAMPLING_FLAGS = {
    "n": (["--n", "3"], 3),
    "temperature": (["--temperature", "0.5"], 0.5),
    "top_k": (["--top-k", "-1"], 0),
    "logit_bias": (["--logit-bias", '{"7": -1.5}'], {7: -1.5}),
    "max_tokens": (["--max-tokens", "9"], 9),
    "stop": (["--stop", "END", "--stop", "\n"], ("END", "\n")),
    "stop_token_ids": (["--stop-token-ids", "3", "--stop-token-ids", "4"], (3, 4)),
    "ignore_eos": (["--ignore-eos"], True),
    "logprobs": (["--logprobs", "0"], 0),
    "detokenize": (["--no-detokenize"], False),
}


def parse(flags: Flags, words: list[str]) -> dict:
    parser = Parser("test", "", examples=())
    flags.add_to(parser)
    return flags.given(parser.parse(words))


def config(words: list[str]) -> EngineConfig:
    parser = Parser("test", "", examples=())
    add_engine_flags(parser)
    return engine_config(parser.parse(words))


def test_every_engine_setting_has_a_flag():
    assert {*ENGINE_FLAGS, *PROCESSES} == {field.name for field in dataclasses.fields(EngineConfig)}


@pytest.mark.parametrize("name", ENGINE_FLAGS)
def test_an_engine_flag_sets_its_field_alone(name: str):
    words, value = ENGINE_FLAGS[name]
    assert config(words) == EngineConfig(**{name: value})


def test_the_flags_of_one_of_several_processes_set_their_fields():
    words = ["--coordinator-address", "10.0.0.1:8476", "--num-processes", "4", "--process-id", "3"]
    assert config(words) == EngineConfig(**PROCESSES)


@pytest.mark.parametrize("name", SAMPLING_FLAGS)
def test_a_sampling_flag_sets_its_field_alone(name: str):
    words, value = SAMPLING_FLAGS[name]
    assert SamplingParams(**parse(SAMPLING, words)) == SamplingParams(**{name: value})


@pytest.mark.parametrize("flags", [ENGINE, SAMPLING], ids=["engine", "sampling"])
def test_every_flag_explains_itself(flags: Flags):
    parser = Parser("test", "", examples=())
    for action in flags.add_to(parser)._group_actions:
        assert len(action.help) > 10, action.option_strings


@pytest.mark.parametrize("command", [generate, chat], ids=["generate", "chat"])
def test_sampling_flags_are_such_as_can_be_typed(command: ModuleType):
    told = command.parser().format_help()
    assert "None" not in told
    assert "--pooling" not in told
    assert "--allowed-token-ids" in told
    assert "--max-tokens" in told


def test_a_boolean_can_be_switched_off_over_the_preset(tmp_path: Path):
    preset = tmp_path / "preset.yaml"
    preset.write_text("skip-tokenizer-init: true\n")
    assert config(["--config", str(preset)]).skip_tokenizer_init
    assert not config(["--config", str(preset), "--no-skip-tokenizer-init"]).skip_tokenizer_init


def test_a_preset_names_adapters_one_below_the_other(tmp_path: Path):
    preset = tmp_path / "preset.yaml"
    preset.write_text("lora-modules:\n  sql: some/where\n  law: else/where\n")
    assert config(["--config", str(preset)]).adapters == {"sql": "some/where", "law": "else/where"}


def test_a_flag_wins_over_the_preset_and_the_preset_over_the_default(tmp_path: Path):
    preset = tmp_path / "preset.yaml"
    preset.write_text("max_num_seqs: 5\npage-size: 32\n")
    found = config(["--page-size", "16", "--config", str(preset)])
    assert found == EngineConfig(max_num_seqs=5, page_size=16)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--max-modl-len", "3"], "did you mean '--max-model-len'"),
        (["--max_model_len", "3"], "did you mean '--max-model-len'"),
        (["--max-model"], "did you mean '--max-model-len'"),  # no abbreviations: they would break as flags are added
        (["--max-model-len", "many"], "invalid int value: 'many'"),
        (["--page-size", "0"], "page_size is 0; give an integer from 1 on"),
        (["--dtype", "int8"], "give one of auto, bfloat16"),
        (["--attention-backend", "cuda"], "attention_backend is 'cuda'; give one of auto, mosaic_gpu, native, xla"),
        (["--coordinator-address", "host"], "coordinator_address is 'host'; give host:port of the first process"),
        (["--coordinator-address", "host:70000"], "coordinator_address is 'host:70000'; give host:port"),
        (["--num-processes", "2"], "num_processes is 2 and there is no coordinator_address; give the first one's"),
        (["--process-id", "1"], "process_id is 1 of num_processes=1; they are numbered from 0 on"),
        (["--process-id", "-1"], "process_id is -1; give an integer from 0 on"),
        (["stray"], "no place for the argument 'stray'"),
        (["--config", "nowhere"], "the presets here are demo-cpu"),
    ],
)
def test_what_is_wrong_is_said(words: list[str], message: str):
    with pytest.raises(InputError) as raised:
        config(words)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_modl_len: 3", "did you mean 'max_model_len'"),
        ("gpu_memory_utilization: high", "gpu_memory_utilization is 'high'; give a number"),
        ("page_size: 16.5", "page_size is 16.5; give an integer"),
        ("skip_tokenizer_init: 1", "skip_tokenizer_init is 1; give true or false"),
        ("model: 7", "model is 7; give a text"),
        ("- a", "holds no settings"),
        ("a: [", "is not YAML"),
    ],
)
def test_what_is_wrong_in_a_preset_is_said(tmp_path: Path, text: str, message: str):
    preset = tmp_path / "preset.yaml"
    preset.write_text(text)
    with pytest.raises(InputError) as raised:
        config(["--config", str(preset)])
    assert message in str(raised.value)


@pytest.mark.parametrize("preset", sorted(PRESETS.glob("*.yaml")), ids=lambda path: path.stem)
def test_presets_are_settings_and_name_no_place(preset: Path):
    assert config(["--config", preset.stem]) == EngineConfig(**read_preset(str(preset)))
    assert "model" not in read_preset(str(preset))


def test_chat_settings_are_spelled_as_fields_or_flags():
    assert SAMPLING.field_name("top-p") == SAMPLING.field_name("--top-p") == "top_p"
    assert SAMPLING.parse("ignore_eos", "on") is True
    assert SAMPLING.parse("stop", "END") == ["END"]
    assert SAMPLING.parse("temperature", "0.5") == 0.5
    assert "/set" in COMMANDS
    with pytest.raises(InputError, match="temperature cannot be 'warm'"):
        SAMPLING.parse("temperature", "warm")
