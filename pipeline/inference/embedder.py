"""Text to embeddings, zero-shot and few-shot, with the prompts, limits and packing of training.

S sequences, T packed tokens, N texts, D width.
"""

import dataclasses
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from pipeline.data.composing import Limits
from pipeline.data.packing import pack_chunk
from pipeline.data.tokenizing import PromptTokenizer, load_tokenizer
from pipeline.datatypes import PackedChunk
from pipeline.inference.loading import find_model, load_weights, read_model
from pipeline.inference.passes import encode_sequences, run_pass
from pipeline.inference.prompting import Example, Prompt, compose_passages, compose_prompts, log_changes
from pipeline.model.encoder import load_encoder, require_rows, why_no_prefix
from pipeline.model.prefix import Prefix
from pipeline.prompts import get_template
from pipeline.settings import Settings

log = logging.getLogger(__name__)

# Tokens of one forward pass. On a CPU, larger ones leave the caches: at 8192 tokens the quickstart's model is 5 times
# slower than at 1024.
CHUNK_TOKENS = {"cpu": 1024, "cuda": 16384}
KEPT_PREFIXES = 4  # one of 760 tokens takes 100 MB in Mistral-7B


@dataclass(frozen=True)
class FewShotEmbedder:
    """An encoder with its tokenizer, template and limits; made by `load_embedder` or `load_base_embedder`."""

    encoder: Any  # Encoder, or the engine around one
    tokenizer: PromptTokenizer
    limits: Limits
    device: torch.device
    chunk_tokens: int  # token budget of one forward pass
    show_progress: bool = True
    # (this rank, how many): ranks that share the encoding. Each must make the same calls, and each gets all embeddings.
    place: tuple[int, int] = (0, 1)
    dim: int | None = None  # embeddings are cut to this width and made unit vectors again; None: the full width
    before_pass: Callable[[], None] = lambda: None  # called before every forward pass, on all ranks as often
    tasks: Mapping[str, str] = field(default_factory=dict)  # training set -> its instruction
    # Of the last tasks. Weights must stay as they are meanwhile; init=False: a replaced encoder begins with none.
    prefixes: dict[bytes, Prefix] = field(default_factory=dict, init=False, repr=False)

    @property
    def width(self) -> int:
        """Numbers of an embedding, D."""
        return int(self.dim or self.encoder.width)

    def encode_queries(
        self,
        texts: Sequence[str],
        instruction: str | None = None,
        examples: Sequence[Example] = (),
        share_prefix: bool = True,
        *,
        task: str | None = None,
        normalize: bool = True,
        drop_examples: bool = False,
    ) -> np.ndarray:
        """Embed queries behind an instruction and in-context examples of the same task (arXiv 2409.15700, section 3.1).

        Args:
            texts: N queries.
            instruction: what the task asks for; "" leaves it out.
            examples: (query, response), leftmost first.
            share_prefix: encode what all prompts begin with (the examples) once, not once a query; the same embeddings
                but for rounding. Models that cannot do it say so in the log and encode whole prompts.
            task: in place of an instruction, a training set of the model (`tasks`), whose instruction is taken.
            normalize: give vectors of length 1; else the pooled hidden state as it is.
            drop_examples: drop whole examples from the left where a prompt is longer than trained for
                (`limits.max_prompt_tokens`). Else such prompts are encoded as they are, with a warning.

        Returns:
            float32 [N, D] in the order of `texts`.

        Raises:
            ValueError: not one of instruction and task, an unknown task, a text or example that is none, or a prompt
                longer than the model can read.
        """
        examples_of = [tuple(examples)] * len(texts)
        prompts = self._compose(texts, self._instruction(instruction, task), examples_of, drop_examples)
        return self._encode_prompts(prompts, 1 if share_prefix else None, normalize)

    def encode_queries_each(
        self,
        texts: Sequence[str],
        instruction: str | None = None,
        examples_of: Sequence[Sequence[Example]] = (),
        *,
        task: str | None = None,
        normalize: bool = True,
        drop_examples: bool = False,
    ) -> np.ndarray:
        """`encode_queries` with examples of each query's own (`pipeline/inference/choosing.py` chooses some).

        Queries with equal examples share their prefix; the prompts of the others are packed together.

        Args:
            examples_of: N lists of (query, response), leftmost first.
        """
        if len(examples_of) != len(texts):
            raise ValueError(f"examples_of has {len(examples_of)} lists for {len(texts)} texts; give one a text")
        prompts = self._compose(texts, self._instruction(instruction, task), list(examples_of), drop_examples)
        return self._encode_prompts(prompts, 2, normalize)

    def encode_passages(self, texts: Sequence[str], *, normalize: bool = True) -> np.ndarray:
        """Embed passages: float32 [N, D] in the order of `texts`; ValueError for one that is no text.

        Args:
            normalize: give vectors of length 1; else the pooled hidden state as it is.
        """
        embeddings_ND, changes = self.encode_counted(texts, normalize=normalize)
        log_changes(changes, len(embeddings_ND), "passages")
        return embeddings_ND

    def encode_counted(self, texts: Sequence[str], *, normalize: bool = True) -> tuple[np.ndarray, Counter[str]]:
        """`encode_passages`, with what was changed (passages that were cut, ...) as counts in place of log lines."""
        ids, changes = compose_passages(self.tokenizer, self.limits, texts, self._context)
        with self._bar(len(ids), "passages") as bar:
            return self._encode(ids, normalize, done=bar.update), changes

    def compose_queries(
        self, texts: Sequence[str], instruction: str, examples: Sequence[Example] = (), drop_examples: bool = False
    ) -> list[np.ndarray]:
        """Token ids of each query's whole prompt, int64; what was cut or dropped is counted in the log."""
        prompts = self._compose(texts, instruction, [tuple(examples)] * len(texts), drop_examples)
        return [prompt.ids for prompt in prompts]

    def render(self, ids: np.ndarray) -> str:
        """A prompt's ids as the text that the model sees, markers and EOS included."""
        return str(self.tokenizer.tokenizer.decode(ids.tolist(), clean_up_tokenization_spaces=False))

    @property
    def _context(self) -> int | None:
        """Tokens that the model can read."""
        return getattr(self.encoder.decoder.config, "max_position_embeddings", None)

    def _instruction(self, instruction: str | None, task: str | None) -> str:
        if (instruction is None) == (task is None):
            raise ValueError(f"instruction={instruction!r} and task={task!r}: give one of them")
        if task is None:
            assert instruction is not None
            return instruction
        if task not in self.tasks:
            known = ", ".join(sorted(self.tasks)) or "none"
            raise ValueError(f"task={task!r} is unknown to the model; known: {known}; or give instruction=")
        return self.tasks[task]

    def _compose(
        self, texts: Sequence[str], instruction: str, examples_of: Sequence[Sequence[Example]], drop_examples: bool
    ) -> list[Prompt]:
        return compose_prompts(
            self.tokenizer, self.limits, texts, instruction, examples_of, drop_examples, self._context
        )

    def _encode_prompts(self, prompts: Sequence[Prompt], least: int | None, normalize: bool) -> np.ndarray:
        """float32 [N, D]; what `least` prompts or more begin with is encoded once (None: never)."""
        groups: dict[bytes, list[int]] = {}
        for i, prompt in enumerate(prompts):
            groups.setdefault(prompt.ids[: prompt.start].tobytes(), []).append(i)
        shared = [group for start, group in groups.items() if start and least is not None and len(group) >= least]
        if shared and (reason := why_no_prefix(self.encoder, max(len(prompt.ids) for prompt in prompts))):
            log.info("every prompt is encoded whole: %s", reason)
            shared = []
        alone = sorted(set(range(len(prompts))).difference(*shared))
        embeddings_ND = np.empty((len(prompts), self.width), dtype=np.float32)
        with self._bar(len(prompts), "queries") as bar:
            embeddings_ND[alone] = self._encode([prompts[i].ids for i in alone], normalize, done=bar.update)
            for group in shared:
                first = prompts[group[0]]
                prefix = self._encode_prefix(first.ids[: first.start])
                rest = [prompts[i].ids[prefix.length :] for i in group]
                embeddings_ND[group] = self._encode(rest, normalize, prefix, bar.update)
        return embeddings_ND

    @torch.no_grad()
    def _encode_prefix(self, ids: np.ndarray) -> Prefix:
        """Keys and values of what several prompts begin with; those of the last few tasks are kept."""
        key = ids.tobytes()
        if key not in self.prefixes:
            while len(self.prefixes) >= KEPT_PREFIXES:
                del self.prefixes[next(iter(self.prefixes))]  # the oldest
            prefix = Prefix(len(ids))
            chunk = pack_chunk(np.zeros(1, dtype=np.int64), [ids])
            run_pass(chunk, lambda chunk: self._forward(chunk, prefix, True), may_halve=False)
            self.prefixes[key] = prefix
        return self.prefixes[key]

    def _forward(self, chunk: PackedChunk, prefix: Prefix | None, normalize: bool) -> torch.Tensor:
        """embeddings_SD of a chunk, whose sequences stand behind the prefix once that is full."""
        self.before_pass()
        start = prefix.length if prefix is not None and prefix.is_full else 0
        embeddings_SD: torch.Tensor = self.encoder(
            torch.from_numpy(chunk.input_ids_T).to(self.device),
            torch.from_numpy(chunk.position_ids_T + start).to(self.device),
            torch.from_numpy(chunk.cu_seqlens).to(self.device),
            chunk.max_seqlen,
            prefix,
            normalize,
        )
        if self.dim is None:
            return embeddings_SD
        cut_SD = embeddings_SD[:, : self.dim]
        return torch.nn.functional.normalize(cut_SD, dim=1) if normalize else cut_SD

    @torch.no_grad()
    def _encode(
        self,
        ids: Sequence[np.ndarray],
        normalize: bool,
        prefix: Prefix | None = None,
        done: Callable[[int], Any] = lambda number: None,
    ) -> np.ndarray:
        """float32 [N, D] of composed sequences, or of what follows the prefix in each."""
        if not ids:
            return np.zeros((0, self.width), dtype=np.float32)
        length = 0 if prefix is None else prefix.length

        def forward(chunk: PackedChunk) -> torch.Tensor:
            return self._forward(chunk, prefix, normalize)

        return encode_sequences(ids, forward, self.chunk_tokens, self.place, length, done)

    def _bar(self, total: int, what: str) -> tqdm:
        return tqdm(total=total, desc=f"encode {what}", disable=not self.show_progress, leave=False)


