/* The UDP link over real sockets of this host, and what it does when the kernel refuses. */
#define _GNU_SOURCE
#include "links.h"

#include <errno.h>
#include <fcntl.h>
#include <ifaddrs.h>
#include <netinet/in.h>
#include <netinet/ip.h>
#include <netinet/udp.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

/* --- a kernel that can refuse ------------------------------------------------------------------------------ */

static int segments_error; /* errno for messages that are to be cut; 0: the kernel decides */

static int wants_segments(const struct msghdr *header)
{
    return header->msg_controllen && CMSG_FIRSTHDR(header)->cmsg_level == IPPROTO_UDP;
}

/* These stand before the functions of the C library. */

ssize_t sendmsg(int fd, const struct msghdr *header, int flags)
{
    if (segments_error && wants_segments(header)) {
        errno = segments_error;
        return -1;
    }
    return syscall(SYS_sendmsg, fd, header, flags);
}

int sendmmsg(int fd, struct mmsghdr *messages, unsigned int count, int flags)
{
    for (unsigned int i = 0; segments_error && i < count; i++) {
        if (!wants_segments(&messages[i].msg_hdr))
            continue;
        if (i == 0) {
            errno = segments_error;
            return -1;
        }
        count = i;
    }
    return (int)syscall(SYS_sendmmsg, fd, messages, count, flags);
}

/* --- UDP --------------------------------------------------------------------------------------------------- */

struct expected {
    uint32_t first, count; /* numbers of the frames */
    uint32_t size;         /* 0: any */
    int max;               /* views a call */
    uint32_t segments;     /* how many had another identification than 0, afterwards */
};

/* Receives frames in order and checks each. */
static void expect_frames(struct side *from, struct side *to, struct expected *expected)
{
    static struct view views[LINK_MAX_VIEWS];
    uint32_t next = expected->first;
    int max = expected->max ? expected->max : LINK_MAX_VIEWS;

    expected->segments = 0;
    while (next < expected->first + expected->count) {
        int count = receive(to->link, views, max);

        check(count > 0 && count <= max, "frames arrive");
        if (count <= 0)
            return;
        for (int i = 0; i < count; i++, next++) {
            check(number_of(views[i].data) == next, "in order, none lost");
            check(!expected->size || views[i].size == expected->size, "the size");
            check(views[i].from.port == from->link->local.port, "the port it came from");
            check(!memcmp(&views[i].from.gid, &from->link->local.gid, 16), "the address it came from");
            check(icrc_check(&views[i], &to->link->local, false), "the ICRC is right");
            expected->segments += views[i].ip_id != 0;
        }
    }
    check(next == expected->first + expected->count, "not one more");
}

static void opened(const char *address)
{
    struct side a, b;

    need(!open_side(&a, address, 0, true), "a link");
    check(a.link->local.port != 0, "the port taken");
    check(a.buffer == 400000, "the buffer that was granted, as the kernel counts");
    check(fcntl(a.link->fd, F_GETFD) & FD_CLOEXEC, "not passed on by exec");
    check(!a.link->below && link_unwrap(a.link) == a.link, "a ground");
    check(a.link->ops->deadline(a.link) == UINT64_MAX, "no deadline");
    check(open_side(&b, address, a.link->local.port, true) == EADDRINUSE, "EADDRINUSE");
    close_side(&a);
    check(open_side(&b, strchr(address, ':') ? "2001:db8::1" : "203.0.113.1", 0, true) == EADDRNOTAVAIL,
          "EADDRNOTAVAIL");
}

/* 64 frames are one system call on either side, each with the ICRC of its place. */
static void one_group(const char *address)
{
    struct side a, b;
    struct expected all = {.count = 64, .size = 1000};
    bool v4 = !strchr(address, ':');

    need(!open_side(&a, address, 0, true) && !open_side(&b, address, 0, true), "links");
    for (uint32_t n = 0; n < 64; n++)
        send_frame(a.link, &b.link->local, n, 1000, 0);
    for (uint32_t k = 0; k < 64; k++) {
        uint8_t *sealed = make_frame(&a.link->local, &b.link->local, k, 1000);
        uint32_t changed = number_of(sealed + 996) ^ number_of(pending[k] + 996);

        check(changed == (v4 ? icrc_adjustment(1000, (uint16_t)k) : 0), "the ICRC for identification k");
        free(sealed);
    }
    flush(a.link);
    expect_frames(&a, &b, &all);
    check(a.counters.sent == 64 && a.counters.sent_bytes == 64000, "sent");
    check(a.counters.send_calls == 1, "by one call");
    check(b.counters.received == 64 && b.counters.received_bytes == 64000, "received");
    check(b.counters.receive_calls <= 2 && all.segments == 63, "received as one row of segments");
    flush(a.link);
    check(a.counters.send_calls == 1 && !a.counters.send_errors, "nothing is sent twice");
    close_side(&a);
    close_side(&b);
}

