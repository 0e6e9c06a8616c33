/* What the C programs of the benchmarks share: an end on failure, the clock, the sampling of round trips, the TCP
 * connection that two of them meet over, and the patterns that verbs_pingpong.c and udp_pingpong.c both follow. */
#ifndef BENCH_H
#define BENCH_H

#include <arpa/inet.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum {
    DEADLINE_S = 120,
    MESSAGE = 64,       /* bytes */
    OUTSTANDING = 64,   /* messages, in the pattern "rate"; one in "latency" */
    BLOCK = 1 << 20,    /* bytes: one write of the pattern "bandwidth" */
    PACKET_DATA = 4096, /* bytes of a block in one packet: the largest path MTU of RDMA */
    MAX_SAMPLES = 1 << 21,
};
#define SECOND INT64_C(1000000000)
#define WARM_UP (SECOND / 10)

/* The sequence number of the message that ends a run. */
#define LAST UINT64_MAX

static inline void fail(const char *what)
{
    perror(what);
    exit(1);
}

static inline void require(int ok, const char *what)
{
    if (!ok)
        fail(what);
}

static inline int64_t now_ns(void)
{
    struct timespec time;

    clock_gettime(CLOCK_MONOTONIC, &time);
    return (int64_t)time.tv_sec * SECOND + time.tv_nsec;
}

/* --- a run of some seconds after a warm-up ------------------------------------------------------------------ */

struct timed {
    int64_t from, until, last; /* when the warm-up ends, when the run ends, the latest tick */
    int64_t started;           /* the first tick after the warm-up; 0: none yet */
    uint64_t before, count;    /* units at that time, and since */
    uint32_t *samples;         /* ns from tick to tick */
    size_t num_samples;
};

static inline void timed_begin(struct timed *timed, double seconds)
{
    *timed = (struct timed){.samples = malloc(MAX_SAMPLES * sizeof(uint32_t))};
    require(timed->samples != NULL, "malloc");
    memset(timed->samples, 1, MAX_SAMPLES * sizeof(uint32_t)); /* no page faults later */
    timed->last = now_ns();
    timed->from = timed->last + WARM_UP;
    timed->until = timed->from + (int64_t)(seconds * (double)SECOND);
}

/* `total` units are done by now. False when the time is up. */
static inline int timed_tick(struct timed *timed, uint64_t total)
{
    int64_t now = now_ns();

    if (timed->started) {
        timed->count = total - timed->before;
        if (timed->num_samples < MAX_SAMPLES)
            timed->samples[timed->num_samples++] = (uint32_t)(now - timed->last);
    } else if (now >= timed->from) {
        timed->started = now;
        timed->before = total;
    }
    timed->last = now;
    return now < timed->until;
}

static inline int compare_samples(const void *a, const void *b)
{
    const uint32_t left = *(const uint32_t *)a, right = *(const uint32_t *)b;

    return (left > right) - (left < right);
}

/* Lines of a name and a number: ns from tick to tick, units a second. */
static inline void timed_report(struct timed *timed)
{
    if (!timed->num_samples) {
        fprintf(stderr, "nothing happened within the time\n");
        exit(1);
    }
    qsort(timed->samples, timed->num_samples, sizeof(uint32_t), compare_samples);
    printf("p50_ns %u\n", timed->samples[timed->num_samples / 2]);
    printf("p99_ns %u\n", timed->samples[timed->num_samples - 1 - timed->num_samples / 100]);
    printf("per_second %.6g\n", (double)timed->count * (double)SECOND / (double)(timed->last - timed->started));
    free(timed->samples);
}

/* --- addresses ------------------------------------------------------------------------------------------------ */

static inline struct sockaddr_in address_of(const char *host, const char *port)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)atoi(port))};

    require(inet_pton(AF_INET, host, &address.sin_addr) == 1, host);
    return address;
}

static inline void bind_any_port(int sock, const char *host)
{
    struct sockaddr_in address = address_of(host, "0");

    require(bind(sock, (struct sockaddr *)&address, sizeof(address)) == 0, "bind");
}

/* The driver reads it. */
static inline void tell_port(int sock)
{
    struct sockaddr_in address;
    socklen_t length = sizeof(address);

    require(getsockname(sock, (struct sockaddr *)&address, &length) == 0, "getsockname");
    printf("%d\n", ntohs(address.sin_port));
    fflush(stdout);
}

/* --- messages of the patterns "latency" and "rate" -------------------------------------------------------- */

static inline void stamp(char *message, uint64_t sequence)
{
    memcpy(message, &sequence, sizeof(sequence));
}

static inline uint64_t sequence_of(const char *message)
{
    uint64_t sequence;

    memcpy(&sequence, message, sizeof(sequence));
    return sequence;
}

#endif
