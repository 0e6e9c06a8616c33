/* The requester: work requests of the send queue become packets, what comes back becomes completions.
 *
 * Three indices run over the send queue: `head` (posted), `cursor` (transmitted), `tail` (completed). PSNs are
 * given to a work request when its first packet is sent, and stay with it; `una` is the oldest PSN without an
 * answer, `psn` the next to send. Loss is repaired by going back: cursor and psn return to una, and everything
 * from there is sent again (IBA 9.7.5: a responder drops what it did not expect).
 *
 * What acknowledges: an ACK with PSN p acknowledges all up to p, but no read or atomic, which only its own
 * response does. So a response or ACK beyond an unanswered read says that responses were lost. Read responses are
 * not acknowledged by anybody; therefore a large read is asked for in pieces of what the window allows, so that
 * they cannot overrun our own socket.
 *
 * Time. `ack_timeout` and retry_cnt say when the peer is given up: (retry_cnt + 1) * ack_timeout after the last
 * progress, and after retry_cnt retransmissions: our own process may have stood still for that long. Packets are
 * sent again much sooner, after a few measured round trips, and then less and less often: a lost packet should not
 * cost a timeout that was configured for the death of a host.
 *
 * The window shrinks when packets are lost (to a few after a timeout, by half after a NAK) and grows with
 * acknowledgements, first fast and then by one a round trip. */
#include "usroce.h"

#include <string.h>

enum {
    WINDOW_MIN = 4,
    WINDOW_MAX = 1024,
    RTO_MIN = 1000 * 1000,      /* ns */
    RTO_FIRST = 16 * 1000 * 1000, /* before a round trip was measured */
    BACKOFF_MAX = 16,
    DIRECT_PIECE = 2 << 20,   /* bytes that are moved at a time without the peer: so long a revocation waits for us */
    PACKET = 4096,            /* ... so many count as one packet of the budget */
    ROOM_WAIT = 250 * 1000 * 1000,   /* ns that an unreliable service waits for room on the link */
    ROOM_PAUSE = 2000 * 1000 * 1000, /* ... and how long not again after that was in vain */
};

static struct send_wqe *wqe_at(const struct sq *sq, uint32_t index)
{
    return &sq->wqes[index & (sq->capacity - 1)];
}

static bool is_answered(const struct send_wqe *wqe) /* its own response completes it */
{
    return wqe->opcode == IBV_WR_RDMA_READ || wqe->opcode == IBV_WR_ATOMIC_CMP_AND_SWP ||
           wqe->opcode == IBV_WR_ATOMIC_FETCH_AND_ADD;
}

static bool is_local(const struct send_wqe *wqe)
{
    return wqe->opcode == IBV_WR_BIND_MW || wqe->opcode == IBV_WR_LOCAL_INV;
}

static uint32_t packets_of(const struct qp *qp, const struct send_wqe *wqe)
{
    if (qp->base.qp_type == IBV_QPT_UD || (is_answered(wqe) && wqe->opcode != IBV_WR_RDMA_READ))
        return 1;
    return wqe->length ? (uint32_t)(((uint64_t)wqe->length + qp->mtu - 1) / qp->mtu) : 1;
}

static uint32_t in_flight(const struct requester *req)
{
    return (uint32_t)psn_diff(req->psn, req->una);
}

static uint32_t window_limit(const struct context *ctx, const struct qp *qp)
{
    /* The kernel accounts about this much for a small datagram. */
    uint32_t cost = qp->mtu < 1024 ? 1024 : qp->mtu;
    uint32_t limit = ctx->window_bytes / cost;

    if (limit < 2 * WINDOW_MIN)
        return 2 * WINDOW_MIN;
    return limit < WINDOW_MAX ? limit : WINDOW_MAX;
}

/* The oldest work request is out of the queue. */
static void leave(struct qp *qp)
{
    struct send_wqe *wqe = wqe_at(&qp->sq, qp->sq.tail++);

    if (wqe->opcode == IBV_WR_BIND_MW)
        mw_count_posted(wqe->mw, wqe->bind.mr, -1);
}

void req_reset(struct context *ctx, struct qp *qp)
{
    struct requester *req = &qp->req;
    struct sq *sq = &qp->sq;

    memset(req, 0, sizeof(*req));
    req->una = req->psn = req->sent_psn = qp->attr.sq_psn;
    req->window = req->threshold = window_limit(ctx, qp);
    req->rnr_left = qp->attr.rnr_retry;
    while (sq->tail != sq->head)
        leave(qp);
    sq->cursor = sq->tail;
}

/* --- completions ------------------------------------------------------------------------------------------ */

