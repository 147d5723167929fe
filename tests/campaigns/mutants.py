"""Seeded bugs: each is put into a copy of the package, and a campaign must find it.

Law: a mutant is an exact change of the source, a text that stands there just once and what
takes its place; where the text is not there any more the campaign fails, so that a mutant
cannot quietly become none.  The package itself is never touched: a copy of what is
installed is changed, in a temporary folder, and judged in a process of its own.

Every mutant names the campaign that is expected to find it; where that does not within the
budget, the others are asked.  The package as it is must pass the same budget of every one.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

import attrs

import trio_wal

from . import _judges, _report

TESTS: Final = Path(__file__).parents[1]
PACKAGE: Final = Path(trio_wal.__file__).parent
SECONDS: Final = 60.0
"""For one judge to find one mutant."""
GRACE_SECONDS: Final = 60.0
"""A judge that has not ended so long after its time hangs."""


@attrs.frozen
class Mutant:
    name: str
    file: str
    judge: str
    """A campaign, or ``campaign:part``."""
    changes: tuple[tuple[str, str], ...]
    """(what stands there once, what takes its place)"""


def mutant(name: str, file: str, judge: str, *texts: str) -> Mutant:
    return Mutant(name, f"{file}.py", judge, tuple(zip(texts[::2], texts[1::2], strict=True)))


SIMULATOR, WHOLE, SCHEDULES = "simulator", "whole", "schedules"
REUSE: Final = "simulator:reuse"
ERRORS, BITROT, HOSTILE, BOMBS, STORE = "errors", "bitrot", "hostile", "bombs", "store"
PAGES: Final = "pages"
READERS, READERS_DB = "readers:log", "readers:database"
LEAKS: Final = "leaks"
REPLICATION: Final = "replication"
THREADS: Final = "threads"
ARCHIVE: Final = "archive"
PLAIN: Final = "plain"
REPAIR: Final = "repair"
COMMANDS: Final = "commands"
AHEAD, WAKES, WORDS = "doors:ahead", "doors:wakes", "doors:words"
GROUPS, PORTAL = "doors:groups", "doors:portal"
LINES, LINES_DB = "lines", "simulator:lines-database"
FIGURES: Final = "figures"
CONSUMERS, CONSUMERS_DB = "simulator:consumers", "simulator:consumers-database"

MUTANTS: Final = (
    # -- group commit --
    mutant(
        "acknowledged before the sync", "_disk/directory", SIMULATOR,
        "        if sync:\n            self.sync()\n        spares = ",
        "        if sync:\n            self.synced_lsn = self.last_lsn\n        spares = ",
    ),
    mutant(
        "watermark too early: what is written is called durable", "_local", "simulator:none",
        "partial(directory.write, records, self.durable_lsn, sync=sync)",
        "partial(directory.write, records, self.last_lsn, sync=sync)",
    ),
    mutant(
        "a failed sync is tried again", "_disk/directory", ERRORS,
        "            self.active.sync()\n",
        "            with contextlib.suppress(OSError):\n"
        "                self.active.sync()\n"
        "            self.active.sync()\n",
    ),
    mutant(
        "a failed write is taken for a good one", "_disk/directory", ERRORS,
        "        active.write(body, durable_lsn, self._files.time_us())\n",
        "        with contextlib.suppress(OSError):\n"
        "            active.write(body, durable_lsn, self._files.time_us())\n",
    ),
    mutant(
        "flush syncs nothing", "_flusher", ERRORS,
        "            or barrier is not None\n", "",
    ),
    mutant(
        "the records of a failed write are called not written", "_flusher", ERRORS,
        '"unknown" if unsynced else "not written"', '"not written"',
    ),
    mutant(
        "a batch whose write has failed is called not written", "_flusher", ERRORS,
        'isinstance(exc, LogFailedError) else "unknown"',
        'isinstance(exc, LogFailedError) else "not written"',
    ),
    mutant(
        "the records of a failed batch are given numbers", "_batch", ERRORS,
        "        self.mixed = True\n        self.failure =", "        self.failure =",
    ),
    mutant(
        "what is being written can be withdrawn", "_queue", WHOLE,
        "        if batch.taken or (self.owner", "        if (self.owner",
    ),
    mutant(
        "a withdrawn record leaves a gap in the numbers", "_backlog", WHOLE,
        "        batch.extra -= records - 1\n        batch.mixed = True\n        if batch.barrier",
        "        batch.extra -= records - 1\n        if batch.barrier",
    ),
    mutant(
        "what a full disk refused is written all the same", "_queue", ERRORS,
        "                item = waiting.entries.pop(task)",
        "                item = waiting.entries[task]",
    ),
    # -- repair --
    mutant(
        "copies of what a repair changes are not synced", "_disk/salvage", REPAIR,
        "                    _copy(opened, copy, progress)\n                    copy.sync()\n",
        "                    _copy(opened, copy, progress)\n",
    ),
    mutant(
        "the segment in which a repaired log goes on is not synced", "_disk/repair", REPAIR,
        "    active = new_segment(directory, header, FIRST_CAPACITY)\n"
        "    try:\n        active.sync()\n",
        "    active = new_segment(directory, header, FIRST_CAPACITY)\n"
        "    try:\n        pass\n",
    ),
    mutant(
        "no epoch begins where a repair has lost records", "_disk/salvage", REPAIR,
        "        history = branch(meta.history, salvage.last_lsn, files.random_bytes(4))\n"
        "        decided = replace(decided, history=history)\n",
        "        pass\n",
    ),
    mutant(
        "padding is cleared where it stands", "_disk/salvage", REPAIR,
        "    directory.rename(NEW_NAME, name)\n    directory.sync()\n",
        "    directory.unlink(NEW_NAME)\n"
        "    file = directory.open(name, writable=True)\n"
        "    for offset, length in piece.padding:\n"
        "        file.pwrite([bytes(length)], offset)\n"
        "    file.sync()\n"
        "    file.close()\n",
    ),
    mutant(
        "what stands behind a gap is kept", "_disk/salvage", REPAIR,
        "            if before is not None and before.leads_on:",
        "            if before is not None:",
    ),
    mutant(
        "a file that gets its name back takes another's", "_disk/salvage", REPAIR,
        "            if place == name and other != name:", "            if False:",
    ),
    mutant(
        "a repair does not ask how much the store has", "_repair", REPAIR,
        "needed_lsn=1 if state is None else state.lsn + 1)", "needed_lsn=1)",
    ),
    mutant(
        "files go before log.meta says so", "_disk/salvage", REPAIR,
        "    _write_decision(files, directory, salvage)\n    stay",
        "    stay",
        "    directory.sync()\n\n\ndef _mend(",
        "    directory.sync()\n    _write_decision(files, directory, salvage)\n\n\ndef _mend(",
    ),
    # -- checkpoints in a thread --
    mutant(
        "a checkpoint reads a layer's orders in its thread", "_layer", THREADS,
        "        self._hidden.tidy()\n        # Only runs",
        "        # Only runs",
        "        return self._newest(heapq.merge(*parts))\n",
        "        yield from self._newest(heapq.merge(*parts))\n",
    ),
    mutant(
        "a deletion that hides something in the store is dropped", "_layer", THREADS,
        "            for key in found.difference(hiding):\n",
        "            for key in found:\n",
    ),
    mutant(
        "what was replaced is forgotten though a snapshot sees it", "_layer", THREADS,
        "            if version.before is not None and oldest is None:\n",
        "            if version.before is not None:\n",
    ),
    mutant(
        "nothing in a range of the store: nothing in a longer one", "_memtable", THREADS,
        "(end is None or (stop is not None and stop <= end))",
        "(end is None or stop is not None)",
    ),
    mutant(
        "nothing in a range of the store: nothing before it", "_memtable", THREADS,
        "            if low >= nothing and (",
        "            if (",
    ),
    mutant(
        "the first key behind a stretch without keys is passed over", "_memtable", THREADS,
        "                return end\n        return edge",
        '                return end + b"\\0"\n        return edge',
    ),
    mutant(
        "a new state of the store has no key where the old one had none", "_memtable", THREADS,
        "        self._nothing: deque[tuple[bytes, bytes | None]] = deque(maxlen=NOTHING_NOTED)\n",
        "        self._nothing: deque[tuple[bytes, bytes | None]] = _NOTHING\n",
        "NEWEST: Final = 1 << 62\n",
        "NEWEST: Final = 1 << 62\n_NOTHING: Final = deque(maxlen=NOTHING_NOTED)\n",
    ),
    # -- lines, turns, the fast lane --
    mutant(
        "no turns: a line that was let in stays first", "_admission", LINES,
        "        if line.entry and len(self._heap) > 1:\n",
        "        if line.entry and len(self._heap) > 1000:\n",
    ),
    mutant(
        "turns are counted in calls, not in records", "_admission", LINES,
        "        line.tag += records\n",
        "        line.tag += 1\n",
    ),
    mutant(
        "a line that was idle has saved up its turns", "_admission", LINES,
        "                line.tag = max(line.tag, self._clock)\n",
        "                line.tag = line.tag + 0\n",
    ),
    mutant(
        "a line whose share is full stands in the way of others", "_admission", LINES,
        "        if first is not None and line.fits(first.item):",
        "        if first is not None:",
    ),
    mutant(
        "nothing is kept for high priority", "_admission", LINES,
        "        if self._highs:\n",
        "        if self._highs < 0:\n",
    ),
    mutant(
        "the reserve is kept after the last high writer has gone", "_admission", LINES,
        "            self._highs -= 1\n",
        "            self._highs -= 0\n",
    ),
    mutant(
        "high priority has no precedence", "_admission", LINES,
        "            line = None if yields else self._high.first()\n",
        "            line = self._normal.first() or self._high.first()\n",
    ),
    mutant(
        "high priority starves the others", "_admission", LINES,
        "PASSED_MAX: Final = 8\n",
        "PASSED_MAX: Final = 800\n",
    ),
    mutant(
        "somebody normal passes those who wait", "_admission", LINES,
        "            return not self.crowded and self.fits(item, batch)",
        "            return self.fits(item, batch)",
    ),
    mutant(
        "what is withdrawn stays in its writer's share", "_admission", LINES,
        "            self._less_before(records, size)\n"
        "        self.records -= records\n        self.bytes -= size\n",
        "            self._less_before(records, size)\n        self.bytes -= size\n",
    ),
    mutant(
        "a writer's share has no room again when its batch is taken", "_admission", LINES,
        "        self.records -= share.records\n        self.bytes -= share.bytes\n",
        "        self.records -= share.records\n",
    ),
    mutant(
        "who leaves a line does not let in the next", "_queue", LINES,
        "        self.admission.refresh(blocked.line)\n        if self.owner",
        "        if self.owner",
    ),
    mutant(
        "a writer does not count what it refuses", "_queue", LINES,
        "            line.rejected += 1\n",
        "",
    ),
    mutant(
        "a writer's waits are counted of the log only", "_admission", LINES,
        "        if self.name is not None:\n            self.waits.note(seconds)\n",
        "",
    ),
    mutant(
        "a commit that stood in line is not validated when it is let in", "_mvcc", LINES_DB,
        "            if validate is not None:\n                validate()\n",
        "",
    ),
    mutant(
        "a commit that stands in line has its number already", "_database_writer", LINES_DB,
        "    versions.by_turns = True\n",
        "    versions.by_turns = False\n",
    ),
    mutant(
        "a unit is written as two frames", "_disk/directory", SIMULATOR,
        "        active = self.active\n        active.write(body,",
        "        active = self.active\n"
        "        if len(records) > 1 and active.fits(body.stored_length + 600):\n"
        "            half = encode(records[:1], self.features)\n"
        "            active.write(half, durable_lsn, self._files.time_us())\n"
        "            body = encode(records[1:], self.features)\n"
        "        active.write(body,",
    ),
    # -- what an open that fails leaves --
    mutant(
        "an open without a descriptor for its worker keeps the lock", "_local", "leaks:log/eventfd",
        "            worker.close()\n        directory.abandon()\n",
        "            worker.close()\n",
    ),
    mutant(
        "a failed open leaves the files that it has made", "_disk/opening", "leaks:log/fsync",
        "                uncreate(directory, found_names, created=plan.meta is None)\n",
        "                pass\n",
    ),
    mutant(
        "a failed open leaves the directory that it has made", "_system/files", "leaks:log/flock",
        "        remove_directories(made)\n\n    def lock", "\n    def lock",
    ),
    mutant(
        "a failed open of a database leaves its directory", "_opening", "leaks:database/eventfd",
        "            self._remove_made()\n", "            pass\n",
    ),
    mutant(
        "an undone creation is cut off from the log's lock file only", "_disk/repair",
        "leaks:log/replace",
        "            is_temporary(name)\n", "            False\n",
    ),
    mutant(
        "a segment that cannot be sealed stays open", "_disk/segment", "leaks:log/ftruncate",
        "        finally:\n            self.file.close()\n",
        "        except ValueError:\n            self.file.close()\n        self.file.close()\n",
    ),
    mutant(
        "the new segment of a failed rotation stays open", "_disk/directory", "leaks:log/ftruncate",
        "            close_quietly(active.file)\n            raise\n", "            raise\n",
    ),
    mutant(
        "a thread that cannot be started is waited for", "_worker", "leaks:log/thread",
        "            except OSError as exc:\n                self._died = exc\n",
        "            except OSError as exc:\n                self._died = exc\n"
        "                await trio.sleep_forever()\n",
    ),
    # -- segments, rotation, recycling --
    mutant(
        "no directory sync for a new segment", "_disk/segment", SIMULATOR,
        "    directory.rename(old_name, header.name)\n    directory.sync()\n",
        "    directory.rename(old_name, header.name)\n",
    ),
    mutant(
        "a new segment's header is not synced before its name", "_disk/segment", SIMULATOR,
        "    write_header(file, header, capacity)\n    file.sync()\n",
        "    write_header(file, header, capacity)\n",
    ),
    mutant(
        "no terminator", "_disk/segment", REUSE,
        "            end = terminator_end(end, self.capacity)\n", "            pass\n",
    ),
    mutant(
        "a terminator is written by itself, after the sync", "_disk/segment", REUSE,
        "            end = terminator_end(end, self.capacity)\n", "            pass\n",
        "            self._settled = max(self._settled, self._written)\n",
        "            self._settled = max(self._settled, self._written)\n"
        "        if self.header.reused:\n"
        "            self.file.pwrite([bytes(BLOCK)], self.position.offset)\n"
        "            self.file.sync()\n",
    ),
    mutant(
        "no terminator behind a new header", "_disk/segment", REUSE,
        "terminator_end(DATA_OFFSET, capacity) - BLOCK if header.reused else 0", "0",
    ),
    mutant(
        "a footer has a terminator", "_disk/segment", REUSE,
        "if self.header.reused and kind is not Kind.SEAL:", "if self.header.reused:",
    ),
    mutant(
        "old bytes without the feature that says so", "_disk/spares", REUSE,
        "            features = FEATURE_REUSED\n", "            features = 0\n",
    ),
    mutant(
        "all that stands behind a terminator is called torn", "_disk/scan", REUSE,
        "    if segment.reused:\n        torn_end", "    if False:\n        torn_end",
    ),
    mutant(
        "nothing behind a terminator is looked at", "_disk/scan", BITROT,
        "    for offset in _pieces(position.offset, size, next_data):\n",
        "    for offset in () if segment.reused else _pieces(position.offset, size, next_data):\n",
    ),
    mutant(
        "a rotation does not sync the segment before", "_disk/directory", "simulator:interval",
        "old.rewrite_marks() or self._unsynced\n            self.sync()\n",
        "old.rewrite_marks() or self._unsynced\n",
    ),
    mutant(
        "footers are not synced", "_disk/segment", SIMULATOR,
        "        self._has_pointer = True\n        self.file.sync()\n",
        "        self._has_pointer = True\n",
    ),
    mutant(
        "a sealed segment is not cut at its end", "_disk/segment", SIMULATOR,
        "        self.file.truncate(self.position.offset)\n", "",
    ),
    mutant(
        "no salt: a segment's checksums start from nothing", "_disk/frame", "simulator:cut",
        "return crc32c(_SEED.pack(self.salt, self.number))", "return 0",
    ),
    mutant(
        "a frame of another place is taken", "_disk/frame", BITROT,
        "    if at != offset or crc32c", "    if crc32c",
    ),
    mutant(
        "what could not be removed is forgotten", "_disk/spares", "errors:truncations/EIO/once",
        "            self.litter.append(name)\n            return exc\n",
        "            return exc\n",
    ),
    mutant(
        "what could not be removed is tried again only when more is dropped", "_disk/directory",
        "errors:retention/EIO/once",
        "                if not count and not self.spares.litter:\n",
        "                if not count:\n",
    ),
    mutant(
        "a file whose new name may be lost is forgotten", "_disk/spares",
        "errors:truncations/EIO/once",
        "                self.litter.append(kept)\n", "                pass\n",
    ),
    mutant(
        "an open leaves what was made ready", "_disk/repair", "errors:truncations/EIO/once",
        "    for name in plan.leftovers:\n",
        "    for name in plan.leftovers:\n        if name.startswith('spare-'):\n"
        "            continue\n",
    ),
    mutant(
        "a dropped file is written over under its name", "_disk/spares", "simulator:retention",
        "        try:\n            self._directory.sync()\n", "        try:\n            pass\n",
    ),
    mutant(
        "marks of a close are not written again", "_disk/segment", "errors:appends/EIO/once",
        "self.file.pwrite([self.file.pread(end - start, start)], start)\n", "pass\n",
    ),
    # -- truncation, retention --
    mutant(
        "segments go before log.meta says so", "_disk/directory", "simulator:drop",
        "                self.meta.write(meta)\n                with self._shape:\n",
        "                with self._shape:\n",
    ),
    mutant(
        "one segment too many is dropped", "_disk/directory", "simulator:drop",
        "if segment.next_lsn <= lsn]\n            if dropped:",
        "if segment.first_lsn < lsn]\n            if dropped:",
    ),
    mutant(
        "what was dropped comes back", "_disk/directory", "simulator:drop",
        "                self.meta.write(meta)\n                with self._shape:\n",
        "                with self._shape:\n",
        "                self.spares.drop(dropped)\n", "                pass\n",
    ),
    mutant(
        "retention drops what one of two policies is to keep", "_retention",
        "simulator:retention",
        "return min(policy.droppable", "return max(policy.droppable",
    ),
    mutant(
        "retention drops what is not old enough", "_retention", "simulator:retention",
        "oldest = now_us - int(self.seconds * 1e6)", "oldest = now_us - int(self.seconds * 1e5)",
    ),
    mutant(
        "a cut is not decided in log.meta", "_disk/directory", "simulator:cut",
        "                self.meta.write(meta)\n            except LogFullError",
        "                pass\n            except LogFullError",
    ),
    mutant(
        "what stays behind a cut is not synced", "_disk/directory", "simulator:cut",
        "spare.file.sync()\n            self._directory.rename(spare.name, TRUNCATE",
        "self._directory.rename(spare.name, TRUNCATE",
    ),
    mutant(
        "a cut takes one record too many", "_disk/cut", "simulator:cut",
        "[: lsn + 1 - frame.first_lsn]", "[: lsn - frame.first_lsn]",
    ),
    mutant(
        "log.meta is not synced before its name", "_disk/repair", SIMULATOR,
        "        file.pwrite([meta.encode()], 0)\n        file.sync()\n",
        "        file.pwrite([meta.encode()], 0)\n",
    ),
    mutant(
        "the name of log.meta is not synced", "_disk/repair", SIMULATOR,
        "    directory.rename(META_NEW_NAME, META_NAME)\n    directory.sync()\n",
        "    directory.rename(META_NEW_NAME, META_NAME)\n",
    ),
    mutant(
        "a cut that log.meta tells of is taken back", "_disk/metafile", "errors:truncations",
        " and read_meta(self._directory) == self.says:", ":",
    ),
    # -- recovery --
    mutant(
        "a torn tail is not cut", "_disk/recovery", SIMULATOR,
        "        if copy_from is None and torn:\n", "        if False:\n",
    ),
    mutant(
        "what is only in the page cache is believed", "_disk/recovery", ERRORS,
        "        copy_from = walk.unproven()\n", "        copy_from = None\n",
    ),
    mutant(
        "the copy of an unproven tail is not synced", "_disk/repair", SIMULATOR,
        "    finally:\n        old.close()\n    active.sync()\n",
        "    finally:\n        old.close()\n",
    ),
    mutant(
        "the old segment is sealed before its copy is durable", "_disk/repair", SIMULATOR,
        "        if not replaces:\n            sealed.append(",
        "        if False:\n            sealed.append(",
        "    finally:\n        old.close()\n    active.sync()",
        "    finally:\n        old.close()",
        "        _copy_frames(directory, active, before, end)\n",
        "        _copy_frames(directory, active, before, end)\n"
        "        if not replaces:\n"
        "            sealed.append(seal_at(directory, before))\n"
        "        active.sync()\n",
    ),
    mutant(
        "LSNs that were told of and lost are given again in the same epoch", "_disk/repair", BITROT,
        "        if meta.copied or plan.lost_lsn:\n", "        if meta.copied:\n",
    ),
    mutant(
        "a word of another epoch counts for recovery", "_disk/recovery", "simulator:cut",
        "directory.published().told_lsn(meta.epoch)", "directory.published().durable_lsn",
    ),
    mutant(
        "a decided cut is not carried out by recovery", "_disk/chain", "simulator:cut",
        "cut is not None and header.number > cut.keep_number and header.salt != cut.salt",
        "False",
    ),
    mutant(
        "a footer that may be in the page cache only is believed", "_disk/repair", "errors:appends",
        "        _rewrite_footer(directory, plan.previous)", "        pass",
    ),
    mutant(
        "the clock goes back over an empty segment", "_disk/repair",
        "errors:recovery of truncations",
        "        active.position = replace(here, time_us=max(here.time_us, time_us))\n",
        "        active.position = replace(here, time_us=0)\n",
    ),
    # -- damage --
    mutant(
        "the checksum of a body is not looked at", "_disk/scan", BITROT,
        "                if crc != frame.body_crc:", "                if False:",
    ),
    # -- the flat loop --
    mutant(
        "the flat loop does not look at the magic", "_disk/plain", PLAIN,
        "        if magic != FRAME_MAGIC or form", "        if form",
    ),
    mutant(
        "the flat loop does not check the checksum of a header", "_disk/plain", PLAIN,
        "if extend_crc32c(seed, data[start + _CHECKED : start + FRAME_HEADER_SIZE]) != crc:",
        "if False:",
    ),
    mutant(
        "the flat loop does not know flags", "_disk/plain", PLAIN,
        "form != _PLAIN or", "form & 0xFFFF != _PLAIN or",
    ),
    mutant(
        "the flat loop takes a frame from elsewhere", "_disk/plain", PLAIN,
        " or at != offset or ", " or ",
    ),
    mutant(
        "the flat loop takes any LSN", "_disk/plain", PLAIN,
        " or first != due:", ":",
    ),
    mutant(
        "the flat loop does not follow the chain", "_disk/plain", PLAIN,
        "        if follows != previous or durable", "        if durable",
    ),
    mutant(
        "the flat loop takes a frame that calls itself durable", "_disk/plain", PLAIN,
        "        if follows != previous or durable >= due:", "        if follows != previous:",
    ),
    mutant(
        "the flat loop forgets what was called durable", "_disk/plain", PLAIN,
        "        if durable > proven:", "        if True:",
    ),
    mutant(
        "the flat loop does not tell of a clock that was put back", "_disk/plain", PLAIN,
        "        if not time_us <= now_us <= TIME_US_MAX:", "        if not now_us <= TIME_US_MAX:",
    ),
    mutant(
        "the flat loop takes a time that no calendar has", "_disk/plain", PLAIN,
        "        if not time_us <= now_us <= TIME_US_MAX:", "        if not time_us <= now_us:",
    ),
    mutant(
        "the flat loop takes two lengths", "_disk/plain", PLAIN,
        "        if raw != stored or stored", "        if stored",
    ),
    mutant(
        "the flat loop takes a body of any length", "_disk/plain", PLAIN,
        " or stored > FRAME_BODY_MAX or ", " or ",
    ),
    mutant(
        "the flat loop takes a frame of no records", "_disk/plain", PLAIN,
        "not 0 < count <=", "not 0 <= count <=",
    ),
    mutant(
        "the flat loop takes any number of records", "_disk/plain", PLAIN,
        "not 0 < count <= BATCH_RECORDS_MAX", "not 0 < count",
    ),
    mutant(
        "the flat loop reads a frame at once, however large", "_disk/plain", PLAIN,
        "        if size > WINDOW or 4 * count", "        if 4 * count",
    ),
    mutant(
        "the flat loop reads a table beyond its body", "_disk/plain", PLAIN,
        "        if size > WINDOW or 4 * count > stored:", "        if size > WINDOW:",
    ),
    mutant(
        "the flat loop does not add up a table", "_disk/plain", PLAIN,
        "            if 4 * count + sum(lengths) != stored:", "            if False:",
    ),
    mutant(
        "the flat loop does not check the checksum of a body", "_disk/plain", PLAIN,
        "        if extend_crc32c(0, data[start:end]) != crc:", "        if False:",
    ),
    mutant(
        "the flat loop does not look at padding", "_disk/plain", PLAIN,
        "        return window.data.startswith(padding, end)", "        return True",
    ),
    mutant(
        "the flat loop reads a header beyond the window", "_disk/plain", PLAIN,
        "            if len(data) - start < FRAME_HEADER_SIZE:",
        "            if len(data) < start:",
    ),
    mutant(
        "the flat loop reads a body beyond the window", "_disk/plain", PLAIN,
        "            if len(data) - start < size - FRAME_HEADER_SIZE:", "            if False:",
    ),
    mutant(
        "the flat loop takes a window that begins behind it", "_disk/plain", PLAIN,
        "        if start < 0 or len(data)", "        if len(data)",
    ),
    mutant(
        "the flat loop keeps to its first window", "_disk/plain", PLAIN,
        "            start = window.have(FRAME_HEADER_SIZE, offset, size)\n", "            pass\n",
    ),
    mutant(
        "the flat loop goes on behind its end", "_disk/plain", PLAIN,
        "    while due < stop_lsn:", "    while True:",
    ),
    mutant(
        "the flat loop has a frame vouch for itself", "_disk/plain", PLAIN,
        "unproven[0][0] <= durable + 1:", "unproven and unproven[0][0] <= durable + 2:",
    ),
    mutant(
        "the flat loop has no frame vouch for the one before it", "_disk/plain", PLAIN,
        "            while unproven[0][0] <= durable + 1:",
        "            while unproven[0][0] <= durable:",
    ),
    mutant(
        "the flat loop has each frame in the index", "_disk/plain", PLAIN,
        "                index_at = offset + tally.step\n", "",
    ),
    mutant(
        "the flat loop counts no frames", "_disk/plain", PLAIN,
        "            frames += 1\n", "",
    ),
    mutant(
        "the flat loop takes the end of all frames for that of the records", "_disk/plain", PLAIN,
        "tally.frames, tally.data_end.fields, tally.unproven",
        "tally.frames, place, tally.unproven",
    ),
    mutant(
        "lengths that are equal but for a rest", "_disk/frame", PLAIN,
        '    return b"" if rest or each < 0 else struct.pack("<I", each) * count',
        '    return b"" if each < 0 else struct.pack("<I", each) * count',
    ),
    mutant(
        "a window keeps where the one before it began", "_disk/window", PLAIN,
        "            self.offset = offset\n", "",
    ),
    # -- damage --
    mutant(
        "the checksum of a frame's header leaves its lengths out", "_disk/frame", BITROT,
        "FRAME_MAGIC + crc32c(fields, seed)", "FRAME_MAGIC + crc32c(fields[:24], seed)",
        "crc32c(data[8:FRAME_HEADER_SIZE], seed) != crc", "crc32c(data[8:32], seed) != crc",
    ),
    mutant(
        "the checksum of a frame's header leaves its time out", "_disk/frame", BITROT,
        "    return FRAME_MAGIC + crc32c(fields, seed)",
        "    return FRAME_MAGIC + crc32c(fields[:16] + fields[24:], seed)",
        "crc32c(data[8:FRAME_HEADER_SIZE], seed) != crc",
        "crc32c(data[8:24] + data[32:FRAME_HEADER_SIZE], seed) != crc",
    ),
    mutant(
        "a bad segment is skipped", "_disk/walk", BITROT,
        "                self._say_where_it_ends(following)\n", "",
        "            self._move_to(frame, reason)\n", "            return False\n",
    ),
    mutant(
        "damage that a later frame calls durable is cut as torn", "_disk/walk", BITROT,
        "    if covering is not None:", "    if False:",
    ),
    mutant(
        "a frame does not vouch for the one just before it", "_disk/scan", BITROT,
        "frame.durable_lsn >= position.next_lsn:", "frame.durable_lsn > position.next_lsn:",
    ),
    mutant(
        "the mark of a close does not vouch for what is before it", "_disk/walk", BITROT,
        "    if pointer is not None and pointer.offset > end.offset:", "    if False:",
    ),
    mutant(
        "the owner says what is not yet synced", "_disk/directory", "simulator:interval",
        "self._directory.publish(self.synced_lsn,", "self._directory.publish(self.last_lsn,",
    ),
    mutant(
        "a missing last segment is not missed", "_disk/walk", "bitrot:files",
        "if last_kind is Kind.SEAL or (pointer is not None and pointer.kind is Kind.SEAL)",
        "if False",
    ),
    mutant(
        "a missing first segment is not missed", "_disk/chain", "bitrot:files",
        "if number - due_number - max(0, unread) > 0:", "if before and number > due_number:",
    ),
    mutant(
        "a segment of another log is taken", "_disk/chain", "bitrot:files",
        "    if header.log_uuid != meta.log_uuid:", "    if False:",
    ),
    mutant(
        "a format from the future is read as ours", "_disk/frame", "bitrot:files",
        "    if version != FORMAT_VERSION:", "    if False:",
    ),
    mutant(
        "a table of lengths is believed", "_disk/frame", HOSTILE,
        "    if 4 * count > length:", "    if False:",
    ),
    mutant(
        "any number of records is believed", "_disk/frame", BOMBS,
        "count > BATCH_RECORDS_MAX or first > LSN_MAX", "False",
    ),
    mutant(
        "a declared size is believed before decompressing", "_codec", BOMBS,
        "body, max_output_size=raw_length)", "body)",
        "        if parameters.content_size != raw_length:", "        if False:",
        "    if len(raw) != raw_length:", "    if False:",
    ),
    mutant(
        "a reader looks for ever for what no segment has", "_disk/cursor", HOSTILE,
        "            if place.header == ended:", "            if False:",
    ),
    # -- the database --
    mutant(
        "a checkpoint claims what it does not hold", "_checkpoint", "simulator:checkpoints",
        "        state = self._versions.state_at(frozen, self.state)\n",
        "        state = self._versions.state_at(frozen, self.state)\n"
        "        state = type(state)(state.log_uuid, max(log.durable_lsn, state.lsn))\n",
    ),
    mutant(
        "a checkpoint takes what is not durable", "_checkpoint", "simulator:checkpoints",
        "        while self._versions.has_pending(frozen.last_seq):\n", "        while False:\n",
    ),
    mutant(
        "the log is recycled before the store has it", "_checkpoint", "simulator:checkpoints",
        "        lsn = state.lsn\n", "        lsn = state.lsn\n        log.hold(HOLD, lsn + 1)\n",
    ),
    mutant(
        "a log may be dropped that the store does not hold", "_disk/directory",
        "simulator:checkpoints",
        "            lsn = self._holds.allowed(lsn, sealed, used)\n", "",
    ),
    mutant(
        "a checkpoint forgets what was deleted", "_checkpoint", "simulator:checkpoints",
        "            keys.append(key)\n            values.append(value)\n",
        "            if value is not None:\n"
        "                keys.append(key)\n                values.append(value)\n",
    ),
    mutant(
        "replay begins one transaction too late", "_core", "simulator:transactions",
        "checkpointer.state.lsn + 1)", "checkpointer.state.lsn + 2)",
    ),
    mutant(
        "transactions are not validated", "_readset", SCHEDULES,
        "            return self._doomed\n        if self.dependency",
        "            return self._doomed\n        return None\n        if self.dependency",
    ),
    mutant(
        "what a checkpoint took away is no conflict", "_mvcc", "errors:database",
        "            reader.layer_dropped(frozen)\n", "            pass\n",
    ),
    mutant(
        "a commit that was read can be withdrawn", "_mvcc", WHOLE,
        "return commit is None or commit[0] not in self._dependencies", "return True",
    ),
    mutant(
        "a withdrawn commit takes the version before it along", "_layer", WHOLE,
        "                    self.versions[key] = older\n",
        "                    del self.versions[key]\n",
    ),
    mutant(
        "a read-only transaction does not wait for what it read", "_mvcc", "errors:database",
        "        elif not dependency.lost:\n            await dependency.wait()\n",
        "        elif not dependency.lost:\n            await trio.lowlevel.checkpoint()\n",
    ),
    mutant(
        "a snapshot sees what came after it", "_memtable", SCHEDULES,
        "version = self.active.versions.get(key)\n        while version is not None and",
        "version = self.active.versions.get(key)\n        while False and",
    ),
    mutant(
        "LMDB keeps what was deleted", "_store", STORE,
        "                        delete(key)\n", "                        pass\n",
    ),
    mutant(
        "LMDB's state is not written with its data", "_store", STORE,
        'txn.put(b"lsn", state.lsn.to_bytes(8, "little"), db=self._meta)',
        'state.lsn % 2 or txn.put(b"lsn", state.lsn.to_bytes(8, "little"), db=self._meta)',
    ),
    mutant(
        "a store of another log is taken", "_store_files", STORE,
        "    elif state.log_uuid != log_uuid:", "    elif False:",
    ),
    mutant(
        "a store that is missing is passed over", "_store_files", STORE,
        "        if base_lsn > 1:", "        if False:",
    ),
    # -- damaged and forged stores --
    mutant(
        "keys need not be where a branch says", "_pages", PAGES,
        "        at_least: K | None = low\n", "        at_least: K | None = None\n",
    ),
    mutant(
        "keys of a leaf need not be in order", "_pages", PAGES,
        "(place <= at_least if strictly else place < at_least)", "False",
    ),
    mutant(
        "nodes of a leaf may overlap", "_pages", PAGES,
        "        self._check_packed(offset, page, spans)\n        counts", "        counts",
    ),
    mutant(
        "what a tree counts is believed", "_pages", PAGES,
        "            if is_ != should:", "            if False:",
    ),
    mutant(
        "the pages of a large value are not looked at", "_pages", PAGES,
        "        if (own, flags, pages) != (first, _OVERFLOWS, needed):", "        if False:",
    ),
    mutant(
        "a page's number is not looked at", "_pages", PAGES,
        "        if own != number:", "        if False:",
    ),
    mutant(
        "a file may be shorter than its header says", "_pages", PAGES,
        "    if needed > size:", "    if False:",
    ),
    mutant(
        "LMDB's errors of a scan reach the user", "_store", PAGES,
        "                    yield key, value\n        except self._store.lmdb_error as exc:\n",
        "                    yield key, value\n        except ZeroDivisionError as exc:\n",
    ),
    mutant(
        "LMDB's errors of a get reach the user", "_database", PAGES,
        "            versions.view.base.explain(exc)\n", "",
    ),
    mutant(
        "LMDB's errors of a transaction's get reach the user", "_readset", PAGES,
        "                view.base.explain(exc)\n", "",
    ),
    mutant(
        "a link is followed to where LMDB writes", "_system/store", "hostile:places",
        "    if not stat.S_ISREG(found.st_mode):\n", "    if False:\n",
    ),
    mutant(
        "a file with another name elsewhere is written", "_system/store", "hostile:places",
        "    if found.st_nlink > 1:\n", "    if False:\n",
    ),
    mutant(
        "a store may be a link", "_system/store", "hostile:places",
        "    return OsFiles().open_directory(path, follow=False)\n",
        "    return OsFiles().open_directory(path)\n",
    ),
    mutant(
        "a database's log may be a link", "_disk/opening", "hostile:places",
        "files, path, follow=not database,", "files, path, follow=True,",
    ),
    mutant(
        "a backup starts at the wrong record", "_local", "errors:database",
        "            first_lsn=after_lsn + 1,", "            first_lsn=after_lsn + 2,",
    ),
    # -- who reads --
    mutant(
        "readers take damage for the end", "_watchsource", "bitrot:ways/reader",
        "elif unknown or suspicious or seen.damage is not None:",
        "elif False:",
    ),
    mutant(
        "readers do not take the owner's word as proof", "_watchsource", "bitrot:ways/reader",
        "                told_lsn=proof,\n", "                told_lsn=0,\n",
    ),
    mutant(
        "a database reader forgets what its snapshots see", "_mvcc", READERS_DB,
        "                if layer.add(writes, seq, seq, keep_older):\n",
        "                if layer.add(writes, seq, seq, False):\n",
    ),
    mutant(
        "a database reader gives a store back that is being read", "_follower", READERS_DB,
        "        former.close()\n", "        former.view.base.transaction.close()\n",
    ),
    mutant(
        "a database reader stands still behind a dropped log", "_follower", READERS_DB,
        "        except LsnTruncatedError:\n            # Fallen",
        "        except KeyError:\n            # Fallen",
    ),
    mutant(
        "readers pass over what is wrong with the chain", "_watchsource", "bitrot:files/reader",
        "            chain_damage=damage,\n", "            chain_damage=None,\n",
    ),
    mutant(
        "readers go on in another log", "_watchsource", "bitrot:files/open reader",
        "            if not meta.live or meta.log_uuid != known.log_uuid:\n",
        "            if False:\n",
    ),
    mutant(
        "readers do not look again at what was wrong", "_watchsource", "bitrot:files/open reader",
        "        if seen.segments and same and seen.chain_damage is None:\n",
        "        if seen.segments and same:\n",
    ),
    mutant(
        "segments need not join", "_disk/chain", "bitrot:stale/reader",
        "        if end is None:\n            continue\n        path, offset",
        "        if True:\n            continue\n        path, offset",
    ),
    mutant(
        "of two segments that do not join the first is always read", "_disk/chain",
        "bitrot:stale/reader",
        "            whole = index if odd else index - 1\n", "            whole = index\n",
    ),
    mutant(
        "the owner reads whatever file stands there", "_local", "bitrot:files/owner",
        "                if found.header != header:\n", "                if False:\n",
    ),
    mutant(
        "the watermark in a frame says nothing", "_watchsource", "bitrot:ways/reader, no word",
        "        watermark = max(tail.watermark, scanner.position.durable_lsn)\n",
        "        watermark = tail.watermark\n",
    ),
    mutant(
        "a pointer says nothing of what is before its frame", "_watchsource",
        "bitrot:ways/reader, no word",
        "            told = max(told, last.pointer.last_lsn)\n", "            pass\n",
    ),
    mutant(
        "a part of a frame is skipped by one", "_disk/cursor", "bitrot:ways/reader",
        "            skip = self.next_lsn - frame.first_lsn\n",
        "            skip = max(0, self.next_lsn - frame.first_lsn - 1)\n",
    ),
    mutant(
        "what is written is taken for durable", "_watchsource", READERS,
        "max(seen.durable_lsn, tail.watermark, min(told, end.next_lsn - 1), proven)",
        "max(end.next_lsn - 1, proven)",
    ),
    mutant(
        "what a cut leaves is durable only by the owner's word", "_watchsource", READERS,
        "        told = max(word.told_lsn(meta.epoch), begun_lsn(meta))\n",
        "        told = word.told_lsn(meta.epoch)\n",
        "        proof = proven_lsn(word, meta)\n",
        "        proof = 0 if word.epoch is None else word.told_lsn(meta.epoch)\n",
    ),
    mutant(
        "the owner's word counts in any history", "_watchsource", READERS,
        "max(word.told_lsn(meta.epoch), begun_lsn(meta))", "max(word.durable_lsn, begun_lsn(meta))",
    ),
    mutant(
        "what looks wrong is believed at the first look", "_watchsource", READERS,
        "                stands = doubt == believed and self._fingerprint() == print_before\n",
        "                stands = True\n",
    ),
    mutant(
        "a stream believes damage at once", "_stream", READERS,
        "        if self._doubts < (2 if stood else SAME_DAMAGE_TIMES):\n", "        if False:\n",
    ),
    mutant(
        "a stream does not ask for the history", "_stream", READERS,
        "        if history is not self._history and history != self._history:\n",
        "        if False:\n",
    ),
    mutant(
        "a stream forgets one record that it has given", "_stream", READERS,
        "        if lsn is None or next_lsn > max(self._begin, lsn + 1):\n",
        "        if lsn is None or next_lsn > max(self._begin, lsn + 2):\n",
    ),
    mutant(
        "a bookmark of another history is taken", "_stream", READERS,
        "            if common is None or place.lsn > min(common, last):\n",
        "            if place.lsn > last:\n",
    ),
    mutant(
        "only the last parting of histories counts", "_identity", READERS,
        "min((later.after_lsn for later in known[index + 1 :]), default=UNPARTED)",
        "known[-1].after_lsn if known[index + 1 :] else UNPARTED",
    ),
    mutant(
        "a cut begins no epoch", "_disk/directory", READERS,
        "        history = branch(says.history, lsn, self._files.random_bytes(4))\n",
        "        history = says.history\n",
    ),
    mutant(
        "an epoch begins one record too late", "_disk/directory", READERS,
        "        history = branch(says.history, lsn, self._files.random_bytes(4))\n",
        "        history = branch(says.history, lsn + 1, self._files.random_bytes(4))\n",
    ),
    mutant(
        "a reader that was overtaken by retention is told of damage", "_stream", READERS,
        "        if next_lsn < tail.first_lsn:\n", "        if False:\n",
        "        if self._next < tail.first_lsn:\n", "        if False:\n",
    ),
    mutant(
        "the owner gives what is not yet synced", "_local", READERS,
        "        if sync:\n            self.durable_lsn = directory.synced_lsn\n",
        "        self.durable_lsn = directory.last_lsn\n        if sync:\n",
    ),
    # -- consumers --
    mutant(
        "an acknowledgement returns before it is written", "_consumers", CONSUMERS,
        "            await self._log.engine.keep_places(moved.now)\n",
        "            await trio.lowlevel.checkpoint()\n",
    ),
    mutant(
        "an acknowledgement is written and not synced", "_disk/placesfile", CONSUMERS,
        "            file.sync()\n", "            pass\n",
    ),
    mutant(
        "the new name of the places is not synced", "_disk/placesfile", CONSUMERS,
        "    directory.rename(PLACES_NEW_NAME, PLACES_NAME)\n    directory.sync()",
        "    directory.rename(PLACES_NEW_NAME, PLACES_NAME)",
    ),
    mutant(
        "a consumer begins without a hold", "_consumers", CONSUMERS,
        "begin.lsn + 1, log.consumer_hold_bytes)\n                await log.engine.settle",
        "begin.lsn + 1, 0)\n                await log.engine.settle",
    ),
    mutant(
        "a consumer holds what comes after the next record", "_consumers", CONSUMERS,
        "        first = now.reach + 1\n", "        first = now.reach + 2\n",
        "min(first, stored.reach + 1)", "min(first, stored.reach + 2)",
        "min(first, began + 1)", "min(first, began + 2)",
    ),
    mutant(
        "a consumer goes on behind what it was given", "_consumers", CONSUMERS,
        "        return Bookmark(lsn, bookmark.epoch)\n", "        return bookmark\n",
    ),
    mutant(
        "a place reaches over commits", "_places", CONSUMERS_DB,
        "            if place.reach == lsn - 1 or", "            if place.reach < lsn or",
    ),
    mutant(
        "an acknowledgement passes over commits before it", "_places", CONSUMERS_DB,
        " and self.commit_lsn <= place.lsn)", ")",
    ),
    mutant(
        "a checkpoint forgets where consumers are", "_mvcc", CONSUMERS_DB,
        "        layer.places.update(self.places.record(lsn, moves, alone=alone))\n",
        "        self.places.record(lsn, moves, alone=alone)\n",
    ),
    mutant(
        "of a key's puts that are replayed together the first one stays", "_layer",
        "simulator:lines-database",
        "zip(keys, map(Version, numbers, values, repeat(None)), strict=False)",
        "zip(keys[::-1], map(Version, numbers, values[::-1], repeat(None)), strict=False)",
    ),
    mutant(
        "what replay says of consumers is passed over", "_mvcc", CONSUMERS_DB,
        "moves = moves_in(data) if data[:1] == PLACED_FORMAT else None", "moves = None",
    ),
    mutant(
        "an acknowledgement in a transaction is forgotten", "_transaction", CONSUMERS_DB,
        "await versions.commit(self._writes, current_task(), self._moves)",
        "await versions.commit(self._writes, current_task())",
    ),
    mutant(
        "acknowledgements are given to consumers", "_changes", CONSUMERS_DB,
        "        if not writes and moves_places(record.data):\n", "        if False:\n",
    ),
    # -- a replicated log --
    mutant(
        "whatever stands at a batch's place is taken for it", "_appender", REPLICATION,
        "        if found != ident:\n", "        if False:\n",
    ),
    mutant(
        "nothing at a batch's place is taken for another's", "_appender", REPLICATION,
        "        if found is None:\n", "        if found == '':\n",
    ),
    mutant(
        "a full log is believed after a try without an answer", "_appender", REPLICATION,
        "                if not open_tries:\n", "                if True:\n",
    ),
    mutant(
        "a try that is made again has another name", "_appender", REPLICATION,
        "return await self._cas.append(after, pieces, ident)",
        "return await self._cas.append(\n"
        "                    after, pieces, ident.replace(self._writer, f'{open_tries:016x}')\n"
        "                )",
    ),
    mutant(
        "what has had no answer is called not written", "_appender", REPLICATION,
        'return "unknown" if open_tries else "not written"', 'return "not written"',
    ),
    mutant(
        "no answer is taken for a good one", "_appender", REPLICATION,
        "                open_tries += 1\n", "                return after + len(pieces)\n",
    ),
    mutant(
        "the tail that was read before the epoch began is believed", "_takeover", REPLICATION,
        "    epoch = await _begin_epoch(cas, found, unavailable_after, files, writer)\n"
        "    log = StreamLog(cas, found.uuid, unavailable_after)\n"
        "    end = await _find_end(log, epoch)\n",
        "    log = StreamLog(cas, found.uuid, unavailable_after)\n"
        "    before = await _find_end(log, found.last)\n"
        "    epoch = await _begin_epoch(cas, found, unavailable_after, files, writer)\n"
        "    end = attrs.evolve(await _find_end(log, epoch), last_lsn=before.last_lsn)\n",
    ),
    mutant(
        "no epoch: who opens a log begins where it ends", "_takeover", REPLICATION,
        "        except Conflict as exc:\n            reason = str(exc)\n            if unsure_at",
        "        except Conflict as exc:\n            return exc.last\n            if unsure_at",
    ),
    mutant(
        "messages are dropped with the last mark", "_replicated", REPLICATION,
        "            if self._appender.mark < position:\n", "            if False:\n",
    ),
    mutant(
        "a full log is made room in with the last mark", "_replicated", REPLICATION,
        "            # What the mark tells is left.\n", "            return\n",
    ),
    mutant(
        "one replica is believed", "_streamlog", REPLICATION,
        "                if await self.cas.ident_at(position) == entry.ident:\n",
        "                if True:\n",
    ),
    mutant(
        "the chain over the messages is not looked at", "_streamlog", REPLICATION,
        "            if header is None or header.previous != chain:\n", "            if False:\n",
    ),
    mutant(
        "buckets are not cumulative", "_metrics", FIGURES,
        "zip(bounds, accumulate(counts), strict=True)", "zip(bounds, counts, strict=True)",
    ),
    mutant(
        "the sum of a histogram is that of its slowest", "_metrics", FIGURES,
        '"sync", "sync_seconds_total")', '"sync", "sync_seconds_max")',
    ),
    mutant(
        "a count of records is one of bytes", "_metrics", FIGURES,
        '    _counter("records_appended", RECORDS),\n'
        '    _counter("bytes_appended", BYTES, "appended"),',
        '    _counter("bytes_appended", RECORDS, "records_appended"),\n'
        '    _counter("records_appended", BYTES, "appended"),',
    ),
    mutant(
        "monitoring is given the first look for ever", "_sampling", FIGURES,
        "    for subject in subjects:\n        subject.look()\n", "",
    ),
    mutant(
        "what is broken is called degraded", "_health", FIGURES,
        'if any(reason.status == "failed" for reason in found):', "if False:",
    ),
    mutant(
        "a full disk is no reason", "_health", FIGURES,
        '    if state != "full":\n', '    if state != "nothing":\n',
    ),
    mutant(
        "a queue that is full is believed to have been so for long", "_health", FIGURES,
        "    if seconds < CROWDED_SECONDS:\n", "    if not seconds:\n",
    ),
    mutant(
        "a queue that is full batch after batch begins anew with each", "_backlog", FIGURES,
        "        if not self._admission.is_crowded(records, size):\n            self.crowded_since",
        "        if True:\n            self.crowded_since",
    ),
    mutant(
        "a queue that was full once has been so ever since", "_flusher", FIGURES,
        "            self._queue.backlog.crowded_since = None\n", "",
    ),
    mutant(
        "checkpoints that pass again are called failing", "_checkpoint", FIGURES,
        "        self._failing_since = self._failure = self._room.failing = None\n",
        "        self._failure = self._room.failing = None\n",
    ),
    mutant(
        "checkpoints that are behind are no reason", "_health", FIGURES,
        "    if not behind:\n", "    if True:\n",
    ),
    # -- archives --
    mutant(
        "what the archive does not have is not held", "_archiver", ARCHIVE,
        "            self._hold(ARCHIVE_HOLD, first)\n",
        "            self._hold(ARCHIVE_HOLD, 1 << 62)\n",
    ),
    mutant(
        "a segment that was cut is taken for the one that was archived", "_archiver", ARCHIVE,
        "key_of(s) not in there]",
        "s.header.salt not in {k.salt for k in there}]",
    ),
    mutant(
        "an archive that has more than the log is taken for its own", "_archived", ARCHIVE,
        "        if epoch == today and last_lsn > self.last_lsn:\n", "        if False:\n",
        "            if name.key.last_lsn >= self.first_lsn and name.key not in self.ends:\n",
        "            if False:\n",
    ),
    mutant(
        "an archive of a newer history is taken for the log's own", "_archived", ARCHIVE,
        "        if common_lsn(self.history, epoch) is None and generation(epoch) >= "
        "generation(today):\n",
        "        if False:\n",
    ),
    mutant(
        "what another copy wrote into the same segment counts as archived", "_archiving", ARCHIVE,
        "        if manifest.end == log.ends[name.key]:\n", "        if True:\n",
    ),
    mutant(
        "segments that overlap the log's are taken for its own", "_archived", ARCHIVE,
        "            if name.key.last_lsn >= self.first_lsn and name.key not in self.ends:\n",
        "            if False:\n",
    ),
    mutant(
        "a segment counts as archived before it is put", "_archiver", ARCHIVE,
        "            cuts, meta = directory.cuts, directory.meta.says\n",
        "            cuts, meta = directory.cuts, directory.meta.says\n"
        "            self._there.update(map(key_of, group))\n",
    ),
    mutant(
        "of what is put together only the last is synced", "_archive", ARCHIVE,
        "            for one in reversed(written):\n                one.file.sync()\n",
        "            for one in reversed(written):\n"
        "                if one is written[-1]:\n                    one.file.sync()\n",
    ),
    mutant(
        "a group counts as archived before its directory is synced", "_archive", ARCHIVE,
        "            while written:\n",
        "            alone = len(written) < 2\n            while written:\n",
        "            directory.sync()\n        finally:\n",
        "            if alone:\n                directory.sync()\n        finally:\n",
    ),
    mutant(
        "what is cut off is not looked at anew", "_archiver", ARCHIVE,
        "        if cuts == self._looked_at:\n", "        if self._looked_at >= 0:\n",
    ),
    mutant(
        "the name of what was put is not synced", "_archive", ARCHIVE,
        "            # For what is there already, too: who put it may have been killed.\n"
        "            directory.sync()\n",
        "",
    ),
    mutant(
        "what was put is not synced", "_archive", ARCHIVE,
        "                one.file.sync()\n", "",
    ),
    mutant(
        "the manifest is put before the segment", "_archiving", ARCHIVE,
        "    put_group(\n        archive,\n        [\n            (manifest.data, ",
        "    _put_manifests(archive, manifests)\n"
        "    put_group(\n        archive,\n        [\n            (manifest.data, ",
    ),
    mutant(
        "records of another history are taken", "_archived", ARCHIVE,
        "        return 0 if common is None else min(common, self.last_lsn)\n",
        "        return self.last_lsn\n",
    ),
    mutant(
        "the oldest history is restored", "_restorable", ARCHIVE,
        "        newest = max(known, key", "        newest = min(known, key",
    ),
    mutant(
        "a commit right at the time is left out", "_restorable", ARCHIVE,
        "        return frame.time_us > time_us or", "        return frame.time_us >= time_us or",
    ),
    mutant(
        "a gap is passed over", "_restorable", ARCHIVE,
        "        if reached < lsn if lsn is not None else self._beyond(reached):\n",
        "        if False:\n",
    ),
    # -- between tasks, threads, processes and event loops --
    mutant(
        "who acknowledges reads ahead though another task is reading", "_stream", AHEAD,
        "        if self._ahead is not None or self._in_use:\n",
        "        if self._ahead is not None:\n",
    ),
    mutant(
        "what was read ahead is taken for the history that is now", "_stream", AHEAD,
        "                self._take(ahead.records, ahead.history)\n",
        "                self._take(ahead.records, self._history)\n",
    ),
    mutant(
        "what could not be read ahead is waited for", "_stream", AHEAD,
        "                ahead.records = await self._cursor.chunk(ahead.start, stop)\n"
        "        finally:\n            ahead.done.set()\n",
        "                ahead.records = await self._cursor.chunk(ahead.start, stop)\n"
        "                ahead.done.set()\n        finally:\n            pass\n",
    ),
    mutant(
        "what is read ahead counts as given", "_stream", AHEAD,
        "                ahead.records = await self._cursor.chunk(ahead.start, stop)\n",
        "                ahead.records = await self._cursor.chunk(ahead.start, stop)\n"
        "                self._next = ahead.records[-1].lsn + 1\n",
    ),
    mutant(
        "a new lock file is not watched", "_system/watch", WAKES,
        "            self._watch_word()\n", "            pass\n",
    ),
    mutant(
        "streams that wait for another's look are not told", "_watchsource", WAKES,
        "            self._watching = False\n            self._others.unpark_all()\n",
        "            self._watching = False\n",
    ),
    mutant(
        "what changed before it was watched is not looked at", "_watchsource", WAKES,
        "            # What has changed before was not watched.\n"
        "            await self.refresh()\n            return\n",
        "            await trio.lowlevel.checkpoint()\n            return\n",
    ),
    mutant(
        "sync_in the loop: the thread counts as idle while it publishes", "_worker", WORDS,
        "            ring()\n            afterwards()\n            self._ended += 1\n",
        "            self._ended += 1\n            ring()\n            afterwards()\n",
    ),
    mutant(
        "sync_in the loop: what the thread does is no matter", "_worker", WORDS,
        "            and worker.idle\n", "",
    ),
    mutant(
        "asyncio: what was done is called cancelled", "_portal", PORTAL,
        "            if isinstance(error, trio.Cancelled):\n                raise asyncio",
        "            if True:\n                raise asyncio",
    ),
    mutant(
        "asyncio: a cancellation that came too late is forgotten", "_portal", PORTAL,
        "            _cancel_again(self._portal.loop, self._cancelled)\n", "            pass\n",
    ),
    mutant(
        "asyncio: a call that is being made cannot be cancelled", "_portal", PORTAL,
        "                call.hand.cancel()\n", "                pass\n",
    ),
    mutant(
        "asyncio: who is cancelled in trio's thread is not told of his own cancellation",
        "_portal", PORTAL,
        "        cut = isinstance(error, trio.Cancelled) and not self.withdrawn\n",
        "        cut = isinstance(error, trio.Cancelled)\n",
    ),
    mutant(
        "more of a group counts as archived than was put", "_archiver", GROUPS,
        "            for info in group[:count]:\n", "            for info in group:\n",
    ),
    # -- reading from outside --
    mutant(
        "get: an absent key is no finding", "_cli/get", COMMANDS,
        "        return ExitCode.FINDINGS\n",
        "        return ExitCode.OK\n",
    ),
    mutant(
        "scan: what is written in pieces is not cleared", "_cli/scan", COMMANDS,
        "    pieces.clear()\n    return 0\n",
        "    return 0\n",
    ),
    mutant(
        "scan: backwards is forwards", "_cli/scan", COMMANDS,
        "reader.stream(**bounds, reverse=reverse, limit=limit)",
        "reader.stream(**bounds, reverse=False, limit=limit)",
    ),
    mutant(
        "dump --state: the first record of a batch is kept as its end", "_cli/dump", COMMANDS,
        "state.reached(Bookmark(passed[-1].lsn, records.bookmark.epoch))",
        "state.reached(Bookmark(passed[0].lsn, records.bookmark.epoch))",
    ),
    mutant(
        "dump --state: the file is not replaced", "_cli/dump", COMMANDS,
        "        temporary.replace(self._path)\n",
        "        temporary.exists()\n",
    ),
    mutant(
        "a reader's backup goes on at an LSN that it has", "_copying", COMMANDS,
        "            first_lsn=state.lsn + 1,\n",
        "            first_lsn=state.lsn,\n",
    ),
    mutant(
        "a reader's backup has the places of nobody", "_database_reader", COMMANDS,
        "snapshot.stream(), state, meta, size\n",
        "snapshot.stream(), type(state)(state.log_uuid, state.lsn), meta, size\n",
    ),
    mutant(
        "sync_in the loop: readers are not told", "_worker", COMMANDS,
        "        finally:\n            self._afterwards()\n            ended = perf_counter()\n",
        "        finally:\n            ended = perf_counter()\n",
    ),
    mutant(
        "nats: a server that does not sync is taken", "_natscheck", COMMANDS,
        "    if not server.synced:\n",
        "    if server.synced is None:\n",
    ),
    mutant(
        "nats: a version too old is taken", "_natscheck", COMMANDS,
        "    if server.version[:2] < VERSION_MIN:\n        return _too_old(who",
        "    if not server.version:\n        return _too_old(who",
    ),
)  # fmt: skip


# -- putting one in -----------------------------------------------------------------


class NotThere(Exception):
    """A mutant's text is gone from the source, or stands there more than once."""


