"""The trainer beside other trainers: CPU seconds, memory, tokens and loss of a step on one and the same task.

    python benchmarks/peers.py --out runs/peers/peers.json

Each peer runs as released, in an environment of its own under runs/peers (made once, about 2 GB each, versions pinned;
Python 3.11 or newer), one process and one thread, one arm after the other and never two at once. The tasks:

    recipe     256 rows, batch 8, groups of 8 drawn from 10 negatives, 0 to 5 in-context examples a query, LoRA,
               InfoNCE and distillation: bge-en-icl's own command for FlagEmbedding
    one_batch  the same without anything random: 8 rows, their 7 negatives, no examples; losses must agree
    pairs      32 rows with 3 negatives, no examples, no scores: sentence-transformers' cached in-batch loss; losses
               must agree

The model is random: a Mistral of 2 layers, 128 wide, and a byte-level tokenizer that knows the markers. Every arm runs
`--rounds` times for time, and once more with an allocator that gives freed memory back at once, for the peak of what is
alive. A shared machine should be quiet.
"""

import argparse
import json
import os
import platform
import random
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from peer_claims import claims, print_arms, summarize
from proving import PRECISE_MEMORY, REPOSITORY, Row, call

from pipeline.prompts import get_template, render_query

PEERS = REPOSITORY / "runs" / "peers"
COMMON = ("transformers==5.23.0", "tokenizers==0.23.3", "peft==0.21.2", "accelerate==1.15.0", "datasets==5.2.0")
# torch comes first and alone: resolved together with the rest it can pull a CUDA build of several GB.
TORCH = "torch==2.13.0"
ENVIRONMENTS = {
    "flagembedding": ("flagembedding==1.4.2", *COMMON, "numpy==2.4.6"),
    "sentence_transformers": ("sentence-transformers==6.2.0", *COMMON, "numpy==2.4.6"),
}
INSTRUCTION = "Given a query, retrieve passages that answer it."
LORA = {"rank": 32, "alpha": 64, "dropout": 0.1}
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TEMPERATURE, LR = 0.02, 5e-5
WARM_UP = 2  # steps
MEMORY_STEPS = 6
NO_ENVIRONMENT = 4  # exit code


@dataclass(frozen=True)
class Task:
    """What every arm of a comparison is given; batch counts rows, group_size passages of a row."""

    name: str
    rows: int
    negatives: int
    batch: int
    group_size: int
    max_examples: int
    distillation: bool
    max_prompt_tokens: int


TASKS = (
    Task(
        "recipe",
        rows=256,
        negatives=10,
        batch=8,
        group_size=8,
        max_examples=5,
        distillation=True,
        max_prompt_tokens=2048,
    ),
    Task(
        "one_batch",
        rows=8,
        negatives=7,
        batch=8,
        group_size=8,
        max_examples=0,
        distillation=True,
        max_prompt_tokens=2048,
    ),
    Task(
        "pairs", rows=32, negatives=3, batch=32, group_size=4, max_examples=0, distillation=False, max_prompt_tokens=512
    ),
)
# Name of an arm -> (trainer, what it sets). The first of a trainer is its default.
FLAGEMBEDDING = {
    "FlagEmbedding, default": [],
    "FlagEmbedding, gradient checkpointing": ["--gradient_checkpointing", "True"],
    "FlagEmbedding, sub_batch_size 8": ["--sub_batch_size", "8"],
    "FlagEmbedding, sub_batch_size 1": ["--sub_batch_size", "1"],
}
SENTENCE_TRANSFORMERS = {
    "sentence-transformers, default (mini_batch_size 32)": {},
    "sentence-transformers, mini_batch_size 8": {"mini_batch_size": 8},
    "sentence-transformers, mini_batch_num_tokens 2048": {"mini_batch_num_tokens": 2048},
}
OURS = {
    "ours, chunk_tokens 16384 (default)": 16384,
    "ours, chunk_tokens 4096": 4096,
    "ours, chunk_tokens 2048": 2048,
    "ours, chunk_tokens 1024": 1024,  # where prompts are short enough for it
}


def make_environment(name: str) -> Path:
    """The interpreter of a peer's own environment; made unless one with the same pins is there."""
    folder, pins = PEERS / name, (TORCH, *ENVIRONMENTS[name])
    python, stamp = folder / "bin" / "python", folder / "pins.txt"
    if not (stamp.is_file() and stamp.read_text() == "\n".join(pins)):
        call([sys.executable, "-m", "venv", "--clear", str(folder)])
        call([str(python), "-m", "pip", "install", TORCH])
        call([str(python), "-m", "pip", "install", *pins])
        stamp.write_text("\n".join(pins))
    return python


def make_rows(task: Task) -> list[Row]:
    """Pseudo-words: queries of 5 to 20, passages of lognormal(4.0, 0.6) clipped to 8..300; scores are random."""
    rng = random.Random(0)
    syllables = [a + b for a in "bdfgklmnprstvz" for b in ("a", "e", "i", "o", "u", "an", "or")]
    words = sorted({"".join(rng.choices(syllables, k=rng.randint(1, 3))) for _ in range(3000)})

    def text(length: int) -> str:
        return " ".join(rng.choices(words, k=length))

    def passage() -> str:
        return text(min(max(round(rng.lognormvariate(4.0, 0.6)), 8), 300))

    rows = []
    for _ in range(task.rows):
        one: Row = {"query": text(rng.randint(5, 20)), "pos": [passage()], "type": "normal"}
        one["neg"] = [passage() for _ in range(task.negatives)]
        if task.distillation:
            one["pos_scores"], one["neg_scores"] = [rng.random()], [rng.random() for _ in range(task.negatives)]
        rows.append(one)
    return rows


def make_model(texts: Sequence[str]) -> Path:
    """A random Mistral (2 layers, 128 wide, vocabulary up to 4,000) and its tokenizer, which ends a text with EOS."""
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from tokenizers.processors import TemplateProcessing
    from transformers import MistralConfig, MistralModel, PreTrainedTokenizerFast

    folder = PEERS / "model"
    special = ["<s>", "</s>", "<unk>", *get_template("bge_en_icl").markers]
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=4000, special_tokens=special, show_progress=False)
    end = ("</s>", bpe.token_to_id("</s>"))
    bpe._tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[end])
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, **names)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = MistralConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        vocab_size=4000,
    )
    MistralModel(config).save_pretrained(folder)
    return folder


def write_task(task: Task, model: Path) -> Path:
    """The task's rows, its recipe for ours and its columns for sentence-transformers; returns its folder."""
    folder, rows = PEERS / task.name, make_rows(task)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    recipe = {
        "model": {"name": str(model), "dtype": "fp32", "lora": LORA},
        "preprocess": {"max_prompt_tokens": task.max_prompt_tokens},
        "data": {
            "root": str(folder),
            "store": str(folder / "store"),
            "datasets": [{"name": "train", "path": "train.jsonl", "instruction": INSTRUCTION}],
        },
        "batch": {
            "queries": task.batch,
            "symmetric_queries": task.batch,
            "group_size": task.group_size,
            "use_buckets": False,
            "examples": {"max_examples": task.max_examples},
        },
        "loss": {"temperature": TEMPERATURE},
        "optim": {"lr": LR},
        "run": {"output_dir": str(folder / "ours"), "deepspeed": str(REPOSITORY / "ds_configs" / "zero1.json")},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    template = get_template("bge_en_icl")
    columns = {"anchor": [render_query(template, INSTRUCTION, one["query"]) for one in rows]}
    columns["positive"] = [one["pos"][0] for one in rows]
    columns |= {f"negative_{i + 1}": [one["neg"][i] for one in rows] for i in range(task.negatives)}
    (folder / "columns.json").write_text(json.dumps(columns))
    preprocess = ["pipeline/preprocess.py", "--config", str(folder / "recipe.yaml"), "--overwrite"]
    call([sys.executable, *preprocess], {"PYTHONPATH": _our_path()})
    return folder


def _our_path() -> str:
    return f"{REPOSITORY}{os.pathsep}{REPOSITORY / 'kernels'}"


def flagembedding_command(task: Task, model: Path, folder: Path, out: Path, steps: int, more: list[str]) -> list[str]:
    """FlagEmbedding's published command for bge-en-icl, without what transformers 5 no longer takes."""
    settings = {
        "model_name_or_path": str(model),
        "train_data": str(folder / "train.jsonl"),
        "output_dir": str(out.with_suffix("")),
        "use_lora": True,
        "lora_rank": LORA["rank"],
        "lora_alpha": LORA["alpha"],
        "train_group_size": task.group_size,
        "query_max_len": task.max_prompt_tokens,
        "passage_max_len": 512,
        "example_query_max_len": 256,
        "example_passage_max_len": 256,
        "pad_to_multiple_of": 8,
        "retrieval_use_examples": task.max_examples > 0,
        "query_instruction_for_retrieval": INSTRUCTION,
        "query_instruction_format": "<instruct>{}\n<query>{}",
        "icl_suffix_str": "\n<response>",
        "knowledge_distillation": task.distillation,
        "kd_loss_type": "kl_div",
        "same_dataset_within_batch": True,
        "per_device_train_batch_size": task.batch,
        "max_steps": steps,
        "learning_rate": LR,
        "save_strategy": "no",
        "temperature": TEMPERATURE,
        "sentence_pooling_method": "last_token",
        "normalize_embeddings": True,
        "report_to": "none",
        "disable_tqdm": True,
    }
    python = make_environment("flagembedding")
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    return [str(python), "benchmarks/peer_flagembedding.py", str(out), *words, *more]


def sentence_transformers_command(
    task: Task, model: Path, folder: Path, out: Path, steps: int, mini_batch: dict[str, int]
) -> list[str]:
    lora: dict[str, Any] = {"r": LORA["rank"], "lora_alpha": LORA["alpha"], "lora_dropout": LORA["dropout"]}
    lora |= {"target_modules": list(PROJECTIONS), "bias": "none"}
    given = {
        "model": str(model),
        "columns": str(folder / "columns.json"),
        "max_tokens": task.max_prompt_tokens,
        "lora": lora,
        "temperature": TEMPERATURE,
        "mini_batch": mini_batch,
        "batch": task.batch,
        "steps": steps,
        "lr": LR,
    }
    file = out.with_suffix(".task.json")
    file.write_text(json.dumps(given))
    python = make_environment("sentence_transformers")
    return [str(python), "benchmarks/peer_sentence_transformers.py", str(out), str(file)]


def run_arm(task: Task, arm: str, model: Path, folder: Path, steps: int, **variables: str) -> Row:
    """One process that trains `steps` steps; its record."""
    out = folder / f"{''.join(c if c.isalnum() else '_' for c in arm)}.json"
    variables |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "PYTHONPATH": ""}
    if arm in FLAGEMBEDDING:
        command = flagembedding_command(task, model, folder, out, steps, FLAGEMBEDDING[arm])
    elif arm in SENTENCE_TRANSFORMERS:
        command = sentence_transformers_command(task, model, folder, out, steps, SENTENCE_TRANSFORMERS[arm])
    else:
        variables["PYTHONPATH"] = _our_path()
        chunk = f"run.chunk_tokens={OURS[arm]}"
        command = [sys.executable, "benchmarks/peer_ours.py", str(out), str(folder / "recipe.yaml"), str(steps), chunk]
    call(command, variables)
    record: Row = json.loads(out.read_text())
    return record


