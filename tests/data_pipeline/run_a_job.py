"""Started by tests as a program of its own, to be killed: python run_a_job.py CONFIG."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data_pipeline.config import DataJob
from data_pipeline.run import run_job
from megagpt.config.load import load_config

if __name__ == "__main__":
    job = load_config(DataJob, [Path(sys.argv[1])])
    sys.stdout.write("started\n")
    sys.stdout.flush()
    run_job(job)
