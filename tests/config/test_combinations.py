"""Every impossible combination is refused, with a reason and a fix, before torch is imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import oarsmith
from oarsmith.config.bench import BenchConfig
from oarsmith.config.checkpoints import ConvertConfig, MergeAdapterConfig
from oarsmith.config.combinations import IMPOSSIBLE
from oarsmith.config.dpo import DpoConfig, KtoConfig
from oarsmith.config.eval import EvalConfig
from oarsmith.config.inference import ChatConfig, GenerateConfig
from oarsmith.config.load import load_config
from oarsmith.config.merge import MergeConfig
from oarsmith.config.policy import GrpoConfig
from oarsmith.config.ppo import PpoConfig
from oarsmith.config.preprocess import PreprocessConfig
from oarsmith.config.pretrain import PretrainConfig
from oarsmith.config.quantize import QuantizeConfig
from oarsmith.config.sft import SftConfig
from oarsmith.errors import ConfigError

_FILE = f"--dataset_name_or_path={__file__}"
CASES = [
    (GrpoConfig, "--z_loss 0.1", "z_loss is for training on texts"),
    (GrpoConfig, "--use_ssa", "use_ssa is for training on texts"),
    (
        PpoConfig,
        "--use_pose_convert --rope_scaling_type yarn --rope_scaling_factor 2",
        "use_pose_convert is for training on texts",
    ),
    (PpoConfig, "--neftune", "neftune is for training on texts"),
    (GrpoConfig, "--do_predict", "do_predict is for training on texts"),
    (GrpoConfig, "--rewards []", "nothing says what an answer is worth"),
    (GrpoConfig, "--rewards [] --environment a.py:A --reward_weights 2", "the environment alone gives them"),
    (GrpoConfig, "--environment a.py:A --tools b.py:b", "environment and tools both say"),
    (GrpoConfig, "--raw --tools b.py:b", "rendered by the chat template"),
    (GrpoConfig, "--max_length 100", "max_prompt_len 512 leaves no room"),
    (GrpoConfig, "--min_new_tokens 9 --max_new_tokens 8", "min_new_tokens 9 is more"),
    (GrpoConfig, "--overlong_buffer 9 --max_new_tokens 8", "overlong_buffer 9 is more"),
    (GrpoConfig, "--prompts_per_update 9", "prompts_per_update is 9"),
    (PpoConfig, "--optimizer_in_backward --max_grad_norm 0 --per_device_train_batch_size 2", "in a single pass"),
    (GrpoConfig, "--adapter_type loraga", "loraga begins from gradients on rows"),
    (GrpoConfig, f"{_FILE} --evaluation_strategy steps", "no eval data is named"),
    (GrpoConfig, "--max_staleness 1 --temperature 0.5", "those of temperature 1"),
    (GrpoConfig, "--max_staleness 1 --ignore_data_skip", "the rollout that is made ahead"),
    (PpoConfig, "--critic shared --critic_model_name_or_path c", "a shared critic is a head"),
    (PpoConfig, "--critic_recompute", "for a critic of its own"),
    (PpoConfig, "--adapter_type adalora", "adalora does things around the optimizer"),
    (PpoConfig, "--optimizer_in_backward --max_grad_norm 0", "the critic is updated after the backward pass"),
    (PpoConfig, "--dtype fp16", "the critic's gradients have no loss scale"),
    (PpoConfig, "--kl_target 1 --kl_coeff 0", "0 cannot be moved"),
    (GrpoConfig, "--max_staleness 1 --old_logprobs trainer", "are gone before the trainer could score"),
    (GrpoConfig, "--temperature 0.5 --importance_sampling token_mask", "drawn at 0.5"),
    (GrpoConfig, "--max_staleness 1 --importance_sampling token_mask", "log-probabilities already"),
    (
        GrpoConfig,
        "--update_iters 2 --old_logprobs sampler --importance_sampling token_mask",
        "log-probabilities already",
    ),
    (GrpoConfig, "--samples_per_prompt 1", "grpo compares answers to the same prompt"),
    (
        GrpoConfig,
        "--clip_range_ratio 0.2 --clip_range_ratio_low 0.1 --clip_range_ratio_high 0.3",
        "say three things",
    ),
    (GrpoConfig, "--kl_corrected", "kl_corrected changes a KL term"),
    (SftConfig, "--do_train 0 --do_eval 0", "nothing to do"),
    (SftConfig, "--overwrite_output_dir --resume_from_checkpoint runs/x", "starts anew"),
    (DpoConfig, "--metric_for_best_model perplexity", "perplexity is a number of single texts"),
    (KtoConfig, "--metric_for_best_model bleu4", "bleu4 is a number of single texts"),
    *((keys, "--z_loss 0.1", "z_loss is for oarsmith sft") for keys in (DpoConfig, KtoConfig)),
    *((keys, "--use_ssa", "use_ssa is for oarsmith sft") for keys in (DpoConfig, KtoConfig)),
    *((keys, "--use_pose_convert", "use_pose_convert is for oarsmith sft") for keys in (DpoConfig, KtoConfig)),
    (DpoConfig, "--ref_model_update_steps 4 --ignore_data_skip", "kept with the place in the data"),
    (SftConfig, "--max_length 8 --src_length 8", "src_length 8 leaves no room"),
    (SftConfig, "--max_steps 0", "max_steps is 0"),
    (SftConfig, "--min_learning_rate 1e-3", "min_learning_rate 0.001 is above learning_rate 2e-05"),
    (SftConfig, "--lr_scheduler_type constant --min_learning_rate 1e-6", "never reaches"),
    (SftConfig, "--max_steps 10 --warmup_steps 10", "warmup"),
    (SftConfig, "--lora_rank 16", "no effect without lora true"),
    (SftConfig, "--lora_plus_scale 4", "no effect without an adapter with LoRA's matrices"),
    (SftConfig, "--pissa --lora_start gaussian", "lora_start is given, but has no effect without adapter_type lora"),
    (SftConfig, "--lora --pissa_niter 4", "pissa_niter is given, but has no effect without adapter_type pissa"),
    (SftConfig, "--lora --loraga_gamma 4", "no effect without adapter_type loraga"),
    (SftConfig, "--lora --adalora_tinit 4", "no effect without adapter_type adalora"),
    (SftConfig, "--adapter_type bottleneck --qat w8a8", "bottleneck cannot be merged"),
    (SftConfig, "--lora --qat w8a8 --lora_dropout 0.1", "which has no dropout"),
    (SftConfig, "--lora --qat_group_size 32", "qat_group_size is given, but has no effect without qat"),
    (MergeConfig, "--search grid", "nothing to judge merges by"),
    (MergeConfig, "--search grid --evaluate x --search_range 1,0", "is no range"),
    (MergeConfig, "--search grid --evaluate x --search_range 1", "is no range"),
    (MergeConfig, "--experts [{}] --adapter_rank 2", "neither searched nor judged"),
    (MergeConfig, "--experts [{}] --sparsify_type dare", "nothing is sparsified"),
    (MergeConfig, "--experts [{}] --merge_method ties", "experts are not merged"),
    (MergeConfig, "--experts [{}] --tokenizer_source union", "a mixture has its base's vocabulary"),
    (MergeConfig, "--model_path_list a,b --parameters {}", "names for the parameters"),
    (MergeConfig, "--base_model_path a", "base_model_path belongs to flags"),
    (MergeConfig, "--adapter_rank 2 --tokenizer_source union", "vocabulary"),
    (QuantizeConfig, "--damp_percent 0.1", "damp_percent is given, but has no effect without algorithm gptq or gptaq"),
    (QuantizeConfig, "--act_order false", "act_order is given, but has no effect without algorithm gptq or gptaq"),
    (QuantizeConfig, "--static_groups false", "static_groups is given, but has no effect"),
    (QuantizeConfig, "--algorithm gptq --gptaq_alpha 0.5", "no effect without algorithm gptaq"),
    (QuantizeConfig, "--autoround_steps 3", "no effect without algorithm autoround"),
    (QuantizeConfig, "--algorithm gptq --auto_clip true", "no effect without algorithm awq or rtn"),
    (QuantizeConfig, "--algorithm hqq --scale_search mse", "scale_search is given, but has no effect"),
    (QuantizeConfig, "--scheme fp8 --group_size 64", "group_size is given, but has no effect"),
    (QuantizeConfig, "--scheme fp8 --symmetric false", "symmetric is given, but has no effect"),
    (QuantizeConfig, "--scheme w8a8 --act_quant_method avg", "act_quant_method is given, but has no effect"),
    (QuantizeConfig, "--on_over_budget warn", "on_over_budget is given, but has no effect"),
    (QuantizeConfig, "--device cuda", "quantized on the CPU"),
    (QuantizeConfig, "--smooth_alpha 0.8", "no effect without smooth smoothquant"),
    (QuantizeConfig, "--smooth none --smooth_k_piece 2", "smooth_k_piece is given"),
    (QuantizeConfig, "--smooth none --smooth_search_piece true", "smooth_search_piece is given"),
    (QuantizeConfig, "--smooth none --search_alpha_min 0.3", "search_alpha_min is given"),
    (QuantizeConfig, "--act_quant static", "act_quant is given, but has no effect"),
    (QuantizeConfig, "--cachekv_quant_method abs_max", "no effect without a scheme with c8"),
    (QuantizeConfig, "--algorithm awq --smooth piecewise", "awq finds factors of its own"),
    (QuantizeConfig, "--algorithm hqq --symmetric true", "hqq fits zeros"),
    (QuantizeConfig, "--scheme nf4 --algorithm gptq", "nf4 has a table of numbers"),
    (QuantizeConfig, "--scheme nf4 --scale_search mse", "nf4's scales are the largest"),
    (QuantizeConfig, "--algorithm autoround --scheme fp8", "autoround learns whole numbers"),
    (QuantizeConfig, "--search_scale_min 9", "the least value of a search"),
    (QuantizeConfig, "--budget kl=0.1 --kl_budget 0.1 --calibration t.txt", "is a limit of its own"),
    (QuantizeConfig, "--budget kl=0.1 --layout awq --calibration t.txt", "has a place for one number of bits only"),
    (QuantizeConfig, "--kl_budget 0.1", "cannot be checked without a text"),
    (SftConfig, "--adapter_type adalora --rslora", "rslora is given, but has no effect with adalora"),
    (SftConfig, "--adapter_type adalora --adalora_init_rank 7", "begins with rank 7 and would end with more"),
    (SftConfig, "--lorapro --optimizer_in_backward --max_grad_norm 0", "lorapro looks at the gradients of all"),
    (SftConfig, "--lora --num_prefix_tokens 3", "num_prefix_tokens is given, but has no effect without adapter_type"),
    (SftConfig, "--lora --prefix_dropout 0.1", "prefix_dropout is given, but has no effect without adapter_type"),
    (SftConfig, "--prefix_tuning --num_prompt_tokens 3", "no effect without adapter_type p_tuning or prompt_tuning"),
    (SftConfig, "--prefix_tuning --prompt_tuning_init random", "no effect without adapter_type prompt_tuning"),
    (SftConfig, "--adapter_type prompt_tuning --p_tuning_layers 3", "no effect without adapter_type p_tuning"),
    (SftConfig, "--lora --reft_layers 1,2", "no effect without adapter_type reft"),
    (SftConfig, "--prefix_tuning --lora_alpha 4", "lora_alpha is given, but has no effect with adapter_type prefix"),
    (SftConfig, "--reft --lora_dropout 0.1", "lora_dropout is given, but has no effect with adapter_type reft"),
    (SftConfig, "--reft --lora_target_modules q_proj", "lora_target_modules is given, but has no effect with"),
    (SftConfig, "--adapter_type bitfit --rslora", "rslora is given, but has no effect with adapter_type bitfit"),
    (SftConfig, "--prefix_tuning --lora_rank 4", "lora_rank is given, but has no effect with adapter_type prefix"),
    (SftConfig, "--prefix_tuning --prefix_projection_hidden_size 4", "no effect without prefix_projection"),
    (
        SftConfig,
        "--adapter_type prompt_tuning --prompt_tuning_init random --prompt_tuning_init_text a",
        "both say what the vectors begin as",
    ),
    (SftConfig, "--adapter_type p_tuning --p_tuning_dropout 0.1", "no effect without p_tuning_encoder lstm"),
    (SftConfig, "--reft --reft_intervention_type tiny --reft_add_bias", "no effect with reft_intervention_type tiny"),
    (SftConfig, "--adapter_type trainable_tokens", "but trainable_tokens names none"),
    (SftConfig, "--trainable_tokens 5", "trainable_tokens is given, but has no effect without an adapter"),
    (SftConfig, "--reft --trainable_tokens 5", "cannot be used beside adapter_type reft"),
    (SftConfig, "--adapter_type ia3 --lora_bias all", "trains biases beside LoRA, and adapter_type is ia3"),
    (SftConfig, "--prefix_tuning --use_ssa", "virtual tokens stand before the first"),
    (SftConfig, "--lora --vera_prng_key 3", "no effect without adapter_type vera"),
    (SftConfig, "--adapter_type loha --lokr_factor 3", "no effect without adapter_type lokr"),
    (SftConfig, "--vera --ia3_feedforward_modules down_proj", "no effect without adapter_type ia3"),
    (SftConfig, "--fourierft_seed 1", "no effect without adapter_type fourierft"),
    (SftConfig, "--adapter_type boft --oft_eps 0.1", "no effect without adapter_type oft"),
    (SftConfig, "--adapter_type oft --boft_factors 2", "no effect without adapter_type boft"),
    (SftConfig, "--lora --bottleneck_scale 2", "no effect without adapter_type bottleneck"),
    (SftConfig, "--adapter_type ia3 --lora_rank 4", "lora_rank is given, but has no effect with adapter_type ia3"),
    (SftConfig, "--use_mora --lora_alpha 4", "lora_alpha is given, but has no effect with adapter_type mora"),
    (SftConfig, "--adapter_type oft --lora_dropout 0.1", "lora_dropout is given, but has no effect with"),
    (SftConfig, "--lokr --rslora", "rslora is given, but has no effect with adapter_type lokr"),
    (SftConfig, "--adapter_type oft --oft_blocks 4 --oft_block_size 8", "oft_blocks and oft_block_size are both"),
    (SftConfig, "--adapter_type boft --boft_blocks 4 --boft_block_size 8", "boft_blocks and boft_block_size are"),
    (SftConfig, "--adapter_type oft --oft_exact --oft_neumann_terms 8", "oft_exact and oft_neumann_terms are"),
    (SftConfig, "--adapter_type oft --oft_eps 0.1", "no effect without oft_constrained"),
    (SftConfig, "--lora --weight_blocksize 32", "no effect without weight_quantize_algo nf4, fp4 or weight_only_int4"),
    (SftConfig, "--lora --weight_double_quant", "no effect without weight_quantize_algo nf4 or fp4"),
    (SftConfig, "--lora --load_in_4bit --weight_double_quant_block_size 64", "no effect without weight_double_quant"),
    (MergeAdapterConfig, "--requantize --dtype fp32", "the numbers that the base has"),
    (SftConfig, "--muon_momentum 0.9", "no effect without optim muon"),
    (SftConfig, "--projection_rank 4", "projection_scale is given, but has no effect"),
    (SftConfig, "--power 2", "no effect without lr_scheduler_type polynomial"),
    (SftConfig, "--num_cycles 2", "no effect without lr_scheduler_type cosine"),
    (PretrainConfig, "--wsd_decay_steps 3", "no effect without lr_scheduler_type wsd"),
    (SftConfig, "--neftune_noise_alpha 3", "no effect without neftune"),
    (SftConfig, "--no_recompute_layers 0,2", "no effect without recompute"),
    (SftConfig, "--ssa_group_size_ratio 0.5", "no effect without use_ssa"),
    (SftConfig, "--early_stopping_threshold 0.1", "no effect without early_stopping_patience"),
    (SftConfig, "--save_generation_output", "no effect without eval_with_do_generation"),
    (SftConfig, "--metric_for_best_model bleu4", "evaluations do not generate"),
    (PretrainConfig, "--metric_for_best_model rouge1", "a corpus has none"),
    (SftConfig, "--optimizer_in_backward", "clipped by their norm"),
    (SftConfig, "--optimizer_in_backward --max_grad_norm 0 --fp16", "overflow"),
    (SftConfig, "--lora --optim galore", "an adapter's matrices are small already"),
    (SftConfig, "--lora --weight_quantize_algo a8w8linear --dtype fp16", "computes the rest"),
    (SftConfig, "--rope_scaling_type yarn", "do not go together"),
    (SftConfig, "--use_pose_convert", "nothing stretches it"),
    (SftConfig, "--max_steps 10 --decay_steps 20", "after the end of the run"),
    (SftConfig, "--decay_steps 5 --warmup_steps 5", "not over when the fall ends"),
    (SftConfig, "--early_stopping_patience 2", "counts evaluations"),
    (PretrainConfig, "--split 1 --evaluation_strategy steps", "leaves no documents for it"),
    (PretrainConfig, "--split 9,1 --do_predict", "scores the test part"),
    (PretrainConfig, "--split 0,1 --evaluation_strategy no", "no documents to train on"),
    (PretrainConfig, "--num_hidden_layers 2 --continue_training", "continue_training is true"),
    (SftConfig, "--eval_dataset_path d --eval_split_ratio 0.1", "both"),
    (SftConfig, f"--dataset_name_or_path={__file__} --do_eval", "is one file and no eval data is named"),
    (SftConfig, f"--dataset_name_or_path={__file__} --do_predict", "scores a test"),
    (SftConfig, "--load_best_model_at_end", "evaluation_strategy is no"),
    (SftConfig, "--load_best_model_at_end --evaluation_strategy epoch", "evaluation_strategy is epoch"),
    (
        SftConfig,
        "--load_best_model_at_end --evaluation_strategy steps --eval_steps 3 --save_steps 10",
        "save_steps 10 is not a multiple of eval_steps 3",
    ),
    (PreprocessConfig, "--tokenizer t", "no output_prefix"),
    (PreprocessConfig, "--output_prefix out", "no tokenizer is named"),
    (PreprocessConfig, "--output_prefix out --tokenizer t --train_tokenizer u", "another one is to be trained"),
    (PreprocessConfig, "--output_prefix out --merge --dedup exact", "merge copies documents as they are"),
    (
        PreprocessConfig,
        "--output_prefix out --tokenizer t --minhash_num_perm 64",
        "minhash keys are given but",
    ),
    (PreprocessConfig, "--output_prefix out --tokenizer t --vocab_size 1000", "none is trained"),
    (PreprocessConfig, "--output_prefix out --tokenizer t --ray_address auto", "engine is local"),
    (GenerateConfig, "--mode static --dtype bf16", "a compiled package is what it is"),
    (
        GenerateConfig,
        "--prompt null --input_file i --output_file o --mode static --prompt_logprobs 1",
        "no log-probabilities of prompts",
    ),
    (BenchConfig, "--mode static --compare transformers", "do not read a compiled package"),
    (GenerateConfig, "--decode_strategy greedy --temperature 1", "greedy always takes"),
    (GenerateConfig, "--decode_strategy sampling --temperature 0", "not defined"),
    (GenerateConfig, "--decode_strategy greedy --n 2", "several answers would have no effect"),
    (ChatConfig, "--min_new_tokens 9 --max_new_tokens 8", "min_new_tokens 9 is more than max_new_tokens 8"),
    (ChatConfig, "--json_object --regex a+", "can be held to one of"),
    (ChatConfig, "--choices yes --ignore_eos", "could not end"),
    (GenerateConfig, "--n 3 --best_of 2", "best_of 2 is less than n 3"),
    (GenerateConfig, "--num_beams 2 --temperature 1", "a beam search does not draw"),
    (GenerateConfig, "--num_beams 2 --n 3", "n 3 is more than num_beams 2"),
    (GenerateConfig, "--ngram_min 4", "ngram_min 4 is more than ngram_max 3"),
    (GenerateConfig, "--logprobs 2", "there is none"),
    (GenerateConfig, "--prompt null", "give a prompt or an input_file"),
    (GenerateConfig, "--input_file rows.jsonl", "and not both"),
    (GenerateConfig, "--output_file rows.jsonl", "belong together"),
    (GenerateConfig, "--raw --system Be", "raw text has no chat template"),
    (ChatConfig, "--raw --system Be", "raw text has no chat template"),
    (ConvertConfig, "--src a --dst ./a", "the same place"),
    (EvalConfig, "", "give a file or tasks"),
    (EvalConfig, "--dataset_name_or_path t.txt --num_fewshot 2", "are for tasks"),
    (EvalConfig, "--tasks arc_easy --stride 8", "tasks bring their own"),
    (EvalConfig, "--tasks arc_easy --process_reward", "are for a file of judged answers"),
    (EvalConfig, "--dataset_name_or_path t.txt --max_length 8 --stride 9", "stride 9 is longer"),
]
BASE = {
    MergeConfig: {"--output_path": "o"},
    PreprocessConfig: {"--input_path": "in"},
    PretrainConfig: {"--model_name_or_path": "m", "--input_dir": "d"},
    SftConfig: {"--model_name_or_path": "m", "--dataset_name_or_path": "d"},
    DpoConfig: {"--model_name_or_path": "m", "--dataset_name_or_path": "d"},
    GrpoConfig: {"--model_name_or_path": "m", "--dataset_name_or_path": "d", "--rewards": "r.py:r"},
    PpoConfig: {"--model_name_or_path": "m", "--dataset_name_or_path": "d", "--rewards": "r.py:r"},
    KtoConfig: {"--model_name_or_path": "m", "--dataset_name_or_path": "d"},
    GenerateConfig: {"--model_name_or_path": "m", "--prompt": "hi"},
    ChatConfig: {"--model_name_or_path": "m"},
    ConvertConfig: {},
    MergeAdapterConfig: {"--adapter": "a"},
    EvalConfig: {"--model_name_or_path": "m"},
    BenchConfig: {"--model_name_or_path": "m"},
    QuantizeConfig: {"--model_name_or_path": "m", "--output_dir": "o"},
}


def words_of(config_class, line):
    base = [f"{key}={value}" for key, value in BASE[config_class].items() if f"{key}" not in line]
    return base + line.split()


@pytest.mark.parametrize(("config_class", "line", "message"), CASES)
def test_refused(config_class, line, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(config_class, None, words_of(config_class, line))
    assert caught.value.fix


SPREAD_CASES = [
    ("--pipeline_parallel_degree 2", "the layers"),
    ("--optimizer_in_backward --max_grad_norm 0", "other processes' gradients"),
    ("--optim muon --sharding stage3", "whole matrices"),
    ("--dtype fp16", "for one process"),
    ("--torch_compile --sharding stage3", "split is not built yet"),
    ("--offload_optim --sharding stage1", "split is not built yet"),
    ("--eval_with_do_generation --eval_split_ratio 0.1", "generates in one process"),
    ("--tensor_parallel_degree 2", "heads and columns"),
    ("--context_parallel_degree 2", "the tokens of a stream"),
]


@pytest.mark.parametrize(("line", "message"), SPREAD_CASES)
def test_several_processes(monkeypatch, line, message):
    words = ["m", "d", *line.split()]
    load_config(SftConfig, None, words)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=message):
        load_config(SftConfig, None, words)


def test_machines_must_know_where_to_meet():
    with pytest.raises(ConfigError, match="where to meet"):
        load_config(SftConfig, None, ["m", "d", "--nnodes", "2"])


def test_rewards_on_several_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="learning from rewards on several"):
        load_config(GrpoConfig, None, ["m", "d", "--rewards", "length"])


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
def test_trackers_must_be_installed(monkeypatch, name):
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(sys, "path_importer_cache", {})
    monkeypatch.delitem(sys.modules, name, raising=False)  # another test may have imported it
    with pytest.raises(ConfigError, match=rf"'{name}'.*not installed"):
        load_config(SftConfig, None, ["m", "d", "--report_to", name])


def test_every_line_is_tested():
    # The five by environment above have their own tests.
    assert len({message for _, _, message in CASES}) + 5 + len(SPREAD_CASES) >= len(IMPOSSIBLE)
    for line in IMPOSSIBLE:
        assert line.reason and line.fix


@pytest.mark.parametrize(
    "line",
    [
        "--lora --lora_rank 16",
        "--load_best_model_at_end --evaluation_strategy steps --eval_steps 5 --save_steps 10",
        "--max_steps 10 --warmup_steps 9",
        "--overwrite_output_dir",
        f"--dataset_name_or_path={__file__} --eval_split_ratio 0.1",
    ],
)
def test_allowed(line):
    load_config(SftConfig, None, words_of(SftConfig, line))


def test_refused_without_importing_torch():
    code = (
        "import sys; from oarsmith.cli import main; status = main(['sft', 'm', 'd', '--lora_rank', '16']); "
        "assert 'torch' not in sys.modules; sys.exit(status)"
    )
    root = str(Path(oarsmith.__file__).parents[1])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env={**os.environ, "PYTHONPATH": root})
    assert done.returncode == 2, done.stderr
