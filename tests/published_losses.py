"""Losses that the recipe published, and those it fitted them through."""

from collections.abc import Mapping
from types import MappingProxyType

PUBLISHED_DOMAINS = ("cc", "github", "book", "stackexchange", "wiki", "arxiv", "c4")
"""The seven RedPajama domains, in the order of the tables below."""

REFERENCE_LOSSES: Mapping[str, tuple[float, ...]] = MappingProxyType(
    {
        "1.3B": (1.9643, 0.7459, 2.1393, 1.6117, 1.7590, 1.4449, 2.1251),
        "2.7B": (1.8712, 0.6883, 2.0325, 1.5353, 1.6297, 1.3560, 2.0328),
        "370M": (2.1401, 0.8694, 2.3625, 1.7791, 2.0470, 1.6637, 2.3139),
    }
)
"""Reference loss of each domain by target, nats per token, for LLaMA-2-7B as the source.

Source: Xia et al. 2023 (arXiv:2310.06694), its public implementation.
"""

TARGET_SIZES: Mapping[str, int] = MappingProxyType(
    {"1.3B": 1_345_423_360, "2.7B": 2_701_560_320, "370M": 373_867_520}
)
"""Parameters of the targets of ``REFERENCE_LOSSES``."""

SOURCE_LOSSES: Mapping[int, tuple[float, ...]] = MappingProxyType(
    {
        6_738_415_616: (1.7520, 0.6216, 1.9063, 1.4482, 1.4844, 1.2637, 1.9219),
        13_015_864_320: (1.6680, 0.5791, 1.8242, 1.3936, 1.3945, 1.2109, 1.8486),
        68_976_648_192: (1.4621, 0.4890, 1.6450, 1.2805, 1.2118, 1.1148, 1.6848),
    }
)
"""Held-out loss of LLaMA-2 in each domain by number of parameters, nats per token.

Source: as ``REFERENCE_LOSSES``, which are fitted through these.
"""
