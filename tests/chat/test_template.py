"""Templates mean what they mean to `transformers`, and none of them takes more than it is given."""

import os
import time
from typing import Any

import pytest
from transformers import AutoTokenizer

from jaxserve.chat.template import ChatTemplate, Renderer
from jaxserve.config import DEMO_MODEL
from jaxserve.errors import InputError

USER = {"role": "user", "content": "Grüße & <b>"}
CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": {"a": 2, "ü": [None, True]}}}
TURNS = [
    {"role": "system", "content": "Be brief."},
    USER,
    {"role": "assistant", "content": "", "tool_calls": [CALL], "reasoning_content": "I call."},
    {"role": "tool", "content": "5", "tool_call_id": "1"},
]
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}

# What templates of models use, each in a line.
TEMPLATES = [
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content | trim }}\n{% endfor %}{{ eos_token }}",
    "{% for m in messages %}\n    {% if loop.first %}\n  {% continue %}{% endif %}\n{{ m['content'] }}{% endfor %}\n",
    "{{ tools | tojson }}|{{ messages[2].tool_calls | tojson(indent=2) }}|{{ {'ü': '<'} | tojson(ensure_ascii=True) }}",
    "{% set ns = namespace(n=0, self=1) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "{% generation %}{{ messages[-1].content }}{% endgeneration %}{{ dict(a=1).a }}{{ add_generation_prompt }}",
    "{% macro f(x) %}{{ x.split('<')[0] }}{% endmacro %}{{ f(messages[1].content) }}{{ documents is none }}",
    "{{ strftime_now('%Y') }}{{ messages | selectattr('role', 'equalto', 'user') | list | length }}{{ other }}",
]


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return Renderer(seconds=0.5, max_bytes=2**28, characters=10_000)


@pytest.fixture(scope="module")
def patient_renderer() -> Renderer:
    """Which runs out of memory first, on any machine."""
    return Renderer(seconds=30, max_bytes=2**28, characters=10_000)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(DEMO_MODEL)


@pytest.mark.parametrize("source", [*TEMPLATES, None])
def test_a_template_renders_as_in_transformers(source: str | None, renderer: Renderer, tokenizer: Any):
    template = ChatTemplate(source or tokenizer.chat_template, tokenizer.special_tokens_map, renderer)
    options = {"tools": [TOOL], "add_generation_prompt": True, "other": "x"}
    expected = tokenizer.apply_chat_template(TURNS, chat_template=source, tokenize=False, **options)
    assert template.render(TURNS, documents=None, **options) == expected


def test_a_message_is_continued_as_in_transformers(renderer: Renderer, tokenizer: Any):
    messages = [USER, {"role": "assistant", "content": "The answer "}]
    template = ChatTemplate(tokenizer.chat_template, tokenizer.special_tokens_map, renderer)
    expected = tokenizer.apply_chat_template(messages, tokenize=False, continue_final_message=True)
    assert template.render(messages, continue_final_message=True, add_generation_prompt=False) == expected
    assert expected.endswith("The answer ")


def test_several_templates_are_told_apart_by_tools(renderer: Renderer):
    template = ChatTemplate({"default": "plain {{ a }}", "tool_use": "tools {{ b }}"}, {}, renderer)
    assert template.render([USER], tools=[TOOL], b=1) == "tools 1"
    assert template.render([USER], tools=None, a=2) == "plain 2"
    assert (template.names(), template.names(tools=True)) == ({"a"}, {"b"})


ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
GREEDY = {
    "a product": "{{ 'x' * 10**12 }}",
    "what the machine has": "{{ 'x' * (4 * 10**8) }}",
    "a filter": "{{ 'x' | center(10**12) }}",
    "a format": "{{ '%1000000000000d' % 1 }}",
    "doubling": "{% set ns = namespace(a='xx') %}{% for i in range(60) %}{% set ns.a = ns.a ~ ns.a %}{% endfor %}",
    "many pieces": "{% for i in range(99999) %}{{ 'x' * 9999 }}{% endfor %}",
}


def refusal(source: str, renderer: Renderer) -> str:
    with pytest.raises(InputError) as caught:
        ChatTemplate(source, {}, renderer).render([USER])
    return str(caught.value)


def test_a_template_that_does_not_end_is_ended(renderer: Renderer):
    start = time.process_time()
    assert "it takes more than 0.5 seconds" in refusal(ENDLESS, renderer)
    assert time.process_time() - start < 0.2  # nothing runs on in this process
    assert ChatTemplate("{{ messages[0].role }}", {}, renderer).render([USER]) == "user"


@pytest.mark.parametrize("name", GREEDY)
def test_a_template_that_wants_all_memory_does_not_get_it(name: str, patient_renderer: Renderer):
    assert "it needs too much memory" in refusal(GREEDY[name], patient_renderer)
    assert ChatTemplate("{{ messages[0].role }}", {}, patient_renderer).render([USER]) == "user"


def test_a_text_that_is_too_long_is_refused(renderer: Renderer):
    assert "it makes 10001 characters of them, and at most 10000 are possible" in refusal("{{ 'x' * 10001 }}", renderer)


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("{{ raise_exception('Roles must alternate') }}", "Roles must alternate"),
        ("{{ messages.append(1) }}", "append"),
        ("{{ messages.__class__.__mro__ }}", "__class__"),
        ("{% set ns = namespace() %}{% set ns.__class__ = 1 %}", "__class__"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{% include 'a' %}", "no loader"),
    ],
)
def test_what_a_template_fails_with_is_told(source: str, told: str, renderer: Renderer):
    message = refusal(source, renderer)
    assert message.startswith("the chat template cannot render these messages (")
    assert told in message


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("{{ messages }}\n{% for", r"\(unexpected .* in line 2\)"),
        ("{{ messages | upside_down }}", r"\(No filter named 'upside_down'. in line 1\)"),
    ],
)
def test_a_template_that_is_none_is_blamed_by_its_file(source: str, told: str, renderer: Renderer):
    template = ChatTemplate(source, {}, renderer, "model/chat_template.jinja")
    for use in (template.names, lambda: template.render([USER])):
        with pytest.raises(InputError, match=f"^model/chat_template.jinja is no chat template that can be read {told}"):
            use()


def test_what_json_cannot_express_is_refused(renderer: Renderer):
    with pytest.raises(InputError, match="what JSON cannot express"):
        ChatTemplate("{{ messages }}", {}, renderer).render([USER | {"content": object()}])


def test_a_continued_message_has_to_be_there(renderer: Renderer):
    with pytest.raises(InputError, match="leaves the last message out"):
        ChatTemplate("{{ messages[0].content }}", {}, renderer).render(
            [USER, {"role": "assistant", "content": "So"}], continue_final_message=True
        )


def test_processes_that_had_to_end_leave_nothing_behind():
    renderer = Renderer(seconds=0.05)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        assert "error" in renderer.ask({"template": ENDLESS, "variables": {}})
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_process_ends_with_its_renderer():
    renderer = Renderer()
    renderer.ask({"template": "", "variables": {}})
    process = renderer._process
    assert process
    assert process.poll() is None
    del renderer
    assert process.poll() == 0
