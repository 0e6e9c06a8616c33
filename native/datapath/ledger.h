/* The counters of a connection's credits: plain arithmetic, of no device. The type is a module of its own
 * (aiordma._native._ledger), so that the protocol layer needs no other. */
#ifndef AIORDMA_LEDGER_H
#define AIORDMA_LEDGER_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdbool.h>
#include <stdint.h>

typedef struct {
    PyObject_HEAD
    long long window, asked, control, peer_control, peer_window_max;
    long long data_limit, data_sent, control_limit, control_sent;
    long long data_received, data_released, control_received, data_told, control_told;
    long long mark; /* `used` of a Receiver is called when so many were released */
} Ledger;

int ledger_send_data(Ledger *ledger);                                   /* -1 and MisuseError */
void ledger_stamp(Ledger *ledger, uint32_t *data, uint32_t *control);
int ledger_receive_data(Ledger *ledger);                                /* -1 and ProtocolError */
int ledger_learn(Ledger *ledger, uint32_t data, uint32_t control);      /* 1: more for data; -1 and ProtocolError */
int ledger_release(Ledger *ledger);                                     /* -1 and MisuseError */
bool ledger_update_due(const Ledger *ledger);

/* Each module that links ledger.c has these, of aiordma.errors. */
extern PyObject *protocol_error, *misuse_error;

#endif
