"""Perplexity: how well a method's decode steps predict the last tokens of windows that are cut from any texts."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

from hshare_jax.errors import SettingError, check_whole, setting
from hshare_jax.evaluation.run import in_batches, unfinished_by_batch
from hshare_jax.evaluation.tasks.base import Task, check_share, read_texts

if TYPE_CHECKING:
    import numpy as np

    from hshare_jax.evaluation.text_windows import Window
    from hshare_jax.files.records import Records
    from hshare_jax.methods.base import Method
    from hshare_jax.models.pretrained import Model, ModelFiles


@dataclasses.dataclass(frozen=True)
class Perplexity(Task[dict[str, str], "Window"]):
    """Windows of texts, whose last tokens are scored; see `hshare_jax.evaluation.text_windows`."""

    name = "perplexity"
    takes_many_files = True
    limit_moves_items = True  # the windows are spread over each text

    limit: int | None = setting(None, "windows spread over each text; by default all that fit side by side")
    context: int = setting(1024, "tokens of a window")
    steps: int = setting(256, "last positions of a window that are scored")
    skip_start: Fraction = setting(Fraction(0), "leave out this share of each text at its beginning")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("context", self.context, 1)
        check_whole("steps", self.steps, 1)
        if self.steps >= self.context:
            raise SettingError("steps", self.steps, "must be less than {context}", others={"context": self.context})
        check_share("skip_start", self.skip_start, with_end=False)

    def read(self, paths: Sequence[Path], *, skip_bad: bool = False) -> tuple[dict[str, str], int]:
        """The texts by the names of their files; nothing in them can be bad."""
        return read_texts(paths), 0

    def fit(
        self, model: "Model | ModelFiles", data: dict[str, str], *, skip_bad: bool = False
    ) -> "tuple[list[Window], int]":
        """The windows of all texts; see `Task.fit`."""
        from hshare_jax.evaluation.text_windows import cut_windows

        windows, skip = [], float(self.skip_start)
        for name, text in data.items():
            windows += cut_windows(model, name, text, context=self.context, count=self.limit, skip=skip)
        return windows, 0

    def sizes(self, items: "Sequence[Window]") -> list[tuple[int, int]]:
        """The tokens before the scored positions, and all tokens that are read; the last one is only predicted."""
        return [(len(window.tokens) - 1 - self.steps, len(window.tokens) - 1) for window in items]

    def run(
        self,
        model: "Model",
        items: "Sequence[Window]",
        methods: "Mapping[str, Method | None]",
        records: "Records",
        *,
        batch_size: int,
        impl: str = "auto",
    ) -> None:
        """Scores every method on every window; a batch is prefilled once for all methods; see `Task.run`.

        Raises:
            ValueError: a loss that is not a number.
        """
        for batch, scored in unfinished_by_batch(methods, in_batches(items, batch_size), records):
            # In a function, so that a batch's cache is freed before the next one is allocated.
            self._run_batch(model, batch, list(methods.values()), scored, records, impl)

    def _run_batch(
        self,
        model: "Model",
        batch: "list[Window]",
        methods: "list[Method | None]",
        scored: "Iterator[tuple[str, Method | None]]",
        records: "Records",
        impl: str,
    ) -> None:
        from hshare_jax.evaluation.text_windows import Scorer

        scorer = Scorer(model, batch, self.steps, methods, impl=impl)
        for name, method in scored:
            of_steps = scorer.score(method)
            reads = of_steps.pop("reads")
            for row, window in enumerate(batch):
                means = self.score(window, {key: values[row] for key, values in of_steps.items()})
                if not math.isfinite(means["loss"]):
                    raise ValueError(
                        f"{window.id}: the loss of {name} is {means['loss']} in {model.dtype}: the weights are broken, "
                        "or the dtype is too narrow for them; float32 is the widest"
                    )
                records.append(
                    {
                        "id": window.id, "method": name, "task": "perplexity", "steps": self.steps,
                        "reads": round(float(reads[row].mean()), 6), "scores": means,
                    }
                )  # fmt: skip

    def score(self, item: "Window", output: "Mapping[str, np.ndarray]") -> dict[str, float]:
        """The mean over the scored positions of each score of `Scorer.score`."""
        import numpy as np

        # Recall is not measured on every step, and is NaN on the other steps.
        means = {name: np.nanmean(values) if name == "recall" else values.mean() for name, values in output.items()}
        return {name: round(float(mean), 6) for name, mean in means.items()}
