/* See world.h. */
#define _GNU_SOURCE /* MAP_ANONYMOUS */
#include "world.h"

#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#if defined(WITH_ASAN)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, size) ((void)(address), (void)(size))
#endif

enum {
    STRANGER_PORT = 40000,
    QKEY = 0x11111111,
    CQ_LARGE = 512,
    CQ_SMALL = 4,
};

struct world world;

struct endpoint world_endpoint(void)
{
    return world.ctx->gids[0].link->local;
}

/* --- clock and chance ---------------------------------------------------------------------------------------- */

static uint32_t chance;

uint64_t __wrap_now_ns(void);
uint32_t __wrap_random_u32(void);

uint64_t __wrap_now_ns(void)
{
    return world.now;
}

uint32_t __wrap_random_u32(void)
{
    uint32_t mixed = chance += 0x9e3779b9u;

    mixed = (mixed ^ mixed >> 16) * 0x85ebca6bu;
    mixed = (mixed ^ mixed >> 13) * 0xc2b2ae35u;
    return mixed ^ mixed >> 16;
}

/* --- memory -------------------------------------------------------------------------------------------------- */

static void make_arena(void)
{
    size_t size = (size_t)REGIONS * (GUARD_BYTES + REGION_BYTES) + GUARD_BYTES;
    uint8_t *arena = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    must(arena != MAP_FAILED);
    memset(arena, SECRET, size);
    for (int i = 0; i <= REGIONS; i++) {
        world.guards[i] = arena + (size_t)i * (GUARD_BYTES + REGION_BYTES);
        ASAN_POISON_MEMORY_REGION(world.guards[i], GUARD_BYTES);
    }
    for (int i = 0; i < REGIONS; i++)
        world.regions[i] = world.guards[i] + GUARD_BYTES;
}

static bool is_readable(int region)
{
    return region == OPEN || region == READABLE || region == VOLATILE;
}

static void fill_region(int region)
{
    memset(world.regions[region], is_readable(region) ? region : SECRET, REGION_BYTES);
    if (region == WINDOWED)
        memset(world.regions[region] + WINDOW_1, region, 2 * WINDOW_BYTES);
}

void world_register(enum region region)
{
    static const int changing = IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_ATOMIC;
    static const int rights[REGIONS] = {
        [OPEN] = changing | IBV_ACCESS_REMOTE_READ | IBV_ACCESS_MW_BIND,
        [LOCAL] = IBV_ACCESS_LOCAL_WRITE,
        [READABLE] = IBV_ACCESS_REMOTE_READ,
        [WINDOWED] = IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_MW_BIND,
        [FOREIGN] = changing | IBV_ACCESS_REMOTE_READ,
        [VOLATILE] = changing | IBV_ACCESS_REMOTE_READ,
    };

    if (world.mrs[region])
        must(ibv_dereg_mr(world.mrs[region]) == 0);
    world.mrs[region] = ibv_reg_mr_iova2(region == FOREIGN ? world.other_pd : world.pd, world.regions[region],
                                         REGION_BYTES, (uintptr_t)world.regions[region], rights[region]);
    must(world.mrs[region]);
}

static void post_bind(int qp, struct ibv_mw *mw, uint64_t offset)
{
    struct ibv_send_wr *bad, wr = {.opcode = IBV_WR_BIND_MW};

    if (!world_next_id(qp, false, &wr.wr_id))
        return;
    wr.bind_mw.mw = mw;
    wr.bind_mw.rkey = mw->rkey = ibv_inc_rkey(mw->rkey);
    wr.bind_mw.bind_info = (struct ibv_mw_bind_info){
        .mr = world.mrs[WINDOWED],
        .addr = (uintptr_t)world.regions[WINDOWED] + offset,
        .length = WINDOW_BYTES,
        .mw_access_flags = IBV_ACCESS_REMOTE_READ | IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_ATOMIC,
    };
    if (ibv_post_send(world.qps[qp], &wr, &bad))
        world_return_id();
}

