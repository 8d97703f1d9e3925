"""The program `bbt-accel`, also as `python -m bbt_accel`."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; Ctrl-C ends it in one line even while it is imported."""
    try:
        from bbt_accel.cli.commands import main as run
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)  # command.INTERRUPTED, which may be what was being imported
    run()


if __name__ == "__main__":
    main()
