"""Times the decode steps of gpt-fast, a published PyTorch decoder, on random weights in LLaMA's shapes.

The step is gpt-fast's own `decode_one_token`, compiled as its generate.py compiles it. This module imports no jax, so
that gpt-fast has the whole memory of the device. gpt-fast needs torch, sentencepiece and tiktoken.

    python -m scripts.bench.gpt_fast CHECKOUT --out OUT
"""

import argparse
import importlib
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

from scripts.bench.results import Lines, Row, read_rows

SIZES = ((4096, 1), (4096, 16), (32_768, 1), (16_384, 8))  # (context, batch)
# Our name of the model, and gpt-fast's.
MODELS = {"LLaMA3-8B": "llama-3-8b", "LLaMA2-7B": "7B"}
TOY_MODELS, TOY_SIZES = {"toy": "stories15M"}, ((64, 1),)
STEPS, REPEATS = 32, 5


def measure(theirs: Any, name: str, size: tuple[int, int], device: str, *, toy: bool) -> Row:
    """The row of one size: the median seconds of a step that ends with a full cache.

    Args:
        theirs: gpt-fast's module `generate`.
        name: gpt-fast's name of the model.
        size: (context, batch).
        device: torch's name of the device.
        toy: few steps, not compiled.
    """
    import torch

    their_model = sys.modules[theirs.Transformer.__module__]
    (context, batch), steps = size, 2 if toy else STEPS
    args = their_model.ModelArgs.from_name(name)
    args.block_size = max(args.block_size, context)
    with torch.device(device):
        torch.set_default_dtype(torch.bfloat16)
        model = their_model.Transformer(args).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        model.setup_caches(max_batch_size=batch, max_seq_length=context)
    step: Callable[..., Any] = theirs.decode_one_token
    if not toy:
        step = torch.compile(step, mode="reduce-overhead", fullgraph=True)
    times = []
    with torch.no_grad(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        for _ in range(REPEATS + 2):  # the first two compile and record the graph
            token = torch.zeros((batch, 1), dtype=torch.int, device=device)
            position = torch.tensor([context - steps - 1], dtype=torch.int, device=device)
            _wait(device)
            began = time.perf_counter()
            for _ in range(steps):
                token = step(model, token, position)[0].clone()
                position += 1
            _wait(device)
            times.append((time.perf_counter() - began) / steps)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    weights -= model.tok_embeddings.weight.numel() * model.tok_embeddings.weight.element_size()
    cache = sum(b.attention.kv_cache.k_cache.nbytes + b.attention.kv_cache.v_cache.nbytes for b in model.layers)
    seconds = statistics.median(times[2:])
    return {"seconds": seconds, "bytes": weights + cache, "note": f"{batch / seconds:.1f} tokens/s"}


def _wait(device: str) -> None:
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


def rows(checkout: Path, *, toy: bool) -> Iterator[tuple[str, Row]]:
    """Yields (unit, row) of every size that fits."""
    import torch

    sys.path.insert(0, str(checkout))
    theirs = importlib.import_module("generate")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name, their_name in (TOY_MODELS if toy else MODELS).items():
        for context, batch in TOY_SIZES if toy else SIZES:
            unit = f"{name} b{batch} {context // 1024}k" if context >= 1024 else f"{name} b{batch} {context}"
            row: Row = {"side": "gpt-fast dense"}
            try:
                row |= measure(theirs, their_name, (context, batch), device, toy=toy)
            except RuntimeError as error:  # out of memory
                row |= {"error": f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"}
            yield unit, row
            torch.compiler.reset()
            if device == "cuda":
                torch.cuda.empty_cache()


def main() -> None:
    """Measures every size and adds the rows to the results of a run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="a checkout of gpt-fast")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--toy", action="store_true", help="a tiny model, not compiled, on any machine")
    options = parser.parse_args()
    import torch

    options.out.mkdir(parents=True, exist_ok=True)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    command = f"python -m scripts.bench.gpt_fast {' '.join(sys.argv[1:])}"
    lines = Lines(options.out, {"device": device, "versions": versions, "command": command, "date": str(date.today())})
    for row in read_rows(options.out):
        if row.get("side") == "copy":
            lines.bandwidth = row["bytes"] / row["seconds"]
    for unit, row in rows(options.checkout, toy=options.toy):
        lines.add("gpt-fast", unit, row)


if __name__ == "__main__":
    main()
