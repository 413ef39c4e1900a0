"""Loading and saving of models: built-in models, GGUF files, Hugging Face directories and hub ids, our checkpoints."""

import dataclasses
import difflib
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jax.sharding import Mesh
from tqdm import tqdm

from hshare_jax.errors import CheckpointError, SettingError, check_one_of
from hshare_jax.files.texts import check_path
from hshare_jax.kernels.int8_rows import KV_CACHE_DTYPES, KVCacheDType
from hshare_jax.mesh import num_parts
from hshare_jax.models.builtin_model import BUILTIN_MODELS, builtin_checkpoint
from hshare_jax.models.config import ModelConfig
from hshare_jax.models.gguf_checkpoint import GGUFTensors, config_from_gguf
from hshare_jax.models.gguf_file import gguf_name, read_gguf
from hshare_jax.models.gguf_tokenizer import end_tokens_of_gguf, tokenizer_from_gguf
from hshare_jax.models.hf_checkpoint import HFTensors, check_hf_directory, read_hf_config, read_hf_tokenizer
from hshare_jax.models.orbax_checkpoint import (
    CheckpointInfo,
    is_orbax_directory,
    read_checkpoint_info,
    read_checkpoint_tokenizer,
    save_checkpoint,
    stream_checkpoint,
)
from hshare_jax.models.weights import (
    DTYPES,
    DType,
    Parameter,
    Quantize,
    dtype_of,
    identify,
    load_parameters,
    resolve_quantize,
    stream_parameters,
    tensor_layout,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ModelForm = Literal["built-in", "gguf", "checkpoint", "hf", "hub"]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_FILES = ("*.safetensors", "*.json", "tokenizer.model", "*.jinja", "SHA256SUMS")
_HUB_CONFIG = ("config.json", "generation_config.json", "SHA256SUMS")  # all that is fetched if no weights are wanted
_NOT_HUB_FILES = ("consolidated*", "*/*")  # the same weights in other formats
# Tokens that end a turn in a chat template. The one end token that a file names often ends only whole documents.
_TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "</s>")
# A text that every tokenizer can try, and the symbols of byte-level BPE and SentencePiece for spaces and line ends.
_SAMPLE = "one two\nthree caf\u00e9"
_SPACES = ("\u0120", "\u2581")
_RAW = (*_SPACES, "\u010a", "\u00c3")  # the last is the first byte of the e with an accent


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A model in memory. `identity` is a short hash of the weights and the configuration.

    On a mesh of devices `config` has at least as many kv heads as the devices that divide them
    (`ModelConfig.for_parts`).
    """

    config: ModelConfig
    params: dict[str, Any]
    tokenizer: "PreTrainedTokenizerBase | None"
    eos_token_ids: tuple[int, ...]
    name: str
    identity: str
    mesh: Mesh | None = None  # the devices that hold the parameters in parts; None: one device holds them
    kv_cache_dtype: KVCacheDType = "auto"  # of the caches that decode with this model, as for `init_state`

    @property
    def dtype(self) -> DType:
        """The dtype that the model computes in."""
        return str(self.params["embedding"].dtype)  # pyright: ignore[reportReturnType]


@dataclasses.dataclass(frozen=True, eq=False)
class ModelFiles:
    """A model whose configuration and tokenizer have been read, but not its weights."""

    config: ModelConfig
    tokenizer: "PreTrainedTokenizerBase | None"
    eos_token_ids: tuple[int, ...]
    name: str
    dtype: DType  # the default of `load`: the dtype of a converted checkpoint, else float32
    # Reads the parameters one by one, on the host or on a mesh.
    stream: Callable[[DType, Quantize, Mesh | None], Iterator[tuple[str, Parameter]]]

    def load(
        self, dtype: DType | None = None, quantize: Quantize = "auto", mesh: Mesh | None = None,
        kv_cache_dtype: KVCacheDType = "auto",
    ) -> Model:  # fmt: skip
        """Reads the weights onto JAX's default device, or on a mesh. See `load_model` for arguments and errors."""
        config = self.config.for_parts(num_parts(mesh))
        with self._read("loading", dtype, quantize, mesh) as bar:
            params, identity = load_parameters(config, iter(bar))
        names = self.tokenizer, self.eos_token_ids, self.name
        return Model(config, params, *names, identity, mesh, kv_cache_dtype)

    def identify(self, dtype: DType | None = None, quantize: Quantize = "auto") -> tuple[str, int]:
        """The identity of the model that `load` returns, and the bytes of its parameters. They are not kept."""
        with self._read("reading", dtype, quantize) as bar:
            return identify(self.config, iter(bar))

    def _read(self, verb: str, dtype: DType | None, quantize: Quantize, mesh: Mesh | None = None) -> tqdm:
        bits = resolve_quantize(quantize, self.config.for_parts(num_parts(mesh)).part(num_parts(mesh)))
        arrays = self.stream(dtype or self.dtype, bits, mesh)
        total = len(tensor_layout(self.config))
        # disable=None: a bar only where stderr is a terminal.
        return tqdm(arrays, f"{verb} {self.name}", total, leave=False, file=sys.stderr, disable=None)


