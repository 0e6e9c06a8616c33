/* What plain UDP does on this machine: the measure for verbs_pingpong.c, pattern by pattern.
 *
 *     udp_pingpong PATTERN WAIT SECONDS                    server; prints its UDP port
 *     udp_pingpong PATTERN WAIT SECONDS HOST PORT          client; prints a line for each figure
 *
 * WAIT is `busy` (receive without blocking, without pause) or `blocking`, for both ends. Patterns:
 *
 *     latency     one message of 64 bytes goes there and back at a time
 *     rate        64 messages are kept outstanding; each is echoed. With UDP_SEGMENT and UDP_GRO: whatever one
 *                 system call received is answered by one
 *     bandwidth   one way, as fast as a window allows that the receiver's socket buffer can hold, so that nothing is
 *                 lost. With UDP_SEGMENT and UDP_GRO: 15 packets in a system call, each of 4096 bytes of data behind
 *                 16 bytes that stand for the headers. Data is read from and received into 1 MiB of memory, as in a
 *                 write of that size, again and again. Counted is what the receiver reports
 */
#define _GNU_SOURCE
#include <errno.h>
#include <netinet/udp.h>

#include "bench.h"

#ifndef UDP_GRO
#define UDP_GRO 104
#endif

enum {
    HEADERS = 16,
    PACKET = PACKET_DATA + HEADERS,
    PIECE_PACKETS = 15,
    PIECE = PIECE_PACKETS * PACKET, /* what fits into one send call */
    PIECE_MEMORY = PIECE + 8192,    /* what it takes of a socket buffer, at most */
    DATAGRAMS = 1 << 16,            /* room for what one receive call can give */
    MOST_PIECES = 8,                /* on their way; more of them are no faster */
    SOCKET_BUFFER = 4 << 20,        /* asked for */
};

struct session {
    int sock;
    int flags; /* of recv */
    double seconds;
    char *buffer;
};

/* The receiver says how much has arrived, and first of all how much may be on its way. */
struct report {
    uint64_t pieces;
    uint64_t packets;
};

/* --- datagrams ------------------------------------------------------------------------------------------------ */

static size_t receive(const struct session *session, void *data, size_t size)
{
    ssize_t length;

    do
        length = recv(session->sock, data, size, session->flags);
    while (length < 0 && (errno == EAGAIN || errno == EINTR));
    require(length >= 0, "recv");
    return (size_t)length;
}

static void transmit(const struct session *session, const void *data, size_t size)
{
    require(send(session->sock, data, size, 0) == (ssize_t)size, "send");
}

/* Several datagrams of `segment` bytes in one system call, both ways. */
static void segment(int sock, int segment)
{
    int on = 1;

    require(setsockopt(sock, IPPROTO_UDP, UDP_SEGMENT, &segment, sizeof(segment)) == 0, "UDP_SEGMENT");
    require(setsockopt(sock, IPPROTO_UDP, UDP_GRO, &on, sizeof(on)) == 0, "UDP_GRO");
}

/* --- latency and rate --------------------------------------------------------------------------------------- */

static void echo(struct session *session)
{
    for (;;) {
        size_t length = receive(session, session->buffer, DATAGRAMS);

        if (sequence_of(session->buffer) == LAST)
            return;
        transmit(session, session->buffer, length);
    }
}

/* Stamps and sends `count` messages. */
static void ask(struct session *session, uint64_t *next, size_t count)
{
    for (size_t i = 0; i < count; i++)
        stamp(session->buffer + i * MESSAGE, (*next)++);
    transmit(session, session->buffer, count * MESSAGE);
}

/* Returns how many answers came, all of which must be the next ones. */
static size_t take_answers(struct session *session, uint64_t *answered)
{
    size_t count = receive(session, session->buffer, DATAGRAMS) / MESSAGE;

    for (size_t i = 0; i < count; i++)
        if (sequence_of(session->buffer + i * MESSAGE) != (*answered)++) {
            fprintf(stderr, "a datagram was lost\n");
            exit(1);
        }
    return count;
}

static void ping(struct session *session, size_t outstanding)
{
    uint64_t next = 0, answered = 0;
    struct timed timed;
    size_t count;

    timed_begin(&timed, session->seconds);
    ask(session, &next, outstanding);
    for (;;) {
        count = take_answers(session, &answered);
        if (!timed_tick(&timed, answered))
            break;
        ask(session, &next, count);
    }
    while (answered < next)
        take_answers(session, &answered);
    stamp(session->buffer, LAST);
    transmit(session, session->buffer, MESSAGE);
    timed_report(&timed);
}

/* --- bandwidth ------------------------------------------------------------------------------------------------ */

