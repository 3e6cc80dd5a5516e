"""Rules of the layout that no single module can hold by itself: who imports whom, names of files, places of text."""

import ast
import re
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from pipeline.command_line import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
PIPELINE = ROOT / "pipeline"
ROOMS = (
    "data",
    "model",
    "runtime",
    "inference",
    "evaluation",
    "mining",
    "planning",
    "reporting",
    "training",
    "cluster",
)

# What a room may import from the pipeline. Entries (the other files directly in pipeline/) may import all of it, and
# nobody imports an entry.
LEAVES = {"files", "datatypes", "prompts"}
ALLOWED = {
    "files": set(),
    "datatypes": set(),
    "prompts": set(),
    "settings": LEAVES,
    "data": LEAVES | {"settings", "data"},
    "model": LEAVES | {"settings", "model"},
    "runtime": LEAVES | {"settings", "data", "model", "runtime"},
    "inference": LEAVES | {"settings", "data", "model", "inference"},
    "evaluation": LEAVES | {"settings", "inference", "evaluation"},
    "reporting": LEAVES | {"settings", "data", "reporting"},
    "planning": LEAVES | {"settings", "data", "model", "planning"},
    "mining": LEAVES | {"settings", "data", "inference", "mining"},
    "training": LEAVES | {"settings", "data", "model", "runtime", "inference", "evaluation", "training"},
    "cluster": LEAVES | {"settings", "data", "model", "runtime", "planning", "evaluation", "cluster"},
    "entry": LEAVES | {"settings", *ROOMS},
}


def python_files() -> list[Path]:
    return sorted([*PIPELINE.rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])


def imported_names(path: Path, module_level: bool = False) -> set[str]:
    """Dotted names of everything that a file imports; relative imports appear as names that begin with a dot."""
    names = set()
    for node in _nodes(ast.parse(path.read_text(encoding="utf-8")), module_level):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            names |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return names


def _nodes(tree: ast.AST, module_level: bool) -> list[ast.AST]:
    """All nodes, or those that run on import: not inside functions, not under `if TYPE_CHECKING`."""
    found = [tree]
    for child in ast.iter_child_nodes(tree):
        in_function = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for_types = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test)
        if not (module_level and (in_function or for_types)):
            found += _nodes(child, module_level)
    return found


def room_of(path: Path) -> str:
    first = path.relative_to(PIPELINE).parts[0].removesuffix(".py")
    return first if first in ALLOWED else "entry"


def test_the_search_sees_imports(tmp_path: Path) -> None:
    path = tmp_path / "x.py"
    path.write_text(
        "from typing import TYPE_CHECKING\nimport a.b\nfrom . import c\nfrom pipeline import train\n"
        "if TYPE_CHECKING:\n    import d\ndef f():\n    import e\n"
    )
    assert {"a.b", ".", "..c", "pipeline.train", "d", "e"} <= imported_names(path)
    assert not {"d", "e"} & imported_names(path, module_level=True)


@pytest.mark.parametrize("path", sorted(PIPELINE.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_import_directions(path: Path) -> None:
    if path == PIPELINE / "__init__.py":
        assert not imported_names(path)
        return
    own = {name for name in imported_names(path) if name.split(".")[0] == "pipeline" and name != "pipeline"}
    wrong = {name for name in own if name.split(".")[1] not in ALLOWED[room_of(path)] | {"__version__"}}
    assert not wrong, f"{room_of(path)} may import only {sorted(ALLOWED[room_of(path)])} from pipeline"


@pytest.mark.parametrize("path", python_files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_from_outside(path: Path) -> None:
    top = {name.split(".")[0] for name in imported_names(path)}
    on_import = {name.split(".")[0] for name in imported_names(path, module_level=True)}
    assert "" not in top, "relative imports break `python pipeline/train.py`"
    in_kernels = path.is_relative_to(ROOT / "kernels")
    if in_kernels:
        assert not top & {"pipeline", "deepspeed", "transformers", "peft"}
    else:
        assert "triton" not in top, "Triton belongs to embed_kernels"
    if "embed_kernels" in top and not in_kernels:
        assert room_of(path) in ("model", "entry")
    if "deepspeed" in top:
        assert path == PIPELINE / "runtime/engine.py", "engine.py is the only import of deepspeed"
    if not in_kernels and room_of(path) in ("data", "reporting"):
        assert not on_import & {"torch", "transformers", "datasets"}, "preprocessing must start without them"


def test_kernels_is_a_source_root() -> None:
    assert not (ROOT / "kernels/__init__.py").exists(), "it would shadow the hub package that transformers imports"
    assert not (ROOT / "tests/kernels").exists()
    assert (ROOT / "kernels/embed_kernels/__init__.py").is_file()


def test_no_entry_is_named_like_a_module() -> None:
    # `deepspeed pipeline/train.py` puts pipeline/ first on sys.path.
    own = {path.stem for path in PIPELINE.glob("*.py")} - {"__init__"}
    own |= {path.name for path in PIPELINE.iterdir() if (path / "__init__.py").is_file()}
    taken = set(sys.stdlib_module_names) | {
        name for name, owners in packages_distributions().items() if set(owners) != {"bge-icl-train"}
    }
    assert len(own) > 8
    assert not own & taken


def test_template_text_is_in_prompts_only() -> None:
    literal = re.compile(r"<(instruct|query|response)>|Instruct: |Summarize the above")
    holders = []
    for path in python_files():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        docstrings = {
            node.body[0].value
            for node in ast.walk(tree)
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
            and node.body
            and isinstance(node.body[0], ast.Expr)
        }
        strings = [n for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
        if any(literal.search(node.value) for node in strings if node not in docstrings):
            holders.append(path.relative_to(ROOT).as_posix())
    assert holders == ["pipeline/prompts.py"]


def test_entries_hold_no_classes() -> None:
    # A class of a file that runs as __main__ and is imported too would exist twice.
    for path in PIPELINE.glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if room_of(path) == "entry":
            assert not [node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)], path


def readme_claims(text: str) -> tuple[set[str], set[str]]:
    """(paths, commands) that a README names in code: `like/this.py`, `make this`, `bge-icl this`, code blocks."""
    blocks = re.findall(r"```[a-z]*\n(.*?)```", text, flags=re.DOTALL)
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    code = "\n".join([*blocks, *inline])
    commands = set(re.findall(r"(?<![\w./-])(make [a-z][a-z-]*|bge-icl [a-z]+)", code))
    roots = sorted(path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")) + ["slurm"]
    words = re.findall(r"[\w./*-]+", code)
    paths = {w.rstrip(".") for w in words if w.split("/")[0] in roots and "/" in w and not w.startswith("runs/")}
    return paths, commands


@pytest.mark.parametrize("readme", ["README.md", "slurm/README.md"])
def test_readme_names_what_exists(readme: str) -> None:
    paths, commands = readme_claims((ROOT / readme).read_text(encoding="utf-8"))
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    known = {f"make {target}" for target in re.findall(r"^([a-z][a-z-]*):", makefile, flags=re.MULTILINE)}
    known |= {f"bge-icl {command}" for command in COMMANDS}
    missing = {path for path in paths if not list(ROOT.glob(path.rstrip("/")))}
    assert not missing | (commands - known)


def test_readme_claims_are_found() -> None:
    block = "```bash\nmake prove-main DATA=x\nbge-icl plan --x\npython pipeline/no.py\n```\n"
    text = f"Run `make demo`, see `pipeline/train.py`.\n{block}"
    commands = {"make demo", "make prove-main", "bge-icl plan"}
    assert readme_claims(text) == ({"pipeline/train.py", "pipeline/no.py"}, commands)
