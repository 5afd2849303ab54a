"""A stock megatron-core GPTModel on this rank, to load our checkpoints and to write its own."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megashear.checkpoint.weights import without_extra_state
from megashear.parallel import cpu_megatron, device
from megashear.shape import ModelShape


def build_gpt_model(shape: ModelShape, tp: int, pp: int) -> Any:
    """This rank's stage, of megatron-core's own unfused spec. Collective over the world."""
    cpu_megatron.install()
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    parallel_state.initialize_model_parallel(tp, pp)
    device.seed_model_parallel(1)
    config = TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_query_groups,
        kv_channels=shape.head_dim,
        ffn_hidden_size=shape.ffn_hidden_size,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        pipeline_dtype=torch.float32,
        use_cpu_initialization=True,
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        normalization="RMSNorm",
    )
    return GPTModel(
        config,
        get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=shape.vocab_size,
        max_sequence_length=32,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=False,
        position_embedding_type="none",
    )


def load_into_gpt_model(directory: Path, shape: ModelShape, tp: int, pp: int) -> dict[str, Tensor]:
    """This rank's parameters after loading ``directory``, strictly, by name in its state_dict."""
    model = build_gpt_model(shape, tp, pp)
    from megatron.core import dist_checkpointing

    entries = without_extra_state(model.sharded_state_dict())
    # every tensor of the checkpoint must be wanted by some rank, and the other way round
    loaded = dist_checkpointing.load(entries, str(directory), strict="raise_all")
    return {name: tensor for name, tensor in loaded.items() if isinstance(tensor, Tensor)}
