/* The invariant CRC against a reference that takes one bit at a time, against packets that real hardware sent, and
 * what it says of frames that were damaged or got another IP identification. With an argument: how fast it is. */
#include "icrc.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { BTH = 12, ICRC = 4 };

static int failures;

static void check(int holds, const char *what)
{
    if (!holds) {
        fprintf(stderr, "not so: %s\n", what);
        failures++;
    }
}

static uint32_t random32(void)
{
    static uint64_t state = 1;

    state = state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(state >> 32);
}

static void randomize(void *data, size_t size)
{
    for (size_t i = 0; i < size; i++)
        ((uint8_t *)data)[i] = (uint8_t)random32();
}

/* --- reference --------------------------------------------------------------------------------------------- */

static uint32_t reference_update(uint32_t state, const void *data, size_t size)
{
    const uint8_t *p = data;

    for (size_t i = 0; i < size; i++) {
        state ^= p[i];
        for (int bit = 0; bit < 8; bit++)
            state = state & 1 ? state >> 1 ^ 0xedb88320 : state >> 1;
    }
    return state;
}

/* The packet as in the specification: IP header, UDP header and frame, the variant fields set to ones. */
static uint32_t reference_icrc(const struct endpoint *from, const struct endpoint *to, int v4, uint16_t id,
                               const uint8_t *frame, size_t size)
{
    size_t ip_size = v4 ? 20 : 40, udp = 8 + ip_size, bth = udp + 8, length = size + 8;
    uint8_t packet[8 + 40 + 8 + LINK_MAX_FRAME] = {0};
    uint8_t *ip = packet + 8;

    memset(packet, 0xff, 8);
    if (v4) {
        const uint8_t header[20] = {0x45, 0xff, (uint8_t)((length + 20) >> 8), (uint8_t)(length + 20),
                                    (uint8_t)(id >> 8), (uint8_t)id, 0x40, 0, 0xff, 17, 0xff, 0xff};

        memcpy(ip, header, sizeof(header));
        memcpy(ip + 12, from->gid.raw + 12, 4);
        memcpy(ip + 16, to->gid.raw + 12, 4);
    } else {
        const uint8_t header[8] = {0x6f, 0xff, 0xff, 0xff, (uint8_t)(length >> 8), (uint8_t)length, 17, 0xff};

        memcpy(ip, header, sizeof(header));
        memcpy(ip + 8, from->gid.raw, 16);
        memcpy(ip + 24, to->gid.raw, 16);
    }
    packet[udp] = (uint8_t)(from->port >> 8);
    packet[udp + 1] = (uint8_t)from->port;
    packet[udp + 2] = (uint8_t)(to->port >> 8);
    packet[udp + 3] = (uint8_t)to->port;
    packet[udp + 4] = (uint8_t)(length >> 8);
    packet[udp + 5] = (uint8_t)length;
    packet[udp + 6] = packet[udp + 7] = 0xff;
    memcpy(packet + bth, frame, size);
    packet[bth + 4] = 0xff;
    return ~reference_update(UINT32_MAX, packet, bth + size - ICRC);
}

/* --- helpers ----------------------------------------------------------------------------------------------- */

static void random_endpoint(struct endpoint *endpoint, int v4)
{
    randomize(endpoint->gid.raw, 16);
    endpoint->gid.raw[0] = 0xfd;
    if (v4) {
        memset(endpoint->gid.raw, 0, 10);
        memset(endpoint->gid.raw + 10, 0xff, 2);
    }
    endpoint->port = (uint16_t)random32();
}

static void store_icrc(uint8_t *frame, size_t size, uint32_t icrc)
{
    for (int i = 0; i < ICRC; i++)
        frame[size - ICRC + i] = (uint8_t)(icrc >> 8 * i);
}

static uint32_t load_icrc(const uint8_t *frame, size_t size)
{
    uint32_t icrc = 0;

    for (int i = 0; i < ICRC; i++)
        icrc |= (uint32_t)frame[size - ICRC + i] << 8 * i;
    return icrc;
}

