"""Write the tree of src/athanor into docs/architecture.md: each module and its docstring's start.

uv run python scripts/tree.py             # write it
uv run python scripts/tree.py --check     # exit with 1 where the page differs from the code
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

REPO = Path(__file__).parent.parent
PACKAGE = REPO / "src" / "athanor"
PAGE = REPO / "docs" / "architecture.md"
BEGIN = "<!-- tree: python scripts/tree.py -->\n"
END = "<!-- end of tree -->\n"


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


def main() -> None:
    """Write the page, or compare it with the code."""
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    written = f"{before}{BEGIN}{tree()}{END}{after}"
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(written, encoding="utf-8")
    elif written != page:
        sys.exit(
            f"the tree in {PAGE.relative_to(REPO)} differs from the code; "
            "`uv run python scripts/tree.py` writes it"
        )


if __name__ == "__main__":
    main()
