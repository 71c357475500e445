"""Makes a run again, and compares it with its record.

    uv run python -m athanor.reproduce 3780998
    uv run python -m athanor.reproduce 3780998 --keep      # the worktree, to look at

Reads the run from MLflow (the id may be cut short). Its commit, patch, configuration and data are
restored in a git worktree in a temporary folder; prepare, train and test run there with their own
store, and nothing is written here. Says what can't be restored, and exits with 0 for a match alone:
the same bytes and the same metrics.
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

# Losses that are this near, or relatively so, are called close; on a GPU none is the same twice.
NEAR, RELATIVELY = 1e-3, 1e-2
ROWS_SHOWN = 10
ADAPTERS = "adapters/adapters.safetensors"


def reproduce(made: RunRecord, keep: bool) -> bool:
    """Makes a run again and prints how it compares; returns whether it is a match.

    Raises:
        UserError: for a run that has no result, and where a stage fails.
    """
    config = configuration(made)
    console.out.print(f"run {made.id}, {made.name}", soft_wrap=True)
    repository, commit = restore.find_commit(made.tags)
    notes: list[str] = []

    def note(texts: Iterable[str]) -> None:
        for text in texts:
            console.warn(text)
            notes.append(text)

    with restore.open_worktree(repository, commit or "HEAD", keep) as tree:
        note(restore.restore_code(made, repository, commit, tree))
        of_dvc = config["data"].get("dataset") is None
        lost_data = list(restore.restore_data(made, tree)) if of_dvc else []
        note(lost_data)
        for path in (config["model"]["path"], config["data"].get("dataset")):
            if path is not None:
                restore.link_input(path, tree)
        blas.use_threads(config["train"].get("blas_threads"))
        others = list(_elsewhere(made, commit))
        note(others)
        variables = restore.build_environment(made, tree)
        files.write_text(Workspace(tree, tree).params, yaml.safe_dump(config, allow_unicode=True))

        _run("prepare", tree, variables)
        model = files.read_json(Workspace(tree, tree).prepared / "model.json")["digest"]
        if model != made.tags.get("model.digest", model):
            note([f"the base {config['model']['path']} is not the one that the run had"])
        other_files = _other_files(made, tree)
        if made.rows is None:
            said = f"; others are in {', '.join(other_files)}" if other_files else ""
            note([f"this older run keeps no digest of each row: none can be named{said}"])
        rows = {
            split: compare.compare_rows(made.rows[split], now)
            for split, now in lineage.hash_splits(Workspace(tree, tree).prepared).items()
            if made.rows is not None and split in made.rows
        }
        for split, found in rows.items():
            _name_rows(split, found, tree)
        if of_dvc and not lost_data and any(found.differ() for found in rows.values()):
            note(
                [
                    f"the run names the data {made.tags['dvc.data']}, which is here, but was not "
                    "trained on its rows: data/ had been edited after `dvc add`, or prepare was "
                    "run with other values"
                ]
            )
        _run("train", tree, variables)
        metrics = files.read_json(Workspace(tree, tree).trained / "metrics.json")
        if any(key.startswith("test_") for key in compare.select_results(made.metrics)):
            tested = made.fetch_artifact(
                f"test/{'params.yaml'}"
            )  # after other values were chosen, perhaps
            if tested is not None:
                files.write_text(
                    Workspace(tree, tree).params,
                    yaml.safe_dump(_read(tested, made), allow_unicode=True),
                )
            _run("test", tree, variables)
            metrics |= files.read_json(Workspace(tree, tree).tested / "metrics.json")
        lacking = compare.select_results(made.metrics).keys() - metrics.keys()
        if lacking := sorted(key for key in lacking if not key.startswith("fuse_")):
            note([f"metrics that the record has and the new run has not: {', '.join(lacking)}"])
        console.out.rule("compared", align="left")
        for text in notes:
            console.warn(text)
        gpu = made.tags.get("device", "").startswith("gpu")
        same_rows = not other_files and not any(found.differ() for found in rows.values())
        return _compare(made, tree, rows, metrics, same_rows, elsewhere=gpu or bool(others))


def configuration(made: RunRecord) -> dict[str, Any]:
    """A run's configuration, its model at the commit that it had.

    Raises:
        UserError: for a run that has none, or no result.
    """
    if made.status != "FINISHED":
        why = made.tags.get("failure")
        raise UserError(
            f"run {made.id} ({made.name}) is {made.status}{f': {why}' if why else ''}; only one "
            "that is FINISHED has a result to compare with"
        )
    path = made.fetch_artifact("params.yaml")
    if path is None:
        raise UserError(
            f"run {made.id} ({made.name}) keeps no params.yaml, and so can't be made again: it is "
            "no "
            "training (the parent of a sweep has none; name one of its children)"
        )
    config = _read(path, made)
    if commit := made.tags.get("model.commit"):
        config["model"]["revision"] = commit
    return config


def _read(params: Path, made: RunRecord) -> dict[str, Any]:
    """Read a run's configuration, with the number of threads that null stood for."""
    config = dict(yaml.safe_load(params.read_text(encoding="utf-8")))
    recorded = made.params.get("train.blas_threads", "None")
    if recorded != "None" and config["train"]["blas_threads"] is None:
        config["train"]["blas_threads"] = int(recorded)
    return config


