"""Sums of vectors by masks: the protocol of Bonawitz et al. (CCS 2017, arXiv:1611.04482), passive adversary.

The server sees the sum and no single vector.

Four exchanges: keys, encrypted shares of secrets, masked vectors, shares again. Clients may drop out between any two of
them. The masks of pairs of clients cancel in the sum; those of a client that dropped out are computed again from its
secret key, which the others recover from its shares. A second mask of each client protects a vector that arrives after
its sender was thought to have dropped out; the server removes it by the shares of its seed.

The fourth round of the paper, in which clients sign the list of survivors, is for an active server and is left out.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from secrets import token_bytes

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fellrec.errors import TrainingError
from fellrec.functional import shamir
from fellrec.functional.fixed_point import Words

NONCE_BYTES = 12
NUMBER_BYTES = 4
"""A client's number in a message."""


def threshold(num_clients: int) -> int:
    """Clients whose shares recover a secret, ``⌊2n / 3⌋ + 1``, as in the paper.

    Example:
        >>> [threshold(n) for n in (3, 5, 8)]
        [3, 4, 6]
    """
    return 2 * num_clients // 3 + 1


@dataclass(frozen=True)
class PublicKeys:
    """What a client publishes.

    Attributes:
        cipher: X25519 key for the encryption of shares.
        mask: X25519 key for the masks of pairs.
    """

    cipher: bytes
    mask: bytes

    @property
    def nbytes(self) -> int:
        """Size of the message."""
        return len(self.cipher) + len(self.mask)


@dataclass(frozen=True)
class Shares:
    """What a client reveals when vectors have been sent.

    Attributes:
        seeds: Client whose vector arrived → share of the seed of its own mask.
        keys: Client that dropped out → share of its secret mask key.
    """

    seeds: Mapping[int, bytes]
    keys: Mapping[int, bytes]

    @property
    def nbytes(self) -> int:
        """Size of the message, with the number of the client that each share is of."""
        found = [*self.seeds.values(), *self.keys.values()]
        return sum(NUMBER_BYTES + len(share) for share in found)


