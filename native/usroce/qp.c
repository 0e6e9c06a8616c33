/* Queue pairs: making and destroying, the state machine and what may change in each state, error and flush. */
#include "usroce.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

/* --- the state machine --------------------------------------------------------------------------------------- */

/* What a transition needs and what it may have besides IBV_QP_STATE (IBA 11.2.5.2, table 97; ibv_modify_qp(3)). */
struct transition {
    enum ibv_qp_state from, to;
    int required[3]; /* RC, UC, UD */
    int optional[3];
};

enum {
    PLACE = IBV_QP_PKEY_INDEX | IBV_QP_PORT,
    ADDRESS = IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN,
    RC_RESPONDER = IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER,
    RC_REQUESTER = IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY | IBV_QP_MAX_QP_RD_ATOMIC,
    ALTERNATE = IBV_QP_ALT_PATH | IBV_QP_PATH_MIG_STATE,
    RUNNING_RC = IBV_QP_CUR_STATE | IBV_QP_ACCESS_FLAGS | IBV_QP_MIN_RNR_TIMER | ALTERNATE,
    RUNNING_UC = IBV_QP_CUR_STATE | IBV_QP_ACCESS_FLAGS | ALTERNATE,
    RUNNING_UD = IBV_QP_CUR_STATE | IBV_QP_QKEY,
};

static const struct transition transitions[] = {
    {IBV_QPS_RESET,
     IBV_QPS_INIT,
     {PLACE | IBV_QP_ACCESS_FLAGS, PLACE | IBV_QP_ACCESS_FLAGS, PLACE | IBV_QP_QKEY},
     {0, 0, 0}},
    {IBV_QPS_INIT,
     IBV_QPS_INIT,
     {0, 0, 0},
     {PLACE | IBV_QP_ACCESS_FLAGS, PLACE | IBV_QP_ACCESS_FLAGS, PLACE | IBV_QP_QKEY}},
    {IBV_QPS_INIT,
     IBV_QPS_RTR,
     {ADDRESS | RC_RESPONDER, ADDRESS, 0},
     {IBV_QP_PKEY_INDEX | IBV_QP_ACCESS_FLAGS | IBV_QP_ALT_PATH,
      IBV_QP_PKEY_INDEX | IBV_QP_ACCESS_FLAGS | IBV_QP_ALT_PATH, IBV_QP_PKEY_INDEX | IBV_QP_QKEY}},
    {IBV_QPS_RTR,
     IBV_QPS_RTS,
     {IBV_QP_SQ_PSN | RC_REQUESTER, IBV_QP_SQ_PSN, IBV_QP_SQ_PSN},
     {RUNNING_RC, RUNNING_UC, RUNNING_UD}},
    {IBV_QPS_RTS, IBV_QPS_RTS, {0, 0, 0}, {RUNNING_RC, RUNNING_UC, RUNNING_UD}},
    {IBV_QPS_RTS,
     IBV_QPS_SQD,
     {0, 0, 0},
     {IBV_QP_EN_SQD_ASYNC_NOTIFY, IBV_QP_EN_SQD_ASYNC_NOTIFY, IBV_QP_EN_SQD_ASYNC_NOTIFY}},
    {IBV_QPS_SQD, IBV_QPS_RTS, {0, 0, 0}, {RUNNING_RC, RUNNING_UC, RUNNING_UD}},
    {IBV_QPS_SQD,
     IBV_QPS_SQD,
     {0, 0, 0},
     {PLACE | IBV_QP_AV | RC_REQUESTER | RUNNING_RC, PLACE | IBV_QP_AV | RUNNING_UC,
      IBV_QP_PKEY_INDEX | RUNNING_UD}},
    {IBV_QPS_SQE, IBV_QPS_RTS, {-1, 0, 0}, {0, IBV_QP_CUR_STATE | IBV_QP_ACCESS_FLAGS, RUNNING_UD}},
};

static int type_index(const struct qp *qp)
{
    return qp->base.qp_type == IBV_QPT_RC ? 0 : qp->base.qp_type == IBV_QPT_UC ? 1 : 2;
}

/* Whether the state machine has this transition, with these attributes. */
static bool may_modify(const struct qp *qp, enum ibv_qp_state to, int mask)
{
    enum ibv_qp_state from = qp->base.state;
    int type = type_index(qp);

    mask &= ~IBV_QP_STATE;
    if (to == IBV_QPS_RESET || to == IBV_QPS_ERR)
        return mask == 0;
    for (size_t i = 0; i < sizeof(transitions) / sizeof(transitions[0]); i++) {
        const struct transition *t = &transitions[i];

        if (t->from != from || t->to != to || t->required[type] < 0)
            continue;
        return (mask & t->required[type]) == t->required[type] &&
               (mask & ~(t->required[type] | t->optional[type])) == 0;
    }
    return false;
}

