"""A fused model in MLflow: the model of a run, and a version in the model registry.

`log_model` logs a folder that `mlflow models predict` answers with: a pyfunc whose code is
served_model.py, with signature, input example and pinned requirements. `register_version` makes it
a version of a registered model. Called again, they leave one model and one version.
"""

import hashlib
import json
import os
import platform
import shutil
from importlib.metadata import distributions, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from athanor import console, switches
from athanor.runs.entries import LogModel
from athanor.runs.outbox import link_or_copy

if TYPE_CHECKING:
    from athanor.compute.arrays import TokenizedText

ALIAS = "best"
# For requests without them; `mlflow.pyfunc.load_model(…, model_config=…)` changes them.
DEFAULTS = {"max_tokens": 512, "temperature": 0.0}
SECONDS_FOR_AN_UPLOAD = 600
# Tags of the run that MLflow's own log_model gives a model.
RUN_TAGS = ("mlflow.user", "mlflow.source.name", "mlflow.source.type", "mlflow.source.git.commit")


def digest_validation(rows: "list[TokenizedText]") -> str:
    """Return the sha256 over the tokens of a validation loss, and which of them count.

    Two losses are comparable if it is equal: beside the rows also the tokenizer, the template and
    the length at which rows are cut decide a loss per token.
    """
    total = hashlib.sha256()
    for row in rows:
        total.update(json.dumps([row.ids, row.targets(), row.supervised]).encode())
    return total.hexdigest()


def pin_requirements() -> list[str]:
    """Return the packages that served_model.py needs, pinned to the installed versions.

    On Linux mlx needs a backend: this machine's, or the CPU's if this is no Linux.
    """
    extras = {"mlx-cuda-13": "cuda13", "mlx-cuda-12": "cuda12"}
    installed = {distribution.name for distribution in distributions()}
    backend = next((extra for name, extra in extras.items() if name in installed), "cpu")
    pinned = [f"{name}=={version(name)}" for name in ("mlflow", "mlx", "mlx-lm", "transformers")]
    return [*pinned, f"mlx[{backend}]=={version('mlx')} ; sys_platform == 'linux'"]


def _write_folder(fused: Path, out: Path, entry: LogModel, ids: dict[str, str]) -> None:
    """Write a folder in MLflow's format to `out`, with links to a fused model's files.

    Nothing is loaded or downloaded. `ids` are MLflow's of the logged model (artifact_path,
    model_id, model_uuid, run_id).
    """
    from mlflow.models import Model
    from mlflow.pyfunc import save_model

    shutil.rmtree(out, ignore_errors=True)
    code = Path(__file__).with_name("served_model.py")
    save_model(
        out,
        python_model=code,
        signature=_signature(),
        input_example={"messages": [{"role": "user", "content": entry.question}]},
        model_config={"name": entry.registered_name or "fused", **DEFAULTS, **entry.settings},
        conda_env={  # with pip_requirements alone MLflow warns where pip itself is not installed
            "name": "mlflow-env",
            "channels": ["conda-forge"],
            "dependencies": [f"python={platform.python_version()}", "pip", {"pip": entry.pip}],
        },
        mlflow_model=Model(**ids),
    )
    # save_model would copy the files once or twice more.
    shutil.copytree(fused, out / "artifacts" / "model", copy_function=link_or_copy)
    model = Model.load(out)
    model.flavors["python_function"] |= {
        "artifacts": {"model": {"path": "artifacts/model", "uri": "artifacts/model"}},
        "model_code_path": code.name,  # only the name is used
    }
    model.model_size_bytes = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    model.save(out / "MLmodel")


def log_model(client: Any, run_id: str, fused: Path, out: Path, entry: LogModel) -> Any:
    """Make a fused model the model of a run; return MLflow's LoggedModel.

    It has the run's params, and the run's metrics at the entry's step. A run has one model of each
    digest: an existing one is completed, not created again. `out` is for the folder in MLflow's
    format.
    """
    from mlflow.entities import LoggedModelOutput, LoggedModelStatus

    run = client.get_run(run_id)
    experiment = run.info.experiment_id
    logged = client.search_logged_models(
        [experiment], f"source_run_id = '{run_id}' AND tags.`fused.digest` = '{entry.digest}'"
    )
    model = next(iter(logged), None) or client.create_logged_model(
        experiment,
        "fused",
        source_run_id=run_id,
        tags={
            **{key: run.data.tags[key] for key in RUN_TAGS if key in run.data.tags},
            **entry.tags,
            "fused.digest": entry.digest,
        },
        params=run.data.params,
    )
    if model.status == LoggedModelStatus.READY:
        return model
    outputs = run.outputs.model_outputs if run.outputs else []
    if all(output.model_id != model.model_id for output in outputs):
        client.log_outputs(run_id, [LoggedModelOutput(model.model_id, entry.step)])
    client.log_batch(run_id, _copy_metrics(client, run, model.model_id, entry.step))
    ids = {"model_id": model.model_id, "model_uuid": model.model_id, "run_id": run_id}
    ids["artifact_path"] = model.artifact_location
    _write_folder(fused, out, entry, ids)
    with switches.mlflow_timeout(SECONDS_FOR_AN_UPLOAD):
        client.log_model_artifacts(model.model_id, str(out))
    return client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)


