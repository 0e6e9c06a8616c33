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
#define _GNU_SOURCE /* memfd_create, accept4, struct ucred */
#include <errno.h>
#include <fcntl.h>
#include <linux/magic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/vfs.h>
#include <unistd.h>

#include "ring.h"

enum {
    BUCKETS = 64,
    MAX_CHANNELS = 1024,        /* each way */
    BACKLOG = 128,
    EVENTS = 16,                /* a look takes at most */
    WAKES = 16,                 /* bytes that one look takes from a channel */
    LOOK_EMPTY = 8,             /* receive calls between looks at the sockets, when rings are empty, */
    LOOK_BUSY = 32,             /* ... and when they are not */
    BATCH_BYTES = 128 << 10,    /* of a ring in one receive call: the producer gets room back in between */
    BATCH_FRAMES = 256,
    RESERVE = 64 << 10,         /* bytes of a ring for acknowledgements and the like, which nobody holds back */
};

enum channel_state {
    CHANNEL_GREETING, /* consumer: accepted, and nothing heard yet; producer: not answered yet */
    CHANNEL_OPEN,
    CHANNEL_ENDING,   /* consumer: the peer is gone, what it sent is still there */
};

struct channel {
    struct channel *next;
    bool producer;
    enum channel_state state;
    int fd;                     /* -1: closed */
    struct endpoint peer;
    struct ring_shared *shared; /* NULL: not yet */
    union {
        struct ring_producer out;
        struct ring_consumer in;
    };
    bool dirty;                 /* producer: frames since the last flush; in shm_link.dirty */
    struct channel *next_dirty;
    bool short_of_room;         /* producer: somebody waits for it */
    bool fresh;                 /* consumer: nothing taken yet */
    bool changing;              /* ... but it has frames, and had them before UDP was read */
    bool drained;               /* consumer, ending: nothing is left */
};

struct shm_link {
    struct link link;
    struct link *udp;
    int listener;
    struct channel *out[BUCKETS]; /* by endpoint */
    struct channel *in;
    uint32_t num_out, num_in;
    struct channel *dirty;
    bool udp_dirty;
    bool udp_has_more;            /* for all we know: it gave some the last time */
    bool look;                    /* the next receive call looks at the sockets */
    bool asleep;                  /* between sleep and wake: rings have to say so too */
    bool left;                    /* receive left frames in a ring */
    bool busy;                    /* it found some */
    uint32_t num_fresh;           /* channels */
    uint32_t calls;               /* of receive, since the last look */
};

/* The first message of a channel, with the memory. */
struct hello {
    char magic[8];
    uint32_t ring_bytes;
    uint16_t port;
    uint16_t zero;
    uint8_t gid[16];
};

static const char magic[8] = "usroce1";

static struct shm_link *shm_of(struct link *link)
{
    return (struct shm_link *)(void *)link; /* its first member */
}

/* --- names and users ----------------------------------------------------------------------------------------- */

/* The abstract address of a device; returns its size. */
static socklen_t name_of(const struct endpoint *endpoint, struct sockaddr_un *name)
{
    char *at = name->sun_path + 1;

    memset(name, 0, sizeof(*name));
    name->sun_family = AF_UNIX;
    at += sprintf(at, "aiordma-usroce/");
    for (int i = 0; i < 16; i++)
        at += sprintf(at, "%02x", endpoint->gid.raw[i]);
    at += sprintf(at, "/%u", endpoint->port);
    return (socklen_t)(at - (char *)name);
}

static bool is_same_user(int fd)
{
    struct ucred peer;
    socklen_t size = sizeof(peer);

    return getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &size) == 0 && peer.uid == geteuid();
}

/* --- channels ------------------------------------------------------------------------------------------------ */

static struct channel **bucket_of(struct shm_link *shm, const struct endpoint *peer)
{
    uint32_t hash = peer->port;

    for (int i = 0; i < 16; i++)
        hash = hash * 31 + peer->gid.raw[i];
    return &shm->out[(hash ^ hash >> 16) % BUCKETS];
}

static struct channel *find_channel(struct shm_link *shm, const struct endpoint *to)
{
    struct channel *channel = *bucket_of(shm, to);

