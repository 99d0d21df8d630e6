"""What the BOINC client starts in a slot: carries the slot's job, for the client.

    start       order of the first and the last steps; signals; the exit code
    carrying    one job under the client's orders
    contents    what the client has put into the slot: job file, image, hypervisor
    client      the grid that the engine tells: the client, and the log
    policy      what the owner of this computer allows
    places      how many machines run at once on it
    usage       processor time and memory, of everything that runs for the job
    totals      what has to outlive each process: processor time, faults
    outcome     from how the job ended to what the client is told
    log         stderr.txt: what a scientist reads
"""
