"""The proof of a store before it gets its name: pieces joined are the whole prompt tokenised, on a sample of rows."""

from dataclasses import dataclass, field

import numpy as np
from tokenizers import Tokenizer

from pipeline.data.pieces import plain_tokenizer
from pipeline.data.store import DatasetTable, TokenStore
from pipeline.data.tokenizing import PromptTokenizer
from pipeline.prompts import Template, render_passage

SAMPLE_ROWS = 200


@dataclass
class _Sample:
    texts: list[str] = field(default_factory=list)
    ids: list[list[int]] = field(default_factory=list)
    num_skipped: int = 0


def check_joined(pt: PromptTokenizer, store: TokenStore, num_rows: int = SAMPLE_ROWS) -> tuple[int, int]:
    """Compare stored pieces, joined, with the prompt as text tokenised by the tokenizer itself.

    Prompts: a query with one example (another row of the sample), a query alone, a passage. Pieces that were cut
    cannot be compared, nor can texts in which a special token stands spelled out.

    Returns:
        prompts compared, rows skipped.

    Raises:
        ValueError: they differ; the message shows the first difference.
    """
    whole = plain_tokenizer(pt.serialized)
    whole.encode_special_tokens = False
    specials = [token.content for token in whole.get_added_tokens_decoder().values() if token.special]
    adds_space = _adds_space(whole)
    num_compared = num_skipped = 0
    for table in store.datasets:
        sample = _collect(pt, store, table, num_rows, specials, adds_space)
        encoded = whole.encode_batch_fast(sample.texts, add_special_tokens=False)
        for text, ids, encoding in zip(sample.texts, sample.ids, encoded, strict=True):
            if ids != encoding.ids:
                raise ValueError(_explain(table.name, text, ids, encoding.ids, whole))
        num_compared += len(sample.texts)
        num_skipped += sample.num_skipped
    return num_compared, num_skipped


def _adds_space(tokenizer: Tokenizer) -> bool:
    """Whether a text's first word is tokenised as if a space stood before it (SentencePiece)."""
    alone, newline, inside = (tokenizer.encode(t, add_special_tokens=False).ids for t in ("x", "\n", "\nx"))
    return newline + alone != inside


def _collect(
    pt: PromptTokenizer, store: TokenStore, table: DatasetTable, num_rows: int, specials: list[str], adds_space: bool
) -> _Sample:
    """Prompts of evenly spaced rows as text and as joined ids."""
    sample, end = _Sample(), list(pt.tokens.query_end)
    positional = adds_space and not pt.template.markers
    head, examples = "", list[tuple[str, list[int]]]()
    for n in np.unique(np.linspace(0, table.num_rows - 1, num_rows).astype(np.int64)).tolist():
        instruction = store.instructions[table.instruction_N[n]]
        query = int(table.query_text_N[n])
        positive = int(table.pos_text[table.pos_offsets[n]])
        response = positive if table.task_type != "symmetric_clustering" else int(table.category_text_N[n])
        texts = [instruction, store.text(query), store.text(response), store.text(positive)]
        cut = _is_cut(store, query, "query") or _is_cut(store, response, "response")
        # Without an instruction the query stands first, where such a tokenizer puts a space before it.
        if cut or any(s in text for s in specials for text in texts) or (positional and not instruction):
            sample.num_skipped += 1
            continue
        head, head_ids = _head(pt.template, store, table, n, texts)
        if examples:
            shown, shown_ids = examples[-1]
            sample.texts.append(shown + (" " if positional else "") + head + pt.template.query_end)
            sample.ids.append(shown_ids + head_ids + end)
        sample.texts.append(head + pt.template.query_end)
        sample.ids.append(head_ids + end)
        examples.append(
            (head + pt.template.response.replace("{}", texts[2]), head_ids + store.piece(response, "response").tolist())
        )
        if table.task_type not in ("symmetric_sts", "symmetric_clustering") and not _is_cut(store, positive, "passage"):
            sample.texts.append(render_passage(pt.template, texts[3]))
            sample.ids.append(store.piece(positive, "passage").tolist())
    return sample


def _head(
    template: Template, store: TokenStore, table: DatasetTable, n: int, texts: list[str]
) -> tuple[str, list[int]]:
    """Instruction and query of row n as (text, ids)."""
    text = template.instruct.replace("{}", texts[0]) if texts[0] else ""
    ids = store.instruction_pieces[table.instruction_N[n]].tolist()
    query = store.piece(int(table.query_text_N[n]), "query").tolist()
    return text + template.query.replace("{}", texts[1]), ids + query


def _is_cut(store: TokenStore, text_id: int, kind: str) -> bool:
    return store.uncut_length(text_id, kind) > len(store.piece(text_id, kind))


def _explain(dataset: str, text: str, ids: list[int], wanted: list[int], tokenizer: Tokenizer) -> str:
    first = next((i for i, (a, b) in enumerate(zip(ids, wanted, strict=False)) if a != b), min(len(ids), len(wanted)))
    around = slice(max(0, first - 3), first + 4)
    return (
        f"dataset {dataset!r}: the pieces of a prompt are not the prompt tokenised; from token {first} on pieces give "
        f"{[tokenizer.id_to_token(i) for i in ids[around]]}, the whole gives "
        f"{[tokenizer.id_to_token(i) for i in wanted[around]]}, prompt {text[:200]!r}; "
        "this tokenizer cannot be used with this template: choose another preprocess.template"
    )
