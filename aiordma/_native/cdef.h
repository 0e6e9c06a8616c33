/* What Python sees of the C side: part of infiniband/verbs.h, then native/glue.h.
 *
 * Read by build_ffi.py, not by the compiler; "..." lets the compiler fill in what is left out, so a struct may
 * list only the members that Python touches. Keep the order of the headers. */

/* --- infiniband/verbs.h: constants --- */
#define IBV_QPS_RESET ...
#define IBV_QPS_INIT ...
#define IBV_QPS_RTR ...
#define IBV_QPS_RTS ...
#define IBV_QPS_SQD ...
#define IBV_QPS_SQE ...
#define IBV_QPS_ERR ...
#define IBV_QPT_RC ...
#define IBV_QPT_UC ...
#define IBV_QPT_UD ...
#define IBV_QP_STATE ...
#define IBV_QP_ACCESS_FLAGS ...
#define IBV_QP_PKEY_INDEX ...
#define IBV_QP_PORT ...
#define IBV_QP_AV ...
#define IBV_QP_PATH_MTU ...
#define IBV_QP_TIMEOUT ...
#define IBV_QP_RETRY_CNT ...
#define IBV_QP_RNR_RETRY ...
#define IBV_QP_RQ_PSN ...
#define IBV_QP_MAX_QP_RD_ATOMIC ...
#define IBV_QP_MIN_RNR_TIMER ...
#define IBV_QP_SQ_PSN ...
#define IBV_QP_MAX_DEST_RD_ATOMIC ...
#define IBV_QP_DEST_QPN ...
#define IBV_QP_CAP ...
#define IBV_ACCESS_LOCAL_WRITE ...
#define IBV_ACCESS_REMOTE_WRITE ...
#define IBV_ACCESS_REMOTE_READ ...
#define IBV_ACCESS_REMOTE_ATOMIC ...
#define IBV_ACCESS_MW_BIND ...
#define IBV_WR_RDMA_WRITE ...
#define IBV_WR_RDMA_WRITE_WITH_IMM ...
#define IBV_WR_SEND ...
#define IBV_WR_SEND_WITH_IMM ...
#define IBV_WR_RDMA_READ ...
#define IBV_WR_ATOMIC_CMP_AND_SWP ...
#define IBV_WR_ATOMIC_FETCH_AND_ADD ...
#define IBV_SEND_FENCE ...
#define IBV_SEND_SIGNALED ...
#define IBV_SEND_SOLICITED ...
#define IBV_SEND_INLINE ...
#define IBV_WC_SEND ...
#define IBV_WC_RDMA_WRITE ...
#define IBV_WC_RDMA_READ ...
#define IBV_WC_COMP_SWAP ...
#define IBV_WC_FETCH_ADD ...
#define IBV_WC_BIND_MW ...
#define IBV_WC_LOCAL_INV ...
#define IBV_WC_RECV ...
#define IBV_WC_RECV_RDMA_WITH_IMM ...
#define IBV_WC_WITH_IMM ...
#define IBV_PORT_NOP ...
#define IBV_PORT_DOWN ...
#define IBV_PORT_INIT ...
#define IBV_PORT_ARMED ...
#define IBV_PORT_ACTIVE ...
#define IBV_PORT_ACTIVE_DEFER ...
#define IBV_LINK_LAYER_UNSPECIFIED ...
#define IBV_LINK_LAYER_INFINIBAND ...
#define IBV_LINK_LAYER_ETHERNET ...
#define IBV_GID_TYPE_IB ...
#define IBV_GID_TYPE_ROCE_V1 ...
#define IBV_GID_TYPE_ROCE_V2 ...
#define IBV_TRANSPORT_UNKNOWN ...
#define IBV_TRANSPORT_IB ...
#define IBV_TRANSPORT_IWARP ...
#define IBV_TRANSPORT_USNIC ...
#define IBV_TRANSPORT_USNIC_UDP ...
#define IBV_TRANSPORT_UNSPECIFIED ...
#define IBV_ATOMIC_NONE ...
#define IBV_ATOMIC_HCA ...
#define IBV_ATOMIC_GLOB ...
#define IBV_MW_TYPE_1 ...
#define IBV_MW_TYPE_2 ...
#define IBV_DEVICE_MEM_WINDOW ...
#define IBV_DEVICE_MEM_WINDOW_TYPE_2A ...
#define IBV_DEVICE_MEM_WINDOW_TYPE_2B ...
#define IBV_EVENT_CQ_ERR ...
#define IBV_EVENT_QP_FATAL ...
#define IBV_EVENT_QP_REQ_ERR ...
#define IBV_EVENT_QP_ACCESS_ERR ...
#define IBV_EVENT_COMM_EST ...
#define IBV_EVENT_SQ_DRAINED ...
#define IBV_EVENT_PATH_MIG ...
#define IBV_EVENT_PATH_MIG_ERR ...
#define IBV_EVENT_DEVICE_FATAL ...
#define IBV_EVENT_PORT_ACTIVE ...
#define IBV_EVENT_PORT_ERR ...
#define IBV_EVENT_LID_CHANGE ...
#define IBV_EVENT_PKEY_CHANGE ...
#define IBV_EVENT_SM_CHANGE ...
#define IBV_EVENT_SRQ_ERR ...
#define IBV_EVENT_SRQ_LIMIT_REACHED ...
#define IBV_EVENT_QP_LAST_WQE_REACHED ...
#define IBV_EVENT_CLIENT_REREGISTER ...
#define IBV_EVENT_GID_CHANGE ...
enum ibv_fork_status { IBV_FORK_DISABLED, IBV_FORK_ENABLED, IBV_FORK_UNNEEDED, ... };

