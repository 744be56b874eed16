import pytest
import torch

from kernels.attention_input import rotate_and_cache
from kernels.fp8_cache import FP8, quantize_heads, scale_values
from kernels.fused import apply_rotary, rms_norm
from kernels.paged_attention import paged_attention, write_kv_cache


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Cache:
    """An 8-bit cache of some blocks of 4 slots, codes and scales of all ones."""

    def __init__(self, num_blocks, num_kv_heads=2, head_dim=16):
        shape = (num_blocks, 4, num_kv_heads, head_dim)
        self.k, self.v = (torch.full(shape, 1.0).to(FP8) for _ in range(2))
        self.scales = tuple(torch.full(shape[:3], 127, dtype=torch.uint8) for _ in range(2))

    def values(self):
        pairs = zip((self.k, self.v), self.scales, strict=True)
        return [codes.float() * scale_values(scales)[..., None] for codes, scales in pairs]


def test_a_head_s_largest_number_uses_the_upper_half_of_the_range():
    x = randn(500, 64) * torch.logspace(-30, 30, 500)[:, None]
    codes, scales = quantize_heads(x)
    largest = codes.float().abs().amax(dim=1)
    assert largest.min() >= 224 and largest.max() <= 448
    error = (codes.double() * scale_values(scales).double()[:, None] - x.double()).abs()
    assert (error <= x.double().abs() * 2**-4 + scale_values(scales).double()[:, None] / 1024).all()


def test_numbers_that_eight_bits_hold_come_back_exactly():
    x = torch.tensor([[448.0, -3.5, 0.0, 2**-9], [1.0, 0.125, -0.25, 0.0]]) * 2.0**20
    codes, scales = quantize_heads(x)
    assert torch.equal(codes.float() * scale_values(scales)[:, None], x)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 2.0**127])
def test_what_is_not_finite_is_not_hidden(bad):
    codes, scales = quantize_heads(torch.tensor([[1.0, bad], [0.0, 0.0], [1.0, 2.0]]))
    values = codes.float() * scale_values(scales)[:, None]
    assert not values[0].isfinite().all()
    assert torch.equal(values[1:], torch.tensor([[0.0, 0.0], [1.0, 2.0]]))


def test_keys_and_values_are_written_with_their_scales_and_nowhere_else():
    cache, k, v = Cache(3), randn(3, 2, 16), randn(3, 2, 16, seed=1) * 1000
    write_kv_cache(k, v, cache.k, cache.v, torch.tensor([9, -1, 2]), cache.scales)
    keys, values = cache.values()
    for held, written in ((keys, k), (values, v)):
        torch.testing.assert_close(held[2, 1], written[0], rtol=2**-4, atol=1e-2 * 1000)
        torch.testing.assert_close(held[0, 2], written[2], rtol=2**-4, atol=1e-2 * 1000)
        assert int((held != 1).any(3).any(2).sum()) == 2


