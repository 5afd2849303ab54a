"""The mathematics of learned masks, without torch.distributed and megatron-core."""
