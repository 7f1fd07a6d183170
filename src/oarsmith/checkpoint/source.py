"""The tensors of a Hugging Face directory, read one at a time."""

from __future__ import annotations

import json
from contextlib import ExitStack
from io import FileIO
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from oarsmith.checkpoint.safetensors_stream import SAFETENSORS_DTYPES, StoredTensor, check_safetensors
from oarsmith.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_TORCH = {code: dtype for dtype, code in SAFETENSORS_DTYPES.items()}


class TensorSource:
    """Names, shapes and lazy contents of ``model.safetensors`` or its shards. A context manager.

    Every file is checked before a tensor is trusted (header, ranges, length). Tensors are read, not mapped: the pages
    of a mapping count as this process's memory until it is closed, so that a model would be held twice while loading.

    Raises:
        CheckpointError: no weights in the directory, a missing or damaged shard, an index that points outside.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self._stored: dict[str, tuple[Path, StoredTensor]] = {}
        self._stack = ExitStack()
        self._open: dict[Path, FileIO] = {}
        for path in self._files():
            for name, info in check_safetensors(path).items():
                self.shapes[name], self.dtypes[name], self._stored[name] = info.shape, info.dtype, (path, info)

    def __enter__(self) -> TensorSource:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._open.clear()
        self._stack.close()

    def read(self, name: str) -> Tensor:
        """The tensor, in memory of its own.

        Raises:
            CheckpointError: a dtype that PyTorch does not have, or the file has become shorter.
        """
        path, stored = self._stored[name]
        if stored.dtype not in _TORCH:
            raise CheckpointError(f"dtype {stored.dtype} cannot be read", where=f"{path}: {name}")
        if path not in self._open:
            self._open[path] = self._stack.enter_context(path.open("rb", buffering=0))
        file, data = self._open[path], torch.empty(stored.end - stored.start, dtype=torch.uint8)
        file.seek(stored.start)
        done, view = 0, data.numpy().data
        while done < len(view):  # one call reads 2 GB at most
            count = file.readinto(view[done:])
            if not count:
                raise CheckpointError("the file ends early", where=f"{path}: {name}", fix="copy the file again")
            done += count
        return data.view(_TORCH[stored.dtype]).reshape(stored.shape)

    def stored_dtype(self) -> torch.dtype:
        """The widest floating dtype among the tensors."""
        order = {"F64": torch.float32, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
        present = set(self.dtypes.values())
        return next((dtype for code, dtype in order.items() if code in present), torch.float32)

    def _files(self) -> list[Path]:
        index = self.directory / INDEX
        if index.exists():
            return self._shards(index)
        if (self.directory / SINGLE).exists():
            return [self.directory / SINGLE]
        present = sorted(p.name for p in self.directory.iterdir())[:12] if self.directory.is_dir() else []
        ggufs = [name for name in present if name.endswith(".gguf")]
        raise CheckpointError(
            f"no {SINGLE} in the directory; it holds {', '.join(present) or 'nothing'}",
            where=str(self.directory),
            fix=f"oarsmith convert {self.directory / ggufs[0]} OUT" if ggufs else "check the path",
        )

    def _shards(self, index: Path) -> list[Path]:
        try:
            names = set(json.loads(index.read_text())["weight_map"].values())
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise CheckpointError(f"damaged index: {error}", where=str(index), fix="copy the file again") from error
        for name in names:
            if not isinstance(name, str) or Path(name).name != name:
                raise CheckpointError(f"the index points outside the directory: {name!r}", where=str(index))
        missing = sorted(name for name in names if not (self.directory / name).exists())
        if missing:
            raise CheckpointError(
                f"{len(missing)} of {len(names)} shards are missing: {', '.join(missing[:4])}",
                where=str(self.directory),
                fix="copy the missing files beside the index",
            )
        return [self.directory / name for name in sorted(names)]
