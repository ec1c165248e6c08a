"""`jaxserve chat`: turns and commands on a scripted engine, and a conversation with the demo model."""

import io
import json
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from jaxserve import CompletionOutput, InputError, RequestOutput, SamplingParams
from jaxserve.chat.events import as_delta
from jaxserve.cli.chat import Chat
from jaxserve.cli.main import main
from jaxserve.config import EngineConfig
from jaxserve.outputs import RequestMetrics
from tests.chat.styles import parser


class ScriptedLLM:
    """Answers with the texts it is given, three characters and as many tokens a step; keeps what it was asked."""

    engine = SimpleNamespace(config=EngineConfig(model="scripted", lora_modules=("loud=x", "quiet=y")))

    def __init__(self, *answers: str):
        self.answers = list(answers)
        self.asked: list[tuple[list[dict], dict, SamplingParams]] = []
        self.adapters: list[str | None] = []
        self.closed = 0

    def get_default_sampling_params(self) -> SamplingParams:
        return SamplingParams(temperature=0.6)

    def stream_chat(
        self, messages: list[dict], params: SamplingParams, *, chat_template_kwargs: dict, adapter: str | None
    ) -> Iterator[RequestOutput]:
        if not self.answers:
            raise InputError("the prompt is too long")
        self.asked.append((messages, chat_template_kwargs, params))
        self.adapters.append(adapter)
        return self._deltas(self.answers.pop(0))

    def _deltas(self, answer: str) -> Iterator[RequestOutput]:
        reader = parser("hermes", tools=False)
        try:
            for at in range(0, len(answer), 3):
                piece = answer[at : at + 3]
                if "!" in piece:
                    signal.raise_signal(signal.SIGINT)
                last = at + 3 >= len(answer)
                output = CompletionOutput(0, piece, [*range(len(piece))], finish_reason="stop" if last else None)
                output.message = as_delta(reader.read(output))
                yield RequestOutput("0", None, [1, 2, 3], [output], RequestMetrics(0.0), finished=last)
        finally:
            self.closed += 1


def talk(llm: ScriptedLLM, lines: list[str], **settings: Any) -> str:
    """What is printed in answer to the lines."""
    printed = io.StringIO()
    chat = Chat(
        llm,
        Console(file=printed, width=100),
        **({"settings": {}, "system": None, "thinking": None, "adapter": None} | settings),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
        chat.run()
    return printed.getvalue()


def said(*contents: str) -> list[dict]:
    """A conversation of user and assistant, in turns."""
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(contents)]


def test_the_conversation_goes_on_without_the_thinking():
    llm = ScriptedLLM("<think>\nHm.\n</think>\n\nHello.", "Bye.")
    printed = talk(llm, ["Hi", "", "Go"])
    assert "28 tokens, " in printed
    assert "4 tokens, " in printed
    assert "Hm.\n\nHello." in printed
    assert "think>" not in printed
    assert [messages for messages, *_ in llm.asked] == [said("Hi"), said("Hi", "Hello.", "Go")]


def test_settings_reach_the_request():
    llm = ScriptedLLM("a", "b", "c", "d")
    lines = ["1", "/set top-p 0.5", "/thinking off", "/system Be brief.", "2", "/set temperature", "/clear", "3"]
    talk(llm, lines, settings={"temperature": 0.2})
    (messages, options, params), second, third = llm.asked
    assert (messages, options) == (said("1"), {})
    assert (params.temperature, params.top_p, params.max_tokens) == (0.2, 1.0, None)
    system = [{"role": "system", "content": "Be brief."}]
    assert second[0] == [*system, *said("1", "a", "2")]
    assert second[1] == {"enable_thinking": False}
    assert (second[2].temperature, second[2].top_p) == (0.2, 0.5)
    assert third[0] == [*system, *said("3")]
    assert third[2].temperature == 0.6  # the model's own again


def test_an_adapter_is_taken_and_left_between_turns():
    llm = ScriptedLLM("a", "b", "c", "d")
    printed = talk(llm, ["1", "/adapter quiet", "2", "/adapter loudest", "3", "/adapter", "4"], adapter="loud")
    assert llm.adapters == ["loud", "quiet", "quiet", None]
    assert "there is no adapter 'loudest'; there are loud, quiet" in printed


def test_interrupting_stops_the_answer_and_keeps_the_chat():
    llm = ScriptedLLM("abcde! and much more", "Yes.")
    before = signal.getsignal(signal.SIGINT)
    printed = talk(llm, ["1", "2"])
    assert "stopped" in printed
    assert "much more" not in printed
    assert llm.asked[1][0] == said("1", "abcde!", "2")
    assert llm.closed == 2
    assert signal.getsignal(signal.SIGINT) == before


def test_control_characters_do_not_reach_the_terminal():
    assert "␛[2Jbell␇" in talk(ScriptedLLM("\x1b[2Jbell\x07"), ["1"])


def test_what_cannot_be_served_is_said_and_forgotten():
    llm = ScriptedLLM("a")
    assert "the prompt is too long" in talk(llm, ["1", "2", "/exit", "3"])
    assert len(llm.asked) == 1


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        ("/help", "/thinking on|off"),
        ("/hlep", "there is no command /hlep; did you mean '/help'?"),
        ("/thinking maybe", "say /thinking on or /thinking off"),
        ("/set temprature 1", "there is no setting 'temprature'; did you mean 'temperature'?"),
        ("/set temperature -1", "temperature is -1.0"),
        ("/set ignore_eos perhaps", "say on or off"),
        ("/set", "repetition_penalty"),
        ("/save", "say which file"),
        ("/save /no/such/folder/a", "cannot write /no/such/folder/a"),
    ],
)
def test_commands_answer(line: str, answer: str):
    assert answer in talk(ScriptedLLM(), [line])


def test_a_saved_conversation_is_json(tmp_path: Path):
    talk(ScriptedLLM("Grüß dich."), ["Hi", f"/save {tmp_path / 'chat.json'}"], system="S")
    saved = json.loads((tmp_path / "chat.json").read_text())
    assert saved == [{"role": "system", "content": "S"}, *said("Hi", "Grüß dich.")]


@pytest.mark.usefixtures("started")
def test_the_demo_model_chats(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.setattr("sys.stdin", io.StringIO("What is the capital of France?\n/thinking off\nWhat is 2+3?\n"))
    assert main(["chat", "--temperature", "0"]) == 0
    printed = capsys.readouterr().out
    assert "Paris" in printed
    assert "Thinking is off." in printed
    assert "5" in printed.split("Thinking is off.")[1]
    assert printed.count(" s to the first, ") == 2
