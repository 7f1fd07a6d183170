"""PaddleNLP's ``.pdparams``: a pickle of {name: numpy array}, read without running it and without reading the arrays.

Protocol 4 writes each array's bytes in one run, so an array is a range of the file. bfloat16 is stored as uint16.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch
from torch import Tensor

from oarsmith.atomic import atomic_file
from oarsmith.checkpoint.files import REFETCH, require_inside
from oarsmith.checkpoint.pickles import FileBytes, PickleMachine, Record, Vocabulary
from oarsmith.checkpoint.ranges import RangeReader
from oarsmith.checkpoint.safetensors_stream import SAFETENSORS_DTYPES, TensorInfo, storable
from oarsmith.checkpoint.tensors import TensorSource
from oarsmith.errors import CheckpointError

NAME_TABLE = "StructuredToParameterName@@"
_BIG_ARRAYS = "UnpackBigParamInfor@@"
_TYPES = {
    "f8": torch.float64,
    "f4": torch.float32,
    "f2": torch.float16,
    "u2": torch.bfloat16,
    "i8": torch.int64,
    "i4": torch.int32,
    "i2": torch.int16,
    "i1": torch.int8,
    "u1": torch.uint8,
    "b1": torch.bool,
}
_CODES = {dtype: code for code, dtype in _TYPES.items()}


class _Dtype(Record):
    """``numpy.dtype("f4", False, True)``, whose state says the byte order."""

    def __init__(self, arguments: tuple[object, ...]) -> None:
        code = arguments[0]
        if not isinstance(code, str) or code not in _TYPES:
            raise ValueError(f"arrays of type {str(code)[:100]!r}")
        self.dtype = _TYPES[code]

    def set_state(self, state: object) -> None:
        if not isinstance(state, tuple) or len(state) < 2 or state[1] not in ("<", "|", "="):
            raise ValueError("an array of another byte order or with fields")


class Array(Record):
    """A numpy array that stays in the file."""

    def __init__(self) -> None:
        self.shape: tuple[int, ...] = ()
        self.dtype: torch.dtype | None = None
        self.data = FileBytes(0, 0)
        self.by_columns = False

    def set_state(self, state: object) -> None:
        """``(version, shape, dtype, is Fortran order, bytes)``."""
        if not isinstance(state, tuple) or len(state) != 5:
            raise ValueError("an array with an unknown state")
        _, shape, dtype, by_columns, data = state
        self._fill(shape, dtype, bool(by_columns), data)

    def _fill(self, shape: object, dtype: object, by_columns: bool, data: object) -> None:
        if not isinstance(shape, tuple) or not all(type(n) is int and n >= 0 for n in shape) or not storable(shape):
            raise ValueError(f"an array of shape {str(shape)[:100]}")
        if not isinstance(dtype, _Dtype) or not isinstance(data, FileBytes):
            raise ValueError("an array whose bytes are not stored as bytes")
        if data.length != math.prod(shape) * dtype.dtype.itemsize:
            raise ValueError(f"an array of shape {shape} has {data.length:,} bytes")
        self.shape, self.dtype, self.by_columns, self.data = shape, dtype.dtype, by_columns, data

    @staticmethod
    def from_buffer(arguments: tuple[object, ...]) -> Array:
        """``numpy.core.numeric._frombuffer(bytes, dtype, shape, order)``: protocol 5."""
        data, dtype, shape, order = arguments
        array = Array()
        array._fill(shape, dtype, order == "F", data)
        return array


def _named(arguments: tuple[object, ...]) -> object:
    """Paddle's tensors: ``tuple((internal name, array))``."""
    (value,) = arguments
    if not isinstance(value, tuple) or len(value) != 2 or not isinstance(value[1], Array):
        raise ValueError("a tuple of something else than a name and an array")
    return value[1]


def _old_protocol(arguments: tuple[object, ...]) -> object:
    raise ValueError("bytes of pickle protocol 2: save it again with paddle.save(..., protocol=4)")


_CALLS = {
    **{f"numpy.{core}.multiarray _reconstruct": lambda arguments: Array() for core in ("core", "_core")},
    **{f"numpy.{core}.numeric _frombuffer": Array.from_buffer for core in ("core", "_core")},
    "numpy dtype": _Dtype,
    "collections OrderedDict": lambda arguments: {},
    "builtins tuple": _named,
    "_codecs encode": _old_protocol,
}
_VOCABULARY = Vocabulary(calls=_CALLS, values={"numpy ndarray": "ndarray"})


