"""Two processes and their channels: process 1 sends what it must not; process 0 reports it, and sends the reason back.

Each prints one line ``case> error`` for each case.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
import torch.distributed as dist

from fellrec.cut.messages import HiddenState, Report
from fellrec.distributed import channel as channels
from fellrec.errors import SplitError
from fellrec.functional.packing import Packed

HIDDEN = HiddenState(3, 2, "train", 1, (Packed(torch.zeros(2, 3, 4)),))
CONTENTS = {
    "dtype": torch.zeros(2, 3, 4, dtype=torch.complex64),
    "integers": torch.zeros(2, 3, 4, dtype=torch.int64),
    "shape": torch.zeros(4, 4),
}
CASES = ("dtype", "integers", "shape", "labels", "abort", "version")
"""The version comes last: it holds for all channels of process 1."""


def misbehave(channel: channels.Channel, case: str) -> None:
    """Send something that a client process of another version, or a broken one, would send."""
    encode = channels.encode

    def wrong(message: Any) -> tuple[dict[str, Any], list[torch.Tensor]]:
        header, tensors = encode(message)
        if case == "labels":
            header["fields"]["labels"] = [1, 2]
        return header, [CONTENTS.get(case, tensor) for tensor in tensors]

    if case == "abort":
        channel.abort("process 1 stopped: no more")
        return
    if case == "version":
        channels.PROTOCOL_VERSION = 99
    else:
        channels.encode = wrong
    try:
        channel.send(0, HIDDEN)
    finally:
        channels.encode = encode


def report(case: str, channel: channels.Channel) -> str:
    """What this process learns in a case."""
    try:
        if channel.process == 1:
            misbehave(channel, case)
            if case == "abort":
                return ""
            return f"no error, but {channel.receive(0)}"
        message = channel.receive(1)
        channel.send(1, Report())
        return f"no error, but {message}"
    except SplitError as error:
        if channel.process == 0:
            channel.abort(str(error))
        return str(error)


def main() -> None:
    """Be one of the two processes, in all cases."""
    process = int(os.environ["RANK"])
    dist.init_process_group("gloo")
    for case in CASES:
        channel = channels.Channel(process, 2, 20, b"the secret of this test")
        channel.listen([1 - process])
        sys.stdout.write(f"{case}> {report(case, channel)}\n")
        channel.close()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
