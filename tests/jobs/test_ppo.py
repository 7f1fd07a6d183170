"""``oarsmith ppo`` from the command line: a bandit whose best policy is known, critics, resuming, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers

import oarsmith
from oarsmith import cli
from policies import KEYS, write_inputs
from tiny import assert_same_run, interrupted, read_lines, write_rows, write_tiny_model

Inputs = tuple[Path, Path, str]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One score, random weights."""
    folder = tmp_path_factory.mktemp("reward") / "model"
    labels = {"id2label": {"0": "score"}, "label2id": {"score": 0}}
    return write_tiny_model(folder, "llama", seed=9, architectures=["LlamaForSequenceClassification"], **labels)


def ppo(inputs: Inputs, output_dir: Path, **changes: Any) -> int:
    model, data, reward = inputs
    keys = {**KEYS, "rewards": reward, "output_dir": output_dir, **changes}
    return cli.main(["ppo", str(model), str(data), *(f"--{key}={value}" for key, value in keys.items())])


def test_a_bandit_ends_at_the_best_policy_that_is_known(tmp_path: Path) -> None:
    """One prompt, one token, a reward a token, a KL penalty c to the reference: the best policy has probabilities in
    proportion to p_reference exp(r / c) (Ziegler et al. 2019, equation 3 and after)."""
    vocab = {token: index for index, token in enumerate([*"0123456789", "=", "<eos>", "<pad>"])}
    words = tokenizers.Tokenizer(models.WordLevel(vocab=vocab, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex("."), "isolated")
    words.decoder = decoders.Fuse()
    words.add_special_tokens(["<eos>", "<pad>"])
    start = write_tiny_model(tmp_path / "start", "llama", vocab_size=13, tie_word_embeddings=False)
    for file in start.glob("token*"):
        file.unlink()
    words.save(str(start / "tokenizer.json"))
    names = {"eos_token": "<eos>", "pad_token": "<pad>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (start / "tokenizer_config.json").write_text(json.dumps(names))
    (tmp_path / "prompts.jsonl").write_text('{"src": "1="}\n')
    (tmp_path / "reward.py").write_text(
        "def reward(prompt, completion, **row):\n    return {'3': 1.0, '7': 0.6}.get(completion, 0.0)\n"
    )
    bandit = (start, tmp_path / "prompts.jsonl", f"{tmp_path / 'reward.py'}:reward")
    changes = {
        "chat_template": "none",
        "prompts_per_step": 1,
        "samples_per_prompt": 192,
        "max_new_tokens": 1,
        "max_steps": 100,
        "learning_rate": 2e-3,
        "lr_scheduler_type": "linear",
        "kl_coeff": 0.4,
        "gae_lambda": 1.0,
        "normalize_advantage": "false",
        "save_strategy": "no",
        "logging_steps": 20,
    }
    assert ppo(bandit, tmp_path / "run", **changes) == 0
    ids = torch.tensor([[1, 10]])
    before, after = (
        oarsmith.load_model(path, dtype="fp32")(ids)[0, -1].softmax(-1).detach()
        for path in (start, tmp_path / "run" / "model")
    )
    rewards = torch.zeros(13)
    rewards[3], rewards[7] = 1.0, 0.6
    best = before * (rewards / 0.4).exp()
    best /= best.sum()
    # Half the sum of differences: 192 draws a step leave a noise of about 0.02.
    assert 0.5 * float((after - best).abs().sum()) < 0.06, (after, best)
    assert 0.5 * float((before - best).abs().sum()) > 0.2, "it began elsewhere"


@pytest.mark.parametrize(
    "changes",
    [
        {"update_iters": 2, "prompts_per_update": 2, "kl_target": 0.1, "normalize_reward": "true"},
        {"critic": "separate", "critic_learning_rate": 1e-3, "gradient_accumulation_steps": 2},
        {"max_staleness": 1, "lora": "true"},
    ],
    ids=["shared", "separate", "ahead-lora"],
)
def test_a_resumed_run_is_the_run(inputs: Inputs, tmp_path: Path, changes: dict[str, Any]) -> None:
    assert ppo(inputs, tmp_path / "run", **changes) == 0
    again = tmp_path / "again"
    lost = [name for name in ("checkpoint-3", "checkpoint-4", "critic") if (tmp_path / "run" / name).exists()]
    interrupted(tmp_path / "run", again, *lost)
    assert ppo(inputs, again, **changes) == 0
    assert_same_run(tmp_path / "run", again)
    if "critic" in lost:
        files = [run / "critic" / "model.safetensors" for run in (tmp_path / "run", again)]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_the_best_step_has_its_own_critic(inputs: Inputs, tmp_path: Path) -> None:
    """Where every evaluation gives the same, the first is the best: policy and critic are those of a run that ended
    there."""
    (tmp_path / "same.py").write_text("def reward(prompt, completion, **row):\n    return 1.0\n")
    often = {"evaluation_strategy": "steps", "eval_steps": 1, "save_steps": 1, "eval_split_ratio": 0.5}
    rest = {"rewards": f"{tmp_path / 'same.py'}:reward", "critic": "separate", "critic_learning_rate": 1e-2}
    constant = {"lr_scheduler_type": "constant", "critic_lr_scheduler_type": "constant"}
    changes = often | rest | constant | {"load_best_model_at_end": "true"}
    assert ppo(inputs, tmp_path / "long", **changes, max_steps=3) == 0
    assert ppo(inputs, tmp_path / "short", **changes, max_steps=1) == 0
    for name in ("model", "critic"):
        long, short = (tmp_path / run / name / "model.safetensors" for run in ("long", "short"))
        assert long.read_bytes() == short.read_bytes(), name


def test_critic_and_rewards_from_a_reward_model(inputs: Inputs, reward_model: Path, tmp_path: Path) -> None:
    changes = {"rewards": reward_model, "critic_model_name_or_path": reward_model, "max_steps": 3}
    assert ppo(inputs, tmp_path / "run", **changes, critic_learning_rate=1e-2) == 0
    lines = read_lines(tmp_path / "run" / "log.jsonl")
    assert all(line["value_loss"] >= 0 and "kl_of_answers" in line for line in lines)
    critic = oarsmith.load_model(tmp_path / "run" / "critic", dtype="fp32")
    assert critic.spec.head.num_scores == 1
    begun = oarsmith.load_model(reward_model, dtype="fp32")
    assert any(not torch.equal(a, b) for a, b in zip(critic.parameters(), begun.parameters(), strict=True))


def test_a_critic_learns_what_is_to_come(inputs: Inputs, tmp_path: Path) -> None:
    changes = {"max_steps": 30, "prompts_per_step": 7, "save_strategy": "no", "kl_coeff": 0, "learning_rate": 1e-8}
    assert ppo(inputs, tmp_path / "run", **changes, critic_learning_rate=0.03) == 0
    losses = [line["value_loss"] for line in read_lines(tmp_path / "run" / "log.jsonl")]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kl_target": 1, "kl_coeff": 0}, "kl_target"),
        ({"critic": "shared", "critic_model_name_or_path": "somewhere"}, "critic_model_name_or_path"),
        ({"dtype": "fp16"}, "loss scale"),
        ({"critic_model_name_or_path": "nowhere"}, "nowhere"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(
    inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], words: str
) -> None:
    assert ppo(inputs, tmp_path / "run", **changes) == 2
    printed = capsys.readouterr()
    assert words in printed.err and "Traceback" not in printed.err


def test_texts_beside_answers_are_learned(inputs: Inputs, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "texts.jsonl", 6)
    changes = {"ptx_datasets": rows, "ptx_coeff": 5.0, "max_steps": 12, "ptx_max_length": 64, "save_strategy": "no"}
    assert ppo(inputs, tmp_path / "run", **changes, gradient_accumulation_steps=2, learning_rate=3e-3) == 0
    losses = [line["ptx_loss"] for line in read_lines(tmp_path / "run" / "log.jsonl")]
    assert losses[-1] < losses[0] - 1
