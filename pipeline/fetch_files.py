"""Fetch what a recipe names on the hub into one folder: `python pipeline/fetch_files.py --config RECIPE --to FOLDER`.

For the login node: jobs then need no network. Fetches model (weights in one form, config, tokenizer), tokenizer and the
hf:// data sets at one commit each, compares them with the hub's checksums, and writes FOLDER/recipe.yaml (the same
settings with these folders) and FOLDER/fetched.json (commits, files, checksums). Local folders stay where they are.
What is there already is not fetched again; of a call that was cut off, files that came whole are kept.
"""

import argparse
import glob
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline.cluster.fetching import (
    PARTS,
    Fetched,
    Wanted,
    fetch,
    is_local,
    is_whole,
    list_wanted,
    localize,
    read_record,
    write_record,
)
from pipeline.cluster.hub import keep_cache_in, size_text
from pipeline.files import locked, write_text
from pipeline.settings import HUB_PREFIX, Settings, dump_settings, load_settings


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""examples:
  python pipeline/fetch_files.py --config recipes/bge_en_icl_public.yaml --to /data/fetched
  python pipeline/fetch_files.py --config recipe.yaml --to /data/fetched --revision mistralai/Mistral-7B-v0.1=main
  python pipeline/fetch_files.py --config recipe.yaml --to /data/fetched --only model data.store=/data/store
