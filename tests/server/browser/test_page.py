"""The page at `/` in a real browser, with the demo model and with an engine that does as it is told."""

import itertools
import json
from collections.abc import Callable, Iterator

import httpx
import pytest
from selenium.webdriver.common.keys import Keys

from jaxserve.server.app import build_app
from jaxserve.server.keys import ApiKeys
from tests.server.browser.conftest import Page
from tests.server.cases import MODEL_NAME
from tests.server.conftest import serving
from tests.server.core_thread import core_thread
from tests.server.fake_engine import FakeEngine

Visit = Callable[..., Page]


@pytest.fixture
def slow() -> FakeEngine:
    """An engine that writes " 0 1 2 ..." for as long as it is let."""
    fake = FakeEngine()
    fake.seconds_per_step = 0.03
    return fake


@pytest.fixture
def slow_page(slow: FakeEngine, visit: Visit) -> Iterator[Page]:
    with core_thread(slow) as core, serving(build_app(core.client, MODEL_NAME)) as address:
        yield visit(address)


# A conversation


def test_an_answer_comes_and_its_thinking_is_folded_away(page: Page) -> None:
    page.ask("What is 27+45?")
    assert page.text(".assistant .text") == "27 + 45 = 72"
    assert page.text(".thinking summary").startswith("Thought for ")
    assert "result" not in page.text(".assistant")
    page.click(".thinking summary")
    assert "result 0072" in page.text(".thought")
    assert "<think>" not in page.text("#turns")


def test_without_thinking_there_is_nothing_to_fold(page: Page) -> None:
    page.click("#thinking")
    page.ask("What is the capital of France?")
    assert page.text(".assistant .text") == "The capital of France is Paris."
    assert not page.find(".thinking").is_displayed()


def test_an_answer_is_shown_while_it_comes(slow_page: Page) -> None:
    slow_page.say("Count.")
    seen = [slow_page.wait(lambda: slow_page.text(".assistant .text"))]
    for _ in range(2):
        seen.append(slow_page.wait(lambda: len(text := slow_page.text(".assistant .text")) > len(seen[-1]) and text))
        assert slow_page.answering
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(seen))
    slow_page.click("#send")
    slow_page.wait_for_end()


def test_the_conversation_goes_on_from_what_was_said(page: Page) -> None:
    page.ask("The code word is BANU. Remember it.")
    page.ask("What is the code word?")
    assert "BANU" in page.all(".assistant .text")[-1].text
    page.click("#new-chat")
    assert page.all(".turn") == []
    page.ask("What is the code word?")
    assert "BANU" not in page.text(".assistant .text")


def test_a_tool_is_called_and_its_result_goes_back(page: Page) -> None:
    page.all("#examples button")[3].click()
    page.wait(lambda: page.all(".call textarea"))
    assert page.text(".call header") == "get_weather"
    assert json.loads(page.text(".call pre")) == {"city": "Paris"}
    assert "tool_call" not in page.text("#turns")
    assert page.text("#tools-chip") == "1 tool"
    page.find(".call textarea").send_keys('{"weather": "sunny"}', Keys.ENTER)
    page.wait(lambda: len(page.all(".assistant")) == 2)
    page.wait_for_end()
    assert page.all(".assistant .text")[-1].text == "The result is: weather sunny."
    assert page.all(".call textarea") == []


def test_an_answer_can_be_had_again_and_a_question_edited(page: Page) -> None:
    page.ask("What is the capital of Spain?")
    page.click("[aria-label='Answer again']")
    page.wait_for_end()
    assert [turn.text for turn in page.all(".assistant .text")] == ["The capital of Spain is Madrid."]
    page.find("#prompt").send_keys(Keys.ARROW_UP)
    assert page.find("#prompt").get_property("value") == "What is the capital of Spain?"
    assert page.all(".turn") == []
    page.find("#prompt").send_keys(Keys.BACKSPACE * 6, "Italy?", Keys.SHIFT, Keys.ENTER)
    assert page.find("#prompt").get_property("value").endswith("Italy?\n")


