/* The shared-memory link: how two devices find each other, who is let in, what a full ring and a sleeping peer do,
 * and peers that write garbage or are killed, at any moment. */
#define _GNU_SOURCE
#define REAL_CLOCK
#include "links.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "ring.h"

enum { NOBODY = 65534 };

static struct view views[LINK_MAX_VIEWS];

static void open_shm(struct side *side, const char *address)
{
    need(!open_side(side, address, 0, true), "a UDP link");
    side->link->counters = &side->counters;
    need(!link_shm_open(&side->link, side->link, NULL), "a shared-memory link");
}

static int take(struct side *side)
{
    return side->link->ops->receive(side->link, views, LINK_MAX_VIEWS);
}

/* Looks at everything there is, and drops it. */
static void pump(struct side *side)
{
    for (int i = 0; i < 40; i++)
        take(side);
}

static void establish(struct side *from, struct side *to)
{
    uint64_t before = from->counters.shm_peers;

    from->link->ops->prepare(from->link, &to->link->local);
    pump(to);
    pump(from);
    check(from->counters.shm_peers == before + 1, "frames go through memory");
}

/* The next `count` frames from `port`, from number `first` on, by memory. */
static void expect(uint16_t port, struct side *to, uint32_t first, uint32_t count)
{
    uint32_t next = first;

    for (int i = 0; i < 1000 && next < first + count; i++) {
        int got = take(to);

        for (int k = 0; k < got; k++, next++) {
            check(number_of(views[k].data) == next, "in order, none lost");
            check(views[k].from.port == port, "the port it came from");
            check(views[k].unsealed, "by memory");
        }
    }
    check(next == first + count, "all arrive");
}

static bool readable(const struct side *side)
{
    struct pollfd fd = {.fd = side->link->fd, .events = POLLIN};

    return poll(&fd, 1, 0) == 1;
}

static int descriptors(void)
{
    DIR *dir = opendir("/proc/self/fd");
    int count = 0;

    need(dir != NULL, "/proc");
    while (readdir(dir))
        count++;
    closedir(dir);
    return count;
}

/* --- honest peers -------------------------------------------------------------------------------------------- */

static void traffic(const char *address)
{
    struct side a, b;
    uint32_t n = 0;

    open_shm(&a, address);
    open_shm(&b, address);
    establish(&a, &b);
    for (int round = 0; round < 400; round++) { /* several times round the ring */
        for (int i = 0; i < 16; i++, n++)
            send_frame(a.link, &b.link->local, n, SMALLEST + 4 * (n * 7919 % 1000), 0);
        flush(a.link);
        expect(a.link->local.port, &b, n - 16, 16);
    }
    check(a.counters.shm_sent == n && a.counters.sent == n && !a.counters.send_calls, "no system call");
    check(b.counters.shm_received == n && b.counters.received == n, "received");
    check(a.counters.sent_bytes == b.counters.received_bytes, "bytes");
    close_side(&a);
    close_side(&b);
}

/* What goes over UDP first stays first, though rings are looked at before sockets. */
static void change_of_way(void)
{
    struct side a, b;
    uint32_t next = 0;
    int got;

    open_shm(&a, "127.0.0.1");
    open_shm(&b, "127.0.0.1");
    a.link->ops->prepare(a.link, &b.link->local);
    for (uint32_t n = 0; n < 40; n++)
        send_frame(a.link, &b.link->local, n, 64 + 4 * n, 0);
    flush(a.link);
    check(!a.counters.shm_sent, "not answered yet: UDP");
    b.link->ops->sleep(b.link); /* and wakes: it looks at its sockets */
    b.link->ops->wake(b.link);
    got = take(&b);
    pump(&a);
    send_frame(a.link, &b.link->local, 40, 64, 0);
    flush(a.link);
    check(a.counters.shm_sent == 1, "answered: memory");
    for (int i = 0; i < 100 && next < 41; i++, got = take(&b))
        for (int k = 0; k < got; k++, next++) {
            check(number_of(views[k].data) == next, "in order");
            check(views[k].unsealed == (next == 40), "the way it came");
        }
    check(next == 41, "all arrive");
    close_side(&a);
    close_side(&b);
}

