"""Runs the model on one step's batch and reads off logits, prompt log-probabilities and scores."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from engine.api import GenerateRequest, SamplingParams, TokenLogprobs
from engine.batch import Batch, LastTokens, make_batch
from engine.decode_graphs import DecodeGraphs
from engine.errors import NotEnoughMemory
from engine.kv_cache import KVCaches, allocate_kv_caches
from engine.model_config import ModelSpec
from engine.sequence import Sequence
from engine.transfers import HostCopy, copy_to_host, to_device
from kernels.sampling import top_logprobs

PROMPT_LOGPROB_ROWS = 256
"""Prompt tokens whose logits exist at one time: float32 rows of the vocabulary are large."""


class Model(Protocol):
    """What the runner needs of a model; engine.model.CausalLM, or a fake in tests."""

    def __call__(self, batch: Batch, kv_caches: KVCaches, lora: Any) -> torch.Tensor: ...

    def logits(self, hidden: torch.Tensor, lora: Any) -> torch.Tensor: ...


class LoraRows(Protocol):
    """What the runner needs of the LoRA pool."""

    def batch(self, rows: list[int], scales: list[float]) -> Any: ...

    def score(self, row: int, hidden: torch.Tensor) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """What a chunk of a prompt tells about it, on its way to the host."""

    sequence: Sequence
    is_from_the_start: bool
    pieces: list[tuple[tuple[int, ...], HostCopy]]
    """Tokens, and what launch_logprobs has said of them."""

    def wait(self) -> list[TokenLogprobs | None]:
        """One entry per token; the prompt's first has none."""
        entries: list[TokenLogprobs | None] = [None] if self.is_from_the_start else []
        for token_ids, copy in self.pieces:
            entries += read_logprobs(token_ids, copy)
        return entries


@dataclass(slots=True)
class StepResult:
    """What a step computes. The device may not have come so far: only what has a wait is told to
    the host."""

    logits: torch.Tensor  # float32 [num_rows, vocab_size]
    sampled: list[Sequence]
    """[num_rows]: the sequences that get a token; one with drafts has a row more for each."""
    prompt_logprobs: list[PromptLogprobs] = field(default_factory=list)
    """Of the sequences that asked for them."""
    scored: list[Sequence] = field(default_factory=list)
    scores: HostCopy | None = None
    """float32 [len(scored)]; None where there are none."""


class ModelRunner:
    """The model, its KV caches and the pool of adapters, on one device."""

    def __init__(
        self,
        model: Model,
        kv_caches: KVCaches,
        lora_pool: LoraRows,
        *,
        block_size: int,
        device: torch.device,
        graphs: DecodeGraphs | None = None,
    ) -> None:
        self.model = model
        self.kv_caches = kv_caches
        self.lora_pool = lora_pool
        self.block_size = block_size
        self.device = device
        self._graphs = graphs

    def run(self, items: list[tuple[Sequence, int]], last: LastTokens | None = None) -> StepResult:
        """Launch the scheduled tokens' pass through the model, waiting for nothing: writes their
        keys and values, changes no sequence. The caller has turned gradients off.

        Args:
            items: (sequence, num_new_tokens), drafts included.
            last: what the step in flight chooses; tokens that the host does not know come from
                there.

        Raises:
            AdapterError: a score request's adapter has no score head.
            RuntimeError: whatever the device says, out of memory among it.
        """
        if self._graphs is not None:
            logits = self._graphs.run(items, last)
            if logits is not None:
                owners = [sequence for sequence, count in items for _ in range(count)]
                return StepResult(logits=logits, sampled=owners)
        batch = make_batch(items, block_size=self.block_size, device=self.device, last=last)
        lora = self.lora_pool.batch(batch.lora_indices, batch.lora_scales)
        hidden = self.model(batch, self.kv_caches, lora)  # [num_tokens, hidden_size]
        rows, sampled, scored, scores = [], [], [], []
        for row, sequence in zip(batch.logit_rows, batch.finishing, strict=True):
            if sequence.request.task == "score":
                scored.append(sequence)
                scores.append(self.lora_pool.score(sequence.lora_row, hidden[row]))
            else:
                rows.append(row)
                sampled.append(sequence)
        return StepResult(
            logits=self._logits(hidden, lora, rows),
            sampled=sampled,
            prompt_logprobs=self._prompt_logprobs(items, hidden, lora),
            scored=scored,
            scores=copy_to_host(torch.stack(scores)) if scores else None,
        )

    def prepare_next(self) -> None:
        """What can be done for the next step while a GPU still runs this one."""
        if self._graphs is not None:
            self._graphs.prepare_next()

    def _logits(self, hidden: torch.Tensor, lora: Any, rows: list[int]) -> torch.Tensor:
        """float32 [len(rows), vocab_size]; an empty tensor where no row is asked for."""
        if not rows:
            return torch.empty(0, 0)
        if len(rows) == len(hidden):
            return self.model.logits(hidden, lora)
        index = to_device(torch.tensor(rows, dtype=torch.int64), self.device)
        return self.model.logits(hidden[index], lora.select(rows) if lora is not None else None)

    def _prompt_logprobs(
        self, items: list[tuple[Sequence, int]], hidden: torch.Tensor, lora: Any
    ) -> list[PromptLogprobs]:
        found = []
        first_row = 0
        for sequence, num_new_tokens in items:
            if sequence.wants_prompt_logprobs:
                found.append(self._chunk(sequence, num_new_tokens, hidden, lora, first_row))
            first_row += num_new_tokens
        return found

    def _chunk(
        self,
        sequence: Sequence,
        num_new_tokens: int,
        hidden: torch.Tensor,
        lora: Any,
        first_row: int,
    ) -> PromptLogprobs:
        """Each row tells about the token after it."""
        start = sequence.num_computed_tokens
        targets = sequence.prompt_token_ids[start + 1 : start + num_new_tokens + 1]
        num_top = sequence.params.prompt_logprobs or 0
        pieces = []
        for offset in range(0, len(targets), PROMPT_LOGPROB_ROWS):
            piece = targets[offset : offset + PROMPT_LOGPROB_ROWS]
            rows = list(range(first_row + offset, first_row + offset + len(piece)))
            copy = launch_logprobs(self._logits(hidden, lora, rows), piece, num_top)
            pieces.append((piece, copy))
        return PromptLogprobs(sequence, start == 0, pieces)


