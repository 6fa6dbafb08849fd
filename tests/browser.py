"""Chromium without a window, driven over the DevTools protocol through a pair of pipes."""
import base64
import json
import os
import shutil
import subprocess
import time

import pytest

KEYS = {"Enter": (13, "\r"), "Tab": (9, ""), "Escape": (27, ""), "ArrowLeft": (37, ""),
        "ArrowRight": (39, ""), "ArrowDown": (40, ""), "/": (191, "/")}


class Browser:
    """One page in a fresh profile.  Skips where there is no chromium, unless CLIP_TTRT_BROWSER is
    set, as .ci/run does: then the test fails."""

    def __init__(self, profile, width=1100, height=800):
        chromium = shutil.which("chromium")
        if chromium is None:
            (pytest.fail if os.environ.get("CLIP_TTRT_BROWSER") else pytest.skip)("no chromium")
        (theirs, self.write), (self.read, their_answers) = os.pipe(), os.pipe()
        command = [chromium, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run",
                   "--disable-dev-shm-usage", "--remote-debugging-pipe", "--mute-audio",
                   f"--user-data-dir={profile}", f"--window-size={width},{height}", "about:blank"]
        pipes = f'exec "$@" 3<&{theirs} 4>&{their_answers}'  # the numbers that chromium expects
        self.process = subprocess.Popen(
            ["bash", "-c", pipes, "bash", *command], pass_fds=(theirs, their_answers),
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(theirs), os.close(their_answers)
        self.sent, self.events, self.buffer, self.session = 0, [], b"", None
        page = self("Target.createTarget", url="about:blank")["targetId"]
        self.session = self("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime"):
            self(f"{domain}.enable")

    def __call__(self, method, **parameters):
        """What a call of the protocol returns; events meanwhile are kept."""
        self.sent += 1
        call = {"id": self.sent, "method": method, "params": parameters}
        if self.session:
            call["sessionId"] = self.session
        os.write(self.write, json.dumps(call).encode() + b"\0")
        while True:
            while b"\0" not in self.buffer:
                part = os.read(self.read, 1 << 16)
                assert part, "chromium has ended"
                self.buffer += part
            message, _, self.buffer = self.buffer.partition(b"\0")
            message = json.loads(message)
            if message.get("id") == self.sent:
                assert "error" not in message, (method, message["error"])
                return message["result"]
            self.events.append(message)

    def value(self, expression):
        """Of JavaScript in the page, a promise's once it is there."""
        found = self("Runtime.evaluate", expression=expression, awaitPromise=True,
                     returnByValue=True, userGesture=False)
        assert "exceptionDetails" not in found, (expression, found["exceptionDetails"])
        return found["result"].get("value")

    def until(self, expression, seconds=20):
        """Wait for an expression to hold, and return its value."""
        end = time.monotonic() + seconds
        while not (found := self.value(expression)):
            assert time.monotonic() < end, f"never: {expression}"
            time.sleep(0.03)
        return found

    def type(self, text):
        self("Input.insertText", text=text)

    def press(self, key, times=1):
        for _ in range(times):
            code, text = KEYS[key]
            about = {"key": key, "windowsVirtualKeyCode": code, "text": text}
            self("Input.dispatchKeyEvent", type="keyDown", **about)
            self("Input.dispatchKeyEvent", type="keyUp", **about)

    def click(self, selector, across=0.5):
        """Of the mouse, in an element, as far across it as is asked for."""
        x, y = self.value(f"""(() => {{
            const one = document.querySelector({json.dumps(selector)});
            one.scrollIntoView({{block: "center"}});
            const sides = one.getBoundingClientRect();
            return [sides.left + {across} * sides.width, sides.top + sides.height / 2];
        }})()""")
        for kind in ("mousePressed", "mouseReleased"):
            self("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def screenshot(self):
        return base64.b64decode(self("Page.captureScreenshot", format="png")["data"])

    def close(self):
        os.close(self.write)
        self.process.terminate()
        self.process.wait()
        os.close(self.read)
