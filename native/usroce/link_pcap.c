/* A wrapper that writes what is sent and received to a capture file, for Wireshark and its like.
 *
 * A socket shows neither IP nor UDP header, so both are made up. They are what the packet had where that can be
 * known: addresses, ports, no fragments, and the identification that its ICRC is for, so that a reader finds it
 * right.
 *
 * Several links, of several devices and threads, can write to one capture; each takes its lock, which nothing is
 * called under. Only whole records are written, at the flush of a link at the latest: a process that is killed
 * leaves a file that ends with one. The buffer is our own, for one of stdio would be written once more by a
 * forked child. */
#include "link.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "icrc.h"

enum {
    BUFFER_BYTES = 256 * 1024,
    IPV4_BYTES = 20,
    IPV6_BYTES = 40,
    UDP_BYTES = 8,
    UDP_PROTOCOL = 17,
    HOP_LIMIT = 64,
    MAX_FRAME = 65535 - IPV4_BYTES - UDP_BYTES,
    BTH_BYTES = 12,
    ICRC_BYTES = 4,
};

struct file_header {
    uint32_t magic;
    uint16_t major, minor;
    uint32_t zone, accuracy, snapshot, link_type;
};

struct record_header {
    uint32_t seconds, nanoseconds, captured, length;
};

struct capture {
    pthread_mutex_t lock;
    unsigned int references;
    int fd;
    bool failed;      /* nothing is written any more */
    size_t used;
    char *path;       /* for the message */
    uint8_t buffer[BUFFER_BYTES];
};

struct pcap_link {
    struct link link;
    struct capture *capture;
};

static const struct link_ops pcap_ops;

static struct pcap_link *pcap_of(struct link *link)
{
    return (struct pcap_link *)(void *)link; /* its first member */
}

/* --- the file ---------------------------------------------------------------------------------------------- */

/* 0 or an errno. */
static int write_all(int fd, const uint8_t *data, size_t size)
{
    while (size) {
        ssize_t written = write(fd, data, size);

        if (written < 0 && errno == EINTR)
            continue;
        if (written <= 0)
            return written ? errno : EIO;
        data += written;
        size -= (size_t)written;
    }
    return 0;
}

/* Called with the lock held. */
static void write_out(struct capture *capture)
{
    int rc;

    if (capture->failed || !capture->used)
        return;
    rc = write_all(capture->fd, capture->buffer, capture->used);
    capture->used = 0;
    if (!rc)
        return;
    capture->failed = true;
    fprintf(stderr, "usroce: the capture %s ends here: %s\n", capture->path, strerror(rc));
}

/* The numbers are in our byte order; the magic tells the reader which, and that fractions are nanoseconds. */
static int write_file_header(int fd)
{
    const struct file_header header = {
        .magic = 0xa1b23c4d,
        .major = 2,
        .minor = 4,
        .snapshot = 262144,
        .link_type = 101, /* LINKTYPE_RAW: begins with the IP header */
    };

    return write_all(fd, (const uint8_t *)&header, sizeof(header));
}

/* The first of those that append to a file begins it. */
static int begin_file(int fd)
{
    struct stat file;
    int rc = 0;

    if (flock(fd, LOCK_EX))
        return errno;
    if (fstat(fd, &file))
        rc = errno;
    else if (!file.st_size)
        rc = write_file_header(fd);
    flock(fd, LOCK_UN);
    return rc;
}

/* For the owner only: a capture has everything that was transferred. Whole records are written at a time, at the end of
 * the file, so several devices and processes may share one. */
static int open_file(const char *path, bool append, int *fd)
{
    int rc;

    *fd = open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC | (append ? 0 : O_TRUNC), 0600);
    if (*fd < 0)
        return errno;
    rc = begin_file(*fd);
    if (rc)
        close(*fd);
    return rc;
}

int capture_open(struct capture **capture, const char *path, bool append)
{
    struct capture *new = calloc(1, sizeof(*new));
    int rc = ENOMEM;

    if (!new)
        return ENOMEM;
    new->references = 1;
    new->path = strdup(path);
    if (!new->path)
        goto fail;
    rc = pthread_mutex_init(&new->lock, NULL);
    if (rc)
        goto fail;
    rc = open_file(path, append, &new->fd);
    if (rc)
        goto fail_lock;
    *capture = new;
    return 0;
fail_lock:
    pthread_mutex_destroy(&new->lock);
fail:
    free(new->path);
    free(new);
    return rc;
}

static void capture_acquire(struct capture *capture)
{
    pthread_mutex_lock(&capture->lock);
    capture->references++;
    pthread_mutex_unlock(&capture->lock);
}

