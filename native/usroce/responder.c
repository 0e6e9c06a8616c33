/* The responder: request packets become memory accesses and receive completions, and are answered.
 *
 * A packet is carried out when its PSN is the expected one. A later one means a gap: it is dropped, and the peer
 * is told once (NAK, PSN sequence error). An earlier one is a duplicate: SENDs and WRITEs are acknowledged again,
 * reads are answered again, and atomics get the answer they got, from the ring of resources (IBA 9.7.5.1).
 *
 * Answers leave in order: read responses and atomic answers are jobs in a ring, and an acknowledgement that is
 * owed waits until the ring is empty, because it would acknowledge what comes after them.
 *
 * What a request may touch is looked up for each packet anew: a region may go away in the middle of a message. */
#include "usroce.h"

#include <arpa/inet.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

enum { LAST_WORDS = 1024 }; /* response packets that may still precede a fatal NAK */

int resp_reset(struct qp *qp)
{
    struct responder *resp = &qp->resp;
    uint32_t depth = qp->attr.max_dest_rd_atomic, capacity = 4;

    resp_free(qp);
    memset(resp, 0, sizeof(*resp));
    resp->epsn = qp->attr.rq_psn;
    resp->ack_psn = psn_add(resp->epsn, WIRE_PSN_MASK);
    while (capacity < 2 * depth)
        capacity *= 2;
    resp->resources = calloc(depth ? depth : 1, sizeof(*resp->resources));
    resp->jobs = calloc(capacity, sizeof(*resp->jobs));
    if (!resp->resources || !resp->jobs) {
        resp_free(qp);
        return ENOMEM;
    }
    resp->num_resources = depth;
    resp->jobs_capacity = capacity;
    return 0;
}

void resp_free(struct qp *qp)
{
    free(qp->resp.resources);
    free(qp->resp.jobs);
    qp->resp.resources = NULL;
    qp->resp.jobs = NULL;
    qp->resp.num_resources = qp->resp.jobs_capacity = 0;
    qp->resp.jobs_head = qp->resp.jobs_tail = 0;
}

/* --- answers ----------------------------------------------------------------------------------------------- */

static bool has_jobs(const struct responder *resp)
{
    return resp->jobs_head != resp->jobs_tail;
}

static struct job *job_at(struct responder *resp, uint32_t index)
{
    return &resp->jobs[index & (resp->jobs_capacity - 1)];
}

static bool is_full(const struct responder *resp)
{
    return resp->jobs_head - resp->jobs_tail == resp->jobs_capacity;
}

/* A job more, zeroed; the ring must not be full. */
static struct job *add_job(struct context *ctx, struct qp *qp)
{
    struct responder *resp = &qp->resp;
    struct job *job = job_at(resp, resp->jobs_head++);

    memset(job, 0, sizeof(*job));
    job->msn = resp->msn;
    progress_tx_ready(ctx, qp);
    return job;
}

/* Owes an acknowledgement, with `syndrome`: of everything up to the last SEND or WRITE, or a NAK of epsn. */
static void owe(struct context *ctx, struct qp *qp, uint8_t syndrome)
{
    if (qp->base.qp_type != IBV_QPT_RC)
        return;
    qp->resp.ack_pending = true;
    qp->resp.syndrome = syndrome;
    progress_owe_ack(ctx, qp);
}

void resp_send_ack(struct context *ctx, struct qp *qp)
{
    struct responder *resp = &qp->resp;
    bool ack = WIRE_AETH_KIND(resp->syndrome) == 0;
    struct tx_packet out;
    struct packet packet = {
        .opcode = WIRE_ACK,
        .dest_qp = qp->attr.dest_qp_num,
        .psn = ack ? resp->ack_psn : resp->epsn,
        .syndrome = resp->syndrome,
        .msn = resp->msn,
    };

    if (!resp->ack_pending || has_jobs(resp))
        return; /* with jobs: resp_transmit() comes back to it */
    resp->ack_pending = false;
    if (WIRE_AETH_KIND(resp->syndrome) == WIRE_AETH_NAK)
        ctx->counters.naks_sent++;
    else if (!ack)
        ctx->counters.rnr_naks_sent++;
    tx_begin(ctx, &out, qp->slot, &qp->remote);
    out.traffic_class = qp->attr.ah_attr.grh.traffic_class;
    out.head_size = wire_build(out.head, &packet);
    tx_end(&out);
}

