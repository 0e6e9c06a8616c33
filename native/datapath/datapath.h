/* aiordma._native._datapath: what happens once for every small message, written by hand against Python's C API.
 *
 * A message of a few bytes used to cost some fifty Python calls on its way through windows, tables and queues. Here
 * is that one way, and nothing else: whatever is rare (large messages, control frames, errors, the end) is called
 * back into the Python classes that derive from these types, and there is no second copy of the logic on either side.
 *
 * ledger.c   Ledger    the counters of protocol/credit.py that move with each frame (the type is in ledger_type.c)
 * inbox.c     Inbox     items in order of arrival, and who waits for them
 * wait.c      Wait      what a task awaits there, and how it is woken
 * next.c      Next      the await of what comes next there: polls, waits, takes it
 * turn.c                the end of a turn of the loop, and polling on turns
 * table.c     Table     the pending table: work-request id to object; polls, and hands out completions
 * receive.c   Ring, Buffer, Receiver: posted receives, and messages that arrive in them
 * users.c     the receivers of a ring, by queue pair
 * send.c      Sender, Group: messages, copied once, several to a doorbell, few of them signaled
 * one_sided.c OneSided: a small write, read or atomic operation, likewise; awaitable
 * region.c    Grant, Region: what the peer lets us into
 * spin.c      Governor, and spinning inside an await
 * endpoint.c  Endpoint: what a user calls, of all this
 *
 * Everything runs with the GIL held, which is the only lock; it is released while spinning for long. Objects of one
 * connection or reactor are used from one thread (their event loop's). Verbs objects are given as addresses by who
 * keeps them alive. Posting calls nothing back; completions may call anything, so no pointer into a growing array
 * is kept across one. */
#ifndef AIORDMA_DATAPATH_H
#define AIORDMA_DATAPATH_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <structmember.h>

#include <infiniband/verbs.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "glue.h"
#include "ledger.h"
#include "object.h"

/* A frame's header (protocol/frames.py), and the kind that is a user's message. */
#define HEADER_SIZE 16
#define FRAME_MESSAGE 1

/* Every line of it is on its way to the cache, if it is not there: together they take as long as one. */
static inline void prefetch(const void *at, size_t size)
{
    for (uintptr_t line = (uintptr_t)at & ~(uintptr_t)63; line < (uintptr_t)at + size; line += 64)
        __builtin_prefetch((const void *)line);
}

/* A queue of references, oldest first; a ring that doubles when it is full. All zero is an empty one. It stays where
 * it is: the first few places are in it, where most of those who wait for something find room. */
#define FEW 2

struct objects {
    PyObject **at;
    Py_ssize_t size, head, count; /* size is a power of two, or 0 */
    PyObject *few[FEW];
};

int objects_append(struct objects *queue, PyObject *object);  /* takes a new reference; -1 and MemoryError */
int objects_prepend(struct objects *queue, PyObject *object); /* likewise, at the head */
PyObject *objects_pop(struct objects *queue);                 /* the oldest, with its reference; NULL: empty */
bool objects_remove(struct objects *queue, PyObject *object); /* the first that is this very object; false: none */
int objects_visit(struct objects *queue, visitproc visit, void *arg);
void objects_clear(struct objects *queue);

typedef struct Sender Sender;

typedef struct {
    PyObject_HEAD
    long long cap_ns, turn_cap_ns, average_ns;
    double hit_rate;
    unsigned long long attempts;
} Governor;

long long now_ns(void);
void governor_learn(Governor *governor, long long elapsed_ns);
long long governor_turns_ns(const Governor *governor); /* how long polling on turns may go on, finding nothing */
int governor_of(PyObject *value, Governor **governor); /* borrowed; None: NULL. -1 and TypeError */

#define POLL_BATCH 64  /* completions of one poll, 2.5 KiB of stack: as many mean that there may be more */
#define TURN_LIMIT 256 /* completions of one turn, before other callbacks of the loop get theirs */

struct pending {
    PyObject *entry; /* NULL: free */
    uint32_t generation;
};

