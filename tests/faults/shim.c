/* A disk that fails at a chosen operation, for a whole process: `cc -shared -fPIC`, then LD_PRELOAD.

   Every call of the C library that changes something in a folder is counted and written to a trace, a line each:

       name, inode, bytes before (of open files; else 0, 0), path

   and operation number `at` meets its fate. What libraries call without the C library is not seen. Outside the folder,
   and until faults_begin is called, everything goes its way. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum mode { BEFORE, HALF, AFTER, FULL, BROKEN, POWER };
enum fate { PASS, FAIL, SHORT, DIE_HALF, DIE_AFTER };

static char folder[PATH_MAX];
static int trace = -1;
static long fatal = -1, count;
static enum mode mode;

void faults_begin(const char *root, int trace_descriptor, long at, int how) {
    snprintf(folder, sizeof folder, "%s/", root);
    trace = trace_descriptor, fatal = at, count = 0, mode = how;
}

static void die(void) {
    kill(getpid(), SIGKILL);
    for (;;) pause();
}

static int refuse(int code) {
    errno = code;
    return FAIL;
}

/* What becomes of an operation: it is counted, and may not come back from here. */
static enum fate meet(const char *name, const char *path, const struct stat *file, int grows, int halves) {
    if (trace < 0 || strncmp(path, folder, strlen(folder)) != 0) return PASS;
    char line[PATH_MAX + 100];
    int length = snprintf(line, sizeof line, "%s\t%lu\t%ld\t%s\n", name, file ? file->st_ino : 0L,
                          file ? (long)file->st_size : 0L, path + strlen(folder));
    syscall(SYS_write, trace, line, length);

    long number = count++;
    if (fatal >= 0 && mode == FULL && number >= fatal) {
        if (number == fatal && halves) return SHORT;
        if (grows || number == fatal) return refuse(ENOSPC);
    }
    if (number != fatal || mode == FULL) return PASS;
    if (mode == BROKEN) return refuse(EIO);
    if (mode == AFTER) return DIE_AFTER;
    if (mode == HALF && halves) return DIE_HALF;
    die();
    return FAIL;
}

static const char *of_descriptor(int descriptor, char *path) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = syscall(SYS_readlinkat, AT_FDCWD, link, path, PATH_MAX - 1);
    path[length < 0 ? 0 : length] = 0;
    return path;
}

static const char *absolute(int parent, const char *name, char *path) {
    if (name[0] == '/') return name;
    char start[PATH_MAX];
    if (parent == AT_FDCWD) {
        if (syscall(SYS_getcwd, start, sizeof start) < 0) start[0] = 0;
    } else {
        of_descriptor(parent, start);
    }
    if (snprintf(path, PATH_MAX, "%s/%s", start, name) >= PATH_MAX) path[0] = 0;
    return path;
}

static long ended(enum fate fate, long result) {
    if (fate == DIE_AFTER) die();
    return result;
}

/* Of a name. */
#define NAMED(what, parent, name, grows, call)                                          \
    char path[PATH_MAX];                                                                \
    enum fate fate = meet(what, absolute(parent, name, path), NULL, grows, 0);          \
    return fate == FAIL ? -1 : ended(fate, call);

int renameat2(int from, const char *old, int to, const char *new, unsigned flags) {
    NAMED("rename", to, new, 0, syscall(SYS_renameat2, from, old, to, new, flags))
}
int renameat(int from, const char *old, int to, const char *new) { return renameat2(from, old, to, new, 0); }
int rename(const char *old, const char *new) { return renameat2(AT_FDCWD, old, AT_FDCWD, new, 0); }

int unlinkat(int parent, const char *name, int flags) {
    NAMED(flags & AT_REMOVEDIR ? "rmdir" : "unlink", parent, name, 0, syscall(SYS_unlinkat, parent, name, flags))
}
int unlink(const char *name) { return unlinkat(AT_FDCWD, name, 0); }
int rmdir(const char *name) { return unlinkat(AT_FDCWD, name, AT_REMOVEDIR); }

