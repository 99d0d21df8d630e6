"""What the BOINC client starts in a slot: carries the slot's job, for the client.

    start       order of the first and the last steps; signals; the exit code
    options     the command line, read
    carrying    one job under the client's orders
    orders      where the client wants the machine, and the volunteer its network
    accounts    what the job has used, in all; told to the client once a second
    ground      what a job runs on here: within what there is and is allowed
    contents    what the client has put into the slot: job file, image, hypervisor
    client      the grid that the engine tells: the client, and the log
    policy      what the owner of this computer allows
    places      how many machines run at once on it
    network     how much may pass the network, on average
    usage       processor time and memory, of everything that runs for the job
    totals      what has to outlive each process
    outcome     from how the job ended to what the client is told
    log         stderr.txt: what a scientist reads
    report      what stands at its top in the end
"""