typedef struct {
    PyObject_HEAD
    struct pending *slots;
    uint32_t *free; /* a stack of free slots */
    uint32_t size, used, free_count;
    Sender *dirty;         /* senders with frames that were not posted yet; borrowed, they leave before they die */
    PyObject *on_error;    /* called with an exception out of a completion */
    unsigned long long turn;
    unsigned long thread;  /* whose loop it is */
    unsigned long process; /* counts forks */
    char turn_marked;      /* something happened in this turn of the loop that ends with it */
    char turn_due;         /* the loop was asked to call turned(), for nobody polls in the next turn */
    char dispatching;
    PyObject *loop;
    PyObject *done; /* a future that is: of what needs no waiting */
    struct objects to_wake; /* Waits that are over, whose tasks have not run, and what soon() was given */
    char waking;            /* a callback of the loop is going to call them, or does */
    char wake_due;          /* the loop was asked for such a callback */
    /* spin.c */
    PyObject *ready;      /* asyncio's run queue, or NULL */
    long long inline_cap_ns, turn_spent_ns, spin_ns, last_hit_ns, inline_polls, inline_hits;
    long long waiting;    /* operations (not receives) that somebody may wait for */
    long long handed_out; /* what somebody may have been woken by, since the start */
    unsigned int woken;   /* receivers that have their item and have not run */
    unsigned int stays;   /* awaits of this turn that completed without one */
    char spinning, polling, busy, adaptive, closed;
    /* turn.c */
    struct ibv_cq **queues;
    size_t queue_count, first_queue; /* the first that is polled, modulo their number */
    Governor *governor, *arrivals;   /* of what we have posted, and of what comes */
    long long asked_ns;              /* when polling began */
    long long left_ns;               /* when a turn that polled was over */
    long long turns;
    long long completions, stale, polls, empty_polls;
} Table;

enum part {
    RESUMED_NEXT,
    RESUMED_WAIT,
    RESUMED_CALLBACK,
    RESUMED_CONTEXT,
    RESUMED_TASK,
    RESUMED_COROUTINES, /* from the outermost on */
    RESUMED = RESUMED_COROUTINES + 3,
};

/* What runs when a task is woken that waits. Of many, one that did not run lately is in no cache; it is on its way
 * there while its message is looked at. The addresses are for that only, and may be stale. */
struct resumed {
    struct {
        const void *at;
        size_t size;
    } part[RESUMED];
};

typedef struct {
    PyObject_HEAD
    Table *table;
    struct ibv_cq *cq;    /* polled for what is to come; NULL: not inside an await */
    Governor *governor;   /* or NULL: up to the cap */
    PyObject *give_back;  /* called with an item whose receiver was cancelled; NULL: it is the next one again */
    PyObject *make_error; /* after fail(): an error for each who finds nothing */
    struct objects items, waiters;
    /* That are over, to be used again when nobody else has them any more: each message has one of either, which would be
     * new memory, and entered in the lists of the garbage collector, next to others that are in no cache. */
    PyObject *spare_next, *spare_wait;
    struct resumed resumed; /* who waited last */
} Inbox;

typedef struct {
    PyObject_HEAD
    Table *table;
    Inbox *inbox;
    PyObject *callback, *context; /* of the task; NULL before it waits, and when it was called */
    PyObject *value;              /* an item; an error; or the message of a cancellation, or NULL */
    int state;
    char blocking;
} Wait;

Wait *wait_new(Inbox *inbox);
void wait_over(Wait *wait);                /* with what it got; takes the reference */
int wait_give(Wait *wait, PyObject *item); /* 1: it has it; 0: it waits no more; -1 and an exception */
int wait_fail(Wait *wait, PyObject *error); /* the wait is over; -1 and an exception */
PyObject *wait_item(const Wait *wait);     /* what it has got, borrowed, or NULL */
bool wait_has_task(const Wait *wait);      /* a task is to be woken */
/* Of the arguments of add_done_callback(callback, *, context=None): that context or a copy of the current one. NULL and
 * TypeError. */
PyObject *context_of_callback(PyObject *const *args, Py_ssize_t count, PyObject *names);
PySendResult wait_send(PyObject *wait, PyObject *unused, PyObject **value);
PyObject *sent_as_iterator(PySendResult sent, PyObject *value); /* steals the value; what tp_iternext returns */
int table_line_up(Table *table, PyObject *object); /* a Wait, or a callable: it is called by table_wake() */
void table_wake(Table *table);             /* calls those in line; only from a callback of the loop */

void resumed_prefetch(const struct resumed *resumed);
static inline void resumed_set(struct resumed *resumed, enum part part, const void *at, size_t size)
{
    resumed->part[part].at = at;
    resumed->part[part].size = size;
}

/* 1: a waiter has the item now, and runs later; 0: it lies in the inbox; -1 and an exception. */
int inbox_put(Inbox *inbox, PyObject *item, bool front);
/* What lies in a place for a spare, with its reference, if nobody else has it any more; else NULL. */
PyObject *spare_take(PyObject **spare);
void spare_put(PyObject **spare, PyObject *object); /* takes the reference */
int inbox_spin(Inbox *inbox, bool (*done)(PyObject *), PyObject *what); /* as table_spin() */
bool inbox_has(PyObject *inbox); /* there is something to take */
void inbox_runs(Inbox *inbox);   /* a receiver that was woken runs, or was cancelled and does not */

