"""Synthetic rows in any format that the project reads, for experiments and load tests.

    uv run python -m athanor.synthesize data/rows.jsonl --rows 1000 --format chat --locale zh_CN

Writes JSON Lines about people whom Faker invents, in Chinese, English or both, never over an
existing file. The same arguments write the same bytes. Every row has an "id", about half of them a
"source" and half a "quality_score".
"""

import argparse
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any

from athanor import console
from athanor.errors import UserError

# At 300 bytes a row, 30 GB: more is a slip of the finger.
MOST_ROWS = 100_000_000
# A call of Faker takes 10 to 50 microseconds, a choice from a pool of its values less than one.
POOL = 4000
FIELDS = ("city", "job", "company", "phone_number")
COLUMNS = ("name", *FIELDS)

Texts = tuple[str, ...]
Person = dict[str, str]


@dataclass(frozen=True)
class Language:
    """The sentences of a locale about a person: statements and questions by field."""

    joint: str
    columns: dict[str, str]
    statements: dict[str, Texts]
    questions: dict[str, Texts]
    systems: Texts
    reviews: Texts
    opinions: dict[str, Texts]
    tables: Texts
    select: str
    where: str
    also: str
    tool: str


LANGUAGES = {
    "zh_CN": Language(
        joint="",
        columns=dict(zip(COLUMNS, ("姓名", "城市", "职业", "公司", "电话"), strict=True)),
        statements={
            "city": ("{name}住在{city}。", "{name}的家在{city}。"),
            "job": ("{name}的职业是{job}。", "{name}从事的工作是{job}。"),
            "company": ("{name}在{company}上班。", "{name}任职于{company}。"),
            "phone_number": ("{name}的电话是{phone_number}。", "拨{phone_number}可以找到{name}。"),
        },
        questions={
            "city": ("{name}住在哪里？", "{name}的家在哪个城市？"),
            "job": ("{name}的职业是什么？", "{name}是做什么工作的？"),
            "company": ("{name}在哪家公司上班？", "{name}任职于哪家公司？"),
            "phone_number": ("{name}的电话号码是多少？", "怎样打电话找到{name}？"),
        },
        systems=("你是通讯录助手，请简短回答。", "请只根据给出的资料回答。"),
        reviews=(
            "{city}的{name}评价{company}：服务{0}，送货{1}。",
            "我在{city}找过{company}的{name}，感觉{0}，整体{1}。",
        ),
        opinions={
            "positive": ("非常好", "令人满意", "又快又准", "很贴心", "值得推荐", "超出期待"),
            "negative": ("很糟糕", "令人失望", "又慢又乱", "很敷衍", "不会再来", "漏洞百出"),
            "neutral": ("一般", "中规中矩", "没有特别之处", "和别家差不多", "还算正常", "不好不坏"),
        },
        tables=("员工", "客户", "联系人"),
        select="表{table}中，{where}的{column}是什么？",
        where="{}为{}",
        also="且",
        tool="查询一个人的{column}",
    ),
    "en_US": Language(
        joint=" ",
        columns={name: name for name in COLUMNS},
        statements={
            "city": ("{name} lives in {city}.", "The home of {name} is in {city}."),
            "job": ("The job of {name} is {job}.", "By profession, {name} is: {job}."),
            "company": ("{name} works for {company}.", "The employer of {name} is {company}."),
            "phone_number": ("The phone of {name} is {phone_number}.", "{name}: {phone_number}."),
        },
        questions={
            "city": ("Where does {name} live?", "In which city is {name} at home?"),
            "job": ("What is the job of {name}?", "What does {name} do for a living?"),
            "company": ("Who employs {name}?", "Which company does {name} work for?"),
            "phone_number": ("What is the phone number of {name}?", "How can I call {name}?"),
        },
        systems=("You keep the address book. Be brief.", "Answer from the facts given alone."),
        reviews=(
            "{name} from {city} on {company}: the service was {0}, the delivery {1}.",
            "I met {name} of {company} in {city}; it was {0} and, on the whole, {1}.",
        ),
        opinions={
            "positive": ("excellent", "a delight", "fast and exact", "kind", "superb", "flawless"),
            "negative": ("awful", "a let-down", "slow and messy", "rude", "useless", "broken"),
            "neutral": (
                "average",
                "neither here nor there",
                "so-so",
                "plain",
                "ordinary",
                "adequate",
            ),
        },
        tables=("staff", "customers", "contacts"),
        select="In the table {table}, what is the {column} where {where}?",
        where="the {} is {}",
        also=" and ",
        tool="Looks up the {column} of a person",
    ),
}