static void oneself(void)
{
    struct side a;

    open_shm(&a, "::1");
    establish(&a, &a);
    send_frame(a.link, &a.link->local, 1, 100, 0);
    flush(a.link);
    expect(a.link->local.port, &a, 1, 1);
    close_side(&a);
}

static void full(void)
{
    struct side a, b;
    uint32_t n = 0;

    open_shm(&a, "127.0.0.1");
    open_shm(&b, "127.0.0.1");
    establish(&a, &b);
    check(a.link->ops->sleep(a.link), "nobody waits for room");
    a.link->ops->wake(a.link);
    for (; a.link->ops->has_room(a.link, &b.link->local, 4000); n++) {
        send_frame(a.link, &b.link->local, n, 4000, 0);
        flush(a.link);
    }
    check(n > 900 && !a.counters.send_errors, "so many fit, none is lost");
    send_frame(a.link, &b.link->local, n++, 64, 0);
    flush(a.link);
    check(!a.counters.send_errors, "there is a reserve");
    pump(&a); /* the events so far */
    check(a.link->ops->sleep(a.link), "waits for room");
    check(!readable(&a), "there is none");
    expect(a.link->local.port, &b, 0, n);
    check(readable(&a), "is woken when there is room");
    a.link->ops->wake(a.link);
    check(a.link->ops->has_room(a.link, &b.link->local, 4000), "room");
    for (n = 0; n < 1200; n++) {
        send_frame(a.link, &b.link->local, n, 4000, 0);
        flush(a.link);
    }
    check(a.counters.send_errors > 0 && a.counters.shm_peers == 1, "what does not fit is lost, and nothing else");
    close_side(&b);
    pump(&a);
    check(!a.counters.shm_peers && a.link->ops->has_room(a.link, &b.link->local, 4000), "no ring, no limit");
    close_side(&a);
}

static void sleepers(void)
{
    struct side a, b;

    open_shm(&a, "127.0.0.1");
    open_shm(&b, "127.0.0.1");
    establish(&a, &b);
    pump(&b);
    check(b.link->ops->sleep(b.link) && !readable(&b), "sleeps");
    send_frame(a.link, &b.link->local, 0, 64, 0);
    flush(a.link);
    check(readable(&b), "is woken");
    /* Somebody else takes the frame and the byte before the sleeper has seen it. */
    pump(&b);
    check(!readable(&b), "nothing is left");
    send_frame(a.link, &b.link->local, 1, 64, 0);
    flush(a.link);
    check(readable(&b), "is woken again");
    b.link->ops->wake(b.link);
    expect(a.link->local.port, &b, 1, 1);
    send_frame(a.link, &b.link->local, 2, 64, 0);
    flush(a.link);
    check(!b.link->ops->sleep(b.link), "does not sleep with a frame there");
    b.link->ops->wake(b.link);
    expect(a.link->local.port, &b, 2, 1);
    check(!readable(&b), "awake: nobody wakes it");
    /* A channel that is opened while it sleeps. */
    check(b.link->ops->sleep(b.link), "sleeps");
    establish(&b, &b);
    send_frame(b.link, &b.link->local, 3, 64, 0);
    flush(b.link);
    check(readable(&b), "is woken through a new channel");
    close_side(&a);
    close_side(&b);
}

/* What was sent before the end is received. */
static void last_words(void)
{
    struct endpoint gone;
    struct side a, b;

    open_shm(&a, "127.0.0.1");
    open_shm(&b, "127.0.0.1");
    establish(&a, &b);
    establish(&b, &a);
    gone = a.link->local;
    for (uint32_t n = 0; n < 600; n++)
        send_frame(a.link, &b.link->local, n, 512, 0);
    flush(a.link);
    b.link->ops->sleep(b.link);
    b.link->ops->wake(b.link);
    close_side(&a);
    expect(gone.port, &b, 0, 600);
    pump(&b);
    check(!b.counters.shm_peers, "the peer is gone");
    send_frame(b.link, &gone, 0, 64, 0);
    flush(b.link);
    check(b.counters.send_calls == 1, "UDP");
    check(b.link->ops->sleep(b.link), "and sleeps");
    close_side(&b);
}

