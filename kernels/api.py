"""The operations on the KV cache: appending, decode attention, the choice of critical tokens, and prefill attention.

Each operation of a decode step has several implementations, and `impl` names one:

    auto              the fastest one for the platform that the program is lowered for
    pallas            Pallas kernels through Triton, on NVIDIA GPUs
    native            a library of C++ kernels, on CPUs, if a compiler was there when the package was installed;
                      prefill attention is the reference's where the CPU has no AMX
    reference         plain jnp, on every machine; it is the definition, and the only one that can be differentiated
    interpret         the Pallas kernels in Pallas' interpreter, slowly, on every machine; for tests
    triton            kernels in Triton, through jax-triton, on NVIDIA GPUs; for the day when Pallas drops Triton
    triton-interpret  the Triton kernels in Triton's interpreter, slowly, on every machine; for tests

A name that cannot run where the program runs raises `SettingError`. Code outside this folder calls these functions and
imports no implementation.
"""

from typing import Any

import jax
from jax import Array
from jax.experimental import checkify
from jaxtyping import Bool, Float, Int

from hshare_jax.kernels.block_weights import Weights
from hshare_jax.kernels.implementations import IMPLS, Implementation, check_impl, describe, run
from hshare_jax.kernels.int8_rows import Rows, as_cached
from hshare_jax.kernels.labels import Labels
from hshare_jax.kernels.tail import Part, Tail
from hshare_jax.shapes import EMPTY, Lists, Source

__all__ = [
    "IMPLS",
    "append_labels",
    "append_tokens",
    "check_impl",
    "dense_decode",
    "describe",
    "prefill_attention",
    "prefill_attention_received",
    "project",
    "select_by_keys",
    "select_by_labels",
    "sparse_decode",
    "split_decode",
]


def append_tokens(
    keys: Rows,
    values: Rows,
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    slots: Int[Array, "B T"],
    *,
    impl: str = "auto",
) -> tuple[Any, Any]:
    """The keys and values of one layer's cache, with token t of row b written at slots[b, t].

    A slot outside the cache drops the write. The cache is changed in place where it is donated.

    Args:
        keys, values: the cache of one layer, as floats or in 8 bits.
        k, v: the new tokens. They take the form of the cache.
        slots: where each token goes; the slots of a row differ, but for those outside.
        impl: the implementation, as the module describes it. On a GPU this is the reference's plain jnp.
    """
    new = as_cached(keys, k), as_cached(values, v)
    return run(impl, lambda chosen: chosen.appending.append_tokens(keys, values, *new, slots))


def append_labels(
    labels: Labels,
    layer: int,
    k: Float[Array, "B T K H"],
    channels: Int[Array, "B L K R"],
    slots: Int[Array, "B T"],
    *,
    bits: int | None,
    impl: str = "auto",
) -> Labels:
    """The labels of one layer's cache, with those of new keys written at slots[b, t].

    The labels are those that `labels.make_labels` makes of the keys in the cache's dtype. A slot outside the cache
    drops the write. The labels are changed in place where they are donated.

    Args:
        labels: the labels of the layer's cache.
        layer: the layer.
        k: the new rotated keys.
        channels: the label channels of all layers.
        slots: as for `append_tokens`.
        bits: the size of a code, as for `make_labels`.
        impl: as for `append_tokens`.
    """
    new = k.astype(labels.dtype)
    return run(impl, lambda chosen: chosen.appending.append_labels(labels, layer, new, channels, slots, bits=bits))


def dense_decode(
    q: Float[Array, "B N H"],
    keys: Rows,
    values: Rows,
    lengths: Int[Array, "B"],
    *,
    window: int | None = None,
    impl: str = "auto",
) -> Float[Array, "B N H"]:
    """Attention of one query per head over the whole cache: slots [0, length), or only the last `window` slots.

    A row of length 0 returns zeros. A row longer than the cache reads the whole cache.

    Args:
        q: one rotated query per head, at position length - 1. Its key is cached already.
        keys, values: the cache of one layer. Slots that are not read may hold any finite numbers.
        lengths: cached tokens of each row, the current token included.
        window: the layer's sliding window.
        impl: the implementation, as the module describes it.
    """

    def attend(chosen: Implementation) -> Array:
        return chosen.attention.dense_decode(q, keys, values, lengths, window=window, **chosen.options)

    return run(impl, attend)


