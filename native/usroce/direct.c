/* One-sided operations that the requester carries out itself, in the memory of a peer on this host: see table.h for
 * the contract with the peer. Here is what the responder would do for it: queue pair, key, protection domain, rights
 * and bounds are checked, and then the bytes move. Memory that the peer has in a slab is mapped here, once; any other
 * is reached by process_vm_writev() and process_vm_readv(), where the system lets one (not with yama's ptrace_scope
 * and the like; tried when the channel is set up).
 *
 * Whatever is not as it should be is no error here: the caller sends packets, and the peer's responder judges. So an
 * operation may be begun here and be carried out again, whole, by packets; that is why an atomic is checked through
 * before it runs. */
#define _GNU_SOURCE /* process_vm_readv, POLLRDHUP */
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#include "usroce.h"

enum {
    ASK_EVERY = 1000 * 1000, /* ns */
    SMALL = 8 << 10,         /* bytes: many requests of less go faster by packets than by a system call each */
};

/* What a request comes to: bytes of the peer's. All is copied from the table before it is checked, for the peer could
 * change it meanwhile. */
struct target {
    struct direct_peer *peer;
    uint32_t size;
    bool alone;      /* no other work request waits behind this one */
    uint64_t host;   /* where they are in the peer's address space, */
    uint32_t slab;   /* and, other than 0, in its slab */
    int slab_fd;
    uint64_t slab_inode, slab_size, slab_at;
};

/* --- looking things up --------------------------------------------------------------------------------------- */

static const struct table_qp *find_qp(const struct table_shared *table, uint32_t qp_num)
{
    for (uint32_t probe = 0; probe < TABLE_PROBES; probe++) {
        const struct table_qp *entry = &table->qps[table_slot(qp_num, probe)];

        if (atomic_load_explicit(&entry->qp_num, memory_order_acquire) == qp_num)
            return entry;
    }
    return NULL;
}

static const struct table_key *find_key(const struct table_shared *table, uint32_t value)
{
    for (uint32_t probe = 0; value && probe < TABLE_PROBES; probe++) {
        const struct table_key *entry = &table->keys[table_slot(value, probe)];

        if (atomic_load_explicit(&entry->value, memory_order_acquire) == value)
            return entry;
    }
    return NULL;
}

/* Whether the peer's queue pair is the other end of ours, and takes such requests. */
static bool is_our_end(const struct qp *qp, const struct table_qp *end, int access)
{
    const struct endpoint *self = &qp->slot->link->local;

    return end && end->peer_qp == qp->base.qp_num && end->peer_port == self->port &&
           !memcmp(end->peer_gid, self->gid.raw, sizeof(end->peer_gid)) && (end->access & access) == access;
}

/* As key_remote() at the peer. */
static bool find_target(const struct qp *qp, uint32_t rkey, uint64_t addr, int access, struct target *target)
{
    const struct table_shared *table = target->peer->table;
    const struct table_qp *end;
    const struct table_key *key;

    if (!atomic_load_explicit(&table->open, memory_order_acquire))
        return false;
    end = find_qp(table, qp->attr.dest_qp_num);
    key = find_key(table, rkey);
    if (!is_our_end(qp, end, access) || !key || key->pd != end->pd || (key->access & access) != access)
        return false;
    if (key->qp_num && key->qp_num != qp->attr.dest_qp_num)
        return false;
    if (addr < key->iova || target->size > key->length || addr - key->iova > key->length - target->size)
        return false;
    target->host = key->host + (addr - key->iova);
    target->slab = key->slab;
    target->slab_fd = key->slab_fd;
    target->slab_inode = key->slab_inode;
    target->slab_size = key->slab_size;
    target->slab_at = key->slab_offset + (addr - key->iova);
    return true;
}

/* --- slabs --------------------------------------------------------------------------------------------------- */

static void forget_slab(struct peer_slab *slab)
{
    if (slab->at)
        munmap(slab->at, slab->size);
    slab->number = 0;
    slab->at = NULL;
}

/* Opens what the peer has open under that number. The key stands, so it does not close it meanwhile. */
static int open_slab(const struct target *target)
{
    const int needed = F_SEAL_SHRINK | F_SEAL_GROW;
    struct stat file;
    char path[64];
    int fd, seals;

    snprintf(path, sizeof(path), "/proc/%ld/fd/%d", (long)target->peer->pid, target->slab_fd);
    fd = open(path, O_RDWR | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0)
        return -1;
    seals = fcntl(fd, F_GET_SEALS);
    if (seals >= 0 && (seals & needed) == needed && !fstat(fd, &file) && file.st_ino == target->slab_inode &&
        (uint64_t)file.st_size == target->slab_size)
        return fd;
    close(fd);
    return -1;
}

