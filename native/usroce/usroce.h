/* usroce: an RDMA device in user space that speaks RoCE v2, in the form of a drop-in libibverbs.
 *
 * The rooms, each file one role:
 *
 *   device.c     device list, open and close, what a device and its port say of themselves, GIDs
 *   settings.c   environment and usroce_set_option()
 *   events.c     completion channels and asynchronous events, and their acknowledgement
 *   cq.c         completion queues, plain and extended
 *   memory.c     protection domains, regions, windows; the check that every access goes through
 *   present.c    whether memory that is to be registered is there
 *   srq.c        receive queues, shared or of one queue pair
 *   ah.c         address handles; from an address vector to an endpoint
 *   qp.c         queue pairs: life, state machine, attributes, error and flush
 *   post.c       posting: ibv_post_send, ibv_post_recv, ibv_wr_*
 *   requester.c  send queue to packets, acknowledgements to completions, retransmission
 *   responder.c  request packets to memory and receive completions, responses and acknowledgements
 *   progress.c   driving the device: packets in, timers, packets out
 *   sleep.c      who sleeps until packets come and drives the device then; the device thread
 *   tx.c         packets on their way out: buffers, sealing, batches
 *   wire.[ch]    headers of RoCE v2, the opcode table, bounds-checked parse
 *   icrc.[ch]    the invariant CRC
 *   link.h, link_udp.c, link_shm.c, link_fault.c, link_pcap.c   what frames travel over
 *   shm.h, shm_setup.c, shm_channel.c   of the shared-memory link: who may have a channel, and those there are
 *   ring.[ch]    frames in memory that two processes share
 *   table.[ch]   what peers on this host may know of keys and queue pairs, and its revocation
 *   direct.c     one-sided operations in the memory of such a peer, without it
 *   slab.c       memory that such a peer can map
 *   idmap.[ch]   numbers to objects
 *   names.c      ibv_wc_status_str() and the like
 *   absent.c     the functions of libibverbs that this device has no use for
 *
 * One lock. Every opened device (struct context) has one mutex, `lock`; it protects the device and every object
 * made from it. Exported functions and the device thread take it; internal functions are called with it held
 * unless they say otherwise. No code of the application runs under it. Two devices never hold each other's.
 *
 * Memory. The device reads and writes registered memory with the processor, from whatever thread drives it, under
 * the lock. A region is looked up by key for every packet, so nothing keeps a pointer into one.
 *
 * Errors of exported functions follow their man page (NULL or -1 with errno, or an errno as the result).
 */
#ifndef USROCE_H
#define USROCE_H

#include <infiniband/verbs.h>
#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "idmap.h"
#include "link.h"
#include "table.h"
#include "usroce_api.h"
#include "wire.h"

/* verbs.h covers some functions with macros or inline versions of the same name; here are the functions. */
#undef ibv_get_device_list
#undef ibv_query_port
#undef ibv_reg_mr
#undef ibv_reg_mr_iova

#define EXPORT __attribute__((visibility("default")))
#define NEVER UINT64_MAX

enum {
    MAX_SGE = 32,
    MAX_INLINE = 1024,
    MAX_GIDS = 16,
    MAX_QP_WR = 16384,
    MAX_CQE = 1 << 20,
    MAX_QP = 65536,
    MAX_RD_ATOMIC = 128,
    MAX_MSG = 1u << 31, /* bytes of one message; unsigned use only */
    CACHE_LINE = 64,
};

/* --- intrusive lists ------------------------------------------------------------------------------- */

struct list {
    struct list *next, *prev;
};

#define list_entry(pointer, type, member) ((type *)(void *)((char *)(pointer) - offsetof(type, member)))

static inline void list_init(struct list *head)
{
    head->next = head->prev = head;
}

static inline bool list_empty(const struct list *head)
{
    return head->next == head;
}

static inline void list_add_tail(struct list *head, struct list *entry)
{
    entry->prev = head->prev;
    entry->next = head;
    head->prev->next = entry;
    head->prev = entry;
}

/* Takes `entry` out of its list, if it is in one; it must have been initialised. */
static inline void list_del(struct list *entry)
{
    entry->prev->next = entry->next;
    entry->next->prev = entry->prev;
    list_init(entry);
}

/* Moves all of `from` to `to`, which is anew. */
static inline void list_take(struct list *to, struct list *from)
{
    list_init(to);
    if (list_empty(from))
        return;
    *to = *from;
    to->next->prev = to->prev->next = to;
    list_init(from);
}

static inline struct list *list_pop(struct list *head)
{
    struct list *entry = head->next;

    if (entry == head)
        return NULL;
    list_del(entry);
    return entry;
}

/* --- objects ----------------------------------------------------------------------------------------- */

