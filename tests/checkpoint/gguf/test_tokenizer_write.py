"""Tokenizers written into GGUF: llama.cpp gives the ids our tokenizer gives, and so does what is read back."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from oarsmith.checkpoint.gguf.container import GgufWriter
from oarsmith.checkpoint.gguf.pretokenizers import PRE_TOKENIZERS
from oarsmith.checkpoint.gguf.reader import GgufFile
from oarsmith.checkpoint.gguf.sentencepiece import parse_sentencepiece
from oarsmith.checkpoint.gguf.tokenizer import build_tokenizer
from oarsmith.checkpoint.gguf.tokenizer_write import tokenizer_metadata
from oarsmith.errors import CheckpointError
from oarsmith.text import load_tokenizer

from .files import byte_level_tokens, save_tokenizer

FIXTURES = Path(__file__).parents[2] / "fixtures" / "tokenizers"
TEXTS = [
    "The capital of France is Paris.",
    "In 2024, 12345 it's 3.14!  \n\n\ttab  and   spaces ",
    " leading, DON'T we'LL x_1 camelCase",
    "ümläut 漢字かな 😀\u200d ²½ \r\n\r\n  end",
    "hello world",
    "  two",
    "我想在apple工作1314151天～",
]
SIZES = {
    "context_length": 128,
    "embedding_length": 64,
    "block_count": 1,
    "attention.head_count": 4,
    "feed_forward_length": 96,
    "attention.layer_norm_rms_epsilon": 1e-5,
}


def write(directory: Path, path: Path, num_rows: int | None = None) -> list[str]:
    """A GGUF of nothing but the directory's tokenizer; gives the notes."""
    notes: list[str] = []
    rows = num_rows or load_tokenizer(directory).vocab_size + 9
    values = tokenizer_metadata(directory, rows, notes)
    header = {"general.architecture": "llama"} | {f"llama.{key}": value for key, value in SIZES.items()}
    with GgufWriter(path, header | values, {}):
        pass
    return notes


def llama_cpp_ids(path: Path, texts: list[str]) -> list[list[int]]:
    llama_cpp = pytest.importorskip("llama_cpp")
    llama = llama_cpp.Llama(model_path=str(path), vocab_only=True, verbose=False)
    ids = [list(llama.tokenize(text.encode(), add_bos=True, special=True)) for text in texts]
    llama.close()
    return ids


def read_back(path: Path, directory: Path) -> Any:
    directory.mkdir()
    built = build_tokenizer(GgufFile(path), architecture="llama", context=128)
    for name, text in built.files.items():
        (directory / name).write_text(text, encoding="utf-8")
    return load_tokenizer(directory)


