/* The C side of aiordma: what Python cannot do over verbs, or cannot do fast enough.
 *
 * provider.c  opens a verbs library at run time and fills one function table from it.
 * control.c   control path: devices, registrations, queues. Thin, one verbs call each.
 * glue.c      data path: post, poll, arm. One crossing from Python does a whole batch.
 *
 * Conventions, for every function here:
 *  - The result is 0 or a positive errno value, unless the comment says otherwise; errno itself is never left
 *    for the caller to read, because the interpreter may run other code in between.
 *  - Objects belong to the caller; nothing here keeps a pointer after it returns, and there is no global state.
 *  - Called with the GIL or without it. The calls on one queue pair, one completion queue or one channel must not
 *    overlap unless verbs itself allows it (libibverbs objects are thread-safe unless made otherwise).
 *  - No function blocks, glue_poll_spin() apart, which is bounded by its budget.
 */
#ifndef AIORDMA_GLUE_H
#define AIORDMA_GLUE_H

#include <infiniband/verbs.h>
#include <stddef.h>
#include <stdint.h>

#include "usroce/usroce_api.h"

/* The verbs functions that are real symbols of the library. The data path is not here: it is reached through
 * context->ops by the inline functions of verbs.h, and so needs no symbol. */
struct glue_provider {
    void *handle;
    struct ibv_device **(*get_device_list)(int *num);
    void (*free_device_list)(struct ibv_device **list);
    struct ibv_context *(*open_device)(struct ibv_device *device);
    int (*close_device)(struct ibv_context *context);
    int (*query_device)(struct ibv_context *context, struct ibv_device_attr *attr);
    int (*query_port)(struct ibv_context *context, uint8_t port, struct _compat_ibv_port_attr *attr);
    ssize_t (*query_gid_table)(struct ibv_context *context, struct ibv_gid_entry *entries, size_t max,
                               uint32_t flags, size_t entry_size);
    int (*get_async_event)(struct ibv_context *context, struct ibv_async_event *event);
    void (*ack_async_event)(struct ibv_async_event *event);
    struct ibv_pd *(*alloc_pd)(struct ibv_context *context);
    int (*dealloc_pd)(struct ibv_pd *pd);
    struct ibv_mr *(*reg_mr)(struct ibv_pd *pd, void *addr, size_t length, int access);
    int (*dereg_mr)(struct ibv_mr *mr);
    struct ibv_comp_channel *(*create_comp_channel)(struct ibv_context *context);
    int (*destroy_comp_channel)(struct ibv_comp_channel *channel);
    struct ibv_cq *(*create_cq)(struct ibv_context *context, int cqe, void *cq_context,
                                struct ibv_comp_channel *channel, int comp_vector);
    int (*destroy_cq)(struct ibv_cq *cq);
    int (*get_cq_event)(struct ibv_comp_channel *channel, struct ibv_cq **cq, void **cq_context);
    void (*ack_cq_events)(struct ibv_cq *cq, unsigned int nevents);
    struct ibv_srq *(*create_srq)(struct ibv_pd *pd, struct ibv_srq_init_attr *attr);
    int (*modify_srq)(struct ibv_srq *srq, struct ibv_srq_attr *attr, int mask);
    int (*destroy_srq)(struct ibv_srq *srq);
    struct ibv_qp *(*create_qp)(struct ibv_pd *pd, struct ibv_qp_init_attr *attr);
    int (*modify_qp)(struct ibv_qp *qp, struct ibv_qp_attr *attr, int mask);
    int (*query_qp)(struct ibv_qp *qp, struct ibv_qp_attr *attr, int mask, struct ibv_qp_init_attr *init);
    int (*destroy_qp)(struct ibv_qp *qp);
    enum ibv_fork_status (*is_fork_initialized)(void); /* may be NULL: rdma-core before v35 */
    /* Only libusroce.so has these; all NULL in another library. */
    int (*usroce_set_option)(const char *name, const char *value);
    int (*usroce_set_fault)(struct ibv_context *context, const struct usroce_fault *fault);
    int (*usroce_capture)(struct ibv_context *context, const char *path);
    int (*usroce_query_counters)(struct ibv_context *context, struct usroce_counters *counters, size_t size);
    void *(*usroce_alloc)(size_t size);
    int (*usroce_free)(void *memory);
    int (*usroce_unshare)(void *memory);
    int (*usroce_watch_channel)(struct ibv_comp_channel *channel, int *fd);
    int (*usroce_newest_first)(struct ibv_qp *qp, struct ibv_srq *srq);
};

