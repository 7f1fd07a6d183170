"""Which configuration class belongs to which job. Classes are imported when asked for: a help page needs only one."""

from __future__ import annotations

import importlib

from .base import JobConfig

CONFIG_CLASSES: dict[str, tuple[str, str]] = {
    "quickstart": ("tools", "QuickstartConfig"),
    "pretrain": ("pretrain", "PretrainConfig"),
    "preprocess": ("preprocess", "PreprocessConfig"),
    "sft": ("sft", "SftConfig"),
    "dpo": ("dpo", "DpoConfig"),
    "kto": ("dpo", "KtoConfig"),
    "reward": ("reward", "RewardConfig"),
    "grpo": ("policy", "GrpoConfig"),
    "ppo": ("ppo", "PpoConfig"),
    "compare": ("compare", "CompareConfig"),
    "generate": ("inference", "GenerateConfig"),
    "chat": ("inference", "ChatConfig"),
    "serve": ("serve", "ServeConfig"),
    "request": ("request", "RequestConfig"),
    "convert": ("checkpoints", "ConvertConfig"),
    "merge-adapter": ("checkpoints", "MergeAdapterConfig"),
    "merge": ("merge", "MergeConfig"),
    "quantize": ("quantize", "QuantizeConfig"),
    "preview": ("tools", "PreviewConfig"),
    "eval": ("eval", "EvalConfig"),
    "bench": ("bench", "BenchConfig"),
    "export": ("export", "ExportConfig"),
    "replay": ("replay", "ReplayConfig"),
    "explain": ("tools", "ExplainConfig"),
    "models": ("tools", "ModelsConfig"),
    "doctor": ("tools", "DoctorConfig"),
}


def config_class(job: str) -> type[JobConfig]:
    """The configuration class of a job that exists."""
    module, name = CONFIG_CLASSES[job]
    found = vars(importlib.import_module(f"{__package__}.{module}"))[name]
    assert isinstance(found, type) and issubclass(found, JobConfig), name
    return found
