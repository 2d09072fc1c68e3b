"""`microcinema evaluate` as a script, for `accelerate launch scripts/evaluate.py key=value ...`."""

import sys

from microcinema.commands.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
