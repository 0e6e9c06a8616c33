/* What a device publishes to its peers on this host, so that they can carry out one-sided operations themselves: its
 * keys and its queue pairs, in memory that they may only read. The peer does what the responder would: it looks up
 * queue pair and key, checks protection domain, rights and bounds, and moves the bytes (direct.c). Where anything is
 * not as it should be it sends packets instead, and the responder says no, as ever.
 *
 * Revocation. A peer says in its channel that it is `busy` (odd) before it looks at the table, and that it is through
 * (even) after the last byte. Who revokes an entry clears it and then waits for every peer that was busy by then
 * (link_ops.settle). Both have a sequentially consistent fence between the store and the load: either the peer finds
 * the entry cleared, or we find it busy. So nothing lands after a key was revoked; and an entry is not filled again
 * while somebody may still read it. A peer that died is not busy any more: its connection has ended, which the
 * kernel says only after its last thread is gone. One that is stopped in the middle is waited for a while; then the
 * revocation fails, and the entry stands as before. */
#ifndef TABLE_H
#define TABLE_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

enum {
    TABLE_SLOTS = 4096, /* of keys, and of queue pairs; what finds none goes by packets */
    TABLE_PROBES = 8,   /* slots that an entry may have */
    PEER_SLABS = 64,    /* pieces of a peer's memory that are mapped at a time */
};

struct table_key {
    _Alignas(64) _Atomic uint32_t value; /* 0: none. Written last, with release order */
    uint32_t pd;
    int32_t access;      /* enum ibv_access_flags */
    uint32_t qp_num;     /* 0: of any queue pair */
    uint64_t iova, length;
    uint64_t host;       /* in the owner's address space */
    uint32_t slab;       /* 0: the memory is the owner's alone; else the number of the slab it lies in, ... */
    int32_t slab_fd;     /* ... a descriptor of the owner's, */
    uint64_t slab_inode; /* ... which has this inode, */
    uint64_t slab_size;
    uint64_t slab_offset; /* ... and where the key begins there */
};

struct table_qp {
    _Alignas(64) _Atomic uint32_t qp_num; /* 0: none. Written last, with release order */
    uint32_t pd;
    int32_t access;
    uint32_t peer_qp;
    uint8_t peer_gid[16];
    uint16_t peer_port;
};

struct table_shared {
    _Atomic uint32_t open; /* else packets are wanted: somebody looks at them */
    uint32_t zero;
    uint64_t nonce;        /* unpredictable; */
    uint64_t nonce_at;     /* ... it is there in the owner's address space: so that nobody else is taken for it */
    struct table_key keys[TABLE_SLOTS];
    struct table_qp qps[TABLE_SLOTS];
};

/* The owner's side. */
struct table {
    struct table_shared *shared;
    int fd; /* for peers, which can map it for reading only */
    bool key_taken[TABLE_SLOTS], qp_taken[TABLE_SLOTS];
};

/* A slab of the peer's as it is mapped here. */
struct peer_slab {
    uint32_t number; /* 0: none */
    uint64_t size;
    uint8_t *at;     /* NULL: it cannot be mapped */
};

/* The peer's side, in a channel to it. */
struct direct_peer {
    const struct table_shared *table; /* NULL: packets only */
    _Atomic uint32_t *busy;           /* in the memory of the channel; ours alone to write */
    int fd;                           /* the connection */
    pid_t pid;
    uint64_t asked_at;                /* ns: when it last proved to be the one */
    bool reads_memory;                /* process_vm_readv() and process_vm_writev() may be used on it */
    struct peer_slab slabs[PEER_SLABS]; /* each has one place, by its number */
};

static inline uint32_t table_slot(uint32_t value, uint32_t probe)
{
    uint32_t hash = value * 0x9e3779b1u;

    return ((hash ^ hash >> 16) + probe) % TABLE_SLOTS;
}

/* NULL: it cannot be had. */
struct table *table_create(void);
void table_free(struct table *table);
/* Maps the table behind a descriptor that a peer passed, if it cannot change its size; else NULL. */
const struct table_shared *table_map(int fd);
void table_unmap(const struct table_shared *shared);
/* Takes over `table`. */
void direct_set_up(struct direct_peer *peer, const struct table_shared *table, _Atomic uint32_t *busy, int fd,
                   pid_t pid);
void direct_forget(struct direct_peer *peer);

#endif
