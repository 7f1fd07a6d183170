"""Adapters that requests may name. No PyTorch here; it comes with the bank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from oarsmith.engine.desk import Desk
from oarsmith.errors import ConfigError
from oarsmith.model_path import adapter_directory, resolve

if TYPE_CHECKING:
    from oarsmith.adapters.bank import AdapterBank


AdapterSource = str | Path | Sequence[tuple[str | Path, float]]
"""An adapter, or several with a weight each, which act as one."""


class Adapters:
    """An engine's adapters.

    Args:
        model: the base's path, which adapters have to be trained on if they tell; None: they need not.

    Attributes:
        bank: None as long as nobody asked for any.
    """

    def __init__(self, desk: Desk, model: str | Path | None) -> None:
        self.bank: AdapterBank | None = None
        self._desk = desk
        self._model = model

    def add(self, name: str, path: AdapterSource, make_bank: Callable[[], AdapterBank]) -> bool:
        """Take an adapter; whether it is the first, so that something else has to compute from now on.

        Raises:
            OarsmithError: the name is taken, the adapter cannot be read or does not fit the model, or it is the first
                one and requests are open.
        """
        parts = [(path, 1.0)] if isinstance(path, (str, Path)) else list(path)
        folders = [(adapter_directory(Path(part)), weight) for part, weight in parts]
        if self._model is not None:
            from oarsmith.adapters.peft_layout import require_base

            for folder, _ in folders:
                require_base(folder, resolve(self._model).base)
        first = self.bank is None
        if self.bank is None:
            if self._desk.busy:
                what = "the first adapter came while requests are open"
                raise ConfigError(what, where="adapters", fix="make the engine with adapters={}, or wait for them")
            self.bank = make_bank()
        self.bank.add(name, folders)
        return first

    def remove(self, name: str) -> None:
        """Forget an adapter.

        Raises:
            ConfigError: there is none of this name, or a request that is not finished goes through it.
        """
        if self._desk.uses(name):
            raise ConfigError(f"a request goes through the adapter {name!r}", where="adapter", fix="wait for its end")
        self._known(name).remove(name)

    def salt(self, name: str | None) -> bytes:
        """What tells the keys under an adapter from others, also from those under earlier ones of its name.

        Raises:
            ConfigError: there is none of this name.
        """
        return b"" if name is None else f"{name} {self._known(name).version(name)}".encode()

    def _known(self, name: str) -> AdapterBank:
        if self.bank is None:
            raise ConfigError(f"there is no adapter {name!r}", where="adapter", fix="add it first (add_adapter)")
        return self.bank
