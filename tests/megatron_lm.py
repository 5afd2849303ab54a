"""Checkpoints as Megatron-LM writes them: megatron-core's GPTModel, its writer, and ``args``."""

from __future__ import annotations

import argparse
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from megashear.checkpoint.weights import without_extra_state
from megashear.models.weight_table import fuse, tensors
from megashear.parallel import cpu_megatron, device
from megashear.shape import ModelShape
from tests.tiny import named_parameters, shard


def arguments(**changes: Any) -> argparse.Namespace:
    """Arguments of a tiny GPT, named as Megatron-LM's arguments.py names them, with some that say
    nothing of the model."""
    from megatron.core.rerun_state_machine import RerunMode
    from megatron.core.transformer.enums import AttnBackend

    values: dict[str, Any] = {
        "num_layers": 4,
        "encoder_num_layers": 4,
        "hidden_size": 40,
        "ffn_hidden_size": 96,
        "num_attention_heads": 8,
        "group_query_attention": True,
        "num_query_groups": 4,
        "kv_channels": 8,
        "max_position_embeddings": 32,
        "seq_length": 16,
        "vocab_size": 61,
        "make_vocab_size_divisible_by": 4,
        "padded_vocab_size": 64,
        "untie_embeddings_and_output_weights": True,
        "position_embedding_type": "rope",
        "add_position_embedding": True,
        "use_rotary_position_embeddings": True,
        "rotary_base": 500,
        "rotary_percent": 1.0,
        "rotary_interleaved": False,
        "rotary_seq_len_interpolation_factor": None,
        "use_rope_scaling": False,
        "rope_scaling_factor": 8.0,
        "normalization": "RMSNorm",
        "norm_epsilon": 1e-3,
        "apply_layernorm_1p": False,
        "qk_layernorm": False,
        "swiglu": True,
        "squared_relu": False,
        "add_bias_linear": False,
        "add_qkv_bias": False,
        "num_experts": None,
        "multi_latent_attention": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "window_size": None,
        "mtp_num_layers": None,
        "spec": None,
        # the rest says how it was trained
        "attention_backend": AttnBackend.flash,
        "rerun_mode": RerunMode.DISABLED,
        "params_dtype": torch.float32,
        "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": 2,
        "data_path": ["text"],
        "lr": 3e-4,
        "adam_betas": (0.9, 0.95),
        "consumed_train_samples": 640,
        "tokenizer_type": "Llama2Tokenizer",
        "ckpt_format": "torch_dist",
    }
    return argparse.Namespace(**(values | changes))


def build_gpt(args: argparse.Namespace, tp: int = 1, pp: int = 1) -> Any:
    """This rank's stage as Megatron-LM builds it from its arguments, of the local spec. Collective
    over the world."""
    cpu_megatron.install()
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    parallel_state.initialize_model_parallel(tp, pp)
    device.seed_model_parallel(1)
    config = TransformerConfig(
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        num_attention_heads=args.num_attention_heads,
        num_query_groups=args.num_query_groups if args.group_query_attention else None,
        kv_channels=args.kv_channels,
        ffn_hidden_size=args.ffn_hidden_size,
        layernorm_epsilon=args.norm_epsilon,
        normalization=args.normalization,
        qk_layernorm=args.qk_layernorm,
        add_bias_linear=args.add_bias_linear,
        add_qkv_bias=args.add_qkv_bias,
        gated_linear_unit=args.swiglu,
        activation_func=F.silu if args.swiglu else F.gelu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        masked_softmax_fusion=False,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        pipeline_dtype=torch.float32,
        use_cpu_initialization=True,
    )
    return GPTModel(
        config,
        get_gpt_layer_local_spec(normalization=args.normalization, qk_layernorm=args.qk_layernorm),
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        parallel_output=False,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_percent=args.rotary_percent,
        rotary_base=args.rotary_base,
        rope_scaling=args.use_rope_scaling,
        rope_scaling_factor=args.rope_scaling_factor,
        seq_len_interpolation_factor=args.rotary_seq_len_interpolation_factor,
    )


def logits(gpt: Any, tokens: Tensor) -> Tensor:
    """Logits of a model on one process, [b, s, padded vocabulary]."""
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    future = torch.ones(tokens.shape[1], tokens.shape[1]).triu(1).bool()[None, None]
    with torch.no_grad():
        found: Tensor = gpt(tokens, positions, future)
    return found


def write(
    directory: Path,
    args: argparse.Namespace,
    weights: Mapping[str, Tensor],
    shape: ModelShape,
    tp: int = 1,
    pp: int = 1,
    prefix: str = "",
) -> None:
    """Save a model of these weights as Megatron-LM does, padding the vocabulary with noise.
    Collective over the world of ``tp * pp`` ranks."""
    gpt = build_gpt(args, tp, pp)
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.dist_checkpointing import ShardedObject

    tensor_rank = parallel_state.get_tensor_model_parallel_rank()
    stage = parallel_state.get_pipeline_model_parallel_rank()
    whole = {
        row.name.format(layer=layer): fuse(
            row, [weights[part.hf_name.format(layer=layer)] for part in row.parts], shape
        )
        for row, layer in tensors(shape)
    }
    padding = torch.full((args.padded_vocab_size - shape.vocab_size, shape.hidden_size), 9.0)
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        if name in whole:
            whole[name] = torch.cat([whole[name], padding])
    if shape.tied_embeddings:
        whole["output_layer.weight"] = whole["embedding.word_embeddings.weight"]
    with torch.no_grad():
        for name, parameter in named_parameters([gpt]).items():
            parameter.copy_(_shard(name, whole[name], tensor_rank, tp))
    rng_state = [
        {
            "random_rng_state": random.getstate(),
            "np_rng_state": np.random.get_state(),
            "torch_rng_state": torch.get_rng_state(),
            "rng_tracker_states": {},
        }
    ]
    state = {
        "args": args,
        "checkpoint_version": 3.0,
        "iteration": 5,
        "num_floating_point_operations_so_far": 1e9,
        "model": gpt.sharded_state_dict(prefix=prefix),
        "opt_param_scheduler": {"max_lr": 3e-4, "num_steps": 640},
        "rng_state": ShardedObject("rng_state", rng_state, (pp, tp), (stage, tensor_rank)),
    }
    final = directory / "iter_0000005"
    final.mkdir(parents=True, exist_ok=True)
    dist_checkpointing.save(state, str(final))
    (directory / "latest_checkpointed_iteration.txt").write_text("5")


def load(directory: Path, args: argparse.Namespace) -> Any:
    """A model built from arguments and filled with dist_checkpointing alone, on one process."""
    gpt = build_gpt(args)
    from megatron.core import dist_checkpointing

    entries = without_extra_state(gpt.sharded_state_dict())
    loaded = dist_checkpointing.load({"model": entries}, str(directory))["model"]
    missing, unexpected = gpt.load_state_dict(loaded, strict=False)
    assert [name for name in (*missing, *unexpected) if "_extra_state" not in name] == []
    return gpt


def _shard(name: str, whole: Tensor, rank: int, size: int) -> Tensor:
    if name.endswith("linear_qkv.bias"):
        return whole.chunk(size)[rank]
    return shard(name, whole, rank, size)
