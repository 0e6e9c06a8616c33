/* What the operations do: every opcode, what makes each fail and how it is told, order, flow control, states. Two
 * queue pairs of one device, connected to each other over loopback. */
#include "verbs_objects.h"

static struct ibv_sge piece(const struct bench *bench, const void *at, uint32_t length)
{
    return (struct ibv_sge){.addr = (uintptr_t)at, .length = length, .lkey = bench->mr->lkey};
}

static void post_receive_at(struct bench *bench, void *at, uint32_t length, uint64_t wr_id)
{
    struct ibv_sge sge = piece(bench, at, length);
    struct ibv_recv_wr wr = {.wr_id = wr_id, .sg_list = &sge, .num_sge = 1}, *bad;

    REQUIRE(!ibv_post_recv(bench->b, &wr, &bad));
}

static void fill(uint8_t *at, size_t length, uint8_t seed)
{
    for (size_t i = 0; i < length; i++)
        at[i] = (uint8_t)(seed + i * 7);
}

static void set_fault(struct bench *bench, double drop)
{
    struct usroce_fault fault = {.drop = drop, .seed = 1};

    REQUIRE(!usroce_set_fault(bench->context, drop > 0 ? &fault : NULL));
}

static void modify(struct ibv_qp *qp, enum ibv_qp_state state)
{
    struct ibv_qp_attr attr = {.qp_state = state};

    REQUIRE(!ibv_modify_qp(qp, &attr, IBV_QP_STATE));
}

/* --- every opcode -------------------------------------------------------------------------------------------- */

static void sends(struct bench *bench)
{
    struct ibv_sge from[2] = {piece(bench, memory, 100), piece(bench, memory + 1000, 2900)};
    struct ibv_send_wr wr = {.wr_id = 5, .opcode = IBV_WR_SEND, .sg_list = from, .num_sge = 2};
    struct ibv_sge to[2] = {piece(bench, memory + 2 * PAGE, 64), piece(bench, memory + 3 * PAGE, PAGE)};
    struct ibv_recv_wr receive = {.wr_id = 9, .sg_list = to, .num_sge = 2}, *bad;
    struct ibv_wc wc;

    fill(memory, PAGE, 3);
    REQUIRE(!ibv_post_recv(bench->b, &receive, &bad));
    CHECK(run(bench, &wr) == IBV_WC_SUCCESS);
    wc = next_completion(bench->peer_cq);
    CHECK(wc.status == IBV_WC_SUCCESS && wc.opcode == IBV_WC_RECV && wc.wr_id == 9 && wc.byte_len == 3000);
    CHECK(wc.qp_num == bench->b->qp_num && wc.src_qp == bench->a->qp_num && !wc.wc_flags);
    CHECK(!memcmp(memory + 2 * PAGE, memory, 64));
    CHECK(!memcmp(memory + 3 * PAGE, memory + 64, 36));
    CHECK(!memcmp(memory + 3 * PAGE + 36, memory + 1000, 2900));

    wr.opcode = IBV_WR_SEND_WITH_IMM;
    wr.imm_data = 0x01020304;
    wr.num_sge = 0;
    post_receive(bench, bench->b);
    CHECK(run(bench, &wr) == IBV_WC_SUCCESS);
    wc = next_completion(bench->peer_cq);
    CHECK(wc.byte_len == 0 && wc.wc_flags == IBV_WC_WITH_IMM && wc.imm_data == 0x01020304);
}

static void inline_data(struct bench *bench)
{
    uint8_t mine[16] = "not registered";
    struct ibv_sge sge = {.addr = (uintptr_t)mine, .length = sizeof(mine), .lkey = 0};
    struct ibv_qp_init_attr init = {.send_cq = bench->cq,
                                    .recv_cq = bench->cq,
                                    .cap = {.max_send_wr = 4, .max_recv_wr = 4, .max_inline_data = sizeof(mine)},
                                    .qp_type = IBV_QPT_RC};
    struct ibv_send_wr wr = {.opcode = IBV_WR_SEND, .sg_list = &sge, .num_sge = 1,
                             .send_flags = IBV_SEND_INLINE | IBV_SEND_SIGNALED}, *bad;
    struct ibv_qp *qp = ibv_create_qp(bench->pd, &init);

    REQUIRE(qp && init.cap.max_inline_data >= sizeof(mine));
    modify(bench->b, IBV_QPS_RESET);
    connect_pair(qp, bench->b);
    post_receive(bench, bench->b);
    REQUIRE(!ibv_post_send(qp, &wr, &bad));
    memset(mine, 0, sizeof(mine)); /* it was copied */
    CHECK(next_completion(bench->peer_cq).status == IBV_WC_SUCCESS);
    CHECK(!memcmp(memory + PAGE, "not registered", 15));
    CHECK(next_completion(bench->cq).status == IBV_WC_SUCCESS);
    sge.length = init.cap.max_inline_data + 1;
    CHECK(ibv_post_send(qp, &wr, &bad) == EINVAL && bad == &wr);
    CHECK(!ibv_destroy_qp(qp));
    reconnect(bench);
}