static enum ibv_wc_opcode wc_opcode(enum ibv_wr_opcode opcode)
{
    switch (opcode) {
    case IBV_WR_RDMA_WRITE:
    case IBV_WR_RDMA_WRITE_WITH_IMM:
        return IBV_WC_RDMA_WRITE;
    case IBV_WR_RDMA_READ:
        return IBV_WC_RDMA_READ;
    case IBV_WR_ATOMIC_CMP_AND_SWP:
        return IBV_WC_COMP_SWAP;
    case IBV_WR_ATOMIC_FETCH_AND_ADD:
        return IBV_WC_FETCH_ADD;
    case IBV_WR_BIND_MW:
        return IBV_WC_BIND_MW;
    case IBV_WR_LOCAL_INV:
        return IBV_WC_LOCAL_INV;
    default:
        return IBV_WC_SEND;
    }
}

/* The oldest work request is over. */
static void complete(struct qp *qp, enum ibv_wc_status status)
{
    struct send_wqe *wqe = wqe_at(&qp->sq, qp->sq.tail);
    struct ibv_wc wc = {
        .wr_id = wqe->wr_id,
        .status = status,
        .opcode = wc_opcode(wqe->opcode),
        .byte_len = wqe->length,
        .qp_num = qp->base.qp_num,
    };

    if (qp->sq.cursor == qp->sq.tail) {
        qp->sq.cursor++;
        qp->req.packet = 0;
    }
    leave(qp);
    if (wqe->signaled || status != IBV_WC_SUCCESS)
        cq_push((struct cq *)(void *)qp->base.send_cq, &wc, false);
}

void req_flush(struct context *ctx, struct qp *qp)
{
    (void)ctx;
    while (qp->sq.tail != qp->sq.head)
        complete(qp, IBV_WC_WR_FLUSH_ERR);
    qp->req.stalled = qp->req.rnr_waiting = false;
}

/* The oldest work request failed: it completes with `status`, the rest is flushed. A connection is dead then; the
 * send queue of an unreliable or datagram queue pair stops in SQE and can be started again. */
static void fail(struct context *ctx, struct qp *qp, enum ibv_wc_status status)
{
    complete(qp, status);
    if (qp->base.state == IBV_QPS_ERR) /* the completion queue overran */
        return;
    if (qp->base.qp_type == IBV_QPT_RC) {
        qp_to_error(ctx, qp, NO_EVENT);
        return;
    }
    qp->base.state = qp->attr.qp_state = IBV_QPS_SQE;
    req_flush(ctx, qp);
}

static bool is_finished(const struct requester *req, const struct send_wqe *wqe)
{
    if (!wqe->started)
        return false;
    if (is_answered(wqe) || is_local(wqe))
        return wqe->done;
    return psn_diff(req->una, wqe->last_psn) > 0;
}

void req_check_drained(struct context *ctx, struct qp *qp)
{
    if (qp->base.state != IBV_QPS_SQD || !qp->sqd_notify)
        return;
    if (qp->sq.tail != qp->sq.head && wqe_at(&qp->sq, qp->sq.tail)->started)
        return;
    qp->sqd_notify = false;
    async_post(ctx, IBV_EVENT_SQ_DRAINED, EVENT_QP, qp);
}

/* Completes in order what is over, up to a work request that failed or waits. */
static void complete_finished(struct context *ctx, struct qp *qp)
{
    while (qp->sq.tail != qp->sq.head) {
        struct send_wqe *wqe = wqe_at(&qp->sq, qp->sq.tail);

        if (wqe->status != IBV_WC_SUCCESS) {
            fail(ctx, qp, wqe->status);
            return;
        }
        if (!is_finished(&qp->req, wqe))
            break;
        complete(qp, IBV_WC_SUCCESS);
    }
    req_check_drained(ctx, qp);
}

/* The work request at the cursor cannot be carried out. It completes when its turn comes. */
static void stall(struct context *ctx, struct qp *qp, struct send_wqe *wqe, enum ibv_wc_status status)
{
    wqe->status = status;
    qp->req.stalled = true;
    complete_finished(ctx, qp);
}

/* --- timer ------------------------------------------------------------------------------------------------- */

static uint64_t give_up_at(const struct qp *qp)
{
    return qp->req.last_progress + qp->ack_timeout * (qp->attr.retry_cnt + 1u);
}

static uint64_t retransmit_after(const struct qp *qp)
{
    const struct requester *req = &qp->req;
    uint64_t after = req->srtt ? req->srtt + 4 * req->rttvar : RTO_FIRST; /* as TCP, RFC 6298 */

    if (after < RTO_MIN)
        after = RTO_MIN;
    after <<= req->backoff < BACKOFF_MAX ? req->backoff : BACKOFF_MAX;
    return after < qp->ack_timeout ? after : qp->ack_timeout;
}

static void set_timer(struct context *ctx, struct qp *qp, uint64_t now)
{
    uint64_t deadline = now + retransmit_after(qp), end = give_up_at(qp);

    if (!qp->ack_timeout || qp->base.qp_type != IBV_QPT_RC)
        return;
    timer_set(ctx, qp, now < end && end < deadline ? end : deadline);
}

/* --- transmission -------------------------------------------------------------------------------------------- */