static bool values_in_range(const struct ibv_qp_attr *attr, int mask)
{
    if (mask & IBV_QP_PORT && attr->port_num != 1)
        return false;
    if (mask & IBV_QP_PKEY_INDEX && attr->pkey_index != 0)
        return false;
    if (mask & IBV_QP_PATH_MTU && (attr->path_mtu < IBV_MTU_256 || attr->path_mtu > IBV_MTU_4096))
        return false;
    if (mask & IBV_QP_DEST_QPN && attr->dest_qp_num > WIRE_PSN_MASK)
        return false;
    if (mask & IBV_QP_MAX_QP_RD_ATOMIC && attr->max_rd_atomic > MAX_RD_ATOMIC)
        return false;
    if (mask & IBV_QP_MAX_DEST_RD_ATOMIC && attr->max_dest_rd_atomic > MAX_RD_ATOMIC)
        return false;
    if (mask & IBV_QP_MIN_RNR_TIMER && attr->min_rnr_timer > 31)
        return false;
    if (mask & IBV_QP_TIMEOUT && attr->timeout > 31)
        return false;
    if (mask & IBV_QP_RETRY_CNT && attr->retry_cnt > 7)
        return false;
    return !(mask & IBV_QP_RNR_RETRY && attr->rnr_retry > 7);
}

/* --- addresses ------------------------------------------------------------------------------------------------- */

static void use_slot(struct context *ctx, struct gid_slot *slot)
{
    if (slot->users++ == 0)
        sleep_links_changed(ctx);
}

static void leave_slot(struct context *ctx, struct gid_slot *slot)
{
    if (--slot->users == 0)
        sleep_links_changed(ctx);
}

static void leave_slots(struct context *ctx, struct qp *qp)
{
    if (qp->slot)
        leave_slot(ctx, qp->slot);
    qp->slot = NULL;
    if (qp->on_all_slots)
        for (int i = 0; i < ctx->num_gids; i++)
            leave_slot(ctx, &ctx->gids[i]);
    qp->on_all_slots = false;
}

/* A datagram queue pair is reached at every address. */
static void use_all_slots(struct context *ctx, struct qp *qp)
{
    if (qp->on_all_slots)
        return;
    qp->on_all_slots = true;
    for (int i = 0; i < ctx->num_gids; i++)
        use_slot(ctx, &ctx->gids[i]);
}

static int set_address(struct context *ctx, struct qp *qp, const struct ibv_ah_attr *attr, enum ibv_mtu mtu)
{
    struct endpoint to;
    struct gid_slot *slot;
    int rc = address_resolve(ctx, attr, &to, &slot);

    if (rc)
        return rc;
    if (mtu > slot->mtu)
        return EINVAL; /* packets would not pass the interface: they forbid fragmentation */
    leave_slots(ctx, qp);
    use_slot(ctx, slot);
    qp->slot = slot;
    qp->remote = to;
    /* A peer that publishes its UDP port is one of us, whose IP identifications are known (icrc.h). */
    qp->any_ip_id = attr->dlid == 0;
    link_prepare(slot->link, &to);
    return 0;
}

/* --- error, flush, reset ------------------------------------------------------------------------------------------ */

/* What was received is acknowledged, even if nothing else is sent any more. */
static void acknowledge_last(struct context *ctx, struct qp *qp)
{
    if (qp->resp.ack_pending) {
        resp_send_ack(ctx, qp);
        tx_flush(ctx);
    }
}

static void quiesce(struct context *ctx, struct qp *qp)
{
    acknowledge_last(ctx, qp);
    timer_forget(ctx, qp);
    list_del(&qp->in_tx);
    list_del(&qp->in_acks);
}

static void set_state(struct qp *qp, enum ibv_qp_state state)
{
    qp->base.state = qp->attr.qp_state = qp->attr.cur_qp_state = state;
}

