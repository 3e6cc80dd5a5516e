"""A reranker's step through the real launcher, and the width that it draws."""

from collections import Counter

import pytest
from launching import REPOSITORY, launch, require_success
from tiny_run import make_tiny_reranker_run

from pipeline.data.pair_steps import RATIOS, draw_width, list_widths
from pipeline.model.reranker import MERGE_LAYERS, PAPER_DEPTH, scale_layers
from pipeline.preprocess import main as preprocess

WORKER = REPOSITORY / "tests" / "pair_gradient_worker.py"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    path = make_tiny_reranker_run(tmp_path_factory.mktemp("reranker_run"))
    assert preprocess(["--config", str(path), "--processes", "1"]) == 0
    return path


def test_zero_on_two_ranks_gives_the_gradient_of_pairs_one_by_one(recipe):
    """Groups spread over chunks and ranks, widths of their own, rows with teacher scores."""
    result = launch(WORKER, [str(recipe), "0,3"], 2)
    require_success(result)
    assert "compared" in result.stdout


def test_width_is_a_function_of_seed_and_step_and_every_choice_is_drawn():
    drawn = [draw_width(7, step, MERGE_LAYERS) for step in range(600)]
    assert drawn == [draw_width(7, step, MERGE_LAYERS) for step in range(600)]
    assert drawn != [draw_width(8, step, MERGE_LAYERS) for step in range(600)]
    ratios = Counter(ratio for _, ratio in drawn)
    assert set(ratios) == set(RATIOS) and min(ratios.values()) > 100
    assert all((ratio == 1) == (layers == ()) and set(layers) <= set(MERGE_LAYERS) for layers, ratio in drawn)
    assert {(8,), MERGE_LAYERS} <= {layers for layers, _ in drawn}, "the paper's settings of one layer and of all"
    assert draw_width(7, 0, ()) == ((), 1)


@pytest.mark.parametrize("layers", [(), (3,), (8, 16), MERGE_LAYERS])
def test_the_list_of_widths_is_what_steps_draw_and_how_often(layers):
    listed = {(merged, ratio): chance for merged, ratio, chance in list_widths(layers)}
    assert len(listed) == len(list_widths(layers)) and sum(listed.values()) == pytest.approx(1)
    number = 6000
    drawn = Counter(draw_width(5, step, layers) for step in range(number))
    assert drawn.keys() <= listed.keys()
    for width, chance in listed.items():
        assert abs(drawn[width] - number * chance) < 5 * (number * chance * (1 - chance)) ** 0.5 + 1e-9, width


def test_layers_scale_with_the_depth():
    assert scale_layers(PAPER_DEPTH) == (8, MERGE_LAYERS)
    assert scale_layers(32) == (6, (6, 12, 18, 24, 30))
    assert scale_layers(2) == (1, (1,)) and scale_layers(1) == (1, ())
