"""Addresses without their passwords: what may be written and printed.

The whole address of a tracking store stays in the memory of the process that was given it. Everything else, settings,
messages and the files of a run included, has the public one.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from urllib.parse import parse_qsl, quote, unquote, urlencode

VARIABLE = "MLFLOW_TRACKING_URI"
"""Environment variable of MLflow that may have the whole address."""
HIDDEN = "***"

_NAME = re.compile(
    r"(?:PASSWORD|PASSWD|PASSPHRASE)S?(?:_|\d|$)"
    r"|(?:^|_)(?:PASS|PASSCODE|SECRETS?|TOKEN|CREDENTIALS?|AUTH|BEARER|COOKIE|DSN|PAT|CONN(?:ECTION)?_?STR(?:ING)?)(?:_|\d|$)"
    r"|(?:^|_)(?:API|APP|ACCESS|ACCOUNT|PRIVATE|SECRET|SSH)_?(?:KEY|TOKEN)(?:_|\d|$)|\w_(?:KEY|PWD)\d*$",
    re.IGNORECASE,
)
"""Names of environment variables and settings that hold a secret."""
_OF_TOKENIZERS = re.compile(
    r"(?:PAD|BOS|EOS|UNK|CLS|SEP|MASK|START|END|FIRST|LAST|NEXT|SPECIAL|SORT|PRIMARY|INDEX)_(?:TOKEN|KEY)(?:_ID)?",
    re.IGNORECASE,
)
"""Names of settings that only look like that."""
_IN_TEXT = re.compile(r"(?<!\w)(?!sqlite:///|file:///)([\w+.-]+://)[^\s'\"@]*:[^\s'\"]+@")
_HARMLESS = ("charset", "connect_timeout", "driver", "ssl_mode", "sslmode", "timeout")
"""Options of a database's address that are shown; any other may be a password."""
_MIN_LENGTH = 4
"""A shorter password is not searched for in texts: it would be found in any word. Of variables: twice as many."""

_whole: dict[str, str] = {}


def hide(uri: str) -> str:
    """The address without its password; `reveal` gives the whole one back, in this process only."""
    shown = public(uri)
    if shown != uri:
        _whole[shown] = uri
    return shown


def reveal(uri: str) -> str:
    """The whole address, from `hide` or the environment; the address itself if it has no password that is known."""
    given = os.environ.get(VARIABLE, "")
    return _whole.get(uri) or (given if given and public(given) == uri else uri)


def public(uri: str) -> str:
    """An address without user information and options that may be secret; a database's user name stays.

    Example:
        >>> public("http://me:hunter2@host:5000"), public("postgresql://me:hunter2@host/runs?sslmode=require&x=y")
        ('http://host:5000', 'postgresql://me@host/runs?sslmode=require')
    """
    scheme, mark, rest = uri.partition("://")
    if not mark:
        return HIDDEN if "@" in uri else uri
    if uri.startswith(("sqlite:///", "file:///")):
        return uri
    place, _, query = rest.partition("#")[0].partition("?")
    if "@" in rest[len(place) :]:  # a password with ? or #, or an option with @
        return f"{scheme}://{HIDDEN}"
    user, _, place = place.rpartition("@")
    name = user.partition(":")[0]
    is_database = not scheme.lower().startswith("http")
    shown = f"{name}@" if is_database and re.fullmatch(r"[\w.%+-]+", name) else ""
    options = [(key, value) for key, value in parse_qsl(query) if is_database and key.lower() in _HARMLESS]
    return f"{scheme}://{shown}{place}{'?' if options else ''}{urlencode(options)}"


def redact(text: str) -> str:
    """A text without any secret that this process knows, and without the passwords of addresses in it.

    Example:
        >>> redact("no answer from http://me:hunter2@host:5000/api")
        'no answer from http://***@host:5000/api'
    """
    for shown, whole in _whole.items():
        text = text.replace(whole, shown)
    for secret in sorted(known_secrets(), key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    return _IN_TEXT.sub(rf"\1{HIDDEN}@", text)


def has_secret(text: str, known: Collection[str] | None = None) -> bool:
    """Whether a text has something that must not be written, such as the password of an address.

    Args:
        text: To search.
        known: What `known_secrets` gives, for many texts.
    """
    known = known_secrets() if known is None else known
    return bool(_IN_TEXT.search(text)) or any(secret in text for secret in known)


def names_secret(name: str) -> bool:
    """Whether a variable or setting of this name holds a secret.

    Example:
        >>> [names_secret(name) for name in ("PGPASSWORD", "MYSQL_PWD", "api_key", "TOKENIZERS_PARALLELISM", "PWD")]
        [True, True, True, False, False]
        >>> names_secret("slack_token"), names_secret("pad_token")
        (True, False)
    """
    return bool(_NAME.search(name)) and not _OF_TOKENIZERS.fullmatch(name)


def known_secrets() -> set[str]:
    """Passwords and tokens of the hidden addresses and of the environment."""
    given = os.environ.get(VARIABLE, "")
    parts = {part for uri in (*_whole.values(), given) for part in _parts(uri)}
    parts = {secret for part in parts for secret in (part, unquote(part)) if len(secret) >= _MIN_LENGTH}
    # A variable may be removed meanwhile: MLflow's telemetry does so in a thread.
    found = [os.environ.get(name, "") for name in list(os.environ) if names_secret(name)]
    named = [value for value in found if len(value) >= 2 * _MIN_LENGTH]
    return parts | {form for value in named for form in (value, quote(value, safe=""))}


def _parts(uri: str) -> set[str]:
    """What an address has that its public form has not."""
    if public(uri) == uri:
        return set()
    rest = uri.partition("://")[2]
    user, _, place = rest.rpartition("@")
    name, colon, password = user.partition(":")
    options = {value for key, value in parse_qsl(place.partition("?")[2]) if key.lower() not in _HARMLESS}
    return {password if colon else name, *options}
