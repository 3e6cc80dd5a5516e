"""The topic reranker of prove.py: what leaving early and merging save, and what a reranker trained here is worth.

The data folder holds train/ (squad_newwiki, medquad, duplicate_questions) and eval/ (cranfield, medquad_test, scitldr,
cqa_rerank, squad_newwiki_test). Training takes up to two hours of two cores; it goes on where it was, and a finished
reranker in runs/prove/work/reranker is used again.
"""

import json
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from proving import REPOSITORY, RUN, WORK, Row, call, free_port, row

if TYPE_CHECKING:
    from pipeline.inference.reduction import Reduction

HOME = WORK / "reranker"
BASE = RUN / "base_model"
QUICKSTART = REPOSITORY / "examples" / "quickstart"
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
# What is asked of the pairs of each set.
TRAIN_SETS = {"squad_newwiki": "q-p", "medquad": "q-p", "duplicate_questions": "q-q"}
EVAL_TASKS = {"cranfield": "q-p", "medquad_test": "q-p", "scitldr": "q-p", "cqa_rerank": "q-q"}
PARTS = (20, 480, 12)  # tokens of query, passage and prompt
LAYERS = 12  # of SmolLM2's 30: two hours of two cores then read twice as many queries
QUERIES, TOP = 100, 20  # a task's first queries, and BM25's candidates of each: what a CPU reads in minutes
SEEDS = (1, 2, 3)


def prove_reranker(data: Path, only: str = "") -> list[Row]:
    HOME.mkdir(parents=True, exist_ok=True)
    call([sys.executable, "examples/quickstart/prepare_model.py", "--out", str(BASE)])
    parts: dict[str, Callable[[], list[Row]]] = {
        "arithmetic": arithmetic,
        "training": lambda: training(data / "train"),
        "time": lambda: seconds(data / "eval"),
        "quality": lambda: quality(data / "eval"),
        "teaching": lambda: teaching(data / "eval"),
    }
    if only and only not in parts:
        raise SystemExit(f"error: --only {only} must be one of {', '.join(parts)}")
    return [r for name, part in parts.items() if only in ("", name) for r in part()]


def settings_of(depth: int) -> "dict[str, Reduction]":
    """The whole model, and the paper's setting at this depth, without what it merges and as it is."""
    from pipeline.inference.reduction import read_setting
    from pipeline.model.reranker import scale_layers

    first_exit, layers = scale_layers(depth)
    exits = range(first_exit, depth + 1)
    light = read_setting("light", exits, layers)
    texts = {"full": "full", "exit": f"exit={light.exit_layer}", "exit + merge": "light"}
    return {name: read_setting(text, exits, layers) for name, text in texts.items()}


def arithmetic() -> list[Row]:
    """FLOP by torch's counter and by the formula: Gemma 2 of 42 layers, made narrow, and SmolLM2 as it is."""
    from transformers import AutoConfig, Gemma2Config

    from pipeline.model.flop import pair_flop
    from pipeline.model.shapes import ModelShape

    narrow: dict[str, Any] = {"hidden_size": 224, "intermediate_size": 896, "head_dim": 64, "vocab_size": 1000}
    narrow |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    configs = [
        Gemma2Config(num_hidden_layers=42, **narrow),
        AutoConfig.from_pretrained(BASE),
    ]
    rows = []
    for config in configs:
        counted = count_flop(config)
        shares = {name: found / counted["full"][0] for name, (found, _) in counted.items()}
        rows.append(
            row(
                f"FLOP of a pair of {' + '.join(map(str, PARTS))} tokens by torch's counter against the formula: "
                f"{config.model_type}, {config.num_hidden_layers} layers of width {config.hidden_size}",
                "equal",
                "; ".join(
                    f"{name} {found:.4g} against {ours:.4g} ({shares[name]:.1%})"
                    for name, (found, ours) in counted.items()
                ),
                all(found == ours for found, ours in counted.values()),
            )
        )
    gemma = ModelShape("gemma2", 42, 3584, 16, 8, 256, 14336, 256000, 0, 0, True, False)
    flop = {name: pair_flop(gemma, (0, 511, 1), *setting) for name, setting in settings_of(42).items()}
    saved = 1 - flop["exit + merge"] / flop["full"]
    rows.append(
        row(
            "FLOP saved in Gemma-2-9b by exit 25 of 42 and ratio 2 behind layer 8, 512 tokens that are all passage",
            "60.7 % (0.3 for attention, which saves more)",
            f"{saved:.1%}",
            abs(saved - 0.607) <= 0.003,
        )
    )
    return rows


