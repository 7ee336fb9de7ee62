"""Started by test_first_half_hour.py: the command line on a GPU of which little may be used."""

import sys

import torch

from ekfac_dist.cli import main

if __name__ == "__main__":
    torch.cuda.set_per_process_memory_fraction(1e-5)
    sys.exit(main(sys.argv[1:]))
