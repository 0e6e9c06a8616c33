/* Headers of RoCE v2 packets, to and from typed values. Everything here is driven by one table: which headers an
 * opcode has and where in a message it stands. */
#include "wire.h"

#include <endian.h>
#include <stddef.h>
#include <string.h>

enum {
    REQUEST_START = WIRE_REQUEST | WIRE_STARTS,
    REQUEST_END = WIRE_REQUEST | WIRE_ENDS,
    REQUEST_ONLY = WIRE_REQUEST | WIRE_STARTS | WIRE_ENDS,
    SEND_DATA = WIRE_IS_SEND | WIRE_HAS_PAYLOAD,
    WRITE_DATA = WIRE_IS_WRITE | WIRE_HAS_PAYLOAD,
    READ_DATA = WIRE_IS_READ_RESPONSE | WIRE_RESPONSE | WIRE_HAS_PAYLOAD,
};

struct opcode {
    const char *name;
    uint32_t traits;
    bool unreliable; /* the unreliable connected service has it too */
};

static const struct opcode opcodes[32] = {
    [WIRE_SEND_FIRST] = {"SEND_FIRST", REQUEST_START | SEND_DATA, true},
    [WIRE_SEND_MIDDLE] = {"SEND_MIDDLE", WIRE_REQUEST | SEND_DATA, true},
    [WIRE_SEND_LAST] = {"SEND_LAST", REQUEST_END | SEND_DATA, true},
    [WIRE_SEND_LAST_IMM] = {"SEND_LAST_IMM", REQUEST_END | SEND_DATA | WIRE_HAS_IMM, true},
    [WIRE_SEND_ONLY] = {"SEND_ONLY", REQUEST_ONLY | SEND_DATA, true},
    [WIRE_SEND_ONLY_IMM] = {"SEND_ONLY_IMM", REQUEST_ONLY | SEND_DATA | WIRE_HAS_IMM, true},
    [WIRE_WRITE_FIRST] = {"WRITE_FIRST", REQUEST_START | WRITE_DATA | WIRE_HAS_RETH, true},
    [WIRE_WRITE_MIDDLE] = {"WRITE_MIDDLE", WIRE_REQUEST | WRITE_DATA, true},
    [WIRE_WRITE_LAST] = {"WRITE_LAST", REQUEST_END | WRITE_DATA, true},
    [WIRE_WRITE_LAST_IMM] = {"WRITE_LAST_IMM", REQUEST_END | WRITE_DATA | WIRE_HAS_IMM, true},
    [WIRE_WRITE_ONLY] = {"WRITE_ONLY", REQUEST_ONLY | WRITE_DATA | WIRE_HAS_RETH, true},
    [WIRE_WRITE_ONLY_IMM] = {"WRITE_ONLY_IMM", REQUEST_ONLY | WRITE_DATA | WIRE_HAS_RETH | WIRE_HAS_IMM, true},
    [WIRE_READ_REQUEST] = {"READ_REQUEST", REQUEST_ONLY | WIRE_HAS_RETH, false},
    [WIRE_READ_FIRST] = {"READ_RESPONSE_FIRST", READ_DATA | WIRE_STARTS | WIRE_HAS_AETH, false},
    [WIRE_READ_MIDDLE] = {"READ_RESPONSE_MIDDLE", READ_DATA, false},
    [WIRE_READ_LAST] = {"READ_RESPONSE_LAST", READ_DATA | WIRE_ENDS | WIRE_HAS_AETH, false},
    [WIRE_READ_ONLY] = {"READ_RESPONSE_ONLY", READ_DATA | WIRE_STARTS | WIRE_ENDS | WIRE_HAS_AETH, false},
    [WIRE_ACK] = {"ACKNOWLEDGE", WIRE_RESPONSE | WIRE_HAS_AETH, false},
    [WIRE_ATOMIC_ACK] = {"ATOMIC_ACKNOWLEDGE", WIRE_RESPONSE | WIRE_HAS_AETH | WIRE_HAS_ATOMIC_ACK, false},
    [WIRE_COMPARE_SWAP] = {"COMPARE_SWAP", REQUEST_ONLY | WIRE_HAS_ATOMIC, false},
    [WIRE_FETCH_ADD] = {"FETCH_ADD", REQUEST_ONLY | WIRE_HAS_ATOMIC, false},
    [WIRE_SEND_LAST_INV] = {"SEND_LAST_INVALIDATE", REQUEST_END | SEND_DATA | WIRE_HAS_INV, false},
    [WIRE_SEND_ONLY_INV] = {"SEND_ONLY_INVALIDATE", REQUEST_ONLY | SEND_DATA | WIRE_HAS_INV, false},
};

