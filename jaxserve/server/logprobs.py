"""Log-probabilities in OpenAI's shapes, and in vLLM's for those of prompts."""

from collections.abc import Sequence

from jaxserve.engine.detokenizer import TokenBytes
from jaxserve.outputs import Logprob, Logprobs
from jaxserve.server.protocol.base import PromptLogprob, PromptLogprobs
from jaxserve.server.protocol.chat import ChatLogprobs, TokenLogprob, TopLogprob
from jaxserve.server.protocol.completions import CompletionLogprobs

_LOWEST = -9999.0  # stands for minus infinity, which JSON lacks


def chat_logprobs(
    token_ids: Sequence[int], positions: Sequence[Logprobs], count: int, tokens: TokenBytes | None
) -> ChatLogprobs:
    """Each token with the `count` likeliest ones in its place."""

    def entry(token: int, found: Logprob) -> dict:
        # A part of a character has bytes of its own, and no text.
        data = None if tokens is None else [*tokens[token]]
        return {"token": found.decoded_token or "", "logprob": _finite(found), "bytes": data}

    content = []
    for token, position in zip(token_ids, positions, strict=True):
        likeliest = sorted(position.items(), key=lambda candidate: _rank(candidate[1]))
        top = [TopLogprob(**entry(*candidate)) for candidate in likeliest[:count] if _rank(candidate[1]) <= count]
        content.append(TokenLogprob(**entry(token, position[token]), top_logprobs=top))
    return ChatLogprobs(content=content)


def completion_logprobs(
    token_ids: Sequence[int],
    positions: Sequence[Logprobs | None],
    count: int,
    offset: int,
    tokens: TokenBytes | None,
    *,
    as_ids: bool = False,
) -> tuple[CompletionLogprobs, int]:
    """Each token with itself and the `count` likeliest ones; and where the text of what follows begins.

    The first one's text begins at `offset`. A position is None for a prompt's first token, which nothing comes before.
    With `as_ids`, tokens are named by their ids, `token_id:17`.
    """
    logprobs = CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
    for token, position in zip(token_ids, positions, strict=True):
        data = _bytes(token, tokens, begins=position is None)
        logprobs.tokens.append(_as_id(token) if as_ids else data.decode(errors="replace"))
        logprobs.text_offset.append(max(offset, 0))
        logprobs.token_logprobs.append(None if position is None else _finite(position[token]))
        logprobs.top_logprobs.append(None if position is None else _by_name(position, token, count, as_ids))
        offset += _characters(data)
    return logprobs, offset


def prompt_offset(token_ids: Sequence[int], text: str, tokens: TokenBytes | None) -> int:
    """Where a prompt's first token begins in its text: before that, if the tokenizer has put special ones there."""
    lengths = (_characters(_bytes(token, tokens, begins=place == 0)) for place, token in enumerate(token_ids))
    return len(text) - sum(lengths)


def prompt_logprobs(token_ids: Sequence[int], positions: Sequence[Logprobs | None], count: int) -> PromptLogprobs:
    """By position and token id: the prompt's own token and the `count` likeliest ones."""
    return [
        None
        if position is None
        else {
            candidate: PromptLogprob(logprob=_finite(found), rank=found.rank, decoded_token=found.decoded_token)
            for candidate, found in position.items()
            if candidate == token or _rank(found) <= count
        }
        for token, position in zip(token_ids, positions, strict=True)
    ]


def _bytes(token: int, tokens: TokenBytes | None, *, begins: bool) -> bytes:
    if tokens is None:
        return b""
    return tokens.first(token) if begins else tokens[token]


def _characters(data: bytes) -> int:
    """How many characters begin in it."""
    return sum(byte & 0xC0 != 0x80 for byte in data)


def _by_name(position: Logprobs, token: int, count: int, as_ids: bool) -> dict[str, float]:
    """Tokens of the same text are one entry: that of the likeliest."""
    entries: dict[str, float] = {}
    for candidate, found in position.items():
        if candidate == token or _rank(found) <= count:
            name = _as_id(candidate) if as_ids else found.decoded_token or ""
            entries[name] = max(entries.get(name, _LOWEST), _finite(found))
    return entries


def _as_id(token: int) -> str:
    return f"token_id:{token}"


def _rank(found: Logprob) -> int:
    return found.rank or 0


def _finite(found: Logprob) -> float:
    return max(found.logprob, _LOWEST)