/* NULL: it cannot be had. */
static uint8_t *map_slab(const struct target *target)
{
    int fd = open_slab(target);
    void *at;

    if (fd < 0)
        return NULL;
    at = slab_map(fd, target->slab_size);
    close(fd);
    if (at == MAP_FAILED)
        return NULL;
    madvise(at, target->slab_size, MADV_DONTFORK);
    return at;
}

/* The bytes of the target as they are mapped here; NULL: they are not. The mapping stays until another slab needs its
 * place, also beyond the slab's own end; its owner has given back the pages then. */
static uint8_t *mapped(const struct target *target)
{
    struct peer_slab *slab = &target->peer->slabs[target->slab % PEER_SLABS];

    if (!target->slab)
        return NULL;
    if (slab->number != target->slab) {
        forget_slab(slab);
        *slab = (struct peer_slab){.number = target->slab, .size = target->slab_size, .at = map_slab(target)};
    }
    if (!slab->at || target->size > slab->size || target->slab_at > slab->size - target->size)
        return NULL;
    return slab->at + target->slab_at;
}

/* --- moving -------------------------------------------------------------------------------------------------- */

/* Our side of a transfer: `size` bytes of the work request from `offset` on, as pieces of our memory. Their number; 0:
 * a key does not stand. */
static int local_pieces(struct context *ctx, const struct qp *qp, const struct send_wqe *wqe, uint64_t offset,
                        uint32_t size, int access, struct iovec *pieces)
{
    int count = 0;

    if (wqe->inline_data) {
        pieces[0] = (struct iovec){wqe->inline_data + offset, size};
        return 1;
    }
    for (const struct ibv_sge *sge = wqe->sge; size; sge++) {
        uint32_t part;

        if (offset >= sge->length) {
            offset -= sge->length;
            continue;
        }
        part = size < sge->length - offset ? size : (uint32_t)(sge->length - offset);
        pieces[count].iov_base = key_local(ctx, qp->base.pd, sge->lkey, sge->addr + offset, part, access);
        pieces[count].iov_len = part;
        if (!pieces[count++].iov_base)
            return 0;
        size -= part;
        offset = 0;
    }
    return count;
}

static void copy_pieces(uint8_t *remote, const struct iovec *pieces, int count, bool write)
{
    for (int i = 0; i < count; i++) {
        if (write)
            memcpy(remote, pieces[i].iov_base, pieces[i].iov_len);
        else
            memcpy(pieces[i].iov_base, remote, pieces[i].iov_len);
        remote += pieces[i].iov_len;
    }
}

/* The number in the table is the owner's, so the process is the one that made it, and goes on with the program that
 * did. */
static bool is_owner(const struct direct_peer *peer)
{
    uint64_t nonce = 0;
    struct iovec here = {&nonce, sizeof(nonce)};
    struct iovec there = {(void *)(uintptr_t)peer->table->nonce_at, sizeof(nonce)};

    return process_vm_readv(peer->pid, &here, 1, &there, 1, 0) == (ssize_t)sizeof(nonce) &&
           nonce == peer->table->nonce;
}

/* Whether process `pid` still is the owner. Its end closes the connection, and so does its going over to another
 * program; where a child of its has the connection too, the number in the table tells, a little later. */
static bool is_still_owner(struct direct_peer *peer)
{
    struct pollfd fd = {.fd = peer->fd, .events = POLLRDHUP};
    uint64_t now = now_ns();

    if (poll(&fd, 1, 0) > 0 && fd.revents & (POLLRDHUP | POLLHUP | POLLERR))
        return false;
    if (now - peer->asked_at < ASK_EVERY)
        return true;
    peer->asked_at = now;
    peer->reads_memory = is_owner(peer);
    return peer->reads_memory;
}

static bool move_between_processes(const struct target *target, const struct iovec *pieces, int count, bool write)
{
    struct iovec there = {(void *)(uintptr_t)target->host, target->size};
    pid_t pid = target->peer->pid;
    ssize_t moved;

    if (!target->alone && target->size < SMALL)
        return false;
    if (!target->peer->reads_memory || !is_still_owner(target->peer))
        return false;
    moved = write ? process_vm_writev(pid, pieces, (unsigned long)count, &there, 1, 0)
                  : process_vm_readv(pid, pieces, (unsigned long)count, &there, 1, 0);
    return moved == (ssize_t)target->size;
}

