# What a job in a vmjob machine may tell the host:  . /usr/lib/vmjob/vmjob_job.sh
# Outside such a machine every call does nothing.

vmjob_tell() {
    if [ -n "${VMJOB_TO_HOST:-}" ]; then
        printf '%s\n' "$*" >> "$VMJOB_TO_HOST"
    fi
}

# How much of the work is done, 0 to 1.
fraction_done() { vmjob_tell "fraction_done $1"; }

# Floating-point and integer operations since the beginning.
ops_cumulative() { vmjob_tell "ops_cumulative $1 $2"; }

# Whether to write a checkpoint of one's own now: never, the whole machine is kept.
time_to_checkpoint() { return 1; }

# A checkpoint of one's own was written.
checkpoint_completed() { vmjob_tell checkpoint_completed; }
