/* A ground for peers on one host: frames for a device of the same user go through memory that both share, all
 * others over the UDP link that this one owns.
 *
 * Each device listens at an abstract UNIX socket named after its UDP endpoint; the names belong to the network
 * namespace, as the endpoint does. Who is about to send somewhere (prepare) connects there. Nobody listens: the
 * peer is elsewhere, or has no shared memory, and UDP it is. The owner of the other end is another user: UDP, and
 * counted. Else the sender makes memory with a ring for its direction (ring.h) and passes it on; when the other
 * side says that it has mapped it, frames go there. The connection stays: one byte wakes the other end, the
 * consumer for frames and the producer for room, and its end is the peer's end. So a channel has one direction,
 * and two devices have one channel for each.
 *
 * Whoever is of the same user could debug us as well; all the same the peer can neither crash nor block us. The
 * memory is sealed against shrinking, or it would not be mapped, for reading beyond its end is a SIGBUS. What is
 * read from it is checked (ring.h). No socket call waits: each says so itself, since the flags of a description
 * that was passed would be in the peer's hands too. A peer that dies at any moment leaves a ring whose published
 * part is whole; it is read to its end.
 *
 * Order. What was sent over UDP before the first frame in a new ring is in the socket by then, on one host; so
 * the socket is read first, once, and the change of the way makes no gap that would be repaired in vain.
 *
 * Looking at sockets is a system call, at rings is none. With channels open, sockets are looked at now and then
 * while polling (LOOK_EMPTY, LOOK_BUSY), and always before and after a sleep. */
#include <errno.h>
#include <sched.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "shm.h"
/* of the device */
uint64_t now_ns(void);

enum {
    EVENTS = 16,             /* a look takes at most */
    WAKES = 16,              /* bytes that one look takes from a channel */
    LOOK_EMPTY = 8,          /* receive calls between looks at the sockets, when rings are empty, */
    LOOK_BUSY = 32,          /* ... and when they are not */
    BATCH_BYTES = 128 << 10, /* of a ring in one receive call: the producer gets room back in between */
    BATCH_FRAMES = 256,
    SETTLE_LIMIT = 1000 * 1000 * 1000, /* ns */
    RESERVE = 64 << 10,      /* bytes of a ring for acknowledgements and the like, which nobody holds back */
};

/* --- looking at the sockets ---------------------------------------------------------------------------------- */

enum wakes { WAKES_NONE, WAKES_TAKEN, WAKES_REFUSED, WAKES_END };

/* Takes the bytes that wake. */
static enum wakes take_wakes(const struct channel *channel)
{
    char byte;

    for (int i = 0; i < WAKES; i++) {
        ssize_t rc = recv(channel->fd, &byte, sizeof(byte), MSG_DONTWAIT);

        if (rc < 0 && (errno == EAGAIN || errno == EINTR))
            return i ? WAKES_TAKEN : WAKES_NONE;
        if (rc <= 0)
            return WAKES_END;
        if (byte != CHANNEL_WAKE)
            return WAKES_REFUSED;
    }
    return WAKES_TAKEN;
}

static void wake_producer(struct shm_link *shm, struct channel *channel)
{
    enum wakes wakes;

    if (channel->state == CHANNEL_GREETING && !shm_take_answer(shm, channel)) {
        shm_end_channel(shm, channel);
        return;
    }
    if (channel->state == CHANNEL_GREETING)
        return;
    wakes = take_wakes(channel);
    if (wakes == WAKES_REFUSED || wakes == WAKES_END)
        shm_end_channel(shm, channel);
}

/* Its other end is gone. What it has sent is still taken, if it ever sent. */
static void consumer_gone(struct shm_link *shm, struct channel *channel)
{
    shm_end_channel(shm, channel);
    channel->drained = !channel->shared;
}

/* Something came on the connection. A wake-up that is taken while the device thread sleeps is one that it will not
 * see, so the ring asks for the next one; the rings are looked at after this. */
