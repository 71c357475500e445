"""The verdict on a run that was trained again, and runs that cannot be."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from athanor import reproduce
from athanor.runs import compare, tracking_store
from support.records import create_run
from support.refused import refused

SAME = {"val_loss": (2.0, 2.0), "test_exact_match": (1.0, 1.0)}


@pytest.mark.parametrize(
    ("recorded", "pairs", "same_rows", "elsewhere", "expected"),
    [
        ("a", SAME, True, False, "match: the same bytes, the same metrics"),
        ("a", SAME, True, True, "match: the same bytes, the same metrics"),
        ("a", {}, True, False, "no match: the run has no metrics"),
        ("", SAME, True, False, "no match: the run has no adapters"),
        ("", {}, True, True, "no match: the run has no adapters and no metrics"),
        ("b", {}, True, False, "differs: adapters"),
        ("b", SAME, True, False, "differs: adapters"),
        ("b", SAME | {"val_loss": (2.0, 2.01)}, True, True, "close: "),
        ("b", SAME | {"val_loss": (2.0, 2.1)}, True, True, "differs: adapters, 1 of 2 metrics"),
        ("b", SAME | {"val_loss": (2.0, 2.01)}, False, True, "differs: rows, adapters, 1 of 2"),
        ("b", {"test_exact_match": (1.0, 0.5)}, True, True, "differs: adapters, 1 of 1 metrics"),
        ("a", SAME | {"val_loss": (2.0, 2.01)}, True, False, "differs: 1 of 2 metrics"),
    ],
)
def test_only_the_same_bytes_and_metrics_are_a_match(
    recorded: str,
    pairs: dict[str, tuple[float, float]],
    same_rows: bool,
    elsewhere: bool,
    expected: str,
) -> None:
    match, text = reproduce.verdict(recorded, "a", pairs, same_rows, elsewhere)
    assert text.startswith(expected)
    assert match == expected.startswith("match")


def test_a_run_without_a_result_is_not_made_again(runs_store: Path, tmp_path: Path) -> None:
    client = tracking_store.connect()
    run_id = create_run(run_name="a run")

    def load_configuration() -> dict[str, Any]:
        return reproduce.configuration(compare.load_record(run_id, tmp_path))

    with refused("reproduce.unfinished_run", name="a run", status="RUNNING"):
        load_configuration()
    client.set_tag(run_id, "failure", "the loss is nan")
    client.set_terminated(run_id, "FAILED")
    with refused("reproduce.failed_run", status="FAILED", failure="the loss is nan"):
        load_configuration()
    client.set_terminated(run_id, "FINISHED")
    with refused("reproduce.no_configuration", run=run_id):
        load_configuration()

    # A model of a hub is the one of then, whatever its branch is at now.
    client.log_text(run_id, "model: {path: owner/name, revision: main}\n", "params.yaml")
    client.set_tag(run_id, "model.commit", "c0ffee")
    assert load_configuration() == {"model": {"path": "owner/name", "revision": "c0ffee"}}


@pytest.mark.parametrize(
    ("configured", "recorded", "restored"),
    [(None, "4", 4), (1, "1", 1), (None, "None", None), (3, "2", 3)],
)
def test_the_recorded_number_of_threads_and_date_are_restored(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    configured: int | None,
    recorded: str,
    restored: int | None,
) -> None:
    """What null stood for on the machine of the run; 3 is what could not be set there."""
    config = {"model": {}, "data": {"date": None}, "train": {"blas_threads": configured}}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    monkeypatch.setattr(compare.RunRecord, "fetch_artifact", lambda self, path: tmp_path / path)
    params = {"train.blas_threads": recorded}
    tags = {"template.date": "2026-07-31"}
    run = compare.RunRecord("1", "a run", "FINISHED", tags, params, {}, {}, tmp_path)
    assert reproduce.configuration(run)["train"]["blas_threads"] == restored
    assert reproduce.configuration(run)["data"]["date"] == "2026-07-31"