void world_bind(int qp)
{
    post_bind(qp, world.windows[1], WINDOW_2);
}

/* --- queue pairs --------------------------------------------------------------------------------------------- */

/* 0 and 1, 2 and 3, 7 and 8 are connected with each other; the others have a peer that only the fuzzer speaks for. */
static const struct {
    enum ibv_qp_type type;
    enum ibv_qp_state state;
    int peer; /* -1: none of ours */
    enum ibv_mtu mtu;
    uint8_t reads, peer_reads;
    bool shared;     /* receives from the SRQ */
    uint32_t sends, receives;
    int send_cq, recv_cq;
    uint32_t psn;    /* of the send queue */
    bool known_port; /* the peer says its UDP port */
} specs[QPS] = {
    {IBV_QPT_RC, IBV_QPS_RTS, 1, IBV_MTU_1024, 4, 4, false, 16, 16, 0, 0, 0xfffff0, true},
    {IBV_QPT_RC, IBV_QPS_RTS, 0, IBV_MTU_1024, 4, 4, false, 16, 16, 0, 0, 0, true},
    {IBV_QPT_RC, IBV_QPS_RTS, 3, IBV_MTU_256, 1, 4, false, 64, 2, 0, 0, 0x7ffffe, true},
    {IBV_QPT_RC, IBV_QPS_RTS, 2, IBV_MTU_256, 4, 1, true, 4, 0, 0, 0, 0x800000, true},
    {IBV_QPT_RC, IBV_QPS_RTS, -1, IBV_MTU_4096, 2, 2, false, 8, 3, 1, 0, 0xffffff, true},
    {IBV_QPT_RC, IBV_QPS_RTR, -1, IBV_MTU_2048, 0, 2, false, 8, 8, 0, 1, 7, false},
    {IBV_QPT_RC, IBV_QPS_RTS, -1, IBV_MTU_512, 0, 0, true, 8, 0, 1, 1, 0x123456, false},
    {IBV_QPT_UC, IBV_QPS_RTS, 8, IBV_MTU_512, 0, 0, false, 16, 16, 0, 0, 0xfffffe, true},
    {IBV_QPT_UC, IBV_QPS_RTS, 7, IBV_MTU_512, 0, 0, true, 4, 0, 0, 0, 5, true},
    {IBV_QPT_UD, IBV_QPS_RTS, -1, IBV_MTU_4096, 0, 0, false, 16, 16, 0, 0, 0xffffff, true},
    {IBV_QPT_UD, IBV_QPS_RTS, -1, IBV_MTU_4096, 0, 0, true, 16, 0, 1, 1, 0, true},
};

static void create_qp(int index)
{
    struct ibv_qp_init_attr_ex attr = {
        .send_cq = world.cqs[specs[index].send_cq],
        .recv_cq = world.cqs[specs[index].recv_cq],
        .srq = specs[index].shared ? world.srq : NULL,
        .cap = {.max_send_wr = specs[index].sends, .max_recv_wr = specs[index].receives,
                .max_send_sge = 4, .max_recv_sge = 4, .max_inline_data = 64},
        .qp_type = specs[index].type,
        .comp_mask = IBV_QP_INIT_ATTR_PD,
        .pd = world.pd,
    };

    if (index == 0) {
        attr.comp_mask |= IBV_QP_INIT_ATTR_SEND_OPS_FLAGS;
        attr.send_ops_flags = IBV_QP_EX_WITH_SEND | IBV_QP_EX_WITH_RDMA_READ | IBV_QP_EX_WITH_RDMA_WRITE;
    }
    world.qps[index] = ibv_create_qp_ex(&world.ctx->verbs.context, &attr);
    must(world.qps[index]);
}

static struct ibv_ah_attr address(bool known_port, bool ours)
{
    struct ibv_ah_attr attr = {
        .is_global = 1,
        .port_num = 1,
        .dlid = known_port ? (ours ? ROCE_UDP_PORT : STRANGER_PORT) : 0,
        .grh = {.hop_limit = 64},
    };

