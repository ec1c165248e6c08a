"""From a HuggingFace directory to an Orbax checkpoint and back, with config and tokenizer."""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jaxserve.checkpoint import huggingface, orbax
from jaxserve.checkpoint.model_files import ModelFiles
from jaxserve.checkpoint.safetensors_files import INDEX_FILE
from jaxserve.errors import InputError
from jaxserve.models.registry import model_config
from jaxserve.parallel.mesh import TENSOR

_BESIDE_WEIGHTS = ("*.json", "*.jinja", "*.model", "*.txt")
_ORBAX_ITEM = "orbax"


def convert(
    files: ModelFiles,
    out: Path,
    *,
    dtype: jnp.dtype | None = None,
    on_bytes: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Make the directory `out`: with an Orbax checkpoint if `files` are HuggingFace's, else with safetensors.

    Without a `dtype`, every tensor keeps its own. The host's memory has to hold the model. `InputError` if `out` is
    there already or cannot be written; nothing of it is left then.
    """
    if out.exists():
        raise InputError(f"{out} is there already; give a place that is not")
    config = model_config(huggingface.read_config(files.config))
    if config.quantization is not None:
        raise InputError(
            f"the weights of {files.name} are quantised ({config.quantization}), and those are not converted; serve "
            "them as they are, or convert the model that they were made of"
        )
    host = Mesh(np.asarray(jax.devices("cpu")[:1]), (TENSOR,))
    graph, state = files.load_weights(config, host, dtype, on_bytes)
    try:
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as unfinished:
            made = Path(unfinished) / out.name
            made.mkdir()
            for pattern in _BESIDE_WEIGHTS:
                for file in files.config.glob(pattern):
                    if file.name != INDEX_FILE:
                        shutil.copyfile(file, made / file.name)
            if files.is_orbax:
                huggingface.save_weights(nnx.merge(graph, state), made, None)
            else:
                orbax.save_weights(state, made / _ORBAX_ITEM)
            made.rename(out)
    except InputError:
        raise
    except (OSError, ValueError) as error:  # the latter is Orbax's
        raise InputError(
            f"cannot write {out} ({' '.join(str(error).split())[:200]}); make room or give another place"
        ) from error
