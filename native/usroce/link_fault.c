/* A wrapper that does to the frames that are sent what a bad network does, as told by struct usroce_fault.
 *
 * A frame takes its faults in this order: dropped; damaged; a copy of it, as it is now, sent right away; then the
 * frame itself delayed, or held until others have passed, or sent. Each fault that is possible draws its own
 * random number for each frame, whatever the others did: the same seed and traffic give the same faults.
 *
 * What is held, damaged or doubled is a copy, for the memory of the original is free after the next flush, and
 * the link below may change the ICRC in it. A copy that went below lives until the flush after. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "icrc.h"
#include "usroce.h"

enum {
    MAX_HELD = 4096,      /* frames; beyond it they are sent right away */
    DEFAULT_GAP = 3,
    REORDER_NS = 10 * 1000 * 1000,
};

/* A frame of which the link has its own copy. */
struct copy {
    struct copy *next;
    struct endpoint to;
    uint64_t due;         /* ns */
    uint64_t behind;      /* reordered: when so many frames have passed */
    uint8_t traffic_class;
    bool sealed;
    uint32_t size;
    struct iovec iov;
    uint8_t data[];
};

/* First in, first out: with settings that stay, what came first is due first. */
struct queue {
    struct copy *first, **last;
};

struct fault_link {
    struct link link;
    struct usroce_fault fault;
    uint64_t random;
    uint64_t passed;      /* frames sent without being held */
    uint32_t held;
    struct queue delayed, reordered;
    struct queue below;   /* copies that went to the link below and wait for the flush */
};

static const struct link_ops fault_ops;

static struct fault_link *fault_of(struct link *link)
{
    return (struct fault_link *)(void *)link; /* its first member */
}

/* --- copies ------------------------------------------------------------------------------------------------ */

static void queue_init(struct queue *queue)
{
    queue->first = NULL;
    queue->last = &queue->first;
}

static void queue_push(struct queue *queue, struct copy *copy)
{
    copy->next = NULL;
    *queue->last = copy;
    queue->last = &copy->next;
}

static struct copy *queue_pop(struct queue *queue)
{
    struct copy *copy = queue->first;

    queue->first = copy->next;
    if (!queue->first)
        queue->last = &queue->first;
    return copy;
}

static void queue_free(struct queue *queue)
{
    while (queue->first)
        free(queue_pop(queue));
}

/* NULL: no memory. */
static struct copy *copy_frame(const struct frame *frame)
{
    struct copy *copy = malloc(sizeof(*copy) + frame->size);
    size_t at = 0;

    if (!copy)
        return NULL;
    for (int i = 0; i < frame->niov; i++) {
        memcpy(copy->data + at, frame->iov[i].iov_base, frame->iov[i].iov_len);
        at += frame->iov[i].iov_len;
    }
    copy->to = *frame->to;
    copy->traffic_class = frame->traffic_class;
    copy->sealed = frame->sealed;
    copy->size = frame->size;
    copy->iov = (struct iovec){copy->data, frame->size};
    return copy;
}

static struct frame frame_of(struct copy *copy)
{
    return (struct frame){
        .to = &copy->to,
        .iov = &copy->iov,
        .niov = 1,
        .size = copy->size,
        .traffic_class = copy->traffic_class,
        .sealed = copy->sealed,
    };
}

static void send_copy(struct fault_link *fault, struct copy *copy)
{
    struct frame frame = frame_of(copy);

    queue_push(&fault->below, copy);
    fault->link.below->ops->send(fault->link.below, &frame);
}

/* --- chance ------------------------------------------------------------------------------------------------ */

