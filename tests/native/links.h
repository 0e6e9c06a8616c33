/* What the tests of links share: frames with an ICRC, a side of a UDP link, and a ground that only notes what it
 * is given, with a clock that the test sets. For one file that is a test. */
#ifndef TEST_LINKS_H
#define TEST_LINKS_H

#include <arpa/inet.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "icrc.h"
#include "link.h"

enum { MAX_FRAMES = 20000, HEAD = 12, TRAILER = 4, SMALLEST = HEAD + TRAILER };

static int failures;

static inline void check_at(int holds, const char *what, int line)
{
    if (!holds) {
        fprintf(stderr, "line %d, not so: %s\n", line, what);
        failures++;
    }
}
#define check(holds, what) check_at(holds, what, __LINE__)

static inline void need(int holds, const char *what)
{
    if (!holds) {
        fprintf(stderr, "cannot go on without: %s\n", what);
        exit(1);
    }
}

/* --- the clock of the device ------------------------------------------------------------------------------- */

#ifndef REAL_CLOCK
static uint64_t fake_now = 1000;

uint64_t now_ns(void);
uint64_t now_ns(void)
{
    return fake_now;
}
#endif

/* --- frames ------------------------------------------------------------------------------------------------ */

static inline struct endpoint endpoint(const char *text, uint16_t port)
{
    struct endpoint result = {.port = port};

    if (strchr(text, ':')) {
        need(inet_pton(AF_INET6, text, result.gid.raw) == 1, "an IPv6 address");
    } else {
        result.gid.raw[10] = result.gid.raw[11] = 0xff;
        need(inet_pton(AF_INET, text, result.gid.raw + 12) == 1, "an IPv4 address");
    }
    return result;
}

/* Frame number `n` of a test: its content tells the number, and its memory is its own. */
static inline uint8_t *make_frame(const struct endpoint *from, const struct endpoint *to, uint32_t n,
                                  uint32_t size)
{
    uint8_t *data = malloc(size);
    uint32_t icrc;
    struct iovec iov = {data, size};

    need(data != NULL, "memory");
    for (uint32_t i = 0; i < size; i++)
        data[i] = (uint8_t)(n * 31 + i);
    memcpy(data, &n, sizeof(n));
    icrc = icrc_frame(from, to, &iov, 1, size);
    for (int i = 0; i < TRAILER; i++)
        data[size - TRAILER + i] = (uint8_t)(icrc >> 8 * i);
    return data;
}

static inline uint32_t number_of(const uint8_t *data)
{
    uint32_t n;

    memcpy(&n, data, sizeof(n));
    return n;
}

/* Frames of one flush, whose memory must stay until then. */
static uint8_t *pending[MAX_FRAMES];
static uint32_t num_pending;

/* Sends frame `n` in one, two or three pieces. */
static inline void send_frame(struct link *link, const struct endpoint *to, uint32_t n, uint32_t size,
                              uint8_t traffic_class)
{
    uint8_t *data = make_frame(&link->local, to, n, size);
    struct iovec iov[3] = {{data, HEAD}, {data + HEAD, size - SMALLEST}, {data + size - TRAILER, TRAILER}};
    struct frame frame = {.to = to, .iov = iov, .niov = 3, .size = size, .traffic_class = traffic_class};

    if (n % 3 == 0) {
        iov[0].iov_len = size;
        frame.niov = 1;
    } else if (n % 3 == 1) {
        iov[1].iov_len = size - HEAD;
        frame.niov = 2;
    }
    pending[num_pending++] = data;
    link->ops->send(link, &frame);
}

static inline void flush(struct link *link)
{
    link->ops->flush(link);
    while (num_pending)
        free(pending[--num_pending]);
}

/* --- UDP --------------------------------------------------------------------------------------------------- */

struct side {
    struct link *link;
    struct usroce_counters counters;
    uint32_t buffer;
};

static inline int open_side(struct side *side, const char *address, uint16_t port, bool gso)
{
    struct endpoint local = endpoint(address, port);
    /* What any user may have, so that no more is sent at a time than fits. */
    struct link_udp_options options = {.socket_buffer = 200000, .gso = gso};

    memset(side, 0, sizeof(*side));
    return link_udp_open(&side->link, &local, &options, &side->counters, &side->buffer);
}