void capture_release(struct capture *capture)
{
    unsigned int left;

    pthread_mutex_lock(&capture->lock);
    write_out(capture);
    left = --capture->references;
    pthread_mutex_unlock(&capture->lock);
    if (left)
        return;
    close(capture->fd);
    pthread_mutex_destroy(&capture->lock);
    free(capture->path);
    free(capture);
}

static void capture_flush(struct capture *capture)
{
    pthread_mutex_lock(&capture->lock);
    write_out(capture);
    pthread_mutex_unlock(&capture->lock);
}

/* --- headers ----------------------------------------------------------------------------------------------- */

static bool is_ipv4(const struct endpoint *endpoint)
{
    static const uint8_t mapped[12] = {[10] = 0xff, [11] = 0xff};

    return memcmp(endpoint->gid.raw, mapped, sizeof(mapped)) == 0;
}

static uint8_t *put16(uint8_t *out, uint32_t value)
{
    out[0] = (uint8_t)(value >> 8);
    out[1] = (uint8_t)value;
    return out + 2;
}

static uint8_t *put_bytes(uint8_t *out, const void *data, size_t size)
{
    memcpy(out, data, size);
    return out + size;
}

/* The sum that IP and UDP use, not yet complemented. An odd last byte is followed by a zero. */
static uint32_t sum(uint32_t start, const uint8_t *data, size_t size)
{
    uint64_t total = start;

    for (; size >= 2; data += 2, size -= 2)
        total += (uint32_t)data[0] << 8 | data[1];
    if (size)
        total += (uint32_t)data[0] << 8;
    while (total >> 16)
        total = (total & 0xffff) + (total >> 16);
    return (uint32_t)total;
}

/* A packet as it is to be written, but for the frame itself. */
struct headers {
    const struct endpoint *from, *to;
    uint8_t traffic_class;
    uint16_t ip_id;
};

static uint8_t *put_ipv4(uint8_t *ip, const struct headers *headers, uint32_t udp_size)
{
    uint8_t *out = ip;

    *out++ = 0x45;
    *out++ = headers->traffic_class;
    out = put16(out, IPV4_BYTES + udp_size);
    out = put16(out, headers->ip_id);
    out = put16(out, 0x4000); /* don't fragment */
    *out++ = HOP_LIMIT;
    *out++ = UDP_PROTOCOL;
    out = put16(out, 0);
    out = put_bytes(out, headers->from->gid.raw + 12, 4);
    out = put_bytes(out, headers->to->gid.raw + 12, 4);
    put16(ip + 10, ~sum(0, ip, IPV4_BYTES));
    return out;
}

static uint8_t *put_ipv6(uint8_t *out, const struct headers *headers, uint32_t udp_size)
{
    out = put16(out, 0x6000u | (uint32_t)headers->traffic_class << 4);
    out = put16(out, 0); /* flow label */
    out = put16(out, udp_size);
    *out++ = UDP_PROTOCOL;
    *out++ = HOP_LIMIT;
    out = put_bytes(out, headers->from->gid.raw, 16);
    return put_bytes(out, headers->to->gid.raw, 16);
}

static uint8_t *put_udp(uint8_t *out, const struct headers *headers, uint32_t udp_size)
{
    out = put16(out, headers->from->port);
    out = put16(out, headers->to->port);
    out = put16(out, udp_size);
    return put16(out, 0); /* no checksum; over IPv6, see below */
}

/* IPv6 demands one. `udp` is the header, with the frame behind it and the two addresses right in front of it. */
static void set_udp_checksum(uint8_t *udp, uint32_t udp_size)
{
    uint32_t value = ~sum(sum(udp_size + UDP_PROTOCOL, udp - 32, 32), udp, udp_size) & 0xffff;

    put16(udp + 6, value ? value : 0xffff);
}

/* --- records ----------------------------------------------------------------------------------------------- */

static uint8_t *put_record_header(uint8_t *out, uint32_t size)
{
    struct record_header header = {.captured = size, .length = size};
    struct timespec now;

    clock_gettime(CLOCK_REALTIME, &now);
    header.seconds = (uint32_t)now.tv_sec;
    header.nanoseconds = (uint32_t)now.tv_nsec;
    return put_bytes(out, &header, sizeof(header));
}

static uint8_t *put_packet(uint8_t *out, const struct headers *headers, const struct iovec *iov, int niov,
                           uint32_t size)
{
    bool v4 = is_ipv4(headers->from);
    uint32_t udp_size = UDP_BYTES + size;
    uint8_t *udp;

    out = put_record_header(out, (v4 ? IPV4_BYTES : IPV6_BYTES) + udp_size);
    out = udp = v4 ? put_ipv4(out, headers, udp_size) : put_ipv6(out, headers, udp_size);
    out = put_udp(out, headers, udp_size);
    for (int i = 0; i < niov; i++)
        out = put_bytes(out, iov[i].iov_base, iov[i].iov_len);
    if (!v4)
        set_udp_checksum(udp, udp_size);
    return out;
}

