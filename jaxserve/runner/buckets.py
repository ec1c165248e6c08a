"""The padded sizes that programs are compiled for. Plain Python: the scheduler's side reads them too."""

import bisect
import dataclasses
from typing import NamedTuple

# XLA's fast bf16 products on the CPU start at about four rows, and a GPU's tensor cores waste what is below eight.
MIN_DECODE_ROWS = 4  # where products have no kernel of their own
MIN_PREFILL_TOKENS = 32
TOKENS_PER_PREFILL_ROW = 8  # a prefill bucket has room for that many times fewer sequences than tokens
TILE_SIZE = 64


class PrefillBucket(NamedTuple):
    """A prefill program's sizes: tokens on the flat axis, sequences, and tokens in one query tile of attention."""

    tokens: int
    rows: int
    tile_size: int

    @property
    def tiles(self) -> int:
        """The most tiles that the tokens of all rows can fall into."""
        return self.tokens // self.tile_size + self.rows


@dataclasses.dataclass(frozen=True)
class Buckets:
    """All sizes of one engine, ascending."""

    prefill: tuple[PrefillBucket, ...]
    decode: tuple[int, ...]
    max_num_seqs: int
    max_pages: int  # entries of a page table row
    mixed: bool  # whether running sequences' next tokens are computed in prefill steps too

    @classmethod
    def of(
        cls,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        page_size: int,
        min_decode_rows: int = MIN_DECODE_ROWS,
        smallest_tile: int = 1,
        mixed: bool = False,
    ) -> "Buckets":
        """`smallest_tile`: what query tiles of prefill attention have at least, even in buckets of fewer tokens.

        Where steps are to be `mixed`, they are if the largest has room for every sequence's token and a prompt's.
        """
        mixed = mixed and max_num_batched_tokens >= max_num_seqs + MIN_PREFILL_TOKENS
        per_row = 1 if mixed else TOKENS_PER_PREFILL_ROW
        tokens = _doubling(MIN_PREFILL_TOKENS, max_num_batched_tokens)
        return cls(
            tuple(
                PrefillBucket(t, min(max_num_seqs, -(-t // per_row)), max(smallest_tile, min(t, TILE_SIZE)))
                for t in tokens
            ),
            _doubling(min_decode_rows, max_num_seqs),
            max_num_seqs,
            -(-max_model_len // page_size),
            mixed,
        )

    @property
    def max_prefill_rows(self) -> int:
        return self.prefill[-1].rows

    def prefill_for(self, tokens: int, rows: int) -> PrefillBucket:
        """The smallest prefill bucket with room for both."""
        return next(bucket for bucket in self.prefill if bucket.tokens >= tokens and bucket.rows >= rows)

    def decode_for(self, rows: int) -> int:
        """The smallest decode bucket with room for `rows`."""
        return self.decode[bisect.bisect_left(self.decode, rows)]


def _doubling(smallest: int, largest: int) -> tuple[int, ...]:
    """`smallest`, doubled until `largest` is reached, which ends the list whatever it is."""
    sizes = []
    while smallest < largest:
        sizes.append(smallest)
        smallest *= 2
    return (*sizes, max(largest, sizes[-1] if sizes else smallest))
