"""A run's code, data and base model, restored in a git worktree in a temporary folder.

Nothing in the person's repository changes but DVC's cache, which keeps what is fetched from a
remote. The functions yield a note for each thing that cannot be restored.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from athanor import console, files
from athanor.errors import UserError
from athanor.paths import Workspace
from athanor.runs import lineage
from athanor.runs.compare import RunRecord

PREFIX = "athanor-"  # of a temporary folder's name


@contextmanager
def open_worktree(repository: Path, commit: str, keep: bool) -> Iterator[Path]:
    """Yield a folder with a commit's files, which is removed after the block unless `keep`.

    Removes those that killed processes left: their locks are free.

    Raises:
        UserError: if git cannot create it.
    """
    tree = Path(tempfile.mkdtemp(prefix=PREFIX)).resolve()
    lock = files.try_lock(_lock_of(tree))
    _remove_left(repository)
    # A person's hooks, such as DVC's own, are for their folder.
    add = ("-c", "core.hooksPath=/dev/null", "worktree", "add", "--quiet", "--detach")
    try:
        done = subprocess.run(
            ["git", *add, str(tree), commit], cwd=repository, capture_output=True, text=True
        )
        if done.returncode:
            raise UserError("runs.no_worktree", commit=commit, error=done.stderr.strip())
        yield tree
    finally:
        if keep:
            console.out.print(
                f"kept in {tree}; `git worktree remove --force {tree}` removes it", soft_wrap=True
            )
        else:
            _remove_worktree(repository, tree)
        _lock_of(tree).unlink(missing_ok=True)
        if lock is not None:
            lock.release()


def _lock_of(tree: Path) -> Path:
    return tree.with_name(f"{tree.name}.lock")


def _remove_left(repository: Path) -> None:
    """Remove the worktrees whose process was killed; those that are kept have no lock."""
    for line in lineage.run_git(repository, "worktree", "list", "--porcelain").splitlines():
        tree = Path(line.removeprefix("worktree "))
        ours = line.startswith("worktree ") and tree.name.startswith(PREFIX)
        if not ours or not _lock_of(tree).exists():
            continue
        if lock := files.try_lock(_lock_of(tree)):
            _remove_worktree(repository, tree)
            _lock_of(tree).unlink(missing_ok=True)
            lock.release()


def _remove_worktree(repository: Path, tree: Path) -> None:
    lineage.run_git(repository, "worktree", "remove", "--force", "--force", str(tree))
    shutil.rmtree(tree, ignore_errors=True)


def find_commit(tags: dict[str, str]) -> tuple[Path, str | None]:
    """Return the git repository to restore from and the run's commit, None if it is not there.

    Raises:
        UserError: if there is no repository with a commit.
    """
    top = lineage.run_git(Path.cwd(), "rev-parse", "--show-toplevel")
    repositories = [
        path for path in (Path(top) if top else None, lineage.find_repository()) if path
    ]
    commit = tags.get("mlflow.source.git.commit")
    for path in repositories:
        if commit and lineage.run_git(path, "rev-parse", "--verify", "-q", f"{commit}^{{commit}}"):
            return path, commit
    for path in repositories:
        if lineage.run_git(path, "rev-parse", "HEAD"):
            return path, None
    raise UserError("runs.no_repository", folder=Path.cwd())


def restore_code(
    record: RunRecord, repository: Path, commit: str | None, tree: Path
) -> Iterator[str]:
    """Make the worktree's code the run's by applying its patch; yield what cannot be restored.

    Without the run's commit the code becomes the present one.
    """
    if commit is None:
        recorded = record.tags.get("mlflow.source.git.commit")
        yield (
            f"commit {recorded} is not in {repository} (`git fetch --all` may bring it); the "
            "present code is used"
            if recorded
            else "the run has no commit; the present code is used"
        )
        patch = lineage.make_patch(repository)
    else:
        patch = b""
        if (expected := record.tags.get("code.patch", "none")) != "none":
            path = record.fetch_artifact(lineage.PATCH)
            patch = path.read_bytes() if path else b""
            if hashlib.sha256(patch).hexdigest() != expected:
                yield f"the run's {lineage.PATCH} {'was changed' if path else 'is gone'}"
                patch = b""
    if patch and (error := _apply(patch, tree)):
        yield f"the run's {lineage.PATCH} cannot be applied to {commit}: {error}"
    digest = record.tags.get("code.digest")
    if digest and lineage.hash_code(tree / "src/athanor") != digest:
        yield "the code differs from the run's (tag code.digest)"


def _apply(patch: bytes, tree: Path) -> str:
    done = subprocess.run(
        ["git", "apply", "--binary", "--whitespace=nowarn"],
        cwd=tree,
        input=patch,
        capture_output=True,
    )
    return done.stderr.decode("utf-8", "replace").strip() if done.returncode else ""


def restore_data(record: RunRecord, tree: Path) -> Iterator[str]:
    """Check out the data that the run's DVC hash names in the worktree, or use the present data/.

    It comes from DVC's cache here, or from any remote. Yields what cannot be restored.
    """
    md5 = record.tags.get("dvc.data")
    error = "the run has no hash of it"
    if md5:
        text = f"outs:\n- md5: {md5}\n  hash: md5\n  path: data\n"
        (tree / "data.dvc").write_text(text, encoding="utf-8")
        error = _check_out(md5, tree)
    if not error:
        return
    data = Workspace(tree, tree).data
    shutil.rmtree(data, ignore_errors=True)
    if (Workspace.here().home / "data").is_dir():
        data.symlink_to(Workspace.here().home / "data")
    yield f"the data {md5 or ''} cannot be restored ({error}); the present data/ is used"


def _check_out(md5: str, tree: Path) -> str:
    """Check out data.dvc from this repository's cache or remotes; return the error.

    The worktree is a DVC repository of its own with copies of the cached files, because DVC trusts
    files that were edited in a cache through a link, or deletes them. The settings of remotes can
    contain credentials, so they are removed.
    """
    home, local = Workspace.here().home, tree / ".dvc/config.local"
    listed = _dvc(home, "config", "--list").stdout.splitlines()
    settings = dict(line.split("=", 1) for line in listed if "=" in line)
    sections = {"core": {"no_scm": "true"}, "cache": {"dir": "cache", "type": "hardlink,copy"}}
    remotes = []
    for name, value in settings.items():
        if name.startswith("remote."):
            remote, _, key = name.removeprefix("remote.").rpartition(".")
            sections.setdefault(f"'remote \"{remote}\"'", {})[key] = value
            remotes += [remote] if key == "url" else []
    cache, copies = Path(settings.get("cache.dir", home / ".dvc/cache")), tree / ".dvc/cache"
    copies.mkdir(parents=True, exist_ok=True)
    edited = _copy_objects(md5, cache, copies)
    try:
        with local.open("w", encoding="utf-8") as file:
            for section, values in sections.items():
                file.write(f"[{section}]\n")
                for key, value in values.items():
                    quote = "'" if '"' in value else '"'
                    file.write(f"{key} = {quote}{value}{quote}\n")
        error = _fetch_data(tree, remotes)
    finally:
        local.unlink(missing_ok=True)
    if not error:
        with suppress(OSError):  # a shared cache that only others write
            _copy_objects(md5, copies, cache)
    elif edited:
        return f"{edited[0]} was edited in DVC's cache; {error}"
    return error


def _copy_objects(md5: str, source: Path, target: Path) -> list[Path]:
    """Copy a folder's list and its files from a cache to one that lacks them.

    Return the files in `source` that were edited, which are not copied.
    """
    hashes, edited = [md5], []
    for name in hashes:
        path = Path("files/md5", name[:2], name[2:])
        if (source / path).exists() and not (target / path).exists():
            (target / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / path, target / path)
            with (target / path).open("rb") as file:
                digest = hashlib.file_digest(file, "md5").hexdigest()
            if digest != name.removesuffix(".dir"):
                (target / path).unlink()
                edited.append(source / path)
        if name == md5 and (target / path).exists():
            hashes += [file["md5"] for file in files.read_json(target / path)]
    return edited


def _fetch_data(tree: Path, remotes: list[str]) -> str:
    """Check out data.dvc from the worktree's cache, or else from the first remote that has it."""
    done, errors = _dvc(tree, "checkout", "data.dvc"), []
    for remote in remotes:
        if done.returncode == 0:
            break
        done = _dvc(tree, "pull", "--remote", remote, "data.dvc")
        errors.append(f"{remote}: {' '.join(done.stderr.split())}")
    if done.returncode == 0:
        return ""
    missing = f"the remote {', '.join(remotes)}" if remotes else "a remote: there is none"
    return "; ".join([f"in neither DVC's cache nor {missing}", *errors])


