"""An inference request over HTTP: JSON, with the tensors in it or as bytes behind it."""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import Request

from oarsmith.serve.errors import ApiError, invalid
from oarsmith.serve.kserve import card
from oarsmith.serve.kserve.native import NativeRequest, first_mistake, parse, parse_text
from oarsmith.serve.kserve.replies import Reply, as_json
from oarsmith.serve.kserve.tensors import OUTPUT, check_input, check_output, pack_text, unpack_text
from oarsmith.serve.kserve.terms import Terms, read_terms, under_terms

HEADER_LENGTH = "Inference-Header-Content-Length"
MAX_BODY_BYTES = 16 << 20
# zlib's numbers for what HTTP calls gzip and deflate.
_ENCODINGS = {"gzip": 31, "deflate": 15}


class _InputParameters(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    binary_data_size: Annotated[int, Field(ge=0)] | None = None


class _Input(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    name: str
    datatype: str
    shape: list[int]
    parameters: _InputParameters = _InputParameters()
    data: list[Any] | None = None


class _OutputParameters(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    binary_data: bool | None = None


class _Output(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    name: str
    parameters: _OutputParameters = _OutputParameters()


class Header(BaseModel):
    """The JSON of a request."""

    model_config = ConfigDict(extra="forbid", strict=True)

    id: str = ""
    parameters: dict[str, Any] = {}
    inputs: Annotated[list[_Input], Field(min_length=1, max_length=1)]
    outputs: Annotated[list[_Output], Field(max_length=1)] = []


@dataclass(frozen=True)
class Infer:
    """A request in its tensor.

    Attributes:
        binary: whether the output is to come as bytes behind the JSON.
    """

    native: NativeRequest
    terms: Terms
    id: str
    binary: bool

    @classmethod
    def read(cls, data: bytes, header_length: str | None) -> Infer:
        """The request in a body.

        Args:
            header_length: bytes of the JSON, where tensors follow it.

        Raises:
            ApiError: the body is none.
        """
        size = _header_size(data, header_length)
        try:
            header = Header.model_validate(parse_text(data[:size]))
        except ValidationError as error:
            raise first_mistake(error) from error
        terms = read_terms(header.parameters)
        binary = terms.binary_data_output
        for output in header.outputs:
            check_output(output.name)
            binary = binary if output.parameters.binary_data is None else output.parameters.binary_data
        tensor = header.inputs[0]
        check_input(tensor.name, tensor.datatype, tensor.shape)
        request = parse(parse_text(_element(tensor, data[size:])))
        return cls(under_terms(request, terms, header.id), terms, header.id, binary)

    def answer(self, model: str, reply: Reply) -> tuple[bytes, dict[str, str]]:
        """Body and headers of the answer."""
        text = as_json_list(reply)
        output: dict[str, Any] = {"name": OUTPUT, "datatype": "BYTES", "shape": [1]}
        behind = b""
        if self.binary:
            behind = pack_text(text)
            output["parameters"] = {"binary_data_size": len(behind)}
        else:
            output["data"] = [text]
        named = {"id": self.id} if self.id else {}
        answer = {**named, "model_name": model, "model_version": card.VERSION, "outputs": [output]}
        header = json.dumps(answer).encode()
        if not self.binary:
            return header, {"Content-Type": "application/json"}
        return header + behind, {"Content-Type": "application/octet-stream", HEADER_LENGTH: str(len(header))}


def as_json_list(reply: Reply) -> str:
    """A reply as the suite's model puts it into its tensor: a list of one."""
    return f"[{as_json(reply)}]"


def _header_size(data: bytes, header_length: str | None) -> int:
    if header_length is None:
        return len(data)
    if not (header_length.isascii() and header_length.isdigit()) or int(header_length[:20]) > len(data):
        raise invalid(f"{HEADER_LENGTH} is {header_length[:40]!r}; the body has {len(data)} bytes")
    return int(header_length)


def _element(tensor: _Input, behind: bytes) -> str:
    """The text in a tensor of one element."""
    size = tensor.parameters.binary_data_size
    if size is not None:
        if tensor.data is not None:
            raise invalid(f"{tensor.name} has both data and binary_data_size", "inputs")
        if size != len(behind):
            raise invalid(
                f"{tensor.name}: binary_data_size is {size}, and {len(behind)} bytes follow the JSON", "inputs"
            )
        return unpack_text(behind)
    if behind:
        raise invalid(f"{len(behind)} bytes follow the JSON, and no tensor has a binary_data_size", "inputs")
    value: Any = tensor.data
    for _ in tensor.shape:
        # Nested as its shape says, or flat.
        if isinstance(value, list) and len(value) == 1:
            value = value[0]
    if not isinstance(value, str):
        raise invalid(f"{tensor.name}: data must hold one text", "inputs")
    return value


async def read_body(request: Request) -> bytes:
    """The body, unpacked where it was packed.

    Raises:
        ApiError: it is packed in a way that is not known, or too long.
    """
    data = await request.body()
    encoding = request.headers.get("Content-Encoding", "identity").lower()
    if encoding == "identity":
        return data
    if encoding not in _ENCODINGS:
        raise ApiError(415, f"Content-Encoding {encoding[:40]!r} is not known; use gzip or deflate")
    unpacker = zlib.decompressobj(_ENCODINGS[encoding])
    try:
        unpacked = unpacker.decompress(data, MAX_BODY_BYTES)
    except zlib.error as error:
        raise invalid(f"the body is no {encoding} data") from error
    if unpacker.unconsumed_tail:
        raise ApiError(413, f"the body has more than {MAX_BODY_BYTES} bytes when unpacked")
    if not unpacker.eof:
        raise invalid(f"the {encoding} data of the body ends early")
    return unpacked
