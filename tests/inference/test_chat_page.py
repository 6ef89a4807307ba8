"""The chat page in a real browser with a real server: nothing is lost, long chats, controls, looks inside, layout."""

import json
import re
import shutil

import pytest
from servers import serving, unhurried_step, until

from lowrank_jax.data import tokenizer

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SWITCHES = "--no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-component-update "
SWITCHES += "--disable-sync"
KEY = "s3cret"
CONTENT = "shownThread().at(-1).message.content"  # the last message as it came
LONG = 3900  # tokens of an answer that goes on while a test looks at it

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM, reason="no Chromium is installed (on Debian: apt-get install chromium)"),
]


@pytest.fixture(scope="module")
def server(reference):
    slowly = {"lowrank_jax.inference.engine.Engine.step": unhurried_step}  # a toy's answers end before a frame is drawn
    with serving(reference, "--slots=2", f"--api_key={KEY}", patches=slowly) as served:
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

    Fails if the page raises an error, breaks its content security policy, or asks another site for anything.
    """
    contexts, errors = [], []
    never = {str(i): -100 for i in tokenizer.load(str(reference / "tokenizer")).specials.values()}

    def endlessly(route):
        route.continue_(post_data=json.dumps(json.loads(route.request.post_data) | {"logit_bias": never}))

    def watch(page):
        page.on("pageerror", lambda e: errors.append(str(e)))
        page.on("console", lambda m: errors.append(m.text) if "Content Security" in m.text else None)
        page.on(
            "request", lambda r: errors.append(r.url) if not r.url.startswith((server.url, "data:", "blob:")) else 0
        )

    def open_page(width: int = 1000, height: int = 700, max_tokens: int = 30, key: str = KEY, **options):
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        contexts.append(context)
        settings = json.dumps({"chat": {"max_tokens": max_tokens}})
        fill = f"localStorage['lowrank.settings'] ??= {json.dumps(settings)}"
        fill += f"; sessionStorage['lowrank.key'] ??= '{key}'" if key else ""
        context.add_init_script(f"if (location.protocol === 'http:') {{ {fill} }}")
        context.on("page", watch)
        context.route("**/v1/chat/completions", endlessly)
        page = context.new_page()
        page.goto(server.url)
        if key:
            page.wait_for_selector("#meter", state="visible")
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
    page.wait_for_selector("main .busy", state="detached")
    texts = page.locator(".message > .text").all_inner_texts()
    assert len(texts) == count
    return texts


def act(page, name: str, of: str = ".message", nth: int = -1) -> None:
    """Press a button under a message."""
    page.locator(of).nth(nth).locator(f"[data-act={name}]").first.click()


def menu(page, chat: int, item: str) -> None:
    page.locator(".chat").nth(chat).hover()
    page.locator(".chat").nth(chat).locator("[data-act=more]").click()
    page.locator("#menu").get_by_text(item).click()


def upload(page, name: str, content: str) -> None:
    file = {"name": name, "mimeType": "application/json", "buffer": content.encode()}
    page.set_input_files("#file", [file])


def growing(page, letters: int = 20) -> str:
    assert until(lambda: len(page.locator(".assistant > .text").last.inner_text()) > letters)
    return page.locator(".assistant > .text").last.inner_text()


# Records the answer's length at every change of the page, because a fast answer ends before a test can look at it.
LISTEN = """() => {
  window.lengths = [];
  const note = () => lengths.push(document.querySelector(".assistant .text")?.textContent.length ?? 0);
  const changes = {childList: true, subtree: true, characterData: true};
  new MutationObserver(note).observe(document.querySelector("#log"), changes);
}"""


def test_a_conversation_is_streamed_and_still_there_after_a_reload(visit):
    page = visit(max_tokens=2000)
    assert page.inner_text("#model") == "reference" and "Say something" in page.inner_text("#log")
    page.evaluate(LISTEN)
    say(page, "Hello\u00a0there, <img src=x onerror=alert(1)> & <b>you</b>")
    answered(page, 2)
    assert len(set(page.evaluate("lengths"))) > 2  # it grew while it was written
    page.evaluate("chat.settings.max_tokens = preferences.chat.max_tokens = 30")
    page.fill("#input", "Two lines")
    page.press("#input", "Shift+Enter")
    page.type("#input", "of text")
    page.press("#input", "Enter")
    texts = answered(page, 4)
    assert texts[0].endswith("<b>you</b>") and texts[2] == "Two lines\nof text" and all(texts)
    assert page.locator(".message :is(b, img)").count() == 0 and page.input_value("#input") == ""
    page.fill("#input", "A draft")
    page.reload()
    assert answered(page, 4) == texts and page.input_value("#input") == "A draft"
    page.click("#new")
    assert page.locator(".message").count() == 0 and page.input_value("#input") == ""
    say(page, "Another")
    answered(page, 2)
    assert page.locator(".chat").count() == 2
    page.locator(".chat").nth(1).locator("button").first.click()
    assert answered(page, 4) == texts
    page.go_back()
    assert answered(page, 2)[0] == "Another"


def test_an_answer_is_stopped_continued_and_goes_on_behind_another_chat(visit, server):
    page = visit(max_tokens=LONG)
    say(page, "Go on")
    growing(page)
    assert server.metric("lowrank_active_rows") == 1
    page.click("#stop")
    answered(page, 2)
    stopped = page.evaluate(CONTENT)
    assert len(stopped) > 20 and until(lambda: server.metric("lowrank_active_rows") == 0)
    page.click("text=Continue")
    assert until(lambda: len(page.evaluate(CONTENT)) > len(stopped))
    page.keyboard.press("Escape")
    answered(page, 2)
    assert page.evaluate(CONTENT).startswith(stopped)
    page.click("text=Continue")
    page.wait_for_selector("main .busy")
    page.click("#new")  # leaves the answer behind, which goes on
    page.wait_for_selector(".chat.busy")
    page.wait_for_selector(".chat.busy", state="detached", timeout=60000)
    page.locator(".chat button").first.click()
    answered(page, 2)
    assert len(page.evaluate(CONTENT)) > len(stopped)
    assert "Cut off" in page.inner_text(".assistant .state")


def test_a_reload_in_the_middle_of_an_answer_keeps_it_and_offers_to_go_on(visit):
    page = visit(max_tokens=LONG)
    say(page, "Go on")
    growing(page, 200)
    before = page.evaluate(CONTENT)
    page.reload()
    page.wait_for_selector("text=This answer was interrupted")
    after = page.evaluate(CONTENT)
    assert len(before) > 150 and after.startswith(before)
    page.evaluate("chat.settings.max_tokens = 20")
    page.click("text=Continue")
    page.wait_for_selector("text=Cut off at the limit")
    assert page.evaluate(CONTENT).startswith(after) and len(page.evaluate(CONTENT)) > len(after)
    assert "lowrank.unsaved" not in page.evaluate("Object.keys(localStorage).join()")


@pytest.mark.parametrize("failure", ["offline", "status", "broken"])
def test_a_failed_request_keeps_the_message_and_offers_retry(visit, failure):
    page = visit()
    routes = {
        "status": lambda r: r.fulfill(status=429, json={"error": {"message": "too many answers", "code": None}}),
        "broken": lambda r: r.fulfill(body='data: {"choices":[{"delta":{"content":"Half"},"logprobs":null}]}\n\n'),
    }
    page.context.set_offline(failure == "offline")
    if failure in routes:
        page.route("**/v1/chat/completions", routes[failure])
    say(page, "Keep this")
    expected = {"offline": "cannot be reached", "status": "too many answers", "broken": "connection was lost"}
    page.wait_for_selector(f"[role=alert] >> text={expected[failure]}")
    page.context.set_offline(False)
    page.unroute("**/v1/chat/completions")
    page.route("**/v1/chat/completions", lambda r: r.continue_())
    page.reload()
    assert answered(page, 2)[0] == "Keep this" and page.locator("text=Continue").count() == (failure == "broken")
    page.click("text=Retry")
    page.wait_for_selector(".error", state="detached")
    assert answered(page, 2)[0] == "Keep this"


def test_a_failing_storage_and_another_model_lose_no_message(visit):
    page = visit()
    page.evaluate("model.id = 'the model before the server was restarted'")
    say(page, "Hello")
    assert len(answered(page, 2)[1]) > 0 and page.locator(".error").count() == 0
    page.evaluate("database.close()")
    say(page, "Keep this")
    page.wait_for_selector("#alert >> text=cannot be saved")
    assert "Keep this" in answered(page, 4)


def test_a_missing_key_is_asked_for_and_lasts_for_the_session(visit, server):
    page = visit(key="")
    page.wait_for_selector("dialog#key[open]")
    page.keyboard.press("Escape")
    say(page, "Hello")
    page.wait_for_selector("dialog#key[open]")
    page.fill("#key input", KEY)
    page.press("#key input", "Enter")
    page.wait_for_selector("#model:text('reference')")
    page.click("text=Retry")
    assert answered(page, 2)[0] == "Hello" and page.locator(".error").count() == 0
    assert KEY not in page.evaluate("JSON.stringify(localStorage)")
    page.reload()
    page.wait_for_selector("#model:text('reference')")


def test_two_tabs_of_one_chat_show_and_keep_what_both_write(visit):
    one = visit(max_tokens=20)
    say(one, "Begin")
    answered(one, 2)
    two = one.context.new_page()
    two.goto(one.url)
    assert len(answered(two, 2)) == 2
    for page, text in ((one, "From one"), (two, "From two")):
        page.fill("#input", text)
    one.evaluate("submit()"), two.evaluate("submit()")  # neither has heard of the other's message
    texts = answered(one, 6)
    assert until(lambda: answered(two, 6) == texts) and {"From one", "From two"} <= set(texts)
    one.reload()
    assert answered(one, 6) == texts
    roles = one.evaluate("shownThread().map(({message}) => message.role)")
    assert roles == ["user", "assistant"] * 3  # each answer follows its question
    two.bring_to_front()
    menu(two, 0, "Delete")
    one.wait_for_selector("text=deleted in another tab")
    two.click("text=Undo")
    assert until(lambda: one.locator(".chat").count() == 1)


def test_chats_of_earlier_versions_are_taken_over_and_what_cannot_be_read_stays(visit):
    page = visit()
    old = {
        "id": "abc",
        "time": 5,
        "messages": [{"role": "user", "content": "Old"}, {"role": "assistant", "content": "Yes"}],
    }
    page.evaluate("old => { localStorage['lowrank.chat.abc'] = JSON.stringify(old) }", old)
    page.evaluate("localStorage['lowrank.chat.bad'] = '{'")
    page.evaluate("""localStorage['lowrank.settings'] = '{"key": "old", "max_tokens": 9, "theme": "dark"}'""")
    page.reload()
    assert answered(page, 2) == ["Old", "Yes"]
    assert page.evaluate("[preferences.theme, preferences.chat.max_tokens]") == ["dark", 9]
    assert "old" not in page.evaluate("localStorage['lowrank.settings']")  # a key lasts for the session alone
    kept = page.evaluate("[localStorage['lowrank.chat.abc'] ?? null, localStorage['lowrank.chat.bad']]")
    assert kept == [None, "{"]


def test_chats_are_exported_and_imported(visit):
    page = visit()
    say(page, "Keep me, \u00e9\U0001f600")
    texts = answered(page, 2)
    page.click("#open-settings")
    with page.expect_download() as download:
        page.click("#export")
    content = open(download.value.path(), encoding="utf-8").read()
    assert re.fullmatch(r"chats-\d{4}-\d\d-\d\d\.json", download.value.suggested_filename)
    page.click("#settings .cancel")
    menu(page, 0, "Delete")
    page.wait_for_selector("text=No chats yet")
    upload(page, "chats.json", content)
    page.locator(".chat button").first.click()
    assert answered(page, 2) == texts
    upload(page, "chats.json", content)  # once more: nothing is doubled
    page.wait_for_selector("text=1 chat imported")
    assert page.locator(".chat").count() == 1 and answered(page, 2) == texts
    line = {"messages": [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "From a data set"}]}
    upload(page, "chats.jsonl", json.dumps(line) + "\n" + json.dumps(line))
    page.wait_for_selector("text=2 chats imported")
    assert page.locator(".chat").count() == 3
    newer = json.dumps(json.loads(content) | {"version": 99})
    no_text = json.dumps({"messages": [{"role": "user", "content": 1}]})
    for bad, reason in (
        ("no", "not JSON"),
        (newer, "newer version"),
        ("[1]", "no list of messages"),
        (no_text, "a text"),
    ):
        upload(page, "bad.json", bad)
        page.wait_for_selector(f"[role=alert] >> text={reason}")
    assert page.locator(".chat").count() == 3
    page.locator(".chat", has_text="From a data set").first.locator("button").first.click()
    page.click("text=Ask again")  # with the settings of new chats
    page.wait_for_selector("text=Cut off at the limit of new tokens")


TOKEN = {"text": "a", "logprob": -1, "top": [["a", -1]]}
HOSTILE = {
    "a message without an id": {"id": "x", "messages": [{"id": "", "role": "user", "content": "Here"}]},
    "a chat without an id": {"id": "", "messages": [{"role": "user", "content": "Here"}]},
    "one id twice": {"messages": [{"id": "1", "role": "user", "content": "Here"}] * 2},
    "a ring beside a message": {
        "messages": [
            {"id": "a", "role": "user", "content": "Here"},
            {"id": "b", "after": "c", "role": "assistant", "content": "b"},
            {"id": "c", "after": "b", "role": "user", "content": "c"},
        ]
    },
    "names of objects": {
        "id": "__proto__",
        "shown": {"__proto__": "constructor", "constructor": {}},
        "messages": [{"id": "__proto__", "slot": "constructor", "role": "user", "content": "Here"}],
    },
    "numbers and tokens": {
        "settings": {"preset": "constructor", "max_tokens": -1, "temperature": "hot"},
        "time": 1e308,
        "messages": [
            {"role": "user", "content": "Here", "time": -1e308, "saved": 1e308, "usage": {}},
            {"role": "assistant", "content": "a", "tokens": [TOKEN | {"bytes": 5}], "stats": {"tokens": 3}},
            {"role": "assistant", "content": "a", "tokens": [TOKEN | {"bytes": [-1, 999]}] * 2, "usage": {}},
        ],
    },
    "markup": {
        "id": '"><img src=x onerror=alert(1)>',
        "title": "<img src=x onerror=alert(1)><script>alert(1)</script>" + "\u202e" * 500,
        "messages": [
            {"role": "user", "content": "Here <script>alert(1)</script>"},
            {"role": "assistant", "content": "<style>body{background:url(//evil.example)}</style>", "state": "failed",
             "error": {"text": "<img src=x onerror=alert(1)>"}, "finish": "<svg onload=alert(1)>"},
        ],
    },
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_file_shows_its_messages_and_breaks_nothing(visit, case):
    page = visit()
    page.on("dialog", lambda dialog: pytest.fail(dialog.message))
    upload(page, "chats.json", json.dumps(HOSTILE[case]))
    page.wait_for_selector("text=1 chat imported")
    page.reload()
    page.locator(".chat button").first.click()
    count = 1 if "ring" in case else len(HOSTILE[case]["messages"])
    assert answered(page, count)[0].startswith("Here")
    for look in page.locator("[data-act=inside]").all():
        look.click()
    page.hover("#meter")
    assert "NaN" not in page.inner_text("body") and page.locator(".chat img, .message img, .message style").count() == 0
    say(page, "And on")
    answered(page, count + 2)
    menu(page, 0, "Delete")
    page.wait_for_selector("text=No chats yet")


def test_a_broken_record_of_a_page_that_ended_keeps_no_chat_away(visit):
    page = visit()
    say(page, "Keep this")
    answered(page, 2)
    for value in ("{", "null", "5", '{"id": 5}', '{"id": "nobody"}'):
        page.evaluate("value => { localStorage['lowrank.unsaved.x'] = value }", value)
        page.reload()
        assert answered(page, 2)[0] == "Keep this" and page.inner_text("#alert") == ""


def test_chats_of_one_file_may_use_the_same_ids(visit):
    page = visit()
    chats = [
        {"id": f"c{i}", "title": f"C{i}", "messages": [{"id": "1", "role": "user", "content": f"Here {i}"}]}
        for i in range(2)
    ]
    for _ in range(2):
        upload(page, "chats.json", json.dumps(chats))
        page.wait_for_selector("text=2 chats imported")
        for i in range(2):
            page.click(f".chat >> text=C{i}")
            assert answered(page, 1) == [f"Here {i}"]


def test_a_chat_longer_than_the_context_goes_on_without_its_oldest_turns(visit):
    page = visit(max_tokens=10)
    sent = []
    page.on("request", lambda r: sent.append(r.post_data_json["messages"]) if r.method == "POST" else None)
    for i, words in enumerate([600, 600, 600, 10]):
        say(page, f"number {i} " + "ba " * words)
        answered(page, 2 * i + 2)
        assert page.locator(".error").count() == 0
    used, most = map(int, (page.get_attribute("#meter", f"aria-value{name}") for name in ("now", "max")))
    assert most == 4096 and 0 < used <= most
    assert sent[-1][-1]["content"].startswith("number 3") and not sent[-1][0]["content"].startswith("number 0")
    mark = page.locator(".forgotten")
    assert mark.is_visible() and "no longer reads" in mark.inner_text()
    assert 0 < page.evaluate("[...$('log').children].findIndex(e => e.matches('.forgotten'))") < 6
    say(page, "ba " * 9000)
    page.wait_for_selector("[role=alert] >> text=longer than the model's context of 4,096 tokens")
    act(page, "edit", ".user")
    page.fill(".editor textarea", "Short")
    page.press(".editor textarea", "Enter")
    page.wait_for_selector(".error", state="detached")
    assert answered(page, 10)[-2] == "Short"


def test_messages_are_edited_regenerated_deleted_and_their_versions_kept(visit):
    page = visit()
    say(page, "First")
    first = answered(page, 2)[1]
    act(page, "retry", ".assistant")
    page.wait_for_selector("text=2/2")
    second = answered(page, 2)[1]
    act(page, "left", ".assistant")
    assert page.inner_text(".assistant .text") == first
    is_stored = "storedChat(chat.id).then(c => JSON.stringify(c.shown) === JSON.stringify(chat.shown))"
    assert until(lambda: page.evaluate(is_stored))
    page.reload()
    assert answered(page, 2)[1] == first != second
    act(page, "edit", ".user")
    page.fill(".editor textarea", "Changed")
    page.press(".editor textarea", "Escape")
    assert answered(page, 2)[0] == "First"
    act(page, "edit", ".user")
    page.fill(".editor textarea", "Changed")
    page.click(".editor >> text=Send")
    assert answered(page, 2)[0] == "Changed"
    act(page, "left", ".user", 0)
    assert answered(page, 2) == ["First", first]
    act(page, "delete", ".assistant")
    assert answered(page, 2)[1] == second  # the other version
    page.click("text=Undo")
    assert until(lambda: page.inner_text(".assistant .text") == first)
    act(page, "edit", ".assistant")
    page.fill(".editor textarea", "As I say")
    page.click(".editor >> text=Save")
    assert answered(page, 2)[1] == "As I say"


def test_chats_are_renamed_searched_and_deleted(visit):
    page = visit()
    for text in ("A chat about whales", "Something else"):
        page.click("#new")
        say(page, text)
        answered(page, 2)
    page.fill("#search", "WHALES")
    assert until(lambda: page.locator(".chat").count() == 1)
    page.press("#search", "Escape")
    assert until(lambda: page.locator(".chat").count() == 2)
    menu(page, 0, "Rename")
    page.fill(".chat input", "Fish")
    page.press(".chat input", "Enter")
    page.wait_for_selector(".chat >> text=Fish")
    assert page.inner_text("#title") == "Fish"
    page.reload()
    page.wait_for_selector(".chat >> text=Fish")
    menu(page, 0, "Delete")
    assert until(lambda: page.locator(".chat").count() == 1) and page.locator(".message").count() == 0
    page.click("text=Undo")
    page.wait_for_selector(".chat >> text=Fish")


def test_many_chats_are_listed_in_parts(visit):
    page = visit()
    chats = [{"id": f"c{i}", "time": 200 - i, "messages": [{"role": "user", "content": f"N{i}."}]} for i in range(130)]
    upload(page, "chats.json", json.dumps(chats))
    page.wait_for_selector("#chats >> text=30 more")
    assert page.locator(".chat").count() == 100
    page.fill("#search", "n129.")
    assert until(lambda: page.locator(".chat").count() == 1) and page.locator(".more").count() == 0
    page.press("#search", "Escape")
    page.click("#chats >> text=30 more")
    assert until(lambda: page.locator(".chat").count() == 130)
    assert page.evaluate("document.activeElement.innerText") == "N100."


def test_a_search_reads_each_chat_once_and_knows_what_is_new(visit):
    page = visit()
    chats = [{"id": f"c{i}", "messages": [{"role": "user", "content": f"word{i} of a chat"}]} for i in range(40)]
    upload(page, "chats.json", json.dumps(chats))
    page.wait_for_selector("text=40 chats imported")
    page.evaluate("""() => {
      const get = IDBIndex.prototype.getAll;
      window.reads = 0;
      IDBIndex.prototype.getAll = function (...args) { reads++; return get.apply(this, args); };
    }""")
    page.fill("#search", "word7 ")
    assert until(lambda: page.locator(".chat").count() == 1)
    assert page.evaluate("reads") == 40
    page.fill("#search", "word8 ")
    assert until(lambda: page.locator(".chat >> text=word8").count() == 1)
    assert page.evaluate("reads") == 40
    page.press("#search", "Escape")
    page.click(".chat >> text=word9")
    say(page, "Nightingale")
    page.fill("#search", "nightingale")
    assert until(lambda: page.locator(".chat").count() == 1)


MARKDOWN = """# Title