static void writes_and_reads(struct bench *bench)
{
    struct ibv_sge sge = piece(bench, memory, 3000);
    struct ibv_send_wr wr = {.opcode = IBV_WR_RDMA_WRITE, .sg_list = &sge, .num_sge = 1};
    struct ibv_wc wc;

    fill(memory, PAGE, 50);
    wr.wr.rdma.remote_addr = (uintptr_t)memory + 4 * PAGE;
    wr.wr.rdma.rkey = bench->mr->rkey;
    CHECK(run(bench, &wr) == IBV_WC_SUCCESS);
    CHECK(!memcmp(memory + 4 * PAGE, memory, 3000) && !memory[4 * PAGE + 3000]);

    wr.opcode = IBV_WR_RDMA_WRITE_WITH_IMM;
    wr.imm_data = 77;
    fill(memory, PAGE, 60);
    post_receive(bench, bench->b);
    CHECK(run(bench, &wr) == IBV_WC_SUCCESS);
    wc = next_completion(bench->peer_cq);
    CHECK(wc.opcode == IBV_WC_RECV_RDMA_WITH_IMM && wc.byte_len == 3000 && wc.imm_data == 77);
    CHECK(!memcmp(memory + 4 * PAGE, memory, 3000));

    wr.opcode = IBV_WR_RDMA_READ;
    memset(memory, 0, PAGE);
    CHECK(run(bench, &wr) == IBV_WC_SUCCESS);
    CHECK(!memcmp(memory, memory + 4 * PAGE, 3000));

    /* nothing at all needs no key */
    wr.num_sge = 0;
    wr.wr.rdma.rkey = 0;
    CHECK(run(bench, &wr) == IBV_WC_SUCCESS);
    wr.opcode = IBV_WR_RDMA_WRITE;
    CHECK(run(bench, &wr) == IBV_WC_SUCCESS);
}

static void atomics(struct bench *bench)
{
    struct ibv_sge sge = piece(bench, memory, 8);
    struct ibv_send_wr wr = {.opcode = IBV_WR_ATOMIC_FETCH_AND_ADD, .sg_list = &sge, .num_sge = 1}, *bad;
    uint64_t *word = (uint64_t *)(void *)(memory + PAGE), *old = (uint64_t *)(void *)memory;

    *word = 40;
    wr.wr.atomic.remote_addr = (uintptr_t)word;
    wr.wr.atomic.rkey = bench->mr->rkey;
    wr.wr.atomic.compare_add = 2;
    CHECK(run(bench, &wr) == IBV_WC_SUCCESS && *old == 40 && *word == 42);
    wr.opcode = IBV_WR_ATOMIC_CMP_AND_SWP;
    wr.wr.atomic.compare_add = 41;
    wr.wr.atomic.swap = 7;
    CHECK(run(bench, &wr) == IBV_WC_SUCCESS && *old == 42 && *word == 42);
    wr.wr.atomic.compare_add = 42;
    CHECK(run(bench, &wr) == IBV_WC_SUCCESS && *old == 42 && *word == 7);
    wr.wr.atomic.remote_addr += 4;
    CHECK(ibv_post_send(bench->a, &wr, &bad) == EINVAL);
}

/* A SEND that revokes the receiver's window. */
static void send_with_invalidate(struct bench *bench)
{
    struct ibv_mw *mw = ibv_alloc_mw(bench->pd, IBV_MW_TYPE_2);
    struct ibv_send_wr bind = {.opcode = IBV_WR_BIND_MW, .send_flags = IBV_SEND_SIGNALED}, *bad;
    struct ibv_send_wr send = {.opcode = IBV_WR_SEND_WITH_INV};
    struct ibv_wc wc;

    REQUIRE(mw);
    bind.bind_mw.mw = mw;
    bind.bind_mw.rkey = ibv_inc_rkey(mw->rkey);
    bind.bind_mw.bind_info = (struct ibv_mw_bind_info){.mr = bench->mr,
                                                       .addr = (uintptr_t)memory + PAGE,
                                                       .length = PAGE,
                                                       .mw_access_flags = IBV_ACCESS_REMOTE_WRITE};
    REQUIRE(!ibv_post_send(bench->b, &bind, &bad));
    CHECK(next_completion(bench->peer_cq).status == IBV_WC_SUCCESS);
    CHECK(write_to(bench, (uintptr_t)memory + PAGE, bind.bind_mw.rkey) == IBV_WC_SUCCESS);
    post_receive(bench, bench->b);
    send.invalidate_rkey = bind.bind_mw.rkey;
    CHECK(run(bench, &send) == IBV_WC_SUCCESS);
    wc = next_completion(bench->peer_cq);
    CHECK(wc.wc_flags == IBV_WC_WITH_INV && wc.invalidated_rkey == bind.bind_mw.rkey);
    CHECK(write_to(bench, (uintptr_t)memory + PAGE, bind.bind_mw.rkey) == IBV_WC_REM_ACCESS_ERR);
    CHECK(!ibv_dealloc_mw(mw));
    reconnect(bench);
}

/* --- order and completions ------------------------------------------------------------------------------------ */

