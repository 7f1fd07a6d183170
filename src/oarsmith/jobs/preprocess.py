"""``oarsmith preprocess``: raw text to Megatron's token files, with a report of every document."""

from __future__ import annotations

import itertools
import json
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from oarsmith.atomic import atomic_write_text
from oarsmith.config.preprocess import PreprocessConfig
from oarsmith.config.resolved import Resolved
from oarsmith.data.corpus.account import Account
from oarsmith.data.corpus.clean import Cleaning
from oarsmith.data.corpus.dedup import Dedup
from oarsmith.data.corpus.documents import Document, Passed, read_documents
from oarsmith.data.corpus.engines import Engine, local_engine, ray_engine
from oarsmith.data.corpus.fast_bpe import FastPlan, plan_fast
from oarsmith.data.corpus.files import Layout
from oarsmith.data.corpus.indexed import IndexedDataset, bin_path, idx_path, token_dtype
from oarsmith.data.corpus.merge import find_pairs, merge_pairs
from oarsmith.data.corpus.shard import Settings
from oarsmith.data.corpus.tokenize import Encoding, disagreement
from oarsmith.data.corpus.workfolder import is_interrupted, work_folder
from oarsmith.data.corpus.write import Corpus, open_corpus, plan_of, write_corpus
from oarsmith.data.corpus.write import Progress as Advance
from oarsmith.errors import ConfigError
from oarsmith.jobs.console import make_console
from oarsmith.text import Tokenizer, load_tokenizer
from oarsmith.text.train_tokenizer import is_trained_with, train_tokenizer

_SAMPLE_DOCUMENTS, _SAMPLE_CHARACTERS = 200, 1 << 20


def run(resolved: Resolved[PreprocessConfig]) -> int:
    """The command."""
    config = resolved.config
    console = make_console()
    if config.merge:
        _merge(config, console)
        return 0
    engine = _engine(config)
    corpus = open_corpus(config.input_path, _layout(config))
    path = _trained(config, corpus, console) or config.tokenizer_name_or_path or config.model_name_or_path
    if config.output_prefix is None:
        return 0
    assert path is not None, "combinations.py asks for a tokenizer"
    report = encode(config, corpus, Path(path), engine, console)
    for line in report.lines():
        console.print(line)
    prefix = output_of(config)
    console.print(f"wrote {bin_path(prefix)} and {idx_path(prefix)}; the report is {report_path(prefix)}")
    return 0