Some **bold** and `code` and [a link](https://example.org) and a line
break.

| a | b |
|---|---|
| 1 | 2 |

```python
print("<b>")
```

- [x] done
- <script>window.hacked = 1</script><img src=x onerror="window.hacked = 1">

[bad](javascript:window.hacked=1) ![picture](https://example.org/seen.png) <svg onload="window.hacked=1"></svg>
"""


def test_markdown_is_shown_without_markup_of_the_model_and_code_can_be_copied(visit):
    page = visit()
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    chat = {"messages": [{"role": "user", "content": "**Hi**\u2003there"}, {"role": "assistant", "content": MARKDOWN}]}
    upload(page, "a.json", json.dumps(chat))
    page.locator(".chat button").first.click()
    texts = answered(page, 2)
    assert texts[0] == "**Hi**\u2003there" and "<script>" in texts[1] and "picture" in texts[1]
    count = lambda tags: page.locator(f".assistant .text :is({tags})").count()
    assert [count(tag) for tag in ("h1", "strong", "table", "pre", "li", "br")] == [1, 1, 1, 1, 2, 1]
    assert count("img, script, svg:not([aria-hidden]), [onload], [onerror]") == 0
    links = page.locator(".assistant a[href]").evaluate_all("links => links.map(a => [a.href, a.target, a.rel])")
    assert links == [["https://example.org/", "_blank", "noopener noreferrer"]]
    assert not page.evaluate("window.hacked")
    page.click("text=python >> xpath=.. >> [data-act=copy]")
    assert until(lambda: page.evaluate("navigator.clipboard.readText()") == 'print("<b>")')
    act(page, "copy", ".user")
    assert until(lambda: page.evaluate("navigator.clipboard.readText()") == "**Hi**\u2003there")
    kept = """() => {
      const box = make("div"); showMarkdown(box, "one\\n\\ntwo\\n\\n```js\\nlet"); const [a, b] = box.children;
      showMarkdown(box, "one\\n\\ntwo\\n\\n```js\\nlet x\\n```\\nend");
      return a === box.children[0] && b === box.children[1] && box.children.length === 4;
    }"""
    assert page.evaluate(kept)  # streaming leaves complete blocks alone
    page.evaluate("showMarkdown(make('div'), '> '.repeat(20000) + '['.repeat(2000))")  # no error, and no minute


def test_a_growing_answer_does_not_move_what_is_read_above(visit):
    page = visit(max_tokens=LONG, height=400)
    say(page, "Go on")
    assert until(lambda: page.evaluate("$('log').scrollTop") > 300)  # it follows
    page.evaluate("$('log').scrollTop = 60")
    page.wait_for_selector("#newest", state="visible")
    height = page.evaluate("$('log').scrollHeight")
    assert until(lambda: page.evaluate("$('log').scrollHeight") > height + 100)
    assert page.evaluate("$('log').scrollTop") == 60
    page.click("#newest")
    assert page.evaluate("isAtEnd()") and page.is_hidden("#newest")


def test_escape_closes_what_is_open_and_nothing_else(visit):
    page = visit(max_tokens=LONG)
    say(page, "Go on")
    page.wait_for_selector("#stop", state="visible")
    for opener, opened in (("#open-settings", "dialog#settings"), (".chat [data-act=more]", "#menu")):
        page.click(opener)
        page.keyboard.press("Escape")
        assert page.is_hidden(opened) and page.is_visible("#stop")
    act(page, "edit", ".user")
    page.keyboard.press("Escape")
    assert page.locator(".editor").count() == 0 and page.is_visible("#stop")
    page.keyboard.press("Escape")
    page.wait_for_selector("#stop", state="hidden")


def test_a_look_inside_shows_probabilities_alternatives_and_the_cache(visit, server):
    page = visit(max_tokens=12)
    say(page, "Hello")
    text = answered(page, 2)[1]
    act(page, "inside", ".assistant")
    tokens = page.locator(".token")
    seen = lambda text: re.sub("[\x00-\x08\x0e-\x1f\x7f]", "", text)  # HTML has no such characters
    words = lambda text: re.sub("[\ufffd\\s]+", " ", seen(text)).strip()  # bytes of no character may be shown together
    assert 0 < tokens.count() <= 12 and words("".join(tokens.all_text_contents())) == words(text)
    shades = tokens.evaluate_all("all => all.map(e => parseInt(e.style.getPropertyValue('--doubt')))")
    assert len(set(shades)) > 1 and all(0 <= shade <= 100 for shade in shades)
    page.focus(".tokens")
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    assert tokens.nth(1).get_attribute("aria-selected") == "true"
    shares = page.locator(".others .share").all_inner_texts()
    assert 6 <= len(shares) <= 7 and all(re.fullmatch(r"(< )?[\d.]+ %", share) for share in shares)
    stats = page.inner_text(".stats")
    assert re.search(r"tokens/s.*limit of new tokens", stats, re.S) and "12 written" in stats
    model = json.loads(page.evaluate("JSON.stringify(model)"))
    used = int(page.get_attribute("#meter", "aria-valuenow"))
    assert 0 < model["cache_bytes_per_token"] < model["dense_cache_bytes_per_token"]
    cache = page.locator(".cache .share").all_inner_texts()
    assert cache == [page.evaluate(f"bytesAs({used * model[k]})") for k in sorted(model) if "cache_bytes" in k]
    page.locator(".other:not([disabled])").last.click()  # the answer goes on with another token
    page.wait_for_selector("text=2/2")
    assert len(answered(page, 2)[1]) > 1
    one = page.evaluate(
        "unitsOf([{text: '\\ufffd', logprob: -1, bytes: [0xc3], top: []}, "
        "{text: '\\ufffd', logprob: -1, bytes: [0xa9], top: []}]).map(u => [u.text, u.logprob])"
    )
    assert one == [["\u00e9", -2]]  # parts of a character are shown as one


def test_settings_belong_to_a_chat_and_are_sent(visit):
    page = visit()
    sent = []
    page.on("request", lambda r: sent.append(r.post_data_json) if r.method == "POST" else None)
    page.click("#open-chat-settings")
    assert page.locator("[name=preset] option").all_inner_texts() == ["det", "balanced", "creative"]
    page.fill("[name=system]", "Be brief.")
    page.select_option("[name=preset]", "det")
    assert float(page.input_value("[name=temperature]")) == 0
    page.fill("[name=max_tokens]", "7")
    page.click("#chat-settings >> text=Save")
    say(page, "Hello")
    answered(page, 2)
    page.click("#open-settings")
    page.select_option("[name=theme]", "dark")
    page.uncheck("[name=record]")
    page.click("#settings >> text=Save")
    page.reload()
    assert page.evaluate("getComputedStyle(document.body).colorScheme") == "dark"
    say(page, "Again")
    answered(page, 4)
    page.click("#new")
    say(page, "Hello")
    answered(page, 2)
    for body in sent[:2]:
        assert body["messages"][0] == {"role": "system", "content": "Be brief."} and body["stream"]
        assert (body["preset"], body["temperature"], body["top_p"], body["max_tokens"]) == ("det", 0, 1, 7)
    assert [body.get("logprobs", False) for body in sent] == [True, False, False]
    assert sent[2]["messages"][0]["role"] == "user" and sent[2]["max_tokens"] == 30 and sent[2]["preset"] == "balanced"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_in_light_and_dark(visit, scheme):
    page = visit(width=360, height=640, color_scheme=scheme, has_touch=True, is_mobile=True)
    page.fill("#input", "A" * 200 + " and a longer sentence that must be broken into several lines")
    page.press("#input", "Enter")  # a line break
    page.type("#input", "second line")
    assert "\nsecond" in page.input_value("#input") and page.locator(".message").count() == 0
    page.click("#send")
    answered(page, 2)
    act(page, "inside", ".assistant")
    wide = "['html', 'body', '#log'].map(s => document.querySelector(s)).map(e => e.scrollWidth - e.clientWidth)"
    assert page.evaluate(wide) == [0, 0, 0]
    box = page.locator("#send").bounding_box()
    assert box["x"] + box["width"] <= 360 and box["y"] + box["height"] <= 640 and box["height"] >= 32
    assert not page.is_visible("#open-settings")
    page.click("#open-side")
    assert page.evaluate("document.activeElement.id") == "new"
    page.keyboard.press("Escape")
    page.wait_for_selector("#open-settings", state="hidden")
    assert page.evaluate("document.activeElement.id") == "open-side"
    page.click("#open-side")
    page.click("#open-settings")
    assert page.evaluate(wide) == [0, 0, 0] and page.locator("dialog[open]").bounding_box()["width"] <= 360
    page.click("#settings .cancel")
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (dark == "rgb(23, 24, 27)") == (scheme == "dark")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(visit, scheme):
    from axe_playwright_python.base import AXE_SCRIPT

    page = visit(color_scheme=scheme)
    page.evaluate(AXE_SCRIPT)

    rules = {"runOnly": ["color-contrast"]} if scheme == "dark" else {}  # all else is the same in both

    def check(state: str) -> None:
        if scheme == "dark" and state not in ("a look inside", "settings", "a failure"):
            return
        faults = page.evaluate("rules => axe.run({resultTypes: ['violations'], ...rules})", rules)["violations"]
        assert not faults, f"{state}: " + "; ".join(f"{f['id']}: {f['nodes'][0]['html']}" for f in faults)

    check("empty")
    chat = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": MARKDOWN}]}
    upload(page, "a.json", json.dumps(chat))
    page.locator(".chat button").first.click()
    say(page, "And you?")
    answered(page, 4)
    act(page, "inside", ".assistant")
    page.evaluate("$('toasts').replaceChildren()")
    check("a look inside")
    act(page, "edit", ".user")
    check("an edit")
    page.keyboard.press("Escape")
    page.locator(".chat [data-act=more]").click()
    check("a menu")
    page.keyboard.press("Escape")
    for name in ("settings", "chat-settings"):
        page.click(f"#open-{name}")
        check(name)
        page.keyboard.press("Escape")
    page.route("**/v1/chat/completions", lambda r: r.abort())
    say(page, "Fail")
    page.wait_for_selector(".error")
    check("a failure")
    page.set_viewport_size({"width": 360, "height": 640})
    page.click("#open-side")
    check("the drawer")


def test_the_page_is_one_file(server):
    page = server.get("/")
    assert not re.search(r"<(script|link|img)\b[^>]*(src|href)=\"(?!data:)", page.split("<script>")[0])
    assert page.count("<script>") == page.count("</script>") == 13 and "<script src" not in page
    assert len(page) < 200_000
