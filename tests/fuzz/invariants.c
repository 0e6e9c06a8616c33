/* What must hold, whatever arrives: in memory, in the queue pairs, and in the end. */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "world.h"

enum { SETTLE_TURNS = 4000 };

static void print_qp(int index, const struct qp *qp)
{
    const struct requester *req = &qp->req;
    const struct responder *resp = &qp->resp;

    fprintf(stderr,
            "qp %d state %d: sq %u..%u..%u una %06x psn %06x sent %06x reads %u..%u window %u%s%s deadline %" PRId64
            "; epsn %06x jobs %u..%u%s%s\n",
            index, qp->base.state, qp->sq.tail, qp->sq.cursor, qp->sq.head, req->una, req->psn, req->sent_psn,
            req->reads_tail, req->reads_head, req->window, req->stalled ? " stalled" : "",
            req->rnr_waiting ? " rnr" : "", (int64_t)(qp->deadline - world.now), resp->epsn, resp->jobs_tail,
            resp->jobs_head, resp->gap ? " gap" : "", resp->ack_pending ? " owes" : "");
}

_Noreturn void world_die(const char *file, int line, const char *condition)
{
    fprintf(stderr, "%s:%d: not so: %s\n", file, line, condition);
    for (int i = 0; i < QPS && world.qps[i]; i++)
        print_qp(i, world_qp(i));
    abort();
}

/* --- memory -------------------------------------------------------------------------------------------------- */

static void check_bytes(const uint8_t *bytes, uint8_t value, size_t size)
{
    must(bytes[0] == value && memcmp(bytes, bytes + 1, size - 1) == 0);
}

void world_check_memory(void)
{
    const uint8_t *windowed = world.regions[WINDOWED];

    check_bytes(world.regions[READABLE], READABLE, REGION_BYTES);
    check_bytes(world.regions[FOREIGN], SECRET, REGION_BYTES);
    check_bytes(windowed, SECRET, WINDOW_1);
    check_bytes(windowed + WINDOW_2 + WINDOW_BYTES, SECRET, REGION_BYTES - WINDOW_2 - WINDOW_BYTES);
#if !defined(WITH_ASAN)
    for (int i = 0; i <= REGIONS; i++)
        check_bytes(world.guards[i], SECRET, GUARD_BYTES);
#endif
}

/* --- queue pairs --------------------------------------------------------------------------------------------- */

static void check_requester(const struct qp *qp)
{
    const struct requester *req = &qp->req;
    const struct sq *sq = &qp->sq;
    uint32_t posted = sq->head - sq->tail;

    must(posted <= qp->cap.max_send_wr && sq->cursor - sq->tail <= posted);
    must(req->reads_head - req->reads_tail <= MAX_RD_ATOMIC);
    must(psn_diff(req->una, req->psn) <= 0 && psn_diff(req->psn, req->sent_psn) <= 0);
    if (qp->base.state != IBV_QPS_RTS || qp->base.qp_type != IBV_QPT_RC)
        return;
    if (req->una != req->sent_psn) /* what is under way is waited for */
        must(qp->deadline != NEVER && qp->heap_index);
    else if (posted) /* nothing is: then it is about to go */
        must(!list_empty(&qp->in_tx));
}

static void check_responder(const struct qp *qp)
{
    const struct responder *resp = &qp->resp;

    must(resp->jobs_head - resp->jobs_tail <= resp->jobs_capacity);
    if (resp->jobs_head != resp->jobs_tail || (resp->ack_pending && list_empty(&qp->in_acks)))
        must(!list_empty(&qp->in_tx));
    if (qp->base.state == IBV_QPS_ERR)
        must(!resp->have_wqe && !resp->ack_pending);
}

static void check_qp(const struct qp *qp)
{
    if (qp->base.state == IBV_QPS_RESET)
        return;
    check_requester(qp);
    check_responder(qp);
    if (qp->base.state == IBV_QPS_ERR) {
        must(qp->sq.head == qp->sq.tail && rq_count(&qp->rq) == 0);
        must(list_empty(&qp->in_tx) && list_empty(&qp->in_acks));
    }
}

void world_check_queues(void)
{
    for (int i = 0; i < QPS; i++)
        check_qp(world_qp(i));
}

/* --- the end ------------------------------------------------------------------------------------------------- */

/* Work that must come to an end by itself. */
static bool is_busy(void)
{
    if (!cable_is_idle() || !list_empty(&world.ctx->tx_ready))
        return true;
    for (int i = 0; i < QPS; i++) {
        const struct qp *qp = world_qp(i);

        if (qp->base.state == IBV_QPS_RTS && qp->sq.tail != qp->sq.head)
            return true;
    }
    return false;
}

/* The next thing that happens by itself is a timer. */
static void let_time_pass(void)
{
    uint64_t next = NEVER;

    for (int i = 0; i < QPS; i++)
        if (world_qp(i)->deadline < next)
            next = world_qp(i)->deadline;
    if (next != NEVER && next > world.now)
        world.now = next;
}

void world_settle(void)
{
    int turns = 0;

    cable_progress(true);
    while (is_busy()) {
        must(turns++ < SETTLE_TURNS);
        if (!cable_count() && list_empty(&world.ctx->tx_ready))
            let_time_pass();
        cable_deliver_all();
        cable_progress(true);
        for (int i = 0; i < CQS; i++)
            world_poll(i);
    }
}
