/* Frames for the device: made up, asked again, any bytes, and true ones bent. */
#include <string.h>

#include "input.h"

enum { FRAME_BYTES = LINK_MAX_FRAME + 256 };

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

enum flaw {
    WRONG_ICRC = 1 << 0,
    STRANGER = 1 << 1,
    CUT = 1 << 2,
    IDENTIFIED = 1 << 3, /* by the IP header */
    HELD = 1 << 4,       /* until others have come as well */
    SOLICITED = 1 << 5,
    NO_ASK = 1 << 6,
    ODD_PAD = 1 << 7,
};

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
    cable_give(frame, size, sender, flaws & IDENTIFIED ? next8(in) : 0, flaws & WRONG_ICRC ? next8(in) : 0);
    if (!(flaws & HELD))
        cable_progress(next8(in) & 1);
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

/* How many packet numbers it takes. */
static uint32_t packets_of(int index, const struct packet *packet)
{
    uint32_t mtu = world_qp(index)->mtu;

    if (WIRE_BASE(packet->opcode) != WIRE_READ_REQUEST || !packet->dma_length)
        return 1;
    return (uint32_t)(((uint64_t)packet->dma_length + mtu - 1) / mtu);
}

/* A packet with every header that its opcode has. */
void step_packet(struct input *in, uint8_t base)
{
    int index = next_qp(in);
    uint8_t flaws = next8(in);
    struct packet packet = {
        .opcode = service_of(world_qp(index)) | WIRE_BASE(base),
        .solicited = flaws & SOLICITED,
        .ack_request = !(flaws & NO_ASK),
    };

    fill_fields(in, &packet, index);
    set_following(index, packet.psn, packets_of(index, &packet));
    give_packet(in, &packet, packet.syndrome, flaws);
}

/* A read or atomic that was answered is asked for again; a read perhaps from the middle on. */
void step_repeat(struct input *in)
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
void step_bytes(struct input *in)
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
void step_deliver(struct input *in)
{
    uint8_t how = next8(in), *data;
    uint32_t k, size;

    if (!cable_count())
        return;
    k = how & 0x0f ? 0 : next8(in) % cable_count();
    data = cable_frame(k, &size);
    memcpy(frame, data, size);
    if (how & 0x10)
        frame[next8(in) % size] ^= next8(in) & 0x7f;
    give(in, size, how & 0x20 ? HELD : 0);
    if (!(how & 0x40))
        cable_drop(k);
}