uint32_t wire_traits(uint8_t opcode)
{
    const struct opcode *entry = &opcodes[WIRE_BASE(opcode)];
    uint8_t base = WIRE_BASE(opcode);

    switch (WIRE_SERVICE(opcode)) {
    case WIRE_RC:
        return entry->traits;
    case WIRE_UC:
        return entry->unreliable ? entry->traits : 0;
    case WIRE_UD:
        if (base == WIRE_SEND_ONLY || base == WIRE_SEND_ONLY_IMM)
            return entry->traits | WIRE_HAS_DETH;
        return 0;
    default:
        return 0;
    }
}

const char *wire_name(uint8_t opcode)
{
    return wire_traits(opcode) ? opcodes[WIRE_BASE(opcode)].name : "UNKNOWN";
}

/* --- big-endian fields ------------------------------------------------------------------------------- */

static uint32_t get32(const uint8_t *p)
{
    uint32_t value;

    memcpy(&value, p, sizeof(value));
    return be32toh(value);
}

static uint64_t get64(const uint8_t *p)
{
    uint64_t value;

    memcpy(&value, p, sizeof(value));
    return be64toh(value);
}

static void put32(uint8_t *p, uint32_t value)
{
    value = htobe32(value);
    memcpy(p, &value, sizeof(value));
}

static void put64(uint8_t *p, uint64_t value)
{
    value = htobe64(value);
    memcpy(p, &value, sizeof(value));
}

/* --- headers, in the order in which they stand ------------------------------------------------------- */

enum { RETH = 16, AETH = 4, ATOMIC = 28, ATOMIC_ACK = 8, IMM = 4, INV = 4, DETH = 8 };

static uint32_t headers_size(uint32_t traits)
{
    uint32_t size = WIRE_BTH;

    size += traits & WIRE_HAS_DETH ? DETH : 0;
    size += traits & WIRE_HAS_RETH ? RETH : 0;
    size += traits & WIRE_HAS_ATOMIC ? ATOMIC : 0;
    size += traits & WIRE_HAS_AETH ? AETH : 0;
    size += traits & WIRE_HAS_ATOMIC_ACK ? ATOMIC_ACK : 0;
    size += traits & WIRE_HAS_IMM ? IMM : 0;
    size += traits & WIRE_HAS_INV ? INV : 0;
    return size;
}

static void parse_headers(const uint8_t *at, struct packet *packet)
{
    uint32_t traits = packet->traits;

    if (traits & WIRE_HAS_DETH) {
        packet->qkey = get32(at);
        packet->src_qp = get32(at + 4) & WIRE_PSN_MASK;
        at += DETH;
    }
    if (traits & WIRE_HAS_RETH) {
        packet->addr = get64(at);
        packet->rkey = get32(at + 8);
        packet->dma_length = get32(at + 12);
        at += RETH;
    }
    if (traits & WIRE_HAS_ATOMIC) {
        packet->addr = get64(at);
        packet->rkey = get32(at + 8);
        packet->swap_add = get64(at + 12);
        packet->compare = get64(at + 20);
        at += ATOMIC;
    }
    if (traits & WIRE_HAS_AETH) {
        packet->syndrome = at[0];
        packet->msn = get32(at) & WIRE_PSN_MASK;
        at += AETH;
    }
    if (traits & WIRE_HAS_ATOMIC_ACK) {
        packet->original = get64(at);
        at += ATOMIC_ACK;
    }
    if (traits & WIRE_HAS_IMM) {
        memcpy(&packet->imm, at, sizeof(packet->imm));
        at += IMM;
    }
    if (traits & WIRE_HAS_INV)
        packet->rkey = get32(at);
}

