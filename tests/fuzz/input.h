/* The input of the fuzzer, byte by byte; and names for the numbers that matter, so that it can say "the next packet
 * number expected" and "the key of that region" instead of guessing them. After its end an input is all zeros. */
#ifndef FUZZ_INPUT_H
#define FUZZ_INPUT_H

#include "world.h"

struct input {
    const uint8_t *at;
    size_t left;
};

uint8_t next8(struct input *in);
uint16_t next16(struct input *in);
uint32_t next32(struct input *in);
uint64_t next64(struct input *in);
int next_qp(struct input *in);

/* `mode` says which; what it takes besides comes from the input. */
uint32_t choose_psn(struct input *in, uint8_t mode, int qp, bool response);
uint32_t choose_key(struct input *in, uint8_t mode);
/* Somewhere in the region that goes with choose_key(), or at its end, or anywhere. */
uint64_t choose_address(struct input *in, uint8_t mode, uint8_t key_mode);
uint32_t choose_length(struct input *in, uint8_t mode, uint32_t mtu);

/* A packet was made up for a queue pair: its number, and how many it takes, can be gone on from. */
void set_following(int qp, uint32_t psn, uint32_t count);
void forget_following(void);

/* The steps, each of which reads what it needs (frames.c, work.c). */
void step_packet(struct input *in, uint8_t opcode);
void step_repeat(struct input *in);
void step_bytes(struct input *in);
void step_deliver(struct input *in);
void step_post_send(struct input *in);
void step_post_batch(struct input *in);
void step_post_receive(struct input *in);
void step_time(struct input *in);
void step_modify(struct input *in);
void step_memory(struct input *in);
void step_other(struct input *in);

#endif
