/* The ground of a stack of links, or what the shared-memory link has for all others: a UDP socket.
 *
 * Sending. A system call costs more than the packet in it. So consecutive frames of one size to one destination
 * form a group, which is one message that the kernel cuts into segments (UDP_SEGMENT), and all messages of a
 * flush are one sendmmsg(). Segments are numbered: the IP identification of segment k is k. That is part of what
 * the ICRC covers, so segment k gets another ICRC than the same frame would have alone. An IPv6 header has no
 * such field.
 *
 * Receiving. The kernel in turn hands over rows of segments as one message (UDP_GRO), on the loopback device just
 * what was sent as one. Segment k is taken to have identification k, which icrc_check() does not rely on.
 *
 * The socket stays unconnected and forbids fragmentation: the identification is then 0 for a single packet, which
 * it is not on a connected socket. */
#define _GNU_SOURCE /* sendmmsg, recvmmsg */
#include "link.h"

#include <arpa/inet.h>
#include <endian.h>
#include <errno.h>
#include <ifaddrs.h>
#include <netinet/in.h>
#include <netinet/udp.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "icrc.h"

#ifndef UDP_NO_CHECK6_RX
#define UDP_NO_CHECK6_RX 102
#endif
#ifndef UDP_SEGMENT
#define UDP_SEGMENT 103
#endif
#ifndef UDP_GRO
#define UDP_GRO 104
#endif

enum {
    MAX_SEGMENTS = 64,       /* of one message; newer kernels take more */
    MAX_GROUP_BYTES = 65000, /* an IP packet has 65535 with its headers */
    MAX_GROUP_PIECES = 1024, /* UIO_MAXIOV */
    MAX_FRAMES = 512,        /* queued before the link flushes by itself */
    MAX_PIECES = 2048,
    BUFFERS = 8,             /* messages a call; newer kernels have 128 segments, so LINK_MAX_VIEWS is enough */
    BUFFER_SIZE = 65536,     /* so no message is cut short */
    ICRC_BYTES = 4,
};

union address {
    struct sockaddr any;
    struct sockaddr_in v4;
    struct sockaddr_in6 v6;
};

/* Frames that are one message. All have the size `segment` but the last, which may be shorter. */
struct group {
    struct endpoint to;
    union address address;
    uint8_t traffic_class;
    uint32_t segment;
    uint32_t bytes;
    uint32_t frames;
    uint32_t first_piece, pieces; /* frames that lie one behind the other in memory share one */
    _Alignas(struct cmsghdr) uint8_t control[CMSG_SPACE(sizeof(uint16_t)) + CMSG_SPACE(sizeof(int))];
};

struct udp_link {
    struct link link;
    bool v4;
    bool gso;
    uint32_t scope; /* of link-local addresses: the interface of ours */

    /* queued for sending */
    struct group groups[MAX_FRAMES];
    struct mmsghdr outgoing[MAX_FRAMES]; /* one for each group */
    struct iovec pieces[MAX_PIECES];
    uint32_t num_groups, num_frames, num_pieces;

    /* received: messages `next`..`filled` are still to be handed out, the next one from `offset` on */
    uint8_t *buffers;
    struct mmsghdr incoming[BUFFERS];
    struct iovec incoming_iov[BUFFERS];
    union address senders[BUFFERS];
    _Alignas(struct cmsghdr) uint8_t controls[BUFFERS][CMSG_SPACE(sizeof(int))];
    uint32_t batch; /* messages that the next call asks for */
    uint32_t next, filled;
    uint32_t offset, segment;
    uint16_t index;
    struct endpoint from;
};

static struct udp_link *udp_of(struct link *link)
{
    return (struct udp_link *)(void *)link; /* its first member */
}

/* --- addresses --------------------------------------------------------------------------------------------- */

static bool is_mapped(const union ibv_gid *gid)
{
    return IN6_IS_ADDR_V4MAPPED((const struct in6_addr *)(const void *)gid->raw);
}

static bool is_link_local(const union ibv_gid *gid)
{
    const struct in6_addr *address = (const void *)gid->raw;

    return IN6_IS_ADDR_LINKLOCAL(address) || IN6_IS_ADDR_MC_LINKLOCAL(address);
}

