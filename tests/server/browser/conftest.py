"""A headless Chromium, where there is one: `apt-get install chromium chromium-driver` brings it on Debian."""

import dataclasses
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

SECONDS = 60  # that anything may take


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "browser" in item.path.parts:
            item.add_marker(pytest.mark.browser)


@pytest.fixture(scope="session")
def chromium() -> Iterator[webdriver.Chrome]:
    names = ("chromium", "chromium-browser", "google-chrome")
    binary, driver = next(filter(None, map(shutil.which, names)), None), shutil.which("chromedriver")
    if not binary or not driver:
        pytest.skip("the page is tested in Chromium: install chromium and chromium-driver, as Debian calls them")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options, webdriver.ChromeService(driver))
    try:
        yield browser
    finally:
        browser.quit()


@dataclasses.dataclass(frozen=True)
class Page:
    """The page in the browser, and how a reader uses it."""

    browser: webdriver.Chrome

    def find(self, selector: str) -> WebElement:
        return self.browser.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector: str) -> list[WebElement]:
        return self.browser.find_elements(By.CSS_SELECTOR, selector)

    def text(self, selector: str) -> str:
        """What a reader sees of it; of what is folded away, nothing."""
        return self.find(selector).text

    def click(self, selector: str) -> None:
        self.find(selector).click()

    def wait(self, condition: Callable[[], Any]) -> Any:
        return WebDriverWait(self.browser, SECONDS, poll_frequency=0.02).until(lambda _: condition())

    def run(self, script: str, *arguments: Any) -> Any:
        """What the body of an asynchronous function returns, run in the page."""
        wrapped = "const done = arguments[arguments.length - 1];" + (
            f"(async (...given) => {{ {script} }})(...arguments).then(done, (error) => done(`failed: ${{error}}`));"
        )
        return self.browser.execute_async_script(wrapped, *arguments)

    def say(self, text: str) -> None:
        self.find("#prompt").send_keys(text, Keys.ENTER)

    def ask(self, text: str) -> None:
        """Say something, and wait for the end of the answer."""
        answers = len(self.all(".assistant"))
        self.say(text)
        self.wait(lambda: len(self.all(".assistant")) > answers)
        self.wait_for_end()

    def wait_for_end(self) -> None:
        self.wait(lambda: not self.answering)

    @property
    def answering(self) -> bool:
        return self.find("#send").get_attribute("aria-label") == "Stop"

    def set(self, name: str, value: str) -> None:
        self.run(
            "const field = document.forms.settings.elements[given[0]]; field.value = given[1];"
            "field.dispatchEvent(new Event('input', { bubbles: true }));",
            name,
            value,
        )

    @property
    def complaints(self) -> list[str]:
        """What the browser has logged since it was last asked: violated policies, scripts' errors, failed requests."""
        return [entry["message"] for entry in self.browser.get_log("browser")]


@pytest.fixture
def visit(chromium: webdriver.Chrome) -> Callable[..., Page]:
    """A function that opens the page of a server as a first visitor sees it."""

    def open_page(
        address: str, *, width: int = 1280, height: int = 860, scheme: str = "light", known: bool = True
    ) -> Page:
        phone = width < 600
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": phone}
        chromium.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        chromium.execute_cdp_cmd("Storage.clearDataForOrigin", {"origin": address, "storageTypes": "all"})
        chromium.get(address)
        chromium.execute_script("sessionStorage.clear(); localStorage.clear();")
        chromium.get(address)
        chromium.get_log("browser")
        page = Page(chromium)
        if known:
            page.wait(lambda: page.text("#model"))
        return page

    return open_page


@pytest.fixture
def page(server: str, visit: Callable[..., Page]) -> Iterator[Page]:
    """The page of the demo model. Nothing that a test does here may make the browser complain."""
    page = visit(server)
    yield page
    assert page.complaints == []
