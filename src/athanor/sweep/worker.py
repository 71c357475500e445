"""A sweep from its first point to its summary, in one process or with Hydra's launchers in many."""

import json
import os
import subprocess
import sys
import traceback
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import hydra
from omegaconf import OmegaConf

from athanor import console, files, switches, ui
from athanor.config.values import flatten
from athanor.device import blas
from athanor.device.backend import describe_device
from athanor.errors import UserError
from athanor.paths import Workspace
from athanor.prepare.result import Prepared
from athanor.runs import lineage, mlflow_views, tracking_store
from athanor.runs.run import Run, send_left_journals, start_run
from athanor.runs.stage_records import LAYERS, datasets
from athanor.sweep import choice, summary, trials
from athanor.sweep.space import Space, refuse_unprepared, space
from athanor.sweep.supervise import COMMAND, ENDED_BY, LOST
from athanor.sweep.trials import Sweep
from athanor.train import checkpoints
from athanor.train.identity import training_identity

WRITTEN = ("summary.html", "points.csv", "heatmap.svg", "curves.svg")
TOO_MUCH = "most likely the memory did not suffice"


def main(arguments: list[str]) -> None:
    """Runs a sweep, as far as it has not been run before.

    Raises:
        UserError: for what can't be swept, rows that are others by now, no point that finished.
    """
    workspace = Workspace.here()
    found = space(workspace.conf, arguments)
    refuse_unprepared(found)
    fresh = _ask_dvc()
    base = Prepared.read(found.base, workspace)
    threads = blas.use_threads(found.base.train.blas_threads)
    about = _about(found, base)
    folder = workspace.sweeps / checkpoints.key(about)
    lock = files.try_lock(folder / "lock")
    if lock is None:
        raise UserError(f"another process is at this very sweep ({folder}): wait for it, or end it")
    files.write_json(folder / "about.json", about)
    files.write_text(folder / "params.yaml", OmegaConf.to_yaml(found.base))
    sweep = Sweep(
        folder,
        run=folder.name,
        keys=list(found.swept),
        total=found.total,
        recorded=[],
        command=os.environ[COMMAND],
        blas_threads=threads,
    )
    cause = os.environ.get(ENDED_BY)
    dead = trials.mark_dead(sweep, cause) if cause else []
    _refuse_stale(fresh)
    console.out.print(
        f"{found.total} points of {found.base.model.path}: {folder.relative_to(workspace.home)}",
        highlight=False,
    )
    if threads is not None and found.at_once * threads > (cores := blas.physical_cores()):
        console.warn(
            f"{found.at_once} trials at once with {threads} BLAS threads each share {cores} cores; "
            "fewer at once, or a smaller train.blas_threads (other bytes), may be faster"
        )
    with _start(sweep, found, base) as run:
        for note in dead:
            trials.fail(sweep, note, f"its process was ended by {cause}: {TOO_MUCH}")
        trials.loaded(folder)
        if (run_id := run.wait_for_id()) is not None:
            # Where it is away again, what it has already is said to it once more.
            with suppress(Exception):
                sweep = replace(sweep, recorded=tracking_store.list_finished_children(run_id))
        sweep.write()
        try:
            _run_points(found, folder)
        except Exception:
            if not trials.under_way(sweep):
                raise
            traceback.print_exc()  # a launcher's, of which a process was killed
            sys.exit(LOST)
        measured = _measured(sweep)
        _conclude(sweep, found, measured, run)
    wrote = f"{folder.relative_to(workspace.home)}/: {', '.join(WRITTEN)}"
    best = next((note["run_id"] for note in sweep.notes() if note.get("run_id")), "none")
    console.print_facts("", {"wrote": wrote, "MLflow run": run.describe(), "of the best": best})
    with suppress(Exception):  # a store that came back in between has none of the points before
        send_left_journals()
    if run.id is not None:
        _show_link(run.id, found)


def _conclude(sweep: Sweep, found: Space, measured: list[choice.Point], run: Run) -> None:
    """Writes the summary, adds it to the sweep's run, and shows it."""
    summary.write(sweep.folder, measured, found.fixed, Path(found.base.model.path).name)
    for name in WRITTEN:
        if (sweep.folder / name).exists():
            run.log_artifact(sweep.folder / name)
    finished = sum(point.measured for point in measured)
    run.log_metrics(0, {"points_finished": finished, "points_failed": len(measured) - finished})
    run.set_tags({"mlflow.note.content": summary.markdown(measured, found.fixed)})
    summary.show(measured, found.fixed)
    if not finished:
        raise UserError("no point finished; what each failed of stands above")


