"""What options are called elsewhere, in PEFT, TRL, axolotl, LLaMA-Factory and Unsloth, or earlier here: hints to ours.

A key that is unknown is looked for among these names, and in the other tables of the file; `hint` says in one line
which field is meant. Nothing is taken for another without a word: a hint is all that such a key gets.
"""

import difflib
from collections.abc import Sequence

from .fields import tables

# Our fields for each foreign name: of those that the file has, in the table of the key if possible, each is meant. A
# name alone is that field of whichever table.
ELSEWHERE = {
    # The model.
    "model_name_or_path": "model.path", "model_name": "model.path", "base_model": "model.path",
    "model_id": "model.path", "pretrained_model_name_or_path": "model.path", "base_model_name_or_path": "model.path",
    "tokenizer_name_or_path": "tokenizer", "tokenizer_name": "tokenizer", "torch_dtype": "dtype", "precision": "dtype",
    "bf16": "dtype", "fp16": "dtype", "load_in_4bit": "quantize", "quantization_bit": "quantize",
    "bnb_4bit_quant_type": "quantize", "gradient_checkpointing": "recompute", "use_gradient_checkpointing": "recompute",
    "hidden_dropout_prob": "model.dropout", "attention_dropout": "model.dropout", "dropout_rate": "model.dropout",
    "adapter_name_or_path": "model.adapter",
    "activation_checkpointing": "recompute", "num_labels": "labels", "id2label": "labels", "device_map": "device",
    "new_special_tokens": "add_tokens", "additional_special_tokens": "add_tokens",
    # The run.
    "task_type": "method task", "training_type": "method", "stage": "method", "rl": "method", "output_dir": "out",
    "save_dir": "out", "run_name": "name", "project": "name",
    # The data.
    "dataset_name": "data.train prompts", "dataset_path": "data.train prompts", "data_path": "data.train",
    "train_file": "data.train", "train_dataset": "data.train prompts", "train_data": "data.train",
    "validation_file": "data.eval", "valid": "data.eval", "validation": "data.eval", "eval_dataset": "data.eval",
    "test_size": "data.eval", "val_size": "data.eval", "val_set_size": "data.eval", "val_data": "data.eval",
    "eval_file": "data.eval", "max_seq_length": "max_length", "max_seq_len": "max_length", "seq_length": "max_length",
    "sequence_len": "max_length", "cutoff_len": "max_length", "block_size": "max_length",
    "max_source_length": "max_length", "sample_packing": "packing", "pack_sequences": "packing",
    "chat_template": "chat", "template": "chat prompt", "interleave_probs": "data.mix", "probabilities": "weight",
    "dataset_text_field": "columns", "prompt_template": "data.prompt",
    "truncation": "truncate", "truncation_side": "truncate", "resolution": "image_size",
    # Sections.
    "training": "train", "trainer": "train", "training_args": "train", "training_arguments": "train",
    "train_config": "train", "hyperparameters": "train", "peft": "lora", "peft_config": "lora",
    "lora_config": "lora", "qlora": "lora", "dataset": "data", "datasets": "data.mix data",
    "ppo_config": "ppo", "grpo": "ppo", "grpo_config": "ppo", "dpo_config": "dpo", "model_config": "model",
    "tokenizer_config": "model", "reward_model": "reward", "reward_funcs": "reward", "reward_model_path": "reward",
    # Training.
    "learning_rate": "lr", "steps": "max_steps", "num_steps": "max_steps", "max_iters": "max_steps",
    "num_train_epochs": "epochs", "num_epochs": "epochs", "n_epochs": "epochs", "max_epochs": "epochs",
    "num_ppo_epochs": "ppo.epochs", "ppo_epochs": "ppo.epochs", "lr_scheduler_type": "schedule",
    "lr_scheduler": "schedule", "scheduler": "schedule",
    "per_device_train_batch_size": "micro_batch_size", "per_gpu_train_batch_size": "micro_batch_size",
    "gradient_accumulation_steps": "micro_batch_size", "train_batch_size": "batch_size",
    "total_batch_size": "batch_size", "global_batch_size": "batch_size",
    "mini_batch_size": "ppo.batch_size micro_batch_size",
    "batch_rows": "batch_size", "micro_rows": "micro_batch_size", "micro_tokens": "micro_batch_tokens",
    "tokens_per_batch": "batch_tokens", "max_tokens_per_batch": "batch_tokens", "warmup_ratio": "warmup",
    "warmup_steps": "warmup", "num_warmup_steps": "warmup", "min_lr_ratio": "lr_floor", "min_lr": "lr_floor",
    "adam_beta1": "betas", "adam_beta2": "betas", "adam_epsilon": "eps", "epsilon": "eps", "wd": "weight_decay",
    "max_norm": "max_grad_norm", "clip": "clip_range max_grad_norm", "grad_clip": "max_grad_norm",
    "gradient_clipping": "max_grad_norm", "gradient_clip_val": "max_grad_norm",
    "patience": "early_stopping_patience", "early_stopping": "early_stopping_patience", "keep": "keep_last",
    "save_total_limit": "keep_last", "save_steps": "save_every", "save_freq": "save_every", "eval_steps": "eval_every",
    "eval_interval": "eval_every", "evaluation_steps": "eval_every", "eval_strategy": "eval_every",
    "evaluation_strategy": "eval_every", "save_strategy": "save_every", "metric_for_best_model": "best",
    "report_to": "log", "logger": "log", "optim": "train.optimizer", "optimizer_type": "train.optimizer",
    "label_smoothing_factor": "label_smoothing", "class_weight": "class_weights",
    "load_best_model_at_end": "best", "random_seed": "seed", "data_seed": "seed", "full_determinism": "deterministic",
    "layer_wise_lr_decay": "lr_decay", "llrd": "lr_decay", "freeze_layers": "freeze.names",
    "unfrozen_parameters": "freeze.except", "trainable_token_indices": "token_rows",
    # Adapters.
    "r": "rank", "lora_r": "rank", "lora_rank": "rank", "lora_alpha": "alpha", "lora_dropout": "lora.dropout",
    "target_modules": "targets", "lora_target": "targets", "lora_target_modules": "targets",
    "lora_target_linear": "targets", "modules_to_save": "freeze.except", "additional_target": "freeze.except",
    "lora_modules_to_save": "freeze.except", "use_dora": "dora", "peft_use_dora": "dora", "use_rslora": "rslora",
    "init_lora_weights": "init", "lr_ratio": "loraplus_lr_ratio", "loraplus_ratio": "loraplus_lr_ratio",
    "use_peft": "lora", "autocast_adapter_dtype": "save_dtype",
    # Preferences.
    "dpo_beta": "dpo.beta", "pref_beta": "dpo.beta", "rl_beta": "dpo.beta", "beta": "kl_coef",
    "rollout_rows": "rollout_batch_size", "rollout_size": "rollout_batch_size", "lam": "gae_lambda",
    "kl": "kl_coef", "init_kl_coef": "kl_coef", "kl_penalty": "kl_estimate", "target": "kl_target",
    "horizon": "kl_horizon",
    "value_clip": "clip_range_vf", "cliprange": "clip_range", "cliprange_value": "clip_range_vf",
    "value_weight": "vf_coef",
    "vf_coeff": "vf_coef", "update_stop": "target_kl", "kl_stop": "max_kl", "no_end": "missing_eos_penalty",
    "non_eos_penalty": "missing_eos_penalty", "group": "group_size", "num_generations": "group_size",
    "normalise": "reward_norm_samples", "response_length": "max_new_tokens", "max_completion_length": "max_new_tokens",
    "total_episodes": "episodes", "num_rollouts": "rollout_batch_size",
    "local_rollout_forward_batch_size": "rollout_micro_batch_size",
}  # fmt: skip

