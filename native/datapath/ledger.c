/* The arithmetic of a connection's credits that is done for each frame. What it means, and why nobody ever blocks, is
 * told in protocol/credit.py. */
#include "ledger.h"

int ledger_send_data(Ledger *ledger)
{
    if (ledger->data_sent >= ledger->data_limit) {
        PyErr_SetString(misuse_error, "no data credit");
        return -1;
    }
    ledger->data_sent++;
    return 0;
}

void ledger_stamp(Ledger *ledger, uint32_t *data, uint32_t *control)
{
    ledger->data_told = ledger->window + ledger->data_released;
    ledger->control_told = ledger->control + ledger->control_received;
    *data = (uint32_t)ledger->data_told;
    *control = (uint32_t)ledger->control_told;
}

int ledger_receive_data(Ledger *ledger)
{
    ledger->data_received++;
    if (ledger->data_received > ledger->data_told) {
        PyErr_Format(protocol_error, "peer sent data frame %lld with credit for %lld", ledger->data_received,
                     ledger->data_told);
        return -1;
    }
    return 0;
}

int ledger_learn(Ledger *ledger, uint32_t data, uint32_t control)
{
    long long data_rise = (uint32_t)(data - (uint32_t)ledger->data_limit);
    long long control_rise = (uint32_t)(control - (uint32_t)ledger->control_limit);

    if (ledger->data_limit + data_rise > ledger->data_sent + ledger->peer_window_max) {
        PyErr_Format(protocol_error, "peer grants %lld data credits more, %lld are left of %lld", data_rise,
                     ledger->data_limit - ledger->data_sent, ledger->peer_window_max);
        return -1;
    }
    if (ledger->control_limit + control_rise > ledger->control_sent + ledger->peer_control) {
        PyErr_Format(protocol_error, "peer grants %lld control credits more, %lld are left of %lld", control_rise,
                     ledger->control_limit - ledger->control_sent, ledger->peer_control);
        return -1;
    }
    ledger->data_limit += data_rise;
    ledger->control_limit += control_rise;
    return data_rise > 0;
}

int ledger_release(Ledger *ledger)
{
    if (ledger->data_released >= ledger->data_received) {
        PyErr_SetString(misuse_error, "more released than received");
        return -1;
    }
    ledger->data_released++;
    return 0;
}

bool ledger_update_due(const Ledger *ledger)
{
    long long left = ledger->control_limit - ledger->control_sent;
    long long owed = ledger->window + ledger->data_released - ledger->data_told;

    if (left <= 0)
        return false;
    if (owed > 0 &&
        (ledger->data_received == ledger->data_told || (left > 1 && owed >= (ledger->window + 1) / 2)))
        return true;
    return ledger->control + ledger->control_received - ledger->control_told >= (ledger->control + 1) / 2;
}
