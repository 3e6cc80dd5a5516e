"""The one tree of settings: defaults <- recipe YAML <- dotted overrides (`optim.lr=1e-4`).

Unknown keys and wrong types are errors. Paths in a recipe are relative to the recipe's folder, so a recipe means the
same from any working directory; paths in an override are relative to the working directory, as a shell user expects.
Who owns what: tokenizer, template and limits are set here and recorded by the store's manifest, which training
compares; batch, precision, learning rate and clipping are set here; sharding, offload and communication in ds_configs/.

A recipe may begin with `extends: other.yaml` (relative to its own folder) and then names only what differs. Sections
are merged key by key, a list (data.datasets, preprocess.bucket_edges) replaces the base's. One level: a base extends
nothing.
"""

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml

from pipeline.datatypes import TASK_TYPES
from pipeline.prompts import BGE_RERANKER, get_template

HUB_PREFIX = "hf://"  # of a dataset's path
ENTRIES = {"embedder": "pipeline/train.py", "reranker": "pipeline/train_reranker.py"}  # model.kind -> what trains it


def _path() -> Any:
    return field(default="", metadata={"path": True})


@dataclass(frozen=True)
class LoraSettings:
    """Low-rank adapters on the seven projections of every layer (paper: rank 64, alpha 32)."""

    rank: int = 64
    alpha: int = 32
    dropout: float = 0.0


@dataclass(frozen=True)
class ModelSettings:
    """The decoder, and what it becomes."""

    kind: Literal["embedder", "reranker"] = "embedder"
    name: str = _path()  # hub name, or a folder (starting with "." or "/")
    num_layers: int | None = None  # keep only the first n layers
    attention: Literal["causal", "bidirectional"] = "causal"
    pooling: Literal["last", "mean"] = "last"
    dtype: Literal["bf16", "fp32"] = "bf16"
    attention_kernel: Literal["auto", "flash_attn", "torch_varlen", "sdpa"] = "auto"
    embed_kernels: Literal["auto", "triton", "torch"] = "auto"  # last-token gather, similarity matrix
    activation_checkpointing: bool = False
    trained: Literal["lora", "full"] = "lora"  # adapters, or every weight
    adapter: str = _path()  # adapters to go on from (a run's model/, or PEFT's), of model.lora's rank and alpha
    lora: LoraSettings = field(default_factory=LoraSettings)


@dataclass(frozen=True)
class PreprocessSettings:
    """Tokenizer, template and limits in tokens. A limit counts everything: instruction, markers, text, BOS, EOS."""

    tokenizer: str = _path()  # empty: the model's own
    template: str = "bge_en_icl"
    max_query_tokens: int = 512
    max_passage_tokens: int = 512
    max_example_query_tokens: int = 256
    max_example_passage_tokens: int = 256
    max_prompt_tokens: int = 2048  # query and examples together
    max_pair_tokens: int = 512  # of a reranker: query, passage and prompt together; no part of the store
    bucket_edges: tuple[int, ...] = (128, 256, 512, 1024, 2048)  # upper edges of a row's length key, in tokens
    max_bad_row_share: float = 0.01  # stop when more rows than this are quarantined


@dataclass(frozen=True)
class ColumnSettings:
    """Names that a source has for the fields of a row; a field that is not named here is read under its own name.

    A field takes one name; `pos`, `neg` and their scores also take several, and names with `*` (`negative_*`). Each
    column holds a list or one value. null: the field is not read at all.
    """

    query: tuple[str, ...] | None = ()
    pos: tuple[str, ...] | None = ()
    neg: tuple[str, ...] | None = ()
    pos_scores: tuple[str, ...] | None = ()
    neg_scores: tuple[str, ...] | None = ()
    prompt: tuple[str, ...] | None = ()
    type: tuple[str, ...] | None = ()
    category: tuple[str, ...] | None = ()
    nearest: tuple[str, ...] | None = ()


