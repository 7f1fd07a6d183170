"""How fast training is: tokens per second, and the share of the machine's matrix product rate in use.

MFU is that of PaLM (Chowdhery et al. 2022, appendix B): FLOPs the mathematics needs (``models/count.py``) by time, over
the rate. The rate is measured, not read off a data sheet: that of a CPU depends on its threads, clock and neighbours.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch

from oarsmith.atomic import atomic_write_text
from oarsmith.compiling import cache_directory
from oarsmith.data.batch import Batch
from oarsmith.models import visibility
from oarsmith.models.count import FlopCounter, Pairs, visible_pairs
from oarsmith.models.decoder import Decoder
from oarsmith.models.layout import Layout, Span
from oarsmith.models.spec import DecoderSpec, linear_specs
from oarsmith.training.environment import cpu_model
from oarsmith.training.log import peak_memory_mb

# On a busy machine products take several times as long, so the best rate of a day counts; a run that starts within
# minutes of another does not measure again.
_EXPIRES_AFTER = 24 * 3600.0
_MEASURED_LATELY = 600.0
_RATES_FILE = "matmul_rates.json"
# Short trials, and many: one of them is likely to have the cores for itself.
_SECONDS_PER_TRIAL = 0.005
_TRIALS = 12
_MAX_TOKENS = 2048
_MAX_SHAPES = 3

Shape = tuple[int, int, int]
"""[tokens, in] x [in, out]."""


def mfu(flops: float, seconds: float, rate: float) -> float:
    """Share of ``rate`` (FLOP/s) that ``flops`` in ``seconds`` are."""
    return flops / max(seconds, 1e-9) / rate


def matmul_rate(model: Decoder, num_tokens: int, *, now: Callable[[], float] = time.time) -> float:
    """FLOP/s of matrix products in the model's number format at its own shapes, for passes of ``num_tokens`` tokens.

    The best shape counts, each at the best of several trials of a few milliseconds, and the best run of the last day:
    what else the machine does can only make it slower. Rates are kept by processor, PyTorch, threads, number format and
    shapes.
    """
    dtype, device = model.embedding.weight.dtype, model.device
    shapes = matmul_shapes(model.spec, num_tokens)
    processor = cpu_model() if device.type == "cpu" else torch.cuda.get_device_name(device)
    threads = torch.get_num_threads() if device.type == "cpu" else 0
    parts = (processor, platform.node(), torch.__version__, f"{threads} threads", str(dtype), str(shapes))
    key, path, moment = "; ".join(parts), cache_directory() / _RATES_FILE, now()
    kept = _read_rates(path.read_text(encoding="utf-8")) if path.is_file() else {}
    kept = {name: entry for name, entry in kept.items() if 0 <= moment - entry["measured_at"] < _EXPIRES_AFTER}
    best = kept.get(key)
    if best is not None and 0 <= moment - best["tried_at"] < _MEASURED_LATELY:
        return best["rate"]
    rate, measured_at = max(_measure(shape, dtype, device) for shape in shapes), moment
    if best is not None and best["rate"] > rate:
        rate, measured_at = best["rate"], best["measured_at"]
    kept[key] = {"rate": rate, "measured_at": measured_at, "tried_at": moment}
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(path, json.dumps(kept, indent=1) + "\n")
    return rate


def matmul_shapes(spec: DecoderSpec, num_tokens: int) -> tuple[Shape, ...]:
    """The products of the layers that cost most, for up to 2,048 tokens at a time."""
    num_tokens = max(1, min(num_tokens, _MAX_TOKENS))
    found = {(num_tokens, linear.in_features, linear.out_features) for _, linear in linear_specs(spec)}
    return tuple(sorted(found, key=lambda shape: (-shape[1] * shape[2], shape))[:_MAX_SHAPES])


def _measure(shape: Shape, dtype: torch.dtype, device: torch.device) -> float:
    tokens, inputs, outputs = shape
    x = torch.randn(tokens, inputs, device=device).to(dtype)
    weight_t = torch.randn(outputs, inputs, device=device).to(dtype).t()
    y = torch.empty(tokens, outputs, dtype=dtype, device=device)
    wait: Callable[[], None] = torch.cuda.synchronize if device.type == "cuda" else _nothing_to_wait_for
    torch.mm(x, weight_t, out=y)
    best = 0.0
    for _ in range(_TRIALS):
        wait()
        start, runs = time.perf_counter(), 0
        while runs == 0 or time.perf_counter() - start < _SECONDS_PER_TRIAL:
            torch.mm(x, weight_t, out=y)
            runs += 1
        wait()
        best = max(best, runs / (time.perf_counter() - start))
    return best * 2 * tokens * inputs * outputs


def _nothing_to_wait_for() -> None:
    """A CPU has done its work when a call returns."""


def _read_rates(text: str) -> dict[str, dict[str, float]]:
    """What is kept; a file that is no such thing counts as empty, since it only saves time."""
    try:
        read: Any = json.loads(text)
    except json.JSONDecodeError:
        return {}
    if not isinstance(read, dict):
        return {}
    return {
        key: entry
        for key, entry in read.items()
        if isinstance(entry, dict)
        and all(isinstance(entry.get(name), float) for name in ("rate", "measured_at", "tried_at"))
    }


class SpeedMeter:
    """Tokens per second, MFU and peak memory since the last lap.

    Args:
        rate: FLOP/s of the machine (:func:`matmul_rate`); None: no MFU.
    """

    def __init__(self, model: Decoder, rate: float | None) -> None:
        trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
        self._model, self._rate = model, rate
        self._counter = FlopCounter(model.spec, trained)
        self._tokens, self._flops, self._out = 0, 0.0, 0.0
        self._start = time.perf_counter()

    def add(self, batch: Batch) -> None:
        """Count a micro-batch that is trained on."""
        pairs, head_tokens = self._pairs(batch), int(torch.count_nonzero(batch.weights))
        self._tokens += batch.num_tokens
        self._flops += self._counter.count(pairs, num_tokens=batch.num_tokens, num_head_tokens=head_tokens).total

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out the time inside: evaluations and saves are no training."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._out += time.perf_counter() - start

    def lap(self) -> dict[str, float]:
        """``tokens_per_second``, ``mfu`` (a share; only with a rate) and ``peak_memory_mb`` (of the whole process)."""
        seconds = max(time.perf_counter() - self._start - self._out, 1e-9)
        found = {"tokens_per_second": self._tokens / seconds}
        if self._rate is not None:
            found["mfu"] = mfu(self._flops, seconds, self._rate)
        found["peak_memory_mb"] = peak_memory_mb(self._model.device)
        self._tokens, self._flops, self._out = 0, 0.0, 0.0
        self._start = time.perf_counter()
        return found

    def _pairs(self, batch: Batch) -> Pairs:
        model = self._model
        if model.spec.visibility is None and model.shifted is None:
            spans = [Span(a, b, a, b) for a, b in pairwise(batch.bounds)]
            return lambda window: visible_pairs(spans, window)
        layout = Layout.documents(batch.bounds, batch.positions)
        layout = visibility.apply(model.spec.visibility, batch.input_ids, layout, None, True)
        if model.shifted is None:
            return lambda window: visible_pairs(layout.spans, window)
        halves: Sequence[Sequence[Span]] = model.shifted.apply(layout).halves or ()
        return lambda window: sum(visible_pairs(spans, window) for spans in halves) / len(halves)
