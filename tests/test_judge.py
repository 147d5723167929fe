"""One judge of a log's files: what is told to a reporter, and what proves a loss."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from logs import (
    LOG,
    append,
    content,
    forget_word,
    make_log,
    numbered,
    open_log,
    segments,
)
from msgspec.structs import replace

import trio_wal
from trio_wal import CorruptLogError
from trio_wal._disk.chain import META_NAME, list_chain, read_meta
from trio_wal._disk.finding import Finding, Report, refuse
from trio_wal._disk.frame import DATA_OFFSET
from trio_wal._disk.opening import open_log_directory
from trio_wal._disk.recovery import examine
from trio_wal._disk.verify import verify
from trio_wal._disk.walk import check_last, check_segment
from trio_wal._files import NO_WORD, Word
from trio_wal._system.files import OsFiles
from trio_wal.testing import MemoryFiles

PAYLOAD = bytes(range(200))


def judge(files: MemoryFiles, report: Report) -> None:
    """A tenant of its own: everything in order, and whatever is wrong told to a reporter."""
    directory = files.open_directory(LOG)
    meta = read_meta(directory)
    assert meta is not None
    chain = list_chain(directory, meta, report)
    for segment in (*chain.segments, *chain.beyond):
        file, until = directory.open(segment.file_name), chain.until(segment)
        try:
            if until.is_last:
                check_last(LOG, file, segment, report, told_lsn=0)
            else:
                check_segment(file, segment, until, report)
        finally:
            file.close()


def findings(files: MemoryFiles) -> list[Finding]:
    found: list[Finding] = []
    judge(files, found.append)
    return found


def refusal(files: MemoryFiles) -> CorruptLogError | None:
    try:
        judge(files, refuse)
    except CorruptLogError as exc:
        return exc
    return None


def six_segments(**options: Any) -> MemoryFiles:
    return make_log(*([b"%d" % n + PAYLOAD, b"-"] for n in range(12)), **options)


def damaged(seed: int) -> MemoryFiles:
    files = six_segments()
    names = segments(files)
    for number in range(3):
        name = names[(seed + 2 * number) % len(names)]
        if seed % 3 == number:
            files.remove_file(LOG, name)
        else:
            files.flip_bit(LOG, name, 8 * DATA_OFFSET + 641 * (seed + number))
    return files


def test_who_lists_is_told_of_everything_and_who_refuses_of_the_first() -> None:
    several = 0
    for seed in range(24):
        files = damaged(seed)
        found = [finding for finding in findings(files) if not finding.harmless]
        error = refusal(files)
        assert error is not None
        assert (error.path, error.offset, error.reason) == (
            found[0].path,
            found[0].offset,
            found[0].reason,
        )
        several += len(found) > 1
    assert several > 12


def test_a_sound_log_is_judged_without_a_word() -> None:
    for files in (six_segments(), six_segments(close=False)):
        assert findings(files) == []


def test_what_opening_refuses_is_what_verify_lists_first() -> None:
    """In one file: opening begins with the last one."""
    for bit in range(0, 8 * 600, 97):
        files = six_segments()
        files.flip_bit(LOG, segments(files)[1], 8 * DATA_OFFSET + bit)
        listed = verify(files.open_directory(LOG)).findings
        with pytest.raises(CorruptLogError) as caught:
            examine(files.open_directory(LOG), verify_bytes=math.inf)
        error = caught.value
        assert (error.path, error.offset, error.reason) == (
            listed[0].path,
            listed[0].offset,
            listed[0].reason,
        )


def test_what_is_harmless_is_listed_and_opened() -> None:
    files = six_segments()
    files.flip_bit(LOG, segments(files)[1], 8 * (DATA_OFFSET - 9))
    (finding,) = verify(files.open_directory(LOG)).findings
    assert finding.harmless
    assert len(content(files)) == 24


# -- the owner's word ---------------------------------------------------------------------


def killed() -> MemoryFiles:
    """Three batches, acknowledged; the last one has rotted since."""
    files = make_log([b"a"], [b"b"], [b"c" + PAYLOAD], close=False, segment_size=1 << 20)
    last = DATA_OFFSET + 2 * 512
    files.flip_bit(LOG, segments(files)[0], 8 * (last + 100))
    return files


def set_word(files: MemoryFiles, word: Word) -> None:
    files._folders[LOG].published = word


@pytest.mark.parametrize("word", [Word(3, 0), Word(2, 0), Word(3, 1), Word(3, None), NO_WORD])
def test_an_open_takes_the_owners_word_for_no_proof(word: Word) -> None:
    """It may be of files of another age, and was never synced; a reader does (docs/design)."""
    files = killed()
    set_word(files, word)
    assert verify(files.open_directory(LOG)).findings == ()
    assert content(files) == numbered([b"a", b"b"])


def test_where_an_epoch_has_begun_all_before_was_durable() -> None:
    """Without any word: ``log.meta`` says after which record the log was cut."""
    files = make_log([b"a", b"b", b"c"], close=False, segment_size=1 << 20)
    log = open_log(files)
    log.truncate_after(2)
    log.close(orderly=False)
    forget_word(files)
    assert content(files) == numbered([b"a", b"b"])
    (name,) = segments(files)
    files.flip_bit(LOG, name, 8 * (DATA_OFFSET + 70))
    with pytest.raises(CorruptLogError, match=r"said that LSN 2 is durable"):
        open_log(files)


async def test_a_copy_that_was_not_opened_yet_is_not_held_to_the_word_of_its_original() -> None:
    files = make_log([b"a"], close=True)
    meta = read_meta(files.open_directory(LOG))
    assert meta is not None
    files.write_file(LOG, META_NAME, replace(meta, copied=True).encode())
    set_word(files, Word(900, 0))
    async with trio_wal.open_reader(LOG, files=files) as reader, reader.read() as records:
        assert [record.data async for record in records] == [b"a"]


def test_a_new_log_is_not_held_to_the_word_of_one_that_was_there(tmp_path: Path) -> None:
    """Not even if the power fails before it has said anything of its own."""
    files = OsFiles()
    log = open_log_directory(files, str(tmp_path), segment_size=1)
    for _ in range(5):
        append(log, PAYLOAD)
    log.close()
    for file in tmp_path.iterdir():
        if file.name != "lock":
            file.unlink()
    directory = files.open_directory(str(tmp_path))
    assert directory.published() == Word(5, 0)
    directory.lock()
    directory.sign(new=True)
    assert directory.published() == NO_WORD
    directory.close()
    open_log_directory(files, str(tmp_path), segment_size=1).close()
