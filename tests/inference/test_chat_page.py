"""The chat page in a real browser with a real server: typing, streaming, stopping, storage and layout."""

import json
import os
import shutil

import pytest
from servers import serving, until

from lowrank_jax.data import tokenizer
from lowrank_jax.inference.server import routes

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SWITCHES = "--no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-component-update "
SWITCHES += "--disable-sync"
KEY = "s3cret"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM, reason="no Chromium is installed (on Debian: apt-get install chromium)"),
]


@pytest.fixture(scope="module")
def server(reference):
    with serving(reference, "--slots=2", f"--api_key={KEY}") as served:
        yield served


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=SWITCHES.split())
        yield launched
        launched.close()


@pytest.fixture
def visit(browser, server, reference):
    """Return a function that opens the page in a new browser context; stop symbols never end an answer there.

    Fails if the page raises an error.
    """
    contexts, errors = [], []
    never = {str(i): -100 for i in tokenizer.load(str(reference / "tokenizer")).specials.values()}

    def endlessly(route):
        route.continue_(post_data=json.dumps(json.loads(route.request.post_data) | {"logit_bias": never}))

    def open_page(width: int = 1000, height: int = 700, max_tokens: int = 30, key: str = KEY, scheme: str = "light"):
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
        contexts.append(context)
        settings = json.dumps({"key": key, "max_tokens": max_tokens})
        fill = f"localStorage['lowrank.settings'] ??= {json.dumps(settings)}"
        context.add_init_script(fill)
        page = context.new_page()
        page.on("pageerror", lambda e: errors.append(str(e)))
        page.on("console", lambda m: errors.append(m.text) if "Content Security" in m.text else None)
        page.route("**/v1/chat/completions", endlessly)
        page.goto(server.url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not errors


def say(page, text: str) -> None:
    page.fill("#input", text)
    page.press("#input", "Enter")


def answered(page, count: int) -> list[str]:
    """Return the texts of all messages, once there are `count` of them and all are complete."""
    page.wait_for_selector(f":nth-match(.message, {count})")
    page.wait_for_selector(".busy", state="detached")
    return page.locator(".message .text").all_inner_texts()


# Records the answer's length at every change of the page, because a fast answer ends before a test can look at it.
LISTEN = """() => {
  window.lengths = [];
  const note = () => lengths.push(document.querySelector(".assistant .text")?.textContent.length ?? 0);
  const changes = {childList: true, subtree: true, characterData: true};
  new MutationObserver(note).observe(document.querySelector("#log"), changes);
}"""


def test_a_conversation_is_streamed_and_still_there_after_a_reload(visit, server):
    page = visit(max_tokens=600)
    assert until(lambda: page.inner_text("#model") == "reference") and "Say something" in page.inner_text("#log")
    page.evaluate(LISTEN)
    say(page, "Hello\u00a0there, <img src=x onerror=alert(1)> & <b>you</b>")
    answered(page, 2)
    assert len(set(page.evaluate("lengths"))) > 3  # it grew while it was written
    page.fill("#input", "Two lines")
    page.press("#input", "Shift+Enter")
    page.type("#input", "of text")
    page.press("#input", "Enter")
    texts = answered(page, 4)
    assert texts[0].endswith("<b>you</b>") and texts[2] == "Two lines\nof text" and all(texts)
    assert page.locator(".message :is(b, img)").count() == 0 and page.input_value("#input") == ""
    page.reload()
    assert answered(page, 4) == texts
    page.click("#new")
    assert page.locator(".message").count() == 0
    say(page, "Another")
    answered(page, 2)
    assert page.locator(".chat").count() == 2
    page.locator(".chat").nth(1).locator("button").first.click()
    assert answered(page, 4) == texts
    page.get_by_label("Delete Hello").click()
    assert page.locator(".chat").count() == 1 and page.locator(".message").count() == 0


def test_stopping_keeps_the_text_and_frees_the_slot(visit, server):
    page = visit(max_tokens=4000)
    say(page, "Go on")
    assert until(lambda: len(page.locator(".assistant .text").inner_text()) > 20)
    assert server.metric("lowrank_active_rows") == 1
    page.click("#stop")
    _, text = answered(page, 2)
    assert len(text) > 20 and "stopped" in page.inner_text(".assistant .under")
    assert until(lambda: server.metric("lowrank_active_rows") == 0)
    say(page, "And on")
    page.wait_for_selector("#stop")
    page.keyboard.press("Escape")
    assert len(answered(page, 4)) == 4
    say(page, "And on")
    page.click("#new")  # leaves the answer behind
    assert until(lambda: server.metric("lowrank_active_rows") == 0)


def test_errors_are_shown_and_a_missing_key_can_be_entered(visit, server):
    page = visit(key="")
    page.wait_for_selector("text=API key is missing or wrong")
    say(page, "Hello")
    page.wait_for_selector("role=alert >> text=Put it into the settings")
    page.click("#open-settings")
    page.fill("[name=key]", KEY)
    page.press("[name=key]", "Enter")
    page.wait_for_selector("#model:text('reference')")
    page.get_by_text("Try again").last.click()
    assert len(answered(page, 2)[1]) > 0 and page.locator(".error").count() == 0
    page.context.set_offline(True)
    say(page, "Hello?")
    page.wait_for_selector("text=cannot be reached")
    page.context.set_offline(False)
    say(page, "x" * 20000)
    page.wait_for_selector("text=context of 4096")


def test_settings_are_kept_and_sent(visit):
    page = visit()
    sent = []
    page.on("request", lambda r: sent.append(r.post_data_json) if r.method == "POST" else None)
    page.click("#open-settings")
    assert page.locator("[name=preset] option").all_inner_texts() == ["det", "balanced", "creative"]
    page.fill("[name=system]", "Be brief.")
    page.select_option("[name=preset]", "det")
    assert float(page.input_value("[name=temperature]")) == 0
    page.fill("[name=max_tokens]", "7")
    page.select_option("[name=theme]", "dark")
    page.click("text=Save")
    page.reload()
    assert page.evaluate("getComputedStyle(document.body).colorScheme") == "dark"
    say(page, "Hello")
    answered(page, 2)
    (body,) = sent
    assert body["messages"][0] == {"role": "system", "content": "Be brief."} and body["messages"][1]["role"] == "user"
    assert (body["preset"], body["temperature"], body["max_tokens"]) == ("det", 0, 7) and body["stream"]
    assert "limit of tokens" in page.inner_text(".assistant .under")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_in_light_and_dark(visit, scheme, tmp_path):
    page = visit(width=360, height=640, scheme=scheme)
    say(page, "A" * 200 + " and a longer sentence that must be broken into several lines")
    answered(page, 2)
    wide = "['html', 'body', '#log'].map(s => document.querySelector(s)).map(e => e.scrollWidth - e.clientWidth)"
    assert page.evaluate(wide) == [0, 0, 0]
    box = page.locator("#send").bounding_box()
    assert box["x"] + box["width"] <= 360 and box["y"] + box["height"] <= 640 and box["height"] >= 32
    assert not page.is_visible("#open-settings")
    page.click("#open-side")
    page.click("#open-settings")
    assert page.evaluate(wide) == [0, 0, 0] and page.locator("dialog").bounding_box()["width"] <= 360
    page.click("#cancel")
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (dark == "rgb(23, 24, 27)") == (scheme == "dark")


def test_copy_takes_the_text_as_it_is(visit):
    page = visit()
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    say(page, "two\u2003words")
    answered(page, 2)
    page.locator(".user >> text=Copy").click()
    page.wait_for_selector("text=Copied")
    assert page.evaluate("navigator.clipboard.readText()") == "two\u2003words"


def test_the_page_loads_nothing_from_other_sites(server):
    page = server.get("/")
    assert "http:" not in page and "https:" not in page and "innerHTML" not in page
    assert os.path.getsize(routes.PAGE) < 40_000