def mutated(one: Mutant, source: str) -> str:
    """The source with the bug in it.

    Raises:
      NotThere
    """
    for old, new in one.changes:
        if source.count(old) != 1:
            times = f"{source.count(old)} times in {one.file}"
            raise NotThere(f"mutant no longer applies: {one.name!r}: {times}: {old!r}")
        source = source.replace(old, new)
    compile(source, one.file, "exec")
    return source


def copy_package(folder: Path, one: Mutant | None) -> None:
    """The installed package in a folder, with a bug."""
    target = folder / PACKAGE.name
    # Compiled files are left: they are told by a time and a size, which may be the same.
    shutil.copytree(PACKAGE, target, ignore=shutil.ignore_patterns("__pycache__"))
    if one is not None:
        file = target / one.file
        file.write_text(mutated(one, file.read_text(encoding="utf-8")), encoding="utf-8")


# -- judging one --------------------------------------------------------------------


@attrs.frozen
class Task:
    mutant: Mutant | None
    """None: the package as it is."""
    judges: tuple[str, ...]
    """Asked one after the other until one finds something."""
    seed: int
    seconds: float


@attrs.frozen
class Verdict:
    task: Task
    judge: str
    """That found it; nothing: none did."""
    what: str
    cases: int
    """Until it was found."""
    seconds: float
    passed: tuple[str, ...]
    """Judges that found nothing."""