then: python pipeline/preprocess.py --config /data/fetched/recipe.yaml
A gated model needs `hf auth login` once. HF_ENDPOINT names a mirror. A branch that has moved on since is not looked up
again: name the new commit with --revision.""",
    )
    parser.add_argument("--config", required=True, help="recipe YAML; pipeline/settings.py documents every key")
    parser.add_argument("--to", required=True, type=Path, metavar="FOLDER", help="on storage that all nodes see")
    parser.add_argument(
        "--revision",
        action="append",
        default=[],
        metavar="NAME=REVISION",
        help="branch, tag or commit of a name on the hub; repeatable (default: main, or what hf://...@ says)",
    )
    parser.add_argument("--only", default=",".join(PARTS), help="of model,tokenizer,data (default: all of them)")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="settings that override the recipe's")
    return parser.parse_intermixed_args(argv)


def read_revisions(texts: Sequence[str]) -> dict[str, str]:
    """NAME=REVISION by name; ValueError for another form."""
    pairs = [text.partition("=") for text in texts]
    if wrong := [text for text, (name, _, revision) in zip(texts, pairs, strict=True) if not name or not revision]:
        raise ValueError(f"--revision {wrong[0]!r} must be NAME=REVISION, for example owner/name=main")
    return {name: revision for name, _, revision in pairs}


def read_parts(text: str) -> list[str]:
    """The parts that --only names; ValueError for others."""
    parts = [part.strip() for part in text.split(",")]
    if unknown := [part for part in parts if part not in PARTS]:
        raise ValueError(f"--only {text!r}: {unknown[0]!r} is not one of {', '.join(PARTS)}")
    return parts


def local_lines(settings: Settings, parts: Sequence[str]) -> list[str]:
    """What of the recipe is on this machine already and stays there.

    Raises:
        ValueError: it is not there.
    """
    lines = []
    folders = {"model.name": ("model", settings.model.name), "model.adapter": ("model", settings.model.adapter)}
    folders["preprocess.tokenizer"] = ("tokenizer", settings.preprocess.tokenizer)
    for setting, (part, name) in folders.items():
        if part in parts and is_local(name):
            if not Path(name).is_dir():
                raise ValueError(f"{setting}={name}: no such folder; names of the hub are written owner/name")
            lines.append(f"{setting}: a folder, left as it is: {name}")
    if "data" in parts:
        local = [dataset for dataset in settings.data.datasets if not dataset.path.startswith(HUB_PREFIX)]
        root = Path(settings.data.root)
        found = [(root / d.path).exists() or bool(glob.glob(d.path, root_dir=root, recursive=True)) for d in local]
        missing = [dataset for dataset, is_there in zip(local, found, strict=True) if not is_there]
        if missing:
            raise ValueError(
                f"data.datasets: {len(missing)} of {len(local)} local paths are not there, first {missing[0].name!r}: "
                f"{root / missing[0].path}; check data.root, or fetch the rest with --only model,tokenizer"
            )
        if local:
            lines.append(f"data.datasets: {len(local)} with local files, left as they are under {root}")
    return lines


def bring(wanted: Wanted, root: Path, record: dict[str, Fetched]) -> bool:
    """Fetch it unless it is there, note it in fetched.json, and say so; returns whether anything was fetched."""
    entry = record.get(wanted.key)
    if is_there := is_whole(root, entry):
        assert entry is not None
    else:
        print(f"{wanted.setting}: fetching {wanted.name} ({wanted.revision or 'main branch'})", flush=True)
        entry = record[wanted.key] = fetch(wanted, root)
        write_record(root, record)
    rows = f", {entry.rows:,} rows" if entry.rows is not None else ""
    state = "is there" if is_there else "fetched and checked"
    size = f"{len(entry.files)} files, {size_text(entry.num_bytes)}{rows}"
    print(f"{wanted.setting}: {wanted.name} at {entry.commit[:12]} {state}: {size}: {root / entry.folder}", flush=True)
    if entry.left_out and not is_there:
        largest = sorted(entry.left_out, key=lambda name: -entry.left_out[name])
        more = f" and {len(largest) - 6} more" if len(largest) > 6 else ""
        print(f"  left out ({size_text(sum(entry.left_out.values()))}): {', '.join(largest[:6])}{more}")
    return not is_there


def fetch_all(settings: Settings, recipe: str, root: Path, parts: Sequence[str], revisions: dict[str, str]) -> None:
    """Fetch every part that is asked for, then write recipe.yaml."""
    wanted = list_wanted(settings, revisions)
    print_lines(local_lines(settings, parts))
    record = read_record(root)
    came = [bring(some, root, record) for some in wanted if some.part in parts]
    # Of the other parts, what an earlier call brought is used.
    folders = {s.key: str(root / record[s.key].folder) for s in wanted if is_whole(root, record.get(s.key))}
    for some in wanted:
        if some.key not in folders:
            print(f"{some.setting}: {some.name} is not here (--only): recipe.yaml keeps the name")
    local = localize(settings, folders, revisions)
    if streamed := [d.name for d in settings.data.datasets if d.streaming and d not in local.data.datasets]:
        print(f"data.datasets: streaming=false for {', '.join(streamed)}: the rows are here now")
    write_recipe(root / "recipe.yaml", recipe, local)
    shutil.rmtree(root / ".cache", ignore_errors=True)
    if came and not any(came):
        print("everything is there: nothing was fetched")


def write_recipe(path: Path, recipe: str, settings: Settings) -> None:
    """Write the settings; says so, and whether others stood there."""
    text = f"# {recipe} with the folders of pipeline/fetch_files.py\n{dump_settings(settings)}"
    before = path.read_text(encoding="utf-8") if path.is_file() else text
    write_text(path, text)
    assert load_settings(path) == settings, "a dumped recipe reads as itself"
    print(f"recipe: {path}{'' if before == text else ' (other settings stood there before)'}")


def print_lines(lines: Sequence[str]) -> None:
    for line in lines:
        print(line, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    try:
        parts, revisions = read_parts(arguments.only), read_revisions(arguments.revision)
        settings = load_settings(arguments.config, arguments.overrides)
        root = arguments.to.expanduser().resolve()
        if root.exists() and not root.is_dir():
            raise ValueError(f"--to {root} is a file; name a folder")
        root.mkdir(parents=True, exist_ok=True)
        keep_cache_in(root)
        with locked(root / ".lock", f"--to {root}: another call fetches into this folder; wait for it"):
            fetch_all(settings, arguments.config, root, parts, revisions)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