def _elsewhere(made: RunRecord, commit: str | None) -> Iterator[str]:
    """Yields which versions are others than the run's, and which machine."""
    from athanor.device.backend import describe_device

    here = lineage.collect_versions()
    then = made.versions
    others = compare.list_changes(then, {name: here.get(name) for name in then})
    if others:
        said = ", ".join(f"{name} {a} (here {b or 'none'})" for name, (a, b) in others.items())
        command = (
            f"; with the libraries of its commit: `git worktree add --detach ../then {commit} "
            f"&& PYTHONPATH=src uv run --project ../then python -m athanor.reproduce {made.id}`"
        )
        mended = commit and others.keys() & {"python", *lineage.LIBRARIES}
        yield f"the run had {said}{command if mended else ''}"
    then_on, here_on = made.tags.get("device"), describe_device()
    if then_on is not None and then_on != here_on:
        yield f"the run was made on {then_on}, and here is {here_on}"


def _run(stage: str, tree: Path, variables: dict[str, str]) -> None:
    console.out.rule(stage, align="left")
    done = subprocess.run([sys.executable, "-m", f"athanor.{stage}"], cwd=tree, env=variables)
    if done.returncode == 130:
        raise KeyboardInterrupt
    if done.returncode:
        raise UserError(
            f"{stage} failed in the worktree (its own lines are above), so there is nothing to "
            "compare; --keep leaves the worktree to look at"
        )


def _other_files(made: RunRecord, tree: Path) -> list[str]:
    """Which files of rows have another digest than the run's datasets."""
    paths = {
        f"artifacts/prepare/{split}.jsonl": Workspace(tree, tree).prepared / f"{split}.jsonl"
        for split in SPLITS
    }
    return [
        name
        for name, then in made.datasets.items()
        if name in paths and files.digest([paths[name]])[:36] != then
    ]


def _name_rows(split: str, found: RowChanges, tree: Path) -> None:
    """Names the rows of a split that are not those of the record."""
    if not found.differ():
        return
    name = f"{split}.jsonl"
    new, gone = set(found.only_b[:ROWS_SHOWN]), found.only_a[:ROWS_SHOWN]
    more = len(found.only_b) - len(new)
    with (Workspace(tree, tree).prepared / name).open(encoding="utf-8") as file:
        lines = [
            f"{name}:{place}  {_text(json.loads(line))}"
            for place, line in enumerate(file, 1)
            if place in new
        ]
    if more:
        lines.append(f"… and {more:,} more")
    if gone:
        places = ", ".join(f"{name}:{place}" for place in gone)
        and_more = f", … ({len(found.only_a):,} in all)" if len(found.only_a) > len(gone) else ""
        lines.append(f"gone: what was {places}{and_more}")
    if found.reordered:
        lines.append("rows that are in both come in another order")
    console.warn(
        f"{name}: rows that are not in the record {len(found.only_b):,}, that are gone since "
        f"{len(found.only_a):,}, the same {found.same:,}:\n  " + "\n  ".join(lines)
    )


def _text(row: dict[str, Any], width: int = 80) -> str:
    said = [str(message.get("content") or "") for message in row.get("messages", ())]
    text = " ".join(" / ".join([*said, *filter(None, [row.get("text")])]).split())
    return text if len(text) <= width else text[: width - 1] + "…"