static void unsignaled(struct bench *bench)
{
    struct ibv_sge sge = piece(bench, memory, 8);
    struct ibv_send_wr wr = {.opcode = IBV_WR_RDMA_WRITE, .sg_list = &sge, .num_sge = 1}, *bad;
    struct ibv_wc wc;

    wr.wr.rdma.remote_addr = (uintptr_t)memory + PAGE;
    wr.wr.rdma.rkey = bench->mr->rkey;
    for (uint64_t round = 0; round < 10; round++) {
        for (uint64_t i = 0; i < 32; i++) {
            wr.wr_id = round * 32 + i;
            wr.send_flags = i == 31 ? IBV_SEND_SIGNALED : 0;
            REQUIRE(!ibv_post_send(bench->a, &wr, &bad));
        }
        wc = next_completion(bench->cq);
        CHECK(wc.status == IBV_WC_SUCCESS && wc.wr_id == round * 32 + 31);
    }
    CHECK(ibv_poll_cq(bench->cq, 1, &wc) == 0);
}

/* Mixed requests complete in the order in which they were posted, fenced or not. */
static void order(struct bench *bench)
{
    static const enum ibv_wr_opcode opcodes[] = {IBV_WR_RDMA_READ, IBV_WR_RDMA_WRITE, IBV_WR_RDMA_READ,
                                                 IBV_WR_RDMA_WRITE_WITH_IMM, IBV_WR_SEND};
    struct ibv_sge sge = piece(bench, memory, 5000);
    struct ibv_send_wr wr = {.sg_list = &sge, .num_sge = 1}, *bad;

    for (uint64_t i = 0; i < 500; i++) {
        wr.wr_id = i;
        wr.opcode = opcodes[i % 5];
        wr.send_flags = IBV_SEND_SIGNALED | (i % 3 ? 0 : IBV_SEND_FENCE);
        wr.wr.rdma.remote_addr = (uintptr_t)memory + 4 * PAGE;
        wr.wr.rdma.rkey = bench->mr->rkey;
        if (i % 5 >= 3)
            post_receive_at(bench, memory + 2 * PAGE, 2 * PAGE, i);
        REQUIRE(!ibv_post_send(bench->a, &wr, &bad));
        if (i % 10 < 9)
            continue;
        for (uint64_t k = i - 9; k <= i; k++) {
            CHECK(next_completion(bench->cq).wr_id == k);
            if (k % 5 >= 3)
                CHECK(next_completion(bench->peer_cq).wr_id == k);
        }
    }
}

/* A message of many windows. */
static void long_messages(struct bench *bench)
{
    enum { SIZE = 40 << 20 };
    uint8_t *from = malloc(SIZE), *to = calloc(1, SIZE);
    struct ibv_mr *from_mr, *to_mr;
    struct ibv_sge sge = {.addr = (uintptr_t)from, .length = SIZE};
    struct ibv_send_wr wr = {.opcode = IBV_WR_RDMA_WRITE, .sg_list = &sge, .num_sge = 1};

    REQUIRE(from && to);
    fill(from, SIZE, 9);
    from_mr = ibv_reg_mr(bench->pd, from, SIZE, IBV_ACCESS_LOCAL_WRITE);
    to_mr = ibv_reg_mr(bench->pd, to, SIZE, ALL_RIGHTS);
    REQUIRE(from_mr && to_mr);
    sge.lkey = from_mr->lkey;
    wr.wr.rdma.remote_addr = (uintptr_t)to;
    wr.wr.rdma.rkey = to_mr->rkey;
    CHECK(run(bench, &wr) == IBV_WC_SUCCESS && !memcmp(from, to, SIZE));
    memset(from, 0, SIZE);
    wr.opcode = IBV_WR_RDMA_READ;
    CHECK(run(bench, &wr) == IBV_WC_SUCCESS && !memcmp(from, to, SIZE));
    CHECK(!ibv_dereg_mr(from_mr) && !ibv_dereg_mr(to_mr));
    free(from);
    free(to);
}

/* --- failures ----------------------------------------------------------------------------------------------------- */

static void expect_event(struct bench *bench, enum ibv_event_type type, const struct ibv_qp *qp)
{
    struct ibv_async_event event;

    if (!CHECK(find_event(bench->context, type, &event)))
        return;
    CHECK(event.element.qp == qp);
    ibv_ack_async_event(&event);
}

static enum ibv_qp_state state_of(struct ibv_qp *qp)
{
    struct ibv_qp_attr attr;
    struct ibv_qp_init_attr init;

    REQUIRE(!ibv_query_qp(qp, &attr, IBV_QP_STATE, &init));
    return attr.qp_state;
}

static void remote_access(struct bench *bench)
{
    CHECK(write_to(bench, (uintptr_t)memory, bench->mr->rkey ^ 0x100) == IBV_WC_REM_ACCESS_ERR);
    CHECK(state_of(bench->a) == IBV_QPS_ERR && state_of(bench->b) == IBV_QPS_ERR);
    expect_event(bench, IBV_EVENT_QP_ACCESS_ERR, bench->b);
    reconnect(bench);
}

/* The queue pair itself may forbid what the region allows. */
static void queue_pair_access(struct bench *bench)
{
    struct ibv_qp_attr attr = {.qp_access_flags = IBV_ACCESS_REMOTE_READ};

    REQUIRE(!ibv_modify_qp(bench->b, &attr, IBV_QP_ACCESS_FLAGS));
    CHECK(write_to(bench, (uintptr_t)memory + PAGE, bench->mr->rkey) == IBV_WC_REM_ACCESS_ERR);
    reconnect(bench);
}

