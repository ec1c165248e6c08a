"""What `transformers` computes on the cases: stored in references/, or live where PyTorch is installed."""

import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tests.models.cases import CASES, prompts

STORED = Path(__file__).with_name("references")  # a file for each case, written by scripts/make_references.py
STORED_POSITIONS = np.array([0, 9, 24, 39])  # of the longest prompt
NEW_TOKENS = 24

ADAPTED = "qwen3-tied-group-8-head-64"  # what PEFT's own adapter, in references/, is of
ADAPTER = STORED / "peft-adapter"


class Reference(NamedTuple):
    positions: np.ndarray  # in the case's longest prompt
    logits: np.ndarray  # after each of them: float32 [positions, vocab]
    greedy: np.ndarray  # continuations of the case's prompts: int32 [prompts, NEW_TOKENS]


@functools.cache
def _stored(case: str) -> dict[str, np.ndarray]:
    with np.load(STORED / f"{case}.npz") as archive:
        return dict(archive)


def stored_seed(case: str) -> int:
    """The seed of the weights that the stored values belong to."""
    return int(_stored(case)["seed"])


def stored_reference(case: str) -> Reference:
    return Reference(STORED_POSITIONS, _stored(case)["logits"], _stored(case)["greedy"])


def stored_rope(name: str) -> tuple[np.ndarray, float]:
    """Inverse frequencies and attention factor of a rope of `ropes.ROPES`."""
    return _stored("rope")[name], float(_stored("rope")[f"{name}/factor"])


def live_reference(case: str, directory: Path) -> tuple[Reference, float]:
    """`transformers`' values on the checkpoint in `directory`, and the least lead of a chosen token over the next.

    Needs PyTorch. Logits are of every position of the longest prompt.
    """
    import torch
    from transformers import AutoModelForCausalLM

    if "quantization_config" in CASES[case]:
        directory = _unpacked(directory)
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    given = [torch.tensor([prompt]) for prompt in prompts(case)]
    with torch.no_grad():
        logits = model(given[-1]).logits[0].numpy()
        runs = [
            model.generate(
                ids, do_sample=False, max_new_tokens=NEW_TOKENS, output_logits=True, return_dict_in_generate=True
            )
            for ids in given
        ]
    greedy = [run.sequences[0, ids.shape[1] :].numpy() for run, ids in zip(runs, given, strict=True)]
    best, second = torch.cat([step for run in runs for step in run.logits]).topk(2).values.T
    reference = Reference(np.arange(len(logits)), logits, np.stack(greedy).astype(np.int32))
    return reference, float((best - second).min())


def live_adapter(directory: Path, into: Path) -> np.ndarray:
    """Write an adapter of the checkpoint in `directory` with PEFT; its float32 logits `[tokens, vocab]` of `ADAPTED`'s
    longest prompt. Needs PyTorch and PEFT.
    """
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=2,
        lora_alpha=6,
        target_modules=["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"],
        exclude_modules=["model.layers.0.self_attn.o_proj"],
        rank_pattern={"down_proj": 3},
        alpha_pattern={r"layers\.1\.self_attn\.v_proj": 9},
        use_rslora=True,
        init_lora_weights=False,  # which would begin with zeros
    )
    model: Any = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32), config)
    model.peft_config["default"].base_model_name_or_path = ADAPTED
    model.save_pretrained(into)
    with torch.no_grad():
        return model(torch.tensor([prompts(ADAPTED)[-1]])).logits[0].numpy()


def _unpacked(directory: Path) -> Path:
    """A copy of an MXFP4 checkpoint with plain weights, by `transformers`' own function: loading it needs a GPU's."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    copy = directory / "unpacked"
    copy.mkdir(exist_ok=True)
    config = json.loads((directory / "config.json").read_text())
    del config["quantization_config"]
    (copy / "config.json").write_text(json.dumps(config))
    tensors = load_file(directory / "model.safetensors")
    for name in [name.removesuffix("_blocks") for name in tensors if name.endswith("_blocks")]:
        packed = tensors.pop(f"{name}_blocks"), tensors.pop(f"{name}_scales")
        tensors[name] = convert_moe_packed_tensors(*packed, dtype=torch.float32)
    save_file(tensors, copy / "model.safetensors")
    return copy