def _sentence(rng: Random, texts: dict[str, Texts], field: str, person: Person) -> str:
    return rng.choice(texts[field]).format_map(person)


def _exchanges(
    rng: Random, person: Person, language: Language, count: int
) -> tuple[str, list[tuple[str, str]]]:
    """Return facts about a person, and `count` questions about them with their answers."""
    known = rng.sample(FIELDS, max(2, count))
    statements = (
        _sentence(rng, language.statements, field, person) for field in FIELDS if field in known
    )
    facts = language.joint.join(statements)
    pairs = []
    for field in known[:count]:
        full = rng.random() < 0.5
        answer = _sentence(rng, language.statements, field, person) if full else person[field]
        pairs.append((_sentence(rng, language.questions, field, person), answer))
    return facts, pairs


def _completions(rng: Random, person: Person, language: Language) -> dict[str, Any]:
    facts, [(question, answer)] = _exchanges(rng, person, language, 1)
    return {"prompt": facts + language.joint + question, "completion": answer}


def _instruction(rng: Random, person: Person, language: Language) -> dict[str, Any]:
    facts, [(question, answer)] = _exchanges(rng, person, language, 1)
    if rng.random() < 0.5:
        question, facts = facts + language.joint + question, ""
    return {"instruction": question, "input": facts, "output": answer}


def _chat(rng: Random, person: Person, language: Language) -> dict[str, Any]:
    """Return one to three exchanges; the first question has the facts for all of them."""
    facts, pairs = _exchanges(rng, person, language, rng.randint(1, 3))
    turns = [turn for pair in pairs for turn in zip(("user", "assistant"), pair, strict=True)]
    turns[0] = ("user", facts + language.joint + pairs[0][0])
    if rng.random() < 0.3:
        turns.insert(0, ("system", rng.choice(language.systems)))
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


def _sharegpt(rng: Random, person: Person, language: Language) -> dict[str, Any]:
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    messages = _chat(rng, person, language)["messages"]
    turns = [{"from": names[turn["role"]], "value": turn["content"]} for turn in messages]
    return {"conversations": turns}


def _schema(field: str, language: Language) -> dict[str, Any]:
    properties = {key: {"type": "string"} for key in COLUMNS if key != field}
    function = {
        "name": f"get_{field}",
        "description": language.tool.format(column=language.columns[field]),
        "parameters": {"type": "object", "properties": properties, "required": ["name"]},
    }
    return {"type": "function", "function": function}


def _tools(rng: Random, person: Person, language: Language) -> dict[str, Any]:
    field, hint = rng.sample(FIELDS, 2)
    facts = _sentence(rng, language.statements, hint, person)
    question = facts + language.joint + _sentence(rng, language.questions, field, person)
    values = {"name": person["name"], hint: person[hint]}
    arguments = json.dumps(values, ensure_ascii=False) if rng.random() < 0.5 else values
    function = {"name": f"get_{field}", "arguments": arguments}
    call = {"id": f"call_{rng.getrandbits(32):08x}", "type": "function", "function": function}
    messages: list[dict[str, Any]] = [{"role": "user", "content": question}]
    messages.append({"role": "assistant", "tool_calls": [call]})
    if rng.random() < 0.5:
        result = json.dumps({field: person[field]}, ensure_ascii=False)
        link = {"tool_call_id": call["id"]} if rng.random() < 0.5 else {}
        messages.append({"role": "tool", **link, "content": result})
        answer = _sentence(rng, language.statements, field, person)
        messages.append({"role": "assistant", "content": answer})
    offered = rng.choice(([field], [field, hint], [hint, field]))
    return {"messages": messages, "tools": [_schema(each, language) for each in offered]}


def _text(rng: Random, person: Person, language: Language) -> dict[str, Any]:
    fields = rng.sample(FIELDS, rng.randint(3, 4))
    statements = (_sentence(rng, language.statements, field, person) for field in fields)
    return {"text": language.joint.join(statements)}


def _classification(rng: Random, person: Person, language: Language) -> dict[str, Any]:
    label = rng.choice(("positive", "negative", "neutral"))
    opinions = rng.sample(language.opinions[label], 2)
    return {"text": rng.choice(language.reviews).format(*opinions, **person), "label": label}