def judge_one(task: Task) -> Verdict:
    cases = 0
    seconds = 0.0
    passed: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        copy_package(Path(folder), task.mutant)
        for judge in task.judges:
            answer = ask(judge, Path(folder), task.seed, task.seconds)
            cases += answer["cases"]
            seconds += answer["seconds"]
            if answer["found"]:
                return Verdict(task, judge, answer["found"], cases, seconds, tuple(passed))
            passed.append(judge)
    return Verdict(task, "", "", cases, seconds, tuple(passed))


def ask(judge: str, folder: Path, seed: int, seconds: float) -> dict[str, Any]:
    """One judge's answer about the copy of the package in a folder."""
    command = [sys.executable, "-m", "campaigns", "mutants", "--judge", judge]
    command += ["--seed", str(seed), "--seconds", str(seconds), "--workers", "1"]
    environment = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{TESTS}"}
    environment["PYTHONDONTWRITEBYTECODE"] = "1"
    try:
        done = subprocess.run(
            command,
            cwd=TESTS,
            env=environment,
            capture_output=True,
            text=True,
            timeout=seconds + GRACE_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"cases": 0, "seconds": seconds + GRACE_SECONDS, "found": "it hangs"}
    lines = done.stdout.splitlines()
    if done.returncode == 0 and lines:
        return json.loads(lines[-1])  # type: ignore[no-any-return]
    # Nothing but the mutant is new: it has broken what a judge prepares, or the process.
    errors = done.stderr.splitlines() or [f"exit code {done.returncode}"]
    return {"cases": 0, "seconds": 0.0, "found": f"{judge} cannot begin: {errors[-1]}"}


