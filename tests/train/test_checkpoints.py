"""Checkpoints: whole or passed over, two of them, and never those of another training."""

from pathlib import Path

import mlx.core as mx
import pytest

from athanor.errors import UserError
from athanor.train.checkpoints import Checkpoint, Checkpoints, unfinished

ABOUT = {"seed": 0}


def checkpoint(iteration: int) -> Checkpoint:
    return Checkpoint(
        iteration,
        {"adapters": {"a.weight": mx.full((4, 3), iteration)}, "optimizer": {"step": mx.array(7)}},
        {"iteration": iteration, "loss": 0.1 + 0.2},
    )


def numbers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*/0*"))


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    saved = Checkpoints(tmp_path, ABOUT)
    assert saved.latest() is None
    assert saved.save(checkpoint(10))
    found = saved.latest()
    assert found is not None
    assert found.iteration == 10
    assert found.state == {"iteration": 10, "loss": 0.1 + 0.2}
    assert set(found.arrays) == {"adapters", "optimizer"}
    assert mx.array_equal(found.arrays["adapters"]["a.weight"], mx.full((4, 3), 10))


def test_two_are_kept_until_the_training_has_ended(tmp_path: Path) -> None:
    saved = Checkpoints(tmp_path, ABOUT)
    for iteration in (100, 200, 1000):
        saved.save(checkpoint(iteration))
    assert numbers(tmp_path) == ["0000200", "0001000"]
    assert unfinished(tmp_path) == [saved.folder]
    saved.clear()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["adapters.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("harm", ["truncated", "changed", "gone"])
def test_a_damaged_one_is_passed_over(
    tmp_path: Path, name: str, harm: str, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = Checkpoints(tmp_path, ABOUT)
    for iteration in (1, 2):
        saved.save(checkpoint(iteration))
    path = saved.folder / "0000002" / name
    content = path.read_bytes()
    if harm == "gone":
        path.unlink()
    else:
        half = len(content) // 2
        path.write_bytes(
            content[:half] + (b"" if harm == "truncated" else b"?" + content[half + 1 :])
        )
    found = saved.latest()
    assert found is not None
    assert found.iteration == 1
    said = capsys.readouterr().err.replace("\n", "")
    assert f"{saved.folder}/0000002 is damaged" in said


def test_what_a_kill_left_half_written_is_no_checkpoint(tmp_path: Path) -> None:
    saved = Checkpoints(tmp_path, ABOUT)
    saved.save(checkpoint(1))
    half = saved.folder / ".0000002.abc"
    half.mkdir()
    (half / "adapters.safetensors").write_bytes(b"half")
    saved.close()
    again = Checkpoints(tmp_path, ABOUT)
    found = again.latest()
    assert found is not None
    assert found.iteration == 1
    assert not half.exists()


def test_another_training_has_other_checkpoints(tmp_path: Path) -> None:
    Checkpoints(tmp_path, ABOUT).save(checkpoint(1))
    assert Checkpoints(tmp_path, {"seed": 1}).latest() is None


def test_two_processes_can_not_be_at_the_same_training(tmp_path: Path) -> None:
    first = Checkpoints(tmp_path, ABOUT)
    with pytest.raises(UserError, match="another process is at this very training"):
        Checkpoints(tmp_path, ABOUT)
    first.close()
    Checkpoints(tmp_path, ABOUT)
