"""Models that say what a test wants them to say: real directories, real decoders, scripted weights."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

# Before torch loads its OpenMP runtime, as the command line does: spinning threads make tests on a busy machine crawl.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")
# Tests make many small models: what is packed of them is kept for this run alone, and not with the user's.
if "OARSMITH_PACKED" not in os.environ:
    _packed = tempfile.TemporaryDirectory(prefix="oarsmith-packed-")
    os.environ["OARSMITH_PACKED"] = _packed.name

import pytest
import torch

import oarsmith
from oarsmith.models import families
from oarsmith.models.decoder import Decoder

TOKENIZER = Path(__file__).parent / "fixtures" / "tokenizers" / "qwen25_bpe_json"
VOCAB_SIZE = 1120  # the fixture's tokenizer has 1,106 ids; embeddings are padded in real models too
WIDTH = 128
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": WIDTH,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}

ChainModel = Callable[..., Path]


@pytest.fixture
def few_threads() -> Iterator[None]:
    """One thread: tiny matrices only wait for a second one, above all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def chain_model(tmp_path_factory: pytest.TempPathFactory) -> ChainModel:
    """chain_model(text, after="\\n", end=True, **config) -> a model directory.

    The model answers every prompt that ends with the token of ``after`` (as the chat template does) with the tokens of
    ``text``, then ends its turn (with ``end=False`` it begins again). No token may occur twice: the next token depends
    on the last one alone. The decoder's blocks add nothing, and the head's row of each token is the embedding of the
    token before it.
    """
    tokenizer = oarsmith.load_tokenizer(TOKENIZER)

    def make(text: str, *, after: str = "\n", end: bool = True, **config: object) -> Path:
        start = tokenizer.encode(after)[-1]
        path = [start, *tokenizer.encode(text)]
        path.append(tokenizer.stop_ids[0] if end else start)
        assert len(set(path[:-1])) == len(path) - 1, "a token occurs twice in the text"
        model = Decoder(families.build_spec({**CONFIG, **config})[1], {**CONFIG, **config})
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.fill_(1.0 if "norm" in name else 0.0)
            table_VD = torch.randn(VOCAB_SIZE, WIDTH, generator=generator)
            model.embedding.weight.copy_(table_VD)
            for before, following in pairwise(path):
                model.head.weight[following] = table_VD[before]
        folder = tmp_path_factory.mktemp("chain")
        oarsmith.save_model(model.eval(), folder / "model")
        for file in TOKENIZER.iterdir():
            shutil.copy(file, folder / "model")
        (folder / "model" / "generation_config.json").write_text(json.dumps({"eos_token_id": tokenizer.stop_ids[0]}))
        return folder / "model"

    return make
