/* The table of a device: publishing and revoking what it has. See table.h; called with the device lock held. */
#define _GNU_SOURCE /* memfd_create */
#include "table.h"

#include <fcntl.h>
#include <linux/magic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#include "usroce.h"

#ifndef F_SEAL_FUTURE_WRITE
#define F_SEAL_FUTURE_WRITE 0x0010
#endif

enum { SIZE_SEALS = F_SEAL_SHRINK | F_SEAL_GROW };

/* --- life ---------------------------------------------------------------------------------------------------- */

struct table *table_create(void)
{
    struct table *table = calloc(1, sizeof(*table));
    void *memory;

    if (!table)
        return NULL;
    table->fd = memfd_create("usroce-table", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (table->fd < 0)
        goto fail;
    if (ftruncate(table->fd, sizeof(*table->shared)) || fcntl(table->fd, F_ADD_SEALS, SIZE_SEALS))
        goto fail_fd;
    memory = mmap(NULL, sizeof(*table->shared), PROT_READ | PROT_WRITE, MAP_SHARED, table->fd, 0);
    if (memory == MAP_FAILED)
        goto fail_fd;
    /* From here on only this mapping can be written to. */
    if (fcntl(table->fd, F_ADD_SEALS, F_SEAL_FUTURE_WRITE | F_SEAL_SEAL)) {
        munmap(memory, sizeof(*table->shared));
        goto fail_fd;
    }
    madvise(memory, sizeof(*table->shared), MADV_DONTFORK);
    table->shared = memory;
    table->shared->nonce = (uint64_t)random_u32() << 32 | random_u32();
    table->shared->nonce_at = (uintptr_t)&table->shared->nonce;
    atomic_store_explicit(&table->shared->open, 1, memory_order_release);
    return table;

fail_fd:
    close(table->fd);
fail:
    free(table);
    return NULL;
}

void table_free(struct table *table)
{
    if (!table)
        return;
    munmap(table->shared, sizeof(*table->shared));
    close(table->fd);
    free(table);
}

const struct table_shared *table_map(int fd)
{
    int seals = fcntl(fd, F_GET_SEALS);
    struct stat file;
    struct statfs system;
    void *mapped;

    if (seals < 0 || (seals & SIZE_SEALS) != SIZE_SEALS || fstat(fd, &file) || fstatfs(fd, &system))
        return NULL;
    if (file.st_size != (off_t)sizeof(struct table_shared) || system.f_type != TMPFS_MAGIC)
        return NULL;
    mapped = mmap(NULL, sizeof(struct table_shared), PROT_READ, MAP_SHARED, fd, 0);
    if (mapped == MAP_FAILED)
        return NULL;
    madvise(mapped, sizeof(struct table_shared), MADV_DONTFORK);
    return mapped;
}

void table_unmap(const struct table_shared *shared)
{
    munmap((void *)(uintptr_t)shared, sizeof(*shared));
}

/* --- revocation ---------------------------------------------------------------------------------------------- */

/* Waits for those who were carrying something out. False: somebody does not come to an end. */
static bool settle(struct context *ctx)
{
    bool settled = true;

    atomic_thread_fence(memory_order_seq_cst);
    for (int i = 0; i < ctx->num_gids; i++) {
        struct link *ground = link_ground(ctx->gids[i].link);

        if (ground->ops->settle && !ground->ops->settle(ground))
            settled = false;
    }
    return settled;
}

static int free_slot(const bool *taken, uint32_t value)
{
    for (uint32_t probe = 0; probe < TABLE_PROBES; probe++)
        if (!taken[table_slot(value, probe)])
            return (int)table_slot(value, probe);
    return -1;
}

void table_set_open(struct context *ctx)
{
    bool open = true;

    if (!ctx->table)
        return;
    for (int i = 0; i < ctx->num_gids; i++)
        open = open && !ctx->gids[i].link->below;
    atomic_store_explicit(&ctx->table->shared->open, open, memory_order_release);
    if (!open)
        settle(ctx); /* a straggler is one that nobody sees */
}

void table_close(struct context *ctx)
{
    if (!ctx->table)
        return;
    atomic_store_explicit(&ctx->table->shared->open, 0, memory_order_relaxed);
    settle(ctx);
}

/* --- keys ---------------------------------------------------------------------------------------------------- */

void table_publish_key(struct context *ctx, struct key *key)
{
    struct table *table = ctx->table;
    struct table_key *entry;
    struct slab slab;
    int slot;

    if (!table || key->published || !(key->access & REMOTE_RIGHTS))
        return;
    slot = free_slot(table->key_taken, key->value);
    if (slot < 0)
        return;
    table->key_taken[slot] = true;
    entry = &table->shared->keys[slot];
    entry->pd = ((const struct pd *)(const void *)key->pd)->number;
    entry->access = key->access;
    entry->qp_num = key->kind == KEY_MW_TYPE_2 ? key->qp_num : 0;
    entry->iova = key->iova;
    entry->length = key->length;
    entry->host = (uintptr_t)key->host;
    entry->slab = 0;
    if (slab_find(key->host, key->length, &slab)) {
        entry->slab = slab.number;
        entry->slab_fd = slab.fd;
        entry->slab_inode = slab.inode;
        entry->slab_size = slab.size;
        entry->slab_offset = (uint64_t)(key->host - slab.at);
    }
    key->published = entry;
    atomic_store_explicit(&entry->value, key->value, memory_order_release);
}

bool table_revoke_key(struct context *ctx, struct key *key)
{
    struct table_key *entry = key->published;

    if (!entry || !ctx->table) /* the device is closed: nobody goes by its table */
        return true;
    atomic_store_explicit(&entry->value, 0, memory_order_relaxed);
    if (!settle(ctx)) {
        atomic_store_explicit(&entry->value, key->value, memory_order_release);
        return false;
    }
    ctx->table->key_taken[entry - ctx->table->shared->keys] = false;
    key->published = NULL;
    return true;
}

void table_abandon_key(struct key *key)
{
    if (key->published)
        atomic_store_explicit(&key->published->value, 0, memory_order_relaxed);
    key->published = NULL;
}

/* --- queue pairs --------------------------------------------------------------------------------------------- */

static bool takes_requests(const struct qp *qp)
{
    return qp->base.qp_type == IBV_QPT_RC && (qp->base.state == IBV_QPS_RTS || qp->base.state == IBV_QPS_SQD);
}

void table_publish_qp(struct context *ctx, struct qp *qp)
{
    struct table *table = ctx->table;
    struct table_qp *entry;
    int slot;

    if (!table || qp->published || !takes_requests(qp))
        return;
    slot = free_slot(table->qp_taken, qp->base.qp_num);
    if (slot < 0)
        return;
    table->qp_taken[slot] = true;
    entry = &table->shared->qps[slot];
    entry->pd = ((const struct pd *)(const void *)qp->base.pd)->number;
    entry->access = (int)qp->attr.qp_access_flags;
    entry->peer_qp = qp->attr.dest_qp_num;
    entry->peer_port = qp->remote.port;
    memcpy(entry->peer_gid, qp->remote.gid.raw, sizeof(entry->peer_gid));
    qp->published = entry;
    atomic_store_explicit(&entry->qp_num, qp->base.qp_num, memory_order_release);
}

void table_hide_qp(const struct context *ctx, struct qp *qp)
{
    if (qp->published && ctx->table)
        atomic_store_explicit(&qp->published->qp_num, 0, memory_order_relaxed);
}

bool table_revoke_qp(struct context *ctx, struct qp *qp)
{
    struct table_qp *entry = qp->published;

    if (!entry || !ctx->table)
        return true;
    table_hide_qp(ctx, qp);
    if (!settle(ctx))
        return false;
    ctx->table->qp_taken[entry - ctx->table->shared->qps] = false;
    qp->published = NULL;
    return true;
}
