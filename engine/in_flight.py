"""A step that has been launched and whose tokens the host has not read.

While the device runs step t, the host schedules step t+1 and launches its layers: where a sequence
goes on with a token of step t, its position, slot and blocks follow from counts, and the token
itself is taken from step t's tensor on the device. Then the host waits for step t's tokens, appends
them, and launches what chooses the tokens of step t+1 from its logits: for that, grammars and
counted tokens are known again, and the layers of t+1 keep the device busy meanwhile.

    host    | schedule, layers t+1 | read t | choose t+1 | deltas of t | schedule, layers t+2 | ...
    device  ... layers t | choose t |         layers t+1                  | choose t+1 | ...

Ends     by max_tokens follow from counts: no further step is launched for such a sequence. An end
         by a stop token or an error is noticed when step t+1 has its layers in flight: that row is
         left out where tokens are chosen. What it computes is stored where nobody looks: behind the
         last token, in blocks whose next owner runs in a later step. A block is offered to other
         prompts when the tokens of the step that has filled it have been read.
Order    The device runs what is launched in the order of launching, on one stream. All reuse of
         blocks, of adapters' rows and of their memory by later steps rests on that.
Waits    For what there is no launching ahead: guessed tokens, preemption, and training.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.api import TokenLogprobs
from engine.batch import LastTokens
from engine.model_runner import PromptLogprobs, StepResult
from engine.sampler import Pending, SampledToken, Sampler
from engine.sequence import Sequence
from engine.transfers import HostCopy, to_device


@dataclass(frozen=True, slots=True)
class Brought:
    """A step's results on the host."""

    tokens: list[tuple[Sequence, SampledToken]]
    """One per row; a sequence with drafts has more than one."""
    prompt_logprobs: list[tuple[Sequence, list[TokenLogprobs | None]]]
    scores: list[tuple[Sequence, float]]


@dataclass(slots=True)
class StepInFlight:
    """What was launched, and where its results arrive."""

    items: list[tuple[Sequence, int]]
    pending: Pending | None
    """None: no sequence gets a token."""
    prompt_logprobs: list[PromptLogprobs]
    scored: list[Sequence]
    scores: HostCopy | None

    @property
    def last_tokens(self) -> LastTokens | None:
        """For the step after it; of a sequence with drafts it does not tell which is the last."""
        if self.pending is None:
            return None
        rows = {sequence: row for row, sequence in enumerate(self.pending.sequences)}
        return LastTokens(self.pending.token_ids, rows)

    def wait(self, sampler: Sampler) -> Brought:
        """Read all of it, once the device has come so far."""
        tokens = []
        if self.pending is not None:
            tokens = list(zip(self.pending.sequences, sampler.finish(self.pending), strict=True))
        scores = self.scores.wait()[0].tolist() if self.scores is not None else []
        return Brought(
            tokens=tokens,
            prompt_logprobs=[(chunk.sequence, chunk.wait()) for chunk in self.prompt_logprobs],
            scores=list(zip(self.scored, scores, strict=True)),
        )


def launch_choice(sampler: Sampler, result: StepResult) -> Pending | None:
    """Have tokens chosen for those rows of a step whose sequences have not ended meanwhile."""
    rows = [row for row, sequence in enumerate(result.sampled) if not sequence.has_ended]
    if not rows:
        return None
    if len(rows) == len(result.sampled):
        return sampler.launch(result.logits, result.sampled)
    logits = result.logits[to_device(torch.tensor(rows), result.logits.device)]
    return sampler.launch(logits, [result.sampled[row] for row in rows])
