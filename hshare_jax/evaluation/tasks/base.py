"""The interface of an evaluation task, and how tasks read texts and check their options."""

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from hshare_jax.errors import SettingError, check_whole, setting
from hshare_jax.evaluation.tasks.examples import FileError
from hshare_jax.files.texts import read_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from hshare_jax.files.records import Records
    from hshare_jax.methods.base import Method
    from hshare_jax.models.pretrained import Model, ModelFiles

# `hshare-jax eval` reads the options of all tasks first. So that it starts quickly, tasks import the modules that
# compute in their methods, not at the top of their files.

Data = TypeVar("Data")
Item = TypeVar("Item")


@dataclasses.dataclass(frozen=True)
class Task(abc.ABC, Generic[Data, Item]):
    """An evaluation task: it reads files, makes items that fit a model, runs methods on the items and scores them.

    A task is a frozen dataclass. Its fields are its options on the command line, with help texts by `errors.setting`.
    `hshare-jax eval` calls `read`, `fit`, `sizes` and `run`, in this order. `read` and `fit` find every mistake in the
    data before the model's weights are loaded.

    Raises:
        SettingError: an option has a value outside its range.
    """

    name: ClassVar[str]  # as the command line and results files name the task
    takes_many_files: ClassVar[bool] = False
    has_examples: ClassVar[bool] = False  # whether a file holds examples, of which bad ones can be left out
    limit_moves_items: ClassVar[bool] = False  # whether another limit gives other items, not only fewer or more

    limit: int | None = setting(None, "read only the first N examples")

    def __post_init__(self) -> None:
        if self.limit is not None:
            check_whole("limit", self.limit, 1)

    @abc.abstractmethod
    def read(self, paths: Sequence[Path], *, skip_bad: bool = False) -> tuple[Data, int]:
        """The contents of the files, and how many bad examples were left out.

        Args:
            paths: the task's files; one file, unless `takes_many_files`.
            skip_bad: leaves bad examples out and counts them. Otherwise the first bad example raises.

        Raises:
            DataError: a bad example, named by file and line; FileError, a file that is not the task's.
            ModuleNotFoundError: a library that the task's scores need is not installed.
            OSError: a file that cannot be read.
        """

    @abc.abstractmethod
    def fit(self, model: "Model | ModelFiles", data: Data, *, skip_bad: bool = False) -> tuple[list[Item], int]:
        """The items that are measured on a model, and how many were left out because they are too long for it.

        Args:
            model: its tokenizer and its positions count. The weights are not needed.
            data: from `read`.
            skip_bad: leaves items out that are too long and counts them. Otherwise the first one raises.

        Raises:
            DataError: an item that is too long for the model; FileError, if all are.
            SettingError: an option that does not fit the model or the texts.
        """

    @abc.abstractmethod
    def sizes(self, items: Sequence[Item]) -> list[tuple[int, int]]:
        """For each item, the number of tokens that are prefilled and the number of tokens at the end."""

    @abc.abstractmethod
    def run(
        self,
        model: "Model",
        items: Sequence[Item],
        methods: "Mapping[str, Method | None]",
        records: "Records",
        *,
        batch_size: int,
        impl: str = "auto",
    ) -> None:
        """Measures every method on every item, and appends a line for each. Finished items are not measured again.

        Args:
            model: from `load_model`.
            items: from `fit`.
            methods: the methods by name; None is dense decoding.
            records: the results file, keyed by `run.KEYS`.
            batch_size: items that are computed together.
            impl: which implementation computes decode steps, as for `decode_step`.
        """

    @abc.abstractmethod
    def score(self, item: Item, output: Any) -> dict[str, float]:
        """The scores, by name, of a method's output for an item."""


def read_texts(paths: Sequence[Path]) -> dict[str, str]:
    """The texts of UTF-8 files, by the files' names.

    Raises:
        FileError: a file that is not UTF-8.
        OSError: a file that cannot be read.
    """
    texts = {}
    for path in paths:
        try:
            texts[path.name] = read_text(path)
        except ValueError as error:
            raise FileError(str(error)) from error
    return texts


def tokenizer_of(model: "Model | ModelFiles") -> "PreTrainedTokenizerBase":
    """The model's tokenizer; ValueError if it has none."""
    if model.tokenizer is None:
        raise ValueError(f"{model.name} has no tokenizer, so text cannot be given to it")
    return model.tokenizer


def check_share(name: str, value: Any, *, with_end: bool) -> None:
    """Raises SettingError unless a value lies between 0 and 1, where 1 is allowed only `with_end`."""
    if not (0 <= value < 1 or (with_end and value == 1)):
        raise SettingError(name, value, f"must lie in [0, 1{']' if with_end else ')'}")
