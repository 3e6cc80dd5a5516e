"""Compile every shipped kernel configuration for Hopper (sm_90) without a GPU, and read what the compiler made of it.

Prints a table of registers, spilled bytes, shared memory, tensor-core and bulk-copy instructions; exits 3 where one
spills, does not fit, or lacks what it was written for. `--json FILE` writes the table too, as it grows.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from embed_kernels import last_token_kernel, similarity_kernel

TARGET = GPUTarget("cuda", 90, 32)
SHARED_LIMIT = 227 * 1024  # bytes a program may use on sm_90
MASKS = ("exclude_B", "exclude_P", "require_B", "require_P", "threshold")
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def similarity_types(dtype: str, tile: similarity_kernel.Tile, absent: Sequence[str]) -> dict[str, Any]:
    """Types of the arguments that the two tile kernels share."""
    types: dict[str, Any] = {
        "query": f"tensordesc<{dtype}[{tile.rows}, {tile.width}]>",
        "passage": f"tensordesc<{dtype}[{tile.passages}, {tile.width}]>",
        "out": f"tensordesc<{dtype}[{tile.rows}, {min(tile.passages // 2, 64)}]>",
        "threshold": "*fp32",
        "ROWS": tile.rows,
        "COLS": tile.passages,
        "WIDTH": tile.width,
        "UPCAST": False,
    }
    pointers = ("part_max", "part_sum", "scale_ptr", "logits", "lse2", "grad_lse", "grad_logits")
    types |= dict.fromkeys(pointers, "*fp32")
    types |= dict.fromkeys(("candidate", "group_offsets", "copies", "own_times", *MASKS[:4]), "*i32")
    types |= dict.fromkeys(("B", "P", "D", "max_group", "col_start"), "i32")
    return types | dict.fromkeys(absent)


def configurations() -> list[tuple[str, Any, dict[str, Any], dict[str, int], bool]]:
    """(name, kernel, types or compile-time values of its arguments, launch options, whether it uses tensor cores)."""
    found = []
    tiles = {"small": similarity_kernel.SMALL, "large": similarity_kernel.LARGE}
    settings = [(f"{name} {dtype}", dtype, tile) for name, tile in tiles.items() for dtype in ("bf16", "fp16")]
    settings.append(("fp32", "fp32", similarity_kernel.FP32))
    variants = {"all masks": (), "training": MASKS[2:]}
    for name, dtype, tile in settings:
        launch = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
        for variant, absent in variants.items():
            types = similarity_types(dtype, tile, absent)
            kernels = {"lse": similarity_kernel.lse_kernel, "gradient": similarity_kernel.gradient_kernel}
            for what, kernel in kernels.items():
                found.append((f"{what}, {name}, {variant}", kernel, types, launch, dtype != "fp32"))
    for dtype in ("bf16", "fp32"):
        rows: dict[str, Any] = dict.fromkeys(("query", "passage"), f"*{dtype}")
        rows |= dict.fromkeys(("part_max", "part_sum", "scale_ptr", "logits", "lse", "lse2"), "*fp32")
        rows |= dict.fromkeys(("candidate", "group_offsets", "copies", "own_times", *MASKS[:4]), "*i32")
        rows["threshold"] = "*fp32"
        rows |= dict.fromkeys(("B", "D", "stride_q", "stride_p", "num_tiles", "max_group"), "i32")
        launch = {"num_warps": similarity_kernel.FINISH_WARPS}
        sizes = {"BLOCK_TILES": similarity_kernel.FINISH_TILES, "BLOCK_D": 4096}
        found.append((f"finish, {dtype}", similarity_kernel.finish_kernel, rows | sizes, launch, False))
        rows = {"last": "*i64", "eps": "fp32", "D": "i32"}
        rows |= dict.fromkeys(("hidden", "grad_hidden"), f"*{dtype}")
        rows |= dict.fromkeys(("out", "norm", "grad_out"), "*fp32") | {"stride_t": "i32", "BLOCK_D": 4096}
        launch = {"num_warps": last_token_kernel.NUM_WARPS}
        found.append((f"last token, {dtype}", last_token_kernel.forward_kernel, rows, launch, False))
        found.append((f"last token backward, {dtype}", last_token_kernel.backward_kernel, rows, launch, False))
    return found


def compile_one(kernel: Any, types: dict[str, Any], launch: dict[str, int]) -> Any:
    signature, constants, attributes = {}, {}, {}
    for place, name in enumerate(kernel.arg_names):
        value = types[name]
        if isinstance(value, str):
            signature[name] = value
            if value.startswith("*") or name in ("D", "stride_q", "stride_p", "stride_t"):
                attributes[(place,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "constexpr"
            constants[(place,)] = value
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=TARGET, options=launch)


def read_machine_code(compiled: Any) -> dict[str, int]:
    """Registers, spilled bytes and instructions of the machine code; shared memory from the compiler."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([TOOLS / "cuobjdump", option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("--dump-resource-usage", "--dump-sass")
        )
    found = {key: int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK")}  # type: ignore[index]
    counts = {name: len(re.findall(rf"\b{name}", code)) for name in ("HGMMA", "UTMALDG", "UTMASTG")}
    return found | {"shared": int(compiled.metadata.shared)} | counts


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file to write the table to, as it grows")
    arguments = parser.parse_args(argv)
    rows, faulty = [], 0
    print(f"triton {triton.__version__}, sm_90\n{'configuration':44} regs  spill  shared  HGMMA  TMA loads")
    for name, kernel, types, launch, on_tensor_cores in configurations():
        found = read_machine_code(compile_one(kernel, types, launch))
        tiled = name.startswith(("lse", "gradient"))
        faults = ["spills"] if found["STACK"] else []
        faults += ["too much shared memory"] if found["shared"] > SHARED_LIMIT else []
        faults += ["no tensor cores"] if on_tensor_cores and not found["HGMMA"] else []
        faults += ["no bulk copies"] if tiled and not found["UTMALDG"] else []
        faulty += bool(faults)
        rows.append({"configuration": name, **found, "faults": faults})
        print(
            f"{name:44} {found['REG']:4} {found['STACK']:6} {found['shared']:7} {found['HGMMA']:6} "
            f"{found['UTMALDG']:6}  {', '.join(faults)}",
            flush=True,
        )
        if arguments.json:
            arguments.json.write_text(json.dumps({"triton": triton.__version__, "rows": rows}, indent=2) + "\n")
    return 3 if faulty else 0


if __name__ == "__main__":
    sys.exit(main())
