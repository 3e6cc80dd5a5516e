"""What was trained, in the forms that others load: PEFT's adapter, one whole model, sentence-transformers' folder.

adapter/                 the run's model/ folder as it is: adapter on its base model, marker rows, tokenizer
merged/                  adapters folded into the weights, marker rows into the table; transformers, load_embedder.
                         Of a reranker with its heads beside the weights; LightweightReranker
sentence-transformers/   the same with last-token pooling, L2 and one prompt a training set, by sentence-transformers
README.md                model card
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from tokenizers.processors import TemplateProcessing

from pipeline.data.tokenizing import load_tokenizer
from pipeline.inference.description import DESCRIPTION_FILE, RERANKER_FILE, read_description
from pipeline.inference.embedder import load_embedder
from pipeline.inference.gate import around_query
from pipeline.inference.reranker import LightweightReranker
from pipeline.inference.reranker_files import HEADS_FILE, read_reranker
from pipeline.inference.saving import write_json
from pipeline.model.encoder import MarkerEmbedding
from pipeline.prompts import Template


def write_merged(model: Path, folder: Path) -> None:
    """One whole model from a run's model/ folder, in the type that it was trained in."""
    embedder = load_embedder(model, show_progress=False)
    _save_merged(embedder.encoder.decoder, folder)
    embedder.tokenizer.tokenizer.save_pretrained(folder)
    tree = json.loads((model / DESCRIPTION_FILE).read_text(encoding="utf-8"))
    # Every marker is a row of the table now.
    tree["prompt_tokens"]["marker_subtokens"] = [[] for _ in tree["prompt_tokens"]["marker_subtokens"]]
    tree |= {"trained": "full", "num_layers": None, "base_fingerprint": ""}
    write_json(folder / DESCRIPTION_FILE, tree)
    shutil.copy(model / "examples.json", folder)


def write_merged_reranker(model: Path, folder: Path) -> None:
    """A reranker that needs no base model, from a run's model/ folder, in the type that it was trained in."""
    if read_reranker(model)[0].model.trained == "full":
        raise ValueError(f"{model} is merged already; export the run that it came from, or its adapter/")
    reranker = LightweightReranker(model, show_progress=False)
    _save_merged(reranker.model.decoder, folder)
    shutil.copy(model / HEADS_FILE, folder)
    reranker.tokenizer.tokenizer.save_pretrained(folder)
    tree = json.loads((model / RERANKER_FILE).read_text(encoding="utf-8"))
    write_json(folder / RERANKER_FILE, tree | {"trained": "full", "num_layers": None, "base_fingerprint": ""})


def _save_merged(decoder: Any, folder: Path) -> None:
    """Weights and configuration of a decoder, adapters folded in: a model of transformers like any other."""
    if isinstance(decoder, PeftModel):
        decoder = decoder.merge_and_unload()
    weights = {name: value for name, value in decoder.state_dict().items() if "embed_tokens" not in name}
    table = whole_table(decoder.get_input_embeddings())
    weights["embed_tokens.weight"] = table
    decoder.config.vocab_size = len(table)
    decoder.config._attn_implementation = None
    decoder.save_pretrained(folder, state_dict=weights, max_shard_size="5GB")


def whole_table(table: Any) -> torch.Tensor:
    """The table of input embeddings [V, D] with rows for the template's markers."""
    if not isinstance(table, MarkerEmbedding):
        return table.weight.detach()
    base: Any = table.base
    ids_M = table.marker_ids_M
    whole_VD = base.weight.new_zeros(max(len(base.weight), int(ids_M.max()) + 1), base.weight.shape[1])
    whole_VD[: len(base.weight)] = base.weight
    # Gemma multiplies what it looks up; marker rows are what comes out.
    scale = getattr(base, "embed_scale", torch.ones(()))
    whole_VD[ids_M] = (table.marker_rows.detach().float() / scale.float()).to(whole_VD.dtype)
    return whole_VD


def write_sentence_transformers(merged: Path, folder: Path, prompts: Mapping[str, str]) -> None:
    """The merged model for sentence-transformers: EOS is put behind every text by the tokenizer, as training does."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Normalize, Pooling, Transformer

    description = read_description(merged)
    work = folder.with_name(f".partial-{folder.name}")
    shutil.copytree(merged, work)
    pt = load_tokenizer(str(merged), description.template)
    tokenizer: Any = pt.tokenizer
    eos, bos = tokenizer.eos_token, tokenizer.bos_token if description.tokens.bos else None
    special = [(eos, tokenizer.eos_token_id), *([(bos, tokenizer.bos_token_id)] if bos else [])]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{f'{bos} ' if bos else ''}$A {eos}", special_tokens=special
    )
    # Where there is a chat template, sentence-transformers would put every text into it.
    tokenizer.chat_template = None
    (work / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(work)
    limits = description.limits
    longest = max(limits.max_prompt_tokens, limits.max_passage_tokens)
    transformer = Transformer(str(work), max_seq_length=longest)
    pooling = Pooling(transformer.get_embedding_dimension(), pooling_mode="lasttoken")
    model = SentenceTransformer(modules=[transformer, pooling, Normalize()], prompts=dict(prompts))
    model.save(str(folder))
    shutil.rmtree(work)


def prompts_of(
    template: Template,
    tasks: Mapping[str, str],
    examples: Mapping[str, Sequence[Mapping[str, str]]],
    shots: int,
) -> dict[str, str]:
    """`<task>` and `<task>, few-shot` -> what stands before a query; `shots` of its examples at most."""
    found = {}
    for name, instruction in tasks.items():
        shown = [(r["instruction"], r["query"], r["response"]) for r in examples.get(name, [])[:shots]]
        for label, ones in ((name, []), (f"{name}, few-shot", shown)):
            found[label], _ = around_query(template, instruction, ones)
    return found
