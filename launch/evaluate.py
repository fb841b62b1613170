"""deepspeed launch/evaluate.py --checkpoint RUN --tasks NAMES --tensor N --pipeline M; see `megagpt eval run -h`."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a checkout, installed or not

from megagpt.cli import main
from megagpt.train.environment import let_the_watch_speak, name_process, put_environment_first
from megagpt.train.run import exit_process

if __name__ == "__main__":
    put_environment_first(os.environ)
    name_process(os.environ)
    let_the_watch_speak(os.environ)
    try:
        main.main(["eval", "run", *sys.argv[1:]], standalone_mode=True)
    except SystemExit as ended:
        exit_process(int(ended.code or 0))
