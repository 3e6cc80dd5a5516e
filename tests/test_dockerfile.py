"""slurm/Dockerfile, which nothing here can build: its form, what it copies, and its versions."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
INSTRUCTIONS = ("FROM", "RUN", "ENV", "COPY", "ARG", "WORKDIR")


def instructions(text: str) -> list[tuple[str, str]]:
    """(instruction, its words) in order; a line that ends with a backslash goes on in the next."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    whole = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    found = []
    for line in filter(None, map(str.strip, whole.splitlines())):
        name, _, rest = line.partition(" ")
        assert name in INSTRUCTIONS, f"{line!r} is no instruction: does the line before lack a backslash?"
        assert rest.strip(), f"{name} says nothing"
        found.append((name, rest.strip()))
    return found


def constraints() -> dict[str, str]:
    """Package -> version, in lower case."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return {name.lower(): version for line in lines for name, version in re.findall(r"^([\w.-]+)==([\w.]+)", line)}


DOCKERFILE = instructions((ROOT / "slurm/Dockerfile").read_text(encoding="utf-8"))


def test_a_broken_file_is_seen() -> None:
    assert instructions("FROM a:1\nRUN b \\\n  && c\n# d\n") == [("FROM", "a:1"), ("RUN", "b  && c")]
    for broken in ("FROM a:1\nRUN b\n  && c\n", "FROM\n", "from a:1\n"):
        try:
            instructions(broken)
        except AssertionError:
            continue
        raise AssertionError(f"{broken!r} passes")


def test_it_begins_with_one_base_of_a_fixed_version() -> None:
    assert [name for name, _ in DOCKERFILE].count("FROM") == 1 and DOCKERFILE[0][0] == "FROM"
    assert re.fullmatch(r"nvidia/cuda:\d+\.\d+\.\d+-cudnn-devel-ubuntu\d\d\.\d\d", DOCKERFILE[0][1])


def test_its_versions_are_the_tested_ones() -> None:
    commands = " ; ".join(rest for name, rest in DOCKERFILE if name == "RUN")
    pinned = {name.lower(): version for name, version in re.findall(r"([\w.-]+)==([\w.]+)", commands)}
    assert "torch" in pinned
    known = constraints()
    assert pinned == {name: known[name] for name in pinned}
    # Everything else gets its version from the file itself.
    installs = [part for part in re.split(r"&&|;", commands) if "pip install" in part]
    assert len(installs) == 3
    for install in installs:
        assert "-c /build/constraints.txt" in install or re.search(r"==", install), install


def test_what_it_copies_and_the_extras_exist() -> None:
    for name, rest in DOCKERFILE:
        if name == "COPY":
            for source in rest.split()[:-1]:
                assert (ROOT / source).exists(), source
    commands = " ".join(rest for name, rest in DOCKERFILE if name == "RUN")
    extras = re.search(r"/build\[([a-z,]+)\]", commands)
    assert extras is not None
    declared = re.findall(r'^        "(\w+)": \[', (ROOT / "setup.py").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert set(extras[1].split(",")) <= set(declared)
