"""The names that flags have in other projects, or had in older versions: what to give here instead."""

import difflib

# Flags that were renamed or taken out, here or in transformers 5, and those of docs/coming_from.md -> what to write.
RENAMED = {
    "accumulation_steps": "nothing: it follows from --tokens_per_step",
    "adafactor": "--optim adafactor",
    "batch_size": "--per_device_train_batch_size",
    "block_size": "--context_length",
    "config_name": "--model, whose weights wiki_zh_scratch.py does not load",
    "config_overrides": "the recipe's dict MODEL",
    "continue_training": "openwebtext_continue.py, which continues weights; --from_scratch there, which does not",
    "data_path": "--data",
    "dataset_config_name": "--data with owner/name:subset",
    "dataset_name": "--data",
    "do_lower_case": "nothing: the tokenizer decides it",
    "dtype": "nothing: the launcher's YAML owns the precision",
    "epochs": "--num_train_epochs",
    "eval_batch_size": "--per_device_eval_batch_size",
    "eval_dataset_path": "--held_out_fraction; openwebtext_continue.py measures another file with --retain",
    "evaluation_strategy": "--eval_strategy",
    "fp16_backend": "nothing: the launcher's YAML owns the precision",
    "fp16_opt_level": "nothing: the launcher's YAML owns the precision",
    "from_resume": "nothing, the same command continues",
    "from_weight": "openwebtext_continue.py with --model",
    "fsdp_min_num_params": "nothing: the launcher's YAML owns the strategy",
    "fsdp_transformer_layer_cls_to_wrap": "nothing: the launcher's YAML owns the strategy",
    "group_by_length": "nothing: all rows are equally long",
    "half_precision_backend": "nothing: the launcher's YAML owns the precision",
    "hidden_size": "the recipe's dict MODEL, or --target_parameters 64M",
    "include_tokens_per_second": "nothing: the log has tokens_per_second_per_device",
    "input_dir": "--data",
    "jit_mode_eval": "nothing: the launcher's YAML owns compiling",
    "logging_dir": "TENSORBOARD_LOGGING_DIR in the environment",
    "lr": "--learning_rate",
    "max_iters": "--max_steps",
    "max_seq_len": "--context_length",
    "max_seq_length": "--context_length",
    "min_learning_rate": "--lr_scheduler_type cosine_with_min_lr --lr_scheduler_kwargs '{\"min_lr\": 3e-6}'",
    "min_lr": "--lr_scheduler_type cosine_with_min_lr --lr_scheduler_kwargs '{\"min_lr\": 3e-6}'",
    "model_name_or_path": "--model",
    "model_type": "the recipe's dict MODEL, or --model",
    "no_cuda": "--use_cpu",
    "num_hidden_layers": "the recipe's dict MODEL, or --target_parameters 64M",
    "overwrite_output_dir": "nothing, the same command continues; or another --output_dir",
    "per_gpu_eval_batch_size": "--per_device_eval_batch_size",
    "per_gpu_train_batch_size": "--per_device_train_batch_size",
    "pipeline_parallel_degree": "recipes/explicit_pipeline.py --pipeline_processes 2",
    "preprocessing_num_workers": "nothing: all cores tokenize",
    "push_to_hub_model_id": "--hub_model_id",
    "recompute_granularity": "--recompute",
    "save_dir": "--output_dir",
    "save_safetensors": "nothing: weights are always saved as safetensors",
    "seq_length": "--context_length",
    "sequence_parallel": "nothing: accelerate_configs/tensor_parallel.yaml, and for long rows fsdp2_ulysses.yaml",
    "sharding": "nothing: the launcher's YAML owns the strategy, such as accelerate_configs/zero2.yaml",
    "sharding_parallel_degree": "nothing: the launcher's YAML owns the strategy, such as accelerate_configs/zero2.yaml",
    "tensor_parallel_degree": "accelerate_configs/tensor_parallel.yaml with --parallelism_config_tp_size",
    "to_static": "nothing: the launcher's YAML owns compiling, --dynamo_backend",
    "tokenizer_name": "--tokenizer",
    "tokenizer_name_or_path": "--tokenizer",
    "torch_dtype": "nothing: the launcher's YAML owns the precision",
    "torchdynamo": "nothing: the launcher's YAML owns compiling, --dynamo_backend",
    "train_batch_size": "--per_device_train_batch_size",
    "train_dataset_path": "--data",
    "train_dataset_prob": "--data_weights",
    "train_file": "--data",
    "train_files": "--data",
    "unified_checkpoint": "nothing: the same command continues on another number of cards",
    "use_compile": "nothing: the launcher's YAML owns compiling, --dynamo_backend",
    "use_flash_attention": "nothing: the fastest kernel is chosen; --attn_implementation",
    "use_ipex": "nothing: torch has what it did",
    "use_moe": "--model qwen3-moe-a60m",
    "use_mps_device": "nothing: an accelerator that is there is used",
    "use_swanlab": "--swanlab online",
    "use_wandb": "--report_to wandb",
    "validation_file": "--held_out_fraction; openwebtext_continue.py measures another file with --retain",
    "validation_split_percentage": "--held_out_fraction, a share: 0.05 for 5",
    "virtual_pp_degree": "recipes/explicit_pipeline.py with --stages_per_process",
    "warmup_ratio": "--warmup_steps, which below 1 is a share of all steps",
}


def hints(unknown: list[str], names: list[str]) -> str:
    """Return what may have been meant by flags that are unknown, as a sentence after their names."""
    found = []
    if unknown and unknown[0].endswith((".json", ".yaml", ".yml")):
        found.append(". Settings are the recipe's dicts and flags; no file is read")
    for word in unknown:
        if not word.startswith("--"):
            continue
        name = word.removeprefix("--").partition("=")[0].replace("-", "_")
        longer = [known for known in names if name and known.startswith(name)]
        close = difflib.get_close_matches(name, names, n=1, cutoff=0.7)
        if name in RENAMED:
            found.append(f". Instead of --{name}: {RENAMED[name]}")
        elif name == "sample":
            found.append(". Instead, here: --data data/sample_zh.jsonl")
        elif longer or close:
            found.append(f". Did you mean --{(close or longer)[0]}?")
    return "".join(found)
