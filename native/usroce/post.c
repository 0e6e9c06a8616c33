/* Posting: work requests are checked and copied into the queues, and what can be sent is sent at once.
 *
 * Two forms for the send queue: ibv_post_send() with a list, and ibv_wr_start() ... ibv_wr_complete(), whose
 * requests stand beyond the queue's head, unseen by the device, until they are completed. Both hold the queue
 * pair's post_lock. */
#include "usroce.h"

#include <errno.h>
#include <string.h>

/* --- what a work request may be ----------------------------------------------------------------------------- */

enum { ON_RC = 1 << 0, ON_UC = 1 << 1, ON_UD = 1 << 2 };

static const struct {
    uint8_t services;
    bool inline_data; /* IBV_SEND_INLINE makes sense */
} rules[] = {
    [IBV_WR_RDMA_WRITE] = {ON_RC | ON_UC, true},
    [IBV_WR_RDMA_WRITE_WITH_IMM] = {ON_RC | ON_UC, true},
    [IBV_WR_SEND] = {ON_RC | ON_UC | ON_UD, true},
    [IBV_WR_SEND_WITH_IMM] = {ON_RC | ON_UC | ON_UD, true},
    [IBV_WR_SEND_WITH_INV] = {ON_RC, true},
    [IBV_WR_RDMA_READ] = {ON_RC, false},
    [IBV_WR_ATOMIC_CMP_AND_SWP] = {ON_RC, false},
    [IBV_WR_ATOMIC_FETCH_AND_ADD] = {ON_RC, false},
    [IBV_WR_LOCAL_INV] = {ON_RC | ON_UC, false},
    [IBV_WR_BIND_MW] = {ON_RC | ON_UC, false},
};

static uint8_t service_of(const struct qp *qp)
{
    return qp->base.qp_type == IBV_QPT_RC ? ON_RC : qp->base.qp_type == IBV_QPT_UC ? ON_UC : ON_UD;
}

static bool is_allowed(const struct qp *qp, enum ibv_wr_opcode opcode)
{
    return (unsigned int)opcode < sizeof(rules) / sizeof(rules[0]) && rules[opcode].services & service_of(qp);
}

static bool is_atomic(enum ibv_wr_opcode opcode)
{
    return opcode == IBV_WR_ATOMIC_CMP_AND_SWP || opcode == IBV_WR_ATOMIC_FETCH_AND_ADD;
}

static bool state_takes_sends(const struct qp *qp)
{
    enum ibv_qp_state state = qp->base.state;

    return state == IBV_QPS_RTS || state == IBV_QPS_SQD || state == IBV_QPS_SQE || state == IBV_QPS_ERR;
}

/* --- filling a slot of the send queue ------------------------------------------------------------------------- */

/* The slot at `index`, cleared but for what belongs to it. */
static struct send_wqe *clear_slot(struct qp *qp, uint32_t index)
{
    struct sq *sq = &qp->sq;
    uint32_t at = index & (sq->capacity - 1);
    struct send_wqe *wqe = &sq->wqes[at];

    memset(wqe, 0, sizeof(*wqe));
    wqe->sge = &sq->sges[(size_t)at * sq->max_sge];
    return wqe;
}

static uint8_t *inline_room(struct qp *qp, const struct send_wqe *wqe)
{
    return qp->sq.inline_data + (size_t)(wqe - qp->sq.wqes) * qp->sq.max_inline;
}

/* 0, or EINVAL: more than the queue's max_inline_data. */
static int add_inline(struct qp *qp, struct send_wqe *wqe, const void *data, size_t size)
{
    wqe->inline_data = inline_room(qp, wqe);
    if (size > qp->sq.max_inline - wqe->length)
        return EINVAL;
    if (size)
        memcpy(wqe->inline_data + wqe->length, data, size);
    wqe->length += (uint32_t)size;
    return 0;
}

/* 0, or EINVAL: too many pieces, or together more than a message may have. */
static int set_pieces(struct qp *qp, struct send_wqe *wqe, const struct ibv_sge *list, size_t count)
{
    uint64_t total = 0;

    if (count > qp->sq.max_sge)
        return EINVAL;
    for (size_t i = 0; i < count; i++) {
        wqe->sge[i] = list[i];
        total += list[i].length;
    }
    if (total > MAX_MSG)
        return EINVAL;
    wqe->num_sge = (int)count;
    wqe->length = (uint32_t)total;
    return 0;
}

