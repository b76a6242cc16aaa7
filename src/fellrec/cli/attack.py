"""``fellrec attack``: what an honest-but-curious server recovers from what it receives."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fellrec.cli.arguments import add_format, add_run_dir, add_trust

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from fellrec.attacks.findings import Finding
    from fellrec.attacks.settings import AttackSettings

PURPOSE = "measure what a server recovers of a finished run's users from what it receives"
EXAMPLES = (
    "fellrec attack runs/RUN",
    "fellrec attack runs/RUN attack=nearest_embedding,logit_lens split.head_layers=0,1,2,4",
    "fellrec attack runs/RUN attack.rows=256 --output leakage --format json",
    "fellrec list attacks",
)
_NAMES, _DEPTHS, _OWN = "attack", "split.head_layers", "attack."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb."""
    add_run_dir(parser)
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="OVERRIDE",
        help="attack=NAME,NAME and attack.rows=64, see fellrec list attacks; split.head_layers=0,1,2: layers of the "
        "head at which the model is cut; data.root=…, data.path=…, backbone.path=… or cache_dir=…: where the files of "
        "the run are now",
    )
    parser.add_argument("--output", metavar="PATH", help="new directory (default: RUN_DIR/attack)")
    parser.add_argument("--log", action="store_true", help="log the figures to the run in MLflow too")
    add_format(parser)
    add_trust(parser)


def run(options: argparse.Namespace) -> None:
    """Entry point of the verb.

    Raises:
        ConfigError: If the run is not finished, an attack or a depth does not fit it, or the output exists.
    """
    from fellrec.attacks import check_names, defaults
    from fellrec.cli.arguments import check_empty
    from fellrec.config.stored import moved, read_config
    from fellrec.experiment.attackable import check_attacks

    run_dir = Path(options.run_dir)
    folder = Path(options.output) if options.output else run_dir / "attack"
    check_empty(folder)
    asked, others = _asked(options.overrides)
    settings = _settings(asked)
    check_names(_words(asked[_NAMES]) if _NAMES in asked else [])  # what is wrong is refused before PyTorch is imported
    config = moved(read_config(run_dir, options.trust), others)
    names = _words(asked[_NAMES]) if _NAMES in asked else defaults(config.backbone.name)
    check_attacks(config, names)
    from fellrec.experiment.attack import attack, check_tracked, log_findings
    from fellrec.experiment.run_dir import provenance
    from fellrec.report.leakage import leakage_table, write_leakage
    from fellrec.report.tables import results_console

    if options.log:
        check_tracked(run_dir, config)
    findings = attack(run_dir, config, names, _depths(asked), settings)
    about = {"run": run_dir.name, "attacks": names, "settings": asdict(settings)}
    files = write_leakage(folder, findings, about, provenance(run_dir).text([config.seed]))
    if options.log:
        log_findings(run_dir, config, findings, folder.name)
    if options.format == "json":
        _print_json(about, findings)
        return
    results_console().print(leakage_table(findings, f"Recovered from {run_dir.name}"))
    sys.stdout.write(_legend(config, findings))
    sys.stdout.write("".join(f"{path}\n" for path in files))


def _asked(overrides: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """What the verb is asked for, by key, and the overrides that are of the run."""
    pairs = {key: value for key, mark, value in (item.partition("=") for item in overrides) if mark}
    asked = {key: value for key, value in pairs.items() if key in (_NAMES, _DEPTHS) or key.startswith(_OWN)}
    return asked, [item for item in overrides if item.partition("=")[0] not in asked]


def _words(text: str) -> list[str]:
    """The words of a list such as ``a,b`` or ``[a,b]``, each once."""
    return list(dict.fromkeys(word.strip() for word in text.strip("[]").split(",")))


def _depths(asked: dict[str, str]) -> list[int] | None:
    from fellrec.errors import ConfigError

    if _DEPTHS not in asked:
        return None
    words = _words(asked[_DEPTHS])
    if not all(word.isdecimal() for word in words):
        raise ConfigError(f"{_DEPTHS}={asked[_DEPTHS]} is not allowed: whole numbers of at least 0, such as 0,1,2")
    return [int(word) for word in words]


def _settings(asked: dict[str, str]) -> AttackSettings:
    import yaml

    from fellrec.attacks.settings import AttackSettings
    from fellrec.config.instantiate import settings

    values = {key.removeprefix(_OWN): value for key, value in asked.items() if key.startswith(_OWN)}
    return settings(AttackSettings, {name: yaml.safe_load(value) for name, value in values.items()}, "attack")


def _print_json(about: dict[str, Any], findings: Sequence[Finding]) -> None:
    shown = {**about, "findings": [finding.to_dict() for finding in findings]}
    sys.stdout.write(f"{json.dumps(shown, indent=1)}\n")


def _legend(config: DictConfig, findings: Sequence[Finding]) -> str:
    """What the columns are, and what an attack on a private run does not say."""
    lines = []
    if any(finding.depth is not None for finding in findings):
        lines.append(
            "Shares that were recovered, by layers of the client's head. token, title: of histories, with the right "
            "one among 1 or 10 guesses (a title: all its tokens); target: of the next items; ROUGE-L: titles in order."
        )
    if any(finding.users_per_client is not None for finding in findings):
        lines.append("items of training: share of a client's training items among as many guesses, by users a client.")
        if config.privacy.unit != "none":
            lines.append(
                "The updates are those that the server of this private run receives, before its noise: privacy=… "
                "trusts the server, and protects what the rule is given, see docs/privacy.md."
            )
    return "".join(f"{line}\n" for line in lines)