/* BTH: opcode; SE, M, PadCnt, TVer; P_Key; resv8a, DestQP; A, resv7, PSN (IBA 9.2). */
bool wire_parse(const uint8_t *frame, uint32_t size, struct packet *packet)
{
    uint8_t data[WIRE_MAX_HEADERS]; /* of our own: the sender may still change the frame */
    uint32_t headers, pad;

    memset(packet, 0, sizeof(*packet));
    if (size < WIRE_BTH + WIRE_ICRC)
        return false;
    memcpy(data, frame, size < sizeof(data) ? size : sizeof(data));
    packet->opcode = data[0];
    packet->traits = wire_traits(data[0]);
    if (!packet->traits || (data[1] & 0x0f) != 0)
        return false;
    headers = headers_size(packet->traits);
    pad = (data[1] >> 4) & 3;
    if (size < headers + pad + WIRE_ICRC)
        return false;
    packet->length = size - headers - pad - WIRE_ICRC;
    if (packet->length && !(packet->traits & WIRE_HAS_PAYLOAD))
        return false;
    packet->solicited = data[1] & 0x80;
    packet->dest_qp = get32(data + 4) & WIRE_PSN_MASK;
    packet->ack_request = data[8] & 0x80;
    packet->psn = get32(data + 8) & WIRE_PSN_MASK;
    packet->payload = frame + headers;
    parse_headers(data + WIRE_BTH, packet);
    return true;
}

static void build_headers(uint8_t *at, uint32_t traits, const struct packet *packet)
{
    if (traits & WIRE_HAS_DETH) {
        put32(at, packet->qkey);
        put32(at + 4, packet->src_qp);
        at += DETH;
    }
    if (traits & WIRE_HAS_RETH) {
        put64(at, packet->addr);
        put32(at + 8, packet->rkey);
        put32(at + 12, packet->dma_length);
        at += RETH;
    }
    if (traits & WIRE_HAS_ATOMIC) {
        put64(at, packet->addr);
        put32(at + 8, packet->rkey);
        put64(at + 12, packet->swap_add);
        put64(at + 20, packet->compare);
        at += ATOMIC;
    }
    if (traits & WIRE_HAS_AETH) {
        put32(at, (uint32_t)packet->syndrome << 24 | (packet->msn & WIRE_PSN_MASK));
        at += AETH;
    }
    if (traits & WIRE_HAS_ATOMIC_ACK) {
        put64(at, packet->original);
        at += ATOMIC_ACK;
    }
    if (traits & WIRE_HAS_IMM) {
        memcpy(at, &packet->imm, sizeof(packet->imm));
        at += IMM;
    }
    if (traits & WIRE_HAS_INV)
        put32(at, packet->rkey);
}

uint32_t wire_build(uint8_t *head, const struct packet *packet)
{
    uint32_t traits = wire_traits(packet->opcode);

    head[0] = packet->opcode;
    head[1] = (uint8_t)((packet->solicited ? 0x80 : 0) | 0x40); /* MigReq: migrated, as everyone without APM */
    head[2] = WIRE_PKEY >> 8;
    head[3] = WIRE_PKEY & 0xff;
    put32(head + 4, packet->dest_qp & WIRE_PSN_MASK);
    put32(head + 8, (packet->ack_request ? 0x80000000u : 0) | (packet->psn & WIRE_PSN_MASK));
    build_headers(head + WIRE_BTH, traits, packet);
    return headers_size(traits);
}

void wire_set_pad(uint8_t *head, uint32_t pad)
{
    head[1] = (uint8_t)((head[1] & ~0x30) | (pad & 3) << 4);
}
