"""Keys in order, made ready bit by bit, and the stretches of keys that are deleted.

Law: pure; nothing in here takes longer than a few milliseconds at a time, however many keys
there are, because it happens in the event loop.  What a scan may still be looking at is never
changed: whatever changes is made anew, block by block.

One sorted list of a million keys would be cheapest to read, but has to be made: half a
second in the first scan.  So keys are sorted in short runs as they come, and eight short
runs become a long one (the first levels of a log-structured merge tree: O'Neil et al.,
Acta Informatica 33, 1996); a scan merges the runs.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, groupby
from typing import Final, final

RUN_KEYS: Final = 4096
"""Keys that are sorted at once: about a millisecond."""
RUN_KEYS_READ: Final = 256
"""The same while somebody reads, who is to skip them one by one as they came after him."""
RUNS_MERGED: Final = 8
"""Short runs that become a longer one, those again a long one: about three milliseconds."""
BLOCK_KEYS: Final = 512
"""What is copied to take a key out of a run, or to change a gap: about a microsecond."""
COPIED_KEYS: Final = 32
"""At most so many keys are copied for a scan, in which they may be left."""
STALE_MIN: Final = 64
"""So many fresh keys, and a sixteenth of them, may be gone before they are sorted out."""


def _part(block: list[bytes], low: int, high: int) -> Iterator[bytes]:
    """A few keys are copied, which is the fastest way to read them; of more, those that are
    asked for are taken."""
    if high - low <= COPIED_KEYS:
        return iter(block[low:high])
    if high - low == len(block):
        return iter(block)
    return map(block.__getitem__, range(low, high))


def _part_backwards(block: list[bytes], low: int, high: int) -> Iterator[bytes]:
    if high - low <= COPIED_KEYS:
        return reversed(block[low:high])
    if high - low == len(block):
        return reversed(block)
    return map(block.__getitem__, range(high - 1, low - 1, -1))


@final
class Run:
    """Keys in order, in blocks; never changed."""

    __slots__ = ("_blocks", "_lasts", "size")

    def __init__(self, blocks: list[list[bytes]], lasts: list[bytes], size: int) -> None:
        self._blocks = blocks
        self._lasts = lasts
        """No key of the block is above this, and all of the next one are."""
        self.size: Final = size

    @classmethod
    def of(cls, keys: list[bytes]) -> Run:
        """Of keys that are sorted."""
        blocks = [keys[first : first + BLOCK_KEYS] for first in range(0, len(keys), BLOCK_KEYS)]
        return cls(blocks, [block[-1] for block in blocks], len(keys))

    def __iter__(self) -> Iterator[bytes]:
        return chain.from_iterable(self._blocks)

    def between(
        self, start: bytes | None, stop: bytes | None, reverse: bool
    ) -> Iterator[bytes] | None:
        """``start <= key < stop``; None where there is none.

        There may be dozens of runs, and most scans are left after a few keys.  So no block is
        copied, and the end is looked for only when its block is reached.
        """
        return self._backwards(start, stop) if reverse else self._forwards(start, stop)

    def _forwards(self, start: bytes | None, stop: bytes | None) -> Iterator[bytes] | None:
        blocks, lasts = self._blocks, self._lasts
        place = low = 0
        if start is not None and blocks[0][0] < start:
            place = bisect_left(lasts, start)
            if place < len(lasts):
                low = bisect_left(blocks[place], start)
                if low == len(blocks[place]):
                    place, low = place + 1, 0
            if place == len(lasts):
                return None
        block = blocks[place]
        if stop is not None and block[low] >= stop:
            return None
        if stop is not None and lasts[place] >= stop:
            return _part(block, low, bisect_left(block, stop, low))
        if place == len(lasts) - 1:
            return _part(block, low, len(block))
        return chain.from_iterable(self._parts(place, low, stop))

    def _parts(self, place: int, low: int, stop: bytes | None) -> Iterator[Iterable[bytes]]:
        """Block by block, from a key in one of them on."""
        for number in range(place, len(self._blocks)):
            block = self._blocks[number]
            if stop is not None and self._lasts[number] >= stop:
                yield _part(block, low, bisect_left(block, stop, low))
                return
            yield _part(block, low, len(block))
            low = 0

    def _backwards(self, start: bytes | None, stop: bytes | None) -> Iterator[bytes] | None:
        blocks, lasts = self._blocks, self._lasts
        place = len(blocks) - 1
        high = len(blocks[place])
        if stop is not None and blocks[place][-1] >= stop:
            place = bisect_left(lasts, stop)
            high = bisect_left(blocks[place], stop)
            if not high:
                if not place:
                    return None
                place -= 1
                high = len(blocks[place])
        block = blocks[place]
        if start is not None and block[high - 1] < start:
            return None
        if start is not None and block[0] < start:
            return _part_backwards(block, bisect_left(block, start, 0, high), high)
        if not place:
            return _part_backwards(block, 0, high)
        return chain.from_iterable(self._parts_backwards(place, high, start))

    def _parts_backwards(
        self, place: int, high: int, start: bytes | None
    ) -> Iterator[Iterable[bytes]]:
        """Block by block, from before a key in one of them on."""
        for number in range(place, -1, -1):
            block = self._blocks[number]
            if number < place:
                high = len(block)
            if start is not None and block[0] < start:
                yield _part_backwards(block, bisect_left(block, start, 0, high), high)
                return
            yield _part_backwards(block, 0, high)

    def without(self, keys: list[bytes], found: set[bytes]) -> Run:
        """The same without those of ``keys``, which are sorted, that it has; these are added
        to ``found``."""
        if 8 * len(keys) > self.size:
            return self._without_many(keys, found)
        blocks, lasts = self._blocks, self._lasts
        taken: dict[int, list[bytes]] = {}
        for key in keys:
            place = bisect_left(lasts, key)
            if place == len(lasts):
                break
            block = taken.get(place) or blocks[place]
            at = bisect_left(block, key)
            if at < len(block) and block[at] == key:
                taken[place] = block[:at] + block[at + 1 :]
                found.add(key)
                if not taken[place]:
                    # An empty one would not be found among ``taken`` again.
                    return self._with(taken).without(keys, found)
        return self._with(taken) if taken else self

    def _with(self, taken: dict[int, list[bytes]]) -> Run:
        blocks, lasts = self._blocks.copy(), self._lasts
        size = self.size
        empty: list[int] = []
        for place, block in taken.items():
            size -= len(blocks[place]) - len(block)
            blocks[place] = block
            if not block:
                empty.append(place)
        if empty:
            lasts = lasts.copy()
            for place in reversed(empty):
                del blocks[place], lasts[place]
        return Run(blocks, lasts, size)

    def _without_many(self, keys: list[bytes], found: set[bytes]) -> Run:
        gone = set(keys)
        left: list[list[bytes]] = []
        for block in self._blocks:
            if block[-1] < keys[0] or block[0] > keys[-1]:
                left.append(block)
                continue
            found.update(gone.intersection(block))
            kept = [key for key in block if key not in gone]
            if kept:
                left.append(kept)
        return Run(left, [block[-1] for block in left], sum(map(len, left)))


@final
class Order:
    """The keys of one moment; those that came since may be among them."""

    __slots__ = ("_sorted", "fresh", "runs")

    def __init__(self, runs: Sequence[Run], fresh: list[bytes]) -> None:
        self.runs: Sequence[Run] = runs
        self.fresh: list[bytes] = fresh
        self._sorted = 0
        """So many fresh keys there were when they were sorted."""

    def between(self, start: bytes | None, stop: bytes | None, *, reverse: bool) -> Iterator[bytes]:
        """``start <= key < stop`` without repetition, or backwards; None is no bound.

        To be used up before another key comes.
        """
        found: list[Iterator[bytes]] = []
        for run in self.runs:
            part = run.between(start, stop, reverse)
            if part is not None:
                found.append(part)
        fresh = self.fresh
        if fresh:
            if self._sorted != len(fresh):
                fresh.sort()
                self._sorted = len(fresh)
            low = 0 if start is None else bisect_left(fresh, start)
            high = len(fresh) if stop is None else bisect_left(fresh, stop, low)
            if low < high:
                places = range(high - 1, low - 1, -1) if reverse else range(low, high)
                found.append(map(fresh.__getitem__, places))
        if len(found) == 1:
            return found[0]
        if not found:
            return iter(())
        # One that was taken out of a run since, and came again, is fresh as well.
        return (key for key, _ in groupby(heapq.merge(*found, reverse=reverse)))


@final
class SortedKeys:
    """Byte strings, ascending, none of them twice."""

    __slots__ = ("_order", "_runs", "fresh", "stale")

    def __init__(self, keys: Iterable[bytes] = ()) -> None:
        self._runs: list[Run] = [Run.of(found)] if (found := sorted(keys)) else []
        self._order: Order | None = None
        self.fresh: list[bytes] = []
        """New keys are appended here, unless they are among those that are stale and then are
        not any more; `tidy` is called when there are `RUN_KEYS`."""
        self.stale: set[bytes] = set()
        """Fresh ones that are gone."""

    @property
    def order(self) -> Order:
        """The keys of this moment: a new object when others than new ones have changed."""
        if self._order is None:
            self._order = Order(tuple(self._runs), self.fresh)
        return self._order

    def between(self, start: bytes | None, stop: bytes | None, *, reverse: bool) -> Iterator[bytes]:
        """As `Order.between`; some may be stale."""
        return self.order.between(start, stop, reverse=reverse)

    def tidy(self, at_least: int = 1) -> None:
        """Make a run of the new keys, if there are so many."""
        self._sort_out()
        fresh = self.fresh
        if len(fresh) < at_least:
            return
        self.fresh = []
        fresh.sort()
        self._runs.append(Run.of(fresh))
        self._order = None
        for size in (RUN_KEYS, RUN_KEYS * RUNS_MERGED):
            self._merge(size)

    def _merge(self, size: int) -> None:
        """Runs that have come to be too many, or too short because their keys have gone."""
        short = sorted((run for run in self._runs if run.size < size), key=lambda run: run.size)
        if len(short) < RUNS_MERGED:
            return
        merged: list[Run] = []
        total = 0
        while short and total + short[0].size < 2 * size:
            run = short.pop(0)
            total += run.size
            merged.append(run)
        self._runs = [run for run in self._runs if run not in merged]
        self._runs.append(Run.of(sorted(chain.from_iterable(merged))))

    def discard(self, keys: list[bytes]) -> None:
        """These, which are sorted, are gone.  A stale key among them stays that."""
        runs = self._runs
        for place in range(len(runs) - 1, -1, -1):
            if not keys:
                break
            found: set[bytes] = set()
            run = runs[place].without(keys, found)
            if not found:
                continue
            keys = [key for key in keys if key not in found]
            if run.size:
                runs[place] = run
            else:
                del runs[place]
            self._order = None
        if keys:
            self.stale.update(keys)
            if len(self.stale) > STALE_MIN + len(self.fresh) // 16:
                self._sort_out()

    def _sort_out(self) -> None:
        stale = self.stale
        if stale:
            self.fresh = [key for key in self.fresh if key not in stale]
            self.stale = set()
            self._order = None


@final
class Gaps:
    """Disjoint stretches of keys, each from its first to its last key.

    Every block holds ``first, last, first, last ...``; the two may be the same.  A block is
    never changed, but another put in its place.
    """

    __slots__ = ("_blocks", "_lasts")

    def __init__(self, blocks: Iterable[list[bytes]] = (), lasts: Iterable[bytes] = ()) -> None:
        self._blocks = list(blocks)
        self._lasts = list(lasts)

    def __bool__(self) -> bool:
        return bool(self._blocks)

    def copy(self) -> Gaps:
        return Gaps(self._blocks, self._lasts)

    def around(self, key: bytes) -> tuple[bytes, bytes] | None:
        """The one that contains the key."""
        place = bisect_left(self._lasts, key)
        if place == len(self._lasts):
            return None
        block = self._blocks[place]
        at = bisect_left(block, key)
        if at % 2:
            return block[at - 1], block[at]
        return (block[at], block[at + 1]) if block[at] == key else None

    def beyond(self, bound: bytes | None, reverse: bool) -> bytes | None:
        """The bound of a range, moved out of the gap that it stands in."""
        if bound is None or (gap := self.around(bound)) is None:
            return bound
        return gap[0] if reverse else gap[1] + b"\0"

    def between(
        self, start: bytes | None, stop: bytes | None, reverse: bool
    ) -> Iterator[tuple[bytes, bytes]]:
        """Those whose first key is in the range; backwards, those whose last key is."""
        blocks, lasts = self._blocks, self._lasts
        if reverse:
            end = len(lasts) - 1 if stop is None else min(bisect_left(lasts, stop), len(lasts) - 1)
            for place in range(end, -1, -1):
                block = blocks[place]
                # An odd place is a last key.
                at = len(block) if stop is None else bisect_left(block, stop)
                for last in range(at - 1 if at % 2 == 0 else at - 2, 0, -2):
                    if start is not None and block[last] < start:
                        return
                    yield block[last - 1], block[last]
        else:
            for place in range(0 if start is None else bisect_left(lasts, start), len(lasts)):
                block = blocks[place]
                at = 0 if start is None else bisect_left(block, start)
                for first in range(at + at % 2, len(block), 2):
                    if stop is not None and block[first] >= stop:
                        return
                    yield block[first], block[first + 1]

    def put(self, first: bytes, last: bytes) -> None:
        """All of this is one, with those that it touches."""
        blocks, lasts = self._blocks, self._lasts
        place = bisect_left(lasts, first)
        if place == len(lasts):
            if not lasts or len(blocks[-1]) >= BLOCK_KEYS:
                blocks.append([first, last])
                lasts.append(last)
            else:
                blocks[-1] = [*blocks[-1], first, last]
                lasts[-1] = last
            return
        block = blocks[place]
        at = bisect_left(block, first)
        if at % 2:
            at -= 1
            first = block[at]
        end = min(bisect_left(lasts, last, place), len(lasts) - 1)
        behind = blocks[end]
        after = bisect_right(behind, last)
        if after % 2:
            last = behind[after]
            after += 1
        made = [*block[:at], first, last, *behind[after:]]
        pieces = [made]
        if len(made) > 2 * BLOCK_KEYS:
            pieces = [made[n : n + BLOCK_KEYS] for n in range(0, len(made), BLOCK_KEYS)]
        blocks[place : end + 1] = pieces
        lasts[place : end + 1] = [piece[-1] for piece in pieces]