@pytest.mark.parametrize("new", [1, 5, 40])
def test_attention_reads_what_the_cache_holds(new):
    cache, length = Cache(12), 45
    k, v = randn(length, 2, 16), randn(length, 2, 16, seed=1)
    table = torch.randperm(12, generator=torch.Generator().manual_seed(0))[None].int()
    at = torch.arange(length)
    slots = table[0, at // 4].long() * 4 + at % 4
    write_kv_cache(k, v, cache.k, cache.v, slots, cache.scales)
    q, options = randn(new, 4, 16, seed=2), {"scale": 0.25, "sliding_window": 30}
    sizes = table, torch.tensor([length]).int(), torch.tensor([0, new]).int()
    actual = paged_attention(q, cache.k, cache.v, *sizes, kv_scales=cache.scales, **options)
    expected = paged_attention(q, *cache.values(), *sizes, **options)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_padding_does_no_harm_to_others():
    cache, q = Cache(1), randn(2, 4, 16)
    tables, lens = torch.tensor([[0], [-1]]).int(), torch.tensor([3, 0]).int()
    bounds = torch.tensor([0, 1, 2]).int()
    padded = paged_attention(q, *cache.values(), tables, lens, bounds, scale=1.0)
    alone = paged_attention(q[:1], *cache.values(), tables[:1], lens[:1], bounds[:2], scale=1.0)
    assert torch.equal(padded[:1], alone)


@pytest.mark.parametrize("is_fp8", [False, True])
@pytest.mark.parametrize("has_norm", [False, True])
def test_rotating_and_caching_is_its_steps_one_after_another(is_fp8, has_norm):
    q, k, v = randn(3, 4, 16), randn(3, 2, 16, seed=1), randn(3, 2, 16, seed=2)
    angles, slots = randn(3, 8, seed=3), torch.tensor([1, -1, 6])
    norms = (randn(16, seed=4), randn(16, seed=5)) if has_norm else None
    caches = [Cache(2), Cache(2)]
    pairs = [(c.k, c.v) if is_fp8 else [t.clone() for t in c.values()] for c in caches]
    scales = [c.scales if is_fp8 else None for c in caches]
    angles = angles.cos(), angles.sin()
    rotated = rotate_and_cache(
        q, k, v, *angles, *pairs[0], slots, norms=norms, eps=1e-5, kv_scales=scales[0]
    )
    if norms is not None:
        q, k = rms_norm(q, norms[0], 1e-5), rms_norm(k, norms[1], 1e-5)
    q, k = apply_rotary(q, k, *angles)
    write_kv_cache(k, v, *pairs[1], slots, scales[1])
    assert torch.equal(rotated, q)
    for ours, theirs in zip(pairs[0], pairs[1], strict=True):
        assert torch.equal(ours.float(), theirs.float())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kv_scales": None}, "kv_scales: expected scales, as k_cache is 8-bit, got None"),
        ({"k_cache": torch.zeros(1, 4, 2, 16)}, "k_cache.dtype: expected torch.float8_e4m3fn"),
        (
            {"kv_scales": (torch.zeros(1, 4, 2).byte(), torch.zeros(1, 4, 3).byte())},
            r"v_scales.shape: expected \(1, 4, 2\), got \(1, 4, 3\)",
        ),
        ({"kv_scales": (torch.zeros(1, 4, 2),) * 2}, "k_scales.dtype: expected torch.uint8"),
    ],
)
def test_scales_that_do_not_belong_to_the_cache_are_named(changes, message):
    cache, heads = Cache(1), torch.zeros(2, 2, 16)
    arguments = {
        "k": heads, "v": heads, "k_cache": cache.k, "v_cache": cache.v,
        "slot_mapping": torch.arange(2), "kv_scales": cache.scales,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        write_kv_cache(**{**arguments, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"v": torch.zeros(2, 1, 16)}, r"v.shape: expected \(2, 2, 16\)"),
        ({"k": torch.zeros(3, 2, 16)}, r"k.shape: expected \(2, 2, 16\)"),
        ({"cos": torch.zeros(2, 16)}, r"cos.shape: expected \(2, 8\)"),
        ({"k": torch.zeros(2, 2, 16).half()}, "k.dtype, v.dtype: expected torch.float32"),
        ({"slot_mapping": torch.arange(3)}, r"slot_mapping.shape: expected \(2,\), got \(3,\)"),
    ],
)
def test_wrong_arguments_of_rotating_and_caching_are_named(changes, message):
    heads, angles, cache = torch.zeros(2, 2, 16), torch.zeros(2, 8), torch.zeros(1, 4, 2, 16)
    arguments = {
        "q": torch.zeros(2, 4, 16), "k": heads, "v": heads, "cos": angles, "sin": angles,
        "k_cache": cache, "v_cache": cache, "slot_mapping": torch.arange(2),
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        rotate_and_cache(**{**arguments, **changes})