static socklen_t address_size(const struct udp_link *udp)
{
    return udp->v4 ? sizeof(struct sockaddr_in) : sizeof(struct sockaddr_in6);
}

static void to_address(const struct udp_link *udp, const struct endpoint *endpoint, union address *address)
{
    memset(address, 0, sizeof(*address));
    if (udp->v4) {
        address->v4.sin_family = AF_INET;
        address->v4.sin_port = htons(endpoint->port);
        memcpy(&address->v4.sin_addr, endpoint->gid.raw + 12, 4);
    } else {
        address->v6.sin6_family = AF_INET6;
        address->v6.sin6_port = htons(endpoint->port);
        memcpy(&address->v6.sin6_addr, endpoint->gid.raw, 16);
        address->v6.sin6_scope_id = is_link_local(&endpoint->gid) ? udp->scope : 0;
    }
}

static void from_address(const struct udp_link *udp, const union address *address, struct endpoint *endpoint)
{
    if (udp->v4) {
        memset(endpoint->gid.raw, 0, 10);
        memset(endpoint->gid.raw + 10, 0xff, 2);
        memcpy(endpoint->gid.raw + 12, &address->v4.sin_addr, 4);
        endpoint->port = ntohs(address->v4.sin_port);
    } else {
        memcpy(endpoint->gid.raw, &address->v6.sin6_addr, 16);
        endpoint->port = ntohs(address->v6.sin6_port);
    }
}

/* The interface that has a link-local address. 0 or an errno. */
static int find_scope(const union ibv_gid *gid, uint32_t *scope)
{
    struct ifaddrs *all;
    int rc = EADDRNOTAVAIL;

    if (getifaddrs(&all))
        return errno;
    for (const struct ifaddrs *each = all; each && rc; each = each->ifa_next) {
        const struct sockaddr_in6 *address = (const void *)each->ifa_addr;

        if (!address || address->sin6_family != AF_INET6 || memcmp(&address->sin6_addr, gid->raw, 16))
            continue;
        *scope = address->sin6_scope_id;
        rc = 0;
    }
    freeifaddrs(all);
    return rc;
}

/* --- sending ----------------------------------------------------------------------------------------------- */

/* Turns the ICRC of a queued frame from that of identification 0 to that of place `k` in its group, or back. */
static void adjust_icrc(struct udp_link *udp, const struct iovec *last, uint32_t size, uint32_t k)
{
    uint8_t *place = (uint8_t *)last->iov_base + last->iov_len - ICRC_BYTES;
    uint32_t icrc;

    if (!udp->v4 || !k)
        return;
    memcpy(&icrc, place, sizeof(icrc));
    icrc ^= htole32(icrc_adjustment(size, (uint16_t)k));
    memcpy(place, &icrc, sizeof(icrc));
}

static bool fits(const struct udp_link *udp, const struct group *group, const struct frame *frame)
{
    bool closed = group->bytes != group->frames * group->segment; /* by a shorter frame */

    return udp->gso && !closed && frame->size <= group->segment && group->frames < MAX_SEGMENTS &&
           group->bytes + frame->size <= MAX_GROUP_BYTES &&
           group->pieces + (uint32_t)frame->niov <= MAX_GROUP_PIECES &&
           group->traffic_class == frame->traffic_class && same_endpoint(&group->to, frame->to);
}

static struct group *new_group(struct udp_link *udp, const struct frame *frame)
{
    struct group *group = &udp->groups[udp->num_groups++];

    group->to = *frame->to;
    to_address(udp, frame->to, &group->address);
    group->traffic_class = frame->traffic_class;
    group->segment = frame->size;
    group->bytes = 0;
    group->frames = 0;
    group->first_piece = udp->num_pieces;
    group->pieces = 0;
    return group;
}

/* The first piece of a frame continues the last one of its group. */
static bool continues(const struct udp_link *udp, const struct group *group, const struct iovec *piece)
{
    const struct iovec *last;

    if (!group->pieces)
        return false;
    last = &udp->pieces[udp->num_pieces - 1];
    return (uint8_t *)last->iov_base + last->iov_len == (uint8_t *)piece->iov_base;
}

