/* The world that the packet fuzzer lives in: one device with every kind of object on it, a cable that the fuzzer
 * holds in its hands, a clock that it sets, and what must hold whatever it does.
 *
 * The device is the real one, through its internal interface, but for three things: its link is that cable,
 * now_ns() is the clock (ld --wrap), and random_u32() is a sequence that starts anew with each input (ditto). No
 * thread runs. So an input does the same each time. */
#ifndef FUZZ_WORLD_H
#define FUZZ_WORLD_H

#include "usroce.h"

#if defined(__SANITIZE_ADDRESS__)
#define WITH_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define WITH_ASAN 1
#endif
#endif

enum {
    GUARD_BYTES = 4096, /* around each region */
    SECRET = 0xf5,      /* what is in memory that the peer must not read; no payload has it */
    REGION_BYTES = 16384,
    QPS = 11,
    CQS = 2,
    CABLE_FRAMES = 128,
    MAX_POSTED = 4096,
};

/* What a region is for is what its rights are. */
enum region {
    OPEN,     /* every right */
    LOCAL,    /* none for the peer */
    READABLE, /* read by the peer, written by nobody: it must stay as it is */
    WINDOWED, /* reached through two windows only, which leave its ends out: those must stay as they are */
    FOREIGN,  /* in another protection domain: it must stay as it is */
    VOLATILE, /* registered anew in the middle */
    REGIONS,
};

enum { WINDOW_1 = REGION_BYTES / 4, WINDOW_2 = REGION_BYTES / 2, WINDOW_BYTES = REGION_BYTES / 4 }; /* in WINDOWED */

struct posted {
    uint8_t qp;
    bool receive, shared, completed;
};

struct world {
    struct context *ctx;
    struct ibv_pd *pd, *other_pd;
    struct ibv_comp_channel *channel;
    struct ibv_cq *cqs[CQS];
    struct ibv_srq *srq;
    struct ibv_mr *mrs[REGIONS];
    struct ibv_mw *windows[2]; /* type 1, type 2 */
    struct ibv_qp *qps[QPS];
    struct ibv_ah *ah;
    uint8_t *regions[REGIONS], *guards[REGIONS + 1];
    uint64_t now;
    struct posted posted[MAX_POSTED]; /* by work request id */
    uint32_t num_posted;
    uint32_t last_completed[QPS][2]; /* of send and receive queue: they complete in order */
};

extern struct world world;

/* Makes all that, once. */
void world_open(void);
/* As it was in the beginning, but for what nobody can see. */
void world_reset(void);
/* Whatever was sent is delivered from now on, and time goes by: every work request must end. */
void world_settle(void);
/* Abort if something is not as it must be: in the queue pairs, in memory. */
void world_check_queues(void);
void world_check_memory(void);

/* Brings a queue pair from RESET to the state it has in this world. */
void world_connect(int index);
void world_replace_qp(int index);
void world_register(enum region region);
/* Binds the window of type 2 through a send queue. */
void world_bind(int qp);

static inline struct qp *world_qp(int index)
{
    return (struct qp *)(void *)world.qps[index];
}

/* Where the device is. */
struct endpoint world_endpoint(void);

/* A number for a work request, to be given back by one completion at most; or false: enough was posted. */
bool world_next_id(int qp, bool receive, uint64_t *id);
/* It was not posted after all. */
void world_return_id(void);
void world_poll(int cq);

/* --- the cable (cable.c) ------------------------------------------------------------------------------------- */

enum sender { PEER, OTHER_ADDRESS, OTHER_PORT };

/* A frame for the device, sealed here, from the peer of the queue pair that it is for or from somebody else.
 * `damage`: XORed to the ICRC. */
void cable_give(const uint8_t *frame, uint32_t size, enum sender sender, uint16_t ip_id, uint32_t damage);
/* The device has one turn; of a thread that polls, or (with `rest`) of one that will not come back. */
void cable_progress(bool rest);
uint32_t cable_count(void);
/* The k-th oldest frame that was sent to this device and is still on the cable; it may be changed. */
uint8_t *cable_frame(uint32_t k, uint32_t *size);
void cable_drop(uint32_t k);
void cable_deliver_all(void);
/* Nothing is under way, in either direction. */
bool cable_is_idle(void);
void cable_clear(void);
/* Puts it in the place of the UDP links. */
void cable_attach(struct context *ctx);

#define must(condition) ((condition) ? (void)0 : world_die(__FILE__, __LINE__, #condition))
_Noreturn void world_die(const char *file, int line, const char *condition);

#endif
