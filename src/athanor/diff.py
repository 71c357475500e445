"""Says what differs between two runs: what they were made from, and what came out.

    uv run python -m athanor.diff 3780998 69d11ce

Reads both from MLflow (ids may be cut short); a line for each thing that differs, from the first
run to the second, then the results.
"""

import argparse
import ast
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from athanor import console
from athanor.errors import UserError
from athanor.runs import compare, lineage, restore
from athanor.runs.compare import RunRecord

LINES_OF_CODE = 12
WIDTH = 60


def differences(a: RunRecord, b: RunRecord) -> Iterator[str]:
    """Yields what two runs were made from otherwise, a thing a line."""
    for key, (first, second) in compare.list_changes(a.params, b.params).items():
        # One follows from train.num_layers and the model, the other is part of the device.
        if key not in ("trained_layers", "train.blas_threads"):
            yield from _changed(key, first, second)
    yield from _data(a, b)
    for tag in ("model.path", "model.commit", "model.digest"):
        if tag not in a.params and a.tags.get(tag) != b.tags.get(tag):
            yield f"{tag}: {_short(a.tags.get(tag))} -> {_short(b.tags.get(tag))}"
    yield from _code(a, b)
    for name, first in a.versions.items():
        second = b.versions.get(name, first)  # an older run keeps few
        if first != second:
            yield f"{name}: {first} -> {second}"
    if a.tags.get("device") != b.tags.get("device"):
        yield f"device: {_shown(a.tags.get('device'))} -> {_shown(b.tags.get('device'))}"


