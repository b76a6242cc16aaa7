"""A SLURM cluster in a temporary directory: one controller and two nodes, all on this host."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")
TIMEOUT_SECONDS = 180
"""Maximum wait of a test."""

CONFIGURATION = """\
ClusterName=fellrec
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=6
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SchedulerParameters=batch_sched_delay=0,sched_min_interval=100000
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
OverTimeLimit=0
KillWait=20
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=8 State=UNKNOWN
NodeName=node2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=8 State=UNKNOWN
PartitionName=test Nodes=node1,node2 Default=YES MaxTime=INFINITE State=UP
"""
"""``cred_expire`` is also the delay of a requeued job; the nodes declare more cores than the host may have."""


class Cluster:
    """The running cluster.

    Args:
        folder: Directory of configuration, state and logs.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def command(self, *words: str) -> str:
        """Run a SLURM command and return its output."""
        done = subprocess.run(words, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False)
        assert done.returncode == 0, f"{words}: {done.stderr}"
        return done.stdout

    def job(self, job_id: str) -> dict[str, str]:
        """Properties of a job, by name."""
        text = self.command("scontrol", "--oneliner", "show", "job", job_id)
        return dict(word.split("=", 1) for word in text.splitlines()[0].split() if "=" in word)

    def wait_for(self, condition: Callable[[], object], what: str, log: Path) -> None:
        """Wait for a condition; on a timeout, fail with the logs."""
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while not condition():
            if time.monotonic() > deadline:
                logs = [path.read_text()[-3000:] for path in (*log.glob("*.out"), *self.folder.glob("*.log"))]
                pytest.fail("\n".join([f"waited {TIMEOUT_SECONDS} s for {what}", *logs]))
            time.sleep(0.2)

    def wait_until_over(self, job_id: str, log: Path) -> str:
        """Wait for the end of a job and return its final state."""
        running = ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED")
        self.wait_for(lambda: self.job(job_id)["JobState"] not in running, f"the end of job {job_id}", log)
        return self.job(job_id)["JobState"]


def install() -> None:
    """Install the packages if possible; otherwise skip the test with the reason."""

    def missing() -> list[str]:
        path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin"])
        return [name for name in DAEMONS if shutil.which(name, path=path) is None]

    if missing() and shutil.which("apt-get") and os.geteuid() == 0:
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for words in (["update", "-qq"], ["install", "-y", "-qq", "--no-install-recommends", *PACKAGES]):
            subprocess.run(["apt-get", *words], check=False, capture_output=True, timeout=600, env=environment)
    if missing():
        pytest.skip(f"needs SLURM; cannot install {', '.join(missing())} (apt-get as root)")
    if os.geteuid() != 0:
        pytest.skip("needs SLURM, whose daemons must be started as root")


@contextmanager
def running_cluster() -> Iterator[Cluster]:
    """Start the daemons, configure the environment to use them, and stop them at the end."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # socket paths must be short
    folder.chmod(0o755)
    (folder / "state").mkdir()
    for node in ("node1", "node2"):
        (folder / f"spool-{node}").mkdir()
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(1024))
    key.chmod(0o400)
    host, ports = socket.gethostname().split(".")[0], [free_port() for _ in range(3)]
    (folder / "slurm.conf").write_text(CONFIGURATION.format(host=host, ports=ports, folder=folder))
    cluster, before = Cluster(folder), dict(os.environ)
    daemons: list[subprocess.Popen[bytes]] = []
    try:
        for name in [name for name in os.environ if name.startswith(("SLURM_", "SBATCH_"))]:
            del os.environ[name]
        os.environ |= {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": f"{before['PATH']}:/usr/sbin"}
        files = [f"--{name}={folder}/munge.{name}" for name in ("socket", "pid-file", "log-file", "seed-file")]
        daemons.append(start(["munged", "--foreground", "--force", f"--key-file={key}", *files], folder / "munged.log"))
        cluster.wait_for((folder / "munge.socket").exists, "munge", folder)
        daemons.append(start(["slurmctld", "-D", "-c"], folder / "ctld.log"))
        daemons += [start(["slurmd", "-D", "-N", node], folder / f"{node}.log") for node in ("node1", "node2")]
        cluster.wait_for(lambda: idle_nodes() == 2, "two idle nodes", folder)
        yield cluster
        cluster.command("scancel", "--user=root")
        cluster.wait_for(lambda: not cluster.command("squeue", "--noheader").strip(), "the end of all jobs", folder)
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in reversed(daemons):
            try:
                daemon.wait(timeout=30)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        os.environ.clear()
        os.environ.update(before)
        shutil.rmtree(folder, ignore_errors=True)


def start(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    """Start a daemon in the foreground."""
    with log.open("ab") as output:
        return subprocess.Popen(command, stdout=output, stderr=output, stdin=subprocess.DEVNULL, start_new_session=True)


def idle_nodes() -> int:
    """Number of idle nodes; 0 while the controller does not respond."""
    done = subprocess.run(
        ["sinfo", "--noheader", "--Node", "--format=%T"], capture_output=True, text=True, timeout=120, check=False
    )
    return done.stdout.split().count("idle")


def free_port() -> int:
    """A free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
