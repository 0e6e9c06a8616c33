/* See input.h. */
#include "input.h"

#include <string.h>

uint8_t next8(struct input *in)
{
    if (!in->left)
        return 0;
    in->left--;
    return *in->at++;
}

uint16_t next16(struct input *in)
{
    uint16_t high = next8(in);

    return (uint16_t)(high << 8 | next8(in));
}

uint32_t next32(struct input *in)
{
    uint32_t high = next16(in);

    return high << 16 | next16(in);
}

uint64_t next64(struct input *in)
{
    uint64_t high = next32(in);

    return high << 32 | next32(in);
}

int next_qp(struct input *in)
{
    return next8(in) % QPS;
}

/* What would come behind the last packet that was made up for a queue pair. */
static uint32_t following[QPS];

static uint32_t apart(uint32_t psn, struct input *in)
{
    return psn_add(psn, (uint32_t)(int8_t)next8(in));
}

uint32_t choose_psn(struct input *in, uint8_t mode, int index, bool response)
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

void set_following(int qp, uint32_t psn, uint32_t count)
{
    following[qp] = psn_add(psn, count);
}

void forget_following(void)
{
    memset(following, 0, sizeof(following));
}

uint32_t choose_key(struct input *in, uint8_t mode)
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

uint64_t choose_address(struct input *in, uint8_t mode, uint8_t key_mode)
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

uint32_t choose_length(struct input *in, uint8_t mode, uint32_t mtu)
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
