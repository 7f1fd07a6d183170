"""``oarsmith serve`` as a process."""

import os
import re
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import oarsmith

SOURCES = str(Path(oarsmith.__file__).parents[1])
SLOWLY = """
# the command with an engine slow enough to be looked at while it works, and that breaks when the test says so
import os, sys, time
from oarsmith.engine import Engine
step = Engine.step
def slow(engine):
    time.sleep(0.01)
    if os.path.exists(os.environ["BREAK"]):
        raise RuntimeError("a bug of the engine")
    return step(engine)
Engine.step = slow
from oarsmith.cli import main
sys.exit(main(sys.argv[1:]))
"""


@contextmanager
def server_process(*words, slowly=False, breaking="/never/there"):
    environment = {**os.environ, "PYTHONPATH": SOURCES, "OMP_NUM_THREADS": "1", "BREAK": str(breaking)}
    command = [
        sys.executable,
        *(("-c", SLOWLY) if slowly else ("-m", "oarsmith")),
        "serve",
        *map(str, words),
        "--port",
        "0",
        "--num_threads",
        "1",
    ]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    lines = []
    found = threading.Event()

    def read():
        for line in server.stderr:
            lines.append(line)
            if "listening on" in line:
                found.set()
        found.set()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        assert found.wait(90), lines
        address = re.search(r"listening on (\S+)", "".join(lines))
        assert address is not None, lines
        yield server, address.group(1).rstrip(","), lines
    finally:
        server.kill()
        server.wait()
        reader.join(10)
