"""The columns of the support table. Each function tries one capability on one row and raises where it fails.

What it returns is the cell: "yes", or the oracle it was held against; :class:`NotApplicable` says why there is none.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

import oarsmith
import remote_tokenizers
from oarsmith import Engine, Sampling
from oarsmith.adapters.linear import attach
from oarsmith.adapters.lora import Lora
from oarsmith.adapters.merge import merge_adapter, mergeable
from oarsmith.adapters.methods import METHODS, changes_of
from oarsmith.adapters.peft_layout import adapter_rewrite, adapter_tensors, load_adapter_weights, write_adapter
from oarsmith.adapters.targets import adapt_rewrite, match_targets
from oarsmith.checkpoint.hf import load_decoder
from oarsmith.config.load import load_config
from oarsmith.config.pretrain import PretrainConfig
from oarsmith.config.sft import SftConfig
from oarsmith.data.batch import make_batch
from oarsmith.data.corpus.indexed import IndexedBuilder
from oarsmith.errors import ConfigError
from oarsmith.jobs.optimizers import make_optimizer
from oarsmith.jobs.pretrain import opening
from oarsmith.jobs.start import Start
from oarsmith.loading import new_model
from oarsmith.losses.token import TokenCrossEntropy
from oarsmith.methods.pretrain import build_data
from oarsmith.methods.sft import OBJECTIVE
from oarsmith.models import families
from oarsmith.models.decoder import Decoder
from oarsmith.models.fresh import fresh_config
from oarsmith.models.init import init_weights
from oarsmith.models.layout import Layout
from oarsmith.models.recompute import Granularity, Recompute
from oarsmith.models.sharing import shares_beginnings
from oarsmith.training.optimizer import AdamW, AdamWSettings
from oarsmith.training.step import run_step
from tiny import one_step

from .bench import FIRST_ID, LAST_ID, Bench, files, packed_logits
from .rows import FIXTURES

# fp32 on both sides, sums in another order; logits are of size 1 to 30.
TOLERANCE = 2e-4


class NotApplicable(Exception):  # noqa: N818  (not an error: a cell with a reason)
    """The cell stays empty, and this is why."""


@dataclass(frozen=True)
class Capability:
    """A column: its heading, what a mark in it means, and the function that earns the mark."""

    title: str
    meaning: str
    run: Callable[[Bench], str]


def close(found: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


def same_files(found: Path, expected: Path, ignore: Callable[[str], bool] = lambda _: False) -> None:
    """Bit for bit: names, dtypes, values."""
    ours, theirs = files(found), {name: value for name, value in files(expected).items() if not ignore(name)}
    assert ours.keys() == theirs.keys(), sorted(ours.keys() ^ theirs.keys())[:5]
    for name, (dtype, tensor) in theirs.items():
        assert ours[name][0] == dtype and torch.equal(ours[name][1], tensor), name


def load_and_save(bench: Bench) -> str:
    """The released layout, written by others where there are others, comes back bit for bit."""
    out = bench.folder / "again"
    if bench.fixture is not None:
        model = load_decoder(bench.fixture)
        oarsmith.save_model(model, out)
        stored = families.find(model.config).names(model.spec).places
        known = {model.file_names.get(place.file, place.file) for place in stored}
        same_files(out, bench.fixture, ignore=lambda name: name not in known)
        return "yes"
    source = bench.path
    if bench.row.native:
        source = bench.folder / "theirs"
        bench.oracle.save_pretrained(source)
        shutil.copy(bench.path / "config.json", source)
    oarsmith.save_model(load_decoder(source), out)
    same_files(out, source)
    return "yes"


@torch.no_grad()
def same_logits(bench: Bench) -> str:
    if bench.row.native:
        for seed in (1, 2):
            ids = torch.tensor([bench.document(40, seed)])
            expected = bench.oracle(ids).logits
            assert expected.std() > 0.1
            close(bench.model()(ids), expected)
        return "transformers"
    if bench.fixture is None:
        ids = torch.tensor([bench.document(40, 1)])
        close(bench.model()(ids), _baichuan_as_llama(bench)(ids).logits)
        return "transformers"
    expected = np.load(bench.fixture / "expected.npz")
    model = load_decoder(bench.fixture, dtype=torch.float32).eval()
    lengths = expected["lengths"].tolist() if "lengths" in expected else [expected["input_ids"].shape[1]]
    ids, logits = torch.from_numpy(expected["input_ids"]), torch.from_numpy(expected["logits"])
    close(model(ids[:1, : lengths[0]])[0], logits[0, : lengths[0]], 5e-4)
    return "authors' code"


def _baichuan_as_llama(bench: Bench) -> Any:
    """Baichuan 2 7B in transformers: a Llama with W_pack cut in three and the head's rows divided by their length."""
    import transformers

    tensors, config = {name: tensor.float() for name, (_, tensor) in files(bench.path).items()}, bench.row.config
    for name in [name for name in tensors if "W_pack" in name]:
        packed = tensors.pop(name)
        for part, rows in zip("qkv", packed.chunk(3), strict=True):
            tensors[name.replace("W_pack", f"{part}_proj")] = rows
    tensors["lm_head.weight"] = functional.normalize(tensors["lm_head.weight"])
    same = {key: config[key] for key in config if key not in ("model_type", "architectures", "auto_map", "torch_dtype")}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**same, attn_implementation="eager"))
    model.load_state_dict(tensors)
    return model.eval()


