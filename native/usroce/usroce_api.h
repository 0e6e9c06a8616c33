/* What libusroce.so exports beside the functions of libibverbs. Looked up by name; a verbs library without them is
 * simply another device. */
#ifndef USROCE_API_H
#define USROCE_API_H

#include <stddef.h>
#include <stdint.h>

struct ibv_context;

/* What the fault link does to each frame that is sent. Probabilities from 0 to 1, independent of each other. */
struct usroce_fault {
    double drop;
    double duplicate;
    double reorder;   /* held back until `reorder_gap` later frames have passed, or 10 ms */
    double corrupt;   /* one bit flipped anywhere in the frame */
    double delay;     /* probability of being delayed by delay_us */
    uint32_t delay_us;
    uint32_t reorder_gap; /* 0: 3 */
    uint64_t seed;    /* the same seed and traffic give the same faults */
};

/* Since the device was opened. Packets, unless it says otherwise. */
struct usroce_counters {
    uint64_t sent, received;
    uint64_t sent_bytes, received_bytes;
    uint64_t send_calls, receive_calls; /* system calls */
    uint64_t send_errors;        /* frames the kernel refused */
    uint64_t malformed;          /* too short, unknown opcode, bad lengths */
    uint64_t bad_icrc;
    uint64_t unknown_qp;         /* no such QP, wrong state, wrong source address, wrong Q_Key */
    uint64_t duplicates, out_of_sequence;
    uint64_t retransmitted;
    uint64_t timeouts;           /* retransmission timer fired */
    uint64_t naks_sent, naks_received;
    uint64_t rnr_naks_sent, rnr_naks_received;
    uint64_t polls, thread_wakeups;
    uint64_t faults_dropped, faults_duplicated, faults_reordered, faults_corrupted, faults_delayed;
    uint64_t shm_sent, shm_received; /* of `sent` and `received`: through memory shared with the peer */
    uint64_t shm_peers;          /* devices that packets go to through memory, at present */
    uint64_t shm_refused;        /* not set up with a device on this host: of another user, or broken */
    uint64_t direct, direct_bytes; /* one-sided operations carried out in the peer's memory, without packets */
};

/* Sets `name` (as in the environment, without AIORDMA_USROCE_, lower case: "address", "pcap", "fault",
 * "socket_buffer", "gso", "shm", "direct", "memlock") for devices listed or opened from now on; NULL removes it. 0, ENOENT for an
 * unknown name, EINVAL for a bad value. */
int usroce_set_option(const char *name, const char *value);
/* 0; EINVAL: a probability outside 0..1; ENOTSUP: not a device of ours. NULL ends all faults. */
int usroce_set_fault(struct ibv_context *context, const struct usroce_fault *fault);
/* Starts (or, with NULL, ends) a capture of everything sent and received, as a pcap file. 0 or an errno. */
int usroce_capture(struct ibv_context *context, const char *path);
/* Memory, zeroed, that peers on this host can map: operations on regions in it need not go between processes. Whole
 * pages are best. NULL with errno (ENOTSUP: the settings want none); usroce_free() gives it back: 0, or EINVAL if it is none of that. No region may be
 * left in it then. After fork() it is both processes' one memory. */
void *usroce_alloc(size_t size);
int usroce_free(void *memory);
/* No peer can map it from now on; it is ordinary memory. No region may be left in it. 0 or EINVAL. */
int usroce_unshare(void *memory);
/* For who watches a non-blocking completion channel in an event loop: *fd (the channel's, which closes it) is readable
 * when channel->fd is, and also when there is something that the device should do now, which ibv_get_cq_event() does. So
 * the loop wakes for a packet itself and not after another thread has; and it may wake for no event. What is found by
 * polling an armed queue of the channel raises no event: the queue stays armed. 0 or an errno. */
int usroce_watch_channel(struct ibv_comp_channel *channel, int *fd);
/* From now on a message takes the receive that was posted last, not the oldest one, for whom all receives are alike: its
 * memory, and what is kept about it, was in use a moment ago and is in the cache. Of a queue pair that has its own, or of
 * an SRQ; the other is NULL. 0 or an errno. */
int usroce_newest_first(struct ibv_qp *qp, struct ibv_srq *srq);
int usroce_query_counters(struct ibv_context *context, struct usroce_counters *counters, size_t size);

#endif