static void assign_psns(struct qp *qp, struct send_wqe *wqe)
{
    if (wqe->started)
        return;
    wqe->started = true;
    wqe->first_psn = qp->req.psn;
    wqe->last_psn = psn_add(qp->req.psn, packets_of(qp, wqe) - 1);
}

/* `count` PSNs from `psn` on are in flight. */
static void sent(struct context *ctx, struct qp *qp, uint32_t count)
{
    struct requester *req = &qp->req;

    if (psn_diff(req->psn, req->sent_psn) < 0)
        ctx->counters.retransmitted++;
    req->psn = psn_add(req->psn, count);
    req->packet += count;
    if (psn_diff(req->psn, req->sent_psn) > 0)
        req->sent_psn = req->psn;
}

static bool reads_full(const struct qp *qp)
{
    return qp->req.reads_head - qp->req.reads_tail >= qp->attr.max_rd_atomic;
}

static void remember_read(struct qp *qp, uint32_t last_psn)
{
    qp->req.reads[qp->req.reads_head++ % MAX_RD_ATOMIC] = last_psn;
}

static void start_timing(struct requester *req, uint32_t psn, uint64_t now)
{
    if (!req->timed_at && psn_diff(psn, req->sent_psn) >= 0) {
        req->timed_psn = psn;
        req->timed_at = now;
    }
}

enum step { STEP_BLOCKED, STEP_MORE, STEP_DONE, STEP_COMPLETED };

/* How many packets one read request asks for at most. The pieces of a read must be the same when it is sent again:
 * a responder answers a repeated request only within one that it knows. */
static uint32_t read_piece(const struct context *ctx, const struct qp *qp)
{
    return window_limit(ctx, qp) / 4;
}

/* One read request: a piece of it, or the rest of a piece. */
static enum step transmit_read(struct context *ctx, struct qp *qp, struct send_wqe *wqe, uint64_t now)
{
    struct requester *req = &qp->req;
    uint32_t left = packets_of(qp, wqe) - req->packet;
    uint32_t piece = read_piece(ctx, qp);
    uint32_t rest = piece - req->packet % piece;
    uint32_t count = left < rest ? left : rest;
    uint64_t offset = (uint64_t)req->packet * qp->mtu;
    uint64_t bytes = (uint64_t)count * qp->mtu;
    struct tx_packet out;
    struct packet packet = {.opcode = WIRE_READ_REQUEST, .dest_qp = qp->attr.dest_qp_num, .psn = req->psn};

    if (reads_full(qp) || (in_flight(req) && in_flight(req) + count > req->window))
        return STEP_BLOCKED;
    packet.addr = wqe->remote_addr + offset;
    packet.rkey = wqe->rkey;
    packet.dma_length = (uint32_t)(bytes < wqe->length - offset ? bytes : wqe->length - offset);
    tx_begin(ctx, &out, qp->slot, &qp->remote);
    out.traffic_class = qp->attr.ah_attr.grh.traffic_class;
    out.head_size = wire_build(out.head, &packet);
    tx_end(&out);
    start_timing(req, req->psn, now);
    sent(ctx, qp, count);
    remember_read(qp, psn_add(req->psn, WIRE_PSN_MASK));
    return count == left ? STEP_DONE : STEP_MORE;
}

static enum step transmit_atomic(struct context *ctx, struct qp *qp, struct send_wqe *wqe, uint64_t now)
{
    struct requester *req = &qp->req;
    bool swap = wqe->opcode == IBV_WR_ATOMIC_CMP_AND_SWP;
    struct tx_packet out;
    struct packet packet = {
        .opcode = swap ? WIRE_COMPARE_SWAP : WIRE_FETCH_ADD,
        .dest_qp = qp->attr.dest_qp_num,
        .psn = req->psn,
        .addr = wqe->remote_addr,
        .rkey = wqe->rkey,
        .swap_add = swap ? wqe->swap : wqe->compare_add,
        .compare = swap ? wqe->compare_add : 0,
        .ack_request = true,
    };

    if (reads_full(qp) || in_flight(req) >= req->window)
        return STEP_BLOCKED;
    tx_begin(ctx, &out, qp->slot, &qp->remote);
    out.traffic_class = qp->attr.ah_attr.grh.traffic_class;
    out.head_size = wire_build(out.head, &packet);
    tx_end(&out);
    start_timing(req, req->psn, now);
    remember_read(qp, req->psn);
    sent(ctx, qp, 1);
    return STEP_DONE;
}

/* Adds `size` bytes of the message from `offset` on. */
static bool gather(struct context *ctx, const struct qp *qp, const struct send_wqe *wqe, uint64_t offset,
                   uint32_t size, struct tx_packet *out)
{
    if (wqe->inline_data) {
        tx_payload(out, wqe->inline_data + offset, size);
        return true;
    }
    for (const struct ibv_sge *sge = wqe->sge; size; sge++) {
        uint32_t part;
        const uint8_t *host;

        if (offset >= sge->length) {
            offset -= sge->length;
            continue;
        }
        part = size < sge->length - offset ? size : (uint32_t)(sge->length - offset);
        host = key_local(ctx, qp->base.pd, sge->lkey, sge->addr + offset, part, 0);
        if (!host)
            return false;
        tx_payload(out, host, part);
        size -= part;
        offset = 0;
    }
    return true;
}

