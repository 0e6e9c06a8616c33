/* Data path: post, poll, arm.
 *
 * A crossing from Python costs more than the verbs call behind it, so each function here does a batch, and
 * every value is a scalar or a packed array that Python fills and reads without an object per request. */
#include "glue.h"

#include <arpa/inet.h>
#include <errno.h>
#include <string.h>
#include <time.h>

/* How many requests are linked into one list, and so rung with one doorbell. Bounds the stack below. */
#define CHAIN 64
/* How many completions are copied at a time. */
#define POLL_CHUNK 32
/* The clock is read once in so many empty polls: reading it costs about as much as one. */
#define POLLS_PER_CLOCK 8

static void fill_wr(struct ibv_send_wr *wr, struct ibv_sge *sge, const struct glue_send_wr *in)
{
    sge->addr = in->addr;
    sge->length = in->length;
    sge->lkey = in->lkey;

    memset(wr, 0, sizeof(*wr));
    wr->wr_id = in->wr_id;
    wr->opcode = (enum ibv_wr_opcode)in->opcode;
    wr->send_flags = in->flags;
    wr->imm_data = htonl(in->imm);
    if (in->length) {
        wr->sg_list = sge;
        wr->num_sge = 1;
    }
    switch (wr->opcode) {
    case IBV_WR_ATOMIC_CMP_AND_SWP:
    case IBV_WR_ATOMIC_FETCH_AND_ADD:
        wr->wr.atomic.remote_addr = in->remote_addr;
        wr->wr.atomic.compare_add = in->compare_add;
        wr->wr.atomic.swap = in->swap;
        wr->wr.atomic.rkey = in->rkey;
        break;
    default:
        wr->wr.rdma.remote_addr = in->remote_addr;
        wr->wr.rdma.rkey = in->rkey;
        break;
    }
}

static int post_one(struct ibv_qp *qp, const struct glue_send_wr *in)
{
    struct ibv_send_wr wr, *bad;
    struct ibv_sge sge;

    fill_wr(&wr, &sge, in);
    return ibv_post_send(qp, &wr, &bad);
}

/* Posts one send, write or read; `imm` is used by the opcodes that carry it. ENOMEM: the send queue is full. */
int glue_post_send(struct ibv_qp *qp, uint64_t wr_id, uint32_t opcode, uint32_t flags, uint64_t addr,
                   uint32_t length, uint32_t lkey, uint64_t remote_addr, uint32_t rkey, uint32_t imm)
{
    struct glue_send_wr in = {
        .wr_id = wr_id,
        .addr = addr,
        .remote_addr = remote_addr,
        .length = length,
        .lkey = lkey,
        .rkey = rkey,
        .imm = imm,
        .opcode = opcode,
        .flags = flags,
    };

    return post_one(qp, &in);
}

/* Posts one atomic on 8 remote bytes; the old value lands in the 8 bytes at `addr`. */
int glue_post_atomic(struct ibv_qp *qp, uint64_t wr_id, uint32_t opcode, uint32_t flags, uint64_t addr,
                     uint32_t lkey, uint64_t remote_addr, uint32_t rkey, uint64_t compare_add, uint64_t swap)
{
    struct glue_send_wr in = {
        .wr_id = wr_id,
        .addr = addr,
        .remote_addr = remote_addr,
        .compare_add = compare_add,
        .swap = swap,
        .length = 8,
        .lkey = lkey,
        .rkey = rkey,
        .opcode = opcode,
        .flags = flags,
    };

    return post_one(qp, &in);
}

/* Posts `num` requests in order, CHAIN of them a doorbell. *posted is how many the device took; on an error
 * that is the index of the request it refused. */
