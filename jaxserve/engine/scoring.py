"""How likely a model finds a text after another."""

import dataclasses
from collections.abc import Callable

from jaxserve.errors import InputError, Name
from jaxserve.outputs import RequestOutput
from jaxserve.sampling_params import SamplingParams

# The log-probability of each token of the prompt, and whether it is the likeliest.
SCORING = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1, detokenize=False)


@dataclasses.dataclass(frozen=True)
class Score:
    """How likely a continuation is: `score` is the sum of its tokens' log-probabilities."""

    score: float
    token_ids: list[int]  # of the continuation
    logprobs: list[float]
    is_greedy: bool  # whether each of them is the likeliest token in its place


def paired(prompts: list[str], continuations: list[str]) -> list[tuple[str, str]]:
    """Each continuation with its prompt, or all with the one that there is."""
    if len(prompts) == 1:
        prompts = prompts * len(continuations)
    if len(prompts) != len(continuations):
        raise InputError(
            Name("prompts"),
            f" has {len(prompts)} texts for {len(continuations)} of ",
            Name("continuations"),
            "; give one for each, or one for all",
        )
    return list(zip(prompts, continuations, strict=True))


def scored_tokens(tokenize: Callable[..., list[int]], prompt: str, continuation: str) -> tuple[list[int], int]:
    """The tokens of both texts together, and how many of them are the prompt's; `tokenize` is `InputProcessor`'s.

    White space between them belongs to the continuation, as words take the space before them into their tokens.
    """
    for text in (prompt, continuation):
        if not isinstance(text, str):
            raise InputError(f"a text to score is of type {type(text).__name__}; give strings")
    kept = prompt.rstrip()
    if not kept:
        raise InputError(Name("prompts"), f" holds {prompt[:60]!r}; give texts of more than white space")
    if not continuation:
        raise InputError(Name("continuations"), " holds ''; give non-empty texts")
    whole = tokenize(prompt + continuation, must_fit=True)
    count = len(tokenize(kept))
    if count >= len(whole):
        raise InputError(Name("continuations"), f" holds {continuation!r}, which adds no token; give a longer text")
    return whole, count


def read_score(output: RequestOutput, prompt_tokens: int) -> Score:
    """The score of all tokens but the first `prompt_tokens`, of what `SCORING` gave."""
    token_ids = output.prompt_token_ids[prompt_tokens:]
    positions = (output.prompt_logprobs or [])[prompt_tokens:]
    found = [position[token] for position, token in zip(positions, token_ids, strict=True) if position]
    return Score(
        sum(logprob.logprob for logprob in found),
        token_ids,
        [logprob.logprob for logprob in found],
        all(logprob.rank == 1 for logprob in found),
    )


def normalised(embedding: list[float]) -> list[float]:
    """The embedding at a length of one."""
    length = sum(number * number for number in embedding) ** 0.5
    return [number / length for number in embedding] if length else embedding