def count_flop(config: Any) -> dict[str, tuple[int, float]]:
    """Name of a setting -> (what torch counts, what the formula says) of one pair."""
    import numpy as np
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoModel

    from pipeline.model.attention import register_packed_attention
    from pipeline.model.flop import pair_flop
    from pipeline.model.reranker import Reranker, scale_layers
    from pipeline.model.shapes import shape_of

    depth, softcap = config.num_hidden_layers, getattr(config, "attn_logit_softcapping", None)
    kernel = register_packed_attention("sdpa", True, "cpu", "fp32", softcap)
    first_exit = scale_layers(depth)[0]
    heads_HD = torch.zeros(depth - first_exit + 1, config.hidden_size)
    reranker = Reranker(AutoModel.from_config(config, attn_implementation=kernel), heads_HD, first_exit)
    tokens, span = sum(PARTS), (PARTS[0], PARTS[0] + PARTS[1])
    found = {}
    for name, (exit_layer, layers, ratio) in settings_of(depth).items():
        route = reranker.plan(np.array([0, tokens], np.int32), np.array([span]), (exit_layer,), layers, ratio)
        # torch counts attention on a CPU where it is plain matrix products only.
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            reranker(torch.zeros(tokens, dtype=torch.int64), route)
        ours = pair_flop(shape_of(config, depth, 0), PARTS, exit_layer, layers, ratio, causal=False)
        found[name] = (counter.get_total_flops(), ours)
    return found


def write_recipe(train: Path, name: str) -> Path:
    """Recipe of the reranker over raw files, preprocessed: as many steps as two cores do in two hours."""
    recipe = {
        "model": {
            "kind": "reranker",
            "name": str(BASE),
            "num_layers": LAYERS,
            "dtype": "fp32",
            "lora": {"rank": 32, "alpha": 64},
        },
        "preprocess": {
            "max_pair_tokens": 224,
            "max_query_tokens": 256,
            "max_example_query_tokens": 64,
            "max_example_passage_tokens": 64,
            "max_prompt_tokens": 512,
        },
        "data": {
            "root": str(train.resolve()),
            "store": str(HOME / f"store_{name}"),
            "datasets": [
                {"name": dataset, "path": f"{dataset}.jsonl*", "merge_files": True, "relation": relation}
                for dataset, relation in TRAIN_SETS.items()
            ],
        },
        "batch": {"queries": 12, "symmetric_queries": 12, "group_size": 6, "examples": {"mode": "none"}},
        "loss": {"distillation_weight": 0.0},
        "optim": {"lr": 8.0e-4, "warmup_steps": 20, "max_steps": 600},
        "run": {
            "output_dir": str(HOME / "run"),
            "deepspeed": str(REPOSITORY / "ds_configs" / "zero1.json"),
            "chunk_tokens": 1024,
            "keep_graphs": 8,
            "save_every": 50,
        },
    }
    path = HOME / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    call([sys.executable, "pipeline/preprocess.py", "--config", str(path), "--processes", "2"])
    return path