static void too_long_for_the_receive(struct bench *bench)
{
    struct ibv_sge sge = piece(bench, memory, 3000);
    struct ibv_send_wr wr = {.opcode = IBV_WR_SEND, .sg_list = &sge, .num_sge = 1};

    post_receive_at(bench, memory + PAGE, 2999, 1);
    post_receive_at(bench, memory + PAGE, PAGE, 2);
    CHECK(run(bench, &wr) == IBV_WC_REM_INV_REQ_ERR);
    CHECK(next_completion(bench->peer_cq).status == IBV_WC_LOC_LEN_ERR);
    CHECK(next_completion(bench->peer_cq).status == IBV_WC_WR_FLUSH_ERR);
    expect_event(bench, IBV_EVENT_QP_REQ_ERR, bench->b);
    reconnect(bench);
}

static void receive_without_a_key(struct bench *bench)
{
    struct ibv_sge sge = {.addr = (uintptr_t)memory, .length = PAGE, .lkey = bench->mr->lkey ^ 1};
    struct ibv_recv_wr wr = {.sg_list = &sge, .num_sge = 1}, *bad;

    REQUIRE(!ibv_post_recv(bench->b, &wr, &bad));
    send_to_peer(bench, bench->a, IBV_SEND_SIGNALED);
    CHECK(next_completion(bench->cq).status == IBV_WC_REM_OP_ERR);
    CHECK(next_completion(bench->peer_cq).status == IBV_WC_LOC_PROT_ERR);
    reconnect(bench);
}

/* A request that fails here completes after those before it, and flushes those behind it. */
static void send_without_a_key(struct bench *bench)
{
    struct ibv_sge good = piece(bench, memory, 5000), bad_sge = good;
    struct ibv_send_wr wr[3] = {{.wr_id = 1}, {.wr_id = 2}, {.wr_id = 3}}, *bad;

    bad_sge.lkey ^= 1;
    for (int i = 0; i < 3; i++) {
        wr[i].opcode = i ? IBV_WR_RDMA_WRITE : IBV_WR_RDMA_READ;
        wr[i].sg_list = i == 1 ? &bad_sge : &good;
        wr[i].num_sge = 1;
        wr[i].send_flags = IBV_SEND_SIGNALED;
        wr[i].next = i < 2 ? &wr[i + 1] : NULL;
        wr[i].wr.rdma.remote_addr = (uintptr_t)memory + 4 * PAGE;
        wr[i].wr.rdma.rkey = bench->mr->rkey;
    }
    REQUIRE(!ibv_post_send(bench->a, wr, &bad));
    CHECK(next_completion(bench->cq).status == IBV_WC_SUCCESS);
    CHECK(next_completion(bench->cq).status == IBV_WC_LOC_PROT_ERR);
    CHECK(next_completion(bench->cq).status == IBV_WC_WR_FLUSH_ERR);
    reconnect(bench);
}

static void reads_that_were_not_agreed(struct bench *bench)
{
    struct ibv_sge sge = piece(bench, memory, 8);
    struct ibv_send_wr wr = {.opcode = IBV_WR_RDMA_READ, .sg_list = &sge, .num_sge = 1};
    struct ibv_qp_attr attr = {
        .qp_state = IBV_QPS_RTS, .sq_psn = FIRST_PSN, .timeout = 17, .retry_cnt = 7, .rnr_retry = 7, .max_rd_atomic = 0};

    modify(bench->a, IBV_QPS_RESET);
    to_init(bench->a);
    to_rtr(bench->a, bench->b);
    REQUIRE(!ibv_modify_qp(bench->a, &attr,
                           IBV_QP_STATE | IBV_QP_SQ_PSN | IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY |
                               IBV_QP_MAX_QP_RD_ATOMIC));
    CHECK(run(bench, &wr) == IBV_WC_LOC_QP_OP_ERR);
    reconnect(bench);
}

static void set_rts(struct bench *bench, uint8_t timeout, uint8_t retry_cnt, uint8_t rnr_retry)
{
    struct ibv_qp_attr attr = {.qp_state = IBV_QPS_RTS,
                               .sq_psn = FIRST_PSN,
                               .timeout = timeout,
                               .retry_cnt = retry_cnt,
                               .rnr_retry = rnr_retry,
                               .max_rd_atomic = 4};

    modify(bench->a, IBV_QPS_RESET);
    modify(bench->b, IBV_QPS_RESET);
    to_init(bench->a);
    to_init(bench->b);
    to_rtr(bench->a, bench->b);
    to_rtr(bench->b, bench->a);
    to_rts(bench->b);
    REQUIRE(!ibv_modify_qp(bench->a, &attr,
                           IBV_QP_STATE | IBV_QP_SQ_PSN | IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY |
                               IBV_QP_MAX_QP_RD_ATOMIC));
}

static void receiver_not_ready(struct bench *bench)
{
    struct usroce_counters before, after;
    struct ibv_wc wc;

    REQUIRE(!usroce_query_counters(bench->context, &before, sizeof(before)));
    set_rts(bench, 17, 7, 0);
    send_to_peer(bench, bench->a, IBV_SEND_SIGNALED);
    CHECK(next_completion(bench->cq).status == IBV_WC_RNR_RETRY_EXC_ERR);

    /* for ever (7): it goes on until there is a receive */
    set_rts(bench, 17, 7, 7);
    send_to_peer(bench, bench->a, IBV_SEND_SIGNALED);
    do {
        CHECK(!ibv_poll_cq(bench->cq, 1, &wc));
        REQUIRE(!usroce_query_counters(bench->context, &after, sizeof(after)));
    } while (after.rnr_naks_received < before.rnr_naks_received + 10);
    post_receive(bench, bench->b);
    CHECK(next_completion(bench->cq).status == IBV_WC_SUCCESS);
    CHECK(next_completion(bench->peer_cq).status == IBV_WC_SUCCESS);
    reconnect(bench);
}

