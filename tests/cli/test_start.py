"""A start is short: what a command does not need is not imported."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hshare_jax.cli.main import COMMANDS

ROOT = Path(__file__).parent.parent.parent
SLOW = {"jax", "jax.experimental", "jaxtyping", "numpy", "transformers", "orbax", "flax", "tokenizers"}
CALL = """
import contextlib, json, sys
from hshare_jax.cli.main import main
with contextlib.suppress(SystemExit), contextlib.redirect_stdout(sys.stderr):
    main(sys.argv[1:])
print(json.dumps(sorted(sys.modules)))
"""


def loaded(code: str, *arguments: str) -> set[str]:
    """Runs code in a new process and returns the slow modules that it loaded."""
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    return SLOW & set(json.loads(done.stdout.splitlines()[-1]))


def test_importing_the_package_loads_nothing_slow() -> None:
    assert not loaded("import json, sys, hshare_jax; print(json.dumps(sorted(sys.modules)))")


@pytest.mark.parametrize("arguments", ["--help", "--version", "generat", "generate a -n many", *COMMANDS])
def test_help_and_mistakes_in_options_load_nothing_slow(arguments: str) -> None:
    assert not loaded(CALL, *arguments.split(), *(["--help"] if arguments in COMMANDS else []))


@pytest.mark.parametrize("module", ["argparse", "hshare_jax.cli.generate", "hshare_jax.models.pretrained"])
def test_an_interrupt_of_an_import_ends_the_command_without_a_traceback(module: str) -> None:
    code = f"""
import sys
class Interrupt:
    def find_spec(name, *_):
        if name == "{module}":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupt)
sys.modules.pop("{module}", None)
from hshare_jax.__main__ import main
sys.exit(main())
"""
    done = subprocess.run([sys.executable, "-c", code, "generate", "a"], cwd=ROOT, text=True, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_a_name_of_the_package_is_imported_when_it_is_used() -> None:
    code = """
import json, sys, hshare_jax
import hshare_jax.methods
settings = hshare_jax.HShareSettings(num_critical=8), hshare_jax.methods.PlanSearch()
assert not hasattr(hshare_jax, "nothing")
assert {"generate", "HShare"} <= set(dir(hshare_jax))
print(json.dumps(sorted(sys.modules)))
"""
    assert not loaded(code)


def test_a_module_does_not_hide_the_function_of_its_name() -> None:
    import hshare_jax
    import hshare_jax.methods
    import hshare_jax.methods.double_sparsity
    import hshare_jax.prefill

    assert callable(hshare_jax.prefill)
    assert callable(hshare_jax.methods.double_sparsity)


def test_the_package_runs_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "hshare_jax", "--help"], cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0
    assert done.stdout.startswith("usage: hshare-jax ")