def test_settings_are_sent_and_kept(page: Page, server: str) -> None:
    page.set("max_tokens", "3")
    page.set("system", "Be brief.")
    page.ask("What is 27+45?")
    assert "3 tokens" in page.text(".facts")
    assert "cut at the limit" in page.text(".facts")
    page.browser.refresh()
    page.wait(lambda: page.text("#model"))
    assert page.run("return Object.fromEntries(new FormData(document.forms.settings)).max_tokens") == "3"
    page.click("#reset-settings")
    assert page.run("return Object.fromEntries(new FormData(document.forms.settings)).max_tokens") == ""


def test_an_adapter_answers_once_it_is_chosen(visit: Visit) -> None:
    fake = FakeEngine()
    with core_thread(fake) as core, serving(build_app(core.client, MODEL_NAME)) as address:
        assert not visit(address).find("[name=model]").is_displayed()  # there is nothing to choose
        core.client.inputs.adapters["loud"] = "somewhere"
        page = visit(address)
        assert page.text("#model") == MODEL_NAME
        page.set("max_tokens", "3")
        page.ask("Count.")
        page.set("model", "loud")
        assert page.text("#model") == "loud"
        page.ask("Count.")
        page.browser.refresh()
        page.wait(lambda: page.text("#model") == "loud")
        page.click("#reset-settings")
        assert page.text("#model") == MODEL_NAME
    assert fake.asked_adapters == [None, "loud"]


# Stopping


@pytest.mark.parametrize("how", ["button", "key"])
def test_stop_ends_the_request_on_the_engine(slow_page: Page, slow: FakeEngine, how: str) -> None:
    slow_page.say("Count.")
    slow_page.wait(lambda: slow_page.text(".assistant .text"))
    assert len(slow.running) == 1
    if how == "button":
        slow_page.click("#send")
    else:
        slow_page.find("#prompt").send_keys(Keys.ESCAPE)
    slow_page.wait(lambda: not slow.running)
    assert len(slow.aborted) == 1
    slow_page.wait_for_end()
    assert "stopped" in slow_page.text(".facts")
    assert slow_page.text(".assistant .text").startswith("0 1")
    assert not slow_page.find(".problem").is_displayed()
    assert slow_page.complaints == []


def test_leaving_the_page_ends_it_too(slow_page: Page, slow: FakeEngine) -> None:
    slow_page.say("Count.")
    slow_page.wait(lambda: slow_page.text(".assistant .text"))
    slow_page.browser.get("about:blank")
    slow_page.wait(lambda: not slow.running)


# Errors


def test_a_refusal_is_shown_as_the_server_words_it(page: Page) -> None:
    page.set("temperature", "101")
    page.ask("Hello")
    assert page.text(".problem") == "Temperature is 101.0; give a number between 0 and 100."
    assert any("400" in complaint for complaint in page.complaints)
    page.set("temperature", "")
    page.click("[aria-label='Answer again']")
    page.wait_for_end()
    assert not page.find(".problem").is_displayed()
    assert page.text(".assistant .text") == "Hello! How can I help you?"


def test_tools_that_are_no_json_are_told_at_once_and_when_asked(page: Page) -> None:
    page.click("#tools-chip")
    page.find("[name=tools]").send_keys("[{")
    assert page.text("#tools-error").startswith("The tools are not JSON")
    page.ask("Hello")
    assert page.text(".problem").startswith("The tools are not JSON")


def test_an_error_within_the_stream_is_shown_beside_what_came(slow_page: Page, slow: FakeEngine) -> None:
    slow.error, slow.steps_before_error = RuntimeError("the device is lost"), 5
    slow_page.ask("Count.")
    assert slow_page.text(".problem").startswith("The engine has stopped after an error")
    assert slow_page.text(".assistant .text").startswith("0 1")
    slow_page.wait(lambda: slow_page.text("#pulse") == "unreachable")


def test_a_server_that_is_gone_is_told(slow: FakeEngine, visit: Visit) -> None:
    with core_thread(slow) as core, serving(build_app(core.client, MODEL_NAME)) as address:
        page = visit(address)
    page.ask("Hello")
    assert page.text(".problem") == "The server cannot be reached."
    page.wait(lambda: page.text("#pulse") == "unreachable")


def test_a_server_with_keys_is_served_once_it_has_one(slow: FakeEngine, visit: Visit) -> None:
    slow.seconds_per_step = 0.0
    app_keys = ApiKeys({"me": "secret"})
    with core_thread(slow) as core, serving(build_app(core.client, MODEL_NAME, keys=app_keys)) as address:
        page = visit(address, known=False)
        page.wait(lambda: page.text("#pulse") == "wants an API key")
        page.set("max_tokens", "5")
        page.ask("Count.")
        assert "no such API key" in page.text(".problem")
        page.find("[name=key]").send_keys("secret")
        page.wait(lambda: page.text("#model") == MODEL_NAME)
        page.click("[aria-label='Answer again']")
        page.wait(lambda: page.text(".assistant .text") == "0 1 2 3 4")
        assert "secret" not in page.run("return JSON.stringify(localStorage)")


# The engine, live


def test_the_live_view_is_what_the_engine_says(page: Page, client: httpx.Client) -> None:
    page.ask("What is the capital of France?")

    def agrees() -> bool:
        stats = client.get("/stats").json()
        shown = {name: page.text(f"#{name}").replace(",", "") for name in ("running", "held", "cached", "free")}
        return page.text("#generated").replace(",", "") == str(stats["total_generated_tokens"]) and shown == {
            "running": "0",
            **{state: str(stats[f"pages_{state}"]) for state in ("held", "cached", "free")},
        }

    page.wait(agrees)
    assert page.text("#max-running") == "4"
    assert len(page.all("#slots i")) == 4
    assert page.text("#pulse") == "ready"


def test_a_running_sequence_is_seen_and_its_rate(slow_page: Page) -> None:
    slow_page.say("Count.")
    slow_page.wait(lambda: slow_page.text("#running") == "1" and "tok/s" in slow_page.text("#pulse"))
    slow_page.wait(lambda: float(slow_page.text("#rate")) > 0)
    slow_page.click("#send")
    slow_page.wait(lambda: slow_page.text("#pulse") == "ready")


# As a page


def test_nothing_comes_from_elsewhere(page: Page, server: str) -> None:
    page.ask("Who are you?")
    loaded = page.run("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert any(name.endswith("page.js") for name in loaded)
    assert [name for name in loaded if not name.startswith(f"{server}/")] == []


@pytest.mark.parametrize("width", [320, 390, 768, 1280])
def test_no_width_makes_it_scroll_sideways(server: str, visit: Visit, width: int) -> None:
    page = visit(server, width=width)
    page.all("#examples button")[3].click()
    page.wait(lambda: page.all(".call textarea"))
    assert page.run("return document.documentElement.scrollWidth") <= width
    assert (
        page.run("return document.querySelector('#log').scrollWidth - document.querySelector('#log').clientWidth") == 0
    )


def test_on_a_phone_the_side_opens_and_closes(server: str, visit: Visit) -> None:
    page = visit(server, width=390, height=844)
    assert not page.find("#side").is_displayed()
    page.click("#pulse")
    page.wait(lambda: page.find("#settings").is_displayed())
    page.find("body").send_keys(Keys.ESCAPE)
    page.wait(lambda: not page.find("#side").is_displayed())


def test_it_is_light_or_dark_as_the_system_is_unless_told(server: str, visit: Visit) -> None:
    def brightness() -> int:
        return page.run("return Number(getComputedStyle(document.documentElement).backgroundColor.match(/\\d+/)[0])")

    page = visit(server, scheme="dark")
    assert brightness() < 64
    page.click("#theme")  # light
    assert brightness() > 192
    page.click("#theme")  # dark
    page.click("#theme")  # as the system has it
    assert brightness() < 64


def test_every_control_has_a_name(page: Page) -> None:
    page.ask("What is 27+45?")
    nameless = page.run(
        "return [...document.querySelectorAll('button, input, textarea')].filter((control) =>"
        " !(control.ariaLabel || control.textContent.trim() || control.labels?.[0]?.textContent.trim()))"
        ".map((control) => control.outerHTML)"
    )
    assert nameless == []
