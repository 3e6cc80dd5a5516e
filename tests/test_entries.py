"""Every entry starts: as a file from a foreign folder, and through the console command."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import command_line

ROOT = Path(__file__).resolve().parents[1]
ENTRIES = sorted(path for path in (ROOT / "pipeline").glob("*.py") if "__main__" in path.read_text(encoding="utf-8"))


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run([sys.executable, *map(str, command)], cwd=cwd, env=env, capture_output=True, text=True)


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda path: path.name)
def test_help_as_a_file(entry: Path, tmp_path: Path) -> None:
    result = run(entry, "--help", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "usage: " in result.stdout
    if entry.name != "command_line.py":
        assert "example" in result.stdout, "the help should show how it is called"
    assert list(tmp_path.iterdir()) == []


def test_the_list_of_entries_is_not_empty() -> None:
    assert {"evaluate_embedder.py", "command_line.py"} <= {path.name for path in ENTRIES}


@pytest.mark.parametrize("command", command_line.COMMANDS)
def test_help_as_a_command(command: str, tmp_path: Path) -> None:
    console = Path(sys.executable).parent / "bge-icl"
    if not console.is_file():
        pytest.skip("the package is not installed here")
    result = run(console, command, "--help", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"usage: bge-icl {command}")


def test_command_lists_its_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"\n  {name} " in text for name in command_line.COMMANDS)


def test_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(["trian"]) == 2
    assert "unknown command 'trian'" in capsys.readouterr().err


def test_no_command_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main([]) == 2
    assert "usage" in capsys.readouterr().out


@pytest.mark.parametrize("entry", ["preprocess", "plan_run", "evaluate_embedder", "mine_negatives"])
def test_user_errors_have_no_traceback(entry: str, tmp_path: Path) -> None:
    path = ROOT / f"pipeline/{entry}.py"
    more = {"evaluate_embedder": ["--task", str(tmp_path)], "mine_negatives": ["--embedder", "bm25", "--out", "mined"]}
    result = run(path, "--config", "nowhere.yaml", *more.get(entry, []), cwd=tmp_path)
    assert result.returncode == 2
    assert "error: --config nowhere.yaml: no such file" in result.stderr
    assert "Traceback" not in result.stderr
