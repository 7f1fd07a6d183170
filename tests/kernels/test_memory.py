"""Freed memory is kept for reuse, but not without bound. In processes of their own: the settings last as long."""

import subprocess
import sys

import pytest

from oarsmith.kernels.memory import tensor_memory

CODE = """
from oarsmith.kernels.memory import FreedMemory, keep_freed_memory, resident_mb
keep_freed_memory()
memory = FreedMemory()
assert not memory.look(), "the first look only learns what is usual"
first = resident_mb()
blocks = [bytearray(b"x" * (1 << 20)) for _ in range(400)]
held = blocks[::7]  # what stays lies between what goes
del blocks
kept = resident_mb()
assert kept > first + 390, (first, kept)
assert memory.look()
assert resident_mb() < first + 120, (first, kept, resident_mb())
assert not memory.look()
"""


REUSE = """
import torch
from oarsmith.kernels.memory import keep_freed_memory, resident_mb, tensor_memory
keep_freed_memory()
MB = 1 << 20
x = torch.ones(40 * MB, dtype=torch.uint8)
assert tensor_memory().in_use >= 40 * MB and x.data_ptr() % 64 == 0
where = x.data_ptr()
del x
assert tensor_memory().in_use == 0 and tensor_memory().kept >= 40 * MB
assert torch.empty(39 * MB, dtype=torch.uint8).data_ptr() == where, "a block of nearly the same size"
# Sizes that change from step to step, some of them held: glibc's heap grows, this does not.
for step in range(30):
    held = [torch.ones((8 + step % 3 + i) * MB, dtype=torch.uint8) for i in range(20)]
    big = torch.ones((100 + 7 * step) * MB, dtype=torch.uint8)
    memory = tensor_memory()
    assert memory.in_use + memory.kept <= memory.most + max(memory.most // 16, 32 * MB), memory
    del big
assert resident_mb() < 1.1 * tensor_memory().most / MB + 400
"""

USES = """
import os, threading
import torch
from oarsmith.kernels.memory import keep_freed_memory, tensor_memory
before = torch.ones(1 << 20)
keep_freed_memory()
keep_freed_memory()
del before
assert torch.empty(0).sum() == 0 and torch.zeros(3, 1 << 19).t().contiguous().shape == (1 << 19, 3)
x = torch.arange(1 << 20)
x.resize_(1 << 21)
assert int(x[(1 << 20) - 1]) == (1 << 20) - 1
x = torch.arange(1 << 20)
assert x.numpy().sum() == x.sum() and torch.equal(x.clone(), x)

def work():
    for size in range(1 << 18, 1 << 22, 1 << 17):
        assert float(torch.ones(size).sum()) == size

threads = [threading.Thread(target=work) for _ in range(4)]
[thread.start() for thread in threads]
child = os.fork()
if child == 0:  # no arithmetic: OpenMP's threads are not forked
    held = [torch.empty(size) for size in range(1 << 18, 1 << 22, 1 << 17)]
    del held
    os._exit(0)
[thread.join() for thread in threads]
assert os.waitpid(child, 0)[1] == 0
del x
assert tensor_memory().in_use == 0, tensor_memory()
try:
    torch.empty(1 << 60, dtype=torch.uint8)
except RuntimeError as error:
    assert "not enough memory: you tried to allocate 1152921504606846976 bytes" in str(error), error
else:
    raise AssertionError("an exbibyte")
assert float(torch.ones(1 << 20).sum()) == 1 << 20
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
@pytest.mark.parametrize("code", [CODE, REUSE, USES], ids=["trim", "reuse", "uses"])
def test_freed_memory(code: str) -> None:
    if "tensor_memory()" in code and tensor_memory() is None:
        pytest.skip("no compiler here")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_torch_operations_only_take_the_default_allocator() -> None:
    code = "from oarsmith.kernels.memory import *; import torch\nkeep_freed_memory(compiled=False)\n"
    code += "x = torch.ones(1 << 22)\nassert tensor_memory() is None or tensor_memory().in_use == 0"
    assert subprocess.run([sys.executable, "-c", code], timeout=120, check=False).returncode == 0