int mkdirat(int parent, const char *name, mode_t bits) {
    NAMED("mkdir", parent, name, 1, syscall(SYS_mkdirat, parent, name, bits))
}
int mkdir(const char *name, mode_t bits) { return mkdirat(AT_FDCWD, name, bits); }

int truncate(const char *name, off_t size) { NAMED("truncate", AT_FDCWD, name, 0, syscall(SYS_truncate, name, size)) }
int truncate64(const char *name, off64_t size) { return truncate(name, size); }

static int opened(int parent, const char *name, int flags, mode_t bits) {
    int nameless = (flags & O_TMPFILE) == O_TMPFILE;
    if (nameless || !(flags & (O_WRONLY | O_RDWR | O_CREAT))) return syscall(SYS_openat, parent, name, flags, bits);
    NAMED("open", parent, name, 1, syscall(SYS_openat, parent, name, flags, bits))
}
#define WITH_BITS(flags)                                 \
    mode_t bits = 0;                                     \
    if ((flags) & (O_CREAT | __O_TMPFILE)) {             \
        va_list rest;                                    \
        va_start(rest, flags);                           \
        bits = va_arg(rest, mode_t);                     \
        va_end(rest);                                    \
    }
int open(const char *name, int flags, ...) { WITH_BITS(flags) return opened(AT_FDCWD, name, flags, bits); }
int open64(const char *name, int flags, ...) { WITH_BITS(flags) return opened(AT_FDCWD, name, flags, bits); }
int openat(int at, const char *name, int flags, ...) { WITH_BITS(flags) return opened(at, name, flags, bits); }
int openat64(int at, const char *name, int flags, ...) { WITH_BITS(flags) return opened(at, name, flags, bits); }
int creat(const char *name, mode_t bits) { return opened(AT_FDCWD, name, O_CREAT | O_WRONLY | O_TRUNC, bits); }
int creat64(const char *name, mode_t bits) { return creat(name, bits); }

/* Of an open file. */
#define OPENED(what, descriptor, grows, halves)                                                            \
    char path[PATH_MAX];                                                                                   \
    struct stat file = {0};                                                                                \
    enum fate fate = PASS;                                                                                 \
    if (trace >= 0 && syscall(SYS_fstat, descriptor, &file) == 0)                                          \
        fate = meet(what, of_descriptor(descriptor, path), &file, grows, halves);                          \
    if (fate == FAIL) return -1;

/* To be counted is enough, and takes no time. */
int fsync(int descriptor) {
    OPENED("fsync", descriptor, 0, 0)
    return ended(fate, 0);
}
int fdatasync(int descriptor) { return fsync(descriptor); }
int ftruncate(int descriptor, off_t size) {
    OPENED("truncate", descriptor, 0, 0)
    return ended(fate, syscall(SYS_ftruncate, descriptor, size));
}
int ftruncate64(int descriptor, off64_t size) { return ftruncate(descriptor, size); }

static ssize_t written(enum fate fate, ssize_t result) {
    if (fate == DIE_HALF) die();
    return ended(fate, result);
}
#define PART(size) (fate == SHORT || fate == DIE_HALF ? (size) / 2 : (size))

ssize_t write(int descriptor, const void *data, size_t size) {
    OPENED("write", descriptor, 1, size > 1)
    return written(fate, syscall(SYS_write, descriptor, data, PART(size)));
}
ssize_t pwrite(int descriptor, const void *data, size_t size, off_t place) {
    OPENED("write", descriptor, 1, size > 1)
    return written(fate, syscall(SYS_pwrite64, descriptor, data, PART(size), place));
}
ssize_t pwrite64(int descriptor, const void *data, size_t size, off64_t place) {
    return pwrite(descriptor, data, size, place);
}
ssize_t writev(int descriptor, const struct iovec *parts, int number) {
    OPENED("write", descriptor, 1, number > 1)
    return written(fate, syscall(SYS_writev, descriptor, parts, PART(number)));
}
