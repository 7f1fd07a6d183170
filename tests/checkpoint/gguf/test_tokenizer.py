"""Tokenizers rebuilt from GGUF: the same ids as llama.cpp, transformers and sentencepiece give."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import gguf
import pytest
import sentencepiece
import transformers
from tokenizers import Tokenizer

from oarsmith.checkpoint.gguf.reader import GgufFile
from oarsmith.checkpoint.gguf.tokenizer import GgufTokenizer, build_tokenizer
from oarsmith.errors import CheckpointError

from .files import add_byte_level_tokenizer

TEXTS = [
    "The capital of France is Paris.",
    "In 2024, 12345 it's 3.14!  \n\n\ttab  and   spaces ",
    " leading, DON'T we'LL x_1 <|im_start|>user\nHi<|im_end|>\n",
    "ümläut 漢字 😀\u200d ²½ \r\n\r\n  end",
    "hello world",
]


def write_vocabulary(path: Path, *, architecture: str = "llama", **options: Any) -> None:
    """A GGUF of nothing but a byte-level tokenizer. `options` go to `add_byte_level_tokenizer` or are metadata."""
    writer = gguf.GGUFWriter(path, architecture)
    add_byte_level_tokenizer(writer, pre=options.pop("pre", "gpt-2"))
    for key, value in options.items():
        if isinstance(value, bool):
            writer.add_bool(f"tokenizer.ggml.{key}", value)
        elif isinstance(value, int):
            writer.add_uint32(f"tokenizer.ggml.{key}", value)
    _finish(writer)


def _finish(writer: gguf.GGUFWriter) -> None:
    # What llama.cpp wants to see before it looks at a vocabulary.
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_block_count(1)
    writer.add_head_count(4)
    writer.add_feed_forward_length(96)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def rebuild(path: Path, architecture: str = "llama") -> tuple[GgufTokenizer, Tokenizer]:
    built = build_tokenizer(GgufFile(path), architecture=architecture, context=128)
    return built, Tokenizer.from_str(built.files["tokenizer.json"])


def llama_cpp_ids(path: Path, text: str) -> list[int]:
    llama_cpp = pytest.importorskip("llama_cpp")
    llama = llama_cpp.Llama(model_path=str(path), vocab_only=True, verbose=False)
    ids = llama.tokenize(text.encode(), add_bos=True, special=True)
    llama.close()
    return list(ids)


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "starcoder", "llama-bpe", "qwen2"])
def test_byte_level_ids_are_llama_cpp_s(pre: str, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_vocabulary(path, pre=pre, add_bos_token=pre == "llama-bpe")
    _, tokenizer = rebuild(path)
    for text in TEXTS:
        ids = tokenizer.encode(text).ids
        assert ids == llama_cpp_ids(path, text), text
        assert tokenizer.decode(ids[pre == "llama-bpe" :], skip_special_tokens=False) == text


def test_pre_tokenizers_cut_numbers_as_their_models_do(tmp_path: Path) -> None:
    cuts = {"gpt-2": ["12345"], "smollm": list("12345"), "qwen2": list("12345"), "llama-bpe": ["123", "45"]}
    for pre, expected in cuts.items():
        write_vocabulary(tmp_path / "m.gguf", pre=pre)
        _, tokenizer = rebuild(tmp_path / "m.gguf")
        assert [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str("12345")] == expected, pre


def test_transformers_uses_the_files_as_they_are(tmp_path: Path) -> None:
    """Above all it does not put a model class's own pre-tokenizer in place of ours."""
    write_vocabulary(tmp_path / "m.gguf", pre="smollm", add_bos_token=True, add_eos_token=True)
    built, tokenizer = rebuild(tmp_path / "m.gguf")
    for name, text in built.files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        ids = tokenizer.encode(text).ids
        assert loaded(text).input_ids == ids
        assert (ids[0], ids[-1]) == (1, 2)
        assert loaded.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids)
    assert (loaded.bos_token, loaded.eos_token, loaded.pad_token) == ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
    assert loaded.model_max_length == 128


def test_old_files_without_a_pre_tokenizer_are_noted(tmp_path: Path) -> None:
    for architecture, expected in [("qwen2", "qwen2"), ("gpt2", "default")]:
        write_vocabulary(tmp_path / "m.gguf", architecture=architecture, pre=None)
        built, _ = rebuild(tmp_path / "m.gguf", architecture)
        assert f"names no pre-tokenizer: '{expected}' was taken" in built.notes[0]


