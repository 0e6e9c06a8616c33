/* The capture link: its files are parsed again, and the ICRC of what is in them is checked. */
#include "links.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <sys/resource.h>
#include <unistd.h>

/* --- captures ---------------------------------------------------------------------------------------------- */

static char capture_path[] = "/tmp/test_links_XXXXXX";

/* The whole file, in memory of its own. */
static uint8_t *read_capture(size_t *size)
{
    FILE *file = fopen(capture_path, "rb");
    uint8_t *data;
    long end = -1;

    need(file && !fseek(file, 0, SEEK_END) && (end = ftell(file)) >= 0 && !fseek(file, 0, SEEK_SET), "the file");
    *size = (size_t)end;
    data = malloc(*size + 1);
    need(data && fread(data, 1, *size, file) == *size, "its content");
    fclose(file);
    return data;
}

static uint32_t get16(const uint8_t *data)
{
    return (uint32_t)data[0] << 8 | data[1];
}

static uint32_t get32(const uint8_t *data) /* in the byte order of the host */
{
    return number_of(data);
}

/* 0xffff over what contains its own right checksum. */
static uint32_t sum_of(const uint8_t *data, size_t size, uint32_t total)
{
    for (size_t i = 0; i < size; i++)
        total += i % 2 ? data[i] : (uint32_t)data[i] << 8;
    while (total >> 16)
        total = (total & 0xffff) + (total >> 16);
    return total;
}

struct captured {
    struct endpoint from, to;
    uint32_t traffic_class, ip_id;
    const uint8_t *frame;
    uint32_t size;
};

static void parse_ipv4(const uint8_t *ip, uint32_t size, struct captured *captured)
{
    check(ip[0] == 0x45 && get16(ip + 2) == size, "IPv4, its length");
    check(get16(ip + 6) == 0x4000 && ip[8] && ip[9] == 17, "no fragments, time to live, UDP");
    check(sum_of(ip, 20, 0) == 0xffff, "the checksum of the IPv4 header");
    check(get16(ip + 26) == 0, "no UDP checksum");
    captured->traffic_class = ip[1];
    captured->ip_id = get16(ip + 4);
    captured->from = captured->to = endpoint("0.0.0.0", 0);
    memcpy(captured->from.gid.raw + 12, ip + 12, 4);
    memcpy(captured->to.gid.raw + 12, ip + 16, 4);
}

static void parse_ipv6(const uint8_t *ip, uint32_t size, struct captured *captured)
{
    check(ip[0] >> 4 == 6 && get16(ip + 4) == size - 40 && ip[6] == 17 && ip[7], "IPv6, length, UDP, hop limit");
    check(sum_of(ip + 8, size - 8, 17 + size - 40) == 0xffff && get16(ip + 46) != 0, "the UDP checksum");
    captured->traffic_class = (ip[0] & 15u) << 4 | ip[1] >> 4;
    captured->ip_id = 0;
    memcpy(captured->from.gid.raw, ip + 8, 16);
    memcpy(captured->to.gid.raw, ip + 24, 16);
}

/* Parses a file into at most `max` packets and returns how many there are. */
static uint32_t parse_capture(const uint8_t *data, size_t size, struct captured *captured, uint32_t max)
{
    size_t at = 24;
    uint32_t count = 0;

    need(size >= 24 && get32(data) == 0xa1b23c4d && get32(data + 20) == 101, "the file header");
    while (at + 16 <= size && count < max) {
        const uint8_t *ip = data + at + 16, *udp;
        uint32_t length = get32(data + at + 8);
        struct captured *each = &captured[count++];

        check(get32(data + at) > 1600000000 && get32(data + at + 4) < 1000000000, "the time");
        check(length == get32(data + at + 12), "complete");
        need(at + 16 + length <= size && length >= 28 + SMALLEST, "the record is whole");
        udp = ip + (ip[0] >> 4 == 4 ? 20 : 40);
        (ip[0] >> 4 == 4 ? parse_ipv4 : parse_ipv6)(ip, length, each);
        each->from.port = (uint16_t)get16(udp);
        each->to.port = (uint16_t)get16(udp + 2);
        each->frame = udp + 8;
        each->size = length - (uint32_t)(each->frame - ip);
        check(get16(udp + 4) == each->size + 8, "the length of UDP");
        at += 16 + length;
    }
    check(at == size, "the file ends with a record");
    return count;
}

static struct link *open_pcap(struct link *below)
{
    struct capture *capture = NULL;
    struct link *link = NULL;