static uint64_t now_us(void)
{
    struct timespec ts;

    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (uint64_t)ts.tv_sec * 1000000u + (uint64_t)ts.tv_nsec / 1000u;
}

/* Nobody answers: all fails after (retry_cnt + 1) * 4.096 us * 2^timeout, not before. */
static void peer_is_gone(struct bench *bench)
{
    uint64_t configured = 3 * (4096u << 14) / 1000u, start;

    set_rts(bench, 14, 2, 7);
    set_fault(bench, 1.0);
    start = now_us();
    for (int i = 0; i < 3; i++)
        send_to_peer(bench, bench->a, IBV_SEND_SIGNALED);
    CHECK(next_completion(bench->cq).status == IBV_WC_RETRY_EXC_ERR);
    CHECK(now_us() - start >= configured);
    CHECK(next_completion(bench->cq).status == IBV_WC_WR_FLUSH_ERR);
    CHECK(next_completion(bench->cq).status == IBV_WC_WR_FLUSH_ERR);
    set_fault(bench, 0);
    reconnect(bench);
}

/* Whoever takes a message and ends has acknowledged it: its sender succeeds. */
static void ends_after_a_message(struct bench *bench)
{
    static const enum ibv_qp_state ends[] = {IBV_QPS_ERR, IBV_QPS_RESET};
    struct ibv_wc wc;

    for (int i = 0; i < 20; i++) {
        set_rts(bench, 10, 1, 7);
        for (int k = 0; k < 20; k++)
            CHECK(!ibv_poll_cq(bench->peer_cq, 1, &wc)); /* by now the polling thread has the device to itself */
        post_receive(bench, bench->b);
        send_to_peer(bench, bench->a, IBV_SEND_SIGNALED);
        CHECK(next_completion(bench->peer_cq).status == IBV_WC_SUCCESS);
        modify(bench->b, ends[i % 2]);
        CHECK(next_completion(bench->cq).status == IBV_WC_SUCCESS);
    }
    reconnect(bench);
}

static void flush(struct bench *bench)
{
    struct ibv_wc wc;

    for (uint64_t i = 0; i < 3; i++)
        post_receive_at(bench, memory, 8, i);
    modify(bench->b, IBV_QPS_ERR);
    post_receive_at(bench, memory, 8, 3); /* posted afterwards: the same */
    for (uint64_t i = 0; i < 4; i++) {
        wc = next_completion(bench->peer_cq);
        CHECK(wc.status == IBV_WC_WR_FLUSH_ERR && wc.wr_id == i && wc.qp_num == bench->b->qp_num);
    }
    send_to_peer(bench, bench->b, 0);
    CHECK(next_completion(bench->peer_cq).status == IBV_WC_WR_FLUSH_ERR); /* unsignaled, but an error */
    reconnect(bench);
}

/* --- states ------------------------------------------------------------------------------------------------------ */

static void drain(struct bench *bench)
{
    struct ibv_qp_attr attr = {.qp_state = IBV_QPS_SQD, .en_sqd_async_notify = 1};
    struct ibv_mw *mw = ibv_alloc_mw(bench->pd, IBV_MW_TYPE_2);
    struct ibv_send_wr bind = {.opcode = IBV_WR_BIND_MW, .send_flags = IBV_SEND_SIGNALED}, *bad;
    struct ibv_wc wc;

    REQUIRE(mw);
    post_receive(bench, bench->b);
    send_to_peer(bench, bench->a, IBV_SEND_SIGNALED);
    REQUIRE(!ibv_modify_qp(bench->a, &attr, IBV_QP_STATE | IBV_QP_EN_SQD_ASYNC_NOTIFY));
    expect_event(bench, IBV_EVENT_SQ_DRAINED, bench->a);
    CHECK(next_completion(bench->cq).status == IBV_WC_SUCCESS);
    CHECK(next_completion(bench->peer_cq).status == IBV_WC_SUCCESS);

    /* what is posted now waits, and what it needs cannot go away under it */
    bind.bind_mw.mw = mw;
    bind.bind_mw.rkey = ibv_inc_rkey(mw->rkey);
    bind.bind_mw.bind_info = (struct ibv_mw_bind_info){
        .mr = bench->mr, .addr = (uintptr_t)memory, .length = 8, .mw_access_flags = IBV_ACCESS_REMOTE_READ};
    REQUIRE(!ibv_post_send(bench->a, &bind, &bad));
    CHECK(ibv_dealloc_mw(mw) == EBUSY);
    CHECK(ibv_dereg_mr(bench->mr) == EBUSY);
    post_receive(bench, bench->b);
    send_to_peer(bench, bench->a, IBV_SEND_SIGNALED);
    CHECK(!ibv_poll_cq(bench->cq, 1, &wc) && !ibv_poll_cq(bench->peer_cq, 1, &wc));
    modify(bench->a, IBV_QPS_RTS);
    CHECK(next_completion(bench->cq).status == IBV_WC_SUCCESS);
    CHECK(next_completion(bench->cq).status == IBV_WC_SUCCESS);
    CHECK(next_completion(bench->peer_cq).status == IBV_WC_SUCCESS);
    CHECK(!ibv_dealloc_mw(mw));
}

