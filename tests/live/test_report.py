"""The report of `specgen optimize` in headless Chromium: what a reader sees; it asks for no other file."""

from __future__ import annotations

from pathlib import Path

from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webdriver import WebDriver

from specgen_engine.agent.base import Spent
from specgen_engine.agent.report import as_html
from tests.agent.test_base import SEARCH, attempt

SETTINGS = {"model": "m", "base_url": "u", "device": "cpu"}


def test_the_report_is_drawn_and_stands_alone(browser: WebDriver, tmp_path: Path) -> None:
    attempts = [attempt(1, 1.5, report=SEARCH, by_endpoint=True), attempt(2, 1.2), attempt(3, 2.0)]
    page = tmp_path / "report.html"
    page.write_text(as_html("rows", SETTINGS, attempts, Spent(30, 300), "all iterations done"))
    browser.get(f"file://{page}")
    bars = browser.find_elements(By.CSS_SELECTOR, "#timeline rect")
    kinds = [str(bar.get_attribute("fill")).removeprefix("var(--").removesuffix(")") for bar in bars]
    assert [kinds.count(kind) for kind in ("reasoning", "answer", "fork")] == [3, 3, 2]
    assert kinds.count("evaluation") >= 1
    colours = {kind: bar.value_of_css_property("fill") for kind, bar in zip(kinds, bars, strict=True)}
    assert len(set(colours.values())) == len(colours), "kinds that look alike"
    assert "rgb(0, 0, 0)" not in colours.values(), "a kind without a colour"
    (end,) = browser.find_elements(By.CSS_SELECTOR, "#timeline .end")
    assert end.rect["height"] > 0  # without width it is not "displayed" for WebDriver
    assert end.value_of_css_property("stroke") not in ("none", *colours.values())
    right = browser.execute_script("return document.querySelector('#timeline').getBoundingClientRect().right")
    for bar in bars:
        assert bar.rect["width"] > 0
        assert bar.rect["x"] + bar.rect["width"] <= right + 1
    assert len(browser.find_elements(By.CSS_SELECTOR, ".chart path")) >= 2
    differences = browser.find_elements(By.CSS_SELECTOR, "details[open] .add")
    assert differences
    assert all(line.is_displayed() for line in differences)
    asked = browser.execute_script("return performance.getEntriesByType('resource').map(one => one.name)")
    assert [name for name in asked if "favicon" not in name] == []
    assert [one["message"] for one in browser.get_log("browser") if one["level"] == "SEVERE"] == []