/* One work request, flat. Multi-byte fields are in host order; immediate data is converted on the way. */
struct glue_send_wr {
    uint64_t wr_id;
    uint64_t addr;        /* local memory: one piece */
    uint64_t remote_addr; /* write, read, atomics */
    uint64_t compare_add; /* fetch_add: the addend; compare_swap: the expected value */
    uint64_t swap;        /* compare_swap: the new value */
    uint32_t length;
    uint32_t lkey;
    uint32_t rkey;
    uint32_t imm;
    uint32_t opcode; /* enum ibv_wr_opcode */
    uint32_t flags;  /* enum ibv_send_flags */
};

struct glue_recv_wr {
    uint64_t wr_id;
    uint64_t addr;
    uint32_t length;
    uint32_t lkey;
};

/* One work completion, packed: 40 bytes, no holes. On an error only wr_id, status, qp_num and vendor_err mean
 * anything (ibv_poll_cq(3)); the other fields are zero then. */
struct glue_wc {
    uint64_t wr_id;
    uint32_t status;
    uint32_t opcode;
    uint32_t byte_len;
    uint32_t imm; /* host order */
    uint32_t qp_num;
    uint32_t vendor_err;
    uint32_t flags;
    uint32_t reserved;
};

struct glue_async_event {
    int32_t type;    /* enum ibv_event_type */
    uint32_t qp_num; /* queue-pair events, else 0 */
    int32_t port;    /* port events, else 0 */
    uint64_t cookie; /* completion-queue events: its cookie, else 0 */
};

/* provider.c */
int glue_provider_open(const char *path, struct glue_provider *provider, char *error, size_t error_size);
void glue_provider_close(struct glue_provider *provider);

/* control.c */
int glue_get_device_list(struct glue_provider *p, struct ibv_device ***list, int *num);
int glue_open_device(struct glue_provider *p, struct ibv_device *device, struct ibv_context **context);
int glue_close_device(struct glue_provider *p, struct ibv_context *context);
int glue_query_device(struct glue_provider *p, struct ibv_context *context, struct ibv_device_attr *attr);
int glue_query_port(struct glue_provider *p, struct ibv_context *context, uint8_t port,
                    struct ibv_port_attr *attr);
int glue_query_gid_table(struct glue_provider *p, struct ibv_context *context, struct ibv_gid_entry *entries,
                         size_t max, size_t *num);
int glue_get_async_event(struct glue_provider *p, struct ibv_context *context, struct glue_async_event *event);
int glue_alloc_pd(struct glue_provider *p, struct ibv_context *context, struct ibv_pd **pd);
int glue_dealloc_pd(struct glue_provider *p, struct ibv_pd *pd);
int glue_reg_mr(struct glue_provider *p, struct ibv_pd *pd, uint64_t addr, uint64_t length, int access,
                struct ibv_mr **mr);
int glue_dereg_mr(struct glue_provider *p, struct ibv_mr *mr);
int glue_alloc_mw(struct ibv_pd *pd, int type, struct ibv_mw **mw);
int glue_dealloc_mw(struct ibv_mw *mw);
int glue_create_comp_channel(struct glue_provider *p, struct ibv_context *context,
                             struct ibv_comp_channel **channel);
int glue_destroy_comp_channel(struct glue_provider *p, struct ibv_comp_channel *channel);
int glue_watch_channel(struct glue_provider *p, struct ibv_comp_channel *channel, int *fd);
int glue_create_cq(struct glue_provider *p, struct ibv_context *context, int cqe, uint64_t cookie,
                   struct ibv_comp_channel *channel, int comp_vector, struct ibv_cq **cq);
