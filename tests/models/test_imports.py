"""Importing the models' modules is cheap: large packages are loaded by the functions that need them."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
MODULES = sorted(path.stem for path in (ROOT / "models").glob("*.py"))
LARGE = ("transformers", "orbax", "safetensors", "gguf", "huggingface_hub", "jinja2", "tokenizers", "torch", "optax")

# The package is an empty module here, so that only the imports of models/ count.
IMPORT = """
import importlib, sys, types
package = types.ModuleType("hshare_jax")
package.__path__ = [{package!r}]
sys.modules["hshare_jax"] = package
for name in {names!r}:
    importlib.import_module("hshare_jax.models." + name)
print(*[name for name in {unwanted!r} if name in sys.modules])
"""


@pytest.mark.parametrize(
    ("names", "unwanted"),
    [(MODULES, LARGE), (["config", "kv_sharing"], (*LARGE, "jax", "flax", "numpy"))],
    ids=["all modules", "those that command-line options are built from"],
)
def test_importing_models_loads_no_large_package(names: list[str], unwanted: tuple[str, ...]) -> None:
    code = IMPORT.format(package=str(ROOT / "hshare_jax"), names=names, unwanted=unwanted)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == []
