"""The trials of a sweep: each trained and tested once, and kept by the digest of what decides it.

    artifacts/sweep/points/<digest>/     the results of a trial, for every sweep that has it
        adapters/ other_adapters/ history.csv metrics.json
        trained.json                     all measurements of its training; written last
        test-<digest>/                   the results of its test
    artifacts/sweep/<key>/               a sweep
        sweep.json params.yaml base.json what its trials share
        points/<digest>.json             the record of a trial

Hydra calls `run` for each trial: in this process, in several side by side (joblib), or on other
machines (submitit). What the trials share is loaded once per process.
"""

import copy
import hashlib
import json
import math
import os
import traceback
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from athanor import console, files, locks, switches
from athanor.code import digest_code
from athanor.compute.forward import Forward
from athanor.config import schema
from athanor.config.check import check_config
from athanor.config.schema import Config
from athanor.config.values import flatten
from athanor.device import blas
from athanor.errors import UserError
from athanor.model.adapters import InitialAdapters, load_adapters, read_adapter_names
from athanor.model.load import copy_sharing_weights
from athanor.paths import SPLITS, Workspace
from athanor.runs.initial import find_initial_adapters
from athanor.runs.run import Run, resume_run
from athanor.runs.stage_records import (
    record_test,
    record_training,
    start_training,
)
from athanor.sweep import choice, naming, summary
from athanor.sweep.description import Sweep, trials_folder
from athanor.sweep.recording import fail, read_trial, record_failure
from athanor.sweep.shared import TESTED_SPLITS, Shared, load_shared
from athanor.sweep.supervise import WORKER
from athanor.sweep.trial_record import TrialRecord, TrialStatus
from athanor.test.examine import Examination, examine
from athanor.test.predictions import as_columns, read_predictions
from athanor.train import checkpoints
from athanor.train.fit import fit
from athanor.train.identity import training_identity
from athanor.train.metrics import Metrics
from athanor.train.result import write_result


def run(composed: DictConfig) -> float:
    """Train and test a trial, unless that was done; this is Hydra's task.

    Returns the validation loss of the adapters that are kept, in nats a token; inf where the
    training failed, which is recorded, so that the sweep goes on.

    Raises:
        KeyboardInterrupt: after Ctrl-C or SIGTERM; the trial resumes from its checkpoint.
    """
    from hydra.core.hydra_config import HydraConfig

    _end_with_worker()
    sweep = Sweep.here()
    blas.use_threads(sweep.blas_threads)
    hydra = HydraConfig.get()
    tree: Any = OmegaConf.to_container(composed, resolve=True)
    pairs = (text.lstrip("+").partition("=") for text in hydra.overrides.task)
    overrides = {key: value for key, _, value in pairs}
    shared = load_shared(sweep.folder)
    try:
        cfg = check_config(tree, {}, [])
        initial = find_initial_adapters(cfg, shared.base.workspace)
    except UserError as error:  # of values that are valid only by themselves
        values = {key: _parse(key, overrides) for key in sweep.keys}
        record = _new_record(sweep, hydra.job.num, checkpoints.key(tree), values)
        fail(sweep, record, str(error))
        return math.inf
    flat = flatten(cfg)
    values = {key: flat[key] if key in flat else _parse(key, overrides) for key in sweep.keys}
    return _run_trial(sweep, hydra.job.num, values, cfg, shared, initial)


@cache
def _end_with_worker() -> None:
    """Let a process that a launcher started on this machine end with the worker of its sweep."""
    worker = int(os.environ.get(WORKER, os.getpid()))
    if worker != os.getpid() and "SLURM_JOB_ID" not in os.environ:  # Slurm ends its jobs itself
        switches.end_with_parent(lambda: switches.wait_for_end(worker))


def _parse(key: str, overrides: dict[str, str]) -> Any:
    """Return the value of an override; the option's name for a group."""
    return OverridesParser.create().parse_override(f"{key}={overrides[key]}").value()


