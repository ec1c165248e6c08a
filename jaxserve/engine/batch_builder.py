"""From the scheduler's decisions to the arrays of a step."""

from collections.abc import Sequence

import numpy as np

from jaxserve.engine.request import Request
from jaxserve.engine.scheduler import Chunk, Decode, Prefill
from jaxserve.runner.buckets import Buckets
from jaxserve.runner.step_batch import (
    MASKS_AT_ONCE,
    DecodeArrays,
    Masks,
    Needs,
    PrefillArrays,
    SamplingRows,
    StepBatch,
    VocabRow,
)
from jaxserve.sampling_params import SamplingParams
from pallas_kernels.xla.tiles import prefill_tiles


class StepBatchBuilder:
    """Packs steps into padded arrays of the buckets' sizes."""

    def __init__(self, buckets: Buckets, *, vocab_size: int, page_groups: int):
        self._buckets = buckets
        self._vocab_size = vocab_size
        self._page_groups = page_groups

    def build(self, step: Prefill | Decode) -> StepBatch:
        return self._prefill(step.chunks, step.decode) if isinstance(step, Prefill) else self._decode(step)

    def _prefill(self, chunks: list[Chunk], decode: Decode | None) -> StepBatch:
        counts = np.array([chunk.count for chunk in chunks])
        positions = np.array([chunk.start for chunk in chunks])
        if decode:
            counts, positions = np.append(counts, decode.counts), np.append(positions, decode.positions)
        starts = np.append(0, np.cumsum(counts))
        bucket = self._buckets.prefill_for(int(starts[-1]), len(counts))
        arrays = PrefillArrays.padding(
            bucket,
            max_num_seqs=self._buckets.max_num_seqs,
            groups=self._page_groups,
            max_pages=self._buckets.max_pages,
        )
        arrays.tiles[:] = prefill_tiles(starts[:-1], counts, positions, bucket.tile_size, bucket.tiles)
        needs, vocab_rows = Needs(decode.needs if decode else 0), []
        if decode:
            rows, tokens = slice(len(chunks), len(counts)), slice(starts[len(chunks)], starts[-1])
            arrays.positions[tokens] = decode.positions
            arrays.rows[tokens] = np.arange(rows.start, rows.stop)
            arrays.last_tokens[rows] = np.arange(tokens.start, tokens.stop)
            arrays.lengths[rows] = decode.positions + 1
            arrays.slots[rows] = arrays.sampling_slots[rows] = decode.slots
            arrays.new_pages[:, rows] = decode.new_pages
            arrays.continues[rows] = True
        for row, (chunk, begin, end) in enumerate(zip(chunks, starts, starts[1:], strict=False)):
            request, stop = chunk.request, chunk.start + chunk.count
            arrays.token_ids[begin:end] = request.token_ids(chunk.start, stop)
            arrays.positions[begin:end] = np.arange(chunk.start, stop)
            arrays.rows[begin:end] = row
            following = request.prompt_token_ids[chunk.start + 1 : stop + 1]
            arrays.next_token_ids[begin : begin + len(following)] = following
            arrays.slots[row] = request.slot
            if chunk.samples:
                arrays.sampling_slots[row] = request.slot
            arrays.last_tokens[row] = end - 1
            arrays.lengths[row] = stop
            for group, pages in enumerate(request.pages):
                arrays.page_table[group, row, : len(pages)] = pages
            _fill_sampling(arrays.sampling, row, request)
            arrays.adapters[row] = request.adapter
            needs |= Needs(request.needs)
            if request.params.prompt_logprobs is not None:
                needs |= Needs.PROMPT_LOGPROBS
            if chunk.first and _keeps_vocab_row(request.params):
                vocab_rows.append(self._vocab_row(request))
        sampled = [chunk.request if chunk.samples else None for chunk in chunks]
        if decode and decode.needs & Needs.MASK:
            sampled += decode.requests
        masks = self._masks(sampled, arrays.masked)
        return StepBatch(arrays._replace(needs=_with_masks(needs, masks)), vocab_rows, masks, len(counts))

    def _decode(self, step: Decode) -> StepBatch:
        count = len(step.slots)
        arrays = DecodeArrays.padding(
            self._buckets.decode_for(count), max_num_seqs=self._buckets.max_num_seqs, groups=self._page_groups
        )
        for name in ("slots", "positions", "counts", "new_pages"):
            getattr(arrays, name)[..., :count] = getattr(step, name)
        masks = self._masks(step.requests, arrays.masked) if step.needs & Needs.MASK else []
        needs = _with_masks(step.needs, masks)
        return StepBatch(arrays._replace(steps=np.int32(step.steps), needs=needs), [], masks, count)

    def _masks(self, requests: Sequence[Request | None], masked: np.ndarray) -> list[Masks]:
        """What may come next in the rows of constrained requests, which are noted in `masked` `[rows]`."""
        batches: list[Masks] = []
        filled = MASKS_AT_ONCE
        for row, request in enumerate(requests):
            if request is None or request.constraint is None:
                continue
            if filled == MASKS_AT_ONCE:
                sizes = {"max_num_seqs": self._buckets.max_num_seqs, "vocab_size": self._vocab_size}
                batches.append(Masks.padding(**sizes))
                filled = 0
            masks = batches[-1]
            if request.constraint.allow(masks.allowed[filled]):
                masks.slots[filled] = request.slot
                masked[row] = True
                filled += 1
        return batches if masked.any() else []

    def _vocab_row(self, request: Request) -> VocabRow:
        prompt_tokens = np.zeros(self._vocab_size, bool)
        prompt_tokens[request.prompt_token_ids] = True
        params = request.params
        bias = np.zeros(self._vocab_size, np.float32)
        for token, value in (params.logit_bias or {}).items():
            bias[token] = value
        if params.allowed_token_ids is not None:
            allowed = np.zeros(self._vocab_size, bool)
            allowed[list(params.allowed_token_ids)] = True
            bias[~allowed] = -np.inf
        counts = np.bincount(request.output_token_ids, minlength=self._vocab_size).astype(np.int32)
        return VocabRow(np.int32(request.slot), prompt_tokens, counts, bias)


def _with_masks(needs: int, masks: list[Masks]) -> np.int32:
    """Constrained requests may be in a step that masks nothing: while they think, say."""
    return np.int32(needs & ~Needs.MASK | (Needs.MASK if masks else 0))


def _keeps_vocab_row(params: SamplingParams) -> bool:
    penalised = params.repetition_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0
    return penalised or _has_bias(params)


def _has_bias(params: SamplingParams) -> bool:
    return bool(params.logit_bias) or params.allowed_token_ids is not None


def sampling_needs(params: SamplingParams) -> Needs:
    """What a step has to do for a row with these settings."""
    needs = Needs(0)
    if params.temperature > 0:
        needs |= Needs.RANDOM
        if params.top_k or params.top_p < 1 or params.min_p > 0:
            needs |= Needs.FILTER
    if _keeps_vocab_row(params) or params.min_tokens:
        needs |= Needs.ADJUST
    if params.logprobs is not None:
        needs |= Needs.LOGPROBS
    if params.constrained:
        needs |= Needs.MASK
    if params.pooling:
        needs |= Needs.HIDDEN
    return needs


def _fill_sampling(rows: SamplingRows, row: int, request: Request) -> None:
    params = request.params
    for name in (
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
    ):
        getattr(rows, name)[row] = getattr(params, name)
    rows.has_bias[row] = _has_bias(params)
    rows.seed[row] = request.seed & 0xFFFFFFFF, (request.seed >> 32) & 0xFFFFFFFF
    rows.min_length[row] = len(request.prompt_token_ids) + params.min_tokens
    rows.stop_token_ids[row, : len(request.stop_token_ids)] = sorted(request.stop_token_ids)