static void channel_event(struct shm_link *shm, struct channel *channel)
{
    enum wakes wakes;

    if (channel->producer) {
        wake_producer(shm, channel);
    } else if (channel->state == CHANNEL_GREETING) {
        shm_greet(shm, channel);
    } else {
        wakes = take_wakes(channel);
        if (wakes == WAKES_REFUSED || wakes == WAKES_END)
            consumer_gone(shm, channel);
        else if (shm->asleep)
            ring_sleep(&channel->in);
    }
}

/* Connections, and whether UDP has something. An event is for another descriptor each, so no channel that one
 * ends is met again. */
static bool look(struct shm_link *shm)
{
    struct epoll_event events[EVENTS];
    int count = epoll_wait(shm->link.fd, events, EVENTS, 0);
    bool udp = false;

    shm->look = count == EVENTS;
    shm->calls = 0;
    for (int i = 0; i < count; i++) {
        if (events[i].data.ptr == shm->udp)
            udp = true;
        else if (events[i].data.ptr == shm)
            shm_accept_all(shm);
        else
            channel_event(shm, events[i].data.ptr);
    }
    return udp;
}

/* --- receiving ----------------------------------------------------------------------------------------------- */

/* The views of the last call are over. */
static void release_taken(struct shm_link *shm)
{
    struct channel *channel = shm->in, *next;

    for (; channel; channel = next) {
        next = channel->next;
        if (channel->shared && channel->in.tail != channel->in.released && ring_release(&channel->in))
            shm_wake_peer(channel);
        if (channel->drained)
            shm_drop_consumer(shm, channel);
    }
}

static bool has_frames(const struct channel *channel)
{
    return channel->in.head != channel->in.tail ||
           atomic_load_explicit(&channel->shared->head, memory_order_relaxed) != channel->in.tail;
}

/* Frames of one channel, up to a batch. */
static int take_batch(struct shm_link *shm, struct channel *channel, struct view *views, int max)
{
    uint32_t start = channel->in.tail;
    enum ring_result result = RING_OK;
    int count = 0;

    while (count < max && count < BATCH_FRAMES && channel->in.tail - start < BATCH_BYTES) {
        result = ring_take(&channel->in, &views[count]);
        if (result != RING_OK)
            break;
        views[count].from = channel->peer;
        shm->link.counters->received_bytes += views[count++].size;
    }
    if (result == RING_OK)
        shm->left = true;
    else if (result == RING_BROKEN)
        shm_refuse_consumer(shm, channel);
    else if (channel->state == CHANNEL_ENDING)
        channel->drained = true;
    return count;
}

/* A channel of which more was left than of others goes behind them. */
static void rotate(struct shm_link *shm)
{
    struct channel *first = shm->in, **end = &shm->in;

    while (*end)
        end = &(*end)->next;
    *end = first;
    shm->in = first->next;
    first->next = NULL;
}

/* Whether it is the turn of the frames in the ring: a fresh channel waits until UDP was read, with nothing there. */
static bool may_begin(struct shm_link *shm, struct channel *channel, bool behind_udp)
{
    if (!channel->fresh)
        return true;
    if (channel->changing && !behind_udp) {
        channel->fresh = false;
        shm->num_fresh--;
        return true;
    }
    if (has_frames(channel))
        shm->left = true;
    else if (channel->state == CHANNEL_ENDING)
        channel->drained = true;
    return false;
}

/* `behind_udp`: UDP had frames just now. */
static int take_frames(struct shm_link *shm, struct view *views, int max, bool behind_udp)
{
    int count = 0;

    for (struct channel *channel = shm->in; channel; channel = channel->next) {
        if (!channel->shared || channel->drained || !may_begin(shm, channel, behind_udp))
            continue;
        count += take_batch(shm, channel, views + count, max - count);
    }
    if (shm->left && shm->in && shm->in->next)
        rotate(shm);
    shm->link.counters->received += (uint64_t)count;
    shm->link.counters->shm_received += (uint64_t)count;
    shm->busy = count > 0;
    return count;
}

static int receive_udp(struct shm_link *shm, struct view *views, int max)
{
    int count = shm->udp->ops->receive(shm->udp, views, max);

    shm->udp_has_more = count > 0;
    return count;
}

static bool is_time_to_look(struct shm_link *shm)
{
    return ++shm->calls >= (shm->busy || !shm->in ? LOOK_BUSY : LOOK_EMPTY) || shm->look;
}

