"""sentence-transformers' cached in-batch loss on the same pairs, measured: its Trainer, watched from outside.

runs/peers/sentence_transformers/bin/python benchmarks/peer_sentence_transformers.py OUT TASK.json
"""

import json
import sys
from pathlib import Path
from typing import Any

from datasets import Dataset
from metering import write_record
from peer_watch import StepWatch
from peft import LoraConfig
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

PACKAGES = ("sentence-transformers", "torch", "transformers", "peft", "accelerate")


def main(out: str, task_file: str) -> None:
    task: dict[str, Any] = json.loads(Path(task_file).read_text())
    transformer = Transformer(task["model"], max_seq_length=task["max_tokens"])
    pooling = Pooling(transformer.get_embedding_dimension(), pooling_mode="lasttoken")
    model = SentenceTransformer(modules=[transformer, pooling, Normalize()], device="cpu")
    model.add_adapter(LoraConfig(**task["lora"]))
    loss = CachedMultipleNegativesRankingLoss(model, scale=1 / task["temperature"], **task["mini_batch"])
    losses: list[float] = []
    tokens: list[tuple[int, int]] = []

    def note(module: Any, args: Any, output: Any) -> None:
        masks = [column["attention_mask"] for column in args[0]]
        losses.append(float(output))
        tokens.append((sum(int(mask.sum()) for mask in masks), sum(mask.numel() for mask in masks)))

    loss.register_forward_hook(note)
    watch = StepWatch()
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(Path(out).with_suffix("")),
        per_device_train_batch_size=task["batch"],
        max_steps=task["steps"],
        learning_rate=task["lr"],
        lr_scheduler_type="linear",
        max_grad_norm=1.0,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    columns = Dataset.from_dict(json.loads(Path(task["columns"]).read_text()))
    trainer = SentenceTransformerTrainer(
        model=model, args=arguments, train_dataset=columns, loss=loss, callbacks=[watch]
    )
    trainer.train()
    write_record(out, watch.start_mib, watch.moments, losses, tokens, PACKAGES)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
