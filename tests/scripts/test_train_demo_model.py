"""The script that trains the demo model: what it makes is a model that the engine serves as it was trained."""

import dataclasses
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxserve import LLM, SamplingParams

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture
def training(monkeypatch):
    """The script as a module, with a model of one layer and batches that take no time."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import train_demo_model

    monkeypatch.setattr(train_demo_model, "SHORT_ROWS", 1)
    config = train_demo_model.CONFIG
    one_layer = dataclasses.replace(config, layer_kinds=config.layer_kinds[:1])
    monkeypatch.setattr(train_demo_model, "CONFIG", one_layer)
    return train_demo_model


def run(training, monkeypatch, directory: Path, steps: int) -> None:
    arguments = ["--out", directory / "model", "--checkpoint-dir", directory / "checkpoints", "--steps", steps]
    monkeypatch.setattr(sys, "argv", ["train_demo_model.py", *map(str, arguments)])
    training.main()


def test_a_run_that_was_stopped_goes_on_to_a_model_that_is_served_as_it_was_trained_and_learns(
    training, monkeypatch, tmp_path, capsys
):
    trainers = []
    monkeypatch.setattr(
        training, "Trainer", lambda seed, make=training.Trainer: trainers.append(make(seed)) or trainers[-1]
    )
    run(training, monkeypatch, tmp_path, 1)
    run(training, monkeypatch, tmp_path, 3)
    printed = capsys.readouterr().out
    assert "continuing from step 1" in printed
    assert "after 3 steps" in printed

    tokenizer = training.kept_tokenizer(tmp_path / "checkpoints", 0)
    (rows,) = training.step_batch(tokenizer, 0, 1, held_out=True)
    first = rows.tokens[:, : int((rows.segments[0] == 1).sum())]
    model = nnx.merge(trainers[-1].graph, trainers[-1].rounded())
    arrays = {"tokens": first, "positions": np.arange(first.shape[1])[None], "segments": np.ones_like(first)}
    losses, _ = training.token_losses(model, {name: jnp.asarray(array) for name, array in arrays.items()})

    llm = LLM(tmp_path / "model", progress=False, max_num_seqs=1)
    sampling = SamplingParams(max_tokens=1, prompt_logprobs=0)
    told = llm.generate({"prompt_token_ids": first[0].tolist()}, sampling)[0].prompt_logprobs
    served = [-told[place][token].logprob for place, token in enumerate(first[0].tolist()) if place]
    np.testing.assert_allclose(served, losses[0], atol=0.15)
    assert np.ptp(served) > 1  # not all the same, as they would be of a model that tells tokens not apart

    batch = training.step_batch(tokenizer, 0, 1, held_out=False)
    before, *_, after = (float(trainers[-1].train_step(batch, 0.1)) for _ in range(6))
    assert after < 0.9 * before
