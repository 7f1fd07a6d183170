"""Which tokens of a conversation are the model's own: found by rendering prefixes with the model's template.

For an assistant message `i` the generation prompt is `render(messages[:i], add_generation_prompt=True)`. What it
supplies the model never has to say; the rest of `render(messages[:i + 1])`, up to the token that ends the turn, it
does. Nothing here knows any template.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from oarsmith.errors import DataError

if TYPE_CHECKING:
    from oarsmith.text import Tokenizer

Message = dict[str, Any]

REFUSED_BY_TEMPLATE = "the chat template refuses the conversation"
PROMPT_NOT_A_PREFIX = "the template renders the answer differently from its generation prompt"
NO_TEMPLATE_FOR_ROLES = "the model has no chat template, and the row has more than questions and answers"
NOT_SHOWN = "the chat template leaves out part of the conversation"
NO_END_OF_TURN = "nothing would teach the model to stop: the template ends no turn and the tokenizer has no eos"
NOT_JOINABLE = "the answer has no tokens that follow the prompt's tokens"


class RefusedError(Exception):
    """A turn or conversation that cannot become a sample; always caught here and counted, with its reason.

    Args:
        reason: one of a few fixed sentences, by which the report counts.
        detail: what it was in this row.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.detail = detail


@dataclass(slots=True)
class Span:
    """Tokens and loss weights of one sample to be, and the assistant messages trained in it (indices into the
    messages)."""

    ids: list[int]
    weights: list[float]
    trained: list[int]
    eos_added: int = 0


@dataclass(slots=True)
class Spans:
    """The samples of one conversation, and the turns that could not be trained."""

    spans: list[Span] = field(default_factory=list)
    refused: list[RefusedError] = field(default_factory=list)


