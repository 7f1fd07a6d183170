"""GPTQ files packed here number by number, as the format's description says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from oarsmith.checkpoint.quantized.gptq import GptqSource
from oarsmith.checkpoint.quantized.unpacked import unpacked
from oarsmith.checkpoint.source import open_source
from oarsmith.checkpoint.tensors import TensorSource
from oarsmith.kernels.coded import decode
from packed_weights import pack

IN, OUT, GROUP = 64, 32, 16


@pytest.fixture(autouse=True)
def _one_thread(few_threads: None) -> None:
    """Tiny weights."""


def made(bits: int, groups_I: Tensor, *, v2: bool, lowest_zero: int = 1) -> tuple[dict[str, Tensor], Tensor]:
    """Random numbers, scales and zeros in a file, and the weight."""
    generator, top = torch.Generator().manual_seed(bits), 1 << bits
    numbers = torch.randint(0, top, (IN, OUT), generator=generator)
    zeros = torch.randint(lowest_zero, top, (IN // GROUP, OUT), generator=generator)
    zeros[0, :5] = lowest_zero
    scales = torch.rand(IN // GROUP, OUT, generator=generator).half() / 50
    stored = pack(zeros.t(), bits).t()
    if not v2:  # one is taken from each number, by one subtraction a word: what is missing is borrowed
        ones = sum(1 << place for place in range(0, 32, bits))
        if 32 % bits == 0:
            stored = (stored.long() - ones).to(torch.int32)
        else:
            stored = pack((zeros - 1).t(), bits).t()
    tensors = {
        "a.qweight": pack(numbers, bits),
        "a.qzeros": stored.contiguous(),
        "a.scales": scales,
        "a.g_idx": groups_I.int(),
    }
    weight = (numbers - zeros[groups_I]).float() * scales[groups_I].float()
    return tensors, weight.t()


def source_of(tensors: dict[str, Tensor], folder: Path, *, v2: bool = False) -> TensorSource:
    save_file(tensors, folder / "model.safetensors")
    config = {"quant_method": "gptq", "group_size": GROUP, "checkpoint_format": "gptq_v2" if v2 else "gptq"}
    return unpacked({"quantization_config": config}, open_source(folder))[1]


IN_ORDER = torch.arange(IN) // GROUP


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("v2", [False, True])
def test_bits_and_both_formats(bits: int, v2: bool, tmp_path: Path) -> None:
    """The first version cannot say a zero of 0 but by borrowing, which 3 bits do not do."""
    lowest = 1 if not v2 and bits == 3 else 0
    tensors, weight = made(bits, IN_ORDER, v2=v2, lowest_zero=lowest)
    with source_of(tensors, tmp_path, v2=v2) as source:
        coded = source.coded("a.weight")
        assert coded is not None and torch.equal(decode(coded, torch.float32), weight)
        assert torch.equal(source.read("a.weight"), weight.half())
        assert isinstance(source, GptqSource)
        assert torch.equal(source.recoded("a.weight", weight), tensors["a.qweight"])
        del tensors["a.g_idx"]
    with source_of(tensors, tmp_path, v2=v2) as source:
        assert torch.equal(source.read("a.weight"), weight.half())


@pytest.mark.parametrize("bits", [4, 8])
def test_act_order(bits: int, tmp_path: Path) -> None:
    """Inputs belong to groups by importance: groups of one size, then of any."""
    generator = torch.Generator().manual_seed(0)
    for groups in (IN_ORDER[torch.randperm(IN, generator=generator)], IN_ORDER.clone().clamp_max(1)):
        tensors, weight = made(bits, groups, v2=False)
        with source_of(tensors, tmp_path) as source:
            assert source.coded("a.weight") is None
            assert torch.equal(source.read("a.weight"), weight.half())
            assert isinstance(source, GptqSource)
            assert torch.equal(source.recoded("a.weight", weight), tensors["a.qweight"])
            target = torch.empty(OUT, IN)
            source.read_into("a.weight", target)
            assert torch.equal(target, weight.half().float())


def test_one_group(tmp_path: Path) -> None:
    """group_size -1."""
    tensors, _ = made(4, torch.zeros(IN, dtype=torch.long), v2=False)
    tensors |= {key: tensors[key][:1].contiguous() for key in ("a.qzeros", "a.scales")}
    save_file(tensors, tmp_path / "model.safetensors")
    config = {"quantization_config": {"quant_method": "gptq", "group_size": -1}}
    with unpacked(config, open_source(tmp_path))[1] as source:
        coded = source.coded("a.weight")
        assert coded is not None and coded.group == IN
