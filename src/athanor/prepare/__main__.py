"""Stage `prepare`: check the rows in data/, bring them into one form, and find the base model.

    uv run python -m athanor.prepare

Reads params.yaml and data/; writes to artifacts/prepare/: train.jsonl, valid.jsonl and test.jsonl,
which mlx_lm.lora --data reads unchanged; rejected.jsonl (the rows that were left out, whole, with
the reasons); report.json, report.html, metrics.json and lengths.csv (the report of the data);
model.json (the model, its commit and its digest); chat.json (what ends an answer, and where
generation stops).
"""

from typing import Any

from athanor import console, locks
from athanor.chat.model_check import refuse_model_misfits
from athanor.config.command import read_overrides
from athanor.config.compose import load_config, warn_if_params_differ_from_conf
from athanor.config.schema import Config
from athanor.config.values import to_dataclass
from athanor.model.source import Source, find_model
from athanor.paths import Workspace
from athanor.prepare.prepare import prepare
from athanor.prepare.result import DECIDED_BY


def main() -> None:
    prepare_rows(load_config(read_overrides(__doc__, DECIDED_BY)))


@locks.stage("prepare")
def prepare_rows(cfg: Config) -> None:
    workspace = Workspace.here()
    warn_if_params_differ_from_conf(cfg)
    refuse_model_misfits(cfg, find_model(cfg.model.path, cfg.model.revision))
    report = prepare(workspace.data, workspace.prepared, to_dataclass(cfg))
    _print_tables(report)
    source, rows = Source.read(workspace.prepared / "model.json"), report["rows"]
    console.print_facts(
        "",
        {
            "rows": f"{rows['kept']:,} of {rows['read']:,}"
            + (f", and {rows['augmented']:,} augmented copies" if rows["augmented"] else "")
            + (f"; the others: {workspace.prepared}/rejected.jsonl" if rows["rejected"] else ""),
            "model": f"{source.path} {source.commit or ''}".strip(),
            "digest": source.digest[:12],
            "wrote": f"{workspace.prepared}/: the splits, report.html, report.json, model.json",
        },
    )


def _print_tables(report: dict[str, Any]) -> None:
    columns = ("rows", "tokens", "supervised_tokens", "median_row", "longest_row", "rows_cut")
    console.print_table(
        "prepare",
        ["split", "rows", "tokens", "supervised", "median row", "longest", "cut"],
        [
            [name, *(f"{split[column]:,}" for column in columns)]
            for name, split in report["splits"].items()
        ],
    )
    if report["checks"]:
        console.print_table(
            "",
            ["check", "action", "rows", "first example"],
            [
                [
                    check["name"],
                    check["action"],
                    f"{check['rows']:,}",
                    f"{example['where']}: {example['text']}",
                ]
                for check in report["checks"]
                for example in check["examples"][: None if check["problems"] < check["rows"] else 1]
            ],
        )


if __name__ == "__main__":
    console.run_command(main)
