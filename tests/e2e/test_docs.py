"""The documentation is true: its commands run, its links lead somewhere, its names exist."""

import ast
import importlib.util
import json
import re
import shlex
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from athanor import errors
from athanor.config import schema
from athanor.config.compose import compose_config
from athanor.sweep.space import read_space
from support import workspace
from support.pages import NEEDS, Block, Page

# In the order of reading, in which the commands run.
PAGES = (
    "README.md",
    "README.zh.md",
    *(
        f"docs/{name}.md"
        for name in ("README", "data", "configuration", "training", "sweeps", "runs", "chat")
    ),
    *(f"docs/{name}.md" for name in ("export", "performance", "troubleshooting", "architecture")),
    "CONTRIBUTING.md",
)
READMES = ("README.md", "README.zh.md")

# Ids that stand in the pages for the first and the latest run of the workspace.
FIRST_RUN, LATEST_RUN = "3780998", "69d11ce"

# Keys of the configuration, what only looks like one, and files of the repository, within a line.
KEY = re.compile(r"(train|data|test|fuse|model)\.[a-z_.]+")
NO_KEYS = (".json", ".jsonl", ".csv", ".dvc", ".result")
INSIDE = re.compile(r"(conf|src|tests|docs|scripts|benchmarks|examples)/[\w./-]+")

# A command within a line.
COMMAND = re.compile(r"([A-Z_]+=\S+ )*(uv|python) ")

# The environment is there already: what uv runs is run, what it installs is installed.
UV = '#!/bin/sh\n[ "$1" = run ] && shift && exec "$@"\n'
PIP = "#!/bin/sh\n"


@pytest.fixture(scope="module")
def pages(repo: Path) -> list[Page]:
    return [Page.read(repo, name) for name in PAGES]


@pytest.fixture(scope="module")
def blocks(pages: list[Page]) -> list[Block]:
    return [block for page in pages for block in page.blocks()]


@dataclass(frozen=True)
class Ran:
    """A block that ran: its exit status, what it printed, and the seconds that it took."""

    block: Block
    status: int
    printed: str
    seconds: float