def _compare(
    made: RunRecord,
    tree: Path,
    rows: dict[str, RowChanges],
    metrics: dict[str, float],
    same_rows: bool,
    elsewhere: bool,
) -> bool:
    """Prints what was made beside the record, and the verdict; returns whether it is a match."""
    table = [
        [
            f"{split} rows",
            f"{found.same + len(found.only_a):,}",
            f"{found.same + len(found.only_b):,}",
            f"{found.same:,} in both{', in another order' if found.reordered else ''}"
            if found.differ()
            else "the same",
        ]
        for split, found in rows.items()
    ]
    kept = made.fetch_artifact(ADAPTERS)
    then = made.tags.get("adapters.digest") or (lineage.hash_adapters(kept.parent) if kept else "")
    now = lineage.hash_adapters(Workspace(tree, tree).trained / "adapters")
    table.append(["adapters", then[:12] or "–", now[:12], _of_weights(then, now, kept, tree)])
    known = compare.select_results(made.metrics)
    both = {key: (known[key], metrics[key]) for key in metrics if key in known}
    for key, (a, b) in both.items():
        if a != b or key in ("train_loss", "val_loss", "test_loss"):
            table.append([key, f"{a:.6g}", f"{b:.6g}", f"{b - a:+.3g}" if a != b else "the same"])
    if quiet := len(both) - sum(row[0] in both for row in table):
        table.append([f"{quiet} other metrics", "", "", "the same"])
    console.print_table(f"run {made.id[:8]}", ["", "in the record", "made again", ""], table)

    match, text = verdict(then, now, both, same_rows, elsewhere)
    console.out.print(text, soft_wrap=True)
    return match


def verdict(
    then: str, now: str, both: dict[str, tuple[float, float]], same_rows: bool, elsewhere: bool
) -> tuple[bool, str]:
    """Whether a run made again is a match, and what to call it.

    `then` and `now` are the adapters' digests, `then` empty where the run keeps none; `both` the
    metrics that both have, then and now; `elsewhere` whether this is another machine, there are
    other libraries, or it is a GPU, which computes nothing twice alike.
    """
    others = [key for key, (a, b) in both.items() if a != b]
    if then == now and same_rows and both and not others:
        return True, "match: the same bytes, the same metrics"
    if then in ("", now) and same_rows and not others:
        lacking = [*([] if then else ["no adapters"]), *([] if both else ["no metrics"])]
        lacks = " and ".join(lacking)
        return False, f"no match: the run keeps {lacks} to compare; nothing else differs"
    losses = {key: pair for key, pair in both.items() if "loss" in key}
    if elsewhere and same_rows and losses and all(_near(*pair) for pair in losses.values()):
        return False, (
            f"close: losses within {RELATIVELY:.0%} of the record's, on another machine, with "
            "other libraries or on a GPU"
        )
    what = [
        *([] if same_rows else ["rows"]),
        *([] if then == now else ["adapters"]),
        *([f"{len(others)} of {len(both)} metrics"] if others else []),
    ]
    return False, f"differs: {', '.join(what)}"


def _of_weights(then: str, now: str, kept: Path | None, tree: Path) -> str:
    """How two files of adapters compare."""
    if then == now:
        return "the same bytes"
    if kept is None:
        return "other bytes" if then else "the run keeps none"
    apart = compare.measure_weight_difference(kept, Workspace(tree, tree).trained / ADAPTERS)
    if apart is None:
        return "weights of other names or shapes"
    return f"at most {apart:.2g} of the greatest weight apart"


def _near(a: float, b: float) -> bool:
    return abs(a - b) <= max(NEAR, RELATIVELY * abs(a))


def main() -> None:
    parser = argparse.ArgumentParser(prog="athanor.reproduce", description="Makes a run again.")
    parser.add_argument("run_id", help="MLflow's id of the run, or its beginning")
    parser.add_argument("--keep", action="store_true", help="leave the worktree there")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        match = reproduce(compare.load_record(given.run_id, Path(folder)), given.keep)
    sys.exit(0 if match else 1)


if __name__ == "__main__":
    console.run_command(main, "nothing here was changed")
