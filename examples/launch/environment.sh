# shellcheck shell=bash
# Environment of the processes of a job, sourced by torchrun.sh on every node. A value that is set
# already is kept. docs/cluster.md has the reasons and sources.

# Kernels start in the order in which they were queued, so that communication of tensor ranks comes
# before the computation that hides it.
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
# Blocks of GPU memory grow instead of leaving gaps between them.
# torch reads this name before PYTORCH_ALLOC_CONF; a value under the latter name is kept, too.
export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-${PYTORCH_ALLOC_CONF:-expandable_segments:True}}"
# Log errors of NCCL, and nothing else.
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"

# For hosts with several networks, where NCCL or gloo chooses the wrong one. Not set unless you do:
#   NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME   interface over which processes find each other
#   NCCL_IB_HCA                              InfiniBand or RoCE adapters, mlx5_0,mlx5_1
#   NCCL_IB_GID_INDEX                        RoCE with several addresses a port
