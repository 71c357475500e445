"""Names of columns: which key of a record has its question, its answer, its messages and so on.

conf/data has the usual names of each (`data.columns`), and mlx-lm's settings (`data.prompt_feature`
and its like), which win. Names are equal without regard to case, width, white space, "-" and "_".
"""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from athanor.config.data_check import AUTO
from athanor.config.schema import DataConfig

# The meanings that each kind of row has columns for.
EXCHANGE = ("question", "answer", "context", "history", "system", "thought", "tools")
MEANINGS = {
    "chat": ("chat", "system", "thought", "tools"),
    "completions": EXCHANGE,
    "instruction": EXCHANGE,
    "classification": ("text", "label", "system"),
    "text": ("text",),
}
# Layouts and names that are remembered; files have a few.
REMEMBERED = 10_000

# Names of values about a row, not of it.
ABOUT_TEXT = """
id ids idx index no nr number key uid uuid guid hash md5 sha sha1 sha256 fingerprint
source sources origin provenance dataset datasetname subset split task tasks taskname tasktype
category categories subcategory class topic topics tag tags domain subject field type kind
lang language languages locale license licence url urls link links uri href website
metadata meta info score scores rating ratings quality toxicity similarity difficulty level
perplexity confidence upvotes downvotes views votes likes
timestamp timestamps ts created createtime updatetime createdate date datetime time year
author authors annotator annotators worker userid model modelname generator generatedby
generationmodel version revision file filename filepath path page line length numtokens
tokencount wordcount charcount numturns avatarurl skippromptformatting
temperature topp topk maxtokens maxcompletiontokens frequencypenalty presencepenalty stream
seed paralleltoolcalls cachecontrol status endturn qualityscore
编号 序号 来源 出处 分类 语言 时间 日期 作者 链接 网址 难度 备注编号
"""
ABOUT = frozenset(ABOUT_TEXT.split())
CLASSES = ("category", "class", "分类")
ABOUT_ENDS = re.compile(
    r"(?:[_\-\s](?:ids?|idx|index|url|uri|at|date|time|hash|score|count|version|language)"
    r"|^(?:score|rating|num)[_\-\s].*|[a-z](?:Id|Ids|Url|At|Hash|Score|Count))$"
)


@lru_cache(maxsize=REMEMBERED)
def fold(name: str) -> str:
    """Return a name as names are compared."""
    return re.sub(r"[\s_\-\u200b\ufeff]+", "", unicodedata.normalize("NFKC", name).casefold())


def is_about(name: str) -> bool:
    """Return True for the name of a value about a row: its id, source, score, date."""
    if fold(name) == "toolcallid":
        return False
    ends = ABOUT_ENDS.search(name.strip())
    return name.startswith("_") or fold(name) in ABOUT or ends is not None


def is_empty(value: Any) -> bool:
    """Return True for a value that holds nothing: null, "", [], {}."""
    return value is None or value in ("", [], {})


@dataclass(frozen=True)
class Layout:
    """The columns of a record.

    Args:
        kind: its format; None where the columns tell none.
        keys: the key of each meaning.
        rest: the keys that the format has no use for, and that aren't about the row.
    """

    kind: str | None
    keys: dict[str, str]
    rest: tuple[str, ...]


@dataclass
class _Layouts:
    """The layouts of records with the same keys: as a chat under each key, and otherwise."""

    other: Layout
    chats: list[Layout] = field(default_factory=list)


