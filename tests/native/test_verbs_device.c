/* The device: the list, open and close, attributes, settings, what becomes of it in a child; address handles,
 * names. */
#include "verbs_objects.h"

/* --- the device ---------------------------------------------------------------------------------------------- */

static void device_list(void)
{
    int count = -1;
    struct ibv_device **list = ibv_get_device_list(&count);

    REQUIRE(list && count == 1 && list[0] && !list[1]);
    CHECK(!strcmp(ibv_get_device_name(list[0]), "usroce0"));
    CHECK(list[0]->node_type == IBV_NODE_CA && list[0]->transport_type == IBV_TRANSPORT_IB);
    CHECK(ibv_get_device_guid(list[0]) != 0);
    CHECK(ibv_get_device_guid(list[0]) == ibv_get_device_guid(list[0]));
    CHECK(ibv_get_device_index(list[0]) == -1);
    ibv_free_device_list(list);
}

static void attributes(struct ibv_context *context)
{
    struct ibv_device_attr attr;
    struct ibv_device_attr_ex more;
    struct ibv_port_attr port;

    CHECK(!ibv_query_device(context, &attr));
    CHECK(attr.node_guid == ibv_get_device_guid(context->device) && attr.phys_port_cnt == 1);
    CHECK(attr.device_cap_flags & IBV_DEVICE_MEM_WINDOW_TYPE_2B);
    CHECK(!ibv_query_device_ex(context, NULL, &more));
    CHECK(!memcmp(&more.orig_attr, &attr, sizeof(attr)) && more.completion_timestamp_mask);
    CHECK(!ibv_query_port(context, 1, &port));
    CHECK(port.state == IBV_PORT_ACTIVE && port.link_layer == IBV_LINK_LAYER_ETHERNET && port.lid);
    CHECK(port.active_mtu == IBV_MTU_4096); /* the loopback interface's packets are larger */
    CHECK(ibv_query_port(context, 2, &port) == EINVAL);
}

static void gids(struct ibv_context *context)
{
    struct ibv_gid_entry entry, table[32];
    struct ibv_port_attr port;
    union ibv_gid gid;
    __be16 pkey;
    ssize_t count = ibv_query_gid_table(context, table, 32, 0);

    CHECK(!ibv_query_port(context, 1, &port) && count == port.gid_tbl_len);
    CHECK(ibv_query_gid_table(context, table, 0, 0) == -EINVAL);
    for (int i = 0; i < count; i++) {
        CHECK(!ibv_query_gid(context, 1, i, &gid));
        CHECK(!ibv_query_gid_ex(context, 1, (uint32_t)i, &entry, 0));
        CHECK(!memcmp(&entry, &table[i], sizeof(entry)) && !memcmp(&gid, &entry.gid, sizeof(gid)));
        CHECK(entry.gid_type == IBV_GID_TYPE_ROCE_V2 && entry.ndev_ifindex);
    }
    CHECK(!memcmp(table[0].gid.raw + 10, "\xff\xff\x7f\0\0\1", 6));
    CHECK(ibv_query_gid(context, 1, (int)count, &gid) == -1 && ibv_query_gid(context, 1, -1, &gid) == -1);
    CHECK(ibv_query_gid_ex(context, 1, (uint32_t)count, &entry, 0) == EINVAL);
    CHECK(!ibv_query_pkey(context, 1, 0, &pkey) && pkey == 0xffff && !ibv_get_pkey_index(context, 1, pkey));
    CHECK(ibv_query_pkey(context, 1, 1, &pkey) == -1 && ibv_get_pkey_index(context, 1, 1) == -1);
}

/* Two at a time: one of them has another port than 4791, and both say which. */
static void open_twice(void)
{
    struct ibv_context *one = open_device(), *two = open_device();
    struct ibv_port_attr port_one, port_two;

    attributes(one);
    gids(one);
    CHECK(!ibv_query_port(one, 1, &port_one) && !ibv_query_port(two, 1, &port_two));
    CHECK(port_one.lid != port_two.lid);
    CHECK(!ibv_close_device(one));
    attributes(two);
    CHECK(!ibv_close_device(two));
}

static struct ibv_context *left_behind; /* it stays in memory, on purpose: a leak checker finds it here */

