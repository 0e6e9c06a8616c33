/* What the application does meanwhile: it posts, polls, waits, and makes and unmakes its objects. */
#include "input.h"

static int choose_sges(struct input *in, struct ibv_sge *sges, uint32_t mtu, bool written)
{
    static const uint8_t readable[] = {OPEN, READABLE, VOLATILE, OPEN}, writable[] = {LOCAL, OPEN, VOLATILE, LOCAL};
    int count = next8(in) % 5;

    for (int i = 0; i < count; i++) {
        uint8_t modes = next8(in), region = (written ? writable : readable)[modes & 3];

        sges[i].addr = (uintptr_t)world.regions[region] + ((modes & 4) ? next16(in) % REGION_BYTES : 0);
        sges[i].lkey = modes & 0x80 ? next32(in) : world.mrs[region]->lkey;
        sges[i].length = choose_length(in, modes >> 3, mtu);
        if (sges[i].length > REGION_BYTES && !(modes & 0x40))
            sges[i].length = REGION_BYTES;
    }
    return count;
}

static void set_remote(struct input *in, struct ibv_send_wr *wr, const struct qp *qp)
{
    uint8_t modes = next8(in);
    uint32_t key = choose_key(in, modes);
    uint64_t address = choose_address(in, modes >> 3, modes);

    if (qp->base.qp_type == IBV_QPT_UD) {
        wr->wr.ud.ah = world.ah;
        wr->wr.ud.remote_qpn = world.qps[next_qp(in)]->qp_num;
        wr->wr.ud.remote_qkey = qp->attr.qkey;
    } else if (wr->opcode == IBV_WR_ATOMIC_CMP_AND_SWP || wr->opcode == IBV_WR_ATOMIC_FETCH_AND_ADD) {
        wr->wr.atomic.remote_addr = address & ~7u;
        wr->wr.atomic.rkey = key;
        wr->wr.atomic.compare_add = modes;
    } else {
        wr->wr.rdma.remote_addr = address;
        wr->wr.rdma.rkey = key;
    }
}

/* Its buffers are written. */
static bool is_answered(enum ibv_wr_opcode opcode)
{
    return opcode == IBV_WR_RDMA_READ || opcode == IBV_WR_ATOMIC_CMP_AND_SWP || opcode == IBV_WR_ATOMIC_FETCH_AND_ADD;
}

void step_post_send(struct input *in)
{
    static const enum ibv_wr_opcode opcodes[] = {
        IBV_WR_RDMA_WRITE,         IBV_WR_RDMA_WRITE_WITH_IMM,  IBV_WR_SEND,          IBV_WR_SEND_WITH_IMM,
        IBV_WR_RDMA_READ,          IBV_WR_ATOMIC_CMP_AND_SWP,   IBV_WR_ATOMIC_FETCH_AND_ADD,
        IBV_WR_SEND_WITH_INV,      IBV_WR_LOCAL_INV,            IBV_WR_RDMA_READ,     IBV_WR_SEND,
    };
    int index = next_qp(in);
    const struct qp *qp = world_qp(index);
    uint8_t flags = next8(in);
    struct ibv_sge sges[4];
    struct ibv_send_wr *bad, wr = {
                                 .opcode = opcodes[next8(in) % (sizeof(opcodes) / sizeof(opcodes[0]))],
                                 .send_flags = flags & (IBV_SEND_FENCE | IBV_SEND_SIGNALED | IBV_SEND_SOLICITED |
                                                        IBV_SEND_INLINE),
                                 .sg_list = sges,
                             };

    wr.num_sge = choose_sges(in, sges, qp->mtu, is_answered(wr.opcode));
    for (int i = 0; wr.send_flags & IBV_SEND_INLINE && i < wr.num_sge; i++) {
        sges[i].addr = (uintptr_t)world.regions[OPEN]; /* read by the caller */
        sges[i].length %= REGION_BYTES;
    }
    set_remote(in, &wr, qp);
    if (wr.opcode == IBV_WR_SEND_WITH_INV || wr.opcode == IBV_WR_LOCAL_INV)
        wr.invalidate_rkey = choose_key(in, flags >> 4);
    if (!world_next_id(index, false, &wr.wr_id))
        return;
    if (ibv_post_send(world.qps[index], &wr, &bad))
        world_return_id();
}

