"""``samples.jsonl``: a few answers of each logged rollout with their rewards, for people to read."""

from __future__ import annotations

import json
from pathlib import Path

from oarsmith.atomic import atomic_write_text
from oarsmith.rl.experience import Scored
from oarsmith.training.log import read_log
from oarsmith.training.policy_report import SAMPLES_FILE

TIMES_FILE = "rollout_timing.jsonl"


class SampleLog:
    """Beside them ``rollout_timing.jsonl``: seconds of drawing answers and of scoring them. Appends rows with ``step``,
    ``prompt``, ``answer``, ``reward``, and each reward function's own value.

    Args:
        count: answers of a rollout; ``every``: of which rollouts.
    """

    def __init__(self, folder: Path, *, count: int, every: int) -> None:
        self._path, self._times = folder / SAMPLES_FILE, folder / TIMES_FILE
        self._count, self._every = count, every

    def rewind(self, step: int) -> None:
        """Forget what came after ``step``."""
        for path in (self._path, self._times):
            kept = [record for record in read_log(path) if record["step"] <= step]
            if path.exists():
                atomic_write_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept))

    def note(self, scored: Scored, step: int) -> None:
        """The first answers to the first prompts of a rollout that step ``step`` learns from."""
        if step % self._every:
            return
        times = {"step": step, "sampling": scored.sampling_seconds, "rewards": scored.reward_seconds}
        with self._times.open("a", encoding="utf-8") as file:
            file.write(json.dumps(times) + "\n")
        if self._count == 0:
            return
        rows: list[dict[str, object]] = []
        at = 0
        for asked, group in zip(scored.prompts, scored.groups, strict=True):
            if len(rows) < self._count:
                parts = {name: values[at] for name, values in scored.scores.parts.items()}
                rows.append(
                    {
                        "step": step,
                        "prompt": asked.text,
                        "answer": group[0].text,
                        "reward": scored.scores.total[at],
                        "rewards": parts,
                        "tokens": group[0].num_own,
                        "truncated": group[0].truncated,
                    }
                )
            at += len(group)
        with self._path.open("a", encoding="utf-8", errors="replace") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
