"""Step batches in, sampled tokens out: the only place that dispatches programs."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from jaxserve.checkpoint.adapters import Adapter, Adapters
from jaxserve.checkpoint.exchange import Handover, match, place_like
from jaxserve.errors import InputError
from jaxserve.models.config import ModelConfig
from jaxserve.parallel.mesh import sharding
from jaxserve.parallel.processes import Processes
from jaxserve.runner.buckets import Buckets, PrefillBucket
from jaxserve.runner.cache_layout import CacheLayout
from jaxserve.runner.compilation import compile_all
from jaxserve.runner.kv_cache import KVCache
from jaxserve.runner.memory import array_bytes, check_state, step_weight_bytes, too_large
from jaxserve.runner.program_cache import ProgramCache
from jaxserve.runner.programs import DeviceState, Programs, SlotState
from jaxserve.runner.step_batch import (
    DecodeArrays,
    LogprobRows,
    Masks,
    Needs,
    PrefillArrays,
    StepBatch,
    StepResult,
    VocabRow,
)

# On the CPU, LLVM takes a quarter longer to optimise all that it can, and steps take as long either way.
_COMPILER_OPTIONS: dict[str, dict[str, bool | int | float | str]] = {"cpu": {"xla_backend_optimization_level": 1}}


class Runner:
    """A model with its pages and slots on a mesh, and a compiled program for every bucket.

    `shapes` are the weights', each with its dtype and sharding, and so are those of `adapters`; `place` brings the
    weights themselves. `config` is the model as it stands on the mesh. `dispatch` returns at once, with arrays that the
    device fills later; `collect` waits for them. Steps run in the order in which they are dispatched.
    """

    def __init__(
        self,
        graph: nnx.GraphDef,
        shapes: nnx.State,
        adapters: Adapters,
        config: ModelConfig,
        mesh: Mesh,
        processes: Processes,
        buckets: Buckets,
        layout: CacheLayout,
        *,
        num_pages: int,
        max_logprobs: int,
        max_decode_steps: int,
        attention_backend: str,
        compilation_cache_dir: str,
    ):
        self._shapes, weights_tree = jax.tree.flatten((shapes, adapters.shapes))
        self._weights: list[jax.Array] = []  # the model's, then the adapters'
        self._model_tree: Any = jax.tree.structure(shapes)
        self._adapters, self._adapters_tree = adapters, jax.tree.structure(adapters.shapes)
        self.weight_bytes_per_step = step_weight_bytes(config, shapes) + array_bytes(adapters.shapes)
        self._config = config
        self._buckets, self._layout = buckets, layout
        self._mesh, self._processes = mesh, processes
        self._dtype = dtype = jax.tree.leaves(shapes["embedding"])[0].dtype

        def empty() -> DeviceState:
            return DeviceState(
                KVCache.empty(config, layout, num_pages=num_pages, dtype=dtype),
                SlotState.empty(
                    slots=buckets.max_num_seqs,
                    groups=len(layout.windows),
                    max_pages=buckets.max_pages,
                    vocab_size=config.vocab_size,
                ),
            )

        self.state: DeviceState
        self._empty_state, (cache, slots) = empty, jax.eval_shape(empty)
        self._state_shapes = DeviceState(_placed(KVCache.sharding(mesh), cache), _placed(sharding(mesh), slots))
        self._sizes = {"num_pages": num_pages, "max_num_seqs": buckets.max_num_seqs}
        check_state(self._state_shapes, self._shapes, mesh.devices, **self._sizes)
        self._programs = Programs(
            graph,
            weights_tree,
            adapters.places,
            config,
            layout,
            mesh,
            max_logprobs=max_logprobs,
            max_decode_steps=max_decode_steps,
            attention_backend=attention_backend,
        )
        self._compiled: dict[Any, jax.stages.Compiled] = {}
        self._vocab_size = config.vocab_size
        self._cache = ProgramCache(
            compilation_cache_dir,
            list(mesh.devices.flat),
            config,
            mesh.shape,
            [(shape.shape, shape.dtype.name, shape.sharding.spec) for shape in self._shapes],
            (adapters.places, [*adapters.shapes]),
            (num_pages, max_logprobs, max_decode_steps, attention_backend),
            (buckets.max_num_seqs, buckets.max_pages, layout),
        )

    def compile(self, on_compiled: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Compile the program of every bucket; `on_compiled` is told how many of how many are done."""
        # The largest first: they take longest.
        programs: dict[Any, Callable[[], jax.stages.Compiled]] = {}
        programs |= {bucket: partial(self._compile_decode, bucket) for bucket in reversed(self._buckets.decode)}
        programs |= {bucket: partial(self._compile_prefill, bucket) for bucket in reversed(self._buckets.prefill)}
        programs |= {
            (LogprobRows, tokens): partial(self._compile_prompt_logprobs, tokens)
            for tokens in sorted({bucket.tokens for bucket in self._buckets.prefill}, reverse=True)
        }
        programs |= {VocabRow: self._compile_vocab_row, Masks: self._compile_masks}
        programs[DeviceState] = partial(self._compile_making, self._empty_state, self._state_shapes)
        if self._adapters.places:
            shapes = self._adapters.shapes
            programs[Adapters] = partial(self._compile_making, partial(jax.tree.map, _zeros, shapes), shapes)
            programs[Adapter] = self._compile_adapter
        tasks = [partial(self._cache.get, repr(key), compile_) for key, compile_ in programs.items()]
        self._compiled = dict(zip(programs, compile_all(tasks, on_compiled), strict=True))

    def place(self, weights: nnx.State) -> None:
        """Take the weights, of the shapes and on the devices that were announced, and make the page pool and adapters.

        Not before the programs are compiled: on a GPU, XLA tries kernels out meanwhile, in memory of the device.
        """
        try:
            adapters = self._compiled[Adapters]() if self._adapters.places else {}
            self.state = self._compiled[DeviceState]()
        except (ValueError, jax.errors.JaxRuntimeError) as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise too_large(self._state_shapes, self._shapes, "so much is not free", **self._sizes) from error
        self._weights = jax.tree.leaves((weights, adapters))
        for place, adapter in enumerate(self._adapters.first):
            self.put_adapter(place, adapter)
        self._adapters.first.clear()

    def dispatch(self, batch: StepBatch) -> StepResult:
        """Start one step, in all processes; the result's arrays are on the device, under way."""
        self._processes.tell(batch)
        for loaded in (*batch.vocab_rows, *batch.masks):
            vocab = self._compiled[type(loaded)](self.state.slots.vocab, loaded)
            self.state = self.state._replace(slots=self.state.slots._replace(vocab=vocab))
        arrays = batch.arrays
        if isinstance(arrays, DecodeArrays):
            self.state, result = self._compiled[len(arrays.slots)](self._weights, self.state, arrays)
            return result
        bucket = self._buckets.prefill_for(len(arrays.token_ids), len(arrays.slots))
        self.state, (result, hidden) = self._compiled[bucket](self._weights, self.state, arrays)
        if arrays.needs & Needs.PROMPT_LOGPROBS:
            find = self._compiled[LogprobRows, bucket.tokens]
            result = result._replace(prompt_logprobs=find(self._weights, hidden, arrays.next_token_ids))
        return result

    @property
    def temporary_bytes(self) -> int | None:
        """The most memory that a program takes beside its arguments and results, on one device; None if XLA is mum."""
        found = [compiled.memory_analysis() for compiled in self._compiled.values()]
        return max((analysis.temp_size_in_bytes for analysis in found if analysis is not None), default=None)

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of one position's keys and values in all layers."""
        pages, _, page_size, _ = self.state.cache.k[0].shape
        return array_bytes(self.state.cache) // (pages * page_size * self._layout.num_arrays) * self._config.num_layers

    @property
    def weights(self) -> nnx.State:
        """The model's parameters where they lie, not copied."""
        return jax.tree.unflatten(self._model_tree, self._weights[: self._model_tree.num_leaves])

    def put_adapter(self, place: int, adapter: Adapter) -> None:
        """Run the next step with an adapter in a place from 0 on, whatever was there."""
        first = self._model_tree.num_leaves
        adapters = jax.tree.unflatten(self._adapters_tree, self._weights[first:])
        own = jax.tree.map(_whole, adapter.arrays, self._adapters.one)
        self._weights[first:] = jax.tree.leaves(self._compiled[Adapter](adapters, own, np.int32(place)))

    def check_weights(self, new: nnx.State) -> list[Handover]:
        """What `update_weights` takes; `InputError` if `new` does not belong to this model. Nothing is moved yet."""
        if self._processes.count > 1:
            raise InputError("weights are updated within one process only, and several run this model")
        return match(new, self.weights, self._config)

    def update_weights(self, new: list[Handover]) -> None:
        """Run the next step with other weights.

        An array that lies where its predecessor lies is shared with whoever else holds it; others are moved, one after
        the other, so that no second copy of the model is needed.
        """
        for number, handover in enumerate(new):
            self._weights[number] = place_like(handover, self._weights[number])

    @staticmethod
    def collect(result: StepResult, needs: int) -> StepResult:
        """Wait for a step and read what is wanted of it, a `Needs` value, as numpy arrays."""
        return jax.device_get(
            StepResult(
                result.token_ids,
                result.logprobs if needs & Needs.LOGPROBS else None,
                result.prompt_logprobs,
                result.hidden if needs & Needs.HIDDEN else None,
            )
        )

    def close(self) -> None:
        """Free the device's memory, in all processes."""
        self._processes.leave()
        for array in jax.tree.leaves(self.state):
            array.delete()
        self._weights.clear()  # others may hold them too
        self._compiled.clear()

    def _compile_decode(self, rows: int) -> jax.stages.Compiled:
        sizes = {"max_num_seqs": self._buckets.max_num_seqs, "groups": len(self._layout.windows)}
        return self._compile(self._programs.decode, DecodeArrays.padding(rows, **sizes))

    def _compile_prefill(self, bucket: PrefillBucket) -> jax.stages.Compiled:
        arrays = PrefillArrays.padding(
            bucket,
            max_num_seqs=self._buckets.max_num_seqs,
            groups=len(self._layout.windows),
            max_pages=self._buckets.max_pages,
        )
        return self._compile(partial(self._programs.prefill, tile_size=bucket.tile_size), arrays)

    def _compile(self, program: Callable, arrays: PrefillArrays | DecodeArrays) -> jax.stages.Compiled:
        # Outputs lie as the inputs they replace, so that each step's result fits the next step's program.
        whole = sharding(self._mesh)
        where = _places(self._state_shapes), whole
        step = jax.jit(program, donate_argnums=1, in_shardings=(None, None, whole), out_shardings=where)
        with jax.set_mesh(self._mesh):  # for the layers that split their own work
            return self._compiled_of(step.lower(self._shapes, self._state_shapes, arrays))

    def _compile_prompt_logprobs(self, tokens: int) -> jax.stages.Compiled:
        whole = sharding(self._mesh)
        hidden = jax.ShapeDtypeStruct((tokens, self._config.hidden_size), self._dtype, sharding=whole)
        program = jax.jit(self._programs.prompt_logprobs, in_shardings=(None, whole, whole), out_shardings=whole)
        with jax.set_mesh(self._mesh):
            return self._compiled_of(program.lower(self._shapes, hidden, np.zeros(tokens, np.int32)))

    def _compile_making(self, make: Callable[[], Any], shapes: Any) -> jax.stages.Compiled:
        """A program that makes arrays of these shapes where they are to lie."""
        return self._compiled_of(jax.jit(make, out_shardings=_places(shapes)).lower())

    def _compile_adapter(self) -> jax.stages.Compiled:
        shapes, one = self._adapters.shapes, self._adapters.one
        inputs, where = (None, None, sharding(self._mesh)), _places(shapes)
        program = jax.jit(self._programs.put_adapter, donate_argnums=0, in_shardings=inputs, out_shardings=where)
        return self._compiled_of(program.lower(shapes, one, np.int32(0)))

    def _compile_vocab_row(self) -> jax.stages.Compiled:
        size = self._vocab_size
        row = VocabRow(np.int32(0), np.zeros(size, bool), np.zeros(size, np.int32), np.zeros(size, np.float32))
        return self._compile_loading(Programs.load_vocab_row, row)

    def _compile_masks(self) -> jax.stages.Compiled:
        sizes = {"max_num_seqs": self._buckets.max_num_seqs, "vocab_size": self._vocab_size}
        return self._compile_loading(Programs.load_masks, Masks.padding(**sizes))

    def _compile_loading(self, load: Callable, loaded: VocabRow | Masks) -> jax.stages.Compiled:
        whole = sharding(self._mesh)
        program = jax.jit(load, donate_argnums=0, in_shardings=(None, whole), out_shardings=whole)
        return self._compiled_of(program.lower(self._state_shapes.slots.vocab, loaded))

    def _compiled_of(self, lowered: jax.stages.Lowered) -> jax.stages.Compiled:
        return lowered.compile(compiler_options=_COMPILER_OPTIONS.get(self._mesh.devices.flat[0].platform))


def _whole(array: np.ndarray, shape: jax.ShapeDtypeStruct) -> jax.Array:
    """The array on its devices, of which each process places its own."""
    return jax.make_array_from_callback(array.shape, shape.sharding, lambda index: array[index])


def _zeros(shape: jax.ShapeDtypeStruct) -> jax.Array:
    return jnp.zeros(shape.shape, shape.dtype)


def _places(shapes: Any) -> Any:
    """Where arrays of these shapes are to lie."""
    return jax.tree.map(lambda shape: shape.sharding, shapes)


def _placed(where: NamedSharding, shapes: Any) -> Any:
    """The shapes of arrays that will lie so."""
    return jax.tree.map(lambda shape: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=where), shapes)
