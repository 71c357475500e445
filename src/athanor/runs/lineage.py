"""What a run was made from, so that it can be made again: code, rows, libraries, machine.

Kept in a run: tags (commit, code, data's DVC hash), and the artifacts

    code.patch       what the code differed in from its commit, as `git apply` takes it, if it did
    versions.json    of the libraries that decide a result, of Python, and the machine
    data/rows.npz    an array a split: a digest of 8 bytes a prepared row, in their order

Rows have digests of their own because data.dvc can name older rows than those that were prepared,
and because only so it can be said later which of them are others.
"""

import getpass
import hashlib
import json
import os
import platform
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

# What is in a patch: all that decides how a stage runs. Configuration and data are kept by value.
CODE = ("src", "pyproject.toml", "dvc.yaml")
# What desktops, editors and Python leave there, and a person's secrets, such as .env.
NO_CODE = (
    *(":(exclude,glob)**/.*", ":(exclude,glob)**/.*/**"),
    ":(exclude,glob)**/__pycache__/**",
)
MOST_BYTES = 1_000_000  # of a file in a patch that git does not know
PATCH, ROWS, VERSIONS = "code.patch", "rows.npz", "versions.json"
# Those that decide a prepared row, a weight or a figure; what is not installed is left out.
LIBRARIES = (
    *("mlx", "mlx-cpu", "mlx-metal", "mlx-cuda-12", "mlx-cuda-13", "mlx-lm", "numpy"),
    *("transformers", "tokenizers", "sentencepiece", "jinja2", "safetensors", "pyarrow", "msgspec"),
    *(
        "markdown-it-py",
        "datasketch",
        "datasets",
        "jieba",
        "scikit-learn",
        "rapidfuzz",
        "sacrebleu",
    ),
)


