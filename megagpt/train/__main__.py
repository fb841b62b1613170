"""`deepspeed --module megagpt.train ...`: launch/pretrain.py for an installed package."""

import os
import sys

from evals.during import open_benchmarks
from megagpt.train.environment import let_the_watch_speak, name_process, put_environment_first
from megagpt.train.run import exit_process, main

if __name__ == "__main__":
    put_environment_first(os.environ)
    name_process(os.environ)
    let_the_watch_speak(os.environ)
    exit_process(main(sys.argv[1:], os.environ, open_benchmarks))
