"""`repair`: make a damaged log or database open again, and say what is lost by it.

Law: what a log's files are worth is `_disk.salvage`'s to say, and a store's `_store_check`'s; here
both are put together.  Nothing is changed that was not copied, or set aside, before.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Final, Literal, final

import attrs
import trio
from msgspec.structs import replace
from trio.lowlevel import enable_ki_protection

from ._base import StoreState
from ._disk.chain import LOG_NAME, META_NAME, STORE_NAME
from ._disk.finding import Finding
from ._disk.frame import FEATURE_DATABASE
from ._disk.opening import open_log_directory
from ._disk.repair import create_empty
from ._disk.salvage import (
    Keep,
    Salvage,
    carry_out,
    changed_files,
    copy_files,
    decide,
    forgotten,
    survey,
)
from ._exceptions import CorruptLogError, UnsupportedOperationError, WrongDirectoryError
from ._exports import publish
from ._files import Directory, Files, close_quietly
from ._park import require_trio
from ._remotelog import remote_log
from ._store_files import data_file, misfit
from ._stores import stores_of
from ._system.files import OsFiles
from ._util import MiB, check_bool, check_one_of, check_path
from ._worker import Blocking

ASIDE: Final = "before-repair"
"""What the directory with the copies is called; a number follows."""
SEGMENT_SIZE: Final = 64 * MiB
TO_BE_REBUILT: Final = "this store shall be rebuilt, whatever it is worth"

Progress = Callable[[int, int], None]


@final
@attrs.frozen
class Damage:
    """One thing that is wrong with the files of a log or a database; in `RepairReport`."""

    path: str
    """The file."""
    offset: int
    """Byte offset in it; 0 where the file as a whole is wrong."""
    reason: str
    """What is wrong there."""


@final
@attrs.frozen(kw_only=True)
class RepairReport:
    """What `repair` found, and what it has done or would do."""

    path: str
    """The log's or database's directory, absolute."""
    damage: tuple[Damage, ...]
    """Why it cannot be opened; empty: it can, and nothing is to be done."""
    lost: tuple[range, ...]
    """LSNs of acknowledged records (of a database: transactions) that will be gone.  Those of a
    database that its store has are not lost, whatever becomes of its log."""
    lost_more: bool
    """Whether there may have been more records after those, of which nothing tells any more."""
    lost_bytes: int
    """Bytes of the log's files that go."""
    first_lsn: int
    """The oldest record of the log afterwards."""
    last_lsn: int
    """The newest; ``first_lsn - 1`` where there will be none."""
    files: tuple[str, ...]
    """The log's files that are changed or dropped, by name."""
    consumers_lost: bool
    """Whether the places of the log's consumers are gone: each one starts over."""
    store: Literal["none", "kept", "rebuilt"]
    """What becomes of a database's store: ``"rebuilt"``, from the log, by the next open; ``"none"``
    of a log."""
    copies: str | None
    """The directory, in `path`, with all that was changed or dropped as it was; None: nothing
    was."""
    done: bool
    """Whether the repair was carried out."""

    @property
    def lost_records(self) -> int:
        """How many LSNs are in `RepairReport.lost`."""
        return sum(map(len, self.lost))


@attrs.frozen
class _Plan:
    """What is wrong with a database or a log, and what to do."""

    findings: tuple[Finding, ...]
    salvage: Salvage | None
    """None: the log is not there at all."""
    state: StoreState | None = None
    """Of a store that stays."""
    store: Literal["none", "kept", "rebuilt"] = "none"

    @property
    def covered_lsn(self) -> int:
        return 0 if self.state is None else self.state.lsn

    def report(self, path: str, files: tuple[str, ...]) -> RepairReport:
        salvage = self.salvage
        lost: list[range] = []
        if salvage is not None and self.findings:
            for gone in salvage.lost:
                left = range(max(gone.start, self.covered_lsn + 1), gone.stop)
                lost += [left] if left else []
        return RepairReport(
            path=path,
            damage=tuple(Damage(one.path, one.offset, one.reason) for one in self.findings),
            lost=tuple(lost),
            lost_more=salvage is None or (salvage.survey.open_ended and bool(self.findings)),
            lost_bytes=0 if salvage is None else salvage.lost_bytes,
            first_lsn=self.covered_lsn + 1 if salvage is None else salvage.first_lsn,
            last_lsn=self.covered_lsn if salvage is None else salvage.last_lsn,
            files=files,
            consumers_lost=salvage is not None and salvage.places,
            store=self.store,
            copies=None,
            done=False,
        )


