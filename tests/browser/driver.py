"""A browser by the W3C WebDriver protocol: chromedriver and nothing that must be installed from elsewhere."""

import base64
import json
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--hide-scrollbars",
)  # fmt: skip
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"


class Browser:
    """One window."""

    def __init__(self, port, session):
        self.base = f"http://127.0.0.1:{port}/session/{session}"

    def send(self, path, body=None):
        return _send(f"{self.base}/{path}", body)

    def open(self, url):
        self.send("url", {"url": url})

    def size(self, width, height):
        self.send("window/rect", {"width": width, "height": height})

    def run(self, script, *arguments):
        """What a piece of JavaScript returns."""
        return self.send("execute/sync", {"script": script, "args": list(arguments)})

    def find(self, selector):
        found = self.send("elements", {"using": "css selector", "value": selector})
        assert found, f"no element {selector}"
        return [one[ELEMENT] for one in found]

    def click(self, selector, place=0):
        self.send(f"element/{self.find(selector)[place]}/click", {})

    def type(self, selector, text):
        self.send(f"element/{self.find(selector)[0]}/value", {"text": text})

    def wait(self, script, seconds=20):
        """Until a piece of JavaScript returns something true."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if value := self.run(script):
                return value
            time.sleep(0.2)
        raise AssertionError(f"waited {seconds} s in vain for: {script}")

    def errors(self):
        """What the page complained about, but for icons that are not there."""
        entries = self.send("se/log", {"type": "browser"})
        return [e["message"] for e in entries if e["level"] == "SEVERE" and "favicon" not in e["message"]]

    def picture(self, path):
        request = urllib.request.urlopen(f"{self.base}/screenshot", timeout=60)
        Path(path).write_bytes(base64.b64decode(json.load(request)["value"]))


def _send(url, body=None):
    data = None if body is None else json.dumps(body).encode()
    method = "GET" if body is None else "POST"
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method=method)
    try:
        return json.load(urllib.request.urlopen(request, timeout=120))["value"]
    except urllib.error.HTTPError as error:
        raise AssertionError(error.read().decode()[:500]) from error


@contextmanager
def browser(port=9517):
    """A headless Chromium, closed at the end."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        driver = subprocess.Popen(["chromedriver", f"--port={port}"], stdout=subprocess.DEVNULL)
        try:
            for _ in range(100):
                try:
                    if _send(f"http://127.0.0.1:{port}/status")["ready"]:
                        break
                except OSError:
                    time.sleep(0.2)
            chrome = {"args": [*FLAGS, f"--user-data-dir={profile}"]}
            wanted = {"browserName": "chrome", "goog:chromeOptions": chrome, "goog:loggingPrefs": {"browser": "ALL"}}
            session = _send(f"http://127.0.0.1:{port}/session", {"capabilities": {"alwaysMatch": wanted}})
            window = Browser(port, session["sessionId"])
            yield window
            urllib.request.urlopen(urllib.request.Request(window.base, method="DELETE"), timeout=30)
        finally:
            driver.terminate()
            driver.wait(20)