def load_embedder(
    path: str | Path,
    chunk_tokens: int | None = None,
    show_progress: bool = True,
    dim: int | None = None,
    template: str | None = None,
) -> FewShotEmbedder:
    """An embedder that was trained here, or a published one.

    Args:
        path: a run, its model/ folder, an exported adapter/ or merged/ folder; or a whole model of transformers, as a
            folder or by its name on the hub (`BAAI/bge-en-icl`), which then comes from the hub's cache or is fetched.
        chunk_tokens: token budget of one forward pass; None: by device.
        dim: a width of loss.matryoshka_dims, to which embeddings are cut (arXiv 2205.13147).
        template: of a published model the template that it was trained with (`bge_en_icl`); its limits are the paper's
            (arXiv 2409.15700, section 4.1), its weights stay in the type that they were saved in.

    Raises:
        ValueError: no embedder is there, its files are damaged or do not belong together, or the width was not trained.
    """
    folder = find_model(path)
    description, tokenizer = read_model(folder, template)
    if dim is not None and dim not in description.matryoshka_dims:
        trained = ", ".join(map(str, description.matryoshka_dims)) or "the full width alone"
        raise ValueError(f"dim={dim} was not trained in {folder} (loss.matryoshka_dims: {trained}); take one that was")
    device, chunk_tokens = _device(), _chunk_tokens(description.limits, chunk_tokens)
    encoder = load_weights(folder, description, tokenizer, device)
    embedder = FewShotEmbedder(encoder, tokenizer, description.limits, device, chunk_tokens, show_progress)
    return dataclasses.replace(embedder, dim=dim, tasks=description.tasks)


def load_base_embedder(
    settings: Settings, chunk_tokens: int | None = None, show_progress: bool = True
) -> FewShotEmbedder:
    """The untrained base model of a recipe, with the recipe's template and limits."""
    pt = load_tokenizer(settings.tokenizer_name, get_template(settings.preprocess.template))
    limits = Limits.from_settings(settings.preprocess)
    device, chunk_tokens = _device(), _chunk_tokens(limits, chunk_tokens)
    encoder = load_encoder(settings.model, pt.tokens.marker_ids, pt.tokens.marker_subtokens, device.type)
    require_rows(encoder, pt.largest_id)
    return FewShotEmbedder(encoder.to(device).eval(), pt, limits, device, chunk_tokens, show_progress)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _chunk_tokens(limits: Limits, asked: int | None) -> int:
    """The token budget of a forward pass; ValueError where it cannot hold the longest sequence that was trained."""
    longest = max(limits.max_prompt_tokens, limits.max_passage_tokens)
    if asked is not None and asked < longest:
        raise ValueError(f"a chunk of {asked} tokens cannot hold the model's longest sequence, {longest} tokens")
    return asked or max(CHUNK_TOKENS[_device().type], longest)
