/* Fuzzer of everything that a packet can reach. An input is first taken for one frame as it is, then read as a
 * sequence of steps in the life of a device (world.h): frames arrive, true ones, bent ones and made-up ones; work
 * is posted, queues are polled, time goes by, objects go and come. In the end everything has to come to rest.
 *
 * A frame made up byte by byte would nearly always be dropped at the door, for want of the queue pair, the packet
 * number, the key or the ICRC. So each of these is mostly said by name (input.h), and the device's own state tells
 * its value. What is written here may be wrong in any way but one: an input means the same each time.
 *
 * Built with -fsanitize=fuzzer (tools/fuzz.py), or with replay.c to run the files in corpus/ again. There a hash
 * names what the fuzzer found to reach something new; words name what would break if a certain check were missing,
 * or once did. */
#include <stdlib.h>
#include <string.h>

#include "input.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

enum { MAX_STEPS = 200 };

static void step_poll(struct input *in)
{
    (void)in;
    for (int i = 0; i < CQS; i++)
        world_poll(i);
}

/* By the lower bits of a byte. What comes often is there more than once. */
static void (*const steps[16])(struct input *) = {
    step_post_send, step_post_send, step_post_send, step_post_receive, step_post_receive, step_post_batch,
    step_deliver,   step_deliver,   step_deliver,   step_bytes,        step_time,         step_modify,
    step_memory,    step_other,     step_repeat,    step_poll,
};

static void step(struct input *in)
{
    uint8_t what = next8(in);

    if (what & 0x80)
        step_packet(in, what); /* the rest of it is the opcode */
    else
        steps[what % 16](in);
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
    forget_following();
    for (int i = 0; i < MAX_STEPS && in.left; i++) {
        step(&in);
        world_check_queues();
    }
    world_settle();
    world_check_queues();
    world_check_memory();
    return 0;
}
