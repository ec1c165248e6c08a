"""The contract between scheduling and JAX: a `StepBatch` goes to the runner, a `StepResult` comes back.

Both are plain records of numpy arrays, padded to bucketed sizes. What a running sequence needs at every step (its
newest token, page table row and sampling settings) stays on the device in its slot; a batch carries what changed.
Padding has slot `max_num_seqs`, position -1 and page -1, and writes nothing.
"""

import enum
from typing import NamedTuple

import numpy as np

from jaxserve.sampling_params import MAX_STOP_TOKEN_IDS


class Needs(enum.IntFlag):
    """What of sampling a step has to do for at least one of its rows; a program skips the rest."""

    RANDOM = 1  # temperature above 0
    FILTER = 2  # top-k, top-p or min-p
    ADJUST = 4  # penalties, logit bias or min_tokens
    LOGPROBS = 8
    PROMPT_LOGPROBS = 16


class SamplingRows(NamedTuple):
    """Sampling settings, one row a sequence."""

    temperature: np.ndarray  # float32 [rows]
    top_k: np.ndarray  # int32 [rows], 0 keeps all
    top_p: np.ndarray  # float32 [rows]
    min_p: np.ndarray  # float32 [rows]
    repetition_penalty: np.ndarray  # float32 [rows]
    presence_penalty: np.ndarray  # float32 [rows]
    frequency_penalty: np.ndarray  # float32 [rows]
    has_bias: np.ndarray  # bool [rows]
    seed: np.ndarray  # uint32 [rows, 2]
    min_length: np.ndarray  # int32 [rows]: tokens of prompt and completion before which no stop token may come
    stop_token_ids: np.ndarray  # int32 [rows, MAX_STOP_TOKEN_IDS], padded with -1

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

    slot: np.ndarray  # int32 []
    prompt_tokens: np.ndarray  # bool [vocab]: in the prompt
    output_counts: np.ndarray  # int32 [vocab]: times in the completion so far
    bias: np.ndarray  # float32 [vocab]


class PrefillArrays(NamedTuple):
    """`T` tokens of up to `R` sequences, one after the other on a flat axis."""

    token_ids: np.ndarray  # int32 [T]
    positions: np.ndarray  # int32 [T]
    rows: np.ndarray  # int32 [T]: whose token it is
    next_token_ids: np.ndarray  # int32 [T]: what follows in the prompt, for its log-probability
    slots: np.ndarray  # int32 [R]
    sampling_slots: np.ndarray  # int32 [R]: the slot where this step reaches the sequence's end, else padding
    last_tokens: np.ndarray  # int32 [R]: flat index of each sequence's last token here
    lengths: np.ndarray  # int32 [R]: tokens of each sequence after this step
    page_table: np.ndarray  # int32 [R, max_pages]
    tiles: np.ndarray  # int32 [4, tiles], as `prefill_tiles` makes them
    sampling: SamplingRows  # [R]
    needs: np.ndarray  # int32 []


class DecodeArrays(NamedTuple):
    """One token for each of `B` slots."""

    slots: np.ndarray  # int32 [B]
    positions: np.ndarray  # int32 [B]: of the newest token, which goes in
    new_pages: np.ndarray  # int32 [B]: the page that this position opens, or -1
    needs: np.ndarray  # int32 []


class StepBatch(NamedTuple):
    """One step. `vocab_rows` are put in place before it; the first `num_rows` rows are not padding."""

    arrays: PrefillArrays | DecodeArrays
    vocab_rows: list[VocabRow]
    num_rows: int


class LogprobRows(NamedTuple):
    """Log-probabilities of `[rows]` tokens and of the likeliest ones beside them, before any penalty."""

    logprob: np.ndarray  # float32 [rows]
    rank: np.ndarray  # int32 [rows], 1 is the likeliest
    top_token_ids: np.ndarray  # int32 [rows, max_logprobs]
    top_logprobs: np.ndarray  # float32 [rows, max_logprobs]


class StepResult(NamedTuple):
    """What one step sampled, a row for each row of the batch."""

    token_ids: np.ndarray  # int32 [R] or [B]
    logprobs: LogprobRows | None  # [R] or [B]
    prompt_logprobs: LogprobRows | None  # [T], of `next_token_ids`
