"""The table of implementations: which modules compute the operations of `api`, and where each module runs.

To add an implementation, write its two modules and add its row. The tests in tests/kernels then run it too. jax is
imported by the functions, so that the command line reads the names without it.
"""

import dataclasses
import functools
import importlib
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import TypeVar

from hshare_jax.errors import SettingError

MACHINES = {"cpu": "CPUs", "cuda": "NVIDIA GPUs"}  # platforms in words, for messages
Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One row of the table.

    The module `<prefix>_attention` defines `dense_decode`, `sparse_decode` and `split_decode`; `<prefix>_selection`
    defines `select_by_labels` and `select_by_keys`. If the row says that it `appends`, `<prefix>_appending` defines
    `append_tokens` and `append_labels`; if it `projects`, `<prefix>_projection` defines `project`; if it `prefills`,
    `<prefix>_prefill` defines `prefill_attention` and `received_attention`. The functions take the arguments that `api`
    describes, without `impl`; those of attention, selection and prefill take the row's options too. A module is
    imported when an operation first needs it, so that a program imports no library that it does not use.
    """

    prefix: str
    platforms: tuple[str, ...] = ()  # where it runs, as jax names platforms; empty: everywhere
    is_automatic: bool = False  # whether "auto" takes it on these platforms
    options: Mapping[str, object] = dataclasses.field(default_factory=dict)  # further arguments, as above
    appends: bool = False  # whether it appends to the cache too; else the reference does
    projects: bool = False  # whether it computes projections too; else the reference does
    prefills: bool = False  # whether it computes prefill attention too; else the reference does
    way_out: str = "leave it 'auto'"  # what a refusal advises on the other platforms
    # The module that says what keeps it from running here, `obstacle() -> str | None`; and how a refusal says what is
    # needed, before the obstacle, and how to get it.
    library: str | None = None
    needs: str = "the library of native kernels, which"
    installation: str = "install a C++17 compiler and then the package again"

    @property
    def attention(self) -> ModuleType:
        """The module of attention."""
        return importlib.import_module(f"hshare_jax.kernels.{self.prefix}_attention")

    @property
    def selection(self) -> ModuleType:
        """The module of selection."""
        return importlib.import_module(f"hshare_jax.kernels.{self.prefix}_selection")

    @property
    def appending(self) -> ModuleType:
        """The module of appending."""
        return importlib.import_module(f"hshare_jax.kernels.{self.prefix if self.appends else 'reference'}_appending")

    @property
    def projection(self) -> ModuleType:
        """The module of projections."""
        return importlib.import_module(f"hshare_jax.kernels.{self.prefix if self.projects else 'reference'}_projection")

    @property
    def prefill(self) -> ModuleType:
        """The module of prefill attention."""
        return importlib.import_module(f"hshare_jax.kernels.{self.prefix if self.prefills else 'reference'}_prefill")

    def obstacle(self) -> str | None:
        """What keeps it from running on this machine, as the rest of a sentence about its library; None if nothing."""
        return None if self.library is None else importlib.import_module(self.library).obstacle()


IMPLEMENTATIONS = {
    "pallas": Implementation(
        "pallas", platforms=("cuda",), is_automatic=True, prefills=True,
        way_out="leave it 'auto', or use 'interpret' to try the kernels, slowly",
    ),
    "native": Implementation(
        "native", platforms=("cpu",), is_automatic=True, appends=True, projects=True, prefills=True,
        library="hshare_jax.kernels.native_library",
    ),
    "reference": Implementation("reference", appends=True, projects=True, prefills=True),
    "interpret": Implementation("pallas", options={"interpret": True}, prefills=True),
    "triton": Implementation(
        "triton", platforms=("cuda",), prefills=True,
        way_out="leave it 'auto', or use 'triton-interpret' to try the kernels, slowly",
        library="hshare_jax.kernels.triton_library", needs="the Triton kernels, which",
        installation="pip install 'hshare-jax[cuda,triton]' in Python 3.12 or newer, and leave TRITON_INTERPRET unset",
    ),
    "triton-interpret": Implementation(
        "triton", prefills=True, library="hshare_jax.kernels.triton_interpreter", needs="Triton's interpreter, which",
        installation="pip install triton and set TRITON_INTERPRET=1",
    ),
}  # fmt: skip
IMPLS = ("auto", *IMPLEMENTATIONS)


def check_impl(impl: str) -> None:
    """Raises SettingError for an unknown name, and for an implementation that does not run on this platform."""
    if impl not in IMPLS:
        raise SettingError("impl", impl, f"must be one of {', '.join(map(repr, IMPLS))}")
    if impl == "auto":
        return
    chosen, platform = IMPLEMENTATIONS[impl], traced_platform()
    if chosen.platforms and platform not in chosen.platforms:
        machines = " and ".join(MACHINES.get(name, name) for name in chosen.platforms)
        rule = f"runs on {machines}, and this program is for {platform}"
        raise SettingError("impl", impl, rule, chosen.way_out)
    if obstacle := chosen.obstacle():
        raise SettingError(
            "impl", impl, f"needs {chosen.needs} {obstacle}", f"leave it 'auto', or {chosen.installation}"
        )


def describe(impl: str) -> str:
    """Which implementation `impl` takes on this platform, in words; where a library is missing, also why.

    auto -> native (amx)
    """
    check_impl(impl)
    if impl == "auto":
        rows, platform = IMPLEMENTATIONS.items(), traced_platform()
        wanted = {name: row for name, row in rows if row.is_automatic and platform in row.platforms}
        missing = [f"the library of {name} kernels {row.obstacle()}" for name, row in wanted.items() if row.obstacle()]
        if missing or not wanted:
            return f"reference ({'; '.join(missing)})" if missing else "reference"
        impl = next(iter(wanted))
    library = IMPLEMENTATIONS[impl].library
    return impl if library is None else f"{impl} ({importlib.import_module(library).instructions()})"


def multiplies_codes() -> bool:
    """Whether `auto` multiplies with weights in few bits as they are, on this platform."""
    platform = traced_platform()
    rows = [row for row in IMPLEMENTATIONS.values() if row.is_automatic and row.projects]
    return any(platform in row.platforms and row.obstacle() is None for row in rows)


def run(impl: str, call: Callable[[Implementation], Result]) -> Result:
    """Calls an operation with the implementation that `impl` names.

    `auto` takes, on each platform, the implementation that the table makes automatic there, and `reference` on all
    others. A program may be traced for one platform and lowered for another. So each automatic implementation becomes a
    branch; the lowering keeps one branch, and no conditional is left. A program that is known to be for the CPU traces
    no branch, because a branch around each layer's attention would cost half of the speed there.

    Args:
        impl: one of `IMPLS`.
        call: calls the operation with an implementation's modules and options.

    Raises:
        SettingError: as `check_impl`.
    """
    from jax import lax

    check_impl(impl)
    if impl != "auto":
        return call(IMPLEMENTATIONS[impl])
    rows, default = IMPLEMENTATIONS.values(), IMPLEMENTATIONS["reference"]
    automatic = {platform: row for row in rows if row.is_automatic and not row.obstacle() for platform in row.platforms}
    if traced_platform() == "cpu":
        return call(automatic.get("cpu", default))
    branches = {platform: functools.partial(call, row) for platform, row in automatic.items()}
    return lax.platform_dependent(default=functools.partial(call, default), **branches)


def traced_platform() -> str:
    """The platform that is traced for, as far as it is known: the mesh device's platform, or jax's default backend."""
    import jax

    device = jax.sharding.get_abstract_mesh().abstract_device
    platform = jax.default_backend() if device is None else device.platform
    return "cuda" if platform == "gpu" else platform  # the default backend calls an NVIDIA GPU "gpu"
