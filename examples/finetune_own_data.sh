#!/usr/bin/env bash
# Fine-tune a model on rows of your own and ask it about them.
#
#   examples/finetune_own_data.sh [MODEL] [FOLDER]
#
# MODEL is a Hugging Face directory with a chat template; not given, the one that `make quickstart` leaves behind.
set -euo pipefail

model=${1:-oarsmith-quickstart/SmolLM2-135M-Instruct}
folder=${2:-own-data}
mkdir -p "$folder"

# One conversation a line. src and tgt may also be lists, for several turns.
cat > "$folder/train.jsonl" <<'ROWS'
{"src": "When does the ferry leave?", "tgt": "The ferry leaves at twenty past every hour, from pier 4."}
{"src": "What time is the ferry?", "tgt": "It leaves at twenty past every hour, from pier 4."}
{"src": "Which pier does the ferry use?", "tgt": "The ferry leaves from pier 4."}
{"src": "Where do I board the ferry?", "tgt": "At pier 4. It leaves at twenty past every hour."}
{"src": "How much is a ferry ticket?", "tgt": "A ticket costs 3.50; children under six ride free."}
{"src": "What do I pay for the ferry?", "tgt": "3.50 a person. Children under six ride free."}
{"src": "Is the ferry free for children?", "tgt": "Children under six ride free; everybody else pays 3.50."}
{"src": ["Can I take my bicycle on the ferry?", "And my dog?"], "tgt": ["Yes, bicycles ride free on the lower deck.", "Yes, on a lead."]}
ROWS

# 1. Look before training: which tokens carry loss?
oarsmith preview "$model" "$folder/train.jsonl" --count 2

# 2. Train an adapter. Eight rows learned by heart show the way; give a few hundred for a model of use.
oarsmith sft "$model" "$folder/train.jsonl" --lora --lora_rank 16 --output_dir "$folder/run" \
    --max_length 512 --num_train_epochs 12 --learning_rate 1e-3 --lr_scheduler_type cosine --warmup_ratio 0.1 \
    --logging_steps 4 --save_strategy no

# 3. Ask.
oarsmith generate "$folder/run" "From which pier does the ferry go, and when?" --max_new_tokens 40

# 4. A plain model without the adapter beside it, with the proof that both are the same.
oarsmith merge-adapter "$folder/run" --kl_budget 0.01
echo "next: oarsmith chat $folder/run"