/* SplitMix64: any seed is as good as any other. */
static uint64_t next_random(struct fault_link *fault)
{
    uint64_t z = fault->random += 0x9e3779b97f4a7c15u;

    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

static bool happens(struct fault_link *fault, double probability)
{
    return (double)(next_random(fault) >> 11) * 0x1p-53 < probability;
}

static bool is_probability(double value)
{
    return value >= 0 && value <= 1; /* and not NaN */
}

static bool is_valid(const struct usroce_fault *fault)
{
    return is_probability(fault->drop) && is_probability(fault->duplicate) && is_probability(fault->reorder) &&
           is_probability(fault->corrupt) && is_probability(fault->delay);
}

/* --- sending ----------------------------------------------------------------------------------------------- */

static void release_first(struct fault_link *fault, struct queue *queue)
{
    fault->held--;
    send_copy(fault, queue_pop(queue));
}

/* What was held back for the frames that have passed by now. */
static void release_overtaken(struct fault_link *fault)
{
    while (fault->reordered.first && fault->reordered.first->behind <= fault->passed)
        release_first(fault, &fault->reordered);
}

static void release_due(struct fault_link *fault, struct queue *queue, uint64_t now)
{
    while (queue->first && queue->first->due <= now)
        release_first(fault, queue);
}

static void release_all(struct fault_link *fault)
{
    release_due(fault, &fault->reordered, UINT64_MAX);
    release_due(fault, &fault->delayed, UINT64_MAX);
}

/* The frame, of which `copy` is the link's own one if there is one already, goes on at once. */
static void pass(struct fault_link *fault, const struct frame *frame, struct copy *copy)
{
    if (copy)
        send_copy(fault, copy);
    else
        fault->link.below->ops->send(fault->link.below, frame);
    fault->passed++;
    release_overtaken(fault);
}

/* Sealed before, or the damage would be sealed in. */
static struct copy *corrupt(struct fault_link *fault, const struct frame *frame)
{
    uint64_t bit = next_random(fault) % (8 * (uint64_t)frame->size);
    struct frame sealed = icrc_seal(&fault->link.local, frame);
    struct copy *copy = copy_frame(&sealed);

    if (!copy)
        return NULL;
    copy->data[bit / 8] ^= (uint8_t)(1 << bit % 8);
    fault->link.counters->faults_corrupted++;
    return copy;
}

static void duplicate(struct fault_link *fault, const struct frame *frame)
{
    struct copy *copy = copy_frame(frame);

    if (!copy)
        return;
    fault->link.counters->faults_duplicated++;
    pass(fault, NULL, copy);
}

/* Holds the frame back, or not if it cannot. */
static bool hold(struct fault_link *fault, struct queue *queue, const struct frame *frame, struct copy *copy,
                 uint64_t ns)
{
    if (fault->held == MAX_HELD)
        return false;
    if (!copy)
        copy = copy_frame(frame);
    if (!copy)
        return false;
    copy->due = now_ns() + ns;
    copy->behind = fault->passed + (fault->fault.reorder_gap ? fault->fault.reorder_gap : DEFAULT_GAP);
    queue_push(queue, copy);
    fault->held++;
    return true;
}

static void fault_send(struct link *link, const struct frame *original)
{
    struct fault_link *fault = fault_of(link);
    const struct usroce_fault *settings = &fault->fault;
    struct usroce_counters *counters = link->counters;
    bool drops = happens(fault, settings->drop), corrupts = happens(fault, settings->corrupt);
    bool duplicates = happens(fault, settings->duplicate), delays = happens(fault, settings->delay);
    bool reorders = happens(fault, settings->reorder);
    struct frame frame = *original;
    struct copy *copy = NULL;

    if (drops) {
        counters->faults_dropped++;
        return;
    }
    if (corrupts && frame.size)
        copy = corrupt(fault, &frame);
    if (copy)
        frame = frame_of(copy);
    if (duplicates)
        duplicate(fault, &frame);
    if (delays && hold(fault, &fault->delayed, &frame, copy, (uint64_t)settings->delay_us * 1000))
        counters->faults_delayed++;
    else if (!delays && reorders && hold(fault, &fault->reordered, &frame, copy, REORDER_NS))
        counters->faults_reordered++;
    else
        pass(fault, &frame, copy);
}

static void fault_flush(struct link *link)
{
    struct fault_link *fault = fault_of(link);
    uint64_t now = fault->held ? now_ns() : 0;

    release_due(fault, &fault->reordered, now);
    release_due(fault, &fault->delayed, now);
    link->below->ops->flush(link->below);
    queue_free(&fault->below);
}

/* --- the rest ---------------------------------------------------------------------------------------------- */

static int fault_receive(struct link *link, struct view *views, int max)
{
    return link->below->ops->receive(link->below, views, max);
}

static uint64_t earlier(uint64_t deadline, const struct queue *queue)
{
    return queue->first && queue->first->due < deadline ? queue->first->due : deadline;
}

static uint64_t fault_deadline(const struct link *link)
{
    const struct fault_link *fault = (const void *)link;

    return earlier(earlier(link->below->ops->deadline(link->below), &fault->delayed), &fault->reordered);
}

/* What is held is lost, as on a cable that is cut. */
static void fault_close(struct link *link)
{
    struct fault_link *fault = fault_of(link);

    link->below->ops->close(link->below);
    queue_free(&fault->delayed);
    queue_free(&fault->reordered);
    queue_free(&fault->below);
    free(fault);
}

/* Everything that is held goes out now. */
static void send_held(struct fault_link *fault)
{
    release_all(fault);
    fault->link.below->ops->flush(fault->link.below);
    queue_free(&fault->below);
}

static struct link *fault_unwrap(struct link *link)
{
    struct fault_link *fault = fault_of(link);
    struct link *below = link->below;

    send_held(fault);
    free(fault);
    return below;
}

static const struct link_ops fault_ops = {
    .send = fault_send,
    .flush = fault_flush,
    .receive = fault_receive,
    .deadline = fault_deadline,
    .close = fault_close,
    .unwrap = fault_unwrap,
};

bool link_is_fault(const struct link *link)
{
    return link->ops == &fault_ops;
}

int link_fault_open(struct link **link, struct link *below, const struct usroce_fault *fault)
{
    struct fault_link *wrapper;

    if (!is_valid(fault))
        return EINVAL;
    wrapper = calloc(1, sizeof(*wrapper));
    if (!wrapper)
        return ENOMEM;
    wrapper->link = *below;
    wrapper->link.ops = &fault_ops;
    wrapper->link.below = below;
    wrapper->fault = *fault;
    wrapper->random = fault->seed;
    queue_init(&wrapper->delayed);
    queue_init(&wrapper->reordered);
    queue_init(&wrapper->below);
    *link = &wrapper->link;
    return 0;
}

int link_fault_set(struct link *link, const struct usroce_fault *settings)
{
    struct fault_link *fault = fault_of(link);

    if (!link_is_fault(link) || !is_valid(settings))
        return EINVAL;
    send_held(fault);
    fault->fault = *settings;
    fault->random = settings->seed;
    return 0;
}