    while (channel && !same_endpoint(&channel->peer, to))
        channel = channel->next;
    return channel;
}

/* The channel through which frames go there, or NULL. */
static struct channel *open_channel(struct shm_link *shm, const struct endpoint *to)
{
    struct channel *channel = shm->num_out ? find_channel(shm, to) : NULL;

    return channel && channel->state == CHANNEL_OPEN ? channel : NULL;
}

/* Its events carry `tag`. 0 or an errno. */
static int watch_fd(const struct shm_link *shm, int fd, void *tag)
{
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = tag};

    return epoll_ctl(shm->link.fd, EPOLL_CTL_ADD, fd, &event) ? errno : 0;
}

/* A channel that is watched; NULL: it cannot be had. The caller puts it into its list. */
static struct channel *new_channel(struct shm_link *shm, int fd, bool producer)
{
    struct channel *channel = calloc(1, sizeof(*channel));

    if (!channel)
        return NULL;
    channel->producer = producer;
    channel->fd = fd;
    if (watch_fd(shm, fd, channel)) {
        free(channel);
        return NULL;
    }
    return channel;
}

/* Closing alone does not end the events where a forked child has the description too. */
static void close_fd(const struct shm_link *shm, int *fd)
{
    if (*fd >= 0) {
        epoll_ctl(shm->link.fd, EPOLL_CTL_DEL, *fd, NULL);
        close(*fd);
    }
    *fd = -1;
}

static void free_channel(const struct shm_link *shm, struct channel *channel)
{
    close_fd(shm, &channel->fd);
    if (channel->shared)
        munmap(channel->shared, sizeof(*channel->shared));
    free(channel);
}

static void unlink_from(struct channel **list, struct channel *channel)
{
    while (*list != channel)
        list = &(*list)->next;
    *list = channel->next;
}

static void forget_dirty(struct shm_link *shm, struct channel *channel)
{
    struct channel **at = &shm->dirty;

    if (!channel->dirty)
        return;
    while (*at != channel)
        at = &(*at)->next_dirty;
    *at = channel->next_dirty;
}

/* From now on UDP goes there. */
static void drop_producer(struct shm_link *shm, struct channel *channel)
{
    forget_dirty(shm, channel);
    unlink_from(bucket_of(shm, &channel->peer), channel);
    shm->num_out--;
    if (channel->state == CHANNEL_OPEN)
        shm->link.counters->shm_peers--;
    free_channel(shm, channel);
}

/* Not while views of its frames are valid. */
static void drop_consumer(struct shm_link *shm, struct channel *channel)
{
    unlink_from(&shm->in, channel);
    shm->num_in--;
    shm->num_fresh -= channel->fresh;
    free_channel(shm, channel);
}

/* The other end is gone, or writes garbage. A consumer's frames may still be looked at: it goes later, see
 * release_taken(). */
static void end_channel(struct shm_link *shm, struct channel *channel)
{
    if (channel->producer) {
        drop_producer(shm, channel);
        return;
    }
    close_fd(shm, &channel->fd);
    channel->state = CHANNEL_ENDING;
}

/* What the peer wrote makes no sense: nothing more is taken from there. */
static void refuse_consumer(struct shm_link *shm, struct channel *channel)
{
    shm->link.counters->shm_refused++;
    end_channel(shm, channel);
    channel->drained = true;
}

/* Never waits. That the socket is full of bytes nobody read is as good; that it is closed, the next look sees. */
static void wake_peer(const struct channel *channel)
{
    ssize_t rc = channel->fd >= 0 ? send(channel->fd, "", 1, MSG_DONTWAIT | MSG_NOSIGNAL) : 0;

    (void)rc;
}

/* --- producer: setting up ------------------------------------------------------------------------------------ */

