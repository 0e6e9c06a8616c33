/* Fuzzer of everything that a packet can reach. An input is first taken for one frame as it is, then read as a
 * sequence of steps in the life of a device (world.h): frames arrive, true ones, bent ones and made-up ones; work
 * is posted, queues are polled, time goes by, objects go and come.
 *
 * A frame made up byte by byte would nearly always be dropped at the door, for want of the queue pair, the packet number,
 * the key or the ICRC. So each of these is mostly said by name ("the next one expected", "the key of that region"), and
 * the device's own state tells its value. What is written here may be wrong in any way but one: an input means the same
 * each time.
 *
 * Built with -fsanitize=fuzzer, or with replay.c to run files again (tests/fuzz/corpus). */
#include <stdlib.h>
#include <string.h>

#include "world.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

enum { MAX_STEPS = 200, FRAME_BYTES = LINK_MAX_FRAME + 256 };

/* --- the input ----------------------------------------------------------------------------------------------- */

struct input {
    const uint8_t *at;
    size_t left;
};

static uint8_t next8(struct input *in)
{
    if (!in->left)
        return 0;
    in->left--;
    return *in->at++;
}

static uint16_t next16(struct input *in)
{
    uint16_t high = next8(in);

    return (uint16_t)(high << 8 | next8(in));
}

static uint32_t next32(struct input *in)
{
    uint32_t high = next16(in);

    return high << 16 | next16(in);
}

static uint64_t next64(struct input *in)
{
    uint64_t high = next32(in);

    return high << 32 | next32(in);
}

static int next_qp(struct input *in)
{
    return next8(in) % QPS;
}

/* What would come behind the last packet that was made up for a queue pair. */
static uint32_t following[QPS];

static uint32_t apart(uint32_t psn, struct input *in)
{
    return psn_add(psn, (uint32_t)(int8_t)next8(in));
}

/* --- names for numbers --------------------------------------------------------------------------------------- */

static uint32_t choose_psn(struct input *in, uint8_t mode, int index, bool response)
{
    const struct qp *qp = world_qp(index);
    const struct responder *resp = &qp->resp;

    switch (mode % 8) {
    case 0:
        return response ? qp->req.una : resp->epsn;
    case 1:
        return apart(resp->epsn, in);
    case 2:
        return apart(qp->req.una, in);
    case 3:
        return psn_add(qp->req.sent_psn, WIRE_PSN_MASK);
    case 4:
        return psn_add(resp->epsn, WIRE_PSN_MASK);
    case 5:
        return next32(in) & WIRE_PSN_MASK;
    case 6:
        return apart(resp->num_resources ? resp->resources[next8(in) % resp->num_resources].first_psn : 0, in);
    default:
        return following[index];
    }
}

static void set_following(int index, const struct packet *packet)
{
    uint32_t mtu = world_qp(index)->mtu, count = 1;

    if (WIRE_BASE(packet->opcode) == WIRE_READ_REQUEST && packet->dma_length)
        count = (uint32_t)(((uint64_t)packet->dma_length + mtu - 1) / mtu);
    following[index] = psn_add(packet->psn, count);
}

static uint32_t choose_key(struct input *in, uint8_t mode)
{
    switch (mode % 8) {
    case 0:
        return world.mrs[OPEN]->rkey;
    case 1:
        return world.mrs[READABLE]->rkey;
    case 2:
        return world.mrs[VOLATILE]->rkey;
    case 3:
        return world.mrs[LOCAL + next8(in) % (REGIONS - LOCAL)]->rkey;
    case 4:
        return world.windows[0]->rkey;
    case 5:
        return world.windows[1]->rkey;
    case 6:
        return world.mrs[OPEN]->rkey ^ next8(in);
    default:
        return next32(in);
    }
}

/* Somewhere in the region that goes with choose_key(), or at its end, or anywhere. */
static uint64_t choose_address(struct input *in, uint8_t mode, uint8_t key_mode)
{
    static const uint8_t regions[8] = {OPEN, READABLE, VOLATILE, FOREIGN, WINDOWED, WINDOWED, OPEN, LOCAL};
    static const uint16_t starts[8] = {[4] = WINDOW_1, [5] = WINDOW_2};
    uint64_t start = (uintptr_t)world.regions[regions[key_mode % 8]] + starts[key_mode % 8];

    switch (mode % 4) {
    case 0:
        return start;
    case 1:
        return start + (next16(in) & ~7u) % REGION_BYTES;
    case 2:
        return start + REGION_BYTES - next8(in);
    default:
        return next8(in) & 1 ? start + next16(in) : next64(in);
    }
}

static uint32_t choose_length(struct input *in, uint8_t mode, uint32_t mtu)
{
    switch (mode % 8) {
    case 0:
        return 0;
    case 1:
        return mtu;
    case 2:
        return next8(in);
    case 3:
        return next16(in) % 4500;
    case 4:
        return mtu - 1;
    case 5:
        return mtu * (next8(in) % 80);
    case 6:
        return 8;
    default:
        return next32(in);
    }
}

