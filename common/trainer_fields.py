"""Every field of transformers' TrainingArguments: refused, without influence on what is trained, or deciding.

A field that is in no list below decides what a run trains: ``run.json`` keeps its value, and a relaunch with another
one is refused. So a field that a new version of transformers brings decides until somebody lists it. A test names all
fields, and fails then.
"""

from dataclasses import MISSING, Field, fields

from transformers import TrainingArguments

from common.console import InputError

# Field -> why another value than the default of transformers would not do what its documentation says.
REFUSED = {
    "accelerator_config": "the recipes decide how rows reach the processes",
    "auto_find_batch_size": "it would change the tokens of a step",
    "average_tokens_across_devices": "the loss of a step is the mean over the targets of all processes",
    "batch_eval_metrics": "an evaluation is the mean loss over all targets, and keeps no predictions",
    "bf16_full_eval": "the model itself would be cast, and saved so",
    "dataloader_drop_last": "no row is dropped: ignored rows complete the last batch",
    "dataloader_in_order": "rows come in one order, so that a run can be continued at the next row",
    "deepspeed": "the launcher's YAML owns the strategy: accelerate_configs/zero2.yaml",
    "enable_jit_checkpoint": "the recipes save at SIGTERM by themselves",
    "eval_accumulation_steps": "an evaluation is the mean loss over all targets, and keeps no predictions",
    "eval_do_concat_batches": "an evaluation is the mean loss over all targets, and keeps no predictions",
    "eval_use_gather_object": "an evaluation is the mean loss over all targets, and keeps no predictions",
    "fp16_full_eval": "the model itself would be cast, and saved so",
    "fsdp": "the launcher's YAML owns the strategy: accelerate_configs/fsdp2.yaml",
    "fsdp_config": "the launcher's YAML owns the strategy: accelerate_configs/fsdp2.yaml",
    "greater_is_better": "a run ends with its last weights, and compares no checkpoints",
    "hub_always_push": "the model is uploaded once, when it is trained",
    "hub_token": "it would be saved in training_args.bin; export HF_TOKEN instead",
    "ignore_data_skip": "a continued run begins at the next row, without reading those before",
    "include_for_metrics": "an evaluation is the mean loss over all targets, and keeps no predictions",
    "include_num_input_tokens_seen": "the log has tokens_seen, which is exact",
    "label_names": "the recipes make the targets",
    "label_smoothing_factor": "Trainer would shift the targets a second time",
    "length_column_name": "all rows are equally long",
    "liger_kernel_config": "the recipes have a fused loss of their own",
    "load_best_model_at_end": "a run ends with its last weights",
    "metric_for_best_model": "a run ends with its last weights, and compares no checkpoints",
    "parallelism_config": "the launcher's YAML owns it: accelerate_configs/fsdp2_context_parallel.yaml",
    "restore_callback_states_from_checkpoint": "the recipes' callbacks continue from the checkpoint by themselves",
    "resume_from_checkpoint": "the same command resumes by itself",
    "save_on_each_node": "all machines share --output_dir",
    "save_only_model": "such a checkpoint cannot be resumed exactly",
    "torch_compile": "the launcher's YAML owns it: dynamo_config, --dynamo_backend",
    "torch_compile_backend": "the launcher's YAML owns it: dynamo_config, --dynamo_backend",
    "torch_compile_mode": "the launcher's YAML owns it: dynamo_config, --dynamo_mode",
    "train_sampling_strategy": "the recipes have their own order of rows",
    "use_cache": "with a cache of keys and values, documents of one row would see each other",
    "use_liger_kernel": "the recipes have a fused loss of their own",
}
ONCE_A_RUN = "Trainer sees all passes over the data as one epoch, so it would act once, at the end"
# Field -> the values that do what they say, and why the others do not. All other values are refused.
CHOICES = {
    "eval_strategy": (("steps", "no"), f"{ONCE_A_RUN}; a fraction is a share of the run: --eval_steps 0.5"),
    "logging_strategy": (("steps",), f"{ONCE_A_RUN}, and a run continues by its log; rarely: --logging_steps 1000"),
    "save_strategy": (
        ("steps", "no"),
        f"{ONCE_A_RUN}, and checkpoints are not compared; a fraction is a share of the run: --save_steps 0.5",
    ),
}
# Field -> why it has no influence on what is trained: it may differ at every relaunch.
NOT_DECIDING = {
    "activation_checkpointing": "the same numbers, computed twice",
    "activation_checkpointing_kwargs": "the same numbers, computed twice",
    "dataloader_multiprocessing_context": "how rows are read, not which",
    "dataloader_num_workers": "how rows are read, not which",
    "dataloader_persistent_workers": "how rows are read, not which",
    "dataloader_pin_memory": "how rows are copied, not which",
    "dataloader_prefetch_factor": "how rows are read, not which",
    "ddp_backend": "how gradients are exchanged",
    "ddp_broadcast_buffers": "how gradients are exchanged",
    "ddp_bucket_cap_mb": "how gradients are exchanged",
    "ddp_find_unused_parameters": "how gradients are exchanged",
    "ddp_static_graph": "how gradients are exchanged",
    "ddp_timeout": "how long processes wait for each other",
    "debug": "what is printed of a fault",
    "disable_tqdm": "what is shown",
    "do_eval": "read by nobody: every run evaluates",
    "do_predict": "read by nobody: --split asks for a test",
    "do_train": "read by nobody: every run trains",
    "eval_delay": "when to evaluate",
    "eval_on_start": "when to evaluate",
    "eval_steps": "when to evaluate",
    "eval_strategy": "when to evaluate",
    "full_determinism": "slower kernels with the same numbers, up to rounding",
    "gradient_accumulation_steps": "run.json has the rows of a step",
    "gradient_checkpointing": "the same numbers, computed twice",
    "gradient_checkpointing_kwargs": "the same numbers, computed twice",
    "hub_model_id": "where the model is uploaded",
    "hub_private_repo": "where the model is uploaded",
    "hub_revision": "where the model is uploaded",
    "hub_strategy": "when the model is uploaded",
    "local_rank": "read by nobody: the launcher's environment counts",
    "log_level": "what is shown",
    "log_level_replica": "what is shown",
    "log_on_each_node": "what is shown",
    "logging_first_step": "when to log",
    "logging_nan_inf_filter": "what is logged",
    "logging_steps": "when to log",
    "logging_strategy": "when to log",
    "max_steps": "the length of a run may change; a note says that the schedule moves with it",
    "num_train_epochs": "the length of a run may change; a note says that the schedule moves with it",
    "output_dir": "a folder may be moved",
    "per_device_eval_batch_size": "the mean over all targets is the same",
    "per_device_train_batch_size": "run.json has the rows of a step",
    "prediction_loss_only": "an evaluation computes losses only, in both cases",
    "project": "names at a tracker",
    "push_to_hub": "whether the model is uploaded",
    "remove_unused_columns": "rows have no other columns, in both cases",
    "report_to": "what is logged where",
    "run_name": "names at a tracker",
    "save_steps": "when to save",
    "save_strategy": "when to save",
    "save_total_limit": "which checkpoints are kept",
    "skip_memory_metrics": "what is logged",
    "torch_empty_cache_steps": "memory, not numbers",
    "trackio_bucket_id": "names at a tracker",
    "trackio_space_id": "names at a tracker",
    "trackio_static_space_id": "names at a tracker",
    "use_cpu": "where it is computed",
}