static void what_may_change(struct bench *bench)
{
    static const struct {
        struct ibv_qp_attr attr;
        int mask;
    } refused[] = {
        {{.qp_state = IBV_QPS_RTR}, IBV_QP_STATE},                                /* from RTS */
        {{.qp_state = IBV_QPS_INIT, .port_num = 1}, IBV_QP_STATE | IBV_QP_PORT},
        {{.qp_state = IBV_QPS_RTS, .path_mtu = IBV_MTU_256}, IBV_QP_STATE | IBV_QP_PATH_MTU},
        {{.dest_qp_num = 5}, IBV_QP_DEST_QPN},
        {{.min_rnr_timer = 32}, IBV_QP_MIN_RNR_TIMER},
        {{.qp_state = IBV_QPS_ERR, .min_rnr_timer = 1}, IBV_QP_STATE | IBV_QP_MIN_RNR_TIMER},
        {{.qp_state = IBV_QPS_RTS, .cur_qp_state = IBV_QPS_RTR}, IBV_QP_STATE | IBV_QP_CUR_STATE},
    };
    struct ibv_qp *fresh = create_qp(bench, bench->cq, NULL, IBV_QPT_RC);
    struct ibv_qp_attr attr = {.qp_state = IBV_QPS_INIT, .port_num = 2};
    struct ibv_qp_init_attr init;

    for (size_t i = 0; i < sizeof(refused) / sizeof(refused[0]); i++) {
        attr = refused[i].attr;
        CHECK(ibv_modify_qp(bench->a, &attr, refused[i].mask) == EINVAL);
        CHECK(state_of(bench->a) == IBV_QPS_RTS);
    }
    attr = (struct ibv_qp_attr){.qp_state = IBV_QPS_INIT, .port_num = 2};
    CHECK(ibv_modify_qp(fresh, &attr, IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS) == EINVAL);
    attr.port_num = 1;
    CHECK(ibv_modify_qp(fresh, &attr, IBV_QP_STATE | IBV_QP_PORT) == EINVAL); /* something is missing */
    CHECK(state_of(fresh) == IBV_QPS_RESET);
    CHECK(!ibv_destroy_qp(fresh));

    REQUIRE(!ibv_query_qp(bench->a, &attr, 0, &init));
    CHECK(attr.path_mtu == IBV_MTU_1024 && attr.dest_qp_num == bench->b->qp_num && attr.rq_psn == FIRST_PSN);
    CHECK(attr.sq_psn == FIRST_PSN && attr.timeout == 17 && attr.retry_cnt == 7 && attr.rnr_retry == 7);
    CHECK(attr.max_rd_atomic == 4 && attr.max_dest_rd_atomic == 4 && attr.min_rnr_timer == 1);
    CHECK(attr.ah_attr.is_global && attr.ah_attr.grh.hop_limit == 64 && attr.port_num == 1);
    CHECK(init.send_cq == bench->cq && init.qp_type == IBV_QPT_RC && init.cap.max_send_wr == attr.cap.max_send_wr);
}

static void what_may_be_posted(struct bench *bench)
{
    struct ibv_sge sges[3] = {piece(bench, memory, 8), piece(bench, memory, 8), piece(bench, memory, 8)};
    struct ibv_send_wr wr = {.opcode = IBV_WR_SEND, .sg_list = sges, .num_sge = 3}, *bad = NULL;
    struct ibv_recv_wr receive = {.sg_list = sges, .num_sge = 3}, *bad_receive = NULL;
    struct ibv_qp *fresh = create_qp(bench, bench->cq, NULL, IBV_QPT_UC);
    struct ibv_qp_attr attr;
    struct ibv_qp_init_attr init;

    CHECK(ibv_post_send(bench->a, &wr, &bad) == EINVAL && bad == &wr);
    CHECK(ibv_post_recv(bench->b, &receive, &bad_receive) == EINVAL && bad_receive == &receive);
    wr.num_sge = receive.num_sge = 1;
    CHECK(ibv_post_send(fresh, &wr, &bad) == EINVAL);
    CHECK(ibv_post_recv(fresh, &receive, &bad_receive) == EINVAL);
    to_init(fresh);
    CHECK(!ibv_post_recv(fresh, &receive, &bad_receive) && ibv_post_send(fresh, &wr, &bad) == EINVAL);
    CHECK(!ibv_destroy_qp(fresh));

    /* full: held in SQD, so that nothing leaves */
    REQUIRE(!ibv_query_qp(bench->a, &attr, 0, &init));
    modify(bench->a, IBV_QPS_SQD);
    for (uint32_t i = 0; i < init.cap.max_send_wr; i++)
        REQUIRE(!ibv_post_send(bench->a, &wr, &bad));
    CHECK(ibv_post_send(bench->a, &wr, &bad) == ENOMEM && bad == &wr);
    modify(bench->a, IBV_QPS_RESET);
    reconnect(bench);
}

/* --- other services and interfaces ----------------------------------------------------------------------------- */

