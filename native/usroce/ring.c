/* See ring.h. An entry is a word that describes it and the frame; the word is written and read as one. An entry
 * does not wrap around: a word with SKIP stands for all that is left up to the end. */
#include "ring.h"

#include <string.h>

enum {
    SKIP = 1,
    SEALED = 2, /* the ICRC of the frame is there and to be checked */
    EARLY_PUBLISH = 16 << 10, /* bytes: so the consumer can begin */
    KEEP_TO = 1 << 20,        /* bytes at the start that are used while they are enough */
    KEEP_STEP = 16 << 10,     /* ... bytes beyond them between questions whether they are */
    KEEP_USED = 32 << 10,     /* ... bytes that may be used then */
};

#define OFFSET(position) ((position) & (uint32_t)(RING_BYTES - 1))

static uint64_t make_word(uint32_t size, unsigned int flags, uint8_t traffic_class)
{
    return size | (uint64_t)flags << 32 | (uint64_t)traffic_class << 40;
}

static uint64_t *word_at(struct ring_shared *shared, uint32_t offset)
{
    return (uint64_t *)(void *)(shared->data + offset);
}

/* --- producer ------------------------------------------------------------------------------------------------ */

/* Acquire: the consumer's reading is over before we overwrite what it gave back. False: it wrote nonsense. */
static bool read_tail(struct ring_producer *ring)
{
    uint32_t tail = atomic_load_explicit(&ring->shared->tail, memory_order_acquire);

    if (ring->head - tail > RING_BYTES || tail % RING_LINE)
        return false;
    ring->tail = tail;
    return true;
}

enum ring_result ring_room(struct ring_producer *ring, uint32_t wanted)
{
    if (RING_BYTES - (ring->head - ring->tail) >= wanted)
        return RING_OK;
    if (!read_tail(ring))
        return RING_BROKEN;
    return RING_BYTES - (ring->head - ring->tail) >= wanted ? RING_OK : RING_FULL;
}

static void skip_to_start(struct ring_producer *ring)
{
    uint32_t offset = OFFSET(ring->head);

    __atomic_store_n(word_at(ring->shared, offset), make_word(0, SKIP, 0), __ATOMIC_RELAXED);
    ring->head += RING_BYTES - offset;
}

/* Whether a ring that went far enough holds so little that it can go on at its start: there it stays in the
 * cache, and takes less memory. Asked now and then only, since the answer is in a line of the consumer's. What is
 * skipped counts as used until the consumer has passed it, so what lies before `offset` is all the room there is
 * meanwhile: a datagram too much is lost, therefore KEEP_TO is no smaller. */
static bool starts_over(struct ring_producer *ring, uint32_t need)
{
    uint32_t offset = OFFSET(ring->head);

    return offset >= KEEP_TO && offset / KEEP_STEP != (offset + need) / KEEP_STEP && read_tail(ring) &&
           ring->head - ring->tail <= KEEP_USED;
}

static void copy_frame(uint8_t *to, const struct frame *frame)
{
    for (int i = 0; i < frame->niov; i++) {
        memcpy(to, frame->iov[i].iov_base, frame->iov[i].iov_len);
        to += frame->iov[i].iov_len;
    }
}

enum ring_result ring_put(struct ring_producer *ring, const struct frame *frame)
{
    uint32_t need = ring_entry(frame->size), offset = OFFSET(ring->head), left = RING_BYTES - offset;
    uint32_t total = left < need ? left + need : need;

    if (frame->size > LINK_MAX_FRAME)
        return RING_FULL;
    if (total > RING_BYTES - (ring->head - ring->tail)) {
        if (!read_tail(ring))
            return RING_BROKEN;
        if (total > RING_BYTES - (ring->head - ring->tail))
            return RING_FULL;
    }
    if (left < need || starts_over(ring, need)) {
        skip_to_start(ring);
        offset = 0;
    }
    copy_frame(ring->shared->data + offset + sizeof(uint64_t), frame);
    __atomic_store_n(word_at(ring->shared, offset),
                     make_word(frame->size, frame->sealed ? SEALED : 0, frame->traffic_class), __ATOMIC_RELAXED);
    ring->head += need;
    if (ring->head - ring->published >= EARLY_PUBLISH)
        ring_publish(ring);
    return RING_OK;
}

void ring_publish(struct ring_producer *ring)
{
    ring->published = ring->head;
    atomic_store_explicit(&ring->shared->head, ring->head, memory_order_release);
}

