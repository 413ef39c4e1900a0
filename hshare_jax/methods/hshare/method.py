"""HShare as a method: its settings, how its plan is found from a prompt, and what was found beforehand."""

import dataclasses
import functools
from collections.abc import Mapping
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh
from jaxtyping import Int

from hshare_jax.errors import SettingError
from hshare_jax.kernels.int8_rows import Rows, row_floats
from hshare_jax.kernels.labels import Labels, make_labels
from hshare_jax.kernels.tail import Tail, no_tail
from hshare_jax.kv_cache import KVCache
from hshare_jax.mesh import AnyMesh, by_parts, layout_of, layouts_alike, num_parts
from hshare_jax.methods.base import PromptQueries, identity_plan
from hshare_jax.methods.hshare.channels import check_channels, choose_channels
from hshare_jax.methods.hshare.settings import HShareSettings, PlanSearch, read_sharing_ratio
from hshare_jax.methods.hshare.share_plan import SharePlan, find_plan
from hshare_jax.methods.hshare.shared_lists import SharedLists
from hshare_jax.methods.hshare.similarity import MEASURES, LabelledPrompt, list_probes, probe_positions
from hshare_jax.methods.hshare.tail_fit import fit_tail
from hshare_jax.models.config import ModelConfig
from hshare_jax.shapes import DATA, EMPTY, Similarity, Source, round_up_coarsely

MAX_TAIL_PROBES = 64  # twice as many fit tails no better
PROBE_STEP = 64  # with all queries as probes their number rounds up, so that a longer prompt may compile nothing

SETTING_NAMES = tuple(field.name for record in (HShareSettings, PlanSearch) for field in dataclasses.fields(record))
Channels = tuple[tuple[tuple[int, ...], ...], ...]


