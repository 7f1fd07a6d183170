"""Peak memory of ``oarsmith convert`` on a model of about a gigabyte, in every direction.

A random Llama is written once; then each conversion runs in a process of its own, whose largest resident set is read
from /proc. The same command on a tiny model shows how much of that is the libraries.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from oarsmith.checkpoint.fill import file_infos
from oarsmith.checkpoint.safetensors_stream import ShardedSafetensorsWriter
from oarsmith.checkpoint.source import open_source
from oarsmith.models import families

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
SMALL = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4}


def write_model(folder: Path, **changes: Any) -> int:
    """A random model, one tensor in memory at a time; its bytes."""
    config = {**LLAMA, **changes}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    family, spec = families.build_spec(config)
    infos = file_infos(spec, config, family.names(spec), torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    with ShardedSafetensorsWriter(folder, infos) as writer:
        for name, info in infos.items():
            values = torch.empty(info.shape, dtype=torch.float32).normal_(0, 0.02, generator=generator)
            writer.write(name, values.to(info.dtype))
    return sum(info.num_bytes for info in infos.values())


# The kernel starts a child's ru_maxrss at its parent's size; VmHWM belongs to the new program alone.
CHILD = """
import sys
from oarsmith import cli
code = cli.main(sys.argv[1:])
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(f"peak {peak}")
sys.exit(code)
"""


TARGETS = {
    "bin": ["--to", "bin"],
    "paddle": ["--to", "paddle"],
    "pdparams": ["--to", "paddle", "--paddle_layout", "pdparams"],
    "hf": ["--to", "hf"],
    "gguf": ["--to", "gguf", "--with_tokenizer", "false"],
}


def convert(src: Path, dst: Path, *options: str) -> tuple[float, float]:
    """Peak resident memory (MB) and seconds of one conversion."""
    start = time.perf_counter()
    command = [sys.executable, "-c", CHILD, "convert", str(src), str(dst), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[2:])}\n{done.stdout}{done.stderr}")
    return int(done.stdout.split()[-1]) * 1024 / 1e6, time.perf_counter() - start


def same_tensors(a: Path, b: Path) -> bool:
    """Bit for bit, whatever their order in the file."""
    with open_source(a) as ours, open_source(b) as theirs:
        return ours.dtypes == theirs.dtypes and all(torch.equal(ours.read(n), theirs.read(n)) for n in ours.dtypes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=36, help="36 layers are 1.05 GB")
    parser.add_argument("--folder", type=Path, help="where to work; needs about 8 GB (default: a temporary folder)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        root = Path(name)
        size = write_model(root / "model", num_hidden_layers=options.layers)
        write_model(root / "small", num_hidden_layers=1, vocab_size=1000, **SMALL)
        floor, _ = convert(root / "small", root / "small-bin", "--to", "bin")
        print(
            f"model {size / 1e6:,.0f} MB, largest tensor {32000 * 1024 * 2 / 1e6:,.0f} MB; tiny model {floor:,.0f} MB"
        )
        print("| conversion | peak RSS, MB | above the tiny one's, MB | seconds |\n|---|---|---|---|")
        for to, words in TARGETS.items():
            target = root / (f"{to}.gguf" if to == "gguf" else to)
            there, took = convert(root / "model", target, *words)
            print(f"| safetensors to {to} | {there:,.0f} | {there - floor:,.0f} | {took:.1f} |")
            back, took = convert(target, root / "back")
            print(f"| {to} to safetensors | {back:,.0f} | {back - floor:,.0f} | {took:.1f} |", flush=True)
            if not same_tensors(root / "model", root / "back"):
                raise RuntimeError(f"{to}: the round trip changed a tensor")
            shutil.rmtree(root / "back")
            if target.is_dir():
                shutil.rmtree(target)
            else:
                target.unlink()


if __name__ == "__main__":
    main()