void qp_to_error(struct context *ctx, struct qp *qp, enum ibv_event_type event)
{
    if (qp->base.state == IBV_QPS_RESET || qp->base.state == IBV_QPS_ERR)
        return;
    set_state(qp, IBV_QPS_ERR);
    table_hide_qp(ctx, qp);
    quiesce(ctx, qp);
    req_flush(ctx, qp);
    resp_flush(ctx, qp);
    if (qp_has_event(event))
        async_post(ctx, event, EVENT_QP, qp);
    if (qp->base.srq)
        async_post(ctx, IBV_EVENT_QP_LAST_WQE_REACHED, EVENT_QP, qp);
}

/* Everything posted is forgotten, without completions. 0, or EBUSY: a peer on this host is stopped in the middle of
 * an access. */
static int to_reset(struct context *ctx, struct qp *qp)
{
    if (!table_revoke_qp(ctx, qp))
        return EBUSY;
    set_state(qp, IBV_QPS_RESET);
    quiesce(ctx, qp);
    cq_forget((struct cq *)(void *)qp->base.send_cq, qp->base.qp_num);
    cq_forget((struct cq *)(void *)qp->base.recv_cq, qp->base.qp_num);
    mw_unbind_all(ctx, qp->base.qp_num);
    leave_slots(ctx, qp);
    req_reset(ctx, qp);
    resp_free(qp);
    memset(&qp->resp, 0, sizeof(qp->resp));
    qp->rq.tail = qp->rq.head;
    qp->comm_established = qp->sqd_notify = false;
    return 0;
}

bool sge_scatter(struct context *ctx, struct ibv_pd *pd, const struct ibv_sge *sge, uint32_t offset,
                 const void *data, uint32_t size)
{
    const uint8_t *from = data;

    for (; size; sge++) {
        uint32_t part;
        uint8_t *host;

        if (offset >= sge->length) {
            offset -= sge->length;
            continue;
        }
        part = size < sge->length - offset ? size : sge->length - offset;
        host = key_local(ctx, pd, sge->lkey, sge->addr + offset, part, IBV_ACCESS_LOCAL_WRITE);
        if (!host)
            return false;
        memcpy(host, from, part);
        from += part;
        size -= part;
        offset = 0;
    }
    return true;
}

/* --- modify and query -------------------------------------------------------------------------------------------- */

static void copy_attributes(struct qp *qp, const struct ibv_qp_attr *from, int mask)
{
    struct ibv_qp_attr *to = &qp->attr;

    if (mask & IBV_QP_PKEY_INDEX)
        to->pkey_index = from->pkey_index;
    if (mask & IBV_QP_PORT)
        to->port_num = from->port_num;
    if (mask & IBV_QP_ACCESS_FLAGS)
        to->qp_access_flags = from->qp_access_flags;
    if (mask & IBV_QP_QKEY)
        to->qkey = from->qkey;
    if (mask & IBV_QP_AV)
        to->ah_attr = from->ah_attr;
    if (mask & IBV_QP_ALT_PATH) {
        to->alt_ah_attr = from->alt_ah_attr;
        to->alt_pkey_index = from->alt_pkey_index;
        to->alt_port_num = from->alt_port_num;
        to->alt_timeout = from->alt_timeout;
    }
    if (mask & IBV_QP_PATH_MIG_STATE)
        to->path_mig_state = from->path_mig_state;
    if (mask & IBV_QP_PATH_MTU)
        to->path_mtu = from->path_mtu;
    if (mask & IBV_QP_DEST_QPN)
        to->dest_qp_num = from->dest_qp_num;
    if (mask & IBV_QP_RQ_PSN)
        to->rq_psn = from->rq_psn & WIRE_PSN_MASK;
    if (mask & IBV_QP_SQ_PSN)
        to->sq_psn = from->sq_psn & WIRE_PSN_MASK;
    if (mask & IBV_QP_MAX_QP_RD_ATOMIC)
        to->max_rd_atomic = from->max_rd_atomic;
    if (mask & IBV_QP_MAX_DEST_RD_ATOMIC)
        to->max_dest_rd_atomic = from->max_dest_rd_atomic;
    if (mask & IBV_QP_MIN_RNR_TIMER)
        to->min_rnr_timer = from->min_rnr_timer;
    if (mask & IBV_QP_TIMEOUT)
        to->timeout = from->timeout;
    if (mask & IBV_QP_RETRY_CNT)
        to->retry_cnt = from->retry_cnt;
    if (mask & IBV_QP_RNR_RETRY)
        to->rnr_retry = from->rnr_retry;
    qp->mtu = 128u << to->path_mtu;
    qp->ack_timeout = to->timeout ? (uint64_t)4096 << to->timeout : 0;
}

