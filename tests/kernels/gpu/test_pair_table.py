import numpy as np
import pytest
import torch

from kernels.codebooks import DYNAMIC_MAP, codebook
from kernels.gpu.pair_table import DECODE_PTX, SCALES_PTX, SHARED_BYTES, device_table, fill_ptx
from tests.kernels.gpu.ptx_emulator import Block

TYPES = [("nf4", torch.bfloat16), ("nf4", torch.float16), ("fp4", torch.bfloat16)]
SIXTEEN_BITS = torch.int16


def filled(quant_type, dtype, num_warps, operands):
    """A block whose shared memory the fill has written, with fresh operands."""
    memory = device_table(quant_type, dtype, torch.device("cpu")).numpy().view(np.uint32)
    num_threads = 32 * num_warps
    first = Block(num_threads, {1: np.zeros(num_threads, np.uint64)}, memory)
    first.run(fill_ptx(num_warps))
    block = Block(len(next(iter(operands.values()))), operands)
    block.shared = first.shared
    return block


def bits_of(values, dtype):
    return values.to(dtype).view(SIXTEEN_BITS).numpy().view(np.uint16).astype(np.uint32)


@pytest.mark.parametrize(("quant_type", "dtype"), TYPES)
@pytest.mark.parametrize("num_warps", [4, 8])
def test_every_byte_in_every_place_and_lane_becomes_its_two_weights(quant_type, dtype, num_warps):
    rng = np.random.default_rng(0)
    bytes_ = rng.integers(0, 256, (256 * 32, 4), dtype=np.uint32)
    bytes_[:, 0] = np.repeat(np.arange(256), 32)  # all bytes in all lanes
    bytes_[:, 3] = np.repeat(np.arange(256)[::-1], 32)
    word = (bytes_ << np.array([0, 8, 16, 24], np.uint32)).sum(1, dtype=np.uint32)
    block = filled(quant_type, dtype, num_warps, {4: word}).run(DECODE_PTX)
    bits = bits_of(codebook(quant_type), dtype)
    for i in range(4):  # $0 and $1: the first four weights, $2 and $3: the last
        high, low = bytes_[:, i] >> 4, bytes_[:, i] & 15
        assert np.array_equal(block.registers[f"${i}"], bits[high] | bits[low] << 16)
    assert block.bank_conflicts == 0


def test_every_scale_code_in_every_place_becomes_its_scale():
    codes = np.stack([np.roll(np.arange(256, dtype=np.uint32), i * 37) for i in range(4)], 1)
    word = (codes << np.array([0, 8, 16, 24], np.uint32)).sum(1, dtype=np.uint32)
    block = filled("nf4", torch.bfloat16, 4, {4: word}).run(SCALES_PTX)
    scales = DYNAMIC_MAP.numpy().view(np.uint32)
    for i in range(4):
        assert np.array_equal(block.registers[f"${i}"], scales[codes[:, i]])


@pytest.mark.parametrize("num_warps", [4, 8])
def test_the_fill_writes_all_of_the_shared_arrays_and_nothing_else(num_warps):
    block = filled("nf4", torch.float16, num_warps, {4: np.zeros(32, np.uint32)})
    assert (block.shared[: 0x400 // 4] == 0xDEADBEEF).all()
    assert (block.shared[0x400 // 4 :] != 0xDEADBEEF).all()
    assert len(block.shared) * 4 - 0x400 == SHARED_BYTES


def test_the_table_holds_pairs_scales_and_the_rounded_codebook():
    table = device_table("nf4", torch.bfloat16, torch.device("cpu"))
    assert table.shape == (528,)
    assert torch.equal(table[256:512].view(torch.float32), DYNAMIC_MAP)
    assert torch.equal(table[512:].view(torch.float32), codebook("nf4").bfloat16().float())
