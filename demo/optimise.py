"""One training loop for base and adapters: AdamW, warm-up, cosine, bf16 autocast, progress bar."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

IGNORED = -100


class TokenBatch(NamedTuple):
    """What one step learns from: targets[i, j] is what follows input_ids[i, : j + 1]."""

    input_ids: Tensor  # int64 [num_rows, length]
    targets: Tensor  # int64 [num_rows, length]; IGNORED where nothing is to be learnt


def schedule(done: float, warm_up: float = 0.03, floor: float = 0.05) -> float:
    """Factor on the learning rate after this share (0..1) of the tokens."""
    if done < warm_up:
        return (done + 1e-3) / (warm_up + 1e-3)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, (done - warm_up) / (1 - warm_up))))
    return floor + (1 - floor) * cosine


def loss_of(model: nn.Module, batch: TokenBatch) -> Tensor:
    """Mean cross-entropy over the targets; logits are made only where there is one."""
    decoder, lm_head = model.get_decoder(), model.get_output_embeddings()
    hidden = decoder(input_ids=batch.input_ids, use_cache=False).last_hidden_state
    wanted = batch.targets != IGNORED
    logits = lm_head(hidden[wanted]).float()  # [num_targets, vocab_size]
    return functional.cross_entropy(logits, batch.targets[wanted])


def train(
    model: nn.Module,
    batches: Iterable[TokenBatch],
    num_tokens: int,
    *,
    learning_rate: float,
    weight_decay: float,
    name: str,
) -> None:
    """Train every parameter that requires a gradient until num_tokens have been read."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in parameters if p.dim() > 1]
    plain = [p for p in parameters if p.dim() <= 1]
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), fused=True)
    model.train()
    smooth_loss = None
    with tqdm(total=num_tokens, unit="tok", unit_scale=True, desc=name, mininterval=2.0) as bar:
        for batch in batches:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * schedule(bar.n / num_tokens)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = loss_of(model, batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            value = loss.item()
            smooth_loss = value if smooth_loss is None else 0.98 * smooth_loss + 0.02 * value
            bar.set_postfix(loss=f"{smooth_loss:.3f}", refresh=False)
            bar.update(batch.input_ids.numel())
            if bar.n >= num_tokens:
                break