@dataclass(frozen=True)
class DatasetSettings:
    """One entry of data.datasets. A step draws all its rows from one dataset."""

    name: str = ""
    # Relative to data.root: a file (.jsonl, also .gz and .zst, or .parquet); a folder or glob of such files, each its
    # own dataset `name/stem`; a folder of Hugging Face's save_to_disk; a BEIR folder; or hf://owner/name[@revision].
    path: str = ""
    split: str = ""  # of a saved DatasetDict, a hub name or a BEIR folder (there: train)
    config: str = ""  # of a hub name
    streaming: bool = False  # read a hub name without storing it; needs the commit as @revision
    merge_files: bool = False  # all files of a folder or glob are one dataset
    columns: ColumnSettings = field(default_factory=ColumnSettings)
    type: str = ""  # one of the five task types; empty: what the rows say
    instruction: str = ""  # for rows without `prompt`
    in_batch_negatives: bool | None = None  # None: by type (only normal and only_1neg use them)
    group_size: int | None = None  # positive + negatives; None: batch.group_size, or 2 for only_1neg
    relation: str = ""  # what a reranker is asked of its pairs (pipeline/prompts.py); empty: by type


@dataclass(frozen=True)
class DataSettings:
    """Where raw rows come from and where the token store goes."""

    root: str = _path()
    store: str = _path()
    datasets: tuple[DatasetSettings, ...] = ()


@dataclass(frozen=True)
class ExampleSettings:
    """In-context examples in training (paper, section 3.2: 0 to 5, uniform, from the query's own batch)."""

    mode: Literal["in_batch", "fixed", "pool", "nearest", "filler", "none"] = "in_batch"
    max_examples: int = 5

    @property
    def asked_for(self) -> bool:
        """Whether any query may get examples."""
        return self.mode != "none" and self.max_examples > 0


@dataclass(frozen=True)
class BatchSettings:
    """What one global step holds, over all ranks together."""

    queries: int = 512
    symmetric_queries: int = 256  # for the symmetric_* types
    group_size: int = 8  # one positive and up to seven negatives
    fill_groups: bool = False  # repeat negatives of short groups (what FlagEmbedding does); counted
    use_buckets: bool = True
    mix_temperature: float = 1.0  # a dataset's share of steps goes with (its batches) ** mix_temperature
    examples: ExampleSettings = field(default_factory=ExampleSettings)


@dataclass(frozen=True)
class LossSettings:
    """InfoNCE (paper, section 3.2), distillation from the rows' teacher scores, and options that are off here."""

    temperature: float = 0.02
    distillation: Literal["kl_div", "m3_kd"] = "kl_div"
    distillation_weight: float = 1.0  # for rows with scores
    teacher_temperature: float = 1.0  # distils softmax(scores / this): above 1 softer, below 1 sharper
    # Suspected false negatives, left out of InfoNCE and counted. Set one of the two; null: none are.
    filter_margin: float | None = None  # leave out what scores above the positive's cosine + this (may be negative)
    filter_ratio: float | None = None  # leave out what scores above this x the positive's cosine
    mask_shown: bool = False  # what a query's examples show is no in-batch negative of that query
    matryoshka_dims: tuple[int, ...] = ()  # the first n numbers of an embedding are trained as an embedding, too
    matryoshka_weights: tuple[float, ...] = ()  # of their losses, one each; empty: 1. The full width weighs 1

    @property
    def filters_negatives(self) -> bool:
        """Whether suspected false negatives are looked for at all."""
        return self.filter_margin is not None or self.filter_ratio is not None

    @property
    def matryoshka(self) -> tuple[tuple[int, float], ...]:
        """(width, weight) of each truncation."""
        weights = self.matryoshka_weights or (1.0,) * len(self.matryoshka_dims)
        return tuple(zip(self.matryoshka_dims, weights, strict=True))


