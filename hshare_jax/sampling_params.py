"""The parameters of sampling. Nothing here imports jax, so that the command line starts quickly."""

import dataclasses
import math
import numbers

from hshare_jax.errors import SettingError, setting


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How the next token is drawn. Names and order are as in transformers. The default is greedy.

    Raises:
        SettingError: a value outside its range.
    """

    temperature: float = setting(0.0, "sharpness of the distribution; 0 is greedy")
    top_k: int = setting(0, "keep this many of the most probable tokens; 0 keeps all")
    top_p: float = setting(1.0, "then keep the fewest tokens that hold this probability; 1 keeps all")
    min_p: float = setting(0.0, "then drop tokens below this fraction of the top token's probability; 0 keeps all")
    # arXiv 1909.05858, section 4.1; it comes before all else.
    repetition_penalty: float = setting(1.0, "make tokens that were seen less likely; 1 is no penalty")

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
            value = getattr(self, name)
            if not isinstance(value, numbers.Real) or isinstance(value, bool):
                raise SettingError(name, value, "must be a number")
        if not 0 <= self.temperature < math.inf:
            raise SettingError("temperature", self.temperature, "must be at least 0 (0 is greedy), and finite")
        if not isinstance(self.top_k, int) or isinstance(self.top_k, bool):
            raise SettingError("top_k", self.top_k, "must be a whole number")
        if self.top_k < 0:
            raise SettingError("top_k", self.top_k, "must be at least 0 (0 keeps all)")
        if not 0 < self.top_p <= 1:
            raise SettingError("top_p", self.top_p, "must lie in (0, 1] (1 keeps all)")
        if not 0 <= self.min_p <= 1:
            raise SettingError("min_p", self.min_p, "must lie in [0, 1] (0 keeps all)")
        if not 0 < self.repetition_penalty < math.inf:
            raise SettingError("repetition_penalty", self.repetition_penalty, "must be above 0 (1 is none), and finite")
