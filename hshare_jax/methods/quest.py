"""Quest: whole pages of tokens, chosen by a bound on the scores in them (Tang et al., 2024, arXiv 2406.10774)."""

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from hshare_jax.kernels.api import append_tokens
from hshare_jax.kernels.int8_rows import row_floats
from hshare_jax.kernels.top_k import select_tokens
from hshare_jax.kv_cache import KVCache
from hshare_jax.methods.listed import ListMethod, PromptLayer, StepLayer, sum_over_lists
from hshare_jax.models.config import ModelConfig
from hshare_jax.shapes import EMPTY


@dataclasses.dataclass(frozen=True)
class Quest(ListMethod):
    """Reads the page that is being filled and the `num_pages` best other pages (section 3.3, Algorithm 1).

    A page keeps each channel's smallest and greatest key. The page's score is the sum over channels of the greater of
    q x smallest and q x greatest. As published, the first two layers are dense, and sinks and recent tokens get no
    place of their own; `num_sinks` and `num_recent` give them one. Pages hold 16 tokens; the default reads 1,024.
    """

    dense_layers: int = 2
    num_pages: int = 63
    page_size: int = 16
    num_recent: int = 1  # last tokens always read; at least the page that is being filled

    may_be_zero: ClassVar[tuple[str, ...]] = ("num_pages",)

    @property
    def list_size(self) -> int:
        """The tokens of the chosen pages."""
        return max(self.num_pages * self.page_size, 1)

    def max_recent(self, capacity: int) -> int:
        """A bound on the length of the recent range."""
        return max(self.num_recent, self.page_size)

    def recent_start(self, lengths: Int[Array, "B"], prompt_lengths: Int[Array, "B"]) -> Int[Array, "B"]:
        """The first slot of the recent range."""
        page = jnp.maximum(lengths - 1, 0) // self.page_size * self.page_size
        return jnp.maximum(jnp.minimum(page, lengths - self.num_recent), 0)

    def start_memory(self, cache: KVCache, config: ModelConfig) -> tuple[Array, Array]:
        """The smallest and the greatest keys of all pages [B, K, pages, H]; no page is filled yet."""
        B, K, S, H = cache.keys[0].shape
        pages = jnp.zeros((B, K, -(-S // self.page_size), H), cache.keys[0].dtype)
        return pages, jnp.zeros_like(pages)  # two buffers, because a step donates both

    def list_prompt(self, prompt: PromptLayer, memory: tuple[Array, Array]) -> tuple[Int[Array, "B J C"], Any]:
        """Empty lists, and the pages of the prompt."""
        B, K, S, H = prompt.keys.shape
        pages = memory[0].shape[2]
        padded = jnp.pad(row_floats(prompt.keys), ((0, 0), (0, 0), (0, pages * self.page_size - S), (0, 0)))
        is_filled = jnp.arange(pages * self.page_size)[None, None, :, None] < prompt.lengths[:, None, None, None]
        most = jnp.finfo(padded.dtype).max
        least, greatest = (
            pick(jnp.where(is_filled, padded, none).reshape(B, K, pages, self.page_size, H), axis=3)
            for pick, none in ((jnp.min, most), (jnp.max, -most))
        )
        return super().list_prompt(prompt, None)[0], (least, greatest)

    def list_step(
        self, step: StepLayer, lists: Int[Array, "B J C"], memory: tuple[Array, Array]
    ) -> tuple[Int[Array, "B J C"], Any]:
        """The tokens of the best pages, and the pages with the new key in them."""
        pages = _append_to_page(memory, step, self.page_size)
        if self.num_pages == 0:
            return lists, pages
        first = jnp.full_like(step.lengths, self.num_sinks)
        if step.window is not None:
            first = jnp.maximum(first, step.lengths - step.window)
        last = step.recent_start
        starts = jnp.arange(pages[0].shape[2])[None, :] * self.page_size
        is_candidate = (starts + self.page_size > first[:, None]) & (starts < last[:, None])
        scores = sum_over_lists(score_pages(step.q, *pages), lists.shape[1])
        chosen = select_tokens(scores, is_candidate, self.num_pages)
        tokens = chosen[..., None] * self.page_size + jnp.arange(self.page_size)[None, None, None, :]
        is_listed = (chosen != EMPTY)[..., None] & (tokens >= first[:, None, None, None])
        is_listed &= tokens < last[:, None, None, None]
        return jnp.where(is_listed, tokens, EMPTY).reshape(lists.shape), pages


def score_pages(
    q: Float[Array, "B N H"], least: Float[Array, "B K pages H"], greatest: Float[Array, "B K pages H"]
) -> Float[Array, "B N pages"]:
    """The sum over channels of max(q x least, q x greatest). No key of the page can score higher."""
    (B, N, H), K = q.shape, least.shape[1]
    grouped = q.reshape(B, K, N // K, H)
    upper, lower = (
        jnp.einsum("BKGH,BKPH->BKGP", half, keys, preferred_element_type=jnp.float32)
        for half, keys in ((jnp.maximum(grouped, 0), greatest), (jnp.minimum(grouped, 0), least))
    )
    return (upper + lower).reshape(B, N, -1)


def _append_to_page(pages: tuple[Array, Array], step: StepLayer, page_size: int) -> tuple[Array, Array]:
    """The pages with a new key in them. The first key of a page replaces the page's old content."""
    k, slots, is_written = step.k, step.slots, step.slots < step.keys.shape[2]
    page = jnp.where(is_written, slots // page_size, pages[0].shape[2])  # beyond the last page for an idle row
    is_first = (slots % page_size == 0)[:, :, None, None]
    rows = jnp.arange(k.shape[0])[:, None]
    old = (array[rows, :, jnp.minimum(page, array.shape[2] - 1)] for array in pages)  # [B, 1, K, H]
    least, greatest = (
        jnp.where(is_first, k, pick(held, k)) for held, pick in zip(old, (jnp.minimum, jnp.maximum), strict=True)
    )
    return append_tokens(*pages, least, greatest, page, impl=step.impl)
