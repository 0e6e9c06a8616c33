/* Headers: built and parsed again, cut short, and rejected. */
#include "wire.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define CHECK(condition)                                                                  \
    do {                                                                                  \
        if (!(condition)) {                                                               \
            fprintf(stderr, "%s:%d: not true: %s\n", __FILE__, __LINE__, #condition);     \
            exit(1);                                                                      \
        }                                                                                 \
    } while (0)

static const struct packet example = {
    .solicited = true,
    .ack_request = true,
    .dest_qp = 0xabcdef,
    .psn = 0x123456,
    .src_qp = 0x765432,
    .qkey = 0x11223344,
    .addr = 0x0102030405060708u,
    .rkey = 0xcafebabe,
    .dma_length = 0x01020304,
    .swap_add = 0x1112131415161718u,
    .compare = 0x2122232425262728u,
    .original = 0x3132333435363738u,
    .syndrome = 0x62,
    .msn = 0x998877,
    .imm = 0xdeadbeef,
};

static void check_same(const struct packet *got)
{
    CHECK(got->solicited && got->ack_request);
    CHECK(got->dest_qp == example.dest_qp && got->psn == example.psn);
    if (got->traits & WIRE_HAS_DETH)
        CHECK(got->src_qp == example.src_qp && got->qkey == example.qkey);
    if (got->traits & (WIRE_HAS_RETH | WIRE_HAS_ATOMIC))
        CHECK(got->addr == example.addr && got->rkey == example.rkey);
    if (got->traits & WIRE_HAS_RETH)
        CHECK(got->dma_length == example.dma_length);
    if (got->traits & WIRE_HAS_ATOMIC)
        CHECK(got->swap_add == example.swap_add && got->compare == example.compare);
    if (got->traits & WIRE_HAS_AETH)
        CHECK(got->syndrome == example.syndrome && got->msn == example.msn);
    if (got->traits & WIRE_HAS_ATOMIC_ACK)
        CHECK(got->original == example.original);
    if (got->traits & WIRE_HAS_IMM)
        CHECK(got->imm == example.imm);
    if (got->traits & WIRE_HAS_INV)
        CHECK(got->rkey == example.rkey);
}

/* One opcode, with `length` bytes of payload; every shorter frame is refused or has less payload. */
static void round_trip(uint8_t opcode, uint32_t length)
{
    struct packet in = example, out;
    uint8_t frame[WIRE_MAX_HEADERS + 64 + WIRE_ICRC];
    uint32_t head, pad = -length & 3, size;

    in.opcode = opcode;
    memset(frame, 0, sizeof(frame));
    head = wire_build(frame, &in);
    CHECK(head >= WIRE_BTH && head <= WIRE_MAX_HEADERS);
    wire_set_pad(frame, pad);
    size = head + length + pad + WIRE_ICRC;
    CHECK(wire_parse(frame, size, &out));
    CHECK(out.opcode == opcode && out.length == length && out.payload == frame + head);
    check_same(&out);
    for (uint32_t cut = 0; cut < head + pad + WIRE_ICRC; cut++)
        CHECK(!wire_parse(frame, cut, &out));
}

int main(void)
{
    static const uint8_t services[] = {WIRE_RC, WIRE_UC, WIRE_UD};
    unsigned int known = 0;
    uint8_t junk[WIRE_BTH + WIRE_ICRC] = {0};
    struct packet out;

    for (size_t s = 0; s < sizeof(services); s++) {
        for (uint8_t base = 0; base < 32; base++) {
            uint8_t opcode = services[s] | base;
            uint32_t traits = wire_traits(opcode);

            if (!traits)
                continue;
            known++;
            CHECK(strcmp(wire_name(opcode), "UNKNOWN") != 0);
            CHECK(!(traits & WIRE_REQUEST) != !(traits & WIRE_RESPONSE));
            for (uint32_t length = 0; length <= (traits & WIRE_HAS_PAYLOAD ? 9u : 0u); length++)
                round_trip(opcode, length);
        }
    }
    CHECK(known == 23 + 12 + 2);
    for (unsigned int opcode = 0x80; opcode < 0x100; opcode++)
        CHECK(wire_traits((uint8_t)opcode) == 0);
    CHECK(wire_traits(0x15) == 0 && wire_traits(WIRE_UC | WIRE_READ_REQUEST) == 0);

    /* a header version of the future; payload where none belongs */
    junk[1] = 1;
    CHECK(!wire_parse(junk, sizeof(junk), &out));
    {
        uint8_t ack[WIRE_BTH + 4 + 4 + WIRE_ICRC] = {WIRE_ACK};

        CHECK(!wire_parse(ack, sizeof(ack), &out));
        CHECK(wire_parse(ack, sizeof(ack) - 4, &out));
    }

    CHECK(psn_diff(0, 0xffffff) == 1 && psn_diff(0xffffff, 0) == -1);
    CHECK(psn_diff(0x7fffff, 0) == 0x7fffff && psn_diff(0x800001, 0) < 0);
    CHECK(psn_add(0xfffffe, 5) == 3);
    puts("wire: ok");
    return 0;
}
