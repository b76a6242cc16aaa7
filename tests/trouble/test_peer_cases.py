"""What another process can do to a run: each test is an attack, or what a broken process would send."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import socket
import stat
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cut_models import cut_in_two
from small_models import CONFIGS
from transformers import AutoModelForCausalLM

from fellrec.cut import messages as m
from fellrec.cut.serve import serve
from fellrec.distributed import meeting
from fellrec.distributed.channel import Channel
from fellrec.distributed.message import PROTOCOL_VERSION, Done, Message, Stop, decode
from fellrec.distributed.secret import VARIABLE, shared_secret
from fellrec.errors import BackboneError, ConfigError, SplitError
from fellrec.experiment.backbones import cached_backbone
from fellrec.functional.packing import Packed
from fellrec.pool.messages import Begin, TrainClient
from fellrec.pool.pool import Pool

SECRET = b"what all processes of this test know"
TIMEOUT, LONG_TIMEOUT = 3.0, 30.0
NESTED = b"[" * 100_000


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def as_two(run: Callable[[int], Any]) -> list[Any]:
    """What a function gives in two connected processes; neither may take longer than a few timeouts."""
    fork, port = multiprocessing.get_context("fork"), free_port()
    answers = [fork.Pipe(duplex=False) for _ in range(2)]

    def child(process: int) -> None:
        try:
            os.environ["GLOO_SOCKET_IFNAME"] = "lo"
            address = f"tcp://127.0.0.1:{port}"
            dist.init_process_group("gloo", address, timedelta(seconds=60), world_size=2, rank=process)
            answers[process][1].send(run(process))
        except BaseException as error:
            answers[process][1].send(f"{type(error).__name__}: {error}")
        time.sleep(10 * LONG_TIMEOUT)  # connected until it is killed

    processes = [fork.Process(target=child, args=(process,)) for process in range(2)]
    for process in processes:
        process.start()
    try:
        return [receiver.recv() if receiver.poll(2 * LONG_TIMEOUT) else "waits for ever" for receiver, _ in answers]
    finally:
        for process in processes:
            process.kill()
            process.join()


def frames(content: bytes, length: int | None = None, version: int = PROTOCOL_VERSION) -> list[bytes]:
    """A header as a channel sends it, whatever its content."""
    announced = len(content) if length is None else length
    first = version.to_bytes(8, "little", signed=True) + announced.to_bytes(8, "little", signed=True)
    frame = (first + content).ljust(512, b"\0")
    return [frame[:512], *([frame[512:]] if len(frame) > 512 else [])]


def header(fields: dict[str, Any], tensors: Any = (), name: str = "Abort") -> bytes:
    return json.dumps({"type": name, "fields": fields, "tensors": tensors}).encode()


MALFORMED = {
    "no JSON": (frames(b"\xff\xfe{"), "malformed message"),
    "nested": (frames(NESTED), "malformed message"),
    "no object": (frames(b"[]"), "malformed message"),
    "length": (frames(b"", 1 << 40), "malformed message"),
    "negative length": (frames(b"", -1), "malformed message"),
    "size": (frames(header({}, [["float32", [1 << 20, 1 << 20, 1 << 10]]])), "it announces .* bytes"),
    "overflow": (frames(header({}, [["float32", [1 << 62, 4]]])), "it announces .* bytes"),
    "negative shape": (frames(header({}, [["float32", [-4, -2]]])), "malformed message"),
    "shape": (frames(header({}, [["float32", "12"]])), "malformed message"),
    "rank": (frames(header({}, [["float32", [1] * 5000]])), "malformed message"),
    "count": (frames(header({}, [["int8", [0]]] * 200_000)), "malformed message"),
    "dtype": (frames(header({}, [[["float32"], [1]]])), "malformed message"),
    "kind": (frames(header({}, name=["Abort"])), "unknown message"),
    "type of a field": (frames(header({"reason": {"map": {}}})), "malformed message"),
    "number": (frames(header({"client": 1 << 80, "round_index": 0, "phase": "val"}, name="StopServing")), "malformed"),
    "tensor": (
        frames(header({"version": 0, "factors": {"map": {"a": {"tensor": -1}}}}, name="ChangeBase")),
        "malformed",
    ),
    "version": (frames(b"{}", version=7), "process 1 has protocol version 7"),
}


@pytest.fixture(scope="module")
def refusals() -> dict[str, list[str]]:
    """What process 0 learns of each malformed message of process 1, at once and if it asks again."""

    def run(process: int) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for case, (sent, _) in MALFORMED.items():
            channel = Channel(process, 2, LONG_TIMEOUT, SECRET)
            channel.listen([1 - process])
            if process == 1:
                for content in sent:
                    dist.send(torch.frombuffer(bytearray(content), dtype=torch.uint8), dst=0, group=channel._group)
                continue
            found[case] = []
            for _ in range(2):
                with pytest.raises(SplitError) as raised:
                    channel.receive(1)
                found[case].append(str(raised.value))
        return found

    found: dict[str, list[str]] = as_two(run)[0]
    return found


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_message_is_refused_within_the_timeout_and_nobody_waits_again(
    case: str, refusals: dict[str, list[str]]
) -> None:
    first, again = refusals[case]
    assert re.search(MALFORMED[case][1], first), first
    assert first.startswith(("process 1 ", "unknown message")), first
    assert again == first


def test_a_process_without_the_secret_is_refused_on_both_sides() -> None:
    def run(process: int) -> str:
        channel = Channel(process, 2, LONG_TIMEOUT, SECRET if process == 0 else b"a guess")
        with pytest.raises(SplitError) as raised:
            channel.listen([1 - process])
        return str(raised.value)

    expected = "process {} does not know the secret: FELLREC_SECRET must be the same everywhere"
    assert as_two(run) == [expected.format(1), expected.format(0)]


@pytest.mark.parametrize("sends", ["nothing", "its own answer"])
def test_a_stranger_that_only_connects_is_refused_within_the_timeout(sends: str) -> None:
    """The second one sends every frame back."""

    def run(process: int) -> str:
        channel = Channel(process, 2, TIMEOUT, SECRET)
        if process == 0:
            with pytest.raises(SplitError) as raised:
                channel.listen([1])
            return str(raised.value)
        frame = torch.zeros(512, dtype=torch.uint8)
        for _ in range(2 if sends == "its own answer" else 0):
            dist.recv(frame, src=0, group=channel._group)
            dist.send(frame, dst=0, group=channel._group)
        return ""

    problem = "did not answer for 3 s" if sends == "nothing" else "does not know the secret"
    assert problem in as_two(run)[0]


def test_nothing_is_made_from_a_message_and_no_path_comes_with_one(tmp_path: Path) -> None:
    """``Begin`` had a configuration, whose ``_target_`` was instantiated, and the folder of the backbone."""
    evil = "data:\n  reader:\n    _target_: os.system\n    command: touch stolen\n"
    for fields in ({"config": evil}, {"number": 0, "folder": "/etc"}, {"number": 0, "cache_dir": "/etc"}):
        with pytest.raises(SplitError, match="malformed message Begin"):
            decode({"type": "Begin", "fields": {**fields, "fingerprint": {"map": {}}}}, [])
    for key in ("../../../etc", "/etc", "", "0123456789abcde\n", "..", "x" * 10_000):
        with pytest.raises(SplitError, match="is not the name of a cached backbone"):
            cached_backbone(tmp_path, key)
    with pytest.raises(
        BackboneError, match="missing or damaged: the server needs the cache_dir of the client processes"
    ):
        cached_backbone(tmp_path, "0123456789abcdef")


class Scripted:
    """A channel on which messages of process 1 have arrived."""

    def __init__(self, *messages: Message) -> None:
        self.messages = list(messages)
        self.activity = ""
        self.sent: list[Message] = []

    @property
    def has_pending(self) -> bool:
        return bool(self.messages)

    def receive_any(self) -> tuple[int, Message]:
        return 1, self.messages.pop(0)

    def send(self, other: int, message: Message) -> None:
        self.sent.append(message)


HIDDEN = Packed(torch.zeros(2, 3, 32))


@pytest.mark.parametrize(
    "message",
    [
        m.OpenSlot(0, 0, "train", {}, head_layers=1),
        m.OpenSlot(0, 0, "train", {"no such parameter": torch.zeros(1)}, head_layers=1),
        m.OpenSlot(0, 0, "train", {}, head_layers=3),
        m.Serve(1, 0, "val", {}, head_layers=1),
        m.HiddenState(0, 0, "val", 1, (HIDDEN,), torch.ones(9, 9, dtype=torch.bool)),
        m.HiddenState(0, 0, "val", 1, (Packed(torch.zeros(2, 0, 32)), HIDDEN), cache=4),
        m.HiddenState(2, 0, "val", 1, (HIDDEN,)),
        m.SelectRows(0, 0, "val", 1, 2, torch.tensor([5])),
        TrainClient(0, 0, 0, 0, {}, {}, {}, {}, None, False, 0, ()),
    ],
    ids=lambda message: type(message).__name__,
)
def test_a_server_that_cannot_use_a_message_says_which(message: Message) -> None:
    _, _, server = cut_in_two(AutoModelForCausalLM.from_config(CONFIGS["llama"]), 1, 1)
    channel: Any = Scripted(Begin(0, {}), message, Stop())
    with pytest.raises(SplitError, match=rf"^(unexpected message )?{type(message).__name__}"):
        serve(channel, lambda begin: (server, Done()), skips=False)


def test_an_answer_that_nobody_asked_for_ends_the_run() -> None:
    pool = Pool(Scripted(Done()), [0, 1])  # type: ignore[arg-type]
    pool._under_way = {1: deque()}
    with pytest.raises(SplitError, match="unexpected message Done of process 1"):
        pool.poll()


def test_the_store_listens_on_the_named_address_only() -> None:
    port = free_port()
    store = meeting._store("127.0.0.1", port, 0, 1, timeout=timedelta(seconds=5))
    store.set("a", "b")
    listening = [
        line.split()[1]
        for table in ("tcp", "tcp6")
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]
        if line.split()[3] == "0A" and line.split()[1].endswith(f":{port:04X}")
    ]
    assert listening == [f"0100007F:{port:04X}"], "127.0.0.1, in the byte order of this machine"
    with pytest.raises(SplitError, match=rf"process 0 cannot listen on MASTER_ADDR=127.0.0.1, MASTER_PORT={port}"):
        meeting._store("127.0.0.1", port, 0, 1)


def test_a_process_that_ends_before_all_are_connected_is_named(tmp_path: Path) -> None:
    """Fabric killed all processes, and nothing was said. The second process of this script ends at once."""
    (tmp_path / "main.py").write_text(
        "import os, signal, time\n"
        "if os.environ.get('LOCAL_RANK') == '1':\n    os.kill(os.getpid(), signal.SIGKILL)\n"
        "from lightning.fabric.plugins.environments import LightningEnvironment\n"
        "from fellrec.distributed.meeting import WatchingLauncher\n"
        "WatchingLauncher(LightningEnvironment(), num_processes=2, num_nodes=1).launch(lambda: time.sleep(100))\n"
    )
    done = subprocess.run(
        [sys.executable, "main.py"], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=90
    )
    assert done.stderr == "fellrec: process 1 ended before all processes were connected (signal 9)\n"
    assert done.returncode == 1


def test_the_secret_of_the_environment_must_be_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "the same everywhere")
    assert shared_secret() == b"the same everywhere"
    monkeypatch.setenv(VARIABLE, "short")
    with pytest.raises(ConfigError, match="FELLREC_SECRET must have at least 16 characters"):
        shared_secret()


def test_the_users_own_secret_is_made_once_and_is_for_nobody_else(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    found = shared_secret()
    assert len(found) == 64
    assert shared_secret() == found
    path = tmp_path / "fellrec" / "secret"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    path.chmod(0o644)
    with pytest.raises(ConfigError, match="that nobody else can read"):
        shared_secret()
    path.unlink()
    path.symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").write_text("known to others")
    with pytest.raises(ConfigError, match="must be a file of this user"):
        shared_secret()
    monkeypatch.setenv("XDG_STATE_HOME", "/proc/nope")
    with pytest.raises(ConfigError, match="set FELLREC_SECRET to the same random text in all processes"):
        shared_secret()


def test_a_batch_script_makes_a_secret_and_a_port_that_do_not_follow_from_the_job() -> None:
    from fellrec.launch.settings import LauncherSettings
    from fellrec.launch.slurm import Job, JobEnvironment, batch_script

    script = batch_script(LauncherSettings(), [Job(Path("/run"), [])], JobEnvironment("x", Path("/"), "log", "python"))
    lines = "\n".join(re.findall(r"^(?:FELLREC_SECRET|MASTER_PORT)=.*$", script, re.MULTILINE))
    command = f"SLURM_JOB_ID=4711; {lines}\necho $FELLREC_SECRET $MASTER_PORT"
    found = {tuple(subprocess.check_output(["bash", "-c", command], text=True).split()) for _ in range(3)}
    assert len({secret for secret, _ in found}) == 3
    assert len({port for _, port in found}) > 1
    assert all(re.fullmatch("[0-9a-f]{64}", secret) and 20000 <= int(port) < 32000 for secret, port in found)
    assert re.search(r"^export .*\bFELLREC_SECRET\b", script, re.MULTILINE)
