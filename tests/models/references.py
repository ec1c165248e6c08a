"""What `transformers` computes on the cases: stored in references/, or live where PyTorch is installed."""

import functools
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tests.models.cases import prompts

STORED = Path(__file__).with_name("references")  # a file for each case, written by scripts/make_references.py
STORED_POSITIONS = np.array([0, 9, 24, 39])  # of the longest prompt
NEW_TOKENS = 24


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


def live_reference(case: str, directory: Path) -> tuple[Reference, float]:
    """`transformers`' values on the checkpoint in `directory`, and the least lead of a chosen token over the next.

    Needs PyTorch. Logits are of every position of the longest prompt.
    """
    import torch
    from transformers import AutoModelForCausalLM

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
