"""``python -m fellrec`` is ``fellrec``: what torchrun starts."""

import sys


def run() -> None:
    """Run the command of this process; Ctrl-C is one line also while modules are imported."""
    try:
        from fellrec.cli.main import main
    except KeyboardInterrupt:
        sys.stderr.write("\nfellrec: interrupted\n")
        sys.exit(130)
    main()


if __name__ == "__main__":
    run()
