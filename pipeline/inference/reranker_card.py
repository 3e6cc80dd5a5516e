"""README.md of an exported reranker: what it is, how to use it, what a cheaper call saves, what it was trained on."""

import json
from collections.abc import Sequence
from pathlib import Path

import yaml

from pipeline.data.pairs import PairTokenizer, tokenize_pair_pieces
from pipeline.inference.card import gate_table, recipe_of
from pipeline.inference.gate import ADAPTER, MERGED, Check
from pipeline.inference.reranker_files import RerankerDescription, read_reranker
from pipeline.model.flop import pair_flop
from pipeline.model.reranker import LIGHT_RATIO, scale_exit
from pipeline.model.shapes import ModelShape, read_shape

QUERY_TOKENS = 20  # of the pair whose arithmetic is told; the passage fills the limit


def reranker_card(run: Path, folder: Path, checks: Sequence[Check]) -> str:
    """The card as Markdown."""
    description, _ = read_reranker(folder / ADAPTER)
    merged, tokenizer = read_reranker(folder / MERGED)
    shape, template = read_shape(merged.model, 0), description.template
    exits, layers = f"{description.first_exit} to {shape.layers}", description.compress_layers
    prompts = "\n".join(f"| `{relation}` | {prompt} |" for relation, prompt in template.prompts)
    return f"""# A lightweight reranker

Trained with bge-icl-train by the method of *Making Text Embedders Few-Shot Learners*, appendix D of its first version
([arXiv 2409.15700v1](https://arxiv.org/abs/2409.15700v1)): a causal decoder reads a query with a passage, and the logit
of "Yes" is their score. Base model: {Path(description.model.name).name}.

Any layer from {exits} can be the exit, and neighbouring passage tokens can be merged; both are chosen with every call.
Layers behind which merges were trained: {", ".join(map(str, layers)) or "none"}. Limit of a pair:
{description.max_pair_tokens} tokens; a longer one loses the end of its passage.

## Use

```python
from pipeline.inference.reranker import LightweightReranker

reranker = LightweightReranker("{MERGED}")  # or "{ADAPTER}", which needs the base model
pairs = [("Who painted the Mona Lisa?", "The Mona Lisa is a portrait by Leonardo da Vinci.")]
scores = reranker.score(pairs)  # float32 [1], higher is better
{_cheaper(description, tokenizer, shape)}```

What is read is `{template.query.format("{query}")!r}`, `{template.passage.format("{passage}")!r}` and a question,
end to end. The question goes by `score(pairs, relation=...)`:

| relation | question |
|---|---|
{prompts}
{_sets(run)}{_scores(run)}{recipe_of(run)}
## Licence

These weights come from those of the base model: its licence holds for them, and so may those of the training sets.

## Checked when it was exported

Fixed pairs in many scripts, with every question, at every exit: 1 - squared error / variance of the scores, compared
with the trained model's; of all exits the worst.

{gate_table(checks)}
"""


def _cheaper(description: RerankerDescription, tokenizer: PairTokenizer, shape: ModelShape) -> str:
    """A call of the paper's compressed setting, scaled to this depth, and the share of the arithmetic that it saves."""
    exit_layer = scale_exit(shape.layers, description.first_exit)
    options, merges = f"exit_layer={exit_layer}", description.compress_layers[:1]
    if merges:
        options += f", compress_layers=({merges[0]},), compress_ratio={LIGHT_RATIO}"
    prompt = len(tokenize_pair_pieces(tokenizer, [description.template.prompts[0][1]], "prompt")[0])
    query = min(QUERY_TOKENS, description.max_pair_tokens // 4)
    parts = query, description.max_pair_tokens - query - prompt, prompt
    saved = 1 - pair_flop(shape, parts, exit_layer, merges, LIGHT_RATIO) / pair_flop(shape, parts, shape.layers)
    share = f"{100 * saved:.1f} % less arithmetic for a pair of {parts[0]} + {parts[1]} + {parts[2]} tokens"
    return f"cheaper = reranker.score(pairs, {options})\n# {share} (query, passage, question)\n"


def _sets(run: Path) -> str:
    """The training sets and what is asked of their pairs; "" where the run's settings are not there."""
    settings = run / "settings.yaml"
    if not settings.is_file():
        return ""
    datasets = yaml.safe_load(settings.read_text(encoding="utf-8"))["data"]["datasets"]
    rows = "\n".join(f"| {d['name']} | {d.get('relation') or 'by task type'} |" for d in datasets)
    return f"\n## Training sets\n\n| set | relation |\n|---|---|\n{rows}\n"


def _scores(run: Path) -> str:
    """What the run's reranking.json holds: each ranking beside the retriever's own; "" where there is none."""
    path = run / "reranking.json"
    if not path.is_file():
        return ""
    rows = json.loads(path.read_text(encoding="utf-8"))
    names = ("task", "metric", "retriever", "setting")
    lines = "\n".join(f"| {' | '.join(row[name] for name in names)} | {row['value']:.4f} |" for row in rows)
    return f"\n## Scores\n\n| task | metric | first ranked by | then by | value |\n|---|---|---|---|---|\n{lines}\n"
