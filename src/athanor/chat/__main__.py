"""Report the chat contract of a model: for models that do not stop, or ignore their training.

    uv run python -m athanor.chat                       # the model of params.yaml
    uv run python -m athanor.chat Qwen/Qwen2.5-1.5B     # any folder, or any repository of a hub

Exits with 1 if a finding is a fault.
"""

import argparse

from athanor import console
from athanor.chat.contract import AUTO, BASE, FAULT, TEMPLATE, TRAIN, resolve_contract, show_report
from athanor.chat.load import load_configured_tokenizer
from athanor.config.compose import load_config
from athanor.config.rules import KEEP_SYSTEM
from athanor.errors import UserError
from athanor.model.source import find_model


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m athanor.chat",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", nargs="?", help="a folder, or owner/name of a hub")
    parser.add_argument("--revision", help="of a hub's repository")
    parser.add_argument("--end-token", choices=[AUTO, TEMPLATE, BASE, TRAIN], default=AUTO)
    args = parser.parse_args()
    path, revision, date, system = args.model, args.revision, None, KEEP_SYSTEM
    if path is None:
        config = load_config([])
        path, revision = config.model.path, config.model.revision
        date, system = config.data.date, config.data.system
    folder = find_model(path, revision)
    tokenizer = load_configured_tokenizer(folder, date, system)
    contract = resolve_contract(folder, tokenizer, args.end_token)
    show_report(f"chat: {path}", contract.report)
    if faults := contract.findings(FAULT):
        raise UserError("chat.faults", model=path, faults=[fault.about for fault in faults])


if __name__ == "__main__":
    console.run_command(main, console.UNCHANGED, in_project=False)
