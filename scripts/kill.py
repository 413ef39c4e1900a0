"""Kills running commands at random moments, and checks that nothing is lost and that the next start goes on.

    PYTHONPATH=.:tests/support python scripts/kill.py --moments 100

Each command first runs undisturbed, twice, which measures its time. It is then started in a copy of the same folder and
gets SIGKILL, up to three times in a row. Half of the moments are uniform over the run, and half over the part of the
run that follows its first change of a file, because only this part can lose something. After each kill

- a model or a plan that is replaced is the old one or the new one, whole, and files beside it are there;
- a results file holds the first lines of the undisturbed run's file, and at most a part of one line more;
- what the command reads is as it was, and nothing but drafts lies beside it.

After the last kill of a row the command runs to its end, which must leave what the undisturbed run left, times aside.
A command that ended before its moment came is not counted. Each failed moment is printed. The exit status is 1 if there
was one.
"""

import argparse
import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
from command_line import SMALL, TEXT, TINY
from random_weights import random_params
from tiny_tokenizer import LETTERS, byte_tokenizer

import hshare_jax
from hshare_jax.models.pretrained import Model

ROOT = Path(__file__).parent.parent
IN_A_ROW = 3  # most kills before a run that is let end
TRIES = 2  # most rows for each kill that is wanted, because a command may end before its moment comes
LIMIT = 900  # seconds of a run that is let end
# The study takes 32 channels of a head. With two layers little is compiled.
MODEL = dataclasses.replace(TINY, num_layers=2, windows=(None,) * 2, head_dim=32, max_positions=1024)
TIMES = ("seconds", "tokens_per_second")


class LossError(AssertionError):
    """What a kill has cost, or why the next start failed."""


@dataclasses.dataclass(frozen=True)
class Command:
    """A command, and what must hold after it was killed, and after it has ended."""

    words: tuple[str, ...]  # after `python -m`
    share: int  # of all moments, beside those of the other commands
    outputs: tuple[str, ...]
    after_kill: Callable[[Path, Path, Path], None]  # called with the folder, the one before and the undisturbed one
    at_end: Callable[[Path, Path], None]  # called with the folder and the undisturbed one

    def words_in(self, folder: Path) -> list[str]:
        """The words, with --overwrite if an earlier run was killed after it had written what it was to convert."""
        is_done = "convert" in self.words and "--overwrite" not in self.words and (folder / self.outputs[0]).exists()
        return [*self.words, *(["--overwrite"] if is_done else [])]


@dataclasses.dataclass(frozen=True)
class Undisturbed:
    """A run without a kill: the folder that it left, and seconds: of the whole, and from the first change of a file."""

    folder: Path
    seconds: float
    writing: float


def check(is_right: bool, message: str) -> None:
    """Raises LossError unless a fact holds."""
    if not is_right:
        raise LossError(message)


def identity(path: Path) -> str | None:
    """The identity of a model, which is read whole; None if there is none."""
    return hshare_jax.load_model(path).identity if path.exists() else None


def content(path: Path) -> bytes | None:
    """The bytes of a file; None if there is none."""
    return path.read_bytes() if path.exists() else None


def old_or_new(name: str, read: Callable[[Path], object]) -> Callable[[Path, Path, Path], None]:
    """A check after a kill: what `read` finds at a name is what was there before, or what the undisturbed run left."""

    def after_kill(folder: Path, fresh: Path, whole: Path) -> None:
        allowed = [read(place / name) for place in (fresh, whole)]
        check(read(folder / name) in allowed, f"{name} is neither the old nor the new one")
        for kept in (path.relative_to(fresh) for path in (fresh / name).glob("notes.txt")):
            check(content(folder / kept) == content(fresh / kept), f"{kept} is lost")

    return after_kill


def begins_alike(name: str, *, without: Sequence[str] = ()) -> Callable[[Path, Path, Path], None]:
    """A check after a kill: the whole lines of a results file are the first ones of the undisturbed run's file."""

    def after_kill(folder: Path, _: Path, whole: Path) -> None:
        found, wanted = (lines_of(place / name, without) for place in (folder, whole))
        check(found == wanted[: len(found)], f"{name} does not begin as the undisturbed run's: {found}")

    return after_kill


def lines_of(path: Path, without: Sequence[str] = ()) -> list[dict]:
    """The whole lines of a results file, without some of their fields."""
    parts = (content(path) or b"").split(b"\n")[:-1]
    return [{key: value for key, value in json.loads(part).items() if key not in without} for part in parts]


def both(*checks: Callable[[Path, Path, Path], None]) -> Callable[[Path, Path, Path], None]:
    """Checks one after another."""

    def after_kill(*folders: Path) -> None:
        for one in checks:
            one(*folders)

    return after_kill


def equal(reads: dict[str, Callable[[Path], object]]) -> Callable[[Path, Path], None]:
    """A check at the end: what is read at each name is what is read in the undisturbed run's folder."""

    def at_end(folder: Path, whole: Path) -> None:
        for name, read in reads.items():
            check(read(folder / name) == read(whole / name), f"{name} differs from that of an undisturbed run")

    return at_end


def names_in(path: Path) -> list[str]:
    """The sorted names of what lies in a folder."""
    return sorted(entry.name for entry in path.iterdir())


def timeless(path: Path) -> list[dict]:
    """The lines of a run's metrics without times."""
    return lines_of(path, TIMES)


SETTINGS = ("--model", "tiny", *SMALL)
COMMANDS = {
    "convert": Command(
        ("hshare_jax", "convert", "tiny", "new"), 20, ("new",), old_or_new("new", identity), equal({"new": identity})
    ),
    "convert --overwrite": Command(
        ("hshare_jax", "convert", "tiny", "old", "--overwrite"), 25, ("old",),
        old_or_new("old", identity), equal({"old": identity, "old/notes.txt": content}),
    ),
    "calibrate --overwrite": Command(
        ("hshare_jax", "calibrate", "text.txt", *SETTINGS, "--plan-file", "plan.json", "--channels-file",
         "channels.json", "--max-blocks", "1", "--overwrite"), 15, ("plan.json", "channels.json"),
        both(old_or_new("plan.json", content), old_or_new("channels.json", content)),
        equal({"plan.json": content, "channels.json": content}),
    ),
    "eval": Command(
        ("hshare_jax", "eval", "--task", "perplexity", "--data", "text.txt", "--output", "eval.jsonl", *SETTINGS,
         "--method", "hshare", "streaming_llm", "--context", "64", "--steps", "4", "--limit", "3", "--batch-size",
         "1"), 15, ("eval.jsonl",), begins_alike("eval.jsonl"), equal({"eval.jsonl": content}),
    ),
    "train": Command(
        ("hshare_jax", "train", "--model", "tiny", "--text", "text.txt", "--output", "run", "--sequence-length", "16",
         "--batch-size", "4", "--num-steps", "30", "--log-every", "2", "--eval-every", "10", "--checkpoint-every",
         "5"), 15, ("run",),
        both(begins_alike("run/metrics.jsonl", without=TIMES), old_or_new("run/model", identity)),
        equal({"run": names_in, "run/metrics.jsonl": timeless, "run/model": identity}),
    ),
    "study": Command(
        ("scripts.study.quality", "--model", "tiny", "--text", "text.txt", "--context", "128", "--steps", "4",
         "--seeds", "0", "--core", "--tables", "64 of", "256 of", "--results", "study.jsonl", "--report", "study.md"),
        10, ("study.jsonl", "study.md"), both(begins_alike("study.jsonl"), old_or_new("study.md", content)),
        equal({"study.jsonl": content, "study.md": content}),
    ),
}  # fmt: skip


def make_inputs(folder: Path) -> None:
    """Writes what the commands read: a model and a text, and what they replace: another model, and a plan."""
    tokenizer = byte_tokenizer(LETTERS)
    params = random_params(MODEL)
    hshare_jax.save_model(Model(MODEL, params, tokenizer, (), "tiny", ""), folder / "tiny")
    others = jax.tree.map(lambda leaf: 2 * leaf, params)
    hshare_jax.save_model(Model(MODEL, others, tokenizer, (), "old", ""), folder / "old")
    (folder / "old" / "notes.txt").write_text("mine")
    (folder / "text.txt").write_text(TEXT * 40, encoding="utf-8")
    (folder / "plan.json").write_text('{"hshare_jax": "plan", "of": "another time"}')


def look(folder: Path) -> list[tuple[str, int, int]]:
    """What changes if a command writes: names, sizes and times."""
    found = []
    for place in (folder, *(entry for entry in folder.iterdir() if entry.is_dir())):
        try:
            entries = [(entry.name, entry.stat()) for entry in os.scandir(place)]
        except FileNotFoundError:  # a draft that is gone
            continue
        found += [(f"{place.name}/{name}", facts.st_size, facts.st_mtime_ns) for name, facts in entries]
    return sorted(found)


