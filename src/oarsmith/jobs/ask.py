"""What ``generate``, ``chat`` and ``eval`` share: the engine and the sampling that a configuration asks for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from oarsmith.config.base import JobConfig
from oarsmith.config.bench import BenchConfig
from oarsmith.config.eval import EvalConfig
from oarsmith.config.groups import ModelKeys, SamplingKeys
from oarsmith.config.inference import AdapterKeys, CacheKeys, ChatConfig, GenerateConfig, ModeKeys, SpeculativeKeys
from oarsmith.config.serve import ServeConfig
from oarsmith.engine import Completion, Engine, Sampling
from oarsmith.engine.native_model import obstacle
from oarsmith.engine.options import NGRAM
from oarsmith.errors import ConfigError
from oarsmith.model_path import find_tokenizer
from oarsmith.text import Tokenizer
from oarsmith.text.choose import with_named_template

Asking = GenerateConfig | ChatConfig | EvalConfig | BenchConfig | ServeConfig


def open_engine(config: Asking, batch_size: int = 1, adapters: Mapping[str, str] | None = None) -> Engine:
    """The model with its tokenizer, and the chat template that the configuration names.

    Args:
        adapters: folders of LoRA adapters by the names under which requests choose them.
    """
    if isinstance(config, ModeKeys) and config.mode == "static":
        from oarsmith.engine.static import StaticEngine

        path, cache = config.model_name_or_path, _cache_bytes(config)
        return StaticEngine(path, _tokenizer(config), batch_size=batch_size, cache_bytes=cache)
    if Path(config.model_name_or_path, "model.pt2").is_file():
        raise ConfigError("this is a compiled package", where=config.model_name_or_path, fix="add --mode static")
    engine = Engine(
        config.model_name_or_path,
        _tokenizer(config),
        dtype=config.dtype,
        device=config.device,
        adapter=_adapter(config),
        adapters=adapters or None,
        weights=None if config.weights == "none" else config.weights,
        compute=config.kernels,
        num_threads=config.num_threads,
        batch_size=batch_size,
        cache_bytes=_cache_bytes(config),
        cache_dtype=config.cache_dtype if isinstance(config, CacheKeys) else "auto",
        **_speculation(config),
    )
    if not isinstance(config, (EvalConfig, ServeConfig)):
        engine.require_text()
    return engine


@contextmanager
def answering(config: GenerateConfig | ChatConfig | BenchConfig | ServeConfig) -> Iterator[None]:
    """What PyTorch is to be told before it computes; where the compiled step will, it is not even imported."""
    static = (isinstance(config, ModeKeys) and config.mode == "static") or config.speculative not in (None, NGRAM)
    if not static and config.kernels != "torch" and obstacle(config.device) is None:
        yield
        return
    from oarsmith.jobs.runtime import runtime

    with runtime(config):
        yield


def _cache_bytes(config: JobConfig) -> int | None:
    wanted = config.cache_gib if isinstance(config, CacheKeys) else None
    return None if wanted is None else int(wanted * (1 << 30))


def _speculation(config: JobConfig) -> dict[str, Any]:
    if not isinstance(config, SpeculativeKeys) or config.speculative is None:
        return {}
    return {name: getattr(config, name) for name in SpeculativeKeys.model_fields}


def is_raw(config: SamplingKeys) -> bool:
    """Whether prompts go to the model without a chat template."""
    return config.raw or (isinstance(config, ModelKeys) and config.chat_template == "none")


def _adapter(config: JobConfig) -> str | None:
    return config.adapter if isinstance(config, AdapterKeys) else None


def _tokenizer(config: Asking) -> Tokenizer:
    path, model = config.tokenizer_name_or_path, config.model_name_or_path
    # "Not given" is the model's path by the time a job runs; then an adapter's own tokenizer comes first.
    found = find_tokenizer(model, _adapter(config)) if path in (None, model) else find_tokenizer(path)
    return with_named_template(found, config.chat_template)


_LONGEST_PATH = 1000
FILE_OR_TEXT = {"json_schema": "schema (a JSON object)", "grammar": 'grammar (rules, such as start: "a")'}
# Keys of the configurations that are the sampling's, by the same name.
_SAME = (
    "max_new_tokens",
    "min_new_tokens",
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "bad_words",
    "stop",
    "stop_ids",
    "ignore_eos",
    "json_object",
    "regex",
    "choices",
)
_OF_GENERATE = ("n", "best_of", "num_beams", "length_penalty", "logprobs", "prompt_logprobs")
_EARLY: dict[str, bool | Literal["never"]] = {"true": True, "false": False, "never": "never"}


def sampling_of(config: SamplingKeys, seed: int) -> Sampling:
    """The sampling keys as one value.

    Raises:
        ConfigError: a value that cannot be, or a file that cannot be read.
    """
    names = (*_SAME, *_OF_GENERATE) if isinstance(config, GenerateConfig) else _SAME
    same = {name: getattr(config, name) for name in names}
    drawn = config.decode_strategy == "sampling"
    return Sampling(
        **same,
        early_stopping=_EARLY[config.early_stopping] if isinstance(config, GenerateConfig) else False,
        temperature=(config.temperature or 0.0) if drawn else 0.0,
        json_schema=_file_or_text("json_schema", config.json_schema),
        grammar=_file_or_text("grammar", config.grammar),
        seed=seed,
    )


def is_path(value: Any) -> bool:
    """Whether the value of a key that takes a file or its content is a file's name."""
    return isinstance(value, str) and len(value) <= _LONGEST_PATH and not any(mark in value for mark in "\n{:")


def _file_or_text(name: str, value: Any) -> Any:
    """The content of the file that is named, or the value itself where it is no path."""
    if not is_path(value):
        return value
    try:
        return Path(value).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        what = f"the file {value} cannot be read: {getattr(error, 'strerror', None) or 'it is no UTF-8 text'}"
        raise ConfigError(what, where=name, fix=f"name a file, or give the {FILE_OR_TEXT[name]} itself") from error


ENDINGS = {"stop": "the model ended it", "length": "cut at the limit"}


def speed_line(completion: Completion, seconds: float, guesses: tuple[int, int] = (0, 0)) -> str:
    """One line about an answer: its tokens, how fast they came, guesses and those that were right, why it ended."""
    guessed = f"; {guesses[1]} of {guesses[0]} guesses right" if guesses[0] else ""
    return (
        f"{completion.num_prompt_tokens} prompt tokens, {completion.num_tokens} new in {seconds:.1f} s "
        f"({completion.num_tokens / max(seconds, 1e-9):.1f} tokens/s){guessed}; {ENDINGS[completion.finish_reason]}"
    )
