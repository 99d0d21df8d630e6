/*
 * Becomes a program of the VirtualBox in ../tree, by its own name; part of script/virtualbox.
 *
 * That VirtualBox is built for a newer system than this one, so it needs that system's libraries.
 * A chroot would give it other paths than its caller has; here only /usr and the loader's cache are
 * the other system's, in a mount namespace of this process's own. There is no fork: the process id,
 * the descriptors, and the signal for the death of the parent stay what the caller made them. Only
 * root may do that; a user namespace is no way around, as VirtualBox wants /usr to be root's.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <limits.h>
#include <sched.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <unistd.h>

static void fail(const char *what)
{
    fprintf(stderr, "virtualbox test bed: %s: %s\n", what, strerror(errno));
    _exit(126);
}

int main(int argc, char **argv)
{
    char self[PATH_MAX], from[PATH_MAX + 64], program[PATH_MAX];
    ssize_t length = readlink("/proc/self/exe", self, sizeof self - 1);
    (void)argc;
    if (length < 0)
        fail("/proc/self/exe");
    self[length] = 0;
    /* BED/bin/enter: the name by which we were called says which program is meant. */
    *strrchr(self, '/') = 0;
    *strrchr(self, '/') = 0;
    const char *name = strrchr(argv[0], '/') ? strrchr(argv[0], '/') + 1 : argv[0];
    snprintf(program, sizeof program, "/usr/lib/virtualbox/%s", name);

    if (unshare(CLONE_NEWNS) != 0)
        fail("this process may not mount (its capabilities were dropped?)");
    if (mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) != 0)
        fail("private mounts");
    snprintf(from, sizeof from, "%s/tree/usr", self);
    if (mount(from, "/usr", NULL, MS_BIND, NULL) != 0)
        fail(from);
    snprintf(from, sizeof from, "%s/tree/etc/ld.so.cache", self);
    if (mount(from, "/etc/ld.so.cache", NULL, MS_BIND, NULL) != 0)
        fail(from);
    /* The working directory was opened before the mounts: if it is below /usr, it is the old one. */
    execv(program, argv);
    fail(program);
}
