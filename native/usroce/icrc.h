/* The invariant CRC of RoCE v2 (InfiniBand Architecture Specification, Annex A17): CRC-32, reflected, over eight
 * bytes of ones in place of the LRH, the IP and UDP headers with the fields that routers change set to ones, and
 * the frame from BTH on with resv8a set to ones; sent in little-endian order.
 *
 * The IPv4 identification field is covered, but neither end of a UDP socket sees it. On Linux an unconnected
 * socket that forbids fragmentation sends 0, and segments of one large send are numbered from there. CRC is
 * linear: what another identification changes is an XOR that depends only on the size, and an unknown one can be
 * recovered from the difference; see icrc_check(). / */
#ifndef ICRC_H
#define ICRC_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

#include "link.h"

/* Register value after the pseudo-header, for a frame of `frame_size` bytes (BTH to ICRC) and identification 0. */
uint32_t icrc_begin(const struct endpoint *from, const struct endpoint *to, uint32_t frame_size);
/* Plain reflected CRC-32 step without initial or final inversion; carry-less multiplication where there is any. */
uint32_t icrc_update(uint32_t state, const void *data, size_t size);
/* The same without special instructions: what icrc_update() is where the processor has none. */
uint32_t icrc_update_portable(uint32_t state, const void *data, size_t size);
/* Over a whole frame in pieces, without its last 4 bytes; what is to be stored there (host order value, stored
 * LE). The first piece has all of the BTH, and there is room for an ICRC. */
uint32_t icrc_frame(const struct endpoint *from, const struct endpoint *to, const struct iovec *iov, int niov,
                    uint32_t frame_size);
/* Puts it where it belongs, unless the frame is sealed: `frame` as it is then. */
struct frame icrc_seal(const struct endpoint *from, const struct frame *frame);
/* What to XOR to the ICRC of a frame of `frame_size` bytes when its identification is `ip_id` and not 0. */
uint32_t icrc_adjustment(uint32_t frame_size, uint16_t ip_id);
/* Whether the ICRC of a received frame is right; false for less than a BTH and an ICRC. Identifications
 * view->ip_id and 0..63 are tried, or, with `any_ip_id`, every one (that costs 16 of the 32 bits of protection,
 * and is for peers whose IP layer counts). The bytes are not changed. */
bool icrc_check(const struct view *view, const struct endpoint *to, bool any_ip_id);

#endif
