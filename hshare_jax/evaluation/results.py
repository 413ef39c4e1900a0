"""Results files read back: lines of `hshare-jax eval` and of the studies in scripts/study, in one form."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hshare_jax.files.texts import parse_json
from hshare_jax.methods.names import METHODS, takes_setting

# The fields of each kind of line, beside context, budget and name of the method. Lines of other kinds are left out.
_KINDS = {"text": ("reads", "divergence"), "speed": ("batch", "milliseconds")}
_PROTOCOL = ("steps", "dtype", "kv_cache_dtype")  # facts that all results of one context share
# Lines of studies that differ only in these facts may be pooled.
_POOLED = (
    "results", "task", "data", "data_sha256", "texts", "limit", "skip_start", "seeds", "batch_size",
)  # fmt: skip
_FILES = ("plan_file", "plan_file_sha256", "channels_file", "channels_file_sha256")
_NEW_NAMES = {"plan": "plan_kind"}  # settings that files of earlier versions call otherwise


def read_results(paths: Iterable[str | os.PathLike[str]]) -> tuple[list[dict[str, Any]], str]:
    """The results in files, for `plot_quality` and `plot_speed`, and the name of the model that they are of.

    Each result is a dict with `kind`, `context`, `budget` and `name`. Kind "text" has `reads` and `divergence`, kind
    "speed" has `batch` and `milliseconds`. Lines of `hshare-jax eval --task perplexity` get the names that
    scripts/study/methods.py writes: "hshare 1/2-1-1" at the default ratio, "published 7/8-3/4-1/2" for the published
    plan. Lines of other tasks and kinds are left out, and so is a last line that is only half written.

    Raises:
        ValueError: a file that holds no results, files of different models, or files that measured one context in
            different ways, or one method at one context and budget with different settings.
        OSError: a file that cannot be read.
    """
    lines: list[dict[str, Any]] = []
    agreement, model = _Agreement(), ""
    for path in map(Path, paths):
        study, results = _read_file(path)
        study = {"kv_cache_dtype": "auto"} | study  # which is not told
        model = study["model"]
        agreement.check((), path, {name: study.get(name) for name in ("model", "identity")}, "results of a model")
        for line in results:
            context = line["context"]
            for name in _PROTOCOL:
                if name in study:
                    subject = (line["kind"], context, name)
                    agreement.check(subject, path, {name: study[name]}, f"results of {context} tokens")
            subject = tuple(line.get(name) for name in ("kind", "context", "budget", "name", "batch"))
            what = f"{line['name']} at {line['budget']} of {context} tokens"
            agreement.check((*subject, "settings"), path, _facts_of(study, line["name"]), what)
        lines += results
    return lines, model


class _Agreement:
    """Facts that must agree across files, by subject."""

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], tuple[Path, dict[str, Any]]] = {}

    def check(self, subject: tuple[Any, ...], path: Path, facts: dict[str, Any], what: str) -> None:
        """Raises ValueError if an earlier file has other facts about the same subject; `what` names it."""
        earlier, known = self._known.setdefault(subject, (path, facts))
        for name in {**known, **facts}:
            old, new = known.get(name), facts.get(name)
            if str(old) != str(new):
                raise ValueError(
                    f"{earlier} and {path} both hold {what}, but differ in {name}, {old} and {new}; plot them apart"
                )


def _facts_of(study: dict[str, Any], name: str) -> dict[str, Any]:
    """The facts that all lines of one name must share, without settings and files that its method does not take."""
    family = name.partition(" ")[0]
    method = family if family in METHODS else "hshare"  # such as "published 7/8-3/4-1/2"
    settings = _settings_of(study)
    facts = {"what made them": "hshare-jax eval" if settings else "a study"} | settings
    facts |= {key: value for key, value in study.items() if key not in (*_POOLED, "settings")}
    of_hshare = (*settings, *_FILES)
    return {
        key: value
        for key, value in facts.items()
        if key not in of_hshare or takes_setting(method, key.removesuffix("_sha256"))
    }


def _settings_of(study: dict[str, Any]) -> dict[str, str]:
    """The settings in the first line of `hshare-jax eval`, by today's names; none in other files."""
    settings: dict[str, str] = study.get("settings", {})
    return {_NEW_NAMES.get(name, name): value for name, value in settings.items()}