# What needs no option here, or is a script's.
REMARKS = {
    "best_of": "benchmarks/best_of.py does that, once the run has ended",
    "best_of_prompts": "benchmarks/best_of.py does that, once the run has ended",
    "resume_from_checkpoint": "the same command on the same folder goes on from its last checkpoint; leave this out",
    "overwrite_output_dir": "a run is never written over; choose another out, and leave this out",
    "logging_steps": "every step is logged in metrics.jsonl; leave this out",
    "do_train": "`handtune train` trains; leave this out",
    "do_eval": "what data.eval names is evaluated; leave this out",
    "trust_remote_code": "no code of a repository is run; leave this out",
    "load_in_8bit": 'weights are kept in 4 bits (model.quantize = "nf4") or in 16; leave this out',
    "flash_attention": "attention is chosen by the device; leave this out",
    "attn_implementation": "attention is chosen by the device; leave this out",
    "use_cpu": 'give model.device = "cpu"',
}


# Of these the value means something else, or has another unit, than that of the field that takes their place.
OTHERWISE_MEASURED = {
    "gradient_accumulation_steps", "min_lr", "adam_beta1", "adam_beta2", "early_stopping", "eval_strategy",
    "evaluation_strategy", "save_strategy", "use_peft", "lora_target_linear", "load_best_model_at_end",
}  # fmt: skip

