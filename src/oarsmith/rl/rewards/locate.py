"""Functions that a user names: ``file.py:function`` or ``package.module:function``."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any

from oarsmith.errors import ConfigError


def find_function(name: str) -> Callable[..., Any]:
    """The function of that name. The file's directory is put at the end of ``sys.path``, for what it imports.

    Raises:
        ConfigError: no such file, module or function, or it fails while it is imported.
    """
    source, colon, attribute = name.rpartition(":")
    if not colon or not source or not attribute:
        raise ConfigError(f"'{name}' names no function", fix="write file.py:function or package.module:function")
    module = _from_file(source) if source.endswith(".py") else _from_name(source)
    found: Any = module
    for part in attribute.split("."):
        members = vars(found) if isinstance(found, ModuleType | type) else {}
        if part not in members:
            near = get_close_matches(part, [key for key in members if not key.startswith("_")], n=1)
            fix = f"did you mean '{near[0]}'?" if near else f"define a function '{attribute}' there"
            raise ConfigError(f"there is no '{attribute}' in {source}", where=name, fix=fix)
        found = members[part].__func__ if isinstance(members[part], staticmethod) else members[part]
    if not callable(found):
        raise ConfigError(f"'{attribute}' is a {type(found).__name__}, no function", where=name, fix="name a function")
    return found


def _from_file(source: str) -> ModuleType:
    path = Path(source).expanduser().resolve()
    if not path.is_file():
        raise ConfigError("there is no such file", where=source, fix="name an existing file.py:function")
    name = f"oarsmith_user_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    sys.modules[name] = module  # dataclasses and pickle look for it there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise _failed(source, error) from error
    return module


def _from_name(source: str) -> ModuleType:
    try:
        return importlib.import_module(source)
    except Exception as error:
        raise _failed(source, error) from error


def _failed(source: str, error: Exception) -> ConfigError:
    what = f"{source} cannot be imported: {type(error).__name__}: {error}"
    return ConfigError(what, where=line_of(error) or source, fix="make it importable by itself: python -c 'import ...'")


def line_of(error: BaseException) -> str | None:
    """file:line that raised an error; None: it was not raised."""
    line = error.__traceback__
    while line is not None and line.tb_next is not None:
        line = line.tb_next
    return None if line is None else f"{line.tb_frame.f_code.co_filename}:{line.tb_lineno}"