@pytest.fixture(scope="module")
def ran(repo: Path, blocks: list[Block], tmp_path_factory: pytest.TempPathFactory) -> list[Ran]:
    """Every block without a mark, run in order in one clone; commands that ran before are not."""
    clone = workspace.of_the_repository(repo, tmp_path_factory.mktemp("docs") / "athanor")
    programs = clone.folder.with_name("bin")
    programs.mkdir()
    for name, text in (("uv", UV), ("pip", PIP)):
        (programs / name).write_text(text, encoding="utf-8")
        (programs / name).chmod(0o755)
    # Few rows, of which `prepare` puts two into valid and two into test.
    boxes = range(4, 14)
    rows = [{"prompt": f"Where is box {n}?", "completion": f"On shelf {n % 7}."} for n in boxes]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (clone.folder / "my-rows.jsonl").write_text(lines, encoding="utf-8")

    done: set[str] = set()
    runs: list[str] = []
    results = []
    for block in blocks:
        if block.needs or set(block.commands()) <= done:
            continue
        start = time.perf_counter()
        text = block.text
        if runs:
            text = text.replace(FIRST_RUN, runs[0]).replace(LATEST_RUN, runs[-1])
        process = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", text],
            cwd=clone.folder,
            env=clone.env() | {"PATH": f"{programs}:{clone.env()['PATH']}"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        seconds = time.perf_counter() - start
        print(f"{seconds:5.1f} s  {block}")
        results.append(Ran(block, process.returncode, process.stdout, seconds))
        done |= set(block.commands())
        trained = clone.folder / "artifacts/train/run.json"
        if trained.exists() and (run_id := clone.json(str(trained))["run_id"]) not in runs:
            runs.append(run_id)
    print(f"{sum(one.seconds for one in results):5.1f} s  all")
    return results


def test_every_command_runs(ran: list[Ran]) -> None:
    assert not [f"{one.block}\n{one.printed}" for one in ran if one.status]
    assert {one.block.page for one in ran} >= {"README.md", "docs/data.md", "docs/runs.md"}


def test_answers_to_the_three_questions_are_those_of_the_readmes(
    ran: list[Ran], pages: list[Page]
) -> None:
    [generated] = [
        one for one in ran if one.block.page == "README.md" and "PolarDB" in one.block.text
    ]
    printed = generated.printed.splitlines()
    for page, head in zip(pages, ("| question | his", "| 问题 | 他的"), strict=False):
        table = page.table(head)
        assert len(table) == 3
        for question, _, answer in table:
            place = printed.index(question)
            assert printed[place + 2] == f"  tuned: {answer.strip('`')}  (stopped)"


def test_report_on_the_tiny_model_is_that_of_the_page(ran: list[Ran], pages: list[Page]) -> None:
    [checked] = [one for one in ran if one.block.page == "docs/chat.md"]
    printed = [" ".join(line.split()) for line in checked.printed.splitlines()]
    [page] = [page for page in pages if page.name == "docs/chat.md"]
    [shown] = re.findall(r"^```\n(  chat template.*?)^```$", page.text, re.DOTALL | re.MULTILINE)
    lines = [" ".join(line.split()) for line in shown.splitlines()]
    assert [line for line in lines if line not in printed] == []


def test_marks_are_known(blocks: list[Block]) -> None:
    assert [str(block) for block in blocks if not block.needs <= NEEDS] == []


def test_every_block_is_bash(blocks: list[Block]) -> None:
    for block in blocks:
        done = subprocess.run(["bash", "-n"], input=block.text, text=True, capture_output=True)
        assert not done.stderr, f"{block}: {done.stderr}"


def commands_of(pages: list[Page]) -> Iterator[tuple[str, list[str]]]:
    """Yield (place, words) of each command in a block or within a line, `uv run` left out."""
    for page in pages:
        texts = [(str(block), text) for block in page.blocks() for text in block.commands()]
        texts += [(page.name, text) for text in page.code_in_lines() if COMMAND.match(text)]
        for place, text in texts:
            words: list[str] = []
            for word in [*shlex.split(text), "&&"]:
                if word not in ("&&", "|", ";"):
                    words.append(word)
                    continue
                while words and (re.fullmatch(r"[A-Z_]+=\S*", words[0]) or words[0] == "export"):
                    words = words[1:]
                if words[:2] == ["uv", "run"]:
                    yield place, words[2:]
                elif words[:1] in (["uv"], ["python"]):
                    yield place, words
                words = []


def test_commands_name_what_there_is(
    repo: Path, pages: list[Page], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Modules, options, stages, overrides, sweeps, files and groups exist, run or not."""
    monkeypatch.chdir(repo)
    stages = yaml.safe_load((repo / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    project = tomllib.loads((repo / "pyproject.toml").read_text(encoding="utf-8"))
    known = {
        "--group": set(project["dependency-groups"]),
        "--no-group": set(project["dependency-groups"]),
        "--extra": set(project["project"]["optional-dependencies"]),
    }
    composed: set[tuple[str, ...]] = set()
    sweeps: set[tuple[str, ...]] = set()
    wrong = []
    for place, words in commands_of(pages):
        options = [word.partition("=")[0] for word in words if word.startswith("--")]
        if words[:2] == ["uv", "sync"]:
            wrong += [
                (place, name)
                for option, name in zip(words[2::2], words[3::2], strict=True)
                if name not in known[option]
            ]
        elif words[:2] == ["python", "-m"]:
            source = source_of(repo, words[2])
            if words[2].removeprefix("athanor.") in (*stages, "sweep"):
                source += (repo / "src/athanor/config/command.py").read_text(encoding="utf-8")
            wrong += [(place, option) for option in options if not takes(source, option)]
            rest = [word for word in words[3:] if not word.startswith("-")]
            if words[2] == "athanor.sweep":
                sweeps.add(tuple(rest))
            elif words[2].removeprefix("athanor.") in stages:
                composed.add(tuple(rest))
        elif words[:1] == ["python"]:
            source = (repo / words[1]).read_text(encoding="utf-8")
            wrong += [(place, option) for option in options if not takes(source, option)]
        elif words[:1] == ["pytest"]:
            files = [word.partition("::")[0] for word in words if word.startswith("tests")]
            wrong += [(place, name) for name in files if not (repo / name).exists()]
            if "-k" in words:
                text = "".join((repo / name).read_text(encoding="utf-8") for name in files)
                wanted = set(re.findall(r"\w+", words[words.index("-k") + 1])) - {
                    "or",
                    "and",
                    "not",
                }
                wrong += [(place, word) for word in wanted if word not in text]
        elif words[:2] == ["dvc", "repro"]:
            targets = [word for word in words[2:] if not word.startswith("-")]
            wrong += [(place, target) for target in targets if target not in stages]
        elif words[:3] == ["dvc", "exp", "run"]:
            chosen = [after for word, after in pairwise(words) if word == "-S"]
            pairs = [option.partition("=") for option in chosen if "…" not in option]
            composed.add(tuple(f"{key}={values.split(',')[0]}" for key, _, values in pairs))
    assert wrong == []
    assert len(composed) > 8
    for overrides in sorted(composed):
        compose_config(Path("conf"), list(overrides))
    assert len(sweeps) > 3
    for arguments in sorted(sweeps):
        if "…" not in " ".join(arguments):
            assert read_space(Path("conf"), list(arguments)).total > 1, arguments


def source_of(repo: Path, module: str) -> str:
    """Return the source of a module that `python -m` runs; of a package, of all of its modules."""
    if not module.startswith("athanor."):
        assert importlib.util.find_spec(module) is not None, module
        return ""
    path = repo / "src" / module.replace(".", "/")
    if path.is_dir():
        assert (path / "__main__.py").exists(), module
        return "".join(file.read_text(encoding="utf-8") for file in path.glob("*.py"))
    return path.with_suffix(".py").read_text(encoding="utf-8")


def takes(source: str, option: str) -> bool:
    """Tell whether a program's source has an option, or the name that it makes one of."""
    return f'"{option}"' in source or f'"{option[2:].replace("-", "_")}"' in source


def test_links_lead_somewhere(repo: Path, pages: list[Page]) -> None:
    lost = []
    for page in pages:
        for path, anchor in page.links():
            target = (repo / page.name).parent / path if path else repo / page.name
            if not target.exists():
                lost.append((page.name, path))
            elif anchor and anchor not in Page(path, target.read_text(encoding="utf-8")).anchors():
                lost.append((page.name, f"{path}#{anchor}"))
    assert lost == []


def test_every_page_is_read(repo: Path, pages: list[Page]) -> None:
    there = {f"docs/{path.name}" for path in (repo / "docs").glob("*.md")}
    assert there <= set(PAGES)
    [index] = [page for page in pages if page.name == "docs/README.md"]
    assert {f"docs/{path}" for path, _ in index.links()} >= there - {"docs/README.md"}


def test_every_page_opens_with_its_command(pages: list[Page]) -> None:
    for page in pages:
        if page.name.startswith("docs/") and page.name != "docs/README.md":
            opening = re.sub(r"<!-- needs: .* -->\n", "", page.text).splitlines()
            assert opening[2] == "```bash" or page.name == "docs/troubleshooting.md", page.name


def test_keys_and_files_in_lines_exist(repo: Path, pages: list[Page]) -> None:
    keys = {*schema.all_keys(), *(f"data.checks.{name}" for name in settings_of_checks(repo))}
    wrong = []
    for page in pages:
        for code in page.code_in_lines():
            name = code.partition(":")[0].partition("=")[0]
            if KEY.fullmatch(name) and not name.endswith(NO_KEYS):
                exists = name in keys
            else:
                exists = not INSIDE.fullmatch(name) or (repo / name).exists()
            wrong += [] if exists else [(page.name, code)]
    assert wrong == []


def settings_of_checks(repo: Path) -> list[str]:
    """Return the names of the checks that conf/ gives an action."""
    text = (repo / "conf/data/default.yaml").read_text(encoding="utf-8")
    return list(yaml.safe_load(text)["checks"])


def test_errors_of_troubleshooting_are_the_codes(repo: Path, pages: list[Page]) -> None:
    """Each title is a message in src, or one of those below; what is code, or `…`, varies."""
    of_programs = {
        "missing data 'source': data",
        "Unable to acquire lock",
        "'artifacts/prepare/rejected.jsonl' is empty",
        "The run cache could not be pulled",
        "The model does not stop, or prints stray characters",
    }
    rooms = errors.messages().values()
    texts = [re.sub(r"\{[^}]*\}", "…", text) for room in rooms for text in room.values()]
    texts += [text for path in sorted((repo / "src").rglob("*.py")) for text in strings(path)]
    [page] = [page for page in pages if page.name == "docs/troubleshooting.md"]
    titles = re.findall(r"^### (.+)$", page.text, re.MULTILINE)
    assert len(titles) > 30
    lost = [title for title in titles if not any(re.search(pattern(title), text) for text in texts)]
    assert set(lost) == of_programs


def strings(path: Path) -> Iterator[str]:
    """Yield the texts of a module, `…` for each value that is put into one."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            yield "".join(
                str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values
            )
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def pattern(title: str) -> str:
    """Return the expression that finds a title among the messages."""
    return r"[^\n]*".join(re.escape(part) for part in re.split(r"`[^`]*`|…", title))


def test_readmes_are_equals(pages: list[Page]) -> None:
    """Both say the same: their commands, tables, pictures and sections, in one order."""
    english, chinese = (page for page in pages if page.name in READMES)
    for page in (english, chinese):
        assert len(page.text.splitlines()) <= 200
    pairs = [(page.blocks(), page) for page in (english, chinese)]
    commands = [[block.commands() for block in found] for found, _ in pairs]
    assert commands[0] == commands[1]
    assert [block.needs for block in pairs[0][0]] == [block.needs for block in pairs[1][0]]
    shape = [re.findall(r"^(?:#+ |!\[|\| ---|- \*\*)", p.text, re.MULTILINE) for _, p in pairs]
    assert shape[0] == shape[1]
    rows = [len(re.findall(r"^\|", page.text, re.MULTILINE)) for _, page in pairs]
    assert rows[0] == rows[1]


def test_example_trains_and_answers(repo: Path, tmp_path: Path) -> None:
    example = repo / "examples/loop.py"
    assert len(example.read_text(encoding="utf-8").splitlines()) < 120
    command = [sys.executable, str(example), str(tmp_path / "adapters")]
    done = subprocess.run(command, cwd=repo, stdout=subprocess.PIPE, text=True)
    assert done.returncode == 0
    answers = done.stdout.splitlines()[-4:]
    assert answers == [
        "Who painted the moon?  A cat.  (stopped)",
        "How many days has a week?  Nine.  (stopped)",
        "月亮哪天最圆  星期八  (stopped)",
        "谁是最帅的地球人  德哥  (stopped)",
    ]
    adapters = {path.name for path in (tmp_path / "adapters").iterdir()}
    assert adapters == {"adapters.safetensors", "adapter_config.json"}


def test_tree_and_floors_are_the_codes(repo: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(repo / "scripts/tree.py"), "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
