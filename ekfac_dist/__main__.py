"""`python -m ekfac_dist`: the same as `ekfac-dist`."""

import sys

from ekfac_dist.cli import main

if __name__ == "__main__":
    sys.exit(main())
