"""Functions run by several processes at once: one that imports everything, then forks the ranks.

``python processes.py N MODULE FUNCTION JSON`` calls ``FUNCTION(**JSON)`` in each of N ranks. A failing rank ends all.
"""

from __future__ import annotations

import importlib
import json
import os
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]
DEADLINE_S = 240


def run_ranks(count: int, function: str, **arguments: Any) -> str:
    """``module:function`` of the tests in ``count`` ranks; what they print.

    Raises:
        AssertionError: a rank failed, with its output.
    """
    module, _, name = function.partition(":")
    paths = [str(TESTS), str(TESTS.parent / "src"), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, __file__, str(count), module, name, json.dumps(arguments)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=DEADLINE_S + 60,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-6000:]
    return done.stdout


def _main() -> int:
    count, module, name, arguments = int(sys.argv[1]), sys.argv[2], sys.argv[3], json.loads(sys.argv[4])
    import torch
    import torch.distributed.fsdp
    import torch.distributed.tensor

    torch.set_num_threads(1)
    function = vars(importlib.import_module(module))[name]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = {}
    for rank in range(count):
        pid = os.fork()
        if pid == 0:
            _rank(rank, count, port, function, arguments)
        children[pid] = rank
    return _wait(children)


def _rank(rank: int, count: int, port: int, function: Any, arguments: dict[str, Any]) -> None:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()})
    status = 0
    try:
        function(**arguments)
    except BaseException:  # noqa: BLE001 - whatever it is, it is shown, and ends the others
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _wait(children: dict[int, int]) -> int:
    left, begin, status = set(children), time.monotonic(), 0
    while left and status == 0:
        pid, code = os.waitpid(-1, os.WNOHANG)
        if pid:
            left.discard(pid)
            status = os.waitstatus_to_exitcode(code)
        elif time.monotonic() - begin > DEADLINE_S:
            status = 124
        else:
            time.sleep(0.02)
    if status:
        time.sleep(0.5)  # others may have something to say
    for pid in left:
        os.kill(pid, 9)
        os.waitpid(pid, 0)
    return 1 if status else 0


if __name__ == "__main__":
    sys.exit(_main())
