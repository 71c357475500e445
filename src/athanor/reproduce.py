"""Train a run again and compare the result with its record.

    uv run python -m athanor.reproduce 3780998
    uv run python -m athanor.reproduce 3780998 --keep      # keep the worktree to look at

Reads the run from MLflow by its id or the beginning of it. Its commit, patch, configuration and
data are restored in a git worktree in a temporary folder, where prepare, train and test run with a
store of their own; nothing is written here. Reports anything that cannot be restored. Exits with 0
only for a match: the same bytes and the same metrics.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from athanor import console, files
from athanor.device import blas
from athanor.errors import UserError
from athanor.paths import SPLITS, Workspace
from athanor.runs import compare, lineage, restore
from athanor.runs.compare import RowChanges, RunRecord

# Losses this near, absolutely or relatively, are called close; a GPU computes none twice alike.
NEAR, RELATIVELY = 1e-3, 1e-2
ROWS_SHOWN = 10
ADAPTERS = "adapters/adapters.safetensors"


def reproduce(record: RunRecord, keep: bool) -> bool:
    """Train a run again and print the comparison; return whether it is a match.

    Raises:
        UserError: if the run has no result, or a stage fails.
    """
    config = configuration(record)
    console.out.print(f"run {record.id}, {record.name}", soft_wrap=True)
    repository, commit = restore.find_commit(record.tags)
    notes: list[str] = []

    def note(texts: Iterable[str]) -> None:
        for text in texts:
            console.warn(text)
            notes.append(text)

    with restore.open_worktree(repository, commit or "HEAD", keep) as tree:
        workspace = Workspace(tree, tree)
        note(restore.restore_code(record, repository, commit, tree))
        from_dvc = config["data"].get("dataset") is None
        lost_data = list(restore.restore_data(record, tree)) if from_dvc else []
        note(lost_data)
        for path in (config["model"]["path"], config["data"].get("dataset")):
            if path is not None:
                restore.link_input(path, tree)
        if initial := restore.restore_initial_adapters(record, tree):
            config["train"]["resume_adapter_file"] = initial
        blas.use_threads(config["train"].get("blas_threads"))
        environment_changes = list(_list_environment_changes(record, commit))
        note(environment_changes)
        variables = restore.build_environment(record, tree)
        _write_params(workspace, config)

        _run_stage("prepare", tree, variables)
        model = files.read_json(workspace.prepared / "model.json")["digest"]
        if model != record.tags.get("model.digest", model):
            note([f"the base model {config['model']['path']} differs from the run's"])
        rows = {
            split: compare.compare_rows(record.rows[split], digests)
            for split, digests in lineage.hash_splits(workspace.prepared).items()
            if split in record.rows
        }
        for split, changes in rows.items():
            _report_rows(workspace, split, changes)
        rows_differ = any(changes.differ() for changes in rows.values())
        if from_dvc and not lost_data and rows_differ:
            note(
                [
                    f"the run names the data {record.tags['dvc.data']}, which is here, but was not "
                    "trained on its rows: data/ was edited after `dvc add`, or prepare ran with "
                    "different values"
                ]
            )
        _run_stage("train", tree, variables)
        metrics = files.read_json(workspace.trained / "metrics.json")
        recorded = compare.select_results(record.metrics)
        if any(key.startswith("test_") for key in recorded):
            # The test may have run later, with different values.
            params = record.fetch_artifact("test/params.yaml")
            if params is not None:
                _write_params(workspace, _read_params(params, record))
            _run_stage("test", tree, variables)
            metrics |= files.read_json(workspace.tested / "metrics.json")
        lacking = sorted(
            key for key in recorded.keys() - metrics.keys() if not key.startswith("fuse_")
        )
        if lacking:
            note([f"metrics that only the record has: {', '.join(lacking)}"])
        console.out.rule("compared", align="left")
        for text in notes:
            console.warn(text)
        on_gpu = record.tags.get("device", "").startswith("gpu")
        return _compare(
            record,
            workspace,
            rows,
            metrics,
            same_rows=not rows_differ and _has_same_datasets(record, workspace),
            elsewhere=on_gpu or bool(environment_changes),
        )


def configuration(record: RunRecord) -> dict[str, Any]:
    """Return a run's configuration, with its model at the commit that it had.

    Raises:
        UserError: if it has none, or no result.
    """
    if record.status != "FINISHED" and "failure" in record.tags:
        raise UserError(
            "reproduce.failed_run",
            run=record.id,
            name=record.name,
            status=record.status,
            failure=record.tags["failure"],
        )
    if record.status != "FINISHED":
        raise UserError(
            "reproduce.unfinished_run", run=record.id, name=record.name, status=record.status
        )
    path = record.fetch_artifact("params.yaml")
    if path is None:
        raise UserError("reproduce.no_configuration", run=record.id, name=record.name)
    config = _read_params(path, record)
    if commit := record.tags.get("model.commit"):
        config["model"]["revision"] = commit
    return config


def _read_params(path: Path, record: RunRecord) -> dict[str, Any]:
    """Read a run's configuration, with the number of threads and the date that null stood for."""
    config = dict(yaml.safe_load(path.read_text(encoding="utf-8")))
    threads = record.params.get("train.blas_threads", "None")
    if threads != "None" and config["train"]["blas_threads"] is None:
        config["train"]["blas_threads"] = int(threads)
    if date := record.tags.get(lineage.DATE):
        config["data"]["date"] = date
    return config


