"""Reward models of every family: a head of one score in place of the vocabulary's."""

from __future__ import annotations

import torch

import oarsmith
from oarsmith.adapters.linear import attach
from oarsmith.adapters.parts import rewrite_of
from oarsmith.adapters.peft_layout import write_adapter
from oarsmith.checkpoint.hf import load_decoder
from oarsmith.config.load import load_config
from oarsmith.config.sft import SftConfig
from oarsmith.data.answers import Answered, make_answer_batch
from oarsmith.engine import Engine
from oarsmith.losses.reward import RewardLoss
from oarsmith.models import families
from oarsmith.models.decoder import Decoder
from oarsmith.models.init import reset_scores
from oarsmith.models.sharing import shares_beginnings
from random_adapter import randomise

from .bench import Bench, files
from .capabilities import close


def reward(bench: Bench) -> str:
    """Made of a model that writes; read back bit for bit, with an adapter too; trained; and as transformers has it."""
    config = families.scoring_config(bench.row.config, padding_id=0)
    model = load_decoder(bench.path, dtype=torch.float32, config=config)
    reset_scores(model, 3)
    _trains(bench, model)
    place = bench.folder / "reward"
    oarsmith.save_model(model, place)
    names, before = set(files(place)), set(files(bench.path))
    assert names - before == {"score.weight"} and len(before - names) <= 1, names ^ before
    texts = [bench.document(length, length) for length in (31, 17)]
    engine = Engine(oarsmith.load_model(place))
    found = engine.score(texts)
    expected = [float(model.eval()(torch.tensor([ids]))[0, -1, 0]) for ids in texts]
    close(torch.tensor(found), torch.tensor(expected))
    _with_adapter(bench, texts)
    theirs = _transformers(bench, texts)
    if theirs is None:
        return "yes"
    close(torch.tensor(found), theirs)
    return "transformers"


def _trains(bench: Bench, model: Decoder) -> None:
    """Every parameter that the score comes from has a gradient."""
    rows = []
    for length, seed in ((19, 31), (33, 32)):
        ids = torch.tensor(bench.document(length, seed)).int().numpy()
        cut = length - length // 3
        answers = (ids[cut:], ids[cut + 2 :])
        rows.append(Answered(prompt=ids[:cut], answers=answers, labels=(1.0, 0.0), where=str(seed)))
    batch = make_answer_batch(rows, share=shares_beginnings(model.spec))
    outcome = RewardLoss()(model.train(), batch, 1.0)
    outcome.loss.backward()
    assert model.head.weight is not None and model.head.weight.grad is not None
    assert float(model.head.weight.grad.abs().sum()) > 0 and model.embedding.weight.grad is not None
    model.zero_grad()


def _with_adapter(bench: Bench, texts: list[list[int]]) -> None:
    """LoRA and the head in one file, on the base that writes."""
    words = ["--model_name_or_path", str(bench.path), "--dataset_name_or_path", "none", "--lora", "--lora_rank", "2"]
    keys = load_config(SftConfig, None, words).config
    config = families.scoring_config(bench.row.config)
    model = load_decoder(bench.path, dtype=torch.float32, rewrite=rewrite_of(keys, bench.path), config=config)
    attach(model, 5)
    randomise(model, 0.1, 6)
    place = bench.folder / "reward-adapter"
    place.mkdir()
    write_adapter(model.eval(), place, base=str(bench.path))
    expected = [float(model(torch.tensor([ids]))[0, -1, 0]) for ids in texts]
    close(torch.tensor(Engine(oarsmith.load_model(bench.path, adapter=place)).score(texts)), torch.tensor(expected))


def _transformers(bench: Bench, texts: list[list[int]]) -> torch.Tensor | None:
    """What transformers gives, text by text; None: it has no such model."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(bench.folder / "reward") if bench.row.native else None
    if type(config) not in transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        return None
    model, report = transformers.AutoModelForSequenceClassification.from_pretrained(
        bench.folder / "reward", attn_implementation="eager", dtype=torch.float32, output_loading_info=True
    )
    odd = {key: sorted(names) for key, names in report.items() if names and key.endswith("_keys")}
    assert not odd, odd
    with torch.no_grad():
        return torch.stack([model.eval()(torch.tensor([ids])).logits[0, 0] for ids in texts])