static void add_pieces(struct udp_link *udp, struct group *group, const struct iovec *pieces, uint32_t count)
{
    if (continues(udp, group, pieces)) {
        udp->pieces[udp->num_pieces - 1].iov_len += pieces->iov_len;
        pieces++;
        count--;
    }
    memcpy(&udp->pieces[udp->num_pieces], pieces, count * sizeof(*pieces));
    udp->num_pieces += count;
    group->pieces += count;
}

static void udp_flush(struct link *link);

static void udp_send(struct link *link, const struct frame *frame)
{
    struct udp_link *udp = udp_of(link);
    struct group *group;
    uint32_t niov = (uint32_t)frame->niov;

    icrc_seal(&link->local, frame);
    if (udp->num_frames == MAX_FRAMES || udp->num_pieces + niov > MAX_PIECES)
        udp_flush(link);
    group = udp->num_groups ? &udp->groups[udp->num_groups - 1] : NULL;
    if (!group || !fits(udp, group, frame))
        group = new_group(udp, frame);
    adjust_icrc(udp, &frame->iov[niov - 1], frame->size, group->frames);
    add_pieces(udp, group, frame->iov, niov);
    udp->num_frames++;
    group->bytes += frame->size;
    group->frames++;
}

/* Appends a control message to `header`, whose buffer has room. */
static void put_control(struct msghdr *header, int level, int type, const void *data, size_t size)
{
    struct cmsghdr *control = (void *)((uint8_t *)header->msg_control + header->msg_controllen);

    control->cmsg_level = level;
    control->cmsg_type = type;
    control->cmsg_len = CMSG_LEN(size);
    memcpy(CMSG_DATA(control), data, size);
    header->msg_controllen += CMSG_SPACE(size);
}

/* The message for `pieces` of a group; `segment`: 0 for one frame alone. */
static void fill_header(const struct udp_link *udp, struct group *group, struct iovec *pieces, size_t num_pieces,
                        uint16_t segment, struct msghdr *header)
{
    int traffic_class = group->traffic_class;

    *header = (struct msghdr){
        .msg_name = &group->address,
        .msg_namelen = address_size(udp),
        .msg_iov = pieces,
        .msg_iovlen = num_pieces,
        .msg_control = group->control,
    };
    if (segment)
        put_control(header, IPPROTO_UDP, UDP_SEGMENT, &segment, sizeof(segment));
    if (traffic_class)
        put_control(header, udp->v4 ? IPPROTO_IP : IPPROTO_IPV6, udp->v4 ? IP_TOS : IPV6_TCLASS, &traffic_class,
                    sizeof(traffic_class));
    if (!header->msg_controllen)
        header->msg_control = NULL;
}

static void count_sent(struct usroce_counters *counters, uint32_t frames, uint32_t bytes)
{
    counters->sent += frames;
    counters->sent_bytes += bytes;
}

/* Cuts the next frame off the pieces of a group: *first is where it begins, and it takes `size` bytes. Returns how many
 * pieces it has. */
static size_t cut(struct iovec **first, uint32_t size, struct iovec *out)
{
    size_t count = 0;

    while (size) {
        struct iovec *piece = *first;
        size_t part = piece->iov_len < size ? piece->iov_len : size;

        out[count++] = (struct iovec){piece->iov_base, part};
        piece->iov_base = (uint8_t *)piece->iov_base + part;
        piece->iov_len -= part;
        size -= (uint32_t)part;
        if (!piece->iov_len)
            ++*first;
    }
    return count;
}

/* Sends one frame of a group on its own. Whether the kernel took it. */
static bool send_one(struct udp_link *udp, struct group *group, struct iovec *pieces, size_t num_pieces,
                     uint32_t size)
{
    struct usroce_counters *counters = udp->link.counters;
    struct msghdr header;
    ssize_t rc;

    fill_header(udp, group, pieces, num_pieces, 0, &header);
    do {
        counters->send_calls++;
        rc = sendmsg(udp->link.fd, &header, MSG_DONTWAIT);
    } while (rc < 0 && errno == EINTR);
    if (rc < 0) {
        counters->send_errors++;
        return false;
    }
    count_sent(counters, 1, size);
    return true;
}

