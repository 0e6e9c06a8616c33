/* Completion queues.
 *
 * A queue is a ring that the device fills and the application empties, both under the device lock. Polling an
 * empty queue drives the device (progress.c), so that a polling thread finds its completions itself.
 *
 * The extended interface copies one completion at a time out of the ring; the read functions then need no lock of
 * the device. A queue that several threads may poll keeps the others out from start_poll to end_poll. */
#include "usroce.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static struct cq *cq_of(struct ibv_cq *base)
{
    return (struct cq *)(void *)base;
}

static struct cq *cq_of_ex(struct ibv_cq_ex *ex)
{
    return (struct cq *)(void *)ex;
}

static struct context *context_of_cq(const struct cq *cq)
{
    return context_of(cq->base.context);
}

static uint32_t count(const struct cq *cq)
{
    return cq->head - cq->tail;
}

static uint32_t at(const struct cq *cq, uint32_t index)
{
    return index & (cq->capacity - 1);
}

/* --- filling ------------------------------------------------------------------------------------------------- */

/* The queue is lost. Who sleeps on its channel is woken, to be told by the next poll. Flushing the queue pairs
 * comes back to cq_push(), which drops what is meant for this queue from now on. */
static void overrun(struct context *ctx, struct cq *cq)
{
    struct list *entry;

    cq->overrun = true;
    async_post(ctx, IBV_EVENT_CQ_ERR, EVENT_CQ, cq);
    if (cq->armed != NOT_ARMED)
        channel_notify(cq);
    for (entry = ctx->all_qps.next; entry != &ctx->all_qps; entry = entry->next) {
        struct qp *qp = list_entry(entry, struct qp, in_all);

        if (qp->base.send_cq == &cq->base || qp->base.recv_cq == &cq->base)
            qp_to_error(ctx, qp, IBV_EVENT_QP_FATAL);
    }
}

void cq_push(struct cq *cq, const struct ibv_wc *wc, bool solicited)
{
    struct context *ctx = context_of_cq(cq);

    if (cq->overrun)
        return;
    if (count(cq) == cq->capacity) {
        if (!cq->ignore_overrun)
            overrun(ctx, cq);
        return;
    }
    cq->ring[at(cq, cq->head)] = *wc;
    if (cq->stamps)
        cq->stamps[at(cq, cq->head)] = now_ns();
    cq->head++;
    ctx->delivered = true;
    if (cq->armed == NOT_ARMED || (cq->armed == ARMED_SOLICITED && !solicited && wc->status == IBV_WC_SUCCESS))
        return;
    if (cq->polling)
        cq->unannounced = true;
    else
        channel_notify(cq);
}

void cq_forget(struct cq *cq, uint32_t qp_num)
{
    uint32_t to = cq->tail;

    for (uint32_t from = cq->tail; from != cq->head; from++) {
        if (cq->ring[at(cq, from)].qp_num == qp_num)
            continue;
        cq->ring[at(cq, to)] = cq->ring[at(cq, from)];
        if (cq->stamps)
            cq->stamps[at(cq, to)] = cq->stamps[at(cq, from)];
        to++;
    }
    cq->head = to;
}

/* --- polling ------------------------------------------------------------------------------------------------- */

static int pop(struct cq *cq, int num, struct ibv_wc *wc)
{
    int taken = 0;

    for (; taken < num && cq->tail != cq->head; cq->tail++)
        wc[taken++] = cq->ring[at(cq, cq->tail)];
    if (cq->tail == cq->head)
        cq->tail = cq->head = 0; /* a large ring that is never full stays in the cache */
    return taken;
}

/* While the queue is armed the application is about to sleep: the device thread is not kept out then. What an event
 * loop finds by polling is not announced to it, see announce(). */
static void fill(struct context *ctx, struct cq *cq)
{
    if (count(cq))
        return;
    cq->polling = cq->armed != NOT_ARMED && channel_is_watched(cq->base.channel);
    progress_poll(ctx, cq->armed == NOT_ARMED);
    if (cq->polling)
        progress_flush_acks(ctx); /* an event loop may take its time until it comes again */
    cq->polling = false;
}

/* What the poll left behind; else the queue stays armed. */
static void announce(struct cq *cq)
{
    if (cq->unannounced && count(cq))
        channel_notify(cq);
    cq->unannounced = false;
}

