"""OpenAI's client, synchronous and asynchronous: completions, chat, tools, structured output, responses, embeddings."""

import asyncio
import functools
import json
from typing import Any

import checks
import openai
from checks import MODEL, Server, equal, holds
from pydantic import BaseModel

PROMPT: dict[str, Any] = {"model": MODEL, "prompt": "The old farmer carries", "max_tokens": 24, "temperature": 0}
CHAT: dict[str, Any] = {
    "model": MODEL,
    "messages": [{"role": "user", "content": checks.QUESTION}],
    "temperature": 0,
}
CALL = CHAT | {
    "messages": [{"role": "user", "content": checks.WEATHER_ASKED}],
    "tools": [{"type": "function", "function": checks.WEATHER}],
}
RESPONSE: dict[str, Any] = {"model": MODEL, "input": checks.QUESTION, "temperature": 0}
RESPONSE_CALL = RESPONSE | {
    "input": checks.WEATHER_ASKED,
    "tools": [{"type": "function", "strict": False} | checks.WEATHER],
}


class Person(BaseModel):
    name: str
    age: int


class Shop(BaseModel):
    owner: Person
    open: bool


def sdk(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0, timeout=300)


def async_sdk(server: Server) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0, timeout=300)


def models(server: Server) -> None:
    equal("ids", [model.id for model in sdk(server).models.list()], [MODEL])
    equal("the model by its name", sdk(server).models.retrieve(MODEL).id, MODEL)


def completion(server: Server) -> None:
    whole = sdk(server).completions.create(**PROMPT, logprobs=2, seed=1)
    equal("completion tokens", whole.usage.completion_tokens, len(whole.choices[0].logprobs.tokens))
    equal("its tokens' text", "".join(whole.choices[0].logprobs.tokens), whole.choices[0].text)
    several = sdk(server).completions.create(**PROMPT | {"prompt": [PROMPT["prompt"]] * 2, "n": 2})
    equal("texts of two prompts, twice", {choice.text for choice in several.choices}, {whole.choices[0].text})
    equal("choices", [choice.index for choice in several.choices], [0, 1, 2, 3])


def completion_streamed(server: Server) -> None:
    whole = sdk(server).completions.create(**PROMPT)
    *chunks, last = sdk(server).completions.create(**PROMPT, stream=True, stream_options={"include_usage": True})
    equal("streamed text", "".join(chunk.choices[0].text for chunk in chunks), whole.choices[0].text)
    equal("usage", last.usage, whole.usage)


def chat(server: Server) -> None:
    whole = sdk(server).chat.completions.create(**CHAT, logprobs=True, top_logprobs=3)
    equal("answer", whole.choices[0].message.content, checks.ANSWER)
    holds("the thinking is apart", "Paris" in whole.choices[0].message.reasoning_content)
    holds("three tokens beside each", all(len(token.top_logprobs) == 3 for token in whole.choices[0].logprobs.content))
    again = [*CHAT["messages"], whole.choices[0].message, {"role": "user", "content": "Thank you!"}]
    holds("it goes on", sdk(server).chat.completions.create(**CHAT | {"messages": again}).choices[0].message.content)


def chat_streamed(server: Server) -> None:
    stream = sdk(server).chat.completions.create(**CHAT, stream=True, stream_options={"include_usage": True})
    *chunks, last = stream
    equal("streamed answer", "".join(chunk.choices[0].delta.content or "" for chunk in chunks), checks.ANSWER)
    equal("usage", last.usage, sdk(server).chat.completions.create(**CHAT).usage)
    with sdk(server).chat.completions.stream(**CHAT) as helper:
        text = "".join(event.delta for event in helper if event.type == "content.delta")
        equal("the helper's text", text, checks.ANSWER)
        equal("the helper's answer", helper.get_final_completion().choices[0].message.content, checks.ANSWER)


def tools(server: Server) -> None:
    whole = sdk(server).chat.completions.create(**CALL)
    equal("finish reason", whole.choices[0].finish_reason, "tool_calls")
    message = whole.choices[0].message
    (call,) = message.tool_calls
    equal(
        "called", (call.function.name, json.loads(call.function.arguments)), ("get_weather", checks.WEATHER_ARGUMENTS)
    )
    result = {"role": "tool", "tool_call_id": call.id, "content": checks.WEATHER_RESULT}
    turns = [*CALL["messages"], message, result]
    answer = sdk(server).chat.completions.create(**CALL | {"messages": turns})
    equal("answer to the result", answer.choices[0].message.content, checks.WEATHER_ANSWER)


def tools_streamed(server: Server) -> None:
    (call,) = sdk(server).chat.completions.create(**CALL).choices[0].message.tool_calls
    parts = [
        part
        for chunk in sdk(server).chat.completions.create(**CALL, stream=True)
        for part in chunk.choices[0].delta.tool_calls or []
    ]
    equal("name", parts[0].function.name, call.function.name)
    arguments = "".join(part.function.arguments or "" for part in parts)
    equal("streamed arguments", arguments, call.function.arguments)
    with sdk(server).chat.completions.stream(**CALL) as helper:
        (helped,) = helper.get_final_completion().choices[0].message.tool_calls
    equal("the helper's arguments", helped.function.arguments, call.function.arguments)


