import pytest
import torch

from kernels.paged_attention import KV_SPLIT, paged_attention, write_kv_cache

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


class PagedSequences:
    """Random queries, keys and values of some sequences, and a cache that holds them.

    The cache is full of NaN but for the slots that are written, blocks lie in random order, and a
    sequence's numbers depend on its length alone, so that batches can be compared.
    """

    def __init__(
        self, lens, *, num_heads=4, num_kv_heads=2, head_dim=16, block_size=16,
        dtype=torch.float32, cache_dtype=None, seed=0,
    ):  # fmt: skip
        self.lens, self.block_size = lens, block_size
        num_blocks = [-(-length // block_size) for length in lens]
        shape = (sum(num_blocks) + 3, block_size, num_kv_heads, head_dim)
        self.k_cache = torch.full(shape, float("nan"), dtype=cache_dtype or dtype)
        self.v_cache = self.k_cache.clone()
        free = torch.randperm(shape[0], generator=torch.Generator().manual_seed(seed)).tolist()
        self.block_tables = torch.full((len(lens), max(num_blocks)), -1, dtype=torch.int32)
        self.q, self.k, self.v = [], [], []
        for seq, length in enumerate(lens):
            generator = torch.Generator().manual_seed(length)
            draw = [(num_heads, self.q), (num_kv_heads, self.k), (num_kv_heads, self.v)]
            for heads, tensors in draw:
                tensors.append(torch.randn(length, heads, head_dim, generator=generator).to(dtype))
            for i in range(num_blocks[seq]):
                self.block_tables[seq, i] = free.pop()
            slots = self.slots(seq, torch.arange(length))
            write_kv_cache(self.k[seq], self.v[seq], self.k_cache, self.v_cache, slots)

    def slots(self, seq, positions):
        blocks = self.block_tables[seq, positions // self.block_size].long()
        return blocks * self.block_size + positions % self.block_size

    def attend(self, parts, **options):
        """Attention for (sequence, context length, new tokens) triples, in one batch: one each."""
        q = [self.q[seq][context - new : context] for seq, context, new in parts]
        bounds = torch.tensor([0] + [new for _, _, new in parts]).cumsum(0)
        out = paged_attention(
            torch.cat(q),
            self.k_cache,
            self.v_cache,
            self.block_tables[[seq for seq, _, _ in parts]],
            torch.tensor([context for _, context, _ in parts], dtype=torch.int32),
            bounds.int(),
            scale=self.q[0].shape[2] ** -0.5,
            **options,
        )
        return out.split([new for _, _, new in parts])

    def textbook(self, seq, context, new, sliding_window=None):
        """The same in float64, from the definition."""
        q = self.q[seq][context - new : context].double()
        k, v = (t[seq][:context].to(self.k_cache.dtype).double() for t in (self.k, self.v))
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        i, j = torch.arange(context - new, context)[:, None], torch.arange(context)
        visible = (j <= i) & (i - j < (sliding_window or context))
        scores = torch.einsum("ihd,jhd->hij", q, k) * q.shape[2] ** -0.5
        weights = scores.masked_fill(~visible, float("-inf")).softmax(dim=-1)
        return torch.einsum("hij,jhd->ihd", weights, v)


GEOMETRIES = [  # num_heads, num_kv_heads, head_dim
    (4, 4, 16), (4, 2, 8), (7, 1, 20), (6, 2, 64), (10, 2, 80), (12, 1, 32),
]  # fmt: skip


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sliding_window", [None, 1, 7, 300])
def test_a_mixed_batch_equals_the_textbook(geometry, dtype, sliding_window):
    num_heads, num_kv_heads, head_dim = geometry
    sequences = PagedSequences(
        [5, 290, 33, 600, 1],
        num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, dtype=dtype,
    )  # fmt: skip
    parts = [(0, 5, 5), (1, 290, 33), (2, 33, 1), (3, 600, 1), (4, 1, 1), (3, 500, 150)]
    actual = sequences.attend(parts, sliding_window=sliding_window)
    for part, out in zip(parts, actual, strict=True):
        assert out.dtype == dtype
        expected = sequences.textbook(*part, sliding_window)
        torch.testing.assert_close(out.double(), expected, atol=TOLERANCE[dtype], rtol=0)


@pytest.mark.parametrize("cache_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_cache_may_have_another_dtype(dtype, cache_dtype):
    sequences = PagedSequences([40, 9], dtype=dtype, cache_dtype=cache_dtype)
    for part in [(0, 40, 40), (1, 9, 1)]:
        (actual,) = sequences.attend([part])
        assert actual.dtype == dtype
        torch.testing.assert_close(
            actual.double(), sequences.textbook(*part), atol=TOLERANCE[dtype], rtol=0
        )


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("sliding_window", [None, 100])
@pytest.mark.usefixtures("num_threads")
def test_a_row_has_the_same_bits_however_it_is_computed(geometry, sliding_window):
    num_heads, num_kv_heads, head_dim = geometry
    sequences = PagedSequences(
        [600, 290, 33], num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim
    )
    (whole,) = sequences.attend([(0, 600, 600)], sliding_window=sliding_window)
    for position in (0, 128, KV_SPLIT - 1, KV_SPLIT, KV_SPLIT + 1, 599):
        decode = (0, position + 1, 1)
        (alone,) = sequences.attend([decode], sliding_window=sliding_window)
        assert torch.equal(alone[0], whole[position])
        batch = [(1, 290, 1), decode, (2, 33, 5), (2, 20, 1), (1, 280, 1)]
        _, among_others, *_ = sequences.attend(batch, sliding_window=sliding_window)
        assert torch.equal(among_others[0], whole[position])
        for new in (2, 7, 130):  # as the last token of a chunk
            if new <= position + 1:
                chunk = (0, position + 1, new)
                (rows,) = sequences.attend([chunk], sliding_window=sliding_window)
                assert torch.equal(rows, whole[position + 1 - new : position + 1])


@pytest.mark.parametrize("block_size", [1, 4, 32, 512])
def test_the_layout_of_blocks_does_not_show(block_size):
    expected = PagedSequences([300, 70]).attend([(0, 300, 20), (1, 70, 1)])
    other = PagedSequences([300, 70], block_size=block_size, seed=1)
    for ours, theirs in zip(other.attend([(0, 300, 20), (1, 70, 1)]), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_many_decodes_of_different_lengths_equal_each_alone():
    lens = list(range(1, 400, 9))
    sequences = PagedSequences(lens, num_kv_heads=4, head_dim=64, dtype=torch.bfloat16)
    parts = [(seq, length, 1) for seq, length in enumerate(lens)]
    together = sequences.attend(parts)
    for part, out in zip(parts, together, strict=True):
        assert torch.equal(out, sequences.attend([part])[0])


def test_a_sequence_that_is_not_finite_does_no_harm_to_others():
    sequences = PagedSequences([50, 60])
    parts = [(0, 50, 50), (1, 60, 1), (1, 60, 20)]
    expected = sequences.attend(parts)
    sequences.v_cache.flatten(0, 1)[sequences.slots(1, torch.arange(60))] = float("nan")
    actual = sequences.attend(parts)
    assert torch.equal(actual[0], expected[0])
    assert bool(actual[1].isnan().all())


def test_keys_outside_the_window_are_not_even_read():
    sequences = PagedSequences([600])
    expected = sequences.attend([(0, 600, 3)], sliding_window=40)
    far = sequences.slots(0, torch.arange(0, 600 - 3 - 39))
    sequences.v_cache.flatten(0, 1)[far] = float("nan")
    assert torch.equal(sequences.attend([(0, 600, 3)], sliding_window=40)[0], expected[0])


def test_a_window_as_long_as_the_context_changes_nothing():
    sequences = PagedSequences([300])
    (plain,) = sequences.attend([(0, 300, 300)])
    (windowed,) = sequences.attend([(0, 300, 300)], sliding_window=300)
    assert torch.equal(plain, windowed)


def test_very_large_scores_do_not_overflow():
    sequences = PagedSequences([20])
    sequences.q[0] *= 1e4
    (actual,) = sequences.attend([(0, 20, 20)])
    torch.testing.assert_close(actual.double(), sequences.textbook(0, 20, 20), atol=1e-4, rtol=0)


def test_a_sequence_without_new_tokens_and_an_empty_batch_are_fine():
    sequences = PagedSequences([30, 12])
    nothing, something = sequences.attend([(0, 30, 0), (1, 12, 4)])
    assert len(nothing) == 0
    assert torch.equal(something, sequences.attend([(1, 12, 4)])[0])
    empty = torch.zeros(0, 4, 16)
    out = paged_attention(
        empty, sequences.k_cache, sequences.v_cache, sequences.block_tables[:0],
        torch.zeros(0).int(), torch.zeros(1).int(), scale=1.0,
    )  # fmt: skip
    assert out.shape == empty.shape


def test_queries_may_be_a_slice_of_the_fused_projection():
    sequences = PagedSequences([30])
    fused = torch.zeros(30, 4 * 16 + 2 * 2 * 16)
    fused[:, :64] = sequences.q[0].flatten(1)
    expected = sequences.attend([(0, 30, 30)])
    sequences.q[0] = fused[:, :64].view(30, 4, 16)
    assert torch.equal(sequences.attend([(0, 30, 30)])[0], expected[0])


# Writing.


def test_tokens_are_stored_in_their_slots_and_nowhere_else():
    k_cache, v_cache = torch.zeros(3, 4, 2, 8), torch.zeros(3, 4, 2, 8)
    k, v = torch.randn(3, 2, 8), torch.randn(3, 2, 8)
    write_kv_cache(k, v, k_cache, v_cache, torch.tensor([9, -1, 2]))
    assert torch.equal(k_cache[2, 1], k[0])
    assert torch.equal(v_cache[2, 1], v[0])
    assert torch.equal(k_cache[0, 2], k[2])
    assert torch.equal(v_cache[0, 2], v[2])
    assert int(k_cache.any(dim=3).any(dim=2).sum()) == 2


def test_stored_numbers_are_rounded_to_the_caches_dtype():
    k_cache = torch.zeros(1, 4, 2, 8, dtype=torch.bfloat16)
    v_cache = k_cache.clone()
    k, v = torch.randn(1, 2, 8), torch.randn(1, 2, 8)
    write_kv_cache(k, v, k_cache, v_cache, torch.tensor([3]))
    assert torch.equal(k_cache[0, 3], k[0].bfloat16())
    assert torch.equal(v_cache[0, 3], v[0].bfloat16())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"v": torch.zeros(2, 2, 9)}, "v.shape"),
        ({"k_cache": torch.zeros(4, 2, 8)}, r"k_cache.dim\(\): expected 4, got 3"),
        ({"v_cache": torch.zeros(4, 4, 2, 8)}, r"v_cache.shape: expected \(3, 4, 2, 8\)"),
        ({"slot_mapping": torch.zeros(3).long()}, r"len\(slot_mapping\): expected 2, got 3"),
        (
            {"k": torch.zeros(2, 1, 8), "v": torch.zeros(2, 1, 8)},
            r"k.shape\[1:\]: expected \(2, 8\), got \(1, 8\)",
        ),
    ],
)
def test_wrong_arguments_of_writing_are_named(changes, message):
    arguments = {
        "k": torch.zeros(2, 2, 8), "v": torch.zeros(2, 2, 8),
        "k_cache": torch.zeros(3, 4, 2, 8), "v_cache": torch.zeros(3, 4, 2, 8),
        "slot_mapping": torch.zeros(2).long(),
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        write_kv_cache(**{**arguments, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.zeros(2, 4, 9)}, r"q.shape\[2\]: expected 8, got 9"),
        ({"q": torch.zeros(2, 32)}, r"q.dim\(\): expected 3, got 2"),
        ({"q": torch.zeros(2, 3, 8)}, r"q.shape\[1\]: expected a multiple of 2, got 3"),
        ({"v_cache": torch.zeros(3, 4, 2, 9)}, "v_cache.shape"),
        ({"block_tables": torch.zeros(2, 1).int()}, r"len\(block_tables\): expected 1, got 2"),
        ({"cu_seqlens_q": torch.zeros(3).int()}, r"len\(cu_seqlens_q\): expected 2, got 3"),
        ({"sliding_window": 0}, "sliding_window: expected a positive number or None, got 0"),
    ],
)
def test_wrong_arguments_of_attention_are_named(changes, message):
    arguments = {
        "q": torch.zeros(2, 4, 8),
        "k_cache": torch.zeros(3, 4, 2, 8), "v_cache": torch.zeros(3, 4, 2, 8),
        "block_tables": torch.zeros(1, 1).int(), "context_lens": torch.tensor([2]).int(),
        "cu_seqlens_q": torch.tensor([0, 2]).int(), "scale": 1.0,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        paged_attention(**{**arguments, **changes})
