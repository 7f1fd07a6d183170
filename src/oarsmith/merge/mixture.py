"""A mixture of experts from dense models: a Mixtral whose experts are the models' feed-forward parts (mergekit-moe).

Everything else is the base's. Routers are directions: the states that the base has for each expert's prompts, so tokens
go to the expert whose prompts they are like.

Shapes: L layers, N experts, T tokens, D hidden size.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from oarsmith.checkpoint.fill import file_infos
from oarsmith.errors import ConfigError, ModelError
from oarsmith.loading import load_model
from oarsmith.merge.job import TensorJob
from oarsmith.merge.models import MergeModel
from oarsmith.merge.plan import Plan, Source, TensorTask
from oarsmith.merge.recipe import model_name
from oarsmith.models import families
from oarsmith.text import load_tokenizer

Gate = Literal["hidden", "cheap_embed", "random"]
_DENSE = ("llama", "mistral")
_EXPERT = re.compile(r"(.*)\.block_sparse_moe\.experts\.(\d+)\.(w[123])\.weight")
_ROUTER = re.compile(r"model\.layers\.(\d+)\.block_sparse_moe\.gate\.weight")
_PARTS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


@dataclass(frozen=True)
class ExpertSpec:
    """An expert: whose feed-forward parts it has, and texts that are to go to it, or not."""

    model: str
    positive: tuple[str, ...]
    negative: tuple[str, ...]


def read_experts(entries: Sequence[object], gate: Gate, per_token: int) -> tuple[ExpertSpec, ...]:
    """The experts of a recipe.

    Raises:
        ConfigError: an entry that is none, no prompts where routers are made of them, the same ones for all.
    """
    found = tuple(_expert(entry, f"experts[{index}]") for index, entry in enumerate(entries))
    if len(found) < max(per_token, 2):
        raise ConfigError(
            f"{len(found)} experts, and {per_token} for each token", where="experts", fix="name two or more"
        )
    if gate != "random":
        without = [one.model for one in found if not one.positive]
        if without:
            raise ConfigError(
                f"the expert {without[0]} has no positive_prompts, of which gate_mode {gate} makes its router",
                where="experts",
                fix="give some texts that it is for, or gate_mode: random and train the routers",
            )
        if len({(one.positive, one.negative) for one in found}) == 1:
            raise ConfigError(
                "all experts have the same prompts, so all tokens would go to all of them alike",
                where="experts",
                fix="give each expert texts that it is for",
            )
    return found


def _expert(entry: object, where: str) -> ExpertSpec:
    keys = ("source_model", "positive_prompts", "negative_prompts")
    if not isinstance(entry, dict) or "source_model" not in entry or set(entry) - set(keys):
        odd = sorted(set(entry) - set(keys)) if isinstance(entry, dict) else []
        what = f"unknown key '{odd[0]}'" if odd else "an expert names its source_model"
        raise ConfigError(what, where=where, fix=f"its keys are {', '.join(keys)}")
    prompts = []
    for key in keys[1:]:
        texts = entry.get(key) or []
        if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
            raise ConfigError(f"{key} must be a list of texts", where=where, fix="write - TEXT lines")
        prompts.append(tuple(texts))
    return ExpertSpec(model_name(entry["source_model"], where), prompts[0], prompts[1])


def mixture_planner(
    experts: Sequence[ExpertSpec], base: str, gate: Gate, per_token: int, dtype: torch.dtype | None, seed: int
) -> Callable[[Sequence[MergeModel]], Plan]:
    """Makes the plan of a mixture of opened models, of which one is the base."""

    def plan(models: Sequence[MergeModel]) -> Plan:
        number = {model.reference: index for index, model in enumerate(models)}
        home = models[number[base]]
        _require_alike(models, home)
        config = _config(home, len(experts), per_token)
        family, spec = families.build_spec(config)
        wanted = dtype or home.dtype
        infos = file_infos(spec, config, family.names(spec), wanted)
        gates_LND = _gates(experts, home, gate, seed)
        tasks = []
        for name, info in infos.items():
            value, source = None, Source(number[base], name)
            if (router := _ROUTER.fullmatch(name)) is not None:
                value = gates_LND[int(router.group(1))].to(info.dtype).contiguous()
            elif (expert := _EXPERT.fullmatch(name)) is not None:
                layer, index, part = expert.groups()
                own = f"{layer}.mlp.{_PARTS[part]}.weight"
                source = Source(number[experts[int(index)].model], own)
            sources = () if value is not None else (source,)
            tasks.append(TensorTask(name, info.shape, info.dtype, sources, None, ({"scale": 1.0},), {}, value=value))
        return Plan(tuple(tasks), config, number[base], ())

    return plan


def _require_alike(models: Sequence[MergeModel], home: MergeModel) -> None:
    for model in models:
        kind = model.config.get("model_type")
        if kind not in _DENSE or model.config.get("attention_bias") or model.config.get("mlp_bias"):
            raise ModelError(
                f"a Mixtral is made of Llama and Mistral models without biases, not of {kind}",
                where=model.reference,
                fix="use models of these families",
            )
        for name, shape in home.shapes.items():
            if model.shapes.get(name) != shape:
                raise ModelError(
                    f"tensor {name} has shape {model.shapes.get(name)} in {model.reference} and {shape} in "
                    f"{home.reference}",
                    where=name,
                    fix="make mixtures of models of one size",
                )


def _config(home: MergeModel, num_experts: int, per_token: int) -> dict[str, Any]:
    config: dict[str, Any] = {
        key: value for key, value in home.config.items() if key not in ("attention_bias", "mlp_bias", "pretraining_tp")
    }
    return config | {
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "num_local_experts": num_experts,
        "num_experts_per_tok": per_token,
        "rope_theta": config.get("rope_theta", 10000.0),
        "rms_norm_eps": config.get("rms_norm_eps", 1e-6),
        "num_key_value_heads": config.get("num_key_value_heads", config["num_attention_heads"]),
        "sliding_window": config.get("sliding_window") if config["model_type"] == "mistral" else None,
        "output_router_logits": False,
    }


def _gates(experts: Sequence[ExpertSpec], home: MergeModel, gate: Gate, seed: int) -> Tensor:
    """Routers [L, N, D], rows of length 1 where prompts make them."""
    num_layers, dim = home.num_layers, int(home.config["hidden_size"])
    if gate == "random":
        job = TensorJob("routers", None, (), (), {}, torch.float32, seed)
        generator = torch.Generator().manual_seed(job.key("router", 0) % (1 << 63))
        return torch.randn(num_layers, len(experts), dim, generator=generator)
    tokenizer = load_tokenizer(home.files.base)
    states = _states(home) if gate == "hidden" else _embeddings(home, num_layers)
    rows = []
    for one in experts:
        mean_LD = torch.stack([states(tokenizer.encode(text)) for text in one.positive]).mean(0)
        if one.negative:
            mean_LD = mean_LD - torch.stack([states(tokenizer.encode(text)) for text in one.negative]).mean(0)
        rows.append(mean_LD / mean_LD.norm(dim=-1, keepdim=True).clamp(min=1e-8))
    return torch.stack(rows, dim=1)


def _embeddings(home: MergeModel, num_layers: int) -> Callable[[list[int]], Tensor]:
    table = home.read("model.embed_tokens.weight")
    return lambda ids: table[ids].float().mean(0).expand(num_layers, -1)


def _states(home: MergeModel) -> Callable[[list[int]], Tensor]:
    """From ids to what the last of them brings into each layer, [L, D]."""
    model = load_model(home.files.base, adapter=home.files.adapter)
    caught: dict[int, Tensor] = {}

    def catch(index: int) -> Callable[..., None]:
        def hook(module: object, inputs: tuple[Any, ...]) -> None:
            caught[index] = inputs[0].detach().float().clone()  # what comes may be written over

        return hook

    for index in range(home.num_layers):
        model.get_submodule(f"layers.{index}").register_forward_pre_hook(catch(index))

    @torch.no_grad()
    def states(ids: list[int]) -> Tensor:
        model(torch.tensor([ids]))
        # Rows behind the text's are padding.
        return torch.stack([caught[index][len(ids) - 1] for index in range(home.num_layers)])

    return states


def expert_values(experts: Sequence[ExpertSpec], base: str, gate: Gate, per_token: int) -> Mapping[str, Any]:
    """The mixture as YAML has it."""
    entries = [
        {"source_model": one.model, "positive_prompts": list(one.positive), "negative_prompts": list(one.negative)}
        for one in experts
    ]
    return {"base_model": base, "gate_mode": gate, "experts_per_token": per_token, "experts": entries}