def _read_file(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The first line of a file, which says what was measured, and the results in all further lines."""
    text = path.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    objects = []
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            objects.append(parse_json(line))
        except ValueError as error:
            raise ValueError(f"{path}:{number} is not JSON ({error}); this is no results file") from error
        if not isinstance(objects[-1], dict):
            raise ValueError(f"{path}:{number} is not a JSON object; this is no results file")
    if not objects or not isinstance(objects[0].get("model"), str):
        raise ValueError(f"{path} does not begin with a line that names the model; this is no results file")
    study, *lines = objects
    if not isinstance(study.get("settings", {}), dict):
        raise ValueError(f"{path}: settings={study['settings']!r} must be an object; these results cannot be plotted")
    results = []
    for number, line in enumerate(lines, start=2):
        try:
            result = _to_result(study, line)
            _check_result(result or {})
        except KeyError as error:
            raise ValueError(f"{path}:{number} is without {error}; these results cannot be plotted") from error
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}; these results cannot be plotted") from error
        results.append(result)
    return study, [result for result in results if result is not None]


def _check_result(result: dict[str, Any]) -> None:
    """Raises ValueError for a value that cannot be plotted."""
    for name, value in result.items():
        if name in ("kind", "name"):
            if not isinstance(value, str):
                raise ValueError(f"{name}={value!r} must be a text")
        elif name in ("context", "budget", "batch"):
            _whole(result, name)
        elif not _is_finite(value):
            raise ValueError(f"{name}={value!r} must be finite numbers")


def _whole(record: dict[str, Any], name: str) -> int:
    """The whole number at a key, which may be written as a text; ValueError if it is none."""
    value = record[name]
    if isinstance(value, bool) or not str(value).isdecimal():
        raise ValueError(f"{name}={value!r} must be a whole number")
    return int(value)


def _is_finite(value: Any) -> bool:
    """Whether a value is a number, or a list of such values, and not an empty one."""
    if isinstance(value, list):
        return bool(value) and all(map(_is_finite, value))
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _to_result(study: dict[str, Any], line: dict[str, Any]) -> dict[str, Any] | None:
    """A line of a study or of `hshare-jax eval` as a result; None if it is of no kind that is plotted."""
    if "kind" in line:
        if str(line["kind"]) not in _KINDS:
            return None
        names = ("kind", "context", "budget", "name", *_KINDS[line["kind"]])
        return {name: line[name] for name in names}
    scores = line["scores"] if line.get("task") == "perplexity" else {}
    if not isinstance(scores, dict):
        raise ValueError(f"scores={scores!r} must be an object")
    if "divergence" not in scores:
        return None
    settings = _settings_of(study)
    return {
        "kind": "text",
        "context": _whole(study, "context"),
        "budget": sum(_whole(settings, name) for name in ("num_sinks", "num_critical", "num_recent")),
        "name": _name_of(study, line["method"]),
        "reads": line["reads"],
        "divergence": scores["divergence"],
    }


def _name_of(study: dict[str, Any], method: str) -> str:
    """The name that studies give to a method of `hshare-jax eval`."""
    if method != "hshare":
        return method
    if "plan_file" in study:
        return f"hshare {Path(str(study['plan_file'])).name}"
    settings = _settings_of(study)
    interval = _whole(settings, "refresh_interval")
    query = "1" if interval == 1 else f"1/{interval}"
    kind = "hshare" if settings["plan_kind"] == "units" else settings["plan_kind"]
    return f"{kind} {settings['layer_ratio']}-{settings['head_ratio']}-{query}"