/* The request at epsn breaks the rules: the last answer says so, and the connection is dead (IBA 9.9.3, class C).
 */
static void refuse(struct context *ctx, struct qp *qp, uint8_t syndrome)
{
    enum ibv_event_type event =
        syndrome == WIRE_NAK_REMOTE_ACCESS ? IBV_EVENT_QP_ACCESS_ERR : IBV_EVENT_QP_REQ_ERR;

    if (qp->base.qp_type != IBV_QPT_RC) {
        qp->resp.in_message = false; /* an unreliable service drops the message */
        return;
    }
    resp_transmit(ctx, qp, LAST_WORDS);
    if (qp->base.state == IBV_QPS_ERR)
        return;
    qp->resp.jobs_tail = qp->resp.jobs_head;
    qp->resp.ack_pending = true;
    qp->resp.syndrome = syndrome;
    resp_send_ack(ctx, qp);
    qp_to_error(ctx, qp, syndrome == WIRE_NAK_REMOTE_OPERATION ? NO_EVENT : event);
}

static bool send_read_response(struct context *ctx, struct qp *qp, struct job *job)
{
    uint32_t index = (uint32_t)psn_diff(job->next, job->first_psn);
    uint64_t offset = (uint64_t)index * qp->mtu;
    uint32_t size = job->length - offset < qp->mtu ? (uint32_t)(job->length - offset) : qp->mtu;
    bool first = index == 0, last = job->next == job->last_psn;
    const uint8_t *host = key_remote(ctx, qp, job->rkey, job->addr + offset, size, IBV_ACCESS_REMOTE_READ);
    struct tx_packet out;
    struct packet packet = {
        .opcode = first && last ? WIRE_READ_ONLY : first ? WIRE_READ_FIRST : last ? WIRE_READ_LAST : WIRE_READ_MIDDLE,
        .dest_qp = qp->attr.dest_qp_num,
        .psn = job->next,
        .syndrome = WIRE_AETH_ACK,
        .msn = job->msn,
    };

    if (!host && size)
        return false;
    tx_begin(ctx, &out, qp->slot, &qp->remote);
    out.traffic_class = qp->attr.ah_attr.grh.traffic_class;
    out.head_size = wire_build(out.head, &packet);
    tx_payload(&out, host, size);
    tx_end(&out);
    job->next = psn_add(job->next, 1);
    return true;
}

static void send_atomic_answer(struct context *ctx, struct qp *qp, const struct job *job)
{
    struct tx_packet out;
    struct packet packet = {
        .opcode = WIRE_ATOMIC_ACK,
        .dest_qp = qp->attr.dest_qp_num,
        .psn = job->first_psn,
        .syndrome = WIRE_AETH_ACK,
        .msn = job->msn,
        .original = job->original,
    };

    tx_begin(ctx, &out, qp->slot, &qp->remote);
    out.traffic_class = qp->attr.ah_attr.grh.traffic_class;
    out.head_size = wire_build(out.head, &packet);
    tx_end(&out);
}

/* The region that a read was answered from is gone in the middle: NAK at that packet. */
static void break_off(struct context *ctx, struct qp *qp, uint32_t psn)
{
    qp->resp.jobs_tail = qp->resp.jobs_head;
    qp->resp.epsn = psn;
    refuse(ctx, qp, WIRE_NAK_REMOTE_ACCESS);
}

bool resp_transmit(struct context *ctx, struct qp *qp, int budget)
{
    struct responder *resp = &qp->resp;

    if (!has_jobs(resp))
        return false;
    while (has_jobs(resp)) {
        struct job *job = job_at(resp, resp->jobs_tail);

        if (budget-- <= 0)
            return true;
        if (job->atomic) {
            send_atomic_answer(ctx, qp, job);
        } else if (!tx_has_room(qp->slot, &qp->remote, qp->mtu)) {
            progress_starved(ctx, qp);
            return false;
        } else {
            bool sent = send_read_response(ctx, qp, job);

            if (!sent && !job->repeated) {
                break_off(ctx, qp, job->next);
                return false;
            }
            /* A repeated answer whose region is gone: the peer has had it, or goes on asking. */
            if (sent && psn_diff(job->next, job->last_psn) <= 0)
                continue;
        }
        resp->jobs_tail++;
    }
    if (resp->ack_pending)
        progress_owe_ack(ctx, qp);
    return false;
}

