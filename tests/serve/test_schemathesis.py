"""The server's own description, tried out: bodies that it allows and bodies that it does not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from oarsmith.serve import health, openai, scores
from oarsmith.serve.kserve import http as kserve
from oarsmith.serve.service import Limits
from tiny import write_tiny_model

pytestmark = pytest.mark.usefixtures("few_threads")
# A description cannot say that one of two fields is needed, that a text is JSON, or how large the vocabulary is.
NOT_SAYABLE = "positive_data_acceptance"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["writes", "scores"])
def test_every_endpoint(served, chain_model, tmp_path: Path, kind: str) -> None:
    pytest.importorskip("schemathesis")
    routers, limits = [openai.router, kserve.router, health.router], Limits(max_new_tokens=4, max_answers=4)
    model = chain_model("one two three")
    if kind == "scores":
        routers = [scores.router, health.router]
        model = write_tiny_model(tmp_path / "reward", architectures=["LlamaForSequenceClassification"], num_labels=1)
    with served(model, routers=routers, limits=limits) as server:
        command = [str(Path(sys.executable).with_name("schemathesis")), "run", f"{server.url}/openapi.json"]
        command += ["--checks", "all", "--exclude-checks", NOT_SAYABLE, "--max-examples", "10", "--no-color"]
        command += ["--phases", "examples,coverage,fuzzing", "--request-timeout", "30", "--seed", "1"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=500, check=False)
        assert done.returncode == 0, done.stdout[-6000:]
        server.wait_idle()
