"""What a run keeps of what it was made from, and how two records are compare."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import yaml

from athanor import diff, files, reproduce
from athanor.errors import UserError
from athanor.paths import Workspace
from athanor.runs import compare, lineage, restore, tracking_store
from athanor.runs.run import start_run
from support.refused import refused


def git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=folder, capture_output=True, text=True, check=True
    )
    return done.stdout


@pytest.fixture
def store(tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The database of a store without runs."""
    path = tmp_path / "store.db"
    shutil.copyfile(empty_store, path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{path}")
    monkeypatch.chdir(tmp_path)
    return path


def create_run(**settings: Any) -> str:
    """Create a run in the experiment; return its id."""
    client = tracking_store.connect()
    experiment = tracking_store.ensure_experiment(client, tracking_store.EXPERIMENT)
    return str(client.create_run(experiment, **settings).info.run_id)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A git repository with a commit, whose code was then changed in every way."""
    folder = tmp_path / "tree"
    for name, text in (
        ("src/athanor/a.py", "one = 1\n"),
        ("src/athanor/b.py", "two = 2\n"),
        ("src/athanor/staged.py", "three = 3\n"),
        ("pyproject.toml", "[project]\n"),
        ("README.md", "text\n"),
        (".gitignore", "__pycache__/\n"),
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    git(folder, "init", "-q")
    git(folder, "add", "-A")
    git(folder, "-c", "user.name=T", "-c", "user.email=t@localhost", "commit", "-qm", "One")
    return folder


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
    assert diff._files(kept) == ["src/a name: 哪吒*.bin"]


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
    monkeypatch.chdir(tree)  # as in DVC's queue: a folder of its own, the installed code
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


@pytest.mark.parametrize(
    ("a", "b", "only_a", "only_b", "same", "reordered"),
    [
        ([1, 2, 3], [1, 2, 3], [], [], 3, False),
        ([1, 2, 3], [1, 3], [2], [], 2, False),
        ([1, 2, 3], [1, 9, 3, 8], [2], [2, 4], 2, False),
        ([1, 2, 3], [3, 2, 1], [], [], 3, True),
        ([1, 1, 2], [1, 2, 2], [2], [3], 2, False),
        ([], [7], [], [1], 0, False),
    ],
)
def test_rows_that_differ_are_named_by_line(
    a: list[int], b: list[int], only_a: list[int], only_b: list[int], same: int, reordered: bool
) -> None:
    found = compare.compare_rows(np.array(a, dtype="<u8"), np.array(b, dtype="<u8"))
    assert found == compare.RowChanges(only_a, only_b, same, reordered)
    assert found.differ() == (a != b)


def test_weights_are_compared_relative_to_the_greatest(tmp_path: Path) -> None:
    a, b, other = (str(tmp_path / f"{name}.safetensors") for name in ("a", "b", "other"))
    mx.save_safetensors(a, {"x": mx.array([1.0, -4.0]), "y": mx.array([0.5])})
    mx.save_safetensors(b, {"x": mx.array([1.0, -4.0]), "y": mx.array([0.25])})
    mx.save_safetensors(other, {"x": mx.array([1.0, -4.0])})
    assert compare.measure_weight_difference(Path(a), Path(b)) == 0.0625
    assert compare.measure_weight_difference(Path(a), Path(a)) == 0
    assert compare.measure_weight_difference(Path(a), Path(other)) is None


def test_a_run_is_found_by_the_beginning_of_its_id(store: Path, tmp_path: Path) -> None:
    empty = store.rename(tmp_path / "empty.db")
    with refused("runs.no_store"):
        compare.load_record("a", tmp_path)
    assert not store.exists()
    empty.rename(store)
    with refused("runs.no_runs"):
        compare.load_record("a", tmp_path)
    ids = [create_run(run_name=f"run {i}") for i in range(17)]
    assert compare.load_record(ids[0][:12], tmp_path).name == "run 0"
    with refused("runs.no_such_run", prefix="zz") as refusal:
        compare.load_record("zz", tmp_path)
    assert "run 16 (RUNNING)" in refusal.value.facts["runs"]
    # Of 17 ids in hexadecimal two have the same first digit.
    shared = next(x[0] for x in ids if [y[0] for y in ids].count(x[0]) > 1)
    with refused("runs.ambiguous_run", prefix=shared):
        compare.load_record(shared, tmp_path)
    with refused("runs.no_such_run", prefix="%"):
        compare.load_record("%", tmp_path)


def test_a_training_keeps_what_it_was_made_from(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tree: Path
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
    made = compare.load_record(run_id, tmp_path)
    assert made.tags["git.dirty"] == "true"
    kept = made.fetch_artifact(lineage.PATCH)
    assert kept is not None
    assert "src/athanor/__init__.py" in kept.read_text(encoding="utf-8")
    assert made.rows is not None
    assert {split: len(rows) for split, rows in made.rows.items()} == {"train": 1, "valid": 1}
    assert made.versions == lineage.collect_versions()
    assert {"python", "cpu", "mlx", "mlx-lm", "numpy", "transformers"} <= made.versions.keys()

    git(tree, "add", "-A")
    git(tree, "-c", "user.name=T", "-c", "user.email=t@localhost", "commit", "-qm", "Two")
    lineage.describe_running_code.cache_clear()  # it goes on in another process
    with start_run("a", {}, lineage.collect_tags(), [], run=name) as run:
        lineage.record_lineage(run, Workspace.here().prepared)
    again = compare.load_record(run_id, tmp_path)
    assert again.tags["code.patch"] == "none"
    assert again.tags["code.digest"] == made.tags["code.digest"]
    assert again.tags["mlflow.source.git.commit"] == git(tree, "rev-parse", "HEAD").strip()


@pytest.mark.parametrize(
    "text",
    [
        "postgresql://me:secret@host/db",
        "postgresql://me:sec/secret@host/db",
        "mysql+pymysql://me:p@secret@host:1/db is away",
        "postgresql://host/db?user=me&password=secret&sslmode=require",
        "http://host?TOKEN=secret",
        "failed to resolve host 'secret@host'",
    ],
)
def test_no_password_is_shown(text: str) -> None:
    shown = tracking_store.hide_passwords(text)
    assert "secret" not in shown
    assert "host" in shown


@pytest.mark.parametrize(
    "uri", ["foo://me:secret@host/db", "postgresql://me:secret@127.0.0.1:9/db"]
)
def test_a_store_that_is_away_is_said_in_a_line(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    run = made(tmp_path)
    for ask in (
        lambda: compare.load_record("ab", tmp_path),
        lambda: run.fetch_artifact("params.yaml"),
    ):
        with refused("runs.store_failed") as caught:
            ask()
        assert "secret" not in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_sweep_is_not_compared_with_a_training(store: Path, tmp_path: Path) -> None:
    client = tracking_store.connect()
    sweep = create_run(tags={"athanor.sweep": "s"})
    child, better = (create_run(tags={"mlflow.parentRunId": sweep}) for _ in range(2))
    client.log_metric(child, "kept_val_loss", 2.0)
    client.log_metric(better, "kept_val_loss", 1.0)
    parent, training = (compare.load_record(run_id, tmp_path) for run_id in (sweep, child))
    for pair in ((parent, training), (training, parent), (parent, parent)):
        with pytest.raises(UserError, match="is a sweep's own run") as caught:
            diff._refuse_a_sweep(*pair)
        listed = [line.split()[0] for line in str(caught.value).splitlines()[1:]]
        assert listed == [better, child]
    diff._refuse_a_sweep(training, training)


def test_values_that_differ_are_named_shortly() -> None:
    one, other = {"betas": [0.9, 0.99], "eps": 1e-8}, {"betas": [0.9, 0.95], "eps": 1e-8}
    assert list(diff._changed("train.optimizer", str(one), str(other))) == [
        "train.optimizer.betas: [0.9, 0.99] -> [0.9, 0.95]"
    ]
    long = "a long prompt\n" * 20
    [said] = diff._changed("data.system", long + "one", long + "two")
    assert "\n" not in said
    assert len(said) < 160
    assert said.endswith("long prompt two")
    [said] = diff._changed("data.system", None, long)
    assert said.startswith("data.system: – -> a long prompt")
    assert len(said) < 90


SAME = {"val_loss": (2.0, 2.0), "test_exact_match": (1.0, 1.0)}


@pytest.mark.parametrize(
    ("then", "both", "same_rows", "elsewhere", "said"),
    [
        ("a", SAME, True, False, "match: the same bytes, the same metrics"),
        ("a", SAME, True, True, "match: the same bytes, the same metrics"),
        ("a", {}, True, False, "no match: the run keeps no metrics"),
        ("", SAME, True, False, "no match: the run keeps no adapters"),
        ("", {}, True, True, "no match: the run keeps no adapters and no metrics"),
        ("b", {}, True, False, "differs: adapters"),
        ("b", SAME, True, False, "differs: adapters"),
        ("b", SAME | {"val_loss": (2.0, 2.01)}, True, True, "close: "),
        ("b", SAME | {"val_loss": (2.0, 2.1)}, True, True, "differs: adapters, 1 of 2 metrics"),
        ("b", SAME | {"val_loss": (2.0, 2.01)}, False, True, "differs: rows, adapters, 1 of 2"),
        ("b", {"test_exact_match": (1.0, 0.5)}, True, True, "differs: adapters, 1 of 1 metrics"),
        ("a", SAME | {"val_loss": (2.0, 2.01)}, True, False, "differs: 1 of 2 metrics"),
    ],
)
def test_only_the_same_bytes_and_metrics_are_a_match(
    then: str,
    both: dict[str, tuple[float, float]],
    same_rows: bool,
    elsewhere: bool,
    said: str,
) -> None:
    match, text = reproduce.verdict(then, "a", both, same_rows, elsewhere)
    assert text.startswith(said)
    assert match == said.startswith("match")


def test_a_run_without_a_result_is_not_made_again(store: Path, tmp_path: Path) -> None:
    client = tracking_store.connect()
    run_id = create_run(run_name="a run")

    def refusal() -> str:
        with pytest.raises(UserError) as caught:
            reproduce.reproduce(compare.load_record(run_id, tmp_path), keep=False)
        return str(caught.value)

    assert "(a run) is RUNNING; only one that is FINISHED" in refusal()
    client.set_tag(run_id, "failure", "the loss is nan")
    client.set_terminated(run_id, "FAILED")
    assert "is FAILED: the loss is nan; only" in refusal()
    client.set_terminated(run_id, "FINISHED")
    assert "keeps no params.yaml" in refusal()

    # A model of a hub is the one of then, whatever its branch is at now.
    client.log_text(run_id, "model: {path: owner/name, revision: main}\n", "params.yaml")
    client.set_tag(run_id, "model.commit", "c0ffee")
    config = reproduce.configuration(compare.load_record(run_id, tmp_path))
    assert config == {"model": {"path": "owner/name", "revision": "c0ffee"}}


def made(tmp_path: Path, **tags: str) -> compare.RunRecord:
    return compare.RunRecord("1", "a run", "FINISHED", tags, {}, {}, {}, tmp_path)


@pytest.mark.parametrize(
    ("configured", "recorded", "restored"),
    [(None, "4", 4), (1, "1", 1), (None, "None", None), (3, "2", 3)],
)
def test_the_recorded_number_of_threads_is_restored(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    configured: int | None,
    recorded: str,
    restored: int | None,
) -> None:
    """What null stood for on the machine of the run; 3 is what could not be set there."""
    config = {"model": {}, "train": {"blas_threads": configured}}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    monkeypatch.setattr(compare.RunRecord, "fetch_artifact", lambda self, path: tmp_path / path)
    params = {"train.blas_threads": recorded}
    run = compare.RunRecord("1", "a run", "FINISHED", {}, params, {}, {}, tmp_path)
    assert reproduce.configuration(run)["train"]["blas_threads"] == restored


def test_other_threads_are_one_line_of_a_difference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare.RunRecord, "fetch_artifact", lambda self, path: None)
    a, b = (
        compare.RunRecord(
            *("1", "a run", "FINISHED"),
            {"device": f"cpu x86_64 (OpenBLAS 0.3.21 Zen, {threads})"},
            {"train.blas_threads": threads[0]},
            *({}, {}, tmp_path),
        )
        for threads in ("2 threads", "1 thread")
    )
    assert list(diff.differences(a, b)) == [
        "device: cpu x86_64 (OpenBLAS 0.3.21 Zen, 2 threads) -> "
        "cpu x86_64 (OpenBLAS 0.3.21 Zen, 1 thread)"
    ]


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
        return tree / "data", list(restore.restore_data(made(tmp_path, **{"dvc.data": md5}), tree))

    cache = here / ".dvc/cache/files/md5"
    restored, notes = restore_data("from the remote", md5)
    assert (notes, files.digest(restored.iterdir())) == ([], files.digest(data.iterdir()))
    tracked = yaml.safe_load((restored.parent / "data.dvc").read_text("utf-8"))
    assert tracked["outs"][0]["md5"] == md5
    # Without the remote the cache is all there is.
    shutil.rmtree(here / ".dvc/demo-remote")
    restored, notes = restore_data("from the cache", md5)
    assert (notes, files.digest(restored.iterdir())) == ([], files.digest(data.iterdir()))
    # A file that was edited in the cache, by way of a link to it, is not taken for the data.
    file = json.loads((cache / md5[:2] / md5[2:]).read_text("utf-8"))[0]["md5"]
    edited = cache / file[:2] / file[2:]
    edited.chmod(0o644)
    edited.write_bytes(edited.read_bytes() + b"\n")
    restored, [note] = restore_data("edited", md5)
    assert "edited in DVC's cache" in note
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


def test_what_of_the_code_can_not_be_restored_is_said(
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
        [said] = restore.restore_code(made(tmp_path, **gone), tree, None, there)
        assert (there / "src/athanor/a.py").read_text(encoding="utf-8") == "one = 11\n"
    assert f"commit {'0' * 40} is not in {tree}" in said
    with restore.open_worktree(tree, "HEAD", keep=False) as there:
        other = made(tmp_path, **{"code.patch": "none", "code.digest": "0"})
        [said] = restore.restore_code(other, tree, head, there)
        assert "the code differs from the run" in said
