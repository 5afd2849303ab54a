"""LLaMA on megatron-core, plain or masked, and the table of its weights."""
