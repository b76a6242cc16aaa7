"""``python -m fellrec`` is ``fellrec``: what torchrun starts."""

from fellrec.cli.main import main

if __name__ == "__main__":
    main()
