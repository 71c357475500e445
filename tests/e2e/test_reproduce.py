"""Runs made again in a real git and DVC repository, after code, data and configuration moved on."""

import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from support import workspace
from support.workspace import Workspace

LORA = Path("conf/train/lora.yaml")
MODELS = Path("src/athanor/model/adapters.py")
TRAIN = Path("data/train.jsonl")
# A folder that is not ASCII, with characters that a URI or a shell gives a meaning to.
ODD = "用户 项目#1%41&é"


def stages(clone: Workspace, *names: str) -> str:
    """Run stages as a person does by hand; return the id of the run."""
    for name in names:
        clone.run("python", "-m", f"athanor.{name}")
    return str(clone.json("artifacts/train/run.json")["run_id"])


def reproduce(clone: Workspace, run_id: str, **variables: str) -> tuple[int, str]:
    """Return the exit status and output of `reproduce`, which leaves no worktree in any case."""
    done = subprocess.run(
        ["python", "-m", "athanor.reproduce", run_id],
        cwd=clone.folder,
        env=clone.env() | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert clone.run("git", "worktree", "list").count("\n") == 1
    return done.returncode, done.stdout


def row(text: str, name: str) -> list[str]:
    """Return the cells of a row of the last table."""
    lines = reversed([line.strip() for line in text.splitlines()])
    line = next(line for line in lines if line.startswith(f"{name}  "))
    return re.split(r"\s{2,}", line)[1:]


@pytest.fixture(scope="module")
def runs(repo: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Workspace, str]:
    """A repository whose code, rows and configuration differ from those of its run."""
    clone = workspace.of_the_repository(repo, tmp_path_factory.mktemp("clone") / ODD)
    shutil.copytree(data, clone.folder / "data")
    text = (clone.folder / LORA).read_text(encoding="utf-8")
    iters = next(line for line in text.splitlines() if line.startswith("iters:"))
    clone.edit(LORA, iters, "iters: 3")
    clone.edit(TRAIN, "德哥", "李哥")
    clone.run("dvc", "add", "-q", "data")
    clone.run("git", "commit", "-qam", "The rows and iterations of the run")
    then = stages(clone, "config", "prepare", "train", "test")

    clone.edit(LORA, "iters: 3", "iters: 2")
    clone.edit(MODELS, "mx.random.seed(seed)", "mx.random.seed(seed + 1)")
    clone.edit(TRAIN, "李哥", "王哥")
    clone.edit(TRAIN, "星期八", "星期九")
    clone.run("dvc", "add", "-q", "data")
    clone.run("git", "commit", "-qam", "Other code, rows and iterations")
    return clone, then


@pytest.fixture(scope="module")
def dirty(runs: tuple[Workspace, str]) -> str:
    """A run of code that was never committed and is lost."""
    clone, _ = runs
    clone.edit(MODELS, "seed + 1", "seed + shift.BY")
    clone.edit(MODELS, "import files", "import files, shift")
    (clone.folder / "src/athanor/shift.py").write_text("BY = 2\n", encoding="utf-8")
    run_id = stages(clone, "config", "prepare", "train")
    clone.run("git", "checkout", "-q", "--", "src")
    (clone.folder / "src/athanor/shift.py").unlink()
    return run_id


def test_older_commit_other_rows_and_another_configuration_match(
    runs: tuple[Workspace, str],
) -> None:
    clone, then = runs
    kept = (clone.folder / "artifacts/train/adapters/adapters.safetensors").read_bytes()
    before = clone.run("git", "status", "--porcelain")
    variables = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}  # not what the run had
    code, printed = reproduce(clone.cold(), then[:8], **variables)
    assert code == 0, printed
    assert printed.splitlines()[-1] == "match: the same bytes, the same metrics"
    assert row(printed, "adapters")[2] == "the same bytes"
    assert row(printed, "train rows") == ["6", "6", "the same"]
    assert row(printed, "test_loss")[2] == "the same"
    assert "note:" not in printed
    # The person's files are unchanged.
    assert clone.run("git", "status", "--porcelain") == before
    path = clone.folder / "artifacts/train/adapters/adapters.safetensors"
    assert path.read_bytes() == kept


