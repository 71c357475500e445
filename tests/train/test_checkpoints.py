"""Checkpoints: whole or skipped, the latest two, and never those of another training."""

from pathlib import Path

import mlx.core as mx
import pytest

from athanor.train.checkpoints import Checkpoint, Checkpoints, unfinished
from support.refused import refused

IDENTITY = {"seed": 0}


def checkpoint(iteration: int) -> Checkpoint:
    return Checkpoint(
        iteration,
        {"adapters": {"a.weight": mx.full((4, 3), iteration)}, "optimizer": {"step": mx.array(7)}},
        {"iteration": iteration, "loss": 0.1 + 0.2},
    )


def numbers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*/0*"))


def test_a_checkpoint_is_restored_as_it_was_saved(tmp_path: Path) -> None:
    saved = Checkpoints(tmp_path, IDENTITY)
    assert saved.latest() is None
    assert saved.save(checkpoint(10))
    latest = saved.latest()
    assert latest is not None
    assert latest.iteration == 10
    assert latest.state == {"iteration": 10, "loss": 0.1 + 0.2}
    assert set(latest.arrays) == {"adapters", "optimizer"}
    assert mx.array_equal(latest.arrays["adapters"]["a.weight"], mx.full((4, 3), 10))


def test_two_are_kept_until_the_training_has_ended(tmp_path: Path) -> None:
    saved = Checkpoints(tmp_path, IDENTITY)
    for iteration in (100, 200, 1000):
        saved.save(checkpoint(iteration))
    assert numbers(tmp_path) == ["0000200", "0001000"]
    assert unfinished(tmp_path) == [saved.folder]
    saved.clear()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["adapters.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("harm", ["truncated", "changed", "gone"])
def test_a_damaged_checkpoint_is_skipped(
    tmp_path: Path, name: str, harm: str, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = Checkpoints(tmp_path, IDENTITY)
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
    latest = saved.latest()
    assert latest is not None
    assert latest.iteration == 1
    warning = capsys.readouterr().err.replace("\n", "")
    assert f"{saved.folder}/0000002 is damaged" in warning


def test_a_half_written_checkpoint_is_removed(tmp_path: Path) -> None:
    saved = Checkpoints(tmp_path, IDENTITY)
    saved.save(checkpoint(1))
    half = saved.folder / ".0000002.abc"
    half.mkdir()
    (half / "adapters.safetensors").write_bytes(b"half")
    saved.close()
    again = Checkpoints(tmp_path, IDENTITY)
    latest = again.latest()
    assert latest is not None
    assert latest.iteration == 1
    assert not half.exists()


def test_another_training_has_other_checkpoints(tmp_path: Path) -> None:
    Checkpoints(tmp_path, IDENTITY).save(checkpoint(1))
    assert Checkpoints(tmp_path, {"seed": 1}).latest() is None


def test_two_processes_cannot_run_the_same_training(tmp_path: Path) -> None:
    first = Checkpoints(tmp_path, IDENTITY)
    with refused("train.already_running", folder=first.folder):
        Checkpoints(tmp_path, IDENTITY)
    first.close()
    Checkpoints(tmp_path, IDENTITY)
