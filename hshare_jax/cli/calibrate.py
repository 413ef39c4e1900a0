"""`hshare-jax calibrate`: finds label channels and one plan for all prompts, from texts, and writes them to files."""

import argparse
import sys
from pathlib import Path

from hshare_jax.cli.devices import add_devices, read_mesh
from hshare_jax.cli.errors import UsageError, usage_errors
from hshare_jax.cli.info import count_lists
from hshare_jax.cli.options import (
    add_named_model,
    add_settings,
    check_not_empty,
    check_output,
    is_same_file,
    open_named,
    read_method,
    read_quantize,
    read_text,
    whole,
)

# jax and the modules that need it are imported in the functions that run after the options have been read.

_BEGINNING = b'{"hshare_jax": '  # of the files that this command writes


def add_calibrate(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `calibrate`."""
    parser.set_defaults(run=run_calibrate)
    parser.add_argument("text", nargs="+", metavar="TEXTFILE", help="texts to calibrate on; - is standard input")
    add_named_model(parser)
    add_devices(parser)
    parser.add_argument("--channels-file", type=Path, metavar="OUT", help="file that gets the label channels")
    parser.add_argument("--plan-file", type=Path, metavar="OUT", help="file that gets the plan")
    parser.add_argument("--overwrite", action="store_true", help="replace earlier files of this command")
    parser.add_argument(
        "--block-length", type=whole, metavar="N",
        help="tokens that are read together (default: 2048, or more for a large budget)",
    )  # fmt: skip
    parser.add_argument("--max-blocks", type=whole, metavar="N", help="read only the first blocks (default: all)")
    add_settings(parser)


def run_calibrate(options: argparse.Namespace) -> int:
    """Writes label channels, a plan or both. Returns the exit status."""
    outputs = [path for path in (options.channels_file, options.plan_file) if path is not None]
    if not outputs:
        raise UsageError("nothing to write: give --channels-file, --plan-file or both")
    if len(outputs) == 2 and is_same_file(*outputs):
        raise UsageError(f"--channels-file and --plan-file are both {outputs[0]}; they need a file each")
    for path in outputs:
        check_output(path, inputs=options.text, overwrite=options.overwrite, may_replace=_is_calibrated)
    texts = [read_text(name) for name in options.text]
    check_not_empty(options.text, texts)
    method = read_method(options)
    files = open_named(options)
    mesh = read_mesh(options, files.config)
    from hshare_jax.calibration import calibrate, cut_blocks
    from hshare_jax.methods.hshare.plan_files import save_channels, save_plan

    limits = {"block_length": options.block_length, "max_blocks": options.max_blocks}
    with usage_errors():
        method.settings.check(files.config.for_parts(options.tensor_parallel_size))
        cut_blocks(files, texts, method=method, **limits)
    model = files.load(options.dtype, read_quantize(options, files), mesh)
    found = calibrate(model, texts, method=method, **limits)
    if options.channels_file is not None:
        save_channels(options.channels_file, found.channels, model, overwrite=options.overwrite)
    if options.plan_file is not None:
        save_plan(options.plan_file, found.plan, model, method, overwrite=options.overwrite)
    print(
        f"calibrated {model.name} on {found.num_tokens} tokens: {count_lists(found.plan, method.settings)} | "
        f"wrote {' and '.join(map(str, outputs))}",
        file=sys.stderr,
    )
    return 0


def _is_calibrated(path: Path) -> bool:
    """Whether a file begins as those that this command writes. Any other file stays as it is, a model's above all."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(_BEGINNING)) == _BEGINNING
