/* The invariant CRC.
 *
 * A register holds a polynomial of degree below 32, bit 31 - i for x^i ("reflected"). Feeding a byte adds it to
 * the low end of the register and multiplies by x^8. Everything here is built on that, and every constant is
 * computed from the polynomial when the library is loaded.
 *
 * Long input is folded: 128 bits of it, multiplied by x^D modulo the polynomial, can be added to what comes D
 * bits later, and the CRC stays the same. Four such lanes hide the latency of the carry-less multiplier. The 16
 * bytes that remain of it in the end, and short input, go through tables, eight bytes a step. */
#include "icrc.h"

#include <endian.h>
#include <stdatomic.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define POLYNOMIAL 0xedb88320u
#define ONE 0x80000000u /* x^0 */

enum {
    BTH_BYTES = 12,
    ICRC_BYTES = 4,
    IPV4_BYTES = 20,
    IPV6_BYTES = 40,
    UDP_BYTES = 8,
    PSEUDO_MAX = 8 + IPV6_BYTES + UDP_BYTES,
    WIDE_MIN = 512,       /* where two kinds of folding pay */
    FOLD_MIN = 64,        /* shorter input is faster through the tables */
    LAST_GROUPED_ID = 63, /* a large send has at most 64 segments */
};

static uint32_t table[8][256]; /* [n][byte]: a byte followed by n others */
static bool carryless, wide; /* what the processor has */
static uint64_t fold_128[2], fold_512[2], fold_2048[2]; /* by so many bits: the earlier, the later 8 of 16 bytes */

/* Product of two polynomials, modulo the polynomial of the CRC. */
static uint32_t multiply(uint32_t a, uint32_t b)
{
    uint32_t product = 0;

    for (; a; a <<= 1) {
        product ^= b & -(a >> 31);
        b = (b >> 1) ^ (POLYNOMIAL & -(b & 1));
    }
    return product;
}

/* x^n. The powers repeat after 2^32 - 1, for the polynomial is primitive: x^-n is power(UINT32_MAX - n). */
static uint32_t power(uint32_t n)
{
    uint32_t result = ONE, square = ONE >> 1;

    for (; n; n >>= 1) {
        if (n & 1)
            result = multiply(result, square);
        square = multiply(square, square);
    }
    return result;
}

/* --- tables ------------------------------------------------------------------------------------------------ */

static void build_tables(void)
{
    uint32_t byte_shift = power(8);

    for (uint32_t byte = 0; byte < 256; byte++) {
        table[0][byte] = multiply(byte, byte_shift);
        for (int n = 1; n < 8; n++)
            table[n][byte] = multiply(table[n - 1][byte], byte_shift);
    }
}

static uint32_t load32(const uint8_t *data)
{
    uint32_t value;

    memcpy(&value, data, sizeof(value));
    return le32toh(value);
}

/* What four bytes, with `after` others behind them, leave in the register. */
static uint32_t look_up(uint32_t four, int after)
{
    return table[after + 3][four & 0xff] ^ table[after + 2][four >> 8 & 0xff] ^
           table[after + 1][four >> 16 & 0xff] ^ table[after][four >> 24];
}

uint32_t icrc_update_portable(uint32_t state, const void *data, size_t size)
{
    const uint8_t *p = data;

    for (; size >= 8; size -= 8, p += 8)
        state = look_up(state ^ load32(p), 4) ^ look_up(load32(p + 4), 0);
    if (size >= 4) {
        state = look_up(state ^ load32(p), 0);
        p += 4;
        size -= 4;
    }
    for (; size; size--)
        state = table[0][(state ^ *p++) & 0xff] ^ state >> 8;
    return state;
}

/* --- carry-less multiplication ----------------------------------------------------------------------------- */

#if defined(__x86_64__)

#define CARRYLESS __attribute__((target("pclmul,sse4.1")))
#define WIDE __attribute__((target("pclmul,vpclmulqdq,avx512f")))

/* Multiplying two reflected 64-bit operands gives the reflected product times x, hence the - 1. */
static void build_fold(uint64_t constants[2], uint32_t bits)
{
    constants[0] = (uint64_t)power(bits + 64 - 1) << 32;
    constants[1] = (uint64_t)power(bits - 1) << 32;
}

