/* Setting up a channel: how devices of one host find each other, and whom they let in. See link_shm.c. */
#define _GNU_SOURCE /* memfd_create, accept4, struct ucred */
#include "shm.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/magic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/vfs.h>
#include <unistd.h>

enum {
    BACKLOG = 128,
    ADMIT = 16, /* connections that one look accepts at most */
};

/* The first message of a channel, with the memory. */
struct hello {
    char magic[8];
    uint32_t ring_bytes;
    uint16_t port;
    uint16_t zero;
    uint8_t gid[16];
};

static const char magic[8] = "usroce2";

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

/* Sends a message, with a descriptor unless that is -1. Whether it is on its way. */
static bool send_with(int fd, void *data, size_t size, int passed)
{
    struct iovec iov = {data, size};
    _Alignas(struct cmsghdr) uint8_t control[CMSG_SPACE(sizeof(passed))] = {0};
    struct msghdr header = {.msg_iov = &iov, .msg_iovlen = 1};
    struct cmsghdr *message;

    if (passed >= 0) {
        header.msg_control = control;
        header.msg_controllen = sizeof(control);
        message = CMSG_FIRSTHDR(&header);
        message->cmsg_level = SOL_SOCKET;
        message->cmsg_type = SCM_RIGHTS;
        message->cmsg_len = CMSG_LEN(sizeof(passed));
        memcpy(CMSG_DATA(message), &passed, sizeof(passed));
    }
    return sendmsg(fd, &header, MSG_DONTWAIT | MSG_NOSIGNAL) == (ssize_t)size;
}

