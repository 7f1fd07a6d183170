"""The columns of other layouts: there and back, the values as they were."""

from __future__ import annotations

import shutil
from pathlib import Path

from oarsmith.checkpoint.config_file import read_config
from oarsmith.checkpoint.convert import changes_values, convert_directory
from oarsmith.checkpoint.gguf.architectures import family_of_config
from oarsmith.checkpoint.gguf.convert import convert_gguf
from oarsmith.checkpoint.gguf.family import Config
from oarsmith.checkpoint.gguf.write import write_gguf
from oarsmith.checkpoint.hf import load_decoder
from oarsmith.checkpoint.paddle.names import paddle_family
from oarsmith.errors import OarsmithError
from oarsmith.models import families

from .bench import Bench, packed_logits
from .capabilities import NotApplicable, close, same_files
from .rows import FIXTURES

VOCAB_SIZE = 1120  # the tokenizer that lies beside the GGUF models has 1,106 ids


def to_bin(bench: Bench) -> str:
    """``pytorch_model.bin``."""
    there, back = bench.folder / "bin", bench.folder / "bin_back"
    convert_directory(bench.path, there, "bin")
    convert_directory(there, back, "hf")
    same_files(back, bench.path)
    return "yes"


def to_paddle(bench: Bench) -> str:
    """PaddleNLP's ``model_state.pdparams``, with names and transposes of its own.

    Some families are Llama's there: they come back as such, with the same answers.
    """
    there, back = bench.folder / "paddle", bench.folder / "paddle_back"
    try:
        paddle_family(bench.row.config)
    except OarsmithError as error:
        raise NotApplicable("PaddleNLP has no such models, or none whose layout is known here") from error
    try:
        convert_directory(bench.path, there, "pdparams")
    except OarsmithError as error:
        if "PaddleNLP" not in error.what:
            raise
        raise NotApplicable(error.what.split(",")[0]) from error
    convert_directory(there, back, "hf")
    exact = not changes_values(bench.row.config, "pdparams", None)
    if exact and families.find(read_config(back)) is families.find(bench.row.config):
        same_files(back, bench.path)
    same_answers(bench, back, bench.path)
    return "yes"


def to_gguf(bench: Bench) -> str:
    """A float32 GGUF file with a tokenizer, and a model directory made of it: it answers as the first one does."""
    config = {**bench.row.config, **bench.row.gguf}
    config["padded_vocab_size" if "padded_vocab_size" in config else "vocab_size"] = VOCAB_SIZE
    try:
        family_of_config(Config(config, where="config.json"))
    except OarsmithError as error:
        raise NotApplicable(error.what.split(";")[0]) from error
    source, file, back = bench.write("gguf_source", config), bench.folder / "model.gguf", bench.folder / "gguf_back"
    for path in (FIXTURES / "tokenizers" / "qwen25_bpe_json").glob("tokenizer*"):
        shutil.copy(path, source)
    write_gguf(source, file, type="f32")
    convert_gguf(file, back, "auto", lambda done, total: None)
    same_answers(bench, back, source)
    return "yes"


def same_answers(bench: Bench, found: Path, expected: Path) -> None:
    documents = [bench.document(40, 5)]
    ours, theirs = (packed_logits(load_decoder(path).eval(), documents)[0] for path in (found, expected))
    close(ours, theirs, 1e-4)