def _write_params(workspace: Workspace, config: dict[str, Any]) -> None:
    files.write_text(workspace.params, yaml.safe_dump(config, allow_unicode=True))


def _list_environment_changes(record: RunRecord, commit: str | None) -> Iterator[str]:
    """Yield the versions that differ from the run's, and the machine if it does."""
    from athanor.device.backend import describe_device

    present = lineage.collect_versions()
    changes = compare.list_changes(
        record.versions, {name: present.get(name) for name in record.versions}
    )
    if changes:
        listed = ", ".join(
            f"{name} {recorded} (here {here or 'none'})"
            for name, (recorded, here) in changes.items()
        )
        command = (
            f"; with the libraries of its commit: `git worktree add --detach ../then {commit} "
            f"&& PYTHONPATH=src uv run --project ../then python -m athanor.reproduce {record.id}`"
        )
        restorable = commit and changes.keys() & {"python", *lineage.LIBRARIES}
        yield f"the run had {listed}{command if restorable else ''}"
    device = record.tags.get("device")
    if device is not None and device != describe_device():
        yield f"the run was trained on {device}; this is {describe_device()}"


def _run_stage(stage: str, tree: Path, variables: dict[str, str]) -> None:
    console.out.rule(stage, align="left")
    done = subprocess.run([sys.executable, "-m", f"athanor.{stage}"], cwd=tree, env=variables)
    if done.returncode == 130:
        raise KeyboardInterrupt
    if done.returncode:
        raise UserError("reproduce.stage_failed", stage=stage)


def _has_same_datasets(record: RunRecord, workspace: Workspace) -> bool:
    """Return whether the prepared files have the digests of the run's datasets."""
    digests = {
        f"artifacts/prepare/{split}.jsonl": files.digest([workspace.rows(split)])[:36]
        for split in SPLITS
        if workspace.rows(split).exists()
    }
    return all(digests.get(name, digest) == digest for name, digest in record.datasets.items())


def _report_rows(workspace: Workspace, split: str, changes: RowChanges) -> None:
    """Print the rows of a split that differ from the record's."""
    if not changes.differ():
        return
    path = workspace.rows(split)
    new, gone = set(changes.only_b[:ROWS_SHOWN]), changes.only_a[:ROWS_SHOWN]
    with path.open(encoding="utf-8") as file:
        lines = [
            f"{path.name}:{number}  {_summarize(json.loads(line))}"
            for number, line in enumerate(file, 1)
            if number in new
        ]
    if more := len(changes.only_b) - len(new):
        lines.append(f"… and {more:,} more")
    if gone:
        places = ", ".join(f"{path.name}:{number}" for number in gone)
        total = f", … ({len(changes.only_a):,} in all)" if len(changes.only_a) > len(gone) else ""
        lines.append(f"gone: what was {places}{total}")
    if changes.reordered:
        lines.append("the common rows are in a different order")
    console.warn(
        f"{path.name}: {len(changes.only_b):,} rows are not in the record, {len(changes.only_a):,} "
        f"of the record's are gone, {changes.same:,} are the same:\n  " + "\n  ".join(lines)
    )


