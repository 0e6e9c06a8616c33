/* Receive queues: the ring that a queue pair has for itself, and the same ring shared as an SRQ.
 *
 * A receive is one slot of the ring: its header and its pieces, so that taking one touches one place in memory. */
#include "usroce.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_SRQ_WR = MAX_QP_WR };

/* --- the ring ------------------------------------------------------------------------------------------------ */

static struct recv_wqe *slot(const struct rq *rq, uint32_t index)
{
    return (struct recv_wqe *)(void *)(rq->slots + (index & (rq->capacity - 1)) * rq->stride);
}

int rq_init(struct rq *rq, uint32_t max_wr, uint32_t max_sge)
{
    memset(rq, 0, sizeof(*rq));
    if (!max_wr)
        return 0; /* nothing can be posted */
    rq->max_sge = max_sge;
    rq->stride = sizeof(struct recv_wqe) + max_sge * sizeof(struct ibv_sge);
    for (rq->capacity = 1; rq->capacity < max_wr; rq->capacity *= 2)
        ;
    rq->slots = calloc(rq->capacity, rq->stride);
    return rq->slots ? 0 : ENOMEM;
}

void rq_free(struct rq *rq)
{
    free(rq->slots);
    memset(rq, 0, sizeof(*rq));
}

/* A list longer than 4 GiB counts as 4 GiB - 1: no message is. */
static void fill_slot(struct recv_wqe *wqe, const struct ibv_recv_wr *wr)
{
    uint64_t length = 0;

    wqe->wr_id = wr->wr_id;
    wqe->num_sge = wr->num_sge;
    for (int i = 0; i < wr->num_sge; i++) {
        wqe->sge[i] = wr->sg_list[i];
        length += wr->sg_list[i].length;
    }
    wqe->length = length < UINT32_MAX ? (uint32_t)length : UINT32_MAX;
}

int rq_post(struct rq *rq, struct ibv_recv_wr *wr, struct ibv_recv_wr **bad)
{
    int rc = 0;

    for (; wr; wr = wr->next) {
        if (rq_count(rq) == rq->capacity)
            rc = ENOMEM;
        else if (wr->num_sge < 0 || (uint32_t)wr->num_sge > rq->max_sge)
            rc = EINVAL;
        if (rc) {
            *bad = wr;
            break;
        }
        fill_slot(slot(rq, rq->head), wr);
        rq->head++;
    }
    return rc;
}

struct recv_wqe *rq_pop(struct rq *rq)
{
    if (!rq_count(rq))
        return NULL;
    return slot(rq, rq->newest_first ? --rq->head : rq->tail++);
}

void rq_prefetch(const struct rq *rq)
{
    if (rq_count(rq))
        __builtin_prefetch(slot(rq, rq->newest_first ? rq->head - 1 : rq->tail));
}

/* Moves the receives into a ring of another size. 0, or ENOMEM or EINVAL (they do not fit) with nothing changed.
 * */
static int rq_resize(struct rq *rq, uint32_t max_wr)
{
    struct rq to;
    int rc = rq_init(&to, max_wr, rq->max_sge);

    if (!rc && rq_count(rq) > to.capacity)
        rc = EINVAL;
    if (rc) {
        rq_free(&to);
        return rc;
    }
    for (; rq->tail != rq->head; rq->tail++)
        memcpy(slot(&to, to.head++), slot(rq, rq->tail), rq->stride);
    to.newest_first = rq->newest_first;
    rq_free(rq);
    *rq = to;
    return 0;
}

/* --- shared -------------------------------------------------------------------------------------------------- */

static struct srq *srq_of(struct ibv_srq *base)
{
    return (struct srq *)(void *)base;
}

/* Told once, then the limit is to be set anew (IBA 10.2.9.3). One that is set above what is there tells at once:
 * nothing would be taken from an empty queue, and so nobody told. */
static void check_limit(struct srq *srq)
{
    if (rq_count(&srq->rq) >= srq->limit)
        return;
    srq->limit = 0;
    async_post(context_of(srq->base.context), IBV_EVENT_SRQ_LIMIT_REACHED, EVENT_SRQ, srq);
}

struct recv_wqe *srq_pop(struct srq *srq)
{
    struct recv_wqe *wqe = rq_pop(&srq->rq);

    if (wqe)
        check_limit(srq);
    return wqe;
}

int srq_post(struct ibv_srq *base, struct ibv_recv_wr *wr, struct ibv_recv_wr **bad)
{
    struct context *ctx = context_of(base->context);
    int rc;

    if (context_is_foreign(ctx)) {
        *bad = wr;
        return ENODEV;
    }
    pthread_mutex_lock(&ctx->lock);
    rc = rq_post(&srq_of(base)->rq, wr, bad);
    pthread_mutex_unlock(&ctx->lock);
    return rc;
}

EXPORT int usroce_newest_first(struct ibv_qp *qp, struct ibv_srq *srq)
{
    struct context *ctx = context_of(qp ? qp->context : srq->context);
    struct rq *rq = qp ? &((struct qp *)(void *)qp)->rq : &srq_of(srq)->rq;

    if (context_is_foreign(ctx))
        return ENODEV;
    pthread_mutex_lock(&ctx->lock);
    rq->newest_first = true;
    pthread_mutex_unlock(&ctx->lock);
    return 0;
}

