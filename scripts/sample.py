"""`microcinema sample` as a script, for `accelerate launch scripts/sample.py key=value ...`."""

import sys

from microcinema.commands.cli import main

if __name__ == "__main__":
    sys.exit(main(["sample", *sys.argv[1:]]))
