"""One engine behind one real server, for all tests of the API."""

import contextlib
import socket
import threading
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import openai
import pytest
import uvicorn
from starlette.types import ASGIApp

from jaxserve import LLM, RequestOutput, SamplingParams
from jaxserve.engine.scoring import Score
from jaxserve.server.app import build_app
from tests.server.cases import (
    CAPITAL,
    COMPLETIONS,
    CONVERSATION,
    EMBEDDED,
    MODEL_NAME,
    NAMED_NEWS,
    SCORED,
    TOOLS,
    WEATHER_ASKED,
)
from tests.server.core_thread import core_thread


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def llm() -> Iterator[LLM]:
    with LLM(progress=False, max_num_seqs=4, max_num_batched_tokens=128, max_model_len=512, page_size=16) as llm:
        yield llm


@pytest.fixture(scope="session")
def offline(llm: LLM) -> dict[str, RequestOutput]:
    """What `LLM` makes of each of `COMPLETIONS`, of `CONVERSATION`, cut and whole, and of a question for a tool."""
    outputs = {
        name: llm.generate(prompt, SamplingParams(**settings))[0] for name, (prompt, settings) in COMPLETIONS.items()
    }
    answers = {
        "chat": llm.chat(CONVERSATION, SamplingParams(temperature=0, max_tokens=20)),
        "whole chat": llm.chat(CONVERSATION, SamplingParams(temperature=0, max_tokens=200)),
        "tools": llm.chat([WEATHER_ASKED], SamplingParams(temperature=0, max_tokens=200), tools=TOOLS),
        "structured chat": llm.chat(
            CONVERSATION, SamplingParams(temperature=0, max_tokens=200, structured_outputs={"json": CAPITAL})
        ),
        "named tool": llm.chat(
            CONVERSATION, SamplingParams(temperature=0, max_tokens=200), tools=TOOLS, tool_choice=NAMED_NEWS
        ),
    }
    return outputs | {name: output for name, (output,) in answers.items()}


@pytest.fixture(scope="session")
def embeddings(llm: LLM) -> dict[str, list[list[float]]]:
    """What `LLM` makes of `EMBEDDED`, by pooling."""
    return {pooling: llm.embed(EMBEDDED, pooling=pooling) for pooling in ("mean", "last")}


@pytest.fixture(scope="session")
def scores(llm: LLM) -> list[Score]:
    """What `LLM` makes of `SCORED`."""
    return llm.score(*SCORED)


@pytest.fixture(scope="session")
def server(llm: LLM, offline: dict[str, RequestOutput], embeddings: dict, scores: list[Score]) -> Iterator[str]:
    """The server's address. From here on, the engine belongs to the server's thread."""
    with core_thread(llm.engine) as core, serving(build_app(core.client, MODEL_NAME)) as address:
        yield address


@pytest.fixture(scope="session")
def client(server: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server, timeout=60) as client:
        yield client


@contextlib.contextmanager
def serving(app: ASGIApp, **settings: Any) -> Iterator[str]:
    """`app` behind uvicorn with these settings, on a free port of the loopback interface; its address."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", **settings))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture
def sdk(server: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0) as sdk:
        yield sdk


@pytest.fixture
def claude(server: str) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server, api_key="none", max_retries=0) as sdk:
        yield sdk