/* The opcode of packet `index` of `count`, by what the message is. */
static uint8_t data_opcode(const struct qp *qp, const struct send_wqe *wqe, uint32_t index, uint32_t count)
{
    enum { FIRST, MIDDLE, LAST, ONLY, PLACES };
    static const uint8_t table[][PLACES] = {
        [IBV_WR_RDMA_WRITE] = {WIRE_WRITE_FIRST, WIRE_WRITE_MIDDLE, WIRE_WRITE_LAST, WIRE_WRITE_ONLY},
        [IBV_WR_RDMA_WRITE_WITH_IMM] = {WIRE_WRITE_FIRST, WIRE_WRITE_MIDDLE, WIRE_WRITE_LAST_IMM,
                                        WIRE_WRITE_ONLY_IMM},
        [IBV_WR_SEND] = {WIRE_SEND_FIRST, WIRE_SEND_MIDDLE, WIRE_SEND_LAST, WIRE_SEND_ONLY},
        [IBV_WR_SEND_WITH_IMM] = {WIRE_SEND_FIRST, WIRE_SEND_MIDDLE, WIRE_SEND_LAST_IMM, WIRE_SEND_ONLY_IMM},
        [IBV_WR_SEND_WITH_INV] = {WIRE_SEND_FIRST, WIRE_SEND_MIDDLE, WIRE_SEND_LAST_INV, WIRE_SEND_ONLY_INV},
    };
    int place = count == 1 ? ONLY : index == 0 ? FIRST : index == count - 1 ? LAST : MIDDLE;
    uint8_t service = qp->base.qp_type == IBV_QPT_UC ? WIRE_UC : WIRE_RC;

    return service | table[wqe->opcode][place];
}

static bool asks_for_ack(struct requester *req, bool last)
{
    if (!last && ++req->unasked < req->window / 4 && in_flight(req) + 1 < req->window)
        return false;
    req->unasked = 0;
    return true;
}

/* There is no room on the link, and somebody waits for it. What has nothing in flight goes on, and may be lost: its
 * timer is what finds out that the peer is gone. */
static bool starves(struct context *ctx, struct qp *qp)
{
    if (!in_flight(&qp->req) || tx_has_room(qp->slot, &qp->remote, qp->mtu))
        return false;
    progress_starved(ctx, qp);
    return true;
}

/* An unreliable service waits for room too, or a burst would be lost that the peer is about to take; but not for long,
 * for a peer that takes nothing must not hold up what goes to others. Then what finds no room is lost, as on any
 * wire. Its timer has no other use. */
static bool waits_for_room(struct context *ctx, struct qp *qp, uint64_t now)
{
    if (now < qp->req.no_wait_until || req_has_room(qp)) {
        qp->deadline = NEVER;
        return false;
    }
    if (qp->deadline == NEVER)
        timer_set(ctx, qp, now + ROOM_WAIT);
    progress_starved(ctx, qp);
    return true;
}

bool req_has_room(const struct qp *qp)
{
    const struct send_wqe *wqe = wqe_at(&qp->sq, qp->sq.cursor);

    if (qp->base.qp_type != IBV_QPT_UD)
        return tx_has_room(qp->slot, &qp->remote, qp->mtu);
    return qp->sq.cursor == qp->sq.head || tx_has_room(wqe->slot, &wqe->to, wqe->length);
}

/* One packet of a SEND or WRITE. */
static enum step transmit_data(struct context *ctx, struct qp *qp, struct send_wqe *wqe, uint64_t now)
{
    struct requester *req = &qp->req;
    bool reliable = qp->base.qp_type == IBV_QPT_RC;
    uint32_t count = packets_of(qp, wqe), index = req->packet;
    bool last = index == count - 1;
    uint64_t offset = (uint64_t)index * qp->mtu;
    uint32_t size = last ? (uint32_t)(wqe->length - offset) : qp->mtu;
    struct tx_packet out;
    struct packet packet = {
        .opcode = data_opcode(qp, wqe, index, count),
        .dest_qp = qp->attr.dest_qp_num,
        .psn = req->psn,
        .solicited = last && wqe->flags & IBV_SEND_SOLICITED,
        .addr = wqe->remote_addr,
        .rkey = wqe->opcode == IBV_WR_SEND_WITH_INV ? wqe->imm : wqe->rkey,
        .dma_length = wqe->length,
        .imm = wqe->imm,
    };