/* Whether a fresh channel has frames: UDP is to be read before them, and after they were seen. */
static bool changes_over(struct shm_link *shm)
{
    struct channel *channel = shm->num_fresh ? shm->in : NULL;
    bool any = false;

    for (; channel; channel = channel->next) {
        channel->changing = channel->fresh && has_frames(channel);
        any = any || channel->changing;
    }
    /* The kernel's queue, which the sender filled first, is looked at after its ring. */
    atomic_thread_fence(memory_order_acquire);
    return any;
}

static int shm_receive(struct link *link, struct view *views, int max)
{
    struct shm_link *shm = shm_of(link);
    bool udp;
    int count = 0;

    release_taken(shm);
    shm->left = false;
    udp = is_time_to_look(shm) && look(shm);
    if (changes_over(shm) || udp || !shm->in || shm->udp_has_more)
        count = receive_udp(shm, views, max);
    return count + take_frames(shm, views + count, max - count, count > 0);
}

/* --- sending ------------------------------------------------------------------------------------------------- */

static void mark_dirty(struct shm_link *shm, struct channel *channel)
{
    if (channel->dirty)
        return;
    channel->dirty = true;
    channel->next_dirty = shm->dirty;
    shm->dirty = channel;
}

static void put(struct shm_link *shm, struct channel *channel, const struct frame *frame)
{
    struct usroce_counters *counters = shm->link.counters;

    switch (ring_put(&channel->out, frame)) {
    case RING_OK:
        counters->sent++;
        counters->shm_sent++;
        counters->sent_bytes += frame->size;
        mark_dirty(shm, channel);
        break;
    case RING_BROKEN:
        counters->shm_refused++;
        counters->send_errors++;
        shm_drop_producer(shm, channel);
        break;
    default:
        counters->send_errors++;
        break;
    }
}

static void shm_send(struct link *link, const struct frame *frame)
{
    struct shm_link *shm = shm_of(link);
    struct channel *channel = shm_open_channel(shm, frame->to);

    if (channel) {
        put(shm, channel, frame);
    } else {
        shm->udp->ops->send(shm->udp, frame);
        shm->udp_dirty = true;
    }
}

static void shm_flush(struct link *link)
{
    struct shm_link *shm = shm_of(link);
    struct channel *channel;

    while ((channel = shm->dirty)) {
        shm->dirty = channel->next_dirty;
        channel->dirty = false;
        ring_publish(&channel->out);
        if (ring_wants_wake(&channel->out))
            shm_wake_peer(channel);
    }
    if (shm->udp_dirty)
        shm->udp->ops->flush(shm->udp);
    shm->udp_dirty = false;
}

static bool shm_has_room(struct link *link, const struct endpoint *to, uint32_t size)
{
    struct shm_link *shm = shm_of(link);
    struct channel *channel = shm_open_channel(shm, to);

    if (!channel)
        return true;
    switch (ring_room(&channel->out, RESERVE + 2 * ring_entry(size))) { /* the end of the ring may be skipped */
    case RING_OK:
        channel->short_of_room = false;
        return true;
    case RING_FULL:
        channel->short_of_room = true;
        return false;
    default:
        shm->link.counters->shm_refused++;
        shm_drop_producer(shm, channel);
        return true;
    }
}

/* --- sleep --------------------------------------------------------------------------------------------------- */

/* Every ring is asked, even when one has frames: they are awake again with the next wake(). */
static bool consumers_sleep(struct shm_link *shm)
{
    bool may = true;

    for (struct channel *channel = shm->in; channel; channel = channel->next) {
        if (channel->state == CHANNEL_ENDING || (channel->state == CHANNEL_OPEN && !ring_sleep(&channel->in)))
            may = false;
    }
    return may;
}

static bool producers_sleep(struct shm_link *shm)
{
    bool may = true;

    for (int i = 0; shm->num_out && i < BUCKETS; i++) {
        for (struct channel *channel = shm->out[i]; channel; channel = channel->next) {
            if (!channel->short_of_room || channel->state != CHANNEL_OPEN || ring_await_room(&channel->out))
                continue;
            channel->short_of_room = false;
            may = false;
        }
    }
    return may;
}