# Options of commands that read no file.
OPTIONS_ELSEWHERE = {
    "max-tokens": "--max-new-tokens", "num-beams": "--beams", "num-predict": "--max-new-tokens",
    "stop-sequences": "--stop",
    "lora-path": "--adapter", "adapter-path": "--adapter", "peft-model": "--adapter", "lora": "--adapter",
    "output": "--out", "output-file": "--out", "input-file": "--prompts", "torch-dtype": "--dtype",
    "overwrite": "--force",
}  # fmt: skip


def hint(key: str, section: str, config_class: type) -> str:
    """What to do about an unknown key in a table of a file, "" being the top; the fields there, if nothing else.

    `config_class` is the configuration of the whole file.
    """
    if _spelled(key) in REMARKS:
        return REMARKS[_spelled(key)]
    if meant := _meant(key, section, config_class):
        return f"did you mean {' or '.join(repr(name) for name in meant)}?"

    known = [name.rpartition(".")[2] for name in _names(config_class) if name.rpartition(".")[0] == section]
    similar = difflib.get_close_matches(key, known, n=1)
    return f"did you mean {similar[0]!r}?" if similar else f"known: {', '.join(known)}"


def field_hint(arguments: Sequence[str], config_class: type) -> str:
    """What to do about options that a command with a file doesn't have: fields of the file are given otherwise."""
    name, value = _first_option(arguments)
    if _spelled(name) in REMARKS:
        return REMARKS[_spelled(name)]
    fields = [full for full in _meant(name, "", config_class) if full not in _tables(config_class)]
    shown = value if value and _spelled(name) not in OTHERWISE_MEASURED else "value"
    return f"a field of the file is changed without dashes: {(fields or ['section.field'])[0]}={shown}"


def option_hint(arguments: Sequence[str], known: Sequence[str]) -> str:
    """What to do about options that a command doesn't have, the `known` ones being those that it has."""
    name = _first_option(arguments)[0].lower().replace("_", "-")
    meant = OPTIONS_ELSEWHERE.get(name, "")
    bare = [option.lstrip("-") for option in known]  # whose dashes would make all names alike
    similar = [meant] if meant in known else [f"--{close}" for close in difflib.get_close_matches(name, bare, n=1)]
    return f"did you mean {similar[0]}?" if similar else f"known: {', '.join(known)}"


def _spelled(name: str) -> str:
    return name.lower().replace("-", "_")


def _first_option(arguments: Sequence[str]) -> tuple[str, str]:
    """The first of the arguments that is an option, without its dashes, and its value, or ""."""
    first = next(i for i, argument in enumerate(arguments) if argument.startswith("-"))
    name, _, value = arguments[first].lstrip("-").partition("=")
    if not value and not "".join(arguments[first + 1 : first + 2]).startswith("-"):
        value = "".join(arguments[first + 1 : first + 2])
    return name, value


def _tables(config_class: type) -> set[str]:
    return {table.name for table in tables(config_class)}


def _names(config_class: type) -> list[str]:
    """The full names of the fields and tables of a file, as "train.lr"."""
    names = []
    for table in tables(config_class):
        names += [table.name] if table.name else []
        names += [f"{table.name}.{key}".lstrip(".") for key in table.options]
    return names


def _meant(key: str, section: str, config_class: type) -> list[str]:
    """The fields that an unknown key of a table may have meant: one of the same table by its key, or others in full."""
    names = _names(config_class)
    in_section = f"{section}." if section else ""
    meant = [full for name in ELSEWHERE.get(_spelled(key), "").split() for full in names if _is_called(full, name)]
    for full in meant:
        if full.rpartition(".")[0] == section:
            return [full.removeprefix(in_section)]

    # A key of ours may stand in the wrong table.
    ours = [full for full in names if _is_called(full, _spelled(key))]
    return list(dict.fromkeys([*ours, *meant]))


def _is_called(full: str, name: str) -> bool:
    """Whether a field's full name is `name`, or ends with it."""
    return full == name or full.endswith(f".{name}")
