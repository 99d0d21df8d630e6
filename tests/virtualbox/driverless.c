/*
 * VBoxHeadless for a computer without VirtualBox's kernel driver; part of script/virtualbox.
 *
 * Only for tests. VirtualBox can run a machine without its driver, by interpreting every
 * instruction, but the stock VBoxHeadless has no option to ask for it. This one starts the same
 * runtime and the same front end (VBoxHeadless.so), with that asked for. The machine needs
 * `VBoxManage modifyvm NAME --vm-execution-engine=interpreter` (or recompiler).
 */
#include <dlfcn.h>
#include <limits.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

/* Flags of RTR3InitExe (iprt/initterm.h); SUPLib's own (VBox/sup.h) begin at bit 18. */
#define INIT_SUPLIB (UINT32_C(1) << 16)
#define SUP_SHIFT 18
#define SUP_DRIVERLESS (UINT32_C(1) << 2)
#define SUP_INTERPRETER (UINT32_C(1) << 3)

typedef int init_fn(int argc, char ***argv, uint32_t flags);
typedef int main_fn(int argc, char **argv, char **environment);

static void *load(const char *name)
{
    char path[PATH_MAX];
    ssize_t length = readlink("/proc/self/exe", path, sizeof path - 64);
    void *library = NULL;
    if (length > 0) {
        path[length] = 0;
        strcpy(strrchr(path, '/') + 1, name);
        library = dlopen(path, RTLD_NOW | RTLD_GLOBAL);
    }
    if (!library)
        fprintf(stderr, "VBoxHeadless (driverless): %s\n", dlerror());
    return library;
}

int main(int argc, char **argv, char **environment)
{
    void *runtime = load("VBoxRT.so");
    if (!runtime)
        return 90;
    init_fn *init = (init_fn *)dlsym(runtime, "RTR3InitExe");
    uint32_t flags = INIT_SUPLIB | (SUP_DRIVERLESS | SUP_INTERPRETER) << SUP_SHIFT;
    if (!init || init(argc, &argv, flags) < 0)
        return 91;
    void *front = load("VBoxHeadless.so");
    main_fn *trusted_main = front ? (main_fn *)dlsym(front, "TrustedMain") : NULL;
    return trusted_main ? trusted_main(argc, argv, environment) : 92;
}
