"""`trio-wal nats check`: are these servers, and this log on them, as a log needs them?"""

from __future__ import annotations

from typing import Annotated, Any, Final, cast

import attrs
import trio
from cyclopts import App, Parameter

from trio_wal._exceptions import LogUnavailableError, UnsuitableServersError
from trio_wal.nats import Log

from ._output import CommandError, ExitCode, Json, say, write_json
from ._servers import parse

nats_app: Final = App(name="nats", help="Look at NATS servers.")


@nats_app.command
def check(
    url: Annotated[
        str,
        Parameter(name="URL", help="A log on these servers, which need not exist."),
    ],
    /,
    *,
    json: Json = False,
) -> int:
    """Say whether NATS servers suit a log, and what to do if they do not.

    Asks each monitoring address (`?monitor=http://host:8222` in the URL, once for each; by default
    port 8222 of each server), connects, and looks at the log's stream if it exists. Creates and
    writes nothing. Exits with 1 if a log would be refused.

    Example: `trio-wal nats check nats://n0:4222,n1:4222,n2:4222/orders`
    """
    log = parse(url)
    servers, findings, stream = trio.run(_check, log)
    if json:
        write_json({"ok": not findings, "servers": servers, "stream": stream, "findings": findings})
    else:
        for server in servers:
            say(f"{server['url']}: {_described(server)}")
        say(f"{log.address}: {stream}")
        for finding in findings:
            say(f"finding: {finding}")
        say("OK" if not findings else f"{len(findings)} findings")
    return ExitCode.FINDINGS if findings else ExitCode.OK


def _described(server: dict[str, Any]) -> str:
    if server["problem"]:
        return str(server["problem"])
    synced = "syncs every write" if server["synced"] else "does not sync every write"
    jetstream = "JetStream" if server["jetstream"] else "no JetStream"
    return f"{server['name']}, nats-server {server['version']}, {jetstream}, {synced}"


async def _check(log: Log) -> tuple[list[dict[str, Any]], list[str], str]:
    """What each server says, what is wrong, and what is known of the stream."""
    try:
        from trio_wal import _natscheck
    except ModuleNotFoundError as exc:
        raise CommandError("nats-py is missing: python -m pip install 'trio-wal[nats]'") from exc
    # pyright takes a converter of attrs for the type of its field.
    servers = await _natscheck.ask_servers(cast(_natscheck.Wanted, log))
    findings = [
        f"{server.url}: nobody says whether it syncs every write"
        for server in servers
        if server.problem
    ]
    faults = [_natscheck.fault_of(server) for server in servers if not server.problem]
    findings += [f"{reason}: {remedy}" for reason, remedy in filter(None, faults)]
    looks = [_as_json(server) for server in servers]
    stream = "refused"
    try:
        cas, found = await log.connect(create=False)
    except FileNotFoundError:
        stream = "there is no such log yet"
    except (UnsuitableServersError, LogUnavailableError, PermissionError) as exc:
        findings.append(str(exc))
    else:
        with trio.CancelScope(shield=True):
            await cas.aclose()
        stream = (
            f"a log, {found.replicas_current} of {found.replicas} replicas up to date, "
            f"{found.bytes} bytes"
        )
        if found.replicas_current < found.replicas:
            findings.append(f"{found.replicas - found.replicas_current} replicas are behind")
    return looks, findings, stream


def _as_json(server: Any) -> dict[str, Any]:
    return {**attrs.asdict(server), "version": ".".join(map(str, server.version))}
