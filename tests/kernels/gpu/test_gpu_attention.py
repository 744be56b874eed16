import math

import pytest
import torch

from kernels import paged_attention
from kernels.fp8_cache import FP8
from kernels.gpu import attention
from kernels.gpu import device as gpu
from kernels.paged_attention import KV_SPLIT, paged_attention_reference, write_kv_cache

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# The GPU's products round weights to 16 bits; the interpreter truncates results to bfloat16.
NOISE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
MIXED = [(5, 5), (1, 1), (290, 33), (33, 1), (530, 1), (0, 1), (KV_SPLIT, 3)]
"""(context length, new tokens); a context of 0 is padding."""


GEOMETRIES = [((2, 2), 64), ((4, 1), 96), ((8, 1), 128)]
"""Query and kv heads; head_dim."""


class Batch:
    """Random sequences in a cache whose blocks lie in random order, full of NaN elsewhere.

    A sequence's numbers depend on its place in `parts` as first given: slices can be compared.
    """

    def __init__(
        self, parts, device, *, heads=(4, 2), head_dim=64, block_size=16, dtype=torch.float32,
        cache_dtype=None, first_seed=0,
    ):  # fmt: skip
        num_heads, num_kv_heads = heads
        cache_dtype = cache_dtype or dtype
        lens = [context for context, _ in parts]
        num_blocks = [-(-length // block_size) for length in lens]
        shape = (sum(num_blocks) + 2, block_size, num_kv_heads, head_dim)
        caches = [torch.full(shape, math.nan).to(cache_dtype) for _ in range(2)]
        scales = None
        if cache_dtype == FP8:
            scales = tuple(torch.full(shape[:3], 255, dtype=torch.uint8) for _ in range(2))
        free = torch.randperm(shape[0], generator=torch.Generator().manual_seed(0)).tolist()
        tables = torch.full((len(lens), max(num_blocks)), -1, dtype=torch.int32)
        queries = []
        for seq, (context, new) in enumerate(parts):
            generator = torch.Generator().manual_seed(first_seed + seq)
            draw = lambda n, h, g=generator: torch.randn(n, h, head_dim, generator=g).to(dtype)  # noqa: E731
            queries.append(draw(max(context, 1), num_heads)[-new:])
            k, v = draw(context, num_kv_heads), draw(context, num_kv_heads)
            v *= 10 ** torch.randn(context, 1, 1, generator=generator).to(dtype)
            tables[seq, : num_blocks[seq]] = torch.tensor(
                [free.pop() for _ in range(num_blocks[seq])], dtype=torch.int32
            )
            at = torch.arange(context)
            slots = tables[seq, at // block_size].long() * block_size + at % block_size
            write_kv_cache(k, v, *caches, slots, scales)
        self.new = [new for _, new in parts]
        bounds = torch.tensor([0, *self.new]).cumsum(0).int()
        cpu = torch.cat(queries), *caches, tables, torch.tensor(lens).int(), bounds
        self.cpu, self.cpu_scales, self.scale = cpu, scales, head_dim**-0.5
        self.there = tuple(tensor.to(device) for tensor in cpu)
        self.scales = scales and tuple(tensor.to(device) for tensor in scales)

    def arguments(self, window=None):
        return *self.there, self.scale, window, *([self.scales] if self.scales else [])

    def attend(self, window=None):
        assert attention.accepts(*self.arguments(window))
        return attention.run(*self.arguments(window))

    def check(self, window=None, noise=None):
        """Hold the kernels against the reference in float32."""
        q, *caches, tables, lens, bounds = self.cpu
        if self.cpu_scales is None:
            caches = [cache.float() for cache in caches]
        expected = paged_attention_reference(
            q.float(), *caches, tables, lens, bounds, self.scale, window, self.cpu_scales
        )
        actual = self.attend(window)
        assert actual.dtype == q.dtype
        noise = noise or NOISE[q.dtype]
        for ours, theirs in zip(
            actual.cpu().float().split(self.new), expected.split(self.new), strict=True
        ):
            assert (ours - theirs).abs().max() <= noise * theirs.abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "head_dim"), GEOMETRIES)
def test_decodes_chunks_and_padding_in_one_batch(dtype, heads, head_dim, device):
    Batch(MIXED, device, heads=heads, head_dim=head_dim, dtype=dtype).check()


@pytest.mark.parametrize(("window", "block_size"), [(1, 16), (7, 64), (64, 16), (300, 64)])
def test_a_sliding_window(window, block_size, device):
    Batch(MIXED, device, heads=(2, 1), block_size=block_size, dtype=torch.float16).check(window)


@pytest.mark.parametrize(("heads", "head_dim"), GEOMETRIES)
@pytest.mark.parametrize("window", [None, 40])
def test_an_8_bit_cache(heads, head_dim, window, device):
    dtype = torch.float32 if device.type == "cpu" else torch.float16
    batch = Batch(MIXED, device, heads=heads, head_dim=head_dim, dtype=dtype, cache_dtype=FP8)
    batch.check(window)


@pytest.mark.parametrize("geometry", [((7, 1), 20), ((3, 1), 32), ((20, 1), 16), ((1, 1), 256)])
def test_unusual_heads(geometry, device):
    heads, head_dim = geometry
    Batch(MIXED, device, heads=heads, head_dim=head_dim, dtype=torch.float16).check()


@pytest.mark.parametrize("length", [1, KV_SPLIT - 1, KV_SPLIT, KV_SPLIT + 1, 17 * KV_SPLIT + 3])
def test_one_sequence_of_any_length(length, device):
    Batch([(length, 1)], device, heads=(2, 1), head_dim=32).check()


@pytest.mark.parametrize("cache_dtype", [torch.float16, torch.float32, FP8])
def test_the_cache_may_have_another_dtype(cache_dtype, device):
    batch = Batch(MIXED, device, heads=(2, 1), dtype=torch.bfloat16, cache_dtype=cache_dtype)
    batch.check()


@pytest.mark.parametrize("cache_dtype", [torch.float16, FP8])
def test_a_token_has_the_same_bits_alone_and_in_company(cache_dtype, device, monkeypatch):
    parts = [(290, 33), (530, 1), (33, 1), (KV_SPLIT + 9, 3)]
    kind = {"heads": (2, 1), "dtype": torch.float16, "cache_dtype": cache_dtype}
    together = Batch(parts, device, **kind).attend()
    monkeypatch.setattr(gpu, "num_processors", lambda _: 1)  # all splits to one program
    for seq, out in enumerate(together.split([new for _, new in parts])):
        alone = Batch([parts[seq]], device, first_seed=seq, **kind)
        assert torch.equal(alone.attend(), out)


def test_a_token_has_the_same_bits_with_drafts_behind_it_and_without(device):
    heads = (8, 1)  # two tokens a tile
    batch = Batch([(270, 7)], device, heads=heads, dtype=torch.float16)
    together = batch.attend()
    q, *caches, tables, _, _ = batch.there
    # Under the interpreter only the first of a tile: numpy's sums depend on a row's place.
    for place in (0, 2, 4, 6) if device.type == "cpu" else range(7):
        lens, bounds = torch.tensor([264 + place]).int(), torch.tensor([0, 1]).int()
        alone = attention.run(
            q[place : place + 1], *caches, tables, lens.to(device), bounds.to(device),
            batch.scale, None,
        )  # fmt: skip
        assert torch.equal(alone[0], together[place])


def test_the_bits_of_a_chunk_do_not_depend_on_where_it_was_cut(device):
    whole = Batch([(300, 60)], device, dtype=torch.float16)
    expected = whole.attend()
    q, *caches, tables, _, _ = whole.there
    # Under the interpreter only where its tiles begin: numpy's sums depend on a row's place.
    cuts = [(0, 32), (16, 60), (32, 52)]
    if device.type == "cuda":
        cuts += [(0, 25), (11, 60), (37, 57)]
    for start, stop in cuts:
        bounds, lens = torch.tensor([0, stop - start]), torch.tensor([240 + stop])
        part = attention.run(
            q[start:stop], *caches, tables, lens.int().to(device), bounds.int().to(device),
            whole.scale, None,
        )  # fmt: skip
        assert torch.equal(part, expected[start:stop])


def test_where_the_batch_must_not_show_a_chunk_s_tokens_are_decodes(device, monkeypatch):
    batch = Batch([(70, 12), (0, 1), (40, 3)], device, heads=(2, 1), dtype=torch.float16)
    monkeypatch.setattr(attention, "batch_invariant", lambda: True)
    together = batch.attend(50)
    q, *caches, tables, _, _ = batch.there
    for place, seq, position in [(0, 0, 58), (11, 0, 69), (13, 2, 37), (15, 2, 39)]:
        lens, bounds = torch.tensor([position + 1]), torch.tensor([0, 1])
        alone = attention.run(
            q[place : place + 1], *caches, tables[seq : seq + 1], lens.int().to(device),
            bounds.int().to(device), batch.scale, 50,
        )  # fmt: skip
        assert torch.equal(alone[0], together[place])
    batch.check(50)


def test_a_workspace_too_small_for_all_sequences_is_used_in_turn(device, monkeypatch):
    parts = [(40, 1), (530, 1), (300, 2)]
    batch = Batch(parts, device, heads=(2, 1), dtype=torch.float16)
    expected = batch.attend()
    monkeypatch.setattr(paged_attention, "MAX_WORKSPACE_BYTES", 1)
    assert torch.equal(batch.attend(), expected)


@pytest.mark.parametrize("cache_dtype", [torch.float16, FP8])
def test_what_is_not_finite_stays_in_its_sequence_and_shows(cache_dtype, device):
    parts = [(50, 50), (60, 1), (60, 20)]
    batch = Batch(parts, device, dtype=torch.float16, cache_dtype=cache_dtype)
    expected = batch.attend()
    broken = batch.there[3][1, 0]  # the second sequence's first block
    if cache_dtype == FP8:
        batch.scales[1][broken] = 255
    else:
        batch.there[2][broken] = math.nan
    actual = batch.attend()
    assert torch.equal(actual[:50], expected[:50])
    assert torch.equal(actual[51:], expected[51:])
    assert not actual[50].isfinite().any()


def test_very_large_scores_do_not_overflow(device):
    batch = Batch([(20, 20), (300, 1)], device)
    batch.cpu[0].mul_(1e4)
    batch.there[0].copy_(batch.cpu[0])
    batch.check(noise=1e-3)


def test_an_empty_batch_is_fine(device):
    q, *rest = Batch([(5, 1)], device).there
    nothing = torch.zeros(0, dtype=torch.int32, device=device)
    tables, bounds = rest[2][:0], torch.zeros(1, dtype=torch.int32, device=device)
    out = attention.run(q[:0], *rest[:2], tables, nothing, bounds, 1.0, None)
    assert out.shape == (0, 4, 64)


@pytest.mark.parametrize("what", ["dtype", "wide", "blocks", "strides", "group"])
def test_what_the_kernels_are_not_made_for_is_declined(what, device):
    q, k, v, *rest = Batch([(5, 1)], device, head_dim=16).there
    if what == "dtype":
        q = q.double()
    elif what == "wide":
        q, k, v = (x.repeat(1, 1, 32) if x is q else x.repeat(1, 1, 1, 32) for x in (q, k, v))
    elif what == "blocks":
        k, v = k[:, :12].contiguous(), v[:, :12].contiguous()
    elif what == "strides":
        k = k.transpose(1, 2).contiguous().transpose(1, 2)
    else:
        q = q.repeat(1, 33, 1)
    assert not attention.accepts(q, k, v, *rest, 1.0, None)