int glue_post_send_many(struct ibv_qp *qp, const struct glue_send_wr *wrs, int num, int *posted)
{
    struct ibv_send_wr chain[CHAIN], *bad;
    struct ibv_sge sges[CHAIN];

    *posted = 0;
    while (*posted < num) {
        int count = num - *posted < CHAIN ? num - *posted : CHAIN;
        int rc;

        for (int i = 0; i < count; i++) {
            fill_wr(&chain[i], &sges[i], &wrs[*posted + i]);
            chain[i].next = i + 1 < count ? &chain[i + 1] : NULL;
        }
        bad = NULL;
        rc = ibv_post_send(qp, chain, &bad);
        if (rc) {
            if (bad)
                *posted += (int)(bad - chain);
            return rc;
        }
        *posted += count;
    }
    return 0;
}

/* Binds a type-2 memory window to `qp` over part of `mr`; its key becomes `new_rkey`, which must differ from
 * the window's present one in the low byte only. The completion is always signaled. */
int glue_post_bind_mw(struct ibv_qp *qp, uint64_t wr_id, struct ibv_mw *mw, uint32_t new_rkey,
                      struct ibv_mr *mr, uint64_t addr, uint64_t length, uint32_t access)
{
    struct ibv_send_wr wr = {
        .wr_id = wr_id,
        .opcode = IBV_WR_BIND_MW,
        .send_flags = IBV_SEND_SIGNALED,
    };
    struct ibv_send_wr *bad;

    wr.bind_mw.mw = mw;
    wr.bind_mw.rkey = new_rkey;
    wr.bind_mw.bind_info.mr = mr;
    wr.bind_mw.bind_info.addr = addr;
    wr.bind_mw.bind_info.length = length;
    wr.bind_mw.bind_info.mw_access_flags = access;
    return ibv_post_send(qp, &wr, &bad);
}

/* Revokes the key of a bound type-2 window. Signaled. */
int glue_post_local_inv(struct ibv_qp *qp, uint64_t wr_id, uint32_t rkey)
{
    struct ibv_send_wr wr = {
        .wr_id = wr_id,
        .opcode = IBV_WR_LOCAL_INV,
        .send_flags = IBV_SEND_SIGNALED,
    };
    struct ibv_send_wr *bad;

    wr.invalidate_rkey = rkey;
    return ibv_post_send(qp, &wr, &bad);
}

/* Links up to CHAIN receives of `wrs` into `chain`; returns how many. */
static int chain_recv(struct ibv_recv_wr *chain, struct ibv_sge *sges, const struct glue_recv_wr *wrs, int num)
{
    int count = num < CHAIN ? num : CHAIN;

    for (int i = 0; i < count; i++) {
        sges[i].addr = wrs[i].addr;
        sges[i].length = wrs[i].length;
        sges[i].lkey = wrs[i].lkey;
        chain[i].wr_id = wrs[i].wr_id;
        chain[i].sg_list = &sges[i];
        chain[i].num_sge = wrs[i].length ? 1 : 0;
        chain[i].next = i + 1 < count ? &chain[i + 1] : NULL;
    }
    return count;
}

/* Posts `num` receives; *posted as in glue_post_send_many(). Exactly one of `qp` and `srq` is given. */
static int post_recv(struct ibv_qp *qp, struct ibv_srq *srq, const struct glue_recv_wr *wrs, int num,
                     int *posted)
{
    struct ibv_recv_wr chain[CHAIN], *bad;
    struct ibv_sge sges[CHAIN];

    *posted = 0;
    while (*posted < num) {
        int count = chain_recv(chain, sges, wrs + *posted, num - *posted);
        int rc;

        bad = NULL;
        rc = qp ? ibv_post_recv(qp, chain, &bad) : ibv_post_srq_recv(srq, chain, &bad);
        if (rc) {
            if (bad)
                *posted += (int)(bad - chain);
            return rc;
        }
        *posted += count;
    }
    return 0;
}

/* Posts one receive from scalars: what follows every message that was taken. */
int glue_post_recv(struct ibv_qp *qp, uint64_t wr_id, uint64_t addr, uint32_t length, uint32_t lkey)
{
    struct glue_recv_wr wr = {.wr_id = wr_id, .addr = addr, .length = length, .lkey = lkey};
    int posted;

    return post_recv(qp, NULL, &wr, 1, &posted);
}