def training(train: Path) -> list[Row]:
    """Negatives among BM25's first candidates, which are what it will rerank; then the training itself."""
    raw, mined = write_recipe(train, "raw"), HOME / "mined"
    options = ["--embedder", "bm25", "--window", "2-60", "--num-negatives", "5"]
    call([sys.executable, "pipeline/mine_negatives.py", "--config", str(raw), *options, "--out", str(mined)])
    recipe = write_recipe(mined, "mined")
    train_reranker(recipe)
    steps = [json.loads(line) for line in (HOME / "run" / "metrics.jsonl").read_text().splitlines()]
    minutes = sum(step["seconds"] for step in steps) / 60
    last = [step["loss"] for step in steps[-20:]]
    return [
        row(
            f"the reranker's training: SmolLM2-135M, {LAYERS} layers, {len(steps)} steps, "
            f"{sum(step['queries'] for step in steps)} queries with 5 of BM25's candidates, 2 ranks of one thread",
            "at most two hours of two cores",
            f"{minutes:.0f} minutes; loss {steps[0]['loss']:.2f} to {statistics.mean(last):.2f} (mean of the last 20)",
            minutes <= 120,
        )
    ]


def train_reranker(recipe: Path, *overrides: str) -> None:
    launcher = ["deepspeed", "--num_accelerators", "2", "--master_port", free_port()]
    call([*launcher, "pipeline/train_reranker.py", "--config", str(recipe), *overrides], ONE_THREAD)


def seconds(evaluation: Path) -> list[Row]:
    """Time saved against arithmetic saved, on pairs of abstracts; settings in turn, each the least of five rounds.

    Every layer of SmolLM2, trained for one step: the time does not go by the values of the weights.
    """
    from pipeline.evaluation.tasks import load_retrieval_task
    from pipeline.inference.reranker import LightweightReranker

    task = load_retrieval_task(evaluation / "cranfield")
    pairs = list(zip(list(task.queries.values())[:32], list(task.corpus.values())[:32], strict=True))
    whole = HOME / "run_whole"
    overrides = ["model.num_layers=null", "batch.queries=2", "optim.max_steps=1", f"run.output_dir={whole}"]
    train_reranker(HOME / "mined.yaml", *overrides)
    reranker = LightweightReranker(whole, show_progress=False)
    composed = reranker.compose(pairs)
    settings = {text: reranker.read_setting(text) for text in ("full", "light")}
    rounds: dict[str, list[float]] = {name: [] for name in settings}
    for _ in range(6):  # the first warms up
        for name, reduction in settings.items():
            started = time.perf_counter()
            reranker.score_composed(composed, reduction)
            rounds[name].append(time.perf_counter() - started)
    least = {name: min(found[1:]) for name, found in rounds.items()}
    flop = {name: reranker.count_flop(composed, reduction) for name, reduction in settings.items()}
    saved, fewer = (1 - of["light"] / of["full"] for of in (least, flop))
    (exit_layer, layers, ratio), tokens = settings["light"], sum(len(pair.ids) for pair in composed)
    return [
        row(
            f"time of scoring saved by exit {exit_layer} of {reranker.model.depth} and ratio {ratio} behind layer "
            f"{layers[0]}, SmolLM2-135M on CPU, {len(pairs)} pairs of {tokens / len(pairs):.0f} tokens",
            "at least 0.8 x the FLOP saved",
            f"{saved:.1%} of {least['full']:.2f} s, {fewer:.1%} of the FLOP ({saved / fewer:.2f} x)",
            saved >= 0.8 * fewer,
        )
    ]


def quality(evaluation: Path) -> list[Row]:
    """BM25's first candidates in the reranker's order, at its whole depth and less."""
    from pipeline.model.reranker import scale_exit

    out = HOME / "quality"
    shutil.rmtree(out, ignore_errors=True)
    last = scale_exit(LAYERS, 1)  # the one that light reads
    settings = [f"--setting={text}" for text in ("full", f"exit={last}", "light")]
    rows = []
    for task, relation in EVAL_TASKS.items():
        command = [sys.executable, "pipeline/evaluate_reranker.py", "--reranker", str(HOME / "run")]
        command += [
            "--retriever",
            "bm25",
            "--task",
            str(shorten(evaluation / task)),
            "--top",
            str(TOP),
            "--relation",
            relation,
        ]
        call([*command, "--out", str(out), *settings])
        found = [r for r in json.loads((out / "reranking.json").read_text()) if r["task"] == task]
        before, full, _, light = (100 * r["value"] for r in found)
        shown = [
            f"{r['setting']} {100 * r['value']:.1f} ({r['flop_per_query'] / 1e12:.2f} TFLOP a query, "
            f"{r['seconds']:.0f} s)"
            for r in found[1:]
        ]
        better = "better than BM25" if light > before else "not better than BM25"
        rows.append(
            row(
                f"{task}, {found[0]['metric']}, {found[0]['queries']} queries, BM25's first {TOP} candidates",
                "compressed within 1.5 points of full",
                f"BM25 {before:.1f}; {'; '.join(shown)}; compressed: {light - full:+.1f} to full, {better}",
                light >= full - 1.5,
            )
        )
    return rows


