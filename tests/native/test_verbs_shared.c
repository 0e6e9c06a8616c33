/* Two devices of one user on one host: what they do through the memory they share. */
#include "verbs_objects.h"

#include <unistd.h>

enum {
    BURST = 6000,       /* datagrams, ... */
    BURST_BYTES = 4096, /* ... of so many bytes: several times what a ring holds */
    QKEY = 0x1234,
    GRH = 40,
};

/* A device with what one queue pair needs. */
struct end {
    struct ibv_context *context;
    struct ibv_pd *pd;
    struct ibv_cq *cq;
    struct ibv_qp *qp;
    struct ibv_mr *mr;
    uint8_t *data;
    size_t size;
};

static void open_end(struct end *end, enum ibv_qp_type type, uint32_t depth, size_t size)
{
    struct ibv_qp_init_attr init = {
        .cap = {.max_send_wr = depth, .max_recv_wr = depth, .max_send_sge = 1, .max_recv_sge = 1},
        .qp_type = type,
        .sq_sig_all = 1,
    };

    memset(end, 0, sizeof(*end));
    end->context = open_device();
    end->pd = ibv_alloc_pd(end->context);
    REQUIRE(end->pd);
    end->cq = ibv_create_cq(end->context, 2 * (int)depth, NULL, NULL, 0);
    REQUIRE(end->cq);
    init.send_cq = init.recv_cq = end->cq;
    end->qp = ibv_create_qp(end->pd, &init);
    end->size = size;
    end->data = aligned_alloc(PAGE, size);
    REQUIRE(end->qp && end->data);
    memset(end->data, 0, size);
    end->mr = ibv_reg_mr(end->pd, end->data, size, ALL_RIGHTS);
    REQUIRE(end->mr);
}

static void close_end(struct end *end)
{
    ack_everything(end->context);
    CHECK(!ibv_destroy_qp(end->qp));
    CHECK(!ibv_destroy_cq(end->cq));
    CHECK(!ibv_dereg_mr(end->mr));
    CHECK(!ibv_dealloc_pd(end->pd));
    CHECK(!ibv_close_device(end->context));
    free(end->data);
}

static struct usroce_counters counters_of(const struct end *end)
{
    struct usroce_counters counters;

    REQUIRE(!usroce_query_counters(end->context, &counters, sizeof(counters)));
    return counters;
}

static struct ibv_ah_attr address_of(const struct end *end)
{
    struct ibv_ah_attr attr = {.is_global = 1, .port_num = 1, .grh = {.hop_limit = 64}};
    struct ibv_port_attr port;

    REQUIRE(!ibv_query_port(end->context, 1, &port));
    REQUIRE(!ibv_query_gid(end->context, 1, 0, &attr.grh.dgid));
    attr.dlid = port.lid;
    return attr;
}

static void connect_end(const struct end *end, const struct end *peer, enum ibv_qp_type type)
{
    bool reliable = type == IBV_QPT_RC;
    struct ibv_qp_attr attr = {
        .qp_state = IBV_QPS_RTR,
        .path_mtu = IBV_MTU_4096,
        .dest_qp_num = peer->qp->qp_num,
        .rq_psn = FIRST_PSN,
        .max_dest_rd_atomic = 16,
        .min_rnr_timer = 1,
        .ah_attr = address_of(peer),
    };

    REQUIRE(!ibv_modify_qp(end->qp, &attr,
                           IBV_QP_STATE | IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN |
                               (reliable ? IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER : 0)));
    attr = (struct ibv_qp_attr){
        .qp_state = IBV_QPS_RTS, .sq_psn = FIRST_PSN, .timeout = 17, .retry_cnt = 7, .rnr_retry = 7, .max_rd_atomic = 16};
    REQUIRE(!ibv_modify_qp(end->qp, &attr,
                           IBV_QP_STATE | IBV_QP_SQ_PSN |
                               (reliable ? IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY |
                                               IBV_QP_MAX_QP_RD_ATOMIC
                                         : 0)));
}

