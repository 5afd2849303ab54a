import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    "module", ["documents", "manifest", "mixture", "reference_loss", "reweight", "tokenizer"]
)
def test_light_modules_import_neither_torch_nor_megatron(module: str) -> None:
    # Workers that tokenise, and `--help`, must not wait seconds for them.
    code = f"import sys, megashear.data.{module}; print({{'torch', 'megatron'}} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "set()", result.stderr
