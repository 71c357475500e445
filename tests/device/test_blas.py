"""The number of BLAS threads: a configuration's, whatever the environment of the process says."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from athanor.config.compose import compose_config
from athanor.device import backend, blas
from athanor.paths import Workspace
from athanor.train.identity import training_identity

OPENBLAS = blas.library()
needs_openblas = pytest.mark.skipif(
    OPENBLAS is None or OPENBLAS.openblas_get_parallel() != 1,
    reason="no OpenBLAS whose threads can be set while it runs",
)


@pytest.fixture(autouse=True)
def by_default() -> Iterator[None]:
    yield
    blas.use_threads(None)


@needs_openblas
@pytest.mark.parametrize("outside", ["1", "2", "4"])
def test_the_environment_sets_no_threads(outside: str) -> None:
    code = (
        "from athanor.device import blas; import os;"
        "print(blas.threads(), blas.use_threads(3), blas.use_threads(None),"
        "os.environ['OMP_NUM_THREADS'])"
    )
    variables = {"OPENBLAS_NUM_THREADS": outside, "OMP_NUM_THREADS": outside}
    printed = subprocess.check_output([sys.executable, "-c", code], env=os.environ | variables)
    cores = blas.physical_cores()
    assert printed.decode().split() == [str(cores), "3", str(cores), outside]


@needs_openblas
def test_null_and_its_number_are_the_same_training(repo: Path, tmp_path: Path) -> None:
    cores = blas.physical_cores()
    configs = {
        asked: compose_config(repo / "conf", [f"train.blas_threads={asked or 'null'}"])
        for asked in (None, cores, cores + 1)
    }
    workspace = Workspace(tmp_path, tmp_path)
    base = SimpleNamespace(
        workspace=workspace,
        source=SimpleNamespace(path="tiny", commit=None, digest="d"),
        contract=SimpleNamespace(end=1, trains_end=False, rendering=SimpleNamespace(date=None)),
    )
    workspace.prepared.mkdir(parents=True)
    for split in ("train", "valid"):
        workspace.rows(split).touch()

    def decides(asked: int | None) -> dict[str, Any]:
        blas.use_threads(configs[asked].train.blas_threads)
        return training_identity(configs[asked], cast(Any, base))

    assert decides(None) == decides(cores)
    other = decides(cores + 1)
    assert {key for key, value in decides(None).items() if other[key] != value} == {
        "train.blas_threads",
        "device",
    }
    description = rf"cpu \S+ \(OpenBLAS [\d.]+\S* \w+, {cores + 1} threads\)"
    assert re.fullmatch(description, other["device"])


def test_another_blas_has_no_threads_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blas, "library", lambda: None)
    assert (blas.use_threads(4), blas.threads(), blas.version()) == (None, None, "wheel")
    if backend.on_cpu() and sys.platform == "linux":
        assert backend.describe_device().endswith("(wheel)")


@pytest.mark.skipif(sys.platform != "linux", reason="cores are told otherwise")
def test_cores_are_counted_once_and_only_those_this_process_may_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four cores of two logical ones each, of which the process may use two and a half."""
    for cpu in range(8):
        (tmp_path / str(cpu)).write_text(f"{cpu % 4},{cpu % 4 + 4}\n")
    monkeypatch.setattr(blas, "SIBLINGS", f"{tmp_path}/{{}}")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 4, 1, 5, 2})
    assert blas.physical_cores() == 3
    monkeypatch.setattr(blas, "SIBLINGS", f"{tmp_path}/none/{{}}")
    assert blas.physical_cores() == 5
