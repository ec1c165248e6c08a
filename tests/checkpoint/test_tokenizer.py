"""A checkpoint's tokenizer, or why there is none. The others' tests load the demo model's."""

import shutil
from pathlib import Path

import pytest

from jaxserve.checkpoint.tokenizer import eos_token_ids, load_tokenizer, read_generation_config
from jaxserve.config import DEMO_MODEL
from jaxserve.errors import InputError
from tests.checkpoint.test_huggingface import change_config


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3_moe", "gpt2", "llama"])
@pytest.mark.parametrize("missing", [["tokenizer.json"], ["tokenizer.json", "tokenizer_config.json"]])
def test_a_directory_without_a_tokenizer_is_refused(model_type: str, missing: list[str], tmp_path: Path) -> None:
    path = shutil.copytree(DEMO_MODEL, tmp_path / "model", ignore=shutil.ignore_patterns(*missing, "*.safetensors"))
    change_config(path, model_type=model_type)
    with pytest.raises(InputError, match=r"has no tokenizer that loads .*skip_tokenizer_init"):
        load_tokenizer(path)


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", ["{", "[]", '{"model": 5}'])
def test_a_damaged_file_is_refused(file: str, content: str, tmp_path: Path) -> None:
    path = shutil.copytree(DEMO_MODEL, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    (path / file).write_text(content)
    with pytest.raises(InputError, match="has no tokenizer that loads"):
        load_tokenizer(path)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("[]", "is a list, where an object belongs"),
        ("{", "is not JSON"),
        ('{"temperature": "hot"}', "cannot be followed: temperature is 'hot'; give a number"),
        ('{"top_k": 1.5}', "cannot be followed: top_k is 1.5"),
    ],
)
def test_a_generation_config_that_cannot_be_followed_is_refused_by_its_name(
    content: str, told: str, tmp_path: Path
) -> None:
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(InputError, match=f"^{tmp_path}/generation_config.json {told}"):
        read_generation_config(tmp_path)


@pytest.mark.parametrize("named", ["x", [1, "x"], True, 1.0, {}])
def test_ends_that_are_no_tokens_are_refused_by_their_file(named: object) -> None:
    with pytest.raises(
        InputError, match=r"^eos_token_id is .* in the model's generation_config.json; write a token id"
    ):
        eos_token_ids({"eos_token_id": named}, {"eos_token_id": 1})
    with pytest.raises(InputError, match=r"in the model's config.json; write"):
        eos_token_ids({}, {"eos_token_id": named})