/* --- frames -------------------------------------------------------------------------------------------------- */

static uint8_t frame[FRAME_BYTES];

/* Never a byte of what is secret. */
static void fill_payload(uint8_t *at, uint32_t size, uint8_t seed)
{
    for (uint32_t i = 0; i < size; i++)
        at[i] = (uint8_t)(seed + i) & 0x7f;
}

static uint8_t service_of(const struct qp *qp)
{
    return qp->base.qp_type == IBV_QPT_RC ? WIRE_RC : qp->base.qp_type == IBV_QPT_UC ? WIRE_UC : WIRE_UD;
}

enum flaw { WRONG_ICRC = 1, STRANGER = 2, CUT = 4, IDENTIFIED = 8, HELD = 16, SOLICITED = 32, NO_ASK = 64, ODD_PAD = 128 };

/* Sends off `size` bytes of the frame, with the flaws it is to have. */
static void give(struct input *in, uint32_t size, uint8_t flaws)
{
    enum sender sender = PEER;

    if (flaws & CUT) {
        uint32_t cut = next8(in);

        size -= cut < size ? cut : size;
    }
    if (flaws & ODD_PAD)
        wire_set_pad(frame, next8(in));
    if (flaws & STRANGER)
        sender = next8(in) & 1 ? OTHER_ADDRESS : OTHER_PORT;
    wire_give(frame, size, sender, flaws & IDENTIFIED ? next8(in) : 0, flaws & WRONG_ICRC ? next8(in) : 0);
    if (!(flaws & HELD))
        wire_progress(next8(in) & 1);
}

static void fill_fields(struct input *in, struct packet *packet, int index)
{
    const struct qp *qp = world_qp(index);
    uint8_t modes = next8(in), lengths;

    packet->traits = wire_traits(packet->opcode);
    packet->psn = choose_psn(in, modes, index, packet->traits & WIRE_RESPONSE);
    packet->dest_qp = qp->base.qp_num;
    packet->qkey = modes & 0x80 ? next32(in) : qp->attr.qkey;
    packet->src_qp = modes;
    packet->syndrome = next8(in);
    packet->msn = packet->imm = packet->psn;
    lengths = next8(in);
    packet->length = packet->traits & WIRE_HAS_PAYLOAD ? choose_length(in, lengths, qp->mtu) : 0;
    if (packet->length > LINK_MAX_FRAME)
        packet->length %= LINK_MAX_FRAME;
    packet->dma_length = lengths & 0x40 ? choose_length(in, lengths >> 3, qp->mtu) : packet->length;
    if (packet->traits & (WIRE_HAS_RETH | WIRE_HAS_ATOMIC | WIRE_HAS_INV)) {
        packet->rkey = choose_key(in, modes >> 3);
        packet->addr = choose_address(in, lengths >> 6, modes >> 3);
        packet->swap_add = lengths;
        packet->compare = lengths & 1 ? next64(in) : 0;
    }
}

static void give_packet(struct input *in, const struct packet *packet, uint8_t seed, uint8_t flaws)
{
    uint32_t size = wire_build(frame, packet), pad = -packet->length & 3;

    fill_payload(frame + size, packet->length, seed);
    wire_set_pad(frame, pad);
    memset(frame + size + packet->length, 0, pad);
    give(in, size + packet->length + pad + WIRE_ICRC, flaws);
}

/* A packet with every header that its opcode has. */
static void step_packet(struct input *in, uint8_t base)
{
    int index = next_qp(in);
    uint8_t flaws = next8(in);
    struct packet packet = {
        .opcode = service_of(world_qp(index)) | WIRE_BASE(base),
        .solicited = flaws & SOLICITED,
        .ack_request = !(flaws & NO_ASK),
    };

    fill_fields(in, &packet, index);
    set_following(index, &packet);
    give_packet(in, &packet, packet.syndrome, flaws);
}

/* A read or atomic that was answered is asked for again; a read perhaps from the middle on. */
static void step_repeat(struct input *in)
{
    const struct qp *qp = world_qp(next_qp(in));
    const struct responder *resp = &qp->resp;
    const struct resource *known;
    struct packet packet = {.dest_qp = qp->base.qp_num};
    uint32_t from, bytes;

    if (!resp->num_resources)
        return;
    known = &resp->resources[next8(in) % resp->num_resources];
    from = (uint32_t)psn_diff(known->last_psn, known->first_psn) + 1;
    from = next8(in) % (from ? from : 1);
    bytes = from * qp->mtu;
    packet.opcode = known->atomic ? WIRE_FETCH_ADD : WIRE_READ_REQUEST;
    packet.psn = psn_add(known->first_psn, from);
    packet.rkey = known->rkey;
    packet.addr = known->addr + bytes;
    packet.dma_length = known->length - bytes - (next8(in) & 1);
    give_packet(in, &packet, 0, next8(in) & (HELD | STRANGER | WRONG_ICRC));
}

