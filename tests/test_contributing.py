"""CONTRIBUTING.md: the files that it names exist, and every addition has all the parts that it asks for."""

import re
from pathlib import Path

import pytest
from logit_cases import CASES
from tiny_models import CLASSES

import hshare_jax.methods.registry  # noqa: F401 (it imports every method)
from hshare_jax.evaluation.tasks import TASKS
from hshare_jax.kernels import api
from hshare_jax.kernels.implementations import IMPLEMENTATIONS
from hshare_jax.methods.listed import ListMethod
from hshare_jax.methods.names import METHODS
from hshare_jax.models.config import ARCHITECTURES

ROOT = Path(__file__).parent.parent
GUIDE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
COMMANDS = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
ORACLES = (ROOT / "tests" / "methods" / "test_methods.py").read_text(encoding="utf-8")


def test_the_files_that_the_guide_names_exist() -> None:
    named = set(re.findall(r"(?:kernels|models|hshare_jax|tests|scripts|docs)/[\w/.]*\w(?![\w<])", GUIDE))
    assert len(named) > 30
    assert not [name for name in named if not (ROOT / name).exists()]


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_described(name: str) -> None:
    assert re.search(rf"(`|--method ){name}`", COMMANDS), f"add {name} to the table of methods in docs/cli.md"


@pytest.mark.parametrize("method", ListMethod.__subclasses__(), ids=lambda method: method.__name__)
def test_every_method_has_an_oracle(method: type[ListMethod]) -> None:
    assert f"{method.__name__}(" in ORACLES, (
        f"compare {method.__name__} with an oracle in tests/methods/test_methods.py"
    )


def test_every_architecture_has_cases_and_a_tiny_model() -> None:
    assert {model_type for model_type, _ in CASES.values()} == set(ARCHITECTURES)
    assert set(CLASSES) == set(ARCHITECTURES)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_every_implementation_is_described(name: str) -> None:
    assert re.search(rf"^    {name} ", api.__doc__ or "", re.M), f"describe {name} in the docstring of kernels/api.py"


@pytest.mark.parametrize("name", TASKS)
def test_every_task_is_described_and_tested(name: str) -> None:
    assert f"--task {name}" in COMMANDS, f"describe {name} in docs/cli.md"
    module = TASKS[name].__module__.rpartition(".")[2]
    assert (ROOT / "tests" / "evaluation" / "tasks" / f"test_{module}.py").exists()
    assert re.search(rf'^    "{name}": ', (ROOT / "tests" / "cli" / "test_eval.py").read_text(encoding="utf-8"), re.M)
