"""What benchmarks/peers.py says of measured arms: every claim must turn when its figure does."""

import sys

import pytest
from launching import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "benchmarks"))

from peer_claims import claims, summarize


def arm(task, name, cpu, memory, loss=5.0, tokens=1000.0):
    one = {"task": task, "arm": name, "cpu_seconds": cpu, "real_tokens": tokens, "first_loss": loss}
    one |= {"cpu_ms_a_real_token": 1000 * cpu / tokens}
    return one | {"peak_above_start_mib": memory, "alive_above_start_mib": memory}


def flagembedding(cpu=0.5, memory=40.0, loss=5.0, tokens=1000.0):
    """Default 1 s and 100 MiB, best setting 0.6 s: the arms of a batch without anything random."""
    arms = [arm("one_batch", "FlagEmbedding, default", 1.0, 100.0)]
    arms += [arm("one_batch", "FlagEmbedding, sub_batch_size 1", 0.6, 50.0)]
    return [*arms, arm("one_batch", "ours, chunk_tokens 16384 (default)", cpu, memory, loss, tokens)]


def holds(arms):
    return [claim["holds"] for claim in claims(arms)]


@pytest.mark.parametrize(
    "changed, expected",
    [
        ({}, [True, True, True, True]),
        ({"cpu": 0.605}, [False, False, True, True]),
        ({"memory": 51.0}, [True, True, False, True]),
        ({"loss": 5.001}, [True, True, True, False]),
        # Fewer tokens must not look like speed: 0.5 s is slower a token now.
        ({"tokens": 800.0}, [False, False, True, False]),
    ],
)
def test_each_figure_decides_its_own_claims(changed, expected):
    assert holds(flagembedding(**changed)) == expected


@pytest.mark.parametrize("cpu, memory, expected", [(1.0, 9.0, True), (1.1, 9.0, False), (1.0, 10.0, False)])
def test_cached_loss_must_be_beaten_in_time_and_memory(cpu, memory, expected):
    arms = [arm("pairs", "sentence-transformers, default", 1.0, 10.0), arm("pairs", "ours, lean", cpu, memory)]
    assert holds(arms) == [expected, True]


def test_warm_up_is_left_out_and_the_worst_peak_counts():
    steps = {"real_tokens": [9, 10, 10], "padded_tokens": [9, 20, 20], "versions": {}, "losses": [3.0, 2.0, 1.0]}
    runs = [
        steps | {"cpu_seconds": [9.0, 1.0, 2.0], "wall_seconds": [9.0, 1.0, 2.0]} | peaks
        for peaks in (
            {"peak_above_start_mib": 5.0, "peak_mib": 15.0, "cores_busy_elsewhere": 0.5},
            {"peak_above_start_mib": 7.0, "peak_mib": 14.0, "cores_busy_elsewhere": 0.1},
        )
    ]
    found = summarize(runs, {"peak_above_start_mib": 4.0}, warm_up=1)
    assert found["cpu_seconds"] == 1.5 and found["cpu_ms_a_real_token"] == 150.0
    assert (found["peak_above_start_mib"], found["peak_mib"], found["alive_above_start_mib"]) == (7.0, 15.0, 4.0)
    assert found["first_loss"] == 3.0 and found["cores_busy_elsewhere"] == 0.5
