"""Print the differences between two runs: first of what decided them, then of their results.

    uv run python -m athanor.diff 3780998 69d11ce

Reads both from MLflow by their ids or the beginnings of them. Each line has the value of the first
run, then that of the second.
"""

import argparse
import ast
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from athanor import console
from athanor.errors import UserError
from athanor.runs import compare, lineage, restore, tracking_store
from athanor.runs.compare import RunRecord

LINES_OF_CODE = 12
WIDTH = 60


def list_differences(a: RunRecord, b: RunRecord) -> Iterator[str]:
    """Yield a line for each difference in what decided two runs."""
    for key, (first, second) in compare.list_changes(a.params, b.params).items():
        # One follows from train.num_layers and the model, the other is part of the device.
        if key not in ("trained_layers", "train.blas_threads"):
            yield from describe_change(key, first, second)
    yield from _list_data_changes(a, b)
    for tag in (
        "model.path",
        "model.commit",
        "model.digest",
        "initial.run",
        "initial.digest",
        lineage.DATE,
    ):
        if tag not in a.params and a.tags.get(tag) != b.tags.get(tag):
            yield f"{tag}: {_shorten(a.tags.get(tag))} -> {_shorten(b.tags.get(tag))}"
    yield from _list_code_changes(a, b)
    for name, (first, second) in compare.list_changes(a.versions, b.versions).items():
        yield f"{name}: {_show(first)} -> {_show(second)}"
    if a.tags.get("device") != b.tags.get("device"):
        yield f"device: {_show(a.tags.get('device'))} -> {_show(b.tags.get('device'))}"


