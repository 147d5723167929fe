"""The built documentation, opened page by page in a headless Chromium: `check.py FOLDER`.

Law: looks at what a reader's browser makes of the pages, and at nothing of how they were made, but
that all releases of CHANGELOG.md are on theirs.
Every link within the site leads to a page and an anchor that are there, no script fails, nothing is
wider than the window at 390 and 1280 pixels.  Without Chromium only the links are looked at, and
that is said.  Needs nothing but Python: Chromium is spoken to through a pipe.
"""

from __future__ import annotations

import argparse
import base64
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

WIDTHS = (390, 1280)
HEIGHT = 900
SECONDS_MAX = 300
"""After which a browser that hangs is ended."""
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = (
    "--headless", "--disable-gpu", "--hide-scrollbars", "--no-first-run", "--disable-extensions",
    "--disable-background-networking", "--disable-dev-shm-usage", "--remote-debugging-pipe",
    "--allow-file-access-from-files",
)  # fmt: skip
WIDER = """\
(() => {
    // The theme lets its own frames scroll, which would hide what is too wide for them.
    const frames = [document.documentElement, document.body,
                    ...document.querySelectorAll(".page, .main, .content, article, article div")];
    const ours = frames.filter(e => !e.closest(".drawing, .highlight, .table-wrapper"));
    const width = document.documentElement.clientWidth;
    const hides = e => ["auto", "scroll", "hidden"].includes(getComputedStyle(e).overflowX);
    const scrolls = e => e && !ours.includes(e) && (hides(e) || scrolls(e.parentElement));
    return [...document.querySelectorAll("article *")]
        .filter(e => e.getBoundingClientRect().right > width + 1 && !scrolls(e.parentElement))
        .map(e => `${e.tagName.toLowerCase()} ${e.className}`.trim() + ": "
             + (e.textContent || "").trim().slice(0, 50))
        .slice(0, 5);
})()
"""


# -- links ----------------------------------------------------------------------------------------