def generate(bench: Bench) -> str:
    """The engine, two prompts of different lengths at once, greedy."""
    if bench.fixture is not None:
        recorded = np.load(bench.fixture / "expected.npz")
        engine = Engine(load_decoder(bench.fixture, dtype=torch.float32).eval())
        prompts = [recorded["input_ids"][0].tolist()]
        count = min(len(recorded["greedy"]), engine.context_length - len(prompts[0]))
        expected = [recorded["greedy"][:count].tolist()]
    else:
        engine, count = Engine(bench.model()), 8
        prompts = [bench.document(length, seed=length) for length in (9, 21)]
        expected = [_oracle_greedy(bench, prompt, count) for prompt in prompts]
    sampling = Sampling(max_new_tokens=count, ignore_eos=True)
    assert [list(answer.ids) for answer in engine.generate(prompts, sampling)] == expected
    return "yes"


@torch.no_grad()
def _oracle_greedy(bench: Bench, prompt: list[int], count: int) -> list[int]:
    """Without a cache on our side, with one on transformers'."""
    if not bench.row.native:
        model, ids = bench.model(), list(prompt)
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
        return ids[len(prompt) :]
    ids = torch.tensor([prompt])
    past, found = None, []
    for _ in range(count):
        out = bench.oracle(ids, past_key_values=past, use_cache=True)
        past, ids = out.past_key_values, out.logits[:, -1:].argmax(-1)
        found.append(int(ids))
    return found