class Columns:
    """The names of columns and roles, as data's configuration has them."""

    def __init__(self, config: DataConfig) -> None:
        columns = {key: names or [] for key, names in config.columns.items()}
        self._roles = {
            fold(name): role
            for role, names in dict(columns.pop("roles", {})).items()
            for name in names or []
        }
        # The settings that name a column themselves.
        self.settings = {
            "question": config.prompt_feature,
            "answer": config.completion_feature,
            "chat": config.chat_feature,
            "text": config.text_feature,
            "label": config.label_feature,
        }
        # The rank of each name among those of its meaning: the setting has the first.
        self._ranks: dict[str, dict[str, int]] = {}
        for meaning, names in columns.items():
            first = [self.settings[meaning]] if meaning in self.settings else []
            folded = dict.fromkeys(map(fold, [*first, *map(str, names)]))
            self._ranks[meaning] = {name: rank for rank, name in enumerate(folded)}
        # Names that a chat's column has whatever it holds; under others it holds a list.
        self._sure = {fold(self.settings["chat"]), "messages", "conversations", "conversation"}
        self._remembered: dict[tuple[str, ...], _Layouts] = {}
        self._parts: defaultdict[tuple[str, ...], dict[tuple[str, ...], Layout]] = defaultdict(dict)

    def role(self, name: Any) -> str | None:
        """Return the role that a name stands for: system, user, assistant, tool or call."""
        if not isinstance(name, str):
            return None
        return self._roles.get(name) or self._roles.get(fold(name))

    def layout(self, value: dict[str, Any], configured: str) -> Layout:
        """Return the layout of a record; `configured` is the format of its file, or auto.

        The rule of auto: a column of the name of a chat that holds a list; else a question and an
        answer; else a text, with a label or without. Of several names that the record has, the
        first in conf/data counts; one that is left over may be the context.
        """
        names = (configured, *value)
        layouts = self._remembered.get(names)
        if layouts is None:
            if len(self._remembered) >= REMEMBERED:
                self._remembered.clear()
            layouts = self._remembered[names] = self._layouts(list(value), configured)
        for chat in layouts.chats:
            key = chat.keys["chat"]
            if configured == "chat" or fold(key) in self._sure or _is_list(value[key]):
                return chat
        return layouts.other

    def parts(self, value: dict[str, Any], meanings: tuple[str, ...]) -> Layout:
        """Return the layout of a message, with the first key of each meaning."""
        remembered, names = self._parts[meanings], tuple(value)
        layout = remembered.get(names)
        if layout is None:
            if len(remembered) >= REMEMBERED:
                remembered.clear()
            layout = remembered[names] = self._assign(list(value), meanings, None)
        return layout

    def _layouts(self, keys: list[str], configured: str) -> _Layouts:
        if configured != AUTO:
            layout = self._assign(keys, MEANINGS.get(configured, ()), configured)
            return _Layouts(
                layout, [layout] if configured == "chat" and "chat" in layout.keys else []
            )
        chats = [
            self._assign(keys, MEANINGS["chat"], "chat", {"chat": key})
            for key in self._named(keys, "chat")
        ]
        return _Layouts(self._other(keys), chats)

    def _other(self, keys: list[str]) -> Layout:
        """Return the layout of a record that is no chat."""
        exchange = self._assign(keys, EXCHANGE, "completions")
        question, answer = exchange.keys.get("question"), exchange.keys.get("answer")
        if question is not None and answer is not None:
            is_instruction = fold(question) == "instruction"
            kind = "instruction" if is_instruction else "completions"
            return Layout(kind, exchange.keys, exchange.rest)
        label = self._assign(keys, MEANINGS["classification"], "classification")
        is_half = answer is not None or fold(question or "") in self._prompts()
        if "text" not in label.keys or is_half:
            return Layout(None, exchange.keys, exchange.rest)
        if "label" in label.keys:
            return label
        text = self._assign(keys, MEANINGS["text"], "text")
        # Beside a text alone, a class may be its label.
        return replace(text, rest=(*text.rest, *(key for key in keys if fold(key) in CLASSES)))

    def _prompts(self) -> set[str]:
        """Return the names of a question that has no answer; a text's setting wins."""
        names = {fold(self.settings["question"]), "instruction"}
        return names - {fold(self.settings["text"])}

    def _named(self, keys: list[str], meaning: str) -> list[str]:
        """Return the keys that are names of a meaning, by rank."""
        ranks = self._ranks.get(meaning, {})
        return sorted((key for key in keys if fold(key) in ranks), key=lambda key: ranks[fold(key)])

    def _assign(
        self,
        keys: list[str],
        meanings: Iterable[str],
        kind: str | None,
        given: dict[str, str] | None = None,
    ) -> Layout:
        """Give each meaning the first of its names that no earlier meaning has."""
        assigned = dict(given or {})
        for meaning in meanings:
            free = [key for key in keys if key not in assigned.values()]
            if meaning not in assigned and (named := self._named(free, meaning)):
                assigned[meaning] = named[0]
        used = set(assigned.values())
        rest = tuple(key for key in keys if key not in used and not is_about(key))
        return Layout(kind, assigned, rest)


def _is_list(value: Any) -> bool:
    return isinstance(value, list) or (isinstance(value, str) and value.lstrip().startswith("["))
