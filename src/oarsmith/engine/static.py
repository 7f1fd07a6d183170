"""Answers of a model that was exported: the engine with a compiled package in the decoder's place.

Shapes: B rows (texts), S places of a row, N rows that need logits, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from oarsmith.adapters.bank import AdapterBank
from oarsmith.checkpoint.config_file import read_config
from oarsmith.checkpoint.fill import meta_decoder
from oarsmith.engine.backend import Part
from oarsmith.engine.engine import Engine
from oarsmith.engine.intake import Ask
from oarsmith.engine.memory import free_memory_of, page_bytes
from oarsmith.engine.runner import Runner
from oarsmith.engine.running import make_runner
from oarsmith.engine.sampling import Sampling
from oarsmith.engine.static_export import FACTS_FILE, FORMAT, MODEL_FILE, READ, STEP
from oarsmith.engine.tensor_logits import TensorLogits
from oarsmith.errors import CheckpointError, ConfigError
from oarsmith.models import families
from oarsmith.text import Tokenizer, load_tokenizer

# Places of a row at first; they double when a text needs more. A step looks at all of them.
_FIRST_PLACES = 256


class StaticEngine(Engine):
    """An ``Engine`` that computes with a package of ``oarsmith export``.

    Everything is as there, but for what a compiled step does not give: log-probabilities of prompts, shared prefixes,
    guessed tokens and adapters.

    Args:
        package: the folder.
        tokenizer: not given: the package's.
        batch_size: most requests that are worked on at the same time.
        cache_bytes: of keys and values; each request has room for the whole context. Not given: for ``batch_size`` of
            them, but at most half of the memory that is free.

    Raises:
        OarsmithError: there is no package, or one that was made for another machine or version.
    """

    def __init__(
        self,
        package: str | Path,
        tokenizer: Tokenizer | None = None,
        *,
        batch_size: int = 8,
        cache_bytes: int | None = None,
        max_step_tokens: int = 2048,
    ) -> None:
        self._folder = Path(package)
        self._facts = read_facts(self._folder)
        config = read_config(self._folder)
        _, spec = families.build_spec(config)
        model = meta_decoder(spec, config, getattr(torch, self._facts["dtype"])).eval()
        # A page is a row: it holds all of a text.
        super().__init__(
            model,
            load_tokenizer(self._folder) if tokenizer is None else tokenizer,
            batch_size=batch_size,
            cache_bytes=cache_bytes,
            block_size=spec.max_positions,
            max_step_tokens=max_step_tokens,
            prefix_caching=False,
        )

    @cached_property
    def runner(self) -> Runner:
        """The package and what fills it; loaded when the first prompt comes."""
        facts, free = self._served.facts, free_memory_of(torch.device(self._facts["device"]))
        num_rows = self._sizes.pages(facts.max_positions, page_bytes(self.model, facts.max_positions), free)
        num_rows = min(num_rows, self.batch_size)
        backend = StaticBackend(load_functions(self._folder), self._facts, num_rows, facts.max_positions)
        return make_runner(backend, facts.rules, num_rows, self._sizes, None)

    def _ask(self, ids: list[int], sampling: Sampling | None, adapter: str | None) -> Ask:
        if sampling is not None and sampling.prompt_logprobs is not None:
            what = "a compiled package gives no log-probabilities of prompts"
            raise ConfigError(what, where="prompt_logprobs", fix="leave it out, or use the model itself")
        return super()._ask(ids, sampling, adapter)

    def _new_bank(self) -> AdapterBank:
        what = "a compiled package takes no adapters"
        raise ConfigError(what, where="adapters", fix="merge the adapter into the model, and export that")


Function = Callable[[Tensor, Tensor, list[list[Tensor]]], Tensor]


def load_functions(folder: Path) -> dict[str, Function]:
    """The package's two functions.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    from torch.export.pt2_archive._package import load_pt2

    try:
        return dict(load_pt2(str(folder / MODEL_FILE), load_weights_from_disk=True).aoti_runners)
    except RuntimeError as error:  # all that PyTorch's reader of archives raises
        what = f"the file cannot be read: {str(error).splitlines()[0]}"
        raise CheckpointError(what, where=str(folder / MODEL_FILE), fix="export the model again") from error


