"""Which implementation runs: the Pallas kernels on NVIDIA GPUs, plain jnp everywhere else, or what the caller names.

Everything that knows Pallas' Triton backend lies in this folder behind these functions.
"""

from collections.abc import Callable
from typing import TypeVar

import jax
from jax import Array, lax
from jax.experimental import checkify
from jaxtyping import Float, Int

from hshare_jax.kernels import pallas_attention, reference_attention
from hshare_jax.kernels.prefill_attention import can_fuse_prefill, fused_prefill
from hshare_jax.shapes import Lists, Source

IMPLS = ("auto", "pallas", "reference", "interpret")
Result = TypeVar("Result")


def check_impl(impl: str) -> None:
    """Raises ValueError for a name that is none, and for `pallas` where jax's default device is no GPU."""
    if impl not in IMPLS:
        raise ValueError(f"impl={impl!r} must be one of {', '.join(map(repr, IMPLS))}")
    platform = _platform()
    if impl == "pallas" and platform not in ("gpu", "cuda"):
        raise ValueError(
            f"impl='pallas' runs on NVIDIA GPUs, and this program is for {platform}: leave it 'auto', or use "
            "'interpret' to try the kernels, slowly"
        )


def dispatch(impl: str, *, pallas: Callable[[bool], Result], plain: Callable[[], Result]) -> Result:
    """Returns what the chosen implementation gives.

    Args:
        impl: `auto` takes the kernels where the program is lowered for CUDA, plain jnp elsewhere. `pallas` and
            `reference` are these two; `interpret` runs the kernels in Pallas' interpreter on any machine, for tests.
            Only `reference` can be differentiated.
        pallas: called with whether to interpret.
        plain: the definition.

    Raises:
        ValueError: as `check_impl`.
    """
    check_impl(impl)
    if impl == "auto" and _platform() != "cpu":
        return lax.platform_dependent(cuda=lambda: pallas(False), default=plain)
    # Known to be for the CPU: the kernels need not be traced.
    return plain() if impl in ("auto", "reference") else pallas(impl == "interpret")


def _platform() -> str:
    """Returns what is traced for, as far as that is known: the mesh's device, or jax's default one."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def dense_decode(
    q: Float[Array, "B N H"],
    keys: Float[Array, "B K S H"],
    values: Float[Array, "B K S H"],
    lengths: Int[Array, "B"],
    *,
    window: int | None = None,
    impl: str = "auto",
) -> Float[Array, "B N H"]:
    """Returns attention over the whole cache: see `reference_attention.dense_decode`; and for `impl`, `dispatch`."""
    return dispatch(
        impl,
        pallas=lambda interpret: pallas_attention.dense_decode(
            q, keys, values, lengths, window=window, interpret=interpret
        ),
        plain=lambda: reference_attention.dense_decode(q, keys, values, lengths, window=window),
    )


def sparse_decode(
    q: Float[Array, "B N H"],
    keys: Float[Array, "B K S H"],
    values: Float[Array, "B K S H"],
    lists: Lists,
    source: Source,
    layer: int,
    lengths: Int[Array, "B"],
    recent_start: Int[Array, "B"],
    *,
    num_sinks: int,
    max_recent: int,
    window: int | None = None,
    min_length: int = 0,
    impl: str = "auto",
) -> Float[Array, "B N H"]:
    """Returns attention through the plan: see `reference_attention.sparse_decode`; and for `impl`, `dispatch`.

    Transformed by `checkify`, it reports lists and plans that point outside the cache and the buffer; a GPU would read
    whatever lies there.
    """
    S, (L, _, J, _) = keys.shape[2], lists.shape
    checkify.debug_check(
        ((source >= 0) & (source < L * J)).all(), f"source must lie in [0, {L * J}), the lists of {L} layers"
    )
    checkify.debug_check(
        ((lists >= reference_attention.EMPTY) & (lists < S)).all(),
        f"lists must hold slots in [0, {S}) or {reference_attention.EMPTY}",
    )
    checkify.debug_check((lengths >= 0).all(), "lengths must be at least 0")
    arrays = (q, keys, values, lists, source, layer, lengths, recent_start)
    settings = {"num_sinks": num_sinks, "max_recent": max_recent, "window": window, "min_length": min_length}
    return dispatch(
        impl,
        pallas=lambda interpret: pallas_attention.sparse_decode(*arrays, **settings, interpret=interpret),
        plain=lambda: reference_attention.sparse_decode(*arrays, **settings),
    )


def prefill_attention(
    q: Float[Array, "B T N H"],
    keys: Float[Array, "B K S H"],
    values: Float[Array, "B K S H"],
    starts: Int[Array, "B"],
    *,
    window: int | None = None,
) -> Float[Array, "B T N H"]:
    """Returns causal attention over the cache: see `reference_attention.prefill_attention`; by cuDNN where that can be."""

    def plain() -> Array:
        return reference_attention.prefill_attention(q, keys, values, starts, window=window)[0]

    if not can_fuse_prefill(q, keys, window):
        return plain()
    return lax.platform_dependent(cuda=lambda: fused_prefill(q, keys, values, starts), default=plain)