/* What holds for any request, whichever way it came. 0 or EINVAL. */
static int check_wqe(const struct qp *qp, struct send_wqe *wqe)
{
    if (!is_allowed(qp, wqe->opcode))
        return EINVAL;
    if (wqe->flags & IBV_SEND_INLINE && !rules[wqe->opcode].inline_data)
        return EINVAL;
    if (is_atomic(wqe->opcode)) {
        if (wqe->length < sizeof(uint64_t) || wqe->remote_addr % sizeof(uint64_t))
            return EINVAL;
        wqe->length = sizeof(uint64_t);
    }
    if (wqe->opcode == IBV_WR_BIND_MW && !wqe->mw)
        return EINVAL;
    if (qp->base.qp_type == IBV_QPT_UD) {
        if (!wqe->slot || wqe->length > 128u << wqe->slot->mtu)
            return EINVAL;
    }
    wqe->signaled = qp->sig_all || wqe->flags & IBV_SEND_SIGNALED;
    return 0;
}

static void set_datagram(struct send_wqe *wqe, struct ibv_ah *base, uint32_t qpn, uint32_t qkey)
{
    const struct ah *ah = (const struct ah *)(const void *)base;

    if (!ah)
        return; /* check_wqe() refuses it */
    wqe->to = ah->to;
    wqe->slot = ah->slot;
    wqe->traffic_class = ah->attr.grh.traffic_class;
    wqe->remote_qpn = qpn;
    wqe->remote_qkey = qkey;
}

static void set_operation(const struct qp *qp, struct send_wqe *wqe, const struct ibv_send_wr *wr)
{
    switch (wr->opcode) {
    case IBV_WR_ATOMIC_CMP_AND_SWP:
    case IBV_WR_ATOMIC_FETCH_AND_ADD:
        wqe->remote_addr = wr->wr.atomic.remote_addr;
        wqe->rkey = wr->wr.atomic.rkey;
        wqe->compare_add = wr->wr.atomic.compare_add;
        wqe->swap = wr->wr.atomic.swap;
        break;
    case IBV_WR_BIND_MW:
        wqe->mw = wr->bind_mw.mw;
        wqe->rkey = wr->bind_mw.rkey;
        wqe->bind = wr->bind_mw.bind_info;
        break;
    case IBV_WR_LOCAL_INV:
    case IBV_WR_SEND_WITH_INV:
        wqe->imm = wr->invalidate_rkey;
        break;
    default:
        wqe->imm = wr->imm_data;
        if (qp->base.qp_type == IBV_QPT_UD) {
            set_datagram(wqe, wr->wr.ud.ah, wr->wr.ud.remote_qpn, wr->wr.ud.remote_qkey);
        } else {
            wqe->remote_addr = wr->wr.rdma.remote_addr;
            wqe->rkey = wr->wr.rdma.rkey;
        }
        break;
    }
}

static int set_payload(struct qp *qp, struct send_wqe *wqe, const struct ibv_send_wr *wr)
{
    int rc = 0;

    if (wr->opcode == IBV_WR_LOCAL_INV || wr->opcode == IBV_WR_BIND_MW)
        return 0;
    if (wr->num_sge < 0)
        return EINVAL;
    if (!(wr->send_flags & IBV_SEND_INLINE))
        return set_pieces(qp, wqe, wr->sg_list, (size_t)wr->num_sge);
    wqe->inline_data = inline_room(qp, wqe);
    for (int i = 0; i < wr->num_sge && !rc; i++)
        rc = add_inline(qp, wqe, (const void *)(uintptr_t)wr->sg_list[i].addr, wr->sg_list[i].length);
    return rc;
}

/* The request at the head is in the queue. */
static void enter(struct qp *qp, const struct send_wqe *wqe)
{
    if (wqe->opcode == IBV_WR_BIND_MW)
        mw_count_posted(wqe->mw, wqe->bind.mr, 1);
    qp->sq.head++;
}

