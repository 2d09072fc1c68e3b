"""`python -m microcinema`, and `accelerate launch -m microcinema train key=value ...`."""

import sys

from microcinema.commands.cli import main

if __name__ == "__main__":
    sys.exit(main())
