"""torchrun's own processes, started as a user starts them."""

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import json
import pathlib
import sys

import torch
import torch.distributed as dist

from megashear.config import ModelConfig, ParallelConfig
from megashear.parallel.launch import distributed

if __name__ == "__main__":
    try:
        with distributed(ParallelConfig(tensor_model_parallel_size=4), ModelConfig()):
            refused = ""
    except ValueError as error:
        refused = str(error)
    with distributed(ParallelConfig(tensor_model_parallel_size=2), ModelConfig()) as groups:
        total = torch.tensor([10.0 ** groups.tensor_rank])
        dist.all_reduce(total, group=groups.tensor)
        report = [groups.rank, groups.tensor_rank, groups.data_size, total.item(), refused]
    report.append(dist.is_initialized())
    pathlib.Path(sys.argv[1], f"{groups.rank}.json").write_text(json.dumps(report))
"""


def test_torchrun_starts_ranks_that_meet_and_part(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT, encoding="utf-8")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*torchrun, "--nproc-per-node", "2", str(script), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=180,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        report = json.loads((tmp_path / f"{rank}.json").read_text(encoding="utf-8"))
        assert report[:4] == [rank, rank, 1, 11.0]
        assert "world size 2 is not a multiple" in report[4]  # refused on both, before they met
        assert report[5] is False