struct pd {
    struct ibv_pd base;
    uint32_t number;       /* other than that of any other of this device */
    unsigned int children; /* regions, windows, queue pairs, SRQs, address handles: dealloc gives EBUSY */
};

enum key_kind { KEY_MR, KEY_MW_TYPE_1, KEY_MW_TYPE_2 };

/* What a key (lkey or rkey) stands for. Found by the upper 24 bits; the lower 8 are a tag that must match. */
struct key {
    uint32_t value;
    enum key_kind kind;
    bool valid;        /* a window is valid only while bound */
    struct ibv_pd *pd;
    uint64_t iova;     /* the address that work requests use for the first byte */
    uint64_t length;
    uint8_t *host;     /* where that byte is */
    int access;        /* enum ibv_access_flags */
    uint32_t qp_num;   /* type 2: the queue pair it is bound to */
    struct mr *region; /* windows: what they are bound over */
    struct table_key *published; /* NULL: peers do not know it */
};

struct mr {
    struct ibv_mr base;
    struct key key;
    unsigned int windows; /* bound over it: dereg gives EBUSY */
    unsigned int posted;  /* binds of it in send queues: the same */
};

struct mw {
    struct ibv_mw base;
    struct key key;
    struct list in_bound; /* while bound: context.bound_windows */
    unsigned int posted; /* binds of it in send queues: dealloc gives EBUSY */
};

struct ah {
    struct ibv_ah base;
    struct ibv_ah_attr attr;
    struct endpoint to;
    struct gid_slot *slot;
};

struct channel {
    struct ibv_comp_channel base; /* base.fd: an eventfd in semaphore mode, one unit an event */
    struct list ready;            /* of struct cq.in_channel: queues with events nobody has taken yet */
    /* Of ibv_get_cq_event(), while it drives the device with the lock held: what it finds needs no unit, for it takes it
     * at once. */
    bool taking;
    unsigned int without_unit;

    /* sleep.c */
    uint64_t led;                 /* a thread slept here, leading, when this was context.abandoned + 1 */
    int watch_fd;                 /* usroce_watch_channel(): an epoll set of base.fd and the links; else -1 */
    struct list in_watched;       /* context.watched */
    uint32_t watched;             /* links in the set, by GID slot */
    bool deaf;                    /* none are, for nearly all wake-ups were stray */
    bool taken;                   /* an event, since the device was driven last */
    unsigned int strays;          /* wake-ups in a row without an event */
};

enum armed { NOT_ARMED, ARMED_SOLICITED, ARMED_ANY };

struct cq {
    union {
        struct ibv_cq base;
        struct ibv_cq_ex ex;
    };
    struct ibv_wc *ring; /* capacity entries; head - tail are filled */
    uint64_t *stamps;    /* completion times in ns, where the extended interface was asked for them; else NULL */
    uint32_t capacity, head, tail;
    enum armed armed;
    bool polling;           /* a thread of an event loop drives the device: what it finds here it takes at once */
    bool unannounced;       /* ... and did not take yet, though the queue is armed */
    bool overrun;
    bool ignore_overrun;    /* what does not fit is lost, and nothing else happens */
    bool single_threaded;   /* extended: the application sees to it that one thread polls at a time; else ... */
    pthread_mutex_t turn;   /* ... this is held from start_poll to end_poll; the device lock is taken inside it */
    struct ibv_wc current;  /* extended: the completion being read */
    uint64_t current_stamp;
    unsigned int users;     /* queue pairs: destroy gives EBUSY */
    unsigned int pending;   /* events in the channel that nobody has taken */
    uint32_t comp_events;   /* taken by ibv_get_cq_event; destroy waits until as many are acknowledged */
    uint32_t async_events;
    struct list in_channel;
};

struct recv_wqe {
    uint64_t wr_id;
    uint32_t length; /* of all pieces together */
    int num_sge;
    struct ibv_sge sge[];
};

/* A receive queue: of one queue pair, or inside an SRQ. */
struct rq {
    uint8_t *slots; /* capacity slots of `stride` bytes; NULL for a queue pair that has an SRQ */
    size_t stride;
    uint32_t capacity, max_sge;
    uint32_t head, tail;
    bool newest_first; /* usroce_newest_first() */
};

struct srq {
    struct ibv_srq base;
    struct rq rq;
    uint32_t limit; /* armed: an event once fewer are left; 0: not armed */
    uint32_t number;
    unsigned int users;
    uint32_t async_events;
};

