/* A connected RC queue pair for the C programs of the benchmarks: one completion queue with its channel, one
 * registered buffer, and a TCP connection to the peer for the set-up and for barriers. */
#ifndef VERBS_LAB_H
#define VERBS_LAB_H

#include <infiniband/verbs.h>
#include <stddef.h>
#include <stdint.h>

struct endpoint {
    uint64_t addr; /* of the buffer */
    uint32_t rkey;
    uint32_t qpn;
    uint32_t psn;
    uint32_t lid;
    union ibv_gid gid;
};

struct lab {
    /* Set before lab_open(). */
    int gid_index;
    uint32_t sends, receives; /* work requests that fit in the queues */
    size_t size;              /* bytes of the buffer */

    struct ibv_context *context;
    struct ibv_pd *pd;
    struct ibv_comp_channel *channel;
    struct ibv_cq *cq;
    struct ibv_qp *qp;
    struct ibv_mr *mr;
    struct ibv_port_attr port;
    struct endpoint local, remote;
    char *buffer;
    uint32_t max_inline;
    int sock;
    unsigned unacked; /* events read and not yet acknowledged */
};

/* Whatever fails here ends the process. */
void lab_open(struct lab *lab, const char *device);
/* The server (host NULL) prints the TCP port and waits there. On return the queue pair is ready to send. */
void lab_connect(struct lab *lab, const char *host, const char *port);
void lab_close(struct lab *lab);
/* Returns when the peer has come here too. */
void lab_barrier(const struct lab *lab);
/* One notification for the next completion. */
void lab_arm(struct lab *lab);
/* Blocks until there is a notification, and arms again: what completes while the queue is drained then is seen. */
void lab_sleep(struct lab *lab);

#endif