/* What the application forgot is dead then, and can still be destroyed. */
static void close_with_objects(void)
{
    struct bench bench;
    struct ibv_wc wc;

    open_bench(&bench, ibv_create_comp_channel);
    left_behind = bench.context;
    post_receive(&bench, bench.a);
    CHECK(!ibv_close_device(bench.context));
    CHECK(ibv_poll_cq(bench.cq, 1, &wc) == 1 && wc.status == IBV_WC_WR_FLUSH_ERR);
    CHECK(ibv_poll_cq(bench.cq, 1, &wc) == 0 && !ibv_req_notify_cq(bench.cq, 0));
    destroy_bench(&bench);
}

/* --- settings ------------------------------------------------------------------------------------------------ */

/* How opening fails with an option; 0: it does not. What is printed about it is not for this test's output. */
static int open_with(const char *name, const char *value)
{
    struct ibv_device **list = ibv_get_device_list(NULL);
    struct ibv_context *context;
    int quiet = open("/dev/null", O_WRONLY | O_CLOEXEC), keep = dup(2), error;

    REQUIRE(list && quiet >= 0 && keep >= 0);
    REQUIRE(!usroce_set_option(name, value));
    dup2(quiet, 2);
    context = ibv_open_device(list[0]);
    error = context ? 0 : errno;
    dup2(keep, 2);
    close(quiet);
    close(keep);
    if (context)
        CHECK(!ibv_close_device(context));
    CHECK(!usroce_set_option(name, NULL));
    ibv_free_device_list(list);
    return error;
}

static void options(void)
{
    CHECK(usroce_set_option("colour", "1") == ENOENT && usroce_set_option(NULL, "1") == ENOENT);
    CHECK(usroce_set_option("address", "localhost") == EINVAL);
    CHECK(usroce_set_option("address", "127.0.0.1,,::1") == EINVAL);
    CHECK(usroce_set_option("address", "127.0.0.1,127.0.0.1") == EINVAL);
    CHECK(usroce_set_option("fault", "drop=1.5") == EINVAL && usroce_set_option("fault", "drop") == EINVAL);
    CHECK(usroce_set_option("fault", "drop=nan") == EINVAL && usroce_set_option("fault", "fall=1") == EINVAL);
    CHECK(usroce_set_option("fault", "delay_us=-1") == EINVAL);
    CHECK(usroce_set_option("socket_buffer", "0") == EINVAL && usroce_set_option("gso", "2") == EINVAL);
    CHECK(open_with("address", "192.0.2.1") == EADDRNOTAVAIL); /* RFC 5737: nobody's */
    CHECK(open_with("address", "127.0.0.1, 127.0.0.2") == 0);
    CHECK(open_with("fault", "drop=0.1,reorder=0.5,delay_us=10,seed=3") == 0);
    CHECK(open_with("pcap", "/nowhere/at/all") == ENOENT);
    CHECK(open_with("gso", "0") == 0 && open_with("socket_buffer", "1") == 0);
}

static void environment(void)
{
    struct ibv_device **list;
    int quiet = open("/dev/null", O_WRONLY | O_CLOEXEC), keep = dup(2);

    setenv("AIORDMA_USROCE_ADDRESS", "127.0.0.1;::1", 1);
    dup2(quiet, 2);
    list = ibv_get_device_list(NULL);
    CHECK(!list && errno == EINVAL);
    dup2(keep, 2);
    close(quiet);
    close(keep);
    CHECK(!usroce_set_option("address", "127.0.0.1")); /* stronger than the environment */
    list = ibv_get_device_list(NULL);
    CHECK(list);
    ibv_free_device_list(list);
    CHECK(!usroce_set_option("address", NULL));
    setenv("AIORDMA_USROCE_ADDRESS", "", 1); /* as if it were not there */
    list = ibv_get_device_list(NULL);
    CHECK(list);
    ibv_free_device_list(list);
    unsetenv("AIORDMA_USROCE_ADDRESS");
}

