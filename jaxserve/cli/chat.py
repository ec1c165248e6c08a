"""`jaxserve chat`: a conversation in the terminal."""

import argparse
import contextlib
import dataclasses
import json
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from jaxserve.cli.flags import Parser
from jaxserve.cli.options import (
    SAMPLING,
    TEXT_ENGINE,
    add_adapter_flag,
    add_engine_flags,
    check_adapter,
    engine_config,
    start_llm,
)
from jaxserve.cli.terminal import printable
from jaxserve.errors import InputError, nearest

if TYPE_CHECKING:
    from jaxserve.llm import LLM

HISTORY = Path("~/.cache/jaxserve/chat_history")  # of the lines typed, for the arrow keys

_SAMPLING = SAMPLING.without("n", "logprobs", "prompt_logprobs", "detokenize")

COMMANDS = {
    "/help": ("", "show these commands"),
    "/clear": ("", "forget the conversation"),
    "/system": ("TEXT", "set the system prompt; without TEXT, have none"),
    "/thinking": ("on|off", "whether a model that can think does so before it answers"),
    "/adapter": ("NAME", "answer with one of --lora-modules; without NAME, with the model alone"),
    "/set": ("NAME VALUE", "change a sampling setting; without VALUE, back to its default; alone, show all"),
    "/save": ("FILE", "write the conversation to a file, as JSON"),
    "/exit": ("", "leave; so does Ctrl-D"),
}


def parser() -> Parser:
    parser = Parser(
        "chat",
        "Talk to a model in the terminal. Answers stream as they come, Ctrl-C stops one, /help lists the commands.",
        examples=(
            "jaxserve chat",
            "jaxserve chat --model ~/models/Qwen3-8B --no-thinking --temperature 0.7",
            'jaxserve chat --system-prompt "Answer in one sentence."',
        ),
    )
    chat = parser.add_argument_group("chat")
    chat.add_argument("--system-prompt", metavar="TEXT", help="goes before the conversation")
    chat.add_argument(
        "--thinking",
        action=argparse.BooleanOptionalAction,
        help="whether a model that can think does so before it answers",
    )
    add_adapter_flag(chat)
    _SAMPLING.add_to(parser, shown_defaults={"max_tokens": "the model's length"})
    add_engine_flags(parser, TEXT_ENGINE)
    return parser


def run(arguments: argparse.Namespace) -> None:
    config = engine_config(arguments, TEXT_ENGINE)
    check_adapter(arguments.adapter, config)
    settings = _SAMPLING.given(arguments)
    _SAMPLING.settings(**settings)  # wrong ones are refused before the model loads
    with _line_history(), start_llm(config) as llm:
        chat = Chat(
            llm,
            Console(highlight=False),
            settings=settings,
            system=arguments.system_prompt,
            thinking=arguments.thinking,
            adapter=arguments.adapter,
        )
        chat.run()


