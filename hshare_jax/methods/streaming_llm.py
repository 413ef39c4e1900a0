"""StreamingLLM: the first tokens and the last ones (Xiao et al., ICLR 2024, arXiv 2309.17453)."""

import dataclasses

import jax.numpy as jnp
from jax import Array
from jaxtyping import Int

from hshare_jax.methods.listed import ListMethod


@dataclasses.dataclass(frozen=True)
class StreamingLLM(ListMethod):
    """Reads `num_sinks` first and `num_recent` last tokens (section 3.2); both keep their original positions.

    The paper moves positions together, so that the text may outgrow the model; here it may not, and they stay.
    Defaults are the paper's 4 sinks and a total of 1,024.
    """

    num_sinks: int = 4
    num_recent: int = 1020

    def max_recent(self, capacity: int) -> int:
        """Returns a bound on the recent range."""
        return self.num_recent

    def recent_start(self, lengths: Int[Array, "B"], prompt_lengths: Int[Array, "B"]) -> Int[Array, "B"]:
        """Returns where the recent range starts."""
        return jnp.maximum(lengths - self.num_recent, 0)