struct hello {
    char magic[8];
    uint32_t ring_bytes;
    uint16_t port;
    uint16_t zero;
    uint8_t gid[16];
};

static socklen_t name_of(const struct endpoint *endpoint, struct sockaddr_un *name)
{
    int length;

    memset(name, 0, sizeof(*name));
    name->sun_family = AF_UNIX;
    length = sprintf(name->sun_path + 1, "aiordma-usroce/");
    for (int i = 0; i < 16; i++)
        length += sprintf(name->sun_path + 1 + length, "%02x", endpoint->gid.raw[i]);
    length += sprintf(name->sun_path + 1 + length, "/%u", endpoint->port);
    return (socklen_t)(offsetof(struct sockaddr_un, sun_path) + 1 + (size_t)length);
}

static int call(const struct side *side)
{
    struct sockaddr_un name;
    socklen_t size = name_of(&side->link->local, &name);
    int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);

    need(fd >= 0 && !connect(fd, (const struct sockaddr *)(const void *)&name, size), "a connection");
    return fd;
}

/* --- other users --------------------------------------------------------------------------------------------- */

/* Runs `part` in a child; what it returns. */
static int in_child(int (*part)(void *), void *arg)
{
    pid_t pid = fork();
    int status = -1;

    if (pid == 0)
        _exit(part(arg));
    need(pid > 0 && waitpid(pid, &status, 0) == pid, "a child");
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

static int call_as_nobody(void *arg)
{
    struct side side, *peer = arg;

    if (setgid(NOBODY) || setuid(NOBODY))
        return 2;
    open_shm(&side, "127.0.0.1");
    side.link->ops->prepare(side.link, &peer->link->local);
    pump(&side);
    return side.counters.shm_refused == 1 && !side.counters.shm_peers ? 0 : 1;
}

static void other_user(void)
{
    struct side a;
    char byte;
    int fd;

    if (geteuid()) {
        fprintf(stderr, "not root: another user cannot be tried\n");
        return;
    }
    open_shm(&a, "127.0.0.1");
    check(in_child(call_as_nobody, &a) == 0, "another user refuses us");
    need(!seteuid(NOBODY), "another user");
    fd = call(&a);
    need(!seteuid(0), "root again");
    pump(&a);
    check(a.counters.shm_refused == 2 && recv(fd, &byte, 1, MSG_DONTWAIT) == 0, "and is refused by us");
    close(fd);
    close_side(&a);
}

/* --- hostile peers ------------------------------------------------------------------------------------------- */

static void greet(int fd, const void *hello, size_t size, const int *passed, int count)
{
    struct iovec iov = {(void *)(uintptr_t)hello, size};
    _Alignas(struct cmsghdr) uint8_t control[CMSG_SPACE(8 * sizeof(int))] = {0};
    struct msghdr header = {.msg_iov = &iov, .msg_iovlen = 1};
    struct cmsghdr *message;

    if (count) {
        header.msg_control = control;
        header.msg_controllen = CMSG_SPACE((size_t)count * sizeof(int));
        message = CMSG_FIRSTHDR(&header);
        message->cmsg_level = SOL_SOCKET;
        message->cmsg_type = SCM_RIGHTS;
        message->cmsg_len = CMSG_LEN((size_t)count * sizeof(int));
        memcpy(CMSG_DATA(message), passed, (size_t)count * sizeof(int));
    }
    need(sendmsg(fd, &header, MSG_NOSIGNAL) == (ssize_t)size, "a greeting");
}

static struct hello right_hello(uint16_t port)
{
    struct hello hello = {.magic = "usroce2", .ring_bytes = RING_BYTES, .port = port};
    struct endpoint from = endpoint("127.0.0.1", port);

    memcpy(hello.gid, from.gid.raw, sizeof(hello.gid));
    return hello;
}

static int memory(off_t size, int seals)
{
    int fd = memfd_create("test", MFD_CLOEXEC | MFD_ALLOW_SEALING);

    need(fd >= 0 && !ftruncate(fd, size) && !fcntl(fd, F_ADD_SEALS, seals), "memory");
    return fd;
}

/* Whether the device takes what is passed. */
static bool is_taken(struct side *side, const void *hello, size_t size, const int *passed, int count)
{
    uint64_t before = side->counters.shm_refused;
    int fd = call(side);
    char byte = 2;
    bool taken;

    greet(fd, hello, size, passed, count);
    pump(side);
    check(recv(fd, &byte, 1, MSG_DONTWAIT) == 1, "an answer");
    taken = byte == 0;
    check(taken || (byte == 1 && recv(fd, &byte, 1, MSG_DONTWAIT) == 0), "a refusal, and the end");
    close(fd);
    pump(side);
    check(side->counters.shm_refused == before + !taken, "a refusal is counted");
    return taken;
}

static void bad_greetings(void)
{
    const int seals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL;
    struct hello hello = right_hello(4000), bad;
    struct side a;
    int before, good[8], unsealed, shrinks, small, plain;

    open_shm(&a, "127.0.0.1");
    before = descriptors();
    for (int i = 0; i < 8; i++)
        good[i] = memory(sizeof(struct ring_shared), seals);
    unsealed = memory(sizeof(struct ring_shared), 0);
    shrinks = memory(sizeof(struct ring_shared), F_SEAL_GROW | F_SEAL_SEAL);
    small = memory(4096, seals);
    plain = open("/proc/self/exe", O_RDONLY | O_CLOEXEC);
    check(is_taken(&a, &hello, sizeof(hello), good, 1), "a good one");
    check(!is_taken(&a, &hello, sizeof(hello), NULL, 0), "no memory");
    check(!is_taken(&a, &hello, sizeof(hello), &unsealed, 1), "memory that can shrink");
    check(!is_taken(&a, &hello, sizeof(hello), &shrinks, 1), "memory that can shrink, sealed");
    check(!is_taken(&a, &hello, sizeof(hello), &small, 1), "too little memory");
    check(!is_taken(&a, &hello, sizeof(hello), &plain, 1), "a file");
    check(!is_taken(&a, &hello, sizeof(hello) - 1, good, 1), "a short message");
    check(!is_taken(&a, "x", 1, good, 1), "a byte");
    bad = hello;
    bad.magic[6]++;
    check(!is_taken(&a, &bad, sizeof(bad), good, 1), "another version");
    bad = hello;
    bad.ring_bytes /= 2;
    check(!is_taken(&a, &bad, sizeof(bad), good, 1), "another size");
    is_taken(&a, &hello, sizeof(hello), good, 8); /* what does not fit the kernel drops; the rest must not leak */
    for (int i = 0; i < 8; i++)
        close(good[i]);
    close(unsealed);
    close(shrinks);
    close(small);
    close(plain);
    check(descriptors() == before, "no descriptor is left");
    close_side(&a);
}

static struct ring_shared *map(int fd)
{
    void *shared = mmap(NULL, sizeof(struct ring_shared), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);

    need(shared != MAP_FAILED, "a mapping");
    return shared;
}

/* A revocation waits for a peer that is in the middle of an access, but not for ever, and not for a dead one. */
static void settling(void)
{
    const int seals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL;
    struct hello hello = right_hello(4000);
    int passed = memory(sizeof(struct ring_shared), seals), fd;
    struct ring_shared *shared = map(passed);
    struct side a;
    pid_t pid;

    open_shm(&a, "127.0.0.1");
    check(a.link->ops->settle(a.link), "nobody is there");
    fd = call(&a);
    greet(fd, &hello, sizeof(hello), &passed, 1);
    close(passed);
    pump(&a);
    check(a.link->ops->settle(a.link), "nobody is busy");
    atomic_store(&shared->busy, 1);
    check(!a.link->ops->settle(a.link), "one that does not come to an end");
    pid = fork();
    if (pid == 0) {
        atomic_store(&shared->busy, 3);
        _exit(0);
    }
    check(a.link->ops->settle(a.link), "busy with the next thing");
    waitpid(pid, NULL, 0);
    close(fd);
    check(a.link->ops->settle(a.link), "dead");
    munmap(shared, sizeof(*shared));
    close_side(&a);
}

/* Who dies while a channel is set up refuses nothing, and nothing is left of it. */
static void gone_in_the_middle(void)
{
    const int seals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL;
    struct hello hello = right_hello(4000);
    struct endpoint self = endpoint("127.0.0.1", 5);
    struct sockaddr_un name;
    socklen_t size = name_of(&self, &name);
    int listener = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0), fd, passed, before;
    struct side a;

    need(!bind(listener, (const struct sockaddr *)(const void *)&name, size) && !listen(listener, 5), "a name");
    open_shm(&a, "127.0.0.1");
    before = descriptors();
    close(call(&a)); /* before it was accepted */
    pump(&a);
    fd = call(&a);
    pump(&a);
    close(fd); /* without a greeting */
    pump(&a);
    fd = call(&a);
    passed = memory(sizeof(struct ring_shared), seals);
    greet(fd, &hello, sizeof(hello), &passed, 1);
    close(passed);
    close(fd); /* before the answer */
    pump(&a);
    for (int i = 0; i < 3; i++) {
        a.link->ops->prepare(a.link, &self);
        fd = accept(listener, NULL, NULL);
        need(fd >= 0, "a connection");
        close(fd); /* instead of an answer */
        pump(&a);
    }
    check(!a.counters.shm_refused && !a.counters.shm_peers, "nobody was refused");
    check(a.link->ops->sleep(a.link) && descriptors() == before, "nothing is left of them");
    a.link->ops->prepare(a.link, &self);
    fd = accept(listener, NULL, NULL);
    need(fd >= 0 && send(fd, "\1", 1, MSG_NOSIGNAL) == 1, "a refusal");
    pump(&a);
    check(a.counters.shm_refused == 1 && !a.counters.shm_peers, "who refuses is counted");
    close(fd);
    close(listener);
    close_side(&a);
}

