"""The campaign on real servers: what it is asked for (the servers themselves are `test_nats`'s)."""

from __future__ import annotations

import pytest
from campaigns import cluster
from campaigns.__main__ import parser_of


@pytest.mark.parametrize(
    ("options", "events"),
    [
        (["--count", "200"], {"kills": 100, "takeovers": 50, "promotions": 50}),
        (["--count", "1"], {"kills": 1, "takeovers": 1, "promotions": 1}),
        (["--only", "kills", "--count", "7"], {"kills": 7}),
    ],
)
def test_one_command_has_all_kinds_of_events(options: list[str], events: dict[str, int]) -> None:
    assert cluster.events(parser_of("cluster").parse_args(options)) == events