def collect_tags() -> dict[str, str]:
    """Tags that say which code, data and libraries a run was made with."""
    found = {
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
        found["dvc.data"] = yaml.safe_load(tracked.read_text(encoding="utf-8"))["outs"][0]["md5"]
    if experiment := os.environ.get("DVC_EXP_NAME"):
        found["dvc.experiment"] = experiment
    return found


def record_lineage(run: "Run", prepared: Path) -> None:
    """Keeps in a training's run the code as it is, a digest of every prepared row, and versions.

    To be said at every start of it: the commit's tags are said again with the patch, since a
    training that goes on may do so after a commit.
    """
    import numpy as np

    commit, digest, changes = describe_running_code(Path(__file__).parents[1])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if changes:
            (folder / PATCH).write_bytes(changes)
            run.log_artifact(folder / PATCH)
        np.savez(folder / ROWS, allow_pickle=False, **hash_splits(prepared))
        run.log_artifact(folder / ROWS, "data")
    run.set_tags(
        {
            **commit,
            "code.digest": digest,
            "code.patch": hashlib.sha256(changes).hexdigest() if changes else "none",
        }
    )
    run.log_text(json.dumps(collect_versions(), indent=2) + "\n", VERSIONS)


def hash_adapters(folder: Path) -> str:
    """The sha256 of the adapters in a folder: of the file alone, as sha256sum has it."""
    with (folder / "adapters.safetensors").open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_rows(path: Path) -> "np.ndarray":
    """A digest a line of a JSONL file, in order: uint64 of shape (lines,); a second a million.

    A sweep asks for those of the same files at each of its points, so the last ones are kept.
    """
    found = path.stat()
    return _hash_rows(path.resolve(), found.st_ino, found.st_mtime_ns, found.st_size)


@lru_cache(maxsize=len(SPLITS))
def _hash_rows(path: Path, *state: int) -> "np.ndarray":
    import numpy as np

    with path.open("rb") as file:
        found = (hashlib.blake2b(line.rstrip(b"\n"), digest_size=8).digest() for line in file)
        return np.frombuffer(b"".join(found), dtype="<u8")


def hash_splits(prepared: Path) -> "dict[str, np.ndarray]":
    """The digests of the rows of each split that is there."""
    paths = {split: prepared / f"{split}.jsonl" for split in SPLITS}
    return {split: hash_rows(path) for split, path in paths.items() if path.exists()}


def hash_code(package: Path) -> str:
    """The sha256 over names and contents of a package's files, those of folders in it included.

    Hidden ones are no code. CRLF counts as LF: git makes one of the other on some machines.
    """
    total = hashlib.sha256()
    for path in sorted(package.rglob("*")):
        name = path.relative_to(package)
        no_code = any(part.startswith(".") or part == "__pycache__" for part in name.parts)
        if path.is_file() and not no_code:
            content = hashlib.sha256(path.read_bytes().replace(b"\r\n", b"\n")).hexdigest()
            total.update(f"{name.as_posix()} {content}\n".encode())
    return total.hexdigest()


@cache
def describe_running_code(package: Path) -> tuple[dict[str, str], str, bytes]:
    """The commit's tags, the digest and the patch of the code that runs.

    They are as when this is first asked: what is edited or committed while a sweep goes on does not
    run in it, and its points need not look for it.
    """
    top = find_repository()
    return _commit(top), hash_code(package), make_patch(top) if top else b""


def _command() -> str:
    """Return the name of the running command: train for train/__main__.py."""
    script = Path(sys.argv[0])
    return script.parent.name if script.stem == "__main__" else script.stem


def find_repository() -> Path | None:
    """The git repository of the code that runs here; None where it was installed as a copy.

    That need not be the one of the folder it runs in: an experiment of DVC's queue runs in a folder
    of its own, with the code that is installed.
    """
    package = Path(__file__).parents[1]
    # A virtual environment lies in a repository too, but in one that ignores it.
    shown = run_git(
        package, "ls-files", "--cached", "--others", "--exclude-standard", "__init__.py"
    )
    top = run_git(package, "rev-parse", "--show-toplevel")
    return Path(top) if shown and top else None


def make_patch(top: Path) -> bytes:
    """What the code in a git repository differs in from its commit, as `git apply` takes it.

    Files that git neither knows nor ignores are in it, but large ones, and that is said. Hidden
    files are not. It is made with an index of its own: what a person has staged stays as it is.
    Empty where nothing differs, or where there is no commit.
    """
    with tempfile.TemporaryDirectory() as folder:
        index = {"GIT_INDEX_FILE": f"{folder}/index"}
        run_git(top, "read-tree", "HEAD", **index)
        others = ("ls-files", "--others", "--exclude-standard", "-z", "--", *CODE, *NO_CODE)
        new = []
        for name in _git(top, *others, environment=index).split(b"\0")[:-1]:
            size = (top / os.fsdecode(name)).lstat().st_size
            if size <= MOST_BYTES:
                new.append(name)
                continue
            console.warn(
                f"{os.fsdecode(name)} ({size / 1e6:,.0f} MB) is in no commit, and too large to be "
                "kept with the run: commit it, or have git ignore it"
            )
        if new:
            add = ("add", "--intent-to-add", "--pathspec-from-file=-", "--pathspec-file-nul")
            _git(top, "--literal-pathspecs", *add, environment=index, given=b"\0".join(new))
        form = ("-U3", "--binary", "--no-ext-diff", "--no-textconv", "--no-color", "--no-renames")
        prefixes = ("--src-prefix=a/", "--dst-prefix=b/")
        return _git(top, "diff", *form, *prefixes, "HEAD", "--", *CODE, *NO_CODE, environment=index)


def collect_versions() -> dict[str, str]:
    """The versions of what decides a result, and the machine, by name."""
    found = {
        "python": platform.python_version(),
        "platform": _platform(),
        "cpu": _cpu(),
        "cores": str(os.cpu_count()),
        "blas": blas.configuration(),
    }
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def run_git(folder: Path, *arguments: str, **environment: str) -> str:
    """What git says in a folder; nothing where it fails, or is not there."""
    return _git(folder, *arguments, environment=environment).decode("utf-8", "replace").strip()


def _git(
    folder: Path, *arguments: str, environment: dict[str, str] | None = None, given: bytes = b""
) -> bytes:
    # In a hook these name the repository of the hook.
    hooks = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_PREFIX")
    inherited = {key: value for key, value in os.environ.items() if key not in hooks}
    try:
        found = subprocess.run(
            ["git", *arguments],
            cwd=folder,
            env=inherited | (environment or {}),
            input=given,
            capture_output=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return b""
    return found.stdout


def _commit(top: Path | None) -> dict[str, str]:
    commit = run_git(top, "rev-parse", "HEAD") if top else ""
    if not top or not commit:
        return {}
    outputs = (":(exclude)params.yaml", ":(exclude)dvc.lock")
    dirty = bool(run_git(top, "status", "--porcelain", "--", ".", *outputs))
    return {"mlflow.source.git.commit": commit, "git.dirty": str(dirty).lower()}


def _platform() -> str:
    """The system without its kernel, which decides no result."""
    release = platform.mac_ver()[0] or "-".join(filter(None, platform.libc_ver()))
    return " ".join(filter(None, [platform.system(), release, platform.machine()]))


def _cpu() -> str:
    """The processor's name: two of them may round otherwise with the same libraries."""
    if sys.platform == "linux":
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        names = [line.partition(":")[2] for line in text.splitlines() if "model name" in line]
        return names[0].strip() if names else platform.machine()
    if sys.platform == "darwin":
        asked = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(asked, capture_output=True, text=True).stdout.strip()
    return platform.processor()


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user that has no name
        return ""
