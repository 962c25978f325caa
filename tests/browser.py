"""A real headless Chromium for the tests of pages: Debian's, driven by Playwright. Where there is none they are skipped, and say so."""

import shutil
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import uvicorn
from playwright.sync_api import Browser, BrowserContext, Page, ViewportSize, expect, sync_playwright

from conf.settings import Settings
from jobs.explorer.app import Explorer, make_app

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
expect.set_options(timeout=30_000)  # milliseconds; a loaded machine takes its time to import FAISS for the first mix
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH: `apt-get install chromium`")


@contextmanager
def launched() -> Iterator[Browser]:
    """A browser. While it is open, its thread counts as one with a running event loop: there can be no second one."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield browser
        browser.close()


def window(
    browser: Browser, *, width: int = 1280, height: int = 900, dark: bool = False, scripts: bool = True, touch: bool = False
) -> BrowserContext:
    """A fresh window with nothing remembered; its size in CSS pixels. `touch`: a phone, tapped with a finger."""
    scheme = "dark" if dark else "light"
    size: ViewportSize = {"width": width, "height": height}
    return browser.new_context(viewport=size, color_scheme=scheme, java_script_enabled=scripts, has_touch=touch, is_mobile=touch)


@contextmanager
def open_browser(*, width: int = 1280, height: int = 900, dark: bool = False, touch: bool = False) -> Iterator[BrowserContext]:
    """A window of a browser of its own."""
    with launched() as browser:
        yield window(browser, width=width, height=height, dark=dark, touch=touch)


def watched(context: BrowserContext) -> tuple[Page, list[str]]:
    """A new page, and everything that goes wrong in it: errors of scripts, of the console, and dialogs."""
    page, faults = context.new_page(), list[str]()
    page.on("pageerror", lambda error: faults.append(f"error: {error}"))
    page.on("console", lambda message: faults.append(f"console: {message.text}") if message.type == "error" else None)
    page.on("dialog", lambda dialog: (faults.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    return page, faults


def sticking_out(page: Page) -> list[str]:
    """Elements that make the page wider than the window, as the beginning of their HTML."""
    wide = "document.documentElement.scrollWidth > document.documentElement.clientWidth"
    right = "[...document.body.querySelectorAll('*')].filter(e => e.getBoundingClientRect().right > document.documentElement.clientWidth)"
    found: list[str] = page.evaluate(f"({wide}) ? ({right}).map(e => e.outerHTML.slice(0, 120)) : []")
    return found


@contextmanager
def served(settings: Settings) -> Iterator[str]:
    """The address of a server in a thread of this process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(make_app(Explorer(settings=settings)), host="127.0.0.1", port=port, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        thread.join(0.01)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join()
