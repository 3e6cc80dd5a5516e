"""When two texts count as the same although their characters differ."""

import unicodedata


def normalize_text(text: str) -> str:
    """The text in NFKC, case-folded, with every run of white space as one space and none at its ends."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())
