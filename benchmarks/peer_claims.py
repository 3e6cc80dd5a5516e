"""What the records of benchmarks/peers.py say: one summary an arm, and the claims that they hold or refute."""

from collections.abc import Sequence

from proving import Row, row

FLAGEMBEDDING, SENTENCE_TRANSFORMERS, OURS = "FlagEmbedding", "sentence-transformers", "ours"
LOSS_TOLERANCE = 1e-4  # relative: fp32 sums in another order


def summarize(timed: Sequence[Row], alive: Row, warm_up: int) -> Row:
    """Means over the measured steps of all timed runs; peaks are the worst run's, in MiB.

    Args:
        timed: records of runs as a user has them.
        alive: a record taken with an allocator that gives freed memory back.
        warm_up: first steps of each timed run that are not measured.
    """

    def mean(field: str) -> float:
        values = [value for record in timed for value in record[field][warm_up:]]
        return sum(values) / len(values)

    cpu, real = mean("cpu_seconds"), mean("real_tokens")
    means = [sum(record["cpu_seconds"][warm_up:]) / len(record["cpu_seconds"][warm_up:]) for record in timed]
    return {
        "cpu_seconds": cpu,
        "cpu_seconds_of_rounds": means,
        "wall_seconds": mean("wall_seconds"),
        "cores_busy_elsewhere": max(record["cores_busy_elsewhere"] for record in timed),
        "real_tokens": real,
        "padded_tokens": mean("padded_tokens"),
        "cpu_ms_a_real_token": 1000 * cpu / real,
        "peak_above_start_mib": max(record["peak_above_start_mib"] for record in timed),
        "peak_mib": max(record["peak_mib"] for record in timed),
        "alive_above_start_mib": alive["peak_above_start_mib"],
        "first_loss": timed[0]["losses"][0],
        "versions": timed[0]["versions"],
    }


def claims(arms: Sequence[Row]) -> list[Row]:
    """Rows of the proof's table for the tasks that were run."""
    of_task = {name: [arm for arm in arms if arm["task"] == name] for name in ("recipe", "one_batch", "pairs")}
    rows: list[Row] = []
    for name in ("recipe", "one_batch"):
        if of_task[name]:
            rows += beside_flagembedding(of_task[name])
    if of_task["pairs"]:
        rows += beside_sentence_transformers(of_task["pairs"])
    for name in ("one_batch", "pairs"):
        if of_task[name]:
            rows.append(same_loss(of_task[name]))
    return rows


def of_trainer(arms: Sequence[Row], trainer: str) -> list[Row]:
    return [arm for arm in arms if arm["arm"].startswith(trainer)]


def beside_flagembedding(arms: Sequence[Row]) -> list[Row]:
    """One setting of ours, its default, against their default and whichever of their settings is fastest.

    Steps draw their negatives and examples at random, so a time must hold a step and a real token.
    """
    theirs, ours = of_trainer(arms, FLAGEMBEDDING), of_trainer(arms, OURS)[0]
    default, best = theirs[0], min(theirs, key=lambda arm: arm["cpu_seconds"])
    fastest = f"fastest setting ({best['arm'].split(', ')[1]})"
    task = {"recipe": "with in-context examples", "one_batch": "one fixed batch, nothing random"}[ours["task"]]
    rows = []
    for other, limit, what in ((default, 0.6, "default"), (best, 1.0, fastest)):
        step, token = (ours[key] / other[key] for key in ("cpu_seconds", "cpu_ms_a_real_token"))
        rows.append(
            row(
                f"CPU seconds a step beside FlagEmbedding's {what}, {task}",
                f"at most {limit} x, a step and a real token",
                f"{ours['cpu_seconds']:.2f} against {other['cpu_seconds']:.2f} s ({step:.2f} x a step, {token:.2f} x a "
                "token)",
                max(step, token) <= limit,
            )
        )
    text, ratio = beside(ours, default)
    claim = f"peak memory above start-up beside FlagEmbedding's default, {task}, at the same setting of ours"
    return [*rows, row(claim, "at most 0.5 x", text, ratio <= 0.5)]


def beside(ours: Row, other: Row) -> tuple[str, float]:
    """Peak memory above start-up of two arms in words, and the larger of the ratios: as run, and of what is alive."""
    run, alive = (ours[key] / other[key] for key in ("peak_above_start_mib", "alive_above_start_mib"))
    text = f"{ours['peak_above_start_mib']:.0f} against {other['peak_above_start_mib']:.0f} MiB ({run:.2f} x); alive "
    text += f"{ours['alive_above_start_mib']:.0f} against {other['alive_above_start_mib']:.0f} MiB ({alive:.2f} x)"
    return text, max(run, alive)


def beside_sentence_transformers(arms: Sequence[Row]) -> list[Row]:
    """Each setting of theirs against the setting of ours that needs least memory: no slower, and less memory."""
    ours = min(of_trainer(arms, OURS), key=lambda arm: arm["alive_above_start_mib"])
    rows = []
    for other in of_trainer(arms, SENTENCE_TRANSFORMERS):
        text, ratio = beside(ours, other)
        time = ours["cpu_seconds"] / other["cpu_seconds"]
        rows.append(
            row(
                f"{ours['arm']} beside {other['arm']}: the same pairs, cached in-batch loss",
                "not slower, less memory above start-up",
                f"CPU {ours['cpu_seconds']:.2f} against {other['cpu_seconds']:.2f} s ({time:.2f} x); {text}",
                time <= 1 and ratio < 1,
            )
        )
    return rows


def same_loss(arms: Sequence[Row]) -> Row:
    """The first step's loss where nothing is drawn: adapters start at zero, so it is that of the base model."""
    losses = [arm["first_loss"] for arm in arms]
    tokens = {round(arm["real_tokens"]) for arm in arms}
    spread = (max(losses) - min(losses)) / min(losses)
    trainer = FLAGEMBEDDING if of_trainer(arms, FLAGEMBEDDING) else SENTENCE_TRANSFORMERS
    return row(
        f"loss of the first step on the same batch as {trainer}, all settings of both",
        f"equal within {LOSS_TOLERANCE:g}, equal real tokens",
        f"{min(losses):.6f} to {max(losses):.6f} ({spread:.1e}); {', '.join(map(str, sorted(tokens)))} tokens",
        spread <= LOSS_TOLERANCE and len(tokens) == 1,
    )


def print_arms(arms: Sequence[Row]) -> None:
    print(
        "\ntask | arm | CPU s a step | wall s | real tokens | padded | peak above start MiB (alive) | peak MiB | loss"
    )
    for arm in arms:
        print(
            f"{arm['task']} | {arm['arm']} | {arm['cpu_seconds']:.3f} | {arm['wall_seconds']:.3f} | "
            f"{arm['real_tokens']:.0f} | {arm['padded_tokens']:.0f} | {arm['peak_above_start_mib']:.0f} "
            f"({arm['alive_above_start_mib']:.0f}) | {arm['peak_mib']:.0f} | {arm['first_loss']:.6f}"
        )
