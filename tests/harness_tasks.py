"""Tiny tasks for lm-evaluation-harness in local files."""

from __future__ import annotations

import json
from pathlib import Path

_CHOICE = """
task: tiny_choice
dataset_path: json
dataset_kwargs:
  data_files:
    test: {rows}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}\nAnswer:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - metric: acc
  - metric: acc_norm
"""
_ANSWER = """
task: tiny_answer
dataset_path: json
dataset_kwargs:
  data_files:
    test: {rows}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[answer]}}}}"
generation_kwargs:
  until: ["."]
  max_gen_toks: 8
metric_list:
  - metric: exact_match
"""


def write_task(folder: Path, answer: str = "yes") -> Path:
    """``tiny_choice`` and ``tiny_answer`` over four questions; the right choice is ``answer``."""
    rows = folder / "rows.jsonl"
    questions = (
        {"question": f"Is {n} a number?", "choices": ["no", answer, "perhaps so"], "answer": 1} for n in range(4)
    )
    rows.write_text("".join(json.dumps(row) + "\n" for row in questions))
    for name, text in (("choice", _CHOICE), ("answer", _ANSWER)):
        (folder / f"tiny_{name}.yaml").write_text(text.format(rows=rows))
    return folder
