"""The page in headless Chromium, drawn from a running search that replays a trace."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webdriver import WebDriver

from specgen_engine.replay.trace import BUNDLED, load_traces
from specgen_engine.serving.command import prepare
from specgen_engine.serving.preload import Template
from specgen_engine.serving.process import running_server
from tests.live.conftest import ADMIN, ENVIRONMENT, Live


def until(true: Callable[[], Any], seconds: float, what: str) -> Any:
    deadline = time.monotonic() + seconds
    while not (value := true()):
        assert time.monotonic() < deadline, what
        time.sleep(0.2)
    return value


def numbers(browser: WebDriver, selector: str, attribute: str) -> set[str]:
    """Of what is drawn now, in one step: the page redraws while we look."""
    script = f"return [...document.querySelectorAll('{selector}')].map(e => e.getAttribute('{attribute}'))"
    return set(browser.execute_script(script))


def text(browser: WebDriver, id_: str) -> str:
    return browser.find_element(By.ID, id_).text


def no_errors(browser: WebDriver) -> None:
    said = [one["message"] for one in browser.get_log("browser") if one["level"] == "SEVERE"]
    assert [line for line in said if "favicon" not in line] == []


def test_the_page_asks_for_a_key_and_draws_a_running_search(live: Live, browser: WebDriver, tmp_path: Path) -> None:
    """As with keys it is used: the page saved to a file, the server's address in it, the key typed in."""
    page = tmp_path / "live.html"
    page.write_text(live.get("/specgen/").text)
    browser.get(f"file://{page}?server={live.server.url}/specgen/")
    until(lambda: browser.find_element(By.ID, "key").is_displayed(), 20, "it does not ask for a key")
    browser.find_element(By.CSS_SELECTOR, "#key input").send_keys(ADMIN)
    browser.find_element(By.CSS_SELECTOR, "#key button").click()
    until(lambda: text(browser, "link") == "live", 20, "it does not connect")
    browser.get_log("browser")  # the refusal for want of a key
    records: list[dict[str, Any]] = []
    client = threading.Thread(target=lambda: records.append(live.search(name="drawn")))
    client.start()
    until(lambda: text(browser, "spec").startswith("fork every:400 · end speedup:1.5"), 30, "no search is drawn")
    until(lambda: text(browser, "s-tokens") != "0", 30, "no reasoning is drawn")
    until(lambda: "1" in numbers(browser, "rect.fork", "data-n"), 60, "no fork is drawn")
    until(lambda: "wrong" in numbers(browser, "text.verdict", "data-status"), 120, "no verdict is drawn")
    client.join(200)
    (record,) = records
    assert record["ended_by"] == "criterion", record["reason"]
    until(lambda: numbers(browser, "#end", "data-by") == {"criterion"}, 20, "the end is not drawn")
    assert numbers(browser, "rect.fork", "data-n") == {str(fork["n"]) for fork in record["forks"]}
    judged = {one["status"] for one in record["candidates"]}
    assert {"wrong", "compile_error", "correct"} <= judged
    assert judged <= numbers(browser, "text.verdict", "data-status") | {"cancelled"}
    assert {"compile", "check", "time"} <= numbers(browser, "rect.stage", "data-stage")
    assert len(browser.find_elements(By.ID, "graft")) == 1
    assert f"Reasoning ended early at {record['reasoning_tokens']:,} tokens" in text(browser, "verdictline")
    assert text(browser, "s-forks") == str(len(record["forks"]))
    no_errors(browser)


def test_a_page_that_loses_its_server_says_so(live: Live, browser: WebDriver, tmp_path: Path) -> None:
    page = tmp_path / "live.html"
    page.write_text(live.get("/specgen/").text)
    browser.get(f"file://{page}?server=http://127.0.0.1:9/specgen/")
    until(lambda: "connection lost" in text(browser, "link"), 20, "it does not say so")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_bundled_replay_on_the_page(template: Template, browser: WebDriver, tmp_path: Path) -> None:
    """The picture in docs/: SPECGEN_SCREENSHOT=docs/live_view.png writes it anew."""
    (trace,) = load_traces([BUNDLED])
    launch = prepare(
        ["--tiny-layers", "12", "--replay", str(trace.path), "--reasoning-parser", "deepseek-r1",
         "--specgen-evaluation-compile-s", "600", "--specgen-scheduler-base-share", "0.25"]
    )  # fmt: skip
    asked = {"task": trace.task_source, "name": trace.name, "trigger": "every:600", "termination": "speedup:1.2"}
    body = {
        "model": "m", "max_tokens": 8000, "temperature": 0, "custom_params": {"specgen": json.dumps(asked)},
        "messages": [{"role": "user", "content": f"Make this faster.\n\n```python\n{trace.task_source}\n```"}],
    }  # fmt: skip
    environment = {**launch.environment, **ENVIRONMENT}
    with running_server(launch.arguments, tmp_path / "log", environment, template=template) as server:
        browser.get(f"{server.url}/specgen/")
        until(lambda: text(browser, "link") == "live", 20, "it does not connect")
        answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=800).json()
        record = answer["sglext"]["specgen"]
        until(lambda: numbers(browser, "#end", "data-by") == {record["ended_by"]}, 20, "the end is not drawn")
        time.sleep(1)
        browser.save_screenshot(os.environ.get("SPECGEN_SCREENSHOT", str(tmp_path / "live_view.png")))
        no_errors(browser)
    assert record["ended_by"] == "criterion"