@dataclasses.dataclass(frozen=True)
class HShare:
    """HShare (ICLR 2025): every head reads a few critical tokens, and a plan shares the lists of critical tokens.

    A `Method`: static and hashable. The defaults are the settings that docs/quality.md advises; `paper` is the paper's
    method.
    """

    settings: HShareSettings = HShareSettings()  # noqa: RUF009 (frozen)
    search: PlanSearch = PlanSearch()  # noqa: RUF009 (frozen)
    plan: SharePlan | None = dataclasses.field(
        default=None, repr=False
    )  # from `calibrate` or `load_plan`; None finds a plan for each prompt
    # Label channels of every kv head [L, K, ranks], the best first, at least as many as labels keep, from `calibrate`
    # or `load_channels`; None chooses channels for each prompt. Any array is taken, and kept as tuples.
    channels: Channels | Array | np.ndarray | None = dataclasses.field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.channels is not None:
            object.__setattr__(self, "channels", _as_tuples(np.asarray(self.channels).tolist()))
        if self.channels is not None and self.settings.scoring == "exact":
            raise ValueError("channels were given, but scoring='exact' reads keys and has no labels; leave them out")

    @classmethod
    def paper(cls) -> "HShare":
        """The method as the paper and its code have it, at the paper's 128 tokens and 7/8-3/4-1/2.

        There are two differences. Similarity is measured from `HShareSettings.first_probe` on, because lists at earlier
        positions must overlap. Labels keep 32 channels, as in the paper's code, also of heads smaller than its 128.
        """
        settings = HShareSettings(
            num_sinks=8, num_critical=88, num_recent=32,
            lists_per="query_head", dilate=False, dense_layers=0, min_length=0, tail=None,
        )  # fmt: skip
        search = PlanSearch(plan_kind="published", num_probes="all", refit_interval=None)
        return cls(settings, search).with_sharing_ratio("7/8-3/4-1/2")

    @property
    def sharing_ratio(self) -> str:
        """The fractions that choose for themselves, as the paper writes them: layer-head-query."""
        query = Fraction(1, self.settings.refresh_interval)
        return f"{self.search.layer_ratio}-{self.search.head_ratio}-{query}"

    def with_sharing_ratio(self, ratio: str) -> "HShare":
        """The same method at a ratio in the paper's notation, layer-head-query: `7/8-3/4-1/2`.

        Raises:
            SettingError: not three fractions, or a query ratio that is not one over a whole number.
        """
        layer, head, interval = read_sharing_ratio(ratio)
        return dataclasses.replace(
            self,
            settings=dataclasses.replace(self.settings, refresh_interval=interval),
            search=dataclasses.replace(self.search, layer_ratio=layer, head_ratio=head),
        )

    def with_settings(self, values: Mapping[str, object]) -> "HShare":
        """The same method with other settings, by their names in HShareSettings and PlanSearch.

        Raises:
            SettingError: a value outside its range.
            ValueError: a name that is neither in the settings nor in the search.
        """
        records = {"settings": self.settings, "search": self.search}
        names = {part: {field.name for field in dataclasses.fields(record)} for part, record in records.items()}
        if unknown := set(values).difference(*names.values()):
            raise ValueError(f"unknown settings {', '.join(sorted(unknown))}; there are {', '.join(SETTING_NAMES)}")
        changed: dict[str, Any] = {}
        for part, record in records.items():
            changes: dict[str, Any] = {name: value for name, value in values.items() if name in names[part]}
            changed[part] = dataclasses.replace(record, **changes)
        return dataclasses.replace(self, **changed)

    @property
    def wants_received(self) -> bool:
        """False: HShare does not use the attention that each slot receives."""
        return False

    @property
    def finds_plan(self) -> bool:
        """Whether a plan is found from each prompt: none is given, and the ratios ask lists to copy."""
        return self.plan is None and (self.search.layer_ratio < 1 or self.search.head_ratio < 1)

    @property
    def refit_interval(self) -> int | None:
        """Decode steps after which plan and tails are found anew, in whole refresh intervals; None for never.

        It is None also where no plan and no tail is to be found.
        """
        if self.search.refit_interval is None or not (self.finds_plan or self.settings.tail is not None):
            return None
        refresh = self.settings.refresh_interval
        return -(-self.search.refit_interval // refresh) * refresh

    def check_mesh(self, config: ModelConfig, mesh: AnyMesh) -> None:
        """Raises ValueError if a plan would let lists of different devices depend on each other."""
        if self.plan is not None:
            self.plan.check_parts(num_parts(mesh))
        elif self.search.plan_scope == "batch" and mesh.shape[DATA] > 1:
            rule = f"would find one plan for rows on {mesh.shape[DATA]} devices, which do not know each other's rows"
            raise SettingError("plan_scope", "batch", rule, "choose 'sequence', or spread heads alone")

    def start(self, config: ModelConfig, cache: KVCache) -> SharedLists:
        """The lists of an empty cache.

        Raises:
            ValueError: a plan, channels or settings that are not for this model.
        """
        settings = self.settings
        B = cache.lengths.shape[0]
        L, K = config.num_layers, config.num_kv_heads
        J, R = settings.num_lists(config), settings.num_label_channels(config)
        source, computes = identity_plan(B, L, J), np.ones(L, bool)
        if self.plan is not None:
            self.plan.check(config, settings)
            source = jnp.tile(jnp.asarray(self.plan.source, jnp.int32), (B, 1, 1))
            computes = np.asarray(self.plan.is_computed.any(axis=1))
        channels = np.tile(np.arange(R, dtype=np.int32), (L, K, 1))
        if self.channels is not None:
            of_kv_layer = [config.kv_layer(layer) for layer in range(L)]
            channels = check_channels(np.asarray(self.channels), config, R)[of_kv_layer]
        labelled = set()
        if settings.scoring == "labels":
            chooses = computes if settings.pool == 1 else np.ones(L, bool)
            labelled = {config.kv_layer(layer) for layer in range(settings.num_dense, L) if chooses[layer]}
        return SharedLists(
            token_indices=jnp.full((L, B, J, settings.num_critical), EMPTY, jnp.int32),
            pools=None if settings.pool == 1 else jnp.full((L, B, J, settings.pool_size), EMPTY, jnp.int32),
            source=source,
            channels=jnp.tile(jnp.asarray(channels), (B, 1, 1, 1)),
            labels=tuple(
                _empty_labels(keys, R, settings.label_bits) if layer in labelled else None
                for layer, keys in zip(config.kv_layers, cache.keys, strict=True)
            ),
            recent_start=jnp.zeros((B,), jnp.int32),
            age=jnp.zeros((B,), jnp.int32),
            tails=tuple(
                no_tail(B, config.num_heads, config.head_dim, settings.tail_rank, cache.keys[0].dtype)
                if settings.tail is not None and layer >= settings.num_dense
                else None
                for layer in range(L)
            ),
            settings=settings,
            plan=self.plan,
            has_channels=self.channels is not None,
        )

    def probe_positions(self, starts: Int[Array, "B"], lengths: Int[Array, "B"], num_tokens: int) -> Int[Array, "B P"]:
        """Positions of the probes that a plan and tails are found from; none if the plan is known and no tail asked.

        A ratio of 1-1-1 keeps probes too, because calibration and the plots of overlap measure them.
        """
        P = self.search.num_probes
        if P == "all":
            P = round_up_coarsely(num_tokens, PROBE_STEP)
        is_needed = self.plan is None or self.settings.tail is not None
        return probe_positions(starts, lengths, self.settings, P if is_needed else 0)

    def after_prefill(
        self,
        state: SharedLists,
        queries: PromptQueries,
        cache: KVCache,
        config: ModelConfig,
        *,
        memo: dict[Any, Any] | None = None,
        impl: str = "auto",
        mesh: Mesh | None = None,
    ) -> SharedLists:
        """The lists with labels and tails, and with channels and a plan, unless these are known beforehand.

        Args:
            state, queries, cache, config: as for `Method.after_prefill`. The state may be donated.
            memo: keeps what does not depend on how many lists are shared: labels, similarity, the probes' lists. It
                holds only the last ones, because labels are large.
            impl, mesh: as for `Method.after_prefill`.
        """
        settings, search = self.settings, self.search
        finds_plan = self.finds_plan and search.shares_lists(settings, config)
        similarity = search.similarity if finds_plan else None
        key = settings, similarity, search.num_probes, self.plan, self.channels
        found = None if memo is None else memo.get(key)
        if found is None:
            found = measure_prompt(state, queries, cache, config=config, similarity=similarity, impl=impl, mesh=mesh)
        lists = found.lists
        if memo is not None:
            memo.clear()
            memo[key] = found
            # Copies, because decode steps donate the state.
            lists = jax.tree.map(lambda array: jnp.array(array, copy=True), lists)
        if finds_plan:
            source = plan_from(found.similarity, config=config, settings=settings, search=search, mesh=mesh)
            lists = dataclasses.replace(lists, source=source)
        if settings.tail is None:
            return lists
        return dataclasses.replace(lists, tails=_fit_tails(lists, found.listed, queries, cache, config, impl, mesh))


def _as_tuples(values: Any) -> Any:
    return tuple(map(_as_tuples, values)) if isinstance(values, list) else values


def _empty_labels(keys: Rows, num_channels: int, bits: int | None) -> Labels:
    codes, scales = (
        None if shape is None else jnp.zeros(shape.shape, shape.dtype)
        for shape in _label_shapes(keys.shape, keys.dtype, num_channels, bits)
    )
    assert codes is not None
    return Labels(codes, scales)


@functools.cache  # eval_shape traces anew on every call
def _label_shapes(
    keys_shape: tuple[int, ...], dtype: jnp.dtype, num_channels: int, bits: int | None
) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct | None]:
    def make(keys: Array, channels: Array) -> tuple[Array, Array | None]:
        labels = make_labels(keys, channels, bits)
        return labels.codes, labels.scales

    channels = jax.ShapeDtypeStruct((*keys_shape[:2], num_channels), jnp.int32)
    return jax.eval_shape(make, jax.ShapeDtypeStruct(keys_shape, dtype), channels)


