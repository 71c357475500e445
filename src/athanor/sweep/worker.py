"""A sweep from its first trial to its summary, in one process or with Hydra's launchers in many."""

import json
import os
import subprocess
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

import hydra
from msgspec.structs import replace
from omegaconf import OmegaConf

from athanor import console, files, locks, switches, ui
from athanor.config.values import flatten
from athanor.device import blas
from athanor.device.backend import describe_device
from athanor.errors import UserError
from athanor.paths import Workspace
from athanor.prepare.result import Prepared
from athanor.runs import lineage, mlflow_views, tracking_store
from athanor.runs.initial import find_initial_adapters
from athanor.runs.run import Run, send_left_journals, start_run
from athanor.runs.stage_records import LAYERS, list_datasets
from athanor.sweep import choice, naming, recording, summary, trials
from athanor.sweep.description import Sweep, trials_folder
from athanor.sweep.shared import load_shared
from athanor.sweep.space import Space, read_space, refuse_unprepared
from athanor.sweep.supervise import COMMAND, ENDED_BY, LOST
from athanor.sweep.trial_record import TrialStatus
from athanor.train import checkpoints
from athanor.train.identity import training_identity

WRITTEN = ("summary.html", "points.csv", "heatmap.svg", "curves.svg")


@locks.stage(None, "prepare")
def main(arguments: list[str]) -> None:
    """Run a sweep, as far as it has not been run before.

    Raises:
        UserError: for keys that can't be swept, for rows that have changed since `prepare`, and
            where no trial finished.
    """
    workspace = Workspace.here()
    space = read_space(workspace.conf, arguments)
    refuse_unprepared(space)
    status = _start_dvc_status()
    base = Prepared.read(space.base, workspace)
    threads = blas.use_threads(space.base.train.blas_threads)
    about = _describe(space, base)
    folder = workspace.sweeps / checkpoints.key(about)
    lock = files.try_lock(folder / "lock")
    if lock is None:
        raise UserError("sweep.already_running", folder=folder)
    files.write_json(folder / "about.json", about)
    files.write_text(folder / "params.yaml", OmegaConf.to_yaml(space.base))
    sweep = Sweep(
        folder,
        run=folder.name,
        keys=list(space.swept),
        total=space.total,
        recorded=[],
        command=os.environ[COMMAND],
        blas_threads=threads,
    )
    cause = os.environ.get(ENDED_BY)
    dead = recording.count_deaths(sweep, cause) if cause else []
    _refuse_stale(status)
    console.out.print(
        f"{space.total} trials of {space.base.model.path}: {folder.relative_to(workspace.home)}",
        highlight=False,
    )
    if threads is not None and space.at_once * threads > (cores := blas.physical_cores()):
        console.warn(
            f"{space.at_once} trials at once with {threads} BLAS threads each share {cores} cores; "
            "fewer at once, or a smaller train.blas_threads (other bytes), may be faster"
        )
    with _start_run(sweep, space, base) as run:
        for record in dead:
            reason = f"its process was ended by {cause}; most likely it ran out of memory"
            recording.fail(sweep, record, reason)
        load_shared(folder)
        if (run_id := run.wait_for_id()) is not None:
            # Where the store is away again, it gets the metrics that it has once more.
            with suppress(Exception):
                sweep = replace(sweep, recorded=tracking_store.list_finished_children(run_id))
        sweep.write()
        try:
            _run_trials(space, folder)
        except Exception:
            if not sweep.running():
                raise
            traceback.print_exc()  # a launcher's, of which a process was killed
            sys.exit(LOST)
        _conclude(sweep, space, _read_trials(sweep), run)
    wrote = f"{folder.relative_to(workspace.home)}/: {', '.join(WRITTEN)}"
    best = next((record.run_id for record in sweep.records() if record.run_id), "none")
    console.print_facts("", {"wrote": wrote, "MLflow run": run.describe(), "of the best": best})
    with suppress(Exception):  # a store that came back in between has none of the earlier trials
        send_left_journals()
    if run.id is not None:
        _show_link(run.id, space)


def _conclude(sweep: Sweep, space: Space, finished: list[choice.Trial], run: Run) -> None:
    """Write the summary, add it to the sweep's run, and print it."""
    fixed = space.fixed
    summary.write(sweep.folder, finished, fixed, Path(space.base.model.path).name)
    for name in WRITTEN:
        if (sweep.folder / name).exists():
            run.log_artifact(sweep.folder / name)
    count = sum(trial.has_loss for trial in finished)
    run.log_metrics(0, {"points_finished": count, "points_failed": len(finished) - count})
    run.set_tags({"mlflow.note.content": summary.markdown(finished, fixed)})
    summary.show(finished, fixed)
    if not count:
        raise UserError("sweep.no_trial_finished")