/* What goes with a number of the send queue, from posting until its completion. */
struct send_wqe {
    uint64_t wr_id;
    enum ibv_wr_opcode opcode;
    unsigned int flags;    /* enum ibv_send_flags */
    bool signaled;
    bool started;          /* first_psn and last_psn are assigned */
    bool done;             /* a read or atomic that is answered, a local operation that ran */
    uint32_t moved;        /* bytes that direct.c has moved so far; what is started goes by packets, from 0 on */
    enum ibv_wc_status status;
    uint32_t length;       /* payload bytes, all pieces */
    uint32_t first_psn, last_psn;
    uint32_t imm;          /* as on the wire; or the rkey to invalidate (host order) */
    uint32_t rkey;
    int num_sge;           /* pieces; for inline data, 0 */
    uint64_t remote_addr;
    struct ibv_sge *sge;   /* in the slot */
    uint8_t *inline_data;  /* in the slot; NULL unless IBV_SEND_INLINE */
    union {
        struct { /* atomics */
            uint64_t compare_add, swap;
        };
        struct { /* IBV_WR_BIND_MW */
            struct ibv_mw *mw;
            struct ibv_mw_bind_info bind;
        };
        struct { /* UD */
            struct endpoint to;
            struct gid_slot *slot;
            uint32_t remote_qpn, remote_qkey;
            uint8_t traffic_class;
        };
    };
};

/* Two cache lines: of many queue pairs, one that was not used lately is in no cache. */
_Static_assert(sizeof(struct send_wqe) == 2 * CACHE_LINE, "of a processor with pointers of 64 bits");

struct sq {
    struct send_wqe *wqes;
    struct ibv_sge *sges;   /* capacity * max_sge */
    uint8_t *inline_data;   /* capacity * max_inline */
    uint32_t capacity, max_sge, max_inline;
    uint32_t head;    /* next to be posted */
    uint32_t cursor;  /* next to be transmitted (again) */
    uint32_t tail;    /* oldest that is not completed */
};

/* The responder keeps its latest reads and atomics, to answer duplicates. */
struct resource {
    bool used;
    bool atomic;
    uint32_t first_psn, last_psn;
    uint32_t rkey;
    uint64_t addr;
    uint32_t length;
    uint64_t original; /* atomic: the value before */
};

/* A response on its way: packets `next`..`last_psn` of a read, or the answer of an atomic. */
struct job {
    bool atomic;
    bool repeated; /* the peer asked again */
    uint32_t first_psn, next, last_psn;
    uint32_t rkey;
    uint64_t addr; /* of packet first_psn */
    uint32_t length;
    uint64_t original;
    uint32_t msn;
};

struct requester {
    uint32_t una;         /* oldest PSN that is not acknowledged */
    uint32_t psn;         /* next to transmit (again): of packet `packet` of the work request at sq.cursor */
    uint32_t packet;
    uint32_t sent_psn;    /* one past the highest PSN transmitted, read responses included */
    uint32_t reads_head, reads_tail;
    uint32_t window;      /* packets that may be unacknowledged: shrinks with loss, grows with success */
    uint32_t threshold;   /* below it the window grows with every acknowledged packet, beyond it once a round */
    uint32_t undo_window; /* what a timeout shrank it from; 0: none to undo */
    uint32_t undo_until;  /* ... when this PSN is acknowledged, there is nothing to undo any more */
    uint32_t window_acks; /* acknowledged since it grew last */
    uint32_t unasked;     /* packets sent since an acknowledgement was asked for */
    bool stalled;         /* the work request at the cursor failed here: nothing is sent beyond it */
    bool recovering;      /* went back for a gap; not again before progress */
    bool rnr_waiting;
    uint32_t rnr_left;
    unsigned int backoff; /* retransmission timeouts without progress */
    uint64_t last_progress; /* ns; the configured timeouts and retries count from here */
    uint64_t srtt, rttvar; /* round trip in ns, smoothed, and how much it varies; 0: not measured */
    uint32_t timed_psn;   /* the PSN whose round trip is being measured */
    uint64_t timed_at;    /* 0: none */
    uint64_t no_wait_until; /* unreliable: ns; what finds no room on the link before that is lost at once */
    uint32_t reads[MAX_RD_ATOMIC]; /* last PSNs of read and atomic requests in flight, a ring */
};

struct responder {
    struct ibv_sge sge[MAX_SGE]; /* of the receive that was taken */
    uint32_t epsn; /* expected PSN */
    /* Of the last SEND or WRITE packet that was carried out. An ACK has this PSN and never that of a read or atomic:
     * Linux's rxe would take the operation for complete, without what it is to return. */
    uint32_t ack_psn;
    uint32_t msn;
    bool in_message;        /* between the first and the last packet of a SEND or WRITE */
    bool write;             /* ... of a WRITE */
    bool gap;               /* packets after epsn came: the peer was told, or the receive queue was empty */
    uint32_t rkey;          /* WRITE: where it goes */
    uint64_t addr;          /* ... its next byte */
    uint32_t left;          /* ... bytes it still announces */
    uint32_t length;        /* bytes of the message so far */
    bool have_wqe;          /* a receive was taken for the message */
    uint64_t wr_id;
    uint32_t wqe_length;
    int num_sge;
    struct resource *resources; /* max_dest_rd_atomic of them, a ring */
    uint32_t num_resources, next_resource;
    struct job *jobs;       /* a ring */
    uint32_t jobs_capacity, jobs_head, jobs_tail;
    bool ack_pending;
    uint8_t syndrome;       /* of the acknowledgement that is owed */
};

