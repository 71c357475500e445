"""Ask the base and the tuned model the same questions.

    uv run python -m athanor.generate "月亮哪天最圆"
    uv run python -m athanor.generate --temp 0.7 --seed 1 < questions.txt    # a question a line

Reads params.yaml, artifacts/prepare/model.json, the base model and artifacts/train/adapters; writes
nothing. Options default to the settings of the stage `test`. Equal options and questions give equal
answers. A model without a chat template continues the text.
"""

import argparse
import sys

from athanor import console, files
from athanor.config.compose import load_config
from athanor.config.schema import Config
from athanor.errors import UserError
from athanor.model.source import Source
from athanor.paths import Workspace


def read_questions(arguments: list[str]) -> list[str]:
    """Return the questions on the command line; without any, or for a `-`, those of standard input.

    Raises:
        UserError: where there is no question.
    """
    if not arguments and sys.stdin.isatty():
        raise UserError("generate.no_question")
    if arguments not in ([], ["-"]):
        return arguments
    questions = [line.strip() for line in sys.stdin if line.strip()]
    if not questions:
        raise UserError("generate.no_question_on_input")
    return questions


def read_base(workspace: Workspace) -> Source:
    """Return the base model that the adapters were trained on.

    Raises:
        UserError: where one of them is missing, or the base has changed since.
    """
    record = workspace.prepared / "model.json"
    adapter_config = workspace.trained / "adapters" / "adapter_config.json"
    for path in (record, adapter_config):
        if not path.exists():
            raise UserError("generate.not_trained", path=path)
    source, trained = Source.read(record), files.read_json(adapter_config)
    if source.digest != trained["model_digest"]:
        raise UserError(
            "generate.other_base",
            adapters=adapter_config.parent,
            trained_on=trained["model"],
            record=record,
            base=source.path,
        )
    return source


def ask(questions: list[str], system: str | None, cfg: Config) -> dict[str, list[tuple[str, bool]]]:
    """Return the answers of "base" and "tuned" to the questions, and whether each stopped.

    Raises:
        UserError: where a model, its adapters, or a chat template for `system` is missing.
    """
    workspace = Workspace.here()
    source = read_base(workspace)
    from athanor.chat import templates  # MLX and the models' code take seconds
    from athanor.chat.base import load_with_tokenizer
    from athanor.chat.contract import Contract
    from athanor.chat.conversation import Conversation, Turn
    from athanor.chat.rendering import limit_rendering
    from athanor.compute.evaluation import generate_answers
    from athanor.model.adapters import load_adapters

    contract = Contract.read(workspace.prepared / "chat.json")
    model, tokenizer = load_with_tokenizer(source.folder(), contract.rendering)
    before = [] if system is None else [Turn("system", system)]
    answer = Turn("assistant", "")  # a row ends with one
    rows = [Conversation([*before, Turn("user", question), answer]) for question in questions]
    try:
        if tokenizer.has_chat_template or system is not None:
            with limit_rendering():
                prompts = [templates.encode_prompt(row, tokenizer) for row in rows]
        else:  # a model of plain texts continues them
            prompts = [list(tokenizer.encode(question)) for question in questions]
    except Exception as error:  # a chat template may raise any
        raise UserError("generate.cannot_ask", model=source.path, error=error) from error

    answers = {}
    for name in ("base", "tuned"):
        if name == "tuned":
            load_adapters(model, workspace.trained / "adapters")
        generated = generate_answers(
            model,
            tokenizer,
            prompts,
            batch_size=cfg.test.batch_size,
            max_tokens=cfg.test.max_tokens,
            temp=cfg.test.temp,
            seed=cfg.seed,
        )
        answers[name] = [
            (templates.decode_answer(answer.ids, tokenizer), answer.stopped) for answer in generated
        ]
    return answers


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m athanor.generate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "questions", nargs="*", metavar="QUESTION", help="- or none: standard input, one a line"
    )
    parser.add_argument("--system", metavar="TEXT", help="a system message before each question")
    of_test = {"max_tokens": "test.max_tokens", "temp": "test.temp", "seed": "seed"}
    for name, key in of_test.items():
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, help=f"instead of {key} in params.yaml")
    options = parser.parse_args()
    questions = read_questions(options.questions)
    # As overrides they are checked like all values.
    overrides = {key: getattr(options, name) for name, key in of_test.items()}
    cfg = load_config([f"{key}={value}" for key, value in overrides.items() if value is not None])
    answers = ask(questions, options.system, cfg)
    for place, question in enumerate(questions):
        lines = [question]
        for name, replies in answers.items():
            text, stopped = replies[place]
            end = "stopped" if stopped else f"cut off after {cfg.test.max_tokens} tokens"
            lines.append(f"  {name + ':':6} {text}  ({end})")
        console.out.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    console.run_command(main, console.UNCHANGED)