def _steps(model: Decoder, bench: Bench, count: int = 3) -> list[float]:
    """Mean loss of some updates of the trainable parameters on one batch."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    optimizer = AdamW(trained, AdamWSettings())
    batch = bench.batch
    results = [run_step(model, OBJECTIVE, [batch], optimizer, lr=3e-3, max_grad_norm=1.0) for _ in range(count)]
    return [result.total / result.count for result in results]


def full_sft(bench: Bench) -> str:
    """All weights move, the loss falls, and what is saved is what was trained."""
    model = bench.model().train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = _steps(model, bench)
    assert losses[0] > losses[1] > losses[2], losses
    still = [name for name, p in model.named_parameters() if p.requires_grad and torch.equal(p, before[name])]
    assert not still, still
    oarsmith.save_model(model, bench.folder / "trained")
    again, document = load_decoder(bench.folder / "trained").eval(), bench.document(15, 3)
    # Mapped memory is aligned otherwise, and so are the sums of products.
    close(packed_logits(again, [document])[0], packed_logits(model.eval(), [document])[0], 1e-5)
    return "yes"


def lora(bench: Bench) -> str:
    """On every projection: only adapters move, they survive PEFT's layout, and merging changes no logits."""

    change = Lora(rank=2, alpha=4.0)
    model = load_decoder(
        bench.path, rewrite=adapt_rewrite(lambda modules: dict.fromkeys(match_targets(modules, "all-linear"), change))
    )
    attach(model, seed=0)
    plain = bench.model()
    losses = _steps(model.train(), bench)
    assert losses[0] > losses[2], losses
    base = {name: p for name, p in model.named_parameters() if ".adapter." not in name}
    assert all(torch.equal(base[name], p) for name, p in plain.named_parameters())
    moved: dict[str, bool] = {}
    for key, tensor in adapter_tensors(model).items():
        # A random router may leave an expert without a token.
        kind = re.sub(r"experts\.\d+\.", "experts.", key)
        moved[kind] = moved.get(kind, False) or bool(tensor.any())
    assert all(moved.values()), moved
    folder = bench.folder / "adapter"
    folder.mkdir()
    write_adapter(model, folder, base="base")
    again = load_decoder(bench.path, rewrite=adapter_rewrite(folder)).eval()
    attach(again, seed=1)
    load_adapter_weights(again, folder)
    documents = [bench.document(15, 3)]
    expected = packed_logits(model.eval(), documents)[0]
    close(packed_logits(again, documents)[0], expected, 1e-5)
    assert not torch.allclose(packed_logits(plain, documents)[0], expected)
    merged = merge_adapter(model)
    close(packed_logits(merged, documents)[0], expected)
    oarsmith.save_model(merged, bench.folder / "merged")
    return "yes"


def adapters(bench: Bench) -> str:
    """Every other method on every projection it takes: its file gives the same model back, and merging changes nothing.

    What does not fit is named: blocks have to divide a layer's width.
    """
    missing, documents = [], [bench.document(13, 3)]
    plain = packed_logits(bench.model(), documents)[0]
    for method in METHODS:
        if method.name == "lora":
            continue
        words = ["--model_name_or_path=m", "--dataset_name_or_path=d", f"--adapter_type={method.name}"]
        keys = load_config(SftConfig, None, words).config
        try:
            model = load_decoder(bench.path, rewrite=adapt_rewrite(lambda places, keys=keys: changes_of(keys, places)))
        except ConfigError:
            missing.append(method.name)
            continue
        attach(model.eval(), seed=0)
        close(packed_logits(model, documents)[0], plain, 1e-4)
        _moved(model)
        expected = packed_logits(model, documents)[0]
        assert not torch.allclose(expected, plain, atol=1e-4), method.name
        folder = bench.folder / f"adapter-{method.name}"
        folder.mkdir()
        write_adapter(model, folder, base="base")
        again = load_decoder(bench.path, rewrite=adapter_rewrite(folder)).eval()
        attach(again, seed=1)
        load_adapter_weights(again, folder)
        close(packed_logits(again, documents)[0], expected, 1e-4)
        if mergeable(model):
            close(packed_logits(merge_adapter(model), documents)[0], expected, 1e-3)
    return f"not {', '.join(missing)}" if missing else "yes"


@torch.no_grad()
def _moved(model: Decoder) -> None:
    """Everything that trains, a little away from where it begins."""
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def packing(bench: Bench) -> str:
    """One pack gives the loss and gradients of its documents one by one; nobody sees a neighbour or the future."""
    model = bench.model().train()
    packed = one_step(model, [bench.batch])
    apart = one_step(model, [make_batch([sample]) for sample in bench.samples])
    assert math.isclose(packed.loss, apart.loss, rel_tol=1e-5), (packed.loss, apart.loss)
    whole = math.sqrt(sum(float(grad.norm()) ** 2 for grad in apart.grads.values()))
    for name, grad in apart.grads.items():
        # Sums over other groups of rows; some gradients are zero but for rounding (a key's bias).
        error, limit = float((packed.grads[name] - grad).norm()), 1e-4 * float(grad.norm()) + 1e-6 * whole
        assert error <= limit, (name, error, limit)
    _visibility(bench, model)
    _visibility(bench, model.eval())  # some rules hold in one mode only
    return "yes"


