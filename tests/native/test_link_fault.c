/* The fault link: what it does to frames, over a ground that notes it and over a real socket. */
#include "links.h"

#include <errno.h>
#include <math.h>

/* --- faults ------------------------------------------------------------------------------------------------ */

static struct link *open_fault(const struct usroce_fault *fault)
{
    struct link *link = NULL;

    need(!link_fault_open(&link, new_notes("10.0.0.1"), fault), "a fault link");
    return link;
}

static int near(uint64_t count, double expected)
{
    double off = (double)count - expected;

    return off * off < 25 * expected; /* five standard deviations */
}

static void no_faults(void)
{
    struct usroce_fault none = {0};
    struct link *link = open_fault(&none);

    check(link_is_fault(link) && !link_is_fault(link->below), "what it is");
    check(link->fd == -1 && link->local.port == 4791 && link->counters == &notes.counters, "as the link below");
    send_many(link, 0, 1000);
    for (uint32_t n = 0; n < 1000; n++)
        check(notes.numbers[n] == n, "in order");
    check(notes.sent == 1000 && notes.sound == 1000 && notes.own_memory == 1000, "all sound, and none copied");
    check(link->ops->deadline(link) == UINT64_MAX, "no deadline");
    link->ops->close(link);
    check(notes.closed == 1, "the link below is closed too");
}

static void certain_faults(void)
{
    struct usroce_fault fault = {.drop = 1, .corrupt = 1, .duplicate = 1};
    struct link *link = open_fault(&fault);

    send_many(link, 0, 100);
    check(!notes.sent && notes.counters.faults_dropped == 100, "all are dropped");
    check(!notes.counters.faults_corrupted, "what is dropped takes no other fault");
    fault.drop = 0;
    check(!link_fault_set(link, &fault), "set");
    send_many(link, 0, 100);
    check(notes.sent == 200 && notes.counters.faults_duplicated == 100, "all are doubled");
    check(notes.counters.faults_corrupted == 100 && notes.sound < 8, "and damaged, where that counts");
    fault.corrupt = 0;
    check(!link_fault_set(link, &fault), "set");
    notes.sent = notes.sound = notes.own_memory = 0;
    send_many(link, 0, 100);
    check(notes.sent == 200 && notes.sound == 200 && notes.own_memory == 100, "doubled by a copy");
    check(notes.numbers[0] == 0 && notes.numbers[1] == 0 && notes.numbers[2] == 1, "one behind the other");
    check(link_unwrap(link) == &notes.link && !notes.closed, "unwrapped");
}

/* Exactly one bit. */
static void one_bit(void)
{
    struct usroce_fault fault = {.corrupt = 1, .seed = 3};
    struct link *link = open_fault(&fault);
    struct endpoint to = endpoint("10.0.0.2", 4791);
    static uint32_t places[64];
    uint32_t different = 0;

    for (uint32_t n = 0; n < 2000; n++) {
        int bits = 0;

        send_frame(link, &to, n, 64, 0);
        for (uint32_t i = 0; i < 64; i++) {
            uint8_t change = ((uint8_t *)notes.pieces[0][0].iov_base)[i] ^ pending[0][i];

            bits += __builtin_popcount(change);
            places[i] += change != 0;
        }
        check(bits == 1, "one bit is flipped");
        flush(link);
    }
    for (uint32_t i = 0; i < 64; i++)
        different += places[i] != 0;
    check(different == 64, "anywhere in the frame");
    link->ops->close(link);
}

static void rates(void)
{
    enum { COUNT = 10000 };
    struct usroce_fault fault = {.drop = 0.1, .duplicate = 0.05, .reorder = 0.02, .corrupt = 0.03, .seed = 11};
    struct link *link = open_fault(&fault);
    struct usroce_counters *counters = &notes.counters;

    send_many(link, 0, COUNT);
    check(near(counters->faults_dropped, COUNT * 0.1), "as many are dropped");
    check(near(counters->faults_duplicated, COUNT * 0.9 * 0.05), "as many are doubled");
    check(near(counters->faults_corrupted, COUNT * 0.9 * 0.03), "as many are damaged");
    check(near(counters->faults_reordered, COUNT * 0.9 * 0.02), "as many are held back");
    link = link_unwrap(link);
    check(notes.sent == COUNT - counters->faults_dropped + counters->faults_duplicated, "nothing else is lost");
}