CARRYLESS static inline __m128i fold(__m128i from, __m128i constants, __m128i onto)
{
    __m128i earlier = _mm_clmulepi64_si128(from, constants, 0x00);
    __m128i later = _mm_clmulepi64_si128(from, constants, 0x11);

    return _mm_xor_si128(_mm_xor_si128(earlier, later), onto);
}

WIDE static inline __m512i fold_wide(__m512i from, __m512i constants, __m512i onto)
{
    __m512i earlier = _mm512_clmulepi64_epi128(from, constants, 0x00);
    __m512i later = _mm512_clmulepi64_epi128(from, constants, 0x11);

    return _mm512_ternarylogic_epi64(earlier, later, onto, 0x96); /* exclusive or of the three */
}

CARRYLESS static inline __m128i load128(const uint8_t *data)
{
    return _mm_loadu_si128((const void *)data);
}

/* At least FOLD_MIN bytes. */
CARRYLESS static uint32_t update_carryless(uint32_t state, const uint8_t *p, size_t size)
{
    __m128i by_512 = load128((const uint8_t *)fold_512), by_128 = load128((const uint8_t *)fold_128);
    __m128i a = _mm_xor_si128(load128(p), _mm_cvtsi32_si128((int)state));
    __m128i b = load128(p + 16), c = load128(p + 32), d = load128(p + 48);
    uint8_t rest[16];

    for (p += 64, size -= 64; size >= 64; p += 64, size -= 64) {
        a = fold(a, by_512, load128(p));
        b = fold(b, by_512, load128(p + 16));
        c = fold(c, by_512, load128(p + 32));
        d = fold(d, by_512, load128(p + 48));
    }
    a = fold(a, by_128, b);
    a = fold(a, by_128, c);
    a = fold(a, by_128, d);
    for (; size >= 16; p += 16, size -= 16)
        a = fold(a, by_128, load128(p));
    _mm_storeu_si128((void *)rest, a);
    return icrc_update_portable(icrc_update_portable(0, rest, sizeof(rest)), p, size);
}

/* At least WIDE_MIN bytes. Four registers of four lanes; the 64 bytes that remain are input like any other. */
WIDE static uint32_t update_wide(uint32_t state, const uint8_t *p, size_t size)
{
    __m512i by_2048 = _mm512_broadcast_i32x4(load128((const uint8_t *)fold_2048));
    __m512i by_512 = _mm512_broadcast_i32x4(load128((const uint8_t *)fold_512));
    __m512i a = _mm512_xor_si512(_mm512_loadu_si512(p), _mm512_zextsi128_si512(_mm_cvtsi32_si128((int)state)));
    __m512i b = _mm512_loadu_si512(p + 64), c = _mm512_loadu_si512(p + 128), d = _mm512_loadu_si512(p + 192);
    uint8_t rest[64];

    for (p += 256, size -= 256; size >= 256; p += 256, size -= 256) {
        a = fold_wide(a, by_2048, _mm512_loadu_si512(p));
        b = fold_wide(b, by_2048, _mm512_loadu_si512(p + 64));
        c = fold_wide(c, by_2048, _mm512_loadu_si512(p + 128));
        d = fold_wide(d, by_2048, _mm512_loadu_si512(p + 192));
    }
    a = fold_wide(a, by_512, b);
    a = fold_wide(a, by_512, c);
    a = fold_wide(a, by_512, d);
    for (; size >= 64; p += 64, size -= 64)
        a = fold_wide(a, by_512, _mm512_loadu_si512(p));
    _mm512_storeu_si512(rest, a);
    return icrc_update_portable(update_carryless(0, rest, sizeof(rest)), p, size);
}

uint32_t icrc_update(uint32_t state, const void *data, size_t size)
{
    if (size >= WIDE_MIN && wide)
        return update_wide(state, data, size);
    if (size >= FOLD_MIN && carryless)
        return update_carryless(state, data, size);
    return icrc_update_portable(state, data, size);
}

static void choose(void)
{
    __builtin_cpu_init();
    build_fold(fold_512, 512);
    build_fold(fold_128, 128);
    build_fold(fold_2048, 2048);
    carryless = __builtin_cpu_supports("pclmul") && __builtin_cpu_supports("sse4.1");
    wide = carryless && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("vpclmulqdq");
}

#else

uint32_t icrc_update(uint32_t state, const void *data, size_t size)
{
    return icrc_update_portable(state, data, size);
}

static void choose(void)
{
}

