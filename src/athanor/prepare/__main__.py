"""Stage `prepare`: the rows in data/, checked and brought into one form, and the base model, found.

    uv run python -m athanor.prepare

Reads params.yaml and data/; writes to artifacts/prepare/: train.jsonl, valid.jsonl and test.jsonl,
which mlx_lm.lora --data reads unchanged; rejected.jsonl (the rows that were left out, whole, with
why); report.json, report.html, metrics.json and lengths.csv (what the data looks like); model.json
(which model, at which commit, with which digest); chat.json (what ends an answer, and where
generation stops).
"""

import sys
from typing import Any

from athanor import console
from athanor.chat.model_check import refuse_model_misfits
from athanor.config.compose import load_config, warn_if_params_differ_from_conf
from athanor.config.values import to_dataclass
from athanor.model.source import Source, find_model
from athanor.paths import Workspace
from athanor.prepare.prepare import prepare


def main() -> None:
    workspace = Workspace.here()
    cfg = load_config(sys.argv[1:])
    warn_if_params_differ_from_conf(cfg)
    refuse_model_misfits(cfg, find_model(cfg.model.path, cfg.model.revision))
    found = prepare(
        workspace.data,
        workspace.prepared,
        model_path=cfg.model.path,
        revision=cfg.model.revision,
        config=to_dataclass(cfg.data),
        max_seq_length=cfg.train.max_seq_length,
        mask_prompt=cfg.train.mask_prompt,
        end_token=cfg.train.end_token,
    )
    source = Source.read(workspace.prepared / "model.json")
    _show(found)
    rows = found["rows"]
    console.print_facts(
        "",
        {
            "rows": f"{rows['kept']:,} of {rows['read']:,}"
            + (f", and {rows['augmented']:,} in other words" if rows["augmented"] else "")
            + (f"; {workspace.prepared}/rejected.jsonl has the rest" if rows["rejected"] else ""),
            "model": f"{source.path} {source.commit or ''}".strip(),
            "digest": source.digest[:12],
            "wrote": f"{workspace.prepared}/: the splits, report.html (open it), report.json, "
            "model.json",
        },
    )


def _show(found: dict[str, Any]) -> None:
    """Prints what is in the splits, and what the checks found."""
    columns = ("rows", "tokens", "supervised_tokens", "median_row", "longest_row", "rows_cut")
    console.print_table(
        "prepare",
        ["split", "rows", "tokens", "to be learned", "median row", "longest", "cut"],
        [
            [name, *(f"{split[column]:,}" for column in columns)]
            for name, split in found["splits"].items()
        ],
    )
    if found["checks"]:
        console.print_table(
            "",
            ["check", "", "rows", "what it found, and where first"],
            [
                [
                    check["name"],
                    check["action"],
                    f"{check['rows']:,}",
                    ": ".join(check["examples"][0].values()) if check["examples"] else "",
                ]
                for check in found["checks"]
            ],
        )


if __name__ == "__main__":
    console.run_command(main)
