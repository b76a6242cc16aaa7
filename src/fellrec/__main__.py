"""``python -m fellrec`` is ``fellrec``: what torchrun starts."""

import sys

from fellrec.launch.garbage import begin_imports


def run() -> None:
    """Run the command of this process; Ctrl-C is one line also while modules are imported."""
    begin_imports()
    try:
        from fellrec.cli.main import main
    except KeyboardInterrupt:
        sys.stderr.write("\nfellrec: interrupted\n")
        sys.exit(130)
    main()


if __name__ == "__main__":
    run()