static void connect_unreliable(struct ibv_qp *qp, const struct ibv_qp *peer)
{
    struct ibv_port_attr port;
    struct ibv_qp_attr attr = {.qp_state = IBV_QPS_RTR,
                               .path_mtu = IBV_MTU_1024,
                               .dest_qp_num = peer->qp_num,
                               .rq_psn = FIRST_PSN,
                               .ah_attr = {.is_global = 1, .port_num = 1, .grh = {.hop_limit = 64}}};

    to_init(qp);
    REQUIRE(!ibv_query_port(qp->context, 1, &port) && !ibv_query_gid(qp->context, 1, 0, &attr.ah_attr.grh.dgid));
    attr.ah_attr.dlid = port.lid;
    REQUIRE(!ibv_modify_qp(qp, &attr,
                           IBV_QP_STATE | IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN));
    attr.qp_state = IBV_QPS_RTS;
    attr.sq_psn = FIRST_PSN;
    REQUIRE(!ibv_modify_qp(qp, &attr, IBV_QP_STATE | IBV_QP_SQ_PSN));
}

static void unreliable(struct bench *bench)
{
    struct ibv_qp *a = create_qp(bench, bench->cq, NULL, IBV_QPT_UC);
    struct ibv_qp *b = create_qp(bench, bench->peer_cq, NULL, IBV_QPT_UC);
    struct ibv_sge sge = piece(bench, memory, 3000), to = piece(bench, memory + 2 * PAGE, 2 * PAGE);
    struct ibv_send_wr wr = {.sg_list = &sge, .num_sge = 1, .send_flags = IBV_SEND_SIGNALED}, *bad;
    struct ibv_recv_wr receive = {.sg_list = &to, .num_sge = 1}, *bad_receive;
    struct ibv_wc wc;

    connect_unreliable(a, b);
    connect_unreliable(b, a);
    fill(memory, PAGE, 21);
    wr.opcode = IBV_WR_SEND_WITH_IMM;
    wr.imm_data = 3;
    REQUIRE(!ibv_post_send(a, &wr, &bad)); /* nobody waits for it: it is lost, and that is no error */
    CHECK(next_completion(bench->cq).status == IBV_WC_SUCCESS);
    CHECK(!ibv_poll_cq(bench->peer_cq, 1, &wc));
    REQUIRE(!ibv_post_recv(b, &receive, &bad_receive));
    REQUIRE(!ibv_post_send(a, &wr, &bad));
    CHECK(next_completion(bench->cq).status == IBV_WC_SUCCESS);
    wc = next_completion(bench->peer_cq);
    CHECK(wc.status == IBV_WC_SUCCESS && wc.byte_len == 3000 && wc.imm_data == 3);
    CHECK(!memcmp(memory + 2 * PAGE, memory, 3000));
    wr.opcode = IBV_WR_RDMA_WRITE_WITH_IMM;
    wr.wr.rdma.remote_addr = (uintptr_t)memory + 5 * PAGE;
    wr.wr.rdma.rkey = bench->mr->rkey;
    REQUIRE(!ibv_post_recv(b, &receive, &bad_receive));
    REQUIRE(!ibv_post_send(a, &wr, &bad));
    CHECK(next_completion(bench->cq).status == IBV_WC_SUCCESS);
    CHECK(next_completion(bench->peer_cq).opcode == IBV_WC_RECV_RDMA_WITH_IMM);
    CHECK(!memcmp(memory + 5 * PAGE, memory, 3000));
    wr.opcode = IBV_WR_RDMA_READ;
    CHECK(ibv_post_send(a, &wr, &bad) == EINVAL);
    CHECK(!ibv_destroy_qp(a) && !ibv_destroy_qp(b));
}