def _visibility(bench: Bench, model: Decoder) -> None:
    """By perturbation, in the middle of a pack."""
    first, own, last = bench.document(9, 11), bench.document(24, 12), bench.document(7, 13)
    expected = packed_logits(model, [first, own, last])[1]
    close(packed_logits(model, [bench.document(14, 21), own, bench.document(5, 22)])[1], expected, 1e-5)
    start = 0 if bench.prefix_rule is None else own.index(bench.prefix_rule.start_id)

    def changed(index: int) -> Tensor:
        """How much each token's logits move when one token becomes another."""
        other = [*own[:index], own[index] + 1, *own[index + 1 :]]
        return (packed_logits(model, [first, other, last])[1] - expected).abs().amax(-1)

    moved = changed(len(own) - 4)
    assert moved[: len(own) - 4].max() < 1e-5 < 1e-3 < moved[len(own) - 4 :].min(), moved
    if start:  # the prefix is read in both directions, and reaches what follows
        moved = changed(start - 2)
        assert moved.min() > 1e-4, moved


def shared_prompt(bench: Bench) -> str:
    """A prompt that lies in the stream once gives its answers what each has behind a prompt of its own."""
    model = bench.model().train()
    if not shares_beginnings(model.spec):
        return "apart"
    pairs = []
    for length, seed in ((19, 31), (33, 32)):
        document, other = bench.document(length, seed), bench.document(length, seed + 10)
        cut = length - length // 3
        pairs.append((document[:cut], document[cut:], other[cut : cut + 4]))
    whole = [prompt + answer for prompt, *answers in pairs for answer in answers]
    stream, source = [], []
    for prompt, *answers in pairs:
        start = len(stream)
        stream += prompt
        for answer in answers:
            source += [*range(start, start + len(prompt)), *range(len(stream), len(stream) + len(answer))]
            stream += answer
    bounds = [0, *np.cumsum([len(document) for document in whole]).tolist()]
    layout = Layout.branching(bounds, torch.tensor(source))
    for mode in (model.train(), model.eval()):
        apart = torch.cat(packed_logits(mode, whole))
        with torch.no_grad():
            shared = mode.logits(mode.hidden(torch.tensor(stream), layout))
        close(shared[torch.tensor(source)], apart, 1e-5)
    _same_gradients(bench.model().train(), torch.tensor(stream), layout, whole)
    return "yes"


def _same_gradients(model: Decoder, stream_T: Tensor, layout: Layout, whole: list[list[int]]) -> None:
    """Of a sum over all documents' logits, those of the shared prompt counted for each."""
    assert layout.branches is not None
    source_E = layout.branches.source_E
    weight_EV = torch.randn(len(source_E), model.spec.vocab_size, generator=torch.Generator().manual_seed(0))
    parameters = [p for p in model.parameters() if p.requires_grad]
    own = (model.logits(model.hidden(stream_T, layout))[source_E] * weight_EV).sum()
    ids = torch.tensor([token for document in whole for token in document])
    bounds = [0, *np.cumsum([len(document) for document in whole]).tolist()]
    positions = torch.cat([torch.arange(len(document)) for document in whole])
    other = (model.logits(model.hidden(ids, Layout.documents(bounds, positions))) * weight_EV).sum()
    found = torch.autograd.grad(own, parameters, allow_unused=True)
    expected = torch.autograd.grad(other, parameters, allow_unused=True)
    size = math.sqrt(sum(float(g.norm()) ** 2 for g in expected if g is not None))
    for one, wanted in zip(found, expected, strict=True):
        assert (one is None) == (wanted is None)
        if one is not None and wanted is not None:
            assert float((one - wanted).norm()) <= 1e-4 * float(wanted.norm()) + 1e-5 * size