    need(!capture_open(&capture, capture_path, false) && !link_pcap_open(&link, below, capture), "a capture link");
    capture_release(capture); /* the link has its own reference */
    return link;
}

/* A captured frame as if it had arrived, its ICRC for the identification that the capture says. */
static bool is_sound(const struct captured *captured)
{
    struct view view = {.from = captured->from, .data = (uint8_t *)(uintptr_t)captured->frame};

    view.size = captured->size;
    view.ip_id = (uint16_t)captured->ip_id;
    return icrc_check(&view, &captured->to, false);
}

static void capture_sent(const char *address, const char *peer)
{
    struct link *link = open_pcap(new_notes(address));
    struct endpoint to = endpoint(peer, 4792);
    static struct captured captured[101];
    uint8_t *data;
    size_t size;

    check(link_is_pcap(link) && !link_is_pcap(link->below), "what it is");
    for (uint32_t n = 0; n < 100; n++)
        send_frame(link, &to, n, SMALLEST + 40 * n + n % 2, n % 5 ? 0 : 0x6b); /* an odd size now and then */
    flush(link);
    data = read_capture(&size); /* complete after a flush */
    check(parse_capture(data, size, captured, 101) == 100, "as many as were sent");
    for (uint32_t n = 0; n < 100; n++) {
        check(number_of(captured[n].frame) == n && captured[n].size == SMALLEST + 40 * n + n % 2, "the frame");
        check(!memcmp(&captured[n].from.gid, &link->local.gid, 16) && captured[n].from.port == 4791, "from");
        check(!memcmp(&captured[n].to.gid, &to.gid, 16) && captured[n].to.port == 4792, "to");
        check(captured[n].traffic_class == (n % 5 ? 0 : 0x6b) && !captured[n].ip_id, "the traffic class");
        check(is_sound(&captured[n]), "the ICRC is that of identification 0");
    }
    check(notes.sent == 100 && notes.sound == 100, "the link below has sent them");
    free(data);
    link->ops->close(link);
    check(notes.closed == 1, "the link below is closed too");
}

/* More between two flushes than the buffer has room for, and frames that no packet has room for. */
static void capture_much(void)
{
    struct link *link = open_pcap(new_notes("10.0.0.1"));
    struct endpoint to = endpoint("10.0.0.2", 4791);
    static struct captured captured[401];
    uint8_t *data;
    size_t size;

    for (uint32_t n = 0; n < 400; n++)
        send_frame(link, &to, n, 4112, 0);
    send_frame(link, &to, 400, 65512, 0);
    flush(link);
    notes.deadline = 77;
    check(link->ops->deadline(link) == 77, "the deadline of the link below");
    link->ops->close(link);
    data = read_capture(&size);
    check(parse_capture(data, size, captured, 401) == 400, "all but what is too large");
    for (uint32_t n = 0; n < 400; n++)
        check(number_of(captured[n].frame) == n && is_sound(&captured[n]), "in order, and whole");
    free(data);
}

/* Frames that arrived: alone, as segments, and as packets that merely came in a row. */
static void capture_received(void)
{
    struct link *link = open_pcap(new_notes("10.0.0.1"));
    struct endpoint from = endpoint("10.0.0.2", 7);
    struct view incoming[4], views[4];
    static struct captured captured[5];
    uint32_t adjustment = icrc_adjustment(64, 3);
    uint8_t *data;
    size_t size;

    for (uint32_t i = 0; i < 4; i++)
        incoming[i] = (struct view){.from = from, .data = make_frame(&from, &link->local, i, 64), .size = 64};
    for (int i = 0; i < TRAILER; i++)
        incoming[1].data[60 + i] ^= (uint8_t)(adjustment >> 8 * i);
    incoming[1].ip_id = incoming[2].ip_id = 3;
    incoming[3].ip_id = 9;
    incoming[3].data[20] ^= 1;
    notes.incoming = incoming;
    notes.num_incoming = 4;
    check(link->ops->receive(link, views, 4) == 4 && !memcmp(incoming, views, sizeof(views)), "handed through");
    check(link_unwrap(link) == &notes.link && !notes.closed, "unwrapped");
    data = read_capture(&size);
    check(parse_capture(data, size, captured, 5) == 4, "each one is captured");
    check(captured[0].ip_id == 0 && is_sound(&captured[0]), "alone");
    check(captured[1].ip_id == 3 && is_sound(&captured[1]), "a segment");
    check(captured[2].ip_id == 0 && is_sound(&captured[2]), "one that was only taken for a segment");
    check(captured[3].ip_id == 9 && !is_sound(&captured[3]), "a damaged one stays damaged");
    check(captured[0].from.port == 7 && captured[0].to.port == 4791, "the ports");
    free(data);
    for (uint32_t i = 0; i < 4; i++)
        free(incoming[i].data);
}

