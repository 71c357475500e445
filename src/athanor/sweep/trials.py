"""The points of a sweep: each trained and tested once, and kept by the digest of what decides it.

    artifacts/sweep/points/<digest>/     a training's results, whichever sweeps it is a point of
        adapters/ other_adapters/ history.csv metrics.json
        trained.json                     all that was measured; written last
        test-<digest>/                   what came of testing it so
    artifacts/sweep/<key>/               a sweep
        sweep.json params.yaml base.json what its points share
        points/<digest>.json             where each point stands

Hydra calls `run` for each point: in this process, in others side by side (joblib), or on other
machines (submitit). What the points share is loaded once a process.
"""

import copy
import hashlib
import json
import math
import os
import traceback
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from athanor import console, files, switches
from athanor.code import digest_code
from athanor.compute.arrays import TokenizedText
from athanor.compute.evaluation import Answer
from athanor.compute.forward import Forward
from athanor.compute.frozen import FrozenLayers
from athanor.config import schema
from athanor.config.check import check_config
from athanor.config.compose import read_params
from athanor.config.schema import Config
from athanor.config.values import flatten
from athanor.device import blas
from athanor.errors import UserError
from athanor.model.adapters import load_adapters, read_adapter_names
from athanor.model.load import copy_sharing_weights
from athanor.paths import SPLITS, Workspace
from athanor.prepare import result
from athanor.prepare.result import Prepared
from athanor.runs import lineage
from athanor.runs.run import Run, resume_run, start_run
from athanor.runs.stage_records import record_test, record_training, start_training
from athanor.sweep import choice, summary
from athanor.test.examine import Examined, Split, build_splits, examine, examine_options
from athanor.test.figures import Outcome, as_columns
from athanor.train import checkpoints
from athanor.train.build import build_frozen
from athanor.train.fit import fit, warn_of_rows_without_targets
from athanor.train.identity import training_identity
from athanor.train.metrics import Metrics
from athanor.train.result import write_result
from athanor.train.shared import SharedBase

# Where the processes of a sweep find it.
FOLDER = "ATHANOR_SWEEP"
CURVES = ("train_loss", "val_loss")
# What a point is examined on; the rows of `test` are for the one that is chosen.
SEEN = ("train", "valid")


@dataclass(frozen=True)
class Sweep:
    """What the points of a sweep have in common.

    `run` is our name for its MLflow run; `keys` are swept; `recorded` are the names of those of its
    points' runs that the store has whole; `command` is one start of it. `blas_threads` are those of
    the process that started it: one with fewer cores computes with as many.
    """

    folder: Path
    run: str
    keys: list[str]
    total: int
    recorded: list[str]
    command: str
    blas_threads: int | None

    def write(self) -> None:
        """Writes sweep.json, and tells the processes of this sweep where."""
        files.write_json(self.folder / "sweep.json", asdict(self) | {"folder": str(self.folder)})
        os.environ[FOLDER] = str(self.folder)

    @classmethod
    def here(cls) -> "Sweep":
        """The sweep that this process is part of."""
        found = files.read_json(Path(os.environ[FOLDER]) / "sweep.json")
        return cls(**found | {"folder": Path(found["folder"])})

    def run_of(self, digest: str) -> str:
        """Our name for a point's MLflow run: the same whenever the sweep goes on."""
        return hashlib.sha256(f"{self.run} {digest}".encode()).hexdigest()[:32]

    def note(self, digest: str) -> Path:
        """The file that says where a point stands."""
        return self.folder / "points" / f"{digest}.json"

    def notes(self) -> list[dict[str, Any]]:
        """Where the points stand, in their order."""
        found = [files.read_json(path) for path in (self.folder / "points").glob("*.json")]
        return sorted(found, key=lambda note: note["number"])


@dataclass(frozen=True)
class Loaded:
    """What the points share in memory; no result of one depends on what others add to it.

    `cfg` is the sweep's own, before any point changes it.
    """

    cfg: Config
    base: Prepared
    model: Any
    frozen: FrozenLayers
    tokenizer: Any
    tokens: dict[str, list[TokenizedText]]
    splits: dict[str, Split]
    outcomes: dict[str, Outcome]
    peaks: dict[str, int] = field(default_factory=dict)

    def shared_for(self, cfg: Config) -> SharedBase:
        """Return what trainings share; without activations where `cfg` computes others."""
        ours, theirs = self.cfg.train, cfg.train
        same = (ours.reuse_activations, ours.compile) == (theirs.reuse_activations, theirs.compile)
        return SharedBase(self.frozen if same else None, self.peaks)

    @property
    def labels(self) -> set[str]:
        """The labels of all classification rows."""
        return set[str]().union(*(split.labels for split in self.splits.values()))


