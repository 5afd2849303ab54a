"""ModuleSpecs of a LLaMA: local layers, which masks can be folded into, or Transformer Engine's."""

from __future__ import annotations

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megashear.config import TransformerImpl
from megashear.models.core import CausalAttention, RMSNorm, RotaryAttention, SwiGLU

# Transformer Engine fuses each norm with the linear after it and so names norms in checkpoints, as
# does Megatron-LM. With these names a checkpoint of one variant loads into the other.
_CHECKPOINT_NAMES = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}


def block_spec(
    config: TransformerConfig, variant: TransformerImpl, *, vp_stage: int | None = None
) -> TransformerBlockSubmodules | ModuleSpec:
    """Return the spec of one model chunk of this rank.

    Args:
        config: megatron-core's configuration, from which the number of layers follows.
        variant: kind of layers; local ones while masks learn.
        vp_stage: number of the chunk under the interleaved schedule.
    """
    if variant == "transformer_engine":
        from megatron.core.models.gpt.gpt_layer_specs import (
            get_gpt_layer_with_transformer_engine_spec,
        )

        return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
    return TransformerBlockSubmodules(
        layer_specs=[_layer_spec(config.qk_layernorm)]
        * get_num_layers_to_build(config, vp_stage=vp_stage),
        layer_norm=RMSNorm,
    )


def _layer_spec(qk_layernorm: bool) -> ModuleSpec:
    head_norm = RMSNorm if qk_layernorm else IdentityOp
    attention = SelfAttentionSubmodules(
        linear_qkv=ColumnParallelLinear,
        core_attention=CausalAttention,
        linear_proj=RowParallelLinear,
        q_layernorm=head_norm,
        k_layernorm=head_norm,
    )
    # MLP itself and no subclass: TransformerLayer passes the tensor group only to this class
    mlp = MLPSubmodules(
        linear_fc1=ColumnParallelLinear, activation_func=SwiGLU, linear_fc2=RowParallelLinear
    )
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=ModuleSpec(
                module=RotaryAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=attention,
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=ModuleSpec(module=MLP, submodules=mlp),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=_CHECKPOINT_NAMES,
        ),
    )