def _copy_metrics(client: Any, run: Any, model_id: str, step: int) -> list[Any]:
    """Return a run's metrics at a step as its model's, the losses with their datasets."""
    from mlflow.entities import Metric

    datasets = {tag.value: read.dataset for read in run.inputs.dataset_inputs for tag in read.tags}
    of_loss = {"train_loss": datasets.get("training"), "val_loss": datasets.get("validation")}
    return [
        Metric(
            *(key, metric.value, metric.timestamp, step),
            model_id=model_id,
            run_id=run.info.run_id,
            dataset_name=getattr(of_loss.get(key), "name", None),
            dataset_digest=getattr(of_loss.get(key), "digest", None),
        )
        for key in run.data.metrics
        for metric in client.get_metric_history(run.info.run_id, key)
        if metric.step == step
    ]


def register_version(client: Any, name: str, model: Any, tags: dict[str, str]) -> str:
    """Make a logged model a version of the registered model `name`; return that in words.

    `tags` contain `val_loss`, in nats, and `valid.digest`, the digest of what it was measured on.
    The version gets the alias `best` if no version has it, or if the version that has it was
    measured on the same and has a higher loss.
    """
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    run, digest = model.source_run_id, model.tags["fused.digest"]
    versions = client.search_model_versions(f"name = '{name}' AND run_id = '{run}'")
    registered = next((v for v in versions if v.tags.get("fused.digest") == digest), None)
    if registered is None:
        # By its location: MLflow looks up `models:/<id>` in its global store, not in this one.
        registered = client.create_model_version(
            name,
            model.artifact_location,
            run,
            tags={**tags, "fused.digest": digest},
            model_id=model.model_id,
        )
    # By this tag MLflow's UI finds the versions of a model; a server has set it already.
    tagged = client.get_logged_model(model.model_id).tags.get("mlflow.modelVersions", "[]")
    others = [entry for entry in json.loads(tagged) if entry["name"] != name]
    tag = json.dumps([*others, {"name": name, "version": str(registered.version)}])
    client.set_logged_model_tags(model.model_id, {"mlflow.modelVersions": tag})
    return _set_alias(client, name, str(registered.version), tags)


def _set_alias(client: Any, name: str, new: str, tags: dict[str, str]) -> str:
    """Give a version the alias if it is the best; return in words which version has it."""
    text = f"{name} version {new}"
    before = client.get_registered_model(name).aliases.get(ALIAS)
    if before is not None and str(before) != new:
        best = client.get_model_version(name, before).tags
        if best.get("valid.digest") != tags["valid.digest"]:
            console.warn(
                f"{text} and version {before}, which is {ALIAS}, were validated on different rows, "
                f"so their losses cannot be compared; {ALIAS} stays. To move it: "
                f"{_alias_command(name, new)}"
            )
            return f"{text}; {ALIAS} stays version {before}, validated on different rows"
        losses = f"{float(tags['val_loss']):.4f} to {float(best['val_loss']):.4f}"
        if not float(tags["val_loss"]) < float(best["val_loss"]):
            return f"{text}; {ALIAS} stays version {before} (validation loss {losses})"
        text += f", better than version {before} (validation loss {losses})"
    if str(before) != new:
        client.set_registered_model_alias(name, ALIAS, new)
    return f"{text}; {ALIAS} is this one"


def _alias_command(name: str, new: str) -> str:
    # The URI of a store can contain a password.
    where = "" if os.environ.get("MLFLOW_TRACKING_URI") else '"sqlite:///mlruns/mlflow.db"'
    return (
        f"uv run python -c 'from mlflow import MlflowClient; "
        f'MlflowClient({where}).set_registered_model_alias("{name}", "{ALIAS}", "{new}")\''
    )


def _signature() -> Any:
    """Return the signature of served_model.py: from conversations to OpenAI's completions."""
    from mlflow.models import ModelSignature
    from mlflow.types.schema import Array, ColSpec, DataType, Object, Property, Schema

    message = Object([Property(key, DataType.string) for key in ("role", "content")])
    choice = [("index", DataType.long), ("message", message), ("finish_reason", DataType.string)]
    counts = ("prompt_tokens", "completion_tokens", "total_tokens")
    return ModelSignature(
        inputs=Schema(
            [
                ColSpec(Array(message), "messages"),
                ColSpec(DataType.long, "max_tokens", required=False),
                ColSpec(DataType.double, "temperature", required=False),
            ]
        ),
        outputs=Schema(
            [
                ColSpec(DataType.string, "id"),
                ColSpec(DataType.string, "object"),
                ColSpec(DataType.long, "created"),
                ColSpec(DataType.string, "model"),
                ColSpec(Array(Object([Property(*property) for property in choice])), "choices"),
                ColSpec(Object([Property(key, DataType.long) for key in counts]), "usage"),
            ]
        ),
    )