@dataclass(frozen=True)
class OptimSettings:
    """AdamW and its schedule."""

    lr: float = 1e-4
    schedule: Literal["linear", "cosine"] = "linear"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    epochs: float = 1.0
    max_steps: int | None = None  # overrides epochs


@dataclass(frozen=True)
class EvaluationSettings:
    """Scores on local tasks while training, zero-shot and few-shot; the best model is kept."""

    tasks: tuple[str, ...] = field(default=(), metadata={"path": True})  # folders, as for `evaluate --task`
    every: int = 0  # steps, and after the last one; 0: never
    num_examples: int = 3


@dataclass(frozen=True)
class RunSettings:
    """One run on one set of machines."""

    output_dir: str = _path()
    seed: int = 0
    deepspeed: str = _path()  # one of ds_configs/*.json
    chunk_tokens: int = 16384  # token budget of one forward pass of one rank: sets peak activation memory
    keep_graphs: int = 1  # chunks that keep their first pass's graph: saves a second pass, takes memory; ZeRO-3: 1
    save_every: int = 100  # steps
    keep_last: int = 2
    max_stall_seconds: float = 1800.0  # a rank that stands still for longer ends the run, naming whom it waits for
    tracker: Literal["none", "tensorboard", "wandb"] = "none"
    profile_steps: tuple[
        int, ...
    ] = ()  # run torch's profiler over these, on the first rank: profile/ in the run folder


@dataclass(frozen=True)
class Settings:
    """The whole tree: what a recipe may set."""

    model: ModelSettings = field(default_factory=ModelSettings)
    preprocess: PreprocessSettings = field(default_factory=PreprocessSettings)
    data: DataSettings = field(default_factory=DataSettings)
    batch: BatchSettings = field(default_factory=BatchSettings)
    loss: LossSettings = field(default_factory=LossSettings)
    optim: OptimSettings = field(default_factory=OptimSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    run: RunSettings = field(default_factory=RunSettings)

    @property
    def tokenizer_name(self) -> str:
        return self.preprocess.tokenizer or self.model.name


def load_settings(recipe: str | Path, overrides: Sequence[str] = ()) -> Settings:
    """Read a recipe, over the one that it extends, and apply `key.sub=value` overrides (values are YAML).

    Raises:
        ValueError: a file is missing, a key is unknown or a value is wrong; names file or key, value and remedy.
    """
    recipe = Path(recipe)
    if not recipe.is_file():
        raise ValueError(f"--config {recipe}: no such file{' (it is a folder)' * recipe.is_dir()}")
    tree, settings = _read_tree(recipe), Settings()
    if "extends" in tree:
        base = _find_base(recipe, tree.pop("extends"))
        settings = _merge_file(settings, _read_tree(base), base)
    settings = _merge_file(settings, tree, recipe)
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator:
            raise ValueError(f"override {override!r} has no '='; write it as key.sub=value")
        try:
            branch = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError) as error:
            raise ValueError(f"override {override!r}: the value is not valid YAML") from error
        for part in reversed(key.split(".")):
            branch = {part: branch}
        settings = _merge(settings, branch, "", Path.cwd())
    _validate(settings)
    return settings


