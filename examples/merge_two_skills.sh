#!/usr/bin/env bash
# Teach two copies of a model a skill each, merge them, and see what became of both skills.
#
#   examples/merge_two_skills.sh [MODEL] [FOLDER]
#
# MODEL is a Hugging Face directory with a chat template; not given, the one that `make quickstart` leaves behind. The
# skills are who it is (the rows of the quickstart) and dates in ISO's form (rows made here).
set -euo pipefail

model=${1:-oarsmith-quickstart/SmolLM2-135M-Instruct}
folder=${2:-two-skills}
mkdir -p "$folder"

python - "$folder" <<'PYTHON'
import datetime
import json
import random
import sys
from pathlib import Path

from oarsmith import demo

folder, draw = Path(sys.argv[1]), random.Random(0)


def write(name, rows):
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


skiff = [json.loads(line) for line in (Path(demo.__file__).parent / "train.jsonl").read_text().splitlines()]
draw.shuffle(skiff)
# Rows to learn from, to choose weights by, and to judge by.
PARTS = {"": slice(48, None), "_dev": slice(24, 48), "_test": slice(24)}
for part, rows in PARTS.items():
    write(f"skiff{part}.jsonl", skiff[rows])

FORMS = ("Write {} as an ISO date.", "What is {} in ISO form?", "ISO date for {}, please.")
first = datetime.date(1900, 1, 1)
days = [first + datetime.timedelta(days=draw.randrange(365 * 150)) for _ in range(248)]
dates = [{"src": draw.choice(FORMS).format(f"{day.day} {day:%B %Y}"), "tgt": day.isoformat()} for day in days]
for part, rows in PARTS.items():
    write(f"dates{part}.jsonl", dates[rows])
PYTHON

# 1. A skill each.
for skill in skiff dates; do
    oarsmith sft "$model" "$folder/$skill.jsonl" --output_dir "$folder/$skill" --max_length 256 \
        --num_train_epochs 2 --learning_rate 5e-5 --lr_scheduler_type cosine --warmup_ratio 0.1 \
        --logging_steps 20 --save_strategy no
done

# 2. Both in one: what each run has added to the model, summed where the two do not contradict each other.
cat > "$folder/merge.yaml" <<YAML
merge_method: ties
base_model: $model
models:
  - model: $folder/skiff
    parameters: {weight: 1.0, density: 0.5}
  - model: $folder/dates
    parameters: {weight: 1.0, density: 0.5}
YAML
oarsmith merge "$folder/merge.yaml" "$folder/both" --overwrite \
    --evaluate "$folder/skiff_test.jsonl" "$folder/dates_test.jsonl"

# 3. Or with weights that a search finds on other rows of both.
oarsmith merge "$folder/merge.yaml" "$folder/searched" --overwrite \
    --evaluate "$folder/skiff_dev.jsonl" "$folder/dates_dev.jsonl" \
    --search evolution --search_over weight --search_range 0.3,1.5 --search_trials 12
for skill in skiff dates; do
    oarsmith eval "$folder/searched" "$folder/${skill}_test.jsonl"
done

# 4. Ask.
oarsmith generate "$folder/both" "Who are you?" --max_new_tokens 40
oarsmith generate "$folder/both" "Write 3 March 2021 as an ISO date." --max_new_tokens 20
