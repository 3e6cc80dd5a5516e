"""The data report: its numbers against a slow recount from raw files, and user text that must not become markup."""

import json
import math
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from tiny_run import make_tiny_run

from pipeline import report_data
from pipeline.data.normalizing import normalize_text
from pipeline.data.sampling import locate_step, make_schedule, plan_step
from pipeline.data.store import TokenStore, open_store
from pipeline.preprocess import main as preprocess
from pipeline.prompts import get_template, render_query
from pipeline.reporting import charts, overlap, plan_sections, plans, rows, texts
from pipeline.reporting.page import percent
from pipeline.reporting.plans import sample_plans, sample_prompts, sample_steps
from pipeline.settings import load_settings

EVIL = '<script>alert("x")</script> & </table></style> \u202eabc\x07'
# So low that each of them cuts or drops something.
LIMITS = {
    "max_query_tokens": 36,
    "max_passage_tokens": 32,
    "max_example_query_tokens": 32,
    "max_example_passage_tokens": 16,
    "max_prompt_tokens": 100,
}
NAMES = ("normal", "only_1neg", "symmetric_sts", "symmetric_class", "symmetric_clustering")


class Page(HTMLParser):
    """Tables by id as rows of cell texts, the text of the page, and its tags."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.tips: list[str] = []  # what bars and lines of charts say
        self.rows: list[list[str]] = []
        self.feed(html)
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append((tag, found))
        if tag == "table":
            self.rows = self.tables[found["id"] or ""] = []
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in ("meta", "rect", "line"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("rect", "line"):
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "script" in self.open or "style" in self.open:
            return
        self.text += data
        if self.open[-1:] == ["title"] and "svg" in self.open:
            self.tips.append(data)
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data

    def column(self, table: str, name: str) -> dict[str, str]:
        """Cell of a column by the first cell of its row."""
        head, *body = self.tables[table]
        return {row[0]: row[head.index(name)] for row in body}


def make_store(folder: Path) -> tuple[Path, TokenStore, dict[str, list[dict[str, Any]]]]:
    """A tiny store with an evil text, a bad row and a text of two datasets: (recipe, store, good raw rows by name)."""
    recipe = make_tiny_run(folder)
    raw = {}
    for name in NAMES:
        path = folder / "data" / f"{name}.jsonl"
        raw[name] = [json.loads(line) for line in path.read_text().splitlines()]
        if name in ("normal", "symmetric_class"):
            raw[name][0] |= {"query": f"{name} {EVIL}", "pos": [EVIL], "neg": [*raw[name][0]["neg"][:1], EVIL]}
            raw[name][0].pop("pos_scores", None)
            raw[name][0].pop("neg_scores", None)
        lines = [json.dumps(row) for row in raw[name]]
        if name == "only_1neg":
            lines.insert(3, '{"query": "<b>bold", "pos": []}')
        path.write_text("\n".join(lines) + "\n")
    tree = yaml.safe_load(recipe.read_text())
    tree["preprocess"] |= LIMITS | {"max_bad_row_share": 0.1}
    recipe.write_text(yaml.safe_dump(tree, sort_keys=False))
    assert preprocess(["--config", str(recipe), "--processes", "1"]) == 0
    return recipe, open_store(load_settings(recipe).data.store), raw


def part(share: float) -> str:
    return percent(share) if share else "·"


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TokenStore, dict[str, list[dict[str, Any]]], Page]:
    """Recipe, store, raw rows and the page, with two evaluation folders."""
    folder = tmp_path_factory.mktemp("report")
    recipe, store, raw = make_store(folder)
    beir, sts = folder / "beir <i>", folder / "sts"
    beir.mkdir()
    sts.mkdir()
    first, second = raw["normal"][1], raw["normal"][2]
    write_lines(
        beir / "queries.jsonl", [{"_id": "1", "text": f"  {first['query'].upper()} "}, {"_id": "2", "text": "x"}]
    )
    title, _, rest = second["pos"][0].partition(" ")
    passages = [("", EVIL.replace(" ", "\n")), (title, rest), ("Title", first["pos"][0]), ("", "nothing of training")]
    write_lines(beir / "corpus.jsonl", [{"_id": str(i), "title": t, "text": x} for i, (t, x) in enumerate(passages)])
    write_lines(sts / "test.jsonl", [{"sentence1": first["query"], "sentence2": second["pos"][0], "score": 1.0}])
    out = folder / "report.html"
    assert report_data.main(["--config", str(recipe), "--out", str(out), "--eval", str(beir), str(sts)]) == 0
    return recipe, store, raw, Page(out.read_text(encoding="utf-8"))


def test_nothing_is_loaded_and_user_text_is_text(made: Any) -> None:
    page = made[3]
    assert [tag for tag, _ in page.tags].count("script") == [tag for tag, _ in page.tags].count("style") == 1
    assert not {"link", "img", "iframe", "object", "b-b", "i"} & {tag for tag, _ in page.tags}
    for tag, attributes in page.tags:
        assert not {name for name in attributes if name == "src" or name.startswith("on")}, tag
        assert (attributes.get("href") or "#").startswith("#")
    # The evil text is there, to read.
    assert '<script>alert("x")</script> & </table></style> \u202eabc\u2407' in page.text
    assert "<b>bold" in page.text and "beir <i>" in page.text
    assert all("url(" not in (attributes.get("style") or "") for _, attributes in page.tags)


def test_rows_tokens_and_steps(made: Any) -> None:
    recipe, store, raw, page = made
    settings = load_settings(recipe)
    schedule = make_schedule(store, settings)
    visits = Counter(locate_step(schedule, step)[1] for step in range(schedule.steps_per_epoch))
    assert page.column("datasets-table", "rows") == {name: str(len(raw[name])) for name in NAMES}
    for d, name in enumerate(NAMES):
        assert page.column("datasets-table", "steps an epoch")[name] == str(visits[d])
        assert page.column("datasets-table", "share of steps")[name] == f"{visits[d] / schedule.steps_per_epoch:.1%}"
        assert page.column("datasets-table", "tokens")[name] == f"{store.manifest.datasets[d].counts['tokens']:,}"
        assert page.column("sources", "sha256")[name] == store.manifest.datasets[d].source["sha256"]
    assert page.column("reasons", "rows") == {"no positive (pos is missing or empty)": "1"}
    assert page.tables["bad-rows"][1][1] == "4"


def test_lengths_and_cuts(made: Any) -> None:
    """Histograms and cut texts against lengths measured one text at a time."""
    _, store, raw, page = made
    tokens, limits = store.manifest.tokens, store.manifest.limits
    around = len(tokens.bos) + len(tokens.eos)
    ids = {store.text(i): i for i in range(store.num_texts)}
    bars, num_cut = [], [0, 0, 0, 0]
    for d, name in enumerate(NAMES):
        instruct = len(store.manifest.instruction_ids[store.instructions.index(f"Do {name}.")])

        def query(text: str, instruct: int = instruct) -> int:
            return store.uncut_length(ids[text.strip()], "query") + instruct + around + len(tokens.query_end)

        def passage(text: str, name: str = name, query: Any = query) -> int:
            if name in ("symmetric_sts", "symmetric_clustering"):
                return query(text)
            return store.uncut_length(ids[text.strip()], "passage") + around

        queries = [r["query"] for r in raw[name]]
        passages = [t for r in raw[name] for t in (*r["pos"], *r["neg"])]
        responses = {r["category"] if name == "symmetric_clustering" else t for r in raw[name] for t in r["pos"]}
        cut = [
            [query(t) > limits["max_query_tokens"] for t in set(queries)],
            [passage(t) > limits["max_passage_tokens"] for t in {t.strip() for t in passages}],
            [query(t) - around - len(tokens.query_end) > limits["max_example_query_tokens"] for t in set(queries)],
            [store.uncut_length(ids[t.strip()], "response") > limits["max_example_passage_tokens"] for t in responses],
        ]
        num_cut = [n + sum(c) for n, c in zip(num_cut, cut, strict=True)]
        row = page.tables["cut"][1 + d]
        shown = [(row[1], row[3]), (row[4], row[6]), (row[7], row[8]), (row[9], row[11])]
        assert shown == [(str(sum(c)), percent(sum(c) / len(c))) for c in cut]
        assert [row[2], row[5], row[10]] == [str(len(c)) for c in (cut[0], cut[1], cut[3])]
        lengths = [
            [min(query(t), limits["max_query_tokens"]) for t in queries],
            [min(passage(t), limits["max_passage_tokens"]) for t in passages],
            store.datasets[d].length_N.tolist(),
        ]
        for values in lengths:
            for low, high in ((1, 16), (17, 32), (33, 64), (65, 128), (129, 256)):
                n = sum(low <= v <= high for v in values)
                bars += [f"{low} to {high} tokens: {n} ({n / len(values):.1%})"] if n else []
    assert [tip for tip in page.tips if " tokens: " in tip and " tokens: 0 " not in tip] == bars
    assert all(num_cut), "a limit that cuts nothing tests nothing"
    assert {"limit 36", "limit 32", "edge 80", "edge 160"} <= set(page.tips)


def test_texts_that_differ_in_form_only() -> None:
    assert normalize_text("  Stra\u00dfe\n\u2168\u00a0\ufb01n ") == normalize_text("STRASSE ix fin") == "strasse ix fin"
    assert normalize_text("a b") != normalize_text("ab")


def test_repeats_are_those_of_the_raw_rows(made: Any) -> None:
    _, _, raw, page = made
    head, *body = page.tables["repeats"]
    assert [(row[0], row[1]) for row in body] == [(n, s) for n in NAMES for s in ("positive", "negative")]
    most: list[tuple[str, str, int]] = []
    for row in body:
        uses = Counter(t.strip() for r in raw[row[0]] for t in r["pos" if row[1] == "positive" else "neg"])
        total = sum(uses.values())
        cells = dict(zip(head, row, strict=True))
        assert (cells["uses"], cells["distinct texts"]) == (str(total), str(len(uses)))
        assert cells["repeated"] == f"{1 - len(uses) / total:.1%}"
        for name, low, high in (("1×", 1, 1), ("2×", 2, 2), ("3–4×", 3, 4), ("5–8×", 5, 8), ("9–32×", 9, 32)):
            assert cells[name] == part(sum(n for n in uses.values() if low <= n <= high) / total)
        most += [(row[0], row[1], n) for _, n in uses.most_common(5) if n > 1]
    assert [(a, b, int(n)) for a, b, n, _ in page.tables["most-used"][1:]] == most


def test_shared_texts_are_those_of_the_raw_rows(made: Any) -> None:
    _, _, raw, page = made
    sides = {
        "queries": [{r["query"].strip() for r in raw[n]} for n in NAMES],
        "positives": [{t.strip() for r in raw[n] for t in r["pos"]} for n in NAMES],
    }
    assert len(sides["positives"][0] & sides["positives"][3]) >= 1
    for side, sets in sides.items():
        shown = [[int(cell.replace("·", "0")) for cell in row[1:]] for row in page.tables[f"shared-{side}"][1:]]
        assert shown == [[len(a & b) for b in sets] for a in sets]


def test_overlap_with_evaluation_sets(made: Any) -> None:
    _, _, raw, page = made

    def same(text: str) -> str:
        return " ".join(text.lower().split())

    evaluations = {
        "beir <i>": (
            {same(raw["normal"][1]["query"]), "x"},
            {same(t) for t in (EVIL, raw["normal"][2]["pos"][0], raw["normal"][1]["pos"][0])},
        ),
        "sts": ({same(raw["normal"][1]["query"]), same(raw["normal"][2]["pos"][0])}, set()),
    }
    expected = []
    for evaluation, (queries, corpus) in evaluations.items():
        for name in NAMES:
            own = {same(r["query"]) for r in raw[name]}
            positives = {same(t) for r in raw[name] for t in r["pos"]}
            found = [len(own & queries), len(own & corpus), len(positives & queries), len(positives & corpus)]
            if any(found):
                expected.append([evaluation, name, str(len(own)), *map(str, found[:2]), str(len(positives))])
                expected[-1] += map(str, found[2:])
    head, *body = page.tables["overlap-datasets"]
    kept = [i for i, title in enumerate(head) if title not in ("share", "for example")]
    assert [[row[i] for i in kept] for row in body] == expected
    assert page.column("overlap-totals", "its queries seen in training") == {"beir <i>": "50.0%", "sts": "100%"}
    assert page.column("overlap-totals", "its passage texts") == {"beir <i>": "6", "sts": "0"}


def test_groups_and_teacher_scores(made: Any) -> None:
    _, _, raw, page = made
    expected = []
    for name in NAMES:
        for side, key in (("positive", "pos"), ("negative", "neg")):
            sizes = sorted(len(r[key]) for r in raw[name])
            middle = sizes[(len(sizes) - 1) // 2]
            row = [name, side, str(sizes[0]), str(middle), f"{sum(sizes) / len(sizes):.2f}", str(sizes[-1])]
            expected.append([*row, *(part(sizes.count(n) / len(sizes)) for n in range(5))])
    assert [row[:11] for row in page.tables["groups"][1:]] == expected
    scored = [r for r in raw["normal"] if "pos_scores" in r]
    scores = [s for r in scored for s in (*r["pos_scores"], *r["neg_scores"])]
    entropies = []
    for r in scored:
        group = [r["pos_scores"][0], *r["neg_scores"]]
        total = sum(math.exp(s) for s in group)
        entropies.append(-sum(math.exp(s) / total * math.log(math.exp(s) / total) for s in group))
    uniform = sum(math.log(1 + len(r["neg_scores"])) for r in scored) / len(scored)
    mean = sum(entropies) / len(entropies)
    assert 0 < mean < 0.95 * uniform
    (row,) = page.tables["teacher"][1:]
    assert row == [
        "normal", "24", str(len(scored)), f"{len(scored) / 24:.1%}", f"{min(scores):.4g}", f"{max(scores):.4g}",
        f"{mean:.3f}", f"{uniform:.3f}", f"{1 - mean / uniform:.1%}",
    ]  # fmt: skip


def test_plans_are_counted(made: Any) -> None:
    """Savings and examples of the sampled plans, recounted one candidate and one query at a time."""
    recipe, store, _, page = made
    schedule = make_schedule(store, load_settings(recipe))
    steps = [
        [s for s in range(schedule.steps_per_epoch) if locate_step(schedule, s)[1] == d][:16] for d in range(len(NAMES))
    ]
    assert sample_steps(schedule) == steps
    dropped = 0
    for d, name in enumerate(NAMES):
        planned = [plan_step(store, schedule, step) for step in steps[d]]
        shown = sum(len(p.example_row_E) for p in planned)
        dropped += sum(p.num_examples_dropped for p in planned)
        distinct = [{(p.passage_text_P[c], p.passage_instruction_P[c]) for c in p.candidate_C} for p in planned]
        saved = [1 - len(passages) / len(p.candidate_C) for passages, p in zip(distinct, planned, strict=True)]
        assert page.column("saved", "encodings saved")[name] == percent(float(np.mean(saved)))
        assert page.column("fit", "shown")[name] == str(shown)
        assert page.column("fit", "dropped: prompt full")[name] == str(sum(p.num_examples_dropped for p in planned))
        assert page.column("fit", "missing: no row to show")[name] == str(sum(p.num_examples_missing for p in planned))
        # A prompt with room for everything shows what was found: what differs was dropped.
        sample = sample_plans(store, schedule, steps[d])
        assert sum(fit.k * fit.num_queries for fit in sample.fits) == shown + sample.num_dropped
        full = sum(fit.num_queries - fit.num_all_fit for fit in sample.fits)
        assert (full == 0) == (sample.num_dropped == 0) and full <= sample.num_dropped
    assert dropped > 0, "a limit that drops nothing tests nothing"


def test_prompts_are_those_of_the_plan(made: Any) -> None:
    recipe, store, _, _ = made
    settings = load_settings(recipe)
    schedule, template = make_schedule(store, settings), get_template(settings.preprocess.template)
    num_cut = 0
    for step in range(schedule.steps_per_epoch):
        for shown in sample_prompts(store, schedule, step):
            examples = [(e.instruction, e.query.text, e.response.text) for e in shown.examples]
            wanted = render_query(template, shown.instruction, shown.query.text, examples)
            html = plan_sections.prompt_html(template, shown)
            found = Page(html).text
            for cut in (t for e in shown.examples for t in (e.query, e.response)):
                num_cut += cut.is_cut
            badges = [t for e in shown.examples for t in (e.query, e.response)] + [shown.query]
            # What badges say adds up to the prompt that is encoded.
            assert sum(min(t.num_uncut, t.limit) for t in badges) == shown.num_tokens
            assert all(min(c.passage.num_uncut, c.passage.limit) == c.num_tokens for c in shown.candidates)
            for badge in badges:
                if badge.is_cut:
                    found = found.replace(f"cut: {badge.num_uncut} → {badge.limit} tokens", "", 1)
            assert found == wanted.replace("\x07", "\u2407")
    assert num_cut > 0


def test_sampling_counts_every_use_of_the_texts_it_keeps() -> None:
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 500, 5000)
    whole, part = texts.count_uses(ids, 1), texts.count_uses(ids, 7)
    assert whole.num_uses == 5000 and whole.num_texts == len(set(ids.tolist()))
    kept = whole.text_K % 7 == 0
    assert np.array_equal(part.text_K, whole.text_K[kept]) and np.array_equal(part.count_K, whole.count_K[kept])
    assert texts.count_uses(np.array([-1, 3, 3, -1]), 1).most_used(5) == [(3, 2)]


def test_large_stores_are_sampled_and_labelled(made: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    recipe, store, raw, _ = made
    monkeypatch.setattr(texts, "MAX_USES", 200)
    monkeypatch.setattr(overlap, "MAX_TEXTS", 10)
    monkeypatch.setattr(rows, "BLOCK", 5)
    monkeypatch.setattr(texts, "BLOCK", 7)
    monkeypatch.setattr(plans, "MAX_STEPS_SEARCHED", 2)
    write_lines(tmp_path / "queries.jsonl", [{"text": raw["normal"][1]["query"]}])
    out = tmp_path / "report.html"
    assert report_data.main(["--config", str(recipe), "--out", str(out), "--eval", str(tmp_path)]) == 0
    page = Page(out.read_text(encoding="utf-8"))
    stride = -(-sum(len(r["pos"]) + len(r["neg"]) + 1 for n in NAMES for r in raw[n]) // 200)
    assert stride > 1
    assert page.text.count(f"sampled: 1 text in {stride}, all its uses") == 2
    assert "sampled: 1 training text in " in page.text
    assert int(page.tables["repeats"][1][2]) < sum(len(r["pos"]) for r in raw["normal"])
    assert page.tables["groups"][2][4] == f"{sum(len(r['neg']) for r in raw['normal']) / 24:.2f}"
    assert sorted(map(int, page.column("saved", "plans sampled").values())) in ([0, 0, 0, 0, 2], [0, 0, 0, 1, 1])
    assert page.text.count(" steps trains it.") >= 3
    table = store.datasets[0]
    scores = rows.teacher_scores(table, max_rows=10)
    assert scores is not None and scores.num_rows == 10 and 0 < scores.num_scored <= 10


def test_places_on_the_axis() -> None:
    edges = (16, 32, 64)
    assert [charts.bin_place(v, edges) for v in (0, 8, 16, 32, 64)] == [0, 0.5, 1, 2, 3]
    assert charts.bin_place(45, edges) == pytest.approx(2 + math.log2(45 / 32))
    assert charts.bin_place(10_000, edges) == 4


def test_other_ways_to_show_examples(made: Any, tmp_path: Path) -> None:
    pages = {}
    for mode in ("none", "filler", "fixed"):
        out = tmp_path / f"{mode}.html"
        assert report_data.main(["--config", str(made[0]), "--out", str(out), f"batch.examples.mode={mode}"]) == 0
        pages[mode] = Page(out.read_text(encoding="utf-8"))
    assert "The recipe shows no examples in training." in pages["none"].text and "fit" not in pages["none"].tables
    assert "the examples stand as blank lines of the same length" in pages["filler"].text
    assert "k = 3" in pages["fixed"].text
    assert all("fit" in pages[mode].tables for mode in ("filler", "fixed"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "no/such/r.html"], "there is no folder no/such; create it first"),
        (["--out", "."], "--out . is a folder"),
        (["--out", "r.html", "--eval", "nowhere"], "--eval nowhere: no such folder"),
        (["--out", "r.html", "--eval", ".", "run.seed=1"], "put overrides before --eval"),
        (
            ["--out", "r.html", "--eval", "empty"],
            "--eval empty is not an evaluation folder: it holds none of queries.jsonl",
        ),
        (["--out", "r.html", "--eval", "broken"], "queries.jsonl:2 is not a line of JSON"),
        (["--out", "r.html", "preprocess.max_query_tokens=61"], "preprocess.max_query_tokens: store 36, recipe 61"),
    ],
)
def test_user_errors(
    made: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/queries.jsonl").write_text('{"text": "a"}\n{"text"\n')
    assert report_data.main(["--config", str(made[0]), *arguments]) == 2
    error = capsys.readouterr().err.splitlines()[-1 if "store" not in message else slice(None)]
    assert message in "\n".join([error] if isinstance(error, str) else error)
    assert not (tmp_path / "r.html").exists()


def test_the_same_store_gives_the_same_page(made: Any, tmp_path: Path) -> None:
    for name in ("a.html", "b.html"):
        assert report_data.main(["--config", str(made[0]), "--out", str(tmp_path / name)]) == 0
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()
