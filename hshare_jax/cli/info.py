"""`hshare-jax info`: a model's shape, what it takes on each device, or the plans that decoding prompts would follow."""

import argparse
import dataclasses
import json
from typing import TYPE_CHECKING, Any

from hshare_jax.cli.devices import add_sizes
from hshare_jax.cli.errors import UsageError, option_name, usage_errors
from hshare_jax.cli.options import (
    DEFAULT_MODEL,
    add_kv_cache_dtype,
    add_kv_sharing,
    add_model,
    add_prompt_files,
    add_settings,
    apply_chat_template,
    check_kv_sharing,
    open_named,
    read_method,
    read_prompts,
    read_quantize,
    setting_names,
    share_kv_as_told,
    whole,
)
from hshare_jax.errors import SettingError, check_whole
from hshare_jax.methods.hshare.settings import HShareSettings
from hshare_jax.models.kv_sharing import layer_passes, write_notation

if TYPE_CHECKING:
    from hshare_jax.methods.hshare.share_plan import SharePlan
    from hshare_jax.models.config import ModelConfig
    from hshare_jax.models.pretrained import ModelFiles

# jax and the modules that need it are imported in the functions that run after the options have been read.

_SIZES = ("batch", "tensor_parallel_size", "data_parallel_size")  # 1 unless they are given
_OF_MEMORY = (*_SIZES, "device_memory")
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_CACHE_BYTES = {"int8": (1, 4)}  # of a cached number and of a row's scale, unless they are of --dtype