/* A frame of `size` random bytes, sealed for identification `id`. */
static void make_frame(uint8_t *frame, uint32_t size, struct view *view, struct endpoint *to, int v4, uint16_t id)
{
    randomize(frame, size);
    random_endpoint(&view->from, v4);
    random_endpoint(to, v4);
    view->data = frame;
    view->size = size;
    view->ip_id = 0;
    view->traffic_class = 0;
    store_icrc(frame, size, reference_icrc(&view->from, to, v4, id, frame, size));
}

static uint32_t random_size(void)
{
    return BTH + ICRC + 4 * (random32() % ((LINK_MAX_FRAME - BTH - ICRC) / 4 + 1));
}

/* --- plain CRC --------------------------------------------------------------------------------------------- */

static void known_values(void)
{
    uint8_t ones[8];

    memset(ones, 0xff, sizeof(ones));
    check(~icrc_update(UINT32_MAX, "123456789", 9) == 0xcbf43926, "the check value of CRC-32");
    check(~icrc_update_portable(UINT32_MAX, "123456789", 9) == 0xcbf43926, "the check value, portable");
    check(icrc_update(UINT32_MAX, "", 0) == UINT32_MAX, "nothing changes nothing");
    check(icrc_update(UINT32_MAX, ones, sizeof(ones)) == 0xdebb20e3, "the register after a masked LRH");
}

/* Every size around the steps of the algorithms, at every alignment. */
static void all_sizes(void)
{
    static uint8_t data[1400 + 16];
    int same = 1, portable_same = 1;

    randomize(data, sizeof(data));
    for (size_t size = 0; size <= 1400; size++) {
        for (size_t at = 0; at < 16; at += 3) {
            uint32_t state = random32();
            uint32_t expected = reference_update(state, data + at, size);

            same &= icrc_update(state, data + at, size) == expected;
            portable_same &= icrc_update_portable(state, data + at, size) == expected;
        }
    }
    check(same, "every size agrees with the reference");
    check(portable_same, "every size agrees with the reference, portable");
}

static void splits(void)
{
    static uint8_t data[9000];
    int same = 1;

    for (int round = 0; round < 200; round++) {
        size_t size = random32() % (sizeof(data) + 1), first = random32() % (size + 1);
        uint32_t state = random32();

        randomize(data, size);
        same &= icrc_update(icrc_update(state, data, first), data + first, size - first) ==
                reference_update(state, data, size);
    }
    check(same, "two pieces give what one gives");
}

/* Input is read to its end and not further: heap memory, so that the sanitizer sees it. */
static void exact_reads(void)
{
    for (size_t size = 1; size < 200; size++) {
        uint8_t *data = malloc(size);

        if (!data) {
            check(0, "memory");
            return;
        }
        memset(data, 0, size);
        check(icrc_update(0, data, size) == 0, "zeros leave zero");
        free(data);
    }
}

/* --- frames ------------------------------------------------------------------------------------------------ */

static void address(struct endpoint *endpoint, uint32_t ipv4, uint16_t port)
{
    memset(endpoint, 0, sizeof(*endpoint));
    endpoint->gid.raw[10] = endpoint->gid.raw[11] = 0xff;
    for (int i = 0; i < 4; i++)
        endpoint->gid.raw[12 + i] = (uint8_t)(ipv4 >> (24 - 8 * i));
    endpoint->port = port;
}

/* Two packets that ConnectX cards sent, as they stand in the tests of other people's dissectors. Their IP layer
 * counts, so the identification is none that a socket would send. */
