/* The channels of a shared-memory link: tables, and how one ends. See link_shm.c. */
#define _GNU_SOURCE /* POLLRDHUP */
#include "shm.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

struct channel **shm_bucket_of(struct shm_link *shm, const struct endpoint *peer)
{
    uint32_t hash = peer->port;

    for (int i = 0; i < 16; i++)
        hash = hash * 31 + peer->gid.raw[i];
    return &shm->out[(hash ^ hash >> 16) % BUCKETS];
}

struct channel *shm_find_channel(struct shm_link *shm, const struct endpoint *to)
{
    struct channel *channel = *shm_bucket_of(shm, to);

    while (channel && !same_endpoint(&channel->peer, to))
        channel = channel->next;
    return channel;
}

/* Nearly always it is the one of the frame before. */
struct channel *shm_open_channel(struct shm_link *shm, const struct endpoint *to)
{
    struct channel *channel = shm->last_out;

    if (!shm->num_out)
        return NULL;
    if (!channel || !same_endpoint(&channel->peer, to)) {
        channel = shm_find_channel(shm, to);
        shm->last_out = channel;
    }
    return channel && channel->state == CHANNEL_OPEN ? channel : NULL;
}

/* Its events carry `tag`. 0 or an errno. */
int shm_watch_fd(const struct shm_link *shm, int fd, void *tag)
{
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = tag};

    return epoll_ctl(shm->link.fd, EPOLL_CTL_ADD, fd, &event) ? errno : 0;
}

/* A channel that is watched; NULL: it cannot be had. The caller puts it into its list. */
struct channel *shm_new_channel(struct shm_link *shm, int fd, bool producer)
{
    struct channel *channel = calloc(1, sizeof(*channel));

    if (!channel)
        return NULL;
    channel->producer = producer;
    channel->fd = fd;
    if (shm_watch_fd(shm, fd, channel)) {
        free(channel);
        return NULL;
    }
    return channel;
}

/* Closing alone does not end the events where a forked child has the description too. */
void shm_close_fd(const struct shm_link *shm, int *fd)
{
    if (*fd >= 0) {
        epoll_ctl(shm->link.fd, EPOLL_CTL_DEL, *fd, NULL);
        close(*fd);
    }
    *fd = -1;
}

void shm_free_channel(const struct shm_link *shm, struct channel *channel)
{
    shm_close_fd(shm, &channel->fd);
    if (channel->producer)
        direct_forget(&channel->direct);
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
void shm_drop_producer(struct shm_link *shm, struct channel *channel)
{
    forget_dirty(shm, channel);
    if (shm->last_out == channel)
        shm->last_out = NULL;
    unlink_from(shm_bucket_of(shm, &channel->peer), channel);
    shm->num_out--;
    if (channel->state == CHANNEL_OPEN)
        shm->link.counters->shm_peers--;
    shm_free_channel(shm, channel);
}

/* Not while views of its frames are valid. */
void shm_drop_consumer(struct shm_link *shm, struct channel *channel)
{
    unlink_from(&shm->in, channel);
    shm->num_in--;
    shm->num_fresh -= channel->fresh;
    shm_free_channel(shm, channel);
}

/* The other end is gone, or writes garbage. A consumer's frames may still be looked at: it goes later, see
 * release_taken(). */
void shm_end_channel(struct shm_link *shm, struct channel *channel)
{
    if (channel->producer) {
        shm_drop_producer(shm, channel);
        return;
    }
    shm_close_fd(shm, &channel->fd);
    channel->state = CHANNEL_ENDING;
}

/* What the peer wrote makes no sense: nothing more is taken from there. */
void shm_refuse_consumer(struct shm_link *shm, struct channel *channel)
{
    shm->link.counters->shm_refused++;
    shm_end_channel(shm, channel);
    channel->drained = true;
}

/* Whatever lies unread in front of the end. */
bool shm_is_dead(const struct channel *channel)
{
    struct pollfd fd = {.fd = channel->fd, .events = POLLRDHUP};

    return poll(&fd, 1, 0) > 0 && fd.revents & (POLLRDHUP | POLLHUP | POLLERR);
}

/* That the socket is full of bytes nobody read is as good; that it is closed, the next look sees. */
void shm_tell(const struct channel *channel, char byte)
{
    ssize_t rc = channel->fd >= 0 ? send(channel->fd, &byte, 1, MSG_DONTWAIT | MSG_NOSIGNAL) : 0;

    (void)rc;
}
