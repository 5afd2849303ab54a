"""Files as LLM-Shearing's Composer runs write them."""

from __future__ import annotations

import datetime
import random
import re
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

# spelled out here once more on purpose
COMPOSER_NAMES = [
    (r"model\.embed_tokens", "model.transformer.wte"),
    (r"model\.norm", "model.transformer.ln_f"),
    (r"lm_head", "model.transformer.output"),
    (r"model\.layers\.(\d+)\.self_attn\.([qkv])_proj", r"model.transformer.blocks.\1.attn.w\2"),
    (r"model\.layers\.(\d+)\.self_attn\.o_proj", r"model.transformer.blocks.\1.attn.out_proj"),
    (r"model\.layers\.(\d+)\.mlp\.", r"model.transformer.blocks.\1.mlp."),
    (r"model\.layers\.(\d+)\.input_layernorm", r"model.transformer.blocks.\1.ln_1"),
    (r"model\.layers\.(\d+)\.post_attention_layernorm", r"model.transformer.blocks.\1.ln_2"),
]


def state_dict(
    weights: Mapping[str, Tensor], rotary_table: Tensor | None = None
) -> dict[str, Tensor]:
    """Weights by the names of LLM-Shearing, with the rotary table that it stores in every layer."""
    found: dict[str, Tensor] = {}
    for name, weight in weights.items():
        theirs = name
        for ours, composer in COMPOSER_NAMES:
            theirs = re.sub(ours, composer, theirs)
        found[theirs] = weight
        if theirs.endswith("attn.wq.weight") and rotary_table is not None:
            found[theirs.replace("wq.weight", "rotary_emb.inv_freq")] = rotary_table
    return found


def write_trainer(path: Path, weights: Mapping[str, Tensor]) -> None:
    """A trainer's checkpoint: weights, and objects of packages that need not be installed."""
    module = types.ModuleType("composer.metrics.nlp")

    class LanguageCrossEntropy:
        def __init__(self) -> None:
            self.sum_loss = torch.tensor(3.0)

    LanguageCrossEntropy.__module__ = "composer.metrics.nlp"
    LanguageCrossEntropy.__qualname__ = "LanguageCrossEntropy"
    module.LanguageCrossEntropy = LanguageCrossEntropy  # type: ignore[attr-defined]
    here = {"composer": types.ModuleType("composer"), "composer.metrics": types.ModuleType("m")}
    here["composer.metrics.nlp"] = module
    state: dict[str, Any] = {
        "model": state_dict(weights),
        "optimizers": {"DecoupledAdamW": {"state": {"exp_avg": torch.ones(2)}}},
        "train_metrics": {"LanguageCrossEntropy": LanguageCrossEntropy()},
        "timestamp": {"Timestamp": {"batch": 3200, "total_wct": datetime.timedelta(seconds=9)}},
    }
    rng = [{"python": random.getstate(), "numpy": np.random.get_state()}]
    sys.modules.update(here)
    try:
        torch.save({"state": state, "rng": rng}, path)
    finally:
        for name in here:
            del sys.modules[name]
