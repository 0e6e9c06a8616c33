/* Protection domains, regions, windows: who may register what, and what a key then lets the peer do. */
#include "verbs_objects.h"

#include <linux/capability.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/syscall.h>

/* --- memory -------------------------------------------------------------------------------------------------- */

/* Registers and forgets. Returns errno, or 0. */
static int try_mr(struct ibv_pd *pd, void *addr, size_t length, int access)
{
    struct ibv_mr *mr = ibv_reg_mr(pd, addr, length, access);

    if (!mr)
        return errno;
    CHECK(mr->lkey == mr->rkey && mr->addr == addr && mr->length == length && mr->pd == pd);
    CHECK(!ibv_dereg_mr(mr));
    return 0;
}

static void region_rights(struct ibv_pd *pd)
{
    CHECK(!try_mr(pd, memory, 100, 0) && !try_mr(pd, memory, 100, ALL_RIGHTS));
    CHECK(!try_mr(pd, memory, 100, IBV_ACCESS_REMOTE_READ));
    CHECK(!try_mr(pd, memory, 100, IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_RELAXED_ORDERING));
    CHECK(try_mr(pd, memory, 100, IBV_ACCESS_REMOTE_WRITE) == EINVAL);
    CHECK(try_mr(pd, memory, 100, IBV_ACCESS_REMOTE_ATOMIC) == EINVAL);
    CHECK(try_mr(pd, memory, 100, IBV_ACCESS_LOCAL_WRITE | 1 << 15) == EINVAL);
    CHECK(try_mr(pd, memory, 100, IBV_ACCESS_ON_DEMAND) == EOPNOTSUPP);
}

