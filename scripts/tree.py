"""Write the tree of src/athanor and its floors of imports into docs/architecture.md.

    uv run python scripts/tree.py             # write them
    uv run python scripts/tree.py --check     # exit with 1 where the page differs from the code

The tree has a line for each module: its name, and the first sentence of its docstring.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import imports

from athanor.code import read_imports

REPO = Path(__file__).parent.parent
PACKAGE = REPO / "src" / "athanor"
PAGE = REPO / "docs" / "architecture.md"


def summary(module: Path) -> str:
    """Return the first sentence of a module's docstring, without its full stop.

    Raises:
        SystemExit: where a module has no docstring.
    """
    docstring = ast.get_docstring(ast.parse(module.read_text(encoding="utf-8")))
    if not docstring:
        sys.exit(f"{module.relative_to(REPO)} has no docstring")
    paragraph = " ".join(docstring.split("\n\n")[0].split())
    return paragraph.split(". ")[0].removesuffix(".").removesuffix(":")


def entries(folder: Path, indent: str = "") -> Iterator[tuple[str, str]]:
    """Yield (name, summary) for all below a package: packages first, each kind by its name."""
    modules = [path for path in sorted(folder.glob("*.py")) if path.name != "__init__.py"]
    for package in sorted(path.parent for path in folder.glob("*/__init__.py")):
        yield f"{indent}{package.name}/", summary(package / "__init__.py")
        yield from entries(package, indent + "  ")
    for module in modules:
        yield f"{indent}{module.name}", summary(module)


def tree() -> str:
    """Return the tree as a block of Markdown."""
    lines = [("athanor/", summary(PACKAGE / "__init__.py")), *entries(PACKAGE, "  ")]
    width = max(len(name) for name, _ in lines)
    return "```\n" + "".join(f"{name:<{width}}  {text}\n" for name, text in lines) + "```\n"


def floors() -> str:
    """Return the rooms on each floor as a table of Markdown, from the top."""
    floor = imports.floors(imports.between_rooms(read_imports()))
    rooms: dict[int, list[str]] = {}
    for room in sorted(floor.keys() - {"athanor"}):
        rooms.setdefault(floor[room], []).append(f"`{room}`")
    rows = [f"| {number} | {', '.join(rooms[number])} |" for number in sorted(rooms, reverse=True)]
    return "\n".join(["| floor | rooms |", "| --- | --- |", *rows]) + "\n"


def put(page: str, name: str, text: str) -> str:
    """Return the page with a text between the two markers of a name."""
    before, begin, rest = page.partition(f"<!-- {name}: python scripts/tree.py -->\n")
    _, end, after = rest.partition(f"<!-- end of {name} -->\n")
    return f"{before}{begin}{text}{end}{after}"


def main() -> None:
    """Write the page, or compare it with the code."""
    page = PAGE.read_text(encoding="utf-8")
    written = put(put(page, "tree", tree()), "floors", floors())
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(written, encoding="utf-8")
    elif written != page:
        sys.exit(
            f"{PAGE.relative_to(REPO)} differs from the code; "
            "`uv run python scripts/tree.py` updates it"
        )


if __name__ == "__main__":
    main()