/* --- receives ------------------------------------------------------------------------------------------------ */

/* Takes a receive for the message that begins or notifies. False: there is none. */
static bool take_receive(struct qp *qp)
{
    struct responder *resp = &qp->resp;
    struct recv_wqe *wqe;

    if (resp->have_wqe) /* left over from a message that an unreliable service dropped */
        return true;
    wqe = qp->base.srq ? srq_pop((struct srq *)(void *)qp->base.srq) : rq_pop(&qp->rq);
    if (!wqe)
        return false;
    resp->have_wqe = true;
    resp->wr_id = wqe->wr_id;
    resp->wqe_length = wqe->length;
    resp->num_sge = wqe->num_sge;
    memcpy(resp->sge, wqe->sge, (size_t)wqe->num_sge * sizeof(*wqe->sge));
    return true;
}

/* The receive that was taken is over. */
static void complete_receive(struct qp *qp, struct ibv_wc *wc, bool solicited)
{
    wc->wr_id = qp->resp.wr_id;
    wc->qp_num = qp->base.qp_num;
    qp->resp.have_wqe = false;
    cq_push((struct cq *)(void *)qp->base.recv_cq, wc, solicited);
}

static void complete_receive_error(struct qp *qp, enum ibv_wc_status status)
{
    struct ibv_wc wc = {.status = status, .opcode = IBV_WC_RECV};

    complete_receive(qp, &wc, true);
}

void resp_flush(struct context *ctx, struct qp *qp)
{
    struct responder *resp = &qp->resp;

    (void)ctx;
    resp->in_message = false;
    resp->ack_pending = false;
    resp->jobs_tail = resp->jobs_head;
    if (resp->have_wqe)
        complete_receive_error(qp, IBV_WC_WR_FLUSH_ERR);
    while (!qp->base.srq && take_receive(qp))
        complete_receive_error(qp, IBV_WC_WR_FLUSH_ERR);
}

/* --- requests, in order ------------------------------------------------------------------------------------- */

/* Whether the packet may stand here in a message, and has a size that it may have (IBA 9.7.4.1). */
static bool is_well_formed(const struct qp *qp, const struct packet *packet)
{
    const struct responder *resp = &qp->resp;
    bool starts = packet->traits & WIRE_STARTS, ends = packet->traits & WIRE_ENDS;

    if (starts == resp->in_message)
        return false;
    if (!starts && resp->write != !!(packet->traits & WIRE_IS_WRITE))
        return false;
    if (!(packet->traits & WIRE_HAS_PAYLOAD))
        return true;
    if (!ends)
        return packet->length == qp->mtu;
    return packet->length <= qp->mtu && (starts || packet->length);
}

/* The next packets of the peer are dropped until it comes back to this one. */
static void not_ready(struct context *ctx, struct qp *qp)
{
    qp->resp.gap = true;
    owe(ctx, qp, (uint8_t)(WIRE_AETH_RNR_NAK | (qp->attr.min_rnr_timer & 31)));
}

/* The packet was carried out. */
static void carried_out(struct context *ctx, struct qp *qp, const struct packet *packet)
{
    struct responder *resp = &qp->resp;

    resp->ack_psn = resp->epsn;
    resp->epsn = psn_add(resp->epsn, 1);
    resp->in_message = !(packet->traits & WIRE_ENDS);
    if (packet->traits & WIRE_ENDS)
        resp->msn = psn_add(resp->msn, 1);
    /* A NAK that has not left yet is out of date. */
    if (packet->ack_request || resp->ack_pending)
        owe(ctx, qp, WIRE_AETH_ACK);
}

static void deliver(struct qp *qp, const struct packet *packet, enum ibv_wc_opcode opcode)
{
    struct ibv_wc wc = {
        .status = IBV_WC_SUCCESS,
        .opcode = opcode,
        .byte_len = qp->resp.length,
        .src_qp = qp->attr.dest_qp_num,
    };

    if (packet->traits & WIRE_HAS_IMM) {
        wc.imm_data = packet->imm;
        wc.wc_flags |= IBV_WC_WITH_IMM;
    }
    if (packet->traits & WIRE_HAS_INV) {
        wc.invalidated_rkey = packet->rkey;
        wc.wc_flags |= IBV_WC_WITH_INV;
    }
    complete_receive(qp, &wc, packet->solicited);
}

