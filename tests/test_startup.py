"""How a command starts: the code that it runs, its encoding and its streams."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PROBE = """
import sys
from pathlib import Path
import hydra_plugins
plugins = [path for path in hydra_plugins.__path__ if Path(path, "athanor_schema.py").exists()]
print(__file__, *plugins, *sys.argv[1:], "德哥")
"""


@pytest.fixture(scope="module")
def folder(repo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with code of its own, which has a command `probe`."""
    folder = tmp_path_factory.mktemp("项目")
    shutil.copytree(
        repo / "src", folder / "src", ignore=shutil.ignore_patterns("__pycache__", "[a-z]*.toml")
    )
    (folder / "src/athanor/probe.py").write_text(PROBE, encoding="utf-8")
    return folder


def probe(folder: Path, *options: str, **environment: str) -> "subprocess.CompletedProcess[bytes]":
    return subprocess.run(
        [sys.executable, *options, "-m", "athanor.probe", "a b", "-u"],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
    )


@pytest.mark.parametrize("installed", [True, False])
def test_a_command_runs_the_code_of_its_folder(
    repo: Path, folder: Path, tmp_path: Path, installed: bool
) -> None:
    """Whether other code is installed or named by PYTHONPATH, as a test of a queue has it."""
    environment = {} if installed else {"PYTHONPATH": str(repo / "src")}
    source = folder / "src"
    expected = f"{source}/athanor/probe.py {source}/hydra_plugins a b -u 德哥\n"
    done = probe(folder, **environment)
    assert done.stdout.decode() == expected, done.stderr
    # Where there is no code, the installed package stays what it was.
    assert b"No module named athanor.probe" in probe(tmp_path, **environment).stderr


def test_a_command_that_cannot_run_the_code_of_its_folder_is_refused(folder: Path) -> None:
    refused = probe(folder, "-I", PYTHONPATH="", ATHANOR_CODE=str(folder / "src"))
    assert refused.returncode == 1
    assert f"code of its own in {folder}/src/athanor".encode() in refused.stderr


def test_a_working_directory_that_was_removed_is_one_line(folder: Path) -> None:
    script = 'mkdir gone; cd gone; rmdir ../gone; exec "$0" -m athanor.ui'
    done = subprocess.run(["sh", "-c", script, sys.executable], cwd=folder, capture_output=True)
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr.startswith(b"error: the working directory was removed; ")
    assert done.stderr.count(b"\n") == 1


@pytest.mark.parametrize(
    ("encoding", "shown"), [("utf-8", "德哥".encode()), ("ascii", b"\\u5fb7\\u54e5")]
)
def test_files_are_utf8_and_output_is_the_terminals(
    folder: Path, encoding: str, shown: bytes
) -> None:
    locale = "C.UTF-8" if encoding == "utf-8" else "C"
    done = probe(folder, LC_ALL=locale, PYTHONUTF8="0", PYTHONCOERCECLOCALE="0", PYTHONPATH="")
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith(shown)


def test_closed_streams_are_replaced(folder: Path) -> None:
    script = 'exec "$0" -m athanor.probe <&- >&- 2>&-'
    assert subprocess.run(["sh", "-c", script, sys.executable], cwd=folder).returncode == 0


def test_a_low_limit_of_open_files_stops_no_import(folder: Path) -> None:
    code = "import athanor, resource; resource.setrlimit(resource.RLIMIT_NOFILE, (2048, 4096))"
    script = f"ulimit -n 64; exec {sys.executable} -c '{code}'"
    assert subprocess.run(["sh", "-c", script], cwd=folder).returncode == 0


def test_new_files_have_the_permissions_of_the_umask(tmp_path: Path) -> None:
    code = """
from pathlib import Path
from athanor import files
files.write_text(Path("private"), "")
with files.whole_folder(Path("folder")) as inside:
    pass
"""
    script = f"umask 027; exec {sys.executable} -c '{code}'"
    subprocess.run(["sh", "-c", script], cwd=tmp_path, check=True)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert modes == {"private": 0o640, "folder": 0o750}