static void faults_and_capture(void)
{
    char path[] = "/tmp/test_verbs_objects.XXXXXX";
    int fd = mkstemp(path);
    struct usroce_fault fault = {.drop = 0.2};
    struct usroce_counters counters;
    struct bench bench;

    REQUIRE(fd >= 0);
    open_bench(&bench, NULL);
    CHECK(!usroce_set_fault(bench.context, &fault) && !usroce_capture(bench.context, path));
    fault.corrupt = 2;
    CHECK(usroce_set_fault(bench.context, &fault) == EINVAL);
    fault.corrupt = 0;
    CHECK(!usroce_set_fault(bench.context, &fault));
    for (int i = 0; i < 20; i++)
        CHECK(write_to(&bench, (uintptr_t)memory + PAGE, bench.mr->rkey) == IBV_WC_SUCCESS);
    CHECK(!usroce_query_counters(bench.context, &counters, sizeof(counters)) && counters.faults_dropped);
    CHECK(!usroce_capture(bench.context, NULL) && !usroce_set_fault(bench.context, NULL));
    CHECK(usroce_capture(bench.context, "/nowhere/at/all") == ENOENT);
    CHECK(lseek(fd, 0, SEEK_END) > 20 * 40);
    CHECK(write_to(&bench, (uintptr_t)memory + PAGE, bench.mr->rkey) == IBV_WC_SUCCESS);
    close_bench(&bench);
    close(fd);
    unlink(path);
}

/* --- children ------------------------------------------------------------------------------------------------ */

static struct bench inherited;
static struct ibv_mw *inherited_mw;

/* Every function that takes an object of the parent refuses, without touching it. */
static void use_in_child(void)
{
    struct bench *bench = &inherited;
    struct ibv_ah_attr ah = {.is_global = 1, .port_num = 1};
    struct ibv_qp_attr attr = {.qp_state = IBV_QPS_ERR};
    struct ibv_device_attr device;
    struct ibv_port_attr port;
    struct ibv_async_event event;
    struct ibv_send_wr send = {.opcode = IBV_WR_SEND}, *bad_send;
    struct ibv_recv_wr receive = {.num_sge = 0}, *bad_receive;
    struct ibv_wc wc;
    union ibv_gid gid;

    CHECK(ibv_query_device(bench->context, &device) == ENODEV);
    CHECK(ibv_query_port(bench->context, 1, &port) == ENODEV);
    CHECK(ibv_query_gid(bench->context, 1, 0, &gid) == -1 && errno == ENODEV);
    CHECK(!ibv_alloc_pd(bench->context) && errno == ENODEV);
    CHECK(!ibv_reg_mr(bench->pd, memory, 1, 0) && errno == ENODEV);
    CHECK(!ibv_alloc_mw(bench->pd, IBV_MW_TYPE_2) && errno == ENODEV);
    CHECK(!ibv_create_comp_channel(bench->context) && errno == ENODEV);
    CHECK(!ibv_create_cq(bench->context, 1, NULL, NULL, 0) && errno == ENODEV);
    CHECK(!ibv_create_ah(bench->pd, &ah) && errno == ENODEV);
    CHECK(ibv_poll_cq(bench->cq, 1, &wc) < 0 && ibv_req_notify_cq(bench->cq, 0) == ENODEV);
    CHECK(ibv_post_send(bench->a, &send, &bad_send) == ENODEV && bad_send == &send);
    CHECK(ibv_post_recv(bench->a, &receive, &bad_receive) == ENODEV && bad_receive == &receive);
    CHECK(ibv_modify_qp(bench->a, &attr, IBV_QP_STATE) == ENODEV);
    CHECK(ibv_get_async_event(bench->context, &event) == -1 && errno == ENODEV);
    CHECK(usroce_set_fault(bench->context, NULL) == ENODEV && usroce_capture(bench->context, NULL) == ENODEV);
    CHECK(ibv_dealloc_mw(inherited_mw) == ENODEV && ibv_dereg_mr(bench->mr) == ENODEV);
    CHECK(ibv_destroy_qp(bench->a) == ENODEV && ibv_destroy_cq(bench->cq) == ENODEV);
    CHECK(ibv_dealloc_pd(bench->pd) == ENODEV && ibv_close_device(bench->context) == ENODEV);
}

static void forked(void)
{
    char text[8192];

    open_bench(&inherited, NULL);
    inherited_mw = ibv_alloc_mw(inherited.pd, IBV_MW_TYPE_2);
    REQUIRE(inherited_mw);
    CHECK(in_child(use_in_child, text, sizeof(text)));
    CHECK(!strcmp(text, "usroce: the device was opened before fork() and cannot be used in the child\n"));
    if (strlen(text) > 100)
        fputs(text, stderr);
    /* The parent has lost nothing. */
    CHECK(write_to(&inherited, (uintptr_t)memory + PAGE, inherited.mr->rkey) == IBV_WC_SUCCESS);
    CHECK(!ibv_dealloc_mw(inherited_mw));
    close_bench(&inherited);
}

static __be64 parents_guid;
static uint32_t parents_key;

