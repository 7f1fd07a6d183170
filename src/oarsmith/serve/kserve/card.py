"""What the protocol tells of the server and its models."""

from __future__ import annotations

from typing import Any

from oarsmith._version import __version__
from oarsmith.serve.errors import invalid
from oarsmith.serve.kserve.native import MODEL_ALIAS
from oarsmith.serve.kserve.tensors import INPUT, OUTPUT
from oarsmith.serve.service import Service

VERSION = "1"
PLATFORM = "oarsmith"
EXTENSIONS = ["binary_tensor_data", "model_configuration", "model_repository", "generate", "parameters"]


def server() -> dict[str, Any]:
    """The server's metadata."""
    return {"name": "oarsmith", "version": __version__, "extensions": EXTENSIONS}


def names(service: Service) -> list[str]:
    """Models by all their names."""
    return list(dict.fromkeys((*service.model_names, MODEL_ALIAS)))


def adapter(service: Service, name: str, version: str = "") -> str | None:
    """The adapter that a model stands for; None: the model itself.

    Raises:
        ApiError: there is no such model or version.
    """
    found = None if name == MODEL_ALIAS else service.adapter_of(name or "?")
    if version not in ("", VERSION):
        raise invalid(f"model {name!r} has no version {version[:100]!r}; it has {VERSION}", status=404)
    return found


def metadata(name: str) -> dict[str, Any]:
    """A model's metadata."""
    return {
        "name": name,
        "versions": [VERSION],
        "platform": PLATFORM,
        "inputs": [{"name": INPUT, "datatype": "BYTES", "shape": [1]}],
        "outputs": [{"name": OUTPUT, "datatype": "BYTES", "shape": [1]}],
    }


def config(name: str) -> dict[str, Any]:
    """A model's configuration as Triton has it; replies are streamed, so it is decoupled."""
    return {
        "name": name,
        "platform": PLATFORM,
        "backend": PLATFORM,
        "max_batch_size": 0,
        "input": [{"name": INPUT, "data_type": "TYPE_STRING", "dims": [1]}],
        "output": [{"name": OUTPUT, "data_type": "TYPE_STRING", "dims": [1]}],
        "model_transaction_policy": {"decoupled": True},
    }


def index(service: Service, *, only_ready: bool = False) -> list[dict[str, Any]]:
    """The models that are there."""
    ready = service.worker.alive
    if only_ready and not ready:
        return []
    state = {"state": "READY", "reason": ""} if ready else {"state": "UNAVAILABLE", "reason": "the engine has stopped"}
    return [{"name": name, "version": VERSION, **state} for name in names(service)]
