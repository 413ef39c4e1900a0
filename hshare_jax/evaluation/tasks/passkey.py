"""Passkey retrieval: whether a method finds a number that was hidden in a long text before it was asked for."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

from hshare_jax.errors import SettingError, check_whole, setting
from hshare_jax.evaluation.run import in_batches, unfinished_by_batch
from hshare_jax.evaluation.tasks.base import Task, check_share, read_texts, tokenizer_of

if TYPE_CHECKING:
    from hshare_jax.evaluation.passkeys import Passkey
    from hshare_jax.files.records import Records
    from hshare_jax.methods.base import Method
    from hshare_jax.models.pretrained import Model, ModelFiles


@dataclasses.dataclass(frozen=True)
class PasskeyRetrieval(Task[str, "Passkey"]):
    """Passkeys hidden in one book; see `hshare_jax.evaluation.passkeys`."""

    name = "passkey"

    limit: int | None = setting(50, "how many passkeys to hide")
    context: int = setting(1024, "tokens of a text, its question included")
    skip_start: Fraction = setting(Fraction(0), "leave out this share of the book at its beginning")
    depth: Fraction | None = setting(None, "where in a text the number stands; by default anywhere")
    seed: int = setting(0, "seed of the first text; the next texts count up")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("limit", self.limit, 1)  # a book has no last passkey
        check_whole("context", self.context, 1)
        check_whole("seed", self.seed, 0, most=2**63 - 1)
        check_share("skip_start", self.skip_start, with_end=False)
        if self.depth is not None:
            check_share("depth", self.depth, with_end=True)

    def read(self, paths: Sequence[Path], *, skip_bad: bool = False) -> tuple[str, int]:
        """The book's text; nothing in it can be bad."""
        (book,) = read_texts(paths).values()
        return book, 0

    def fit(self, model: "Model | ModelFiles", data: str, *, skip_bad: bool = False) -> "tuple[list[Passkey], int]":
        """The passkeys, all of one length that fits the model; see `Task.fit`."""
        from hshare_jax.evaluation.passkeys import ANSWER_TOKENS, make_passkeys

        assert self.limit is not None
        tokenizer, most = tokenizer_of(model), model.config.max_positions - ANSWER_TOKENS
        if self.context > most:
            rule = f"must be at most {most}, so that the model has room for the answer"
            raise SettingError("context", self.context, rule)
        book = data[int(len(data) * float(self.skip_start)) :]
        depth = None if self.depth is None else float(self.depth)
        seeds = range(self.seed, self.seed + self.limit)
        return make_passkeys(tokenizer, book, self.context, seeds, depth=depth), 0

    def sizes(self, items: "Sequence[Passkey]") -> list[tuple[int, int]]:
        """The tokens of each text, and the tokens with question and answer."""
        from hshare_jax.evaluation.passkeys import ANSWER_TOKENS

        return [(len(item.text), len(item.text) + len(item.question) + ANSWER_TOKENS) for item in items]

    def run(
        self,
        model: "Model",
        items: "Sequence[Passkey]",
        methods: "Mapping[str, Method | None]",
        records: "Records",
        *,
        batch_size: int,
        impl: str = "auto",
    ) -> None:
        """Asks every method for every number; a batch of texts is prefilled once for all methods; see `Task.run`."""
        for batch, asked in unfinished_by_batch(methods, in_batches(items, batch_size), records):
            # In a function, so that a batch's cache is freed before the next one is allocated.
            self._run_batch(model, batch, list(methods.values()), asked, records, impl)

    def _run_batch(
        self,
        model: "Model",
        batch: "list[Passkey]",
        methods: "list[Method | None]",
        asked: "Iterator[tuple[str, Method | None]]",
        records: "Records",
        impl: str,
    ) -> None:
        from hshare_jax.evaluation.passkeys import answer, read_passkeys

        prefilled = read_passkeys(model, batch, methods, impl=impl)
        for name, method in asked:
            answers = answer(model, batch, prefilled, method, impl=impl)
            for passkey, text in zip(batch, answers, strict=True):
                records.append(
                    {
                        "id": passkey.id, "method": name, "task": "passkey", "depth": round(passkey.depth, 4),
                        "text": text, "scores": self.score(passkey, text),
                    }
                )  # fmt: skip

    def score(self, item: "Passkey", output: str) -> dict[str, float]:
        """1 if the answer begins with the number, else 0."""
        from hshare_jax.evaluation.passkeys import is_found

        return {"found": float(is_found(item, output))}
