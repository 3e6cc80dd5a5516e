"""Rows of a store back as raw rows."""

import json

from pipeline.data.raw_rows import raw_row
from pipeline.data.store import open_store
from pipeline.preprocess import main as preprocess
from pipeline.settings import load_settings


def test_rows_come_back_as_they_were_read(tiny_training):
    assert preprocess(["--config", str(tiny_training), "--processes", "1"]) == 0
    settings = load_settings(tiny_training)
    store = open_store(settings.data.store)
    scored = 0
    for table, dataset in zip(store.datasets, settings.data.datasets, strict=True):
        lines = (tiny_training.parent / "data" / f"{dataset.name}.jsonl").read_text().splitlines()
        assert table.num_rows == len(lines)
        for row in range(table.num_rows):
            original = json.loads(lines[table.source_line_N[row] - 1])
            found = raw_row(store, table, row)
            scores = [found.pop(name, None) for name in ("pos_scores", "neg_scores")]
            if "pos_scores" in original:
                scored += 1
                # Scores are stored as fp32.
                for values, name in zip(scores, ("pos_scores", "neg_scores"), strict=True):
                    assert all(abs(a - b) <= 1e-6 * abs(b) for a, b in zip(values, original.pop(name), strict=True))
            else:
                assert scores == [None, None]
            assert found == original | {"prompt": dataset.instruction}
    assert scored > 0
