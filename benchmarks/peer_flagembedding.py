"""FlagEmbedding's own training of bge-en-icl, measured: its Runner as released, watched from outside.

runs/peers/flagembedding/bin/python benchmarks/peer_flagembedding.py OUT ARGUMENT...   (arguments of its command)
"""

import sys
from typing import Any

from FlagEmbedding.finetune.embedder.decoder_only.icl import (
    DecoderOnlyEmbedderICLDataArguments,
    DecoderOnlyEmbedderICLModelArguments,
    DecoderOnlyEmbedderICLRunner,
    DecoderOnlyEmbedderICLTrainingArguments,
)
from metering import write_record
from peer_watch import StepWatch
from transformers import HfArgumentParser

PACKAGES = ("FlagEmbedding", "torch", "transformers", "peft", "accelerate")


def count_tokens(model_inputs: dict[str, Any]) -> tuple[int, int]:
    """(real, with padding) of one step: a side is one batch, or a list of sub-batches."""
    real = padded = 0
    for side in ("queries", "passages"):
        batches = model_inputs[side] if isinstance(model_inputs[side], list) else [model_inputs[side]]
        real += sum(int(batch["attention_mask"].sum()) for batch in batches)
        padded += sum(batch["attention_mask"].numel() for batch in batches)
    return real, padded


def main(out: str, arguments: list[str]) -> None:
    kinds: Any = (
        DecoderOnlyEmbedderICLModelArguments,
        DecoderOnlyEmbedderICLDataArguments,
        DecoderOnlyEmbedderICLTrainingArguments,
    )
    model_arguments, data_arguments, training_arguments = HfArgumentParser(kinds).parse_args_into_dataclasses(arguments)
    runner = DecoderOnlyEmbedderICLRunner(
        model_args=model_arguments, data_args=data_arguments, training_args=training_arguments
    )
    watch = StepWatch()
    losses: list[float] = []
    tokens: list[tuple[int, int]] = []

    def note(model: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        losses.append(float(output.loss))
        tokens.append(count_tokens(kwargs))

    runner.trainer.add_callback(watch)
    runner.model.register_forward_hook(note, with_kwargs=True)
    runner.run()
    write_record(out, watch.start_mib, watch.moments, losses, tokens, PACKAGES)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
