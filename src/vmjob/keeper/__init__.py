"""Machines that stay between commands of a shell: each has a process that keeps it.

`slots` is what is on the disk, `server` the keeper, `client` who asks it, `wire` what they say to
each other.
"""