/* --- operations ---------------------------------------------------------------------------------------------- */

/* Between the two the table stands: nothing that was found in it is revoked, see table.h. Ours is the only thread that
 * writes `busy`, under the device lock. */
static void begin(const struct direct_peer *peer)
{
    uint32_t busy = atomic_load_explicit(peer->busy, memory_order_relaxed);

    atomic_store_explicit(peer->busy, (busy + 1) | 1, memory_order_relaxed);
    atomic_thread_fence(memory_order_seq_cst);
}

static void end(const struct direct_peer *peer)
{
    uint32_t busy = atomic_load_explicit(peer->busy, memory_order_relaxed);

    atomic_store_explicit(peer->busy, (busy + 1) & ~1u, memory_order_release);
}

static struct direct_peer *peer_of(const struct context *ctx, const struct qp *qp)
{
    struct link *link = qp->slot->link;

    /* A wrapper around the link wants to see packets. */
    return ctx->table && !link->below && link->ops->direct ? link->ops->direct(link, &qp->remote) : NULL;
}

bool direct_move(struct context *ctx, struct qp *qp, const struct send_wqe *wqe, uint64_t offset, uint32_t size)
{
    bool write = wqe->opcode == IBV_WR_RDMA_WRITE, moved = false;
    struct target target = {.peer = peer_of(ctx, qp), .size = size, .alone = qp->sq.head - qp->sq.cursor == 1};
    struct iovec pieces[MAX_SGE];
    uint8_t *remote;
    int count;

    if (!target.peer)
        return false;
    count = local_pieces(ctx, qp, wqe, offset, size, write ? 0 : IBV_ACCESS_LOCAL_WRITE, pieces);
    if (!count)
        return false;
    begin(target.peer);
    if (find_target(qp, wqe->rkey, wqe->remote_addr + offset,
                    write ? IBV_ACCESS_REMOTE_WRITE : IBV_ACCESS_REMOTE_READ, &target)) {
        remote = mapped(&target);
        if (remote)
            copy_pieces(remote, pieces, count, write);
        moved = remote || move_between_processes(&target, pieces, count, write);
    }
    end(target.peer);
    if (moved)
        ctx->counters.direct_bytes += size;
    return moved;
}

static uint64_t run_atomic(uint64_t *at, const struct send_wqe *wqe)
{
    uint64_t expected = wqe->compare_add;

    if (wqe->opcode == IBV_WR_ATOMIC_FETCH_AND_ADD)
        return __atomic_fetch_add(at, wqe->compare_add, __ATOMIC_SEQ_CST);
    /* On failure, `expected` receives what was there. */
    __atomic_compare_exchange_n(at, &expected, wqe->swap, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
    return expected;
}

/* Only in a slab: there is no other way that is atomic. */
bool direct_atomic(struct context *ctx, struct qp *qp, const struct send_wqe *wqe)
{
    struct target target = {.peer = peer_of(ctx, qp), .size = sizeof(uint64_t)};
    struct iovec pieces[MAX_SGE];
    uint64_t original, *remote = NULL;
    int count;

    if (!target.peer)
        return false;
    count = local_pieces(ctx, qp, wqe, 0, sizeof(uint64_t), IBV_ACCESS_LOCAL_WRITE, pieces);
    if (!count)
        return false;
    begin(target.peer);
    if (find_target(qp, wqe->rkey, wqe->remote_addr, IBV_ACCESS_REMOTE_ATOMIC, &target) &&
        target.host % sizeof(uint64_t) == 0 && target.slab_at % sizeof(uint64_t) == 0)
        remote = (uint64_t *)(void *)mapped(&target);
    if (remote) {
        original = run_atomic(remote, wqe);
        copy_pieces((uint8_t *)&original, pieces, count, false);
        ctx->counters.direct_bytes += sizeof(original);
    }
    end(target.peer);
    return remote != NULL;
}

/* --- life ---------------------------------------------------------------------------------------------------- */

void direct_set_up(struct direct_peer *peer, const struct table_shared *table, _Atomic uint32_t *busy, int fd,
                   pid_t pid)
{
    memset(peer, 0, sizeof(*peer));
    peer->table = table;
    peer->busy = busy;
    peer->fd = fd;
    peer->pid = pid;
    peer->reads_memory = is_owner(peer);
}

void direct_forget(struct direct_peer *peer)
{
    for (int i = 0; i < PEER_SLABS; i++)
        forget_slab(&peer->slabs[i]);
    if (peer->table)
        table_unmap(peer->table);
    peer->table = NULL;
}
