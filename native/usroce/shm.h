/* What the files of the shared-memory link share: link_shm.c (frames), shm_setup.c (who may have a channel),
 * shm_channel.c (the channels there are). Nobody else needs it. */
#ifndef SHM_H
#define SHM_H

#include "ring.h"
#include "table.h"

enum {
    BUCKETS = 64,
    MAX_CHANNELS = 1024, /* each way */
};

enum channel_state {
    CHANNEL_GREETING, /* consumer: accepted, and nothing heard yet; producer: not answered yet */
    CHANNEL_OPEN,
    CHANNEL_ENDING,   /* consumer: the peer is gone, what it sent is still there */
};

/* What is said over the connection, once the memory was passed on. The consumer's first wake-up says that it has
 * mapped it; an end without a word is a peer that died. */
enum { CHANNEL_WAKE = 0, CHANNEL_REFUSED = 1 };

struct channel {
    struct channel *next;
    bool producer;
    enum channel_state state;
    int fd;                     /* -1: closed */
    struct endpoint peer;
    struct direct_peer direct;  /* producer */
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
    const struct table *table;    /* for peers; or NULL */
    int listener;
    struct channel *out[BUCKETS]; /* by endpoint */
    struct channel *last_out;     /* looked for last, or NULL */
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

static inline struct shm_link *shm_of(struct link *link)
{
    return (struct shm_link *)(void *)link; /* its first member */
}

/* --- shm_channel.c ------------------------------------------------------------------------------------------- */

struct channel **shm_bucket_of(struct shm_link *shm, const struct endpoint *peer);
struct channel *shm_find_channel(struct shm_link *shm, const struct endpoint *to);
/* The channel through which frames go there, or NULL. */
struct channel *shm_open_channel(struct shm_link *shm, const struct endpoint *to);
/* Its events carry `tag`. 0 or an errno. */
int shm_watch_fd(const struct shm_link *shm, int fd, void *tag);
void shm_close_fd(const struct shm_link *shm, int *fd);
/* A channel that is watched; NULL: it cannot be had. The caller puts it into its list. */
struct channel *shm_new_channel(struct shm_link *shm, int fd, bool producer);
/* One that is in no list. */
void shm_free_channel(const struct shm_link *shm, struct channel *channel);
/* From now on UDP goes there. */
void shm_drop_producer(struct shm_link *shm, struct channel *channel);
/* Not while views of its frames are valid. */
void shm_drop_consumer(struct shm_link *shm, struct channel *channel);
/* The other end is gone, or writes garbage. A consumer goes later, when nobody looks at its frames any more. */
void shm_end_channel(struct shm_link *shm, struct channel *channel);
/* What the peer wrote makes no sense: nothing more is taken from there. */
void shm_refuse_consumer(struct shm_link *shm, struct channel *channel);
/* Whether the other end closed it, perhaps unseen so far. */
bool shm_is_dead(const struct channel *channel);
/* Sends a byte over the connection. Never waits. */
void shm_tell(const struct channel *channel, char byte);
static inline void shm_wake_peer(const struct channel *channel)
{
    shm_tell(channel, CHANNEL_WAKE);
}

/* --- shm_setup.c --------------------------------------------------------------------------------------------- */

/* Without a listener nobody finds us, and all send to us over UDP: somebody else has the name, for instance. */
void shm_listen(struct shm_link *shm);
/* Those who have no channel yet use UDP from now on. */
void shm_stop_listening(struct shm_link *shm);
/* Connections that wait. */
void shm_accept_all(struct shm_link *shm);
/* Something came on a connection that is CHANNEL_GREETING, at the consumer. */
void shm_greet(struct shm_link *shm, struct channel *channel);
/* Reads what the consumer says first, at the producer. False: nothing that opens the channel, which is at its end. */
bool shm_take_answer(struct shm_link *shm, struct channel *channel);
/* link_ops.prepare */
void shm_prepare(struct link *link, const struct endpoint *to);

#endif
