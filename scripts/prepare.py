"""`microcinema prepare` as a script, for `accelerate launch scripts/prepare.py latents key=value ...`."""

import sys

from microcinema.commands.cli import main

if __name__ == "__main__":
    sys.exit(main(["prepare", *sys.argv[1:]]))