static void receive_send(struct context *ctx, struct qp *qp, const struct packet *packet)
{
    struct responder *resp = &qp->resp;

    if (packet->traits & WIRE_STARTS) {
        if (!take_receive(qp)) {
            not_ready(ctx, qp);
            return;
        }
        resp->write = false;
        resp->length = 0;
    }
    if (packet->length > resp->wqe_length - resp->length) {
        if (qp->base.qp_type == IBV_QPT_RC) /* else the receive is for the next message */
            complete_receive_error(qp, IBV_WC_LOC_LEN_ERR);
        refuse(ctx, qp, WIRE_NAK_INVALID_REQUEST);
        return;
    }
    if (!sge_scatter(ctx, qp->base.pd, resp->sge, resp->length, packet->payload, packet->length)) {
        complete_receive_error(qp, IBV_WC_LOC_PROT_ERR);
        refuse(ctx, qp, WIRE_NAK_REMOTE_OPERATION);
        qp_to_error(ctx, qp, NO_EVENT);
        return;
    }
    resp->length += packet->length;
    if (packet->traits & WIRE_HAS_INV && !key_invalidate(ctx, qp, packet->rkey)) {
        refuse(ctx, qp, WIRE_NAK_REMOTE_ACCESS);
        return;
    }
    if (packet->traits & WIRE_ENDS)
        deliver(qp, packet, IBV_WC_RECV);
    if (qp->base.state != IBV_QPS_ERR) /* the completion queue overran */
        carried_out(ctx, qp, packet);
}

static bool begin_write(struct context *ctx, struct qp *qp, const struct packet *packet)
{
    struct responder *resp = &qp->resp;

    if (!(qp->attr.qp_access_flags & IBV_ACCESS_REMOTE_WRITE))
        return false;
    if (packet->dma_length &&
        !key_remote(ctx, qp, packet->rkey, packet->addr, packet->dma_length, IBV_ACCESS_REMOTE_WRITE))
        return false;
    resp->write = true;
    resp->rkey = packet->rkey;
    resp->addr = packet->addr;
    resp->left = packet->dma_length;
    resp->length = 0;
    return true;
}

static void receive_write(struct context *ctx, struct qp *qp, const struct packet *packet)
{
    struct responder *resp = &qp->resp;
    bool starts = packet->traits & WIRE_STARTS, ends = packet->traits & WIRE_ENDS;
    uint8_t *host;

    if (starts && packet->dma_length > MAX_MSG) {
        refuse(ctx, qp, WIRE_NAK_INVALID_REQUEST);
        return;
    }
    if (starts && !begin_write(ctx, qp, packet)) {
        refuse(ctx, qp, WIRE_NAK_REMOTE_ACCESS);
        return;
    }
    if (packet->length > resp->left || (ends && packet->length != resp->left)) {
        refuse(ctx, qp, WIRE_NAK_INVALID_REQUEST);
        return;
    }
    /* The notification needs a receive; nothing has happened yet that the peer's second try could not repeat. */
    if (packet->traits & WIRE_HAS_IMM && !take_receive(qp)) {
        not_ready(ctx, qp);
        return;
    }
    if (packet->length) {
        host = key_remote(ctx, qp, resp->rkey, resp->addr, packet->length, IBV_ACCESS_REMOTE_WRITE);
        if (!host) {
            refuse(ctx, qp, WIRE_NAK_REMOTE_ACCESS);
            return;
        }
        memcpy(host, packet->payload, packet->length);
    }
    resp->addr += packet->length;
    resp->left -= packet->length;
    resp->length += packet->length;
    if (packet->traits & WIRE_HAS_IMM)
        deliver(qp, packet, IBV_WC_RECV_RDMA_WITH_IMM);
    if (qp->base.state != IBV_QPS_ERR)
        carried_out(ctx, qp, packet);
}

static struct resource *add_resource(struct responder *resp)
{
    struct resource *resource = &resp->resources[resp->next_resource];

    resp->next_resource = (resp->next_resource + 1) % resp->num_resources;
    memset(resource, 0, sizeof(*resource));
    resource->used = true;
    return resource;
}