static void hardware_packets(void)
{
    static uint8_t send[] = {0x24, 0x60, 0xff, 0xff, 0x00, 0x00, 0x00, 0xd3, 0x00, 0xcf, 0x17, 0x10,
                             0x46, 0x30, 0x81, 0x8b, 0xe2, 0x89, 0x35, 0xd9, 0x0e, 0x9a, 0x95, 0x50,
                             0x54, 0x01, 0xbe, 0x88, 0x5e, 0x50, 0x00, 0x00, 0x78, 0xf3, 0x53, 0xf3};
    static uint8_t congestion[32] = {0x81, 0x00, 0xff, 0xff, 0x40, 0x00, 0x01, 0x18,
                                     [28] = 0x82, 0xfd, 0x00, 0x2a};
    struct view view = {.data = send, .size = sizeof(send), .ip_id = 1144};
    struct endpoint to;

    address(&view.from, 0xc0a80007, 49152);
    address(&to, 0xc0a80007, 4791);
    check(icrc_check(&view, &to, false), "a SEND of a card, identification known");
    view.ip_id = 0;
    check(!icrc_check(&view, &to, false), "a SEND of a card, identification out of range");
    check(icrc_check(&view, &to, true), "a SEND of a card, any identification");

    view = (struct view){.data = congestion, .size = sizeof(congestion)};
    address(&view.from, 0x0a001101, 0);
    address(&to, 0x0a001201, 4791);
    check(icrc_check(&view, &to, true), "a congestion notification of a card, any identification");
    view.ip_id = 0x718c;
    check(icrc_check(&view, &to, false), "a congestion notification of a card, identification known");
}

/* `frame` cut at random into up to LINK_MAX_PIECES pieces, the first one with the BTH, the last one with the
 * ICRC. */
static int cut(uint8_t *frame, uint32_t size, struct iovec *iov)
{
    int niov = 0;
    uint32_t at = BTH + (size > BTH + ICRC ? random32() % 8 * 4 : 0);

    if (at > size - ICRC || random32() % 4 == 0)
        at = size; /* one piece */
    iov[niov++] = (struct iovec){frame, at};
    while (at < size) {
        uint32_t part = niov == LINK_MAX_PIECES - 1 ? size : random32() % 2000;

        if (at + part > size - ICRC)
            part = size - at;
        iov[niov++] = (struct iovec){frame + at, part};
        at += part;
    }
    return niov;
}

static void frames_in_pieces(void)
{
    static uint8_t frame[LINK_MAX_FRAME], before[LINK_MAX_FRAME];
    struct iovec iov[LINK_MAX_PIECES];
    struct endpoint to;
    struct view view;

    for (int round = 0; round < 2000; round++) {
        uint32_t size = round < 20 ? BTH + ICRC + 4 * (uint32_t)round : random_size();
        int v4 = round & 1;

        make_frame(frame, size, &view, &to, v4, 0);
        memcpy(before, frame, size);
        if (icrc_frame(&view.from, &to, iov, cut(frame, size, iov), size) != load_icrc(frame, size)) {
            check(0, "a frame in pieces agrees with the reference");
            return;
        }
        check(memcmp(before, frame, size) == 0, "the frame is not changed");
        check(icrc_check(&view, &to, false), "a sound frame is accepted");
    }
}

static void pseudo_header_state(void)
{
    static uint8_t frame[64];
    struct endpoint to;
    struct view view;
    uint8_t masked[sizeof(frame)];

    for (int v4 = 0; v4 < 2; v4++) {
        make_frame(frame, sizeof(frame), &view, &to, v4, 0);
        memcpy(masked, frame, sizeof(frame));
        masked[4] = 0xff;
        check(~icrc_update(icrc_begin(&view.from, &to, sizeof(frame)), masked, sizeof(frame) - ICRC) ==
                  load_icrc(frame, sizeof(frame)),
              "icrc_begin() is the state before the frame");
    }
}

