"""LLaMA on megatron-core, plain or on folded weights, and the table of its weights."""
