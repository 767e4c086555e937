"""Translate option names of other trainers, and list the options of transformers that are refused."""

from __future__ import annotations


def _each(groups: dict[str, str]) -> dict[str, str]:
    """Map each name to its text. ``groups`` maps each text to its names."""
    return {name: text for text, names in groups.items() for name in names.split()}


# Map our option to its names in other trainers and in earlier versions. Similar names are found without this table.
OTHER_NAMES = _each(
    {
        "model": "model_name_or_path",
        "model: an adapter's folder is trained further": "lora_model_dir",
        "train_data": "dataset_name datasets data",
        "train_data, as NAME:SPLIT": "dataset_train_split",
        "train_data, with a field subset": "dataset_config",
        "eval_data": "test_datasets",
        "eval_data, as NAME:SPLIT": "dataset_test_split",
        "eval_data, a file of its own": "val_set_size",
        "output_dir": "logging_dir",
        "another output_dir, or resume_from_checkpoint": "overwrite_output_dir",
        "resume_from_checkpoint": "resume",
        "max_length, of prompt and both responses": "cutoff_len max_seq_length sequence_len max_prompt_length "
        "max_completion_length",
        "objective": "loss_type rl pref_loss",
        "objective: simpo": "reference_free",
        "beta": "dpo_beta",
        "tau": "discopop_tau",
        "divergence": "f_divergence_type",
        "divergence_alpha": "f_alpha_divergence_coef",
        "per_device_train_batch_size, pairs of one process": "batch_size dataloader_batch_size micro_batch_size",
        "num_train_epochs": "epochs",
        "learning_rate": "lr",
        "warmup_steps, below 1 a share of all steps": "warmup_ratio",
        "bf16": "mixed_precision",
        "dtype": "param_dtype torch_dtype",
        "dtype, or bf16": "precision",
        "attn_implementation": "attn",
        "attn_implementation: flash_attention_2": "flash_attention use_flash_attention_2",
        "use_cpu": "no_cuda",
        "logging_steps": "log_every",
        "eval_steps": "eval_every evals_per_epoch evaluation_steps",
        "save_steps": "save_every saves_per_epoch",
        "save_total_limit: 1": "save_only_last",
        "report_to: wandb": "wandb_project",
        "sample_prompts": "generate_during_eval",
        "lora": "use_lora use_peft peft_config finetuning_type adapter",
        "lora.r": "lora_rank",
        "lora.target_modules": "lora_target",
        "lora.target_modules: all-linear": "lora_target_linear",
        "lora.modules_to_save": "additional_target",
        "lora.use_dora": "use_dora",
        "lora.use_rslora": "use_rslora",
        "quantization: 4bit": "load_in_4bit",
        "quantization: 8bit": "load_in_8bit",
    }
)
# Map a reason, or a replacement, to the names in other trainers that have no option here.
WITHOUT_OPTION = _each(
    {
        "not needed: reference log-probs are always computed once": "precompute_ref_log_probs "
        "precompute_ref_batch_size",
        "not needed: the reference is always the model before training": "sync_ref_model reference_model ref_model",
        "not needed: dropout is always off": "disable_dropout",
        "not needed: max_batch_tokens fills each pass with pairs of similar length": "padding_free packing "
        "sample_packing group_by_length",
        "not needed: weights are always saved as safetensors": "save_safetensors",
        "not needed: data are tokenised in pieces, once, and cached": "dataset_num_proc dataset_streaming",
        "not needed: the loss is fused already": "use_liger_loss",
        "not needed: code from a model's repository is never run": "trust_remote_code",
        "not needed: padding is never scored": "label_pad_token_id",
        "not needed: adapters are always for causal language models": "lora_task_type",
        "not needed: best/ holds the best model": "early_stopping_patience",
        "a mixture with SFT needs a loop of your own, with ik.Mixture": "rpo_alpha pref_ftx",
        "a mixture of objectives needs a loop of your own, with ik.Mixture": "loss_weights",
    }
)

# Options of TrainingArguments that would be ignored or do harm here, with the reason or the alternative.
UNSUPPORTED = _each(
    {
        "the objective's own option is label_smoothing": "label_smoothing_factor",
        "max_batch_tokens bounds the memory of each forward pass, in evaluations, too": "auto_find_batch_size "
        "per_device_eval_batch_size eval_accumulation_steps batch_eval_metrics torch_empty_cache_steps",
        "policy and reference must be the same function at step 1": "neftune_noise_alpha",
        "its loss would replace this one; give train(model=...) a model with its other kernels": "use_liger_kernel",
        "float16 needs loss scaling; use bf16": "fp16",
        "use bf16": "fp16_full_eval bf16_full_eval",
        "lengths differ from pass to pass": "torch_compile torch_compile_backend torch_compile_mode",
        "keep_best leaves the best model, by accuracy from the prompt alone, in best/": "load_best_model_at_end "
        "metric_for_best_model",
        "a run cannot resume without the optimizer state; final/ and best/ hold only the model": "save_only_model",
        "SIGTERM saves a checkpoint in any case": "enable_jit_checkpoint",
        "a resumed run continues with the next pairs": "ignore_data_skip",
        "eval_data is always scored before step 1": "eval_on_start",
        "an evaluation always reports all its metrics": "prediction_loss_only",
        "each epoch has all pairs": "dataloader_drop_last",
        "each epoch is a permutation that depends on seed": "train_sampling_strategy",
        "seed orders the pairs": "data_seed",
        "pairs are tokenised before training": "dataloader_num_workers",
        "only data parallelism is supported: DDP, FSDP2, DeepSpeed": "parallelism_config",
        "push_to_hub uploads final/ at the end": "hub_strategy",
        "only the first process writes; give an output_dir that all nodes share": "save_on_each_node",
        "a step that is not finite stops the run and names its pairs": "debug",
        "num_tokens is in every row of metrics.jsonl": "include_num_input_tokens_seen",
        "a step is always the exact mean over its pairs": "average_tokens_across_devices",
    }
)

# Values that cannot work here: (option, part of the value, reason).
UNSUPPORTED_VALUES = (
    ("save_strategy", "best", "keep_best leaves the best model in best/"),
    ("optim", "layerwise", "it updates weights within each backward pass, of which a step has several"),
    ("optim", "lomo", "it updates weights within each backward pass, of which a step has several"),
    ("optim", "schedule_free", "its weights differ between training and evaluation; the loop does not switch them"),
    ("lr_scheduler_type", "reduce_lr_on_plateau", "it follows evaluations, not steps; use cosine or linear"),
    ("lr_scheduler_type", "greedy", "it follows evaluations, not steps; use cosine or linear"),
)
