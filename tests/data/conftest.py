"""Tiny real tokenizers with the published chat templates."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import oarsmith.text as text

FIXTURES = Path(__file__).parents[1] / "fixtures" / "tokenizers"
TEMPLATES = FIXTURES / "chat_render" / "templates"

# What the templates' own models have as special tokens; here each tokenizer gets those its template spells.
_SPECIAL = re.compile(
    r"<\|[^|>' ]+\|>|<｜[^｜]+｜>|<(?:start|end)_of_turn>|\[/?(?:INST|TOOL_CALLS|AVAILABLE_TOOLS|TOOL_RESULTS)\]"
    r"|\[\|endofturn\|\]|</?s>|\[gMASK\]|<sop>"
)


def _write_tokenizer(
    folder: Path,
    template: str | None,
    *,
    bos: str | None = "<s>",
    eos: str | None = "</s>",
    extra: tuple[str, ...] = (),
) -> Path:
    """A model folder with the small byte-level BPE of the fixtures, a template, and the special tokens it spells."""
    folder.mkdir(parents=True, exist_ok=True)
    content = json.loads((FIXTURES / "qwen25_bpe_json" / "tokenizer.json").read_text(encoding="utf-8"))
    known = {token["content"] for token in content["added_tokens"]}
    wanted = [*_SPECIAL.findall(template or ""), *(token for token in (bos, eos) if token), *extra]
    next_id = 1 + max(token["id"] for token in content["added_tokens"])
    for token in dict.fromkeys(wanted):
        if token not in known:
            flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            content["added_tokens"].append({"id": next_id, "content": token, "special": True, **flags})
            next_id += 1
    config = {"tokenizer_class": "Qwen2Tokenizer", "bos_token": bos, "eos_token": eos, "add_bos_token": False}
    if template is not None:
        config["chat_template"] = template
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def make_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., text.Tokenizer]:
    """make_tokenizer(template or None, bos=, eos=, extra=) -> a tokenizer loaded from a folder written for it."""

    def make(template: str | None, **special: Any) -> text.Tokenizer:
        return text.load_tokenizer(_write_tokenizer(tmp_path_factory.mktemp("tokenizer"), template, **special))

    return make


@pytest.fixture(scope="session")
def template_tokenizer(make_tokenizer: Callable[..., text.Tokenizer]) -> Callable[[str], text.Tokenizer]:
    """tokenizer(name of a template) -> the tokenizer with that template; chatml families stop at <|im_end|>."""
    loaded: dict[str, text.Tokenizer] = {}

    def get(name: str) -> text.Tokenizer:
        if name not in loaded:
            source = (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
            chatml = "<|im_end|>" in source
            eos = "<|im_end|>" if chatml else "</s>"
            loaded[name] = make_tokenizer(source, eos=eos)
        return loaded[name]

    return get


@pytest.fixture(scope="session")
def tokenizer(template_tokenizer: Callable[[str], text.Tokenizer]) -> text.Tokenizer:
    """The tokenizer most tests use: Qwen2.5's template."""
    return template_tokenizer("qwen2_5")


@pytest.fixture(scope="session")
def plain_tokenizer(make_tokenizer: Callable[..., text.Tokenizer]) -> text.Tokenizer:
    """A base model's tokenizer: no chat template."""
    return make_tokenizer(None)