def encode(config: PreprocessConfig, corpus: Corpus, path: Path, engine: Engine, console: Console) -> Account:
    """Write the token files and their report."""
    prefix, tokenizer = output_of(config), load_tokenizer(path)
    encoding = _encoding(config, tokenizer, corpus, path, console)
    settings = Settings(
        layout=_layout(config),
        cleaning=Cleaning(config.min_doc_length, config.max_repeated_len),
        encoding=encoding,
        dedup=Dedup(config.dedup, config.minhash_threshold, config.minhash_num_perm),
        skip_malformed=config.on_malformed == "skip",
    )
    plan = plan_of(corpus, settings, tokenizer.fingerprint)
    if not is_interrupted(prefix, plan):
        _check_output(config)
    with work_folder(prefix, plan) as work:
        if work.note is not None:
            console.print(f"note: {work.note}")
        if work.continues:
            console.print(f"going on with the shards that are finished in {work.path}")
        with _progress(console, corpus.num_bytes, config.log_interval) as advance:
            report = write_corpus(
                corpus, prefix, settings, engine, work, max_documents=config.max_doc_num, progress=advance
            )
        facts = {"tokenizer": str(path), "vocab_size": tokenizer.vocab_size, "fingerprint": tokenizer.fingerprint}
        fast = {"encoded_with": "tokenizer" if encoding.fast is None else "tiktoken"}
        content = {**report.to_dict(), **facts, **fast, "config": config.model_dump(mode="json")}
        atomic_write_text(report_path(prefix), json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    return report


def output_of(config: PreprocessConfig) -> Path:
    """The prefix of the output."""
    prefix = Path(config.output_prefix or "")
    if not prefix.name or str(config.output_prefix).endswith("/") or prefix.is_dir():
        raise ConfigError(
            f"{config.output_prefix!r} is a directory, not the beginning of file names",
            where="output_prefix",
            fix=f"add a name: {prefix / 'train'}",
        )
    return prefix.with_suffix("") if prefix.suffix in (".bin", ".idx") else prefix


def report_path(prefix: Path) -> Path:
    """Where the report of an output goes."""
    return prefix.with_name(prefix.name + ".report.json")


def _check_output(config: PreprocessConfig) -> None:
    prefix = output_of(config)
    existing = [path for path in (bin_path(prefix), idx_path(prefix)) if path.exists()]
    if existing and not config.overwrite:
        raise ConfigError(
            f"{existing[0]} exists already", where="output_prefix", fix="name another output, or add --overwrite"
        )


def _layout(config: PreprocessConfig) -> Layout:
    return Layout(config.json_key, config.text_documents, config.doc_spliter)


def _engine(config: PreprocessConfig) -> Engine:
    if config.engine == "ray":
        return ray_engine(config.workers, config.ray_address)
    return local_engine(config.workers or len(os.sched_getaffinity(0)))


def _encoding(config: PreprocessConfig, tokenizer: Tokenizer, corpus: Corpus, path: Path, console: Console) -> Encoding:
    eos = tokenizer.eos_id if config.append_eos else None
    if config.append_eos and eos is None:
        raise ConfigError(
            f"append_eos is true, but the tokenizer {path} has no eos_token",
            where="append_eos",
            fix="set eos_token in its tokenizer_config.json, or give --append_eos false",
        )
    fast = plan_fast(tokenizer, add_special_tokens=config.add_special_tokens)
    encoding = Encoding(
        tokenizer=str(path.resolve()),
        dtype=token_dtype(tokenizer.vocab_size).str,
        eos=eos,
        add_special_tokens=config.add_special_tokens,
        fast=fast if isinstance(fast, FastPlan) else None,
    )
    if isinstance(fast, str):
        console.print(f"encoding with the tokenizer's own library ({fast})")
    elif (wrong := disagreement(encoding, tokenizer, _sample(config, corpus))) is not None:
        console.print(
            f"note: tiktoken gives other ids for a text that begins with {wrong[:60]!r}, so the tokenizer's own "
            "library is used; please report this"
        )
        return replace(encoding, fast=None)
    return encoding


def _texts(config: PreprocessConfig, corpus: Corpus, num_bytes: float) -> Iterator[str]:
    """About `num_bytes` of text, from the beginning of every piece as much as is its part of the corpus."""
    for piece in corpus.pieces:
        left = num_bytes * piece.num_bytes / corpus.num_bytes
        for found in read_documents(piece, _layout(config), Passed()):
            if left <= 0:
                break
            if isinstance(found, Document):
                text = found.text.encode("utf-8", "ignore")
                left -= len(text)
                yield text.decode("utf-8")


def _sample(config: PreprocessConfig, corpus: Corpus) -> list[str]:
    """Some texts for the check of fast encoding."""
    texts, characters = list[str](), 0
    for text in itertools.islice(_texts(config, corpus, math.inf), _SAMPLE_DOCUMENTS):
        texts.append(text[:_SAMPLE_CHARACTERS])
        characters += len(texts[-1])
        if characters >= _SAMPLE_CHARACTERS:
            break
    return texts


def _trained(config: PreprocessConfig, corpus: Corpus, console: Console) -> str | None:
    """Train the tokenizer, if one is asked for and not there already; its path."""
    if config.train_tokenizer is None:
        return None
    directory = Path(config.train_tokenizer)
    named = {"bos_token": config.bos_token, "eos_token": config.eos_token, "pad_token": config.pad_token}
    special = {role: text for role, text in named.items() if text is not None}
    keys = ("vocab_size", "train_tokenizer_mb", "json_key", "text_documents", "doc_spliter")
    values = config.model_dump(mode="json")
    facts: dict[str, Any] = {
        "special_tokens": special,
        **{key: values[key] for key in keys},
        "files": corpus.fingerprint(),
    }
    if is_trained_with(directory, facts):
        console.print(f"{directory} holds the tokenizer that this would train: it is used")
        return str(directory)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())) and not config.overwrite:
        raise ConfigError(
            f"{directory} exists already, and is not what this would train",
            where="train_tokenizer",
            fix=f"use it: --tokenizer_name_or_path {directory}; or name another directory, or add --overwrite",
        )
    begin = time.perf_counter()
    with console.status(f"training a tokenizer of {config.vocab_size:,} ids"):
        texts = _texts(config, corpus, config.train_tokenizer_mb * 1e6)
        train_tokenizer(texts, directory, vocab_size=config.vocab_size, special_tokens=special, facts=facts)
    console.print(
        f"trained a tokenizer of {config.vocab_size:,} ids in {time.perf_counter() - begin:.1f} s: {directory}"
    )
    return str(directory)


def _merge(config: PreprocessConfig, console: Console) -> None:
    prefix, pairs = output_of(config), find_pairs(config.input_path)
    _check_output(config)
    documents, tokens = merge_pairs(pairs, prefix)
    dtype = np.dtype(IndexedDataset(prefix).dtype).name
    console.print(f"merged {len(pairs)} pairs: {documents:,} documents, {tokens:,} tokens as {dtype}")
    console.print(f"wrote {bin_path(prefix)} and {idx_path(prefix)}")


@contextmanager
def _progress(console: Console, num_bytes: int, log_interval: int) -> Iterator[Advance]:
    """A bar in a terminal, a line every `log_interval` documents elsewhere."""
    columns = TextColumn("encoding"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("encoding", total=num_bytes)
        done, documents, printed = 0, 0, 0

        def advance(more_bytes: int, more_documents: int) -> None:
            nonlocal done, documents, printed
            done, documents = done + more_bytes, documents + more_documents
            bar.update(task, completed=done)
            if not console.is_terminal and documents - printed >= log_interval:
                printed = documents
                console.print(f"{documents:,} documents, {done / num_bytes:.0%} of the corpus")

        yield advance