def judge_here(arguments: argparse.Namespace) -> int:
    """In the process of its own: against the copy that is found first."""
    name, _, only = arguments.judge.partition(":")
    judgement = _judges.JUDGES[name](arguments.seed, arguments.seconds, only)
    print(json.dumps(attrs.asdict(judgement)))
    return 0


# -- the campaign -------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", nargs="*", metavar="TEXT", help="only mutants with it; all")
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, help="for a judge and a mutant (%(default)s)"
    )
    parser.add_argument("--judge", metavar="JUDGE[:PART]", help="only this one, on this package")
    parser.add_argument(
        "--sample", type=int, metavar="N", help="so many mutants, chosen by the seed"
    )
    _report.add_common_arguments(parser)


def chosen(arguments: argparse.Namespace) -> list[Mutant]:
    found = [
        one
        for one in MUTANTS
        if not arguments.names or any(text in f"{one.file} {one.name}" for text in arguments.names)
    ]
    if arguments.sample is not None:
        found = random.Random(arguments.seed).sample(found, min(arguments.sample, len(found)))
    return found


def run(arguments: argparse.Namespace) -> int:
    if arguments.judge is not None:
        if arguments.judge.partition(":")[0] not in _judges.JUDGES:
            return _report.fail_usage(f"judges are {', '.join(_judges.JUDGES)}")
        return judge_here(arguments)
    mutants = chosen(arguments)
    if not mutants:
        return _report.fail_usage("there is no such mutant")
    for one in MUTANTS:
        # All of them, whichever are asked for: a text that is gone is a defect at once.
        mutated(one, (PACKAGE / one.file).read_text(encoding="utf-8"))
    report = _report.Report(
        "mutants",
        arguments,
        {
            "mutant": "mutant", "file": "file", "judge": "found by", "cases": "after cases",
            "seconds": "seconds",
        },
    )  # fmt: skip
    seed, seconds = arguments.seed, arguments.seconds
    used = {one.judge.partition(":")[0] for one in mutants}
    tasks = [
        *(Task(None, (judge,), seed, seconds) for judge in _judges.JUDGES if judge in used),
        *(
            Task(one, tuple(dict.fromkeys((one.judge, *_judges.JUDGES))), seed, seconds)
            for one in mutants
        ),
    ]
    found = 0
    with _report.progress_bar("mutants", minutes=arguments.minutes, count=len(tasks)) as bar:
        for verdict in _report.in_processes(judge_one, tasks, arguments.workers, bar.over):
            asked = verdict.task.mutant
            judge = verdict.judge or "NOBODY"
            if asked is None:
                (judge,) = verdict.task.judges
                if verdict.judge:
                    replayed = _report.replay_command("mutants", "--judge", judge, "--seed", seed)
                    report.find(f"the package as it is: {judge}: {verdict.what}", replayed)
                judge = f"{judge}: {verdict.what or 'nothing'}"
            elif verdict.judge:
                found += 1
                if verdict.passed:
                    judge += f" (not by {', '.join(verdict.passed)})"
            else:
                replayed = _report.replay_command("mutants", f"'{asked.name}'", "--seed", seed)
                report.find(f"not found: {asked.name} ({asked.file})", replayed)
            report.add(
                mutant="(the package as it is)" if asked is None else asked.name,
                file="" if asked is None else asked.file,
                judge=judge,
                cases=verdict.cases,
                seconds=round(verdict.seconds, 1),
                what=verdict.what,
            )
            bar.advance(1, f"{found} found")
    done = sum(row["file"] != "" for row in report.rows)
    report.rows.sort(key=lambda row: (row["file"] == "", row["file"], row["mutant"]))
    report.note(f"{found} of {done} mutants found")
    return report.finish()
