"""A weak memory for interpreted programs: late, reordered stores; torn tiles; stale caches. All choices are seeded.

What a GPU may do, and what this does in its place:

- a store becomes visible to other programs some time later, element by element and in any order, except that two stores
  of one program to one address keep theirs: each program has a buffer of pending elements, drained at random;
- a program sees its own stores at once;
- a volatile load reads the memory as it is, but not all elements of a tile at one instant: it is read in two random
  parts, and other programs may run in between;
- any other load comes from a cache that no other program's store ever reaches: an element that another program has
  written since the launch reads as it was at the launch.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import numpy as np


class Region:
    """The memory of one tensor argument."""

    def __init__(self, name: str, tensor) -> None:
        self.name, self.tensor = name, tensor
        self.begin = tensor.data_ptr()
        self.itemsize = tensor.element_size()
        self.end = self.begin + tensor.untyped_storage().nbytes() - tensor.storage_offset() * self.itemsize
        kind = {1: ctypes.c_uint8, 2: ctypes.c_uint16, 4: ctypes.c_uint32, 8: ctypes.c_uint64}[self.itemsize]
        count = (self.end - self.begin) // self.itemsize
        self.bits = np.ctypeslib.as_array(ctypes.cast(self.begin, ctypes.POINTER(kind)), (count,)) if count else None
        # Per element, once there was a store: bits before the first one, where there was one, and 1 + the number of the
        # program that wrote it last, or 0. Pages that nobody touches take no memory, however large the tensor.
        self.at_launch = self.writer = None
        self.stored_to = False  # by any program, visible to others or not

    def index(self, addresses: np.ndarray) -> np.ndarray:
        """Numbers of the elements at `addresses`, all of which must be in this region."""
        index = (addresses.astype(np.int64) - self.begin) // self.itemsize
        assert index.min() >= 0, f"out of bounds below {self.name}"
        assert index.max() < self.bits.size, f"out of bounds above {self.name}"
        return index

    def describe(self, address: int) -> str:
        index = (address - self.begin) // self.itemsize
        place = np.unravel_index(index, tuple(self.tensor.shape)) if self.tensor.is_contiguous() else (index,)
        return f"{self.name}[{', '.join(str(int(i)) for i in place)}]"


class WeakMemory:
    """Loads and stores of the programs of one launch; `now` says which program runs."""

    def __init__(
        self,
        tensors: dict,
        programs: int,
        rng: np.random.Generator,
        drain_rate: float,
        arrived: Callable[[int, int], None],
    ) -> None:
        self.regions = [Region(name, tensor) for name, tensor in tensors.items() if tensor.numel()]
        self.rng, self.drain_rate = rng, drain_rate
        self.pending: list[list[tuple[Region, np.ndarray, np.ndarray]]] = [[] for _ in range(programs)]
        self.arrived = arrived  # told the first and the last address of every store that becomes visible
        self.now = 0

    def region_of(self, address: int) -> Region:
        for region in self.regions:
            if region.begin <= address < region.end:
                return region
        raise AssertionError(f"program {self.now} touches {address:#x}, which is in none of its tensors")

    def describe(self, address: int) -> str:
        return self.region_of(address).describe(address)

    def load(self, addresses: np.ndarray, width: int, volatile: bool) -> np.ndarray:
        """Flat, existing elements of `width` bytes as the running program sees them: (elements, width) bytes."""
        region = self.region_of(int(addresses[0]))
        if width > region.itemsize:  # several elements in one word
            parts = width // region.itemsize
            addresses = (addresses[:, None] + region.itemsize * np.arange(parts, dtype=np.uint64)).ravel()
        return self._load_elements(addresses, volatile).view(np.uint8).reshape(-1, width)

    def _load_elements(self, addresses: np.ndarray, volatile: bool) -> np.ndarray:
        region = self.region_of(int(addresses[0]))
        inside = (addresses >= region.begin) & (addresses < region.end)
        bits = self._load_from(region, addresses[inside], volatile)
        if inside.all():
            return bits
        result = np.empty(addresses.shape, bits.dtype)  # rows from several tensors, such as y and h_0
        result[inside] = bits
        result[~inside] = self._load_elements(addresses[~inside], volatile)
        return result

    def _load_from(self, region: Region, addresses: np.ndarray, volatile: bool) -> np.ndarray:
        index = region.index(addresses)
        bits = region.bits[index]
        if region.writer is not None and not volatile:
            writer = region.writer[index]
            stale = (writer > 0) & (writer != self.now + 1)
            bits = np.where(stale, region.at_launch[index], bits)
        for held, held_index, held_bits in self.pending[self.now]:
            if held is region:  # later entries overwrite earlier ones
                order = np.argsort(held_index)
                at = np.minimum(np.searchsorted(held_index, index, sorter=order), held_index.size - 1)
                found = held_index[order[at]] == index
                bits = np.where(found, held_bits[order[at]], bits)
        return bits

    def store(self, addresses: np.ndarray, bits: np.ndarray) -> None:
        """Hold flat elements back in the running program's buffer."""
        region = self.region_of(int(addresses[0]))
        index = region.index(addresses)
        region.stored_to = True
        mine = self.pending[self.now]
        overlaps = [held is region and bool(np.isin(at, index).any()) for held, at, _ in mine]
        for entry, earlier in zip(mine, overlaps, strict=True):
            if earlier:  # two stores to one address arrive in order
                self._write(self.now, *entry)
        mine[:] = [entry for entry, earlier in zip(mine, overlaps, strict=True) if not earlier]
        mine.append((region, index, bits.view(region.bits.dtype)))

    def drain_some(self) -> None:
        """Let a random part of some pending stores arrive."""
        for program, entries in enumerate(self.pending):
            if entries and self.rng.random() < self.drain_rate:
                region, index, bits = entries.pop(self.rng.integers(len(entries)))
                arrives = self.rng.random(index.size) < self.rng.choice([0.5, 1.0])
                if arrives.any():
                    self._write(program, region, index[arrives], bits[arrives])
                if not arrives.all():
                    entries.append((region, index[~arrives], bits[~arrives]))

    def drain(self) -> None:
        """Let everything arrive."""
        for program, entries in enumerate(self.pending):
            for entry in entries:
                self._write(program, *entry)
            entries.clear()

    def _write(self, program: int, region: Region, index: np.ndarray, bits: np.ndarray) -> None:
        if region.writer is None:
            region.at_launch, region.writer = np.empty_like(region.bits), np.zeros(region.bits.size, np.int32)
        first_time = index[region.writer[index] == 0]
        region.at_launch[first_time] = region.bits[first_time]
        region.bits[index] = bits
        region.writer[index] = program + 1
        first, last = int(index.min()), int(index.max())
        self.arrived(region.begin + first * region.itemsize, region.begin + last * region.itemsize)
