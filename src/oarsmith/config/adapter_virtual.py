"""Keys of methods on prompts, caches, hidden states, single rows and biases."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field

from .base import Bool, Float, Int, JobConfig, _to_words

# Methods that are no change of projections, with a learning rate that suits most models: what trains is far smaller, or
# farther from the output, than LoRA's matrices.
PART_RATES = {
    "prefix_tuning": 1e-2,
    "prompt_tuning": 3e-2,
    "p_tuning": 1e-3,
    "reft": 2e-3,
    "bitfit": 1e-3,
    "trainable_tokens": 1e-3,
}
PARTS = frozenset(PART_RATES)
# Methods with virtual tokens before every text.
WITH_VIRTUAL = frozenset({"prefix_tuning", "prompt_tuning", "p_tuning"})
# Methods that no plain model does the same as.
UNMERGEABLE = WITH_VIRTUAL | {"reft", "bottleneck"}


def _to_tokens(value: object) -> object:
    """Ids and tokens; one of them may stand for itself."""
    if isinstance(value, int) and not isinstance(value, bool):
        value = [value]
    if isinstance(value, (list, tuple)):
        value = [str(item) if isinstance(item, int) and not isinstance(item, bool) else item for item in value]
    return _to_words(value)


TokenNames = Annotated[tuple[str, ...], BeforeValidator(_to_tokens)]


class VirtualKeys(JobConfig):
    title: ClassVar[str] = "Adapters"

    num_prefix_tokens: Int = Field(
        128,
        ge=1,
        description="Prefix tuning: virtual tokens before each text, with keys and values in all layers.",
    )
    prefix_projection: Bool = Field(
        False, description="Prefix tuning: train a small network that makes the keys and values; the file has those."
    )
    prefix_projection_hidden_size: Int | None = Field(
        None, ge=1, description="Prefix tuning: width of that network. Not given: the model's hidden size."
    )
    prefix_dropout: Float = Field(0.0, ge=0, lt=1, description="Prefix tuning: dropout on the keys and values.")
    num_prompt_tokens: Int = Field(
        20, ge=1, description="Prompt tuning and P-tuning: virtual tokens before each text, each with a trained vector."
    )
    prompt_tuning_init: Literal["sample_vocab", "random"] = Field(
        "sample_vocab", description="Prompt tuning: the vectors begin as those of random tokens, or as random numbers."
    )
    prompt_tuning_init_text: str | None = Field(
        None, description="Prompt tuning: they begin as this text's, repeated or cut to their number."
    )
    p_tuning_encoder: Literal["mlp", "lstm"] = Field(
        "mlp", description="P-tuning: the network that makes the vectors in training; the file has those."
    )
    p_tuning_hidden_size: Int | None = Field(
        None, ge=1, description="P-tuning: its width. Not given: the model's hidden size."
    )
    p_tuning_layers: Int = Field(2, ge=1, le=16, description="P-tuning: layers of an LSTM.")
    p_tuning_dropout: Float = Field(0.0, ge=0, lt=1, description="P-tuning: dropout between those.")
    reft_layers: TokenNames = Field(
        (), description="ReFT: numbers of the layers whose outputs are edited, from 0. Not given, or all: every layer."
    )
    reft_position: str = Field(
        "f7+l7",
        pattern=r"^(f\d{1,4}|l\d{1,4}|f\d{1,4}\+l\d{1,4})$",
        description="ReFT: which tokens of a prompt: f7 the first 7, l7 the last 7, f7+l7 both; at most half of it "
        "each.",
    )
    reft_intervention_type: Literal["loreft", "tiny"] = Field(
        "loreft",
        description="ReFT: loreft moves states within a trained subspace of lora_rank dimensions; tiny adds a scaled "
        "product of two matrices of that rank.",
    )
    reft_act_fn: Literal["linear", "relu"] = Field("linear", description="ReFT: on what loreft moves states towards.")
    reft_add_bias: Bool = Field(False, description="ReFT: a bias in what loreft moves states towards.")
    reft_dropout: Float = Field(0.0, ge=0, lt=1, description="ReFT: dropout on edited states.")
    trainable_tokens: TokenNames = Field(
        (),
        description="Rows of the embedding that train: ids or tokens, separated by commas (a number is an id). Beside "
        "another method, or alone with adapter_type trainable_tokens.",
    )
    lora_bias: Literal["none", "all", "lora_only"] = Field(
        "none", description="Train the model's biases beside LoRA: all, or those of the layers LoRA sits on."
    )