/* Memory that cannot shrink; *shared is where it is. Its descriptor, or -1. */
static int make_memory(struct ring_shared **shared)
{
    int fd = memfd_create("usroce", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    void *memory;

    if (fd < 0)
        return -1;
    if (ftruncate(fd, sizeof(**shared)) || fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL))
        goto fail;
    memory = mmap(NULL, sizeof(**shared), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (memory == MAP_FAILED)
        goto fail;
    madvise(memory, sizeof(**shared), MADV_DONTFORK); /* a child has no business there; if it fails, it does nothing */
    *shared = memory;
    return fd;
fail:
    close(fd);
    return -1;
}

/* Whether the message is on its way. */
static bool send_hello(const struct shm_link *shm, int fd, int memory)
{
    struct hello hello = {.ring_bytes = RING_BYTES, .port = shm->link.local.port};
    struct iovec iov = {&hello, sizeof(hello)};
    _Alignas(struct cmsghdr) uint8_t control[CMSG_SPACE(sizeof(memory))] = {0};
    struct msghdr header = {
        .msg_iov = &iov,
        .msg_iovlen = 1,
        .msg_control = control,
        .msg_controllen = sizeof(control),
    };
    struct cmsghdr *passed = CMSG_FIRSTHDR(&header);

    memcpy(hello.magic, magic, sizeof(magic));
    memcpy(hello.gid, shm->link.local.gid.raw, sizeof(hello.gid));
    passed->cmsg_level = SOL_SOCKET;
    passed->cmsg_type = SCM_RIGHTS;
    passed->cmsg_len = CMSG_LEN(sizeof(memory));
    memcpy(CMSG_DATA(passed), &memory, sizeof(memory));
    return sendmsg(fd, &header, MSG_DONTWAIT | MSG_NOSIGNAL) == (ssize_t)sizeof(hello);
}

/* A connection to the device at `to` if there is one and it is our user's; else -1. */
static int call_peer(struct shm_link *shm, const struct endpoint *to)
{
    struct sockaddr_un name;
    socklen_t size = name_of(to, &name);
    int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);

    if (fd < 0)
        return -1;
    if (connect(fd, (const struct sockaddr *)(const void *)&name, size))
        goto fail;
    if (!is_same_user(fd)) {
        shm->link.counters->shm_refused++;
        goto fail;
    }
    return fd;
fail:
    close(fd);
    return -1;
}

static void set_up(struct shm_link *shm, const struct endpoint *to)
{
    struct channel *channel, **bucket = bucket_of(shm, to);
    int memory, fd = call_peer(shm, to);

    if (fd < 0)
        return;
    channel = new_channel(shm, fd, true);
    if (!channel) {
        close(fd);
        return;
    }
    memory = make_memory(&channel->shared);
    if (memory < 0 || !send_hello(shm, fd, memory)) {
        if (memory >= 0)
            close(memory);
        free_channel(shm, channel);
        return;
    }
    close(memory);
    channel->peer = *to;
    channel->out.shared = channel->shared;
    channel->next = *bucket;
    *bucket = channel;
    shm->num_out++;
    shm->look = true;
}

/* Whether the other end closed it, perhaps unseen so far. */
static bool is_dead(const struct channel *channel)
{
    char byte;

    return recv(channel->fd, &byte, sizeof(byte), MSG_PEEK | MSG_DONTWAIT) == 0;
}

static void shm_prepare(struct link *link, const struct endpoint *to)
{
    struct shm_link *shm = shm_of(link);
    struct channel *channel = find_channel(shm, to);

    if (channel && is_dead(channel)) {
        drop_producer(shm, channel);
        channel = NULL;
    }
    if (!channel && shm->num_out < MAX_CHANNELS)
        set_up(shm, to);
}

/* --- consumer: setting up ------------------------------------------------------------------------------------ */

/* Nothing that a peer can do to the memory later makes reading it fail: its size is fixed, and its pages come from
 * memory, not from a pool of huge pages that can run dry. */
static bool is_safe(int memory)
{
    const int needed = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL;
    int seals = fcntl(memory, F_GET_SEALS);
    struct stat file;
    struct statfs system;

    return seals >= 0 && (seals & needed) == needed && fstat(memory, &file) == 0 &&
           file.st_size == (off_t)sizeof(struct ring_shared) && fstatfs(memory, &system) == 0 &&
           system.f_type == TMPFS_MAGIC;
}

static bool map_memory(struct channel *channel, int memory)
{
    void *mapped;

    if (!is_safe(memory))
        return false;
    mapped = mmap(NULL, sizeof(*channel->shared), PROT_READ | PROT_WRITE, MAP_SHARED, memory, 0);
    if (mapped == MAP_FAILED)
        return false;
    madvise(mapped, sizeof(*channel->shared), MADV_DONTFORK);
    channel->shared = mapped;
    channel->in.shared = mapped;
    return true;
}

