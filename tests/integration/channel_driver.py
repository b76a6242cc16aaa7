"""Two processes and a wire: rank 1 sends what it must not, rank 0 hears it and gives up, and says so."""

from __future__ import annotations

import os
import sys
from typing import Any

import torch

from fellrec.cut.messages import HiddenState, Report
from fellrec.distributed import channel as wires
from fellrec.errors import SplitError
from fellrec.functional.packing import Packed

HIDDEN = HiddenState(3, 2, "train", 1, (Packed(torch.zeros(2, 3, 4)),))
CONTENTS = {
    "dtype": torch.zeros(2, 3, 4, dtype=torch.complex64),
    "integers": torch.zeros(2, 3, 4, dtype=torch.int64),
    "shape": torch.zeros(4, 4),
}


def misbehave(wire: wires.Wire, case: str) -> None:
    """Send something that a client process of another version, or a broken one, would send."""
    encode = wires.encode

    def wrong(message: Any) -> tuple[dict[str, Any], list[torch.Tensor]]:
        header, tensors = encode(message)
        if case == "labels":
            header["fields"]["labels"] = [1, 2]
        return header, [CONTENTS.get(case, tensor) for tensor in tensors]

    if case == "abort":
        wire.abort("rank 1 (a client process) stopped: no more")
        return
    if case == "version":
        wires.PROTOCOL_VERSION = 99
    else:
        wires.encode = wrong
    wire.send(0, HIDDEN)
    wires.encode = encode


def main(case: str) -> None:
    """Be one of the two ranks."""
    rank = int(os.environ["RANK"])
    where = f"tcp://127.0.0.1:{os.environ['MASTER_PORT']}"
    wire = wires.Wire(rank, 2, where, 20, torch.device("cpu"))
    wire.listen([1 - rank])
    try:
        if rank == 1:
            misbehave(wire, case)
            if case != "abort":
                wire.receive(0)
        else:
            message = wire.receive(1)
            wire.send(1, Report())
            sys.stderr.write(f"understood {message}\n")
    except SplitError as error:
        sys.stderr.write(f"{error}\n")
        wire.abort(str(error))
    sys.stderr.flush()
    os._exit(1)


if __name__ == "__main__":
    main(sys.argv[1])
