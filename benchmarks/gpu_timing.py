"""Time, memory and launches of calls on a GPU. A call takes (query_BD, passage_PD) and returns a scalar loss."""

from collections.abc import Callable, Sequence

import torch
from kernel_data import Loss
from torch import Tensor

# What the tracer lists beside kernels and copies.
SYNC_EVENTS = ("Context Sync", "Stream Sync", "Event Sync", "Stream Wait")


def run_once(loss: Loss, leaves: Sequence[Tensor], backward: bool) -> None:
    value = loss(leaves[0], leaves[1])
    if backward:
        torch.autograd.grad(value, list(leaves))


def peak_mib(loss: Loss, leaves: Sequence[Tensor]) -> float:
    """Above what the inputs take; the gradients of the inputs are in it."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run_once(loss, leaves, backward=True)
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def device_work(call: Callable[[], object]) -> dict[str, list[str]]:
    """Names of the `kernels` that a call runs on the device, and of the `copies` (memcpy, memset) beside them."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    for _ in range(2):  # the first profile of a process starts the tracer, and may miss what runs meanwhile
        with profile(activities=[ProfilerActivity.CUDA]) as records:
            call()
            torch.cuda.synchronize()
    # Calls of the CUDA runtime and driver are in the list too; they are the host's.
    on_device = [e for e in records.events() or () if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
    names = [e.name for e in on_device if not e.name.startswith(SYNC_EVENTS)]
    found: dict[str, list[str]] = {"kernels": [], "copies": []}
    for name in names:
        found["copies" if name.startswith(("Memcpy", "Memset")) else "kernels"].append(name[:80])
    return found


def capture(loss: Loss, sets: Sequence[Sequence[Tensor]], backward: bool) -> torch.cuda.CUDAGraph:
    """One call on each input set, as one graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):  # compiles, and takes cuBLAS's workspace for this stream
            run_once(loss, sets[0], backward)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for leaves in sets:
            run_once(loss, leaves, backward)
    return graph


def make_round(loss: Loss, sets: Sequence[Sequence[Tensor]], backward: bool, by_graph: bool) -> Callable[[], None]:
    """A call of `loss` on each input set."""
    if by_graph:
        return capture(loss, sets, backward).replay

    def launch() -> None:
        for leaves in sets:
            run_once(loss, leaves, backward)

    return launch


def milliseconds(call: Callable[[], None], repeats: int) -> float:
    """Of `repeats` calls back to back, between two events."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(repeats):
        call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)