/* The checked transition. Whatever can fail comes first. */
static int change_state(struct context *ctx, struct qp *qp, const struct ibv_qp_attr *attr, int mask,
                        enum ibv_qp_state to)
{
    enum ibv_qp_state from = qp->base.state;
    struct ibv_qp_attr before = qp->attr;
    int rc;

    if (!table_revoke_qp(ctx, qp)) /* what peers know of it changes */
        return EBUSY;
    if (mask & IBV_QP_AV) {
        rc = set_address(ctx, qp, &attr->ah_attr, mask & IBV_QP_PATH_MTU ? attr->path_mtu : qp->attr.path_mtu);
        if (rc)
            return rc;
    }
    copy_attributes(qp, attr, mask);
    if (to == IBV_QPS_RTR && from == IBV_QPS_INIT) {
        rc = resp_reset(qp);
        if (rc) {
            qp->attr = before;
            return rc;
        }
        if (qp->base.qp_type == IBV_QPT_UD)
            use_all_slots(ctx, qp);
    }
    if (to == IBV_QPS_RTS && from == IBV_QPS_RTR)
        req_reset(ctx, qp);
    set_state(qp, to);
    table_publish_qp(ctx, qp);
    if (to == IBV_QPS_SQD && from == IBV_QPS_RTS) {
        qp->sqd_notify = mask & IBV_QP_EN_SQD_ASYNC_NOTIFY && attr->en_sqd_async_notify;
        req_check_drained(ctx, qp);
    }
    if (to == IBV_QPS_RTS && from != IBV_QPS_RTS)
        progress_posted(ctx, qp);
    return 0;
}

static int modify(struct context *ctx, struct qp *qp, const struct ibv_qp_attr *attr, int mask)
{
    enum ibv_qp_state to = mask & IBV_QP_STATE ? attr->qp_state : qp->base.state;

    if (mask & IBV_QP_CUR_STATE && attr->cur_qp_state != qp->base.state)
        return EINVAL;
    if (!may_modify(qp, to, mask) || !values_in_range(attr, mask))
        return EINVAL;
    if (to == IBV_QPS_ERR) {
        qp_to_error(ctx, qp, NO_EVENT);
        if (qp->base.state == IBV_QPS_RESET)
            set_state(qp, IBV_QPS_ERR);
        return 0;
    }
    if (to == IBV_QPS_RESET)
        return to_reset(ctx, qp);
    return change_state(ctx, qp, attr, mask, to);
}

EXPORT int ibv_modify_qp(struct ibv_qp *base, struct ibv_qp_attr *attr, int mask)
{
    struct context *ctx = context_of(base->context);
    struct qp *qp = (struct qp *)(void *)base;
    int rc;

    if (context_is_foreign(ctx))
        return ENODEV;
    pthread_mutex_lock(&qp->post_lock);
    pthread_mutex_lock(&ctx->lock);
    rc = modify(ctx, qp, attr, mask);
    pthread_mutex_unlock(&ctx->lock);
    pthread_mutex_unlock(&qp->post_lock);
    return rc;
}

EXPORT int ibv_query_qp(struct ibv_qp *base, struct ibv_qp_attr *attr, int mask, struct ibv_qp_init_attr *init)
{
    struct context *ctx = context_of(base->context);
    struct qp *qp = (struct qp *)(void *)base;

    (void)mask; /* a hint: what costs nothing is returned as well */
    if (context_is_foreign(ctx))
        return ENODEV;
    pthread_mutex_lock(&ctx->lock);
    *attr = qp->attr;
    attr->cap = qp->cap;
    attr->sq_draining = qp->base.state == IBV_QPS_SQD && qp->req.una != qp->req.sent_psn;
    memset(init, 0, sizeof(*init));
    init->qp_context = base->qp_context;
    init->send_cq = base->send_cq;
    init->recv_cq = base->recv_cq;
    init->srq = base->srq;
    init->cap = qp->cap;
    init->qp_type = base->qp_type;
    init->sq_sig_all = qp->sig_all;
    pthread_mutex_unlock(&ctx->lock);
    return 0;
}

/* --- life ------------------------------------------------------------------------------------------------------- */