def launch_logprobs(logits: torch.Tensor, token_ids: tuple[int, ...], num_top: int) -> HostCopy:
    """Log-probabilities of given tokens and of the most likely ones, for read_logprobs.

    Args:
        logits: float32 [n, vocab_size].
        token_ids: n tokens, one per row.
        num_top: how many of the most likely tokens to report.
    """
    index = to_device(torch.tensor(token_ids, dtype=torch.int64), logits.device)
    return copy_to_host(*top_logprobs(logits, index, num_top))


def read_logprobs(token_ids: tuple[int, ...], copy: HostCopy) -> list[TokenLogprobs]:
    """What launch_logprobs has said of these tokens."""
    chosen, values, ids = (x.tolist() for x in copy.wait())
    return [
        TokenLogprobs(token_id, own, tuple(zip(top_ids, top_values, strict=True)))
        for token_id, own, top_ids, top_values in zip(token_ids, chosen, ids, values, strict=True)
    ]


@torch.inference_mode()
def measure_activation_bytes(
    model: Model,
    spec: ModelSpec,
    *,
    cache_dtype: torch.dtype,
    block_size: int,
    num_tokens: int,
    num_seqs: int,
    max_model_len: int,
    device: torch.device,
) -> int:
    """Peak memory of the largest step on CUDA, by running one, beyond what is allocated when this
    returns. (Buffers that it has made and that are used again are allocated then.) All sequences
    but one decode, at their greatest length; the rest of the tokens are prompts.

    Raises:
        NotEnoughMemory: the device cannot hold that step.
    """
    longest = min(num_tokens, max_model_len)
    blocks_per_seq = -(-longest // block_size)
    torch.cuda.synchronize(device)
    before_bytes = torch.cuda.memory_allocated(device)
    try:
        kv_caches = allocate_kv_caches(
            spec, num_blocks=blocks_per_seq, block_size=block_size, dtype=cache_dtype, device=device
        )
        cache_bytes = torch.cuda.memory_allocated(device) - before_bytes
        torch.cuda.reset_peak_memory_stats(device)
        # All share the same blocks: what they hold does not matter here.
        items = []
        num_decodes = min(num_seqs, num_tokens) - 1
        tokens, table = [0] * max_model_len, [0] * -(-max_model_len // block_size)
        for _ in range(num_decodes):
            items.append((_profiled(tokens, max_model_len - 1, table), 1))
        table = list(range(blocks_per_seq))
        for start in range(num_decodes, num_tokens, longest):
            length = min(longest, num_tokens - start)
            items.append((_profiled([0] * length, 0, table), length))
        batch = make_batch(items, block_size=block_size, device=device)
        hidden = model(batch, kv_caches, None)
        logits = model.logits(hidden[: max(num_seqs, PROMPT_LOGPROB_ROWS)], None)
        # The sampler holds up to four numbers beside each logit: a probability, a sorted copy and
        # an index of 8 bytes; or, at once, a logit as scaled, a weight, and two counts of 2 bytes.
        sampling_bytes = 4 * logits.nbytes
        torch.cuda.synchronize(device)
        peak_bytes = torch.cuda.max_memory_allocated(device)
        del kv_caches, batch, hidden, logits
        kept_bytes = torch.cuda.memory_allocated(device) - before_bytes
    except torch.OutOfMemoryError as error:
        raise NotEnoughMemory(
            f"A step of {num_tokens} tokens does not fit beside the weights: {error} "
            f"Lower --max-num-batched-tokens."
        ) from error
    return peak_bytes - before_bytes - cache_bytes - kept_bytes + sampling_bytes


def _profiled(token_ids: list[int], num_computed_tokens: int, block_table: list[int]) -> Sequence:
    request = GenerateRequest(
        request_id="profile", prompt_token_ids=(0,), params=SamplingParams(max_tokens=1)
    )
    sequence = Sequence(request=request, arrival=0, token_ids=token_ids)
    sequence.num_computed_tokens, sequence.block_table = num_computed_tokens, block_table
    return sequence