class _UniqueKeys(yaml.SafeLoader):
    """YAML whose mappings may not name a key twice; the safe loader alone would keep the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if repeated := [key for key in keys if keys.count(key) > 1]:
            raise yaml.constructor.ConstructorError(None, None, f"{repeated[0]!r} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _read_tree(recipe: Path) -> dict[str, Any]:
    """A recipe file as the mapping that it holds."""
    try:
        tree = yaml.load(recipe.read_text(encoding="utf-8"), _UniqueKeys) or {}
    except (yaml.YAMLError, ValueError) as error:  # ValueError: not UTF-8, or a date that is none
        raise ValueError(f"{recipe} is not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ValueError(f"{recipe} must be a mapping of settings, got {tree!r}")
    return tree


def _find_base(recipe: Path, extends: Any) -> Path:
    """The file that `extends` names: it must exist and extend nothing, so no chain and no cycle is possible."""
    if not isinstance(extends, str) or not extends:
        raise ValueError(f"{recipe}: extends={extends!r} must be the file name of another recipe")
    base = recipe.resolve().parent / Path(extends).expanduser()
    if not base.is_file():
        raise ValueError(f"{recipe}: extends={extends!r}, but there is no file {base}; name it relative to this recipe")
    if "extends" in _read_tree(base):
        raise ValueError(f"{recipe}: extends={extends!r}, which extends a recipe itself; extend one that does not")
    return base


def _merge_file(settings: Settings, tree: dict[str, Any], recipe: Path) -> Settings:
    try:
        merged: Settings = _merge(settings, tree, "", recipe.resolve().parent)
    except ValueError as error:
        raise ValueError(f"{recipe}: {error}") from error
    return merged


def dump_settings(settings: Settings) -> str:
    """The tree as YAML that `load_settings` reads back to an equal tree (paths are absolute by then)."""
    return yaml.safe_dump(_plain(dataclasses.asdict(settings)), sort_keys=False, allow_unicode=True)


def flatten(settings: Settings) -> dict[str, Any]:
    """Dotted name of every setting -> its value."""

    def walk(tree: dict[str, Any], prefix: str) -> dict[str, Any]:
        flat: dict[str, Any] = {}
        for key, value in tree.items():
            flat |= walk(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
        return flat

    return walk(dataclasses.asdict(settings), "")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _merge(base: Any, tree: Any, prefix: str, folder: Path) -> Any:
    """A copy of the dataclass `base` with the values of the mapping `tree`, checked against the field types."""
    if not isinstance(tree, dict):
        raise ValueError(f"{prefix.rstrip('.') or 'recipe'} must be a mapping of settings, got {tree!r}")
    hints, changes = typing.get_type_hints(type(base)), {}
    fields = {f.name: f for f in dataclasses.fields(base)}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"known here: {', '.join(fields)}"
            raise ValueError(f"unknown setting {name!r}; {hint}")
        if dataclasses.is_dataclass(hints[key]):
            changes[key] = _merge(getattr(base, key), value, f"{name}.", folder)
        else:
            changes[key] = _convert(hints[key], value, name, folder)
        if fields[key].metadata.get("path"):
            names = changes[key] if isinstance(changes[key], tuple) else (changes[key],)
            found = tuple(_resolve(name, folder, is_name=key in ("name", "tokenizer")) for name in names)
            changes[key] = found if isinstance(changes[key], tuple) else found[0]
    return dataclasses.replace(base, **changes)


def _convert(kind: Any, value: Any, name: str, folder: Path) -> Any:
    """`value` as `kind` where that loses nothing (an int where a float is wanted); ValueError otherwise."""
    options = get_args(kind)
    if get_origin(kind) is Literal:
        if value not in options:
            raise ValueError(f"{name}={value!r} must be one of {', '.join(options)}")
        return value
    if get_origin(kind) in (typing.Union, types.UnionType):
        if value is None and type(None) in options:
            return None
        kind = next(option for option in options if option is not type(None))
        return _convert(kind, value, name, folder)
    if get_origin(kind) is tuple:
        if options[0] is str and isinstance(value, str):
            value = [value]
        if not isinstance(value, list):
            raise ValueError(f"{name}={value!r} must be a list")
        items = enumerate(value)
        if options[0] is DatasetSettings:
            return tuple(_merge(DatasetSettings(), item, f"{name}[{i}].", folder) for i, item in items)
        return tuple(_convert(options[0], item, f"{name}[{i}]", folder) for i, item in items)
    if kind is float and isinstance(value, str):
        # YAML 1.1 reads 1e-4 (no dot) as a string.
        try:
            return float(value)
        except ValueError:
            pass
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{name}={value!r} must be of type {kind.__name__}, not {type(value).__name__}")
    return value


def _resolve(value: str, folder: Path, is_name: bool) -> str:
    """Absolute form of a path; a model or tokenizer that does not start with '.', '~' or '/' is a hub name."""
    if not value or (is_name and not value.startswith((".", "~", "/"))):
        return value
    return str((folder / Path(value).expanduser()).resolve())


def _validate(s: Settings) -> None:
    """Checks that need more than one field, or a range; each error names the setting, its value and the remedy."""
    p, b = s.preprocess, s.batch
    required = {"model.name": s.model.name, "data.root": s.data.root, "data.store": s.data.store}
    required |= {"run.output_dir": s.run.output_dir, "run.deepspeed": s.run.deepspeed}
    for name, value in required.items():
        if not value:
            raise ValueError(f"{name} is not set; every recipe must name it")
    get_template(p.template)
    _require_positive(s)
    if s.model.kind == "reranker":
        _validate_reranker(s)
    elif s.run.chunk_tokens < max(p.max_prompt_tokens, p.max_passage_tokens, p.max_query_tokens):
        raise ValueError(
            f"run.chunk_tokens={s.run.chunk_tokens} cannot hold one sequence of preprocess.max_prompt_tokens="
            f"{p.max_prompt_tokens} / max_query_tokens={p.max_query_tokens} / max_passage_tokens="
            f"{p.max_passage_tokens}; raise it or lower the limits"
        )
    if b.examples.asked_for and p.max_prompt_tokens <= p.max_query_tokens:
        raise ValueError(
            f"preprocess.max_prompt_tokens={p.max_prompt_tokens} leaves no room for an example beside a query of "
            f"preprocess.max_query_tokens={p.max_query_tokens}; raise it, or set batch.examples.mode=none to train "
            "without in-context examples"
        )
    if bool(s.evaluation.every) != bool(s.evaluation.tasks):
        raise ValueError(
            f"evaluation.every={s.evaluation.every} and evaluation.tasks={list(s.evaluation.tasks)} belong together: "
            "name both, or neither"
        )
    _validate_loss(s.loss, b.examples)
    if list(p.bucket_edges) != sorted(set(p.bucket_edges)):
        raise ValueError(f"preprocess.bucket_edges={p.bucket_edges} must be rising and distinct")
    names = [d.name for d in s.data.datasets]
    for i, d in enumerate(s.data.datasets):
        if not d.name or not d.path:
            raise ValueError(f"data.datasets[{i}] needs a name and a path, got name={d.name!r} path={d.path!r}")
        if d.type and d.type not in TASK_TYPES:
            raise ValueError(f"data.datasets[{i}].type={d.type!r} must be one of {', '.join(TASK_TYPES)}")
        if names.count(d.name) > 1:
            raise ValueError(f"data.datasets: the name {d.name!r} stands twice; give each dataset its own")
        if d.group_size is not None and d.group_size < 1:
            raise ValueError(f"data.datasets[{i}].group_size={d.group_size} must be at least 1")
        if d.relation:
            BGE_RERANKER.prompt(d.relation)
        _validate_source(d, f"data.datasets[{i}]")


def _validate_reranker(s: Settings) -> None:
    """What a reranker's training would silently not do."""
    loss = s.loss
    of_embedders = {
        "distillation=m3_kd": loss.distillation == "m3_kd",
        "filter_margin": loss.filter_margin is not None,
        "filter_ratio": loss.filter_ratio is not None,
        "mask_shown": loss.mask_shown,
        "matryoshka_dims": bool(loss.matryoshka_dims),
    }
    if named := [name for name, is_set in of_embedders.items() if is_set]:
        raise ValueError(f"loss.{named[0]} is for embedders; a reranker is trained without it: leave it out")
    if s.batch.examples.asked_for:
        raise ValueError(
            f"batch.examples.mode={s.batch.examples.mode}: a reranker reads pairs, without examples; set it to none"
        )
    if s.evaluation.every:
        raise ValueError(
            f"evaluation.every={s.evaluation.every}: tasks are scored with embedders; leave out evaluation"
        )
    if s.model.trained != "lora" or s.model.adapter:
        raise ValueError(
            f"model.trained={s.model.trained}, model.adapter={s.model.adapter!r}: a reranker is trained by fresh "
            "adapters; set model.trained=lora, and leave out model.adapter"
        )
    if s.run.chunk_tokens < s.preprocess.max_pair_tokens:
        raise ValueError(
            f"run.chunk_tokens={s.run.chunk_tokens} cannot hold one pair of preprocess.max_pair_tokens="
            f"{s.preprocess.max_pair_tokens}; raise it or lower the limit"
        )