def _dvc(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run a command of DVC, whose database of known hashes is the folder's own."""
    return subprocess.run(
        [sys.executable, "-m", "dvc", *arguments],
        cwd=folder,
        env=os.environ | {"DVC_SITE_CACHE_DIR": str(folder / ".dvc/tmp")},
        capture_output=True,
        text=True,
    )


def restore_initial_adapters(record: RunRecord, tree: Path) -> str | None:
    """Put the adapters that the run began with into the worktree; return their folder there.

    None where it began with new ones.

    Raises:
        UserError: where they are gone.
    """
    if "initial.digest" not in record.tags:
        return None
    kept = record.fetch_artifact(lineage.INITIAL)
    if kept is None:
        raise UserError("runs.no_initial_adapters", run=record.id, name=record.name)
    shutil.copytree(kept, tree / lineage.INITIAL)
    return lineage.INITIAL


def link_input(path: str, tree: Path) -> None:
    """Link a folder that a configuration names, that is here and that git does not have."""
    here, there = Workspace.here().home / path, tree / path
    if not Path(path).is_absolute() and here.is_dir() and not there.exists():
        there.parent.mkdir(parents=True, exist_ok=True)
        there.symlink_to(here)


def build_environment(record: RunRecord, tree: Path) -> dict[str, str]:
    """Return the variables for a stage in the worktree: its own code and store, the run's BLAS.

    Those of DVC and MLflow are left out: they name this repository and this store.
    """
    ours = ("DVC_", "MLFLOW_", "ATHANOR_BLAS", "PYTHONPATH", "GIT_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    path = [str(tree / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    blas = {"ATHANOR_BLAS": "wheel"} if record.tags.get("device", "").endswith("(wheel)") else {}
    return (
        kept
        | blas
        | {
            "PYTHONPATH": os.pathsep.join(path),
            "MLFLOW_TRACKING_URI": "sqlite:///mlruns/mlflow.db",  # in the worktree
        }
    )
