"""The checks of programs compiled for other machines notice what they are for. They run without those compilers."""

import collections
import dataclasses
import importlib
from pathlib import Path
from types import ModuleType

import pytest

from hshare_jax.device_memory import DeviceMemory

PROGRAM = """HloModule step

%fused_computation (p: bf16[4,8]) -> f32[4,8] {
  %copy.1 = bf16[4,8]{0,1} copy(%p)
  ROOT %convert = f32[4,8]{0,1} convert(%copy.1)
}

%wrapped (p: bf16[4,8]) -> bf16[4,8] {
  ROOT %copy.2 = bf16[4,8]{0,1} copy(%p)
}

ENTRY %main (p: bf16[4,8]) -> bf16[4,8] {
  %fast = bf16[4,8]{1,0:T(8,128)S(1)} copy(%p)
  %other = s32[16]{0} copy(%q)
  ROOT %slow = bf16[4,8]{1,0:T(8,128)} copy(%fast)
}
"""


@pytest.fixture(scope="module")
def scripts() -> ModuleType:
    """The modules of the check. The repository's root, where the scripts lie, is not on the import path."""
    modules = ModuleType("scripts_that_compile")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent.parent))
        for name in ("compiled_programs", "check_many_devices"):
            setattr(modules, name, importlib.import_module(f"scripts.{name}"))
    return modules


def test_copies_in_memory_count_and_those_in_fast_memory_or_on_the_way_do_not(scripts: ModuleType) -> None:
    assert scripts.compiled_programs.find_copies(PROGRAM, {"bf16[4,8]"}) == ["bf16[4,8]"] * 2
    assert scripts.compiled_programs.find_copies(PROGRAM, {"s32[16]"}) == ["s32[16]"]


def test_every_limit_of_a_step_on_many_devices_is_watched(scripts: ModuleType) -> None:
    check = scripts.check_many_devices
    good = scripts.compiled_programs.Program(
        operations=collections.Counter(fusion=100, **{"all-reduce-start": 17, "all-reduce-done": 17}),
        collectives=collections.Counter({"all-reduce": 17, "all-gather": 1}),
        num_pallas=16, copies=[], arguments=1000 + 64, in_place=600, temporaries=4.5,
    )  # fmt: skip
    memory = DeviceMemory(weights=400, cache=500, labels=60, lists=40)
    limits = check.Limits(kernels_of_layer=14, mib_of_row=0.3)

    def faults(**changes: object) -> list[str]:
        return check.find_faults(dataclasses.replace(good, **changes), memory, 8, 16, limits)

    assert faults() == []
    assert faults(copies=["bf16[4,8]"]) == ["copies of bf16[4,8]"]
    more = collections.Counter({"all-reduce": 17, "all-gather": 2})
    assert faults(collectives=more)[0].startswith("exchanges {'all-reduce': 17, 'all-gather': 2} instead of")
    assert faults(operations=collections.Counter(fusion=126)) == ["126 kernels, and 125 are allowed"]
    assert faults(num_pallas=0) == ["0 Pallas kernels for 8 layers"]
    assert faults(temporaries=5) == ["5.0 MiB of temporaries, and 4.8 are allowed"]
    assert faults(arguments=2000) == ["2000 bytes of arguments, and their shapes make 1000"]
    assert faults(in_place=100) == ["100 bytes change in place; the state has 600"]