def _show_link(run_id: str, space: Space) -> None:
    """Set up MLflow's pages for this sweep, and print the link to them."""
    flat = flatten(space.base)
    numbers = {"train.num_layers": LAYERS}
    keys = [numbers.get(key, key if key in flat else f"{key}.method") for key in space.swept]
    try:
        client = tracking_store.connect()
        experiment = client.get_run(run_id).info.experiment_id
        query = mlflow_views.save_sweep_view(client, experiment, run_id, keys, "kept_val_loss")
    except Exception as error:  # the store may be away by now
        console.warn(f"MLflow's pages can't be set up: {tracking_store.summarize_error(error)}")
        return
    served = tracking_store.uri().startswith(("http://", "https://"))
    base = tracking_store.shown_uri() if served else f"http://127.0.0.1:{ui.PORT}"
    if not served:
        console.out.print(f"`uv run python -m athanor.ui {run_id[:8]}` opens MLflow's charts of it")
    link = mlflow_views.link_runs(base, experiment, query=query)
    console.out.print(link, soft_wrap=True, highlight=False)


def _read_trials(sweep: Sweep) -> list[choice.Trial]:
    """Return all trials with their measurements; for the chosen one also on `test`."""
    records = sweep.records()
    finished = [
        recording.read_trial(record, trials_folder() / record.digest / str(record.tested))
        if record.status is TrialStatus.FINISHED
        else recording.read_trial(record)
        for record in records
    ]
    chosen = choice.choose(finished).trial
    if chosen is not None:
        index = next(index for index, trial in enumerate(finished) if trial is chosen)
        finished[index] = trials.examine_chosen(sweep, records[index])
    return finished


def _start_dvc_status() -> "subprocess.Popen[str] | None":
    """Let DVC compare the results of `prepare` with data, model and code as they are."""
    if not Path("dvc.yaml").exists() or not Path(".dvc").exists():
        return None
    command = [sys.executable, "-m", "dvc", "status", "--json", "prepare"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _refuse_stale(process: "subprocess.Popen[str] | None") -> None:
    """Raise UserError where DVC reports that the results of `prepare` are out of date."""
    if process is None:
        return
    output, errors = process.communicate()
    try:
        status = json.loads(output)
    except ValueError:
        reason = " ".join(errors.strip().splitlines()[-1:])
        console.warn(f"`dvc status prepare` can't tell if it is up to date: {reason}")
        return
    if status:
        changes = json.dumps([change for stage in status.values() for change in stage])
        raise UserError("sweep.stale_rows", changes=changes)


def _run_trials(space: Space, folder: Path) -> None:
    """Let Hydra call trials.run for each trial, with its sweeper and its launcher."""
    switches.configure_hydra(optuna="sampler" in space.sweeper)
    sys.argv = [
        "sweep",
        "--multirun",
        "hydra/job_logging=disabled",
        "hydra/hydra_logging=disabled",
        "hydra.output_subdir=null",
        f"hydra.sweep.dir={naming.as_override(str(folder / 'hydra'))}",
        "hydra.job.name=sweep",
        *space.typed,
        *space.fixed,
        *space.hydra,
    ]
    task = hydra.main(
        config_path=str(Workspace.here().conf.resolve()), config_name="config", version_base="1.3"
    )
    task(trials.run)()


def _describe(space: Space, base: Prepared) -> dict[str, Any]:
    """Return everything that decides the sweep's results; its digest names the sweep's folder."""
    initial = find_initial_adapters(space.base, base.workspace)
    identity = training_identity(space.base, base, initial)
    flat = flatten(space.base)
    return {
        "swept": list(space.swept.items()),
        "sweeper": json.loads(json.dumps(space.sweeper | {"params": None}, default=str)),
        **{key: value for key, value in identity.items() if key not in space.swept},
        **{key: value for key, value in flat.items() if key.startswith("test.")},
    }


def _start_run(sweep: Sweep, space: Space, base: Prepared) -> Run:
    """Open the sweep's own run."""
    keys = " × ".join(naming.short_names(sweep.keys).values())
    return start_run(
        f"sweep {keys}: {Path(base.source.path).name} {space.base.train.method}",
        {f"sweep.{key}": ",".join(values) for key, values in space.swept.items()},
        {**lineage.collect_tags(), "device": describe_device(), "athanor.sweep": sweep.run},
        list_datasets(base.workspace),
        run=sweep.run,
    )