/* The descriptor is readable for UDP, connections and the bytes that wake; rings are told to send these. Whoever
 * takes such a byte before the device thread sees it is told by `asleep` to ask for another one. */
static bool shm_sleep(struct link *link)
{
    struct shm_link *shm = shm_of(link);
    bool consumers, producers;

    release_taken(shm);
    shm->asleep = true;
    consumers = consumers_sleep(shm);
    producers = producers_sleep(shm);
    return consumers && producers && !shm->udp_has_more && !shm->look;
}

static void shm_wake(struct link *link)
{
    struct shm_link *shm = shm_of(link);

    if (!shm->asleep)
        return;
    shm->asleep = false;
    shm->look = true;
    for (struct channel *channel = shm->in; channel; channel = channel->next)
        if (channel->state == CHANNEL_OPEN)
            ring_awake(&channel->in);
}

/* --- one-sided operations without packets -------------------------------------------------------------------- */

static struct direct_peer *shm_direct(struct link *link, const struct endpoint *to)
{
    struct channel *channel = shm_open_channel(shm_of(link), to);

    return channel && channel->direct.table ? &channel->direct : NULL;
}

/* Waits while a peer is where it was. A dead one does nothing any more. */
static bool settle_channel(const struct channel *channel, uint64_t deadline)
{
    uint32_t busy = atomic_load_explicit(&channel->shared->busy, memory_order_acquire);

    if (!(busy & 1))
        return true;
    while (atomic_load_explicit(&channel->shared->busy, memory_order_acquire) == busy) {
        if (shm_is_dead(channel))
            return true;
        if (now_ns() >= deadline)
            return false;
        sched_yield();
    }
    return true;
}

static bool shm_settle(struct link *link)
{
    uint64_t deadline = 0;
    bool settled = true;

    for (struct channel *channel = shm_of(link)->in; channel; channel = channel->next) {
        if (channel->state != CHANNEL_OPEN || !(atomic_load(&channel->shared->busy) & 1))
            continue;
        if (!deadline)
            deadline = now_ns() + SETTLE_LIMIT;
        if (!settle_channel(channel, deadline))
            settled = false;
    }
    return settled;
}

/* --- life ---------------------------------------------------------------------------------------------------- */

/* Frames that are left in a ring need somebody to come back for them. */
static uint64_t shm_deadline(const struct link *link)
{
    return ((const struct shm_link *)(const void *)link)->left ? 0 : UINT64_MAX;
}

static void shm_close(struct link *link)
{
    struct shm_link *shm = shm_of(link);

    for (int i = 0; i < BUCKETS; i++)
        while (shm->out[i])
            shm_drop_producer(shm, shm->out[i]);
    while (shm->in)
        shm_drop_consumer(shm, shm->in);
    shm_stop_listening(shm);
    close(link->fd);
    shm->udp->ops->close(shm->udp);
    free(shm);
}

static const struct link_ops shm_ops = {
    .send = shm_send,
    .flush = shm_flush,
    .receive = shm_receive,
    .deadline = shm_deadline,
    .close = shm_close,
    .prepare = shm_prepare,
    .has_room = shm_has_room,
    .sleep = shm_sleep,
    .wake = shm_wake,
    .direct = shm_direct,
    .settle = shm_settle,
};

int link_shm_open(struct link **link, struct link *udp, const struct table *table)
{
    struct shm_link *shm = calloc(1, sizeof(*shm));
    int rc;

    if (!shm)
        return ENOMEM;
    shm->link = *udp;
    shm->link.ops = &shm_ops;
    shm->udp = udp;
    shm->table = table;
    shm->link.fd = epoll_create1(EPOLL_CLOEXEC);
    if (shm->link.fd < 0) {
        rc = errno;
        goto fail;
    }
    rc = shm_watch_fd(shm, udp->fd, udp);
    if (rc)
        goto fail_fd;
    shm_listen(shm);
    *link = &shm->link;
    return 0;

fail_fd:
    close(shm->link.fd);
fail:
    free(shm);
    return rc;
}