static void free_srq(struct srq *srq)
{
    pthread_cond_destroy(&srq->base.cond);
    pthread_mutex_destroy(&srq->base.mutex);
    rq_free(&srq->rq);
    free(srq);
}

static struct srq *alloc_srq(struct ibv_pd *pd, void *srq_context, const struct ibv_srq_attr *attr)
{
    struct srq *srq = calloc(1, sizeof(*srq));

    if (!srq)
        return NULL;
    pthread_mutex_init(&srq->base.mutex, NULL);
    pthread_cond_init(&srq->base.cond, NULL);
    if (rq_init(&srq->rq, attr->max_wr, attr->max_sge)) {
        free_srq(srq);
        errno = ENOMEM;
        return NULL;
    }
    srq->base.context = pd->context;
    srq->base.srq_context = srq_context;
    srq->base.pd = pd;
    srq->number = random_u32() & 0xffffff;
    return srq;
}

static struct ibv_srq *create(struct ibv_pd *pd, void *srq_context, struct ibv_srq_attr *attr)
{
    struct context *ctx = context_of(pd->context);
    struct srq *srq;
    int rc = context_is_foreign(ctx) ? ENODEV : 0;

    if (!rc && (!attr->max_wr || attr->max_wr > MAX_SRQ_WR || attr->max_sge > MAX_SGE))
        rc = EINVAL;
    if (rc) {
        errno = rc;
        return NULL;
    }
    srq = alloc_srq(pd, srq_context, attr);
    if (!srq)
        return NULL;
    attr->max_wr = srq->rq.capacity;
    pthread_mutex_lock(&ctx->lock);
    ((struct pd *)(void *)pd)->children++;
    pthread_mutex_unlock(&ctx->lock);
    return &srq->base;
}

EXPORT struct ibv_srq *ibv_create_srq(struct ibv_pd *pd, struct ibv_srq_init_attr *attr)
{
    return create(pd, attr->srq_context, &attr->attr);
}

struct ibv_srq *srq_create_ex(struct ibv_context *context, struct ibv_srq_init_attr_ex *attr)
{
    uint32_t known = IBV_SRQ_INIT_ATTR_TYPE | IBV_SRQ_INIT_ATTR_PD;

    if (attr->comp_mask & IBV_SRQ_INIT_ATTR_TYPE && attr->srq_type != IBV_SRQT_BASIC) {
        errno = EOPNOTSUPP;
        return NULL;
    }
    if (attr->comp_mask & ~known || !(attr->comp_mask & IBV_SRQ_INIT_ATTR_PD) || attr->pd->context != context) {
        errno = EINVAL;
        return NULL;
    }
    return create(attr->pd, attr->srq_context, &attr->attr);
}

int srq_get_num(struct ibv_srq *base, uint32_t *number)
{
    if (context_is_foreign(context_of(base->context)))
        return ENODEV;
    *number = srq_of(base)->number;
    return 0;
}

static int modify(struct srq *srq, const struct ibv_srq_attr *attr, int mask)
{
    uint32_t capacity = mask & IBV_SRQ_MAX_WR ? attr->max_wr : srq->rq.capacity;
    int rc;

    if (!capacity || capacity > MAX_SRQ_WR)
        return EINVAL;
    if (mask & IBV_SRQ_LIMIT && attr->srq_limit > capacity)
        return EINVAL;
    if (mask & IBV_SRQ_MAX_WR) {
        rc = rq_resize(&srq->rq, capacity);
        if (rc)
            return rc;
    }
    if (mask & IBV_SRQ_LIMIT) {
        srq->limit = attr->srq_limit;
        check_limit(srq);
    }
    return 0;
}

EXPORT int ibv_modify_srq(struct ibv_srq *base, struct ibv_srq_attr *attr, int mask)
{
    struct context *ctx = context_of(base->context);
    int rc;

    if (context_is_foreign(ctx))
        return ENODEV;
    if (mask & ~(IBV_SRQ_MAX_WR | IBV_SRQ_LIMIT))
        return EINVAL;
    pthread_mutex_lock(&ctx->lock);
    rc = modify(srq_of(base), attr, mask);
    pthread_mutex_unlock(&ctx->lock);
    return rc;
}

EXPORT int ibv_query_srq(struct ibv_srq *base, struct ibv_srq_attr *attr)
{
    struct context *ctx = context_of(base->context);
    const struct srq *srq = srq_of(base);

    if (context_is_foreign(ctx))
        return ENODEV;
    pthread_mutex_lock(&ctx->lock);
    attr->max_wr = srq->rq.capacity;
    attr->max_sge = srq->rq.max_sge;
    attr->srq_limit = srq->limit;
    pthread_mutex_unlock(&ctx->lock);
    return 0;
}

EXPORT int ibv_destroy_srq(struct ibv_srq *base)
{
    struct context *ctx = context_of(base->context);
    struct srq *srq = srq_of(base);
    bool busy;

    if (context_is_foreign(ctx))
        return ENODEV;
    pthread_mutex_lock(&ctx->lock);
    busy = srq->users > 0;
    if (!busy)
        async_forget(ctx, srq);
    pthread_mutex_unlock(&ctx->lock);
    if (busy)
        return EBUSY;
    async_wait_acked_srq(srq);
    pthread_mutex_lock(&ctx->lock);
    ((struct pd *)(void *)base->pd)->children--;
    pthread_mutex_unlock(&ctx->lock);
    free_srq(srq);
    return 0;
}