static uint32_t chance_state = 12345;

static uint32_t chance(void)
{
    chance_state = chance_state * 1664525 + 1013904223;
    return chance_state >> 8;
}

/* Something wrong somewhere: positions, the words of entries, anywhere. */
static void scribble(struct ring_shared *shared)
{
    uint32_t where = chance() % 8, value = chance() % 2 ? chance() << 8 | chance() : chance() % 64 * RING_LINE;

    if (where == 0)
        atomic_store(&shared->head, value);
    else if (where == 1)
        atomic_store(&shared->tail, value);
    else if (where == 2)
        atomic_store(&shared->head, atomic_load(&shared->tail) + chance() % 200 * RING_LINE);
    else if (where == 3)
        atomic_store(chance() % 2 ? &shared->asleep : &shared->waiting, chance() % 2);
    else
        for (int i = 0; i < 64; i++) {
            uint64_t word = (chance() % 3 ? chance() % 5000 : chance()) | (uint64_t)(chance() % 4) << 32;

            __atomic_store_n((uint64_t *)(void *)(shared->data + chance() % 256 * RING_LINE), word,
                             __ATOMIC_RELAXED);
        }
}

static uint32_t sum_of(const uint8_t *data, uint32_t size)
{
    uint32_t sum = 0;

    for (uint32_t i = 0; i < size; i++)
        sum += data[i];
    return sum;
}