int cq_poll(struct ibv_cq *base, int num, struct ibv_wc *wc)
{
    struct cq *cq = cq_of(base);
    struct context *ctx = context_of_cq(cq);
    int taken;

    if (context_is_foreign(ctx))
        return -ENODEV;
    if (num <= 0)
        return 0;
    pthread_mutex_lock(&ctx->lock);
    fill(ctx, cq);
    taken = pop(cq, num, wc);
    announce(cq);
    if (!taken && cq->overrun)
        taken = -EIO;
    pthread_mutex_unlock(&ctx->lock);
    return taken;
}

int cq_arm(struct ibv_cq *base, int solicited_only)
{
    struct cq *cq = cq_of(base);
    struct context *ctx = context_of_cq(cq);
    int rc = 0;

    if (context_is_foreign(ctx))
        return ENODEV;
    pthread_mutex_lock(&ctx->lock);
    if (cq->overrun)
        rc = EIO;
    else if (!solicited_only)
        cq->armed = ARMED_ANY;
    else if (cq->armed == NOT_ARMED)
        cq->armed = ARMED_SOLICITED;
    sleep_armed(ctx, (struct channel *)(void *)base->channel);
    pthread_mutex_unlock(&ctx->lock);
    return rc;
}

/* --- the extended interface ---------------------------------------------------------------------------------- */

/* Takes the oldest completion into `current`. 0, ENOENT, or EIO for a queue that is lost. */
static int pop_current(struct cq *cq)
{
    if (!count(cq))
        return cq->overrun ? EIO : ENOENT;
    if (cq->stamps)
        cq->current_stamp = cq->stamps[at(cq, cq->tail)];
    pop(cq, 1, &cq->current);
    cq->ex.wr_id = cq->current.wr_id;
    cq->ex.status = cq->current.status;
    return 0;
}

static int start_poll(struct ibv_cq_ex *ex, struct ibv_poll_cq_attr *attr)
{
    struct cq *cq = cq_of_ex(ex);
    struct context *ctx = context_of_cq(cq);
    int rc;

    if (context_is_foreign(ctx))
        return ENODEV;
    if (attr->comp_mask)
        return EINVAL;
    if (!cq->single_threaded)
        pthread_mutex_lock(&cq->turn);
    pthread_mutex_lock(&ctx->lock);
    fill(ctx, cq);
    rc = pop_current(cq);
    announce(cq);
    pthread_mutex_unlock(&ctx->lock);
    if (rc && !cq->single_threaded)
        pthread_mutex_unlock(&cq->turn); /* there is no end_poll after a start_poll that failed */
    return rc;
}

static int next_poll(struct ibv_cq_ex *ex)
{
    struct cq *cq = cq_of_ex(ex);
    struct context *ctx = context_of_cq(cq);
    int rc;

    if (context_is_foreign(ctx))
        return ENODEV;
    pthread_mutex_lock(&ctx->lock);
    rc = pop_current(cq);
    pthread_mutex_unlock(&ctx->lock);
    return rc;
}

static void end_poll(struct ibv_cq_ex *ex)
{
    struct cq *cq = cq_of_ex(ex);

    if (!context_is_foreign(context_of_cq(cq)) && !cq->single_threaded)
        pthread_mutex_unlock(&cq->turn);
}

static enum ibv_wc_opcode read_opcode(struct ibv_cq_ex *ex)
{
    return cq_of_ex(ex)->current.opcode;
}

static uint32_t read_vendor_err(struct ibv_cq_ex *ex)
{
    return cq_of_ex(ex)->current.vendor_err;
}

static uint32_t read_byte_len(struct ibv_cq_ex *ex)
{
    return cq_of_ex(ex)->current.byte_len;
}

/* Also the key that a SEND with invalidate named: both are one field of a completion. */
static __be32 read_imm_data(struct ibv_cq_ex *ex)
{
    return cq_of_ex(ex)->current.imm_data;
}

static uint32_t read_qp_num(struct ibv_cq_ex *ex)
{
    return cq_of_ex(ex)->current.qp_num;
}

static uint32_t read_src_qp(struct ibv_cq_ex *ex)
{
    return cq_of_ex(ex)->current.src_qp;
}

static unsigned int read_wc_flags(struct ibv_cq_ex *ex)
{
    return cq_of_ex(ex)->current.wc_flags;
}