struct qp {
    union {
        _Alignas(CACHE_LINE) struct ibv_qp base;
        struct ibv_qp_ex ex;
    };
    bool has_ex;
    uint64_t send_ops;
    bool sig_all;
    struct ibv_qp_attr attr; /* as set; qp_state is the state */
    /* Most of what a packet or a request touches lies together from here to req.reads: see qp_prefetch(). */
    struct responder resp;
    struct ibv_qp_cap cap;
    struct sq sq;
    struct rq rq;
    struct endpoint remote;  /* connected: from the address vector */
    struct gid_slot *slot;   /* NULL until the address is known */
    bool on_all_slots;       /* datagrams: it listens at every address */
    bool any_ip_id;          /* the peer may be something that does not send IP identification 0..63 */
    uint32_t mtu;            /* bytes */
    uint64_t ack_timeout;    /* ns; 0: none */
    struct table_qp *published; /* NULL: peers do not know it */
    bool comm_established;
    bool last_wqe_event;
    bool sqd_notify;
    uint32_t async_events;
    struct list in_tx;       /* has something to transmit: context.tx_ready, or context.starved */
    struct list in_acks;     /* owes an acknowledgement: context.acks */
    struct list in_all;
    uint64_t deadline;       /* its timer; NEVER: not set */
    uint64_t heap_key;       /* may be earlier than the deadline: moved when it fires */
    uint32_t heap_index;     /* 1..n; 0: not in the heap */
    /* Held while work requests are put into the send queue; from ibv_wr_start() to ibv_wr_complete() that is the
     * application's time. Taken before the device lock. */
    pthread_mutex_t post_lock;
    uint32_t wr_head, wr_tail; /* ibv_wr_*: the batch being built ends here; the queue's tail when it began */
    struct send_wqe *wr_current;
    int wr_error;
    struct requester req;
};

/* Of many queue pairs, one that was not used lately is in no cache. Asking for all of it at once takes as long as
 * asking for its first field. */
static inline void qp_prefetch(const struct qp *qp)
{
    __builtin_prefetch(&qp->base);
    __builtin_prefetch(&qp->attr.dest_qp_num);
    __builtin_prefetch(&qp->attr.ah_attr.grh.traffic_class);
    __builtin_prefetch(&qp->resp.sge);
    for (size_t at = offsetof(struct qp, resp.epsn); at < offsetof(struct qp, req.reads); at += CACHE_LINE)
        __builtin_prefetch((const char *)qp + at);
}

/* The next request to be posted: a message is likely to be answered. */
static inline void sq_prefetch(const struct sq *sq)
{
    uint32_t at = sq->head == sq->tail ? 0 : sq->head & (sq->capacity - 1);

    for (size_t line = 0; line < sizeof(struct send_wqe); line += CACHE_LINE)
        __builtin_prefetch((const char *)&sq->wqes[at] + line, 1);
    for (size_t line = 0; line < 2 * CACHE_LINE; line += CACHE_LINE)
        __builtin_prefetch(sq->inline_data + (size_t)at * sq->max_inline + line, 1);
}

/* One GID of the port: an address with its link. */
struct gid_slot {
    union ibv_gid gid;
    struct link *link;      /* top of the stack: fault, capture, then shared memory and UDP */
    uint32_t ifindex;
    enum ibv_mtu mtu;       /* largest path MTU that the interface takes */
    unsigned int users;     /* queue pairs that use it; without any it is not read */
};

struct timers {
    struct qp **heap; /* 1-based */
    uint32_t count, capacity;
};

struct context {
    struct verbs_context verbs; /* verbs.context is what the application holds */
    pthread_mutex_t lock;
    unsigned int generation;    /* of the process, see device.c: another one after fork() */
    bool closed;                /* by the application, which left objects of it behind */
    uint64_t node_guid;         /* network byte order */
    uint16_t udp_port;          /* of every link; published as the LID */
    uint32_t window_bytes;      /* bytes a queue pair may have unacknowledged */
    struct gid_slot gids[MAX_GIDS];
    int num_gids;
    struct idmap qps;           /* qp_num to struct qp */
    struct idmap keys;          /* key >> 8 to struct key */
    struct table *table;        /* of what peers on this host may know; NULL: of nothing */
    uint32_t last_pd;           /* its number */
    struct list all_qps;
    struct list bound_windows;  /* of struct mw.in_bound */
    unsigned int num_cqs, num_pds, num_channels;
    bool count_locked;          /* settings.count_locked */
    struct list async_ready;    /* events.c */
    struct list tx_ready, acks;
    struct list starved;        /* wait for room on the link: in_tx of queue pairs */
    struct tx *tx;
    struct timers timers;
    struct view *views;         /* what a receive call found */
    struct usroce_counters counters;

