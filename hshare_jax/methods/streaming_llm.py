"""StreamingLLM: the first and the last tokens (Xiao et al., ICLR 2024, arXiv 2309.17453)."""

import dataclasses

import jax.numpy as jnp
from jax import Array
from jaxtyping import Int

from hshare_jax.methods.listed import ListMethod


@dataclasses.dataclass(frozen=True)
class StreamingLLM(ListMethod):
    """Reads the first `num_sinks` and the last `num_recent` tokens (section 3.2).

    Tokens keep their original positions. The paper renumbers them, so that a text may outgrow the model; here it may
    not. The defaults are the paper's 4 sinks and 1,024 tokens in all.
    """

    num_sinks: int = 4
    num_recent: int = 1020

    def max_recent(self, capacity: int) -> int:
        """A bound on the length of the recent range."""
        return self.num_recent

    def recent_start(self, lengths: Int[Array, "B"], prompt_lengths: Int[Array, "B"]) -> Int[Array, "B"]:
        """The first slot of the recent range."""
        return jnp.maximum(lengths - self.num_recent, 0)
