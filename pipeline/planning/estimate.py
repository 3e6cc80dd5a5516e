"""What a run needs before it starts: memory of a rank, time, and the largest chunks that fit. Formulas, no GPU.

Memory of a rank is what lives all the time (weights, optimizer, buffers) and the largest of four moments of a step:

    pass 1      a chunk without a graph
    loss        the kept graphs; 4 SD fp32: the step's embeddings on every rank, their gradient, two slices' gradients;
                6 (B/W)P fp32 of the eager loss or the kernel's workspace (P passages, B queries); of a reranker
                4 SE of scores (S pairs, E exits), its loss being as small
    pass 2      the kept graphs, what backward adds to them, and the adapters' gradients
    step        gradients, reduction buckets, Adam's temporaries

Time is arithmetic (pipeline/model/flop.py) over a share of the card's peak: an assumption, and one about all
arithmetic that is executed, what is done twice included.

Traffic: ZeRO-3 gathers the large weights for every forward and every backward pass of every chunk; what is recomputed
goes backward at once, within DeepSpeed's reuse distance, and is gathered once for both. A ring all-gather brings
(W - 1)/W of them to each rank (arXiv 1910.02054, section 7.2.2) and crosses a node's network once; with hpZ the rings
are those inside a node. A step lasts max(arithmetic, traffic) if all of it overlaps and the sum if none does. Not
counted: one reduction of the adapters' gradients a step, what prefetching gathers in vain where a pass ends, loading
data, checkpoints, start-up.
"""

import math
from dataclasses import dataclass, replace

from pipeline.model.flop import Work, executed_flop
from pipeline.model.shapes import ModelShape
from pipeline.planning.activations import Kernels, chunk_memory
from pipeline.planning.sharding import (
    Sharding,
    gathered_numel,
    gradient_bytes,
    optimizer_parts,
    reduction_bytes,
    weight_parts,
)

GRAIN = 256  # tokens: largest_chunk searches multiples of this
USABLE = 0.9  # of a card: CUDA context, NCCL's buffers and gaps of the allocator take the rest
WORKSPACE = 256 << 20  # of the similarity kernel (embed_kernels.similarity)


@dataclass(frozen=True)
class Cluster:
    """Links are one way. `node_link`: of one node to the others, all its cards together."""

    nodes: int
    gpus_per_node: int
    gpu_gib: float
    gpu_link: float  # bytes a second between two cards of a node
    node_link: float
    flops: float  # dense peak of a card, a second
    utilisation: float  # share of it that the arithmetic of a step reaches

    @property
    def world_size(self) -> int:
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True)
class Load:
    """One step over all ranks: means, but `largest`, `longest` and `most_sequences`, which memory must bear."""

    tokens: float
    squares: float  # sum of squared lengths
    queries: int
    sequences: float
    largest: int  # tokens of the largest step
    most_sequences: int
    longest: int  # tokens of the longest sequence that may come
    layer_work: Work | None = None  # of a reranker: what a layer reads, in the mean over layers and widths

    @property
    def work(self) -> Work:
        return self.layer_work or Work(self.tokens, self.squares, self.sequences)