/* Fields that routers may change are not covered; every other bit is. */
static void single_bits(void)
{
    static uint8_t frame[BTH + 40 + ICRC];
    struct endpoint to;
    struct view view;

    for (int v4 = 0; v4 < 2; v4++) {
        make_frame(frame, sizeof(frame), &view, &to, v4, 0);
        for (size_t bit = 0; bit < 8 * sizeof(frame); bit++) {
            int variant = bit / 8 == 4;

            frame[bit / 8] ^= (uint8_t)(1 << bit % 8);
            check(icrc_check(&view, &to, false) == variant, "one changed bit of the frame is seen");
            frame[bit / 8] ^= (uint8_t)(1 << bit % 8);
        }
        for (size_t bit = v4 ? 96 : 0; bit < 128; bit++) {
            view.from.gid.raw[bit / 8] ^= (uint8_t)(1 << bit % 8);
            check(!icrc_check(&view, &to, false), "another source address is seen");
            view.from.gid.raw[bit / 8] ^= (uint8_t)(1 << bit % 8);
        }
        view.from.port ^= 1;
        check(!icrc_check(&view, &to, false), "another source port is seen");
    }
}

/* A large frame too: every bit that is flipped there, where more of them could pass for an identification. */
static void single_bits_large(void)
{
    static uint8_t frame[4096 + 32];
    struct endpoint to;
    struct view view;
    int passed = 0;

    make_frame(frame, sizeof(frame), &view, &to, 1, 0);
    for (size_t bit = 40; bit < 8 * sizeof(frame); bit += 7) {
        frame[bit / 8] ^= (uint8_t)(1 << bit % 8);
        passed += icrc_check(&view, &to, false);
        frame[bit / 8] ^= (uint8_t)(1 << bit % 8);
    }
    check(!passed, "no changed bit of a large frame passes for another identification");
}

static void short_frames(void)
{
    static uint8_t data[BTH + ICRC];
    struct endpoint to;
    struct view view = {.data = data};

    random_endpoint(&view.from, 1);
    random_endpoint(&to, 1);
    for (view.size = 0; view.size < sizeof(data); view.size++)
        check(!icrc_check(&view, &to, true), "less than a BTH and an ICRC is refused");
}

/* What arrives may be larger than any frame of ours. */
static void oversize(void)
{
    struct view view = {.size = 60000};
    struct endpoint to;
    uint32_t icrc;
    struct iovec iov;

    random_endpoint(&view.from, 1);
    random_endpoint(&to, 1);
    view.data = malloc(view.size);
    if (!view.data) {
        check(0, "memory");
        return;
    }
    randomize(view.data, view.size);
    iov = (struct iovec){view.data, view.size};
    icrc = icrc_frame(&view.from, &to, &iov, 1, view.size);
    store_icrc(view.data, view.size, icrc ^ icrc_adjustment(view.size, 33));
    check(icrc_check(&view, &to, false), "a frame beyond the cache of multipliers");
    free(view.data);
}

/* --- identification ---------------------------------------------------------------------------------------- */

static void every_identification(void)
{
    static uint8_t frame[BTH + 28 + ICRC];
    struct endpoint to;
    struct view view;
    uint32_t plain;
    int adjusted = 1, range = 1, any = 1, known = 1;

    make_frame(frame, sizeof(frame), &view, &to, 1, 0);
    plain = load_icrc(frame, sizeof(frame));
    for (uint32_t id = 0; id <= UINT16_MAX; id++) {
        uint32_t icrc = reference_icrc(&view.from, &to, 1, (uint16_t)id, frame, sizeof(frame));

        adjusted &= icrc == (plain ^ icrc_adjustment(sizeof(frame), (uint16_t)id));
        store_icrc(frame, sizeof(frame), icrc);
        view.ip_id = 0;
        range &= icrc_check(&view, &to, false) == (id < 64);
        any &= icrc_check(&view, &to, true);
        view.ip_id = (uint16_t)(id ^ 21); /* a wrong guess does no harm */
        range &= icrc_check(&view, &to, false) == (id < 64);
        view.ip_id = (uint16_t)id;
        known &= icrc_check(&view, &to, false);
    }
    check(adjusted, "the adjustment gives the ICRC of each identification");
    check(range, "without any_ip_id, 0 to 63 are accepted");
    check(any, "with any_ip_id, each one is accepted");
    check(known, "the identification that the view says is accepted");
}

