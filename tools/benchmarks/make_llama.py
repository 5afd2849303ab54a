"""Make a Hugging Face directory with random weights of a preset's shape, in sharded safetensors.

Like a conversion, it holds only a few weights in memory at a time.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from megashear.conversion import hf
from megashear.files.workers import default_workers
from megashear.models import weight_table
from megashear.models.formats import DTYPES
from megashear.shape import PRESETS, ModelShape


class RandomWeights(Mapping[str, Tensor]):
    """Weights that are drawn when they are read, equal for equal seeds and names."""

    def __init__(self, shape: ModelShape, dtype: torch.dtype, seed: int) -> None:
        self._shapes, self._seed = weight_table.hf_shapes(shape), seed
        self._numbers = {name: number for number, name in enumerate(self._shapes)}
        self.dtypes = dict.fromkeys(self._shapes, dtype)

    def __getitem__(self, name: str) -> Tensor:
        generator = torch.Generator().manual_seed(self._seed * 2**20 + self._numbers[name])
        weight = torch.empty(self._shapes[name], dtype=self.dtypes[name])
        if weight.dim() == 1:  # norms and biases
            return weight.uniform_(0.5, 1.5, generator=generator)
        return weight.normal_(std=0.02, generator=generator)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def main(argv: Sequence[str]) -> int:
    """Write the directory, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", required=True, help="directory to make; must not exist")
    parser.add_argument("--shape", default="llama2-7b", choices=sorted(PRESETS))
    parser.add_argument("--dtype", default="bfloat16", choices=sorted(DTYPES))
    parser.add_argument("--seed", type=int, default=1234)
    args = parser.parse_args(argv)
    shape = PRESETS[args.shape]
    weights = RandomWeights(shape, DTYPES[args.dtype], args.seed)
    written = hf.write_directory(args.output, weights, shape, workers=default_workers())
    print(f"wrote {args.output}: {shape.num_params():,} parameters, {written / 2**30:.2f} GiB")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
