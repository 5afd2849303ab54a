"""The mathematics of learned masks: no torch.distributed, no megatron."""