    struct list in_process;   /* every device this process has open, under process_lock */
    bool delivered;           /* this pass handed something to the application */

    /* sleep.c */
    pthread_t thread;
    bool thread_running, stopping;
    int kick;                 /* eventfd that ends the thread's sleep */
    enum thread_state {
        THREAD_BUSY,
        THREAD_WATCHING,
        THREAD_DEFERRING,
        THREAD_STAYING_OUT,
        THREAD_RESTING,
    } thread_state;
    uint64_t wake_at;         /* the thread sleeps until then */
    bool claimed;             /* application threads drive the device: the device thread stays out */
    bool sleeper;             /* ... and the one that does sleeps for packets, for all we know */
    bool leading;             /* a thread is asleep in ibv_get_cq_event(), on the links too */
    bool resting;             /* the device thread found that nothing happens meanwhile */
    bool attended;            /* an event loop wakes for packets, for all we know */
    bool links_asleep;
    int lead_kick;            /* eventfd that ends the sleep of who leads */
    struct list watched;      /* of struct channel.in_watched */
    uint32_t polls_in_a_row;  /* since a queue was armed last */
    uint32_t in_time;         /* how often in a row the loop came in time */
    uint64_t came_at;         /* ... and when it did last */
    uint64_t polls;           /* passes of application threads; the device thread reads it without the lock, too */
    uint64_t abandoned;       /* claims, with packets waiting */
    uint64_t grace;           /* ns without a poll after which the device thread looks after the device */
    uint64_t one_sided;       /* requests of peers that the program has no part in */
    uint64_t urgent;          /* of these and packets from the network, seen by the device thread */
    uint32_t visits;          /* of the device thread, since somebody polled */
};

static inline void count_poll(struct context *ctx)
{
    __atomic_store_n(&ctx->polls, ctx->polls + 1, __ATOMIC_RELAXED);
}

static inline struct context *context_of(struct ibv_context *context)
{
    return (struct context *)(void *)((char *)context - offsetof(struct context, verbs.context));
}

/* --- device.c ----------------------------------------------------------------------------------------- */

/* True in a process that forked after `ctx` was opened: every exported function then refuses with ENODEV, before
 * it touches the lock. Says so once on stderr. */
bool context_is_foreign(const struct context *ctx);
/* 0 or an errno. Not every context that a caller may have is ours: it may hold another library as well. */
int context_check_ours(const struct ibv_context *context);
/* Covers what belongs to the process and to no device. Taken last; fork() waits for it. */
extern pthread_mutex_t process_lock;
/* Gives the lock back after an object was taken off its counter; a device that is closed goes with its last one.
 */
void context_unlock(struct context *ctx);
uint64_t now_ns(void);
/* Unpredictable numbers: QP numbers, keys. Takes no lock of the device. */
uint32_t random_u32(void);

/* --- settings.c --------------------------------------------------------------------------------------- */

struct settings {
    union ibv_gid addresses[MAX_GIDS]; /* as in a GID; AIORDMA_USROCE_ADDRESS, or 127.0.0.1 and ::1 */
    int num_addresses;
    bool default_addresses; /* nobody asked for them: ::1 may be missing */
    char capture[512];    /* path of a pcap file, "" for none; AIORDMA_USROCE_PCAP */
    struct usroce_fault fault; /* AIORDMA_USROCE_FAULT */
    bool has_fault;
    uint32_t socket_buffer; /* bytes asked of the kernel; AIORDMA_USROCE_SOCKET_BUFFER */
    bool gso;             /* AIORDMA_USROCE_GSO */
    bool shm;             /* AIORDMA_USROCE_SHM */
    bool direct;          /* AIORDMA_USROCE_DIRECT */
    bool count_locked;    /* enforce RLIMIT_MEMLOCK as a pinning device would; AIORDMA_USROCE_MEMLOCK */
};
/* Environment, overridden by usroce_set_option(). 0 or EINVAL with a line on stderr that says what and where. */
int settings_read(struct settings *settings);

/* --- events.c ------------------------------------------------------------------------------------------ */

/* The queue has a completion and is armed for it: one event to its channel, and disarmed. */
void channel_notify(struct cq *cq);
/* usroce_watch_channel() was called for it; not for NULL. */
bool channel_is_watched(struct ibv_comp_channel *base);
/* Forget the events that the application has not taken: before the queue goes. */
void channel_forget(struct cq *cq);
enum event_subject { EVENT_CQ, EVENT_QP, EVENT_SRQ, EVENT_PORT, EVENT_DEVICE };
void async_post(struct context *ctx, enum ibv_event_type type, enum event_subject subject, void *element);
/* Forget what the application has not taken about `element`: before it goes. */
void async_forget(struct context *ctx, void *element);
/* The device goes: nobody will ask for these events. */
void async_forget_all(struct context *ctx);
/* Waits until the application acknowledged all that it took about an object: the last step before it goes, after
 * async_forget(). Called without the lock. */
