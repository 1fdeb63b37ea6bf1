"""The web chat in a browser, against a server that says what the test tells it to."""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from elm_mlx.inference.conversation import read_messages

pytest.importorskip("playwright.sync_api", reason="needs playwright (pip install playwright)")

import tiny
from browsers import PATIENCE, chromium
from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Page, expect
from scripted_server import ADAPTER, BASE, CHAT, Refusal, ScriptedServer, Writing
from serving import make_chat, serving

OTHER_MACHINE = "other.example"  # a name at which the browser sees no safe origin, as at http://192.168.0.2
ANSWERED = "article.assistant[aria-busy=false]:nth-last-child(2)"
MARKDOWN = """# Fable of the *fox*

Once a **fox** saw `grapes` ~~on~~ high; see [the text](https://example.org/a_(b)) or <https://example.com/x>.
It is a_snake_case line with ***both*** and 2 * 3 * 4.

1. one
   - inner `code **not bold**`
   - [x] done

   more of one
2. two
   ```python
   x = [1, 2]

   - not a list
   ```
3. three
> a quote
> - with a list
lazy

| a | b |
|:--|--:|
| 1 | **2** |
| 3 \\| 4 |

---
~~~
tilde `fence`
~~~
* last
+ other

Ends with ``a ` b`` and **half
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium(f"--host-resolver-rules=MAP {OTHER_MACHINE} 127.0.0.1") as browser:
        yield browser


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    server = ScriptedServer()
    server.start()
    yield server
    server.stop()


@pytest.fixture
def context(browser: Browser, server: ScriptedServer) -> Iterator[BrowserContext]:
    """A context in which nothing may go wrong: no request elsewhere, no dialog, no error, no breach of policy."""
    context = browser.new_context(viewport={"width": 1100, "height": 750})
    context.set_default_timeout(PATIENCE)
    wrong: list[str] = []
    expected = re.compile("Failed to load resource|ERR_CONNECTION|ERR_EMPTY|ERR_INCOMPLETE|ERR_FAILED|ERR_ABORTED")
    context.on("request", lambda request: wrong.extend([request.url] * (not request.url.startswith(server.url))))
    context.on("dialog", lambda dialog: wrong.append(f"dialog: {dialog.message}"))
    context.on("weberror", lambda error: wrong.append(str(error.error)))

    def note(message: ConsoleMessage) -> None:
        if message.type == "error" and not expected.search(message.text):
            wrong.append(message.text)

    context.on("console", note)
    yield context
    context.close()
    assert [each for each in wrong if not each.startswith(("data:image/svg", "blob:"))] == []


@pytest.fixture
def page(context: BrowserContext, server: ScriptedServer) -> Page:
    return opened(context, server)


def opened(context: BrowserContext, server: ScriptedServer) -> Page:
    page = context.new_page()
    page.goto(server.url)
    page.wait_for_selector("#model:enabled")
    return page


def say(page: Page, text: str, *, wait: bool = True) -> None:
    page.fill("#say", text)
    page.press("#say", "Enter")
    if wait:
        page.wait_for_selector(ANSWERED)


def leave_out_the_oldest(page: Page, server: ScriptedServer) -> None:
    """Has four messages, of which the model no longer sees the first."""
    for text in ("One", "Two", "Three"):
        say(page, f"{text} " * 20)
    server.script = [Refusal(400, "the prompt has 2,100 tokens", "context_length_exceeded", "messages")]
    say(page, "Four", wait=False)
    page.get_by_role("button", name="Leave out the oldest messages").click()
    page.wait_for_selector(ANSWERED)


def until(page: Page, condition: str) -> None:
    """Waits for an expression; Playwright's own way is one that the page's policy forbids."""
    deadline = time.monotonic() + PATIENCE / 1000
    while not page.evaluate(condition):
        assert time.monotonic() < deadline, condition
        page.wait_for_timeout(20)


def answers(page: Page) -> list[str]:
    return page.locator("article.assistant .body").all_inner_texts()


def asked(server: ScriptedServer, number: int = -1) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in server.bodies[number]["messages"]]


def test_an_answer_is_shown_as_it_is_written(page: Page, server: ScriptedServer) -> None:
    server.script = [Writing("All is **well** " * 20, pause=0.03)]
    say(page, "How is it?", wait=False)
    page.wait_for_selector("article.assistant[aria-busy=true] strong")
    expect(page.locator("#send")).to_have_attribute("aria-label", "Stop")
    page.wait_for_selector(ANSWERED)
    assert answers(page) == [("All is well " * 20).strip()]
    body = server.bodies[0]
    assert body["model"] == "small-chat" and body["stream"] and body["stream_options"] == {"include_usage": True}
    assert (body["temperature"], body["top_p"]) == (0.7, 0.9)  # those of `elm-mlx chat`
    assert set(body) == {"model", "messages", "temperature", "top_p", "stream", "stream_options"}
    assert asked(server) == [("user", "How is it?")]
    assert re.fullmatch(r"80 tokens · \d+(\.\d)? tokens/s · first after \d+\.\d+ s", page.inner_text(".figures"))
    assert page.inner_text("#context") == "90 of 2,048 tokens"
    expect(page.locator("#status")).to_have_text(answers(page)[0])  # for screen readers, once
    assert page.title() == "How is it? – elm-mlx"


def test_what_an_answer_was_taken_from_is_shown_as_text(page: Page, server: ScriptedServer) -> None:
    text = "<img src=x onerror=alert(1)>\n**as it is**"
    sources = [
        {"number": 1, "file": "a.md", "first_line": 3, "last_line": 4, "heading": "A > B", "text": text},
        {"number": 2, "file": "b.pdf", "first_page": 7, "last_page": 7, "heading": "", "text": "more"},
    ]
    server.script = [Writing("So it is.", sources=sources), Writing("Who knows?", sources=[])]
    say(page, "Is it?")
    shown = page.locator("article.assistant .sources summary")
    assert shown.all_inner_texts() == ["[1] a.md:3 (A > B)", "[2] b.pdf, page 7"]
    shown.first.click()
    assert page.inner_text("article.assistant details[open] p") == text
    page.reload()
    assert shown.all_inner_texts() == ["[1] a.md:3 (A > B)", "[2] b.pdf, page 7"]
    say(page, "And this?")
    assert page.locator("article.assistant .sources").last.inner_text() == "Nothing was found in the documents."
    assert asked(server) == [("user", "Is it?"), ("assistant", "So it is."), ("user", "And this?")]


def test_an_answer_can_be_stopped(page: Page, server: ScriptedServer) -> None:
    server.script = [Writing("word " * 500, pause=0.01, piece=5)]
    say(page, "Count", wait=False)
    page.wait_for_selector("article.assistant")
    page.keyboard.press("Escape")
    page.wait_for_selector(ANSWERED)
    assert "stopped" in page.inner_text("article.assistant .figures")
    kept = answers(page)[0]
    assert 5 <= len(kept) < 2000
    say(page, "Go on")
    assert asked(server)[1] == ("assistant", kept)
    assert server.left == 1


def test_one_that_is_stopped_before_its_first_word_can_be_asked_for_again(page: Page, server: ScriptedServer) -> None:
    server.script = [Writing("late", hold=30)]
    say(page, "Hello", wait=False)
    page.wait_for_selector(".pending")
    page.click("#send")
    page.get_by_role("button", name="Try again").click()
    page.wait_for_selector(ANSWERED)
    assert answers(page) == ["All is well."]
    assert asked(server) == [("user", "Hello")]


def test_a_reload_keeps_what_was_said_also_amid_an_answer(page: Page, server: ScriptedServer) -> None:
    say(page, "First")
    server.script = [Writing("never ending " * 300, pause=0.02)]
    say(page, "Second", wait=False)
    until(page, "document.querySelectorAll('article.assistant')[1]?.innerText.includes('never')")
    page.reload()
    page.wait_for_selector("article:nth-of-type(4)")
    first, second = answers(page)
    assert first == "All is well." and second.startswith("never")
    assert page.locator("#list li").count() == 1


def test_two_tabs_keep_each_others_conversations(context: BrowserContext, server: ScriptedServer) -> None:
    one, other = opened(context, server), opened(context, server)
    say(one, "From one tab")
    say(other, "From the other")
    for page in (one, other):
        expect(page.locator("#list li")).to_have_count(2)
    one.click("#list a:not([aria-current])")  # now both show what the other tab began
    expect(one.locator("article.user .body")).to_have_text("From the other")
    say(one, "Added")
    expect(other.locator("article.user")).to_have_count(2)
    server.script = [Writing("a b c d " * 40, pause=0.01), Writing("e f g h " * 40, pause=0.01)]
    say(one, "At the same time, one", wait=False)
    say(other, "At the same time, other", wait=False)
    for page in (one, other):
        page.wait_for_selector("#send[aria-label=Send]")
        page.reload()
        page.wait_for_selector("article")
    both = {text for page in (one, other) for text in page.locator("article.user .body").all_inner_texts()}
    assert {"At the same time, one", "At the same time, other"} <= both


HOSTILE = """<script>alert(1)</script><img src=x onerror=alert(2)><style>body{display:none}</style>
![image](https://evil.example/pixel.png) ![](https://evil.example/bare.png)
[data](data:text/html,<script>alert(3)</script>)

[click](javascript:alert(4)) [bank.example](https://evil.example/login) <iframe src="https://evil.example"></iframe>

| <b onmouseover=alert(5)>x</b> | y |
|---|---|
| `<img src=https://evil.example/z>` | <svg onload=alert(6)> |

```"><script>alert(7)</script>
</code></pre><script>alert(8)</script>
```
<a href="//evil.example" ping="https://evil.example">&lt;script&gt;</a>
"""


def test_what_a_model_writes_does_nothing(page: Page, server: ScriptedServer) -> None:
    server.script = [Writing(HOSTILE)]
    say(page, "<img src=x onerror=alert(9)>")
    page.wait_for_timeout(200)
    body = page.locator(".assistant .body")
    assert body.locator("script, img, style, iframe, svg, b, [onerror], [onload], [style]").count() == 0
    assert "<script>alert(1)</script><img src=x onerror=alert(2)>" in body.inner_text()
    assert page.inner_text(".user .body") == "<img src=x onerror=alert(9)>"
    links = body.locator("a")
    assert {str(link.get_attribute("href")).split("/")[0] for link in links.all()} == {"https:"}
    assert all("noopener" in str(link.get_attribute("rel")) for link in links.all())
    shown = [link.inner_text() for link in links.all()]
    assert "bank.example (evil.example)" in shown and "image (evil.example)" in shown
    assert not [text for text in shown if text in ("click", "data")]
    # The context fixture asserts that nothing was asked of evil.example, no dialog opened and no policy was breached.


GROW = """async ([text, cuts]) => {
  const { MarkdownView } = await import("/markdown.js");
  const [grown, whole] = [document.createElement("div"), document.createElement("div")];
  const view = new MarkdownView(grown);
  const firsts = new Set();
  for (const cut of cuts) {
    view.update(text.slice(0, cut), true);
    if (cut > 200) firsts.add(grown.firstChild);
  }
  view.update(text, false);
  new MarkdownView(whole).update(text, false);
  return [grown.innerHTML, whole.innerHTML, firsts.size];
}"""


def test_a_text_that_grew_looks_as_one_that_came_at_once(page: Page) -> None:
    draw = random.Random(0)
    for text in (MARKDOWN, HOSTILE, MARKDOWN.replace("\n", "\n\n"), MARKDOWN.replace("   ", "  ")):
        for step in (1, 7, 40):
            cuts = sorted({draw.randrange(len(text)) for _ in range(len(text) // step)})
            grown, whole, firsts = page.evaluate(GROW, [text, cuts])
            assert grown == whole
            assert firsts <= 1  # a block that was complete has stayed the same node


SHOWN = [
    ("- **שלום**\n- b", '<ul dir="rtl"><li><p><strong>שלום</strong></p></li><li><p>b</p></li></ul>'),
    ("a **b *c* d** `e*f*`", "<p>a <strong>b <em>c</em> d</strong> <code>e*f*</code></p>"),
    ("***a*** snake_case_name __b__", "<p><strong><em>a</em></strong> snake_case_name <strong>b</strong></p>"),
    ("2 * 3 * 4 and **open", "<p>2 * 3 * 4 and **open</p>"),
    (r"\*a\* \(x\) \[y\]", r"<p>*a* \(x\) \[y\]</p>"),
    ("``a ` b`` `c", "<p><code>a ` b</code> `c</p>"),
    ("line\nnext", "<p>line\nnext</p>"),
    ("1984. is\n\n3. three", '<ol start="1984"><li><p>is</p></li><li><p>three</p></li></ol>'),
    ("text\n1984. no list", "<p>text\n1984. no list</p>"),
    ("- a\n  - b\n- c", "<ul><li><p>a</p><ul><li><p>b</p></li></ul></li><li><p>c</p></li></ul>"),
    ("# A #\n## B", '<h3 class="level1">A</h3><h4 class="level2">B</h4>'),
    ("> a\n> > b", "<blockquote><p>a</p><blockquote><p>b</p></blockquote></blockquote>"),
    ("***", "<hr>"),
]


def test_markdown(page: Page) -> None:
    for text, shown in SHOWN:
        assert page.evaluate(GROW, [text, []])[1] == shown


def test_no_text_takes_long(page: Page) -> None:
    size = 100_000
    texts = [
        unit * (size // len(unit))
        for unit in (
            "*", "_", "`", "[", "](", "[a](http://", "**a ", "*a _b ", "`a``b", "~", "> ", "- ", "#", " ", "|", "a|b\n",
            "<http://", "![", "\\", "1. ", "  - a\n", "```\n", "~~~`", "- - ", "http://a.b/(", "***a", "!!!!http://a!!!!",
        )
    ]  # fmt: skip
    spent = page.evaluate(
        """async (texts) => {
          const { MarkdownView } = await import("/markdown.js");
          return texts.map((text) => {
            const start = performance.now();
            for (const open of [true, false]) new MarkdownView(document.createElement("div")).update(`${text}x`, open);
            return performance.now() - start;
          });
        }""",
        texts,
    )
    assert max(spent) < 3000, [(text[:12], round(each)) for text, each in zip(texts, spent, strict=True) if each > 500]


def test_time_grows_as_the_answer_does(page: Page) -> None:
    """Five times as long an answer takes about five times as long to show, not twenty-five times."""
    spent = page.evaluate(
        """async (block) => {
          const { MarkdownView } = await import("/markdown.js");
          const measure = (text) => {
            const view = new MarkdownView(document.createElement("div"));
            const start = performance.now();
            for (let at = 0; at < text.length; at += 100) view.update(text.slice(0, at), true);
            return performance.now() - start;
          };
          const times = [[], []];
          for (let round = 0; round < 3; round++) [10, 50].forEach((n, i) => times[i].push(measure(block.repeat(n))));
          return times.map((each) => Math.min(...each));
        }""",
        MARKDOWN,
    )
    assert spent[1] < 12 * spent[0], spent


def test_a_message_is_edited_and_answered_again(page: Page, server: ScriptedServer) -> None:
    for text in ("One", "Two", "Three"):
        say(page, text)
    second = page.locator("article.user").nth(1)
    second.hover()
    second.get_by_role("button", name="Edit").click()
    page.keyboard.press("Escape")
    expect(page.locator("article.user")).to_have_count(3)
    second.hover()
    second.get_by_role("button", name="Edit").click()
    server.script = [Writing("Other")]
    page.keyboard.type(", changed")
    page.keyboard.press("Enter")
    expect(page.locator(f"{ANSWERED} .body")).to_have_text("Other")
    assert asked(server) == [("user", "One"), ("assistant", "All is **well**."), ("user", "Two, changed")]
    page.get_by_role("button", name="Undo").click()
    assert page.locator("article.user .body").all_inner_texts() == ["One", "Two", "Three"]
    page.reload()
    expect(page.locator("article.user")).to_have_count(3)


def test_what_stands_on_the_accent_can_be_read_under_the_pointer_too(page: Page) -> None:
    say(page, "One")
    page.locator("article.user").hover()
    page.locator("article.user").get_by_role("button", name="Edit").click()
    colour = "button => getComputedStyle(button).color"
    on_accent = page.locator("#send").evaluate(colour)
    send = page.locator("article.user").get_by_role("button", name="Send")
    page.mouse.move(0, 0)
    assert send.evaluate(colour) == on_accent
    send.hover()
    assert send.evaluate(colour) == on_accent


def test_an_answer_is_replaced_or_stays(page: Page, server: ScriptedServer) -> None:
    say(page, "Hello")
    server.script = [Writing("Another", piece=7), Writing("", hold=30)]
    page.get_by_role("button", name="Regenerate").click()
    expect(page.locator(f"{ANSWERED} .body")).to_have_text("Another")
    assert asked(server) == [("user", "Hello")]
    page.get_by_role("button", name="Regenerate").click()
    page.wait_for_selector(".pending")
    page.keyboard.press("Escape")  # nothing was said: the answer that was there comes back
    expect(page.locator("article.assistant .body")).to_have_text("Another")
    page.locator("article.assistant").get_by_role("button", name="Edit").click()
    page.keyboard.press("Control+A")
    page.keyboard.type("By *hand*")
    page.keyboard.press("Enter")
    expect(page.locator("article.assistant em")).to_have_text("hand")
    say(page, "More")
    assert asked(server)[1] == ("assistant", "By *hand*")


def test_messages_and_conversations_are_deleted_and_come_back(page: Page, server: ScriptedServer) -> None:
    say(page, "One")
    say(page, "Two")
    page.locator("article.user").first.hover()
    page.locator("article.user").first.get_by_role("button", name="Delete").click()
    assert page.locator("article .body").all_inner_texts() == ["Two", "All is well."]
    page.click("#new")
    say(page, "Elsewhere")
    expect(page.locator("#list li")).to_have_count(2)
    page.locator("#list li", has_text="Two").hover()
    page.get_by_role("button", name="Delete Two").click()
    expect(page.locator("#list li")).to_have_count(1)
    expect(page.locator("article.user .body")).to_have_text("Elsewhere")
    page.get_by_role("button", name="Undo").click()
    expect(page.locator("article.user .body")).to_have_text("Two")
    expect(page.locator("#list li")).to_have_count(2)


def test_what_is_emptied_stays_so(page: Page, server: ScriptedServer) -> None:
    say(page, "Secret")
    page.locator("article.user").hover()
    page.locator("article.user").get_by_role("button", name="Delete").click()
    assert "Secret" not in page.evaluate("JSON.stringify(localStorage)")
    page.reload()
    page.wait_for_selector("#model:enabled")
    expect(page.locator("article")).to_have_count(0)
    page.keyboard.press("Control+k")
    say(page, "Another")
    page.locator("article.user").hover()
    page.locator("article.user").get_by_role("button", name="Delete").click()
    page.get_by_role("button", name="Undo").click()
    page.reload()
    expect(page.locator("article.user .body")).to_have_text("Another")


def test_who_asks_while_a_message_is_edited_sees_the_answer(page: Page, server: ScriptedServer) -> None:
    say(page, "One")
    page.keyboard.press("ArrowUp")
    page.keyboard.type(" edited")
    page.fill("#say", "Two")
    server.script = [Writing("The second answer", hold=3), Writing("The third", hold=3)]
    page.press("#say", "Enter")
    page.get_by_label("Edit the message").press("Enter")  # too late: another is being answered
    expect(page.locator(f"{ANSWERED} .body")).to_have_text("The second answer")
    assert [asked(server, number)[-1] for number in range(len(server.bodies))] == [("user", "One"), ("user", "Two")]
    expect(page.get_by_label("Edit the message")).to_have_value("One edited")  # what was typed is there to be sent
    page.fill("#say", "Three")
    page.press("#say", "Enter")
    page.get_by_label("Edit the message").press("Escape")  # which ends the editing, and not the answer
    expect(page.locator("textarea[aria-label='Edit the message']")).to_have_count(0)
    expect(page.locator(f"{ANSWERED} .body")).to_have_text("The third")
    page.locator("article.user").first.hover()
    page.locator("article.user").first.get_by_role("button", name="Edit").click()
    page.keyboard.type(" edited")
    page.keyboard.press("Enter")
    expect(page.locator("article.user .body")).to_have_text("One edited")


def test_one_that_was_left_out_can_be_edited(page: Page, server: ScriptedServer) -> None:
    leave_out_the_oldest(page, server)
    first = page.locator("article.user").first
    first.hover()
    first.get_by_role("button", name="Edit").click()
    page.keyboard.press("Control+A")
    page.keyboard.type("Anew")
    page.keyboard.press("Enter")
    page.wait_for_selector(ANSWERED)
    assert asked(server) == [("user", "Anew")]


def test_without_a_model_nothing_is_replaced(page: Page, server: ScriptedServer) -> None:
    say(page, "One")
    say(page, "Two")
    server.models = [BASE]
    page.reload()
    page.wait_for_selector("#model:enabled")
    page.get_by_role("button", name="Regenerate").last.click()
    expect(page.locator("#toast")).to_have_text("No model for chats is served.")
    page.locator("article.user").first.hover()
    page.locator("article.user").first.get_by_role("button", name="Edit").click()
    page.keyboard.type("?")
    page.keyboard.press("Enter")
    expect(page.get_by_label("Edit the message")).to_have_value("One?")
    page.keyboard.press("Escape")
    assert page.locator("article .body").all_inner_texts() == ["One", "All is well.", "Two", "All is well."]


def test_what_is_being_replaced_survives_a_reload(page: Page, server: ScriptedServer) -> None:
    server.script = [Writing("Kept"), Writing("late", hold=30)]
    say(page, "Hello")
    page.get_by_role("button", name="Regenerate").click()
    page.wait_for_selector(".pending")
    page.reload()
    expect(page.locator("article.assistant .body")).to_have_text("Kept")


def test_a_system_prompt_survives_a_reload_amid_its_settings(page: Page, server: ScriptedServer) -> None:
    say(page, "First")
    say(page, "Second")
    page.keyboard.press("Control+k")
    say(page, "Elsewhere")
    page.locator("#list a", has_text="First").click()
    page.click("#settings-open")
    page.keyboard.press("Escape")
    assert page.locator("#list a").all_inner_texts() == ["Elsewhere", "First"]  # looking changes nothing
    page.click("#settings-open")
    page.fill("#system", "Answer briefly.")
    page.reload()
    page.wait_for_selector("#model:enabled")
    assert page.input_value("#system") == "Answer briefly."
    assert page.locator("#list a").all_inner_texts() == ["First", "Elsewhere"]


def test_an_input_methods_keys_are_its_own(page: Page, server: ScriptedServer) -> None:
    """Safari ends a composition before it tells of the Enter that did: by its code alone is it known."""
    press = "(node, key) => node.dispatchEvent(new KeyboardEvent('keydown', {key, keyCode: 229, bubbles: true}))"
    page.fill("#say", "きつね")
    page.locator("#say").evaluate(press, "Enter")
    assert page.input_value("#say") == "きつね" and not server.bodies
    page.press("#say", "Enter")
    page.wait_for_selector(ANSWERED)
    page.keyboard.press("ArrowUp")
    for key in ("Enter", "Escape"):
        page.get_by_label("Edit the message").evaluate(press, key)
    expect(page.get_by_label("Edit the message")).to_be_visible()
    assert len(server.bodies) == 1


def test_the_focus_stays_where_one_goes_on(page: Page, server: ScriptedServer) -> None:
    say(page, "One")
    for last in ("Escape", "Enter"):
        page.keyboard.press("ArrowUp")
        page.keyboard.press(last)
        page.wait_for_selector(ANSWERED)
        expect(page.locator("#say")).to_be_focused()
    say(page, "Two")
    page.get_by_role("button", name="Undo").wait_for(state="hidden")
    delete = page.locator("article.user").first.get_by_role("button", name="Delete")
    delete.focus()
    delete.press("Enter")
    expect(page.locator("#say")).to_be_focused()
    page.get_by_role("button", name="Undo").press("Enter")
    expect(page.locator("#say")).to_be_focused()
    page.keyboard.press("Control+k")
    say(page, "Elsewhere")
    page.evaluate("delete Navigator.prototype.clipboard")  # as without https
    copy = page.locator("article.user").get_by_role("button", name="Copy")
    copy.focus()
    copy.press("Enter")
    assert copy.evaluate("node => node === document.activeElement")
    page.locator("#list a", has_text="One").focus()
    page.get_by_role("button", name="Delete One").press("Enter")
    expect(page.locator("#list a", has_text="Elsewhere")).to_be_focused()


def test_the_list_stands_still_while_answers_are_written(page: Page, server: ScriptedServer) -> None:
    server.script = [Writing("slow " * 400, pause=0.02) for _ in range(2)]
    say(page, "First", wait=False)
    page.wait_for_selector("article.assistant")
    page.keyboard.press("Control+k")
    say(page, "Second", wait=False)
    page.wait_for_selector("article.assistant")
    page.evaluate(
        """() => {
          window.orders = new Set();
          window.first = document.querySelector("#list li");
          const note = () => orders.add(document.getElementById("list").innerText);
          new MutationObserver(note).observe(document.getElementById("list"), {subtree: true, childList: true});
        }"""
    )
    page.wait_for_timeout(4500)  # each is saved twice
    page.keyboard.press("Escape")
    expect(page.locator("#list a.running")).to_have_count(1)
    assert page.evaluate("[orders.size <= 1, first.isConnected]") == [True, True]


def test_a_button_does_what_it_showed_when_it_was_pressed(page: Page, server: ScriptedServer) -> None:
    page.fill("#say", "Hello")
    page.locator("#send").dblclick()
    page.wait_for_selector(ANSWERED)
    server.script = [Writing("word " * 500, pause=0.02)]
    say(page, "Again", wait=False)
    page.wait_for_selector("article[aria-busy=true]")
    page.fill("#say", "A draft")
    page.locator("#send").hover()
    page.mouse.down()  # to stop what ends meanwhile
    page.keyboard.press("Escape")
    page.wait_for_selector("#send[aria-label=Send]")
    page.mouse.up()
    page.wait_for_timeout(100)
    assert page.input_value("#say") == "A draft" and len(server.bodies) == 2
    server.script = [Writing("word " * 500, pause=0.02)]
    page.locator("#send").click(click_count=3, delay=20)  # sent, then nothing, then stopped
    expect(page.locator("#send")).to_have_attribute("aria-label", "Send")
    assert len(server.bodies) == 3


def test_what_is_read_stays_in_view(page: Page, server: ScriptedServer) -> None:
    passage = "\n".join(f"line {number} of the passage" for number in range(80))
    source = {"number": 1, "file": "a.md", "first_line": 1, "last_line": 80, "heading": "", "text": passage}
    server.script = [Writing("A line of text.\n\n" * 60, piece=300, sources=[source])]
    say(page, "Long")
    summary = page.locator(".sources summary")
    before = summary.bounding_box()
    summary.click()
    page.wait_for_timeout(200)
    assert summary.bounding_box() == before  # what it opens is below
    server.script = [Writing("A line of text.\n\n" * 900, pause=0.01, piece=34)]
    say(page, "Longer", wait=False)
    page.wait_for_selector("article[aria-busy=true]")
    page.hover("#scroller")
    page.wait_for_timeout(300)
    for _ in range(6):  # slowly
        page.mouse.wheel(0, -12)
        page.wait_for_timeout(30)
    stood = page.evaluate("document.getElementById('scroller').scrollTop")
    page.wait_for_timeout(400)
    assert page.evaluate("document.getElementById('scroller').scrollTop") <= stood
    assert page.locator("article[aria-busy=true]").count() == 1


def test_a_server_that_is_gone_is_asked_again(page: Page, server: ScriptedServer) -> None:
    say(page, "First")
    server.stop()
    say(page, "Second", wait=False)
    expect(page.locator(".card")).to_contain_text("The server does not answer. Trying again in")
    server.start()
    page.wait_for_selector(ANSWERED)
    assert asked(server)[-1] == ("user", "Second") and len(answers(page)) == 2


def test_a_server_that_goes_amid_an_answer_leaves_what_had_come(page: Page, server: ScriptedServer) -> None:
    server.script = [Writing("half an answer " * 100, pause=0.05)]
    say(page, "Tell", wait=False)
    page.wait_for_selector("article.assistant")
    server.stop()
    expect(page.locator(".card")).to_contain_text("The connection to the server was lost. What had come is kept.")
    assert answers(page)[0].startswith("half")
    server.start()
    page.get_by_role("button", name="Try again").click()
    expect(page.locator(f"{ANSWERED} .body")).to_have_text("All is well.")
    server.script = [Writing("broken off", ending="cut"), Writing("", ending="error")]
    say(page, "And", wait=False)
    expect(page.locator(".card")).to_contain_text("was lost")
    say(page, "Then", wait=False)
    expect(page.locator(".card")).to_contain_text("the engine stopped")


def test_a_server_that_is_busy_is_asked_when_it_says(page: Page, server: ScriptedServer) -> None:
    server.script = [Refusal(503, "the queue is full", headers={"Retry-After": "1"})]
    start = time.monotonic()
    say(page, "Hello", wait=False)
    expect(page.locator(".card")).to_contain_text("The server is busy")
    page.wait_for_selector(ANSWERED)
    assert time.monotonic() - start > 1 and len(server.bodies) == 2
    server.script = [Refusal(429, "too many", headers={"Retry-After": "600"})]
    say(page, "Again", wait=False)
    page.get_by_role("button", name="Cancel").click()
    expect(page.locator(".card")).to_contain_text("There is no answer yet")


def test_a_key_is_asked_for_and_kept_for_the_session(
    context: BrowserContext, server: ScriptedServer, browser: Browser
) -> None:
    server.key = "sesame"
    page = context.new_page()
    page.goto(server.url)
    expect(page.locator("#key-dialog")).to_be_visible()
    for key in ("schlüssel", "wrong", "sesame"):
        page.fill("#key", key)
        page.press("#key", "Enter")
    page.wait_for_selector("#model:enabled")
    say(page, "Hello")
    page.reload()
    page.wait_for_selector("#model:enabled")
    server.key = "changed"
    say(page, "Hello again", wait=False)
    page.fill("#key", "changed")
    page.press("#key", "Enter")
    page.wait_for_selector(ANSWERED)
    assert "sesame" not in page.evaluate("JSON.stringify(localStorage)")
    server.key = "locked"
    say(page, "And again", wait=False)
    page.wait_for_selector("dialog[open]")
    page.keyboard.press("Escape")
    expect(page.locator(".card")).to_contain_text("API key")


def test_a_full_context_says_what_to_do(page: Page, server: ScriptedServer) -> None:
    leave_out_the_oldest(page, server)
    contents = [content.split(" ")[0] for role, content in asked(server) if role == "user"]
    assert contents == ["Two", "Three", "Four"]
    assert page.locator("article.user").count() == 4  # they are still there to read
    expect(page.locator(".divider")).to_have_text("The model no longer sees what is above")
    server.script = [Writing("cut", ending="length", prompt_tokens=2047), Writing("cut", ending="length")]
    say(page, "Five")
    assert "the context is full" in page.inner_text("article.assistant:nth-last-child(2) .figures")
    say(page, "Six")
    assert "cut at max tokens" in page.inner_text("article.assistant:nth-last-child(2) .figures")


def test_a_refused_field_is_named(page: Page, server: ScriptedServer) -> None:
    too_large: dict[str, Any] = {"code": "out_of_memory", "headers": {"Retry-After": "60"}}
    server.script = [
        Refusal(503, "this needs 9 GB, and 8 GB is the most", **too_large),
        Refusal(400, "temperature is 9: it must be at most 2", param="temperature"),
    ]
    say(page, "Huge", wait=False)
    expect(page.locator(".card")).to_contain_text("this needs 9 GB")  # which does not pass by waiting
    say(page, "Hello", wait=False)
    expect(page.locator(".card")).to_contain_text("temperature is 9")
    page.get_by_role("button", name="Settings", exact=True).last.click()
    expect(page.locator("#settings")).to_be_visible()


def test_settings_and_system_prompt_go_into_requests(context: BrowserContext, server: ScriptedServer) -> None:
    server.models = [CHAT | {"sampling": {"temperature": 0.3, "min_p": 0.1}}]
    page = opened(context, server)
    page.click("#settings-open")
    assert page.get_attribute("[name=temperature]", "placeholder") == "0.3"
    page.fill("#system", "Answer briefly.")
    page.fill("[name=temperature]", "0.5")
    page.fill("[name=seed]", "7")
    page.fill("[name=top_p]", "3")  # which is none
    page.get_by_role("button", name="Done").click()
    say(page, "Hello")
    page.reload()
    page.wait_for_selector("#model:enabled")
    say(page, "Again")
    for number in (0, 1):
        body = server.bodies[number]
        assert (body["temperature"], body["seed"], body["top_p"], body["min_p"]) == (0.5, 7, 0.9, 0.1)
        assert asked(server, number)[0] == ("system", "Answer briefly.")
    page.click("#settings-open")
    page.get_by_role("button", name="Reset sampling").click()
    page.keyboard.press("Escape")
    say(page, "Without")
    assert server.bodies[2]["temperature"] == 0.3


def test_models_are_chosen_and_a_base_model_has_a_page_for_text(
    context: BrowserContext, server: ScriptedServer
) -> None:
    server.models = [CHAT, ADAPTER, BASE]
    page = opened(context, server)
    assert page.locator("#model option").all_inner_texts() == [
        "small-chat", "pirate (adapter of small-chat)", "small-base (continues text)",
    ]  # fmt: skip
    page.select_option("#model", "pirate")
    say(page, "Ahoy")
    assert server.bodies[0]["model"] == "pirate"
    page.select_option("#model", "small-base")
    expect(page.locator("#say")).to_be_hidden()
    page.fill("#text", "Once upon")
    page.click("#continue")
    expect(page.locator("#text")).to_have_value("Once uponAll is **well**.")
    page.click("#list a:not([aria-current])")
    expect(page.locator("#model")).to_have_value("pirate")
    server.models = [BASE]  # what it was said to is not served any more
    page.reload()
    page.wait_for_selector("#model:enabled")
    expect(page.locator("#send")).to_be_disabled()
    assert page.locator("article").count() == 2


def test_a_text_is_continued_in_place(context: BrowserContext, server: ScriptedServer) -> None:
    server.models = [BASE]
    page = opened(context, server)
    text = page.locator("#text")
    server.script = [Writing(" there was"), Writing(" a fox"), Writing(" a hen"), Writing(" who" * 500, pause=0.02)]
    text.fill("Once")
    text.press("Control+Enter")
    expect(text).to_have_value("Once there was")
    expect(page.locator("mark")).to_have_text(" there was")
    assert server.bodies[0]["prompt"] == "Once" and "messages" not in server.bodies[0]
    expect(page.locator("#text-figures")).to_contain_text("3 tokens")
    page.click("#continue")
    expect(text).to_have_value("Once there was a fox")
    page.click("#another")
    expect(text).to_have_value("Once there was a hen")
    page.click("#continue")
    until(page, "document.getElementById('text').value.includes('who who')")
    assert page.locator("#continue").inner_text() == "Stop"
    page.keyboard.press("Escape")
    expect(page.locator("#continue")).to_have_text("Continue")
    text.press("Control+z")
    expect(text).to_have_value("Once there was a hen")
    page.click("#undo")
    expect(text).to_have_value("Once there was")
    text.press("End")
    page.keyboard.type(", long ago")
    page.click("#undo")  # the part that was typed is kept
    expect(text).to_have_value("Once, long ago")
    expect(page.locator("#undo")).to_be_disabled()
    page.wait_for_timeout(700)
    page.reload()
    page.wait_for_selector("#model:enabled")
    expect(text).to_have_value("Once, long ago")
    server.script = [Refusal(400, "the prompt is too long", "context_length_exceeded", "prompt")]  # half of it is not
    text.fill("word " * 200)
    text.press("Control+Enter")
    expect(text).to_have_value("word " * 200 + "All is **well**.")
    expect(page.locator("#text-figures")).to_contain_text("characters into the text")
    assert 490 <= len(server.bodies[-1]["prompt"]) <= 500
    server.otherwise = Refusal(400, "the prompt is too long", "context_length_exceeded", "prompt")
    text.press("Control+Enter")
    expect(page.locator(".card")).to_contain_text("the prompt is too long")
    assert len(server.bodies) < 30


def test_the_keyboard_is_enough(page: Page, server: ScriptedServer) -> None:
    expect(page.locator("#say")).to_be_focused()
    page.keyboard.type("two")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("lines")
    page.keyboard.press("Enter")
    page.wait_for_selector(ANSWERED)
    assert asked(server) == [("user", "two\nlines")]
    page.keyboard.press("ArrowUp")
    expect(page.get_by_label("Edit the message")).to_be_focused()
    page.keyboard.type("!")
    page.keyboard.press("Enter")
    page.wait_for_selector(ANSWERED)
    assert asked(server) == [("user", "two\nlines!")]
    page.keyboard.press("Control+k")
    expect(page.locator("#say")).to_be_focused()
    expect(page.locator("article")).to_have_count(0)
    seen = []
    for _ in range(12):
        page.keyboard.press("Tab")
        seen.append(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
        if seen[-1] != "BODY":
            assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none" or seen[-1] == "say"
    assert {"new", "A", "import", "export", "theme", "model", "settings-open", "say", "send"} <= set(seen)


@pytest.mark.parametrize("width", [320, 375])
def test_nothing_is_wider_than_a_narrow_screen(context: BrowserContext, server: ScriptedServer, width: int) -> None:
    server.models = [CHAT, BASE | {"id": "a-name-that-is-" + "very-" * 20 + "long"}]
    page = opened(context, server)
    page.set_viewport_size({"width": width, "height": 600})
    table = "\n".join(f"|{cell * 30}" for cell in ("cell|", "---|", "value|"))
    wide = f"```\n{'code ' * 60}\n```\n\n{table}\n\n{'x' * 400} https://e.example/{'y' * 300}"
    server.script = [Writing(MARKDOWN + wide, piece=500), Refusal(400, "z" * 300)]
    say(page, "w" * 300)
    say(page, "again", wait=False)
    page.wait_for_selector(".card")
    too_wide = """() => [...document.querySelectorAll("body, main, main *")].filter((node) =>
        node.getClientRects().length && !node.closest("pre, .scroll, .unseen, select") &&
        node.getBoundingClientRect().right > innerWidth + 1).map((node) => node.outerHTML.slice(0, 80))"""
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(
        "document.getElementById('scroller').scrollWidth <= document.getElementById('scroller').clientWidth"
    )
    assert page.evaluate(too_wide) == []
    page.click("#menu")
    expect(page.locator("#new")).to_be_focused()
    page.keyboard.press("Escape")
    expect(page.locator("#side")).to_be_hidden()
    page.select_option("#model", index=1)
    page.fill("#text", "v" * 500)
    assert page.evaluate(too_wide) == []


def test_dark_and_light_follow_the_system_or_the_switch(page: Page) -> None:
    def brightness() -> int:
        colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
        return sum(map(int, re.findall(r"\d+", colour)[:3])) // 3

    page.emulate_media(color_scheme="dark")
    assert brightness() < 60
    page.emulate_media(color_scheme="light")
    assert brightness() > 200
    page.click("#theme")
    page.click("#theme")
    assert page.inner_text("#theme") == "Dark" and brightness() < 60
    page.reload()
    assert brightness() < 60
    page.emulate_media(reduced_motion="reduce")
    page.evaluate("document.body.append(Object.assign(document.createElement('p'), {className: 'pending'}))")
    assert page.evaluate("getComputedStyle(document.querySelector('.pending')).animationName") == "none"


def test_a_damaged_storage_loses_nothing(page: Page, server: ScriptedServer) -> None:
    say(page, "Kept")
    page.evaluate(
        """() => {
          localStorage["elm-mlx/conversation/bad"] = '{"kind": "chat", "messages": [{"role": 3}]}';
          localStorage["elm-mlx/conversation/worse"] = "{{{";
          const odd = {role: "assistant", content: "", figures: {tokens: {}, rate: "9", first: "?"}};
          const messages = [{role: "user", content: "Odd"}, odd];
          localStorage["elm-mlx/conversation/odd"] = JSON.stringify({kind: "chat", skip: "x", updated: [], messages});
          localStorage["elm-mlx/settings"] = "[[[";
          localStorage["elm-mlx/theme"] = "purple";
        }"""
    )
    page.reload()
    page.wait_for_selector("#model:enabled")
    expect(page.locator("#list li")).to_have_count(4)
    assert answers(page) == ["All is well."]
    page.locator("#list a", has_text="Odd").click()
    expect(page.locator("article.user .body")).to_have_text("Odd")
    page.locator("#list a", has_text="Damaged").first.click()
    expect(page.locator(".card")).to_contain_text("was damaged")
    say(page, "A new one beside it")
    expect(page.locator("article.user .body")).to_have_text("A new one beside it")
    page.locator("#list a", has_text="Damaged").first.click()
    page.reload()
    page.wait_for_selector("#model:enabled")
    expect(page.locator(".card")).to_contain_text("was damaged")
    with page.expect_download() as download:
        page.get_by_role("button", name="Save what is there").click()
    assert Path(download.value.path()).read_text() in ("{{{", '{"kind": "chat", "messages": [{"role": 3}]}')
    page.get_by_role("button", name="Delete", exact=True).click()
    expect(page.locator("#list li")).to_have_count(4)


def test_a_full_storage_is_said(page: Page, server: ScriptedServer) -> None:
    say(page, "Kept")
    page.evaluate(
        """() => {
          let piece = "x".repeat(1 << 22);
          while (piece) {
            try { localStorage["filler" + piece.length + Math.random()] = piece; }
            catch { piece = piece.slice(0, piece.length >> 1); }
          }
        }"""
    )
    page.keyboard.press("Control+k")
    say(page, "No room for this")
    expect(page.locator("#toast")).to_contain_text("storage is full")
    say(page, "Nor this")
    page.locator("#list a", has_text="Kept").click()
    page.locator("#list a", has_text="No room").click()
    expect(page.locator("article.user")).to_have_count(2)  # as long as the tab is open
    page.evaluate(
        "Object.keys(localStorage).filter((key) => /^filler/.test(key)).forEach((key) => delete localStorage[key])"
    )
    say(page, "Room again")
    page.reload()
    expect(page.locator("article.user")).to_have_count(3)


def test_a_browser_that_keeps_nothing_will_do(context: BrowserContext, server: ScriptedServer) -> None:
    refuse = "Object.defineProperty(window, %r, {get() { throw new DOMException('no', 'SecurityError'); }});"
    context.add_init_script("".join(refuse % name for name in ("localStorage", "sessionStorage")))
    server.key = "sesame"
    page = context.new_page()
    page.goto(server.url)
    page.fill("#key", "sesame")
    page.press("#key", "Enter")
    page.wait_for_selector("#model:enabled")
    say(page, "One")
    page.keyboard.press("Control+k")
    say(page, "Two")
    page.locator("#list a", has_text="One").click()
    expect(page.locator("article.user .body")).to_have_text("One")


def test_another_machine_reaches_it_without_https(browser: Browser, server: ScriptedServer) -> None:
    page = browser.new_page()
    page.goto(server.url.replace("127.0.0.1", OTHER_MACHINE))
    page.wait_for_selector("#model:enabled")
    assert not page.evaluate("isSecureContext")
    say(page, "Hello")
    page.locator(".assistant .tools button").first.click()
    page.press("#say", "Control+v")
    assert page.input_value("#say") == "All is **well**."
    page.close()


def test_conversations_go_to_the_terminal_and_come_back(page: Page, server: ScriptedServer, tmp_path: Path) -> None:
    page.click("#settings-open")
    page.fill("#system", "Be kind.")
    page.keyboard.press("Escape")
    say(page, "Grüße, 狐!")
    server.script = [Writing("", hold=30)]
    say(page, "Unanswered", wait=False)
    page.keyboard.press("Escape")
    with page.expect_download() as download:
        page.click("#export")
    assert download.value.suggested_filename == "Grüße-狐.json"
    saved = tmp_path / "saved.json"
    download.value.save_as(saved)
    assert read_messages(saved) == ("Be kind.", [("Grüße, 狐!", "All is **well**.")])
    with page.expect_file_chooser() as chooser:
        page.click("#import")
    bad = tmp_path / "bad.json"
    bad.write_text(json.dumps({"messages": [{"role": "assistant", "content": "I begin"}]}))
    worse = tmp_path / "worse.json"
    worse.write_text(json.dumps({"messages": [{"role": "system", "content": "Be."}, None]}))
    chooser.value.set_files([saved, bad, worse])
    expect(page.locator("#toast")).to_contain_text("bad.json: message 1 must be a text of “user”")
    expect(page.locator("#toast")).to_contain_text("worse.json: message 2 must be a text of “user”")
    expect(page.locator("article.user .body")).to_have_text("Grüße, 狐!")
    expect(page.locator("#list li")).to_have_count(2)
    assert page.input_value("#system") == "Be kind."


def test_an_answer_goes_on_while_another_conversation_is_shown(page: Page, server: ScriptedServer) -> None:
    server.script = [Writing("slow " * 100, pause=0.02, piece=10)]
    say(page, "Slow", wait=False)
    page.wait_for_selector("article.assistant")
    page.keyboard.press("Control+k")
    say(page, "Quick")
    assert answers(page) == ["All is well."]
    page.locator("#list a", has_text="Slow").click()
    page.wait_for_selector("article.assistant[aria-busy=true]")
    page.wait_for_selector(ANSWERED)
    assert answers(page) == [("slow " * 100).strip()]


def test_what_is_deleted_while_it_is_written_stays_so(page: Page, server: ScriptedServer) -> None:
    server.script = [Writing("slow " * 500, pause=0.02)]
    say(page, "Slow", wait=False)
    page.wait_for_selector("article.assistant")
    page.keyboard.press("Control+k")
    page.locator("#list li").hover()
    page.get_by_role("button", name="Delete Slow").click()
    page.wait_for_timeout(300)
    assert page.locator("#list li").count() == 0 and server.left == 1
    page.reload()
    assert page.locator("#list li").count() == 0


def test_leaving_the_page_changes_nothing_that_another_tab_has_changed(
    context: BrowserContext, server: ScriptedServer
) -> None:
    one = opened(context, server)
    say(one, "First")
    other = context.new_page()
    other.goto(one.url)
    other.wait_for_selector("#model:enabled")
    server.script = [Writing("A line.\n\n" * 60, piece=9)]
    say(other, "Second")
    expect(one.locator("article")).to_have_count(4)
    one.evaluate("document.getElementById('scroller').scrollTop = 100")
    expect(one.locator("#down")).to_be_visible()
    say(other, "Third")
    expect(one.locator("article")).to_have_count(6)
    assert one.evaluate("document.getElementById('scroller').scrollTop") == 100  # what was read stays in view
    one.reload()
    expect(one.locator("article")).to_have_count(6)
    assert one.locator("#list li").count() == 1


def test_reading_earlier_parts_is_not_disturbed(page: Page, server: ScriptedServer) -> None:
    server.script = [Writing("A line of text.\n\n" * 200, pause=0.01, piece=34)]
    say(page, "Long", wait=False)
    until(page, "document.getElementById('scroller').scrollTop > 200")
    page.evaluate("document.getElementById('scroller').scrollTop = 50")
    page.wait_for_timeout(300)
    assert page.evaluate("document.getElementById('scroller').scrollTop") == 50
    page.click("#down")
    page.wait_for_selector(ANSWERED)
    end = "(({scrollTop, clientHeight, scrollHeight}) => scrollHeight - scrollTop - clientHeight)"
    assert page.evaluate(f"{end}(document.getElementById('scroller'))") < 2


# A button says so for a moment: shorter than a busy machine may look away.
NOTE_WHAT_IT_SAYS = (
    "b => new MutationObserver(() => (b.dataset.said ??= b.textContent)).observe(b, { childList: true })"
)


def test_code_and_answers_are_copied(context: BrowserContext, page: Page, server: ScriptedServer) -> None:
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    server.script = [Writing("Run\n\n```sh\nls -l\ncd ..\n```\n")]
    say(page, "How?")
    for button, copied in (
        (".copy", "ls -l\ncd .."),
        (".assistant .tools button", "Run\n\n```sh\nls -l\ncd ..\n```"),
    ):
        page.bring_to_front()  # a page without the focus may not use the clipboard
        found = page.locator(button).first
        found.evaluate(NOTE_WHAT_IT_SAYS)
        found.click()
        expect(found).to_have_attribute("data-said", "Copied")
        assert page.evaluate("navigator.clipboard.readText()") == copied


def test_the_buttons_of_an_answer_stay_once_it_is_there(page: Page, server: ScriptedServer) -> None:
    """One that has the focus, or is pressed just then, is not replaced by another of its name."""
    page.evaluate(
        """() => new MutationObserver(([{target}]) => {
          if (target.ariaBusy === "false") (window.shown ??= target.querySelector("footer button")).focus();
        }).observe(document.getElementById("log"), {subtree: true, attributeFilter: ["aria-busy"]})"""
    )
    say(page, "How?")
    page.wait_for_timeout(300)
    assert page.evaluate("shown.isConnected && shown === document.activeElement")
    page.get_by_role("button", name="Regenerate").click()
    expect(page.locator(".assistant .figures")).to_contain_text("tokens/s")
    assert len(server.bodies) == 2


def test_what_the_browser_refuses_to_copy_is_copied_by_selection(page: Page, server: ScriptedServer) -> None:
    """As it does of a page that has lost the focus."""
    refusing = "() => Promise.reject(new DOMException('', 'NotAllowedError'))"
    page.evaluate(f"() => {{ navigator.clipboard.writeText = {refusing} }}")
    say(page, "How?")
    found = page.locator(".assistant .tools button").first
    found.evaluate("b => document.addEventListener('copy', () => (b.dataset.copied = getSelection().toString()))")
    found.evaluate(NOTE_WHAT_IT_SAYS)
    found.click()
    expect(found).to_have_attribute("data-copied", "All is **well**.")
    expect(found).to_have_attribute("data-said", "Copied")


def test_the_real_server_is_understood(browser: Browser, tmp_path: Path) -> None:
    tokenizer = tiny.train_tokenizer()
    chat, base = (
        tiny.write_directory(tmp_path / name, tiny.random_model(tiny.scaled_config(320)), tokenizer)
        for name in ("chat", "base")
    )
    with serving([make_chat(chat), base], api_key="sesame") as served:
        page = browser.new_page()
        page.goto(served.url)
        page.fill("#key", "sesame")
        page.press("#key", "Enter")
        page.wait_for_selector("#model:enabled")
        page.click("#settings-open")
        page.fill("[name=temperature]", "0")  # these models' greedy answers do not end before the limit
        page.fill("[name=max_tokens]", "7")
        page.keyboard.press("Escape")
        say(page, "a king")
        expect(page.locator(".assistant .figures")).to_contain_text("7 tokens")
        expect(page.locator("#context")).to_contain_text("of 512 tokens")
        say(page, "word " * 700, wait=False)
        expect(page.locator(".card")).to_contain_text("the model's context is 512")
        page.get_by_role("button", name="Leave out the oldest messages").click()
        expect(page.locator(".card")).to_contain_text("Shorten this message")
        page.select_option("#model", "base")
        page.fill("#text", "the quick")
        page.click("#continue")
        expect(page.locator("#text-figures")).to_contain_text("7 tokens")
        expect(page.locator("#text")).to_have_value(re.compile("the quick.+", re.S))
        page.close()
