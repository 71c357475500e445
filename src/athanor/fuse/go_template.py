"""The pieces of a chat template as a TEMPLATE in Go's text/template, over Ollama's data."""

import re

from athanor.fuse.template_pieces import Pieces

# Go's templates have no function that trims, but they count, compare and cut.
TRIM = (
    '{{ define "trim" }}{{ $t := . }}'
    '{{ range len $t }}{{ if eq (slice $t 0 1) " " "\\n" "\\t" "\\r" }}{{ $t = slice $t 1 }}'
    "{{ else }}{{ break }}{{ end }}{{ end }}"
    "{{ range len $t }}{{ $n := len (slice $t 1) }}"
    '{{ if eq (slice $t $n) " " "\\n" "\\t" "\\r" }}{{ $t = slice $t 0 $n }}'
    "{{ else }}{{ break }}{{ end }}{{ end }}"
    "{{ $t }}{{ end }}"
)


def write_go_template(pieces: Pieces) -> str:
    """Return the pieces as a template that writes what they write."""
    has_system = '(eq (index $.Messages 0).Role "system")'

    def content(role: str, of: str = ".Content") -> str:
        return f'{{{{ template "trim" {of} }}}}' if role in pieces.trimmed else f"{{{{ {of} }}}}"

    opens = _literal(pieces.user[0])
    branches = []
    if pieces.system is not None:
        before, after = map(_literal, pieces.system)
        if pieces.place == "last":
            first = content("system", "(index $.Messages 0).Content")
            is_last = "(eq (len (slice $.Messages $i)) 1)"
            opens += f"{{{{ if and {is_last} {has_system} }}}}{before}{first}{after}{{{{ end }}}}"
        else:
            branches.append(("system", before + content("system") + after))
        if pieces.place == "first":
            opens = f"{{{{ if not (and (eq $i 1) {has_system}) }}}}{opens}{{{{ end }}}}"
    branches.append(("user", opens + content("user") + _literal(pieces.user[1])))
    before, after = map(_literal, pieces.assistant)
    # Never written: from this Ollama learns the tags by which it takes thoughts out of answers.
    tags = "{{ if false }}<think>{{ .Thinking }}</think>{{ end }}" if pieces.cuts_thoughts else ""
    branches.append(("assistant", before + tags + content("assistant") + after))

    text = TRIM if pieces.trimmed else ""
    text += _literal(pieces.start) + "{{ range $i, $_ := .Messages }}"
    if pieces.no_system:
        without = _literal(pieces.no_system)
        text += f"{{{{ if and (eq $i 0) (not {has_system}) }}}}{without}{{{{ end }}}}"
    for number, (role, turn) in enumerate(branches):
        text += f'{{{{ {"else " if number else ""}if eq .Role "{role}" }}}}{turn}'
    text += "{{ end }}{{ end }}" + _literal(pieces.ask)
    if pieces.no_thought:
        silent = _literal(pieces.no_thought)
        text += f"{{{{ if and .IsThinkSet (not .Think) }}}}{silent}{{{{ end }}}}"
    return text


def _literal(text: str) -> str:
    """Return text for a Go template, with a string for what opens an action or a Modelfile loses.

    A Modelfile ends a text at three quotation marks.
    """

    def escape(special: re.Match[str]) -> str:
        return '{{ "' + "".join(f"\\U{ord(character):08x}" for character in special[0]) + '" }}'

    lost = "".join(f"|{re.escape(c)}" for c in lost_characters(text))
    return re.sub(r'\{+|"{3,}' + lost, escape, text)


def lost_characters(text: str) -> list[str]:
    """Return the characters that a Modelfile loses: those that Go's strconv.IsPrint refuses."""
    return sorted({c for c in text if not c.isprintable() and c not in "\n\t"})