def read_pdparams(path: Path) -> dict[str, Array]:
    """The arrays of one file by name, their contents left where they are.

    Raises:
        CheckpointError: a damaged file, or a pickle that asks for anything but arrays.
    """
    if not path.is_file():
        raise CheckpointError("no such file", where=str(path), fix="check the path")
    with path.open("rb") as file:
        value = PickleMachine(file, 0, path.stat().st_size, where=path, vocabulary=_VOCABULARY).load()
    if not isinstance(value, dict) or not value:
        raise CheckpointError("holds no dictionary of arrays", where=str(path))
    if _BIG_ARRAYS in value:
        raise CheckpointError(
            "arrays cut into slices by pickle protocol 2", where=str(path), fix="save it again with protocol 4"
        )
    arrays: dict[str, Array] = {}
    for name, array in value.items():
        if name == NAME_TABLE:
            continue
        if not isinstance(name, str) or not isinstance(array, Array) or array.dtype is None:
            raise CheckpointError(
                f"entry {str(name)[:100]!r} is a {type(array).__name__}, not an array", where=str(path)
            )
        arrays[name] = array
    return arrays


class PdparamsSource(TensorSource):
    """The arrays of ``.pdparams`` files that together hold one model (or one rank of it), under PaddleNLP's names."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self.shapes, self.dtypes = {}, {}
        self._stored: dict[str, tuple[Path, Array]] = {}
        self._reader = RangeReader()
        for path in paths:
            self.directory = path.parent
            for name, array in read_pdparams(require_inside(path.parent, path)).items():
                if name in self._stored:
                    raise CheckpointError(f"array {name} lies in two files", where=str(path), fix=REFETCH)
                assert array.dtype is not None
                self._stored[name] = path, array
                self.shapes[name], self.dtypes[name] = array.shape, SAFETENSORS_DTYPES[array.dtype]

    def read(self, name: str) -> Tensor:
        path, array = self._stored[name]
        assert array.dtype is not None
        data = self._reader.read(path, array.data.start, array.data.length).view(array.dtype)
        if not array.by_columns:
            return data.reshape(array.shape)
        return data.reshape(tuple(reversed(array.shape))).permute(*reversed(range(len(array.shape)))).contiguous()

    def close(self) -> None:
        self._reader.close()


def _text(value: str) -> bytes:
    data = value.encode("utf-8")
    return b"X" + len(data).to_bytes(4, "little") + data


def _int(value: int) -> bytes:
    data = value.to_bytes((value.bit_length() + 8) // 8, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


class PdparamsWriter:
    """One ``.pdparams`` file, one tensor in memory at a time, in the order declared. A context manager.

    It is what ``paddle.save`` writes of numpy arrays, with the table of names that makes ``paddle.load`` turn them into
    tensors; ``pickle.load`` with numpy reads it too.
    """

    def __init__(self, path: Path, tensors: Mapping[str, TensorInfo]) -> None:
        for name, info in tensors.items():
            if info.dtype not in _CODES:
                raise CheckpointError(f"Paddle's files cannot hold {info.dtype}", where=f"{path}: {name}")
        self._path, self._tensors, self._missing = path, dict(tensors), deque(tensors)
        self._stack = ExitStack()

    def __enter__(self) -> PdparamsWriter:
        with ExitStack() as opening:
            total = sum(info.num_bytes for info in self._tensors.values())
            self._file: BinaryIO = opening.enter_context(atomic_file(self._path, num_bytes=total))
            self._file.write(b"\x80\x04}(")
            self._stack = opening.pop_all()
        return self

    def write(self, name: str, tensor: Tensor) -> None:
        """Write the next declared tensor."""
        assert self._missing and self._missing[0] == name, f"{name} is not the next tensor declared"
        declared = self._tensors[self._missing.popleft()]
        assert (tensor.dtype, tuple(tensor.shape)) == (declared.dtype, declared.shape), f"{name}: {declared}"
        code = _CODES[declared.dtype]
        dtype = b"cnumpy\ndtype\n" + _text(code) + b"\x89\x88\x87R"
        dtype += (
            b"(K\x03"
            + _text("<" if declared.dtype.itemsize > 1 else "|")
            + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        )
        shape = b"(" + b"".join(_int(size) for size in declared.shape) + b"t"
        self._file.write(_text(name) + b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85C\x01btR")
        self._file.write(b"(K\x01" + shape + dtype + b"\x89\x8e" + declared.num_bytes.to_bytes(8, "little"))
        flat = tensor.detach().to("cpu").contiguous().reshape(-1)
        if flat.numel():
            self._file.write(flat.view(torch.uint8).numpy().data)
        self._file.write(b"tb")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None and self._missing:
            error = CheckpointError(f"{len(self._missing)} declared tensors were never written", where=str(self._path))
            self._stack.__exit__(type(error), error, None)
            raise error
        if error is None:
            table = b"".join(_text(name) + _text(name) for name in self._tensors)
            self._file.write(_text(NAME_TABLE) + b"}(" + table + b"uu.")
        self._stack.__exit__(kind, error, traceback)
