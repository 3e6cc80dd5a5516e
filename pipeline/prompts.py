"""Prompt templates: the only place that holds template text (section 3.1 and equations 1-2 of arXiv 2409.15700).

A prompt is a row of pieces, each a literal around one text:

    query    [instruct][query][query_end]                                   then EOS
    few-shot [instruct][query][response] ... [instruct][query][query_end]   then EOS
    passage  [passage]                                                      then EOS
    pair     [query][passage][prompt]                                       and nothing: a reranker reads what is next

Pieces are tokenised one by one and concatenated as token ids, never as text. That equals tokenising the whole prompt
only where no token crosses the edge of two pieces, so each piece ends with the separator that follows it: tokenizers
of the Qwen and Llama 3 families merge a full stop with the newline after it.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Template:
    """Literals of a prompt. `{}` marks the text; `markers` are added to the tokenizer as special tokens if absent."""

    name: str
    markers: tuple[str, ...]
    instruct: str
    query: str
    query_end: str
    response: str
    passage: str = "{}"

    @property
    def version(self) -> str:
        """Changes with every character of the template: stores and models made with another one are refused."""
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()
        return f"{self.name}-{digest[:12]}"


TEMPLATES = {
    "bge_en_icl": Template(
        name="bge_en_icl",
        markers=("<instruct>", "<query>", "<response>"),
        instruct="<instruct>{}\n",
        query="<query>{}\n",
        query_end="<response>",
        response="<response>{}\n\n",
    ),
    # No new tokens: what users of E5-Mistral and Qwen3-Embedding continue from.
    "instruct_query": Template(
        name="instruct_query",
        markers=(),
        instruct="Instruct: {}\n",
        query="Query: {}\n",
        query_end="Response:",
        response="Response: {}\n\n",
    ),
    # Ablation of the paper (table 6): the passage carries a prompt of its own.
    "bge_en_icl_passage_prompt": Template(
        name="bge_en_icl_passage_prompt",
        markers=("<instruct>", "<query>", "<response>"),
        instruct="<instruct>{}\n",
        query="<query>{}\n",
        query_end="<response>",
        response="<response>{}\n\n",
        passage="{}\nSummarize the above passage:",
    ),
}


@dataclass(frozen=True)
class PairTemplate:
    """Literals of a pair that a reranker scores. `{}` marks the text; `prompts`: relation asked for -> the question."""

    name: str
    query: str
    passage: str
    prompts: tuple[tuple[str, str], ...]

    @property
    def version(self) -> str:
        """Changes with every character, as a `Template`'s."""
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()
        return f"{self.name}-{digest[:12]}"

    def prompt(self, relation: str) -> str:
        """The question of a relation; ValueError with the known ones otherwise."""
        prompts = dict(self.prompts)
        if relation not in prompts:
            raise ValueError(f"relation={relation!r} is unknown; known relations: {', '.join(prompts)}")
        return prompts[relation]


# The paper's (arXiv 2409.15700v1, appendix D), which knows a relation by what A and B are: q a query, p a passage.
BGE_RERANKER = PairTemplate(
    name="bge_reranker",
    query="A: {}\n",
    passage="B: {}\n",
    prompts=(
        ("q-p", "Predict whether passage B contains an answer to query A."),
        ("q-q", "Predict whether queries A and B are asking the same thing."),
        ("p-p", "Predict whether passages A and B have the same meaning."),
        ("arguana", "Predict whether argument A and counterargument B express contradictory opinions."),
    ),
)


def get_template(name: str) -> Template:
    """Look up a template by name; ValueError with the known names otherwise."""
    if name not in TEMPLATES:
        raise ValueError(f"preprocess.template={name!r} is unknown; known templates: {', '.join(sorted(TEMPLATES))}")
    return TEMPLATES[name]


def render_query(
    template: Template, instruction: str, query: str, examples: Sequence[tuple[str, str, str]] = ()
) -> str:
    """The whole prompt of a query as text (no BOS or EOS); examples are (instruction, query, response).

    Training and inference never tokenise this text: it is what people read, and the truth for tests of the ids.
    """
    parts = []
    for example_instruction, example_query, example_response in examples:
        parts += _head(template, example_instruction, example_query)
        parts.append(template.response.replace("{}", example_response))
    parts += _head(template, instruction, query)
    return "".join(parts) + template.query_end


def render_passage(template: Template, passage: str) -> str:
    """A passage as text (no BOS or EOS)."""
    return template.passage.replace("{}", passage)


def render_pair(template: PairTemplate, query: str, passage: str, prompt: str) -> str:
    """A pair as text (no BOS): what people read, and the truth for tests of the ids."""
    return template.query.replace("{}", query) + template.passage.replace("{}", passage) + prompt


def _head(template: Template, instruction: str, query: str) -> list[str]:
    """An empty instruction leaves its piece out; it is never rendered as an empty line or as "None"."""
    head = [template.instruct.replace("{}", instruction)] if instruction else []
    return [*head, template.query.replace("{}", query)]