/* One run with every fault; what came out is in the notes. */
static void run(uint64_t seed, uint32_t *numbers, uint32_t *count)
{
    struct usroce_fault fault = {.drop = 0.1, .duplicate = 0.1, .reorder = 0.1, .corrupt = 0.1, .seed = seed};
    struct link *link = open_fault(&fault);

    send_many(link, 0, 2000);
    link_unwrap(link);
    memcpy(numbers, notes.numbers, notes.sent * sizeof(*numbers));
    *count = notes.sent;
}

static void same_seed_same_faults(void)
{
    static uint32_t first[MAX_FRAMES], second[MAX_FRAMES], other[MAX_FRAMES];
    uint32_t first_count, second_count, other_count;

    run(5, first, &first_count);
    run(5, second, &second_count);
    run(6, other, &other_count);
    check(first_count == second_count && !memcmp(first, second, first_count * sizeof(*first)), "the same faults");
    check(first_count != other_count || memcmp(first, other, first_count * sizeof(*first)), "other ones");
}

/* Each frame held back comes right after exactly `gap` that were not. */
static void reordered(uint32_t setting, uint32_t gap)
{
    struct usroce_fault fault = {.reorder = 0.05, .reorder_gap = setting, .seed = 9};
    struct link *link = open_fault(&fault);
    static bool held[4000];
    uint32_t highest = 0, num_held = 0;

    send_many(link, 0, 4000);
    check(notes.counters.faults_reordered > 100, "some are held back");
    link->ops->close(link); /* those that wait for more frames are lost */
    memset(held, 0, sizeof(held));
    for (uint32_t i = 0; i < notes.sent; i++) {
        held[notes.numbers[i]] = notes.numbers[i] < highest;
        num_held += held[notes.numbers[i]];
        highest = notes.numbers[i] > highest ? notes.numbers[i] : highest;
    }
    check(num_held + gap >= notes.counters.faults_reordered, "they are late");
    for (uint32_t i = 0; i < notes.sent; i++) {
        uint32_t later = 0;

        for (uint32_t k = 0; held[notes.numbers[i]] && k < i; k++)
            later += !held[notes.numbers[k]] && notes.numbers[k] > notes.numbers[i];
        check(!held[notes.numbers[i]] || later == gap, "as many have overtaken it");
    }
}

static void held_by_time(void)
{
    struct usroce_fault fault = {.delay = 1, .delay_us = 250};
    struct link *link = open_fault(&fault);

    send_many(link, 0, 10);
    check(!notes.sent && notes.counters.faults_delayed == 10, "all are delayed");
    check(link->ops->deadline(link) == fake_now + 250000, "the deadline");
    fake_now += 249999;
    flush(link);
    check(!notes.sent, "not before their time");
    fake_now += 1;
    flush(link);
    check(notes.sent == 10 && notes.sound == 10, "then");
    check(link->ops->deadline(link) == UINT64_MAX, "no deadline any more");
    fault = (struct usroce_fault){.reorder = 1};
    check(!link_fault_set(link, &fault), "set");
    send_many(link, 10, 10);
    check(notes.sent == 10 && link->ops->deadline(link) == fake_now + 10000000, "held, for 10 ms");
    fake_now += 10000000;
    flush(link);
    check(notes.sent == 20 && notes.numbers[10] == 10, "nothing overtook, the time came");
    link->ops->close(link);
}