static void identifications_of_all_sizes(void)
{
    static uint8_t frame[LINK_MAX_FRAME];
    struct endpoint to;
    struct view view;

    for (int round = 0; round < 500; round++) {
        uint32_t size = random_size();
        uint16_t id = (uint16_t)random32();
        uint32_t plain;

        make_frame(frame, size, &view, &to, 1, id);
        plain = reference_icrc(&view.from, &to, 1, 0, frame, size);
        check((plain ^ load_icrc(frame, size)) == icrc_adjustment(size, id), "the adjustment of any size");
        check(icrc_check(&view, &to, true), "any identification of any size");
        check(icrc_check(&view, &to, false) == (id < 64), "a strange identification of any size");
        frame[random32() % (size - ICRC) / 12 * 12] ^= 0x5a; /* never the byte that is not covered */
        check(!icrc_check(&view, &to, true), "damage is seen with any_ip_id");
    }
}

/* IPv6 has no identification: there is nothing to be lenient about. */
static void ipv6_is_exact(void)
{
    static uint8_t frame[64];
    struct endpoint to;
    struct view view;

    make_frame(frame, sizeof(frame), &view, &to, 0, 0);
    check(icrc_check(&view, &to, true), "a sound IPv6 frame");
    store_icrc(frame, sizeof(frame), load_icrc(frame, sizeof(frame)) ^ icrc_adjustment(sizeof(frame), 1));
    check(!icrc_check(&view, &to, true), "an IPv6 frame with an adjustment is refused");
}

/* --- speed ------------------------------------------------------------------------------------------------- */

static double now(void)
{
    struct timespec time;

    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec * 1e9 + (double)time.tv_nsec;
}

static void measure(void)
{
    static const uint32_t sizes[] = {16, 20, 32, 64, 80, 128, 272, 1040, 4112};
    static uint8_t frame[LINK_MAX_FRAME];
    enum { ROUNDS = 200000 };
    volatile uint32_t sink = 0;
    struct endpoint to;
    struct view view;

    for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++) {
        double start, plain, portable, sealed, checked, recovered;

        make_frame(frame, sizes[i], &view, &to, 1, 5);
        start = now();
        for (int n = 0; n < ROUNDS; n++)
            sink = icrc_update(sink, frame, sizes[i]);
        plain = now() - start;
        start = now();
        for (int n = 0; n < ROUNDS; n++)
            sink = icrc_update_portable(sink, frame, sizes[i]);
        portable = now() - start;
        start = now();
        for (int n = 0; n < ROUNDS; n++) {
            struct iovec iov = {frame, sizes[i]};

            sink = icrc_frame(&view.from, &to, &iov, 1, sizes[i]);
        }
        sealed = now() - start;
        view.ip_id = 5;
        start = now();
        for (int n = 0; n < ROUNDS; n++)
            sink = icrc_check(&view, &to, false);
        checked = now() - start;
        view.ip_id = 0;
        start = now();
        for (int n = 0; n < ROUNDS; n++)
            sink = icrc_check(&view, &to, false);
        recovered = now() - start;
        printf("%5u bytes: update %6.1f ns, portable %7.1f ns, icrc_frame %6.1f ns, icrc_check %6.1f ns, "
               "with another identification %6.1f ns\n",
               sizes[i], plain / ROUNDS, portable / ROUNDS, sealed / ROUNDS, checked / ROUNDS, recovered / ROUNDS);
    }
}

int main(int argc, char **argv)
{
    (void)argv;
    if (argc > 1) {
        measure();
        return 0;
    }
    known_values();
    all_sizes();
    splits();
    exact_reads();
    hardware_packets();
    frames_in_pieces();
    pseudo_header_state();
    single_bits();
    single_bits_large();
    short_frames();
    oversize();
    every_identification();
    identifications_of_all_sizes();
    ipv6_is_exact();
    return failures != 0;
}
