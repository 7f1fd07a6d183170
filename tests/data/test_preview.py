"""The preview shows every token once, with its loss, and nothing of it acts on the terminal."""

from __future__ import annotations

import io
import json

from rich.console import Console

import oarsmith
import remote_tokenizers
from oarsmith.data.preview import preview, token_texts
from oarsmith.data.samples import SampleOptions


def test_token_texts_join_to_the_decoded_text(tokenizer):
    ids = tokenizer.encode("<|im_start|>user\n再加3呢？😀 naïve  spaces\n", add_special_tokens=False)
    texts = token_texts(ids, tokenizer)
    assert len(texts) == len(ids) and "".join(texts) == tokenizer.decode(ids)
    broken = ids[:-2] + tokenizer.encode("😀", add_special_tokens=False)[:1]
    assert "".join(token_texts(broken, tokenizer)) == tokenizer.decode(broken)


def test_preview_colours_trained_tokens_and_shows_control_characters(tmp_path, tokenizer):
    path = tmp_path / "rows.jsonl"
    rows = [{"src": "[bold]q[/bold] \x1b[31m", "tgt": "green"}, {"src": "q", "tgt": ""}, {"src": "third", "tgt": "x"}]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, color_system="standard", width=300)
    preview(path, tokenizer, SampleOptions(), 2, console)
    shown = out.getvalue()
    assert "[bold]q[/bold] ␛[31m" in shown.replace("\x1b[2m", "").replace("\x1b[0m", "")
    assert "↵" in shown and f"{path}:1" in shown and "third" not in shown
    assert "left out, no answer to train on" in shown
    plain = io.StringIO()
    preview(path, tokenizer, SampleOptions(), 1, Console(file=plain, width=300, color_system=None))
    assert "<|im_start|>assistant↵" in plain.getvalue() and "legend" in plain.getvalue()
    trained = [part for part in shown.split("\x1b[") if part.startswith("30;")]
    assert "".join(part.split("m", 1)[1] for part in trained).startswith("green<|im_end|>")


def test_special_tokens_that_decode_to_nothing_have_their_names(tmp_path):
    glm = oarsmith.load_tokenizer(remote_tokenizers.directory("glm1", tmp_path))
    ids = glm.encode_chat([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "yo"}])
    texts = token_texts(ids, glm)
    assert len(texts) == len(ids) and "".join(texts) == "Hi<sop>yo<eop>"
