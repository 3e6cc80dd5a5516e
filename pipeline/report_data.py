"""Write what a token store holds, and what a recipe will make of it, into one HTML page.

The page needs no network and no other file: datasets and their share of the steps, lengths against limits, repeated
and shared texts, overlap with evaluation sets, how many in-context examples fit, groups and teacher scores, and whole
prompts to read. Large stores are sampled where a full count would be long, and the page says where. Needs the token
store, no model, no tokenizer and no GPU.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from pipeline.data.sampling import make_schedule
from pipeline.data.store import open_store, require_match
from pipeline.files import write_text
from pipeline.prompts import get_template
from pipeline.reporting.measuring import Report, measure
from pipeline.reporting.overview import dataset_section, intro, quarantine_section
from pipeline.reporting.page import page
from pipeline.reporting.plan_sections import example_section, group_section, prompt_section
from pipeline.reporting.text_sections import length_section, overlap_section, repeat_section, shared_section
from pipeline.settings import load_settings

EPILOG = """examples:
  python pipeline/report_data.py --config examples/quickstart/recipe.yaml --out report.html
  python pipeline/report_data.py --config recipe.yaml --out report.html --eval eval/xquad_en eval/sts15
  python pipeline/report_data.py --config recipe.yaml data.store=/data/store-256 --out report.html

an evaluation folder holds queries.jsonl {"_id", "text"} and corpus.jsonl {"_id", "title", "text"} (BEIR's form), or
test.jsonl with query, text, sentence, sentences, sentence1 or sentence2 (counted as queries), positive or negative (as
passages); train.jsonl, the labelled texts of a classification, is compared as a set of its own
"""


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; argparse itself exits with code 2 on a wrong one."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, metavar="RECIPE.yaml", help="the recipe that the store belongs to")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE.html", help="the page to write")
    parser.add_argument(
        "--eval",
        type=Path,
        nargs="+",
        action="extend",
        default=[],
        metavar="FOLDER",
        help="evaluation folders whose texts are looked for in the training data",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings on top of the recipe")
    return parser.parse_intermixed_args(argv)


def render(report: Report) -> str:
    """The page of a measured store."""
    sections = [
        dataset_section(report),
        length_section(report),
        repeat_section(report),
        shared_section(report),
        overlap_section(report),
        example_section(report),
        group_section(report),
        prompt_section(report),
        quarantine_section(report),
    ]
    return page(f"Data report: {report.store.path.parent.name}/{report.store.path.name}", intro(report), sections)


def run(arguments: argparse.Namespace) -> None:
    """Measure the store and write the page; user errors are ValueErrors."""
    out: Path = arguments.out
    if not out.parent.is_dir():
        raise ValueError(f"--out {out}: there is no folder {out.parent}; create it first")
    if out.is_dir():
        raise ValueError(f"--out {out} is a folder; name a file in it, {out / 'report.html'} say")
    if mixed := [str(folder) for folder in arguments.eval if "=" in folder.name and not folder.exists()]:
        raise ValueError(f"--eval {mixed[0]} looks like an override: put overrides before --eval")
    settings = load_settings(arguments.config, arguments.overrides)
    store = open_store(settings.data.store, verify=False)
    # Training compares the tokenizer too; a report needs none.
    require_match(store, settings, store.manifest.fingerprint)
    schedule = make_schedule(store, settings)
    start = time.monotonic()
    template = get_template(settings.preprocess.template)
    html = render(measure(store, schedule, template, arguments.eval, bars=True))
    write_text(out, html)
    print(f"wrote {out} ({len(html.encode()) / 1e6:.2f} MB) in {time.monotonic() - start:.1f} s")


def main(argv: Sequence[str] | None = None) -> int:
    """Write the report; returns 0, or 2 with one line for what the user can mend."""
    arguments = parse_arguments(argv)
    try:
        run(arguments)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
