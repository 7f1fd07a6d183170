"""What tells one model from another, whatever it is stored as."""

import torch

from oarsmith.checkpoint.fingerprint import fingerprint
from oarsmith.checkpoint.hf import load_decoder, write_decoder
from tiny import tiny_decoder


def written(model, folder, **more):
    folder.mkdir()
    write_decoder(model, folder, **more)
    return folder


def test_the_same_in_every_dtype_and_split(tmp_path):
    model = tiny_decoder("llama")
    rounded = model.to(torch.bfloat16)
    plain = written(rounded, tmp_path / "a")
    shards = written(rounded, tmp_path / "b", max_shard_bytes=20_000)
    wide = written(load_decoder(plain, dtype=torch.float32), tmp_path / "c")
    assert len(list(shards.glob("*.safetensors"))) > 1
    assert len({fingerprint(folder) for folder in (plain, shards, wide)}) == 1


def test_another_after_any_change_of_a_whole_tensor(tmp_path):
    model = tiny_decoder("llama")
    before = fingerprint(written(model, tmp_path / "a"))
    for number, (name, parameter) in enumerate(model.named_parameters()):
        kept = parameter.detach().clone()
        with torch.no_grad():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
        assert fingerprint(written(model, tmp_path / str(number))) != before, name
        parameter.data.copy_(kept)
    assert fingerprint(written(model, tmp_path / "last")) == before
