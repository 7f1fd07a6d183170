"""Where the prefix of a prefix-LM document ends. No PyTorch here."""

from __future__ import annotations

from collections.abc import Sequence

from oarsmith.errors import ModelError
from oarsmith.models.spec import PrefixLM


def find_prefix(rule: PrefixLM, ids: Sequence[int]) -> tuple[int, int]:
    """(length of the prefix, position that tokens after it have).

    Raises:
        ModelError: no start token or no mask token.
    """
    if not ids:
        return 0, 0
    if rule.start_id not in ids:
        raise ModelError(
            f"a document of {len(ids)} tokens has no start token (id {rule.start_id}): this model generates after one",
            fix="end the prompt with [gMASK]<sop>, as its tokenizer does when special tokens are added",
        )
    context = ids.index(rule.start_id)
    for mask in rule.mask_ids:
        if mask in ids:
            return context, ids.index(mask)
    raise ModelError(
        f"a document of {len(ids)} tokens has none of the mask tokens {list(rule.mask_ids)}",
        fix="end the prompt with [gMASK]<sop>, as its tokenizer does when special tokens are added",
    )