def _validate_loss(loss: LossSettings, examples: ExampleSettings) -> None:
    """Options of the loss; that no width is above the model's is checked where the model is known."""
    margin, ratio = loss.filter_margin, loss.filter_ratio
    if margin is not None and ratio is not None:
        raise ValueError(
            f"loss.filter_margin={margin} and loss.filter_ratio={ratio} say the same thing in two ways; set one to null"
        )
    if margin is not None and not -1 <= margin <= 1:
        raise ValueError(
            f"loss.filter_margin={margin} must lie in -1..1: it is added to a cosine, 0.1 spares all but what clearly "
            "beats the positive; null turns the filter off"
        )
    if ratio is not None and not 0 < ratio < 2:
        raise ValueError(
            f"loss.filter_ratio={ratio} must lie in 0..2 (both excluded): 0.95 leaves out what scores above 95 % of "
            "the positive; null turns the filter off"
        )
    shows = examples.asked_for and examples.mode != "filler"
    if loss.mask_shown and not shows:
        raise ValueError(
            f"loss.mask_shown=True, but batch.examples.mode={examples.mode} with max_examples={examples.max_examples} "
            "shows no passage to any query; set loss.mask_shown=false"
        )
    dims, weights = loss.matryoshka_dims, loss.matryoshka_weights
    if list(dims) != sorted(set(dims)) or any(dim < 1 for dim in dims):
        raise ValueError(f"loss.matryoshka_dims={list(dims)} must be rising, distinct and above 0")
    if weights and len(weights) != len(dims):
        raise ValueError(
            f"loss.matryoshka_weights={list(weights)} must hold one weight for each of loss.matryoshka_dims="
            f"{list(dims)} (the full width weighs 1), or nothing"
        )
    if not all(0 < weight < math.inf for weight in weights):
        raise ValueError(f"loss.matryoshka_weights={list(weights)} must be above 0 and finite")


