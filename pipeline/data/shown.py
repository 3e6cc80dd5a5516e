"""Which passages of a step stand in the in-context examples of which queries, by the step's plan.

N pairs of a row and a passage; B rows, P distinct passages, C candidates.
"""

from collections import defaultdict
from itertools import pairwise

import numpy as np

from pipeline.datatypes import BatchPlan


def shown_passages(plan: BatchPlan, rows: slice) -> tuple[np.ndarray, np.ndarray]:
    """Pairs (row, passage) in which the row's examples show the passage's text as their response: int64 [N], int64 [N].

    Of examples drawn from the batch each response is a passage of the step; of others those that happen to be.
    """
    places = defaultdict(list)
    for p, text in enumerate(plan.passage_text_P.tolist()):
        places[text].append(p)
    pairs = set()
    if not plan.filler:  # whose examples have no content
        for b in range(rows.start, rows.stop):
            shown = plan.example_response_E[plan.example_offsets[b] : plan.example_offsets[b + 1]]
            pairs |= {(b, p) for text in shown.tolist() for p in places.get(text, ())}
    row_N, passage_N = np.array(sorted(pairs), dtype=np.int64).reshape(-1, 2).T
    return row_N, passage_N


def count_shown(plan: BatchPlan) -> int:
    """Copies of passages that the step's rows both show and have as in-batch negatives: what mask_shown leaves out.

    A row's own candidates are none of them: its hard negatives stay negatives, shown or not, because the data say so.
    """
    if not plan.in_batch_negatives:
        return 0
    row_N, passage_N = shown_passages(plan, slice(0, plan.num_queries))
    copies_P = np.bincount(plan.candidate_C, minlength=plan.num_passages)
    group = [plan.candidate_C[first:last] for first, last in pairwise(plan.group_offsets)]
    pairs = zip(row_N.tolist(), passage_N.tolist(), strict=True)
    own_N = np.array([np.count_nonzero(group[b] == p) for b, p in pairs], dtype=np.int64)
    positive_text_B = plan.passage_text_P[plan.candidate_C[plan.group_offsets[:-1]]]
    is_negative_N = plan.passage_text_P[passage_N] != positive_text_B[row_N]
    return int((copies_P[passage_N] - own_N)[is_negative_N].sum())
