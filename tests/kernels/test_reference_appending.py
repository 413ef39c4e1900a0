"""Appending in plain jnp. That it equals the definition is tested beside the other implementations."""

import jax.numpy as jnp
import numpy as np
import pytest

from hshare_jax.kernels import reference_appending
from hshare_jax.kernels.labels import make_labels


@pytest.mark.parametrize("bits", [4, 8, None])
def test_a_label_is_written_for_tpus_as_for_other_machines(bits: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    keys = jnp.asarray(rng.standard_normal((5, 2, 8, 6)), jnp.float32)
    k = jnp.asarray(rng.standard_normal((5, 1, 2, 6)), jnp.float32)
    channels = jnp.asarray(np.tile([1, 0, 5], (5, 3, 2, 1)))
    slots = jnp.asarray([[0], [5], [7], [8], [-1]])  # the last two lie outside the cache
    labels = make_labels(keys, channels[:, 1], bits)
    written = []
    for platform in ("cpu", "tpu"):
        monkeypatch.setattr(reference_appending, "traced_platform", lambda platform=platform: platform)
        written.append(reference_appending.append_labels(labels, 1, k, channels, slots, bits=bits))
    for one, other in ((written[0].codes, written[1].codes), (written[0].scales, written[1].scales)):
        np.testing.assert_array_equal(one, other)
