"""Keep a run going: start it again after a failure, on the hosts that answer."""