int table_add(Table *table, PyObject *entry, uint64_t *wr_id); /* -1 and MemoryError */
bool table_remove(Table *table, uint64_t wr_id, PyObject *entry);
const struct pending *table_slot(const Table *table, uint64_t wr_id); /* where it is; until the next table_add() */
int table_count_forks(void); /* once, or an errno */
bool table_here(const Table *table); /* the caller is in the table's thread, and its process was not forked off */
/* The loop calls the method in its next turn, unless it was asked already. -1 and an exception. */
int table_ask(Table *table, char *asked, PyObject *method);
int table_mark_turn(Table *table);      /* its end will be seen; -1 and an exception */
void table_turned(Table *table);        /* here it is */
void table_flush(Table *table);         /* what was sent since the first message of this turn goes to the device */
int table_add_queue(Table *table, struct ibv_cq *cq); /* polled on turns; -1 and MemoryError */
int table_poll_on_turns(Table *table);  /* from now on, if that pays in this mode; -1 and an exception */
int table_poll_turn(Table *table);      /* does, in this turn; -1 and an exception */
/* Posts what waits for that, polls once (or spins), and hands out what is there: how many completions
 * there were. Negative: the device has failed, and failed() of the table knows. */
int table_poll(Table *table, struct ibv_cq *cq, uint64_t spin_ns);
/* The same, and then runs those who waited for it: of callbacks of the loop. Never negative. */
int table_serve(Table *table, struct ibv_cq *cq, uint64_t spin_ns);
void table_learn_gap(Table *table, long long before); /* something may have been found, the last time at `before` */

struct spin {
    struct ibv_cq *cq;
    Governor *governor; /* NULL: up to the cap */
    bool once;          /* polls, and does not spin */
    bool (*done)(PyObject *what);
    PyObject *what;
};

/* Polls inside an await; see spin.c. Not reentrant: an await inside a completion does not poll. -1 and an exception. */
int table_spin(Table *table, const struct spin *spin);
bool says_done(PyObject *what); /* what.done() */
void table_unraisable(Table *table); /* the exception that is set goes to on_error */

typedef struct Receiver Receiver;

/* Of many users, one that got nothing lately is in no cache. So here is what else a message needs, to be fetched at once;
 * the addresses are for that only, and `ledger` may be stale. */
struct user {
    Receiver *receiver; /* NULL: a free place */
    const void *ledger, *messages, *sender;
    uint32_t qp_num;
};

/* All zero is an empty one. */
struct users {
    struct user *at;
    uint32_t size, count; /* size is a power of two, or 0 */
};

struct user *users_find(const struct users *users, uint32_t qp_num);          /* until a change; NULL: nobody */
int users_enter(struct users *users, uint32_t qp_num, Receiver *receiver);    /* -1 and MemoryError */
void users_forget(struct users *users, uint32_t qp_num);                      /* may run code of others, as clear() */
int users_visit(const struct users *users, visitproc visit, void *arg);
void users_clear(struct users *users);

typedef struct {
    PyObject_HEAD
    Table *table;
    struct ibv_qp *qp; /* exactly one of the two */
    struct ibv_srq *srq;
    struct users users;
    Receiver *last;    /* the user found last, and its number; borrowed from `users` */
    uint32_t last_qp_num;
    uint32_t size; /* bytes of a buffer */
    PyObject *buffers; /* list of Buffer */
    Py_ssize_t posted;
    char closed;
} Ring;

typedef struct {
    PyObject_HEAD
    Ring *ring;
    PyObject *owner; /* keeps the memory */
    PyObject *copy;  /* of the message, when the memory is gone */
    uint64_t address, wr_id;
    uint32_t lkey, length; /* of the message, without its header */
    Py_ssize_t index;
    char posted;
    char handed; /* somebody was woken for it and has not taken it */
} Buffer;

#define SMALL 128 /* bytes of a message that are worth fetching */

/* What the next message comes with, if the device takes the receive that was posted last. The addresses are to be
 * fetched and for nothing else, and may be stale. */
struct expected {
    const void *buffer, *ring, *slot, *data; /* the Buffer, its Ring, its place in the pending table, its memory */
};

struct Receiver {
    PyObject_HEAD
    Ledger *ledger; /* NULL until the handshake is over */
    Sender *sender;
    Inbox *messages;
    struct expected expected;
    PyObject *consumer; /* called with each message while somebody waits for one, in its stead; or NULL */
    Py_ssize_t handed;
    long long received;
    char closed, consumes_inline;
};

