"""`microcinema train` as a script, for `accelerate launch scripts/train.py key=value ...`."""

import sys

from microcinema.commands.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
