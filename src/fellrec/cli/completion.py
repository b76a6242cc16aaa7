"""``fellrec completion``: a script that lets a shell complete verbs, options and configuration groups."""

from __future__ import annotations

import argparse
import sys

PURPOSE = "print a script for the completion of verbs, options and groups in a shell"
EXAMPLES = (
    'eval "$(fellrec completion bash)"     # in ~/.bashrc',
    'fellrec completion zsh > "${fpath[1]}/_fellrec"',
)
_GROUPS_IN_BASH = """
_fellrec_overrides() {
  compgen -W "%s" -- "$1"
}
"""
_AFTER_IN_BASH = """
_fellrec() {
  _shtab_fellrec "$@"
  [[ ${COMPREPLY[0]-} == *= ]] && compopt -o nospace 2>/dev/null
  return 0
}
complete -o bashdefault -F _fellrec fellrec
"""
"""No space after ``aggregation=``: the choice follows."""
_GROUPS_IN_ZSH = """
_fellrec_overrides() {
  local -a groups
  groups=(%s)
  compadd -S '' -- $groups
}
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb."""
    parser.add_argument("shell", choices=("bash", "zsh", "tcsh"), help="which shell")


def run(options: argparse.Namespace) -> None:
    """Entry point of the verb."""
    import shtab

    from fellrec.cli.main import command_parser
    from fellrec.config.paths import group_choices

    parser = command_parser()
    groups = " ".join(f"{group}=" for group in group_choices())
    preamble = {"bash": _GROUPS_IN_BASH % groups, "zsh": _GROUPS_IN_ZSH % groups}
    for verb in parser.verbs.values():
        for action in verb._actions:
            if action.dest == "overrides":
                action.complete = dict.fromkeys(preamble, "_fellrec_overrides")  # type: ignore[attr-defined]
    script = shtab.complete(parser.whole, options.shell, preamble=preamble.get(options.shell, ""))
    sys.stdout.write(f"{script}\n{_AFTER_IN_BASH if options.shell == 'bash' else ''}")
