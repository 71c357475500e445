"""The chat contract: how a model is asked, what ends its answers, and whether it can say that.

    uv run python -m athanor.chat                       # the model of params.yaml
    uv run python -m athanor.chat Qwen/Qwen2.5-1.5B     # any folder, or any repository of a hub

prints it as a report: a doctor for models that don't stop, or that ignore what they were taught.
`prepare` settles the contract, and writes it to artifacts/prepare/chat.json; `train`, `test` and
`fuse` keep it. The stops have one source, the tokenizer's `eos_token_ids` as models.load_tokenizer
sets them, from where generation, the fused folder's files and what is exported have them.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from athanor import console, files
from athanor.chat import templates, vocabulary
from athanor.errors import UserError
from athanor.model.source import stated_stop_ids

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper


# What train.end_token may be.
AUTO, TEMPLATE, BASE, TRAIN = "auto", "template", "base", "train"


# As it should be; so only for rows that need it; met by what is said; to be mended.
OK, ASIDE, NOTE, FAULT = "ok", "aside", "note", "fault"


Found = Callable[[str, str, str], None]


@dataclass(frozen=True)
class Finding:
    """One line of the report: what it is about, how bad it is, and what was found."""

    about: str
    state: str
    text: str


@dataclass(frozen=True)
class Contract:
    """What prepare settled.

    `end` is the token that answers are trained to end with, `trains_end` whether its rows of the
    embedding and the head are trained too. Generation stops at each of `stops`. `report` is what
    was found.
    """

    end: int
    trains_end: bool
    stops: list[int]
    report: list[Finding]

    @classmethod
    def read(cls, path: Path) -> "Contract":
        """Reads what `prepare` settled."""
        value = files.read_json(path)
        return cls(**value | {"report": [Finding(**finding) for finding in value["report"]]})

    def write(self, path: Path) -> None:
        """Records the contract for the later stages."""
        files.write_json(path, asdict(self))

    def findings(self, *states: str) -> list[Finding]:
        """The findings of some states."""
        return [finding for finding in self.report if finding.state in states]


def resolve_contract(folder: Path, tokenizer: "TokenizerWrapper", choice: str) -> Contract:
    """The contract of a model with a tokenizer, by `train.end_token`.

    Where the base can't say what its template ends answers with, `auto` takes another end of the
    base's own that it can say, else has that token's rows trained too.
    Without weights in the folder a model is taken to be able to say everything.
    """
    report: list[Finding] = []

    def found(about: str, state: str, text: str) -> None:
        report.append(Finding(about, state, text))

    name = _names(tokenizer)
    written = templates.find_turn_end(tokenizer)
    # Plain texts end with the tokenizer's own, and so do answers after which nothing is written.
    usual = tokenizer.eos_token_id if written is None else written
    stops = sorted(tokenizer.eos_token_ids, key=lambda id: (id != usual, id))
    own = [id for id in stops if id != written]
    if not stops:
        raise UserError(
            f"{folder}: neither the tokenizer nor the chat template has a token that ends an answer"
        )
    untrained = vocabulary.find_untrained_tokens(folder, _size(tokenizer), stops)
    cannot = untrained or {}
    sayable = [id for id in own if id not in cannot]

    end, trains_end = stops[0], False
    if choice == BASE:
        if not own:
            raise UserError(
                f"train.end_token is base, and {folder} has no other end than {name(end)}: "
                "expected auto, template or train"
            )
        end = (sayable or own)[0]
    elif choice == TRAIN:
        trains_end = True
    elif choice == AUTO and end in cannot:
        if sayable:
            end = sayable[0]
        else:
            trains_end = True

    _report_template(tokenizer, found)
    if written is None:
        found("answers end with", NOTE, f"{name(end)}, put there: the template ends them with none")
    elif end == written:
        found("answers end with", OK, f"{name(end)}, as the template writes them")
    else:
        found("answers end with", NOTE, f"{name(end)} instead of the template's {name(written)}")
    _report_saying(found, name, end, written, trains_end, untrained)
    theirs = _own_stops(folder, tokenizer)
    added = [name(id) for id in stops if id not in theirs]
    listed = ", ".join(map(name, stops))
    if added:
        added_text = f"; the model's own files do not have {', '.join(added)}"
        found("generation stops at", NOTE, listed + added_text)
    else:
        found("generation stops at", OK, listed)
    return Contract(end, trains_end, stops, report)


def _report_template(tokenizer: "TokenizerWrapper", found: Found) -> None:
    if not tokenizer.has_chat_template:
        found("chat template", FAULT, f"{templates.NoTemplate()}")
        return
    found("chat template", OK, "the model's own")
    opened = templates.find_open_thought(tokenizer)
    probe = {
        "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "Answer"}]
    }
    [text] = templates.render_row(probe, tokenizer)
    if opened is not None:
        found(
            "asked as trained",
            NOTE,
            f"the prompt opens a thought ({' '.join(opened.split())}) that finished answers do not "
            "have: it is closed in what is trained on, empty where a row has none of its own",
        )
    elif not text.prompts_match:
        found(
            "asked as trained",
            FAULT,
            "the prompt is no beginning of what the template makes of the finished conversation: "
            "what is learned is not what is asked; use another template",
        )
    elif templates.rewrites_earlier_turns(tokenizer):
        found(
            "asked as trained",
            ASIDE,
            "yes; earlier answers are written otherwise than the last, so that each answer of a "
            "conversation is trained on as a text of its own",
        )
    else:
        found("asked as trained", OK, "yes, every answer")
    for what, does in templates.probe_support(tokenizer).items():
        about = f"{what} in the template"
        if does == "kept":
            found(about, OK, "kept")
        else:
            found(about, ASIDE, f"{does}; prepare finds the rows that need it")


def _report_saying(
    found: Found,
    name: Callable[[int], str],
    end: int,
    written: int | None,
    trains_end: bool,
    untrained: dict[int, str] | None,
) -> None:
    if untrained is None:
        found("the base can say it", ASIDE, "not known: no weights were looked at")
        return
    if written is not None and written != end and written in untrained:
        found(
            "the base can say it",
            NOTE,
            f"not {name(written)} ({untrained[written]}), but {name(end)}; train.end_token=train "
            "keeps the template's by training its rows too, and the model's instruct version may "
            "say it already",
        )
    elif end not in untrained:
        found("the base can say it", OK, f"yes: {name(end)} has a row like other tokens'")
    elif trains_end:
        found(
            "the base can say it",
            NOTE,
            f"not yet ({untrained[end]}): the token's rows of embedding and head are trained too",
        )
    else:
        found(
            "the base can say it",
            FAULT,
            f"no ({untrained[end]}), and adapters of the layers may never teach it: choose "
            "train.end_token=base or train (with train.method=lora), or the model's instruct "
            "version",
        )


def _names(tokenizer: "TokenizerWrapper") -> Callable[[int], str]:
    return lambda id: f"{tokenizer.convert_ids_to_tokens(id)} ({id})"


def _size(tokenizer: "TokenizerWrapper") -> int:
    return max(tokenizer.get_vocab().values()) + 1


def _own_stops(folder: Path, tokenizer: "TokenizerWrapper") -> set[int]:
    """The end tokens that the model's files name."""
    from mlx_lm.utils import load_config

    own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return {*stated_stop_ids(load_config(folder)), *own}


def show_report(title: str, report: list[Finding]) -> None:
    """Prints a report."""
    marks = {OK: "", ASIDE: "note", NOTE: "note", FAULT: "FAULT"}
    console.print_table(
        title, ["", "", "found"], [[f.about, marks[f.state], f.text] for f in report]
    )