class SpanEncoder:
    """Encodes conversations with one tokenizer and its template.

    Args:
        tokenizer: its chat template decides; without one a question and its answer are joined as they are
            and eos ends the answer (PaddleNLP's rule).
        variables: template variables for every render, such as `enable_thinking`.
    """

    def __init__(self, tokenizer: Tokenizer, variables: Mapping[str, Any]) -> None:
        self.tokenizer = tokenizer
        self.variables = dict(variables)
        self._kinds: dict[int, str] = {}
        self._stop_ids = frozenset(tokenizer.stop_ids)

    def with_variables(self, variables: Mapping[str, Any]) -> SpanEncoder:
        """The same encoder with further template variables (a row's own); what it learned about tokens is shared."""
        other = SpanEncoder(self.tokenizer, {**self.variables, **variables})
        other._kinds = self._kinds
        return other

    @property
    def has_template(self) -> bool:
        """Whether the tokenizer brings a chat template."""
        return self.tokenizer.chat_template is not None

    def render(self, messages: Sequence[Message], tools: Sequence[Any] | None, *, prompt: bool) -> str:
        """The conversation as text; with `prompt` up to where the model begins to speak.

        Raises:
            RefusedError: the template (or the lack of one) does not take these messages.
        """
        shown = [{name: value for name, value in message.items() if name != "weight"} for message in messages]
        if not self.has_template:
            return self._join(shown, tools)
        try:
            return self.tokenizer.apply_chat_template(
                shown, tools=list(tools) if tools else None, add_generation_prompt=prompt, **self.variables
            )
        except DataError as error:
            raise RefusedError(REFUSED_BY_TEMPLATE, error.what) from error

    def _join(self, messages: Sequence[Message], tools: Sequence[Any] | None) -> str:
        other = {message["role"] for message in messages} - {"user", "assistant"}
        if other or tools or any("tool_calls" in message for message in messages):
            raise RefusedError(NO_TEMPLATE_FOR_ROLES, ", ".join(sorted(other)) or "tools")
        return "".join(message["content"] for message in messages)

    def encode(self, text: str) -> list[int]:
        """Ids of a rendered text, as inference encodes it: a template spells its own special tokens."""
        ids = self.tokenizer.encode(text, add_special_tokens=not self.has_template)
        if not self.has_template and len(ids) > 1 and ids[-1] == self.tokenizer.eos_id:
            return ids[:-1]  # a tokenizer that ends every text with eos; here the text goes on
        return ids

    def turn(self, messages: Sequence[Message], tools: Sequence[Any] | None) -> tuple[list[int], list[int], bool]:
        """What the model is given and what it has to say for the last message, an assistant's.

        Returns:
            prompt ids (exactly those that generation starts from); answer ids with the token that ends the turn;
            whether that is an eos put there because the template has no such token.

        Raises:
            RefusedError: the template does not take the messages, or its training text contradicts its prompt.
        """
        prompt = self.render(messages[:-1], tools, prompt=True)
        full = self.render(messages, tools, prompt=False)
        if not full.startswith(prompt):
            full = prompt + self._answer_after_other_history(messages, tools, prompt, full)
        _check_all_shown(messages[-1], tools, prompt, full[len(prompt) :])
        return self.turn_of(prompt, full)

    def turn_of(self, prompt: str, full: str) -> tuple[list[int], list[int], bool]:
        """As `turn`, of a text that is already put together and what it begins with.

        Raises:
            RefusedError: the answer has no tokens that follow the prompt's, or nothing ends it.
        """
        prompt_ids = self.encode(prompt)
        ids = self._continuation(prompt, prompt_ids, full)
        end = self._end_of_turn(ids)
        if end is not None:
            return prompt_ids, ids[: end + 1], False
        if self.has_template:  # line breaks the template puts between turns are not the model's to say
            while ids and self._kind(ids[-1]) == "space":
                ids.pop()
        eos_id = self.tokenizer.eos_id
        if eos_id is None:
            raise RefusedError(NO_END_OF_TURN)
        return prompt_ids, [*ids, eos_id], True

    def _answer_after_other_history(
        self, messages: Sequence[Message], tools: Sequence[Any] | None, prompt: str, full: str
    ) -> str:
        """The answer's text where the template renders what is before it differently once it is answered.

        Mistral's shows the system message only while the question is the last message. What generation is given is
        the prompt, so the answer follows that; allowed only where everything from the question to the prompt's end is
        the same.
        """
        probes = [self.render([*messages[:-1], {"role": "assistant", "content": c}], tools, prompt=False) for c in "AB"]
        header = _common_beginning(*probes)
        question = messages[-2]["content"].strip()
        tails = [text[text.rfind(question) :] for text in (prompt, header) if question and question in text]
        if len(tails) == 2 and tails[1].startswith(tails[0]) and full.startswith(header):
            return full[len(header) - len(tails[1]) + len(tails[0]) :]
        at = len(_common_beginning(prompt, full))
        shown = f"{prompt[at : at + 30]!r}, the training text with {full[at : at + 30]!r}"
        raise RefusedError(PROMPT_NOT_A_PREFIX, f"the generation prompt goes on with {shown}")

    def _continuation(self, prompt: str, prompt_ids: list[int], full: str) -> list[int]:
        """Ids of `full` after the prompt, with the prompt's own ids untouched: generation has no others."""
        whole = self.encode(full)
        if whole[: len(prompt_ids)] == prompt_ids:
            return whole[len(prompt_ids) :]
        # A token of the whole text crosses the border. The rest is encoded alone; behind an anchor where
        # a tokenizer would put a space in front of a text's beginning.
        rest = full[len(prompt) :]
        wanted = self.tokenizer.decode(whole)
        for anchor in ("", "\n", "a"):
            anchor_ids = self.tokenizer.encode(anchor, add_special_tokens=False) if anchor else []
            joined = self.tokenizer.encode(anchor + rest, add_special_tokens=False)
            ids = joined[len(anchor_ids) :]
            if joined[: len(anchor_ids)] == anchor_ids and self.tokenizer.decode(prompt_ids + ids) == wanted:
                return ids
        raise RefusedError(NOT_JOINABLE, f"at {rest[:30]!r}")

    def _end_of_turn(self, ids: list[int]) -> int | None:
        """Index of the token that ends the turn: in the control tokens after the last word, the first stop token.

        Templates may put more behind it (phi-3: a line break and eos after the last message), which no model has to
        say.
        """
        start = len(ids)
        while start > 0 and self._kind(ids[start - 1]) != "word":
            start -= 1
        while start < len(ids) and self._kind(ids[start]) == "space":
            start += 1
        end = start
        while end < len(ids) and self._kind(ids[end]) == "control":
            if ids[end] in self._stop_ids:
                return end
            end += 1
        return end - 1 if end > start else None

    def _kind(self, token_id: int) -> str:
        """What a token is at the end of a turn: "control" (special or stop token), "space" (shows nothing) or
        "word"."""
        kind = self._kinds.get(token_id)
        if kind is None:
            if token_id in self._stop_ids or token_id in self.tokenizer.special_ids:
                kind = "control"
            else:
                kind = "word" if self.tokenizer.decode([token_id]).strip() else "space"
            self._kinds[token_id] = kind
        return kind

    def encode_turns(
        self, messages: Sequence[Message], tools: Sequence[Any] | None, trained: Mapping[int, float]
    ) -> Spans:
        """Samples that train the given assistant messages, each token with its loss weight.

        Turns share a sample as long as the later prompt begins with the very ids that the earlier turns ended with.
        Where it does not (the template rewrites history, as Qwen3 does with thinking), the later turn gets
        its own sample with its own history, as inference would see it.

        Args:
            trained: index of an assistant message -> loss weight > 0.
        """
        result = Spans()
        current: Span | None = None
        for index in sorted(trained):
            try:
                prompt_ids, ids, eos_added = self.turn(messages[: index + 1], tools)
            except RefusedError as refused:
                result.refused.append(refused)
                continue
            if current is None or prompt_ids[: len(current.ids)] != current.ids:
                current = Span([], [], [])
                result.spans.append(current)
            new_context = prompt_ids[len(current.ids) :]
            current.eos_added += eos_added
            current.ids += new_context + ids
            current.weights += [0.0] * len(new_context) + [trained[index]] * len(ids)
            current.trained.append(index)
            assert current.ids[: len(prompt_ids)] == prompt_ids, "the sample must begin with what generation is given"
        return result


def _check_all_shown(answer: Message, tools: Sequence[Any] | None, prompt: str, said: str) -> None:
    """A template that leaves out what it does not know (tools, thoughts, a text beside a call) does so in silence."""
    parts = [(f"the tool {tool['function']['name']}", tool["function"]["name"], prompt) for tool in tools or ()]
    calls = answer.get("tool_calls") or ()
    parts += [(f"the call of {call['function']['name']}", call["function"]["name"], said) for call in calls]
    parts.append(("reasoning_content", answer.get("reasoning_content", "").strip(), said))
    # Thoughts inside the content may be set in another way.
    parts.append(("the answer's text", answer["content"].rpartition("</think>")[2].strip(), said))
    missing = [name for name, wanted, text in parts if wanted not in text]
    if missing:
        raise RefusedError(NOT_SHOWN, ", ".join(missing))


def _common_beginning(first: str, second: str) -> str:
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))
    return "".join(a for a, _ in same)
