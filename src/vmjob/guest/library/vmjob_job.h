/* What a job in a vmjob machine may tell the host, without linking BOINC's library.
 * Outside such a machine every call does nothing. C90 and later, C++; nothing to link. */
#ifndef VMJOB_JOB_H
#define VMJOB_JOB_H

#include <stdio.h>
#include <stdlib.h>

static void vmjob_tell(const char *line) {
    const char *path = getenv("VMJOB_TO_HOST");
    FILE *pipe = path && *path ? fopen(path, "a") : NULL;
    if (pipe) {
        fputs(line, pipe);
        fclose(pipe);
    }
}

/* How much of the work is done, 0 to 1. */
static void vmjob_fraction_done(double fraction) {
    char line[64];
    sprintf(line, "fraction_done %.6g\n", fraction);
    vmjob_tell(line);
}

/* Floating-point and integer operations since the beginning. */
static void vmjob_ops_cumulative(double floating, double integer) {
    char line[96];
    sprintf(line, "ops_cumulative %.17g %.17g\n", floating, integer);
    vmjob_tell(line);
}

/* Whether to write a checkpoint of one's own now: never, the whole machine is kept. */
static int vmjob_time_to_checkpoint(void) {
    return 0;
}

/* A checkpoint of one's own was written. */
static void vmjob_checkpoint_completed(void) {
    vmjob_tell("checkpoint_completed\n");
}

/* So that a program that uses only some of them compiles without warnings. */
static void *const vmjob_all_used[] __attribute__((unused)) = {
    (void *)vmjob_fraction_done, (void *)vmjob_ops_cumulative,
    (void *)vmjob_time_to_checkpoint, (void *)vmjob_checkpoint_completed};

#endif
