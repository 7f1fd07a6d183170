"""The peer of `benchmarks/preprocess.py`: what Megatron-LM's ``tools/preprocess_data.py`` does to every document.

A process reads the lines of the file; a pool of workers gets them 32 at a time, parses the JSON, encodes with
transformers' `AutoTokenizer`, appends the end-of-document token, and sends lists of ids back; the first process adds
each document to Megatron-core's `IndexedDatasetBuilder`. Where megatron-core is not installed, the same bytes are
written by `Builder` below, which does less than the original.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # as forked workers have it in the original
import numpy as np
from transformers import AutoTokenizer


class Encoder:
    """What a worker does; the tokenizer is loaded once a process."""

    tokenizer = None

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options

    def initializer(self) -> None:
        Encoder.tokenizer = AutoTokenizer.from_pretrained(self.options.tokenizer)

    def encode(self, line: str) -> tuple[list[int], list[int], int]:
        text = json.loads(line)[self.options.json_key]
        ids = Encoder.tokenizer(text).input_ids
        ids.append(Encoder.tokenizer.eos_token_id)
        return ids, [len(ids)], len(line)


class Builder:
    """Megatron's `IndexedDatasetBuilder` without torch."""

    def __init__(self, bin_path: str, dtype: type) -> None:
        self.file, self.dtype = open(bin_path, "wb"), dtype  # noqa: SIM115
        self.lengths: list[int] = []
        self.documents = [0]

    def add_document(self, ids: list[int], lengths: list[int]) -> None:
        self.file.write(np.array(ids, dtype=self.dtype).tobytes(order="C"))
        self.lengths += lengths
        self.documents.append(len(self.lengths))

    def finalize(self, idx_path: str) -> None:
        self.file.close()
        lengths = np.array(self.lengths, np.int32)
        ends = np.cumsum(lengths, dtype=np.int64) * np.dtype(self.dtype).itemsize
        with open(idx_path, "wb") as file:
            code = {np.uint16: 8, np.int32: 4}[self.dtype]
            file.write(b"MMIDIDX\x00\x00" + (1).to_bytes(8, "little") + code.to_bytes(1, "little"))
            file.write(len(lengths).to_bytes(8, "little") + len(self.documents).to_bytes(8, "little"))
            file.write(lengths.tobytes() + np.concatenate([[0], ends[:-1]]).astype(np.int64).tobytes())
            file.write(np.array(self.documents, np.int64).tobytes())


def make_builder(bin_path: str, dtype: type) -> tuple[Builder, str]:
    try:
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
    except ImportError:
        return Builder(bin_path, dtype), "own builder"
    return IndexedDatasetBuilder(bin_path, dtype=dtype), "megatron-core"


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("tokenizer", "input", "output_prefix"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--json_key", default="text")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    encoder = Encoder(options)
    dtype = np.uint16 if len(AutoTokenizer.from_pretrained(options.tokenizer)) < 65500 else np.int32
    builder, name = make_builder(f"{options.output_prefix}.bin", dtype)
    begin = time.perf_counter()
    with (
        open(options.input, encoding="utf-8") as lines,
        multiprocessing.Pool(options.workers, initializer=encoder.initializer) as pool,
    ):
        for ids, lengths, _ in pool.imap(encoder.encode, lines, 32):
            builder.add_document(ids, lengths)
    builder.finalize(f"{options.output_prefix}.idx")
    print(json.dumps({"builder": name, "encoding_seconds": time.perf_counter() - begin}))


if __name__ == "__main__":
    main()
