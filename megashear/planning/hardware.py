"""Memory, arithmetic and links of GPUs."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

GB = 10**9
"""Bytes of a GB, the unit of link speeds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """One kind of GPU in the server in which it is usually sold."""

    name: str
    memory_gib: float
    """Memory that torch finds, GiB, rounded down."""
    peak_flops: float
    """Peak of dense bfloat16 arithmetic, FLOP/s."""
    node_link: float
    """Speed of its link to other GPUs of the node, bytes a second in each direction."""
    network: float
    """Its share of the speed of the node's adapters, bytes a second in each direction."""
    memory_speed: float
    """Speed of its memory, bytes a second."""


_KINDS = (
    # name, GiB, TFLOP/s, GB/s in the node, GB/s between nodes, GB/s of memory
    ("A100-40G", 39.3, 312.0, 300, 25.0, 1555),
    ("A100-80G", 79.1, 312.0, 300, 25.0, 2039),
    ("A800-80G", 79.1, 312.0, 200, 25.0, 2039),
    ("H100-80G", 79.1, 989.0, 450, 50.0, 3350),
    ("H800-80G", 79.1, 989.0, 200, 50.0, 3350),
    ("H200-141G", 139.7, 989.0, 450, 50.0, 4800),
    ("B200-180G", 178.3, 2250.0, 900, 50.0, 8000),
    ("L40S-48G", 44.4, 362.0, 32, 12.5, 864),
)

GPUS: dict[str, Gpu] = {
    name: Gpu(
        name=name,
        memory_gib=memory,
        peak_flops=tera * 1e12,
        node_link=link * GB,
        network=network * GB,
        memory_speed=speed * GB,
    )
    for name, memory, tera, link, network, speed in _KINDS
}
"""Kinds of GPU by name, the SXM or HGX variant where there are several.

Source: NVIDIA's data sheets of A100, A800, H100, H800, H200, HGX B200 and L40S. Arithmetic is
without sparsity, half of the printed number where that includes it. NVLink is half of the printed
total, which counts both directions; L40S has PCIe 4.0 x16. Between nodes a GPU has 200 Gbit/s as in
DGX A100, 400 as in DGX H100 and DGX B200, and for L40S 100 are assumed. Memory is the number that
torch reports when such a GPU runs out of it, which is less than the name says."""


def find_gpu(name: str) -> Gpu:
    """Return the kind of GPU with this name, in upper or lower case, or with this unique beginning.

    Raises:
        ValueError: no kind fits, with the nearest and all kinds; or several do, with these.
    """
    by_upper = {known.upper(): gpu for known, gpu in GPUS.items()}
    if name.upper() in by_upper:
        return by_upper[name.upper()]
    begun = [known for known in GPUS if known.upper().startswith(name.upper())] if name else []
    if len(begun) == 1:
        return GPUS[begun[0]]
    if begun:
        raise ValueError(f"--gpu {name} may be {' or '.join(begun)}; say which")
    nearest = difflib.get_close_matches(name.upper(), list(by_upper), n=1, cutoff=0.0)
    nearest = [known for known in GPUS if known.upper() in nearest]
    raise ValueError(
        f"--gpu {name} is not known; nearest: {nearest[0]}; all there are: {', '.join(GPUS)}"
    )


def gpu_of_device(device_name: str) -> Gpu | None:
    """Return the kind of a GPU by the name that its driver gives it.

    Return None for an unknown kind, for a card with other arithmetic than the SXM module of its
    kind (PCIe, NVL), and for a slice of a GPU (MIG). Of two kinds that differ only in memory return
    the first, because their arithmetic is equal.
    """
    words = re.findall(r"[A-Z0-9]+", device_name.upper())
    if "MIG" in words:
        return None
    for gpu in GPUS.values():
        kind = gpu.name.partition("-")[0]
        # A100 and L40S are as fast in every form
        if kind in words and (kind in ("A100", "A800", "L40S") or not {"PCIE", "NVL"} & set(words)):
            return gpu
    return None
