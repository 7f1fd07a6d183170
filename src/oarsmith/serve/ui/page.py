"""The chat page: a gradio application that asks the server as any other client does."""

from __future__ import annotations

import html
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from oarsmith.errors import ConfigError, MissingExtraError
from oarsmith.serve.ui.client import Client, PageError, request_of
from oarsmith.serve.ui.guard import Guard
from oarsmith.serve.ui.turns import Turns, asked, before_answer, edited, plain, undone

# Nothing is told to anybody, and no font or script comes from elsewhere.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

try:
    import gradio as gr
except ImportError as error:
    raise MissingExtraError("gradio", "ui", "the chat page") from error
from starlette.middleware import Middleware

_CSS = """
footer { display: none !important; }
.gradio-container main { max-width: 60rem !important; width: 100% !important; margin: 0 auto !important; }
.gradio-container main { padding: .75rem !important; }
#chat { min-height: 16rem; height: 62vh !important; }
#status { min-height: 1.4em; font-size: .85em; overflow-wrap: anywhere; }
#status .error { font-weight: 600; }
#chat .message, #chat .message-content { overflow-wrap: anywhere; }
"""
_FONT, _MONO = ["system-ui", "sans-serif"], ["ui-monospace", "monospace"]
_SETTINGS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens", "seed")


@dataclass
class Page:
    """A page that is up.

    Attributes:
        url: where.
    """

    url: str
    _blocks: gr.Blocks
    _client: Client

    def close(self) -> None:
        """Take it down."""
        self._blocks.close(verbose=False)
        self._client.close()


def launch(
    api_url: str, *, host: str = "127.0.0.1", port: int, api_key: str | None = None, title: str = "Oarsmith"
) -> Page:
    """Show a page for the server at ``api_url``; returns once it can be seen.

    Args:
        api_key: what the page itself shows the server; browsers do not get it.

    Raises:
        ConfigError: the port is taken.
    """
    client = Client(api_url, api_key)
    blocks = _build(client, title)
    try:
        _, url, _ = blocks.launch(
            server_name=host,
            server_port=port,
            prevent_thread_lock=True,
            quiet=True,
            share=False,
            ssr_mode=False,
            footer_links=[],
            run_history=False,
            enable_monitoring=False,
            app_kwargs={"middleware": [Middleware(Guard)]},
            theme=gr.themes.Default(font=_FONT, font_mono=_MONO),
            css=_CSS,
        )
    except OSError as error:
        client.close()
        raise ConfigError(
            f"port {port} cannot be used for the page", where="ui_port", fix="take another one"
        ) from error
    return Page(url, blocks, client)


def _build(client: Client, title: str) -> gr.Blocks:
    with gr.Blocks(title=title, analytics_enabled=False) as blocks:
        gr.Markdown(f"## {title}")
        chat = gr.Chatbot(
            elem_id="chat",
            show_label=False,
            editable="user",
            buttons=["copy", "copy_all"],
            allow_file_downloads=False,
            placeholder="Ask something. Everything stays on this server.",
        )
        status = gr.HTML("", elem_id="status")
        with gr.Row():
            text = gr.Textbox(
                show_label=False, placeholder="Your message", lines=1, max_lines=12, scale=8, autofocus=True
            )
            send = gr.Button("Send", variant="primary", scale=1, min_width=90)
            stop = gr.Button("Stop", variant="stop", scale=1, min_width=90, visible=False)
        with gr.Row():
            again = gr.Button("Regenerate", size="sm", min_width=90)
            undo = gr.Button("Undo", size="sm", min_width=90)
            clear = gr.Button("Clear", size="sm", min_width=90)
        with gr.Accordion("Settings", open=False):
            with gr.Row():
                # A choice made before this process began holds still: the server knows its models.
                model = gr.Dropdown(label="Model", choices=[], allow_custom_value=True, scale=4, min_width=200)
                refresh = gr.Button("Refresh", size="sm", scale=1, min_width=90)
            system = gr.Textbox(label="System prompt", lines=2, max_lines=8)
            settings = _settings()
        with gr.Accordion("Request", open=False):
            shown = gr.JSON(label="What the server was asked last", value={})
        _connect(
            client,
            {"chat": chat, "status": status, "text": text, "send": send, "stop": stop, "again": again, "undo": undo},
            {"clear": clear, "model": model, "refresh": refresh, "system": system, "shown": shown},
            settings,
        )
        # Nobody waits for somebody else's answer: the server has a queue of its own.
        blocks.load(lambda chosen: _models(client, chosen), model, [model, status])
        blocks.queue(default_concurrency_limit=None, api_open=False)
    return blocks