def describe_change(key: str, first: Any, second: Any) -> Iterator[str]:
    """Yield a changed value; of tables, such as an optimizer's, the changed keys."""
    first_table, second_table = _parse_table(first), _parse_table(second)
    if first_table is not None and second_table is not None:
        for inner, pair in compare.list_changes(first_table, second_table).items():
            yield from describe_change(f"{key}.{inner}", *pair)
        return
    if first is not None and second is not None:
        first, second = (" ".join(str(value).split()) for value in (first, second))
        if min(len(first), len(second)) > WIDTH:
            # Both are cut, so they begin shortly before the first character that differs.
            pairs = enumerate(zip(first, second, strict=False))
            start = max(next((at for at, (a, b) in pairs if a != b), 0) - WIDTH // 2, 0)
            first, second = (f"{'…' * bool(start)}{text[start:]}" for text in (first, second))
    yield f"{key}: {_show(first)} -> {_show(second)}"


def _parse_table(value: Any) -> dict[str, Any] | None:
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            return None
    return value if isinstance(value, dict) else None


def _list_data_changes(a: RunRecord, b: RunRecord) -> Iterator[str]:
    if a.tags.get("dvc.data") != b.tags.get("dvc.data"):
        yield f"data/: {_shorten(a.tags.get('dvc.data'))} -> {_shorten(b.tags.get('dvc.data'))}"
    for split in dict.fromkeys([*a.rows, *b.rows]):
        if split not in a.rows or split not in b.rows:
            yield f"{split} rows: recorded by only one of them"
            continue
        changes = compare.compare_rows(a.rows[split], b.rows[split])
        if changes.differ():
            parts = [
                *([f"{_show_lines(changes.only_a)} only in the first"] if changes.only_a else []),
                *([f"{_show_lines(changes.only_b)} only in the second"] if changes.only_b else []),
                f"{changes.same:,} in both{', in a different order' if changes.reordered else ''}",
            ]
            yield f"{split} rows: {'; '.join(parts)}"


def _show_lines(lines: list[int], shown: int = 5) -> str:
    numbers = ", ".join(map(str, lines[:shown]))
    more = ", …" if len(lines) > shown else ""
    return f"{len(lines):,} (line{'s' if len(lines) > 1 else ''} {numbers}{more})"


def _list_code_changes(a: RunRecord, b: RunRecord) -> Iterator[str]:
    digests, commits, patches = (
        [record.tags.get(tag) for record in (a, b)]
        for tag in ("code.digest", "mlflow.source.git.commit", "code.patch")
    )
    if digests[0] == digests[1] and (digests[0] or commits[0] == commits[1]):
        return  # whatever was committed in between
    yield f"code: {_show_commit(a)} -> {_show_commit(b)}"
    if None not in commits and commits[0] != commits[1]:
        repository, _ = restore.find_commit(a.tags)
        stat = lineage.run_git(repository, "diff", "--stat=80", *map(str, commits), "--", "src")
        lines = stat.splitlines()
        for line in lines if len(lines) <= LINES_OF_CODE else [f" … {lines[-1].strip()}"]:
            yield f"  {line.strip()}"
    if patches[0] != patches[1]:
        for name, record in (("first", a), ("second", b)):
            if changed := _list_uncommitted(record):
                yield f"  not committed in the {name}: {', '.join(changed)}"


def _show_commit(record: RunRecord) -> str:
    changes = " with changes" if record.tags.get("code.patch", "none") != "none" else ""
    return f"{_shorten(record.tags.get('mlflow.source.git.commit'))}{changes}"


def _list_uncommitted(record: RunRecord) -> list[str]:
    """Return the files that a run's patch changes."""
    if record.tags.get("code.patch", "none") == "none":
        return []
    path = record.fetch_artifact(lineage.PATCH)
    return list_patched_files(path) if path else [f"{lineage.PATCH}, which is gone"]


def list_patched_files(patch: Path) -> list[str]:
    """Return the files that a patch changes.

    Its folder is in no repository: below the top of one, git would skip some.
    """
    counted = lineage.run_git(patch.parent, "apply", "--numstat", "-z", patch.name)
    return [entry.split("\t", 2)[2] for entry in counted.split("\0") if entry]


def _show(value: Any) -> str:
    if value is None or value == "":
        return "–" if value is None else '""'
    text = " ".join(str(value).split())
    return text if len(text) <= WIDTH else f"{text[: WIDTH - 1]}…"


def _shorten(digest: str | None) -> str:
    return _show(digest and digest[:12])


def _compare_results(a: RunRecord, b: RunRecord) -> tuple[list[list[str]], str]:
    """Return a row for each result that differs, and in words the results of only one run."""
    first, second = compare.select_results(a.metrics), compare.select_results(b.metrics)
    rows = [
        [key, f"{x:.6g}", f"{y:.6g}", f"{y - x:+.4g}"]
        for key, (x, y) in compare.list_changes(first, second).items()
        if x is not None and y is not None
    ]
    digests = [_shorten(record.tags.get("adapters.digest")) for record in (a, b)]
    if digests[0] != digests[1]:
        rows.append(["adapters", *digests, ""])
    unshared = [
        f"{len(keys)} metrics only in the {name}: {', '.join(sorted(keys, key=len)[:3])}"
        + (", …" if len(keys) > 3 else "")
        for name, keys in (
            ("first", first.keys() - second.keys()),
            ("second", second.keys() - first.keys()),
        )
        if keys
    ]
    return rows, "; ".join(unshared)


def refuse_sweep(record: RunRecord) -> None:
    """Refuse a sweep's own run, which trained nothing.

    Raises:
        UserError: if it is one.
    """
    if "athanor.sweep" not in record.tags:
        return
    children = compare.list_children(record)
    if not children:
        raise UserError("diff.empty_sweep", run=record.id, name=record.name)
    raise UserError("diff.sweep", run=record.id, name=record.name, children=children)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m athanor.diff",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs=2, metavar="RUN_ID", help="MLflow's id, or its beginning")
    arguments = parser.parse_args()
    # Both first: to load a record takes seconds.
    run_ids = [tracking_store.find_run_id(prefix) for prefix in arguments.runs]
    with tempfile.TemporaryDirectory() as folder:
        a, b = (
            compare.load_record(run_id, Path(folder, name))
            for name, run_id in zip("ab", run_ids, strict=True)
        )
        for record in (a, b):
            refuse_sweep(record)
        for record in (a, b):
            record.folder.mkdir()
            unfinished = "" if record.status == "FINISHED" else f" ({record.status})"
            console.out.print(f"{record.id[:8]}  {record.name}{unfinished}", soft_wrap=True)
        lines = list(list_differences(a, b))
        results, unshared = _compare_results(a, b)
    if not lines and not results and not unshared:
        console.out.print("nothing differs")
        return
    for line in lines or ["nothing that is recorded of what decided them differs"]:
        console.out.print(f"  {line}", soft_wrap=True, markup=False, highlight=False)
    if results:
        console.print_table("results", ["", a.id[:8], b.id[:8], "difference"], results)
    elif compare.select_results(a.metrics).keys() & compare.select_results(b.metrics).keys():
        console.out.print("the results are the same")
    if unshared:
        console.out.print(unshared, soft_wrap=True)


if __name__ == "__main__":
    console.run_command(main, console.UNCHANGED)
