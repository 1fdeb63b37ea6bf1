"""Chromium for the tests of pages; they are skipped, with a reason, where there is none."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "chrome")
PATIENCE = 20_000  # milliseconds, on a machine that is busy


@contextmanager
def chromium(*arguments: str) -> Iterator[Browser]:
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright (pip install playwright)")
    playwright.expect.set_options(timeout=PATIENCE)
    with playwright.sync_playwright() as driver:
        own = driver.chromium.executable_path
        found = [path for name in NAMES if (path := shutil.which(name))] + [own] * Path(own).exists()
        if not found:
            pytest.skip("needs a browser: Chromium, as a system package or by `playwright install chromium`")
        alone = ["--no-sandbox"] * (os.geteuid() == 0)  # Chromium's own cannot be root's
        browser = driver.chromium.launch(executable_path=found[0], args=[*arguments, *alone])
        yield browser
        browser.close()