def _settings() -> list[Any]:
    """In the order of `_SETTINGS`."""
    with gr.Row():
        first = [
            gr.Slider(0.0, 1.5, 0.7, step=0.05, label="Temperature (0: always the likeliest)", min_width=220),
            gr.Slider(0.0, 1.0, 0.95, step=0.05, label="Top-p", min_width=220),
            gr.Slider(0, 100, 0, step=1, label="Top-k (0: all)", min_width=220),
            gr.Slider(0.0, 1.0, 0.0, step=0.01, label="Min-p", min_width=220),
            gr.Slider(0.1, 10.0, 1.0, step=0.05, label="Repetition penalty", min_width=220),
            gr.Slider(1, 4096, 512, step=1, label="Longest answer, tokens", min_width=220),
        ]
        return [*first, gr.Textbox(label="Seed, a whole number (empty: a new one each time)", min_width=220)]


def _models(client: Client, chosen: str | None) -> tuple[Any, str]:
    """The choice of models, which keeps what is chosen where it still is there; and the status."""
    try:
        names = client.models()
    except PageError as error:
        return gr.update(), _error(error)
    if not names:
        return gr.update(choices=[], value=None), _error(PageError("the server has no models"))
    return gr.update(choices=names, value=chosen if chosen in names else names[0]), ""


def _error(error: PageError) -> str:
    return f'<span class="error" role="alert">{html.escape(str(error))}</span>'


def _connect(client: Client, parts: dict[str, Any], more: dict[str, Any], settings: list[Any]) -> None:
    """What happens when something is pressed."""
    chat, status, text, stop, send = (parts[name] for name in ("chat", "status", "text", "stop", "send"))
    given = [chat, more["system"], more["model"], *settings]
    told = [chat, status, more["shown"], send, stop, parts["again"]]

    def answer(history: Turns, system: str | None, model: str | None, *values: Any) -> Iterator[tuple[Any, ...]]:
        yield from _answer(client, history, system, model, dict(zip(_SETTINGS, values, strict=True)))

    def ask(said: str, history: Turns) -> tuple[str, Turns]:
        return "", asked(history, said) if said.strip() else plain(history)

    def edit(history: Turns, data: gr.EditData) -> Turns:
        index = data.index[0] if isinstance(data.index, (list, tuple)) else data.index
        return edited(history, int(index), str(data.value))

    running = []
    for event in (text.submit, send.click):
        running.append(event(ask, [text, chat], [text, chat], show_progress="hidden").then(answer, given, told))
    running.append(parts["again"].click(before_answer, chat, chat, show_progress="hidden").then(answer, given, told))
    running.append(chat.edit(edit, chat, chat, show_progress="hidden").then(answer, given, told))
    # First cancelled, then changed: pieces on their way would undo the change. What is cancelled has no last word.
    free = [status, *told[3:]]
    stop.click(None, cancels=running).then(lambda: ("stopped", *_buttons(False)), None, free, show_progress="hidden")
    parts["undo"].click(None, cancels=running).then(
        lambda history: (*undone(history), "", *_buttons(False)), chat, [chat, text, *free], show_progress="hidden"
    )
    more["clear"].click(None, cancels=running).then(
        lambda: ([], {}, "", *_buttons(False)), None, [chat, more["shown"], *free], show_progress="hidden"
    )
    more["refresh"].click(lambda chosen: _models(client, chosen), more["model"], [more["model"], status])


def _buttons(busy: bool) -> tuple[Any, Any, Any]:
    """Send, or stop; and regenerate, which would ask beside an answer that comes."""
    return gr.update(visible=not busy), gr.update(visible=busy), gr.update(interactive=not busy)


def _answer(
    client: Client, history: Turns, system: str | None, model: str | None, settings: dict[str, Any]
) -> Iterator[tuple[Any, ...]]:
    """Chat, status, request and buttons, again and again until the answer is whole."""
    turns = plain(history)
    if not turns or turns[-1]["role"] != "user":
        yield turns, "", gr.skip(), *_buttons(False)
        return
    try:
        body = request_of(turns, system or "", model, settings)
    except PageError as error:
        yield turns, _error(error), gr.skip(), *_buttons(False)
        return
    yield turns, "waiting", body, *_buttons(True)
    answers = client.answer(body)
    now = turns
    try:
        for answering in answers:
            now = [*turns, {"role": "assistant", "content": answering.text}]
            yield now, answering.line or "answering", gr.skip(), *_buttons(not answering.finish)
    except PageError as error:
        yield now, _error(error), gr.skip(), *_buttons(False)
    finally:
        # Stopped or left: the request is closed, and the server works on it no longer.
        answers.close()