static bool send_hello(const struct shm_link *shm, int fd, int memory)
{
    struct hello hello = {.ring_bytes = RING_BYTES, .port = shm->link.local.port};

    memcpy(hello.magic, magic, sizeof(magic));
    memcpy(hello.gid, shm->link.local.gid.raw, sizeof(hello.gid));
    return send_with(fd, &hello, sizeof(hello), memory);
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
    struct channel *channel, **bucket = shm_bucket_of(shm, to);
    int memory, fd = call_peer(shm, to);

    if (fd < 0)
        return;
    channel = shm_new_channel(shm, fd, true);
    if (!channel) {
        close(fd);
        return;
    }
    memory = make_memory(&channel->shared);
    if (memory < 0 || !send_hello(shm, fd, memory)) {
        if (memory >= 0)
            close(memory);
        shm_free_channel(shm, channel);
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

void shm_prepare(struct link *link, const struct endpoint *to)
{
    struct shm_link *shm = shm_of(link);
    struct channel *channel = shm_find_channel(shm, to);

    if (channel && shm_is_dead(channel)) {
        shm_drop_producer(shm, channel);
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

/* Receives a message into `data`; *passed: the descriptor in it, or -1. As recvmsg(). */
static ssize_t receive_with(int fd, void *data, size_t size, int *passed)
{
    struct iovec iov = {data, size};
    _Alignas(struct cmsghdr) uint8_t control[CMSG_SPACE(sizeof(*passed))];
    struct msghdr header = {
        .msg_iov = &iov,
        .msg_iovlen = 1,
        .msg_control = control,
        .msg_controllen = sizeof(control),
    };
    ssize_t got = recvmsg(fd, &header, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);

    *passed = got < 0 ? -1 : take_descriptor(&header);
    return got;
}

enum greeting { GREETING_LATER, GREETING_THERE, GREETING_NONE, GREETING_WRONG };

/* Reads the first message. *memory: the descriptor in it, or -1. GREETING_LATER: not there yet; GREETING_NONE: the
 * peer died, or thought better of it. */
static enum greeting receive_hello(const struct channel *channel, struct hello *hello, int *memory)
{
    ssize_t size = receive_with(channel->fd, hello, sizeof(*hello), memory);

    if (size < 0)
        return errno == EAGAIN || errno == EINTR ? GREETING_LATER : GREETING_NONE;
    if (size == 0 && *memory < 0)
        return GREETING_NONE;
    return size == (ssize_t)sizeof(*hello) ? GREETING_THERE : GREETING_WRONG;
}

static bool is_right(const struct hello *hello)
{
    return !memcmp(hello->magic, magic, sizeof(magic)) && hello->ring_bytes == RING_BYTES && hello->port;
}

/* With our table, for one-sided operations that go without us. */
static void answer(const struct shm_link *shm, const struct channel *channel)
{
    char byte = CHANNEL_WAKE;

    send_with(channel->fd, &byte, 1, shm->table ? shm->table->fd : -1); /* if it fails, the next look sees why */
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
    answer(shm, channel);
}

void shm_greet(struct shm_link *shm, struct channel *channel)
{
    struct hello hello;
    int memory;
    enum greeting greeting = receive_hello(channel, &hello, &memory);

    if (greeting == GREETING_THERE && is_right(&hello) && memory >= 0 && map_memory(channel, memory)) {
        open_consumer(shm, channel, &hello);
    } else if (greeting == GREETING_NONE) {
        shm_end_channel(shm, channel);
        channel->drained = true;
    } else if (greeting != GREETING_LATER) {
        shm_tell(channel, CHANNEL_REFUSED);
        shm_refuse_consumer(shm, channel);
    }
    if (memory >= 0)
        close(memory);
}

/* --- the answer ---------------------------------------------------------------------------------------------- */

static pid_t process_of(int fd)
{
    struct ucred peer;
    socklen_t size = sizeof(peer);

    return getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &size) == 0 ? peer.pid : 0;
}

/* A table that cannot be used is no harm: packets do the same. */
static void take_table(const struct shm_link *shm, struct channel *channel, int passed)
{
    pid_t pid = process_of(channel->fd);
    const struct table_shared *table = shm->table && pid > 0 ? table_map(passed) : NULL;

    if (table)
        direct_set_up(&channel->direct, table, &channel->shared->busy, channel->fd, pid);
}

bool shm_take_answer(struct shm_link *shm, struct channel *channel)
{
    char byte;
    int passed;
    ssize_t size = receive_with(channel->fd, &byte, sizeof(byte), &passed);
    bool later = size < 0 && (errno == EAGAIN || errno == EINTR), opens = size == 1 && byte == CHANNEL_WAKE;

    if (opens) {
        if (passed >= 0)
            take_table(shm, channel, passed);
        channel->state = CHANNEL_OPEN;
        shm->link.counters->shm_peers++;
    } else if (size == 1) {
        shm->link.counters->shm_refused++;
    }
    if (passed >= 0)
        close(passed);
    return opens || later;
}

/* --- the listener -------------------------------------------------------------------------------------------- */

/* Nobody listens any more: those who have no channel yet use UDP. */
void shm_stop_listening(struct shm_link *shm)
{
    shm_close_fd(shm, &shm->listener);
}

static void admit(struct shm_link *shm, int fd)
{
    struct channel *channel = NULL;

    if (!is_same_user(fd))
        shm->link.counters->shm_refused++;
    else if (shm->num_in < MAX_CHANNELS)
        channel = shm_new_channel(shm, fd, false);
    if (!channel) {
        close(fd);
        return;
    }
    channel->next = shm->in;
    shm->in = channel;
    shm->num_in++;
    shm_greet(shm, channel);
}

void shm_accept_all(struct shm_link *shm)
{
    for (int i = 0; i < ADMIT; i++) {
        int fd = accept4(shm->listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);

        if (fd >= 0) {
            admit(shm, fd);
            continue;
        }
        /* Out of descriptors, or worse: the listener would stay readable, and nobody could sleep. */
        if (errno != EAGAIN && errno != EINTR && errno != ECONNABORTED)
            shm_stop_listening(shm);
        return;
    }
}

/* Without a listener nobody finds us, and all send to us over UDP: somebody else has the name, for instance. */
void shm_listen(struct shm_link *shm)
{
    struct sockaddr_un name;
    socklen_t size = name_of(&shm->link.local, &name);

    shm->listener = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (shm->listener < 0)
        return;
    if (bind(shm->listener, (const struct sockaddr *)(const void *)&name, size) || listen(shm->listener, BACKLOG)) {
        shm_stop_listening(shm);
        return;
    }
    if (shm_watch_fd(shm, shm->listener, shm))
        shm_stop_listening(shm);
}
