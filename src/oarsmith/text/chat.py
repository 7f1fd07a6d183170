"""Chat templates: conversations to text, one way for training, evaluation and serving."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from oarsmith.errors import CheckpointError, DataError, OarsmithError
from oarsmith.text.meter import TemplateLimitError
from oarsmith.text.paddle_template import PaddleBody
from oarsmith.text.rendered import parse, refuse_marks, without_marks
from oarsmith.text.sandbox import TEMPLATE_FAILURES, Rendering, compile_template, failure, run_template

Message = Mapping[str, Any]

BUILTIN_TEMPLATES = (
    *("chatml", "llama-3", "mistral", "gemma"),
    *("qwen", "baichuan", "chatglm", "chatglm2", "chatglm3", "internlm2", "yuan2"),
)
"""Templates for models without one, see `ChatTemplate.builtin`. Those of the second row are taken without asking by
the tokenizer classes whose checkpoints carry none (`special.CLASS_RULES`)."""


@dataclass(frozen=True)
class JinjaBody:
    """Jinja sources by name: `default`, and for some models `tool_use`, `rag`, ..."""

    sources: tuple[tuple[str, str], ...]

    def pick(self, tools: Sequence[Any] | None) -> str:
        """The source transformers would choose: `tool_use` when tools are given and it exists, else `default`."""
        named = dict(self.sources)
        if tools is not None and "tool_use" in named:
            return named["tool_use"]
        if "default" not in named:
            raise CheckpointError(
                f"the model has chat templates named {', '.join(sorted(named))}, but none named 'default'",
                fix="name one of them 'default' in tokenizer_config.json",
            )
        return named["default"]

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Any] | None,
        add_generation_prompt: bool,
        variables: Mapping[str, Any],
    ) -> Rendering:
        template = compile_template(self.pick(tools))
        values = {
            **variables,
            "messages": messages,
            "tools": tools,
            "add_generation_prompt": add_generation_prompt,
        }
        values.setdefault("documents", None)
        return run_template(template, values)


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template: Hugging Face jinja or PaddleNLP's `chat_template.json`, behind one interface.

    Attributes:
        body: the template itself, one of the two kinds.
        origin: where it came from, named in errors.
    """

    body: JinjaBody | PaddleBody
    origin: str

    @classmethod
    def from_jinja(cls, source: str | Mapping[str, str], *, origin: str = "chat template") -> ChatTemplate:
        """From a jinja source, or named ones (`default`, `tool_use`). Raises CheckpointError for a syntax error."""
        named = {"default": source} if isinstance(source, str) else dict(source)
        for text in named.values():
            compile_template(text)
        return cls(JinjaBody(tuple(sorted(named.items()))), origin)

    @classmethod
    def from_paddle(cls, content: Mapping[str, Any], *, origin: str = "chat_template.json") -> ChatTemplate:
        """From the object in a PaddleNLP chat_template.json. Raises CheckpointError naming the offending key."""
        return cls(PaddleBody.parse(content, origin), origin)

    @classmethod
    def builtin(cls, name: str) -> ChatTemplate:
        """One of `BUILTIN_TEMPLATES`, for a model that has none."""
        if name not in BUILTIN_TEMPLATES:
            raise CheckpointError(
                f"there is no built-in chat template '{name}'", fix=f"choose one of {', '.join(BUILTIN_TEMPLATES)}"
            )
        source = (resources.files("oarsmith.text") / "templates" / f"{name}.jinja").read_text(encoding="utf-8")
        return cls.from_jinja(source, origin=f"built-in template {name}")

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Any] | None = None,
        add_generation_prompt: bool = False,
        **variables: Any,
    ) -> str:
        """The conversation as text; see `render_with_spans`."""
        return self.render_with_spans(messages, tools, add_generation_prompt, **variables).text

    def render_with_spans(
        self,
        messages: Sequence[Message],
        tools: Sequence[Any] | None = None,
        add_generation_prompt: bool = False,
        **variables: Any,
    ) -> Rendering:
        """Render a conversation.

        Args:
            messages: dicts with `role` and `content` (and what the template knows: `tool_calls`, ...).
            tools: JSON schemas of the functions the model may call.
            add_generation_prompt: end with what makes the model answer.
            variables: what else the template reads: `bos_token`, `eos_token`, `date_string`, `enable_thinking`, ...

        Raises:
            DataError: the template refused the conversation (with its own message and the message's index), broke the
                sandbox's rules, or passed a limit.
        """
        _check_messages(messages)

        def attempt(count: int) -> Rendering:
            return self.body.render(list(messages[:count]), tools, add_generation_prompt, variables)

        try:
            rendering = attempt(len(messages))
            if not rendering.marked:
                return rendering
            refuse_marks([messages, tools, variables])
            return _without_marks(rendering)
        except OarsmithError:
            raise
        except TemplateLimitError as error:
            raise failure(error, where=self.origin) from error
        except TEMPLATE_FAILURES as error:
            index = _first_refused(attempt, len(messages), error)
            raise failure(error, where=f"{self.origin}, {_describe(messages, index)}") from error

    def sources(self) -> dict[str, str]:
        """Everything that decides what is rendered, by name (for fingerprints and for saving)."""
        return dict(self.body.sources)


def _without_marks(rendering: Rendering) -> Rendering:
    spans = (tuple(without_marks(rendering.text, at) for at in span) for span in rendering.generated)
    return Rendering(parse(rendering.text), tuple((start, end) for start, end in spans))


def _describe(messages: Sequence[Message], index: int) -> str:
    return f"message {index} (role '{messages[index].get('role')}')" if messages else "no messages"


def _check_messages(messages: Sequence[Message]) -> None:
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise DataError(
                f"message {index} is a {type(message).__name__}, not an object",
                fix='give messages as [{"role": "user", "content": "..."}, ...]',
            )


def _first_refused(attempt: Callable[[int], Rendering], count: int, error: Exception) -> int:
    """Index of the message at which the template starts to fail as it did on the whole conversation.

    Bisects over prefixes: templates read messages in order, so the shortest failing prefix ends with the culprit.
    """
    low, high = 1, max(count, 1)
    while low < high:
        middle = (low + high) // 2
        try:
            attempt(middle)
        except TEMPLATE_FAILURES as found:
            if type(found) is type(error) and str(found) == str(error):
                high = middle
                continue
        low = middle + 1
    return high - 1
