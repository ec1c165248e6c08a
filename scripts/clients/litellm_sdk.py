"""LiteLLM, by its providers for OpenAI's API, vLLM's and Anthropic's: completions, streaming, tools, embeddings."""

import asyncio
import json
import os
from typing import Any

import checks
from checks import MODEL, Server, equal, holds
from pydantic import BaseModel

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it asks GitHub for prices when it is imported
import litellm

QUESTION = [{"role": "user", "content": checks.QUESTION}]
CALL: dict[str, Any] = {
    "messages": [{"role": "user", "content": checks.WEATHER_ASKED}],
    "tools": [{"type": "function", "function": checks.WEATHER}],
}


class Person(BaseModel):
    name: str
    age: int


def asked(server: Server, provider: str = "openai") -> dict[str, Any]:
    address = server.address if provider == "anthropic" else f"{server.address}/v1"
    return {"model": f"{provider}/{MODEL}", "api_base": address, "api_key": "none", "temperature": 0}


def completion(server: Server) -> None:
    answer = litellm.completion(**asked(server), messages=QUESTION)
    equal("answer", answer.choices[0].message.content, checks.ANSWER)
    holds("the thinking is apart", "Paris" in answer.choices[0].message.reasoning_content)
    holds("tokens are counted", answer.usage.completion_tokens > 5)


def streaming(server: Server) -> None:
    stream = litellm.completion(**asked(server), messages=QUESTION, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    equal("streamed answer", text, checks.ANSWER)
    whole = litellm.stream_chunk_builder(chunks)
    equal("its own sum of the chunks", whole.choices[0].message.content, checks.ANSWER)


def tools(server: Server) -> None:
    answer = litellm.completion(**asked(server), **CALL)
    (call,) = answer.choices[0].message.tool_calls
    equal(
        "called", (call.function.name, json.loads(call.function.arguments)), ("get_weather", checks.WEATHER_ARGUMENTS)
    )
    result = {"role": "tool", "tool_call_id": call.id, "content": checks.WEATHER_RESULT}
    turns = [*CALL["messages"], answer.choices[0].message, result]
    again = litellm.completion(**asked(server), messages=turns, tools=CALL["tools"])
    equal("answer to the result", again.choices[0].message.content, checks.WEATHER_ANSWER)
    chunks = list(litellm.completion(**asked(server), **CALL, stream=True))
    (streamed,) = litellm.stream_chunk_builder(chunks).choices[0].message.tool_calls
    equal("streamed arguments", streamed.function.arguments, call.function.arguments)


def structured_output(server: Server) -> None:
    turn = {"role": "user", "content": "Anna is 37 years old. As JSON?"}
    answer = litellm.completion(**asked(server), messages=[turn], response_format=Person)
    Person.model_validate_json(answer.choices[0].message.content)


def embedding(server: Server) -> None:
    where = {name: value for name, value in asked(server).items() if name != "temperature"}
    answer = litellm.embedding(**where, input=[checks.ANSWER, "27 + 45 = 72"])
    expected = server.ask("/v1/embeddings", {"input": [checks.ANSWER]})["data"][0]["embedding"]
    apart = max(abs(a - b) for a, b in zip(answer.data[0]["embedding"], expected, strict=True))
    holds(f"it is the server's ({apart})", apart < 1e-3)


def text_completion(server: Server) -> None:
    prompt = {"prompt": "The old farmer carries", "max_tokens": 16}
    expected = server.ask("/v1/completions", prompt | {"temperature": 0})["choices"][0]["text"]
    where = asked(server, "text-completion-openai")
    equal("text", litellm.text_completion(**where, **prompt).choices[0].text, expected)


def by_vllms_provider(server: Server) -> None:
    answer = litellm.completion(**asked(server, "hosted_vllm"), messages=QUESTION, top_k=1, max_tokens=300)
    equal("answer", answer.choices[0].message.content, checks.ANSWER)


def by_anthropics_provider(server: Server) -> None:
    answer = litellm.completion(**asked(server, "anthropic"), messages=QUESTION, max_tokens=300)
    equal("answer", answer.choices[0].message.content, checks.ANSWER)


def responses(server: Server) -> None:
    answer = litellm.responses(**asked(server), input=checks.QUESTION)
    equal("answer", answer.output[-1].content[0].text, checks.ANSWER)


def side_by_side(server: Server) -> None:
    async def ask() -> list[str]:
        answers = await asyncio.gather(*(litellm.acompletion(**asked(server), messages=QUESTION) for _ in range(4)))
        return [answer.choices[0].message.content for answer in answers]

    equal("four answers", set(asyncio.run(ask())), {checks.ANSWER})


if __name__ == "__main__":
    checks.run(
        *(completion, streaming, tools, structured_output, embedding, text_completion),
        *(by_vllms_provider, by_anthropics_provider, responses, side_by_side),
    )
