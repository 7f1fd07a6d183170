"""From a configuration to the parts of learning from rewards: policy, rewards, rollouts, what is studied,
evaluations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from oarsmith.adapters.parts import rewrite_of
from oarsmith.checkpoint.hf import DTYPES, load_decoder
from oarsmith.config.policy import PolicyConfig
from oarsmith.data.batch import Batch
from oarsmith.engine import Sampling
from oarsmith.jobs.loop_parts import total_steps
from oarsmith.jobs.policy_warnings import FailedRewards, StillRewards, waiting_aloud
from oarsmith.jobs.prompt_data import Prompts, read_all
from oarsmith.jobs.start import Start
from oarsmith.losses.policy.weights import Aggregation
from oarsmith.methods.data import TrainingData
from oarsmith.models import families
from oarsmith.models.decoder import Decoder
from oarsmith.models.sharing import shares_beginnings
from oarsmith.rl.collect import Collector
from oarsmith.rl.conversations import Episodes
from oarsmith.rl.environments.environment import Environment, find_environment
from oarsmith.rl.environments.episode import EpisodeLimits
from oarsmith.rl.environments.suffix import SuffixEncoder
from oarsmith.rl.environments.tools import ToolEnvironment, find_tools
from oarsmith.rl.evaluation import evaluate_policy
from oarsmith.rl.experience import Scored
from oarsmith.rl.policy import Policy
from oarsmith.rl.prompts import PromptOrder
from oarsmith.rl.referee import Referee
from oarsmith.rl.rewards.rewards import Rewards
from oarsmith.rl.rewards.verifiers.shape import Overlong
from oarsmith.rl.rewards.watch import Watch
from oarsmith.rl.rollout import Sampler
from oarsmith.rl.sample_log import SampleLog
from oarsmith.rl.source import Plan, RolloutBatches, Study
from oarsmith.text import Tokenizer

# Most answers that the engine works on side by side unless it is said.
_MOST_ROWS = 256
# Tokens of a pass without gradient.
_CAPACITY = 8192


@dataclass(frozen=True, kw_only=True)
class PolicyData(TrainingData):
    """Prompts, and once the model is there what answers them."""

    prompts: Prompts
    tokenizer: Tokenizer
    share: bool
    episodes: Episodes | None = None
    sampler: Sampler | None = None
    rewards: Rewards | None = None


class Unmade:
    """In the place of batches that only a model can make."""

    def batches_per_epoch(self, epoch: int) -> int:
        raise AssertionError("rollouts need the model")

    def __iter__(self) -> Iterator[Batch]:
        raise AssertionError("rollouts need the model")

    def state(self) -> dict[str, Any]:
        raise AssertionError("rollouts need the model")

    def load_state(self, state: dict[str, Any]) -> None:
        raise AssertionError("rollouts need the model")


def build_data(config: PolicyConfig, begin: Start, tokenizer: Tokenizer) -> PolicyData:
    """The prompts; batches follow with the model."""
    episodes = make_episodes(config, tokenizer)
    prompts = read_all(config, tokenizer, episodes)
    family, spec = families.build_spec(begin.config)
    share = shares_beginnings(rewrite_of(config, begin.base)(family, spec) if config.has_adapter else spec)
    return PolicyData(
        train=Unmade(),
        evaluation=None,
        test=None,
        reports=prompts.reports,
        lines=prompts.lines,
        highest_id=prompts.highest_id,
        answers_evaluated=bool(prompts.evaluation),
        prompts=prompts,
        tokenizer=tokenizer,
        share=share,
        episodes=episodes,
    )


def make_episodes(config: PolicyConfig, tokenizer: Tokenizer) -> Episodes | None:
    """What speaks between the model's turns, if something does."""
    if config.environment is None and not config.tools:
        return None
    limits = EpisodeLimits(
        max_turns=config.max_turns,
        max_tokens=config.max_length or config.max_prompt_len + config.max_new_tokens,
        max_appended=config.max_appended,
    )
    if config.environment is not None:
        factory: Callable[[], Environment] = find_environment(config.environment)
        return Episodes(factory=factory, encoder=SuffixEncoder(tokenizer), limits=limits)
    tools = find_tools(config.tools)
    schemas = ToolEnvironment(tools, tokenizer).schemas
    return Episodes(
        factory=lambda: ToolEnvironment(tools, tokenizer),
        encoder=SuffixEncoder(tokenizer, tools=schemas),
        limits=limits,
    )


