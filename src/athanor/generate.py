"""Asks the base and the tuned model a question, side by side.

    uv run python -m athanor.generate "月亮哪天最圆"
    uv run python -m athanor.generate --temp 0.7 --seed 1 < questions.txt    # a question a line

Reads params.yaml, artifacts/prepare/model.json, the base model and artifacts/train/adapters; writes
nothing. What an option does not say is what the stage `test` uses; the answers are the same
whenever options and questions are. A model without a chat template goes on with the text.
"""

import argparse
import sys

from athanor import console, files
from athanor.config.compose import load_config
from athanor.errors import UserError
from athanor.model.source import Source
from athanor.paths import Workspace


def questions_of(arguments: list[str]) -> list[str]:
    """The questions on the command line; without any, or for a `-`, standard input's lines.

    Raises:
        UserError: where there is none in either place.
    """
    if not arguments and sys.stdin.isatty():
        raise UserError('expected a question: `uv run python -m athanor.generate "…"`')
    if arguments not in ([], ["-"]):
        return arguments
    found = [line.strip() for line in sys.stdin if line.strip()]
    if not found:
        raise UserError("expected a question a line on standard input, found none")
    return found


def base_of_adapters(workspace: Workspace) -> Source:
    """The base model that the adapters were trained on.

    Raises:
        UserError: where one of the two is not there, or the base is another one by now.
    """
    trained = workspace.trained / "adapters" / "adapter_config.json"
    for path in (workspace.prepared / "model.json", trained):
        if not path.exists():
            raise UserError(
                f"{path} is not there: `uv run dvc repro --pull` leaves a base and a tuned model "
                "to ask"
            )
    source, made_for = Source.read(workspace.prepared / "model.json"), files.read_json(trained)
    if source.digest != made_for["model_digest"]:
        raise UserError(
            f"{trained.parent} was trained on {made_for['model']}, and "
            f"{workspace.prepared}/model.json is of "
            f"{source.path}: `uv run dvc repro train` trains on that one"
        )
    return source


def ask(
    questions: list[str],
    system: str | None,
    *,
    batch_size: int,
    max_tokens: int,
    temp: float,
    seed: int,
) -> list[dict[str, tuple[str, bool]]]:
    """What "base" and "tuned" say to each question, and whether they stopped by themselves.

    Raises:
        UserError: where a model, its adapters or a chat template to say `system` is missing.
    """
    workspace = Workspace.here()
    source = base_of_adapters(workspace)
    from athanor.chat import templates  # MLX and the models' code take seconds
    from athanor.chat.load import load_with_tokenizer
    from athanor.compute.evaluation import generate_answers
    from athanor.model.adapters import load_adapters

    model, tokenizer = load_with_tokenizer(source.folder())
    before = [] if system is None else [{"role": "system", "content": system}]
    asked = ([*before, {"role": "user", "content": question}] for question in questions)
    # A row ends with its answer, which is not there yet.
    rows = [{"messages": [*messages, {"role": "assistant", "content": ""}]} for messages in asked]
    try:
        if tokenizer.has_chat_template or system is not None:
            prompts = [templates.encode_prompt(row, tokenizer) for row in rows]
        else:  # a model of plain texts goes on with them
            prompts = [list(tokenizer.encode(question)) for question in questions]
    except Exception as error:  # chat templates raise what they like
        raise UserError(f"{source.path} can't be asked that: {error}") from error

    said: list[dict[str, tuple[str, bool]]] = [{} for _ in questions]
    for who in ("base", "tuned"):
        if who == "tuned":
            load_adapters(model, workspace.trained / "adapters")
        given = generate_answers(
            model,
            tokenizer,
            prompts,
            batch_size=batch_size,
            max_tokens=max_tokens,
            temp=temp,
            seed=seed,
        )
        for by_who, answer in zip(said, given, strict=True):
            by_who[who] = (templates.decode_answer(answer.ids, tokenizer), answer.stopped)
    return said


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m athanor.generate", description="Asks the base and the tuned model."
    )
    parser.add_argument(
        "questions", nargs="*", metavar="QUESTION", help="- or none: standard input, one a line"
    )
    parser.add_argument("--system", metavar="TEXT", help="what a system message says first")
    of_test = {"max_tokens": "test.max_tokens", "temp": "test.temp", "seed": "seed"}
    for name, key in of_test.items():
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, help=f"instead of {key} in params.yaml")
    options = parser.parse_args()
    questions = questions_of(options.questions)
    # As overrides they are checked as every value is.
    given = {key: getattr(options, name) for name, key in of_test.items()}
    cfg = load_config([f"{key}={value}" for key, value in given.items() if value is not None])
    said = ask(
        questions,
        options.system,
        batch_size=cfg.test.batch_size,
        max_tokens=cfg.test.max_tokens,
        temp=cfg.test.temp,
        seed=cfg.seed,
    )
    for question, by_who in zip(questions, said, strict=True):
        lines = [question]
        for who, (text, stopped) in by_who.items():
            how = "stopped" if stopped else f"cut off after {cfg.test.max_tokens} tokens"
            lines.append(f"  {who + ':':6} {text}  ({how})")
        console.out.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    console.run_command(main)
