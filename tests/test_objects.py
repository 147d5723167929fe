"""An archive in an object storage, on a real server that speaks S3: `nox -s objects`.

Skipped where obstore or moto is not installed: they are a session of their own.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
from archives import wait_archived

import trio_wal
from trio_wal import ObjectArchive, _objects

obstore: Any = pytest.importorskip("obstore")
moto: Any = pytest.importorskip("moto.server")

pytestmark = pytest.mark.filterwarnings("default")  # those of moto's and boto's own


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    import boto3

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = moto.ThreadedMotoServer(port=0, verbose=False)
    server.start()
    url = f"http://127.0.0.1:{server.get_host_and_port()[1]}"
    client: Any = boto3.client(
        "s3",
        endpoint_url=url,
        aws_access_key_id="key",
        aws_secret_access_key="secret",
        region_name="us-east-1",
    )
    client.create_bucket(Bucket="bucket")
    yield url
    server.stop()


@pytest.fixture(params=["s3", "memory"])
def store(request: pytest.FixtureRequest) -> Any:
    if request.param == "memory":
        return obstore.store.MemoryStore()
    return obstore.store.S3Store(
        "bucket",
        endpoint=request.getfixturevalue("endpoint"),
        access_key_id="key",
        secret_access_key="secret",
        region="us-east-1",
        virtual_hosted_style_request=False,
        client_options={"allow_http": True},
    )


@pytest.fixture
def archive(store: Any, request: pytest.FixtureRequest) -> ObjectArchive:
    return ObjectArchive(store, prefix=f"archives/{abs(hash(request.node.name))}/")


def test_what_is_put_is_got_and_listed(archive: ObjectArchive) -> None:
    assert archive.list() == []
    archive.put("one", [b"a", b"", b"bc"])
    archive.put("empty", [])
    assert sorted(archive.list()) == ["empty", "one"]
    assert b"".join(archive.get("one")) == b"abc"
    assert b"".join(archive.get("empty")) == b""
    with pytest.raises(FileNotFoundError):
        next(archive.get("nothing"))


@pytest.mark.parametrize("part_bytes", [2, 1000])
def test_a_name_is_taken_once_and_the_same_content_is_fine(
    archive: ObjectArchive, monkeypatch: pytest.MonkeyPatch, part_bytes: int
) -> None:
    monkeypatch.setattr(_objects, "PART_BYTES", part_bytes)
    archive.put("one", [b"abcde"])
    archive.put("one", [b"abc", b"de"])
    for other in ([b"abcdx"], [b"abcd"], [b"abcdef"], [b"a"], []):
        with pytest.raises(FileExistsError, match="other content is kept under this name"):
            archive.put("one", other)
        assert b"".join(archive.get("one")) == b"abcde"
    assert archive.list() == ["one"]


def test_what_is_large_stands_in_parts(
    archive: ObjectArchive, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_objects, "PART_BYTES", 100)
    for size in (99, 100, 101, 199, 200, 201, 1000):
        content = bytes(range(256)) * 4
        archive.put(f"of {size}", [content[:size][n : n + 33] for n in range(0, size, 33)])
        assert b"".join(archive.get(f"of {size}")) == content[:size]
    assert len(archive.list()) == 7


def test_an_error_of_the_content_leaves_nothing(
    archive: ObjectArchive, monkeypatch: pytest.MonkeyPatch
) -> None:
    def content() -> Iterator[bytes]:
        yield b"abc"
        raise ZeroDivisionError

    for part_bytes in (1000, 2):
        monkeypatch.setattr(_objects, "PART_BYTES", part_bytes)
        with pytest.raises(ZeroDivisionError):
            archive.put("one", content())
        assert archive.list() == []
        with pytest.raises(FileNotFoundError):
            next(archive.get("one"))
    archive.put("one", [b"abc", b"d"])
    assert b"".join(archive.get("one")) == b"abcd"


async def test_the_drill(archive: ObjectArchive, tmp_path: Path) -> None:
    async with trio_wal.open_database(tmp_path / "db", archive=archive, segment_size=1) as db:
        for number in range(12):
            await db.put(b"%d" % (number % 5), b"%d" % number)
            if number == 5:
                await db.backup(tmp_path / "backup")
        await wait_archived(db.wal)
        assert db.statistics().wal.archive_failures == 0
    for lsn in (3, 9, 12):
        report = await trio_wal.restore(archive, tmp_path / f"{lsn}", to_lsn=lsn)
        assert report.backup_lsn == (None if lsn < 6 else 6)
        async with trio_wal.open_database(tmp_path / f"{lsn}") as db:
            assert dict(db.scan()) == {b"%d" % (n % 5): b"%d" % n for n in range(lsn)}
    assert not any(name.startswith("probe") for name in archive.list())


async def test_a_store_that_lets_two_win_is_refused(
    archive: ObjectArchive, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    put = obstore.put

    def careless(store: Any, path: str, content: Iterable[bytes], **_: Any) -> Any:
        return put(store, path, content)

    monkeypatch.setattr(obstore, "put", careless)
    with pytest.raises(trio_wal.WrongDirectoryError, match="where two win that put under one name"):
        async with trio_wal.open_wal(tmp_path / "log", archive=archive):
            pytest.fail("opened")
    assert not await trio.Path(tmp_path / "log").exists()
    assert archive.list() == []
