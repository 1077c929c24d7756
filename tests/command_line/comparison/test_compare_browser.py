"""`handtune compare` in a real browser: keys and clicks, two tabs, a reload, a server that is killed."""

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import PROGRAM, Browser, Tab
from small_runs import write_rows

from handtune.comparison.session import Session
from handtune.engine.data.readers import read_rows

pytestmark = [pytest.mark.deep, pytest.mark.skipif(PROGRAM is None, reason="there is no Chromium on this machine")]
DONE = "document.getElementById('count').textContent"


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    browser = Browser(tmp_path / "profile")
    yield browser
    browser.close()


def served(tmp_path: Path, port: int = 0) -> tuple["subprocess.Popen[str]", str]:
    rows = [{"prompt": f"prompt {i}", "completions": [f"good {i}", f"bad {i}"]} for i in range(12)]
    command = [sys.executable, "-m", "handtune", "compare", "--pairs", str(write_rows(tmp_path / "pairs.jsonl", rows))]
    command += ["--out", str(tmp_path / "out.jsonl"), "--repeat", "0", "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    found = re.search(r"http://\S+", process.stdout.readline())
    assert found is not None
    return process, found[0]


def at(tab: Tab, done: int) -> None:
    tab.until(f"{DONE} === '{done} of 12'")


def test_a_session_in_a_browser(browser: Browser, tmp_path: Path) -> None:
    process, url = served(tmp_path)
    tab = browser.tab(url)
    at(tab, 0)
    expected: dict[int, str] = {}
    for done, (key, answer) in enumerate([("ArrowLeft", "left"), ("b", "right"), ("t", "tie"), ("s", "skip")]):
        tab.press(key)
        expected[done] = answer
        at(tab, done + 1)
    tab.press("u")
    at(tab, 3)
    expected.pop(3)
    tab.click("#right")
    expected[3] = "right"
    at(tab, 4)
    tab.click("[data-answer=tie]")
    expected[4] = "tie"
    at(tab, 5)
    tab.reload()
    at(tab, 5)
    second = browser.tab(url)
    at(second, 5)
    second.press("a")  # both tabs show item 5: the first answer counts
    at(second, 6)
    tab.press("b")
    at(tab, 6)
    expected[5] = "left"
    assert Session(tmp_path / "out.jsonl.session").answers == expected
    process.send_signal(signal.SIGKILL)
    process.wait()
    tab.press("a")
    tab.until("document.getElementById('said').textContent.startsWith('Not written down')")
    assert Session(tmp_path / "out.jsonl.session").answers == expected
    process, url = served(tmp_path)
    tab = browser.tab(url)
    at(tab, 6)
    for done in range(6, 12):
        left = tab.evaluate("document.getElementById('left').textContent")
        tab.press("a" if left.startswith("good") else "b")
        at(tab, done + 1)
    tab.until("document.getElementById('prompt').textContent.startsWith('Every pair')")
    process.send_signal(signal.SIGINT)
    process.wait(20)
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl.session/answers.jsonl").read_text().splitlines()]
    assert len(lines) == 14  # twelve answers, one of them taken back and given again
    rows = read_rows(tmp_path / "out.jsonl")
    assert [row.get("tie", False) for row in rows].count(True) == 2
    assert all(row["chosen"].startswith("good") for row in rows[6:])


def test_nothing_is_loaded_from_outside_and_texts_are_texts(browser: Browser, tmp_path: Path) -> None:
    rows = [
        {
            "prompt": "<img src=x onerror=alert(1)>",
            "completions": ["<b>bold</b>", "<script>document.title='x'</script>"],
        }
    ]
    command = [sys.executable, "-m", "handtune", "compare", "--pairs", str(write_rows(tmp_path / "pairs.jsonl", rows))]
    process = subprocess.Popen([*command, "--out", str(tmp_path / "o.jsonl")], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    found = re.search(r"http://\S+", process.stdout.readline())
    assert found is not None
    tab = browser.tab(found[0])
    tab.until(f"{DONE} === '0 of 1'")
    assert tab.evaluate("document.querySelectorAll('img, b, main script').length") == 0
    assert tab.evaluate("document.getElementById('prompt').textContent") == "<img src=x onerror=alert(1)>"
    entries = tab.evaluate(
        "JSON.stringify(performance.getEntriesByType('resource').map((e) => new URL(e.name).pathname))"
    )
    assert set(json.loads(entries)) == {"/next"}
    tab.screenshot(tmp_path / "page.png")
    process.kill()
    process.wait()
