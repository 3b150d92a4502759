"""The built book in a real browser: `make book-test`, which builds it first.

$CHROME names the browser; otherwise the first of the usual ones that is found.
"""

import functools
import http.server
import os
import shutil
import sys
import threading
from pathlib import Path

import pytest
from playwright.sync_api import expect, sync_playwright

BOOK = Path(__file__).parents[1] / "build" / "book"
PAGES = sorted(path.relative_to(BOOK).as_posix() for path in BOOK.rglob("*.html"))
PAGES = [page for page in PAGES if not page.startswith("_static")]  # parts of the theme
NOTEBOOKS = [page for page in PAGES if page.startswith("notebooks/0")]
SCAN = "notebooks/01_lzw_allocation.html"
BROWSERS = [
    *("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge"),
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
]


@pytest.fixture(scope="session")
def address():
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    handler = functools.partial(Quiet, directory=BOOK)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="session")
def browser():
    names = [os.environ["CHROME"]] if "CHROME" in os.environ else BROWSERS
    program = next(filter(None, map(shutil.which, names)), None)
    if program is None:
        pytest.exit(f"no browser found (tried {', '.join(names)}); name one with CHROME=...", 1)
    root = sys.platform == "linux" and os.geteuid() == 0  # for whom Chromium has no sandbox
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=program, chromium_sandbox=not root)


@pytest.fixture
def page(browser, address):
    """A fresh page, which must load nothing from elsewhere and have nothing to complain about."""
    context = browser.new_context(base_url=address, permissions=["clipboard-read", "clipboard-write"])
    page, complaints = context.new_page(), []

    def note(what, complain):
        if complain:
            complaints.append(what)

    page.on("console", lambda said: note(said.text, said.type == "error"))
    page.on("pageerror", lambda error: note(str(error), True))
    page.on("response", lambda got: note(f"{got.status} {got.url}", got.status >= 400))
    # A request is aborted if the test leaves the page before the answer.
    page.on("requestfailed", lambda lost: note(f"lost {lost.url}", "ABORTED" not in lost.failure))
    page.on(
        "request", lambda asked: note(asked.url, not asked.url.startswith((address, "data:", "blob:")))
    )
    yield page
    context.close()
    assert complaints == []


def typeset(page):
    page.wait_for_function("!window.MathJax || MathJax.startup?.promise")
    page.evaluate("() => window.MathJax?.startup.promise")


@pytest.mark.parametrize("name", PAGES)
def test_page_opens_with_its_math_and_pictures(page, name):
    page.goto(name)
    typeset(page)
    math = page.locator(".math")
    assert page.locator(".math mjx-container").count() == math.count()
    assert page.locator("mjx-merror").count() == 0
    broken = """() => [...document.images].filter(image => image.naturalWidth === 0 && !image.hidden)
        .map(image => image.src)"""
    page.evaluate(
        "() => document.images.length && Promise.all([...document.images].map(i => i.decode()))"
    )
    assert page.evaluate(broken) == []


def test_notebooks_have_math_pictures_and_outputs(page):
    assert len(NOTEBOOKS) == 9
    for name in NOTEBOOKS:
        page.goto(name)
        for part in (".math", ".cell_output img", ".cell_output .highlight", "details > summary"):
            assert page.locator(f"article {part}").count() > 0, f"{name}: {part}"


def test_links_lead_somewhere(page, address):
    """Every page, file and fragment that any page links to exists."""
    fragments, links = {}, {}
    for name in PAGES:
        page.goto(name, wait_until="domcontentloaded")
        fragments[name] = page.evaluate("() => [...document.querySelectorAll('[id]')].map(e => e.id)")
        links[name] = page.evaluate("() => [...document.querySelectorAll('a[href]')].map(a => a.href)")
    missing = set()
    for name in PAGES:
        for link in links[name]:
            target, _, fragment = link.removeprefix(address).partition("#")
            if not link.startswith(address) or not target:
                continue
            anchors = fragments.get(target, [])
            if not (BOOK / target).is_file() or (fragment and fragment not in anchors):
                missing.add((name, target, fragment))
    assert missing == set()


def test_notebooks_follow_one_another(page):
    page.goto(NOTEBOOKS[0])
    for following in NOTEBOOKS[1:]:
        page.locator("a.right-next").click()
        page.wait_for_url(f"**/{following}")


def test_search_finds_a_word(page):
    page.goto("index.html")
    page.keyboard.press("Control+k")
    page.locator("dialog input[type=search]").fill("codeword")
    page.keyboard.press("Enter")
    page.wait_for_url("**/search.html?q=codeword*")
    found = page.locator("#search-results li a")
    expect(found.filter(has_text="01 ·").first).to_be_visible()
    found.filter(has_text="01 ·").first.click()
    page.wait_for_url(f"**/{SCAN}*")


def test_code_can_be_copied(page):
    page.goto(SCAN)
    cell = page.locator(".cell_input").first
    cell.hover()
    cell.locator("button.copybtn").click()
    copied = page.evaluate("() => navigator.clipboard.readText()")
    assert copied.strip() == cell.locator("pre").inner_text().strip()


def test_hints_and_solutions_unfold(page):
    for name in NOTEBOOKS:
        page.goto(name)
        for part in page.locator("article details").all():
            inside = part.locator(":scope > :not(summary)").first
            expect(inside).not_to_be_visible()
            part.locator("summary").click()
            expect(inside).to_be_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_theme_follows_the_reader(page, scheme):
    page.emulate_media(color_scheme=scheme)
    page.goto(SCAN)
    colour = page.evaluate("() => getComputedStyle(document.body).backgroundColor")
    bright = sum(map(int, colour.removeprefix("rgb(").rstrip(")").split(", ")))
    assert (bright > 384) == (scheme == "light")


def test_nothing_is_wider_than_a_phone(page):
    page.set_viewport_size({"width": 390, "height": 800})
    for name in (*NOTEBOOKS, "index.html", "notebooks/README.html", "l3paper/README.html"):
        page.goto(name)
        typeset(page)
        assert page.evaluate("() => document.documentElement.scrollWidth") <= 390, name


def test_scan_steps_by_button_key_and_clock(page):
    page.goto(SCAN)
    scan, said, place = (page.locator(f".scan{part}") for part in ("", " .scan-said", " .scan-place"))
    expect(page.locator("img[src$='01_scan.gif']")).not_to_be_visible()
    expect(place).to_have_text("1 / 32")
    scan.get_by_role("button", name="Next step").click()
    expect(said).to_contain_text("“the” is known")
    scan.focus()
    page.keyboard.press("ArrowRight")
    expect(said).to_contain_text("“the light” is new")
    expect(scan.locator(".scan-now")).to_have_text(["the", "light"])
    page.keyboard.press("Home")
    expect(place).to_have_text("1 / 32")
    page.keyboard.press("End")
    expect(said).to_have_text("All 12 rows are given.")
    expect(scan.locator(".scan-stack i")).to_have_count(12)
    page.clock.install()
    scan.get_by_role("button", name="Play").click()
    page.clock.run_for(2000)
    expect(place).to_have_text("2 / 32")
    scan.get_by_role("button", name="Pause").click()
    page.clock.run_for(5000)
    expect(place).to_have_text("2 / 32")


def test_the_animation_stays_without_scripts(browser, address):
    with browser.new_context(base_url=address, java_script_enabled=False) as context:
        page = context.new_page()
        page.goto(SCAN)
        expect(page.locator("img[src$='01_scan.gif']")).to_be_visible()
        expect(page.locator(".scan")).not_to_be_visible()
