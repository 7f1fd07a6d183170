"""The text that `oarsmith quantize` calibrates on, and the text that it is judged by: never the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from oarsmith.config.quantize import QuantizeConfig
from oarsmith.data.dataset import build_samples
from oarsmith.data.samples import SampleOptions
from oarsmith.data.sources import read_text_file
from oarsmith.errors import ConfigError, DataError
from oarsmith.text import Tokenizer

Documents = list[list[int]]
_TEXT = (".txt", ".text", ".md")


def read_texts(config: QuantizeConfig, tokenizer: Tokenizer, limit: int) -> tuple[Documents, Documents]:
    """Pieces to calibrate on, and windows to judge by.

    Args:
        limit: the model's context, in tokens.

    Raises:
        OarsmithError: a file that cannot be read or is too short, or a length beyond the context.
    """
    for key in ("calibration_length", "proof_length"):
        if getattr(config, key) > limit:
            what = f"{key} {getattr(config, key)} is longer than the model's context of {limit} tokens"
            raise ConfigError(what, where=key, fix=f"set it to at most {limit}")
    wanted = config.proof_samples * config.proof_length
    if config.calibration is None:
        if config.proof_text is None:
            return [], []
        return [], _windows(_stream(config.proof_text, tokenizer, wanted), config.proof_length, config.proof_samples)
    num_calibration = config.calibration_samples * config.calibration_length
    if config.proof_text is not None:
        _require_other(config.calibration, config.proof_text)
        own = _stream(config.calibration, tokenizer, num_calibration)
        proof = _stream(config.proof_text, tokenizer, wanted)
        calibration = _windows(own, config.calibration_length, config.calibration_samples)
        return calibration, _windows(proof, config.proof_length, config.proof_samples)
    # The end of the file is kept from calibration; of a short file a fifth.
    every = _stream(config.calibration, tokenizer, None)
    held = min(wanted, len(every) // 5)
    calibration = _windows(every[: len(every) - held], config.calibration_length, config.calibration_samples)
    return calibration, _windows(every[len(every) - held :], config.proof_length, config.proof_samples)


def _require_other(calibration: str, proof: str) -> None:
    if Path(calibration).resolve() == Path(proof).resolve():
        raise ConfigError(
            "a model that was calibrated on a text cannot be judged by it",
            where="proof_text",
            fix="give another text, or leave proof_text out: then the end of the calibration text is kept for it",
        )


def _stream(source: str, tokenizer: Tokenizer, wanted: int | None) -> list[int]:
    """Tokens of a text, or of rows one after another; at least ``wanted`` where there are so many."""
    if Path(source).suffix.lower() in _TEXT:
        return tokenizer.encode(read_text_file(source), add_special_tokens=False)
    found: list[int] = []
    for ids in _rows(source, tokenizer):
        found += ids
        if wanted is not None and len(found) >= wanted:
            break
    return found


def _rows(source: str, tokenizer: Tokenizer) -> Iterator[list[int]]:
    """Rows as a model reads them, with its chat template."""
    split = "train" if Path(source).is_dir() else None
    samples = build_samples(source, tokenizer, SampleOptions(train_on="all", split=split)).samples
    for sample in samples:
        yield sample.ids.tolist()


def _windows(ids: Sequence[int], length: int, count: int) -> Documents:
    """Up to ``count`` windows one after another; the last may be shorter.

    Raises:
        DataError: there are not even two tokens.
    """
    found = [list(ids[at : at + length]) for at in range(0, min(len(ids), length * count), length)]
    found = [window for window in found if len(window) > 1]
    if not found:
        raise DataError("the text is shorter than two tokens", fix="give a longer one")
    return found