static int post_one(struct qp *qp, const struct ibv_send_wr *wr)
{
    struct send_wqe *wqe;
    int rc;

    if (qp->sq.head - qp->sq.tail >= qp->cap.max_send_wr)
        return ENOMEM;
    wqe = clear_slot(qp, qp->sq.head);
    wqe->wr_id = wr->wr_id;
    wqe->opcode = wr->opcode;
    wqe->flags = wr->send_flags;
    set_operation(qp, wqe, wr);
    rc = set_payload(qp, wqe, wr);
    if (!rc)
        rc = check_wqe(qp, wqe);
    if (!rc)
        enter(qp, wqe);
    return rc;
}

/* What was posted goes out, or is flushed. */
static void ring(struct context *ctx, struct qp *qp)
{
    if (qp->base.state == IBV_QPS_ERR || qp->base.state == IBV_QPS_SQE)
        req_flush(ctx, qp);
    else
        progress_posted(ctx, qp);
}

static int post_list(struct context *ctx, struct qp *qp, struct ibv_send_wr *wr, struct ibv_send_wr **bad)
{
    int rc = state_takes_sends(qp) ? 0 : EINVAL;

    if (qp->sq.head == qp->sq.tail)
        qp->sq.head = qp->sq.cursor = qp->sq.tail = 0; /* slots that are in the cache, if any are */
    for (; wr && !rc; wr = wr->next) {
        rc = post_one(qp, wr);
        if (rc)
            break;
    }
    if (rc)
        *bad = wr;
    ring(ctx, qp);
    return rc;
}

int qp_post_send(struct ibv_qp *base, struct ibv_send_wr *wr, struct ibv_send_wr **bad)
{
    struct context *ctx = context_of(base->context);
    struct qp *qp = (struct qp *)(void *)base;
    int rc;

    if (context_is_foreign(ctx)) {
        *bad = wr;
        return ENODEV;
    }
    qp_prefetch(qp);
    pthread_mutex_lock(&qp->post_lock);
    pthread_mutex_lock(&ctx->lock);
    rc = post_list(ctx, qp, wr, bad);
    pthread_mutex_unlock(&ctx->lock);
    pthread_mutex_unlock(&qp->post_lock);
    return rc;
}

int qp_post_recv(struct ibv_qp *base, struct ibv_recv_wr *wr, struct ibv_recv_wr **bad)
{
    struct context *ctx = context_of(base->context);
    struct qp *qp = (struct qp *)(void *)base;
    int rc;

    if (context_is_foreign(ctx)) {
        *bad = wr;
        return ENODEV;
    }
    pthread_mutex_lock(&ctx->lock);
    if (base->srq || base->state == IBV_QPS_RESET) {
        *bad = wr;
        rc = EINVAL;
    } else {
        rc = rq_post(&qp->rq, wr, bad);
        if (base->state == IBV_QPS_ERR)
            resp_flush(ctx, qp);
    }
    pthread_mutex_unlock(&ctx->lock);
    return rc;
}

/* A type-1 window: its new key is the application's as soon as the bind is posted (ibv_bind_mw(3)). */
int qp_bind_mw(struct ibv_qp *base, struct ibv_mw *mw, struct ibv_mw_bind *bind)
{
    struct ibv_send_wr *bad, wr = {
                                 .wr_id = bind->wr_id,
                                 .opcode = IBV_WR_BIND_MW,
                                 .send_flags = bind->send_flags,
                             };
    int rc;

    if (mw->type != IBV_MW_TYPE_1)
        return EINVAL;
    wr.bind_mw.mw = mw;
    wr.bind_mw.rkey = ibv_inc_rkey(mw->rkey);
    wr.bind_mw.bind_info = bind->bind_info;
    rc = qp_post_send(base, &wr, &bad);
    if (!rc)
        mw->rkey = wr.bind_mw.rkey;
    return rc;
}

/* --- ibv_wr_* ------------------------------------------------------------------------------------------------- */

static struct qp *qp_of(struct ibv_qp_ex *ex)
{
    return (struct qp *)(void *)ex;
}

static void wr_start(struct ibv_qp_ex *ex)
{
    struct qp *qp = qp_of(ex);
    struct context *ctx = context_of(ex->qp_base.context);

    pthread_mutex_lock(&qp->post_lock);
    qp->wr_current = NULL;
    qp->wr_error = context_is_foreign(ctx) ? ENODEV : 0;
    if (qp->wr_error)
        return;
    pthread_mutex_lock(&ctx->lock);
    qp->wr_head = qp->sq.head;
    qp->wr_tail = qp->sq.tail;
    if (!state_takes_sends(qp))
        qp->wr_error = EINVAL;
    pthread_mutex_unlock(&ctx->lock);
}

