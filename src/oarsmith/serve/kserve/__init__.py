"""KServe's protocol, version 2, with Triton's extensions; requests are those of PaddleNLP's server."""

from __future__ import annotations

from importlib.util import find_spec

from oarsmith.errors import MissingExtraError


def require_grpc() -> None:
    """Whether the gRPC server can be imported; to be asked before a model is loaded.

    Raises:
        MissingExtraError: its packages are not installed.
    """
    for package, module in (("grpcio", "grpc"), ("protobuf", "google.protobuf")):
        # A package within another is looked for by importing the other.
        outer = module.partition(".")[0]
        if find_spec(outer) is None or find_spec(module) is None:
            raise MissingExtraError(package, "grpc", "grpc_port")
