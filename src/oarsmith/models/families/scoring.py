"""Models that score texts instead of writing them: transformers' ``...ForSequenceClassification``, for every family.

Such a model is a decoder whose head has a row for each score (a reward model: one) and no bias. The score of a text is
read at its last token, after the final norm.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from oarsmith.errors import ModelError
from oarsmith.models.spec import DecoderSpec, HeadSpec

_CLASS = "ForSequenceClassification"
_ENDINGS = re.compile(r"(ForCausalLM|LMHeadModel|ForConditionalGeneration|Model)$")
# transformers counts two labels where a config does not say.
_DEFAULT_SCORES = 2


def num_scores(config: Mapping[str, Any]) -> int | None:
    """How many scores the model of a ``config.json`` gives; None: it writes text.

    Raises:
        ModelError: the config names something that is no number of labels.
    """
    if not any(name.endswith(_CLASS) for name in config.get("architectures") or ()):
        return None
    names, count = config.get("id2label"), config.get("num_labels")
    found = len(names) if isinstance(names, Mapping) else _DEFAULT_SCORES if count is None else count
    if type(found) is not int or found < 1:
        raise ModelError(f"num_labels {found!r} is no number from 1", where="config.json")
    return found


def with_scores(spec: DecoderSpec, count: int) -> DecoderSpec:
    """The decoder with a head of ``count`` scores: what bends or scales logits of tokens is not in it."""
    return replace(spec, head=HeadSpec(tied=False, projection=spec.head.projection, num_scores=count))


def scoring_config(config: Mapping[str, Any], count: int = 1, *, padding_id: int | None = None) -> dict[str, Any]:
    """The ``config.json`` of a scoring model made of the model of ``config``.

    Args:
        padding_id: what transformers takes for padding: it reads the score at the last token that is another one. None:
            it reads it at the last token of all, and takes no more than one text at a time.
    """
    names = [_ENDINGS.sub("", name.removesuffix(_CLASS)) + _CLASS for name in config.get("architectures") or ()]
    labels = {str(index): f"LABEL_{index}" for index in range(count)}
    return {
        **{key: value for key, value in config.items() if key != "num_labels"},
        "architectures": names[:1] or [_CLASS],
        "id2label": labels,
        "label2id": {name: int(index) for index, name in labels.items()},
        "pad_token_id": padding_id,
    }


def has_new_head(own: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
    """Whether ``config`` makes a scoring model of a checkpoint that writes text, which then has no scores to read."""
    return num_scores(config) is not None and num_scores(own) is None


def require_text(config: Mapping[str, Any], why: str) -> None:
    """Refuse a scoring model where only one that writes will do.

    Args:
        why: ends the sentence "this is a reward model, and ...".

    Raises:
        ModelError: it is one.
    """
    if num_scores(config) is not None:
        raise ModelError(f"this is a reward model, and {why}", fix="keep it as a Hugging Face directory")
