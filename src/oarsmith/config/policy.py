"""Keys of the commands that learn from rewards: what is asked, how answers are drawn, what they learn by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from .adapters import AdapterKeys
from .base import Bool, Float, Floats, Int, JobConfig, Strings, rewards_of
from .groups import LeftOutKeys, ModelKeys
from .train import TrainConfig

RewardSettings = Annotated[tuple[str | dict[str, Any], ...], BeforeValidator(rewards_of)]
Estimator = Literal["group", "rloo", "reinforce++", "reinforce++_baseline", "remax", "opo", "gpg", "grpo_passk"]
Aggregation = Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"]
Correction = Literal["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
Algorithm = Literal[
    "grpo",
    "dr_grpo",
    "dapo",
    "gspo",
    "cispo",
    "sapo",
    "rloo",
    "reinforce++",
    "reinforce++_baseline",
    "remax",
    "opo",
    "gpg",
    "grpo_passk",
]


@dataclass(frozen=True, kw_only=True)
class Preset:
    """What an algorithm means where keys do not say otherwise."""

    estimator: Estimator = "group"
    scale: Literal["group", "batch", "none"] = "group"
    surrogate: str = "clipped"
    level: Literal["token", "sequence", "sequence_sum"] = "token"
    aggregation: Aggregation = "token-mean"
    clip_low: float = 0.2
    clip_high: float = 0.2
    dynamic: bool = False
    filter_truncated: bool = False


PRESETS: dict[str, Preset] = {
    "grpo": Preset(aggregation="seq-mean-token-mean"),
    "dr_grpo": Preset(scale="none", aggregation="seq-mean-token-sum-norm"),
    "dapo": Preset(clip_high=0.28, dynamic=True, filter_truncated=True),
    "gspo": Preset(level="sequence", aggregation="seq-mean-token-mean", clip_low=3e-4, clip_high=4e-4),
    "cispo": Preset(surrogate="cispo", clip_high=4.0),
    "sapo": Preset(surrogate="sapo", aggregation="seq-mean-token-mean"),
    # Every token carries its whole answer's -r A, so their mean is the answer's loss.
    "rloo": Preset(estimator="rloo", aggregation="seq-mean-token-mean", level="sequence_sum"),
    "reinforce++": Preset(estimator="reinforce++"),
    "reinforce++_baseline": Preset(estimator="reinforce++_baseline"),
    "remax": Preset(estimator="remax"),
    "opo": Preset(estimator="opo"),
    "gpg": Preset(estimator="gpg", surrogate="plain"),
    "grpo_passk": Preset(estimator="grpo_passk", aggregation="seq-mean-token-mean"),
}


class PromptDataKeys(LeftOutKeys):
    title: ClassVar[str] = "Data"

    dataset_name_or_path: str = Field(
        description="Rows with prompts: a file (jsonl, json, csv, parquet), a directory with train.* and optionally "
        "dev.* files, or the name of a dataset on the Hugging Face hub. prompt, messages, src or instruction is asked; "
        "the whole row is given to the rewards (tgt, answer, tests, ...)."
    )
    eval_dataset_path: str | None = Field(
        None, description="Prompts to evaluate on. Not given: the dev.* file beside the training rows, if there is one."
    )
    eval_split_ratio: Float = Field(
        0.0, ge=0, lt=1, description="Share of the prompts kept out of training to evaluate on (0.05 is 5 %)."
    )
    max_prompt_len: Int = Field(
        512, ge=1, description="Tokens of the longest prompt; rows with longer ones are left out, and counted."
    )
    max_length: Int | None = Field(
        None,
        ge=2,
        description="Tokens of a prompt with its whole answer, over all turns. Not given: max_prompt_len + "
        "max_new_tokens, or the model's context where that is less.",
    )
    raw: Bool = Field(False, description="A prompt is continued as it is, without a chat template.")


class RolloutKeys(JobConfig):
    title: ClassVar[str] = "Rollouts"

    prompts_per_step: Int = Field(
        8, ge=1, description="Prompts of a rollout. The rest follows: prompts x samples answers."
    )
    samples_per_prompt: Int = Field(
        8, ge=1, description="Answers drawn to each prompt: the group whose rewards are compared with one another."
    )
    prompts_per_update: Int = Field(
        -1,
        ge=-1,
        description="Prompts of one optimizer step: fewer than prompts_per_step makes several steps of a rollout. -1: "
        "all of them, one step.",
    )
    update_iters: Int = Field(1, ge=1, description="Times that a rollout is learned from.")
    max_staleness: Int = Field(
        0,
        ge=0,
        le=1,
        description="1: the next rollout is made in a thread while this one is learned from, by weights one rollout "
        "older. 0: always by the newest weights.",
    )
    max_new_tokens: Int = Field(256, ge=1, description="Longest answer, in tokens (of one turn).")
    min_new_tokens: Int = Field(0, ge=0, description="Shortest answer, in tokens: nothing ends it before.")
    temperature: Float = Field(
        1.0, gt=0, description="Answers are drawn, and their probabilities learned, at this temperature."
    )
    top_k: Int = Field(0, ge=0, description="Draw only among the k likeliest tokens; 0: all.")
    top_p: Float = Field(
        1.0, gt=0, le=1, description="Draw only among the likeliest tokens that together have this probability."
    )
    rollout_max_num_seqs: Int | None = Field(
        None,
        ge=1,
        description="Answers that the engine works on side by side. Not given: all of a rollout, at most 256.",
    )
    rollout_compute: Literal["auto", "native", "torch"] = Field(
        "auto",
        description="What computes rollouts: native (the compiled step, from weights packed after each update), torch "
        "(the decoder that trains, its weights shared). auto: native on a CPU where it can serve the model.",
    )


class RewardKeys(JobConfig):
    title: ClassVar[str] = "Rewards"

    rewards: RewardSettings = Field(
        (),
        description="What answers are worth; one or several: file.py:function, package.module:function, the name of a "
        'built-in, an http address, the directory of a reward model, or an object {"reward": ..., "weight": ...}.',
    )
    environment: str | None = Field(
        None,
        description="What speaks between the model's turns: file.py:Class or package.module:Class (docs/rewards.md). "
        "What it says is not learned.",
    )
    tools: Strings = Field(
        (), description="Functions that the model may call, as file.py:function; repeat the key for several."
    )
    max_turns: Int = Field(8, ge=1, description="Most turns of the model, with an environment or tools.")
    max_appended: Int = Field(
        1024, ge=1, description="Most tokens of one turn of the environment; longer ones are cut."
    )
    reward_weights: Floats = Field((), description="A weight for each of several rewards. Not given: 1 each.")
    clip_range_score: Float | None = Field(
        None, gt=0, description="Rewards are held within plus and minus this. Not given: they are not."
    )
    normalize_reward: Bool = Field(
        False, description="Centre the rewards of a rollout and divide them by their deviation, before all else."
    )
    pass_reward: Float = Field(
        1.0, description="An answer passes with at least this reward: what pass_rate counts in logs and evaluations."
    )
    overlong_buffer: Int = Field(
        0,
        ge=0,
        description="Answers that come nearer than this many tokens to max_new_tokens lose reward, along a line, up to "
        "overlong_penalty at the limit (DAPO). 0: none do.",
    )
    overlong_penalty: Float = Field(1.0, gt=0, description="What the longest answer loses; see overlong_buffer.")
    kl_coeff: Float = Field(
        0.0,
        ge=0,
        description="Taken from each token's reward: this times log p - log p of the reference (k1). See "
        "kl_loss_coeff.",
    )


class SurrogateKeys(JobConfig):
    title: ClassVar[str] = "Policy loss"

    clip_ratio_dual: Float | None = Field(
        None,
        gt=1,
        description="Dual clip: a bad token's loss is at most this times its advantage (3). Not given: none.",
    )
    pg_loss_coeff: Float = Field(1.0, ge=0, description="Weight of the policy's loss.")
    entropy_coeff: Float = Field(0.0, ge=0, description="Weight of an entropy bonus.")


class PolicyLossKeys(SurrogateKeys):
    title: ClassVar[str] = "Policy loss"

    algorithm: Algorithm = Field(
        "grpo",
        description="How advantages and loss are made; docs/rl.md has the table. It decides the keys below that are "
        "not given.",
    )
    clip_range_ratio: Float | None = Field(
        None, gt=0, lt=1, description="Both clip ranges. Not given: 0.2, for gspo 3e-4 and 4e-4, for dapo 0.2 and 0.28."
    )
    clip_range_ratio_low: Float | None = Field(
        None, gt=0, lt=1, description="A ratio counts no less than 1 minus this."
    )
    clip_range_ratio_high: Float | None = Field(
        None, gt=0, description="A ratio counts no more than 1 plus this. cispo: 4, so that ratios count up to 5."
    )
    clip_two_sided: Float | None = Field(
        None, gt=1, description="No ratio counts more than this, also where the advantage is negative. Not given: none."
    )
    loss_aggregation: Aggregation | None = Field(
        None,
        description="Whether every token counts alike (token-mean), every answer (seq-mean-token-mean), or sums of "
        "answers do. Not given: what the algorithm has.",
    )
    scale_rewards: Literal["group", "batch", "none"] | None = Field(
        None, description="What centred rewards are divided by: deviation of the group, of the rollout, nothing."
    )
    normalize_advantage: Bool = Field(
        False, description="Advantages of all tokens get mean 0 and deviation 1 in the end."
    )
    gamma: Float = Field(1.0, gt=0, le=1, description="Discount of later rewards, for reinforce++.")
    kl_loss_coeff: Float = Field(
        0.0, ge=0, description="Weight of a KL term that holds the model to the reference; 0: no reference is loaded."
    )
    kl_estimator: Literal["k1", "abs", "k2", "k3"] = Field(
        "k3", description="How the KL term is estimated at a token: k3 = q/p - 1 - log(q/p), k1 = log(p/q), ..."
    )
    kl_corrected: Bool = Field(False, description="Multiply the KL term by the ratio: unbiased over several updates.")
    dynamic_sampling: Bool | None = Field(
        None,
        description="Leave out groups whose answers all have the same reward, and ask other prompts in their place "
        "(DAPO). Not given: true for dapo.",
    )
    max_gen_batches: Int = Field(
        3, ge=1, description="dynamic_sampling: at most this many times prompts_per_step prompts are asked."
    )
    filter_truncated: Bool | None = Field(
        None,
        description="Answers that the limit ended teach nothing (DAPO's overlong filtering). Not given: true for dapo.",
    )
    old_logprobs: Literal["auto", "sampler", "trainer"] = Field(
        "auto",
        description="Whose log-probabilities the ratio is taken to, where a rollout is learned from more than once: "
        "those that the sampler gave, or the trainer's own, computed before the first update. auto: the sampler's "
        "where they agree (fp32, temperature 1) and importance_sampling does not ask for both, else the trainer's.",
    )
    importance_sampling: Correction = Field(
        "none",
        description="Correct for tokens drawn by another implementation than the one that trains: weights p/p_sampler "
        "of tokens or whole answers, cut or left out above importance_sampling_cap.",
    )
    importance_sampling_cap: Float = Field(2.0, gt=0, description="See importance_sampling.")

    @property
    def preset(self) -> Preset:
        """Of the algorithm."""
        return PRESETS[self.algorithm]


class PolicyConfig(ModelKeys, PromptDataKeys, RewardKeys, RolloutKeys, AdapterKeys, TrainConfig):
    """What learning from rewards has whatever the algorithm."""

    title: ClassVar[str] = "Learning from rewards"
    positional: ClassVar[tuple[str, ...]] = ("model_name_or_path", "dataset_name_or_path")

    num_train_epochs: Float = Field(1.0, gt=0, description="Passes over the prompts. max_steps wins where it is given.")
    logging_steps: Int = Field(1, ge=1, description="Steps between lines of the log.")
    loss_spike_factor: Float = Field(
        0.0,
        ge=0,
        description="Keep steps whose loss jumps (see oarsmith sft). A policy's loss is around 0, so: 0, never.",
    )
    metric_for_best_model: Literal["reward", "pass_rate", "greedy_reward", "greedy_pass_rate"] = Field(  # type: ignore[assignment]
        "reward", description="Which evaluation number says what is best: of drawn answers, or of greedy ones."
    )
    eval_samples: Int = Field(
        1, ge=1, description="Answers drawn to each prompt of an evaluation, beside the greedy one."
    )
    num_sample_rows: Int = Field(
        4, ge=0, description="Answers of each logged rollout that samples.jsonl and the report show."
    )
    waiting_limit: Float = Field(
        120.0, gt=0, description="Seconds of waiting (for the engine, a reward, ...) after which is said for what."
    )

    @property
    def per_update(self) -> int:
        """Prompts of one optimizer step."""
        return self.prompts_per_update if self.prompts_per_update > 0 else self.prompts_per_step

    @property
    def learns_twice(self) -> bool:
        """Whether a rollout is learned from in more than one update."""
        return self.update_iters > 1 or self.per_update < self.prompts_per_step


class GrpoConfig(PolicyLossKeys, PolicyConfig):
    """All keys of ``oarsmith grpo``: groups of answers, compared by their rewards."""

    title: ClassVar[str] = "GRPO and relatives"
    command: ClassVar[str] = "grpo"
    # PaddleNLP's files have the critic's keys for every algorithm.
    also_accepts: ClassVar[tuple[str, ...]] = ("ppo",)

    output_dir: str = Field("runs/grpo", description="The run folder: checkpoints, reports, resolved configuration.")
