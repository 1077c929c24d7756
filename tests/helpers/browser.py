"""A headless Chromium driven over its debugging pipe (DevTools protocol), without further packages."""

import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

PROGRAM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)


class Browser:
    """One browser; `tab(url)` opens a page."""

    def __init__(self, profile: Path):
        assert PROGRAM is not None
        to_browser, ours = os.pipe()
        theirs, from_browser = os.pipe()

        def pipes() -> None:  # the protocol's: it reads from 3 and writes to 4
            read, write = os.dup(to_browser), os.dup(from_browser)
            os.dup2(read, 3)
            os.dup2(write, 4)

        command = [PROGRAM, "--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"]
        command += [f"--user-data-dir={profile}", "--no-first-run", "about:blank"]
        self.process = subprocess.Popen(
            command, preexec_fn=pipes, close_fds=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(to_browser)
        os.close(from_browser)
        self.out, self.into = os.fdopen(theirs, "rb"), os.fdopen(ours, "wb")
        self.number = 0

    def call(self, method: str, session: str | None = None, **parameters: Any) -> Any:
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters} | (
            {"sessionId": session} if session else {}
        )
        self.into.write(json.dumps(message).encode() + b"\0")
        self.into.flush()
        while True:
            answer = json.loads(self._message())
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                return answer["result"]

    def _message(self) -> bytes:
        found = b""
        while (byte := self.out.read(1)) != b"\0":
            assert byte, "the browser has gone"
            found += byte
        return found

    def tab(self, url: str) -> "Tab":
        target = self.call("Target.createTarget", url=url)["targetId"]
        return Tab(self, self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"])

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.into.close()
        self.out.close()


class Tab:
    def __init__(self, browser: Browser, session: str):
        self.browser, self.session = browser, session

    def call(self, method: str, **parameters: Any) -> Any:
        return self.browser.call(method, self.session, **parameters)

    def evaluate(self, expression: str) -> Any:
        return self.call("Runtime.evaluate", expression=expression, awaitPromise=True)["result"].get("value")

    def until(self, expression: str, seconds: float = 10.0) -> None:
        """Wait until a JavaScript expression is true."""
        end = time.monotonic() + seconds
        while not self.evaluate(expression):
            assert time.monotonic() < end, f"{expression}; the page: {self.evaluate('document.body.innerText')}"
            time.sleep(0.02)

    def press(self, key: str) -> None:
        text = {"text": key} if len(key) == 1 else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key)

    def click(self, selector: str) -> None:
        element = f"document.querySelector({json.dumps(selector)})"
        self.evaluate(f"{element}.scrollIntoView()")
        place = json.loads(self.evaluate(f"JSON.stringify({element}.getBoundingClientRect())"))
        x, y = place["x"] + place["width"] / 2, place["y"] + place["height"] / 2
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def reload(self) -> None:
        self.call("Page.reload")

    def screenshot(self, path: Path) -> None:
        import base64

        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))