void async_wait_acked_cq(struct cq *cq);
void async_wait_acked_qp(struct qp *qp);
void async_wait_acked_srq(struct srq *srq);

/* --- cq.c ------------------------------------------------------------------------------------------------ */

/* Adds a completion. On overrun the queue is dead, its queue pairs go to error, and events say so. */
void cq_push(struct cq *cq, const struct ibv_wc *wc, bool solicited);
/* Drops the completions of a queue pair that is destroyed or reset. */
void cq_forget(struct cq *cq, uint32_t qp_num);
int cq_poll(struct ibv_cq *base, int num, struct ibv_wc *wc);
int cq_arm(struct ibv_cq *base, int solicited_only);
struct ibv_cq_ex *cq_create_ex(struct ibv_context *context, struct ibv_cq_init_attr_ex *attr);

/* --- memory.c ----------------------------------------------------------------------------------------------- */

/* The host address behind `addr`, or NULL if the key does not stand, in this protection domain, for `length` bytes
 * there with all the rights in `access` (0: reading by the owner). Length 0 needs no key: never NULL then. */
uint8_t *key_local(struct context *ctx, struct ibv_pd *pd, uint32_t lkey, uint64_t addr, uint64_t length, int access);
/* The same for a request of the peer: IBV_ACCESS_REMOTE_*; windows are looked at too, type 2 only for their QP. */
uint8_t *key_remote(struct context *ctx, struct qp *qp, uint32_t rkey, uint64_t addr, uint64_t length, int access);
/* Runs a posted bind (of either type). Returns the completion's status. */
enum ibv_wc_status mw_bind(struct context *ctx, struct qp *qp, struct ibv_mw *mw, uint32_t new_rkey,
                           const struct ibv_mw_bind_info *info);
/* A bind entered (+1) or left (-1) a send queue. */
void mw_count_posted(struct ibv_mw *mw, struct ibv_mr *mr, int change);
/* Revokes a type-2 window's key: local invalidate, or a SEND with invalidate of the peer. False: no such key. */
bool key_invalidate(struct context *ctx, struct qp *qp, uint32_t rkey);
/* A queue pair goes: the type-2 windows bound to it become invalid. */
void mw_unbind_all(struct context *ctx, uint32_t qp_num);
/* In a child of fork(): nothing is registered there. */
void memory_forget_locked(void);
struct ibv_mw *mw_alloc(struct ibv_pd *pd, enum ibv_mw_type type);
int mw_dealloc(struct ibv_mw *mw);

/* --- table.c, see table.h; with the device lock --------------------------------------------------------------- */

enum { REMOTE_RIGHTS = IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ | IBV_ACCESS_REMOTE_ATOMIC };

/* A key or queue pair became valid: peers may know it. Without a place for it they do without. */
void table_publish_key(struct context *ctx, struct key *key);
void table_publish_qp(struct context *ctx, struct qp *qp);
/* Nothing of a peer's lands by it any more. False: a peer is stopped in the middle of something; a key stands as
 * before, a queue pair is unknown from now on and is to be revoked again. */
bool table_revoke_key(struct context *ctx, struct key *key);
bool table_revoke_qp(struct context *ctx, struct qp *qp);
/* Where a key goes that could not be revoked: nobody goes by it any more, and its place is never used again. */
void table_abandon_key(struct key *key);
/* What a peer begins from now on does not go by it; what it has begun is not waited for. */
void table_hide_qp(const struct context *ctx, struct qp *qp);
/* Wrappers of links came or went: they see packets, so there must be some. */
void table_set_open(struct context *ctx);
/* The device goes, and whatever it has left. Before its links. */
void table_close(struct context *ctx);

/* --- direct.c ------------------------------------------------------------------------------------------------- */

/* Carries out `size` bytes of an RDMA WRITE or READ from `offset` on. False: by packets. */
bool direct_move(struct context *ctx, struct qp *qp, const struct send_wqe *wqe, uint64_t offset, uint32_t size);
bool direct_atomic(struct context *ctx, struct qp *qp, const struct send_wqe *wqe);

/* --- present.c ------------------------------------------------------------------------------------------------ */

/* The pages of `length` bytes at `addr`. */
void memory_pages(const void *addr, size_t length, uintptr_t *start, size_t *size);
/* Makes the pages present, writable if they will be written. 0, or EFAULT: there is a hole, or the right is missing. */
int memory_make_present(const void *addr, size_t length, bool writable);