class Member:
    """A client in one sum.

    Args:
        number: Of the client.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self._cipher_key, self._mask_key = X25519PrivateKey.generate(), X25519PrivateKey.generate()
        self._seed = token_bytes(shamir.SECRET_BYTES)
        self._peers: dict[int, PublicKeys] = {}
        self._received: dict[int, bytes] = {}
        self._has_revealed = False

    def publish(self) -> PublicKeys:
        """First message to the server."""
        return PublicKeys(_public(self._cipher_key), _public(self._mask_key))

    def share(self, peers: Mapping[int, PublicKeys]) -> dict[int, bytes]:
        """Second message: shares of this client's two secrets, encrypted for each client, by client.

        Args:
            peers: The keys of all clients, its own among them.
        """
        self._peers = dict(peers)
        least = threshold(len(peers))
        of_key = shamir.share(self._mask_key.private_bytes_raw(), sorted(peers), least)
        of_seed = shamir.share(self._seed, sorted(peers), least)
        sent = {}
        for peer in peers:
            nonce = token_bytes(NONCE_BYTES)
            text = of_key[peer] + of_seed[peer]
            sent[peer] = nonce + AESGCM(self._cipher(peer)).encrypt(nonce, text, _names(self.number, peer))
        return sent

    def receive(self, shares: Mapping[int, bytes]) -> None:
        """What the others have sent to this client, by sender, its own share among them."""
        self._received = dict(shares)

    def masked(self, vector: Words) -> Words:
        """Third message: the vector plus its own mask and those of the pairs with all clients that sent shares."""
        total = vector + stream(self._seed, vector)
        for peer in self._received:
            if peer != self.number:
                total += pair_mask(self._mask_key, self._peers[peer].mask, self.number, peer, vector)
        return total

    def reveal(self, arrived: Collection[int]) -> Shares:
        """Fourth message: for each client the share of one of its two secrets, and never of both.

        Args:
            arrived: Clients whose vector has arrived.

        Raises:
            TrainingError: If it is asked a second time, or too few have arrived, or a share was changed on its way.
        """
        if self._has_revealed or len(set(arrived) & self._received.keys()) < threshold(len(self._peers)):
            raise TrainingError(f"client {self.number} does not reveal shares: {len(arrived)} vectors have arrived")
        self._has_revealed = True
        opened = {peer: self._opened(peer, text) for peer, text in self._received.items()}
        cut = shamir.SHARE_BYTES
        return Shares(
            seeds={peer: text[cut:] for peer, text in opened.items() if peer in arrived},
            keys={peer: text[:cut] for peer, text in opened.items() if peer not in arrived},
        )

    def _cipher(self, peer: int) -> bytes:
        other = X25519PublicKey.from_public_bytes(self._peers[peer].cipher)
        return _derived(self._cipher_key.exchange(other), b"shares")

    def _opened(self, peer: int, text: bytes) -> bytes:
        try:
            nonce, rest = text[:NONCE_BYTES], text[NONCE_BYTES:]
            return AESGCM(self._cipher(peer)).decrypt(nonce, rest, _names(peer, self.number))
        except InvalidTag as error:
            raise TrainingError(f"the share of client {peer} for client {self.number} was changed") from error


@dataclass
class Server:
    """The server in one sum.

    Attributes:
        keys: What clients have published.
        shared: Clients that sent shares.
        arrived: Clients whose vector arrived.
        total: Sum of the masked vectors; ``None`` before the first.
    """

    keys: Mapping[int, PublicKeys]
    shared: Sequence[int]
    arrived: list[int] = field(default_factory=list)
    total: Words | None = None

    def add(self, client: int, masked: Words) -> None:
        """Take a masked vector."""
        self.total = masked.copy() if self.total is None else self.total + masked
        self.arrived.append(client)

    def unmask(self, revealed: Mapping[int, Shares]) -> Words:
        """The sum of the vectors that arrived.

        Args:
            revealed: What clients have revealed, by client.

        Raises:
            TrainingError: If too few have.
        """
        least = threshold(len(self.keys))
        if len(revealed) < least or self.total is None:
            raise TrainingError(
                f"secure sum: {len(revealed)} of {len(self.keys)} clients revealed shares; needed are {least}, more "
                "than two thirds"
            )
        total = self.total.copy()
        for client in self.arrived:
            total -= stream(self._secret({by: own.seeds[client] for by, own in revealed.items()}), total)
        for client in (client for client in self.shared if client not in self.arrived):
            secret = self._secret({by: own.keys[client] for by, own in revealed.items()})
            key = X25519PrivateKey.from_private_bytes(secret)
            for other in self.arrived:  # what they added for the pair with this client
                total += pair_mask(key, self.keys[other].mask, client, other, total)
        return total

    @staticmethod
    def _secret(shares: Mapping[int, bytes]) -> bytes:
        try:
            return shamir.recover(shares)
        except ValueError as error:
            raise TrainingError(f"secure sum: {error}") from error


def pair_mask(own: X25519PrivateKey, other: bytes, number: int, peer: int, like: Words) -> Words:
    """What ``number`` adds for its pair with ``peer``; the two masks of a pair add up to 0."""
    shared = own.exchange(X25519PublicKey.from_public_bytes(other))
    mask = stream(_derived(shared, b"mask"), like)
    return mask if number > peer else np.zeros_like(mask) - mask


def stream(seed: bytes, like: Words) -> Words:
    """Pseudorandom words in the shape and type of others: the key stream of AES-256 in counter mode."""
    encryptor = Cipher(AES(seed), CTR(bytes(16))).encryptor()
    return np.frombuffer(encryptor.update(bytes(like.nbytes)), dtype=like.dtype.newbyteorder("<")).reshape(like.shape)


def _public(key: X25519PrivateKey) -> bytes:
    return key.public_key().public_bytes_raw()


def _derived(shared: bytes, purpose: bytes) -> bytes:
    return HKDF(algorithm=SHA256(), length=32, salt=None, info=b"fellrec secure sum " + purpose).derive(shared)


def _names(sender: int, receiver: int) -> bytes:
    return sender.to_bytes(NUMBER_BYTES, "big") + receiver.to_bytes(NUMBER_BYTES, "big")
