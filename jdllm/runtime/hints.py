"""What a misspelt word may stand for: the nearest names, and those that other tools use."""

import difflib
from collections.abc import Iterable, Sequence

# Our settings, and what other tools call them; they are named where one is given that is not known.
ALIASES = {
    ours: theirs.split()
    for ours, theirs in {
        "accumulation": "gradient_accumulation_steps grad_accum accumulate_grad_batches",
        "batch": "batch_size per_device_train_batch_size train_batch_size micro_batch_size bs",
        "batch_size": "batch bs max_num_seqs per_device_eval_batch_size",
        "beta1": "adam_beta1",
        "beta2": "adam_beta2",
        "block_length": "block_size blocksize",
        "cache": "use_cache dual_cache kv_cache cache_type",
        "cfg_scale": "cfg guidance_scale classifier_free_guidance",
        "chat": "apply_chat_template chat_template use_chat_template",
        "clip": "max_grad_norm grad_clip gradient_clip_val",
        "confirm_run_unsafe_code": "allow_code_execution trust_code unsafe_code",
        "data": "dataset dataset_path data_dir data_path train_file",
        "dtype": "precision torch_dtype bf16 fp16 half",
        "epochs": "num_train_epochs num_epochs",
        "epsilon": "adam_epsilon eps",
        "eval_data": "eval_dataset eval_file validation_file",
        "factor": "parallel_factor",
        "gen_length": "max_new_tokens max_tokens max_gen_toks max_gen_len max_length new_tokens",
        "include_path": "tasks_dir task_dir",
        "learning_rate": "lr",
        "length": "max_seq_length max_seq_len seq_len seqlen max_length context_length",
        "limit": "num_samples num_examples max_samples max_examples",
        "log_every": "logging_steps log_interval",
        "logger": "report_to log_with tracker",
        "mc_num": "mc_samples monte_carlo_num",
        "mesh": "device devices device_map gpus num_gpus n_gpu tp tp_size tensor_parallel_size "
        "dp_size data_parallel_size",
        "model": "model_path pretrained model_name model_name_or_path checkpoint ckpt weights",
        "output": "output_dir output_path out save_dir outdir log_dir",
        "packing": "pack sample_packing",
        "prompt": "text query input question",
        "remasking": "alg algorithm",
        "remat": "gradient_checkpointing activation_checkpointing",
        "samples": "n num_return_sequences num_generations repeats best_of",
        "save_every": "save_steps save_interval checkpoint_every",
        "schedule": "lr_scheduler_type lr_scheduler lr_schedule",
        "shots": "num_fewshot n_shot num_shots fewshot few_shot nshot",
        "source": "model model_path pretrained checkpoint ckpt input",
        "steps": "max_steps num_steps diffusion_steps denoising_steps num_inference_steps",
        "task": "tasks benchmark dataset",
        "temperature": "temp",
        "threshold": "confidence_threshold conf_threshold tau",
        "tokens_per_step": "num_to_transfer k",
        "verifier": "draft_model auxiliary_model causal_model ar_model",
        "warmup": "warmup_steps",
        "weight_decay": "wd",
    }.items()
}
CHOICES = {  # what other tools call a choice of ours
    "maskgit_plus": "low_confidence",
    "confidence": "low_confidence",
    "margin": "topk_margin",
    "l2r": "leftright",
    "left_to_right": "leftright",
    "autoregressive": "leftright",
    "fixed": "quota",
    "parallel": "threshold",
    "true": "dual",
    "false": "none",
    "off": "none",
    "bf16": "bfloat16",
    "fp16": "float16",
    "half": "float16",
    "fp32": "float32",
    "fast_dllm_v1": "fast_dllm",
}


def nearest(word: str, known: Iterable[str], most: int = 3) -> list[str]:
    """The names among `known` that a misspelt word may stand for, at most `most`, the best first.

    Those that begin with the word, where there are any; else those spelt like it.
    """
    known = list(dict.fromkeys(known))
    begin = [name for name in known if word and name.startswith(word)]
    return begin[:most] or difflib.get_close_matches(word, known, n=most)


def asked(near: Iterable[str]) -> str:
    """The question whether one of some names was meant; "" without any."""
    return f"did you mean {', or '.join(near)}?" if near else ""


def nearest_settings(name: str, names: Sequence[str]) -> list[str]:
    """The settings among `names` that a word may stand for: best of all what it is called here."""
    group, _, leaf = name.rpartition(".")
    leaves = {known: known.rpartition(".")[2] for known in names}
    left_out = [known for known in names if known.endswith(f".{name}")]
    left_out += [known for known in names if known.startswith(f"{name}.")][:3]
    meant = [known for known, own in leaves.items() if leaf in ALIASES.get(own, ())]
    if left_out or meant:
        return left_out or meant
    close = nearest(leaf, leaves.values())
    found = [known for own in close for known in names if leaves[known] == own]
    if group:
        found.sort(key=lambda known: known.rpartition(".")[0] != group)
    return found[:3]


def nearest_choices(word: str, known: Sequence[str]) -> list[str]:
    """The choices among `known` that a word may stand for."""
    word = word.lower()
    if (meant := CHOICES.get(word, "")) in known:
        return [meant]
    within = [one for one in known if word and (one in word or word in one)]
    return within or nearest(word, known)