#endif

/* Before any thread can call: no check on the way, and nothing to race for. */
__attribute__((constructor)) static void prepare(void)
{
    build_tables();
    choose();
}

/* --- the frame --------------------------------------------------------------------------------------------- */

static bool is_ipv4(const struct endpoint *endpoint)
{
    static const uint8_t mapped[12] = {[10] = 0xff, [11] = 0xff};

    return memcmp(endpoint->gid.raw, mapped, sizeof(mapped)) == 0;
}

static uint8_t *put16(uint8_t *out, uint32_t value)
{
    out[0] = (uint8_t)(value >> 8);
    out[1] = (uint8_t)value;
    return out + 2;
}

static uint8_t *put_bytes(uint8_t *out, const void *data, size_t size)
{
    memcpy(out, data, size);
    return out + size;
}

static uint8_t *put_ipv4(uint8_t *out, const struct endpoint *from, const struct endpoint *to, uint32_t frame_size)
{
    out = put16(out, 0x45ff); /* version, header length; type of service is not invariant */
    out = put16(out, IPV4_BYTES + UDP_BYTES + frame_size);
    out = put16(out, 0);      /* identification */
    out = put16(out, 0x4000); /* don't fragment */
    out = put16(out, 0xff11); /* time to live is not; UDP */
    out = put16(out, 0xffff); /* so the checksum is not */
    out = put_bytes(out, from->gid.raw + 12, 4);
    return put_bytes(out, to->gid.raw + 12, 4);
}

static uint8_t *put_ipv6(uint8_t *out, const struct endpoint *from, const struct endpoint *to, uint32_t frame_size)
{
    out = put16(out, 0x6fff); /* version; traffic class and flow label are not invariant */
    out = put16(out, 0xffff);
    out = put16(out, UDP_BYTES + frame_size);
    out = put16(out, 0x11ff); /* UDP; hop limit is not */
    out = put_bytes(out, from->gid.raw, 16);
    return put_bytes(out, to->gid.raw, 16);
}

/* Up to PSEUDO_MAX bytes; returns how many. */
static size_t put_pseudo_header(uint8_t *out, const struct endpoint *from, const struct endpoint *to,
                                uint32_t frame_size)
{
    uint8_t *p = out;

    memset(p, 0xff, 8); /* in place of the LRH */
    p += 8;
    p = is_ipv4(from) ? put_ipv4(p, from, to, frame_size) : put_ipv6(p, from, to, frame_size);
    p = put16(p, from->port);
    p = put16(p, to->port);
    p = put16(p, UDP_BYTES + frame_size);
    p = put16(p, 0xffff); /* the checksum is not invariant */
    return (size_t)(p - out);
}

/* What the pseudo-headers of late left in the register: a conversation has few. Each thread has its own. */
struct begun {
    struct endpoint from, to;
    uint32_t frame_size; /* 0: none */
    uint32_t state;
};

uint32_t icrc_begin(const struct endpoint *from, const struct endpoint *to, uint32_t frame_size)
{
    enum { PLACES = 4 };
    static __thread struct begun memory[PLACES] __attribute__((tls_model("initial-exec")));
    struct begun *begun = &memory[(frame_size / 4 ^ from->port) % PLACES];
    uint8_t header[PSEUDO_MAX];

    if (begun->frame_size == frame_size && same_endpoint(&begun->to, to) && same_endpoint(&begun->from, from))
        return begun->state;
    begun->from = *from;
    begun->to = *to;
    begun->frame_size = frame_size;
    begun->state = icrc_update(UINT32_MAX, header, put_pseudo_header(header, from, to, frame_size));
    return begun->state;
}

/* The BTH is copied, for one of its bytes is masked. */
uint32_t icrc_frame(const struct endpoint *from, const struct endpoint *to, const struct iovec *iov, int niov,
                    uint32_t frame_size)
{
    size_t left = frame_size - ICRC_BYTES - BTH_BYTES, skip = BTH_BYTES;
    uint32_t state = icrc_begin(from, to, frame_size);
    uint8_t bth[BTH_BYTES];

    memcpy(bth, iov[0].iov_base, BTH_BYTES);
    bth[4] = 0xff; /* resv8a */
    state = icrc_update_portable(state, bth, BTH_BYTES);
    for (int i = 0; i < niov && left; i++) {
        size_t part = iov[i].iov_len - skip;

        if (part > left)
            part = left;
        state = icrc_update(state, (const uint8_t *)iov[i].iov_base + skip, part);
        left -= part;
        skip = 0;
    }
    return ~state;
}

