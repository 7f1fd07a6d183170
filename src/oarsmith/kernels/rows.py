"""Numbers of rows for matrix products."""

from __future__ import annotations

# Batches of whole documents have a new number of tokens each. For every new shape oneDNN writes new code: 3 ms and a
# third of a MB a product, kept for the next 1,024 shapes. It cost 5 to 9 % of a LoRA step and 20 MB a step.
ROW_MULTIPLE = 64


def rows_to_add(num_rows: int) -> int:
    """How many rows nobody reads make ``num_rows`` one of few numbers."""
    return -num_rows % ROW_MULTIPLE