/* Every frame that is given can be read whole. */
static void take_and_read(struct side *side)
{
    static volatile uint32_t sum;
    int count = take(side);

    for (int i = 0; i < count; i++) {
        check(views[i].size <= LINK_MAX_FRAME, "no frame is larger than one may be");
        sum += sum_of(views[i].data, views[i].size);
    }
}

/* A producer that writes garbage, in steps and then beside us. */
static void garbage_in(void)
{
    const int seals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL;
    struct hello hello = right_hello(4000);
    struct side a;

    open_shm(&a, "127.0.0.1");
    for (int round = 0; round < 300; round++) {
        int passed = memory(sizeof(struct ring_shared), seals), fd = call(&a);
        struct ring_shared *shared = map(passed);

        greet(fd, &hello, sizeof(hello), &passed, 1);
        close(passed);
        pump(&a);
        for (int i = 0; i < 200; i++) {
            scribble(shared);
            take_and_read(&a);
            if (i % 16 == 0)
                a.link->ops->sleep(a.link);
            if (i % 16 == 1)
                a.link->ops->wake(a.link);
        }
        close(fd);
        munmap(shared, sizeof(*shared));
    }
    pump(&a);
    check(a.counters.shm_refused > 100, "garbage is noticed");
    for (int round = 0; round < 20; round++) {
        int passed = memory(sizeof(struct ring_shared), seals), fd = call(&a);
        struct ring_shared *shared = map(passed);
        pid_t pid;

        greet(fd, &hello, sizeof(hello), &passed, 1);
        close(passed);
        pump(&a);
        pid = fork();
        for (chance_state += (uint32_t)round; pid == 0;)
            scribble(shared);
        for (int i = 0; i < 3000; i++)
            take_and_read(&a);
        kill(pid, SIGKILL);
        waitpid(pid, NULL, 0);
        close(fd);
        munmap(shared, sizeof(*shared));
    }
    pump(&a);
    check(a.link->ops->sleep(a.link), "all those channels are gone");
    close_side(&a);
}

