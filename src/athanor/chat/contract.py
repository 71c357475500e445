"""The chat contract of a model: its prompts, the token that ends answers, and the stop tokens.

`prepare` resolves the contract and writes it to artifacts/prepare/chat.json; `train`, `test` and
`fuse` keep it. The stop tokens have one source, the tokenizer's `eos_token_ids` as load_tokenizer
sets them: generation, the fused folder's files and the exports take them from there.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from athanor import console, files
from athanor.chat import template_probes, templates, vocabulary
from athanor.chat.conversation import chat
from athanor.chat.rendering import Rendering, rendering_of
from athanor.errors import UserError
from athanor.model.folder import stated_stop_ids

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

# The values of train.end_token.
AUTO, TEMPLATE, BASE, TRAIN = "auto", "template", "base", "train"

# States of a finding: as it should be; a limit that matters for some rows only; a difference that
# the contract handles; a fault that the user has to fix.
OK, ASIDE, NOTE, FAULT = "ok", "aside", "note", "fault"

Name = Callable[[int], str]  # a token as text and id


@dataclass(frozen=True)
class Finding:
    """One line of the report: its subject, its state, and a text."""

    about: str
    state: str
    text: str


@dataclass(frozen=True)
class Contract:
    """The chat contract that `prepare` resolved.

    Args:
        end: the token that answers are trained to end with.
        trains_end: whether its rows of the embedding and the head are trained as well.
        stops: the tokens at which generation stops.
        report: the findings about the model.
        rendering: how its template writes conversations.
    """

    end: int
    trains_end: bool
    stops: list[int]
    report: list[Finding]
    rendering: Rendering = field(default_factory=Rendering)

    @classmethod
    def read(cls, path: Path) -> "Contract":
        """Read the contract that `prepare` wrote."""
        value = files.read_json(path)
        return cls(
            **value
            | {
                "report": [Finding(**finding) for finding in value["report"]],
                "rendering": Rendering(**value.get("rendering", {})),
            }
        )

    def write(self, path: Path) -> None:
        """Write the contract for the later stages."""
        files.write_json(path, asdict(self))

    def findings(self, *states: str) -> list[Finding]:
        """Return the findings of some states."""
        return [finding for finding in self.report if finding.state in states]


def resolve_contract(folder: Path, tokenizer: "TokenizerWrapper", choice: str) -> Contract:
    """Return the contract of a model and its tokenizer, by `train.end_token`.

    If the base was never trained to say the token that its template ends answers with, `auto` takes
    another of the base's end tokens that it can say, or else trains the rows of that token. A model
    without weights in the folder is assumed to be able to say every token.
    """
    name = _token_name(tokenizer)
    written = template_probes.find_turn_end(tokenizer)
    # Plain texts, and answers after which the template writes nothing, end with the tokenizer's.
    usual = tokenizer.eos_token_id if written is None else written
    stops = sorted(tokenizer.eos_token_ids, key=lambda id: (id != usual, id))
    if not stops:
        raise UserError("chat.no_end_token", folder=folder)
    size = max(tokenizer.get_vocab().values()) + 1
    untrained = vocabulary.find_untrained_tokens(folder, size, stops)
    others = [id for id in stops if id != written]
    sayable = [id for id in others if id not in (untrained or {})]

    end, trains_end = stops[0], False
    if choice == BASE:
        if not others:
            raise UserError("chat.no_other_end", folder=folder, end=name(end))
        end = (sayable or others)[0]
    elif choice == TRAIN:
        trains_end = True
    elif choice == AUTO and end in (untrained or {}):
        if sayable:
            end = sayable[0]
        else:
            trains_end = True

    report = [
        *_report_template(tokenizer),
        _report_end(name, end, written),
        _report_saying(name, end, written, trains_end, untrained),
        _report_stops(name, stops, _stated_stops(folder, tokenizer)),
    ]
    return Contract(end, trains_end, stops, report, rendering_of(tokenizer))


def _report_template(tokenizer: "TokenizerWrapper") -> Iterator[Finding]:
    if not tokenizer.has_chat_template:
        yield Finding("chat template", FAULT, str(template_probes.NoTemplate()))
        return
    yield Finding("chat template", OK, "the model's own")
    opened = template_probes.find_open_thought(tokenizer)
    [text] = templates.render_row(chat(("user", "?"), ("assistant", "Answer")), tokenizer)
    if opened is not None:
        state, finding = (
            NOTE,
            f"the prompt opens a thought ({' '.join(opened.split())}) that finished answers do not "
            "have; the training text closes it, and it is empty for rows without a thought",
        )
    elif not text.prompts_match:
        state, finding = (
            FAULT,
            "the template's text of a finished conversation does not begin with the prompt, so "
            "training would not apply to prompts; use another template",
        )
    elif template_probes.rewrites_earlier_turns(tokenizer):
        state, finding = (
            ASIDE,
            "yes; the template writes earlier answers differently from the last one, so each "
            "answer of a conversation is trained in a text of its own",
        )
    else:
        state, finding = OK, "yes, every answer"
    yield Finding("asked as trained", state, finding)
    rendering = rendering_of(tokenizer)
    if rendering.date is not None:
        yield Finding(
            "date in the template", NOTE, f"{rendering.date} in all stages; data.date sets another"
        )
    for part, support in template_probes.probe_support(tokenizer).items():
        about = f"{part} in the template"
        if part == "system" and rendering.merge_system:
            yield Finding(about, OK, "put into the question that follows (data.system=merge)")
        elif part == "system" and support != "kept":
            yield Finding(
                about,
                ASIDE,
                f"{support}; prepare reports the rows that need it, and data.system=merge puts "
                "system messages into the questions after them",
            )
        elif support == "kept":
            yield Finding(about, OK, support)
        else:
            yield Finding(about, ASIDE, f"{support}; prepare reports the rows that need it")


def _report_end(name: Name, end: int, written: int | None) -> Finding:
    about = "answers end with"
    if written is None:
        return Finding(about, NOTE, f"{name(end)}, which is added: the template has no end token")
    if end == written:
        return Finding(about, OK, f"{name(end)}, as the template writes them")
    return Finding(about, NOTE, f"{name(end)} instead of the template's {name(written)}")


def _report_saying(
    name: Name, end: int, written: int | None, trains_end: bool, untrained: dict[int, str] | None
) -> Finding:
    about = "the base can say it"
    if untrained is None:
        return Finding(about, ASIDE, "unknown: the folder has no weights")
    if written is not None and written != end and written in untrained:
        return Finding(
            about,
            NOTE,
            f"not {name(written)} ({untrained[written]}), but {name(end)}; train.end_token=train "
            "keeps the template's by training its rows, and the model's instruct version may "
            "already say it",
        )
    if end not in untrained:
        return Finding(about, OK, f"yes: {name(end)} has a row like other tokens'")
    if trains_end:
        return Finding(
            about,
            NOTE,
            f"not yet ({untrained[end]}): the token's rows of embedding and head are also trained",
        )
    return Finding(
        about,
        FAULT,
        f"no ({untrained[end]}), and adapters of the layers may never teach it; choose "
        "train.end_token=base or train (with train.method=lora), or the model's instruct version",
    )


def _report_stops(name: Name, stops: list[int], stated: set[int]) -> Finding:
    about, listed = "generation stops at", ", ".join(map(name, stops))
    if added := [name(id) for id in stops if id not in stated]:
        text = f"{listed}; the model's own files do not have {', '.join(added)}"
        return Finding(about, NOTE, text)
    return Finding(about, OK, listed)


def _token_name(tokenizer: "TokenizerWrapper") -> Name:
    return lambda id: f"{tokenizer.convert_ids_to_tokens(id)} ({id})"


def _stated_stops(folder: Path, tokenizer: "TokenizerWrapper") -> set[int]:
    """Return the end tokens that the model's files name."""
    from mlx_lm.utils import load_config

    of_tokenizer = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return {*stated_stop_ids(load_config(folder)), *of_tokenizer}


def show_report(title: str, report: list[Finding]) -> None:
    """Print a report as a table."""
    marks = {OK: "", ASIDE: "note", NOTE: "note", FAULT: "FAULT"}
    rows = [[finding.about, marks[finding.state], finding.text] for finding in report]
    console.print_table(title, ["", "", "finding"], rows)