def _with_labels(lists: SharedLists, queries: PromptQueries, cache: KVCache, config: ModelConfig) -> SharedLists:
    """The lists with labels of the whole cache, on channels that are given or found from the prompt."""
    channels, settings = lists.channels, lists.settings
    if not lists.has_channels:
        R = settings.num_label_channels(config)
        by_keys = zip(queries.sizes, cache.keys, strict=True)
        of_keys = [choose_channels(sizes, keys, cache.lengths, R) for sizes, keys in by_keys]
        channels = jnp.stack([of_keys[config.kv_index(layer)] for layer in range(config.num_layers)], axis=1)
    labels = tuple(
        None if old is None else make_labels(row_floats(keys), channels[:, layer], settings.label_bits)
        for layer, keys, old in zip(config.kv_layers, cache.keys, lists.labels, strict=True)
    )
    return dataclasses.replace(lists, channels=channels, labels=labels, age=jnp.zeros_like(lists.age))


class MeasuredPrompt(NamedTuple):
    """What was found from a prompt before its plan."""

    lists: SharedLists  # with channels and labels
    similarity: Similarity | None  # None if no plan is to be found
    listed: Int[Array, "P L B J C"] | None  # the lists that the probes choose; None if no tail is to be fitted


@functools.partial(jax.jit, static_argnames=("config", "similarity", "impl", "mesh"), donate_argnames=("lists",))
def measure_prompt(
    lists: SharedLists,
    queries: PromptQueries,
    cache: KVCache,
    *,
    config: ModelConfig,
    similarity: str | None,
    impl: str = "auto",
    mesh: Mesh | None = None,
) -> MeasuredPrompt:
    """The lists with labels of the cache, and what a plan and tails are found from (jitted).

    Args:
        lists: from `HShare.start`; donated.
        queries, cache: of the prompt.
        config: the model.
        similarity: "overlap" or "mass" (`PlanSearch.similarity`); None measures none.
        impl: which implementation chooses the probes' lists, as `kernels.api` describes it.
        mesh: the devices that hold the arrays in parts; None for one device. Each device measures its own lists.
    """
    how = {"similarity": similarity, "impl": impl}
    if mesh is None:
        return _measure_part(lists, queries, cache, config=config, **how)
    part = functools.partial(_measure_part, config=config.part(num_parts(mesh)), **how)
    # Similarity is an array [B, U, U] of each device's lists, or two whose second dimension is any device's own.
    of_similarity = {None: None, "mass": "B U", "overlap": ("B U", "B U")}[similarity]
    returns = lists, of_similarity, None if lists.settings.tail is None else "P L B J C"
    return MeasuredPrompt(*by_parts(part, mesh, (lists, queries, cache), (lists, queries, cache), returns))