    if (reliable) {
        if (in_flight(req) >= req->window || starves(ctx, qp))
            return STEP_BLOCKED;
        packet.ack_request = asks_for_ack(req, last);
    } else if (waits_for_room(ctx, qp, now)) {
        return STEP_BLOCKED;
    }
    tx_begin(ctx, &out, qp->slot, &qp->remote);
    out.traffic_class = qp->attr.ah_attr.grh.traffic_class;
    out.head_size = wire_build(out.head, &packet);
    if (!gather(ctx, qp, wqe, offset, size, &out)) {
        stall(ctx, qp, wqe, IBV_WC_LOC_PROT_ERR);
        return STEP_BLOCKED;
    }
    tx_end(&out);
    if (packet.ack_request)
        start_timing(req, req->psn, now);
    sent(ctx, qp, 1);
    if (!reliable)
        req->una = req->psn;
    return last ? STEP_DONE : STEP_MORE;
}

static enum step transmit_datagram(struct context *ctx, struct qp *qp, struct send_wqe *wqe, uint64_t now)
{
    struct tx_packet out;
    struct packet packet = {
        .opcode = WIRE_UD | (wqe->opcode == IBV_WR_SEND_WITH_IMM ? WIRE_SEND_ONLY_IMM : WIRE_SEND_ONLY),
        .dest_qp = wqe->remote_qpn,
        .psn = qp->req.psn,
        .solicited = wqe->flags & IBV_SEND_SOLICITED,
        .src_qp = qp->base.qp_num,
        /* The upper bit says: the queue pair's own Q_Key (IBA 10.2.5). */
        .qkey = wqe->remote_qkey & 0x80000000u ? qp->attr.qkey : wqe->remote_qkey,
        .imm = wqe->imm,
    };

    if (waits_for_room(ctx, qp, now))
        return STEP_BLOCKED;
    tx_begin(ctx, &out, wqe->slot, &wqe->to);
    out.traffic_class = wqe->traffic_class;
    out.head_size = wire_build(out.head, &packet);
    if (!gather(ctx, qp, wqe, 0, wqe->length, &out)) {
        stall(ctx, qp, wqe, IBV_WC_LOC_PROT_ERR);
        return STEP_BLOCKED;
    }
    tx_end(&out);
    sent(ctx, qp, 1);
    qp->req.una = qp->req.psn;
    return STEP_DONE;
}

/* Bind and local invalidate run when their turn comes; no packet, no PSN. */
static enum step run_local(struct context *ctx, struct qp *qp, struct send_wqe *wqe)
{
    enum ibv_wc_status status = IBV_WC_SUCCESS;

    if (wqe->done)
        return STEP_DONE;
    if (wqe->opcode == IBV_WR_BIND_MW)
        status = mw_bind(ctx, qp, wqe->mw, wqe->rkey, &wqe->bind);
    else if (!key_invalidate(ctx, qp, wqe->imm))
        status = IBV_WC_LOC_QP_OP_ERR;
    if (status != IBV_WC_SUCCESS) {
        stall(ctx, qp, wqe, status);
        return STEP_BLOCKED;
    }
    wqe->done = true;
    return STEP_DONE;
}

/* Whether nothing of this queue pair's is on its way: what is done at the peer now is done in order. */
static bool is_quiet(const struct qp *qp)
{
    return qp->sq.cursor == qp->sq.tail && qp->req.una == qp->req.sent_psn;
}

/* Carries out a work request, or a piece of it, in the peer's memory. False: it goes by packets, from its start. */
static bool run_direct(struct context *ctx, struct qp *qp, struct send_wqe *wqe, int *budget)
{
    uint32_t left = wqe->length - wqe->moved, piece = left < DIRECT_PIECE ? left : DIRECT_PIECE;

    switch (wqe->opcode) {
    case IBV_WR_RDMA_WRITE:
    case IBV_WR_RDMA_READ:
        if (!piece || !direct_move(ctx, qp, wqe, wqe->moved, piece))
            return false;
        break;
    case IBV_WR_ATOMIC_CMP_AND_SWP:
    case IBV_WR_ATOMIC_FETCH_AND_ADD:
        if (!direct_atomic(ctx, qp, wqe))
            return false;
        break;
    default:
        return false;
    }
    wqe->moved += piece;
    *budget -= (int)(piece / PACKET);
    return true;
}

static enum step direct_step(struct context *ctx, struct qp *qp, struct send_wqe *wqe)
{
    if (wqe->moved < wqe->length)
        return STEP_MORE;
    ctx->counters.direct++;
    complete(qp, IBV_WC_SUCCESS);
    return STEP_COMPLETED;
}