def make_plan(config: PolicyConfig, aggregation: Aggregation, *, share: bool) -> Plan:
    """How a rollout becomes batches."""
    return Plan(
        prompts=config.prompts_per_step,
        per_update=config.per_update,
        passes=config.gradient_accumulation_steps,
        iters=config.update_iters,
        aggregation=aggregation,
        longest=config.max_new_tokens,
        seed=config.seed,
        ahead=config.max_staleness > 0,
        share=share,
    )


def make_sampler(config: PolicyConfig, model: Decoder, data: PolicyData) -> Sampler:
    """What answers prompts by the model's own weights."""
    assert config.max_length is not None, "settled where not given"
    count = config.prompts_per_step * config.samples_per_prompt
    policy = Policy(
        model,
        data.tokenizer,
        compute=config.rollout_compute,
        rows=config.rollout_max_num_seqs or min(count, _MOST_ROWS),
        max_length=config.max_length,
        ahead=config.max_staleness > 0,
    )
    sampling = Sampling(
        max_new_tokens=config.max_new_tokens,
        min_new_tokens=config.min_new_tokens,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
    )
    return Sampler(policy=policy, sampling=sampling, max_length=config.max_length, conversations=data.episodes)


def make_rewards(config: PolicyConfig, tokenizer: Tokenizer, watch: Watch) -> Rewards | None:
    """What answers are worth; None: an environment says it."""
    if not config.rewards:
        return None
    return Rewards.from_settings(
        config.rewards, weights=config.reward_weights or None, tokenizer=tokenizer, watch=watch
    )


def make_referee(config: PolicyConfig, begin: Start, model: Decoder, *, share: bool, judged: bool) -> Referee:
    """The model, and beside it where one is needed a frozen copy of what it was."""
    reference: Decoder | None = None
    if judged and not config.has_adapter:
        reference = load_decoder(begin.base, dtype=DTYPES[config.dtype], device=model.device, config=begin.config)
        reference.eval().requires_grad_(False)
    assert config.max_length is not None
    return Referee(
        model=model,
        reference=reference,
        temperature=config.temperature,
        capacity=max(_CAPACITY, config.max_length),
        share=share,
    )


def make_batches(
    config: PolicyConfig,
    data: PolicyData,
    plan: Plan,
    sampler: Sampler,
    rewards: Rewards | None,
    study: Study,
    watch: Watch,
    console: Console,
    *,
    companion: Callable[[int], Batch] | None = None,
    **how: Any,
) -> RolloutBatches:
    """The batches of the run. ``companion``: see ``RolloutBatches``; ``how``: further settings of the collector."""
    order = PromptOrder(data.prompts.train, config.seed)
    overlong = None
    if config.overlong_buffer > 0:
        overlong = Overlong(
            longest=config.max_new_tokens, buffer=config.overlong_buffer, penalty=config.overlong_penalty
        )
    collector = Collector(
        order=order,
        sampler=sampler,
        scorer=rewards,
        prompts=config.prompts_per_step,
        samples=config.samples_per_prompt,
        seed=config.seed,
        waiting=waiting_aloud(watch, console, config.waiting_limit),
        overlong=overlong,
        **how,
    )
    samples = SampleLog(Path(config.output_dir), count=config.num_sample_rows, every=config.logging_steps)
    still, failed = StillRewards(console), None if rewards is None else FailedRewards(rewards, console)

    def told(scored: Scored, step: int, facts: Mapping[str, float]) -> None:
        samples.note(scored, step)
        still.look(step, facts)
        if failed is not None:
            failed.look(step)

    made = RolloutBatches(
        order=order,
        plan=plan,
        collector=collector,
        study=study,
        refresh=sampler.policy.refresh,
        fingerprint=data.prompts.fingerprint,
        told=told,
        rewind=samples.rewind,
        companion=companion,
    )
    made.last_update = total_steps(config, made)
    console.print(
        f"rollouts: {config.prompts_per_step} prompts x {config.samples_per_prompt} answers by {sampler.policy.how}"
    )
    return made


def evaluation_of(config: PolicyConfig, data: PolicyData) -> Callable[[], Mapping[str, float]] | None:
    """Rewards of answers to held-out prompts, drawn ones and greedy ones."""
    prompts = data.prompts.evaluation
    if not prompts or data.sampler is None:
        return None
    sampler, rewards, batches = data.sampler, data.rewards, data.train
    assert isinstance(batches, RolloutBatches), batches
    if config.max_evaluate_steps > 0:
        prompts = prompts[: config.max_evaluate_steps * config.per_device_eval_batch_size]

    def evaluate() -> Mapping[str, float]:
        batches.wait()  # an evaluation gives the engine the newest weights, and a rollout on its way has older ones
        return evaluate_policy(
            sampler, rewards, prompts, samples=config.eval_samples, seed=config.seed, passing=config.pass_reward
        )

    return evaluate