/* No wake-up is lost: our store of `head` comes before the fence and the load of `asleep` after it; in
 * ring_sleep() the store of `asleep` comes before the fence and the load of `head` after it. In the one order of
 * the two fences the later side sees what the earlier one stored: either we see that it sleeps, or it sees the
 * frame. Only who takes the flag back wakes it, so a row of frames costs one wake-up. Dying between the two loses
 * none: the consumer wakes when our socket closes. */
bool ring_wants_wake(struct ring_producer *ring)
{
    atomic_thread_fence(memory_order_seq_cst);
    return atomic_load_explicit(&ring->shared->asleep, memory_order_relaxed) &&
           atomic_exchange_explicit(&ring->shared->asleep, 0, memory_order_relaxed);
}

/* No wake-up is lost, by the argument of ring_wants_wake() with `waiting` and `tail`, see ring_release(). */
bool ring_await_room(struct ring_producer *ring)
{
    atomic_store_explicit(&ring->shared->waiting, 1, memory_order_relaxed);
    atomic_thread_fence(memory_order_seq_cst);
    if (read_tail(ring) && ring->head - ring->tail > RING_BYTES / 2)
        return true;
    atomic_store_explicit(&ring->shared->waiting, 0, memory_order_relaxed);
    return false;
}

/* --- consumer ------------------------------------------------------------------------------------------------ */

/* Acquire: the entries were written before. False: the producer wrote nonsense. */
static bool read_head(struct ring_consumer *ring)
{
    uint32_t head = atomic_load_explicit(&ring->shared->head, memory_order_acquire);

    if (head - ring->released > RING_BYTES || head - ring->tail > RING_BYTES || head % RING_LINE)
        return false;
    ring->head = head;
    return true;
}

/* The entry at `tail`, of which `available` bytes are published. Every number in it is checked before its use. */
static enum ring_result take_entry(struct ring_consumer *ring, uint32_t available, struct view *view)
{
    uint32_t offset = OFFSET(ring->tail), left = RING_BYTES - offset;
    uint64_t word = __atomic_load_n(word_at(ring->shared, offset), __ATOMIC_RELAXED);
    uint32_t size = (uint32_t)word;
    unsigned int flags = word >> 32 & 0xff;

    if (flags & SKIP) {
        if (left > available)
            return RING_BROKEN;
        ring->tail += left;
        return RING_EMPTY;
    }
    if (size > LINK_MAX_FRAME || ring_entry(size) > available || ring_entry(size) > left)
        return RING_BROKEN;
    view->data = ring->shared->data + offset + sizeof(uint64_t);
    view->size = size;
    view->ip_id = 0;
    view->unsealed = !(flags & SEALED);
    view->traffic_class = word >> 40 & 0xff;
    ring->tail += ring_entry(size);
    return RING_OK;
}

enum ring_result ring_take(struct ring_consumer *ring, struct view *view)
{
    enum ring_result result = RING_EMPTY;

    if (ring->head == ring->tail && !read_head(ring))
        return RING_BROKEN;
    while (result == RING_EMPTY && ring->head != ring->tail)
        result = take_entry(ring, ring->head - ring->tail, view);
    return result;
}

/* Release: our reading is over. No wake-up is lost: `tail` is stored before the fence and `waiting` loaded after
 * it, in ring_await_room() the other way round. */
bool ring_release(struct ring_consumer *ring)
{
    ring->released = ring->tail;
    atomic_store_explicit(&ring->shared->tail, ring->tail, memory_order_release);
    atomic_thread_fence(memory_order_seq_cst);
    return atomic_load_explicit(&ring->shared->waiting, memory_order_relaxed) &&
           atomic_load_explicit(&ring->shared->head, memory_order_relaxed) - ring->tail <= RING_BYTES / 2 &&
           atomic_exchange_explicit(&ring->shared->waiting, 0, memory_order_relaxed);
}

/* See ring_wants_wake(). */
bool ring_sleep(struct ring_consumer *ring)
{
    atomic_store_explicit(&ring->shared->asleep, 1, memory_order_relaxed);
    atomic_thread_fence(memory_order_seq_cst);
    return ring->head == ring->tail &&
           atomic_load_explicit(&ring->shared->head, memory_order_relaxed) == ring->tail;
}

void ring_awake(struct ring_consumer *ring)
{
    if (atomic_load_explicit(&ring->shared->asleep, memory_order_relaxed))
        atomic_store_explicit(&ring->shared->asleep, 0, memory_order_relaxed);
}
