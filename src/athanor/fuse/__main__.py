"""Stage `fuse`: merge the adapters into the base's weights and write a model of its own.

    uv run python -m athanor.fuse

Reads params.yaml, artifacts/prepare/ and artifacts/train/; writes to artifacts/fuse/ model/ (in
Hugging Face's format), its exports and fused.json, which compares it with the trained model; adds
it to the training's MLflow run. A model that is not the trained one is not written.
"""

from dataclasses import asdict
from itertools import islice
from typing import Any

from athanor import console, files, locks
from athanor.chat.contract import Contract
from athanor.chat.conversation import read_line
from athanor.chat.model_check import refuse_model_misfits
from athanor.config.command import read_overrides
from athanor.config.compose import load_config
from athanor.config.schema import Config
from athanor.fuse.export import export_all
from athanor.fuse.log_model import log_model
from athanor.fuse.weights import fuse_and_compare
from athanor.model.source import Source, digest_model
from athanor.paths import Workspace
from athanor.runs.run import resume_run
from athanor.runs.stage_records import record_fused

# Questions of the training rows that both models are asked, beside parity's own.
QUESTIONS = 8


def main() -> None:
    fuse(load_config(read_overrides(__doc__, ("fuse",))))


@locks.stage("fuse", "prepare", "train")
def fuse(cfg: Config) -> None:
    """Fuse the trained adapters, compare the result with the trained model, and export it."""
    workspace = Workspace.here()
    trained = files.read_json(workspace.trained / "run.json")
    with resume_run(trained["run"], trained["run_id"]) as run:
        source = Source.read(workspace.prepared / "model.json")
        base = source.folder()
        contract = Contract.read(workspace.prepared / "chat.json")
        refuse_model_misfits(cfg, base, contract.rendering)  # the exports may be other ones now
        with files.whole_folder(workspace.fused) as folder:
            report, dequantized = fuse_and_compare(
                base,
                workspace.trained / "adapters",
                folder / "model",
                list(islice(files.iterate_jsonl(workspace.rows("train"), read_line), QUESTIONS)),
                end=contract.end,
                rendering=contract.rendering,
                dequantize=cfg.fuse.dequantize,
                max_difference=cfg.fuse.max_difference,
            )
            fused: dict[str, Any] = {"digest": digest_model(folder / "model"), "base": source.path}
            fused |= {"dequantized": dequantized, "parity": asdict(report)}
            exports = export_all(folder, workspace, base, source.path, cfg, contract.rendering)
            files.write_json(folder / "fused.json", fused)
        record_fused(run, workspace.fused, fused, trained["iteration"])
        if cfg.fuse.log_model:
            log_model(workspace, run, cfg, source, base, fused["digest"], trained["iteration"])
    model = workspace.fused / "model"
    size = sum(path.stat().st_size for path in model.iterdir()) / 1e6
    facts = {"model": f"{model}, {size:.1f} MB" + (", dequantized" if dequantized else "")}
    facts |= {"parity": report.summary()}
    facts |= {form: f"{workspace.fused}/{file}" for form, file in exports.items()}
    facts |= {"digest": fused["digest"][:12]}
    if cfg.fuse.registered_model_name is not None:
        facts["registered"] = run.describe_version()
    facts["ask it"] = f'uv run mlx_lm.generate --model {model} --prompt "…"'
    console.print_facts("fuse", facts)


if __name__ == "__main__":
    console.run_command(main)