static enum step transmit_step(struct context *ctx, struct qp *qp, struct send_wqe *wqe, uint64_t now, int *budget)
{
    if (wqe->status != IBV_WC_SUCCESS) { /* failed before those in front of it were sent again */
        qp->req.stalled = true;
        return STEP_BLOCKED;
    }
    if (!wqe->started) {
        if (qp->base.state != IBV_QPS_RTS)
            return STEP_BLOCKED; /* draining: only what was begun goes on */
        if (wqe->flags & IBV_SEND_FENCE && qp->req.reads_head != qp->req.reads_tail)
            return STEP_BLOCKED;
    }
    if (is_local(wqe)) {
        wqe->started = true;
        return run_local(ctx, qp, wqe);
    }
    if (is_answered(wqe) && (qp->base.qp_type != IBV_QPT_RC || !qp->attr.max_rd_atomic)) {
        stall(ctx, qp, wqe, IBV_WC_LOC_QP_OP_ERR);
        return STEP_BLOCKED;
    }
    if (!wqe->started && qp->base.qp_type == IBV_QPT_RC && is_quiet(qp) && run_direct(ctx, qp, wqe, budget))
        return direct_step(ctx, qp, wqe);
    assign_psns(qp, wqe);
    if (qp->base.qp_type == IBV_QPT_UD)
        return transmit_datagram(ctx, qp, wqe, now);
    if (wqe->opcode == IBV_WR_RDMA_READ)
        return transmit_read(ctx, qp, wqe, now);
    if (is_answered(wqe))
        return transmit_atomic(ctx, qp, wqe, now);
    return transmit_data(ctx, qp, wqe, now);
}

void req_transmit(struct context *ctx, struct qp *qp, int budget)
{
    struct requester *req = &qp->req;
    struct sq *sq = &qp->sq;
    uint32_t before = req->psn;
    bool idle = req->una == req->sent_psn;
    uint64_t now;

    if (sq->cursor == sq->head || req->stalled || req->rnr_waiting)
        return;
    if (qp->base.state != IBV_QPS_RTS && qp->base.state != IBV_QPS_SQD)
        return;
    now = now_ns();
    while (sq->cursor != sq->head) {
        enum step step;

        if (budget-- <= 0) {
            progress_tx_ready(ctx, qp);
            break;
        }
        step = transmit_step(ctx, qp, wqe_at(sq, sq->cursor), now, &budget);
        if (step == STEP_BLOCKED)
            break;
        if (step == STEP_DONE) {
            sq->cursor++;
            req->packet = 0;
        }
    }
    if (qp->base.qp_type != IBV_QPT_RC || (sq->tail != sq->head && is_local(wqe_at(sq, sq->tail))))
        complete_finished(ctx, qp);
    if (req->psn == before || req->una == req->sent_psn)
        return;
    if (idle)
        req->last_progress = now;
    if (qp->deadline == NEVER)
        set_timer(ctx, qp, now);
}

/* --- answers ---------------------------------------------------------------------------------------------------- */

/* Everything from `una` on is sent again. */
static void go_back(struct context *ctx, struct qp *qp)
{
    struct requester *req = &qp->req;
    struct sq *sq = &qp->sq;
    struct send_wqe *wqe = wqe_at(sq, sq->tail);

    if (sq->tail == sq->head || !wqe->started || req->una == req->sent_psn)
        return;
    sq->cursor = sq->tail;
    req->packet = psn_diff(req->una, wqe->first_psn) > 0 ? (uint32_t)psn_diff(req->una, wqe->first_psn) : 0;
    req->psn = req->una;
    req->reads_tail = req->reads_head;
    req->timed_at = 0;
    req->unasked = 0;
    req->recovering = true;
    req->stalled = false; /* it stalls there again */
    progress_tx_ready(ctx, qp);
}

static void shrink_window(struct qp *qp, uint32_t to)
{
    struct requester *req = &qp->req;

    req->threshold = req->window / 2 > WINDOW_MIN ? req->window / 2 : WINDOW_MIN;
    req->window = to > WINDOW_MIN ? to : WINDOW_MIN;
    req->window_acks = 0;
}

static void grow_window(struct context *ctx, struct qp *qp, uint32_t acknowledged)
{
    struct requester *req = &qp->req;
    uint32_t limit = window_limit(ctx, qp);

    if (req->window >= limit)
        return;
    if (req->window < req->threshold) {
        req->window += acknowledged;
    } else {
        req->window_acks += acknowledged;
        if (req->window_acks < req->window)
            return;
        req->window_acks = 0;
        req->window++;
    }
    if (req->window > limit)
        req->window = limit;
}

static void measure(struct requester *req, uint64_t now)
{
    uint64_t sample;

    if (!req->timed_at || psn_diff(req->una, req->timed_psn) <= 0)
        return;
    sample = now - req->timed_at;
    req->timed_at = 0;
    if (!req->srtt) {
        req->srtt = sample;
        req->rttvar = sample / 2;
        return;
    }
    req->rttvar += (sample > req->srtt ? sample - req->srtt : req->srtt - sample) / 4 - req->rttvar / 4;
    req->srtt += sample / 8 - req->srtt / 8;
}

/* The cursor must not stand before what was acknowledged: a late answer overtook the retransmission. So nothing
 * was lost, the peer was only slow, and the window gets back what the timeout took. */
