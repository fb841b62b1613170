"""What is wrong with the hosts of a run, found before it starts: `megagpt doctor`."""
