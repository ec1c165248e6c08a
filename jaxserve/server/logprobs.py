"""Log-probabilities in OpenAI's shapes, and in vLLM's for those of prompts."""

from collections.abc import Callable, Sequence

from jaxserve.outputs import Logprob, Logprobs
from jaxserve.server.protocol.base import PromptLogprob, PromptLogprobs
from jaxserve.server.protocol.chat import ChatLogprobs, TokenLogprob, TopLogprob
from jaxserve.server.protocol.completions import CompletionLogprobs

_LOWEST = -9999.0  # stands for minus infinity, which JSON lacks


def chat_logprobs(token_ids: Sequence[int], positions: Sequence[Logprobs], count: int) -> ChatLogprobs:
    """Each token with the `count` likeliest ones in its place."""
    content = []
    for token, position in zip(token_ids, positions, strict=True):
        likeliest = sorted((found for found in position.values() if _rank(found) <= count), key=_rank)
        top = [TopLogprob(**_chat_entry(found)) for found in likeliest[:count]]
        content.append(TokenLogprob(**_chat_entry(position[token]), top_logprobs=top))
    return ChatLogprobs(content=content)


def completion_logprobs(
    token_ids: Sequence[int],
    positions: Sequence[Logprobs | None],
    count: int,
    offset: int,
    decode: Callable[[Sequence[int]], str],
    *,
    as_ids: bool = False,
) -> tuple[CompletionLogprobs, int]:
    """Each token with itself and the `count` likeliest ones; and where the text of what follows begins.

    The first one's text begins at `offset`. A position is None for a prompt's first token, which nothing comes before;
    `decode` then finds its text. With `as_ids`, tokens are named by their ids, `token_id:17`.
    """
    logprobs = CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
    for token, position in zip(token_ids, positions, strict=True):
        text = decode([token]) if position is None else position[token].decoded_token or ""
        logprobs.tokens.append(_as_id(token) if as_ids else text)
        logprobs.text_offset.append(offset)
        logprobs.token_logprobs.append(None if position is None else _finite(position[token]))
        logprobs.top_logprobs.append(None if position is None else _by_name(position, token, count, as_ids))
        offset += len(text)
    return logprobs, offset


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


def _chat_entry(found: Logprob) -> dict:
    text = found.decoded_token or ""
    # A token that is part of a character has no text of its own, and what it decodes to does not have its bytes.
    return {
        "token": text,
        "logprob": _finite(found),
        "bytes": None if "\N{REPLACEMENT CHARACTER}" in text else [*text.encode()],
    }


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
