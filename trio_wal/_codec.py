"""Compression of frame bodies, decided per log.

Law: the only file that knows zstandard, which is an extra and imported when a log
asks for it.  A declared size is checked against the limit before a byte is
decompressed, and the result against the declaration.
"""

from __future__ import annotations

import importlib
from typing import Any

from ._disk.frame import FRAME_BODY_MAX, Codec, FrameError

ZSTD_LEVEL = 1
"""Speed first: the level is paid on every commit."""


def _zstandard() -> Any:
    try:
        return importlib.import_module("zstandard")
    except ModuleNotFoundError as exc:
        raise ModuleNotFoundError(
            "a log with zstd compression needs the zstandard package: "
            "python -m pip install 'trio-wal[zstd]'",
            name="zstandard",
        ) from exc


def require_zstd() -> None:
    """Raises `ModuleNotFoundError`, with what to install, where zstandard is missing."""
    _zstandard()


def compress(pieces: list[bytes]) -> tuple[list[bytes], Codec]:
    """The body compressed, or as it was where compression does not make it smaller."""
    body = pieces[0] if len(pieces) == 1 else b"".join(pieces)
    packed: bytes = _zstandard().ZstdCompressor(level=ZSTD_LEVEL).compress(body)
    return ([packed], Codec.ZSTD) if len(packed) < len(body) else (pieces, Codec.NONE)


def decompress(body: bytes, raw_length: int) -> bytes:
    """Raises `FrameError` where the body is no Zstandard frame of just that size."""
    zstandard = _zstandard()
    if raw_length > FRAME_BODY_MAX:
        raise FrameError(f"declares {raw_length} bytes decompressed, over {FRAME_BODY_MAX}")
    try:
        parameters = zstandard.get_frame_parameters(body)
        if parameters.content_size != raw_length:
            raise FrameError(
                f"compressed body declares {parameters.content_size} bytes, its frame {raw_length}"
            )
        raw: bytes = zstandard.ZstdDecompressor().decompress(body, max_output_size=raw_length)
    except zstandard.ZstdError as exc:
        raise FrameError(f"compressed body cannot be decompressed: {exc}") from exc
    if len(raw) != raw_length:
        raise FrameError(f"compressed body has {len(raw)} bytes, its frame declares {raw_length}")
    return raw