/* --- slab.c --------------------------------------------------------------------------------------------------- */

struct slab {
    uint8_t *at;
    uint64_t size, inode;
    uint32_t number; /* no other slab of the process has or had it; not 0 */
    int fd;
};

/* A mapping of the memory behind a slab's descriptor. MAP_FAILED and errno. */
void *slab_map(int fd, size_t size);

/* The slab in which all of that memory lies. False: there is none. */
bool slab_find(const uint8_t *at, uint64_t length, struct slab *slab);

/* --- srq.c ---------------------------------------------------------------------------------------------------- */

int rq_init(struct rq *rq, uint32_t max_wr, uint32_t max_sge);
void rq_free(struct rq *rq);
/* Appends what fits. 0, or ENOMEM (full) or EINVAL with *bad set. */
int rq_post(struct rq *rq, struct ibv_recv_wr *wr, struct ibv_recv_wr **bad);
/* The oldest receive, or the newest (newest_first), or NULL; valid until the next call on the queue. */
struct recv_wqe *rq_pop(struct rq *rq);
/* It is going to be taken. */
void rq_prefetch(const struct rq *rq);
static inline uint32_t rq_count(const struct rq *rq)
{
    return rq->head - rq->tail;
}
/* As rq_pop() on an SRQ, with its limit event. */
struct recv_wqe *srq_pop(struct srq *srq);
struct ibv_srq *srq_create_ex(struct ibv_context *context, struct ibv_srq_init_attr_ex *attr);
int srq_get_num(struct ibv_srq *base, uint32_t *number);
int srq_post(struct ibv_srq *base, struct ibv_recv_wr *wr, struct ibv_recv_wr **bad);

/* --- ah.c -------------------------------------------------------------------------------------------------------- */

/* From an address vector to where its packets go. RoCE needs a GRH; a dlid other than 0 is the peer's UDP port.
 * 0 or EINVAL. */
int address_resolve(struct context *ctx, const struct ibv_ah_attr *attr, struct endpoint *to, struct gid_slot **slot);

/* --- qp.c --------------------------------------------------------------------------------------------------------- */

/* Copies into the pieces of a list, from `offset` on. False: a key does not stand for what is to be written. The
 * pieces together have room for it. */
bool sge_scatter(struct context *ctx, struct ibv_pd *pd, const struct ibv_sge *sge, uint32_t offset,
                 const void *data, uint32_t size);
struct ibv_qp *qp_create_ex(struct ibv_context *context, struct ibv_qp_init_attr_ex *attr);
/* To ERR: everything posted completes with WR_FLUSH_ERR, unless it completed before. `event` (0 for none) is told
 * to the application. Safe in any state. */
void qp_to_error(struct context *ctx, struct qp *qp, enum ibv_event_type event);
static inline bool qp_has_event(enum ibv_event_type event)
{
    return (int)event >= 0;
}
#define NO_EVENT ((enum ibv_event_type) - 1)

/* --- post.c -------------------------------------------------------------------------------------------------------- */

int qp_post_send(struct ibv_qp *base, struct ibv_send_wr *wr, struct ibv_send_wr **bad);
int qp_post_recv(struct ibv_qp *base, struct ibv_recv_wr *wr, struct ibv_recv_wr **bad);
int qp_bind_mw(struct ibv_qp *base, struct ibv_mw *mw, struct ibv_mw_bind *bind);
/* Fills the ibv_wr_* members for the operations asked for. */
void wr_interface_init(struct qp *qp);

/* --- requester.c ------------------------------------------------------------------------------------------------- */

void req_reset(struct context *ctx, struct qp *qp);
/* Transmits what windows and `budget` (packets) allow; leaves the QP in context.tx_ready if there is more. */
void req_transmit(struct context *ctx, struct qp *qp, int budget);
/* Whether the link would take the packet that is next. */
bool req_has_room(const struct qp *qp);
/* A response packet: acknowledgement, read response, atomic answer. */
void req_receive(struct context *ctx, struct qp *qp, const struct packet *packet);
void req_timer(struct context *ctx, struct qp *qp, uint64_t now);
/* Drained, where the application asked to be told (SQD). */
void req_check_drained(struct context *ctx, struct qp *qp);
/* Completes the work requests that are left, with WR_FLUSH_ERR. */
void req_flush(struct context *ctx, struct qp *qp);

/* --- responder.c --------------------------------------------------------------------------------------------------- */

/* Starts anew at qp->attr.rq_psn, with room for max_dest_rd_atomic reads and atomics. 0 or ENOMEM. */
int resp_reset(struct qp *qp);
void resp_free(struct qp *qp);
/* A request packet. */
void resp_receive(struct context *ctx, struct qp *qp, const struct packet *packet, const struct gid_slot *slot,
                  const struct view *view);
