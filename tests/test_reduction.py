"""Settings of a reranker's depth and width: what a text asks of a model, its one name, what is refused."""

import shutil

import pytest
from test_lightweight_reranker import own, published  # noqa: F401

from pipeline.inference.reduction import name_setting, read_setting, resolve_settings
from pipeline.model.reranker import scale_layers

PAPER = range(8, 43), (8, 16, 24, 32, 40)


@pytest.mark.parametrize(
    ("text", "wanted", "name"),
    [
        ("full", (42, (), 1), "full"),
        ("exit=42,ratio=1", (42, (), 1), "full"),
        ("light", (25, (8,), 2), "exit=25,layers=8,ratio=2"),
        ("exit=18", (18, (), 1), "exit=18"),
        ("exit=18,layers=12+6,ratio=2", (18, (6, 12), 2), "exit=18,layers=6+12,ratio=2"),
        ("ratio=2,layers=6+6", (42, (6,), 2), "exit=42,layers=6,ratio=2"),
        ("exit=18,ratio=4", (18, (8, 16), 4), "exit=18,layers=8+16,ratio=4"),  # the model's own, below the exit
        ("exit=8,layers=8,ratio=2", (8, (), 1), "exit=8"),  # merges nothing below the exit
    ],
)
def test_a_text_is_read_and_its_name_asks_the_same(text, wanted, name):
    found = read_setting(text, *PAPER)
    assert found == wanted and name_setting(found, 42) == name
    assert read_setting(name, *PAPER) == found


@pytest.mark.parametrize(
    ("depth", "wanted"),
    [(42, (25, (8,), 2)), (30, (18, (6,), 2)), (4, (2, (1,), 2)), (2, (1, (), 1)), (1, (1, (), 1))],
)
def test_light_is_scaled_to_the_depth(depth, wanted):
    first_exit, layers = scale_layers(depth)
    assert read_setting("light", range(first_exit, depth + 1), layers) == wanted


def test_light_leaves_no_earlier_than_there_are_heads():
    assert read_setting("light", range(4, 5), ()) == (4, (), 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'' is not understood; write full, light, or any of exit=18"),
        ("Full", "'Full' is not understood"),
        ("full,ratio=2", "'full' is not understood"),
        ("depth=3", "'depth=3' is not understood"),
        ("exit=9,exit=10", "'exit=10' is not understood"),
        ("exit=nine", "'exit=nine' is not understood"),
        ("exit=9+10", r"'exit=9\+10' is not understood"),
        ("layers=8", "without a ratio above 1 nothing is merged at layers"),
        ("layers=8,ratio=1", "without a ratio above 1 nothing is merged at layers"),
        ("exit=7", "exit_layer=7 is none of the layers 8 to 42"),
        ("exit=43", "exit_layer=43 is none of the layers 8 to 42"),
        ("layers=42,ratio=2", r"compress_layers=\[42\]: 42 is none of the layers 1 to 41"),
        ("ratio=0", "compress_ratio=0 must be 1"),
        ("ratio=-2", "compress_ratio=-2 must be 1"),
    ],
)
def test_what_cannot_be_asked(text, message):
    with pytest.raises(ValueError, match=message):
        read_setting(text, *PAPER)


def test_a_ratio_without_layers_needs_those_of_the_model():
    with pytest.raises(ValueError, match="compress_ratio=2, but compress_layers is empty; name a layer"):
        read_setting("ratio=2", range(1, 3), ())


@pytest.mark.parametrize(
    ("kind", "weights", "text", "name"),
    [
        ("own", "model/adapter_model.safetensors", "light", "exit=2,layers=1,ratio=2"),
        ("published", "model.safetensors", "exit=3", "exit=3"),
    ],
)
def test_a_folder_s_reranker_is_known_without_its_weights(kind, weights, text, name, request, tmp_path):
    copy = shutil.copytree(request.getfixturevalue(kind)[0], tmp_path / "copy")
    (copy / weights).unlink()
    folder = (copy / weights).parent
    assert resolve_settings(folder, [text, "exit=4"], "--how") == [name, "full"]
    with pytest.raises(ValueError, match="^--how exit=5: exit_layer=5 is none of the layers 2 to 4 of this model$"):
        resolve_settings(folder, [text, "exit=5"], "--how")
