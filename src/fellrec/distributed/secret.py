"""The secret that the processes of a run share, and how each proves to the others that it knows it.

Whoever can reach a port of a run can connect to it. A process therefore refuses every peer that does not know the
secret: it is in the environment of the processes of one run, or, where a launcher gives them no common environment, in
a file of the user that nobody else can read.
"""

from __future__ import annotations

import hmac
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fellrec.errors import ConfigError

VARIABLE = "FELLREC_SECRET"
"""The same text in all processes of a run."""
_SHORTEST = 16
_CHALLENGE_BYTES = 32  # as many as a proof has


class Impostor(Exception):
    """Another process does not know the secret."""


class Identity:
    """What a process shows to others, and how it checks them.

    Args:
        process: Its number.
        secret: Of the run.

    Example:
        >>> first, second = Identity(0, b"the secret"), Identity(1, b"the secret")
        >>> asked, answer = first.challenge(), second.challenge()
        >>> first.check(1, second.proof(0, asked))
        >>> first.check(1, Identity(1, b"a guess").proof(0, asked))
        Traceback (most recent call last):
        fellrec.distributed.secret.Impostor: does not know the secret: FELLREC_SECRET must be the same everywhere
    """

    def __init__(self, process: int, secret: bytes) -> None:
        self.process = process
        self._secret = secret
        self._challenge = secrets.token_bytes(_CHALLENGE_BYTES)

    def challenge(self) -> bytes:
        """Random bytes that another process must put into its proof."""
        return self._challenge

    def proof(self, other: int, challenge: bytes) -> bytes:
        """This process's answer to another one's challenge."""
        return self._proof(self.process, other, challenge)

    def check(self, other: int, proof: bytes) -> None:
        """Check another process's answer to this one's challenge.

        Raises:
            Impostor: If it is wrong.
        """
        if not hmac.compare_digest(proof, self._proof(other, self.process, self._challenge)):
            raise Impostor(f"does not know the secret: {VARIABLE} must be the same everywhere")

    def _proof(self, sender: int, receiver: int, challenge: bytes) -> bytes:
        """Has the numbers of both processes, so that a process's own proof cannot be sent back to it."""
        return hmac.digest(self._secret, f"fellrec {sender} {receiver} ".encode() + challenge, "sha256")


def shared_secret() -> bytes:
    """The secret of this process's run: `VARIABLE`, or the user's own.

    Raises:
        ConfigError: If it is too short to be a secret, or there is none and none can be made.
    """
    given = os.environ.get(VARIABLE)
    if given is None:
        return _secret_of_user()
    if len(given) < _SHORTEST:
        raise ConfigError(f"{VARIABLE} must have at least {_SHORTEST} characters, the same in all processes of a run")
    return given.encode()


@contextmanager
def new_secret() -> Iterator[None]:
    """While this lasts, processes that are started have a secret of their own in their environment."""
    before = os.environ.get(VARIABLE)
    if before is None:
        os.environ[VARIABLE] = secrets.token_hex(32)
    try:
        yield
    finally:
        if before is None:
            del os.environ[VARIABLE]


def _secret_of_user() -> bytes:
    """For processes that were started by torchrun, srun or mpirun without a secret; made once."""
    folder = Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state").expanduser() / "fellrec"
    path = folder / "secret"
    try:
        if not path.exists():
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            _write_once(path)
        about = path.lstat()
        if not stat.S_ISREG(about.st_mode) or about.st_uid != os.getuid() or about.st_mode & 0o077:
            raise ConfigError(
                f"{path} must be a file of this user that nobody else can read; delete it, or set {VARIABLE}"
            )
        return path.read_bytes()
    except (OSError, RuntimeError) as error:
        raise ConfigError(
            f"{path} cannot be used ({error}); set {VARIABLE} to the same random text in all processes of the run"
        ) from error


def _write_once(path: Path) -> None:
    """If several processes do this at once, all have the file of the first."""
    draft = path.with_name(f".{secrets.token_hex(8)}")
    try:
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
        with suppress(FileExistsError):
            os.link(draft, path)
    finally:
        draft.unlink(missing_ok=True)