/* In pieces. */
static uint64_t window_of(int sock)
{
    int granted, fit;
    socklen_t length = sizeof(granted);

    require(getsockopt(sock, SOL_SOCKET, SO_RCVBUF, &granted, &length) == 0, "SO_RCVBUF");
    fit = granted / PIECE_MEMORY;
    return (uint64_t)(fit < 2 ? 2 : fit > MOST_PIECES ? MOST_PIECES : fit);
}

static char *piece_at(const struct session *session, uint64_t number)
{
    return session->buffer + number % (BLOCK / PIECE) * PIECE;
}

/* One report in each half window is enough to keep the sender going. */
static void sink(struct session *session)
{
    uint64_t window = window_of(session->sock), reported = 0;
    struct report report = {.pieces = window};
    size_t length;

    transmit(session, &report, sizeof(report));
    report.pieces = 0;
    while ((length = receive(session, piece_at(session, report.packets / PIECE_PACKETS), PIECE)) >= PACKET) {
        report.packets += length / PACKET;
        report.pieces = report.packets / PIECE_PACKETS;
        if (report.pieces - reported >= (window + 1) / 2) {
            transmit(session, &report, sizeof(report));
            reported = report.pieces;
        }
    }
    transmit(session, &report, sizeof(report));
}

static void pour(struct session *session)
{
    struct report report;
    struct timed timed;
    uint64_t window, sent = 0;

    receive(session, &report, sizeof(report));
    window = report.pieces;
    report.pieces = 0;
    timed_begin(&timed, session->seconds);
    do {
        for (; sent - report.pieces < window; sent++)
            transmit(session, piece_at(session, sent), PIECE);
        receive(session, &report, sizeof(report));
    } while (timed_tick(&timed, report.packets * PACKET_DATA));
    transmit(session, "", 1);
    do
        receive(session, &report, sizeof(report));
    while (report.packets < sent * PIECE_PACKETS && recv(session->sock, NULL, 0, MSG_PEEK | MSG_DONTWAIT) >= 0);
    printf("lost %llu\n", (unsigned long long)(sent * PIECE_PACKETS - report.packets));
    timed_report(&timed);
}

/* --- the program ----------------------------------------------------------------------------------------------- */

/* Connects the server's socket to the first that calls. */
static void await_client(int sock)
{
    struct sockaddr_in peer;
    socklen_t length = sizeof(peer);
    char hello;

    bind_any_port(sock, "127.0.0.1");
    tell_port(sock);
    require(recvfrom(sock, &hello, 1, 0, (struct sockaddr *)&peer, &length) >= 0, "recvfrom");
    require(connect(sock, (struct sockaddr *)&peer, length) == 0, "connect");
    require(send(sock, "", 1, 0) == 1, "send");
}

static void call_server(int sock, const char *host, const char *port)
{
    struct sockaddr_in address = address_of(host, port);
    char hello;

    require(connect(sock, (struct sockaddr *)&address, sizeof(address)) == 0, "connect");
    require(send(sock, "", 1, 0) == 1, "send");
    require(recv(sock, &hello, 1, 0) == 1, "recv");
}

static const struct pattern {
    const char *name;
    int segment; /* 0: plain datagrams */
    size_t outstanding; /* 0: one way */
} patterns[] = {
    {"latency", 0, 1},
    {"rate", MESSAGE, OUTSTANDING},
    {"bandwidth", PACKET, 0},
};

static void run(struct session *session, const struct pattern *pattern, int client)
{
    if (!client)
        pattern->outstanding ? echo(session) : sink(session);
    else if (pattern->outstanding)
        ping(session, pattern->outstanding);
    else
        pour(session);
}

static const struct pattern *find_pattern(const char *name)
{
    for (size_t i = 0; i < sizeof(patterns) / sizeof(*patterns); i++)
        if (!strcmp(patterns[i].name, name))
            return &patterns[i];
    fprintf(stderr, "no pattern %s\n", name);
    exit(2);
}

int main(int argc, char **argv)
{
    struct session session = {.buffer = calloc(1, BLOCK)};
    int size = SOCKET_BUFFER, client = argc == 6;
    const struct pattern *pattern;

    if (argc != 4 && argc != 6) {
        fprintf(stderr, "usage: udp_pingpong PATTERN WAIT SECONDS [HOST PORT]\n");
        return 2;
    }
    pattern = find_pattern(argv[1]);
    session.flags = strcmp(argv[2], "busy") ? 0 : MSG_DONTWAIT;
    session.seconds = atof(argv[3]);
    alarm(DEADLINE_S);
    require(session.buffer != NULL, "calloc");
    require((session.sock = socket(AF_INET, SOCK_DGRAM, 0)) >= 0, "socket");
    require(setsockopt(session.sock, SOL_SOCKET, SO_RCVBUF, &size, sizeof(size)) == 0, "SO_RCVBUF");
    if (pattern->segment)
        segment(session.sock, pattern->segment);
    client ? call_server(session.sock, argv[4], argv[5]) : await_client(session.sock);
    run(&session, pattern, client);
    return 0;
}