def load_model(
    name_or_path: str | os.PathLike[str],
    *,
    dtype: DType | None = None,
    quantize: Quantize = "auto",
    kv_cache_dtype: KVCacheDType = "auto",
    cache_dir: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    mesh: Mesh | None = None,
) -> Model:
    """Loads a model, with its parameters on JAX's default device or in parts on a mesh of devices.

    Args:
        name_or_path: a built-in name (`smollm2-135m-instruct`), a .gguf file (any part of one that is split), a
            Hugging Face directory, a checkpoint written by `save_model`, or a Hugging Face hub id
            (`organisation/name`).
        dtype: float32, bfloat16 or float16, in which the model computes. Weights of another dtype are cast. None: the
            dtype of a converted checkpoint, and float32 for every other form of model.
        quantize: the bits of weight matrices. `stored`: those of the file, for a GGUF file's types Q4_0, Q4_1 and Q8_0,
            which loses nothing; matrices of other types become floats. `none`: floats. `int8`: those other matrices
            get 8 bits, and a scale for each 32 weights. `int8-channel`: a scale for each output, which loses more and
            suits GPUs. docs/quality.md has what they lose. `auto`: `stored` where the native kernels multiply with
            such weights as they are, else `none`.
        kv_cache_dtype: of the caches that decode with the model. `auto`: the dtype that it computes in. `int8`: 8 bits,
            with a scale for each token and head. docs/quality.md has what that loses.
        cache_dir: the directory of downloads and conversions. None: $HSHARE_JAX_CACHE, or hshare-jax in the user's
            cache directory; for a hub id the cache of the hub.
        revision: a branch, tag or commit of a hub id.
        mesh: from `make_mesh`: heads, mlp and vocabulary are divided among the devices along "model". Each process
            reads only what its own devices hold, as far as the form of the files allows.

    Raises:
        FileNotFoundError: the path does not exist, or the directory has no weights.
        CheckpointError: the files are damaged or contradict their configuration.
        ConnectionError: a built-in model or a hub id is not cached and cannot be fetched.
        ValueError: the name is not known, this decoder cannot compute the model, or the mesh cannot divide it.
    """
    if dtype is not None:
        dtype_of(dtype)
    check_one_of("kv_cache_dtype", kv_cache_dtype, KV_CACHE_DTYPES)
    files = open_model(name_or_path, cache_dir=cache_dir, revision=revision)
    return files.load(dtype, quantize, mesh, kv_cache_dtype)


def open_model(
    name_or_path: str | os.PathLike[str],
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    weights: bool = True,
) -> ModelFiles:
    """Reads the configuration and the tokenizer of a model, so that both can be checked before the weights are loaded.

    See `load_model` for arguments and errors. A model that is not on this machine is fetched. Without `weights` a
    directory needs only config.json, and of a hub id only the configuration is fetched; such a model may lack its
    tokenizer and cannot be loaded.
    """
    form, name = check_model_name(name_or_path, revision=revision, weights=weights), os.fspath(name_or_path)
    files = _open(form, name, cache_dir, revision, weights)
    if files.tokenizer is not None:
        _check_tokenizer(files.tokenizer, files.name)
    return files


