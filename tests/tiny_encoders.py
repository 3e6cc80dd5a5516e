"""A sentence-transformers model and a cross-encoder of random weights, small enough for tests; and rows to mine."""

import json
import random
from pathlib import Path
from typing import Any

import torch
import yaml
from tiny_run import WORDS, make_tiny_run

Rows = list[dict[str, Any]]


def make_sentence_model(folder: Path) -> Path:
    """A random one-layer BERT with mean pooling, saved as sentence-transformers saves."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling, Transformer
    from transformers import BertModel

    bert = folder.with_name(folder.name + "-bert")
    BertModel(_config(bert)).save_pretrained(bert)
    transformer = Transformer(str(bert), max_seq_length=16)
    SentenceTransformer(modules=[transformer, Pooling(16)], device="cpu").save(str(folder))
    return folder


def make_cross_encoder(folder: Path, num_labels: int = 1) -> Path:
    """A random one-layer BERT that scores pairs."""
    from transformers import BertForSequenceClassification

    config = _config(folder)
    config.num_labels = num_labels
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def _config(folder: Path) -> Any:
    """Writes a tokenizer of whole words into `folder`; returns the model's config."""
    from transformers import BertConfig, BertTokenizerFast

    folder.mkdir(parents=True)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "?", *WORDS, *(str(i) for i in range(100))]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    return BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        initializer_range=0.6,
    )


def make_minable_run(folder: Path) -> Path:
    """A tiny run whose retrieval rows hold what mining must see; returns the recipe."""
    recipe = make_tiny_run(folder)
    tree = yaml.safe_load(recipe.read_text())
    tree["data"]["datasets"] = [d for d in tree["data"]["datasets"] if d["name"] != "only_1neg"]
    tree["data"]["datasets"].append({"name": "more normal", "path": "more.jsonl", "instruction": "Do it."})
    recipe.write_text(yaml.safe_dump(tree, sort_keys=False))
    (folder / "data/normal.jsonl").write_text("".join(json.dumps(row) + "\n" for row in retrieval_rows()))
    (folder / "data/more.jsonl").write_text("".join(json.dumps(row) + "\n" for row in retrieval_rows("more")))
    return recipe


def retrieval_rows(key: str = "normal") -> Rows:
    """Rows with repeated queries, shared positives, reverse pairs, copies in other case, and scores in some."""
    rng = random.Random(key)

    def text(low: int, high: int) -> str:
        return " ".join(rng.choice(WORDS) for _ in range(rng.randint(low, high)))

    passages = list(dict.fromkeys(text(4, 20) for _ in range(90)))
    passages += [p.upper() + "?" for p in passages[:20]]
    rows: Rows = []
    for i in range(70):
        query = f"{text(2, 6)} {i}" if i % 5 else f"{text(2, 6)} {i % 3}"
        row = {"query": query, "pos": rng.sample(passages, rng.choice((1, 1, 1, 2, 3))), "type": "normal"}
        row["neg"] = rng.sample([p for p in passages if p not in row["pos"]], rng.randint(0, 3))
        if i % 4 == 0:
            row |= {"pos_scores": [1.0] * len(row["pos"]), "neg_scores": [0.5] * len(row["neg"])}
        rows.append(row)
    for i in range(0, 20, 4):  # the same query with another positive and another instruction; a pair turned round
        rows.append({"query": rows[i]["query"], "pos": [rng.choice(passages)], "neg": [], "type": "normal"})
        rows.append({"query": rows[i + 1]["query"], "pos": [rng.choice(passages)], "neg": [], "prompt": "Other."})
        rows.append({"query": rows[i]["pos"][0], "pos": [rows[i]["query"]], "neg": [rng.choice(passages)]})
    return rows