/* The first descriptor that came with a message, or -1; others are closed. */
static int take_descriptor(struct msghdr *header)
{
    int fd = -1;

    for (struct cmsghdr *control = CMSG_FIRSTHDR(header); control; control = CMSG_NXTHDR(header, control)) {
        size_t count = control->cmsg_len < CMSG_LEN(0) ? 0 : (control->cmsg_len - CMSG_LEN(0)) / sizeof(int);

        if (control->cmsg_level != SOL_SOCKET || control->cmsg_type != SCM_RIGHTS)
            continue;
        for (size_t i = 0; i < count; i++) {
            int passed;

            memcpy(&passed, CMSG_DATA(control) + i * sizeof(passed), sizeof(passed));
            if (fd < 0)
                fd = passed;
            else
                close(passed);
        }
    }
    return fd;
}

/* Reads the first message. *memory: the descriptor in it, or -1. RING_OK, RING_EMPTY (not there yet) or
 * RING_BROKEN. */
static enum ring_result receive_hello(const struct channel *channel, struct hello *hello, int *memory)
{
    struct iovec iov = {hello, sizeof(*hello)};
    _Alignas(struct cmsghdr) uint8_t control[CMSG_SPACE(sizeof(*memory))];
    struct msghdr header = {
        .msg_iov = &iov,
        .msg_iovlen = 1,
        .msg_control = control,
        .msg_controllen = sizeof(control),
    };
    ssize_t size = recvmsg(channel->fd, &header, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);

    *memory = -1;
    if (size < 0)
        return errno == EAGAIN || errno == EINTR ? RING_EMPTY : RING_BROKEN;
    *memory = take_descriptor(&header);
    return size == (ssize_t)sizeof(*hello) ? RING_OK : RING_BROKEN;
}

static bool is_right(const struct hello *hello)
{
    return !memcmp(hello->magic, magic, sizeof(magic)) && hello->ring_bytes == RING_BYTES && hello->port;
}

/* The answer is what opens the channel for the producer, so it comes last. A ring that is opened while the others
 * sleep has to sleep too. */
static void open_consumer(struct shm_link *shm, struct channel *channel, const struct hello *hello)
{
    memcpy(channel->peer.gid.raw, hello->gid, sizeof(hello->gid));
    channel->peer.port = hello->port;
    channel->state = CHANNEL_OPEN;
    channel->fresh = true;
    shm->num_fresh++;
    if (shm->asleep)
        ring_sleep(&channel->in);
    wake_peer(channel);
}

static void greet(struct shm_link *shm, struct channel *channel)
{
    struct hello hello;
    int memory;
    enum ring_result result = receive_hello(channel, &hello, &memory);

    if (result == RING_OK && is_right(&hello) && memory >= 0 && map_memory(channel, memory))
        open_consumer(shm, channel, &hello);
    else if (result != RING_EMPTY)
        refuse_consumer(shm, channel);
    if (memory >= 0)
        close(memory);
}

/* Nobody listens any more: those who have no channel yet use UDP. */
static void stop_listening(struct shm_link *shm)
{
    close_fd(shm, &shm->listener);
}

static void admit(struct shm_link *shm, int fd)
{
    struct channel *channel = NULL;

    if (!is_same_user(fd))
        shm->link.counters->shm_refused++;
    else if (shm->num_in < MAX_CHANNELS)
        channel = new_channel(shm, fd, false);
    if (!channel) {
        close(fd);
        return;
    }
    channel->next = shm->in;
    shm->in = channel;
    shm->num_in++;
    greet(shm, channel);
}

static void accept_all(struct shm_link *shm)
{
    for (int i = 0; i < EVENTS; i++) {
        int fd = accept4(shm->listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);

        if (fd >= 0) {
            admit(shm, fd);
            continue;
        }
        /* Out of descriptors, or worse: the listener would stay readable, and nobody could sleep. */
        if (errno != EAGAIN && errno != EINTR && errno != ECONNABORTED)
            stop_listening(shm);
        return;
    }
}

