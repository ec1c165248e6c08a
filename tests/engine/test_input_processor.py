"""What is refused before it costs anything; what else is refused is in the tests of `LLM` and of the server."""

import pytest

from jaxserve import InputError, SamplingParams
from jaxserve.engine.input_processor import InputProcessor, Limits
from jaxserve.engine.scoring import scored_tokens


class Tokenizer:
    """Notes what it had to tokenise."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def get_vocab(self) -> dict[str, int]:
        return {"x": 0, "xxx": 1}

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        self.seen.append(text)
        return [1] * (len(text) // 3)


def test_a_text_that_cannot_fit_whatever_its_tokens_are_is_not_tokenised() -> None:
    tokenizer = Tokenizer()
    limits = Limits(vocab_size=2, max_model_len=5, max_logprobs=0, eos_token_ids=frozenset())
    inputs = InputProcessor(tokenizer, limits, None)
    with pytest.raises(
        InputError, match="the prompt has 16 characters and max_model_len is 5 tokens, of no more than 15"
    ):
        inputs.check("x" * 16, SamplingParams())
    with pytest.raises(InputError, match="the prompt has 16 characters"):
        scored_tokens(inputs.tokenize, "x" * 15, "x")
    assert not tokenizer.seen
    assert inputs.check("x" * 12, SamplingParams()).prompt_token_ids == [1] * 4