static void region_ranges(struct ibv_pd *pd)
{
    uint8_t *hole = mmap(NULL, 3 * PAGE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    REQUIRE(hole != MAP_FAILED);
    REQUIRE(!munmap(hole + PAGE, PAGE));
    CHECK(!try_mr(pd, hole, PAGE, 0));
    CHECK(try_mr(pd, hole, PAGE, IBV_ACCESS_LOCAL_WRITE) == EFAULT); /* mapped to be read */
    CHECK(try_mr(pd, hole + PAGE - 1, 2, 0) == EFAULT);
    CHECK(try_mr(pd, hole + PAGE, 1, 0) == EFAULT);
    CHECK(try_mr(pd, hole, 3 * PAGE, 0) == EFAULT);
    CHECK(try_mr(pd, NULL, PAGE, 0) == EFAULT);
    CHECK(try_mr(pd, memory, 0, 0) == EINVAL);
    CHECK(try_mr(pd, memory, SIZE_MAX, 0) == EINVAL);
    CHECK(try_mr(pd, (void *)(UINTPTR_MAX - 10), 100, 0) == EINVAL);
    CHECK(!ibv_reg_mr_iova(pd, memory, 100, UINT64_MAX - 50, 0) && errno == EINVAL);
    munmap(hole, PAGE);
    munmap(hole + 2 * PAGE, PAGE);
}

/* Memory of which the kernel is asked whether it is there, in three mappings of which the one in the middle changes. */
static void large_ranges(struct ibv_pd *pd)
{
    const size_t size = 1 << 20, third = size / 4 + PAGE;
    uint8_t *area = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    unsigned char resident[(1 << 20) / PAGE];

    REQUIRE(area != MAP_FAILED);
    memset(area, 1, size / 2); /* the rest is made present */
    CHECK(!try_mr(pd, area, size, IBV_ACCESS_LOCAL_WRITE));
    REQUIRE(!mincore(area, size, resident));
    CHECK(resident[0] & 1 && resident[size / PAGE - 1] & 1);
    CHECK(!try_mr(pd, area + 1, size - 2, IBV_ACCESS_LOCAL_WRITE));
    REQUIRE(!mprotect(area + third, PAGE, PROT_READ));
    CHECK(!try_mr(pd, area, size, 0));
    CHECK(try_mr(pd, area, size, IBV_ACCESS_LOCAL_WRITE) == EFAULT);
    REQUIRE(!mprotect(area + third, PAGE, PROT_NONE));
    CHECK(try_mr(pd, area, size, 0) == EFAULT);
    REQUIRE(!munmap(area + third, PAGE));
    CHECK(try_mr(pd, area, size, 0) == EFAULT);
    CHECK(try_mr(pd, area, size, IBV_ACCESS_LOCAL_WRITE) == EFAULT);
    CHECK(!try_mr(pd, area, third, IBV_ACCESS_LOCAL_WRITE));
    munmap(area, size);
}

static int by_number(const void *a, const void *b)
{
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;

    return (x > y) - (x < y);
}

/* Keys differ, and do not follow one another. */
static void region_keys(struct ibv_pd *pd)
{
    enum { COUNT = 1000 };
    static struct ibv_mr *mrs[COUNT];
    static uint32_t keys[COUNT];
    int neighbours = 0, same_tag = 0;

    for (int i = 0; i < COUNT; i++) {
        mrs[i] = ibv_reg_mr(pd, memory, 8, 0);
        REQUIRE(mrs[i]);
        keys[i] = mrs[i]->rkey;
        same_tag += i && (keys[i] & 0xff) == (keys[0] & 0xff);
        neighbours += i && keys[i] >> 8 == (keys[i - 1] >> 8) + 1;
    }
    CHECK(neighbours < 5 && same_tag < COUNT / 10);
    qsort(keys, COUNT, sizeof(keys[0]), by_number);
    for (int i = 1; i < COUNT; i++)
        CHECK(keys[i] >> 8 != keys[i - 1] >> 8);
    for (int i = 0; i < COUNT; i++)
        CHECK(!ibv_dereg_mr(mrs[i]));
}

static void regions(void)
{
    struct ibv_context *context = open_device();
    struct ibv_pd *pd = ibv_alloc_pd(context);
    struct ibv_mr *mr;

    region_rights(pd);
    region_ranges(pd);
    large_ranges(pd);
    region_keys(pd);
    mr = ibv_reg_mr(pd, memory, 8, 0);
    CHECK(ibv_dealloc_pd(pd) == EBUSY);
    CHECK(!ibv_dereg_mr(mr) && !ibv_dealloc_pd(pd) && !ibv_close_device(context));
}

/* What a key lets the peer do, and where. A refusal kills the connection. */
static void check_write(struct bench *bench, uint64_t addr, uint32_t rkey, enum ibv_wc_status status)
{
    CHECK(write_to(bench, addr, rkey) == status);
    if (status != IBV_WC_SUCCESS)
        reconnect(bench);
}

static void remote_rights(void)
{
    struct bench bench;
    struct ibv_pd *other_pd;
    struct ibv_mr *narrow, *mapped, *foreign, *zero;
    uint64_t start = (uintptr_t)memory + PAGE;

    open_bench(&bench, NULL);
    other_pd = ibv_alloc_pd(bench.context);
    narrow = ibv_reg_mr(bench.pd, memory + PAGE, 16, IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE);
    mapped = ibv_reg_mr_iova(bench.pd, memory + PAGE, 16, 0x1000, ALL_RIGHTS);
    zero = ibv_reg_mr(bench.pd, memory + PAGE, 16, ALL_RIGHTS | IBV_ACCESS_ZERO_BASED);
    foreign = ibv_reg_mr(other_pd, memory + PAGE, 16, ALL_RIGHTS);
    REQUIRE(narrow && mapped && foreign && zero);
    memset(memory, 'x', 8);
    check_write(&bench, start + 8, narrow->rkey, IBV_WC_SUCCESS);
    CHECK(memory[PAGE + 8] == 'x' && memory[PAGE + 15] == 'x' && !memory[PAGE + 7] && !memory[PAGE + 16]);
    check_write(&bench, start + 9, narrow->rkey, IBV_WC_REM_ACCESS_ERR);
    check_write(&bench, start - 1, narrow->rkey, IBV_WC_REM_ACCESS_ERR);
    check_write(&bench, UINT64_MAX - 3, narrow->rkey, IBV_WC_REM_ACCESS_ERR);
    check_write(&bench, start, narrow->rkey ^ 1, IBV_WC_REM_ACCESS_ERR);   /* the tag */
    check_write(&bench, start, narrow->rkey ^ 256, IBV_WC_REM_ACCESS_ERR); /* the number */
    check_write(&bench, start, foreign->rkey, IBV_WC_REM_ACCESS_ERR);
    check_write(&bench, start, mapped->rkey, IBV_WC_REM_ACCESS_ERR);
    check_write(&bench, 0x1000, mapped->rkey, IBV_WC_SUCCESS);
    check_write(&bench, 8, zero->rkey, IBV_WC_SUCCESS);
    CHECK(!ibv_rereg_mr(narrow, IBV_REREG_MR_CHANGE_ACCESS, NULL, NULL, 0, IBV_ACCESS_REMOTE_READ));
    check_write(&bench, start, narrow->rkey, IBV_WC_REM_ACCESS_ERR);
    CHECK(!ibv_rereg_mr(narrow, IBV_REREG_MR_CHANGE_TRANSLATION | IBV_REREG_MR_CHANGE_ACCESS, NULL,
                        memory + 2 * PAGE, 8, ALL_RIGHTS));
    check_write(&bench, start, narrow->rkey, IBV_WC_REM_ACCESS_ERR);
    check_write(&bench, start + PAGE, narrow->rkey, IBV_WC_SUCCESS);
    CHECK(ibv_rereg_mr(narrow, 0, NULL, NULL, 0, 0) == IBV_REREG_MR_ERR_INPUT);
    CHECK(!ibv_dereg_mr(narrow) && !ibv_dereg_mr(mapped) && !ibv_dereg_mr(foreign) && !ibv_dereg_mr(zero));
    CHECK(!ibv_dealloc_pd(other_pd));
    close_bench(&bench);
}

/* --- RLIMIT_MEMLOCK ------------------------------------------------------------------------------------------ */

static bool drop_lock_capability(void)
{
    struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
    struct __user_cap_data_struct data[_LINUX_CAPABILITY_U32S_3];

    if (syscall(SYS_capget, &header, data))
        return false;
    data[CAP_TO_INDEX(CAP_IPC_LOCK)].effective &= ~CAP_TO_MASK(CAP_IPC_LOCK);
    return !syscall(SYS_capset, &header, data);
}

/* In a process of its own, which gives up what it cannot get back. */
static void memlock_in_child(void)
{
    struct rlimit limit = {.rlim_cur = 3 * PAGE, .rlim_max = 3 * PAGE};
    struct ibv_context *context;
    struct ibv_pd *pd;
    struct ibv_mr *one, *two;

    REQUIRE(!setrlimit(RLIMIT_MEMLOCK, &limit) && drop_lock_capability());
    REQUIRE(!usroce_set_option("memlock", "1"));
    context = open_device();
    pd = ibv_alloc_pd(context);
    one = ibv_reg_mr(pd, memory + PAGE - 1, 2, 0); /* two pages */
    REQUIRE(one);
    CHECK(!ibv_reg_mr(pd, memory, PAGE + 1, 0) && errno == ENOMEM);
    two = ibv_reg_mr(pd, memory, PAGE, 0);
    CHECK(two);
    CHECK(!ibv_reg_mr(pd, memory, 1, 0) && errno == ENOMEM);
    CHECK(!ibv_dereg_mr(one));
    CHECK(!try_mr(pd, memory, 2 * PAGE, 0));
    CHECK(!ibv_dereg_mr(two) && !ibv_dealloc_pd(pd) && !ibv_close_device(context));
    CHECK(!usroce_set_option("memlock", NULL));
}

static void memlock(void)
{
    char text[8192];

    CHECK(in_child(memlock_in_child, text, sizeof(text)) || !fputs(text, stderr));
}

/* --- windows ------------------------------------------------------------------------------------------------- */

static struct ibv_send_wr bind_wr(struct bench *bench, struct ibv_mw *mw, uint32_t rkey, int rights)
{
    struct ibv_send_wr wr = {.opcode = IBV_WR_BIND_MW};

    wr.bind_mw.mw = mw;
    wr.bind_mw.rkey = rkey;
    wr.bind_mw.bind_info.mr = bench->mr;
    wr.bind_mw.bind_info.addr = (uintptr_t)memory + PAGE;
    wr.bind_mw.bind_info.length = 16;
    wr.bind_mw.bind_info.mw_access_flags = (unsigned int)rights;
    return wr;
}

/* Queue pair `b` binds: it is the one that is written to. */
static enum ibv_wc_status bind_at_peer(struct bench *bench, struct ibv_send_wr *wr)
{
    enum ibv_wc_status status;

    REQUIRE(!post(bench->b, wr));
    status = next_completion(bench->peer_cq).status;
    if (status != IBV_WC_SUCCESS)
        reconnect(bench);
    return status;
}

/* A refused bind is an error of the queue pair, which loses its windows of type 2 with that, not this one's
 * subject. */
static void refuse_bind(struct bench *bench, int line, struct ibv_send_wr wr)
{
    check_at(line, bind_at_peer(bench, &wr) == IBV_WC_MW_BIND_ERR, "the bind is refused");
}

static void bind_rules(struct bench *bench, struct ibv_mw *mw)
{
    struct ibv_mr *mr = bench->mr;
    struct ibv_send_wr wr = bind_wr(bench, mw, ibv_inc_rkey(mw->rkey), IBV_ACCESS_REMOTE_WRITE);
    struct ibv_send_wr other = wr;

    other.bind_mw.rkey = mw->rkey ^ 256; /* another number */
    refuse_bind(bench, __LINE__, other);
    other = wr;
    other.bind_mw.bind_info.length = 0;
    refuse_bind(bench, __LINE__, other);
    other = wr;
    other.bind_mw.bind_info.addr = (uintptr_t)mr->addr + mr->length - 8;
    refuse_bind(bench, __LINE__, other);
    other = wr;
    other.bind_mw.bind_info.mw_access_flags = IBV_ACCESS_LOCAL_WRITE;
    refuse_bind(bench, __LINE__, other);
    CHECK(!ibv_rereg_mr(mr, IBV_REREG_MR_CHANGE_ACCESS, NULL, NULL, 0, ALL_RIGHTS & ~IBV_ACCESS_MW_BIND));
    refuse_bind(bench, __LINE__, wr);
    CHECK(!ibv_rereg_mr(mr, IBV_REREG_MR_CHANGE_ACCESS, NULL, NULL, 0,
                        IBV_ACCESS_MW_BIND | IBV_ACCESS_REMOTE_READ));
    refuse_bind(bench, __LINE__, wr); /* what the owner may not write */
    CHECK(!ibv_rereg_mr(mr, IBV_REREG_MR_CHANGE_ACCESS, NULL, NULL, 0, ALL_RIGHTS));
}

static void windows_of_type_2(void)
{
    struct bench bench;
    struct ibv_send_wr wr, invalidate = {.opcode = IBV_WR_LOCAL_INV};
    uint64_t start = (uintptr_t)memory + PAGE;
    struct ibv_mw *mw;
    uint32_t rkey;

    open_bench(&bench, NULL);
    mw = ibv_alloc_mw(bench.pd, IBV_MW_TYPE_2);
    REQUIRE(mw && mw->pd == bench.pd && mw->type == IBV_MW_TYPE_2);
    bind_rules(&bench, mw);
    check_write(&bench, start, mw->rkey, IBV_WC_REM_ACCESS_ERR); /* not bound */
    rkey = ibv_inc_rkey(mw->rkey);
    wr = bind_wr(&bench, mw, rkey, IBV_ACCESS_REMOTE_WRITE);
    CHECK(bind_at_peer(&bench, &wr) == IBV_WC_SUCCESS);
    CHECK(ibv_dereg_mr(bench.mr) == EBUSY);
    CHECK(ibv_rereg_mr(bench.mr, IBV_REREG_MR_CHANGE_ACCESS, NULL, NULL, 0, 0) == IBV_REREG_MR_ERR_INPUT);
    CHECK(write_to(&bench, start + 8, rkey) == IBV_WC_SUCCESS);
    invalidate.invalidate_rkey = rkey;
    CHECK(bind_at_peer(&bench, &invalidate) == IBV_WC_SUCCESS);
    CHECK(write_to(&bench, start, rkey) == IBV_WC_REM_ACCESS_ERR);
    reconnect(&bench);
    /* It is free again, for another binding; one at a time. */
    wr.bind_mw.rkey = rkey = ibv_inc_rkey(rkey);
    CHECK(bind_at_peer(&bench, &wr) == IBV_WC_SUCCESS);
    CHECK(write_to(&bench, start + 9, rkey) == IBV_WC_REM_ACCESS_ERR); /* beyond it */
    reconnect(&bench);
    CHECK(!ibv_dealloc_mw(mw));
    close_bench(&bench);
}

/* A key that another queue pair bound is nothing here. */
static void windows_belong_to_a_queue_pair(void)
{
    struct bench bench;
    struct ibv_send_wr wr, again;
    struct ibv_mw *mw;
    uint32_t rkey;

    open_bench(&bench, NULL);
    mw = ibv_alloc_mw(bench.pd, IBV_MW_TYPE_2);
    rkey = ibv_inc_rkey(mw->rkey);
    wr = bind_wr(&bench, mw, rkey, IBV_ACCESS_REMOTE_WRITE);
    CHECK(run(&bench, &wr) == IBV_WC_SUCCESS); /* by `a`, but `b` is written to */
    again = wr;
    again.bind_mw.rkey = ibv_inc_rkey(rkey);
    CHECK(bind_at_peer(&bench, &again) == IBV_WC_MW_BIND_ERR); /* it is bound */
    CHECK(write_to(&bench, (uintptr_t)memory + PAGE, rkey) == IBV_WC_REM_ACCESS_ERR);
    reconnect(&bench);
    CHECK(!ibv_dealloc_mw(mw)); /* bound or not */
    close_bench(&bench);
}

static void window_goes_with_its_queue_pair(void)
{
    struct bench bench;
    struct ibv_send_wr wr;
    struct ibv_mw *mw;

    open_bench(&bench, NULL);
    mw = ibv_alloc_mw(bench.pd, IBV_MW_TYPE_2);
    wr = bind_wr(&bench, mw, ibv_inc_rkey(mw->rkey), IBV_ACCESS_REMOTE_WRITE);
    CHECK(run(&bench, &wr) == IBV_WC_SUCCESS);
    CHECK(ibv_dereg_mr(bench.mr) == EBUSY);
    ack_everything(bench.context);
    CHECK(!ibv_destroy_qp(bench.a));
    CHECK(!ibv_dereg_mr(bench.mr));
    bench.mr = ibv_reg_mr(bench.pd, memory, sizeof(memory), ALL_RIGHTS);
    bench.a = create_qp(&bench, bench.cq, NULL, IBV_QPT_RC);
    CHECK(!ibv_dealloc_mw(mw));
    close_bench(&bench);
}

static void windows_of_type_1(void)
{
    struct bench bench;
    struct ibv_mw *mw;
    struct ibv_mw_bind bind = {
        .wr_id = 5,
        .send_flags = IBV_SEND_SIGNALED,
        .bind_info = {.addr = (uintptr_t)memory + PAGE, .length = 16, .mw_access_flags = IBV_ACCESS_REMOTE_WRITE},
    };
    struct ibv_wc wc;
    uint32_t old;

    open_bench(&bench, NULL);
    mw = ibv_alloc_mw(bench.pd, IBV_MW_TYPE_1);
    bind.bind_info.mr = bench.mr;
    for (int i = 0; i < 3; i++) { /* anew, over what it had */
        old = mw->rkey;
        CHECK(!ibv_bind_mw(bench.b, mw, &bind));
        wc = next_completion(bench.peer_cq);
        CHECK(wc.status == IBV_WC_SUCCESS && wc.wr_id == 5 && wc.opcode == IBV_WC_BIND_MW);
        CHECK(mw->rkey != old && mw->rkey >> 8 == old >> 8);
        CHECK(write_to(&bench, (uintptr_t)memory + PAGE + 8, mw->rkey) == IBV_WC_SUCCESS);
    }
    check_write(&bench, (uintptr_t)memory + PAGE, old, IBV_WC_REM_ACCESS_ERR);
    memset(&bind.bind_info, 0, sizeof(bind.bind_info)); /* to nothing */
    CHECK(!ibv_bind_mw(bench.b, mw, &bind) && next_completion(bench.peer_cq).status == IBV_WC_SUCCESS);
    check_write(&bench, (uintptr_t)memory + PAGE, mw->rkey, IBV_WC_REM_ACCESS_ERR);
    CHECK(ibv_dealloc_pd(bench.pd) == EBUSY);
    CHECK(!ibv_dealloc_mw(mw));
    close_bench(&bench);
}

int main(void)
{
    regions();
    memlock();
    remote_rights();
    windows_of_type_2();
    windows_belong_to_a_queue_pair();
    window_goes_with_its_queue_pair();
    windows_of_type_1();
    if (failures)
        fprintf(stderr, "%d failures\n", failures);
    return failures ? 1 : 0;
}