def _summarize(row: dict[str, Any], width: int = 80) -> str:
    """Return a row's texts, cut to a width."""
    contents = [str(message.get("content") or "") for message in row.get("messages", ())]
    text = " ".join(" / ".join([*contents, *filter(None, [row.get("text")])]).split())
    return text if len(text) <= width else text[: width - 1] + "…"


def _compare(
    record: RunRecord,
    workspace: Workspace,
    rows: dict[str, RowChanges],
    metrics: dict[str, float],
    same_rows: bool,
    elsewhere: bool,
) -> bool:
    """Print the new result beside the record, and the verdict; return whether it is a match."""
    table = [
        [
            f"{split} rows",
            f"{changes.same + len(changes.only_a):,}",
            f"{changes.same + len(changes.only_b):,}",
            f"{changes.same:,} in both{', in a different order' if changes.reordered else ''}"
            if changes.differ()
            else "the same",
        ]
        for split, changes in rows.items()
    ]
    recorded = record.tags.get("adapters.digest", "")
    new = lineage.hash_adapters(workspace.trained / "adapters")
    weights = "the same bytes" if recorded == new else _describe_weights(record, workspace)
    table.append(["adapters", recorded[:12] or "–", new[:12], weights])
    results = compare.select_results(record.metrics)
    pairs = {key: (results[key], metrics[key]) for key in metrics if key in results}
    for key, (a, b) in pairs.items():
        if a != b or key in ("train_loss", "val_loss", "test_loss"):
            table.append([key, f"{a:.6g}", f"{b:.6g}", f"{b - a:+.3g}" if a != b else "the same"])
    if equal := len(pairs) - sum(row[0] in pairs for row in table):
        table.append([f"{equal} other metrics", "", "", "the same"])
    console.print_table(f"run {record.id[:8]}", ["", "in the record", "made again", ""], table)

    match, text = verdict(recorded, new, pairs, same_rows, elsewhere)
    console.out.print(text, soft_wrap=True)
    return match


def verdict(
    recorded: str, new: str, pairs: dict[str, tuple[float, float]], same_rows: bool, elsewhere: bool
) -> tuple[bool, str]:
    """Return whether a run trained again is a match, and the verdict in words.

    Args:
        recorded: the digest of the run's adapters, empty if it has none.
        new: the digest of the new adapters.
        pairs: the metrics that both have, with the recorded and the new value.
        same_rows: whether the prepared rows are the run's.
        elsewhere: whether the machine or libraries differ, or it is a GPU, which computes nothing
            twice alike.
    """
    changed = [key for key, (a, b) in pairs.items() if a != b]
    if recorded == new and same_rows and pairs and not changed:
        return True, "match: the same bytes, the same metrics"
    if recorded in ("", new) and same_rows and not changed:
        lacking = [*([] if recorded else ["no adapters"]), *([] if pairs else ["no metrics"])]
        lacks = " and ".join(lacking)
        return False, f"no match: the run has {lacks} to compare; nothing else differs"
    losses = {key: pair for key, pair in pairs.items() if "loss" in key}
    near = all(abs(a - b) <= max(NEAR, RELATIVELY * abs(a)) for a, b in losses.values())
    if elsewhere and same_rows and losses and near:
        return False, (
            f"close: losses within {RELATIVELY:.0%} of the record's, on a different machine, with "
            "different libraries or on a GPU"
        )
    differing = [
        *([] if same_rows else ["rows"]),
        *([] if recorded == new else ["adapters"]),
        *([f"{len(changed)} of {len(pairs)} metrics"] if changed else []),
    ]
    return False, f"differs: {', '.join(differing)}"


def _describe_weights(record: RunRecord, workspace: Workspace) -> str:
    """Return in words how the new adapters differ from the run's."""
    kept = record.fetch_artifact(ADAPTERS)
    if kept is None:
        return "different bytes" if "adapters.digest" in record.tags else "the run has none"
    difference = compare.measure_weight_difference(kept, workspace.trained / ADAPTERS)
    if difference is None:
        return "weights of different names or shapes"
    return f"at most {difference:.2g} of the greatest weight apart"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m athanor.reproduce",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run_id", help="MLflow's id of the run, or its beginning")
    parser.add_argument("--keep", action="store_true", help="keep the worktree")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        match = reproduce(compare.load_record(arguments.run_id, Path(folder)), arguments.keep)
    sys.exit(0 if match else 1)


if __name__ == "__main__":
    console.run_command(main, console.UNCHANGED)