/* Transmits read responses. True: there is more. */
bool resp_transmit(struct context *ctx, struct qp *qp, int budget);
void resp_send_ack(struct context *ctx, struct qp *qp);
void resp_flush(struct context *ctx, struct qp *qp);

/* --- progress.c -------------------------------------------------------------------------------------------------------- */

int progress_init(struct context *ctx);
void progress_free(struct context *ctx);
/* One pass; returns how many frames came in. `polled`: a thread of the application runs it. */
int progress_drive(struct context *ctx, bool polled);
/* A polling thread found nothing: drive the device once. `claim`: keep the device thread out meanwhile, if this
 * goes on. */
void progress_poll(struct context *ctx, bool claim);
/* What a passing application thread leaves: the device thread sees to it, should nobody else come. */
void progress_leave_rest(struct context *ctx);
void progress_flush_acks(struct context *ctx);
/* When something is to be done though no packet comes: by links, and by timers too. */
uint64_t progress_deadline_links(const struct context *ctx);
uint64_t progress_deadline(const struct context *ctx);
/* Something was posted: transmit it now. */
void progress_posted(struct context *ctx, struct qp *qp);
void progress_tx_ready(struct context *ctx, struct qp *qp);
/* Its link has no room: it gets its turn when there is some. */
void progress_starved(struct context *ctx, struct qp *qp);
void progress_owe_ack(struct context *ctx, struct qp *qp);
void timer_set(struct context *ctx, struct qp *qp, uint64_t deadline);
void timer_forget(struct context *ctx, struct qp *qp);
/* Room for the timers of so many queue pairs. 0 or ENOMEM. */
int timers_reserve(struct timers *timers, uint32_t count);
/* Hands a received frame to its queue pair, or counts why not. */
void progress_receive(struct context *ctx, struct gid_slot *slot, const struct view *view);

/* --- sleep.c -------------------------------------------------------------------------------------------------------------- */

int sleep_init(struct context *ctx);
void sleep_free(struct context *ctx);
/* The device thread runs from the first queue pair on. 0 or an errno. */
int thread_start(struct context *ctx);
/* Called without the lock; the thread has ended afterwards. */
void thread_stop(struct context *ctx);
/* If the device thread sleeps, it must not do so beyond `deadline`. */
void thread_wake_by(struct context *ctx, uint64_t deadline);
/* Who sleeps must ask to be woken for room on the link. */
void thread_wake_for_room(struct context *ctx);
/* Somebody polls: keep the device thread out, if this goes on. */
void thread_polled(struct context *ctx);
/* A queue of the channel (NULL: of none) was armed: whoever sleeps there takes over, else the device thread. */
void sleep_armed(struct context *ctx, const struct channel *channel);
/* Sleeps until there may be an event, for packets too. Gives the lock back meanwhile. False: errno says why not. The
 * caller cannot be cancelled (pthread_cancel), but there it may if `cancel_state` says so. */
bool sleep_blocking(struct context *ctx, struct channel *channel, int cancel_state);
/* Who watches the channel woke and found no event: drives the device. Whether there is one now. */
bool sleep_attend(struct context *ctx, struct channel *channel);
/* Makes channel->watch_fd. 0 or an errno. */
int sleep_watch(struct context *ctx, struct channel *channel);
void sleep_unwatch(struct context *ctx, struct channel *channel);
/* The channel got an event. */
void sleep_notified(struct context *ctx, struct channel *channel);
/* A GID got its first user or lost its last: other links are read from now on. */
void sleep_links_changed(struct context *ctx);

/* --- tx.c ----------------------------------------------------------------------------------------------------------------- */

int tx_init(struct context *ctx);
void tx_free(struct context *ctx);
struct tx_packet {
    struct context *ctx;
    struct gid_slot *slot;
    const struct endpoint *to;
    uint8_t *head;       /* room for WIRE_MAX_HEADERS bytes; `head_size` of them are used */
    uint32_t head_size;
    uint32_t payload;    /* bytes added so far */
    uint8_t traffic_class;
};
/* A packet to `to`. Never fails: what was queued is flushed if there is no room. */
void tx_begin(struct context *ctx, struct tx_packet *packet, struct gid_slot *slot, const struct endpoint *to);
/* Adds payload; the memory must stay as it is until tx_end(), small pieces are copied. */
void tx_payload(struct tx_packet *packet, const void *data, uint32_t size);
/* Pads, sets the pad count and queues the packet. */
void tx_end(struct tx_packet *packet);
/* Whether the link would take a packet with so much payload now; else progress_starved() is for who wants to wait. */
bool tx_has_room(const struct gid_slot *slot, const struct endpoint *to, uint32_t payload);
/* Sends all that is queued, on every link. */
void tx_flush(struct context *ctx);

#endif
