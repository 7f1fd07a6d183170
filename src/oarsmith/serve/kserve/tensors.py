"""Triton's tensors of texts: each element its length (4 bytes, little-endian) and its bytes."""

from __future__ import annotations

import struct

from oarsmith.serve.errors import invalid

INPUT = "IN"
OUTPUT = "OUT"


def pack_text(text: str) -> bytes:
    """A tensor with one text."""
    data = text.encode("utf-8")
    return struct.pack("<I", len(data)) + data


def unpack_text(data: bytes) -> str:
    """The text of a tensor with one element.

    Raises:
        ApiError: the bytes are no such tensor.
    """
    if len(data) < 4 or len(data) != 4 + struct.unpack_from("<I", data)[0]:
        raise invalid(
            f"{INPUT}: {len(data)} bytes are no tensor of one BYTES element (4 bytes of length, then the text)"
        )
    return decode(data[4:])


def decode(data: bytes) -> str:
    """Bytes as UTF-8.

    Raises:
        ApiError: they are not.
    """
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise invalid(f"{INPUT}: the text is not UTF-8") from error


def check_input(name: str, datatype: str, shape: list[int]) -> None:
    """Whether a tensor is what the model takes.

    Raises:
        ApiError: it is not.
    """
    if name != INPUT:
        raise invalid(f"there is no input {name[:100]!r}; the model takes {INPUT!r}", "inputs")
    if datatype != "BYTES":
        raise invalid(f"{INPUT} has the datatype {datatype[:100]!r}; it must be BYTES", "inputs")
    if not shape or any(size != 1 for size in shape):
        raise invalid(f"{INPUT} has the shape {shape[:8]}; it must have one element, as [1]", "inputs")


def check_output(name: str) -> None:
    """Whether the model gives a tensor of this name.

    Raises:
        ApiError: it does not.
    """
    if name != OUTPUT:
        raise invalid(f"there is no output {name[:100]!r}; the model gives {OUTPUT!r}", "outputs")