/* The kernel refused to cut a message into segments: the frames go one by one, with the identification 0. The
 * first one, which has the full size, tells whether the cutting was to blame; then there is none on this link any
 * more. A packet too large for the path, for instance, is not its fault. */
static void send_singly(struct udp_link *udp, struct group *group)
{
    struct iovec *left = &udp->pieces[group->first_piece];

    for (uint32_t k = 0; k < group->frames; k++) {
        uint32_t before = k * group->segment;
        uint32_t size = group->bytes - before < group->segment ? group->bytes - before : group->segment;
        struct iovec pieces[LINK_MAX_PIECES];
        size_t count = cut(&left, size, pieces);
        bool sent;

        adjust_icrc(udp, &pieces[count - 1], size, k);
        sent = send_one(udp, group, pieces, count, size);
        if (k == 0 && sent)
            udp->gso = false;
    }
}

static void send_failed(struct udp_link *udp, struct group *group, int error)
{
    if (group->frames > 1 && (error == EIO || error == EINVAL || error == EOPNOTSUPP))
        send_singly(udp, group);
    else
        udp->link.counters->send_errors += group->frames;
}

static void fill_headers(struct udp_link *udp)
{
    for (uint32_t i = 0; i < udp->num_groups; i++) {
        struct group *group = &udp->groups[i];

        fill_header(udp, group, &udp->pieces[group->first_piece], group->pieces,
                    group->frames > 1 ? (uint16_t)group->segment : 0, &udp->outgoing[i].msg_hdr);
    }
}

/* As sendmmsg(2), which costs more where there is one only. */
static int send_groups(struct udp_link *udp, uint32_t first)
{
    if (udp->num_groups - first > 1)
        return sendmmsg(udp->link.fd, &udp->outgoing[first], udp->num_groups - first, MSG_DONTWAIT);
    return sendmsg(udp->link.fd, &udp->outgoing[first].msg_hdr, MSG_DONTWAIT) < 0 ? -1 : 1;
}

static void udp_flush(struct link *link)
{
    struct udp_link *udp = udp_of(link);
    uint32_t done = 0;

    fill_headers(udp);
    while (done < udp->num_groups) {
        int sent = send_groups(udp, done);

        link->counters->send_calls++;
        if (sent < 0 && errno == EINTR)
            continue;
        if (sent <= 0) /* the error of the first; that of a later one comes when it is the first */
            send_failed(udp, &udp->groups[done++], errno);
        for (; sent > 0; sent--, done++)
            count_sent(link->counters, udp->groups[done].frames, udp->groups[done].bytes);
    }
    udp->num_groups = udp->num_frames = udp->num_pieces = 0;
}

/* --- receiving --------------------------------------------------------------------------------------------- */

/* The kernel wrote what it used of the address and of the control buffer. */
static void reset_incoming(struct udp_link *udp, uint32_t count)
{
    for (uint32_t i = 0; i < count; i++) {
        struct msghdr *header = &udp->incoming[i].msg_hdr;

        header->msg_namelen = sizeof(udp->senders[i]);
        header->msg_controllen = sizeof(udp->controls[i]);
    }
}

static void init_incoming(struct udp_link *udp)
{
    for (uint32_t i = 0; i < BUFFERS; i++) {
        udp->incoming_iov[i] = (struct iovec){udp->buffers + (size_t)i * BUFFER_SIZE, BUFFER_SIZE};
        udp->incoming[i].msg_hdr = (struct msghdr){
            .msg_name = &udp->senders[i],
            .msg_iov = &udp->incoming_iov[i],
            .msg_iovlen = 1,
            .msg_control = udp->controls[i],
        };
    }
    reset_incoming(udp, BUFFERS);
    udp->batch = 1;
}

/* Asking for several messages where only one waits costs a look at the empty queue, half as much as a message, and
 * one waits when latency counts. So one is asked for, and more while there are as many as were asked for. */
