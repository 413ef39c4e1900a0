"""Files and directories are written completely or not at all, and so are the reports of the study scripts."""

import argparse
import importlib.util
import os
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from hshare_jax.errors import CheckpointError
from hshare_jax.files import atomic
from hshare_jax.files.atomic import whole_directory, whole_file
from hshare_jax.files.checksums import CHECKSUMS, verify_all

ROOT = Path(__file__).parent.parent.parent
MARK = "<!-- written -->"


@pytest.fixture(scope="module")
def reports() -> ModuleType:
    """The module scripts/study/reports.py, which is not on the import path."""
    spec = importlib.util.spec_from_file_location("study_reports", ROOT / "scripts" / "study" / "reports.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_draft_takes_the_files_place_with_nothing_left_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.txt"
    for text in ("one", "two"):
        with whole_file(path) as draft:
            draft.write_text(text)
        assert path.read_text() == text
    assert [found.name for found in path.parent.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("before", [None, "before"])
def test_what_a_link_points_to_is_written_and_the_link_stays(before: str | None, tmp_path: Path) -> None:
    target, link = tmp_path / "elsewhere" / "a.txt", tmp_path / "link.txt"
    target.parent.mkdir()
    if before:
        target.write_text(before)
    link.symlink_to("elsewhere/a.txt")
    with whole_file(link) as draft:
        assert draft.suffix == ".txt"
        draft.write_text("after")
    assert (link.is_symlink(), target.is_symlink(), target.read_text()) == (True, False, "after")
    assert sorted(found.name for found in tmp_path.iterdir()) == ["elsewhere", "link.txt"]
    assert [found.name for found in target.parent.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("before", [None, "before"])
def test_an_error_leaves_what_was_there_and_nothing_else(
    before: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "a.txt"
    if before:
        path.write_text(before)
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"), whole_file(path) as draft:
        draft.write_text("half")
    with pytest.raises(UnicodeEncodeError), whole_file(path) as draft:
        draft.write_text("half \udc80", encoding="utf-8")
    assert {found.name: found.read_text() for found in tmp_path.iterdir()} == ({"a.txt": before} if before else {})


def test_a_directory_takes_its_place_with_checksums_and_nothing_left_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a"
    with whole_directory(path) as draft:
        (draft / "b").mkdir()
        (draft / "b" / "c.txt").write_text("one")
        assert not path.exists()
    verify_all(path, ["b"])
    with whole_directory(path, parts=["b", "c.txt"], overwrite=True) as draft:
        (draft / "c.txt").write_text("two")
    assert {found.name for found in path.iterdir()} == {"c.txt", CHECKSUMS}
    assert [found.name for found in path.parent.iterdir()] == ["a"]
    (path / "c.txt").write_text("changed")
    with pytest.raises(CheckpointError, match=r"c\.txt is damaged"):
        verify_all(path, ["b", "c.txt"])


@pytest.mark.parametrize("is_old_system", [False, True])
def test_files_beside_the_parts_stay_the_same_files_when_the_parts_are_replaced(
    is_old_system: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if is_old_system:  # it knows neither second names nor an exchange in one step
        monkeypatch.setattr(atomic, "_exchange_at_once", lambda draft, path: False)

        def refuse(*_: str) -> None:
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr(os, "link", refuse)
    path, link = tmp_path / "a", tmp_path / "link"
    link.symlink_to(path)
    with whole_directory(path, parts=["b"]) as draft:
        (draft / "b").write_text("one")
    (path / "notes" / "old").mkdir(parents=True)
    (path / "notes" / "old" / "b").write_text("mine")
    (path / ".hidden").symlink_to("nowhere")
    with open(path / "results", "a") as results:
        with whole_directory(link, parts=["b"], overwrite=True) as draft:
            (draft / "b").write_text("two")
        results.write("a line that came meanwhile")
    verify_all(path, ["b"])
    assert ((path / "b").read_text(), (path / "notes" / "old" / "b").read_text()) == ("two", "mine")
    assert (path / ".hidden").readlink() == Path("nowhere")
    assert (path / "results").read_text() == ("" if is_old_system else "a line that came meanwhile")
    assert sorted(found.name for found in tmp_path.iterdir()) == ["a", "link"]
    assert link.is_symlink()


def test_of_the_files_in_a_directory_only_its_parts_are_checked(tmp_path: Path) -> None:
    with whole_directory(tmp_path / "a") as draft:
        (draft / "b").mkdir()
        (draft / "b" / "c").write_text("one")
    for name in ("notes", ".DS_Store", "b/.DS_Store"):
        (tmp_path / "a" / name).write_text("another's")
        verify_all(tmp_path / "a", ["b"])
    (tmp_path / "a" / "b" / "d").write_text("it would be read")
    with pytest.raises(CheckpointError, match=r"it holds the unlisted b/d"):
        verify_all(tmp_path / "a", ["b"])
    with pytest.raises(CheckpointError, match=r"SHA256SUMS is missing or empty"):
        verify_all(tmp_path / "a", ["notes"])


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_directory_that_cannot_be_written_leaves_what_was_there(
    overwrite: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a"
    with whole_directory(path) as draft:
        (draft / "c.txt").write_text("before")
    with pytest.raises(OSError, match=r"a'$") as caught, whole_directory(path) as draft:  # it exists
        (draft / "c.txt").write_text("after")
    assert caught.value.filename == str(path)

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left") as caught, whole_directory(path, overwrite=overwrite) as draft:
        (draft / "c.txt").write_text("after")
    assert caught.value.filename == str(path)
    with pytest.raises(OSError, match="No space left") as caught, whole_directory(path, overwrite=overwrite) as draft:
        raise OSError(28, "No space left on device", str(draft / "b" / "c.txt"))
    assert caught.value.filename == str(path)
    assert (path / "c.txt").read_text() == "before"
    assert [found.name for found in tmp_path.iterdir()] == ["a"]


def test_a_report_keeps_what_stands_above_the_mark(
    reports: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "report.md"
    for text in ("old\n", "new\n"):
        reports.write_report(path, MARK, text)
    assert path.read_text() == f"{MARK}\n\nnew\n"
    path.write_text(f"# Title\n\nBy hand.\n\n{MARK}\n\nold\n")
    reports.write_report(path, MARK, "new\n")
    assert path.read_text() == f"# Title\n\nBy hand.\n\n{MARK}\n\nnew\n"
    path.write_text("# All by hand\n\n")
    reports.write_report(path, MARK, "new\n")
    assert path.read_text() == f"# All by hand\n\n{MARK}\n\nnew\n"
    reports.write_report(None, MARK, "new\n")
    assert capsys.readouterr().out == "new\n"


def test_a_command_is_the_one_given_with_paths_by_their_names(
    reports: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (model := tmp_path / "model").mkdir()
    options = argparse.Namespace(text=[Path("corpus/a b.txt"), Path("c.txt")], report=Path("docs/new.md"), steps=8)
    given = ["--text", "corpus/a b.txt", "./c.txt", "--report=docs/new.md", "--model", str(model), "--steps", "8"]
    given += ["--tokenizer", "owner/name", "--report-only"]
    monkeypatch.setattr("sys.orig_argv", ["/somewhere/python", "-m", "scripts.study.methods", *given])
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    words = (
        "-m scripts.study.methods --text 'a b.txt' c.txt --report=new.md --model model --steps 8 --tokenizer owner/name"
    )
    assert reports.command(options) == f"python {words}"
    monkeypatch.setenv("XLA_FLAGS", "--a=false --b=1")
    assert reports.command(options) == f"XLA_FLAGS='--a=false --b=1' python {words}"


def test_a_directory_with_another_file_system_below_it_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with whole_directory(tmp_path / "a", parts=["b"]) as draft:
        (draft / "b").write_text("one")
    (tmp_path / "a" / "mounted").mkdir()
    whole = os.stat

    def stat(path: Path | str, **how: bool) -> object:
        found = whole(path, **how)
        is_mounted = os.fspath(path).endswith("mounted")
        return SimpleNamespace(st_dev=found.st_dev + 1) if is_mounted else found

    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", stat)
        replaced = whole_directory(tmp_path / "a", parts=["b"], overwrite=True)
        with pytest.raises(OSError, match="is another file system") as caught, replaced:
            pytest.fail("the directory may not be replaced")
    assert caught.value.filename == str(tmp_path / "a" / "mounted")
    assert (tmp_path / "a" / "b").read_text() == "one"
