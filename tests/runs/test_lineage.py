"""Records of what decided a run: its code, rows and libraries."""

import subprocess
from pathlib import Path

import pytest

from athanor import diff
from athanor.paths import Workspace
from athanor.runs import compare, lineage
from athanor.runs.run import start_run
from support.records import git


def change(tree: Path) -> None:
    package = tree / "src/athanor"
    (package / "a.py").write_text("one = '哪吒'  \n", encoding="utf-8")  # blanks at a line's end
    (package / "b.py").unlink()
    (package / "staged.py").write_text("three = 4\n", encoding="utf-8")
    git(tree, "add", "src/athanor/staged.py")
    (package / "staged.py").write_text("three = 5\n", encoding="utf-8")
    (package / "inside").mkdir()
    (package / "inside/new.py").write_text("new = 1", encoding="utf-8")
    (package / "data.bin").write_bytes(bytes(range(256)))
    (package / "__pycache__").mkdir()
    (package / "__pycache__/a.pyc").write_bytes(b"compiled")
    (tree / "README.md").write_text("other text\n", encoding="utf-8")


def test_patch_on_the_commit_gives_the_code_as_it_was(tree: Path, tmp_path: Path) -> None:
    # What a person's configuration of git makes of a diff is no patch.
    for key, value in (("diff.noprefix", "true"), ("color.ui", "always"), ("diff.external", "cat")):
        git(tree, "config", key, value)
    assert lineage.make_patch(tree) == b""
    change(tree)
    changes = lineage.make_patch(tree)
    again = tmp_path / "again"
    git(tree, "worktree", "add", "-q", "--detach", str(again))
    assert lineage.hash_code(again / "src/athanor") != lineage.hash_code(tree / "src/athanor")
    subprocess.run(["git", "apply"], cwd=again, input=changes, check=True)
    assert lineage.hash_code(again / "src/athanor") == lineage.hash_code(tree / "src/athanor")
    assert (again / "src/athanor/inside/new.py").read_text(encoding="utf-8") == "new = 1"
    assert not (again / "src/athanor/b.py").exists()
    assert b"README" not in changes
    assert b"pycache" not in changes


def test_what_is_hidden_is_no_code(tree: Path) -> None:
    """An editor's file makes no other code, and a secret stays where it is."""
    package = tree / "src/athanor"
    before = lineage.hash_code(package)
    (package / ".env").write_text("TOKEN=secret", encoding="utf-8")
    (package / ".ruff_cache/inside").mkdir(parents=True)
    (package / ".ruff_cache/inside/secret").touch()
    (tree / "src/.DS_Store").touch()
    assert lineage.hash_code(package) == before
    assert lineage.make_patch(tree) == b""
    (package / "new.py").touch()
    changes = lineage.make_patch(tree)
    assert b"new.py" in changes
    assert b"secret" not in changes
    assert b"DS_Store" not in changes


def test_settings_of_git_do_not_break_the_patch(tree: Path, tmp_path: Path) -> None:
    git(tree, "config", "diff.context", "0")
    path = tree / "src/athanor/a.py"
    path.write_text("".join(f"line_{i} = {i}\n" for i in range(9)), encoding="utf-8")
    git(tree, "-c", "user.name=T", "-c", "user.email=t@localhost", "commit", "-qam", "Two")
    path.write_text(path.read_text("utf-8").replace("line_4 = 4", "line_4 = 44"), encoding="utf-8")
    again = tmp_path / "again"
    git(tree, "worktree", "add", "-q", "--detach", str(again))
    subprocess.run(["git", "apply"], cwd=again, input=lineage.make_patch(tree), check=True)
    digest = lineage.hash_code(tree / "src/athanor")
    assert lineage.hash_code(again / "src/athanor") == digest
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))  # core.autocrlf
    assert lineage.hash_code(tree / "src/athanor") == digest


def test_large_files_that_git_does_not_know_are_not_kept(
    tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tree / "src/large.bin").write_bytes(bytes(lineage.MOST_BYTES + 1))
    (tree / "src/a name: 哪吒*.bin").write_bytes(bytes(lineage.MOST_BYTES))
    changes = lineage.make_patch(tree)
    assert b"large.bin" not in changes
    assert "src/large.bin (1 MB) is in no commit" in capsys.readouterr().err
    kept = tree.parent / lineage.PATCH
    kept.write_bytes(changes)
    assert diff.list_patched_files(kept) == ["src/a name: 哪吒*.bin"]


