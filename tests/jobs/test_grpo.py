"""``oarsmith grpo`` from the command line: every algorithm, resuming, evaluation, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from oarsmith import cli
from oarsmith.config.load import load_config
from oarsmith.config.policy import PRESETS, GrpoConfig
from oarsmith.jobs.grpo import whose_old
from policies import grpo, write_inputs
from tiny import assert_same_run, interrupted, read_lines

Inputs = tuple[Path, Path, str]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.mark.parametrize("algorithm", sorted(PRESETS))
def test_every_algorithm_trains(inputs: Inputs, tmp_path: Path, algorithm: str) -> None:
    # Every answer of a model that knows nothing ends at the limit.
    changes = {"algorithm": algorithm, "max_steps": 2, "prompts_per_update": 2, "kl_loss_coeff": 0.01}
    changes |= {"filter_truncated": "false"}
    assert grpo(inputs, tmp_path / "run", **changes) == 0
    first, last = [line for line in read_lines(tmp_path / "run" / "log.jsonl") if "loss" in line]
    assert first["grad_norm"] > 0 and last["tokens"] > first["tokens"]
    assert first["kl"] == pytest.approx(0.0, abs=1e-6)
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"prompts_per_update": 1, "update_iters": 2, "max_steps": 9},
        {"max_staleness": 1, "prompts_per_update": 2, "max_steps": 7},
        {"algorithm": "dapo", "kl_coeff": 0.1, "filter_truncated": "false"},
        {"algorithm": "remax", "lora": "true", "kl_loss_coeff": 0.1, "lora_dropout": 0.1},
        {"max_staleness": 1, "rollout_compute": "torch", "gradient_accumulation_steps": 2},
    ],
    ids=["plain", "updates", "ahead", "dapo", "remax-lora", "ahead-torch"],
)
def test_a_resumed_run_is_the_run(inputs: Inputs, tmp_path: Path, changes: dict[str, Any]) -> None:
    """Also with rollouts that are half used up, and with one on its way."""
    assert grpo(inputs, tmp_path / "run", **changes) == 0
    steps = changes.get("max_steps", 4)
    for kept in (1, 2):
        again = tmp_path / f"again-{kept}"
        interrupted(tmp_path / "run", again, *(f"checkpoint-{step}" for step in range(kept + 1, steps + 1)))
        assert grpo(inputs, again, **changes) == 0
        assert_same_run(tmp_path / "run", again)
        assert (again / "samples.jsonl").read_bytes() == (tmp_path / "run" / "samples.jsonl").read_bytes()


def test_splitting_a_step_changes_nothing_but_rounding(inputs: Inputs, tmp_path: Path) -> None:
    found = []
    for name, changes in (("whole", {}), ("split", {"per_device_train_batch_size": 5})):
        assert grpo(inputs, tmp_path / name, max_steps=1, algorithm="dr_grpo", **changes) == 0
        found.append(read_lines(tmp_path / name / "log.jsonl")[0])
    assert found[0]["grad_norm"] == pytest.approx(found[1]["grad_norm"], rel=1e-4)
    assert found[0]["entropy"] == pytest.approx(found[1]["entropy"], rel=1e-5)
    assert found[0]["reward"] == pytest.approx(found[1]["reward"])


def test_learning_raises_the_reward(inputs: Inputs, tmp_path: Path) -> None:
    changes = {"max_steps": 40, "samples_per_prompt": 8, "logging_steps": 1, "save_strategy": "no"}
    assert grpo(inputs, tmp_path / "run", learning_rate=3e-3, lr_scheduler_type="constant", **changes) == 0
    rewards = [line["reward"] for line in read_lines(tmp_path / "run" / "log.jsonl")]
    assert sum(rewards[-10:]) > sum(rewards[:10]) + 0.5


def test_evaluation_and_early_stop(inputs: Inputs, tmp_path: Path) -> None:
    changes = {
        "eval_split_ratio": 0.3,
        "eval_steps": 1,
        "pass_reward": 0.2,
        "early_stopping_patience": 1,
        "early_stopping_threshold": 100,
    }
    assert grpo(inputs, tmp_path / "run", **changes) == 0
    lines = read_lines(tmp_path / "run" / "log.jsonl")
    records = [line for line in lines if "eval_reward" in line]
    assert [record["step"] for record in records] == [1, 2], "the second one is not better by 100"
    assert 0 <= records[0]["eval_greedy_pass_rate"] <= 1 and records[0]["eval_length"] <= 8
    assert (tmp_path / "run" / "report.html").is_file()


@pytest.mark.parametrize("compute", ["native", "torch"])
def test_an_evaluation_changes_nothing_of_a_rollout_on_its_way(inputs: Inputs, tmp_path: Path, compute: str) -> None:
    """Both ask the same engine, and an evaluation gives it other weights."""
    (tmp_path / "slow.py").write_text(
        "import time\n\n\ndef reward(prompts, completions, **rows):\n    time.sleep(0.1)\n"
        "    return [float('a' in completion) for completion in completions]\n"
    )
    changes = {"eval_split_ratio": 0.3, "max_staleness": 1, "rollout_compute": compute, "learning_rate": 0.03}
    # Asks the engine up to four times for a rollout.
    changes |= {"dynamic_sampling": "true", "max_gen_batches": 4, "rewards": f"{tmp_path / 'slow.py'}:reward"}
    found = []
    for name, more in (("never", {"evaluation_strategy": "no"}), ("always", {"eval_steps": 1})):
        assert grpo(inputs, tmp_path / name, **changes, **more) == 0
        lines = read_lines(tmp_path / name / "log.jsonl")
        found.append([(line["loss"], line["reward"], line["entropy"]) for line in lines if "loss" in line])
    assert found[0] == found[1]


def test_only_evaluating(inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert grpo(inputs, tmp_path / "run", do_train="false", eval_split_ratio=0.3) == 0
    assert "greedy reward" in capsys.readouterr().out
    assert not (tmp_path / "run" / "model").exists()


def test_reward_functions_are_told_apart(inputs: Inputs, tmp_path: Path) -> None:
    rewards = json.dumps([inputs[2], {"reward": "length", "at_most": 4, "name": "short", "weight": 0.5}])
    assert grpo(inputs, tmp_path / "run", max_steps=1, rewards=rewards) == 0
    record = read_lines(tmp_path / "run" / "log.jsonl")[0]
    assert record["reward"] == pytest.approx(record["reward/reward"] + 0.5 * record["reward/short"])
    sample = read_lines(tmp_path / "run" / "samples.jsonl")[0]
    assert sample["rewards"].keys() == {"reward", "short"}


def test_rewards_that_fail_are_counted_aloud(
    inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.py").write_text("def reward(prompt, completion):\n    return float('nan')\n")
    lenient = {"reward": f"{tmp_path / 'bad.py'}:reward", "name": "bad", "on_error": "none"}
    assert grpo(inputs, tmp_path / "run", max_steps=2, rewards=json.dumps([inputs[2], lenient])) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert told.count("reward 'bad' failed on") == 1 and "step 1: reward 'bad' failed on 12 answers so far" in told
    assert "returned nan" in told


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"max_staleness": 1, "temperature": 0.7}, "temperature"),
        ({"max_length": 100_000}, "context"),
        ({"max_prompt_len": 2}, "left out"),
        ({"z_loss": 0.1}, "z_loss"),
        ({"rewards": "nowhere.py:reward"}, "nowhere.py"),
        ({"lora": "true", "rollout_compute": "native"}, "adapter"),
        ({"samples_per_prompt": 1}, "samples_per_prompt"),
        ({"neftune": "true"}, "neftune"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(
    inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], words: str
) -> None:
    assert grpo(inputs, tmp_path / "run", **changes) == 2
    printed = capsys.readouterr()
    assert words in printed.err and "Traceback" not in printed.err


ENVIRONMENT = '''
from oarsmith.rl.environments.environment import Turn


class Asks:
    """Asks once more, and counts letters."""

    def reset(self, row):
        self.turns = 0
        return [{"role": "user", "content": "Say something. " + row["tgt"]}]

    def step(self, completion):
        self.turns += 1
        if self.turns == 2:
            return Turn(done=True, reward=float(len(completion) % 3))
        return Turn(messages=({"role": "user", "content": "And now?"},))
'''


def test_an_environment_speaks_between_turns_and_gives_the_reward(inputs: Inputs, tmp_path: Path) -> None:
    (tmp_path / "asks.py").write_text(ENVIRONMENT, encoding="utf-8")
    changes = {
        "environment": f"{tmp_path / 'asks.py'}:Asks",
        "rewards": "[]",
        "max_length": 200,
        "max_prompt_len": 100,
        "max_steps": 2,
    }
    # Else what knows nothing never ends a turn.
    changes |= {"temperature": 4.0, "max_new_tokens": 60, "samples_per_prompt": 8}
    assert grpo(inputs, tmp_path / "run", **changes) == 0
    records = read_lines(tmp_path / "run" / "log.jsonl")
    assert all("reward" in record for record in records)


def test_a_kept_step_is_run_again(inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes = {"learning_rate": 1e30, "max_grad_norm": 0, "update_iters": 4, "save_strategy": "no"}
    assert grpo(inputs, tmp_path / "run", **changes) != 0
    (kept,) = (tmp_path / "run").glob("failure-step-*")
    capsys.readouterr()
    # 1: what is not finite was found again.
    assert cli.main(["replay", str(kept)]) == 1
    assert "gradients that are not finite" in capsys.readouterr().out
    assert cli.main(["replay", str(kept), "--document=1"]) == 1


def test_the_saved_configuration_alone_repeats_the_run(inputs: Inputs, tmp_path: Path) -> None:
    assert grpo(inputs, tmp_path / "run", max_steps=2, per_device_train_batch_size=5) == 0
    assert cli.main(["grpo", str(tmp_path / "run" / "run.json"), f"--output_dir={tmp_path / 'again'}"]) == 0
    assert_same_run(tmp_path / "run", tmp_path / "again")


@pytest.mark.parametrize(
    ("words", "whose"),
    [
        ("", "none"),
        ("--update_iters 2", "sampler"),
        ("--update_iters 2 --dtype bf16", "trainer"),
        ("--update_iters 2 --importance_sampling token_mask", "trainer"),
        ("--update_iters 2 --old_logprobs trainer", "trainer"),
        ("--kl_coeff 0.1 --dtype bf16", "trainer"),
        ("--max_staleness 1", "sampler"),
    ],
)
def test_whose_log_probabilities_ratios_are_taken_to(words: str, whose: str) -> None:
    """A correction between sampler and trainer needs both: taken to the sampler's it would be 1."""
    dtype = [] if "--dtype" in words else ["--dtype", "fp32"]
    given = ["m", "d", "--rewards", "length", *dtype, *words.split()]
    assert whose_old(load_config(GrpoConfig, None, given).config) == whose