static uint32_t read_slid(struct ibv_cq_ex *ex)
{
    return cq_of_ex(ex)->current.slid;
}

static uint8_t read_sl(struct ibv_cq_ex *ex)
{
    return cq_of_ex(ex)->current.sl;
}

static uint8_t read_dlid_path_bits(struct ibv_cq_ex *ex)
{
    return cq_of_ex(ex)->current.dlid_path_bits;
}

/* In ticks of hca_core_clock, which are nanoseconds; ibv_query_rt_values_ex() reads the same clock. */
static uint64_t read_completion_ts(struct ibv_cq_ex *ex)
{
    return cq_of_ex(ex)->current_stamp;
}

static uint64_t read_completion_wallclock_ns(struct ibv_cq_ex *ex)
{
    struct timespec ts;
    uint64_t wall;

    clock_gettime(CLOCK_REALTIME, &ts);
    wall = (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
    return wall - (now_ns() - cq_of_ex(ex)->current_stamp);
}

static void set_readers(struct ibv_cq_ex *ex)
{
    ex->start_poll = start_poll;
    ex->next_poll = next_poll;
    ex->end_poll = end_poll;
    ex->read_opcode = read_opcode;
    ex->read_vendor_err = read_vendor_err;
    ex->read_byte_len = read_byte_len;
    ex->read_imm_data = read_imm_data;
    ex->read_qp_num = read_qp_num;
    ex->read_src_qp = read_src_qp;
    ex->read_wc_flags = read_wc_flags;
    ex->read_slid = read_slid;
    ex->read_sl = read_sl;
    ex->read_dlid_path_bits = read_dlid_path_bits;
    ex->read_completion_ts = read_completion_ts;
    ex->read_completion_wallclock_ns = read_completion_wallclock_ns;
}

/* --- life ---------------------------------------------------------------------------------------------------- */

enum {
    STAMP_FLAGS = IBV_WC_EX_WITH_COMPLETION_TIMESTAMP | IBV_WC_EX_WITH_COMPLETION_TIMESTAMP_WALLCLOCK,
    WC_FLAGS = IBV_WC_STANDARD_FLAGS | STAMP_FLAGS,
    CQ_FLAGS = IBV_CREATE_CQ_ATTR_SINGLE_THREADED | IBV_CREATE_CQ_ATTR_IGNORE_OVERRUN,
};

static uint32_t round_up(uint32_t cqe)
{
    uint32_t capacity = 1;

    while (capacity < cqe)
        capacity *= 2;
    return capacity;
}

static int check_attr(struct ibv_context *context, const struct ibv_cq_init_attr_ex *attr, uint32_t flags)
{
    if (attr->wc_flags & ~(uint64_t)WC_FLAGS || flags & ~(uint32_t)CQ_FLAGS)
        return EOPNOTSUPP;
    /* A protection domain here would be a parent domain, and there are none. */
    if (attr->comp_mask & ~(uint32_t)IBV_CQ_INIT_ATTR_MASK_FLAGS)
        return EOPNOTSUPP;
    if (!attr->cqe || attr->cqe > MAX_CQE)
        return EINVAL;
    if (attr->comp_vector >= (uint32_t)context->num_comp_vectors)
        return EINVAL;
    if (attr->channel && attr->channel->context != context)
        return EINVAL;
    return 0;
}

static void free_cq(struct cq *cq)
{
    pthread_mutex_destroy(&cq->turn);
    pthread_cond_destroy(&cq->base.cond);
    pthread_mutex_destroy(&cq->base.mutex);
    free(cq->stamps);
    free(cq->ring);
    free(cq);
}

static struct cq *alloc_cq(uint32_t capacity, bool stamped)
{
    struct cq *cq = calloc(1, sizeof(*cq));

    if (!cq)
        return NULL;
    pthread_mutex_init(&cq->base.mutex, NULL);
    pthread_cond_init(&cq->base.cond, NULL);
    pthread_mutex_init(&cq->turn, NULL);
    list_init(&cq->in_channel);
    cq->ring = malloc(capacity * sizeof(*cq->ring));
    cq->stamps = stamped ? malloc(capacity * sizeof(*cq->stamps)) : NULL;
    if (!cq->ring || (stamped && !cq->stamps)) {
        free_cq(cq);
        errno = ENOMEM;
        return NULL;
    }
    cq->capacity = capacity;
    cq->base.cqe = (int)capacity;
    return cq;
}

struct ibv_cq_ex *cq_create_ex(struct ibv_context *context, struct ibv_cq_init_attr_ex *attr)
{
    struct context *ctx = context_of(context);
    uint32_t flags = attr->comp_mask & IBV_CQ_INIT_ATTR_MASK_FLAGS ? attr->flags : 0;
    struct cq *cq;
    int rc = context_is_foreign(ctx) ? ENODEV : check_attr(context, attr, flags);

    if (rc) {
        errno = rc;
        return NULL;
    }
    cq = alloc_cq(round_up(attr->cqe), attr->wc_flags & STAMP_FLAGS);
    if (!cq)
        return NULL;
    cq->base.context = context;
    cq->base.channel = attr->channel;
    cq->base.cq_context = attr->cq_context;
    cq->single_threaded = flags & IBV_CREATE_CQ_ATTR_SINGLE_THREADED;
    cq->ignore_overrun = flags & IBV_CREATE_CQ_ATTR_IGNORE_OVERRUN;
    set_readers(&cq->ex);
    pthread_mutex_lock(&ctx->lock);
    ctx->num_cqs++;
    if (attr->channel)
        attr->channel->refcnt++;
    pthread_mutex_unlock(&ctx->lock);
    return &cq->ex;
}

EXPORT struct ibv_cq *ibv_create_cq(struct ibv_context *context, int cqe, void *cq_context,
                                    struct ibv_comp_channel *channel, int comp_vector)
{
    struct ibv_cq_init_attr_ex attr = {
        .cqe = cqe > 0 ? (uint32_t)cqe : 0,
        .cq_context = cq_context,
        .channel = channel,
        .comp_vector = (uint32_t)comp_vector, /* a negative one is too large */
    };
    struct ibv_cq_ex *ex = cq_create_ex(context, &attr);

    return ex ? ibv_cq_ex_to_cq(ex) : NULL;
}

/* Moves the completions into rings of another size. 0, or ENOMEM or EINVAL (they do not fit) with nothing changed.
 * */
static int move_rings(struct cq *cq, uint32_t capacity)
{
    struct ibv_wc *ring = malloc(capacity * sizeof(*ring));
    uint64_t *stamps = cq->stamps ? malloc(capacity * sizeof(*stamps)) : NULL;
    uint32_t filled = count(cq);

    if (!ring || (cq->stamps && !stamps) || filled > capacity) {
        int rc = filled > capacity ? EINVAL : ENOMEM;

        free(stamps);
        free(ring);
        return rc;
    }
    for (uint32_t i = 0; i < filled; i++) {
        ring[i] = cq->ring[at(cq, cq->tail + i)];
        if (stamps)
            stamps[i] = cq->stamps[at(cq, cq->tail + i)];
    }
    free(cq->ring);
    free(cq->stamps);
    cq->ring = ring;
    cq->stamps = stamps;
    cq->capacity = capacity;
    cq->tail = 0;
    cq->head = filled;
    return 0;
}

EXPORT int ibv_resize_cq(struct ibv_cq *base, int cqe)
{
    struct cq *cq = cq_of(base);
    struct context *ctx = context_of_cq(cq);
    int rc;

    if (context_is_foreign(ctx))
        return ENODEV;
    if (cqe < 1 || cqe > MAX_CQE)
        return EINVAL;
    pthread_mutex_lock(&ctx->lock);
    rc = move_rings(cq, round_up((uint32_t)cqe));
    if (!rc)
        base->cqe = (int)cq->capacity;
    pthread_mutex_unlock(&ctx->lock);
    return rc;
}

EXPORT int ibv_destroy_cq(struct ibv_cq *base)
{
    struct cq *cq = cq_of(base);
    struct context *ctx = context_of_cq(cq);
    bool busy;

    if (context_is_foreign(ctx))
        return ENODEV;
    pthread_mutex_lock(&ctx->lock);
    busy = cq->users > 0;
    if (!busy) {
        channel_forget(cq);
        async_forget(ctx, cq);
    }
    pthread_mutex_unlock(&ctx->lock);
    if (busy)
        return EBUSY;
    async_wait_acked_cq(cq);
    pthread_mutex_lock(&ctx->lock);
    if (base->channel)
        base->channel->refcnt--;
    ctx->num_cqs--;
    context_unlock(ctx);
    free_cq(cq);
    return 0;
}