/* Of enum ibv_qp_create_send_ops_flags: what wr_interface_init() fills in. */
static bool can_send_ops(uint64_t flags)
{
    const uint64_t known = IBV_QP_EX_WITH_RDMA_WRITE | IBV_QP_EX_WITH_RDMA_WRITE_WITH_IMM | IBV_QP_EX_WITH_SEND |
                           IBV_QP_EX_WITH_SEND_WITH_IMM | IBV_QP_EX_WITH_RDMA_READ |
                           IBV_QP_EX_WITH_ATOMIC_CMP_AND_SWP | IBV_QP_EX_WITH_ATOMIC_FETCH_AND_ADD |
                           IBV_QP_EX_WITH_LOCAL_INV | IBV_QP_EX_WITH_BIND_MW | IBV_QP_EX_WITH_SEND_WITH_INV;

    return !(flags & ~known);
}

static bool init_attr_is_valid(const struct ibv_qp_init_attr_ex *attr)
{
    const int known = IBV_QP_INIT_ATTR_PD | IBV_QP_INIT_ATTR_SEND_OPS_FLAGS | IBV_QP_INIT_ATTR_CREATE_FLAGS;
    const struct ibv_qp_cap *cap = &attr->cap;

    if (attr->comp_mask & ~(uint32_t)known || !(attr->comp_mask & IBV_QP_INIT_ATTR_PD))
        return false;
    if (attr->comp_mask & IBV_QP_INIT_ATTR_CREATE_FLAGS && attr->create_flags)
        return false;
    if (attr->qp_type != IBV_QPT_RC && attr->qp_type != IBV_QPT_UC && attr->qp_type != IBV_QPT_UD)
        return false;
    if (!attr->pd || !attr->send_cq || !attr->recv_cq)
        return false;
    return cap->max_send_wr <= MAX_QP_WR && cap->max_recv_wr <= MAX_QP_WR && cap->max_send_sge <= MAX_SGE &&
           cap->max_recv_sge <= MAX_SGE && cap->max_inline_data <= MAX_INLINE;
}

static int sq_init(struct sq *sq, struct ibv_qp_cap *cap)
{
    if (!cap->max_send_sge)
        cap->max_send_sge = 1;
    sq->max_sge = cap->max_send_sge;
    sq->max_inline = cap->max_inline_data;
    sq->capacity = 1;
    while (sq->capacity < cap->max_send_wr)
        sq->capacity *= 2;
    sq->wqes = aligned_alloc(CACHE_LINE, sq->capacity * sizeof(*sq->wqes));
    sq->sges = calloc((size_t)sq->capacity * sq->max_sge, sizeof(*sq->sges));
    cap->max_send_wr = sq->capacity;
    sq->inline_data = calloc((size_t)sq->capacity * sq->max_inline + 1, 1);
    return sq->wqes && sq->sges && sq->inline_data ? 0 : ENOMEM;
}

static void free_queues(struct qp *qp)
{
    free(qp->sq.wqes);
    free(qp->sq.sges);
    free(qp->sq.inline_data);
    rq_free(&qp->rq);
    resp_free(qp);
}

/* The queues of a queue pair; on failure free_queues() gives back what there is. */
static int init_queues(struct qp *qp, const struct ibv_qp_init_attr_ex *attr)
{
    int rc;

    qp->cap = attr->cap;
    rc = sq_init(&qp->sq, &qp->cap);
    if (rc)
        return rc;
    if (attr->srq) {
        qp->cap.max_recv_wr = qp->cap.max_recv_sge = 0;
        return 0;
    }
    if (!qp->cap.max_recv_sge)
        qp->cap.max_recv_sge = 1;
    rc = rq_init(&qp->rq, qp->cap.max_recv_wr, qp->cap.max_recv_sge);
    qp->cap.max_recv_wr = qp->rq.capacity; /* what is there, not what was asked for */
    return rc;
}

static void count_users(struct qp *qp, int change)
{
    ((struct pd *)(void *)qp->base.pd)->children += (unsigned int)change;
    ((struct cq *)(void *)qp->base.send_cq)->users += (unsigned int)change;
    ((struct cq *)(void *)qp->base.recv_cq)->users += (unsigned int)change;
    if (qp->base.srq)
        ((struct srq *)(void *)qp->base.srq)->users += (unsigned int)change;
}

static int enlist(struct context *ctx, struct qp *qp)
{
    int rc = timers_reserve(&ctx->timers, ctx->qps.count + 1);

    if (rc)
        return rc;
    rc = ctx->qps.count < MAX_QP ? thread_start(ctx) : ENOMEM;
    if (rc)
        return rc;
    rc = idmap_add_random(&ctx->qps, 2, WIRE_PSN_MASK - 1, qp, &qp->base.qp_num); /* 0, 1, 2^24-1 are special */
    if (rc)
        return rc;
    qp->base.handle = qp->base.qp_num;
    list_add_tail(&ctx->all_qps, &qp->in_all);
    count_users(qp, 1);
    return 0;
}