/* --- looking at the sockets ---------------------------------------------------------------------------------- */

/* Takes the bytes that wake. False: the other end is gone. */
static bool take_wakes(const struct channel *channel)
{
    char byte;

    for (int i = 0; i < WAKES; i++) {
        ssize_t rc = recv(channel->fd, &byte, sizeof(byte), MSG_DONTWAIT);

        if (rc < 0)
            return errno == EAGAIN || errno == EINTR;
        if (rc == 0)
            return false;
    }
    return true;
}

static void wake_producer(struct shm_link *shm, struct channel *channel)
{
    if (!take_wakes(channel)) {
        if (channel->state == CHANNEL_GREETING)
            shm->link.counters->shm_refused++;
        end_channel(shm, channel);
        return;
    }
    if (channel->state == CHANNEL_GREETING) {
        channel->state = CHANNEL_OPEN;
        shm->link.counters->shm_peers++;
    }
}

/* Its other end is gone. What it has sent is still taken, if it ever sent. */
static void consumer_gone(struct shm_link *shm, struct channel *channel)
{
    end_channel(shm, channel);
    channel->drained = !channel->shared;
}

/* Something came on the connection. A wake-up that is taken while the device thread sleeps is one that it will not
 * see, so the ring asks for the next one; the rings are looked at after this. */
static void channel_event(struct shm_link *shm, struct channel *channel)
{
    if (channel->producer) {
        wake_producer(shm, channel);
    } else if (channel->state == CHANNEL_GREETING) {
        greet(shm, channel);
    } else if (!take_wakes(channel)) {
        consumer_gone(shm, channel);
    } else if (shm->asleep) {
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
            accept_all(shm);
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
            wake_peer(channel);
        if (channel->drained)
            drop_consumer(shm, channel);
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
        refuse_consumer(shm, channel);
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
        drop_producer(shm, channel);
        break;
    default:
        counters->send_errors++;
        break;
    }
}

static void shm_send(struct link *link, const struct frame *frame)
{
    struct shm_link *shm = shm_of(link);
    struct channel *channel = open_channel(shm, frame->to);

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
            wake_peer(channel);
    }
    if (shm->udp_dirty)
        shm->udp->ops->flush(shm->udp);
    shm->udp_dirty = false;
}

static bool shm_has_room(struct link *link, const struct endpoint *to, uint32_t size)
{
    struct shm_link *shm = shm_of(link);
    struct channel *channel = open_channel(shm, to);
    uint32_t room;

    if (!channel)
        return true;
    if (!ring_room(&channel->out, &room)) {
        shm->link.counters->shm_refused++;
        drop_producer(shm, channel);
        return true;
    }
    channel->short_of_room = room < RESERVE + 2 * ring_entry(size); /* the end of the ring may be skipped */
    return !channel->short_of_room;
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
            drop_producer(shm, shm->out[i]);
    while (shm->in)
        drop_consumer(shm, shm->in);
    stop_listening(shm);
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
};

/* Without a listener nobody finds us, and all send to us over UDP: somebody else has the name, for instance. */
static void listen_at(struct shm_link *shm)
{
    struct sockaddr_un name;
    socklen_t size = name_of(&shm->link.local, &name);

    shm->listener = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (shm->listener < 0)
        return;
    if (bind(shm->listener, (const struct sockaddr *)(const void *)&name, size) || listen(shm->listener, BACKLOG)) {
        stop_listening(shm);
        return;
    }
    if (watch_fd(shm, shm->listener, shm))
        stop_listening(shm);
}

int link_shm_open(struct link **link, struct link *udp)
{
    struct shm_link *shm = calloc(1, sizeof(*shm));
    int rc;

    if (!shm)
        return ENOMEM;
    shm->link = *udp;
    shm->link.ops = &shm_ops;
    shm->udp = udp;
    shm->link.fd = epoll_create1(EPOLL_CLOEXEC);
    if (shm->link.fd < 0) {
        rc = errno;
        goto fail;
    }
    rc = watch_fd(shm, udp->fd, udp);
    if (rc)
        goto fail_fd;
    listen_at(shm);
    *link = &shm->link;
    return 0;

fail_fd:
    close(shm->link.fd);
fail:
    free(shm);
    return rc;
}
