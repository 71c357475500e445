"""A run's code, data and base, brought back into a worktree of git in a temporary folder.

Nothing of the person's is changed but DVC's cache, which keeps what is fetched from a remote. Each
function returns what can't be restored, in words, or nothing.
"""

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from athanor import console, switches
from athanor.errors import UserError
from athanor.paths import Workspace
from athanor.runs import lineage
from athanor.runs.compare import RunRecord


@contextmanager
def open_worktree(repository: Path, commit: str, keep: bool) -> Iterator[Path]:
    """Yields a folder with a commit's files, which is removed however the block ends.

    Raises:
        UserError: where git can't make it.
    """
    tree = Path(tempfile.mkdtemp(prefix="athanor-"))
    # A hook of the person's, such as DVC's own, is for their folder.
    add = ("-c", "core.hooksPath=/dev/null", "worktree", "add", "--quiet", "--detach")
    try:
        made = subprocess.run(
            ["git", *add, str(tree), commit], cwd=repository, capture_output=True, text=True
        )
        if made.returncode:
            raise UserError(f"git can't make a worktree of {commit}: {made.stderr.strip()}")
        yield tree
    finally:
        if keep:
            console.out.print(
                f"kept in {tree}; `git worktree remove --force {tree}` removes it", soft_wrap=True
            )
        else:
            lineage.run_git(repository, "worktree", "remove", "--force", "--force", str(tree))
            shutil.rmtree(tree, ignore_errors=True)


def find_commit(tags: dict[str, str]) -> tuple[Path, str | None]:
    """The git repository to restore from, and the run's commit, None where none here has it.

    Raises:
        UserError: where there is no repository with a commit at all.
    """
    top = lineage.run_git(Path.cwd(), "rev-parse", "--show-toplevel")
    places = [place for place in (Path(top) if top else None, lineage.find_repository()) if place]
    commit = tags.get("mlflow.source.git.commit")
    for place in places:
        if commit and lineage.run_git(place, "rev-parse", "--verify", "-q", f"{commit}^{{commit}}"):
            return place, commit
    for place in places:
        if lineage.run_git(place, "rev-parse", "HEAD"):
            return place, None
    raise UserError(
        f"{Path.cwd()} is in no git repository with a commit: run this in the repository's folder"
    )


def restore_code(
    made: RunRecord, repository: Path, commit: str | None, tree: Path
) -> Iterator[str]:
    """Makes the worktree's code what the run's was: its commit is there, its patch is put on.

    Without the commit it becomes the code as it is now. Yields what can't be restored.
    """
    if commit is None:
        named = made.tags.get("mlflow.source.git.commit")
        yield (
            f"commit {named} is not in {repository} (`git fetch --all` brings what others have), "
            "and the code is taken as it is now"
            if named
            else "the run names no commit, and the code is taken as it is now"
        )
        changes = lineage.make_patch(repository)
    else:
        changes, why = _changes(made)
        if why:
            yield why
    if changes and (why := _put_on(changes, tree)):
        yield f"the run's {lineage.PATCH} can't be put on {commit}: {why}"
    expected = made.tags.get("code.digest")
    if expected and lineage.hash_code(tree / "src/athanor") != expected:
        yield "the code is not the same as the run's (its tag code.digest)"


def _changes(made: RunRecord) -> tuple[bytes, str]:
    """What is put on the commit, and why not, where it should be."""
    expected = made.tags.get("code.patch")
    if expected == "none":
        return b"", ""
    if expected is None:
        dirty = made.tags.get("git.dirty") == "true"
        why = "the tree had changes, of which this older run keeps no patch: its commit is taken"
        return b"", why if dirty else ""
    path = made.fetch_artifact(lineage.PATCH)
    changes = path.read_bytes() if path else b""
    if hashlib.sha256(changes).hexdigest() != expected:
        return b"", f"the run's {lineage.PATCH} is {'another now' if path else 'gone'}"
    return changes, ""


def _put_on(changes: bytes, tree: Path) -> str:
    done = subprocess.run(
        ["git", "apply", "--binary", "--whitespace=nowarn"],
        cwd=tree,
        input=changes,
        capture_output=True,
    )
    return done.stderr.decode("utf-8", "replace").strip() if done.returncode else ""


