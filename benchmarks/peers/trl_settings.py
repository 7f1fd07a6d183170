"""What TRL's trainers are run with in every setting under test."""

from __future__ import annotations

import argparse
from typing import Any


def same_settings(options: argparse.Namespace) -> dict[str, Any]:
    """Of the run, and what keeps a trainer from doing more than to train."""
    return {
        "output_dir": options.output_dir,
        "max_length": options.max_length,
        "max_steps": options.num_steps,
        "learning_rate": options.learning_rate,
        "lr_scheduler_type": "constant",
        "seed": options.seed,
        "bf16": options.setting == "master",
        "use_cpu": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
    }