@lru_cache(1)
def loaded(folder: Path) -> Loaded:
    """Loads what the points of the sweep in `folder` share; the base is examined by the first."""
    cfg = read_params(folder / "params.yaml")
    base = Prepared.read(cfg, Workspace.here())
    rows = result.read_rows(base.workspace, SPLITS)
    model, tokenizer = base.load()
    splits = build_splits(cfg, base, tokenizer, rows)
    tokens = {split: splits[split].tokens for split in SEEN}
    frozen = build_frozen(
        cfg, base.workspace, model, tokens["train"], _cuts(cfg, folder, len(model.layers))
    )
    path = folder / "base.json"
    if path.exists():
        outcomes = {
            split: Outcome(said["loss"], [Answer(**answer) for answer in said["answers"]])
            for split, said in files.read_json(path).items()
        }
    else:
        for split in SEEN:
            warn_of_rows_without_targets(base.workspace, split, len(rows[split]), tokens[split])
        forward = Forward(model, frozen.parts)
        outcomes = examine(
            model, tokenizer, splits, who="base", forward=forward, **examine_options(cfg)
        )
        files.write_json(path, {split: asdict(outcome) for split, outcome in outcomes.items()})
    return Loaded(cfg, base, model, frozen, tokenizer, tokens, splits, outcomes)


def _cuts(cfg: Config, folder: Path, layers: int) -> list[int]:
    """The first trained layers of the points of the sweep in `folder`, as far as they are known."""
    swept = dict(files.read_json(folder / "about.json")["swept"])
    numbers = swept.get("train.num_layers", [str(cfg.train.num_layers)])
    found = {layers - int(number) for number in numbers if number.isdecimal()}
    return sorted(cut for cut in found if cut > 0)


def run(composed: DictConfig) -> float:
    """Trains and tests a point, unless that was done; Hydra's task.

    Returns the validation loss of the adapters that are kept, in nats a token; inf where the
    training failed, which is noted, so that the sweep goes on.

    Raises:
        KeyboardInterrupt: after Ctrl-C or SIGTERM; the point goes on from its checkpoint.
    """
    from hydra.core.hydra_config import HydraConfig

    sweep = Sweep.here()
    blas.use_threads(sweep.blas_threads)
    hydra = HydraConfig.get()
    tree: Any = OmegaConf.to_container(composed, resolve=True)
    typed = (text.lstrip("+").partition("=") for text in hydra.overrides.task)
    overrides = {key: value for key, _, value in typed}
    shared = loaded(sweep.folder)
    try:
        cfg = check_config(tree, {}, [])
    except UserError as error:  # of values that are right by themselves only
        values = {key: _parsed(key, overrides) for key in sweep.keys}
        digest = checkpoints.key(tree)
        note = {"number": hydra.job.num, "digest": digest, "values": values}
        note |= {"run": sweep.run_of(digest), "label": choice.called(values)}
        fail(sweep, note, str(error))
        return math.inf
    values = {key: _value(cfg, key, overrides) for key in sweep.keys}
    return _point(sweep, hydra.job.num, values, cfg, shared)


def _value(cfg: Config, key: str, overrides: dict[str, str]) -> Any:
    flat = flatten(cfg)
    return flat[key] if key in flat else _parsed(key, overrides)


def _parsed(key: str, overrides: dict[str, str]) -> Any:
    """The value of an override; the option's name for a group."""
    return OverridesParser.create().parse_override(f"{key}={overrides[key]}").value()


def _refuse_changed(sweep: Sweep, decides: dict[str, Any], cfg: Config, shared: Loaded) -> None:
    """Stops where a file was changed while the sweep ran: rows and code in memory are the former.

    Raises:
        UserError: with what is other than when it began.
    """
    about = files.read_json(sweep.folder / "about.json")
    changed = [
        key
        for key in ("data", "model", "code", "libraries", "device", "end")
        if json.loads(json.dumps(decides[key])) != about[key]
    ]
    began = flatten(shared.cfg)
    if set(sweep.keys) <= set(schema.all_keys()):  # of a group any key may have changed
        changed += [
            key
            for key, value in flatten(cfg).items()
            if key not in sweep.keys and value != began[key]
        ]
    if changed:
        raise UserError(
            f"{', '.join(changed)}: not what the sweep started with: files were changed while it "
            "ran; the same command starts one of what is there now"
        )