static void fetch(struct udp_link *udp)
{
    int count;

    reset_incoming(udp, udp->filled);
    udp->link.counters->receive_calls++;
    if (udp->batch == 1) {
        ssize_t size = recvmsg(udp->link.fd, &udp->incoming[0].msg_hdr, MSG_DONTWAIT);

        udp->incoming[0].msg_len = size > 0 ? (unsigned int)size : 0;
        count = size >= 0;
    } else {
        count = recvmmsg(udp->link.fd, udp->incoming, udp->batch, MSG_DONTWAIT, NULL);
    }
    udp->next = 0;
    udp->filled = count > 0 ? (uint32_t)count : 0;
    if (udp->filled < udp->batch)
        udp->batch = 1;
    else
        udp->batch = udp->batch < BUFFERS / 4 ? 4 * udp->batch : BUFFERS;
}

/* The size of the segments that a message is made of, the last one may be shorter. */
static uint32_t segment_size(struct mmsghdr *message)
{
    struct cmsghdr *control = CMSG_FIRSTHDR(&message->msg_hdr);
    int size = 0;

    for (; control; control = CMSG_NXTHDR(&message->msg_hdr, control)) {
        if (control->cmsg_level == IPPROTO_UDP && control->cmsg_type == UDP_GRO)
            memcpy(&size, CMSG_DATA(control), sizeof(size));
    }
    return size > 0 && (uint32_t)size < message->msg_len ? (uint32_t)size : message->msg_len;
}

static void begin_message(struct udp_link *udp)
{
    udp->offset = 0;
    udp->index = 0;
    udp->segment = segment_size(&udp->incoming[udp->next]);
    from_address(udp, &udp->senders[udp->next], &udp->from);
}

/* Takes the next segment. A message without any bytes is one, of size 0. */
static void take_segment(struct udp_link *udp, struct view *view)
{
    uint32_t left;

    if (!udp->offset)
        begin_message(udp);
    left = udp->incoming[udp->next].msg_len - udp->offset;
    view->from = udp->from;
    view->data = udp->buffers + (size_t)udp->next * BUFFER_SIZE + udp->offset;
    view->size = left < udp->segment ? left : udp->segment;
    view->ip_id = udp->index++;
    view->traffic_class = 0; /* not asked of the kernel */
    view->unsealed = false;
    udp->offset += view->size;
    if (view->size == left) {
        udp->next++;
        udp->offset = 0;
    }
}

/* What did not fit in the last call comes first, and alone: the buffers are in use until the call after. */
static int udp_receive(struct link *link, struct view *views, int max)
{
    struct udp_link *udp = udp_of(link);
    int count = 0;

    if (udp->next == udp->filled)
        fetch(udp);
    for (; count < max && udp->next < udp->filled; count++) {
        take_segment(udp, &views[count]);
        link->counters->received_bytes += views[count].size;
    }
    link->counters->received += (uint64_t)count;
    return count;
}

/* --- life -------------------------------------------------------------------------------------------------- */

static uint64_t udp_deadline(const struct link *link)
{
    (void)link;
    return UINT64_MAX;
}

static void udp_close(struct link *link)
{
    struct udp_link *udp = udp_of(link);

    close(link->fd);
    free(udp->buffers);
    free(udp);
}

static const struct link_ops udp_ops = {
    .send = udp_send,
    .flush = udp_flush,
    .receive = udp_receive,
    .deadline = udp_deadline,
    .close = udp_close,
};

/* The privileged option goes beyond the limit of the system; without the privilege the limit is granted. */
static void set_buffer(int fd, int forced, int plain, uint32_t bytes)
{
    int value = bytes < INT32_MAX / 2 ? (int)bytes : INT32_MAX / 2; /* the kernel doubles it */

    if (bytes && setsockopt(fd, SOL_SOCKET, forced, &value, sizeof(value)))
        setsockopt(fd, SOL_SOCKET, plain, &value, sizeof(value));
}

/* Without fragments, which is what makes the identification 0. 0 or an errno. */
static int forbid_fragments(const struct udp_link *udp, int fd)
{
    int level = udp->v4 ? IPPROTO_IP : IPPROTO_IPV6, option = udp->v4 ? IP_MTU_DISCOVER : IPV6_MTU_DISCOVER;
    int value = udp->v4 ? IP_PMTUDISC_DO : IPV6_PMTUDISC_DO;

    return setsockopt(fd, level, option, &value, sizeof(value)) ? errno : 0;
}