def _new_record(
    sweep: Sweep,
    number: int,
    digest: str,
    values: dict[str, Any],
    seed: int | None = None,
    tested: str | None = None,
) -> TrialRecord:
    return TrialRecord(
        number=number,
        digest=digest,
        run=sweep.run_of(digest),
        values=values,
        label=naming.name_trial(values),
        command=sweep.command,
        status=TrialStatus.RUNNING,
        seed=seed,
        tested=tested,
    )


def _refuse_changed(sweep: Sweep, identity: dict[str, Any], cfg: Config, shared: Shared) -> None:
    """Raise UserError where a file was changed since the sweep began.

    The rows and the code in memory are the former ones, and the digest would name the new.
    """
    about = files.read_json(sweep.folder / "about.json")
    changed = [
        key
        for key in ("data", "model", "code", "libraries", "device", "end")
        if json.loads(json.dumps(identity[key])) != about[key]
    ]
    if set(sweep.keys) <= set(schema.all_keys()):  # of a group any key may have changed
        before = flatten(shared.cfg)
        changed += [
            key
            for key, value in flatten(cfg).items()
            if key not in sweep.keys and value != before[key]
        ]
    if changed:
        raise UserError("sweep.files_changed", changed=changed)


def _run_trial(
    sweep: Sweep,
    number: int,
    values: dict[str, Any],
    cfg: Config,
    shared: Shared,
    initial: InitialAdapters | None,
) -> float:
    """Train and test a trial, or read the results of that, and record it; return its loss."""
    identity = training_identity(cfg, shared.base, initial)
    _refuse_changed(sweep, identity, cfg, shared)
    digest = checkpoints.key(identity)
    folder = trials_folder() / digest
    resumed = shared.base.workspace.checkpoints / digest
    tested = folder / name_test_folder(cfg)
    record = _new_record(sweep, number, digest, values, cfg.seed, tested.name)
    with files.lock(folder / "lock"):  # other processes of a sweep may run the same trial
        locks.remove([*folder.glob(".*")])  # of a process that was killed
        before = sweep.record(digest)
        new = before is None or before.command != sweep.command
        if before and before.status is TrialStatus.FAILED and not new:
            return math.inf
        record = record.started(before)
        trained = (folder / "trained.json").exists()
        if trained and (tested / "metrics.json").exists() and record.run in sweep.recorded:
            if new:  # else it was printed
                _print_result(sweep, number, record.label, folder, "was trained before")
            if resumed.exists():  # left by a process that ended in the last moment
                checkpoints.Checkpoints(resumed.parent, identity).clear()
            record.finished().write(sweep.folder)
            return float(files.read_json(folder / "metrics.json")["kept_val_loss"])
        record.write(sweep.folder)
        with files.lock(resumed / "lock"):  # the pipeline may run the same training
            pass
        kept: checkpoints.Checkpoints | None = None
        try:
            kept = checkpoints.Checkpoints(resumed.parent, identity)
            with start_training(
                shared.base.workspace,
                cfg,
                shared.base.source,
                shared.base.folder,
                record.label,
                digest,
                record.run,
                parent=sweep.run,
                initial=initial,
            ) as opened:
                metrics = _train(cfg, shared, folder, kept, opened, initial)
                examined = _examine(cfg, shared, folder, tested, TESTED_SPLITS)
                _record_test(opened, tested, examined, int(metrics["kept_iteration"]))
                note = summary.note(read_trial(record.finished(), tested))
                opened.set_tags({"mlflow.note.content": note})
        except KeyboardInterrupt:
            record.killed().write(sweep.folder)
            raise
        except Exception as error:
            if not isinstance(error, UserError):
                traceback.print_exc()
            if kept is not None:
                kept.close()
            kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            record_failure(sweep, record, f"{kind}{error}")
            return math.inf
        finally:
            switches.release_memory()
        kept.clear()
        record.finished().write(sweep.folder)
        how = "was trained before" if trained else "done"
        _print_result(sweep, number, record.label, folder, how)
        return float(metrics["kept_val_loss"])