def add_info(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `info`."""
    parser.set_defaults(run=run_info, prompt=[])
    parser.add_argument(
        "model", nargs="?", default=DEFAULT_MODEL, metavar="NAME",
        help="built-in name, GGUF file, directory or hub id (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_model(parser)
    add_kv_cache_dtype(parser)
    add_kv_sharing(parser.add_argument_group("the model as it would be with cross-layer KV sharing"), weights=False)
    parser.add_argument(
        "--plan", dest="show_plan", action="store_true", help="show which list copies which, for each prompt"
    )
    _add_memory(parser.add_argument_group("what each device holds"))
    add_settings(parser, title="sparse decoding, with --plan or --context")
    add_prompt_files(parser)


def run_info(options: argparse.Namespace) -> int:
    """Prints facts about a model, or plans. Returns the exit status."""
    check_kv_sharing(options)
    if options.context is not None:
        return _show_memory(options)
    if given := [name for name in _OF_MEMORY if getattr(options, name) is not None]:
        raise UsageError(f"{option_name(given[0])} is for counting what a device holds; add --context")
    if options.show_plan:
        if options.kv_sharing is not None:
            raise UsageError(
                "--kv-sharing shows a model that has no weights yet, and --plan needs them; leave out either"
            )
        return _show_plans(options)
    given = [name for name in setting_names() if hasattr(options, name)]
    given += [name for name in ("prompt_file", "system", "no_chat_template") if getattr(options, name)]
    if given:
        raise UsageError(f"{option_name(given[0])} is for showing a plan; add --plan")
    files = open_named(options)
    config, dtype = share_kv_as_told(options, files.config), options.dtype or files.dtype
    if options.kv_sharing is None:
        identity, size = files.identify(options.dtype, read_quantize(options, files))
    else:  # a model without weights has no identity
        identity, size = None, config.num_parameters * _BYTES[dtype]
    _print_facts(_facts(config, files, dtype, options.kv_cache_dtype, identity, size), options)
    return 0


def _print_facts(facts: dict[str, Any], options: argparse.Namespace) -> None:
    if options.json:
        print(json.dumps(facts))
        return
    width = max(len(name) for name in facts)
    for name, value in facts.items():
        print(f"{name:{width}}  {value}")


def _facts(
    config: "ModelConfig", files: "ModelFiles", dtype: str, kv_cache_dtype: str, identity: str | None, size: int
) -> dict[str, Any]:
    from hshare_jax.kernels.api import describe

    of_sharing = ("kv_layer_map", "forward_passes", "backward_passes")
    left_out = ("windows", "rope", *of_sharing)
    sizes = {key: value for key, value in dataclasses.asdict(config).items() if key not in left_out}
    sizes["no_rope_layers"] = list(config.no_rope_layers)  # a list, as the windows below
    facts = {"model": files.name, "identity": identity, **sizes}
    if config.kv_layer_map is not None:
        facts |= {name: getattr(config, name) for name in of_sharing} | {"kv_layer_map": write_notation(config)}
    is_unbounded = config.kv_layer_map is not None and config.forward_passes is None
    return facts | {
        "num_kv_layers": len(config.kv_layers),
        # How many layers a long prompt evaluates, relative to the model without sharing. None: the prompt decides.
        "relative_prefill_cost": None if is_unbounded else round(sum(layer_passes(config, 512)) / config.num_layers, 2),
        "sliding_windows": sorted({window for window in config.windows if window is not None}),
        "rope": config.rope.kind,
        "rope_theta": config.rope.theta,
        "parameters": config.num_parameters,
        "kv_parameters": config.num_kv_parameters,
        "dtype": dtype,
        "parameter_bytes": size,
        "kv_cache_dtype": kv_cache_dtype,
        "cache_bytes_per_token": config.cache_bytes_per_token(*_CACHE_BYTES.get(kv_cache_dtype, (_BYTES[dtype],))),
        "eos_token_ids": list(files.eos_token_ids),
        "chat_template": bool(files.tokenizer is not None and files.tokenizer.chat_template),
        "impl": describe("auto"),
    }


def _add_memory(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--context", type=whole, metavar="N",
        help="count what each device holds with room for so many tokens a row, weights as floats of --dtype; neither "
        "devices nor weights are needed, and of a hub id only the configuration is fetched",
    )  # fmt: skip
    group.add_argument("--batch", type=whole, metavar="N", help="rows that decode together (default: 1)")
    group.add_argument(
        "--device-memory", type=float, metavar="GB",
        help="also tell how many rows fit into so much of each device, beside the weights; a program needs more while "
        "it runs",
    )  # fmt: skip
    add_sizes(group, rows=True, default=None)


def _show_memory(options: argparse.Namespace) -> int:
    """Prints the bytes of weights, cache, labels and lists on each device. Returns the exit status."""
    _check_memory_options(options)
    method = read_method(options)
    batch, parts, groups = (1 if (given := getattr(options, name)) is None else given for name in _SIZES)
    if (room := options.device_memory) is not None and not 0 < room < float("inf"):
        raise UsageError(f"--device-memory {room:g} must be above 0, in GB (1e9 bytes), and finite")
    with usage_errors():
        check_whole("batch", batch, 1)
        check_whole("model", parts, 1)
        check_whole("data", groups, 1)
    files = open_named(options, weights=False)
    config, dtype = share_kv_as_told(options, files.config), options.dtype or files.dtype
    import jax.numpy as jnp
    from jax.sharding import AbstractMesh

    from hshare_jax.device_memory import device_memory
    from hshare_jax.mesh import check_rows_divide
    from hshare_jax.shapes import DATA, MODEL

    mesh = AbstractMesh((groups, parts), (DATA, MODEL))
    with usage_errors():
        if not 1 <= options.context <= config.max_positions:
            raise SettingError(
                "context", options.context, f"must lie between 1 and the model's {config.positions_told}"
            )
        check_rows_divide("batch", batch, mesh)
        divided = config.for_parts(parts)
        method.settings.check(divided)
        how = {"method": method, "dtype": jnp.dtype(dtype), "kv_cache_dtype": options.kv_cache_dtype, "mesh": mesh}
        memory = device_memory(config, batch, options.context, **how)
        row = device_memory(config, groups, options.context, **how)  # one row on each device
    facts = {
        "model": files.name, "parameters": config.num_parameters, "dtype": dtype,
        "kv_cache_dtype": options.kv_cache_dtype,
        "num_kv_heads": config.num_kv_heads, "num_kv_heads_loaded": divided.num_kv_heads,
        "tensor_parallel_size": parts, "data_parallel_size": groups, "devices": parts * groups,
        "batch": batch, "context": options.context, "budget": method.settings.budget,
    }  # fmt: skip
    each = dataclasses.asdict(memory)
    facts |= {f"{name}_bytes_per_device": size for name, size in each.items()}
    facts |= {"dense_bytes_per_device": memory.weights + memory.cache, "sparse_bytes_per_device": memory.total}
    if room is not None:
        left = max(room * 1e9 - row.weights, 0)
        facts["dense_rows_that_fit"] = groups * int(left // row.cache)
        facts["sparse_rows_that_fit"] = groups * int(left // (row.total - row.weights))
    _print_facts(facts, options)
    return 0


def _check_memory_options(options: argparse.Namespace) -> None:
    """Raises UsageError for an option that has no effect beside --context."""
    if options.show_plan:
        raise UsageError("--context counts bytes and --plan shows plans; leave out either")
    if options.quantize not in ("auto", "none"):
        raise UsageError(f"--quantize {options.quantize} has no effect: --context counts weights as floats")
    counted = {"preset", *(field.name for field in dataclasses.fields(HShareSettings))}
    given = [name for name in setting_names() if hasattr(options, name) and name not in counted]
    given += [name for name in ("prompt_file", "system", "no_chat_template") if getattr(options, name)]
    if given:
        raise UsageError(f"{option_name(given[0])} does not change what a device holds; leave it out")


def _show_plans(options: argparse.Namespace) -> int:
    """Prints which list copies which in the plan of each prompt. Returns the exit status."""
    texts, method = read_prompts(options), read_method(options)
    files = open_named(options)
    prompts = apply_chat_template(files, texts, options)
    longest, most = max(map(len, prompts)), files.config.max_positions - 1
    if longest > most:
        raise UsageError(f"a prompt has {longest} tokens; this model has room for {most}: shorten the prompt")
    settings = method.settings
    with usage_errors():
        settings.check(files.config)
    from hshare_jax.calibration import find_plans

    model = files.load(options.dtype, read_quantize(options, files), kv_cache_dtype=options.kv_cache_dtype)
    plans = find_plans(model, prompts, method=method)
    has_probes = [len(prompt) > settings.first_probe for prompt in prompts]
    if options.json:
        found = [
            {"prompt_tokens": len(prompt), "has_probes": probed, "source": plan.source}
            for prompt, probed, plan in zip(prompts, has_probes, plans, strict=True)
        ]
        print(json.dumps({"model": model.name, "dense_layers": settings.num_dense, "plans": found}))
        return 0
    print("own: computed there; 4.1: copied from layer 4, list 1; dense: reads everything")
    for row, (prompt, probed, plan) in enumerate(zip(prompts, has_probes, plans, strict=True), start=1):
        if len(prompts) > 1:
            print(f"==> {row} <==")
        print("\n".join(_draw_plan(plan, settings)))
        print(count_lists(plan, settings))
        if not probed and method.search.plan_scope == "sequence":
            least = settings.first_probe + 1
            print(f"the prompt has {len(prompt)} tokens; below {least} there is no plan: nothing is shared")
    return 0


def _draw_plan(plan: "SharePlan", settings: "HShareSettings") -> list[str]:
    """A line for each layer, with the source of each list of the layer."""
    lines = []
    for layer, (sources, computed) in enumerate(zip(plan.source, plan.is_computed, strict=True)):
        J = len(sources)
        cells = ["own" if own else f"{unit // J}.{unit % J}" for unit, own in zip(sources, computed, strict=True)]
        cells = cells if layer >= settings.num_dense else ["dense"]
        lines.append(f"layer {layer:3}" + "".join(f"{cell:>7}" for cell in cells))
    return lines


def count_lists(plan: "SharePlan", settings: "HShareSettings") -> str:
    """Says how many lists, and how many layers, of the sparse layers a plan computes."""
    computed = plan.is_computed[settings.num_dense :]
    num_idle = int((~computed.any(axis=1)).sum())
    return f"computes {computed.sum()} of {computed.size} lists; {num_idle} of {len(computed)} layers compute none"
