"""The lineage of a run, from which it can be trained again: code, rows, libraries, machine.

A run has it as tags (commit, digest of the code, DVC's hash of the data) and as artifacts:

    code.patch       the changes of the code since its commit, for `git apply`, if there are any
    versions.json    the versions of Python and of the deciding libraries, and the machine
    initial_adapters the adapters that the training began with, if there are any
    data/rows.npz    an array for each split: a digest of 8 bytes for each prepared row, in order

Rows have digests of their own because data.dvc can name older rows than the prepared ones, and to
tell later which rows differ.
"""

import getpass
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from functools import cache, lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from athanor import __version__, console
from athanor.device import blas
from athanor.paths import SPLITS

if TYPE_CHECKING:
    import numpy as np

    from athanor.runs.run import Run

# A patch holds all that decides how a stage runs. Configuration and data are recorded by value.
CODE = ("src", "pyproject.toml", "dvc.yaml")
# Files of desktops, editors and Python, and a person's secrets, such as .env.
NO_CODE = (
    *(":(exclude,glob)**/.*", ":(exclude,glob)**/.*/**"),
    ":(exclude,glob)**/__pycache__/**",
)
MOST_BYTES = 1_000_000  # of an untracked file in a patch
# The tag of the date that the chat template wrote.
DATE = "template.date"
PATCH, ROWS, VERSIONS = "code.patch", "rows.npz", "versions.json"
INITIAL = "initial_adapters"
# They decide a prepared row, a weight or a metric; those that are not installed are left out.
LIBRARIES = (
    *("mlx", "mlx-cpu", "mlx-metal", "mlx-cuda-12", "mlx-cuda-13", "mlx-lm", "numpy"),
    *("transformers", "tokenizers", "sentencepiece", "jinja2", "safetensors", "pyarrow", "msgspec"),
    *("markdown-it-py", "datasketch", "datasets", "jieba", "scikit-learn", "rapidfuzz"),
    "sacrebleu",
)


def collect_tags() -> dict[str, str]:
    """Return the tags that name the code, data and libraries of a run."""
    tags = {
        "mlflow.user": _user(),
        "mlflow.source.type": "LOCAL",
        "mlflow.source.name": f"athanor.{_command()}",
        "athanor.version": __version__,
        "mlx.version": version("mlx"),
        "mlx_lm.version": version("mlx-lm"),
        **describe_running_code(Path(__file__).parents[1])[0],
    }
    tracked = Path("data.dvc")
    if tracked.exists():
        tags["dvc.data"] = yaml.safe_load(tracked.read_text(encoding="utf-8"))["outs"][0]["md5"]
    if experiment := os.environ.get("DVC_EXP_NAME"):
        tags["dvc.experiment"] = experiment
    return tags


def record_lineage(run: "Run", prepared: Path) -> None:
    """Record a training's code, the digest of every prepared row, and the versions.

    A training that continues calls it again, because the code may have been committed in between.
    """
    import numpy as np

    commit, digest, patch = describe_running_code(Path(__file__).parents[1])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if patch:
            (folder / PATCH).write_bytes(patch)
            run.log_artifact(folder / PATCH)
        np.savez(folder / ROWS, allow_pickle=False, **hash_splits(prepared))
        run.log_artifact(folder / ROWS, "data")
    run.set_tags(
        {
            **commit,
            "code.digest": digest,
            "code.patch": hashlib.sha256(patch).hexdigest() if patch else "none",
        }
    )
    run.log_text(json.dumps(collect_versions(), indent=2) + "\n", VERSIONS)


def hash_adapters(folder: Path) -> str:
    """Return the sha256 of the adapters' file in a folder."""
    with (folder / "adapters.safetensors").open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_rows(path: Path) -> "np.ndarray":
    """Return the digests of a JSONL file's lines in order: uint64 of shape (lines,).

    A million lines take a second. The last results are cached for the trials of a sweep.
    """
    stat = path.stat()
    return _hash_rows(path.resolve(), stat.st_ino, stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=len(SPLITS))
def _hash_rows(path: Path, *state: int) -> "np.ndarray":
    import numpy as np

    with path.open("rb") as file:
        digests = (hashlib.blake2b(line.rstrip(b"\n"), digest_size=8).digest() for line in file)
        return np.frombuffer(b"".join(digests), dtype="<u8")


def hash_splits(prepared: Path) -> "dict[str, np.ndarray]":
    """Return the digests of the rows of each split that exists."""
    paths = {split: prepared / f"{split}.jsonl" for split in SPLITS}
    return {split: hash_rows(path) for split, path in paths.items() if path.exists()}


def hash_code(package: Path) -> str:
    """Return the sha256 over names and contents of a package's files, except hidden ones.

    CRLF counts as LF, because git converts one to the other on some machines.
    """
    total = hashlib.sha256()
    for path in sorted(package.rglob("*")):
        name = path.relative_to(package)
        hidden = any(part.startswith(".") or part == "__pycache__" for part in name.parts)
        if path.is_file() and not hidden:
            content = hashlib.sha256(path.read_bytes().replace(b"\r\n", b"\n")).hexdigest()
            total.update(f"{name.as_posix()} {content}\n".encode())
    return total.hexdigest()


