"""What mergekit 0.1.5 makes of the same recipes: its outputs are in the fixtures, and it runs where it is installed."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from oarsmith import cli

FIXTURES = Path(__file__).parents[1] / "fixtures" / "merge"
CASES = sorted(path.parent.name for path in FIXTURES.glob("*/config.yml"))
MERGEKIT = os.environ.get("MERGEKIT_YAML") or shutil.which("mergekit-yaml")


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        # float32 rounds each of a few operations; bfloat16 once here, and once an operation there.
        exact = tensor.dtype == torch.float32
        torch.testing.assert_close(
            found[name].float(), tensor.float(), atol=1e-6 if exact else 2e-3, rtol=0 if exact else 8e-3, msg=name
        )


@pytest.mark.parametrize("case", CASES)
def test_as_mergekit(case, tmp_path, monkeypatch):
    monkeypatch.chdir(FIXTURES / case)
    out = tmp_path / "merged"
    assert cli.main(["merge", "config.yml", str(out), "--n_process", "1", "--probe", "false"]) == 0
    assert_same(load_file(out / "model.safetensors"), load_file(FIXTURES / case / "expected.safetensors"))


def test_the_written_recipe_gives_the_same_again(tmp_path, monkeypatch):
    monkeypatch.chdir(FIXTURES / "slices_linear")
    for recipe, out in (("config.yml", "one"), (tmp_path / "one" / "merge_recipe.yaml", "two")):
        assert cli.main(["merge", str(recipe), str(tmp_path / out), "--n_process", "1"]) == 0
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert first == second


@pytest.mark.slow
@pytest.mark.skipif(MERGEKIT is None, reason="mergekit-yaml is not installed (MERGEKIT_YAML names it)")
@pytest.mark.parametrize("method", ["ties", "sce", "nuslerp", "model_stock", "breadcrumbs", "multislerp"])
def test_beside_mergekit(method, tmp_path):
    """Models that the fixtures do not have."""
    folders = []
    for number, name in enumerate(("base", "model_a", "model_b", "model_c")):
        folder = tmp_path / name
        shutil.copytree(FIXTURES / "inputs" / name, folder)
        tensors = load_file(folder / "model.safetensors")
        generator = torch.Generator().manual_seed(number)
        from safetensors.torch import save_file

        moved = {k: v + 0.03 * torch.randn(v.shape, generator=generator) for k, v in tensors.items()}
        save_file(moved, folder / "model.safetensors", metadata={"format": "pt"})
        folders.append(folder)
    own = {"weight": 0.6, "density": 0.45, "gamma": 0.2}
    chosen = folders[1:3] if method == "nuslerp" else folders[1:]
    recipe = {
        "merge_method": method,
        "base_model": str(folders[0]),
        "models": [{"model": str(folder), "parameters": own} for folder in chosen],
        "dtype": "float32",
    }
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    subprocess.run([str(MERGEKIT), str(file), str(tmp_path / "theirs")], check=True, capture_output=True)
    assert cli.main(["merge", str(file), str(tmp_path / "ours")]) == 0
    assert_same(load_file(tmp_path / "ours/model.safetensors"), load_file(tmp_path / "theirs/model.safetensors"))
