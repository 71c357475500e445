"""The pages of documentation: their blocks of commands, the code within lines, the links."""

import re
from dataclasses import dataclass
from pathlib import Path

MARK = re.compile(r"<!-- needs: (?P<needs>.+) -->")
# What a marked block may need that a test does not have.
NEEDS = {"minutes", "network", "gpu", "ollama", "llama.cpp", "torch", "browser"}


@dataclass(frozen=True)
class Block:
    """A block of commands; `needs` holds what its mark names, nothing for one that a test runs."""

    page: str
    line: int
    text: str
    needs: frozenset[str]

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    def commands(self) -> list[str]:
        """Return the commands, a line each, continued lines joined and comments left out."""
        lines = self.text.replace("\\\n", "").splitlines()
        return [command for line in lines if (command := without_comment(line))]


@dataclass(frozen=True)
class Page:
    """A page, by its path in the repository."""

    name: str
    text: str

    @classmethod
    def read(cls, repo: Path, name: str) -> "Page":
        """Read a page of the repository."""
        return cls(name, (repo / name).read_text(encoding="utf-8"))

    def blocks(self) -> list[Block]:
        """Return the blocks of commands, in order."""
        lines = self.text.splitlines()
        starts = [number for number, line in enumerate(lines) if line == "```bash"]
        blocks = []
        for start in starts:
            end = lines.index("```", start)
            mark = MARK.fullmatch(lines[start - 1])
            needs = frozenset(mark["needs"].split(", ")) if mark else frozenset[str]()
            text = "\n".join(lines[start + 1 : end]) + "\n"
            blocks.append(Block(self.name, start + 2, text, needs))
        return blocks

    def code_in_lines(self) -> list[str]:
        """Return the texts between backticks, outside of blocks."""
        prose = re.sub(r"```.*?\n```", "", self.text, flags=re.DOTALL)
        return re.findall(r"(?<!`)`([^`\n]+)`", prose)

    def links(self) -> list[tuple[str, str]]:
        """Return (path, anchor) of each link into this repository, relative to the page."""
        targets = re.findall(r"\]\(([^)\s]+)\)", self.text)
        inside = [target.partition("#") for target in targets if "://" not in target]
        return [(path, anchor) for path, _, anchor in inside]

    def anchors(self) -> set[str]:
        """Return the anchors of the headings, as GitHub makes them."""
        prose = re.sub(r"^```.*?^```$", "", self.text, flags=re.DOTALL | re.MULTILINE)
        titles = re.findall(r"^#+ (.+)$", prose, re.MULTILINE)
        return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}

    def table(self, head: str) -> list[list[str]]:
        """Return the cells of the table whose first line is `head`, a list a row."""
        lines = self.text[self.text.index(head) :].splitlines()
        rows = [line for line in lines[: [*lines, ""].index("")] if line.startswith("|")]
        cells = [re.split(r"(?<!\\)\|", row)[1:-1] for row in rows[2:]]
        return [[cell.strip() for cell in row] for row in cells]


def without_comment(line: str) -> str:
    """Return a line of bash without its comment; a `#` after a space begins one here."""
    return re.sub(r"(^|\s+)#( .*)?$", "", line).strip()