void receiver_expects(const Receiver *receiver); /* a message may come soon: what it takes is fetched */
PyObject *receiver_take(Receiver *receiver, PyObject *item); /* a message, its buffer posted again, or the item */

/* next.c */
PyObject *next_new(Inbox *inbox, Receiver *receiver, bool iterates); /* receiver NULL: the item as it is */

typedef struct {
    PyObject_HEAD
    Sender *sender; /* borrowed; NULL when it is gone */
    uint64_t wr_id;
    int count;  /* messages posted with it, once the last one is */
    int staged; /* of these, in staging buffers */
} Group;

/* What the peer announced under a name. */
typedef struct {
    PyObject_HEAD
    PyObject *connection, *name;
    unsigned long long address, length;
    unsigned int rkey, rights; /* rights: REMOTE_* flags */
    char revoked;
} Grant;

typedef struct {
    PyObject_HEAD
    Grant *grant;
    unsigned long long offset, length;
} Region;

enum one_sided_state { OP_NEW, OP_POSTED, OP_DONE, OP_FAILED, OP_CANCELLED };

/* A small write, read or atomic operation, from the call to the completion. While it is posted it is in the pending
 * table, and in the list of its sender in the order of posting. */
typedef struct OneSided {
    PyObject_HEAD
    Sender *sender;
    enum ibv_wr_opcode opcode;
    uint32_t nbytes;            /* that come back; 0: of a write */
    PyObject *landing;          /* the staging buffer they come to, or a write leaves from, while that is lent */
    uint64_t address;           /* of it */
    uint64_t compare_add, swap; /* of an atomic operation */
    uint32_t notify;            /* of a write that notifies */
    PyObject *value;            /* of what is done, if bytes came back */
    PyObject *data;      /* that a batch is to write, or a view of what is read into; until the end */
    Region *region;      /* of a batch; likewise */
    PyObject *future;    /* made when somebody has to wait */
    PyObject *callbacks; /* list of (callback, context), or NULL */
    PyObject *error;
    PyObject *message; /* of cancel(), or NULL */
    PyObject *weakrefs;
    struct OneSided *next; /* posted after this one; a reference of the list */
    uint64_t wr_id;
    long long started_ns;
    enum one_sided_state state;
    char in_table, into; /* into: a read has `data` */
} OneSided;

#define MESSAGES 64 /* in flight */
#define GROUP 16    /* messages at most; the last one is signaled */
#define GROUPS 16   /* more than MESSAGES / GROUP, for some are closed before they are full */
#define FRAMES 32   /* that wait for the end of a turn */
#define ONE_SIDED 64 /* in flight */

/* One work request that is put together. */
struct frame {
    uint64_t address; /* of its bytes */
    uint64_t remote;  /* of an operation */
    OneSided *op;     /* NULL: a message */
    uint32_t length;
    uint32_t rkey;    /* likewise */
    uint32_t lkey;    /* of a staging buffer */
    bool staged;      /* in a staging buffer; else inline */
};

/* Those that wait for the end of a turn. */
struct gathered {
    struct frame frame[FRAMES];
    unsigned char data[]; /* FRAMES of `stride` bytes, inline data */
};

struct Sender {
    PyObject_HEAD
    /* What a message touches lies together: most senders of many were not used lately, and are in no cache. */
    Table *table;
    Ledger *ledger;
    struct ibv_qp *qp;
    size_t stride;
    struct gathered *gathered; /* NULL until the first is gathered */
    struct {
        uint64_t wr_id;
        int count, staged; /* so far; 0: the group is not in the pending table */
    } filling;
    Sender *next;           /* among the dirty ones */
    unsigned long long turn; /* when something was sent last */
    long long reserved, wanted_back, sent, handed;
    unsigned int group;     /* the one that is filled now, with `filling` */
    unsigned int closed;    /* groups whose last message is posted, and whose completion has yet to come */
    unsigned int in_flight; /* messages queued here or in a group that has not completed */
    unsigned int queued;
    unsigned int eager;     /* bytes of a message that goes this way; agreed with the peer */
    unsigned int one_sided; /* operations queued here or in flight */
    char dirty, open, spins, atomics;
    char may_wait;          /* somebody may be in one of these two: set by Python, cleared here */
    Group *groups[GROUPS];
    PyObject *staging;      /* StagingPool, with its list of free buffers and those who wait for one */
    PyObject *staging_free, *staging_line;
    Py_ssize_t staging_keep; /* so many free ones need not be looked at by the pool */
    size_t staging_size;     /* bytes of one */
    PyObject *credit_queue, *slot_queue; /* who waits, in Python: nothing passes them */
    struct objects staged;  /* its buffers that we hold, in the order of their messages */
    PyObject *connection, *loop;
    struct ibv_cq *cq;
    Governor *governor; /* or NULL */
    OneSided *first, *last; /* posted ones, in order */
    long long posted;
};

