"""The zip container of PyTorch files: where its members lie. Nothing is unpacked, so nothing can be a bomb.

``torch.save`` stores members uncompressed: ``NAME/data.pkl`` and ``NAME/data/KEY`` for each storage.
"""

from __future__ import annotations

import struct
import zipfile
import zlib
from pathlib import Path

from oarsmith.checkpoint.files import REFETCH
from oarsmith.checkpoint.pickles import FileBytes
from oarsmith.errors import CheckpointError

_LOCAL_HEADER = struct.Struct("<4s5H3I2H")
_MAX_MEMBERS = 1_000_000


def is_zip(path: Path) -> bool:
    """By its first bytes; ``zipfile.is_zipfile`` would search the whole tail."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def zip_members(path: Path) -> dict[str, FileBytes]:
    """Name without the archive's own folder (``data.pkl``, ``data/0``) -> byte range in the file.

    Raises:
        CheckpointError: not a zip file, compressed or encrypted members, two of one name, ranges that overlap.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
    except (zipfile.BadZipFile, zlib.error, struct.error, ValueError, NotImplementedError, EOFError, OSError) as error:
        raise CheckpointError(f"damaged zip file: {error}", where=str(path), fix=REFETCH) from error
    if not infos or len(infos) > _MAX_MEMBERS:
        raise CheckpointError(f"a zip file of {len(infos):,} members", where=str(path))
    found: dict[str, FileBytes] = {}
    size = path.stat().st_size
    with path.open("rb") as file:
        for info in infos:
            name = info.filename.partition("/")[2] or info.filename
            if name in found:
                raise CheckpointError("the zip file has two members of this name", where=f"{path}: {name}")
            if info.flag_bits & 1 or info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
                raise CheckpointError(
                    f"a compressed or encrypted member ({info.compress_size:,} bytes that claim to become "
                    f"{info.file_size:,}); PyTorch writes plain ones",
                    where=f"{path}: {name}",
                    fix="load and save it again with PyTorch, if you trust it",
                )
            if info.header_offset < 0 or info.header_offset > size - _LOCAL_HEADER.size:
                raise CheckpointError("damaged zip file: a member lies outside", where=f"{path}: {name}", fix=REFETCH)
            file.seek(info.header_offset)
            header = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
            start = info.header_offset + _LOCAL_HEADER.size + header[9] + header[10]
            if header[0] != b"PK\x03\x04" or start + info.file_size > size:
                raise CheckpointError("damaged zip file: a member lies outside", where=f"{path}: {name}", fix=REFETCH)
            found[name] = FileBytes(start, info.file_size)
    _check_overlap(path, found)
    return found


def _check_overlap(path: Path, members: dict[str, FileBytes]) -> None:
    end = 0
    for name, part in sorted(members.items(), key=lambda item: (item[1].start, item[1].length)):
        if part.start < end:
            raise CheckpointError("its data overlaps another member's", where=f"{path}: {name}", fix=REFETCH)
        end = part.start + part.length
