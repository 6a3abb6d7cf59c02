"""The page of the server in a real browser: Debian's Chromium, driven by Playwright, on the pocket model.

Nothing here waits for a time: every wait is for something that is shown. Where a test must act in the midst of an
answer, the engine is held after a number of steps.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from selfdraft.serve.app import PAGE
from selfdraft.serve.settings import Settings
from tests.serving import Served, pocket, serving, wait_until

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
axe_api = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page, Request, Route

CHROMIUM = Path("/usr/bin/chromium")
pytestmark = pytest.mark.skipif(not CHROMIUM.exists(), reason=f"there is no {CHROMIUM}")
expect = sync_api.expect
FOREVER = 600_000
"""Milliseconds until a wait is given up: a limit for what never comes, not for what is slow."""
STORY = "Once upon a time there was a girl. Once upon a time there was"
KEY = "a key of the tests"
SCHEMA = {
    "type": "object",
    "properties": {"happy": {"type": "boolean"}},
    "required": ["happy"],
    "additionalProperties": False,
}
FAILED = "Failed to load resource"
"""How Chromium's console begins to tell of a response that is an error: tests of errors provoke it."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    expect.set_options(timeout=FOREVER)
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    settings = Settings(model_name="pocket", details=True, max_output_tokens=512, drafters=("lookup",))
    with serving(pocket("merged"), settings) as found:
        yield found


Opener = Callable[..., "Page"]


@pytest.fixture
def opened(browser: Browser) -> Iterator[Opener]:
    """Opens a page; at the end it must have said nothing to the console, and asked no other server."""
    said: list[str] = []
    pages: list[tuple[Page, list[str]]] = []

    def open_page(url: str, **options: Any) -> Page:
        context = browser.new_context(**options)
        context.set_default_timeout(FOREVER)
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(url)
        pages.append((page, asked))
        return page

    yield open_page
    for page, asked in pages:
        assert [url for url in asked if not url.startswith(page.url)] == []
        page.context.close()
    assert [text for text in said if not text.startswith(FAILED)] == []


@pytest.fixture
def page(opened: Opener, served: Served) -> Page:
    """The page in completion mode: the pocket model tells stories."""
    found = opened(served.url)
    return begin(found)


def begin(page: Page) -> Page:
    expect(page.locator("#about")).to_contain_text("pocket")
    page.click("#mode-completion")
    return page


