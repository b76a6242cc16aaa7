"""The files of a run's data, looked for before anything expensive is imported or started."""

from __future__ import annotations

from collections.abc import Iterable

from omegaconf import DictConfig

from fellrec.config.instantiate import instantiate
from fellrec.config.members import about_member, is_federation, member_configs
from fellrec.errors import FellrecError


def check_data_files(configs: Iterable[DictConfig]) -> None:
    """Check that the files of each run's data exist and have the columns that are read, as far as a reader can tell.

    Not with ``split.transport=distributed``, where this process may be the server, which has no data.

    Raises:
        DataError: If not.
        ConfigError: If the reader cannot be made.
    """
    from fellrec.data.schema import Reader  # with pandas, which a mistake in the settings does not need

    seen = []
    for config in configs:
        if config.split.transport == "distributed":
            continue
        for name, own in member_configs(config).items() if is_federation(config) else [("", config)]:
            if own.data.reader in seen:
                continue
            seen.append(own.data.reader)
            try:
                reader = instantiate(own.data.reader, "data.reader", of=Reader)
                if hasattr(reader, "check"):
                    reader.check()
            except FellrecError as error:
                raise (type(error)(about_member(name, str(error))) if name else error) from error
