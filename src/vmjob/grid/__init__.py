"""FOR WHOM a job runs: a terminal, the BOINC client, a batch system."""
