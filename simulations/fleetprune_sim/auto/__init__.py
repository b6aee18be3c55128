"""Settings that are found out: candidates are tried on few rounds, and the best one is run."""
