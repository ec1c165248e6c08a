"""The process that chat templates are rendered in: a program of its own, which imports nothing of jaxserve.

A template is a program, and what it is given comes from anyone. There is no telling a loop from an endless one, and a
thread cannot be ended. Here the kernel bounds both time and memory: a template that takes too much CPU time ends with
its process, and one that wants too much memory with a `MemoryError`.

Each line of standard input is a JSON object with a "template" and its "variables"; the answer is a line with the "text"
or an "error", which is "syntax" if the template is to blame and not what it is given. Without variables it is the
"names" that the template reads.
"""

import json
import resource
import signal
import sys
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.meta import find_undeclared_variables
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.utils import Namespace


class _GenerationBlock(Extension):
    """`{% generation %}` marks the assistant's part for training; here it is just rendered."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Dict:
    """`dict` for templates, without what the class itself would give access to."""

    def __call__(self, *pairs: Any, **entries: Any) -> dict:
        return dict(*pairs, **entries)


class _Namespace(Namespace):
    """`namespace` for templates, without the names that would reach its insides."""

    def __init__(*arguments: Any, **entries: Any) -> None:  # so that `self` may be an entry
        own, *pairs = arguments
        Namespace.__init__(own, {})
        for name, value in dict(*pairs, **entries).items():
            own[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise SecurityError(f"a namespace takes no {name!r}; let the name begin with a letter")
        super().__setitem__(name, value)


def environment() -> ImmutableSandboxedEnvironment:
    """What chat templates are written for: the filters and functions that `transformers` gives them."""
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
    )
    made.filters["tojson"] = _to_json
    made.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    made.globals |= {"dict": _Dict(), "namespace": _Namespace}
    return made


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)  # Jinja's own would escape HTML


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _answer(made: ImmutableSandboxedEnvironment, line: bytes, max_length: int) -> dict[str, Any]:
    try:
        asked = json.loads(line)
        if "variables" not in asked:
            return {"names": sorted(find_undeclared_variables(made.parse(asked["template"])))}
        text = made.from_string(asked["template"]).render(asked["variables"])
        if len(text) > max_length:
            return {"error": f"it makes {len(text)} characters of them, and at most {max_length} are possible"}
        return {"text": text}
    except MemoryError:
        return {"error": "it needs too much memory"}
    except TemplateSyntaxError as error:
        return {"error": f"{error.message} in line {error.lineno}", "syntax": True}
    except Exception as error:  # whatever the template raises
        return {"error": str(error) or type(error).__name__}


def main(seconds: float, max_bytes: int, max_length: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (max_bytes, max_bytes))
    made = environment()
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_PROF, seconds)  # which ends the process, wherever it is
        answer = json.dumps(_answer(made, line, max_length))
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write(answer + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