def _changed(key: str, first: Any, second: Any) -> Iterator[str]:
    """Yields a value that differs; of tables, such as those of optimizers, the keys that do."""
    one, other = _table(first), _table(second)
    if one is not None and other is not None:
        for inside, pair in compare.list_changes(one, other).items():
            yield from _changed(f"{key}.{inside}", *pair)
        return
    if first is not None and second is not None:
        first, second = (" ".join(str(value).split()) for value in (first, second))
        if min(len(first), len(second)) > WIDTH:
            # Both are cut, so they begin shortly before the first character that differs.
            pairs = enumerate(zip(first, second, strict=False))
            start = max(next((at for at, (a, b) in pairs if a != b), 0) - WIDTH // 2, 0)
            first, second = (f"{'…' * bool(start)}{text[start:]}" for text in (first, second))
    yield f"{key}: {_shown(first)} -> {_shown(second)}"


def _table(value: Any) -> dict[str, Any] | None:
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            return None
    return value if isinstance(value, dict) else None


def _data(a: RunRecord, b: RunRecord) -> Iterator[str]:
    if a.tags.get("dvc.data") != b.tags.get("dvc.data"):
        yield f"data/: {_short(a.tags.get('dvc.data'))} -> {_short(b.tags.get('dvc.data'))}"
    if a.rows is None or b.rows is None:
        for name, (first, second) in compare.list_changes(a.datasets, b.datasets).items():
            yield f"{name}: {_short(first)} -> {_short(second)}; which rows, an older run can't say"
        return
    for split in dict.fromkeys([*a.rows, *b.rows]):
        if split not in a.rows or split not in b.rows:
            yield f"{split} rows: recorded by one of them only"
            continue
        found = compare.compare_rows(a.rows[split], b.rows[split])
        if found.differ():
            said = [
                *([f"{_places(found.only_a)} only in the first"] if found.only_a else []),
                *([f"{_places(found.only_b)} only in the second"] if found.only_b else []),
                f"{found.same:,} in both{', in another order' if found.reordered else ''}",
            ]
            yield f"{split} rows: {'; '.join(said)}"


def _places(lines: list[int], shown: int = 5) -> str:
    named = ", ".join(map(str, lines[:shown]))
    more = ", …" if len(lines) > shown else ""
    return f"{len(lines):,} (line{'s' if len(lines) > 1 else ''} {named}{more})"


def _code(a: RunRecord, b: RunRecord) -> Iterator[str]:
    digests, commits, patches = (
        [made.tags.get(tag) for made in (a, b)]
        for tag in ("code.digest", "mlflow.source.git.commit", "code.patch")
    )
    if digests[0] is not None and digests[0] == digests[1]:
        return  # whatever was committed in between
    unknown = any(made.tags.get("git.dirty") == "true" for made in (a, b)) and None in patches
    if None not in digests or commits[0] != commits[1] or unknown:
        yield f"code: {_commit(a)} -> {_commit(b)}"
    if None not in commits and commits[0] != commits[1]:
        repository, _ = restore.find_commit(a.tags)
        stat = lineage.run_git(repository, "diff", "--stat=80", *map(str, commits), "--", "src")
        lines = stat.splitlines()
        for line in lines if len(lines) <= LINES_OF_CODE else [f" … {lines[-1].strip()}"]:
            yield f"  {line.strip()}"
    if patches[0] != patches[1]:
        for name, made in (("first", a), ("second", b)):
            if changed := _patched(made):
                yield f"  not committed in the {name}: {', '.join(changed)}"


def _commit(made: RunRecord) -> str:
    changes = made.tags.get("code.patch")
    if changes is None and made.tags.get("git.dirty") == "true":
        said = " with changes, perhaps of its code, that this older run does not keep"
    else:
        said = " with changes" if changes not in (None, "none") else ""
    return f"{_short(made.tags.get('mlflow.source.git.commit'))}{said}"


def _patched(made: RunRecord) -> list[str]:
    """The files that a run's patch changes."""
    if made.tags.get("code.patch", "none") == "none":
        return []
    path = made.fetch_artifact(lineage.PATCH)
    if path is None:
        return [f"{lineage.PATCH}, which is gone"]
    return _files(path)


def _files(patch: Path) -> list[str]:
    """The names in a patch; its folder is in no repository, below whose top git would skip some."""
    counted = lineage.run_git(patch.parent, "apply", "--numstat", "-z", patch.name)
    return [entry.split("\t", 2)[2] for entry in counted.split("\0") if entry]


def _shown(value: Any) -> str:
    if value is None or value == "":
        return "–" if value is None else '""'
    text = " ".join(str(value).split())
    return text if len(text) <= WIDTH else f"{text[: WIDTH - 1]}…"


def _short(digest: str | None) -> str:
    return _shown(digest and digest[:12])


def _results(a: RunRecord, b: RunRecord) -> tuple[list[list[str]], str]:
    """The results that differ, a row each, and in words what only one of the runs has."""
    first, second = compare.select_results(a.metrics), compare.select_results(b.metrics)
    rows = [
        [key, f"{x:.6g}", f"{y:.6g}", f"{y - x:+.4g}"]
        for key, (x, y) in compare.list_changes(first, second).items()
        if x is not None and y is not None
    ]
    digests = [_short(made.tags.get("adapters.digest")) for made in (a, b)]
    if digests[0] != digests[1]:
        rows.append(["adapters", *digests, ""])
    alone = [
        f"{len(only)} metrics only in the {name}: {', '.join(sorted(only, key=len)[:3])}"
        + (", …" if len(only) > 3 else "")
        for name, only in (
            ("first", first.keys() - second.keys()),
            ("second", second.keys() - first.keys()),
        )
        if only
    ]
    return rows, "; ".join(alone)


def _refuse_a_sweep(a: RunRecord, b: RunRecord) -> None:
    """A sweep's own run trained nothing: there is nothing in it to compare."""
    for made in (a, b):
        if "athanor.sweep" in made.tags:
            children = "\n  ".join(compare.list_children(made)) or "none"
            raise UserError(
                f"{made.id[:8]} ({made.name}) is a sweep's own run; compare one of its points, of "
                f"which the first are:\n  {children}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(prog="athanor.diff", description="What differs between runs.")
    parser.add_argument("runs", nargs=2, metavar="RUN_ID", help="MLflow's id, or its beginning")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        a, b = (
            compare.load_record(beginning, Path(folder, name))
            for name, beginning in zip("ab", given.runs, strict=True)
        )
        _refuse_a_sweep(a, b)
        for made in (a, b):
            made.folder.mkdir()
            unfinished = "" if made.status == "FINISHED" else f" ({made.status})"
            console.out.print(f"{made.id[:8]}  {made.name}{unfinished}", soft_wrap=True)
        found = list(differences(a, b))
        results, alone = _results(a, b)
    if not found and not results and not alone:
        console.out.print("nothing differs")
        return
    if not found:
        found = ["nothing that is recorded of what they were made from differs"]
    for line in found:
        console.out.print(f"  {line}", soft_wrap=True, markup=False, highlight=False)
    if results:
        head = ["", a.id[:8], b.id[:8], "difference"]
        console.print_table("results", head, results)
    elif compare.select_results(a.metrics).keys() & compare.select_results(b.metrics).keys():
        console.out.print("the results are the same")
    if alone:
        console.out.print(alone, soft_wrap=True)


if __name__ == "__main__":
    console.run_command(main, "nothing here was changed")