def _open(
    form: ModelForm, name: str, cache_dir: str | os.PathLike[str] | None, revision: str | None, weights: bool
) -> ModelFiles:
    if form == "built-in":
        return _open_builtin(name, cache_dir)
    if form == "hub":
        directory = _snapshot(name, cache_dir, revision, _HUB_FILES if weights else _HUB_CONFIG)
        check_hf_directory(directory, name, weights=weights)
        return _open_hf(directory, name)
    path = Path(os.path.expanduser(name))
    if form == "gguf":
        return _open_gguf(path, gguf_name(path))
    if form == "checkpoint":
        return _open_checkpoint(path)
    return _open_hf(path, path.resolve().name)


def save_model(model: Model, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Writes a model as a checkpoint directory that `load_model` can read. On an error nothing is written.

    With `overwrite` the new model takes the place of the one at `path`. Other files in that directory stay. If several
    processes hold the model, all of them call this, and each writes its own parts; they must reach the same directory.

    Raises:
        FileExistsError: `path` exists and `overwrite` is False, or `path` is not such a checkpoint.
        ValueError: the name of the path is not UTF-8, or the weights became `int8-channel` on a mesh.
    """
    info = CheckpointInfo(model.config, model.dtype, model.eos_token_ids, model.name)
    save_checkpoint(path, info, model.params, model.tokenizer, overwrite=overwrite)


def check_model_name(
    name_or_path: str | os.PathLike[str], *, revision: str | None = None, weights: bool = True
) -> ModelForm:
    """Which form of model a name or a path is. Only names of files are looked at.

    Raises:
        FileNotFoundError: the path does not exist, or the directory holds no model. Without `weights` a directory may
            lack them.
        ValueError: the name is neither built in nor a path nor a hub id, or a revision is given for anything but a hub
            id.
    """
    form = _form(os.fspath(name_or_path), weights)
    if revision is not None and form != "hub":
        raise SettingError("revision", revision, f"is for Hugging Face hub ids; this is a {form} model")
    return form


def _form(name: str, weights: bool) -> ModelForm:
    if name in BUILTIN_MODELS:
        return "built-in"
    path = Path(os.path.expanduser(name))
    if name and path.is_dir():
        check_path(path)
        if is_orbax_directory(path):
            return "checkpoint"
        check_hf_directory(path, name, weights=weights)
        return "hf"
    suffix = path.suffix.lower()
    if path.is_file():
        if suffix != ".gguf":
            raise ValueError(
                f"{name} is a file, but not a .gguf file; for safetensors give the directory that holds config.json"
            )
        return "gguf"
    if _HUB_ID.fullmatch(name) and suffix not in (".gguf", ".safetensors"):
        return "hub"
    if "/" in name or os.sep in name or name.startswith("~") or suffix in (".gguf", ".safetensors"):
        raise FileNotFoundError(f"{name} does not exist")
    close = difflib.get_close_matches(name, BUILTIN_MODELS, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    raise ValueError(f"no model is called {name!r}{hint} {_known_forms()}")


def _known_forms() -> str:
    return (
        f"(built in: {', '.join(BUILTIN_MODELS)}; otherwise a .gguf file, a Hugging Face directory, "
        "a converted directory, or a hub id such as organisation/name)"
    )


def _snapshot(
    name: str, cache_dir: str | os.PathLike[str] | None, revision: str | None, patterns: tuple[str, ...]
) -> Path:
    """Downloads the files of a hub model that match, unless the hub's cache has them. Returns their directory."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        cache = None if cache_dir is None else Path(cache_dir)
        wanted = {"allow_patterns": list(patterns), "ignore_patterns": list(_NOT_HUB_FILES)}
        return Path(snapshot_download(name, revision=revision, cache_dir=cache, **wanted))
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise ConnectionError(
            f"the Hugging Face hub cannot be reached for {name!r}, and it is not cached {_known_forms()}"
        ) from error
    except HfHubHTTPError as error:
        at = f" at revision {revision!r}" if revision else ""
        raise ValueError(f"the Hugging Face hub does not give out {name!r}{at}: {error}") from error


def _open_builtin(name: str, cache_dir: str | os.PathLike[str] | None) -> ModelFiles:
    def convert(gguf: Path, target: Path) -> None:
        save_model(_open_gguf(gguf, name).load(quantize="stored"), target)

    directory = builtin_checkpoint(name, cache_dir, convert)
    try:
        return _open_checkpoint(directory)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; delete {directory} to have it fetched again") from error


def _open_gguf(path: Path, name: str) -> ModelFiles:
    file = read_gguf(path)
    config, tokenizer = config_from_gguf(file), tokenizer_from_gguf(file)

    def stream(dtype: DType, quantize: Quantize, mesh: Mesh | None) -> Iterator[tuple[str, Parameter]]:
        return stream_parameters(config, GGUFTensors(file, config), dtype, quantize, mesh)

    ends = _end_tokens(config, tokenizer, end_tokens_of_gguf(file))
    return ModelFiles(config, tokenizer, ends, name, "float32", stream)


def _open_hf(directory: Path, name: str) -> ModelFiles:
    config, ends = read_hf_config(directory)
    tokenizer = read_hf_tokenizer(directory)

    def stream(dtype: DType, quantize: Quantize, mesh: Mesh | None) -> Iterator[tuple[str, Parameter]]:
        return stream_parameters(config, HFTensors(directory), dtype, quantize, mesh)

    return ModelFiles(config, tokenizer, _end_tokens(config, tokenizer, ends), name, "float32", stream)


def _open_checkpoint(directory: Path) -> ModelFiles:
    info = read_checkpoint_info(directory)
    tokenizer = read_checkpoint_tokenizer(directory)

    def stream(dtype: DType, quantize: Quantize, mesh: Mesh | None) -> Iterator[tuple[str, Parameter]]:
        return stream_checkpoint(directory, info, dtype, quantize, mesh)

    ends = _end_tokens(info.config, tokenizer, info.eos_token_ids)
    return ModelFiles(info.config, tokenizer, ends, info.name, info.dtype, stream)


def _end_tokens(
    config: ModelConfig, tokenizer: "PreTrainedTokenizerBase | None", ends: Iterable[int]
) -> tuple[int, ...]:
    """The ids that end an answer: `ends`, which the files name, and the tokens that end a turn of the chat template."""
    distinct = dict.fromkeys([*ends, *_turn_ends(tokenizer)])
    return tuple(end for end in distinct if 0 <= end < config.vocab_size)


def _check_tokenizer(tokenizer: "PreTrainedTokenizerBase", name: str) -> None:
    """Raises CheckpointError if the tokenizer shows the signs of rules that do not suit its tokens.

    Not every tokenizer gives a text back exactly: some write small letters, or one space for several. The signs are
    that the decoded text holds symbols which stand for spaces, line ends or bytes in a vocabulary, or that it has lost
    all spaces although the vocabulary has a symbol for the space.
    """
    found = tokenizer.decode(tokenizer(_SAMPLE, add_special_tokens=False)["input_ids"])
    known = [tokenizer.convert_tokens_to_ids(symbol) for symbol in _SPACES]  # None or the unknown token if it has none
    has_space = any(tokenizer.convert_ids_to_tokens(token) in _SPACES for token in known if token is not None)
    if any(symbol in found for symbol in _RAW) or (has_space and " " not in found):
        from transformers import __version__

        raise CheckpointError(
            f"the tokenizer of {name} gives {_SAMPLE!r} back as {found!r}, so its rules do not suit its tokens: take "
            "the tokenizer.json that the model was published with. transformers before 5.22 spoils some tokenizers, "
            f"also those saved with a converted model (this is {__version__}); convert such a model again"
        )


def _turn_ends(tokenizer: "PreTrainedTokenizerBase | None") -> list[int]:
    if tokenizer is None:
        return []
    template = tokenizer.chat_template or ""
    if isinstance(template, dict):  # several, by their names
        template = template.get("default", "")
    known: dict[str, int] = getattr(tokenizer, "get_added_vocab", dict)()
    ends = [known[token] for token in _TURN_ENDS if token in template and token in known]
    end = tokenizer.eos_token_id
    return [end, *ends] if isinstance(end, int) else ends


__all__ = ["DTYPES", "Model", "ModelFiles", "ModelForm", "check_model_name", "load_model", "open_model", "save_model"]
