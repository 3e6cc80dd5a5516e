"""A model, data of all five task types and a recipe, small enough for whole training runs inside tests."""

import json
import random
from pathlib import Path

import torch
import yaml
from launching import REPOSITORY
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel, PreTrainedTokenizerFast

from pipeline.prompts import BGE_RERANKER

WORDS = ("river", "stone", "cloud", "amber", "violin", "engine", "market", "planet", "copper", "garden", "winter")
TYPES = ("normal", "only_1neg", "symmetric_sts", "symmetric_class", "symmetric_clustering")


def make_tiny_run(folder: Path) -> Path:
    """Writes model/, data/ and recipe.yaml into `folder`; returns the recipe's path."""
    rows = {task_type: _rows(task_type) for task_type in TYPES}
    texts = [text for group in rows.values() for row in group for text in (row["query"], *row["pos"], *row["neg"])]
    make_tiny_model(folder / "model", texts)
    (folder / "data").mkdir()
    for task_type, group in rows.items():
        lines = "".join(json.dumps(row) + "\n" for row in group)
        (folder / "data" / f"{task_type}.jsonl").write_text(lines)
    recipe = {
        "model": {"name": "./model", "dtype": "fp32", "lora": {"rank": 4, "alpha": 8}},
        "preprocess": {
            "max_query_tokens": 60,
            "max_passage_tokens": 60,
            "max_example_query_tokens": 40,
            "max_example_passage_tokens": 40,
            "max_prompt_tokens": 180,
            "bucket_edges": [80, 160],
        },
        "data": {
            "root": "data",
            "store": "store",
            "datasets": [{"name": t, "path": f"{t}.jsonl", "instruction": f"Do {t}."} for t in TYPES],
        },
        "batch": {"queries": 12, "symmetric_queries": 8, "group_size": 3, "examples": {"max_examples": 3}},
        "optim": {"lr": 1e-3},
        "run": {
            "output_dir": "run",
            "deepspeed": "zero3.json",
            "chunk_tokens": 4096,
            "seed": 3,
        },
    }
    for name in ("zero0", "zero1", "zero2", "zero3", "zero3_offload", "zero3_hpz"):
        sharding_config(folder, name)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


def make_tiny_reranker_run(folder: Path) -> Path:
    """The same for a reranker: a causal model of four layers, whose tokenizer has "Yes" as one token."""
    path = make_tiny_run(folder)
    recipe = yaml.safe_load(path.read_text())
    recipe["model"] |= {"kind": "reranker", "name": "./causal"}
    recipe["preprocess"]["max_pair_tokens"] = 56
    recipe["batch"] |= {"queries": 6, "symmetric_queries": 4, "group_size": 4, "examples": {"mode": "none"}}
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    lines = [line for file in (folder / "data").glob("*.jsonl") for line in file.read_text().splitlines()]
    texts = [json.loads(line)["pos"][0] for line in lines] + [prompt for _, prompt in BGE_RERANKER.prompts] * 20
    make_tiny_model(folder / "causal", [*texts, *["Yes"] * 50], LlamaForCausalLM, num_layers=4)
    return path


def sharding_config(folder: Path, name: str) -> Path:
    """One of the repository's configs; for stage 3 without the threshold below which weights stay whole.

    All weights of a tiny model lie below it: with the shipped config nothing would be partitioned in a test. hpZ keeps
    a second copy among the GPUs of a node: here among two ranks.
    """
    config = json.loads((REPOSITORY / "ds_configs" / f"{name}.json").read_text())
    if name.startswith("zero3"):
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    if "hpz" in name:
        config["zero_optimization"]["zero_hpz_partition_size"] = 2
    path = folder / f"{name}.json"
    path.write_text(json.dumps(config))
    return path


def make_tiny_model(folder: Path, texts: list[str], kind: type = LlamaModel, num_layers: int = 2) -> None:
    """A random Llama and a byte-level tokenizer trained on the texts."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=400, special_tokens=["<|end|>"], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<|end|>", pad_token="<|end|>")
    tokenizer.save_pretrained(str(folder))
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(tokenizer),
        initializer_range=0.1,
    )
    kind(config).save_pretrained(str(folder))


def _rows(task_type: str) -> list[dict]:
    """24 rows with unequal lengths; passages repeat across rows; retrieval rows partly carry teacher scores."""
    rng = random.Random(task_type)

    def text(low: int, high: int) -> str:
        return " ".join(rng.choice(WORDS) for _ in range(rng.randint(low, high)))

    passages = [text(3, 30) for _ in range(20)]
    rows = []
    for i in range(24):
        row = {"query": f"{text(2, 9)} {i}", "pos": [rng.choice(passages)], "type": task_type}
        others = [p for p in passages if p not in row["pos"]]
        row["neg"] = rng.sample(others, rng.randint(1, 4))
        if task_type == "normal" and i % 3:
            row["pos_scores"] = [rng.uniform(1, 3)]
            row["neg_scores"] = [rng.uniform(-2, 1) for _ in row["neg"]]
        if task_type == "symmetric_clustering":
            row["category"] = rng.choice(WORDS[:4])
        rows.append(row)
    return rows