/* Accepts the channel of `a` to `self`, and its memory. */
static struct ring_shared *accept_channel(int listener, int *fd)
{
    struct hello hello;
    struct iovec iov = {&hello, sizeof(hello)};
    _Alignas(struct cmsghdr) uint8_t control[CMSG_SPACE(sizeof(int))];
    struct msghdr header = {.msg_iov = &iov, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof(control)};
    struct ring_shared *shared;
    int passed;

    *fd = accept(listener, NULL, NULL);
    need(*fd >= 0 && recvmsg(*fd, &header, MSG_CMSG_CLOEXEC) == (ssize_t)sizeof(hello), "a greeting");
    memcpy(&passed, CMSG_DATA(CMSG_FIRSTHDR(&header)), sizeof(passed));
    check(ftruncate(passed, 4096) && errno == EPERM, "the memory is sealed");
    shared = map(passed);
    close(passed);
    need(send(*fd, "", 1, MSG_NOSIGNAL) == 1, "the answer");
    return shared;
}

/* A consumer that writes garbage. */
static void garbage_out(void)
{
    struct endpoint self = endpoint("127.0.0.1", 5);
    struct sockaddr_un name;
    socklen_t size = name_of(&self, &name);
    int listener = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    struct side a;

    need(!bind(listener, (const struct sockaddr *)(const void *)&name, size) && !listen(listener, 5), "a name");
    open_shm(&a, "127.0.0.1");
    for (int round = 0; round < 60; round++) {
        struct ring_shared *shared;
        int fd;

        a.link->ops->prepare(a.link, &self);
        shared = accept_channel(listener, &fd);
        pump(&a);
        check(a.counters.shm_peers == 1, "open");
        for (uint32_t n = 0; n < 2500; n++) { /* so many that the tail is asked for */
            scribble(shared);
            a.link->ops->has_room(a.link, &self, 4000);
            send_frame(a.link, &self, n, SMALLEST + 4 * (chance() % 1000), 0);
            if (n % 8 == 0)
                flush(a.link);
            if (n % 16 == 0)
                a.link->ops->sleep(a.link);
            if (n % 16 == 1)
                a.link->ops->wake(a.link);
        }
        flush(a.link);
        close(fd);
        munmap(shared, sizeof(*shared));
        pump(&a);
        check(!a.counters.shm_peers, "gone");
    }
    check(a.counters.shm_refused > 20, "garbage is noticed");
    close(listener);
    close_side(&a);
}