def _point(sweep: Sweep, number: int, values: dict[str, Any], cfg: Config, shared: Loaded) -> float:
    decides = training_identity(cfg, shared.base)
    _refuse_changed(sweep, decides, cfg, shared)
    digest = checkpoints.key(decides)
    folder = points() / digest
    resumed = shared.base.workspace.checkpoints / digest
    tested = folder / test_key(cfg)
    name, label = sweep.run_of(digest), choice.called(values)
    note = {"number": number, "digest": digest, "run": name, "values": values, "label": label}
    with files.lock(folder / "lock"):  # other processes of a sweep may be at this trial, too
        path = sweep.note(digest)
        before = files.read_json(path) if path.exists() else {}
        note |= {key: before[key] for key in ("number", "deaths") if key in before}
        note |= {"seed": cfg.seed, "tested": tested.name, "command": sweep.command}
        if before.get("status") == "FAILED" and before["command"] == sweep.command:
            return math.inf
        trained = (folder / "trained.json").exists()
        if trained and (tested / "metrics.json").exists() and name in sweep.recorded:
            if before.get("command") != sweep.command:  # else that was said
                _say(sweep, number, label, folder, "was trained before")
            if resumed.exists():  # left by a process that ended in the last moment
                checkpoints.Checkpoints(resumed.parent, decides).clear()
            files.write_json(path, note | {"status": "FINISHED"})
            return float(files.read_json(folder / "metrics.json")["kept_val_loss"])
        files.write_json(path, note | {"status": "RUNNING"})
        with files.lock(resumed / "lock"):
            pass  # the pipeline may be at the same training
        kept: checkpoints.Checkpoints | None = None
        try:
            kept = checkpoints.Checkpoints(resumed.parent, decides)
            with start_training(
                shared.base.workspace,
                cfg,
                shared.base.source,
                shared.base.folder,
                label,
                digest,
                name,
                parent=sweep.run,
            ) as opened:
                metrics = _train(cfg, shared, folder, kept, opened)
                examined = _examined(cfg, shared, folder, tested, SEEN)
                iteration = int(metrics["kept_iteration"])
                finished = note | {"status": "FINISHED"}
                _record(opened, tested, examined, iteration)
                opened.set_tags({"mlflow.note.content": summary.note(measured(finished, tested))})
        except KeyboardInterrupt:
            files.write_json(path, note | {"status": "KILLED"})
            raise
        except Exception as error:
            if not isinstance(error, UserError):
                traceback.print_exc()
            if kept is not None:
                kept.close()
            _note_failure(sweep, note, _reason(error))
            return math.inf
        finally:
            switches.release_memory()
        kept.clear()
        files.write_json(path, finished)
        _say(sweep, number, label, folder, "was trained before" if trained else "done")
        return float(metrics["kept_val_loss"])


def _train(
    cfg: Config,
    shared: Loaded,
    folder: Path,
    kept: checkpoints.Checkpoints,
    opened: Run,
) -> dict[str, float]:
    """Trains the point and says so to its run; or says again what an earlier training said."""
    path = folder / "trained.json"

    def publish(metrics: Metrics) -> None:
        opened.log_metrics(metrics.iteration, metrics.values, once=True)

    if path.exists():
        found = files.read_json(path)
        for entry in found["history"]:
            publish(Metrics(**entry))
    else:
        trainer = fit(
            cfg,
            shared.base,
            copy_sharing_weights(shared.model),
            shared.tokens,
            kept,
            publish,
            shared=shared.shared_for(cfg),
        )
        metrics = write_result(cfg, trainer, shared.base.source, folder)
        history = [asdict(entry) for entry in trainer.state.history]
        found = {"metrics": metrics, "history": history}
        files.write_json(path, found)
    record_training(opened, shared.base.workspace, folder, found["metrics"])
    return dict(found["metrics"])


def _examined(
    cfg: Config, shared: Loaded, folder: Path, tested: Path, names: tuple[str, ...]
) -> Examined:
    """Tests the adapters of a point on some splits; or reads what came of it before."""
    if not (tested / "metrics.json").exists():
        model = copy_sharing_weights(shared.model)
        load_adapters(model, folder / "adapters")
        splits = {name: shared.splits[name] for name in names}
        before = {name: shared.outcomes[name] for name in names}
        trained = read_adapter_names(folder / "adapters")
        frozen = shared.shared_for(cfg).frozen
        cut = frozen.choose_cut(trained) if frozen is not None else 0
        forward = Forward(model, shared.frozen.parts, frozen, cut)
        after = examine(
            model, shared.tokenizer, splits, who="tuned", forward=forward, **examine_options(cfg)
        )
        Examined.of(splits, before, after, shared.tokenizer, shared.labels).write(tested)
    lines = files.read_jsonl(tested / "predictions.jsonl")
    return Examined(lines, files.read_json(tested / "metrics.json"), sorted(shared.labels))


