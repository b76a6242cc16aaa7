"""The client's end of the cut."""

from __future__ import annotations

from typing import cast

from fellrec.cut.link import InProcess, ServerLink
from fellrec.cut.server import BodyServer
from fellrec.federated.ledger import Ledger


def test_caches_of_different_processes_have_different_numbers() -> None:
    """The server's caches are by client and number, and two processes can evaluate users of the same client."""
    numbers = []
    for process in (0, 1, 7):
        link, transport = ServerLink(), InProcess(cast(BodyServer, None))
        transport.process = process
        link.connect(transport, Ledger())
        numbers += [link.new_cache() for _ in range(3)]
    assert len(set(numbers)) == 9
