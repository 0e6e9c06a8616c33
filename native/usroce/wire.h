/* RoCE v2 packets: the headers of the InfiniBand transport (IBA Specification, volume 1, chapter 9) as typed
 * values. Parsing checks every bound; nothing behind it touches raw bytes of a header. */
#ifndef WIRE_H
#define WIRE_H

#include <stdbool.h>
#include <stdint.h>

enum {
    WIRE_BTH = 12,
    WIRE_ICRC = 4,
    WIRE_GRH = 40,
    WIRE_MAX_HEADERS = 64,
    WIRE_PSN_MASK = 0xffffff,
    WIRE_PKEY = 0xffff,
};

/* Upper three bits of the opcode: the transport service. */
enum wire_service { WIRE_RC = 0x00, WIRE_UC = 0x20, WIRE_UD = 0x60 };
#define WIRE_SERVICE(opcode) ((opcode) & 0xe0)
#define WIRE_BASE(opcode) ((opcode) & 0x1f)

/* Lower five bits. */
enum wire_opcode {
    WIRE_SEND_FIRST = 0x00,
    WIRE_SEND_MIDDLE = 0x01,
    WIRE_SEND_LAST = 0x02,
    WIRE_SEND_LAST_IMM = 0x03,
    WIRE_SEND_ONLY = 0x04,
    WIRE_SEND_ONLY_IMM = 0x05,
    WIRE_WRITE_FIRST = 0x06,
    WIRE_WRITE_MIDDLE = 0x07,
    WIRE_WRITE_LAST = 0x08,
    WIRE_WRITE_LAST_IMM = 0x09,
    WIRE_WRITE_ONLY = 0x0a,
    WIRE_WRITE_ONLY_IMM = 0x0b,
    WIRE_READ_REQUEST = 0x0c,
    WIRE_READ_FIRST = 0x0d,
    WIRE_READ_MIDDLE = 0x0e,
    WIRE_READ_LAST = 0x0f,
    WIRE_READ_ONLY = 0x10,
    WIRE_ACK = 0x11,
    WIRE_ATOMIC_ACK = 0x12,
    WIRE_COMPARE_SWAP = 0x13,
    WIRE_FETCH_ADD = 0x14,
    WIRE_SEND_LAST_INV = 0x16,
    WIRE_SEND_ONLY_INV = 0x17,
};

/* What an opcode means: which headers follow the BTH, and its place in a message. */
enum wire_traits {
    WIRE_HAS_RETH = 1 << 0,
    WIRE_HAS_AETH = 1 << 1,
    WIRE_HAS_ATOMIC = 1 << 2,
    WIRE_HAS_ATOMIC_ACK = 1 << 3,
    WIRE_HAS_IMM = 1 << 4,
    WIRE_HAS_INV = 1 << 5,
    WIRE_HAS_DETH = 1 << 6,
    WIRE_HAS_PAYLOAD = 1 << 7,
    WIRE_STARTS = 1 << 8, /* first or only packet of a message */
    WIRE_ENDS = 1 << 9,   /* last or only */
    WIRE_REQUEST = 1 << 10,
    WIRE_RESPONSE = 1 << 11,
    WIRE_IS_SEND = 1 << 12,
    WIRE_IS_WRITE = 1 << 13,
    WIRE_IS_READ_RESPONSE = 1 << 14,
};

/* AETH syndromes: the upper three bits say which kind. */
enum wire_syndrome {
    WIRE_AETH_ACK = 0x1f, /* acknowledged; end-to-end credits are not used */
    WIRE_AETH_RNR_NAK = 0x20,
    WIRE_AETH_NAK = 0x60,
    WIRE_NAK_PSN_SEQUENCE = 0x60,
    WIRE_NAK_INVALID_REQUEST = 0x61,
    WIRE_NAK_REMOTE_ACCESS = 0x62,
    WIRE_NAK_REMOTE_OPERATION = 0x63,
};
#define WIRE_AETH_KIND(syndrome) ((syndrome) & 0x60)
#define WIRE_AETH_VALUE(syndrome) ((syndrome) & 0x1f)

/* A parsed packet. Numbers are in host order, `imm` as it was on the wire. What its traits do not announce is 0.
 */
struct packet {
    uint8_t opcode;
    uint32_t traits; /* enum wire_traits */
    bool solicited;
    bool ack_request;
    uint32_t dest_qp;
    uint32_t psn;
    uint32_t src_qp, qkey;               /* DETH */
    uint64_t addr;                       /* RETH, AtomicETH */
    uint32_t rkey;                       /* RETH, AtomicETH, IETH */
    uint32_t dma_length;                 /* RETH */
    uint64_t swap_add, compare, original; /* AtomicETH, AtomicAckETH */
    uint8_t syndrome;                    /* AETH */
    uint32_t msn;
    uint32_t imm;
    const uint8_t *payload;
    uint32_t length;
};

/* Traits of an opcode with its service; 0: unknown or not spoken here. */
uint32_t wire_traits(uint8_t opcode);
/* Parses a frame of `size` bytes (BTH to ICRC; the ICRC is not checked here). False: malformed. The frame may change
 * meanwhile, and later: what is in `packet` is consistent all the same. */
bool wire_parse(const uint8_t *frame, uint32_t size, struct packet *packet);
/* Writes BTH and the headers that the opcode's traits ask for from `packet` (payload, length and traits are not
 * looked at) into `head`, which has room for WIRE_MAX_HEADERS. Returns their size. */
uint32_t wire_build(uint8_t *head, const struct packet *packet);
/* The pad count is known once the payload is. */
void wire_set_pad(uint8_t *head, uint32_t pad);
/* As ibv_wc_status_str() for packets: for traces and tests. */
const char *wire_name(uint8_t opcode);

/* PSNs are numbers modulo 2^24. Negative: a is before b. */
static inline int32_t psn_diff(uint32_t a, uint32_t b)
{
    return (int32_t)((a - b) << 8) >> 8;
}

static inline uint32_t psn_add(uint32_t psn, uint32_t n)
{
    return (psn + n) & WIRE_PSN_MASK;
}

#endif
