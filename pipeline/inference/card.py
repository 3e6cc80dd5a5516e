"""README.md of an exported model: what it is, what it was trained on, what it scores, how to use it."""

import json
from collections.abc import Sequence
from pathlib import Path

from pipeline.inference.description import read_description
from pipeline.inference.gate import ADAPTER, MERGED, SENTENCE_TRANSFORMERS, Check, around_query


def model_card(run: Path, folder: Path, checks: Sequence[Check]) -> str:
    """The card as Markdown."""
    description = read_description(folder / ADAPTER)
    _, prompt_end = around_query(description.template, "", ())
    limits = description.limits
    tasks = description.tasks
    first = next(iter(tasks), "")
    table = "\n".join(f"| `{name}` | {instruction} |" for name, instruction in tasks.items())
    base = Path(description.model.name).name if description.model.trained == "lora" else "(all weights were trained)"
    other = _sentence_transformers(prompt_end, first) if (folder / SENTENCE_TRANSFORMERS).is_dir() else ""
    return f"""# A few-shot text embedder

Trained with bge-icl-train by the method of *Making Text Embedders Few-Shot Learners*
([arXiv 2409.15700](https://arxiv.org/abs/2409.15700)). Base model: {base}; pooling: {description.model.pooling} token;
attention: {description.model.attention}; embeddings are L2-normalised.

Limits in tokens: query {limits.max_query_tokens}, passage {limits.max_passage_tokens}, prompt with examples
{limits.max_prompt_tokens}.

## Use

```python
from pipeline.inference.embedder import load_embedder

embedder = load_embedder("{MERGED}")  # or "{ADAPTER}", which needs the base model
task = "{tasks.get(first, "what the task asks for")}"
queries = embedder.encode_queries(["..."], task, examples=[("a query", "its answer")])
passages = embedder.encode_passages(["..."])
```

{other}## Training sets

| set | instruction |
|---|---|
{table}
{_scores(run)}{recipe_of(run)}
## Checked when it was exported

Lowest cosine to the trained model over fixed texts in many scripts, as queries, few-shot queries and passages.

{gate_table(checks)}
"""


def gate_table(checks: Sequence[Check]) -> str:
    """What the gate found, as a table."""
    lines = "\n".join(f"| {check.name} | {check.value:.6f} | {check.least:g} |" for check in checks)
    return f"| form | measured | at least |\n|---|---|---|\n{lines}"


def recipe_of(run: Path) -> str:
    """A section with the settings of a run; "" where it has none."""
    settings = run / "settings.yaml"
    return f"\n## Recipe\n\n```yaml\n{settings.read_text(encoding='utf-8')}```\n" if settings.is_file() else ""


def _sentence_transformers(prompt_end: str, first: str) -> str:
    """How to use that form; "" where no training set is named, and so no prompt of a query is in it."""
    if not first:
        return ""
    return f"""With sentence-transformers a query is its prompt, its text and `{prompt_end!r}`; the tokenizer adds EOS.
A passage stands alone.

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{SENTENCE_TRANSFORMERS}")
queries = model.encode([text + {prompt_end!r} for text in texts], prompt_name="{first}, few-shot")
passages = model.encode(passages)
```

"""


def _scores(run: Path) -> str:
    """A section with what a run's scores.json holds; "" where there is none."""
    path = run / "scores.json"
    if not path.is_file():
        return ""
    rows = json.loads(path.read_text(encoding="utf-8"))
    lines = "\n".join(f"| {r['model']} | {r['task']} | {r['mode']} | {r['metric']} | {r['value']:.4f} |" for r in rows)
    return f"\n## Scores\n\n| model | task | mode | metric | value |\n|---|---|---|---|---|\n{lines}\n"
