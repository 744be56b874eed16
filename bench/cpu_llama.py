"""llama.cpp's part of bench/cpu.py, run by an interpreter that has llama-cpp-python and gguf.

Run      PYTHON -m bench.cpu_llama FOLDER --threads N --type Q4_0    (bench/cpu.py does)
Models   GGUF files made from folder/dense, the same random numbers, by llama.cpp's own quantiser.
Method   llama_decode in this process, without sampling and without a server: the most that one of
         its servers could reach. A batch of decodes is one call with a token of each sequence.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np

from bench.cpu_load import best, memory_row, resident_bytes, speed_row

MODULES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
TOP = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
CONTEXT = 4096


def read_safetensors(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """The bfloat16 tensors of a file, as float32."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        start = file.tell()
        for name, entry in header.items():
            if name != "__metadata__":
                first, last = entry["data_offsets"]
                file.seek(start + first)
                words = np.frombuffer(file.read(last - first), dtype=np.uint16)
                values = (words.astype(np.uint32) << 16).view(np.float32)
                yield name, values.reshape(entry["shape"])


def gguf_name(name: str) -> str:
    """model.layers.3.mlp.up_proj.weight -> blk.3.ffn_up.weight."""
    if name in TOP:
        return TOP[name]
    path, _, kind = name.removeprefix("model.layers.").rpartition(".")
    index, _, module = path.partition(".")
    return f"blk.{index}.{MODULES[module]}.{kind}"


def make_gguf(folder: Path, quant_type: str) -> Path:
    """folder/<type>.gguf, unless it is there."""
    target = folder / f"{quant_type}.gguf"
    if target.exists():
        return target
    dense = folder / "dense.gguf"
    if not dense.exists():
        config = json.loads((folder / "dense" / "config.json").read_text())
        writer = gguf.GGUFWriter(folder / "dense.partial", "llama")
        writer.add_vocab_size(config["vocab_size"])
        writer.add_context_length(config["max_position_embeddings"])
        writer.add_embedding_length(config["hidden_size"])
        writer.add_block_count(config["num_hidden_layers"])
        writer.add_feed_forward_length(config["intermediate_size"])
        writer.add_head_count(config["num_attention_heads"])
        writer.add_head_count_kv(config["num_key_value_heads"])
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
        writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
        writer.add_tokenizer_model("llama")
        pieces = json.loads((folder / "nf4" / "tokenizer.json").read_text())["model"]["vocab"]
        writer.add_token_list(list(pieces))
        writer.add_token_scores([0.0] * len(pieces))
        writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * (len(pieces) - 259))
        writer.add_file_type(1)
        for file in sorted((folder / "dense").glob("*.safetensors")):
            for name, values in read_safetensors(file):
                small = values.astype(np.float16) if values.ndim == 2 else values
                writer.add_tensor(gguf_name(name), small)
        _write(writer)
        (folder / "dense.partial").rename(dense)
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{quant_type}")
    params.nthread = 2
    partial = target.with_suffix(".partial")
    if llama_cpp.llama_model_quantize(str(dense).encode(), str(partial).encode(), params):
        raise SystemExit(f"llama.cpp could not quantise {dense} to {quant_type}")
    partial.rename(target)
    return target


def make_lora(folder: Path) -> Path:
    """folder/adapter-0.gguf from the PEFT adapter of that name, unless it is there."""
    target = folder / "adapter-0.gguf"
    if not target.exists():
        source = folder / "adapter-0"
        config = json.loads((source / "adapter_config.json").read_text())
        writer = gguf.GGUFWriter(folder / "adapter.partial", "llama")
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", float(config["lora_alpha"]))
        for name, values in read_safetensors(source / "adapter_model.safetensors"):
            path = name.removeprefix("base_model.model.")
            path, _, kind = path.removesuffix(".weight").rpartition(".")
            part = {"lora_A": "lora_a", "lora_B": "lora_b"}[kind]
            writer.add_tensor(f"{gguf_name(path + '.weight')}.{part}", values.astype(np.float16))
        _write(writer)
        (folder / "adapter.partial").rename(target)
    return target


