"""Find the field of a config, or the name of a command, that a user means by one that does not exist."""

import difflib
from collections.abc import Iterable

SYNONYMS = {
    "lr": ("learning_rate",),
    "rate": ("learning_rate",),
    "batch": ("batch_size",),
    "bs": ("batch_size",),
    "train_batch_size": ("batch_size",),
    "epochs": ("steps",),
    "num_train_epochs": ("steps",),
    "iterations": ("steps",),
    "max_steps": ("steps",),
    "max_train_steps": ("steps",),
    "num_steps": ("steps",),
    "wd": ("weight_decay",),
    "decay": ("weight_decay",),
    "eps": ("epsilon",),
    "betas": ("beta1", "beta2"),
    "warmup": ("warmup_steps",),
    "lr_scheduler": ("schedule",),
    "scheduler": ("schedule", "sampler"),
    "grad_clip": ("clip_norm",),
    "clip": ("clip_norm",),
    "max_grad_norm": ("clip_norm",),
    "grad_accum": ("micro_batch",),
    "gradient_accumulation_steps": ("micro_batch",),
    "micro_batch_size": ("micro_batch",),
    "gradient_checkpointing": ("remat",),
    "checkpointing": ("remat",),
    "precision": ("dtype",),
    "mixed_precision": ("dtype",),
    "pretrained_model_name_or_path": ("model",),
    "dataset": ("path",),
    "train_data_dir": ("path",),
    "image_size": ("resolution",),
    "size": ("resolution",),
    "workers": ("num_workers",),
    "dataloader_num_workers": ("num_workers",),
    "r": ("rank",),
    "target_modules": ("targets",),
    "beta_dpo": ("beta",),
    "cfg": ("guidance",),
    "cfg_scale": ("guidance",),
    "guidance_scale": ("guidance",),
    "random_seed": ("seed",),
    "save_every": ("checkpoint.every",),
    "checkpointing_steps": ("checkpoint.every",),
    "eval_every": ("validation.every",),
    "validation_steps": ("validation.every",),
    "sample_every": ("sample.every",),
    "early_stopping": ("early_stop.metric",),
    "early_stopping_patience": ("early_stop.patience",),
    "save_best": ("checkpoint.best",),
}
"""Other trainers' names and abbreviations of the last part of a field."""


def nearest_field(field: str, fields: Iterable[str]) -> str | None:
    """Return the field that a user may mean by `field`, which does not exist; None if nothing comes near.

    A field of the same last part in another group comes first, then one of another trainer's name, then one that is
    spelt alike.
    """
    group, _, leaf = field.rpartition(".")
    leaf = leaf.lower().replace("-", "_")
    for wanted in (leaf, *SYNONYMS.get(leaf, ()), *SYNONYMS.get(f"{group}_{leaf}", ())):
        found = [known for known in fields if f".{known}".endswith(f".{wanted}")]
        if found:
            return min(found, key=lambda known: (not known.startswith(f"{group}."), known.count(".")))

    def likeness(known: str) -> float:
        known_group, _, known_leaf = known.rpartition(".")
        alike = difflib.SequenceMatcher(None, leaf, known_leaf).ratio()
        return max(difflib.SequenceMatcher(None, field, known).ratio(), alike - (0.1 if group != known_group else 0))

    best = max(fields, key=likeness, default=None)
    return best if best is not None and likeness(best) >= 0.6 else None


def nearest(name: str, names: Iterable[str]) -> str:
    """Return " Did you mean NAME?" for the most similar of the names, or nothing."""
    near = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f" Did you mean {near[0]}?" if near else ""