def _wikisql(rng: Random, person: Person, language: Language) -> dict[str, Any]:
    queried, *known = rng.sample(COLUMNS, rng.randint(2, 3))
    name = f"{rng.choice(language.tables)}_{rng.randrange(1000)}"
    header = [language.columns[field] for field in rng.sample(COLUMNS, len(COLUMNS))]
    tests = [(language.columns[key], person[key]) for key in known]
    where = language.also.join(language.where.format(*test) for test in tests)
    column = language.columns[queried]
    check = " AND ".join(f"{key} = '" + value.replace("'", "''") + "'" for key, value in tests)
    return {
        "question": language.select.format(table=name, column=column, where=where),
        "table": {"header": header, "name": name},
        "sql": f"SELECT {column} FROM {name} WHERE {check}",
    }


FORMATS: dict[str, Callable[[Random, Person, Language], dict[str, Any]]] = {
    "chat": _chat,
    "sharegpt": _sharegpt,
    "tools": _tools,
    "completions": _completions,
    "text": _text,
    "instruction": _instruction,
    "classification": _classification,
    "wikisql": _wikisql,
}


def rows(format: str, count: int, locales: Sequence[str], seed: int) -> Iterator[dict[str, Any]]:
    """Yield `count` rows; each is about one person, in one of the locales.

    Raises:
        UserError: where Faker is missing.
        KeyError: where FORMATS or LANGUAGES has no such format or locale.
    """
    make = FORMATS[format]
    spoken = {locale: (LANGUAGES[locale], _pools(locale, seed)) for locale in locales}
    # Seeded with a text: Random ignores the sign of a number.
    rng = Random(f"{seed}")
    for number in range(count):
        language, pools = spoken[rng.choice(locales)]
        person = {field: rng.choice(pool) for field, pool in pools.items()}
        row = make(rng, person, language)
        row["id"] = f"{format}-{seed}-{number}"
        if rng.random() < 0.5:
            row["source"] = rng.choice(pools["company"])
        if rng.random() < 0.5:
            row["quality_score"] = round(rng.random(), 3)
        yield row


@lru_cache(maxsize=8)
def _pools(locale: str, seed: int) -> dict[str, list[str]]:
    """Return up to POOL different values of Faker's for each field."""
    try:
        from faker import Faker
    except ImportError:
        raise UserError("synthesize.faker_missing") from None
    faker = Faker(locale)
    faker.seed_instance(f"{seed} {locale}")
    drawn = {field: [getattr(faker, field)() for _ in range(POOL)] for field in COLUMNS}
    return {field: list(dict.fromkeys(values)) for field, values in drawn.items()}


def write(path: Path, drawn: Iterable[dict[str, Any]], count: int) -> None:
    """Write rows to a new file as they come; `count` is for the progress bar.

    Raises:
        UserError: where `path` exists, or its folder can't be written to.
    """
    _check_free(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            path.lstat()  # fails for a name that is too long, or that has a NUL
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=".synthesize.")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError("synthesize.not_writable", path=str(path), reason=reason) from None
    encode = json.JSONEncoder(ensure_ascii=False).encode
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            with console.progress() as progress:
                bar = progress.add_task("rows", total=count)
                for number, row in enumerate(drawn, 1):
                    file.write(encode(row) + "\n")
                    if number % 1000 == 0:
                        progress.update(bar, completed=number)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)
        _check_free(path)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _check_free(path: Path) -> None:
    if os.path.lexists(path):
        raise UserError("synthesize.exists", path=path)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m athanor.synthesize",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="a new JSON Lines file")
    parser.add_argument("--rows", type=int, default=100)
    parser.add_argument("--format", choices=FORMATS, default="completions")
    parser.add_argument("--locale", nargs="+", choices=LANGUAGES, default=list(LANGUAGES))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if not 1 <= args.rows <= MOST_ROWS:
        parser.error(f"--rows: expected a number above 0, at most {MOST_ROWS:,}, got {args.rows}")
    write(args.out, rows(args.format, args.rows, args.locale, args.seed), args.rows)
    console.print_facts(
        "synthesize",
        {
            "rows": f"{args.rows:,} in the format {args.format}, {' and '.join(args.locale)}",
            "file": f"{args.out}, {args.out.stat().st_size / 1e6:.1f} MB",
            "look at it": f"head -n 3 {args.out}",
        },
    )


if __name__ == "__main__":
    console.run_command(main, in_project=False)