/* The same operations through ibv_wr_*. */
static void work_request_interface(struct bench *bench)
{
    struct ibv_qp_init_attr_ex init = {
        .send_cq = bench->cq,
        .recv_cq = bench->cq,
        .cap = {.max_send_wr = 8, .max_recv_wr = 1, .max_send_sge = 2, .max_inline_data = 32},
        .qp_type = IBV_QPT_RC,
        .comp_mask = IBV_QP_INIT_ATTR_PD | IBV_QP_INIT_ATTR_SEND_OPS_FLAGS,
        .pd = bench->pd,
        .send_ops_flags = IBV_QP_EX_WITH_SEND | IBV_QP_EX_WITH_RDMA_WRITE | IBV_QP_EX_WITH_RDMA_READ |
                          IBV_QP_EX_WITH_ATOMIC_FETCH_AND_ADD | IBV_QP_EX_WITH_SEND_WITH_IMM,
    };
    struct ibv_qp *qp = ibv_create_qp_ex(bench->context, &init);
    struct ibv_qp_ex *ex;
    struct ibv_sge two[2] = {piece(bench, memory, 10), piece(bench, memory + 10, 20)};
    uint64_t *word = (uint64_t *)(void *)(memory + 6 * PAGE);

    REQUIRE(qp);
    ex = ibv_qp_to_qp_ex(qp);
    REQUIRE(ex && !ibv_qp_to_qp_ex(bench->b));
    modify(bench->b, IBV_QPS_RESET);
    connect_pair(qp, bench->b);
    fill(memory, PAGE, 33);
    *word = 5;
    post_receive(bench, bench->b);
    ibv_wr_start(ex);
    ex->wr_flags = IBV_SEND_SIGNALED;
    ex->wr_id = 1;
    ibv_wr_rdma_write(ex, bench->mr->rkey, (uintptr_t)memory + 4 * PAGE);
    ibv_wr_set_sge_list(ex, 2, two);
    ex->wr_id = 2;
    ibv_wr_rdma_read(ex, bench->mr->rkey, (uintptr_t)memory + 4 * PAGE);
    ibv_wr_set_sge(ex, bench->mr->lkey, (uintptr_t)memory + 5 * PAGE, 30);
    ex->wr_id = 3;
    ibv_wr_atomic_fetch_add(ex, bench->mr->rkey, (uintptr_t)word, 4);
    ibv_wr_set_sge(ex, bench->mr->lkey, (uintptr_t)memory + 7 * PAGE, 8);
    ex->wr_id = 4;
    ibv_wr_send_imm(ex, 11);
    ibv_wr_set_inline_data(ex, (void *)(uintptr_t) "hello", 5);
    CHECK(!ibv_wr_complete(ex));
    for (uint64_t i = 1; i <= 4; i++) {
        struct ibv_wc wc = next_completion(bench->cq);

        CHECK(wc.status == IBV_WC_SUCCESS && wc.wr_id == i);
    }
    CHECK(!memcmp(memory + 4 * PAGE, memory, 30) && !memcmp(memory + 5 * PAGE, memory, 30));
    CHECK(*word == 9 && *(uint64_t *)(void *)(memory + 7 * PAGE) == 5);
    CHECK(next_completion(bench->peer_cq).imm_data == 11 && !memcmp(memory + PAGE, "hello", 5));

    /* a batch with a mistake in it does nothing at all */
    ibv_wr_start(ex);
    ibv_wr_rdma_write(ex, bench->mr->rkey, (uintptr_t)memory + 4 * PAGE);
    ibv_wr_set_sge(ex, bench->mr->lkey, (uintptr_t)memory + 7 * PAGE, 8);
    ibv_wr_send(ex);
    ibv_wr_set_inline_data(ex, memory, 33);
    CHECK(ibv_wr_complete(ex) == EINVAL);
    ibv_wr_start(ex);
    for (int i = 0; i < 9; i++)
        ibv_wr_send(ex);
    CHECK(ibv_wr_complete(ex) == ENOMEM);
    ibv_wr_start(ex);
    ibv_wr_send(ex);
    ibv_wr_abort(ex);
    CHECK(!memcmp(memory + 4 * PAGE, memory, 30));
    CHECK(!ibv_destroy_qp(qp));
    reconnect(bench);
}

/* One queue feeds two queue pairs; each is told when an error has taken its last receive. */
static void shared_receives(struct bench *bench)
{
    struct ibv_srq_init_attr init = {.attr = {.max_wr = 16, .max_sge = 1}};
    struct ibv_srq *srq = ibv_create_srq(bench->pd, &init);
    struct ibv_sge to = piece(bench, memory + PAGE, PAGE);
    struct ibv_recv_wr receive = {.sg_list = &to, .num_sge = 1}, *bad;
    struct ibv_qp *served;

    REQUIRE(srq);
    served = create_qp(bench, bench->peer_cq, srq, IBV_QPT_RC);
    modify(bench->a, IBV_QPS_RESET);
    connect_pair(bench->a, served);
    for (receive.wr_id = 0; receive.wr_id < 3; receive.wr_id++)
        REQUIRE(!ibv_post_srq_recv(srq, &receive, &bad));
    CHECK(ibv_post_recv(served, &receive, &bad) == EINVAL);
    for (uint64_t i = 0; i < 3; i++) {
        send_to_peer(bench, bench->a, IBV_SEND_SIGNALED);
        CHECK(next_completion(bench->cq).status == IBV_WC_SUCCESS);
        CHECK(next_completion(bench->peer_cq).wr_id == i);
    }
    modify(served, IBV_QPS_ERR);
    expect_event(bench, IBV_EVENT_QP_LAST_WQE_REACHED, served);
    CHECK(!ibv_destroy_qp(served) && !ibv_destroy_srq(srq));
    reconnect(bench);
}

/* Everything again over a link that loses, doubles, delays and damages. */
static void over_a_bad_link(struct bench *bench)
{
    struct usroce_fault fault = {
        .drop = 0.05, .duplicate = 0.05, .reorder = 0.05, .corrupt = 0.05, .delay = 0.02, .delay_us = 500, .seed = 3};

    REQUIRE(!usroce_set_fault(bench->context, &fault));
    for (int i = 0; i < 5; i++) {
        sends(bench);
        writes_and_reads(bench);
        atomics(bench);
        unsignaled(bench);
        order(bench);
    }
    set_fault(bench, 0);
}

int main(void)
{
    static void (*const tests[])(struct bench *) = {
        sends, inline_data, writes_and_reads, atomics, send_with_invalidate, unsignaled, order, long_messages,
        remote_access, queue_pair_access, too_long_for_the_receive, receive_without_a_key, send_without_a_key,
        reads_that_were_not_agreed, receiver_not_ready, peer_is_gone, ends_after_a_message, flush, drain, what_may_change,
        what_may_be_posted, unreliable, work_request_interface, shared_receives, over_a_bad_link,
    };

    for (size_t i = 0; i < sizeof(tests) / sizeof(tests[0]); i++) {
        struct bench bench;

        open_bench(&bench, NULL);
        tests[i](&bench);
        close_bench(&bench);
    }
    return failures ? 1 : 0;
}