/* A listener that answers nothing, or too much, and never reads: nothing blocks. */
static void rude_listener(void)
{
    struct endpoint self = endpoint("127.0.0.1", 5);
    struct sockaddr_un name;
    socklen_t size = name_of(&self, &name);
    int listener = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0), fd;
    struct ring_shared *shared;
    struct side a;

    need(!bind(listener, (const struct sockaddr *)(const void *)&name, size) && !listen(listener, 0), "a name");
    open_shm(&a, "127.0.0.1");
    a.link->ops->prepare(a.link, &self);
    pump(&a);
    send_frame(a.link, &self, 0, 64, 0);
    flush(a.link);
    check(!a.counters.shm_sent && !a.counters.shm_peers, "no answer: UDP");
    shared = accept_channel(listener, &fd);
    fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) & ~O_NONBLOCK);
    pump(&a);
    for (uint32_t n = 0; n < 5000; n++) { /* a wake-up for each, until there is no place for more */
        atomic_store(&shared->asleep, 1);
        atomic_store(&shared->tail, atomic_load(&shared->head));
        send_frame(a.link, &self, n, 64, 0);
        flush(a.link);
    }
    check(a.counters.shm_sent == 5000, "and did not block");
    close(fd);
    close(listener);
    munmap(shared, sizeof(*shared));
    close_side(&a);
}

/* --- killed peers -------------------------------------------------------------------------------------------- */

/* Sends frames with a content that can be checked, for ever. */
static void send_for_ever(const struct endpoint *to, int started)
{
    static uint8_t data[LINK_MAX_FRAME];
    struct side side;

    num_pending = 0;
    open_shm(&side, "127.0.0.1");
    for (uint32_t n = 0;; n++) {
        uint32_t size = SMALLEST + 4 * (n * 7919 % 1000);
        struct iovec iov = {data, size};
        struct frame frame = {.to = to, .iov = &iov, .niov = 1, .size = size, .sealed = false};

        if (n % 512 == 0)
            side.link->ops->prepare(side.link, to);
        if (n % 16 == 0)
            take(&side);
        for (uint32_t i = 0; i < size; i += 4)
            memcpy(data + i, &n, sizeof(n));
        side.link->ops->send(side.link, &frame);
        if (n % 7 == 0 || !side.counters.shm_peers) /* UDP needs the frame until then */
            side.link->ops->flush(side.link);
        if (n == 0 && write(started, "", 1) != 1)
            _exit(1);
    }
}

static uint32_t check_whole(const struct view *view)
{
    uint32_t n = number_of(view->data), other;

    check(view->size == SMALLEST + 4 * (n * 7919 % 1000), "the size that was sent");
    for (uint32_t i = 0; i + 4 < view->size; i += 4) {
        memcpy(&other, view->data + i, sizeof(other));
        if (other != n) {
            check(false, "a frame is whole");
            break;
        }
    }
    return n;
}

