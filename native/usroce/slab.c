/* Slabs: memory for regions that a peer on this host can map, and so reach at the pace of its own. Of the process,
 * whose lock covers the list. */
#define _GNU_SOURCE /* memfd_create, fallocate */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "usroce.h"

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif

enum {
    HUGE = 2 << 20,              /* bytes of a huge page (x86, and ARM with pages of 4 KiB) */
    AT_ONCE = 8 * HUGE,          /* bytes: each time the kernel is asked, it waits for all processors first */
    PATIENCE = 10 * 1000 * 1000, /* ns, all in all, that they may take longer than the pages they stand for: */
    AS_PAGES = 1000 * 1000,      /* so many, for one */
};

struct slab_entry {
    struct slab_entry *next;
    struct slab slab;
    pid_t owner;
};

static struct slab_entry *slabs;
static uint32_t last_number;

bool slab_find(const uint8_t *at, uint64_t length, struct slab *slab)
{
    struct slab_entry *entry;

    pthread_mutex_lock(&process_lock);
    for (entry = slabs; entry; entry = entry->next)
        if (entry->slab.fd >= 0 && at >= entry->slab.at && length <= entry->slab.size &&
            (uint64_t)(at - entry->slab.at) <= entry->slab.size - length)
            break;
    if (entry)
        *slab = entry->slab;
    pthread_mutex_unlock(&process_lock);
    return entry != NULL;
}

/* With whole huge pages at addresses that suit them: only there a mapping has huge pages. MAP_FAILED and errno. */
void *slab_map(int fd, size_t size)
{
    uint8_t *room, *at;
    uintptr_t start;
    size_t before;

    if (size < HUGE)
        return mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    room = mmap(NULL, size + HUGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (room == MAP_FAILED)
        return MAP_FAILED;
    before = -(uintptr_t)room & (HUGE - 1);
    at = mmap(room + before, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0);
    if (at == MAP_FAILED) {
        munmap(room, size + HUGE);
        return MAP_FAILED;
    }
    if (before)
        munmap(room, before);
    memory_pages(at, size, &start, &size);
    munmap(at + size, HUGE - before);
    return at;
}

/* Copying is a third faster with huge pages, and they are had ten times as fast as the pages they stand for. For shared
 * memory one has to ask (Linux 6.1 and newer), where there is a page to begin with. What cannot be had is left to
 * registration, which makes the rest present page by page. */
static void take_huge_pages(uint8_t *at, size_t size)
{
    uint64_t until = now_ns() + PATIENCE;
    size_t part;

    size -= size % HUGE;
    for (; size && now_ns() < until; at += part, size -= part, until += AS_PAGES * (part / HUGE)) {
        part = size < AT_ONCE ? size : AT_ONCE;
        for (size_t i = 0; i < part; i += HUGE)
            if (memory_make_present(at + i, 1, true))
                return;
        if (madvise(at, part, MADV_COLLAPSE))
            return;
    }
}

/* Its size cannot change any more: or reading it could be the end of a peer (SIGBUS). 0 or an errno. */
static int make_slab(struct slab *slab, size_t size)
{
    struct stat file;
    int fd = memfd_create("usroce-slab", MFD_CLOEXEC | MFD_ALLOW_SEALING), rc;
    void *at;

    if (fd < 0)
        return errno;
    if (ftruncate(fd, (off_t)size) || fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) ||
        fstat(fd, &file))
        goto fail;
    at = slab_map(fd, size);
    if (at == MAP_FAILED)
        goto fail;
    take_huge_pages(at, size);
    *slab = (struct slab){.at = at, .size = size, .inode = file.st_ino, .fd = fd};
    return 0;

fail:
    rc = errno;
    close(fd);
    return rc;
}

EXPORT void *usroce_alloc(size_t size)
{
    struct settings settings;
    struct slab_entry *entry = NULL;
    int rc = settings_read(&settings);

    if (!rc && !size)
        rc = EINVAL;
    if (!rc && !(settings.shm && settings.direct))
        rc = ENOTSUP;
    if (!rc) {
        entry = calloc(1, sizeof(*entry));
        rc = entry ? 0 : ENOMEM;
    }
    if (entry)
        rc = make_slab(&entry->slab, size);
    if (rc) {
        free(entry);
        errno = rc;
        return NULL;
    }
    pthread_mutex_lock(&process_lock);
    entry->slab.number = ++last_number;
    entry->owner = getpid();
    entry->next = slabs;
    slabs = entry;
    pthread_mutex_unlock(&process_lock);
    return entry->slab.at;
}

EXPORT int usroce_unshare(void *at)
{
    struct slab_entry *entry;

    pthread_mutex_lock(&process_lock);
    for (entry = slabs; entry && entry->slab.at != at; entry = entry->next)
        ;
    if (entry && entry->slab.fd >= 0) {
        close(entry->slab.fd);
        entry->slab.fd = -1;
    }
    pthread_mutex_unlock(&process_lock);
    return entry ? 0 : EINVAL;
}

/* A peer may have it mapped for a while: its pages go back to the system at once all the same. In a child of fork() they
 * are the parent's too. */
EXPORT int usroce_free(void *at)
{
    struct slab_entry **link, *entry;

    pthread_mutex_lock(&process_lock);
    for (link = &slabs; *link && (*link)->slab.at != at; link = &(*link)->next)
        ;
    entry = *link;
    if (entry)
        *link = entry->next;
    pthread_mutex_unlock(&process_lock);
    if (!entry)
        return EINVAL;
    if (entry->slab.fd >= 0 && entry->owner == getpid() &&
        fallocate(entry->slab.fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, (off_t)entry->slab.size))
        errno = 0; /* then they go when the peer lets go of it */
    munmap(entry->slab.at, entry->slab.size);
    if (entry->slab.fd >= 0)
        close(entry->slab.fd);
    free(entry);
    return 0;
}