def deciding_fields() -> list[str]:
    """Return the names of the fields that decide what is trained."""
    return [each.name for each in fields(TrainingArguments) if each.name not in REFUSED.keys() | NOT_DECIDING.keys()]


def default_of(field: Field) -> object:
    """Return the default of a field of a dataclass."""
    return field.default if field.default_factory is MISSING else field.default_factory()


def check_fields(values: dict) -> None:
    """Refuse what would not do here what the documentation of TrainingArguments says.

    Args:
        values: field -> its value, from the command line or a recipe's dict.

    Raises:
        InputError: with the reason, and with the way that works.
    """
    for each in fields(TrainingArguments):
        if each.name not in values:
            continue
        value = values[each.name]
        if each.name in REFUSED and value != default_of(each):
            raise InputError(f"--{each.name}: not with these recipes, {REFUSED[each.name]}. Leave it out.")
        if each.name in CHOICES and value not in CHOICES[each.name][0]:
            works, why = CHOICES[each.name]
            raise InputError(f"--{each.name} {value}: {why}. What works: {' or '.join(works)}")
    if values.get("push_to_hub") and values["hub_strategy"] != "end":
        raise InputError(
            f"--push_to_hub with --hub_strategy {values['hub_strategy']}: checkpoints would be uploaded half written. "
            "Add --hub_strategy end, which uploads the model when it is trained."
        )
    for name in ("dataloader_persistent_workers", "dataloader_multiprocessing_context", "dataloader_prefetch_factor"):
        if values.get(name) and not values["dataloader_num_workers"]:
            raise InputError(f"--{name} {values[name]}: there are no workers. Add --dataloader_num_workers 2.")