int glue_post_recv_many(struct ibv_qp *qp, const struct glue_recv_wr *wrs, int num, int *posted)
{
    return post_recv(qp, NULL, wrs, num, posted);
}

int glue_post_srq_recv(struct ibv_srq *srq, uint64_t wr_id, uint64_t addr, uint32_t length, uint32_t lkey)
{
    struct glue_recv_wr wr = {.wr_id = wr_id, .addr = addr, .length = length, .lkey = lkey};
    int posted;

    return post_recv(NULL, srq, &wr, 1, &posted);
}

int glue_post_srq_recv_many(struct ibv_srq *srq, const struct glue_recv_wr *wrs, int num, int *posted)
{
    return post_recv(NULL, srq, wrs, num, posted);
}

static void fill_wc(struct glue_wc *out, const struct ibv_wc *wc)
{
    memset(out, 0, sizeof(*out));
    out->wr_id = wc->wr_id;
    out->status = wc->status;
    out->qp_num = wc->qp_num;
    if (wc->status != IBV_WC_SUCCESS) {
        out->vendor_err = wc->vendor_err;
        return;
    }
    out->opcode = wc->opcode;
    out->byte_len = wc->byte_len;
    out->flags = wc->wc_flags;
    if (wc->wc_flags & IBV_WC_WITH_IMM)
        out->imm = ntohl(wc->imm_data);
}

/* Takes up to `max` completions. Returns how many, or -EIO. */
int glue_poll(struct ibv_cq *cq, struct glue_wc *out, int max)
{
    struct ibv_wc chunk[POLL_CHUNK];
    int total = 0;

    while (total < max) {
        int want = max - total < POLL_CHUNK ? max - total : POLL_CHUNK;
        int got = ibv_poll_cq(cq, want, chunk);

        if (got < 0)
            return total ? total : -EIO;
        for (int i = 0; i < got; i++)
            fill_wc(&out[total + i], &chunk[i]);
        total += got;
        if (got < want)
            break;
    }
    return total;
}

static uint64_t now_ns(void)
{
    struct timespec ts;

    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}

/* As glue_poll(), but keeps polling until a completion is there or `budget_ns` have passed. This is the only
 * place that waits; who calls it for more than microseconds holds no lock in it (not the GIL either). */
int glue_poll_spin(struct ibv_cq *cq, struct glue_wc *out, int max, uint64_t budget_ns)
{
    uint64_t deadline = now_ns() + budget_ns;
    int got;

    do {
        for (int i = 0; i < POLLS_PER_CLOCK; i++) {
            got = glue_poll(cq, out, max);
            if (got)
                return got;
        }
    } while (now_ns() < deadline);
    return 0;
}

int glue_arm(struct ibv_cq *cq, int solicited_only)
{
    int rc = ibv_req_notify_cq(cq, solicited_only);

    return rc < 0 ? EIO : rc;
}

/* Reads up to `max` events of a non-blocking channel, the cookie of each event's queue into `cookies`. Every
 * event counted here must be acknowledged (glue_ack_cq_events) before its queue is destroyed, and none that
 * was not. *num < max means that the channel is empty. */
int glue_drain_channel(struct glue_provider *p, struct ibv_comp_channel *channel, uint64_t *cookies, int max,
                       int *num)
{
    struct ibv_cq *cq;
    void *cookie;

    for (*num = 0; *num < max; (*num)++) {
        errno = 0;
        if (p->get_cq_event(channel, &cq, &cookie))
            return errno == EAGAIN || errno == EINTR ? 0 : (errno > 0 ? errno : EIO);
        cookies[*num] = (uintptr_t)cookie;
    }
    return 0;
}

/* Takes a mutex inside libibverbs: acknowledge in batches. */
void glue_ack_cq_events(struct glue_provider *p, struct ibv_cq *cq, unsigned int num)
{
    p->ack_cq_events(cq, num);
}
