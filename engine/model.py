"""The decoder-only model: a flat batch of tokens in, hidden states out; a head for logits.

Weights come in by parameter name (engine/weights.py); what is 4-bit and what is dense is decided
there, tensor by tensor. Adapters act through LoraBatch; without one nothing is spent on them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from engine.embedding import Table, look_up, whole_table
from engine.head import HeadDtype, quantize_head
from engine.layers import DecoderLayer, FusedLinear, LinearSlice
from engine.model_config import ModelSpec
from engine.whole_step import WholeStep, prepare_whole_step
from kernels.fused import add_rms_norm
from kernels.nf4 import QuantizedWeight

if TYPE_CHECKING:
    from engine.batch import Batch
    from engine.lora import LoraBatch


class CausalLM:
    """A model on one device. Built empty, filled by set_tensor, ready after finish()."""

    def __init__(self, spec: ModelSpec, *, device: torch.device, dtype: torch.dtype) -> None:
        self.spec = spec
        self.device = device
        self.dtype = dtype
        """Of activations and of all tensors that are not 4-bit."""
        self.embed_tokens: Table = torch.empty(0)  # [vocab_size, hidden_size]
        self.layers = [DecoderLayer(spec, index) for index in range(spec.num_layers)]
        self.norm = torch.empty(0)  # [hidden_size]
        self.lm_head = FusedLinear([LinearSlice("lm_head", *spec.embedding_shape)])
        self.inv_freq = spec.rope.inverse_frequencies(spec.head_dim).to(
            device
        )  # float32 [head_dim / 2]
        self._whole_step: WholeStep | None = None
        self._projections = {
            part.path: (fused, part) for fused in self._fused() for part in fused.slices
        }

    def __call__(
        self,
        batch: Batch,
        kv_caches: list[tuple[torch.Tensor, ...]],
        lora: LoraBatch | None = None,
    ) -> torch.Tensor:
        return self.forward(batch, kv_caches, lora)

    def forward(
        self,
        batch: Batch,
        kv_caches: list[tuple[torch.Tensor, ...]],
        lora: LoraBatch | None = None,
    ) -> torch.Tensor:
        """Run one step.

        Args:
            batch: input_ids and positions int64 [num_tokens]; cu_seqlens_q, context_lens,
                block_tables and slot_mapping as attention takes them.
            kv_caches: one (k_cache, v_cache) per layer; this step's keys and values are written
                into them.
            lora: the batch's adapters, or None.

        Returns:
            Hidden states after the final norm, [num_tokens, hidden_size].
        """
        hidden = look_up(self.embed_tokens, batch.input_ids)  # [num_tokens, hidden_size]
        if lora is not None:
            hidden = lora.embedding(batch.input_ids, hidden)
        angles = batch.positions.unsqueeze(-1) * self.inv_freq  # float32 [num_tokens, head_dim / 2]
        cos, sin = angles.cos(), angles.sin()
        if self._whole_step is not None:
            done = self._whole_step.run(hidden, cos, sin, batch, kv_caches, lora)
            if done is not None:
                return done
        residual = None
        for layer, kv_cache in zip(self.layers, kv_caches, strict=True):
            hidden, residual = layer(hidden, residual, cos, sin, batch, kv_cache, lora)
        assert residual is not None
        hidden, _ = add_rms_norm(hidden, residual, self.norm, self.spec.rms_norm_eps)
        return hidden

    def logits(self, hidden: torch.Tensor, lora: LoraBatch | None = None) -> torch.Tensor:
        """The head over chosen tokens.

        Args:
            hidden: [n, hidden_size].
            lora: the adapters of these n tokens, or None.

        Returns:
            float32 [n, vocab_size].
        """
        return self.lm_head(hidden, lora).float()

    def base_linear(self, path: str) -> LinearSlice:
        """The base's linear layer at a module path: .weight (4-bit or dense) and .bias."""
        return self._projections[path][1]

    def set_tensor(self, name: str, value: torch.Tensor | QuantizedWeight) -> None:
        """Put one checkpoint tensor in its place; dense ones are cast to the model's dtype.

        The model may keep the tensor itself: the caller must not hand over memory that it will
        reuse.
        """
        path, _, kind = name.rpartition(".")
        if isinstance(value, torch.Tensor):
            value = value.to(device=self.device, dtype=self.dtype)
        if path in self._projections:
            fused, part = self._projections[path]
            if kind == "weight":
                fused.set_weight(part, value, self.device)
            else:
                assert isinstance(value, torch.Tensor)
                part.bias = value
            return
        assert isinstance(value, torch.Tensor), name
        if path == "model.embed_tokens":
            self.embed_tokens = value
        elif path == "model.norm":
            self.norm = value
        else:
            _, _, index, module = path.split(".", 3)  # model.layers.<index>.[self_attn.]<norm>
            setattr(self.layers[int(index)], module.removeprefix("self_attn."), value)

    def finish(self, lm_head_dtype: HeadDtype = "auto") -> None:
        """Tie the head where the spec says so, quantise it where that is asked for, and choose each
        projection's way of running.

        Raises:
            CheckpointError: the head cannot be quantised.
        """
        head = self.lm_head.slices[0]
        if self.spec.tie_word_embeddings:
            head.weight = whole_table(self.embed_tokens)
        if isinstance(head.weight, torch.Tensor):
            weight = quantize_head(head.weight, lm_head_dtype)
            self.lm_head.set_weight(head, weight, self.device)
        for fused in self._fused():
            fused.finish()
        self._whole_step = prepare_whole_step(self.spec, self.layers, self.norm)

    def _fused(self) -> list[FusedLinear]:
        return [fused for layer in self.layers for fused in layer.projections] + [self.lm_head]
