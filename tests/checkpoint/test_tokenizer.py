"""A checkpoint's tokenizer, or why there is none. The others' tests load the demo model's."""

import shutil
from pathlib import Path

import pytest

from jaxserve.checkpoint.tokenizer import load_tokenizer
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