@cache
def describe_running_code(package: Path) -> tuple[dict[str, str], str, bytes]:
    """Return the commit's tags, the digest and the patch of the running code.

    They are computed once: edits and commits during a sweep do not change the code that it runs.
    """
    top = find_repository()
    return _commit(top), hash_code(package), make_patch(top) if top else b""


def _command() -> str:
    """Return the name of the running command: train for train/__main__.py."""
    script = Path(sys.argv[0])
    return script.parent.name if script.stem == "__main__" else script.stem


def find_repository() -> Path | None:
    """Return the git repository of the running code, None if the code was installed as a copy.

    It can differ from the working directory's, which may have no code of its own.
    """
    package = Path(__file__).parents[1]
    # A virtual environment can lie in a repository, which ignores it.
    listed = run_git(
        package, "ls-files", "--cached", "--others", "--exclude-standard", "__init__.py"
    )
    top = run_git(package, "rev-parse", "--show-toplevel")
    if not top and shutil.which("git"):
        _warn_of_owner(package)
    return Path(top) if listed and top else None


def _warn_of_owner(folder: Path) -> None:
    """Warn where git reads no repository because it belongs to another user."""
    command = ["git", "-C", str(folder), "rev-parse"]
    english = os.environ | {"LC_ALL": "C"}
    errors = subprocess.run(command, env=english, capture_output=True, text=True).stderr
    owned = re.search(r"dubious ownership in repository at '(.*)'", errors)
    if owned:
        console.warn(
            f"{owned[1]} belongs to another user, so that git reads nothing of it, and the run has "
            f"no commit: `git config --global --add safe.directory {owned[1]}`"
        )


def make_patch(top: Path) -> bytes:
    """Return the changes of a repository's code since its commit, for `git apply`.

    Untracked files are included unless they are ignored, hidden, or large, which is reported. An
    index of its own leaves the person's as it is. Empty if nothing changed or there is no commit.
    """
    with tempfile.TemporaryDirectory() as folder:
        index = {"GIT_INDEX_FILE": f"{folder}/index"}
        run_git(top, "read-tree", "HEAD", **index)
        list_untracked = ("ls-files", "--others", "--exclude-standard", "-z", "--", *CODE, *NO_CODE)
        new = []
        for name in _git(top, *list_untracked, environment=index).split(b"\0")[:-1]:
            size = (top / os.fsdecode(name)).lstat().st_size
            if size <= MOST_BYTES:
                new.append(name)
                continue
            console.warn(
                f"{os.fsdecode(name)} ({size / 1e6:,.0f} MB) is in no commit and too large to "
                "record with the run; commit it, or have git ignore it"
            )
        if new:
            add = ("add", "--intent-to-add", "--pathspec-from-file=-", "--pathspec-file-nul")
            _git(top, "--literal-pathspecs", *add, environment=index, stdin=b"\0".join(new))
        form = ("-U3", "--binary", "--no-ext-diff", "--no-textconv", "--no-color", "--no-renames")
        prefixes = ("--src-prefix=a/", "--dst-prefix=b/")
        return _git(top, "diff", *form, *prefixes, "HEAD", "--", *CODE, *NO_CODE, environment=index)


def collect_versions() -> dict[str, str]:
    """Return the versions of all that decides a result, and the machine, by name."""
    versions = {
        "python": platform.python_version(),
        "platform": _platform(),
        "cpu": _cpu(),
        "cores": str(os.cpu_count()),
        "blas": blas.configuration(),
    }
    for name in LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def run_git(folder: Path, *arguments: str, **environment: str) -> str:
    """Return the output of git in a folder, empty if it fails or is not installed."""
    return _git(folder, *arguments, environment=environment).decode("utf-8", "replace").strip()


def _git(
    folder: Path, *arguments: str, environment: dict[str, str] | None = None, stdin: bytes = b""
) -> bytes:
    # In a hook these name the hook's repository.
    hooks = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_PREFIX")
    inherited = {key: value for key, value in os.environ.items() if key not in hooks}
    try:
        done = subprocess.run(
            ["git", *arguments],
            cwd=folder,
            env=inherited | (environment or {}),
            input=stdin,
            capture_output=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return b""
    return done.stdout


def _commit(top: Path | None) -> dict[str, str]:
    commit = run_git(top, "rev-parse", "HEAD") if top else ""
    if not top or not commit:
        return {}
    outputs = (":(exclude)params.yaml", ":(exclude)dvc.lock")
    dirty = bool(run_git(top, "status", "--porcelain", "--", ".", *outputs))
    return {"mlflow.source.git.commit": commit, "git.dirty": str(dirty).lower()}


def _platform() -> str:
    """Return the system without its kernel, which decides no result."""
    release = platform.mac_ver()[0] or "-".join(filter(None, platform.libc_ver()))
    return " ".join(filter(None, [platform.system(), release, platform.machine()]))


def _cpu() -> str:
    """Return the processor's name; processors can round differently with the same libraries."""
    if sys.platform == "linux":
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        names = [line.partition(":")[2] for line in text.splitlines() if "model name" in line]
        return names[0].strip() if names else platform.machine()
    if sys.platform == "darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return platform.processor()


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return ""