static void init_base(struct qp *qp, const struct ibv_qp_init_attr_ex *attr)
{
    qp->base.context = attr->pd->context;
    qp->base.qp_context = attr->qp_context;
    qp->base.pd = attr->pd;
    qp->base.send_cq = attr->send_cq;
    qp->base.recv_cq = attr->recv_cq;
    qp->base.srq = attr->srq;
    qp->base.qp_type = attr->qp_type;
    qp->sig_all = attr->sq_sig_all;
    qp->deadline = NEVER;
    qp->any_ip_id = true;
    list_init(&qp->in_tx);
    list_init(&qp->in_acks);
    list_init(&qp->in_all);
    set_state(qp, IBV_QPS_RESET);
    pthread_mutex_init(&qp->base.mutex, NULL);
    pthread_cond_init(&qp->base.cond, NULL);
    pthread_mutex_init(&qp->post_lock, NULL);
    if (attr->comp_mask & IBV_QP_INIT_ATTR_SEND_OPS_FLAGS) {
        qp->has_ex = true;
        qp->send_ops = attr->send_ops_flags;
        wr_interface_init(qp);
    }
}

struct ibv_qp *qp_create_ex(struct ibv_context *context, struct ibv_qp_init_attr_ex *attr)
{
    struct context *ctx = context_of(context);
    struct qp *qp;
    int rc;

    if (context_is_foreign(ctx)) {
        errno = ENODEV;
        return NULL;
    }
    if (!init_attr_is_valid(attr)) {
        errno = EINVAL;
        return NULL;
    }
    if (attr->comp_mask & IBV_QP_INIT_ATTR_SEND_OPS_FLAGS && !can_send_ops(attr->send_ops_flags)) {
        errno = EOPNOTSUPP;
        return NULL;
    }
    qp = aligned_alloc(CACHE_LINE, sizeof(*qp));
    if (!qp)
        return NULL;
    memset(qp, 0, sizeof(*qp));
    init_base(qp, attr);
    rc = init_queues(qp, attr);
    if (!rc) {
        pthread_mutex_lock(&ctx->lock);
        rc = enlist(ctx, qp);
        pthread_mutex_unlock(&ctx->lock);
    }
    if (rc) {
        free_queues(qp);
        free(qp);
        errno = rc;
        return NULL;
    }
    attr->cap = qp->cap;
    return &qp->base;
}

EXPORT struct ibv_qp *ibv_create_qp(struct ibv_pd *pd, struct ibv_qp_init_attr *attr)
{
    struct ibv_qp_init_attr_ex ex = {
        .qp_context = attr->qp_context,
        .send_cq = attr->send_cq,
        .recv_cq = attr->recv_cq,
        .srq = attr->srq,
        .cap = attr->cap,
        .qp_type = attr->qp_type,
        .sq_sig_all = attr->sq_sig_all,
        .comp_mask = IBV_QP_INIT_ATTR_PD,
        .pd = pd,
    };
    struct ibv_qp *qp = qp_create_ex(pd->context, &ex);

    if (qp)
        attr->cap = ex.cap;
    return qp;
}

EXPORT struct ibv_qp_ex *ibv_qp_to_qp_ex(struct ibv_qp *base)
{
    struct qp *qp = (struct qp *)(void *)base;

    return qp->has_ex ? &qp->ex : NULL;
}

EXPORT int ibv_destroy_qp(struct ibv_qp *base)
{
    struct context *ctx = context_of(base->context);
    struct qp *qp = (struct qp *)(void *)base;
    int rc;

    if (context_is_foreign(ctx))
        return ENODEV;
    pthread_mutex_lock(&ctx->lock);
    rc = to_reset(ctx, qp);
    if (rc) {
        pthread_mutex_unlock(&ctx->lock);
        return rc;
    }
    async_forget(ctx, qp);
    idmap_remove(&ctx->qps, qp->base.qp_num);
    list_del(&qp->in_all);
    count_users(qp, -1);
    pthread_mutex_unlock(&ctx->lock);
    async_wait_acked_qp(qp);
    pthread_mutex_destroy(&qp->base.mutex);
    pthread_cond_destroy(&qp->base.cond);
    pthread_mutex_destroy(&qp->post_lock);
    free_queues(qp);
    free(qp);
    return 0;
}
