"""Headless Chromium driven over a pair of pipes: the Chrome DevTools Protocol, of which this takes what tests need.

The protocol: https://chromedevtools.github.io/devtools-protocol; messages are JSON, each ends with a zero byte.
"""

import base64
import fcntl
import json
import os
import shutil
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

NAMES = ("chromium", "chromium-headless-shell", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",  # which root has to leave out; the only pages are this repository's
    "--disable-dev-shm-usage",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--no-default-browser-check",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)
SECONDS = 60.0  # after which a test gives up
KEYS = {"Tab": 9, "Enter": 13, "Escape": 27, " ": 32, "ArrowUp": 38, "ArrowDown": 40}


def find() -> str | None:
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """A process with a profile in `folder`; ends with the `with` block."""

    def __init__(self, folder: Path):
        theirs_in, ours_out = (_high(fd) for fd in os.pipe())
        ours_in, theirs_out = (_high(fd) for fd in os.pipe())
        launch = f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}'
        command = [find(), *FLAGS, f"--user-data-dir={folder}", "about:blank"]
        self._process = subprocess.Popen(
            ["bash", "-c", launch, "bash", *command],
            pass_fds=(theirs_in, theirs_out),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._in, self._out = os.fdopen(ours_in, "rb"), os.fdopen(ours_out, "wb")
        self._news = threading.Condition()
        self._replies: dict[int, dict[str, Any]] = {}
        self._count, self._ended = 0, False
        self.listeners: dict[str, Callable[[dict[str, Any]], None]] = {}  # by session
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        text = b""
        while chunk := self._in.read1(2**16):
            *whole, text = (text + chunk).split(b"\0")
            for message in map(json.loads, whole):
                with self._news:
                    if "id" in message:
                        self._replies[message["id"]] = message
                    elif listener := self.listeners.get(message.get("sessionId", "")):
                        listener(message)
                    self._news.notify_all()
        with self._news:
            self._ended = True
            self._news.notify_all()

    def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """The result; RuntimeError where the browser refuses or has ended."""
        with self._news:
            self._count += 1
            number = self._count
            message = {"id": number, "method": method, "params": params}
            if session is not None:
                message["sessionId"] = session
            self._out.write(json.dumps(message).encode() + b"\0")
            self._out.flush()
            if not self._news.wait_for(lambda: self._ended or number in self._replies, SECONDS + 10):
                raise TimeoutError(f"{method} was not answered")
            if number not in self._replies:
                raise RuntimeError(f"the browser ended at {method}, exit code {self._process.poll()}")
            reply = self._replies.pop(number)
        if "error" in reply:
            raise RuntimeError(f"{method}: {reply['error']}")
        return reply["result"]

    def open(self) -> "Tab":
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        return Tab(self, self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"])

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self._out.close()  # which ends it
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join(10)
        self._in.close()


class Tab:
    """requests: what the page has asked for, {"url", "method", "body"}. complaints: errors of scripts, of the console,
    and what the content policy has stopped."""

    def __init__(self, browser: Browser, session: str):
        self._browser, self._session = browser, session
        self.requests: list[dict[str, Any]] = []
        self.complaints: list[str] = []
        browser.listeners[session] = self._heard
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def _heard(self, message: dict[str, Any]) -> None:
        method, params = message["method"], message["params"]
        if method == "Network.requestWillBeSent":
            asked = params["request"]
            self.requests.append({"url": asked["url"], "method": asked["method"], "body": asked.get("postData")})
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(params["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.complaints.append(json.dumps(params["args"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.complaints.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        return self._browser.call(method, self._session, **params)

    def show(self, address: str, width: int = 1200, height: int = 900, **media: str) -> None:
        """A page from the start, and nothing of the one before. media: as in prefers_color_scheme="dark"."""
        self.call("Page.navigate", url="about:blank")  # else a new fragment alone would load nothing
        self.wait_for("document.readyState === 'complete'")
        self.requests.clear()
        self.complaints.clear()
        self.resize(width, height)
        features = [{"name": name.replace("_", "-"), "value": value} for name, value in media.items()]
        self.call("Emulation.setEmulatedMedia", features=features)
        if reason := self.call("Page.navigate", url=address).get("errorText"):
            raise RuntimeError(f"{address}: {reason}")
        self.wait_for("document.readyState === 'complete'")

    def reload(self) -> None:
        self.value("window.old = true")
        self.call("Page.reload")
        self.wait_for("!window.old && document.readyState === 'complete'")

    def resize(self, width: int, height: int) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def value(self, expression: str) -> Any:
        """What JavaScript makes of it, as JSON; a promise is waited for."""
        reply = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in reply:
            raise RuntimeError(f"{expression}: {json.dumps(reply['exceptionDetails'])}")
        return reply["result"].get("value")

    def wait_for(self, condition: str) -> Any:
        """Until it is true; its value. Asks at every frame, in the page."""
        waiting = f"""new Promise((done, failed) => {{
            const end = performance.now() + {1000 * SECONDS};
            const look = () => {{
                const value = {condition};
                if (value) done(value);
                else if (performance.now() > end) failed(new Error('it never came'));
                else setTimeout(look, 5);
            }};
            look();
        }})"""
        return self.value(waiting)

    def text(self, selector: str) -> str:
        return self.value(f"document.querySelector({json.dumps(selector)}).innerText")

    def click(self, selector: str) -> None:
        """As a mouse does, at the middle of it."""
        where = f"""(() => {{
            const found = document.querySelector({json.dumps(selector)});
            found.scrollIntoView({{block: 'center', behavior: 'instant'}});
            const box = found.getBoundingClientRect();
            return [box.x + box.width / 2, box.y + box.height / 2];
        }})()"""
        x, y = self.value(where)
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def fill(self, selector: str, text: str) -> None:
        """Into a field, or the option of a list that is called so."""
        self.value(f"""(() => {{
            const field = document.querySelector({json.dumps(selector)});
            const text = {json.dumps(text)};
            if (field.tagName === 'SELECT') {{
                const at = [...field.options].findIndex((option) => option.textContent === text);
                if (at < 0) throw new Error(`no option ${{text}}`);
                field.selectedIndex = at;
            }} else field.value = text;
            field.dispatchEvent(new Event('input', {{bubbles: true}}));
        }})()""")

    def press(self, key: str, shift: bool = False) -> None:
        code = KEYS.get(key, ord(key[0].upper()))
        named = {"key": key, "windowsVirtualKeyCode": code, "code": key, "modifiers": 8 if shift else 0}
        text = {"Enter": "\r", " ": " "}.get(key, key if len(key) == 1 else "")
        self.call("Input.dispatchKeyEvent", type="keyDown", **named, **({"text": text} if text else {}))
        self.call("Input.dispatchKeyEvent", type="keyUp", **named)

    def type(self, text: str) -> None:
        """Where the focus is."""
        self.call("Input.insertText", text=text)

    def screenshot(self, path: Path, whole: bool = False) -> None:
        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(data))


def _high(fd: int) -> int:
    """The same beyond those numbers that the browser reads and writes, so that neither hides the other."""
    copy = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10)
    os.close(fd)
    return copy