def names_of(task: Task) -> list[str]:
    peers = SENTENCE_TRANSFORMERS if task.name == "pairs" else FLAGEMBEDDING
    return [*peers, *(name for name, chunk in OURS.items() if chunk >= task.max_prompt_tokens)]


def measure(tasks: Sequence[Task], model: Path, steps: int, rounds: int) -> list[Row]:
    """All arms of all tasks: round by round for time, then once for memory, which needs no quiet machine."""
    folders = [write_task(task, model) for task in tasks]
    arms = [(task, name, folder) for task, folder in zip(tasks, folders, strict=True) for name in names_of(task)]
    timed: list[list[Row]] = [[] for _ in arms]
    for _ in range(rounds):
        for (task, name, folder), records in zip(arms, timed, strict=True):
            records.append(run_arm(task, name, model, folder, WARM_UP + steps))
    print("timed runs are done", flush=True)
    alive = [run_arm(task, name, model, folder, MEMORY_STEPS, **PRECISE_MEMORY) for task, name, folder in arms]
    return [
        {"task": task.name, "arm": name} | summarize(records, record, WARM_UP)
        for (task, name, _), records, record in zip(arms, timed, alive, strict=True)
    ]


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=PEERS / "peers.json")
    parser.add_argument("--steps", type=int, default=10, help="measured steps of a run, after 2 for warming up")
    parser.add_argument("--rounds", type=int, default=1, help="runs of each arm for time")
    parser.add_argument("--task", action="append", choices=[task.name for task in TASKS], help="only these")
    arguments = parser.parse_args(argv)
    try:
        for name in ENVIRONMENTS:
            make_environment(name)
    except SystemExit as error:
        print(error, file=sys.stderr)
        return NO_ENVIRONMENT
    tasks = [task for task in TASKS if arguments.task is None or task.name in arguments.task]
    model = make_model([text for one in make_rows(TASKS[0]) for text in (one["query"], *one["pos"], *one["neg"])])
    arms = measure(tasks, model, arguments.steps, arguments.rounds)
    found: dict[str, Any] = {
        "processor": processor(),
        "threads": 1,
        "steps": arguments.steps,
        "rounds": arguments.rounds,
        "tasks": [asdict(task) for task in tasks],
        "arms": arms,
        "claims": claims(arms),
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(found, indent=2) + "\n")
    print_arms(arms)
    for claim in found["claims"]:
        print(f"{claim['claim']} | {claim['target']} | {claim['measured']} | {'yes' if claim['holds'] else 'NO'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