static void to_ready(const struct end *end)
{
    struct ibv_qp_attr attr = {.qp_state = IBV_QPS_INIT, .port_num = 1, .qkey = QKEY};

    REQUIRE(!ibv_modify_qp(end->qp, &attr, IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_QKEY));
    attr.qp_state = IBV_QPS_RTR;
    REQUIRE(!ibv_modify_qp(end->qp, &attr, IBV_QP_STATE));
    attr = (struct ibv_qp_attr){.qp_state = IBV_QPS_RTS, .sq_psn = 1};
    REQUIRE(!ibv_modify_qp(end->qp, &attr, IBV_QP_STATE | IBV_QP_SQ_PSN));
}

static void post_receive_of(const struct end *end, uint32_t length)
{
    struct ibv_sge sge = {.addr = (uintptr_t)end->data, .length = length, .lkey = end->mr->lkey};
    struct ibv_recv_wr wr = {.sg_list = &sge, .num_sge = 1}, *bad;

    REQUIRE(!ibv_post_recv(end->qp, &wr, &bad));
}

/* Whether the way between the two is memory; polls both until it is. `ah` is NULL for connected ones. */
static bool share_memory(const struct end *a, const struct end *b)
{
    time_t deadline = now() + PATIENCE;
    struct ibv_wc wc;

    while (!counters_of(a).shm_peers && now() < deadline) {
        CHECK(!ibv_poll_cq(a->cq, 1, &wc));
        CHECK(!ibv_poll_cq(b->cq, 1, &wc));
    }
    return counters_of(a).shm_peers == 1;
}

/* A burst that is far more than a ring holds, to a peer whose application only looks at the end. */
static void burst(enum ibv_qp_type type)
{
    struct end a, b;
    struct ibv_ah *ah = NULL;
    int received = 0, sent = 0;

    open_end(&a, type, BURST + 1, BURST_BYTES + GRH);
    open_end(&b, type, BURST + 1, BURST_BYTES + GRH);
    if (type == IBV_QPT_UD) {
        struct ibv_ah_attr attr = address_of(&b);

        to_ready(&a);
        to_ready(&b);
        ah = ibv_create_ah(a.pd, &attr);
        REQUIRE(ah);
    } else {
        struct ibv_qp_attr attr = {.qp_state = IBV_QPS_INIT, .port_num = 1};
        const int mask = IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS;

        REQUIRE(!ibv_modify_qp(a.qp, &attr, mask) && !ibv_modify_qp(b.qp, &attr, mask));
        connect_end(&a, &b, type);
        connect_end(&b, &a, type);
    }
    REQUIRE(share_memory(&a, &b));
    for (int i = 0; i < BURST; i++)
        post_receive_of(&b, BURST_BYTES + GRH);
    for (int i = 0; i < BURST; i++) {
        struct ibv_sge sge = {.addr = (uintptr_t)a.data, .length = BURST_BYTES, .lkey = a.mr->lkey};
        struct ibv_send_wr wr = {.opcode = IBV_WR_SEND, .sg_list = &sge, .num_sge = 1}, *bad;

        wr.wr.ud.ah = ah;
        wr.wr.ud.remote_qpn = b.qp->qp_num;
        wr.wr.ud.remote_qkey = QKEY;
        REQUIRE(!ibv_post_send(a.qp, &wr, &bad));
    }
    for (; sent < BURST && next_completion(a.cq).status == IBV_WC_SUCCESS; sent++)
        ;
    for (; received < BURST && next_completion(b.cq).status == IBV_WC_SUCCESS; received++)
        ;
    CHECK(sent == BURST && received == BURST);
    CHECK(!counters_of(&a).send_errors && counters_of(&a).shm_sent >= BURST);
    if (ah)
        CHECK(!ibv_destroy_ah(ah));
    close_end(&a);
    close_end(&b);
}

int main(void)
{
    burst(IBV_QPT_UC);
    burst(IBV_QPT_UD);
    return failures ? 1 : 0;
}
