"""`deepspeed --module megagpt.train ...`: launch/pretrain.py for an installed package."""

import os
import sys

from megagpt.train.run import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ))
