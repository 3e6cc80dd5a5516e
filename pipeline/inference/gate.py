"""The gate of an export: fixed texts through every form of a model, compared with the trained one."""

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pipeline.data.composing import Limits
from pipeline.data.tokenizing import PromptTokenizer, load_tokenizer, tokenize_pieces
from pipeline.inference.description import read_description
from pipeline.inference.embedder import FewShotEmbedder, load_embedder
from pipeline.prompts import Template, render_passage, render_query

log = logging.getLogger(__name__)

ADAPTER, MERGED, SENTENCE_TRANSFORMERS = "adapter", "merged", "sentence-transformers"

# What the gate embeds: scripts, lengths, and characters that tokenizers trip over.
GATE_TEXTS = (
    "What is the capital of France?",
    "Wie heisst der hoechste Berg der Alpen, und wer hat ihn zuerst bestiegen?",
    "光合作用是植物利用光能把二氧化碳和水转化为有机物的过程。",
    "Фотосинтез происходит в хлоропластах.",
    "يتكون الماء من ذرتي هيدروجين وذرة أكسجين.",
    "नदी के किनारे एक छोटा सा गाँव था।",
    "def add(a, b):\n    return a + b  # tabs\tand spaces",
    "a",
    "An emoji 🙂, a ligature ﬁ, and a combining accent e\u0301.",
    "long " * 40,
)
INSTRUCTION = "Find the same."
EXAMPLES = (("a small dog", "There is a puppy."), ("两只猫", "Two cats."))
GATE_FILE = "gate.npy"  # in a run's model/ folder: what the engine made of these texts when training ended
LEAST = 0.9999  # cosine


@dataclasses.dataclass(frozen=True)
class GateInputs:
    """What is embedded, within the model's limits: another library would cut or drop otherwise."""

    instruction: str
    examples: tuple[tuple[str, str], ...]
    texts: tuple[str, ...]


def gate_inputs(pt: PromptTokenizer, limits: Limits) -> GateInputs:
    """The fixed texts, shortened where they are too long; no instruction, or fewer examples, where none fit."""

    def count(text: str, kind: str) -> int:
        return len(tokenize_pieces(pt, [text], kind)[0])

    tokens = pt.tokens
    as_query = limits.max_query_tokens - len(tokens.bos + tokens.query_end + tokens.eos)
    as_passage = limits.max_passage_tokens - len(tokens.bos + tokens.eos)
    instruction, instruct = INSTRUCTION, count(INSTRUCTION, "instruct")
    if 2 * instruct > min(as_query, limits.max_example_query_tokens):
        instruction, instruct = "", 0
    texts = list(GATE_TEXTS)
    for i, text in enumerate(texts):
        while len(texts[i]) > 1 and (
            count(texts[i], "query") + instruct > as_query or count(texts[i], "passage") > as_passage
        ):
            texts[i] = text[: len(texts[i]) * 3 // 4]
    examples, room = [], limits.max_prompt_tokens - limits.max_query_tokens
    for query, response in EXAMPLES:
        halves = instruct + count(query, "query"), count(response, "response")
        room -= sum(halves)
        if (
            room >= 0
            and halves[0] <= limits.max_example_query_tokens
            and halves[1] <= limits.max_example_passage_tokens
        ):
            examples.append((query, response))
    return GateInputs(instruction, tuple(examples), tuple(texts))


def gate_embeddings(embedder: FewShotEmbedder) -> np.ndarray:
    """Fixed texts as queries without and with examples, and as passages: float32 [3 x texts, D]."""
    inputs = gate_inputs(embedder.tokenizer, embedder.limits)
    parts = [
        embedder.encode_queries(inputs.texts, inputs.instruction),
        embedder.encode_queries(inputs.texts, inputs.instruction, inputs.examples),
        embedder.encode_passages(inputs.texts),
    ]
    return np.concatenate(parts)


def lowest_cosine(one_ND: np.ndarray, other_ND: np.ndarray) -> float:
    """Of the same text in two forms, the worst one."""
    return float((one_ND * other_ND).sum(1).min())


def adapter_norm(model: Path) -> float:
    """Norm of what LoRA adds (its B matrices, which start at zero)."""
    from safetensors.torch import load_file

    file = model / "adapter_model.safetensors"
    weights = load_file(file) if file.is_file() else {}
    return float(sum(value.float().norm() ** 2 for name, value in weights.items() if "lora_B" in name) ** 0.5)


@dataclasses.dataclass(frozen=True)
class Check:
    """One line of the gate."""

    name: str
    value: float
    least: float

    @property
    def holds(self) -> bool:
        return self.value >= self.least


def around_query(template: Template, instruction: str, examples: Sequence[tuple[str, str, str]]) -> tuple[str, str]:
    """What stands before a query's text, and behind it (EOS aside)."""
    before, _, behind = render_query(template, instruction, "\x00", examples).partition("\x00")
    return before, behind


def run_gate(model: Path, out: Path) -> list[Check]:
    """Compare what was exported with the run's model, form by form, on fixed texts."""
    truth_ND = gate_embeddings(load_embedder(model, show_progress=False))
    description = read_description(model)
    checks = []
    if description.model.trained == "lora":
        checks.append(Check("norm of the adapter's B matrices", adapter_norm(model), 1e-6))
    engine = model / GATE_FILE
    if not engine.is_file():
        log.warning("%s is missing: what was trained is compared as it was saved, not with the engine", engine)
    else:
        checks.append(Check("the engine at the end of training", lowest_cosine(truth_ND, np.load(engine)), LEAST))
    for name in (ADAPTER, MERGED):
        found_ND = gate_embeddings(load_embedder(out / name, show_progress=False))
        checks.append(Check(name, lowest_cosine(truth_ND, found_ND), LEAST))
    if (out / SENTENCE_TRANSFORMERS).is_dir():
        folder = out / SENTENCE_TRANSFORMERS
        found_ND = sentence_transformers_embeddings(folder, description.template, description.limits)
        checks.append(Check(SENTENCE_TRANSFORMERS, lowest_cosine(truth_ND, found_ND), LEAST))
    tokenizers = [load_tokenizer(str(out / name), description.template).fingerprint for name in (ADAPTER, MERGED)]
    checks.append(Check("tokenizer round trip", float(set(tokenizers) == {description.fingerprint}), 1.0))
    return checks


def sentence_transformers_embeddings(folder: Path, template: Template, limits: Limits) -> np.ndarray:
    """The gate's texts through sentence-transformers, by the prompts that a user of the folder would set."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu", local_files_only=True)
    inputs = gate_inputs(load_tokenizer(str(folder), template), limits)
    parts = []
    for shown in ([], [(inputs.instruction, *example) for example in inputs.examples]):
        start, end = around_query(template, inputs.instruction, shown)
        parts.append(model.encode([text + end for text in inputs.texts], prompt=start, show_progress_bar=False))
    passages = [render_passage(template, text) for text in inputs.texts]
    parts.append(model.encode(passages, show_progress_bar=False))
    return np.concatenate(parts)
