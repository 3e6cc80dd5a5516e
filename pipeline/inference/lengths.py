"""How long a text is inside a prompt."""

from pipeline.data.tokenizing import tokenize_pieces
from pipeline.inference.embedder import FewShotEmbedder


def count_tokens(embedder: FewShotEmbedder, text: str, half: str) -> int:
    """Tokens of a text as one half of an example, with the template's literals around it and before any limit.

    Args:
        half: "query" or "response".
    """
    return len(tokenize_pieces(embedder.tokenizer, [text], half)[0])
