"""Compiles the library of CPU kernels (kernels/native), if there is a C++17 compiler. All else is in pyproject.toml."""

import importlib.util
import os
import platform
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

SOURCES = Path("kernels", "native")
FLAGS = ["-std=gnu++17", "-O3", "-g0", "-fvisibility=hidden", "-ffp-contract=fast"]
CODE_FLAGS = ["-Wno-psabi", "-Wno-maybe-uninitialized", "-Wno-unknown-warning-option"]  # compilers' false alarms
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"]
AMX = [*AVX512, "-mamx-tile", "-mamx-bf16"]
TARGETS = {"any": ["-DLANES=4"]}  # the code of each instruction set; the library chooses among them when it runs
if platform.system() == "Darwin":  # not for two machines at once, as python.org's Python would
    os.environ.setdefault("ARCHFLAGS", f"-arch {platform.machine()}")
if platform.machine() in ("x86_64", "AMD64"):
    TARGETS |= {"avx2": ["-DLANES=8", *AVX2], "avx512": ["-DLANES=16", *AVX512], "amx": ["-DLANES=16", *AMX]}


class BuildLibrary(build_ext):
    """Builds a plain shared library, which Python loads by ctypes. So one library serves all versions of Python."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []

    def build_extension(self, ext: Extension) -> None:
        spec = importlib.util.find_spec("jaxlib")
        if spec is None:
            raise CompileError("jaxlib, whose headers are needed, is not installed")
        headers = [str(Path(spec.submodule_search_locations[0]) / "include")]

        def compile_file(name: str, place: str, *flags: str) -> list[str]:
            source, directory = str(SOURCES / name), os.path.join(self.build_temp, place)
            return self.compiler.compile([source], directory, include_dirs=headers, extra_postargs=[*FLAGS, *flags])

        files = [("handlers.cc", "handlers")]
        files += [("code.cc", target, *CODE_FLAGS, f"-DTARGET={target}", *flags) for target, flags in TARGETS.items()]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = [made for made, *_ in pool.map(lambda file: compile_file(*file), files)]
        path = self.get_ext_fullpath(ext.name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        self.compiler.link_shared_object(objects, path, target_lang="c++")


class Wheel(bdist_wheel):
    """A wheel for every Python 3: for this platform with the library, for every platform without it."""

    def get_tag(self) -> tuple[str, str, str]:
        has_library = any(Path(self.bdist_dir).rglob("libhshare_native.so")) if self.bdist_dir else False
        return "py3", "none", super().get_tag()[2] if has_library else "any"


library = Extension(
    "hshare_jax.kernels.native.libhshare_native",
    sources=[str(path) for path in sorted(SOURCES.glob("*.cc"))],
    depends=[str(path) for path in sorted(SOURCES.glob("*.h"))],
    language="c++",
    optional=True,  # without a compiler the package is installed without the library
)
setup(ext_modules=[library], cmdclass={"build_ext": BuildLibrary, "bdist_wheel": Wheel})
