"""Configuration of ``preprocess``: raw text to token files."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from .base import Bool, Float, Int, JobConfig, Strings


class CorpusKeys(JobConfig):
    """What is read and which documents of it are kept."""

    title: ClassVar[str] = "Corpus"

    input_path: Strings = Field(
        min_length=1,
        description="Files or directories of text: .jsonl, .json, .csv, .parquet, .txt, .md; .jsonl, .json and .txt "
        "also as .zst or .gz. With merge: pairs of .bin and .idx. Several: give the key again, or a list.",
    )
    json_key: str = Field("text", description="The field or column of a row that holds the text.")
    text_documents: Literal["separated", "line", "file"] = Field(
        "separated",
        description="What a document of a plain text file is: the lines up to a line that is doc_spliter, one line, or "
        "the whole file.",
    )
    doc_spliter: str = Field("", description="The line that separates documents of a text file. Empty: a blank line.")
    min_doc_length: Int = Field(10, ge=0, description="Shorter documents are left out (characters).")
    max_repeated_len: Int = Field(
        100, ge=0, description="A run of one character longer than this becomes one character. 0: runs stay."
    )
    max_doc_num: Int | None = Field(
        None, ge=1, description="Stop after so many documents; those that are malformed or too short do not count."
    )
    on_malformed: Literal["error", "skip"] = Field(
        "error", description="A row without text, no JSON, no UTF-8: stop, or leave it out and count it."
    )
    dedup: Literal["none", "exact", "minhash"] = Field(
        "none",
        description="Leave out documents that equal an earlier one but for case and white space (exact), or that have "
        "nearly the same words (minhash).",
    )
    minhash_threshold: Float = Field(
        0.8, gt=0, le=1, description="Jaccard similarity of runs of 5 words from which on two documents are the same."
    )
    minhash_num_perm: Int = Field(
        128, ge=16, le=4096, description="Hash functions of minhash. More: a sharper border, more time and memory."
    )


class TokenizerKeys(JobConfig):
    """How text becomes tokens."""

    title: ClassVar[str] = "Tokenizer"

    tokenizer_name_or_path: str | None = Field(None, description="Directory of the tokenizer, or of a model with one.")
    model_name_or_path: str | None = Field(None, description="The same, if tokenizer_name_or_path is not given.")
    append_eos: Bool = Field(True, description="Put the end-of-text token at the end of every document.")
    add_special_tokens: Bool = Field(
        True, description="Put around documents what the tokenizer puts around texts (BOS)."
    )
    train_tokenizer: str | None = Field(
        None,
        description="First train a tokenizer (byte-level BPE) from the corpus into this directory, then use it. "
        "Without an output_prefix nothing else is done.",
    )
    vocab_size: Int = Field(32000, ge=257, description="Ids of the trained tokenizer, special tokens included.")
    train_tokenizer_mb: Float = Field(
        1000.0, gt=0, description="Megabytes of text to train it on, taken from all over the corpus."
    )
    bos_token: str | None = Field(
        None, description="Begin-of-text token of the trained tokenizer; it then begins texts."
    )
    eos_token: str = Field("<|endoftext|>", description="End-of-text token of the trained tokenizer.")
    pad_token: str | None = Field(None, description="Padding token of the trained tokenizer.")


class PreprocessConfig(TokenizerKeys, CorpusKeys):
    """All keys of ``oarsmith preprocess``."""

    title: ClassVar[str] = "Output and work"
    command: ClassVar[str] = "preprocess"
    positional: ClassVar[tuple[str, ...]] = ("input_path", "output_prefix")

    output_prefix: str | None = Field(
        None, description="Path of the output without its endings: PREFIX.bin, PREFIX.idx and PREFIX.report.json."
    )
    merge: Bool = Field(False, description="Put several pairs of .bin and .idx together, in the order given.")
    overwrite: Bool = Field(False, description="Replace an output that exists.")
    workers: Int | None = Field(None, ge=1, description="Processes. Not given: one a CPU.")
    engine: Literal["local", "ray"] = Field("local", description="Processes on this machine, or a Ray cluster.")
    ray_address: str | None = Field(None, description="Of a running Ray cluster. Not given: one is started here.")
    log_interval: Int = Field(
        10000, ge=1, description="Documents between two lines about progress, where there is no terminal for a bar."
    )