    attr.grh.dgid = world_endpoint().gid;
    return attr;
}

static void to_init(int index)
{
    struct ibv_qp_attr attr = {
        .qp_state = IBV_QPS_INIT,
        .port_num = 1,
        .qkey = QKEY,
        .qp_access_flags = IBV_ACCESS_REMOTE_READ | IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_ATOMIC,
    };
    int flags = specs[index].type == IBV_QPT_UD ? IBV_QP_QKEY : IBV_QP_ACCESS_FLAGS;

    if (specs[index].type == IBV_QPT_RC && !specs[index].peer_reads)
        attr.qp_access_flags = 0;
    must(ibv_modify_qp(world.qps[index], &attr, IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | flags) == 0);
}

static void to_rtr(int index)
{
    int peer = specs[index].peer, mask = IBV_QP_STATE;
    struct ibv_qp_attr attr = {
        .qp_state = IBV_QPS_RTR,
        .path_mtu = specs[index].mtu,
        .rq_psn = peer < 0 ? 0xfffffd : specs[peer].psn,
        .dest_qp_num = peer < 0 ? 0x234567 : world.qps[peer]->qp_num,
        .ah_attr = address(specs[index].known_port, peer >= 0),
        .max_dest_rd_atomic = specs[index].peer_reads,
        .min_rnr_timer = 1,
    };

    if (specs[index].type != IBV_QPT_UD)
        mask |= IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN;
    if (specs[index].type == IBV_QPT_RC)
        mask |= IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER;
    must(ibv_modify_qp(world.qps[index], &attr, mask) == 0);
}

static void to_rts(int index)
{
    int mask = IBV_QP_STATE | IBV_QP_SQ_PSN;
    struct ibv_qp_attr attr = {
        .qp_state = IBV_QPS_RTS,
        .sq_psn = specs[index].psn,
        .timeout = 8, /* about 1 ms */
        .retry_cnt = 3,
        .rnr_retry = 3,
        .max_rd_atomic = specs[index].reads,
    };

    if (specs[index].type == IBV_QPT_RC)
        mask |= IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY | IBV_QP_MAX_QP_RD_ATOMIC;
    must(ibv_modify_qp(world.qps[index], &attr, mask) == 0);
}

void world_connect(int index)
{
    to_init(index);
    to_rtr(index);
    if (specs[index].state == IBV_QPS_RTS)
        to_rts(index);
}

static void reset_qp(int index)
{
    struct ibv_qp_attr attr = {.qp_state = IBV_QPS_RESET};

    must(ibv_modify_qp(world.qps[index], &attr, IBV_QP_STATE) == 0);
}

void world_replace_qp(int index)
{
    must(ibv_destroy_qp(world.qps[index]) == 0);
    create_qp(index);
    world_connect(index);
}

/* --- completions --------------------------------------------------------------------------------------------- */

bool world_next_id(int qp, bool receive, uint64_t *id)
{
    bool shared = receive && specs[qp].shared;

    if (world.num_posted == MAX_POSTED)
        return false;
    world.posted[world.num_posted] = (struct posted){.qp = (uint8_t)qp, .receive = receive, .shared = shared};
    *id = world.num_posted++;
    return true;
}

void world_return_id(void)
{
    world.num_posted--;
}

/* Once at most, on its own queue pair, and in order. */
static void check_completion(const struct ibv_wc *wc)
{
    struct posted *posted = &world.posted[wc->wr_id];
    uint32_t *last;

    must(wc->wr_id < world.num_posted && !posted->completed);
    posted->completed = true;
    if (posted->shared)
        return;
    must(world.qps[posted->qp]->qp_num == wc->qp_num);
    last = &world.last_completed[posted->qp][posted->receive];
    must(*last <= wc->wr_id);
    *last = (uint32_t)wc->wr_id;
}

void world_poll(int cq)
{
    struct ibv_wc wc[16];
    int count = ibv_poll_cq(world.cqs[cq], 16, wc);

    for (int i = 0; i < count; i++)
        check_completion(&wc[i]);
}