static void fail_batch(struct qp *qp, int error)
{
    if (!qp->wr_error)
        qp->wr_error = error;
}

/* Everything about the request before is known now. */
static void finish_current(struct qp *qp)
{
    if (qp->wr_current && !qp->wr_error)
        fail_batch(qp, check_wqe(qp, qp->wr_current));
    qp->wr_current = NULL;
}

/* The next request of the batch, or NULL once the batch has failed. */
static struct send_wqe *next_wqe(struct ibv_qp_ex *ex, enum ibv_wr_opcode opcode)
{
    struct qp *qp = qp_of(ex);
    struct send_wqe *wqe;

    finish_current(qp);
    if (!qp->wr_error && qp->wr_head - qp->wr_tail >= qp->cap.max_send_wr)
        qp->wr_error = ENOMEM;
    if (qp->wr_error)
        return NULL;
    wqe = clear_slot(qp, qp->wr_head++);
    wqe->wr_id = ex->wr_id;
    wqe->flags = ex->wr_flags & ~(unsigned int)IBV_SEND_INLINE;
    wqe->opcode = opcode;
    qp->wr_current = wqe;
    return wqe;
}

static int wr_complete(struct ibv_qp_ex *ex)
{
    struct qp *qp = qp_of(ex);
    struct context *ctx = context_of(ex->qp_base.context);
    int rc;

    finish_current(qp);
    rc = qp->wr_error;
    if (!rc) {
        pthread_mutex_lock(&ctx->lock);
        if (state_takes_sends(qp)) {
            while (qp->sq.head != qp->wr_head)
                enter(qp, &qp->sq.wqes[qp->sq.head & (qp->sq.capacity - 1)]);
            ring(ctx, qp);
        } else {
            rc = EINVAL;
        }
        pthread_mutex_unlock(&ctx->lock);
    }
    pthread_mutex_unlock(&qp->post_lock);
    return rc;
}

static void wr_abort(struct ibv_qp_ex *ex)
{
    qp_of(ex)->wr_current = NULL;
    pthread_mutex_unlock(&qp_of(ex)->post_lock);
}

static void wr_remote(struct ibv_qp_ex *ex, enum ibv_wr_opcode opcode, uint32_t rkey, uint64_t addr, uint32_t imm)
{
    struct send_wqe *wqe = next_wqe(ex, opcode);

    if (!wqe)
        return;
    wqe->rkey = rkey;
    wqe->remote_addr = addr;
    wqe->imm = imm;
}

static void wr_atomic(struct ibv_qp_ex *ex, enum ibv_wr_opcode opcode, uint32_t rkey, uint64_t addr,
                      uint64_t compare_add, uint64_t swap)
{
    struct send_wqe *wqe = next_wqe(ex, opcode);

    if (!wqe)
        return;
    wqe->rkey = rkey;
    wqe->remote_addr = addr;
    wqe->compare_add = compare_add;
    wqe->swap = swap;
}

static void wr_atomic_cmp_swp(struct ibv_qp_ex *ex, uint32_t rkey, uint64_t addr, uint64_t compare, uint64_t swap)
{
    wr_atomic(ex, IBV_WR_ATOMIC_CMP_AND_SWP, rkey, addr, compare, swap);
}

static void wr_atomic_fetch_add(struct ibv_qp_ex *ex, uint32_t rkey, uint64_t addr, uint64_t add)
{
    wr_atomic(ex, IBV_WR_ATOMIC_FETCH_AND_ADD, rkey, addr, add, 0);
}

static void wr_bind_mw(struct ibv_qp_ex *ex, struct ibv_mw *mw, uint32_t rkey, const struct ibv_mw_bind_info *info)
{
    struct send_wqe *wqe = next_wqe(ex, IBV_WR_BIND_MW);

    if (!wqe)
        return;
    wqe->mw = mw;
    wqe->rkey = rkey;
    wqe->bind = *info;
}

static void wr_with_imm(struct ibv_qp_ex *ex, enum ibv_wr_opcode opcode, uint32_t imm)
{
    struct send_wqe *wqe = next_wqe(ex, opcode);

    if (wqe)
        wqe->imm = imm;
}

