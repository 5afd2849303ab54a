import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    "module",
    [
        *("data.manifest", "data.mixture", "data.reference_loss", "data.reweight"),
        *("preprocessing.domains", "files.structured", "tokenizer.choice"),
    ],
)
def test_light_modules_import_neither_torch_nor_megatron(module: str) -> None:
    # Workers that tokenise, and `--help`, must not wait seconds for them.
    code = f"import sys, megashear.{module}; print({{'torch', 'megatron'}} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "set()", result.stderr
