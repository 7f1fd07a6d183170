"""Groups of keys that jobs share. The names are the ones PaddleNLP and Hugging Face users already know.

Every description is what ``oarsmith COMMAND --help`` and ``oarsmith explain`` print: unit first, then the rule.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from .base import Biases, Bool, Float, Int, Ints, JobConfig, Strings

Dtype = Literal["auto", "bf16", "fp16", "fp32"]


class ModelKeys(JobConfig):
    title: ClassVar[str] = "Model"

    model_name_or_path: str = Field(
        description="The model: a Hugging Face directory, or a run folder of Oarsmith. Nothing is downloaded."
    )
    tokenizer_name_or_path: str | None = Field(
        None, description="A directory with the tokenizer. Not given: the model's own."
    )
    chat_template: str | None = Field(
        None,
        description="How a conversation becomes text: a template file (jinja, or PaddleNLP's chat_template.json), the "
        "name of a built-in one, or 'none' for plain text. Not given: the template that comes with the tokenizer.",
    )


class RuntimeKeys(JobConfig):
    title: ClassVar[str] = "Machine"

    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="Where to compute. auto: the GPU if PyTorch sees one, else the CPU."
    )
    dtype: Dtype = Field(
        "auto",
        description="Number format of the computation. auto: bf16 where the device computes in it natively, else fp32. "
        "PaddleNLP's bf16/fp16 switches are accepted and set this key.",
    )
    kernels: Literal["auto", "torch", "native"] = Field(
        "auto",
        description="Which implementation of the fast operations: native (compiled for this machine), torch (plain "
        "PyTorch, the reference) or auto (native if it can be built, else torch).",
    )
    num_threads: Int | None = Field(None, ge=1, description="CPU threads. Not given: what PyTorch chooses.")
    seed: Int = Field(42, ge=0, description="Everything random follows from this number.")


class LeftOutKeys(JobConfig):
    title: ClassVar[str] = "Data"

    on_malformed: Literal["error", "skip"] = Field(
        "error",
        description="What to do with a row that cannot be read: stop and name it, or leave it out and count it.",
    )
    max_dropped_fraction: Float = Field(
        0.2, ge=0, le=1, description="Stop if more than this share of the rows had to be left out (0.2 is 20 %)."
    )


class DataKeys(LeftOutKeys):
    title: ClassVar[str] = "Data"

    dataset_name_or_path: str = Field(
        description="Training rows: a file (jsonl, json, csv, parquet), a directory with train.* and optionally dev.* "
        "files, or the name of a dataset on the Hugging Face hub."
    )
    dataset_format: Literal["auto", "src_tgt", "alpaca", "sharegpt", "messages", "text"] = Field(
        "auto",
        description="What a row looks like: src_tgt (PaddleNLP), alpaca (instruction/input/output), sharegpt "
        "(conversations), messages (OpenAI) or text. auto: recognised by the first row's fields.",
    )
    train_on: Literal["assistant", "last", "all"] = Field(
        "assistant",
        description="Which tokens are learned: every assistant turn, only the last one, or all tokens of the row.",
    )
    max_length: Int = Field(
        2048,
        ge=2,
        description="Tokens in one row of a batch, and the longest sample. Longer ones are truncated, and counted.",
    )
    src_length: Int | None = Field(
        None,
        ge=1,
        description="Tokens the prompt keeps where prompt and answer together are longer than max_length. Not given: "
        "half of max_length.",
    )


class BatchKeys(JobConfig):
    title: ClassVar[str] = "Batches"

    per_device_train_batch_size: Int | None = Field(
        None,
        ge=1,
        description="Rows in one forward and backward pass; memory grows with it. Not given: 8 rows in pretraining; in "
        "fine-tuning 1 packed row of max_length tokens, or 8 samples without packing.",
    )
    gradient_accumulation_steps: Int = Field(
        1,
        ge=1,
        description="Passes added up before one optimizer step. The result equals one pass over all the rows: the loss "
        "is divided by the number of trained tokens of the whole step.",
    )


class PackingKeys(JobConfig):
    title: ClassVar[str] = "Packing"

    zero_padding: Bool = Field(
        True,
        description="Pack several samples into each row of max_length tokens (best fit), isolated from each other. "
        "false: one sample a row. PaddleNLP's greedy_zero_padding is another name of the same algorithm here.",
    )


class RunKeys(JobConfig):
    title: ClassVar[str] = "Run"

    output_dir: str = Field("runs/sft", description="The run folder: checkpoints, reports, resolved configuration.")
    overwrite_output_dir: Bool = Field(
        False, description="Start anew although output_dir holds checkpoints. They are not resumed from."
    )
    resume_from_checkpoint: str = Field(
        "auto",
        description="auto: go on from the last complete checkpoint in output_dir, if any. A path: from that one. none: "
        "start from the beginning.",
    )
    do_train: Bool = Field(True, description="Train. false: only evaluate.")
    do_eval: Bool | None = Field(
        None, description="Evaluate once more at the end. Not given: whenever there is an evaluation_strategy."
    )
    do_predict: Bool = Field(
        False,
        description="Score the result once, at the end, on what was set aside for it: the test.* file beside the "
        "training rows, in pretraining the third part of split.",
    )


class EvalRowKeys(JobConfig):
    title: ClassVar[str] = "Rows to evaluate on"

    eval_dataset_path: str | None = Field(
        None, description="Rows to evaluate on. Not given: the dev.* file beside the training rows, if there is one."
    )
    eval_split_ratio: Float = Field(
        0.0, ge=0, lt=1, description="Share of the training rows kept out of training to evaluate on (0.05 is 5 %)."
    )
    eval_with_do_generation: Bool = Field(
        False,
        description="Evaluations also let the model answer each row and compare with the row's answer: bleu4, rouge1, "
        "rouge2, rougel.",
    )
    save_generation_output: Bool = Field(
        False, description="Keep those answers in generated_output.json of the run folder (the newest evaluation's)."
    )


class SamplingKeys(JobConfig):
    title: ClassVar[str] = "Answers"

    max_new_tokens: Int = Field(256, ge=1, description="Longest answer, in tokens.")
    min_new_tokens: Int = Field(0, ge=0, description="Shortest answer, in tokens: nothing ends it before.")
    decode_strategy: Literal["greedy", "sampling"] | None = Field(
        None,
        description="greedy: always the likeliest token. sampling: draw. Not given: sampling if temperature, "
        "top_k, top_p, min_p, typical_p, n or best_of asks for it, else greedy.",
    )
    temperature: Float | None = Field(
        None, ge=0, description="Sampling: below 1 sharper, above 1 more random; 0 is greedy. Not given: 0.7."
    )
    top_k: Int = Field(0, ge=0, description="Sampling: only among the k likeliest tokens; 0: all.")
    top_p: Float = Field(
        1.0, gt=0, le=1, description="Sampling: only among the likeliest tokens that together have this probability."
    )
    min_p: Float = Field(
        0.0,
        ge=0,
        le=1,
        description="Sampling: only tokens at least this likely, as a share of the likeliest; 0: all.",
    )
    typical_p: Float = Field(
        1.0,
        gt=0,
        le=1,
        description="Sampling: only the tokens whose surprise is nearest to the expected one and that together have "
        "this probability; 1: all.",
    )
    repetition_penalty: Float = Field(1.0, gt=0, description="Above 1: tokens that occurred already are less likely.")
    presence_penalty: Float = Field(
        0.0, ge=-2, le=2, description="Above 0: tokens of the answer are less likely to come again."
    )
    frequency_penalty: Float = Field(
        0.0, ge=-2, le=2, description="Above 0: tokens are the less likely the more often the answer has them."
    )
    logit_bias: Biases = Field(
        {},
        description="Added to the logits of tokens, by id, from -100 to 100: '{\"1234\": -100}' never takes 1234.",
    )
    bad_words: Strings = Field(
        (), description="Texts that the answer does not get. Repeat the key for several, or give a JSON list."
    )
    system: str | None = Field(None, description="System message put before the conversation.")
    raw: Bool = Field(False, description="Continue the text as it is, without a chat template.")
    stop: Strings = Field((), description="Texts that end an answer. Repeat the key for several, or give a JSON list.")
    stop_ids: Ints = Field((), description="Token ids that end an answer, beside the tokenizer's own.")
    ignore_eos: Bool = Field(False, description="Go on after the model's own end, up to max_new_tokens.")
    json_schema: str | dict[str, Any] | None = Field(
        None,
        description="The answer is JSON that this schema allows: a file that holds it, or the schema itself. Needs "
        "oarsmith[constrained], as the four after it.",
    )
    json_object: Bool = Field(False, description="The answer is a JSON object.")
    regex: str | None = Field(None, description="The answer as a whole matches this regular expression.")
    grammar: str | None = Field(
        None, description="The answer matches this Lark grammar: a file that holds it, or its text."
    )
    choices: Strings = Field(
        (), description="The answer is one of these texts. Repeat the key for several, or give a JSON list."
    )

    @property
    def asks_for_draws(self) -> bool:
        """Whether a key beside temperature has an effect only when tokens are drawn."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0 or self.typical_p < 1

    @property
    def constraints(self) -> list[str]:
        """Keys that hold the answer to something."""
        names = ("json_schema", "json_object", "regex", "grammar", "choices")
        return [name for name in names if getattr(self, name) not in (None, False, ())]
