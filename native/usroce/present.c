/* Is memory there that is to be registered? Nothing is pinned, but it is made present, as pinning would make it: a hole
 * is found by ibv_reg_mr() and not by the first packet, and no packet waits for the system to find pages.
 *
 * MADV_POPULATE_* does both, but looks at each page, also where all are there already. So for large memory the kernel
 * is asked first what is mapped there (Linux 6.11 and newer), and then whether that is resident. */
#define _GNU_SOURCE /* mincore */
#include "usroce.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#define MADV_POPULATE_WRITE 23
#endif

enum {
    LARGE = 256 << 10, /* bytes; below, populating costs no more than asking */
    MAY_READ = 1,
    MAY_WRITE = 2,
};

/* PROCMAP_QUERY of linux/fs.h, as of Linux 6.11. */
struct mapping_query {
    uint64_t size, flags, addr;
    uint64_t start, end, rights, page_size, offset, inode;
    uint32_t dev_major, dev_minor, name_size, build_id_size;
    uint64_t name, build_id;
};
#define QUERY_MAPPING _IOWR('f', 17, struct mapping_query)

void memory_pages(const void *addr, size_t length, uintptr_t *start, size_t *size)
{
    uintptr_t mask = (uintptr_t)sysconf(_SC_PAGESIZE) - 1;

    *start = (uintptr_t)addr & ~mask;
    *size = (((uintptr_t)addr + length - 1) | mask) + 1 - *start;
}

/* Whether the pages are mapped, whatever the rights; and, with `resident`, in memory all of them. */
static bool look(uintptr_t start, size_t size, bool resident)
{
    unsigned char pages[4096];
    size_t page = (size_t)sysconf(_SC_PAGESIZE), step = page * sizeof(pages);

    while (size) {
        size_t part = size < step ? size : step;

        if (mincore((void *)start, part, pages))
            return false;
        for (size_t i = 0; resident && i < part / page; i++)
            if (!(pages[i] & 1))
                return false;
        start += part;
        size -= part;
    }
    return true;
}

/* Whether everything there is mapped with these rights. False: not, or the kernel does not say. */
static bool is_allowed(uintptr_t start, size_t size, uint64_t rights)
{
    struct mapping_query query = {.size = sizeof(query), .addr = start};
    int maps = open("/proc/self/maps", O_RDONLY | O_CLOEXEC);
    bool allowed;

    if (maps < 0)
        return false;
    do {
        allowed = !ioctl(maps, QUERY_MAPPING, &query) && (query.rights & rights) == rights;
        query.addr = query.end;
    } while (allowed && query.end - start < size);
    close(maps);
    return allowed;
}

int memory_make_present(const void *addr, size_t length, bool writable)
{
    int advice = writable ? MADV_POPULATE_WRITE : MADV_POPULATE_READ, rc;
    uintptr_t start;
    size_t size;

    memory_pages(addr, length, &start, &size);
    if (size >= LARGE && is_allowed(start, size, writable ? MAY_READ | MAY_WRITE : MAY_READ) && look(start, size, true))
        return 0;
    /* With no length it tells whether the kernel knows the advice (5.14 and newer). */
    if (madvise((void *)start, 0, advice))
        return look(start, size, false) ? 0 : EFAULT;
    do
        rc = madvise((void *)start, size, advice) ? errno : 0;
    while (rc == EINTR || rc == EAGAIN);
    /* ENOMEM: a hole; EINVAL: no right to write, or memory of a device. */
    return rc ? EFAULT : 0;
}
