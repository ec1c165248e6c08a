"""One small engine on the demo model for all tests of a module."""

import contextlib
from collections.abc import Callable, Iterator

import pytest

from jaxserve import LLM
from jaxserve.cli import chat, generate

# As few and as small programs as will do: compiling them is most of the time that these tests take.
SETTINGS = {"max_num_seqs": 4, "max_num_batched_tokens": 64, "max_model_len": 512, "page_size": 16}
FLAGS = [word for name, value in SETTINGS.items() for word in (f"--{name.replace('_', '-')}", str(value))]


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(**SETTINGS, progress=False) as llm:
        yield llm


@pytest.fixture
def started(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> LLM:
    """`generate` and `chat` find this engine started."""
    start: Callable = lambda config: contextlib.nullcontext(llm)  # noqa: E731
    monkeypatch.setattr(generate, "start_llm", start)
    monkeypatch.setattr(chat, "start_llm", start)
    return llm