def _show_link(run_id: str, found: Space) -> None:
    """Sets up MLflow's pages for this sweep, and prints the link to them."""
    flat = flatten(found.base)
    numbers = {"train.num_layers": LAYERS}
    keys = [numbers.get(key, key if key in flat else f"{key}.method") for key in found.swept]
    try:
        client = tracking_store.connect()
        place = client.get_run(run_id).info.experiment_id
        query = mlflow_views.sweep_view(client, place, run_id, keys, "kept_val_loss")
    except Exception as error:  # the store may be away by now
        console.warn(f"MLflow's pages can't be set up: {tracking_store.summarize_error(error)}")
        return
    served = tracking_store.uri().startswith(("http://", "https://"))
    base = tracking_store.shown_uri() if served else f"http://127.0.0.1:{ui.PORT}"
    if not served:
        console.out.print(f"`uv run python -m athanor.ui {run_id[:8]}` opens MLflow's charts of it")
    console.out.print(mlflow_views.link(base, place, query=query), soft_wrap=True, highlight=False)


def _measured(sweep: Sweep) -> list[choice.Point]:
    """All points with what was measured of them; the chosen one on the rows of `test`, too."""
    notes = sweep.notes()
    found = [
        trials.measured(note, trials.points() / note["digest"] / note["tested"])
        if note["status"] == "FINISHED"
        else trials.measured(note)
        for note in notes
    ]
    chosen = choice.choose(found).run
    if chosen is not None:
        place = next(i for i, point in enumerate(found) if point is chosen)
        found[place] = trials.test_chosen(sweep, notes[place])
    return found


def _ask_dvc() -> "subprocess.Popen[str] | None":
    """Asks DVC whether what prepare left is of the data, model and code as they are."""
    if not Path("dvc.yaml").exists() or not Path(".dvc").exists():
        return None
    command = [sys.executable, "-m", "dvc", "status", "--json", "prepare"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _refuse_stale(asked: "subprocess.Popen[str] | None") -> None:
    if asked is None:
        return
    said, complaint = asked.communicate()
    try:
        status = json.loads(said)
    except ValueError:
        lines = complaint.strip().splitlines()
        console.warn(f"`dvc status prepare` can't say if it is up to date: {' '.join(lines[-1:])}")
        return
    if status:
        changes = json.dumps([change for found in status.values() for change in found])
        raise UserError(
            f"what prepare left is not of what is there now: {changes}\n"
            "`uv run dvc repro prepare` brings it up to date"
        )


def _run_points(found: Space, folder: Path) -> None:
    """Lets Hydra call points.run for each point, with its sweeper and its launcher."""
    switches.configure_hydra(optuna="sampler" in found.sweeper)
    sys.argv = [
        "sweep",
        "--multirun",
        "hydra/job_logging=disabled",
        "hydra/hydra_logging=disabled",
        "hydra.output_subdir=null",
        f"hydra.sweep.dir={choice.override(str(folder / 'hydra'))}",
        "hydra.job.name=sweep",
        *found.typed,
        *found.fixed,
        *found.hydra,
    ]
    task = hydra.main(
        config_path=str(Workspace.here().conf.resolve()), config_name="config", version_base="1.3"
    )
    task(trials.run)()


def _about(found: Space, base: Prepared) -> dict[str, Any]:
    """What makes this sweep the same as one that was started before."""
    decides = training_identity(found.base, base)
    flat = flatten(found.base)
    return {
        "swept": list(found.swept.items()),
        "sweeper": json.loads(json.dumps(found.sweeper | {"params": None}, default=str)),
        **{key: value for key, value in decides.items() if key not in found.swept},
        **{key: value for key, value in flat.items() if key.startswith("test.")},
    }


def _start(sweep: Sweep, found: Space, base: Prepared) -> Run:
    """Opens the sweep's own run."""
    keys = " × ".join(choice.names(sweep.keys).values())
    return start_run(
        f"sweep {keys}: {Path(base.source.path).name} {found.base.train.method}",
        {f"sweep.{key}": ",".join(values) for key, values in found.swept.items()},
        {**lineage.collect_tags(), "device": describe_device(), "athanor.sweep": sweep.run},
        datasets(base.workspace),
        run=sweep.run,
    )
