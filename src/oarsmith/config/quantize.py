"""Configuration of ``oarsmith quantize``: a model in fewer bits, with a proof of what that cost."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from .base import Bool, Float, Int, JobConfig, Patterns, Words
from .groups import Dtype, ModelKeys, RuntimeKeys

SchemeName = Literal["w8a16", "w4a16", "w3a16", "w2a16", "w8a8", "w8a8c8", "w4a8", "fp8", "fp8c8", "fp8_block", "nf4"]


class SchemeKeys(JobConfig):
    title: ClassVar[str] = "What is quantized"

    scheme: SchemeName = Field(
        "w4a16",
        description="Bits of weights (w), activations (a) and cache (c); 16 is as they are. w4a16: weights in 4 bits, "
        "for memory and speed. w8a8: both in int8. c8: keys and values in 8 bits with scales from calibration. fp8: "
        "weights and activations in E4M3; fp8_block: in blocks of 128 x 128, as DeepSeek-V3. nf4: QLoRA's 4 bits.",
    )
    group_size: Int | None = Field(
        None,
        ge=-1,
        description="Columns of a weight that share a scale; -1: a row. Not given: 64 below 8 bits, else a row. It "
        "must divide the inputs of every map; maps where it does not are named.",
    )
    symmetric: Bool | None = Field(
        None,
        description="Integers without zeros. Not given: true for 8 bits; below that false, which keeps more of a small "
        "model.",
    )
    skip_list_names: Words = Field(
        (), description="Maps that stay as they are: parts of their names in the files, separated by commas."
    )
    overrides: Patterns = Field(
        {},
        description='Other schemes for some maps, by patterns of their names: \'{"*.down_proj": "w8a16"}\'. none: as '
        "they are.",
    )
    act_quant: Literal["dynamic", "static"] = Field(
        "dynamic",
        description="Schemes with activations: a scale for each token as it comes, or one for all, from calibration.",
    )
    act_quant_method: Literal["abs_max", "avg"] = Field(
        "abs_max", description="Static scales: from the largest number seen, or the mean of each batch's largest."
    )
    cachekv_quant_method: Literal["abs_max_headwise", "avg_headwise", "abs_max"] = Field(
        "abs_max_headwise", description="Scales of the cache: a head each, or one for a layer (abs_max)."
    )


class AlgorithmKeys(JobConfig):
    title: ClassVar[str] = "How"

    algorithm: Literal["auto", "rtn", "gptq", "gptaq", "awq", "hqq", "autoround"] = Field(
        "auto",
        description="How weights are rounded. rtn: to the nearest. gptq: what a column loses is made up by those after "
        "it. gptaq: also for what earlier layers lost. awq: channels that matter are scaled up first. hqq: zeros "
        "fitted without data. autoround: learned up or down. auto: gptaq below 8 bits and for fp8, rtn for int8.",
    )
    scale_search: Literal["auto", "range", "mse", "weighted"] = Field(
        "auto",
        description="Scales of groups: from their range, or searched for the least error, plain (mse) or weighted by "
        "the inputs. auto: weighted where there is calibration and weights are not int8, else range.",
    )
    rotate: Bool = Field(
        False,
        description="Turn the residual stream into a Hadamard basis first, folded into the weights: fewer outliers. "
        "Needs RMSNorm before each part; the head gets a matrix of its own.",
    )
    smooth: Literal["auto", "none", "smoothquant", "piecewise"] = Field(
        "auto",
        description="Move outliers from activations into weights: SmoothQuant's factors, or factors searched piece by "
        "piece for the least error (PaddleNLP). auto: piecewise for int8 activations where there is calibration.",
    )
    smooth_all_linears: Bool | None = Field(
        None,
        description="Smooth also behind attention and the activation, not only what reads a norm. Not given: true for "
        "piecewise.",
    )
    smooth_alpha: Float = Field(0.5, ge=0, le=1, description="SmoothQuant: how much is moved.")
    smooth_k_piece: Int = Field(3, ge=1, description="piecewise: pieces, of channels with like activations.")
    smooth_search_piece: Bool = Field(False, description="piecewise: search the number of pieces too, up to 6.")
    search_alpha_min: Float = Field(0.2, ge=0, le=1, description="piecewise: least alpha.")
    search_alpha_max: Float = Field(0.8, ge=0, le=1, description="piecewise: largest alpha.")
    search_scale_min: Float = Field(1.0, gt=0, description="piecewise: least factor.")
    search_scale_max: Float = Field(5.0, gt=0, description="piecewise: largest factor.")
    shift: Bool = Field(
        False,
        description="Centre the channels of activations first (Outlier Suppression+); needs biases in norms and maps.",
    )
    auto_clip: Bool = Field(False, description="awq: also search how far each group is clipped.")
    act_order: Bool = Field(True, description="gptq: columns with large inputs first.")
    static_groups: Bool = Field(
        True,
        description="gptq: scales found on the weights as they were. false: at a group's turn, on what it is by then; "
        "with act_order columns then go group by group.",
    )
    damp_percent: Float = Field(0.01, gt=0, lt=1, description="gptq: share of the mean added to the diagonal.")
    gptaq_alpha: Float = Field(0.25, ge=0, le=1, description="gptaq: weight of what earlier layers lost.")
    autoround_steps: Int = Field(200, ge=1, description="autoround: steps for each layer.")


class CalibrationKeys(JobConfig):
    title: ClassVar[str] = "Calibration"

    calibration: str | None = Field(
        None,
        description="Text (.txt) or rows (src/tgt, messages, text ...) that stand for what the model will read. Not "
        "needed for rtn and hqq of weights alone.",
    )
    calibration_samples: Int = Field(16, ge=1, description="Pieces of text that are read.")
    calibration_length: Int = Field(512, ge=16, description="Tokens of a piece.")
    calibration_on_disk: Bool = Field(
        False, description="Keep activations in files of the output's folder: memory for one layer, for large models."
    )


class ProofKeys(JobConfig):
    title: ClassVar[str] = "Proof"

    proof_text: str | None = Field(
        None,
        description="Text or rows that calibration does not see: perplexity, KL divergence and agreement are measured "
        "there. Not given: the end of the calibration file, which is then left out of calibration.",
    )
    measure_speed: Bool = Field(True, description="Also let both models write some text, and say how fast they do.")
    proof_samples: Int = Field(6, ge=1, description="Windows of the text that are compared.")
    proof_length: Int = Field(1024, ge=16, description="Tokens of a window.")
    kl_budget: Float | None = Field(
        None, gt=0, description="Largest KL divergence from the original, in nats. Not given: any, and it is told."
    )
    on_over_budget: Literal["refuse", "warn"] = Field(
        "refuse", description="A model that differs more than kl_budget: do not write it, or write it and say so."
    )
    budget: str | None = Field(
        None,
        pattern=r"^kl=\d*\.?\d+([eE][+-]?\d+)?$",
        description="kl=X: search the bits of each layer (2, 3, 4, 8) so that the model is as small as KL divergence X "
        "allows.",
    )


class QuantizeConfig(ModelKeys, SchemeKeys, AlgorithmKeys, CalibrationKeys, ProofKeys, RuntimeKeys):
    """All keys of ``oarsmith quantize``."""

    title: ClassVar[str] = "Quantization"
    command: ClassVar[str] = "quantize"
    positional: ClassVar[tuple[str, ...]] = ("model_name_or_path", "output_dir")

    output_dir: str = Field(description="Where the quantized model goes: a Hugging Face directory, or a .gguf file.")
    layout: Literal["auto", "compressed-tensors", "gptq", "gptq_v2", "awq", "fp8", "gguf", "paddle", "bitsandbytes"] = (
        Field(
            "auto",
            description="What the files look like. compressed-tensors: vLLM, transformers. gptq, awq: theirs; "
            "gptq_v2 stores zeros as they are, which only newer readers know. fp8: "
            "DeepSeek's. gguf: llama.cpp. paddle: PaddleNLP's, with weight_scales.json. auto: compressed-tensors; "
            "gptq_v2 for 3 bits; bitsandbytes for nf4; gguf where output_dir ends in .gguf.",
        )
    )
    dtype: Dtype = Field(
        "auto",
        description="Number format of what stays in floats. auto: that of the files. Calibration and proof are fp32.",
    )
    overwrite: Bool = Field(False, description="Replace output_dir if it exists.")

    @property
    def chosen_algorithm(self) -> str:
        """The algorithm, also where it is auto: 256 steps lose too little for more than rounding, E4M3 does not."""
        if self.algorithm != "auto":
            return self.algorithm
        nearest = self.scheme.startswith(("w8", "nf4")) or self.calibration is None
        return "rtn" if nearest else "gptaq"
