"""Token ids of prompt pieces with the `tokenizers` library alone: what the preprocessing processes run.

A piece is a text with the literal of the template around it. Tokenizers look beyond the edges of a piece (a regular
expression looks ahead over white space, SentencePiece puts a space before the first word), so where no special token
separates two pieces, a piece is tokenised together with the fixed text left and right of it, and the ids of that
fixed text are taken off again. So pieces joined are the ids of the whole prompt.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer

from pipeline.prompts import PairTemplate, Template

KINDS = ("query", "response", "passage")  # kinds of the store, in the order of their bits: 1, 2, 4
PROBES = ("x", "Is it so?", "a b", 'He said: "no".', "word 12", "(end)", "日本語。", "x -- y!!")
_MAX_CACHED_EDGES = 1 << 18


@dataclass(frozen=True)
class PieceRule:
    """How one kind of piece is tokenised: head_ids + ids(left + prefix + text + suffix + right) without the context."""

    head_ids: tuple[int, ...]  # a marker: a hard boundary on the left
    prefix: str
    suffix: str
    left: str = ""  # context, taken off again
    right: str = ""
    left_ids: tuple[int, ...] = ()
    right_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class PieceEncoder:
    """A tokenizer that reads special tokens in a text as plain text, and the rules of a template's pieces."""

    tokenizer: Tokenizer
    # "instruct", "query", "response", "passage"; "query_end" around no text. Of a pair: "query", "passage", "prompt".
    rules: dict[str, PieceRule]
    space: str | None  # what stands before a word that is tokenised alone as if inside a text; None: impossible


def plain_tokenizer(serialized: str) -> Tokenizer:
    """A copy of a serialised tokenizer that never reads a special token in a text and adds none."""
    tokenizer = Tokenizer.from_str(serialized)
    tokenizer.post_processor = None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def make_encoder(serialized: str, template: Template) -> PieceEncoder:
    """Find out how this tokenizer must be used for this template.

    Args:
        serialized: the fast tokenizer as JSON, the template's markers added as special tokens.

    Raises:
        ValueError: the tokenizer gives other ids after a marker than any context can reproduce.
    """
    plain = plain_tokenizer(serialized)
    parsing = plain_tokenizer(serialized)
    parsing.encode_special_tokens = False
    instruct, query = template.instruct, template.query
    rules = {
        "instruct": _make_rule(plain, parsing, template, instruct, False, query),
        "query": _make_rule(plain, parsing, template, query, True, template.response),
        "response": _make_rule(plain, parsing, template, template.response, True, instruct),
        "passage": _make_rule(plain, parsing, template, template.passage, False, ""),
        "query_end": _make_rule(plain, parsing, template, template.query_end + "{}", True, ""),
    }
    return PieceEncoder(plain, rules, _find_space(plain))


def make_pair_encoder(serialized: str, template: PairTemplate) -> PieceEncoder:
    """The rules of a pair's pieces; its prompt is a text like the others.

    The passage's rule looks ahead to the first prompt: to a tokenizer one beginning of a sentence is like another.
    """
    plain = plain_tokenizer(serialized)
    pieces = {
        "query": (template.query, "", template.passage.partition("{}")[0].rstrip()),
        "passage": (template.passage, "\n", template.prompts[0][1]),
        "prompt": ("{}", "\n", ""),
    }
    rules = {}
    for kind, (literal, left, right) in pieces.items():
        before, _, suffix = literal.partition("{}")
        rules[kind] = _learn_context(plain, PieceRule((), before, suffix, left, right))
    return PieceEncoder(plain, rules, None)


def _make_rule(
    plain: Tokenizer, parsing: Tokenizer, template: Template, literal: str, follows: bool, following: str
) -> PieceRule:
    """Rule of one literal; `follows`: it never stands first; `following`: the literal after it, "" before EOS."""
    before, _, suffix = literal.partition("{}")
    marker = next((m for m in template.markers if before.startswith(m)), "")
    right = following.partition("{}")[0].rstrip()
    if any(right.startswith(m) for m in template.markers):
        right = ""
    if not marker:
        return _learn_context(plain, PieceRule((), before, suffix, "\n" if follows else "", right))
    marker_id = plain.token_to_id(marker)
    assert marker_id is not None
    head = (marker_id,)
    for left in ("", "\n"):
        rule = _learn_context(plain, PieceRule(head, before[len(marker) :], suffix, left, right))
        pieces, num_failed = encode_pieces(plain, rule, PROBES)
        wanted = [parsing.encode(literal.replace("{}", probe) + right, add_special_tokens=False) for probe in PROBES]
        cut = len(rule.right_ids)
        if not num_failed and pieces == [e.ids[: len(e.ids) - cut] for e in wanted]:
            return rule
    raise ValueError(
        f"this tokenizer does not split text after the marker {marker!r} in a reproducible way; "
        "use preprocess.template=instruct_query, which needs no markers"
    )


def _learn_context(plain: Tokenizer, rule: PieceRule) -> PieceRule:
    """The rule with the ids of its context, found by the character offsets of a probe."""
    whole = rule.left + rule.prefix + "x" + rule.suffix + rule.right
    encoding, end = plain.encode(whole, add_special_tokens=False), len(whole) - len(rule.right)
    left = [i for i, (_, stop) in zip(encoding.ids, encoding.offsets, strict=True) if stop <= len(rule.left)]
    right = [i for i, (start, _) in zip(encoding.ids, encoding.offsets, strict=True) if rule.right and start >= end]
    return PieceRule(
        rule.head_ids, rule.prefix, rule.suffix, rule.left, rule.right, tuple(left if rule.left else ()), tuple(right)
    )


