"""WHAT to run: a job and its tasks, as plain records. Imports nothing of ours but `errors`."""
