"""What was written is looked at before it appears: read back and hashed, its names and shapes those of its config, its
answers numbers, and how far they are from those of the models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from oarsmith.checkpoint.config_file import read_config
from oarsmith.checkpoint.fill import check_tensor, file_infos, match_names
from oarsmith.checkpoint.source import open_source
from oarsmith.checkpoint.streamed import Difference, difference, probe_tokens, streamed_logits
from oarsmith.checkpoint.verify import Digests, compare
from oarsmith.errors import ModelError
from oarsmith.merge.models import ModelFiles
from oarsmith.merge.stream import Progress
from oarsmith.models import families
from oarsmith.models.spec import DecoderSpec


@dataclass(frozen=True)
class Verified:
    """What was found.

    Attributes:
        known: the family is known, so names, shapes and answers could be looked at.
        answers: how the merged model answers probe tokens, beside each model it was made of; of those whose vocabulary
            is the same, and which have no adapter on them.
    """

    known: bool
    answers: Mapping[str, Difference]


def verify(folder: Path, meant: Digests, models: Sequence[ModelFiles], progress: Progress, *, probe: bool) -> Verified:
    """Look at a directory that was written.

    Args:
        meant: every tensor that the plan has, by dtype, shape and the hash that it had before it was written.
        probe: also let the model, and those it was made of, answer probe tokens.

    Raises:
        OarsmithError: something is not as it was meant.
    """
    with open_source(folder) as source:
        compare(source, meant, sum(map(source.num_bytes, source.shapes)), progress)
        config = read_config(folder)
        try:
            family, spec = families.build_spec(config)
        except ModelError:
            return Verified(False, {})
        names = family.names(spec)
        actual, infos = match_names(names, source), file_infos(spec, config, names, source.stored_dtype())
        for name, info in infos.items():
            check_tensor(source, actual[name], info.shape)
    return Verified(True, _answers(folder, spec, models, progress) if probe else {})


def _answers(
    folder: Path, spec: DecoderSpec, models: Sequence[ModelFiles], progress: Progress
) -> dict[str, Difference]:
    ids = probe_tokens(spec)
    comparable = [
        one
        for one in models
        if one.adapter is None and families.build_spec(read_config(one.base))[1].vocab_size == spec.vocab_size
    ]
    progress("comparing answers", 0, len(comparable) + 1)
    logits = streamed_logits(folder, ids)
    if not bool(logits.isfinite().all()):
        raise ModelError(
            "the merged model gives no numbers for probe tokens",
            where=str(folder),
            fix="look at the models (oarsmith eval), lower the weights, or write float32",
        )
    found = {}
    for index, one in enumerate(comparable, start=1):
        progress("comparing answers", index, len(comparable) + 1)
        found[one.reference] = difference(streamed_logits(one.base, ids), logits)
    return found