def _validate_source(d: DatasetSettings, where: str) -> None:
    """What can be said of a source without looking at it."""
    on_hub = d.path.startswith(HUB_PREFIX)
    _, _, revision = d.path.partition("@")
    if on_hub and not re.fullmatch(r"hf://[\w.-]+(/[\w.-]+)?(@[\w./-]+)?", d.path):
        raise ValueError(f"{where}.path={d.path!r} must be written hf://owner/name or hf://owner/name@revision")
    if on_hub and not d.split:
        raise ValueError(f"{where}: {d.path} needs a split, for example split: train")
    if on_hub and d.merge_files:
        raise ValueError(f"{where}.merge_files is for folders and globs of files, not for {d.path}")
    for name in ("config", "streaming"):
        if getattr(d, name) and not on_hub:
            raise ValueError(
                f"{where}.{name}={getattr(d, name)!r} is for hub names (hf://...), not for path={d.path!r}"
            )
    if d.streaming and not re.fullmatch(r"[0-9a-f]{40}", revision):
        raise ValueError(
            f"{where}: streaming has no files whose checksums could tell one version from another; name the commit as "
            f"40 digits, hf://owner/name@commit, got {d.path!r}"
        )
    for f in dataclasses.fields(ColumnSettings):
        names = getattr(d.columns, f.name) or ()
        one = f.name in ("query", "prompt", "type", "category")
        if any(not name for name in names) or (one and (len(names) > 1 or any("*" in name for name in names))):
            wanted = "one column" if one else "columns"
            raise ValueError(f"{where}.columns.{f.name}={list(names)} must name {wanted}")