static void wr_local_inv(struct ibv_qp_ex *ex, uint32_t rkey)
{
    wr_with_imm(ex, IBV_WR_LOCAL_INV, rkey);
}

static void wr_rdma_read(struct ibv_qp_ex *ex, uint32_t rkey, uint64_t addr)
{
    wr_remote(ex, IBV_WR_RDMA_READ, rkey, addr, 0);
}

static void wr_rdma_write(struct ibv_qp_ex *ex, uint32_t rkey, uint64_t addr)
{
    wr_remote(ex, IBV_WR_RDMA_WRITE, rkey, addr, 0);
}

static void wr_rdma_write_imm(struct ibv_qp_ex *ex, uint32_t rkey, uint64_t addr, __be32 imm)
{
    wr_remote(ex, IBV_WR_RDMA_WRITE_WITH_IMM, rkey, addr, imm);
}

static void wr_send(struct ibv_qp_ex *ex)
{
    wr_with_imm(ex, IBV_WR_SEND, 0);
}

static void wr_send_imm(struct ibv_qp_ex *ex, __be32 imm)
{
    wr_with_imm(ex, IBV_WR_SEND_WITH_IMM, imm);
}

static void wr_send_inv(struct ibv_qp_ex *ex, uint32_t rkey)
{
    wr_with_imm(ex, IBV_WR_SEND_WITH_INV, rkey);
}

static void wr_set_ud_addr(struct ibv_qp_ex *ex, struct ibv_ah *ah, uint32_t qpn, uint32_t qkey)
{
    struct qp *qp = qp_of(ex);

    if (qp->wr_current)
        set_datagram(qp->wr_current, ah, qpn, qkey);
}

static void wr_set_inline_data_list(struct ibv_qp_ex *ex, size_t count, const struct ibv_data_buf *list)
{
    struct qp *qp = qp_of(ex);
    struct send_wqe *wqe = qp->wr_current;

    if (!wqe)
        return;
    wqe->flags |= IBV_SEND_INLINE;
    wqe->length = 0; /* whatever was set before */
    wqe->inline_data = inline_room(qp, wqe);
    for (size_t i = 0; i < count; i++)
        fail_batch(qp, add_inline(qp, wqe, list[i].addr, list[i].length));
}

static void wr_set_inline_data(struct ibv_qp_ex *ex, void *addr, size_t length)
{
    struct ibv_data_buf buffer = {.addr = addr, .length = length};

    wr_set_inline_data_list(ex, 1, &buffer);
}

static void wr_set_sge_list(struct ibv_qp_ex *ex, size_t count, const struct ibv_sge *list)
{
    struct qp *qp = qp_of(ex);
    struct send_wqe *wqe = qp->wr_current;

    if (!wqe)
        return;
    wqe->flags &= ~(unsigned int)IBV_SEND_INLINE;
    wqe->inline_data = NULL;
    fail_batch(qp, set_pieces(qp, wqe, list, count));
}

static void wr_set_sge(struct ibv_qp_ex *ex, uint32_t lkey, uint64_t addr, uint32_t length)
{
    struct ibv_sge sge = {.addr = addr, .length = length, .lkey = lkey};

    wr_set_sge_list(ex, 1, &sge);
}

void wr_interface_init(struct qp *qp)
{
    struct ibv_qp_ex *ex = &qp->ex;

    ex->wr_start = wr_start;
    ex->wr_complete = wr_complete;
    ex->wr_abort = wr_abort;
    ex->wr_atomic_cmp_swp = wr_atomic_cmp_swp;
    ex->wr_atomic_fetch_add = wr_atomic_fetch_add;
    ex->wr_bind_mw = wr_bind_mw;
    ex->wr_local_inv = wr_local_inv;
    ex->wr_rdma_read = wr_rdma_read;
    ex->wr_rdma_write = wr_rdma_write;
    ex->wr_rdma_write_imm = wr_rdma_write_imm;
    ex->wr_send = wr_send;
    ex->wr_send_imm = wr_send_imm;
    ex->wr_send_inv = wr_send_inv;
    ex->wr_set_ud_addr = wr_set_ud_addr;
    ex->wr_set_inline_data = wr_set_inline_data;
    ex->wr_set_inline_data_list = wr_set_inline_data_list;
    ex->wr_set_sge = wr_set_sge;
    ex->wr_set_sge_list = wr_set_sge_list;
}
