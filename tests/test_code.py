"""The digest of code: of what it computes, not of how it is written down."""

import shutil
from pathlib import Path

import pytest

from athanor import code
from athanor.train.identity import CODE


@pytest.fixture
def copy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Return a copy of the package, which the digest is taken of."""
    shutil.copytree(code.SRC / "athanor", tmp_path / "athanor")
    monkeypatch.setattr(code, "SRC", tmp_path)
    return tmp_path / "athanor"


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


def test_docstrings_comments_and_layout_leave_the_digest(copy: Path) -> None:
    before = code.digest_code(CODE)
    batches = copy / "train/batches.py"
    edit(batches, '"""Return', '"""Produce')
    edit(batches, "# ", "# Rather: ")
    edit(batches, "import numpy as np\n", "import numpy as np  # arrays\n\n\n")
    edit(batches, "return Batch(", "return (  # a batch\n            Batch)(")
    assert code.digest_code(CODE) == before


@pytest.mark.parametrize(
    ("module", "old", "new"),
    [
        ("train/batches.py", "WINDOW = 256", "WINDOW = 255"),
        ("compute/losses.py", "return ", "return not "),
        ("files.py", '"rb"', '"r+b"'),
    ],
)
def test_an_edited_expression_changes_the_digest(
    copy: Path, module: str, old: str, new: str
) -> None:
    before = code.digest_code(CODE)
    edit(copy / module, old, new)
    assert code.digest_code(CODE) != before


def test_code_that_only_shows_or_records_is_no_part_of_it(copy: Path) -> None:
    before = code.digest_code(CODE)
    for path in ("console.py", "runs/run.py", "train/__main__.py"):
        with (copy / path).open("a", encoding="utf-8") as file:
            file.write("\nadded = 1\n")
    assert code.digest_code(CODE) == before