def _train(
    cfg: Config,
    shared: Shared,
    folder: Path,
    kept: checkpoints.Checkpoints,
    run: Run,
    initial: InitialAdapters | None,
) -> dict[str, float]:
    """Train the trial, or read the results of its training, and record both in its run."""
    path = folder / "trained.json"

    def publish(metrics: Metrics) -> None:
        run.log_metrics(metrics.iteration, metrics.values, once=True)

    if path.exists():
        trained = files.read_json(path)
        for entry in trained["history"]:
            publish(Metrics(**entry))
    else:
        model = copy_sharing_weights(shared.model)
        base, tokens, reused = shared.base, shared.tokens, shared.shared_for(cfg)
        trainer = fit(cfg, base, model, tokens, kept, publish, initial=initial, shared=reused)
        metrics = write_result(cfg, trainer, base.source, folder)
        trained = {"metrics": metrics, "history": list(map(asdict, trainer.state.history))}
        files.write_json(path, trained)
    record_training(run, shared.base.workspace, folder, trained["metrics"])
    return dict(trained["metrics"])


def _examine(
    cfg: Config, shared: Shared, folder: Path, tested: Path, names: tuple[str, ...]
) -> Examination:
    """Test the adapters of a trial on some splits, or read the results of that."""
    if not (tested / "metrics.json").exists():
        model = copy_sharing_weights(shared.model)
        load_adapters(model, folder / "adapters")
        splits = {name: shared.splits[name] for name in names}
        base = {name: shared.outcomes[name] for name in names}
        frozen = shared.shared_for(cfg).frozen
        trained = read_adapter_names(folder / "adapters")
        cut = frozen.choose_cut(trained) if frozen is not None else 0
        forward = Forward(model, shared.frozen.parts, frozen, cut)
        tuned = examine(cfg, model, shared.tokenizer, splits, "tuned", forward)
        Examination.compare(splits, base, tuned, shared.tokenizer, shared.labels).write(tested)
    predictions = read_predictions(tested / "predictions.jsonl")
    metrics = files.read_json(tested / "metrics.json")
    return Examination(predictions, metrics, sorted(shared.labels))


def examine_chosen(sweep: Sweep, record: TrialRecord) -> choice.Trial:
    """Test the chosen trial's adapters on the rows of `test` too, and add that to its run."""
    shared = load_shared(sweep.folder)
    cfg = copy.deepcopy(shared.cfg)
    assert record.seed is not None
    cfg.seed = record.seed
    folder = trials_folder() / record.digest
    tested, chosen, together = (
        folder / f"{record.tested}{suffix}" for suffix in ("", "-chosen", "-all")
    )
    seen = _examine(cfg, shared, folder, tested, TESTED_SPLITS)
    last = _examine(cfg, shared, folder, chosen, ("test",))
    predictions = seen.predictions + last.predictions
    both = Examination(predictions, seen.metrics | last.metrics, last.labels)
    both.write(together)
    iteration = int(files.read_json(folder / "metrics.json")["kept_iteration"])
    with resume_run(record.run, None) as run:  # by our name: it has an id in each store
        _record_test(run, together, both, iteration)
        record = record.chosen(run.wait_for_id()).write(sweep.folder)
    return read_trial(record, tested, chosen)


def name_test_folder(cfg: Config) -> str:
    """Return the name of the folder for the results of a test as `cfg` describes it."""
    options = {key: value for key, value in flatten(cfg).items() if key.startswith("test.")}
    rows = files.digest(Workspace.here().rows(split) for split in SPLITS)
    code = digest_code(["athanor.test.examine"])
    return "test-" + hashlib.sha256(json.dumps([options, rows, code]).encode()).hexdigest()[:8]


def _record_test(run: Run, folder: Path, examination: Examination, iteration: int) -> None:
    """Add the results of a test to the run of its trial, where they are not there yet."""
    answers = as_columns(examination.predictions)
    confusion = examination.confusion_csv()
    record_test(run, folder, examination.metrics, answers, confusion, iteration, once=True)


def _print_result(sweep: Sweep, number: int, label: str, folder: Path, how: str) -> None:
    metrics = files.read_json(folder / "metrics.json")
    console.out.print(
        f"{number + 1:>3} of {sweep.total}  {label}  validation loss "
        f"{metrics['kept_val_loss']:.4f}  {metrics['train_seconds']:.1f} s  {how}",
        highlight=False,
    )