static void killed(int rounds)
{
    struct side a;
    uint64_t total = 0;
    int before;

    open_shm(&a, "127.0.0.1");
    before = descriptors();
    for (int round = 0; round < rounds; round++) {
        struct timespec end, now;
        int started[2];
        pid_t pid;
        char byte;

        need(!pipe(started), "a pipe");
        pid = fork();
        if (pid == 0)
            send_for_ever(&a.link->local, started[1]);
        need(pid > 0 && read(started[0], &byte, 1) == 1, "a peer");
        clock_gettime(CLOCK_MONOTONIC, &end);
        end.tv_nsec += (long)(chance() % 8000) * 1000;
        do {
            int count = take(&a);

            for (int i = 0; i < count; i++) {
                check_whole(&views[i]);
                total += views[i].unsealed;
            }
            if (chance() % 64 == 0) {
                a.link->ops->sleep(a.link);
                a.link->ops->wake(a.link);
            }
            clock_gettime(CLOCK_MONOTONIC, &now);
        } while ((now.tv_sec - end.tv_sec) * 1000000000 + now.tv_nsec < end.tv_nsec);
        kill(pid, SIGKILL);
        waitpid(pid, NULL, 0);
        for (int i = 0; i < 200; i++)
            for (int k = 0, count = take(&a); k < count; k++)
                check_whole(&views[k]);
        close(started[0]);
        close(started[1]);
    }
    pump(&a);
    check(total > (uint64_t)rounds, "frames came through memory");
    check(a.link->ops->sleep(a.link) && descriptors() == before, "nothing is left of them");
    close_side(&a);
}

/* Receives for ever, asleep now and then. */
static void receive_for_ever(int started)
{
    struct side side;

    open_shm(&side, "127.0.0.1");
    if (write(started, &side.link->local, sizeof(side.link->local)) < 0)
        _exit(1);
    for (;;) {
        for (int i = 0; i < 5; i++)
            take_and_read(&side);
        side.link->ops->sleep(side.link);
        side.link->ops->wake(side.link);
    }
}

/* Sends to a receiver that is killed, and on. */
static void killed_receiver(int rounds)
{
    static uint8_t data[4000];
    struct side a;

    open_shm(&a, "127.0.0.1");
    for (int round = 0; round < rounds; round++) {
        uint32_t last = 200 + chance() % 3000, sends = 0;
        struct endpoint to;
        struct iovec iov = {data, sizeof(data)};
        struct frame frame = {.to = &to, .iov = &iov, .niov = 1, .size = sizeof(data)};
        int started[2];
        pid_t pid;

        need(!pipe(started), "a pipe");
        pid = fork();
        if (pid == 0)
            receive_for_ever(started[1]);
        need(pid > 0 && read(started[0], &to, sizeof(to)) == (ssize_t)sizeof(to), "a peer");
        a.link->ops->prepare(a.link, &to);
        while (a.counters.shm_peers == 0)
            take(&a);
        for (; sends < 2 * last; sends++) {
            a.link->ops->has_room(a.link, &to, 4000);
            a.link->ops->send(a.link, &frame);
            a.link->ops->flush(a.link);
            if (sends == last)
                kill(pid, SIGKILL);
            if (sends % 64 == 0)
                take(&a);
            if (sends % 256 == 0) {
                a.link->ops->sleep(a.link);
                a.link->ops->wake(a.link);
            }
        }
        waitpid(pid, NULL, 0);
        pump(&a);
        check(!a.counters.shm_peers, "the channel is gone");
        close(started[0]);
        close(started[1]);
    }
    check(a.counters.shm_sent > (uint64_t)rounds * 200, "frames went through memory");
    check(a.link->ops->sleep(a.link), "nothing is left to do");
    close_side(&a);
}

#define RUN(test)                                                                                                  \
    do {                                                                                                           \
        int before = failures;                                                                                     \
        test;                                                                                                      \
        if (failures > before)                                                                                     \
            fprintf(stderr, "failed: %s\n", #test);                                                                \
    } while (0)

int main(void)
{
    RUN(traffic("127.0.0.1"));
    RUN(traffic("::1"));
    RUN(change_of_way());
    RUN(oneself());
    RUN(full());
    RUN(sleepers());
    RUN(last_words());
    RUN(other_user());
    RUN(bad_greetings());
    RUN(gone_in_the_middle());
    RUN(settling());
    RUN(garbage_in());
    RUN(garbage_out());
    RUN(rude_listener());
    RUN(killed(150));
    RUN(killed_receiver(30));
    return failures ? 1 : 0;
}