/* Groups end for each reason there is. */
static void many_groups(const char *address, bool gso)
{
    struct side a, b, c;
    struct expected to_b = {.count = 16}, to_c = {.first = 5000, .count = 3};
    uint32_t segments = 0;

    need(!open_side(&a, address, 0, gso) && !open_side(&b, address, 0, gso), "links");
    need(!open_side(&c, address, 0, gso), "a third link");
    for (uint32_t n = 0; n < 1600; n++) {
        uint32_t size = n < 320 ? 4112 : SMALLEST + 4 * (n * 7919 / 50 % 200); /* runs of each size */

        send_frame(a.link, &b.link->local, n, size, n % 100 < 10 ? 0x68 : 0);
        if (n == 20 || n == 21 || n == 700)
            send_frame(a.link, &c.link->local, 5000 + (n == 21) + 2 * (n == 700), 400, 0);
        if (n % 16 != 15)
            continue;
        flush(a.link);
        expect_frames(&a, &b, &to_b);
        to_b.first += 16;
        segments += to_b.segments;
    }
    expect_frames(&a, &c, &to_c);
    check(a.counters.sent == 1603 && !a.counters.send_errors, "all are sent");
    check(b.counters.received_bytes + c.counters.received_bytes == a.counters.sent_bytes, "all bytes");
    check(a.counters.send_calls == 100, "a system call a flush");
    check(gso == (segments > 0), "in groups where that is wanted");
    close_side(&a);
    close_side(&b);
    close_side(&c);
}

/* More frames than the link has room for, no two together to one destination, without a flush by the caller. */
static void more_frames_than_room(const char *address)
{
    struct side a, b, c;
    struct expected to_b = {.count = 300}, to_c = {.first = 300, .count = 300};

    need(!open_side(&a, address, 0, true) && !open_side(&b, address, 0, true), "links");
    need(!open_side(&c, address, 0, true), "a third link");
    for (uint32_t n = 0; n < 300; n++) {
        send_frame(a.link, &b.link->local, n, 64, 0);
        send_frame(a.link, &c.link->local, 300 + n, 64, 0);
    }
    flush(a.link);
    expect_frames(&a, &b, &to_b);
    expect_frames(&a, &c, &to_c);
    check(a.counters.send_calls == 2, "one flush by the link, one by the caller");
    close_side(&a);
    close_side(&b);
    close_side(&c);
}

/* The same with many pieces: the limit of the kernel for one message, and the room of the link. */
static void many_pieces(const char *address)
{
    enum { COUNT = 100, SIZE = HEAD + 4 * (LINK_MAX_PIECES - 1) };
    struct side a, b;
    struct expected all = {.count = COUNT, .size = SIZE};

    need(!open_side(&a, address, 0, true) && !open_side(&b, address, 0, true), "links");
    for (uint32_t n = 0; n < COUNT; n++) {
        struct iovec iov[LINK_MAX_PIECES];
        struct frame frame = {.to = &b.link->local, .iov = iov, .niov = LINK_MAX_PIECES, .size = SIZE};

        pending[num_pending] = make_frame(&a.link->local, frame.to, n, SIZE);
        for (int i = 0; i < LINK_MAX_PIECES; i++)
            iov[i] = (struct iovec){pending[num_pending] + (i ? HEAD + 4 * (i - 1) : 0), i ? 4 : HEAD};
        num_pending++;
        a.link->ops->send(a.link, &frame);
    }
    flush(a.link);
    expect_frames(&a, &b, &all);
    check(a.counters.send_calls == 2 && !a.counters.send_errors, "no message has too many");
    close_side(&a);
    close_side(&b);
}