@final
class Repair:
    """One repair, as a worker thread does it.

    Args:
      tick: called often until anything is changed; what it raises ends the repair.
    """

    def __init__(
        self,
        files: Files,
        path: str,
        *,
        accept_loss: bool,
        keep: Keep,
        trust_directory: bool,
        tick: Progress,
        rebuild_store: bool = False,
    ) -> None:
        self._files = files
        self._stores = stores_of(files)
        self._path = path
        self._accept_loss = accept_loss
        self._keep: Keep = keep
        self._trust = trust_directory
        self._tick = tick
        self._rebuild_store = rebuild_store

    def run(self) -> RepairReport:
        """Raises what `repair` says."""
        top = self._files.open_directory(self._path)
        try:
            if not self._trust:
                top.check_trusted()
            names = top.names()
        finally:
            top.close()
        log_path, exists = f"{self._path}/{LOG_NAME}", self._files.exists
        if META_NAME not in names and (exists(log_path) or exists(self._store_path)):
            return self._database(log_path, exists=exists(log_path))
        if self._rebuild_store:
            what = "no database, and so has no store that could be rebuilt"
            raise WrongDirectoryError(self._path, what, "repair() without rebuild_store")
        with self._owned(self._path, follow=True) as directory:
            found = survey(directory, self._tick)
            if found.meta.features & FEATURE_DATABASE:
                parent = self._path.rpartition("/")[0]
                what = "the log of a database"
                raise WrongDirectoryError(self._path, what, f"repair({parent!r})")
            salvage = decide(found, self._keep)
            plan = _Plan(found.findings if found.damaged else (), salvage)
            report = plan.report(self._path, self._changed(directory, plan))
            if not (report.damage and self._accept_loss):
                return report
            copies = self._keep_copies(directory, report, "")
            carry_out(self._files, directory, salvage)
        self._open(self._path, database=False)
        return attrs.evolve(report, copies=copies, done=True)

    @contextmanager
    def _owned(self, path: str, *, follow: bool) -> Generator[Directory]:
        directory = self._files.open_directory(path, follow=follow)
        try:
            if not self._trust:
                directory.check_trusted()
            directory.lock()
            yield directory
        finally:
            close_quietly(directory)

    def _changed(self, directory: Directory, plan: _Plan) -> tuple[str, ...]:
        if not plan.findings or plan.salvage is None:
            return ()
        names = tuple(changed_files(directory, plan.salvage))
        for name in names:
            self._check_copyable(directory, name)
        return names

    def _check_copyable(self, directory: Directory, name: str) -> None:
        """What cannot be copied is not touched, and so it is said before anything is promised."""
        try:
            directory.open(name).close()
        except CorruptLogError as exc:
            reason = f"{exc.reason.partition(';')[0]}, so it cannot be copied: move it away"
            raise CorruptLogError(exc.path, exc.offset, reason) from exc

    def _keep_copies(self, directory: Directory | None, report: RepairReport, into: str) -> str:
        """Of the log's files; returns where they are."""
        files, number = self._files, 1
        while files.exists(f"{self._path}/{ASIDE}-{number}"):
            number += 1
        dest = f"{self._path}/{ASIDE}-{number}"
        temporary = files.begin_directory(dest)
        try:
            if directory is not None:
                copy_files(files, directory, report.files, f"{temporary}{into}", self._tick)
            files.finish_directory(temporary, dest)
        except BaseException:
            files.discard_directory(temporary)
            raise
        return dest

    def _open(self, path: str, *, database: bool) -> None:
        """What is left to do an open does; and so it is seen that it opens."""
        open_log_directory(
            self._files,
            path,
            segment_size=SEGMENT_SIZE,
            database=database,
            trust_directory=self._trust,
        ).close()

    # -- a database --

    @property
    def _store_path(self) -> str:
        return f"{self._path}/{STORE_NAME}"

    def _database(self, log_path: str, *, exists: bool) -> RepairReport:
        findings, state = self._look_at_store()
        if exists:
            with self._owned(log_path, follow=False) as directory:
                plan = self._plan(directory, findings, state)
                report = None if plan is None else self._repair_database(directory, plan)
            if report is not None:
                if report.done:
                    self._open(log_path, database=True)
                return report
        return self._without_log(log_path, findings, state)

    def _look_at_store(self) -> tuple[list[Finding], StoreState | None]:
        path = self._store_path
        if self._rebuild_store and self._files.exists(path):
            return [Finding(path, 0, TO_BE_REBUILT)], None
        try:
            self._stores.check_store(path, "child", self._tick)
            return [], self._stores.inspect_store(path)
        except CorruptLogError as exc:
            return [Finding(exc.path, exc.offset, exc.reason.partition(";")[0])], None

    def _plan(
        self, directory: Directory, findings: list[Finding], state: StoreState | None
    ) -> _Plan | None:
        """None: there is nothing of a log.

        Raises `CorruptLogError` where nothing that is left has the beginning.
        """
        try:
            found = survey(directory, self._tick)
        except WrongDirectoryError:
            return None
        if state is not None and not (found.has_meta or found.pieces):
            # Nothing of the log says whose it is; the store does.
            features = FEATURE_DATABASE
            known = replace(found.meta, log_uuid=state.log_uuid, features=features)
            found = attrs.evolve(found, meta=replace(known, consumers=True))
        salvage = decide(found, needed_lsn=1 if state is None else state.lsn + 1)
        whole_end = found.pieces[-1].last_lsn if found.pieces else found.meta.base_lsn - 1
        wrong: str | None = None
        if not findings:
            uuid = None if found.unborn else found.meta.log_uuid
            wrong = misfit(state, uuid, found.meta.base_lsn, whole_end)
        if state is not None and not found.unborn and state.log_uuid != found.meta.log_uuid:
            # As if it were not there.
            state = None
            salvage = decide(found, needed_lsn=1)
        damage = [*(found.findings if found.damaged else ()), *findings]
        if wrong is not None and not found.damaged:
            damage.append(Finding(data_file(self._store_path), 0, wrong))
        if damage and state is None and not _has_beginning(salvage):
            has = "the log does not have" if self._rebuild_store else "neither log nor store has"
            raise CorruptLogError(
                damage[-1].path,
                damage[-1].offset,
                f"{damage[-1].reason}; {has} the beginning any more, so this database cannot be "
                "repaired: restore a backup",
            )
        rebuilt = state is None and (bool(findings) or wrong is not None)
        return _Plan(tuple(damage), salvage, state, "rebuilt" if rebuilt else "kept")

    def _repair_database(self, directory: Directory, plan: _Plan) -> RepairReport:
        salvage = plan.salvage
        assert salvage is not None
        report = plan.report(self._path, self._changed(directory, plan))
        if not (report.damage and self._accept_loss):
            return report
        copies = self._keep_copies(directory, report, f"/{LOG_NAME}")
        if plan.store == "rebuilt":
            self._stores.set_store_aside(self._store_path, f"{copies}/{STORE_NAME}")
        if salvage.changes:
            carry_out(self._files, directory, salvage)
        return attrs.evolve(report, copies=copies, done=True)

    def _without_log(
        self, log_path: str, findings: list[Finding], state: StoreState | None
    ) -> RepairReport:
        if state is None:
            reason = findings[0].reason if findings else "the database has neither log nor store"
            raise CorruptLogError(self._path, 0, f"{reason}; restore a backup")
        plan = _Plan((Finding(log_path, 0, "the database has no log"),), None, state, "kept")
        report = plan.report(self._path, ())
        if not self._accept_loss:
            return report
        self._files.open_directory(log_path, create=True, follow=False).close()
        with self._owned(log_path, follow=False):
            create_empty(
                self._files,
                log_path,
                log_uuid=state.log_uuid,
                first_lsn=state.lsn + 1,
                features=FEATURE_DATABASE,
                history=forgotten(),
                consumers=True,
            )
        self._open(log_path, database=True)
        return attrs.evolve(report, done=True)


