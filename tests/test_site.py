"""The site builds without a warning; its links lead somewhere; and it works in a browser, where there is one."""

import os
import shutil
import subprocess
import sys
import threading
import zlib
from collections.abc import Iterator
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from support import ROOT
from test_docs import OURS

CHROMIUM, DRIVER = (shutil.which(name) for name in ("chromium", "chromedriver"))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A build from a copy: the reference's pages are written beside the others."""
    top = tmp_path_factory.mktemp("site")
    source = top / "docs"
    shutil.copytree(ROOT / "docs", source, ignore=shutil.ignore_patterns("build", "reference"))
    shutil.copy(ROOT / "README.md", top)
    (top / "peftfn").symlink_to(ROOT / "peftfn")  # pages link to sources
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", "--fail-on-warning", "--keep-going", "--quiet", source, top / "html"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return top / "html"


def test_every_public_name_is_in_the_reference(site: Path) -> None:
    """By the site's own inventory, which other projects' sites link by."""
    head, _, packed = (site / "objects.inv").read_bytes().partition(b"zlib.\n")
    assert b"Project: peftfn" in head
    listed = {line.split()[0] for line in zlib.decompress(packed).decode().splitlines()}
    modules = {"merging", "optim", "routing", "starts", "steps", "suggest"}
    assert {f"peftfn.{n}" for n in OURS - modules} - listed == set()


class Page(HTMLParser):
    """The links and the ids of a page."""

    def __init__(self, path: Path):
        super().__init__()
        self.links: set[str] = set()
        self.ids: set[str] = set()
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id" and value:
                self.ids.add(value)
            elif name in ("href", "src") and value:
                self.links.add(value)


def test_links_of_the_site_lead_somewhere(site: Path) -> None:
    pages = {path: Page(path) for path in site.rglob("*.html")}
    broken, seen = [], 0
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            to = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            seen += 1
            ids = pages[to].ids if to in pages else set()
            if not to.exists() or (parts.fragment and to in pages and unquote(parts.fragment) not in ids):
                broken.append(f"{path.relative_to(site)}: {link}")
    assert seen > 1000
    assert not broken


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None: ...


@pytest.fixture(scope="module")
def served(site: Path) -> Iterator[str]:
    """The site's address on this machine: its search fetches what it shows, which a page from a disk may not."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for argument in (
        "headless",
        "no-sandbox",
        "disable-gpu",
        "disable-dev-shm-usage",
        "disable-background-networking",
        "disable-component-update",
        "no-first-run",
        f"user-data-dir={tmp_path_factory.mktemp('chromium')}",
    ):
        options.add_argument(f"--{argument}")
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.implicitly_wait(20)
    yield driver
    driver.quit()


@pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver")
def test_the_site_in_a_browser(site: Path, served: str, browser: webdriver.Chrome) -> None:
    """Follow a link, search, switch to dark, and read on a phone: no error of a script, nothing wider than the page."""
    browser.set_window_size(1280, 900)
    browser.get(f"{served}/index.html")
    browser.find_element(By.LINK_TEXT, "Many adapters at once").click()
    assert browser.find_element(By.TAG_NAME, "h1").text.startswith("Many adapters at once")

    browser.get(f"{served}/search.html?q=checkpointed")
    found = browser.find_elements(By.CSS_SELECTOR, "#search-results li a")
    assert any("checkpointed" in (link.get_attribute("href") or "") for link in found)

    body = browser.find_element(By.TAG_NAME, "body")
    themes = set()
    for _ in range(3):
        browser.find_element(By.CSS_SELECTOR, ".content-icon-container .theme-toggle").click()
        themes.add(body.get_attribute("data-theme"))
    assert themes == {"auto", "light", "dark"}

    errors = []
    for page in sorted(site.glob("*.html")):
        browser.set_window_size(500, 900)  # the least that chromium takes
        browser.get(f"{served}/{page.name}")
        width, seen = browser.execute_script(
            "return [document.documentElement.scrollWidth, document.documentElement.clientWidth]"
        )
        if width > seen:
            errors.append(f"{page.name}: {width} pixels on a screen of {seen}")
        errors += [f"{page.name}: {e['message']}" for e in browser.get_log("browser") if e["level"] == "SEVERE"]
    assert not errors
