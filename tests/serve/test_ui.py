"""The chat page: what it asks, what it says when something is wrong, and the page itself in a browser."""

from __future__ import annotations

import shutil
import time
from typing import Any

import pytest

from oarsmith.serve import openai
from oarsmith.serve.ui.client import Client, PageError, request_of
from oarsmith.serve.ui.turns import asked, before_answer, edited, plain, undone

pytestmark = pytest.mark.usefixtures("few_threads")
TEXT = "one two three"
HISTORY = [
    {"role": "user", "content": [{"type": "text", "text": "a"}]},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c"},
    {"role": "assistant", "content": "d", "metadata": None},
]


def roles(turns: list[dict[str, Any]]) -> str:
    return " ".join(f"{turn['role'][0]}:{turn['content']}" for turn in turns)


def test_turns() -> None:
    assert roles(plain(HISTORY)) == "u:a a:b u:c a:d"
    assert roles(asked(HISTORY, "e")) == "u:a a:b u:c a:d u:e"
    assert roles(before_answer(HISTORY)) == "u:a a:b u:c"
    left, question = undone(HISTORY)
    assert (roles(left), question) == ("u:a a:b", "c")
    assert undone([]) == ([], "") and before_answer(None) == []
    assert roles(edited(HISTORY, 2, "other")) == "u:a a:b u:other"


def test_requests() -> None:
    body = request_of([{"role": "user", "content": "x"}], "be brief", "m", {"seed": " 7 ", "top_k": 0, "min_p": None})
    assert body["messages"][0] == {"role": "system", "content": "be brief"}
    assert (body["seed"], body["top_k"], body["model"], "min_p" in body) == (7, 0, "m", False)
    with pytest.raises(PageError, match="whole number"):
        request_of([], "", None, {"seed": "x"})


def test_answers_come_in_pieces(served, chain_model) -> None:
    with served(chain_model(TEXT), routers=[openai.router]) as server:
        client = Client(server.url, None)
        assert client.models() == ["tiny"]
        body = request_of([{"role": "user", "content": "Hi"}], "", None, {"temperature": 0.0})
        texts = [(answering.text, answering.num_new) for answering in client.answer(body)]
        assert texts[0][0] and TEXT.startswith(texts[0][0]) and texts[-1][0] == TEXT
        assert texts[-1][1] == len(texts[:-1]) + 1  # the end of the turn has no text
        with pytest.raises(PageError, match="temperature"):
            list(client.answer({**body, "temperature": -1}))
        with pytest.raises(PageError, match="there is no model 'other'"):
            list(client.answer({**body, "model": "other"}))
    with pytest.raises(PageError, match="does not answer"):
        client.models()


def test_stopping_gives_the_answer_up(served, chain_model) -> None:
    with served(chain_model(TEXT, end=False), routers=[openai.router]) as server:
        free = server.free_pages()
        body = request_of([{"role": "user", "content": "Hi"}], "", None, {"temperature": 0.0, "max_tokens": 4000})
        answers = Client(server.url, None).answer(body)
        next(answers)
        assert server.service.worker.num_open <= 1
        answers.close()
        server.wait_idle()
        assert server.free_pages() == free


@pytest.mark.slow
def test_the_page_in_a_browser(served, chain_model, tmp_path) -> None:
    webdriver = pytest.importorskip("selenium.webdriver")
    by = pytest.importorskip("selenium.webdriver.common.by").By
    if shutil.which("chromium") is None or shutil.which("chromedriver") is None:
        pytest.skip("needs chromium and chromedriver")
    from oarsmith.serve.ui import launch

    options = webdriver.ChromeOptions()
    for word in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=390,844"):
        options.add_argument(word)
    with served(chain_model(TEXT), routers=[openai.router]) as server:
        page = launch(server.url, port=free_port(), title="A model")
        browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
        try:
            browser.get(page.url)

            def until(holds: Any) -> None:
                end = time.monotonic() + 60
                while not holds():
                    assert time.monotonic() < end, browser.find_element(by.TAG_NAME, "body").text
                    time.sleep(0.1)

            def said() -> list[str]:
                script = "return [...document.querySelectorAll('#chat .message')].map(x => x.innerText.trim())"
                return browser.execute_script(script)

            def status() -> str:
                return browser.execute_script("return document.querySelector('#status').innerText")

            def press(name: str) -> None:
                next(x for x in browser.find_elements(by.TAG_NAME, "button") if x.text.strip() == name).click()

            until(lambda: browser.find_elements(by.CSS_SELECTOR, "textarea[placeholder='Your message']"))
            box = browser.find_element(by.CSS_SELECTOR, "textarea[placeholder='Your message']")
            box.send_keys("Hello")
            press("Send")
            until(lambda: said()[-1:] == [TEXT] and "written" in status())
            press("Regenerate")
            worker = server.service.worker
            until(lambda: worker._num_orders == 2 and not worker.num_open and "written" in status())
            time.sleep(1)  # the page's last event is on its way
            assert said()[-1] == TEXT
            press("Undo")
            until(lambda: TEXT not in said() and box.get_attribute("value") == "Hello")
            width = "return document.documentElement.scrollWidth <= document.documentElement.clientWidth"
            assert browser.execute_script(width)
        finally:
            browser.quit()
            page.close()


def free_port() -> int:
    import socket

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