/* --- infiniband/verbs.h: structs --- */
struct ibv_device {
    int node_type;
    int transport_type;
    char name[...];
    char dev_name[...];
    char ibdev_path[...];
    ...;
};
struct ibv_context { int async_fd; int num_comp_vectors; ...; };
struct ibv_pd { uint32_t handle; ...; };
struct ibv_mr { uint32_t lkey; uint32_t rkey; ...; };
struct ibv_mw { uint32_t rkey; ...; };
struct ibv_comp_channel { int fd; ...; };
struct ibv_cq { int cqe; ...; };
struct ibv_srq { uint32_t handle; ...; };
struct ibv_qp { uint32_t qp_num; ...; };

struct ibv_device_attr {
    char fw_ver[64];
    uint64_t node_guid;
    uint64_t max_mr_size;
    uint32_t vendor_id;
    uint32_t vendor_part_id;
    int max_qp;
    int max_qp_wr;
    unsigned int device_cap_flags;
    int max_sge;
    int max_cq;
    int max_cqe;
    int max_mr;
    int max_pd;
    int max_qp_rd_atom;
    int max_qp_init_rd_atom;
    int atomic_cap;
    int max_mw;
    int max_srq;
    int max_srq_wr;
    uint8_t phys_port_cnt;
    ...;
};
struct ibv_port_attr {
    int state;
    int max_mtu;
    int active_mtu;
    int gid_tbl_len;
    uint32_t max_msg_sz;
    uint16_t lid;
    uint8_t link_layer;
    ...;
};
union ibv_gid { uint8_t raw[16]; ...; };
struct ibv_gid_entry {
    union ibv_gid gid;
    uint32_t gid_index;
    uint32_t port_num;
    uint32_t gid_type;
    uint32_t ndev_ifindex;
};
struct ibv_global_route {
    union ibv_gid dgid;
    uint32_t flow_label;
    uint8_t sgid_index;
    uint8_t hop_limit;
    uint8_t traffic_class;
};
struct ibv_ah_attr {
    struct ibv_global_route grh;
    uint16_t dlid;
    uint8_t sl;
    uint8_t is_global;
    uint8_t port_num;
    ...;
};
struct ibv_qp_cap {
    uint32_t max_send_wr;
    uint32_t max_recv_wr;
    uint32_t max_send_sge;
    uint32_t max_recv_sge;
    uint32_t max_inline_data;
};
struct ibv_qp_init_attr {
    struct ibv_cq *send_cq;
    struct ibv_cq *recv_cq;
    struct ibv_srq *srq;
    struct ibv_qp_cap cap;
    int qp_type;
    int sq_sig_all;
    ...;
};
struct ibv_qp_attr {
    int qp_state;
    int path_mtu;
    uint32_t rq_psn;
    uint32_t sq_psn;
    uint32_t dest_qp_num;
    unsigned int qp_access_flags;
    struct ibv_ah_attr ah_attr;
    uint16_t pkey_index;
    uint8_t max_rd_atomic;
    uint8_t max_dest_rd_atomic;
    uint8_t min_rnr_timer;
    uint8_t port_num;
    uint8_t timeout;
    uint8_t retry_cnt;
    uint8_t rnr_retry;
    ...;
};

