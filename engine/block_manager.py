"""Who owns which block of the KV cache, and which full blocks can be shared.

Every block is in exactly one of three states: used (one or more sequences hold it), cached (nobody
holds it, but its content is known and may serve a later prompt; least recently used first out) or
free. Sharing copies nothing: two sequences with an equal beginning hold the same block ids, and
only full blocks are shared, so nobody ever writes into a block that another sequence can see.

A block's name is a chained BLAKE2b hash: of the block before it and of its own token ids. The chain
starts with what
else the keys and values depend on: the adapter's uid and generation and the scale it is applied at.
A cryptographic hash, because a collision would show one user another user's context.
"""

from __future__ import annotations

import array
import hashlib
from collections import Counter, OrderedDict, deque
from collections.abc import Iterable

from engine.sequence import Sequence


class BlockManager:
    """Fixed blocks, reference counts, prefix cache. Block ids are 0..num_blocks-1."""

    def __init__(
        self, num_blocks: int, block_size: int, *, enable_prefix_caching: bool = True
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.prefix_cache_queries = 0
        self.prefix_cache_hits = 0
        self._free: deque[int] = deque(range(num_blocks))
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._ref_counts = [0] * num_blocks
        self._hash_of_block: list[bytes | None] = [None] * num_blocks
        self._block_of_hash: dict[bytes, int] = {}

    @property
    def num_available(self) -> int:
        """Blocks that can be handed out now: free ones and cached ones."""
        return len(self._free) + len(self._cached)

    @property
    def usage(self) -> float:
        """Share of the blocks held by sequences, 0..1."""
        return 1.0 - self.num_available / self.num_blocks

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that so many tokens need."""
        return -(-num_tokens // self.block_size)

    def admit(self, sequence: Sequence, num_spare: int) -> bool:
        """Give a sequence all blocks its present tokens need, shared ones first.

        Args:
            sequence: holds no blocks; its num_computed_tokens becomes the length of the shared
                beginning.
            num_spare: blocks that must stay available for the sequences that already run.

        Returns:
            False, with nothing changed, when the blocks are not there.
        """
        assert not sequence.block_table and sequence.num_computed_tokens == 0
        shared = self._find_shared(sequence)
        num_new = self.num_blocks_for(sequence.num_tokens) - len(shared)
        num_revived = sum(1 for block in shared if self._ref_counts[block] == 0)
        if num_new + num_revived + num_spare > self.num_available:
            return False
        for block in shared:
            if self._ref_counts[block] == 0:
                del self._cached[block]
            self._ref_counts[block] += 1
        sequence.block_table = shared
        sequence.num_computed_tokens = len(shared) * self.block_size
        sequence.num_committed_blocks = len(shared)
        for _ in range(num_new):
            shared.append(self._take())
        if self._may_share(sequence):
            self.prefix_cache_queries += sequence.num_tokens
            self.prefix_cache_hits += sequence.num_computed_tokens
        return True

    def extend(self, sequence: Sequence, num_drafts: int = 0) -> bool:
        """Make room for all tokens of a sequence and so many drafts; False, with nothing changed,
        when it cannot."""
        num_needed = self.num_blocks_for(sequence.num_tokens + num_drafts)
        num_missing = num_needed - len(sequence.block_table)
        if num_missing > self.num_available:
            return False
        for _ in range(num_missing):
            sequence.block_table.append(self._take())
        return True

    def trim(self, sequence: Sequence) -> None:
        """Take back the blocks behind those that its tokens need: they held rejected drafts.

        The table is another list then: who has copied one list may rely on what stands in it.
        """
        num_needed = self.num_blocks_for(sequence.num_tokens)
        dropped = sequence.block_table[num_needed:]
        if not dropped:
            return
        sequence.block_table = sequence.block_table[:num_needed]
        for block in reversed(dropped):
            assert self._ref_counts[block] == 1 and self._hash_of_block[block] is None
            self._ref_counts[block] = 0
            self._free.append(block)

    def commit(self, sequence: Sequence) -> None:
        """Offer the blocks that have become full and computed to later prompts."""
        if not self.enable_prefix_caching:
            return
        num_full = sequence.num_computed_tokens // self.block_size
        if num_full == sequence.num_committed_blocks:
            return
        self._extend_hashes(sequence, num_full)
        for index in range(sequence.num_committed_blocks, num_full):
            name = sequence.block_hashes[index]
            # A twin computed in the same step keeps its own nameless block: correct, merely not
            # shared.
            if name not in self._block_of_hash:
                block = sequence.block_table[index]
                self._block_of_hash[name] = block
                self._hash_of_block[block] = name
        sequence.num_committed_blocks = num_full

    def release(self, sequence: Sequence) -> None:
        """Take all blocks back; those with known content stay cached until the space is needed.

        A step in flight may still write into the others: whoever gets them runs in a later step,
        and the device runs steps in the order of their launch.
        """
        # Last block first, so that the end of a text is evicted before its beginning.
        for block in reversed(sequence.block_table):
            self._ref_counts[block] -= 1
            if self._ref_counts[block] == 0:
                if self._hash_of_block[block] is None:
                    self._free.append(block)
                else:
                    self._cached[block] = None
        sequence.block_table = []

    def forget(self, sequence: Sequence) -> None:
        """Make sure that no later prompt reads this sequence's blocks: their content is suspect."""
        for block in sequence.block_table:
            self._drop_name(block)

    def check_integrity(self, sequences: Iterable[Sequence]) -> None:
        """Raise AssertionError unless the books agree with the tables of all living sequences."""
        held = Counter(block for sequence in sequences for block in sequence.block_table)
        free, cached = set(self._free), set(self._cached)
        used = {block for block, count in enumerate(self._ref_counts) if count > 0}
        assert len(free) == len(self._free), "a block is free twice"
        assert len(free) + len(cached) + len(used) == self.num_blocks, (
            f"{len(free)} free + {len(cached)} cached + {len(used)} used != {self.num_blocks}"
        )
        assert not free & cached and not free & used and not cached & used, "a block has two states"
        for block, count in enumerate(self._ref_counts):
            assert count == held[block], (
                f"block {block}: {count} references, held {held[block]} times"
            )
        for name, block in self._block_of_hash.items():
            assert self._hash_of_block[block] == name, f"block {block} is known under another name"
        named = {block for block, name in enumerate(self._hash_of_block) if name is not None}
        assert len(named) == len(self._block_of_hash), "a named block cannot be found"
        assert cached <= named and not free & named, "cached blocks have names, free ones have none"

    def _may_share(self, sequence: Sequence) -> bool:
        # Log-probabilities of the prompt need every position computed.
        return self.enable_prefix_caching and not sequence.wants_prompt_logprobs

    def _find_shared(self, sequence: Sequence) -> list[int]:
        """The longest known beginning, in blocks; the last token is always left to compute."""
        if not self._may_share(sequence):
            return []
        num_full = (sequence.num_tokens - 1) // self.block_size
        self._extend_hashes(sequence, num_full)
        shared: list[int] = []
        for name in sequence.block_hashes[:num_full]:
            block = self._block_of_hash.get(name)
            if block is None:
                break
            shared.append(block)
        return shared

    def _extend_hashes(self, sequence: Sequence, num_full: int) -> None:
        hashes, size = sequence.block_hashes, self.block_size
        while len(hashes) < num_full:
            start = len(hashes) * size
            tokens = array.array("q", sequence.token_ids[start : start + size])
            parent = hashes[-1] if hashes else _chain_start(sequence)
            hashes.append(hashlib.blake2b(parent + tokens.tobytes(), digest_size=32).digest())

    def _take(self) -> int:
        if self._free:
            block = self._free.popleft()
        else:
            block, _ = self._cached.popitem(last=False)
            self._drop_name(block)
        self._ref_counts[block] = 1
        return block

    def _drop_name(self, block: int) -> None:
        name = self._hash_of_block[block]
        if name is not None:
            del self._block_of_hash[name]
            self._hash_of_block[block] = None


def _chain_start(sequence: Sequence) -> bytes:
    adapter = sequence.adapter
    if adapter is None:
        return b"base"
    scale = float(sequence.request.lora_scale).hex()
    return f"adapter {adapter.uid} generation {adapter.generation} scale {scale}".encode()
