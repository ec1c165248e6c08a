"""A checkpoint's tokenizer, chat template and generation defaults."""

import json
from pathlib import Path
from typing import Any

from jaxserve.errors import InputError
from jaxserve.sampling_params import SamplingParams

_SAMPLING_DEFAULTS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def import_tokenizers() -> Any:
    """The class that loads tokenizers, which takes seconds to import."""
    from transformers import AutoTokenizer

    return AutoTokenizer


def load_tokenizer(directory: Path) -> Any:
    """The `transformers` tokenizer of `directory`; `InputError` if there is none that can stream."""
    try:
        tokenizer = import_tokenizers().from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever comes to transformers' mind about a damaged file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"{directory} has no tokenizer that loads ({reason}); give one, or skip_tokenizer_init=True"
        ) from error
    if len(tokenizer.get_added_vocab()) == len(tokenizer):  # what transformers makes of nothing, for some models
        raise InputError(
            f"{directory} has no tokenizer that loads (its vocabulary is empty, as where tokenizer.json is missing); "
            "give one, or skip_tokenizer_init=True"
        )
    if not tokenizer.is_fast:
        raise InputError(f"the tokenizer of {directory} has no tokenizer.json; convert it to a fast tokenizer")
    return tokenizer


def read_generation_config(directory: Path) -> dict[str, Any]:
    """`generation_config.json`, or nothing where there is none; `InputError` if it says what cannot be."""
    path = directory / "generation_config.json"
    try:
        read = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({error}); mend or delete it") from error
    if not isinstance(read, dict):
        raise InputError(f"{path} is a {type(read).__name__}, where an object belongs; mend or delete it")
    try:
        SamplingParams(**sampling_defaults(read))
    except InputError as error:
        raise InputError(f"{path} cannot be followed: {error}") from error
    return read


def eos_token_ids(generation: dict[str, Any], config: dict[str, Any]) -> frozenset[int]:
    """The tokens that end a completion: `generation_config.json`'s, else `config.json`'s."""
    file = "generation_config.json" if "eos_token_id" in generation else "config.json"
    named = generation.get("eos_token_id", config.get("eos_token_id"))
    if named is None:
        return frozenset()
    ids = named if isinstance(named, list) else [named]
    if any(type(id) is not int for id in ids):
        raise InputError(f"eos_token_id is {named!r} in the model's {file}; write a token id there, or a list of them")
    return frozenset(ids)


def sampling_defaults(generation: dict[str, Any]) -> dict[str, Any]:
    """What the checkpoint recommends for `SamplingParams`; greedy if it says that it does not sample."""
    if generation.get("do_sample") is False:
        return {"temperature": 0.0}
    return {name: generation[name] for name in _SAMPLING_DEFAULTS if generation.get(name) is not None}
