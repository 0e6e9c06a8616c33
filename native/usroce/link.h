/* What frames travel over. A frame is a RoCE v2 packet from the base transport header to the ICRC: what UDP
 * carries.
 *
 * A link is one local address. At the ground is UDP, or shared memory for the peers on this host together with UDP
 * for all others. The fault and the capture link each wrap another one, so that they cost nothing when they are
 * not there.
 *
 * Called with the device lock held. No call blocks. / */
#ifndef LINK_H
#define LINK_H

#include <infiniband/verbs.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/uio.h>

#include "usroce_api.h"

/* An IP address and a UDP port (host order). IPv4 is in its v4-mapped form, as in a GID. */
struct endpoint {
    union ibv_gid gid;
    uint16_t port;
};

static inline bool same_endpoint(const struct endpoint *a, const struct endpoint *b)
{
    return a->port == b->port && memcmp(a->gid.raw, b->gid.raw, sizeof(a->gid.raw)) == 0;
}

/* A frame to send, in pieces. Who needs its ICRC and finds it not sealed, seals it (icrc_seal); so a frame that goes
 * through memory never gets one. The ICRC is the one for IP identification 0; a link whose packets get another one
 * adjusts it (icrc_adjustment). The pieces stay as they are until the next flush. */
struct frame {
    const struct endpoint *to;
    struct iovec *iov; /* the last piece ends with the 4 bytes of the ICRC, in memory that the link may change */
    int niov;
    uint32_t size;
    uint8_t traffic_class;
    bool sealed; /* the ICRC is in it */
};

/* A frame that arrived, valid until the next receive call on the link. Its bytes may be in memory that the sender
 * can still change: whoever decides by one takes a copy first, as wire_parse() does. */
struct view {
    struct endpoint from;
    uint8_t *data;
    uint32_t size;
    uint16_t ip_id;        /* the IP identification it probably had (0 unless it came in a row of segments) */
    uint8_t traffic_class;
    bool unsealed;         /* it came through memory, without an ICRC */
};

struct link;
struct direct_peer;
struct table;

struct link_ops {
    /* Queues a frame; what the link cannot send is lost, as on any wire, and counted. */
    void (*send)(struct link *link, const struct frame *frame);
    void (*flush)(struct link *link);
    /* At most `max` frames that have arrived; 0: none. With less room than LINK_MAX_VIEWS the rest comes with the
     * next calls, for which `fd` is not readable. */
    int (*receive)(struct link *link, struct view *views, int max);
    /* When it wants to be flushed even if nothing is sent (ns of CLOCK_MONOTONIC), UINT64_MAX: never. */
    uint64_t (*deadline)(const struct link *link);
    /* Closes this link and those below it. */
    void (*close)(struct link *link);
    /* See link_unwrap(); NULL for a ground. */
    struct link *(*unwrap)(struct link *link);

    /* Of a ground (link_ground), and NULL where it has no use for them: */

    /* Packets will go there: look for a better way than UDP, if there is none yet. */
    void (*prepare)(struct link *link, const struct endpoint *to);
    /* Whether it would take a frame of that size to there now. With false, it notes that somebody waits for room. */
    bool (*has_room)(struct link *link, const struct endpoint *to, uint32_t size);
    /* Nobody calls receive from now on, until `fd` is readable. False: there is something already, or room for who
     * waits. In either case wake() is called next, before anybody sleeps again. */
    bool (*sleep)(struct link *link);
    void (*wake)(struct link *link);
    /* The peer there if its memory can be reached without it (direct.c), else NULL. Valid until the next call. */
    struct direct_peer *(*direct)(struct link *link, const struct endpoint *to);
    /* Waits for the peers that are in the middle of reaching ours. False: one does not come to an end. */
    bool (*settle)(struct link *link);
};

struct link {
    const struct link_ops *ops;
    struct link *below;     /* what this one wraps; NULL for a ground */
    struct endpoint local;
    int fd;                 /* readable when there is something to receive */
    struct usroce_counters *counters; /* of the device */
};

enum {
    LINK_MAX_FRAME = 4096 + 128, /* payload of the largest MTU and every header */
    LINK_MAX_PIECES = 34,        /* header, 32 pieces of payload, trailer */
    LINK_MAX_VIEWS = 1024,       /* what one receive call can give */
    ROCE_UDP_PORT = 4791,
};

struct link_udp_options {
    uint32_t socket_buffer; /* bytes asked of the kernel */
    bool gso;
};

/* A UDP socket bound to `local` (port 0: any; the port taken is in link->local afterwards). 0 or an errno;
 * EADDRINUSE: the port is taken. *receive_buffer: bytes that the kernel granted, as it counts: twice what it was
 * asked for, its overhead included. */
int link_udp_open(struct link **link, const struct endpoint *local, const struct link_udp_options *options,
                  struct usroce_counters *counters, uint32_t *receive_buffer);
/* A ground of UDP (`udp`, which it owns from then on) and shared memory. `table` (or NULL) is for peers, and is there
 * longer than the link. 0 or an errno: then `udp` is as it was. */
int link_shm_open(struct link **link, struct link *udp, const struct table *table);
/* Wraps `below` (which it owns from then on). 0 or an errno. */
int link_fault_open(struct link **link, struct link *below, const struct usroce_fault *fault);
int link_fault_set(struct link *link, const struct usroce_fault *fault);
/* Several links may write to one capture; the file is closed with the last reference. `append`: the file may be there
 * already, and others, in other processes too, may append to it at the same time; else it begins anew. */
struct capture;
int capture_open(struct capture **capture, const char *path, bool append);
void capture_release(struct capture *capture);
int link_pcap_open(struct link **link, struct link *below, struct capture *capture);
/* Takes a wrapper off: the link below is what remains. Frames it still holds are sent. A ground stays what it is.
 */
static inline struct link *link_unwrap(struct link *link)
{
    return link->ops->unwrap ? link->ops->unwrap(link) : link;
}
/* What is below all wrappers. */
static inline struct link *link_ground(struct link *link)
{
    while (link->below)
        link = link->below;
    return link;
}
static inline void link_prepare(struct link *link, const struct endpoint *to)
{
    struct link *ground = link_ground(link);

    if (ground->ops->prepare)
        ground->ops->prepare(ground, to);
}
bool link_is_fault(const struct link *link);
bool link_is_pcap(const struct link *link);

#endif