/* --- several threads, one capture */

struct writer {
    struct side side;
    struct link *link;
    struct endpoint to;
    uint32_t size;
};

static void *write_frames(void *argument)
{
    struct writer *writer = argument;
    uint8_t *data = make_frame(&writer->link->local, &writer->to, writer->size, writer->size);

    for (uint32_t n = 0; n < 1000; n++) {
        struct iovec iov = {data, writer->size};
        struct frame frame = {.to = &writer->to, .iov = &iov, .niov = 1, .size = writer->size};

        writer->link->ops->send(writer->link, &frame);
        writer->link->ops->flush(writer->link);
    }
    free(data);
    return NULL;
}

/* From several threads; with `each`, every link has opened the file by itself, as other processes would. */
static void capture_from_all(bool each)
{
    enum { WRITERS = 4 };
    static struct writer writers[WRITERS];
    static struct captured captured[WRITERS * 1000 + 1];
    pthread_t threads[WRITERS];
    struct capture *capture = NULL;
    uint8_t *data;
    size_t size;
    uint32_t count;

    unlink(capture_path);
    need(each || !capture_open(&capture, capture_path, false), "a capture");
    for (uint32_t i = 0; i < WRITERS; i++) {
        need(!each || !capture_open(&capture, capture_path, true), "a capture");
        need(!open_side(&writers[i].side, "127.0.0.1", 0, true), "a link");
        need(!link_pcap_open(&writers[i].link, writers[i].side.link, capture), "a capture link");
        writers[i].to = writers[i].link->local; /* to itself */
        writers[i].size = 64 + 1000 * i;
        need(!pthread_create(&threads[i], NULL, write_frames, &writers[i]), "a thread");
        if (each)
            capture_release(capture);
    }
    if (!each)
        capture_release(capture);
    for (uint32_t i = 0; i < WRITERS; i++) {
        need(!pthread_join(threads[i], NULL), "its end");
        writers[i].link->ops->close(writers[i].link);
    }
    data = read_capture(&size);
    count = parse_capture(data, size, captured, WRITERS * 1000 + 1);
    check(count == WRITERS * 1000, "the frames of all threads");
    for (uint32_t i = 0; i < count; i++)
        check(number_of(captured[i].frame) == captured[i].size && is_sound(&captured[i]), "each one whole");
    free(data);
}

static void capture_shared(void)
{
    capture_from_all(false);
    capture_from_all(true);
}

/* --- files that cannot be written */

static void capture_not_opened(void)
{
    struct capture *capture = NULL;

    check(capture_open(&capture, "/nonexistent/file", false) == ENOENT && !capture, "ENOENT");
    if (access("/dev/full", W_OK) == 0)
        check(capture_open(&capture, "/dev/full", false) == ENOSPC && !capture, "ENOSPC");
}

/* Runs out of room under way: the traffic goes on, and one line says so. */
static void capture_out_of_room(void)
{
    struct rlimit before, limit;
    struct link *link = open_pcap(new_notes("10.0.0.1"));
    FILE *said = tmpfile();
    int error = dup(2);
    char text[4096] = "";

    need(said && error >= 0 && !getrlimit(RLIMIT_FSIZE, &before), "files");
    signal(SIGXFSZ, SIG_IGN);
    limit = before;
    limit.rlim_cur = 10000;
    need(!setrlimit(RLIMIT_FSIZE, &limit) && dup2(fileno(said), 2) == 2, "a limit");
    send_many(link, 0, 500);
    link->ops->close(link);
    need(!setrlimit(RLIMIT_FSIZE, &before) && dup2(error, 2) == 2, "no limit");
    close(error);
    rewind(said);
    text[fread(text, 1, sizeof(text) - 1, said)] = 0;
    fclose(said);
    check(notes.sent == 500 && notes.sound == 500, "the traffic goes on");
    check(strstr(text, capture_path) && strstr(text, strerror(EFBIG)), "the line says where and why");
    check(strchr(text, '\n') == text + strlen(text) - 1, "one line");
}

int main(void)
{
    int fd = mkstemp(capture_path);

    need(fd >= 0, "a file");
    close(fd);
    capture_sent("10.0.0.1", "10.0.0.2");
    capture_sent("2001:db8::1", "2001:db8::2");
    capture_much();
    capture_received();
    capture_shared();
    capture_not_opened();
    capture_out_of_room();
    unlink(capture_path);
    return failures != 0;
}