def test_chosen(sweep: Sweep, note: dict[str, Any]) -> choice.Point:
    """Tests the chosen point's adapters on the rows of `test`, too, and adds that to its run."""
    shared = loaded(sweep.folder)
    cfg = copy.deepcopy(shared.cfg)
    cfg.seed = note["seed"]
    folder = points() / note["digest"]
    seen = _examined(cfg, shared, folder, folder / note["tested"], SEEN)
    out = folder / f"{note['tested']}-chosen"
    last = _examined(cfg, shared, folder, out, ("test",))
    both = Examined(seen.lines + last.lines, seen.metrics | last.metrics, last.labels)
    iteration = int(files.read_json(folder / "metrics.json")["kept_iteration"])
    together = folder / f"{note['tested']}-all"
    both.write(together)
    with resume_run(note["run"], None) as opened:  # by our name: it has an id in each store
        _record(opened, together, both, iteration)
        found = note | {"run_id": opened.wait_for_id()}
    files.write_json(sweep.note(note["digest"]), found)
    return measured(note, folder / note["tested"], out)


test_chosen.__test__ = False  # type: ignore[attr-defined]  # pytest, look elsewhere


def under_way(sweep: Sweep) -> list[dict[str, Any]]:
    """The notes of points that this start of the sweep has begun, and not ended."""
    return [
        note
        for note in sweep.notes()
        if note["status"] == "RUNNING" and note["command"] == sweep.command
    ]


def mark_dead(sweep: Sweep, cause: str) -> list[dict[str, Any]]:
    """Finds what was under way when a process died; returns the notes of those that failed.

    One that was alone, or that dies again, failed; of several, any can have been the cause. One
    whose work was done already is none of them.

    Raises:
        UserError: where none was under way: starting again would end in the same way.
    """
    found = under_way(sweep)
    if not found:
        raise UserError(f"the sweep was ended by {cause} while no point was under way")
    for note in found:
        note["deaths"] = note.get("deaths", 0) + 1
        files.write_json(sweep.note(note["digest"]), note)
    failed = [note for note in found if len(found) == 1 or note["deaths"] > 1]
    return [
        note
        for note in failed
        if not (points() / note["digest"] / note["tested"] / "metrics.json").exists()
    ]


def fail(sweep: Sweep, note: dict[str, Any], reason: str) -> None:
    """Notes that a point failed that is not under way, and ends its run so."""
    parameters = {key: choice.override(value) for key, value in note["values"].items()}
    with (
        suppress(UserError),
        start_run(
            note["label"], parameters, lineage.collect_tags(), [], run=note["run"], parent=sweep.run
        ) as opened,
    ):
        opened.set_tags({"mlflow.note.content": f"failed: {reason}"})
        raise UserError(reason)
    _note_failure(sweep, note, reason)


def _note_failure(sweep: Sweep, note: dict[str, Any], reason: str) -> None:
    failed = {"status": "FAILED", "reason": reason[:2000], "command": sweep.command}
    files.write_json(sweep.note(note["digest"]), note | failed)
    console.warn(f"{note['label']} failed, and the sweep goes on: {reason}")


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"


def measured(note: dict[str, Any], *tests: Path) -> choice.Point:
    """A point with all that was measured of it, and by the tests in some folders."""
    path = points() / note["digest"] / "trained.json"
    done = note["status"] == "FINISHED"
    found = files.read_json(path) if done else {"metrics": {}, "history": []}
    metrics = dict(found["metrics"])
    history: dict[int, dict[str, float]] = {}
    for entry in found["history"]:
        row = history.setdefault(entry["iteration"], {"iteration": entry["iteration"]})
        row |= {key: entry["values"][key] for key in CURVES if key in entry["values"]}
    for folder in tests:
        metrics |= files.read_json(folder / "metrics.json")
    return choice.Point(
        note["number"],
        note["values"],
        note["status"],
        note.get("reason"),
        metrics,
        list(history.values()),
    )


def points() -> Path:
    """Where the results of points are, of all sweeps."""
    return Workspace.here().sweeps / "points"


def test_key(cfg: Config) -> str:
    """The name of the folder for what came of testing as `cfg` says."""
    how = {key: value for key, value in flatten(cfg).items() if key.startswith("test.")}
    rows = files.digest(Workspace.here().rows(split) for split in SPLITS)
    code = digest_code(["athanor.test.examine"])
    return "test-" + hashlib.sha256(json.dumps([how, rows, code]).encode()).hexdigest()[:8]


test_key.__test__ = False  # type: ignore[attr-defined]


def _record(run: Run, out: Path, examined: Examined, iteration: int) -> None:
    """Add the results of a test to the run of its trial, where they are not there yet."""
    record_test(
        run,
        out,
        examined.metrics,
        as_columns(examined.lines),
        examined.confusion(),
        iteration,
        once=True,
    )


def _say(sweep: Sweep, number: int, label: str, folder: Path, how: str) -> None:
    metrics = files.read_json(folder / "metrics.json")
    console.out.print(
        f"{number + 1:>3} of {sweep.total}  {label}  validation loss "
        f"{metrics['kept_val_loss']:.4f}  {metrics['train_seconds']:.1f} s  {how}",
        highlight=False,
    )