def sparse_decode(
    q: Float[Array, "B N H"],
    keys: Rows,
    values: Rows,
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
    tail: Tail | None = None,
    impl: str = "auto",
) -> Float[Array, "B N H"]:
    """Attention of one query per head over a list and two ranges. Each slot is read once.

    Head n reads list j = n * J // N. The list is found through the plan: it is `lists[f // J, b, f % J]` with
    f = source[b, layer, j]. The head attends to [0, num_sinks), to the listed tokens and to [recent_start, length).

        # num_sinks 1, list [2, 5, EMPTY], recent_start 6, length 8:  slots 0 | 2 5 | 6 7

    A row of length 0 returns zeros. Traced under `jax_enable_checks` and `checkify`, the function reports lists and
    plans that point outside the cache and the buffer of lists. A GPU would read whatever lies there.

    Args:
        q: one rotated query per head, at position length - 1. Its key is cached already.
        keys, values: the cache of one layer. Slots that are not read may hold any finite numbers.
        lists: the lists of all layers: slots in [num_sinks, recent_start), ascending, padded with EMPTY.
        source: the plan: for each list the flat id (layer * J + list) of the list that is read in its place.
        layer: the layer whose attention this is.
        lengths: cached tokens of each row, the current token included.
        recent_start: the first slot of each row's recent range.
        num_sinks: first slots that are always read.
        max_recent: a static bound on length - recent_start.
        window: the layer's sliding window. Slots outside it are not read.
        min_length: rows shorter than this read the whole cache. In the reference their result equals `dense_decode`
            bit for bit. The kernels sum in another order, so there the two agree within rounding.
        tail: what stands for the slots that a head sees and does not read; None leaves them out. Rows under
            `min_length`, and rows whose every slot is read, are as without it.
        impl: the implementation, as the module describes it.
    """
    if jax.config.jax_enable_checks:
        _check_plan(lists, source, lengths, keys.shape[2])

    def attend(chosen: Implementation) -> Array:
        return chosen.attention.sparse_decode(
            q, keys, values, lists, source, layer, lengths, recent_start,
            num_sinks=num_sinks, max_recent=max_recent, window=window, min_length=min_length, tail=tail,
            **chosen.options,
        )  # fmt: skip

    return run(impl, attend)


def split_decode(
    q: Float[Array, "B N H"],
    keys: Rows,
    values: Rows,
    listed: Int[Array, "B J C"],
    lengths: Int[Array, "B"],
    recent_start: Int[Array, "B"],
    *,
    num_sinks: int,
    window: int | None = None,
    impl: str = "auto",
) -> tuple[Part, Part]:
    """Attention of one query per head in two parts: over what `sparse_decode` reads, and over what it leaves.

        # num_sinks 1, list [2, 5], recent_start 6, length 8:  read 0 2 5 6 7, left 1 3 4

    Args:
        q, keys, values, recent_start, num_sinks, window: as for `sparse_decode`.
        listed: the lists that are read, found through the plan.
        lengths: where the slots that a row sees end.
        impl: the implementation, as the module describes it. `pallas` takes the reference's plain jnp.

    Returns:
        The part that is read, and the part that is left.
    """

    def attend(chosen: Implementation) -> tuple[Part, Part]:
        arrays = q, keys, values, listed, lengths, recent_start
        return chosen.attention.split_decode(*arrays, num_sinks=num_sinks, window=window)

    return run(impl, attend)


def _check_plan(lists: Lists, source: Source, lengths: Int[Array, "B"], num_slots: int) -> None:
    """Adds checks of the plan, the lists and the lengths, for `checkify`.

    Checks are effects, and a program with effects is dispatched by Python code, which takes 10 ms for a decode step.
    """
    num_lists = lists.shape[0] * lists.shape[2]
    checkify.debug_check(
        ((source >= 0) & (source < num_lists)).all(),
        f"source must lie in [0, {num_lists}), the lists of {lists.shape[0]} layers",
    )
    checkify.debug_check(
        ((lists >= EMPTY) & (lists < num_slots)).all(), f"lists must hold slots in [0, {num_slots}) or {EMPTY}"
    )
    checkify.debug_check((lengths >= 0).all(), "lengths must be at least 0")