/* More reads and atomics at a time than were agreed on (max_dest_rd_atomic). */
static bool too_many(struct responder *resp)
{
    uint32_t count = 0;

    for (uint32_t i = resp->jobs_tail; i != resp->jobs_head; i++)
        count += !job_at(resp, i)->repeated;
    return count >= resp->num_resources;
}

/* `count` PSNs of a request that is answered by itself are used up. */
static void answered(struct responder *resp, uint32_t count)
{
    resp->epsn = psn_add(resp->epsn, count);
    resp->msn = psn_add(resp->msn, 1);
    resp->ack_pending = false; /* the answer says as much; and a NAK that has not left yet is out of date */
}

static void receive_read(struct context *ctx, struct qp *qp, const struct packet *packet)
{
    struct responder *resp = &qp->resp;
    uint32_t count = packet->dma_length ? (uint32_t)(((uint64_t)packet->dma_length + qp->mtu - 1) / qp->mtu) : 1;
    struct resource *resource;
    struct job *job;

    if (packet->dma_length > MAX_MSG || too_many(resp)) {
        refuse(ctx, qp, WIRE_NAK_INVALID_REQUEST);
        return;
    }
    if (!(qp->attr.qp_access_flags & IBV_ACCESS_REMOTE_READ) ||
        (packet->dma_length &&
         !key_remote(ctx, qp, packet->rkey, packet->addr, packet->dma_length, IBV_ACCESS_REMOTE_READ))) {
        refuse(ctx, qp, WIRE_NAK_REMOTE_ACCESS);
        return;
    }
    if (is_full(resp))
        return; /* of repeated ones: the peer tries again */
    answered(resp, count);
    resource = add_resource(resp);
    resource->first_psn = packet->psn;
    resource->last_psn = psn_add(packet->psn, count - 1);
    resource->rkey = packet->rkey;
    resource->addr = packet->addr;
    resource->length = packet->dma_length;
    job = add_job(ctx, qp);
    job->first_psn = job->next = resource->first_psn;
    job->last_psn = resource->last_psn;
    job->rkey = packet->rkey;
    job->addr = packet->addr;
    job->length = packet->dma_length;
}