/* A shorter frame is the last of its group. */
static void shorter_frame_closes(const char *address)
{
    static const uint32_t sizes[] = {800, 800, 800, 416, 416, 416, 800, 804, 16, 16};
    struct side a, b;
    struct expected all = {.count = 10};

    need(!open_side(&a, address, 0, true) && !open_side(&b, address, 0, true), "links");
    for (uint32_t n = 0; n < 10; n++)
        send_frame(a.link, &b.link->local, n, sizes[n], 0);
    flush(a.link);
    expect_frames(&a, &b, &all);
    check(all.segments == 5, "four groups: of 4, 2, 1, 2 and 1 frames");
    check(b.counters.receive_calls < 6, "several messages a call");
    close_side(&a);
    close_side(&b);
}

/* Views that the caller has no room for come with the next calls. */
static void little_room(const char *address)
{
    struct side a, b;
    struct expected all = {.count = 300, .size = 200, .max = 7};

    need(!open_side(&a, address, 0, true) && !open_side(&b, address, 0, true), "links");
    for (uint32_t n = 0; n < 300; n++)
        send_frame(a.link, &b.link->local, n, 200, 0);
    flush(a.link);
    expect_frames(&a, &b, &all);
    check(b.counters.received == 300, "each one is counted once");
    close_side(&a);
    close_side(&b);
}

/* The kernel refuses segments: nothing is lost, and they are not tried again. */
static void segments_refused(const char *address, int error)
{
    struct side a, b;
    struct expected all = {.count = 32};

    need(!open_side(&a, address, 0, true) && !open_side(&b, address, 0, false), "links");
    segments_error = error;
    for (uint32_t n = 0; n < 20; n++)
        send_frame(a.link, &b.link->local, n, n < 5 || n >= 15 ? 500 : 600, 4);
    flush(a.link);
    segments_error = 0;
    for (uint32_t n = 20; n < 32; n++)
        send_frame(a.link, &b.link->local, n, 500, 0);
    flush(a.link);
    expect_frames(&a, &b, &all);
    check(!all.segments && a.counters.sent == 32 && !a.counters.send_errors, "sent one by one");
    check(a.counters.send_calls == 24, "three refusals, each frame alone, then one call for many messages");
    close_side(&a);
    close_side(&b);
}

/* What cannot be sent is counted, and the rest goes on. */
static void send_errors(const char *address)
{
    static uint8_t large[65532];
    struct side a, b;
    struct iovec iov = {large, sizeof(large)};
    struct frame frame = {.iov = &iov, .niov = 1, .size = sizeof(large)};
    struct expected all = {.count = 6};
    struct endpoint nowhere = endpoint("255.255.255.255", 9); /* not asked to broadcast; of no use to IPv6 */

    need(!open_side(&a, address, 0, true) && !open_side(&b, address, 0, true), "links");
    frame.to = &b.link->local;
    for (uint32_t n = 0; n < 3; n++)
        send_frame(a.link, &b.link->local, n, 100, 0);
    a.link->ops->send(a.link, &frame);
    for (uint32_t n = 0; n < 4; n++)
        send_frame(a.link, &nowhere, n, 100, 0);
    for (uint32_t n = 3; n < 6; n++)
        send_frame(a.link, &b.link->local, n, 100, 0);
    flush(a.link);
    expect_frames(&a, &b, &all);
    check(a.counters.sent == 6 && a.counters.send_errors == 5, "errors are counted by frames");
    segments_error = EMSGSIZE; /* a packet too large for the path */
    for (uint32_t n = 0; n < 3; n++)
        send_frame(a.link, &b.link->local, n, 100, 0);
    flush(a.link);
    segments_error = EINVAL; /* for another reason than the segments: the frames alone fail too */
    for (uint32_t n = 0; n < 3; n++)
        send_frame(a.link, &nowhere, n, 100, 0);
    flush(a.link);
    segments_error = 0;
    check(a.counters.sent == 6 && a.counters.send_errors == 11, "refused in groups and alone");
    all = (struct expected){.count = 3};
    for (uint32_t n = 0; n < 3; n++)
        send_frame(a.link, &b.link->local, n, 100, 0);
    flush(a.link);
    expect_frames(&a, &b, &all);
    check(all.segments == 2, "groups are still made");
    close_side(&a);
    close_side(&b);
}