def select_by_labels(
    lists: Lists,
    layer: int,
    query: Float[Array, "B N R"],
    labels: Labels,
    source: Source,
    is_due: Bool[Array, "B"],
    first: Int[Array, "B"],
    last: Int[Array, "B"],
    num_allowed: Int[Array, "B"] | None,
    *,
    dilate: bool = False,
    impl: str = "auto",
) -> Lists:
    """The lists of all layers, after one layer's lists are chosen anew by the scores of labels.

    A list is chosen if its row is due and the plan lets the list read itself. All other lists stay as they are. Among
    the slots that compete, a list takes those with the highest weights, ascending, padded with EMPTY; ties go to the
    lower slot. If the list serves one query head, the weight of a slot is its score. If the list serves several heads,
    the weight is the sum of their scores, each head's softmaxed over the slots that compete.

    A layer in which no list is chosen computes nothing in the reference. On a GPU it costs a few launches that return
    at once.

    Args:
        lists: the lists of all layers.
        layer: the layer whose lists are chosen.
        query: the scaled queries on their label channels, from `labels.label_query`, in float32.
        labels: the labels of the layer's cache.
        source: the plan: for each list the flat id (layer * J + list) of the list that is read in its place.
        is_due: the rows that choose.
        first, last: the slots [first, last) of each row compete.
        num_allowed: how many slots a list of each row may hold; None allows all C places.
        dilate: whether a slot weighs at least as much as the competing slot before it.
        impl: the implementation, as the module describes it.
    """

    def select(chosen: Implementation) -> Lists:
        return chosen.selection.select_by_labels(
            lists, layer, query, labels, source, is_due, first, last, num_allowed, dilate=dilate, **chosen.options
        )

    return run(impl, select)


def select_by_keys(
    lists: Lists,
    layer: int,
    q: Float[Array, "B N H"],
    keys: Rows,
    source: Source,
    is_due: Bool[Array, "B"],
    first: Int[Array, "B"],
    last: Int[Array, "B"],
    num_allowed: Int[Array, "B"] | None,
    *,
    dilate: bool = False,
    impl: str = "auto",
) -> Lists:
    """The lists of all layers, after one layer's lists are chosen anew by exact scores, on all channels of the keys.

    Lists are chosen as in `select_by_labels`. On a GPU this computes the scores of the whole cache even if no list is
    chosen.

    Args:
        q: one rotated query per head.
        keys: the cache of the layer.
        lists, layer, source, is_due, first, last, num_allowed, dilate, impl: as for `select_by_labels`.
    """

    def select(chosen: Implementation) -> Lists:
        return chosen.selection.select_by_keys(
            lists, layer, q, keys, source, is_due, first, last, num_allowed, dilate=dilate, **chosen.options
        )

    return run(impl, select)


def project(weight: Weights, x: Float[Array, "*rows D"], *, impl: str = "auto") -> Float[Array, "*rows out"]:
    """The projection x @ weight.T.

    Args:
        weight: a matrix [out, D], of floats or in few bits (`BlockWeights`).
        x: rows in the dtype that the model computes in.
        impl: the implementation, as the module describes it. Only `reference` can be differentiated.
    """
    return run(impl, lambda chosen: chosen.projection.project(weight, x))


def prefill_attention(
    q: Float[Array, "B T N H"],
    keys: Rows,
    values: Rows,
    starts: Int[Array, "B"],
    *,
    window: int | None = None,
    impl: str = "auto",
) -> Float[Array, "B T N H"]:
    """Causal attention of T new tokens per row over the cache, which holds their keys and values already.

    Token t of row b stands at position starts[b] + t. It sees the slots up to that one, or only the last `window`
    slots.

    Args:
        q: rotated queries of the new tokens.
        keys, values: the cache of one layer. Slots that are not read may hold any finite numbers.
        starts: the position of each row's first new token. A token at position -1 sees nothing, and its result means
            nothing.
        window: the layer's sliding window.
        impl: the implementation, as the module describes it.
    """

    def attend(chosen: Implementation) -> Array:
        return chosen.prefill.prefill_attention(q, keys, values, starts, window=window, **chosen.options)[0]

    return run(impl, attend)


def prefill_attention_received(
    q: Float[Array, "B T N H"],
    keys: Rows,
    values: Rows,
    starts: Int[Array, "B"],
    is_counted: Bool[Array, "B T"],
    *,
    window: int | None = None,
    impl: str = "auto",
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N S"]]:
    """The result of `prefill_attention`, and the attention probabilities that each slot receives, in float32.

    The probabilities are summed over the new tokens that are counted.

    Args:
        q, keys, values, starts, window, impl: as for `prefill_attention`.
        is_counted: the tokens whose attention counts; padding is left out.
    """

    def attend(chosen: Implementation) -> tuple[Array, Array]:
        how = {"window": window, **chosen.options}
        out, log_total = chosen.prefill.prefill_attention(q, keys, values, starts, **how)
        return out, chosen.prefill.received_attention(q, keys, starts, is_counted, log_total, **how)

    return run(impl, attend)