def _measure_part(
    lists: SharedLists,
    queries: PromptQueries,
    cache: KVCache,
    *,
    config: ModelConfig,
    similarity: str | None,
    impl: str,
) -> MeasuredPrompt:
    """`measure_prompt` on one device."""
    lists = _with_labels(lists, queries, cache, config)
    prompt, settings = LabelledPrompt(queries, cache.keys, lists.labels, lists.channels), lists.settings
    listed = None
    if settings.tail is not None:
        computes = np.ones(config.num_layers, bool)
        if lists.plan is not None:
            computes = np.asarray(lists.plan.is_computed.any(axis=1))
        layers = [layer for layer in range(settings.num_dense, config.num_layers) if computes[layer]]
        few = _tail_probes(queries)
        few_prompt = prompt._replace(queries=few)
        listed = list_probes(few_prompt, config=config, settings=settings, layers=layers, impl=impl)
        if few.positions.shape == queries.positions.shape:  # the plan's lists are the same; they are not chosen twice
            prompt = prompt._replace(listed=listed)
    found = None if similarity is None else MEASURES[similarity](prompt, config=config, settings=settings, impl=impl)
    return MeasuredPrompt(lists, found, listed)


def _tail_probes(queries: PromptQueries) -> PromptQueries:
    """The last MAX_TAIL_PROBES probes of each row."""
    if queries.positions.shape[1] <= MAX_TAIL_PROBES:
        return queries
    first = jnp.maximum((queries.positions >= 0).sum(axis=1) - MAX_TAIL_PROBES, 0)
    places = first[:, None] + jnp.arange(MAX_TAIL_PROBES)[None, :]
    positions = jnp.take_along_axis(queries.positions, places, axis=1, mode="fill", fill_value=-1)
    take = functools.partial(jnp.take_along_axis, indices=places[..., None, None], axis=1, mode="fill", fill_value=0)
    return dataclasses.replace(queries, positions=positions, probes=tuple(map(take, queries.probes)))


def _fit_tails(
    lists: SharedLists,
    listed: Int[Array, "P L B J C"],
    queries: PromptQueries,
    cache: KVCache,
    config: ModelConfig,
    impl: str,
    mesh: Mesh | None,
) -> tuple[Tail | None, ...]:
    """Every layer's tails. The fit is compiled once and called for each layer, so that memory holds one layer's."""
    settings, queries, tails = lists.settings, _tail_probes(queries), []
    for layer in range(config.num_layers):
        if layer < settings.num_dense:
            tails.append(None)
            continue
        index = config.kv_index(layer)
        tail = fit_tail(
            queries.probes[layer], listed, lists.source[:, layer], queries.positions, cache.lengths,
            cache.keys[index], cache.values[index], lists.labels[index], lists.channels[:, layer],
            settings=settings, window=config.windows[layer], looks_up=config.looks_up(layer), impl=impl, mesh=mesh,
        )  # fmt: skip
        tails.append(tail)
    return tuple(tails)


@functools.partial(jax.jit, static_argnames=("config", "settings", "search", "mesh"))
def plan_from(
    similarity: Any,
    *,
    config: ModelConfig,
    settings: HShareSettings,
    search: PlanSearch,
    mesh: Mesh | None = None,
) -> Source:
    """Each row's plan, as `find_plan` finds it (jitted), from the similarity that `measure_prompt` gives.

    On a mesh that similarity is of each device's own lists, side by side, and lists copy lists of their own device.
    """
    how = {"settings": settings, "search": search}
    if mesh is None:
        return find_plan(similarity, config=config, **how)
    part = functools.partial(find_plan, config=config.part(num_parts(mesh)), **how)
    of_similarity = layouts_alike(similarity, "B U")
    return by_parts(part, mesh, (similarity,), (of_similarity,), layout_of("B L J", flat_ids=True))