/* A child may open the device anew, and draws other numbers. */
static void fresh_in_child(void)
{
    struct ibv_context *context = open_device();
    struct ibv_pd *pd = ibv_alloc_pd(context);
    struct ibv_mr *mr = ibv_reg_mr(pd, memory, 8, 0);

    REQUIRE(mr);
    CHECK(ibv_get_device_guid(context->device) != parents_guid);
    CHECK(mr->rkey != parents_key);
    CHECK(!ibv_dereg_mr(mr) && !ibv_dealloc_pd(pd) && !ibv_close_device(context));
}

static void child_of_its_own(void)
{
    char text[8192];
    struct ibv_context *context = open_device();
    struct ibv_pd *pd = ibv_alloc_pd(context);
    struct ibv_mr *mr = ibv_reg_mr(pd, memory, 8, 0);

    REQUIRE(mr);
    parents_guid = ibv_get_device_guid(context->device);
    parents_key = mr->rkey;
    CHECK(!ibv_dereg_mr(mr));
    CHECK(in_child(fresh_in_child, text, sizeof(text)) || !fputs(text, stderr));
    CHECK(!ibv_dealloc_pd(pd) && !ibv_close_device(context));
}

/* --- address handles ----------------------------------------------------------------------------------------- */

static void to_rts_ud(struct ibv_qp *qp)
{
    struct ibv_qp_attr attr = {.qp_state = IBV_QPS_INIT, .port_num = 1, .qkey = 0x11};

    REQUIRE(!ibv_modify_qp(qp, &attr, IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_QKEY));
    attr.qp_state = IBV_QPS_RTR;
    REQUIRE(!ibv_modify_qp(qp, &attr, IBV_QP_STATE));
    attr.qp_state = IBV_QPS_RTS;
    REQUIRE(!ibv_modify_qp(qp, &attr, IBV_QP_STATE | IBV_QP_SQ_PSN));
}

static void send_datagram(struct bench *bench, struct ibv_qp *from, const struct ibv_qp *to, struct ibv_ah *ah)
{
    struct ibv_sge sge = {.addr = (uintptr_t)memory, .length = 8, .lkey = bench->mr->lkey};
    struct ibv_send_wr wr = {.opcode = IBV_WR_SEND, .sg_list = &sge, .num_sge = 1};

    wr.wr.ud.ah = ah;
    wr.wr.ud.remote_qpn = to->qp_num;
    wr.wr.ud.remote_qkey = 0x11;
    REQUIRE(!post(from, &wr));
    CHECK(next_completion(from->send_cq).status == IBV_WC_SUCCESS);
}

/* A datagram to oneself by GID `index`, and from its completion the way back. */
static void there_and_back(struct bench *bench, int index, uint16_t lid)
{
    struct ibv_qp *a = create_qp(bench, bench->cq, NULL, IBV_QPT_UD);
    struct ibv_qp *b = create_qp(bench, bench->peer_cq, NULL, IBV_QPT_UD);
    struct ibv_ah_attr attr = {.dlid = lid, .is_global = 1, .port_num = 1}, back;
    struct ibv_grh *grh = (struct ibv_grh *)(void *)(memory + PAGE);
    struct ibv_ah *ah, *ah_back;
    struct ibv_wc wc;

    to_rts_ud(a);
    to_rts_ud(b);
    CHECK(!ibv_query_gid(bench->context, 1, index, &attr.grh.dgid));
    attr.grh.sgid_index = (uint8_t)index;
    ah = ibv_create_ah(bench->pd, &attr);
    REQUIRE(ah);
    post_receive(bench, b);
    send_datagram(bench, a, b, ah);
    wc = next_completion(bench->peer_cq);
    CHECK(wc.status == IBV_WC_SUCCESS && wc.wc_flags & IBV_WC_GRH && wc.src_qp == a->qp_num && wc.byte_len == 48);
    CHECK(!ibv_init_ah_from_wc(bench->context, 1, &wc, grh, &back));
    CHECK(!memcmp(&back.grh.dgid, &attr.grh.dgid, sizeof(back.grh.dgid)) && back.dlid == lid);
    CHECK(back.is_global && back.grh.sgid_index == index);
    ah_back = ibv_create_ah_from_wc(bench->pd, &wc, grh, 1);
    REQUIRE(ah_back);
    post_receive(bench, a);
    send_datagram(bench, b, a, ah_back);
    CHECK(next_completion(bench->cq).src_qp == b->qp_num);
    wc.wc_flags = 0;
    CHECK(ibv_init_ah_from_wc(bench->context, 1, &wc, grh, &back) == -1);
    CHECK(ibv_dealloc_pd(bench->pd) == EBUSY);
    CHECK(!ibv_destroy_ah(ah) && !ibv_destroy_ah(ah_back) && !ibv_destroy_qp(a) && !ibv_destroy_qp(b));
}

