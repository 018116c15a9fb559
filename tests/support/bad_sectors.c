/* LD_PRELOAD: reads that touch a bad place of a file fail with EIO, as those of a bad sector do.

   The file that BAD_SECTORS names has a line "DEVICE INODE START END" for each bad place.  There is
   no io_uring, so that all reads come by here.  Not covered: reads through maps. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#define REAL(name)                                   \
    static __typeof__(&name) real;                   \
    if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

static int is_bad(int fd, off64_t offset, size_t length) {
    const char *list = getenv("BAD_SECTORS");
    unsigned long device, inode;
    long long start, end;
    struct stat about;
    FILE *file;
    int found = 0;
    if (!list || fstat(fd, &about) || !S_ISREG(about.st_mode) || !(file = fopen(list, "r"))) return 0;
    while (fscanf(file, "%lu %lu %lld %lld", &device, &inode, &start, &end) == 4)
        found |= device == about.st_dev && inode == about.st_ino && offset < end &&
                 offset + (off64_t)length > start;
    fclose(file);
    if (found) errno = EIO;
    return found;
}

static size_t total(const struct iovec *parts, int count) {
    size_t length = 0;
    for (int i = 0; i < count; i++) length += parts[i].iov_len;
    return length;
}

ssize_t pread64(int fd, void *buffer, size_t length, off64_t offset) {
    REAL(pread64);
    return is_bad(fd, offset, length) ? -1 : real(fd, buffer, length, offset);
}

ssize_t preadv64(int fd, const struct iovec *parts, int count, off64_t offset) {
    REAL(preadv64);
    return is_bad(fd, offset, total(parts, count)) ? -1 : real(fd, parts, count, offset);
}

ssize_t preadv64v2(int fd, const struct iovec *parts, int count, off64_t offset, int flags) {
    REAL(preadv64v2);
    return is_bad(fd, offset, total(parts, count)) ? -1 : real(fd, parts, count, offset, flags);
}

long syscall(long number, ...) {
    REAL(syscall);
    va_list list;
    long a[6];
    if (number == 425) { /* io_uring_setup */
        errno = ENOSYS;
        return -1;
    }
    va_start(list, number);
    for (int i = 0; i < 6; i++) a[i] = va_arg(list, long);
    va_end(list);
    return real(number, a[0], a[1], a[2], a[3], a[4], a[5]);
}
