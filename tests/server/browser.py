"""A headless Chromium that a test drives; what the page's policy had to block, and what failed in it, is kept."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

CHROMIUM, DRIVER = "chromium", "chromedriver"
SECONDS = 180
"""A generous bound: the machine may be busy."""
_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
)  # fmt: skip
_WATCH = """
window.blocked = [];
document.addEventListener("securitypolicyviolation", (event) => window.blocked.push(event.violatedDirective));
"""


class Page:
    """The web page of a server, in a browser."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver

    def open(self, url: str, *, wait: str = "ready") -> None:
        """Load the page anew and wait until it knows how its server is."""
        self.driver.get("about:blank")
        self.driver.get(url)
        self.until(f"document.getElementById('state').textContent === {json.dumps(wait)}")

    def get(self, name: str) -> WebElement:
        return self.driver.find_element(By.ID, name)

    def all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)  # type: ignore[no-untyped-call]

    def until(self, expression: str) -> Any:
        """Wait until a JavaScript expression holds and return its value."""
        found: Any = WebDriverWait(self.driver, SECONDS, 0.05).until(
            lambda _: self.run(f"return {expression}"), f"never true: {expression}"
        )
        return found

    def send(self, text: str) -> None:
        """Send a message of the user."""
        self.get("prompt").send_keys(text)
        self.get("send").click()

    def answered(self, number: int = 1) -> str:
        """Wait until so many answers are complete and return the text of the last of them."""
        self.until(f"document.querySelectorAll('.turn.assistant:not(.busy) .copy-curl').length === {number}")
        return self.all(".turn.assistant .text")[-1].text

    def blocked(self) -> list[str]:
        """What the policy had to block."""
        return list(self.run("return window.blocked"))

    def leave(self) -> None:
        """Leave the page, before its server ends, and without a complaint."""
        blocked, complaints = self.blocked(), self.complaints()
        assert (blocked, complaints) == ([], [])
        self.driver.get("about:blank")

    def complaints(self) -> list[str]:
        """What Chromium has written to its console since the last call, refused requests apart."""
        log: list[dict[str, Any]] = self.driver.get_log("browser")  # type: ignore[no-untyped-call]
        return [line["message"] for line in log if "the server responded with a status of" not in line["message"]]


@contextmanager
def chromium(
    profile: Path, *, width: int = 1240, height: int = 860, scale: int = 1, dark: bool = False
) -> Iterator[Page]:
    """A browser with an empty profile."""
    binary, driver = shutil.which(CHROMIUM), shutil.which(DRIVER)
    if binary is None or driver is None:
        pytest.fail("the tests of the web page need Chromium: apt-get install -y chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in (*_FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    made = webdriver.Chrome(options=options, service=Service(driver))
    try:
        screen = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": width < 600}
        made.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)  # type: ignore[no-untyped-call]
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        made.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})  # type: ignore[no-untyped-call]
        made.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": _WATCH})  # type: ignore[no-untyped-call]
        yield Page(made)
    finally:
        made.quit()