static void address_handles(void)
{
    struct bench bench;
    struct ibv_ah_attr attr = {.is_global = 1, .port_num = 1}, wrong;
    struct ibv_port_attr port;
    uint8_t mac[ETHERNET_LL_SIZE];
    uint16_t vid;

    open_bench(&bench, NULL);
    CHECK(!ibv_query_port(bench.context, 1, &port) && !ibv_query_gid(bench.context, 1, 0, &attr.grh.dgid));
    for (int i = 0; i < port.gid_tbl_len; i++)
        there_and_back(&bench, i, port.lid);
    wrong = attr;
    wrong.is_global = 0;
    CHECK(!ibv_create_ah(bench.pd, &wrong) && errno == EINVAL);
    wrong = attr;
    wrong.port_num = 2;
    CHECK(!ibv_create_ah(bench.pd, &wrong) && errno == EINVAL);
    wrong = attr;
    wrong.grh.sgid_index = (uint8_t)port.gid_tbl_len;
    CHECK(!ibv_create_ah(bench.pd, &wrong) && errno == EINVAL);
    wrong = attr;
    memset(&wrong.grh.dgid, 0, sizeof(wrong.grh.dgid));
    CHECK(!ibv_create_ah(bench.pd, &wrong) && errno == EINVAL);
    CHECK(!ibv_resolve_eth_l2_from_gid(bench.context, &attr, mac, &vid) && vid == 0xffff);
    close_bench(&bench);
}

/* --- names and what is absent -------------------------------------------------------------------------------- */

static void names(void)
{
    for (int i = IBV_WC_SUCCESS; i <= IBV_WC_TM_RNDV_INCOMPLETE; i++)
        CHECK(strcmp(ibv_wc_status_str((enum ibv_wc_status)i), "unknown"));
    for (int i = IBV_EVENT_CQ_ERR; i <= IBV_EVENT_WQ_FATAL; i++)
        CHECK(strcmp(ibv_event_type_str((enum ibv_event_type)i), "unknown"));
    for (int i = IBV_PORT_NOP; i <= IBV_PORT_ACTIVE_DEFER; i++)
        CHECK(strcmp(ibv_port_state_str((enum ibv_port_state)i), "unknown"));
    CHECK(!strcmp(ibv_wc_status_str((enum ibv_wc_status)-1), "unknown"));
    CHECK(!strcmp(ibv_node_type_str(IBV_NODE_UNKNOWN), "unknown"));
    CHECK(strcmp(ibv_node_type_str(IBV_NODE_CA), "unknown"));
    for (int i = IBV_RATE_2_5_GBPS; i <= IBV_RATE_1200_GBPS; i++)
        CHECK(mbps_to_ibv_rate(ibv_rate_to_mbps((enum ibv_rate)i)) == (enum ibv_rate)i);
    CHECK(ibv_rate_to_mult(IBV_RATE_5_GBPS) == 2 && mult_to_ibv_rate(48) == IBV_RATE_120_GBPS);
    CHECK(ibv_rate_to_mult(IBV_RATE_MAX) == -1 && mult_to_ibv_rate(0) == IBV_RATE_MAX);
}

static void absent(void)
{
    struct ibv_context *context = open_device();
    struct ibv_ece ece = {0};

    CHECK(!ibv_import_device(0) && errno == EOPNOTSUPP);
    CHECK(ibv_query_ece(NULL, &ece) == EOPNOTSUPP && ibv_attach_mcast(NULL, NULL, 0) == EOPNOTSUPP);
    CHECK(!ibv_fork_init() && ibv_is_fork_initialized() == IBV_FORK_UNNEEDED);
    CHECK(!ibv_alloc_td(context, NULL) && errno == EOPNOTSUPP);
    CHECK(!ibv_close_device(context));
}

int main(void)
{
    device_list();
    open_twice();
    close_with_objects();
    options();
    environment();
    faults_and_capture();
    child_of_its_own();
    forked();
    address_handles();
    names();
    absent();
    if (failures)
        fprintf(stderr, "%d failures\n", failures);
    return failures ? 1 : 0;
}
