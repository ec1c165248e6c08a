"""Anthropic's client: messages, streaming, thinking, tools, structured output, counted tokens."""

import asyncio
import functools
from typing import Any

import anthropic
import checks
from checks import MODEL, Server, equal, holds
from pydantic import BaseModel

CHAT: dict[str, Any] = {
    "model": MODEL,
    "max_tokens": 300,
    "messages": [{"role": "user", "content": checks.QUESTION}],
}
CALL = CHAT | {
    "messages": [{"role": "user", "content": checks.WEATHER_ASKED}],
    "tools": [
        {
            "name": checks.WEATHER["name"],
            "description": checks.WEATHER["description"],
            "input_schema": checks.WEATHER["parameters"],
        }
    ],
}


class Person(BaseModel):
    name: str
    age: int


def sdk(server: Server) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=server.address, api_key="none", max_retries=0, timeout=300)


def messages(server: Server) -> None:
    answer = sdk(server).messages.create(**CHAT, system="Be brief.")
    equal("answer", (answer.stop_reason, answer.content[-1].text), ("end_turn", checks.ANSWER))
    holds("tokens are counted", answer.usage.input_tokens + answer.usage.cache_read_input_tokens > 10)
    stopped = sdk(server).messages.create(**CHAT, stop_sequences=["ris"])
    equal("stopped by", (stopped.stop_reason, stopped.stop_sequence), ("stop_sequence", "ris"))


def messages_streamed(server: Server) -> None:
    with sdk(server).messages.stream(**CHAT) as stream:
        equal("streamed text", "".join(stream.text_stream), checks.ANSWER)
        final = stream.get_final_message()
    whole = sdk(server).messages.create(**CHAT)
    equal("blocks", [block.to_dict() for block in final.content], [block.to_dict() for block in whole.content])
    equal("output tokens", final.usage.output_tokens, whole.usage.output_tokens)


def thinking(server: Server) -> None:
    thought, text = sdk(server).messages.create(**CHAT, thinking={"type": "adaptive"}).content
    equal("blocks", (thought.type, text.type), ("thinking", "text"))
    with sdk(server).messages.stream(**CHAT, thinking={"type": "adaptive"}) as stream:
        pieces = [event.thinking for event in stream if event.type == "thinking"]
    equal("streamed thinking", "".join(pieces), thought.thinking)
    turns = [
        *CHAT["messages"],
        {"role": "assistant", "content": [thought, text]},
        {"role": "user", "content": "Thanks!"},
    ]
    holds("thinking may be sent back", sdk(server).messages.create(**CHAT | {"messages": turns}).content)
    without = sdk(server).messages.create(**CHAT, thinking={"type": "disabled"})
    equal("blocks without thinking", [block.type for block in without.content], ["text"])


def thinking_with_a_budget(server: Server) -> None:
    asked = CHAT | {"max_tokens": 1500}
    answer = sdk(server).messages.create(**asked, thinking={"type": "enabled", "budget_tokens": 1024})
    equal("answer", answer.content[-1].text, checks.ANSWER)


def tools(server: Server) -> None:
    answer = sdk(server).messages.create(**CALL)
    equal("stop reason", answer.stop_reason, "tool_use")
    use = answer.content[-1]
    equal("used", (use.name, use.input), ("get_weather", checks.WEATHER_ARGUMENTS))
    result = {"type": "tool_result", "tool_use_id": use.id, "content": checks.WEATHER_RESULT}
    turns = [*CALL["messages"], {"role": "assistant", "content": answer.content}, {"role": "user", "content": [result]}]
    again = sdk(server).messages.create(**CALL | {"messages": turns})
    equal("answer to the result", again.content[-1].text, checks.WEATHER_ANSWER)


def tools_streamed(server: Server) -> None:
    with sdk(server).messages.stream(**CALL) as stream:
        pieces = "".join(event.partial_json for event in stream if event.type == "input_json")
        use = stream.get_final_message().content[-1]
    equal("used", (use.name, use.input), ("get_weather", checks.WEATHER_ARGUMENTS))
    holds("the input came in pieces", pieces)


def structured_parse(server: Server) -> None:
    asked = CHAT | {"messages": [{"role": "user", "content": "Anna is 37 years old. As JSON?"}]}
    answer = sdk(server).messages.parse(**asked, output_format=Person)
    holds("the answer is a Person", isinstance(answer.parsed_output, Person))


def counted_tokens(server: Server) -> None:
    asked = {name: CALL[name] for name in ("model", "messages", "tools")}
    usage = sdk(server).messages.create(**CALL).usage
    counted = sdk(server).messages.count_tokens(**asked).input_tokens
    equal("counted", counted, usage.input_tokens + usage.cache_read_input_tokens)


def side_by_side(server: Server) -> None:
    async def ask() -> list[str]:
        async with anthropic.AsyncAnthropic(base_url=server.address, api_key="none", timeout=300) as client:
            answers = await asyncio.gather(*(client.messages.create(**CHAT) for _ in range(4)))
            return [answer.content[-1].text for answer in answers]

    equal("four answers", set(asyncio.run(ask())), {checks.ANSWER})


def errors(server: Server) -> None:
    for error, fields, said in (
        (anthropic.NotFoundError, {"model": "another"}, "another"),
        (anthropic.BadRequestError, {"max_tokens": 0}, "max_tokens"),
    ):
        checks.refused(fields, error, said, functools.partial(sdk(server).messages.create, **CHAT | fields))


if __name__ == "__main__":
    checks.run(
        *(messages, messages_streamed, thinking, thinking_with_a_budget),
        *(tools, tools_streamed, structured_parse, counted_tokens, side_by_side, errors),
    )
