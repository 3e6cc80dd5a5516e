"""The named types that pass between the rooms of the pipeline, and the legend of array and tensor suffixes.

Suffixes of arrays and tensors, everywhere in this repository:
    T  packed tokens of one chunk          S  sequences (queries and distinct passages) of one step
    B  rows (queries) of the global batch  P  distinct passages of the global batch
    C  candidates of all rows together (ragged: `group_offsets` cuts them)
    E  in-context examples of all rows together (ragged: `example_offsets` cuts them)
    D  width of an embedding               M  marker tokens of the template        W  ranks (world size)
So `embeddings_SD` has one row a sequence, `last_token_S` one index a sequence.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np


@dataclass(frozen=True)
class TaskRule:
    """How a task type is trained."""

    symmetric: bool  # batch.symmetric_queries, not batch.queries
    group_size: int | None  # positive + negatives where the type sets it; None: batch.group_size
    in_batch_negatives: bool  # the paper's rule: retrieval only
    wrap_passages: bool  # passages take the form of a query with the row's instruction, without examples
    # Rows with the query's own positive would show the answer where it competes with the batch. With a few labels the
    # exclusion would teach "a label shown is never mine", the opposite of what inference shows.
    exclude_same_positive: bool
    response: Literal["positive", "category"]  # of a row shown as example


RULES: dict[str, TaskRule] = {
    "normal": TaskRule(False, None, True, False, True, "positive"),
    "only_1neg": TaskRule(False, 2, True, False, True, "positive"),
    "symmetric_sts": TaskRule(True, None, False, True, True, "positive"),
    "symmetric_class": TaskRule(True, None, False, False, False, "positive"),
    "symmetric_clustering": TaskRule(True, None, False, True, False, "category"),
}

TASK_TYPES = tuple(RULES)


@dataclass(frozen=True)
class RawRecord:
    """One valid row of a raw file: FlagEmbedding's form, texts stripped, scores checked against their lists."""

    query: str
    pos: tuple[str, ...]
    neg: tuple[str, ...]
    pos_scores: tuple[float, ...] | None
    neg_scores: tuple[float, ...] | None
    instruction: str
    category: str | None
    type: str
    nearest: tuple[int, ...] = ()  # 1-based lines of the nearest other rows in the same file, best first (mining)


@dataclass(frozen=True)
class BatchPlan:
    """Which rows, examples and passages make one global step: the same on every rank, a pure function of the step.

    Passages are distinct: a text wanted by several rows stands once in `passage_text_P`, and `candidate_C` points at
    it from every row. The first candidate of a row is its positive. Texts are named by their id in the token store.
    """

    step: int
    epoch: int
    dataset: int  # index into the store's datasets
    task_type: str
    in_batch_negatives: bool
    row_B: np.ndarray  # int64, row numbers inside the dataset
    query_text_B: np.ndarray  # int64 text ids
    instruction_B: np.ndarray  # int32, index into the store's instructions
    # In-context examples of row b: example_*_E[example_offsets[b] : example_offsets[b + 1]], leftmost first.
    example_offsets: np.ndarray  # int64, B + 1
    example_row_E: np.ndarray  # int64, row numbers inside the dataset
    example_query_E: np.ndarray  # int64 text ids
    example_response_E: np.ndarray  # int64 text ids
    example_instruction_E: np.ndarray  # int32
    # Candidates of row b: *_C[group_offsets[b] : group_offsets[b + 1]].
    group_offsets: np.ndarray  # int64, B + 1
    candidate_C: np.ndarray  # int64, index into passage_text_P
    teacher_score_C: np.ndarray  # float32, NaN where the row has no teacher scores
    passage_text_P: np.ndarray  # int64 text ids
    passage_instruction_P: np.ndarray  # int32; -1: a plain passage, else wrapped like a query with that instruction
    num_rows_revisited: int  # rows that fill the last batch of a pass and are seen a second time in it
    num_candidates_repeated: int  # negatives repeated to fill groups (only where the recipe asks for that)
    num_examples_dropped: int  # drawn, but dropped from the left because the prompt limit was reached
    num_examples_missing: int = 0  # asked for, but no further row could be shown (small batch, exclusions)
    filler: bool = False  # examples keep their length but not their content (the control experiment)

    @property
    def num_queries(self) -> int:
        return len(self.row_B)

    @property
    def num_passages(self) -> int:
        return len(self.passage_text_P)

    @property
    def num_sequences(self) -> int:
        """Sequences to encode: queries first (0 .. B - 1), then distinct passages (B .. B + P - 1)."""
        return self.num_queries + self.num_passages


@dataclass(frozen=True)
class PackedChunk:
    """Sequences packed end to end without padding: what one forward pass of one rank takes.

    A chunk without sequences (there are fewer sequences than chunks) holds one dummy token, so that every rank makes
    the same number of forward passes; its `sequence_S` is [-1] and nothing of it reaches the loss.
    """

    input_ids_T: np.ndarray  # int64
    position_ids_T: np.ndarray  # int64, restart at 0 with every sequence
    cu_seqlens: np.ndarray  # int32, S + 1: sequence s is tokens cu_seqlens[s] : cu_seqlens[s + 1]
    sequence_S: np.ndarray  # int64, number of the sequence within the step; -1 for the dummy
    max_seqlen: int

    @property
    def num_tokens(self) -> int:
        """Real tokens (the dummy's one token is not counted)."""
        return 0 if self.sequence_S[0] < 0 else len(self.input_ids_T)


@dataclass(frozen=True)
class PairChunk(PackedChunk):
    """Pairs of a reranker, packed: a sequence is a query with one candidate, numbered as the plan's candidates.

    The dummy's passage is empty.
    """

    # int64: first token of each pair's passage and the one after its last, counted from the pair's first.
    passage_S2: np.ndarray