static void catch_up(struct qp *qp)
{
    struct requester *req = &qp->req;
    struct sq *sq = &qp->sq;

    if (psn_diff(req->una, req->psn) <= 0)
        return;
    if (req->window < req->undo_window)
        req->window = req->undo_window;
    req->undo_window = 0;
    req->psn = req->una;
    while (sq->cursor != sq->head) {
        const struct send_wqe *wqe = wqe_at(sq, sq->cursor);

        if (!wqe->started || (!is_local(wqe) && psn_diff(wqe->last_psn, req->una) >= 0)) {
            if (wqe->started)
                req->packet = (uint32_t)psn_diff(req->una, wqe->first_psn);
            return;
        }
        sq->cursor++;
        req->packet = 0;
    }
}

/* The peer has everything before `una`. */
static void advance(struct context *ctx, struct qp *qp, uint32_t una)
{
    struct requester *req = &qp->req;
    uint32_t count = (uint32_t)psn_diff(una, req->una);
    uint64_t now = now_ns();

    req->una = una;
    req->backoff = 0;
    req->recovering = req->rnr_waiting = false;
    req->rnr_left = qp->attr.rnr_retry;
    req->last_progress = now;
    while (req->reads_tail != req->reads_head && psn_diff(una, req->reads[req->reads_tail % MAX_RD_ATOMIC]) > 0)
        req->reads_tail++;
    measure(req, now);
    grow_window(ctx, qp, count);
    catch_up(qp);
    if (psn_diff(una, req->undo_until) >= 0)
        req->undo_window = 0; /* all that the timeout was about is through */
    if (una == req->sent_psn)
        qp->deadline = NEVER;
    else
        set_timer(ctx, qp, now);
    complete_finished(ctx, qp);
    if (qp->sq.cursor != qp->sq.head)
        progress_tx_ready(ctx, qp);
}

/* The peer has all up to and including `psn`, or says something about what follows it. Stops before a read or
 * atomic that has no response: false, and what was lost is sent again. */
static bool acknowledge(struct context *ctx, struct qp *qp, uint32_t psn)
{
    struct requester *req = &qp->req;
    uint32_t una = psn_add(psn, 1);
    bool gap = false;

    if (una == req->una)
        return true;
    for (uint32_t i = qp->sq.tail; i != qp->sq.head; i++) {
        const struct send_wqe *wqe = wqe_at(&qp->sq, i);

        if (!wqe->started)
            break;
        /* The oldest one is concerned: it began at una or before, perhaps so far that PSNs have come round. */
        if (i != qp->sq.tail && !is_local(wqe) && psn_diff(wqe->first_psn, psn) > 0)
            break;
        if (is_answered(wqe) && !wqe->done) {
            una = psn_diff(req->una, wqe->first_psn) > 0 ? req->una : wqe->first_psn;
            gap = true;
            break;
        }
    }
    if (psn_diff(una, req->una) > 0)
        advance(ctx, qp, una);
    if (gap && !req->recovering && qp->base.state != IBV_QPS_ERR) {
        ctx->counters.out_of_sequence++;
        go_back(ctx, qp);
    }
    return !gap;
}

/* The wait that an RNR NAK asks for, in units of 10 us (IBA 9.7.5.2.8, table 45). */
static uint64_t rnr_delay(uint8_t code)
{
    static const uint32_t table[32] = {65536, 1,   2,   3,    4,    6,    8,    12,   16,   24,   32,
                                       48,    64,  96,  128,  192,  256,  384,  512,  768,  1024, 1536,
                                       2048,  3072, 4096, 6144, 8192, 12288, 16384, 24576, 32768, 49152};

    return (uint64_t)table[code & 31] * 10000u;
}

static void receive_rnr(struct context *ctx, struct qp *qp, const struct packet *packet)
{
    struct requester *req = &qp->req;

    ctx->counters.rnr_naks_received++;
    if (!acknowledge(ctx, qp, psn_add(packet->psn, WIRE_PSN_MASK)) || req->rnr_waiting)
        return;
    if (qp->sq.tail == qp->sq.head || req->una != packet->psn)
        return;
    if (qp->attr.rnr_retry != 7) { /* 7: for ever (ibv_modify_qp(3)) */
        if (!req->rnr_left) {
            fail(ctx, qp, IBV_WC_RNR_RETRY_EXC_ERR);
            return;
        }
        req->rnr_left--;
    }
    go_back(ctx, qp);
    req->rnr_waiting = true;
    req->last_progress = now_ns();
    timer_set(ctx, qp, req->last_progress + rnr_delay(WIRE_AETH_VALUE(packet->syndrome)));
}

static void receive_nak(struct context *ctx, struct qp *qp, const struct packet *packet)
{
    struct requester *req = &qp->req;
    enum ibv_wc_status status;

    ctx->counters.naks_received++;
    acknowledge(ctx, qp, psn_add(packet->psn, WIRE_PSN_MASK));
    if (qp->base.state == IBV_QPS_ERR || qp->sq.tail == qp->sq.head)
        return;
    switch (packet->syndrome) {
    case WIRE_NAK_PSN_SEQUENCE:
        if (req->recovering || req->rnr_waiting)
            return;
        shrink_window(qp, req->window / 2);
        go_back(ctx, qp);
        return;
    case WIRE_NAK_INVALID_REQUEST:
        status = IBV_WC_REM_INV_REQ_ERR;
        break;
    case WIRE_NAK_REMOTE_ACCESS:
        status = IBV_WC_REM_ACCESS_ERR;
        break;
    case WIRE_NAK_REMOTE_OPERATION:
        status = IBV_WC_REM_OP_ERR;
        break;
    default:
        status = IBV_WC_BAD_RESP_ERR;
        break;
    }
    fail(ctx, qp, status);
}