def test_patch_leaves_what_is_staged_as_it_was(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change(tree)
    before = (tree / ".git/index").read_bytes()
    changes = lineage.make_patch(tree)
    assert (tree / ".git/index").read_bytes() == before
    # In a hook git names an index, and that is not ours to use either.
    monkeypatch.setenv("GIT_INDEX_FILE", str(tree / ".git/elsewhere"))
    assert lineage.make_patch(tree) == changes


def test_tags_name_the_commit_of_the_code_that_runs(
    tree: Path, repo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tree)  # a folder of its own, and the installed code
    assert (
        lineage.collect_tags()["mlflow.source.git.commit"] == git(repo, "rev-parse", "HEAD").strip()
    )
    assert lineage.find_repository() == repo


def test_code_that_was_installed_as_a_copy_has_no_commit(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tree / ".gitignore").write_text(".venv/\n", encoding="utf-8")
    package = tree / ".venv/lib/athanor"
    (package / "runs").mkdir(parents=True)
    (package / "__init__.py").touch()
    monkeypatch.setattr(lineage, "__file__", str(package / "runs/lineage.py"))
    assert lineage.find_repository() is None
    assert "mlflow.source.git.commit" not in lineage.collect_tags()


def test_a_digest_a_row(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(b'{"a": 1}\n{"b": 2}\n{"a": 1}')
    first, second, third = lineage.hash_rows(path).tolist()
    assert first == third != second
    path.write_bytes(b'{"a": 1}\n{"b": 3}\n{"a": 1}')
    assert lineage.hash_rows(path).tolist()[1] not in (first, second)
    path.write_bytes(b"")
    assert lineage.hash_rows(path).shape == (0,)


def test_a_training_keeps_what_it_was_made_from(
    runs_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tree: Path
) -> None:
    """The record of code with changes; when it goes on without them, no old patch is believed."""
    (tmp_path / "artifacts/prepare").mkdir(parents=True)
    for split in ("train", "valid"):
        text = f'{{"text": "a row of {split}"}}\n'
        (tmp_path / f"artifacts/prepare/{split}.jsonl").write_text(text, encoding="utf-8")
    package = tree / "src/athanor"
    (package / "__init__.py").write_text("", encoding="utf-8")
    monkeypatch.setattr(lineage, "__file__", str(package / "runs/lineage.py"))
    with start_run("a", {}, lineage.collect_tags(), []) as run:
        lineage.record_lineage(run, Workspace.here().prepared)
        name = run.name
    run_id = run.wait_for_id()
    assert run_id is not None
    record = compare.load_record(run_id, tmp_path)
    assert record.tags["git.dirty"] == "true"
    kept = record.fetch_artifact(lineage.PATCH)
    assert kept is not None
    assert "src/athanor/__init__.py" in kept.read_text(encoding="utf-8")
    assert {split: len(rows) for split, rows in record.rows.items()} == {"train": 1, "valid": 1}
    assert record.versions == lineage.collect_versions()
    assert {"python", "cpu", "mlx", "mlx-lm", "numpy", "transformers"} <= record.versions.keys()

    git(tree, "add", "-A")
    git(tree, "-c", "user.name=T", "-c", "user.email=t@localhost", "commit", "-qm", "Two")
    lineage.describe_running_code.cache_clear()  # it goes on in another process
    with start_run("a", {}, lineage.collect_tags(), [], run=name) as run:
        lineage.record_lineage(run, Workspace.here().prepared)
    again = compare.load_record(run_id, tmp_path)
    assert again.tags["code.patch"] == "none"
    assert again.tags["code.digest"] == record.tags["code.digest"]
    assert again.tags["mlflow.source.git.commit"] == git(tree, "rev-parse", "HEAD").strip()


def test_a_repository_of_another_user_is_named(
    repo: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")  # git's own, for its tests
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", "/dev/null")
    monkeypatch.setenv("GIT_CONFIG_SYSTEM", "/dev/null")
    assert lineage.find_repository() is None
    assert f"safe.directory {repo}" in " ".join(capsys.readouterr().err.split())