int glue_destroy_cq(struct glue_provider *p, struct ibv_cq *cq);
int glue_create_srq(struct glue_provider *p, struct ibv_pd *pd, uint32_t max_wr, uint32_t max_sge,
                    struct ibv_srq **srq, uint32_t *granted_wr);
int glue_arm_srq(struct glue_provider *p, struct ibv_srq *srq, uint32_t limit);
int glue_destroy_srq(struct glue_provider *p, struct ibv_srq *srq);
int glue_newest_first(struct glue_provider *p, struct ibv_qp *qp, struct ibv_srq *srq);
int glue_create_qp(struct glue_provider *p, struct ibv_pd *pd, struct ibv_qp_init_attr *attr,
                   struct ibv_qp **qp);
int glue_modify_qp(struct glue_provider *p, struct ibv_qp *qp, struct ibv_qp_attr *attr, int mask);
int glue_query_qp(struct glue_provider *p, struct ibv_qp *qp, struct ibv_qp_attr *attr, int mask,
                  struct ibv_qp_init_attr *init);
int glue_destroy_qp(struct glue_provider *p, struct ibv_qp *qp);
int glue_set_nonblocking(int fd);
int glue_usroce_set_option(struct glue_provider *p, const char *name, const char *value);
int glue_usroce_set_fault(struct glue_provider *p, struct ibv_context *context, const struct usroce_fault *fault);
int glue_usroce_capture(struct glue_provider *p, struct ibv_context *context, const char *path);
int glue_usroce_query_counters(struct glue_provider *p, struct ibv_context *context,
                               struct usroce_counters *counters);
int glue_usroce_alloc(struct glue_provider *p, size_t size, void **memory);
int glue_usroce_free(struct glue_provider *p, void *memory);
int glue_usroce_unshare(struct glue_provider *p, void *memory);

/* glue.c */
int glue_post_send(struct ibv_qp *qp, uint64_t wr_id, uint32_t opcode, uint32_t flags, uint64_t addr,
                   uint32_t length, uint32_t lkey, uint64_t remote_addr, uint32_t rkey, uint32_t imm);
int glue_post_atomic(struct ibv_qp *qp, uint64_t wr_id, uint32_t opcode, uint32_t flags, uint64_t addr,
                     uint32_t lkey, uint64_t remote_addr, uint32_t rkey, uint64_t compare_add, uint64_t swap);
int glue_post_send_many(struct ibv_qp *qp, const struct glue_send_wr *wrs, int num, int *posted);
int glue_post_bind_mw(struct ibv_qp *qp, uint64_t wr_id, struct ibv_mw *mw, uint32_t new_rkey,
                      struct ibv_mr *mr, uint64_t addr, uint64_t length, uint32_t access);
int glue_post_local_inv(struct ibv_qp *qp, uint64_t wr_id, uint32_t rkey);
int glue_post_recv(struct ibv_qp *qp, uint64_t wr_id, uint64_t addr, uint32_t length, uint32_t lkey);
int glue_post_recv_many(struct ibv_qp *qp, const struct glue_recv_wr *wrs, int num, int *posted);
int glue_post_srq_recv(struct ibv_srq *srq, uint64_t wr_id, uint64_t addr, uint32_t length, uint32_t lkey);
int glue_post_srq_recv_many(struct ibv_srq *srq, const struct glue_recv_wr *wrs, int num, int *posted);
int glue_poll(struct ibv_cq *cq, struct glue_wc *out, int max);
int glue_poll_spin(struct ibv_cq *cq, struct glue_wc *out, int max, uint64_t budget_ns);
int glue_arm(struct ibv_cq *cq, int solicited_only);
int glue_drain_channel(struct glue_provider *p, struct ibv_comp_channel *channel, uint64_t *cookies, int max,
                       int *num);
void glue_ack_cq_events(struct glue_provider *p, struct ibv_cq *cq, unsigned int num);

#endif