/* Any bytes, behind the door. */
static void step_bytes(struct input *in)
{
    int index = next_qp(in);
    const struct qp *qp = world_qp(index);
    uint8_t flaws = next8(in);
    uint32_t size = next8(in) + 1;

    for (uint32_t i = 0; i < size; i++)
        frame[i] = i < WIRE_BTH + 28 ? next8(in) : next8(in) & 0x7f;
    memset(frame + size, 0, WIRE_BTH + WIRE_ICRC);
    if (size >= WIRE_BTH) {
        uint32_t psn = choose_psn(in, flaws >> 5, index, false);

        frame[0] = service_of(qp) | WIRE_BASE(frame[0]);
        frame[1] &= 0xf0;
        for (int i = 0; i < 3; i++) {
            frame[5 + i] = (uint8_t)(qp->base.qp_num >> (16 - 8 * i));
            frame[9 + i] = (uint8_t)(psn >> (16 - 8 * i));
        }
    }
    give(in, size + WIRE_ICRC, flaws & ~(CUT | ODD_PAD));
}

/* A frame that the device sent comes back to it: as it is, once more, late, or bent. */
static void step_deliver(struct input *in)
{
    uint8_t how = next8(in), *data;
    uint32_t k, size;

    if (!wire_count())
        return;
    k = how & 0x0f ? 0 : next8(in) % wire_count();
    data = wire_frame(k, &size);
    memcpy(frame, data, size);
    if (how & 0x10)
        frame[next8(in) % size] ^= next8(in) & 0x7f;
    give(in, size, how & 0x20 ? HELD : 0);
    if (!(how & 0x40))
        wire_drop(k);
}

/* --- work ---------------------------------------------------------------------------------------------------- */

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

static void step_post_send(struct input *in)
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

    wr.num_sge = choose_sges(in, sges, qp->mtu, wr.opcode >= IBV_WR_RDMA_READ && wr.opcode <= IBV_WR_ATOMIC_FETCH_AND_ADD);
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

static void step_post_batch(struct input *in)
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

static void step_post_receive(struct input *in)
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

static void step_time(struct input *in)
{
    world.now += UINT64_C(1000) << next8(in) % 20; /* 1 us to half a second */
    wire_progress(next8(in) & 1);
}

static void set_state(int index, enum ibv_qp_state state)
{
    struct ibv_qp_attr attr = {.qp_state = state, .en_sqd_async_notify = 1};
    int mask = state == IBV_QPS_SQD ? IBV_QP_EN_SQD_ASYNC_NOTIFY : 0;

    ibv_modify_qp(world.qps[index], &attr, IBV_QP_STATE | mask); /* it may not be allowed now */
}

static void step_modify(struct input *in)
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

static void step_memory(struct input *in)
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

static void step_other(struct input *in)
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
        wire_progress(true);
        break;
    }
}

/* --- inputs -------------------------------------------------------------------------------------------------- */

static void step(struct input *in)
{
    uint8_t what = next8(in);

    if (what & 0x80) { /* the rest of it is the opcode */
        step_packet(in, what);
        return;
    }
    switch (what % 16) {
    case 0:
    case 1:
    case 2:
        step_post_send(in);
        break;
    case 3:
    case 4:
        step_post_receive(in);
        break;
    case 5:
        step_post_batch(in);
        break;
    case 6:
    case 7:
    case 8:
        step_deliver(in);
        break;
    case 9:
        step_bytes(in);
        break;
    case 10:
        step_time(in);
        break;
    case 11:
        step_modify(in);
        break;
    case 12:
        step_memory(in);
        break;
    case 13:
        step_other(in);
        break;
    case 14:
        step_repeat(in);
        break;
    default:
        world_poll(what >> 4 & 1);
        break;
    }
}

/* One frame, as it stands. */
static void parse(const uint8_t *data, size_t size)
{
    uint8_t *copy = malloc(size ? size : 1);
    struct packet packet;

    must(copy);
    memcpy(copy, data, size);
    if (wire_parse(copy, (uint32_t)size, &packet)) {
        must(packet.payload >= copy + WIRE_BTH && packet.payload + packet.length + WIRE_ICRC <= copy + size);
        must(packet.traits == wire_traits(packet.opcode) && wire_name(packet.opcode));
    }
    free(copy);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct input in = {data, size};

    parse(data, size);
    world_open();
    world_reset();
    memset(following, 0, sizeof(following));
    for (int i = 0; i < MAX_STEPS && in.left; i++) {
        step(&in);
        world_check_queues();
    }
    world_settle();
    world_check_queues();
    world_check_memory();
    return 0;
}