def test_code_that_was_never_committed_is_restored_by_its_patch(
    runs: tuple[Workspace, str], dirty: str
) -> None:
    clone, _ = runs
    assert clone.mlflow_run(dirty).data.tags["git.dirty"] == "true"
    code, printed = reproduce(clone, dirty)
    assert code == 0, printed
    assert "match" in printed.splitlines()[-1]
    assert "test_loss" not in printed  # the record has none


def test_rows_that_were_altered_are_named(
    runs: tuple[Workspace, str], dirty: str, tmp_path: Path
) -> None:
    """The data is gone from the cache; the remote of the demo rows never had it."""
    clone = runs[0].copy(tmp_path / "athanor")
    md5 = clone.mlflow_run(dirty).data.tags["dvc.data"]
    (clone.folder / ".dvc/cache/files/md5" / md5[:2] / md5[2:]).unlink()
    clone.edit(TRAIN, "因为电很贵", "因为油很贵")
    code, printed = reproduce(clone, dirty)
    assert code == 1, printed
    assert f"the data {md5} cannot be restored" in printed
    assert "demo" in printed
    [place] = re.findall(r"^ +(train.jsonl:\d+) .*因为油很贵", printed, re.MULTILINE)
    assert f"gone: what was {place}" in printed
    assert row(printed, "train rows") == ["6", "6", "5 in both"]
    assert row(printed, "valid rows") == ["3", "3", "the same"]
    assert "of the greatest weight apart" in row(printed, "adapters")[2]
    assert printed.splitlines()[-1].startswith("differs: rows, adapters, ")


def test_diff_says_what_differs_in_a_few_lines(runs: tuple[Workspace, str], dirty: str) -> None:
    clone, then = runs
    printed = clone.run("python", "-m", "athanor.diff", then[:8], dirty[:8])
    assert "  train.iters: 3 -> 2" in printed
    assert re.search(r"  data/: \w{12} -> \w{12}", printed)
    # Two rows of six differ.
    assert re.search(
        r"train rows: 2 \(lines .*\) only in the first; 2 \(.*second; 4 in both", printed
    )
    assert "valid rows" not in printed
    assert re.search(r"  code: \w{12} -> \w{12} with changes", printed)
    assert re.search(r"src/athanor/model/adapters.py \| +2 ", printed)
    assert (
        "not committed in the second: src/athanor/model/adapters.py, src/athanor/shift.py"
        in printed
    )
    assert "mlx" not in printed.replace("mlx-lm", "")
    assert "device" not in printed
    loss = row(printed, "val_loss")
    assert float(loss[2]) == pytest.approx(float(loss[1]) - float(loss[0]), rel=1e-3)
    assert clone.run("python", "-m", "athanor.diff", then, then).splitlines()[-1] == (
        "nothing differs"
    )


def test_run_that_is_not_there_is_refused(runs: tuple[Workspace, str]) -> None:
    clone, then = runs
    code, printed = reproduce(clone, "zzz")
    assert code == 1
    assert "begins with zzz" in printed
    assert then in printed


def test_interrupted_it_leaves_no_worktree(runs: tuple[Workspace, str], tmp_path: Path) -> None:
    clone, then = runs
    process = subprocess.Popen(
        ["python", "-u", "-m", "athanor.reproduce", then],
        cwd=clone.folder,
        env=clone.env() | {"TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("prepare"):
            break
    assert len(list(tmp_path.glob("athanor-*/src/athanor"))) == 1
    process.send_signal(signal.SIGTERM)
    process.stdout.close()
    assert process.wait() == 130
    assert list(tmp_path.iterdir()) == []
    assert clone.run("git", "worktree", "list").count("\n") == 1