/* IPv4 has links of its own. 0 or an errno. */
static int forbid_mapped(const struct udp_link *udp, int fd)
{
    int on = 1;

    return !udp->v4 && setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &on, sizeof(on)) ? errno : 0;
}

/* Other RoCE devices send packets without a UDP checksum, as IBA A17 has it. Over IPv6 a socket has to ask for them
 * (RFC 6936); the ICRC covers as much. 0 or an errno. */
static int accept_no_checksum(const struct udp_link *udp, int fd)
{
    int on = 1;

    return !udp->v4 && setsockopt(fd, IPPROTO_UDP, UDP_NO_CHECK6_RX, &on, sizeof(on)) ? errno : 0;
}

/* A kernel that does not know segments would ignore the control message that asks for them, so it is asked first.
 * One that cannot receive rows of them hands over each on its own, which is as good. */
static bool enable_segments(int fd)
{
    int off = 0, on = 1;

    if (setsockopt(fd, IPPROTO_UDP, UDP_SEGMENT, &off, sizeof(off)))
        return false;
    setsockopt(fd, IPPROTO_UDP, UDP_GRO, &on, sizeof(on));
    return true;
}

static int bind_local(struct udp_link *udp, int fd, const struct endpoint *local)
{
    union address address;
    socklen_t size = sizeof(address);

    to_address(udp, local, &address);
    if (bind(fd, &address.any, address_size(udp)))
        return errno;
    if (getsockname(fd, &address.any, &size))
        return errno;
    from_address(udp, &address, &udp->link.local);
    return 0;
}

static int granted(int fd, uint32_t *bytes)
{
    int value = 0;
    socklen_t size = sizeof(value);

    if (getsockopt(fd, SOL_SOCKET, SO_RCVBUF, &value, &size))
        return errno;
    *bytes = (uint32_t)value;
    return 0;
}

static int open_socket(struct udp_link *udp, const struct endpoint *local, const struct link_udp_options *options,
                       uint32_t *receive_buffer)
{
    int fd = socket(udp->v4 ? AF_INET : AF_INET6, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, IPPROTO_UDP);
    int rc;

    if (fd < 0)
        return errno;
    rc = forbid_mapped(udp, fd);
    if (rc)
        goto fail;
    rc = forbid_fragments(udp, fd);
    if (rc)
        goto fail;
    rc = accept_no_checksum(udp, fd);
    if (rc)
        goto fail;
    set_buffer(fd, SO_RCVBUFFORCE, SO_RCVBUF, options->socket_buffer);
    set_buffer(fd, SO_SNDBUFFORCE, SO_SNDBUF, options->socket_buffer);
    udp->gso = options->gso && enable_segments(fd);
    rc = bind_local(udp, fd, local);
    if (rc)
        goto fail;
    rc = granted(fd, receive_buffer);
    if (rc)
        goto fail;
    udp->link.fd = fd;
    return 0;
fail:
    close(fd);
    return rc;
}

int link_udp_open(struct link **link, const struct endpoint *local, const struct link_udp_options *options,
                  struct usroce_counters *counters, uint32_t *receive_buffer)
{
    struct udp_link *udp = calloc(1, sizeof(*udp));
    int rc = ENOMEM;

    if (!udp)
        return ENOMEM;
    udp->link.ops = &udp_ops;
    udp->link.counters = counters;
    udp->v4 = is_mapped(&local->gid);
    udp->buffers = malloc((size_t)BUFFERS * BUFFER_SIZE);
    if (!udp->buffers)
        goto fail;
    init_incoming(udp);
    rc = is_link_local(&local->gid) ? find_scope(&local->gid, &udp->scope) : 0;
    if (rc)
        goto fail;
    rc = open_socket(udp, local, options, receive_buffer);
    if (rc)
        goto fail;
    *link = &udp->link;
    return 0;
fail:
    free(udp->buffers);
    free(udp);
    return rc;
}
