/* A ring of frames in memory that two processes share: one direction, one producer, one consumer.
 *
 * The other side is not trusted with our memory. What it writes (a position, the size of an entry) is read once,
 * checked, and then used from our own copy; positions of our own are never read back. So a peer that writes
 * garbage can make its own traffic garbage and end the ring (RING_BROKEN), and nothing else. The bytes of a frame
 * may change while we look at them: see wire_parse().
 *
 * Memory order. The producer writes entries, then `head` with release order; the consumer reads `head` with
 * acquire order, then the entries. The consumer is through with entries, then writes `tail` with release order;
 * the producer reads `tail` with acquire order, then overwrites them. `asleep` and `waiting` are for wake-ups;
 * each is one half of a pair with a position, with a sequentially consistent fence between the two on either
 * side: ring_sleep() with ring_wants_wake(), ring_await_room() with ring_release(). */
#ifndef RING_H
#define RING_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "link.h"

enum {
    RING_BYTES = 4 << 20, /* touched, and so taken from the system, as far as they are used: see ring_put() */
    RING_LINE = 64,       /* entries begin at multiples of it */
    RING_PAGE = 4096,
};

/* What both sides map; all zero at first. Positions count bytes, modulo 2^32. */
struct ring_shared {
    _Alignas(RING_LINE) _Atomic uint32_t head;    /* the producer's: published up to here */
    _Alignas(RING_LINE) _Atomic uint32_t tail;    /* the consumer's: given back up to here */
    _Alignas(RING_LINE) _Atomic uint32_t asleep;  /* set by the consumer, cleared by who wakes it */
    _Alignas(RING_LINE) _Atomic uint32_t waiting; /* set by the producer, which wants room; the same */
    _Alignas(RING_LINE) _Atomic uint32_t busy;    /* of the producer: see table.h; nothing to do with the ring */
    _Alignas(RING_PAGE) uint8_t data[RING_BYTES];
};

struct ring_producer {
    struct ring_shared *shared;
    uint32_t head, published;
    uint32_t tail; /* as last read */
};

struct ring_consumer {
    struct ring_shared *shared;
    uint32_t tail;     /* taken up to here */
    uint32_t released; /* given back up to here */
    uint32_t head;     /* as last read */
};

enum ring_result { RING_OK, RING_EMPTY, RING_FULL, RING_BROKEN };

/* A producer's and a consumer's calls each come from one thread at a time; none blocks. */

/* Copies a frame in; it is visible at the next ring_publish(), or before. RING_OK, RING_FULL or RING_BROKEN. */
enum ring_result ring_put(struct ring_producer *ring, const struct frame *frame);
void ring_publish(struct ring_producer *ring);
/* After ring_publish(). True: the consumer sleeps and is to be woken, which nobody else will do now. */
bool ring_wants_wake(struct ring_producer *ring);
/* Whether so many bytes are free; a frame takes ring_entry() of them. RING_OK, RING_FULL or RING_BROKEN. */
enum ring_result ring_room(struct ring_producer *ring, uint32_t wanted);
/* Asks to be woken when half of the ring is free. False: it is already. */
bool ring_await_room(struct ring_producer *ring);

/* The next frame, in place: valid until ring_release(). RING_OK, RING_EMPTY or RING_BROKEN. */
enum ring_result ring_take(struct ring_consumer *ring, struct view *view);
/* Gives back what was taken. True: the producer waits for room and is to be woken. */
bool ring_release(struct ring_consumer *ring);
/* Asks to be woken for the next frame. False: there is one already. */
bool ring_sleep(struct ring_consumer *ring);
void ring_awake(struct ring_consumer *ring);

static inline uint32_t ring_entry(uint32_t frame_size)
{
    return (uint32_t)(sizeof(uint64_t) + frame_size + RING_LINE - 1) & ~(uint32_t)(RING_LINE - 1);
}

#endif
