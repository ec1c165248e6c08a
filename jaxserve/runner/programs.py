"""The programs that serve: prefill, decode, and what few requests want. Compiled ahead of time for each bucket."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from jaxserve.layers.low_rank import LowRank, adapt
from jaxserve.models.config import ModelConfig
from jaxserve.parallel.mesh import sharding
from jaxserve.runner.cache_layout import CacheLayout
from jaxserve.runner.kv_cache import DecodeRows, KVCache, PagedAttend, Places, PrefillRows
from jaxserve.runner.sampler import VocabState, log_probabilities, sample
from jaxserve.runner.step_batch import (
    DecodeArrays,
    HiddenRows,
    LogprobRows,
    Masks,
    Needs,
    PrefillArrays,
    SamplingRows,
    StepResult,
    VocabRow,
)

PROMPT_LOGPROB_ROWS = 64  # positions whose logits are held at once


class SlotState(NamedTuple):
    """What the device keeps of each running sequence, by slot."""

    last_token: jax.Array  # int32 [slots]
    page_tables: jax.Array  # int32 [groups of layers, slots, max_pages]
    sampling: SamplingRows  # [slots]
    adapters: jax.Array  # int32 [slots], 0 is none
    vocab: VocabState  # [slots, vocab]

    @classmethod
    def empty(cls, *, slots: int, groups: int, max_pages: int, vocab_size: int) -> "SlotState":
        return cls(
            jnp.zeros(slots, jnp.int32),
            jnp.full((groups, slots, max_pages), -1, jnp.int32),
            SamplingRows.empty(slots),
            jnp.zeros(slots, jnp.int32),
            VocabState.empty(slots, vocab_size),
        )


class DeviceState(NamedTuple):
    """All that a step changes. Donated to each program, which gives back the next one."""

    cache: KVCache
    slots: SlotState


class Programs:
    """The functions to compile, for one model on one mesh.

    The arrays `weights` that they take are the leaves of a tree `(model, adapters)`, `weights_tree`.
    """

    def __init__(
        self,
        graph: nnx.GraphDef,
        weights_tree: Any,
        num_adapters: int,
        config: ModelConfig,
        layout: CacheLayout,
        mesh: Mesh,
        *,
        max_logprobs: int,
        max_decode_steps: int,
        attention_backend: str,
    ):
        self._graph, self._weights_tree, self._mesh = graph, weights_tree, mesh
        self._num_adapters = num_adapters
        self._layout, self._page_size, self._max_decode_steps = layout, layout.page_size, max_decode_steps
        self._attention_backend = attention_backend
        self._max_logprobs = min(max_logprobs, config.vocab_size)

    def decode(
        self, weights: list[jax.Array], state: DeviceState, batch: DecodeArrays
    ) -> tuple[DeviceState, StepResult]:
        """`batch.steps` new tokens for each slot of the batch, `max_decode_steps` at most."""
        slots = self._with_new_pages(state.slots, batch, batch.positions + batch.counts - 1)
        state = state._replace(slots=slots)
        if self._max_decode_steps == 1:
            state, token_ids, logprobs = self._decode_one(weights, state, batch)
            return state, StepResult(token_ids[None], logprobs, None, None)

        stops = slots.sampling.stop_token_ids[batch.slots]
        rows = len(batch.slots)

        def one_more(step: jax.Array, carry: tuple) -> tuple:
            state, going, found, _ = carry
            going = going & (step < batch.counts)
            # A row that has ended is padding from there on.
            row_slots = jnp.where(going, batch.slots, len(slots.last_token))
            positions = jnp.where(going, batch.positions + step, -1)
            token_batch = batch._replace(slots=row_slots, positions=positions)
            state, token_ids, logprobs = self._decode_one(weights, state, token_batch)
            going = going & (token_ids[:, None] != stops).all(axis=1)
            return state, going, found.at[step].set(token_ids), logprobs

        shapes = jax.eval_shape(self._decode_one, weights, state, batch)[2]
        no_logprobs = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        found = jnp.zeros((self._max_decode_steps, rows), jnp.int32)
        carry = (state, jnp.ones(rows, bool), found, no_logprobs)
        state, _, found, logprobs = jax.lax.fori_loop(0, batch.steps, one_more, carry)
        return state, StepResult(found, logprobs, None, None)

    def _decode_one(
        self, weights: list[jax.Array], state: DeviceState, batch: DecodeArrays
    ) -> tuple[DeviceState, jax.Array, LogprobRows]:
        """One new token for each slot of the batch, whose newest tokens are at its positions."""
        slots = state.slots
        model = self._model(weights, slots.adapters[batch.slots])
        lengths = batch.positions + 1  # padding: 0
        page_tables = slots.page_tables[:, batch.slots]
        places = self._places(state.cache, page_tables, jnp.arange(len(lengths)), batch.positions)
        attend = self._attend(state.cache, DecodeRows(lengths), places)
        hidden = model(slots.last_token[batch.slots], batch.positions, attend)
        sampling = jax.tree.map(lambda settings: settings[batch.slots], slots.sampling)
        token_ids, logprobs, vocab = self._sample(model, hidden, lengths, batch.slots, sampling, slots.vocab, batch)
        last_token = slots.last_token.at[batch.slots].set(token_ids, mode="drop")
        state = DeviceState(attend.cache, slots._replace(last_token=last_token, vocab=vocab))
        return state, token_ids, logprobs

    def prefill(
        self, weights: list[jax.Array], state: DeviceState, batch: PrefillArrays, tile_size: int
    ) -> tuple[DeviceState, tuple[StepResult, jax.Array]]:
        """Chunks of several prompts; a new token for each that ends here, and for each row that continues.

        Beside the result stand all tokens' last hidden states `[T, hidden]`, for `prompt_logprobs`.
        """
        slots = self._with_new_pages(state.slots, batch, batch.lengths - 1)

        def of_rows(kept: jax.Array, given: jax.Array) -> jax.Array:
            """The slot's own where a row continues: of `[slots, ...]` and `[R, ...]`."""
            own = kept[batch.slots]
            return jnp.where(batch.continues.reshape(-1, *(1,) * (own.ndim - 1)), own, given)

        page_table = jax.vmap(of_rows)(slots.page_tables, batch.page_table)
        row_sampling = jax.tree.map(of_rows, slots.sampling, batch.sampling)
        row_adapters = of_rows(slots.adapters, batch.adapters)
        model = self._model(weights, row_adapters[batch.rows])
        newest = slots.last_token[batch.slots][batch.rows]
        token_ids = jnp.where(batch.continues[batch.rows], newest, batch.token_ids)
        places = self._places(state.cache, page_table, batch.rows, batch.positions)
        attend = self._attend(state.cache, PrefillRows(batch.tiles), places, tile_size)
        hidden = model(token_ids, batch.positions, attend)
        tables = slots.page_tables.at[:, batch.slots].set(page_table, mode="drop")
        sampling, adapters = jax.tree.map(
            lambda kept, new: kept.at[batch.slots].set(new, mode="drop"),
            (slots.sampling, slots.adapters),
            (row_sampling, row_adapters),
        )
        token_ids, logprobs, vocab = self._sample(
            model,
            hidden[batch.last_tokens],
            batch.lengths,
            batch.sampling_slots,
            row_sampling,
            slots.vocab,
            batch,
        )
        last_token = slots.last_token.at[batch.sampling_slots].set(token_ids, mode="drop")
        result = StepResult(token_ids, logprobs, None, self._hidden(hidden, batch))
        state = DeviceState(attend.cache, SlotState(last_token, tables, sampling, adapters, vocab))
        return state, (result, hidden)

    def prompt_logprobs(self, weights: list[jax.Array], hidden: jax.Array, next_token_ids: jax.Array) -> LogprobRows:
        """Log-probabilities of `next_token_ids` `[T]` after `hidden` `[T, hidden]`, a block of positions at a time.

        A program of its own: within prefill, a GPU's host would wait for the device at each step to learn whether this
        loop is to run.
        """
        model = self._model(weights)
        block = min(PROMPT_LOGPROB_ROWS, len(hidden))
        padding = -len(hidden) % block

        def of_block(inputs: tuple[jax.Array, jax.Array]) -> LogprobRows:
            return log_probabilities(self._replicated(model.logits(inputs[0])), inputs[1], self._max_logprobs)

        blocks = jnp.pad(hidden, ((0, padding), (0, 0))).reshape(-1, block, hidden.shape[-1])
        targets = jnp.pad(next_token_ids, (0, padding)).reshape(-1, block)
        found = jax.lax.map(of_block, (blocks, targets))
        return jax.tree.map(lambda rows: rows.reshape(-1, *rows.shape[2:])[: len(hidden)], found)

    def put_adapter(
        self, adapters: dict[str, LowRank], own: dict[str, LowRank], place: jax.Array
    ) -> dict[str, LowRank]:
        """The adapters with one, `own`, in a place from 0 on."""
        return {
            layer: all_places.with_adapter(own[layer], place, count=self._num_adapters)
            for layer, all_places in adapters.items()
        }

    @staticmethod
    def load_vocab_row(vocab: VocabState, row: VocabRow) -> VocabState:
        """Put a sequence's penalties and bias into its slot."""
        return vocab._replace(
            prompt_tokens=vocab.prompt_tokens.at[row.slot].set(row.prompt_tokens),
            output_counts=vocab.output_counts.at[row.slot].set(row.output_counts),
            bias=vocab.bias.at[row.slot].set(row.bias),
        )

    @staticmethod
    def load_masks(vocab: VocabState, masks: Masks) -> VocabState:
        """Say which tokens may come next in some slots."""
        return vocab._replace(allowed=vocab.allowed.at[masks.slots].set(masks.allowed, mode="drop"))

    def _model(self, weights: list[jax.Array], adapters: jax.Array | None = None) -> Any:
        """The model, whose layers work on rows of these `adapters`, int32 `[rows]`."""
        parameters, low_ranks = jax.tree.unflatten(self._weights_tree, weights)
        model = nnx.merge(self._graph, parameters)
        if adapters is not None:
            adapt(model, low_ranks, adapters, count=self._num_adapters)
        return model

    def _with_new_pages(
        self, slots: SlotState, batch: PrefillArrays | DecodeArrays, last_positions: jax.Array
    ) -> SlotState:
        """`slots` with the pages in place that rows open with their last positions `[rows]`."""
        last_page = jnp.maximum(last_positions, 0) // self._page_size
        opens = jnp.where(batch.new_pages[0] >= 0, batch.slots, len(slots.last_token))
        tables = slots.page_tables.at[:, opens, last_page].set(batch.new_pages, mode="drop")
        return slots._replace(page_tables=tables)

    def _places(self, cache: KVCache, page_tables: jax.Array, owners: jax.Array, positions: jax.Array) -> Places:
        """Where tokens at `positions` go, those of the sequences whose pages are `page_tables[:, owners]`."""
        page_ids = page_tables[:, owners, jnp.maximum(positions, 0) // self._page_size]
        page_ids = jnp.where(positions >= 0, page_ids, cache.k[0].shape[0])  # outside the pool: padding writes nothing
        return Places(page_tables, page_ids, jnp.maximum(positions, 0) % self._page_size)

    def _attend(
        self, cache: KVCache, rows: DecodeRows | PrefillRows, places: Places, tile_size: int = 0
    ) -> PagedAttend:
        return PagedAttend(
            cache,
            self._layout,
            rows,
            places,
            mesh=self._mesh,
            implementation=self._attention_backend,
            tile_size=tile_size,
        )

    def _sample(
        self,
        model: Any,
        hidden: jax.Array,
        lengths: jax.Array,
        counted_slots: jax.Array,
        sampling: SamplingRows,
        vocab: VocabState,
        batch: PrefillArrays | DecodeArrays,
    ) -> tuple[jax.Array, LogprobRows, VocabState]:
        """Tokens after `hidden` `[rows, hidden]`, their log-probabilities, and the counts with these tokens in."""
        logits = self._replicated(model.logits(hidden))
        token_ids = sample(logits, lengths, batch.slots, sampling, batch.masked, vocab, batch.needs)
        logprobs = self._if_needed(
            batch.needs & Needs.LOGPROBS != 0, lambda: log_probabilities(logits, token_ids, self._max_logprobs)
        )
        counts = vocab.output_counts.at[counted_slots, token_ids].add(1, mode="drop")
        return token_ids, logprobs, vocab._replace(output_counts=counts)

    def _hidden(self, hidden: jax.Array, batch: PrefillArrays) -> HiddenRows:
        """What embeddings are made of."""

        def of_rows() -> HiddenRows:
            real = jnp.where(batch.positions >= 0, batch.rows, len(batch.slots))
            sums = jax.ops.segment_sum(hidden.astype(jnp.float32), real, len(batch.slots))
            return HiddenRows(self._replicated(sums), self._replicated(hidden[batch.last_tokens].astype(jnp.float32)))

        return self._if_needed(batch.needs & Needs.HIDDEN != 0, of_rows)

    @staticmethod
    def _if_needed[T](condition: jax.Array, compute: Callable[[], T]) -> T:
        """`compute()`, or zeros of the same shapes."""
        shapes = jax.eval_shape(compute)
        return jax.lax.cond(condition, compute, lambda: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes))

    def _replicated(self, logits: jax.Array) -> jax.Array:
        return jax.lax.with_sharding_constraint(logits, sharding(self._mesh, *PartitionSpec()))