def restore_data(made: RunRecord, tree: Path) -> Iterator[str]:
    """Puts the data that the run's DVC hash names into the worktree, or else data/ as it is now.

    It comes from DVC's cache here, or from any of its remotes. Yields what can't be restored.
    """
    md5 = made.tags.get("dvc.data")
    why = "" if md5 else "the run names no hash of it"
    if md5:
        try:
            why = _check_out(md5, Workspace(tree, tree).data)
        except Exception as error:  # DVC and its remotes raise what they like
            why = f"{type(error).__name__}: {error}"
    if not why:
        text = f"outs:\n- md5: {md5}\n  hash: md5\n  path: data\n"
        (tree / "data.dvc").write_text(text, encoding="utf-8")
        return
    shutil.rmtree(Workspace(tree, tree).data, ignore_errors=True)
    if (Workspace.here().home / "data").is_dir():
        (Workspace(tree, tree).data).symlink_to(Workspace.here().home / "data")
    yield f"the data {md5 or ''} can't be restored ({why}), and data/ is taken as it is now"


def _check_out(md5: str, out: Path) -> str:
    """Copies a folder out of DVC's cache, after what lacks there was fetched; returns why not."""
    from dvc.repo import Repo
    from dvc_data.hashfile import load
    from dvc_data.hashfile.hash_info import HashInfo

    switches.quiet_dvc()  # what is missing is reported here
    with Repo(str(Workspace.here().home)) as repo:
        cache = repo.cache.local
        remotes = list(repo.config["remote"])
        nowhere = "in neither DVC's cache nor " + (
            f"the remote {', '.join(remotes)}" if remotes else "a remote: none is named here"
        )
        # The list of the folder's files first: until it is there, nobody knows what they are.
        failures = _fetch(repo, [HashInfo("md5", md5)], remotes)
        if not cache.exists(md5):
            return "; ".join([nowhere, *failures])
        tree = load(cache, HashInfo("md5", md5))
        listed = {"/".join(key): found for key, _, found in tree}
        failures = _fetch(repo, list(listed.values()), remotes)
        if gone := [name for name, found in listed.items() if not cache.exists(found.value)]:
            some = f"{', '.join(gone[:3])}{', …' if len(gone) > 3 else ''}"
            return "; ".join([f"{some} {nowhere}", *failures])
        for name, found in listed.items():
            kept = cache.oid_to_path(found.value)
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(kept, out / name)
            # A cache that is linked to data/ is edited with it.
            with (out / name).open("rb") as file:
                if hashlib.file_digest(file, "md5").hexdigest() != found.value:
                    return f"{name} was edited in DVC's cache, its file {kept} is not what it was"
    return ""


def _fetch(repo: Any, wanted: list[Any], remotes: list[str]) -> list[str]:
    """Brings into the cache what is not there, from the first remote that has it.

    Returns what went wrong on the way.
    """
    failures = []
    for remote in remotes:
        lacking = [found for found in wanted if not repo.cache.local.exists(found.value)]
        if not lacking:
            break
        try:
            repo.cloud.pull(lacking, remote=remote)
        except Exception as error:  # each kind of remote has its own
            failures.append(f"{remote}: {type(error).__name__}: {error}")
    return failures


def link_input(path: str, tree: Path) -> None:
    """Links a folder that a configuration names, which is here and which git does not have."""
    here, there = Workspace.here().home / path, tree / path
    if not Path(path).is_absolute() and here.is_dir() and not there.exists():
        there.parent.mkdir(parents=True, exist_ok=True)
        there.symlink_to(here)


def build_environment(made: RunRecord, tree: Path) -> dict[str, str]:
    """The variables for a stage in the worktree: its own code, a store of its own, the run's BLAS.

    DVC's and MLflow's own are left out: they name this repository and this store.
    """
    ours = ("DVC_", "MLFLOW_", "ATHANOR_BLAS", "PYTHONPATH", "GIT_")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(ours)}
    path = [str(tree / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    blas = {"ATHANOR_BLAS": "wheel"} if made.tags.get("device", "").endswith("(wheel)") else {}
    return (
        kept
        | blas
        | {
            "PYTHONPATH": os.pathsep.join(path),
            "MLFLOW_TRACKING_URI": f"sqlite:///{tree}/mlruns/mlflow.db",
        }
    )