@pytest.mark.parametrize(
    "name", ["qwen25_bpe_json", "gpt2_vocab_merges", "llama2_spm_legacy", "baichuan2_spm", "qwen1_tiktoken"]
)
def test_ids_are_the_same_everywhere(name: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(FIXTURES / name)
    assert write(FIXTURES / name, tmp_path / "m.gguf") == []
    expected = [tokenizer.encode(text) for text in TEXTS]
    back = read_back(tmp_path / "m.gguf", tmp_path / "back")
    assert [back.encode(text) for text in TEXTS] == expected
    assert back.bos_id == tokenizer.bos_id
    assert back.eos_id == (tokenizer.eos_id or tokenizer.stop_ids[0])  # Qwen-1's files name none
    assert llama_cpp_ids(tmp_path / "m.gguf", TEXTS) == expected


def test_what_stands_around_a_text_is_noted(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(FIXTURES / "chatglm2_spm")
    notes = write(FIXTURES / "chatglm2_spm", tmp_path / "m.gguf")
    assert "puts ['[gMASK]', 'sop'] around a text" in notes[0]
    expected = [tokenizer.encode(text, add_special_tokens=False) for text in TEXTS]
    assert llama_cpp_ids(tmp_path / "m.gguf", TEXTS) == expected


def test_sentencepiece_from_tokenizer_json(tmp_path: Path) -> None:
    """A tokenizer.json that was a sentencepiece model: the order of its merges gives the scores back."""
    write(FIXTURES / "llama2_spm_legacy", tmp_path / "a.gguf")
    first = read_back(tmp_path / "a.gguf", tmp_path / "json")  # a BPE with Prepend, Replace and byte fallback
    write(tmp_path / "json", tmp_path / "b.gguf")
    expected = [first.encode(text) for text in TEXTS]
    second = read_back(tmp_path / "b.gguf", tmp_path / "back")
    assert [second.encode(text) for text in TEXTS] == expected
    assert llama_cpp_ids(tmp_path / "b.gguf", TEXTS) == expected


def test_metaspace_without_prefix(tmp_path: Path) -> None:
    """Gemma's kind: no dummy space, and white space split off before merging."""
    write(FIXTURES / "llama2_spm_legacy", tmp_path / "a.gguf")
    read_back(tmp_path / "a.gguf", tmp_path / "json")
    path = tmp_path / "json" / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.save(str(path))
    expected = [load_tokenizer(tmp_path / "json").encode(text) for text in TEXTS]
    write(tmp_path / "json", tmp_path / "b.gguf")
    assert GgufFile(tmp_path / "b.gguf").metadata["tokenizer.ggml.add_space_prefix"] is False
    assert llama_cpp_ids(tmp_path / "b.gguf", TEXTS) == expected


def test_unigram(tmp_path: Path) -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*TEXTS[:1], "hello there other mother brother", "it is a text of this and that"] * 30),
        model_writer=model,
        vocab_size=60,
        model_type="unigram",
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (tmp_path / "spm").mkdir()
    (tmp_path / "spm" / "tokenizer.model").write_bytes(model.getvalue())
    (tmp_path / "spm" / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    texts = ["hello other text", "that is  the capital"]
    tokenizer = load_tokenizer(tmp_path / "spm")
    assert write(tmp_path / "spm", tmp_path / "m.gguf") == []
    assert GgufFile(tmp_path / "m.gguf").metadata["tokenizer.ggml.model"] == "t5"
    expected = [tokenizer.encode(text) for text in texts]
    assert llama_cpp_ids(tmp_path / "m.gguf", texts) == expected
    back = read_back(tmp_path / "m.gguf", tmp_path / "json")
    assert [back.encode(text) for text in texts] == expected
    write(tmp_path / "json", tmp_path / "again.gguf")
    assert llama_cpp_ids(tmp_path / "again.gguf", texts) == expected


@pytest.mark.parametrize("pre", [name for name in PRE_TOKENIZERS if name != "default"])
def test_pre_tokenizers_have_names(pre: str, tmp_path: Path) -> None:
    """What a GGUF name stands for gets that name back, or one that means the same to llama.cpp."""
    save_tokenizer(tmp_path, pre=pre)
    write(tmp_path, tmp_path / "m.gguf")
    name = GgufFile(tmp_path / "m.gguf").metadata["tokenizer.ggml.pre"]
    assert PRE_TOKENIZERS[name] is PRE_TOKENIZERS[pre]
    tokenizer = load_tokenizer(tmp_path)
    # llama.cpp tells capitals in ASCII only where these expressions do in all scripts, and it keeps numbers whole where
    # deepseek-llm cuts them, whose own vocabulary has no numbers of several digits.
    ascii_only = pre in ("tekken", "gpt-4o", "llama4", "deepseek-llm")
    texts = [text for text in TEXTS if text.isascii() or not ascii_only]
    texts = [text for text in texts if pre != "deepseek-llm" or "12345" not in text]
    assert llama_cpp_ids(tmp_path / "m.gguf", texts) == [tokenizer.encode(text) for text in texts]


def test_spellings_of_a_pre_tokenizer_do_not_matter(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, pre="qwen2")
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    pattern = (
        r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    split = pre_tokenizers.Split(Regex(pattern), "removed", invert=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    write(tmp_path, tmp_path / "m.gguf")
    assert GgufFile(tmp_path / "m.gguf").metadata["tokenizer.ggml.pre"] == "qwen2"


def test_special_tokens_and_template(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 0]}')
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["chat_template"] = [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]
    path.write_text(json.dumps(config))
    write(tmp_path, tmp_path / "m.gguf", num_rows=302)
    metadata = GgufFile(tmp_path / "m.gguf").metadata
    ids = {role: metadata[f"tokenizer.ggml.{role}_token_id"] for role in ("bos", "eos", "unknown", "padding", "eot")}
    assert ids == {"bos": 1, "eos": 2, "unknown": 0, "padding": 0, "eot": 0}
    assert metadata["tokenizer.ggml.token_type"][:4] == [3, 3, 3, 1]
    assert metadata["tokenizer.ggml.tokens"][-2:] == ["[PAD300]", "[PAD301]"]
    assert metadata["tokenizer.ggml.token_type"][-2:] == [5, 5]
    assert metadata["tokenizer.ggml.add_bos_token"] is False
    assert metadata["tokenizer.chat_template"] == "d"
    assert metadata["tokenizer.chat_templates"] == ["tool_use"]
    back = read_back(tmp_path / "m.gguf", tmp_path / "back")
    assert back.chat_template.sources() == {"default": "d", "tool_use": "t"}


def _byte_level(**changes: Any) -> Tokenizer:
    tokens, _ = byte_level_tokens()
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    for key, value in changes.items():
        setattr(tokenizer, key, value)
    return tokenizer


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (
            _byte_level(
                pre_tokenizer=pre_tokenizers.Sequence(
                    [pre_tokenizers.Split(Regex("[aeiou]+"), "isolated"), pre_tokenizers.ByteLevel(False)]
                )
            ),
            r"no name for the pre-tokenizer .*\[aeiou\]\+",
        ),
        (_byte_level(normalizer=normalizers.Lowercase()), "does not normalise text by Lowercase"),
        (_byte_level(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)), "no name for the pre-tokenizer"),
        (_byte_level(pre_tokenizer=pre_tokenizers.Whitespace()), "neither byte-level nor sentencepiece's"),
        (Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]")), "no tokenizer for a WordPiece model"),
    ],
)
def test_tokenizers_llama_cpp_cannot_express(tokenizer: tokenizers.Tokenizer, message: str, tmp_path: Path) -> None:
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(CheckpointError, match=message) as caught:
        tokenizer_metadata(tmp_path, 320, [])
    assert "--with_tokenizer false" in str(caught.value)