class Chat:
    """One conversation, and the settings that its commands change."""

    def __init__(
        self,
        llm: "LLM",
        console: Console,
        *,
        settings: dict[str, Any],
        system: str | None,
        thinking: bool | None,
        adapter: str | None,
    ):
        self._llm, self._console = llm, console
        self._adapter = adapter
        self._settings, self._system, self._thinking = settings, system, thinking
        self._messages: list[dict[str, str]] = []

    def run(self) -> None:
        """Answer lines of standard input until it ends or says `/exit`."""
        interactive = sys.stdin.isatty()
        if interactive:
            self._note(f"{Path(self._llm.engine.config.model).name}. /help lists commands, Ctrl-D leaves.")
        while True:
            try:
                line = input("> " if interactive else "").strip()
            except EOFError:
                if interactive:
                    self._console.print()  # the shell's prompt gets a line of its own
                break
            except KeyboardInterrupt:
                self._note("\n/exit or Ctrl-D leaves.")
                continue
            if line == "/exit":
                break
            try:
                if line.startswith("/"):
                    self._command(line)
                elif line:
                    self._turn(line)
            except InputError as error:
                self._console.print(Text(str(error), style="red"), soft_wrap=True)

    # Turns

    def _turn(self, line: str) -> None:
        """Ask, and keep both question and answer; neither, if the conversation cannot be served."""
        asked = [*self._messages, {"role": "user", "content": line}]
        answer = self._answer(asked)
        self._messages = [*asked, {"role": "assistant", "content": answer}]

    def _answer(self, messages: list[dict[str, str]]) -> str:
        """Stream the next answer; returns it without its thinking, which models are not shown again."""
        system = [] if self._system is None else [{"role": "system", "content": self._system}]
        options: dict[str, Any] = {} if self._thinking is None else {"enable_thinking": self._thinking}
        printed = _StreamedText(self._console)
        start = time.perf_counter()
        tokens, reason, first = 0, None, start
        stream = self._llm.stream_chat(
            [*system, *messages], self._params(), chat_template_kwargs=options, adapter=self._adapter
        )
        with contextlib.closing(stream), _interrupts() as interrupted:  # type: ignore[type-var]
            for delta in stream:
                first = first if tokens else time.perf_counter()
                tokens, reason = tokens + len(delta.outputs[0].token_ids), delta.outputs[0].finish_reason
                printed.add(delta.outputs[0].message or {})
                if interrupted:
                    reason = "interrupted"
                    break
        seconds = time.perf_counter() - start
        ended = {"length": ", cut at its limit", "interrupted": ", stopped"}.get(reason or "", "")
        self._note(f"\n{tokens} tokens, {first - start:.2f} s to the first, {tokens / seconds:.1f} tokens/s{ended}\n")
        return printed.answer.strip()

    def _params(self) -> Any:
        return dataclasses.replace(self._llm.get_default_sampling_params(), **({"max_tokens": None} | self._settings))

    # Commands

    def _command(self, line: str) -> None:
        name, _, rest = line.partition(" ")
        if name not in COMMANDS:
            raise InputError(f"there is no command {name}{nearest(name, COMMANDS) or '; /help lists them'}")
        getattr(self, f"_command_{name[1:]}")(rest.strip())

    def _command_help(self, _: str) -> None:
        table = Table.grid(padding=(0, 2))
        for name, (argument, meaning) in COMMANDS.items():
            table.add_row(Text(f"{name} {argument}", style="bold"), meaning)
        self._console.print(table)

    def _command_clear(self, _: str) -> None:
        self._messages = []
        self._note("The conversation is forgotten.")

    def _command_system(self, text: str) -> None:
        self._system = text or None
        self._note("The system prompt is set." if text else "There is no system prompt.")

    def _command_thinking(self, text: str) -> None:
        if text not in ("on", "off"):
            raise InputError("say /thinking on or /thinking off")
        self._thinking = text == "on"
        self._note(f"Thinking is {text}.")

    def _command_adapter(self, name: str) -> None:
        check_adapter(name or None, self._llm.engine.config)
        self._adapter = name or None
        self._note(f"The adapter is {name}." if name else "There is no adapter.")

    def _command_set(self, text: str) -> None:
        spelled, _, value = text.partition(" ")
        name = _SAMPLING.field_name(spelled) if spelled else ""
        if name:
            changed = {kept: setting for kept, setting in self._settings.items() if kept != name}
            if value:
                changed[name] = _SAMPLING.parse(name, value.strip())
            _SAMPLING.settings(**changed)  # refuses what is out of range
            self._settings = changed
        params, table = self._params(), Table.grid(padding=(0, 2))
        for field in _SAMPLING.fields:
            if name in ("", field.name):
                table.add_row(Text(field.name, style="bold"), Text(str(getattr(params, field.name))))
        self._console.print(table)

    def _command_save(self, file: str) -> None:
        if not file:
            raise InputError("say which file: /save FILE")
        system = [] if self._system is None else [{"role": "system", "content": self._system}]
        try:
            Path(file).expanduser().write_text(
                json.dumps([*system, *self._messages], indent=2, ensure_ascii=False) + "\n"
            )
        except OSError as error:
            raise InputError(f"cannot write {file} ({error.strerror})") from error
        self._note(f"Saved to {file}.")

    def _note(self, text: str) -> None:
        self._console.print(Text(text, style="dim"), soft_wrap=True)


class _StreamedText:
    """Prints an answer as it comes, reasoning dimmed; keeps its content."""

    def __init__(self, console: Console):
        self._console = console
        self._has_thought = False
        self.answer = ""

    def add(self, delta: dict[str, Any]) -> None:
        if reasoning := delta.get("reasoning_content"):
            self._has_thought = True
            self._print(reasoning, style="dim")
        if content := delta.get("content"):
            if self._has_thought and not self.answer:
                self._print("\n\n")
            self.answer += content
            self._print(content)

    def _print(self, text: str, style: str = "") -> None:
        self._console.print(Text(printable(text), style=style), end="", soft_wrap=True)


@contextlib.contextmanager
def _interrupts() -> Iterator[list[int]]:
    """While inside, a Ctrl-C fills the list instead of raising, as the engine must not be cut off in mid-step."""
    received: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: received.append(number))
    try:
        yield received
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def _line_history() -> Iterator[None]:
    """Editing and history of the lines that are typed, kept from one chat to the next."""
    if not sys.stdin.isatty():
        yield
        return
    import readline  # its import alone changes how `input` works

    file = HISTORY.expanduser()
    with contextlib.suppress(OSError):
        readline.read_history_file(file)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            readline.set_history_length(1000)
            readline.write_history_file(file)