/* Atomic towards this machine's processors and towards every queue pair: IBV_ATOMIC_GLOB. */
static uint64_t run_atomic(uint64_t *at, const struct packet *packet)
{
    uint64_t expected = packet->compare;

    if (WIRE_BASE(packet->opcode) == WIRE_FETCH_ADD)
        return __atomic_fetch_add(at, packet->swap_add, __ATOMIC_SEQ_CST);
    /* On failure, `expected` receives what was there. */
    __atomic_compare_exchange_n(at, &expected, packet->swap_add, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
    return expected;
}

static void receive_atomic(struct context *ctx, struct qp *qp, const struct packet *packet)
{
    struct responder *resp = &qp->resp;
    struct resource *resource;
    struct job *job;
    uint8_t *host;

    if (too_many(resp) || packet->addr % sizeof(uint64_t)) {
        refuse(ctx, qp, WIRE_NAK_INVALID_REQUEST);
        return;
    }
    host = qp->attr.qp_access_flags & IBV_ACCESS_REMOTE_ATOMIC
               ? key_remote(ctx, qp, packet->rkey, packet->addr, sizeof(uint64_t), IBV_ACCESS_REMOTE_ATOMIC)
               : NULL;
    if (!host || (uintptr_t)host % sizeof(uint64_t)) {
        refuse(ctx, qp, WIRE_NAK_REMOTE_ACCESS);
        return;
    }
    if (is_full(resp))
        return;
    answered(resp, 1);
    resource = add_resource(resp);
    resource->atomic = true;
    resource->first_psn = resource->last_psn = packet->psn;
    resource->original = run_atomic((uint64_t *)(void *)host, packet);
    job = add_job(ctx, qp);
    job->atomic = true;
    job->first_psn = packet->psn;
    job->original = resource->original;
}

static void receive_in_order(struct context *ctx, struct qp *qp, const struct packet *packet)
{
    qp->resp.gap = false;
    if (!is_well_formed(qp, packet)) {
        refuse(ctx, qp, WIRE_NAK_INVALID_REQUEST);
        return;
    }
    if (packet->traits & WIRE_IS_SEND) {
        receive_send(ctx, qp, packet);
        return;
    }
    ctx->one_sided++;
    if (packet->traits & WIRE_IS_WRITE)
        receive_write(ctx, qp, packet);
    else if (WIRE_BASE(packet->opcode) == WIRE_READ_REQUEST)
        receive_read(ctx, qp, packet);
    else
        receive_atomic(ctx, qp, packet);
}

/* --- duplicates ------------------------------------------------------------------------------------------------ */

/* The newest first: an old one may have the same PSN, from the round before. */
static struct resource *find_resource(struct responder *resp, uint32_t psn, bool atomic)
{
    for (uint32_t i = 1; i <= resp->num_resources; i++) {
        struct resource *resource =
            &resp->resources[(resp->next_resource + resp->num_resources - i) % resp->num_resources];

        if (resource->used && resource->atomic == atomic && psn_diff(psn, resource->first_psn) >= 0 &&
            psn_diff(resource->last_psn, psn) >= 0)
            return resource;
    }
    return NULL;
}

/* The job that is about to answer `psn`, or is at it. */
static struct job *find_job(struct responder *resp, uint32_t psn)
{
    for (uint32_t i = resp->jobs_tail; i != resp->jobs_head; i++) {
        struct job *job = job_at(resp, i);

        if (psn_diff(psn, job->first_psn) >= 0 &&
            (job->atomic ? psn == job->first_psn : psn_diff(job->last_psn, psn) >= 0))
            return job;
    }
    return NULL;
}

/* A read is asked for again, from the packet on that the peer misses. It must be within the one that was granted.
 */
static void repeat_read(struct context *ctx, struct qp *qp, const struct packet *packet)
{
    const struct resource *resource = find_resource(&qp->resp, packet->psn, false);
    struct job *job = find_job(&qp->resp, packet->psn);
    uint64_t offset;

    if (!resource)
        return;
    offset = (uint64_t)(uint32_t)psn_diff(packet->psn, resource->first_psn) * qp->mtu;
    if (packet->rkey != resource->rkey || packet->addr != resource->addr + offset ||
        packet->dma_length > resource->length - offset)
        return;
    if (job) {
        if (psn_diff(job->next, packet->psn) > 0)
            job->next = packet->psn;
        return;
    }
    if (is_full(&qp->resp))
        return;
    job = add_job(ctx, qp);
    job->repeated = true;
    job->first_psn = job->next = packet->psn;
    job->last_psn = psn_add(
        packet->psn,
        packet->dma_length ? (uint32_t)(((uint64_t)packet->dma_length + qp->mtu - 1) / qp->mtu) - 1 : 0);
    job->rkey = packet->rkey;
    job->addr = packet->addr;
    job->length = packet->dma_length;
}

static void repeat_atomic(struct context *ctx, struct qp *qp, const struct packet *packet)
{
    const struct resource *resource = find_resource(&qp->resp, packet->psn, true);
    struct job *job;

    if (!resource || find_job(&qp->resp, packet->psn) || is_full(&qp->resp))
        return;
    job = add_job(ctx, qp);
    job->repeated = true;
    job->atomic = true;
    job->first_psn = packet->psn;
    job->original = resource->original;
}

static void receive_duplicate(struct context *ctx, struct qp *qp, const struct packet *packet)
{
    ctx->counters.duplicates++;
    if (packet->traits & (WIRE_IS_SEND | WIRE_IS_WRITE)) {
        if (!qp->resp.ack_pending) /* a NAK that is owed says as much */
            owe(ctx, qp, WIRE_AETH_ACK);
    } else if (WIRE_BASE(packet->opcode) == WIRE_READ_REQUEST) {
        repeat_read(ctx, qp, packet);
    } else {
        repeat_atomic(ctx, qp, packet);
    }
}

static void receive_reliable(struct context *ctx, struct qp *qp, const struct packet *packet)
{
    struct responder *resp = &qp->resp;
    int32_t ahead = psn_diff(packet->psn, resp->epsn);

    if (ahead == 0) {
        receive_in_order(ctx, qp, packet);
    } else if (ahead < 0) {
        receive_duplicate(ctx, qp, packet);
    } else {
        ctx->counters.out_of_sequence++;
        if (!resp->gap)
            owe(ctx, qp, WIRE_NAK_PSN_SEQUENCE);
        resp->gap = true;
    }
}

/* --- services that do not answer --------------------------------------------------------------------------- */

/* A gap drops the message it is in; the next one that starts is taken, into the receive that was begun. */
static void receive_unreliable(struct context *ctx, struct qp *qp, const struct packet *packet)
{
    struct responder *resp = &qp->resp;

    if (packet->psn != resp->epsn) {
        ctx->counters.out_of_sequence++;
        resp->in_message = false;
        resp->epsn = packet->psn;
    }
    if (packet->traits & WIRE_STARTS)
        resp->in_message = false;
    if (!is_well_formed(qp, packet)) {
        resp->in_message = false;
        resp->epsn = psn_add(packet->psn, 1);
        return;
    }
    receive_in_order(ctx, qp, packet);
    resp->epsn = psn_add(packet->psn, 1);
}

/* The IP header of a datagram as the 40 bytes that precede it in the receive buffer (IBA A17.4.5.2): an IPv6
 * header, or 20 bytes of nothing and an IPv4 header. */
static void build_grh(uint8_t *grh, const struct gid_slot *slot, const struct view *view)
{
    uint16_t udp_size = htons((uint16_t)(view->size + 8));
    uint16_t ip_size = htons((uint16_t)(view->size + 28));

    memset(grh, 0, WIRE_GRH);
    if (IN6_IS_ADDR_V4MAPPED((const struct in6_addr *)(const void *)slot->gid.raw)) {
        grh[20] = 0x45;
        grh[21] = view->traffic_class;
        memcpy(grh + 22, &ip_size, 2);
        grh[26] = 0x40; /* do not fragment */
        grh[28] = 64;
        grh[29] = IPPROTO_UDP;
        memcpy(grh + 32, view->from.gid.raw + 12, 4);
        memcpy(grh + 36, slot->gid.raw + 12, 4);
        return;
    }
    grh[0] = (uint8_t)(0x60 | view->traffic_class >> 4);
    grh[1] = (uint8_t)(view->traffic_class << 4);
    memcpy(grh + 4, &udp_size, 2);
    grh[6] = IPPROTO_UDP;
    grh[7] = 64;
    memcpy(grh + 8, view->from.gid.raw, 16);
    memcpy(grh + 24, slot->gid.raw, 16);
}

static void receive_datagram(struct context *ctx, struct qp *qp, const struct packet *packet,
                             const struct gid_slot *slot, const struct view *view)
{
    struct responder *resp = &qp->resp;
    uint8_t grh[WIRE_GRH];
    struct ibv_wc wc = {
        .status = IBV_WC_SUCCESS,
        .opcode = IBV_WC_RECV,
        .byte_len = packet->length + WIRE_GRH,
        .src_qp = packet->src_qp,
        .slid = view->from.port, /* what an address handle needs to answer (ah.c) */
        .wc_flags = IBV_WC_GRH,
    };

    /* What does not fit is dropped and the receive kept: strangers can send datagrams. */
    if (!take_receive(qp) || wc.byte_len > resp->wqe_length) {
        ctx->counters.malformed++;
        return;
    }
    build_grh(grh, slot, view);
    if (!sge_scatter(ctx, qp->base.pd, resp->sge, 0, grh, sizeof(grh)) ||
        !sge_scatter(ctx, qp->base.pd, resp->sge, WIRE_GRH, packet->payload, packet->length)) {
        complete_receive_error(qp, IBV_WC_LOC_PROT_ERR);
        qp_to_error(ctx, qp, NO_EVENT);
        return;
    }
    if (packet->traits & WIRE_HAS_IMM) {
        wc.imm_data = packet->imm;
        wc.wc_flags |= IBV_WC_WITH_IMM;
    }
    complete_receive(qp, &wc, packet->solicited);
}

void resp_receive(struct context *ctx, struct qp *qp, const struct packet *packet, const struct gid_slot *slot,
                  const struct view *view)
{
    switch (qp->base.qp_type) {
    case IBV_QPT_RC:
        receive_reliable(ctx, qp, packet);
        break;
    case IBV_QPT_UC:
        receive_unreliable(ctx, qp, packet);
        break;
    default:
        receive_datagram(ctx, qp, packet, slot, view);
        break;
    }
}