/* Anybody can send anything to a port. */
static void junk(void)
{
    struct side a;
    static uint8_t data[65507];
    struct sockaddr_in to = {.sin_family = AF_INET};
    int fd = socket(AF_INET, SOCK_DGRAM, 0);
    static const size_t sizes[] = {0, 1, 3, 15, sizeof(data), 0};
    struct view view;

    need(fd >= 0 && !open_side(&a, "127.0.0.1", 0, true), "sockets");
    to.sin_port = htons(a.link->local.port);
    memcpy(&to.sin_addr, a.link->local.gid.raw + 12, 4);
    check(a.link->ops->receive(a.link, &view, 1) == 0, "nothing yet");
    for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++)
        need(sendto(fd, data, sizes[i], 0, (void *)&to, sizeof(to)) == (ssize_t)sizes[i], "sending");
    for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++) {
        check(receive(a.link, &view, 1) == 1 && view.size == sizes[i], "whatever size arrives");
        check(!icrc_check(&view, &a.link->local, true), "none of it is a frame");
    }
    check(a.link->ops->receive(a.link, &view, 1) == 0, "nothing more");
    close(fd);
    close_side(&a);
}

/* A packet on its own has identification 0 and may not be fragmented: what the ICRC is computed for. Seen by a raw
 * socket, which needs a privilege. */
static void identification_on_the_wire(void)
{
    int fd = socket(AF_INET, SOCK_RAW | SOCK_NONBLOCK, IPPROTO_UDP);
    struct pollfd poller = {.fd = fd, .events = POLLIN};
    uint8_t packet[512];
    struct iphdr ip;
    struct udphdr udp;
    struct side a, b;
    int found = 0;

    if (fd < 0) {
        fprintf(stderr, "no raw socket here: the identification of packets is not looked at\n");
        return;
    }
    need(!open_side(&a, "127.0.0.1", 0, true) && !open_side(&b, "127.0.0.1", 0, true), "links");
    for (uint32_t n = 0; n < 5; n++) {
        send_frame(a.link, &b.link->local, n, 100, 0x68);
        flush(a.link);
    }
    while (found < 5 && poll(&poller, 1, 2000) == 1) {
        ssize_t size = recv(fd, packet, sizeof(packet), 0);

        if (size < (ssize_t)(sizeof(ip) + sizeof(udp)))
            continue;
        memcpy(&ip, packet, sizeof(ip));
        memcpy(&udp, packet + sizeof(ip), sizeof(udp));
        if (ntohs(udp.source) != a.link->local.port || ntohs(udp.dest) != b.link->local.port)
            continue; /* somebody else's */
        check(ip.id == 0 && ip.frag_off == htons(IP_DF), "identification 0, no fragments");
        check(ip.tos == 0x68, "the traffic class");
        found++;
    }
    check(found == 5, "the packets were seen");
    close(fd);
    close_side(&a);
    close_side(&b);
}

/* A link-local address means nothing without its interface. */
static void link_local(void)
{
    struct ifaddrs *all;
    struct side a, b;
    struct expected expected = {.count = 10};
    char text[INET6_ADDRSTRLEN] = "";

    need(!getifaddrs(&all), "the interfaces");
    for (struct ifaddrs *each = all; each; each = each->ifa_next) {
        struct sockaddr_in6 *address = (void *)each->ifa_addr;

        if (address && address->sin6_family == AF_INET6 && IN6_IS_ADDR_LINKLOCAL(&address->sin6_addr))
            need(inet_ntop(AF_INET6, &address->sin6_addr, text, sizeof(text)) != NULL, "the address");
    }
    freeifaddrs(all);
    check(open_side(&a, "fe80::dead:beef", 0, true) == EADDRNOTAVAIL, "a link-local address of nobody");
    if (!*text || open_side(&a, text, 0, true)) {
        fprintf(stderr, "no usable link-local address here\n");
        return;
    }
    need(!open_side(&b, text, 0, true), "a second link");
    for (uint32_t n = 0; n < 10; n++)
        send_frame(a.link, &b.link->local, n, 64, 0);
    flush(a.link);
    expect_frames(&a, &b, &expected);
    close_side(&a);
    close_side(&b);
}

static void udp_over(const char *address)
{
    opened(address);
    one_group(address);
    many_groups(address, true);
    many_groups(address, false);
    more_frames_than_room(address);
    many_pieces(address);
    shorter_frame_closes(address);
    little_room(address);
    segments_refused(address, EIO);
    segments_refused(address, EINVAL);
    segments_refused(address, EOPNOTSUPP);
    send_errors(address);
}

int main(void)
{
    struct side side;

    udp_over("127.0.0.1");
    junk();
    identification_on_the_wire();
    if (open_side(&side, "::1", 0, true)) {
        fprintf(stderr, "no IPv6 here\n");
        return failures != 0;
    }
    close_side(&side);
    udp_over("::1");
    link_local();
    return failures != 0;
}
