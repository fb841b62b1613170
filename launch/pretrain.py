"""deepspeed launch/pretrain.py CONFIG.yaml ... [KEY=VALUE ...]: train a model. See --help."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a checkout, installed or not

from evals.during import open_benchmarks
from megagpt.train.environment import let_the_watch_speak, name_process, put_environment_first
from megagpt.train.run import exit_process, main

if __name__ == "__main__":
    put_environment_first(os.environ)
    name_process(os.environ)
    let_the_watch_speak(os.environ)
    exit_process(main(sys.argv[1:], os.environ, open_benchmarks))
