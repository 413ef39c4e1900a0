"""The package as users get it: built, installed, imported outside the repository, and used beside PyPI's `kernels`."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def _run(*command: str | Path, cwd: Path, path: Path | None = None) -> str:
    """Runs Python with these arguments and returns the output. If Python fails, the test fails with the output."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    done = subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout.strip()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, because setuptools builds inside them, and a stale build/ would go into the wheel."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("hshare_jax", "models", "kernels"):
        ignored = shutil.ignore_patterns("__pycache__", "*.so")
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignored)
    return source


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel that is built from the source distribution, as for PyPI."""
    dist = tmp_path_factory.mktemp("dist")
    _run("-m", "build", "--no-isolation", "--outdir", dist, source, cwd=dist)
    return next(dist.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the installed wheel."""
    target = tmp_path_factory.mktemp("target")
    _install(wheel, target)
    return target


def _install(wheel: Path, target: Path) -> None:
    _run("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", target, wheel, cwd=wheel.parent)


DESCRIBE = "from hshare_jax.kernels.api import describe; print(describe('auto'))"


@pytest.mark.skipif(shutil.which("c++") is None, reason="this machine has no C++ compiler")
def test_with_a_compiler_the_wheel_is_for_one_platform_and_every_python(wheel: Path, installed: Path) -> None:
    assert "-py3-none-" in wheel.name
    assert not wheel.name.endswith("-any.whl")
    assert _run("-P", "-c", DESCRIBE, cwd=installed, path=installed).startswith("native (")
    assert not list((installed / "hshare_jax" / "kernels" / "native").glob("*.h"))


def test_without_a_compiler_the_wheel_is_for_every_platform_and_decodes_by_the_definition(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("CC", "CXX", "LDSHARED", "LDCXXSHARED"):
        monkeypatch.setenv(name, "no-such-compiler")
    shutil.rmtree(source / "build", ignore_errors=True)
    _run("-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, source, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    _install(wheel, tmp_path / "target")
    found = _run("-P", "-c", DESCRIBE, cwd=tmp_path, path=tmp_path / "target")
    assert found.startswith("reference (the library of native kernels was not compiled")


def test_wheel_holds_every_module_of_the_sources(installed: Path) -> None:
    modules = []
    for path in sorted((ROOT / "hshare_jax").rglob("*.py")):
        if path.relative_to(ROOT / "hshare_jax").parts[0] not in ("models", "kernels"):
            modules.append(path.relative_to(ROOT))
    for folder in ("models", "kernels"):
        modules += [
            Path("hshare_jax", folder, path.relative_to(ROOT / folder))
            for path in sorted((ROOT / folder).rglob("*.py"))
        ]
    names = [".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in modules]
    assert {"hshare_jax.models.config", "hshare_jax.kernels.reference_attention", "hshare_jax.shapes"} <= set(names)
    code = """
import importlib.util, sys
from pathlib import Path
target, *names = sys.argv[1:]
for name in names:
    if not name.endswith("__main__"):
        # The Triton kernels import Triton, which need not be there, so they are found and not imported.
        is_triton = ".triton_" in name and name.endswith("_kernels")
        origin = importlib.util.find_spec(name).origin if is_triton else importlib.import_module(name).__file__
        assert Path(origin).is_relative_to(target), f"{name} came from {origin}"
"""
    # -P keeps the current folder off the path, so that only the installed files can be imported.
    _run("-P", "-c", code, installed, *names, cwd=installed.parent, path=installed)
    missing = [path for path in modules if not (installed / path).exists()]
    assert not missing


def test_installed_command_runs(installed: Path) -> None:
    assert "usage: hshare-jax" in _run("-P", installed / "bin" / "hshare-jax", "--help", cwd=installed, path=installed)


def test_wheel_carries_the_licence_and_the_type_marker(installed: Path) -> None:
    (metadata,) = installed.glob("hshare_jax-*.dist-info")
    assert (installed / "hshare_jax" / "py.typed").exists()
    assert list(metadata.rglob("LICENSE"))


def test_wheel_installs_nothing_beside_the_package(installed: Path) -> None:
    found = {path.name for path in installed.iterdir() if path.suffix != ".dist-info"}
    assert found == {"hshare_jax", "bin"}


def test_checkout_works_without_being_installed() -> None:
    code = """
import sys
sys.path.insert(0, "")  # as Python does by itself, unless $PYTHONSAFEPATH is set
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in getattr(finder, "__module__", "").lower()]
import hshare_jax.kernels.reference_attention, hshare_jax.models.config
print(hshare_jax.models.config.__file__)
"""
    assert _run("-c", code, cwd=ROOT) == str(ROOT / "hshare_jax" / "models" / "config.py")


def test_transformers_imports_from_the_repository_root_without_pypi_kernels() -> None:
    assert _run("-c", "from transformers import LlamaConfig; print(LlamaConfig().model_type)", cwd=ROOT) == "llama"


def test_pypi_kernels_is_not_shadowed_from_the_repository_root(tmp_path: Path) -> None:
    # A stand-in for PyPI's package. As a regular package with metadata, it wins over a plain folder of the same name.
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("origin = 'PyPI'\n")
    (tmp_path / "kernels-0.0.1.dist-info").mkdir()
    (tmp_path / "kernels-0.0.1.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: kernels\nVersion: 0.0.1\n"
    )
    code = """
from transformers import LlamaConfig
import kernels, hshare_jax.kernels.reference_attention
print(LlamaConfig().model_type, kernels.origin, hshare_jax.kernels.reference_attention.__name__)
"""
    assert _run("-c", code, cwd=ROOT, path=tmp_path) == "llama PyPI hshare_jax.kernels.reference_attention"
