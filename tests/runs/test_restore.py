"""A run's code and data restored in a worktree."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from athanor import files
from athanor.runs import restore
from support.records import git, make_record


def test_data_comes_from_a_remote_where_the_cache_lacks_it(
    repo: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    shutil.copytree(repo / ".dvc/demo-remote", here / ".dvc/demo-remote")
    shutil.copyfile(repo / ".dvc/config", here / ".dvc/config")
    (here / ".dvc/config.local").write_text("[core]\nno_scm = true\n", encoding="utf-8")
    (here / "data").mkdir()
    (here / "data/train.jsonl").touch()
    monkeypatch.chdir(here)
    tracked = yaml.safe_load((repo / "data.dvc").read_text(encoding="utf-8"))
    md5 = tracked["outs"][0]["md5"]

    def restore_data(name: str, md5: str) -> tuple[Path, list[str]]:
        tree = tmp_path / name
        tree.mkdir()
        notes = list(restore.restore_data(make_record(tmp_path, **{"dvc.data": md5}), tree))
        # It has the remote's settings, which can contain a password.
        assert not (tree / ".dvc/config.local").exists()
        return tree / "data", notes

    cache = here / ".dvc/cache/files/md5"
    restored, notes = restore_data("from the remote", md5)
    assert (notes, files.digest(restored.iterdir())) == ([], files.digest(data.iterdir()))
    tracked = yaml.safe_load((restored.parent / "data.dvc").read_text("utf-8"))
    assert tracked["outs"][0]["md5"] == md5
    # A file edited in the cache, through a link, is neither taken for the data nor deleted.
    file = json.loads((cache / md5[:2] / md5[2:]).read_text("utf-8"))[0]["md5"]
    edited = cache / file[:2] / file[2:]
    edited.chmod(0o644)
    edited.write_bytes(edited.read_bytes() + b"\n")
    restored, notes = restore_data("edited, in the remote", md5)
    assert (notes, files.digest(restored.iterdir())) == ([], files.digest(data.iterdir()))
    shutil.rmtree(here / ".dvc/demo-remote")
    restored, [note] = restore_data("edited", md5)
    assert "edited in DVC's cache" in note
    assert edited.exists()  # the person's data, if it is a link
    assert [path.name for path in restored.iterdir()] == ["train.jsonl"]
    # Data that is nowhere is reported, and the present rows are used.
    restored, [note] = restore_data("nowhere", f"{'0' * 32}.dir")
    assert "in neither DVC's cache nor the remote demo" in note
    assert [path.name for path in restored.iterdir()] == ["train.jsonl"]


def test_worktree_goes_and_what_it_links_to_stays(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also on an error; hooks of the person's are not run in it."""
    monkeypatch.chdir(tree)
    hook = tree / ".git/hooks/post-checkout"
    hook.write_text("#!/bin/sh\ntouch hooked\n", encoding="utf-8")
    hook.chmod(0o755)
    model = tree / "models/own/config.json"
    model.parent.mkdir(parents=True)
    model.write_text("{}", encoding="utf-8")
    with (
        pytest.raises(ZeroDivisionError),
        restore.open_worktree(tree, "HEAD", keep=False) as there,
    ):
        restore.link_input("models/own", there)
        assert (there / "models/own/config.json").read_text(encoding="utf-8") == "{}"
        assert not (there / "hooked").exists()
        raise ZeroDivisionError
    assert not there.exists()
    assert model.exists()
    assert git(tree, "worktree", "list", "--porcelain").count("worktree ") == 1
    with restore.open_worktree(tree, "HEAD", keep=True) as there:
        pass
    assert (there / "src/athanor/a.py").exists()
    git(tree, "worktree", "remove", "--force", str(there))


def test_code_that_cannot_be_restored_is_reported(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tree)
    head = git(tree, "rev-parse", "HEAD").strip()
    gone = {"mlflow.source.git.commit": "0" * 40}
    assert restore.find_commit({"mlflow.source.git.commit": head}) == (tree, head)
    assert restore.find_commit(gone) == (tree, None)
    # Code that was not committed is part of the code as it is now.
    (tree / "src/athanor/a.py").write_text("one = 11\n", encoding="utf-8")
    with restore.open_worktree(tree, "HEAD", keep=False) as there:
        [note] = restore.restore_code(make_record(tmp_path, **gone), tree, None, there)
        assert (there / "src/athanor/a.py").read_text(encoding="utf-8") == "one = 11\n"
    assert f"commit {'0' * 40} is not in {tree}" in note
    with restore.open_worktree(tree, "HEAD", keep=False) as there:
        other = make_record(tmp_path, **{"code.patch": "none", "code.digest": "0"})
        [note] = restore.restore_code(other, tree, head, there)
        assert "the code differs from the run" in note


def test_worktrees_of_killed_processes_are_removed(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(restore.tempfile, "tempdir", str(tmp_path))
    left = tmp_path / "athanor-left"
    git(tree, "worktree", "add", "-q", "--detach", str(left))
    left.with_name(f"{left.name}.lock").touch()
    with restore.open_worktree(tree, "HEAD", keep=False) as used:
        assert not left.exists()
        with restore.open_worktree(tree, "HEAD", keep=True) as kept:
            assert used.exists()
        with restore.open_worktree(tree, "HEAD", keep=False):
            assert kept.exists()
    assert {path.name for path in tmp_path.glob("athanor-*")} == {kept.name}
    assert git(tree, "worktree", "list").count("athanor-") == 1