class Held:
    """Lets the engine do a number of steps and then holds it, until `release`."""

    def __init__(self, served: Served, monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
        engine = served.server.llm.engine
        self._left, self._free = threading.Semaphore(steps), threading.Event()
        advance = engine.advance

        def held() -> object:
            while not self._free.is_set() and not self._left.acquire(timeout=0.05):
                pass
            return advance()

        monkeypatch.setattr(engine, "advance", held)

    def release(self) -> None:
        self._free.set()


@pytest.fixture
def held(served: Served, monkeypatch: pytest.MonkeyPatch) -> Iterator[Held]:
    found = Held(served, monkeypatch, 4)
    yield found
    found.release()
    wait_until(lambda: served.quiet)


def send(page: Page, text: str = STORY) -> None:
    page.fill("#prompt", text)
    page.press("#prompt", "Enter")


def answer_of(page: Page) -> Locator:
    return page.locator(".answer > .text").last


def finish(page: Page) -> str:
    """Wait for the end of the answer; its text."""
    expect(answer_of(page)).to_have_attribute("aria-busy", "false")
    return answer_of(page).text_content() or ""


def set_option(page: Page, name: str, value: str) -> None:
    page.click("#open-settings")
    if name == "drafter":
        page.select_option("#set-drafter", value)
    else:
        page.fill(f"#set-{name}", value)
    page.keyboard.press("Escape")
    expect(page.locator("#settings")).to_be_hidden()


def request_of(page: Page, text: str = STORY) -> dict[str, Any]:
    """Send; the body that went to the server."""
    with page.expect_request("**/v1/**") as caught:
        send(page, text)
    found: dict[str, Any] = caught.value.post_data_json or {}
    return found


def events_of(page: Page) -> list[dict[str, Any]]:
    """Send, wait for the end; what the server sent."""
    texts: list[str] = []

    def through(route: Route) -> None:
        response = route.fetch(timeout=FOREVER)
        texts.append(response.text())
        route.fulfill(response=response)

    page.route("**/v1/completions", through)
    send(page)
    finish(page)
    page.unroute("**/v1/completions")
    return [json.loads(line) for line in texts[0].split("data: ")[1:-1]]


def plain_answer(page: Page, served: Served, body: dict[str, Any]) -> str:
    options = {"stream": False, "speculative_config": {"method": "none"}}
    dropped = ("stream_options", "draft_tree")
    plain = {name: value for name, value in body.items() if name not in dropped} | options
    document = page.request.post(f"{served.url}/v1/completions", data=plain, timeout=FOREVER).json()
    return str(document["choices"][0]["text"])


# The answer


def test_the_text_streams_and_is_the_text_of_plain_decoding(page: Page, served: Served, held: Held) -> None:
    body = request_of(page)
    expect(answer_of(page).locator("span").nth(1)).to_be_attached()
    expect(answer_of(page)).to_have_attribute("aria-busy", "true")
    part = answer_of(page).text_content() or ""
    held.release()
    whole = finish(page)
    assert whole.startswith(part)
    assert len(whole) > len(part)
    assert whole == plain_answer(page, served, body)


def test_a_chat_has_turns_and_a_system_prompt(page: Page) -> None:
    page.click("#mode-chat")
    page.click("#system-box summary")
    page.fill("#system", "You tell stories.")
    set_option(page, "max_tokens", "12")
    first = request_of(page, "Tell one.")
    assert first["messages"] == [
        {"role": "system", "content": "You tell stories."},
        {"role": "user", "content": "Tell one."},
    ]
    said = finish(page)
    second = request_of(page, "Go on.")
    assert second["messages"][1:] == [
        {"role": "user", "content": "Tell one."},
        {"role": "assistant", "content": said},
        {"role": "user", "content": "Go on."},
    ]
    finish(page)
    expect(page.locator(".turn")).to_have_count(2)


def test_tokens_are_coloured_and_the_legend_counts_them(page: Page) -> None:
    send(page)
    finish(page)
    page.wait_for_selector("#sources table")
    titles = [span.get_attribute("title") or "" for span in answer_of(page).locator("span").all()]
    sources = [title.removeprefix("proposed by ").split(":")[0] for title in titles]
    groups = [source.split("+")[0] for source in sources]
    assert {"target", "context"} <= set(groups)
    assert any("+" in source for source in sources), "the title has the whole name"
    for row in page.locator("#sources tbody tr").all():
        name, told = row.locator("th").inner_text(), row.locator("td").first.inner_text()
        counted = groups.count(name)
        assert told.split() == [str(counted), str(round(100 * counted / len(groups))), "%"]
    drafted = answer_of(page).locator("span.by").first
    assert drafted.evaluate("node => getComputedStyle(node).textDecorationLine") == "underline"
    assert drafted.evaluate("node => getComputedStyle(node).backgroundColor") != "rgba(0, 0, 0, 0)"


def test_the_figures_are_those_of_the_server(page: Page) -> None:
    last = events_of(page)[-1]
    counts = last["metrics"]["speculative_decoding"]
    figures = page.locator("#figures dd")
    expect(figures.nth(0)).to_contain_text(f"{counts['mean_acceptance_length']:.2f}")
    expect(figures.nth(0)).to_contain_text(f"{counts['num_output_tokens']} tokens in {counts['num_steps']} steps")
    accepted, drafted = counts["num_accepted_draft_tokens"], counts["num_draft_tokens"]
    expect(figures.nth(1)).to_contain_text(f"{accepted} of {drafted} drafted")
    expect(figures.nth(2)).to_have_text(re.compile(r"^\d+\.\d"))
    expect(figures.nth(3)).to_have_text(re.compile(r"^\d+\.\d\d s"))


def test_a_stop_text_that_cuts_a_token_leaves_plain_text(page: Page) -> None:
    """The page sends no stop text; an answer whose tokens say more than its text is shown all the same."""
    tokens = [{"text": "half a", "source": "target"}, {"text": " word", "source": "context"}]
    chunk = {"choices": [{"index": 0, "text": "half a wo", "finish_reason": "stop"}], "draft": {"tokens": tokens}}
    page.route("**/v1/completions", lambda route: answer_with(route, [chunk, "[DONE]"]))
    send(page)
    assert finish(page) == "half a wo"
    expect(answer_of(page).locator("span")).to_have_count(0)
    expect(page.locator(".state")).to_contain_text("without colours")


def answer_with(route: Route, events: list[Any]) -> None:
    lines = [event if isinstance(event, str) else json.dumps(event) for event in events]
    body = "".join(f"data: {line}\n\n" for line in lines)
    route.fulfill(status=200, content_type="text/event-stream", body=body)


# The token tree


def test_the_tree_shows_each_step_and_can_be_stepped_through(page: Page) -> None:
    trees = [event["draft_tree"] for event in events_of(page) if "draft_tree" in event]
    # not the last one: an answer may end in the midst of it
    number = max(range(1, len(trees) - 1), key=lambda index: len(trees[index]["accepted"]))
    tree = trees[number]
    page.locator("#step").fill(str(number + 1))
    said = page.locator("#tree-said")
    many, kept = len(tree["tokens"]), len(tree["accepted"])
    expect(said).to_have_text(f"Step {number + 1} of {len(trees)}: {many} drafted, {kept} accepted, 1 bonus")
    expect(page.locator("#tree g.node")).to_have_count(many + 2)  # the known token, and the bonus token
    expect(page.locator("#tree g.accepted")).to_have_count(kept)
    expect(page.locator("#tree g.bonus")).to_have_count(1)
    expect(page.locator("#tree g.accepted .probability").first).to_have_text(re.compile(r"^(0|1)?\.\d\d$"))
    expect(answer_of(page).locator(".of-step")).to_have_count(kept + 1)
    page.click("#earlier")
    expect(said).to_contain_text(f"Step {number} of")
    page.click("#later")
    page.click("#later")
    expect(said).to_contain_text(f"Step {number + 2} of")


def test_the_tree_can_be_paused_while_the_answer_goes_on(page: Page, held: Held) -> None:
    send(page)
    said = page.locator("#tree-said")
    expect(said).to_contain_text("Step")
    page.click("#play")
    expect(page.locator("#play")).to_have_text("Follow")
    number = (said.text_content() or "").split()[1]
    held.release()
    finish(page)
    expect(said).to_have_text(re.compile(f"^Step {number} of (?!{number}:)"))
    page.click("#play")
    expect(said).not_to_contain_text(f"Step {number} of")


# Comparison


def test_the_comparison_says_that_the_texts_are_equal(page: Page) -> None:
    set_option(page, "temperature", "0.9")
    body = request_of(page)
    finish(page)
    sent: list[dict[str, Any]] = []

    def saw(request: Request) -> None:
        sent.append(request.post_data_json or {})

    page.on("request", saw)
    page.get_by_role("button", name="Compare with plain decoding").click()
    verdict = page.locator(".verdict")
    expect(verdict).to_contain_text("The texts are equal")
    expect(verdict).to_contain_text("times as fast with drafts")
    drafted, plain = (side.inner_text() for side in page.locator(".side .text").all())
    assert drafted == plain
    assert [one.get("speculative_config") for one in sent] == [None, {"method": "none"}]
    assert {one["seed"] for one in sent} == {body["seed"]}
    for side in page.locator(".side").all():
        assert re.search(r"\d+\.\d\d s", side.inner_text())


def test_the_comparison_shows_the_first_difference(page: Page) -> None:
    set_option(page, "max_tokens", "8")
    send(page)
    finish(page)

    def other(route: Route) -> None:
        body = route.request.post_data_json or {}
        plain = body.get("speculative_config") == {"method": "none"}
        text = "The same until here" if plain else "The same until there"
        answer_with(route, [{"choices": [{"index": 0, "text": text, "finish_reason": "stop"}]}, "[DONE]"])

    page.route("**/v1/completions", other)
    page.get_by_role("button", name="Compare with plain decoding").click()
    expect(page.locator(".verdict")).to_contain_text("The texts are not equal")
    expect(page.locator(".verdict")).to_contain_text("first differ at character 16")


# Settings


def test_settings_change_the_request_and_are_kept(page: Page) -> None:
    values = {"temperature": "0.5", "top_p": "0.9", "max_tokens": "7", "seed": "11", "drafter": "lookup"}
    values |= {"num_speculative_tokens": "3", "prediction": "there was a girl"}
    for name, value in values.items():
        set_option(page, name, value)
    page.reload()
    begin(page)
    body = request_of(page)
    finish(page)
    assert {name: body[name] for name in ("temperature", "top_p", "max_tokens", "seed")} == {
        "temperature": 0.5,
        "top_p": 0.9,
        "max_tokens": 7,
        "seed": 11,
    }
    assert body["speculative_config"] == {"method": "lookup", "num_speculative_tokens": 3}
    assert body["prediction"] == {"type": "content", "content": "there was a girl"}
    expect(page.locator("#summary")).to_contain_text("drafter lookup")
    page.click("#open-settings")
    page.click("#settings-reset")
    expect(page.locator("#set-seed")).to_have_value("")


def test_every_setting_says_what_it_means(page: Page) -> None:
    page.click("#open-settings")
    fields = page.locator(".field")
    expect(fields).to_have_count(8)
    for field in fields.all():
        expect(field.locator(".note")).to_have_text(re.compile(r"\w.{20,}\.$"))
    drafters = page.locator("#set-drafter option").all_inner_texts()
    assert [one.split(" ")[0] for one in drafters] == ["merged", "none", "lookup"]


def test_a_json_schema_makes_json(page: Page) -> None:
    set_option(page, "schema", json.dumps(SCHEMA))
    body = request_of(page)
    assert body["response_format"]["json_schema"]["schema"] == SCHEMA
    assert set(json.loads(finish(page))) == {"happy"}
    expect(page.locator("#sources tbody")).to_contain_text("grammar")


def test_a_schema_that_is_no_json_is_told_beside_it_and_not_sent(page: Page) -> None:
    page.click("#open-settings")
    page.fill("#set-schema", "{")
    expect(page.locator("#set-schema-fault")).to_contain_text("no JSON")
    page.locator("#settings-form").get_by_role("button", name="Done").click()
    expect(page.locator("#settings")).to_be_visible()
    page.keyboard.press("Escape")
    send(page)
    expect(page.locator("#failure")).to_contain_text("no JSON")


# History


def test_the_history_keeps_opens_and_deletes(page: Page) -> None:
    set_option(page, "max_tokens", "8")
    send(page)
    said = finish(page)
    page.click("#new")
    send(page, "Another story")
    finish(page)
    page.reload()
    begin(page)
    page.click("#open-history")
    expect(page.locator("#history")).to_contain_text("in this browser only")
    page.locator(".pick", has_text="Once upon").click()
    assert finish(page) == said
    assert answer_of(page).locator("span").count() > 0, "the colours are kept"
    expect(page.locator("#tree-said")).to_contain_text("not kept")
    page.click("#open-history")
    page.get_by_role("button", name="Delete: Another story").click()
    expect(page.locator(".pick")).to_have_count(1)
    page.click("#delete-all")
    expect(page.locator(".pick")).to_have_count(1)
    page.click("#delete-all")
    expect(page.locator("#conversations")).to_contain_text("No conversation is kept")
    assert page.evaluate("() => localStorage.getItem('selfdraft.history')") == "[]"


# Errors


def test_the_password_that_the_browser_asked_for_is_the_key_of_the_page_too(opened: Opener) -> None:
    settings = Settings(model_name="pocket", keys=(KEY,), details=True)
    with serving(pocket(), settings) as locked:
        page = begin(opened(locked.url, http_credentials={"username": "me", "password": KEY}))
        set_option(page, "max_tokens", "8")
        send(page)
        assert finish(page)


def test_the_key_is_asked_for_and_kept_in_the_tab_only(page: Page) -> None:
    """As when the server began anew with another key: what the browser has is no longer taken."""
    document = json.dumps({"error": {"message": "the API key is missing or wrong"}})

    def door(route: Route) -> None:
        if route.request.headers.get("authorization") == f"Bearer {KEY}":
            route.continue_()
        else:
            route.fulfill(status=401, content_type="application/json", body=document)

    page.route("**/v1/**", door)
    set_option(page, "max_tokens", "8")
    send(page)
    page.fill("#key-value", "a wrong key")
    page.keyboard.press("Enter")
    expect(page.locator("#key-why")).to_contain_text("does not take this key")
    page.fill("#key-value", KEY)
    page.keyboard.press("Enter")
    expect(answer_of(page)).not_to_be_empty()
    assert finish(page)
    assert KEY not in page.evaluate("() => JSON.stringify(localStorage)")
    assert KEY in page.evaluate("() => JSON.stringify(sessionStorage)")
    page.reload()
    begin(page)
    expect(page.locator("#key")).to_be_hidden()


def test_whoever_gives_no_key_is_told_what_is_missing(page: Page) -> None:
    page.route("**/v1/**", lambda route: route.fulfill(status=401, content_type="application/json", body="{}"))
    send(page)
    expect(page.locator("#key")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#failure")).to_contain_text("asks for a key")


def test_a_server_without_details_and_a_server_that_has_gone(opened: Opener) -> None:
    with serving(pocket(), Settings(model_name="pocket", details=False)) as silent:
        page = begin(opened(silent.url))
        expect(page.locator("#no-details")).to_contain_text("does not tell who drafted what")
        expect(page.locator("#tree-section")).to_be_hidden()
        set_option(page, "max_tokens", "8")
        body = request_of(page)
        assert "draft_details" not in body
        assert finish(page)
        expect(answer_of(page).locator("span")).to_have_count(0)
    send(page)
    expect(page.locator("#failure")).to_contain_text("cannot be reached")
    expect(page.locator("#failure").get_by_role("button", name="Try again")).to_be_visible()


def test_a_refusal_is_told_in_words_and_can_be_mended(page: Page) -> None:
    set_option(page, "max_tokens", "100000")
    send(page)
    failure = page.locator("#failure")
    expect(failure).to_contain_text("did not take this request")
    expect(failure).to_contain_text("more than the 512 that this server allows")
    set_option(page, "max_tokens", "8")
    failure.get_by_role("button", name="Try again").click()
    assert finish(page)
    expect(page.locator(".turn")).to_have_count(1)
    expect(failure).to_be_hidden()


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_server_is_tried_again(page: Page, status: int) -> None:
    document = json.dumps({"error": {"message": "ask again later"}})
    headers = {"retry-after": "7", "content-type": "application/json"}
    page.route("**/v1/completions", lambda route: route.fulfill(status=status, headers=headers, body=document), times=1)
    set_option(page, "max_tokens", "8")
    send(page)
    failure = page.locator("#failure")
    expect(failure).to_contain_text("wait 7 seconds")
    failure.get_by_role("button", name="Try again").click()
    assert finish(page)


@pytest.mark.parametrize("end", ["error", "nothing"])
def test_a_stream_that_breaks_keeps_the_text_so_far(page: Page, end: str) -> None:
    events: list[Any] = [{"choices": [{"index": 0, "text": "so far", "finish_reason": None}]}]
    if end == "error":
        events += [{"error": {"message": "the step failed"}}, "[DONE]"]
    page.route("**/v1/completions", lambda route: answer_with(route, events))
    send(page)
    expect(page.locator("#failure")).to_contain_text("The text so far is kept")
    assert finish(page) == "so far"
    expect(page.locator(".state")).to_contain_text("Broken off")


@pytest.mark.parametrize("way", ["button", "key"])
def test_stop_ends_the_request_and_keeps_the_text(page: Page, served: Served, held: Held, way: str) -> None:
    send(page)
    expect(answer_of(page).locator("span").nth(1)).to_be_attached()
    if way == "button":
        page.click("#stop")
    else:
        page.keyboard.press("Escape")
    expect(page.locator(".state")).to_contain_text("Stopped")
    assert finish(page)
    expect(page.locator("#send")).to_be_visible()
    held.release()
    wait_until(lambda: served.quiet)


# For everybody


def test_all_of_it_by_keyboard(page: Page) -> None:
    press = page.keyboard.press
    page.focus("#prompt")
    page.keyboard.type("Once upon")
    press("Shift+Enter")
    page.keyboard.type("a time")
    press("Enter")
    expect(page.locator(".asked .text")).to_have_text("Once upon\na time")
    finish(page)
    expect(page.locator("#prompt")).to_be_focused()
    assert page.locator("#prompt").evaluate("node => getComputedStyle(node).outlineStyle") == "solid"
    for _ in range(3):
        press("Shift+Tab")
    expect(page.get_by_role("button", name="Compare with plain decoding")).to_be_focused()
    press("Enter")
    expect(page.locator(".verdict")).to_contain_text("The texts are equal")
    page.focus("#step")
    press("Home")
    expect(page.locator("#tree-said")).to_contain_text("Step 1 of")
    press("ArrowRight")
    expect(page.locator("#tree-said")).to_contain_text("Step 2 of")
    page.focus("#open-settings")
    press("Enter")
    expect(page.locator("#settings")).to_be_visible()
    press("Escape")
    expect(page.locator("#open-settings")).to_be_focused()


def test_the_answer_is_spoken_once_and_whole(page: Page, held: Held) -> None:
    send(page)
    expect(answer_of(page).locator("span").nth(1)).to_be_attached()
    spoken = page.locator("#spoken")
    expect(spoken).to_have_attribute("aria-live", "polite")
    expect(spoken).to_have_text("The model answers.")
    held.release()
    said = finish(page)
    expect(spoken).to_have_text(f"Answer: {said}")
    expect(page.locator("[aria-live], [role=log]")).to_have_count(1)


def test_the_theme_can_be_chosen_and_is_kept(opened: Opener, served: Served) -> None:
    page = begin(opened(served.url, color_scheme="light"))
    ground = "node => getComputedStyle(node).backgroundColor"
    light = page.locator("body").evaluate(ground)
    page.click("#theme")
    page.click("#theme")
    expect(page.locator("#theme")).to_have_text("Theme: dark")
    dark = page.locator("body").evaluate(ground)
    assert dark != light
    page.reload()
    assert page.locator("body").evaluate(ground) == dark


LOOKS: dict[str, dict[str, Any]] = {
    "light": {"color_scheme": "light"},
    "dark": {"color_scheme": "dark"},
    "narrow": {"viewport": {"width": 360, "height": 740}, "color_scheme": "light"},
}


@pytest.mark.parametrize("look", LOOKS)
def test_axe_finds_nothing_serious(opened: Opener, served: Served, look: str) -> None:
    page = begin(opened(served.url, reduced_motion="reduce", **LOOKS[look]))
    check_accessible(page)
    send(page)
    finish(page)
    page.get_by_role("button", name="Compare with plain decoding").click()
    expect(page.locator(".verdict")).to_contain_text("The texts are equal")
    page.click("#earlier")
    check_accessible(page)
    for name in ("settings", "history"):
        page.click(f"#open-{name}")
        check_accessible(page)
        page.keyboard.press("Escape")
    set_option(page, "max_tokens", "100000")
    send(page)
    expect(page.locator("#failure")).to_be_visible()
    check_accessible(page)
    width = page.evaluate("() => document.documentElement.scrollWidth - document.documentElement.clientWidth")
    assert width <= 0, "nothing sticks out sideways"


def check_accessible(page: Page) -> None:
    found = axe_api.Axe().run(page).response["violations"]
    grave = [one for one in found if one["impact"] in ("serious", "critical")]
    assert [(one["id"], [node["html"][:200] for node in one["nodes"]]) for one in grave] == []


# The files


def test_functions_of_the_page_are_short() -> None:
    """No function over 50 lines: from each line that opens one to the line that closes it at the same indent."""
    opens = re.compile(r"^( *)(?:export )?(?:async )?(?:function\*? |(?:get |static |async |\*)*#?\w+\([^()]*\) \{$)")
    seen = 0
    for path in sorted(PAGE.glob("*.js")):
        lines = path.read_text("utf-8").splitlines()
        for start, line in enumerate(lines):
            if (found := opens.match(line)) and not line.endswith("}"):
                end = next(i for i in range(start, len(lines)) if lines[i].startswith(found[1] + "}"))
                assert end - start < 50, f"{path.name}:{start + 1}"
                seen += 1
    assert seen > 50


def test_the_page_asks_nobody_else_and_has_no_inline_code() -> None:
    for path in PAGE.iterdir():
        text = path.read_text("utf-8").replace("http://www.w3.org/2000/svg", "")
        assert "http://" not in text, path.name
        assert "https://" not in text, path.name
        assert not re.search(r"<script>|<style| style=|innerHTML| on\w+=\"", text), path.name
