"""A Hugging Face directory as a model: config.json, safetensors (one file or shards), tokenizer, end tokens.

Damaged files: a file that was cut short or has grown is an error. A changed safetensors header is an error too, unless
the change has no effect on the model. A flipped bit inside a tensor gives another valid number, so it can only be
noticed if SHA256SUMS lies beside the files (checksums.py). Then it is an error.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hshare_jax.errors import CheckpointError
from hshare_jax.files.checksums import verify_checksums
from hshare_jax.files.texts import parse_json
from hshare_jax.models.config import ARCHITECTURES, ModelConfig, check_num_layers, config_from_hf
from hshare_jax.models.weights import ALL, BLOCK_BYTES, is_rotary_buffer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CONFIG, _WEIGHTS, _INDEX, _GENERATION = (
    "config.json", "model.safetensors", "model.safetensors.index.json", "generation_config.json",
)  # fmt: skip
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
_TOKENIZER_EXTRAS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
# What transformers raises for damaged files, whose values have other types and sizes than it expects.
_OF_DAMAGE = (TypeError, ValueError, AttributeError, LookupError, ArithmeticError, RecursionError)
_FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


def read_hf_config(directory: Path) -> tuple[ModelConfig, tuple[int, ...]]:
    """Reads (the configuration, the ids that end a generation).

    The ids come from generation_config.json, or from config.json if the former gives none.

    Raises:
        ValueError: an architecture, activation, rotary type or quantisation that is not supported.
        CheckpointError: config.json is not JSON, or its sizes contradict each other.
    """
    verify_checksums(directory, [_CONFIG, _GENERATION])
    path = directory / _CONFIG
    found = _read_json(path)
    if found.get("model_type") not in ARCHITECTURES:
        raise ValueError(
            f"{path}: model_type={found.get('model_type')!r} is not supported; supported: {', '.join(ARCHITECTURES)}"
        )
    if found.get("quantization_config"):
        raise ValueError(f"{path}: quantised safetensors are not supported; use the original weights or a GGUF file")
    from huggingface_hub.errors import StrictDataclassError
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING  # slow: imports torch if that is installed

    try:
        # The class of transformers supplies the defaults for what config.json leaves out. Some of these classes make a
        # list with an entry for each layer, so the number of layers is checked first.
        if isinstance(found.get("num_hidden_layers"), int):
            check_num_layers("num_hidden_layers", found["num_hidden_layers"])
        config = config_from_hf(CONFIG_MAPPING[found["model_type"]](**found).to_dict())
    except (*_OF_DAMAGE, StrictDataclassError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    generation = _read_json(directory / _GENERATION) if (directory / _GENERATION).is_file() else {}
    ends = generation.get("eos_token_id", found.get("eos_token_id"))
    ends = ends if isinstance(ends, list) else [ends]
    return config, tuple(end for end in ends if isinstance(end, int) and not isinstance(end, bool))


def read_hf_tokenizer(directory: Path) -> "PreTrainedTokenizerBase | None":
    """Reads the tokenizer of a directory. None if it has none. Raises CheckpointError if it cannot be read.

    A tokenizer.json is read as it is. AutoTokenizer may replace its rules by those of the class that
    tokenizer_config.json names: transformers before 5.22 drops all spaces of the byte-level tokenizers that are called
    LlamaTokenizerFast there, such as DeepSeek's (transformers issue 45488).
    """
    if not any((directory / name).is_file() for name in _TOKENIZER_FILES):
        return None
    from transformers import AutoTokenizer, PreTrainedTokenizerFast  # slow

    verify_checksums(directory, [*_TOKENIZER_FILES, *_TOKENIZER_EXTRAS])
    is_model = not (directory / _TOKENIZER_FILES[0]).is_file()
    try:
        reader = AutoTokenizer if is_model else PreTrainedTokenizerFast
        tokenizer = reader.from_pretrained(directory, local_files_only=True)
    except Exception as error:
        # For a damaged file transformers raises `_OF_DAMAGE`, and the tokenizers library raises Exception itself,
        # which no narrower clause catches. Every other error (no memory, a mistake of ours) is raised again.
        if type(error) is not Exception and not isinstance(error, (ImportError, *_OF_DAMAGE)):
            raise
        hint = "; a tokenizer.model is read by another package: pip install sentencepiece" if is_model else ""
        raise CheckpointError(f"{directory}: its tokenizer cannot be read: {error}{hint}") from error
    if not isinstance(limit := tokenizer.model_max_length, int | float):  # compared with the length of every text
        raise CheckpointError(f"{directory}: its tokenizer has model_max_length={limit!r}, which must be a number")
    return tokenizer


class HFTensors:
    """The tensors of a directory of safetensors files (a `TensorSource`)."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._files = self._read_index()  # tensor name -> file name
        self._shapes: dict[str, tuple[int, ...]] = {}
        files = sorted(set(self._files.values()))
        verify_checksums(directory, files)
        for file in files:
            self._read_header(file)
        if lost := self._files.keys() - self._shapes.keys():
            name = min(lost)
            raise CheckpointError(
                f"{directory / self._files[name]}: tensor {name} is missing, though {_INDEX} places it there"
            )

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._shapes

    def file_of(self, name: str) -> str:
        files = set(self._files.values())
        return str(self._directory / (self._files.get(name) or (files.pop() if len(files) == 1 else _INDEX)))

    def blocks(self, name: str, rows: slice = ALL, columns: slice = ALL) -> Iterator[np.ndarray]:
        first, *rest = (range(size)[part] for size, part in zip(self._shapes[name], (rows, columns), strict=False))
        row_bytes = 4 * len(rest[0]) if rest else 4
        step = max(BLOCK_BYTES // max(row_bytes, 1), 1)
        for row in range(first.start, first.stop, step):
            part = slice(row, min(row + step, first.stop))
            # The file is opened again for each block. An open file is mapped, and the part that was read counts as
            # used memory until the file is closed.
            with self._open(self._files[name]) as file:
                yield file.get_slice(name)[(part, columns) if rest else part]

    def codes(self, name: str) -> None:
        return None

    def _open(self, file: str) -> Any:
        from safetensors import SafetensorError, safe_open

        path = self._directory / file
        try:
            return safe_open(path, framework="np")
        except SafetensorError as error:
            raise CheckpointError(f"{path} is damaged: {error}") from error

    def _read_index(self) -> dict[str, str]:
        if (self._directory / _WEIGHTS).is_file():
            with self._open(_WEIGHTS) as file:
                names = [name for name in file.keys() if not is_rotary_buffer(name)]  # noqa: SIM118 - not a mapping
            return dict.fromkeys(names, _WEIGHTS)
        verify_checksums(self._directory, [_INDEX])
        path = self._directory / _INDEX
        index = _read_json(path).get("weight_map")
        if not isinstance(index, dict) or not all(isinstance(file, str) for file in index.values()):
            raise CheckpointError(f"{path}: weight_map must give the file of each tensor")
        index = {name: file for name, file in index.items() if not is_rotary_buffer(name)}
        for file in sorted(set(index.values())):
            if Path(file).name != file or not (self._directory / file).is_file():
                raise CheckpointError(f"{path} names the file {file!r}, which does not lie beside it")
        return index

    def _read_header(self, file: str) -> None:
        path = self._directory / file
        with self._open(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a mapping
                if is_rotary_buffer(name):
                    continue
                if self._files.get(name) != file:
                    raise CheckpointError(f"{path}: tensor {name} is not what {_INDEX} places in this file")
                view = tensors.get_slice(name)
                if view.get_dtype() not in _FLOATS:
                    raise CheckpointError(
                        f"{path}: tensor {name} is stored as {view.get_dtype()}; read are {', '.join(_FLOATS)}"
                    )
                self._shapes[name] = tuple(view.get_shape())


def check_hf_directory(directory: Path, name: str, *, weights: bool = True) -> None:
    """Raises FileNotFoundError if the directory of the model `name` has no config.json, or no safetensors.

    Without `weights` it may lack safetensors.
    """
    has_weights = (directory / _WEIGHTS).is_file() or (directory / _INDEX).is_file()
    if (directory / _CONFIG).is_file() and (has_weights or not weights):
        return
    if found := sorted(path for path in directory.iterdir() if path.suffix.lower() == ".gguf"):
        more = f", or one of the {len(found) - 1} other .gguf files there" if len(found) > 1 else ""
        raise FileNotFoundError(f"{name} holds no Hugging Face model, but GGUF: give {found[0]}{more}")
    if not (directory / _CONFIG).is_file():
        raise FileNotFoundError(f"{name} has no {_CONFIG} (a Hugging Face model) and no model.json (a converted one)")
    raise FileNotFoundError(f"{name} has neither {_WEIGHTS} nor {_INDEX}; weights in other formats are not read")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = parse_json(path.read_bytes())
    except ValueError as error:  # not UTF-8, or not JSON
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} is damaged: it must hold a JSON object")
    return found