def structured_parse(server: Server) -> None:
    asked = CHAT | {"messages": [{"role": "user", "content": "The shop is open. Anna, 37, owns it. As JSON?"}]}
    answer = sdk(server).chat.completions.parse(**asked, response_format=Shop)
    holds("the answer is a Shop", isinstance(answer.choices[0].message.parsed, Shop))
    with sdk(server).chat.completions.stream(**asked, response_format=Shop) as helper:
        equal("streamed", helper.get_final_completion().choices[0].message.parsed, answer.choices[0].message.parsed)


def strict_tools_parsed(server: Server) -> None:
    tool = openai.pydantic_function_tool(Person, name="keep_person", description="Keep a person")
    asked = CALL | {"tools": [tool], "tool_choice": "required"}
    (call,) = sdk(server).chat.completions.parse(**asked).choices[0].message.tool_calls
    holds("the arguments are a Person", isinstance(call.function.parsed_arguments, Person))


def side_by_side(server: Server) -> None:
    async def ask() -> list[str]:
        async with async_sdk(server) as client:

            async def streamed() -> str:
                stream = await client.chat.completions.create(**CHAT, stream=True)
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            whole = await asyncio.gather(*(client.chat.completions.create(**CHAT) for _ in range(4)))
            texts = [answer.choices[0].message.content for answer in whole]
            return texts + await asyncio.gather(*(streamed() for _ in range(4)))

    equal("eight answers", set(asyncio.run(ask())), {checks.ANSWER})


def responses(server: Server) -> None:
    whole = sdk(server).responses.create(**RESPONSE)
    equal("answer", (whole.status, whole.output_text), ("completed", checks.ANSWER))
    equal("items", [item.type for item in whole.output], ["reasoning", "message"])
    equal("kept", sdk(server).responses.retrieve(whole.id), whole)
    after = sdk(server).responses.create(model=MODEL, input="Thank you!", previous_response_id=whole.id)
    holds("it goes on", after.output_text and after.previous_response_id == whole.id)
    sdk(server).responses.delete(whole.id)


def responses_streamed(server: Server) -> None:
    with sdk(server).responses.stream(**RESPONSE) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        equal("streamed text", text, checks.ANSWER)
        equal("the final response's", stream.get_final_response().output_text, checks.ANSWER)


def responses_with_tools(server: Server) -> None:
    whole = sdk(server).responses.create(**RESPONSE_CALL)
    (call,) = [item for item in whole.output if item.type == "function_call"]
    equal("called", (call.name, json.loads(call.arguments)), ("get_weather", checks.WEATHER_ARGUMENTS))
    result = {"type": "function_call_output", "call_id": call.call_id, "output": checks.WEATHER_RESULT}
    answer = sdk(server).responses.create(**RESPONSE_CALL | {"input": [result]}, previous_response_id=whole.id)
    equal("answer to the result", answer.output_text, checks.WEATHER_ANSWER)
    with sdk(server).responses.stream(**RESPONSE_CALL) as stream:
        (streamed,) = [item for item in stream.get_final_response().output if item.type == "function_call"]
    equal("streamed arguments", streamed.arguments, call.arguments)


def responses_parsed(server: Server) -> None:
    asked = RESPONSE | {"input": "The shop is open. Anna, 37, owns it. As JSON?"}
    answer = sdk(server).responses.parse(**asked, text_format=Shop)
    holds("the answer is a Shop", isinstance(answer.output_parsed, Shop))


def responses_side_by_side(server: Server) -> None:
    async def ask() -> list[str]:
        async with async_sdk(server) as client:
            answers = await asyncio.gather(*(client.responses.create(**RESPONSE) for _ in range(4)))
            return [answer.output_text for answer in answers]

    equal("four answers", set(asyncio.run(ask())), {checks.ANSWER})


def embeddings(server: Server) -> None:
    texts = [checks.ANSWER, "27 + 45 = 72"]
    packed = sdk(server).embeddings.create(model=MODEL, input=texts)  # asks for base64, and unpacks it
    plain = sdk(server).embeddings.create(model=MODEL, input=texts, encoding_format="float")
    for one, other in zip(packed.data, plain.data, strict=True):
        apart = max(abs(a - b) for a, b in zip(one.embedding, other.embedding, strict=True))
        holds(f"both encodings agree ({apart})", apart < 1e-3)


def errors(server: Server) -> None:
    for error, fields, said in (
        (openai.NotFoundError, {"model": "gpt-4"}, "gpt-4"),
        (openai.BadRequestError, {"temperature": -1}, "temperature"),
        (
            openai.BadRequestError,
            {"stream": True, "messages": [{"role": "user", "content": "a b " * 2000}]},
            "max_model_len",
        ),
    ):
        checks.refused(fields, error, said, functools.partial(sdk(server).chat.completions.create, **CHAT | fields))


if __name__ == "__main__":
    checks.run(
        *(models, completion, completion_streamed, chat, chat_streamed, tools, tools_streamed),
        *(structured_parse, strict_tools_parsed, side_by_side),
        *(responses, responses_streamed, responses_with_tools, responses_parsed, responses_side_by_side),
        *(embeddings, errors),
    )