def _write(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Llama:
    """A model and one context."""

    def __init__(self, path: Path, num_threads: int) -> None:
        params = llama_cpp.llama_model_default_params()
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        context = llama_cpp.llama_context_default_params()
        context.n_ctx, context.n_batch, context.n_ubatch = CONTEXT, 2048, 512
        context.n_seq_max, context.kv_unified = 16, True
        context.n_threads = context.n_threads_batch = num_threads
        self.context = llama_cpp.llama_init_from_model(self.model, context)
        if not self.model or not self.context:
            raise SystemExit(f"llama.cpp could not load {path}")
        self._batch = llama_cpp.llama_batch_init(2048, 0, 1)
        self._random = np.random.default_rng(0)

    def use_adapter(self, path: Path) -> None:
        """From now on, for every sequence."""
        adapter = llama_cpp.llama_adapter_lora_init(self.model, str(path).encode())
        adapters = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(adapter)
        scales = (llama_cpp.ctypes.c_float * 1)(1.0)
        if llama_cpp.llama_set_adapters_lora(self.context, adapters, 1, scales):
            raise SystemExit(f"llama.cpp could not use {path}")

    def run_s(self, tokens: list[tuple[int, int, bool]]) -> float:
        """Seconds of one call, without its preparation: (sequence, position, whether its logits are
        wanted) each, random token ids.
        """
        batch = self._batch
        batch.n_tokens = len(tokens)
        for i, (sequence, position, wants_logits) in enumerate(tokens):
            batch.token[i] = int(self._random.integers(3, 32_000))
            batch.pos[i] = position
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = sequence
            batch.logits[i] = wants_logits
        started = time.perf_counter()
        if llama_cpp.llama_decode(self.context, batch):
            raise SystemExit("llama_decode failed")
        llama_cpp.llama_synchronize(self.context)
        return time.perf_counter() - started

    def clear(self) -> None:
        """Forget all sequences."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)

    def decode_s(self, batch: int, num_steps: int, prompt_len: int = 32) -> float:
        """Seconds of num_steps calls in which each of `batch` sequences gets a token."""
        self.clear()
        for sequence in range(batch):
            self.run_s([(sequence, i, i == prompt_len - 1) for i in range(prompt_len)])
        return sum(
            self.run_s([(sequence, prompt_len + step, True) for sequence in range(batch)])
            for step in range(num_steps)
        )

    def prefill_s(self, num_tokens: int) -> float:
        """Seconds for a prompt of num_tokens."""
        self.clear()
        return self.run_s([(0, i, i == num_tokens - 1) for i in range(num_tokens)])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--type", choices=["Q4_0", "IQ4_NL", "Q4_K_M"], default="Q4_0")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 2, 4, 8, 16])
    parser.add_argument("--prompts", type=int, nargs="*", default=[32, 512, 2048])
    parser.add_argument("--adapters", type=int, nargs="*", default=[0, 1])
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--patience", type=float, default=15, help="seconds for a row at most")
    options = parser.parse_args()
    path = make_gguf(options.folder, options.type)
    before_bytes = resident_bytes()
    started = time.perf_counter()
    llama = Llama(path, options.threads)
    load_s = time.perf_counter() - started
    llama.decode_s(1, 4)
    embedding = next(
        tensor for tensor in gguf.GGUFReader(path).tensors if tensor.name == "token_embd.weight"
    )
    size = llama_cpp.llama_model_size(llama.model)
    rows: list[dict[str, Any]] = [
        {
            "kind": "memory",
            "read_bytes": size - int(embedding.n_bytes),
            "weights_bytes": size,
            "resident_before_bytes": before_bytes,
            **memory_row(),
            "load_s": round(load_s, 2),
            "version": llama_cpp.__version__,
        }
    ]
    for num_adapters in [number for number in options.adapters if number < 2]:
        if num_adapters:
            llama.use_adapter(make_lora(options.folder))
        for batch in options.batches:
            row = best(
                functools.partial(llama.decode_s, batch, options.steps),
                options.repeats,
                options.patience,
            )
            num_tokens = batch * options.steps
            rows.append(speed_row("decode", batch, num_adapters, num_tokens, row))
        for num_tokens in options.prompts:
            row = best(
                functools.partial(llama.prefill_s, num_tokens), options.repeats, options.patience
            )
            rows.append(speed_row("prefill", num_tokens, num_adapters, num_tokens, row))
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
