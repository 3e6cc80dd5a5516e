"""The model that a command line names: a run, the base model of a recipe, or a published embedder."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.evaluation.novelty import find_unlisted
from pipeline.inference.description import DESCRIPTION_FILE
from pipeline.settings import Settings, load_settings

if TYPE_CHECKING:
    from pipeline.evaluation.jobs import Model

log = logging.getLogger(__name__)


def read_settings(run: Path | None, config: Path | None, overrides: Sequence[str]) -> Settings | None:
    """Settings of the run or recipe, None for another model; ValueError where overrides cannot apply."""
    if config is not None:
        return load_settings(config, overrides)
    if overrides:
        raise ValueError(f"{' '.join(overrides)}: a trained model keeps its settings; overrides go with --config")
    if run is None:
        return None
    if not (run / "settings.yaml").is_file():
        raise ValueError(f"--run {run} is not the folder of a run: settings.yaml is missing")
    return load_settings(run / "settings.yaml")


def load_model(
    settings: Settings | None,
    run: Path | None = None,
    name: str | None = None,
    template: str | None = None,
    chunk_tokens: int | None = None,
    label: str | None = None,
) -> "Model":
    """The embedder of a run, else the published one of a name, else the untrained base model of the settings.

    Args:
        settings: of the run or the recipe; None for a published embedder.
        name: folder or hub name.
        template: prompt template of a published embedder.
        chunk_tokens: token budget of a forward pass; None: by device.
        label: what tables call it; None: after, its name, or before.

    Raises:
        ValueError: it cannot be loaded.
    """
    # Loading these takes seconds; wrong arguments should not have to wait for it.
    from pipeline.evaluation.jobs import Model
    from pipeline.inference.embedder import load_base_embedder, load_embedder
    from pipeline.inference.fingerprint import fingerprint

    path = run or name
    if path is None:
        assert settings is not None, "a recipe, where neither run nor name is given"
        embedder = load_base_embedder(settings, chunk_tokens)
        return Model(label or "before", fingerprint(embedder), embedder)
    embedder = load_embedder(path, chunk_tokens, template=template)
    datasets = tuple(dataset.name for dataset in settings.data.datasets) if settings else tuple(embedder.tasks) or None
    if unlisted := find_unlisted(datasets or ()):
        log.info("%s are not in tables/families.json: tasks may be newer to it than marked", ", ".join(unlisted))
    return Model(label or ("after" if run else Path(path).name), fingerprint(embedder), embedder, datasets=datasets)


def load_retriever(name: str, template: str | None = None) -> "Model":
    """What finds passages by name, whatever its kind.

    Args:
        name: bm25; a run or an exported embedder; with its template a published embedder; else a model of
            sentence-transformers, run as `load_baseline` has it.
        template: prompt template of a published embedder.

    Raises:
        ValueError: it is none of them, or cannot be loaded.
    """
    from pipeline.evaluation.baselines import load_baseline
    from pipeline.evaluation.jobs import Model
    from pipeline.inference.embedder import load_embedder
    from pipeline.inference.fingerprint import fingerprint

    folder = Path(name)
    if template is not None or any((place / DESCRIPTION_FILE).is_file() for place in (folder, folder / "model")):
        embedder = load_embedder(name, template=template)
        return Model(folder.name, fingerprint(embedder), embedder)
    if folder.is_dir() and not (folder / "modules.json").is_file():
        raise ValueError(
            f"--retriever {name} is neither a trained embedder ({DESCRIPTION_FILE} is missing) nor a model of "
            "sentence-transformers (modules.json is missing); a published embedder needs its --template"
        )
    baseline, digest = load_baseline(name, "--retriever")
    return Model(folder.name, digest, None, baseline)
