"""`Tokenizer`: text and conversations to ids, ids to text, over any backend."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from oarsmith.atomic import atomic_write_bytes
from oarsmith.errors import CheckpointError, DataError, OarsmithError
from oarsmith.text.backends import Backend
from oarsmith.text.chat import BUILTIN_TEMPLATES, ChatTemplate, JinjaBody, Message
from oarsmith.text.cleanup import clean_up_spaces
from oarsmith.text.rendered import RenderedChat
from oarsmith.text.special import SpecialTokens

TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")
ADDITIONAL_TEMPLATES = "additional_chat_templates"
_PROBE = "0arsm1th-answer-probe"


class Tokenizer:
    """A tokenizer with its chat template; made by `load_tokenizer`."""

    def __init__(
        self,
        *,
        backend: Backend,
        special: SpecialTokens,
        chat_template: ChatTemplate | None,
        eos_ids: Sequence[int],
        cleans_spaces: bool,
        files: Mapping[str, bytes],
        name_or_path: str,
        chat_variables: Mapping[str, str] | None = None,
    ) -> None:
        """
        Args:
            backend: text to ids and back.
            special: special tokens, for their ids and as variables of the template.
            chat_template: None for a model without one.
            eos_ids: end-of-sequence ids of generation_config.json.
            cleans_spaces: `clean_up_tokenization_spaces`.
            files: the files it was read from, by name relative to the directory; `save` writes them again.
            name_or_path: where it was loaded from.
            chat_variables: template variables beside the special tokens.
        """
        self.backend = backend
        self.special = special
        self.chat_template = chat_template
        self.cleans_spaces = cleans_spaces
        self.name_or_path = name_or_path
        self._eos_ids = tuple(eos_ids)
        self._files = dict(files)
        self._chat_variables = dict(chat_variables or {})

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of a text, with BOS and EOS where the model wants them unless add_special_tokens is False.

        A rendered conversation of a template with control tokens (`RenderedChat`) has the ids its parts stand for;
        such a template alone decides about special tokens.
        """
        return self.encode_batch([text], add_special_tokens)[0]

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        """Ids of each text. Raises DataError for a text with a lone surrogate, which no tokenizer can encode."""
        try:
            if any(isinstance(text, RenderedChat) for text in texts):
                return [self._encode_one(text, add_special_tokens) for text in texts]
            return self.backend.encode_batch(texts, add_special_tokens) if texts else []
        except (TypeError, RuntimeError, UnicodeEncodeError):
            # How the libraries refuse a text that is no Unicode; anything else they mean stays as it is.
            for text in texts:
                _refuse_surrogates(text)
            raise

    def _encode_one(self, text: str, add_special_tokens: bool) -> list[int]:
        if not isinstance(text, RenderedChat):
            return self.backend.encode_batch([text], add_special_tokens)[0]
        ids: list[int] = []
        for part in text.parts:
            ids += [self._control_id(part.text)] if part.is_control else self.backend.encode_content(part.text)
        return ids

    def _control_id(self, token: str) -> int:
        index = self.backend.token_to_id(token)
        if index is None:
            raise CheckpointError(
                f"the chat template's token '{token}' is not in the tokenizer",
                where=self.name_or_path,
                fix="choose a chat template made for this model",
            )
        return index

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Text of ids. Ids beyond the vocabulary (padded embeddings) give nothing; broken UTF-8 gives U+FFFD."""
        text = self.backend.decode(ids, skip_special_tokens) if len(ids) else ""
        return clean_up_spaces(text) if self.cleans_spaces else text

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        tools: Sequence[Any] | None = None,
        add_generation_prompt: bool = False,
        **variables: Any,
    ) -> str:
        """A conversation as text, BOS included where the template writes it. See `ChatTemplate.render_with_spans`.

        Give `encode` the text as it is: it may be a `RenderedChat`, which knows more than its characters.
        """
        values = {**self._variables(), **variables}
        return self._template().render(messages, tools, add_generation_prompt, **values)

    def encode_chat(
        self,
        messages: Sequence[Message],
        tools: Sequence[Any] | None = None,
        add_generation_prompt: bool = False,
        **variables: Any,
    ) -> list[int]:
        """Ids of a rendered conversation; the template alone decides about BOS."""
        return self.encode(self.apply_chat_template(messages, tools, add_generation_prompt, **variables), False)

    def encode_chat_with_mask(
        self, messages: Sequence[Message], tools: Sequence[Any] | None = None, **variables: Any
    ) -> tuple[list[int], list[bool]]:
        """Ids of a conversation, and which of them lie in the template's `{% generation %}` blocks.

        A token that reaches into a block belongs to it. Raises OarsmithError for a tokenizer without character offsets.
        """
        values = {**self._variables(), **variables}
        rendering = self._template().render_with_spans(messages, tools, False, **values)
        if isinstance(rendering.text, RenderedChat):
            raise OarsmithError("character positions of tokens are not available for templates with control tokens")
        ids, offsets = self.backend.encode_with_offsets(rendering.text)
        mask = [any(start < end and a < end and b > start for start, end in rendering.generated) for a, b in offsets]
        return ids, mask

    def _variables(self) -> dict[str, Any]:
        return {**self.special.template_variables(), **self._chat_variables}

    def with_chat_template(self, template: ChatTemplate | None) -> Tokenizer:
        """The same tokenizer with another chat template, or none; `save` writes it so."""
        kept = {name: data for name, data in self._files.items() if not _is_template_file(name)}
        if "tokenizer_config.json" in kept:
            config = json.loads(kept["tokenizer_config.json"])
            config.pop("chat_template", None)
            kept["tokenizer_config.json"] = _dump(config)
        return Tokenizer(
            backend=self.backend,
            special=self.special,
            chat_template=template,
            eos_ids=self._eos_ids,
            cleans_spaces=self.cleans_spaces,
            files={**kept, **(_template_files(template) if template is not None else {})},
            name_or_path=self.name_or_path,
            chat_variables=self._chat_variables,
        )

    def _template(self) -> ChatTemplate:
        if self.chat_template is None:
            raise OarsmithError(
                f"{self.name_or_path} has no chat template",
                fix=f"choose a built-in one ({', '.join(BUILTIN_TEMPLATES)}) or add chat_template.jinja to the model",
            )
        return self.chat_template

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included. A model's embedding may be larger (padded)."""
        return self.backend.vocab_size

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids that skip_special_tokens leaves out."""
        return self.backend.special_ids

    @property
    def bos_id(self) -> int | None:
        return self._named_id("bos_token")

    @property
    def eos_id(self) -> int | None:
        return self._named_id("eos_token")

    @property
    def pad_id(self) -> int | None:
        return self._named_id("pad_token")

    def _named_id(self, role: str) -> int | None:
        token = self.special.named.get(role)
        return None if token is None else self.backend.token_to_id(token.content)

    @property
    def plain_pad_id(self) -> int | None:
        """The padding, unless an answer may end with it too: then its end would not be found behind padding."""
        return None if self.pad_id in (*self.stop_ids, self.eos_id) else self.pad_id

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end an answer: eos of generation_config.json, eos, and the token that ends the template's turns."""
        candidates = (*self._eos_ids, self.eos_id, self._end_of_turn_id())
        return tuple(dict.fromkeys(index for index in candidates if index is not None))

    def _end_of_turn_id(self) -> int | None:
        """The special token right after an assistant's text in a rendered conversation, if there is one."""
        if self.chat_template is None:
            return None
        messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _PROBE}]
        try:
            text = self.apply_chat_template(messages)
        except DataError:
            # A template that wants more than two plain messages says nothing about its end of turn.
            return None
        _, found, rest = text.rpartition(_PROBE)
        if not found:
            return None
        ids = self.backend.added_ids | self.backend.special_ids
        tokens = {token: index for index in ids if (token := self.backend.id_to_token(index)) is not None}
        following = [token for token in tokens if rest.lstrip().startswith(token)]
        return tokens[max(following, key=len)] if following else None

    def answer_lead(self, prompt: Sequence[int]) -> str:
        """White space that the model writes itself between a conversation and its answer, and that is part of neither.

        ChatGLM3's empty line of metadata, for a prompt that ends with the control token it follows; else "".
        """
        control, lead = self._lead_after_control
        return lead if prompt and prompt[-1] == control else ""

    @cached_property
    def _lead_after_control(self) -> tuple[int | None, str]:
        if self.chat_template is None:
            return None, ""
        question = {"role": "user", "content": "?"}
        try:
            opened = self.apply_chat_template([question], add_generation_prompt=True)
            answered = self.apply_chat_template([question, {"role": "assistant", "content": _PROBE}])
        except DataError:
            # As for the end of turn.
            return None, ""
        if not isinstance(opened, RenderedChat) or not opened.parts[-1].is_control or not answered.startswith(opened):
            return None, ""
        lead = answered[len(opened) :].partition(_PROBE)[0]
        return (self._control_id(opened.parts[-1].text), lead) if lead.isspace() else (None, "")

    def token_to_id(self, token: str) -> int | None:
        """Id of a token's exact text, None if it is no token."""
        return self.backend.token_to_id(token)

    def id_to_token(self, index: int) -> str | None:
        """A token as the vocabulary spells it (byte-level and sentencepiece spellings are not plain text)."""
        return self.backend.id_to_token(index)

    def token_bytes(self, index: int) -> bytes | None:
        """UTF-8 bytes that a token adds to a text that others stand before; None: it is special, or no token.

        Raises:
            OarsmithError: the tokenizer's tokens are not pieces of text.
        """
        return self.backend.token_bytes(index)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of everything that decides ids and renderings; independent of where the files lie."""
        digest = hashlib.sha256(self.backend.content())
        template = None if self.chat_template is None else self.chat_template.sources()
        facts = [template, self._variables(), self.cleans_spaces]
        digest.update(json.dumps(facts, sort_keys=True).encode())
        return digest.hexdigest()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the tokenizer's files into a Hugging Face directory, the original ones byte for byte.

        Raises CheckpointError when the directory cannot be written.
        """
        directory = Path(path)
        for name, data in {**self._files, **self.backend.built_files()}.items():
            target = directory / name
            try:
                atomic_write_bytes(target, data)
            except OSError as error:
                raise CheckpointError(f"cannot write the file: {error.strerror}", where=str(target)) from error


def _refuse_surrogates(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"the text holds a lone surrogate, {text[error.start]!r}, at character {error.start}",
            fix="it is half of a character: repair or drop the row",
        ) from error


def _is_template_file(name: str) -> bool:
    return name in TEMPLATE_FILES or name.startswith(f"{ADDITIONAL_TEMPLATES}/")


def _template_files(template: ChatTemplate) -> dict[str, bytes]:
    if not isinstance(template.body, JinjaBody):
        pair = template.body.conversation
        content = {
            "system": template.body.system,
            "conversation": None if pair is None else list(pair),
            "query": template.body.query,
        }
        return {"chat_template.json": _dump({key: value for key, value in content.items() if value is not None})}
    return {
        "chat_template.jinja" if name == "default" else f"{ADDITIONAL_TEMPLATES}/{name}.jinja": source.encode()
        for name, source in template.body.sources
    }


def _dump(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
