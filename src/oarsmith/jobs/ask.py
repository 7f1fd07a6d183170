"""What ``generate``, ``chat`` and ``eval`` share: the engine and the sampling that a configuration asks for."""

from __future__ import annotations

from oarsmith.config.eval import EvalConfig
from oarsmith.config.groups import SamplingKeys
from oarsmith.config.inference import ChatConfig, GenerateConfig
from oarsmith.engine import Completion, Engine, Sampling
from oarsmith.loading import find_tokenizer
from oarsmith.text import Tokenizer
from oarsmith.text.choose import with_named_template


def open_engine(config: GenerateConfig | ChatConfig | EvalConfig, batch_size: int = 1) -> Engine:
    """The model with its tokenizer, and the chat template that the configuration names."""
    return Engine(
        config.model_name_or_path,
        _tokenizer(config),
        dtype=config.dtype,
        device=config.device,
        adapter=config.adapter,
        batch_size=batch_size,
    )


def _tokenizer(config: GenerateConfig | ChatConfig | EvalConfig) -> Tokenizer:
    path, model = config.tokenizer_name_or_path, config.model_name_or_path
    # "Not given" is the model's path by the time a job runs; then an adapter's own tokenizer comes first.
    found = find_tokenizer(model, config.adapter) if path in (None, model) else find_tokenizer(path)
    return with_named_template(found, config.chat_template)


def sampling_of(config: SamplingKeys, seed: int) -> Sampling:
    """The sampling keys as one value."""
    drawn = config.decode_strategy == "sampling"
    return Sampling(
        max_new_tokens=config.max_new_tokens,
        temperature=(config.temperature or 0.0) if drawn else 0.0,
        top_k=config.top_k,
        top_p=config.top_p,
        repetition_penalty=config.repetition_penalty,
        stop=config.stop,
        seed=seed,
    )


ENDINGS = {"stop": "the model ended it", "length": "cut at the limit"}


def speed_line(completion: Completion, seconds: float) -> str:
    """One line about an answer: its tokens, how fast they came and why it ended."""
    return (
        f"{completion.num_prompt_tokens} prompt tokens, {completion.num_tokens} new in {seconds:.1f} s "
        f"({completion.num_tokens / max(seconds, 1e-9):.1f} tokens/s); {ENDINGS[completion.finish_reason]}"
    )
