"""The contract between scheduling and JAX: a `StepBatch` goes to the runner, a `StepResult` comes back.

Both are plain records of numpy arrays, padded to bucketed sizes. What a running sequence needs at every step (its
newest token, page table row, sampling settings and adapter) stays on the device in its slot; a batch carries what
changed.
Padding has slot `max_num_seqs`, position -1 and page -1, and writes nothing.
"""

import enum
from typing import Any, NamedTuple

import numpy as np

from jaxserve.runner.buckets import PrefillBucket
from jaxserve.sampling_params import MAX_STOP_TOKEN_IDS

MASKS_AT_ONCE = 16  # put in place by one program
MASK_WORD_BITS = 32

Array = Any  # of numpy on the host; the same records hold JAX's on the device


def mask_words(vocab_size: int) -> int:
    """Words of a mask, which has a bit for each token id."""
    return -(-vocab_size // MASK_WORD_BITS)


class Needs(enum.IntFlag):
    """What of sampling a step has to do for at least one of its rows; a program skips the rest."""

    RANDOM = 1  # temperature above 0
    FILTER = 2  # top-k, top-p or min-p
    ADJUST = 4  # penalties, logit bias or min_tokens
    LOGPROBS = 8
    PROMPT_LOGPROBS = 16
    MASK = 32  # only some tokens may come next
    HIDDEN = 64  # hidden states, for embeddings


class SamplingRows(NamedTuple):
    """Sampling settings, one row a sequence."""

    temperature: Array  # float32 [rows]
    top_k: Array  # int32 [rows], 0 keeps all
    top_p: Array  # float32 [rows]
    min_p: Array  # float32 [rows]
    repetition_penalty: Array  # float32 [rows]
    presence_penalty: Array  # float32 [rows]
    frequency_penalty: Array  # float32 [rows]
    has_bias: Array  # bool [rows]
    seed: Array  # uint32 [rows, 2]
    min_length: Array  # int32 [rows]: tokens of prompt and completion before which no stop token may come
    stop_token_ids: Array  # int32 [rows, MAX_STOP_TOKEN_IDS], padded with -1

    @classmethod
    def empty(cls, rows: int) -> "SamplingRows":
        zeros, ones = np.zeros(rows, np.float32), np.ones(rows, np.float32)
        return cls(
            temperature=zeros.copy(),
            top_k=np.zeros(rows, np.int32),
            top_p=ones.copy(),
            min_p=zeros.copy(),
            repetition_penalty=ones.copy(),
            presence_penalty=zeros.copy(),
            frequency_penalty=zeros.copy(),
            has_bias=np.zeros(rows, bool),
            seed=np.zeros((rows, 2), np.uint32),
            min_length=np.zeros(rows, np.int32),
            stop_token_ids=np.full((rows, MAX_STOP_TOKEN_IDS), -1, np.int32),
        )


class VocabRow(NamedTuple):
    """What a slot keeps per vocabulary entry, for a sequence with penalties or a logit bias."""

    slot: Array  # int32 []
    prompt_tokens: Array  # bool [vocab]: in the prompt
    output_counts: Array  # int32 [vocab]: times in the completion so far
    bias: Array  # float32 [vocab]


class Masks(NamedTuple):
    """Which tokens may come next in some slots: a bit for each token id, `MASKS_AT_ONCE` slots at a time."""

    slots: Array  # int32 [MASKS_AT_ONCE]
    allowed: Array  # uint32 [MASKS_AT_ONCE, words]

    @classmethod
    def padding(cls, *, max_num_seqs: int, vocab_size: int) -> "Masks":
        """Masks of no slot."""
        words = mask_words(vocab_size)
        return cls(np.full(MASKS_AT_ONCE, max_num_seqs, np.int32), np.zeros((MASKS_AT_ONCE, words), np.uint32))


class PrefillArrays(NamedTuple):
    """`T` tokens of up to `R` sequences, one after the other on a flat axis.

    A row that continues has one token, the newest of its slot, as in a decode step: that token, its page table row, its
    sampling settings and its adapter are the slot's own, whatever stands here.
    """

    token_ids: Array  # int32 [T]
    positions: Array  # int32 [T]
    rows: Array  # int32 [T]: whose token it is
    next_token_ids: Array  # int32 [T]: what follows in the prompt, for its log-probability
    slots: Array  # int32 [R]
    sampling_slots: Array  # int32 [R]: the slot where this step reaches the sequence's end, else padding
    last_tokens: Array  # int32 [R]: flat index of each sequence's last token here
    lengths: Array  # int32 [R]: tokens of each sequence after this step
    page_table: Array  # int32 [groups of layers, R, max_pages]
    continues: Array  # bool [R]
    new_pages: Array  # int32 [groups of layers, R]: the page that a row's token opens if it continues, or -1
    tiles: Array  # int32 [4, tiles], as `prefill_tiles` makes them
    sampling: SamplingRows  # [R]
    adapters: Array  # int32 [R]: a running number from 1 on, or 0 for none
    masked: Array  # bool [R]: only the tokens of the slot's mask may come next
    needs: Array  # int32 []

    @classmethod
    def padding(cls, bucket: PrefillBucket, *, max_num_seqs: int, groups: int, max_pages: int) -> "PrefillArrays":
        """A batch of `bucket`'s sizes that does nothing."""
        tokens, rows = bucket.tokens, bucket.rows
        return cls(
            token_ids=np.zeros(tokens, np.int32),
            positions=np.full(tokens, -1, np.int32),
            rows=np.zeros(tokens, np.int32),
            next_token_ids=np.zeros(tokens, np.int32),
            slots=np.full(rows, max_num_seqs, np.int32),
            sampling_slots=np.full(rows, max_num_seqs, np.int32),
            last_tokens=np.zeros(rows, np.int32),
            lengths=np.zeros(rows, np.int32),
            page_table=np.full((groups, rows, max_pages), -1, np.int32),
            continues=np.zeros(rows, bool),
            new_pages=np.full((groups, rows), -1, np.int32),
            tiles=np.zeros((4, bucket.tiles), np.int32),
            sampling=SamplingRows.empty(rows),
            adapters=np.zeros(rows, np.int32),
            masked=np.zeros(rows, bool),
            needs=np.zeros((), np.int32),
        )


class DecodeArrays(NamedTuple):
    """Up to `steps` tokens, one after the other, for each of `B` slots."""

    slots: Array  # int32 [B]
    positions: Array  # int32 [B]: of the newest token, which goes in first
    counts: Array  # int32 [B]: tokens wanted at most; a stop token ends a row earlier
    new_pages: Array  # int32 [groups of layers, B]: the page that the last of these tokens opens, or -1
    masked: Array  # bool [B]: only the tokens of the slot's mask may come next
    steps: Array  # int32 []: the largest count
    needs: Array  # int32 []

    @classmethod
    def padding(cls, rows: int, *, max_num_seqs: int, groups: int) -> "DecodeArrays":
        """A batch of `rows` rows that does nothing."""
        return cls(
            slots=np.full(rows, max_num_seqs, np.int32),
            positions=np.full(rows, -1, np.int32),
            counts=np.zeros(rows, np.int32),
            new_pages=np.full((groups, rows), -1, np.int32),
            masked=np.zeros(rows, bool),
            steps=np.ones((), np.int32),
            needs=np.zeros((), np.int32),
        )


class StepBatch(NamedTuple):
    """One step. `vocab_rows` and `masks` are put in place before it; the first `num_rows` rows are not padding."""

    arrays: PrefillArrays | DecodeArrays
    vocab_rows: list[VocabRow]
    masks: list[Masks]
    num_rows: int


class LogprobRows(NamedTuple):
    """Log-probabilities of `[rows]` tokens and of the likeliest ones beside them, before any penalty."""

    logprob: Array  # float32 [rows]
    rank: Array  # int32 [rows], 1 is the likeliest
    top_token_ids: Array  # int32 [rows, max_logprobs]
    top_logprobs: Array  # float32 [rows, max_logprobs]


class HiddenRows(NamedTuple):
    """The model's last hidden states, after its final norm, of the tokens that a prefill step computed of each row."""

    sums: Array  # float32 [R, hidden]
    last: Array  # float32 [R, hidden]: of the last of these tokens


class StepResult(NamedTuple):
    """What one step sampled, a row for each row of the batch.

    Decode's tokens are `[max_decode_steps, B]`; what lies beyond a row's count or behind its stop token means nothing.
    """

    token_ids: Array  # int32 [R] or [max_decode_steps, B]
    logprobs: LogprobRows | None  # [R] or [B]
    prompt_logprobs: LogprobRows | None  # [T], of `next_token_ids`, where they are wanted
    hidden: HiddenRows | None  # [R], of a prefill step