/* One request of a batch; `id` is its number. */
static void add_to_batch(struct input *in, struct ibv_qp_ex *ex, uint64_t id)
{
    struct ibv_sge sges[4];
    uint8_t modes = next8(in);
    int count = choose_sges(in, sges, world_qp(0)->mtu, modes & 1);

    ex->wr_id = id;
    ex->wr_flags = modes & 2 ? IBV_SEND_SIGNALED : 0;
    if (modes & 1)
        ibv_wr_rdma_read(ex, choose_key(in, modes >> 5), (uintptr_t)world.regions[OPEN]);
    else if (modes & 4)
        ibv_wr_rdma_write(ex, choose_key(in, modes >> 5), (uintptr_t)world.regions[OPEN]);
    else
        ibv_wr_send(ex);
    if (!(modes & 8) || modes & 16)
        ibv_wr_set_sge_list(ex, (size_t)count, sges);
    if (modes & 8)
        ibv_wr_set_inline_data(ex, world.regions[OPEN], next8(in));
    if (modes & 32)
        ibv_wr_set_sge_list(ex, (size_t)count, sges);
}

void step_post_batch(struct input *in)
{
    struct ibv_qp_ex *ex = ibv_qp_to_qp_ex(world.qps[0]);
    int count = next8(in) % 4;
    bool abandoned = next8(in) % 8 == 0;
    uint64_t id = 0;

    ibv_wr_start(ex);
    for (int i = 0; i < count && world_next_id(0, false, &id); i++)
        add_to_batch(in, ex, id);
    if (abandoned)
        ibv_wr_abort(ex);
    if (abandoned || ibv_wr_complete(ex))
        for (int i = 0; i < count; i++)
            world_return_id();
}

void step_post_receive(struct input *in)
{
    int index = next_qp(in);
    struct ibv_sge sges[4];
    struct ibv_recv_wr *bad, wr = {.sg_list = sges};
    struct ibv_qp *qp = world.qps[index];

    wr.num_sge = choose_sges(in, sges, world_qp(index)->mtu, true);
    if (!world_next_id(index, true, &wr.wr_id))
        return;
    if (qp->srq ? ibv_post_srq_recv(qp->srq, &wr, &bad) : ibv_post_recv(qp, &wr, &bad))
        world_return_id();
}

/* --- time and life ------------------------------------------------------------------------------------------- */

void step_time(struct input *in)
{
    world.now += UINT64_C(1000) << next8(in) % 20; /* 1 us to half a second */
    cable_progress(next8(in) & 1);
}

static void set_state(int index, enum ibv_qp_state state)
{
    struct ibv_qp_attr attr = {.qp_state = state, .en_sqd_async_notify = 1};
    int mask = state == IBV_QPS_SQD ? IBV_QP_EN_SQD_ASYNC_NOTIFY : 0;

    ibv_modify_qp(world.qps[index], &attr, IBV_QP_STATE | mask); /* it may not be allowed now */
}

void step_modify(struct input *in)
{
    int index = next_qp(in);

    switch (next8(in) % 8) {
    case 0:
        set_state(index, IBV_QPS_ERR);
        break;
    case 1:
        set_state(index, IBV_QPS_RESET);
        break;
    case 2:
        set_state(index, IBV_QPS_RESET);
        world_connect(index);
        break;
    case 3:
        set_state(index, IBV_QPS_SQD);
        break;
    case 4:
    case 5:
        set_state(index, IBV_QPS_RTS);
        break;
    default:
        world_replace_qp(index);
        break;
    }
}

void step_memory(struct input *in)
{
    switch (next8(in) % 4) {
    case 0:
        world_register(VOLATILE);
        break;
    case 1:
        world_bind(next8(in) % 2);
        break;
    default:
        step_post_receive(in);
        break;
    }
}

void step_other(struct input *in)
{
    uint8_t what = next8(in);
    struct ibv_srq_attr limit = {.srq_limit = what >> 4};
    struct ibv_async_event event;

    switch (what % 4) {
    case 0:
        ibv_req_notify_cq(world.cqs[what >> 4 & 1], what >> 5 & 1);
        break;
    case 1:
        ibv_modify_srq(world.srq, &limit, IBV_SRQ_LIMIT);
        break;
    case 2:
        if (ibv_get_async_event(&world.ctx->verbs.context, &event) == 0)
            ibv_ack_async_event(&event);
        break;
    default:
        cable_progress(true);
        break;
    }
}
