"""SnapKV: tokens that the prompt's last queries attend to, chosen once (Li et al., 2024, arXiv 2404.14469)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Int

from hshare_jax.errors import SettingError
from hshare_jax.kernels.int8_rows import row_floats
from hshare_jax.kernels.masked_softmax import MASKED
from hshare_jax.kernels.top_k import select_tokens
from hshare_jax.methods.listed import ListMethod, PromptLayer, sum_over_lists


@dataclasses.dataclass(frozen=True)
class SnapKV(ListMethod):
    """Reads `num_critical` tokens of the prompt, its last `num_observed`, and all generated tokens (section 4).

    Tokens are chosen once, after the prefill, by the attention of the last `num_observed` queries, summed and averaged
    over `kernel_size` neighbours (the published code's defaults: 32 queries, kernel 5, 2,048 tokens in all). The number
    of tokens read therefore grows with the answer. `keeps_generated=False` reads a fixed number of last tokens instead.
    """

    num_critical: int = 2016
    num_observed: int = 32
    kernel_size: int = 5
    keeps_generated: bool = True
    max_new_tokens: int | None = None  # how long an answer may grow; None: to the end of the cache

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kernel_size % 2 == 0:
            rule = "must be odd, so that there are as many neighbours on either side"
            raise SettingError("kernel_size", self.kernel_size, rule)

    @property
    def list_size(self) -> int:
        """Tokens that are chosen among those before the prompt's last ones."""
        return self.num_critical

    def max_recent(self, capacity: int) -> int:
        """A bound on the length of the recent range."""
        if not self.keeps_generated:
            return self.num_observed
        return capacity if self.max_new_tokens is None else self.num_observed + self.max_new_tokens

    def recent_start(self, lengths: Int[Array, "B"], prompt_lengths: Int[Array, "B"]) -> Int[Array, "B"]:
        """The first slot of the recent range: the prompt's last tokens, or a fixed number of tokens from the end."""
        if not self.keeps_generated:
            return jnp.maximum(lengths - self.num_observed, 0)
        start = jnp.maximum(prompt_lengths - self.num_observed, 0)
        if (
            self.max_new_tokens is not None
        ):  # the range of an answer that outgrows its room slides, so that a token reads itself
            start = jnp.maximum(start, lengths - self.num_observed - self.max_new_tokens)
        return start

    def probe_positions(self, starts: Int[Array, "B"], lengths: Int[Array, "B"], num_tokens: int) -> Int[Array, "B P"]:
        """Positions of the last queries of each prompt."""
        positions = lengths[:, None] - self.num_observed + jnp.arange(self.num_observed, dtype=jnp.int32)[None, :]
        return jnp.where(positions >= starts[:, None], positions, -1)

    def list_prompt(self, prompt: PromptLayer, memory: Any) -> tuple[Int[Array, "B J C"], Any]:
        """The tokens that the last queries attend to; there is no memory."""
        (B, P, N, H), (_, K, S, _) = prompt.queries.shape, prompt.keys.shape
        grouped = prompt.queries.reshape(B, P, K, N // K, H)
        keys = row_floats(prompt.keys)
        scores = jnp.einsum("BPKGH,BKSH->BKGPS", grouped, keys, preferred_element_type=jnp.float32) * H**-0.5
        slots, last_seen = jnp.arange(S)[None, None, :], prompt.last_seen[:, :, None]
        is_visible = slots <= last_seen
        if prompt.window is not None:
            is_visible &= slots > last_seen - prompt.window
        weights = jax.nn.softmax(jnp.where(is_visible[:, None, None], scores, MASKED), axis=-1)
        is_probe = (prompt.last_seen >= 0)[:, None, None, :, None]
        observed = jnp.where(is_probe, weights, 0).sum(axis=3).reshape(B, N, S)
        is_candidate = (slots[0] >= self.num_sinks) & (slots[0] < prompt.recent_start[:, None])
        # As published, the prefix is pooled alone: the last tokens count as zeros for their neighbours.
        observed = jnp.where((slots[0] < prompt.recent_start[:, None])[:, None], observed, 0)
        side = self.kernel_size // 2
        pooled = lax.reduce_window(
            observed, 0.0, lax.add, (1, 1, self.kernel_size), (1, 1, 1), ((0, 0), (0, 0), (side, side))
        )
        return select_tokens(sum_over_lists(pooled, prompt.num_lists), is_candidate, self.num_critical), memory