/* `size`: of all pieces together. */
static void record(struct capture *capture, const struct headers *headers, const struct iovec *iov, int niov,
                   uint32_t size)
{
    if (size > MAX_FRAME)
        return; /* no packet has it */
    pthread_mutex_lock(&capture->lock);
    if (capture->used + sizeof(struct record_header) + IPV6_BYTES + UDP_BYTES + size > BUFFER_BYTES)
        write_out(capture);
    if (!capture->failed)
        capture->used = (size_t)(put_packet(capture->buffer + capture->used, headers, iov, niov, size) -
                                 capture->buffer);
    pthread_mutex_unlock(&capture->lock);
}

/* The identification that the packet had, for all that can be known. */
static uint16_t identification(const struct view *view, const struct endpoint *to)
{
    struct iovec iov = {.iov_base = view->data, .iov_len = view->size};
    uint32_t icrc;

    if (!view->ip_id || view->size < BTH_BYTES + ICRC_BYTES)
        return 0;
    icrc = icrc_frame(&view->from, to, &iov, 1, view->size);
    for (int i = 0; i < ICRC_BYTES; i++) {
        if (view->data[view->size - ICRC_BYTES + i] != (uint8_t)(icrc >> 8 * i))
            return view->ip_id;
    }
    return 0;
}

/* A frame that came without an ICRC is shown with the right one, in the second piece. */
static void seal_copy(const struct view *view, const struct endpoint *to, struct iovec *iov)
{
    uint32_t icrc = icrc_frame(&view->from, to, iov, 1, view->size);

    iov[0].iov_len -= ICRC_BYTES;
    iov[1].iov_len = ICRC_BYTES;
    for (int i = 0; i < ICRC_BYTES; i++)
        ((uint8_t *)iov[1].iov_base)[i] = (uint8_t)(icrc >> 8 * i);
}

/* --- the link ---------------------------------------------------------------------------------------------- */

/* Before it goes below, where its ICRC may be changed. */
static void pcap_send(struct link *link, const struct frame *unsealed)
{
    struct frame sealed = icrc_seal(&link->local, unsealed), *frame = &sealed;
    struct headers headers = {
        .from = &link->local,
        .to = frame->to,
        .traffic_class = frame->traffic_class,
    };

    record(pcap_of(link)->capture, &headers, frame->iov, frame->niov, frame->size);
    link->below->ops->send(link->below, frame);
}

static void pcap_flush(struct link *link)
{
    link->below->ops->flush(link->below);
    capture_flush(pcap_of(link)->capture);
}

static int pcap_receive(struct link *link, struct view *views, int max)
{
    int count = link->below->ops->receive(link->below, views, max);

    for (int i = 0; i < count; i++) {
        struct headers headers = {
            .from = &views[i].from,
            .to = &link->local,
            .traffic_class = views[i].traffic_class,
            .ip_id = identification(&views[i], &link->local),
        };
        uint8_t icrc[ICRC_BYTES];
        struct iovec iov[2] = {{views[i].data, views[i].size}, {icrc, 0}};

        if (views[i].unsealed && views[i].size >= BTH_BYTES + ICRC_BYTES)
            seal_copy(&views[i], &link->local, iov);
        record(pcap_of(link)->capture, &headers, iov, 2, views[i].size);
    }
    return count;
}

static uint64_t pcap_deadline(const struct link *link)
{
    return link->below->ops->deadline(link->below);
}

static struct link *pcap_unwrap(struct link *link)
{
    struct link *below = link->below;

    capture_release(pcap_of(link)->capture);
    free(pcap_of(link));
    return below;
}

static void pcap_close(struct link *link)
{
    struct link *below = pcap_unwrap(link);

    below->ops->close(below);
}

static const struct link_ops pcap_ops = {
    .send = pcap_send,
    .flush = pcap_flush,
    .receive = pcap_receive,
    .deadline = pcap_deadline,
    .close = pcap_close,
    .unwrap = pcap_unwrap,
};

bool link_is_pcap(const struct link *link)
{
    return link->ops == &pcap_ops;
}

int link_pcap_open(struct link **link, struct link *below, struct capture *capture)
{
    struct pcap_link *pcap = malloc(sizeof(*pcap));

    if (!pcap)
        return ENOMEM;
    pcap->link = *below;
    pcap->link.ops = &pcap_ops;
    pcap->link.below = below;
    pcap->capture = capture;
    capture_acquire(capture);
    *link = &pcap->link;
    return 0;
}
