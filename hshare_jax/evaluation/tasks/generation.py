"""Tasks whose items are prompts: every method continues each prompt greedily, and the text is scored."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from hshare_jax.evaluation.run import in_batches, unfinished
from hshare_jax.evaluation.tasks.base import Task, tokenizer_of
from hshare_jax.evaluation.tasks.examples import DataError, Example, FileError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from hshare_jax.files.records import Records
    from hshare_jax.methods.base import Method
    from hshare_jax.models.pretrained import Model, ModelFiles


@dataclasses.dataclass(frozen=True)
class GenerationTask(Task[list[Example], Example]):
    """A task that scores the text with which a method continues a prompt. A subclass has `read` and `score`."""

    has_examples = True

    def fit(
        self, model: "Model | ModelFiles", data: list[Example], *, skip_bad: bool = False
    ) -> tuple[list[Example], int]:
        """The examples with the token ids of their prompts, and how many were left out; see `Task.fit`."""
        fitting, num_long = [], 0
        for example in data:
            try:
                fitting.append(dataclasses.replace(example, tokens=self._encode(model, example)))
            except DataError:
                if not skip_bad:
                    raise
                num_long += 1
        if not fitting:
            raise FileError(f"no example is left: all {num_long} prompts are too long for the model")
        return fitting, num_long

    def _encode(self, model: "Model | ModelFiles", example: Example) -> tuple[int, ...]:
        tokenizer, positions = tokenizer_of(model), model.config.max_positions
        room = positions - example.max_new_tokens
        if room < 1:
            raise DataError(
                f"{example.id}: max_new_tokens={example.max_new_tokens} of {example.task} must be below the model's "
                f"{positions} positions"
            )
        tokens = encode_prompt(tokenizer, example)
        if len(tokens) > room:
            tokens = self.shorten(tokenizer, example, room)
        if len(tokens) > room:
            raise DataError(
                f"{example.id}: the prompt has {len(tokens)} tokens; with max_new_tokens={example.max_new_tokens} the "
                f"model's {positions} positions leave room for {room}"
            )
        return tuple(map(int, tokens))

    def shorten(self, tokenizer: "PreTrainedTokenizerBase", example: Example, room: int) -> list[int]:
        """The token ids of a prompt that is too long for `room` tokens. Here they stay whole; a task may cut them."""
        return encode_prompt(tokenizer, example)

    def sizes(self, items: Sequence[Example]) -> list[tuple[int, int]]:
        """The tokens of each prompt, and the tokens with the longest answer."""
        return [(len(example.tokens), len(example.tokens) + example.max_new_tokens) for example in items]

    def run(
        self,
        model: "Model",
        items: Sequence[Example],
        methods: "Mapping[str, Method | None]",
        records: "Records",
        *,
        batch_size: int,
        impl: str = "auto",
    ) -> None:
        """Lets every method answer every prompt; see `Task.run`."""
        from hshare_jax.generate import generate

        batches = _in_batches_alike(items, batch_size)
        for name, method, batch in unfinished(methods, batches, records):
            result = generate(
                model, [example.tokens for example in batch],
                max_new_tokens=batch[0].max_new_tokens, method=method, stop=batch[0].stop, impl=impl,
            )  # fmt: skip
            rows = zip(batch, result.texts, result.tokens, result.usage.reads, strict=True)
            for example, text, tokens, reads in rows:
                line = {
                    "id": example.id, "method": name, "task": example.task, "text": text,
                    "prompt_tokens": len(example.tokens), "new_tokens": len(tokens),
                }  # fmt: skip
                if reads:  # a row that ended with the token of the prefill has read nothing
                    line["reads"] = round(reads, 1)
                records.append(line | {"scores": self.score(example, text)})


def encode_prompt(tokenizer: "PreTrainedTokenizerBase", example: Example) -> list[int]:
    """Token ids of an example's prompt, in the tokenizer's chat template if the example wants one and there is one."""
    from hshare_jax.prompts import encode_chat, tokenize

    if has_template(tokenizer, example):
        return encode_chat(tokenizer, [{"role": "user", "content": example.prompt}])
    return tokenize(tokenizer, example.prompt, name=example.id)


def has_template(tokenizer: "PreTrainedTokenizerBase", example: Example) -> bool:
    """Whether the prompt is put into a chat template."""
    return example.wants_chat and bool(tokenizer.chat_template)


def _in_batches_alike(examples: Sequence[Example], batch_size: int) -> list[list[Example]]:
    """Batches of examples of similar length. All rows of a batch have the same limit and stop strings."""

    def limits(example: Example) -> tuple[int, tuple[str, ...]]:
        return example.max_new_tokens, example.stop

    by_size = sorted(examples, key=lambda example: (limits(example), len(example.tokens)))
    batches = []
    for _, alike in itertools.groupby(by_size, key=limits):
        batches += in_batches(list(alike), batch_size)
    return batches