def test_sentencepiece_files(tmp_path: Path) -> None:
    data = (FIXTURES / "llama2_spm_legacy" / "tokenizer.model").read_bytes()
    model = parse_sentencepiece(data, where="x")
    processor = sentencepiece.SentencePieceProcessor(model_proto=data)
    assert [text for text, _, _ in model.pieces] == [processor.id_to_piece(i) for i in range(processor.vocab_size())]
    assert [score for _, score, _ in model.pieces] == [processor.get_score(i) for i in range(processor.vocab_size())]
    assert {i for i, piece in enumerate(model.pieces) if piece[2] == 6} == {
        i for i in range(processor.vocab_size()) if processor.is_byte(i)
    }
    assert not model.is_unigram
    for damaged in (data[:1001], b"\xff" * 40, b"\x0a\x05ab", b"\x0b"):
        with pytest.raises(CheckpointError, match="not a sentencepiece model"):
            parse_sentencepiece(damaged, where="x")


def test_a_unigram_with_a_character_map_is_not_read(tmp_path: Path) -> None:
    values = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "t5",
        "tokenizer.ggml.tokens": ["<unk>", "a"],
        "tokenizer.ggml.scores": [0.0, -1.0],
        "tokenizer.ggml.token_type": [2, 1],
        "tokenizer.ggml.precompiled_charsmap": b"\xff\xff\xff\x7f1234",
    }
    with GgufWriter(tmp_path / "m.gguf", values, {}):
        pass
    with pytest.raises(CheckpointError, match="character map is not read from GGUF"):
        build_tokenizer(GgufFile(tmp_path / "m.gguf"), architecture="llama", context=8)


def test_no_tokenizer(tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / "qwen25_bpe_json", tmp_path / "x")
    (tmp_path / "x" / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="no tokenizer found"):
        tokenizer_metadata(tmp_path / "x", 2000, [])
