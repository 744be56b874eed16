"""What a user can set about one training run; each field is one flag of `serve.py train`.

Defaults are the paper's (QLoRA, arXiv:2305.14314, appendix B). Where a field is None the run's
resolved config says what was chosen: engine/train/defaults.py works it out from model and data.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from engine.config import require

Method = Literal["supervised", "reward", "dpo", "grpo"]
MAX_NUMBER = 2**31
"""What every number here is less than."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """Training of one adapter on the frozen 4-bit base."""

    method: Method = "supervised"
    """supervised learns the answers, reward a score head from preferences (Bradley-Terry), dpo a
    policy from preferences, grpo a policy from the scores that a reward adapter gives."""
    rank: int = 64
    """Rank of the low-rank updates."""
    alpha: float = 16.0
    """Scale of the updates: alpha / rank, or alpha / sqrt(rank) with --use-rslora."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(rank) (arXiv:2312.03732)."""
    dropout: float | None = None
    """Dropout on the updates' input; by default 0.1 up to 13B parameters, 0.05 above, and none for
    dpo and grpo."""
    target_modules: tuple[str, ...] = ()
    """Linear layer to adapt, the last parts of its name (q_proj, mlp.up_proj) or a regular
    expression for its whole name; may be repeated. All linear layers by default."""
    learning_rate: float | None = None
    """By default 2e-4 up to 13B parameters, 1e-4 above; a tenth of that for dpo and grpo."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """What the learning rate does after the warm-up."""
    warmup_ratio: float = 0.03
    """Share of the steps in which the learning rate rises from zero."""
    batch_size: int | None = None
    """Samples (pairs for reward and dpo, prompts for grpo) per optimizer step; by default 16, fewer
    where the data are few."""
    num_epochs: float | None = None
    """Passes over the data; by default as many as give enough steps, 1 to 10."""
    max_steps: int | None = None
    """End after so many optimizer steps, whatever num_epochs says."""
    max_seq_len: int | None = None
    """Tokens of a sample at most; by default the model's length. Longer samples are an error."""
    micro_batch_tokens: int | None = None
    """Tokens that run through a layer at once; gradients are accumulated over the batch. By default
    512, on a GPU 4096, or less where memory is short. It changes rounding and what dropout drops,
    nothing else."""
    packing: bool = True
    """Put several short samples in one row of a micro-batch; they never see each other."""
    group_by_length: bool = False
    """Put samples of like length in one batch."""
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    """AdamW with 32-bit or with block-wise 8-bit state."""
    paged: bool | None = None
    """Keep the optimizer's state in host memory, fetched layer by layer; by default only where the
    device is a GPU."""
    beta1: float = 0.9
    """Decay of AdamW's first moment."""
    beta2: float = 0.999
    """Decay of AdamW's second moment."""
    adam_epsilon: float = 1e-8
    """Added to AdamW's denominator."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    max_grad_norm: float = 0.3
    """Gradients are scaled down to this norm over all parameters; 0 leaves them alone."""
    neftune_alpha: float = 0.0
    """Noise on the embeddings while training (arXiv:2310.05914); 0 is none."""
    eval_every_steps: int | None = None
    """Steps between two evaluations on the validation data; by default ten in a run."""
    save_every_steps: int | None = None
    """Steps between two checkpoints; by default ten in a run."""
    keep_checkpoints: int = 3
    """Newest checkpoints kept on disk; the best is kept besides."""
    early_stopping_patience: int | None = None
    """End after so many evaluations in a row without a better one; by default never."""
    seed: int = 42
    """Of initialisation, order of the data, dropout and rollouts."""
    beta: float = 0.1
    """dpo: how closely the policy is held to the reference."""
    num_generations: int = 8
    """grpo: answers drawn for each prompt."""
    max_completion_tokens: int = 256
    """grpo: longest answer drawn."""
    temperature: float = 1.0
    """grpo: of the answers drawn."""
    kl_coefficient: float = 0.0
    """grpo: weight of the divergence from the reference in the loss; 0 leaves it out."""
    clip_epsilon: float = 0.2
    """grpo: how far a token's probability may move within one batch of answers."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int | float):
                # JSON has no infinity, and a database's integers end somewhere.
                require(abs(value) < MAX_NUMBER, field.name, f"less than {MAX_NUMBER}", value)
        positive = ("rank", "alpha", "temperature", "beta", "adam_epsilon", "clip_epsilon")
        counts = ("keep_checkpoints", "num_generations", "max_completion_tokens")
        for name in (*positive, *counts):
            require(getattr(self, name) > 0, name, "a positive number", getattr(self, name))
        optional = (
            "learning_rate", "batch_size", "num_epochs", "max_steps", "max_seq_len",
            "micro_batch_tokens", "eval_every_steps", "save_every_steps",
            "early_stopping_patience",
        )  # fmt: skip
        for name in optional:
            value = getattr(self, name)
            require(value is None or value > 0, name, "a positive number", value)
        for name in ("weight_decay", "max_grad_norm", "neftune_alpha", "kl_coefficient"):
            require(getattr(self, name) >= 0, name, "0 or more", getattr(self, name))
        for name in ("beta1", "beta2"):
            require(0 <= getattr(self, name) < 1, name, "0 <= x < 1", getattr(self, name))
        require(0 <= self.warmup_ratio <= 1, "warmup_ratio", "0 <= x <= 1", self.warmup_ratio)
        require(
            self.dropout is None or 0 <= self.dropout < 1, "dropout", "0 <= x < 1", self.dropout
        )
        require(0 <= self.seed < 2**31, "seed", "0 <= x < 2**31", self.seed)
        require(
            self.method != "grpo" or self.num_generations > 1,
            "num_generations",
            "at least 2: an advantage is relative to the others of its group",
            self.num_generations,
        )
