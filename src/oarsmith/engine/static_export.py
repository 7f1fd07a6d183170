"""A model as a package that computes without its modules: compiled ahead of time, weights inside.

The decoder's own modules are traced twice (``Rows``): ``read`` takes the tokens of one prompt, ``step`` one token of
each of several texts. Both write keys and values into tensors that the caller owns.
"""

from __future__ import annotations

import contextlib
import json
import string
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from oarsmith._version import __version__
from oarsmith.atomic import atomic_directory, atomic_write_text
from oarsmith.errors import ConfigError, ModelError
from oarsmith.models.caching import CacheRules
from oarsmith.models.decoder import Decoder
from oarsmith.models.rows import RowCache
from oarsmith.models.spec import linear_specs
from oarsmith.text import Tokenizer
from oarsmith.training.compile import choose_cache, has_compiler

FORMAT = "oarsmith static package 1"
MODEL_FILE, FACTS_FILE = "model.pt2", "package.json"
READ, STEP = "read", "step"
_GENERATION_CONFIG = "generation_config.json"
# What tracing sees; all but the sizes of the model stay open.
_EXAMPLE_ROWS, _EXAMPLE_TOKENS, _EXAMPLE_PLACES = 3, 5, 16
_OPTIONS = {
    "aot_inductor.package": True,
    # Once, whichever of the two graphs uses them.
    "aot_inductor.package_constants_in_so": False,
    "aot_inductor.package_constants_on_disk_format": "pickle_weights",
    # As many threads as the process has that runs it.
    "cpp.dynamic_threads": True,
}


class Rows(nn.Module):
    """Logits [B, V] after the last of T tokens of each of B rows.

    Shapes: ids [B, T]; start [B], how many tokens of a row came before; cache: for every layer its tensors [B, S, ...],
    in which the places from ``start`` on are written.
    """

    def __init__(self, model: Decoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, start: Tensor, cache: list[list[Tensor]]) -> Tensor:
        rows = RowCache(cache, start, ids.shape[1])
        hidden_BTD = self.model.hidden(ids.flatten(), rows.layout(), rows).unflatten(0, ids.shape)
        return self.model.logits(hidden_BTD[:, -1])


def require_static(model: Decoder) -> None:
    """Refuse what cannot be exported.

    Raises:
        OarsmithError: names it.
    """
    if not CacheRules.of(model.spec).prefixes:
        kind = model.config.get("model_type", "this model")
        raise ModelError(
            f"a model of the kind {kind} as configured here cannot be exported: what it keeps of a token does not "
            "follow from the tokens before it alone (it depends on the text's length, or on more than keys)",
            fix="use it as it is: oarsmith generate MODEL",
        )
    if model.spec.parts or any(linear.rewrite is not None for _, linear in linear_specs(model.spec)):
        raise ModelError("an adapter lies on the model", fix="merge it first: oarsmith merge-adapter")


def trace(model: Decoder, kind: str) -> torch.export.ExportedProgram:
    """The graph of ``read`` (one row of at least two tokens) or ``step`` (any number of rows of one token)."""
    from torch.export import Dim

    one = kind == READ
    rows, tokens = (1, _EXAMPLE_TOKENS) if one else (_EXAMPLE_ROWS, 1)
    shapes = [block.attention.cache_shape.slots for block in model.blocks()]
    weight = model.embedding.weight
    cache = [
        [torch.zeros(rows, _EXAMPLE_PLACES, *slot, dtype=weight.dtype, device=model.device) for slot in layer]
        for layer in shapes
    ]
    row = {} if one else {0: Dim("rows", min=1)}
    places = {1: Dim("places", min=2)}
    dynamic = {
        "ids": {1: Dim("tokens", min=2)} if one else row,
        "start": row,
        "cache": [[{**row, **places} for _ in layer] for layer in shapes],
    }
    ids = torch.zeros(rows, tokens, dtype=torch.int64, device=model.device)
    start = torch.arange(rows, device=model.device)
    with torch.no_grad():
        return torch.export.export(Rows(model), (ids, start, cache), dynamic_shapes=dynamic)


def export_static(
    model: Decoder, tokenizer: Tokenizer, folder: Path, *, said: Callable[[str], None] = lambda _: None
) -> None:
    """Compile a model into a package: complete under ``folder``, or not there at all.

    Args:
        said: is told what is done, as it begins.

    Raises:
        OarsmithError: a model that cannot be exported, or no C++ compiler.
    """
    require_static(model)
    if model.device.type == "cpu" and not has_compiler():
        raise ConfigError("there is no C++ compiler to compile the package with", fix="install g++")
    choose_cache()
    with atomic_directory(folder) as made:
        files: Any = {}
        for kind in (READ, STEP):
            said(f"tracing and compiling {kind}")
            program = trace(model, kind)
            with torch.no_grad(), _quiet():
                files[kind] = torch._inductor.aot_compile(program.module(), program.example_inputs[0], options=_OPTIONS)
        said("packing")
        from torch._inductor.package.package import package_aoti

        package_aoti(str(made / MODEL_FILE), files)
        tokenizer.save(made)
        atomic_write_text(made / "config.json", json.dumps(model.config, indent=2, ensure_ascii=False) + "\n")
        if model.generation_config is not None:
            atomic_write_text(made / _GENERATION_CONFIG, model.generation_config)
        facts = _facts(model, tokenizer)
        atomic_write_text(made / FACTS_FILE, json.dumps(facts, indent=1) + "\n")
        _write_script(made)


def _facts(model: Decoder, tokenizer: Tokenizer) -> dict[str, Any]:
    """What is to be known to run the package."""
    return {
        "format": FORMAT,
        "oarsmith": __version__,
        "torch": torch.__version__,
        "device": model.device.type,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "dtype": str(model.embedding.weight.dtype).removeprefix("torch."),
        "context": model.spec.max_positions,
        "stop_ids": list(tokenizer.stop_ids),
        "cache": [[list(slot) for slot in block.attention.cache_shape.slots] for block in model.blocks()],
    }


def _write_script(folder: Path) -> None:
    """The script that needs nothing of ours, and a page that shows it."""
    parts = resources.files("oarsmith.engine").joinpath("static_files")
    text = (folder / "tokenizer.json").is_file()
    script = parts.joinpath("generate.py" if text else "generate_ids.py").read_text(encoding="utf-8")
    page = string.Template(parts.joinpath("README.md").read_text(encoding="utf-8"))
    atomic_write_text(folder / "generate.py", script)
    prompt = '"Once upon a time"' if text else "1 2 3"
    atomic_write_text(folder / "README.md", page.substitute(script=script.strip(), prompt=prompt))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without warnings that PyTorch has for itself."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield
