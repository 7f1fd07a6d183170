"""How the rows of ``generate --input_file`` are sampled: the command's keys, and those that a row has for itself."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from oarsmith.config.groups import SamplingKeys
from oarsmith.config.inference import GenerateConfig
from oarsmith.config.load import overlay
from oarsmith.config.names import canonical_key, nearest
from oarsmith.config.resolved import Resolved
from oarsmith.engine import Sampling
from oarsmith.errors import ConfigError
from oarsmith.jobs.ask import FILE_OR_TEXT, is_path, sampling_of
from oarsmith.jobs.prompt_rows import PromptRow

_OF_THE_PROMPT = ("system", "raw")
ROW_KEYS = (
    *(key for key in SamplingKeys.model_fields if key not in _OF_THE_PROMPT),
    *("seed", "n", "best_of", "num_beams", "length_penalty", "early_stopping", "logprobs", "prompt_logprobs"),
)
_MOST_KNOWN = 256


class RowSampling:
    """The sampling of every row.

    Attributes:
        common: of rows that say nothing.
    """

    def __init__(self, resolved: Resolved[GenerateConfig]) -> None:
        self.common = sampling_of(resolved.config, resolved.config.seed)
        self._resolved = resolved
        self._known: dict[str, Sampling] = {}

    def of(self, row: PromptRow, number: int) -> tuple[Sampling, int]:
        """The sampling of a row, and its index for ``Engine.add``: with a seed of its own its place does not matter.

        Raises:
            ConfigError: a key that a row cannot have, or a value that cannot be; with the row's place.
        """
        if not row.sampling:
            return self.common, number
        # Rows with keys of their own mostly have the same ones.
        text = json.dumps(row.sampling, sort_keys=True, default=repr)
        if text not in self._known:
            if len(self._known) >= _MOST_KNOWN:
                self._known.clear()
            self._known[text] = self._read(row.sampling, row.where)
        return self._known[text], 0 if "seed" in row.sampling else number

    def _read(self, values: Mapping[str, Any], where: str) -> Sampling:
        for name, value in values.items():
            key = canonical_key(name, GenerateConfig.model_fields)
            if key not in ROW_KEYS:
                guess = nearest(name, ROW_KEYS)
                fix = f"did you mean '{guess}'?" if guess else f"a row may have {', '.join(ROW_KEYS)}"
                raise ConfigError(f"'{name}' is not for the 'sampling' of a row", where=where, fix=fix)
            if key in FILE_OR_TEXT and is_path(value):
                # Rows may come from anybody: they name no files to be read.
                fix = f"give the {FILE_OR_TEXT[key]} itself"
                raise ConfigError(f"{name} of a row is the name of a file: {value}", where=where, fix=fix)
        config = overlay(self._resolved, values, where)
        try:
            return sampling_of(config, config.seed)
        except ConfigError as error:
            raise ConfigError(error.what, where=where, fix=error.fix) from error