def test_padding_rows_are_not_tokens(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(["a", "b", "ab", "[PAD3]", "[PAD4]"])
    writer.add_token_types([1, 1, 1, 5, 5])
    writer.add_token_merges(["a b"])
    writer.add_pad_token_id(77)
    _finish(writer)
    built, tokenizer = rebuild(tmp_path / "m.gguf")
    assert tokenizer.get_vocab_size() == built.num_tokens == 3
    assert built.notes == ("tokenizer.ggml.padding_token_id = 77 names no token: left out",)


# Sentencepiece.


@pytest.fixture(scope="module")
def spm(tmp_path_factory: pytest.TempPathFactory) -> sentencepiece.SentencePieceProcessor:
    model = io.BytesIO()
    sentences = (
        TEXTS[0],
        TEXTS[4],
        "the other mother of a brother",
        "hello there, hello then, hello world of capital cities",
    )
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences * 20),
        model_writer=model,
        vocab_size=350,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=["<turn>"],
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def write_sentencepiece(path: Path, spm: Any, *, add_space_prefix: bool = True, architecture: str = "llama") -> None:
    count = spm.vocab_size()
    kinds = []
    for index in range(count):
        if spm.is_unknown(index):
            kinds.append(2)
        elif spm.is_control(index):
            kinds.append(3)
        elif spm.is_byte(index):
            kinds.append(6)
        else:
            kinds.append(4 if spm.id_to_piece(index) == "<turn>" else 1)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([spm.id_to_piece(index) for index in range(count)])
    writer.add_token_scores([spm.get_score(index) for index in range(count)])
    writer.add_token_types(kinds)
    writer.add_add_space_prefix(add_space_prefix)
    writer.add_chat_template("{{ messages[0].content }}")
    _finish(writer)


def test_sentencepiece_ids(spm: Any, tmp_path: Path) -> None:
    write_sentencepiece(tmp_path / "m.gguf", spm)
    built, tokenizer = rebuild(tmp_path / "m.gguf")
    for text in [*TEXTS, "a<turn>", "日本 the"]:
        ids = tokenizer.encode(text).ids
        assert ids == [1, *spm.encode(text)], text
        assert ids == llama_cpp_ids(tmp_path / "m.gguf", text), text
        assert tokenizer.decode(ids) == text
    assert built.special_ids == {"bos": 1, "eos": 2, "unk": 0}
    assert "messages[0].content" in built.files["tokenizer_config.json"]


def test_sentencepiece_without_space_prefix(spm: Any, tmp_path: Path) -> None:
    write_sentencepiece(tmp_path / "m.gguf", spm, add_space_prefix=False, architecture="gemma")
    _, tokenizer = rebuild(tmp_path / "m.gguf", "gemma")
    for text in TEXTS:
        ids = tokenizer.encode(text).ids
        assert ids == llama_cpp_ids(tmp_path / "m.gguf", text), text
        assert tokenizer.decode(ids) == text


# Errors.


def test_unknown_names_list_the_known_ones(tmp_path: Path) -> None:
    write_vocabulary(tmp_path / "m.gguf", pre="viking")
    with pytest.raises(CheckpointError, match=r"unknown pre-tokenizer 'viking'; known are default, gpt-2, .*smollm"):
        rebuild(tmp_path / "m.gguf")
    writer = gguf.GGUFWriter(tmp_path / "bert.gguf", "llama")
    writer.add_tokenizer_model("bert")
    writer.add_token_list(["a"])
    _finish(writer)
    with pytest.raises(CheckpointError, match="unknown tokenizer model 'bert'; known are gpt2"):
        rebuild(tmp_path / "bert.gguf")


@pytest.mark.parametrize(
    ("tokens", "types", "merges", "message"),
    [
        (["a", "b", "ab"], [1, 1], ["a b"], "2 types for 3 tokens"),
        (["a", "b", "a"], [1, 1, 1], ["a b"], "'a' occurs twice"),
        (["a", "b", "ab"], [1, 1, 1], ["a c"], "merge 0 'a c' is not two tokens that make a third"),
        (["a", "b", "ab"], [1, 1, 1], ["ab"], "merge 0 'ab' is not"),
    ],
)
def test_lists_that_contradict_each_other(
    tokens: list[str], types: list[int], merges: list[str], message: str, tmp_path: Path
) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    _finish(writer)
    with pytest.raises(CheckpointError, match=message):
        rebuild(tmp_path / "m.gguf")