static void drain_events(void)
{
    struct ibv_async_event event;
    struct ibv_cq *cq;
    void *unused;

    while (ibv_get_cq_event(world.channel, &cq, &unused) == 0)
        ibv_ack_cq_events(cq, 1);
    while (ibv_get_async_event(&world.ctx->verbs.context, &event) == 0)
        ibv_ack_async_event(&event);
}

/* --- beginning ----------------------------------------------------------------------------------------------- */

static struct context *open_device(void)
{
    struct ibv_device **list;
    struct ibv_context *context;

    must(usroce_set_option("address", "127.0.0.1") == 0);
    list = ibv_get_device_list(NULL);
    must(list && list[0]);
    context = ibv_open_device(list[0]);
    must(context);
    ibv_free_device_list(list);
    must(fcntl(context->async_fd, F_SETFL, O_NONBLOCK) == 0);
    return context_of(context);
}

static void make_queues(void)
{
    struct ibv_context *context = &world.ctx->verbs.context;
    struct ibv_srq_init_attr srq = {.attr = {.max_wr = 8, .max_sge = 4}};

    world.channel = ibv_create_comp_channel(context);
    must(world.channel && fcntl(world.channel->fd, F_SETFL, O_NONBLOCK) == 0);
    world.cqs[0] = ibv_create_cq(context, CQ_LARGE, NULL, world.channel, 0);
    world.cqs[1] = ibv_create_cq(context, CQ_SMALL, NULL, world.channel, 0);
    must(world.cqs[0] && world.cqs[1]);
    world.srq = ibv_create_srq(world.pd, &srq);
    must(world.srq);
}

void world_open(void)
{
    struct ibv_ah_attr attr;

    if (world.ctx)
        return;
    world.ctx = open_device();
    cable_attach(world.ctx);
    world.ctx->thread_running = true; /* it is not: then none is started */
    world.pd = ibv_alloc_pd(&world.ctx->verbs.context);
    world.other_pd = ibv_alloc_pd(&world.ctx->verbs.context);
    must(world.pd && world.other_pd);
    make_arena();
    make_queues();
    for (int i = 0; i < REGIONS; i++)
        world_register((enum region)i);
    world.windows[0] = ibv_alloc_mw(world.pd, IBV_MW_TYPE_1);
    world.windows[1] = ibv_alloc_mw(world.pd, IBV_MW_TYPE_2);
    must(world.windows[0] && world.windows[1]);
    for (int i = 0; i < QPS; i++)
        create_qp(i);
    attr = address(true, true);
    world.ah = ibv_create_ah(world.pd, &attr);
    must(world.ah);
}

static void reset_cq(int index)
{
    struct cq *cq = (struct cq *)(void *)world.cqs[index];

    must(cq->overrun || index || cq->head - cq->tail <= CQ_LARGE);
    cq->head = cq->tail = 0;
    cq->overrun = false;
    cq->armed = NOT_ARMED;
}

static void reset_srq(void)
{
    struct srq *srq = (struct srq *)(void *)world.srq;

    srq->rq.head = srq->rq.tail = 0;
    srq->limit = 0;
}

void world_reset(void)
{
    chance = 0;
    world.now = 1000u * 1000u * 1000u;
    world.num_posted = 0;
    memset(world.last_completed, 0, sizeof(world.last_completed));
    cable_clear();
    for (int i = 0; i < QPS; i++)
        reset_qp(i);
    drain_events();
    for (int i = 0; i < CQS; i++)
        reset_cq(i);
    reset_srq();
    for (int i = 0; i < REGIONS; i++)
        fill_region(i);
    memset(&world.ctx->counters, 0, sizeof(world.ctx->counters));
    sleep_armed(world.ctx, NULL);
    for (int i = 0; i < QPS; i++)
        world_connect(i);
    post_bind(0, world.windows[0], WINDOW_1);
    world_bind(1);
}