class Page(HTMLParser):
    """What a page links to, and what can be linked to in it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if value is None:
                continue
            if name == "id" or (tag == "a" and name == "name"):
                self.anchors.add(value)
            elif name in ("href", "src"):
                self.links.append(value)


def broken_links(site: Path) -> Iterator[str]:
    pages = {path.resolve(): Page(path.read_text("utf-8")) for path in site.rglob("*.html")}
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            where = f"{path.relative_to(site.resolve())}: {link}"
            if target.is_dir():
                target /= "index.html"
            if not target.exists():
                yield f"{where}: no such file"
            elif (
                parts.fragment
                and target in pages
                and unquote(parts.fragment) not in pages[target].anchors
            ):
                yield f"{where}: no such anchor"


# -- a browser ------------------------------------------------------------------------------------


class Browser:
    """A headless Chromium with one tab."""

    def __init__(self, program: str, profile: str) -> None:
        commands, self._out = os.pipe()
        self._in, answers = os.pipe()
        flags = [*FLAGS, f"--user-data-dir={profile}"]
        if os.geteuid() == 0:
            flags.append("--no-sandbox")  # which root has not got; the pages are our own
        self._process = subprocess.Popen(
            ["sh", "-c", f'exec "$0" "$@" 3<&{commands} 4>&{answers}', program, *flags],
            pass_fds=(commands, answers),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(commands)
        os.close(answers)
        self._watchdog = threading.Timer(SECONDS_MAX, self._process.kill)
        self._watchdog.start()
        self._buffer = b""
        self._numbers = itertools.count(1)
        self._session: str | None = None
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)[
            "sessionId"
        ]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def close(self) -> None:
        self._watchdog.cancel()
        self._process.kill()
        self._process.wait()
        os.close(self._in)
        os.close(self._out)

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            data = os.read(self._in, 1 << 16)
            if not data:
                raise RuntimeError("the browser has ended")
            self._buffer += data
        message, _, self._buffer = self._buffer.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        return found

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self._numbers)
        message: dict[str, Any] = {"id": number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            found = self._receive()
            if found.get("id") == number:
                if "error" in found:
                    raise RuntimeError(f"{method}: {found['error']}")
                result: dict[str, Any] = found["result"]
                return result
            self.events.append(found)

    def open(self, page: Path, width: int, theme: str = "light") -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=HEIGHT, deviceScaleFactor=1, mobile=False,
        )  # fmt: skip
        self.call(
            "Emulation.setEmulatedMedia",
            features=[{"name": "prefers-color-scheme", "value": theme}],
        )
        self.events.clear()
        self.call("Page.navigate", url=page.resolve().as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._receive())

    def evaluate(self, script: str) -> Any:
        return self.call("Runtime.evaluate", expression=script, returnByValue=True)["result"].get(
            "value"
        )

    def errors(self) -> Iterator[str]:
        """What went wrong since the page was opened."""
        for event in self.events:
            parameters = event.get("params", {})
            if event.get("method") == "Runtime.exceptionThrown":
                details = parameters["exceptionDetails"]
                yield details.get("exception", {}).get("description") or details["text"]
            elif (
                event.get("method") == "Log.entryAdded" and parameters["entry"]["level"] == "error"
            ):
                yield f"{parameters['entry']['text']} {parameters['entry'].get('url', '')}"

    def screenshot(self, file: Path) -> None:
        answer = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(answer["data"]))


def problems(browser: Browser, site: Path) -> Iterator[str]:
    for page in sorted(site.rglob("*.html")):
        name = page.relative_to(site)
        browser.open(page, WIDTHS[0])
        yield from (f"{name}: {error}" for error in browser.errors())
        for width in WIDTHS:
            browser.call(
                "Emulation.setDeviceMetricsOverride",
                width=width, height=HEIGHT, deviceScaleFactor=1, mobile=False,
            )  # fmt: skip
            for what in browser.evaluate(WIDER):
                yield f"{name}: wider than {width} pixels: {what}"


def take_screenshots(browser: Browser, site: Path, folder: Path, names: list[str]) -> None:
    """Of each page at each width, light and dark: to be looked at."""
    folder.mkdir(parents=True, exist_ok=True)
    for page in sorted(site.rglob("*.html")):
        name = str(page.relative_to(site).with_suffix("")).replace("/", "-")
        if not names or name in names:
            for width, theme in itertools.product(WIDTHS, ("light", "dark")):
                browser.open(page, width, theme)
                browser.screenshot(folder / f"{name}-{width}-{theme}.png")


def missing_releases(site: Path) -> Iterator[str]:
    """Those of CHANGELOG.md that its page does not show."""
    shown = (site / "changelog.html").read_text("utf-8")
    changelog = Path(__file__).resolve().parents[2] / "CHANGELOG.md"
    for title in re.findall(r"^## (.+)$", changelog.read_text("utf-8"), re.MULTILINE):
        if title not in shown:
            yield f"changelog.html: {title} is not shown"


def main() -> int:
    parser = argparse.ArgumentParser(description="The built documentation, in a browser.")
    parser.add_argument("site", type=Path)
    parser.add_argument("--screenshots", type=Path, help="a folder for them; nothing is checked")
    parser.add_argument("--page", dest="pages", action="append", default=[], help="of these only")
    given = parser.parse_args()
    program = next(filter(None, map(shutil.which, NAMES)), None)
    found: list[str] = []
    if not given.screenshots:
        found += [*broken_links(given.site), *missing_releases(given.site)]
    if program is None:
        print("no Chromium here: links were looked at, and no page was opened")
    else:
        # The browser's other processes may still write when it has been ended.
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
            browser = Browser(program, profile)
            try:
                if given.screenshots:
                    take_screenshots(browser, given.site, given.screenshots, given.pages)
                else:
                    found += problems(browser, given.site)
            finally:
                browser.close()
    for line in found:
        print(line)
    print(f"{len(list(given.site.rglob('*.html')))} pages, {len(found)} problems")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
