"""Which texts of a task carry instruction and examples: data, by type of task and by what the texts are.

`released` is how the released evaluation of bge-en-icl works (FlagEmbedding 1.4, evaluation/mteb/runner.py): every
text of a task that is not retrieval gets instruction and examples, a reranker's candidates too, and classification
takes embeddings that are not normalised. Published scores are made so.
`trained` gives each text the form that it has in training: candidates stand bare, and the second text of a pair has the
instruction without examples.
"""

SIDES = ("released", "trained")
EXAMPLES, INSTRUCTION, BARE = "examples", "instruction", "bare"

# What (the query or first text, the document or second text) carries.
_TABLE = {
    "released": {
        "retrieval": (EXAMPLES, BARE),
        "reranking": (EXAMPLES, EXAMPLES),
        "classification": (EXAMPLES, EXAMPLES),
        "clustering": (EXAMPLES, EXAMPLES),
        "sts": (EXAMPLES, EXAMPLES),
        "pair_classification": (EXAMPLES, EXAMPLES),
        "summarization": (EXAMPLES, EXAMPLES),
    },
    "trained": {
        "retrieval": (EXAMPLES, BARE),
        "reranking": (EXAMPLES, BARE),
        "classification": (EXAMPLES, EXAMPLES),
        "clustering": (EXAMPLES, EXAMPLES),
        "sts": (EXAMPLES, INSTRUCTION),
        "pair_classification": (EXAMPLES, INSTRUCTION),
        "summarization": (EXAMPLES, EXAMPLES),
    },
}
KINDS = tuple(_TABLE["released"])


def carried(sides: str, kind: str, is_document: bool) -> str:
    """What a text carries: EXAMPLES (with the instruction), INSTRUCTION or BARE."""
    return _TABLE[sides][kind][is_document]


def is_normalized(sides: str, kind: str) -> bool:
    """Whether the embeddings are unit vectors."""
    return not (sides == "released" and kind == "classification")
