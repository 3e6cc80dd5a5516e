"""What checks find: one line each, all of them gathered before anything is said to be wrong."""

import shutil
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass

OK, NOTE, UNCHECKED, ERROR = "ok", "note", "not checked", "ERROR"


@dataclass(frozen=True)
class Finding:
    """The outcome of one check; `text` of an error is the whole message."""

    status: str
    name: str
    text: str


def tried(name: str, check: Callable[[], Sequence[Finding] | str]) -> list[Finding]:
    """What a check returns (a string: that all is well); its ValueError or OSError as a finding."""
    try:
        found = check()
    except (ValueError, OSError) as error:
        return [Finding(ERROR, name, str(error))]
    return [Finding(OK, name, found)] if isinstance(found, str) else list(found)


def table(findings: Sequence[Finding]) -> str:
    """One line a finding, broken where the terminal ends."""
    width = max(80, shutil.get_terminal_size((120, 24)).columns)
    lines = []
    for finding in findings:
        head = f"  {finding.status:<12} {finding.name:<11} "
        for paragraph in finding.text.splitlines() or [""]:
            lines += textwrap.wrap(
                paragraph,
                width,
                initial_indent=head,
                subsequent_indent=" " * len(head),
                break_long_words=False,
                break_on_hyphens=False,
            ) or [head.rstrip()]
            head = " " * len(head)
    return "\n".join(lines)


def error_line(findings: Sequence[Finding]) -> str:
    """All errors on one line; empty where there is none."""
    errors = [" ".join(finding.text.split()) for finding in findings if finding.status == ERROR]
    if len(errors) < 2:
        return "".join(errors)
    return f"{len(errors)} things are wrong: " + "; ".join(f"({i}) {text}" for i, text in enumerate(errors, 1))