def shorten(task: Path) -> Path:
    """The task with its first queries alone."""
    folder = HOME / "tasks" / task.name
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(task, folder)
    for file in folder.rglob("*"):
        file.chmod(0o755 if file.is_dir() else 0o644)
    if (folder / "queries.jsonl").is_file():
        lines = (folder / "queries.jsonl").read_text(encoding="utf-8").splitlines()[:QUERIES]
        (folder / "queries.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        kept = {json.loads(line)["_id"] for line in lines}
        judged = (folder / "qrels" / "test.tsv").read_text(encoding="utf-8").splitlines()
        judged = [judged[0], *(line for line in judged[1:] if line.split("\t")[0] in kept)]
        (folder / "qrels" / "test.tsv").write_text("\n".join(judged) + "\n", encoding="utf-8")
    return folder


def teaching(evaluation: Path) -> list[Row]:
    """The quickstart's embedder with this reranker's scores of its squad_newwiki rows, and without; three seeds."""
    scored = HOME / "scored"
    teacher = ["--teacher", str(HOME / "run"), "--teacher-setting", "light"]
    recipe, set_name = QUICKSTART / "recipe.yaml", "squad_newwiki"
    call([sys.executable, "pipeline/preprocess.py", "--config", str(recipe), "--processes", "2"])
    command = [sys.executable, "pipeline/score_rows.py", "--config", str(recipe), *teacher, "--dataset", set_name]
    call([*command, "--out", str(scored)])
    call([sys.executable, "pipeline/preprocess.py", "--config", str(scored / "recipe.yaml"), "--processes", "2"])
    tasks = [QUICKSTART / "eval" / "xquad_en", shorten(evaluation / "squad_newwiki_test")]
    found: dict[tuple[str, str, int], float] = {}
    for seed in SEEDS:
        for name, weight in (("without", 0.0), ("with", 1.0)):
            run = HOME / f"embedder_{name}_{seed}"
            launcher = ["deepspeed", "--num_accelerators", "2", "--master_port", free_port(), "pipeline/train.py"]
            overrides = [f"loss.distillation_weight={weight}", f"run.seed={seed}", f"run.output_dir={run}"]
            call([*launcher, "--config", str(scored / "recipe.yaml"), *overrides], ONE_THREAD)
            named = [word for task in tasks for word in ("--task", str(task))]
            call([sys.executable, "pipeline/evaluate_embedder.py", "--run", str(run), *named, "--modes", "zero_shot"])
            for score in json.loads((run / "scores.json").read_text()):
                found[name, score["task"], seed] = 100 * score["value"]
    rows = []
    for task in (path.name for path in tasks):
        values = {name: [found[name, task, seed] for seed in SEEDS] for name in ("without", "with")}
        mean = {name: statistics.mean(of) for name, of in values.items()}
        gain, spread = mean["with"] - mean["without"], max(map(statistics.stdev, values.values()))
        verdict = (
            "within the spread of seeds" if abs(gain) <= spread else "the scores help" if gain > 0 else "they harm"
        )
        shown = "; ".join(
            f"{name} {mean[name]:.2f} ({', '.join(f'{v:.2f}' for v in of)})" for name, of in values.items()
        )
        rows.append(
            row(
                f"the quickstart's embedder on {task}, zero-shot, with this teacher's scores of {set_name} and "
                f"without, seeds {', '.join(map(str, SEEDS))}",
                "said either way",
                f"{shown}: {gain:+.2f}, {verdict}",
                True,
            )
        )
    return rows
