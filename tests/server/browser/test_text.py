"""How the page takes apart and shows what a model writes: its modules, called in the browser."""

from typing import Any

import pytest

from tests.server.browser.conftest import Page

SHOW = (
    "const { showMarkdown } = await import('./static/markdown.js');"
    "const box = document.createElement('div'); showMarkdown(box, given[0]);"
)


def shown(page: Page, text: str) -> str:
    return page.run(f"{SHOW} return box.innerHTML", text)


@pytest.mark.parametrize(
    ("text", "html"),
    [
        ("one\ntwo\n\nthree", "<p>one\ntwo</p><p>three</p>"),
        (
            "**bold** and *slanted* and `a*b*c`",
            "<p><strong>bold</strong> and <em>slanted</em> and <code>a*b*c</code></p>",
        ),
        ("2 * 3 * 4 and snake_case_name", "<p>2 * 3 * 4 and snake_case_name</p>"),
        ("# Title\ntext", "<h3>Title</h3><p>text</p>"),
        ("- a\n- b\n  - c", "<ul><li>a</li><li>b<ul><li>c</li></ul></li></ul>"),
        ("3. a\n4. b", '<ol start="3"><li>a</li><li>b</li></ol>'),
        ("> said\n> twice", "<blockquote><p>said\ntwice</p></blockquote>"),
        ("a\n\n---\n\nb", "<p>a</p><hr><p>b</p>"),
        (
            "|a|b|\n|-|-|\n|1|2|",
            '<div class="table"><table><tr><th>a</th><th>b</th></tr><tr><td>1</td><td>2</td></tr></table></div>',
        ),
    ],
)
def test_markdown_is_shown_as_what_it_means(page: Page, text: str, html: str) -> None:
    assert shown(page, text) == html


@pytest.mark.parametrize("text", ["```python\nx = 1\n\n# no title\n```\nafter", "```python\nx = 1\n\n# no title"])
def test_code_is_shown_as_it_is_even_before_its_end(page: Page, text: str) -> None:
    code, language = page.run(
        f"{SHOW} return ['code', 'figcaption span'].map((s) => box.querySelector(s).textContent)", text
    )
    assert (code, language) == ("x = 1\n\n# no title", "python")


@pytest.mark.parametrize(
    "text",
    [
        "<img src=x onerror=alert(1)>",
        "<script>alert(1)</script>",
        "**<b onclick=alert(1)>x</b>**",
        "```<i>\n<i>x</i>\n```",
        "| <u>a</u> |\n|-|\n| <u>b</u> |",
        "- <a href=javascript:alert(1)>x</a>",
    ],
)
def test_markup_of_the_models_is_text(page: Page, text: str) -> None:
    tags = page.run(f"{SHOW} return [...box.querySelectorAll('*')].map((node) => node.localName)", text)
    assert not {"img", "script", "b", "i", "u", "a"} & set(tags)


def test_links_lead_to_the_web_only(page: Page) -> None:
    text = "[a](https://example.com/x) [b](javascript:alert(1)) [c](data:text/html,x) see http://example.com/y."
    links = page.run(f"{SHOW} return [...box.querySelectorAll('a')].map((a) => [a.getAttribute('href'), a.rel])", text)
    safe = "noopener noreferrer"
    assert links == [["https://example.com/x", safe], ["http://example.com/y", safe]]


def test_what_grows_keeps_the_nodes_that_do_not_change(page: Page) -> None:
    kept = page.run(
        f"{SHOW} const first = box.firstChild; showMarkdown(box, given[0] + ' more\\n\\nlast');"
        "const same = first === box.firstChild; showMarkdown(box, 'one'); return [same, box.innerHTML]",
        "one\n\ntwo",
    )
    assert kept == [True, "<p>one</p>"]


@pytest.mark.parametrize(
    "text", ["x" * 20000, "*" * 5000, "[" * 5000, "`" * 5000, "| " * 5000, "- " * 3000, "**a" * 3000]
)
def test_no_text_takes_long(page: Page, text: str) -> None:
    assert page.run(f"const start = performance.now(); {SHOW} return performance.now() - start", text) < 2000


def answer(page: Page, *deltas: dict[str, Any]) -> dict[str, Any]:
    """The parts of an answer that comes in these deltas."""
    return page.run(
        "const { Answer } = await import('./static/answer.js'); const answer = new Answer();"
        "for (const delta of given[0]) answer.add({ choices: [{ delta, finish_reason: null }] });"
        "return answer.parts",
        [*deltas],
    )


def test_thinking_within_the_content_is_told_from_the_answer(page: Page) -> None:
    whole = "<think>\none\ntwo\n</think>\n\nThe answer."
    parts = [answer(page, {"content": whole[:end]}) for end in range(len(whole) + 1)]
    assert parts[-1] == {"thought": "one\ntwo", "thinks": False, "text": "The answer.", "calls": []}
    for part in parts:
        assert "think" not in part["thought"] + part["text"] or part["thinks"]
        assert parts[-1]["text"].startswith(part["text"])
    assert answer(page, {"content": "in the prompt</think>after"})["thought"] == "in the prompt"


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
def test_thinking_in_a_field_of_its_own_is_taken_from_there(page: Page, field: str) -> None:
    assert answer(page, {field: "a"}, {field: "b"}) == {"thought": "ab", "thinks": True, "text": "", "calls": []}
    parts = answer(page, {"role": "assistant", "content": ""}, {field: "ab"}, {"content": "c"})
    assert parts == {"thought": "ab", "thinks": False, "text": "c", "calls": []}


def test_tool_calls_are_the_same_from_the_content_and_from_fields(page: Page) -> None:
    written = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
    calls = [{"id": "call-0", "name": "f", "arguments": '{"a":1}'}]
    assert answer(page, {"content": f"First.\n{written}"}) == {
        "thought": "",
        "thinks": False,
        "text": "First.",
        "calls": calls,
    }
    deltas = [
        {"tool_calls": [{"index": 0, "id": "call-0", "function": {"name": "f", "arguments": ""}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '{"a"'}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": ":1}"}}]},
    ]
    assert answer(page, *deltas)["calls"] == calls
    two = answer(page, {"content": f"{written}\n{written}"})["calls"]
    assert [call["id"] for call in two] == ["call-0", "call-1"]