/* --- native/usroce/usroce_api.h --- */
struct usroce_fault {
    double drop;
    double duplicate;
    double reorder;
    double corrupt;
    double delay;
    uint32_t delay_us;
    uint32_t reorder_gap;
    uint64_t seed;
};
struct usroce_counters {
    uint64_t sent;
    uint64_t received;
    uint64_t sent_bytes;
    uint64_t received_bytes;
    uint64_t send_calls;
    uint64_t receive_calls;
    uint64_t send_errors;
    uint64_t malformed;
    uint64_t bad_icrc;
    uint64_t unknown_qp;
    uint64_t duplicates;
    uint64_t out_of_sequence;
    uint64_t retransmitted;
    uint64_t timeouts;
    uint64_t naks_sent;
    uint64_t naks_received;
    uint64_t rnr_naks_sent;
    uint64_t rnr_naks_received;
    uint64_t polls;
    uint64_t thread_wakeups;
    uint64_t faults_dropped;
    uint64_t faults_duplicated;
    uint64_t faults_reordered;
    uint64_t faults_corrupted;
    uint64_t faults_delayed;
    uint64_t shm_sent, shm_received;
    uint64_t shm_peers;
    uint64_t shm_refused;
    uint64_t direct, direct_bytes;
    ...;
};

/* --- native/glue.h --- */
struct glue_provider {
    void *handle;
    void (*free_device_list)(struct ibv_device **list);
    enum ibv_fork_status (*is_fork_initialized)(void);
    int (*usroce_query_counters)(struct ibv_context *context, struct usroce_counters *counters, size_t size);
    void *(*usroce_alloc)(size_t size);
    ...;
};
struct glue_send_wr { uint64_t wr_id; ...; };
struct glue_recv_wr { uint64_t wr_id; ...; };
struct glue_wc { uint64_t wr_id; ...; };
struct glue_async_event { int32_t type; uint32_t qp_num; int32_t port; uint64_t cookie; };

int glue_provider_open(const char *path, struct glue_provider *provider, char *error, size_t error_size);
void glue_provider_close(struct glue_provider *provider);

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
int glue_post_srq_recv_many(struct ibv_srq *srq, const struct glue_recv_wr *wrs, int num, int *posted);
int glue_poll(struct ibv_cq *cq, struct glue_wc *out, int max);
int glue_poll_spin(struct ibv_cq *cq, struct glue_wc *out, int max, uint64_t budget_ns);
int glue_arm(struct ibv_cq *cq, int solicited_only);
int glue_drain_channel(struct glue_provider *p, struct ibv_comp_channel *channel, uint64_t *cookies, int max,
                       int *num);
void glue_ack_cq_events(struct glue_provider *p, struct ibv_cq *cq, unsigned int num);
