"""The rules of the architecture, checked on the syntax tree of every module."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Imports point down only: a module may import the modules above its line. A new module fails until it has a line here.
# `.*` places a whole folder. The files of a folder may import one another and the modules above the folder's line.
ORDER = (
    "hshare_jax.lazy",
    "hshare_jax.shapes",
    "hshare_jax.errors",
    "hshare_jax.mesh",
    "hshare_jax.files.*",
    "hshare_jax.kernels.*",
    "hshare_jax.models.*",
    "hshare_jax.kv_cache",
    "hshare_jax.methods.*",
    "hshare_jax.decode_state",
    "hshare_jax.device_memory",
    "hshare_jax.attend",
    "hshare_jax.prompts",
    "hshare_jax.prefill",
    "hshare_jax.decode_step",
    "hshare_jax.sampling_params",
    "hshare_jax.sampling",
    "hshare_jax.decode_loop",
    "hshare_jax.text_stream",
    "hshare_jax.compile_clock",
    "hshare_jax.host_memory",
    "hshare_jax.generate",
    "hshare_jax.calibration",
    "hshare_jax.evaluation.*",
    "hshare_jax.training.*",
    "hshare_jax",
    "hshare_jax.cli.*",
    "hshare_jax.__main__",
    "scripts.*",
)

# All other modules hold pure functions, which their callers compile as parts of larger programs.
MAY_JIT = (
    "hshare_jax.mesh",  # arrays are made on their devices, and gathered from those of other processes
    "hshare_jax.kernels.*",  # so that layers of one shape trace a kernel once
    "hshare_jax.methods.*",  # likewise, and lists are chosen layer by layer, to save memory
    "hshare_jax.prefill",
    "hshare_jax.decode_step",
    "hshare_jax.decode_loop",
    "hshare_jax.calibration",
    "hshare_jax.training.*",
    "hshare_jax.evaluation.*",
    "scripts.*",
)


def _matches(module: str, entry: str) -> bool:
    folder = entry.removesuffix(".*")
    return module == folder or (folder != entry and module.startswith(folder + "."))


def _modules() -> dict[str, Path]:
    """The file of every module, by the module's name. Folders are walked where they lie, not through symlinks."""
    modules = {}
    for folder, package in (
        ("hshare_jax", "hshare_jax"),
        ("models", "hshare_jax.models"),
        ("kernels", "hshare_jax.kernels"),
        ("scripts", "scripts"),
    ):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            if folder == "hshare_jax" and parts[0] in ("models", "kernels"):
                continue
            modules[".".join((package, *parts)).removesuffix(".__init__")] = path
    return modules


MODULES = _modules()
FILES = [*MODULES.values(), *sorted((ROOT / "tests").rglob("*.py"))]


def _imports(tree: ast.AST) -> set[str]:
    """The modules that a syntax tree imports anywhere, including lazy imports and imports for types."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            origin = "." * node.level + (node.module or "")
            members = {f"{origin}.{alias.name}" for alias in node.names}
            found |= {member if member in MODULES else origin for member in members}
    return found


def _level(module: str) -> int | None:
    return next((level for level, entry in enumerate(ORDER) if _matches(module, entry)), None)


def _parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def _ids(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_lazy_and_member_imports_are_seen() -> None:
    tree = ast.parse(
        "import jax.numpy as jnp\ndef f():\n    from hshare_jax import shapes\n    from hshare_jax.shapes import Logits"
    )
    assert _imports(tree) == {"jax.numpy", "hshare_jax.shapes"}


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down_only(module: str) -> None:
    level = _level(module)
    assert level is not None, f"place {module} in ORDER (tests/test_architecture.py), above all that it imports"
    for imported in sorted(_imports(_parse(MODULES[module]))):
        if imported.partition(".")[0] not in ("hshare_jax", "scripts"):
            continue
        below = _level(imported)
        assert below is not None, f"{module} imports {imported}, which is no module of ORDER"
        assert below < level or (below == level and ORDER[level].endswith(".*")), (
            f"{module} imports {imported}, which is not below it"
        )


def test_files_of_one_folder_do_not_import_in_a_ring() -> None:
    below = {name: {i for i in _imports(_parse(path)) if i in MODULES and i != name} for name, path in MODULES.items()}
    while leaves := [name for name, imported in below.items() if not imported]:
        for leaf in leaves:
            del below[leaf]
        below = {name: imported - set(leaves) for name, imported in below.items()}
    assert not below, f"these modules import one another in a ring, or stand above one: {sorted(below)}"


@pytest.mark.parametrize(
    ("package", "known"),
    [
        ("hshare_jax.kernels", ("hshare_jax.shapes", "hshare_jax.errors", "hshare_jax.kernels")),
        (
            "hshare_jax.models",
            (
                "hshare_jax.shapes",
                "hshare_jax.errors",
                "hshare_jax.mesh",
                "hshare_jax.files",
                "hshare_jax.kernels",
                "hshare_jax.models",
            ),
        ),
    ],
)
def test_models_and_kernels_know_nothing_of_hshare(package: str, known: tuple[str, ...]) -> None:
    strangers = {
        (module, imported)
        for module, path in MODULES.items()
        if module.startswith(package + ".")
        for imported in _imports(_parse(path))
        if imported.startswith("hshare_jax")
        and not any(_matches(imported, name) for entry in known for name in (entry, entry + ".*"))
    }
    assert not strangers


@pytest.mark.parametrize("path", FILES, ids=_ids)
def test_imports_are_absolute_and_never_of_the_bare_folders(path: Path) -> None:
    imported = _imports(_parse(path))
    assert not [name for name in imported if name.startswith(".")], "imports are absolute"
    bare = [name for name in imported if name.partition(".")[0] in ("models", "kernels")]
    assert not bare, "the folders are imported as hshare_jax.models and hshare_jax.kernels"


@pytest.mark.parametrize(
    "module", [module for module in MODULES if not any(_matches(module, entry) for entry in MAY_JIT)]
)
def test_only_the_outermost_functions_are_jitted(module: str) -> None:
    lines = [
        node.lineno
        for node in ast.walk(_parse(MODULES[module]))
        if (isinstance(node, ast.Attribute) and node.attr == "jit")
        or (isinstance(node, ast.ImportFrom) and "jit" in {alias.name for alias in node.names})
    ]
    assert not lines, f"{module} jits in lines {lines}; let its caller do so, or extend MAY_JIT"


@pytest.mark.parametrize("path", FILES, ids=_ids)
def test_every_module_opens_with_one_line_that_says_what_it_is(path: Path) -> None:
    first, *rest = (ast.get_docstring(_parse(path)) or "").splitlines() or [""]
    assert first, "a module docstring is missing"
    assert first[-1] in ".:", "the first line is a whole sentence"
    assert not rest or not rest[0], "a blank line follows the first"


def test_no_file_has_a_name_that_says_nothing() -> None:
    assert not [path for path in FILES if path.stem in ("utils", "helpers", "common", "misc")]


def test_models_and_kernels_are_no_regular_packages() -> None:
    # As a regular package, the folder `kernels` would shadow PyPI's `kernels` in the repository root. A conftest.py in
    # the root would put the root on the path.
    assert not [path for name in ("models", "kernels") for path in (ROOT / name).rglob("__init__.py")]
    assert not (ROOT / "conftest.py").exists()


@pytest.mark.parametrize("name", ["models", "kernels"])
def test_package_links_to_the_plain_folder(name: str) -> None:
    link = ROOT / "hshare_jax" / name
    assert link.is_symlink()
    assert link.readlink() == Path("..", name)
