/* See verbs_lab.h. */
#include "verbs_lab.h"

#include <netinet/tcp.h>

#include "bench.h"

#define PORT_NUM 1
#define INLINE 220
#define PAGE 4096UL

/* --- opening -------------------------------------------------------------------------------------------- */

static struct ibv_context *open_device(const char *name)
{
    struct ibv_context *context = NULL;
    struct ibv_device **list = ibv_get_device_list(NULL);

    for (struct ibv_device **device = list; device && *device; device++)
        if (!strcmp(ibv_get_device_name(*device), name))
            context = ibv_open_device(*device);
    if (list)
        ibv_free_device_list(list);
    return context;
}

static void make_queues(struct lab *lab)
{
    struct ibv_qp_init_attr attr = {
        .qp_type = IBV_QPT_RC,
        .cap = {.max_send_wr = lab->sends,
                .max_recv_wr = lab->receives,
                .max_send_sge = 1,
                .max_recv_sge = 1},
    };
    uint32_t wanted = INLINE;

    require((lab->channel = ibv_create_comp_channel(lab->context)) != NULL, "ibv_create_comp_channel");
    lab->cq = ibv_create_cq(lab->context, (int)(lab->sends + lab->receives), NULL, lab->channel, 0);
    require(lab->cq != NULL, "ibv_create_cq");
    attr.send_cq = attr.recv_cq = lab->cq;
    for (;; wanted /= 2) {
        attr.cap.max_inline_data = wanted;
        lab->qp = ibv_create_qp(lab->pd, &attr);
        if (lab->qp || !wanted)
            break;
    }
    require(lab->qp != NULL, "ibv_create_qp");
    lab->max_inline = attr.cap.max_inline_data;
}

static void make_memory(struct lab *lab)
{
    size_t size = (lab->size + PAGE - 1) / PAGE * PAGE;

    lab->buffer = aligned_alloc(PAGE, size);
    require(lab->buffer != NULL, "aligned_alloc");
    memset(lab->buffer, 0x7b, size);
    lab->mr = ibv_reg_mr(lab->pd, lab->buffer, size,
                         IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_READ | IBV_ACCESS_REMOTE_WRITE);
    require(lab->mr != NULL, "ibv_reg_mr");
}

void lab_open(struct lab *lab, const char *device)
{
    require((lab->context = open_device(device)) != NULL, device);
    require((lab->pd = ibv_alloc_pd(lab->context)) != NULL, "ibv_alloc_pd");
    require(ibv_query_port(lab->context, PORT_NUM, &lab->port) == 0, "ibv_query_port");
    make_memory(lab);
    make_queues(lab);
    srand((unsigned)getpid());
    lab->local = (struct endpoint){
        .addr = (uintptr_t)lab->buffer,
        .rkey = lab->mr->rkey,
        .qpn = lab->qp->qp_num,
        .psn = (uint32_t)rand() & 0xffffff,
        .lid = lab->port.lid,
    };
    require(ibv_query_gid(lab->context, PORT_NUM, lab->gid_index, &lab->local.gid) == 0, "ibv_query_gid");
}

void lab_close(struct lab *lab)
{
    close(lab->sock);
    ibv_destroy_qp(lab->qp);
    ibv_ack_cq_events(lab->cq, lab->unacked);
    ibv_destroy_cq(lab->cq);
    ibv_destroy_comp_channel(lab->channel);
    ibv_dereg_mr(lab->mr);
    ibv_dealloc_pd(lab->pd);
    ibv_close_device(lab->context);
    free(lab->buffer);
}

/* --- connecting ------------------------------------------------------------------------------------------ */

static void connect_qp(struct lab *lab)
{
    struct ibv_qp_attr attr = {
        .qp_state = IBV_QPS_INIT,
        .port_num = PORT_NUM,
        .qp_access_flags = IBV_ACCESS_REMOTE_READ | IBV_ACCESS_REMOTE_WRITE,
    };
    int mask = IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS;

    require(ibv_modify_qp(lab->qp, &attr, mask) == 0, "to INIT");
    attr = (struct ibv_qp_attr){
        .qp_state = IBV_QPS_RTR,
        .path_mtu = lab->port.active_mtu,
        .dest_qp_num = lab->remote.qpn,
        .rq_psn = lab->remote.psn,
        .max_dest_rd_atomic = 1,
        .min_rnr_timer = 12,
        .ah_attr = {.is_global = 1,
                    .port_num = PORT_NUM,
                    .dlid = (uint16_t)lab->remote.lid,
                    .grh = {.dgid = lab->remote.gid, .sgid_index = (uint8_t)lab->gid_index, .hop_limit = 64}},
    };
    mask = IBV_QP_STATE | IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN |
           IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER;
    require(ibv_modify_qp(lab->qp, &attr, mask) == 0, "to RTR");
    attr = (struct ibv_qp_attr){
        .qp_state = IBV_QPS_RTS,
        .sq_psn = lab->local.psn,
        .timeout = 16,
        .retry_cnt = 6,
        .rnr_retry = 6,
        .max_rd_atomic = 1,
    };
    mask = IBV_QP_STATE | IBV_QP_SQ_PSN | IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY |
           IBV_QP_MAX_QP_RD_ATOMIC;
    require(ibv_modify_qp(lab->qp, &attr, mask) == 0, "to RTS");
}

static int accept_one(void)
{
    int listener = socket(AF_INET, SOCK_STREAM, 0), sock;

    require(listener >= 0, "socket");
    bind_any_port(listener, "0.0.0.0");
    require(listen(listener, 1) == 0, "listen");
    tell_port(listener);
    require((sock = accept(listener, NULL, NULL)) >= 0, "accept");
    close(listener);
    return sock;
}

static int connect_to(const char *host, const char *port)
{
    struct sockaddr_in address = address_of(host, port);
    int sock = socket(AF_INET, SOCK_STREAM, 0);

    require(connect(sock, (struct sockaddr *)&address, sizeof(address)) == 0, "connect");
    return sock;
}

static void exchange(int sock, const void *out, void *in, size_t length)
{
    require(write(sock, out, length) == (ssize_t)length, "write to peer");
    require(recv(sock, in, length, MSG_WAITALL) == (ssize_t)length, "read from peer");
}

void lab_connect(struct lab *lab, const char *host, const char *port)
{
    int on = 1;

    lab->sock = host ? connect_to(host, port) : accept_one();
    setsockopt(lab->sock, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
    exchange(lab->sock, &lab->local, &lab->remote, sizeof(lab->local));
    connect_qp(lab);
}

void lab_barrier(const struct lab *lab)
{
    char token = 0;

    exchange(lab->sock, &token, &token, 1);
}

/* --- events ------------------------------------------------------------------------------------------------ */

void lab_arm(struct lab *lab)
{
    require(ibv_req_notify_cq(lab->cq, 0) == 0, "ibv_req_notify_cq");
}

void lab_sleep(struct lab *lab)
{
    struct ibv_cq *cq;
    void *cookie;

    require(ibv_get_cq_event(lab->channel, &cq, &cookie) == 0, "ibv_get_cq_event");
    if (++lab->unacked == 64) {
        ibv_ack_cq_events(lab->cq, lab->unacked);
        lab->unacked = 0;
    }
    lab_arm(lab);
}