class StaticBackend:
    """The two functions over rows of keys and values.

    Args:
        num_rows: B.
        context: most tokens of a text.
    """

    def __init__(
        self, functions: Mapping[str, Function], facts: Mapping[str, Any], num_rows: int, context: int
    ) -> None:
        self._read, self._step = functions[READ], functions[STEP]
        self._device = torch.device(facts["device"])
        self._context = context
        self._size = 0
        dtype = getattr(torch, facts["dtype"])
        self._cache = [
            [torch.zeros(num_rows, 1, *slot, dtype=dtype, device=self._device) for slot in layer]
            for layer in facts["cache"]
        ]
        self._logits: dict[int, Tensor] = {}

    def compute(self, parts: Sequence[Part]) -> None:
        self._grow(max(part.start + len(part.tokens) for part in parts))
        self._logits = {}
        ends, single, at = [], [], 0
        for part in parts:
            at += len(part.tokens)
            ends.append(at - 1)
        for part, end in zip(parts, ends, strict=True):
            if len(part.tokens) == 1:
                single.append((part, end))
                continue
            (page,) = part.pages
            row = [[tensor[page : page + 1] for tensor in layer] for layer in self._cache]
            self._logits[end] = self._read(self._tensor([list(part.tokens)]), self._tensor([part.start]), row)[0]
        if single:
            self._answer(single)

    def _answer(self, single: Sequence[tuple[Part, int]]) -> None:
        """One token each, of all rows up to the last that has one: rows without write where nobody reads."""
        num_rows = 1 + max(part.pages[0] for part, _ in single)
        ids, start = [[0] for _ in range(num_rows)], [self._size - 1] * num_rows
        for part, _ in single:
            ids[part.pages[0]], start[part.pages[0]] = list(part.tokens), part.start
        rows = [[tensor[:num_rows] for tensor in layer] for layer in self._cache]
        logits_BV = self._step(self._tensor(ids), self._tensor(start), rows)
        self._logits |= {end: logits_BV[part.pages[0]] for part, end in single}

    def _grow(self, places: int) -> None:
        """Room for so many tokens in every row, and one more place for what is thrown away.

        The last token of a text that fills the context is never computed, so there is that place.
        """
        if places < self._size:
            return
        self._size = min(max(places + 1, 2 * self._size, _FIRST_PLACES), self._context)
        assert places < self._size, (places, self._context)
        for layer in self._cache:
            for number, old in enumerate(layer):
                layer[number] = old.new_zeros(old.shape[0], self._size, *old.shape[2:])
                layer[number][:, : old.shape[1]] = old

    def logits(self, places: Sequence[int]) -> TensorLogits:
        return TensorLogits(torch.stack([self._logits[place] for place in places]))

    def copy_page(self, source: int, target: int) -> None:
        for tensor in (tensor for layer in self._cache for tensor in layer):
            tensor[target] = tensor[source]

    def copy_sequence(self, source: int, target: int) -> None:
        """All there is lies in the pages."""

    def _tensor(self, values: list[int] | list[list[int]]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)


def read_facts(folder: Path) -> dict[str, Any]:
    """What a package says about itself.

    Raises:
        CheckpointError: there is no package, or one that this machine cannot run.
    """
    try:
        facts: dict[str, Any] = json.loads((folder / FACTS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            "this is no static package", where=str(folder), fix="make one of a model: oarsmith export MODEL OUT"
        ) from error
    here = {
        "format": FORMAT,
        "torch": torch.__version__.partition("+")[0].rsplit(".", 1)[0],
        "cpu": torch.backends.cpu.get_cpu_capability(),
    }
    made = {**facts, "torch": str(facts.get("torch")).partition("+")[0].rsplit(".", 1)[0]}
    if facts.get("device") != "cpu":
        del here["cpu"]
    other = [f"{name} {made.get(name)}, here {value}" for name, value in here.items() if made.get(name) != value]
    if other:
        raise CheckpointError(
            f"the package was made for another machine or version: {'; '.join(other)}",
            where=str(folder),
            fix="export the model again here",
        )
    return facts