def _has_beginning(salvage: Salvage) -> bool:
    """Whether a store can be made of what stays of the log."""
    began = salvage.survey.meta.base_lsn
    return began == 1 and (bool(salvage.kept) or not salvage.survey.known_lsn)


# -- for users ------------------------------------------------------------------------------


@enable_ki_protection
async def repair(
    path: str | os.PathLike[str],
    *,
    accept_loss: bool = False,
    keep: Keep = "oldest",
    rebuild_store: bool = False,
    trust_directory: bool = False,
    on_progress: Progress | None = None,
    files: Files | None = None,
) -> RepairReport:
    """Make a damaged log or database open again, or say what would be lost by that.

    Without ``accept_loss`` nothing is changed: the report says what is wrong and which records
    could not be kept.  With it, every file that is changed or dropped is first copied, durably,
    into a directory ``before-repair-N`` in ``path``; then the log is cut before its first damage,
    because LSNs have no gaps, and begins a new epoch there, so that bookmarks of what is lost are
    refused.  What no record depends on (padding, footers, ``log.meta``, the name of a file) is
    mended without loss.

    Of a database what its store holds is kept, whatever becomes of the log before that.  A store
    that is damaged or gone is set aside, and rebuilt by the next open, where the log still reaches
    back to LSN 1.

    Crash-safe: interrupted at any moment, a log is as damaged as before or repaired, and a second
    call does the rest.  Cancelled before anything is changed, nothing is; from then on it is
    carried out.

    Args:
      path: of a log or a database that nobody has open.
      accept_loss: whether to do it.
      keep: where a log has several parts without a gap, which one: ``"oldest"``, as every recovery
          after damage; ``"newest"`` drops the older part, as ``truncate_before`` does.  A
          database's store decides for itself.
      rebuild_store: set a database's store aside without a look at it, and have the next open
          rebuild it, where the log still reaches back to LSN 1: for a store of which you know that
          it is worth nothing, such as one that says it is a newer trio-wal's and never was.
      trust_directory: as for `open_wal`.
      on_progress: called, in a worker thread, with the bytes that are looked at or copied so far
          and the bytes that there are.
      files: another file system, such as `trio_wal.testing.MemoryFiles`.

    Raises:
      TypeError, ValueError: an argument is wrong.
      FileNotFoundError: there is nothing at ``path``.
      WrongDirectoryError: there is something else.
      LogLockedError: the log is open, here or in another process.
      CorruptLogError: something that is no file has the name of one, and must be moved away; a
          database of which neither log nor store has the beginning any more; or
          ``log.meta`` is gone, and nothing tells which of several logs' segments are this one's.
      UnsupportedFormatError: a file of it is from a newer trio-wal, which knows what it is worth;
          see ``rebuild_store``.
      UnsupportedOperationError: the log is replicated; its servers repair it.
      LogFullError, OSError: there is no space for the copies or the new segment, or the disk
          fails.  Nothing is lost: call it again.
    """
    require_trio("repair")
    if remote_log(path) is not None:
        reason = "the servers repair their copies of a replicated log from each other"
        raise UnsupportedOperationError(str(path), "repair", reason)
    check_bool("accept_loss", accept_loss)
    check_one_of("keep", keep, ("oldest", "newest"))
    check_bool("rebuild_store", rebuild_store)
    check_bool("trust_directory", trust_directory)
    where: Files = OsFiles() if files is None else files

    def tick(done: int, total: int) -> None:
        if where.threaded:
            trio.from_thread.check_cancelled()
        if on_progress is not None:
            on_progress(done, total)

    work = Repair(
        where,
        where.absolute(check_path(path)),
        accept_loss=accept_loss,
        keep=keep,
        trust_directory=trust_directory,
        tick=tick,
        rebuild_store=rebuild_store,
    )
    blocking = Blocking(threaded=where.threaded)
    try:
        return await blocking(work.run)
    finally:
        with trio.CancelScope(shield=True):
            await blocking.close()


publish(Damage, RepairReport, repair)