@dataclass(frozen=True)
class Case:
    """All that an estimate depends on."""

    shape: ModelShape
    sharding: Sharding
    kernels: Kernels
    cluster: Cluster
    load: Load
    chunk_tokens: int
    causal: bool
    fused_loss: bool
    graphs: int = 1  # chunk graphs alive at a time


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank: `always`, and one of `moments` at a time. `host`: of one node."""

    always: dict[str, float]
    moments: dict[str, dict[str, float]]
    host: dict[str, float]

    @property
    def moment(self) -> str:
        """The one that decides."""
        return max(self.moments, key=lambda name: sum(self.moments[name].values()))

    @property
    def peak(self) -> float:
        return sum(self.always.values()) + sum(self.moments[self.moment].values())


def plan_memory(case: Case) -> Memory:
    """Memory of the rank that works most: chunks as full as run.chunk_tokens and the largest step allow."""
    world = case.cluster.world_size
    share = math.ceil(case.load.largest / world)
    tokens = min(case.chunk_tokens, max(case.load.longest, share))
    case = replace(case, graphs=min(case.graphs, math.ceil(share / case.chunk_tokens)))
    sequences = math.ceil(tokens * case.load.most_sequences / case.load.largest)
    return memory_of_chunk(case, tokens, sequences)


def memory_of_chunk(case: Case, tokens: int, sequences: int) -> Memory:
    """Memory where a chunk has so many tokens and sequences."""
    shape, sharding, element, cluster = case.shape, case.sharding, case.kernels.element, case.cluster
    world = cluster.world_size
    chunk = chunk_memory(shape, case.kernels, tokens, sequences)
    masters, moments, buffers = optimizer_parts(shape, sharding, world, element)
    always = weight_parts(shape, sharding, world, element)
    model = element * (sum(shape.frozen) + shape.table)
    host = {"base model, mapped from its files at start": float(model)}
    if sharding.offload_optimizer:
        host["masters, moments and gradients"] = (masters * 2 + moments) * cluster.gpus_per_node
    else:
        always |= {"fp32 masters": masters, "Adam's two moments": moments}
    if sharding.offload_weights:
        host["sharded weights"] = element * (sum(shape.frozen) + sum(shape.trained)) / cluster.nodes
    if buffers:
        always["gradient shard and bucket"] = buffers
    row, rows_of = (shape.exits, "scores") if shape.exits else (shape.width, "embeddings")
    embeddings = case.load.most_sequences * row * 4.0
    pairs = 0.0 if shape.exits else case.load.queries / world * max(0, case.load.most_sequences - case.load.queries) * 4
    gradients = gradient_bytes(shape, sharding, element)
    kept = {f"graph of {case.graphs} chunk{'s' * (case.graphs > 1)}": case.graphs * chunk.graph}
    own = {f"{rows_of} of this rank's chunks": embeddings / world}
    return Memory(
        always=always,
        moments={
            "pass 1": {"a chunk without graph": chunk.no_graph} | own,
            "loss": kept
            | {f"{rows_of} of the step, 4 x": 4 * embeddings}
            | {"similarities": min(pairs, WORKSPACE) if case.fused_loss else 6 * pairs},
            "pass 2": kept | {"backward of a chunk": chunk.backward, "adapters' gradients": gradients} | own,
            "step": {
                "adapters' gradients": gradients,
                "reduction and Adam": reduction_bytes(shape, sharding, world, element),
            },
        },
        host=host,
    )


def fits(case: Case) -> bool:
    return plan_memory(case).peak <= USABLE * case.cluster.gpu_gib * 2**30


def largest_chunk(case: Case) -> int | None:
    """The largest multiple of GRAIN for run.chunk_tokens that fits, or as many as one chunk a step needs; None where
    not even the longest sequence fits.
    """
    least = -(-case.load.longest // GRAIN)
    most = max(least, -(-math.ceil(case.load.largest / case.cluster.world_size) // GRAIN))
    if not fits(replace(case, chunk_tokens=least * GRAIN)):
        return None
    while least < most:
        middle = (least + most + 1) // 2
        if fits(replace(case, chunk_tokens=middle * GRAIN)):
            least = middle
        else:
            most = middle - 1
    return least * GRAIN


@dataclass(frozen=True)
class Cost:
    """One step. chunks: per rank; passes: over weights, per rank; bytes: that reach each rank; flop: of all ranks."""

    chunks: int
    forwards: int
    flop: float
    gather_bytes: float
    compute_seconds: float
    gather_seconds: float

    @property
    def seconds(self) -> tuple[float, float]:
        """All traffic hidden behind arithmetic, or none."""
        return max(self.compute_seconds, self.gather_seconds), self.compute_seconds + self.gather_seconds


def plan_cost(case: Case) -> Cost:
    """Arithmetic, traffic and seconds of a mean step."""
    shape, sharding, cluster = case.shape, case.sharding, case.cluster
    world = cluster.world_size
    chunks = max(1, math.ceil(case.load.tokens / (world * case.chunk_tokens)))
    forwards = 2 * chunks - min(case.graphs, chunks)
    flop = executed_flop(shape, case.load.work, case.causal, forwards / chunks, case.kernels.checkpointing)
    group = min(world, sharding.node_copy) if sharding.node_copy > 1 else world
    gathered = gathered_numel(shape, sharding) * case.kernels.element
    gather_bytes = (forwards + chunks) * gathered * (group - 1) / group
    link = cluster.gpu_link if group <= cluster.gpus_per_node else min(cluster.gpu_link, cluster.node_link)
    return Cost(
        chunks=chunks,
        forwards=forwards,
        flop=flop,
        gather_bytes=gather_bytes,
        compute_seconds=flop / (world * cluster.flops * cluster.utilisation),
        gather_seconds=gather_bytes / link,
    )