@dataclasses.dataclass(frozen=True)
class Killer:
    """Starts commands in copies of one folder, and kills them."""

    work: Path

    def start(self, command: Command, folder: Path) -> tuple[subprocess.Popen, Path]:
        """Starts a command. Returns the process, and the file that gets what it prints."""
        cache = str(self.work / "cache")
        environment = os.environ | {
            "HSHARE_JAX_CACHE": cache, "JAX_COMPILATION_CACHE_DIR": f"{cache}/compiled",
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "PYTHONPATH": str(ROOT),
        }  # fmt: skip
        said = self.work / "said.txt"
        words = [sys.executable, "-m", *command.words_in(folder)]
        with said.open("wb") as file:
            return subprocess.Popen(words, cwd=folder, env=environment, stdout=file, stderr=file), said

    def let_end(self, command: Command, folder: Path) -> tuple[float, float]:
        """Runs a command to its end. Returns the seconds that it took, and those since it first changed a file."""
        before, began, changed = look(folder), time.monotonic(), None
        process, said = self.start(command, folder)
        while process.poll() is None:
            if changed is None and look(folder) != before:
                changed = time.monotonic()
            if time.monotonic() - began > LIMIT:
                process.kill()
            time.sleep(0.002)
        check(process.returncode == 0, f"ends with {process.returncode}: {said.read_text()}")
        ended = time.monotonic()
        return ended - began, ended - (changed or ended)

    def kill(self, command: Command, folder: Path, *, seconds: float, since_change: bool) -> bool:
        """Kills a command after some seconds, counted from its start or its first change of a file.

        Returns:
            False if the command had ended before.
        """
        before = look(folder)
        process, said = self.start(command, folder)
        began = None if since_change else time.monotonic()
        while process.poll() is None:
            if began is None and look(folder) != before:
                began = time.monotonic()
            if began is not None and time.monotonic() - began >= seconds:
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.0005)
        status = process.wait()
        check(status in (0, -signal.SIGKILL), f"ends with {status} before the kill: {said.read_text()}")
        return status != 0

    def measure(self, name: str, command: Command) -> Undisturbed:
        """Runs a command undisturbed, twice: the first run compiles. Both must leave the same."""
        first, second = (self.copy(f"{name} {run}") for run in ("first", "second"))
        self.let_end(command, first)
        seconds, writing = self.let_end(command, second)
        command.at_end(first, second)
        return Undisturbed(second, seconds, writing)

    def copy(self, name: str) -> Path:
        """A copy of the folder with the inputs."""
        return Path(shutil.copytree(self.work / "fresh", self.work / name))

    def check_names(self, command: Command, folder: Path) -> None:
        """Raises LossError if an input has changed, or if anything else lies beside it than outputs and drafts."""
        fresh = self.work / "fresh"
        drafts = tuple(f".{output}." for output in command.outputs)
        others = [name for name in names_in(folder) if name not in command.outputs and not name.startswith(drafts)]
        check(others == [name for name in names_in(fresh) if name not in command.outputs], f"holds {others}")
        for name in others:
            for path in (fresh / name, *(fresh / name).rglob("*")):
                kept = path.relative_to(fresh)
                check(path.is_dir() or content(path) == content(folder / kept), f"{kept} has changed")


def kill_randomly(
    names: Iterable[str], moments: int, seed: int, *, show: Callable[[str], object] = print
) -> tuple[int, int]:
    """Kills the commands at random moments. Returns the numbers of kills and of failures."""
    chosen = {name: COMMANDS[name] for name in names}
    total, done, kills, failures = sum(command.share for command in chosen.values()), 0, 0, 0
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as work:
        killer = Killer(Path(work))
        (killer.work / "fresh").mkdir()
        make_inputs(killer.work / "fresh")
        shares = 0
        for name, command in chosen.items():
            shares += command.share
            wanted, killed, failed = round(moments * shares / total) - done, 0, 0
            done += wanted
            whole = killer.measure(name, command)
            for _ in range(TRIES * wanted):
                if killed >= wanted:
                    break
                folder, moment = killer.copy("killed"), ""
                try:
                    for _ in range(min(rng.randint(1, IN_A_ROW), wanted - killed)):
                        late, part = rng.random() < 0.5, rng.random()
                        seconds = part * (whole.writing if late else whole.seconds)
                        moment += f", {seconds:.3f} s after {'its first change of a file' if late else 'its start'}"
                        killed += killer.kill(command, folder, seconds=seconds, since_change=late)
                        command.after_kill(folder, killer.work / "fresh", whole.folder)
                        killer.check_names(command, folder)
                    # What else the machine does changes the time that a run takes.
                    seconds, writing = killer.let_end(command, folder)
                    whole = dataclasses.replace(whole, seconds=seconds, writing=writing or whole.writing)
                    command.at_end(folder, whole.folder)
                    killer.check_names(command, folder)
                except (LossError, ValueError, OSError) as error:  # the last two: what is left does not load
                    failed += 1
                    show(f"{name}, killed{moment}: {type(error).__name__}: {error}")
                shutil.rmtree(folder)
            show(f"{name}: {killed} kills, {failed} failed; undisturbed {whole.seconds:.1f} s")
            kills, failures = kills + killed, failures + failed
    return kills, failures


def main() -> int:
    """Kills the commands as the options say. Returns 1 if anything was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moments", type=int, default=100, help="of all commands together (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments (default: %(default)s)")
    parser.add_argument("--commands", nargs="+", choices=COMMANDS, default=tuple(COMMANDS), help="default: all")
    options = parser.parse_args()
    began = time.monotonic()
    kills, failures = kill_randomly(options.commands, options.moments, options.seed)
    print(f"{options.moments} moments, {kills} kills, {failures} failed, {time.monotonic() - began:.0f} s")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
