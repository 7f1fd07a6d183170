"""Where a job prints. Apart from ``runtime.py``, which imports PyTorch: not every job needs that."""

from __future__ import annotations

from rich.console import Console

from oarsmith import processes


def make_console() -> Console:
    """Text as it is (brackets in paths and answers are no markup), lines left whole in a pipe."""
    return Console(highlight=False, markup=False, soft_wrap=True, quiet=not processes.is_main())