/* Of many senders, one that was not used lately is in no cache: what a message needs is asked for at once. Whoever has
 * the addresses of the other two need not wait for the sender to name them. */
static inline void sender_fetch(const Sender *sender, const void *ledger, const void *qp)
{
    prefetch(sender, offsetof(Sender, groups));
    prefetch(ledger, sizeof(Ledger));
    prefetch(qp, sizeof(struct ibv_qp));
}

/* 1: the message is on its way; 0: it needs SendQueue.submit(), which also says what is wrong; -1 and an exception. */
int sender_send(Sender *sender, PyObject *data);
/* A small write that nothing holds up, under way. NULL: it has to wait, or there is an exception. */
OneSided *sender_write(Sender *sender, PyObject *data, PyObject *region, PyObject *notify);
/* A small read or an atomic operation, likewise: what has an answer. */
OneSided *sender_ask(Sender *sender, PyObject *region, enum ibv_wr_opcode opcode, uint64_t compare_add, uint64_t swap);
OneSided *sender_read_into(Sender *sender, PyObject *region, PyObject *buffer);
bool sender_word(PyObject *value, uint64_t *word);
/* A staging buffer is not needed any more; that may call others who wait for one. Takes the reference; leaves the
 * exception that is set, if there is one. */
void sender_give(Sender *sender, PyObject *buffer);

int sender_flush(Sender *sender);  /* -1 and an exception of a callback */

int sender_pump(Sender *sender);   /* somebody may go on; -1 and an exception */
int sender_control(Sender *sender); /* credits are due; -1 and an exception */

/* What table.c hands completions to without Python in between. -1 and an exception. */
int buffer_completed(Buffer *buffer, const struct glue_wc *wc);
int group_completed(Group *group, const struct glue_wc *wc);
int one_sided_completed(OneSided *op, const struct glue_wc *wc);

/* one_sided.c */
OneSided *one_sided_new(Sender *sender, enum ibv_wr_opcode opcode);
int one_sided_posting(OneSided *op, struct ibv_send_wr *wr); /* enters the table; -1 and an exception */
void one_sided_refused(OneSided *op, PyObject *error);
void one_sided_drop_last(Sender *sender, unsigned int count, PyObject *error); /* the last ones were not posted */
int one_sided_fail_all(Sender *sender, PyObject *make_error); /* -1 and an exception */
void one_sided_give_back(OneSided *op);                       /* the device is done with its landing, if it has one */
void one_sided_give_back_all(Sender *sender);
void one_sided_forget_all(Sender *sender); /* the queue pair is gone */
PyObject *ready_with(PyObject *value);     /* what an await that is over iterates over; steals the value */
bool region_allows(const Region *region, const Sender *sender, size_t nbytes, unsigned int right); /* region.c */

/* module.c */
extern PyTypeObject *ledger_type, *inbox_type, *table_type, *ring_type, *buffer_type, *receiver_type, *group_type,
    *sender_type, *governor_type, *grant_type, *region_type, *one_sided_type, *ready_type, *wait_type, *next_type,
    *endpoint_type;
extern PyObject *cancelled_error, *invalid_state_error, *closed_error;
extern PyObject *running_loop;   /* asyncio._get_running_loop */
extern PyObject *copy_context;   /* contextvars.copy_context */
extern PyObject *ready_iterator; /* the one Ready for None */
extern PyObject *device_error; /* callable: (errno, call) gives a DeviceError */
int assign_ledger(Ledger **field, PyObject *value); /* -1 and TypeError */
int call_none(PyObject *object, PyObject *name); /* object.name(), its result dropped; -1 and an exception */
extern PyObject *name_done, *name_set_result, *name_pump, *name_send_control, *name_used, *name_poll_turn, *name_turned,
    *name_wake, *name_sleep, *name_idle, *name_take, *name_give, *name_address, *name_lkey, *name_run, *name_self,
    *name_call_soon, *name_send_later, *name_write_later, *name_read_later, *name_read_into_later, *name_fetch_add_later,
    *name_compare_swap_later;

extern PyType_Spec inbox_spec, table_spec, ring_spec, buffer_spec, receiver_spec, group_spec, sender_spec,
    governor_spec, grant_spec, region_spec, one_sided_spec, ready_spec, wait_spec, next_spec, endpoint_spec;

#endif
