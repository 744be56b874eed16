"""Runs the few PTX instructions that the kernels' inline assembly is made of, on numpy arrays.

Every register is a uint32 or uint64 array with one element per thread of a block; memory is a
dict of uint32 arrays by name of the space. The strings are run as they stand in the source.
"""

import re

import numpy as np

SHARED_BASE = {"herd_pairs": 0x400, "herd_scales": 0x400 + 32768}


class Block:
    """One thread block: its special registers, operands ($0, $1 ...) and shared memory."""

    def __init__(self, num_threads, operands, global_memory=None):
        thread = np.arange(num_threads, dtype=np.uint32)
        self.num_threads = num_threads
        self.registers = {"%tid.x": thread, "%laneid": thread % 32}
        self.registers |= {f"${i}": value for i, value in operands.items()}
        self.shared = np.full(0x400 // 4 + 8192 + 256, 0xDEADBEEF, dtype=np.uint32)
        self.global_memory = global_memory
        self.bank_conflicts = 0

    def run(self, ptx):
        """Execute straight-line PTX; any instruction that is not known is an error."""
        for statement in re.sub(r"//[^\n]*", "", ptx).replace("{ .reg", ".reg").split(";"):
            text = statement.strip().strip("\n").removeprefix("{\n").strip()
            if text in ("", "}") or text.startswith((".reg", ".shared")):
                continue
            opcode, _, rest = text.partition(" ")
            operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", rest)
            getattr(self, "op_" + opcode.split(".")[0])(opcode, operands)
        return self

    def value(self, name):
        if name in self.registers:
            return self.registers[name]
        number = SHARED_BASE[name] if name in SHARED_BASE else int(name, 0)
        return np.full(self.num_threads, number, dtype=np.uint32)

    def address(self, text):
        name, _, offset = text.strip("[]").partition("+")
        return self.value(name).astype(np.int64) + int(offset or "0")

    def binary(self, operands, function):
        left, right = (self.value(name) for name in operands[1:])
        wide = np.uint64 if left.dtype == np.uint64 else np.uint32
        self.registers[operands[0]] = function(left.astype(wide), right.astype(wide))

    def op_mov(self, _, operands):
        self.registers[operands[0]] = self.value(operands[1]).copy()

    def op_add(self, _, operands):
        self.binary(operands, lambda a, b: a + b)

    def op_and(self, _, operands):
        self.binary(operands, lambda a, b: a & b)

    def op_shl(self, _, operands):
        self.binary(operands, lambda a, b: a << b)

    def op_shr(self, _, operands):
        self.binary(operands, lambda a, b: a >> b)

    def op_mul(self, opcode, operands):
        assert opcode == "mul.wide.u32"
        left, right = (self.value(name).astype(np.uint64) for name in operands[1:])
        self.registers[operands[0]] = left * right

    def op_lop3(self, _, operands):
        a, b, c = (self.value(name) for name in operands[1:4])
        table, result = int(operands[4], 0), np.zeros_like(a)
        for case in range(8):
            if table >> case & 1:
                terms = ((a, 4), (b, 2), (c, 1))
                x, y, z = (value if case & bit else ~value for value, bit in terms)
                result |= x & y & z
        self.registers[operands[0]] = result

    def op_shfl(self, opcode, operands):
        assert opcode == "shfl.sync.idx.b32"
        assert operands[3:] == ["31", "0xffffffff"]
        thread = self.registers["%tid.x"]
        source = (thread & ~np.uint32(31)) + self.value(operands[2]) % 32
        self.registers[operands[0]] = self.value(operands[1])[source]

    def op_ld(self, opcode, operands):
        at = self.address(operands[1])
        if opcode == "ld.global.b32":
            self.registers[operands[0]] = self.global_memory[at // 4]
        else:
            assert opcode == "ld.shared.b32"
            assert not (at % 4).any()
            for warp in at.reshape(-1, 32):
                banks = np.unique(warp // 4) % 32  # lanes at one address share the load
                self.bank_conflicts += len(banks) - len(np.unique(banks))
            self.registers[operands[0]] = self.shared[at // 4]

    def op_st(self, opcode, operands):
        names = [name.strip() for name in operands[1].strip("{}").split(",")]
        assert opcode == ("st.shared.b32" if len(names) == 1 else "st.shared.v4.b32")
        at = self.address(operands[0])
        assert not (at % (4 * len(names))).any()
        for i, name in enumerate(names):
            self.shared[at // 4 + i] = self.value(name)

    def op_bar(self, opcode, operands):
        assert (opcode, operands) == ("bar.sync", ["0"])