/* The read or atomic that `psn` answers, once everything before it is acknowledged; else NULL. */
static struct send_wqe *answered_wqe(struct context *ctx, struct qp *qp, uint32_t psn)
{
    struct send_wqe *wqe;

    if (psn != qp->req.una && !acknowledge(ctx, qp, psn_add(psn, WIRE_PSN_MASK)))
        return NULL;
    wqe = wqe_at(&qp->sq, qp->sq.tail);
    if (qp->req.una != psn || qp->sq.tail == qp->sq.head || !wqe->started || !is_answered(wqe))
        return NULL;
    return wqe;
}

static void receive_read(struct context *ctx, struct qp *qp, const struct packet *packet)
{
    struct send_wqe *wqe = answered_wqe(ctx, qp, packet->psn);
    uint64_t offset;
    uint32_t want;

    if (!wqe)
        return;
    offset = (uint64_t)(uint32_t)psn_diff(packet->psn, wqe->first_psn) * qp->mtu;
    want = wqe->length - offset < qp->mtu ? (uint32_t)(wqe->length - offset) : qp->mtu;
    if (wqe->opcode != IBV_WR_RDMA_READ || packet->length != want) {
        fail(ctx, qp, IBV_WC_BAD_RESP_ERR);
        return;
    }
    if (!sge_scatter(ctx, qp->base.pd, wqe->sge, (uint32_t)offset, packet->payload, packet->length)) {
        fail(ctx, qp, IBV_WC_LOC_PROT_ERR);
        return;
    }
    wqe->done = packet->psn == wqe->last_psn;
    advance(ctx, qp, psn_add(packet->psn, 1));
}

static void receive_atomic(struct context *ctx, struct qp *qp, const struct packet *packet)
{
    struct send_wqe *wqe = answered_wqe(ctx, qp, packet->psn);

    if (!wqe)
        return;
    if (wqe->opcode == IBV_WR_RDMA_READ) {
        fail(ctx, qp, IBV_WC_BAD_RESP_ERR);
        return;
    }
    if (!sge_scatter(ctx, qp->base.pd, wqe->sge, 0, &packet->original, sizeof(packet->original))) {
        fail(ctx, qp, IBV_WC_LOC_PROT_ERR);
        return;
    }
    wqe->done = true;
    advance(ctx, qp, psn_add(packet->psn, 1));
}

void req_receive(struct context *ctx, struct qp *qp, const struct packet *packet)
{
    if (psn_diff(packet->psn, qp->req.una) < 0 || psn_diff(packet->psn, qp->req.sent_psn) >= 0) {
        ctx->counters.duplicates++; /* or never sent: a forgery */
        return;
    }
    if (packet->traits & WIRE_IS_READ_RESPONSE) {
        receive_read(ctx, qp, packet);
        return;
    }
    if (packet->traits & WIRE_HAS_ATOMIC_ACK) {
        receive_atomic(ctx, qp, packet);
        return;
    }
    switch (WIRE_AETH_KIND(packet->syndrome)) {
    case 0:
        acknowledge(ctx, qp, packet->psn);
        break;
    case WIRE_AETH_RNR_NAK:
        receive_rnr(ctx, qp, packet);
        break;
    case WIRE_AETH_NAK:
        receive_nak(ctx, qp, packet);
        break;
    default:
        ctx->counters.malformed++;
        break;
    }
}

void req_timer(struct context *ctx, struct qp *qp, uint64_t now)
{
    struct requester *req = &qp->req;

    if (qp->base.qp_type != IBV_QPT_RC) { /* there was no room for so long */
        if (!req_has_room(qp))
            req->no_wait_until = now + ROOM_PAUSE;
        list_del(&qp->in_tx);
        progress_tx_ready(ctx, qp);
        return;
    }
    if (req->rnr_waiting) {
        req->rnr_waiting = false;
        req->last_progress = now;
        req_transmit(ctx, qp, (int)req->window);
        return;
    }
    if (req->una == req->sent_psn || qp->sq.tail == qp->sq.head)
        return;
    if (now >= give_up_at(qp) && req->backoff >= qp->attr.retry_cnt) {
        fail(ctx, qp, IBV_WC_RETRY_EXC_ERR);
        return;
    }
    ctx->counters.timeouts++;
    req->backoff++;
    if (!req->undo_window)
        req->undo_window = req->window;
    req->undo_until = req->sent_psn;
    shrink_window(qp, WINDOW_MIN);
    go_back(ctx, qp);
    set_timer(ctx, qp, now);
}