def suffix_ids(encoder: PieceEncoder, kind: str) -> tuple[int, ...]:
    """Ids of the separator that ends a piece of this kind after plain text."""
    rule = encoder.rules[kind]
    piece = _encode(encoder.tokenizer, [rule.left + rule.prefix + "x" + rule.suffix + rule.right])[0]
    end = len(piece) - len(rule.right_ids)
    bare = encoder.tokenizer.encode(rule.left + rule.prefix + "x", add_special_tokens=False)
    assert piece[: len(bare.ids)] == bare.ids, "a letter and the separator after it are separate tokens"
    return tuple(piece[len(bare.ids) : end])


def encode_pieces(tokenizer: Tokenizer, rule: PieceRule, texts: Sequence[str]) -> tuple[list[list[int]], int]:
    """Ids of the pieces (uncut), and for how many texts the context could not be told from the text.

    Such a text is tokenised without context: its ids may differ from those of the whole prompt at the edges.
    """
    before, after = rule.left + rule.prefix, rule.suffix + rule.right
    encoded = _encode(tokenizer, [before + text + after for text in texts] if before or after else texts)
    head, left, right = list(rule.head_ids), list(rule.left_ids), list(rule.right_ids)
    if not left and not right:
        return ([head + ids for ids in encoded] if head else encoded), 0
    num_failed = 0
    for i, ids in enumerate(encoded):
        stop = len(ids) - len(right)
        if ids[: len(left)] == left and ids[stop:] == right and stop >= len(left):
            encoded[i] = head + ids[len(left) : stop]
        else:
            num_failed += 1
            encoded[i] = head + _encode(tokenizer, [rule.prefix + texts[i] + rule.suffix])[0]
    return encoded, num_failed


def _encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    return [encoding.ids for encoding in tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]


# A text that is used in two ways is tokenised once: the pieces differ in their first and last word only.

EdgeCache = dict[tuple[str, str, str, str], tuple[list[int], list[int]]]


def _find_space(plain: Tokenizer) -> str | None:
    """How to tokenise " word" as inside a text: with its space, or without if the tokenizer adds one by itself."""
    probes = ("one two three", "a (b) c", "x 1 2.")
    for space in (" ", ""):
        for probe in probes:
            head, _, last = probe.rpartition(" ")
            parts = _encode(plain, [head, space + last, probe])
            if parts[0] + parts[1] != parts[2]:
                break
        else:
            return space
    return None


def derive_pieces(
    encoder: PieceEncoder, base: str, kind: str, texts: Sequence[str], base_ids: Sequence[list[int]], cache: EdgeCache
) -> tuple[list[list[int]], int]:
    """Pieces of kind `kind` from the pieces of kind `base` of the same texts: equal to tokenising them.

    Only the last word is tokenised again, and the first one if what stands before it differs. That is right because a
    space between two visible characters begins a token whatever stands around; it is checked for every text that the
    base piece has tokens ending there, and texts that fail the check or have no such space are tokenised in full.

    Args:
        cache: word edges already tokenised, added to.

    Returns:
        pieces and the number of texts tokenised without context, as `encode_pieces`.
    """
    from_rule, to_rule = encoder.rules[base], encoder.rules[kind]
    same_head = (from_rule.left, from_rule.prefix) == (to_rule.left, to_rule.prefix)
    edges = [_split_edges(text, same_head) if encoder.space is not None else None for text in texts]
    if len(cache) > _MAX_CACHED_EDGES:
        cache.clear()
    _fill_cache(encoder, base, kind, "tail", {edge[1] for edge in edges if edge}, cache)
    if not same_head:
        _fill_cache(encoder, base, kind, "head", {edge[0] for edge in edges if edge}, cache)
    fixed = (list(from_rule.head_ids), list(to_rule.head_ids))
    pieces: list[list[int]] = []
    missing = []
    for i, (edge, ids) in enumerate(zip(edges, base_ids, strict=True)):
        piece: list[int] = []
        if edge:
            from_head, to_head = fixed if same_head else cache[base, kind, "head", edge[0]]
            from_tail, to_tail = cache[base, kind, "tail", edge[1]]
            start, stop = len(from_head), len(ids) - len(from_tail)
            if start <= stop and ids[:start] == from_head and ids[stop:] == from_tail:
                piece = to_head + ids[start:stop] + to_tail
        if not piece:
            missing.append(i)
        pieces.append(piece)
    direct, num_failed = encode_pieces(encoder.tokenizer, to_rule, [texts[i] for i in missing])
    for i, piece in zip(missing, direct, strict=True):
        pieces[i] = piece
    return pieces, num_failed


def _split_edges(text: str, same_head: bool) -> tuple[str, str] | None:
    """(first word, last word) where a single space separates each from the rest; None where none does."""
    last = text.rfind(" ")
    if last < 1 or text[last - 1].isspace() or last + 1 == len(text):
        return None
    if same_head:
        return "", text[last + 1 :]
    first = text.find(" ")
    if first < 1 or text[first - 1].isspace() or text[first + 1].isspace():
        return None
    return text[:first], text[last + 1 :]


def _fill_cache(encoder: PieceEncoder, base: str, kind: str, edge: str, words: Iterable[str], cache: EdgeCache) -> None:
    new = [word for word in words if (base, kind, edge, word) not in cache]
    if not new:
        return
    both = []
    for rule in (encoder.rules[base], encoder.rules[kind]):
        if edge == "head":
            open_rule = PieceRule(rule.head_ids, rule.prefix, "", rule.left, "", rule.left_ids, ())
        else:
            open_rule = PieceRule((), encoder.space or "", rule.suffix, "", rule.right, (), rule.right_ids)
        both.append(encode_pieces(encoder.tokenizer, open_rule, new)[0])
    for word, from_ids, to_ids in zip(new, *both, strict=True):
        cache[base, kind, edge, word] = (from_ids, to_ids)