static inline void close_side(struct side *side)
{
    side->link->ops->close(side->link);
}

/* Receives up to `max` frames, waiting for the first. */
static inline int receive(struct link *link, struct view *views, int max)
{
    int count = link->ops->receive(link, views, max);
    struct pollfd fd = {.fd = link->fd, .events = POLLIN};

    if (!count && poll(&fd, 1, 2000) == 1)
        count = link->ops->receive(link, views, max);
    return count;
}

/* --- a ground that takes notes ----------------------------------------------------------------------------- */

/* Frames are read at the flush, as the kernel would: too early an end of their memory is seen by the sanitizer. */
struct notes {
    struct link link;
    struct usroce_counters counters;
    struct frame frames[MAX_FRAMES];
    struct iovec pieces[MAX_FRAMES][3];
    uint32_t queued;
    uint32_t numbers[MAX_FRAMES]; /* of the frames sent, in order */
    uint32_t sound;               /* how many had the right ICRC */
    uint32_t own_memory;          /* how many came in the memory of the test */
    uint32_t sent;
    uint64_t deadline;
    int closed;
    struct view *incoming;        /* what receive gives */
    int num_incoming;
};

static struct notes notes;

static inline void notes_send(struct link *link, const struct frame *frame)
{
    struct notes *self = (void *)link;

    need(self->queued < MAX_FRAMES && frame->niov <= 3, "room");
    memcpy(self->pieces[self->queued], frame->iov, (size_t)frame->niov * sizeof(struct iovec));
    self->frames[self->queued] = *frame;
    self->frames[self->queued].iov = self->pieces[self->queued];
    self->queued++;
    for (uint32_t i = 0; i < num_pending; i++)
        self->own_memory += frame->iov->iov_base == pending[i];
}

static inline void notes_flush(struct link *link)
{
    struct notes *self = (void *)link;

    for (uint32_t i = 0; i < self->queued; i++) {
        struct frame *frame = &self->frames[i];
        struct iovec *last = &frame->iov[frame->niov - 1];
        uint8_t *trailer = (uint8_t *)last->iov_base + last->iov_len - TRAILER;
        uint32_t icrc = icrc_frame(&link->local, frame->to, frame->iov, frame->niov, frame->size);

        self->numbers[self->sent++] = number_of(frame->iov[0].iov_base);
        self->sound += number_of(trailer) == icrc;
        memset(trailer, 0, TRAILER); /* a link may change it */
    }
    self->queued = 0;
}

static inline int notes_receive(struct link *link, struct view *views, int max)
{
    struct notes *self = (void *)link;
    int count = self->num_incoming < max ? self->num_incoming : max;

    if (count)
        memcpy(views, self->incoming, (size_t)count * sizeof(*views));
    self->num_incoming -= count;
    return count;
}

static inline uint64_t notes_deadline(const struct link *link)
{
    return ((const struct notes *)(const void *)link)->deadline;
}

static inline void notes_close(struct link *link)
{
    ((struct notes *)(void *)link)->closed++;
}

static const struct link_ops notes_ops = {
    .send = notes_send,
    .flush = notes_flush,
    .receive = notes_receive,
    .deadline = notes_deadline,
    .close = notes_close,
};

static inline struct link *new_notes(const char *address)
{
    memset(&notes, 0, sizeof(notes));
    notes.link.ops = &notes_ops;
    notes.link.local = endpoint(address, 4791);
    notes.link.fd = -1;
    notes.deadline = UINT64_MAX;
    notes.link.counters = &notes.counters;
    return &notes.link;
}

/* Frames `first`.. of 64 bytes, with a flush after every 16. */
static inline void send_many(struct link *link, uint32_t first, uint32_t count)
{
    struct endpoint to = endpoint("10.0.0.2", 4791);

    for (uint32_t n = first; n < first + count; n++) {
        send_frame(link, &to, n, 64, 0);
        if (n % 16 == 15)
            flush(link);
    }
    flush(link);
}

#endif
