"""The table of commands: what each is for, and which job it calls."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """One command.

    Args:
        group: heading it stands under in the overview.
        summary: one line.
        job: ``module:function``; the function takes the resolved configuration and returns an exit status or None.
        usage: the words after the command's name.
        example: a command line that works.
        reads_config: whether a first word that ends in .json, .yaml or .yml is its configuration file.
    """

    group: str
    summary: str
    job: str
    usage: str
    example: str
    reads_config: bool = True


_TRAIN, _RUN, _REWRITE, _LOOK = "Train", "Ask", "Rewrite weights", "Look and check"

COMMANDS: dict[str, Command] = {
    "quickstart": Command(
        _TRAIN,
        "fine-tune a small model on this computer and compare its answers, in minutes",
        "oarsmith.jobs.quickstart:run",
        "[FOLDER]",
        "oarsmith quickstart",
    ),
    "preprocess": Command(
        _TRAIN,
        "turn raw text into token files for pretraining; train a tokenizer; merge token files",
        "oarsmith.jobs.preprocess:run",
        "CONFIG | INPUT_PATH OUTPUT_PREFIX",
        "oarsmith preprocess corpus/ data/train --tokenizer_name_or_path model/",
    ),
    "pretrain": Command(
        _TRAIN,
        "train a model on an indexed corpus, from scratch or further",
        "oarsmith.jobs.pretrain:run",
        "CONFIG | MODEL CORPUS",
        "oarsmith pretrain model/ data/corpus --max_steps 1000",
    ),
    "sft": Command(
        _TRAIN,
        "fine-tune a model on conversations, all weights or LoRA",
        "oarsmith.jobs.sft:run",
        "CONFIG | MODEL DATA",
        "oarsmith sft config.json --learning_rate 1e-5",
    ),
    "dpo": Command(
        _TRAIN,
        "train on pairs of answers of which one is preferred: DPO and its relatives",
        "oarsmith.jobs.dpo:run",
        "CONFIG | MODEL DATA",
        "oarsmith dpo runs/sft pairs.jsonl --lora --loss_type sigmoid",
    ),
    "kto": Command(
        _TRAIN,
        "train on single answers that are good or bad: KTO",
        "oarsmith.jobs.kto:run",
        "CONFIG | MODEL DATA",
        "oarsmith kto runs/sft judged.jsonl --lora",
    ),
    "reward": Command(
        _TRAIN,
        "train a reward model: one that scores answers, or judges their steps",
        "oarsmith.jobs.reward:run",
        "CONFIG | MODEL DATA",
        "oarsmith reward runs/sft pairs.jsonl --lora",
    ),
    "grpo": Command(
        _TRAIN,
        "learn from rewards: GRPO, DAPO, GSPO, RLOO, REINFORCE++ and relatives",
        "oarsmith.jobs.grpo:run",
        "CONFIG | MODEL PROMPTS",
        "oarsmith grpo runs/sft prompts.jsonl --rewards reward.py:reward",
    ),
    "ppo": Command(
        _TRAIN,
        "learn from rewards with a critic: PPO",
        "oarsmith.jobs.ppo:run",
        "CONFIG | MODEL PROMPTS",
        "oarsmith ppo runs/sft prompts.jsonl --rewards runs/reward --critic_model_name_or_path runs/reward",
    ),
    "compare": Command(
        _TRAIN,
        "fine-tune by several methods on the same data: one table, one picture",
        "oarsmith.jobs.compare:run",
        "CONFIG | MODEL DATA",
        "oarsmith compare model/ train.jsonl --methods full,lora,dora --max_steps 100",
    ),
    "generate": Command(
        _RUN,
        "answer a prompt, or a file of prompts into a file",
        "oarsmith.jobs.generate:run",
        "MODEL PROMPT",
        "oarsmith generate runs/sft 'Who are you?'",
    ),
    "chat": Command(
        _RUN, "talk to a model in the terminal", "oarsmith.jobs.chat:run", "MODEL", "oarsmith chat runs/sft"
    ),
    "serve": Command(
        _RUN,
        "serve a model: OpenAI's API, KServe over HTTP and gRPC, a page to chat on",
        "oarsmith.jobs.serve:run",
        "MODEL",
        "oarsmith serve model/ --port 8011",
    ),
    "request": Command(
        _RUN,
        "ask a server over HTTP",
        "oarsmith.jobs.request:run",
        "PROMPT",
        "oarsmith request 'Who are you?' --url http://127.0.0.1:8011",
    ),
    "convert": Command(
        _REWRITE,
        "bring a model or adapter into another layout: Hugging Face, .bin, GGUF, PaddleNLP",
        "oarsmith.jobs.convert:run",
        "SOURCE DESTINATION",
        "oarsmith convert model.gguf model/",
    ),
    "export": Command(
        _REWRITE,
        "compile a model into a package that runs without its code",
        "oarsmith.jobs.export:run",
        "MODEL FOLDER",
        "oarsmith export model/ compiled/",
    ),
    "merge": Command(
        _REWRITE,
        "merge models, by any method, tensor by tensor; stack layers, make a mixture, extract an adapter",
        "oarsmith.jobs.merge:run",
        "RECIPE OUT",
        "oarsmith merge recipe.yaml merged/",
    ),
    "merge-adapter": Command(
        _REWRITE,
        "put an adapter into its base model and prove the merge, or take it off again",
        "oarsmith.jobs.merge_adapter:run",
        "ADAPTER [FOLDER]",
        "oarsmith merge-adapter runs/sft merged/",
    ),
    "quantize": Command(
        _REWRITE,
        "write a model in fewer bits, and prove what that cost",
        "oarsmith.jobs.quantize:run",
        "CONFIG | MODEL OUT",
        "oarsmith quantize model/ small/ --scheme w4a16 --calibration text.txt",
    ),
    "eval": Command(
        _LOOK,
        "measure a model: perplexity of a text, loss on rows, tasks of lm-evaluation-harness",
        "oarsmith.jobs.eval:run",
        "MODEL FILE",
        "oarsmith eval runs/sft test.jsonl",
    ),
    "bench": Command(
        _LOOK,
        "measure how fast a model answers: latency, throughput, memory; beside other engines",
        "oarsmith.jobs.bench:run",
        "MODEL",
        "oarsmith bench model/ --compare transformers",
    ),
    "preview": Command(
        _LOOK,
        "show the tokens a run would train on, coloured by loss weight",
        "oarsmith.jobs.preview:run",
        "CONFIG | MODEL DATA",
        "oarsmith preview model/ train.jsonl",
    ),
    "replay": Command(
        _LOOK,
        "run one training step that went wrong again, alone, and show it layer by layer",
        "oarsmith.jobs.replay:run",
        "FAILURE_FOLDER",
        "oarsmith replay runs/sft/failure-step-120 --dtype fp32",
        reads_config=False,
    ),
    "explain": Command(
        _LOOK,
        "say what a configuration key is, its value and where that came from",
        "oarsmith.jobs.explain:run",
        "[CONFIG | RUN] [KEY]",
        "oarsmith explain config.json learning_rate",
        reads_config=False,
    ),
    "models": Command(
        _LOOK, "list the model families", "oarsmith.jobs.models:run", "", "oarsmith models", reads_config=False
    ),
    "doctor": Command(
        _LOOK,
        "check this computer: PyTorch, CPU, memory, disk, packages",
        "oarsmith.jobs.doctor:run",
        "",
        "oarsmith doctor",
        reads_config=False,
    ),
}