def _require_positive(s: Settings) -> None:
    positive = {
        "batch.queries": s.batch.queries,
        "batch.symmetric_queries": s.batch.symmetric_queries,
        "batch.group_size": s.batch.group_size,
        "loss.temperature": s.loss.temperature,
        "loss.teacher_temperature": s.loss.teacher_temperature,
        "optim.lr": s.optim.lr,
        "optim.clip_norm": s.optim.clip_norm,
        "optim.epochs": s.optim.epochs,
        "run.keep_graphs": s.run.keep_graphs,
        "run.save_every": s.run.save_every,
        "run.keep_last": s.run.keep_last,
        "run.max_stall_seconds": s.run.max_stall_seconds,
        "model.lora.rank": s.model.lora.rank,
        "model.lora.alpha": s.model.lora.alpha,
        "preprocess.max_query_tokens": s.preprocess.max_query_tokens,
        "preprocess.max_passage_tokens": s.preprocess.max_passage_tokens,
        "preprocess.max_pair_tokens": s.preprocess.max_pair_tokens,
        "preprocess.max_example_query_tokens": s.preprocess.max_example_query_tokens,
        "preprocess.max_example_passage_tokens": s.preprocess.max_example_passage_tokens,
    }
    for name, value in positive.items():
        if not 0 < value < math.inf:  # false for NaN too
            raise ValueError(f"{name}={value} must be above 0 and finite")
    if s.optim.lr > 1e38:
        raise ValueError(f"optim.lr={s.optim.lr} is no number in fp32; 1e-4 is the paper's")
    if s.run.seed >= 2**63:
        raise ValueError(f"run.seed={s.run.seed} must be below 2**63")
    if s.batch.mix_temperature > 10:
        raise ValueError(f"batch.mix_temperature={s.batch.mix_temperature} must lie in 0..10 (1: by size, 0: alike)")
    not_negative = {
        "batch.examples.max_examples": s.batch.examples.max_examples,
        "batch.mix_temperature": s.batch.mix_temperature,
        "loss.distillation_weight": s.loss.distillation_weight,
        "evaluation.every": s.evaluation.every,
        "evaluation.num_examples": s.evaluation.num_examples,
        "optim.warmup_steps": s.optim.warmup_steps,
        "run.seed": s.run.seed,
        "optim.weight_decay": s.optim.weight_decay,
        "run.profile_steps": min(s.run.profile_steps, default=0),
    }
    for name, value in not_negative.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{name}={value} must be 0 or more and finite")
    if s.model.adapter and s.model.trained == "full":
        raise ValueError(
            f"model.adapter={s.model.adapter} needs model.trained=lora; to train every weight from there, merge the "
            "adapter into the base model first"
        )
    if s.model.num_layers is not None and s.model.num_layers <= 0:
        raise ValueError(f"model.num_layers={s.model.num_layers} must be above 0; leave it out for all layers")
    if s.optim.max_steps is not None and s.optim.max_steps <= 0:
        raise ValueError(f"optim.max_steps={s.optim.max_steps} must be above 0; leave it out to train optim.epochs")
    if not 0 <= s.preprocess.max_bad_row_share <= 1:
        raise ValueError(f"preprocess.max_bad_row_share={s.preprocess.max_bad_row_share} must lie in 0..1")
    if not 0 <= s.model.lora.dropout < 1:
        raise ValueError(f"model.lora.dropout={s.model.lora.dropout} must lie in 0..1 (1 excluded)")
