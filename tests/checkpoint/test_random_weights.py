import json

import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxserve.checkpoint.huggingface import abstract_model, read_config
from jaxserve.checkpoint.random_weights import random_weights
from jaxserve.models.registry import model_config
from jaxserve.parallel.mesh import make_mesh
from tests.models.cases import CASES


def test_config_json_alone_makes_a_model_spread_over_the_mesh(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CASES["qwen3-tied-group-8-head-64"]))
    config, mesh = model_config(read_config(tmp_path)), make_mesh(4)
    graph, weights = random_weights(config, mesh, jnp.dtype(jnp.bfloat16))
    assert graph == abstract_model(config.over_tensor_axis(4), jnp.dtype(jnp.bfloat16))[0]
    gate_up = weights["layers"][0]["mlp"]["gate_up"]["weight"][...]
    assert gate_up.dtype == jnp.bfloat16
    assert gate_up.sharding.shard_shape(gate_up.shape)[0] == gate_up.shape[0] // 4
    assert 0.015 < np.std(np.asarray(gate_up, np.float32)) < 0.025
    assert np.all(np.asarray(weights["norm"]["weight"][...], np.float32) == 1)
    values = [np.asarray(leaf[...], np.float32) for _, leaf in nnx.to_flat_state(weights)]
    assert all(np.isfinite(value).all() for value in values)


def test_another_seed_is_another_model(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CASES["llama-2"]))
    config, mesh = model_config(read_config(tmp_path)), make_mesh(1)
    first, second = (random_weights(config, mesh, jnp.dtype(jnp.float32), seed=seed)[1] for seed in (1, 2))
    assert not np.allclose(first["lm_head"]["weight"][...], second["lm_head"]["weight"][...])
