"""Windows of texts, scored by decode steps: a method's likelihood, and its distance from dense decoding."""

import dataclasses
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np
from jax import Array

from hshare_jax.decode_state import DecodeState
from hshare_jax.errors import SettingError, check_whole
from hshare_jax.evaluation.prefilled import Prefilled, prefill_for
from hshare_jax.evaluation.teacher_forcing import forced_logits, score_text
from hshare_jax.methods.base import Method
from hshare_jax.models.pretrained import Model, ModelFiles
from hshare_jax.prompts import encode_text

RECALL_EVERY = 13  # a prime, so that steps that choose and steps that reuse are measured alike


@dataclasses.dataclass(frozen=True)
class Window:
    """A stretch of a text, whose last tokens are scored by decode steps."""

    id: str  # the text's name and the token that the window starts at
    tokens: tuple[int, ...]  # one more than the context, because the last token is only predicted


def cut_windows(
    model: Model | ModelFiles, name: str, text: str, *, context: int, count: int | None, skip: float = 0.0
) -> list[Window]:
    """Windows of `context` + 1 tokens of a text, evenly spread over the part after the share `skip`.

    With a `count` the last window ends well before the text does, because a book often ends in a licence.

    Args:
        model: its tokenizer reads the text.
        name: the text's name, for the ids of the windows.
        text: the text.
        context: tokens that the last step of a window reads.
        count: number of windows, which overlap where the text is short. None takes as many as fit without overlap.
        skip: share of the text that is left out at its beginning: title pages, licences.

    Raises:
        ValueError: a count below 1, a context beyond the model's positions, or a text too short for so many windows.
    """
    if model.tokenizer is None:
        raise ValueError(f"{model.name} has no tokenizer, so text cannot be given to it")
    if not 2 <= context <= model.config.max_positions:
        rule = f"must lie between 2 and the model's {model.config.positions_told}"
        raise SettingError("context", context, rule)
    if count is not None and count < 1:
        raise SettingError("count", count, "must be at least 1, or None for all that fit")
    ids, prefix = encode_text(model.tokenizer, text)
    first, size = int(len(ids) * skip), context + 1 - len(prefix)
    room = len(ids) - first - size
    if room < 0:
        rule = f"must be less than the {len(ids) - first} tokens that {name} has to cut from"
        raise SettingError("context", context, rule)
    most = (len(ids) - first) // size
    if count is not None and count > max(room, 1):
        rule = f"must be at most {max(room, 1)}: {name} has no more windows that differ"
        raise SettingError("count", count, rule)
    starts = [first + (size * index if count is None else room * index // count) for index in range(count or most)]
    return [Window(f"{name}:{start}", (*prefix, *map(int, ids[start : start + size]))) for start in starts]


class Scorer:
    """A batch of windows of one length, prefilled once, on which methods are scored."""

    def __init__(
        self,
        model: Model,
        windows: Sequence[Window],
        steps: int,
        methods: Sequence[Method | None],
        *,
        impl: str = "auto",
        progress: Callable[[int], object] | None = None,
    ) -> None:
        """Prefills all but the last `steps` tokens of each window, and decodes these densely, as the reference."""
        self.windows, self.steps, self.methods = windows, steps, methods
        self._model, self._impl = model, impl
        check_whole("steps", steps, 1)
        tokens = jnp.asarray([window.tokens for window in windows], jnp.int32)
        length = tokens.shape[1] - 1 - steps
        if length < 1:
            rule = f"must be less than the windows' {length + steps} tokens of context"
            raise SettingError("steps", steps, rule)
        lengths = jnp.full((len(windows),), length, jnp.int32)
        self.prefilled: Prefilled = prefill_for(
            model, tokens[:, :length], lengths, length + steps, methods, progress=progress, impl=impl
        )
        self._scored = tokens[:, length:]
        state = self.prefilled.start(None)
        given = {"config": model.config, "impl": impl}
        self._reference, state = forced_logits(model.params, self._scored[:, :-1], state, **given)
        self.prefilled.take_back(state)

    def score(self, method: Method | None, *, recall_every: int | None = RECALL_EVERY) -> dict[str, np.ndarray]:
        """Scores of a method, as `score_state` gives them.

        Args:
            method: one of the scorer's methods; None is dense decoding.
            recall_every: as for `score_state`.
        """
        return self.score_state(self.prefilled.start(method), method, recall_every=recall_every)

    def score_state(
        self, state: DecodeState, method: Method | None, *, recall_every: int | None = RECALL_EVERY
    ) -> dict[str, np.ndarray]:
        """Scores of every step by name, each [B, T].

        The names are `loss` (nats), `divergence` (KL from dense decoding, nats), `agrees` (0 or 1), `reads` (tokens)
        and `recall` (share of the true attention mass; NaN on steps where it is not measured).

        Args:
            state: from `Prefilled.start`; the scorer takes it back.
            method: the state's method.
            recall_every: recall is measured on the first of so many steps; None never measures it. A multiple of the
                refresh interval would look only at steps that have just chosen.
        """
        scores, state = score_text(
            self._model.params, self._scored, state,
            config=self._model.config, method=method, reference=self._reference, impl=self._impl,
            recall_every=recall_every,
        )  # fmt: skip
        self.prefilled.take_back(state)
        recall = np.full((len(self.windows), self.steps), np.nan) if recall_every is None else _by_row(scores.observed)
        return {
            "loss": _by_row(scores.loss),
            "divergence": _by_row(scores.divergence),
            "agrees": _by_row(scores.agrees),
            "reads": _by_row(scores.reads),
            "recall": recall,
        }


def _by_row(scores: Array | None) -> np.ndarray:
    return np.array(scores, np.float64).T