static void held_frames_go_on(void)
{
    struct usroce_fault fault = {.delay = 1, .delay_us = 1000000}, none = {0};
    struct link *link = open_fault(&fault);

    send_many(link, 0, 10);
    check(!link_fault_set(link, &none) && notes.sent == 10, "other settings let go of what is held");
    check(!link_fault_set(link, &fault), "set");
    send_many(link, 10, 10);
    check(notes.sent == 10 && link_unwrap(link) == &notes.link && notes.sent == 20, "so does unwrapping");
    link = open_fault(&fault);
    send_many(link, 0, 5000);
    check(notes.sent == 5000 - 4096 && notes.counters.faults_delayed == 4096, "what is held is bounded");
    link->ops->close(link);
}

static void bad_settings(void)
{
    struct usroce_fault none = {0};
    double bad[] = {-0.1, 1.1, NAN, INFINITY};
    struct link *link = open_fault(&none), *other = NULL;

    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
        struct usroce_fault faults[] = {{.drop = bad[i]}, {.duplicate = bad[i]}, {.reorder = bad[i]},
                                        {.corrupt = bad[i]}, {.delay = bad[i]}};

        for (size_t k = 0; k < sizeof(faults) / sizeof(faults[0]); k++) {
            check(link_fault_set(link, &faults[k]) == EINVAL, "set: EINVAL");
            check(link_fault_open(&other, &notes.link, &faults[k]) == EINVAL && !other, "open: EINVAL");
        }
    }
    check(link_fault_set(&notes.link, &none) == EINVAL, "not a fault link");
    link->ops->close(link);
}

/* What the wrapper leaves to the link below. */
static void handed_through(void)
{
    struct usroce_fault all = {.drop = 1, .corrupt = 1};
    struct link *link = open_fault(&all);
    struct view incoming = {.size = 5}, view = {0};

    notes.incoming = &incoming;
    notes.num_incoming = 1;
    check(link->ops->receive(link, &view, 1) == 1 && view.size == 5, "what arrives takes no faults");
    notes.deadline = 77;
    check(link->ops->deadline(link) == 77, "the deadline of the link below");
    link->ops->close(link);
}

/* Receives what the kernel took of `from`; returns how many frames were sound. */
static uint32_t receive_sent(const struct side *from, struct side *to)
{
    static struct view views[LINK_MAX_VIEWS];
    uint32_t sound = 0;

    while (to->counters.received < from->counters.sent) {
        int count = receive(to->link, views, LINK_MAX_VIEWS);

        need(count > 0, "frames");
        for (int i = 0; i < count; i++)
            sound += icrc_check(&views[i], &to->link->local, false);
    }
    return sound;
}

/* Every fault over a real socket: what is sound arrives sound, though one link copies and one changes the ICRC. */
static void faults_over_udp(void)
{
    struct usroce_fault fault = {.duplicate = 0.2, .reorder = 0.2, .corrupt = 0.2, .delay = 0.2, .seed = 4};
    struct side a, b;
    uint64_t sound = 0, damaged;

    need(!open_side(&a, "127.0.0.1", 0, true) && !open_side(&b, "127.0.0.1", 0, true), "links");
    need(!link_fault_open(&a.link, a.link, &fault), "a fault link");
    for (uint32_t n = 0; n < 1000; n++) {
        send_frame(a.link, &b.link->local, n, 500, 0);
        if (n % 50 != 49)
            continue;
        fake_now += 20000000;
        flush(a.link);
        sound += receive_sent(&a, &b);
    }
    a.link = link_unwrap(a.link);
    sound += receive_sent(&a, &b);
    check(b.counters.received == 1000 + a.counters.faults_duplicated, "all arrive");
    damaged = b.counters.received - sound;
    /* a damaged frame can be doubled; the bits of one byte do not count */
    check(damaged > a.counters.faults_corrupted - 10 && damaged < 2 * a.counters.faults_corrupted,
          "what was not damaged is sound");
    close_side(&a);
    close_side(&b);
}

int main(void)
{
    no_faults();
    certain_faults();
    one_bit();
    rates();
    same_seed_same_faults();
    reordered(0, 3);
    reordered(10, 10);
    held_by_time();
    held_frames_go_on();
    bad_settings();
    handed_through();
    faults_over_udp();
    return failures != 0;
}
