"""`python -m mmssl` is the `mmssl` command."""

import sys

from mmssl.cli import main

if __name__ == "__main__":
    sys.exit(main())