struct frame icrc_seal(const struct endpoint *from, const struct frame *frame)
{
    const struct iovec *last = &frame->iov[frame->niov - 1];
    struct frame sealed = *frame;
    uint32_t icrc;

    if (frame->sealed)
        return sealed;
    icrc = htole32(icrc_frame(from, frame->to, frame->iov, frame->niov, frame->size));
    memcpy((uint8_t *)last->iov_base + last->iov_len - ICRC_BYTES, &icrc, sizeof(icrc));
    sealed.sealed = true;
    return sealed;
}

/* --- identification ---------------------------------------------------------------------------------------- */

/* By how many bits the register moves from where the identification is added to it: its own two bytes, the rest of
 * the IPv4 header, the UDP header, the frame. */
static uint32_t identification_distance(uint32_t frame_size)
{
    return 8 * (2 + 14 + UDP_BYTES + frame_size - ICRC_BYTES);
}

/* power(n) through a cache indexed by the size of the frame. A value is written twice at worst, and never 0. */
static uint32_t cached_power(_Atomic uint32_t *cache, uint32_t frame_size, uint32_t n)
{
    uint32_t value;

    if (frame_size > LINK_MAX_FRAME)
        return power(n);
    value = atomic_load_explicit(&cache[frame_size], memory_order_relaxed);
    if (!value) {
        value = power(n);
        atomic_store_explicit(&cache[frame_size], value, memory_order_relaxed);
    }
    return value;
}

static uint32_t compute_adjustment(uint32_t frame_size, uint16_t ip_id)
{
    static _Atomic uint32_t cache[LINK_MAX_FRAME + 1];

    /* The register takes the first byte, the upper one, at its low end. */
    return multiply(__builtin_bswap16(ip_id),
                    cached_power(cache, frame_size, identification_distance(frame_size)));
}

/* That of a segment is the sum of those of its bits, which are computed once for each size. They are written twice
 * at worst, and never 0. */
uint32_t icrc_adjustment(uint32_t frame_size, uint16_t ip_id)
{
    enum { BITS = 6 };
    static _Atomic uint32_t basis[LINK_MAX_FRAME / 4 + 1][BITS];
    uint32_t sum = 0;

    if (ip_id >> BITS || frame_size > LINK_MAX_FRAME || frame_size % 4)
        return compute_adjustment(frame_size, ip_id);
    for (uint32_t left = ip_id; left; left &= left - 1) {
        int bit = __builtin_ctz(left);
        uint32_t value = atomic_load_explicit(&basis[frame_size / 4][bit], memory_order_relaxed);

        if (!value) {
            value = compute_adjustment(frame_size, (uint16_t)(1u << bit));
            atomic_store_explicit(&basis[frame_size / 4][bit], value, memory_order_relaxed);
        }
        sum ^= value;
    }
    return sum;
}

/* By which bits the identification must be another one for the ICRC to differ by `difference`. False: no
 * identification does that. */
static bool recover_identification(uint32_t frame_size, uint32_t difference, uint16_t *changed)
{
    static _Atomic uint32_t cache[LINK_MAX_FRAME + 1];
    uint32_t back = cached_power(cache, frame_size, UINT32_MAX - identification_distance(frame_size));
    uint32_t field = multiply(difference, back);

    *changed = __builtin_bswap16((uint16_t)field);
    return field <= UINT16_MAX;
}

bool icrc_check(const struct view *view, const struct endpoint *to, bool any_ip_id)
{
    struct iovec iov = {.iov_base = view->data, .iov_len = view->size};
    uint32_t difference;
    uint16_t changed;

    if (view->size < BTH_BYTES + ICRC_BYTES)
        return false;
    difference = load32(view->data + view->size - ICRC_BYTES) ^ icrc_frame(&view->from, to, &iov, 1, view->size);
    if (is_ipv4(&view->from))
        difference ^= icrc_adjustment(view->size, view->ip_id);
    if (!difference)
        return true;
    if (!is_ipv4(&view->from) || !recover_identification(view->size, difference, &changed))
        return false;
    return any_ip_id || (view->ip_id ^ changed) <= LAST_GROUPED_ID;
}