def recompute(bench: Bench) -> str:
    """Running blocks, their attention or its core again in backward gives the same gradients, bit for bit."""
    ways = [None, *(Recompute(granularity=granularity) for granularity in get_args(Granularity))]
    found = []
    for way in ways:
        model = bench.model().train()
        model.recompute = way
        found.append(one_step(model, [bench.batch]))
    for other in found[1:]:
        assert other.loss == found[0].loss
        assert all(torch.equal(other.grads[name], grad) for name, grad in found[0].grads.items())
    return "yes"


def from_config(bench: Bench) -> str:
    """Fresh weights: every element set, and a first loss near that of guessing."""
    config = dict(bench.row.config)
    model = Decoder(families.build_spec(config)[1], config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(math.nan)
    init_weights(model, 0)
    with torch.no_grad():
        outcome = OBJECTIVE(model, bench.batch, 1.0)
    loss, guess = outcome.total / outcome.count, math.log(model.spec.vocab_size)
    assert 0.9 * guess < loss < 1.2 * guess, (loss, guess)
    return "yes"


def pretrain(bench: Bench) -> str:
    """With the parts of ``oarsmith pretrain``, from config.json and a corpus: learning reaches every parameter."""
    contents = fresh_config(bench.row.config, num_tokens=LAST_ID, num_positions=32)
    prefix = bench.folder / "corpus"
    with IndexedBuilder(prefix, np.dtype("<u2")) as builder:
        for start in range(40):
            # Each token follows from the one before, so that something is learned in a few steps.
            builder.add([FIRST_ID + (start + 7 * at) % 23 for at in range(40)])
            builder.end_document()
    words = ["--model_name_or_path=x", f"--input_dir={prefix}", "--max_length=32", "--split=1", "--max_steps=8"]
    config = load_config(PretrainConfig, None, [*words, "--per_device_train_batch_size=4"]).config
    begin = Start(base=bench.folder, config=contents, fresh=True)
    data = build_data(config, begin.vocab_size, opening(begin))
    model = new_model(contents, seed=0, device="cpu").train()
    optimizer, losses, reached = make_optimizer(config, model), list[float](), set[str]()
    for batch in islice(data.train, 8):
        found = one_step(model, [batch])
        reached |= {name for name, grad in found.grads.items() if bool(grad.any())}
        result = run_step(model, TokenCrossEntropy(), [batch], optimizer, lr=1e-2, max_grad_norm=1.0)
        losses.append(result.total / result.count)
    missed = [name for name, p in model.named_parameters() if p.requires_grad and name not in reached]
    assert not missed, missed
    # Of 320 tokens 23 occur, which is soon learned; slower where the head scales logits down (Cohere).
    assert len(losses) == 8 and losses[-1] < losses[0] - 0.5, losses
    return "yes"


def tokenizer(bench: Bench) -> str:
    """Recorded ids: of the family's own files, or of another family's of the same kind."""
    name = bench.row.tokenizer or bench.row.kind
    if name.startswith("remote:"):
        name = name.removeprefix("remote:")
        folder = bench.folder / "tokenizer"
        folder.mkdir()
        found = oarsmith.load_tokenizer(remote_tokenizers.directory(name, folder))
        cases = [(text, ids) for text, ids, _ in remote_tokenizers.CASES[name]["texts"]]
    else:
        folder = FIXTURES / "tokenizers" / name
        found = oarsmith.load_tokenizer(folder)
        texts = json.loads((folder / "expected.json").read_text(encoding="utf-8"))["texts"]
        cases = [(case["text"], case["ids"]) for case in texts]
    assert len(cases) > 30
    for text, ids in cases:
        assert found.encode(text) == ids, text
    return "yes" if bench.row.tokenizer is not None else "same kind"
