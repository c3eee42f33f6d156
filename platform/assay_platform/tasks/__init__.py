"""Ray: a local cluster for one command, or an attached one; submitted jobs."""
